//! Macros and environment variables, by llama-swap's rules.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use common::{errors, load, read};
use registry::{CommandLaunch, Launch, Options, Registry, Source};
use serde_json::json;

fn command<'r>(registry: &'r Registry, id: &str) -> &'r CommandLaunch {
    match &registry.models[id].launch {
        Launch::Command(command) => command,
        Launch::Worker(_) => panic!("{id} is a worker"),
    }
}

#[test]
fn a_macro_may_use_those_declared_before_it() {
    let registry = load(
        "macros:\n  bin: /opt/server\n  base: ${bin} --quiet\nmodels:\n  m:\n    cmd: ${base} --port ${PORT} --id ${MODEL_ID}\n",
    );
    assert_eq!(
        command(&registry, "m").cmd,
        "/opt/server --quiet --port 5800 --id m"
    );
}

#[test]
fn a_forward_reference_is_left_and_reported() {
    let found = errors("macros:\n  a: '${b}'\n  b: x\nmodels:\n  m: {cmd: '${a} ${PORT}'}\n");
    assert_eq!(
        found,
        ["/etc/swap/c.yaml:5:12: error: models.m.cmd: unknown macro `${b}`"]
    );
}

#[test]
fn a_models_own_macro_goes_before_the_global_one_and_keeps_its_place() {
    let registry = load(
        "macros:\n  size: 1\n  args: --size ${size}\nmodels:\n  a: {cmd: 'x ${args} ${PORT}'}\n  \
         b: {cmd: 'x ${args} ${PORT}', macros: {size: 2}}\n",
    );
    assert_eq!(command(&registry, "a").cmd, "x --size 1 5800");
    assert_eq!(command(&registry, "b").cmd, "x --size 2 5801");
}

#[test]
fn a_value_that_is_one_macro_takes_its_type() {
    let registry = load(
        "macros: {n: 7, f: 0.5, t: true, s: '7', v: 1.10}\nstartPort: ${n}000\nglobalTTL: ${n}\nmodels:\n  m:\n    \
         cmd: x ${PORT}\n    ttl: ${n}\n    unlisted: ${t}\n    name: ${v}\n    filters:\n      \
         setParams: {a: '${n}', b: '${f}', c: '${t}', d: '${s}', e: 'x${n}', model: y}\n    \
         metadata: {port: '${PORT}', url: 'http://h:${PORT}', deep: [{n: '${n}'}]}\n",
    );
    let model = &registry.models["m"];
    assert_eq!(registry.globals.start_port, 7000);
    assert_eq!(model.ttl.unwrap().as_secs(), 7);
    assert!(model.unlisted);
    assert_eq!(model.name.as_deref(), Some("1.10"));
    assert_eq!(
        json!(model.filters.set_params),
        json!({"a": 7, "b": 0.5, "c": true, "d": "7", "e": "x7"})
    );
    assert_eq!(
        json!(model.metadata),
        json!({"port": 7000, "url": "http://h:7000", "deep": [{"n": 7}]})
    );
}

#[test]
fn wrong_declarations_are_all_reported() {
    let found = errors(
        "macros:\n  PORT: 1\n  'a b': 1\n  list: [1]\n  self: x${self}\nmodels:\n  m:\n    cmd: x ${PORT}\n    \
         macros: {MODEL_ID: y}\n",
    );
    let says = |i: usize, text: &str| assert!(found[i].contains(text), "{}", found[i]);
    says(0, "2:3: error: macros.PORT: `PORT` is reserved");
    says(1, "3:3: error: macros.a b: a macro's name is");
    says(
        2,
        "4:9: error: macros.list: a macro is text, a number or true/false, not a list",
    );
    says(3, "5:9: error: macros.self: macro `self` contains itself");
    says(4, "9:14: error: models.m.macros.MODEL_ID: `MODEL_ID` is reserved");
    assert_eq!(found.len(), 5);
    let long = "n".repeat(64);
    assert!(errors(&format!("macros: {{{long}: 1}}"))[0].contains("1 to 63"));
}

#[test]
fn whatever_is_left_is_an_error_where_it_stands() {
    let found = errors(
        "logLevel: ${nope}\npeers:\n  p: {proxy: 'http://${PORT}', models: [x]}\nmodels:\n  m:\n    cmd: a ${PORT}\n    \
         description: ${what}\n    metadata:\n      k: ['${MODEL}']\n    checkEndpoint: /${PID}\n  n:\n    \
         cmd: b\n    proxy: http://h:1\n    name: ${PORT}\n",
    );
    for (line, text) in [
        ("1:11", "logLevel: unknown macro `${nope}`"),
        ("3:14", "peers.p.proxy: unknown macro `${PORT}`"),
        ("7:18", "models.m.description: unknown macro `${what}`"),
        ("9:11", "models.m.metadata.k[0]: unknown macro `${MODEL}`"),
        (
            "10:20",
            "models.m.checkEndpoint: `${PID}` is known in `cmdStop` only",
        ),
        (
            "14:11",
            "models.n.name: `${PORT}` is known only where `cmd` uses it too",
        ),
    ] {
        let wanted = format!("/etc/swap/c.yaml:{line}: error: {text}");
        assert!(found.contains(&wanted), "{wanted}\n{found:#?}");
    }
    assert_eq!(found.len(), 6, "{found:#?}");
}

#[test]
fn the_default_address_needs_a_port_in_the_command() {
    let found = errors("models:\n  m:\n    cmd: server\n");
    assert!(
        found[0].starts_with("/etc/swap/c.yaml:3:5: error: models.m.proxy: needs ${PORT}"),
        "{}",
        found[0]
    );
    assert!(
        errors("models: {m: {cmd: x, proxy: 'http://h:${PORT}'}}")[0]
            .contains("models.m.proxy: needs ${PORT}")
    );
    // A port that only a comment mentions is no port.
    assert!(
        errors("models:\n  m:\n    cmd: |\n      server\n      # --port ${PORT}\n")[0]
            .contains("needs ${PORT}")
    );
}

#[test]
fn comments_in_commands_need_no_macros() {
    let registry = load(
        "models:\n  m:\n    cmd: |\n      server ${PORT}\n      # ${unknown}\n    cmdStop: |\n      # ${x}\n      stop ${PID}\n",
    );
    assert_eq!(
        command(&registry, "m").cmd_stop.as_deref().unwrap(),
        ["stop", "${PID}"]
    );
}

#[test]
fn ports_go_by_model_id_and_stay_over_reloads() {
    let text = "startPort: 9000\nmodels:\n  b: {cmd: 'x ${PORT}'}\n  w: {worker: {model: a/b}}\n  a: {cmd: 'x ${PORT}'}\n  \
                f: {cmd: x, proxy: 'http://h:1'}\n";
    let old = load(text);
    assert_eq!(
        old.ports(),
        BTreeMap::from([("a".to_owned(), 9000), ("b".to_owned(), 9001)])
    );
    let new_text = format!("{text}  aa: {{cmd: 'x ${{PORT}}'}}\n");
    let again = |text: &str, keep: &Registry| {
        let source = Source {
            path: Path::new("/etc/swap/c.yaml").to_owned(),
            text: text.to_owned(),
        };
        Registry::from_sources(
            &[source],
            &Options {
                env: &|_| None,
                keep_ports: keep.ports(),
            },
        )
        .unwrap()
        .0
    };
    let new = again(&new_text, &old);
    assert_eq!(
        new.ports()["aa"],
        9002,
        "the new one takes a free port, the others keep theirs"
    );
    let diff = Registry::diff(&old, &new);
    assert_eq!((diff.added, diff.changed.len()), (vec!["aa".to_owned()], 0));
    let moved = again(&text.replace("9000", "9500"), &new);
    assert_eq!(moved.ports()["a"], 9500, "a port below startPort is given up");
    assert!(
        errors("startPort: 65535\nmodels:\n  a: {cmd: 'x ${PORT}'}\n  b: {cmd: 'x ${PORT}'}\n")[0]
            .contains("no port is left")
    );
}

#[test]
fn names_under_set_params_by_id_are_expanded() {
    let registry = load(
        "macros: {v: think}\nmodels:\n  m:\n    cmd: x ${PORT}\n    filters:\n      setParamsByID:\n        \
         ${MODEL_ID}:${v}: {a: 1}\n        'plain': {b: '${v}'}\n        m: {c: 1}\n",
    );
    let model = &registry.models["m"];
    assert_eq!(model.aliases, ["m:think", "plain"]);
    assert_eq!(json!(model.filters.set_params_by_id["m:think"]), json!({"a": 1}));
    assert_eq!(
        json!(model.filters.set_params_by_id["plain"]),
        json!({"b": "think"})
    );
    assert_eq!(registry.model("plain").unwrap().id, "m");
    let found = errors(
        "macros: {v: x}\nmodels:\n  m:\n    cmd: x ${PORT}\n    filters: {setParamsByID: {'${v}': {a: 1}, x: {}}}\n",
    );
    assert!(found[0].contains("two keys are `x` after expansion"), "{found:?}");
}

#[test]
fn macros_cannot_take_all_memory() {
    let mut text = "macros:\n  m0: xxxxxxxxxxxxxxxx\n".to_owned();
    for i in 1..60 {
        text.push_str(&format!("  m{i}: '${{m{}}}${{m{}}}'\n", i - 1, i - 1));
    }
    text.push_str("models:\n  m: {cmd: 'x ${PORT} ${m59}'}\n");
    let found = errors(&text);
    assert_eq!(found.len(), 1);
    assert!(found[0].contains("longer than 1048576 bytes"), "{found:?}");
}

fn with_env(text: &str, pairs: &[(&str, &str)]) -> Result<Registry, Vec<String>> {
    let env = |name: &str| {
        pairs
            .iter()
            .find(|(n, _)| *n == name)
            .map(|(_, v)| (*v).to_owned())
    };
    match read(text, &env) {
        Ok((registry, _)) => Ok(registry),
        Err(found) => Err(found.iter().map(ToString::to_string).collect()),
    }
}

#[test]
fn environment_variables_are_replaced_before_parsing() {
    let registry = with_env(
        "globalTTL: ${env.TTL}\nmodels:\n  ${env.NAME}:\n    cmd: \"x ${PORT} '${env.ARG}'\"\n    name: '${env.ARG}'\n    \
         aliases: ${env.LIST}\n    # ${env.UNSET}\n    description: a # ${env.UNSET}\n",
        &[("TTL", "9"), ("NAME", "m"), ("ARG", r#"a\b"c"#), ("LIST", "[p, q]")],
    )
    .unwrap();
    assert_eq!(registry.globals.ttl.unwrap().as_secs(), 9);
    let model = &registry.models["m"];
    assert_eq!(model.name.as_deref(), Some(r#"a\b"c"#));
    assert_eq!(model.aliases, ["p", "q"]);
    assert_eq!(model.description.as_deref(), Some("a"));
}

#[test]
fn a_variable_that_cannot_be_used_is_an_error() {
    let found = with_env("logLevel: ${env.NO}\nglobalTTL: x${env.NL}\n", &[("NL", "a\nb")]).unwrap_err();
    assert_eq!(
        found[0],
        "/etc/swap/c.yaml:1:11: error: environment variable `NO` is not set"
    );
    assert!(
        found[2].starts_with("/etc/swap/c.yaml:2:13: error: environment variable `NL` has a line break"),
        "{found:?}"
    );
    assert!(!found.concat().contains("a\nb"), "values may be secrets");
}

#[test]
fn places_are_those_of_the_file_after_a_replacement() {
    let found = with_env(
        "models: {'${env.LONG}': {cmd: 'x ${PORT}', ttl: ${env.LONG}, unloadTimeout: -1}}\n",
        &[("LONG", "some-long-value-of-a-variable-that-moves-everything")],
    )
    .unwrap_err();
    assert!(
        found[0].starts_with("/etc/swap/c.yaml:1:49: error: models.some-long"),
        "{found:?}"
    );
    assert!(
        found[1].starts_with("/etc/swap/c.yaml:1:77: error: models.some-long"),
        "{found:?}"
    );
    // Shorter values move it the other way.
    let found = with_env(
        "models: {'${env.S}': {cmd: 'x ${PORT}', ttl: -3}}\n",
        &[("S", "s")],
    )
    .unwrap_err();
    assert!(
        found[0].starts_with("/etc/swap/c.yaml:1:46: error: models.s.ttl: -3 is out of range"),
        "{found:?}"
    );
}

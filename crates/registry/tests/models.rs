//! Models: how they are launched, their defaults, their names.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::path::Path;
use std::time::Duration;

use common::{errors, load, load_with_warnings, warnings};
use registry::{Launch, Registry};

#[test]
fn the_demo_configuration_works_from_anywhere() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/demo.yaml");
    let (registry, warnings) = Registry::from_yaml(&std::fs::read_to_string(&file).unwrap(), &file).unwrap();
    assert_eq!(warnings, []);
    let model = &registry.models["demo"];
    assert_eq!(model.ttl, Some(Duration::from_secs(600)));
    let Launch::Worker(worker) = &model.launch else {
        panic!("no worker")
    };
    assert!(worker.is_path && Path::new(&worker.model).is_absolute());
    assert!(
        worker.model.ends_with("configs/../models/demo/model"),
        "{}",
        worker.model
    );
    let argv = worker.argv();
    assert_eq!(argv[..2], ["serve".to_owned(), worker.model.clone()]);
    let parsed = knobs::parse_args(&argv[1..]).unwrap();
    assert_eq!(parsed.knobs.served_model_name.as_deref(), Some("demo"));
    assert_eq!(parsed.model, worker.model);
}

#[test]
fn a_worker_model_is_a_directory_or_a_hub_id() {
    let place = |model: &str| {
        let registry = load(&format!("models:\n  m:\n    worker: {{model: '{model}'}}\n"));
        let Launch::Worker(worker) = &registry.models["m"].launch else {
            panic!("no worker")
        };
        (worker.model.clone(), worker.is_path)
    };
    assert_eq!(place("org/name-4bit"), ("org/name-4bit".to_owned(), false));
    assert_eq!(place("name"), ("name".to_owned(), false));
    assert_eq!(place("/models/x"), ("/models/x".to_owned(), true));
    assert_eq!(place("./x"), ("/etc/swap/./x".to_owned(), true));
    assert_eq!(place("../x"), ("/etc/swap/../x".to_owned(), true));
    assert_eq!(
        place("models/demo/model"),
        ("/etc/swap/models/demo/model".to_owned(), true)
    );
}

#[test]
fn knobs_become_flags_and_errors_name_the_place() {
    let registry = load(
        "models:\n  m:\n    useModelName: up\n    worker:\n      model: org/m\n      maxNumSeqs: 8\n      \
         prefill-step-size: 256\n      env: [A=b=c]\n",
    );
    let Launch::Worker(worker) = &registry.models["m"].launch else {
        panic!("no worker")
    };
    assert_eq!(
        worker.argv(),
        [
            "serve",
            "org/m",
            "--served-model-name=up",
            "--max-num-seqs=8",
            "--prefill-step-size=256"
        ]
    );
    assert_eq!(worker.env, [("A".to_owned(), "b=c".to_owned())]);

    let text = "models:\n  m:\n    worker:\n      model: org/m\n      maxNumSeq: 8\n      maxTokens: 0\n      \
                draftModel: org/small\n      weights: slurp\n      max_num_seqs: 1\n      maxNumSeqs: 2\n";
    let found = errors(text);
    let says = |i: usize, start: &str| assert!(found[i].starts_with(start), "{}\n{start}", found[i]);
    says(
        0,
        "/etc/swap/c.yaml:5:7: error: models.m.worker.maxNumSeq: unknown worker key `maxNumSeq`; did you mean `maxNumSeqs`?",
    );
    says(
        1,
        "/etc/swap/c.yaml:6:18: error: models.m.worker.maxTokens: maxTokens: 0 is out of range; expected a whole number",
    );
    says(
        2,
        "/etc/swap/c.yaml:7:7: error: models.m.worker.draftModel: draftModel is refused: speculative decoding is off",
    );
    says(
        3,
        "/etc/swap/c.yaml:8:16: error: models.m.worker.weights: weights: `slurp` is not valid; expected one of mmap, read",
    );
    says(
        4,
        "/etc/swap/c.yaml:10:7: error: models.m.worker.maxNumSeqs: is given twice",
    );
    assert_eq!(found.len(), 5, "{found:#?}");
}

#[test]
fn ttl_inherits_and_zero_is_never() {
    let registry = load(
        "globalTTL: 60\nmodels:\n  a: {cmd: 'x ${PORT}'}\n  b: {cmd: 'x ${PORT}', ttl: 0}\n  \
         c: {cmd: 'x ${PORT}', ttl: 5}\n  d: {cmd: 'x ${PORT}', ttl: -1}\n",
    );
    let ttl = |id: &str| registry.models[id].ttl.map(|t| t.as_secs());
    assert_eq!(
        (ttl("a"), ttl("b"), ttl("c"), ttl("d")),
        (Some(60), None, Some(5), Some(60))
    );
    assert!(
        errors("models:\n  a: {cmd: 'x ${PORT}', ttl: -2}\n")[0].contains("models.a.ttl: -2 is out of range")
    );
    assert_eq!(load("models: {a: {cmd: 'x ${PORT}'}}").models["a"].ttl, None);
}

#[test]
fn a_command_in_llama_swaps_manner() {
    let registry = load(
        "models:\n  m:\n    cmd: |\n      # comment\n      /bin/server --port ${PORT} \\\n        --name 'a b'\n    \
         cmdStop: kill ${PID}\n    env: ['X=1']\n    checkEndpoint: none\n",
    );
    let Launch::Command(command) = &registry.models["m"].launch else {
        panic!("no command")
    };
    assert_eq!(command.argv, ["/bin/server", "--port", "5800", "--name", "a b"]);
    assert_eq!(command.cmd, "/bin/server --port 5800 --name 'a b'");
    assert_eq!(command.cmd_stop.as_deref().unwrap(), ["kill", "${PID}"]);
    assert_eq!(
        (command.proxy.as_str(), command.port),
        ("http://localhost:5800", Some(5800))
    );
    assert_eq!(command.check_endpoint, None);
    let registry = load("models: {m: {cmd: 'x ${PORT}', checkEndpoint: v1/models}}");
    let Launch::Command(command) = &registry.models["m"].launch else {
        panic!("no command")
    };
    assert_eq!(command.check_endpoint.as_deref(), Some("/v1/models"));
}

#[test]
fn a_model_needs_exactly_one_way_to_run() {
    assert!(errors("models: {m: {ttl: 1}}")[0].contains("models.m: needs `worker` or `cmd`"));
    assert!(errors("models: {m: {cmd: ''}}")[0].contains("models.m.cmd: has no command in it"));
    assert!(errors("models: {m: {cmd: '# only'}}")[0].contains("models.m.cmd: has no command in it"));
    assert!(errors("models: {m: {cmd: \"x 'y ${PORT}\"}}")[0].contains("a single quote is not closed"));
    assert!(
        errors("models: {m: {cmd: x, proxy: 'http://h:1', worker: {model: a/b}}}")[0]
            .contains("both `worker` and `cmd`")
    );
    assert!(errors("models: {m: {worker: {maxTokens: 4}}}")[0].contains("models.m.worker.model: is missing"));
    assert!(errors("models: {m: {cmd: x, proxy: 'ftp://h'}}")[0].contains("`ftp://h` is not an address"));
    assert!(errors("models: {m: {cmd: x, proxy: 'http://h:x'}}")[0].contains("is not an address"));
    assert!(
        errors("models: {m: {cmd: x, proxy: 'http://h', env: [X]}}")[0]
            .contains("`X` is not of the form NAME=value")
    );
}

#[test]
fn keys_that_mean_nothing_are_named() {
    let (_, found) = load_with_warnings(
        "model: {}\nmodels:\n  m:\n    worker: {model: a/b, rateLimit: 5, port: 1, host: x}\n    proxi: x\n    \
         checkEndpoint: /x\nlogRequests: true\nx-anchors: {}\n",
    );
    let found: Vec<String> = found.iter().map(ToString::to_string).collect();
    assert_eq!(
        found[0],
        "/etc/swap/c.yaml:1:1: warning: model: unknown key `model`; did you mean `models`?"
    );
    assert!(found[1].starts_with("/etc/swap/c.yaml:4:26: warning: models.m.worker.rateLimit: is accepted"));
    assert!(
        found[2].contains("models.m.worker.port: swapd chooses") && found[3].contains("models.m.worker.host")
    );
    assert_eq!(
        found[4],
        "/etc/swap/c.yaml:5:5: warning: models.m.proxi: unknown key `proxi`; did you mean `proxy`?"
    );
    assert!(found[5].contains("models.m.checkEndpoint: has no effect beside `worker`"));
    assert!(found[6].contains("logRequests: has no effect"));
    assert_eq!(found.len(), 7);
}

#[test]
fn a_command_with_a_draft_model_is_warned_about() {
    for flag in [
        "--draft-model x",
        "-md x",
        "--enable-mtp",
        "--speculative-config={}",
    ] {
        let found = warnings(&format!("models: {{m: {{cmd: 'srv --port ${{PORT}} {flag}'}}}}"));
        assert!(
            found[0].contains("models.m.cmd: `") && found[0].contains("speculative decoding is off"),
            "{found:?}"
        );
    }
}

#[test]
fn a_timeout_that_does_nothing_says_so() {
    let text =
        |key: &str| format!("models: {{a: {{cmd: 'x', proxy: 'http://h:1', timeouts: {{{key}: 3}}}}}}");
    let found = warnings(&text("expectContinue"));
    assert!(
        found.len() == 1 && found[0].contains("timeouts.expectContinue"),
        "{found:?}"
    );
    for key in [
        "connect",
        "keepalive",
        "responseHeader",
        "tlsHandshake",
        "idleConn",
    ] {
        assert_eq!(warnings(&text(key)), [""; 0]);
    }
}

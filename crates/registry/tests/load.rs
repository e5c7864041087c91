//! Globals, syntax, differences, the resolved view and the schema.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::path::{Path, PathBuf};

use common::{errors, load, load_with_warnings, warnings};
use registry::{Launch, LogLevel, LogTo, Options, Registry, Routing};
use serde_json::json;

/// What nix-ai emits (its store paths shortened), model id filled in.
const NIX_AI: &str = r#"{"healthCheckTimeout":180,"logLevel":"info","logToStdout":"both","startPort":11436,
 "models":{"mlx-community/Qwen3-30B-A3B-4bit":{
   "cmd":"/nix/store/0-vllm/bin/vllm-mlx serve mlx-community/Qwen3-30B-A3B-4bit --port ${PORT} --host 127.0.0.1 --cache-memory-mb 8192 --gpu-memory-utilization 0.500000 --max-num-seqs 4 --tool-call-parser hermes",
   "ttl":900,"env":["HF_HOME=/Volumes/HuggingFace"],"checkEndpoint":"/v1/models",
   "aliases":["coding","default","large-context","most-capable","oss","quickest","tool-calling"],
   "useModelName":"mlx-community/Qwen3-30B-A3B-4bit","concurrencyLimit":2,
   "filters":{"setParams":{"frequency_penalty":0.3,"presence_penalty":0.3}}}},
 "groups":{"mlx-models":{"swap":true,"exclusive":true,"members":["mlx-community/Qwen3-30B-A3B-4bit"]}},
 "hooks":{"on_startup":{"preload":["default"]}}}"#;

#[test]
fn nix_ais_configuration_works_unchanged() {
    let (registry, found) = load_with_warnings(NIX_AI);
    assert_eq!(found, []);
    let model = registry.model("tool-calling").unwrap();
    assert_eq!(
        (model.ttl.unwrap().as_secs(), model.concurrency_limit),
        (900, Some(2))
    );
    assert_eq!(model.health_check_timeout.as_secs(), 180);
    assert_eq!(
        json!(model.filters.set_params),
        json!({"frequency_penalty": 0.3, "presence_penalty": 0.3})
    );
    let Launch::Command(command) = &model.launch else {
        panic!("worker")
    };
    assert_eq!(
        command.argv[..5],
        [
            "/nix/store/0-vllm/bin/vllm-mlx",
            "serve",
            &model.id,
            "--port",
            "11436"
        ]
    );
    assert_eq!(
        (command.proxy.as_str(), command.check_endpoint.as_deref()),
        ("http://localhost:11436", Some("/v1/models"))
    );
    assert_eq!(
        command.env,
        [("HF_HOME".to_owned(), "/Volumes/HuggingFace".to_owned())]
    );
    assert_eq!(registry.globals.preload, ["mlx-community/Qwen3-30B-A3B-4bit"]);
    assert_eq!(registry.globals.log_to_stdout, LogTo::Both);
    let Routing::Groups(groups) = &registry.routing else {
        panic!("matrix")
    };
    assert!(groups["mlx-models"].swap && groups.len() == 1);
    // The arguments are those of our worker too: only the program's name has to change.
    assert!(knobs::parse_args(&command.argv[2..]).is_ok());
    // Keys that it emits beside, for nobody.
    let found = warnings(&NIX_AI.replacen('{', "{\"disabledModels\":{\"x\":{\"cmd\":\"a ${PORT}\"}},", 1));
    assert!(found[0].contains("disabledModels: unknown key `disabledModels`"));
}

#[test]
fn json_in_every_dress() {
    let registry = load(
        "{\n\t\"models\": {\n\t\t\"m\": {\n\t\t\t\"cmd\": \"x ${PORT} \\u00e9 \\/\",\n\t\t\t\"ttl\": 5\n\t\t}\n\t}\n}\n",
    );
    let Launch::Command(command) = &registry.models["m"].launch else {
        panic!("worker")
    };
    assert_eq!(command.argv, ["x", "5800", "é", "/"]);
    let text =
        r#"{"models": {"m": {"name": "\ud83d\ude00 \\ud83d", "worker": {"model": "a/b", "maxTokens": 0}}}}"#;
    let found = errors(text);
    assert!(
        found[0].starts_with("/etc/swap/c.yaml:1:91: error: models.m.worker.maxTokens"),
        "{found:?}"
    );
    let registry = load(&text.replace(": 0", ": 1"));
    assert_eq!(registry.models["m"].name.as_deref(), Some("\u{1f600} \\ud83d"));
}

#[test]
fn an_empty_configuration_is_valid() {
    for text in ["", "# nothing\n", "{}", "---\n", "models:\n", "null"] {
        assert!(load(text).models.is_empty(), "{text:?}");
    }
    assert!(
        Registry::from_sources(&[], &Options::default())
            .unwrap()
            .0
            .models
            .is_empty()
    );
    assert!(errors("[1]")[0].ends_with("the top level must be a mapping, not a list"));
    assert!(errors("text")[0].contains("not text"));
}

#[test]
fn defaults_of_the_globals() {
    let globals = load("").globals;
    assert_eq!(globals.health_check_timeout.as_secs(), 120);
    assert_eq!((globals.unload_timeout.as_secs(), globals.ttl), (10, None));
    assert_eq!(
        (
            globals.start_port,
            globals.metrics_max_in_memory,
            globals.capture_buffer_mb
        ),
        (5800, 1000, 5)
    );
    assert_eq!(
        globals.session_id_headers,
        ["X-Session-ID", "X-Litellm-Session-Id"]
    );
    assert_eq!(
        globals.ignore_paths,
        [r".*\.(js|json|css|png|gif|jpg|jpeg|ico|txt)$"]
    );
    assert_eq!(
        (globals.log_level, globals.log_to_stdout),
        (LogLevel::Info, LogTo::Proxy)
    );
    assert_eq!(
        (globals.performance_every.as_secs(), globals.performance_disabled),
        (5, false)
    );
    assert!(globals.api_keys.is_empty() && globals.store_path.is_none());
}

#[test]
fn globals_as_written() {
    let globals = load(
        "healthCheckTimeout: 3\nunloadTimeout: 0\nlogLevel: WARN\nlogTimeFormat: RFC3339\nmetricsMaxInMemory: -1\n\
         captureBuffer: 0\nstore: {path: data/a.db}\nui: {activity: {session_id: [' A ', a, B]}}\n\
         performance: {every: 1m30s, disabled: yes}\nupstream: {ignorePaths: []}\nincludeAliasesInList: true\n",
    )
    .globals;
    assert_eq!(globals.health_check_timeout.as_secs(), 15, "raised");
    assert_eq!(globals.unload_timeout.as_secs(), 10);
    assert_eq!(globals.log_level, LogLevel::Warn);
    assert_eq!(globals.log_time_format.as_deref(), Some("rfc3339"));
    assert_eq!(
        (globals.metrics_max_in_memory, globals.capture_buffer_mb),
        (1000, 0)
    );
    assert_eq!(globals.store_path, Some(PathBuf::from("/etc/swap/data/a.db")));
    assert_eq!(globals.session_id_headers, ["A", "B"]);
    assert_eq!(
        (globals.performance_every.as_secs(), globals.performance_disabled),
        (90, true)
    );
    assert_eq!(globals.ignore_paths.len(), 1, "an empty list is the default");
    assert!(
        load("ui: {activity: {session_id: []}}")
            .globals
            .session_id_headers
            .is_empty()
    );
}

#[test]
fn wrong_globals_are_all_reported_with_their_places() {
    let found = errors(
        "healthCheckTimeout: soon\nlogToStdout: some\nperformance:\n  every: 2s\nstartPort: 0\nglobalTTL: -1\n\
         store: {path: ''}\nupstream: {ignorePaths: ['[']}\nunloadTimeout: [1]\nmodels: []\nincludeAliasesInList: maybe\n",
    );
    let wanted = [
        "1:21: error: healthCheckTimeout: expected a whole number from 0 to 31536000, found text (`soon`)",
        "2:14: error: logToStdout: expected one of proxy, upstream, both, none, found text (`some`)",
        "4:10: error: performance.every: must be at least 5s, got 2s",
        "5:12: error: startPort: 0 is out of range; expected a whole number from 1 to 65535",
        "6:12: error: globalTTL: -1 is out of range; expected a whole number from 0 to 31536000",
        "7:15: error: store.path: must not be empty",
        "8:26: error: upstream.ignorePaths[0]: `[` is not a valid pattern",
        "9:16: error: unloadTimeout: expected a whole number from 0 to 31536000, found a list",
        "10:9: error: models: expected a mapping (name to a mapping), found a list",
        "11:23: error: includeAliasesInList: expected true or false, found text (`maybe`)",
    ];
    for (found, wanted) in found.iter().zip(wanted) {
        assert!(
            found.starts_with(&format!("/etc/swap/c.yaml:{wanted}")),
            "{found}\n{wanted}"
        );
    }
    assert_eq!(found.len(), wanted.len(), "{found:#?}");
    let found = warnings("logLevel: loud\nlogTimeFormat: rfc333\n");
    assert!(found[0].contains("`loud` is not one of") && found[1].contains("did you mean rfc3339?"));
}

#[test]
fn model_details() {
    let registry = load(
        "sendLoadingState: true\nunloadTimeout: 7\nmodels:\n  m:\n    cmd: x ${PORT}\n    unloadTimeout: 3\n    healthCheckTimeout: 30\n    \
         name: ' N '\n    filters: {strip_params: 'a, b.c,model,a'}\n    timeouts: {connect: 0, responseHeader: 9}\n    \
         compat: {ignoreWebsockets: true}\n    capabilities: {in: [text, image], out: [text], tools: true, context: 4096}\n  \
         n: {cmd: 'x ${PORT}', sendLoadingState: false}\n  comfyui_auto: {cmd: 'x ${PORT}', concurrencyLimit: 3}\n",
    );
    let m = &registry.models["m"];
    assert_eq!(
        (m.unload_timeout.as_secs(), m.health_check_timeout.as_secs()),
        (3, 30)
    );
    assert_eq!(m.name.as_deref(), Some("N"));
    assert_eq!(m.filters.strip_params, ["a", "b.c"]);
    assert_eq!(
        (m.timeouts.connect, m.timeouts.response_header.unwrap().as_secs()),
        (None, 9)
    );
    assert_eq!(
        (m.timeouts.idle_conn.unwrap().as_secs(), m.ignore_websockets),
        (90, true)
    );
    let capabilities = m.capabilities.as_ref().unwrap();
    assert_eq!(
        (capabilities.input.as_slice(), capabilities.context),
        (&["text".to_owned(), "image".to_owned()][..], Some(4096))
    );
    let n = &registry.models["n"];
    assert!(m.send_loading_state && !n.send_loading_state);
    assert_eq!(
        (
            n.unload_timeout.as_secs(),
            n.health_check_timeout.as_secs(),
            n.concurrency_limit
        ),
        (7, 120, None)
    );
    let comfy = &registry.models["comfyui_auto"];
    assert_eq!(
        (comfy.concurrency_limit, comfy.ignore_websockets),
        (Some(50), true)
    );
    assert!(errors("models: {m: {cmd: 'x ${PORT}', capabilities: {in: [smell], context: -1}}}").len() == 2);
}

#[test]
fn anchors_merges_and_duplicates() {
    let registry = load(
        "x-base: &base\n  cmd: x ${PORT}\n  ttl: 1\n  env: &env [A=1]\nmodels:\n  a: {<<: *base, ttl: 2}\n  b:\n    <<: [*base]\n  \
         c: {cmd: 'y ${PORT}', env: *env}\n",
    );
    assert_eq!(registry.models["a"].ttl.unwrap().as_secs(), 2);
    assert_eq!(registry.models["b"].ttl.unwrap().as_secs(), 1);
    let Launch::Command(c) = &registry.models["c"].launch else {
        panic!("worker")
    };
    assert_eq!(c.env.len(), 1);
    let found = errors("models:\n  a: {cmd: 'x ${PORT}'}\n  a: {cmd: 'x ${PORT}'}\n");
    assert_eq!(
        found,
        ["/etc/swap/c.yaml:3:3: error: models.a: `a` is given twice; the first is on line 2"]
    );
    assert!(errors("a: *nope")[0].contains("not valid YAML"));
    assert!(errors("a: [1\nb: 2")[0].contains("not valid YAML"));
    assert!(errors("a: &x [*x]")[0].contains("an alias inside its own anchor"));
    assert!(errors("? [a]\n: 1")[0].contains("a key must be plain text"));
    assert!(
        errors(&format!("a: {}{}", "[".repeat(150), "]".repeat(150)))[0].contains("nested deeper than 100")
    );
    assert!(warnings("models: {}\n---\nmodels: {}\n")[0].contains("only the first YAML document"));
}

#[test]
fn every_configuration_in_configs_passes_the_check() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs");
    let mut seen = 0;
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "yaml") {
            let (registry, found) =
                Registry::from_yaml(&std::fs::read_to_string(&path).unwrap(), &path).unwrap();
            assert!(
                !registry.models.is_empty() && !found.iter().any(|w| w.fails_check(false)),
                "{found:?}"
            );
            seen += 1;
        }
    }
    assert!(seen > 0);
}

#[test]
fn a_difference_names_what_must_be_restarted() {
    let old = load(
        "macros: {n: 4}\nmodels:\n  same: {worker: {model: a/b, maxNumSeqs: '${n}'}}\n  knob: {worker: {model: a/b}}\n  \
         tuned: {worker: {model: a/b}, ttl: 5}\n  gone: {worker: {model: a/b}}\n",
    );
    let new = load(
        "# moved, and said otherwise\nlogLevel: debug\nmodels:\n  new: {worker: {model: a/b}}\n  \
         tuned: {worker: {model: a/b}, ttl: 6}\n  knob: {worker: {model: a/b, maxNumSeqs: 2}}\n  \
         same: {worker: {max_num_seqs: 4, model: a/b}}\n",
    );
    let diff = Registry::diff(&old, &new);
    assert_eq!(
        (diff.added, diff.removed),
        (vec!["new".to_owned()], vec!["gone".to_owned()])
    );
    assert_eq!(
        (diff.changed, diff.retuned),
        (vec!["knob".to_owned()], vec!["tuned".to_owned()])
    );
    assert_eq!(
        (diff.unchanged, diff.globals_changed),
        (vec!["same".to_owned()], true)
    );
    assert!(Registry::diff(&old, &old).is_empty());
}

#[test]
fn the_resolved_view_says_everything_but_secrets() {
    let registry = load(
        "models:\n  w: {worker: {model: a/b, apiKey: hush-1}}\n  c: {cmd: 'x --api-key hush-2 --port ${PORT}', env: [HF_TOKEN=hush-3, A=1]}\n\
         peers: {p: {proxy: 'http://h', models: [m], apiKey: hush-4}}\nmatrix: {vars: {v: w}, sets: {s: 'v & (c | w)', t: +s}}\n",
    );
    let shown = registry.to_yaml();
    assert!(!shown.contains("hush"), "{shown}");
    let tree: serde_json::Value = serde_yaml::from_str(&shown).unwrap();
    assert_eq!(tree["models"]["w"]["launch"]["argv"][1], "a/b");
    assert_eq!(tree["models"]["c"]["launch"]["env"][1], "A=1");
    assert_eq!(tree["routing"]["sets"]["s"], "w & (c | w)");
    assert_eq!(tree["routing"]["sets"]["t"], "+s");
    assert_eq!(tree["models"]["w"]["unloadTimeout"], 10);
}

#[test]
fn the_schema_is_whole() {
    let schema = registry::schema();
    // Every reference leads to a definition.
    fn references(value: &serde_json::Value, found: &mut Vec<String>) {
        match value {
            serde_json::Value::Object(map) => {
                found.extend(map.get("$ref").and_then(|r| r.as_str()).map(str::to_owned));
                map.values().for_each(|v| references(v, found));
            }
            serde_json::Value::Array(items) => items.iter().for_each(|v| references(v, found)),
            _ => {}
        }
    }
    let mut found = Vec::new();
    references(&schema, &mut found);
    assert!(found.len() > 20);
    for reference in found {
        let name = reference.strip_prefix("#/definitions/").unwrap();
        let name = name
            .replace("%3C", "<")
            .replace("%3E", ">")
            .replace("%5B", "[")
            .replace("%5D", "]")
            .replace("%20", " ");
        assert!(schema["definitions"][&name].is_object(), "{reference}");
    }
    assert!(schema["definitions"]["worker"]["properties"]["maxNumSeqs"].is_object());
}

//! Profiles, selectors and upgraded connections on the real program.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::disallowed_methods
)]

mod common;

use std::time::Duration;

use common::secure::{echoes, upgrade};
use common::{Swapd, eventually};

const CONFIG: &str = "
models:
  a: {worker: {model: DIR}, aliases: [al]}
  b: {worker: {model: DIR}, useModelName: real}
groups: {g: {swap: false, members: [a, b]}}
selectors:
  hot: {strategy: warm, targets: [a, b], name: Hot}
  wide: {strategy: spillover, targets: [a, b], settings: {spillover: 1}}
profiles:
  day: {description: d, pins: {main: b, al: null}}
";

/// The name that arrives at the model's server.
fn arrives(swapd: &Swapd, name: &str) -> String {
    let echo = swapd.chat(name, r#""echo":true"#).json()["body"]
        .as_str()
        .unwrap()
        .to_owned();
    serde_json::from_str::<serde_json::Value>(&echo).unwrap()["model"]
        .as_str()
        .unwrap()
        .to_owned()
}

#[test]
fn selectors_choose_by_state_and_load() {
    let swapd = Swapd::start(CONFIG);
    assert_eq!(arrives(&swapd, "b"), "real");
    assert_eq!(arrives(&swapd, "hot"), "real", "b is warm");
    assert_eq!(swapd.state("a"), "stopped");
    let mut busy = swapd.chat_open("wide", r#""stream":true,"events":100,"gap_ms":20"#);
    busy.chunk().unwrap();
    assert_eq!(swapd.state("a"), "stopped", "b had room");
    assert_eq!(arrives(&swapd, "wide"), "a", "b is busy: spills over");
    let rows = swapd.get("/v1/models").json();
    let hot = rows["data"]
        .as_array()
        .unwrap()
        .iter()
        .find(|m| m["id"] == "hot")
        .unwrap()
        .clone();
    assert_eq!(
        (hot["meta"]["llamaswap"]["type"].as_str(), hot["name"].as_str()),
        (Some("selector"), Some("Hot"))
    );
}

#[test]
fn a_profile_repoints_and_switches_off_names() {
    let swapd = Swapd::start(CONFIG);
    let switch = |body: &str| swapd.open("PUT", "/api/profiles/active", "", body).finish();
    assert_eq!(swapd.chat("main", "").status, 404);
    assert_eq!(switch(r#"{"name":"day"}"#).json()["active"], "day");
    assert_eq!(arrives(&swapd, "main"), "real");
    assert_eq!(swapd.get("/upstream/main/x").body, "/x");
    let (message, _) = swapd.chat("al", "").error();
    assert!(message.contains("switches 'al' off"), "{message}");
    assert_eq!(swapd.get("/upstream/al/x").status, 404);
    let rows = swapd.get("/v1/models").json();
    assert!(rows["data"].as_array().unwrap().iter().any(|m| m["id"] == "main"));
    assert_eq!(
        swapd.get("/api/profiles").json()["profiles"][0]["pins"]["main"],
        "b"
    );
    assert_eq!(
        (switch(r#"{"name":"night"}"#).status, switch("[]").status),
        (404, 400)
    );
    assert_eq!(switch(r#"{"name":null}"#).status, 200);
    assert_eq!(arrives(&swapd, "al"), "al");
}

#[test]
fn upgraded_connections_pass_bytes_both_ways_and_hold_the_model() {
    let swapd = Swapd::start("models: {m: {worker: {model: DIR, env: [JOURNAL]}, ttl: 1}}");
    let mut socket = std::net::TcpStream::connect(&swapd.address).unwrap();
    upgrade(&mut socket, "/upstream/m/ws");
    for text in ["hello", "again"] {
        echoes(&mut socket, text);
    }
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(
        swapd.running()[0]["inflight"],
        1,
        "in use: its ttl does not count"
    );
    drop(socket);
    eventually("ended", Duration::from_secs(1), || {
        (!swapd.journalled("upgrade ended").is_empty()).then_some(())
    });
    eventually("unloaded", Duration::from_secs(3), || {
        (swapd.state("m") == "stopped").then_some(())
    });
}

/// The configuration that nix-ai emits for llama-swap, with another program in `cmd`.
#[test]
fn a_llama_swap_configuration_runs_unchanged() {
    let config = r#"{"healthCheckTimeout":180,"logLevel":"info","logToStdout":"both",
 "models":{"mlx-community/Qwen3-30B-A3B-4bit":{
   "cmd":"FAKESERVER serve mlx-community/Qwen3-30B-A3B-4bit --port ${PORT} --host 127.0.0.1 --cache-memory-mb 8192 --gpu-memory-utilization 0.500000 --continuous-batching --enable-prefix-cache --max-num-seqs 4 --tool-call-parser hermes",
   "ttl":900,"env":["HF_HOME=/Volumes/HuggingFace", "JOURNAL"],"checkEndpoint":"/v1/models",
   "aliases":["coding","default","large-context","most-capable","oss","quickest","tool-calling"],
   "useModelName":"mlx-community/Qwen3-30B-A3B-4bit","concurrencyLimit":2,
   "filters":{"setParams":{"frequency_penalty":0.3,"presence_penalty":0.3}}}},
 "groups":{"mlx-models":{"swap":true,"exclusive":true,"members":["mlx-community/Qwen3-30B-A3B-4bit"]}},
 "hooks":{"on_startup":{"preload":["default"]}}}"#;
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let config = config.replacen('{', &format!("{{\"startPort\":{port},"), 1);
    let swapd = Swapd::start_with(&config, &["-watch-config"]);
    let id = "mlx-community/Qwen3-30B-A3B-4bit";
    eventually("preloaded", Duration::from_secs(5), || {
        (swapd.state(id) == "ready").then_some(())
    });
    for name in [id, "default", "coding"] {
        let echo = swapd.chat(name, r#""echo":true"#).json();
        let body: serde_json::Value = serde_json::from_str(echo["body"].as_str().unwrap()).unwrap();
        assert_eq!(
            (body["model"].as_str(), body["presence_penalty"].as_f64()),
            (Some(id), Some(0.3))
        );
    }
    assert_eq!(swapd.chat("gpt-4", "").status, 404);
    assert_eq!(swapd.running()[0]["ttl"], 900);
    assert_eq!(swapd.journalled("start").len(), 1);
}

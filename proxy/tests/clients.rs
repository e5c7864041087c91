//! What real clients send and what it must not be mistaken for: offers of other protocols, escapes in paths, streams
//! that are no events.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::disallowed_methods
)]

mod common;

use common::Swapd;
use serde_json::Value;

fn header<'a>(echo: &'a Value, name: &str) -> Option<&'a str> {
    let all = echo["headers"].as_array().unwrap();
    all.iter().find(|h| h[0] == name).map(|h| h[1].as_str().unwrap())
}

#[test]
fn an_offer_of_http2_is_no_websocket() {
    let swapd = Swapd::start("models: {m: {worker: {model: DIR}}}");
    // What Java's HttpClient and `curl --http2` send with every first request.
    let offer = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n";
    let body = r#"{"model":"m","echo":true}"#;
    for path in ["/v1/chat/completions", "/upstream/m/v1/chat/completions"] {
        let answer = swapd.open("POST", path, offer, body).finish();
        assert_eq!(answer.status, 200, "{path}: {answer:?}");
        let echo = answer.json();
        assert_eq!(
            (echo["method"].as_str(), echo["body"].as_str()),
            (Some("POST"), Some(body)),
            "{path}"
        );
        for gone in ["upgrade", "http2-settings", "connection"] {
            assert_eq!(header(&echo, gone), None, "{path}");
        }
    }
    // Named in no `Connection` it is not for the model's server either.
    let echo = swapd
        .open("POST", "/v1/chat/completions", "HTTP2-Settings: AAE\r\n", body)
        .finish()
        .json();
    assert_eq!(header(&echo, "http2-settings"), None);
    assert_eq!(swapd.open("GET", "/v1/models", offer, "").finish().status, 200);
}

#[test]
fn names_in_paths_are_decoded_and_what_follows_is_not() {
    let config = "
models:
  'qwen3:8b': {worker: {model: DIR}, aliases: ['my model', 'modèle']}
profiles: {day: {pins: {'a b': 'qwen3:8b'}}}
";
    let swapd = Swapd::start(config);
    for name in [
        "qwen3%3A8b",
        "qwen3:8b",
        "my%20model",
        "mod%C3%A8le",
        "mod%c3%a8le",
    ] {
        let answer = swapd.get(&format!("/upstream/{name}/x%20y%2Fz%3A?q=%20"));
        assert_eq!(
            (answer.status, answer.body.as_str()),
            (200, "/x%20y%2Fz%3A?q=%20"),
            "{name}"
        );
    }
    assert_eq!(swapd.get("/upstream/a%20b/x").status, 404);
    let day = r#"{"name":"day"}"#;
    assert_eq!(
        swapd.open("PUT", "/api/profiles/active", "", day).finish().status,
        200
    );
    assert_eq!(swapd.get("/upstream/a%20b/x").body, "/x");
    let (message, _) = swapd.get("/upstream/qwen3%3A9b/x").error();
    assert!(
        message.contains("'qwen3:9b'") && message.contains("did you mean 'qwen3:8b'"),
        "{message}"
    );
}

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

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use common::{Answer, Swapd};
use nix::sys::signal::Signal;
use serde_json::Value;

const ONE: &str = "models: {m: {worker: {model: DIR}}}";

fn header<'a>(echo: &'a Value, name: &str) -> Option<&'a str> {
    let all = echo["headers"].as_array().unwrap();
    all.iter().find(|h| h[0] == name).map(|h| h[1].as_str().unwrap())
}

#[test]
fn an_offer_of_http2_is_no_websocket() {
    let swapd = Swapd::start(ONE);
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

/// The last event of a stream: its name and data.
fn last_event(answer: &Answer) -> (String, Value) {
    let event = answer.body.trim_end().rsplit("\n\n").next().unwrap();
    let (name, data) = event.rsplit_once("data: ").unwrap();
    (name.to_owned(), serde_json::from_str(data).unwrap())
}

/// llama-swap: only for chats, and a failure was JSON glued to the stream.
#[test]
fn each_api_shows_a_load_and_its_failure_in_its_own_events() {
    let config = "
sendLoadingState: true
models:
  slow: {worker: {model: DIR, env: [FAKE_START_MS=300]}}
  bad: {worker: {model: DIR, env: [FAKE_START_MS=300, 'FAKE_FAIL=no tensor']}}
";
    let cases = [
        (
            "/v/chat/completions",
            r#"data: {"choices":[{"index":0,"delta":{"reasoning_content":"#,
            "",
        ),
        ("/v1/completions", ": ━━━━━\n", ""),
        ("/v1/responses", ": ━━━━━\n", "event: error\n"),
        ("/v1/messages", "event: ping\ndata: {", "event: error\n"),
    ];
    std::thread::scope(|scope| {
        for (path, first, error_name) in cases {
            scope.spawn(move || {
                let swapd = Swapd::start(config);
                let ask = |model| swapd.post(path, &common::chat_body(model, r#""stream":true,"events":3"#));
                let good = ask("slow");
                // Ready: nothing but the model's own bytes.
                assert!(!ask("slow").body.contains("loading"));
                let failed = ask("bad");
                assert!(good.body.starts_with(first), "{path}: {good:?}");
                assert!(good.body.contains("swapd loading model: slow"), "{good:?}");
                assert!(
                    good.complete && good.body.ends_with("data: [DONE]\n\n"),
                    "{good:?}"
                );
                assert!(failed.status == 200 && !failed.complete, "{failed:?}");
                let (name, data) = last_event(&failed);
                assert_eq!(name, error_name, "{path}");
                assert!(
                    data["error"]["message"].as_str().unwrap().contains("no tensor"),
                    "{data}"
                );
                assert_eq!(data["error"]["code"], "model_start_failed");
                if !error_name.is_empty() {
                    assert_eq!(data["type"], "error");
                }
                // The same for a reply that breaks off.
                let broken =
                    common::chat_body("slow", r#""stream":true,"events":9,"gap_ms":20,"die_after":2"#);
                let (name, data) = last_event(&swapd.post(path, &broken));
                assert_eq!(
                    (name.as_str(), &data["error"]["code"]),
                    (error_name, &"upstream_died".into())
                );
            });
        }
    });
    let swapd = Swapd::start(config);
    let plain = common::chat_body("slow", r#""stream":true,"plain":true"#);
    let speech = swapd.post("/v1/audio/speech", &plain);
    assert_eq!(speech.json()["object"], "chat.completion");
}

#[test]
fn whoever_is_told_to_come_again_is_told_when() {
    let swapd = Swapd::start(ONE);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| swapd.chat("m", r#""delay_ms":20000"#));
        common::eventually("in flight", Duration::from_secs(5), || {
            (swapd.post("/api/inflight/1/cancel", "").status == 200).then_some(())
        });
        let cancelled = waiting.join().unwrap();
        assert_eq!(
            (
                cancelled.status,
                cancelled.header("retry-after"),
                cancelled.error().1.as_str()
            ),
            (503, Some("1"), "cancelled")
        );
    });
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| swapd.chat("m", r#""delay_ms":20000"#));
        common::eventually("in flight", Duration::from_secs(5), || {
            (swapd.running()[0]["inflight"] == 1).then_some(())
        });
        // The second signal ends what the first one waits for.
        for signal in [Signal::SIGTERM, Signal::SIGINT] {
            common::signal(swapd.child.id(), signal);
        }
        let ended = waiting.join().unwrap();
        assert_eq!(
            (ended.status, ended.header("retry-after")),
            (503, Some("5")),
            "{ended:?}"
        );
    });
}

#[test]
fn a_chunked_body_is_read_too() {
    let swapd = Swapd::start(ONE);
    let body = r#"{"model":"m"}"#;
    let (a, b) = body.split_at(5);
    let chunks = format!("5\r\n{a}\r\n{:x}\r\n{b}\r\n0\r\n\r\n", b.len());
    let head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n";
    let mut stream = TcpStream::connect(&swapd.address).unwrap();
    stream.write_all(format!("{head}{chunks}").as_bytes()).unwrap();
    let mut reply = [0; 12];
    stream.read_exact(&mut reply).unwrap();
    assert_eq!(&reply, b"HTTP/1.1 200");
}

#[test]
fn a_chunked_body_may_not_be_endless() {
    let swapd = Swapd::start(&format!("maxBodySize: 1\n{ONE}"));
    let mut stream = TcpStream::connect(&swapd.address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n";
    stream.write_all(head.as_bytes()).unwrap();
    let piece = format!("{:x}\r\n{}\r\n", 1 << 16, "x".repeat(1 << 16));
    for _ in 0..16 {
        stream.write_all(piece.as_bytes()).unwrap();
    }
    // One byte too many, and the rest is not waited for.
    stream.write_all(b"1\r\nx\r\n").unwrap();
    let mut reply = [0; 12];
    stream.read_exact(&mut reply).unwrap();
    assert_eq!(&reply, b"HTTP/1.1 413");
}

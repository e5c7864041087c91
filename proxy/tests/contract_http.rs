//! Lines of llama-swap's contract about HTTP that no other test has: special routes, paths that are cut, events.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::disallowed_methods
)]

mod common;

use std::time::{Duration, Instant};

use common::{Swapd, eventually};
use serde_json::{Value, json};

const ONE: &str = "models: {m: {worker: {model: DIR}, env: [JOURNAL]}}";

#[test]
fn prefixes_that_the_model_does_not_see() {
    let swapd = Swapd::start(ONE);
    for (asked, seen) in [
        ("/v/chat/completions", "/chat/completions"),
        ("/v/messages/count_tokens", "/messages/count_tokens"),
        ("/audioapi/v1/tasks/run", "/v1/tasks/run"),
        ("/sdapi/v1/txt2img", "/sdapi/v1/txt2img"),
        ("/infill", "/infill"),
        ("/reranking", "/reranking"),
        ("/v1/rerank", "/v1/rerank"),
    ] {
        let answer = swapd.post(asked, r#"{"model":"m","echo":true}"#).json();
        assert_eq!(answer["path"], seen, "{asked}");
    }
    for get in [
        "/v1/audio/voices?model=m",
        "/sdapi/v1/loras?model=m",
        "/props?model=m&x=1",
    ] {
        assert_eq!(swapd.get(get).body, get);
    }
    assert_eq!(swapd.get("/props").status, 400);
}

#[test]
fn comfyui_is_one_model_and_only_its_page_starts_it() {
    let none = Swapd::start(ONE);
    assert_eq!(none.get("/comfyui/").status, 404);
    let swapd = Swapd::start("models: {comfyui_auto: {worker: {model: DIR}, env: [JOURNAL]}}");
    let moved = swapd.get("/comfyui?x=1");
    assert_eq!(
        (moved.status, moved.header("location")),
        (308, Some("/comfyui/?x=1"))
    );
    let part = swapd.get("/comfyui/assets/app.js");
    assert_eq!((part.status, part.error().1.as_str()), (409, "conflict"));
    assert!(swapd.journal().is_empty(), "an open page starts nothing");
    assert_eq!(swapd.get("/comfyui/?a=b").body, "/?a=b");
    assert_eq!(swapd.get("/comfyui/assets/app.js?v=2").body, "/assets/app.js?v=2");
    let running = swapd.running();
    assert_eq!(running[0]["model"], "comfyui_auto");
}

#[test]
fn websockets_that_count_for_nothing_start_nothing() {
    let swapd = Swapd::start("models: {m: {worker: {model: DIR}, compat: {ignoreWebsockets: true}}}");
    let upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\n";
    assert_eq!(swapd.open("GET", "/upstream/m/ws", upgrade, "").status, 409);
    assert_eq!(swapd.state("m"), "stopped");
    assert_eq!(swapd.chat("m", "").status, 200);
    let open = swapd.open("GET", "/upstream/m/ws", upgrade, "");
    assert_eq!(open.status, 101);
    assert_eq!(swapd.running()[0]["inflight"], 0);
}

/// The events of a stream until one that `last` accepts.
fn events(swapd: &Swapd, act: impl FnOnce(), last: impl Fn(&str, &Value) -> bool) -> Vec<(String, Value)> {
    let mut stream = swapd.open("GET", "/api/events", "", "");
    let (mut found, mut act) = (Vec::new(), Some(act));
    loop {
        let text = stream.chunk().unwrap().unwrap();
        for line in text.lines().filter_map(|l| l.strip_prefix("data:")) {
            let message: Value = serde_json::from_str(line).unwrap();
            let kind = message["type"].as_str().unwrap().to_owned();
            let data: Value = serde_json::from_str(message["data"].as_str().unwrap()).unwrap();
            let over = last(&kind, &data);
            found.push((kind, data));
            if over {
                return found;
            }
        }
        // The present state comes first, and ends with what is running.
        if found.iter().any(|(kind, _)| kind == "inflight")
            && let Some(act) = act.take()
        {
            act();
        }
    }
}

#[test]
fn events_begin_with_the_present_and_tell_of_profiles_and_requests() {
    let config = "models: {m: {worker: {model: DIR}}}\nprofiles: {day: {pins: {x: m}}}";
    let swapd = Swapd::start(config);
    let found = events(
        &swapd,
        || {
            let body = r#"{"name":"day"}"#;
            assert_eq!(
                swapd
                    .open("PUT", "/api/profiles/active", "", body)
                    .finish()
                    .status,
                200
            );
            assert_eq!(swapd.chat("x", "").status, 200);
        },
        |kind, data| kind == "inflight" && data["operation"] == "remove",
    );
    let first: Vec<&str> = found.iter().take(7).map(|(kind, _)| kind.as_str()).collect();
    assert_eq!(
        first,
        [
            "logData",
            "logData",
            "modelStatus",
            "uiConfig",
            "profileChanged",
            "registry",
            "inflight"
        ]
    );
    assert_eq!(
        (&found[4].1, &found[6].1),
        (
            &json!({"active": null}),
            &json!({"operation": "snapshot", "requests": []})
        )
    );
    let has = |wanted: &dyn Fn(&str, &Value) -> bool| found.iter().any(|(kind, data)| wanted(kind, data));
    assert!(
        has(&|k, d| k == "profileChanged" && d["active"] == "day"),
        "{found:?}"
    );
    assert!(
        has(&|k, d| k == "inflight" && d["operation"] == "upsert" && d["request"]["model"] == "m"),
        "{found:?}"
    );
}

#[test]
fn events_tell_of_a_reload_that_failed() {
    let swapd = Swapd::start("models: {m: {worker: {model: DIR}}}");
    let found = events(
        &swapd,
        || {
            swapd.rewrite("models: 3");
            assert_eq!(swapd.post("/api/reload", "").status, 400);
        },
        |kind, data| kind == "registry" && data["in_force"] == false,
    );
    let (_, failed) = found.last().unwrap();
    assert!(
        failed["errors"][0].as_str().unwrap().contains("config.yaml:"),
        "{failed}"
    );
    assert!(
        found
            .iter()
            .any(|(kind, data)| kind == "registry" && data["in_force"] == true),
        "the state before"
    );
}

#[test]
fn requests_in_flight_are_shown_with_their_progress() {
    let swapd = Swapd::start("models: {m: {worker: {model: DIR}}}\nui: {activity: {session_id: [X-Mine]}}");
    assert_eq!(swapd.chat("m", "").status, 200);
    let headers =
        "X-Mine: session 7\r\nAuthorization: Bearer hush\r\nX-Forwarded-For: 10.1.2.3, 10.0.0.1\r\n";
    let body = common::chat_body("m", r#""stream":true,"events":400,"gap_ms":20"#);
    let mut open = None;
    let found = events(
        &swapd,
        || open = Some(swapd.open("POST", "/v1/chat/completions", headers, &body)),
        |kind, data| kind == "inflight" && data["request"]["resp_bytes"].as_u64() > Some(300),
    );
    let (_, ui) = found.iter().find(|(kind, _)| kind == "uiConfig").unwrap();
    assert_eq!(ui["activity"]["session_id"], json!(["X-Mine"]));
    let request = &found.last().unwrap().1["request"];
    assert_eq!(request["req_headers"]["x-mine"], "session 7");
    assert_eq!(request["req_headers"]["authorization"], "[REDACTED]");
    assert_eq!(request["resp_headers"]["content-type"], "text/event-stream");
    assert_eq!(request["remote_ip"], "10.1.2.3");
    let told: Vec<&Value> = found
        .iter()
        .filter(|(_, data)| data["operation"] == "upsert")
        .map(|(_, data)| &data["request"])
        .collect();
    assert_eq!(
        (&told[0]["resp_bytes"], &told[0]["resp_headers"]),
        (&json!(0), &json!({}))
    );
    // At most every 250 ms: 300 bytes are more events than were told of.
    assert!((2..=8).contains(&told.len()), "{told:?}");
}

#[test]
fn websockets_are_shown_and_can_be_ended() {
    let swapd = Swapd::start(ONE);
    let upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\n";
    let mut open = None;
    let found = events(
        &swapd,
        || open = Some(swapd.open("GET", "/v1/realtime?model=m", upgrade, "")),
        |kind, data| kind == "inflight" && data["request"]["resp_headers"]["upgrade"] == "websocket",
    );
    let mut open = open.unwrap();
    assert_eq!(open.status, 101);
    let request = &found.last().unwrap().1["request"];
    assert_eq!(
        (&request["req_path"], &request["method"]),
        (&json!("/v1/realtime"), &json!("GET"))
    );
    let cancel = format!("/api/inflight/{}/cancel", request["id"]);
    assert_eq!(swapd.post(&cancel, "").status, 200);
    let mut rest = Vec::new();
    // The connection ends, cleanly or not.
    let _ = std::io::Read::read_to_end(&mut open.reader, &mut rest);
    assert!(rest.is_empty());
    eventually("it is gone", Duration::from_secs(2), || {
        let ended = swapd.journal().contains("upgrade ended");
        (ended && swapd.post(&cancel, "").status == 404 && swapd.running()[0]["inflight"] == 0).then_some(())
    });
}

#[test]
fn a_model_that_is_slow_to_stop_holds_no_other_up() {
    // llama-swap: every request to every model waited for it.
    let swapd = Swapd::start(
        "models:
  slow: {worker: {model: DIR}, env: ['FAKE_IGNORE_TERM=1'], unloadTimeout: 3}
  other: {worker: {model: DIR}}
groups: {both: {swap: false, members: [slow, other]}}",
    );
    for model in ["slow", "other"] {
        assert_eq!(swapd.chat(model, "").status, 200);
    }
    std::thread::scope(|scope| {
        let unload = scope.spawn(|| swapd.post("/api/models/unload/slow", ""));
        eventually("it is stopping", Duration::from_secs(2), || {
            (swapd.state("slow") == "stopping").then_some(())
        });
        let begun = Instant::now();
        assert_eq!(swapd.chat("other", "").status, 200);
        assert!(
            begun.elapsed() < Duration::from_millis(500),
            "{:?}",
            begun.elapsed()
        );
        assert_eq!(swapd.state("slow"), "stopping");
        assert_eq!(unload.join().unwrap().body, "OK");
    });
}

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
fn a_worker_with_a_key_of_its_own_is_shown_it_and_nobody_else_is() {
    let swapd = Swapd::start(
        "apiKeys: [client]\nmodels: {m: {worker: {model: DIR, apiKey: of-the-worker}, env: [JOURNAL]}}",
    );
    let ask = |method: &str, path: &str, body: &str| {
        let key = "Authorization: Bearer client\r\nX-Api-Key: client\r\n";
        swapd.open(method, path, key, body).finish()
    };
    let answer = ask(
        "POST",
        "/v1/chat/completions",
        &common::chat_body("m", r#""echo":true"#),
    );
    assert_eq!(answer.status, 200, "{answer:?}");
    let seen = answer.json()["headers"].to_string();
    assert!(
        seen.contains(r#"["authorization","Bearer of-the-worker"]"#),
        "{seen}"
    );
    assert!(!seen.contains("client"), "{seen}");
    assert_eq!(ask("GET", "/upstream/m/any", "").body, "/any");
    let chat = ask(
        "POST",
        "/api/chat",
        r#"{"model":"m","messages":[{"role":"user","content":"x"}],"stream":false}"#,
    );
    assert_eq!(chat.status, 200, "{chat:?}");
    let upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\nAuthorization: Bearer client\r\n";
    let open = swapd.open("GET", "/v1/realtime?model=m", upgrade, "");
    assert_eq!(open.status, 101);
    let running = ask("GET", "/running", "").body;
    assert!(
        running.contains("--api-key=(hidden)") && !running.contains("of-the-worker"),
        "{running}"
    );
    assert_eq!(swapd.chat("m", "").status, 401);
}

#[test]
fn a_websocket_that_the_model_never_answers_can_be_ended() {
    let swapd = Swapd::start(ONE);
    let upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\n";
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| swapd.open("GET", "/upstream/m/hang", upgrade, "").finish());
        eventually("the model has it", Duration::from_secs(5), || {
            swapd.journal().contains("asked to upgrade").then_some(())
        });
        assert_eq!(swapd.post("/api/inflight/1/cancel", "").status, 200);
        assert_eq!(asked.join().unwrap().error().1, "cancelled");
    });
    eventually("the model has nothing of it", Duration::from_secs(5), || {
        (swapd.journal().contains("disconnect") && swapd.running()[0]["inflight"] == 0).then_some(())
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

#[test]
fn browsers_get_what_they_ask_for_unasked() {
    let swapd = Swapd::start(&format!("apiKeys: [k]\n{ONE}"));
    let icon = swapd.get("/favicon.ico");
    assert_eq!(
        (icon.status, icon.header("content-type")),
        (200, Some("image/svg+xml"))
    );
    for path in ["/upstream", "/upstream/"] {
        let moved = swapd.get(path);
        assert_eq!((moved.status, moved.header("location")), (302, Some("/")));
        assert_eq!(swapd.get("/").status, 200);
    }
    let ask = "Origin: http://page\r\nAccess-Control-Request-Headers: x-mine, content-type\r\n";
    for (headers, allowed) in [
        (ask, "x-mine, content-type"),
        ("", "Content-Type, Authorization, Accept, X-Requested-With"),
    ] {
        let preflight = swapd
            .open("OPTIONS", "/v1/chat/completions", headers, "")
            .finish();
        assert_eq!(preflight.status, 204);
        for (name, value) in [
            ("access-control-allow-origin", "*"),
            (
                "access-control-allow-methods",
                "GET, POST, PUT, PATCH, DELETE, OPTIONS",
            ),
            ("access-control-allow-headers", allowed),
            ("access-control-max-age", "86400"),
        ] {
            assert_eq!(preflight.header(name), Some(value), "{name}");
        }
    }
    let key = "Authorization: Bearer k\r\nOrigin: http://page\r\n";
    let list = swapd.open("GET", "/v1/models", key, "").finish();
    assert_eq!(list.header("access-control-allow-origin"), Some("http://page"));
    let other = swapd.open("GET", "/running", key, "").finish();
    assert_eq!(other.header("access-control-allow-origin"), None);
}

#[test]
fn rows_of_models_tell_what_they_can_and_whether_they_are_loaded() {
    let config = "
models:
  eye:
    worker: {model: DIR}
    capabilities: {in: [text, image], out: [text], tools: true, context: 4096}
    metadata: {context_length: 1, x: 2}
  ear: {worker: {model: DIR}, capabilities: {in: [audio], out: [text]}}
selectors: {any: {strategy: warm, targets: [ear, eye]}}
profiles: {day: {pins: {new: eye, ear: eye, off: null}}}
peers: {far: {proxy: 'http://127.0.0.1:9', models: [x]}}
";
    let swapd = Swapd::start(config);
    let loaded = || -> Vec<(String, String)> {
        let list = swapd.get("/v1/models").json();
        let row = |r: &Value| {
            let text = |v: &Value| v.as_str().unwrap().to_owned();
            (text(&r["id"]), text(&r["status"]["value"]))
        };
        list["data"].as_array().unwrap().iter().map(row).collect()
    };
    let expected = |rows: &[(&str, &str)]| -> Vec<(String, String)> {
        rows.iter()
            .map(|(a, b)| ((*a).to_owned(), (*b).to_owned()))
            .collect()
    };
    let (on, off) = ("loaded", "unloaded");
    assert_eq!(
        loaded(),
        expected(&[("any", off), ("ear", off), ("eye", off), ("far/x", on)])
    );
    assert_eq!(swapd.get("/v1/models/new").status, 404);
    assert_eq!(swapd.chat("eye", "").status, 200);
    let day = r#"{"name":"day"}"#;
    assert_eq!(
        swapd.open("PUT", "/api/profiles/active", "", day).finish().status,
        200
    );
    let all = [("any", on), ("ear", off), ("eye", on), ("far/x", on), ("new", on)];
    assert_eq!(loaded(), expected(&all));
    // What is listed can be asked for.
    for (id, _) in all {
        assert_eq!(swapd.get(&format!("/v1/models/{id}")).json()["id"], id);
    }
    assert_eq!(
        swapd.get("/v1/models/new").json()["meta"]["llamaswap"]["modelID"],
        "eye"
    );
    assert_eq!(swapd.get("/v1/models/off").status, 404);
    let eye = swapd.get("/v1/models/eye").json();
    assert_eq!(
        eye["architecture"],
        json!({"input_modalities": ["text", "image"], "output_modalities": ["text"], "modality": "text+image->text"})
    );
    assert_eq!(
        eye["capabilities"],
        json!({
            "vision": true, "audio_transcriptions": false, "audio_speech": false, "image_generation": false,
            "image_to_image": false, "function_calling": true, "reranker": false,
        })
    );
    assert_eq!(
        (&eye["supported_parameters"], &eye["context_length"]),
        (&json!(["tools", "tool_choice"]), &json!(4096))
    );
    let own = &eye["meta"]["llamaswap"];
    assert_eq!((&own["x"], own.get("context_length")), (&json!(2), None));
    let ear = swapd.get("/v1/models/ear").json();
    assert_eq!(ear["capabilities"]["audio_transcriptions"], true);
    assert_eq!(
        (ear.get("supported_parameters"), ear.get("context_length")),
        (None, None)
    );
}

#[test]
fn parts_of_a_page_start_no_model() {
    let swapd = Swapd::start(ONE);
    let part = swapd.get("/upstream/m/assets/app.js");
    assert_eq!((part.status, part.error().1.as_str()), (409, "conflict"));
    assert!(swapd.journal().is_empty());
    assert_eq!(swapd.get("/upstream/m/page").status, 200);
    assert_eq!(swapd.get("/upstream/m/assets/app.js").body, "/assets/app.js");
    let own = Swapd::start(&format!("upstream: {{ignorePaths: ['^/poll']}}\n{ONE}"));
    assert_eq!(own.get("/upstream/m/poll/1").status, 409);
    assert_eq!(
        own.get("/upstream/m/app.js").status,
        200,
        "the list takes the place of the usual one"
    );
}

#[test]
fn logs_of_all_models_and_of_one() {
    let config = "models:
  loud: {worker: {model: DIR, env: [FAKE_CHATTER=4000]}}
  m: {worker: {model: DIR, env: ['FAKE_CHATTER=2']}}
groups: {g: {swap: false, members: [loud, m]}}";
    let swapd = Swapd::start(config);
    assert_eq!(swapd.chat("m", "").status, 200);
    eventually("it has been heard", Duration::from_secs(5), || {
        swapd.get("/logs").body.contains("chatter 1\n").then_some(())
    });
    let mut upstream = swapd.open("GET", "/logs/stream/upstream", "", "");
    let history = upstream.chunk().unwrap().unwrap();
    assert!(
        history.starts_with("chatter 0\nchatter 1\n") && !history.contains("[INFO]"),
        "{history}"
    );
    swapd.chat("m", r#""last_words":"from the model""#);
    assert_eq!(upstream.chunk().unwrap().unwrap(), "from the model\n");
    assert_eq!(swapd.get("/logs/stream/nobody").status, 400);
    // One model's own history outlasts the noise of another.
    assert_eq!(swapd.chat("loud", r#""last_words":"all said""#).status, 200);
    for _ in 0..3 {
        swapd.chat("loud", &format!(r#""last_words":"{}""#, "noise\\n".repeat(8_000)));
    }
    eventually("pushed out", Duration::from_secs(5), || {
        (!swapd.get("/logs").body.contains("chatter 1\n")).then_some(())
    });
    let mut own = swapd.open("GET", "/logs/stream/m", "", "");
    assert!(
        own.chunk()
            .unwrap()
            .unwrap()
            .starts_with("chatter 0\nchatter 1\n")
    );
}

#[test]
fn models_that_are_removed_leave_no_counters_and_no_logs() {
    let swapd = Swapd::start("models: {m: {worker: {model: DIR}}, n: {worker: {model: DIR}}}");
    for model in ["n", "m"] {
        assert_eq!(swapd.chat(model, "").status, 200);
    }
    assert!(
        swapd
            .get("/metrics")
            .body
            .contains("swapd_requests_total{model=\"m\"")
    );
    // One request ends after the reload, and brings nothing back.
    let late = swapd.chat_open("m", r#""stream":true,"events":10,"gap_ms":30"#);
    swapd.rewrite("models: {n: {worker: {model: DIR}}}");
    assert_eq!(swapd.post("/api/reload", "").status, 200);
    assert!(late.finish().complete);
    eventually("its process has ended", Duration::from_secs(5), || {
        (!swapd.get("/metrics").body.contains("\"m\"")).then_some(())
    });
    assert!(
        swapd
            .get("/metrics")
            .body
            .contains("swapd_requests_total{model=\"n\"")
    );
}

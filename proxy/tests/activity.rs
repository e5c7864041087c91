//! Captures and the activity database of the real program.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::disallowed_methods
)]

mod common;

use std::process::Command;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use common::{Swapd, chat_body, eventually};
use nix::sys::signal::Signal;
use serde_json::Value;

const SEC: Duration = Duration::from_secs(1);
const ONE: &str = "models: {m: {worker: {model: DIR}}}";

fn rows(swapd: &Swapd) -> Vec<Value> {
    let page = swapd.get("/api/metrics/activity?order=asc&limit=999").json();
    page["data"].as_array().unwrap().clone()
}

/// The capture of the last request, once it is there.
fn last_capture(swapd: &Swapd) -> Value {
    let id = eventually("captured", SEC, || {
        let last = rows(swapd).pop()?;
        (last["has_capture"] == true).then(|| last["id"].as_u64().unwrap())
    });
    swapd.get(&format!("/api/captures/{id}")).json()
}

fn text(capture: &Value, key: &str) -> String {
    String::from_utf8(STANDARD.decode(capture[key].as_str().unwrap()).unwrap()).unwrap()
}

#[test]
fn a_request_and_its_reply_are_captured() {
    let swapd = Swapd::start(ONE);
    let body = chat_body("m", r#""stream":true,"events":3"#);
    let headers = "Authorization: Bearer hush\r\nCookie: hush=1\r\nX-Api-Key: hush\r\nX-A: b\r\n";
    let answer = swapd
        .open("POST", "/v1/chat/completions", headers, &body)
        .finish();
    let capture = last_capture(&swapd);
    assert_eq!(capture["req_path"], "/v1/chat/completions");
    assert_eq!(capture["req_headers"]["x-a"], "b");
    assert_eq!(capture["resp_headers"]["content-type"], "text/event-stream");
    assert_eq!(
        (text(&capture, "req_body"), text(&capture, "resp_body")),
        (body, answer.body)
    );
    assert!(!capture.to_string().contains("hush"), "{capture}");
    // A large one is packed elsewhere and comes back whole.
    let body = chat_body(
        "m",
        &format!(r#""bytes":200000,"x":"{}""#, "long ".repeat(20_000)),
    );
    let answer = swapd.post("/v1/chat/completions", &body);
    let capture = last_capture(&swapd);
    assert_eq!(
        (text(&capture, "req_body"), text(&capture, "resp_body")),
        (body, answer.body)
    );
    // What is no text, and what would fill the buffer alone, is left out.
    let form = "--B\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\nm\r\n--B--\r\n";
    let kind = "Content-Type: multipart/form-data; boundary=B\r\n";
    swapd
        .open("POST", "/v1/audio/transcriptions", kind, form)
        .finish();
    let capture = last_capture(&swapd);
    assert_eq!(
        (
            capture["req_body"].as_str(),
            capture["req_body_left_out"].as_bool()
        ),
        (Some(""), Some(true))
    );
    swapd.chat("m", r#""bytes":3000000"#);
    assert_eq!(last_capture(&swapd)["resp_body_left_out"], true);
    assert_eq!(swapd.get("/api/captures/999").status, 404);
    assert_eq!(swapd.get("/api/captures/x").status, 400);
}

#[test]
fn rows_tell_of_servers_counts_refusals_and_the_way_to_the_model() {
    let config = "
models:
  m: {cmd: 'FAKESERVER --port ${PORT}'}
  n: {worker: {model: DIR}}
groups: {g: {swap: false, members: [m, n]}}
selectors: {best: {strategy: warm, targets: [m, n]}}
routing: {scheduler: {use: fifo, settings: {fifo: {priority: {m: 7}}}}}
";
    let swapd = Swapd::start(config);
    let timings = r#"{"content":"","stop":true,"timings":{"cache_n":5,"prompt_n":20,"prompt_per_second":400.5,"predicted_n":30,"predicted_per_second":61.5,"draft_n":12,"draft_n_accepted":9}}"#;
    let body = format!(r#"{{"model":"m","prompt":"x","stream":true,"say":[{timings}]}}"#);
    assert_eq!(swapd.post("/completion", &body).status, 200);
    swapd.chat("best", r#""status":400,"error":{"message":"too long"}"#);
    swapd.chat("n", r#""status":422,"error":{}"#);
    let rows = rows(&swapd);
    assert_eq!(
        rows[0]["tokens"],
        serde_json::json!({
            "cache_tokens": 5, "draft_tokens": 12, "draft_acc_tokens": 9, "input_tokens": 25, "output_tokens": 30,
            "prompt_per_second": 400.5, "tokens_per_second": 61.5,
        })
    );
    let metrics = swapd.get("/metrics").body;
    for line in [
        "swapd_tokens_total{model=\"m\",kind=\"completion\"} 30",
        "swapd_tokens_total{model=\"m\",kind=\"prompt\"} 25",
    ] {
        assert!(metrics.contains(line), "{metrics}");
    }
    assert_eq!(rows[0]["metadata"], serde_json::json!({"fifo_priority": "7"}));
    assert_eq!(
        rows[1]["metadata"],
        serde_json::json!({"fifo_priority": "7", "selector": "best"})
    );
    assert_eq!(
        (&rows[1]["error_msg"], &rows[1]["resp_status_code"]),
        (&"too long".into(), &400.into())
    );
    assert_eq!(rows[2]["error_msg"], "Unprocessable Entity");
    assert_eq!(rows[0].get("error_msg"), None);
}

#[test]
fn rows_are_found_by_id_and_time() {
    let swapd = Swapd::start(ONE);
    for _ in 0..5 {
        swapd.chat("m", "");
    }
    let ids = |query: &str| -> Vec<u64> {
        let page = swapd
            .get(&format!("/api/metrics/activity?order=asc&{query}"))
            .json();
        let rows = page["data"].as_array().unwrap();
        rows.iter().map(|r| r["id"].as_u64().unwrap()).collect()
    };
    assert_eq!(ids("min_id=2&max_id=4"), [2, 3, 4]);
    assert_eq!(ids("min_id=5"), [5]);
    let all = rows(&swapd);
    // The clock of the machine may be set while the test runs.
    let mut times: Vec<&str> = all.iter().map(|r| r["timestamp"].as_str().unwrap()).collect();
    times.sort_unstable();
    assert_eq!(
        ids(&format!("start={}&end={}", times[0], times[4])),
        [1, 2, 3, 4, 5]
    );
    assert!(ids("start=2100-01-01T00:00:00Z").is_empty());
    assert!(ids("end=2001-01-01T00:00:00Z").is_empty());
    assert_eq!(ids("end=2100-01-01T00:00:00%2B02:00&limit=2&page=2"), [3, 4]);
    for bad in ["start=yesterday", "end=1", "min_id=x", "max_id=-1", "page=x"] {
        let answer = swapd.get(&format!("/api/metrics/activity?{bad}"));
        assert_eq!(answer.status, 400, "{bad}");
        assert!(
            answer.error().0.starts_with(bad.split('=').next().unwrap()),
            "{answer:?}"
        );
    }
}

/// llama-swap: what a model's own page asks for (scripts, pictures, its state every second) leaves no rows.
#[test]
fn only_inference_becomes_rows() {
    let swapd = Swapd::start(ONE);
    let body = chat_body("m", "");
    assert_eq!(swapd.post("/upstream/m/own/api", &body).status, 200);
    for path in [
        "/upstream/m/app.js",
        "/upstream/m/",
        "/upstream/m/v1/models",
        "/props?model=m",
    ] {
        assert!(swapd.get(path).status < 400, "{path}");
    }
    assert!(rows(&swapd).is_empty());
    assert_eq!(swapd.get("/api/captures/1").status, 404);
    assert!(!swapd.get("/metrics").body.contains("swapd_requests_total{"));
    swapd.post("/upstream/m/v1/chat/completions", &body);
    swapd.post("/v/chat/completions", &body);
    let rows = rows(&swapd);
    let paths: Vec<&str> = rows.iter().map(|r| r["req_path"].as_str().unwrap()).collect();
    assert_eq!(paths, ["/upstream/m/v1/chat/completions", "/v/chat/completions"]);
    assert_eq!(rows[0]["tokens"]["input_tokens"], 7);
}

#[test]
fn no_buffer_no_captures_and_a_reload_changes_it() {
    let off = format!("captureBuffer: 0\n{ONE}");
    let swapd = Swapd::start(&off);
    swapd.chat("m", "");
    assert_eq!(rows(&swapd)[0]["has_capture"], false);
    assert_eq!(swapd.get("/api/captures/1").status, 404);
    swapd.rewrite(ONE);
    assert_eq!(swapd.post("/api/reload", "").status, 200);
    swapd.chat("m", "");
    assert_eq!(last_capture(&swapd)["id"], 2);
    swapd.rewrite(&off);
    assert_eq!(swapd.post("/api/reload", "").status, 200);
    assert_eq!(swapd.get("/api/captures/2").status, 404);
}

#[test]
fn activity_survives_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("activity.db");
    let config = format!(
        "store: {{path: '{}'}}\nmetricsMaxInMemory: 2\n{ONE}",
        file.display()
    );
    let mut first = Swapd::start(&config);
    for _ in 0..5 {
        first.chat("m", "");
    }
    assert_eq!(first.chat("nothing", "").status, 404);
    assert_eq!(rows(&first).len(), 5, "the bound of memory is none here");
    common::signal(first.child.id(), Signal::SIGTERM);
    assert_eq!(first.exit_code(5 * SEC), Some(0));
    let mut second = Swapd::start(&config);
    second.chat("m", "");
    let all = rows(&second);
    let ids: Vec<u64> = all.iter().map(|r| r["id"].as_u64().unwrap()).collect();
    assert_eq!(ids, [1, 2, 3, 4, 5, 6]);
    assert_eq!(all[0]["tokens"]["input_tokens"], 7);
    assert_eq!(
        second.get("/api/metrics/stats?model=m").json()["total_input_tokens"],
        42
    );
    assert_eq!(
        second.get("/api/metrics/activity?limit=2&page=2").json()["total_pages"],
        3
    );
    assert_eq!(
        text(&second.get("/api/captures/1").json(), "req_body"),
        chat_body("m", "")
    );
    assert!(second.get("/metrics").body.contains("swapd_store_lost_total 0"));
    // Killed, it loses what was not asked for since, at most.
    let _ = second.child.kill();
    let _ = second.child.wait();
    assert_eq!(rows(&Swapd::start(&config)).len(), 6);
}

#[test]
fn a_reload_opens_another_file() {
    let swapd = Swapd::start(ONE);
    swapd.chat("m", "");
    let with = |path: &str| {
        swapd.rewrite(&format!("store: {{path: '{path}'}}\n{ONE}"));
        swapd.post("/api/reload", "")
    };
    let refused = with("DIR/none/a.db");
    let (message, _) = refused.error();
    assert!(
        refused.status == 400 && message.contains("none/a.db: cannot be written"),
        "{message}"
    );
    assert_eq!(rows(&swapd).len(), 1, "everything is as it was");
    assert_eq!(with("DIR/a.db").status, 200);
    swapd.chat("m", "");
    assert_eq!(rows(&swapd).len(), 1, "another store, other rows");
    assert_eq!(with("DIR/b.db").status, 200);
    swapd.chat("m", "");
    swapd.chat("m", "");
    assert_eq!(rows(&swapd).len(), 2);
    assert_eq!(with("DIR/a.db").status, 200);
    assert_eq!(rows(&swapd).len(), 1);
    // Through all of it the model has kept its process.
    let pid = swapd.running()[0]["pid"].clone();
    assert_eq!(swapd.chat("m", "").json()["pid"], pid);
}

#[test]
fn a_store_that_cannot_be_opened_ends_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("c.yaml");
    let path = dir.path().to_str().unwrap();
    for (store, expected) in [
        ("''", "must not be empty"),
        (path, "is a directory"),
        ("none/a.db", "cannot be written"),
    ] {
        std::fs::write(&config, format!("store: {{path: {store}}}\nmodels: {{}}")).unwrap();
        let out = Command::new(env!("CARGO_BIN_EXE_swapd"))
            .args(["--config", config.to_str().unwrap(), "--listen", "127.0.0.1:0"])
            .output()
            .unwrap();
        let message = String::from_utf8(out.stderr).unwrap();
        assert!(
            out.status.code() == Some(1) && message.contains(expected),
            "{message}"
        );
    }
}

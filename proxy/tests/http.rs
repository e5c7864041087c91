//! Routes, bodies and errors of the real program.
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

use common::{Swapd, eventually};

const ONE: &str = "models: {org/m: {worker: {model: DIR}, aliases: [short]}}";

#[test]
fn errors_are_envelopes() {
    let swapd = Swapd::start(ONE);
    let cases = [
        (swapd.chat("shart", ""), 404, "model_not_found"),
        (swapd.get("/nothing"), 404, "not_found"),
        (swapd.get("/v1/chat/completions"), 405, "method_not_allowed"),
        (swapd.post("/running", "{}"), 405, "method_not_allowed"),
        (swapd.post("/v1/chat/completions", "{}"), 400, ""),
        (swapd.post("/v1/chat/completions", "model=short"), 400, ""),
        (swapd.get("/v1/models/none"), 404, "model_not_found"),
        (swapd.get("/upstream/none/x"), 404, "model_not_found"),
    ];
    for (answer, status, code) in cases {
        assert_eq!(
            (answer.status, answer.error().1.as_str()),
            (status, code),
            "{answer:?}"
        );
    }
    let (message, _) = swapd.chat("shart", "").error();
    assert!(
        message.contains("'shart'") && message.contains("'short'"),
        "{message}"
    );
    assert_eq!(swapd.get("/v1/chat/completions").header("allow"), Some("POST"));
    let big = swapd
        .open(
            "POST",
            "/v1/chat/completions",
            "Content-Length: 400000000\r\n",
            "",
        )
        .finish();
    assert_eq!((big.status, big.error().1.as_str()), (413, "request_too_large"));
    swapd.rewrite(&format!("maxBodySize: 1\n{ONE}"));
    swapd.post("/api/reload", "");
    let smaller = swapd.post("/v1/chat/completions", &" ".repeat((1 << 20) + 1));
    assert_eq!(
        (smaller.status, smaller.error().1.as_str()),
        (413, "request_too_large")
    );
}

#[test]
fn the_body_arrives_as_it_was_and_credentials_stay() {
    let swapd = Swapd::start(ONE);
    let body =
        "{ \"messages\" : [{\"model\":\"inner\"}] ,\n \"model\":\"short\", \"echo\":true, \"n\": 1.50 }";
    let headers =
        "Authorization: Bearer k\r\nX-Api-Key: k\r\nX-Session-Id: s\r\nContent-Type: application/json\r\n";
    let answer = swapd.open("POST", "/v1/embeddings?a=b", headers, body).finish();
    let echo = answer.json();
    assert_eq!(
        (echo["body"].as_str(), echo["path"].as_str()),
        (Some(body), Some("/v1/embeddings?a=b"))
    );
    let header = |name: &str| {
        echo["headers"]
            .as_array()
            .unwrap()
            .iter()
            .find(|h| h[0] == name)
            .map(|h| h[1].clone())
    };
    assert_eq!(header("x-session-id").unwrap(), "s");
    assert_eq!(header("content-length").unwrap(), body.len().to_string());
    assert!(header("authorization").is_none() && header("x-api-key").is_none());
    assert_eq!(header("x-forwarded-for").unwrap(), "127.0.0.1");
    // What curl sends without a -H.
    let curl = "Content-Type: application/x-www-form-urlencoded\r\n";
    let echo = swapd.open("POST", "/v1/embeddings", curl, body).finish().json();
    let kind = echo["headers"]
        .as_array()
        .unwrap()
        .iter()
        .find(|h| h[0] == "content-type")
        .unwrap();
    assert_eq!(
        (kind[1].as_str(), echo["body"].as_str()),
        (Some("application/json"), Some(body))
    );
}

#[test]
fn big_bodies_pass_both_ways() {
    let swapd = Swapd::start(ONE);
    let text = "y".repeat(20 << 20);
    let answer = swapd.post(
        "/v1/chat/completions",
        &format!(r#"{{"echo":true,"x":"{text}","model":"short"}}"#),
    );
    assert_eq!(answer.json()["body"].as_str().unwrap().len(), text.len() + 36);
    let answer = swapd.chat("short", r#""bytes":30000000"#);
    assert!(answer.complete && answer.body.len() == 30_000_000);
}

#[test]
fn upstream_paths_reach_the_model_by_the_longest_name() {
    let swapd = Swapd::start(ONE);
    assert_eq!(
        swapd.get("/upstream/org/m/some/path?q=%20").body,
        "/some/path?q=%20"
    );
    assert_eq!(swapd.get("/upstream/org%2Fm/x").body, "/x");
    assert_eq!(swapd.get("/upstream/short/").body, "/");
    let redirect = swapd.get("/upstream/org/m?q=1");
    assert_eq!(
        (redirect.status, redirect.header("location")),
        (301, Some("/upstream/org/m/?q=1"))
    );
}

#[test]
fn lists_and_logs() {
    let swapd = Swapd::start(
        "includeAliasesInList: true\nmodels: {m: {worker: {model: DIR, env: [FAKE_CHATTER=3]}, aliases: [z], name: M, description: ' d ', metadata: {x: 1}}, hidden: {cmd: 'FAKESERVER --port ${PORT}', unlisted: true}}",
    );
    let list = swapd.get("/v1/models").json();
    let ids: Vec<_> = list["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| m["id"].as_str().unwrap())
        .collect();
    assert_eq!(ids, ["m", "z"]);
    let row = swapd.get("/v1/models/z").json();
    assert_eq!(
        (
            row["id"].as_str(),
            row["name"].as_str(),
            row["description"].as_str()
        ),
        (Some("m"), Some("M"), Some("d"))
    );
    assert_eq!(row["meta"]["llamaswap"]["x"], 1);
    swapd.chat("m", "");
    let logs = swapd.get("/logs").body;
    assert!(logs.contains("chatter 2\n") && logs.contains("ready"), "{logs}");
    let mut stream = swapd.open("GET", "/logs/stream/m", "", "");
    assert!(stream.chunk().unwrap().unwrap().starts_with("chatter 0\n"));
    let mut own = swapd.open("GET", "/logs/stream/proxy?no-history", "", "");
    swapd.get("/unload");
    assert!(own.chunk().unwrap().unwrap().contains("stopping"));
    assert_eq!(swapd.get("/health").body, "OK");
    assert_eq!(swapd.open("HEAD", "/health", "", "").status, 200);
}

#[test]
fn filters_change_named_keys_only() {
    let config = "
models:
  m:
    worker: {model: DIR}
    useModelName: real
    aliases: [a]
    filters:
      stripParams: 'top_k, chat_template_kwargs.x'
      setParams: {temperature: 0.25}
      setParamsByID: {'m:think': {reasoning: high}}
";
    let swapd = Swapd::start(config);
    let sent = r#"{ "model":"NAME", "top_k" : 1,"chat_template_kwargs":{"x":1, "y":2.50}, "echo":true}"#;
    let received = |name: &str| {
        swapd.post("/v1/x", &sent.replace("NAME", name)).json()["body"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    let expected = r#"{ "model":"real","chat_template_kwargs":{ "y":2.50}, "echo":true,"temperature":0.25}"#;
    assert_eq!(received("a"), expected);
    assert_eq!(
        received("m:think"),
        expected.replace(r#"0.25}"#, r#"0.25,"reasoning":"high"}"#)
    );
    // A form keeps its parts, their headers and their order.
    let form = "--B\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a.wav\"\r\nContent-Type: audio/wav\r\n\r\nRIFF\r\n--B\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\na\r\n--B--\r\n";
    let kind = "Content-Type: multipart/form-data; boundary=B\r\nX-Echo: 1\r\n";
    let answer = swapd
        .open("POST", "/v1/audio/transcriptions", kind, form)
        .finish();
    assert_eq!(
        answer.json()["body"],
        form.replace("\r\n\r\na\r\n", "\r\n\r\nreal\r\n")
    );
    let answer = swapd
        .open(
            "POST",
            "/v1/completions",
            "Content-Type: application/x-www-form-urlencoded\r\nX-Echo: 1\r\n",
            "model=a&x=1",
        )
        .finish();
    assert_eq!(answer.json()["body"], "model=real&x=1");
    assert_eq!(swapd.get("/props?model=a").body, "/props?model=a");
    assert_eq!(swapd.get("/props").status, 400);
}

#[test]
fn concurrency_limit_is_429_with_retry_after() {
    let swapd = Swapd::start("models: {m: {worker: {model: DIR}, concurrencyLimit: 1}}");
    let mut first = swapd.chat_open("m", r#""stream":true,"events":50,"gap_ms":50"#);
    first.chunk().unwrap();
    let refused = swapd.chat("m", "");
    assert_eq!((refused.status, refused.header("retry-after")), (429, Some("1")));
    assert_eq!(refused.error().1, "concurrency_limit");
}

#[test]
fn keep_alive_connections_serve_many_requests() {
    let swapd = Swapd::start(ONE);
    let mut stream = std::net::TcpStream::connect(&swapd.address).unwrap();
    let body = common::chat_body("short", r#""bytes":5"#);
    let request = format!(
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    for _ in 0..50 {
        std::io::Write::write_all(&mut stream, request.as_bytes()).unwrap();
        let mut seen = Vec::new();
        while !seen.ends_with(b"xxxxx") {
            let mut buffer = [0; 512];
            let n = std::io::Read::read(&mut stream, &mut buffer).unwrap();
            assert!(n > 0);
            seen.extend_from_slice(&buffer[..n]);
        }
    }
}

fn check(config: &str, more: &[&str]) -> (i32, String) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.yaml");
    std::fs::write(&path, common::expand(config, &dir)).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_swapd"));
    let output = command
        .args(["check", "-config", path.to_str().unwrap()])
        .args(more)
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap();
    (output.status.code().unwrap(), text)
}

#[test]
fn check_names_file_line_and_key() {
    assert_eq!(check(ONE, &[]), (0, "ok: 1 model\n".into()));
    let (code, text) = check("models:\n  m:\n    cmd: x --port ${PORT}\n    ttl: soon\n", &[]);
    assert_eq!(code, 1);
    assert!(
        text.contains("c.yaml:4:") && text.contains("models.m.ttl"),
        "{text}"
    );
    let unknown = "models:\n  m:\n    cmd: x --port ${PORT}\n    tll: 5\n";
    let (code, text) = check(unknown, &[]);
    assert!(code == 1 && text.contains("models.m.tll"), "{text}");
    assert_eq!(check(unknown, &["--lenient"]).0, 0);
}

#[test]
fn a_bad_registry_or_command_line_does_not_serve() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.yaml");
    std::fs::write(&path, "models:\n  m: [1]\n").unwrap();
    let run = |args: &[&str]| {
        Command::new(env!("CARGO_BIN_EXE_swapd"))
            .args(args)
            .output()
            .unwrap()
    };
    let output = run(&["--config", path.to_str().unwrap(), "--listen", "127.0.0.1:0"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8(output.stderr).unwrap().contains("c.yaml:2:"));
    assert_eq!(run(&["--confg", "x"]).status.code(), Some(2));
    for none in [&["--watch-config"][..], &["check"]] {
        let output = run(none);
        assert_eq!(output.status.code(), Some(1));
        assert!(
            String::from_utf8(output.stderr)
                .unwrap()
                .contains("--config FILE")
        );
    }
    assert_eq!(run(&["-version"]).status.code(), Some(0));
    assert_eq!(run(&["--config", "/does/not/exist"]).status.code(), Some(1));
}

#[test]
fn api_keys_open_and_close_models() {
    let config = "
apiKeys: [whole, {key: part, models: [a]}]
models:
  a: {worker: {model: DIR}}
  b: {worker: {model: DIR}}
";
    let swapd = Swapd::start(config);
    let ask = |method: &str, path: &str, key: &str, body: &str| {
        let header = if key.is_empty() {
            String::new()
        } else {
            format!("Authorization: Bearer {key}\r\n")
        };
        swapd.open(method, path, &header, body).finish()
    };
    let chat = |model: &str, key: &str| {
        ask("POST", "/v1/chat/completions", key, &common::chat_body(model, "")).status
    };
    let refused = ask("GET", "/v1/models", "", "");
    assert_eq!(
        (refused.status, refused.header("www-authenticate")),
        (401, Some("Basic realm=\"swapd\""))
    );
    assert_eq!(
        (
            chat("a", "wrong"),
            chat("a", "part"),
            chat("b", "part"),
            chat("b", "whole")
        ),
        (401, 200, 403, 200)
    );
    let listed = |key: &str| {
        ask("GET", "/v1/models", key, "").json()["data"]
            .as_array()
            .unwrap()
            .len()
    };
    assert_eq!((listed("whole"), listed("part")), (2, 1));
    // The command that asks for a reload presents its key from the environment.
    let reload = |key: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_swapd"));
        command
            .args(["reload", "--listen", &swapd.address])
            .env("SWAPD_API_KEY", key);
        command.output().unwrap().status.code()
    };
    assert_eq!(
        ["whole", "part", "wrong"].map(reload),
        [Some(0), Some(1), Some(1)]
    );
    assert_eq!(ask("GET", "/unload", "part", "").status, 403);
    assert_eq!(ask("GET", "/upstream/b/x", "part", "").status, 403);
    assert_eq!(ask("GET", "/health", "", "").status, 200);
    assert_eq!(ask("OPTIONS", "/v1/models", "", "").status, 204);
}

#[test]
fn metrics_and_activity_count_what_was_served() {
    let swapd = Swapd::start(ONE);
    swapd.chat("short", "");
    swapd.chat("short", r#""stream":true,"events":3"#);
    swapd.chat("short", r#""die":true"#);
    let page = swapd.get("/metrics").body;
    for line in [
        "swapd_requests_total{model=\"org/m\",code=\"200\"} 2",
        "swapd_requests_total{model=\"org/m\",code=\"502\"} 1",
        "swapd_tokens_total{model=\"org/m\",kind=\"prompt\"} 7",
        "swapd_model_load_seconds_count{model=\"org/m\"} 1",
        "swapd_time_to_first_byte_seconds_count{model=\"org/m\"} 2",
    ] {
        assert!(page.contains(line), "no {line} in {page}");
    }
    let rows = swapd
        .get("/api/metrics/activity?model=org/m&sort=id&order=asc&limit=2")
        .json();
    assert_eq!(
        (rows["total"].as_u64(), rows["total_pages"].as_u64()),
        (Some(3), Some(2))
    );
    let first = &rows["data"][0];
    assert_eq!(
        (
            first["resp_status_code"].as_u64(),
            first["tokens"]["input_tokens"].as_i64()
        ),
        (Some(200), Some(7))
    );
    assert_eq!(rows["data"][1]["tokens"]["output_tokens"], -1);
    assert_eq!(swapd.get("/api/metrics/activity?limit=0").status, 400);
    let stats = swapd.get("/api/metrics/stats").json();
    assert_eq!(
        (
            stats["total_requests"].as_u64(),
            stats["total_output_tokens"].as_u64()
        ),
        (Some(3), Some(1))
    );
}

#[test]
fn events_tell_states_requests_and_logs() {
    let swapd = Swapd::start(ONE);
    let mut events = swapd.open("GET", "/api/events", "", "");
    let mut seen = String::new();
    let mut until = |seen: &mut String, wanted: &str| {
        while !seen.contains(wanted) {
            seen.push_str(&events.chunk().unwrap().unwrap());
        }
    };
    until(&mut seen, "snapshot");
    assert!(
        seen.starts_with("event:message\ndata:{\"type\":\"logData\""),
        "{seen}"
    );
    swapd.chat("short", "");
    for wanted in ["starting", "ready", "upsert", "remove", "\"activity\""] {
        until(&mut seen, wanted);
    }
}

#[test]
fn a_running_request_can_be_cancelled() {
    let swapd = Swapd::start("models: {m: {worker: {model: DIR, env: [JOURNAL]}}}");
    let mut stream = swapd.chat_open("m", r#""stream":true,"events":100,"gap_ms":10000"#);
    stream.chunk().unwrap();
    assert_eq!(swapd.post("/api/inflight/1/cancel", "").status, 200);
    let stream = stream.finish();
    assert!(
        !stream.complete && stream.body.contains("\"code\":\"cancelled\""),
        "{stream:?}"
    );
    common::eventually("noticed", std::time::Duration::from_secs(1), || {
        (!swapd.journalled("disconnect").is_empty()).then_some(())
    });
    assert_eq!(swapd.post("/api/inflight/1/cancel", "").status, 404);
}

#[test]
fn connections_to_the_model_are_used_again() {
    let swapd = Swapd::start(ONE);
    swapd.chat("short", "");
    let pid = swapd.running()[0]["pid"].clone();
    let sockets = |pid: &serde_json::Value| {
        let files = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
        files
            .filter(|f| {
                std::fs::read_link(f.path()).is_ok_and(|l| l.to_string_lossy().starts_with("socket:"))
            })
            .count()
    };
    let before = sockets(&pid);
    for more in ["", r#""stream":true"#, r#""bytes":100000"#, r#""echo":true"#] {
        for _ in 0..10 {
            assert!(swapd.chat("short", more).complete);
        }
    }
    assert_eq!(sockets(&pid), before);
}

#[test]
fn loading_can_be_watched_and_its_failure_is_an_event() {
    let config = "
sendLoadingState: true
logToStdout: both
models:
  slow: {worker: {model: DIR, env: [FAKE_START_MS=1000]}}
  bad: {worker: {model: DIR, env: [FAKE_START_MS=300, 'FAKE_FAIL=no tensor']}, concurrencyLimit: 1}
";
    let swapd = Swapd::start(config);
    let mut reply = swapd.chat_open("slow", r#""stream":true,"events":3"#);
    assert_eq!(reply.status, 200);
    let begun = std::time::Instant::now();
    assert!(reply.chunk().unwrap().unwrap().contains("reasoning_content"));
    assert!(begun.elapsed() < std::time::Duration::from_millis(500), "at once");
    let reply = reply.finish();
    let text = &reply.body;
    assert!(
        reply.complete && text.contains("swapd loading model: slow") && text.contains("Done! ("),
        "{text}"
    );
    assert!(text.ends_with("data: [DONE]\n\n"));
    // Ready: nothing but the model's bytes.
    assert!(
        !swapd
            .chat("slow", r#""stream":true,"events":2"#)
            .body
            .contains("reasoning_content")
    );
    std::thread::scope(|scope| {
        let failing = scope.spawn(|| swapd.chat("bad", r#""stream":true"#));
        common::eventually("starting", std::time::Duration::from_secs(3), || {
            (swapd.state("bad") == "starting").then_some(())
        });
        assert_eq!(
            swapd.chat("bad", r#""stream":true"#).status,
            429,
            "refused with its own status"
        );
        let failed = failing.join().unwrap();
        assert!(!failed.complete && failed.status == 200, "{failed:?}");
        let last = failed.body.trim_end().rsplit("data: ").next().unwrap();
        let error: serde_json::Value = serde_json::from_str(last).unwrap();
        assert_eq!(error["error"]["code"], "model_start_failed");
        assert!(error["error"]["message"].as_str().unwrap().contains("no tensor"));
    });
}

#[test]
fn every_request_is_a_line_of_the_log() {
    let swapd = Swapd::start(ONE);
    let headers = "User-Agent: tester/1 (\"x\")\r\nContent-Type: application/json\r\n";
    let body = r#"{"model":"short","messages":[]}"#;
    let answer = swapd
        .open("POST", "/v1/chat/completions?key=secret", headers, body)
        .finish();
    for quiet in [
        "/metrics",
        "/api/performance?after=2026-01-01T00:00:00Z",
        "/wol-health",
    ] {
        assert_eq!(swapd.get(quiet).status, 200, "{quiet}");
    }
    assert_eq!(swapd.get("/nothing").status, 404);
    let lines = eventually("two lines", Duration::from_secs(5), || {
        let log = swapd.get("/logs").body;
        let lines: Vec<String> = log
            .lines()
            .filter(|l| l.contains("Request "))
            .map(str::to_owned)
            .collect();
        (lines.len() >= 2).then_some(lines)
    });
    let begin = format!(
        "[INFO] Request 127.0.0.1 \"POST /v1/chat/completions HTTP/1.1\" 200 {} \"tester/1 (\"x\")\" ",
        answer.body.len()
    );
    let time = lines[0]
        .strip_prefix(&begin)
        .unwrap_or_else(|| panic!("{lines:?}"));
    assert!(time.ends_with("ms") || time.ends_with("µs"), "{time}");
    assert!(lines[1].contains("\"GET /nothing HTTP/1.1\" 404 "), "{lines:?}");
    let noisy = |line: &String| {
        ["/metrics", "/api/performance", "/wol-health", "secret"]
            .iter()
            .any(|q| line.contains(q))
    };
    assert!(!lines.iter().any(noisy), "{lines:?}");
}

#[test]
fn a_reload_takes_up_the_logs_level() {
    let config = |level: &str| format!("logLevel: {level}\nlogTimeFormat: rfc3339\nmodels: {{}}");
    let swapd = Swapd::start_with(&config("info"), &["--watch-config"]);
    swapd.get("/nothing");
    let requests = || {
        let log = swapd.get("/logs").body;
        log.lines()
            .filter(|l| l.contains("/nothing HTTP"))
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let lines = eventually("a line", Duration::from_secs(5), || {
        Some(requests()).filter(|l| !l.is_empty())
    });
    let line = &lines[0];
    let time = line.split(' ').next().unwrap();
    assert!(
        time.len() == 25 && time.as_bytes()[10] == b'T' && line[26..].starts_with("[INFO] "),
        "{line}"
    );
    swapd.rewrite(&config("warn"));
    eventually("the reload", Duration::from_secs(5), || {
        swapd
            .get("/logs")
            .body
            .contains("registry taken up")
            .then_some(())
    });
    let before = requests().len();
    swapd.get("/nothing");
    assert_eq!(requests().len(), before, "nothing below a warning");
    swapd.rewrite(&config("info"));
    eventually("lines again", Duration::from_secs(5), || {
        swapd.get("/nothing");
        (requests().len() > before).then_some(())
    });
}

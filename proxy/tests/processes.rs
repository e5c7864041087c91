//! Starting, swapping, stopping and dying of model servers, on real processes.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::disallowed_methods
)]

mod common;

use std::time::{Duration, Instant};

use common::{Swapd, alive, eventually, signal};
use nix::sys::signal::Signal;

const SEC: Duration = Duration::from_secs(1);

const TWO: &str = "
models:
  one: {worker: {model: DIR, env: [JOURNAL]}}
  two: {cmd: 'FAKESERVER --port ${PORT}', env: [JOURNAL]}
";

#[test]
fn starts_on_demand_and_lists_what_runs() {
    let swapd = Swapd::start(TWO);
    assert!(swapd.running().is_empty() && swapd.journal().is_empty());
    let answer = swapd.chat("one", "");
    assert_eq!(
        (
            answer.status,
            answer.json()["choices"][0]["message"]["content"].as_str()
        ),
        (200, Some("hello"))
    );
    let running = swapd.running();
    assert_eq!(
        (
            running.len(),
            running[0]["state"].as_str(),
            running[0]["model"].as_str()
        ),
        (1, Some("ready"), Some("one"))
    );
    assert_eq!(running[0]["pid"], swapd.journalled("ready")[0].1);
    let listed = swapd.get("/v1/models").json();
    let status = |i: usize| listed["data"][i]["status"]["value"].as_str().unwrap().to_owned();
    assert_eq!((status(0), status(1)), ("loaded".into(), "unloaded".into()));
}

#[test]
fn concurrent_requests_start_one_process() {
    let swapd =
        Swapd::start("models: {m: {cmd: 'FAKESERVER --port ${PORT}', env: [JOURNAL, FAKE_START_MS=300]}}");
    std::thread::scope(|scope| {
        let asked: Vec<_> = (0..24)
            .map(|_| scope.spawn(|| swapd.chat("m", "").json()["pid"].clone()))
            .collect();
        let pids: Vec<_> = asked.into_iter().map(|t| t.join().unwrap()).collect();
        assert!(pids.iter().all(|p| *p == pids[0]));
    });
    assert_eq!(swapd.journalled("start").len(), 1);
}

#[test]
fn a_swap_lets_running_requests_finish() {
    let swapd = Swapd::start(TWO);
    let mut long = swapd.chat_open("one", r#""stream":true,"events":20,"gap_ms":40"#);
    assert!(long.chunk().unwrap().is_some());
    let first = swapd.journalled("start")[0].1;
    let other = std::thread::scope(|scope| {
        let other = scope.spawn(|| swapd.chat("two", ""));
        let long = long.finish();
        assert!(
            long.complete && long.body.ends_with("data: [DONE]\n\n"),
            "cut by the swap"
        );
        other.join().unwrap()
    });
    assert_eq!(other.status, 200);
    assert!(!alive(first));
}

/// The old process ends only when it is killed, a second after it was told to stop. llama-swap gives it the 120 s that
/// a start may take.
#[test]
fn a_swap_waits_for_the_old_processes_end_and_no_longer_than_its_grace() {
    let config = format!(
        "unloadTimeout: 1\n{}",
        TWO.replace("JOURNAL", "JOURNAL, FAKE_IGNORE_TERM=1")
    );
    for (from, to, told) in [("one", "two", "stop"), ("two", "one", "term")] {
        let swapd = Swapd::start(&config);
        swapd.chat(from, "");
        let begun = Instant::now();
        assert_eq!(swapd.chat(to, "").status, 200);
        let (stopped, started) = (swapd.journalled(told)[0].0, swapd.journalled("start")[1].0);
        assert!(
            started >= stopped + 950,
            "{from}: the new process started {} ms after the old one was told to stop",
            started - stopped
        );
        assert!(begun.elapsed() < 4 * SEC, "{from}: {:?}", begun.elapsed());
    }
}

#[test]
fn ttl_counts_from_the_last_use() {
    let swapd = Swapd::start("models: {m: {worker: {model: DIR}, ttl: 1}}");
    let begun = Instant::now();
    swapd.chat("m", "");
    std::thread::sleep(Duration::from_millis(600));
    swapd.chat("m", "");
    let used = Instant::now();
    eventually("unloaded", 3 * SEC, || {
        (swapd.state("m") == "stopped").then_some(())
    });
    assert!(used.elapsed() >= Duration::from_millis(950) && begun.elapsed() >= Duration::from_millis(1550));
}

#[test]
fn sigterm_ends_everything_within_the_grace() {
    for stubborn in ["", "FAKE_IGNORE_TERM=1"] {
        let env = if stubborn.is_empty() {
            String::new()
        } else {
            format!(", {stubborn}")
        };
        let config = TWO
            .replace("JOURNAL", &format!("JOURNAL{env}"))
            .replace("models:", "unloadTimeout: 1\nmodels:");
        for model in ["one", "two"] {
            let mut swapd = Swapd::start(&config);
            swapd.chat(model, "");
            let pid = swapd.journalled("ready")[0].1;
            let begun = Instant::now();
            signal(swapd.child.id(), Signal::SIGTERM);
            assert_eq!(swapd.exit_code(5 * SEC), Some(0));
            assert!(!alive(pid), "{model} {stubborn}");
            assert!(
                begun.elapsed() < 3 * SEC,
                "{model} {stubborn} {:?}",
                begun.elapsed()
            );
        }
    }
}

#[test]
fn sigterm_waits_for_running_requests_then_cuts_them_with_an_error() {
    let mut swapd = Swapd::start("unloadTimeout: 1\nmodels: {m: {worker: {model: DIR}}}");
    let mut short = swapd.chat_open("m", r#""stream":true,"events":10,"gap_ms":50"#);
    let mut endless = swapd.chat_open("m", r#""stream":true,"events":1000,"gap_ms":50"#);
    short.chunk().unwrap();
    endless.chunk().unwrap();
    signal(swapd.child.id(), Signal::SIGTERM);
    let short = short.finish();
    assert!(short.complete && short.body.ends_with("data: [DONE]\n\n"));
    let endless = endless.finish();
    assert!(
        !endless.complete && endless.body.contains("\"code\":\"shutting_down\""),
        "{endless:?}"
    );
    assert_eq!(swapd.exit_code(5 * SEC), Some(0));
}

/// The kill test: nothing of a model outlives its proxy, whatever it ignores and wherever it hides.
#[test]
fn sigkill_of_swapd_leaves_nothing_behind() {
    let cases = [
        ("one", "JOURNAL"),
        ("one", "JOURNAL, FAKE_IGNORE_TERM=1"),
        ("two", "JOURNAL"),
        ("two", "JOURNAL, FAKE_IGNORE_TERM=1"),
        ("two", "JOURNAL, FAKE_IGNORE_TERM=1, FAKE_FORK=1"),
    ];
    for (model, env) in cases {
        let mut swapd = Swapd::start(&TWO.replace("JOURNAL", env));
        swapd.chat(model, "");
        let mut pids = vec![swapd.journalled("ready")[0].1];
        for line in swapd.journal().lines().filter(|l| l.contains(" child ")) {
            pids.push(line.rsplit(' ').next().unwrap().parse().unwrap());
        }
        assert_eq!(pids.len(), if env.contains("FORK") { 2 } else { 1 });
        assert!(pids.iter().all(|p| alive(*p)));
        swapd.child.kill().unwrap();
        swapd.child.wait().unwrap();
        eventually(&format!("{model} {env} gone"), 2 * SEC, || {
            (!pids.iter().any(|p| alive(*p))).then_some(())
        });
    }
}

#[test]
fn sigkill_of_the_supervisor_takes_the_command_along() {
    let swapd = Swapd::start(&TWO.replace("JOURNAL", "JOURNAL, FAKE_IGNORE_TERM=1"));
    let pid: u32 = swapd.chat("two", "").json()["pid"]
        .as_u64()
        .unwrap()
        .try_into()
        .unwrap();
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let supervisor = stat
        .rsplit(')')
        .next()
        .unwrap()
        .split_whitespace()
        .nth(1)
        .unwrap()
        .parse()
        .unwrap();
    signal(supervisor, Signal::SIGKILL);
    eventually("command gone", 2 * SEC, || (!alive(pid)).then_some(()));
    assert_eq!(swapd.chat("two", "").status, 200);
}

#[test]
fn sigkill_of_the_worker_breaks_the_stream_and_the_next_request_works() {
    let swapd = Swapd::start(TWO);
    for model in ["one", "two"] {
        let broken = swapd.chat(
            model,
            r#""stream":true,"events":10,"gap_ms":5,"die_after":4,"last_words":"no tensor left""#,
        );
        assert_eq!(broken.status, 200);
        assert!(
            broken.body.contains("closed") && broken.body.contains("no tensor left"),
            "cause and last lines: {broken:?}"
        );
        assert!(!broken.complete, "looks like a clean end: {broken:?}");
        assert!(
            broken.body.contains("\"n\":4") && broken.body.contains("\"code\":\"upstream_died\""),
            "{broken:?}"
        );
        let next = swapd.chat(model, "");
        assert_eq!(next.status, 200, "{next:?}");
    }
}

/// Where the end of the connection is the end of the reply, only the death of the process tells a broken one.
#[test]
fn a_reply_ended_by_closing_is_told_from_one_that_died() {
    let swapd = Swapd::start("models: {m: {cmd: 'FAKESERVER --port ${PORT}', env: [FAKE_HTTP10=1]}}");
    let whole = swapd.chat("m", r#""stream":true,"events":10"#);
    assert!(whole.complete && whole.body.ends_with("data: 9\n\n"), "{whole:?}");
    let broken = swapd.chat("m", r#""stream":true,"events":10,"die_after":5"#);
    assert!(
        !broken.complete && broken.body.contains("upstream_died"),
        "{broken:?}"
    );
    assert!(swapd.chat("m", r#""stream":true,"events":3"#).complete);
}

#[test]
fn death_before_the_reply_is_502_with_the_last_lines() {
    let swapd = Swapd::start("models: {m: {worker: {model: DIR, env: [FAKE_CHATTER=30]}}}");
    let answer = swapd.chat("m", r#""die":true"#);
    assert_eq!(answer.status, 502);
    let (message, code) = answer.error();
    assert_eq!(
        (code.as_str(), answer.header("retry-after")),
        ("upstream_error", Some("1"))
    );
    assert!(
        message.contains("chatter 29") && !message.contains("chatter 3\n"),
        "{message}"
    );
    assert_eq!(swapd.chat("m", "").status, 200);
}

#[test]
fn a_failed_start_is_502_with_the_last_lines_for_all_who_wait() {
    let config = "
models:
  native: {worker: {model: DIR, env: [FAKE_START_MS=200, 'FAKE_FAIL=no such tensor']}}
  foreign: {cmd: 'FAKESERVER --port ${PORT}', env: [FAKE_START_MS=200, 'FAKE_FAIL=no such tensor']}
  absent: {cmd: 'DIR/nothing --port ${PORT}'}
";
    let swapd = Swapd::start(config);
    for model in ["native", "foreign"] {
        std::thread::scope(|scope| {
            let asked: Vec<_> = (0..3).map(|_| scope.spawn(|| swapd.chat(model, ""))).collect();
            for answer in asked.into_iter().map(|t| t.join().unwrap()) {
                assert_eq!(answer.status, 502, "{answer:?}");
                let (message, code) = answer.error();
                assert!(
                    message.contains("exit code 3") && message.contains("no such tensor"),
                    "{message}"
                );
                assert_eq!(code, "model_start_failed");
            }
        });
        assert_eq!(swapd.state(model), "backoff");
    }
    let (message, _) = swapd.chat("absent", "").error();
    assert!(message.contains("nothing'"), "{message}");
}

/// After 15 s a client that waits for events gets the head of its reply; one that waits for sound never does.
#[test]
fn only_streams_of_events_begin_before_the_reply_is_there() {
    let swapd = Swapd::start("models: {m: {worker: {model: DIR}}}");
    let late = common::chat_body("m", r#""stream":true,"plain":true,"delay_ms":15300"#);
    std::thread::scope(|scope| {
        let (swapd, late) = (&swapd, &late);
        let ask = |path| scope.spawn(move || swapd.post(path, late));
        let speech = ["/v1/audio/speech", "/upstream/m/v1/audio/speech"].map(ask);
        let events = ["/v1/completions", "/v1/messages"].map(ask);
        for answer in speech.map(|t| t.join().unwrap()) {
            assert_eq!(
                answer.json()["object"],
                "chat.completion",
                "as it was: {answer:?}"
            );
            assert_ne!(answer.header("content-type"), Some("text/event-stream"));
        }
        let [text, message] = events.map(|t| t.join().unwrap());
        for answer in [&text, &message] {
            assert_eq!(answer.header("content-type"), Some("text/event-stream"));
            let data = answer.body.strip_prefix(": keep-alive\n\ndata: ").unwrap();
            let object = data.split("\n\n").next().unwrap();
            assert!(answer.complete, "a good reply is no error: {answer:?}");
            assert_eq!(
                serde_json::from_str::<serde_json::Value>(object).unwrap()["object"],
                "chat.completion"
            );
        }
        assert!(text.body.ends_with("\n\ndata: [DONE]\n\n"), "{text:?}");
    });
}

#[test]
fn a_start_that_takes_too_long_is_killed() {
    // 15 s is the least that the registry allows.
    let config =
        "healthCheckTimeout: 15\nmodels: {m: {worker: {model: DIR, env: [JOURNAL, FAKE_START_MS=60000]}}}";
    let swapd = Swapd::start(config);
    let begun = Instant::now();
    let answer = swapd.chat("m", "");
    assert_eq!(answer.status, 502);
    assert!(answer.error().0.contains("not ready within 15 s"), "{answer:?}");
    assert!((Duration::from_secs(14)..Duration::from_secs(17)).contains(&begun.elapsed()));
    let pid = swapd.journalled("start")[0].1;
    eventually("killed", SEC, || (!alive(pid)).then_some(()));
}

#[test]
fn a_client_that_leaves_is_noticed_within_50_ms() {
    let swapd = Swapd::start(TWO);
    for model in ["one", "two"] {
        swapd.chat(model, "");
        // In the middle of a slow stream, and before the first byte of an answer.
        let mut streaming = swapd.chat_open(model, r#""stream":true,"events":100,"gap_ms":10000"#);
        streaming.chunk().unwrap();
        let seen = swapd.journalled("disconnect").len();
        let left = now();
        drop(streaming);
        let noticed = eventually("disconnect", SEC, || {
            swapd.journalled("disconnect").get(seen).copied()
        });
        assert!(noticed.0 <= left + 50, "noticed after {} ms", noticed.0 - left);
        let late = swapd.journalled("late").len();
        let mut waiting = std::net::TcpStream::connect(&swapd.address).unwrap();
        let body = common::chat_body(model, r#""delay_ms":10000"#);
        let head = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        std::io::Write::write_all(&mut waiting, format!("{head}{body}").as_bytes()).unwrap();
        eventually("arrived", SEC, || {
            (swapd.journalled("late").len() > late).then_some(())
        });
        let left = now();
        drop(waiting);
        let noticed = eventually("disconnect", SEC, || {
            swapd.journalled("disconnect").get(seen + 1).copied()
        });
        assert!(noticed.0 <= left + 50, "noticed after {} ms", noticed.0 - left);
    }
}

fn now() -> u128 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_millis()
}

#[test]
fn unload_waits_for_the_end_and_load_for_ready() {
    let swapd = Swapd::start(TWO);
    assert_eq!(swapd.post("/api/models/load/two", "").json()["state"], "ready");
    assert_eq!(swapd.state("two"), "ready");
    let pid = swapd.journalled("ready")[0].1;
    assert_eq!(swapd.post("/api/models/unload/two", "").body, "OK");
    assert!(!alive(pid) && swapd.state("two") == "stopped");
    swapd.chat("one", "");
    assert_eq!(swapd.get("/unload").body, "OK");
    assert!(swapd.running().is_empty());
    assert_eq!(swapd.post("/api/models/unload", "").json()["msg"], "ok");
    assert_eq!(swapd.post("/api/models/load/three", "").status, 404);
}

#[test]
fn a_port_held_by_a_stranger_is_an_error_and_not_a_model() {
    let stranger = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = stranger.local_addr().unwrap().port();
    let config = format!("startPort: {port}\nmodels: {{m: {{cmd: 'FAKESERVER --port ${{PORT}}'}}}}");
    let (message, _) = Swapd::start(&config).chat("m", "").error();
    assert!(message.contains(&format!("port {port} is not free")), "{message}");
}

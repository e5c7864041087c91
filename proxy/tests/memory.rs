//! Want of memory, on the real program: what it reads comes from a file of the test's.
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

const SOON: Duration = Duration::from_secs(5);

fn config(more: &str) -> String {
    format!(
        "memory: {{readings: DIR/memory.json, every: 100ms, warningHold: 300ms, evictGap: 100ms, recover: 200ms, {more}}}
models:
  a: {{worker: {{model: DIR}}, env: [JOURNAL], unloadTimeout: 1}}
  b: {{worker: {{model: DIR}}, env: [JOURNAL]}}
groups: {{both: {{swap: false, members: [a, b]}}}}
"
    )
}

/// What swapd is to read from now on; seen to have been read.
fn read(swapd: &Swapd, level: &str) {
    let text = format!(
        r#"{{"level": "{level}", "available_bytes": 1200000000, "total_bytes": 16000000000, "swap_used_bytes": 3400000000}}"#
    );
    let new = swapd.dir.path().join("memory.new");
    std::fs::write(&new, text).unwrap();
    std::fs::rename(new, swapd.dir.path().join("memory.json")).unwrap();
    eventually("the reading", SOON, || {
        (memory(swapd)["level"] == level).then_some(())
    });
}

fn memory(swapd: &Swapd) -> serde_json::Value {
    swapd.get("/running").json()["memory"].clone()
}

#[test]
fn a_warning_unloads_what_is_idle_and_nothing_else() {
    let swapd = Swapd::start(&config("maxWait: 1s"));
    let mut busy = swapd.chat_open("a", r#""stream":true,"events":100000,"gap_ms":20"#);
    assert!(busy.chunk().unwrap().is_some());
    assert_eq!(swapd.chat("b", "").status, 200);
    read(&swapd, "warning");
    eventually("b is unloaded", SOON, || {
        (swapd.state("b") == "stopped").then_some(())
    });
    assert_eq!(memory(&swapd)["evictions"], 1);
    let log = swapd.get("/logs").body;
    assert!(
        log.contains("unloaded for want of memory: 1.2 GB of 16.0 GB available, 3.4 GB of swap used"),
        "{log}"
    );
    // Starts are not forbidden by a warning; and requests in flight go on.
    assert_eq!(swapd.chat("b", "").status, 200);
    assert!(busy.chunk().unwrap().is_some());
    assert_eq!(swapd.state("a"), "ready");
    assert!(
        swapd
            .get("/metrics")
            .body
            .contains("swapd_memory_evictions_total ")
    );
}

#[test]
fn nothing_starts_while_memory_is_critical() {
    let swapd = Swapd::start(&config("maxWait: 1s, cutAfter: 0"));
    let mut busy = swapd.chat_open("a", r#""stream":true,"events":100000,"gap_ms":20"#);
    assert!(busy.chunk().unwrap().is_some());
    read(&swapd, "critical");
    let begun = Instant::now();
    let refused = swapd.chat("b", "");
    assert!(begun.elapsed() >= Duration::from_millis(900), "it may get better");
    assert_eq!((refused.status, refused.header("retry-after")), (503, Some("1")));
    let (message, code) = refused.error();
    assert_eq!(code, "memory_critical");
    assert!(message.contains("1.2 GB of 16.0 GB available"), "{message}");
    // What is ready serves on, and is not touched while it does.
    assert_eq!(swapd.chat("a", "").status, 200);
    assert!(busy.chunk().unwrap().is_some());
    assert_eq!(swapd.journalled("start").len(), 1);
    // One that waits is served when it gets better in time.
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| swapd.chat("b", ""));
        eventually("it waits", SOON, || {
            swapd
                .get("/metrics")
                .body
                .contains("swapd_waiting_requests{model=\"b\"} 1")
                .then_some(())
        });
        read(&swapd, "normal");
        assert_eq!(waiting.join().unwrap().status, 200);
    });
    drop(busy);
    eventually("a is idle", SOON, || {
        swapd
            .running()
            .iter()
            .any(|r| r["model"] == "a" && r["inflight"] == 0)
            .then_some(())
    });
    read(&swapd, "critical");
    eventually("both are unloaded", SOON, || {
        (swapd.state("a") == "stopped" && swapd.state("b") == "stopped").then_some(())
    });
}

#[test]
fn long_critical_memory_ends_even_what_is_busy_with_a_reason() {
    let swapd = Swapd::start(&config("cutAfter: 500ms"));
    let mut busy = swapd.chat_open("a", r#""stream":true,"events":100000,"gap_ms":20"#);
    assert!(busy.chunk().unwrap().is_some());
    read(&swapd, "critical");
    let answer = busy.finish();
    assert!(
        !answer.complete && answer.body.contains("memory_critical"),
        "{}",
        answer.body
    );
    eventually("it is gone", SOON, || {
        (swapd.state("a") == "stopped").then_some(())
    });
}

#[test]
fn switched_off_it_does_nothing() {
    let swapd = Swapd::start(&config("disabled: true"));
    assert_eq!(swapd.chat("a", "").status, 200);
    std::fs::write(swapd.dir.path().join("memory.json"), r#"{"level": "critical"}"#).unwrap();
    assert_eq!(swapd.chat("b", "").status, 200);
    assert_eq!(memory(&swapd)["level"], "normal");
    assert_eq!(swapd.state("a"), "ready");
}

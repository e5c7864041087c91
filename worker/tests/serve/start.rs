//! Hand-shake, heartbeat, progress, and what is there before the first request.

use std::time::Duration;

use api_types::control::{ProxyCommand, WorkerEvent};
use serde_json::{Value, json};

use super::support::*;

#[test]
fn a_proxy_gets_ready_heartbeats_and_answers() {
    let mut worker = Worker::supervised(&demo(), &["--served-model-name", "tiny", "--max-num-seqs", "2"]);
    let (port, ready) = worker.ready();
    assert_eq!(ready["model"], "tiny");
    assert_eq!(ready["limits"]["max_running"], 2);
    assert!(ready["limits"]["load_seconds"].as_f64().unwrap() > 0.0, "{ready}");
    assert!(
        ready["limits"]["load_resident_bytes"].as_u64().unwrap() > 10 << 20,
        "{ready}"
    );
    let (status, text) = ask(port, "/v1/chat/completions", &chat(8));
    assert_eq!(status, 200, "{text}");
    assert!(text.contains("data: [DONE]"), "{text}");
    // The first ones may have been sent before the request was worked on.
    let mut beats = Vec::new();
    while beats
        .last()
        .is_none_or(|beat: &api_types::control::Heartbeat| beat.steps < 8)
    {
        assert!(beats.len() < 30, "{beats:?}");
        if let WorkerEvent::Heartbeat(beat) = worker.event().unwrap() {
            beats.push(beat);
        }
    }
    assert!(beats.last().unwrap().active_bytes > 0, "{beats:?}");
    assert!(beats.last().unwrap().footprint_bytes > 0, "{beats:?}");
    worker.command(ProxyCommand::Stop);
    assert_eq!(worker.ended_within(Duration::from_secs(10)).code(), Some(0));
}

/// However weights come into memory, the replies are the same.
#[test]
fn weights_can_be_read_instead_of_mapped() {
    let replies = ["mmap", "read"].map(|how| {
        let mut worker = Worker::supervised(&demo(), &["--weights", how]);
        let (port, ready) = worker.ready();
        let copied = ready["limits"]["weights_copied_bytes"].as_u64().unwrap();
        assert!(how == "mmap" || copied > 1 << 20, "{ready}");
        let between =
            |(phase, done, total): &&(String, u64, u64)| phase == "weights" && *done > 0 && done < total;
        let heard = worker.progress.iter().filter(between).count();
        assert!(heard > 5, "while the files are read: {:?}", worker.progress);
        let mut body = chat(16);
        body["stream"] = false.into();
        let (status, text) = ask(port, "/v1/chat/completions", &body);
        assert_eq!(status, 200, "{text}");
        let (_, json) = text.split_once("\r\n\r\n").unwrap();
        serde_json::from_str::<Value>(json).unwrap()["choices"][0]["message"]["content"].clone()
    });
    assert_eq!(replies[0], replies[1]);
}

/// What is computed at start is cached for the first request.
#[test]
fn warm_prompts_are_known_to_the_prefix_cache() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("prompts.json");
    let system = json!({"role": "system", "content": "You are told many things. ".repeat(30)});
    std::fs::write(
        &file,
        json!([[system, {"role": "user", "content": "Hi"}]]).to_string(),
    )
    .unwrap();
    let mut worker = Worker::supervised(&demo(), &["--warm-prompts", file.to_str().unwrap()]);
    let (port, _) = worker.ready();
    // A proxy gives up who is silent for long: every phase of a start is heard of.
    for phase in ["weights", "warm-up", "warm-prompts"] {
        let of = |at: fn(u64, u64) -> bool| {
            let mut all = worker.progress.iter();
            all.any(|(name, done, total)| name == phase && at(*done, *total))
        };
        assert!(
            of(|done, _| done == 0) && of(|done, total| done == total),
            "{phase}"
        );
    }
    let mut body = chat(1);
    body["stream"] = false.into();
    body["messages"] = json!([system, {"role": "user", "content": "Another question"}]);
    let (status, text) = ask(port, "/v1/chat/completions", &body);
    assert_eq!(status, 200, "{text}");
    let (_, json) = text.split_once("\r\n\r\n").unwrap();
    let usage = serde_json::from_str::<Value>(json).unwrap()["usage"].clone();
    let (prompt, cached) = (
        &usage["prompt_tokens"],
        &usage["prompt_tokens_details"]["cached_tokens"],
    );
    assert!(cached.as_u64().unwrap() * 2 > prompt.as_u64().unwrap(), "{usage}");
    let (code, message) = start_broken(&["--warm-prompts", "/no/such/file.json"], |_| {});
    assert!(
        code == Some(1) && message.contains("--warm-prompts /no/such/file.json"),
        "{message}"
    );
}

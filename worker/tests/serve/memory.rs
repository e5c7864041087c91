//! The plan, the KV cache, and what has no room.

use serde_json::{Value, json};

use super::support::*;

/// The last resort for long contexts, as a user gets it: more tokens in the same reservation, and `/status` says why.
#[test]
fn a_quantised_kv_cache_answers_and_is_reported() {
    let reservation = ["--cache-memory-mb", "16"];
    let capacity = |flags: &[&str]| {
        let mut worker = Worker::supervised(&demo(), &[&reservation, flags].concat());
        let (port, ready) = worker.ready();
        let (status, text) = ask(port, "/v1/chat/completions", &chat(24));
        assert_eq!(status, 200, "{text}");
        assert!(text.contains("data: [DONE]"), "{text}");
        let (status, text) = ask(port, "/status", &Value::Null);
        assert_eq!(status, 200, "{text}");
        let (_, json) = text.split_once("\r\n\r\n").unwrap();
        let limits = serde_json::from_str::<Value>(json).unwrap()["limits"]["engine"].clone();
        assert_eq!(limits["kv_tokens"], ready["limits"]["kv_tokens"]);
        limits
    };
    let plain = capacity(&[]);
    assert!(plain["kv_bits"].is_null(), "{plain}");
    let limits = capacity(&["--kv-cache-quantization"]);
    assert_eq!(
        (&limits["kv_bits"], &limits["kv_group_size"]),
        (&json!(8), &json!(64)),
        "{limits}"
    );
    let reason = limits["decoding"]["reason"].as_str().unwrap();
    assert!(reason.contains("not quantised"), "{limits}");
    // A head of 64 float32 values: 256 bytes before, 64 and one scale and bias now.
    let tokens = |limits: &Value| limits["kv_tokens"].as_u64().unwrap();
    let expected = tokens(&plain) * 256 / 72;
    assert!(
        tokens(&limits).abs_diff(expected) <= 32,
        "{} of {expected}",
        tokens(&limits)
    );
}

/// What cannot fit is refused before the weights are loaded, and the message can be checked by hand.
#[test]
fn a_cache_larger_than_the_machine_is_refused_with_the_arithmetic() {
    let (code, message) = start_broken(
        &["--cache-memory-mb", "1048576", "--context-length", "4096"],
        |_| {},
    );
    assert_eq!(code, Some(1), "{message}");
    for part in [
        "does not fit into memory",
        "weights",
        "KV cache 1048576",
        "largest step",
        "(estimated)",
        "kept buffers",
        "head-room",
        "--gpu-memory-utilization 0.5 of the",
        "MiB are missing",
    ] {
        assert!(message.contains(part), "{part:?} is not in {message:?}");
    }
}

/// The plan in force and what the process really takes are both to be seen, and agree.
#[test]
fn the_plan_and_the_process_are_shown() {
    let mut worker = Worker::supervised(&demo(), &["--cache-memory-mb", "64"]);
    let (port, ready) = worker.ready();
    let limits = &ready["limits"];
    let number = |name: &str| {
        limits[name]
            .as_u64()
            .unwrap_or_else(|| panic!("{name}: {limits}"))
    };
    // On the CPU the warm-up leaves out the longest context, for which the estimate stands.
    let from = if limits["memory_device"] == "cpu" {
        "estimated"
    } else {
        "measured"
    };
    assert_eq!(limits["step_bytes_from"], from, "{limits}");
    assert!(
        number("kv_bytes") <= 64 << 20 && number("step_bytes") > 0,
        "{limits}"
    );
    assert!(
        number("memory_planned_bytes") <= number("memory_ceiling_bytes"),
        "{limits}"
    );
    assert_eq!(ask(port, "/v1/chat/completions", &chat(8)).0, 200);
    let (status, text) = ask(port, "/status", &Value::Null);
    assert_eq!(status, 200, "{text}");
    let (_, json) = text.split_once("\r\n\r\n").unwrap();
    let process = serde_json::from_str::<Value>(json).unwrap()["memory"]["process"].clone();
    assert_eq!(process["planned_bytes"], number("memory_planned_bytes"));
    assert!(
        process["drift_bytes"].as_i64().unwrap() < 0,
        "the demo model stays within its plan: {process}"
    );
    assert_eq!(process["looks_over_plan"], 0);
}

/// A KV cache smaller than the context: replies are clamped aloud, prompts refused with the numbers, and the models' list
/// promises no more.
#[test]
fn what_the_cache_has_no_room_for_is_said() {
    let mut worker = Worker::supervised(&demo(), &["--max-cache-blocks", "4", "--block-size", "32"]);
    let (port, _) = worker.ready();
    let (status, text) = ask(port, "/v1/models", &Value::Null);
    assert!(status == 200 && text.contains("\"max_model_len\":128"), "{text}");
    let mut body = chat(1000);
    body["stream"] = false.into();
    let (status, text) = ask(port, "/v1/chat/completions", &body);
    assert_eq!(status, 200, "{text}");
    let header = "x-max-tokens-clamped: asked=1000, allowed=";
    assert!(text.to_ascii_lowercase().contains(header), "{text}");
    body["messages"] = json!([{"role": "user", "content": "word ".repeat(300)}]);
    let (status, text) = ask(port, "/v1/chat/completions", &body);
    assert_eq!(status, 400, "{text}");
    for part in ["never_fits", "holds 128 tokens", "--cache-memory-mb"] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
}

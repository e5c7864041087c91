//! Models, health, status, metrics.

use std::time::Duration;

use mlxworker::backend::scripted::{Act, ScriptedBackend};
use mlxworker::backend::{CacheStats, EngineStats};
use serde_json::json;

use super::support::*;

#[tokio::test]
async fn models() {
    let server = start_with(|c| c.served_model = "org/name".into(), |_| stop(vec![])).await;
    let list = server.get("/v1/models").await.json();
    assert_eq!(list["object"], "list");
    let card = &list["data"][0];
    assert_eq!(
        (card["id"].as_str(), card["object"].as_str()),
        (Some("org/name"), Some("model"))
    );
    assert_eq!(card["max_model_len"], CONTEXT);
    assert_eq!(&server.get("/v1/models/org/name").await.json(), card);
    assert_eq!(&server.get("/v1/models/org%2Fname").await.json(), card);
    assert_eq!(server.get("/v1/models/other").await.status, 404);
}

#[tokio::test]
async fn health_means_that_the_engine_steps() {
    let server = start(|_| stop(vec![])).await;
    let age = |seconds, running| EngineStats {
        last_step_age: Duration::from_secs(seconds),
        running,
        ..EngineStats::default()
    };
    for (stats, status) in [
        (age(0, 0), 200),
        (age(10_000, 0), 200),
        (age(59, 1), 200),
        (age(61, 1), 503),
        // A step that nobody waits for any more.
        (
            EngineStats {
                busy: true,
                ..age(61, 0)
            },
            503,
        ),
    ] {
        server.backend.set_stats(stats);
        let reply = server.get("/health").await;
        assert_eq!(reply.status, status, "{}", reply.text());
    }
    let reply = server.get("/health").await;
    assert_eq!(reply.json()["error"]["code"], "engine_stalled");
    assert!(
        reply.text().contains("has not stepped for 61 s"),
        "{}",
        reply.text()
    );
}

#[tokio::test]
async fn status_tells_limits_and_numbers() {
    let server = start(|_| stop(vec![])).await;
    server.backend.set_stats(EngineStats {
        steps: 17,
        active_bytes: 5,
        kv_used_bytes: 6,
        kv_cached_bytes: 7,
        reference_decodes: 4,
        cache: CacheStats {
            requests: 5,
            hits: 1,
            prompt_tokens: 40,
            cached_tokens: 10,
            ..CacheStats::default()
        },
        ..EngineStats::default()
    });
    let json = server.get("/status").await.json();
    assert_eq!(json["limits"]["context_length"], CONTEXT);
    assert_eq!(json["limits"]["max_request_tokens"], 200);
    assert_eq!(json["limits"]["stall_limit_seconds"], 60.0);
    assert_eq!(json["chat"]["reasoning_parser"], "auto");
    assert_eq!(json["engine"]["steps"], 17);
    assert_eq!(json["engine"]["decode_steps"]["reference"], 4);
    assert_eq!(json["prefix_cache"]["hits"], 1);
    assert_eq!(json["prefix_cache"]["hit_rate"], 0.25);
    assert_eq!(json["prefix_cache"]["request_hit_rate"], 0.2);
    assert_eq!(json["memory"]["active_bytes"], 5);
    assert_eq!(json["memory"]["kv_used_bytes"], 6);
    assert_eq!(json["memory"]["kv_cached_bytes"], 7);
    let metrics = server.get("/metrics").await.text();
    for line in ["mlxworker_kv_used_bytes 6\n", "mlxworker_kv_cached_bytes 7\n"] {
        assert!(metrics.contains(line), "{metrics}");
    }
    assert_eq!(json["chat"]["tool_call_parser"], "hermes");
    assert_eq!(server.get("/v1/status").await.json()["model"], MODEL);
}

/// Looks are one a second, however often somebody asks.
#[tokio::test]
async fn who_asks_for_the_footprint_does_not_look_at_it() {
    let limits = json!({"memory_planned_bytes": 1});
    let backend = ScriptedBackend::new(CONTEXT, VOCABULARY, |_| stop(vec![]))
        .with_limits(limits.as_object().unwrap().clone());
    let server = start_on(backend, |_| {}).await;
    for _ in 0..3 {
        let process = server.get("/status").await.json()["memory"]["process"].clone();
        assert_eq!(process["looks_over_plan"], 1, "the one at the start: {process}");
        assert!(process["footprint_bytes"].as_u64() > Some(1 << 20), "{process}");
        let text = server.get("/metrics").await.text();
        assert!(text.contains("mlxworker_looks_over_plan_total 1\n"), "{text}");
    }
}

#[tokio::test]
async fn without_a_watchdog_no_step_is_too_long() {
    let server = start_with(|c| c.stall_limit = None, |_| stop(vec![])).await;
    server.backend.set_stats(EngineStats {
        last_step_age: Duration::from_secs(100_000),
        running: 1,
        ..EngineStats::default()
    });
    assert_eq!(server.get("/health").await.status, 200);
}

#[tokio::test]
async fn metrics_count_requests_and_tokens() {
    let server = start(|_| {
        let mut script = vec![Act::Start(2)];
        script.extend(say("one two"));
        stop(script)
    })
    .await;
    server.chat(json!({})).await;
    server.chat_stream(json!({})).await;
    server.post("/v1/completions", &json!({"prompt": "a"})).await;
    let text = server.get("/metrics").await.text();
    let prompts: usize = server
        .backend
        .requests()
        .iter()
        .map(|request| request.prompt.len())
        .sum();
    let replies = 3 * (say("one two").len() + 1);
    for line in [
        "mlxworker_requests_total{route=\"chat\",outcome=\"ok\"} 2".to_owned(),
        "mlxworker_requests_total{route=\"completions\",outcome=\"ok\"} 1".to_owned(),
        format!("mlxworker_prompt_tokens_total {prompts}"),
        "mlxworker_cached_prompt_tokens_total 6".to_owned(),
        format!("mlxworker_completion_tokens_total {replies}"),
        "mlxworker_time_to_first_token_seconds_count 3".to_owned(),
        "mlxworker_requests_in_flight 0".to_owned(),
    ] {
        assert!(text.lines().any(|l| l == line), "{line} is missing in\n{text}");
    }
    let off = start_with(|c| c.metrics = false, |_| stop(vec![])).await;
    assert_eq!(off.get("/metrics").await.status, 404);
}

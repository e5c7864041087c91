//! The HTTP layer with the real engine behind it.

use std::time::{Duration, Instant};

use mlxworker::engine::{Engine, EngineConfig};
use serde_json::json;

use super::support::*;

async fn start(configure: impl FnOnce(&mut EngineConfig)) -> Server<Engine> {
    let mut config = EngineConfig::new(model_folder());
    configure(&mut config);
    let engine = Engine::start(config, |_| {}).await.unwrap();
    start_on(engine, |http| http.max_request_tokens = 1000).await
}

/// One place, and a wait of a fraction of what the choices before the last one take: the client gets all of them.
#[tokio::test]
async fn the_last_choice_may_wait_longer_than_a_request_may() {
    let max_wait = Duration::from_millis(200);
    let server = start(|config| {
        config.max_running = 1;
        config.max_wait = Some(max_wait);
    })
    .await;
    let started = Instant::now();
    let reply = server
        .chat(json!({"n": 6, "max_tokens": 100, "ignore_eos": true}))
        .await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    assert!(started.elapsed() > 2 * max_wait, "the last one has not waited");
    assert_eq!(reply.json()["usage"]["completion_tokens"], 6 * 100);

    let prompts = ["a", "b", "c"];
    let body = json!({"prompt": prompts, "n": 2, "max_tokens": 100, "ignore_eos": true});
    let reply = server.post("/v1/completions", &body).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    assert_eq!(
        reply.json()["choices"].as_array().unwrap().len(),
        2 * prompts.len()
    );
}

/// The model would name the city that it was asked about: a forced call names one that the tool knows.
#[tokio::test]
async fn the_arguments_of_a_forced_call_are_of_the_tools_schema() {
    let server = start(|_| {}).await;
    let parameters = json!({"type": "object", "required": ["city", "days"], "additionalProperties": false, "properties": {
        "city": {"enum": ["Lima", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}}});
    let tools = json!([{"type": "function", "function": {"name": "get_weather", "parameters": parameters}}]);
    let messages = json!([{"role": "user", "content": "What is the weather in Paris?"}]);
    for choice in [
        json!("required"),
        json!({"type": "function", "function": {"name": "get_weather"}}),
    ] {
        for seed in 0..5 {
            let reply = server
                .chat(json!({"tools": tools, "tool_choice": choice, "messages": messages, "parallel_tool_calls": false,
                    "temperature": f64::from(seed) / 4.0, "seed": seed}))
                .await;
            let json = reply.json();
            let calls = json["choices"][0]["message"]["tool_calls"].as_array();
            let calls = calls.unwrap_or_else(|| panic!("{seed}: {json}"));
            assert_eq!(
                (calls.len(), &json["choices"][0]["finish_reason"]),
                (1, &json!("tool_calls")),
                "{json}"
            );
            let arguments = calls[0]["function"]["arguments"].as_str().unwrap();
            let arguments: serde_json::Value = serde_json::from_str(arguments).unwrap();
            assert!(
                ["Lima", "Oslo"].contains(&arguments["city"].as_str().unwrap()),
                "{json}"
            );
            assert!((1..=9).contains(&arguments["days"].as_u64().unwrap()), "{json}");
        }
    }
}

//! Server-sent events: order, pieces, silence, and what happens when it breaks.

use std::time::Duration;

use mlxworker::backend::scripted::{Act, Ending};
use mlxworker::backend::{EngineError, EngineState};
use serde_json::{Value, json};

use super::support::*;

#[tokio::test]
async fn role_then_text_then_reason_then_usage() {
    let server = start(|_| {
        let mut script = vec![Act::Start(2)];
        script.extend(spell("Grüße, 🦀!"));
        stop(script)
    })
    .await;
    let stream = server
        .chat_stream(json!({"stream_options": {"include_usage": true}}))
        .await;
    let chunks = stream.chunks();
    assert_eq!(chunks[0]["object"], "chat.completion.chunk");
    assert_eq!(
        chunks[0]["choices"][0]["delta"],
        json!({"role": "assistant", "content": ""})
    );
    assert_eq!(stream.joined(0, "content"), "Grüße, 🦀!");
    assert!(!stream.raw.contains('\u{fffd}'));
    assert_eq!(
        stream
            .deltas(0)
            .iter()
            .filter(|delta| delta.get("role").is_some())
            .count(),
        1
    );
    assert_eq!(stream.finish_reason(0), "stop");
    assert_eq!(stream.deltas(0).last().unwrap(), &json!({}));
    let usage = &chunks.last().unwrap()["usage"];
    assert_eq!(usage["completion_tokens"], spell("Grüße, 🦀!").len() + 1);
    assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], 2);
}

/// The stop string itself is never sent, however the tokens cut it, and generation ends with it.
#[tokio::test]
async fn a_stop_string_ends_a_stream_and_is_not_in_it() {
    let server = start(|_| {
        let mut script = spell("one two three");
        script.push(Act::Hang);
        Ok(script)
    })
    .await;
    for stop in [json!("o th"), json!(["never", "o th"])] {
        let stream = server.chat_stream(json!({"stop": stop})).await;
        assert_eq!(stream.joined(0, "content"), "one tw");
        assert_eq!(stream.finish_reason(0), "stop");
    }
    let endings = server.backend.endings(2).await;
    assert!(
        endings
            .iter()
            .all(|(_, ending)| matches!(ending, Ending::Cancelled(_))),
        "{endings:?}"
    );
}

#[tokio::test]
async fn reasoning_and_tool_calls_come_in_pieces() {
    let call = "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Rome\", \"days\": 3}}\n</tool_call>";
    let text = format!("<think>\nRome it is.\n</think>\n\n{call}\n{call}");
    let server = start(move |_| stop(spell(&text))).await;
    let tools = json!([{"type": "function", "function": {"name": "weather", "parameters": {"type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}}}]);
    let stream = server.chat_stream(json!({"tools": tools})).await;
    assert_eq!(stream.joined(0, "reasoning_content").trim(), "Rome it is.");
    assert_eq!(stream.joined(0, "content").trim(), "");
    assert_eq!(stream.finish_reason(0), "tool_calls");
    let pieces: Vec<Value> = stream
        .deltas(0)
        .iter()
        .filter_map(|delta| delta.get("tool_calls").cloned())
        .flat_map(|calls| calls.as_array().unwrap().clone())
        .collect();
    let mut ids = Vec::new();
    for index in 0..2 {
        let mine: Vec<&Value> = pieces.iter().filter(|piece| piece["index"] == index).collect();
        assert_eq!(mine[0]["type"], "function");
        assert_eq!(mine[0]["function"], json!({"name": "weather", "arguments": ""}));
        ids.push(mine[0]["id"].as_str().unwrap().to_owned());
        assert!(mine.len() > 3, "the arguments come in pieces: {mine:?}");
        assert!(mine[1..].iter().all(|piece| piece.get("id").is_none()));
        let arguments: String = mine
            .iter()
            .map(|piece| piece["function"]["arguments"].as_str().unwrap())
            .collect();
        assert_eq!(
            serde_json::from_str::<Value>(&arguments).unwrap(),
            json!({"city": "Rome", "days": 3})
        );
    }
    assert_ne!(ids[0], ids[1]);
}

#[tokio::test]
async fn a_token_is_sent_when_it_is_known() {
    let server = start(|_| {
        let mut script = say("first");
        script.push(Act::Hang);
        Ok(script)
    })
    .await;
    let mut open = server
        .open("/v1/chat/completions", &with_message(json!({"stream": true})))
        .await;
    let mut text = String::new();
    let read = async {
        while text != "first" {
            for event in open.next().await.unwrap().unwrap() {
                let chunk: Value = serde_json::from_str(&event.data).unwrap();
                text.push_str(chunk["choices"][0]["delta"]["content"].as_str().unwrap());
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(10), read)
        .await
        .expect("nothing is held back");
}

#[tokio::test]
async fn choices_are_interleaved_and_complete() {
    let server = start(|request| {
        let word = if request.sampling.seed == Some(1) {
            "slow"
        } else {
            "fast"
        };
        let pause = if word == "slow" { 7 } else { 2 };
        let mut script = Vec::new();
        for token in spell(&word.repeat(5)) {
            script.extend([token, wait(pause)]);
        }
        stop(script)
    })
    .await;
    let stream = server.chat_stream(json!({"n": 2, "seed": 1})).await;
    assert_eq!(stream.joined(0, "content"), "slow".repeat(5));
    assert_eq!(stream.joined(1, "content"), "fast".repeat(5));
    assert_eq!(
        (stream.finish_reason(0), stream.finish_reason(1)),
        ("stop".into(), "stop".into())
    );
}

#[tokio::test(start_paused = true)]
async fn silence_is_filled_with_comments() {
    let server = start(|_| {
        let mut script = vec![wait(12_000)];
        script.extend(say("a"));
        script.push(wait(6_000));
        script.extend(say("b"));
        stop(script)
    })
    .await;
    let stream = server.chat_stream(json!({})).await;
    assert_eq!(stream.joined(0, "content"), "ab");
    let comments = stream.raw.matches(": keep-alive\n\n").count();
    assert_eq!(comments, 3, "after 5, 10 and 17 seconds: {}", stream.raw);
    let first = stream.raw.find("\"content\":\"a\"").unwrap();
    assert_eq!(stream.raw[..first].matches(": keep-alive").count(), 2);
}

#[tokio::test]
async fn a_failure_before_the_first_token_has_a_status() {
    let server = start(|_| {
        Ok(vec![
            Act::Start(0),
            Act::Fail(EngineError::Step("out of memory".into())),
        ])
    })
    .await;
    for stream in [true, false] {
        let reply = server.chat(json!({"stream": stream})).await;
        assert_eq!(reply.status, 500);
        assert_eq!(
            reply.json()["error"]["message"],
            "generation failed: out of memory"
        );
        assert_eq!(reply.json()["error"]["type"], "server_error");
    }
}

#[tokio::test]
async fn a_failure_in_mid_stream_is_an_event_and_no_clean_end() {
    let server = start(|_| {
        let mut script = say("so far");
        script.push(wait(30));
        script.push(Act::Fail(EngineError::Step("broken".into())));
        Ok(script)
    })
    .await;
    let stream = server.chat_stream(json!({})).await;
    assert!(!stream.clean, "the body must not end as if it were complete");
    assert!(
        !stream.raw.contains("[DONE]") && !stream.raw.contains("finish_reason\":\""),
        "{}",
        stream.raw
    );
    let last: Value = serde_json::from_str(&stream.events.last().unwrap().data).unwrap();
    assert_eq!(last["error"]["message"], "generation failed: broken");
    assert_eq!(last["error"]["code"], "generation_failed");
    // The next request is served.
    let reply = server.chat(json!({"max_tokens": 3})).await;
    assert_eq!(reply.status, 500);
}

#[tokio::test]
async fn a_dead_engine_is_told_to_everybody() {
    let server = start(|request| {
        let mut script = say("so far");
        let murderer = request.max_tokens == 13;
        script.push(wait(if murderer { 50 } else { 60_000 }));
        if murderer {
            script.push(Act::Die("Metal went away".into()));
        }
        Ok(script)
    })
    .await;
    let other = server.chat_stream(json!({}));
    let whole = server.chat(json!({"max_tokens": 14}));
    let victim = server.chat_stream(json!({"max_tokens": 13}));
    let (other, whole, victim) = tokio::join!(other, whole, victim);
    for stream in [other, victim] {
        assert!(!stream.clean);
        let last: Value = serde_json::from_str(&stream.events.last().unwrap().data).unwrap();
        assert_eq!(last["error"]["message"], "the engine has died: Metal went away");
    }
    assert_eq!(
        (whole.status, whole.json()["error"]["code"].as_str()),
        (503, Some("engine_dead"))
    );
    assert_eq!(
        *server.service.engine_state().borrow(),
        EngineState::Dead("Metal went away".into())
    );
    let reply = server.chat(json!({})).await;
    assert_eq!(
        (reply.status, reply.json()["error"]["code"].as_str()),
        (503, Some("engine_dead"))
    );
    let reply = server.get("/health").await;
    assert_eq!(reply.status, 503);
    assert!(reply.text().contains("Metal went away"));
}

#[tokio::test(start_paused = true)]
async fn a_hanging_engine_is_given_up() {
    let server = start_with(
        |c| c.silence_limit = Duration::from_secs(60),
        |_| {
            let mut script = say("so far");
            script.push(Act::Hang);
            Ok(script)
        },
    )
    .await;
    // As long as the engine steps, silence is patience: a long prefill, for instance.
    server.backend.set_stats(mlxworker::backend::EngineStats {
        last_step_age: Duration::from_secs(59),
        ..Default::default()
    });
    let patient = server
        .open("/v1/chat/completions", &with_message(json!({"stream": true})))
        .await;
    tokio::time::sleep(Duration::from_secs(1000)).await;
    patient.disconnect();
    assert!(matches!(
        server.backend.endings(1).await[0].1,
        mlxworker::backend::scripted::Ending::Cancelled(_)
    ));
    server.backend.set_stats(mlxworker::backend::EngineStats {
        last_step_age: Duration::from_secs(61),
        ..Default::default()
    });
    let reply = server.chat(json!({})).await;
    assert_eq!(
        (reply.status, reply.json()["error"]["code"].as_str()),
        (504, Some("timeout"))
    );
    let stream = server.chat_stream(json!({})).await;
    assert!(
        !stream.clean && stream.raw.contains("has not stepped for 61 s"),
        "{}",
        stream.raw
    );
}

/// A request may be less patient than the worker: for the whole reply, or in a stream for its next piece.
#[tokio::test(start_paused = true)]
async fn a_request_brings_its_own_timeout() {
    let server = start(|request| {
        let mut script = vec![Act::Start(0)];
        for token in say("one two three four") {
            script.extend([wait(4000), token]);
        }
        if request.max_tokens == 13 {
            script.push(Act::Hang);
        }
        stop(script)
    })
    .await;
    let stream = server.chat_stream(json!({"timeout": 5})).await;
    assert_eq!(stream.joined(0, "content"), "one two three four");
    let stream = server
        .chat_stream(json!({"timeout": 4.5, "max_tokens": 13}))
        .await;
    assert!(
        !stream.clean && stream.raw.contains("nothing came for 4.5 s"),
        "{}",
        stream.raw
    );
    for (timeout, status) in [(5, 504), (1000, 200)] {
        let reply = server.chat(json!({"timeout": timeout})).await;
        assert_eq!(reply.status, status, "{}", reply.text());
    }
    let reply = server.chat(json!({"timeout": 5})).await.json();
    let message = "the reply was not complete within the request's timeout of 5 s";
    assert_eq!(
        (&reply["error"]["code"], &reply["error"]["message"]),
        (&json!("timeout"), &json!(message))
    );
    let metrics = server.get("/metrics").await.text();
    assert!(
        metrics.contains("mlxworker_requests_total{route=\"chat\",outcome=\"server_error\"} 3"),
        "{metrics}"
    );
}

#[tokio::test(start_paused = true)]
async fn waiting_for_a_place_has_an_end() {
    let server = start_with(
        |c| c.queue_limit = Duration::from_secs(4),
        |_| Ok(vec![Act::Hang]),
    )
    .await;
    let reply = server.chat(json!({"stream": true})).await;
    assert_eq!(
        (reply.status, reply.json()["error"]["code"].as_str()),
        (503, Some("queue_timeout"))
    );
    assert_eq!(reply.headers["retry-after"], "5");
}

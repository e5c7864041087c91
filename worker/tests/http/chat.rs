//! `/v1/chat/completions`, answered in one piece.

use mlxworker::backend::scripted::{Act, ScriptedBackend};
use mlxworker::backend::{FinishReason, SamplingParams};
use serde_json::{Value, json};

use super::support::*;

fn weather_tools() -> Value {
    json!([{"type": "function", "function": {"name": "weather", "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}])
}

#[tokio::test]
async fn a_reply_with_everything_around_it() {
    let server = start(|_| {
        let mut script = vec![Act::Start(3)];
        script.extend(say("Hello, wörld! 🦀"));
        stop(script)
    })
    .await;
    let reply = server.chat(json!({})).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    assert_eq!(reply.headers["content-type"], "application/json");
    let json = reply.json();
    assert_eq!(json["object"], "chat.completion");
    assert_eq!(json["model"], MODEL);
    assert!(json["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert!(json["created"].as_u64().unwrap() > 1_700_000_000);
    let choice = &json["choices"][0];
    assert_eq!(choice["index"], 0);
    assert_eq!(choice["finish_reason"], "stop");
    assert_eq!(
        choice["message"],
        json!({"role": "assistant", "content": "Hello, wörld! 🦀"})
    );
    let request = &server.backend.requests()[0];
    let usage = &json["usage"];
    assert_eq!(usage["prompt_tokens"], request.prompt.len());
    assert_eq!(
        usage["completion_tokens"],
        say("Hello, wörld! 🦀").len() + 1,
        "the end token counts"
    );
    assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], 3);
    assert_eq!(
        usage["total_tokens"],
        request.prompt.len() + say("Hello, wörld! 🦀").len() + 1
    );
}

/// The prompt ends where the last message does, whatever the template would put behind it, and the reply is what comes
/// next, to the letter.
#[tokio::test]
async fn the_last_message_can_be_continued() {
    let server = start(|_| stop(say(" wide world"))).await;
    let parts = json!([{"type": "text", "text": "i, the "}]);
    for (content, end) in [
        (
            json!("Hello, end of the "),
            "<|im_start|>assistant\nHello, end of the ",
        ),
        (parts, "<|im_start|>assistant\ni, the "),
        // The template takes reasoning apart, but only where it is complete.
        (json!("<think>\nLet me"), "<|im_start|>assistant\n<think>\nLet me"),
    ] {
        let thinking = content == json!("<think>\nLet me");
        let messages = json!([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}]);
        let body = json!({"messages": messages, "continue_final_message": true});
        let reply = server.post("/v1/chat/completions", &body).await;
        assert_eq!(reply.status, 200, "{}", reply.text());
        let prompt = server.backend.requests().last().unwrap().prompt.clone();
        assert_eq!(prompt, tokenizer().encode(&prompt_of(end), false).unwrap());
        let message = &reply.json()["choices"][0]["message"];
        let field = if thinking { "reasoning_content" } else { "content" };
        assert_eq!(message[field], " wide world", "{message}");
    }
}

/// What the template makes of "Hi", and then this.
fn prompt_of(end: &str) -> String {
    format!("<|im_start|>user\nHi<|im_end|>\n{end}")
}

#[tokio::test]
async fn the_prompt_is_the_template_and_the_defaults_are_applied() {
    let defaults = SamplingParams {
        temperature: 0.3,
        top_k: 20,
        ..SamplingParams::greedy()
    };
    let expected = defaults.clone();
    let server = start_with(|c| c.sampling = defaults, |_| stop(say("ok"))).await;
    server
        .chat(json!({"messages": [{"role": "developer", "content": "Be brief."},
                                    {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}))
        .await;
    let request = &server.backend.requests()[0];
    let template =
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(request.prompt, tokenizer().encode(template, false).unwrap());
    assert_eq!(request.sampling, expected);
    assert_eq!(request.max_tokens, 100);
    assert_eq!(request.stop_tokens, [2041, 2039]);
    assert!(request.logprobs.is_none());
}

/// Lines that a client changes with every request would make every prompt a new one to the prefix cache.
#[tokio::test]
async fn changing_header_lines_do_not_change_the_prompt() {
    let server = start(|_| stop(say("ok"))).await;
    for head in [
        "",
        "x-anthropic-billing-header: cch=1;\n",
        "x-anthropic-billing-header: cch=2;\n\n",
    ] {
        let system = format!("{head}Be brief.");
        server
            .chat(json!({"messages": [{"role": "system", "content": system}, {"role": "user", "content": "Hi"}]}))
            .await;
    }
    let requests = server.backend.requests();
    assert_eq!(requests.len(), 3);
    assert!(
        requests
            .iter()
            .all(|request| request.prompt == requests[0].prompt)
    );
    assert!(prompt_text(&requests[0]).contains("Be brief."));
}

/// Whoever writes down an id for the model wants it to be read.
#[tokio::test]
async fn other_header_lines_are_for_the_model() {
    let server = start(|_| stop(say("ok"))).await;
    let system = "x-session-id: 42\nPass the session id above to every tool call.";
    server
        .chat(json!({"messages": [{"role": "system", "content": system}, {"role": "user", "content": "Hi"}]}))
        .await;
    let prompt = prompt_text(&server.backend.requests()[0]);
    assert!(prompt.contains(system), "{prompt}");
}

/// The template brings what special tokens there are; a tokenizer that adds one of its own must not do so here. A completion
/// has no template.
#[tokio::test]
async fn special_tokens_come_once() {
    let first = "<|endoftext|>";
    let tokenizer = beginning_with(first);
    let first = tokenizer.token_id(first).unwrap();
    let start_of_message = tokenizer.token_id("<|im_start|>").unwrap();
    let server = start_tokenizing(tokenizer, |_| stop(say("ok"))).await;
    server.chat(json!({})).await;
    server
        .post("/v1/completions", &json!({"prompt": "Once upon"}))
        .await;
    let [chat, completion] = &server.backend.requests()[..] else {
        panic!("two requests");
    };
    assert_eq!(
        chat.prompt.iter().filter(|id| **id == start_of_message).count(),
        2,
        "the user's and the reply's"
    );
    assert_eq!(chat.prompt[0], start_of_message);
    assert!(!chat.prompt.contains(&first), "{:?}", chat.prompt);
    let said = say("Once upon");
    assert_eq!(
        (completion.prompt[0], completion.prompt.len()),
        (first, 1 + said.len())
    );
}

/// A request with a bias, a constraint on repetition or a seed after a plain one loses none of them, and leaves none.
#[tokio::test]
async fn nothing_is_lost_after_a_plain_request() {
    let server = start(|_| stop(say("ok"))).await;
    let plain = json!({});
    let rich = json!({"logit_bias": {"7": -100}, "repetition_penalty": 1.5, "seed": 3, "frequency_penalty": 0.5,
                      "presence_penalty": 0.25});
    for body in [&plain, &rich, &plain, &rich] {
        server.chat(body.clone()).await;
    }
    let sampling: Vec<SamplingParams> = server
        .backend
        .requests()
        .into_iter()
        .map(|r| r.sampling)
        .collect();
    assert_eq!(sampling[0], SamplingParams::greedy());
    assert_eq!(sampling[2], SamplingParams::greedy());
    let expected = SamplingParams {
        logit_bias: vec![(7, -100.0)],
        repetition_penalty: 1.5,
        seed: Some(3),
        frequency_penalty: 0.5,
        presence_penalty: 0.25,
        ..SamplingParams::greedy()
    };
    assert_eq!((&sampling[1], &sampling[3]), (&expected, &expected));
}

#[tokio::test]
async fn parameters_belong_to_their_request() {
    let server = start(|request| {
        // The hot one runs longer than all the others.
        let mut script = say("a");
        script.push(wait(if request.sampling.temperature > 1.0 {
            60
        } else {
            20
        }));
        script.extend(say(&format!(" {}", request.sampling.top_k)));
        stop(script)
    })
    .await;
    let bodies: Vec<Value> = (0..8)
        .map(|i| {
            json!({"temperature": if i % 2 == 0 { 0.0 } else { 1.5 }, "top_k": i + 1, "top_p": 0.5, "min_p": 0.25,
                   "seed": i, "presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.25,
                   "logit_bias": {(i + 1).to_string(): 2.0}, "max_tokens": 10 + i, "min_tokens": i, "stop_token_ids": [5 + i]})
        })
        .collect();
    let replies = futures_util::future::join_all(bodies.iter().map(|body| server.chat(body.clone()))).await;
    for (i, reply) in replies.iter().enumerate() {
        assert_eq!(
            reply.json()["choices"][0]["message"]["content"],
            format!("a {}", i + 1)
        );
    }
    let mut requests = server.backend.requests();
    requests.sort_by_key(|request| request.max_tokens);
    for (i, request) in requests.iter().enumerate() {
        assert_eq!(
            request.sampling,
            SamplingParams {
                temperature: if i % 2 == 0 { 0.0 } else { 1.5 },
                top_p: 0.5,
                top_k: i + 1,
                min_p: 0.25,
                repetition_penalty: 1.25,
                presence_penalty: 0.5,
                frequency_penalty: -0.5,
                logit_bias: vec![(u32::try_from(i).unwrap() + 1, 2.0)],
                seed: Some(i as u64),
                min_tokens: i,
            }
        );
        assert_eq!(request.max_tokens, 10 + i);
        assert_eq!(request.stop_tokens, [2041, 2039, 5 + u32::try_from(i).unwrap()]);
    }
}

#[tokio::test]
async fn stop_strings_end_the_reply_and_the_generation() {
    let server = start(|_| {
        let mut script = spell("one two three");
        script.push(Act::Hang);
        Ok(script)
    })
    .await;
    let json = server.chat(json!({"stop": ["xyz", "o th"]})).await.json();
    assert_eq!(json["choices"][0]["message"]["content"], "one tw");
    assert_eq!(json["choices"][0]["finish_reason"], "stop");
    assert_eq!(json["usage"]["completion_tokens"], spell("one two th").len());
    let endings = server.backend.endings(1).await;
    assert!(
        matches!(endings[0].1, mlxworker::backend::scripted::Ending::Cancelled(_)),
        "{endings:?}"
    );
}

#[tokio::test]
async fn an_end_right_away_is_an_empty_reply_with_one_token() {
    let server = start(|_| stop(vec![])).await;
    let json = server.chat(json!({})).await.json();
    assert_eq!(json["choices"][0]["message"]["content"], "");
    assert_eq!(json["choices"][0]["finish_reason"], "stop");
    assert_eq!(json["usage"]["completion_tokens"], 1);
}

#[tokio::test]
async fn no_token_at_all_is_no_success() {
    let server = start(|_| length(vec![])).await;
    let reply = server.chat(json!({})).await;
    assert_eq!(reply.status, 500);
    assert_eq!(reply.json()["error"]["code"], "generation_failed");
}

#[tokio::test]
async fn length_is_told_and_wishes_are_clamped_aloud() {
    let server = start(|_| length(say("and so on"))).await;
    let reply = server.chat(json!({"max_tokens": 5000})).await;
    assert_eq!(reply.json()["choices"][0]["finish_reason"], "length");
    assert_eq!(reply.headers["x-max-tokens-clamped"], "asked=5000, allowed=200");
    assert_eq!(server.backend.requests()[0].max_tokens, 200);
    let reply = server.chat(json!({"max_completion_tokens": 7})).await;
    assert!(!reply.headers.contains_key("x-max-tokens-clamped"));
    assert_eq!(server.backend.requests()[1].max_tokens, 7);
    // A proxy that has begun the reply itself passes on the body only.
    let comment = ": max_tokens clamped: asked=5000, allowed=200\n\n";
    let stream = server.chat_stream(json!({"max_tokens": 5000})).await;
    assert!(stream.raw.starts_with(comment), "{}", stream.raw);
    assert_eq!(stream.joined(0, "content"), "and so on");
    let body = json!({"prompt": "x", "max_tokens": 5000});
    let stream = server.stream("/v1/completions", body).await;
    assert!(stream.raw.starts_with(comment), "{}", stream.raw);
    let stream = server.chat_stream(json!({"max_tokens": 7})).await;
    assert!(!stream.raw.contains("clamped"), "{}", stream.raw);
}

/// What the KV cache has no room for is no part of what may be asked for, whatever the model's context length.
#[tokio::test]
async fn the_cache_clamps_aloud_too() {
    let backend = ScriptedBackend::new(CONTEXT, VOCABULARY, |_| length(say("and so on"))).with_kv_tokens(64);
    let server = start_on(backend, |_| {}).await;
    let card = server.get("/v1/models").await.json()["data"][0].clone();
    assert_eq!(card["max_model_len"], 64);
    let reply = server.chat(json!({"max_tokens": 150})).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    let request = &server.backend.requests()[0];
    let room = 64 - request.prompt.len();
    assert_eq!(request.max_tokens, room);
    assert_eq!(
        reply.headers["x-max-tokens-clamped"],
        format!("asked=150, allowed={room}")
    );
    // A prompt without any room is the engine's to refuse, with its numbers: it gets to see it.
    let text = "word ".repeat(200);
    server
        .post("/v1/completions", &json!({"prompt": text, "max_tokens": 3}))
        .await;
    let requests = server.backend.requests();
    assert!(requests[1].prompt.len() > 64 && requests[1].max_tokens == 1);
}

/// What others computed after the request had begun is cached as well, also when a stop string ends the reply.
#[tokio::test]
async fn all_cached_tokens_are_told() {
    let server = start(|_| {
        let mut script = vec![Act::Start(2), Act::Reuse(9)];
        script.extend(say("one two three"));
        script.push(Act::Hang);
        Ok(script)
    })
    .await;
    let json = server.chat(json!({"stop": "two"})).await.json();
    assert_eq!(json["usage"]["prompt_tokens_details"]["cached_tokens"], 9);
    // Several choices reuse what one of them computes.
    let json = server.chat(json!({"stop": "two", "n": 2})).await.json();
    assert_eq!(json["usage"]["prompt_tokens_details"]["cached_tokens"], 2);
}

#[tokio::test]
async fn reasoning_is_kept_apart() {
    let server = start(|_| stop(spell("<think>\nHm, 6 times 7.\n</think>\n\n42"))).await;
    let json = server.chat(json!({})).await.json();
    let message = &json["choices"][0]["message"];
    assert_eq!(message["content"], "42");
    assert_eq!(
        message["reasoning_content"].as_str().unwrap().trim(),
        "Hm, 6 times 7."
    );
    server.chat(json!({"enable_thinking": false})).await;
    let prompt = tokenizer().encode("<think>\n\n</think>\n\n", false).unwrap();
    assert!(server.backend.requests()[1].prompt.ends_with(&prompt));
    assert!(!server.backend.requests()[0].prompt.ends_with(&prompt));
}

#[tokio::test]
async fn tool_calls_are_parsed() {
    let call = "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Köln\"}}\n</tool_call>";
    let server = start(move |_| stop(spell(&format!("Let me look.\n{call}\n{call}")))).await;
    let json = server.chat(json!({"tools": weather_tools()})).await.json();
    let choice = &json["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls");
    assert_eq!(
        choice["message"]["content"].as_str().unwrap().trim(),
        "Let me look."
    );
    let calls = choice["message"]["tool_calls"].as_array().unwrap();
    assert_eq!(calls.len(), 2);
    for call in calls {
        assert_eq!(call["type"], "function");
        assert_eq!(call["function"]["name"], "weather");
        let arguments: Value = serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
        assert_eq!(arguments, json!({"city": "Köln"}));
    }
    assert_ne!(calls[0]["id"], calls[1]["id"]);
    assert!(prompt_text(&server.backend.requests()[0]).contains("Weather of a city"));

    let json = server
        .chat(json!({"tools": weather_tools(), "parallel_tool_calls": false}))
        .await
        .json();
    assert_eq!(
        json["choices"][0]["message"]["tool_calls"]
            .as_array()
            .unwrap()
            .len(),
        1
    );
    assert_eq!(json["choices"][0]["finish_reason"], "tool_calls");

    // Without tools, or with none to be called, the markup is text and the tools are not in the prompt.
    for extra in [
        json!({}),
        json!({"tools": weather_tools(), "tool_choice": "none"}),
    ] {
        let json = server.chat(extra).await.json();
        assert_eq!(json["choices"][0]["finish_reason"], "stop");
        assert!(
            json["choices"][0]["message"]["content"]
                .as_str()
                .unwrap()
                .contains("<tool_call>")
        );
        assert!(!prompt_text(server.backend.requests().last().unwrap()).contains("Weather of a city"));
    }
}

#[tokio::test]
async fn a_call_can_be_forced() {
    let server = start(|request| {
        let prompt = prompt_text(request);
        if prompt.ends_with("{\"name\": \"weather\", \"arguments\": ") {
            stop(spell("{\"city\": \"Rome\"}}\n</tool_call>"))
        } else {
            assert!(prompt.ends_with("<tool_call>\n{\"name\": \""), "{prompt}");
            stop(spell(
                "weather\", \"arguments\": {\"city\": \"Rome\"}}\n</tool_call>",
            ))
        }
    })
    .await;
    for choice in [
        json!("required"),
        json!({"type": "function", "function": {"name": "weather"}}),
    ] {
        let json = server
            .chat(json!({"tools": weather_tools(), "tool_choice": choice}))
            .await
            .json();
        let function = &json["choices"][0]["message"]["tool_calls"][0]["function"];
        assert_eq!(function["name"], "weather", "{json}");
        let arguments: Value = serde_json::from_str(function["arguments"].as_str().unwrap()).unwrap();
        assert_eq!(arguments, json!({"city": "Rome"}));
        assert_eq!(json["choices"][0]["finish_reason"], "tool_calls");
        assert_eq!(json["choices"][0]["message"]["content"], Value::Null);
    }
}

#[tokio::test]
async fn several_choices_are_several_generations() {
    let server = start(|request| {
        let seed = request.sampling.seed.unwrap();
        // The first one ends last.
        let mut script = say(&format!("seed {seed}"));
        script.push(wait(40 - 10 * (seed - 7)));
        script.extend(say("!"));
        stop(script)
    })
    .await;
    let json = server.chat(json!({"n": 3, "seed": 7})).await.json();
    for index in 0..3 {
        let choice = &json["choices"][index];
        assert_eq!(choice["index"], index);
        assert_eq!(choice["message"]["content"], format!("seed {}!", 7 + index));
    }
    let prompt = server.backend.requests()[0].prompt.len();
    assert_eq!(
        json["usage"]["prompt_tokens"], prompt,
        "a shared prompt counts once"
    );
    let tokens = 3 * (say("seed 7").len() + 2);
    assert_eq!(json["usage"]["completion_tokens"], tokens);
}

#[tokio::test]
async fn logprobs_are_columns_of_tokens() {
    let server = start(|request| {
        assert_eq!(request.logprobs, Some(2));
        let id = tokenizer().encode("a", false).unwrap()[0];
        Ok(vec![
            Act::TokenWithLogprob(id, -0.25, vec![(id, -0.25), (2041, -2.0)]),
            Act::Finish(FinishReason::Length),
        ])
    })
    .await;
    let json = server
        .chat(json!({"logprobs": true, "top_logprobs": 2}))
        .await
        .json();
    assert_eq!(
        json["choices"][0]["logprobs"],
        json!({"content": [{"token": "a", "logprob": -0.25, "bytes": [97], "top_logprobs": [
            {"token": "a", "logprob": -0.25, "bytes": [97]},
            {"token": "<|im_end|>", "logprob": -2.0, "bytes": b"<|im_end|>"}]}]})
    );
}

#[tokio::test]
async fn a_long_prompt_goes_the_same_way() {
    let server = start(|_| stop(say("ok"))).await;
    let text = "word ".repeat(400);
    let padding = "x".repeat(20_000);
    let body = json!({"messages": [{"role": "user", "content": text}], "metadata": padding});
    let reply = server.chat(body).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    assert!(prompt_text(&server.backend.requests()[0]).contains(text.trim()));
}

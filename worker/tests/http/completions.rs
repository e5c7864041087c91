//! `/v1/completions`.

use mlxworker::backend::FinishReason;
use mlxworker::backend::scripted::Act;
use serde_json::json;

use super::support::*;

const PATH: &str = "/v1/completions";

#[tokio::test]
async fn every_form_of_a_prompt_and_n() {
    let server = start(|request| stop(say(&format!("<{}>", request.prompt.len())))).await;
    let ids = tokenizer().encode("a b c", true).unwrap();
    let prompts = json!(["a b c", ids]);
    let json = server
        .post(PATH, &json!({"model": MODEL, "prompt": prompts, "n": 2}))
        .await
        .json();
    assert_eq!(json["object"], "text_completion");
    assert!(json["id"].as_str().unwrap().starts_with("cmpl-"));
    let choices = json["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 4);
    for (index, choice) in choices.iter().enumerate() {
        assert_eq!(choice["index"], index);
        assert_eq!(choice["text"], format!("<{}>", ids.len()));
        assert_eq!(choice["finish_reason"], "stop");
    }
    assert_eq!(
        json["usage"]["prompt_tokens"],
        2 * ids.len(),
        "two prompts, each counted once"
    );
    assert!(
        server
            .backend
            .requests()
            .iter()
            .all(|request| request.prompt == ids)
    );
}

#[tokio::test]
async fn echo_stop_and_special_markup() {
    let server = start(|_| stop(spell(" <tool_call> END of it"))).await;
    let body = json!({"prompt": "Once", "echo": true, "stop": "END"});
    let json = server.post(PATH, &body).await.json();
    assert_eq!(json["choices"][0]["text"], "Once <tool_call> ");
    let stream = server.stream(PATH, body).await;
    let chunks = stream.chunks();
    let text: String = chunks
        .iter()
        .map(|chunk| chunk["choices"][0]["text"].as_str().unwrap())
        .collect();
    assert_eq!(text, "Once <tool_call> ");
    assert_eq!(chunks[0]["object"], "text_completion");
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "stop");
}

#[tokio::test]
async fn usage_comes_last_when_asked_for() {
    let server = start(|_| length(say("one two"))).await;
    let body = json!({"prompt": "x", "stream_options": {"include_usage": true}});
    let chunks = server.stream(PATH, body).await.chunks();
    let (last, others) = chunks.split_last().unwrap();
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"]["completion_tokens"], say("one two").len());
    assert!(others.iter().all(|chunk| chunk["usage"].is_null()));
}

#[tokio::test]
async fn logprobs_are_columns() {
    let server = start(|request| {
        assert_eq!(request.logprobs, Some(1));
        let id = |text: &str| tokenizer().encode(text, false).unwrap()[0];
        Ok(vec![
            Act::TokenWithLogprob(id("a"), -0.5, vec![(id("a"), -0.5)]),
            Act::TokenWithLogprob(id("b"), -1.5, vec![(id("c"), -0.75)]),
            Act::Finish(FinishReason::Length),
        ])
    })
    .await;
    let json = server
        .post(PATH, &json!({"prompt": "x", "logprobs": 1}))
        .await
        .json();
    assert_eq!(
        json["choices"][0]["logprobs"],
        json!({"tokens": ["a", "b"], "token_logprobs": [-0.5, -1.5],
               "top_logprobs": [{"a": -0.5}, {"c": -0.75}], "text_offset": [0, 1]})
    );
}

/// A character of several tokens comes out with the last of them: until then the text has not got any longer.
#[tokio::test]
async fn a_character_of_several_tokens_has_one_place() {
    let pieces = ["a", "🦀", "b", "é🦀", "c"].map(|text| tokenizer().encode(text, false).unwrap());
    assert!(pieces[1].len() > 1, "{pieces:?}");
    // "é" is one token or two, and complete with its last.
    let accent = tokenizer().encode("é", false).unwrap().len();
    let mut expected = vec![0];
    expected.extend(vec![1; pieces[1].len()]);
    expected.push(2);
    expected.extend(vec![3; accent]);
    expected.extend(vec![4; pieces[3].len() - accent]);
    expected.push(5);
    let server = start(move |_| {
        let ids = pieces.iter().flatten();
        length(ids.map(|id| Act::TokenWithLogprob(*id, -0.5, vec![])).collect())
    })
    .await;
    let body = json!({"prompt": "x", "logprobs": 0});
    let choice = server.post(PATH, &body).await.json()["choices"][0].clone();
    assert_eq!(choice["text"], "a🦀bé🦀c");
    assert_eq!(choice["logprobs"]["text_offset"], json!(expected));
    let chunks = server.stream(PATH, body).await.chunks();
    let streamed: Vec<_> = chunks
        .iter()
        .flat_map(|chunk| {
            chunk["choices"][0]["logprobs"]["text_offset"]
                .as_array()
                .unwrap()
                .clone()
        })
        .collect();
    assert_eq!(json!(streamed), json!(expected));
}

/// Stop strings count from behind the tokens that the reply has at the least.
#[tokio::test]
async fn a_stop_string_before_the_least_length_is_text() {
    let server = start(|_| stop(spell("abcabc"))).await;
    for (min_tokens, text) in [(0, "a"), (1, "a"), (2, "abca"), (4, "abca"), (5, "abcabc")] {
        let body = json!({"prompt": "x", "stop": ["b"], "min_tokens": min_tokens, "max_tokens": 10});
        let reply = server.post("/v1/completions", &body).await;
        assert_eq!(reply.json()["choices"][0]["text"], text, "{}", reply.text());
    }
    let asked: Vec<usize> = server
        .backend
        .requests()
        .iter()
        .map(|asked| asked.sampling.min_tokens)
        .collect();
    assert_eq!(asked, [0, 1, 2, 4, 5]);
    let body = json!({"prompt": "x", "min_tokens": 11, "max_tokens": 10});
    let reply = server.post("/v1/completions", &body).await;
    assert_eq!(
        (reply.status, &reply.json()["error"]["param"]),
        (400, &json!("min_tokens"))
    );
    // The default length (100) gives way to it, the cap (200) does not and says so.
    for (min_tokens, max_tokens, clamped) in [
        (50, 100, None),
        (150, 150, None),
        (250, 200, Some("asked=250, allowed=200")),
    ] {
        let body = json!({"prompt": "x", "min_tokens": min_tokens});
        let reply = server.post("/v1/completions", &body).await;
        assert_eq!(reply.status, 200, "{}", reply.text());
        let said = reply.headers.get("x-max-tokens-clamped");
        assert_eq!(said.map(|said| said.to_str().unwrap()), clamped);
        assert_eq!(server.backend.requests().last().unwrap().max_tokens, max_tokens);
    }
}

//! Forms of replies: what is refused, and what the engine is asked for.

use std::time::Duration;

use chat_format::ReasoningFormat;
use constraint::Walk;
use mlxworker::backend::{Backend, GenerateRequest};
use mlxworker::http::ChatFormat;
use serde_json::{Map, Value, json};

use super::support::*;

const THINK: u32 = 2046;
const CLOSE: u32 = 2047;
const CALL: u32 = 2042;
const CALL_END: u32 = 2043;
const EOS: u32 = 2041;
const OTHER_EOS: u32 = 2039;

fn tools() -> Value {
    json!([{"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}])
}

#[tokio::test]
async fn what_cannot_be_asked_is_refused_before_anything_is_queued() {
    let server = start(|_| panic!("no request gets here")).await;
    let schema = |schema: Value| json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}});
    let object = json!({"type": "json_object"});
    for (extra, param, part) in [
        (
            json!({"response_format": {"type": "xml"}}),
            "response_format",
            "xml",
        ),
        (
            schema(json!("text")),
            "response_format.json_schema.schema",
            "text",
        ),
        (
            schema(json!({"type": "object", "properties": {"a": {"type": "strin"}}})),
            "response_format.json_schema.schema",
            "cannot be compiled: Invalid type: strin",
        ),
        (
            schema(json!({"type": "integer", "minimum": 4, "maximum": 3})),
            "response_format.json_schema.schema",
            "nsatisfiable",
        ),
        (
            json!({"guided_json": {"$ref": "https://example.org/x"}}),
            "guided_json",
            "example.org",
        ),
        (json!({"guided_regex": "a(b"}), "guided_regex", "unclosed group"),
        (json!({"guided_choice": []}), "guided_choice", "[]"),
        (
            json!({"guided_grammar": "start: nothing"}),
            "guided_grammar",
            "nothing",
        ),
        (
            json!({"structured_outputs": {"json": {}, "choice": ["a"]}}),
            "structured_outputs",
            "choice",
        ),
        (
            json!({"structured_outputs": {"regex": "["}}),
            "structured_outputs.regex",
            "unclosed",
        ),
        (
            json!({"guided_json": {}, "guided_regex": "a"}),
            "guided_regex",
            "guided_json",
        ),
        (
            json!({"response_format": object, "tools": tools(), "tool_choice": "required"}),
            "tool_choice",
            "response_format",
        ),
        (
            json!({"guided_regex": "a", "tools": tools(),
                   "tool_choice": {"type": "function", "function": {"name": "now"}}}),
            "tool_choice",
            "guided_regex",
        ),
    ] {
        let reply = server.chat(extra.clone()).await;
        let error = reply.json()["error"].clone();
        assert_eq!(
            (reply.status, error["param"].as_str()),
            (400, Some(param)),
            "{extra}: {error}"
        );
        assert!(
            error["message"].as_str().unwrap().contains(part),
            "{extra}: {error}"
        );
        if param == "tool_choice" {
            continue;
        }
        let mut body = extra;
        body["prompt"] = "a".into();
        let reply = server.post("/v1/completions", &body).await;
        assert_eq!(
            (reply.status, reply.json()["error"]["param"].as_str()),
            (400, Some(param)),
            "{body}"
        );
    }
}

fn walk(request: &GenerateRequest) -> Walk {
    let asked = request.constraint.clone().expect("a constraint");
    asked.form.walk(asked.opening, &request.stop_tokens)
}

/// Writes a text, character by character; true if only the end can follow.
fn write(walk: &mut Walk, text: &str) -> bool {
    let mut end = false;
    for character in text.chars() {
        let id = tokenizer().encode(&character.to_string(), false).unwrap()[0];
        let allowed = walk.allowed().unwrap().expect("constrained");
        assert!(allowed.has(id), "{character:?} in {text:?}");
        end = walk.take(id).unwrap();
    }
    end
}

/// What may come next, as text; markup by its id.
fn next(walk: &mut Walk) -> Vec<String> {
    let allowed = walk.allowed().unwrap().expect("constrained");
    let ids = (0..VOCABULARY as u32).filter(|id| allowed.has(*id));
    let text = |id: u32| match id {
        2039.. => id.to_string(),
        id => String::from_utf8(tokenizer().token_bytes(id)).unwrap(),
    };
    let mut all: Vec<String> = ids.map(text).collect();
    all.sort();
    all
}

#[tokio::test]
async fn what_may_come_first_depends_on_the_chat() {
    let server = start(|_| stop(say("no"))).await;
    let choice = json!({"guided_choice": ["yes", "no"]});
    let mut cases = Vec::new();
    for (extra, more) in [
        (json!({}), vec![THINK]),
        (json!({"enable_thinking": false}), vec![]),
        (json!({"enable_thinking": false, "tools": tools()}), vec![CALL]),
        (json!({"tools": tools()}), vec![CALL, THINK]),
        (json!({"tools": tools(), "tool_choice": "none"}), vec![THINK]),
        (json!({"n": 2, "stream": false}), vec![THINK]),
        // Worked on elsewhere, since it is long.
        (json!({"metadata": "x".repeat(20_000)}), vec![THINK]),
    ] {
        let mut body = choice.clone();
        for (key, value) in extra.as_object().unwrap() {
            body[key] = value.clone();
        }
        let reply = server.chat(body.clone()).await;
        assert_eq!(reply.status, 200, "{}", reply.text());
        cases.extend(std::iter::repeat_n(
            more,
            usize::try_from(body["n"].as_u64().unwrap_or(1)).unwrap(),
        ));
    }
    let completion = json!({"prompt": ["a", "b"], "structured_outputs": choice["guided_choice"].as_array()
        .map(|choices| json!({"choice": choices}))});
    assert_eq!(server.post("/v1/completions", &completion).await.status, 200);
    cases.extend([vec![], vec![]]);
    let requests = server.backend.requests();
    assert_eq!(requests.len(), cases.len());
    for (request, more) in requests.iter().zip(cases) {
        let mut walk = walk(request);
        let mut expected: Vec<String> = more.iter().map(u32::to_string).collect();
        expected.extend(["n", "no", "y", "ye", "yes"].map(str::to_owned));
        let found = next(&mut walk);
        // Which longer tokens there are is the tokenizer's business.
        assert!(found.iter().all(|text| expected.contains(text)), "{found:?}");
        for text in more.iter().map(u32::to_string).chain(["n".into(), "y".into()]) {
            assert!(found.contains(&text), "{text} is not in {found:?}");
        }
        for byte in ["n", "o"] {
            let id = tokenizer().encode(byte, false).unwrap()[0];
            let over = walk.take(id).unwrap();
            assert_eq!(over, byte == "o");
        }
        assert_eq!(next(&mut walk), ["2039", "2041"], "both of the model's ends");
    }
}

/// A template that opens the reasoning itself.
#[tokio::test]
async fn the_answer_begins_after_the_reasoning() {
    let source = "{{ messages[0].content }}{% if add_generation_prompt %}<think>\n{% endif %}{# </think> #}";
    let chat = |reasoning: ReasoningFormat| {
        let template = chat_format::ChatTemplate::from_source(source, Map::new()).unwrap();
        Some(ChatFormat {
            tool_format: template.tool_format(),
            template,
            unknown_tools: None,
            reasoning,
            auto_tools: true,
            template_kwargs: Map::new(),
        })
    };
    for (reasoning, free) in [(ReasoningFormat::Auto, true), (ReasoningFormat::None, false)] {
        let server = start_chat(chat(reasoning), |_| stop(say("x</think>\n\n{}"))).await;
        let reply = server
            .chat(json!({"response_format": {"type": "json_object"}}))
            .await;
        assert_eq!(reply.status, 200, "{}", reply.text());
        let mut walk = walk(&server.backend.requests()[0]);
        assert_eq!(walk.allowed().unwrap().unwrap().has(700), free);
        if free {
            assert!(!walk.allowed().unwrap().unwrap().has(EOS));
            assert!(!walk.take(700).unwrap() && !walk.take(CLOSE).unwrap());
            let breaks = tokenizer().encode("\n\n", false).unwrap();
            assert!(next(&mut walk).contains(&"{".to_owned()));
            assert!(walk.allowed().unwrap().unwrap().has(breaks[0]));
            let message = &reply.json()["choices"][0]["message"];
            assert_eq!(
                (&message["reasoning_content"], &message["content"]),
                (&json!("x"), &json!("{}"))
            );
        }
        assert!(next(&mut walk).contains(&"{".to_owned()));
    }
}

/// Forms that take long hold up others that are asked for, and nobody else.
#[tokio::test]
async fn compilers_are_few_and_have_little_time() {
    let server = start_with(
        |c| c.compile_limit = Duration::from_millis(20),
        |_| stop(say("ok")),
    )
    .await;
    let properties: Map<String, Value> = (0..6_000)
        .map(|n| (format!("p{n}"), json!({"type": "string"})))
        .collect();
    let slow = json!({"guided_json": {"type": "object", "properties": properties}});
    let mut said = Vec::new();
    for _ in 0..3 {
        let reply = server.chat(slow.clone()).await;
        said.push((
            reply.status,
            reply.json()["error"]["code"].as_str().unwrap().to_owned(),
        ));
    }
    let complex = (400, "invalid_constraint".to_owned());
    assert_eq!(
        said,
        [
            complex.clone(),
            complex,
            (503, "constraint_compiler_busy".to_owned())
        ]
    );
    assert_eq!(server.chat(json!({})).await.status, 200);
    assert_eq!(server.backend.requests().len(), 1);
    // Who forces a call and does not insist on its schema does without, as before there were forms.
    let mut asked = json!({"tools": tools(), "tool_choice": "required"});
    let reply = server.chat(asked.clone()).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    assert!(server.backend.requests()[1].constraint.is_none());
    asked["tools"][0]["function"]["strict"] = json!(true);
    let reply = server.chat(asked).await;
    assert_eq!(
        (reply.status, &reply.json()["error"]["code"]),
        (503, &json!("constraint_compiler_busy"))
    );
    assert_eq!(server.backend.stats().running, 0);
}

/// What the engine says of a constraint that failed.
#[tokio::test]
async fn a_constraint_that_fails_is_an_error() {
    use mlxworker::backend::EngineError;
    use mlxworker::backend::scripted::Act;
    let server = start(|_| Ok(vec![Act::Fail(EngineError::Constraint("stuck".to_owned()))])).await;
    let reply = server.chat(json!({"guided_regex": "a"})).await;
    assert_eq!(reply.status, 500, "{}", reply.text());
    let error = &reply.json()["error"];
    assert_eq!(error["code"], "constraint_failed");
    assert!(error["message"].as_str().unwrap().contains("stuck"), "{error}");
}

/// What a forced call may go on with: the tool's name, then arguments under its schema, then the end of the markup.
#[tokio::test]
async fn a_forced_call_follows_the_tools_schema() {
    let server = start(|_| stop(spell("x"))).await;
    let tool = |name: &str, parameters: Value| json!({"type": "function", "function": {"name": name, "parameters": parameters}});
    let city = json!({"properties": {"city": {"enum": ["Rome"]}}, "required": ["city"], "additionalProperties": false});
    let tools = json!([tool("weather", city), {"type": "function", "function": {"name": "now"}}]);
    let named = |name: &str| json!({"type": "function", "function": {"name": name}});
    for extra in [
        json!({"tool_choice": named("weather")}),
        json!({"tool_choice": named("now"), "n": 2}),
        json!({"tool_choice": "required"}),
        json!({"tool_choice": "required", "parallel_tool_calls": false}),
    ] {
        let mut body = extra;
        body["tools"] = tools.clone();
        let reply = server.chat(body).await;
        assert_eq!(reply.status, 200, "{}", reply.text());
    }
    let mut walks: Vec<Walk> = server.backend.requests().iter().map(walk).collect();
    let rome = "{\"city\": \"Rome\"}}\n";
    assert!(!write(&mut walks[0], "{\"city\": \""));
    assert_eq!(next(&mut walks[0]), ["R", "Ro", "Rome"]);
    assert!(!write(&mut walks[0], "Rome\"}}\n"));
    // Character by character, or as the model has learnt it.
    assert!(next(&mut walks[0]).contains(&CALL_END.to_string()));
    assert!(walks[0].take(CALL_END).unwrap(), "one call");

    for at in [1, 2] {
        assert!(!write(&mut walks[at], "{\"anything\": [1]}}\n"));
        assert!(walks[at].take(CALL_END).unwrap());
    }

    let names = next(&mut walks[3]);
    assert!(
        names
            .iter()
            .all(|name| "weather\"".starts_with(name) || "now\"".starts_with(name)),
        "{names:?}"
    );
    assert!(!write(
        &mut walks[3],
        &format!("weather\", \"arguments\": {rome}")
    ));
    assert!(!walks[3].take(CALL_END).unwrap());
    assert_eq!(
        next(&mut walks[3]),
        ["\n".to_owned(), OTHER_EOS.to_string(), EOS.to_string()]
    );
    assert!(!write(&mut walks[3], "\n"));
    assert!(!walks[3].take(CALL).unwrap());
    assert!(!write(
        &mut walks[3],
        "\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>"
    ));

    assert!(!write(
        &mut walks[4],
        &format!("weather\", \"arguments\": {rome}")
    ));
    assert!(walks[4].take(CALL_END).unwrap());
}

#[tokio::test]
async fn a_schema_that_cannot_be_compiled_is_refused_only_where_it_is_strict() {
    let server = start(|_| stop(spell("x"))).await;
    let tool = |name: &str, parameters: Value, strict: bool| {
        json!({"type": "function",
        "function": {"name": name, "parameters": parameters, "strict": strict}})
    };
    let (wrong, right) = (
        json!({"properties": {"a": {"type": "strin"}}}),
        json!({"properties": {"a": {"const": 1}}, "required": ["a"]}),
    );
    let ask = |tools: Value, choice: Value| server.chat(json!({"tools": tools, "tool_choice": choice}));
    let named = json!({"type": "function", "function": {"name": "g"}});
    for choice in [json!("required"), named.clone()] {
        let tools = json!([tool("f", right.clone(), true), tool("g", wrong.clone(), true)]);
        let reply = ask(tools, choice).await;
        let error = reply.json()["error"].clone();
        assert_eq!(
            (reply.status, &error["param"]),
            (400, &json!("tools[1].function.parameters")),
            "{error}"
        );
        assert!(error["message"].as_str().unwrap().contains("strin"), "{error}");
    }
    assert!(server.backend.requests().is_empty());
    // The other tool is bound all the same, strictly or not.
    for choice in [json!("required"), named] {
        let tools = json!([tool("f", right.clone(), true), tool("g", wrong.clone(), false)]);
        let reply = ask(tools, choice).await;
        assert_eq!(reply.status, 200, "{}", reply.text());
    }
    let mut walks: Vec<Walk> = server.backend.requests().iter().map(walk).collect();
    let mut other = server.backend.requests().first().map(walk).unwrap();
    assert!(!write(&mut other, "g\", \"arguments\": {\"a\": [2]}}"));
    assert!(!write(&mut walks[0], "f\", \"arguments\": {\"a\": "));
    assert_eq!(next(&mut walks[0]), ["1"]);
    assert!(!write(&mut walks[1], "{\"a\": [2]}}"));
}

//! A request in Ollama's form to one for an OpenAI route.

use std::time::Duration;

use api_types::error::{ApiError, shown};
use serde_json::{Map, Value, json};

use super::Shape;
use super::message;

/// How long a model is to stay after its last request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeepAlive {
    /// Until it is ordered away.
    Forever,
    /// This long; zero unloads it when the request has ended.
    For(Duration),
}

/// What a generation is to be answered with.
#[derive(Clone, Debug, PartialEq)]
pub struct Generation {
    /// The OpenAI route.
    pub path: &'static str,
    /// Its body.
    pub body: Value,
    /// Whether the client gets lines as they come, or one object. The body asks for a stream in both cases.
    pub stream: bool,
    /// Form of the reply.
    pub shape: Shape,
}

/// What a request asks for.
#[derive(Clone, Debug, PartialEq)]
pub enum Wanted {
    /// Text.
    Generation(Box<Generation>),
    /// Only that the model is loaded.
    Load(Shape),
    /// That the model goes.
    Unload(Shape),
    /// Vectors: the body for `/v1/embeddings`.
    Vectors(Value),
}

/// A request, read.
#[derive(Clone, Debug, PartialEq)]
pub struct Asked {
    /// The model's name as the client wrote it.
    pub model: String,
    /// What for.
    pub wanted: Wanted,
    /// For how long from now on, if it says so.
    pub keep_alive: Option<KeepAlive>,
}

/// The body of any of the routes, as an object, with the model's name (`name` in older clients).
///
/// # Errors
/// It is no JSON object, or names no model.
pub fn object(body: &[u8]) -> Result<(Map<String, Value>, String), ApiError> {
    let value: Value = serde_json::from_slice(body)
        .map_err(|e| ApiError::bad_request(format!("the body is no JSON: {e}")))?;
    let Value::Object(map) = value else {
        return Err(ApiError::bad_request("the body is no JSON object"));
    };
    let name = map.get("model").or_else(|| map.get("name"));
    match name {
        Some(Value::String(name)) if !name.is_empty() => {
            let name = name.clone();
            Ok((map, name))
        }
        Some(other) => Err(ApiError::invalid(
            "model",
            format!("{} is not the name of a model", shown(other)),
        )),
        None => Err(ApiError::invalid("model", "is required")),
    }
}

/// `/api/chat`.
///
/// # Errors
/// A field is not what it must be, or asks for what no model here does.
pub fn chat(body: &[u8]) -> Result<Asked, ApiError> {
    let (map, model) = object(body)?;
    let keep_alive = keep_alive(map.get("keep_alive"))?;
    let messages = match map.get("messages") {
        None | Some(Value::Null) => &[],
        Some(Value::Array(messages)) => messages.as_slice(),
        Some(other) => return Err(mismatch("messages", "an array", other)),
    };
    if messages.is_empty() {
        return Ok(without_prompt(model, keep_alive, Shape::Chat));
    }
    let mut out = Map::new();
    out.insert("model".to_owned(), model.as_str().into());
    out.insert(
        "messages".to_owned(),
        Value::Array(message::conversation(messages)?),
    );
    if let Some(tools) = map.get("tools").filter(|t| !t.is_null()) {
        let tools = tools
            .as_array()
            .ok_or_else(|| mismatch("tools", "an array", tools))?;
        if !tools.is_empty() {
            out.insert("tools".to_owned(), Value::Array(tools.clone()));
        }
    }
    finish(&map, model, keep_alive, "/v1/chat/completions", out, Shape::Chat)
}

/// `/api/generate`.
///
/// # Errors
/// As [`chat`].
pub fn generate(body: &[u8]) -> Result<Asked, ApiError> {
    let (map, model) = object(body)?;
    let keep_alive = keep_alive(map.get("keep_alive"))?;
    let text = |key: &str| match map.get(key) {
        None | Some(Value::Null) => Ok(""),
        Some(Value::String(text)) => Ok(text.as_str()),
        Some(other) => Err(mismatch(key, "a string", other)),
    };
    let (prompt, suffix, system) = (text("prompt")?, text("suffix")?, text("system")?);
    // Both would silently change the answer if they were passed over.
    if !text("template")?.is_empty() {
        return Err(unsupported(
            "template",
            "a model's own template is always used; \"raw\": true uses none",
        ));
    }
    if map
        .get("context")
        .and_then(Value::as_array)
        .is_some_and(|c| !c.is_empty())
    {
        return Err(unsupported(
            "context",
            "no contexts are given out; /api/chat takes whole conversations",
        ));
    }
    let images = message::images("images", map.get("images"))?;
    if prompt.is_empty() && suffix.is_empty() && images.is_empty() {
        return Ok(without_prompt(model, keep_alive, Shape::Generate));
    }
    let raw = flag(&map, "raw")?.unwrap_or(false);
    let mut out = Map::new();
    out.insert("model".to_owned(), model.as_str().into());
    if raw || !suffix.is_empty() {
        if !images.is_empty() {
            return Err(unsupported("images", "a raw prompt has no place for images"));
        }
        // Without a template there is nowhere for the system's message to go but in front.
        let prompt = if raw || system.is_empty() {
            prompt.to_owned()
        } else {
            format!("{system}\n\n{prompt}")
        };
        out.insert("prompt".to_owned(), prompt.into());
        if !suffix.is_empty() {
            out.insert("suffix".to_owned(), suffix.into());
        }
        return finish(&map, model, keep_alive, "/v1/completions", out, Shape::Generate);
    }
    let mut messages = Vec::new();
    if !system.is_empty() {
        messages.push(json!({"role": "system", "content": system}));
    }
    let content = if images.is_empty() {
        prompt.into()
    } else {
        message::parts(prompt, images)
    };
    messages.push(json!({"role": "user", "content": content}));
    out.insert("messages".to_owned(), Value::Array(messages));
    finish(
        &map,
        model,
        keep_alive,
        "/v1/chat/completions",
        out,
        Shape::Generate,
    )
}

/// `/api/embed`, and with `prompt` in `input`'s place the older `/api/embeddings`.
///
/// # Errors
/// As [`chat`].
pub fn embed(body: &[u8], input: &str) -> Result<Asked, ApiError> {
    let (map, model) = object(body)?;
    let keep_alive = keep_alive(map.get("keep_alive"))?;
    let texts = match map.get(input) {
        Some(text @ Value::String(_)) => text.clone(),
        Some(Value::Array(items)) if items.iter().all(Value::is_string) => Value::Array(items.clone()),
        Some(Value::Null) | None => Value::Array(Vec::new()),
        Some(other) => return Err(mismatch(input, "a string or an array of strings", other)),
    };
    let nothing = |v: &Value| matches!(v, Value::Array(a) if a.is_empty()) || v.as_str() == Some("");
    if nothing(&texts) {
        return Ok(without_prompt(model, keep_alive, Shape::Generate));
    }
    let mut out = Map::new();
    out.insert("model".to_owned(), model.as_str().into());
    out.insert("input".to_owned(), texts);
    out.insert("encoding_format".to_owned(), "float".into());
    if let Some(dimensions) = map.get("dimensions").filter(|d| !d.is_null()) {
        out.insert("dimensions".to_owned(), dimensions.clone());
    }
    Ok(Asked {
        model,
        wanted: Wanted::Vectors(Value::Object(out)),
        keep_alive,
    })
}

fn without_prompt(model: String, keep_alive: Option<KeepAlive>, shape: Shape) -> Asked {
    let wanted = match keep_alive {
        Some(KeepAlive::For(time)) if time.is_zero() => Wanted::Unload(shape),
        _ => Wanted::Load(shape),
    };
    Asked {
        model,
        wanted,
        keep_alive,
    }
}

/// What all generations have in common.
fn finish(
    map: &Map<String, Value>,
    model: String,
    keep_alive: Option<KeepAlive>,
    path: &'static str,
    mut out: Map<String, Value>,
    shape: Shape,
) -> Result<Asked, ApiError> {
    options(map.get("options"), &mut out)?;
    match map.get("format") {
        None | Some(Value::Null) => {}
        Some(Value::String(word)) if word.is_empty() => {}
        Some(Value::String(word)) if word == "json" => {
            out.insert("response_format".to_owned(), json!({"type": "json_object"}));
        }
        Some(schema @ Value::Object(_)) => {
            let named = json!({"name": "reply", "schema": schema, "strict": true});
            out.insert(
                "response_format".to_owned(),
                json!({"type": "json_schema", "json_schema": named}),
            );
        }
        Some(other) => return Err(mismatch("format", "\"json\" or a JSON schema", other)),
    }
    if path == "/v1/chat/completions" {
        match map.get("think") {
            None | Some(Value::Null) => {}
            Some(Value::Bool(think)) => {
                out.insert(
                    "chat_template_kwargs".to_owned(),
                    json!({"enable_thinking": think}),
                );
            }
            Some(Value::String(level)) if ["low", "medium", "high"].contains(&level.as_str()) => {
                out.insert("reasoning_effort".to_owned(), level.as_str().into());
                out.insert(
                    "chat_template_kwargs".to_owned(),
                    json!({"enable_thinking": true}),
                );
            }
            Some(other) => {
                return Err(mismatch(
                    "think",
                    "true, false, \"low\", \"medium\" or \"high\"",
                    other,
                ));
            }
        }
    }
    for key in ["logprobs", "top_logprobs"] {
        if let Some(value) = map.get(key).filter(|v| !v.is_null()) {
            out.insert(key.to_owned(), value.clone());
        }
    }
    let stream = flag(map, "stream")?.unwrap_or(true);
    // Also for one object: the time of the first token is known only from a stream.
    out.insert("stream".to_owned(), true.into());
    out.insert("stream_options".to_owned(), json!({"include_usage": true}));
    let generation = Generation {
        path,
        body: Value::Object(out),
        stream,
        shape,
    };
    Ok(Asked {
        model,
        wanted: Wanted::Generation(Box::new(generation)),
        keep_alive,
    })
}

/// Sampling. What concerns the loading of a model (`num_ctx`, `num_gpu`, ...) is the registry's, and passed over.
fn options(value: Option<&Value>, out: &mut Map<String, Value>) -> Result<(), ApiError> {
    let options = match value {
        None | Some(Value::Null) => return Ok(()),
        Some(Value::Object(options)) => options,
        Some(other) => return Err(mismatch("options", "an object", other)),
    };
    const SAME: [&str; 8] = [
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
    ];
    for (key, value) in options.iter().filter(|(_, v)| !v.is_null()) {
        match key.as_str() {
            key if SAME.contains(&key) => drop(out.insert(key.to_owned(), value.clone())),
            "repeat_penalty" => drop(out.insert("repetition_penalty".to_owned(), value.clone())),
            "stop" => {
                // An empty list, or empty strings in it, stand for none.
                let texts: Vec<Value> = match value {
                    Value::Array(items) => items.iter().filter(|i| i.as_str() != Some("")).cloned().collect(),
                    Value::String(text) if text.is_empty() => Vec::new(),
                    one => vec![one.clone()],
                };
                if !texts.is_empty() {
                    out.insert("stop".to_owned(), Value::Array(texts));
                }
            }
            "num_predict" => {
                let n = value
                    .as_i64()
                    .ok_or_else(|| mismatch("options.num_predict", "a whole number", value))?;
                // Negative: no limit (-1), or as far as the context goes (-2).
                if n >= 0 {
                    out.insert("max_tokens".to_owned(), n.max(1).into());
                }
            }
            _ => {}
        }
    }
    Ok(())
}

/// Seconds as a number, or Go's notation; negative is for ever.
fn keep_alive(value: Option<&Value>) -> Result<Option<KeepAlive>, ApiError> {
    let wrong = |v: &Value| mismatch("keep_alive", "seconds or a duration such as \"5m\"", v);
    let seconds = |s: f64| {
        if s < 0.0 {
            Some(KeepAlive::Forever)
        } else {
            Duration::try_from_secs_f64(s).ok().map(KeepAlive::For)
        }
    };
    match value {
        None | Some(Value::Null) => Ok(None),
        Some(v @ Value::Number(n)) => n.as_f64().and_then(seconds).map(Some).ok_or_else(|| wrong(v)),
        Some(v @ Value::String(text)) => {
            let text = text.trim();
            let read = match text.strip_prefix('-') {
                Some(rest) => registry::parse_duration(rest).map(|d| {
                    if d.is_zero() {
                        KeepAlive::For(d)
                    } else {
                        KeepAlive::Forever
                    }
                }),
                None => registry::parse_duration(text).map(KeepAlive::For),
            };
            read.map(Some).ok_or_else(|| wrong(v))
        }
        Some(other) => Err(wrong(other)),
    }
}

fn flag(map: &Map<String, Value>, key: &str) -> Result<Option<bool>, ApiError> {
    match map.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Bool(b)) => Ok(Some(*b)),
        Some(other) => Err(mismatch(key, "true or false", other)),
    }
}

fn mismatch(key: &str, want: &str, got: &Value) -> ApiError {
    ApiError::invalid(key, format!("must be {want}, got {}", shown(got)))
}

fn unsupported(key: &str, why: &str) -> ApiError {
    ApiError::invalid(key, format!("is not supported: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn generation(asked: Result<Asked, ApiError>) -> Generation {
        match asked.unwrap().wanted {
            Wanted::Generation(g) => *g,
            other => panic!("{other:?}"),
        }
    }

    fn bytes(value: &Value) -> Vec<u8> {
        value.to_string().into_bytes()
    }

    #[test]
    fn a_chat_with_everything() {
        let body = json!({
            "model": "m", "messages": [{"role": "user", "content": "hi"}], "format": "json", "think": "low",
            "options": {"temperature": 0.1, "num_predict": 9, "top_k": 3, "top_p": 0.5, "min_p": 0, "seed": 7,
                        "stop": ["a", ""], "repeat_penalty": 1.1, "num_ctx": 4096, "mirostat": null},
            "tools": [{"type": "function", "function": {"name": "f"}}], "keep_alive": "1m30s",
        });
        let asked = chat(&bytes(&body)).unwrap();
        assert_eq!(asked.keep_alive, Some(KeepAlive::For(Duration::from_secs(90))));
        let g = generation(Ok(asked));
        assert_eq!(
            (g.path, g.stream, g.shape),
            ("/v1/chat/completions", true, Shape::Chat)
        );
        assert_eq!(
            g.body,
            json!({
                "model": "m", "messages": [{"role": "user", "content": "hi"}],
                "tools": [{"type": "function", "function": {"name": "f"}}],
                "temperature": 0.1, "max_tokens": 9, "top_k": 3, "top_p": 0.5, "min_p": 0, "seed": 7, "stop": ["a"],
                "repetition_penalty": 1.1, "response_format": {"type": "json_object"}, "reasoning_effort": "low",
                "chat_template_kwargs": {"enable_thinking": true},
                "stream": true, "stream_options": {"include_usage": true},
            })
        );
    }

    #[test]
    fn prompts_are_chats_unless_they_are_raw() {
        let ask = |more: Value| {
            let mut body = json!({"model": "m", "prompt": "p", "stream": false});
            body.as_object_mut()
                .unwrap()
                .extend(more.as_object().unwrap().clone());
            generation(generate(&bytes(&body)))
        };
        let templated = ask(json!({"system": "s", "images": ["/9j/x"], "think": false}));
        assert_eq!(templated.path, "/v1/chat/completions");
        assert_eq!(
            templated.body["messages"][0],
            json!({"role": "system", "content": "s"})
        );
        assert_eq!(templated.body["messages"][1]["content"][0]["text"], "p");
        assert_eq!(templated.body["chat_template_kwargs"]["enable_thinking"], false);
        assert_eq!(
            (templated.stream, &templated.body["stream"]),
            (false, &json!(true))
        );
        let raw = ask(json!({"raw": true, "system": "s", "format": {"type": "object"}}));
        assert_eq!((raw.path, &raw.body["prompt"]), ("/v1/completions", &json!("p")));
        assert_eq!(
            raw.body["response_format"]["json_schema"]["schema"],
            json!({"type": "object"})
        );
        assert_eq!(ask(json!({"suffix": "end"})).body["suffix"], "end");
    }

    #[test]
    fn nothing_to_say_loads_or_unloads() {
        let wanted = |body: Value| chat(&bytes(&body)).unwrap().wanted;
        assert_eq!(wanted(json!({"model": "m"})), Wanted::Load(Shape::Chat));
        assert_eq!(
            wanted(json!({"model": "m", "messages": [], "keep_alive": 0})),
            Wanted::Unload(Shape::Chat)
        );
        let asked = generate(&bytes(&json!({"model": "m", "prompt": "", "keep_alive": "0s"}))).unwrap();
        assert_eq!(asked.wanted, Wanted::Unload(Shape::Generate));
        let forever = generate(&bytes(&json!({"model": "m", "keep_alive": -1}))).unwrap();
        assert_eq!(
            (forever.wanted, forever.keep_alive),
            (Wanted::Load(Shape::Generate), Some(KeepAlive::Forever))
        );
        let words = |text: &str| keep_alive(Some(&text.into())).ok().flatten();
        assert_eq!(words("-1m"), Some(KeepAlive::Forever));
        assert_eq!(words("-1"), Some(KeepAlive::Forever));
        assert_eq!(words("300"), Some(KeepAlive::For(Duration::from_secs(300))));
        assert_eq!(words("soon"), None);
    }

    #[test]
    fn vectors() {
        let asked = embed(
            &bytes(&json!({"model": "m", "input": ["a", "b"], "dimensions": 8})),
            "input",
        )
        .unwrap();
        let body = json!({"model": "m", "input": ["a", "b"], "encoding_format": "float", "dimensions": 8});
        assert_eq!(asked.wanted, Wanted::Vectors(body));
        let old = embed(&bytes(&json!({"model": "m", "prompt": "a"})), "prompt").unwrap();
        assert_eq!(
            old.wanted,
            Wanted::Vectors(json!({"model": "m", "input": "a", "encoding_format": "float"}))
        );
    }

    #[test]
    fn mistakes_are_named() {
        let message = |body: Value| chat(&bytes(&body)).unwrap_err().message;
        assert_eq!(message(json!({"messages": []})), "model: is required");
        assert!(message(json!({"model": "m", "messages": "x"})).starts_with("messages: must be an array"));
        let with = |key: &str, value: Value| {
            let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "x"}]});
            body[key] = value;
            message(body)
        };
        assert!(with("format", json!("xml")).starts_with("format:"));
        assert!(with("think", json!("deep")).starts_with("think:"));
        assert!(with("keep_alive", json!("soon")).starts_with("keep_alive:"));
        assert!(with("options", json!([])).starts_with("options:"));
        assert!(with("options", json!({"num_predict": "x"})).starts_with("options.num_predict:"));
        assert!(with("stream", json!("yes")).starts_with("stream:"));
        for (key, value) in [("context", json!([1])), ("template", json!("{{ .Prompt }}"))] {
            let mut body = json!({"model": "m", "prompt": "x"});
            body[key] = value;
            assert!(
                generate(&bytes(&body))
                    .unwrap_err()
                    .message
                    .contains("not supported")
            );
        }
        assert!(chat(b"{").unwrap_err().message.contains("no JSON"));
    }
}

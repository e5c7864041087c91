//! `POST /v1/chat/completions`.

use serde_json::{Map, Value};

use super::messages;
use super::options::GenerationOptions;
use crate::error::ApiError;
use crate::fields::{Fields, mismatch};

/// Which tool the model may, or must, call.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum ToolChoice {
    /// As it likes. The default with tools.
    #[default]
    Auto,
    /// None.
    None,
    /// At least one.
    Required,
    /// This one.
    Function(String),
}

/// A checked request.
#[derive(Debug, Clone, PartialEq)]
pub struct ChatRequest {
    /// The model asked for; a worker has one, so it may be left out.
    pub model: Option<String>,
    /// The conversation in OpenAI's shape, never empty; roles, contents and calls are of the right kinds.
    pub messages: Vec<Value>,
    /// Tool definitions in OpenAI's shape.
    pub tools: Vec<Value>,
    /// Which of them.
    pub tool_choice: ToolChoice,
    /// Whether one reply may hold several calls.
    pub parallel_tool_calls: bool,
    /// `Some(k)`: report log-probabilities, and those of the `k` likeliest tokens (0..=20).
    pub logprobs: Option<usize>,
    /// Variables for the template: `chat_template_kwargs`, with `enable_thinking` and `reasoning_effort` put in.
    pub template_kwargs: Map<String, Value>,
    /// End the prompt with the opening of an assistant's turn. Default: true.
    pub add_generation_prompt: bool,
    /// Go on with the last message, which is the assistant's and has text, rather than begin a new one.
    pub continue_final_message: bool,
    /// The rest.
    pub options: GenerationOptions,
}

impl ChatRequest {
    /// Parses and checks a body.
    ///
    /// # Errors
    /// 400 naming the field and its value.
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let mut fields = Fields::parse(body)?;
        let model = fields.string("model")?.map(str::to_owned);
        let options = GenerationOptions::read(&mut fields)?;
        for (legacy, now) in [("functions", "tools"), ("function_call", "tool_choice")] {
            if fields.get(legacy).is_some() {
                return Err(ApiError::invalid(legacy, format!("is not supported; use {now}")));
            }
        }
        if fields.get("audio").is_some() {
            return Err(ApiError::invalid(
                "audio",
                "is not supported: this model writes text only",
            ));
        }
        let Some(messages) = fields.take_array("messages")? else {
            return Err(ApiError::invalid("messages", "is missing"));
        };
        let messages = messages::check(messages)?;
        let tools = fields.take_array("tools")?.unwrap_or_default();
        messages::check_tools(&tools)?;
        let tool_choice = tool_choice(fields.get("tool_choice"), &tools)?;
        let continue_final_message = fields.bool("continue_final_message")?.unwrap_or(false);
        let add_generation_prompt = fields.bool("add_generation_prompt")?;
        if continue_final_message {
            can_be_continued(&messages, add_generation_prompt, &tool_choice)?;
        }
        Ok(Self {
            model,
            messages,
            tools,
            tool_choice,
            parallel_tool_calls: fields.bool("parallel_tool_calls")?.unwrap_or(true),
            logprobs: logprobs(&fields)?,
            template_kwargs: template_kwargs(&mut fields)?,
            add_generation_prompt: add_generation_prompt.unwrap_or(!continue_final_message),
            continue_final_message,
            options,
        })
    }
}

/// The text with which a message's content ends.
fn last_text(content: &Value) -> Option<&str> {
    match content {
        Value::Array(parts) => parts.last()?.get("text")?.as_str(),
        text => text.as_str(),
    }
}

fn can_be_continued(
    messages: &[Value],
    add_generation_prompt: Option<bool>,
    tool_choice: &ToolChoice,
) -> Result<(), ApiError> {
    let problem = |problem: &str| {
        Err(ApiError::invalid(
            "continue_final_message",
            format!("is true, {problem}"),
        ))
    };
    if add_generation_prompt == Some(true) {
        return problem("and so is add_generation_prompt, which begins a new message");
    }
    if matches!(tool_choice, ToolChoice::Required | ToolChoice::Function(_)) {
        return problem("but tool_choice wants a reply that begins with a call");
    }
    let last = messages.last().unwrap_or(&Value::Null);
    if last.get("role").and_then(Value::as_str) != Some("assistant") {
        return problem("but the last message is not the assistant's");
    }
    if last.get("tool_calls").is_some() {
        return problem("but the last message ends with tool calls");
    }
    let text = last.get("content").and_then(last_text);
    if text.is_none_or(|text| text.trim().is_empty()) {
        return problem("but the last message's content is no text");
    }
    Ok(())
}

fn logprobs(fields: &Fields) -> Result<Option<usize>, ApiError> {
    let wanted = fields.bool("logprobs")?.unwrap_or(false);
    let top = fields
        .integer("top_logprobs", 0, 20)?
        .and_then(|k| usize::try_from(k).ok());
    match (wanted, top) {
        (true, top) => Ok(Some(top.unwrap_or(0))),
        (false, Some(k)) if k > 0 => Err(ApiError::invalid(
            "top_logprobs",
            format!("is {k}, which needs \"logprobs\": true"),
        )),
        (false, _) => Ok(None),
    }
}

fn template_kwargs(fields: &mut Fields) -> Result<Map<String, Value>, ApiError> {
    let mut kwargs = Map::new();
    if let Some(effort) = fields.string("reasoning_effort")? {
        kwargs.insert("reasoning_effort".to_owned(), effort.into());
        if effort == "none" {
            kwargs.insert("enable_thinking".to_owned(), false.into());
        }
    }
    if let Some(thinking) = fields.bool("enable_thinking")? {
        kwargs.insert("enable_thinking".to_owned(), thinking.into());
    }
    // What is written for the template itself has the last word.
    kwargs.extend(fields.take_object("chat_template_kwargs")?.unwrap_or_default());
    Ok(kwargs)
}

fn tool_choice(value: Option<&Value>, tools: &[Value]) -> Result<ToolChoice, ApiError> {
    let needs_tools = |choice: ToolChoice| {
        if tools.is_empty() {
            let wish = value.unwrap_or(&Value::Null);
            return Err(ApiError::invalid(
                "tool_choice",
                format!("is {wish}, but there are no tools"),
            ));
        }
        Ok(choice)
    };
    match value {
        None => Ok(ToolChoice::Auto),
        Some(Value::String(word)) => match word.as_str() {
            "auto" => Ok(ToolChoice::Auto),
            "none" => Ok(ToolChoice::None),
            "required" => needs_tools(ToolChoice::Required),
            _ => Err(mismatch(
                "tool_choice",
                EXPECTED_CHOICE,
                &Value::String(word.clone()),
            )),
        },
        Some(object @ Value::Object(_)) => {
            let name = object.pointer("/function/name").and_then(Value::as_str);
            let Some(name) = name.filter(|_| object.get("type").and_then(Value::as_str) == Some("function"))
            else {
                return Err(mismatch("tool_choice", EXPECTED_CHOICE, object));
            };
            let known = |tool: &Value| tool.pointer("/function/name").and_then(Value::as_str) == Some(name);
            if !tools.iter().any(known) {
                return Err(ApiError::invalid(
                    "tool_choice.function.name",
                    format!("{name:?} is none of the request's tools"),
                ));
            }
            Ok(ToolChoice::Function(name.to_owned()))
        }
        Some(other) => Err(mismatch("tool_choice", EXPECTED_CHOICE, other)),
    }
}

const EXPECTED_CHOICE: &str =
    "\"none\", \"auto\", \"required\" or {\"type\":\"function\",\"function\":{\"name\":...}}";

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(extra: Value) -> Result<ChatRequest, ApiError> {
        let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]});
        for (key, value) in extra.as_object().unwrap() {
            body[key] = value.clone();
        }
        ChatRequest::parse(body.to_string().as_bytes())
    }

    #[test]
    fn a_plain_request_has_the_defaults() {
        let request = parse(json!({})).unwrap();
        assert_eq!(request.model.as_deref(), Some("m"));
        assert_eq!(request.tool_choice, ToolChoice::Auto);
        assert!(request.parallel_tool_calls && request.add_generation_prompt);
        assert_eq!(
            (
                request.options.n,
                request.options.stream,
                request.options.max_tokens
            ),
            (1, false, None)
        );
        assert_eq!(request.options.sampling, super::super::Sampling::default());
        assert_eq!(request.logprobs, None);
    }

    #[test]
    fn known_fields_are_read() {
        let request = parse(json!({
            "temperature": 0, "top_p": 1, "top_k": -1, "min_p": 0.1, "repetition_penalty": 1.5,
            "presence_penalty": -2, "frequency_penalty": 2.0, "logit_bias": {"7": -100, "07": 5}, "seed": -1,
            "stop": "end", "max_tokens": 5, "max_completion_tokens": 7.0, "n": 3, "stream": true,
            "stream_options": {"include_usage": true, "unheard_of": 1}, "logprobs": true, "top_logprobs": 20,
            "enable_thinking": true, "reasoning_effort": "none", "chat_template_kwargs": {"x": [1]},
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
            "tool_choice": {"type": "function", "function": {"name": "f"}}, "parallel_tool_calls": false,
            "unknown": {"a": 1}, "response_format": {"type": "text"}, "stop_token_ids": [1, 2], "user": null,
        }))
        .unwrap();
        let s = &request.options.sampling;
        assert_eq!(
            (s.temperature, s.top_p, s.top_k, s.min_p),
            (Some(0.0), Some(1.0), Some(0), Some(0.1))
        );
        assert_eq!(
            (s.repetition_penalty, s.presence_penalty, s.frequency_penalty),
            (Some(1.5), Some(-2.0), Some(2.0))
        );
        assert_eq!(
            (s.logit_bias.as_slice(), s.seed),
            ([(7, 5.0)].as_slice(), Some(u64::MAX))
        );
        assert_eq!(request.options.stop, ["end"]);
        assert_eq!(request.options.stop_token_ids, [1, 2]);
        assert_eq!((request.options.max_tokens, request.options.n), (Some(7), 3));
        assert!(request.options.stream && request.options.include_usage && !request.parallel_tool_calls);
        assert_eq!(request.logprobs, Some(20));
        assert_eq!(request.tool_choice, ToolChoice::Function("f".into()));
        assert_eq!(
            Value::Object(request.template_kwargs),
            json!({"reasoning_effort": "none", "enable_thinking": true, "x": [1]})
        );
    }

    /// Of two spellings of an id the later one counts; and many ids are no work to speak of.
    #[test]
    fn a_bias_for_every_token_of_a_large_vocabulary() {
        let mut text =
            String::from(r#"{"messages": [{"role": "user", "content": "x"}], "logit_bias": {"007": 5"#);
        for id in (0..100_000).rev() {
            text.push_str(&format!(r#","{id}": 1"#));
        }
        text.push_str(r#","07": 6}}"#);
        let begun = std::time::Instant::now();
        let request = ChatRequest::parse(text.as_bytes()).unwrap();
        assert!(begun.elapsed().as_secs() < 10, "{:?}", begun.elapsed());
        let bias = request.options.sampling.logit_bias;
        assert_eq!(bias.len(), 100_000);
        let expected = |id| if id == 7 { (7, 6.0) } else { (id, 1.0) };
        assert!(bias.into_iter().eq((0..100_000).map(expected)));
    }

    #[test]
    fn errors_name_field_and_value() {
        let tool = json!([{"type": "function", "function": {"name": "f"}}]);
        let table = [
            (json!({"temperature": 2.1}), "temperature", "2.1"),
            (json!({"temperature": -0.5}), "temperature", "-0.5"),
            (json!({"temperature": "hot"}), "temperature", "\"hot\""),
            (json!({"top_p": 0}), "top_p", "got 0"),
            (json!({"top_p": 1.01}), "top_p", "1.01"),
            (json!({"top_p": 1e-46}), "top_p", "got 1e-46"),
            (json!({"top_k": -2}), "top_k", "-2"),
            (json!({"min_p": 1.5}), "min_p", "1.5"),
            (json!({"repetition_penalty": 0}), "repetition_penalty", "got 0"),
            (
                json!({"repetition_penalty": 1e-46}),
                "repetition_penalty",
                "from 0.01 to 10, got 1e-46",
            ),
            (json!({"presence_penalty": 3}), "presence_penalty", "3"),
            (json!({"frequency_penalty": -3}), "frequency_penalty", "-3"),
            (json!({"logit_bias": {"x": 1}}), "logit_bias", "\"x\""),
            (json!({"logit_bias": {"5": 101}}), "logit_bias[\"5\"]", "101"),
            (json!({"logit_bias": [1]}), "logit_bias", "[1]"),
            (
                json!({"stop_token_ids": vec![1; 65]}),
                "stop_token_ids",
                "65 token ids; at most 64",
            ),
            (json!({"seed": 1.5}), "seed", "1.5"),
            (json!({"n": 0}), "n", "got 0"),
            (json!({"n": 17}), "n", "17"),
            (json!({"max_tokens": 0}), "max_tokens", "got 0"),
            (json!({"max_tokens": -1}), "max_tokens", "-1"),
            (
                json!({"max_completion_tokens": "5"}),
                "max_completion_tokens",
                "\"5\"",
            ),
            (json!({"stop": ["a", 1]}), "stop[1]", "got 1"),
            (json!({"stop": ""}), "stop", "empty"),
            (json!({"stop": vec!["a"; 17]}), "stop", "17"),
            (json!({"stop": 5}), "stop", "5"),
            (json!({"stream": "yes"}), "stream", "\"yes\""),
            (json!({"stream_options": true}), "stream_options", "true"),
            (
                json!({"stream_options": {"include_usage": 1}}),
                "stream_options.include_usage",
                "1",
            ),
            (
                json!({"logprobs": true, "top_logprobs": 21}),
                "top_logprobs",
                "21",
            ),
            (json!({"top_logprobs": 3}), "top_logprobs", "3"),
            (json!({"logprobs": 3}), "logprobs", "3"),
            (json!({"response_format": "text"}), "response_format", "\"text\""),
            (json!({"model": 5}), "model", "5"),
            (json!({"messages": []}), "messages", "empty"),
            (json!({"messages": null}), "messages", "missing"),
            (json!({"messages": "hi"}), "messages", "\"hi\""),
            (json!({"messages": ["hi"]}), "messages[0]", "\"hi\""),
            (
                json!({"messages": [{"content": "hi"}]}),
                "messages[0].role",
                "missing",
            ),
            (
                json!({"messages": [{"role": "king", "content": "hi"}]}),
                "messages[0].role",
                "\"king\"",
            ),
            (
                json!({"messages": [{"role": "user"}]}),
                "messages[0].content",
                "missing",
            ),
            (
                json!({"messages": [{"role": "user", "content": 5}]}),
                "messages[0].content",
                "5",
            ),
            (
                json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"},
                    {"type": "image_url", "image_url": {"url": "u"}}]}]}),
                "messages[0].content[1].type",
                "image_url",
            ),
            (
                json!({"messages": [{"role": "user", "content": [{"type": "text"}]}]}),
                "messages[0].content[0].text",
                "missing",
            ),
            (
                json!({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": ""}}]}]}),
                "messages[0].tool_calls[0].function.name",
                "\"\"",
            ),
            (
                json!({"messages": [{"role": "user", "content": "x",
                    "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]}),
                "messages[0].tool_calls",
                "user",
            ),
            (json!({"tools": [{"type": "magic"}]}), "tools[0].type", "magic"),
            (
                json!({"tools": [{"type": "function"}]}),
                "tools[0].function",
                "null",
            ),
            (
                json!({"tools": [{"type": "function", "function": {}}]}),
                "tools[0].function.name",
                "null",
            ),
            (json!({"tool_choice": "required"}), "tool_choice", "no tools"),
            (
                json!({"tool_choice": "maybe", "tools": tool}),
                "tool_choice",
                "maybe",
            ),
            (
                json!({"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": tool}),
                "tool_choice.function.name",
                "\"g\"",
            ),
            (json!({"functions": []}), "functions", "tools"),
            (json!({"timeout": 0}), "timeout", "got 0"),
            (json!({"timeout": "1s"}), "timeout", "1s"),
            (json!({"min_tokens": -1}), "min_tokens", "-1"),
            (
                json!({"min_tokens": 6, "max_tokens": 5}),
                "min_tokens",
                "is 6, which is more than max_tokens (5)",
            ),
            (
                json!({"continue_final_message": true}),
                "continue_final_message",
                "not the assistant's",
            ),
            (
                json!({"continue_final_message": true, "add_generation_prompt": true}),
                "continue_final_message",
                "add_generation_prompt",
            ),
            (
                json!({"continue_final_message": true, "messages": [{"role": "assistant", "content": " "}]}),
                "continue_final_message",
                "no text",
            ),
            (
                json!({"continue_final_message": true, "tools": tool, "tool_choice": "required"}),
                "continue_final_message",
                "tool_choice",
            ),
            (json!({"enable_thinking": "yes"}), "enable_thinking", "\"yes\""),
            (
                json!({"chat_template_kwargs": [1]}),
                "chat_template_kwargs",
                "[1]",
            ),
        ];
        for (extra, param, part) in table {
            let error = parse(extra.clone()).expect_err(&extra.to_string());
            assert_eq!(error.status, 400, "{extra}");
            assert_eq!(error.param.as_deref(), Some(param), "{extra}");
            assert!(error.message.starts_with(param), "{extra}: {}", error.message);
            assert!(error.message.contains(part), "{extra}: {}", error.message);
        }
    }

    #[test]
    fn contents_are_brought_into_one_form() {
        let request = parse(json!({"messages": [
            {"role": "developer", "content": null},
            {"role": "assistant", "tool_calls": [], "reasoning": "because"},
            {"role": "tool", "content": [{"type": "text", "text": "4"}], "tool_call_id": "c1"},
        ]}))
        .unwrap();
        assert_eq!(request.messages[0], json!({"role": "developer", "content": ""}));
        assert_eq!(
            request.messages[1],
            json!({"role": "assistant", "reasoning": "because", "content": null, "reasoning_content": "because"})
        );
        assert_eq!(request.messages[2]["content"][0]["text"], "4");
    }
}

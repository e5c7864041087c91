//! An OpenAI stream to the parts of an Ollama reply. Parts follow events, never the way the bytes were cut.

use api_types::sse::Decoder;
use serde_json::{Map, Value, json};

/// One thing that a reply says.
#[derive(Clone, Debug, PartialEq)]
pub enum Part {
    /// A piece of the text, of the reasoning, or of both.
    Text {
        /// For the reader.
        content: String,
        /// The model's reasoning.
        thinking: String,
        /// As OpenAI has them, when asked for.
        logprobs: Option<Value>,
    },
    /// Complete tool calls, in Ollama's form.
    Calls(Vec<Value>),
    /// The end of a complete reply.
    End(End),
    /// It broke off, for this reason.
    Failed(String),
}

/// What is known at the end.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct End {
    /// `stop` or `length`.
    pub reason: &'static str,
    /// Tokens of the prompt.
    pub prompt_tokens: Option<u64>,
    /// Tokens generated.
    pub completion_tokens: Option<u64>,
    /// Milliseconds for prompt and generation, by the server's own clock (llama.cpp's `timings`).
    pub measured_ms: Option<(f64, f64)>,
}

/// Puts parts together from the bytes of a stream.
#[derive(Debug, Default)]
pub struct Translator {
    decoder: Decoder,
    /// The call whose arguments are still coming: its index, id, name and arguments.
    call: Option<(u64, String, String, String)>,
    reason: Option<&'static str>,
    usage: Value,
    timings: Value,
    over: bool,
}

impl Translator {
    /// At the start of a stream.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next bytes; gives the parts that they complete.
    pub fn push(&mut self, bytes: &[u8]) -> Vec<Part> {
        let mut parts = Vec::new();
        for event in self.decoder.push(bytes) {
            if self.over {
                break;
            }
            if event.data == "[DONE]" {
                self.end(&mut parts);
            } else if let Ok(value) = serde_json::from_str::<Value>(&event.data) {
                self.event(value, &mut parts);
            }
        }
        parts
    }

    /// The stream has come to its end, well or badly: without an end mark a reply is complete if it said why it ended.
    pub fn finish(&mut self) -> Vec<Part> {
        let mut parts = Vec::new();
        if self.over {
        } else if self.reason.is_some() {
            self.end(&mut parts);
        } else {
            self.over = true;
            parts.push(Part::Failed("the reply ended before it was complete".to_owned()));
        }
        parts
    }

    /// The parts of a reply that came whole, not as a stream.
    pub fn whole(reply: Value) -> Vec<Part> {
        let mut translator = Self::new();
        let mut parts = Vec::new();
        translator.event(reply, &mut parts);
        parts.extend(translator.finish());
        parts
    }

    fn event(&mut self, mut event: Value, parts: &mut Vec<Part>) {
        if let Some(error) = event.get("error").filter(|e| !e.is_null()) {
            self.over = true;
            parts.push(Part::Failed(error_text(error)));
            return;
        }
        for (key, kept) in [("usage", &mut self.usage), ("timings", &mut self.timings)] {
            if let Some(value @ Value::Object(_)) = event.get_mut(key) {
                *kept = value.take();
            }
        }
        let choices = event.get_mut("choices").and_then(Value::as_array_mut);
        let own = |c: &&mut Value| c.get("index").and_then(Value::as_u64).unwrap_or(0) == 0;
        let Some(choice) = choices.and_then(|c| c.iter_mut().find(own)) else {
            return;
        };
        let logprobs = choice
            .pointer_mut("/logprobs/content")
            .map(Value::take)
            .filter(Value::is_array);
        let mut said = match choice.get_mut("delta").or(None) {
            Some(delta) => delta.take(),
            None => choice.get_mut("message").map(Value::take).unwrap_or_default(),
        };
        let text = |said: &Value, keys: &[&str]| {
            let found = keys
                .iter()
                .find_map(|k| said.get(*k)?.as_str().filter(|t| !t.is_empty()));
            found.unwrap_or_default().to_owned()
        };
        let thinking = text(&said, &["reasoning_content", "reasoning"]);
        let mut content = text(&said, &["content"]);
        if content.is_empty() {
            // `/v1/completions` has the text beside, not inside.
            content = text(choice, &["text"]);
        }
        if !(content.is_empty() && thinking.is_empty() && logprobs.is_none()) {
            parts.push(Part::Text {
                content,
                thinking,
                logprobs,
            });
        }
        if let Some(Value::Array(calls)) = said.get_mut("tool_calls").map(Value::take) {
            for (i, call) in calls.iter().enumerate() {
                self.call(i, call, parts);
            }
        }
        if let Some(reason) = choice.get("finish_reason").and_then(Value::as_str) {
            self.reason = Some(if reason == "length" { "length" } else { "stop" });
            self.flush(parts);
        }
    }

    /// A piece of a call, or a whole one.
    fn call(&mut self, position: usize, piece: &Value, parts: &mut Vec<Part>) {
        let text = |path: &str| piece.pointer(path).and_then(Value::as_str).unwrap_or_default();
        let index = piece
            .get("index")
            .and_then(Value::as_u64)
            .unwrap_or(position as u64);
        if self.call.as_ref().is_some_and(|(open, ..)| *open != index) {
            self.flush(parts);
        }
        let (_, id, name, arguments) = self
            .call
            .get_or_insert_with(|| (index, String::new(), String::new(), String::new()));
        id.push_str(text("/id"));
        name.push_str(text("/function/name"));
        match piece.pointer("/function/arguments") {
            Some(object @ Value::Object(_)) => *arguments = object.to_string(),
            _ => arguments.push_str(text("/function/arguments")),
        }
    }

    /// The open call is complete.
    fn flush(&mut self, parts: &mut Vec<Part>) {
        let Some((index, id, name, arguments)) = self.call.take() else {
            return;
        };
        let mut function = Map::new();
        function.insert("index".to_owned(), index.into());
        function.insert("name".to_owned(), name.into());
        function.insert("arguments".to_owned(), arguments_of(&arguments));
        let mut call = Map::new();
        if !id.is_empty() {
            call.insert("id".to_owned(), id.into());
        }
        call.insert("function".to_owned(), Value::Object(function));
        let call = Value::Object(call);
        // Calls that end together are told together.
        match parts.last_mut() {
            Some(Part::Calls(calls)) => calls.push(call),
            _ => parts.push(Part::Calls(vec![call])),
        }
    }

    fn end(&mut self, parts: &mut Vec<Part>) {
        self.flush(parts);
        self.over = true;
        let count = |key: &str| self.usage.get(key).and_then(Value::as_u64);
        let ms = |key: &str| self.timings.get(key).and_then(Value::as_f64);
        parts.push(Part::End(End {
            reason: self.reason.unwrap_or("stop"),
            prompt_tokens: count("prompt_tokens"),
            completion_tokens: count("completion_tokens"),
            measured_ms: ms("prompt_ms").zip(ms("predicted_ms")),
        }));
    }
}

/// Arguments as the object that Ollama's clients expect. What is no object is not thrown away.
fn arguments_of(text: &str) -> Value {
    if text.trim().is_empty() {
        return json!({});
    }
    match serde_json::from_str(text) {
        Ok(object @ Value::Object(_)) => object,
        _ => json!({ "_raw": text }),
    }
}

/// The sentence of an error in any of the usual forms.
#[must_use]
pub fn error_text(error: &Value) -> String {
    let message = error
        .get("message")
        .or_else(|| error.get("detail"))
        .unwrap_or(error);
    message
        .as_str()
        .map_or_else(|| message.to_string(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn text(content: &str, thinking: &str) -> Part {
        Part::Text {
            content: content.into(),
            thinking: thinking.into(),
            logprobs: None,
        }
    }

    fn end(reason: &'static str, prompt: u64, completion: u64) -> Part {
        Part::End(End {
            reason,
            prompt_tokens: Some(prompt),
            completion_tokens: Some(completion),
            measured_ms: None,
        })
    }

    fn stream(events: &[Value]) -> String {
        let mut out: String = events.iter().map(|e| format!("data: {e}\n\n")).collect();
        out.push_str("data: [DONE]\n\n");
        out
    }

    fn delta(delta: Value) -> Value {
        json!({"choices": [{"index": 0, "delta": delta, "finish_reason": null}]})
    }

    fn example() -> String {
        let piece = |i: u64, more: Value| {
            let mut call = json!({"index": i});
            call.as_object_mut()
                .unwrap()
                .extend(more.as_object().unwrap().clone());
            delta(json!({"tool_calls": [call]}))
        };
        let begun = ": keep-alive\n\n".to_owned();
        begun
            + &stream(&[
                delta(json!({"role": "assistant", "content": ""})),
                delta(json!({"reasoning_content": "hm"})),
                delta(json!({"content": "é🦀"})),
                json!({"choices": [{"index": 1, "delta": {"content": "another choice"}}]}),
                piece(
                    0,
                    json!({"id": "a", "function": {"name": "f", "arguments": "{\"x\""}}),
                ),
                piece(0, json!({"function": {"arguments": ": 1}"}})),
                piece(1, json!({"id": "b", "function": {"name": "g", "arguments": ""}})),
                json!({"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]}),
                json!({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}),
            ])
    }

    #[test]
    fn text_reasoning_calls_and_counts() {
        let parts = Translator::new().push(example().as_bytes());
        let call = |id: &str, index: u64, name: &str, arguments: Value| json!({"id": id, "function": {"index": index, "name": name, "arguments": arguments}});
        assert_eq!(
            parts,
            [
                text("", "hm"),
                text("é🦀", ""),
                Part::Calls(vec![
                    call("a", 0, "f", json!({"x": 1})),
                    call("b", 1, "g", json!({}))
                ]),
                end("stop", 7, 3),
            ]
            .into_iter()
            .collect::<Vec<_>>()
        );
    }

    #[test]
    fn completions_timings_and_lengths() {
        let mut translator = Translator::new();
        let events = stream(&[
            json!({"choices": [{"index": 0, "text": "ab", "finish_reason": null}]}),
            json!({"choices": [{"index": 0, "text": "c", "finish_reason": "length"}],
                   "usage": {"prompt_tokens": 2, "completion_tokens": 2}, "timings": {"prompt_ms": 1.5, "predicted_ms": 4}}),
        ]);
        let parts = translator.push(events.as_bytes());
        assert_eq!(parts[..2], [text("ab", ""), text("c", "")]);
        let Part::End(end) = &parts[2] else {
            panic!("{parts:?}")
        };
        assert_eq!((end.reason, end.measured_ms), ("length", Some((1.5, 4.0))));
        assert!(translator.finish().is_empty(), "it was over already");
    }

    #[test]
    fn ends_that_are_none() {
        let begun = format!("data: {}\n\n", delta(json!({"content": "x"})));
        let mut cut = Translator::new();
        assert_eq!(cut.push(begun.as_bytes()), [text("x", "")]);
        assert!(matches!(cut.finish().as_slice(), [Part::Failed(_)]));
        let mut failed = Translator::new();
        let error = format!(
            "{begun}data: {}\n\n",
            json!({"error": {"message": "died", "type": "x"}})
        );
        assert_eq!(failed.push(error.as_bytes())[1], Part::Failed("died".into()));
        assert!(failed.push(b"data: [DONE]\n\n").is_empty() && failed.finish().is_empty());
        // Servers that leave the end mark out have said why they ended.
        let mut unmarked = Translator::new();
        let last = json!({"choices": [{"delta": {}, "finish_reason": "stop"}]});
        unmarked.push(format!("{begun}data: {last}\n\n").as_bytes());
        assert!(matches!(unmarked.finish().as_slice(), [Part::End(_)]));
    }

    #[test]
    fn whole_replies() {
        let reply = json!({"choices": [{"index": 0, "finish_reason": "tool_calls", "message": {"content": null,
            "reasoning": "r", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "no json"}}]}}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 2}});
        let parts = Translator::whole(reply);
        assert_eq!(parts[0], text("", "r"));
        let Part::Calls(calls) = &parts[1] else {
            panic!("{parts:?}")
        };
        assert_eq!(calls[0]["function"]["arguments"], json!({"_raw": "no json"}));
        assert_eq!(parts[2], end("stop", 1, 2));
    }

    proptest! {
        #[test]
        fn cuts_make_no_difference(cuts in proptest::collection::vec(0usize..1200, 0..12)) {
            let text = example();
            let text = text.as_bytes();
            let expected = Translator::new().push(text);
            let mut cuts: Vec<usize> = cuts.into_iter().map(|c| c.min(text.len())).collect();
            cuts.sort_unstable();
            let mut translator = Translator::new();
            let mut parts = Vec::new();
            let mut at = 0;
            for cut in cuts.into_iter().chain([text.len()]) {
                parts.extend(translator.push(&text[at..cut]));
                at = cut;
            }
            parts.extend(translator.finish());
            // Whether two calls that follow each other share a line is a matter of when they came.
            prop_assert_eq!(flat(parts), flat(expected));
        }
    }

    fn flat(parts: Vec<Part>) -> Vec<Part> {
        let each = |part: Part| match part {
            Part::Calls(calls) => calls.into_iter().map(|c| Part::Calls(vec![c])).collect(),
            other => vec![other],
        };
        parts.into_iter().flat_map(each).collect()
    }
}

//! Parts of a reply as Ollama writes them: a line each, or one object of all.

use std::time::Duration;

use serde_json::{Map, Value, json};

use super::stream::{End, Part};
use super::{Shape, Times};

/// Who speaks, and in which form.
#[derive(Clone, Debug)]
pub struct Voice {
    /// `/api/chat` or `/api/generate`.
    pub shape: Shape,
    /// The model's name as the client wrote it.
    pub model: String,
}

impl Voice {
    /// One part as a line of a stream, without its newline. `now` is the time of day in RFC 3339.
    #[must_use]
    pub fn line(&self, part: &Part, now: &str, times: &Times) -> Value {
        match part {
            Part::Text {
                content,
                thinking,
                logprobs,
            } => {
                let mut line = self.said(now, content, thinking, None);
                if let Some(logprobs) = logprobs {
                    line.insert("logprobs".to_owned(), logprobs.clone());
                }
                line.insert("done".to_owned(), false.into());
                Value::Object(line)
            }
            Part::Calls(calls) => {
                let mut line = self.said(now, "", "", Some(calls));
                line.insert("done".to_owned(), false.into());
                Value::Object(line)
            }
            Part::End(end) => {
                let mut line = self.said(now, "", "", None);
                finish(&mut line, end, times);
                Value::Object(line)
            }
            Part::Failed(why) => json!({ "error": why }),
        }
    }

    /// All parts as one reply.
    ///
    /// # Errors
    /// The reply broke off, for this reason.
    pub fn whole(&self, parts: Vec<Part>, now: &str, times: &Times) -> Result<Value, String> {
        let (mut content, mut thinking) = (String::new(), String::new());
        let (mut calls, mut logprobs) = (Vec::new(), Vec::new());
        for part in parts {
            match part {
                Part::Text {
                    content: text,
                    thinking: thought,
                    logprobs: more,
                } => {
                    content.push_str(&text);
                    thinking.push_str(&thought);
                    if let Some(Value::Array(more)) = more {
                        logprobs.extend(more);
                    }
                }
                Part::Calls(more) => calls.extend(more),
                Part::Failed(why) => return Err(why),
                Part::End(end) => {
                    let calls = (!calls.is_empty()).then_some(calls.as_slice());
                    let mut reply = self.said(now, &content, &thinking, calls);
                    if !logprobs.is_empty() {
                        reply.insert("logprobs".to_owned(), Value::Array(logprobs));
                    }
                    finish(&mut reply, &end, times);
                    return Ok(Value::Object(reply));
                }
            }
        }
        Err("the reply ended before it was complete".to_owned())
    }

    /// The answer to a request that only loads or unloads.
    #[must_use]
    pub fn nothing(&self, now: &str, reason: &str) -> Value {
        let mut reply = self.said(now, "", "", None);
        reply.insert("done".to_owned(), true.into());
        reply.insert("done_reason".to_owned(), reason.into());
        Value::Object(reply)
    }

    fn said(&self, now: &str, content: &str, thinking: &str, calls: Option<&[Value]>) -> Map<String, Value> {
        let mut out = Map::new();
        out.insert("model".to_owned(), self.model.as_str().into());
        out.insert("created_at".to_owned(), now.into());
        let mut message = Map::new();
        let text = match self.shape {
            Shape::Chat => {
                message.insert("role".to_owned(), "assistant".into());
                "content"
            }
            Shape::Generate => "response",
        };
        message.insert(text.to_owned(), content.into());
        if !thinking.is_empty() {
            message.insert("thinking".to_owned(), thinking.into());
        }
        if let Some(calls) = calls {
            message.insert("tool_calls".to_owned(), calls.into());
        }
        match self.shape {
            Shape::Chat => drop(out.insert("message".to_owned(), Value::Object(message))),
            Shape::Generate => out.extend(message),
        }
        out
    }
}

fn finish(out: &mut Map<String, Value>, end: &End, times: &Times) {
    out.insert("done".to_owned(), true.into());
    out.insert("done_reason".to_owned(), end.reason.into());
    let forwarded = times.forwarded.unwrap_or_default();
    // A reply without a single token was all prompt.
    let first = times.first.unwrap_or(times.end);
    let ms = |ms: f64| Duration::try_from_secs_f64(ms / 1e3).unwrap_or_default();
    let (prompt, generation) = match end.measured_ms {
        Some((prompt, generation)) => (ms(prompt), ms(generation)),
        None => (first.saturating_sub(forwarded), times.end.saturating_sub(first)),
    };
    let mut put = |key: &str, value: Value| drop(out.insert(key.to_owned(), value));
    put("total_duration", nanoseconds(times.end));
    put("load_duration", nanoseconds(forwarded));
    if let Some(n) = end.prompt_tokens {
        put("prompt_eval_count", n.into());
    }
    put("prompt_eval_duration", nanoseconds(prompt));
    if let Some(n) = end.completion_tokens {
        put("eval_count", n.into());
    }
    // Clients divide by it.
    put(
        "eval_duration",
        nanoseconds(generation.max(Duration::from_nanos(1))),
    );
}

fn nanoseconds(time: Duration) -> Value {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX).into()
}

/// The reply of `/api/embed` from that of `/v1/embeddings`.
///
/// # Errors
/// It holds no vectors; says so.
pub fn vectors(model: &str, mut reply: Value, times: &Times) -> Result<Value, String> {
    let vectors = vectors_of(&mut reply)?;
    let mut out = json!({
        "model": model,
        "embeddings": vectors,
        "total_duration": nanoseconds(times.end),
        "load_duration": nanoseconds(times.forwarded.unwrap_or_default()),
    });
    let count = reply.pointer("/usage/prompt_tokens").and_then(Value::as_u64);
    if let (Some(n), Some(map)) = (count, out.as_object_mut()) {
        map.insert("prompt_eval_count".to_owned(), n.into());
    }
    Ok(out)
}

/// The reply of `/api/embeddings`: one vector and nothing else.
///
/// # Errors
/// As [`vectors`].
pub fn one_vector(mut reply: Value) -> Result<Value, String> {
    let first = vectors_of(&mut reply)?.into_iter().next();
    Ok(json!({"embedding": first.ok_or("the model's server returned no vector")?}))
}

fn vectors_of(reply: &mut Value) -> Result<Vec<Value>, String> {
    let rows = reply.get_mut("data").and_then(Value::as_array_mut);
    let rows = rows.ok_or("the model's server returned no vectors")?;
    // The order is that of the indexes, not of the rows.
    rows.sort_by_key(|row| row.get("index").and_then(Value::as_u64));
    let vector = |row: &mut Value| row.get_mut("embedding").map(Value::take).filter(Value::is_array);
    let vectors: Option<Vec<Value>> = rows.iter_mut().map(vector).collect();
    vectors.ok_or_else(|| "the model's server returned something else than vectors of numbers".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMES: Times = Times {
        forwarded: Some(Duration::from_millis(100)),
        first: Some(Duration::from_millis(150)),
        end: Duration::from_millis(400),
    };

    fn parts() -> Vec<Part> {
        let text = |content: &str, thinking: &str| Part::Text {
            content: content.into(),
            thinking: thinking.into(),
            logprobs: None,
        };
        let end = End {
            reason: "stop",
            prompt_tokens: Some(5),
            completion_tokens: Some(2),
            measured_ms: None,
        };
        vec![
            text("", "t"),
            text("a", ""),
            Part::Calls(vec![json!({"function": {"name": "f"}})]),
            text("b", ""),
            Part::End(end),
        ]
    }

    #[test]
    fn lines_and_one_object_say_the_same() {
        let voice = Voice {
            shape: Shape::Chat,
            model: "m:latest".into(),
        };
        let lines: Vec<Value> = parts().iter().map(|p| voice.line(p, "now", &TIMES)).collect();
        assert_eq!(
            lines[0],
            json!({"model": "m:latest", "created_at": "now", "done": false,
                   "message": {"role": "assistant", "content": "", "thinking": "t"}})
        );
        assert_eq!(lines[2]["message"]["tool_calls"][0]["function"]["name"], "f");
        let last = json!({"model": "m:latest", "created_at": "now", "message": {"role": "assistant", "content": ""},
            "done": true, "done_reason": "stop", "total_duration": 400_000_000, "load_duration": 100_000_000,
            "prompt_eval_count": 5, "prompt_eval_duration": 50_000_000, "eval_count": 2, "eval_duration": 250_000_000});
        assert_eq!(lines[4], last);
        let mut whole = voice.whole(parts(), "now", &TIMES).unwrap();
        assert_eq!(
            whole["message"].take(),
            json!({"role": "assistant", "content": "ab", "thinking": "t", "tool_calls": [{"function": {"name": "f"}}]})
        );
        for key in [
            "done",
            "done_reason",
            "total_duration",
            "eval_count",
            "eval_duration",
        ] {
            assert_eq!(whole[key], last[key], "{key}");
        }
    }

    #[test]
    fn generations_and_failures() {
        let voice = Voice {
            shape: Shape::Generate,
            model: "m".into(),
        };
        let whole = voice.whole(parts(), "now", &TIMES).unwrap();
        assert_eq!(
            (&whole["response"], &whole["thinking"]),
            (&json!("ab"), &json!("t"))
        );
        assert_eq!(
            voice.line(&Part::Failed("why".into()), "", &TIMES),
            json!({"error": "why"})
        );
        let failed = vec![Part::Failed("why".into())];
        assert_eq!(voice.whole(failed, "", &TIMES), Err("why".into()));
        assert!(voice.whole(Vec::new(), "", &TIMES).is_err());
        assert_eq!(voice.nothing("now", "load")["done_reason"], "load");
    }

    #[test]
    fn vectors_in_order() {
        let reply = || {
            json!({"data": [{"index": 1, "embedding": [2.5]}, {"index": 0, "embedding": [1]}],
                              "usage": {"prompt_tokens": 4}})
        };
        let out = vectors("m", reply(), &TIMES).unwrap();
        assert_eq!(
            (&out["embeddings"], &out["prompt_eval_count"]),
            (&json!([[1], [2.5]]), &json!(4))
        );
        assert_eq!(one_vector(reply()).unwrap(), json!({"embedding": [1]}));
        assert!(vectors("m", json!({}), &TIMES).is_err());
        assert!(one_vector(json!({"data": [{"embedding": "AAAA"}]})).is_err());
    }
}

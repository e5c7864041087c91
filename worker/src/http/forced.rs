//! A call that `tool_choice` forces: how the reply begins, and what binds its arguments to the tool's schema.

use api_types::ApiError;
use api_types::openai::ToolChoice;
use chat_format::ToolFormat;
use constraint::Calls;
use serde_json::{Value, json};

/// How a call begins in Hermes' markup, up to the tool's name.
const BEGIN: &str = "<tool_call>\n{\"name\": ";

/// A forced call.
#[derive(Debug)]
pub(super) struct Forced {
    /// The beginning of the reply, in the model's own markup: it is put into the prompt.
    pub(super) text: String,
    /// What follows it.
    pub(super) calls: Calls,
    /// Of each of these tools, where its schema was written.
    pub(super) schemas: Vec<Schema>,
}

/// The schema of a tool's arguments in a request.
#[derive(Debug)]
pub(super) struct Schema {
    /// Such as `tools[2].function.parameters`.
    pub(super) field: String,
    /// The client wants no call that does not follow it.
    pub(super) strict: bool,
}

/// The beginning of a reply that calls one of `tools`, and what may follow.
///
/// # Errors
/// 400: nobody knows how this model writes calls.
pub(super) fn force(
    format: ToolFormat,
    choice: &ToolChoice,
    tools: &[Value],
    several: bool,
) -> Result<Forced, ApiError> {
    if format != ToolFormat::Hermes {
        return Err(ApiError::invalid(
            "tool_choice",
            format!("a call cannot be forced on this model: its tool-call format is {format}"),
        ));
    }
    let rest = |name: &str| format!("{}, \"arguments\": ", Value::from(name));
    // With one tool the prompt goes as far as its arguments, else up to the quote before the name.
    let (text, cut) = match choice {
        ToolChoice::Function(name) => (format!("{BEGIN}{}", rest(name)), rest(name).len()),
        _ => (format!("{BEGIN}\""), 1),
    };
    let mut calls = Calls {
        tools: Vec::new(),
        end: "}\n</tool_call>".to_owned(),
        between: None,
    };
    if several && !matches!(choice, ToolChoice::Function(_)) {
        calls.between = Some(format!("\n{BEGIN}\""));
    }
    let mut schemas = Vec::new();
    for (at, tool) in tools.iter().enumerate() {
        let function = tool.get("function").unwrap_or(&Value::Null);
        let name = function.get("name").and_then(Value::as_str).unwrap_or_default();
        if matches!(choice, ToolChoice::Function(wanted) if wanted != name) {
            continue;
        }
        let begin = rest(name).get(cut..).unwrap_or_default().to_owned();
        calls.tools.push((begin, arguments(function.get("parameters"))));
        schemas.push(Schema {
            field: format!("tools[{at}].function.parameters"),
            strict: function.get("strict") == Some(&Value::Bool(true)),
        });
    }
    Ok(Forced { text, calls, schemas })
}

/// The schema of a tool's arguments, which are an object whether or not it says so.
fn arguments(parameters: Option<&Value>) -> Value {
    match parameters {
        Some(Value::Object(map)) => {
            let mut map = map.clone();
            map.entry("type").or_insert_with(|| "object".into());
            Value::Object(map)
        }
        _ => any_arguments(),
    }
}

/// Of a tool that does not say what it takes.
pub(super) fn any_arguments() -> Value {
    json!({"type": "object"})
}

//! The form that a reply has to have: OpenAI's `response_format`, vLLM's `structured_outputs` and its older `guided_*` fields.

use serde_json::{Map, Value};

use crate::error::{ApiError, shown};
use crate::fields::{Fields, mismatch};

/// What was asked for.
#[derive(Debug, Clone, PartialEq)]
pub enum Form {
    /// Any JSON object.
    JsonObject,
    /// JSON under this schema.
    JsonSchema(Map<String, Value>),
    /// What this regular expression matches.
    Regex(String),
    /// One of these, each of them at least a character.
    Choice(Vec<String>),
    /// What this grammar derives.
    Grammar(String),
}

/// A form, and the field that asked for it.
#[derive(Debug, Clone, PartialEq)]
pub struct AskedForm {
    /// Such as `response_format.json_schema.schema`: where the form is written, for messages.
    pub field: String,
    /// The form.
    pub form: Form,
}

/// Most texts to choose from.
const MAX_CHOICES: usize = 10_000;

const EXPECTED_FORMAT: &str = "an object with a \"type\" of \"text\", \"json_object\" or \"json_schema\"";

/// vLLM's older names of the keys of `structured_outputs`.
const GUIDED: [(&str, &str); 4] = [
    ("guided_json", "json"),
    ("guided_regex", "regex"),
    ("guided_choice", "choice"),
    ("guided_grammar", "grammar"),
];

/// Reads all the fields that can ask for a form.
///
/// # Errors
/// 400 for a wrong value, and for two fields that ask.
pub(crate) fn read(fields: &Fields) -> Result<Option<AskedForm>, ApiError> {
    let mut asked: Vec<AskedForm> = Vec::new();
    if let Some(value) = fields.get("response_format") {
        asked.extend(response_format(value)?);
    }
    if let Some(value) = fields.get("structured_outputs") {
        asked.extend(structured_outputs(value)?);
    }
    for (field, key) in GUIDED {
        if let Some(value) = fields.get(field) {
            asked.push(form(field, key, value)?);
        }
    }
    let mut asked = asked.into_iter();
    match (asked.next(), asked.next()) {
        (Some(first), Some(second)) => Err(ApiError::invalid(
            second.field,
            format!("cannot be combined with {}: a reply has one form", first.field),
        )),
        (first, _) => Ok(first),
    }
}

fn response_format(value: &Value) -> Result<Option<AskedForm>, ApiError> {
    match value.get("type").and_then(Value::as_str) {
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some(AskedForm {
            field: "response_format".to_owned(),
            form: Form::JsonObject,
        })),
        Some("json_schema") => {
            let outer = value.get("json_schema").unwrap_or(&Value::Null);
            let Some(map) = outer.as_object() else {
                return Err(mismatch(
                    "response_format.json_schema",
                    "an object with a \"schema\"",
                    outer,
                ));
            };
            for (key, what, fits) in [
                ("name", "a string", Value::is_string as fn(&Value) -> bool),
                ("strict", "true or false", Value::is_boolean),
            ] {
                if let Some(other) = map.get(key).filter(|value| !value.is_null() && !fits(value)) {
                    return Err(mismatch(
                        &format!("response_format.json_schema.{key}"),
                        what,
                        other,
                    ));
                }
            }
            let schema = map.get("schema").unwrap_or(&Value::Null);
            form("response_format.json_schema.schema", "json", schema).map(Some)
        }
        _ => Err(mismatch("response_format", EXPECTED_FORMAT, value)),
    }
}

fn structured_outputs(value: &Value) -> Result<Option<AskedForm>, ApiError> {
    const EXPECTED: &str =
        "an object with one of \"json\", \"json_object\", \"regex\", \"choice\" and \"grammar\"";
    let Some(map) = value.as_object() else {
        return Err(mismatch("structured_outputs", EXPECTED, value));
    };
    if map.get("structural_tag").is_some_and(|value| !value.is_null()) {
        return Err(ApiError::invalid(
            "structured_outputs.structural_tag",
            format!("is not supported; structured_outputs must be {EXPECTED}"),
        )
        .with_code("unsupported_value"));
    }
    let given: Vec<(&str, &Value)> = ["json", "json_object", "regex", "choice", "grammar"]
        .iter()
        .filter_map(|key| Some((*key, map.get(*key).filter(|value| !value.is_null())?)))
        .collect();
    match given.as_slice() {
        [(key, value)] => {
            let field = format!("structured_outputs.{key}");
            match (*key, value) {
                ("json_object", Value::Bool(true)) => Ok(Some(AskedForm {
                    field,
                    form: Form::JsonObject,
                })),
                ("json_object", Value::Bool(false)) => Ok(None),
                ("json_object", other) => Err(mismatch(&field, "true or false", other)),
                (key, value) => form(&field, key, value).map(Some),
            }
        }
        _ => Err(mismatch("structured_outputs", EXPECTED, value)),
    }
}

/// The form that a key of `structured_outputs` asks for, wherever it is written.
fn form(field: &str, key: &str, value: &Value) -> Result<AskedForm, ApiError> {
    let text = |expected: &str| {
        let text = value.as_str().filter(|text| !text.is_empty());
        text.map(str::to_owned)
            .ok_or_else(|| mismatch(field, expected, value))
    };
    let form = match key {
        "json" => Form::JsonSchema(schema(field, value)?),
        "regex" => Form::Regex(text("a regular expression")?),
        "grammar" => Form::Grammar(text("a grammar in Lark's syntax")?),
        _ => Form::Choice(choice(field, value)?),
    };
    Ok(AskedForm {
        field: field.to_owned(),
        form,
    })
}

/// A schema, as an object or as the text of one.
fn schema(field: &str, value: &Value) -> Result<Map<String, Value>, ApiError> {
    const EXPECTED: &str = "a JSON schema (an object)";
    match value {
        Value::Object(map) => Ok(map.clone()),
        Value::String(text) => match serde_json::from_str(text) {
            Ok(Value::Object(map)) => Ok(map),
            Ok(other) => Err(mismatch(field, EXPECTED, &other)),
            Err(error) => Err(ApiError::invalid(
                field,
                format!("is not valid JSON: {error}, got {}", shown(value)),
            )),
        },
        other => Err(mismatch(field, EXPECTED, other)),
    }
}

fn choice(field: &str, value: &Value) -> Result<Vec<String>, ApiError> {
    const EXPECTED: &str = "an array of texts that are not empty";
    let items = value
        .as_array()
        .filter(|items| !items.is_empty())
        .ok_or_else(|| mismatch(field, EXPECTED, value))?;
    if items.len() > MAX_CHOICES {
        return Err(ApiError::invalid(
            field,
            format!("has {} texts; at most {MAX_CHOICES} are allowed", items.len()),
        ));
    }
    let text = |(i, item): (usize, &Value)| {
        let text = item.as_str().filter(|text| !text.is_empty());
        text.map(str::to_owned)
            .ok_or_else(|| mismatch(&format!("{field}[{i}]"), "a text that is not empty", item))
    };
    items.iter().enumerate().map(text).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn asked(body: &Value) -> Result<Option<AskedForm>, ApiError> {
        read(&Fields::parse(body.to_string().as_bytes()).unwrap())
    }

    #[test]
    fn every_way_to_ask() {
        let schema = json!({"type": "object"});
        let map = schema.as_object().unwrap().clone();
        for (body, expected) in [
            (json!({}), None),
            (json!({"response_format": null, "guided_json": null}), None),
            (json!({"response_format": {"type": "text"}}), None),
            (json!({"structured_outputs": {"json_object": false}}), None),
            (
                json!({"response_format": {"type": "json_object"}}),
                Some(("response_format", Form::JsonObject)),
            ),
            (
                json!({"structured_outputs": {"json_object": true, "regex": null, "unheard_of": 1}}),
                Some(("structured_outputs.json_object", Form::JsonObject)),
            ),
            (
                json!({"response_format": {"type": "json_schema",
                    "json_schema": {"name": "x", "strict": true, "schema": schema}}}),
                Some((
                    "response_format.json_schema.schema",
                    Form::JsonSchema(map.clone()),
                )),
            ),
            (
                json!({"guided_json": schema, "response_format": {"type": "text"}}),
                Some(("guided_json", Form::JsonSchema(map.clone()))),
            ),
            (
                json!({"guided_json": schema.to_string()}),
                Some(("guided_json", Form::JsonSchema(map.clone()))),
            ),
            (
                json!({"structured_outputs": {"json": schema}}),
                Some(("structured_outputs.json", Form::JsonSchema(map))),
            ),
            (
                json!({"guided_regex": "a+"}),
                Some(("guided_regex", Form::Regex("a+".into()))),
            ),
            (
                json!({"guided_grammar": "start: \"a\""}),
                Some(("guided_grammar", Form::Grammar("start: \"a\"".into()))),
            ),
            (
                json!({"structured_outputs": {"choice": ["a", "b"]}}),
                Some((
                    "structured_outputs.choice",
                    Form::Choice(vec!["a".into(), "b".into()]),
                )),
            ),
        ] {
            let expected = expected.map(|(field, form)| AskedForm {
                field: field.to_owned(),
                form,
            });
            assert_eq!(asked(&body).unwrap(), expected, "{body}");
        }
    }

    #[test]
    fn errors_name_field_and_value() {
        let schema =
            |schema: Value| json!({"response_format": {"type": "json_schema", "json_schema": schema}});
        for (body, param, part) in [
            (
                json!({"response_format": "text"}),
                "response_format",
                "got \"text\"",
            ),
            (
                json!({"response_format": {"type": "xml"}}),
                "response_format",
                "xml",
            ),
            (
                json!({"response_format": {"type": "json_schema"}}),
                "response_format.json_schema",
                "null",
            ),
            (
                schema(json!({"name": "x"})),
                "response_format.json_schema.schema",
                "null",
            ),
            (
                schema(json!({"name": 5, "schema": {}})),
                "response_format.json_schema.name",
                "got 5",
            ),
            (
                schema(json!({"strict": "yes", "schema": {}})),
                "response_format.json_schema.strict",
                "\"yes\"",
            ),
            (
                schema(json!({"schema": [1]})),
                "response_format.json_schema.schema",
                "[1]",
            ),
            (json!({"guided_json": "{oops"}), "guided_json", "not valid JSON"),
            (json!({"guided_json": "[1]"}), "guided_json", "[1]"),
            (json!({"guided_json": 7}), "guided_json", "got 7"),
            (json!({"guided_regex": ["a"]}), "guided_regex", "[\"a\"]"),
            (json!({"guided_regex": ""}), "guided_regex", "\"\""),
            (json!({"guided_grammar": {}}), "guided_grammar", "{}"),
            (json!({"guided_choice": "a"}), "guided_choice", "\"a\""),
            (json!({"guided_choice": []}), "guided_choice", "[]"),
            (json!({"guided_choice": ["a", 5]}), "guided_choice[1]", "got 5"),
            (json!({"guided_choice": ["a", ""]}), "guided_choice[1]", "\"\""),
            (
                json!({"guided_choice": vec!["a"; 10_001]}),
                "guided_choice",
                "10001",
            ),
            (
                json!({"structured_outputs": "json"}),
                "structured_outputs",
                "json",
            ),
            (json!({"structured_outputs": {}}), "structured_outputs", "{}"),
            (
                json!({"structured_outputs": {"json": {}, "regex": "a"}}),
                "structured_outputs",
                "regex",
            ),
            (
                json!({"structured_outputs": {"json_object": "yes"}}),
                "structured_outputs.json_object",
                "yes",
            ),
            (
                json!({"structured_outputs": {"structural_tag": "{}"}}),
                "structured_outputs.structural_tag",
                "not supported",
            ),
            (
                json!({"structured_outputs": {"choice": [1]}}),
                "structured_outputs.choice[0]",
                "got 1",
            ),
            (
                json!({"response_format": {"type": "json_object"}, "guided_regex": "a"}),
                "guided_regex",
                "response_format",
            ),
            (
                json!({"guided_json": {}, "guided_choice": ["a"]}),
                "guided_choice",
                "guided_json",
            ),
            (
                json!({"structured_outputs": {"regex": "a"}, "guided_regex": "a"}),
                "guided_regex",
                "structured_outputs.regex",
            ),
        ] {
            let error = asked(&body).expect_err(&body.to_string());
            assert_eq!(
                (error.status, error.param.as_deref()),
                (400, Some(param)),
                "{body}"
            );
            assert!(error.message.contains(part), "{body}: {}", error.message);
        }
    }
}

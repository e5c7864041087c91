//! The Jinja environment that `transformers` gives to chat templates, on minijinja.

use std::fmt;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, UndefinedBehavior, Value};

use super::args::Args;
use super::clock::{Clock, strftime};
use super::filters;
use super::methods::unknown_method;
use super::python::{JsonStyle, json_dumps, py_str};

/// Upper bound of work for one rendering, in minijinja's units (an instruction, or 64 bytes): a template is foreign
/// code and must not hang the server. A conversation of 4000 turns and 18 MB takes a fifth of it; all of it is spent in
/// two or three seconds.
const FUEL: u64 = 10_000_000;

/// The source error inside minijinja's error when the template called `raise_exception`.
#[derive(Debug)]
pub(crate) struct Raised(pub(crate) String);

impl fmt::Display for Raised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

/// An environment with Hugging Face's settings, filters, tests and globals, without any template.
pub(crate) fn environment(clock: &Clock) -> Result<Environment<'static>, Error> {
    let mut env = Environment::new();
    minijinja_contrib::add_to_environment(&mut env);
    filters::add_to(&mut env);
    env.set_syntax(
        SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()?,
    );
    env.set_undefined_behavior(UndefinedBehavior::Lenient);
    env.set_auto_escape_callback(|_| AutoEscape::None);
    env.set_fuel(Some(FUEL));
    env.set_formatter(|out, _, value| out.write_str(&py_str(value)).map_err(Error::from));
    env.set_unknown_method_callback(unknown_method);
    env.add_filter("tojson", tojson);
    env.add_function("raise_exception", |message: &Value| -> Result<Value, Error> {
        let message = py_str(message);
        Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
    });
    let clock = Clock::clone(clock);
    env.add_function("strftime_now", move |format: &str| strftime(clock(), format));
    Ok(env)
}

/// `tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`
fn tojson(value: &Value, positional: Rest<Value>, keywords: Kwargs) -> Result<Value, Error> {
    let args = Args::new(positional, keywords);
    let mut style = JsonStyle {
        ensure_ascii: args.flag(0, "ensure_ascii"),
        sort_keys: args.flag(3, "sort_keys"),
        ..JsonStyle::default()
    };
    if let Some(indent) = args.get(1, "indent") {
        style.indent = Some(match indent.as_str() {
            Some(text) => text.to_owned(),
            // As in CPython, a negative indent is no indent, but still one item per line.
            None => " ".repeat(usize::try_from(i64::try_from(indent)?).unwrap_or(0)),
        });
        style.item_separator = ",".to_owned();
    }
    if let Some(separators) = args.get(2, "separators") {
        let parts: Vec<Value> = separators.try_iter()?.collect();
        match parts.as_slice() {
            [item, key] => {
                style.item_separator = py_str(item);
                style.key_separator = py_str(key);
            }
            _ => {
                return Err(Error::new(
                    ErrorKind::InvalidOperation,
                    format!(
                        "tojson: separators must be two strings, not {}",
                        py_str(&separators)
                    ),
                ));
            }
        }
    }
    args.finish()?;
    json_dumps(value, &style).map(Value::from)
}

/// The template's text in the form minijinja reads.
///
/// - Line ends become `\n`, as Jinja2 does before parsing.
/// - `{% generation %}`, which marks what the assistant wrote (for training masks) and prints nothing itself, becomes
///   a `with` block: both open a scope. Whitespace control and line numbers stay.
pub(crate) fn prepare_source(source: &str) -> String {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut out = String::with_capacity(source.len());
    let mut rest = source.as_str();
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        out.push_str(before);
        let body = tag.trim_start_matches("{%").trim_start_matches(['-', '+']);
        let body = body.trim_start();
        let word_len = body
            .find(|c: char| !c.is_ascii_alphanumeric() && c != '_')
            .unwrap_or(body.len());
        let (word, after) = body.split_at(word_len);
        let replacement = match word {
            "generation" => "with",
            "endgeneration" => "endwith",
            _ => word,
        };
        let ends_here = after
            .trim_start()
            .trim_start_matches(['-', '+'])
            .starts_with("%}");
        let head = tag.get(..tag.len() - body.len()).unwrap_or_default();
        out.push_str(head);
        out.push_str(if ends_here { replacement } else { word });
        rest = after;
        if word == "raw" && ends_here {
            // Jinja2 keeps the line end after `{% raw %}`; minijinja is told to by a plus sign.
            if after.trim_start().starts_with("%}") {
                out.push_str(" +");
                rest = after.trim_start();
            }
            let end = rest.find("endraw").unwrap_or(rest.len());
            out.push_str(rest.get(..end).unwrap_or_default());
            rest = rest.get(end..).unwrap_or_default();
        }
    }
    out.push_str(rest);
    out
}

/// A `serde_json` value as a template value; the order of keys stays.
pub(crate) fn to_template_value(json: &serde_json::Value) -> Value {
    match json {
        serde_json::Value::Null => Value::from(()),
        serde_json::Value::Bool(flag) => Value::from(*flag),
        serde_json::Value::Number(number) => {
            if let Some(int) = number.as_i64() {
                Value::from(int)
            } else if let Some(int) = number.as_u64() {
                Value::from(int)
            } else {
                Value::from(number.as_f64().unwrap_or(f64::NAN))
            }
        }
        serde_json::Value::String(text) => Value::from(text.as_str()),
        serde_json::Value::Array(items) => {
            Value::from(items.iter().map(to_template_value).collect::<Vec<_>>())
        }
        serde_json::Value::Object(map) => Value::from_pairs(
            map.iter()
                .map(|(key, value)| (Value::from(key.as_str()), to_template_value(value))),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generation_blocks_become_scopes() {
        let source = "{%- generation -%}a{%+ endgeneration %}\r\n{% generation_x %}{{ '{% if' }}";
        assert_eq!(
            prepare_source(source),
            "{%- with -%}a{%+ endwith %}\n{% generation_x %}{{ '{% if' }}"
        );
    }
}

//! Bringing a parameter's value to its declared type, when that loses nothing.

use serde_json::Value as Json;

use super::lenient::{Invalid, Kind, Lenient, Sink, Step};
use super::tools::Types;

/// The value's strict JSON text, converted if its type is not declared and the conversion is lossless:
///
/// - a string whose text is an integer, number, boolean, null, object or array, where one of these is declared and a
///   string is not: `"3"` → `3`;
/// - a float without fraction where only an integer is declared: `3.0` → `3`;
/// - anything but null where only a string is declared: `5` → `"5"`, `{"a": 1}` → `"{\"a\":1}"`.
///
/// Otherwise the text stays as it is.
pub(crate) fn coerce(text: String, types: Types) -> String {
    if types == Types::default() {
        return text;
    }
    let Ok(value) = serde_json::from_str::<Json>(&text) else {
        return text;
    };
    let converted = match &value {
        Json::String(inner) if !types.string => from_string(inner, types),
        Json::Number(_) if types.number => None,
        Json::Number(_) if types.integer => integral(&text),
        Json::Number(_) if types.string => Some(Json::String(text.clone()).to_string()),
        Json::Bool(_) if types.string && !types.boolean => Some(Json::String(text.clone()).to_string()),
        Json::Object(_) if types.string && !types.object => Some(Json::String(value.to_string()).to_string()),
        Json::Array(_) if types.string && !types.array => Some(Json::String(value.to_string()).to_string()),
        _ => None,
    };
    converted.unwrap_or(text)
}

/// What the text of a string means, if it is the text of a declared type.
fn from_string(inner: &str, types: Types) -> Option<String> {
    let inner = inner.trim();
    let strict = strict_json(inner)?;
    match serde_json::from_str::<Json>(&strict).ok()? {
        Json::Number(_) if types.number => Some(strict),
        Json::Number(_) if types.integer => {
            if is_integer(&strict) {
                Some(strict)
            } else {
                integral(&strict)
            }
        }
        Json::Bool(_) if types.boolean => Some(strict),
        Json::Null if types.null => Some(strict),
        Json::Object(_) if types.object => Some(strict),
        Json::Array(_) if types.array => Some(strict),
        _ => None,
    }
}

fn is_integer(text: &str) -> bool {
    let digits = text.strip_prefix('-').unwrap_or(text);
    !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit())
}

/// `3.0` → `3`; exact only where a double counts integers one by one.
fn integral(text: &str) -> Option<String> {
    if is_integer(text) {
        return None;
    }
    let value: f64 = text.parse().ok()?;
    (value.fract() == 0.0 && value.abs() < 9_007_199_254_740_992.0).then(|| format!("{value:.0}"))
}

/// The one JSON value that the text is, strict; `None` for anything else.
pub(crate) fn strict_json(text: &str) -> Option<String> {
    let mut collected = Collect(String::new());
    let mut reader = Lenient::default();
    let mut done = false;
    for c in text.chars() {
        if done {
            if !c.is_whitespace() {
                return None;
            }
        } else {
            done = reader.feed(c, &mut collected).ok()? == Step::Done;
        }
    }
    // Closing brackets are not completed here, but a bare number or word only ends with the text.
    if !done && (reader.is_nested() || reader.close_early(&mut collected).is_err()) {
        return None;
    }
    Some(collected.0)
}

/// Collects the strict text and asks no questions.
struct Collect(String);

impl Sink for Collect {
    fn text(&mut self, text: &str) {
        self.0.push_str(text);
    }

    fn key(&mut self, _: usize, _: &str) -> Result<(), Invalid> {
        Ok(())
    }

    fn value_start(&mut self, _: usize, _: Kind) -> Result<(), Invalid> {
        Ok(())
    }

    fn value_end(&mut self, _: usize) -> Result<(), Invalid> {
        Ok(())
    }
}

//! Python's own text forms of values: `str()`, `repr()` and `json.dumps()`.
//!
//! Templates are written against Jinja2 on CPython, so everything that turns a value into text has to print what
//! CPython prints: `True`, `None`, `['a', "it's"]`, `1e-05`.

use std::fmt::Write as _;

use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, Value};

/// How deep `json.dumps` and `repr` follow nested values before giving up (CPython: its recursion limit).
const MAX_DEPTH: usize = 200;

/// Arguments of Python's `json.dumps`, as the `tojson` filter of `transformers` passes them on.
#[derive(Debug, Clone)]
pub(crate) struct JsonStyle {
    pub(crate) ensure_ascii: bool,
    pub(crate) sort_keys: bool,
    /// One level of indentation, or `None` for everything on one line.
    pub(crate) indent: Option<String>,
    pub(crate) item_separator: String,
    pub(crate) key_separator: String,
}

impl Default for JsonStyle {
    fn default() -> Self {
        Self {
            ensure_ascii: false,
            sort_keys: false,
            indent: None,
            item_separator: ", ".to_owned(),
            key_separator: ": ".to_owned(),
        }
    }
}

/// `json.dumps(value, ...)`. Errors where CPython raises `TypeError` (an undefined value, a function, ...).
pub(crate) fn json_dumps(value: &Value, style: &JsonStyle) -> Result<String, Error> {
    let mut out = String::new();
    dump(&mut out, value, style, 0)?;
    Ok(out)
}

fn dump(out: &mut String, value: &Value, style: &JsonStyle, depth: usize) -> Result<(), Error> {
    if depth > MAX_DEPTH {
        return Err(Error::new(
            ErrorKind::BadSerialization,
            "value is nested too deeply for JSON",
        ));
    }
    match value.kind() {
        ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => out.push_str(&number(value, "NaN", "Infinity")),
        ValueKind::String => json_string(out, value.as_str().unwrap_or_default(), style.ensure_ascii),
        ValueKind::Seq | ValueKind::Iterable => {
            out.push('[');
            let mut empty = true;
            for item in value.try_iter()? {
                separate(out, style, depth + 1, empty);
                empty = false;
                dump(out, &item, style, depth + 1)?;
            }
            close(out, style, depth, empty, ']');
        }
        ValueKind::Map => {
            let mut pairs = Vec::new();
            for key in value.try_iter()? {
                let item = value.get_item(&key)?;
                pairs.push((json_key(&key)?, item));
            }
            if style.sort_keys {
                pairs.sort_by(|a, b| a.0.cmp(&b.0));
            }
            out.push('{');
            let empty = pairs.is_empty();
            for (index, (key, item)) in pairs.iter().enumerate() {
                separate(out, style, depth + 1, index == 0);
                json_string(out, key, style.ensure_ascii);
                out.push_str(&style.key_separator);
                dump(out, item, style, depth + 1)?;
            }
            close(out, style, depth, empty, '}');
        }
        other => {
            return Err(Error::new(
                ErrorKind::BadSerialization,
                format!("a value of type {other} is not JSON serializable"),
            ));
        }
    }
    Ok(())
}

fn separate(out: &mut String, style: &JsonStyle, depth: usize, first: bool) {
    if !first {
        out.push_str(&style.item_separator);
    }
    newline(out, style, depth);
}

fn close(out: &mut String, style: &JsonStyle, depth: usize, empty: bool, bracket: char) {
    if !empty {
        newline(out, style, depth);
    }
    out.push(bracket);
}

fn newline(out: &mut String, style: &JsonStyle, depth: usize) {
    if let Some(indent) = &style.indent {
        out.push('\n');
        for _ in 0..depth {
            out.push_str(indent);
        }
    }
}

/// A mapping's key as CPython's `json` writes it: only scalars are allowed.
fn json_key(key: &Value) -> Result<String, Error> {
    match key.kind() {
        ValueKind::String => Ok(key.as_str().unwrap_or_default().to_owned()),
        ValueKind::None => Ok("null".to_owned()),
        ValueKind::Bool => Ok(if key.is_true() { "true" } else { "false" }.to_owned()),
        ValueKind::Number => Ok(number(key, "NaN", "Infinity")),
        other => Err(Error::new(
            ErrorKind::BadSerialization,
            format!("keys must be scalars for JSON, not {other}"),
        )),
    }
}

fn json_string(out: &mut String, text: &str, ensure_ascii: bool) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if (c as u32) < 0x20 || (ensure_ascii && !(' '..='~').contains(&c)) => {
                let mut units = [0u16; 2];
                for unit in c.encode_utf16(&mut units) {
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

/// `str(value)`: what `{{ value }}` prints.
pub(crate) fn py_str(value: &Value) -> String {
    match value.as_str() {
        Some(text) => text.to_owned(),
        None if value.is_undefined() => String::new(),
        None => {
            let mut out = String::new();
            repr(&mut out, value, 0);
            out
        }
    }
}

fn repr(out: &mut String, value: &Value, depth: usize) {
    if depth > MAX_DEPTH {
        out.push_str("...");
        return;
    }
    match value.kind() {
        ValueKind::Undefined => out.push_str("Undefined"),
        ValueKind::Number => out.push_str(&number(value, "nan", "inf")),
        ValueKind::String => repr_string(out, value.as_str().unwrap_or_default()),
        ValueKind::Seq | ValueKind::Iterable => {
            let (open, shut) = if value.is_tuple() { ('(', ')') } else { ('[', ']') };
            let Ok(items) = value.try_iter() else {
                let _ = write!(out, "{value}");
                return;
            };
            out.push(open);
            let mut count = 0;
            for item in items {
                if count > 0 {
                    out.push_str(", ");
                }
                repr(out, &item, depth + 1);
                count += 1;
            }
            if value.is_tuple() && count == 1 {
                out.push(',');
            }
            out.push(shut);
        }
        ValueKind::Map => {
            out.push('{');
            for (index, key) in value.try_iter().into_iter().flatten().enumerate() {
                if index > 0 {
                    out.push_str(", ");
                }
                repr(out, &key, depth + 1);
                out.push_str(": ");
                repr(out, &value.get_item(&key).unwrap_or_default(), depth + 1);
            }
            out.push('}');
        }
        // `None`, `True`, `False` and objects know their Python form.
        _ => {
            let _ = write!(out, "{value}");
        }
    }
}

/// `repr(str)`: single quotes unless only they occur inside, and escapes for everything not printable.
fn repr_string(out: &mut String, text: &str) {
    let quote = if text.contains('\'') && !text.contains('"') {
        '"'
    } else {
        '\''
    };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => {
                out.push('\\');
                out.push(c);
            }
            c if !is_printable(c) => {
                let code = c as u32;
                let _ = match code {
                    0..=0xff => write!(out, "\\x{code:02x}"),
                    0x100..=0xffff => write!(out, "\\u{code:04x}"),
                    _ => write!(out, "\\U{code:08x}"),
                };
            }
            c => out.push(c),
        }
    }
    out.push(quote);
}

/// Python's `str.isprintable` for one character: not in the Unicode categories "other" and "separator" (but a space
/// is printable). The assigned format characters and separators are listed; unassigned code points pass as printable.
fn is_printable(c: char) -> bool {
    !matches!(c as u32,
        0..=0x1f | 0x7f..=0xa0 | 0xad | 0x600..=0x605 | 0x61c | 0x6dd | 0x70f | 0x890..=0x891 | 0x8e2 | 0x1680
        | 0x180e | 0x2000..=0x200f | 0x2028..=0x202f | 0x205f..=0x206f | 0x3000 | 0xe000..=0xf8ff | 0xfeff
        | 0xfff9..=0xfffb | 0x110bd | 0x110cd | 0x13430..=0x1343f | 0x1bca0..=0x1bca3 | 0x1d173..=0x1d17a
        | 0xe0001 | 0xe0020..=0xe007f | 0xf0000..=0x10ffff)
}

/// An integer or a float as text; the spellings of not-a-number and infinity differ between `repr` and `json`.
fn number(value: &Value, nan: &str, infinity: &str) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    match f64::try_from(value.clone()) {
        Ok(float) if float.is_nan() => nan.to_owned(),
        Ok(float) if float.is_infinite() => {
            if float > 0.0 {
                infinity.to_owned()
            } else {
                format!("-{infinity}")
            }
        }
        Ok(float) => py_float(float),
        Err(_) => value.to_string(),
    }
}

/// `repr(float)` for finite numbers: the shortest digits that read back the same, in scientific notation when the
/// decimal exponent is below -4 or at least 16.
pub(crate) fn py_float(float: f64) -> String {
    let scientific = format!("{float:e}");
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let mut plain = format!("{float}");
        if !plain.contains('.') {
            plain.push_str(".0");
        }
        plain
    } else {
        let sign = if exponent < 0 { '-' } else { '+' };
        format!("{mantissa}e{sign}{:02}", exponent.abs())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_print_as_cpython_prints_them() {
        for (float, text) in [
            (1.0, "1.0"),
            (0.1, "0.1"),
            (1e16, "1e+16"),
            (123456789012345680.0, "1.2345678901234568e+17"),
            (1e15, "1000000000000000.0"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (-2.5e-7, "-2.5e-07"),
            (1e300, "1e+300"),
            (-0.0, "-0.0"),
        ] {
            assert_eq!(py_float(float), text);
        }
    }

    #[test]
    fn repr_chooses_quotes_and_escapes() {
        let list = Value::from(vec![
            Value::from("it's"),
            Value::from("a\"b'"),
            Value::from("\u{1f}\u{a0}é\\"),
        ]);
        assert_eq!(py_str(&list), r#"["it's", 'a"b\'', '\x1f\xa0é\\']"#);
    }
}

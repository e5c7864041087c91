//! Python's methods of `str`, `dict` and `list`, where minijinja-contrib's `pycompat` lacks one or differs.

use minijinja::value::{Tuple, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State, Value};

use super::args::Args;

/// Called by minijinja for every method of a plain value. Anything not listed here goes to `pycompat`.
pub(crate) fn unknown_method(
    state: &mut State<'_, '_>,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, Error> {
    let own = match (value.kind(), value.as_str()) {
        (ValueKind::String, Some(text)) => string_method(text, method, args)?,
        (ValueKind::Map, _) if method == "copy" => Some(value.clone()),
        (ValueKind::Seq | ValueKind::Iterable, _) => list_method(value, method, args)?,
        _ => None,
    };
    match own {
        Some(result) => Ok(result),
        None => minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args),
    }
}

fn string_method(text: &str, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let args = Args::of_method(args)?;
    Ok(Some(match method {
        "strip" => Value::from(strip(text, &args, true, true)?),
        "lstrip" => Value::from(strip(text, &args, true, false)?),
        "rstrip" => Value::from(strip(text, &args, false, true)?),
        "split" | "rsplit" => {
            let separator = args.text(0, "sep")?;
            let limit = args.integer(1, "maxsplit")?.unwrap_or(-1);
            let limit = usize::try_from(limit).unwrap_or(usize::MAX);
            split(text, separator.as_deref(), limit, method == "rsplit")?
        }
        "splitlines" => splitlines(text, args.flag(0, "keepends")),
        "partition" | "rpartition" => {
            let separator = non_empty(args.required(0, "sep")?)?;
            let last = method == "rpartition";
            let found = if last {
                text.rsplit_once(&separator)
            } else {
                text.split_once(&separator)
            };
            let parts = match found {
                Some((head, tail)) => [head, separator.as_str(), tail],
                None if last => ["", "", text],
                None => [text, "", ""],
            };
            Value::from(Tuple::from(parts.map(Value::from).to_vec()))
        }
        "removeprefix" => Value::from(
            text.strip_prefix(args.required(0, "prefix")?.as_str())
                .unwrap_or(text),
        ),
        "removesuffix" => Value::from(
            text.strip_suffix(args.required(0, "suffix")?.as_str())
                .unwrap_or(text),
        ),
        "replace" => {
            let (old, new) = (args.required(0, "old")?, args.required(1, "new")?);
            match args.integer(2, "count")?.map(usize::try_from) {
                Some(Ok(count)) => Value::from(text.replacen(&old, &new, count)),
                _ => Value::from(text.replace(&old, &new)),
            }
        }
        "title" => Value::from(title(text)),
        "swapcase" => Value::from(
            text.chars()
                .flat_map(|c| {
                    let upper = c.is_uppercase();
                    let lowered = upper.then(|| c.to_lowercase());
                    let raised = (!upper).then(|| c.to_uppercase());
                    lowered.into_iter().flatten().chain(raised.into_iter().flatten())
                })
                .collect::<String>(),
        ),
        // Full case folding differs from lower case in few letters; of those only ß is in common use.
        "casefold" => Value::from(text.to_lowercase().replace('ß', "ss")),
        "ljust" | "rjust" | "center" => {
            let width = usize::try_from(args.integer(0, "width")?.unwrap_or(0)).unwrap_or(0);
            let fill = args.text(1, "fillchar")?.unwrap_or_else(|| " ".to_owned());
            let missing = width.saturating_sub(text.chars().count());
            let left = match method {
                "ljust" => 0,
                "rjust" => missing,
                // CPython puts the odd one to the left when the width is odd.
                _ => missing / 2 + (missing & width & 1),
            };
            Value::from(format!(
                "{}{text}{}",
                fill.repeat(left),
                fill.repeat(missing - left)
            ))
        }
        "zfill" => {
            let width = usize::try_from(args.integer(0, "width")?.unwrap_or(0)).unwrap_or(0);
            let zeros = "0".repeat(width.saturating_sub(text.chars().count()));
            let digits = text.trim_start_matches(['+', '-']);
            let sign = text
                .get(..text.len() - digits.len())
                .filter(|sign| sign.len() == 1)
                .unwrap_or_default();
            Value::from(format!(
                "{sign}{zeros}{}",
                text.get(sign.len()..).unwrap_or_default()
            ))
        }
        "index" | "rindex" => {
            let needle = args.required(0, "sub")?;
            let found = if method == "index" {
                text.find(&needle)
            } else {
                text.rfind(&needle)
            };
            match found.and_then(|at| text.get(..at)) {
                Some(before) => Value::from(before.chars().count()),
                None => return Err(Error::new(ErrorKind::InvalidOperation, "substring not found")),
            }
        }
        _ => return Ok(None),
    }))
}

/// `str.title`: a letter is upper case unless a letter with case stands before it.
fn title(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut inside = false;
    for c in text.chars() {
        if inside {
            out.extend(c.to_lowercase());
        } else {
            match c {
                // The digraphs have a title form of their own.
                '\u{1c4}'..='\u{1c6}' => out.push('\u{1c5}'),
                '\u{1c7}'..='\u{1c9}' => out.push('\u{1c8}'),
                '\u{1ca}'..='\u{1cc}' => out.push('\u{1cb}'),
                '\u{1f1}'..='\u{1f3}' => out.push('\u{1f2}'),
                c => {
                    let mut upper = c.to_uppercase();
                    out.extend(upper.next());
                    out.extend(upper.flat_map(char::to_lowercase));
                }
            }
        }
        inside = c.is_uppercase() || c.is_lowercase();
    }
    out
}

/// Python's idea of whitespace: Unicode's, and the four information separators.
pub(crate) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

fn strip<'a>(text: &'a str, args: &Args, start: bool, end: bool) -> Result<&'a str, Error> {
    let chars = args.text(0, "chars")?;
    let matches = |c: char| match &chars {
        Some(chars) => chars.contains(c),
        None => is_space(c),
    };
    let text = if start {
        text.trim_start_matches(matches)
    } else {
        text
    };
    Ok(if end { text.trim_end_matches(matches) } else { text })
}

fn non_empty(separator: String) -> Result<String, Error> {
    if separator.is_empty() {
        return Err(Error::new(ErrorKind::InvalidOperation, "empty separator"));
    }
    Ok(separator)
}

fn split(text: &str, separator: Option<&str>, limit: usize, from_right: bool) -> Result<Value, Error> {
    let parts: Vec<&str> = match separator {
        Some("") => return Err(Error::new(ErrorKind::InvalidOperation, "empty separator")),
        Some(separator) => {
            let limit = limit.saturating_add(1);
            if from_right {
                let mut parts: Vec<_> = text.rsplitn(limit, separator).collect();
                parts.reverse();
                parts
            } else {
                text.splitn(limit, separator).collect()
            }
        }
        None => split_space(text, limit, from_right),
    };
    Ok(Value::from(
        parts.into_iter().map(Value::from).collect::<Vec<_>>(),
    ))
}

/// Splits at runs of whitespace; what remains after `limit` cuts is kept whole, trimmed on its far side only.
fn split_space(text: &str, limit: usize, from_right: bool) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = text;
    loop {
        rest = if from_right {
            rest.trim_end_matches(is_space)
        } else {
            rest.trim_start_matches(is_space)
        };
        if rest.is_empty() {
            break;
        }
        let cut = if from_right {
            rest.char_indices()
                .rev()
                .find(|(_, c)| is_space(*c))
                .map(|(at, c)| (at, at + c.len_utf8()))
        } else {
            rest.char_indices()
                .find(|(_, c)| is_space(*c))
                .map(|(at, c)| (at, at + c.len_utf8()))
        };
        match cut {
            Some((before, after)) if parts.len() < limit => {
                let (head, tail) = (
                    rest.get(..before).unwrap_or_default(),
                    rest.get(after..).unwrap_or_default(),
                );
                parts.push(if from_right { tail } else { head });
                rest = if from_right { head } else { tail };
            }
            _ => {
                let last = match (parts.len() < limit, from_right) {
                    (true, _) => rest,
                    (false, true) => rest.trim_end_matches(is_space),
                    (false, false) => rest.trim_start_matches(is_space),
                };
                parts.push(last);
                break;
            }
        }
    }
    if from_right {
        parts.reverse();
    }
    parts
}

fn splitlines(text: &str, keep_ends: bool) -> Value {
    let mut lines = Vec::new();
    let mut start = 0;
    let mut chars = text.char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        let is_end = matches!(
            c,
            '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}'
        );
        if !is_end {
            continue;
        }
        let mut end = at + c.len_utf8();
        if c == '\r' && chars.next_if(|(_, next)| *next == '\n').is_some() {
            end += 1;
        }
        let line = text
            .get(start..if keep_ends { end } else { at })
            .unwrap_or_default();
        lines.push(Value::from(line));
        start = end;
    }
    if start < text.len() {
        lines.push(Value::from(text.get(start..).unwrap_or_default()));
    }
    Value::from(lines)
}

fn list_method(value: &Value, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    Ok(Some(match method {
        "copy" => value.clone(),
        "index" => {
            let (wanted,): (&Value,) = from_args(args)?;
            match value.try_iter()?.position(|item| item == *wanted) {
                Some(at) => Value::from(at),
                None => return Err(Error::new(ErrorKind::InvalidOperation, "value is not in list")),
            }
        }
        "count" => {
            let (wanted,): (&Value,) = from_args(args)?;
            Value::from(value.try_iter()?.filter(|item| item == wanted).count())
        }
        _ => return Ok(None),
    }))
}

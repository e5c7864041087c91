//! Jinja2's filters and tests, where minijinja lacks one or differs.

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Value};

use super::args::Args;
use super::methods::is_space;
use super::python::py_str;

pub(crate) fn add_to(env: &mut Environment<'static>) {
    env.add_filter("string", |value: &Value| py_str(value));
    env.add_filter("trim", |value: &Value, chars: Option<String>| {
        let text = py_str(value);
        match chars {
            Some(chars) => text.trim_matches(|c| chars.contains(c)).to_owned(),
            None => text.trim_matches(is_space).to_owned(),
        }
    });
    env.add_filter(
        "int",
        |value: &Value, positional: Rest<Value>, keywords: Kwargs| {
            int(value, &Args::new(positional, keywords))
        },
    );
    env.add_filter(
        "float",
        |value: &Value, positional: Rest<Value>, keywords: Kwargs| {
            float(value, &Args::new(positional, keywords))
        },
    );
    env.add_filter(
        "indent",
        |value: &Value, positional: Rest<Value>, keywords: Kwargs| {
            indent(value, &Args::new(positional, keywords))
        },
    );
    env.add_filter("center", |value: &Value, width: Option<usize>| {
        let text = py_str(value);
        let width = width.unwrap_or(80);
        let missing = width.saturating_sub(text.chars().count());
        let left = missing / 2 + (missing & width & 1);
        format!("{}{text}{}", " ".repeat(left), " ".repeat(missing - left))
    });
    env.add_filter("wordcount", |value: &Value| {
        let text = py_str(value);
        text.split(|c: char| !c.is_alphanumeric() && c != '_')
            .filter(|word| !word.is_empty())
            .count()
    });
    env.add_filter(
        "truncate",
        |value: &Value, positional: Rest<Value>, keywords: Kwargs| {
            truncate(value, &Args::new(positional, keywords))
        },
    );
    env.add_filter("pprint", |value: &Value| py_str(value));
    env.add_test("sequence", |value: &Value| {
        // Python: has a length and `[]`. Strings and mappings do, and so does Jinja's Undefined.
        matches!(
            value.kind(),
            ValueKind::Seq | ValueKind::Iterable | ValueKind::String | ValueKind::Map | ValueKind::Undefined
        )
    });
    env.add_test("iterable", |value: &Value| {
        !value.is_none() && value.try_iter().is_ok()
    });
    env.add_test("callable", |value: &Value| {
        matches!(value.kind(), ValueKind::Plain | ValueKind::Undefined)
    });
    env.add_function("dict", |positional: Rest<Value>, keywords: Kwargs| {
        dict(&Args::new(positional, keywords))
    });
    env.add_function("cycler", |items: Rest<Value>| {
        minijinja_contrib::globals::cycler(items.0)
    });
}

/// `int(value, default=0, base=10)`
fn int(value: &Value, args: &Args) -> Result<Value, Error> {
    let default = args.get(0, "default").unwrap_or_else(|| Value::from(0));
    let base = u32::try_from(args.size(1, "base", 10)?).unwrap_or(10);
    args.finish()?;
    let Some(text) = value.as_str() else {
        return Ok(match (value.kind(), f64::try_from(value.clone())) {
            (ValueKind::Bool, _) => Value::from(i64::from(value.is_true())),
            (ValueKind::Number, _) if value.is_integer() => value.clone(),
            (ValueKind::Number, Ok(float)) if float.is_finite() => whole(float),
            _ => default,
        });
    };
    let digits = text.trim_matches(is_space).replace('_', "");
    let digits = match base {
        16 => digits.trim_start_matches("0x").trim_start_matches("0X"),
        8 => digits.trim_start_matches("0o").trim_start_matches("0O"),
        2 => digits.trim_start_matches("0b").trim_start_matches("0B"),
        _ => digits.as_str(),
    };
    Ok(match i128::from_str_radix(digits, base.clamp(2, 36)) {
        Ok(number) => i64::try_from(number).map_or_else(|_| Value::from(number), Value::from),
        Err(_) => match digits.parse::<f64>() {
            Ok(float) if float.is_finite() => whole(float),
            _ => default,
        },
    })
}

/// A float without its fraction. (Beyond 128 bits it stays a float; Python goes on.)
fn whole(float: f64) -> Value {
    let float = float.trunc();
    if float.abs() < 9.2e18 {
        Value::from(float as i64)
    } else {
        Value::from(float as i128)
    }
}

/// `float(value, default=0.0)`
fn float(value: &Value, args: &Args) -> Result<Value, Error> {
    let default = args.get(0, "default").unwrap_or_else(|| Value::from(0.0));
    args.finish()?;
    let number = match value.as_str() {
        Some(text) => text.trim_matches(is_space).replace('_', "").parse().ok(),
        None if value.kind() == ValueKind::Bool => Some(f64::from(u8::from(value.is_true()))),
        None => f64::try_from(value.clone()).ok(),
    };
    Ok(number.map_or(default, Value::from))
}

/// `indent(text, width=4, first=False, blank=False)`; the width may be the text to indent with.
fn indent(value: &Value, args: &Args) -> Result<String, Error> {
    let (first, blank) = (args.flag(1, "first"), args.flag(2, "blank"));
    let prefix = match args.get(0, "width") {
        None => " ".repeat(4),
        Some(width) => match width.as_str() {
            Some(text) => text.to_owned(),
            None => " ".repeat(usize::try_from(width)?),
        },
    };
    args.finish()?;
    let text = py_str(value);
    let mut out = String::with_capacity(text.len());
    for (index, line) in text.split('\n').enumerate() {
        if index > 0 {
            out.push('\n');
        }
        let wanted = if index == 0 {
            first
        } else {
            blank || !line.is_empty()
        };
        if wanted {
            out.push_str(&prefix);
        }
        out.push_str(line);
    }
    Ok(out)
}

/// `truncate(text, length=255, killwords=False, end='...', leeway=5)`
fn truncate(value: &Value, args: &Args) -> Result<String, Error> {
    let text = py_str(value);
    let (length, leeway) = (args.size(0, "length", 255)?, args.size(3, "leeway", 5)?);
    let kill_words = args.flag(1, "killwords");
    let end = args.text(2, "end")?.unwrap_or_else(|| "...".to_owned());
    args.finish()?;
    let count = text.chars().count();
    if count <= length.saturating_add(leeway) {
        return Ok(text);
    }
    let kept = length.checked_sub(end.chars().count()).ok_or_else(|| {
        Error::new(
            ErrorKind::InvalidOperation,
            format!("truncate: expected length >= {}, got {length}", end.len()),
        )
    })?;
    let mut head: String = text.chars().take(kept).collect();
    if !kill_words && let Some((words, _)) = head.rsplit_once(' ') {
        head = words.to_owned();
    }
    Ok(head + &end)
}

/// `dict(mapping_or_pairs, **more)`
fn dict(args: &Args) -> Result<Value, Error> {
    let mut pairs: Vec<(Value, Value)> = Vec::new();
    for source in args.positional() {
        for item in source.try_iter()? {
            let pair = if source.kind() == ValueKind::Map {
                let value = source.get_item(&item)?;
                (item, value)
            } else {
                (item.get_item_by_index(0)?, item.get_item_by_index(1)?)
            };
            pairs.push(pair);
        }
    }
    pairs.extend(
        args.keywords()?
            .into_iter()
            .map(|(name, value)| (Value::from(name), value)),
    );
    Ok(Value::from_pairs(pairs))
}

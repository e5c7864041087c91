//! `${env.NAME}`, replaced in the text before it is parsed, as llama-swap does: the value may be a number, a list, or
//! part of a word. Replacements are remembered, so that findings still name the column in the file.
//!
//! On the same way, JSON's pairs of `\u` escapes become the one character that they stand for: it is the only thing in
//! which JSON is not YAML.

use crate::diagnostic::{Code, Findings, Pos};

/// A text with its variables filled in.
#[derive(Debug)]
pub(crate) struct Replaced {
    pub(crate) text: String,
    /// Line, column after the replacement (from 1), length there, column and length in the file.
    edits: Vec<Edit>,
}

#[derive(Debug)]
struct Edit {
    line: u32,
    column: u32,
    length: u32,
    origin: u32,
    origin_length: u32,
}

impl Replaced {
    /// Line and column (from 1) in the file of a place in the text.
    pub(crate) fn origin(&self, line: u32, column: u32) -> (u32, u32) {
        let mut at = column;
        for edit in self.edits.iter().filter(|e| e.line == line && e.column <= column) {
            at = if column < edit.column + edit.length {
                edit.origin
            } else {
                column - (edit.column + edit.length) + edit.origin + edit.origin_length
            };
        }
        (line, at)
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Quote {
    None,
    Single,
    Double,
}

/// Fills in every `${env.NAME}` outside comments. In double quotes a value's `\` and `"` are escaped, in single quotes
/// its `'` is doubled. A variable that is not set, or whose value has a line break or a NUL, is an error.
pub(crate) fn substitute(
    text: &str,
    file: usize,
    env: &dyn Fn(&str) -> Option<String>,
    findings: &mut Findings,
) -> Replaced {
    let mut out = String::with_capacity(text.len());
    let mut edits = Vec::new();
    for (index, line) in text.split_inclusive('\n').enumerate() {
        if !line.contains("${env.") && !line.contains("\\ud") && !line.contains("\\uD") {
            out.push_str(line);
            continue;
        }
        let line_number = u32::try_from(index + 1).unwrap_or(u32::MAX);
        substitute_line(line, line_number, file, env, findings, &mut out, &mut edits);
    }
    Replaced { text: out, edits }
}

fn substitute_line(
    line: &str,
    line_number: u32,
    file: usize,
    env: &dyn Fn(&str) -> Option<String>,
    findings: &mut Findings,
    out: &mut String,
    edits: &mut Vec<Edit>,
) {
    let mut quote = Quote::None;
    let mut before = ' ';
    let mut escaped = false;
    let (mut from, mut to) = (1_u32, 1_u32);
    let mut rest = line;
    while let Some(c) = rest.chars().next() {
        let name = rest.strip_prefix("${env.").and_then(|tail| {
            let (name, _) = tail.split_once('}')?;
            valid(name).then_some(name)
        });
        if let Some(name) = name {
            let at = Pos {
                file,
                line: line_number,
                column: from,
            };
            let written = "${env.}".len() + name.len();
            let value = match env(name) {
                Some(value) if value.contains(['\n', '\r', '\0']) => {
                    let message =
                        format!("environment variable `{name}` has a line break or a NUL in its value");
                    findings.error(Code::Environment, at, "", message);
                    String::new()
                }
                Some(value) => value,
                None => {
                    let message = format!("environment variable `{name}` is not set");
                    findings.error(Code::Environment, at, "", message);
                    String::new()
                }
            };
            let value = match quote {
                Quote::None => value,
                Quote::Single => value.replace('\'', "''"),
                Quote::Double => value.replace('\\', "\\\\").replace('"', "\\\""),
            };
            let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
            let (length, origin_length) = (count(value.chars().count()), count(written));
            edits.push(Edit {
                line: line_number,
                column: to,
                length,
                origin: from,
                origin_length,
            });
            out.push_str(&value);
            from += origin_length;
            to += length;
            rest = rest.get(written..).unwrap_or_default();
            before = 'x';
            continue;
        }
        if let Some((pair, written)) = surrogates(rest).filter(|_| quote == Quote::Double && !escaped) {
            edits.push(Edit {
                line: line_number,
                column: to,
                length: 1,
                origin: from,
                origin_length: 12,
            });
            out.push(pair);
            (from, to) = (from + 12, to + 1);
            rest = rest.get(written..).unwrap_or_default();
            before = pair;
            continue;
        }
        match (quote, c) {
            (Quote::None, '#') if before.is_whitespace() => {
                out.push_str(rest);
                return;
            }
            // A quote opens only where a value can begin; `don't` has none.
            (Quote::None, '\'') if opens(before) => quote = Quote::Single,
            (Quote::None, '"') if opens(before) => quote = Quote::Double,
            (Quote::Single, '\'') => quote = Quote::None,
            (Quote::Double, '"') if !escaped => quote = Quote::None,
            _ => {}
        }
        escaped = c == '\\' && !escaped;
        before = c;
        out.push(c);
        rest = rest.get(c.len_utf8()..).unwrap_or_default();
        from += 1;
        to += 1;
    }
}

/// The character behind `\uD83D\uDE00` at the start of a text, and the bytes that it takes there.
fn surrogates(text: &str) -> Option<(char, usize)> {
    let unit = |at: usize| {
        let digits = text.get(at..at + 6)?.strip_prefix("\\u")?;
        digits
            .bytes()
            .all(|b| b.is_ascii_hexdigit())
            .then(|| u16::from_str_radix(digits, 16).ok())?
    };
    let pair = [unit(0).filter(|u| (0xD800..0xDC00).contains(u))?, unit(6)?];
    let character = char::decode_utf16(pair).next()?.ok()?;
    Some((character, 12))
}

fn opens(before: char) -> bool {
    before.is_whitespace() || "[{,:-(=".contains(before)
}

fn valid(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

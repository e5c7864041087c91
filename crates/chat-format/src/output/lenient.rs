//! An incremental JSON reader that forgives what language models get wrong, and writes strict JSON as it reads.
//!
//! It is fed character by character and tells a [`Sink`] the strict text so far, so that a call's arguments can be
//! streamed while they are still being written. Strict JSON passes through unchanged, white space included. Repaired,
//! because there is only one reading: raw line breaks and other control characters in strings, invalid escapes
//! (`\d`), unpaired surrogates, single-quoted strings, unquoted keys, `True`, `False` and `None`, `+1`, `.5`, `5.`,
//! trailing commas, and missing closing brackets at the end ([`Lenient::close_early`]). All else is [`Invalid`].

/// The text is not JSON and cannot be repaired without guessing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Invalid;

/// What kind of value begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Object,
    Array,
    String,
    Number,
    /// `true`, `false`, `null`.
    Word,
}

/// Receives the strict text and the structure. `depth` counts the containers around the value: 0 for the outermost.
pub(crate) trait Sink {
    /// The next piece of strict JSON text.
    fn text(&mut self, text: &str);
    /// An object's key, decoded; its text has been told before.
    fn key(&mut self, depth: usize, key: &str) -> Result<(), Invalid>;
    /// A value begins; its text follows.
    fn value_start(&mut self, depth: usize, kind: Kind) -> Result<(), Invalid>;
    /// The value's text is complete.
    fn value_end(&mut self, depth: usize) -> Result<(), Invalid>;
}

/// What became of a character.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// Taken; the value goes on.
    More,
    /// Taken, and the outermost value is complete with it.
    Done,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Frame {
    Object,
    Array,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    /// A value must come.
    Value,
    /// After `[`: a value or `]`.
    FirstItem,
    /// After `{`: a key or `}`.
    FirstKey,
    /// After a comma: a key or value, or (trailing comma) the closing bracket.
    Next,
    Colon,
    AfterValue,
    Text {
        quote: char,
        is_key: bool,
    },
    /// A number, word or unquoted key, until the first character that cannot belong to it.
    Bare {
        is_key: bool,
    },
    Done,
}

/// Inside a string: what the characters before mean for the next one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Escape {
    None,
    Backslash,
    /// `\u` or `\x` with the digits so far.
    Hex {
        x: bool,
        digits: u8,
        value: u32,
    },
}

/// The reader of one value.
#[derive(Debug, Clone)]
pub(crate) struct Lenient {
    stack: Vec<Frame>,
    state: State,
    escape: Escape,
    /// The hex digits of an unfinished escape, as written.
    hex: String,
    /// The digits of a high surrogate that waits for its low half.
    high: Option<String>,
    /// A comma and the white space after it, until it is clear that it is no trailing one.
    comma: String,
    /// A bare token, or a key's strict text.
    token: String,
}

impl Default for Lenient {
    fn default() -> Self {
        Self {
            stack: Vec::new(),
            state: State::Value,
            escape: Escape::None,
            hex: String::new(),
            high: None,
            comma: String::new(),
            token: String::new(),
        }
    }
}

impl Lenient {
    /// Whether the reader is inside a string, where markup has no meaning.
    pub(crate) fn in_string(&self) -> bool {
        matches!(self.state, State::Text { .. })
    }

    /// Whether an object or array is open.
    pub(crate) fn is_nested(&self) -> bool {
        !self.stack.is_empty()
    }

    /// Takes one character. After [`Step::Done`] or an error no more may be fed.
    pub(crate) fn feed(&mut self, c: char, sink: &mut impl Sink) -> Result<Step, Invalid> {
        if let State::Text { quote, is_key } = self.state {
            self.in_text(c, quote, is_key, sink)?;
            return Ok(self.step());
        }
        if let State::Bare { is_key } = self.state {
            if c.is_alphanumeric() || matches!(c, '_' | '+' | '-' | '.' | '$') {
                self.token.push(c);
                return Ok(Step::More);
            }
            self.end_bare(is_key, sink)?;
        }
        match c {
            ' ' | '\t' | '\n' | '\r' => {
                if self.comma.is_empty() {
                    sink.text(c.encode_utf8(&mut [0; 4]));
                } else {
                    self.comma.push(c);
                }
            }
            '{' | '[' => self.open(c, sink)?,
            '}' | ']' => self.close(c, sink)?,
            '"' | '\'' => self.quote(c, sink)?,
            ':' if self.state == State::Colon => {
                sink.text(":");
                self.state = State::Value;
            }
            ',' if self.state == State::AfterValue => {
                self.comma.push(',');
                self.state = State::Next;
            }
            c if c.is_alphanumeric() || matches!(c, '_' | '+' | '-' | '.' | '$') => {
                let is_key = self.key_may_come();
                if !is_key && !self.value_may_come() {
                    return Err(Invalid);
                }
                self.token.clear();
                self.token.push(c);
                self.state = State::Bare { is_key };
            }
            _ => return Err(Invalid),
        }
        Ok(self.step())
    }

    /// The text has ended, or markup has ended it: writes the closing brackets that are missing, if nothing else is.
    pub(crate) fn close_early(&mut self, sink: &mut impl Sink) -> Result<(), Invalid> {
        if let State::Bare { is_key: false } = self.state {
            self.end_bare(false, sink)?;
        }
        if !matches!(
            self.state,
            State::AfterValue | State::FirstItem | State::FirstKey | State::Next | State::Done
        ) {
            return Err(Invalid);
        }
        while let Some(frame) = self.stack.last() {
            let bracket = if *frame == Frame::Object { '}' } else { ']' };
            self.close(bracket, sink)?;
        }
        if self.state == State::Done {
            Ok(())
        } else {
            Err(Invalid)
        }
    }

    fn step(&self) -> Step {
        if self.state == State::Done {
            Step::Done
        } else {
            Step::More
        }
    }

    fn key_may_come(&self) -> bool {
        match self.state {
            State::FirstKey => true,
            State::Next => self.stack.last() == Some(&Frame::Object),
            _ => false,
        }
    }

    fn value_may_come(&self) -> bool {
        match self.state {
            State::Value | State::FirstItem => true,
            State::Next => self.stack.last() == Some(&Frame::Array),
            _ => false,
        }
    }

    fn flush_comma(&mut self, sink: &mut impl Sink) {
        if !self.comma.is_empty() {
            sink.text(&self.comma);
            self.comma.clear();
        }
    }

    fn start_value(&mut self, kind: Kind, sink: &mut impl Sink) -> Result<(), Invalid> {
        if !self.value_may_come() {
            return Err(Invalid);
        }
        self.flush_comma(sink);
        sink.value_start(self.stack.len(), kind)
    }

    fn end_value(&mut self, sink: &mut impl Sink) -> Result<(), Invalid> {
        sink.value_end(self.stack.len())?;
        self.state = if self.stack.is_empty() {
            State::Done
        } else {
            State::AfterValue
        };
        Ok(())
    }

    fn open(&mut self, c: char, sink: &mut impl Sink) -> Result<(), Invalid> {
        let object = c == '{';
        self.start_value(if object { Kind::Object } else { Kind::Array }, sink)?;
        sink.text(if object { "{" } else { "[" });
        self.stack.push(if object { Frame::Object } else { Frame::Array });
        self.state = if object { State::FirstKey } else { State::FirstItem };
        Ok(())
    }

    fn close(&mut self, c: char, sink: &mut impl Sink) -> Result<(), Invalid> {
        let (frame, text) = if c == '}' {
            (Frame::Object, "}")
        } else {
            (Frame::Array, "]")
        };
        let may_end = matches!(
            self.state,
            State::AfterValue | State::FirstKey | State::FirstItem | State::Next
        );
        if !may_end || self.stack.pop() != Some(frame) {
            return Err(Invalid);
        }
        // A comma that waits here is a trailing one.
        sink.text(self.comma.get(1..).unwrap_or_default());
        self.comma.clear();
        sink.text(text);
        self.end_value(sink)
    }

    fn quote(&mut self, quote: char, sink: &mut impl Sink) -> Result<(), Invalid> {
        let is_key = self.key_may_come();
        if is_key {
            self.flush_comma(sink);
            self.token.clear();
        } else {
            self.start_value(Kind::String, sink)?;
        }
        self.state = State::Text { quote, is_key };
        self.write("\"", is_key, sink);
        Ok(())
    }

    /// Strict text of a string; a key's is kept as well, to decode it at its end.
    fn write(&mut self, text: &str, is_key: bool, sink: &mut impl Sink) {
        if is_key {
            self.token.push_str(text);
        }
        sink.text(text);
    }

    fn in_text(&mut self, c: char, quote: char, is_key: bool, sink: &mut impl Sink) -> Result<(), Invalid> {
        match self.escape {
            Escape::None if c == '\\' => self.escape = Escape::Backslash,
            Escape::None => {
                self.drop_high(is_key, sink);
                if c == quote {
                    self.write("\"", is_key, sink);
                    return if is_key {
                        self.end_key(sink)
                    } else {
                        self.end_value(sink)
                    };
                }
                self.write_char(c, is_key, sink);
            }
            Escape::Backslash => self.after_backslash(c, is_key, sink),
            Escape::Hex { x, digits, value } => {
                let wanted = if x { 2 } else { 4 };
                if let Some(digit) = c.to_digit(16) {
                    self.hex.push(c);
                    let (digits, value) = (digits + 1, value * 16 + digit);
                    self.escape = Escape::Hex { x, digits, value };
                    if digits == wanted {
                        self.escape = Escape::None;
                        self.write_code_unit(value, x, is_key, sink);
                    }
                } else {
                    // No escape after all: the backslash was meant as one.
                    self.abandon_hex(x, is_key, sink);
                    return self.in_text(c, quote, is_key, sink);
                }
            }
        }
        Ok(())
    }

    fn write_char(&mut self, c: char, is_key: bool, sink: &mut impl Sink) {
        match c {
            '"' => self.write("\\\"", is_key, sink),
            '\n' => self.write("\\n", is_key, sink),
            '\r' => self.write("\\r", is_key, sink),
            '\t' => self.write("\\t", is_key, sink),
            c if (c as u32) < 0x20 => self.write(&format!("\\u{:04x}", c as u32), is_key, sink),
            c => self.write(c.encode_utf8(&mut [0; 4]), is_key, sink),
        }
    }

    fn after_backslash(&mut self, c: char, is_key: bool, sink: &mut impl Sink) {
        self.escape = Escape::None;
        if matches!(c, 'u' | 'x') {
            self.hex.clear();
            self.escape = Escape::Hex {
                x: c == 'x',
                digits: 0,
                value: 0,
            };
            return;
        }
        self.drop_high(is_key, sink);
        match c {
            '"' | '\\' | '/' | 'b' | 'f' | 'n' | 'r' | 't' => {
                self.write("\\", is_key, sink);
                self.write(c.encode_utf8(&mut [0; 4]), is_key, sink);
            }
            '\'' => self.write("'", is_key, sink),
            c => {
                self.write("\\\\", is_key, sink);
                self.write_char(c, is_key, sink);
            }
        }
    }

    /// A complete `\uXXXX` (as written) or `\xXX`. Surrogates pass only in pairs: many parsers refuse a lone one.
    fn write_code_unit(&mut self, unit: u32, x: bool, is_key: bool, sink: &mut impl Sink) {
        let written = std::mem::take(&mut self.hex);
        match unit {
            0xd800..=0xdbff => {
                self.drop_high(is_key, sink);
                self.high = Some(written);
            }
            0xdc00..=0xdfff => match self.high.take() {
                Some(high) => self.write(&format!("\\u{high}\\u{written}"), is_key, sink),
                None => self.write("\\ufffd", is_key, sink),
            },
            _ => {
                self.drop_high(is_key, sink);
                let zeros = if x { "00" } else { "" };
                self.write(&format!("\\u{zeros}{written}"), is_key, sink);
            }
        }
    }

    fn drop_high(&mut self, is_key: bool, sink: &mut impl Sink) {
        if self.high.take().is_some() {
            self.write("\\ufffd", is_key, sink);
        }
    }

    fn abandon_hex(&mut self, x: bool, is_key: bool, sink: &mut impl Sink) {
        self.escape = Escape::None;
        let written = std::mem::take(&mut self.hex);
        self.drop_high(is_key, sink);
        self.write(if x { "\\\\x" } else { "\\\\u" }, is_key, sink);
        self.write(&written, is_key, sink);
    }

    fn end_key(&mut self, sink: &mut impl Sink) -> Result<(), Invalid> {
        let key: String = serde_json::from_str(&self.token).map_err(|_| Invalid)?;
        self.token.clear();
        self.state = State::Colon;
        sink.key(self.stack.len(), &key)
    }

    fn end_bare(&mut self, is_key: bool, sink: &mut impl Sink) -> Result<(), Invalid> {
        let token = std::mem::take(&mut self.token);
        if is_key {
            // Only names: a number or a dotted path as key may be anything.
            if token.starts_with(|c: char| c.is_ascii_digit()) || token.contains(['+', '-', '.']) {
                return Err(Invalid);
            }
            self.flush_comma(sink);
            self.token = format!("\"{token}\"");
            sink.text(&self.token);
            return self.end_key(sink);
        }
        let (kind, strict) = match token.as_str() {
            "true" | "True" => (Kind::Word, "true".to_owned()),
            "false" | "False" => (Kind::Word, "false".to_owned()),
            "null" | "None" => (Kind::Word, "null".to_owned()),
            number => (Kind::Number, strict_number(number).ok_or(Invalid)?),
        };
        // `start_value` asks the state what may come.
        self.state = match (&self.comma, self.stack.last()) {
            (comma, Some(Frame::Array)) if !comma.is_empty() => State::Next,
            _ => State::Value,
        };
        self.start_value(kind, sink)?;
        sink.text(&strict);
        self.end_value(sink)
    }
}

/// The number in strict JSON, if it is one: a plus sign goes, a missing digit beside the point becomes 0. Leading
/// zeros are refused, for it may be an identifier that was meant as text.
fn strict_number(text: &str) -> Option<String> {
    let text = text.strip_prefix('+').unwrap_or(text);
    let (sign, digits) = match text.strip_prefix('-') {
        Some(rest) => ("-", rest),
        None => ("", text),
    };
    let (mantissa, exponent) = match digits.find(['e', 'E']) {
        Some(at) => digits.split_at(at),
        None => (digits, ""),
    };
    let fixed = match mantissa.split_once('.') {
        Some(("", "")) => return None,
        Some(("", fraction)) => format!("{sign}0.{fraction}{exponent}"),
        Some((whole, "")) => format!("{sign}{whole}.0{exponent}"),
        _ => format!("{sign}{digits}"),
    };
    is_strict_number(&fixed).then_some(fixed)
}

fn is_strict_number(text: &str) -> bool {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let text = text.strip_prefix('-').unwrap_or(text);
    let (mantissa, exponent) = match text.find(['e', 'E']) {
        Some(at) => (text.get(..at).unwrap_or_default(), text.get(at + 1..)),
        None => (text, None),
    };
    let (whole, fraction) = match mantissa.split_once('.') {
        Some((whole, fraction)) => (whole, Some(fraction)),
        None => (mantissa, None),
    };
    digits(whole)
        && (whole == "0" || !whole.starts_with('0'))
        && fraction.is_none_or(digits)
        && exponent.is_none_or(|exponent| digits(exponent.strip_prefix(['+', '-']).unwrap_or(exponent)))
}

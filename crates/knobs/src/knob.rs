//! What a row of the table says.

use serde_json::Map;

/// A value that somebody wrote for a knob, already of the knob's kind.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// On or off.
    Bool(bool),
    /// Whole number, in the knob's unit.
    Int(i64),
    /// Real number.
    Float(f64),
    /// Text, or the chosen name of an enumeration.
    Str(String),
    /// A JSON object.
    Json(Map<String, serde_json::Value>),
}

impl std::fmt::Display for Value {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Bool(b) => write!(f, "{b}"),
            Self::Int(i) => write!(f, "{i}"),
            Self::Float(x) => write!(f, "{x}"),
            Self::Str(s) => f.write_str(s),
            Self::Json(map) => f.write_str(&serde_json::Value::Object(map.clone()).to_string()),
        }
    }
}

/// A default, in a form that can stand in a constant table.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Fixed {
    /// No value: the worker decides from the model or the machine; the knob's text says how.
    None,
    /// On or off.
    Bool(bool),
    /// Whole number.
    Int(i64),
    /// Real number.
    Float(f64),
    /// Text or enumeration name.
    Str(&'static str),
}

impl Fixed {
    /// The default as a [`Value`], `None` when there is none.
    #[must_use]
    pub fn value(self) -> Option<Value> {
        match self {
            Self::None => None,
            Self::Bool(b) => Some(Value::Bool(b)),
            Self::Int(i) => Some(Value::Int(i)),
            Self::Float(x) => Some(Value::Float(x)),
            Self::Str(s) => Some(Value::Str(s.to_owned())),
        }
    }
}

/// The kind of value that a knob takes, with its range.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    /// A switch: `--flag` turns it on, `--no-flag` (and the row's `off` names) turns it off.
    Bool,
    /// Whole number, both ends included.
    Int {
        /// Smallest allowed.
        min: i64,
        /// Largest allowed.
        max: i64,
    },
    /// Real number, finite, both ends included.
    Float {
        /// Smallest allowed.
        min: f64,
        /// Largest allowed.
        max: f64,
    },
    /// Text, not empty.
    Str,
    /// One of these names.
    Enum(&'static [&'static str]),
    /// A JSON object, on the command line as its text.
    Json,
}

/// Whether a knob does something in this version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// It does what its text says.
    Active,
    /// Accepted and checked; the part of the engine that it steers comes later. Setting it yields one warning line.
    AcceptedOnly(&'static str),
    /// Accepted, so that an existing command line works; it can mean nothing here, for this reason.
    NoMeaning(&'static str),
    /// Known and not to be had, for this reason: any other value than the default is an error, since a worker that
    /// went on without it would not be the one that was asked for.
    Refused(&'static str),
}

/// Where a knob stands in the help text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Group {
    /// Addresses, names, keys, timeouts, logs.
    Server,
    /// Lengths of replies and contexts.
    Lengths,
    /// Default sampling.
    Sampling,
    /// Tool calls, reasoning, templates.
    Chat,
    /// Queue, batches, prefill.
    Scheduling,
    /// Weights, KV cache, buffers.
    Memory,
    /// Models other than text generation.
    Other,
    /// Flags of the predecessor that mean nothing here.
    Legacy,
}

impl Group {
    /// Every group in the order of the help text.
    pub const ALL: [Self; 8] = [
        Self::Server,
        Self::Lengths,
        Self::Sampling,
        Self::Chat,
        Self::Scheduling,
        Self::Memory,
        Self::Other,
        Self::Legacy,
    ];

    /// Heading of the group.
    #[must_use]
    pub fn title(self) -> &'static str {
        match self {
            Self::Server => "Server",
            Self::Lengths => "Lengths",
            Self::Sampling => "Default sampling",
            Self::Chat => "Chat, tools, reasoning",
            Self::Scheduling => "Queue and scheduling",
            Self::Memory => "Weights and memory",
            Self::Other => "Other model kinds",
            Self::Legacy => "Accepted for old command lines",
        }
    }
}

/// One row of the table.
#[derive(Debug, Clone, Copy)]
pub struct Knob {
    /// Field of [`crate::Knobs`] that holds the resolved value.
    pub field: &'static str,
    /// Canonical flag, without the leading dashes.
    pub flag: &'static str,
    /// Other flags with the same meaning, without dashes.
    pub aliases: &'static [&'static str],
    /// Flags that turn a switch off, beside `no-<flag>`, without dashes.
    pub off: &'static [&'static str],
    /// Place in the help text.
    pub group: Group,
    /// Kind of value and range.
    pub kind: Kind,
    /// Names of an enumeration that are known and cannot be had yet: refused, and not as if they were misspelt.
    pub to_come: &'static [&'static str],
    /// Default.
    pub default: Fixed,
    /// Unit of the number, empty if it has none.
    pub unit: &'static str,
    /// What it does.
    pub help: &'static str,
    /// Why the default is what it is.
    pub reason: &'static str,
    /// Whether it does something yet.
    pub effect: Effect,
    /// Never shown in full (keys).
    pub secret: bool,
}

impl Knob {
    /// The key in a registry's `worker:` block: the flag in camel case (`max-num-seqs` is `maxNumSeqs`), as all other
    /// keys of the registry are. The flag's own spelling and snake case are understood too.
    #[must_use]
    pub fn yaml_key(&self) -> String {
        let mut key = String::with_capacity(self.flag.len());
        for (i, word) in self.flag.split('-').enumerate() {
            let mut chars = word.chars();
            match (i, chars.next()) {
                (0, Some(c)) => key.push(c),
                (_, Some(c)) => key.extend(c.to_uppercase()),
                (_, None) => {}
            }
            key.push_str(chars.as_str());
        }
        key
    }

    /// Words for the expected value: `a whole number from 1 to 64`.
    #[must_use]
    pub fn expects(&self) -> String {
        let unit = if self.unit.is_empty() {
            String::new()
        } else {
            format!(" ({})", self.unit)
        };
        match self.kind {
            Kind::Bool => "true or false".to_owned(),
            Kind::Int { min, max: i64::MAX } => format!("a whole number of at least {min}{unit}"),
            Kind::Int { min, max } => format!("a whole number from {min} to {max}{unit}"),
            Kind::Float { min, max } if max == f64::MAX => format!("a number of at least {min}{unit}"),
            Kind::Float { min, max } => format!("a number from {min} to {max}{unit}"),
            Kind::Str => "text".to_owned(),
            Kind::Enum(names) => format!("one of {}", names.join(", ")),
            Kind::Json => "a JSON object".to_owned(),
        }
    }

    /// Checks a JSON value (what YAML parses to) against kind and range. Whole floats pass as whole numbers.
    ///
    /// # Errors
    /// [`KnobError::BadValue`], [`KnobError::OutOfRange`] or [`KnobError::NotYet`], which show the knob as `name`.
    pub fn check(&self, name: &str, value: &serde_json::Value) -> Result<Value, KnobError> {
        use serde_json::Value as J;
        let bad = || self.bad(name, &shown(value));
        let checked = match (self.kind, value) {
            (Kind::Bool, J::Bool(b)) => Value::Bool(*b),
            (Kind::Int { .. }, J::Number(n)) => Value::Int(whole(n).ok_or_else(bad)?),
            (Kind::Float { .. }, J::Number(n)) => Value::Float(n.as_f64().ok_or_else(bad)?),
            (Kind::Str | Kind::Enum(_), J::String(s)) => Value::Str(s.clone()),
            // A key or a served name may well look like a number in YAML.
            (Kind::Str, J::Number(n)) => Value::Str(n.to_string()),
            (Kind::Json, J::Object(map)) => Value::Json(map.clone()),
            (Kind::Json, J::String(text)) => return self.check_text(name, text),
            _ => return Err(bad()),
        };
        self.check_range(name, checked)
    }

    /// Checks the text of a command-line value against kind and range.
    ///
    /// # Errors
    /// [`KnobError::BadValue`], [`KnobError::OutOfRange`] or [`KnobError::NotYet`], which show the knob as `name`.
    pub fn check_text(&self, name: &str, text: &str) -> Result<Value, KnobError> {
        let bad = || self.bad(name, text);
        let checked = match self.kind {
            Kind::Bool => match text.to_ascii_lowercase().as_str() {
                "true" | "yes" | "on" | "1" => Value::Bool(true),
                "false" | "no" | "off" | "0" => Value::Bool(false),
                _ => return Err(bad()),
            },
            Kind::Int { .. } => Value::Int(text.trim().parse().map_err(|_| bad())?),
            Kind::Float { .. } => Value::Float(text.trim().parse().map_err(|_| bad())?),
            Kind::Str | Kind::Enum(_) => Value::Str(text.to_owned()),
            Kind::Json => Value::Json(serde_json::from_str(text).map_err(|_| bad())?),
        };
        self.check_range(name, checked)
    }

    fn check_range(&self, name: &str, value: Value) -> Result<Value, KnobError> {
        let inside = match (self.kind, &value) {
            (Kind::Int { min, max }, Value::Int(i)) => (min..=max).contains(i),
            (Kind::Float { min, max }, Value::Float(x)) => x.is_finite() && (min..=max).contains(x),
            // `--log-level INFO` is as good as `info`.
            (Kind::Enum(names), Value::Str(s)) => match names.iter().find(|n| n.eq_ignore_ascii_case(s)) {
                Some(known) => return Ok(Value::Str((*known).to_owned())),
                None if self.to_come.iter().any(|n| n.eq_ignore_ascii_case(s)) => {
                    return Err(KnobError::NotYet {
                        name: name.to_owned(),
                        value: s.clone(),
                        expected: self.expects(),
                    });
                }
                None => return Err(self.bad(name, s)),
            },
            (Kind::Str, Value::Str(s)) => {
                if s.trim().is_empty() {
                    return Err(self.bad(name, s));
                }
                true
            }
            _ => true,
        };
        if inside {
            return Ok(value);
        }
        Err(KnobError::OutOfRange {
            name: name.to_owned(),
            value: value.to_string(),
            expected: self.expects(),
        })
    }

    fn bad(&self, name: &str, value: &str) -> KnobError {
        let value = if self.secret {
            "(hidden)".to_owned()
        } else {
            value.to_owned()
        };
        let suggestion = match self.kind {
            Kind::Enum(names) => crate::closest(&value, names.iter().copied()).map(str::to_owned),
            _ => None,
        };
        KnobError::BadValue {
            name: name.to_owned(),
            value,
            expected: self.expects(),
            suggestion,
        }
    }
}

fn shown(value: &serde_json::Value) -> String {
    match value {
        serde_json::Value::String(s) => s.clone(),
        other => other.to_string(),
    }
}

fn whole(n: &serde_json::Number) -> Option<i64> {
    if let Some(i) = n.as_i64() {
        return Some(i);
    }
    let x = n.as_f64()?;
    // 2^53: beyond it a float no longer stands for one whole number.
    #[allow(clippy::cast_possible_truncation)]
    (x.fract() == 0.0 && x.abs() <= 9_007_199_254_740_992.0).then_some(x as i64)
}

/// What is wrong with a command line or a `worker:` block. Every message names the knob and the value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KnobError {
    /// No such flag or key.
    #[error("unknown {what} {name}{}", did_you_mean(.suggestion.as_deref()))]
    Unknown {
        /// `flag`, `worker key` or `command`.
        what: &'static str,
        /// As written.
        name: String,
        /// The nearest known name.
        suggestion: Option<String>,
    },
    /// A flag that takes a value stands at the end, or another flag follows.
    #[error("{name} needs a value: {expected}")]
    MissingValue {
        /// As written.
        name: String,
        /// What it takes.
        expected: String,
    },
    /// The value is not of the knob's kind.
    #[error("{name}: `{value}` is not valid; expected {expected}{}", did_you_mean(.suggestion.as_deref()))]
    BadValue {
        /// As written.
        name: String,
        /// As written.
        value: String,
        /// What it takes.
        expected: String,
        /// The nearest allowed name of an enumeration.
        suggestion: Option<String>,
    },
    /// The value has the right kind and lies outside the range.
    #[error("{name}: {value} is out of range; expected {expected}")]
    OutOfRange {
        /// As written.
        name: String,
        /// As written.
        value: String,
        /// The range.
        expected: String,
    },
    /// A name that is known and has nothing behind it yet.
    #[error("{name}: `{value}` is refused: it is not available yet; expected {expected}")]
    NotYet {
        /// As written.
        name: String,
        /// As written.
        value: String,
        /// What there is.
        expected: String,
    },
    /// Two knobs contradict each other.
    #[error("{0}")]
    Conflict(String),
    /// A draft or speculative-decoding flag.
    #[error("{name} is refused: {}", crate::SPECULATIVE_REASON)]
    Speculative {
        /// As written.
        name: String,
    },
    /// A knob that is known and cannot be had.
    #[error("{name} is refused: {why}")]
    Refused {
        /// Its flag.
        name: String,
        /// Why.
        why: &'static str,
    },
    /// The command line has the wrong shape.
    #[error("{0}")]
    Usage(String),
}

fn did_you_mean(suggestion: Option<&str>) -> String {
    suggestion
        .map(|s| format!("; did you mean {s}?"))
        .unwrap_or_default()
}

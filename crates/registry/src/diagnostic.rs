//! What is wrong, and where.

use std::fmt;
use std::sync::Arc;

/// Whether a file with this finding can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// It cannot.
    Error,
    /// It can; something in it is not what it seems.
    Warning,
}

/// The kind of finding, for programs; the message is for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Code {
    /// Not YAML.
    Syntax,
    /// A key that nobody reads. A warning when serving, a failure in `swapd check` unless it is lenient.
    UnknownKey,
    /// A value of the wrong type.
    Type,
    /// A value of the right type that is not allowed.
    Value,
    /// A key that must be there.
    Missing,
    /// Two places that contradict each other.
    Conflict,
    /// A name that nothing has.
    UnknownName,
    /// A macro that is malformed or unknown.
    Macro,
    /// An environment variable that is not set or cannot be used.
    Environment,
    /// Speculative decoding.
    Speculative,
    /// A key that is accepted and has no effect.
    NoEffect,
    /// A file that cannot be read.
    Io,
}

/// One finding. Shown as `file:line:column: key: message`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diagnostic {
    /// Error or warning.
    pub severity: Severity,
    /// Kind.
    pub code: Code,
    /// File as named by the caller.
    pub file: Arc<str>,
    /// Line, from 1; 0 when the finding belongs to the file as a whole.
    pub line: u32,
    /// Column in characters, from 1; 0 when the finding belongs to the file as a whole.
    pub column: u32,
    /// Path of the key (`models.demo.worker.maxNumSeqs`); empty at the top.
    pub key: String,
    /// What is wrong, naming the value.
    pub message: String,
}

impl Diagnostic {
    /// Whether `swapd check` fails for it: errors always; keys that nobody reads and names that nothing has, unless it
    /// is lenient.
    #[must_use]
    pub fn fails_check(&self, lenient: bool) -> bool {
        self.severity == Severity::Error
            || (!lenient && matches!(self.code, Code::UnknownKey | Code::UnknownName))
    }
}

/// A [`Diagnostic`] of [`Severity::Warning`].
pub type Warning = Diagnostic;

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.file)?;
        if self.line > 0 {
            write!(f, ":{}:{}", self.line, self.column)?;
        }
        f.write_str(match self.severity {
            Severity::Error => ": error: ",
            Severity::Warning => ": warning: ",
        })?;
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        f.write_str(&self.message)
    }
}

/// A place in one of the sources.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Pos {
    /// Index of the source.
    pub(crate) file: usize,
    /// From 1; 0 for the source as a whole.
    pub(crate) line: u32,
    /// From 1; 0 for the source as a whole.
    pub(crate) column: u32,
}

/// Collects findings while a configuration is read.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    files: Vec<Arc<str>>,
    all: Vec<Diagnostic>,
    errors: usize,
}

/// Most errors, and most warnings, that are reported; nobody reads more, and looking for doubles takes its square.
const MAX_FINDINGS: usize = 500;

impl Findings {
    pub(crate) fn new(files: Vec<Arc<str>>) -> Self {
        Self {
            files,
            ..Self::default()
        }
    }

    pub(crate) fn error(&mut self, code: Code, at: Pos, key: impl Into<String>, message: impl Into<String>) {
        self.push(Severity::Error, code, at, key.into(), message.into());
    }

    pub(crate) fn warn(&mut self, code: Code, at: Pos, key: impl Into<String>, message: impl Into<String>) {
        self.push(Severity::Warning, code, at, key.into(), message.into());
    }

    fn push(&mut self, severity: Severity, code: Code, at: Pos, key: String, message: String) {
        let file = self
            .files
            .get(at.file)
            .cloned()
            .unwrap_or_else(|| Arc::from("configuration"));
        let found = Diagnostic {
            severity,
            code,
            file,
            line: at.line,
            column: at.column,
            key,
            message,
        };
        let same_kind = match severity {
            Severity::Error => self.errors,
            Severity::Warning => self.all.len() - self.errors,
        };
        if same_kind < MAX_FINDINGS && !self.all.contains(&found) {
            self.all.push(found);
            self.errors += usize::from(severity == Severity::Error);
        }
    }

    /// The name of a source.
    pub(crate) fn file(&self, index: usize) -> &str {
        self.files.get(index).map_or("configuration", |f| f)
    }

    pub(crate) fn has_errors(&self) -> bool {
        self.errors > 0
    }

    /// Everything found, by file and place.
    pub(crate) fn finish(mut self) -> Vec<Diagnostic> {
        let order = |d: &Diagnostic| self.files.iter().position(|f| *f == d.file);
        self.all.sort_by_key(|d| (order(d), d.line, d.column, d.severity));
        self.all
    }
}

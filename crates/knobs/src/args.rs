//! The worker's command line.

use crate::knob::{Kind, KnobError};
use crate::table::{TABLE, by_flag};
use crate::{Knobs, Settings, closest, is_speculative};

/// A parsed `serve` command line.
#[derive(Debug, Clone, PartialEq)]
pub struct ParsedArgs {
    /// Directory of a model, or its hub id.
    pub model: String,
    /// What was written.
    pub settings: Settings,
    /// What it resolves to.
    pub knobs: Knobs,
    /// Lines to print, one for each knob that has no effect in this version.
    pub warnings: Vec<String>,
}

/// What a command line asks for.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// `serve MODEL ...`.
    Serve(Box<ParsedArgs>),
    /// `--help`, `help`, or nothing at all: print [`crate::help_text`].
    Help,
    /// `--version`.
    Version,
}

/// Parses everything after the program's name.
///
/// # Errors
/// As [`parse_args`]; also an unknown command.
pub fn parse_command(args: &[String]) -> Result<Command, KnobError> {
    let Some((first, rest)) = args.split_first() else {
        return Ok(Command::Help);
    };
    match first.as_str() {
        "serve" if rest.iter().any(|a| a == "--help" || a == "-h") => Ok(Command::Help),
        "serve" => parse_args(rest).map(|parsed| Command::Serve(Box::new(parsed))),
        "help" | "--help" | "-h" => Ok(Command::Help),
        "--version" | "-V" | "version" => Ok(Command::Version),
        other => Err(KnobError::Unknown {
            what: "command",
            name: format!("`{other}`"),
            suggestion: closest(other, ["serve", "help", "version"]).map(|c| format!("`{c}`")),
        }),
    }
}

/// Parses what follows `serve`: one model, and flags as `--flag value` or `--flag=value` in any order. A flag given
/// twice counts as last given. `--model M` is understood as the model too; `--` ends the flags.
///
/// # Errors
/// The first thing wrong: an unknown flag (with the nearest known one), a missing, malformed or out-of-range value,
/// a speculative-decoding flag, two knobs in conflict, no model or more than one.
pub fn parse_args(args: &[String]) -> Result<ParsedArgs, KnobError> {
    let mut settings = Settings::new();
    let mut models: Vec<String> = Vec::new();
    let mut args = args.iter();
    let mut flags_ended = false;
    while let Some(arg) = args.next() {
        if flags_ended || !arg.starts_with('-') || arg == "-" {
            models.push(arg.clone());
            continue;
        }
        if arg == "--" {
            flags_ended = true;
            continue;
        }
        let (name, inline) = match arg.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (arg.as_str(), None),
        };
        if name == "--model" {
            let value = inline.map(str::to_owned).or_else(|| args.next().cloned());
            models.push(value.ok_or_else(|| KnobError::MissingValue {
                name: name.to_owned(),
                expected: "a model directory or hub id".to_owned(),
            })?);
            continue;
        }
        let Some((knob, _)) = by_flag(name).filter(|_| name.starts_with("--")) else {
            return Err(unknown(name));
        };
        let text = match (knob.kind, inline) {
            (_, Some(value)) => Some(value),
            (Kind::Bool, None) => None,
            (_, None) => args.next().map(String::as_str).filter(|v| !v.starts_with("--")),
        };
        settings.set_flag(name, text)?;
    }
    let mut models = models.into_iter();
    let Some(model) = models.next().filter(|m| !m.is_empty()) else {
        return Err(KnobError::Usage(
            "which model? usage: mlxworker serve MODEL [flags]".to_owned(),
        ));
    };
    if let Some(second) = models.next() {
        return Err(KnobError::Usage(format!(
            "one model at a time: got `{model}` and `{second}`"
        )));
    }
    let knobs = settings.resolve()?;
    let warnings = settings.warnings();
    Ok(ParsedArgs {
        model,
        settings,
        knobs,
        warnings,
    })
}

fn unknown(name: &str) -> KnobError {
    if is_speculative(name) {
        return KnobError::Speculative {
            name: name.to_owned(),
        };
    }
    let known = TABLE.iter().flat_map(|k| {
        std::iter::once(k.flag)
            .chain(k.aliases.iter().copied())
            .chain(k.off.iter().copied())
    });
    KnobError::Unknown {
        what: "flag",
        name: name.to_owned(),
        suggestion: closest(name, known).map(|flag| format!("--{flag}")),
    }
}

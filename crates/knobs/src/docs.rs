//! `--help` and the reference page, from the table.

use std::fmt::Write as _;

use crate::knob::{Effect, Fixed, Group, Kind, Knob};
use crate::table::TABLE;

/// The text of `mlxworker --help`.
#[must_use]
pub fn help_text() -> String {
    let mut out = String::from(
        "mlxworker serves one model over an OpenAI-compatible API.\n\n\
         Usage: mlxworker serve MODEL [flags]\n\n\
         MODEL is a directory in the MLX / Hugging Face layout, or a hub id found in HF_HOME.\n\
         Flags take their value as `--flag value` or `--flag=value`; switches have a `--no-` form.\n",
    );
    for group in Group::ALL {
        // Writing to a String cannot fail.
        let _ = writeln!(out, "\n{}:", group.title());
        for knob in TABLE.iter().filter(|k| k.group == group) {
            let _ = writeln!(out, "  --{}{}", knob.flag, placeholder(knob));
            if group == Group::Legacy {
                if let Effect::NoMeaning(why) = knob.effect {
                    let _ = writeln!(out, "      No meaning here: {why}.");
                }
                continue;
            }
            let mut text = knob.help.trim().to_owned();
            if knob.default != Fixed::None {
                let _ = write!(text, " Default: {}.", default_text(knob));
            }
            match knob.effect {
                Effect::Active => {}
                Effect::AcceptedOnly(why) => {
                    let _ = write!(text, " No effect yet: {why}.");
                }
                Effect::NoMeaning(why) => {
                    let _ = write!(text, " No meaning here: {why}.");
                }
                Effect::Refused(why) => {
                    let _ = write!(text, " Refused: {why}.");
                }
            }
            for line in wrap(&text, 92) {
                let _ = writeln!(out, "      {line}");
            }
        }
    }
    out.push('\n');
    for line in wrap(
        &format!("There is no draft flag: {}.", crate::SPECULATIVE_REASON),
        98,
    ) {
        let _ = writeln!(out, "{line}");
    }
    out
}

/// The knobs' part of the reference page: one table per group, in Markdown.
#[must_use]
pub fn reference_markdown() -> String {
    let mut out = String::new();
    for group in Group::ALL {
        let _ = writeln!(out, "### {}\n", group.title());
        let _ = writeln!(
            out,
            "| key in `worker:` | flag | value | default | what it does, and why the default |"
        );
        let _ = writeln!(out, "|---|---|---|---|---|");
        for knob in TABLE.iter().filter(|k| k.group == group) {
            let mut flag = format!("`--{}`", knob.flag);
            for alias in knob.aliases {
                let _ = write!(flag, ", `--{alias}`");
            }
            if knob.kind == Kind::Bool {
                for off in knob.off {
                    let _ = write!(flag, "; off: `--{off}`");
                }
            }
            let mut text = knob.help.trim().to_owned();
            if !knob.reason.is_empty() {
                let _ = write!(text, " *Why: {}.*", knob.reason);
            }
            match knob.effect {
                Effect::Active => {}
                Effect::AcceptedOnly(why) => {
                    let _ = write!(text, " **No effect yet:** {why}.");
                }
                Effect::NoMeaning(why) => {
                    let _ = write!(text, " **No meaning here:** {why}.");
                }
                Effect::Refused(why) => {
                    let _ = write!(text, " **Refused:** {why}.");
                }
            }
            if !knob.to_come.is_empty() {
                let _ = write!(
                    text,
                    " **Refused, as they are not available yet:** {}.",
                    knob.to_come.join(", ")
                );
            }
            let default = match knob.default {
                Fixed::None => "–".to_owned(),
                _ => format!("`{}`", default_text(knob)),
            };
            let value = knob.expects();
            let _ = writeln!(
                out,
                "| `{}` | {flag} | {value} | {default} | {} |",
                knob.yaml_key(),
                text.replace('|', "\\|")
            );
        }
        out.push('\n');
    }
    out
}

fn default_text(knob: &Knob) -> String {
    knob.default.value().map(|v| v.to_string()).unwrap_or_default()
}

fn placeholder(knob: &Knob) -> String {
    match knob.kind {
        Kind::Bool => String::new(),
        Kind::Int { .. } => " N".to_owned(),
        Kind::Float { .. } => " X".to_owned(),
        Kind::Str => " TEXT".to_owned(),
        Kind::Enum(names) if names.len() <= 6 => format!(" {}", names.join("|")),
        Kind::Enum(_) => " NAME".to_owned(),
        Kind::Json => " JSON".to_owned(),
    }
}

fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = Vec::new();
    let mut line = String::new();
    for word in text.split_whitespace() {
        if !line.is_empty() && line.len() + 1 + word.len() > width {
            lines.push(std::mem::take(&mut line));
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
    }
    if !line.is_empty() {
        lines.push(line);
    }
    lines
}

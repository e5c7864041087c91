//! Which markup a model uses for tool calls and reasoning.

use std::fmt;
use std::str::FromStr;

/// The markup of tool calls in a model's output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum ToolFormat {
    /// No tool calls: the output is text.
    #[default]
    None,
    /// `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, the format of Hermes and Qwen2.5/Qwen3.
    Hermes,
}

impl ToolFormat {
    /// The format that a chat template teaches: Hermes when the template writes `<tool_call>`, else none. Templates that
    /// put tags instead of JSON inside of it (`<function=`: Qwen3-Coder, Qwen3.5; `<arg_key>`: GLM) teach another format.
    pub fn detect(template_source: &str) -> Self {
        let json_inside = !template_source.contains("<function=") && !template_source.contains("<arg_key>");
        if json_inside && template_source.contains("<tool_call>") {
            Self::Hermes
        } else {
            Self::None
        }
    }

    /// The format for a knob's value: `auto` asks the template, every other name is taken as [`FromStr`] does.
    ///
    /// # Errors
    /// [`UnknownToolFormat`] with the names that exist.
    pub fn resolve(name: &str, template_source: &str) -> Result<Self, UnknownToolFormat> {
        if name == "auto" {
            Ok(Self::detect(template_source))
        } else {
            name.parse()
        }
    }
}

impl FromStr for ToolFormat {
    type Err = UnknownToolFormat;

    /// `hermes`, `qwen` and `qwen3` are one format; `none` turns parsing off.
    fn from_str(name: &str) -> Result<Self, Self::Err> {
        match name {
            "none" => Ok(Self::None),
            "hermes" | "qwen" | "qwen3" => Ok(Self::Hermes),
            other => Err(UnknownToolFormat(other.to_owned())),
        }
    }
}

impl fmt::Display for ToolFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Hermes => "hermes",
        })
    }
}

/// There is no tool-call format of this name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown tool-call format {0:?}; there are: auto, hermes, qwen, qwen3, none")]
pub struct UnknownToolFormat(pub String);

/// Whether, and from where, output is reasoning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Reasoning {
    /// No reasoning markup: `<think>` is text like any other.
    #[default]
    Off,
    /// The output starts outside of reasoning. A `<think>` before any other text opens it.
    Outside,
    /// The output starts inside of reasoning: the prompt ends with an open `<think>`.
    Inside,
}

impl Reasoning {
    /// The mode for one request. `template_source` tells whether the model knows `<think>` at all; the end of the
    /// rendered prompt tells whether the template has opened it already (`<think>\n`), or has closed it with an empty
    /// block (`<think>\n\n</think>\n\n`, thinking off).
    pub fn detect(template_source: &str, rendered_prompt: &str) -> Self {
        if !template_source.contains("<think>") && !template_source.contains("</think>") {
            Self::Off
        } else if rendered_prompt.trim_end().ends_with("<think>") {
            Self::Inside
        } else {
            Self::Outside
        }
    }
}

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

    /// What a template that takes tools teaches instead of a format that is known here, in words; `None` when it takes none,
    /// or teaches a known one. Calls in such a model's replies stay text.
    pub fn unknown(template_source: &str) -> Option<&'static str> {
        if Self::detect(template_source) != Self::None {
            return None;
        }
        let known: [(&str, &str); 6] = [
            (
                "<function=",
                "tags inside of <tool_call> (`<function=`: Qwen3-Coder, Qwen3.5)",
            ),
            ("<arg_key>", "tags inside of <tool_call> (`<arg_key>`: GLM)"),
            ("[TOOL_CALLS]", "`[TOOL_CALLS]` (Mistral)"),
            ("<|python_tag|>", "`<|python_tag|>` (Llama)"),
            ("<|channel|>", "channels (gpt-oss)"),
            (
                "<|tool_calls_section_begin|>",
                "`<|tool_calls_section_begin|>` (Kimi)",
            ),
        ];
        known
            .iter()
            .find(|(mark, _)| template_source.contains(mark))
            .map(|(_, words)| *words)
            .or_else(|| template_source.contains("tools").then_some("a markup of its own"))
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

    /// `hermes`, `nous`, `qwen` and `qwen3` are one format; `none` turns parsing off.
    fn from_str(name: &str) -> Result<Self, Self::Err> {
        match name {
            "none" => Ok(Self::None),
            "hermes" | "nous" | "qwen" | "qwen3" => Ok(Self::Hermes),
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
#[error("unknown tool-call format {0:?}; there are: auto, hermes, nous, qwen, qwen3, none")]
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
        } else {
            Self::of_prompt(rendered_prompt)
        }
    }

    /// The same for a model that is known to write `<think>`, whatever its template says.
    pub fn of_prompt(rendered_prompt: &str) -> Self {
        if rendered_prompt.trim_end().ends_with("<think>") {
            Self::Inside
        } else {
            Self::Outside
        }
    }
}

/// Which markup of reasoning to look for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ReasoningFormat {
    /// None: all output is the answer.
    None,
    /// `<think>`, when the template knows it.
    #[default]
    Auto,
    /// `<think>`, also when the template does not say so: the model may have learnt it all the same.
    Think,
}

impl ReasoningFormat {
    /// The mode for one request; see [`Reasoning::detect`].
    #[must_use]
    pub fn of(self, template_source: &str, rendered_prompt: &str) -> Reasoning {
        match self {
            Self::None => Reasoning::Off,
            Self::Auto => Reasoning::detect(template_source, rendered_prompt),
            Self::Think => Reasoning::of_prompt(rendered_prompt),
        }
    }
}

impl FromStr for ReasoningFormat {
    type Err = UnknownReasoningFormat;

    /// `qwen3`, `deepseek_r1` and `glm4` are one format.
    fn from_str(name: &str) -> Result<Self, Self::Err> {
        match name {
            "none" => Ok(Self::None),
            "auto" => Ok(Self::Auto),
            "qwen3" | "deepseek_r1" | "glm4" => Ok(Self::Think),
            other => Err(UnknownReasoningFormat(other.to_owned())),
        }
    }
}

impl fmt::Display for ReasoningFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Auto => "auto",
            Self::Think => "think",
        })
    }
}

/// There is no reasoning format of this name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown reasoning format {0:?}; there are: auto, qwen3, deepseek_r1, glm4, none")]
pub struct UnknownReasoningFormat(pub String);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_format_that_is_asked_for_needs_no_template_that_says_so() {
        let plain = "{{ messages }}";
        let asked: ReasoningFormat = "deepseek_r1".parse().unwrap();
        assert_eq!(asked.of(plain, "User: hi"), Reasoning::Outside);
        assert_eq!(asked.of(plain, "User: hi\n<think>\n"), Reasoning::Inside);
        assert_eq!(
            ReasoningFormat::Auto.of(plain, "User: hi\n<think>\n"),
            Reasoning::Off
        );
        assert_eq!(
            ReasoningFormat::Auto.of("<think>", "User: hi"),
            Reasoning::Outside
        );
        assert_eq!(ReasoningFormat::None.of("<think>", "<think>"), Reasoning::Off);
        assert!("harmony".parse::<ReasoningFormat>().is_err());
    }

    #[test]
    fn markup_that_is_not_parsed_is_named() {
        for (template, words) in [
            ("{{ tools }}<tool_call><function=name>", Some("Qwen3-Coder")),
            ("{{ tools }}<tool_call>{name}<arg_key>", Some("GLM")),
            ("{{ tools }}[TOOL_CALLS]", Some("Mistral")),
            ("{% for tool in tools %}<call>", Some("its own")),
            ("{{ tools }}<tool_call>{json}", None),
            ("{{ messages }}", None),
        ] {
            let found = ToolFormat::unknown(template);
            assert_eq!(found.is_some(), words.is_some(), "{template}");
            assert!(
                found.unwrap_or_default().contains(words.unwrap_or_default()),
                "{found:?}"
            );
        }
    }
}

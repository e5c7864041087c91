//! Reasoning markup: splits `<think>…</think>` from the answer.

use super::delta::{Delta, EndReason, push_text};
use super::format::{Reasoning, ToolFormat};
use super::late_call::LateCall;
use super::{OutputConfig, hermes};

const OPEN: &str = "<think>";
const CLOSE: &str = "</think>";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// Outside, and nothing but white space so far: `<think>` opens reasoning here, and only here.
    Start,
    /// Inside. `leading`: nothing but line breaks so far.
    Thinking { leading: bool },
    /// After `</think>`, before the answer's first character.
    Closed,
    /// The answer. From here on, markup is text.
    Answer,
}

/// The incremental splitter. Line breaks beside the tags are layout and go away, as the templates put them back.
///
/// A reply without any tag is an answer, unless the prompt has opened the block; then it is reasoning until the tag
/// closes it. A stray `</think>` in the answer stays text: what has been shown is never re-labelled.
#[derive(Debug)]
pub(crate) struct ReasoningSplitter {
    mode: Mode,
    /// White space, or line breaks inside of reasoning, whose fate is open.
    space: String,
    /// The start of what may become a tag.
    tag: String,
    late: Late,
}

/// What is known of calls inside of reasoning.
#[derive(Debug)]
enum Late {
    /// They are text.
    Off,
    Watching(OutputConfig),
    Reading(Box<LateCall>),
}

impl ReasoningSplitter {
    pub(crate) fn new(config: &OutputConfig) -> Self {
        let mode = match config.reasoning {
            Reasoning::Off => Mode::Answer,
            Reasoning::Outside => Mode::Start,
            Reasoning::Inside => Mode::Thinking { leading: true },
        };
        let late = if config.tool_format == ToolFormat::Hermes && !config.tools.is_empty() {
            Late::Watching(config.clone())
        } else {
            Late::Off
        };
        Self {
            mode,
            space: String::new(),
            tag: String::new(),
            late,
        }
    }

    /// Whether everything from here on is the answer.
    pub(crate) fn is_answer(&self) -> bool {
        self.mode == Mode::Answer
    }

    /// Takes a piece of text. Reasoning goes to `out`, the answer's text is appended to `answer`.
    pub(crate) fn push(&mut self, text: &str, answer: &mut String, out: &mut Vec<Delta>) {
        for (at, c) in text.char_indices() {
            if self.is_answer() {
                answer.push_str(text.get(at..).unwrap_or_default());
                return;
            }
            self.take(c, answer, out);
        }
    }

    pub(crate) fn finish(&mut self, reason: EndReason, answer: &mut String, out: &mut Vec<Delta>) {
        if let Late::Reading(late) = std::mem::replace(&mut self.late, Late::Off) {
            match late.finish(reason) {
                Ok(calls) => {
                    self.space.clear();
                    out.extend(calls);
                }
                Err(raw) => self.push(&raw, answer, out),
            }
        }
        let space = std::mem::take(&mut self.space);
        let tag = std::mem::take(&mut self.tag);
        match self.mode {
            Mode::Start => {
                answer.push_str(&space);
                answer.push_str(&tag);
            }
            Mode::Thinking { leading } => {
                if !leading || !tag.is_empty() {
                    push_text(out, &space, true);
                }
                push_text(out, &tag, true);
            }
            Mode::Closed | Mode::Answer => answer.push_str(&tag),
        }
        self.mode = Mode::Answer;
    }

    fn take(&mut self, c: char, answer: &mut String, out: &mut Vec<Delta>) {
        if let Late::Reading(late) = &mut self.late {
            if !late.take(c)
                && let Late::Reading(late) = std::mem::replace(&mut self.late, Late::Off)
            {
                self.push(&late.into_raw(), answer, out);
            }
            return;
        }
        if !self.tag.is_empty() {
            self.tag.push(c);
            let (open, close) = self.expected();
            let call = match &self.late {
                Late::Watching(config) if close => Some(config),
                _ => None,
            };
            let starts = |may_come: bool, tag: &str| may_come && tag.starts_with(self.tag.as_str());
            if open && self.tag == OPEN {
                self.tag.clear();
                self.open(out);
            } else if close && self.tag == CLOSE {
                self.tag.clear();
                self.space.clear();
                self.mode = Mode::Closed;
            } else if let Some(config) = call.filter(|_| self.tag == hermes::OPEN) {
                self.tag.clear();
                self.late = Late::Reading(Box::new(LateCall::new(config)));
            } else if !starts(open, OPEN) && !starts(close, CLOSE) && !starts(call.is_some(), hermes::OPEN) {
                self.tag.pop();
                let literal = std::mem::take(&mut self.tag);
                self.text(&literal, answer, out);
                if self.is_answer() {
                    answer.push(c);
                } else {
                    self.take(c, answer, out);
                }
            }
            return;
        }
        let is_space = match self.mode {
            Mode::Thinking { .. } => matches!(c, '\n' | '\r'),
            _ => c.is_whitespace(),
        };
        if c == '<' {
            self.tag.push(c);
        } else if is_space {
            self.space.push(c);
        } else {
            self.text(c.encode_utf8(&mut [0; 4]), answer, out);
        }
    }

    /// Which tags mean something here: opening, closing.
    fn expected(&self) -> (bool, bool) {
        match self.mode {
            Mode::Start | Mode::Closed => (true, false),
            // A model may repeat the tag that the prompt has opened.
            Mode::Thinking { leading } => (leading, true),
            Mode::Answer => (false, false),
        }
    }

    fn open(&mut self, out: &mut Vec<Delta>) {
        if self.mode == Mode::Closed {
            // A second block: keep its text apart from the first one's.
            push_text(out, "\n", true);
        }
        self.space.clear();
        self.mode = Mode::Thinking { leading: true };
    }

    /// Text that is no markup.
    fn text(&mut self, text: &str, answer: &mut String, out: &mut Vec<Delta>) {
        let space = std::mem::take(&mut self.space);
        match self.mode {
            Mode::Thinking { leading } => {
                if !leading {
                    push_text(out, &space, true);
                }
                push_text(out, text, true);
                self.mode = Mode::Thinking { leading: false };
            }
            Mode::Closed => {
                answer.push_str(space.trim_start_matches(['\n', '\r']));
                answer.push_str(text);
                self.mode = Mode::Answer;
            }
            Mode::Start | Mode::Answer => {
                answer.push_str(&space);
                answer.push_str(text);
                self.mode = Mode::Answer;
            }
        }
    }
}

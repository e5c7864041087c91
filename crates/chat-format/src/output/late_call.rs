//! A call inside of reasoning that the model never left: it forgot `</think>`, called, and ended its turn.
//!
//! Reasoning may also just talk about a call, or weigh one and decide against it. So a call in there counts only if
//! it is complete, of a declared function, and nothing but further calls and then perhaps `</think>` follows it to the
//! end of the output. Until that is decided its text is held back.

use super::delta::{CallOutcome, Delta, EndReason};
use super::hermes::{self, HermesParser};
use super::{Delivery, OutputConfig};

const CLOSE: &str = "</think>";

/// The text from the call's tag on, and what it would mean as calls.
#[derive(Debug)]
pub(crate) struct LateCall {
    raw: String,
    parser: HermesParser,
    deltas: Vec<Delta>,
    /// What is neither call nor white space; only `</think>` may be.
    rest: String,
}

impl LateCall {
    /// Begins after the call's opening tag.
    pub(crate) fn new(config: &OutputConfig) -> Self {
        let mut parser = HermesParser::new(&OutputConfig {
            delivery: Delivery::Whole,
            ..config.clone()
        });
        let mut deltas = Vec::new();
        parser.push(hermes::OPEN, &mut deltas);
        Self {
            raw: hermes::OPEN.to_owned(),
            parser,
            deltas,
            rest: String::new(),
        }
    }

    /// Takes a character; false when this cannot be a late call any more.
    pub(crate) fn take(&mut self, c: char) -> bool {
        self.raw.push(c);
        let seen = self.deltas.len();
        self.parser.push(c.encode_utf8(&mut [0; 4]), &mut self.deltas);
        let new = self.deltas.split_off(seen);
        self.keep(new)
    }

    /// The calls, if that is what the output ended with; else the raw text.
    pub(crate) fn finish(mut self, reason: EndReason) -> Result<Vec<Delta>, String> {
        let mut last = Vec::new();
        self.parser.finish(reason, &mut last);
        if self.keep(last) && !self.deltas.is_empty() {
            Ok(self.deltas)
        } else {
            Err(self.raw)
        }
    }

    pub(crate) fn into_raw(self) -> String {
        self.raw
    }

    fn keep(&mut self, new: Vec<Delta>) -> bool {
        for delta in new {
            match delta {
                // Reasoning was left after all, so that the call in it was only a thought.
                Delta::ToolCallBegin { .. } if !self.rest.is_empty() => return false,
                Delta::Content(text) => self.rest.push_str(text.trim()),
                Delta::Malformed { .. }
                | Delta::Reasoning(_)
                | Delta::ToolCallBegin { known: false, .. }
                | Delta::ToolCallEnd {
                    outcome: CallOutcome::Truncated | CallOutcome::Invalid,
                    ..
                } => return false,
                delta => self.deltas.push(delta),
            }
        }
        CLOSE.starts_with(self.rest.as_str())
    }
}

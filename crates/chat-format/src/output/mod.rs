//! Model output: text pieces in, [`Delta`]s out.

mod call;
mod coerce;
mod delta;
mod format;
mod hermes;
mod late_call;
mod lenient;
mod reasoning;
mod tools;

use std::sync::Arc;

pub use delta::{CallOutcome, Delta, EndReason, MalformedReason, ParsedOutput, ToolCall};
pub use format::{Reasoning, ReasoningFormat, ToolFormat, UnknownReasoningFormat, UnknownToolFormat};
pub use tools::ToolSet;

use delta::push_text;
use hermes::HermesParser;
use reasoning::ReasoningSplitter;

/// When a tool call is handed out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Delivery {
    /// As it is written: the name as soon as the first argument begins, then the arguments in fragments. A call that
    /// turns out invalid has been announced by then; it ends as [`CallOutcome::Invalid`].
    #[default]
    Incremental,
    /// In one piece, when it is complete. Invalid and truncated calls are never announced, only
    /// [`Delta::Malformed`].
    Whole,
}

/// How a reply is to be read.
#[derive(Debug, Clone, Default)]
pub struct OutputConfig {
    /// The markup of tool calls; [`ToolFormat::None`] when the request has no tools or wants none called.
    pub tool_format: ToolFormat,
    /// Where the output starts with respect to reasoning.
    pub reasoning: Reasoning,
    /// The request's tools: for the flag `known`, type coercion, and calls without tags.
    pub tools: Arc<ToolSet>,
    /// When calls are handed out.
    pub delivery: Delivery,
    /// Call ids are this and the call's index. Put something unique to the request into it (`call_` and random
    /// characters): clients match results to calls by id over the whole conversation.
    pub call_id_prefix: String,
}

/// The incremental parser of one reply. How the text is cut into pieces makes no difference to the sum of the deltas.
///
/// ```
/// use chat_format::{Delta, EndReason, OutputConfig, OutputParser, ParsedOutput, ToolFormat};
///
/// let mut parser =
///     OutputParser::new(OutputConfig { tool_format: ToolFormat::Hermes, ..OutputConfig::default() });
/// let mut deltas = Vec::new();
/// for piece in ["Let me see. <tool", "_call>{\"name\": \"now\", \"argum", "ents\": {}}</tool_call>"] {
///     parser.push(piece, &mut deltas);
/// }
/// parser.finish(EndReason::Stop, &mut deltas);
/// let reply = ParsedOutput::from_deltas(deltas);
/// assert_eq!(reply.content, "Let me see.");
/// assert_eq!(reply.tool_calls[0].name, "now");
/// ```
#[derive(Debug)]
pub struct OutputParser {
    reasoning: ReasoningSplitter,
    calls: Calls,
}

/// The parser of the answer's text. Another tool-call format is another variant.
#[derive(Debug)]
enum Calls {
    None,
    Hermes(Box<HermesParser>),
}

impl OutputParser {
    /// A parser for one reply.
    pub fn new(config: OutputConfig) -> Self {
        let calls = match config.tool_format {
            ToolFormat::None => Calls::None,
            ToolFormat::Hermes => Calls::Hermes(Box::new(HermesParser::new(&config))),
        };
        Self {
            reasoning: ReasoningSplitter::new(&config),
            calls,
        }
    }

    /// Takes the next piece of the model's text and appends what it means to `deltas`. A character is looked at once
    /// or twice, whatever the length of the reply.
    pub fn push(&mut self, text: &str, deltas: &mut Vec<Delta>) {
        if self.reasoning.is_answer() {
            self.calls.push(text, deltas);
        } else {
            let mut answer = String::new();
            self.reasoning.push(text, &mut answer, deltas);
            self.calls.push(&answer, deltas);
        }
    }

    /// The model has ended: appends what was still held back.
    pub fn finish(&mut self, reason: EndReason, deltas: &mut Vec<Delta>) {
        let mut answer = String::new();
        self.reasoning.finish(reason, &mut answer, deltas);
        self.calls.push(&answer, deltas);
        self.calls.finish(reason, deltas);
    }
}

impl Calls {
    fn push(&mut self, text: &str, deltas: &mut Vec<Delta>) {
        match self {
            Self::None => push_text(deltas, text, false),
            Self::Hermes(parser) => parser.push(text, deltas),
        }
    }

    fn finish(&mut self, reason: EndReason, deltas: &mut Vec<Delta>) {
        match self {
            Self::None => {}
            Self::Hermes(parser) => parser.finish(reason, deltas),
        }
    }
}

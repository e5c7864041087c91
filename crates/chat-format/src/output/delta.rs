//! What an output parser says: deltas, and their sum.

/// One piece of parsed model output. Pieces arrive in the order in which the model wrote them.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Delta {
    /// Text for the user.
    Content(String),
    /// Text of the model's reasoning (`reasoning_content`).
    Reasoning(String),
    /// A tool call begins. Its arguments follow as fragments.
    ToolCallBegin {
        /// Position among this reply's calls, from 0.
        index: usize,
        /// The call's id, made from [`OutputConfig::call_id_prefix`](super::OutputConfig::call_id_prefix).
        id: String,
        /// The function's name as the model wrote it.
        name: String,
        /// Whether the request declared a tool of that name.
        known: bool,
    },
    /// The next piece of the arguments' JSON text.
    ToolCallArguments {
        /// The call it belongs to.
        index: usize,
        /// Appended in order, the fragments of a [`CallOutcome::Complete`] call are one JSON object.
        fragment: String,
    },
    /// The call is over.
    ToolCallEnd {
        /// The call it belongs to.
        index: usize,
        /// Whether its arguments are whole.
        outcome: CallOutcome,
    },
    /// Markup that was meant as a tool call but is none: the model's own text, tags included. Where a protocol has no
    /// place for it, show it as content: nothing the model said may vanish.
    Malformed {
        /// The raw text.
        text: String,
        /// What is wrong with it.
        reason: MalformedReason,
    },
}

/// How a tool call ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CallOutcome {
    /// The arguments are one complete JSON object.
    Complete,
    /// The output ended inside the arguments (length limit, cancellation): they are a prefix of JSON.
    Truncated,
    /// The text stopped being JSON inside the arguments. A [`Delta::Malformed`] with the whole call follows.
    Invalid,
}

/// Why markup is not a tool call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MalformedReason {
    /// Not JSON, and not repairable without guessing.
    Syntax,
    /// JSON, but without a function name, or with arguments that are no object.
    NotACall,
    /// The output ended before the call was complete.
    Truncated,
    /// A complete call had further keys beside its name and arguments; this is their text.
    ExtraKeys,
}

/// Why the model's output ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndReason {
    /// The model ended its turn (end-of-sequence token), or a stop string was met.
    Stop,
    /// The token limit cut it off.
    Length,
    /// The request was cancelled or failed.
    Cancelled,
}

/// One tool call, put together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToolCall {
    /// The call's id.
    pub id: String,
    /// The function's name.
    pub name: String,
    /// Whether the request declared a tool of that name.
    pub known: bool,
    /// The arguments' JSON text.
    pub arguments: String,
    /// Whether the arguments are whole.
    pub outcome: CallOutcome,
}

/// A whole reply, put together from its deltas; for replies that are not streamed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ParsedOutput {
    /// Text for the user; malformed calls are part of it, as raw text.
    pub content: String,
    /// The model's reasoning.
    pub reasoning: String,
    /// The tool calls in order, without those whose text turned out invalid (they are in `content`).
    pub tool_calls: Vec<ToolCall>,
    /// The raw texts of malformed calls, with the reason.
    pub malformed: Vec<(String, MalformedReason)>,
}

impl ParsedOutput {
    /// Sums up deltas. Calls with [`CallOutcome::Invalid`] are left out: their text follows as malformed.
    pub fn from_deltas(deltas: impl IntoIterator<Item = Delta>) -> Self {
        let mut sum = Self::default();
        for delta in deltas {
            match delta {
                Delta::Content(text) => sum.content.push_str(&text),
                Delta::Reasoning(text) => sum.reasoning.push_str(&text),
                Delta::ToolCallBegin { id, name, known, .. } => sum.tool_calls.push(ToolCall {
                    id,
                    name,
                    known,
                    arguments: String::new(),
                    outcome: CallOutcome::Truncated,
                }),
                Delta::ToolCallArguments { index, fragment } => {
                    if let Some(call) = sum.tool_calls.get_mut(index) {
                        call.arguments.push_str(&fragment);
                    }
                }
                Delta::ToolCallEnd { index, outcome } => {
                    if let Some(call) = sum.tool_calls.get_mut(index) {
                        call.outcome = outcome;
                    }
                }
                Delta::Malformed { text, reason } => {
                    sum.content.push_str(&text);
                    sum.malformed.push((text, reason));
                }
            }
        }
        sum.tool_calls.retain(|call| call.outcome != CallOutcome::Invalid);
        sum
    }
}

/// Appends text to the last delta if that is of the same kind, so that a push gives few deltas.
pub(crate) fn push_text(deltas: &mut Vec<Delta>, text: &str, reasoning: bool) {
    if text.is_empty() {
        return;
    }
    match (deltas.last_mut(), reasoning) {
        (Some(Delta::Content(last)), false) | (Some(Delta::Reasoning(last)), true) => last.push_str(text),
        (_, false) => deltas.push(Delta::Content(text.to_owned())),
        (_, true) => deltas.push(Delta::Reasoning(text.to_owned())),
    }
}

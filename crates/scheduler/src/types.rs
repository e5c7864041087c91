//! What goes into the scheduler and what comes out.

use std::fmt;
use std::time::Duration;

use kv_cache::{BlockId, CopyBlock, Divergence, SeqId, SlotRun, Token, TooLarge};

/// A request as it comes in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewRequest {
    /// Its name; best never used again, as a late token of an old request would be taken for one of the new.
    pub id: SeqId,
    /// The request that it is a part of, named by one of its sequences: the same for all choices and prompts of one
    /// client's request, its own name for one that is alone. They are to be submitted together, before the next plan.
    pub group: SeqId,
    /// The prompt, at least one token.
    pub prompt: Vec<Token>,
    /// Most tokens to draw, at least one.
    pub max_new_tokens: usize,
    /// Time since the engine's start; what [`Config::max_wait`](crate::Config::max_wait) counts from.
    pub now: Duration,
}

/// Why a request was not taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The prompt leaves no room for a reply.
    TooLong {
        /// Tokens of the prompt.
        prompt_tokens: usize,
        /// Most tokens of prompt and reply together.
        context_length: usize,
    },
    /// Not even alone in an empty KV cache.
    NeverFits(TooLarge),
    /// No prompt, or no token to draw.
    Empty,
    /// A request of this name is here already.
    Duplicate,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLong {
                prompt_tokens,
                context_length,
            } => write!(
                f,
                "the prompt has {prompt_tokens} tokens, which leaves no room for a reply in a context of {context_length}"
            ),
            Self::NeverFits(numbers) => numbers.fmt(f),
            Self::Empty => f.write_str("an empty prompt, or a reply of no tokens, has nothing to run"),
            Self::Duplicate => f.write_str("a request of this name is here already"),
        }
    }
}

impl std::error::Error for Refusal {}

/// One step of the engine; [how to issue it](crate#what-an-engine-must-do-with-a-plan).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// These waited too long. They are gone: answer them.
    pub expired: Vec<SeqId>,
    /// These are gone because the cache refused what it had promised, which is a defect: answer them.
    pub lost: Vec<SeqId>,
    /// These lost their blocks and are in the queue again, to be prefilled again later. For the log; the engine has
    /// nothing to do about them.
    pub preempted: Vec<SeqId>,
    /// Requests that run now for the first time and do not find all of their prompt, although something like it was cached:
    /// why. Only where somebody wants to know ([`Scheduler::explain`](crate::Scheduler::explain)).
    pub misses: Vec<(SeqId, Divergence)>,
    /// Blocks to copy before everything else, in this order.
    pub copies: Vec<CopyBlock>,
    /// Parts of prompts, in this order, each of another sequence.
    pub prefill: Vec<Prefill>,
    /// Sequences that go on by one token, by seniority.
    pub decode: Vec<Decode>,
}

impl Plan {
    /// True if there is nothing to issue.
    pub fn is_empty(&self) -> bool {
        self.prefill.is_empty() && self.decode.is_empty()
    }
}

/// A part of a prompt to compute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prefill {
    /// The sequence.
    pub id: SeqId,
    /// The part, at least one token.
    pub tokens: Vec<Token>,
    /// Position of its first token: how many there are before it.
    pub start: usize,
    /// Where its K and V go.
    pub runs: Vec<SlotRun>,
    /// The prompt ends with it: the scores of its last position draw the first token (after a preemption: the next).
    pub last: bool,
    /// Set for the first part of a request, once, whatever happens to it later: how many tokens of its prompt were
    /// cached.
    pub first: Option<usize>,
}

/// A sequence that goes on by one token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decode {
    /// The sequence.
    pub id: SeqId,
    /// Position of its newest token, which may still be on the device; it attends to `position + 1` tokens.
    pub position: usize,
    /// Where K and V of that position go.
    pub slot: (BlockId, usize),
}

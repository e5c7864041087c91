//! One request, from its arrival to its end.

use std::time::Duration;

use kv_cache::{SeqId, Token};

#[derive(Debug)]
pub(crate) struct Job {
    /// The request that it is a part of.
    pub(crate) group: SeqId,
    /// Place in the order of arrival, kept through preemptions.
    pub(crate) arrival: u64,
    pub(crate) submitted: Duration,
    /// The prompt, and the drawn tokens that were read.
    pub(crate) tokens: Vec<Token>,
    prompt: usize,
    /// Most tokens to draw.
    allowed: usize,
    /// Draws planned so far, read or not.
    pub(crate) drawn: usize,
    /// `None`: in the queue.
    pub(crate) running: Option<Running>,
    /// Admitted at least once.
    pub(crate) started: bool,
    /// A sequence of its request has been admitted: who waits for the rest of a reply is not sent away.
    pub(crate) begun: bool,
    /// The first part of its prompt was planned.
    pub(crate) reported: bool,
    /// Tokens of its prompt that it did not compute itself.
    pub(crate) cached: usize,
    /// Positions that it has had, before preemptions too.
    pub(crate) reached: usize,
}

/// A job that holds blocks.
#[derive(Debug)]
pub(crate) struct Running {
    /// Tokens to prefill: all that were known when it was admitted.
    pub(crate) target: usize,
    /// Positions handed out.
    pub(crate) done: usize,
    /// Positions computed for certain: those before the oldest draw that was not read.
    pub(crate) sure: usize,
    /// Positions recorded.
    pub(crate) recorded: usize,
    /// Steps in a row in which others were prefilled and this one was not.
    pub(crate) passed: usize,
}

impl Running {
    pub(crate) fn prefilling(&self) -> bool {
        self.done < self.target
    }
}

impl Job {
    pub(crate) fn new(
        group: SeqId,
        arrival: u64,
        submitted: Duration,
        prompt: Vec<Token>,
        allowed: usize,
    ) -> Self {
        Self {
            group,
            arrival,
            submitted,
            prompt: prompt.len(),
            tokens: prompt,
            allowed,
            drawn: 0,
            running: None,
            started: false,
            begun: false,
            reported: false,
            cached: 0,
            reached: 0,
        }
    }

    /// The positions up to `end` are cached; gives how many of the prompt's it has not had before.
    pub(crate) fn note_cached(&mut self, end: usize) -> usize {
        let new = end.min(self.prompt).saturating_sub(self.reached);
        self.cached += new;
        self.reached = self.reached.max(end);
        new
    }

    /// Tokens of its prompt.
    pub(crate) fn prompt(&self) -> usize {
        self.prompt
    }

    /// Draws that were read.
    pub(crate) fn read(&self) -> usize {
        self.tokens.len() - self.prompt
    }

    pub(crate) fn unread(&self) -> bool {
        self.drawn > self.read()
    }

    /// Tokens still to come, those drawn and not read among them.
    pub(crate) fn rest(&self) -> usize {
        self.allowed - self.read()
    }

    /// It has tokens to draw, and its prompt is done.
    pub(crate) fn decodes(&self) -> bool {
        self.drawn < self.allowed && self.running.as_ref().is_some_and(|running| !running.prefilling())
    }
}

//! One reply on its way through a grammar.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use llguidance::Matcher;
use llguidance::api::StopReason;
use llguidance::toktrie::SimpleVob;

use crate::form::clean;
use crate::vocabulary::Facts;

/// What a reply may have before the constrained text, or in its place.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Opening {
    /// Reasoning, which is free.
    pub thinking: Thinking,
    /// A token that lifts the constraint when it comes in the text's place: what follows is something else, such as a tool
    /// call.
    pub instead: Option<u32>,
}

/// Whether the model thinks first.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Thinking {
    /// The text begins at once.
    #[default]
    No,
    /// The prompt has opened the reasoning; `close` ends it.
    Inside {
        /// `</think>`.
        close: u32,
    },
    /// The reply may open it itself.
    May {
        /// `<think>`, as the very first token.
        open: u32,
        /// `</think>`.
        close: u32,
    },
}

/// The parser gave up: a limit, or a fault of its own. Concerns one reply.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct WalkError(String);

/// A reply and what may come next in it. It is told of every token, whatever becomes of the sequence meanwhile.
pub struct Walk {
    matcher: Matcher,
    facts: Arc<Facts>,
    opening: Opening,
    stops: Vec<u32>,
    place: Place,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Nothing written yet.
    Start,
    /// Reasoning, until this token.
    Thinking { close: u32 },
    /// After the reasoning: line breaks may come before the text, once. They are the layout that models have learnt.
    Gap,
    /// After these line breaks: the text or what comes in its place, such as the tool call that models write there.
    Broken,
    /// Within the text.
    Text,
    /// Something else came in the text's place.
    Free,
}

/// The tokens that may come next.
pub struct Allowed {
    set: SimpleVob,
    count: usize,
}

impl Allowed {
    /// Whether it may be this one.
    #[must_use]
    pub fn has(&self, id: u32) -> bool {
        (id as usize) < self.count && self.set.get(id as usize)
    }

    /// Takes these out, unless nothing would be left.
    pub fn rather_not(&mut self, ids: &[u32]) {
        let mut set = self.set.clone();
        for &id in ids {
            forbid(&mut set, id);
        }
        if !set.is_zero() {
            self.set = set;
        }
    }

    /// One flag a token, by id. What lies past the vocabulary is not allowed.
    pub fn fill(&self, flags: &mut [bool]) {
        let words = self.set.as_slice().iter();
        for (chunk, word) in flags.chunks_mut(32).zip(words.chain(std::iter::repeat(&0))) {
            for (bit, flag) in (0..32).zip(chunk) {
                *flag = word >> bit & 1 == 1;
            }
        }
        if let Some(past) = flags.get_mut(self.count..) {
            past.fill(false);
        }
    }
}

impl fmt::Debug for Allowed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Allowed({} of {})", self.set.num_set(), self.count)
    }
}

impl Walk {
    pub(crate) fn new(matcher: Matcher, facts: Arc<Facts>, opening: Opening, stops: &[u32]) -> Self {
        let place = match opening.thinking {
            Thinking::Inside { close } => Place::Thinking { close },
            _ => Place::Start,
        };
        Self {
            matcher,
            facts,
            opening,
            stops: stops.to_vec(),
            place,
        }
    }

    /// Whether what comes next is constrained. Once it is not, it never will be again.
    #[must_use]
    pub fn is_constrained(&self) -> bool {
        self.place != Place::Free
    }

    /// What may come next; `None`: anything.
    ///
    /// # Errors
    /// The parser gave up, or no token of the vocabulary can go on.
    pub fn allowed(&mut self) -> Result<Option<Allowed>, WalkError> {
        let count = self.facts.count;
        let mut set = match self.place {
            Place::Free => return Ok(None),
            // The reply has to come to its text, so that it cannot end here.
            Place::Thinking { .. } => {
                let mut set = SimpleVob::alloc(count + 1);
                set.set_all(true);
                for &stop in &self.stops {
                    forbid(&mut set, stop);
                }
                forbid(&mut set, self.facts.end);
                return Ok(Some(Allowed { set, count }));
            }
            Place::Start | Place::Gap | Place::Broken | Place::Text => {
                self.guarded(Matcher::compute_mask_or_eos)?
            }
        };
        let may_end = set.get(self.facts.end as usize);
        for &stop in &self.stops {
            if (stop as usize) < count {
                set.set(stop as usize, may_end);
            }
        }
        forbid(&mut set, self.facts.end);
        let mut more = Vec::new();
        if self.place != Place::Text {
            more.extend(self.opening.instead);
        }
        if self.place == Place::Gap {
            more.extend(&self.facts.breaks);
        }
        if let (Place::Start, Thinking::May { open, .. }) = (self.place, self.opening.thinking) {
            more.push(open);
        }
        for id in more {
            if (id as usize) < count {
                set.set(id as usize, true);
            }
        }
        if set.is_zero() {
            return Err(WalkError("no token can go on from here".to_owned()));
        }
        Ok(Some(Allowed { set, count }))
    }

    /// A token has come that is none of those that end the reply. True if only the end can follow.
    ///
    /// # Errors
    /// The token was not allowed, or the parser gave up.
    pub fn take(&mut self, token: u32) -> Result<bool, WalkError> {
        match (self.place, self.opening.thinking) {
            (Place::Free, _) => return Ok(false),
            (Place::Thinking { close }, _) => {
                if token == close {
                    self.place = Place::Gap;
                }
                return Ok(false);
            }
            (Place::Start, Thinking::May { open, close }) if token == open => {
                self.place = Place::Thinking { close };
                return Ok(false);
            }
            (Place::Start | Place::Gap | Place::Broken, _) if self.opening.instead == Some(token) => {
                self.place = Place::Free;
                return Ok(false);
            }
            (Place::Gap, _) if self.facts.breaks.contains(&token) => {
                self.place = Place::Broken;
                // Line breaks that the text itself begins with are the text's.
                if self.guarded(|matcher| matcher.validate_tokens(&[token]))? == 0 {
                    return Ok(false);
                }
                self.place = Place::Text;
            }
            _ => self.place = Place::Text,
        }
        self.guarded(|matcher| matcher.consume_token(token))?;
        match self.matcher.stop_reason() {
            StopReason::NotStopped => Ok(false),
            reason if reason.is_ok() => Ok(true),
            reason => Err(WalkError(format!("the parser stopped: {reason}"))),
        }
    }

    /// The library catches its own panics where it expects them; here all end as errors.
    fn guarded<T, E: fmt::Display>(
        &mut self,
        act: impl FnOnce(&mut Matcher) -> Result<T, E>,
    ) -> Result<T, WalkError> {
        catch_unwind(AssertUnwindSafe(|| act(&mut self.matcher)))
            .map_err(|_| WalkError("the parser panicked".to_owned()))?
            .map_err(|error| WalkError(clean(&error.to_string()).to_string()))
    }
}

impl fmt::Debug for Walk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Walk")
            .field("place", &self.place)
            .field("opening", &self.opening)
            .finish_non_exhaustive()
    }
}

fn forbid(set: &mut SimpleVob, id: u32) {
    if (id as usize) < set.len() {
        set.set(id as usize, false);
    }
}

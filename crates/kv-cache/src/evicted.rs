//! What was evicted lately, for telling a person why a prompt had to be computed again. Chains are known by a hash: two that
//! share one would be a wrong line in a log, no more.

use std::collections::{HashSet, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};

use crate::types::Token;

/// Chains remembered. A block of 32 tokens each, that is 128 thousand tokens.
const REMEMBERED: usize = 4096;

/// The chain that goes on from `before` (0: the root) by a block of these tokens.
pub(crate) fn chain(before: u64, block: &[Token]) -> u64 {
    let mut hasher = DefaultHasher::new();
    (before, block).hash(&mut hasher);
    hasher.finish()
}

#[derive(Debug, Default)]
pub(crate) struct Evicted {
    chains: HashSet<u64>,
    /// The oldest first.
    order: VecDeque<u64>,
}

impl Evicted {
    pub(crate) fn note(&mut self, chain: u64) {
        if !self.chains.insert(chain) {
            return;
        }
        self.order.push_back(chain);
        if self.order.len() > REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.chains.remove(&oldest);
        }
    }

    pub(crate) fn has(&self, chain: u64) -> bool {
        self.chains.contains(&chain)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_are_remembered_and_their_number_is_bounded() {
        let mut evicted = Evicted::default();
        for n in 0..2 * REMEMBERED as u64 {
            evicted.note(n);
            evicted.note(n);
        }
        assert_eq!(
            (evicted.chains.len(), evicted.order.len()),
            (REMEMBERED, REMEMBERED)
        );
        assert!(!evicted.has(REMEMBERED as u64 - 1) && evicted.has(REMEMBERED as u64));
    }
}

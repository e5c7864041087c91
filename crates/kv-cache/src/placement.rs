//! Which free block a sequence gets: one right after its last, so that the engine can read it as one slice.
//!
//! A sequence that has to start somewhere starts within a large free run, as far from its beginning as the sequence
//! that ends there may still grow, and half of what neither of the two will ever need farther: the next turn of a
//! conversation that has ended there goes on where it is.

use std::collections::HashMap;

use crate::cache::KvCache;
use crate::sequence::Sequence;
use crate::types::BlockId;

/// Free runs to look at, the largest first. There are seldom so many that are worth it.
const CANDIDATES: usize = 64;

/// How many more blocks a sequence takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Want {
    /// Those promised to it.
    promised: usize,
    /// Those that it takes if it gets as long as it may.
    most: usize,
}

impl<S: Clone> KvCache<S> {
    /// The next block for a sequence, which is not among `self.sequences` at this moment.
    pub(crate) fn next_block(&self, sequence: &Sequence<S>) -> Option<BlockId> {
        let next = sequence
            .blocks
            .last()
            .map(|last| BlockId(last.0.saturating_add(1)));
        next.filter(|&next| self.pool.is_free(next))
            .or_else(|| self.place(self.want(sequence)))
    }

    fn want(&self, sequence: &Sequence<S>) -> Want {
        let most = self.config.blocks_for(sequence.limit);
        Want {
            promised: sequence.credit,
            most: most.saturating_sub(sequence.blocks.len()),
        }
    }

    /// Where to start.
    fn place(&self, new: Want) -> Option<BlockId> {
        // Who may grow into the free run after their last block.
        let growing: HashMap<u32, Want> = self
            .sequences
            .values()
            .filter_map(|sequence| Some((sequence.blocks.last()?.0, self.want(sequence))))
            .collect();
        let candidates = self.pool.largest_runs().take(CANDIDATES).map(|(start, len)| {
            let before = start.checked_sub(1);
            let old = before.and_then(|block| growing.get(&block)).copied();
            let len = len as usize;
            // At the start of the pool there is nobody to leave room for.
            let start_offset = |old: usize, new: usize| {
                let spare = len.checked_sub(old)?.checked_sub(new)?;
                Some((spare, if before.is_some() { old + spare / 2 } else { 0 }))
            };
            let old = old.unwrap_or_default();
            // Best if both get all they may ever want; then if both get what they are promised; then anyhow.
            let (rank, spare, offset) = match (
                start_offset(old.most, new.most),
                start_offset(old.promised, new.promised),
            ) {
                (Some((spare, offset)), _) => (2, spare, offset),
                (None, Some((spare, offset))) => (1, spare, offset),
                (None, None) => (0, len, len.saturating_sub(new.promised.max(1))),
            };
            let offset = u32::try_from(offset.min(len.saturating_sub(1))).unwrap_or(0);
            ((rank, spare), BlockId(start + offset))
        });
        candidates
            .max_by_key(|&(worth, block)| (worth, std::cmp::Reverse(block)))
            .map(|(_, block)| block)
    }
}

/// The runs of neighbours in a block table, as first block and length: the slices in which the engine can read the
/// sequence.
pub fn runs(table: &[BlockId]) -> impl Iterator<Item = (BlockId, usize)> + '_ {
    table
        .chunk_by(|a, b| b.0.checked_sub(1) == Some(a.0))
        .filter_map(|run| Some((*run.first()?, run.len())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_cut_where_blocks_are_no_neighbours() {
        let cut = |table: &[u32]| {
            let table: Vec<_> = table.iter().copied().map(BlockId).collect();
            runs(&table)
                .map(|(first, len)| (first.0, len))
                .collect::<Vec<_>>()
        };
        assert_eq!(cut(&[]), []);
        assert_eq!(cut(&[7]), [(7, 1)]);
        assert_eq!(cut(&[3, 4, 5]), [(3, 3)]);
        assert_eq!(
            cut(&[3, 4, 4, 5, 9, 8, 0]),
            [(3, 2), (4, 2), (9, 1), (8, 1), (0, 1)]
        );
    }
}

//! Which free block a sequence gets: one right after its last, so that the engine can read it as one slice.
//!
//! A sequence that has to start somewhere starts within a large free run, as far from its beginning as the sequence
//! that ends there may still grow, and half of what neither of the two will ever need farther: the next turn of a
//! conversation that has ended there goes on where it is.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use crate::cache::KvCache;
use crate::sequence::Sequence;
use crate::types::{BlockId, SeqId};

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

/// Where a sequence may start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Start {
    pub(crate) block: BlockId,
    /// All that is promised to it fits there in one run.
    pub(crate) holds_promise: bool,
}

impl<S: Clone> KvCache<S> {
    /// The next block for a sequence, which is not among `self.sequences` at this moment.
    pub(crate) fn next_block(&self, sequence: &Sequence<S>) -> Option<BlockId> {
        self.chosen(sequence)
            .or_else(|| Some(self.place(sequence, None)?.block))
    }

    /// Where the next block of a sequence is settled to be, if that is still free: behind its last, or where it is to
    /// start.
    pub(crate) fn chosen(&self, sequence: &Sequence<S>) -> Option<BlockId> {
        let next = sequence
            .blocks
            .last()
            .map(|last| BlockId(last.0.saturating_add(1)));
        let free = |block: &BlockId| self.pool.is_free(*block);
        next.filter(free).or(sequence.start.filter(free))
    }

    fn want(&self, sequence: &Sequence<S>) -> Want {
        let most = self.config.blocks_for(sequence.limit);
        Want {
            promised: sequence.credit,
            most: most.saturating_sub(sequence.blocks.len()),
        }
    }

    /// Where to start. `itself`: the sequence's name, if it is among the others.
    pub(crate) fn place(&self, sequence: &Sequence<S>, itself: Option<SeqId>) -> Option<Start> {
        let new = self.want(sequence);
        // Where the others are going on, and how far.
        let growing: BTreeMap<u32, Want> = self
            .sequences
            .iter()
            .filter(|&(id, _)| Some(*id) != itself)
            .filter_map(|(_, other)| Some((self.chosen(other)?.0, self.want(other))))
            .collect();
        self.pool
            .largest_runs()
            .take(CANDIDATES)
            .flat_map(|(start, len)| {
                // A run in which others are to start is one for each of them, and one before.
                let inner = growing.range(start + 1..start + len).map(|(&at, _)| at);
                let ends = inner.clone().chain([start + len]);
                [start].into_iter().chain(inner).zip(ends)
            })
            .map(|(start, end)| {
                let old = growing.get(&start).copied().unwrap_or_default();
                let (worth, offset) = within(old, new, (end - start) as usize, start == 0);
                (worth, BlockId(start + offset))
            })
            .max_by_key(|&(worth, block)| (worth, Reverse(block)))
            .map(|((rank, _), block)| Start {
                block,
                holds_promise: rank > 0,
            })
    }
}

/// Where in a free run of `len` blocks a new sequence starts if an old one goes on from the beginning of that run; and
/// how good that is: best if both get all they may ever want, then if both get what they are promised, then anyhow.
fn within(old: Want, new: Want, len: usize, nobody_before: bool) -> ((u8, usize), u32) {
    let fit = |old: usize, new: usize| {
        let spare = len.checked_sub(old)?.checked_sub(new)?;
        // At the start of the pool there is nobody to leave room for.
        let offset = if nobody_before && old == 0 {
            0
        } else {
            old + spare / 2
        };
        Some((spare, offset))
    };
    let (worth, offset) = match (fit(old.most, new.most), fit(old.promised, new.promised)) {
        (Some((spare, offset)), _) => ((2, spare), offset),
        (None, Some((spare, offset))) => ((1, spare), offset),
        // The new one is scattered whatever is done: better it than both.
        (None, None) => ((0, len), if old.most > 0 { len / 2 } else { 0 }),
    };
    (
        worth,
        u32::try_from(offset.min(len.saturating_sub(1))).unwrap_or(0),
    )
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

//! The fixed pool: which blocks are free, and how many hold each of the others.
//!
//! Free blocks are kept as runs of neighbours, so that a sequence can be given blocks that follow one another: the
//! engine reads such a sequence as one slice, without gathering it. Every operation costs the logarithm of the number
//! of runs.

use std::collections::{BTreeMap, BTreeSet};

use crate::types::BlockId;

#[derive(Debug, Default)]
pub(crate) struct BlockPool {
    /// Holders of each block: one per block table that lists it, and one for the prefix tree. 0 = free.
    refs: Vec<u32>,
    /// First block → length of each free run. No two of them touch.
    runs: BTreeMap<u32, u32>,
    /// The same as (length, first block).
    by_length: BTreeSet<(u32, u32)>,
    free: usize,
}

impl BlockPool {
    pub(crate) fn new(blocks: u32) -> Self {
        let mut pool = Self {
            refs: vec![0; blocks as usize],
            free: blocks as usize,
            ..Self::default()
        };
        pool.insert_run(0, blocks);
        pool
    }

    pub(crate) fn total(&self) -> usize {
        self.refs.len()
    }

    pub(crate) fn free(&self) -> usize {
        self.free
    }

    pub(crate) fn free_blocks(&self) -> impl Iterator<Item = BlockId> + '_ {
        self.runs
            .iter()
            .flat_map(|(&start, &len)| (start..start + len).map(BlockId))
    }

    /// The free runs as (first block, length), the largest first.
    pub(crate) fn largest_runs(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        self.by_length.iter().rev().map(|&(len, start)| (start, len))
    }

    /// The free runs as (first block, length).
    pub(crate) fn runs(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        self.runs.iter().map(|(&start, &len)| (start, len))
    }

    pub(crate) fn refs(&self, block: BlockId) -> u32 {
        self.refs.get(block.0 as usize).copied().unwrap_or(0)
    }

    pub(crate) fn is_free(&self, block: BlockId) -> bool {
        self.refs.get(block.0 as usize) == Some(&0)
    }

    fn insert_run(&mut self, start: u32, len: u32) {
        if len > 0 {
            self.runs.insert(start, len);
            self.by_length.insert((len, start));
        }
    }

    fn remove_run(&mut self, start: u32, len: u32) {
        self.runs.remove(&start);
        self.by_length.remove(&(len, start));
    }

    /// Takes this very block, if it is free; it has one holder then.
    pub(crate) fn take(&mut self, block: BlockId) -> Option<BlockId> {
        let (&start, &len) = self.runs.range(..=block.0).next_back()?;
        let before = block.0 - start;
        if before >= len {
            return None;
        }
        self.remove_run(start, len);
        self.insert_run(start, before);
        self.insert_run(block.0 + 1, len - before - 1);
        self.free -= 1;
        self.retain(block);
        Some(block)
    }

    pub(crate) fn retain(&mut self, block: BlockId) {
        if let Some(refs) = self.refs.get_mut(block.0 as usize) {
            *refs += 1;
        }
    }

    /// One holder less; the last one frees it.
    pub(crate) fn release(&mut self, block: BlockId) {
        let Some(refs) = self.refs.get_mut(block.0 as usize) else {
            return;
        };
        debug_assert!(*refs > 0, "a free block was released");
        let last = *refs == 1;
        *refs = refs.saturating_sub(1);
        if last {
            self.give_back(block.0);
        }
    }

    fn give_back(&mut self, block: u32) {
        self.free += 1;
        let (mut start, mut len) = (block, 1);
        let before = self.runs.range(..block).next_back().map(|(&s, &l)| (s, l));
        if let Some((s, l)) = before
            && s + l == block
        {
            self.remove_run(s, l);
            (start, len) = (s, l + 1);
        }
        if let Some(l) = self.runs.get(&(block + 1)).copied() {
            self.remove_run(block + 1, l);
            len += l;
        }
        self.insert_run(start, len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_split_and_grow_together_again() {
        let mut pool = BlockPool::new(10);
        let take = |pool: &mut BlockPool, n| pool.take(BlockId(n)).is_some();
        for block in [3, 4, 9, 0] {
            assert!(take(&mut pool, block));
        }
        assert!(!take(&mut pool, 4) && !take(&mut pool, 10));
        assert_eq!(pool.largest_runs().collect::<Vec<_>>(), [(5, 4), (1, 2)]);
        for (block, runs) in [
            (4, vec![(4, 5), (1, 2)]),
            (0, vec![(4, 5), (0, 3)]),
            (3, vec![(0, 9)]),
            (9, vec![(0, 10)]),
        ] {
            pool.release(BlockId(block));
            assert_eq!(pool.largest_runs().collect::<Vec<_>>(), runs);
            assert_eq!(pool.free(), pool.free_blocks().count());
        }
    }
}

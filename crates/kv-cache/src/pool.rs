//! The fixed pool: which blocks are free, and how many hold each of the others.

use crate::types::BlockId;

#[derive(Debug)]
pub(crate) struct BlockPool {
    /// Holders of each block: one per block table that lists it, and one for the prefix tree. 0 = free.
    refs: Vec<u32>,
    /// Last freed, first used: its memory is the likeliest to be in a cache.
    free: Vec<BlockId>,
}

impl BlockPool {
    pub(crate) fn new(blocks: u32) -> Self {
        Self {
            refs: vec![0; blocks as usize],
            free: (0..blocks).rev().map(BlockId).collect(),
        }
    }

    pub(crate) fn total(&self) -> usize {
        self.refs.len()
    }

    pub(crate) fn free(&self) -> usize {
        self.free.len()
    }

    pub(crate) fn free_blocks(&self) -> &[BlockId] {
        &self.free
    }

    pub(crate) fn refs(&self, block: BlockId) -> u32 {
        self.refs.get(block.0 as usize).copied().unwrap_or(0)
    }

    /// A free block, now with one holder.
    pub(crate) fn take(&mut self) -> Option<BlockId> {
        let block = self.free.pop()?;
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
        if *refs == 1 {
            self.free.push(block);
        }
        *refs = refs.saturating_sub(1);
    }
}

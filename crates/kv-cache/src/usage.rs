//! Numbers for `/status` and `/metrics`.

use crate::cache::KvCache;

/// Where the blocks are now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Blocks in the pool.
    pub total_blocks: usize,
    /// Blocks that hold nothing.
    pub free_blocks: usize,
    /// Blocks in the prefix tree that no running sequence uses: evictable.
    pub cached_blocks: usize,
    /// Blocks in use by running sequences.
    pub running_blocks: usize,
    /// Blocks promised to running sequences and not taken yet; to come out of the free and the cached ones.
    pub promised_blocks: usize,
    /// Bytes of the blocks in use by running sequences.
    pub running_bytes: u64,
    /// Bytes of those that are only cached.
    pub cached_bytes: u64,
    /// Bytes of the pool.
    pub total_bytes: u64,
    /// Snapshots kept.
    pub snapshots: usize,
    /// Their bytes; not part of the pool.
    pub snapshot_bytes: u64,
    /// Running sequences.
    pub sequences: usize,
}

/// What has happened since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Requests admitted, a preempted one again each time.
    pub admitted: u64,
    /// Tokens of their prompts.
    pub prompt_tokens: u64,
    /// Of these, how many were not computed again. `cached_tokens / prompt_tokens` is the hit rate.
    pub cached_tokens: u64,
    /// Blocks evicted from the tree to make room.
    pub evicted_blocks: u64,
    /// Blocks copied at an admission, because only their beginning is shared.
    pub copied_blocks: u64,
    /// Blocks moved, so that sequences are one run.
    pub moved_blocks: u64,
    /// Blocks that two sequences had computed at once, one of which was given back.
    pub deduplicated_blocks: u64,
    /// Sequences preempted.
    pub preempted: u64,
}

impl<S: Clone> KvCache<S> {
    /// Where the blocks are now.
    pub fn usage(&self) -> Usage {
        let total_blocks = self.pool.total();
        let free_blocks = self.pool.free();
        let cached_blocks = self.tree.unpinned();
        let running_blocks = total_blocks - free_blocks - cached_blocks;
        let block_bytes = self.config.block_bytes();
        Usage {
            total_blocks,
            free_blocks,
            cached_blocks,
            running_blocks,
            promised_blocks: self.promised,
            running_bytes: block_bytes.saturating_mul(running_blocks as u64),
            cached_bytes: block_bytes.saturating_mul(cached_blocks as u64),
            total_bytes: block_bytes.saturating_mul(total_blocks as u64),
            snapshots: self.snapshots.len(),
            snapshot_bytes: self.snapshots.bytes(),
            sequences: self.sequences.len(),
        }
    }

    /// What has happened since the start.
    pub fn counters(&self) -> Counters {
        self.counters
    }
}

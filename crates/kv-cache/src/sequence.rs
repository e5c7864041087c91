//! One running sequence, how it ends, and how it leaves snapshots.

use std::collections::BTreeSet;

use crate::cache::KvCache;
use crate::snapshots::Snapshots;
use crate::tree::NodeId;
use crate::types::{BlockId, CacheError, SeqId, Token};

#[derive(Debug)]
pub(crate) struct Sequence<S> {
    pub(crate) arrival: u64,
    /// The block table: block `i` holds the positions from `i * block_size` on.
    pub(crate) blocks: Vec<BlockId>,
    /// The tree's nodes of the first blocks, all full; pinned by this sequence. `blocks` begins with their blocks.
    pub(crate) path: Vec<NodeId>,
    /// Tokens recorded after those of `path`.
    pub(crate) tail: Vec<Token>,
    /// Positions handed out, recorded or not.
    pub(crate) len: usize,
    /// Most positions it may ever have.
    pub(crate) limit: usize,
    /// Blocks that it may still take without asking whether there are any.
    pub(crate) credit: usize,
    /// Where its next block is to be, when it cannot be right behind its last.
    pub(crate) start: Option<BlockId>,
    /// Snapshots of positions whose block is not in the tree yet.
    pending: Vec<Pending<S>>,
}

#[derive(Debug)]
struct Pending<S> {
    position: usize,
    bytes: u64,
    state: S,
}

impl<S> Sequence<S> {
    pub(crate) fn new(arrival: u64, limit: usize) -> Self {
        Self {
            arrival,
            blocks: Vec::new(),
            path: Vec::new(),
            tail: Vec::new(),
            len: 0,
            limit,
            credit: 0,
            start: None,
            pending: Vec::new(),
        }
    }

    /// Positions whose tokens are known and whose KV has been issued.
    pub(crate) fn recorded(&self, block_size: usize) -> usize {
        self.path.len() * block_size + self.tail.len()
    }

    /// One block was taken: from the credit while there is any.
    pub(crate) fn spend(&mut self, promised: &mut usize) {
        if self.credit > 0 {
            self.credit -= 1;
            *promised -= 1;
        }
    }

    /// Gives the snapshots of the `len` positions after `start` to the node which holds them.
    pub(crate) fn hand_snapshots(
        &mut self,
        start: usize,
        len: usize,
        node: NodeId,
        tick: u64,
        snapshots: &mut Snapshots<S>,
    ) {
        let within = |pending: &Pending<S>| pending.position > start && pending.position <= start + len;
        let (ready, later) = std::mem::take(&mut self.pending).into_iter().partition(within);
        self.pending = later;
        let ready: Vec<Pending<S>> = ready;
        for Pending {
            position,
            bytes,
            state,
        } in ready
        {
            snapshots.attach(node, position - start, bytes, state, tick);
        }
    }
}

impl<S: Clone> KvCache<S> {
    /// The block table: block `i` holds the positions from `i * block_size` on.
    ///
    /// # Errors
    /// An unknown sequence.
    pub fn table(&self, id: SeqId) -> Result<&[BlockId], CacheError> {
        Ok(&self.sequence(id)?.blocks)
    }

    /// Positions handed out so far: the context length once the step that writes them has run.
    ///
    /// # Errors
    /// An unknown sequence.
    pub fn len(&self, id: SeqId) -> Result<usize, CacheError> {
        Ok(self.sequence(id)?.len)
    }

    /// Positions that are recorded or came from the cache.
    ///
    /// # Errors
    /// An unknown sequence.
    pub fn recorded(&self, id: SeqId) -> Result<usize, CacheError> {
        Ok(self.sequence(id)?.recorded(self.config.block_size))
    }

    /// Keeps `state`, the state of the layers that cannot be cut back after the first `position` tokens of `id`, to
    /// continue from there later. Worth taking at the history boundary (just before the generation prompt, where the
    /// next turn will agree again), so prefill is best split there. `bytes` counts against the snapshots' budget.
    ///
    /// # Errors
    /// A position that has not been handed out; an unknown sequence.
    pub fn snapshot(&mut self, id: SeqId, position: usize, bytes: u64, state: S) -> Result<(), CacheError> {
        let block_size = self.config.block_size;
        let tick = self.next_tick();
        let sequence = self
            .sequences
            .get_mut(&id)
            .ok_or(CacheError::UnknownSequence(id))?;
        if position > sequence.len {
            return Err(CacheError::PastLimit {
                asked: position,
                limit: sequence.len,
            });
        }
        let Some(index) = position.checked_sub(1).map(|last| last / block_size) else {
            return Ok(());
        };
        match sequence.path.get(index) {
            Some(&node) => self
                .snapshots
                .attach(node, position - index * block_size, bytes, state, tick),
            None => sequence.pending.push(Pending {
                position,
                bytes,
                state,
            }),
        }
        Ok(())
    }

    /// Ends a sequence, whether it finished, was cancelled or failed. What was recorded stays cached; positions handed
    /// out and never recorded (a step built ahead, or one that failed) are forgotten. A step in flight may still write
    /// to these: whoever gets the block next writes after it.
    ///
    /// # Errors
    /// An unknown sequence.
    pub fn free(&mut self, id: SeqId) -> Result<(), CacheError> {
        let mut sequence = self
            .sequences
            .remove(&id)
            .ok_or(CacheError::UnknownSequence(id))?;
        self.seniority.remove(&(sequence.arrival, id));
        self.promised -= sequence.credit;
        let tick = self.next_tick();
        let start = sequence.path.len() * self.config.block_size;
        let parent = sequence.path.last().copied();
        let tail = std::mem::take(&mut sequence.tail);
        if let Some(&block) = sequence.blocks.get(sequence.path.len())
            && self.config.prefix_cache
            && !tail.is_empty()
        {
            let node = self.tree.child_beginning_with(parent, &tail).unwrap_or_else(|| {
                self.pool.retain(block);
                let (node, shorter) = self.tree.insert(parent, &tail, block, tick);
                if let Some(shorter) = shorter {
                    self.snapshots.move_node(shorter, node);
                    if let Some(block) = self.tree.remove(shorter) {
                        self.pool.release(block);
                    }
                }
                node
            });
            self.tree.touch(node, tick);
            sequence.hand_snapshots(start, tail.len(), node, tick, &mut self.snapshots);
        }
        for &node in &sequence.path {
            self.tree.touch(node, tick);
            self.tree.unpin(node);
        }
        for &block in &sequence.blocks {
            self.pool.release(block);
        }
        Ok(())
    }

    /// Ends a sequence of which the positions from `from` on may never have been written, as a step failed; and with it
    /// all that share such positions. None of these stay cached. Gives all that have ended, `id` among them.
    ///
    /// # Errors
    /// An unknown sequence.
    pub fn forget(&mut self, id: SeqId, from: usize) -> Result<Vec<SeqId>, CacheError> {
        let block_size = self.config.block_size;
        let sequence = self.sequence(id)?;
        let first = from / block_size;
        let bad: BTreeSet<BlockId> = sequence.blocks.iter().skip(first).copied().collect();
        let root = sequence.path.get(first).copied();
        let shares = |other: &Sequence<S>| other.blocks.iter().any(|block| bad.contains(block));
        let mut ended: Vec<SeqId> = self
            .sequences
            .iter()
            .filter_map(|(&other, sequence)| shares(sequence).then_some(other))
            .collect();
        if !ended.contains(&id) {
            ended.push(id);
        }
        for &one in &ended {
            if let Some(sequence) = self.sequences.get_mut(&one) {
                let good = from.saturating_sub(sequence.path.len() * block_size);
                sequence.tail.truncate(good);
            }
            self.free(one)?;
        }
        // Who has ended in the meantime may have left more behind it. A child comes after its parent.
        let mut nodes: Vec<NodeId> = root.into_iter().collect();
        let mut at = 0;
        while let Some(&node) = nodes.get(at) {
            nodes.extend(self.tree.each_child(Some(node)).map(|(_, child)| child));
            at += 1;
        }
        for node in nodes.into_iter().rev() {
            self.drop_node(node);
        }
        Ok(ended)
    }

    /// Empties the prefix tree of all that no running sequence uses. Gives how many blocks became free.
    pub fn clear(&mut self) -> usize {
        let before = self.pool.free();
        while let Some(node) = self.tree.least_recently_used() {
            self.drop_node(node);
        }
        self.pool.free() - before
    }
}

//! The cache: sequences, their block tables, and the promises made to them.

use std::collections::{BTreeMap, BTreeSet};

use crate::config::{CacheConfig, ConfigError, Reuse};
use crate::evicted::Evicted;
use crate::lookup::{self, Divergence, Match};
use crate::pool::BlockPool;
use crate::sequence::Sequence;
use crate::snapshots::Snapshots;
use crate::tree::PrefixTree;
use crate::types::{
    Admission, Admitted, BlockId, CacheError, CopyBlock, Extension, Preempted, Request, SeqId, Shortage,
    SlotRun, Token, TooLarge,
};
use crate::usage::Counters;

/// Block pool, block tables and prefix tree of one worker. `S` is what a snapshot holds: `()` for models of which
/// every layer keeps K and V.
///
/// Every promise is covered at all times: free blocks + unpinned tree blocks ≥ the sum of all sequences' credits.
#[derive(Debug)]
pub struct KvCache<S> {
    pub(crate) config: CacheConfig,
    pub(crate) pool: BlockPool,
    pub(crate) tree: PrefixTree,
    pub(crate) snapshots: Snapshots<S>,
    /// For [`Self::divergence`] only.
    evicted: Evicted,
    pub(crate) sequences: BTreeMap<SeqId, Sequence<S>>,
    /// By arrival: the first is the most senior.
    pub(crate) seniority: BTreeSet<(u64, SeqId)>,
    /// Blocks promised to sequences and not taken yet: the sum of their credits.
    pub(crate) promised: usize,
    /// Counts uses, for the LRU order.
    tick: u64,
    pub(crate) counters: Counters,
}

impl<S: Clone> KvCache<S> {
    /// An empty cache.
    ///
    /// # Errors
    /// Sizes that make no cache, with the number that is wrong.
    pub fn new(config: CacheConfig) -> Result<Self, ConfigError> {
        config.check()?;
        Ok(Self {
            pool: BlockPool::new(u32::try_from(config.total_blocks).unwrap_or(u32::MAX)),
            tree: PrefixTree::default(),
            snapshots: Snapshots::new(config.snapshot_bytes),
            evicted: Evicted::default(),
            sequences: BTreeMap::new(),
            seniority: BTreeSet::new(),
            promised: 0,
            tick: 0,
            counters: Counters::default(),
            config,
        })
    }

    /// What the cache was told at its start.
    pub fn config(&self) -> &CacheConfig {
        &self.config
    }

    /// Blocks that are free or evictable, and promised to no one.
    pub fn available(&self) -> usize {
        (self.pool.free() + self.tree.unpinned()).saturating_sub(self.promised)
    }

    pub(crate) fn sequence(&self, id: SeqId) -> Result<&Sequence<S>, CacheError> {
        self.sequences.get(&id).ok_or(CacheError::UnknownSequence(id))
    }

    pub(crate) fn next_tick(&mut self) -> u64 {
        self.tick += 1;
        self.tick
    }

    fn find(&self, prompt: &[Token]) -> Match {
        // The last token is never taken from the cache: the model must run on it to say what comes next.
        let Some((_, head)) = prompt.split_last() else {
            return Match::default();
        };
        let block_size = self.config.block_size;
        match (self.config.prefix_cache, self.config.reuse) {
            (false, _) => Match::default(),
            (true, Reuse::Positions) => {
                lookup::by_position(&self.tree, block_size, self.config.min_tail, head)
            }
            (true, Reuse::Snapshots) => lookup::by_snapshot(&self.tree, &self.snapshots, block_size, head),
        }
    }

    /// How many tokens of `prompt` an admission would find cached now. Changes nothing, not even the LRU order.
    pub fn peek(&self, prompt: &[Token]) -> usize {
        let found = self.find(prompt);
        found.path.len() * self.config.block_size + found.tail.map_or(0, |(_, tokens)| tokens)
    }

    /// Compares `tokens` with the nearest cached chain; shows at most `window` tokens before they part, and of both from there.
    pub fn divergence(&self, tokens: &[Token], window: usize) -> Divergence {
        lookup::diverge(&self.tree, &self.evicted, self.config.block_size, tokens, window)
    }

    /// The numbers of a request that can never run; `None` if it fits an empty pool. For a 400 before any queueing.
    pub fn never_fits(&self, prompt_tokens: usize, max_new_tokens: usize) -> Option<TooLarge> {
        // Alone in the pool a sequence must be able to reach its end.
        let needed_tokens = prompt_tokens.saturating_add(max_new_tokens);
        let needed_blocks = self.config.blocks_for(needed_tokens);
        (needed_blocks > self.config.total_blocks).then(|| TooLarge {
            needed_tokens,
            capacity_tokens: self.config.capacity_tokens(),
            needed_blocks,
            capacity_blocks: self.config.total_blocks,
            needed_bytes: self.config.block_bytes().saturating_mul(needed_blocks as u64),
            capacity_bytes: self
                .config
                .block_bytes()
                .saturating_mul(self.config.total_blocks as u64),
        })
    }

    /// Blocks to promise to a request when nothing is cached.
    fn promise(&self, prompt: usize, max_new: usize) -> usize {
        let generation = max_new.min(self.config.generation_share);
        self.config.blocks_for(prompt.saturating_add(generation))
    }

    /// Asks for a sequence. When admitted, its block table begins with what is cached of the prompt, and the blocks for
    /// the rest of it and for a share of the generation are promised.
    ///
    /// # Errors
    /// A name in use; nothing to run. Lack of room is not an error but an answer.
    pub fn admit(&mut self, request: &Request<'_>) -> Result<Admission<S>, CacheError> {
        let &Request {
            id,
            arrival,
            prompt,
            max_new_tokens,
        } = request;
        if self.sequences.contains_key(&id) {
            return Err(CacheError::DuplicateSequence(id));
        }
        if prompt.is_empty() {
            return Err(CacheError::EmptyRequest);
        }
        if let Some(too_large) = self.never_fits(prompt.len(), max_new_tokens) {
            return Ok(Admission::Never(too_large));
        }
        let found = self.find(prompt);
        let needed = self.promise(prompt.len(), max_new_tokens) - found.path.len();
        // A cached block that no one uses counts as available until this sequence pins it.
        let newly_pinned = found
            .path
            .iter()
            .filter(|&&node| !self.tree.is_pinned(node))
            .count();
        let available = self.available().saturating_sub(newly_pinned);
        if needed > available {
            return Ok(Admission::Wait(Shortage {
                needed_blocks: needed,
                available_blocks: available,
            }));
        }

        let tick = self.next_tick();
        let mut sequence = Sequence::new(arrival, prompt.len() + max_new_tokens);
        for &node in &found.path {
            self.tree.pin(node);
            if let Some(block) = self.tree.block(node) {
                self.pool.retain(block);
                sequence.blocks.push(block);
            }
        }
        sequence.path = found.path;
        sequence.credit = needed;
        self.promised += needed;
        let start = sequence.blocks.len() * self.config.block_size;
        let mut cached_tokens = start;
        let mut copies = Vec::new();
        // Before anything is evicted, which may be the source of the copy and the snapshot with it.
        let snapshot = found
            .snapshot
            .and_then(|(node, at)| self.snapshots.use_at(node, at, tick).cloned());
        let tail = found
            .tail
            .and_then(|(node, tokens)| Some((node, self.tree.block(node)?, tokens)));
        if let Some((node, from, tokens)) = tail {
            self.tree.touch(node, tick);
            let taken_over = self.take_over(node, tokens);
            self.evict_for(self.promised - usize::from(taken_over));
            let to = if taken_over {
                Some(from)
            } else if let Some(copy) = self.give_way(&sequence, id, from) {
                copies.push(copy);
                self.counters.copied_blocks += 1;
                self.pool.take(from)
            } else {
                // The source may be the very block that had to go; then the tokens are in place already.
                self.pool.take(from).or_else(|| self.take_block(&sequence))
            };
            if let Some(to) = to {
                sequence.spend(&mut self.promised);
                if from != to {
                    copies.push(CopyBlock { from, to, tokens });
                    self.counters.copied_blocks += 1;
                }
                sequence.blocks.push(to);
                cached_tokens += tokens;
                sequence
                    .tail
                    .extend_from_slice(prompt.get(start..cached_tokens).unwrap_or(&[]));
            }
        } else {
            self.evict_for(self.promised);
        }
        sequence.len = cached_tokens;
        self.counters.admitted += 1;
        self.counters.prompt_tokens += prompt.len() as u64;
        self.counters.cached_tokens += cached_tokens as u64;
        self.seniority.insert((arrival, id));
        self.sequences.insert(id, sequence);
        Ok(Admission::Admit(Admitted {
            blocks: needed,
            cached_tokens,
            copies,
            snapshot,
        }))
    }

    /// Takes a partly filled block out of the tree, to be written on where it is, if all of its tokens are wanted: the
    /// next turn of a conversation. The block is the sequence's alone until it is full.
    fn take_over(&mut self, node: usize, tokens: usize) -> bool {
        let whole = self.tree.key(node).len() == tokens && tokens < self.config.block_size;
        let alone = self
            .tree
            .block(node)
            .is_some_and(|block| self.pool.refs(block) == 1);
        // Where a match must end at a snapshot, those of the block have to stay for others.
        let taken =
            whole && alone && self.config.reuse == Reuse::Positions && self.tree.remove(node).is_some();
        if taken {
            self.snapshots.drop_node(node);
        }
        taken
    }

    /// Evicts until so many blocks are free, or nothing is left to evict. What is promised is free from the start
    /// rather than evicted block by block: so much the likelier are the blocks of a sequence neighbours.
    pub(crate) fn evict_for(&mut self, blocks: usize) {
        while self.pool.free() < blocks
            && let Some(node) = self.tree.least_recently_used()
        {
            self.evicted.note(self.tree.chain(Some(node)));
            self.drop_node(node);
            self.counters.evicted_blocks += 1;
        }
    }

    /// The next block for a sequence. `None` is impossible while the promises are covered.
    fn take_block(&mut self, sequence: &Sequence<S>) -> Option<BlockId> {
        let block = self.next_block(sequence)?;
        self.pool.take(block)
    }

    pub(crate) fn drop_node(&mut self, node: usize) {
        if let Some(block) = self.tree.remove(node) {
            self.snapshots.drop_node(node);
            self.pool.release(block);
        }
    }

    /// Blocks that `count` more positions take.
    fn growth(&self, id: SeqId, count: usize) -> Result<usize, CacheError> {
        let sequence = self.sequence(id)?;
        let end = sequence.len.saturating_add(count);
        if end > sequence.limit {
            return Err(CacheError::PastLimit {
                asked: end,
                limit: sequence.limit,
            });
        }
        let needed = self.config.blocks_for(end) - sequence.blocks.len();
        let beyond = needed.saturating_sub(sequence.credit);
        if beyond > self.available() {
            let available_blocks = sequence.credit + self.available();
            return Err(CacheError::OutOfBlocks(Shortage {
                needed_blocks: needed,
                available_blocks,
            }));
        }
        Ok(needed)
    }

    /// Hands out the next `count` positions of a sequence, all or none. Their tokens need not be known yet: the token
    /// that a decode step consumes may still be on the device.
    ///
    /// # Errors
    /// [`CacheError::OutOfBlocks`] past the promised share; [`CacheError::PastLimit`].
    pub fn extend(&mut self, id: SeqId, count: usize) -> Result<Extension, CacheError> {
        let needed = self.growth(id, count)?;
        let block_size = self.config.block_size;
        // Out of the map meanwhile, so that placement does not take it for one of the others.
        let mut sequence = self
            .sequences
            .remove(&id)
            .ok_or(CacheError::UnknownSequence(id))?;
        self.evict_for(self.promised + needed.saturating_sub(sequence.credit));
        let mut extension = Extension::default();
        for _ in 0..needed {
            if let Some(block) = self.take_block(&sequence) {
                sequence.blocks.push(block);
                sequence.start = None;
            }
            sequence.spend(&mut self.promised);
        }
        let end = sequence.len + count;
        while sequence.len < end {
            let offset = sequence.len % block_size;
            let len = (block_size - offset).min(end - sequence.len);
            let Some(&block) = sequence.blocks.get(sequence.len / block_size) else {
                break;
            };
            extension.runs.push(SlotRun { block, offset, len });
            sequence.len += len;
        }
        self.sequences.insert(id, sequence);
        Ok(extension)
    }

    /// Preempts the most junior sequences, one after the other, until `extend(id, count)` succeeds or `id` itself had
    /// to go. Whoever has waited longest goes last, and the most senior always gets through, so everyone finishes.
    ///
    /// Extend the senior sequences of a step before the junior ones; then nobody who is already in the step is hit.
    ///
    /// # Errors
    /// As [`KvCache::extend`], but for [`CacheError::OutOfBlocks`].
    pub fn make_room(&mut self, id: SeqId, count: usize) -> Result<Vec<Preempted>, CacheError> {
        let mut preempted = Vec::new();
        loop {
            match self.growth(id, count) {
                Ok(_) => return Ok(preempted),
                Err(CacheError::OutOfBlocks(shortage)) => {
                    let victim = self.victim().ok_or(CacheError::OutOfBlocks(shortage))?;
                    preempted.push(self.preempt(victim)?);
                    if victim == id {
                        return Ok(preempted);
                    }
                }
                Err(other) => return Err(other),
            }
        }
    }

    /// The sequence to preempt next: the last to have arrived.
    pub fn victim(&self) -> Option<SeqId> {
        self.seniority.last().map(|&(_, id)| id)
    }

    /// Running sequences, the most senior first: the order in which to extend them.
    pub fn by_seniority(&self) -> impl Iterator<Item = SeqId> + '_ {
        self.seniority.iter().map(|&(_, id)| id)
    }

    /// Takes a sequence's blocks away. What it had recorded stays cached until the room is needed.
    ///
    /// # Errors
    /// An unknown sequence.
    pub fn preempt(&mut self, id: SeqId) -> Result<Preempted, CacheError> {
        let sequence = self.sequence(id)?;
        let preempted = Preempted {
            id,
            arrival: sequence.arrival,
            recorded_tokens: sequence.recorded(self.config.block_size),
        };
        self.free(id)?;
        self.counters.preempted += 1;
        Ok(preempted)
    }

    /// Says that the step which writes the next positions has been issued, and which tokens they hold. Blocks that are
    /// full now are everyone's: they join the prefix tree and are never written again. Where the tree already has such
    /// a block, one of the two is given back: that of the sequence if a running one uses the other. Gives how often it
    /// was; then the sequence's [`table`](KvCache::table) has changed.
    ///
    /// # Errors
    /// More tokens than open positions; an unknown sequence.
    pub fn record(&mut self, id: SeqId, tokens: &[Token]) -> Result<usize, CacheError> {
        let block_size = self.config.block_size;
        let tick = self.next_tick();
        let sequence = self
            .sequences
            .get_mut(&id)
            .ok_or(CacheError::UnknownSequence(id))?;
        let open = sequence.len - sequence.recorded(block_size);
        if tokens.len() > open {
            return Err(CacheError::RecordPastEnd {
                given: tokens.len(),
                open,
            });
        }
        sequence.tail.extend_from_slice(tokens);
        if !self.config.prefix_cache {
            return Ok(0);
        }
        let mut replaced = 0;
        let whole = sequence.tail.len() - sequence.tail.len() % block_size;
        let full: Vec<Token> = sequence.tail.drain(..whole).collect();
        for content in full.chunks_exact(block_size) {
            let parent = sequence.path.last().copied();
            let Some(slot) = sequence.blocks.get_mut(sequence.path.len()) else {
                break;
            };
            let node = match self.tree.child(parent, content) {
                Some(node) => {
                    if let Some(block) = self.tree.block(node) {
                        // Nobody reads the tree's: then the sequence stays where it is, in one run if it was.
                        if self.pool.refs(block) == 1 {
                            self.tree.set_block(node, *slot);
                            self.pool.retain(*slot);
                            self.pool.release(block);
                        } else {
                            self.pool.retain(block);
                            self.pool.release(*slot);
                            *slot = block;
                            replaced += 1;
                        }
                        self.counters.deduplicated_blocks += 1;
                    }
                    node
                }
                None => {
                    self.pool.retain(*slot);
                    let (node, shorter) = self.tree.insert(parent, content, *slot, tick);
                    if let Some(shorter) = shorter {
                        self.snapshots.move_node(shorter, node);
                        if let Some(block) = self.tree.remove(shorter) {
                            self.pool.release(block);
                        }
                    }
                    node
                }
            };
            // Its place in the LRU order is set when the last sequence lets go of it.
            self.tree.pin(node);
            sequence.path.push(node);
            let start = (sequence.path.len() - 1) * block_size;
            sequence.hand_snapshots(start, block_size, node, tick, &mut self.snapshots);
        }
        Ok(replaced)
    }

    /// Lets a sequence that is about to prefill `upcoming` skip the whole blocks which others have computed since it
    /// was admitted: two users of one long system prompt who come at once then compute it once. Gives how many tokens
    /// are skipped; at least one of `upcoming` is always left. The block table has grown by as much.
    ///
    /// Does nothing inside a block, and nothing for [`Reuse::Snapshots`].
    ///
    /// # Errors
    /// An unknown sequence.
    pub fn skip_cached(&mut self, id: SeqId, upcoming: &[Token]) -> Result<usize, CacheError> {
        let block_size = self.config.block_size;
        let sequence = self
            .sequences
            .get_mut(&id)
            .ok_or(CacheError::UnknownSequence(id))?;
        let aligned = sequence.len == sequence.path.len() * block_size;
        if !self.config.prefix_cache || self.config.reuse == Reuse::Snapshots || !aligned {
            return Ok(0);
        }
        let head = upcoming.split_last().map_or(&[][..], |(_, head)| head);
        let before = sequence.len;
        for content in head.chunks_exact(block_size) {
            let Some(node) = self.tree.child(sequence.path.last().copied(), content) else {
                break;
            };
            let Some(block) = self.tree.block(node) else { break };
            // Pinning takes an evictable block out of what covers the promises: it must be paid for like a fresh one.
            // The credit always reaches to the end of the prompt.
            if sequence.credit == 0 || sequence.len + block_size > sequence.limit {
                break;
            }
            sequence.spend(&mut self.promised);
            self.tree.pin(node);
            self.pool.retain(block);
            sequence.path.push(node);
            sequence.blocks.push(block);
            sequence.len += block_size;
            self.counters.cached_tokens += block_size as u64;
        }
        Ok(sequence.len - before)
    }
}

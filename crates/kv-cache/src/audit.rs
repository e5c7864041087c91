//! The invariants, checked from scratch. For tests, and for a debug endpoint: it walks everything.

use std::collections::{BTreeMap, BTreeSet};

use crate::cache::KvCache;
use crate::types::{BlockId, Token};

impl<S: Clone> KvCache<S> {
    /// Every cached chain of tokens, one for each block in the prefix tree: the tokens from the start of the prompt to
    /// the end of that block. Sorted.
    pub fn chains(&self) -> Vec<Vec<Token>> {
        let mut chains: Vec<_> = self.tree.walk().into_iter().map(|(_, chain, ..)| chain).collect();
        chains.sort();
        chains
    }

    /// Counts everything again and compares.
    ///
    /// # Errors
    /// The first invariant that does not hold, in words.
    pub fn audit(&self) -> Result<(), String> {
        let nodes = self.tree.walk();
        let mut holders: BTreeMap<BlockId, u32> = BTreeMap::new();
        for &(.., block, _, _) in &nodes {
            let count = holders.entry(block).or_default();
            *count += 1;
            ensure(*count == 1, || format!("{block:?} stands twice in the tree"))?;
        }
        let in_tree: BTreeSet<BlockId> = holders.keys().copied().collect();
        for sequence in self.sequences.values() {
            for &block in &sequence.blocks {
                *holders.entry(block).or_default() += 1;
            }
        }
        self.audit_pool(&holders)?;
        self.audit_tree(&nodes)?;
        self.audit_sequences(&in_tree)
    }

    fn audit_pool(&self, holders: &BTreeMap<BlockId, u32>) -> Result<(), String> {
        let free: BTreeSet<BlockId> = self.pool.free_blocks().collect();
        ensure(free.len() == self.pool.free(), || "a block is free twice".into())?;
        ensure(free.len() + holders.len() == self.pool.total(), || {
            format!(
                "{} blocks free, {} held, {} in all",
                free.len(),
                holders.len(),
                self.pool.total()
            )
        })?;
        for (&block, &count) in holders {
            ensure(!free.contains(&block), || format!("{block:?} is free and held"))?;
            let refs = self.pool.refs(block);
            ensure(refs == count, || {
                format!("{block:?} counts {refs} holders and has {count}")
            })?;
        }
        let promised: usize = self.sequences.values().map(|sequence| sequence.credit).sum();
        ensure(promised == self.promised, || {
            format!("{} promised in all, {promised} in parts", self.promised)
        })?;
        let covered = self.pool.free() + self.tree.unpinned();
        ensure(promised <= covered, || {
            format!("{promised} blocks promised, {covered} there")
        })
    }

    fn audit_tree(&self, nodes: &[(usize, Vec<Token>, BlockId, usize, u64)]) -> Result<(), String> {
        ensure(nodes.len() == self.tree.len(), || "a node is lost".into())?;
        let block_size = self.config.block_size;
        let mut pinned = 0;
        for (node, chain, block, pins, tick) in nodes {
            ensure(self.tree.at(*block) == Some(*node), || {
                format!("node {node} is not found by its {block:?}")
            })?;
            let users = self
                .sequences
                .values()
                .filter(|sequence| sequence.path.contains(node))
                .count();
            ensure(users == *pins, || {
                format!("node {node} counts {pins} pins and has {users}")
            })?;
            pinned += usize::from(users > 0);
            let mut before: Option<&[Token]> = None;
            for (key, child) in self.tree.each_child(Some(*node)) {
                ensure(chain.len().is_multiple_of(block_size), || {
                    format!("node {node} is partly filled and has children")
                })?;
                // Sorted: were one the beginning of another, it would be of the next.
                ensure(before.is_none_or(|before| !key.starts_with(before)), || {
                    format!("a child of node {node} repeats its sibling")
                })?;
                before = Some(key);
                let found = nodes.iter().find(|(id, ..)| *id == child);
                let younger = found.is_some_and(|(.., pins, age)| *pins == 0 && age > tick);
                ensure(!younger || *pins > 0, || {
                    format!("node {child} was used after its parent")
                })?;
            }
        }
        ensure(pinned == self.tree.pinned(), || {
            "pinned nodes are miscounted".into()
        })
    }

    fn audit_sequences(&self, in_tree: &BTreeSet<BlockId>) -> Result<(), String> {
        let block_size = self.config.block_size;
        for (id, sequence) in &self.sequences {
            let recorded = sequence.recorded(block_size);
            ensure(recorded <= sequence.len && sequence.len <= sequence.limit, || {
                format!(
                    "sequence {id}: {recorded} recorded, {} long, {} allowed",
                    sequence.len, sequence.limit
                )
            })?;
            ensure(
                sequence.blocks.len() == self.config.blocks_for(sequence.len),
                || {
                    format!(
                        "sequence {id}: {} blocks for {} tokens",
                        sequence.blocks.len(),
                        sequence.len
                    )
                },
            )?;
            for (&node, &block) in sequence.path.iter().zip(&sequence.blocks) {
                ensure(self.tree.block(node) == Some(block), || {
                    format!("sequence {id} left its path at {block:?}")
                })?;
            }
            for &block in sequence.blocks.iter().skip(recorded / block_size) {
                let open = recorded < sequence.len;
                ensure(!in_tree.contains(&block), || {
                    format!("sequence {id} writes to {block:?} of the tree")
                })?;
                ensure(!open || self.pool.refs(block) == 1, || {
                    format!("sequence {id} writes to {block:?}, which others read")
                })?;
            }
        }
        Ok(())
    }
}

fn ensure(holds: bool, otherwise: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(otherwise()) }
}

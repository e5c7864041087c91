//! States of layers that cannot be cut back (recurrent, sliding-window), attached to positions in the prefix tree.
//!
//! The payload is the engine's: whatever continues those layers from that very position. Attention K and V of the same
//! prefix stay in blocks. A snapshot goes when its node goes, or when the byte budget wants it.

use std::collections::{BTreeMap, BTreeSet};

use crate::tree::NodeId;

#[derive(Debug)]
pub(crate) struct Snapshots<S> {
    /// Keyed by node and by how many tokens of its block come before the state, `1..=block_size`.
    states: BTreeMap<(NodeId, usize), Entry<S>>,
    lru: BTreeSet<(u64, NodeId, usize)>,
    bytes: u64,
    capacity: u64,
}

#[derive(Debug)]
struct Entry<S> {
    state: S,
    bytes: u64,
    tick: u64,
}

impl<S> Snapshots<S> {
    pub(crate) fn new(capacity: u64) -> Self {
        Self {
            states: BTreeMap::new(),
            lru: BTreeSet::new(),
            bytes: 0,
            capacity,
        }
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn len(&self) -> usize {
        self.states.len()
    }

    /// Keeps `state`, in place of an older one at that position. One that is larger than the whole budget is dropped.
    pub(crate) fn attach(&mut self, node: NodeId, offset: usize, bytes: u64, state: S, tick: u64) {
        self.remove(node, offset);
        if bytes > self.capacity {
            return;
        }
        while self.bytes.saturating_add(bytes) > self.capacity {
            let Some(&(_, oldest, at)) = self.lru.first() else {
                return;
            };
            self.remove(oldest, at);
        }
        self.bytes += bytes;
        self.lru.insert((tick, node, offset));
        self.states.insert((node, offset), Entry { state, bytes, tick });
    }

    fn remove(&mut self, node: NodeId, offset: usize) -> Option<Entry<S>> {
        let entry = self.states.remove(&(node, offset))?;
        self.lru.remove(&(entry.tick, node, offset));
        self.bytes -= entry.bytes;
        Some(entry)
    }

    /// The last position within the first `most` tokens of the node's block that has a state.
    pub(crate) fn latest(&self, node: NodeId, most: usize) -> Option<usize> {
        self.states
            .range((node, 0)..=(node, most))
            .next_back()
            .map(|(&(_, offset), _)| offset)
    }

    pub(crate) fn use_at(&mut self, node: NodeId, offset: usize, tick: u64) -> Option<&S> {
        let entry = self.states.get_mut(&(node, offset))?;
        self.lru.remove(&(entry.tick, node, offset));
        entry.tick = tick;
        self.lru.insert((tick, node, offset));
        Some(&entry.state)
    }

    fn offsets(&self, node: NodeId) -> Vec<usize> {
        self.states
            .range((node, 0)..=(node, usize::MAX))
            .map(|(&(_, offset), _)| offset)
            .collect()
    }

    pub(crate) fn drop_node(&mut self, node: NodeId) {
        for offset in self.offsets(node) {
            self.remove(node, offset);
        }
    }

    /// The node `from` has been replaced by `to`, whose tokens begin with all of those of `from`.
    pub(crate) fn move_node(&mut self, from: NodeId, to: NodeId) {
        for offset in self.offsets(from) {
            if let Some(entry) = self.remove(from, offset) {
                self.attach(to, offset, entry.bytes, entry.state, entry.tick);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_recently_used_state_goes_first() {
        let mut snapshots = Snapshots::new(100);
        snapshots.attach(1, 4, 40, 'a', 1);
        snapshots.attach(2, 3, 40, 'b', 2);
        assert_eq!(snapshots.use_at(1, 4, 3), Some(&'a'));
        snapshots.attach(3, 1, 40, 'c', 4);
        assert_eq!((snapshots.bytes(), snapshots.len()), (80, 2));
        assert_eq!(snapshots.latest(2, 9), None);
        snapshots.attach(4, 1, 101, 'd', 5);
        assert_eq!(
            (
                snapshots.latest(1, 9),
                snapshots.latest(1, 3),
                snapshots.latest(4, 9)
            ),
            (Some(4), None, None)
        );
        snapshots.move_node(1, 7);
        assert_eq!(snapshots.use_at(7, 4, 6), Some(&'a'));
        snapshots.drop_node(7);
        snapshots.drop_node(3);
        assert_eq!((snapshots.bytes(), snapshots.len()), (0, 0));
    }
}

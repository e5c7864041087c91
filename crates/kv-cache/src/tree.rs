//! The prefix tree: one node per cached block.
//!
//! A node is found by walking from the root, block by block, so its key is the whole chain of tokens before it, never
//! its own tokens alone. Children are kept in an ordered map and compared by content: no hash, so no collision, and the
//! child that shares the longest beginning with some tokens is a neighbour of where they would stand.
//!
//! Only a leaf may hold fewer tokens than a block. No sibling's tokens are a beginning of another's.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Bound;
use std::sync::Arc;

use crate::evicted;
use crate::types::{BlockId, Token};

/// Index of a node; used again after the node is gone, which a pinned node never is.
pub(crate) type NodeId = usize;

type Children = BTreeMap<Arc<[Token]>, NodeId>;

#[derive(Debug)]
struct Node {
    key: Arc<[Token]>,
    /// Hash of all tokens up to its end.
    chain: u64,
    block: BlockId,
    /// `None`: a child of the root.
    parent: Option<NodeId>,
    children: Children,
    /// Sequences whose path goes through here. An ancestor has at least as many as its descendants.
    pins: usize,
    /// When it was last used. An unpinned node is never younger than its parent.
    tick: u64,
    /// The tick under which it stands among the evictable leaves.
    queued: Option<u64>,
}

#[derive(Debug, Default)]
pub(crate) struct PrefixTree {
    nodes: Vec<Option<Node>>,
    vacant: Vec<NodeId>,
    at: HashMap<BlockId, NodeId>,
    root: Children,
    /// Unpinned leaves, least recently used first.
    evictable: BTreeSet<(u64, NodeId)>,
    live: usize,
    pinned: usize,
}

/// How many tokens two sequences share from their start.
pub(crate) fn common(a: &[Token], b: &[Token]) -> usize {
    a.iter().zip(b).take_while(|(x, y)| x == y).count()
}

impl PrefixTree {
    fn node(&self, id: NodeId) -> Option<&Node> {
        self.nodes.get(id)?.as_ref()
    }

    fn node_mut(&mut self, id: NodeId) -> Option<&mut Node> {
        self.nodes.get_mut(id)?.as_mut()
    }

    fn children_mut(&mut self, parent: Option<NodeId>) -> Option<&mut Children> {
        match parent {
            None => Some(&mut self.root),
            Some(id) => self.nodes.get_mut(id)?.as_mut().map(|node| &mut node.children),
        }
    }

    fn children(&self, parent: Option<NodeId>) -> &Children {
        static NONE: Children = BTreeMap::new();
        match parent {
            None => &self.root,
            Some(id) => self.node(id).map_or(&NONE, |node| &node.children),
        }
    }

    /// Nodes, each with one block.
    pub(crate) fn len(&self) -> usize {
        self.live
    }

    /// Nodes in use by a running sequence.
    pub(crate) fn pinned(&self) -> usize {
        self.pinned
    }

    /// Nodes that eviction can reach: all that are not pinned, since pins are closed towards the root.
    pub(crate) fn unpinned(&self) -> usize {
        self.live - self.pinned
    }

    pub(crate) fn is_pinned(&self, id: NodeId) -> bool {
        self.node(id).is_some_and(|node| node.pins > 0)
    }

    pub(crate) fn block(&self, id: NodeId) -> Option<BlockId> {
        self.node(id).map(|node| node.block)
    }

    /// Every node and its block.
    pub(crate) fn blocks(&self) -> impl Iterator<Item = (NodeId, BlockId)> + '_ {
        let nodes = self.nodes.iter().enumerate();
        nodes.filter_map(|(id, node)| Some((id, node.as_ref()?.block)))
    }

    /// The node whose tokens lie in this block.
    pub(crate) fn at(&self, block: BlockId) -> Option<NodeId> {
        self.at.get(&block).copied()
    }

    /// Says that the node's tokens lie in another block now.
    pub(crate) fn set_block(&mut self, id: NodeId, block: BlockId) {
        if let Some(node) = self.node_mut(id) {
            let before = std::mem::replace(&mut node.block, block);
            self.at.remove(&before);
            self.at.insert(block, id);
        }
    }

    pub(crate) fn key(&self, id: NodeId) -> &[Token] {
        self.node(id).map_or(&[], |node| &node.key)
    }

    /// See [`evicted::chain`]; 0 for the root.
    pub(crate) fn chain(&self, id: Option<NodeId>) -> u64 {
        id.and_then(|id| self.node(id)).map_or(0, |node| node.chain)
    }

    /// The child with exactly these tokens.
    pub(crate) fn child(&self, parent: Option<NodeId>, tokens: &[Token]) -> Option<NodeId> {
        self.children(parent).get(tokens).copied()
    }

    pub(crate) fn each_child(&self, parent: Option<NodeId>) -> impl Iterator<Item = (&[Token], NodeId)> + '_ {
        self.children(parent).iter().map(|(key, &id)| (&**key, id))
    }

    /// The child whose tokens begin with all of `tokens`.
    pub(crate) fn child_beginning_with(&self, parent: Option<NodeId>, tokens: &[Token]) -> Option<NodeId> {
        let mut from = self
            .children(parent)
            .range::<[Token], _>((Bound::Included(tokens), Bound::Unbounded));
        from.next()
            .filter(|(key, _)| key.starts_with(tokens))
            .map(|(_, &id)| id)
    }

    /// The child that shares the longest beginning with `tokens`, and how long that is (0 without any child).
    pub(crate) fn nearest_child(&self, parent: Option<NodeId>, tokens: &[Token]) -> Option<(NodeId, usize)> {
        let children = self.children(parent);
        let below = children
            .range::<[Token], _>((Bound::Unbounded, Bound::Excluded(tokens)))
            .next_back();
        let above = children
            .range::<[Token], _>((Bound::Included(tokens), Bound::Unbounded))
            .next();
        [below, above]
            .into_iter()
            .flatten()
            .map(|(key, &id)| (id, common(key, tokens)))
            .max_by_key(|&(_, shared)| shared)
    }

    /// Adds a child; the caller has seen that no child begins with `tokens`. Gives its id and the sibling whose tokens
    /// were a beginning of `tokens`: it says nothing new now and should be [`removed`](Self::remove).
    pub(crate) fn insert(
        &mut self,
        parent: Option<NodeId>,
        tokens: &[Token],
        block: BlockId,
        tick: u64,
    ) -> (NodeId, Option<NodeId>) {
        let shorter = self
            .children(parent)
            .range::<[Token], _>((Bound::Unbounded, Bound::Excluded(tokens)))
            .next_back()
            .filter(|(key, _)| tokens.starts_with(key))
            .map(|(_, &id)| id);
        let key: Arc<[Token]> = tokens.into();
        let node = Node {
            key: Arc::clone(&key),
            chain: evicted::chain(self.chain(parent), tokens),
            block,
            parent,
            children: Children::new(),
            pins: 0,
            tick,
            queued: None,
        };
        let id = match self.vacant.pop() {
            Some(id) => id,
            None => {
                self.nodes.push(None);
                self.nodes.len() - 1
            }
        };
        if let Some(place) = self.nodes.get_mut(id) {
            *place = Some(node);
        }
        if let Some(children) = self.children_mut(parent) {
            children.insert(key, id);
        }
        self.live += 1;
        self.at.insert(block, id);
        self.requeue(id);
        if let Some(parent) = parent {
            self.requeue(parent);
        }
        (id, shorter)
    }

    /// Takes an unpinned leaf out and gives its block.
    pub(crate) fn remove(&mut self, id: NodeId) -> Option<BlockId> {
        let leaf = self
            .node(id)
            .is_some_and(|node| node.pins == 0 && node.children.is_empty());
        debug_assert!(leaf, "only an unpinned leaf may go");
        if !leaf {
            return None;
        }
        let node = self.nodes.get_mut(id)?.take()?;
        if let Some(tick) = node.queued {
            self.evictable.remove(&(tick, id));
        }
        if let Some(children) = self.children_mut(node.parent) {
            children.remove(&node.key);
        }
        self.vacant.push(id);
        self.live -= 1;
        self.at.remove(&node.block);
        if let Some(parent) = node.parent {
            self.requeue(parent);
        }
        Some(node.block)
    }

    /// The leaf to evict first.
    pub(crate) fn least_recently_used(&self) -> Option<NodeId> {
        self.evictable.first().map(|&(_, id)| id)
    }

    pub(crate) fn pin(&mut self, id: NodeId) {
        if let Some(node) = self.node_mut(id) {
            node.pins += 1;
            if node.pins == 1 {
                self.pinned += 1;
                self.requeue(id);
            }
        }
    }

    pub(crate) fn unpin(&mut self, id: NodeId) {
        if let Some(node) = self.node_mut(id) {
            debug_assert!(node.pins > 0, "a node was unpinned twice");
            node.pins = node.pins.saturating_sub(1);
            if node.pins == 0 {
                self.pinned -= 1;
                self.requeue(id);
            }
        }
    }

    pub(crate) fn touch(&mut self, id: NodeId, tick: u64) {
        if let Some(node) = self.node_mut(id) {
            node.tick = tick;
        }
        self.requeue(id);
    }

    /// Puts the node where it belongs among the evictable leaves.
    fn requeue(&mut self, id: NodeId) {
        let Some(node) = self.nodes.get_mut(id).and_then(Option::as_mut) else {
            return;
        };
        let wanted = (node.pins == 0 && node.children.is_empty()).then_some(node.tick);
        if node.queued == wanted {
            return;
        }
        if let Some(tick) = node.queued {
            self.evictable.remove(&(tick, id));
        }
        if let Some(tick) = wanted {
            self.evictable.insert((tick, id));
        }
        node.queued = wanted;
    }

    /// Every node: its id, the tokens from the root to its end, its block, its pins, its tick.
    pub(crate) fn walk(&self) -> Vec<(NodeId, Vec<Token>, BlockId, usize, u64)> {
        let mut found = Vec::new();
        let mut open: Vec<(NodeId, Vec<Token>)> = self.root.values().map(|&id| (id, Vec::new())).collect();
        while let Some((id, mut chain)) = open.pop() {
            let Some(node) = self.node(id) else { continue };
            chain.extend_from_slice(&node.key);
            open.extend(node.children.values().map(|&child| (child, chain.clone())));
            found.push((id, chain, node.block, node.pins, node.tick));
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_known_by_its_chain_and_not_by_its_own_tokens() {
        let mut tree = PrefixTree::default();
        let (x, _) = tree.insert(None, &[1, 2], BlockId(0), 1);
        let (xy, _) = tree.insert(Some(x), &[3, 4], BlockId(1), 1);
        assert_eq!(tree.child(Some(x), &[3, 4]), Some(xy));
        assert_eq!(tree.child(None, &[3, 4]), None);
    }

    #[test]
    fn the_nearest_child_is_a_neighbour() {
        let mut tree = PrefixTree::default();
        for (n, key) in [[1, 5, 5], [1, 5, 9], [2, 0, 0], [7, 7, 7]].iter().enumerate() {
            tree.insert(None, key, BlockId(n as u32), 1);
        }
        assert_eq!(tree.nearest_child(None, &[1, 5, 8]).map(|(_, n)| n), Some(2));
        assert_eq!(tree.nearest_child(None, &[2, 0, 1]).map(|(_, n)| n), Some(2));
        assert_eq!(tree.nearest_child(None, &[7, 7]).map(|(_, n)| n), Some(2));
        assert_eq!(tree.nearest_child(None, &[0]).map(|(_, n)| n), Some(0));
        assert_eq!(PrefixTree::default().nearest_child(None, &[0]), None);
    }

    #[test]
    fn leaves_go_first_and_the_oldest_of_them_before_the_others() {
        let mut tree = PrefixTree::default();
        let (a, _) = tree.insert(None, &[1], BlockId(0), 1);
        let (ab, _) = tree.insert(Some(a), &[2], BlockId(1), 2);
        let (c, _) = tree.insert(None, &[3], BlockId(2), 3);
        tree.pin(c);
        assert_eq!((tree.len(), tree.pinned(), tree.unpinned()), (3, 1, 2));
        for (node, block) in [(ab, 1), (a, 0)] {
            assert_eq!(tree.least_recently_used(), Some(node));
            assert_eq!(tree.remove(node), Some(BlockId(block)));
        }
        assert_eq!(tree.least_recently_used(), None);
        tree.unpin(c);
        assert_eq!(tree.least_recently_used(), Some(c));
    }

    #[test]
    fn a_part_of_a_block_gives_way_to_the_whole() {
        let mut tree = PrefixTree::default();
        let (part, none) = tree.insert(None, &[1, 2], BlockId(0), 1);
        assert_eq!(none, None);
        assert_eq!(tree.child_beginning_with(None, &[1]), Some(part));
        assert_eq!(tree.child_beginning_with(None, &[1, 2, 3]), None);
        assert_eq!(tree.insert(None, &[1, 2, 3], BlockId(1), 2).1, Some(part));
    }
}

//! Finding the longest cached beginning of a prompt, and telling where the cache stopped agreeing.

use crate::evicted::{self, Evicted};
use crate::snapshots::Snapshots;
use crate::tree::{NodeId, PrefixTree, common};
use crate::types::Token;

/// What the tree has of a prompt.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Match {
    /// Whole blocks, from the root.
    pub(crate) path: Vec<NodeId>,
    /// A further block of which only the first tokens agree.
    pub(crate) tail: Option<(NodeId, usize)>,
    /// The position with the snapshot, as its node and its offset there.
    pub(crate) snapshot: Option<(NodeId, usize)>,
}

fn window(tokens: &[Token], from: usize, to: usize) -> &[Token] {
    tokens.get(from..to.min(tokens.len()).max(from)).unwrap_or(&[])
}

/// The nodes of the whole blocks at the start of `tokens`.
pub(crate) fn whole_blocks(tree: &PrefixTree, block_size: usize, tokens: &[Token]) -> Vec<NodeId> {
    let mut path = Vec::new();
    for block in tokens.chunks_exact(block_size) {
        let Some(node) = tree.child(path.last().copied(), block) else {
            break;
        };
        path.push(node);
    }
    path
}

/// The longest match within `tokens`, continuable from any position. A part of a block counts where it is worth its cost.
pub(crate) fn by_position(tree: &PrefixTree, block_size: usize, min_tail: usize, tokens: &[Token]) -> Match {
    let path = whole_blocks(tree, block_size, tokens);
    let start = path.len() * block_size;
    let rest = window(tokens, start, start + block_size);
    let tail = tree
        .nearest_child(path.last().copied(), rest)
        .filter(|&(node, shared)| {
            let repeat = shared == rest.len();
            // Then it is written on where it is.
            let free = shared == tree.key(node).len();
            shared > 0 && (shared >= min_tail || repeat || free)
        });
    Match {
        path,
        tail,
        snapshot: None,
    }
}

/// The longest match within `tokens` that ends where a snapshot is.
pub(crate) fn by_snapshot<S>(
    tree: &PrefixTree,
    snapshots: &Snapshots<S>,
    block_size: usize,
    tokens: &[Token],
) -> Match {
    let mut path = whole_blocks(tree, block_size, tokens);
    loop {
        let start = path.len() * block_size;
        let rest = window(tokens, start, start + block_size);
        // Not only the nearest child: another one that shares less may have the later snapshot.
        let best = tree
            .each_child(path.last().copied())
            .filter_map(|(key, node)| Some((node, snapshots.latest(node, common(key, rest))?)))
            .max_by_key(|&(_, offset)| offset);
        if let Some((node, offset)) = best {
            if offset == block_size {
                path.push(node);
                return Match {
                    path,
                    tail: None,
                    snapshot: best,
                };
            }
            return Match {
                path,
                tail: best,
                snapshot: best,
            };
        }
        if path.pop().is_none() {
            return Match::default();
        }
    }
}

/// Where a prompt and the cache part: for telling a person why it was not reused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Divergence {
    /// Tokens of the prompt that the cache has from its start; also the index of the first token that differs.
    pub position: usize,
    /// The last tokens before that, which both have, at most `window`.
    pub before: Vec<Token>,
    /// What the prompt says from `position` on, at most `window` tokens. Empty: the whole prompt is cached.
    pub asked: Vec<Token>,
    /// What the nearest cached chain says from `position` on, at most `window` tokens. Empty: it ends there, which
    /// makes the rest of the prompt new rather than different.
    pub cached: Vec<Token>,
    /// The prompt's next block was here, and has been evicted lately.
    pub evicted: bool,
}

impl Divergence {
    /// True if a cached chain goes on differently: something in the prompt changed, such as a date in a header.
    pub fn differs(&self) -> bool {
        !self.asked.is_empty() && !self.cached.is_empty()
    }
}

/// Compares `tokens` with the nearest chain in the tree.
pub(crate) fn diverge(
    tree: &PrefixTree,
    evicted: &Evicted,
    block_size: usize,
    tokens: &[Token],
    window_len: usize,
) -> Divergence {
    let path = whole_blocks(tree, block_size, tokens);
    let start = path.len() * block_size;
    let rest = window(tokens, start, start + block_size);
    let nearest = tree.nearest_child(path.last().copied(), rest);
    let position = start + nearest.map_or(0, |(_, shared)| shared);
    let mut cached = Vec::new();
    let mut at = nearest;
    while let Some((node, from)) = at {
        let room = window_len - cached.len();
        cached.extend(tree.key(node).iter().skip(from).take(room));
        if cached.len() == window_len {
            break;
        }
        at = tree.each_child(Some(node)).next().map(|(_, child)| (child, 0));
    }
    let gone =
        rest.len() == block_size && evicted.has(evicted::chain(tree.chain(path.last().copied()), rest));
    Divergence {
        evicted: gone,
        position,
        before: window(tokens, position.saturating_sub(window_len), position).to_vec(),
        asked: window(tokens, position, position + window_len).to_vec(),
        cached,
    }
}

//! Moving blocks, so that a sequence becomes one run, or stays one.
//!
//! In a pool full of cached prefixes of all sizes, free blocks are scattered, and so would be every new sequence. But
//! cached blocks that no running sequence uses can lie anywhere: copying some of them out of the way once costs less
//! than gathering a scattered sequence for a single step of decoding.
//!
//! Nothing is evicted here, and what is cached stays cached.

use std::ops::Range;

use crate::cache::KvCache;
use crate::placement::runs;
use crate::tree::NodeId;
use crate::types::{BlockId, CacheError, CopyBlock, SeqId};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Free,
    /// In the tree, and in no block table.
    Cached(NodeId),
    /// In the block table of the sequence in question.
    Own,
    /// In use, or kept free for a running sequence that ends before it.
    Fixed,
}

/// Blocks that the sequence is to take, or take next.
#[derive(Clone, Copy, Debug)]
struct Window {
    start: usize,
    len: usize,
    /// Cached blocks in it, to be moved out.
    cached: usize,
    /// The first block of the sequence that moves into it, as its index in the block table; those before it stay.
    first: usize,
    /// How many do.
    moved: usize,
}

impl<S: Clone> KvCache<S> {
    /// Moves blocks, at most `most`, so that the blocks of `id` are one run with room for all that is promised to it
    /// behind. For a sequence that was just admitted. Gives the copies to issue, in this order; none if nothing has to
    /// be done, or nothing can be: what would have to move is shared with a running sequence, or there is no such place.
    ///
    /// The steps that write what is cached, and positions handed out to `id`, must have been issued before the copies.
    ///
    /// # Errors
    /// An unknown sequence.
    pub fn compact(&mut self, id: SeqId, most: usize) -> Result<Vec<CopyBlock>, CacheError> {
        let credit = self.sequence(id)?.credit;
        self.make_run(id, credit, most)
    }

    /// Moves blocks, at most `most`, so that a sequence which is one run and is about to begin a block stays one run.
    /// For a sequence that decodes, after [`KvCache::make_room`] and before [`KvCache::extend`]; otherwise as
    /// [`KvCache::compact`].
    ///
    /// # Errors
    /// An unknown sequence.
    pub fn stay_compact(&mut self, id: SeqId, most: usize) -> Result<Vec<CopyBlock>, CacheError> {
        let sequence = self.sequence(id)?;
        let full = self.config.blocks_for(sequence.len + 1) > sequence.blocks.len();
        let next = sequence
            .blocks
            .last()
            .map(|last| BlockId(last.0.saturating_add(1)));
        if !full
            || sequence.len >= sequence.limit
            || next.is_none_or(|next| self.pool.is_free(next))
            || runs(&sequence.blocks).nth(1).is_some()
        {
            return Ok(Vec::new());
        }
        // As `extend` will: what it grows beyond its promise must not come out of what is promised to others.
        self.evict_for(self.promised + usize::from(sequence.credit == 0));
        // Block after block, so without looking at the whole pool as long as only a cached block is in the way.
        let cached = next
            .filter(|&next| self.pool.refs(next) == 1 && most > 0)
            .and_then(|next| Some((next, self.tree.at(next)?, self.out_of_the_way(id)?)));
        match cached {
            Some((next, node, to)) => {
                self.counters.moved_blocks += 1;
                Ok(Vec::from_iter(self.move_cached(node, next, to)))
            }
            None => self.make_run(id, 1, most),
        }
    }

    /// A free block that stands in nobody's way: in a small run, as far as can be from who goes on there.
    fn out_of_the_way(&self, id: SeqId) -> Option<BlockId> {
        let others = self.sequences.iter().filter(|&(other, _)| *other != id);
        let growing: Vec<(u32, usize)> = others
            .filter_map(|(_, other)| Some((self.chosen(other)?.0, other.credit)))
            .collect();
        let taken = |start: u32, len: u32| {
            let inside = growing
                .iter()
                .filter(|(next, _)| (start..start + len).contains(next));
            inside
                .map(|&(next, credit)| (next - start) as usize + credit)
                .max()
                .unwrap_or(0)
        };
        self.pool
            .smallest_runs()
            .find(|&(start, len)| taken(start, len) < len as usize)
            .map(|(start, len)| BlockId(start + len - 1))
    }

    /// With `ahead` free blocks behind it, or better all that are promised.
    fn make_run(&mut self, id: SeqId, ahead: usize, most: usize) -> Result<Vec<CopyBlock>, CacheError> {
        let sequence = self.sequence(id)?;
        let one_run = runs(&sequence.blocks).nth(1).is_none();
        if let Some(last) = sequence.blocks.last()
            && one_run
            && (1..=ahead).all(|n| self.pool.is_free(BlockId(last.0.saturating_add(n as u32))))
        {
            return Ok(Vec::new());
        }
        let places = self.places(id);
        let window = [sequence.credit.max(ahead), ahead]
            .into_iter()
            .filter_map(|ahead| self.best_window(&places, id, ahead))
            .find(|window| window.cached + window.moved <= most);
        let copies = window.map_or_else(Vec::new, |window| self.clear_and_move(id, window, &places));
        // Where it cannot go on behind its last block, it starts anew.
        let cleared = window
            .filter(|window| window.cached > 0)
            .map(|window| window.start as u32);
        let sequence = self.sequence(id)?;
        let start = match self.chosen(sequence) {
            Some(_) => None,
            None => cleared.map(BlockId).or_else(|| self.place(sequence, Some(id))),
        };
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.start = start;
        }
        Ok(copies)
    }

    /// What can be done with each block.
    fn places(&self, id: SeqId) -> Vec<Place> {
        let all = 0..self.pool.total() as u32;
        let mut places: Vec<Place> = all
            .map(|block| match self.pool.is_free(BlockId(block)) {
                true => Place::Free,
                false => Place::Fixed,
            })
            .collect();
        let mut set = |block: usize, place: Place| {
            if let Some(at) = places.get_mut(block) {
                *at = place;
            }
        };
        for (node, block) in self.tree.blocks() {
            if self.pool.refs(block) == 1 {
                set(block.0 as usize, Place::Cached(node));
            }
        }
        for (&other, sequence) in &self.sequences {
            if other == id {
                for block in &sequence.blocks {
                    set(block.0 as usize, Place::Own);
                }
            } else if let Some(next) = self.chosen(sequence) {
                let next = next.0 as usize;
                let reserved = (next..next + sequence.credit)
                    .take_while(|&block| self.pool.is_free(BlockId(block as u32)));
                reserved.for_each(|block| set(block, Place::Fixed));
            }
        }
        places
    }

    /// The place that costs the fewest copies.
    fn best_window(&self, places: &[Place], id: SeqId, ahead: usize) -> Option<Window> {
        let sequence = self.sequences.get(&id)?;
        let own = sequence.blocks.len();
        let free = places.iter().filter(|place| **place == Place::Free).count();
        let fits = |window: &Window| {
            // Blocks outside to move the cached ones to; those that the sequence leaves come on top, one by one.
            let outside = free - (window.len - window.cached);
            window.cached == 0 || (outside > 0 && window.cached <= outside + window.moved)
        };
        // What is shared with others who run would have to move for them too.
        let alone = |(index, block): (usize, &BlockId)| {
            self.pool.refs(*block) == 1 + u32::from(index < sequence.path.len())
        };
        let movable = |first: usize| sequence.blocks.iter().enumerate().skip(first).all(alone);

        // Behind its first run,
        let stay = runs(&sequence.blocks).next().filter(|&(_, len)| movable(len));
        let stay = stay.and_then(|(first, len)| {
            let (start, wanted) = (first.0 as usize + len, own - len + ahead);
            let blocks = places.get(start..start.checked_add(wanted)?)?;
            Some(Window {
                start,
                len: wanted,
                cached: count_cached(blocks)?,
                first: len,
                moved: own - len,
            })
        });
        // or all of it elsewhere,
        let go = || cheapest(windows(places, own + ahead, own).filter(fits));
        let go = movable(0).then(go).flatten();
        let whole = stay.filter(fits).into_iter().chain(go);
        // or else only what is to come.
        let apart = || cheapest(windows(places, ahead, 0).filter(fits));
        whole
            .min_by_key(|window| window.cached + window.moved)
            .or_else(apart)
    }

    /// Moves what is cached out of the window and the sequence into it. In turns, if there are fewer free blocks outside
    /// than it takes: each block that the sequence leaves makes room for another.
    fn clear_and_move(&mut self, id: SeqId, window: Window, places: &[Place]) -> Vec<CopyBlock> {
        let mut copies = Vec::new();
        let range = window.start..window.start + window.len;
        let mut outside = Outside::new(places, &range);
        let (mut cleared, mut moved) = (0, 0);
        loop {
            while cleared < window.len {
                let block = window.start + cleared;
                if let Some(&Place::Cached(node)) = places.get(block) {
                    let left = range.end - block;
                    let Some(to) = outside.take(left) else { break };
                    copies.extend(self.move_cached(node, BlockId(block as u32), BlockId(to as u32)));
                }
                cleared += 1;
            }
            let until = cleared.min(window.moved);
            if moved == until {
                break;
            }
            for index in moved..until {
                let to = BlockId((window.start + index) as u32);
                if let Some(copy) = self.move_own(id, window.first + index, to) {
                    outside.give(copy.from.0 as usize);
                    copies.push(copy);
                }
            }
            moved = until;
        }
        self.counters.moved_blocks += copies.len() as u64;
        copies
    }

    fn move_cached(&mut self, node: NodeId, from: BlockId, to: BlockId) -> Option<CopyBlock> {
        let to = self.pool.take(to)?;
        let tokens = self.tree.key(node).len();
        self.tree.set_block(node, to);
        self.pool.release(from);
        Some(CopyBlock { from, to, tokens })
    }

    fn move_own(&mut self, id: SeqId, index: usize, to: BlockId) -> Option<CopyBlock> {
        let block_size = self.config.block_size;
        let sequence = self.sequences.get_mut(&id)?;
        let slot = sequence.blocks.get_mut(index)?;
        let to = self.pool.take(to)?;
        let from = std::mem::replace(slot, to);
        if let Some(&node) = sequence.path.get(index) {
            self.tree.set_block(node, to);
            self.pool.retain(to);
            self.pool.release(from);
        }
        self.pool.release(from);
        let tokens = block_size.min(sequence.len.saturating_sub(index * block_size));
        Some(CopyBlock { from, to, tokens })
    }
}

/// Copies of neighbouring blocks to neighbouring blocks, as (first block to read, first block to write, blocks): what
/// can be copied as one slice. They are to be issued in this order. No slice overlaps the one it is copied to.
pub fn copy_runs(copies: &[CopyBlock]) -> impl Iterator<Item = (BlockId, BlockId, usize)> + '_ {
    let mut rest = copies;
    std::iter::from_fn(move || {
        let (from, to) = rest.first().map(|first| (first.from.0, first.to.0))?;
        // Until the run would reach from the lower one of the two into the other.
        let most = from.abs_diff(to) as usize;
        let goes_on = |(n, copy): (u32, &CopyBlock)| copy.from.0 == from + n && copy.to.0 == to + n;
        let len = (0..)
            .zip(rest)
            .take(most)
            .take_while(|&at| goes_on(at))
            .count()
            .max(1);
        rest = rest.get(len..).unwrap_or(&[]);
        Some((BlockId(from), BlockId(to), len))
    })
}

/// How many of the blocks are cached; `None` if one of them cannot be had.
fn count_cached(blocks: &[Place]) -> Option<usize> {
    let mut cached = 0;
    for place in blocks {
        match place {
            Place::Free => {}
            Place::Cached(_) => cached += 1,
            Place::Own | Place::Fixed => return None,
        }
    }
    Some(cached)
}

/// All stretches of `len` blocks that can be had, for a sequence that moves all of its `moved` blocks.
fn windows(places: &[Place], len: usize, moved: usize) -> impl Iterator<Item = Window> + '_ {
    let (mut since_blocked, mut cached) = (0, 0);
    let is_cached = |place: &Place| usize::from(matches!(place, Place::Cached(_)));
    places.iter().enumerate().filter_map(move |(end, place)| {
        if matches!(place, Place::Own | Place::Fixed) {
            (since_blocked, cached) = (0, 0);
            return None;
        }
        since_blocked += 1;
        cached += is_cached(place);
        if since_blocked > len {
            cached -= places.get(end - len).map_or(0, is_cached);
        }
        (since_blocked >= len && len > 0).then(|| Window {
            start: end + 1 - len,
            len,
            cached,
            first: 0,
            moved,
        })
    })
}

/// Of equals the middle one: it leaves room to both sides.
fn cheapest(windows: impl Iterator<Item = Window>) -> Option<Window> {
    let mut best: Vec<Window> = Vec::new();
    for window in windows {
        if best.first().is_some_and(|known| known.cached > window.cached) {
            best.clear();
        }
        if best.first().is_none_or(|known| known.cached == window.cached) {
            best.push(window);
        }
    }
    best.get(best.len() / 2).copied()
}

/// Free blocks outside the window, as stretches; the last one is being used up.
struct Outside {
    stretches: Vec<Range<usize>>,
}

impl Outside {
    fn new(places: &[Place], window: &Range<usize>) -> Self {
        let mut outside = Self {
            stretches: Vec::new(),
        };
        let free = |&(block, place): &(usize, &Place)| *place == Place::Free && !window.contains(&block);
        for (block, _) in places.iter().enumerate().filter(free) {
            outside.give(block);
        }
        outside.stretches.push(0..0);
        outside
    }

    fn give(&mut self, block: usize) {
        match self.stretches.last_mut() {
            Some(last) if last.end == block => last.end += 1,
            _ => self.stretches.push(block..block + 1),
        }
    }

    /// A block of the stretch that holds the `wanted` blocks best, until that is used up: so blocks moved one after the
    /// other become neighbours, and large stretches stay large.
    fn take(&mut self, wanted: usize) -> Option<usize> {
        if let Some(block) = self.stretches.last_mut().and_then(Range::next) {
            return Some(block);
        }
        self.stretches.pop();
        let fits = |stretch: &Range<usize>| (stretch.len() < wanted, stretch.len().abs_diff(wanted));
        let stretches = self.stretches.iter().enumerate();
        let (at, _) = stretches.min_by_key(|(_, stretch)| fits(stretch))?;
        let last = self.stretches.len() - 1;
        self.stretches.swap(at, last);
        self.stretches.last_mut().and_then(Range::next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_of_neighbours_become_one() {
        let joined = |copies: &[(u32, u32)]| {
            let copies: Vec<_> = copies
                .iter()
                .map(|&(from, to)| CopyBlock {
                    from: BlockId(from),
                    to: BlockId(to),
                    tokens: 4,
                })
                .collect();
            copy_runs(&copies)
                .map(|(from, to, len)| (from.0, to.0, len))
                .collect::<Vec<_>>()
        };
        assert_eq!(joined(&[]), []);
        assert_eq!(
            joined(&[(1, 9), (2, 10), (3, 11), (3, 12), (7, 5), (8, 6)]),
            [(1, 9, 3), (3, 12, 1), (7, 5, 2)]
        );
        // Block 6 is written before it is read.
        assert_eq!(joined(&[(4, 6), (5, 7), (6, 8)]), [(4, 6, 2), (6, 8, 1)]);
        assert_eq!(
            joined(&[(6, 5), (7, 6), (8, 7)]),
            [(6, 5, 1), (7, 6, 1), (8, 7, 1)]
        );
    }
}

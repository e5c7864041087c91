//! Moving blocks, so that a sequence becomes one run, or stays one.
//!
//! In a pool full of cached prefixes of all sizes, free blocks are scattered, and so would be every new sequence. But
//! cached blocks that no running sequence uses can lie anywhere: copying some of them out of the way once costs less
//! than gathering a scattered sequence for a single step of decoding.
//!
//! Nothing is evicted here, and what is cached stays cached.

use std::ops::Range;

use crate::cache::KvCache;
use crate::config::Reuse;
use crate::placement::runs;
use crate::pool::BlockPool;
use crate::sequence::Sequence;
use crate::tree::NodeId;
use crate::types::{BlockId, CacheError, CopyBlock, SeqId};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Free,
    /// In the tree, and in no block table.
    Cached,
    /// In use, also by the sequence in question; or kept free for another.
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
        self.make_run(id, 1, most)
    }

    /// A new sequence wants a part of a cached block. Where that block is the one behind its last, the copy is for the
    /// cache, and the sequence goes on in the block itself, which is free now.
    pub(crate) fn give_way(&mut self, new: &Sequence<S>, id: SeqId, block: BlockId) -> Option<CopyBlock> {
        let node = self.cached_at(block.0 as usize)?;
        let last = new.blocks.last().filter(|last| last.0 + 1 == block.0);
        // With snapshots a copy is made of what is wanted and no more.
        if last.is_none() || self.config.reuse == Reuse::Snapshots {
            return None;
        }
        let to = Outside::new(&self.pool, &self.reserved(id), &(0..0)).take(1)?;
        self.move_cached(node, block, BlockId(u32::try_from(to).ok()?))
    }

    /// With `ahead` free blocks behind it, or better all that are promised.
    fn make_run(&mut self, id: SeqId, ahead: usize, most: usize) -> Result<Vec<CopyBlock>, CacheError> {
        let sequence = self.sequence(id)?;
        let one_run = runs(&sequence.blocks).nth(1).is_none();
        let start = match sequence.blocks.last() {
            Some(last) => {
                let behind = |n: usize| BlockId(last.0.saturating_add(n as u32));
                if one_run && (1..=ahead).all(|n| self.pool.is_free(behind(n))) {
                    return Ok(Vec::new());
                }
                None
            }
            // The usual case of a new prompt: no need to look at the whole pool.
            None => self.place(sequence, Some(id)).filter(|place| place.holds_promise),
        };
        let mut copies = Vec::new();
        let mut start = start.map(|place| place.block);
        if start.is_none()
            && let Some(window) = self.best_window(id, [sequence.credit.max(ahead), ahead], most)
        {
            copies = self.clear_and_move(id, window);
            start = (window.cached > 0).then_some(BlockId(window.start as u32));
        }
        // Where it cannot go on behind its last block, it starts anew.
        let sequence = self.sequence(id)?;
        if self.chosen(sequence).is_none() {
            let start = start.or_else(|| Some(self.place(sequence, Some(id))?.block));
            if let Some(sequence) = self.sequences.get_mut(&id) {
                sequence.start = start;
            }
        }
        Ok(copies)
    }

    /// The parts of free runs that are kept for others: where they go on, as far as is promised.
    fn reserved(&self, id: SeqId) -> Vec<Range<usize>> {
        let others = self.sequences.iter().filter(|&(&other, _)| other != id);
        others
            .filter_map(|(_, other)| {
                let next = self.chosen(other)?.0 as usize;
                Some(next..next + other.credit)
            })
            .collect()
    }

    /// The cached node that may be moved out of a block.
    fn cached_at(&self, block: usize) -> Option<NodeId> {
        let block = BlockId(u32::try_from(block).ok()?);
        self.tree.at(block).filter(|_| self.pool.refs(block) == 1)
    }

    /// What can be done with each block.
    fn places(&self, id: SeqId, reserved: &[Range<usize>]) -> Vec<Place> {
        let all = 0..self.pool.total() as u32;
        let mut places: Vec<Place> = all
            .map(|block| match self.pool.is_free(BlockId(block)) {
                true => Place::Free,
                false => Place::Fixed,
            })
            .collect();
        for (_, block) in self.tree.blocks() {
            if self.pool.refs(block) == 1
                && let Some(place) = places.get_mut(block.0 as usize)
            {
                *place = Place::Cached;
            }
        }
        for range in reserved {
            let end = range.end.min(places.len());
            let kept = places.get_mut(range.start..end).into_iter().flatten();
            kept.take_while(|place| **place == Place::Free)
                .for_each(|place| *place = Place::Fixed);
        }
        for block in self.sequences.get(&id).into_iter().flat_map(|own| &own.blocks) {
            if let Some(place) = places.get_mut(block.0 as usize) {
                *place = Place::Fixed;
            }
        }
        places
    }

    /// Where to be one run, by at most `most` copies: with that many blocks behind, the first number if possible.
    fn best_window(&self, id: SeqId, ahead: [usize; 2], most: usize) -> Option<Window> {
        let sequence = self.sequences.get(&id)?;
        let own = sequence.blocks.len();
        let reserved = self.reserved(id);
        let free = Outside::new(&self.pool, &reserved, &(0..0)).len();
        let fits = |window: &Window| {
            // Blocks outside to move the cached ones to; those that the sequence leaves come on top, one by one.
            let outside = free.saturating_sub(window.len - window.cached);
            window.cached + window.moved <= most
                && (window.cached == 0 || (outside > 0 && window.cached <= outside + window.moved))
        };
        // What is shared with others who run would have to move for them too.
        let alone = |(index, block): (usize, &BlockId)| {
            self.pool.refs(*block) == 1 + u32::from(index < sequence.path.len())
        };
        let movable = |first: usize| sequence.blocks.iter().enumerate().skip(first).all(alone);

        let mut places = None;
        for ahead in ahead {
            // Behind its first run,
            let stay = runs(&sequence.blocks).next().filter(|&(_, len)| movable(len));
            let stay = stay.and_then(|(first, len)| {
                let start = first.0 as usize + len;
                let wanted = own - len + ahead;
                Some(Window {
                    start,
                    len: wanted,
                    cached: self.count_cached(start..start + wanted, &reserved)?,
                    first: len,
                    moved: own - len,
                })
            });
            if let Some(stay) = stay.filter(fits) {
                return Some(stay);
            }
            // or all of it elsewhere,
            let places = places.get_or_insert_with(|| self.places(id, &reserved));
            if movable(0)
                && let Some(go) = cheapest(windows(places, own + ahead, own).filter(fits))
            {
                return Some(go);
            }
        }
        // or else what is to come in one run of its own.
        let places = places?;
        cheapest(windows(&places, ahead[0], 0).filter(fits))
    }

    /// How many of the blocks are cached; `None` if one of them cannot be had.
    fn count_cached(&self, blocks: Range<usize>, reserved: &[Range<usize>]) -> Option<usize> {
        let mut cached = 0;
        for block in blocks {
            if self.cached_at(block).is_some() {
                cached += 1;
            } else if !self.pool.is_free(BlockId(block as u32))
                || reserved.iter().any(|kept| kept.contains(&block))
            {
                return None;
            }
        }
        Some(cached)
    }

    /// Moves what is cached out of the window and the sequence into it. In turns, if there are fewer free blocks outside
    /// than it takes: each block that the sequence leaves makes room for another.
    fn clear_and_move(&mut self, id: SeqId, window: Window) -> Vec<CopyBlock> {
        let mut copies = Vec::new();
        let range = window.start..window.start + window.len;
        let mut outside = Outside::new(&self.pool, &self.reserved(id), &range);
        let (mut cleared, mut moved) = (0, 0);
        loop {
            while cleared < window.len {
                let block = window.start + cleared;
                if let Some(node) = self.cached_at(block) {
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

/// All stretches of `len` blocks that can be had, for a sequence that moves all of its `moved` blocks.
fn windows(places: &[Place], len: usize, moved: usize) -> impl Iterator<Item = Window> + '_ {
    let (mut since_blocked, mut cached) = (0, 0);
    let is_cached = |place: &Place| usize::from(*place == Place::Cached);
    places.iter().enumerate().filter_map(move |(end, place)| {
        if *place == Place::Fixed {
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
    fn new(pool: &BlockPool, reserved: &[Range<usize>], window: &Range<usize>) -> Self {
        let free = pool
            .runs()
            .map(|(start, len)| start as usize..(start + len) as usize);
        let mut stretches: Vec<Range<usize>> = free.collect();
        for cut in reserved
            .iter()
            .chain([window])
            .filter(|cut| !Range::is_empty(cut))
        {
            let pieces = stretches.into_iter().flat_map(|stretch| {
                let before = stretch.start..stretch.end.min(cut.start);
                let after = stretch.start.max(cut.end)..stretch.end;
                [before, after]
            });
            stretches = pieces.filter(|piece| !Range::is_empty(piece)).collect();
        }
        // None is being used up yet.
        stretches.push(0..0);
        Self { stretches }
    }

    fn len(&self) -> usize {
        self.stretches.iter().map(Range::len).sum()
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

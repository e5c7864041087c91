//! Where captures lie that no database keeps: shelves of memory, the oldest of which makes room.

use std::collections::{HashSet, VecDeque};
use std::sync::atomic::Ordering;

use parking_lot::Mutex;

use super::captures::Flying;

/// Memory that small captures share.
const SHELF: usize = 64 * 1024;
/// One body may take this part of all that is kept.
const PART: usize = 4;

/// The captures that are kept in memory.
#[derive(Debug, Default)]
pub(super) struct Captures {
    inner: Mutex<Held>,
    /// Of requests that have not ended.
    pub(super) flying: Flying,
}

#[derive(Debug, Default)]
struct Held {
    /// Bytes; 0 keeps nothing.
    limit: usize,
    /// That all shelves take, filled or not.
    bytes: usize,
    shelves: VecDeque<Shelf>,
}

/// Captures in one piece of memory, which is filled from one end to the other and given up as a whole: thousands of
/// small pieces, each cold when it is let go, would cost more than the copy.
#[derive(Debug, Default)]
struct Shelf {
    /// Ids, and where the captures end.
    ends: Vec<(u64, usize)>,
    text: Vec<u8>,
}

impl Shelf {
    fn all(&self) -> impl Iterator<Item = (u64, &[u8])> {
        let mut begin = 0;
        self.ends.iter().map(move |(id, end)| {
            let text = self.text.get(std::mem::replace(&mut begin, *end)..*end);
            (*id, text.unwrap_or_default())
        })
    }
}

impl Held {
    fn shrink(&mut self, limit: usize) {
        while self.bytes > limit
            && let Some(oldest) = self.shelves.pop_front()
        {
            self.bytes -= oldest.text.capacity();
        }
    }

    fn all(&self) -> impl Iterator<Item = (u64, &[u8])> {
        self.shelves.iter().flat_map(Shelf::all)
    }
}

impl Captures {
    /// Another limit. `elsewhere`: they are kept in a database from now on.
    pub(super) fn set_limit(&self, megabytes: u64, elsewhere: bool) {
        let limit = usize::try_from(megabytes).map_or(usize::MAX, |m| m.saturating_mul(1 << 20));
        self.flying.limit.store(limit, Ordering::Relaxed);
        let mut held = self.inner.lock();
        held.limit = limit;
        held.shrink(if elsewhere { 0 } else { limit });
    }

    pub(super) fn limit(&self) -> usize {
        self.inner.lock().limit
    }

    /// The largest body that is kept; 0: nothing is.
    pub(super) fn room(&self) -> usize {
        self.limit() / PART
    }

    pub(super) fn put(&self, id: u64, packed: &[u8]) {
        let mut held = self.inner.lock();
        if packed.len() > held.limit {
            return;
        }
        let fits = |shelf: &&mut Shelf| shelf.text.capacity() - shelf.text.len() >= packed.len();
        match held.shelves.back_mut().filter(fits) {
            Some(shelf) => {
                shelf.text.extend_from_slice(packed);
                shelf.ends.push((id, shelf.text.len()));
            }
            None => {
                let mut text = Vec::with_capacity(packed.len().max(SHELF));
                let room = held.limit.saturating_sub(text.capacity());
                held.shrink(room);
                held.bytes += text.capacity();
                text.extend_from_slice(packed);
                let ends = vec![(id, packed.len())];
                held.shelves.push_back(Shelf { ends, text });
            }
        }
    }

    pub(super) fn get(&self, id: u64) -> Option<Vec<u8>> {
        let held = self.inner.lock();
        held.all().find(|(i, _)| *i == id).map(|(_, p)| p.to_vec())
    }

    pub(super) fn ids(&self) -> HashSet<u64> {
        self.inner.lock().all().map(|(id, _)| id).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_make_room() {
        let captures = Captures::default();
        captures.put(1, &[0; 10]);
        assert!(captures.ids().is_empty(), "nothing is kept");
        captures.set_limit(1, false);
        for id in 1..=5 {
            captures.put(id, &vec![0; 400_000]);
        }
        captures.put(6, &vec![0; 2_000_000]);
        assert_eq!(captures.ids(), HashSet::from([4, 5]));
        assert_eq!(captures.get(4).unwrap().len(), 400_000);
        captures.set_limit(0, false);
        assert!(captures.ids().is_empty() && captures.room() == 0);
        // Two of these do not fit on one shelf, whose other half is lost.
        captures.set_limit(1, false);
        for id in 1..=40 {
            captures.put(id, &[0; SHELF / 2 + 1]);
        }
        assert_eq!(captures.ids(), (25..=40).collect());
        assert_eq!(captures.inner.lock().bytes, 1 << 20);
        captures.set_limit(0, false);
        assert_eq!(captures.inner.lock().bytes, 0);
    }

    #[test]
    fn small_ones_share_their_memory_and_stay_apart() {
        let captures = Captures::default();
        captures.set_limit(1, false);
        let text = |id: u64| vec![u8::try_from(id % 251).unwrap(); 900 + usize::try_from(id % 13).unwrap()];
        for id in 1..=2_000 {
            captures.put(id, &text(id));
        }
        let kept = captures.ids();
        let oldest = *kept.iter().min().unwrap();
        assert_eq!(kept, (oldest..=2_000).collect(), "the last ones, without a gap");
        let bytes: usize = kept.iter().map(|id| text(*id).len()).sum();
        assert!(((1 << 20) - 2 * SHELF..=1 << 20).contains(&bytes), "{bytes}");
        for id in kept {
            assert_eq!(captures.get(id), Some(text(id)));
        }
        assert_eq!(captures.get(oldest - 1), None);
    }
}

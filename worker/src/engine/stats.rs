//! The engine's counters: written by its thread once a step, read by anybody, without a lock.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use scheduler::Totals;

use crate::backend::{CacheStats, ConstraintStats, EngineStats};

/// See [`CacheStats`].
#[derive(Debug, Default)]
struct Cache {
    requests: AtomicU64,
    hits: AtomicU64,
    prompt_tokens: AtomicU64,
    cached_tokens: AtomicU64,
    evicted_blocks: AtomicU64,
    copied_blocks: AtomicU64,
    moved_blocks: AtomicU64,
    deduplicated_blocks: AtomicU64,
}

/// Places given back from which the next ones are foretold.
const FREED_KEPT: usize = 16;
/// Bounds of that: a client must not come back at once, nor hear of a time that nobody can know.
const SOONEST_PLACE: Duration = Duration::from_secs(1);
const LATEST_PLACE: Duration = Duration::from_secs(60);
/// Before any has been given back: a short reply's time.
const UNKNOWN_PLACE: Duration = Duration::from_secs(5);

/// See [`EngineStats`] for what each one means.
#[derive(Debug)]
pub(super) struct Counters {
    started: Instant,
    /// Milliseconds from `started` to the end of the last turn of the engine's loop.
    last_turn_ms: AtomicU64,
    pub(super) steps: AtomicU64,
    pub(super) running: AtomicUsize,
    pub(super) busy: AtomicBool,
    /// The engine ends for this.
    pub(super) weights_lost: AtomicBool,
    /// Submitted and not yet ended; see [`Place`].
    outstanding: AtomicUsize,
    /// When the last places were given back, the oldest first.
    freed: Mutex<VecDeque<Instant>>,
    pub(super) kv_used_bytes: AtomicU64,
    pub(super) kv_cached_bytes: AtomicU64,
    pub(super) prefill_tokens: AtomicU64,
    pub(super) decode_tokens: AtomicU64,
    kernel_decodes: AtomicU64,
    reference_decodes: AtomicU64,
    cache: Cache,
    pub(super) preempted: AtomicU64,
    masks: AtomicU64,
    mask_nanos: AtomicU64,
    pub(super) late_draws: AtomicU64,
    active_bytes: AtomicU64,
    peak_bytes: AtomicU64,
    buffer_cache_bytes: AtomicU64,
}

impl Counters {
    pub(super) fn new() -> Self {
        Self {
            started: Instant::now(),
            last_turn_ms: AtomicU64::default(),
            steps: AtomicU64::default(),
            running: AtomicUsize::default(),
            busy: AtomicBool::default(),
            weights_lost: AtomicBool::default(),
            outstanding: AtomicUsize::default(),
            freed: Mutex::default(),
            kv_used_bytes: AtomicU64::default(),
            kv_cached_bytes: AtomicU64::default(),
            prefill_tokens: AtomicU64::default(),
            decode_tokens: AtomicU64::default(),
            kernel_decodes: AtomicU64::default(),
            reference_decodes: AtomicU64::default(),
            cache: Cache::default(),
            preempted: AtomicU64::default(),
            masks: AtomicU64::default(),
            mask_nanos: AtomicU64::default(),
            late_draws: AtomicU64::default(),
            active_bytes: AtomicU64::default(),
            peak_bytes: AtomicU64::default(),
            buffer_cache_bytes: AtomicU64::default(),
        }
    }

    /// A place for one more request, unless `capacity` are taken; the number taken otherwise.
    pub(super) fn place(self: &Arc<Self>, capacity: usize) -> Result<Place, usize> {
        let taken = self.outstanding.fetch_add(1, Relaxed);
        if taken < capacity {
            // From here on dropping it gives it back.
            return Ok(Place {
                counters: Arc::clone(self),
                held: false,
            });
        }
        self.outstanding.fetch_sub(1, Relaxed);
        Err(taken)
    }

    /// How long it will take until a place is given back, if it goes on as it did lately.
    pub(super) fn next_place(&self) -> Duration {
        let freed = self.freed.lock();
        match (freed.front(), u32::try_from(freed.len())) {
            (Some(oldest), Ok(count)) => (oldest.elapsed() / count).clamp(SOONEST_PLACE, LATEST_PLACE),
            // Nobody has been seen to end.
            _ => UNKNOWN_PLACE,
        }
    }

    /// A decode step, on kernels of our own or on the reference path.
    pub(super) fn decoded(&self, kernels: bool) {
        let counter = if kernels {
            &self.kernel_decodes
        } else {
            &self.reference_decodes
        };
        counter.fetch_add(1, Relaxed);
    }

    /// A set of allowed tokens has been computed.
    pub(super) fn masked(&self, time: Duration) {
        self.masks.fetch_add(1, Relaxed);
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.mask_nanos.fetch_add(nanos, Relaxed);
    }

    /// What the scheduler and its cache have counted so far.
    pub(super) fn cache(&self, totals: &Totals, cache: &kv_cache::Counters) {
        let to = &self.cache;
        for (place, count) in [
            (&to.requests, totals.admitted),
            (&to.hits, totals.hits),
            (&to.prompt_tokens, totals.prompt_tokens),
            (&to.cached_tokens, totals.cached_tokens),
            (&to.evicted_blocks, cache.evicted_blocks),
            (&to.copied_blocks, cache.copied_blocks),
            (&to.moved_blocks, cache.moved_blocks),
            (&to.deduplicated_blocks, cache.deduplicated_blocks),
        ] {
            place.store(count, Relaxed);
        }
    }

    /// The loop has come round: with work done, or awake and without any.
    pub(super) fn turned(&self) {
        let elapsed = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last_turn_ms.store(elapsed, Relaxed);
        let read = |call: fn() -> mlx_rs::error::Result<usize>, place: &AtomicU64| {
            if let Ok(bytes) = call() {
                place.store(bytes as u64, Relaxed);
            }
        };
        read(mlx_rs::memory::active_memory, &self.active_bytes);
        read(mlx_rs::memory::peak_memory, &self.peak_bytes);
        read(mlx_rs::memory::cache_memory, &self.buffer_cache_bytes);
    }

    pub(super) fn read(&self) -> EngineStats {
        let running = self.running.load(Relaxed);
        let last = Duration::from_millis(self.last_turn_ms.load(Relaxed));
        EngineStats {
            steps: self.steps.load(Relaxed),
            last_step_age: self.started.elapsed().saturating_sub(last),
            running,
            busy: self.busy.load(Relaxed),
            waiting: self.outstanding.load(Relaxed).saturating_sub(running),
            kv_used_bytes: self.kv_used_bytes.load(Relaxed),
            kv_cached_bytes: self.kv_cached_bytes.load(Relaxed),
            active_bytes: self.active_bytes.load(Relaxed),
            peak_bytes: self.peak_bytes.load(Relaxed),
            buffer_cache_bytes: self.buffer_cache_bytes.load(Relaxed),
            prefill_tokens: self.prefill_tokens.load(Relaxed),
            decode_tokens: self.decode_tokens.load(Relaxed),
            kernel_decodes: self.kernel_decodes.load(Relaxed),
            reference_decodes: self.reference_decodes.load(Relaxed),
            cache: CacheStats {
                requests: self.cache.requests.load(Relaxed),
                hits: self.cache.hits.load(Relaxed),
                prompt_tokens: self.cache.prompt_tokens.load(Relaxed),
                cached_tokens: self.cache.cached_tokens.load(Relaxed),
                evicted_blocks: self.cache.evicted_blocks.load(Relaxed),
                copied_blocks: self.cache.copied_blocks.load(Relaxed),
                moved_blocks: self.cache.moved_blocks.load(Relaxed),
                deduplicated_blocks: self.cache.deduplicated_blocks.load(Relaxed),
            },
            preempted: self.preempted.load(Relaxed),
            constraints: ConstraintStats {
                masks: self.masks.load(Relaxed),
                mask_time: Duration::from_nanos(self.mask_nanos.load(Relaxed)),
                late_draws: self.late_draws.load(Relaxed),
            },
        }
    }
}

/// One request's place among those that run or wait. It goes with the request wherever that goes, so that it is given
/// back however the request ends.
#[derive(Debug)]
pub(super) struct Place {
    counters: Arc<Counters>,
    /// See [`Self::hold`].
    held: bool,
}

impl Place {
    /// It is a request's from now on. Others, given back at once by a request that found no room for all its sequences, say
    /// nothing of how long a place is held.
    pub(super) fn hold(&mut self) {
        self.held = true;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.counters.outstanding.fetch_sub(1, Relaxed);
        if !self.held {
            return;
        }
        let mut freed = self.counters.freed.lock();
        if freed.len() >= FREED_KEPT {
            freed.pop_front();
        }
        freed.push_back(Instant::now());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_place_comes_as_the_last_ones_did() {
        let counters = Arc::new(Counters::new());
        assert_eq!(counters.next_place(), UNKNOWN_PLACE);
        let now = Instant::now();
        let freed = |ages: &[u64]| {
            *counters.freed.lock() = ages
                .iter()
                .filter_map(|&age| now.checked_sub(Duration::from_secs(age)))
                .collect();
            counters.next_place().as_secs()
        };
        // Every ten seconds; in bursts; long ago; all at once.
        assert_eq!(freed(&[30, 20, 10]), 10);
        assert_eq!(freed(&[30, 2, 2, 1, 1]), 6);
        assert_eq!(freed(&[500]), 60);
        assert_eq!(freed(&[0, 0, 0]), 1);
        assert_eq!(counters.place(0).map(drop), Err(0));
        drop(counters.place(1).unwrap());
        assert_eq!(counters.freed.lock().len(), 3, "nobody has had these");
        for _ in 0..100 {
            counters.place(1).unwrap().hold();
        }
        assert_eq!(counters.freed.lock().len(), FREED_KEPT);
        assert_eq!(counters.next_place(), SOONEST_PLACE);
    }
}

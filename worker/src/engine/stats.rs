//! The engine's counters: written by its thread once a step, read by anybody, without a lock.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use crate::backend::EngineStats;

/// See [`EngineStats`] for what each one means.
#[derive(Debug)]
pub(super) struct Counters {
    started: Instant,
    /// Milliseconds from `started` to the end of the last turn of the engine's loop.
    last_turn_ms: AtomicU64,
    pub(super) steps: AtomicU64,
    pub(super) running: AtomicUsize,
    /// Submitted and not yet ended; see [`Place`].
    outstanding: AtomicUsize,
    pub(super) kv_used_bytes: AtomicU64,
    pub(super) prefill_tokens: AtomicU64,
    pub(super) decode_tokens: AtomicU64,
    pub(super) cached_tokens: AtomicU64,
    pub(super) preempted: AtomicU64,
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
            outstanding: AtomicUsize::default(),
            kv_used_bytes: AtomicU64::default(),
            prefill_tokens: AtomicU64::default(),
            decode_tokens: AtomicU64::default(),
            cached_tokens: AtomicU64::default(),
            preempted: AtomicU64::default(),
            active_bytes: AtomicU64::default(),
            peak_bytes: AtomicU64::default(),
            buffer_cache_bytes: AtomicU64::default(),
        }
    }

    /// A place for one more request, unless `capacity` are taken; the number taken otherwise.
    pub(super) fn place(self: &Arc<Self>, capacity: usize) -> Result<Place, usize> {
        let taken = self.outstanding.fetch_add(1, Relaxed);
        // From here on dropping it gives it back.
        let place = Place(Arc::clone(self));
        if taken < capacity { Ok(place) } else { Err(taken) }
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
            waiting: self.outstanding.load(Relaxed).saturating_sub(running),
            kv_used_bytes: self.kv_used_bytes.load(Relaxed),
            active_bytes: self.active_bytes.load(Relaxed),
            peak_bytes: self.peak_bytes.load(Relaxed),
            buffer_cache_bytes: self.buffer_cache_bytes.load(Relaxed),
            prefill_tokens: self.prefill_tokens.load(Relaxed),
            decode_tokens: self.decode_tokens.load(Relaxed),
            cached_tokens: self.cached_tokens.load(Relaxed),
            preempted: self.preempted.load(Relaxed),
        }
    }
}

/// One request's place among those that run or wait. It goes with the request wherever that goes, so that it is given
/// back however the request ends.
#[derive(Debug)]
pub(super) struct Place(Arc<Counters>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.outstanding.fetch_sub(1, Relaxed);
    }
}

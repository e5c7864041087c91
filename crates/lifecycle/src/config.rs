//! The rules of the whole house and of each model.

use std::sync::Arc;

use indexmap::IndexMap;

use crate::event::{Millis, ModelId};
use crate::residency::{OneAtATime, Residency};

/// What happens to a load that nobody waits for any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Abandoned {
    /// It goes on, unless another model needs the room.
    #[default]
    Keep,
    /// It is stopped at once.
    Cancel,
}

/// Rules of one model. Times are milliseconds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Running plus waiting requests above which a new one is refused; `None`: only the queue's limits hold.
    pub concurrency_limit: Option<u32>,
    /// Most requests that may wait.
    pub queue_limit: u32,
    /// Longest wait of one request, whatever the reason.
    pub max_wait_ms: Millis,
    /// Idle time after which the process is stopped, counted from the later of ready and last use; `None`: never.
    pub ttl_ms: Option<Millis>,
    /// Unload: how long requests in flight may go on before they are cut.
    pub drain_grace_ms: Millis,
    /// From the request to stop until the process is killed.
    pub stop_grace_ms: Millis,
    /// From the start, or the last sign of progress, until ready.
    pub start_timeout_ms: Millis,
    /// Who is loaded first when several models wait: higher first.
    pub priority: i32,
    /// Time after ready in which other models don't evict it (unless they have waited too long).
    pub min_stay_ms: Millis,
    /// A load whose clients have all left.
    pub abandoned: Abandoned,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            concurrency_limit: None,
            queue_limit: 256,
            max_wait_ms: 600_000,
            ttl_ms: None,
            drain_grace_ms: 10_000,
            stop_grace_ms: 10_000,
            start_timeout_ms: 120_000,
            priority: 0,
            min_stay_ms: 0,
            abandoned: Abandoned::Keep,
        }
    }
}

/// How long one model may be preferred to another that waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fairness {
    /// Requests that may be served past a waiting one.
    pub max_passed: u32,
    /// Time for which requests may be served past a waiting one, from the first that was.
    pub max_passing_ms: Millis,
    /// First delay after a failed start; doubles with every further one.
    pub backoff_base_ms: Millis,
    /// Longest delay.
    pub backoff_max_ms: Millis,
    /// A process that has been ready for this long has redeemed the failures before it.
    pub backoff_reset_ms: Millis,
    /// If a failed model is tried again within this time, requests wait for that; else they are refused.
    pub backoff_wait_ms: Millis,
}

impl Default for Fairness {
    fn default() -> Self {
        Self {
            max_passed: 16,
            max_passing_ms: 30_000,
            backoff_base_ms: 1_000,
            backoff_max_ms: 60_000,
            backoff_reset_ms: 60_000,
            backoff_wait_ms: 2_000,
        }
    }
}

/// What want of memory leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryPolicy {
    /// How long it must have been at warning before idle models are unloaded.
    pub warning_hold_ms: Millis,
    /// Least time between two such unloads.
    pub evict_gap_ms: Millis,
    /// How long readings must have been lower before a lower level counts.
    pub recover_ms: Millis,
    /// How long a request may wait for a start while memory is critical.
    pub max_wait_ms: Millis,
    /// How long it must have been critical before requests in flight are cut; `None`: never.
    pub cut_after_ms: Option<Millis>,
}

impl Default for MemoryPolicy {
    fn default() -> Self {
        Self {
            warning_hold_ms: 30_000,
            evict_gap_ms: 5_000,
            recover_ms: 10_000,
            max_wait_ms: 10_000,
            cut_after_ms: Some(60_000),
        }
    }
}

/// All rules.
#[derive(Clone, Debug)]
pub struct Config {
    /// Every model, by resolved id.
    pub models: IndexMap<ModelId, Policy>,
    /// Who may be resident beside whom.
    pub residency: Arc<dyn Residency>,
    /// Bounds on waiting and retries.
    pub fairness: Fairness,
    /// What want of memory leads to; `None`: nothing.
    pub memory: Option<MemoryPolicy>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            models: IndexMap::new(),
            residency: Arc::new(OneAtATime),
            fairness: Fairness::default(),
            memory: None,
        }
    }
}

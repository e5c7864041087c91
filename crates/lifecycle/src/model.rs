//! The state of one model.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::config::Policy;
use crate::event::{CutReason, Failure, Instance, Kind, Millis, RequestId, State};

/// Why a ready process takes nothing new.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Drain {
    /// Another model has waited long enough for its room. Never cuts; is taken back if nobody waits any more.
    Swap,
    /// Its definition changed or went away. Never cuts.
    Replace,
    /// Ordered away: what is in flight at this time is cut.
    Until(Millis, CutReason),
}

#[derive(Clone, Debug)]
pub(crate) enum Phase {
    Stopped,
    Starting {
        instance: Instance,
        deadline: Millis,
        /// It takes the place of a process whose definition changed (the order of arrival): nobody needs to wait.
        for_restart: Option<u64>,
    },
    Ready {
        instance: Instance,
        since: Millis,
        last_use: Millis,
        /// Requests dispatched since ready.
        served: u64,
    },
    Draining {
        instance: Instance,
        since: Millis,
        last_use: Millis,
        why: Drain,
    },
    Stopping {
        instance: Instance,
        /// `None`: the kill has been sent.
        kill_at: Option<Millis>,
    },
}

#[derive(Clone, Debug)]
pub(crate) struct Waiter {
    pub(crate) id: RequestId,
    pub(crate) kind: Kind,
    /// Order of arrival over all models.
    pub(crate) seq: u64,
    pub(crate) since: Millis,
}

#[derive(Clone, Debug)]
pub(crate) struct Model {
    pub(crate) policy: Policy,
    pub(crate) phase: Phase,
    pub(crate) queue: VecDeque<Waiter>,
    /// Requests dispatched to the present process.
    pub(crate) inflight: u32,
    /// Requests of conflicting models dispatched past the front of the queue, and since when.
    pub(crate) passed: u32,
    pub(crate) passing_since: Option<Millis>,
    /// Failures in a row.
    pub(crate) failures: u32,
    pub(crate) failure: Option<Arc<Failure>>,
    pub(crate) retry_at: Millis,
    /// Not in the configuration any more; kept until its process is reaped.
    pub(crate) removed: bool,
    /// To be started without anybody waiting: it was ready when its definition changed. Holds the order of arrival.
    pub(crate) restart: Option<u64>,
    /// Idle time of the present process, where a client has ordered another than the policy's.
    pub(crate) keep_alive: Option<Option<Millis>>,
    /// The state last reported.
    pub(crate) shown: State,
}

impl Model {
    pub(crate) fn new(policy: Policy) -> Self {
        Self {
            policy,
            phase: Phase::Stopped,
            queue: VecDeque::new(),
            inflight: 0,
            passed: 0,
            passing_since: None,
            failures: 0,
            failure: None,
            retry_at: 0,
            removed: false,
            restart: None,
            keep_alive: None,
            shown: State::Stopped,
        }
    }

    pub(crate) fn instance(&self) -> Option<Instance> {
        match self.phase {
            Phase::Stopped => None,
            Phase::Starting { instance, .. }
            | Phase::Ready { instance, .. }
            | Phase::Draining { instance, .. }
            | Phase::Stopping { instance, .. } => Some(instance),
        }
    }

    /// Idle time after which the present process is stopped.
    pub(crate) fn ttl_ms(&self) -> Option<Millis> {
        self.keep_alive.unwrap_or(self.policy.ttl_ms)
    }

    /// When it is stopped unless it is used again: for a ready process with a limited idle time.
    pub(crate) fn expires(&self, now: Millis) -> Option<Millis> {
        let Phase::Ready { since, last_use, .. } = self.phase else {
            return None;
        };
        let idle_since = if self.inflight > 0 {
            now
        } else {
            since.max(last_use)
        };
        self.ttl_ms().map(|ttl| idle_since.saturating_add(ttl))
    }

    /// Whether a process exists, or may still exist.
    pub(crate) fn occupied(&self) -> bool {
        !matches!(self.phase, Phase::Stopped)
    }

    pub(crate) fn backing_off(&self, now: Millis) -> bool {
        matches!(self.phase, Phase::Stopped) && self.retry_at > now
    }

    pub(crate) fn state(&self, now: Millis) -> State {
        match self.phase {
            Phase::Stopped if self.backing_off(now) => State::BackOff,
            Phase::Stopped => State::Stopped,
            Phase::Starting { .. } => State::Starting,
            Phase::Ready { .. } => State::Ready,
            Phase::Draining { .. } => State::Draining,
            Phase::Stopping { .. } => State::Stopping,
        }
    }

    /// Whether it wants to be started now.
    pub(crate) fn wants_start(&self, now: Millis) -> bool {
        matches!(self.phase, Phase::Stopped)
            && !self.removed
            && (!self.queue.is_empty() || self.restart.is_some())
            && !self.backing_off(now)
    }

    /// Order of arrival of whoever has waited longest.
    pub(crate) fn front_seq(&self) -> u64 {
        let waiter = self.queue.front().map(|w| w.seq);
        waiter.into_iter().chain(self.restart).min().unwrap_or(u64::MAX)
    }

    /// Whether it is to be started although nobody waits for it.
    pub(crate) fn only_restarts(&self) -> bool {
        self.queue.is_empty() && self.restart.is_some()
    }

    pub(crate) fn forget_passing(&mut self) {
        self.passed = 0;
        self.passing_since = None;
    }

    /// Running plus waiting requests that are to be served.
    pub(crate) fn admitted(&self) -> u32 {
        let waiting = self.queue.iter().filter(|w| w.kind == Kind::Serve).count();
        self.inflight
            .saturating_add(u32::try_from(waiting).unwrap_or(u32::MAX))
    }
}

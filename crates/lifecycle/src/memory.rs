//! Want of memory: what readings of the host's memory lead to.
//!
//! The level that counts rises with a reading at once, and falls only after readings have been lower for a while: a
//! kernel's own levels go up and down with every unload. While it is at warning for long enough, idle models go, one at a
//! time, the least recently used first, so that the effect of one shows before the next. While it is critical idle models
//! go without waiting, and nothing is started: requests that need a start wait a little, then they are refused with the
//! numbers. Requests in flight are cut only when it has been critical for long and no idle model is left.

use std::sync::Arc;

use crate::config::MemoryPolicy;
use crate::event::{CutReason, Effect, Millis, ModelId, Rejection};
use crate::machine::Lifecycle;
use crate::model::{Drain, Phase};

/// How short of memory the host is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum MemoryLevel {
    /// Enough.
    #[default]
    Normal,
    /// The system works to find memory.
    Warning,
    /// Programs stand still for want of memory.
    Critical,
}

/// The host's memory at one time, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryReading {
    /// How short of it the host is.
    pub level: MemoryLevel,
    /// What programs could get without swapping.
    pub available_bytes: u64,
    /// All of it.
    pub total_bytes: u64,
    /// Swap space in use.
    pub swap_used_bytes: u64,
}

/// Readings, and the level that counts.
#[derive(Clone, Debug, Default)]
pub(crate) struct Memory {
    reading: MemoryReading,
    level: MemoryLevel,
    /// When the level that counts was entered.
    since: Millis,
    /// Since when readings have been lower than it.
    lower_since: Option<Millis>,
    /// Not before this time is another model unloaded.
    next_eviction: Millis,
}

impl Memory {
    fn take(&mut self, now: Millis, reading: MemoryReading, policy: &MemoryPolicy) {
        self.reading = reading;
        if reading.level >= self.level {
            if reading.level > self.level {
                (self.level, self.since) = (reading.level, now);
            }
            self.lower_since = None;
            return;
        }
        let lower_since = *self.lower_since.get_or_insert(now);
        if now.saturating_sub(lower_since) >= policy.recover_ms {
            (self.level, self.since, self.lower_since) = (reading.level, now, None);
        }
    }
}

impl Lifecycle {
    /// The level that counts, and the last reading.
    #[must_use]
    pub fn memory(&self) -> (MemoryLevel, MemoryReading) {
        (self.memory.level, self.memory.reading)
    }

    /// Since when nothing may be started, if nothing may.
    pub(crate) fn starved_since(&self) -> Option<Millis> {
        (self.memory.level == MemoryLevel::Critical && self.memory_policy.is_some())
            .then_some(self.memory.since)
    }

    /// Until when a request that has waited since then may wait for a start that cannot be.
    pub(crate) fn starved_until(&self, since: Millis) -> Option<Millis> {
        let wait = self.memory_policy?.max_wait_ms;
        Some(self.starved_since()?.max(since).saturating_add(wait))
    }

    pub(crate) fn memory_refusal(&self, waited_ms: Millis) -> Rejection {
        let retry_ms = self.memory_policy.map_or(0, |p| p.recover_ms);
        Rejection::Memory {
            reading: self.memory.reading,
            waited_ms,
            retry_ms,
        }
    }

    /// Takes a reading, and does what it calls for.
    pub(crate) fn read_memory(
        &mut self,
        now: Millis,
        reading: MemoryReading,
        effects: &mut Vec<Effect>,
    ) -> bool {
        let Some(policy) = self.memory_policy else {
            return false;
        };
        self.memory.take(now, reading, &policy);
        self.relieve(now, &policy, effects);
        true
    }

    /// Another policy is in force; without one, nothing is known of the memory any more.
    pub(crate) fn set_memory_policy(&mut self, policy: Option<MemoryPolicy>) {
        self.memory_policy = policy;
        if policy.is_none() {
            self.memory = Memory::default();
        }
    }

    fn relieve(&mut self, now: Millis, policy: &MemoryPolicy, effects: &mut Vec<Effect>) {
        let m = &self.memory;
        let held = match m.level {
            MemoryLevel::Normal => return,
            MemoryLevel::Warning => now.saturating_sub(m.since) >= policy.warning_hold_ms,
            MemoryLevel::Critical => true,
        };
        let leaving = |p: &Phase| matches!(p, Phase::Stopping { .. });
        // What is on its way out gives its memory back first; and what has become better needs no help.
        if !held
            || m.lower_since.is_some()
            || now < m.next_eviction
            || self.models.values().any(|m| leaving(&m.phase))
        {
            return;
        }
        let critical_for = (m.level == MemoryLevel::Critical).then(|| now.saturating_sub(m.since));
        if let Some(victim) = self.least_wanted(true) {
            effects.push(Effect::Evicted(victim.clone(), self.memory.reading));
            self.begin_stop(now, &victim, effects);
        } else if let (Some(time), Some(limit)) = (critical_for, policy.cut_after_ms)
            && time >= limit
            && let Some(victim) = self.least_wanted(false)
        {
            effects.push(Effect::Evicted(victim.clone(), self.memory.reading));
            let why = self.memory_refusal(0);
            self.reject_waiting(&victim, &why, effects);
            let grace = self.models.get(&victim).map_or(0, |m| m.policy.drain_grace_ms);
            let until = Drain::Until(now.saturating_add(grace), CutReason::Memory);
            self.send_away(now, &victim, until, effects);
        } else {
            return;
        }
        self.memory.next_eviction = now.saturating_add(policy.evict_gap_ms);
    }

    /// The model that is missed least: lowest priority, then longest without use; a load counts as unused. Of the idle
    /// ones only, or of all that have not been sent away yet.
    fn least_wanted(&self, idle: bool) -> Option<ModelId> {
        let candidates = self.models.iter().filter_map(|(id, m)| match m.phase {
            Phase::Ready { since, last_use, .. } if !idle || (m.inflight == 0 && m.queue.is_empty()) => {
                Some((m.policy.priority, since.max(last_use), id))
            }
            Phase::Starting { .. } if !idle => Some((m.policy.priority, 0, id)),
            _ => None,
        });
        candidates.min().map(|(_, _, id)| Arc::clone(id))
    }
}

//! What follows from time and from the queues, after any event.

use std::cmp::Reverse;
use std::sync::Arc;

use crate::config::Abandoned;
use crate::event::{Effect, Failure, Instance, Kind, Millis, ModelId, Rejection, State};
use crate::machine::{Lifecycle, Place};
use crate::model::{Drain, Model, Phase};

impl Lifecycle {
    /// When [`crate::Event::Tick`] is due at the latest; `None`: nothing depends on time.
    ///
    /// Only times after `now` count: what was due before is assumed to be on the caller's timer already, which is
    /// therefore to be moved only forward in urgency (to an earlier time), or when it has fired.
    #[must_use]
    pub fn deadline(&self, now: Millis) -> Option<Millis> {
        let times = self.models.values().flat_map(|m| self.deadlines_of(m));
        times.flatten().filter(|at| *at > now).min()
    }

    fn deadlines_of(&self, m: &Model) -> [Option<Millis>; 5] {
        let (phase, stay) = match m.phase {
            Phase::Stopped => ((m.shown == State::BackOff).then_some(m.retry_at), None),
            Phase::Starting { deadline, .. } => (Some(deadline), None),
            Phase::Ready { since, .. } if m.inflight == 0 => {
                (m.expires(0), Some(since.saturating_add(m.policy.min_stay_ms)))
            }
            Phase::Draining {
                why: Drain::Until(at, _),
                ..
            } => (Some(at), None),
            Phase::Ready { .. } | Phase::Draining { .. } => (None, None),
            Phase::Stopping { kill_at, .. } => (kill_at, None),
        };
        let front = m
            .queue
            .front()
            .map(|w| w.since.saturating_add(m.policy.max_wait_ms));
        let fair = m
            .passing_since
            .map(|t| t.saturating_add(self.fairness.max_passing_ms));
        let starved = m
            .queue
            .front()
            .filter(|_| !m.occupied())
            .and_then(|w| self.starved_until(w.since));
        [phase, stay, front, fair, starved]
    }

    pub(crate) fn settle(&mut self, now: Millis, effects: &mut Vec<Effect>) {
        self.expire(now, effects);
        // Serving may close a model to make room, making room may open one: each round moves at least one model on.
        for _ in 0..2 * self.models.len() + 2 {
            let moved = self.serve(now, effects) | self.make_room(now, effects);
            if !moved {
                break;
            }
        }
        self.end_drains(now, effects);
        self.models.retain(|_, m| !m.removed || m.occupied());
        let models = &self.models;
        self.unloads.retain(|u| {
            let alive = u
                .processes
                .iter()
                .any(|(id, i)| models.get(id).is_some_and(|m| m.instance() == Some(*i)));
            if !alive {
                effects.push(Effect::Unloaded(u.ticket));
            }
            alive
        });
        for (id, m) in &mut self.models {
            let state = m.state(now);
            if state != m.shown {
                m.shown = state;
                effects.push(Effect::State(id.clone(), state));
            }
        }
        if self.shutdown == Some(false) && self.models.values().all(|m| !m.occupied()) {
            self.shutdown = Some(true);
            effects.push(Effect::ShutdownComplete);
        }
    }

    /// Everything whose time has come.
    fn expire(&mut self, now: Millis, effects: &mut Vec<Effect>) {
        let ids: Vec<ModelId> = self.models.keys().cloned().collect();
        for id in &ids {
            self.expire_waiters(now, id, effects);
            let Some(m) = self.models.get_mut(id) else {
                continue;
            };
            match &mut m.phase {
                Phase::Starting {
                    deadline, instance, ..
                } if *deadline <= now => {
                    // A process that does not get ready is not asked politely.
                    let (instance, ms) = (*instance, m.policy.start_timeout_ms);
                    m.phase = Phase::Stopping {
                        instance,
                        kill_at: None,
                    };
                    effects.push(Effect::Kill(id.clone(), instance));
                    let message = format!("not ready within {} s", ms.div_ceil(1000));
                    let failure = Arc::new(Failure {
                        message,
                        log_tail: String::new(),
                    });
                    self.start_failed(now, id, failure, effects);
                }
                Phase::Starting {
                    for_restart: None, ..
                } if m.queue.is_empty() && m.policy.abandoned == Abandoned::Cancel => {
                    self.begin_stop(now, id, effects);
                }
                Phase::Stopping { instance, kill_at } if kill_at.is_some_and(|at| at <= now) => {
                    *kill_at = None;
                    effects.push(Effect::Kill(id.clone(), *instance));
                }
                Phase::Ready { .. } => {
                    let idle = m.inflight == 0 && m.queue.is_empty();
                    if idle && m.expires(now).is_some_and(|at| at <= now) {
                        self.begin_stop(now, id, effects);
                    }
                }
                _ => {}
            }
        }
        self.end_drains(now, effects);
    }

    fn expire_waiters(&mut self, now: Millis, id: &ModelId, effects: &mut Vec<Effect>) {
        self.expire_starved(now, id, effects);
        let Some(m) = self.models.get_mut(id) else { return };
        while let Some(w) = m.queue.front()
            && w.since.saturating_add(m.policy.max_wait_ms) <= now
        {
            self.requests.remove(&w.id);
            effects.push(Effect::Reject(w.id, Rejection::WaitedTooLong(now - w.since)));
            m.queue.pop_front();
            if m.queue.is_empty() {
                m.forget_passing();
            }
        }
    }

    /// Requests that have waited long enough for a start that want of memory forbids.
    fn expire_starved(&mut self, now: Millis, id: &ModelId, effects: &mut Vec<Effect>) {
        while let Some(m) = self.models.get(id)
            && !m.occupied()
            && let Some(w) = m.queue.front()
            && self.starved_until(w.since).is_some_and(|until| until <= now)
        {
            let (request, why) = (w.id, self.memory_refusal(now.saturating_sub(w.since)));
            self.requests.remove(&request);
            effects.push(Effect::Reject(request, why));
            if let Some(m) = self.models.get_mut(id) {
                m.queue.pop_front();
                if m.queue.is_empty() {
                    m.forget_passing();
                }
            }
        }
    }

    /// Stops what has drained, and cuts what has had its grace.
    fn end_drains(&mut self, now: Millis, effects: &mut Vec<Effect>) {
        let ids: Vec<ModelId> = self.models.keys().cloned().collect();
        for id in &ids {
            let Some(m) = self.models.get_mut(id) else {
                continue;
            };
            let Phase::Draining { why, instance, .. } = m.phase else {
                continue;
            };
            match why {
                _ if m.inflight == 0 => self.begin_stop(now, id, effects),
                Drain::Until(at, reason) if at <= now => {
                    m.inflight = 0;
                    let mut cut: Vec<_> = self
                        .requests
                        .iter()
                        .filter(|(_, p)| p.instance == Some(instance))
                        .map(|(r, _)| *r)
                        .collect();
                    cut.sort_unstable();
                    for request in cut {
                        self.requests.remove(&request);
                        effects.push(Effect::Cut(request, reason));
                    }
                    self.begin_stop(now, id, effects);
                }
                _ => {}
            }
        }
    }

    /// Hands waiting requests to ready processes, as far as fairness lets them.
    fn serve(&mut self, now: Millis, effects: &mut Vec<Effect>) -> bool {
        let ids: Vec<ModelId> = self.models.keys().cloned().collect();
        let mut moved = false;
        for id in &ids {
            while let Some((seq, instance)) = self.next_to_serve(now, id) {
                let Some(waiter) = self.models.get_mut(id).and_then(|m| m.queue.pop_front()) else {
                    break;
                };
                moved = true;
                if waiter.kind == Kind::Load {
                    self.requests.remove(&waiter.id);
                    effects.push(Effect::Loaded(waiter.id));
                    continue;
                }
                if let Some(m) = self.models.get_mut(id) {
                    m.inflight = m.inflight.saturating_add(1);
                    if let Phase::Ready { last_use, served, .. } = &mut m.phase {
                        (*last_use, *served) = (now, served.saturating_add(1));
                    }
                }
                self.requests.insert(
                    waiter.id,
                    Place {
                        model: id.clone(),
                        instance: Some(instance),
                    },
                );
                effects.push(Effect::Dispatch(waiter.id, id.clone(), instance));
                self.count_passed(now, id, seq);
            }
        }
        moved
    }

    /// The request that may be served next by this model's process.
    fn next_to_serve(&self, now: Millis, id: &ModelId) -> Option<(u64, Instance)> {
        let m = self.models.get(id)?;
        let Phase::Ready { instance, served, .. } = m.phase else {
            return None;
        };
        let front = m.queue.front()?;
        // What has just been loaded serves at least once, or the load was for nothing.
        let open = served == 0
            || front.kind == Kind::Load
            || !self
                .rivals(now, id)
                .any(|r| r.front_seq() < front.seq && self.due(now, r));
        open.then_some((front.seq, instance))
    }

    /// Models that want to start and would evict this one. While nothing may be started there are none.
    fn rivals(&self, now: Millis, id: &ModelId) -> impl Iterator<Item = &Model> {
        let (occupied, starved) = (self.occupied(), self.starved_since().is_some());
        self.models
            .iter()
            .filter(move |(other, m)| {
                !starved
                    && m.wants_start(now)
                    && !m.only_restarts()
                    && self.residency.evictions(other, &occupied).contains(&id)
            })
            .map(|(_, m)| m)
    }

    /// Whether this waiting model has been passed often or long enough.
    fn due(&self, now: Millis, m: &Model) -> bool {
        m.passed >= self.fairness.max_passed
            || m.passing_since
                .is_some_and(|t| now >= t.saturating_add(self.fairness.max_passing_ms))
    }

    fn count_passed(&mut self, now: Millis, id: &ModelId, seq: u64) {
        // It does not wait for this model's room.
        if self.starved_since().is_some() {
            return;
        }
        let passed: Vec<ModelId> = {
            let occupied = self.occupied();
            let passed = self.models.iter().filter(|(other, m)| {
                m.wants_start(now)
                    && !m.only_restarts()
                    && m.front_seq() < seq
                    && self.residency.evictions(other, &occupied).contains(&id)
            });
            passed.map(|(other, _)| other.clone()).collect()
        };
        for other in passed {
            if let Some(m) = self.models.get_mut(&other) {
                m.passed = m.passed.saturating_add(1);
                m.passing_since.get_or_insert(now);
            }
        }
    }

    fn occupied(&self) -> Vec<&ModelId> {
        self.models
            .iter()
            .filter(|(_, m)| m.occupied())
            .map(|(id, _)| id)
            .collect()
    }

    /// Starts what has room, and makes room for what has a right to it.
    fn make_room(&mut self, now: Millis, effects: &mut Vec<Effect>) -> bool {
        if self.shutdown.is_some() {
            return false;
        }
        if self.starved_since().is_some() {
            // Nobody can take the room that is being made: whoever drains for it serves on.
            return self.reopen(&[]);
        }
        let mut wanting: Vec<(bool, bool, i32, u64, ModelId)> = self
            .models
            .iter()
            .filter(|(_, m)| m.wants_start(now))
            .map(|(id, m)| {
                let due = self.due(now, m);
                (
                    m.only_restarts(),
                    due,
                    m.policy.priority,
                    m.front_seq(),
                    id.clone(),
                )
            })
            .collect();
        wanting.sort_by_key(|(nobody, due, priority, seq, _)| {
            // Somebody who waits comes before a mere restart. Among those that have waited too long only the order of
            // arrival counts.
            let rank = Reverse(if *due { 0 } else { *priority });
            (*nobody, Reverse(*due), rank, *seq)
        });
        let mut pending: Vec<ModelId> = Vec::new();
        let mut moved = false;
        for (nobody, due, _, _, target) in wanting {
            let occupied = self.occupied();
            // Nothing is started that an earlier one in the line would evict again.
            let yields = pending.iter().any(|p| {
                let mut with_target = occupied.clone();
                with_target.push(&target);
                self.residency.evictions(p, &with_target).contains(&&target)
            });
            if yields {
                if !nobody {
                    pending.push(target);
                }
                continue;
            }
            if self.residency.evictions(&target, &occupied).is_empty() {
                self.start(now, &target, effects);
                moved = true;
                continue;
            }
            let staying: Vec<&ModelId> = occupied.iter().filter(|id| self.stays(id)).copied().collect();
            let victims: Vec<ModelId> = self
                .residency
                .evictions(&target, &staying)
                .into_iter()
                .cloned()
                .collect();
            if nobody {
                // It does not drive anybody out: its place has been given away, or is about to be free.
                if !victims.is_empty()
                    && let Some(m) = self.models.get_mut(&target)
                {
                    m.restart = None;
                }
                continue;
            }
            pending.push(target);
            if !victims.is_empty() && victims.iter().all(|v| self.idle(now, v)) {
                for victim in &victims {
                    self.begin_stop(now, victim, effects);
                }
                moved = true;
            } else if due {
                for victim in &victims {
                    moved |= self.close(now, victim, effects);
                }
            }
        }
        moved | self.reopen(&pending)
    }

    fn start(&mut self, now: Millis, id: &ModelId, effects: &mut Vec<Effect>) {
        let instance = Instance(self.next_instance);
        self.next_instance += 1;
        let Some(m) = self.models.get_mut(id) else { return };
        m.phase = Phase::Starting {
            instance,
            deadline: now.saturating_add(m.policy.start_timeout_ms),
            for_restart: m.restart.take(),
        };
        (m.inflight, m.keep_alive) = (0, None);
        m.forget_passing();
        effects.push(Effect::Start(id.clone(), instance));
    }

    /// Whether its process is not on the way out already.
    fn stays(&self, id: &ModelId) -> bool {
        self.models
            .get(id)
            .is_some_and(|m| matches!(m.phase, Phase::Starting { .. } | Phase::Ready { .. }))
    }

    /// Whether another model may take its place right now.
    fn idle(&self, now: Millis, id: &ModelId) -> bool {
        self.models.get(id).is_some_and(|m| {
            m.queue.is_empty()
                && match m.phase {
                    Phase::Starting { .. } => true,
                    Phase::Ready { since, .. } => {
                        m.inflight == 0 && now >= since.saturating_add(m.policy.min_stay_ms)
                    }
                    _ => false,
                }
        })
    }

    /// A waiting model has the right to this one's room: nothing new is served, what is in flight goes on.
    fn close(&mut self, now: Millis, id: &ModelId, effects: &mut Vec<Effect>) -> bool {
        let Some(m) = self.models.get_mut(id) else {
            return false;
        };
        match m.phase {
            Phase::Ready { served: 0, .. } if !m.queue.is_empty() => false,
            Phase::Ready {
                instance,
                since,
                last_use,
                ..
            } => {
                m.phase = Phase::Draining {
                    instance,
                    since,
                    last_use,
                    why: Drain::Swap,
                };
                self.end_drains(now, effects);
                true
            }
            Phase::Starting { .. } if m.queue.is_empty() => {
                self.begin_stop(now, id, effects);
                true
            }
            _ => false,
        }
    }

    /// Models that drain for a swap which nobody wants any more serve again.
    fn reopen(&mut self, pending: &[ModelId]) -> bool {
        let occupied = self.occupied();
        let wanted: Vec<ModelId> = pending
            .iter()
            .flat_map(|p| self.residency.evictions(p, &occupied))
            .cloned()
            .collect();
        let mut moved = false;
        for (id, m) in &mut self.models {
            if let Phase::Draining {
                instance,
                since,
                last_use,
                why: Drain::Swap,
            } = m.phase
                && !wanted.contains(id)
            {
                m.phase = Phase::Ready {
                    instance,
                    since,
                    last_use,
                    served: 1,
                };
                moved = true;
            }
        }
        moved
    }
}

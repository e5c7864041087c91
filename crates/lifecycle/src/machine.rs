//! The reaction to each event. What follows from time and queues is in `settle`.

use std::collections::BTreeMap;
use std::sync::Arc;

use indexmap::IndexMap;

use crate::config::{Config, Fairness, MemoryPolicy};
use crate::event::{
    CutReason, Effect, Event, Failure, Instance, Kind, Millis, ModelId, Rejection, RequestId, State, Ticket,
};
use crate::memory::Memory;
use crate::model::{Drain, Model, Phase, Waiter};
use crate::residency::Residency;

/// Where a request is.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub(crate) model: ModelId,
    /// The process that serves it; `None` while it waits.
    pub(crate) instance: Option<Instance>,
}

/// An unload that is not complete.
#[derive(Clone, Debug)]
pub(crate) struct PendingUnload {
    pub(crate) ticket: Ticket,
    pub(crate) processes: Vec<(ModelId, Instance)>,
}

/// What is known of one model, for `/running`, events and metrics.
#[derive(Clone, Debug)]
pub struct ModelStatus {
    /// Its state.
    pub state: State,
    /// Its process, if there is one.
    pub instance: Option<Instance>,
    /// Requests in flight.
    pub inflight: u32,
    /// Requests that wait, explicit loads included.
    pub waiting: usize,
    /// Failures in a row.
    pub failures: u32,
    /// The last failure, until the model has been ready for a while.
    pub failure: Option<Arc<Failure>>,
    /// Milliseconds until a failed model is tried again; 0 if it may be.
    pub retry_in_ms: Millis,
    /// Milliseconds until it is unloaded, counted from now while requests are in flight; `None`: it is not going to be.
    pub expires_in_ms: Option<Millis>,
}

/// The whole house.
#[derive(Debug)]
pub struct Lifecycle {
    pub(crate) models: IndexMap<ModelId, Model>,
    pub(crate) residency: Arc<dyn Residency>,
    pub(crate) fairness: Fairness,
    /// Few, with ascending numbers: cheaper than hashing.
    pub(crate) requests: BTreeMap<RequestId, Place>,
    pub(crate) unloads: Vec<PendingUnload>,
    pub(crate) next_instance: u64,
    pub(crate) next_seq: u64,
    pub(crate) memory: Memory,
    pub(crate) memory_policy: Option<MemoryPolicy>,
    /// Set once shutting down; true when completion has been reported.
    pub(crate) shutdown: Option<bool>,
}

impl Lifecycle {
    /// A house under these rules, with every model stopped.
    #[must_use]
    pub fn new(config: Config) -> Self {
        Self {
            models: config
                .models
                .into_iter()
                .map(|(id, policy)| (id, Model::new(policy)))
                .collect(),
            residency: config.residency,
            fairness: config.fairness,
            requests: BTreeMap::new(),
            unloads: Vec::new(),
            next_instance: 0,
            next_seq: 0,
            memory: Memory::default(),
            memory_policy: config.memory,
            shutdown: None,
        }
    }

    /// Takes one event at time `now` (never smaller than before) and appends what is to be done to `effects`, in order.
    pub fn step(&mut self, now: Millis, event: Event, effects: &mut Vec<Effect>) {
        let settle = match event {
            Event::Request { id, model, kind } => self.request(now, id, &model, kind, effects),
            Event::Cancelled(id) | Event::Finished(id) => self.ended(now, id),
            Event::Progress(model, instance) => self.progress(now, &model, instance),
            Event::Ready(model, instance) => self.ready(now, &model, instance),
            Event::Exited(model, instance, failure) => self.exited(now, &model, instance, failure, effects),
            Event::Unload { model, ticket } => self.unload(now, model, ticket, effects),
            Event::KeepAlive(model, ttl_ms) => self.keep_alive(&model, ttl_ms),
            Event::Memory(reading) => self.read_memory(now, reading, effects),
            Event::Reload { config, changed } => self.reload(now, config, &changed, effects),
            Event::Shutdown { grace_ms } => self.shut_down(now, grace_ms, effects),
            Event::Tick => true,
        };
        if settle {
            self.settle(now, effects);
        }
    }

    /// State of one model, if it is configured or still has a process.
    #[must_use]
    pub fn status(&self, now: Millis, model: &str) -> Option<ModelStatus> {
        self.models.get(model).map(|m| status_of(m, now))
    }

    /// State of every model.
    pub fn statuses(&self, now: Millis) -> impl Iterator<Item = (&ModelId, ModelStatus)> {
        self.models.iter().map(move |(id, m)| (id, status_of(m, now)))
    }

    /// Returns whether the queues must be looked at.
    fn request(
        &mut self,
        now: Millis,
        id: RequestId,
        model: &ModelId,
        kind: Kind,
        effects: &mut Vec<Effect>,
    ) -> bool {
        if self.shutdown.is_some() {
            effects.push(Effect::Reject(id, Rejection::ShuttingDown));
            return false;
        }
        let nobody_waits = self
            .models
            .values()
            .all(|m| m.queue.is_empty() && m.restart.is_none());
        let backoff_wait = self.fairness.backoff_wait_ms;
        let Some(m) = self.models.get_mut(model).filter(|m| !m.removed) else {
            effects.push(Effect::Reject(id, Rejection::UnknownModel));
            return false;
        };
        if kind == Kind::Serve
            && let Some(limit) = m.policy.concurrency_limit
            && m.admitted() >= limit
        {
            effects.push(Effect::Reject(id, Rejection::ConcurrencyLimit(limit)));
            return false;
        }
        if nobody_waits
            && let Phase::Ready {
                instance,
                last_use,
                served,
                ..
            } = &mut m.phase
        {
            match kind {
                Kind::Serve => {
                    m.inflight = m.inflight.saturating_add(1);
                    (*last_use, *served) = (now, served.saturating_add(1));
                    self.requests.insert(
                        id,
                        Place {
                            model: model.clone(),
                            instance: Some(*instance),
                        },
                    );
                    effects.push(Effect::Dispatch(id, model.clone(), *instance));
                }
                Kind::Load => effects.push(Effect::Loaded(id)),
            }
            return false;
        }
        if m.queue.len() >= m.policy.queue_limit as usize {
            effects.push(Effect::Reject(id, Rejection::QueueFull(m.policy.queue_limit)));
            return false;
        }
        if kind == Kind::Load {
            // An order by a person: the past is forgiven.
            (m.failures, m.retry_at) = (0, now);
        } else if m.backing_off(now) && m.retry_at - now > backoff_wait {
            let failure = m.failure.clone().unwrap_or_else(unknown_failure);
            effects.push(Effect::Reject(id, Rejection::BackOff(failure, m.retry_at - now)));
            return false;
        }
        m.queue.push_back(Waiter {
            id,
            kind,
            seq: self.next_seq,
            since: now,
        });
        self.next_seq += 1;
        self.requests.insert(
            id,
            Place {
                model: model.clone(),
                instance: None,
            },
        );
        true
    }

    fn ended(&mut self, now: Millis, id: RequestId) -> bool {
        let Some(place) = self.requests.remove(&id) else {
            return false;
        };
        let Some(m) = self.models.get_mut(&place.model) else {
            return false;
        };
        let Some(served_by) = place.instance else {
            m.queue.retain(|w| w.id != id);
            if m.queue.is_empty() {
                m.forget_passing();
            }
            return true;
        };
        if m.instance() != Some(served_by) {
            return false;
        }
        m.inflight = m.inflight.saturating_sub(1);
        match &mut m.phase {
            Phase::Ready { last_use, .. } => {
                *last_use = now;
                // A model that is to go as soon as it is idle has no deadline that lies ahead.
                m.inflight == 0
                    && (m.ttl_ms() == Some(0)
                        || self
                            .models
                            .values()
                            .any(|m| !m.queue.is_empty() || m.restart.is_some()))
            }
            Phase::Draining { last_use, .. } => {
                *last_use = now;
                true
            }
            _ => false,
        }
    }

    fn progress(&mut self, now: Millis, model: &str, of: Instance) -> bool {
        if let Some(m) = self.models.get_mut(model)
            && let Phase::Starting {
                instance, deadline, ..
            } = &mut m.phase
            && *instance == of
        {
            *deadline = now.saturating_add(m.policy.start_timeout_ms);
        }
        false
    }

    fn ready(&mut self, now: Millis, model: &str, of: Instance) -> bool {
        match self.models.get_mut(model) {
            Some(m) if matches!(m.phase, Phase::Starting { instance, .. } if instance == of) => {
                m.phase = Phase::Ready {
                    instance: of,
                    since: now,
                    last_use: now,
                    served: 0,
                };
                true
            }
            _ => false,
        }
    }

    fn exited(
        &mut self,
        now: Millis,
        model: &ModelId,
        of: Instance,
        failure: Arc<Failure>,
        effects: &mut Vec<Effect>,
    ) -> bool {
        let fairness = self.fairness;
        let Some(m) = self.models.get_mut(model).filter(|m| m.instance() == Some(of)) else {
            return false;
        };
        let was = std::mem::replace(&mut m.phase, Phase::Stopped);
        m.inflight = 0;
        match was {
            Phase::Starting { .. } => self.start_failed(now, model, failure, effects),
            Phase::Ready { since, .. }
            | Phase::Draining {
                since,
                why: Drain::Swap,
                ..
            } => {
                // It served before it failed: tried again at once the first time, later only after a while.
                if now.saturating_sub(since) >= fairness.backoff_reset_ms {
                    m.failures = 0;
                }
                m.failures += 1;
                m.retry_at = now + backoff(&fairness, m.failures - 1);
                m.failure = Some(failure);
            }
            Phase::Draining { .. } | Phase::Stopping { .. } | Phase::Stopped => {}
        }
        true
    }

    /// The process of a starting model has failed: everyone who waited is told, the next try comes later.
    pub(crate) fn start_failed(
        &mut self,
        now: Millis,
        model: &ModelId,
        failure: Arc<Failure>,
        effects: &mut Vec<Effect>,
    ) {
        let fairness = self.fairness;
        let Some(m) = self.models.get_mut(model) else {
            return;
        };
        m.failures += 1;
        m.retry_at = now + backoff(&fairness, m.failures);
        m.failure = Some(failure.clone());
        self.reject_waiting(model, &Rejection::StartFailed(failure), effects);
    }

    fn unload(
        &mut self,
        now: Millis,
        model: Option<ModelId>,
        ticket: Ticket,
        effects: &mut Vec<Effect>,
    ) -> bool {
        let ids: Vec<ModelId> = match model {
            Some(id) => vec![id],
            None => self.models.keys().cloned().collect(),
        };
        let mut processes = Vec::new();
        for id in ids {
            self.reject_waiting(&id, &Rejection::Unloaded, effects);
            let Some(m) = self.models.get_mut(&id) else {
                continue;
            };
            m.restart = None;
            processes.extend(m.instance().map(|i| (id.clone(), i)));
            let until = now.saturating_add(m.policy.drain_grace_ms);
            self.send_away(now, &id, Drain::Until(until, CutReason::Unloaded), effects);
        }
        self.unloads.push(PendingUnload { ticket, processes });
        true
    }

    fn keep_alive(&mut self, model: &str, ttl_ms: Option<Millis>) -> bool {
        match self.models.get_mut(model) {
            Some(m) if matches!(m.phase, Phase::Ready { .. }) => {
                m.keep_alive = Some(ttl_ms);
                true
            }
            _ => false,
        }
    }

    fn reload(
        &mut self,
        now: Millis,
        config: Config,
        changed: &[ModelId],
        effects: &mut Vec<Effect>,
    ) -> bool {
        let old: Vec<ModelId> = self.models.keys().cloned().collect();
        for id in old.iter().filter(|id| !config.models.contains_key(*id)) {
            self.reject_waiting(id, &Rejection::Removed, effects);
            if let Some(m) = self.models.get_mut(id) {
                (m.removed, m.restart) = (true, None);
            }
            self.send_away(now, id, Drain::Replace, effects);
        }
        for (id, policy) in config.models {
            let m = self
                .models
                .entry(id)
                .or_insert_with(|| Model::new(policy.clone()));
            (m.policy, m.removed) = (policy, false);
        }
        self.residency = config.residency;
        self.fairness = config.fairness;
        self.set_memory_policy(config.memory);
        for id in changed {
            let seq = self.next_seq;
            let Some(m) = self.models.get_mut(id).filter(|m| !m.removed) else {
                continue;
            };
            (m.failures, m.failure, m.retry_at) = (0, None, now);
            match m.phase {
                Phase::Ready { .. } => {
                    m.restart = Some(seq);
                    self.next_seq += 1;
                }
                // Edited again while it comes back: it still has to.
                Phase::Starting { for_restart, .. } => m.restart = for_restart,
                _ => {}
            }
            self.send_away(now, id, Drain::Replace, effects);
        }
        true
    }

    fn shut_down(&mut self, now: Millis, grace_ms: Millis, effects: &mut Vec<Effect>) -> bool {
        let again = self.shutdown.is_some();
        self.shutdown.get_or_insert(false);
        let ids: Vec<ModelId> = self.models.keys().cloned().collect();
        for id in ids {
            self.reject_waiting(&id, &Rejection::ShuttingDown, effects);
            if let Some(m) = self.models.get_mut(&id) {
                m.restart = None;
            }
            let until = now.saturating_add(grace_ms);
            self.send_away(now, &id, Drain::Until(until, CutReason::ShuttingDown), effects);
            // Ordered again: whoever has been asked to end already is not waited for any longer than this.
            if again
                && let Some(m) = self.models.get_mut(&id)
                && let Phase::Stopping {
                    kill_at: Some(at), ..
                } = &mut m.phase
            {
                *at = until.min(*at);
            }
        }
        true
    }

    /// The process must go: at once if it does not serve yet, else after what is in flight.
    pub(crate) fn send_away(&mut self, now: Millis, id: &ModelId, why: Drain, effects: &mut Vec<Effect>) {
        let Some(m) = self.models.get_mut(id) else { return };
        match &mut m.phase {
            Phase::Starting { .. } => self.begin_stop(now, id, effects),
            Phase::Ready {
                instance,
                since,
                last_use,
                ..
            } => {
                m.phase = Phase::Draining {
                    instance: *instance,
                    since: *since,
                    last_use: *last_use,
                    why,
                };
            }
            Phase::Draining { why: present, .. } => match (*present, why) {
                // The earlier of two deadlines holds, and a drain with a deadline never loses it.
                (Drain::Until(a, _), Drain::Until(b, _)) if a <= b => {}
                (Drain::Until(..), Drain::Replace | Drain::Swap) => {}
                _ => *present = why,
            },
            Phase::Stopped | Phase::Stopping { .. } => {}
        }
    }

    pub(crate) fn begin_stop(&mut self, now: Millis, id: &ModelId, effects: &mut Vec<Effect>) {
        let Some(m) = self.models.get_mut(id) else { return };
        if let Some(instance) = m.instance() {
            let kill_at = now.saturating_add(m.policy.stop_grace_ms);
            m.phase = Phase::Stopping {
                instance,
                kill_at: Some(kill_at),
            };
            effects.push(Effect::Stop(id.clone(), instance));
        }
    }

    pub(crate) fn reject_waiting(&mut self, id: &ModelId, why: &Rejection, effects: &mut Vec<Effect>) {
        let Some(m) = self.models.get_mut(id) else { return };
        for waiter in m.queue.drain(..) {
            self.requests.remove(&waiter.id);
            effects.push(Effect::Reject(waiter.id, why.clone()));
        }
        m.forget_passing();
    }
}

fn status_of(m: &Model, now: Millis) -> ModelStatus {
    ModelStatus {
        state: m.state(now),
        instance: m.instance(),
        inflight: m.inflight,
        waiting: m.queue.len(),
        failures: m.failures,
        failure: m.failure.clone(),
        retry_in_ms: if m.backing_off(now) { m.retry_at - now } else { 0 },
        expires_in_ms: m.expires(now).map(|at| at.saturating_sub(now)),
    }
}

/// Delay before try number `failures + 1`: nothing after none, then the base, doubled each time.
fn backoff(f: &Fairness, failures: u32) -> Millis {
    match failures {
        0 => 0,
        n => f
            .backoff_base_ms
            .saturating_mul(1 << (n - 1).min(20))
            .min(f.backoff_max_ms),
    }
}

fn unknown_failure() -> Arc<Failure> {
    Arc::new(Failure {
        message: "the model's process failed".into(),
        log_tail: String::new(),
    })
}

//! A shadow world that plays processes and clients, and holds the lifecycle to its promises at every step.
#![allow(
    dead_code,
    missing_docs,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

pub mod given;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use lifecycle::{
    Config, CutReason, Effect, Event, Failure, Instance, Kind, Lifecycle, MemoryLevel, MemoryReading,
    ModelId, Policy, Rejection, RequestId, State, Ticket,
};

use self::given::*;

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Asked {
    No,
    Stop,
    Kill,
}

/// What really exists, as told by the effects and by the world's own doings.
pub struct World {
    pub core: Lifecycle,
    pub config: Config,
    pub now: u64,
    pub next: u64,
    pub waiting: BTreeMap<RequestId, (ModelId, u64)>,
    pub running: BTreeMap<RequestId, (ModelId, Instance)>,
    /// Living processes, and whether they are ready and have been asked to end.
    pub processes: BTreeMap<Instance, (ModelId, bool, Asked)>,
    pub tickets: BTreeSet<u64>,
    pub over: bool,
    /// Requests dispatched past each waiting one, by models that it must evict.
    pub passed: BTreeMap<RequestId, u32>,
    /// Since the last reload the rules of eviction have been the same.
    pub reloaded: bool,
    /// The last reading. Since when memory has been at warning or worse, and critical; and since when readings say less.
    pub level: MemoryLevel,
    pub warned: (Option<u64>, Option<u64>),
    pub critical: (Option<u64>, Option<u64>),
    /// Memory has been critical: who waits then waits for memory, not for its turn.
    pub starved: bool,
    /// Cuts for want of memory that have been announced.
    pub sent_away: BTreeSet<ModelId>,
}

impl World {
    pub fn new(config: Config) -> Self {
        Self {
            core: Lifecycle::new(config.clone()),
            config,
            now: 1_000,
            next: 0,
            waiting: BTreeMap::new(),
            running: BTreeMap::new(),
            processes: BTreeMap::new(),
            tickets: BTreeSet::new(),
            over: false,
            passed: BTreeMap::new(),
            reloaded: false,
            level: MemoryLevel::Normal,
            warned: (None, None),
            critical: (None, None),
            starved: false,
            sent_away: BTreeSet::new(),
        }
    }

    pub fn fresh(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    pub fn step(&mut self, event: Event) {
        let mut effects = Vec::new();
        self.core.step(self.now, event, &mut effects);
        for effect in effects {
            self.apply(effect);
        }
        for (request, (model, since)) in &self.waiting {
            let limit = self
                .config
                .models
                .get(model)
                .expect("a waiting request has a model")
                .max_wait_ms;
            assert!(
                self.now < since + limit,
                "{request:?} of {model} waits since {since} at {}",
                self.now
            );
        }
    }

    pub fn apply(&mut self, effect: Effect) {
        match effect {
            Effect::Start(model, instance) => {
                let critical = self.config.memory.is_some() && self.level == MemoryLevel::Critical;
                assert!(!critical, "{model} started without memory");
                let living: Vec<&ModelId> = self.processes.values().map(|(m, _, _)| m).collect();
                assert!(!living.contains(&&model), "second process of {model}");
                let evict = self.config.residency.evictions(&model, &living);
                assert!(evict.is_empty(), "{model} started beside {evict:?}");
                assert!(
                    self.config.models.contains_key(&model),
                    "{model} is not configured"
                );
                assert!(
                    self.processes
                        .insert(instance, (model, false, Asked::No))
                        .is_none()
                );
            }
            Effect::Stop(model, instance) => {
                let cut = self.running.values().any(|(_, i)| *i == instance);
                assert!(!cut, "{model} stopped with requests in flight");
                let p = self
                    .processes
                    .get_mut(&instance)
                    .expect("stop of a living process");
                assert_eq!((&p.0, p.2), (&model, Asked::No));
                p.2 = Asked::Stop;
            }
            Effect::Kill(model, instance) => {
                let p = self
                    .processes
                    .get_mut(&instance)
                    .expect("kill of a living process");
                assert_eq!(p.0, model);
                assert_ne!(p.2, Asked::Kill, "killed twice");
                p.2 = Asked::Kill;
            }
            Effect::Dispatch(request, model, instance) => {
                let (wanted, _) = self
                    .waiting
                    .remove(&request)
                    .expect("dispatch of a waiting request");
                assert_eq!(wanted, model);
                let p = self
                    .processes
                    .get(&instance)
                    .expect("dispatch to a living process");
                assert_eq!(
                    (&p.0, p.1, p.2),
                    (&model, true, Asked::No),
                    "ready, and not asked to end"
                );
                self.running.insert(request, (model.clone(), instance));
                self.passed.remove(&request);
                let living: Vec<&ModelId> = self.processes.values().map(|(m, _, _)| m).collect();
                for (other, (wants, _)) in self.waiting.range(..request) {
                    let conflict = self.config.residency.evictions(wants, &living).contains(&&model);
                    let failing = self.core.status(self.now, wants).is_some_and(|s| s.failures > 0);
                    if conflict && !failing && !living.contains(&wants) {
                        *self.passed.entry(*other).or_default() += 1;
                    }
                }
            }
            Effect::Loaded(request) => {
                let (model, _) = self
                    .waiting
                    .remove(&request)
                    .expect("answer to a waiting request");
                assert!(self.processes.values().any(|(m, ready, _)| *m == model && *ready));
            }
            Effect::Evicted(model, reading) => {
                let policy = self.config.memory.expect("a policy");
                assert_eq!(reading.level, self.level);
                let held = |since: Option<u64>, ms: u64| since.is_some_and(|t| self.now - t >= ms);
                let busy = self.running.values().any(|(m, _)| *m == model)
                    || self.waiting.values().any(|(m, _)| *m == model);
                if busy || self.processes.values().any(|(m, ready, _)| *m == model && !ready) {
                    let limit = policy.cut_after_ms.expect("cuts are allowed");
                    assert!(held(self.critical.0, limit), "{model} has requests");
                    self.sent_away.insert(model);
                } else if self.level < MemoryLevel::Critical {
                    assert!(
                        held(self.warned.0, policy.warning_hold_ms),
                        "{model} unloaded too soon"
                    );
                }
            }
            Effect::Reject(request, why) => {
                if matches!(why, Rejection::Memory { .. }) {
                    assert!(self.starved, "refused for want of memory that was never critical");
                }
                self.waiting
                    .remove(&request)
                    .expect("refusal of a waiting request");
                self.passed.remove(&request);
            }
            Effect::Cut(request, why) => {
                let model = self.running.get(&request).map(|(m, _)| m.clone());
                if why == CutReason::Memory {
                    assert!(model.is_some_and(|m| self.sent_away.contains(&m)));
                }
                self.running.remove(&request).expect("cut of a running request");
            }
            Effect::Unloaded(Ticket(t)) => assert!(self.tickets.remove(&t), "unload reported twice"),
            Effect::State(model, state) => {
                let living = self.processes.values().any(|(m, _, _)| *m == model);
                assert_eq!(
                    living,
                    !matches!(state, State::Stopped | State::BackOff),
                    "{model} {state:?}"
                );
            }
            Effect::ShutdownComplete => {
                assert!(self.processes.is_empty() && !self.over);
                self.over = true;
            }
        }
    }

    pub fn read_memory(&mut self, level: MemoryLevel) {
        let now = self.now;
        self.level = level;
        // A level ends when readings have been lower for a while, not with the first one.
        let recover = self.config.memory.map_or(0, |m| m.recover_ms);
        let episode = |(since, lower): (Option<u64>, Option<u64>), least: MemoryLevel| {
            if level >= least {
                return (since.or(Some(now)), None);
            }
            let lower = lower.unwrap_or(now);
            if now - lower >= recover {
                (None, None)
            } else {
                (since, Some(lower))
            }
        };
        self.warned = episode(self.warned, MemoryLevel::Warning);
        self.critical = episode(self.critical, MemoryLevel::Critical);
        self.starved |= level == MemoryLevel::Critical;
        self.step(Event::Memory(MemoryReading {
            level,
            ..MemoryReading::default()
        }));
    }

    /// A model that is to go as soon as it is idle is not ready and idle.
    pub fn assert_gone_when_idle(&self, model: &ModelId) {
        if let Some(s) = self.core.status(self.now, model) {
            assert!(
                s.state != State::Ready || s.inflight > 0 || s.waiting > 0,
                "{model} stays: {s:?}"
            );
        }
    }

    /// Lets time pass, with a tick at every deadline on the way.
    pub fn pass(&mut self, ms: u64) {
        let end = self.now + ms;
        while let Some(at) = self.core.deadline(self.now).filter(|at| *at <= end) {
            assert!(at > self.now);
            self.now = at;
            self.step(Event::Tick);
        }
        self.now = end;
    }

    pub fn exit(&mut self, instance: Instance) {
        let (model, _, _) = self.processes.remove(&instance).unwrap();
        self.step(Event::Exited(
            model,
            instance,
            Arc::new(Failure {
                message: "x".into(),
                log_tail: String::new(),
            }),
        ));
        // Whoever was served by it notices.
        let broken: Vec<RequestId> = self
            .running
            .iter()
            .filter(|(_, (_, i))| *i == instance)
            .map(|(r, _)| *r)
            .collect();
        for request in broken {
            self.running.remove(&request);
            self.step(Event::Finished(request));
        }
    }

    pub fn op(&mut self, op: Op) {
        let nth = |n: usize, len: usize| (len > 0).then(|| n % len.max(1));
        match op {
            Op::Request(m, load) => {
                let request = RequestId(self.fresh());
                let known = self.config.models.contains_key(&id(m));
                if known {
                    self.waiting.insert(request, (id(m), self.now));
                    let kind = if load { Kind::Load } else { Kind::Serve };
                    self.step(Event::Request {
                        id: request,
                        model: id(m),
                        kind,
                    });
                }
            }
            Op::Cancel(n) => {
                if let Some(i) = nth(n, self.waiting.len()) {
                    let request = *self.waiting.keys().nth(i).unwrap();
                    self.waiting.remove(&request);
                    self.passed.remove(&request);
                    self.step(Event::Cancelled(request));
                }
            }
            Op::Finish(n) => {
                if let Some(i) = nth(n, self.running.len()) {
                    let request = *self.running.keys().nth(i).unwrap();
                    self.running.remove(&request);
                    self.step(Event::Finished(request));
                }
            }
            Op::Ready(n) | Op::Progress(n) => {
                let starting: Vec<_> = self
                    .processes
                    .iter()
                    .filter(|(_, p)| !p.1)
                    .map(|(i, _)| *i)
                    .collect();
                if let Some(i) = nth(n, starting.len()) {
                    let p = self.processes.get_mut(&starting[i]).unwrap();
                    let model = p.0.clone();
                    if matches!(op, Op::Progress(_)) {
                        self.step(Event::Progress(model, starting[i]));
                    } else {
                        p.1 = true;
                        self.step(Event::Ready(model, starting[i]));
                    }
                }
            }
            Op::Exit(n) => {
                // Mostly those that were asked to; any process may crash.
                let asked: Vec<_> = self
                    .processes
                    .iter()
                    .filter(|(_, p)| p.2 != Asked::No || n % 5 == 0)
                    .map(|(i, _)| *i)
                    .collect();
                if let Some(i) = nth(n, asked.len()) {
                    self.exit(asked[i]);
                }
            }
            Op::Unload(m) => {
                let ticket = self.fresh();
                self.tickets.insert(ticket);
                self.step(Event::Unload {
                    model: m.map(id),
                    ticket: Ticket(ticket),
                });
            }
            Op::KeepAlive(m, ttl_ms) => {
                self.step(Event::KeepAlive(id(m), ttl_ms));
                if ttl_ms == Some(0) {
                    self.assert_gone_when_idle(&id(m));
                }
            }
            Op::Memory(level) => self.read_memory(level),
            Op::Reload(changed, kept) => {
                let mut config = self.config.clone();
                config.models = kept.iter().map(|i| (id(*i), Policy::default())).collect();
                let gone: Vec<ModelId> = self
                    .config
                    .models
                    .keys()
                    .filter(|m| !config.models.contains_key(*m))
                    .cloned()
                    .collect();
                let refused: Vec<RequestId> = self
                    .waiting
                    .iter()
                    .filter(|(_, (m, _))| gone.contains(m))
                    .map(|(r, _)| *r)
                    .collect();
                self.config.models.extend(config.models.clone());
                self.reloaded = true;
                self.step(Event::Reload {
                    config: config.clone(),
                    changed: changed.into_iter().map(id).collect(),
                });
                assert!(
                    refused.iter().all(|r| !self.waiting.contains_key(r)),
                    "waiters of removed models are told"
                );
                self.config = config;
            }
            Op::Pass(ms) => self.pass(ms),
        }
        if !self.reloaded && !self.starved {
            // Each load serves at least one; beyond that the bound holds.
            let bound = self.config.fairness.max_passed + NAMES.len() as u32;
            assert!(
                self.passed.values().all(|n| *n <= bound),
                "starved: {:?}",
                self.passed
            );
        }
    }

    /// Everyone does their part: processes get ready and end when asked, requests end. All must be answered.
    pub fn quiesce(&mut self) {
        self.read_memory(MemoryLevel::Normal);
        self.pass(self.config.memory.map_or(0, |m| m.recover_ms));
        self.read_memory(MemoryLevel::Normal);
        for _ in 0..2_000 {
            let asked: Vec<_> = self
                .processes
                .iter()
                .filter(|(_, p)| p.2 != Asked::No)
                .map(|(i, _)| *i)
                .collect();
            for instance in asked {
                self.exit(instance);
            }
            self.op(Op::Ready(0));
            self.op(Op::Finish(0));
            if self.waiting.is_empty() && self.running.is_empty() && self.tickets.is_empty() {
                return;
            }
            if let Some(at) = self.core.deadline(self.now).filter(|_| self.running.is_empty()) {
                self.pass(at.min(self.now + 1_000) - self.now);
            }
        }
        panic!(
            "never quiet: waiting {:?}, running {:?}, core {:#?}",
            self.waiting, self.running, self.core
        );
    }
}

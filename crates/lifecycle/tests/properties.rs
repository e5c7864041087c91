//! Promises of the lifecycle over random event orders, checked against a shadow world that plays processes and clients.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use lifecycle::{
    Abandoned, Config, CutReason, Effect, Event, Failure, Fairness, Instance, Kind, Lifecycle, MemoryLevel,
    MemoryPolicy, MemoryReading, ModelId, OneAtATime, Policy, Rejection, RequestId, Residency, State, Ticket,
};
use proptest::prelude::*;

const NAMES: [&str; 4] = ["a", "b", "c", "d"];

fn id(i: usize) -> ModelId {
    NAMES[i].into()
}

#[derive(Clone, Debug)]
enum Op {
    Request(usize, bool),
    Cancel(usize),
    Finish(usize),
    Ready(usize),
    Progress(usize),
    Exit(usize),
    Unload(Option<usize>),
    KeepAlive(usize, Option<u64>),
    Memory(MemoryLevel),
    Reload(Vec<usize>, Vec<usize>),
    Pass(u64),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        12 => (0..4_usize, prop::bool::weighted(0.1)).prop_map(|(m, l)| Op::Request(m, l)),
        2 => any::<usize>().prop_map(Op::Cancel),
        8 => any::<usize>().prop_map(Op::Finish),
        8 => any::<usize>().prop_map(Op::Ready),
        1 => any::<usize>().prop_map(Op::Progress),
        6 => any::<usize>().prop_map(Op::Exit),
        1 => prop::option::of(0..4_usize).prop_map(Op::Unload),
        1 => (0..4_usize, prop::option::of(prop_oneof![Just(0), 0..30_000_u64])).prop_map(|(m, t)| Op::KeepAlive(m, t)),
        1 => (prop::collection::vec(0..4_usize, 0..3), prop::collection::vec(0..4_usize, 2..5))
            .prop_map(|(changed, kept)| Op::Reload(changed, kept)),
        3 => prop_oneof![Just(MemoryLevel::Normal), Just(MemoryLevel::Warning), Just(MemoryLevel::Critical)]
            .prop_map(Op::Memory),
        6 => prop_oneof![0..50_u64, 0..2_000_u64, 0..40_000_u64].prop_map(Op::Pass),
    ]
}

fn policy() -> impl Strategy<Value = Policy> {
    (
        prop::option::of(1..6_u32),
        prop::option::of(1..20_000_u64),
        (1..30_u32, 1_000..200_000_u64, 0..3_i32),
        (0..5_000_u64, 0..3_000_u64, 100..60_000_u64, 0..3_000_u64),
        any::<bool>(),
    )
        .prop_map(
            |(limit, ttl, (queue, wait, priority), (drain, stop, start, stay), cancel)| Policy {
                concurrency_limit: limit,
                queue_limit: queue,
                max_wait_ms: wait,
                ttl_ms: ttl,
                drain_grace_ms: drain,
                stop_grace_ms: stop,
                start_timeout_ms: start,
                priority,
                min_stay_ms: stay,
                abandoned: if cancel {
                    Abandoned::Cancel
                } else {
                    Abandoned::Keep
                },
            },
        )
}

/// Groups by number: members of one group take turns if it swaps; an exclusive one evicts the others.
#[derive(Debug)]
struct ByGroup {
    of: [usize; 4],
    swap: [bool; 3],
    exclusive: [bool; 3],
    persistent: [bool; 3],
}

impl Residency for ByGroup {
    fn evictions<'a>(&self, target: &ModelId, running: &[&'a ModelId]) -> Vec<&'a ModelId> {
        let group = |m: &ModelId| self.of[NAMES.iter().position(|n| *n == &**m).unwrap()];
        let own = group(target);
        let goes = |m: &&&ModelId| match group(m) {
            g if g == own => self.swap[g] && **m != target,
            g => self.exclusive[own] && !self.persistent[g],
        };
        if running.contains(&target) {
            vec![]
        } else {
            running.iter().filter(goes).copied().collect()
        }
    }
}

/// Allowed sets as bits; the one that keeps the most is chosen.
#[derive(Debug)]
struct BySet(Vec<u8>);

impl Residency for BySet {
    fn evictions<'a>(&self, target: &ModelId, running: &[&'a ModelId]) -> Vec<&'a ModelId> {
        let bit = |m: &ModelId| 1_u8 << NAMES.iter().position(|n| *n == &**m).unwrap();
        let runs: u8 = running.iter().map(|m| bit(m)).sum();
        if runs & bit(target) != 0 {
            return vec![];
        }
        let fitting = self.0.iter().filter(|s| **s & bit(target) != 0);
        let kept = fitting
            .max_by_key(|s| (**s & runs).count_ones())
            .copied()
            .unwrap_or(0);
        running.iter().filter(|m| bit(m) & kept == 0).copied().collect()
    }
}

fn residency() -> impl Strategy<Value = Arc<dyn Residency>> {
    let flags = || any::<[bool; 3]>();
    let groups = (prop::array::uniform4(0..3_usize), flags(), flags(), flags()).prop_map(
        |(of, swap, exclusive, persistent)| -> Arc<dyn Residency> {
            Arc::new(ByGroup {
                of,
                swap,
                exclusive,
                persistent,
            })
        },
    );
    let sets =
        prop::collection::vec(0..16_u8, 1..4).prop_map(|s| -> Arc<dyn Residency> { Arc::new(BySet(s)) });
    let one: Arc<dyn Residency> = Arc::new(OneAtATime);
    prop_oneof![2 => Just(one), 2 => groups, 1 => sets]
}

fn memory() -> impl Strategy<Value = Option<MemoryPolicy>> {
    let policy = (
        0..20_000_u64,
        0..5_000_u64,
        1..10_000_u64,
        0..20_000_u64,
        prop::option::of(0..40_000_u64),
    )
        .prop_map(
            |(warning_hold_ms, evict_gap_ms, recover_ms, max_wait_ms, cut_after_ms)| MemoryPolicy {
                warning_hold_ms,
                evict_gap_ms,
                recover_ms,
                max_wait_ms,
                cut_after_ms,
            },
        );
    prop::option::weighted(0.7, policy)
}

fn config() -> impl Strategy<Value = Config> {
    (prop::collection::vec(policy(), 4), residency(), memory()).prop_map(|(policies, residency, memory)| {
        Config {
            memory,
            models: policies
                .into_iter()
                .enumerate()
                .map(|(i, p)| (id(i), p))
                .collect(),
            residency,
            fairness: Fairness::default(),
        }
    })
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Asked {
    No,
    Stop,
    Kill,
}

/// What really exists, as told by the effects and by the world's own doings.
struct World {
    core: Lifecycle,
    config: Config,
    now: u64,
    next: u64,
    waiting: BTreeMap<RequestId, (ModelId, u64)>,
    running: BTreeMap<RequestId, (ModelId, Instance)>,
    /// Living processes, and whether they are ready and have been asked to end.
    processes: BTreeMap<Instance, (ModelId, bool, Asked)>,
    tickets: BTreeSet<u64>,
    over: bool,
    /// Requests dispatched past each waiting one, by models that it must evict.
    passed: BTreeMap<RequestId, u32>,
    /// Since the last reload the rules of eviction have been the same.
    reloaded: bool,
    /// The last reading. Since when memory has been at warning or worse, and critical; and since when readings say less.
    level: MemoryLevel,
    warned: (Option<u64>, Option<u64>),
    critical: (Option<u64>, Option<u64>),
    /// Memory has been critical: who waits then waits for memory, not for its turn.
    starved: bool,
    /// Cuts for want of memory that have been announced.
    sent_away: BTreeSet<ModelId>,
}

impl World {
    fn new(config: Config) -> Self {
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

    fn fresh(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn step(&mut self, event: Event) {
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

    fn apply(&mut self, effect: Effect) {
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

    fn read_memory(&mut self, level: MemoryLevel) {
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
    fn assert_gone_when_idle(&self, model: &ModelId) {
        if let Some(s) = self.core.status(self.now, model) {
            assert!(
                s.state != State::Ready || s.inflight > 0 || s.waiting > 0,
                "{model} stays: {s:?}"
            );
        }
    }

    /// Lets time pass, with a tick at every deadline on the way.
    fn pass(&mut self, ms: u64) {
        let end = self.now + ms;
        while let Some(at) = self.core.deadline(self.now).filter(|at| *at <= end) {
            assert!(at > self.now);
            self.now = at;
            self.step(Event::Tick);
        }
        self.now = end;
    }

    fn exit(&mut self, instance: Instance) {
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

    fn op(&mut self, op: Op) {
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
    fn quiesce(&mut self) {
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

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn promises_hold(config in config(), ops in prop::collection::vec(op(), 1..150)) {
        let mut world = World::new(config);
        for op in ops {
            world.op(op);
        }
        world.quiesce();
    }

    #[test]
    fn shutdown_leaves_nothing(config in config(), ops in prop::collection::vec(op(), 1..60), grace in 0..5_000_u64) {
        let mut world = World::new(config);
        for op in ops {
            world.op(op);
        }
        world.step(Event::Shutdown { grace_ms: grace });
        prop_assert!(world.waiting.is_empty(), "waiters are told at once");
        world.pass(grace);
        prop_assert!(world.running.is_empty(), "the grace is over");
        for _ in 0..50 {
            let asked: Vec<_> = world.processes.keys().copied().collect();
            for instance in asked {
                world.exit(instance);
            }
        }
        prop_assert!(world.over);
        let late = RequestId(world.fresh());
        world.waiting.insert(late, (id(0), world.now));
        world.config.models.entry(id(0)).or_default();
        world.step(Event::Request { id: late, model: id(0), kind: Kind::Serve });
        prop_assert!(world.waiting.is_empty());
    }
}

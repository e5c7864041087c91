//! What the world is given: random rules, and what happens.

use std::sync::Arc;

use lifecycle::{
    Abandoned, Config, Fairness, MemoryLevel, MemoryPolicy, ModelId, OneAtATime, Policy, Residency,
};
use proptest::prelude::*;

pub const NAMES: [&str; 4] = ["a", "b", "c", "d"];

pub fn id(i: usize) -> ModelId {
    NAMES[i].into()
}

#[derive(Clone, Debug)]
pub enum Op {
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

pub fn op() -> impl Strategy<Value = Op> {
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

pub fn policy() -> impl Strategy<Value = Policy> {
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
pub struct ByGroup {
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
pub struct BySet(Vec<u8>);

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

pub fn residency() -> impl Strategy<Value = Arc<dyn Residency>> {
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

pub fn memory() -> impl Strategy<Value = Option<MemoryPolicy>> {
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

pub fn config() -> impl Strategy<Value = Config> {
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

//! Want of memory, in named situations.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::sync::Arc;

use common::{House, config, name};
use lifecycle::{
    CutReason, Effect, Event, Instance, Lifecycle, MemoryLevel, MemoryPolicy, MemoryReading, ModelId, Policy,
    Rejection, RequestId, State,
};

struct Side;

/// Everything may be in memory together.
impl lifecycle::Residency for Side {
    fn evictions<'a>(&self, _: &ModelId, _: &[&'a ModelId]) -> Vec<&'a ModelId> {
        Vec::new()
    }
}

impl std::fmt::Debug for Side {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Side")
    }
}

fn side_by_side(models: &[&str], memory: MemoryPolicy) -> House {
    let mut config = config(models, &Policy::default());
    config.residency = Arc::new(Side);
    config.memory = Some(memory);
    House {
        core: Lifecycle::new(config),
        now: 0,
        next: 0,
    }
}

fn read(h: &mut House, level: MemoryLevel) -> Vec<Effect> {
    h.step(Event::Memory(MemoryReading {
        level,
        available_bytes: 5,
        ..MemoryReading::default()
    }))
}

#[test]
fn a_lasting_warning_unloads_idle_models_one_at_a_time() {
    let mut h = side_by_side(&["a", "b", "c"], MemoryPolicy::default());
    for (at, model) in [(1_000, "b"), (2_000, "a"), (3_000, "c")] {
        h.now = at;
        let request = h.serving(model);
        if model != "c" {
            let _ = h.step(Event::Finished(request));
        }
    }
    let stops = |effects: &[Effect]| -> Vec<String> {
        let stop = effects.iter().filter_map(|e| match e {
            Effect::Stop(m, _) => Some(m.to_string()),
            _ => None,
        });
        stop.collect()
    };
    h.now = 10_000;
    assert!(read(&mut h, MemoryLevel::Warning).is_empty());
    // A moment without a warning does not begin it anew.
    h.now = 20_000;
    assert!(read(&mut h, MemoryLevel::Normal).is_empty());
    h.now = 25_000;
    assert!(read(&mut h, MemoryLevel::Warning).is_empty());
    h.now = 40_000;
    let effects = read(&mut h, MemoryLevel::Warning);
    assert_eq!(stops(&effects), ["b"], "the least recently used");
    assert!(matches!(&effects[0], Effect::Evicted(m, r) if &**m == "b" && r.available_bytes == 5));
    h.now = 46_000;
    assert!(
        read(&mut h, MemoryLevel::Warning).is_empty(),
        "b has not given its memory back"
    );
    let _ = h.exit("b");
    assert_eq!(stops(&read(&mut h, MemoryLevel::Warning)), ["a"]);
    let _ = h.exit("a");
    h.now = 500_000;
    assert!(
        read(&mut h, MemoryLevel::Warning).is_empty(),
        "c has a request in flight"
    );
    // A warning forbids no start.
    assert!(matches!(h.request("a").1.as_slice(), [Effect::Start(..)]));
}

#[test]
fn nothing_is_started_while_memory_is_critical() {
    let mut h = side_by_side(&["a", "b"], MemoryPolicy::default());
    let running = h.serving("a");
    assert!(read(&mut h, MemoryLevel::Critical).is_empty(), "a is busy");
    let (waiting, effects) = h.request("b");
    assert!(effects.is_empty());
    // What is ready serves on.
    assert!(matches!(h.request("a").1.as_slice(), [Effect::Dispatch(..)]));
    assert_eq!(h.core.deadline(0), Some(10_000));
    let refused = h.tick_at(10_000);
    let [
        Effect::Reject(
            id,
            Rejection::Memory {
                reading,
                waited_ms,
                retry_ms,
            },
        ),
    ] = refused.as_slice()
    else {
        panic!("{refused:?}")
    };
    assert_eq!(
        (*id, reading.available_bytes, *waited_ms, *retry_ms),
        (waiting, 5, 10_000, 10_000)
    );
    // Better, but for how long?
    assert!(read(&mut h, MemoryLevel::Normal).is_empty());
    let (_, effects) = h.request("b");
    assert!(effects.is_empty());
    h.now = 20_000;
    assert!(matches!(
        read(&mut h, MemoryLevel::Normal).as_slice(),
        [Effect::Reject(..)] | [Effect::Start(..)]
    ));
    let _ = h.request("b");
    assert_eq!(h.state("b"), State::Starting);
    // Idle, it would go at once.
    let _ = h.step(Event::Finished(running));
    let _ = h.step(Event::Finished(RequestId(3)));
    let effects = read(&mut h, MemoryLevel::Critical);
    assert!(
        matches!(effects.as_slice(), [Effect::Evicted(m, _), Effect::Stop(..)] if &**m == "a"),
        "{effects:?}"
    );
}

#[test]
fn requests_are_cut_only_when_memory_has_been_critical_for_long() {
    let mut h = side_by_side(&["a"], MemoryPolicy::default());
    let running = h.serving("a");
    for at in (0..60_000).step_by(2_000) {
        h.now = at;
        assert!(read(&mut h, MemoryLevel::Critical).is_empty(), "{at}");
    }
    h.now = 60_000;
    assert!(matches!(
        read(&mut h, MemoryLevel::Critical).as_slice(),
        [Effect::Evicted(..)]
    ));
    assert_eq!(h.state("a"), State::Draining);
    let effects = h.tick_at(70_000);
    assert_eq!(
        effects,
        [
            Effect::Cut(running, CutReason::Memory),
            Effect::Stop(name("a"), Instance(0))
        ]
    );
    // Never, where that is the rule.
    let never = MemoryPolicy {
        cut_after_ms: None,
        ..MemoryPolicy::default()
    };
    let mut h = side_by_side(&["a"], never);
    h.serving("a");
    for at in [0, 60_000, 6_000_000] {
        h.now = at;
        assert!(read(&mut h, MemoryLevel::Critical).is_empty());
    }
}

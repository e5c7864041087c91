//! Named situations, each with what must come of it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::sync::Arc;

use common::{House, config, failure, name};
use lifecycle::{
    Config, CutReason, Effect, Event, Instance, Kind, ModelId, Policy, Rejection, RequestId, State, Ticket,
};
use proptest::prelude::*;

proptest! {
    /// llama-swap: steady traffic on one model starved another for ever.
    #[test]
    fn steady_traffic_does_not_starve(gap_ms in 0..5_000_u64, overlap in 1..4_usize) {
        let mut h = House::new(&["a", "b"], &Policy::default());
        let mut running = vec![h.serving("a")];
        let asked = h.now;
        let (waiting, effects) = h.request("b");
        prop_assert!(effects.is_empty());
        let mut passed = 0;
        while h.state("a") == State::Ready {
            h.now += gap_ms;
            let _ = h.step(Event::Tick);
            let (request, effects) = h.request("a");
            if effects.contains(&Effect::Dispatch(request, name("a"), Instance(0))) {
                running.push(request);
                passed += 1;
            }
            // Never idle: the next request is there before the last one ends.
            while running.len() > overlap {
                let done = running.remove(0);
                let _ = h.step(Event::Finished(done));
            }
            prop_assert!(passed <= 16);
            prop_assert!(h.now <= asked + 30_000 + 2 * gap_ms.max(1));
        }
        let mut effects = Vec::new();
        for request in running {
            prop_assert!(!effects.contains(&Effect::Stop(name("a"), Instance(0))), "cut in flight");
            effects = h.step(Event::Finished(request));
        }
        prop_assert_eq!(effects, [Effect::Stop(name("a"), Instance(0))]);
        prop_assert_eq!(h.exit("a"), [Effect::Start(name("b"), Instance(1))]);
        prop_assert_eq!(&h.ready("b")[..1], [Effect::Dispatch(waiting, name("b"), Instance(1))]);
    }
}

#[test]
fn requests_of_one_model_are_served_together() {
    let mut h = House::new(&["a", "b"], &Policy::default());
    let first = h.serving("a");
    let (b1, _) = h.request("b");
    let (b2, _) = h.request("b");
    assert_eq!(
        h.step(Event::Finished(first)),
        [Effect::Stop(name("a"), Instance(0))]
    );
    let (a2, _) = h.request("a");
    let (b3, _) = h.request("b");
    h.exit("a");
    let served: Vec<_> = [b1, b2, b3]
        .map(|r| Effect::Dispatch(r, name("b"), Instance(1)))
        .into();
    assert_eq!(h.ready("b"), served);
    for r in [b1, b2, b3] {
        h.step(Event::Finished(r));
    }
    assert_eq!(h.exit("b"), [Effect::Start(name("a"), Instance(2))]);
    assert_eq!(h.ready("a"), [Effect::Dispatch(a2, name("a"), Instance(2))]);
}

#[test]
fn many_requests_one_start() {
    let mut h = House::new(&["a"], &Policy::default());
    let starts = (0..20)
        .flat_map(|_| h.request("a").1)
        .filter(|e| matches!(e, Effect::Start(..)))
        .count();
    assert_eq!(starts, 1);
    assert_eq!(h.ready("a").len(), 20);
}

#[test]
fn concurrency_limit_counts_running_and_waiting() {
    let mut h = House::new(
        &["a"],
        &Policy {
            concurrency_limit: Some(2),
            ..Policy::default()
        },
    );
    h.serving("a");
    h.request("a");
    let (third, effects) = h.request("a");
    assert_eq!(effects, [Effect::Reject(third, Rejection::ConcurrencyLimit(2))]);
}

/// llama-swap: a model that never served was unloaded a second after it was ready.
#[test]
fn an_ordered_idle_time_holds_until_the_process_ends() {
    let policy = Policy {
        ttl_ms: Some(5_000),
        ..Policy::default()
    };
    let mut h = House::new(&["a"], &policy);
    // Nothing to keep yet.
    assert!(h.step(Event::KeepAlive("a".into(), Some(0))).is_empty());
    let request = h.serving("a");
    assert!(h.step(Event::KeepAlive("a".into(), None)).is_empty());
    assert_eq!(h.core.status(h.now, "a").unwrap().expires_in_ms, None);
    let _ = h.step(Event::Finished(request));
    assert!(h.tick_at(1_000_000).is_empty(), "for ever");
    // Zero ends it, but cuts nothing.
    let (second, _) = h.request("a");
    assert!(h.step(Event::KeepAlive("a".into(), Some(0))).is_empty());
    assert_eq!(
        h.step(Event::Finished(second)),
        [Effect::Stop("a".into(), Instance(0))]
    );
    let _ = h.exit("a");
    // The next process has the policy's again.
    let third = h.serving("a");
    let _ = h.step(Event::Finished(third));
    assert_eq!(h.core.status(h.now, "a").unwrap().expires_in_ms, Some(5_000));
    // Idle already, it goes at once.
    assert_eq!(
        h.step(Event::KeepAlive("a".into(), Some(0))),
        [Effect::Stop("a".into(), Instance(1))]
    );
}

#[test]
fn ttl_counts_from_ready_and_from_last_use() {
    let mut h = House::new(
        &["a"],
        &Policy {
            ttl_ms: Some(5_000),
            ..Policy::default()
        },
    );
    let (left, _) = h.request("a");
    h.step(Event::Cancelled(left));
    h.now = 60_000;
    assert!(h.ready("a").is_empty());
    assert_eq!(h.core.deadline(h.now), Some(65_000));
    assert!(h.tick_at(64_999).is_empty());
    let (used, _) = h.request("a");
    h.now = 100_000;
    assert!(h.step(Event::Tick).is_empty(), "in use");
    h.step(Event::Finished(used));
    assert!(h.tick_at(104_999).is_empty());
    assert_eq!(h.tick_at(105_000), [Effect::Stop(name("a"), Instance(0))]);
    assert_eq!(h.tick_at(115_000), [Effect::Kill(name("a"), Instance(0))]);
    assert!(h.exit("a").is_empty());
    assert_eq!(h.core.deadline(h.now), None);
}

#[test]
fn unload_drains_then_cuts() {
    let mut h = House::new(
        &["a"],
        &Policy {
            drain_grace_ms: 3_000,
            ..Policy::default()
        },
    );
    let cut = h.serving("a");
    assert!(
        h.step(Event::Unload {
            model: Some(name("a")),
            ticket: Ticket(1)
        })
        .is_empty()
    );
    let (late, effects) = h.request("a");
    assert!(effects.is_empty(), "waits for the next process");
    let expected = [
        Effect::Cut(cut, CutReason::Unloaded),
        Effect::Stop(name("a"), Instance(0)),
    ];
    assert_eq!(h.tick_at(3_000), expected);
    assert_eq!(
        h.exit("a"),
        [Effect::Start(name("a"), Instance(1)), Effect::Unloaded(Ticket(1))]
    );
    assert_eq!(h.ready("a"), [Effect::Dispatch(late, name("a"), Instance(1))]);
}

#[test]
fn unload_refuses_those_who_wait_and_reports_when_nothing_runs() {
    let mut h = House::new(&["a"], &Policy::default());
    assert_eq!(
        h.step(Event::Unload {
            model: None,
            ticket: Ticket(1)
        }),
        [Effect::Unloaded(Ticket(1))]
    );
    let (waits, _) = h.request("a");
    let effects = h.step(Event::Unload {
        model: None,
        ticket: Ticket(2),
    });
    assert_eq!(
        effects,
        [
            Effect::Reject(waits, Rejection::Unloaded),
            Effect::Stop(name("a"), Instance(0))
        ]
    );
    assert_eq!(h.exit("a"), [Effect::Unloaded(Ticket(2))]);
}

#[test]
fn failed_start_tells_everyone_and_backs_off() {
    let mut h = House::new(&["a"], &Policy::default());
    let (one, _) = h.request("a");
    let (two, _) = h.request("a");
    let told = |r| Effect::Reject(r, Rejection::StartFailed(failure("exit status 1")));
    assert_eq!(h.exit("a"), [told(one), told(two)]);
    assert_eq!(h.state("a"), State::BackOff);
    let (three, effects) = h.request("a");
    assert!(effects.is_empty(), "1 s is waited for");
    assert_eq!(h.core.deadline(h.now), Some(1_000));
    assert_eq!(h.tick_at(1_000), [Effect::Start(name("a"), Instance(1))]);
    assert_eq!(h.exit("a"), [told(three)]);
    h.tick_at(3_000);
    h.request("a");
    h.exit("a");
    let (four, effects) = h.request("a");
    assert_eq!(
        effects,
        [Effect::Reject(
            four,
            Rejection::BackOff(failure("exit status 1"), 4_000)
        )]
    );
    // A person's order is obeyed at once.
    let load = Event::Request {
        id: RequestId(99),
        model: name("a"),
        kind: Kind::Load,
    };
    assert_eq!(h.step(load), [Effect::Start(name("a"), Instance(3))]);
    assert_eq!(h.ready("a"), [Effect::Loaded(RequestId(99))]);
}

#[test]
fn a_crash_in_service_is_tried_again_at_once_then_later() {
    let mut h = House::new(&["a"], &Policy::default());
    h.serving("a");
    h.exit("a");
    assert_eq!(h.request("a").1, [Effect::Start(name("a"), Instance(1))]);
    h.ready("a");
    h.exit("a");
    assert_eq!(h.state("a"), State::BackOff);
    h.tick_at(1_000);
    h.request("a");
    h.ready("a");
    h.now += 60_000;
    h.exit("a");
    assert_eq!(h.state("a"), State::Stopped, "a minute of service redeems");
}

#[test]
fn start_timeout_kills_unless_there_is_progress() {
    let mut h = House::new(
        &["a"],
        &Policy {
            start_timeout_ms: 15_000,
            ..Policy::default()
        },
    );
    let (waits, _) = h.request("a");
    h.now = 10_000;
    let instance = h.instance("a");
    h.step(Event::Progress(name("a"), instance));
    assert!(h.tick_at(24_999).is_empty());
    let effects = h.tick_at(25_000);
    assert_eq!(effects[0], Effect::Kill(name("a"), instance));
    assert!(matches!(&effects[1], Effect::Reject(r, Rejection::StartFailed(_)) if *r == waits));
}

#[test]
fn an_abandoned_load_is_kept_until_its_room_is_wanted() {
    let mut h = House::new(&["a", "b"], &Policy::default());
    let (gone, _) = h.request("a");
    assert!(h.step(Event::Cancelled(gone)).is_empty());
    assert_eq!(h.state("a"), State::Starting);
    assert_eq!(h.request("b").1, [Effect::Stop(name("a"), Instance(0))]);
    assert_eq!(h.exit("a"), [Effect::Start(name("b"), Instance(1))]);
}

#[test]
fn a_swap_that_nobody_wants_any_more_is_taken_back() {
    let mut h = House::new(&["a", "b"], &Policy::default());
    h.serving("a");
    let (b, _) = h.request("b");
    for _ in 0..16 {
        h.request("a");
    }
    assert_eq!(h.state("a"), State::Draining);
    let (a, effects) = h.request("a");
    assert!(effects.is_empty());
    assert_eq!(
        h.step(Event::Cancelled(b)),
        [Effect::Dispatch(a, name("a"), Instance(0))]
    );
    assert_eq!(h.state("a"), State::Ready);
}

#[test]
fn reload_touches_only_what_changed() {
    let mut h = House::new(&["a"], &Policy::default());
    let a = h.serving("a");
    let same = config(
        &["a", "new"],
        &Policy {
            ttl_ms: Some(9),
            ..Policy::default()
        },
    );
    assert!(
        h.step(Event::Reload {
            config: same.clone(),
            changed: vec![]
        })
        .is_empty()
    );
    assert!(
        h.step(Event::Reload {
            config: same,
            changed: vec![name("a")]
        })
        .is_empty(),
        "drains first"
    );
    assert_eq!(h.state("a"), State::Draining);
    assert_eq!(h.step(Event::Finished(a)), [Effect::Stop(name("a"), Instance(0))]);
    assert_eq!(
        h.exit("a"),
        [Effect::Start(name("a"), Instance(1))],
        "it was ready: it comes back"
    );
    h.ready("a");
    assert_eq!(
        h.step(Event::Reload {
            config: config(&["new"], &Policy::default()),
            changed: vec![]
        }),
        [Effect::Stop(name("a"), Instance(1))]
    );
    let (r, effects) = h.request("a");
    assert_eq!(effects, [Effect::Reject(r, Rejection::UnknownModel)]);
    h.exit("a");
    assert!(h.core.status(h.now, "a").is_none());
}

#[test]
fn minimum_stay_holds_off_a_swap() {
    let mut h = House::new(
        &["a", "b"],
        &Policy {
            min_stay_ms: 4_000,
            ..Policy::default()
        },
    );
    let a = h.serving("a");
    h.step(Event::Finished(a));
    assert!(h.request("b").1.is_empty());
    assert_eq!(h.core.deadline(h.now), Some(4_000));
    assert_eq!(h.tick_at(4_000), [Effect::Stop(name("a"), Instance(0))]);
}

/// Everybody may be resident beside everybody.
#[derive(Debug)]
struct Together;

impl lifecycle::Residency for Together {
    fn evictions<'a>(&self, _: &ModelId, _: &[&'a ModelId]) -> Vec<&'a ModelId> {
        Vec::new()
    }
}

fn together(models: &[&str]) -> Config {
    let policy = Policy {
        abandoned: lifecycle::Abandoned::Cancel,
        ..Policy::default()
    };
    Config {
        residency: Arc::new(Together),
        ..config(models, &policy)
    }
}

fn edit(config: Config, changed: &[&str]) -> Event {
    Event::Reload {
        config,
        changed: changed.iter().map(|m| name(m)).collect(),
    }
}

/// A restart is nobody's load and still no abandoned one.
#[test]
fn restarts_after_an_edit_do_not_cancel_each_other() {
    let mut h = House::new(&[], &Policy::default());
    h.step(edit(together(&["a", "b"]), &[]));
    for model in ["a", "b"] {
        let request = h.serving(model);
        h.step(Event::Finished(request));
    }
    assert_eq!(
        h.step(edit(together(&["a", "b"]), &["a", "b"])).len(),
        2,
        "both stop"
    );
    assert_eq!(h.exit("a"), [Effect::Start(name("a"), Instance(2))]);
    assert_eq!(h.exit("b"), [Effect::Start(name("b"), Instance(3))]);
    assert!(h.ready("a").is_empty() && h.ready("b").is_empty());
    assert_eq!((h.state("a"), h.state("b")), (State::Ready, State::Ready));
}

#[test]
fn a_second_edit_during_the_restart_does_not_lose_it() {
    let mut h = House::new(&[], &Policy::default());
    h.step(edit(together(&["a"]), &[]));
    let request = h.serving("a");
    h.step(Event::Finished(request));
    for instance in [1, 2, 3] {
        h.step(edit(together(&["a"]), &["a"]));
        assert_eq!(h.exit("a"), [Effect::Start(name("a"), Instance(instance))]);
    }
    // A load that somebody asked for and left is still cancelled under this policy.
    h.ready("a");
    h.step(edit(together(&["a", "b"]), &[]));
    let (gone, _) = h.request("b");
    assert_eq!(
        h.step(Event::Cancelled(gone)),
        [Effect::Stop(name("b"), Instance(4))]
    );
}

/// Whoever waits comes first, and a model that nobody waits for drives nobody out.
#[test]
fn a_restart_yields_to_those_who_wait() {
    let mut h = House::new(&["a", "b"], &Policy::default());
    let a = h.serving("a");
    h.step(edit(config(&["a", "b"], &Policy::default()), &["a"]));
    let (b, _) = h.request("b");
    assert_eq!(h.step(Event::Finished(a)), [Effect::Stop(name("a"), Instance(0))]);
    assert_eq!(h.exit("a"), [Effect::Start(name("b"), Instance(1))]);
    assert_eq!(h.ready("b"), [Effect::Dispatch(b, name("b"), Instance(1))]);
    assert!(h.step(Event::Finished(b)).is_empty(), "b stays");
    assert!(h.tick_at(100_000).is_empty());
    assert_eq!(h.state("b"), State::Ready);
}

#[test]
fn a_second_shutdown_kills_what_was_asked_to_end() {
    let mut h = House::new(&["a"], &Policy::default());
    let a = h.serving("a");
    h.step(Event::Finished(a));
    let shutdown = |grace_ms| Event::Shutdown { grace_ms };
    assert_eq!(h.step(shutdown(5_000)), [Effect::Stop(name("a"), Instance(0))]);
    h.now = 1_000;
    assert_eq!(h.step(shutdown(0)), [Effect::Kill(name("a"), Instance(0))]);
    assert_eq!(h.exit("a"), [Effect::ShutdownComplete]);
}

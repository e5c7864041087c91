//! Promises of the lifecycle over random event orders, checked against a shadow world that plays processes and clients.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod world;

use lifecycle::{Event, Kind, RequestId};
use proptest::prelude::*;
use world::World;
use world::given::{config, id, op};

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

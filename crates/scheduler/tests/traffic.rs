//! Random traffic through a simulated engine; the simulator (`sim`) checks every rule at every step.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

mod sim;

use std::collections::BTreeMap;
use std::time::Duration;

use kv_cache::{CacheConfig, Token};
use proptest::prelude::*;
use scheduler::Config;
use sim::{Engine, Job, alone};

#[derive(Clone, Debug)]
enum Op {
    /// One request of so many choices.
    Submit(Job, usize),
    /// The nth of those that are here.
    Cancel(usize),
    /// The nth of those in flight.
    Fail(usize),
    Step,
    /// The oldest unread step.
    Read,
    Wait(u64),
    Clear,
}

/// Prompts out of few pieces, so that they begin, go on and end alike.
fn prompt() -> impl Strategy<Value = Vec<Token>> {
    let piece = prop_oneof![
        Just(vec![1, 2, 1, 2, 0]),
        Just(vec![2, 1, 0]),
        Just(vec![0; 7]),
        prop::collection::vec(0u32..3, 1..4),
    ];
    prop_oneof![
        8 => prop::collection::vec(piece, 1..5).prop_map(|pieces| pieces.concat()),
        // One conversation that goes on and on.
        4 => (1usize..40).prop_map(|length| (0u32..).map(|n| n * n / 3 % 3).take(length).collect()),
        1 => Just(vec![]),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    let choices = prop_oneof![3 => Just(1), 1 => 2usize..5];
    let job = (prompt(), 0usize..14, 1usize..14, choices).prop_map(|(prompt, max_new, stops_after, n)| {
        let job = Job {
            prompt,
            max_new,
            stops_after,
        };
        Op::Submit(job, n)
    });
    prop_oneof![
        6 => job,
        1 => any::<usize>().prop_map(Op::Cancel),
        1 => any::<usize>().prop_map(Op::Fail),
        12 => Just(Op::Step),
        9 => Just(Op::Read),
        1 => (0u64..30).prop_map(Op::Wait),
        1 => Just(Op::Clear),
    ]
}

fn config() -> impl Strategy<Value = Config> {
    let cache = (1usize..30, 1usize..6, 0usize..8, 1usize..3, 0u32..8);
    let limits = (
        20usize..60,
        1usize..6,
        1usize..24,
        1u64..900,
        any::<bool>(),
        0u64..40,
    );
    (cache, limits).prop_map(
        |(
            (total_blocks, block_size, share, min_tail, cached),
            (context, running, chunk, budget, compact_decodes, wait),
        )| {
            Config {
                cache: CacheConfig {
                    total_blocks,
                    generation_share: share,
                    prefix_cache: cached > 0,
                    min_tail,
                    ..CacheConfig::for_pool(1, 1, block_size)
                },
                context_length: context,
                max_running: running,
                prefill_chunk: chunk,
                step_budget: budget,
                compact_decodes,
                max_wait: (wait < 30).then(|| Duration::from_secs(wait)),
            }
        },
    )
}

/// Gives how often someone was preempted, and how many expired.
fn run(config: Config, ops: Vec<Op>, ahead: usize, decodes_first: bool) -> (usize, usize) {
    let context_length = config.context_length;
    let mut engine = Engine::new(config, decodes_first);
    let mut jobs = BTreeMap::new();
    for op in ops {
        match op {
            Op::Submit(job, n) => {
                let ids = engine.submit(&job, n);
                jobs.extend(ids.into_iter().map(|id| (id, job.clone())));
            }
            Op::Cancel(n) => {
                let here = engine.here();
                if let Some(&id) = here.get(n % here.len().max(1)) {
                    engine.cancel(id);
                }
            }
            Op::Fail(n) => engine.fail(n),
            Op::Step => {
                while engine.unread_steps() > ahead {
                    engine.read();
                }
                engine.step();
            }
            Op::Read => engine.read(),
            Op::Wait(seconds) => engine.now += Duration::from_secs(seconds),
            Op::Clear => {
                engine.scheduler.clear_cache();
                engine.check();
            }
        }
    }
    let steps = engine.drain(ahead);
    assert!(steps < 10_000, "{steps} steps");
    engine.check_empty();
    for (id, generated) in &engine.finished {
        assert_eq!(*generated, alone(&jobs[id], context_length), "{id}");
    }
    (engine.preempted, engine.expired)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn every_request_finishes_reads_its_own_tokens_and_nobody_starves(
        config in config(),
        ops in prop::collection::vec(op(), 1..120),
        ahead in 0usize..3,
        decodes_first in any::<bool>(),
    ) {
        run(config, ops, ahead, decodes_first);
    }
}

/// The property above would say little if its traffic never ran the pool dry, one step ahead.
#[test]
fn a_small_pool_preempts_and_everyone_still_finishes() {
    let config = Config {
        cache: CacheConfig {
            total_blocks: 7,
            generation_share: 1,
            ..CacheConfig::for_pool(1, 1, 4)
        },
        context_length: 100,
        max_running: 4,
        prefill_chunk: 8,
        step_budget: 1000,
        compact_decodes: true,
        max_wait: None,
    };
    for ahead in 0..3 {
        for decodes_first in [false, true] {
            let jobs = (0..4).map(|first| {
                let job = Job {
                    prompt: vec![first, 1, 2, 0, 1],
                    max_new: 11,
                    stops_after: 11,
                };
                Op::Submit(job, 1)
            });
            let (preempted, _) = run(config.clone(), jobs.collect(), ahead, decodes_first);
            assert!(preempted >= 2, "{preempted} at {ahead} ahead");
        }
    }
}

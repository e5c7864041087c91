//! What planning costs the engine thread per step, at long contexts: `cargo bench -p scheduler`.
//!
//! Eight sequences of 32k tokens each decode in every step, alone and beside a ninth that is prefilled; once in a pool
//! with room, once in one that is full of cached prefixes, where new sequences evict and move blocks.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::print_stdout)]

use std::time::{Duration, Instant};

use kv_cache::{CacheConfig, SeqId, Token};
use scheduler::{Config, NewRequest, Plan, Scheduler};

const CONTEXT: usize = 32_768;

struct Bench {
    scheduler: Scheduler,
    unread: Vec<SeqId>,
    names: u64,
}

impl Bench {
    fn new(pool_tokens: usize) -> Self {
        let scheduler = Scheduler::new(Config {
            // 96 KiB a token: Qwen3-30B-A3B.
            cache: CacheConfig::for_pool(pool_tokens as u64 * 98_304, 98_304, 16),
            context_length: 2 * CONTEXT,
            max_running: 9,
            prefill_chunk: 512,
            step_budget: u64::MAX,
            compact_decodes: true,
            max_wait: None,
        });
        Self {
            scheduler: scheduler.unwrap(),
            unread: Vec::new(),
            names: 0,
        }
    }

    fn submit(&mut self, prompt_tokens: usize, max_new_tokens: usize) -> SeqId {
        let id = SeqId(self.names);
        self.names += 1;
        let first = id.0 as Token * 100_000;
        let request = NewRequest {
            id,
            group: id,
            prompt: (first..first + prompt_tokens as Token).collect(),
            max_new_tokens,
            now: Duration::ZERO,
        };
        self.scheduler.submit(request).unwrap();
        id
    }

    /// One step ahead, as the engine does it. Gives how long the scheduler took.
    fn step(&mut self) -> (Plan, Duration) {
        let start = Instant::now();
        let plan = self.scheduler.plan(Duration::ZERO);
        let mut took = start.elapsed();
        let drawn = plan.prefill.iter().filter(|part| part.last).map(|part| part.id);
        let drawn = drawn.chain(plan.decode.iter().map(|decode| decode.id)).collect();
        let read = std::mem::replace(&mut self.unread, drawn);
        let start = Instant::now();
        for id in read {
            self.scheduler.token(id, 7);
        }
        took += start.elapsed();
        (plan, took)
    }

    fn measure(&mut self, name: &str, steps: usize, wanted: impl Fn(&Plan) -> bool) {
        let mut times: Vec<Duration> = (0..steps)
            .map(|_| {
                let (plan, took) = self.step();
                assert!(
                    wanted(&plan),
                    "{name}: {} {}",
                    plan.prefill.len(),
                    plan.decode.len()
                );
                took
            })
            .collect();
        times.sort_unstable();
        let micros = |time: Duration| time.as_secs_f64() * 1e6;
        println!(
            "{name:<60} median {:>7.1} µs, 99 % {:>7.1} µs, most {:>7.1} µs",
            micros(times[steps / 2]),
            micros(times[steps * 99 / 100]),
            micros(times[steps - 1]),
        );
    }

    fn run_dry(&mut self) {
        while !self.step().0.prefill.is_empty() {}
    }
}

/// A small model has a pool of very many blocks.
fn short_prompts() {
    let mut bench = Bench::new(4 << 20);
    let mut times = Vec::new();
    for _ in 0..300 {
        let id = bench.submit(200, 20);
        times.push(bench.step().1);
        bench.step();
        bench.scheduler.finish(id);
    }
    times.sort_unstable();
    println!(
        "admission and prefill of 200 tokens, 262,144 blocks: median {:.1} µs",
        times[150].as_secs_f64() * 1e6
    );
}

fn main() {
    short_prompts();
    let pool = 12 * CONTEXT;
    for full in [false, true] {
        let state = if full { "a full pool" } else { "a roomy pool" };
        let mut bench = Bench::new(pool);
        if full {
            // Prefixes of all sizes.
            let mut size = 1;
            for _ in 0..400 {
                size = size * 7919 % 5003 + 1;
                let id = bench.submit(size, 20);
                bench.run_dry();
                bench.scheduler.finish(id);
            }
            assert!(bench.scheduler.counters().evicted_blocks > 0);
        }
        for _ in 0..8 {
            bench.submit(CONTEXT, 20_000);
        }
        bench.run_dry();
        let name = format!("8 decode at 32k, {state}");
        bench.measure(&name, 2000, |plan| {
            plan.decode.len() == 8 && plan.prefill.is_empty()
        });
        let moved = bench.scheduler.counters().moved_blocks;
        let start = Instant::now();
        bench.submit(CONTEXT, 20);
        bench.step();
        println!(
            "  admission of 32k tokens and their first chunk: {:.0} µs, {} blocks moved",
            start.elapsed().as_secs_f64() * 1e6,
            bench.scheduler.counters().moved_blocks - moved
        );
        let name = format!("8 decode at 32k and 512 tokens of a prompt, {state}");
        bench.measure(&name, 60, |plan| {
            plan.decode.len() == 8 && plan.prefill.len() == 1
        });
        let runs: Vec<usize> = (bench.names - 9..bench.names)
            .map(|id| kv_cache::runs(bench.scheduler.table(SeqId(id))).count())
            .collect();
        println!("  runs of neighbouring blocks of each of the nine: {runs:?}");
    }
}

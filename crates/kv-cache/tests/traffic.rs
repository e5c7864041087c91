//! Random traffic through a whole engine but for the model: every position of every block holds a fingerprint of all
//! tokens before it, so that reading a wrong, stale or overwritten block cannot go unseen.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

use std::collections::{BTreeMap, HashMap};

use kv_cache::{Admission, CacheConfig, CopyBlock, KvCache, Preempted, Request, Reuse, SeqId, Token};
use proptest::prelude::*;

/// The slabs. A fingerprint is the number of a distinct chain of tokens: equal if and only if the chains are.
struct Memory {
    slots: Vec<Vec<Option<usize>>>,
    chains: HashMap<(usize, Token), usize>,
}

impl Memory {
    fn fingerprint(&mut self, chain: &[Token]) -> usize {
        chain.iter().fold(0, |before, &token| {
            let next = self.chains.len() + 1;
            *self.chains.entry((before, token)).or_insert(next)
        })
    }

    fn copy(&mut self, copy: CopyBlock) {
        assert_ne!(copy.from, copy.to);
        let source = self.slots[copy.from.0 as usize][..copy.tokens].to_vec();
        self.slots[copy.to.0 as usize].fill(None);
        self.slots[copy.to.0 as usize][..copy.tokens].copy_from_slice(&source);
    }
}

#[derive(Clone, Debug)]
struct Job {
    prompt: Vec<Token>,
    max_new: usize,
    /// How many tokens it generates before it stops, at most `max_new`.
    stops_after: usize,
    arrives: usize,
    /// Steps after its admission at which its client goes away.
    cancelled_after: Option<usize>,
    snapshot_at: usize,
}

#[derive(Clone, Debug)]
struct Sequence {
    job: usize,
    tokens: Vec<Token>,
    /// Positions written.
    done: usize,
    recorded: usize,
    /// Tokens known when it was admitted: to be prefilled.
    known: usize,
    age: usize,
}

struct Engine {
    cache: KvCache<Vec<Token>>,
    memory: Memory,
    jobs: Vec<Job>,
    chunk: usize,
    max_running: usize,
    most_moved: usize,
    running: BTreeMap<SeqId, Sequence>,
    waiting: Vec<Sequence>,
    names: u64,
    finished: usize,
    preempted: usize,
}

impl Engine {
    fn arrival(&self, sequence: &Sequence) -> (usize, usize) {
        (self.jobs[sequence.job].arrives, sequence.job)
    }

    fn rank(&self, sequence: &Sequence) -> u64 {
        let (arrives, job) = self.arrival(sequence);
        (arrives * self.jobs.len() + job) as u64
    }

    /// Every running sequence reads, at each of its positions, what belongs there.
    fn verify(&mut self) {
        for (&id, sequence) in &self.running {
            let table = self.cache.table(id).unwrap();
            let block_size = self.cache.config().block_size;
            for position in 0..sequence.done {
                let wanted = self.memory.fingerprint(&sequence.tokens[..=position]);
                let block = table[position / block_size];
                assert_eq!(
                    self.memory.slots[block.0 as usize][position % block_size],
                    Some(wanted),
                    "sequence {id} at {position}"
                );
            }
        }
        self.cache.audit().unwrap();
        let usage = self.cache.usage();
        assert!(usage.running_bytes + usage.cached_bytes <= usage.total_bytes);
        assert!(usage.snapshot_bytes <= self.cache.config().snapshot_bytes);
    }

    fn admit(&mut self) {
        loop {
            let ranks: Vec<_> = self.waiting.iter().map(|sequence| self.rank(sequence)).collect();
            let Some(head) = (0..ranks.len()).min_by_key(|&n| ranks[n]) else {
                return;
            };
            if self
                .running
                .values()
                .any(|sequence| self.rank(sequence) > ranks[head])
            {
                panic!("a junior runs while a senior waits");
            }
            if self.running.len() >= self.max_running {
                return;
            }
            let mut sequence = self.waiting[head].clone();
            let job = self.jobs[sequence.job].clone();
            let id = SeqId(self.names);
            let request = Request {
                id,
                arrival: ranks[head],
                prompt: &sequence.tokens,
                max_new_tokens: job.prompt.len() + job.max_new - sequence.tokens.len(),
            };
            let promised = self.cache.usage().promised_blocks;
            let peeked = self.cache.peek(&sequence.tokens);
            let admitted = match self.cache.admit(&request).unwrap() {
                Admission::Admit(admitted) => admitted,
                Admission::Wait(shortage) => {
                    assert!(shortage.needed_blocks > shortage.available_blocks);
                    assert!(!self.running.is_empty(), "waits in an idle engine");
                    return;
                }
                Admission::Never(_) => panic!("was found to fit"),
            };
            self.names += 1;
            self.waiting.swap_remove(head);
            assert_eq!(admitted.cached_tokens, peeked);
            assert!(admitted.cached_tokens < sequence.tokens.len());
            assert!(self.cache.usage().promised_blocks <= promised + admitted.blocks);
            for &copy in &admitted.copies {
                self.memory.copy(copy);
            }
            for copy in self.cache.compact(id, self.most_moved).unwrap() {
                self.memory.copy(copy);
            }
            if self.cache.config().reuse == Reuse::Snapshots {
                let state = admitted.snapshot.unwrap_or_default();
                assert_eq!(state, sequence.tokens[..admitted.cached_tokens]);
            }
            sequence.done = admitted.cached_tokens;
            sequence.recorded = admitted.cached_tokens;
            sequence.known = sequence.tokens.len();
            self.running.insert(id, sequence);
            self.verify();
        }
    }

    fn requeue(&mut self, preempted: Preempted) {
        let sequence = self.running.remove(&preempted.id).unwrap();
        assert_eq!(preempted.recorded_tokens, sequence.recorded);
        assert_eq!(preempted.arrival, self.rank(&sequence));
        self.preempted += 1;
        self.waiting.push(sequence);
    }

    /// One step of one sequence. False if it is gone.
    fn advance(&mut self, id: SeqId, stepped: &[SeqId]) -> bool {
        let sequence = self.running.get_mut(&id).unwrap();
        if sequence.done < sequence.known {
            let skipped = self
                .cache
                .skip_cached(id, &sequence.tokens[sequence.done..sequence.known])
                .unwrap();
            sequence.done += skipped;
            sequence.recorded += skipped;
            assert!(sequence.done < sequence.known);
        }
        let prefill = sequence.done < sequence.known;
        let count = if prefill {
            self.chunk.min(sequence.known - sequence.done)
        } else {
            1
        };
        let promised_tokens = {
            let job = &self.jobs[sequence.job];
            sequence.done + count <= sequence.known + self.cache.config().generation_share.min(job.max_new)
        };
        for preempted in self.cache.make_room(id, count).unwrap() {
            assert!(
                !stepped.contains(&preempted.id),
                "a senior, already in this step, was preempted"
            );
            assert!(!promised_tokens, "these tokens were promised their blocks");
            self.requeue(preempted);
        }
        let Some(sequence) = self.running.get_mut(&id) else {
            return false;
        };
        if !prefill {
            let moved = self.cache.stay_compact(id, self.most_moved).unwrap();
            assert!(moved.len() <= self.most_moved);
            moved.into_iter().for_each(|copy| self.memory.copy(copy));
        }
        let extension = self.cache.extend(id, count).unwrap();
        let mut position = sequence.done;
        for (block, offset) in extension.slots() {
            let fingerprint = self.memory.fingerprint(&sequence.tokens[..=position]);
            self.memory.slots[block.0 as usize][offset] = Some(fingerprint);
            position += 1;
        }
        assert_eq!(position, sequence.done + count);
        // A prefill is recorded at once; a decoded token only when the next step has been built.
        let record_to = if prefill { position } else { sequence.done };
        self.cache
            .record(id, &sequence.tokens[sequence.recorded..record_to])
            .unwrap();
        sequence.recorded = record_to;
        sequence.done = position;
        let job = &self.jobs[sequence.job];
        if (1..=sequence.done).contains(&job.snapshot_at) {
            let state = sequence.tokens[..job.snapshot_at].to_vec();
            self.cache
                .snapshot(id, job.snapshot_at, state.len() as u64, state)
                .unwrap();
        }
        true
    }

    /// What the model would say next.
    fn sample(sequence: &mut Sequence) {
        if sequence.done == sequence.tokens.len() {
            let sum: u32 = sequence.tokens.iter().sum();
            sequence.tokens.push(sum % 3);
        }
    }

    fn step(&mut self, now: usize) {
        for job in 0..self.jobs.len() {
            if self.jobs[job].arrives == now {
                let prompt = self.jobs[job].prompt.clone();
                self.waiting.push(Sequence {
                    job,
                    known: prompt.len(),
                    tokens: prompt,
                    done: 0,
                    recorded: 0,
                    age: 0,
                });
            }
        }
        self.admit();
        let order: Vec<SeqId> = self.cache.by_seniority().collect();
        let mut stepped = Vec::new();
        for id in order {
            if self.running.contains_key(&id) && self.advance(id, &stepped) {
                stepped.push(id);
            }
            self.verify();
        }
        let ids: Vec<SeqId> = self.running.keys().copied().collect();
        for id in ids {
            let sequence = self.running.get_mut(&id).unwrap();
            if sequence.done >= sequence.known {
                Self::sample(sequence);
            }
            sequence.age += 1;
            let job = &self.jobs[sequence.job];
            let generated = sequence.tokens.len() - job.prompt.len();
            let cancelled = job.cancelled_after.is_some_and(|steps| sequence.age >= steps);
            if generated >= job.stops_after || cancelled {
                self.finished += 1;
                self.running.remove(&id);
                self.cache.free(id).unwrap();
                self.verify();
            }
        }
    }
}

/// Prompts out of few pieces, so that they begin, go on and end alike.
fn prompt() -> impl Strategy<Value = Vec<Token>> {
    let piece = prop_oneof![
        Just(vec![1, 2, 1, 2, 0]),
        Just(vec![2, 1, 0]),
        Just(vec![0, 0, 0, 0, 0, 0, 0]),
        prop::collection::vec(0u32..3, 1..4),
    ];
    let pieces = prop::collection::vec(piece, 1..4).prop_map(|pieces| pieces.concat());
    // And one conversation that goes on and on.
    prop_oneof![
        pieces,
        (1usize..22).prop_map(|length| (0u32..).map(|n| n * n / 3 % 3).take(length).collect())
    ]
}

fn job() -> impl Strategy<Value = Job> {
    (
        prompt(),
        1usize..12,
        1usize..12,
        0usize..20,
        prop::option::weighted(0.2, 1usize..9),
        0usize..16,
    )
        .prop_map(
            |(prompt, max_new, stops, arrives, cancelled_after, snapshot_at)| Job {
                prompt,
                max_new,
                stops_after: stops.min(max_new),
                arrives,
                cancelled_after,
                snapshot_at,
            },
        )
}

#[derive(Clone, Debug)]
struct Setup {
    jobs: Vec<Job>,
    config: CacheConfig,
    chunk: usize,
    max_running: usize,
    most_moved: usize,
}

fn setup() -> impl Strategy<Value = Setup> {
    let sizes = (
        1usize..24,
        1usize..6,
        0usize..8,
        any::<bool>(),
        1usize..3,
        prop::num::u8::ANY,
    );
    (
        prop::collection::vec(job(), 1..12),
        sizes,
        1usize..9,
        1usize..6,
        0usize..12,
    )
        .prop_map(
            |(
                jobs,
                (total_blocks, block_size, generation_share, snapshots, min_tail, rare),
                chunk,
                max_running,
                most_moved,
            )| Setup {
                jobs,
                config: CacheConfig {
                    total_blocks,
                    block_size,
                    bytes_per_token: 10,
                    generation_share,
                    prefix_cache: rare > 20,
                    min_tail,
                    reuse: if snapshots {
                        Reuse::Snapshots
                    } else {
                        Reuse::Positions
                    },
                    snapshot_bytes: u64::from(rare),
                },
                chunk,
                max_running,
                most_moved,
            },
        )
}

/// Runs everything to its end; gives how many sequences were preempted.
fn run(setup: Setup) -> usize {
    let Setup {
        mut jobs,
        config,
        chunk,
        max_running,
        most_moved,
    } = setup;
    let cache = KvCache::new(config.clone()).unwrap();
    jobs.retain(|job| cache.never_fits(job.prompt.len(), job.max_new).is_none());
    let slots = vec![vec![None; config.block_size]; config.total_blocks];
    let mut engine = Engine {
        cache,
        memory: Memory {
            slots,
            chains: HashMap::new(),
        },
        chunk,
        max_running,
        most_moved,
        running: BTreeMap::new(),
        waiting: Vec::new(),
        names: 0,
        finished: 0,
        preempted: 0,
        jobs: jobs.clone(),
    };
    let wanted = jobs.len();
    // The most senior sequence moves by a token in every step, so this many steps must do, whatever is preempted.
    let work: usize = jobs.iter().map(|job| job.prompt.len() + job.max_new + 1).sum();
    for now in 0..20 + work {
        engine.step(now);
    }
    assert_eq!(engine.finished, wanted, "not everyone finished");
    assert!(engine.running.is_empty() && engine.waiting.is_empty());
    let usage = engine.cache.usage();
    assert_eq!(
        (usage.running_blocks, usage.promised_blocks, usage.sequences),
        (0, 0, 0)
    );
    assert_eq!(usage.free_blocks + usage.cached_blocks, usage.total_blocks);
    assert_eq!(engine.cache.clear(), usage.cached_blocks);
    assert_eq!(engine.cache.usage().free_blocks, usage.total_blocks);
    assert_eq!(engine.cache.usage().snapshots, 0);
    engine.cache.audit().unwrap();
    assert_eq!(engine.cache.counters().preempted as usize, engine.preempted);
    engine.preempted
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn every_sequence_finishes_and_reads_only_its_own_tokens(setup in setup()) {
        run(setup);
    }
}

/// The property above would say little if its traffic never ran the pool dry.
#[test]
fn a_small_pool_preempts_and_everyone_still_finishes() {
    let job = |first: Token| Job {
        prompt: vec![first, 1, 2, 0, 1],
        max_new: 11,
        stops_after: 11,
        arrives: 0,
        cancelled_after: None,
        snapshot_at: 0,
    };
    let config = CacheConfig {
        total_blocks: 7,
        generation_share: 1,
        ..CacheConfig::for_pool(1000, 1, 4)
    };
    let preempted = run(Setup {
        jobs: (0..4).map(job).collect(),
        config,
        chunk: 4,
        max_running: 4,
        most_moved: 4,
    });
    assert!(preempted >= 2, "{preempted}");
}

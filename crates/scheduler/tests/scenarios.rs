//! What the engine and its users rely on, one by one.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

use std::time::Duration;

use kv_cache::{CacheConfig, SeqId, Token};
use scheduler::{Config, ConfigError, NewRequest, PATIENCE, Plan, Refusal, Scheduler};

const NOW: Duration = Duration::ZERO;

fn config() -> Config {
    Config {
        cache: CacheConfig {
            total_blocks: 1000,
            generation_share: 64,
            ..CacheConfig::for_pool(1, 1, 16)
        },
        context_length: 8192,
        max_running: 4,
        prefill_chunk: 256,
        step_budget: 1 << 40,
        compact_decodes: true,
        max_wait: None,
    }
}

fn scheduler(config: Config) -> Scheduler {
    Scheduler::new(config).unwrap()
}

/// A prompt that shares nothing with those of others.
fn own(id: u64, len: usize) -> Vec<Token> {
    let first = 100_000 * (id as Token + 1);
    (first..first + len as Token).collect()
}

fn submit(scheduler: &mut Scheduler, id: u64, prompt: Vec<Token>, max_new_tokens: usize) -> SeqId {
    let id = SeqId(id);
    scheduler
        .submit(NewRequest {
            id,
            group: id,
            prompt,
            max_new_tokens,
            now: NOW,
        })
        .unwrap();
    id
}

/// Of each part: whose, where from, how many tokens.
fn parts(plan: &Plan) -> Vec<(u64, usize, usize)> {
    let part = |part: &scheduler::Prefill| (part.id.0, part.start, part.tokens.len());
    plan.prefill.iter().map(part).collect()
}

fn decoded(plan: &Plan) -> Vec<(u64, usize)> {
    plan.decode
        .iter()
        .map(|decode| (decode.id.0, decode.position))
        .collect()
}

/// Plans, and brings every draw of the plan back at once.
fn step(scheduler: &mut Scheduler) -> Plan {
    let plan = scheduler.plan(NOW);
    let drawn = plan.prefill.iter().filter(|part| part.last).map(|part| part.id);
    for id in drawn.chain(plan.decode.iter().map(|decode| decode.id)) {
        scheduler.token(id, 7);
    }
    scheduler.audit().unwrap();
    plan
}

#[test]
fn a_prompt_comes_in_chunks_and_the_last_one_draws() {
    let mut scheduler = scheduler(config());
    submit(&mut scheduler, 0, own(0, 600), 3);
    // Of no draw.
    scheduler.token(SeqId(0), 9);
    let plans: Vec<Plan> = (0..6).map(|_| step(&mut scheduler)).collect();
    let all: Vec<_> = plans.iter().flat_map(parts).collect();
    assert_eq!(all, [(0, 0, 256), (0, 256, 256), (0, 512, 88)]);
    let marks: Vec<_> = plans.iter().flat_map(|plan| &plan.prefill).collect();
    assert_eq!(
        marks.iter().map(|part| part.last).collect::<Vec<_>>(),
        [false, false, true]
    );
    assert_eq!(
        marks.iter().map(|part| part.first).collect::<Vec<_>>(),
        [Some(0), None, None]
    );
    // Three draws: that of the prompt, and two decodes. Then nothing, until the engine ends it.
    assert_eq!(
        plans.iter().map(decoded).collect::<Vec<_>>(),
        [vec![], vec![], vec![], vec![(0, 600)], vec![(0, 601)], vec![]]
    );
    assert!(!scheduler.is_idle());
    scheduler.finish(SeqId(0));
    assert!(scheduler.is_idle());
}

#[test]
fn an_exact_repeat_computes_one_token_and_its_reply_is_not_in_the_way() {
    for len in [1, 15, 16, 17, 32, 500] {
        let mut scheduler = scheduler(config());
        for id in 0..3 {
            submit(&mut scheduler, id, own(0, len), 3);
            let mut plan = step(&mut scheduler);
            if id == 0 {
                while !plan.prefill.last().unwrap().last {
                    plan = step(&mut scheduler);
                }
            } else {
                assert_eq!(parts(&plan), [(id, len - 1, 1)]);
                assert_eq!(plan.prefill[0].first, Some(len - 1));
                assert!(plan.prefill[0].last);
                assert_eq!(scheduler.cached_tokens(SeqId(id)), len - 1);
            }
            step(&mut scheduler);
            scheduler.finish(SeqId(id));
        }
    }
}

#[test]
fn the_next_turn_computes_what_is_new() {
    let mut scheduler = scheduler(config());
    submit(&mut scheduler, 0, own(0, 100), 10);
    for _ in 0..10 {
        step(&mut scheduler);
    }
    scheduler.finish(SeqId(0));
    // 9 of the 10 drawn tokens went through the model.
    let next = [own(0, 100), vec![7; 10], own(1, 20)].concat();
    submit(&mut scheduler, 1, next, 10);
    let plan = step(&mut scheduler);
    assert_eq!(parts(&plan), [(1, 109, 21)]);
    assert_eq!((plan.copies, scheduler.counters().copied_blocks), (vec![], 0));
}

#[test]
fn a_long_prompt_holds_up_others_by_one_chunk_at_a_time() {
    let mut scheduler = scheduler(config());
    for id in 0..3 {
        submit(&mut scheduler, id, own(id, 20), 100);
    }
    step(&mut scheduler);
    submit(&mut scheduler, 3, own(3, 1500), 100);
    let mut chunks = Vec::new();
    while chunks.iter().sum::<usize>() < 1500 {
        let plan = step(&mut scheduler);
        assert_eq!(plan.decode.len(), 3, "nobody misses a step");
        chunks.push(plan.prefill[0].tokens.len());
    }
    assert_eq!(chunks, [256, 256, 256, 256, 256, 220]);
    assert_eq!(step(&mut scheduler).decode.len(), 4);
}

#[test]
fn short_prompts_pass_a_long_one_but_not_for_ever() {
    let mut config = config();
    config.max_running = 3;
    let mut scheduler = scheduler(config);
    submit(&mut scheduler, 0, own(0, 5000), 1);
    step(&mut scheduler);
    let mut turns = Vec::new();
    for id in 1..40 {
        // Always a prompt of one chunk that is shorter than what is left of the long one.
        submit(&mut scheduler, id, own(id, 256), 1);
        let plan = step(&mut scheduler);
        turns.push(plan.prefill[0].id == SeqId(0));
        for part in plan.prefill.iter().filter(|part| part.last) {
            scheduler.finish(part.id);
        }
    }
    let gaps: Vec<_> = turns.split(|turn| *turn).map(<[bool]>::len).collect();
    assert!(
        gaps.len() > 5 && gaps.iter().all(|gap| *gap <= PATIENCE),
        "{gaps:?}"
    );
    assert!(gaps[0] == PATIENCE, "the short one goes first: {gaps:?}");
}

#[test]
fn a_chunk_is_shared_by_prompts_that_are_short() {
    let mut scheduler = scheduler(config());
    for (id, len) in [(0, 700), (1, 100), (2, 50), (3, 90)] {
        submit(&mut scheduler, id, own(id, len), 5);
    }
    // What is left has no room for the long one's first piece.
    assert_eq!(
        parts(&step(&mut scheduler)),
        [(2, 0, 50), (3, 0, 90), (1, 0, 100)]
    );
    assert_eq!(parts(&step(&mut scheduler)), [(0, 0, 256)]);
}

#[test]
fn a_prompt_is_cut_as_if_it_were_alone() {
    let lengths = [(0, 700), (1, 101), (2, 50), (3, 390), (4, 257), (5, 1000)];
    let cuts = |submitted: &[(u64, usize)]| {
        let mut scheduler = scheduler(Config {
            max_running: 6,
            ..config()
        });
        for &(id, len) in submitted {
            submit(&mut scheduler, id, own(id, len), 30);
        }
        let mut cuts: Vec<(u64, usize, usize)> = Vec::new();
        for _ in 0..20 {
            cuts.extend(parts(&step(&mut scheduler)));
        }
        cuts.sort_unstable();
        cuts
    };
    let mut alone: Vec<_> = lengths.iter().flat_map(|&one| cuts(&[one])).collect();
    alone.sort_unstable();
    assert_eq!(cuts(&lengths), alone);
    assert_eq!(alone.iter().map(|cut| cut.2).sum::<usize>(), 2498);
}

#[test]
fn users_of_one_system_prompt_who_come_at_once_compute_it_once() {
    let mut scheduler = scheduler(config());
    let system = own(9, 512);
    for id in 0..3 {
        submit(&mut scheduler, id, [system.clone(), own(id, 40)].concat(), 5);
    }
    let mut computed = 0;
    let mut plans = Vec::new();
    while plans
        .iter()
        .map(|plan: &Plan| plan.prefill.iter().filter(|part| part.last).count())
        .sum::<usize>()
        < 3
    {
        plans.push(step(&mut scheduler));
        computed += plans
            .last()
            .unwrap()
            .prefill
            .iter()
            .map(|part| part.tokens.len())
            .sum::<usize>();
    }
    assert_eq!(computed, 512 + 3 * 40);
    assert_eq!([1, 2].map(|id| scheduler.cached_tokens(SeqId(id))), [512; 2]);
    let totals = scheduler.totals();
    assert_eq!((totals.admitted, totals.hits), (3, 2));
    assert_eq!((totals.prompt_tokens, totals.cached_tokens), (3 * 552, 2 * 512));
}

#[test]
fn a_hit_is_a_quarter_of_the_prompt_not_the_token_that_all_begin_with() {
    let mut scheduler = scheduler(config());
    let block = scheduler.config().cache.block_size;
    let begin = own(9, 2 * block);
    // Whole blocks in common with the first: none, one of eight, two of eight, two of nine.
    for (id, common, blocks) in [(0, 0, 2), (1, 1, 8), (2, 2, 8), (3, 2, 9)] {
        let tokens = if id == 0 {
            begin.clone()
        } else {
            [
                begin[..common * block].to_vec(),
                own(id, (blocks - common) * block),
            ]
            .concat()
        };
        submit(&mut scheduler, id, tokens, 1);
        while !scheduler.is_idle() {
            for id in draws(&step(&mut scheduler)) {
                scheduler.finish(id);
            }
        }
    }
    let totals = scheduler.totals();
    assert_eq!((totals.admitted, totals.hits), (4, 1));
    assert_eq!(totals.cached_tokens, 5 * block as u64);
}

#[test]
fn nobody_overtakes_the_head_of_the_queue() {
    let mut config = config();
    config.cache.total_blocks = 20;
    let mut scheduler = scheduler(config);
    submit(&mut scheduler, 0, own(0, 160), 16);
    submit(&mut scheduler, 1, own(1, 160), 16);
    submit(&mut scheduler, 2, own(2, 16), 16);
    for _ in 0..5 {
        step(&mut scheduler);
        assert_eq!((scheduler.running(), scheduler.waiting()), (1, 2));
    }
    // Unless it leaves.
    assert!(scheduler.cancel(SeqId(1)));
    assert_eq!(parts(&step(&mut scheduler)), [(2, 0, 16)]);
    submit(&mut scheduler, 3, own(3, 160), 16);
    assert!(scheduler.cancel(SeqId(0)));
    assert_eq!(parts(&step(&mut scheduler)), [(3, 0, 160)]);
}

#[test]
fn a_place_is_free_for_the_next_one_in_the_step_after_a_cancellation() {
    let mut scheduler = scheduler(config());
    for id in 0..6 {
        submit(&mut scheduler, id, own(id, 30), 50);
    }
    step(&mut scheduler);
    assert_eq!((scheduler.running(), scheduler.waiting()), (4, 2));
    assert!(scheduler.cancel(SeqId(2)));
    let plan = step(&mut scheduler);
    assert_eq!(parts(&plan), [(4, 0, 30)]);
    assert_eq!(decoded(&plan), [(0, 30), (1, 30), (3, 30)]);
}

#[test]
fn the_context_length_ends_a_reply() {
    let mut config = config();
    config.context_length = 24;
    let mut scheduler = scheduler(config);
    submit(&mut scheduler, 0, own(0, 20), 100);
    let positions: Vec<_> = (0..8).flat_map(|_| decoded(&step(&mut scheduler))).collect();
    // Four draws fit: the fifth would stand at position 24.
    assert_eq!(positions, [(0, 20), (0, 21), (0, 22)]);
}

#[test]
fn what_can_never_run_is_refused_with_the_numbers() {
    let mut config = config();
    config.cache.total_blocks = 10;
    config.context_length = 200;
    let mut scheduler = scheduler(config);
    let mut refusal = |prompt: Vec<Token>, max_new_tokens| {
        let request = NewRequest {
            id: SeqId(0),
            group: SeqId(0),
            prompt,
            max_new_tokens,
            now: NOW,
        };
        scheduler
            .submit(request)
            .map_err(|refusal| (refusal.to_string(), refusal))
    };
    let (_, long) = refusal(own(0, 200), 5).unwrap_err();
    assert_eq!(
        long,
        Refusal::TooLong {
            prompt_tokens: 200,
            context_length: 200
        }
    );
    let (text, _) = refusal(own(0, 150), 11).unwrap_err();
    assert!(
        text.contains("161 tokens") && text.contains("160 tokens"),
        "{text}"
    );
    assert_eq!(refusal(vec![], 5).unwrap_err().1, Refusal::Empty);
    assert_eq!(refusal(own(0, 5), 0).unwrap_err().1, Refusal::Empty);
    assert_eq!(refusal(own(0, 150), 10), Ok(()));
    assert_eq!(refusal(own(0, 150), 10).unwrap_err().1, Refusal::Duplicate);
    let none = Config {
        max_running: 0,
        ..self::config()
    };
    assert_eq!(
        Scheduler::new(none).unwrap_err(),
        ConfigError::Zero("number of running sequences")
    );
}

#[test]
fn who_waits_too_long_leaves_and_who_has_begun_stays() {
    let mut config = config();
    config.max_running = 1;
    config.max_wait = Some(Duration::from_secs(10));
    let mut scheduler = scheduler(config);
    submit(&mut scheduler, 0, own(0, 20), 50);
    submit(&mut scheduler, 1, own(1, 20), 50);
    for (seconds, expired) in [(1, vec![]), (10, vec![]), (11, vec![SeqId(1)]), (60, vec![])] {
        let plan = scheduler.plan(Duration::from_secs(seconds));
        assert_eq!(plan.expired, expired);
    }
    assert_eq!((scheduler.running(), scheduler.waiting()), (1, 0));
    assert_eq!(scheduler.totals().expired, 1);
}

/// The choices of one request are one reply: once the first of them runs, the others wait for as long as it takes. A
/// request of which nothing runs leaves as a whole.
#[test]
fn the_rest_of_a_reply_is_not_sent_away_for_having_to_wait() {
    let mut config = config();
    config.max_running = 1;
    config.max_wait = Some(Duration::from_secs(10));
    let mut scheduler = scheduler(config);
    for (id, group) in [(0, 0), (1, 0), (2, 0), (3, 3), (4, 3)] {
        let request = NewRequest {
            id: SeqId(id),
            group: SeqId(group),
            prompt: own(group, 20),
            max_new_tokens: 5,
            now: NOW,
        };
        scheduler.submit(request).unwrap();
    }
    assert_eq!(scheduler.plan(NOW).expired, []);
    // The one that began may have ended by then.
    scheduler.finish(SeqId(0));
    for (seconds, expired) in [(11, vec![SeqId(3), SeqId(4)]), (60, vec![])] {
        assert_eq!(scheduler.plan(Duration::from_secs(seconds)).expired, expired);
    }
    assert_eq!((scheduler.running(), scheduler.waiting()), (1, 1));
    scheduler.finish(SeqId(1));
    let plan = scheduler.plan(Duration::from_secs(600));
    assert_eq!((plan.expired, plan.prefill.len()), (vec![], 1));
}

#[test]
fn commands_get_shorter_as_the_context_grows() {
    let mut config = config();
    config.step_budget = 256 * 512;
    let mut scheduler = scheduler(config);
    submit(&mut scheduler, 0, own(0, 5000), 1);
    let mut lengths = Vec::new();
    let mut done = 0;
    while done < 4900 {
        let plan = step(&mut scheduler);
        let [(_, start, len)] = parts(&plan)[..] else {
            panic!()
        };
        assert!(len * (start + len) <= 256 * 512 && len % 16 == 0);
        lengths.push(len);
        done += len;
    }
    assert!(lengths.is_sorted_by(|a, b| a >= b), "{lengths:?}");
    assert_eq!((lengths[0], lengths[1], *lengths.last().unwrap()), (256, 256, 16));
}

#[test]
fn prompts_share_the_budget_of_a_step_and_are_cut_as_if_they_were_alone() {
    let mut config = config();
    config.step_budget = 4096 * 64;
    let prompt = |id| own(id, 4200);
    let cuts = |scheduler: &mut Scheduler, ids: std::ops::Range<u64>| {
        let mut cuts = vec![Vec::new(); 3];
        let mut waited = 0;
        for id in ids.clone() {
            submit(scheduler, id, prompt(id), 1);
        }
        while scheduler.running() + scheduler.waiting() > 0 {
            let plan = step(scheduler);
            let work: usize = parts(&plan)
                .iter()
                .map(|(_, start, len)| len * (start + len))
                .sum();
            assert!(work <= 4096 * 64, "a step of {work}");
            waited += usize::from(plan.prefill.len() < scheduler.running());
            for (id, start, len) in parts(&plan) {
                cuts[id as usize].push((start, len));
            }
            for part in plan.prefill.iter().filter(|part| part.last) {
                scheduler.finish(part.id);
            }
        }
        (cuts, waited)
    };
    let (crowded, waited) = cuts(&mut scheduler(config.clone()), 0..3);
    assert!(waited > 20, "{waited}");
    for id in 0..3 {
        let (alone, _) = cuts(&mut scheduler(config.clone()), id..id + 1);
        assert_eq!(alone[id as usize], crowded[id as usize]);
    }
}

/// Two sequences that cannot both grow to their ends.
fn two_in_a_tight_pool() -> Scheduler {
    let mut config = config();
    config.cache.total_blocks = 6;
    config.cache.generation_share = 1;
    let mut scheduler = scheduler(config);
    for id in 0..2 {
        submit(&mut scheduler, id, own(id, 31), 40);
    }
    scheduler
}

/// Who draws in a step.
fn draws(plan: &Plan) -> Vec<SeqId> {
    let last = plan.prefill.iter().filter(|part| part.last).map(|part| part.id);
    last.chain(plan.decode.iter().map(|decode| decode.id)).collect()
}

/// The last to have arrived gives way, waits for the value of its last draw, and goes on where it was.
#[test]
fn a_preempted_sequence_goes_on_after_its_last_draw() {
    let mut scheduler = two_in_a_tight_pool();
    let mut unread: Vec<SeqId> = Vec::new();
    let mut drawn = [0; 2];
    let mut seen = None;
    for _ in 0..80 {
        let plan = scheduler.plan(NOW);
        if let [victim] = plan.preempted[..] {
            assert_eq!(victim, SeqId(1));
            assert!(
                unread.contains(&victim),
                "its draw of the step before is on the device"
            );
            assert!(parts(&plan).is_empty(), "its prompt is not known yet");
            seen = Some(());
        }
        if seen.is_some()
            && let [(id, start, len)] = parts(&plan)[..]
        {
            assert_eq!((id, start + len), (1, 31 + drawn[1]));
            assert_eq!(plan.prefill[0].first, None, "that was said before");
            seen = None;
        }
        for id in std::mem::replace(&mut unread, draws(&plan)) {
            drawn[id.0 as usize] += 1;
            scheduler.token(id, 7);
            if drawn[id.0 as usize] == 40 {
                scheduler.finish(id);
            }
        }
        scheduler.audit().unwrap();
    }
    assert_eq!(drawn, [40, 40]);
    assert_eq!(scheduler.counters().preempted, 1);
    assert!(scheduler.is_idle() && seen.is_none());
    // It found some of what it had computed itself, which is no gift of the cache's.
    assert!(scheduler.counters().cached_tokens > 0);
    let totals = scheduler.totals();
    assert_eq!((totals.admitted, totals.prompt_tokens), (2, 62));
    assert_eq!((totals.hits, totals.cached_tokens), (0, 0));
}

#[test]
fn a_failure_takes_along_those_who_relied_on_it_and_nobody_else() {
    for (fails, gone, again) in [(0, vec![0], 556), (1, vec![1, 2], 256), (2, vec![2], 544)] {
        let mut scheduler = scheduler(config());
        let system = own(9, 256);
        let prompt = |id: u64, more: usize| [system.clone(), own(id, 300), own(100 + id, more)].concat();
        // 0 has computed the system prompt, and a token that was drawn after it has been read: that is certain.
        submit(&mut scheduler, 0, prompt(0, 0), 50);
        for _ in 0..4 {
            step(&mut scheduler);
        }
        // 1 computes what 2 goes on from, and its token has not been read.
        submit(&mut scheduler, 1, prompt(1, 0), 50);
        submit(&mut scheduler, 2, [prompt(1, 0), own(6, 100)].concat(), 50);
        assert_eq!(parts(&step(&mut scheduler)), [(1, 256, 256)]);
        let plan = scheduler.plan(NOW);
        assert_eq!(parts(&plan), [(1, 512, 44), (2, 544, 112)]);
        let failed = scheduler.fail(&[SeqId(fails)]);
        assert_eq!(failed, gone.into_iter().map(SeqId).collect::<Vec<_>>());
        scheduler.audit().unwrap();
        assert_eq!(scheduler.running(), 3 - failed.len());
        assert_eq!(scheduler.fail(&[SeqId(fails)]), []);
        // What may not have been written is not found again, and what was is.
        let asked = if fails == 2 {
            [prompt(1, 0), own(6, 100)].concat()
        } else {
            prompt(fails, 0)
        };
        assert_eq!(
            scheduler.divergence(&asked, 1).position,
            again,
            "after {fails} failed"
        );
    }
}

#[test]
fn a_device_that_fails_takes_all_that_runs_and_what_was_cached() {
    let config = Config {
        max_running: 2,
        ..config()
    };
    let mut scheduler = scheduler(config);
    for id in 0..3 {
        submit(&mut scheduler, id, own(id, 100), 50);
    }
    for _ in 0..4 {
        step(&mut scheduler);
    }
    // One that has ended is cached, and part of the last step all the same.
    scheduler.finish(SeqId(0));
    step(&mut scheduler);
    assert_eq!((scheduler.running(), scheduler.waiting()), (2, 0));
    submit(&mut scheduler, 3, own(0, 100), 50);
    assert_eq!(scheduler.fail_running(), [SeqId(1), SeqId(2)]);
    scheduler.audit().unwrap();
    assert_eq!((scheduler.running(), scheduler.waiting()), (0, 1));
    let usage = scheduler.usage();
    assert_eq!((usage.running_bytes, usage.cached_bytes), (0, 0));
    assert_eq!(parts(&step(&mut scheduler)), [(3, 0, 100)]);
}

/// A draw that will never be read must not keep the queue waiting for it.
#[test]
fn a_device_that_fails_takes_the_preempted_whose_draw_was_in_flight() {
    let mut scheduler = two_in_a_tight_pool();
    let mut unread: Vec<SeqId> = Vec::new();
    while scheduler.counters().preempted == 0 {
        let plan = scheduler.plan(NOW);
        if plan.preempted.is_empty() {
            for id in std::mem::replace(&mut unread, draws(&plan)) {
                scheduler.token(id, 7);
            }
        }
    }
    assert!(unread.contains(&SeqId(1)));
    submit(&mut scheduler, 2, own(2, 31), 4);
    assert_eq!(scheduler.fail_running(), [SeqId(0), SeqId(1)]);
    scheduler.audit().unwrap();
    assert_eq!(parts(&scheduler.plan(NOW)), [(2, 0, 31)]);
}

/// In a pool full of cached prefixes of all sizes, and with all of them admitted in one step.
#[test]
fn sequences_are_one_run_each_also_in_a_full_pool() {
    let mut config = config();
    config.cache.total_blocks = 256;
    config.cache.generation_share = 32;
    let mut scheduler = scheduler(config);
    let run = |scheduler: &mut Scheduler, ids: std::ops::Range<u64>, prompt: usize, new: usize| {
        for id in ids.clone() {
            submit(scheduler, id, own(id, prompt + 7 * id as usize % 90), new);
        }
        let mut drawn = vec![0; (ids.end - ids.start) as usize];
        let mut in_one_run = 0;
        while !scheduler.is_idle() {
            let plan = step(scheduler);
            let last = plan.prefill.iter().filter(|part| part.last).map(|part| part.id);
            for id in last.chain(plan.decode.iter().map(|decode| decode.id)) {
                let count = &mut drawn[(id.0 - ids.start) as usize];
                *count += 1;
                if *count == new {
                    in_one_run += usize::from(kv_cache::runs(scheduler.table(id)).count() == 1);
                    scheduler.finish(id);
                }
            }
        }
        in_one_run
    };
    run(&mut scheduler, 0..60, 50, 3);
    assert!(scheduler.counters().evicted_blocks > 0, "the pool is full");
    // Each grows by 10 blocks more than it was promised.
    assert_eq!(run(&mut scheduler, 60..64, 300, 200), 4);
    assert!(scheduler.counters().moved_blocks > 0);
}

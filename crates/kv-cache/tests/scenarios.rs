//! What users and engines rely on, one by one.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

use kv_cache::{
    Admission, Admitted, CacheConfig, CacheError, KvCache, Request, Reuse, SeqId, Shortage, Token,
};

fn config(total_blocks: usize, block_size: usize) -> CacheConfig {
    CacheConfig {
        total_blocks,
        bytes_per_token: 100,
        ..CacheConfig::for_pool(1, 1, block_size)
    }
}

fn cache(total_blocks: usize, block_size: usize) -> KvCache<&'static str> {
    KvCache::new(config(total_blocks, block_size)).unwrap()
}

fn admit<S: Clone>(cache: &mut KvCache<S>, id: u64, prompt: &[Token], new: usize) -> Admission<S> {
    cache
        .admit(&Request {
            id: SeqId(id),
            arrival: id,
            prompt,
            max_new_tokens: new,
        })
        .unwrap()
}

fn admitted<S: Clone>(answer: Admission<S>) -> Admitted<S> {
    match answer {
        Admission::Admit(admitted) => admitted,
        Admission::Wait(_) | Admission::Never(_) => panic!("not admitted"),
    }
}

/// Prefills what is not cached, generates `reply`, ends. Gives how many tokens were cached.
fn converse<S: Clone>(cache: &mut KvCache<S>, id: u64, prompt: &[Token], reply: &[Token]) -> usize {
    let cached = admitted(admit(cache, id, prompt, reply.len())).cached_tokens;
    for tokens in [&prompt[cached..], reply] {
        cache.extend(SeqId(id), tokens.len()).unwrap();
        cache.record(SeqId(id), tokens).unwrap();
    }
    cache.free(SeqId(id)).unwrap();
    cache.audit().unwrap();
    cached
}

fn tokens(range: std::ops::Range<Token>) -> Vec<Token> {
    range.collect()
}

#[test]
fn an_exact_repeat_prefills_one_token() {
    for length in [1, 2, 15, 16, 17, 31, 32, 33, 500] {
        let mut cache = cache(100, 16);
        let prompt = tokens(0..length);
        assert_eq!(converse(&mut cache, 1, &prompt, &[]), 0);
        assert_eq!(converse(&mut cache, 2, &prompt, &[9]), prompt.len() - 1);
        assert_eq!(converse(&mut cache, 3, &prompt, &[]), prompt.len() - 1);
    }
}

#[test]
fn the_few_tokens_with_which_every_chat_begins_are_not_worth_a_copy() {
    // <|im_start|>, "user", "\n": a quarter of a block is.
    for (common, cached, copies) in [
        (1, 0, 0),
        (3, 0, 0),
        (4, 4, 1),
        (15, 15, 1),
        (16, 16, 0),
        (19, 16, 0),
        (20, 20, 1),
    ] {
        let mut cache = cache(100, 16);
        let begin = tokens(0..common);
        converse(&mut cache, 1, &[begin.clone(), tokens(100..140)].concat(), &[]);
        let other = [begin.clone(), tokens(200..240)].concat();
        assert_eq!(cache.peek(&other), cached);
        let found = admitted(admit(&mut cache, 2, &other, 1));
        assert_eq!(
            (found.cached_tokens, found.copies.len()),
            (cached, copies),
            "{common}"
        );
        assert_eq!(cache.counters().copied_blocks, copies as u64);
        cache.audit().unwrap();
    }
}

#[test]
fn few_tokens_are_taken_where_that_costs_nothing_or_leaves_nothing() {
    // The reply ends one token into a block: the next turn writes on behind it, in the same block.
    let mut cache = cache(100, 16);
    converse(&mut cache, 1, &tokens(0..30), &[7, 7, 7]);
    let next = [tokens(0..30), vec![7, 7, 7], tokens(60..70)].concat();
    let found = admitted(admit(&mut cache, 2, &next, 1));
    assert_eq!((found.cached_tokens, found.copies), (33, vec![]));
    // What is asked again leaves one token, although another conversation has the block for its own.
    let first = tokens(500..518);
    converse(&mut cache, 3, &first, &tokens(900..910));
    let again = admitted(admit(&mut cache, 4, &first, 1));
    assert_eq!((again.cached_tokens, again.copies.len()), (17, 1));
    cache.audit().unwrap();
}

#[test]
fn the_last_block_left_is_reused_where_it_lies() {
    let mut cache = cache(1, 4);
    converse(&mut cache, 1, &[1, 2, 3], &[]);
    let again = admitted(admit(&mut cache, 2, &[1, 2, 3], 1));
    assert_eq!((again.cached_tokens, again.copies), (2, vec![]));
    cache.audit().unwrap();
}

#[test]
fn the_same_blocks_in_another_order_are_other_blocks() {
    let mut cache = cache(100, 4);
    let (x, y) = (tokens(0..8), tokens(8..16));
    converse(&mut cache, 1, &[x.clone(), y.clone()].concat(), &[]);
    assert_eq!(converse(&mut cache, 2, &[y.clone(), x.clone()].concat(), &[]), 0);
    assert_eq!(
        converse(&mut cache, 3, &[x, y.clone(), tokens(90..95)].concat(), &[]),
        16
    );
    assert_eq!(cache.peek(&y), 7);
}

#[test]
fn the_next_turn_continues_where_the_last_one_ended() {
    let mut cache = cache(100, 16);
    let first = tokens(0..50);
    converse(&mut cache, 1, &first, &[7, 7, 7]);
    let second = [first, vec![7, 7, 7], tokens(60..70)].concat();
    assert_eq!(converse(&mut cache, 2, &second, &[8]), 53);
}

#[test]
fn users_of_one_system_prompt_share_it_even_when_they_come_at_once() {
    let mut cache = cache(100, 16);
    let system = tokens(0..64);
    let prompts = [
        [system.clone(), vec![100, 101]].concat(),
        [system, vec![200, 201]].concat(),
    ];
    for (id, prompt) in (0..).zip(&prompts) {
        assert_eq!(admitted(admit(&mut cache, id, prompt, 10)).cached_tokens, 0);
    }
    cache.extend(SeqId(0), 66).unwrap();
    cache.record(SeqId(0), &prompts[0]).unwrap();
    assert_eq!(cache.skip_cached(SeqId(1), &prompts[1]), Ok(64));
    assert_eq!(
        cache.table(SeqId(0)).unwrap()[..4],
        *cache.table(SeqId(1)).unwrap()
    );
    assert_eq!(cache.skip_cached(SeqId(1), &prompts[1][64..]), Ok(0));
    cache.audit().unwrap();
}

#[test]
fn what_two_computed_at_once_is_kept_once() {
    let mut cache = cache(100, 16);
    let prompt = tokens(0..40);
    for id in 0..2 {
        admit(&mut cache, id, &prompt, 10);
        cache.extend(SeqId(id), 40).unwrap();
    }
    assert_eq!(cache.record(SeqId(0), &prompt), Ok(0));
    assert_eq!(cache.usage().running_blocks, 6);
    assert_eq!(cache.record(SeqId(1), &prompt), Ok(2));
    assert_eq!(cache.usage().running_blocks, 4);
    assert_eq!(
        cache.table(SeqId(0)).unwrap()[..2],
        cache.table(SeqId(1)).unwrap()[..2]
    );
    assert_eq!(cache.counters().deduplicated_blocks, 2);
    cache.audit().unwrap();
}

#[test]
fn interleaved_conversations_keep_theirs_up_to_the_capacity() {
    let turns = 5;
    let run = |blocks: usize| {
        let mut cache = cache(blocks, 16);
        let mut histories: Vec<Vec<Token>> = (0..16)
            .map(|user| tokens(user * 1000..user * 1000 + 40))
            .collect();
        let mut misses = 0;
        for turn in 0..turns {
            for (user, history) in histories.iter_mut().enumerate() {
                let cached = converse(
                    &mut cache,
                    u64::from(turn) * 16 + user as u64,
                    history,
                    &[turn; 10],
                );
                misses += usize::from(turn > 0 && cached < history.len() - 12);
                history.extend([turn; 10]);
                history.extend([500 + turn, 600 + turn]);
            }
        }
        let usage = cache.usage();
        assert!(usage.running_bytes + usage.cached_bytes <= usage.total_bytes);
        misses
    };
    // 16 conversations of 98 recorded tokens: 7 blocks each.
    assert_eq!(run(16 * 7 + 1), 0);
    assert!(run(16 * 3) > 0);
}

#[test]
fn who_can_never_fit_is_told_the_numbers() {
    let mut cache = cache(10, 16);
    let Admission::Never(numbers) = admit(&mut cache, 1, &tokens(0..100), 61) else {
        panic!("161 tokens fit")
    };
    assert_eq!((numbers.needed_tokens, numbers.capacity_tokens), (161, 160));
    assert_eq!((numbers.needed_blocks, numbers.capacity_blocks), (11, 10));
    assert_eq!((numbers.needed_bytes, numbers.capacity_bytes), (17_600, 16_000));
    assert!(numbers.to_string().contains("161 tokens"), "{numbers}");
    assert_eq!(cache.config().room_after(100), 60);
    admitted(admit(&mut cache, 1, &tokens(0..100), 60));
}

#[test]
fn who_does_not_fit_now_waits_and_gets_in_when_someone_ends() {
    let mut cache = cache(10, 16);
    admitted(admit(&mut cache, 1, &tokens(0..80), 16));
    let wait = Admission::Wait(Shortage {
        needed_blocks: 5,
        available_blocks: 4,
    });
    assert_eq!(admit(&mut cache, 2, &tokens(100..164), 16), wait);
    // What has been promised is there when it is wanted, to the last token.
    cache.extend(SeqId(1), 96).unwrap();
    cache.free(SeqId(1)).unwrap();
    assert_eq!(admitted(admit(&mut cache, 2, &tokens(100..164), 16)).blocks, 5);
}

#[test]
fn the_longest_waiting_is_preempted_last_and_comes_back_to_its_blocks() {
    let mut cache: KvCache<()> = KvCache::new(CacheConfig {
        generation_share: 0,
        ..config(6, 4)
    })
    .unwrap();
    for id in 1..=3 {
        let prompt = vec![id as Token; 8];
        admitted(admit(&mut cache, id, &prompt, 12));
        cache.extend(SeqId(id), 8).unwrap();
        cache.record(SeqId(id), &prompt).unwrap();
    }
    assert!(matches!(
        cache.extend(SeqId(1), 1),
        Err(CacheError::OutOfBlocks(_))
    ));
    let preempted = cache.make_room(SeqId(1), 1).unwrap();
    assert_eq!(
        preempted
            .iter()
            .map(|one| (one.id, one.recorded_tokens))
            .collect::<Vec<_>>(),
        [(SeqId(3), 8)]
    );
    cache.extend(SeqId(1), 1).unwrap();
    cache.extend(SeqId(2), 1).unwrap();
    // Now the second one is the most junior: it makes room for itself by going.
    assert_eq!(cache.make_room(SeqId(2), 4).unwrap()[0].id, SeqId(2));
    cache.free(SeqId(1)).unwrap();
    let again = [vec![2; 8], vec![5]].concat();
    assert_eq!(admitted(admit(&mut cache, 2, &again, 11)).cached_tokens, 8);
    cache.audit().unwrap();
}

#[test]
fn a_miss_says_where_the_prompts_part() {
    let mut cache = cache(100, 4);
    let prompt = tokens(0..30);
    converse(&mut cache, 1, &prompt, &[]);
    let mut changed = prompt.clone();
    changed[17] = 99;
    let divergence = cache.divergence(&changed, 5);
    assert_eq!((divergence.position, divergence.differs()), (17, true));
    assert_eq!(
        (divergence.before, divergence.asked, divergence.cached),
        (tokens(12..17), vec![99, 18, 19, 20, 21], tokens(17..22))
    );
    let longer = [prompt.clone(), vec![70]].concat();
    let divergence = cache.divergence(&longer, 5);
    assert_eq!(
        (divergence.position, divergence.differs(), divergence.asked),
        (30, false, vec![70])
    );
    assert_eq!(cache.divergence(&prompt[..9], 3).cached, [9, 10, 11]);
    assert_eq!(
        KvCache::<()>::new(config(1, 4))
            .unwrap()
            .divergence(&prompt, 2)
            .position,
        0
    );
}

/// A prompt that was here and had to make room is not taken for a new one, nor a new one for it.
#[test]
fn what_was_evicted_is_told_from_what_never_was_here() {
    let mut cache = KvCache::new(config(6, 4)).unwrap();
    let [first, second] = [tokens(0..20), tokens(100..120)];
    converse(&mut cache, 1, &first, &[]);
    let evicted = |cache: &KvCache<()>, prompt: &[Token]| {
        let found = cache.divergence(prompt, 5);
        (found.evicted, found.position)
    };
    assert_eq!(evicted(&cache, &first), (false, 20));
    converse(&mut cache, 2, &second, &[]);
    // One block of the first one has found room.
    assert_eq!(evicted(&cache, &first), (true, 4));
    let changed = [&first[..6], &[77; 14]].concat();
    assert_eq!(evicted(&cache, &changed), (false, 4));
    assert_eq!(evicted(&cache, &tokens(50..70)), (false, 0));
    converse(&mut cache, 3, &first, &[]);
    assert_eq!(evicted(&cache, &first), (false, 20));
}

#[test]
fn layers_with_a_state_continue_from_a_snapshot_at_the_history_boundary() {
    let config = CacheConfig {
        reuse: Reuse::Snapshots,
        snapshot_bytes: 100,
        ..config(100, 4)
    };
    let mut cache: KvCache<&str> = KvCache::new(config).unwrap();
    let (history, generation_prompt) = (tokens(0..10), [50, 51, 52]);
    let prompt = [&history[..], &generation_prompt].concat();
    admitted(admit(&mut cache, 1, &prompt, 9));
    cache.extend(SeqId(1), 10).unwrap();
    cache.record(SeqId(1), &history).unwrap();
    cache.snapshot(SeqId(1), 10, 60, "after 10").unwrap();
    cache.extend(SeqId(1), 3).unwrap();
    cache.record(SeqId(1), &generation_prompt).unwrap();
    cache.free(SeqId(1)).unwrap();

    // The template renders the next turn without the old generation prompt.
    let next = [&history[..], &[60, 61, 62, 63, 64]].concat();
    let found = admitted(admit(&mut cache, 2, &next, 9));
    assert_eq!((found.cached_tokens, found.snapshot), (10, Some("after 10")));
    assert_eq!(found.copies[0].tokens, 2);
    // Without the state the K and V alone are of no use.
    assert_eq!(cache.peek(&history), 0);
    cache.audit().unwrap();
}

#[test]
fn a_snapshot_outlives_the_partly_filled_block_it_was_taken_in() {
    let config = CacheConfig {
        reuse: Reuse::Snapshots,
        snapshot_bytes: 100,
        ..config(100, 8)
    };
    let mut cache: KvCache<&str> = KvCache::new(config).unwrap();
    admitted(admit(&mut cache, 1, &tokens(0..11), 1));
    cache.extend(SeqId(1), 11).unwrap();
    cache.snapshot(SeqId(1), 10, 60, "after 10").unwrap();
    cache.record(SeqId(1), &tokens(0..11)).unwrap();
    cache.free(SeqId(1)).unwrap();
    assert_eq!(cache.peek(&tokens(0..16)), 10);
    // The block is filled by another one, and the part gives way to the whole.
    assert_eq!(converse(&mut cache, 2, &tokens(0..20), &[]), 10);
    assert_eq!(cache.chains().len(), 3);
    assert_eq!(
        admitted(admit(&mut cache, 3, &tokens(0..20), 1)).snapshot,
        Some("after 10")
    );
    assert_eq!(cache.usage().snapshots, 1);
}

#[test]
fn a_snapshot_outlives_a_part_that_a_longer_part_replaces() {
    let config = CacheConfig {
        reuse: Reuse::Snapshots,
        snapshot_bytes: 100,
        ..config(100, 8)
    };
    let mut cache: KvCache<&str> = KvCache::new(config).unwrap();
    for (id, length) in [(1, 11), (2, 13)] {
        let found = admitted(admit(&mut cache, id, &tokens(0..length), 1));
        cache
            .extend(SeqId(id), length as usize - found.cached_tokens)
            .unwrap();
        cache
            .record(SeqId(id), &tokens(found.cached_tokens as Token..length))
            .unwrap();
        if id == 1 {
            cache.snapshot(SeqId(1), 10, 60, "after 10").unwrap();
        }
        cache.free(SeqId(id)).unwrap();
    }
    assert_eq!(cache.chains(), [tokens(0..8), tokens(0..13)]);
    assert_eq!(
        admitted(admit(&mut cache, 3, &tokens(0..20), 1)).snapshot,
        Some("after 10")
    );
}

#[test]
fn the_later_snapshot_wins_over_the_longer_match() {
    let config = CacheConfig {
        reuse: Reuse::Snapshots,
        snapshot_bytes: 100,
        ..config(100, 8)
    };
    let mut cache: KvCache<&str> = KvCache::new(config).unwrap();
    let prompts: [&[Token]; 2] = [&[1, 2, 3, 4, 5, 9, 9, 9], &[1, 2, 3, 4, 8, 8, 8, 8]];
    for (id, prompt, position, state) in [(1, prompts[0], 2, "after 2"), (2, prompts[1], 4, "after 4")] {
        let cached = admitted(admit(&mut cache, id, prompt, 0)).cached_tokens;
        cache.extend(SeqId(id), 8 - cached).unwrap();
        cache.record(SeqId(id), &prompt[cached..]).unwrap();
        cache.snapshot(SeqId(id), position, 10, state).unwrap();
        cache.free(SeqId(id)).unwrap();
    }
    let found = admitted(admit(&mut cache, 3, &[1, 2, 3, 4, 5, 9, 7, 7], 0));
    assert_eq!((found.cached_tokens, found.snapshot), (4, Some("after 4")));
}

#[test]
fn what_a_failed_step_should_have_written_is_forgotten_with_all_that_rests_on_it() {
    let mut cache = cache(100, 4);
    let prompt = tokens(0..18);
    for id in 0..2 {
        admitted(admit(&mut cache, id, &prompt, 4));
    }
    // Another one is here that shares only what was written for certain.
    let other = [tokens(0..8), tokens(50..54)].concat();
    admitted(admit(&mut cache, 2, &other, 4));
    cache.extend(SeqId(0), 18).unwrap();
    cache.record(SeqId(0), &prompt).unwrap();
    assert_eq!(cache.skip_cached(SeqId(1), &prompt), Ok(16));
    assert_eq!(cache.skip_cached(SeqId(2), &other), Ok(8));
    assert_eq!(cache.forget(SeqId(0), 10), Ok(vec![SeqId(0), SeqId(1)]));
    assert_eq!(cache.chains(), [tokens(0..4), tokens(0..8)]);
    assert_eq!(cache.usage().sequences, 1);
    cache.audit().unwrap();
    // Of a last block the good beginning stays.
    cache.extend(SeqId(2), 4).unwrap();
    cache.record(SeqId(2), &other[8..11]).unwrap();
    assert_eq!(cache.forget(SeqId(2), 10), Ok(vec![SeqId(2)]));
    assert_eq!(cache.peek(&other), 10);
    cache.audit().unwrap();
}

#[test]
fn without_the_prefix_cache_nothing_is_kept() {
    let mut cache: KvCache<()> = KvCache::new(CacheConfig {
        prefix_cache: false,
        ..config(20, 4)
    })
    .unwrap();
    let prompt = tokens(0..30);
    for id in 0..2 {
        assert_eq!(converse(&mut cache, id, &prompt, &[1]), 0);
    }
    assert_eq!(cache.usage().free_blocks, 20);
}

#[test]
fn calls_out_of_order_are_refused_and_change_nothing() {
    let mut cache = cache(10, 4);
    let id = SeqId(1);
    assert_eq!(cache.extend(id, 1), Err(CacheError::UnknownSequence(id)));
    assert_eq!(cache.free(id), Err(CacheError::UnknownSequence(id)));
    let empty = Request {
        id,
        arrival: 1,
        prompt: &[],
        max_new_tokens: 1,
    };
    assert_eq!(cache.admit(&empty), Err(CacheError::EmptyRequest));
    let request = Request {
        prompt: &[1, 2],
        ..empty
    };
    cache.admit(&request).unwrap();
    assert_eq!(cache.admit(&request), Err(CacheError::DuplicateSequence(id)));
    assert_eq!(
        cache.extend(id, 4),
        Err(CacheError::PastLimit { asked: 4, limit: 3 })
    );
    cache.extend(id, 2).unwrap();
    assert_eq!(
        cache.record(id, &[1, 2, 3]),
        Err(CacheError::RecordPastEnd { given: 3, open: 2 })
    );
    assert_eq!((cache.len(id), cache.recorded(id)), (Ok(2), Ok(0)));
    assert!(cache.snapshot(id, 3, 1, "too far").is_err());
    cache.audit().unwrap();
}

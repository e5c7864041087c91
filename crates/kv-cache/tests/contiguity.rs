//! Blocks of one sequence are neighbours: the engine reads it as one slice then, without gathering it.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

use std::collections::BTreeMap;

use kv_cache::{Admission, CacheConfig, KvCache, Request, SeqId, Token, runs};
use proptest::prelude::*;

const BLOCK: usize = 4;

fn cache(total_blocks: usize, generation_share: usize, prefix_cache: bool) -> KvCache<()> {
    KvCache::new(CacheConfig {
        total_blocks,
        generation_share,
        prefix_cache,
        ..CacheConfig::for_pool(1, 1, BLOCK)
    })
    .unwrap()
}

fn admit(cache: &mut KvCache<()>, id: u64, prompt: &[Token], max_new_tokens: usize) -> usize {
    let request = Request {
        id: SeqId(id),
        arrival: id,
        prompt,
        max_new_tokens,
    };
    match cache.admit(&request).unwrap() {
        Admission::Admit(admitted) => admitted.cached_tokens,
        Admission::Wait(_) | Admission::Never(_) => panic!("there is room for {id}"),
    }
}

fn grow(cache: &mut KvCache<()>, id: u64, tokens: &[Token]) {
    assert!(cache.make_room(SeqId(id), tokens.len()).unwrap().is_empty());
    cache.extend(SeqId(id), tokens.len()).unwrap();
    cache.record(SeqId(id), tokens).unwrap();
}

fn count(cache: &KvCache<()>, id: u64) -> usize {
    runs(cache.table(SeqId(id)).unwrap()).count()
}

/// A prompt that shares nothing with others.
fn own(id: u64, len: usize) -> Vec<Token> {
    let first = 1000 * (id as Token + 1);
    (first..first + len as Token).collect()
}

#[derive(Clone, Debug)]
enum Op {
    Admit(usize, usize),
    Grow(usize, usize),
    Free(usize),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        2 => (1usize..60, 0usize..60).prop_map(|(prompt, new)| Op::Admit(prompt, new)),
        6 => (any::<usize>(), 1usize..20).prop_map(|(n, tokens)| Op::Grow(n, tokens)),
        1 => any::<usize>().prop_map(Op::Free),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// With at most `most` at once, each of at most a `2 × most`th of the pool, there is always a gap that is large
    /// enough, whatever is promised of it.
    #[test]
    fn sequences_well_within_the_pool_are_one_run_each(
        ops in prop::collection::vec(op(), 1..150),
        most in 1usize..8,
        each in 1usize..16,
        share in prop_oneof![Just(0usize), 0usize..60],
    ) {
        let mut cache = cache(each * 2 * most, share, false);
        let mut limits: BTreeMap<u64, usize> = BTreeMap::new();
        let mut names = 0;
        for op in ops {
            let nth = |n: usize| limits.keys().copied().nth(n % limits.len().max(1));
            match op {
                Op::Admit(prompt, new) => {
                    let prompt = prompt.min(each * BLOCK);
                    let new = new.min(each * BLOCK - prompt);
                    if limits.len() < most {
                        admit(&mut cache, names, &own(names, prompt), new);
                        limits.insert(names, prompt + new);
                        names += 1;
                    }
                }
                Op::Grow(n, tokens) => {
                    let Some(id) = nth(n) else { continue };
                    let room = limits[&id] - cache.len(SeqId(id)).unwrap();
                    grow(&mut cache, id, &vec![7; tokens.min(room)]);
                }
                Op::Free(n) => {
                    let Some(id) = nth(n) else { continue };
                    limits.remove(&id);
                    cache.free(SeqId(id)).unwrap();
                }
            }
            for &id in limits.keys() {
                prop_assert!(count(&cache, id) <= 1, "{:?}", cache.table(SeqId(id)).unwrap());
            }
        }
    }
}

/// Conversations take turns; each turn goes on where the one before it ended.
#[test]
fn conversations_stay_one_run_over_their_turns() {
    for users in [1, 2, 3, 5, 8] {
        let mut cache = cache(64 * users as usize, 8, true);
        let mut histories: Vec<Vec<Token>> = (0..users).map(|user| own(user, 21)).collect();
        for turn in 0..5 {
            for (user, history) in (0..).zip(&mut histories) {
                let id = turn * users + user;
                let cached = admit(&mut cache, id, history, 14);
                assert_eq!(cached, if turn == 0 { 0 } else { history.len() - 5 });
                grow(&mut cache, id, &history[cached..]);
                for token in 0..10 {
                    grow(&mut cache, id, &[token]);
                    history.push(token);
                }
                assert_eq!(count(&cache, id), 1, "{users} users, turn {turn}");
                cache.free(SeqId(id)).unwrap();
                history.extend([50 + turn as Token; 5]);
            }
        }
        assert_eq!(cache.counters().copied_blocks, 0);
        assert_eq!(cache.counters().evicted_blocks, 0);
    }
}

/// The pool is full of old conversations: what makes room for a new one is the oldest of them, and it lies in one piece.
#[test]
fn what_is_evicted_together_is_used_together() {
    let mut cache = cache(64, 16, true);
    for id in 0..40 {
        admit(&mut cache, id, &own(id, 50), 14);
        for chunk in own(id, 50).chunks(8) {
            grow(&mut cache, id, chunk);
        }
        for token in 0..14 {
            grow(&mut cache, id, &[token]);
        }
        assert_eq!(count(&cache, id), 1, "{:?}", cache.table(SeqId(id)));
        cache.free(SeqId(id)).unwrap();
    }
    assert!(cache.counters().evicted_blocks > 500);
}

/// After a day of requests of all sizes every gap has another size. Runs them four at a time; gives how many of them
/// were one run at their end, and how many blocks were moved for that.
fn long_day(requests: u64, most_moved: usize) -> (u64, u64) {
    let mut seed = 1u64;
    let mut random = |below: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (seed >> 33) % below
    };
    let mut cache = cache(1000, 64, true);
    let mut running: Vec<(u64, usize)> = Vec::new();
    let mut in_one_run = 0;
    for id in 0..requests {
        let prompt = own(id, 20 + random(300) as usize);
        let reply = 1 + random(120) as usize;
        admit(&mut cache, id, &prompt, reply);
        let moved = cache.compact(SeqId(id), most_moved).unwrap();
        assert!(moved.len() <= most_moved);
        grow(&mut cache, id, &prompt);
        running.push((id, reply));
        while running.len() == 4 {
            for (id, left) in &mut running {
                cache.stay_compact(SeqId(*id), most_moved).unwrap();
                grow(&mut cache, *id, &[3]);
                *left -= 1;
            }
            running.retain(|&(id, left)| {
                if left == 0 {
                    in_one_run += u64::from(count(&cache, id) == 1);
                    cache.free(SeqId(id)).unwrap();
                }
                left > 0
            });
        }
    }
    cache.audit().unwrap();
    assert!(cache.counters().evicted_blocks > 20 * requests);
    (in_one_run, cache.counters().moved_blocks)
}

#[test]
fn moving_cached_blocks_keeps_sequences_in_one_run_in_a_full_pool() {
    let requests = 200;
    let (without, none) = long_day(requests, 0);
    let (with, moved) = long_day(requests, 1000);
    // For docs/adr/kv-blocks.md; shown with --nocapture.
    println!("of {requests} requests in one run: {without}; with {moved} blocks moved: {with}");
    assert!((without, none) < (requests / 2, 1), "{without} even so");
    assert!(with >= requests - 6, "{with} of {requests}");
    // A request takes some 55 blocks; to copy as many as it writes would be worth it too.
    assert!(moved < 40 * requests, "{moved} blocks moved");
}

/// The next turn of a conversation that was scattered, and then of one that someone else sits behind.
#[test]
fn a_cached_conversation_is_put_together_when_it_goes_on() {
    let mut cache = cache(40, 8, true);
    // Two conversations whose blocks alternate: each turn begins right behind the other's last.
    let mut histories = [own(0, 4), own(1, 4)];
    for turn in 0..6 {
        for (user, history) in histories.iter_mut().enumerate() {
            let id = turn * 2 + user as u64;
            let cached = admit(&mut cache, id, history, 8);
            let before = cache.chains();
            cache.compact(SeqId(id), 40).unwrap();
            cache.audit().unwrap();
            assert_eq!(cache.chains(), before, "nothing is lost");
            assert!(count(&cache, id) <= 1);
            grow(&mut cache, id, &history[cached..]);
            for token in 0..8 {
                assert_eq!(cache.stay_compact(SeqId(id), 0), Ok(vec![]), "there was room");
                grow(&mut cache, id, &[token]);
                history.push(token);
            }
            assert_eq!(count(&cache, id), 1, "{:?}", cache.table(SeqId(id)));
            cache.free(SeqId(id)).unwrap();
        }
    }
}

#[test]
fn what_a_running_sequence_uses_is_not_moved() {
    let mut cache = cache(12, 0, true);
    // 0 and 1 share a prompt of two blocks; 1 goes on elsewhere, as 0 sits behind it.
    let prompt = own(0, 9);
    for id in 0..2 {
        let cached = admit(&mut cache, id, &prompt, 3);
        grow(&mut cache, id, &prompt[cached..]);
    }
    let tables = [0, 1].map(|id| cache.table(SeqId(id)).unwrap().to_vec());
    assert_eq!(tables[0][..2], tables[1][..2]);
    assert_eq!([0, 1].map(|id| count(&cache, id)), [1, 2]);
    for id in 0..2 {
        assert_eq!(cache.compact(SeqId(id), 12), Ok(vec![]));
        assert_eq!(cache.table(SeqId(id)).unwrap(), tables[id as usize]);
    }
    // Alone it can be put together, wherever that is.
    cache.free(SeqId(0)).unwrap();
    assert!(!cache.compact(SeqId(1), 12).unwrap().is_empty());
    assert_eq!(count(&cache, 1), 1);
    cache.audit().unwrap();
}

/// Asked again, a prompt goes on in the very block where it ended the first time; what stood there is copied elsewhere.
#[test]
fn an_exact_repeat_is_one_run_for_the_price_of_a_few_blocks() {
    for len in [6, 7, 8, 9, 50] {
        let mut cache = cache(64, 8, true);
        let prompt = own(0, len);
        for id in 0..4 {
            let cached = admit(&mut cache, id, &prompt, 8);
            assert_eq!(cached, if id == 0 { 0 } else { len - 1 });
            let moved = cache.compact(SeqId(id), 64).unwrap();
            assert!(moved.len() <= 4, "more than the reply and a block: {moved:?}");
            grow(&mut cache, id, &prompt[cached..]);
            for token in 0..8 {
                assert_eq!(cache.stay_compact(SeqId(id), 64), Ok(vec![]));
                grow(&mut cache, id, &[token + id as Token]);
            }
            assert_eq!(count(&cache, id), 1, "{:?}", cache.table(SeqId(id)));
            cache.free(SeqId(id)).unwrap();
            cache.audit().unwrap();
        }
        assert!(cache.counters().copied_blocks <= 3);
    }
}

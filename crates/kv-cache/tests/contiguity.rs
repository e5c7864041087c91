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
        sequences: 1,
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

//! The cache beside a naive model: a plain map from every cached chain of tokens to when it was last used.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

use std::collections::BTreeMap;

use kv_cache::{Admission, CacheConfig, KvCache, Request, SeqId, Token};
use proptest::prelude::*;

#[derive(Default)]
struct Running {
    /// Prompt and what follows; the first `recorded` have been recorded.
    tokens: Vec<Token>,
    recorded: usize,
    /// Blocks of it that are in the tree, and blocks that are its own.
    published: usize,
    private: usize,
    credit: usize,
}

struct Model {
    block_size: usize,
    min_tail: usize,
    total: usize,
    tick: u64,
    chains: BTreeMap<Vec<Token>, u64>,
    running: BTreeMap<SeqId, Running>,
}

fn common(a: &[Token], b: &[Token]) -> usize {
    a.iter().zip(b).take_while(|(x, y)| x == y).count()
}

impl Model {
    fn pinned(&self, chain: &[Token]) -> bool {
        self.running
            .values()
            .any(|run| run.tokens[..run.published * self.block_size].starts_with(chain))
    }

    fn used(&self) -> usize {
        self.chains.len() + self.running.values().map(|run| run.private).sum::<usize>()
    }

    fn available(&self) -> usize {
        let unpinned = self.chains.keys().filter(|chain| !self.pinned(chain)).count();
        let promised: usize = self.running.values().map(|run| run.credit).sum();
        self.total - self.used() + unpinned - promised
    }

    /// What is promised is free: the oldest chain goes that is in no one's use and that no other goes on from.
    fn make_room(&mut self) {
        let promised: usize = self.running.values().map(|run| run.credit).sum();
        while self.total < self.used() + promised {
            self.evict();
        }
    }

    fn evict(&mut self) {
        let leaf = |chain: &Vec<Token>| {
            !self.pinned(chain)
                && !self
                    .chains
                    .keys()
                    .any(|other| other.len() > chain.len() && other.starts_with(chain))
        };
        let oldest = self
            .chains
            .iter()
            .filter(|(chain, _)| leaf(chain))
            .min_by_key(|(_, tick)| **tick);
        let oldest = oldest.map(|(chain, _)| chain.clone()).unwrap();
        self.chains.remove(&oldest);
    }

    /// Marks the first `blocks` blocks of `tokens` as used now.
    fn touch(&mut self, tokens: &[Token], blocks: usize) {
        for end in (1..=blocks).map(|n| n * self.block_size) {
            *self.chains.get_mut(&tokens[..end]).unwrap() = self.tick;
        }
    }

    fn insert(&mut self, chain: &[Token]) {
        let start = (chain.len() - 1) / self.block_size * self.block_size;
        self.chains
            .retain(|other, _| !(other.len() > start && chain.starts_with(other)));
        self.chains.insert(chain.to_vec(), self.tick);
    }

    /// The chains one block longer than the first `start` tokens, which they share.
    fn siblings(&self, tokens: &[Token], start: usize) -> Vec<Vec<Token>> {
        let within = start + 1..=start + self.block_size;
        let sibling =
            |chain: &&Vec<Token>| within.contains(&chain.len()) && chain[..start] == tokens[..start];
        self.chains.keys().filter(sibling).cloned().collect()
    }

    fn whole_blocks(&self, tokens: &[Token]) -> usize {
        (1..)
            .take_while(|n| {
                tokens
                    .get(..n * self.block_size)
                    .is_some_and(|c| self.chains.contains_key(c))
            })
            .count()
    }

    fn admit(&mut self, id: SeqId, prompt: &[Token], max_new: usize) -> Option<usize> {
        let head = &prompt[..prompt.len() - 1];
        let cached = self
            .chains
            .keys()
            .map(|chain| common(chain, head))
            .max()
            .unwrap_or(0);
        let whole = self.whole_blocks(head);
        assert_eq!(whole, cached / self.block_size);
        // Few tokens of a further block are not worth a copy, unless they are the last, or the block ends with them.
        let worth = cached % self.block_size >= self.min_tail
            || cached == head.len()
            || self.chains.contains_key(&head[..cached]);
        let cached = if worth { cached } else { whole * self.block_size };
        let needed = (prompt.len() + max_new).div_ceil(self.block_size) - whole;
        let newly_pinned = (1..=whole)
            .filter(|n| !self.pinned(&prompt[..n * self.block_size]))
            .count();
        if needed + newly_pinned > self.available() {
            return None;
        }
        self.tick += 1;
        self.touch(prompt, whole);
        let mut run = Running {
            tokens: prompt.to_vec(),
            recorded: cached,
            published: whole,
            private: 0,
            credit: needed,
        };
        let start = whole * self.block_size;
        let rest = &head[..head.len().min(start + self.block_size)];
        let source = (cached > start).then(|| {
            // Of two chains that agree equally far, the one that sorts after the prompt.
            let siblings = self.siblings(prompt, start);
            let above = siblings.iter().find(|chain| chain.as_slice() >= rest);
            let below = siblings.iter().rev().find(|chain| chain.as_slice() < rest);
            let mut near = [above, below].into_iter().flatten();
            near.find(|chain| common(chain, head) == cached).cloned().unwrap()
        });
        // A part of a block that is wanted in full is written on where it is; of others a copy is made.
        if let Some(source) = source {
            run.private = 1;
            run.credit -= 1;
            if source == head[..cached] {
                self.chains.remove(&source);
            } else {
                *self.chains.get_mut(&source).unwrap() = self.tick;
            }
        }
        self.running.insert(id, run);
        self.make_room();
        Some(cached)
    }

    fn skip(&mut self, id: SeqId) -> usize {
        self.tick += 1;
        let mut run = self.running.remove(&id).unwrap();
        let before = run.recorded;
        while run.recorded == run.published * self.block_size
            && run.recorded + self.block_size < run.tokens.len()
            && self
                .chains
                .contains_key(&run.tokens[..run.recorded + self.block_size])
        {
            run.recorded += self.block_size;
            run.published += 1;
            run.credit -= 1;
            self.touch(&run.tokens[..run.recorded], run.published);
        }
        let skipped = run.recorded - before;
        self.running.insert(id, run);
        skipped
    }

    fn grow(&mut self, id: SeqId, count: usize) {
        let recorded = self.running[&id].recorded;
        let held = self.running[&id].published + self.running[&id].private;
        for _ in held..(recorded + count).div_ceil(self.block_size) {
            let run = self.running.get_mut(&id).unwrap();
            run.private += 1;
            run.credit -= 1;
        }
        self.tick += 1;
        let mut run = self.running.remove(&id).unwrap();
        run.recorded += count;
        while (run.published + 1) * self.block_size <= run.recorded {
            run.published += 1;
            run.private -= 1;
            let chain = run.tokens[..run.published * self.block_size].to_vec();
            self.insert(&chain);
        }
        self.running.insert(id, run);
    }

    fn free(&mut self, id: SeqId) {
        let run = self.running.remove(&id).unwrap();
        self.tick += 1;
        self.touch(&run.tokens, run.published);
        let chain = &run.tokens[..run.recorded];
        if run.recorded > run.published * self.block_size {
            let siblings = self.siblings(chain, run.published * self.block_size);
            match siblings.into_iter().find(|sibling| sibling.starts_with(chain)) {
                Some(sibling) => *self.chains.get_mut(&sibling).unwrap() = self.tick,
                None => self.insert(chain),
            }
        }
    }
}

#[derive(Clone, Debug)]
enum Op {
    Admit(Vec<Token>, usize),
    /// The nth running sequence moves by so many tokens; it generates this one where its prompt has ended.
    Grow(usize, usize, Token),
    Skip(usize),
    Free(usize),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        2 => (prop::collection::vec(0u32..2, 1..12), 0usize..6).prop_map(|(prompt, new)| Op::Admit(prompt, new)),
        4 => (any::<usize>(), 1usize..7, 0u32..2).prop_map(|(n, count, token)| Op::Grow(n, count, token)),
        1 => any::<usize>().prop_map(Op::Skip),
        1 => any::<usize>().prop_map(Op::Free),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, ..ProptestConfig::default() })]

    #[test]
    fn lookups_and_evictions_equal_the_naive_model(
        ops in prop::collection::vec(op(), 1..80),
        block_size in 1usize..5,
        min_tail in 1usize..5,
        total in 3usize..20,
    ) {
        let config = CacheConfig {
            total_blocks: total,
            generation_share: usize::MAX,
            min_tail,
            ..CacheConfig::for_pool(1, 1, block_size)
        };
        let mut cache: KvCache<()> = KvCache::new(config).unwrap();
        let mut model = Model { block_size, min_tail, total, tick: 0, chains: BTreeMap::new(), running: BTreeMap::new() };
        let mut limits = BTreeMap::new();
        let mut names = 0;
        for op in ops {
            let nth = |n: usize| model.running.keys().copied().nth(n % model.running.len().max(1));
            match op {
                Op::Admit(prompt, max_new_tokens) => {
                    let id = SeqId(names);
                    let request = Request { id, arrival: names, prompt: &prompt, max_new_tokens };
                    let fits = (prompt.len() + max_new_tokens).div_ceil(block_size) <= total;
                    let before = cache.chains();
                    match cache.admit(&request).unwrap() {
                        Admission::Never(_) => prop_assert!(!fits),
                        Admission::Wait(_) => {
                            prop_assert!(fits);
                            prop_assert_eq!(model.admit(id, &prompt, max_new_tokens), None);
                            prop_assert_eq!(before, cache.chains());
                        }
                        Admission::Admit(admitted) => {
                            prop_assert!(fits);
                            let cached = model.admit(id, &prompt, max_new_tokens);
                            prop_assert_eq!(cached, Some(admitted.cached_tokens));
                            // Where the blocks lie is no one's business but the cache's.
                            cache.compact(id, names as usize % 8).unwrap();
                            limits.insert(id, prompt.len() + max_new_tokens);
                            names += 1;
                        }
                    }
                }
                Op::Grow(n, count, token) => {
                    let Some(id) = nth(n) else { continue };
                    let run = model.running.get_mut(&id).unwrap();
                    let count = count.min(limits[&id] - run.recorded);
                    let end = run.recorded + count;
                    if run.tokens.len() < end {
                        run.tokens.resize(end, token);
                    }
                    let tokens = run.tokens[run.recorded..end].to_vec();
                    cache.extend(id, count).unwrap();
                    cache.record(id, &tokens).unwrap();
                    model.grow(id, count);
                }
                Op::Skip(n) => {
                    let Some(id) = nth(n) else { continue };
                    let run = &model.running[&id];
                    let upcoming = run.tokens[run.recorded..].to_vec();
                    prop_assert_eq!(cache.skip_cached(id, &upcoming).unwrap(), model.skip(id));
                }
                Op::Free(n) => {
                    let Some(id) = nth(n) else { continue };
                    cache.free(id).unwrap();
                    model.free(id);
                }
            }
            cache.audit().unwrap();
            prop_assert_eq!(cache.available(), model.available());
            prop_assert_eq!(cache.chains(), model.chains.keys().cloned().collect::<Vec<_>>());
        }
    }
}

//! What the program that this one replaces gets wrong, on the real engine with the demonstration model: each test is
//! one of those failures with the right behaviour.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    missing_docs
)]

mod conversations;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use mlxworker::backend::{
    Backend, FinishReason, GenerateRequest, Generation, GenerationEvent, SamplingParams, SubmitError, Usage,
};
use mlxworker::engine::{Engine, EngineConfig};
use mlxworker::text::TextTokenizer;
use tokio::time::timeout;

const LIMIT: Duration = Duration::from_secs(120);
/// Tokens in a block of the cache.
const BLOCK: usize = 32;

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo/model")
}

async fn engine(change: impl FnOnce(&mut EngineConfig)) -> Engine {
    let mut config = EngineConfig {
        max_running: 8,
        block_size: BLOCK,
        prefill_chunk: 128,
        ..EngineConfig::new(demo())
    };
    change(&mut config);
    Engine::start(config, |_| {}).await.unwrap()
}

fn ids(text: &str) -> Vec<u32> {
    TextTokenizer::load(&demo()).unwrap().encode(text, true).unwrap()
}

fn user(text: &str) -> Vec<u32> {
    ids(&format!(
        "<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    ))
}

/// Different words for different seeds, `count` tokens of them.
fn words(seed: usize, count: usize) -> Vec<u32> {
    const WORDS: [&str; 8] = [
        " time", " water", " people", " house", " number", " world", " name", " light",
    ];
    let text: String = (0..count)
        .map(|i| WORDS[(seed * 31 + i * i * (seed + 3) + i / 7) % WORDS.len()])
        .collect();
    let mut ids = ids(&text);
    ids.truncate(count);
    assert_eq!(ids.len(), count);
    ids
}

fn greedy(prompt: Vec<u32>, max_tokens: usize) -> GenerateRequest {
    GenerateRequest {
        prompt,
        max_tokens,
        sampling: SamplingParams::greedy(),
        stop_tokens: Vec::new(),
        logprobs: None,
        constraint: None,
    }
}

#[derive(Debug, Default, PartialEq)]
struct Reply {
    cached: usize,
    tokens: Vec<u32>,
    end: Option<(FinishReason, Usage)>,
}

async fn next(generation: &mut Generation) -> Option<GenerationEvent> {
    timeout(LIMIT, generation.events.recv()).await.expect("in time")
}

async fn first_token(generation: &mut Generation) -> u32 {
    loop {
        match next(generation).await.expect("an event") {
            GenerationEvent::Started { .. } | GenerationEvent::Reused { .. } => {}
            GenerationEvent::Token { id, .. } => return id,
            other => panic!("{other:?}"),
        }
    }
}

/// Reads to the end.
async fn rest(mut generation: Generation) -> Reply {
    let mut reply = Reply::default();
    while let Some(event) = next(&mut generation).await {
        match event {
            GenerationEvent::Started { cached_tokens, .. } | GenerationEvent::Reused { cached_tokens } => {
                reply.cached = cached_tokens;
            }
            GenerationEvent::Token { id, .. } => reply.tokens.push(id),
            GenerationEvent::Finished { reason, usage } => reply.end = Some((reason, usage)),
            GenerationEvent::Failed(error) => panic!("{error}"),
        }
    }
    assert!(reply.end.is_some(), "no end");
    reply
}

async fn ask(engine: &Engine, request: GenerateRequest) -> Reply {
    rest(engine.submit(request).unwrap()).await
}

async fn tokens(engine: &Engine, request: GenerateRequest) -> Vec<u32> {
    ask(engine, request).await.tokens
}

/// Waits until nothing runs, waits, or is in use.
async fn idle(engine: &Engine) {
    let reached = async {
        while {
            let stats = engine.stats();
            (stats.running, stats.waiting, stats.kv_used_bytes) != (0, 0, 0)
        } {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(LIMIT, reached).await.expect("in time");
}

/// Each kind of sampling alone, then joining a running one of the other kind, in both orders.
#[tokio::test]
async fn a_hot_and_a_greedy_request_do_not_mix() {
    let engine = engine(|c| c.prefix_cache = false).await;
    let hot = GenerateRequest {
        sampling: SamplingParams {
            temperature: 1.5,
            seed: Some(7),
            ..SamplingParams::greedy()
        },
        ..greedy(user("Count from 1 to 9"), 60)
    };
    let cold = greedy(user("Count from 1 to 10"), 60);
    let alone = (
        tokens(&engine, hot.clone()).await,
        tokens(&engine, cold.clone()).await,
    );
    let unseasoned = greedy(hot.prompt.clone(), 60);
    assert_ne!(
        alone.0,
        tokens(&engine, unseasoned).await,
        "temperature makes a difference"
    );
    for hot_first in [true, false] {
        let (one, other) = if hot_first { (&hot, &cold) } else { (&cold, &hot) };
        let mut first = engine.submit(one.clone()).unwrap();
        let mut begun = vec![first_token(&mut first).await];
        let second = ask(&engine, other.clone());
        let (first, second) = tokio::join!(rest(first), second);
        begun.extend(first.tokens);
        let (hot, cold) = if hot_first {
            (begun, second.tokens)
        } else {
            (second.tokens, begun)
        };
        assert_eq!(
            (hot, cold),
            alone,
            "the hot one came {}",
            if hot_first { "first" } else { "second" }
        );
    }
}

/// What one request wants of its logits concerns nobody else, and is not lost when plain requests run before, beside
/// and after it.
#[tokio::test]
async fn bias_and_penalties_stay_with_their_request() {
    let engine = engine(|c| c.prefix_cache = false).await;
    // Nothing that the model is sure of: what a penalty takes away decides.
    let plain = greedy(words(1, 40), 40);
    let with = |change: fn(&mut SamplingParams)| {
        let mut request = plain.clone();
        change(&mut request.sampling);
        request
    };
    let alone = tokens(&engine, plain.clone()).await;
    let wanted = ids("people")[0];
    let special = [
        with(|s| s.logit_bias = vec![(ids("people")[0], 100.0)]),
        with(|s| s.repetition_penalty = 1.8),
        with(|s| s.frequency_penalty = 2.0),
        with(|s| s.presence_penalty = 2.0),
    ];
    let mut expected = Vec::new();
    for request in &special {
        let reply = tokens(&engine, request.clone()).await;
        assert_ne!(reply, alone, "{:?} makes a difference", request.sampling);
        expected.push(reply);
    }
    assert!(expected[0].iter().all(|id| *id == wanted), "{:?}", expected[0]);

    let mut running = engine.submit(plain.clone()).unwrap();
    let first = first_token(&mut running).await;
    let joined: Vec<Generation> = special
        .iter()
        .map(|r| engine.submit(r.clone()).unwrap())
        .collect();
    let after = engine.submit(plain.clone()).unwrap();
    for (generation, expected) in joined.into_iter().zip(&expected) {
        assert_eq!(rest(generation).await.tokens, *expected);
    }
    let mut begun = vec![first];
    begun.extend(rest(running).await.tokens);
    assert_eq!(begun, alone);
    assert_eq!(rest(after).await.tokens, alone);
}

/// A block of tokens in another place, or behind another one, has other keys and values.
#[tokio::test]
async fn the_same_blocks_in_another_order_are_another_prompt() {
    let (x, y, z) = (words(1, 2 * BLOCK), words(2, 2 * BLOCK), words(5, 2 * BLOCK));
    let question = user("What was the first word?");
    let prompt = |parts: [&Vec<u32>; 2]| {
        let mut prompt = parts.map(Clone::clone).concat();
        prompt.extend(&question);
        greedy(prompt, 24)
    };
    let orders = [
        prompt([&x, &y]),
        prompt([&y, &x]),
        prompt([&z, &y]),
        prompt([&x, &z]),
    ];
    let fresh = engine(|c| c.prefix_cache = false).await;
    let mut right = Vec::new();
    for request in &orders {
        right.push(tokens(&fresh, request.clone()).await);
    }
    drop(fresh);
    assert_ne!(right[0], right[1], "the order makes a difference");
    let engine = engine(|_| {}).await;
    // What a prompt begins with may be found again; nothing else, wherever it comes.
    for (at, blocks) in [(0, 0), (1, 0), (2, 0), (3, 2), (1, 4), (0, 4)] {
        let reply = ask(&engine, orders[at].clone()).await;
        assert_eq!(reply.tokens, right[at], "order {at}");
        assert_eq!(
            reply.cached / BLOCK,
            blocks,
            "order {at}: {} cached",
            reply.cached
        );
    }
}

/// The same prompt again is computed from its last block on, and answers the same, ten times sooner.
#[tokio::test]
async fn an_exact_repeat_computes_next_to_nothing() {
    // A busy machine holds any try up, so that the best of each kind counts; they are tried until these are far enough
    // apart.
    const TRIES: usize = 8;
    const TOKENS: usize = 1500;
    let engine = engine(|_| {}).await;
    let mut best = [Duration::MAX; 2];
    for seed in 0..TRIES {
        let request = greedy(words(seed, TOKENS), 8);
        let mut replies = Vec::new();
        for best in &mut best {
            let before = engine.stats().prefill_tokens;
            let sent = Instant::now();
            let mut generation = engine.submit(request.clone()).unwrap();
            let Some(GenerationEvent::Started { cached_tokens, .. }) = next(&mut generation).await else {
                panic!("no start")
            };
            let mut reply = vec![first_token(&mut generation).await];
            *best = sent.elapsed().min(*best);
            reply.extend(rest(generation).await.tokens);
            let computed = engine.stats().prefill_tokens - before;
            assert_eq!(computed, (TOKENS - cached_tokens) as u64);
            if replies.is_empty() {
                // Prompts of other words may begin alike by chance.
                assert!(cached_tokens < BLOCK, "{cached_tokens}");
            } else {
                // All but the last token, or whole blocks of that.
                assert!(
                    [TOKENS - 1, (TOKENS - 1) / BLOCK * BLOCK].contains(&cached_tokens),
                    "{cached_tokens}"
                );
            }
            replies.push(reply);
        }
        assert_eq!(replies[0], replies[1]);
        if best[1] * 10 <= best[0] {
            return;
        }
    }
    panic!("in {TRIES} tries: {best:?}");
}

/// Two who bring the same prompt at once: it is computed once, by turns, and each one's usage says what the other did.
#[tokio::test]
async fn what_another_computes_meanwhile_is_cached_too() {
    const TOKENS: u64 = 1500;
    let engine = engine(|_| {}).await;
    let prompt = words(3, TOKENS as usize);
    let [one, other] = [(); 2].map(|()| engine.submit(greedy(prompt.clone(), 4)).unwrap());
    let (one, other) = tokio::join!(rest(one), rest(other));
    assert_eq!(one.tokens, other.tokens);
    let told = [one, other].map(|reply| {
        let usage = reply.end.unwrap().1;
        assert_eq!(reply.cached, usage.cached_tokens, "known before the end");
        usage.cached_tokens as u64
    });
    assert!(told[0] > 0 && told[1] > 0, "{told:?}");
    let cached = told[0] + told[1];
    assert!(
        cached <= TOKENS && cached + BLOCK as u64 >= TOKENS,
        "all but the last of one: {told:?}"
    );
    let stats = engine.stats();
    assert_eq!(stats.prefill_tokens, 2 * TOKENS - cached);
    let cache = stats.cache;
    assert_eq!((cache.requests, cache.hits), (2, 2));
    assert_eq!((cache.prompt_tokens, cache.cached_tokens), (2 * TOKENS, cached));
    // Each step of decoding is counted under the path that `/status` names.
    let kernels = engine.info().limits["decoding"]["path"] == "kernels";
    let (on, off) = if kernels {
        (stats.kernel_decodes, stats.reference_decodes)
    } else {
        (stats.reference_decodes, stats.kernel_decodes)
    };
    assert!(on >= 3 && off == 0, "{stats:?}");
}

/// Replies outgrow the pool: the younger ones lose their places, are computed again, and say what they would have said
/// alone, with their seeds and with penalties for what they had said before.
#[tokio::test]
async fn a_pool_that_runs_dry_changes_no_reply() {
    const BLOCK: usize = 16;
    let season = |change: fn(&mut SamplingParams), seed: usize| {
        let mut request = greedy(words(seed, 30), 100);
        change(&mut request.sampling);
        request
    };
    let requests = [
        season(|_| {}, 1),
        season(
            |s| {
                s.temperature = 1.2;
                s.seed = Some(11);
            },
            2,
        ),
        season(
            |s| {
                s.temperature = 0.9;
                s.seed = Some(12);
                s.frequency_penalty = 0.8;
                s.presence_penalty = 0.5;
            },
            5,
        ),
        season(|s| s.repetition_penalty = 1.6, 6),
    ];
    let solo = engine(|c| {
        c.prefix_cache = false;
        c.max_running = 1;
    })
    .await;
    let mut alone = Vec::new();
    for request in &requests {
        alone.push(tokens(&solo, request.clone()).await);
    }
    drop(solo);
    for prefix_cache in [true, false] {
        let engine = engine(|c| {
            c.prefix_cache = prefix_cache;
            c.block_size = BLOCK;
            // Prompts take 8 of the blocks, whole replies would take 36.
            c.max_blocks = Some(20);
            c.generation_share = 1;
        })
        .await;
        let asked: Vec<Generation> = requests
            .iter()
            .map(|r| engine.submit(r.clone()).unwrap())
            .collect();
        for (at, (generation, alone)) in asked.into_iter().zip(&alone).enumerate() {
            let reply = rest(generation).await;
            assert_eq!(reply.tokens, *alone, "request {at}");
            assert_eq!(
                reply.end.unwrap().1.cached_tokens,
                0,
                "its own tokens are no gift"
            );
        }
        let stats = engine.stats();
        assert!(stats.preempted > 0, "{stats:?}");
        assert_eq!((stats.cache.requests, stats.cache.cached_tokens), (4, 0));
    }
}

/// What the prefix cache keeps makes room for whoever comes: it is told apart from what runs.
#[tokio::test]
async fn what_is_only_cached_is_not_in_use() {
    let engine = engine(|_| {}).await;
    for _ in 0..2 {
        // Long enough to be running yet when it is looked at.
        let mut generation = engine.submit(greedy(user("Count from 1 to 9"), 2000)).unwrap();
        first_token(&mut generation).await;
        assert!(engine.stats().kv_used_bytes > 0);
        drop(generation);
        idle(&engine).await;
        assert!(engine.stats().kv_cached_bytes > 0);
    }
}

/// While 1,500 tokens of a prompt are computed, who is already being answered gets a token with every part of it.
#[tokio::test]
async fn a_long_prompt_holds_nobody_up_for_longer_than_one_part() {
    let engine = engine(|c| c.prefill_chunk = 128).await;
    let mut running = Vec::new();
    for person in 0..2 {
        let mut generation = engine
            .submit(greedy(user(&format!("Count to {person}")), 2000))
            .unwrap();
        first_token(&mut generation).await;
        running.push(generation);
    }
    let mut long = engine.submit(greedy(words(4, 1500), 1)).unwrap();
    assert!(matches!(
        next(&mut long).await,
        Some(GenerationEvent::Started { cached_tokens: 0, .. })
    ));
    // What had come before the first part was begun.
    for generation in &mut running {
        while generation.events.try_recv().is_ok() {}
    }
    first_token(&mut long).await;
    for generation in &mut running {
        let mut came = 0;
        while let Ok(GenerationEvent::Token { .. }) = generation.events.try_recv() {
            came += 1;
        }
        // Twelve parts. One token may have come with the start, and one is on its way.
        assert!(came >= 10, "{came} tokens during 12 parts");
    }
}

/// Who goes away makes room: in the step after it while being answered, in the part after it while a prompt is computed.
#[tokio::test]
async fn going_away_frees_the_place_within_a_step() {
    let engine = engine(|c| {
        c.max_running = 1;
        c.prefix_cache = false;
        c.prefill_chunk = 64;
    })
    .await;
    let mut first = engine.submit(greedy(user("Count from 1 to 10"), 3000)).unwrap();
    first_token(&mut first).await;
    let second = engine.submit(greedy(user("Say hello"), 1)).unwrap();
    drop(first);
    let before = engine.stats().steps;
    assert_eq!(rest(second).await.tokens.len(), 1);
    idle(&engine).await;
    let steps = engine.stats().steps - before;
    // At most: the one under way, the prompt of the second, and the reading of each.
    assert!(steps <= 4, "{steps} steps");

    let mut long = engine.submit(greedy(words(6, 1500), 10)).unwrap();
    assert!(matches!(
        next(&mut long).await,
        Some(GenerationEvent::Started { .. })
    ));
    drop(long);
    let before = engine.stats().prefill_tokens;
    idle(&engine).await;
    let computed = engine.stats().prefill_tokens - before;
    // The part under way, and the one that was planned when nobody had gone yet.
    assert!(computed <= 2 * 64, "{computed} tokens");
}

/// What the cache has no room for is refused with the numbers, and a reply that would outgrow it ends there.
#[tokio::test]
async fn the_cache_is_kept() {
    let engine = engine(|c| c.max_blocks = Some(8)).await;
    let tokens = 8 * BLOCK;
    assert!(engine.info().context_length > tokens);
    assert_eq!(
        (engine.info().kv_capacity_tokens, engine.info().most_tokens()),
        (tokens, tokens)
    );
    for length in [tokens, tokens + 1, 2000] {
        let refused = engine.submit(greedy(vec![300; length], 1)).unwrap_err();
        let SubmitError::NeverFits(message) = &refused else {
            panic!("{refused:?}")
        };
        for part in [
            format!("has {length} tokens"),
            format!("holds {tokens} tokens"),
            "--cache-memory-mb".to_owned(),
        ] {
            assert!(message.contains(&part), "{part} is not in {message}");
        }
    }
    let reply = ask(&engine, greedy(words(7, tokens - 6), 100)).await;
    let (reason, usage) = reply.end.unwrap();
    assert_eq!((reason, usage.completion_tokens), (FinishReason::Length, 6));
}

/// The model's positions cannot be exceeded.
#[tokio::test]
async fn the_context_length_is_kept() {
    let engine = engine(|c| c.context_length = Some(256)).await;
    assert_eq!(engine.info().context_length, 256);
    for length in [256, 257, 40_013] {
        let refused = engine.submit(greedy(vec![300; length], 1)).unwrap_err();
        let SubmitError::TooLong {
            prompt_tokens,
            context_length,
        } = refused
        else {
            panic!("{refused:?}")
        };
        assert_eq!((prompt_tokens, context_length), (length, 256));
    }
    let reply = ask(&engine, greedy(words(7, 250), 100)).await;
    let (reason, usage) = reply.end.unwrap();
    assert_eq!(reason, FinishReason::Length);
    assert_eq!((reply.tokens.len(), usage.completion_tokens), (6, 6));
}

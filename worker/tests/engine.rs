//! The engine on a tiny model: places, the end, log-probabilities.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    missing_docs
)]

use std::path::Path;
use std::time::Duration;

use kv_cache::KvQuantization;
use mlxworker::backend::{
    Backend, EngineError, EngineState, GenerateRequest, Generation, GenerationEvent, SamplingParams,
    SubmitError,
};
use mlxworker::engine::{Dequantize, Engine, EngineConfig};
use tokio::time::timeout;

const VOCAB: usize = 128;

async fn engine(max_running: usize, max_waiting: usize) -> Engine {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/parity/dense-f32-tied");
    let config = EngineConfig {
        max_running,
        max_waiting,
        prefill_chunk: 16,
        ..EngineConfig::new(folder)
    };
    Engine::start(config, |_| {}).await.unwrap()
}

fn request(max_tokens: usize, logprobs: Option<usize>) -> GenerateRequest {
    GenerateRequest {
        prompt: (1..40).collect(),
        max_tokens,
        sampling: SamplingParams::greedy(),
        stop_tokens: Vec::new(),
        logprobs,
        constraint: None,
    }
}

async fn all(mut generation: Generation) -> Vec<GenerationEvent> {
    let mut events = Vec::new();
    while let Some(event) = timeout(Duration::from_secs(30), generation.events.recv())
        .await
        .expect("in time")
    {
        events.push(event);
    }
    events
}

/// A reply that goes on for long enough to hold its place.
async fn running(engine: &Engine) -> Generation {
    let mut generation = engine.submit(request(400, None)).unwrap();
    let first = timeout(Duration::from_secs(30), generation.events.recv())
        .await
        .expect("in time");
    assert!(
        matches!(first, Some(GenerationEvent::Started { .. })),
        "{first:?}"
    );
    generation
}

/// Waits until the engine has `running` and `waiting` requests.
async fn settled(engine: &Engine, running: usize, waiting: usize) {
    let reached = async {
        while (engine.stats().running, engine.stats().waiting) != (running, waiting) {
            tokio::task::yield_now().await;
        }
    };
    timeout(Duration::from_secs(30), reached).await.expect("in time");
}

#[tokio::test]
async fn logprobs_with_and_without_the_likeliest() {
    let engine = engine(1, 1).await;
    for count in [0, 1, 20, VOCAB + 5] {
        let mut seen = 0;
        for event in all(engine.submit(request(3, Some(count))).unwrap()).await {
            let GenerationEvent::Token { id, logprob } = event else {
                continue;
            };
            let logprob = logprob.expect("asked for");
            assert_eq!(logprob.top.len(), count.min(VOCAB));
            assert!(logprob.logprob < 0.0);
            if let Some(&(likeliest, value)) = logprob.top.first() {
                assert_eq!(
                    (likeliest, value),
                    (id, logprob.logprob),
                    "greedy takes the likeliest"
                );
                assert!(logprob.top.is_sorted_by(|a, b| a.1 >= b.1));
            }
            seen += 1;
        }
        assert_eq!(seen, 3);
    }
}

#[tokio::test]
async fn as_many_places_as_may_run_and_wait() {
    let engine = engine(1, 2).await;
    assert_eq!(engine.info().capacity, 3);
    let first = running(&engine).await;
    let waiting = [(); 2].map(|()| engine.submit(request(400, None)).unwrap());
    settled(&engine, 1, 2).await;
    let refused = engine.submit(request(1, None)).unwrap_err();
    assert!(
        matches!(refused, SubmitError::QueueFull { waiting: 2, .. }),
        "{refused:?}"
    );

    // Whoever goes away frees a place: from the queue, and while running.
    let [second, third] = waiting;
    drop(second);
    settled(&engine, 1, 1).await;
    drop(first);
    settled(&engine, 1, 0).await;
    assert!(engine.submit(request(1, None)).is_ok());
    drop(third);
    settled(&engine, 0, 0).await;
}

/// Without room to wait, all places to run can still be taken at once.
#[tokio::test]
async fn no_waiting_means_no_waiting() {
    let engine = engine(3, 0).await;
    let replies = [(); 3].map(|()| engine.submit(request(5, None)).unwrap());
    assert!(matches!(
        engine.submit(request(5, None)),
        Err(SubmitError::QueueFull { .. })
    ));
    for reply in replies {
        assert!(matches!(
            all(reply).await.last(),
            Some(GenerationEvent::Finished { .. })
        ));
    }
}

/// A full engine is told to stop: everybody hears of it, running, waiting, or not even looked at yet.
#[tokio::test]
async fn stopping_tells_everybody() {
    let engine = engine(1, 3).await;
    let mut replies = vec![running(&engine).await];
    for _ in 0..3 {
        replies.push(engine.submit(request(400, None)).unwrap());
    }
    engine.stop();
    for reply in replies {
        assert_eq!(
            all(reply).await.last(),
            Some(&GenerationEvent::Failed(EngineError::Stopped))
        );
    }
    let mut state = engine.state();
    let dead = timeout(
        Duration::from_secs(30),
        state.wait_for(|state| *state != EngineState::Running),
    );
    assert!(dead.await.expect("in time").is_ok());
    assert_eq!(engine.submit(request(1, None)).unwrap_err(), SubmitError::Stopped);
    assert_eq!((engine.stats().running, engine.stats().waiting), (0, 0));
}

fn tokens(events: &[GenerationEvent]) -> Vec<u32> {
    let token = |event: &GenerationEvent| match event {
        GenerationEvent::Token { id, .. } => Some(*id),
        _ => None,
    };
    events.iter().filter_map(token).collect()
}

/// A pool of a few blocks, full of cached prefixes: blocks are shared, evicted, copied and moved, prompts computed in small
/// pieces and again after a preemption. Nobody must be able to tell.
#[tokio::test]
async fn replies_in_a_crowded_cache_are_those_given_alone() {
    let plain = crowded_and_alone(None).await;
    // Quantised keys and values are others, but as much themselves wherever they lie.
    for bits in [8, 4] {
        let group_size = 32;
        let replies = crowded_and_alone(Some(KvQuantization { bits, group_size })).await;
        assert!(
            bits == 8 || replies != plain,
            "4 bits leave nobody's reply as it was"
        );
    }
}

/// What 36 requests are answered alone, which is what they are answered in the crowd.
async fn crowded_and_alone(kv_quantization: Option<KvQuantization>) -> Vec<Vec<u32>> {
    let folder = || Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/parity/dense-f32-tied");
    let alone = EngineConfig {
        max_running: 1,
        max_waiting: 100,
        prefix_cache: false,
        kv_quantization,
        ..EngineConfig::new(folder())
    };
    let crowded = EngineConfig {
        max_running: 4,
        max_waiting: 100,
        prefill_chunk: 16,
        block_size: 4,
        max_blocks: Some(60),
        generation_share: 8,
        kv_quantization,
        ..EngineConfig::new(folder())
    };
    // Some begin alike, some are asked again, and every third one goes on from the one before.
    let mut prompts: Vec<Vec<u32>> = Vec::new();
    for n in 0_u32..36 {
        let own: Vec<u32> = (0..6 + n * 7 % 31)
            .map(|at| (n * 13 + at * at + 3 * at) % VOCAB as u32)
            .collect();
        prompts.push(match n % 6 {
            2 => [prompts[n as usize - 1].clone(), own].concat(),
            3 => (1..20).chain(own).collect(),
            4 => prompts[n as usize - 3].clone(),
            _ => own,
        });
    }
    let requests = || {
        prompts.iter().zip(0_usize..).map(|(prompt, n)| GenerateRequest {
            prompt: prompt.clone(),
            max_tokens: 5 + n * 11 % 60,
            ..request(1, None)
        })
    };
    let (mut replies, mut cached, mut preempted) = (Vec::new(), Vec::new(), Vec::new());
    for config in [alone, crowded] {
        let engine = Engine::start(config, |_| {}).await.unwrap();
        let generations: Vec<Generation> = requests()
            .map(|request| engine.submit(request).unwrap())
            .collect();
        let mut all_of_it = Vec::new();
        for generation in generations {
            all_of_it.push(tokens(&all(generation).await));
        }
        replies.push(all_of_it);
        cached.push(engine.stats().cache.cached_tokens);
        preempted.push(engine.stats().preempted);
    }
    assert!(cached[0] == 0 && cached[1] > 100, "{cached:?}");
    assert!(preempted[0] == 0 && preempted[1] > 0, "{preempted:?}");
    for (n, (alone, crowded)) in replies[0].iter().zip(&replies[1]).enumerate() {
        assert_eq!(alone.len(), 5 + n * 11 % 60);
        assert_eq!(alone, crowded, "request {n}, {kv_quantization:?}");
    }
    replies.swap_remove(0)
}

/// Kernels of our own are for GPUs: without one the reference path decodes, and `/status` says why.
#[tokio::test]
async fn without_a_gpu_the_reference_path_decodes() {
    let engine = engine(2, 2).await;
    let decoding = &engine.info().limits["decoding"];
    if mlx_ext::Language::of_device().unwrap().is_none() {
        assert_eq!(decoding["path"], "reference");
        assert!(decoding["reason"].as_str().unwrap().contains("CPU"), "{decoding}");
    } else {
        assert!(decoding["error"].as_f64().unwrap() < 0.1, "{decoding}");
    }
    let events = all(engine.submit(request(4, None)).unwrap()).await;
    assert!(
        matches!(events.last(), Some(GenerationEvent::Finished { .. })),
        "{events:?}"
    );
}

/// The warm-up touches no more blocks than there are.
#[tokio::test]
async fn places_for_more_than_the_cache_has_blocks() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/parity/dense-f32-tied");
    let config = EngineConfig {
        max_running: 40,
        max_blocks: Some(3),
        prefill_chunk: 16,
        ..EngineConfig::new(folder)
    };
    let engine = Engine::start(config, |_| {}).await.unwrap();
    assert_eq!(engine.info().kv_capacity_tokens, 3 * 32);
    let events = all(engine.submit(request(20, None)).unwrap()).await;
    assert!(
        matches!(events.last(), Some(GenerationEvent::Finished { usage, .. }) if usage.completion_tokens == 20),
        "{events:?}"
    );
}

/// When to come back is foretold from how places have been given back.
#[tokio::test]
async fn a_full_queue_says_when_to_come_back() {
    let engine = engine(1, 0).await;
    let refused = |engine: &Engine| match engine.submit(request(1, None)) {
        Err(SubmitError::QueueFull { retry_after, .. }) => retry_after,
        other => panic!("{other:?}"),
    };
    let first = running(&engine).await;
    assert_eq!(refused(&engine), Duration::from_secs(5), "nobody knows yet");
    drop(first);
    settled(&engine, 0, 0).await;
    for _ in 0..8 {
        all(engine.submit(request(2, None)).unwrap()).await;
        settled(&engine, 0, 0).await;
    }
    let busy = running(&engine).await;
    assert_eq!(
        refused(&engine),
        Duration::from_secs(1),
        "short ones have ended one after the other"
    );
    drop(busy);
}

/// Half-precision tensors at even addresses that are no multiples of four can be used where they are, packed integers cannot:
/// the whole file and copies are held, and so they are planned.
#[tokio::test]
async fn weights_that_lie_twice_in_memory_are_planned_twice() {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/parity/dense-4bit-untied");
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    let file = folder.path().join("model.safetensors");
    let packed = to_half_and_shift(&file);
    let length = std::fs::metadata(&file).unwrap().len();
    let config = EngineConfig {
        dequantize: Dequantize::Off,
        ..EngineConfig::new(folder.path().to_path_buf())
    };
    let engine = Engine::start(config, |_| {}).await.unwrap();
    let limit = |name: &str| engine.info().limits[name].as_u64().unwrap();
    assert_eq!(limit("weights_copied_bytes"), packed);
    assert!(limit("weights_mapped_bytes") > 0);
    assert!(
        limit("weight_bytes") >= length + packed,
        "{} planned; the file's {length} are held, and {packed} copied",
        limit("weight_bytes")
    );
}

/// Makes all floats of a safetensors file bfloat16, puts packed integers first, and lets the data begin at an address that is
/// 2 more than a multiple of 4. Gives the bytes of packed integers.
fn to_half_and_shift(file: &Path) -> u64 {
    let bytes = std::fs::read(file).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let mut tensors: Vec<_> = header
        .into_iter()
        .filter(|(name, _)| name != "__metadata__")
        .collect();
    tensors.sort_by_key(|(_, tensor)| tensor["dtype"] != "U32");
    let (mut data, mut packed) = (Vec::new(), 0);
    for (_, tensor) in &mut tensors {
        let place = |end: usize| tensor["data_offsets"][end].as_u64().unwrap() as usize;
        let old = &bytes[8 + length..][place(0)..place(1)];
        let start = data.len();
        if tensor["dtype"] == "U32" {
            data.extend(old);
            packed += old.len() as u64;
        } else {
            data.extend(old.chunks(4).flat_map(|float| [float[2], float[3]]));
            tensor["dtype"] = "BF16".into();
        }
        tensor["data_offsets"] = serde_json::json!([start, data.len()]);
    }
    let map: serde_json::Map<String, serde_json::Value> = tensors.into_iter().collect();
    let mut header = serde_json::Value::Object(map).to_string();
    while (8 + header.len()) % 4 != 2 {
        header.push(' ');
    }
    let mut changed = (header.len() as u64).to_le_bytes().to_vec();
    changed.extend(header.bytes());
    changed.extend(data);
    std::fs::write(file, changed).unwrap();
    packed
}

/// Whoever may not end yet draws something else, one step ahead and after a preemption too; nobody beside it can tell.
#[tokio::test]
async fn the_end_is_put_off_for_who_asked_for_that() {
    const STOP: u32 = 7;
    let asked = |first: u32, min_tokens: usize, sampling: SamplingParams| GenerateRequest {
        prompt: (first..first + 39).collect(),
        stop_tokens: vec![STOP, 9],
        sampling: SamplingParams {
            min_tokens,
            ..sampling
        },
        ..request(60, None)
    };
    let ending = SamplingParams {
        logit_bias: vec![(STOP, 100.0), (9, 90.0)],
        ..SamplingParams::greedy()
    };
    let hot = SamplingParams {
        temperature: 1.0,
        seed: Some(3),
        presence_penalty: 1.0,
        ..SamplingParams::greedy()
    };
    let free = GenerateRequest {
        stop_tokens: Vec::new(),
        ..asked(4, 60, SamplingParams::greedy())
    };
    let requests = [
        asked(1, 20, ending.clone()),
        asked(2, 0, ending.clone()),
        asked(3, 30, ending),
        free,
        asked(5, 0, hot.clone()),
        asked(6, 40, hot),
    ];
    let start = async |max_running: usize, max_blocks: Option<usize>| {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/parity/dense-f32-tied");
        let config = EngineConfig {
            max_running,
            max_waiting: 8,
            prefill_chunk: 16,
            block_size: 4,
            prefix_cache: false,
            max_blocks,
            generation_share: 1,
            ..EngineConfig::new(folder)
        };
        Engine::start(config, |_| {}).await.unwrap()
    };
    let without_start = |mut events: Vec<GenerationEvent>| {
        events.retain(|event| !matches!(event, GenerationEvent::Started { .. }));
        events
    };
    let solo = start(1, None).await;
    let mut alone = Vec::new();
    for request in &requests {
        alone.push(without_start(all(solo.submit(request.clone()).unwrap()).await));
    }
    drop(solo);
    let length = |events: &[GenerationEvent]| events.len() - 1;
    assert_eq!([0, 1, 2, 3].map(|at: usize| length(&alone[at])), [20, 0, 30, 60]);
    assert!(length(&alone[5]) >= 40);
    for events in &alone {
        let ends = |event: &GenerationEvent| matches!(event, GenerationEvent::Token { id: STOP | 9, .. });
        assert!(events.len() == 61 || !events.iter().any(ends), "{events:?}");
    }
    for max_blocks in [None, Some(68)] {
        let engine = start(6, max_blocks).await;
        let together: Vec<Generation> = requests
            .iter()
            .map(|request| engine.submit(request.clone()).unwrap())
            .collect();
        for (at, (generation, alone)) in together.into_iter().zip(&alone).enumerate() {
            assert_eq!(without_start(all(generation).await), *alone, "request {at}");
        }
        assert_eq!(engine.stats().preempted > 0, max_blocks.is_some());
    }
}

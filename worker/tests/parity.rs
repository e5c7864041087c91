//! The same numbers as MLX's Python reference (mlx-lm): scores after the prompt within 1e-3, and 64 greedy tokens equal,
//! through the engine as a request sees it. `parity/make.py` says how the fixtures were made.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    missing_docs
)]

use std::path::{Path, PathBuf};

use mlx_rs::Array;
use mlxworker::backend::{Backend, FinishReason, GenerateRequest, GenerationEvent, SamplingParams};
use mlxworker::engine::{Engine, EngineConfig};
use mlxworker::model::Model;
use serde::Deserialize;

#[derive(Deserialize)]
struct Expected {
    prompt: Vec<u32>,
    logits: Vec<f32>,
    greedy: Vec<u32>,
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/parity")
}

/// Every fixture: name, the model's folder, what is expected.
fn all() -> Vec<(String, PathBuf, Expected)> {
    let read = |file: &Path| serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
    let mut found: Vec<_> = std::fs::read_dir(fixtures())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_dir())
        .map(|folder| {
            let name = folder.file_name().unwrap().to_string_lossy().into_owned();
            let expected = read(&folder.join("expected.json"));
            (name, folder, expected)
        })
        .collect();
    assert!(found.len() >= 12, "only {} fixtures", found.len());
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo/model");
    found.push(("demo".to_owned(), demo, read(&fixtures().join("demo.json"))));
    found
}

/// Largest difference, relative to the largest score.
fn distance(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let scale = expected.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
    found
        .iter()
        .zip(expected)
        .fold(0.0_f32, |most, (a, b)| most.max((a - b).abs()))
        / scale
}

#[test]
fn scores_after_the_prompt() {
    let (mut views, mut copies) = (0, 0);
    for (name, folder, expected) in all() {
        for mapped in [true, false] {
            let model = Model::load(&folder, mapped, &mut |_| {}).unwrap();
            let storage = model.storage();
            assert!(mapped || storage.mapped_bytes == 0, "{name}");
            views += storage.mapped_bytes;
            copies += storage.copied_bytes;
            // In one piece and in uneven chunks: the cache must not show.
            for chunk in [expected.prompt.len(), 37] {
                let mut cache = model.new_cache();
                let mut hidden = None;
                for tokens in expected.prompt.chunks(chunk) {
                    let tokens = Array::from_slice(tokens, &[1, tokens.len() as i32]);
                    hidden = Some(model.forward(&tokens, &mut cache).unwrap());
                }
                assert_eq!(cache.length(), expected.prompt.len());
                let logits = model
                    .last_logits(&hidden.unwrap())
                    .unwrap()
                    .to_vec_cast::<f32>()
                    .unwrap();
                let distance = distance(&logits, &expected.logits);
                assert!(
                    distance < 1e-3,
                    "{name}, mapped {mapped}, chunks of {chunk}: off by {distance}"
                );
            }
        }
    }
    assert!(
        views > 0 && copies > 0,
        "both ways must have been taken: {views} and {copies} bytes"
    );
}

async fn engine(folder: &Path, max_running: usize) -> Engine {
    let config = EngineConfig {
        max_running,
        prefill_chunk: 64,
        ..EngineConfig::new(folder.to_path_buf())
    };
    Engine::start(config, |_| {}).await.unwrap()
}

fn greedy(prompt: &[u32]) -> GenerateRequest {
    GenerateRequest {
        prompt: prompt.to_vec(),
        max_tokens: 64,
        sampling: SamplingParams::greedy(),
        stop_tokens: Vec::new(),
        logprobs: None,
    }
}

async fn tokens(engine: &Engine, request: GenerateRequest) -> Vec<u32> {
    let mut generation = engine.submit(request).unwrap();
    let mut found = Vec::new();
    loop {
        match generation.events.recv().await.expect("an end") {
            GenerationEvent::Started { .. } => {}
            GenerationEvent::Token { id, .. } => found.push(id),
            GenerationEvent::Finished { reason, usage } => {
                assert_eq!(reason, FinishReason::Length);
                assert_eq!(usage.completion_tokens, found.len());
                return found;
            }
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn greedy_tokens() {
    for (name, folder, expected) in all() {
        let engine = engine(&folder, 2).await;
        assert_eq!(
            tokens(&engine, greedy(&expected.prompt)).await,
            expected.greedy,
            "{name}"
        );
    }
}

/// Greedy requests beside hot ones, more of them than places: none notices the others.
#[tokio::test]
async fn greedy_tokens_in_company() {
    let (_, folder, expected) = all()
        .into_iter()
        .find(|(name, ..)| name == "moe-4bit-tied")
        .unwrap();
    let engine = engine(&folder, 3).await;
    let hot = |seed| {
        let sampling = SamplingParams {
            temperature: 1.5,
            top_p: 0.95,
            seed: Some(seed),
            ..SamplingParams::greedy()
        };
        GenerateRequest {
            sampling,
            ..greedy(&expected.prompt)
        }
    };
    let alone = tokens(&engine, hot(1)).await;
    assert_ne!(alone, expected.greedy);
    let (a, b, c, d, e) = tokio::join!(
        tokens(&engine, hot(1)),
        tokens(&engine, greedy(&expected.prompt)),
        tokens(&engine, hot(2)),
        tokens(&engine, greedy(&expected.prompt)),
        tokens(&engine, hot(1)),
    );
    assert_eq!((&a, &e), (&alone, &alone));
    assert_eq!((&b, &d), (&expected.greedy, &expected.greedy));
    assert_ne!(c, alone);
}

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
use mlx_rs::transforms::eval;
use mlxworker::backend::{Backend, FinishReason, GenerateRequest, GenerationEvent, SamplingParams};
use mlxworker::engine::{Dequantize, Engine, EngineConfig};
use mlxworker::model::kv::{Chunk, Span};
use mlxworker::model::{LoadOptions, Model};
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
            let options = LoadOptions {
                mapped,
                expand: false,
            };
            let model = Model::load(&folder, options, &mut |_| {}).unwrap();
            let storage = model.storage();
            assert!(mapped || storage.mapped_bytes == 0, "{name}");
            views += storage.mapped_bytes;
            copies += storage.copied_bytes;
            // In one piece and in uneven chunks, in one place and in several: the cache must not show.
            let length = expected.prompt.len() as i32;
            let whole = vec![Span { start: 5, length }];
            let pieces = vec![
                Span {
                    start: 200,
                    length: 16,
                },
                Span {
                    start: 100,
                    length: 8,
                },
                Span {
                    start: 300,
                    length: length - 24,
                },
            ];
            for (chunk, places) in [
                (expected.prompt.len(), &whole),
                (37, &whole),
                (expected.prompt.len(), &pieces),
                (11, &pieces),
            ] {
                let kv = model.new_kv(300 + length, None).unwrap();
                let mut hidden = None;
                for (tokens, start) in expected.prompt.chunks(chunk).zip((0..).step_by(chunk)) {
                    let end = start + tokens.len() as i32;
                    let (writes, reads) = (part(places, start, end), part(places, 0, end));
                    let chunk = Chunk {
                        start,
                        writes: &writes,
                        reads: &reads,
                    };
                    let tokens = Array::from_slice(tokens, &[1, tokens.len() as i32]);
                    let (last, written) = model.prefill(&tokens, &chunk, &kv).unwrap();
                    eval(&written).unwrap();
                    hidden = Some(last);
                }
                let logits = model
                    .last_logits(&hidden.unwrap())
                    .unwrap()
                    .to_vec_cast::<f32>()
                    .unwrap();
                let distance = distance(&logits, &expected.logits);
                assert!(
                    distance < 1e-3,
                    "{name}, mapped {mapped}, chunks of {chunk}, {places:?}: off by {distance}"
                );
            }
        }
    }
    assert!(
        views > 0 && copies > 0,
        "both ways must have been taken: {views} and {copies} bytes"
    );
}

/// The part of `places` that holds the tokens `start..end`.
fn part(places: &[Span], start: i32, end: i32) -> Vec<Span> {
    let mut before = 0;
    let mut found = Vec::new();
    for span in places {
        let (from, to) = (start.max(before), end.min(before + span.length));
        if from < to {
            found.push(Span {
                start: span.start + from - before,
                length: to - from,
            });
        }
        before += span.length;
    }
    found
}

async fn engine(folder: &Path, max_running: usize, dequantize: Dequantize) -> Engine {
    let config = EngineConfig {
        max_running,
        prefill_chunk: 64,
        dequantize,
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
        constraint: None,
    }
}

async fn tokens(engine: &Engine, request: GenerateRequest) -> Vec<u32> {
    let mut generation = engine.submit(request).unwrap();
    let mut found = Vec::new();
    loop {
        match generation.events.recv().await.expect("an end") {
            GenerationEvent::Started { .. } | GenerationEvent::Reused { .. } => {}
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
        for dequantize in [Dequantize::Off, Dequantize::On] {
            let engine = engine(&folder, 2, dequantize).await;
            assert_eq!(
                tokens(&engine, greedy(&expected.prompt)).await,
                expected.greedy,
                "{name}, {dequantize:?}"
            );
        }
    }
}

/// Greedy requests beside hot ones, more of them than places: none notices the others.
#[tokio::test]
async fn greedy_tokens_in_company() {
    let (_, folder, expected) = all()
        .into_iter()
        .find(|(name, ..)| name == "moe-4bit-tied")
        .unwrap();
    let engine = engine(&folder, 3, Dequantize::Auto).await;
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

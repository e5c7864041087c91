//! A model in half precision, which GPUs compute by other ways than single precision.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    missing_docs
)]

use std::path::Path;
use std::time::Duration;

use mlxworker::backend::{Backend, GenerateRequest, GenerationEvent, SamplingParams};
use mlxworker::engine::{AttentionChoice, Dequantize, Engine, EngineConfig};
use tokio::time::timeout;

const VOCAB: usize = 128;

/// The model's numbers as bfloat16.
fn halved(folder: &Path) {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/parity/dense-f32-tied");
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, folder.join(path.file_name().unwrap())).unwrap();
    }
    let file = folder.join("model.safetensors");
    let bytes = std::fs::read(&file).unwrap();
    let length = usize::try_from(u64::from_le_bytes(bytes[..8].try_into().unwrap())).unwrap();
    let mut header: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    for (_, tensor) in header.iter_mut().filter(|(name, _)| *name != "__metadata__") {
        assert_eq!(tensor["dtype"], "F32");
        tensor["dtype"] = "BF16".into();
        for end in tensor["data_offsets"].as_array_mut().unwrap() {
            *end = (end.as_u64().unwrap() / 2).into();
        }
    }
    let header = serde_json::Value::Object(header).to_string();
    let halves = bytes[8 + length..]
        .chunks(4)
        .flat_map(|float| [float[2], float[3]]);
    let mut changed = (header.len() as u64).to_le_bytes().to_vec();
    changed.extend(header.bytes());
    changed.extend(halves);
    std::fs::write(&file, changed).unwrap();
}

/// Cached tokens, and the log-probabilities of the first token after the prompt by token.
async fn first(engine: &Engine, prompt: Vec<u32>) -> (usize, Vec<f32>) {
    let request = GenerateRequest {
        prompt,
        max_tokens: 1,
        sampling: SamplingParams::greedy(),
        stop_tokens: Vec::new(),
        logprobs: Some(VOCAB),
        constraint: None,
    };
    let mut events = engine.submit(request).unwrap().events;
    let (mut cached, mut scores) = (0, vec![f32::NAN; VOCAB]);
    while let Some(event) = timeout(Duration::from_secs(60), events.recv())
        .await
        .expect("in time")
    {
        match event {
            GenerationEvent::Started { cached_tokens, .. } | GenerationEvent::Reused { cached_tokens } => {
                cached = cached_tokens;
            }
            GenerationEvent::Token { logprob, .. } => {
                for (id, score) in logprob.unwrap().top {
                    scores[id as usize] = score;
                }
            }
            _ => {}
        }
    }
    (cached, scores)
}

/// A prompt that is asked again computes one token, whose query looks back on keys in the middle of the cache; in a cache whose
/// length looks like another program's (a multiple of 256 positions) too.
#[tokio::test]
async fn a_prompt_asked_again_looks_back_on_its_own_keys() {
    let folder = tempfile::tempdir().unwrap();
    halved(folder.path());
    let config = EngineConfig {
        dequantize: Dequantize::Off,
        attention: AttentionChoice::Reference,
        max_blocks: Some(16),
        ..EngineConfig::new(folder.path().to_path_buf())
    };
    let engine = Engine::start(config, |_| {}).await.unwrap();
    assert_eq!(engine.info().kv_capacity_tokens % 256, 0);
    let prompt = |length: u32, seed: u32| {
        (0..length)
            .map(|n| (n * n + 7 * n + seed) % 127 + 1)
            .collect::<Vec<_>>()
    };
    first(&engine, prompt(70, 3)).await;
    let (cached, new) = first(&engine, prompt(300, 11)).await;
    assert_eq!(cached, 0);
    let (cached, again) = first(&engine, prompt(300, 11)).await;
    assert_eq!(cached, 299);
    let differences = new.iter().zip(&again).map(|(new, again)| (new - again).abs());
    let most = differences.fold(
        0.0,
        |most: f32, difference| if difference <= most { most } else { difference },
    );
    assert!(most < 0.1, "{most} between the log-probabilities");
}

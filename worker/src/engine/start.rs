//! From a configuration to an engine that has run: model, memory, warm-up.

use std::time::Duration;

use kv_cache::{BlockId, CacheConfig, SeqId, SlotRun};
use mlx_rs::error::Exception;
use scheduler::Scheduler;

use super::sampler::Sampler;
use super::stepper::{DecodeRow, Stepper};
use super::{Dequantize, EngineConfig, StartError, limits};
use crate::backend::{ModelInfo, SamplingParams};
use crate::model::{LoadOptions, LoadProgress, Model};

/// What the engine's loop is made of.
pub(super) struct Parts {
    pub(super) most_tokens: usize,
    pub(super) max_wait: Option<Duration>,
    pub(super) scheduler: Scheduler,
    pub(super) stepper: Stepper,
}

fn warm_up_error(error: Exception) -> StartError {
    StartError::WarmUp(error.what().to_owned())
}

/// Loads the model and warms it up.
pub(super) fn start(
    config: EngineConfig,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<(Parts, ModelInfo), StartError> {
    let runtime = mlx_ext::runtime().map_err(warm_up_error)?;
    tracing::info!(
        version = runtime.version,
        device = runtime.device,
        blas = runtime.cpu_blas,
        "MLX"
    );
    mlx_rs::memory::set_cache_limit(config.buffer_cache_bytes).map_err(warm_up_error)?;

    let options = LoadOptions {
        mapped: config.mapped,
        expand: expand(&config, runtime.device)?,
    };
    let model = Model::load(&config.model, options, progress)?;
    let known = model.config().max_positions;
    let context_length = match config.context_length {
        Some(asked) if asked > known => return Err(StartError::Context { asked, known }),
        Some(asked) => asked,
        None => known,
    };
    let cache = cache(&config, &model, context_length)?;
    let positions = i32::try_from(cache.capacity_tokens()).map_err(|_| {
        StartError::WarmUp(format!(
            "{} positions of KV are too many",
            cache.capacity_tokens()
        ))
    })?;
    let info = ModelInfo {
        architecture: model.config().model_type.clone(),
        context_length,
        vocab_size: usize::try_from(model.config().vocab).unwrap_or_default(),
        weight_bytes: model.weight_bytes(),
        capacity: config.capacity(),
        kv_capacity_tokens: cache.capacity_tokens(),
        kv_capacity_bytes: cache.block_bytes().saturating_mul(cache.total_blocks as u64),
        limits: limits(&config, &cache, context_length, options, model.storage()),
    };
    let mut stepper = Stepper::new(model, positions, cache.block_size).map_err(warm_up_error)?;
    warm_up(&mut stepper, &config, cache.total_blocks).map_err(warm_up_error)?;
    let most_tokens = context_length.min(cache.capacity_tokens());
    let scheduler = Scheduler::new(scheduler::Config {
        cache,
        context_length,
        max_running: config.max_running,
        prefill_chunk: config.prefill_chunk,
        step_budget: config.step_budget,
        max_wait: config.max_wait,
    })
    .map_err(|error| StartError::WarmUp(error.to_string()))?;
    let parts = Parts {
        most_tokens,
        max_wait: config.max_wait,
        scheduler,
        stepper,
    };
    Ok((parts, info))
}

/// Whether weights are expanded to float32: on a CPU, unless they then take more than an eighth of the memory.
fn expand(config: &EngineConfig, device: &str) -> Result<bool, StartError> {
    match config.dequantize {
        _ if device != "cpu" => Ok(false),
        Dequantize::Off => Ok(false),
        Dequantize::On => Ok(true),
        Dequantize::Auto => {
            // Two bits a weight are the fewest that MLX packs.
            let most = crate::model::weights::bytes(&config.model)?.saturating_mul(16);
            Ok(most <= host_bytes()? / 8)
        }
    }
}

fn host_bytes() -> Result<u64, StartError> {
    hostmem::host()
        .map(|host| host.total_bytes)
        .map_err(|error| StartError::WarmUp(format!("reading the machine's memory: {error}")))
}

/// How large the KV cache is.
fn cache(config: &EngineConfig, model: &Model, context_length: usize) -> Result<CacheConfig, StartError> {
    let bytes_per_token = model.kv_shape().bytes_per_token();
    let reserved = match config.kv_bytes {
        Some(bytes) => bytes,
        None => (host_bytes()? / 16).min(8 << 30),
    };
    // More than all that can run at once and as much again four times over would never be looked at.
    let most = (config.max_running.saturating_mul(context_length) as u64)
        .saturating_mul(bytes_per_token)
        .saturating_mul(4);
    let mut cache = CacheConfig::for_pool(reserved.min(most), bytes_per_token, config.block_size);
    cache.prefix_cache = config.prefix_cache;
    if let Some(most) = config.max_blocks {
        cache.total_blocks = cache.total_blocks.min(most);
    }
    Ok(cache)
}

/// A real prefill and two decodes, greedy and sampled, alone and together: kernels are compiled and weights touched before
/// anybody waits for it, and a model that cannot run is found before the port is announced.
fn warm_up(stepper: &mut Stepper, config: &EngineConfig, blocks: usize) -> Result<(), Exception> {
    let block_size = config.block_size;
    let most = config
        .prefill_chunk
        .min(blocks.saturating_mul(block_size) / 2)
        .saturating_sub(2);
    let prompt = vec![0_u32; most.clamp(1, 64)];
    let each = (prompt.len() + 2).div_ceil(block_size);
    let params = [0.0, 0.7].map(|temperature| SamplingParams {
        temperature,
        top_p: 0.9,
        ..SamplingParams::greedy()
    });
    let mut samplers: Vec<Sampler> = params
        .into_iter()
        .map(|params| Sampler::new(params, &prompt, None))
        .collect();
    let block = |index: usize| {
        u32::try_from(index)
            .map(BlockId)
            .map_err(|_| Exception::custom("too many blocks"))
    };
    // Whatever stands in these blocks afterwards, nobody will read it.
    let tables = (0..samplers.len())
        .map(|row| {
            (row * each..(row + 1) * each)
                .map(block)
                .collect::<Result<Vec<_>, _>>()
        })
        .collect::<Result<Vec<_>, _>>()?;
    stepper.begin();
    for ((row, table), sampler) in (0..).zip(&tables).zip(&mut samplers) {
        let mut left = prompt.len();
        let runs: Vec<SlotRun> = table
            .iter()
            .map_while(|&block| {
                let len = left.min(block_size);
                left -= len;
                (len > 0).then_some(SlotRun {
                    block,
                    offset: 0,
                    len,
                })
            })
            .collect();
        stepper.prefill(SeqId(row), &prompt, 0, &runs, table, Some((sampler, None)))?;
    }
    for step in 0..2 {
        stepper.begin();
        let position = prompt.len() + step;
        let rows = (0..)
            .zip(&tables)
            .map(|(row, table)| {
                let slot = table
                    .get(position / block_size)
                    .map(|&block| (block, position % block_size));
                Ok(DecodeRow {
                    id: SeqId(row),
                    position,
                    slot: slot.ok_or_else(|| Exception::custom("a table too short"))?,
                    table,
                })
            })
            .collect::<Result<Vec<_>, Exception>>()?;
        let mut samplers: Vec<&mut Sampler> = samplers.iter_mut().collect();
        stepper.decode(&rows, &mut samplers)?;
        for (_, read) in stepper.read() {
            read?;
        }
    }
    stepper.begin();
    for (_, read) in stepper.read() {
        read?;
    }
    stepper.clear();
    Ok(())
}

//! From a configuration to an engine that has run: model, memory, warm-up.

use std::time::Duration;

use kv_cache::{CacheConfig, KvQuantization};
use mlx_rs::error::Exception;
use scheduler::Scheduler;

use super::memory::{
    DeviceFacts, DeviceKind, MemoryFacts, MemoryPlan, MemoryWishes, StepShape, wished_blocks,
};
use super::stepper::Stepper;
use super::warm_up::{MOST_WARM_ROWS, Steps, warm_steps, warm_up};
use super::{AttentionChoice, Dequantize, EngineConfig, StartError, device, limits};
use crate::backend::ModelInfo;
use crate::model::config::ModelConfig;
use crate::model::weights::WeightFile;
use crate::model::{LoadOptions, LoadProgress, Model};

/// Fewest bytes of kept buffers, however small the model's steps are.
const BUFFERS_LEAST: u64 = 64 << 20;

/// What the engine's loop is made of.
pub(super) struct Parts {
    pub(super) most_tokens: usize,
    pub(super) max_wait: Option<Duration>,
    pub(super) scheduler: Scheduler,
    pub(super) stepper: Stepper,
    /// What the device reads the weights from, as long as it computes.
    pub(super) weight_files: Vec<WeightFile>,
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
    for variable in [device::MAX_OPS_PER_BUFFER, device::MAX_MB_PER_BUFFER] {
        if let Some(value) = device::setting(variable) {
            tracing::info!("{variable}={value}");
        }
    }
    blas_threads(runtime.device);
    let device = device::facts().map_err(warm_up_error)?;
    let model_config = ModelConfig::read(&config.model.join("config.json"))?;
    let known = model_config.max_positions;
    let context_length = match config.context_length {
        Some(asked) if asked > known => return Err(StartError::Context { asked, known }),
        Some(asked) => asked,
        None => known,
    };
    if let Some(KvQuantization { group_size, .. }) = config.kv_quantization
        && model_config.head_dim % i32::from(group_size) != 0
    {
        return Err(StartError::KvGroupSize {
            group_size,
            head_size: model_config.head_dim,
        });
    }
    let weights = weights(&config, &model_config, &device)?;
    // Before anything is loaded: what cannot fit is refused in a moment, not after minutes.
    let wishes = MemoryWishes {
        utilization: config.memory_utilization,
        kv_bytes: kv_bytes(&config, &device),
        max_running: config.max_running,
        max_blocks: config.max_blocks,
        block_size: config.block_size,
        buffer_cache_bytes: config.buffer_cache_bytes as u64,
    };
    let mut shape = step_shape(&config, &model_config, &device, context_length);
    let kv_shape = crate::model::kv_shape(&model_config, weights.element_bytes, config.kv_quantization);
    let mut facts = MemoryFacts {
        device,
        weight_bytes: weights.bytes,
        kv_bytes_per_token: kv_shape.bytes_per_token(),
        kv_quantization: config.kv_quantization,
        step_bytes: 0,
        context_length,
    };
    let gathered = gathered(&model_config, &facts, &wishes);
    // Elsewhere kernels may decode, which copy nothing.
    let always = device.kind == DeviceKind::Cpu
        || config.attention == AttentionChoice::Reference
        || config.kv_quantization.is_some();
    if always {
        shape.gathered = gathered;
    }
    facts.step_bytes = shape.estimate();
    let plan = MemoryPlan::new(&facts, &wishes)?;
    device::apply(&plan).map_err(warm_up_error)?;

    let options = LoadOptions {
        mapped: config.mapped,
        expand: weights.expand,
    };
    let model = Model::load(&config.model, options, progress)?;
    // What the files' sizes do not tell.
    facts.weight_bytes = facts.weight_bytes.max(model.storage().held_bytes);
    let plan = MemoryPlan::new(&facts, &wishes)?;
    let positions = i32::try_from(plan.kv_tokens())
        .map_err(|_| StartError::WarmUp(format!("{} positions of KV are too many", plan.kv_tokens())))?;
    let mut info = ModelInfo {
        architecture: model.config().model_type.clone(),
        context_length,
        vocab_size: usize::try_from(model.config().vocab).unwrap_or_default(),
        weight_bytes: model.weight_bytes(),
        capacity: config.capacity(),
        kv_capacity_tokens: plan.kv_tokens(),
        kv_capacity_bytes: plan.kv_bytes,
        limits: serde_json::Map::new(),
    };
    let storage = model.storage();
    let weight_files = model.device_reads().to_vec();
    let tokens = plan.kv_tokens().min(context_length);
    let mut steps = Steps::new(progress, Model::KERNEL_PIECES + warm_steps(&config, tokens));
    let kernel_rows = (config.attention != AttentionChoice::Reference).then_some(config.max_running);
    let (mut stepper, kernels) = Stepper::new(
        model,
        positions,
        config.block_size,
        config.kv_quantization,
        kernel_rows,
        &mut || steps.next(),
    )
    .map_err(warm_up_error)?;
    if config.attention == AttentionChoice::Kernel && kernels.path != "kernels" {
        return Err(StartError::Attention(kernels.reason));
    }
    steps.reach(Model::KERNEL_PIECES as u64);
    if kernels.path != "kernels" {
        shape.gathered = gathered;
        facts.step_bytes = shape.estimate();
    }
    let before = mlx_rs::memory::active_memory().map_err(warm_up_error)?;
    mlx_rs::memory::reset_peak_memory().map_err(warm_up_error)?;
    warm_up(&mut stepper, &config, tokens, shape.fused_attention, &mut steps).map_err(warm_up_error)?;
    let peak = mlx_rs::memory::peak_memory().map_err(warm_up_error)?;
    // Attention that writes its scores out is not driven to its longest context here, which could take minutes, nor are very
    // many rows, nor rows with contexts of their own to gather.
    let seen = peak.saturating_sub(before) as u64;
    let whole = shape.fused_attention && config.max_running <= MOST_WARM_ROWS && shape.gathered == 0;
    let largest = if whole { seen } else { seen.max(shape.estimate()) };
    // Kept buffers serve the next steps: what several of the largest ones take is plenty, and MLX fills whatever it is given.
    let wishes = MemoryWishes {
        buffer_cache_bytes: wishes
            .buffer_cache_bytes
            .min(largest.saturating_mul(4).max(BUFFERS_LEAST)),
        ..wishes
    };
    let plan = match MemoryPlan::new(&facts, &wishes)? {
        // The estimate stands.
        plan if largest > seen => plan,
        plan => plan.measured(largest)?,
    };
    device::apply(&plan).map_err(warm_up_error)?;
    tracing::info!("memory: {plan}");

    let mut cache = CacheConfig::for_pool(plan.kv_bytes, facts.kv_bytes_per_token, config.block_size);
    cache.prefix_cache = config.prefix_cache;
    cache.generation_share = config.generation_share;
    // The measured plan may have room for fewer; the slabs' rest is never touched then.
    cache.total_blocks = plan.kv_blocks;
    info.kv_capacity_tokens = plan.kv_tokens();
    info.kv_capacity_bytes = plan.kv_bytes;
    info.limits = limits(&config, &plan, context_length, options, storage);
    info.limits.insert(
        "decoding".to_owned(),
        serde_json::to_value(kernels).unwrap_or_default(),
    );
    let most_tokens = context_length.min(cache.capacity_tokens());
    let scheduler = Scheduler::new(scheduler::Config {
        cache,
        context_length,
        max_running: config.max_running,
        prefill_chunk: config.prefill_chunk,
        step_budget: config.step_budget,
        compact_decodes: !stepper.has_kernels(),
        max_wait: config.max_wait,
    })
    .map_err(|error| StartError::WarmUp(error.to_string()))?;
    let parts = Parts {
        most_tokens,
        max_wait: config.max_wait,
        scheduler,
        stepper,
        weight_files,
    };
    Ok((parts, info))
}

/// What was asked for the KV cache: bytes, or a share of the memory that its default is taken from too.
fn kv_bytes(config: &EngineConfig, device: &DeviceFacts) -> Option<u64> {
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss
    )]
    let share = |share: f64| (device.memory_bytes as f64 * share) as u64;
    config.kv_bytes.or_else(|| config.kv_share.map(share))
}

/// On the CPU, matrices get half of the cores unless `OPENBLAS_NUM_THREADS` says otherwise. A token's products are small, and
/// OpenBLAS's threads wait for each other by spinning: where a core is busy with anything else, a step takes several
/// times as long with all cores as with one (docs/benchmarks.md).
fn blas_threads(device: &str) {
    if device != "cpu" || std::env::var_os("OPENBLAS_NUM_THREADS").is_some() {
        return;
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = (cores / 2).max(1);
    if mlx_sys::set_blas_threads(threads) {
        tracing::info!(threads, "OpenBLAS");
    }
}

/// What the weights will take in memory.
struct WeightPlan {
    bytes: u64,
    expand: bool,
    /// Of an activation, and so of keys and values.
    element_bytes: usize,
}

/// Whether weights are expanded to float32: on a CPU, where they then take no more than a quarter of what the worker may
/// use.
fn weights(
    config: &EngineConfig,
    model: &ModelConfig,
    device: &DeviceFacts,
) -> Result<WeightPlan, StartError> {
    let stored = crate::model::weights::bytes(&config.model)?;
    let half = crate::model::weights::has_half_floats(&config.model)?;
    let bits = match &model.quantization {
        Some(quantization) => u64::try_from(quantization.fewest_bits()).unwrap_or(2).max(1),
        None if half => 16,
        None => 32,
    };
    let expanded = stored.saturating_mul(32) / bits;
    #[allow(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss
    )]
    let allowed = (device.bytes as f64 * config.memory_utilization) as u64;
    let expand = device.kind == DeviceKind::Cpu
        && match config.dequantize {
            Dequantize::Off => false,
            Dequantize::On => true,
            Dequantize::Auto => expanded <= allowed / 4,
        };
    Ok(WeightPlan {
        bytes: if expand { expanded } else { stored },
        expand,
        element_bytes: if half && !expand { 2 } else { 4 },
    })
}

fn step_shape(
    config: &EngineConfig,
    model: &ModelConfig,
    device: &DeviceFacts,
    context_length: usize,
) -> StepShape {
    let size = |number: i32| usize::try_from(number).unwrap_or_default();
    let tokens = config.prefill_chunk.min(context_length);
    let longest = (tokens as u64).saturating_mul(context_length as u64);
    StepShape {
        tokens,
        pairs: config.step_budget.min(longest),
        rows: config.max_running,
        hidden: size(model.hidden),
        feed_forward: match &model.moe {
            Some(moe) => size(moe.intermediate.saturating_mul(moe.active)).max(size(model.intermediate)),
            None => size(model.intermediate),
        },
        heads: size(model.heads),
        head_dim: size(model.head_dim),
        vocabulary: size(model.vocab),
        element_bytes: 4,
        fused_attention: device.kind != DeviceKind::Cpu,
        gathered: 0,
    }
}

/// [`StepShape::gathered`] where the reference path decodes: every row's whole context, as far as the cache has room for that.
/// A quantised one is gathered first and expanded then.
fn gathered(model: &ModelConfig, facts: &MemoryFacts, wishes: &MemoryWishes) -> u64 {
    let room = wished_blocks(facts, wishes).saturating_mul(wishes.block_size);
    let tokens = room.min(wishes.max_running.saturating_mul(facts.context_length)) as u64;
    let width = u64::from(model.kv_heads.unsigned_abs()) * u64::from(model.head_dim.unsigned_abs());
    let copies = if facts.kv_quantization.is_some() { 2 } else { 1 };
    tokens.saturating_mul(width).saturating_mul(2 * copies)
}

#[cfg(test)]
mod tests {
    use super::super::warm_up::WARM_DECODES;
    use super::*;
    use crate::model::LoadPhase;

    /// Where the default is a share of a GPU's own memory, so is what is asked for as a share.
    #[test]
    fn a_share_for_the_cache_is_one_of_the_memory_it_lies_in() {
        let device = DeviceFacts {
            kind: DeviceKind::Cuda,
            bytes: 80_000,
            free_bytes: None,
            memory_bytes: 80_000,
        };
        let config = EngineConfig {
            kv_bytes: None,
            kv_share: Some(0.25),
            ..EngineConfig::new("folder".into())
        };
        assert_eq!(kv_bytes(&config, &device), Some(20_000));
        let both = EngineConfig {
            kv_bytes: Some(7),
            ..config
        };
        assert_eq!(kv_bytes(&both, &device), Some(7));
        let neither = EngineConfig {
            kv_bytes: None,
            kv_share: None,
            ..both
        };
        assert_eq!(kv_bytes(&neither, &device), None);
    }

    /// Every row's own context, as far as the cache has room for all of them; twice where they are expanded.
    #[test]
    fn what_the_reference_path_gathers_is_bounded_by_rows_and_by_the_cache() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/parity/dense-f32-tied");
        let model = ModelConfig::read(&folder.join("config.json")).unwrap();
        let width = u64::from((model.kv_heads * model.head_dim).unsigned_abs());
        let facts = MemoryFacts {
            device: DeviceFacts {
                kind: DeviceKind::Cpu,
                bytes: 1 << 40,
                free_bytes: None,
                memory_bytes: 1 << 40,
            },
            weight_bytes: 0,
            kv_bytes_per_token: 1 << 10,
            kv_quantization: None,
            step_bytes: 0,
            context_length: 1000,
        };
        let wishes = MemoryWishes {
            utilization: 1.0,
            kv_bytes: Some(64 << 20),
            max_running: 4,
            max_blocks: None,
            block_size: 32,
            buffer_cache_bytes: 0,
        };
        assert_eq!(gathered(&model, &facts, &wishes), 4000 * width * 2);
        let small = MemoryWishes {
            kv_bytes: Some(2 << 20),
            ..wishes
        };
        assert_eq!(gathered(&model, &facts, &small), 2048 * width * 2);
        let quantised = MemoryFacts {
            kv_quantization: Some(KvQuantization {
                bits: 8,
                group_size: 32,
            }),
            ..facts
        };
        assert_eq!(gathered(&model, &quantised, &small), 2048 * width * 4);
    }

    /// The largest step is measured, and not its parts: a whole chunk at the end of a long context, beside every row, with all
    /// that sampling can need; and twice, as one is issued before the one before it has been read.
    #[test]
    fn the_warm_up_takes_the_largest_steps_that_there_can_be() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/parity/dense-f32-tied");
        let config = EngineConfig {
            max_running: 3,
            prefill_chunk: 40,
            ..EngineConfig::new(folder)
        };
        let (mut parts, info) = start(config.clone(), &mut |_| {}).unwrap();
        let tokens = info.kv_capacity_tokens.min(info.context_length);
        for (fused, expected) in [(false, (40, 40, 3)), (true, (40, tokens, 3))] {
            let mut seen = Vec::new();
            let mut heard = |progress| seen.push(progress);
            let mut steps = Steps::new(&mut heard, warm_steps(&config, tokens));
            parts.stepper.issued.clear();
            warm_up(&mut parts.stepper, &config, tokens, fused, &mut steps).unwrap();
            assert_eq!(
                parts
                    .stepper
                    .issued
                    .iter()
                    .filter(|step| **step == expected)
                    .count(),
                WARM_DECODES,
                "{:?}",
                parts.stepper.issued
            );
            assert_eq!(
                seen.last().map(|last| last.done),
                seen.last().map(|last| last.total)
            );
        }
        assert!(!parts.stepper.is_flying());
    }

    /// A start that is alive says so with every piece of work, and never goes back.
    #[test]
    fn progress_moves_while_weights_are_taken_and_while_it_warms_up() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/parity/moe-4bit-tied");
        for mapped in [false, true] {
            let config = EngineConfig {
                mapped,
                max_running: 3,
                ..EngineConfig::new(folder.clone())
            };
            let mut seen = Vec::new();
            start(config, &mut |progress| seen.push(progress)).unwrap();
            let of = |phase: LoadPhase| -> Vec<LoadProgress> {
                seen.iter()
                    .filter(|progress| progress.phase == phase)
                    .copied()
                    .collect()
            };
            let (weights, warm_up) = (of(LoadPhase::Weights), of(LoadPhase::WarmUp));
            assert_eq!(seen.len(), weights.len() + warm_up.len());
            for phase in [&weights, &warm_up] {
                assert!(
                    phase.is_sorted_by_key(|progress| progress.done),
                    "mapped {mapped}: {phase:?}"
                );
                let (first, last) = (phase.first().unwrap(), phase.last().unwrap());
                assert!(
                    first.done == 0 && last.done == last.total && last.total > 0,
                    "{phase:?}"
                );
            }
            let between = weights.iter().filter(|p| (1..p.total).contains(&p.done)).count();
            assert!(between > 5, "mapped {mapped}: {weights:?}");
            assert!(warm_up.len() > 5, "{warm_up:?}");
        }
    }
}

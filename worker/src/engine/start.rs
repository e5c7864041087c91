//! From a configuration to an engine that has run: model, memory, warm-up.

use std::time::Duration;

use kv_cache::{BlockId, CacheConfig, KvQuantization, SeqId};
use mlx_rs::error::Exception;
use scheduler::Scheduler;

use super::memory::{
    DeviceFacts, DeviceKind, MemoryFacts, MemoryPlan, MemoryWishes, StepShape, wished_blocks,
};
use super::sampler::Sampler;
use super::stepper::{DecodeRow, FirstDraw, Stepper};
use super::{AttentionChoice, Dequantize, EngineConfig, StartError, device, limits};
use crate::backend::{ModelInfo, SamplingParams};
use crate::model::config::ModelConfig;
use crate::model::weights::WeightFile;
use crate::model::{LoadOptions, LoadPhase, LoadProgress, Model};

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

/// Counts the pieces of a warm-up for whoever waits for it.
struct Steps<'a> {
    progress: &'a mut dyn FnMut(LoadProgress),
    done: u64,
    total: u64,
}

impl<'a> Steps<'a> {
    fn new(progress: &'a mut dyn FnMut(LoadProgress), total: usize) -> Self {
        let mut steps = Self {
            progress,
            done: 0,
            total: total as u64,
        };
        steps.report();
        steps
    }

    /// One more has ended.
    fn next(&mut self) {
        self.reach(self.done + 1);
    }

    /// So many have ended, or are not to be done.
    fn reach(&mut self, done: u64) {
        self.done = done.min(self.total);
        self.report();
    }

    fn report(&mut self) {
        (self.progress)(LoadProgress {
            phase: LoadPhase::WarmUp,
            done: self.done,
            total: self.total,
        });
    }
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

/// More rows than this in a step are not tried at start, which would take long; the estimate stands for them.
const MOST_WARM_ROWS: usize = 64;

/// Rows of the warm-up's decodes, where a sequence may have so many tokens: each has a block of its own.
fn warm_rows(config: &EngineConfig, tokens: usize) -> usize {
    config
        .max_running
        .clamp(1, MOST_WARM_ROWS)
        .min((tokens / config.block_size).max(1))
}

/// Decodes of the warm-up.
const WARM_DECODES: usize = 2;

/// Pieces that the warm-up reports: each prefill, each decode.
fn warm_steps(config: &EngineConfig, tokens: usize) -> usize {
    warm_rows(config, tokens) + WARM_DECODES
}

/// Real prefills and decodes, greedy and sampled, at the shapes that matter: in the end steps as large as one can be, which
/// compute the largest chunk over the longest context that a step may look back on, and decode as many rows as may run, two
/// of them in flight as they are in traffic. Kernels are compiled and weights touched before anybody waits for it, the memory
/// that the largest step needs is seen, and a model that cannot run is found before the port is announced. `tokens`:
/// positions that a sequence may have; `fused`: attention whose cost allows for that context, otherwise the chunk is short.
fn warm_up(
    stepper: &mut Stepper,
    config: &EngineConfig,
    tokens: usize,
    fused: bool,
    steps: &mut Steps<'_>,
) -> Result<(), Exception> {
    let block_size = config.block_size;
    let rows = warm_rows(config, tokens);
    let room = (tokens / block_size / rows).saturating_mul(block_size);
    let prompt = vec![0_u32; config.prefill_chunk.min(room.saturating_sub(4)).clamp(1, 64)];
    let each = (prompt.len() + 2).div_ceil(block_size);
    let mut samplers: Vec<Sampler> = (0..rows)
        .map(|row| SamplingParams {
            temperature: if row % 2 == 0 { 0.0 } else { 0.7 },
            ..drawn()
        })
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
        let runs = super::places::runs(table, block_size, 0, prompt.len());
        stepper.prefill(
            SeqId(row),
            &prompt,
            0,
            &runs,
            table,
            Some(FirstDraw::new(sampler)),
        )?;
        // As a step of its own, so that its end is one.
        stepper.wait()?;
        steps.next();
    }
    let chunk = if fused {
        WarmChunk::longest(config, tokens)?
    } else {
        WarmChunk {
            tokens: prompt.clone(),
            start: 0,
            table: tables.first().cloned().unwrap_or_default(),
        }
    };
    for step in 0..WARM_DECODES {
        stepper.begin();
        // A prompt that ends while the others are decoded: what its chunk and its draw need comes on top of what they do.
        let runs = super::places::runs(&chunk.table, block_size, chunk.start, chunk.tokens.len());
        let (id, mut sampler) = (SeqId(rows as u64), Sampler::new(drawn(), &chunk.tokens, None));
        stepper.prefill(
            id,
            &chunk.tokens,
            chunk.start,
            &runs,
            &chunk.table,
            Some(FirstDraw::new(&mut sampler)),
        )?;
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
                    allowed: None,
                })
            })
            .collect::<Result<Vec<_>, Exception>>()?;
        let mut samplers: Vec<&mut Sampler> = samplers.iter_mut().collect();
        stepper.decode(&rows, &mut samplers)?;
        stepper.read()?;
        steps.next();
    }
    stepper.begin();
    stepper.read()?;
    stepper.clear();
    Ok(())
}

/// Sampling with all that a request may ask for, as the defaults do in part: penalties, which keep a history over the whole
/// vocabulary, and every way to leave tokens out.
fn drawn() -> SamplingParams {
    SamplingParams {
        temperature: 0.7,
        top_p: 0.9,
        top_k: 50,
        min_p: 0.01,
        repetition_penalty: 1.05,
        presence_penalty: 0.1,
        frequency_penalty: 0.01,
        ..SamplingParams::greedy()
    }
}

/// A prompt's last chunk.
struct WarmChunk {
    tokens: Vec<u32>,
    start: usize,
    table: Vec<BlockId>,
}

impl WarmChunk {
    /// The one that needs most memory: whole, and at the end of the longest context that the budget allows for it.
    fn longest(config: &EngineConfig, tokens: usize) -> Result<Self, Exception> {
        let chunk = config.prefill_chunk.min(tokens).max(1);
        let budget = usize::try_from(config.step_budget / chunk as u64).unwrap_or(usize::MAX);
        let end = budget.min(tokens).max(chunk);
        let mut table = (0..end.div_ceil(config.block_size))
            .map(|block| u32::try_from(block).map(BlockId))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|_| Exception::custom("too many blocks"))?;
        // In two pieces: what lies apart is copied together before it is attended to.
        let half = table.len() / 2;
        table.rotate_left(half);
        Ok(Self {
            tokens: vec![0; chunk],
            start: end - chunk,
            table,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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

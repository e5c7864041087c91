//! How a worker's memory is divided: pure arithmetic, from facts and wishes to limits, or to a refusal that shows it.
//!
//! One ceiling ([`DeviceFacts::bytes`] times [`MemoryWishes::utilization`]) holds everything: weights, the KV
//! cache, the largest step, freed buffers that MLX keeps, and head-room for what nobody counts. The KV cache is what was
//! asked for or nothing; only the kept buffers take what is left, since keeping fewer costs speed and not correctness.
//!
//! The largest step is estimated from the model's shape at first ([`MemoryPlan::new`]) and measured by the warm-up
//! later ([`MemoryPlan::measured`]).

use std::fmt;

use kv_cache::KvQuantization;
use serde_json::{Map, Value, json};

/// Largest KV cache that nobody asked for.
const KV_DEFAULT: u64 = 8 << 30;
/// The same as a share of memory: one in so many.
const KV_SHARE: u64 = 16;
/// The same in whole contexts for each sequence that may run: more conversations than that are rarely alive, and a tiny
/// model needs no 8 GiB.
const KV_CONTEXTS: u64 = 4;
/// Kept buffers are cut down to this before a worker is refused; MLX allocates anew for every step with fewer.
const BUFFERS_LEAST: u64 = 64 << 20;
/// Code, tokenizer, templates, HTTP, the runtime of the GPU's driver.
const HEAD_ROOM: u64 = 256 << 20;
/// Rounding of allocations to pages and heaps, as a share of the ceiling: one in so many.
const HEAD_ROOM_SHARE: u64 = 64;

/// Where MLX computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceKind {
    /// A Mac's GPU, in the machine's own memory.
    Metal,
    /// An NVIDIA GPU with memory of its own.
    Cuda,
    /// No GPU.
    Cpu,
}

impl DeviceKind {
    /// As it is reported.
    fn name(self) -> &'static str {
        match self {
            Self::Metal => "metal",
            Self::Cuda => "cuda",
            Self::Cpu => "cpu",
        }
    }

    /// What [`DeviceFacts::bytes`] is, in words.
    fn memory(self) -> &'static str {
        match self {
            Self::Metal => "that Metal recommends one program to use",
            Self::Cuda => "of the GPU",
            Self::Cpu => "of this machine",
        }
    }
}

/// Memory of the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceFacts {
    /// Where MLX computes.
    pub kind: DeviceKind,
    /// Memory that one program may use on it: Metal's recommended working set, a CUDA device's total, the machine's
    /// memory on the CPU.
    pub bytes: u64,
    /// Of it not in use by anybody, where the device has memory of its own and tells.
    pub free_bytes: Option<u64>,
    /// Memory from which the default of the KV cache is taken: the machine's, or a CUDA device's.
    pub memory_bytes: u64,
}

/// What is given: the device and the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryFacts {
    /// Where it runs.
    pub device: DeviceFacts,
    /// Weights as they lie in memory: the files' sizes, mapped or not (on unified memory a mapped page that is in use
    /// is as real as any other), or more after dequantising.
    pub weight_bytes: u64,
    /// Keys and values of one token, all layers together, as they are kept.
    pub kv_bytes_per_token: u64,
    /// How they are kept in fewer bits, if they are.
    pub kv_quantization: Option<KvQuantization>,
    /// Estimate of what the largest step needs beside all that; see [`StepShape::estimate`].
    pub step_bytes: u64,
    /// Prompt plus reply, at most, in tokens.
    pub context_length: usize,
}

/// What the knobs ask for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MemoryWishes {
    /// Share of [`DeviceFacts::bytes`], above 0, at most 1.
    pub utilization: f64,
    /// Bytes for the KV cache; `None`: the smallest of 8 GiB, 1/16 of memory, and four whole contexts for each
    /// sequence that may run.
    pub kv_bytes: Option<u64>,
    /// Sequences that may run at a time.
    pub max_running: usize,
    /// Most blocks, whatever the bytes.
    pub max_blocks: Option<usize>,
    /// Tokens in a block, at least 1.
    pub block_size: usize,
    /// Freed buffers that MLX may keep.
    pub buffer_cache_bytes: u64,
}

/// Sizes of the model and of the largest step that decide what the step needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepShape {
    /// Prompt tokens computed at once.
    pub tokens: usize,
    /// Tokens times the context they look back on, at most ([`super::EngineConfig::step_budget`]).
    pub pairs: u64,
    /// Sequences decoded at once.
    pub rows: usize,
    /// Width of the hidden state.
    pub hidden: usize,
    /// Width of the feed-forward layer that one token goes through, all its experts together.
    pub feed_forward: usize,
    /// Query heads.
    pub heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocabulary: usize,
    /// Bytes of an element of an activation.
    pub element_bytes: usize,
    /// Attention is one operation that never writes its scores to memory (Metal and CUDA).
    pub fused_attention: bool,
    /// Elements of keys and values that one layer copies out of the KV cache for a step, because they lie in several places or
    /// are quantised.
    pub gathered: u64,
}

impl StepShape {
    /// Bytes that are alive at the widest place of one layer, and the logits, for a chunk of a prompt and all rows in one step.
    /// Rough: a few per cent of the weights for
    /// usual models, and replaced by the measured figure as soon as there is one.
    #[must_use]
    pub fn estimate(&self) -> u64 {
        let product = |factors: &[usize]| {
            factors
                .iter()
                .fold(1_u64, |product, &factor| product.saturating_mul(factor as u64))
        };
        // Residual, norm and projections; gate, up and their product; queries, output and their rotated copies.
        let per_token = product(&[self.hidden, 4, self.element_bytes])
            .saturating_add(product(&[self.feed_forward, 3, self.element_bytes]))
            .saturating_add(product(&[self.heads, self.head_dim, 4, self.element_bytes]));
        let layer = per_token.saturating_mul(self.tokens.saturating_add(self.rows) as u64);
        let scores = if self.fused_attention {
            0
        } else {
            // Scores and probabilities.
            self.pairs
                .saturating_mul(product(&[self.heads, self.element_bytes, 2]))
        };
        let gathered = self.gathered.saturating_mul(self.element_bytes as u64);
        // Logits in single precision, with bias and penalties, sorted for top-p, and as probabilities; the prompt's too.
        let logits = product(&[self.rows.saturating_add(1), self.vocabulary, size_of::<f32>(), 4]);
        layer
            .saturating_add(scores)
            .saturating_add(gathered)
            .saturating_add(logits)
    }
}

/// Where the figure for the largest step comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StepFigure {
    /// [`StepShape::estimate`].
    Estimated,
    /// The warm-up's peak.
    Measured,
}

impl StepFigure {
    fn word(self) -> &'static str {
        match self {
            Self::Estimated => "estimated",
            Self::Measured => "measured",
        }
    }
}

/// The limits in force. Their sum never exceeds [`Self::ceiling_bytes`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MemoryPlan {
    facts: MemoryFacts,
    wishes: MemoryWishes,
    /// What this worker may use in all.
    pub ceiling_bytes: u64,
    /// Weights.
    pub weight_bytes: u64,
    /// The KV cache, a whole number of blocks.
    pub kv_bytes: u64,
    /// Blocks of the KV cache, at least 1.
    pub kv_blocks: usize,
    /// The largest step.
    pub step_bytes: u64,
    /// Whether that is measured yet.
    pub step_figure: StepFigure,
    /// Freed buffers that MLX may keep.
    pub buffer_cache_bytes: u64,
    /// For what nobody counts.
    pub head_room_bytes: u64,
}

/// The parts do not fit under the ceiling. The message has the whole arithmetic.
#[derive(Debug, Clone, PartialEq)]
pub struct DoesNotFit {
    plan: Box<MemoryPlan>,
    kind: Misfit,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Misfit {
    /// The sum is above the ceiling.
    Sum,
    /// The KV cache does not hold one block.
    NoBlock,
}

impl MemoryPlan {
    /// Divides the memory, with the largest step as estimated.
    ///
    /// # Errors
    /// [`DoesNotFit`].
    pub fn new(facts: &MemoryFacts, wishes: &MemoryWishes) -> Result<Self, DoesNotFit> {
        Self::divide(facts, wishes, facts.step_bytes, StepFigure::Estimated)
    }

    /// The same with what the largest step has been seen to need: the peak of MLX's active memory during the warm-up,
    /// less what was active before.
    ///
    /// # Errors
    /// [`DoesNotFit`].
    pub fn measured(&self, step_bytes: u64) -> Result<Self, DoesNotFit> {
        Self::divide(&self.facts, &self.wishes, step_bytes, StepFigure::Measured)
    }

    fn divide(
        facts: &MemoryFacts,
        wishes: &MemoryWishes,
        step_bytes: u64,
        step_figure: StepFigure,
    ) -> Result<Self, DoesNotFit> {
        let share = share_of(facts.device.bytes, wishes.utilization);
        let ceiling_bytes = share.min(facts.device.free_bytes.unwrap_or(u64::MAX));
        let block_bytes = block_bytes(facts, wishes);
        let kv_blocks = wished_blocks(facts, wishes);
        let mut plan = Self {
            facts: *facts,
            wishes: *wishes,
            ceiling_bytes,
            weight_bytes: facts.weight_bytes,
            kv_bytes: block_bytes.saturating_mul(kv_blocks as u64),
            kv_blocks,
            step_bytes,
            step_figure,
            buffer_cache_bytes: wishes.buffer_cache_bytes.min(BUFFERS_LEAST),
            head_room_bytes: HEAD_ROOM.saturating_add(ceiling_bytes / HEAD_ROOM_SHARE),
        };
        if kv_blocks == 0 {
            return Err(DoesNotFit {
                plan: Box::new(plan),
                kind: Misfit::NoBlock,
            });
        }
        let Some(rest) = plan.ceiling_bytes.checked_sub(plan.sum()) else {
            return Err(DoesNotFit {
                plan: Box::new(plan),
                kind: Misfit::Sum,
            });
        };
        plan.buffer_cache_bytes = plan
            .buffer_cache_bytes
            .saturating_add(rest)
            .min(wishes.buffer_cache_bytes);
        Ok(plan)
    }

    /// All parts together: what the process is expected to need at most.
    #[must_use]
    pub fn sum(&self) -> u64 {
        [
            self.weight_bytes,
            self.kv_bytes,
            self.step_bytes,
            self.buffer_cache_bytes,
            self.head_room_bytes,
        ]
        .into_iter()
        .fold(0, u64::saturating_add)
    }

    /// Tokens that the KV cache holds.
    #[must_use]
    pub fn kv_tokens(&self) -> usize {
        self.kv_blocks.saturating_mul(self.wishes.block_size.max(1))
    }

    /// For `/status` and the `ready` line.
    #[must_use]
    pub fn limits(&self) -> Map<String, Value> {
        let value = json!({
            "memory_ceiling_bytes": self.ceiling_bytes,
            "memory_device": self.facts.device.kind.name(),
            "memory_device_bytes": self.facts.device.bytes,
            "memory_utilization": self.wishes.utilization,
            "memory_planned_bytes": self.sum(),
            "weight_bytes": self.weight_bytes,
            "kv_bytes": self.kv_bytes,
            "kv_blocks": self.kv_blocks,
            "kv_block_size": self.wishes.block_size,
            "kv_tokens": self.kv_tokens(),
            "kv_bytes_per_token": self.facts.kv_bytes_per_token,
            "kv_bits": self.facts.kv_quantization.map(|how| how.bits),
            "kv_group_size": self.facts.kv_quantization.map(|how| how.group_size),
            "step_bytes": self.step_bytes,
            "step_bytes_from": self.step_figure.word(),
            "buffer_cache_bytes": self.buffer_cache_bytes,
            "head_room_bytes": self.head_room_bytes,
        });
        match value {
            Value::Object(map) => map,
            _ => Map::new(),
        }
    }

    /// The parts and their sum. Needs are rounded up.
    fn parts(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "weights {} + KV cache {} ({} blocks of {} tokens{}) + largest step {} ({}) + kept buffers {} + head-room {} = \
             {} MiB",
            up(self.weight_bytes),
            up(self.kv_bytes),
            self.kv_blocks,
            self.wishes.block_size,
            self.facts
                .kv_quantization
                .map_or_else(String::new, |how| format!(", {how}")),
            up(self.step_bytes),
            self.step_figure.word(),
            up(self.buffer_cache_bytes),
            up(self.head_room_bytes),
            up(self.sum()),
        )
    }

    /// The ceiling and where it comes from. Rounded down.
    fn ceiling(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let device = &self.facts.device;
        write!(
            f,
            "{} MiB (--gpu-memory-utilization {} of the {} MiB {}",
            down(self.ceiling_bytes),
            self.wishes.utilization,
            down(device.bytes),
            device.kind.memory(),
        )?;
        match device.free_bytes {
            Some(free) if self.ceiling_bytes == free => {
                write!(f, ", of which only {} MiB are free)", down(free))
            }
            _ => f.write_str(")"),
        }
    }

    /// The smallest utilisation at which everything fits, if any does; in hundredths.
    fn enough(&self) -> Option<f64> {
        if self.facts.device.free_bytes.is_some_and(|free| free < self.sum()) {
            return None;
        }
        (1..=100)
            .map(|percent| f64::from(percent) / 100.0)
            .find(|&utilization| {
                let wishes = MemoryWishes {
                    utilization,
                    ..self.wishes
                };
                Self::divide(&self.facts, &wishes, self.step_bytes, self.step_figure).is_ok()
            })
    }
}

/// One line for the log: parts, sum, ceiling.
impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.parts(f)?;
        f.write_str(", of ")?;
        self.ceiling(f)
    }
}

impl fmt::Display for DoesNotFit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { plan, kind } = self;
        if *kind == Misfit::NoBlock {
            return write!(
                f,
                "the KV cache holds no block: {} bytes (--cache-memory-mb, --max-cache-blocks {}), and a block of {} tokens \
                 takes {} bytes",
                plan.wishes
                    .kv_bytes
                    .unwrap_or_else(|| default_kv(&plan.facts, &plan.wishes)),
                plan.wishes
                    .max_blocks
                    .map_or_else(|| "unset".to_owned(), |blocks| blocks.to_string()),
                plan.wishes.block_size,
                plan.facts
                    .kv_bytes_per_token
                    .saturating_mul(plan.wishes.block_size as u64),
            );
        }
        f.write_str("it does not fit into memory: ")?;
        plan.parts(f)?;
        f.write_str(", and this worker may use ")?;
        plan.ceiling(f)?;
        write!(
            f,
            "; {} MiB are missing. ",
            up(plan.sum().saturating_sub(plan.ceiling_bytes))
        )?;
        match plan.enough() {
            Some(utilization) => write!(f, "--gpu-memory-utilization {utilization} would do")?,
            None => f.write_str("No --gpu-memory-utilization would do")?,
        }
        f.write_str("; so may a smaller --cache-memory-mb, --prefill-step-size or --context-length, or a smaller model")
    }
}

impl std::error::Error for DoesNotFit {}

fn block_bytes(facts: &MemoryFacts, wishes: &MemoryWishes) -> u64 {
    let tokens = wishes.block_size.max(1) as u64;
    facts.kv_bytes_per_token.saturating_mul(tokens)
}

/// Blocks of the KV cache that is asked for.
pub(super) fn wished_blocks(facts: &MemoryFacts, wishes: &MemoryWishes) -> usize {
    let wished = wishes.kv_bytes.unwrap_or_else(|| default_kv(facts, wishes));
    // A model without keys and values needs no memory for any number of blocks.
    let blocks = wished
        .checked_div(block_bytes(facts, wishes))
        .unwrap_or(u64::from(u32::MAX));
    usize::try_from(blocks)
        .unwrap_or(usize::MAX)
        .min(wishes.max_blocks.unwrap_or(usize::MAX))
}

fn default_kv(facts: &MemoryFacts, wishes: &MemoryWishes) -> u64 {
    let contexts = facts
        .kv_bytes_per_token
        .saturating_mul(facts.context_length as u64)
        .saturating_mul(wishes.max_running.max(1) as u64)
        .saturating_mul(KV_CONTEXTS);
    KV_DEFAULT.min(facts.device.memory_bytes / KV_SHARE).min(contexts)
}

/// A share of a number of bytes, rounded down. Exact enough: a double counts to 9 PB.
#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss
)]
fn share_of(bytes: u64, share: f64) -> u64 {
    ((bytes as f64 * share.clamp(0.0, 1.0)) as u64).min(bytes)
}

/// MiB, rounded up.
fn up(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

/// MiB, rounded down.
fn down(bytes: u64) -> u64 {
    bytes >> 20
}

#[cfg(test)]
mod tests;

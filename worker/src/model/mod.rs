//! A model directory in the MLX / Hugging Face layout, loaded and run through MLX.
//!
//! | module      | idea                                                                           |
//! |-------------|--------------------------------------------------------------------------------|
//! | `config`    | config.json, checked                                                           |
//! | `weights`   | safetensors files, memory-mapped; tensors by name, with their shapes checked    |
//! | `layers`    | embedding, linear and norm, plain and affine-quantised                          |
//! | `attention` | grouped-query attention over the cache                                         |
//! | `moe`       | the mixture of experts                                                         |
//! | `qwen3`     | Qwen3 and Qwen3-MoE                                                            |
//! | `kernels`   | kernels of our own for decoding                                                |
//! | `kv`        | keys and values of all sequences                                               |
//! | `store`     | keys or values of one layer in memory, as they are or quantised                |
//!
//! Everything here belongs to the engine's thread: arrays are built and evaluated nowhere else.

mod attention;
pub mod config;
pub mod kernels;
pub mod kv;
mod layers;
mod moe;
mod qwen3;
mod store;
pub mod weights;

use std::path::{Path, PathBuf};

use kv_cache::{KvQuantization, KvShape};
use mlx_rs::Array;
use thiserror::Error;

use config::ModelConfig;
use kernels::{KernelDecoder, KernelReport};
use kv::{Chunk, KvSlabs, Rows};
use weights::{Storage, WeightFile, Weights};

/// Why a model cannot be loaded. Each message names the file, and the tensor or key in it.
#[derive(Debug, Error)]
pub enum LoadError {
    /// A file that is missing or cannot be read.
    #[error("{}: {reason}", .file.display())]
    File {
        /// The file.
        file: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// A value of config.json that is missing, wrong, or not supported.
    #[error("{}: {key}: {reason}", .file.display())]
    Config {
        /// The config.json.
        file: PathBuf,
        /// Its key.
        key: String,
        /// What is wrong, with the value.
        reason: String,
    },
    /// A tensor that is missing or of the wrong type or shape.
    #[error("{}: tensor {tensor}: {reason}", .file.display())]
    Tensor {
        /// The safetensors file; for a missing tensor the file or folder that should have it.
        file: PathBuf,
        /// Its name.
        tensor: String,
        /// What is wrong, with the numbers.
        reason: String,
    },
    /// MLX failed while the model was put together.
    #[error("MLX: {0}")]
    Mlx(#[from] mlx_rs::error::Exception),
}

/// What a start is busy with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoadPhase {
    /// Taking weights out of their files; counted in bytes of these.
    Weights,
    /// Testing kernels, and running the first steps; counted in such pieces of work.
    WarmUp,
}

impl LoadPhase {
    /// As it is reported.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Weights => "weights",
            Self::WarmUp => "warm-up",
        }
    }
}

/// How far a start has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadProgress {
    /// What is going on.
    pub phase: LoadPhase,
    /// Of it done so far, in the phase's unit.
    pub done: u64,
    /// Of it in all.
    pub total: u64,
}

/// Shape of the keys and values of a model whose activations take so many bytes an element.
#[must_use]
pub fn kv_shape(config: &ModelConfig, element_bytes: usize, quantization: Option<KvQuantization>) -> KvShape {
    let size = |number: i32| usize::try_from(number).unwrap_or_default();
    KvShape {
        layers: config.layers,
        kv_heads: size(config.kv_heads),
        key_dim: size(config.head_dim),
        value_dim: size(config.head_dim),
        bytes_per_element: element_bytes,
        quantization,
    }
}

/// How weights are taken into memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadOptions {
    /// Map the files instead of reading them.
    pub mapped: bool,
    /// Expand quantised and half-precision weights to float32: on a CPU, where MLX multiplies only float32 matrices with a
    /// tuned library. Costs up to 8 times the bytes of a 4-bit model.
    pub expand: bool,
}

/// A model ready to run.
#[derive(Debug)]
pub struct Model {
    config: ModelConfig,
    decoder: qwen3::Decoder,
    /// What steps several sequences by one token, where it has passed its test.
    kernels: Option<KernelDecoder>,
    weight_bytes: u64,
    storage: Storage,
    device_reads: Vec<WeightFile>,
}

impl Model {
    /// Loads `folder`. Calls `progress` at the beginning, with every hundredth of the weights' bytes, and at the end.
    ///
    /// # Errors
    ///
    /// See [`LoadError`]: config.json, the index, a file or a tensor.
    pub fn load(
        folder: &Path,
        options: LoadOptions,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, LoadError> {
        let config = ModelConfig::read(&folder.join("config.json"))?;
        let mut weights = Weights::open(folder, options, progress)?;
        let decoder = qwen3::Decoder::load(&config, &mut weights)?;
        weights.log();
        weights.report_all();
        Ok(Self {
            config,
            decoder,
            kernels: None,
            weight_bytes: weights.bytes(),
            storage: weights.storage(),
            device_reads: weights.device_reads(),
        })
    }

    /// What config.json says.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Bytes of all weight files.
    #[must_use]
    pub fn weight_bytes(&self) -> u64 {
        self.weight_bytes
    }

    /// How the weights lie in memory.
    #[must_use]
    pub fn storage(&self) -> Storage {
        self.storage
    }

    /// The files whose pages the device reads while it computes: none where the weights have been copied.
    #[must_use]
    pub fn device_reads(&self) -> &[WeightFile] {
        &self.device_reads
    }

    /// Room for the keys and values of `positions` tokens. A quantisation's group size has to divide the width of a head.
    ///
    /// # Errors
    ///
    /// MLX's own, such as no memory.
    pub fn new_kv(
        &self,
        positions: i32,
        quantization: Option<KvQuantization>,
    ) -> mlx_rs::error::Result<KvSlabs> {
        let ModelConfig {
            layers,
            kv_heads,
            head_dim,
            ..
        } = self.config;
        let shape = [kv_heads, positions, head_dim];
        KvSlabs::new(layers, shape, self.decoder.dtype(), quantization)
    }

    /// Runs the decoder over a chunk of one sequence's prompt, `tokens`: `[1, length]`, integers. Returns hidden states
    /// `[1, length, hidden]`, and the arrays to evaluate when only the keys and values are wanted.
    ///
    /// # Errors
    ///
    /// MLX's own.
    pub fn prefill(
        &self,
        tokens: &Array,
        chunk: &Chunk<'_>,
        kv: &KvSlabs,
    ) -> mlx_rs::error::Result<(Array, Vec<Array>)> {
        self.decoder.prefill(tokens, chunk, kv)
    }

    /// Runs the decoder over the next token of each of several sequences, `tokens`: `[1, rows]`, integers. Returns hidden
    /// states `[1, rows, hidden]`.
    ///
    /// # Errors
    ///
    /// MLX's own.
    pub fn decode(&self, tokens: &Array, rows: &Rows, kv: &KvSlabs) -> mlx_rs::error::Result<Array> {
        self.decoder.decode(tokens, rows, kv)
    }

    /// Most pieces of work that [`Self::choose_kernels`] reports.
    pub const KERNEL_PIECES: usize = kernels::PIECES;

    /// Decides whether kernels of our own step the sequences of `kv`, by a test on this device; `block`: positions of a block,
    /// `rows`: the most that are stepped together. Call it before anything is kept in `kv`. `progress` is called at most
    /// [`Self::KERNEL_PIECES`] times, after each piece of the test.
    pub fn choose_kernels(
        &mut self,
        kv: &KvSlabs,
        block: i32,
        rows: usize,
        progress: &mut dyn FnMut(),
    ) -> KernelReport {
        let (kernels, report) = kernels::choose(self, kv, block, rows, progress);
        tracing::info!(
            path = report.path,
            reason = report.reason,
            error = report.error,
            timings = ?report.timings,
            "decoding"
        );
        self.kernels = kernels;
        report
    }

    /// Kernels of our own step the sequences.
    #[must_use]
    pub fn has_kernels(&self) -> bool {
        self.kernels.is_some()
    }

    /// A step may meet in the cache what a later one writes there, unless that depends on the step's results. Metal's command
    /// buffers of one queue may overlap: MLX lets one wait for whoever writes what it uses, not for whoever still reads what it
    /// writes, and not for the kernels, whose writes MLX does not see. CUDA's graphs and the CPU's tasks run in turn.
    #[must_use]
    pub fn steps_overlap(&self) -> bool {
        cfg!(target_os = "macos")
    }

    fn kernel_weights(&self) -> Option<kernels::Weights> {
        self.decoder.kernel_weights()
    }

    /// Scores of the next token of each of several sequences after `tokens`: `[1, rows]` to `[rows, vocabulary]`.
    ///
    /// # Errors
    ///
    /// MLX's own.
    pub fn step(&self, tokens: &Array, rows: &Rows, kv: &KvSlabs) -> mlx_rs::error::Result<Array> {
        match &self.kernels {
            Some(kernels) => kernels.scores(tokens, rows.positions(), &rows.tables()),
            None => self.logits(&self.decode(tokens, rows, kv)?),
        }
    }

    /// Scores of the token after each of `hidden`: `[1, length, hidden]` to `[length, vocabulary]`.
    ///
    /// # Errors
    ///
    /// MLX's own.
    pub fn logits(&self, hidden: &Array) -> mlx_rs::error::Result<Array> {
        self.decoder.logits(hidden)
    }

    /// Scores of the token after the last of `hidden`: `[1, length, hidden]` to `[1, vocabulary]`.
    ///
    /// # Errors
    ///
    /// MLX's own.
    pub fn last_logits(&self, hidden: &Array) -> mlx_rs::error::Result<Array> {
        let (length, width) = (hidden.dim(1), hidden.dim(2));
        let last = mlx_ext::ops::slice(hidden, &[0, length - 1, 0], &[1, length, width])?;
        self.logits(&last)
    }
}

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
//! | `cache`     | keys and values of one sequence                                                |
//!
//! Everything here belongs to the engine's thread: arrays are built and evaluated nowhere else.

mod attention;
pub mod cache;
pub mod config;
mod layers;
mod moe;
mod qwen3;
pub mod weights;

use std::path::{Path, PathBuf};

use mlx_rs::Array;
use thiserror::Error;

use cache::SequenceCache;
use config::ModelConfig;
use weights::{Storage, Weights};

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

/// How far loading has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadProgress {
    /// Bytes of weight files opened so far.
    pub done: u64,
    /// Bytes of all weight files.
    pub total: u64,
}

/// A model ready to run.
#[derive(Debug)]
pub struct Model {
    config: ModelConfig,
    decoder: qwen3::Decoder,
    weight_bytes: u64,
    storage: Storage,
}

impl Model {
    /// Loads `folder`; `mapped` chooses memory-mapped weights over reading the files. Calls `progress` after each file.
    ///
    /// # Errors
    ///
    /// See [`LoadError`]: config.json, the index, a file or a tensor.
    pub fn load(
        folder: &Path,
        mapped: bool,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, LoadError> {
        let config = ModelConfig::read(&folder.join("config.json"))?;
        let mut weights = Weights::open(folder, mapped, progress)?;
        let decoder = qwen3::Decoder::load(&config, &mut weights)?;
        weights.log();
        Ok(Self {
            config,
            decoder,
            weight_bytes: weights.bytes(),
            storage: weights.storage(),
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

    /// An empty cache for one sequence.
    #[must_use]
    pub fn new_cache(&self) -> SequenceCache {
        SequenceCache::new(self.config.layers, self.config.kv_heads, self.config.head_dim)
    }

    /// Runs the decoder over the next tokens of a sequence. `tokens`: `[1, length]`, integers; the cache grows by
    /// `length`. Returns hidden states `[1, length, hidden]`.
    ///
    /// # Errors
    ///
    /// MLX's own.
    pub fn forward(&self, tokens: &Array, cache: &mut SequenceCache) -> mlx_rs::error::Result<Array> {
        self.decoder.forward(tokens, cache)
    }

    /// Scores of the token after the last of `hidden`: `[1, length, hidden]` to `[1, vocabulary]`.
    ///
    /// # Errors
    ///
    /// MLX's own.
    pub fn last_logits(&self, hidden: &Array) -> mlx_rs::error::Result<Array> {
        self.decoder.last_logits(hidden)
    }
}

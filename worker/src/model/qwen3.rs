//! The decoder of Qwen3 and Qwen3-MoE.
//!
//! Source of the arithmetic and of the tensor names: Hugging Face transformers' `qwen3` and `qwen3_moe`; parity with
//! MLX's Python reference is tested (`tests/parity`).

use mlx_rs::error::Result;
use mlx_rs::{Array, Dtype};

use super::LoadError;
use super::attention::Attention;
use super::config::ModelConfig;
use super::kernels;
use super::kv::{Chunk, KvSlabs, LayerSlabs, Rows};
use super::layers::{Linear, Matrix, RmsNorm, swiglu};
use super::moe::Experts;
use super::weights::Weights;

#[derive(Debug)]
pub(super) struct Decoder {
    embedding: Matrix,
    layers: Vec<Layer>,
    norm: RmsNorm,
    /// `None`: the embedding serves.
    head: Option<Matrix>,
}

#[derive(Debug)]
struct Layer {
    attention_norm: RmsNorm,
    attention: Attention,
    feed_forward_norm: RmsNorm,
    feed_forward: FeedForward,
}

#[derive(Debug)]
enum FeedForward {
    Dense { gate: Linear, up: Linear, down: Linear },
    Experts(Experts),
}

impl Decoder {
    pub(super) fn load(
        config: &ModelConfig,
        weights: &mut Weights<'_>,
    ) -> std::result::Result<Self, LoadError> {
        let vocabulary = [config.vocab, config.hidden];
        let embedding = Matrix::load(config, weights, "model.embed_tokens", &vocabulary)?;
        let layers = (0..config.layers)
            .map(|layer| Layer::load(config, weights, layer))
            .collect::<std::result::Result<Vec<_>, _>>()?;
        let norm = RmsNorm::load(config, weights, "model.norm", config.hidden)?;
        let head = if config.tied {
            None
        } else {
            Some(Matrix::load(config, weights, "lm_head", &vocabulary)?)
        };
        Ok(Self {
            embedding,
            layers,
            norm,
            head,
        })
    }

    /// Type of the residual stream, and so of keys and values.
    pub(super) fn dtype(&self) -> Dtype {
        self.embedding.dtype()
    }

    /// The weights, for kernels, if they have the shape that these know.
    pub(super) fn kernel_weights(&self) -> Option<kernels::Weights> {
        Some(kernels::Weights {
            embedding: self.embedding.clone(),
            layers: self
                .layers
                .iter()
                .map(Layer::kernel_weights)
                .collect::<Option<Vec<_>>>()?,
            gain: self.norm.gain(),
            head: self.head.as_ref().unwrap_or(&self.embedding).clone(),
        })
    }

    /// `tokens`: `[1, length]`. Returns hidden states `[1, length, hidden]` and the slabs' arrays with the chunk in them.
    pub(super) fn prefill(
        &self,
        tokens: &Array,
        chunk: &Chunk<'_>,
        slabs: &KvSlabs,
    ) -> Result<(Array, Vec<Array>)> {
        let mut written = Vec::with_capacity(2 * self.layers.len());
        let hidden = self.forward(tokens, slabs, |attention, x, slabs| {
            attention.prefill(x, chunk, slabs, &mut written)
        })?;
        Ok((hidden, written))
    }

    /// `tokens`: `[1, rows]`, one of each sequence. Returns hidden states `[1, rows, hidden]`.
    pub(super) fn decode(&self, tokens: &Array, rows: &Rows, slabs: &KvSlabs) -> Result<Array> {
        self.forward(tokens, slabs, |attention, x, slabs| {
            attention.decode(x, rows, slabs)
        })
    }

    fn forward(
        &self,
        tokens: &Array,
        slabs: &KvSlabs,
        mut attend: impl FnMut(&Attention, &Array, &LayerSlabs) -> Result<Array>,
    ) -> Result<Array> {
        let mut x = self.embedding.rows(tokens)?;
        for (layer, slabs) in self.layers.iter().zip(slabs.layers()) {
            let mixed = attend(&layer.attention, &layer.attention_norm.apply(&x)?, slabs)?;
            x = x.add(mixed)?;
            let changed = layer.feed_forward.forward(&layer.feed_forward_norm.apply(&x)?)?;
            x = x.add(changed)?;
        }
        Ok(x)
    }

    /// `[1, rows, hidden]` to `[rows, vocabulary]`.
    pub(super) fn logits(&self, hidden: &Array) -> Result<Array> {
        let rows = hidden.reshape(&[-1, hidden.dim(2)])?;
        self.head
            .as_ref()
            .unwrap_or(&self.embedding)
            .apply(&self.norm.apply(&rows)?)
    }
}

impl Layer {
    fn kernel_weights(&self) -> Option<kernels::LayerWeights> {
        Some(kernels::LayerWeights {
            attention_gain: self.attention_norm.gain(),
            attention: self.attention.kernel_weights()?,
            feed_gain: self.feed_forward_norm.gain(),
            feed: self.feed_forward.kernel_weights()?,
        })
    }

    fn load(
        config: &ModelConfig,
        weights: &mut Weights<'_>,
        layer: usize,
    ) -> std::result::Result<Self, LoadError> {
        let path = format!("model.layers.{layer}");
        let mlp = format!("{path}.mlp");
        let sparse = config.moe.as_ref().filter(|moe| moe.is_sparse(layer));
        let feed_forward = match sparse {
            Some(moe) => FeedForward::Experts(Experts::load(config, moe, weights, &mlp)?),
            None => {
                let (hidden, wide) = (config.hidden, config.intermediate);
                let mut linear = |name: &str, outputs, inputs| {
                    Linear::load(config, weights, &format!("{mlp}.{name}"), outputs, inputs, false)
                };
                FeedForward::Dense {
                    gate: linear("gate_proj", wide, hidden)?,
                    up: linear("up_proj", wide, hidden)?,
                    down: linear("down_proj", hidden, wide)?,
                }
            }
        };
        Ok(Self {
            attention_norm: RmsNorm::load(
                config,
                weights,
                &format!("{path}.input_layernorm"),
                config.hidden,
            )?,
            attention: Attention::load(config, weights, &format!("{path}.self_attn"))?,
            feed_forward_norm: RmsNorm::load(
                config,
                weights,
                &format!("{path}.post_attention_layernorm"),
                config.hidden,
            )?,
            feed_forward,
        })
    }
}

impl FeedForward {
    fn kernel_weights(&self) -> Option<kernels::Feed> {
        match self {
            Self::Dense { gate, up, down } => Some(kernels::Feed::Dense {
                gate: gate.unbiased()?,
                up: up.unbiased()?,
                down: down.unbiased()?,
            }),
            Self::Experts(experts) => experts.kernel_weights(),
        }
    }

    fn forward(&self, x: &Array) -> Result<Array> {
        match self {
            Self::Dense { gate, up, down } => down.apply(&swiglu(&gate.apply(x)?, &up.apply(x)?)?),
            Self::Experts(experts) => experts.forward(x),
        }
    }
}

//! Grouped-query attention with normalised queries and keys, as Qwen3 has it.

use mlx_rs::error::Result;
use mlx_rs::fast::{self, ScaledDotProductAttentionMask};
use mlx_rs::utils::IntoOption;
use mlx_rs::{Array, ops};

use super::LoadError;
use super::cache::LayerCache;
use super::config::{ModelConfig, Rope};
use super::layers::{Linear, RmsNorm};
use super::weights::Weights;

#[derive(Debug)]
pub(super) struct Attention {
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    query_norm: RmsNorm,
    key_norm: RmsNorm,
    heads: i32,
    kv_heads: i32,
    head_dim: i32,
    rope: Rope,
    scale: f32,
}

impl Attention {
    pub(super) fn load(
        config: &ModelConfig,
        weights: &mut Weights,
        path: &str,
    ) -> std::result::Result<Self, LoadError> {
        let ModelConfig {
            hidden,
            heads,
            kv_heads,
            head_dim,
            attention_bias: bias,
            ..
        } = *config;
        let mut linear = |name: &str, outputs, inputs| {
            Linear::load(config, weights, &format!("{path}.{name}"), outputs, inputs, bias)
        };
        Ok(Self {
            query: linear("q_proj", heads * head_dim, hidden)?,
            key: linear("k_proj", kv_heads * head_dim, hidden)?,
            value: linear("v_proj", kv_heads * head_dim, hidden)?,
            output: linear("o_proj", hidden, heads * head_dim)?,
            query_norm: RmsNorm::load(config, weights, &format!("{path}.q_norm"), head_dim)?,
            key_norm: RmsNorm::load(config, weights, &format!("{path}.k_norm"), head_dim)?,
            heads,
            kv_heads,
            head_dim,
            rope: config.rope,
            scale: 1.0 / (head_dim as f32).sqrt(),
        })
    }

    /// `x`: `[1, length, hidden]`, at positions `offset..offset + length`.
    pub(super) fn forward(&self, x: &Array, offset: i32, cache: &mut LayerCache) -> Result<Array> {
        let length = x.dim(1);
        let split = |projected: Array, heads| projected.reshape(&[1, length, heads, self.head_dim]);
        let rotate = |heads: Array| {
            fast::rope(
                heads,
                self.head_dim,
                false,
                self.rope.theta,
                self.rope.scale,
                offset,
                None,
            )
        };
        let queries = self.query_norm.apply(&split(self.query.apply(x)?, self.heads)?)?;
        let keys = self.key_norm.apply(&split(self.key.apply(x)?, self.kv_heads)?)?;
        let values = split(self.value.apply(x)?, self.kv_heads)?.swap_axes(1, 2)?;
        let queries = rotate(queries.swap_axes(1, 2)?)?;
        let keys = rotate(keys.swap_axes(1, 2)?)?;

        let (keys, values) = cache.append(offset, &keys, &values)?;
        // A single query sees every key; several see those up to their own position.
        let mask: Option<ScaledDotProductAttentionMask<'_>> = if length > 1 {
            ScaledDotProductAttentionMask::Causal.into_option()
        } else {
            None
        };
        let mixed = fast::scaled_dot_product_attention(&queries, &keys, &values, self.scale, mask, None)?;
        let joined = ops::swap_axes(&mixed, 1, 2)?.reshape(&[1, length, self.heads * self.head_dim])?;
        self.output.apply(&joined)
    }
}

//! Grouped-query attention with normalised queries and keys, as Qwen3 has it.

use mlx_ext::ops::slice;
use mlx_rs::error::Result;
use mlx_rs::fast::{self, ScaledDotProductAttentionMask};
use mlx_rs::utils::IntoOption;
use mlx_rs::{Array, ops};

use super::LoadError;
use super::config::{ModelConfig, Rope};
use super::kernels::AttentionWeights;
use super::kv::{Chunk, LayerSlabs, Rows, Span};
use super::layers::{Linear, RmsNorm};
use super::store::Written;
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
        weights: &mut Weights<'_>,
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

    /// Its weights, for kernels, if they have the shape that these know.
    pub(super) fn kernel_weights(&self) -> Option<AttentionWeights> {
        Some(AttentionWeights {
            query: self.query.unbiased()?,
            key: self.key.unbiased()?,
            value: self.value.unbiased()?,
            query_gain: self.query_norm.gain(),
            key_gain: self.key_norm.gain(),
            output: self.output.unbiased()?,
        })
    }

    /// `x`: `[1, length, hidden]`, the chunk's tokens, and so the result. What has been written to the slabs goes to
    /// `written`.
    pub(super) fn prefill(
        &self,
        x: &Array,
        chunk: &Chunk<'_>,
        slabs: &LayerSlabs,
        written: &mut Vec<Array>,
    ) -> Result<Array> {
        let length = x.dim(1);
        let split = |projected: Array, heads| projected.reshape(&[1, length, heads, self.head_dim]);
        let rotate = |heads: Array| {
            fast::rope(
                heads,
                self.head_dim,
                false,
                self.rope.theta,
                self.rope.scale,
                chunk.start,
                None,
            )
        };
        let queries = self.query_norm.apply(&split(self.query.apply(x)?, self.heads)?)?;
        let keys = self.key_norm.apply(&split(self.key.apply(x)?, self.kv_heads)?)?;
        let values = split(self.value.apply(x)?, self.kv_heads)?.swap_axes(1, 2)?;
        let queries = rotate(queries.swap_axes(1, 2)?)?;
        let keys = rotate(keys.swap_axes(1, 2)?)?;

        let stored_keys = chunk.write(&slabs.keys, &keys)?;
        let stored_values = chunk.write(&slabs.values, &values)?;
        let keys = stored_keys.read(chunk.reads)?;
        let values = stored_values.read(chunk.reads)?;
        written.extend(stored_keys.into_parts());
        written.extend(stored_values.into_parts());
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

    /// `x`: `[1, rows, hidden]`, one token of each sequence, and so the result.
    pub(super) fn decode(&self, x: &Array, rows: &Rows, slabs: &LayerSlabs) -> Result<Array> {
        let count = rows.count();
        let split = |projected: Array, heads| projected.reshape(&[count, heads, 1, self.head_dim]);
        let rotate = |heads: Array| {
            fast::rope_dynamic(
                heads,
                self.head_dim,
                false,
                self.rope.theta,
                self.rope.scale,
                rows.positions(),
                None,
            )
        };
        let queries = self.query_norm.apply(&split(self.query.apply(x)?, self.heads)?)?;
        let keys = self.key_norm.apply(&split(self.key.apply(x)?, self.kv_heads)?)?;
        let values = split(self.value.apply(x)?, self.kv_heads)?;
        let (queries, keys) = (rotate(queries)?, rotate(keys)?);

        let keys = rows.write(&slabs.keys, &keys)?;
        let values = rows.write(&slabs.values, &values)?;
        let mixed = self.attend(&queries, &keys, &values, rows)?;
        let joined = mixed.reshape(&[1, count, self.heads * self.head_dim])?;
        self.output.apply(&joined)
    }

    /// Attention of one query a row: `[rows, heads, 1, head_dim]`, and so the result.
    fn attend(&self, queries: &Array, keys: &Written, values: &Written, rows: &Rows) -> Result<Array> {
        if let Some(padded) = rows.padded() {
            let mask = ScaledDotProductAttentionMask::Array(&padded.mask);
            return fast::scaled_dot_product_attention(
                queries,
                &keys.read_rows(padded)?,
                &values.read_rows(padded)?,
                self.scale,
                mask,
                None,
            );
        }
        let one = |queries: &Array, spans: &[Span]| {
            let (keys, values) = (keys.read(spans)?, values.read(spans)?);
            let mask: Option<ScaledDotProductAttentionMask<'_>> = None;
            fast::scaled_dot_product_attention(queries, &keys, &values, self.scale, mask, None)
        };
        if let [spans] = rows.reads() {
            return one(queries, spans);
        }
        let mut mixed = Vec::with_capacity(rows.reads().len());
        for (row, spans) in (0..).zip(rows.reads()) {
            let query = slice(queries, &[row, 0, 0, 0], &[row + 1, self.heads, 1, self.head_dim])?;
            mixed.push(one(&query, spans)?);
        }
        ops::concatenate(&mixed, 0)
    }
}

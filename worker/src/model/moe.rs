//! The mixture of experts: each token passes through the few experts that its router scores highest.

use mlx_rs::error::Result;
use mlx_rs::ops::indexing::{take_along_axis, take_axis};
use mlx_rs::{Array, ops};

use super::LoadError;
use super::config::{ModelConfig, Moe};
use super::kernels::Feed;
use super::layers::{Linear, Matrix, swiglu};
use super::weights::Weights;

/// From this many (token, expert) pairs on, sorting them by expert pays: MLX then reads each expert's matrix once.
const SORT_FROM: i32 = 64;

/// Most (token, expert) pairs computed together. MLX's CUDA build starts a group of threads for each pair along an axis that
/// ends at 65,535; Metal kernels of 0.32 for the matrix units of an M5 count rows in 16 bits in places.
const MOST_PAIRS: i32 = if cfg!(test) { 96 } else { 32_767 };

#[derive(Debug)]
pub(super) struct Experts {
    router: Linear,
    /// Stacks `[experts, intermediate, hidden]`.
    gate: Matrix,
    up: Matrix,
    /// A stack `[experts, hidden, intermediate]`.
    down: Matrix,
    active: i32,
    experts: i32,
    normalise: bool,
}

impl Experts {
    pub(super) fn load(
        config: &ModelConfig,
        moe: &Moe,
        weights: &mut Weights<'_>,
        path: &str,
    ) -> std::result::Result<Self, LoadError> {
        let (experts, wide, hidden) = (moe.experts, moe.intermediate, config.hidden);
        let router = Linear::load(config, weights, &format!("{path}.gate"), experts, hidden, false)?;
        let mut stack = |name: &str, outputs, inputs| {
            load_stack(config, weights, path, name, &[experts, outputs, inputs])
        };
        Ok(Self {
            router,
            gate: stack("gate_proj", wide, hidden)?,
            up: stack("up_proj", wide, hidden)?,
            down: stack("down_proj", hidden, wide)?,
            active: moe.active,
            experts,
            normalise: moe.normalise,
        })
    }

    /// Its weights, for kernels.
    pub(super) fn kernel_weights(&self) -> Option<Feed> {
        Some(Feed::Experts {
            router: self.router.unbiased()?,
            gate: self.gate.clone(),
            up: self.up.clone(),
            down: self.down.clone(),
            choices: self.active,
            normalise: self.normalise,
        })
    }

    /// `x`: `[1, length, hidden]`, and so the result.
    pub(super) fn forward(&self, x: &Array) -> Result<Array> {
        let (length, most) = (x.dim(1), (MOST_PAIRS / self.active.max(1)).max(1));
        if length <= most {
            return self.together(x);
        }
        let mut parts = Vec::new();
        for start in (0..length).step_by(most.unsigned_abs() as usize) {
            let end = length.min(start + most);
            parts.push(self.together(&mlx_ext::ops::slice(x, &[0, start, 0], &[1, end, x.dim(2)])?)?);
        }
        ops::concatenate(&parts, 1)
    }

    fn together(&self, x: &Array) -> Result<Array> {
        let length = x.dim(1);
        let scores = ops::softmax_axis(self.router.apply(x)?, -1, true)?;
        let ranked = ops::argpartition_axis(&scores, -self.active, -1)?;
        let first = self.experts - self.active;
        let chosen = mlx_ext::ops::slice(&ranked, &[0, 0, first], &[1, length, self.experts])?;
        let mut shares = take_along_axis(&scores, &chosen, -1)?;
        if self.normalise {
            shares = shares.divide(shares.sum_axis(-1, true)?)?;
        }
        let outputs = self.apply(x, &chosen)?;
        outputs.multiply(shares.expand_dims(-1)?)?.sum_axis(-2, false)
    }

    /// Every token through each of its experts: `[1, length, active, hidden]`.
    fn apply(&self, x: &Array, chosen: &Array) -> Result<Array> {
        let (length, hidden) = (x.dim(1), x.dim(2));
        let pairs = length * self.active;
        if pairs < SORT_FROM {
            let rows = x.reshape(&[1, length, 1, 1, hidden])?;
            let outputs = self.feed_forward(&rows, chosen, false)?;
            return outputs.reshape(&[1, length, self.active, hidden]);
        }
        let flat = chosen.reshape(&[pairs])?;
        let order = ops::argsort_axis(&flat, 0)?;
        let back = ops::argsort_axis(&order, 0)?;
        // Pair `p` belongs to token `p / active`.
        let tokens = order.floor_divide(Array::from_slice(&[self.active as u32], &[1]))?;
        let rows = take_axis(x.reshape(&[length, 1, hidden])?, &tokens, 0)?;
        let outputs = self.feed_forward(&rows, &take_axis(&flat, &order, 0)?, true)?;
        take_axis(outputs.reshape(&[pairs, hidden])?, &back, 0)?.reshape(&[1, length, self.active, hidden])
    }

    fn feed_forward(&self, rows: &Array, experts: &Array, sorted: bool) -> Result<Array> {
        let gate = self.gate.apply_gathered(rows, experts, sorted)?;
        let up = self.up.apply_gathered(rows, experts, sorted)?;
        self.down.apply_gathered(&swiglu(&gate, &up)?, experts, sorted)
    }
}

/// The experts' matrices as one stack: stored so by MLX' converters, or one by one as the original files have it.
fn load_stack(
    config: &ModelConfig,
    weights: &mut Weights<'_>,
    path: &str,
    name: &str,
    shape: &[i32; 3],
) -> std::result::Result<Matrix, LoadError> {
    let stacked = format!("{path}.switch_mlp.{name}");
    if weights.has(&format!("{stacked}.weight")) {
        return Matrix::load(config, weights, &stacked, shape);
    }
    let [experts, outputs, inputs] = *shape;
    let mut single = Vec::new();
    for expert in 0..experts {
        let one = format!("{path}.experts.{expert}.{name}");
        if expert == 0 && !weights.has(&format!("{one}.weight")) {
            return Err(weights.missing(&format!("{stacked}.weight")));
        }
        single.push(Matrix::load(config, weights, &one, &[outputs, inputs])?);
    }
    let mut parts: [Vec<Array>; 3] = Default::default();
    let mut quantisation = None;
    for matrix in single {
        let [weight, scale, bias] = &mut parts;
        match matrix {
            Matrix::Plain(plain) => weight.push(plain),
            Matrix::Quantised {
                packed,
                scales,
                biases,
                affine,
            } => {
                weight.push(packed);
                scale.push(scales);
                bias.push(biases);
                quantisation = Some(affine);
            }
        }
    }
    let [weight, scale, bias] = parts;
    let stack = |arrays: Vec<Array>| ops::stack(&arrays, 0);
    Ok(match quantisation {
        None => Matrix::Plain(stack(weight)?),
        Some(affine) => Matrix::Quantised {
            packed: stack(weight)?,
            scales: stack(scale)?,
            biases: stack(bias)?,
            affine,
        },
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::model::kv::{Chunk, Span};
    use crate::model::{LoadOptions, Model};

    /// The scores after `count` tokens, computed in chunks of `each`.
    fn scores(model: &Model, count: i32, each: i32) -> Vec<f32> {
        let kv = model.new_kv(count, None).unwrap();
        let mut last = None;
        for start in (0..count).step_by(each.unsigned_abs() as usize) {
            let length = each.min(count - start);
            let tokens: Vec<i32> = (start..start + length).map(|n| (n * 37 + 5) % 120).collect();
            let chunk = Chunk {
                start,
                writes: &[Span { start, length }],
                reads: &[Span {
                    start: 0,
                    length: start + length,
                }],
            };
            let tokens = Array::from_slice(&tokens, &[1, length]);
            let (hidden, written) = model.prefill(&tokens, &chunk, &kv).unwrap();
            mlx_rs::transforms::eval(&written).unwrap();
            last = Some(model.last_logits(&hidden).unwrap());
        }
        let scores = last.unwrap().as_type::<f32>().unwrap();
        scores.to_vec_cast::<f32>().unwrap()
    }

    #[test]
    fn more_pairs_than_are_computed_together() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/parity/moe-f32-tied");
        let options = LoadOptions {
            mapped: false,
            expand: false,
        };
        let model = Model::load(&folder, options, &mut |_| {}).unwrap();
        // 130 tokens have 260 pairs, which are three parts; 40 have 80, one.
        let (parted, whole) = (scores(&model, 130, 130), scores(&model, 130, 40));
        let differences = parted.iter().zip(&whole).map(|(a, b)| (a - b).abs());
        assert!(differences.fold(0.0, f32::max) < 1e-4, "{parted:?} {whole:?}");
    }
}

//! Layers that are a matrix: embedding, linear, norm; plain or affine-quantised.

use mlx_rs::error::Result;
use mlx_rs::ops::indexing::take_axis;
use mlx_rs::{Array, Dtype, fast, ops};

use super::LoadError;
use super::config::{Affine, ModelConfig};
use super::weights::Weights;

/// A matrix (or a stack of them), one row an output: plain or quantised.
#[derive(Debug, Clone)]
pub(super) enum Matrix {
    /// `[..., outputs, inputs]`.
    Plain(Array),
    /// Packed integers with a scale and a bias for each group of a row.
    Quantised {
        /// `[..., outputs, inputs * bits / 32]`, 32-bit words.
        packed: Array,
        /// `[..., outputs, inputs / group]`.
        scales: Array,
        /// As `scales`.
        biases: Array,
        affine: Affine,
    },
}

impl Matrix {
    /// Loads `{path}.weight` and, when they are there, its scales and biases. `shape` is the plain matrix's.
    pub(super) fn load(
        config: &ModelConfig,
        weights: &mut Weights<'_>,
        path: &str,
        shape: &[i32],
    ) -> std::result::Result<Self, LoadError> {
        let weight = format!("{path}.weight");
        let scales = format!("{path}.scales");
        let Some(quantization) = config.quantization.as_ref().filter(|_| weights.has(&scales)) else {
            return Ok(Self::Plain(weights.float(&weight, shape)?));
        };
        let affine = quantization.of(path);
        let inputs = shape.last().copied().unwrap_or_default();
        if inputs % affine.group != 0 {
            let mut error = weights.missing(&weight);
            if let LoadError::Tensor { reason, .. } = &mut error {
                *reason = format!(
                    "{inputs} inputs are not a multiple of the quantisation group of {}",
                    affine.group
                );
            }
            return Err(error);
        }
        let with_last = |last: i32| {
            let mut changed = shape.to_vec();
            if let Some(place) = changed.last_mut() {
                *place = last;
            }
            changed
        };
        let groups = with_last(inputs / affine.group);
        let packed = weights.packed(&weight, &with_last(inputs * affine.bits / 32))?;
        let scales = weights.float(&scales, &groups)?;
        let biases = weights.float(&format!("{path}.biases"), &groups)?;
        if weights.expands() {
            let plain = ops::dequantize(&packed, &scales, &biases, affine.group, affine.bits)?;
            // Now, so that the packed form can go.
            plain.eval()?;
            return Ok(Self::Plain(plain));
        }
        Ok(Self::Quantised {
            packed,
            scales,
            biases,
            affine,
        })
    }

    /// Type of what it gives.
    pub(super) fn dtype(&self) -> Dtype {
        match self {
            Self::Plain(weight) => weight.dtype(),
            Self::Quantised { scales, .. } => scales.dtype(),
        }
    }

    /// `x @ matrix.T`: `[..., inputs]` to `[..., outputs]`.
    pub(super) fn apply(&self, x: &Array) -> Result<Array> {
        match self {
            Self::Plain(weight) => x.matmul(weight.transpose()?),
            Self::Quantised {
                packed,
                scales,
                biases,
                affine,
            } => ops::quantized_matmul(x, packed, scales, biases, true, affine.group, affine.bits),
        }
    }

    /// For a stack of matrices: each row of `x` times the matrix that `experts` names for it.
    pub(super) fn apply_gathered(&self, x: &Array, experts: &Array, sorted: bool) -> Result<Array> {
        match self {
            Self::Plain(weight) => {
                mlx_ext::ops::gather_mm(x, &weight.swap_axes(-1, -2)?, None, Some(experts), sorted)
            }
            Self::Quantised {
                packed,
                scales,
                biases,
                affine,
            } => ops::gather_qmm(
                x,
                packed,
                scales,
                biases,
                None,
                experts,
                true,
                affine.group,
                affine.bits,
                sorted,
            ),
        }
    }

    /// The rows that `ids` names: `[1, length]` to `[1, length, inputs]`.
    pub(super) fn rows(&self, ids: &Array) -> Result<Array> {
        match self {
            Self::Plain(weight) => take_axis(weight, ids, 0),
            Self::Quantised {
                packed,
                scales,
                biases,
                affine,
            } => ops::dequantize(
                take_axis(packed, ids, 0)?,
                take_axis(scales, ids, 0)?,
                &take_axis(biases, ids, 0)?,
                affine.group,
                affine.bits,
            ),
        }
    }
}

/// A matrix with an optional bias.
#[derive(Debug)]
pub(super) struct Linear {
    matrix: Matrix,
    bias: Option<Array>,
}

impl Linear {
    pub(super) fn load(
        config: &ModelConfig,
        weights: &mut Weights<'_>,
        path: &str,
        outputs: i32,
        inputs: i32,
        with_bias: bool,
    ) -> std::result::Result<Self, LoadError> {
        let matrix = Matrix::load(config, weights, path, &[outputs, inputs])?;
        let bias = if with_bias {
            Some(weights.float(&format!("{path}.bias"), &[outputs])?)
        } else {
            None
        };
        Ok(Self { matrix, bias })
    }

    /// The matrix, unless there is a bias.
    pub(super) fn unbiased(&self) -> Option<Matrix> {
        self.bias.is_none().then(|| self.matrix.clone())
    }

    pub(super) fn apply(&self, x: &Array) -> Result<Array> {
        let product = self.matrix.apply(x)?;
        match &self.bias {
            Some(bias) => product.add(bias),
            None => Ok(product),
        }
    }
}

/// Root-mean-square normalisation over the last axis.
#[derive(Debug)]
pub(super) struct RmsNorm {
    weight: Array,
    eps: f32,
}

impl RmsNorm {
    pub(super) fn load(
        config: &ModelConfig,
        weights: &mut Weights<'_>,
        path: &str,
        width: i32,
    ) -> std::result::Result<Self, LoadError> {
        Ok(Self {
            weight: weights.float(&format!("{path}.weight"), &[width])?,
            eps: config.norm_eps,
        })
    }

    pub(super) fn gain(&self) -> Array {
        self.weight.clone()
    }

    pub(super) fn apply(&self, x: &Array) -> Result<Array> {
        fast::rms_norm(x, Some(&self.weight), self.eps)
    }
}

/// `silu(gate) * up`, the activation of every feed-forward network here.
pub(super) fn swiglu(gate: &Array, up: &Array) -> Result<Array> {
    gate.multiply(ops::sigmoid(gate)?)?.multiply(up)
}

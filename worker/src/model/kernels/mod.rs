//! Kernels of our own for decoding: one forward pass over the next token of each of several sequences, in five launches a
//! layer (six with experts) instead of some twenty.
//!
//! | module    | idea                                                                               |
//! |-----------|------------------------------------------------------------------------------------|
//! | `source`  | the kernels' texts, put together for CUDA or Metal                                  |
//! | `project` | products with a few rows, with normalisation, activation, routing, residual folded in |
//! | `attend`  | rotation, append to the cache, attention over block tables                          |
//! | `decode`  | a whole decoder of them, its graph kept by MLX                                      |
//! | `choose`  | the test against the reference path that decides whether they are used              |
//!
//! The texts lie in `source/`: one algorithm in the C++ that CUDA and Metal share, and a page for each of the two that
//! gives what they call differently one name. They are used on a device only after they have given the reference path's
//! results there, and faster.

mod attend;
mod choose;
mod decode;
mod project;
mod source;

pub use choose::KernelReport;
pub(super) use choose::{PIECES, choose};
pub(super) use decode::{AttentionWeights, Feed, KernelDecoder, LayerWeights, Weights};

/// Why kernels do not serve a model or a device.
#[derive(Debug)]
pub(super) enum Unfit {
    /// There are none for this device or shape; the reason.
    Unsupported(String),
    /// MLX failed.
    Mlx(mlx_rs::error::Exception),
}

impl From<mlx_rs::error::Exception> for Unfit {
    fn from(error: mlx_rs::error::Exception) -> Self {
        Self::Mlx(error)
    }
}

impl std::fmt::Display for Unfit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unsupported(reason) => f.write_str(reason),
            Self::Mlx(error) => write!(f, "MLX: {}", error.what()),
        }
    }
}

fn unfit(reason: impl Into<String>) -> Unfit {
    Unfit::Unsupported(reason.into())
}

/// What can be made, or why it cannot.
type Made<T> = std::result::Result<T, Unfit>;

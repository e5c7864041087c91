//! Rotation, append to the cache and attention over block tables, for one token of each of several sequences.

use mlx_ext::{Kernel, Language, Launch};
use mlx_rs::error::{Exception, Result};
use mlx_rs::{Array, Dtype, ops};

use super::source::{Body, Defines, kernel};
use super::{Made, unfit};
use crate::model::config::ModelConfig;

const WARPS: i32 = 8;
/// A sequence is divided among at most so many groups of threads ...
const SHARES: i32 = 32;
/// ... of at least so many positions each.
const SHORTEST: i32 = 64;
/// Most rows of a step: as many counters are kept for each key head.
pub(super) const MOST_ROWS: i32 = 256;

/// The kernel, made for one model's heads and one cache's slabs.
#[derive(Debug)]
pub(super) struct Attend {
    attend: Kernel,
    /// Puts the shares together, where `attend` cannot do it itself.
    merge: Option<Kernel>,
    /// One counter for each row and group of heads; zero between launches.
    tickets: Array,
    heads: i32,
    head_dim: i32,
    tiles: i32,
    tile: i32,
    block: i32,
    dtype: Dtype,
}

/// What a launch reads beside the projections.
#[derive(Debug, Clone, Copy)]
pub(super) struct Places<'a> {
    /// `[rows]`, int32: tokens of each sequence before the new one; -1 for a row without a token.
    pub(super) positions: &'a Array,
    /// `[rows, width]`, int32: the blocks of each sequence.
    pub(super) tables: &'a Array,
    /// `[kv_heads, positions, head_dim]`, written in place.
    pub(super) keys: &'a Array,
    /// As `keys`.
    pub(super) values: &'a Array,
}

impl Attend {
    /// `positions`: those of a slab; `block`: positions of a block.
    pub(super) fn new(config: &ModelConfig, positions: i32, block: i32, dtype: Dtype) -> Made<Self> {
        let ModelConfig {
            heads,
            kv_heads,
            head_dim,
            rope,
            norm_eps,
            ..
        } = *config;
        let language = Language::of_device()?.ok_or_else(|| unfit("no kernels for the CPU"))?;
        if !matches!(head_dim, 64 | 128 | 256) || heads % kv_heads != 0 {
            return Err(unfit(format!("no kernel for heads of {head_dim}")));
        }
        let tile = tile(heads / kv_heads, head_dim, language);
        let mut defines = Defines::default();
        let joined = (heads + 2 * kv_heads) * head_dim;
        defines
            .set("WARPS", WARPS)
            .set("HEADS", heads)
            .set("KV_HEADS", kv_heads)
            .set("GROUP_HEADS", heads / kv_heads)
            .set("TILE", tile)
            .set("HEAD_DIM", head_dim)
            .set("SHARES", SHARES)
            .set("SHORTEST", SHORTEST)
            .set("BLOCK", block)
            .set("POSITIONS", positions)
            .set("Q_STRIDE", joined)
            .set("Q_START", 0)
            .set("K_STRIDE", joined)
            .set("K_START", heads * head_dim)
            .set("V_STRIDE", joined)
            .set("V_START", (heads + kv_heads) * head_dim)
            .float("EPSILON", f64::from(norm_eps))
            .float("ROPE_SCALE", f64::from(rope.scale))
            .float("ROPE_BASE", f64::from(rope.theta).log2())
            .float("SCALE", 1.0 / f64::from(head_dim).sqrt());
        let inputs = [
            "q",
            "k",
            "v",
            "q_gain",
            "k_gain",
            "positions",
            "tables",
            "keys",
            "values",
            "tickets",
        ];
        // CUDA's groups put their shares together themselves.
        let outputs: &[&str] = match language {
            Language::Cuda => &["out", "parts"],
            Language::Metal => &["parts"],
        };
        let attend = kernel(Body::Attend, "", &defines, dtype, &inputs, outputs)?;
        let merge = match language {
            Language::Cuda => None,
            Language::Metal => Some(kernel(
                Body::Merge,
                "",
                &defines,
                dtype,
                &["positions", "parts"],
                &["out"],
            )?),
        };
        let tiles = kv_heads * (heads / kv_heads / tile);
        let tickets = ops::zeros_dtype(&[MOST_ROWS * tiles], Dtype::Int32)?.contiguous()?;
        tickets.eval()?;
        Ok(Self {
            attend,
            merge,
            tickets,
            heads,
            head_dim,
            tiles,
            tile,
            block,
            dtype,
        })
    }

    /// `joined`: `[rows, (heads + 2 * kv_heads) * head_dim]`, the three projections side by side. Returns
    /// `[rows, heads * head_dim]`; whoever reads the slabs afterwards has to depend on it.
    pub(super) fn apply(&self, joined: &Array, gains: [&Array; 2], places: Places<'_>) -> Result<Array> {
        let rows = joined.dim(0);
        if rows > MOST_ROWS {
            return Err(Exception::custom(format!(
                "{rows} rows in a step, at most {MOST_ROWS}"
            )));
        }
        let [query_gain, key_gain] = gains;
        let threads = WARPS * 32;
        let result = (vec![rows, self.heads * self.head_dim], self.dtype);
        let parts = rows * self.tiles * SHARES * self.tile * (self.head_dim + 2);
        let mut outputs = vec![(vec![parts], Dtype::Float32)];
        if self.merge.is_none() {
            outputs.insert(0, result.clone());
        }
        let longest = places.tables.dim(1) * self.block;
        let mut made = self.attend.apply(
            &[
                joined,
                joined,
                joined,
                query_gain,
                key_gain,
                places.positions,
                places.tables,
                places.keys,
                places.values,
                &self.tickets,
            ],
            &Launch {
                grid: [self.tiles * threads, rows, most_shares(longest)],
                group: [threads, 1, 1],
                outputs,
            },
        )?;
        let parts = made.pop();
        let made = match (&self.merge, parts) {
            (None, _) => made.pop(),
            (Some(merge), Some(parts)) => merge
                .apply(
                    &[places.positions, &parts],
                    &Launch {
                        grid: [self.tiles * threads, rows, 1],
                        group: [threads, 1, 1],
                        outputs: vec![result],
                    },
                )?
                .pop(),
            (Some(_), None) => None,
        };
        made.ok_or_else(|| Exception::custom("a kernel without a result"))
    }
}

/// Query heads that a group of threads serves at once: as many as its registers hold.
fn tile(group_heads: i32, head_dim: i32, language: Language) -> i32 {
    let most = match (head_dim, language) {
        (256, Language::Metal) => 2,
        (256, _) | (_, Language::Metal) => 4,
        _ => 8,
    };
    (1..=most.min(group_heads))
        .rev()
        .find(|tile| group_heads % tile == 0)
        .unwrap_or(1)
}

/// Groups that a sequence of `length` positions is divided among; the kernel counts the same way.
fn shares(length: i32) -> i32 {
    let mut span = SHORTEST;
    while span * SHARES < length {
        span *= 2;
    }
    ((length + span - 1) / span).max(1)
}

/// Groups that any sequence of up to `longest` positions needs.
fn most_shares(longest: i32) -> i32 {
    if longest < SHORTEST * SHARES {
        shares(longest)
    } else {
        SHARES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_launch_has_the_groups_that_any_shorter_sequence_needs() {
        let mut most = 0;
        for length in 1..20_000 {
            let count = shares(length);
            assert!((1..=SHARES).contains(&count));
            most = most.max(count);
            assert!(most_shares(length) >= most);
        }
        assert_eq!([1, 64, 65, 2048, 2049].map(shares), [1, 1, 2, 32, 17]);
    }

    #[test]
    fn tiles_divide_the_heads_of_a_group() {
        assert_eq!(tile(2, 128, Language::Cuda), 2);
        assert_eq!(tile(8, 128, Language::Cuda), 8);
        assert_eq!(tile(16, 128, Language::Cuda), 8);
        assert_eq!(tile(8, 256, Language::Cuda), 4);
        assert_eq!(tile(8, 128, Language::Metal), 4);
        assert_eq!(tile(7, 128, Language::Cuda), 7);
        assert_eq!(tile(1, 64, Language::Metal), 1);
    }

    /// What `attend.kernel` keeps in group memory, of which Metal has 32 KiB and CUDA 48 without asking.
    #[test]
    fn a_group_has_room_for_its_heads() {
        for (language, most) in [(Language::Metal, 32 << 10), (Language::Cuda, 48 << 10)] {
            for head_dim in [64, 128, 256] {
                for group_heads in 1..=16 {
                    let tile = tile(group_heads, head_dim, language);
                    let floats = (tile + 2 + WARPS * tile) * head_dim + 2 * WARPS * tile + 1;
                    assert!(
                        floats * 4 <= most,
                        "{} bytes for {tile} heads of {head_dim} on {language:?}",
                        floats * 4
                    );
                }
            }
        }
    }
}

//! Keys and values of one sequence, contiguous, grown in steps.

use mlx_ext::ops::{slice, slice_update};
use mlx_rs::error::Result;
use mlx_rs::{Array, ops};

/// Positions added when a cache is full: growing copies it, so not every token may.
const GROWTH: i32 = 256;

/// Keys and values of all layers of one sequence.
#[derive(Debug)]
pub struct SequenceCache {
    layers: Vec<LayerCache>,
    length: i32,
}

/// Keys and values of one layer, each `[1, kv_heads, capacity, head_dim]`.
#[derive(Debug)]
pub(super) struct LayerCache {
    keys: Option<Array>,
    values: Option<Array>,
    kv_heads: i32,
    head_dim: i32,
}

impl SequenceCache {
    pub(super) fn new(layers: usize, kv_heads: i32, head_dim: i32) -> Self {
        let layer = || LayerCache {
            keys: None,
            values: None,
            kv_heads,
            head_dim,
        };
        Self {
            layers: (0..layers).map(|_| layer()).collect(),
            length: 0,
        }
    }

    /// Positions in it.
    #[must_use]
    pub fn length(&self) -> usize {
        usize::try_from(self.length).unwrap_or_default()
    }

    /// Bytes it holds.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.arrays().map(|array| array.nbytes() as u64).sum()
    }

    /// Its arrays, to be evaluated between the chunks of a prefill.
    pub fn arrays(&self) -> impl Iterator<Item = &Array> {
        self.layers
            .iter()
            .flat_map(|layer| layer.keys.iter().chain(layer.values.iter()))
    }

    /// Positions before the ones that a forward pass is about to add; the layers that take part in it.
    pub(super) fn begin(&mut self, new: i32) -> (i32, impl Iterator<Item = &mut LayerCache>) {
        let offset = self.length;
        self.length += new;
        (offset, self.layers.iter_mut())
    }
}

impl LayerCache {
    /// Appends keys and values, `[1, kv_heads, new, head_dim]`, at `offset`; returns all up to there.
    pub(super) fn append(&mut self, offset: i32, keys: &Array, values: &Array) -> Result<(Array, Array)> {
        let new = keys.dim(2);
        let end = offset + new;
        let keys = Self::put(&mut self.keys, offset, end, keys, self.kv_heads, self.head_dim)?;
        let values = Self::put(
            &mut self.values,
            offset,
            end,
            values,
            self.kv_heads,
            self.head_dim,
        )?;
        Ok((keys, values))
    }

    fn put(
        place: &mut Option<Array>,
        offset: i32,
        end: i32,
        update: &Array,
        heads: i32,
        width: i32,
    ) -> Result<Array> {
        let capacity = place.as_ref().map_or(0, |array| array.dim(2));
        if end > capacity {
            let more = (end - capacity + GROWTH - 1) / GROWTH * GROWTH;
            let room = ops::zeros_dtype(&[1, heads, more, width], update.dtype())?;
            *place = Some(match place.take() {
                Some(old) => ops::concatenate(&[old, room], 2)?,
                None => room,
            });
        }
        // Taken out, so that MLX finds a single owner and writes in place.
        let Some(old) = place.take() else {
            return Err(mlx_rs::error::Exception::custom("a cache without room"));
        };
        let updated = slice_update(&old, update, &[0, 0, offset, 0], &[1, heads, end, width]);
        drop(old);
        let updated = updated?;
        let all = slice(&updated, &[0, 0, 0, 0], &[1, heads, end, width])?;
        *place = Some(updated);
        Ok(all)
    }
}

//! Keys and values of all sequences, one store for each in every layer, and how a forward pass finds its way in them.
//!
//! A store is `[kv_heads, positions, head_dim]` to whoever writes and reads; a block of the cache is a run of its positions,
//! and consecutive blocks are consecutive positions. What is decided in blocks elsewhere (`crates/kv-cache`) arrives here
//! as [`Span`]s. How a store lies in memory is its own affair (`store.rs`).

use kv_cache::KvQuantization;
use mlx_ext::Language;
use mlx_ext::ops::{slice, slice_update};
use mlx_rs::error::{Exception, Result};
use mlx_rs::transforms::async_eval;
use mlx_rs::{Array, Dtype};

use super::store::{Store, Written};

/// Consecutive positions of a slab.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// The first.
    pub start: i32,
    /// How many, at least 1.
    pub length: i32,
}

/// Positions of one slab copied to others, in every layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Move {
    /// The first to read.
    pub from: i32,
    /// The first to write.
    pub to: i32,
    /// How many.
    pub length: i32,
}

/// Keys and values of one layer.
#[derive(Debug)]
pub(super) struct LayerSlabs {
    pub(super) keys: Store,
    pub(super) values: Store,
}

/// Keys and values of all layers.
#[derive(Debug)]
pub struct KvSlabs {
    layers: Vec<LayerSlabs>,
    kv_heads: i32,
    positions: i32,
    /// Positions of a slab, of which the last may be nobody's.
    axis: i32,
    dtype: Dtype,
}

/// Positions of a slab for `positions` that are used. MLX's CUDA build (0.32.2) attends with a single query by cuDNN where keys
/// and values look like slices of mlx-lm's cache: of a buffer of a multiple of 256 positions. It takes the first positions of
/// that buffer then, whatever the slice was. Ours begin anywhere, so no slab has such a length there.
fn axis(positions: i32, language: Option<Language>) -> i32 {
    const THEIR_MULTIPLE: i32 = 256;
    positions + i32::from(language == Some(Language::Cuda) && positions % THEIR_MULTIPLE == 0)
}

impl KvSlabs {
    /// `shape`: `[kv_heads, positions, head_dim]`.
    pub(super) fn new(
        layers: usize,
        shape: [i32; 3],
        dtype: Dtype,
        quantization: Option<KvQuantization>,
    ) -> Result<Self> {
        let [kv_heads, positions, width] = shape;
        let axis = axis(positions, Language::of_device()?);
        let layer = |_| {
            Ok(LayerSlabs {
                keys: Store::new([kv_heads, axis, width], dtype, quantization)?,
                values: Store::new([kv_heads, axis, width], dtype, quantization)?,
            })
        };
        Ok(Self {
            layers: (0..layers).map(layer).collect::<Result<_>>()?,
            kv_heads,
            positions,
            axis,
            dtype,
        })
    }

    /// Positions that may be used.
    #[must_use]
    pub fn positions(&self) -> i32 {
        self.positions
    }

    /// Heads, and positions of each: the first axes of every slab.
    #[must_use]
    pub fn extent(&self) -> [i32; 2] {
        [self.kv_heads, self.axis]
    }

    /// Type of keys and values as attention sees them.
    #[must_use]
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Bytes of all slabs.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.layers
            .iter()
            .map(|layer| layer.keys.bytes() + layer.values.bytes())
            .sum()
    }

    /// One entry a layer.
    pub(super) fn layers(&self) -> &[LayerSlabs] {
        &self.layers
    }

    /// The slabs of every layer's keys and values, `[kv_heads, positions, head_dim]`, where these lie in them as they are.
    pub(super) fn plain(&self) -> Option<Vec<[&Array; 2]>> {
        self.layers
            .iter()
            .map(|layer| Some([layer.keys.plain()?, layer.values.plain()?]))
            .collect()
    }

    /// Copies positions, in the order given; whatever is issued later sees them copied.
    ///
    /// # Errors
    ///
    /// MLX's own.
    pub fn copy(&self, moves: &[Move]) -> Result<()> {
        for &Move { from, to, length } in moves {
            let mut written = Vec::new();
            let stores = self.layers.iter().flat_map(|layer| [&layer.keys, &layer.values]);
            for slab in stores.flat_map(Store::slabs) {
                let array = slab.array();
                let (heads, width) = (array.dim(0), array.dim(2));
                // Memory of its own: what is read and what is written may not be one buffer to MLX.
                let read = slice(array, &[0, from, 0], &[heads, from + length, width])?.contiguous()?;
                written.push(slab.write(&read, &[0, to, 0], &[heads, to + length, width])?);
            }
            // Each before the next, which may read what it wrote.
            async_eval(&written)?;
        }
        Ok(())
    }
}

/// One chunk of one sequence's prompt.
#[derive(Debug)]
pub struct Chunk<'a> {
    /// Tokens of the sequence before it.
    pub start: i32,
    /// Where the chunk's keys and values go, in token order.
    pub writes: &'a [Span],
    /// Where those of the whole sequence lie, the chunk included, in token order.
    pub reads: &'a [Span],
}

/// The next token of each of several sequences.
#[derive(Debug)]
pub struct Rows {
    /// Tokens of each sequence before it: `[rows]`, int32.
    positions: Array,
    /// Where each one's keys and values go: `[rows]`, int32.
    slots: Array,
    first_slot: i32,
    /// Where those of each whole sequence lie, the new token included.
    reads: Vec<Vec<Span>>,
    blocks: Vec<Vec<i32>>,
    padded: Option<Padded>,
}

/// All rows' keys gathered at once, each padded to the longest.
#[derive(Debug)]
pub(super) struct Padded {
    /// Places in a slab whose heads are laid end to end: `[rows, kv_heads, longest]`, int32. MLX copies such a place at once; of
    /// positions gathered along the middle axis its CPU build would copy one number at a time.
    pub(super) index: Array,
    /// True where a position counts: `[rows, 1, 1, longest]`.
    pub(super) mask: Array,
}

/// One row of a [`Rows`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Tokens of the sequence before the new one.
    pub position: i32,
    /// Where the new token's keys and values go.
    pub slot: i32,
    /// Where the whole sequence's lie, the new token included, in token order.
    pub reads: Vec<Span>,
    /// The sequence's blocks, for kernels.
    pub blocks: Vec<i32>,
}

impl Rows {
    /// `most_padded`: rows are gathered together while that reads at most so many positions; past it each row is
    /// attended to by itself, which costs more operations and reads no padding. `extent`: of the slabs that are read
    /// ([`KvSlabs::extent`]).
    ///
    /// # Errors
    ///
    /// MLX's own.
    pub fn new(rows: Vec<Row>, most_padded: i32, extent: [i32; 2]) -> Result<Self> {
        let count = i32::try_from(rows.len()).unwrap_or(i32::MAX);
        let column = |value: fn(&Row) -> i32| {
            let values: Vec<i32> = rows.iter().map(value).collect();
            Array::from_slice(&values, &[count])
        };
        let (positions, slots) = (column(|row| row.position), column(|row| row.slot));
        let first_slot = rows.first().map_or(0, |row| row.slot);
        let (reads, blocks): (Vec<Vec<Span>>, _) =
            rows.into_iter().map(|row| (row.reads, row.blocks)).unzip();
        let padded = Padded::new(&reads, most_padded, extent).transpose()?;
        Ok(Self {
            positions,
            slots,
            first_slot,
            reads,
            blocks,
            padded,
        })
    }

    /// The rows' blocks: `[rows, width]`, int32, filled up with zeros. The width is a power of two, so that a growing
    /// sequence changes it seldom: a graph that MLX keeps is one for each shape.
    pub(super) fn tables(&self) -> Array {
        let longest = self.blocks.iter().map(Vec::len).max().unwrap_or(0);
        let width = longest.max(16).next_power_of_two();
        let mut tables = vec![0; width * self.blocks.len()];
        for (row, blocks) in tables.chunks_exact_mut(width).zip(&self.blocks) {
            for (place, &block) in row.iter_mut().zip(blocks) {
                *place = block;
            }
        }
        Array::from_slice(&tables, &[self.count(), i32::try_from(width).unwrap_or(i32::MAX)])
    }

    pub(super) fn count(&self) -> i32 {
        i32::try_from(self.reads.len()).unwrap_or(i32::MAX)
    }

    pub(super) fn positions(&self) -> &Array {
        &self.positions
    }

    pub(super) fn reads(&self) -> &[Vec<Span>] {
        &self.reads
    }

    pub(super) fn padded(&self) -> Option<&Padded> {
        self.padded.as_ref()
    }

    /// Writes `[rows, kv_heads, 1, head_dim]`, one position for each row.
    pub(super) fn write(&self, store: &Store, update: &Array) -> Result<Written> {
        store.write(update, |slab, update| {
            if self.count() > 1 {
                return slab.write_rows(&self.slots, update, 1);
            }
            let (heads, width) = (slab.array().dim(0), slab.array().dim(2));
            let update = update.reshape(&[heads, 1, width])?;
            let at = self.first_slot;
            slab.write(&update, &[0, at, 0], &[heads, at + 1, width])
        })
    }
}

impl Padded {
    /// `None` for a single row, which has nothing to be padded to, or when it would read too much.
    fn new(reads: &[Vec<Span>], most: i32, extent: [i32; 2]) -> Option<Result<Self>> {
        let length = |spans: &[Span]| spans.iter().map(|span| span.length).sum::<i32>();
        let longest = reads.iter().map(|spans| length(spans)).max()?;
        let rows = i32::try_from(reads.len()).ok()?;
        let total: i32 = reads.iter().map(|spans| length(spans)).sum();
        // Lengths that differ much would mostly read padding.
        let all = rows.checked_mul(longest)?;
        if rows < 2 || all > most || all > total.saturating_mul(2) {
            return None;
        }
        let [heads, each] = extent;
        heads.checked_mul(each)?;
        let capacity = usize::try_from(all).ok()?;
        let (mut index, mut mask) = (Vec::with_capacity(capacity), Vec::with_capacity(capacity));
        for spans in reads {
            for span in spans {
                index.extend(span.start..span.start + span.length);
            }
            let padding = usize::try_from(longest - length(spans)).ok()?;
            mask.resize(index.len(), true);
            // The mask hides it, but only a finite number: a position of the row's own has one, an unused one may not.
            index.resize(index.len() + padding, spans.first().map_or(0, |span| span.start));
            mask.resize(index.len(), false);
        }
        let mask = Array::from_slice(&mask, &[rows, 1, 1, longest]);
        let positions = Array::from_slice(&index, &[rows, 1, longest]);
        let heads: Vec<i32> = (0..heads).map(|head| head * each).collect();
        let heads = Array::from_slice(&heads, &[1, extent[0], 1]);
        Some(positions.add(heads).map(|index| Self { index, mask }))
    }
}

impl Chunk<'_> {
    /// Writes `[1, kv_heads, length, head_dim]`.
    pub(super) fn write(&self, store: &Store, update: &Array) -> Result<Written> {
        store.write(update, |slab, update| {
            let (heads, width) = (slab.array().dim(0), slab.array().dim(2));
            let update = update.squeeze_axes(&[0])?;
            let mut written: Option<Array> = None;
            let mut done = 0;
            for &Span { start, length } in self.writes {
                let part = if length == update.dim(1) {
                    update.clone()
                } else {
                    slice(&update, &[0, done, 0], &[heads, done + length, width])?
                };
                let (start, stop) = ([0, start, 0], [heads, start + length, width]);
                written = Some(match written.take() {
                    None => slab.write(&part, &start, &stop)?,
                    Some(array) => slice_update(&array, &part, &start, &stop)?,
                });
                done += length;
            }
            written.ok_or_else(|| Exception::custom("a chunk without a place for its keys and values"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_slab_on_cuda_passes_for_another_programs_cache() {
        for positions in [32, 256, 12_800, 16_384, 23_744] {
            let axis = axis(positions, Some(Language::Cuda));
            assert!(axis % 256 != 0 && (positions..positions + 2).contains(&axis));
        }
        for language in [None, Some(Language::Metal)] {
            assert_eq!(axis(256, language), 256);
        }
    }
}

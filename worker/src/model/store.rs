//! Keys or values of one layer in memory: as they are, or quantised.
//!
//! What is written is encoded on its way in, what is read is gathered first and decoded then. Attention sees nothing but what
//! is stored, of the very tokens too that a step computes: so the same sequence has the same keys and values however it was
//! cut into chunks, wherever its blocks came from, and whoever it is stepped with, but for values so close to the border
//! between two steps that another order of summing them up puts them on the other side.

use kv_cache::KvQuantization;
use mlx_ext::Slab;
use mlx_ext::ops::slice;
use mlx_rs::error::{Exception, Result};
use mlx_rs::{Array, Dtype, ops};

use super::kv::{Padded, Span};

/// Room for keys or values `[kv_heads, positions, head_dim]`.
#[derive(Debug)]
pub(super) struct Store {
    form: Form,
    /// Each `[kv_heads, positions, ...]`: one, or one for each part of what quantising makes.
    slabs: Vec<Slab>,
}

/// What stands in the slabs.
#[derive(Debug, Clone, Copy)]
enum Form {
    /// The elements.
    Plain,
    /// MLX's affine quantisation: elements packed into words of 32 bits, scales, biases.
    Quantized { bits: i32, group_size: i32 },
}

impl Store {
    /// `shape`: `[kv_heads, positions, head_dim]`; `dtype`: that of the elements, and of scales and biases.
    pub(super) fn new(shape: [i32; 3], dtype: Dtype, quantization: Option<KvQuantization>) -> Result<Self> {
        let [heads, positions, width] = shape;
        let slab = |width, dtype| Slab::new(&[heads, positions, width], dtype);
        let Some(quantization) = quantization else {
            return Ok(Self {
                form: Form::Plain,
                slabs: vec![slab(width, dtype)?],
            });
        };
        let (bits, group_size) = (i32::from(quantization.bits), i32::from(quantization.group_size));
        let groups = width / group_size.max(1);
        Ok(Self {
            form: Form::Quantized { bits, group_size },
            slabs: vec![
                slab(width * bits / 32, Dtype::Uint32)?,
                slab(groups, dtype)?,
                slab(groups, dtype)?,
            ],
        })
    }

    /// Bytes of all slabs.
    pub(super) fn bytes(&self) -> u64 {
        self.slabs.iter().map(Slab::bytes).sum()
    }

    /// For copies of positions, which are the same in every slab.
    pub(super) fn slabs(&self) -> &[Slab] {
        &self.slabs
    }

    /// The slab, where elements lie in it as they are.
    pub(super) fn plain(&self) -> Option<&Array> {
        match (self.form, self.slabs.as_slice()) {
            (Form::Plain, [slab]) => Some(slab.array()),
            _ => None,
        }
    }

    /// Writes `update`, `[..., head_dim]`; `put` writes a part of it, of the same shape but for the last axis, to that part's
    /// slab.
    pub(super) fn write(
        &self,
        update: &Array,
        put: impl Fn(&Slab, &Array) -> Result<Array>,
    ) -> Result<Written> {
        let parts = self.form.encode(update)?;
        let written = self.slabs.iter().zip(&parts).map(|(slab, part)| put(slab, part));
        Ok(Written {
            form: self.form,
            parts: written.collect::<Result<_>>()?,
        })
    }
}

impl Form {
    fn encode(self, elements: &Array) -> Result<Vec<Array>> {
        match self {
            Self::Plain => Ok(vec![elements.clone()]),
            Self::Quantized { bits, group_size } => {
                let (packed, scales, biases) = ops::quantize(elements, group_size, bits)?;
                Ok(vec![packed, scales, biases])
            }
        }
    }

    fn decode(self, parts: &[Array]) -> Result<Array> {
        match (self, parts) {
            (Self::Plain, [elements]) => Ok(elements.clone()),
            (Self::Quantized { bits, group_size }, [packed, scales, biases]) => {
                ops::dequantize(packed, scales, biases, group_size, bits)
            }
            _ => Err(Exception::custom(format!("{} parts of {self:?}", parts.len()))),
        }
    }
}

/// A store as it is when a step has written to it: what is read here waits for that.
#[derive(Debug)]
pub(super) struct Written {
    form: Form,
    /// The slabs.
    parts: Vec<Array>,
}

impl Written {
    /// What has to be evaluated for it to be written, where nobody reads it.
    pub(super) fn into_parts(self) -> Vec<Array> {
        self.parts
    }

    /// The positions `spans`, in order: `[1, kv_heads, length, head_dim]`. Of elements as they are one span is a view;
    /// several are copied.
    pub(super) fn read(&self, spans: &[Span]) -> Result<Array> {
        self.gather(|slab| {
            let (heads, width) = (slab.dim(0), slab.dim(2));
            let part =
                |&Span { start, length }: &Span| slice(slab, &[0, start, 0], &[heads, start + length, width]);
            let all = match spans {
                [one] => part(one)?,
                several => {
                    let parts = several.iter().map(part).collect::<Result<Vec<_>>>()?;
                    ops::concatenate(&parts, 1)?
                }
            };
            all.expand_dims(0)
        })
    }

    /// Those of several rows, each padded to the longest: `[rows, kv_heads, longest, head_dim]`.
    pub(super) fn read_rows(&self, padded: &Padded) -> Result<Array> {
        self.gather(|slab| {
            let width = slab.dim(2);
            slab.reshape(&[-1, width])?.take_axis(&padded.index, 0)
        })
    }

    fn gather(&self, from: impl Fn(&Array) -> Result<Array>) -> Result<Array> {
        let parts = self.parts.iter().map(from).collect::<Result<Vec<_>>>()?;
        self.form.decode(&parts)
    }
}

#[cfg(test)]
mod tests {
    use mlx_rs::transforms::eval;

    use super::super::kv::{Chunk, KvSlabs, Move, Row, Rows};
    use super::*;

    const FORMS: [Option<KvQuantization>; 3] = [
        None,
        Some(KvQuantization {
            bits: 8,
            group_size: 32,
        }),
        Some(KvQuantization {
            bits: 4,
            group_size: 32,
        }),
    ];

    /// Different numbers, `[..., 64]`.
    fn numbers(shape: &[i32]) -> Array {
        let count: i32 = shape.iter().product();
        let all: Vec<f32> = (0..count).map(|n| (n as f32 * 0.37).sin() * 3.0).collect();
        Array::from_slice(&all, shape)
    }

    /// What a store gives back of numbers.
    fn through(numbers: &Array, quantization: Option<KvQuantization>) -> Vec<f32> {
        let kept = match quantization {
            None => numbers.clone(),
            Some(how) => {
                let (group, bits) = (i32::from(how.group_size), i32::from(how.bits));
                let (packed, scales, biases) = ops::quantize(numbers, group, bits).unwrap();
                ops::dequantize(packed, scales, &biases, group, bits).unwrap()
            }
        };
        floats(&kept)
    }

    fn chunk<'a>(writes: &'a [Span], reads: &'a [Span]) -> Chunk<'a> {
        Chunk {
            start: 0,
            writes,
            reads,
        }
    }

    const fn span(start: i32, length: i32) -> Span {
        Span { start, length }
    }

    fn floats(array: &Array) -> Vec<f32> {
        array.contiguous().unwrap().to_vec_cast::<f32>().unwrap()
    }

    #[test]
    fn a_chunk_is_read_as_it_is_stored() {
        for form in FORMS {
            let store = Store::new([2, 16, 64], Dtype::Float32, form).unwrap();
            // As attention has them: another axis inside, and so not contiguous.
            let update = numbers(&[1, 6, 2, 64]).swap_axes(1, 2).unwrap();
            let expected = through(&update, form);
            let places = [span(9, 4), span(2, 2)];
            let written = chunk(&places, &places).write(&store, &update).unwrap();
            let read = written.read(&places).unwrap();
            assert_eq!((read.shape(), read.dtype()), (&[1, 2, 6, 64][..], Dtype::Float32));
            assert!(floats(&read) == expected, "{form:?}");
            let differs = floats(&update) != expected;
            assert_eq!(differs, form.is_some(), "quantising loses something");
        }
    }

    /// The slabs themselves are written: what one step leaves there the next one finds, whoever still holds what.
    #[test]
    fn rows_are_appended_in_place() {
        for form in FORMS {
            let store = Store::new([2, 16, 64], Dtype::Float32, form).unwrap();
            let row = |slot, start| Row {
                position: 3,
                slot,
                reads: vec![span(start, 4)],
                blocks: Vec::new(),
            };
            let before = numbers(&[1, 2, 8, 64]);
            let place = [span(0, 8)];
            let first = chunk(&place, &place).write(&store, &before).unwrap();
            eval(&first.parts).unwrap();
            let both = Rows::new(vec![row(3, 0), row(7, 4)], 100, [2, 16]).unwrap();
            let new = numbers(&[2, 2, 1, 64]).add(Array::from_f32(1.0)).unwrap();
            let written = both.write(&store, &new).unwrap();
            let gathered = written.read_rows(both.padded().unwrap()).unwrap();
            let single = Rows::new(vec![row(7, 4)], 100, [2, 16]).unwrap();
            let again = slice(&new, &[0, 0, 0, 0], &[1, 2, 1, 64]).unwrap();
            eval([&gathered]).unwrap();

            let (old, new) = (through(&before, form), through(&new, form));
            let head = |values: &[f32], at: usize| values[at * 64..][..64].to_vec();
            // `[2 rows, 2 heads, 4 positions, 64]`; the last position of each is the new one.
            let expected: Vec<f32> = (0..16)
                .flat_map(|at| {
                    let (row, side, position) = (at / 8, at / 4 % 2, at % 4);
                    match position {
                        3 => head(&new, row * 2 + side),
                        _ => head(&old, side * 8 + row * 4 + position),
                    }
                })
                .collect();
            assert!(floats(&gathered) == expected, "{form:?}");
            // One row takes another way.
            let alone = single.write(&store, &again).unwrap().read(&[span(7, 1)]).unwrap();
            assert!(floats(&alone) == new[..128], "{form:?}");
            drop((first, written));
        }
    }

    #[test]
    fn copies_take_every_part_along() {
        for form in FORMS {
            let kv = KvSlabs::new(2, [2, 16, 64], Dtype::Float32, form).unwrap();
            let update = numbers(&[1, 2, 8, 64]);
            let place = [span(0, 8)];
            for layer in kv.layers() {
                for store in [&layer.keys, &layer.values] {
                    let written = chunk(&place, &place).write(store, &update).unwrap();
                    eval(&written.into_parts()).unwrap();
                }
            }
            let moves = [(0, 8, 4), (8, 12, 4)].map(|(from, to, length)| Move { from, to, length });
            kv.copy(&moves).unwrap();
            let expected = through(&slice(&update, &[0, 0, 0, 0], &[1, 2, 4, 64]).unwrap(), form);
            for layer in kv.layers() {
                for store in [&layer.keys, &layer.values] {
                    let stored = Written {
                        form: store.form,
                        parts: store.slabs().iter().map(|slab| slab.array().clone()).collect(),
                    };
                    for start in [8, 12] {
                        let copied = stored.read(&[span(start, 4)]).unwrap();
                        assert!(floats(&copied) == expected, "{form:?} at {start}");
                    }
                }
            }
        }
    }
}

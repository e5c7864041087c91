//! Memory that is written step after step: allocated once, written in place whoever still reads it.

use crate::error;
use crate::ops::{scatter_rows, slice_update};
use mlx_rs::error::Result;
use mlx_rs::{Array, Dtype, ops};

/// A fixed buffer with the shape of an array.
///
/// MLX arrays are values: an update makes a new array, and reuses the old one's buffer only when nobody else holds it.
/// With steps in flight somebody always does, so that every append to a cache would copy the whole cache. A slab's
/// writes have a holder of their own, so that they go into the slab.
///
/// What that costs is order: an operation that reads the slab must be issued before the one that overwrites what it
/// reads, or read the *result* of the one that writes it. MLX runs the operations of one stream in the order of issue as far as
/// it sees them share a buffer, which all writes through a slab do.
#[derive(Debug)]
pub struct Slab {
    array: Array,
}

impl Slab {
    /// Memory that nobody has written yet. It is reserved now and takes up room as it is written; what is read before
    /// that is anything, also not-a-number.
    ///
    /// # Errors
    ///
    /// MLX's own, such as no memory, or an axis without elements.
    pub fn new(shape: &[i32], dtype: Dtype) -> Result<Self> {
        let like = ops::zeros_dtype(&[1], dtype)?;
        let array = error::array(|result| {
            // SAFETY: the pointer and the length are those of a live slice, the handle is valid for the call. The bytes
            // are any bytes, which every element type of MLX allows.
            unsafe {
                mlx_sys::mlx_sys_array_uninitialised(result, shape.as_ptr(), shape.len(), like.as_ptr())
            }
        })?;
        Ok(Self { array })
    }

    /// Zeros, written now.
    ///
    /// # Errors
    ///
    /// As [`Slab::new`].
    pub fn zeros(shape: &[i32], dtype: Dtype) -> Result<Self> {
        let slab = Self::new(shape, dtype)?;
        let start = vec![0; shape.len()];
        let zeros = ops::zeros_dtype(shape, dtype)?;
        slab.write(&zeros, &start, shape)?.eval()?;
        Ok(slab)
    }

    /// For reading what earlier evaluations have written.
    #[must_use]
    pub fn array(&self) -> &Array {
        &self.array
    }

    /// Writes `update` at `start..stop`, which name every axis. Returns the slab as it is then; reading *that* waits for the
    /// write.
    ///
    /// # Errors
    ///
    /// Bounds or a shape that do not fit.
    pub fn write(&self, update: &Array, start: &[i32], stop: &[i32]) -> Result<Array> {
        let shape = self.array.shape();
        if stop == shape && start.iter().all(|&first| first == 0) {
            return self.write_all(update);
        }
        slice_update(&self.alias()?, update, start, stop)
    }

    /// MLX takes a slice that covers everything for the update itself, and writes nothing; as rows it is written.
    fn write_all(&self, update: &Array) -> Result<Array> {
        let shape = self.array.shape();
        let rows: Vec<i32> = (0..shape.first().copied().unwrap_or(1)).collect();
        let count = i32::try_from(rows.len()).unwrap_or(i32::MAX);
        let indices = Array::from_slice(&rows, &[count]);
        self.write_rows(&indices, &ops::broadcast_to(update, shape)?.expand_dims(1)?, 0)
    }

    /// Replaces rows along `axis`, as [`scatter_rows`] does. Returns the slab as it is then.
    ///
    /// # Errors
    ///
    /// Shapes that do not fit.
    pub fn write_rows(&self, indices: &Array, updates: &Array, axis: i32) -> Result<Array> {
        scatter_rows(&self.alias()?, indices, updates, axis)
    }

    /// A fresh array over the buffer. It must have no holder but the operation that updates it when that is evaluated, or
    /// MLX copies it first: so it does not leave this module.
    fn alias(&self) -> Result<Array> {
        error::array(|result| {
            // SAFETY: both handles are valid for the call; the alias keeps the buffer alive by itself.
            unsafe { mlx_sys::mlx_sys_array_alias(result, self.array.as_ptr()) }
        })
    }

    /// Bytes of the buffer.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.array.nbytes() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mlx_rs::transforms::eval;

    fn update(slab: &Slab, value: f32, at: i32) -> Array {
        let update = Array::from_slice(&[value, value], &[1, 2]);
        slab.write(&update, &[at, 0], &[at + 1, 2]).unwrap()
    }

    #[test]
    fn writes_go_into_the_slab() {
        let slab = Slab::zeros(&[4, 2], Dtype::Float32).unwrap();
        eval([&update(&slab, 1.0, 1)]).unwrap();
        eval([&update(&slab, 2.0, 3)]).unwrap();
        assert_eq!(
            slab.array().to_vec_cast::<f32>().unwrap(),
            [0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 2.0, 2.0]
        );
    }

    #[test]
    fn a_write_of_everything_goes_into_the_slab_too() {
        for shape in [vec![2, 3], vec![1], vec![1, 1, 1], vec![2, 1, 3]] {
            let slab = Slab::new(&shape, Dtype::Float32).unwrap();
            let ones = ops::ones_dtype(&shape, Dtype::Float32).unwrap();
            let written = slab.write(&ones, &vec![0; shape.len()], &shape).unwrap();
            assert_eq!(written.shape(), shape);
            written.eval().unwrap();
            assert!(
                slab.array()
                    .to_vec_cast::<f32>()
                    .unwrap()
                    .iter()
                    .all(|&x| x == 1.0),
                "{shape:?}"
            );
        }
    }

    #[test]
    fn rows_are_scattered_along_an_axis() {
        let slab = Slab::zeros(&[2, 4, 1], Dtype::Float32).unwrap();
        let rows = Array::from_slice(&[3_i32, 0], &[2]);
        let updates = Array::from_slice(&[1.0_f32, 2.0, 3.0, 4.0], &[2, 2, 1, 1]);
        let written = slab.write_rows(&rows, &updates, 1).unwrap();
        eval([&written]).unwrap();
        assert_eq!(
            slab.array().to_vec_cast::<f32>().unwrap(),
            [3.0, 0.0, 0.0, 1.0, 4.0, 0.0, 0.0, 2.0]
        );
    }

    #[test]
    fn an_alias_outlives_its_slab() {
        let slab = Slab::zeros(&[2, 2], Dtype::Float32).unwrap();
        let written = update(&slab, 5.0, 0);
        drop(slab);
        assert_eq!(written.to_vec_cast::<f32>().unwrap(), [5.0, 5.0, 0.0, 0.0]);
    }
}

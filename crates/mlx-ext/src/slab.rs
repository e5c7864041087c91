//! Memory that is written step after step: allocated once, written in place whoever still reads it.

use crate::error;
use mlx_rs::error::Result;
use mlx_rs::{Array, Dtype, ops};

/// A fixed buffer with the shape of an array.
///
/// MLX arrays are values: an update makes a new array, and reuses the old one's buffer only when nobody else holds it.
/// With steps in flight somebody always does, so that every append to a cache would copy the whole cache. A slab's
/// [`writable`](Slab::writable) array has no other holder; the operation that consumes it writes into the slab.
///
/// What that costs is order: an operation that reads the slab must be issued before the one that overwrites what it
/// reads, or read the *result* of the one that writes it. All operations of one stream run in the order of issue.
#[derive(Debug)]
pub struct Slab {
    array: Array,
}

impl Slab {
    /// Zeros, allocated now.
    ///
    /// # Errors
    ///
    /// MLX's own, such as no memory.
    pub fn zeros(shape: &[i32], dtype: Dtype) -> Result<Self> {
        let array = ops::zeros_dtype(shape, dtype)?;
        // A broadcast zero has no memory of its own.
        let array = array.contiguous()?;
        array.eval()?;
        Ok(Self { array })
    }

    /// For reading what earlier evaluations have written.
    #[must_use]
    pub fn array(&self) -> &Array {
        &self.array
    }

    /// For one operation that updates its input, such as [`slice_update`](crate::ops::slice_update) or
    /// [`scatter_rows`](crate::ops::scatter_rows): drop it before evaluating, and read what that operation returns.
    ///
    /// # Errors
    ///
    /// None in practice: a slab is evaluated and contiguous from the start.
    pub fn writable(&self) -> Result<Array> {
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
    use crate::ops::{scatter_rows, slice, slice_update};
    use mlx_rs::transforms::{async_eval, eval};

    fn update(slab: &Slab, value: f32, at: i32) -> Array {
        let update = Array::from_slice(&[value, value], &[1, 2]);
        slice_update(&slab.writable().unwrap(), &update, &[at, 0], &[at + 1, 2]).unwrap()
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
    fn writes_are_in_place_while_others_read() {
        let slab = Slab::zeros(&[1024, 1024], Dtype::Float32).unwrap();
        mlx_rs::memory::reset_peak_memory().unwrap();
        let before = mlx_rs::memory::active_memory().unwrap();
        let mut held = Vec::new();
        for step in 0..20 {
            let update = ops::ones::<f32>(&[1, 1024]).unwrap();
            let written =
                slice_update(&slab.writable().unwrap(), &update, &[step, 0], &[step + 1, 1024]).unwrap();
            let read = slice(&written, &[step, 0], &[step + 1, 1024])
                .unwrap()
                .sum(false)
                .unwrap();
            async_eval([&read]).unwrap();
            // The steps before stay in somebody's hands.
            held.push((written, read));
        }
        for (_, read) in &held {
            assert_eq!(read.item_cast::<f32>(), 1024.0);
        }
        let grown = mlx_rs::memory::peak_memory().unwrap().saturating_sub(before);
        assert!(grown < 1 << 20, "the slab of 4 MiB was copied: {grown} bytes");
        assert_eq!(slab.array().sum(false).unwrap().item_cast::<f32>(), 20.0 * 1024.0);
    }

    #[test]
    fn rows_are_scattered_along_an_axis() {
        let slab = Slab::zeros(&[2, 4, 1], Dtype::Float32).unwrap();
        let rows = Array::from_slice(&[3_i32, 0], &[2]);
        let updates = Array::from_slice(&[1.0_f32, 2.0, 3.0, 4.0], &[2, 2, 1, 1]);
        let written = scatter_rows(&slab.writable().unwrap(), &rows, &updates, 1).unwrap();
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

//! Operations that mlx-rs 0.33 lacks, or offers only for element types known at compile time.

use crate::{Language, error};
use mlx_rs::error::{Exception, Result};
use mlx_rs::{Array, Dtype, Stream};

/// A null array stands for an argument that is not given.
fn optional(array: Option<&Array>) -> mlx_sys::mlx_array {
    // SAFETY: mlx_array_new makes a null handle, which owns nothing.
    array.map_or_else(|| unsafe { mlx_sys::mlx_array_new() }, Array::as_ptr)
}

/// Matrix products of rows of `a` with matrices picked from `b`: for each position of the broadcast index arrays,
/// `a[lhs] @ b[rhs]`. Shapes: `a` is `[..., m, k]`, `b` is `[..., k, n]`; the result is `[indices..., m, n]`.
///
/// `sorted_indices` promises that `rhs_indices` never decrease, which lets MLX multiply runs of rows at once.
///
/// # Errors
///
/// Shapes that do not fit.
pub fn gather_mm(
    a: &Array,
    b: &Array,
    lhs_indices: Option<&Array>,
    rhs_indices: Option<&Array>,
    sorted_indices: bool,
) -> Result<Array> {
    let stream = Stream::thread_local_or_default();
    error::array(|result| {
        // SAFETY: all handles are alive for the call; null handles mean "not given".
        unsafe {
            mlx_sys::mlx_gather_mm(
                result,
                a.as_ptr(),
                b.as_ptr(),
                optional(lhs_indices),
                optional(rhs_indices),
                sorted_indices,
                stream.as_ptr(),
            )
        }
    })
}

/// `a | b`, bit by bit, of arrays of integers.
///
/// # Errors
///
/// Shapes or types that do not fit.
pub fn bitwise_or(a: &Array, b: &Array) -> Result<Array> {
    let stream = Stream::thread_local_or_default();
    error::array(|result| {
        // SAFETY: the handles are alive for the call.
        unsafe { mlx_sys::mlx_bitwise_or(result, a.as_ptr(), b.as_ptr(), stream.as_ptr()) }
    })
}

/// An array of integers for the host to read while the device still has use for `array`.
///
/// On CUDA MLX (0.32.2) moves an array that is read into memory of the host and gives the device's back at once, also when steps
/// that have been issued are still to read it there; whatever gets that memory next may be what they find. So on CUDA this is
/// a copy, which nobody but the host should use. Where device and host share their memory it is `array` itself.
///
/// # Errors
///
/// An array of another type; MLX has no device.
pub fn for_host(array: &Array) -> Result<Array> {
    match Language::of_device()? {
        // MLX's own copy would share the memory.
        Some(Language::Cuda) => bitwise_or(array, array),
        Some(Language::Metal) | None => Ok(array.clone()),
    }
}

/// The same bytes read as another element type; the last axis grows or shrinks with the size of an element.
///
/// # Errors
///
/// A last axis whose bytes do not divide by the new element's size.
pub fn view(array: &Array, dtype: Dtype) -> Result<Array> {
    let stream = Stream::thread_local_or_default();
    error::array(|result| {
        // SAFETY: the handles are alive for the call.
        unsafe { mlx_sys::mlx_view(result, array.as_ptr(), dtype.into(), stream.as_ptr()) }
    })
}

/// `array[start[0]..stop[0], start[1]..stop[1], ...]`; `start` and `stop` name every axis.
///
/// # Errors
///
/// Bounds that do not name every axis.
pub fn slice(array: &Array, start: &[i32], stop: &[i32]) -> Result<Array> {
    let strides = Strides::ones(start, stop, array)?;
    let stream = Stream::thread_local_or_default();
    error::array(|result| {
        // SAFETY: pointers and lengths come from live slices of equal length.
        unsafe {
            mlx_sys::mlx_slice(
                result,
                array.as_ptr(),
                start.as_ptr(),
                start.len(),
                stop.as_ptr(),
                stop.len(),
                strides.as_ptr(),
                start.len(),
                stream.as_ptr(),
            )
        }
    })
}

/// `array` with `update` written at `start..stop`. The write is in place when nobody else holds `array`'s buffer at the
/// time of evaluation.
///
/// # Errors
///
/// Bounds that do not name every axis, or an update of another shape.
pub fn slice_update(array: &Array, update: &Array, start: &[i32], stop: &[i32]) -> Result<Array> {
    let strides = Strides::ones(start, stop, array)?;
    let stream = Stream::thread_local_or_default();
    error::array(|result| {
        // SAFETY: pointers and lengths come from live slices of equal length.
        unsafe {
            mlx_sys::mlx_slice_update(
                result,
                array.as_ptr(),
                update.as_ptr(),
                start.as_ptr(),
                start.len(),
                stop.as_ptr(),
                stop.len(),
                strides.as_ptr(),
                start.len(),
                stream.as_ptr(),
            )
        }
    })
}

/// `array` with rows along `axis` replaced: row `indices[i]` becomes `updates[i]`. `indices`: `[n]`, distinct; `updates`:
/// `[n, ...]`, followed by `array`'s shape with a 1 at `axis`. The write is in place as with [`slice_update`].
///
/// # Errors
///
/// Shapes that do not fit.
pub fn scatter_rows(array: &Array, indices: &Array, updates: &Array, axis: i32) -> Result<Array> {
    let stream = Stream::thread_local_or_default();
    error::array(|result| {
        // SAFETY: the handles are alive for the call.
        unsafe {
            mlx_sys::mlx_scatter_single(
                result,
                array.as_ptr(),
                indices.as_ptr(),
                updates.as_ptr(),
                axis,
                stream.as_ptr(),
            )
        }
    })
}

/// As many ones as an array has axes, without an allocation.
struct Strides([i32; Strides::MOST]);

impl Strides {
    const MOST: usize = 8;

    fn ones(start: &[i32], stop: &[i32], array: &Array) -> Result<&'static [i32]> {
        static ONES: Strides = Strides([1; Strides::MOST]);
        if start.len() != stop.len() || start.len() != array.ndim() {
            return Err(Exception::custom(format!(
                "slice bounds name {} and {} axes, the array has {}",
                start.len(),
                stop.len(),
                array.ndim()
            )));
        }
        ONES.0
            .get(..start.len())
            .ok_or_else(|| Exception::custom("an array of more than 8 axes"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mlx_rs::ops;
    use mlx_rs::transforms::async_eval;

    /// What is issued after a long computation finds an array whole that the host has read, and whose place others
    /// have asked for, before its turn came.
    #[test]
    fn a_reader_takes_nothing_from_steps_under_way() {
        let numbers: Vec<u32> = (0..16).collect();
        let table = ops::arange::<_, i32>(None, 4096, None).unwrap();
        let busy = ops::ones::<f32>(&[1024, 1024]).unwrap();
        for round in 0..20_u32 {
            // Made by the device, as a host's array is not moved.
            let round_array = Array::from_slice(&[round], &[1]);
            let tokens = bitwise_or(&Array::from_slice(&numbers, &[16]), &round_array).unwrap();
            let told = for_host(&tokens).unwrap();
            async_eval([&tokens, &told]).unwrap();
            let mut long = busy.clone();
            for _ in 0..3 {
                long = long
                    .matmul(&busy)
                    .unwrap()
                    .multiply(Array::from_f32(1e-3))
                    .unwrap();
            }
            async_eval([&long]).unwrap();
            let late = table.take_axis(&tokens, 0).unwrap();
            async_eval([&late]).unwrap();
            let expected: Vec<u32> = numbers.iter().map(|number| number | round).collect();
            assert_eq!(told.to_vec_cast::<u32>().unwrap(), expected);
            drop(told);
            let others: Vec<Array> = (0..64)
                .map(|at| Array::from_slice(&[4000_u32 + at; 16], &[16]))
                .map(|other| bitwise_or(&other, &round_array).unwrap())
                .collect();
            async_eval(&others).unwrap();
            let found = late.to_vec_cast::<u32>().unwrap();
            assert_eq!(found, expected, "in round {round}");
        }
    }
}

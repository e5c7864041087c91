//! Graphs that are built once and replayed: `mlx::compile` for a function of arrays.

use crate::error;
use crate::kernel::Arrays;
use mlx_rs::Array;
use mlx_rs::error::{Exception, Result};
use std::cell::RefCell;
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;

type Function = dyn Fn(&[Array]) -> Result<Vec<Array>>;

/// A function whose graph MLX keeps, one for each combination of its inputs' shapes and types.
///
/// The function runs only when such a combination comes for the first time; after that its graph is replayed with the new
/// inputs, which costs a fraction of building it. So it must build the same graph every time, from its inputs and from
/// arrays that stay what they are, such as weights: arrays it captures become part of the graph. Chains of element-wise
/// operations become one kernel.
#[derive(Debug)]
pub struct Compiled {
    closure: mlx_sys::mlx_closure,
    failure: Rc<Failure>,
}

/// What the function said when it failed last: mlx-c passes on only that it did.
#[derive(Debug, Default)]
struct Failure(RefCell<Option<Exception>>);

struct Payload {
    function: Box<Function>,
    failure: Rc<Failure>,
}

impl Compiled {
    /// Nothing runs yet.
    ///
    /// # Errors
    ///
    /// MLX's own.
    pub fn new(function: impl Fn(&[Array]) -> Result<Vec<Array>> + 'static) -> Result<Self> {
        let failure = Rc::<Failure>::default();
        let payload = Box::new(Payload {
            function: Box::new(function),
            failure: Rc::clone(&failure),
        });
        // SAFETY: `call` and `release` take back what Box::into_raw gives here; MLX calls `release` once, when the last copy
        // of the closure is gone.
        let plain = unsafe {
            mlx_sys::mlx_closure_new_func_payload(
                Some(call),
                Box::into_raw(payload).cast::<c_void>(),
                Some(release),
            )
        };
        let plain = Closure(plain);
        // SAFETY: makes an empty closure for the result.
        let mut compiled = Closure(unsafe { mlx_sys::mlx_closure_new() });
        // SAFETY: both closures are alive for the call; the result keeps what it needs of the first.
        error::check(|| unsafe { mlx_sys::mlx_compile(&mut compiled.0, plain.0, false) })?;
        let closure = compiled.0;
        std::mem::forget(compiled);
        Ok(Self { closure, failure })
    }

    /// The function's outputs for these inputs, as a lazy graph.
    ///
    /// # Errors
    ///
    /// The function's own, or MLX's.
    pub fn apply(&self, inputs: &[&Array]) -> Result<Vec<Array>> {
        let inputs = Arrays::of(inputs);
        let mut outputs = Arrays::empty();
        // SAFETY: all handles are alive for the call.
        let done =
            error::check(|| unsafe { mlx_sys::mlx_closure_apply(&mut outputs.0, self.closure, inputs.0) });
        match self.failure.0.take() {
            Some(own) => Err(own),
            None => done.and_then(|()| outputs.take()),
        }
    }
}

impl Drop for Compiled {
    fn drop(&mut self) {
        // SAFETY: the closure is owned and freed once.
        unsafe { mlx_sys::mlx_closure_free(self.closure) };
    }
}

/// A closure, owned.
struct Closure(mlx_sys::mlx_closure);

impl Drop for Closure {
    fn drop(&mut self) {
        // SAFETY: the closure is owned and freed once.
        unsafe { mlx_sys::mlx_closure_free(self.0) };
    }
}

unsafe extern "C" fn call(
    result: *mut mlx_sys::mlx_vector_array,
    inputs: mlx_sys::mlx_vector_array,
    payload: *mut c_void,
) -> i32 {
    // SAFETY: the payload is the one that `new` gave and lives as long as the closure.
    let payload = unsafe { &*payload.cast_const().cast::<Payload>() };
    let outputs = catch_unwind(AssertUnwindSafe(|| {
        // The vector belongs to the caller.
        let inputs = std::mem::ManuallyDrop::new(Arrays(inputs)).take()?;
        (payload.function)(&inputs)
    }))
    .unwrap_or_else(|_| Err(Exception::custom("a function to be compiled panicked")));
    match outputs {
        Ok(outputs) => {
            let handles: Vec<mlx_sys::mlx_array> = outputs.iter().map(Array::as_ptr).collect();
            // SAFETY: `result` is a vector of the caller's; the handles are alive for the call, which takes references of
            // its own.
            unsafe { mlx_sys::mlx_vector_array_set_data(result, handles.as_ptr(), handles.len()) }
        }
        Err(error) => {
            payload.failure.0.replace(Some(error));
            1
        }
    }
}

unsafe extern "C" fn release(payload: *mut c_void) {
    // SAFETY: the payload came from Box::into_raw in `new` and is given back once.
    drop(unsafe { Box::from_raw(payload.cast::<Payload>()) });
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[test]
    fn a_function_runs_once_for_each_shape() {
        let weight = Array::from_slice(&[2.0_f32, 3.0], &[2]);
        let runs = Rc::new(Cell::new(0));
        let counted = Rc::clone(&runs);
        let compiled = Compiled::new(move |inputs: &[Array]| {
            counted.set(counted.get() + 1);
            let scaled = inputs[0].multiply(&weight)?;
            Ok(vec![scaled.add(&inputs[1])?, scaled])
        })
        .unwrap();
        let one = Array::from_slice(&[1.0_f32], &[1]);
        for n in [1.0_f32, 5.0] {
            let outputs = compiled
                .apply(&[&Array::from_slice(&[n, n], &[2]), &one])
                .unwrap();
            assert_eq!(
                outputs[0].to_vec_cast::<f32>().unwrap(),
                [2.0 * n + 1.0, 3.0 * n + 1.0]
            );
            assert_eq!(outputs[1].to_vec_cast::<f32>().unwrap(), [2.0 * n, 3.0 * n]);
        }
        assert_eq!(runs.get(), 1);
        let outputs = compiled
            .apply(&[&Array::from_slice(&[1.0_f32; 4], &[2, 2]), &one])
            .unwrap();
        assert_eq!(outputs[1].shape(), [2, 2]);
        assert_eq!(runs.get(), 2);
    }

    #[test]
    fn a_failure_is_the_functions_own() {
        let compiled =
            Compiled::new(|inputs: &[Array]| inputs[0].matmul(&inputs[1]).map(|product| vec![product]))
                .unwrap();
        let (a, b) = (
            Array::from_slice(&[1.0_f32; 6], &[2, 3]),
            Array::from_slice(&[1.0_f32; 6], &[2, 3]),
        );
        let error = compiled.apply(&[&a, &b]).unwrap_err();
        assert!(error.what().contains("matmul"), "{}", error.what());
        // And it works again for what fits.
        let product = compiled.apply(&[&a, &b.transpose().unwrap()]).unwrap();
        assert_eq!(product[0].to_vec_cast::<f32>().unwrap(), [3.0; 4]);

        let panics = Compiled::new(|_: &[Array]| panic!("on purpose")).unwrap();
        assert!(panics.apply(&[&a]).unwrap_err().what().contains("panicked"));
    }
}

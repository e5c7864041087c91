//! Failures inside mlx-c: it reports them through one process-wide handler and returns a status only.
//!
//! mlx-rs registers a handler that keeps the message for its own functions. We put one in front that keeps a copy for
//! ours and passes every message on.

use mlx_rs::Array;
use mlx_rs::error::{Exception, Result};
use std::cell::Cell;
use std::ffi::{CStr, c_char, c_void};
use std::sync::Once;

thread_local! {
    static LAST: Cell<Option<String>> = const { Cell::new(None) };
}

unsafe extern "C" {
    /// mlx-rs' own handler (mlx-rs 0.33.0, src/error.rs), exported under this name.
    fn default_mlx_error_handler(message: *const c_char, data: *mut c_void);
}

extern "C" fn keep_and_pass_on(message: *const c_char, data: *mut c_void) {
    // SAFETY: mlx-c calls the handler with a zero-terminated string that lives for the call; the second function has
    // the same contract.
    unsafe {
        LAST.set(Some(CStr::from_ptr(message).to_string_lossy().into_owned()));
        default_mlx_error_handler(message, data);
    }
}

fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // mlx-rs registers its handler with its first operation; ours has to come after it.
        let _ = Array::from_int(0).as_type::<f32>();
        // SAFETY: the handler is a plain function without data.
        unsafe { mlx_sys::mlx_set_error_handler(Some(keep_and_pass_on), std::ptr::null_mut(), None) };
    });
}

/// Runs a call of mlx-c and turns a non-zero status into the message that MLX gave.
#[track_caller]
pub(crate) fn check(call: impl FnOnce() -> i32) -> Result<()> {
    install();
    match call() {
        0 => Ok(()),
        status => {
            let message = LAST
                .take()
                .unwrap_or_else(|| format!("MLX failed with status {status}"));
            Err(Exception::custom(message))
        }
    }
}

/// Runs a call of mlx-c that writes a new array to its argument.
#[track_caller]
pub(crate) fn array(call: impl FnOnce(*mut mlx_sys::mlx_array) -> i32) -> Result<Array> {
    // SAFETY: a null array is a valid place for a result; on failure nothing was put there.
    let mut result = unsafe { mlx_sys::mlx_array_new() };
    check(|| call(&mut result))?;
    // SAFETY: the call succeeded, so that `result` owns an array nobody else frees.
    Ok(unsafe { Array::from_ptr(result) })
}

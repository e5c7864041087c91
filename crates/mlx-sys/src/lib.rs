//! Bindings to [mlx-c](https://github.com/ml-explore/mlx-c) 0.7.0 over a prebuilt libmlx 0.32.2.
//!
//! Takes the place of the published crate of the same name and version, whose build script compiles MLX itself and
//! therefore needs Xcode. The items are mlx-c's own; see its headers. Beside them: [`blas`] and
//! [`mlx_sys_array_alias`].
#![allow(non_upper_case_globals, non_camel_case_types, non_snake_case, clippy::all)]

include!(concat!(env!("OUT_DIR"), "/bindings.rs"));

unsafe extern "C" {
    /// Writes to `result` a second array object over `source`'s buffer (`native/alias.cpp`), which must be evaluated and
    /// one whole row-contiguous buffer. Returns non-zero, after calling the error handler, when it is not. An operation
    /// that consumes the alias and may reuse its input's buffer writes into `source`.
    pub fn mlx_sys_array_alias(result: *mut mlx_array, source: mlx_array) -> std::ffi::c_int;

    /// Writes to `result` an array of that shape over memory that nobody has written yet, with the element type of `like`.
    /// Returns non-zero, after calling the error handler, for an impossible shape or when there is no memory.
    pub fn mlx_sys_array_uninitialised(
        result: *mut mlx_array,
        shape: *const std::ffi::c_int,
        axes: usize,
        like: mlx_array,
    ) -> std::ffi::c_int;
}

/// What multiplies matrices on the CPU: OpenBLAS with its configuration, or the BLAS that libmlx brings itself.
///
/// Calling it also keeps the OpenBLAS shim linked: the linker drops a library that nobody names. So the program's
/// start-up calls it and logs the answer.
pub fn blas() -> String {
    #[cfg(openblas)]
    {
        unsafe extern "C" {
            fn mlx_sys_blas_config() -> *const std::ffi::c_char;
        }
        // SAFETY: OpenBLAS returns a pointer to a static, zero-terminated string.
        let text = unsafe { std::ffi::CStr::from_ptr(mlx_sys_blas_config()) };
        return text.to_string_lossy().trim().to_owned();
    }
    #[cfg(not(openblas))]
    String::from(if cfg!(target_os = "macos") {
        "Accelerate"
    } else {
        "the one libmlx brings"
    })
}

/// How many threads multiply a matrix on the CPU. False where that is not ours to say: it is OpenBLAS's only.
pub fn set_blas_threads(count: usize) -> bool {
    #[cfg(openblas)]
    {
        unsafe extern "C" {
            fn mlx_sys_blas_threads(count: std::ffi::c_int);
        }
        let count = std::ffi::c_int::try_from(count.max(1)).unwrap_or(std::ffi::c_int::MAX);
        // SAFETY: OpenBLAS takes any positive number, at any time.
        unsafe { mlx_sys_blas_threads(count) };
        return true;
    }
    #[cfg(not(openblas))]
    {
        let _ = count;
        false
    }
}

/// mlx-rs seeds its random generator with this macOS clock; elsewhere the time of day in nanoseconds does as well.
#[cfg(not(target_os = "macos"))]
#[unsafe(no_mangle)]
extern "C" fn mach_approximate_time() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |elapsed| elapsed.as_nanos() as u64)
}

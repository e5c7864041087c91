//! Safe additions to mlx-rs: what this project needs of MLX that mlx-rs does not wrap.
//!
//! # Layout
//!
//! - [`mapped`]: arrays over memory-mapped files, so that weights stay file-backed pages;
//! - `prefetch`: mapped files read ahead of use; `lost`: a word about one that cannot be read any more;
//! - [`slab`]: memory that is written in place, step after step;
//! - [`ops`]: operations missing from mlx-rs, or present there only for types known at compile time;
//! - `device`: what memory the device has;
//! - `exit`: ending a process that has used MLX;
//! - [`kernel`]: kernels of our own, in CUDA and Metal source;
//! - [`compile`]: graphs built once and replayed;
//! - `error`: how a failure inside mlx-c becomes an [`mlx_rs::error::Exception`].
//!
//! All functions build lazy graphs on the calling thread's default stream, as mlx-rs' own do. MLX is not safe to be
//! driven from several threads at once: one thread, the engine's, owns all arrays.

pub mod compile;
mod device;
mod error;
mod exit;
pub mod kernel;
mod lost;
pub mod mapped;
pub mod ops;
mod prefetch;
pub mod slab;

pub use compile::Compiled;
pub use device::{DeviceMemory, device_memory};
pub use exit::exit_now;
pub use kernel::{Kernel, Language, Launch, Source};
pub use lost::LOST_PAGE;
pub use mapped::{MappedFile, MappedTensor};
pub use mlx_rs::error::{Exception, Result};
pub use prefetch::Prefetch;
pub use slab::Slab;

/// Which build of MLX this program runs on, for logs and status pages.
#[derive(Debug, Clone)]
pub struct Runtime {
    /// MLX's version, such as `0.32.2`.
    pub version: String,
    /// The device that operations run on by default: `metal`, `cuda` or `cpu`.
    pub device: &'static str,
    /// What multiplies float matrices on the CPU.
    pub cpu_blas: String,
}

/// Describes the MLX in use.
///
/// # Errors
///
/// An exception of MLX, such as a GPU build without a GPU.
pub fn runtime() -> Result<Runtime> {
    use mlx_rs::{Device, DeviceType};
    let mut version = mlx_sys_string();
    error::check(|| {
        // SAFETY: `version` is a valid, empty mlx_string that mlx_version fills.
        unsafe { mlx_sys::mlx_version(&mut version.0) }
    })?;
    let device = match Device::try_default()?.get_type()? {
        DeviceType::Cpu => "cpu",
        DeviceType::Gpu if cfg!(target_os = "macos") => "metal",
        DeviceType::Gpu => "cuda",
    };
    Ok(Runtime {
        version: version.to_string(),
        device,
        cpu_blas: mlx_sys::blas(),
    })
}

/// Waits until all work queued on the calling thread's default stream is done.
///
/// # Errors
///
/// An exception that the queued work raised.
pub fn synchronize() -> Result<()> {
    let stream = mlx_rs::Stream::thread_local_or_default();
    // SAFETY: the stream is alive for the whole call.
    error::check(|| unsafe { mlx_sys::mlx_synchronize(stream.as_ptr()) })
}

struct MlxString(mlx_sys::mlx_string);

fn mlx_sys_string() -> MlxString {
    // SAFETY: creates an empty string that MlxString frees.
    MlxString(unsafe { mlx_sys::mlx_string_new() })
}

impl std::fmt::Display for MlxString {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // SAFETY: mlx_string_data returns a zero-terminated string owned by `self`, or null when it is empty.
        let text = unsafe {
            let data = mlx_sys::mlx_string_data(self.0);
            if data.is_null() {
                return Ok(());
            } else {
                std::ffi::CStr::from_ptr(data)
            }
        };
        f.write_str(&text.to_string_lossy())
    }
}

impl Drop for MlxString {
    fn drop(&mut self) {
        // SAFETY: the string was made by mlx_string_new and is freed once.
        unsafe { mlx_sys::mlx_string_free(self.0) };
    }
}

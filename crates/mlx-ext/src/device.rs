//! What MLX says about the device that it runs on.

use std::ffi::CStr;

use mlx_rs::error::Result;

use crate::error;

/// Memory of the default device, as far as its backend tells.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DeviceMemory {
    /// All of it; on a unified-memory machine the machine's. Metal and CUDA.
    pub total_bytes: Option<u64>,
    /// What the system would have one program use at most. Metal only (`iogpu.wired_limit_mb`, or the system's own
    /// choice).
    pub working_set_bytes: Option<u64>,
    /// What no process uses now. CUDA only.
    pub free_bytes: Option<u64>,
}

/// Asks MLX about the default device's memory.
///
/// # Errors
///
/// An exception of MLX, such as a GPU build without a GPU.
pub fn device_memory() -> Result<DeviceMemory> {
    let info = Info::of_default_device()?;
    Ok(DeviceMemory {
        total_bytes: info.size(c"memory_size").or_else(|| info.size(c"total_memory")),
        working_set_bytes: info.size(c"max_recommended_working_set_size"),
        free_bytes: info.size(c"free_memory"),
    })
}

struct Info(mlx_sys::mlx_device_info);

impl Info {
    fn of_default_device() -> Result<Self> {
        // SAFETY: both calls create an object; `Info` frees the one, the end of this function the other.
        let (mut info, mut device) =
            unsafe { (Self(mlx_sys::mlx_device_info_new()), mlx_sys::mlx_device_new()) };
        // SAFETY: both objects are alive for the calls, and the device is freed once.
        let asked = error::check(|| unsafe {
            match mlx_sys::mlx_get_default_device(&mut device) {
                0 => mlx_sys::mlx_device_info_get(&mut info.0, device),
                status => status,
            }
        });
        // SAFETY: see above.
        unsafe { mlx_sys::mlx_device_free(device) };
        asked.map(|()| info)
    }

    /// A number by its name; `None` where this backend has none of that name.
    fn size(&self, key: &CStr) -> Option<u64> {
        let (mut exists, mut text, mut value) = (false, true, 0_usize);
        // SAFETY: the object and the zero-terminated key are alive for the calls, each of which writes to one place.
        let found = unsafe {
            mlx_sys::mlx_device_info_has_key(&mut exists, self.0, key.as_ptr()) == 0
                && exists
                && mlx_sys::mlx_device_info_is_string(&mut text, self.0, key.as_ptr()) == 0
                && !text
                && mlx_sys::mlx_device_info_get_size(&mut value, self.0, key.as_ptr()) == 0
        };
        found.then_some(value as u64)
    }
}

impl Drop for Info {
    fn drop(&mut self) {
        // SAFETY: made by mlx_device_info_new, freed once.
        unsafe { mlx_sys::mlx_device_info_free(self.0) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A GPU must tell its size, on which limits rest; the CPU backend has no memory of its own.
    #[test]
    fn a_gpu_tells_its_memory() {
        let memory = device_memory().unwrap();
        match crate::runtime().unwrap().device {
            "metal" => assert!(
                memory.working_set_bytes.is_some() && memory.total_bytes.is_some(),
                "{memory:?}"
            ),
            "cuda" => assert!(
                memory.free_bytes <= memory.total_bytes && memory.free_bytes.is_some(),
                "{memory:?}"
            ),
            _ => assert_eq!((memory.working_set_bytes, memory.free_bytes), (None, None)),
        }
    }
}

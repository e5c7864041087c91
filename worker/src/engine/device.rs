//! The device's memory, asked of MLX and the system; and the plan's limits, told to MLX.

use mlx_rs::error::Exception;

use super::memory::{DeviceFacts, DeviceKind, MemoryPlan};

/// Variables that MLX reads when it is first used: what one command buffer may hold.
pub const MAX_OPS_PER_BUFFER: &str = "MLX_MAX_OPS_PER_BUFFER";
/// See [`MAX_OPS_PER_BUFFER`].
pub const MAX_MB_PER_BUFFER: &str = "MLX_MAX_MB_PER_BUFFER";

/// What MLX finds in such a variable; `None`: its own choice for the chip is in force.
pub(super) fn setting(variable: &str) -> Option<i64> {
    std::env::var(variable).ok()?.trim().parse().ok()
}

/// Asks what memory there is, before anything is loaded.
///
/// # Errors
///
/// A GPU that does not tell its memory, or a system that does not tell the machine's.
pub fn facts() -> Result<DeviceFacts, Exception> {
    let told = mlx_ext::device_memory()?;
    let host = || {
        hostmem::host()
            .map(|host| host.total_bytes)
            .map_err(|error| Exception::custom(format!("the size of this machine's memory: {error}")))
    };
    let silent = || Exception::custom("the GPU does not tell how much memory it has");
    Ok(match mlx_ext::runtime()?.device {
        "metal" => DeviceFacts {
            kind: DeviceKind::Metal,
            bytes: told.working_set_bytes.ok_or_else(silent)?,
            free_bytes: None,
            memory_bytes: host()?,
        },
        "cuda" => {
            let total = told.total_bytes.ok_or_else(silent)?;
            DeviceFacts {
                kind: DeviceKind::Cuda,
                bytes: total,
                free_bytes: told.free_bytes,
                memory_bytes: total,
            }
        }
        _ => DeviceFacts {
            kind: DeviceKind::Cpu,
            bytes: host()?,
            free_bytes: None,
            memory_bytes: host()?,
        },
    })
}

/// Tells MLX the limits: above the ceiling it frees what it keeps before it allocates, and it keeps no more than the plan
/// says. It never refuses an allocation: that nothing asks for more is the plan's and the scheduler's work. Nothing is
/// wired.
///
/// # Errors
///
/// MLX's own.
pub fn apply(plan: &MemoryPlan) -> Result<(), Exception> {
    let size = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
    mlx_rs::memory::set_memory_limit(size(plan.ceiling_bytes))?;
    mlx_rs::memory::set_cache_limit(size(plan.buffer_cache_bytes))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_device_at_hand_has_memory() {
        let facts = facts().unwrap();
        assert!(
            facts.bytes > 100 << 20 && facts.memory_bytes >= facts.bytes,
            "{facts:?}"
        );
        assert!(
            facts.free_bytes.is_none_or(|free| free <= facts.bytes),
            "{facts:?}"
        );
    }
}

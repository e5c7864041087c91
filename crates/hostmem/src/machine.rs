//! What the machine is and how busy it is, beside its memory.
//!
//! | fact           | Linux                                                     | macOS                                    |
//! |----------------|-----------------------------------------------------------|------------------------------------------|
//! | cores          | `/proc/stat`                                              | `host_processor_info`                    |
//! | load           | `/proc/loadavg`                                           | `getloadavg`                             |
//! | network        | `/proc/net/dev`                                           | `getifaddrs`: counters of 32 bits        |
//! | hardware       | `/proc/cpuinfo`, `/etc/os-release`                        | sysctl                                   |
//! | accelerators   | `/sys/class/drm` (amdgpu), `/proc/driver/nvidia`          | the chip's own GPU                       |
//! | their state    | `/sys/class/drm` (amdgpu)                                 | not read                                 |

use std::io::Result;

use crate::system_machine as system;

/// Time that one core has spent, in ticks since the start of the system.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuTimes {
    /// At work.
    pub busy: u64,
    /// In all.
    pub total: u64,
}

impl CpuTimes {
    /// Share of the time since `before` that it was at work, in percent.
    #[must_use]
    pub fn percent_since(&self, before: &Self) -> f64 {
        let total = self.total.saturating_sub(before.total);
        if total == 0 {
            return 0.0;
        }
        let busy = self.busy.saturating_sub(before.busy).min(total);
        busy as f64 * 100.0 / total as f64
    }
}

/// Bytes over one network interface since it came up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Such as `en0`.
    pub name: String,
    /// In.
    pub received_bytes: u64,
    /// Out.
    pub sent_bytes: u64,
}

/// A GPU, or what takes its place.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Accelerator {
    /// Maker.
    pub vendor: Option<String>,
    /// Name for people.
    pub model: Option<String>,
    /// Whether it works in the machine's own memory.
    pub unified_memory: bool,
    /// Memory that it can use.
    pub memory_bytes: Option<u64>,
    /// Kernel driver, and its version.
    pub driver: Option<(String, Option<String>)>,
}

/// How busy an accelerator is, as far as its driver tells.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AcceleratorReading {
    /// Place in the list.
    pub index: usize,
    /// Name for people.
    pub name: String,
    /// Name that no other has, if there is one.
    pub uuid: String,
    /// Share of time at work.
    pub busy_percent: Option<f64>,
    /// Own memory in use.
    pub memory_used_bytes: Option<u64>,
    /// Own memory.
    pub memory_total_bytes: Option<u64>,
    /// Of the chip.
    pub temperature_celsius: Option<f64>,
    /// Of the memory.
    pub memory_temperature_celsius: Option<f64>,
    /// Of the fan's greatest speed.
    pub fan_percent: Option<f64>,
    /// Drawn now.
    pub power_watts: Option<f64>,
}

/// What the machine is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hardware {
    /// Such as `macOS` or a distribution's name.
    pub os_name: Option<String>,
    /// Its version.
    pub os_version: Option<String>,
    /// The kernel's.
    pub kernel: Option<String>,
    /// The container that this program runs in, if it does: `docker`, `podman`, `container`.
    pub container: Option<String>,
    /// Maker of the processor.
    pub cpu_vendor: Option<String>,
    /// Its name.
    pub cpu_model: Option<String>,
    /// Processors.
    pub sockets: Option<u32>,
    /// Cores.
    pub physical_cores: Option<u32>,
    /// Threads that run at the same time.
    pub logical_cores: Option<u32>,
    /// Memory of the machine.
    pub memory_bytes: u64,
    /// GPUs.
    pub accelerators: Vec<Accelerator>,
}

/// Times of every core, in order.
///
/// # Errors
/// The system does not tell.
pub fn cores() -> Result<Vec<CpuTimes>> {
    system::cores()
}

/// Load averages of 1, 5 and 15 minutes.
///
/// # Errors
/// The system does not tell.
pub fn load() -> Result<[f64; 3]> {
    system::load()
}

/// Every network interface.
///
/// # Errors
/// The system does not tell.
pub fn network() -> Result<Vec<Interface>> {
    system::network()
}

/// How busy the accelerators are: those whose driver tells.
#[must_use]
pub fn accelerators() -> Vec<AcceleratorReading> {
    system::accelerators()
}

/// What the machine is. What cannot be found out is absent.
///
/// # Errors
/// Not even the size of its memory can be found out.
pub fn hardware() -> Result<Hardware> {
    system::hardware()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_is_found() {
        let before = cores().unwrap();
        assert!(
            !before.is_empty() && before.iter().all(|c| c.busy <= c.total && c.total > 0),
            "{before:?}"
        );
        let work: u64 = (0..3_000_000_u64).map(std::hint::black_box).sum();
        assert!(work > 0);
        let after = cores().unwrap();
        assert_eq!(after.len(), before.len());
        for (now, then) in after.iter().zip(&before) {
            assert!((0.0..=100.0).contains(&now.percent_since(then)));
        }
        assert!(load().unwrap().iter().all(|l| *l >= 0.0));
        assert!(network().unwrap().iter().any(|i| i.name.starts_with("lo")));
        let hardware = hardware().unwrap();
        assert!(hardware.memory_bytes > 100 << 20 && hardware.kernel.is_some());
        assert_eq!(hardware.logical_cores.unwrap() as usize, before.len());
    }

    #[test]
    fn shares_of_time() {
        let times = |busy, total| CpuTimes { busy, total };
        assert_eq!(times(30, 200).percent_since(&times(10, 100)), 20.0);
        assert_eq!(times(30, 200).percent_since(&times(30, 200)), 0.0);
        assert_eq!(
            times(5, 200).percent_since(&times(10, 100)),
            0.0,
            "a counter that went back"
        );
    }
}

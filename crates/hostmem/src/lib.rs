//! Memory facts of the host and of a process, in bytes; what the machine is and how busy it is (`machine`).
//!
//! | fact            | Linux                                             | macOS                                          |
//! |-----------------|---------------------------------------------------|------------------------------------------------|
//! | total           | `MemTotal`, or the cgroup's limit if smaller        | `hw.memsize`                                   |
//! | available       | `MemAvailable`, or the cgroup's rest if smaller     | free, purgeable and file-backed pages           |
//! | wired           | `Unevictable` + unreclaimable slab                  | wired pages                                    |
//! | compressed      | zswap's pool                                      | pages held by the compressor                   |
//! | pressure        | PSI, share of time stalled in the last 10 s         | `kern.memorystatus_vm_pressure_level`          |
//! | footprint       | anonymous + shared memory + swapped                | `ri_phys_footprint` (what `footprint` prints)   |
//!
//! The macOS side is compile-checked and linked against Apple's symbols; it has not been run on a Mac.

#[cfg(target_os = "linux")]
mod linux;
#[cfg(target_os = "linux")]
mod linux_machine;
pub mod machine;
#[cfg(target_os = "macos")]
mod macos;
#[cfg(target_os = "macos")]
mod macos_machine;

#[cfg(target_os = "linux")]
use linux as system;
#[cfg(target_os = "linux")]
use linux_machine as system_machine;
#[cfg(target_os = "macos")]
use macos as system;
#[cfg(target_os = "macos")]
use macos_machine as system_machine;

/// How short of memory the host is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pressure {
    /// Enough.
    Normal,
    /// The system works to find memory.
    Warning,
    /// Programs stand still for want of memory, or are about to be killed.
    Critical,
}

impl Pressure {
    /// Lower-case name.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Normal => "normal",
            Self::Warning => "warning",
            Self::Critical => "critical",
        }
    }
}

/// Memory of the machine, or of the container that this program is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostMemory {
    /// All of it.
    pub total_bytes: u64,
    /// What programs could get without swapping.
    pub available_bytes: u64,
    /// What can be neither swapped nor compressed.
    pub wired_bytes: u64,
    /// What compressed pages take.
    pub compressed_bytes: u64,
    /// Swap space.
    pub swap_total_bytes: u64,
    /// Of it in use.
    pub swap_used_bytes: u64,
    /// How short of it the host is.
    pub pressure: Pressure,
}

/// Memory of one process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessMemory {
    /// Pages in memory, file-backed ones (mapped weights) included.
    pub resident_bytes: u64,
    /// What the process costs the system: memory that no file backs, swapped or compressed parts included.
    pub footprint_bytes: u64,
}

/// Reads the host's memory now. Costs some tens of microseconds.
///
/// # Errors
/// The system does not tell.
pub fn host() -> std::io::Result<HostMemory> {
    system::host()
}

/// Reads a process's memory now.
///
/// # Errors
/// There is no such process, or it belongs to someone else.
pub fn process(pid: u32) -> std::io::Result<ProcessMemory> {
    system::process(pid)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_host_adds_up() {
        let host = host().unwrap();
        assert!(host.total_bytes > 100 << 20);
        assert!(
            host.available_bytes > 0 && host.available_bytes <= host.total_bytes,
            "{host:?}"
        );
        assert!(host.swap_used_bytes <= host.swap_total_bytes && host.wired_bytes < host.total_bytes);
    }

    #[test]
    fn touched_memory_shows_in_the_footprint() {
        let before = process(std::process::id()).unwrap();
        let held = vec![1_u8; 64 << 20];
        let after = process(std::process::id()).unwrap();
        let grown = after.footprint_bytes - before.footprint_bytes;
        assert!((60 << 20..80 << 20).contains(&grown), "{grown}");
        assert!(after.resident_bytes > after.footprint_bytes / 2);
        assert_eq!(held.iter().map(|b| u64::from(*b)).sum::<u64>(), 64 << 20);
    }

    #[test]
    fn no_process_is_an_error() {
        assert!(process(u32::MAX - 1).is_err());
    }
}

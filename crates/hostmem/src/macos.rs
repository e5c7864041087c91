//! macOS: sysctl, Mach host statistics and `proc_pid_rusage`.
//!
//! Compile-checked and linked for `aarch64-apple-darwin`; not run on a Mac.

use std::ffi::CStr;
use std::io::{Error, Result};
use std::mem::{MaybeUninit, size_of};
use std::sync::OnceLock;

use crate::{HostMemory, Pressure, ProcessMemory};

pub(crate) fn host() -> Result<HostMemory> {
    let total: u64 = sysctl(c"hw.memsize")?;
    let swap: libc::xsw_usage = sysctl(c"vm.swapusage")?;
    // 1 normal, 2 warning, 4 critical (bsd/sys/event.h, NOTE_MEMORYSTATUS_PRESSURE_*).
    let level: libc::c_int = sysctl(c"kern.memorystatus_vm_pressure_level")?;
    let vm = vm_statistics()?;
    // SAFETY: sysconf takes a constant and touches no memory of ours.
    let page =
        u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).map_err(|_| Error::last_os_error())?;
    let pages = |n: libc::natural_t| u64::from(n) * page;
    let available = pages(vm.free_count) + pages(vm.purgeable_count) + pages(vm.external_page_count);
    Ok(HostMemory {
        total_bytes: total,
        available_bytes: available.min(total),
        wired_bytes: pages(vm.wire_count),
        compressed_bytes: pages(vm.compressor_page_count),
        swap_total_bytes: swap.xsu_total,
        swap_used_bytes: swap.xsu_used,
        pressure: match level {
            ..=1 => Pressure::Normal,
            2 | 3 => Pressure::Warning,
            _ => Pressure::Critical,
        },
    })
}

pub(crate) fn process(pid: u32) -> Result<ProcessMemory> {
    let pid = libc::c_int::try_from(pid).map_err(|_| Error::from_raw_os_error(libc::ESRCH))?;
    let mut usage = MaybeUninit::<libc::rusage_info_v4>::zeroed();
    // SAFETY: the buffer has the size and layout that flavour RUSAGE_INFO_V4 writes (sys/resource.h).
    let usage = unsafe {
        if libc::proc_pid_rusage(pid, libc::RUSAGE_INFO_V4, usage.as_mut_ptr().cast()) != 0 {
            return Err(Error::last_os_error());
        }
        usage.assume_init()
    };
    Ok(ProcessMemory {
        resident_bytes: usage.ri_resident_size,
        footprint_bytes: usage.ri_phys_footprint,
    })
}

/// Reads a fixed-size value by name. `T` must be plain old data.
pub(crate) fn sysctl<T: Copy>(name: &CStr) -> Result<T> {
    let mut value = MaybeUninit::<T>::zeroed();
    let mut size = size_of::<T>();
    // SAFETY: `name` is null-terminated, and the kernel writes at most `size` bytes into `value`, which is zeroed
    // plain old data of that size.
    let value = unsafe {
        let into = value.as_mut_ptr().cast();
        if libc::sysctlbyname(name.as_ptr(), into, &raw mut size, std::ptr::null_mut(), 0) != 0 {
            return Err(Error::last_os_error());
        }
        value.assume_init()
    };
    Ok(value)
}

/// Reads a text by name.
pub(crate) fn sysctl_text(name: &CStr) -> Result<String> {
    let mut text = [0_u8; 256];
    let mut size = text.len();
    // SAFETY: `name` is null-terminated, and the kernel writes at most `size` bytes into `text`, which has that size.
    let status = unsafe {
        let into = text.as_mut_ptr().cast();
        libc::sysctlbyname(name.as_ptr(), into, &raw mut size, std::ptr::null_mut(), 0)
    };
    if status != 0 {
        return Err(Error::last_os_error());
    }
    let written = text.get(..size).unwrap_or_default();
    let end = written.iter().position(|b| *b == 0).unwrap_or(written.len());
    Ok(String::from_utf8_lossy(written.get(..end).unwrap_or_default())
        .trim()
        .to_owned())
}

fn vm_statistics() -> Result<libc::vm_statistics64> {
    let mut statistics = MaybeUninit::<libc::vm_statistics64>::zeroed();
    let mut count = libc::HOST_VM_INFO64_COUNT;
    // SAFETY: `count` is the size of the buffer in integers; an older kernel writes fewer, the rest stays zero.
    let status = unsafe {
        let into = statistics.as_mut_ptr().cast();
        libc::host_statistics64(host_port(), libc::HOST_VM_INFO64, into, &raw mut count)
    };
    if status != libc::KERN_SUCCESS {
        return Err(Error::other(format!("host_statistics64: Mach error {status}")));
    }
    // SAFETY: zeroed plain old data that the kernel has filled in.
    Ok(unsafe { statistics.assume_init() })
}

/// The port of the host. Every call of `mach_host_self` adds a reference to it, so it is called once.
pub(crate) fn host_port() -> libc::mach_port_t {
    static PORT: OnceLock<libc::mach_port_t> = OnceLock::new();
    // libc points to another crate for this one function.
    #[allow(deprecated)]
    // SAFETY: it takes nothing and returns a number.
    *PORT.get_or_init(|| unsafe { libc::mach_host_self() })
}

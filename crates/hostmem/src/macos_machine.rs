//! macOS: sysctl, Mach and the BSD interfaces.
//!
//! Compile-checked and linked for `aarch64-apple-darwin`; not run on a Mac.

use std::ffi::CStr;
use std::io::{Error, Result};
use std::mem::size_of;

use crate::machine::{Accelerator, AcceleratorReading, CpuTimes, Hardware, Interface};
use crate::macos::{host_port, sysctl, sysctl_text};

/// States of `struct processor_cpu_load_info` (mach/machine.h): user, system, idle, nice.
const STATES: usize = 4;
const IDLE: usize = 2;

pub(crate) fn cores() -> Result<Vec<CpuTimes>> {
    let mut count: libc::natural_t = 0;
    let mut info: libc::processor_info_array_t = std::ptr::null_mut();
    let mut length: libc::mach_msg_type_number_t = 0;
    // SAFETY: all three are places for results; on success `info` is an array of `length` integers that the kernel has
    // mapped for this process.
    let status = unsafe {
        libc::host_processor_info(
            host_port(),
            libc::PROCESSOR_CPU_LOAD_INFO,
            &raw mut count,
            &raw mut info,
            &raw mut length,
        )
    };
    if status != libc::KERN_SUCCESS || info.is_null() {
        return Err(Error::other(format!("host_processor_info: Mach error {status}")));
    }
    let length = length as usize;
    // SAFETY: as above; it is given back below, after the copy.
    let ticks: Vec<u64> = unsafe { std::slice::from_raw_parts(info, length) }
        .iter()
        .map(|t| u64::from(t.cast_unsigned()))
        .collect();
    // libc points to another crate for this one function.
    #[allow(deprecated)]
    // SAFETY: gives back exactly the pages that the call above has mapped.
    unsafe {
        libc::vm_deallocate(
            libc::mach_task_self(),
            info as libc::vm_address_t,
            length * size_of::<libc::integer_t>(),
        )
    };
    let core = |ticks: &[u64]| {
        let total: u64 = ticks.iter().sum();
        CpuTimes {
            busy: total - ticks.get(IDLE).copied().unwrap_or(0),
            total,
        }
    };
    Ok(ticks.chunks_exact(STATES).map(core).collect())
}

pub(crate) fn load() -> Result<[f64; 3]> {
    let mut averages = [0.0; 3];
    // SAFETY: the array has room for the three numbers that are asked for.
    let got = unsafe { libc::getloadavg(averages.as_mut_ptr(), 3) };
    if got == 3 {
        Ok(averages)
    } else {
        Err(Error::other("getloadavg tells fewer than three averages"))
    }
}

pub(crate) fn network() -> Result<Vec<Interface>> {
    let mut list: *mut libc::ifaddrs = std::ptr::null_mut();
    // SAFETY: `list` is a place for the result, which is freed below.
    if unsafe { libc::getifaddrs(&raw mut list) } != 0 {
        return Err(Error::last_os_error());
    }
    let mut found = Vec::new();
    let mut at = list;
    // SAFETY: a list ended by null, alive until freeifaddrs. An address of the link family has a `struct if_data` as its
    // data (getifaddrs(3)).
    unsafe {
        while let Some(entry) = at.as_ref() {
            at = entry.ifa_next;
            let Some(address) = entry.ifa_addr.as_ref() else {
                continue;
            };
            if i32::from(address.sa_family) != libc::AF_LINK
                || entry.ifa_data.is_null()
                || entry.ifa_name.is_null()
            {
                continue;
            }
            let data = entry.ifa_data.cast::<libc::if_data>().read_unaligned();
            found.push(Interface {
                name: CStr::from_ptr(entry.ifa_name).to_string_lossy().into_owned(),
                received_bytes: u64::from(data.ifi_ibytes),
                sent_bytes: u64::from(data.ifi_obytes),
            });
        }
        libc::freeifaddrs(list);
    }
    Ok(found)
}

pub(crate) fn hardware() -> Result<Hardware> {
    let count = |name: &CStr| {
        sysctl::<libc::c_int>(name)
            .ok()
            .and_then(|n| u32::try_from(n).ok())
    };
    let memory: u64 = sysctl(c"hw.memsize")?;
    let chip = sysctl_text(c"machdep.cpu.brand_string").ok();
    // MiB that the GPU may wire; 0 is the system's own choice, which is not told.
    let limit = sysctl::<libc::c_int>(c"iogpu.wired_limit_mb")
        .ok()
        .and_then(|n| u64::try_from(n).ok());
    let apple = chip.as_ref().is_some_and(|c| c.starts_with("Apple"));
    let gpu = apple.then(|| Accelerator {
        vendor: Some("Apple".to_owned()),
        model: chip.as_ref().map(|c| format!("{c} GPU")),
        unified_memory: true,
        memory_bytes: Some(limit.filter(|l| *l > 0).map_or(memory, |l| l << 20)),
        driver: None,
    });
    Ok(Hardware {
        os_name: Some("macOS".to_owned()),
        os_version: sysctl_text(c"kern.osproductversion").ok(),
        kernel: sysctl_text(c"kern.osrelease").ok(),
        container: None,
        cpu_vendor: if apple {
            Some("Apple".to_owned())
        } else {
            sysctl_text(c"machdep.cpu.vendor").ok()
        },
        cpu_model: chip,
        sockets: count(c"hw.packages"),
        physical_cores: count(c"hw.physicalcpu"),
        logical_cores: count(c"hw.logicalcpu"),
        memory_bytes: memory,
        accelerators: gpu.into_iter().collect(),
    })
}

/// IOKit would tell; it is not asked.
pub(crate) fn accelerators() -> Vec<AcceleratorReading> {
    Vec::new()
}

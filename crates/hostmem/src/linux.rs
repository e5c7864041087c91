//! Linux: text files under `/proc` and `/sys/fs/cgroup`.

use std::fs;
use std::io::{Error, ErrorKind, Result};
use std::path::Path;

use crate::{HostMemory, Pressure, ProcessMemory};

/// Share of the last 10 s, in percent, in which some (all) tasks stood still for want of memory.
const SOME_STALLED_PERCENT: f64 = 10.0;
const ALL_STALLED_PERCENT: f64 = 10.0;
/// Without PSI: share of memory that must be available.
const AVAILABLE_WARNING: u64 = 10;
const AVAILABLE_CRITICAL: u64 = 3;

pub(crate) fn host() -> Result<HostMemory> {
    let meminfo = fs::read_to_string("/proc/meminfo")?;
    let bytes = |key| kib(&meminfo, key).map(|k| k * 1024);
    let total =
        bytes("MemTotal").ok_or_else(|| Error::new(ErrorKind::InvalidData, "/proc/meminfo: no MemTotal"))?;
    let available = bytes("MemAvailable").or_else(|| bytes("MemFree")).unwrap_or(0);
    let (total, available) = match cgroup() {
        Some((limit, rest)) if limit < total => (limit, available.min(rest)),
        _ => (total, available),
    };
    let swap_total = bytes("SwapTotal").unwrap_or(0);
    let stalls = fs::read_to_string("/proc/pressure/memory").ok();
    Ok(HostMemory {
        total_bytes: total,
        available_bytes: available.min(total),
        wired_bytes: bytes("Unevictable").unwrap_or(0) + bytes("SUnreclaim").unwrap_or(0),
        compressed_bytes: bytes("Zswap").unwrap_or(0),
        swap_total_bytes: swap_total,
        swap_used_bytes: swap_total.saturating_sub(bytes("SwapFree").unwrap_or(0)),
        pressure: pressure(stalls.as_deref(), available, total),
    })
}

pub(crate) fn process(pid: u32) -> Result<ProcessMemory> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let bytes = |key| kib(&status, key).unwrap_or(0) * 1024;
    Ok(ProcessMemory {
        resident_bytes: bytes("VmRSS"),
        footprint_bytes: bytes("RssAnon") + bytes("RssShmem") + bytes("VmSwap"),
    })
}

/// The number of a line `KEY:   N kB`.
fn kib(text: &str, key: &str) -> Option<u64> {
    let line = text
        .lines()
        .find_map(|l| l.strip_prefix(key)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Limit and rest of the cgroups (version 2) that this process is in, if any has a limit.
fn cgroup() -> Option<(u64, u64)> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let own = groups.lines().find_map(|l| l.strip_prefix("0::"))?;
    cgroups(Path::new("/sys/fs/cgroup"), own)
}

/// The smallest limit and the smallest rest of a cgroup and those around it: each of them bounds what is inside, and the
/// limit of a service is often its slice's.
fn cgroups(root: &Path, own: &str) -> Option<(u64, u64)> {
    let own = root.join(own.trim_start_matches('/'));
    own.ancestors()
        .take_while(|dir| dir.starts_with(root))
        .filter_map(limit_of)
        .reduce(|(limit, rest), (outer, outer_rest)| (limit.min(outer), rest.min(outer_rest)))
}

/// Limit and rest of one cgroup, if it has a limit.
fn limit_of(dir: &Path) -> Option<(u64, u64)> {
    let number = |file| {
        fs::read_to_string(dir.join(file))
            .ok()?
            .trim()
            .parse::<u64>()
            .ok()
    };
    // "max" is no number: no limit.
    let limit = number("memory.max")?;
    let used = number("memory.current")?;
    // Cached file pages that have not been used lately are given back before anything else.
    let stat = fs::read_to_string(dir.join("memory.stat")).unwrap_or_default();
    let cache = stat
        .lines()
        .find_map(|l| l.strip_prefix("inactive_file ")?.trim().parse::<u64>().ok())
        .unwrap_or(0);
    Some((limit, limit.saturating_sub(used.saturating_sub(cache))))
}

/// From PSI if the kernel has it (`/proc/pressure/memory`), else from what is available.
fn pressure(stalls: Option<&str>, available: u64, total: u64) -> Pressure {
    let percent = |kind: &str| -> Option<f64> {
        let line = stalls?.lines().find_map(|l| l.strip_prefix(kind))?;
        line.split_whitespace()
            .find_map(|f| f.strip_prefix("avg10="))?
            .parse()
            .ok()
    };
    match (percent("some"), percent("full")) {
        (_, Some(all)) if all >= ALL_STALLED_PERCENT => Pressure::Critical,
        (Some(some), _) if some >= SOME_STALLED_PERCENT => Pressure::Warning,
        (Some(_), _) => Pressure::Normal,
        _ if available < total / 100 * AVAILABLE_CRITICAL => Pressure::Critical,
        _ if available < total / 100 * AVAILABLE_WARNING => Pressure::Warning,
        _ => Pressure::Normal,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_found_by_whole_keys() {
        let text = "MemTotalX:  1 kB\nMemTotal:  24576 kB\n";
        assert_eq!(kib(text, "MemTotal"), Some(24_576));
        assert_eq!(kib(text, "MemFree"), None);
    }

    #[test]
    fn a_limit_of_any_cgroup_around_counts() {
        let root = tempfile::tempdir().unwrap();
        let inner = root.path().join("user.slice/app.service");
        fs::create_dir_all(&inner).unwrap();
        let write = |dir: &Path, limit: &str, used: &str, cache: u64| {
            fs::write(dir.join("memory.max"), limit).unwrap();
            fs::write(dir.join("memory.current"), used).unwrap();
            fs::write(
                dir.join("memory.stat"),
                format!("anon 5\ninactive_file {cache}\n"),
            )
            .unwrap();
        };
        let found = || cgroups(root.path(), "/user.slice/app.service");
        assert_eq!(found(), None);
        write(&inner, "max\n", "100\n", 0);
        assert_eq!(found(), None);
        // The slice's limit, of which others have taken most.
        write(inner.parent().unwrap(), "1000\n", "900\n", 30);
        assert_eq!(found(), Some((1000, 130)));
        // One's own is smaller, and there is still no more than the slice's rest.
        write(&inner, "500\n", "100\n", 0);
        assert_eq!(found(), Some((500, 130)));
        write(root.path(), "400\n", "399\n", 0);
        assert_eq!(found(), Some((400, 1)));
        assert_eq!(cgroups(root.path(), "/"), Some((400, 1)));
    }

    #[test]
    fn pressure_levels() {
        let psi = |some: f64, full: f64| {
            let text = format!(
                "some avg10={some} avg60=0.00 avg300=0.00 total=1\nfull avg10={full} avg60=0 total=1\n"
            );
            pressure(Some(&text), 0, 100)
        };
        assert_eq!(
            [psi(0.0, 0.0), psi(12.5, 3.0), psi(60.0, 30.0)],
            [Pressure::Normal, Pressure::Warning, Pressure::Critical]
        );
        assert_eq!(pressure(None, 50, 1_000), Pressure::Warning);
        assert_eq!(pressure(None, 500, 1_000), Pressure::Normal);
        assert_eq!(pressure(None, 5, 1_000), Pressure::Critical);
    }
}

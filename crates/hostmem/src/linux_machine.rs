//! Linux: text files under `/proc`, `/sys` and `/etc`.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Error, ErrorKind, Result};
use std::path::Path;

use crate::machine::{Accelerator, AcceleratorReading, CpuTimes, Hardware, Interface};

pub(crate) fn cores() -> Result<Vec<CpuTimes>> {
    let found = cores_in(&fs::read_to_string("/proc/stat")?);
    if found.is_empty() {
        return Err(Error::new(ErrorKind::InvalidData, "/proc/stat names no core"));
    }
    Ok(found)
}

/// Lines `cpuN user nice system idle iowait irq softirq steal ...`; guests' time is part of user's already.
fn cores_in(stat: &str) -> Vec<CpuTimes> {
    let core = |line: &str| {
        let mut fields = line.strip_prefix("cpu")?.split_whitespace();
        fields
            .next()
            .filter(|n| n.parse::<u32>().is_ok() && !line.starts_with("cpu "))?;
        let ticks: Vec<u64> = fields.take(8).filter_map(|f| f.parse().ok()).collect();
        let total: u64 = ticks.iter().sum();
        let idle: u64 = ticks.iter().skip(3).take(2).sum();
        Some(CpuTimes {
            busy: total - idle,
            total,
        })
    };
    stat.lines().filter_map(core).collect()
}

pub(crate) fn load() -> Result<[f64; 3]> {
    let text = fs::read_to_string("/proc/loadavg")?;
    let mut numbers = text.split_whitespace().map_while(|f| f.parse().ok());
    match (numbers.next(), numbers.next(), numbers.next()) {
        (Some(one), Some(five), Some(fifteen)) => Ok([one, five, fifteen]),
        _ => Err(Error::new(
            ErrorKind::InvalidData,
            "/proc/loadavg holds no three numbers",
        )),
    }
}

pub(crate) fn network() -> Result<Vec<Interface>> {
    Ok(interfaces_in(&fs::read_to_string("/proc/net/dev")?))
}

/// Lines `name: bytes packets errs drop fifo frame compressed multicast bytes ...`, received first.
fn interfaces_in(dev: &str) -> Vec<Interface> {
    let interface = |line: &str| {
        let (name, counters) = line.split_once(':')?;
        let mut counters = counters.split_whitespace().map_while(|f| f.parse::<u64>().ok());
        Some(Interface {
            name: name.trim().to_owned(),
            received_bytes: counters.next()?,
            sent_bytes: counters.nth(7)?,
        })
    };
    dev.lines().filter_map(interface).collect()
}

pub(crate) fn hardware() -> Result<Hardware> {
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let release = |key: &str| {
        let value = release
            .lines()
            .find_map(|l| l.strip_prefix(key)?.strip_prefix('='))?;
        Some(value.trim_matches('"').to_owned()).filter(|v| !v.is_empty())
    };
    let cpu = |key: &str| first(&cpus, key);
    let logical = cores().ok().and_then(|c| u32::try_from(c.len()).ok());
    let (sockets, physical) = sockets_and_cores(&cpus);
    Ok(Hardware {
        os_name: release("NAME"),
        os_version: release("VERSION_ID"),
        kernel: fs::read_to_string("/proc/sys/kernel/osrelease")
            .ok()
            .map(|v| v.trim().to_owned()),
        container: container(),
        cpu_vendor: cpu("vendor_id"),
        cpu_model: cpu("model name"),
        sockets,
        physical_cores: physical.or(logical),
        logical_cores: logical,
        memory_bytes: crate::host()?.total_bytes,
        accelerators: nvidia(Path::new("/proc/driver/nvidia"))
            .into_iter()
            .chain(
                amd_cards(Path::new("/sys/class/drm"))
                    .iter()
                    .map(|card| Accelerator {
                        vendor: Some("AMD".to_owned()),
                        model: Some(card.name.clone()),
                        unified_memory: false,
                        memory_bytes: card.memory_total_bytes,
                        driver: Some(("amdgpu".to_owned(), None)),
                    }),
            )
            .collect(),
    })
}

/// The value of the first line `KEY : value`.
fn first(text: &str, key: &str) -> Option<String> {
    let found = text.lines().find_map(|l| {
        let (name, value) = l.split_once(':')?;
        (name.trim() == key).then(|| value.trim().to_owned())
    });
    found.filter(|v| !v.is_empty())
}

/// Counted by the ids that `/proc/cpuinfo` gives; Arm's has none.
fn sockets_and_cores(cpus: &str) -> (Option<u32>, Option<u32>) {
    let (mut sockets, mut cores) = (BTreeSet::new(), BTreeSet::new());
    for block in cpus.split("\n\n") {
        if let (Some(socket), Some(core)) = (first(block, "physical id"), first(block, "core id")) {
            sockets.insert(socket.clone());
            cores.insert((socket, core));
        }
    }
    let count = |n: usize| u32::try_from(n).ok().filter(|n| *n > 0);
    (count(sockets.len()), count(cores.len()))
}

fn container() -> Option<String> {
    let exists = |path: &str| Path::new(path).exists();
    let kind = if exists("/.dockerenv") {
        "docker"
    } else if exists("/run/.containerenv") {
        "podman"
    } else if exists("/run/systemd/container") {
        "container"
    } else {
        return None;
    };
    Some(kind.to_owned())
}

/// Directories `gpus/*/information` with lines `Model: ...`.
fn nvidia(driver: &Path) -> Vec<Accelerator> {
    let version = fs::read_to_string(driver.join("version")).ok();
    let version = version.and_then(|v| {
        v.lines()
            .next()?
            .split_whitespace()
            .find(|w| w.contains('.'))
            .map(str::to_owned)
    });
    let cards = sorted(&driver.join("gpus"));
    let card = |name: String| {
        let text = fs::read_to_string(driver.join("gpus").join(name).join("information")).ok()?;
        Some(Accelerator {
            vendor: Some("NVIDIA".to_owned()),
            model: first(&text, "Model"),
            unified_memory: false,
            memory_bytes: None,
            driver: Some(("nvidia".to_owned(), version.clone())),
        })
    };
    cards.into_iter().filter_map(card).collect()
}

pub(crate) fn accelerators() -> Vec<AcceleratorReading> {
    amd_cards(Path::new("/sys/class/drm"))
}

/// Cards of the driver amdgpu, by its files
/// (<https://docs.kernel.org/gpu/amdgpu/thermal.html>, <https://docs.kernel.org/gpu/amdgpu/driver-misc.html>).
fn amd_cards(drm: &Path) -> Vec<AcceleratorReading> {
    let is_card = |name: &String| {
        name.strip_prefix("card")
            .is_some_and(|n| n.parse::<u32>().is_ok())
    };
    let mut found = Vec::new();
    for name in sorted(drm).into_iter().filter(is_card) {
        let device = drm.join(&name).join("device");
        let text = |file: &str| {
            fs::read_to_string(device.join(file))
                .ok()
                .map(|t| t.trim().to_owned())
        };
        let number = |file: &str| text(file)?.parse::<u64>().ok();
        // Only amdgpu has this file.
        let Some(total) = number("mem_info_vram_total") else {
            continue;
        };
        let monitor = sorted(&device.join("hwmon")).into_iter().next();
        let sensor = |file: &str| number(&format!("hwmon/{}/{file}", monitor.as_ref()?)).map(|n| n as f64);
        let fan = sensor("pwm1").map(|pwm| pwm * 100.0 / 255.0);
        found.push(AcceleratorReading {
            index: found.len(),
            name: text("product_name").filter(|n| !n.is_empty()).unwrap_or(name),
            uuid: text("unique_id").unwrap_or_default(),
            busy_percent: number("gpu_busy_percent").map(|n| n as f64),
            memory_used_bytes: number("mem_info_vram_used"),
            memory_total_bytes: Some(total),
            temperature_celsius: sensor("temp1_input").map(|t| t / 1e3),
            memory_temperature_celsius: sensor("temp3_input").map(|t| t / 1e3),
            fan_percent: fan,
            power_watts: sensor("power1_average")
                .or(sensor("power1_input"))
                .map(|p| p / 1e6),
        });
    }
    found
}

fn sorted(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;

    #[test]
    fn cores_and_interfaces_of_the_kernels_text() {
        let stat =
            "cpu  9 9 9 9 9 9 9 9 0 0\ncpu0 10 1 5 70 4 1 2 7 3 0\ncpu1 0 0 0 50 0 0 0 0 0 0\nintr 1 2\n";
        assert_eq!(
            cores_in(stat),
            [CpuTimes { busy: 26, total: 100 }, CpuTimes { busy: 0, total: 50 }]
        );
        let dev = "Inter-|   Receive\n face |bytes    packets\n  lo: 100 1 0 0 0 0 0 0 200 1 0 0 0 0 0 0\neth0:7 1 0 0 0 0 0 0 8 1 0 0\n";
        let found = interfaces_in(dev);
        assert_eq!(found.len(), 2);
        assert_eq!((found[0].received_bytes, found[0].sent_bytes), (100, 200));
        assert_eq!(
            (
                found[1].name.as_str(),
                found[1].received_bytes,
                found[1].sent_bytes
            ),
            ("eth0", 7, 8)
        );
    }

    #[test]
    fn cores_are_counted_once() {
        let block =
            |socket: u32, core: u32| format!("processor: 0\nphysical id\t: {socket}\ncore id\t: {core}\n");
        let text = [block(0, 0), block(0, 0), block(0, 1), block(1, 0)].join("\n");
        assert_eq!(sockets_and_cores(&text), (Some(2), Some(3)));
        assert_eq!(sockets_and_cores("processor: 0\nBogoMIPS: 48\n"), (None, None));
    }

    #[test]
    fn accelerators_by_their_drivers_files() {
        let root = std::env::temp_dir().join(format!("hostmem-{}", std::process::id()));
        let write = |path: &str, text: &str| {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        for (file, text) in [
            ("mem_info_vram_total", "1000\n"),
            ("mem_info_vram_used", "250\n"),
            ("gpu_busy_percent", "42\n"),
            ("product_name", "Radeon\n"),
            ("hwmon/hwmon3/temp1_input", "61500\n"),
            ("hwmon/hwmon3/power1_average", "90000000\n"),
            ("hwmon/hwmon3/pwm1", "51\n"),
        ] {
            write(&format!("drm/card1/device/{file}"), text);
        }
        write("drm/card0/device/vendor", "0x10de\n");
        write("drm/card1-DP-1/status", "connected\n");
        let cards = amd_cards(&root.join("drm"));
        assert_eq!(cards.len(), 1);
        let card = &cards[0];
        assert_eq!(
            (card.name.as_str(), card.busy_percent, card.memory_used_bytes),
            ("Radeon", Some(42.0), Some(250))
        );
        assert_eq!(
            (card.temperature_celsius, card.power_watts, card.fan_percent),
            (Some(61.5), Some(90.0), Some(20.0))
        );
        assert_eq!(card.memory_temperature_celsius, None);
        write(
            "nvidia/version",
            "NVRM version: NVIDIA UNIX Open Kernel Module  580.65.06  Release\n",
        );
        write(
            "nvidia/gpus/0000:01:00.0/information",
            "Model: \t\t NVIDIA H100\nIRQ:   12\n",
        );
        let cards = nvidia(&root.join("nvidia"));
        assert_eq!(cards[0].model.as_deref(), Some("NVIDIA H100"));
        assert_eq!(
            cards[0].driver,
            Some(("nvidia".to_owned(), Some("580.65.06".to_owned())))
        );
        fs::remove_dir_all(root).unwrap();
    }
}

//! How busy the machine is, measured at intervals and kept for an hour.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hostmem::HostMemory;
use hostmem::machine::{self, AcceleratorReading, CpuTimes, Interface};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::activity::{rfc3339, unix_ms};

/// How long a measurement is kept.
const KEPT: Duration = Duration::from_secs(3600);
const MB: u64 = 1 << 20;

/// What is measured, and how often; `None`: nothing.
pub type Every = Option<Duration>;

/// What the registry says of it.
#[must_use]
pub fn every(globals: &registry::Globals) -> Every {
    (!globals.performance_disabled).then_some(globals.performance_every)
}

/// One measurement.
#[derive(Clone, Debug)]
pub struct Sample {
    /// Unix time, milliseconds.
    pub unix_ms: u64,
    at: Instant,
    /// Share of time at work per core since the measurement before, in percent.
    pub cores: Vec<f64>,
    /// Memory.
    pub memory: HostMemory,
    /// Load averages of 1, 5 and 15 minutes.
    pub load: [f64; 3],
    /// Network interfaces.
    pub network: Vec<Interface>,
    /// GPUs whose driver tells.
    pub accelerators: Vec<AcceleratorReading>,
}

/// The measurements of the last hour.
#[derive(Debug)]
pub struct Performance {
    samples: Mutex<VecDeque<Arc<Sample>>>,
    every: watch::Sender<Every>,
}

impl Performance {
    /// Nothing measured yet. [`Performance::run`] must run beside it.
    #[must_use]
    pub fn new(every: Every) -> Arc<Self> {
        Arc::new(Self {
            samples: Mutex::default(),
            every: watch::Sender::new(every),
        })
    }

    /// Measures from now on at this interval; what was measured before stays, unless nothing is to be.
    pub fn set_every(&self, every: Every) {
        self.every
            .send_if_modified(|present| std::mem::replace(present, every) != every);
        if every.is_none() {
            self.samples.lock().clear();
        }
    }

    /// Whether anything is measured.
    #[must_use]
    pub fn is_enabled(&self) -> bool {
        self.every.borrow().is_some()
    }

    /// The last measurement.
    #[must_use]
    pub fn latest(&self) -> Option<Arc<Sample>> {
        self.samples.lock().back().cloned()
    }

    /// Measurements after this time (Unix, milliseconds), oldest first, in llama-swap's form.
    #[must_use]
    pub fn since(&self, after: Option<u64>) -> Value {
        let samples: Vec<Arc<Sample>> = {
            let kept = self.samples.lock();
            kept.iter()
                .filter(|s| after.is_none_or(|t| s.unix_ms > t))
                .cloned()
                .collect()
        };
        let system: Vec<Value> = samples.iter().map(|s| s.system()).collect();
        let gpus: Vec<Value> = samples.iter().flat_map(|s| s.gpus()).collect();
        json!({"enabled": true, "sys_stats": system, "gpu_stats": gpus})
    }

    /// Measures for ever.
    pub async fn run(self: Arc<Self>) {
        let mut orders = self.every.subscribe();
        let mut before = Vec::new();
        loop {
            let every = *orders.borrow_and_update();
            let Some(every) = every else {
                if orders.changed().await.is_err() {
                    return;
                }
                continue;
            };
            if let Some((sample, cores)) = measure(&before) {
                before = cores;
                self.keep(sample);
            }
            tokio::select! {
                () = tokio::time::sleep(every) => {}
                changed = orders.changed() => if changed.is_err() { return },
            }
        }
    }

    fn keep(&self, sample: Sample) {
        let mut samples = self.samples.lock();
        while samples
            .front()
            .is_some_and(|old| sample.at.duration_since(old.at) > KEPT)
        {
            samples.pop_front();
        }
        samples.push_back(Arc::new(sample));
    }
}

/// Reads everything once; takes well under a millisecond. `None` where not even the memory can be read.
fn measure(before: &[CpuTimes]) -> Option<(Sample, Vec<CpuTimes>)> {
    let memory = hostmem::host().ok()?;
    let cores = machine::cores().unwrap_or_default();
    let since =
        |(i, core): (usize, &CpuTimes)| core.percent_since(&before.get(i).copied().unwrap_or_default());
    let sample = Sample {
        unix_ms: unix_ms(),
        at: Instant::now(),
        cores: cores.iter().enumerate().map(since).collect(),
        memory,
        load: machine::load().unwrap_or_default(),
        network: machine::network().unwrap_or_default(),
        accelerators: machine::accelerators(),
    };
    Some((sample, cores))
}

impl Sample {
    fn system(&self) -> Value {
        let m = &self.memory;
        let round = |x: f64| (x * 100.0).round() / 100.0;
        let cores: Vec<f64> = self.cores.iter().map(|c| round(*c)).collect();
        let network = self.network.iter();
        let network = network
            .map(|i| json!({"name": i.name, "bytes_recv": i.received_bytes, "bytes_sent": i.sent_bytes}));
        let [one, five, fifteen] = self.load;
        json!({
            "timestamp": rfc3339(self.unix_ms),
            "cpu_util_per_core": cores,
            "mem_total_mb": m.total_bytes / MB,
            "mem_used_mb": m.total_bytes.saturating_sub(m.available_bytes) / MB,
            "mem_free_mb": m.available_bytes / MB,
            "swap_total_mb": m.swap_total_bytes / MB,
            "swap_used_mb": m.swap_used_bytes / MB,
            "load_avg_1": one,
            "load_avg_5": five,
            "load_avg_15": fifteen,
            "net_io": network.collect::<Vec<_>>(),
            "wired_mb": m.wired_bytes / MB,
            "compressed_mb": m.compressed_bytes / MB,
            "memory_pressure": m.pressure.as_str(),
        })
    }

    fn gpus(&self) -> impl Iterator<Item = Value> {
        let number = |n: Option<f64>| n.unwrap_or(0.0);
        self.accelerators.iter().map(move |a| {
            let (used, total) = (
                a.memory_used_bytes.unwrap_or(0),
                a.memory_total_bytes.unwrap_or(0),
            );
            json!({
                "timestamp": rfc3339(self.unix_ms),
                "id": a.index,
                "name": a.name,
                "uuid": a.uuid,
                "temp_c": number(a.temperature_celsius),
                "vram_temp_c": number(a.memory_temperature_celsius),
                "gpu_util_pct": number(a.busy_percent),
                "mem_util_pct": if total > 0 { used as f64 * 100.0 / total as f64 } else { 0.0 },
                "mem_used_mb": used / MB,
                "mem_total_mb": total / MB,
                "fan_speed_pct": number(a.fan_percent),
                "power_draw_w": number(a.power_watts),
            })
        })
    }
}

/// `/api/hardware`: what the machine is, in llama-swap's form (version 1 of its schema).
///
/// # Errors
/// It cannot be found out.
pub fn hardware() -> std::io::Result<Value> {
    let h = machine::hardware()?;
    let family = match std::env::consts::OS {
        "macos" => "darwin",
        other => other,
    };
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let accelerators: Vec<Value> = h
        .accelerators
        .iter()
        .enumerate()
        .map(|(i, a)| {
            let driver = a.driver.as_ref().map(|(name, version)| json!({"name": name, "version": version}));
            json!({
                "index": i,
                "kind": "gpu",
                "vendor": a.vendor,
                "model": a.model,
                "architecture": Value::Null,
                "memory": {"kind": if a.unified_memory { "unified" } else { "dedicated" }, "capacity_bytes": a.memory_bytes},
                "driver": driver,
                "power_limit_watts": Value::Null,
            })
        })
        .collect();
    Ok(json!({
        "schema_version": 1,
        "captured_at": rfc3339(unix_ms()),
        "capture": {
            "scope": "inference_host",
            "method": "detected",
            "detector": {"name": "swapd", "version": env!("CARGO_PKG_VERSION")},
        },
        "architecture": {"name": architecture, "raw_name": std::env::consts::ARCH},
        "operating_system": {"family": family, "name": h.os_name, "version": h.os_version, "kernel": h.kernel},
        "environment": {
            "kind": if h.container.is_some() { "container" } else { "native" },
            "name": h.container,
            "version": Value::Null,
        },
        "cpu": {
            "vendor": h.cpu_vendor,
            "model": h.cpu_model,
            "socket_count": h.sockets,
            "physical_core_count": h.physical_cores,
            "logical_thread_count": h.logical_cores,
        },
        "memory": {"capacity_bytes": h.memory_bytes},
        "accelerators": accelerators,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(at: Instant, unix_ms: u64) -> Sample {
        let (sample, _) = measure(&[]).unwrap();
        Sample {
            at,
            unix_ms,
            ..sample
        }
    }

    #[test]
    fn an_hour_is_kept_and_asked_for_by_time() {
        let performance = Performance::new(Some(Duration::from_secs(5)));
        let begun = Instant::now();
        for minute in 0..90 {
            performance.keep(sample(begun + Duration::from_secs(60 * minute), minute * 60_000));
        }
        let kept = |after: Option<u64>| performance.since(after)["sys_stats"].as_array().unwrap().len();
        assert_eq!(kept(None), 61, "an hour, both ends included");
        assert_eq!(kept(Some(85 * 60_000)), 4);
        assert_eq!(performance.latest().unwrap().unix_ms, 89 * 60_000);
        performance.set_every(None);
        assert!(!performance.is_enabled() && performance.latest().is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn it_measures_at_its_interval_and_takes_another() {
        let performance = Performance::new(Some(Duration::from_secs(5)));
        let running = tokio::spawn(performance.clone().run());
        let count = || performance.samples.lock().len();
        tokio::time::sleep(Duration::from_secs(11)).await;
        assert_eq!(count(), 3, "at once, then every 5 s");
        performance.set_every(Some(Duration::from_secs(60)));
        tokio::time::sleep(Duration::from_secs(50)).await;
        assert_eq!(count(), 4, "at once, then every 60 s");
        performance.set_every(None);
        tokio::time::sleep(Duration::from_secs(500)).await;
        assert_eq!(count(), 0);
        performance.set_every(Some(Duration::from_secs(5)));
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(count(), 1);
        running.abort();
    }

    #[test]
    fn readings_of_accelerators_in_llama_swaps_form() {
        let mut sample = sample(Instant::now(), 0);
        sample.accelerators = vec![AcceleratorReading {
            name: "x".into(),
            memory_used_bytes: Some(1 << 30),
            memory_total_bytes: Some(4 << 30),
            busy_percent: Some(7.0),
            ..AcceleratorReading::default()
        }];
        let gpu = sample.gpus().next().unwrap();
        assert_eq!(
            (&gpu["mem_util_pct"], &gpu["mem_used_mb"], &gpu["gpu_util_pct"]),
            (&json!(25.0), &json!(1024), &json!(7.0))
        );
    }
}

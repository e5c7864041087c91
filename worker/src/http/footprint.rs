//! What the process really takes, beside what the plan says it may.
//!
//! MLX counts its own allocations; the system counts everything (on macOS the figure that its own tools show, since the
//! resident set leaves out most of what a GPU uses). Like is compared with like:
//!
//! - Weights whose mapped pages are used in place are pages of files: the system counts them as resident and not as
//!   footprint, so that the plan is taken without them.
//! - A GPU with memory of its own is what the plan is about there, and the system knows nothing of it: MLX's figure, what
//!   is in use and what it keeps, is held against the plan.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use std::time::Duration;

use serde_json::{Map, Value, json};

/// Counters of the process's memory, in bytes.
#[derive(Debug, Default)]
pub(super) struct Footprint {
    /// What the plan allows for, of what is looked at; 0 when nothing is planned.
    planned: u64,
    /// The plan is about memory that only MLX counts.
    of_device: bool,
    counted: AtomicU64,
    now: AtomicU64,
    resident: AtomicU64,
    peak: AtomicU64,
    /// Looks that found more than is planned.
    over: AtomicU64,
    is_over: AtomicBool,
}

/// What loading and warming up took.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct LoadReport {
    /// From the command line to the first token.
    pub seconds: f64,
    /// Pages in memory afterwards, those of files included.
    pub resident_bytes: u64,
    /// Memory that no file backs.
    pub footprint_bytes: u64,
}

impl LoadReport {
    /// Of a model that has just been loaded.
    #[must_use]
    pub fn new(took: Duration) -> Self {
        let memory = hostmem::process(std::process::id()).ok();
        Self {
            seconds: took.as_secs_f64(),
            resident_bytes: memory.map_or(0, |memory| memory.resident_bytes),
            footprint_bytes: memory.map_or(0, |memory| memory.footprint_bytes),
        }
    }

    /// By name.
    #[must_use]
    pub fn fields(&self) -> Map<String, Value> {
        let fields: [(&str, Value); 3] = [
            ("load_seconds", self.seconds.into()),
            ("load_resident_bytes", self.resident_bytes.into()),
            ("load_footprint_bytes", self.footprint_bytes.into()),
        ];
        fields
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect()
    }
}

/// One look.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FootprintReading {
    /// Memory that no file backs, compressed and swapped parts included.
    pub footprint_bytes: u64,
    /// Its highest value at any look.
    pub peak_bytes: u64,
    /// Pages in memory, those of files included.
    pub resident_bytes: u64,
    /// What is held against the plan: the footprint, or MLX's bytes on a GPU with memory of its own.
    pub counted_bytes: u64,
    /// What the plan allows for of that; 0 when nothing is planned.
    pub planned_bytes: u64,
    /// Looks, one a second, that found more than is planned.
    pub over_plan: u64,
}

impl Footprint {
    /// `limits`: as the engine reports them.
    pub(super) fn new(limits: &Map<String, Value>) -> Self {
        let bytes = |name: &str| limits.get(name).and_then(Value::as_u64).unwrap_or_default();
        let is = |name: &str, value: Value| limits.get(name) == Some(&value);
        let in_place = if is("weights_in_place", true.into()) {
            bytes("weights_mapped_bytes")
        } else {
            0
        };
        Self {
            planned: bytes("memory_planned_bytes").saturating_sub(in_place),
            of_device: is("memory_device", "cuda".into()),
            ..Self::default()
        }
    }

    /// Looks now, and warns when the plan has been left. `mlx`: bytes that MLX has in use or keeps.
    pub(super) fn look(&self, mlx: u64) -> FootprintReading {
        match hostmem::process(std::process::id()) {
            Ok(memory) => self.note(memory.footprint_bytes, memory.resident_bytes, mlx),
            Err(error) => tracing::debug!("this process's memory: {error}"),
        }
        self.last()
    }

    /// What the last look found.
    pub(super) fn last(&self) -> FootprintReading {
        FootprintReading {
            footprint_bytes: self.now.load(Relaxed),
            peak_bytes: self.peak.load(Relaxed),
            resident_bytes: self.resident.load(Relaxed),
            counted_bytes: self.counted.load(Relaxed),
            planned_bytes: self.planned,
            over_plan: self.over.load(Relaxed),
        }
    }

    fn note(&self, footprint: u64, resident: u64, mlx: u64) {
        let counted = if self.of_device { mlx } else { footprint };
        self.counted.store(counted, Relaxed);
        self.now.store(footprint, Relaxed);
        self.resident.store(resident, Relaxed);
        self.peak.fetch_max(footprint, Relaxed);
        let over = self.planned > 0 && counted > self.planned;
        if over {
            self.over.fetch_add(1, Relaxed);
        }
        // Once each way, and not every second.
        if self.is_over.swap(over, Relaxed) != over {
            let planned = self.planned;
            if over {
                tracing::warn!(counted, planned, "this process takes more memory than is planned");
            } else {
                tracing::info!(counted, planned, "this process is back within its plan");
            }
        }
    }
}

impl FootprintReading {
    /// Bytes above the plan; below 0 when under it. `None` when nothing is planned.
    pub(super) fn drift(&self) -> Option<i64> {
        let signed = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
        (self.planned_bytes > 0).then(|| signed(self.counted_bytes) - signed(self.planned_bytes))
    }

    pub(super) fn json(&self) -> Value {
        json!({
            "footprint_bytes": self.footprint_bytes,
            "footprint_peak_bytes": self.peak_bytes,
            "resident_bytes": self.resident_bytes,
            "counted_bytes": self.counted_bytes,
            "planned_bytes": self.planned_bytes,
            "drift_bytes": self.drift(),
            "looks_over_plan": self.over_plan,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(value: Value) -> Map<String, Value> {
        value.as_object().unwrap().clone()
    }

    /// Weights used in place are in nobody's footprint: what leaks in their place must show.
    #[test]
    fn weights_in_place_are_no_part_of_what_the_process_may_take() {
        for (in_place, planned, over) in [(true, 30, 1), (false, 100, 0)] {
            let footprint = Footprint::new(&limits(json!({
                "memory_planned_bytes": 100, "weights_mapped_bytes": 70, "weights_in_place": in_place,
                "memory_device": "metal",
            })));
            footprint.note(60, 130, 0);
            let reading = footprint.last();
            assert_eq!((reading.planned_bytes, reading.over_plan), (planned, over));
            assert_eq!(reading.drift(), Some(60 - i64::try_from(planned).unwrap()));
        }
    }

    /// A plan for a GPU's own memory says nothing of the host's.
    #[test]
    fn a_gpu_with_memory_of_its_own_is_asked_itself() {
        let footprint = Footprint::new(&limits(json!({
            "memory_planned_bytes": 100, "weights_mapped_bytes": 70, "weights_in_place": false, "memory_device": "cuda",
        })));
        for (host, device, over) in [(500, 90, 0), (5, 101, 1)] {
            footprint.note(host, host, device);
            let reading = footprint.last();
            assert_eq!((reading.counted_bytes, reading.over_plan), (device, over));
            assert_eq!(reading.footprint_bytes, host, "still told");
        }
    }

    #[test]
    fn looks_over_the_plan_are_counted() {
        let footprint = Footprint::new(&limits(json!({"memory_planned_bytes": 100})));
        for (bytes, over, drift) in [
            (90, 0, -10),
            (100, 0, 0),
            (130, 1, 30),
            (120, 2, 20),
            (80, 2, -20),
        ] {
            footprint.note(bytes, bytes + 7, 1000);
            let reading = footprint.last();
            assert_eq!((reading.over_plan, reading.drift()), (over, Some(drift)));
            assert_eq!(
                (reading.footprint_bytes, reading.resident_bytes),
                (bytes, bytes + 7)
            );
        }
        assert_eq!(footprint.last().peak_bytes, 130);
        let unplanned = Footprint::new(&Map::new());
        unplanned.note(5, 5, 5);
        assert_eq!((unplanned.last().over_plan, unplanned.last().drift()), (0, None));
    }

    #[test]
    fn a_look_sees_this_process() {
        let reading = Footprint::new(&limits(json!({"memory_planned_bytes": 1_u64 << 50}))).look(0);
        assert!(
            reading.footprint_bytes > 1 << 20 && reading.peak_bytes >= reading.footprint_bytes,
            "{reading:?}"
        );
        assert!(reading.drift().is_some_and(|drift| drift < 0));
    }
}

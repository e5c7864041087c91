//! What the process really takes, beside what the plan says it may.
//!
//! MLX counts its own allocations; the system counts everything (on macOS the figure that its own tools show, since the
//! resident set leaves out most of what a GPU uses). Weights that are mapped and not copied are pages of files: the system
//! counts them as resident and not as footprint.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use std::time::Duration;

use serde_json::{Map, Value, json};

/// Counters of the process's memory, in bytes.
#[derive(Debug, Default)]
pub(super) struct Footprint {
    /// What the plan allows for; 0 when nothing is planned.
    planned: u64,
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
    /// What the plan allows for; 0 when nothing is planned.
    pub planned_bytes: u64,
    /// Looks, one a second, that found more than is planned.
    pub over_plan: u64,
}

impl Footprint {
    pub(super) fn new(planned: u64) -> Self {
        Self {
            planned,
            ..Self::default()
        }
    }

    /// Looks now, and warns when the plan has been left.
    pub(super) fn look(&self) -> FootprintReading {
        match hostmem::process(std::process::id()) {
            Ok(memory) => self.note(memory.footprint_bytes, memory.resident_bytes),
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
            planned_bytes: self.planned,
            over_plan: self.over.load(Relaxed),
        }
    }

    fn note(&self, footprint: u64, resident: u64) {
        self.now.store(footprint, Relaxed);
        self.resident.store(resident, Relaxed);
        self.peak.fetch_max(footprint, Relaxed);
        let over = self.planned > 0 && footprint > self.planned;
        if over {
            self.over.fetch_add(1, Relaxed);
        }
        // Once each way, and not every second.
        if self.is_over.swap(over, Relaxed) != over {
            let planned = self.planned;
            if over {
                tracing::warn!(
                    footprint,
                    planned,
                    "this process takes more memory than is planned"
                );
            } else {
                tracing::info!(footprint, planned, "this process is back within its plan");
            }
        }
    }
}

impl FootprintReading {
    /// Bytes above the plan; below 0 when under it. `None` when nothing is planned.
    pub(super) fn drift(&self) -> Option<i64> {
        let signed = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
        (self.planned_bytes > 0).then(|| signed(self.footprint_bytes) - signed(self.planned_bytes))
    }

    pub(super) fn json(&self) -> Value {
        json!({
            "footprint_bytes": self.footprint_bytes,
            "footprint_peak_bytes": self.peak_bytes,
            "resident_bytes": self.resident_bytes,
            "planned_bytes": self.planned_bytes,
            "drift_bytes": self.drift(),
            "looks_over_plan": self.over_plan,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_over_the_plan_are_counted() {
        let footprint = Footprint::new(100);
        for (bytes, over, drift) in [
            (90, 0, -10),
            (100, 0, 0),
            (130, 1, 30),
            (120, 2, 20),
            (80, 2, -20),
        ] {
            footprint.note(bytes, bytes + 7);
            let reading = footprint.last();
            assert_eq!((reading.over_plan, reading.drift()), (over, Some(drift)));
            assert_eq!(
                (reading.footprint_bytes, reading.resident_bytes),
                (bytes, bytes + 7)
            );
        }
        assert_eq!(footprint.last().peak_bytes, 130);
        let unplanned = Footprint::new(0);
        unplanned.note(5, 5);
        assert_eq!((unplanned.last().over_plan, unplanned.last().drift()), (0, None));
    }

    #[test]
    fn a_look_sees_this_process() {
        let reading = Footprint::new(1 << 50).look();
        assert!(
            reading.footprint_bytes > 1 << 20 && reading.peak_bytes >= reading.footprint_bytes,
            "{reading:?}"
        );
        assert!(reading.drift().is_some_and(|drift| drift < 0));
    }
}

//! Readings of the host's memory for the lifecycle, which decides what they lead to.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hostmem::Pressure;
use lifecycle::{MemoryLevel, MemoryReading};
use serde_json::Value;

use crate::house::House;

/// How soon it is seen that readings are wanted again.
const LOOK: Duration = Duration::from_secs(2);

/// Reads for ever, as often as the registry in force says.
pub async fn watch(house: Arc<House>) {
    let mut complained = false;
    loop {
        let Some(rules) = house.catalog().registry.globals.memory.clone() else {
            tokio::time::sleep(LOOK).await;
            continue;
        };
        let reading = match &rules.readings {
            None => system(),
            Some(path) => file(path),
        };
        match reading {
            Ok(reading) => {
                complained = false;
                house.memory(reading);
            }
            Err(error) if !complained => {
                complained = true;
                tracing::warn!(%error, "the host's memory cannot be read");
            }
            Err(_) => {}
        }
        tokio::time::sleep(rules.every).await;
    }
}

fn system() -> std::io::Result<MemoryReading> {
    let host = hostmem::host()?;
    Ok(MemoryReading {
        level: match host.pressure {
            Pressure::Normal => MemoryLevel::Normal,
            Pressure::Warning => MemoryLevel::Warning,
            Pressure::Critical => MemoryLevel::Critical,
        },
        available_bytes: host.available_bytes,
        total_bytes: host.total_bytes,
        swap_used_bytes: host.swap_used_bytes,
    })
}

/// A reading that somebody has written down.
fn file(path: &Path) -> std::io::Result<MemoryReading> {
    let text = std::fs::read_to_string(path)?;
    let value: Value = serde_json::from_str(&text)?;
    let level = match value.get("level").and_then(Value::as_str) {
        Some("normal") => MemoryLevel::Normal,
        Some("warning") => MemoryLevel::Warning,
        Some("critical") => MemoryLevel::Critical,
        _ => {
            return Err(std::io::Error::other(
                "memory.readings: `level` is none of normal, warning, critical",
            ));
        }
    };
    let bytes = |key: &str| value.get(key).and_then(Value::as_u64).unwrap_or(0);
    Ok(MemoryReading {
        level,
        available_bytes: bytes("available_bytes"),
        total_bytes: bytes("total_bytes"),
        swap_used_bytes: bytes("swap_used_bytes"),
    })
}

/// A reading for people: `1.2 GB of 16.0 GB available, 3.4 GB of swap used`.
#[must_use]
pub fn shown(reading: &MemoryReading) -> String {
    let gb = |bytes: u64| bytes as f64 / 1e9;
    format!(
        "{:.1} GB of {:.1} GB available, {:.1} GB of swap used",
        gb(reading.available_bytes),
        gb(reading.total_bytes),
        gb(reading.swap_used_bytes)
    )
}

/// The level's name.
#[must_use]
pub fn name(level: MemoryLevel) -> &'static str {
    match level {
        MemoryLevel::Normal => "normal",
        MemoryLevel::Warning => "warning",
        MemoryLevel::Critical => "critical",
    }
}

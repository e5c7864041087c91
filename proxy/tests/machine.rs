//! What the real program says of the machine: `/api/hardware`, `/api/performance`, and its share of `/metrics`; what
//! a worker's heartbeat adds to that.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::disallowed_methods
)]

mod common;

use std::time::Duration;

use common::{Swapd, eventually};

const NOTHING: &str = "models: {}";

#[test]
fn the_hardware_in_llama_swaps_form() {
    let swapd = Swapd::start(NOTHING);
    let found = swapd.get("/api/hardware").json();
    assert_eq!(found["schema_version"], 1);
    assert_eq!(
        found["cpu"]["logical_thread_count"],
        std::thread::available_parallelism().unwrap().get()
    );
    assert!(found["memory"]["capacity_bytes"].as_u64().unwrap() > 100 << 20);
    for key in [
        "captured_at",
        "capture",
        "architecture",
        "operating_system",
        "environment",
    ] {
        assert!(!found[key].is_null(), "{found}");
    }
    assert!(found["accelerators"].is_array() && found["operating_system"]["kernel"].is_string());
    // A snapshot of the start.
    assert_eq!(swapd.get("/api/hardware").json(), found);
}

#[test]
fn measurements_are_kept_and_asked_for_by_time() {
    let swapd = Swapd::start(NOTHING);
    let found = eventually("the first measurement", Duration::from_secs(5), || {
        let found = swapd.get("/api/performance").json();
        (!found["sys_stats"].as_array().unwrap().is_empty()).then_some(found)
    });
    assert_eq!(found["enabled"], true);
    let sample = &found["sys_stats"][0];
    assert!(sample["mem_used_mb"].as_u64().unwrap() < sample["mem_total_mb"].as_u64().unwrap());
    assert!(
        sample["cpu_util_per_core"]
            .as_array()
            .unwrap()
            .iter()
            .all(|c| (0.0..=100.0).contains(&c.as_f64().unwrap()))
    );
    assert!(
        sample["net_io"]
            .as_array()
            .unwrap()
            .iter()
            .any(|i| i["name"] == "lo")
    );
    for key in [
        "load_avg_1",
        "load_avg_5",
        "load_avg_15",
        "swap_total_mb",
        "swap_used_mb",
        "mem_free_mb",
    ] {
        assert!(sample[key].is_number(), "{key}");
    }
    let at = sample["timestamp"].as_str().unwrap();
    let after = swapd
        .get(&format!("/api/performance?after={}", at.replace(':', "%3A")))
        .json();
    assert!(
        after["sys_stats"]
            .as_array()
            .unwrap()
            .iter()
            .all(|s| s["timestamp"].as_str().unwrap() > at)
    );
    assert_eq!(swapd.get("/api/performance?after=yesterday").status, 400);
    let metrics = swapd.get("/metrics").body;
    for name in [
        "llamaswap_cpu_util_percent{core=\"0\"}",
        "llamaswap_load_average{interval=\"15m\"}",
        "llamaswap_network_bytes_total{interface=\"lo\",direction=\"recv\"}",
        "llamaswap_memory_total_bytes ",
        "llamaswap_swap_used_bytes ",
        "swapd_memory_pressure ",
    ] {
        assert!(metrics.contains(name), "{name} in {metrics}");
    }
}

#[test]
fn measuring_can_be_switched_off_and_on_by_a_reload() {
    let swapd = Swapd::start_with("performance: {disabled: true}\nmodels: {}", &["--watch-config"]);
    let off = swapd.get("/api/performance");
    assert_eq!(
        (off.status, off.json()),
        (503, serde_json::json!({"enabled": false}))
    );
    let metrics = swapd.get("/metrics");
    assert_eq!(
        metrics.status, 200,
        "the proxy's own counters are there all the same"
    );
    assert!(!metrics.body.contains("llamaswap_") && metrics.body.contains("swapd_requests_total"));
    assert_eq!(swapd.get("/api/hardware").status, 200);
    swapd.rewrite("performance: {every: 5s}\nmodels: {}");
    eventually("measuring again", Duration::from_secs(5), || {
        let found = swapd.get("/api/performance");
        (found.status == 200 && !found.json()["sys_stats"].as_array().unwrap().is_empty()).then_some(())
    });
    // Too often is refused, and leaves everything as it was.
    swapd.rewrite("performance: {every: 1s}\nmodels: {}");
    eventually("the refusal", Duration::from_secs(5), || {
        let running = swapd.get("/running").json();
        let errors = running["registry"]["errors"].as_array().unwrap().clone();
        errors
            .iter()
            .any(|e| e.as_str().unwrap().contains("at least 5s"))
            .then_some(())
    });
    assert_eq!(swapd.get("/api/performance").status, 200);
}

/// What only the prefix cache holds is not in use: a worker says both.
#[test]
fn a_workers_keys_and_values_in_use_and_cached() {
    let swapd = Swapd::start("models: {m: {worker: {model: DIR}}}");
    assert_eq!(swapd.chat("m", "").status, 200);
    eventually("a heartbeat", Duration::from_secs(5), || {
        let metrics = swapd.get("/metrics").body;
        metrics
            .contains("swapd_worker_kv_used_bytes{model=\"m\"} 7\n")
            .then(|| assert!(metrics.contains("swapd_worker_kv_cached_bytes{model=\"m\"} 9\n")))
    });
}

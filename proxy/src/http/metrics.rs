//! `/metrics`: Prometheus' text format.

use std::fmt::{Display, Write};

use hostmem::machine::AcceleratorReading;
use http::Response;
use http::header::{CONTENT_TYPE, HeaderValue};
use lifecycle::State;

use super::App;
use super::body::Body;
use crate::activity::{BUCKETS, Counters, Histogram};

const STATES: [State; 6] = [
    State::Stopped,
    State::Starting,
    State::Ready,
    State::Draining,
    State::Stopping,
    State::BackOff,
];

/// Text being written, one family of samples after the other.
#[derive(Default)]
struct Page(String);

impl Page {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        self.0.push_str(name);
        for (i, (key, text)) in labels.iter().enumerate() {
            let text = text
                .replace('\\', "\\\\")
                .replace('"', "\\\"")
                .replace('\n', "\\n");
            let _ = write!(self.0, "{}{key}=\"{text}\"", if i == 0 { '{' } else { ',' });
        }
        let _ = writeln!(self.0, "{} {value}", if labels.is_empty() { "" } else { "}" });
    }

    fn histogram(&mut self, name: &str, model: &str, h: &Histogram) {
        let mut below = 0;
        for (bound, count) in BUCKETS.iter().zip(h.counts) {
            below += count;
            self.sample(
                &format!("{name}_bucket"),
                &[("model", model), ("le", &bound.to_string())],
                below,
            );
        }
        self.sample(
            &format!("{name}_bucket"),
            &[("model", model), ("le", "+Inf")],
            h.total,
        );
        self.sample(&format!("{name}_sum"), &[("model", model)], h.sum);
        self.sample(&format!("{name}_count"), &[("model", model)], h.total);
    }
}

/// The whole page.
#[must_use]
pub fn answer(app: &App) -> Response<Body> {
    let mut page = Page::default();
    requests(app, &mut page);
    let (_, _, evicted) = app.house.memory_state();
    page.family(
        "swapd_memory_evictions_total",
        "counter",
        "Models unloaded for want of memory.",
    );
    page.sample("swapd_memory_evictions_total", &[], evicted);
    models(app, &mut page);
    peers(app, &mut page);
    host(app, &mut page);
    let mut response = Response::new(Body::Full(page.0.into()));
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}

/// Picks one histogram.
type Get = fn(&Counters) -> &Histogram;

fn requests(app: &App, page: &mut Page) {
    let counters = app.activity.counters();
    page.family(
        "swapd_store_lost_total",
        "counter",
        "Rows and captures that the activity database has not taken.",
    );
    page.sample("swapd_store_lost_total", &[], app.activity.lost_rows());
    page.family(
        "swapd_requests_total",
        "counter",
        "Finished requests by status; 499: the client left.",
    );
    for (model, c) in &counters {
        for (status, n) in &c.requests {
            page.sample(
                "swapd_requests_total",
                &[("model", model), ("code", &status.to_string())],
                n,
            );
        }
    }
    page.family(
        "swapd_tokens_total",
        "counter",
        "Tokens as the replies report them.",
    );
    for (model, c) in &counters {
        let kinds = [
            ("prompt", c.prompt_tokens),
            ("completion", c.completion_tokens),
            ("cached", c.cached_tokens),
        ];
        for (kind, n) in kinds {
            page.sample("swapd_tokens_total", &[("model", model), ("kind", kind)], n);
        }
    }
    let families: [(&str, &str, Get); 3] = [
        (
            "swapd_time_to_first_byte_seconds",
            "From arrival to the first byte of the reply's body.",
            |c| &c.first_byte,
        ),
        (
            "swapd_request_duration_seconds",
            "From arrival to the end of the reply.",
            |c| &c.duration,
        ),
        (
            "swapd_request_waiting_seconds",
            "From arrival to forwarding: queue and load.",
            |c| &c.waiting,
        ),
    ];
    for (name, help, get) in families {
        page.family(name, "histogram", help);
        for (model, c) in &counters {
            page.histogram(name, model, get(c));
        }
    }
}

fn models(app: &App, page: &mut Page) {
    let statuses = app.house.statuses();
    page.family(
        "swapd_model_state",
        "gauge",
        "1 for the state that the model is in.",
    );
    for (model, status, _) in &statuses {
        for state in STATES {
            let labels = [("model", &**model), ("state", state.as_str())];
            page.sample("swapd_model_state", &labels, u8::from(state == status.state));
        }
    }
    page.family(
        "swapd_inflight_requests",
        "gauge",
        "Requests at the model's server.",
    );
    for (model, status, _) in &statuses {
        page.sample("swapd_inflight_requests", &[("model", model)], status.inflight);
    }
    page.family(
        "swapd_waiting_requests",
        "gauge",
        "Requests that wait for the model.",
    );
    for (model, status, _) in &statuses {
        page.sample("swapd_waiting_requests", &[("model", model)], status.waiting);
    }
    let loads = app.house.loads();
    page.family("swapd_model_load_seconds", "summary", "From spawn to ready.");
    for (model, load) in &loads {
        page.sample(
            "swapd_model_load_seconds_sum",
            &[("model", model)],
            load.time.as_secs_f64(),
        );
        page.sample("swapd_model_load_seconds_count", &[("model", model)], load.ready);
    }
    page.family(
        "swapd_model_exits_total",
        "counter",
        "Processes that have ended, for whatever reason.",
    );
    for (model, load) in &loads {
        page.sample("swapd_model_exits_total", &[("model", model)], load.exits);
    }
    page.family(
        "swapd_process_footprint_bytes",
        "gauge",
        "Memory that the model's process costs, mapped files left out.",
    );
    let processes = statuses.iter().filter_map(|(m, _, p)| Some((m, p.as_ref()?)));
    for (model, process) in processes.clone() {
        if let Some(memory) = process.pid.get().and_then(|pid| hostmem::process(*pid).ok()) {
            page.sample(
                "swapd_process_footprint_bytes",
                &[("model", model)],
                memory.footprint_bytes,
            );
        }
    }
    let beats = || {
        processes
            .clone()
            .filter_map(|(model, process)| Some((model, (*process.heartbeat.lock())?)))
    };
    page.family(
        "swapd_worker_kv_used_bytes",
        "gauge",
        "Keys and values of running requests, by the worker's heartbeat.",
    );
    for (model, beat) in beats() {
        page.sample(
            "swapd_worker_kv_used_bytes",
            &[("model", model)],
            beat.kv_used_bytes,
        );
    }
    page.family(
        "swapd_worker_kv_cached_bytes",
        "gauge",
        "Keys and values that only the prefix cache holds, by the worker's heartbeat.",
    );
    for (model, beat) in beats() {
        page.sample(
            "swapd_worker_kv_cached_bytes",
            &[("model", model)],
            beat.kv_cached_bytes,
        );
    }
    page.family(
        "swapd_worker_steps_total",
        "counter",
        "Engine steps, by the worker's heartbeat.",
    );
    for (model, beat) in beats() {
        page.sample("swapd_worker_steps_total", &[("model", model)], beat.steps);
    }
}

fn peers(app: &App, page: &mut Page) {
    let catalog = app.house.catalog();
    if catalog.peers.iter().next().is_none() {
        return;
    }
    page.family(
        "swapd_peer_up",
        "gauge",
        "0 when the peer could not be reached the last time.",
    );
    for peer in catalog.peers.iter() {
        page.sample("swapd_peer_up", &[("peer", &peer.id)], u8::from(peer.is_up()));
    }
    page.family(
        "swapd_peer_inflight_requests",
        "gauge",
        "Requests that the peer has of ours.",
    );
    for peer in catalog.peers.iter() {
        page.sample("swapd_peer_inflight_requests", &[("peer", &peer.id)], peer.busy());
    }
}

/// The names are llama-swap's, and so is that nothing is said of the machine when `performance.disabled` is set.
fn host(app: &App, page: &mut Page) {
    if !app.performance.is_enabled() {
        return;
    }
    if let Some(sample) = app.performance.latest() {
        page.family(
            "llamaswap_cpu_util_percent",
            "gauge",
            "Share of time at work, per core.",
        );
        for (core, percent) in sample.cores.iter().enumerate() {
            page.sample(
                "llamaswap_cpu_util_percent",
                &[("core", &core.to_string())],
                percent,
            );
        }
        page.family("llamaswap_load_average", "gauge", "Load average.");
        for (interval, load) in ["1m", "5m", "15m"].iter().zip(sample.load) {
            page.sample("llamaswap_load_average", &[("interval", interval)], load);
        }
        page.family(
            "llamaswap_network_bytes_total",
            "counter",
            "Bytes over each network interface.",
        );
        for i in &sample.network {
            for (direction, bytes) in [("recv", i.received_bytes), ("sent", i.sent_bytes)] {
                page.sample(
                    "llamaswap_network_bytes_total",
                    &[("interface", &i.name), ("direction", direction)],
                    bytes,
                );
            }
        }
        accelerators(&sample.accelerators, page);
    }
    memory(page);
}

/// Picks one number of a reading, in its unit.
type Reading = fn(&AcceleratorReading) -> Option<f64>;

fn accelerators(found: &[AcceleratorReading], page: &mut Page) {
    let families: [(&str, Reading); 8] = [
        ("llamaswap_gpu_temperature_celsius", |a| a.temperature_celsius),
        ("llamaswap_gpu_vram_temperature_celsius", |a| {
            a.memory_temperature_celsius
        }),
        ("llamaswap_gpu_util_percent", |a| a.busy_percent),
        ("llamaswap_gpu_memory_util_percent", |a| {
            let (used, total) = a
                .memory_used_bytes
                .zip(a.memory_total_bytes)
                .filter(|(_, total)| *total > 0)?;
            Some(used as f64 * 100.0 / total as f64)
        }),
        ("llamaswap_gpu_memory_used_bytes", |a| {
            a.memory_used_bytes.map(|n| n as f64)
        }),
        ("llamaswap_gpu_memory_total_bytes", |a| {
            a.memory_total_bytes.map(|n| n as f64)
        }),
        ("llamaswap_gpu_fan_speed_percent", |a| a.fan_percent),
        ("llamaswap_gpu_power_draw_watts", |a| a.power_watts),
    ];
    for (name, read) in families {
        let known: Vec<(&AcceleratorReading, f64)> =
            found.iter().filter_map(|a| Some((a, read(a)?))).collect();
        if known.is_empty() {
            continue;
        }
        page.family(name, "gauge", "As the driver tells.");
        for (a, value) in known {
            page.sample(
                name,
                &[("id", &a.index.to_string()), ("name", &a.name), ("uuid", &a.uuid)],
                value,
            );
        }
    }
}

fn memory(page: &mut Page) {
    let Ok(host) = hostmem::host() else { return };
    let gauges = [
        (
            "llamaswap_memory_total_bytes",
            "Memory of the machine.",
            host.total_bytes,
        ),
        (
            "llamaswap_memory_used_bytes",
            "Memory in use.",
            host.total_bytes.saturating_sub(host.available_bytes),
        ),
        (
            "llamaswap_memory_free_bytes",
            "Memory that programs can get.",
            host.available_bytes,
        ),
        ("llamaswap_swap_total_bytes", "Swap space.", host.swap_total_bytes),
        (
            "llamaswap_swap_used_bytes",
            "Swap space in use.",
            host.swap_used_bytes,
        ),
    ];
    for (name, help, value) in gauges {
        page.family(name, "gauge", help);
        page.sample(name, &[], value);
    }
    page.family(
        "swapd_memory_pressure",
        "gauge",
        "0 normal, 1 warning, 2 critical.",
    );
    page.sample("swapd_memory_pressure", &[], host.pressure as u8);
}

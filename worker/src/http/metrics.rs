//! Counters in Prometheus' text format.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use super::footprint::FootprintReading;
use crate::backend::EngineStats;

/// Which kind of request.
#[derive(Debug, Clone, Copy)]
pub(super) enum Route {
    Chat,
    Completions,
}

/// How it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// To the end.
    Ok,
    /// Refused: the client's fault.
    ClientError,
    /// Refused or broken off: ours.
    ServerError,
    /// The client went away.
    Cancelled,
}

impl Route {
    pub(super) fn name(self) -> &'static str {
        ROUTES.get(self as usize).copied().unwrap_or_default()
    }
}

impl Outcome {
    pub(super) fn name(self) -> &'static str {
        OUTCOMES.get(self as usize).copied().unwrap_or_default()
    }
}

const ROUTES: [&str; 2] = ["chat", "completions"];
const OUTCOMES: [&str; 4] = ["ok", "client_error", "server_error", "cancelled"];
/// Upper bounds of the buckets, in milliseconds.
const TTFT_BOUNDS: [u64; 12] = [
    10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 30_000, 120_000,
];

/// All counters of the HTTP layer.
#[derive(Debug, Default)]
pub(super) struct Metrics {
    requests: [[AtomicU64; OUTCOMES.len()]; ROUTES.len()],
    prompt_tokens: AtomicU64,
    cached_tokens: AtomicU64,
    completion_tokens: AtomicU64,
    ttft_buckets: [AtomicU64; TTFT_BOUNDS.len()],
    ttft_count: AtomicU64,
    ttft_micros: AtomicU64,
}

impl Metrics {
    pub(super) fn request(&self, route: Route, outcome: Outcome) {
        let counter = self
            .requests
            .get(route as usize)
            .and_then(|r| r.get(outcome as usize));
        if let Some(counter) = counter {
            counter.fetch_add(1, Relaxed);
        }
    }

    pub(super) fn tokens(&self, prompt: usize, cached: usize, completion: usize) {
        self.prompt_tokens.fetch_add(prompt as u64, Relaxed);
        self.cached_tokens.fetch_add(cached as u64, Relaxed);
        self.completion_tokens.fetch_add(completion as u64, Relaxed);
    }

    /// Arrival of the request to its first token.
    pub(super) fn first_token(&self, after: Duration) {
        let micros = u64::try_from(after.as_micros()).unwrap_or(u64::MAX);
        for (bound, bucket) in TTFT_BOUNDS.iter().zip(&self.ttft_buckets) {
            if micros <= bound * 1000 {
                bucket.fetch_add(1, Relaxed);
            }
        }
        self.ttft_count.fetch_add(1, Relaxed);
        self.ttft_micros.fetch_add(micros, Relaxed);
    }

    /// Everything, with the engine's own numbers.
    pub(super) fn render(
        &self,
        engine: &EngineStats,
        process: &FootprintReading,
        in_flight: usize,
    ) -> String {
        let mut page = Page::default();
        page.head("requests_total", "counter", "Requests by route and outcome.");
        for (route, counters) in ROUTES.iter().zip(&self.requests) {
            for (outcome, counter) in OUTCOMES.iter().zip(counters) {
                let labels = format!("{{route=\"{route}\",outcome=\"{outcome}\"}}");
                page.value("requests_total", &labels, counter.load(Relaxed));
            }
        }
        page.head(
            "time_to_first_token_seconds",
            "histogram",
            "Arrival of a request to its first token.",
        );
        for (bound, bucket) in TTFT_BOUNDS.iter().zip(&self.ttft_buckets) {
            let labels = format!("{{le=\"{}\"}}", Seconds(bound * 1000));
            page.value(
                "time_to_first_token_seconds_bucket",
                &labels,
                bucket.load(Relaxed),
            );
        }
        let count = self.ttft_count.load(Relaxed);
        page.value("time_to_first_token_seconds_bucket", "{le=\"+Inf\"}", count);
        page.value(
            "time_to_first_token_seconds_sum",
            "",
            Seconds(self.ttft_micros.load(Relaxed)),
        );
        page.value("time_to_first_token_seconds_count", "", count);
        let age = Seconds(u64::try_from(engine.last_step_age.as_micros()).unwrap_or(u64::MAX));
        for (name, kind, help, value) in [
            (
                "prompt_tokens_total",
                "counter",
                "Prompt tokens of requests.",
                self.prompt_tokens.load(Relaxed),
            ),
            (
                "cached_prompt_tokens_total",
                "counter",
                "Those taken from the prefix cache.",
                self.cached_tokens.load(Relaxed),
            ),
            (
                "completion_tokens_total",
                "counter",
                "Tokens generated for requests.",
                self.completion_tokens.load(Relaxed),
            ),
            ("engine_steps_total", "counter", "Engine steps.", engine.steps),
            (
                "engine_prefill_tokens_total",
                "counter",
                "Prompt tokens computed.",
                engine.prefill_tokens,
            ),
            (
                "engine_decode_tokens_total",
                "counter",
                "Tokens generated by the engine.",
                engine.decode_tokens,
            ),
            (
                "engine_cached_tokens_total",
                "counter",
                "Prompt tokens that the engine took from the prefix cache.",
                engine.cache.cached_tokens,
            ),
            (
                "engine_prompt_tokens_total",
                "counter",
                "Prompt tokens of requests that left the queue; cached / these is the hit rate.",
                engine.cache.prompt_tokens,
            ),
            (
                "prefix_cache_requests_total",
                "counter",
                "Requests that left the queue.",
                engine.cache.requests,
            ),
            (
                "prefix_cache_hits_total",
                "counter",
                "Of these, those that found at least a quarter of their prompt cached.",
                engine.cache.hits,
            ),
            (
                "kv_evicted_blocks_total",
                "counter",
                "Cached blocks given up for room.",
                engine.cache.evicted_blocks,
            ),
            (
                "kv_copied_blocks_total",
                "counter",
                "Blocks copied, because a request shared only their beginning.",
                engine.cache.copied_blocks,
            ),
            (
                "kv_moved_blocks_total",
                "counter",
                "Blocks moved, so that sequences are one run.",
                engine.cache.moved_blocks,
            ),
            (
                "kv_deduplicated_blocks_total",
                "counter",
                "Blocks computed twice at once, one of which was given back.",
                engine.cache.deduplicated_blocks,
            ),
            (
                "engine_preempted_total",
                "counter",
                "Requests that lost their place in the KV cache to older ones.",
                engine.preempted,
            ),
            (
                "constraint_masks_total",
                "counter",
                "Sets of allowed tokens computed, one a token and constrained request.",
                engine.constraints.masks,
            ),
            (
                "engine_late_draws_total",
                "counter",
                "Decode steps that drew only after the tokens before them had been read, for a constraint.",
                engine.constraints.late_draws,
            ),
            (
                "requests_in_flight",
                "gauge",
                "Requests not answered to the end.",
                in_flight as u64,
            ),
            (
                "requests_running",
                "gauge",
                "Requests in prefill or decode.",
                engine.running as u64,
            ),
            (
                "requests_waiting",
                "gauge",
                "Requests in the engine's queue.",
                engine.waiting as u64,
            ),
            (
                "kv_used_bytes",
                "gauge",
                "Keys and values of running requests.",
                engine.kv_used_bytes,
            ),
            (
                "kv_cached_bytes",
                "gauge",
                "Keys and values that only the prefix cache holds; they make room for requests.",
                engine.kv_cached_bytes,
            ),
            (
                "active_bytes",
                "gauge",
                "Memory allocated by MLX.",
                engine.active_bytes,
            ),
            (
                "peak_bytes",
                "gauge",
                "Its highest value so far.",
                engine.peak_bytes,
            ),
            (
                "buffer_cache_bytes",
                "gauge",
                "Freed memory that MLX keeps.",
                engine.buffer_cache_bytes,
            ),
            (
                "process_footprint_bytes",
                "gauge",
                "Memory of the process that no file backs.",
                process.footprint_bytes,
            ),
            (
                "process_footprint_peak_bytes",
                "gauge",
                "Its highest value so far.",
                process.peak_bytes,
            ),
            (
                "process_resident_bytes",
                "gauge",
                "Pages of the process in memory, those of files included.",
                process.resident_bytes,
            ),
            (
                "planned_bytes",
                "gauge",
                "What the memory plan allows the process, or the GPU with memory of its own; 0 without one.",
                process.planned_bytes,
            ),
            (
                "looks_over_plan_total",
                "counter",
                "Looks at the process that found more than is planned.",
                process.over_plan,
            ),
        ] {
            page.head(name, kind, help);
            page.value(name, "", value);
        }
        page.head(
            "constraint_mask_seconds_total",
            "counter",
            "Time of the engine's thread that sets of allowed tokens took.",
        );
        let micros = u64::try_from(engine.constraints.mask_time.as_micros()).unwrap_or(u64::MAX);
        page.value("constraint_mask_seconds_total", "", Seconds(micros));
        if let Some(drift) = process.drift() {
            page.head("plan_drift_bytes", "gauge", "What is held against the plan (footprint, or MLX' bytes on a GPU with memory of its own) less it.");
            page.value("plan_drift_bytes", "", drift);
        }
        page.head(
            "engine_decode_steps_total",
            "counter",
            "Decode steps by path: kernels of our own, or the reference.",
        );
        for (path, count) in [
            ("kernels", engine.kernel_decodes),
            ("reference", engine.reference_decodes),
        ] {
            let labels = format!("{{path=\"{path}\"}}");
            page.value("engine_decode_steps_total", &labels, count);
        }
        page.head(
            "engine_last_step_age_seconds",
            "gauge",
            "Time since the engine's last step.",
        );
        page.value("engine_last_step_age_seconds", "", age);
        page.text
    }
}

/// Microseconds, shown as seconds.
struct Seconds(u64);

impl std::fmt::Display for Seconds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = format!("{}.{:06}", self.0 / 1_000_000, self.0 % 1_000_000);
        f.write_str(text.trim_end_matches('0').trim_end_matches('.'))
    }
}

#[derive(Default)]
struct Page {
    text: String,
}

impl Page {
    // Writing to a string does not fail.
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(
            self.text,
            "# HELP mlxworker_{name} {help}\n# TYPE mlxworker_{name} {kind}"
        );
    }

    fn value(&mut self, name: &str, labels: &str, value: impl std::fmt::Display) {
        let _ = writeln!(self.text, "mlxworker_{name}{labels} {value}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{CacheStats, ConstraintStats};

    #[test]
    fn buckets_are_cumulative() {
        let metrics = Metrics::default();
        metrics.request(Route::Completions, Outcome::Cancelled);
        for millis in [10, 11, 700_000] {
            metrics.first_token(Duration::from_millis(millis));
        }
        let text = metrics.render(
            &EngineStats {
                steps: 7,
                kernel_decodes: 5,
                reference_decodes: 2,
                cache: CacheStats {
                    requests: 4,
                    hits: 3,
                    prompt_tokens: 900,
                    cached_tokens: 600,
                    evicted_blocks: 11,
                    copied_blocks: 12,
                    moved_blocks: 13,
                    deduplicated_blocks: 14,
                },
                constraints: ConstraintStats {
                    masks: 15,
                    mask_time: Duration::from_micros(1_600),
                    late_draws: 17,
                },
                ..EngineStats::default()
            },
            &FootprintReading {
                footprint_bytes: 40,
                counted_bytes: 40,
                planned_bytes: 100,
                over_plan: 3,
                ..FootprintReading::default()
            },
            2,
        );
        for line in [
            "mlxworker_requests_total{route=\"completions\",outcome=\"cancelled\"} 1",
            "mlxworker_requests_total{route=\"chat\",outcome=\"ok\"} 0",
            "mlxworker_time_to_first_token_seconds_bucket{le=\"0.01\"} 1",
            "mlxworker_time_to_first_token_seconds_bucket{le=\"0.025\"} 2",
            "mlxworker_time_to_first_token_seconds_bucket{le=\"120\"} 2",
            "mlxworker_time_to_first_token_seconds_bucket{le=\"+Inf\"} 3",
            "mlxworker_time_to_first_token_seconds_sum 700.021",
            "mlxworker_engine_steps_total 7",
            "mlxworker_engine_decode_steps_total{path=\"kernels\"} 5",
            "mlxworker_engine_decode_steps_total{path=\"reference\"} 2",
            "mlxworker_engine_cached_tokens_total 600",
            "mlxworker_engine_prompt_tokens_total 900",
            "mlxworker_prefix_cache_requests_total 4",
            "mlxworker_prefix_cache_hits_total 3",
            "mlxworker_kv_evicted_blocks_total 11",
            "mlxworker_kv_copied_blocks_total 12",
            "mlxworker_kv_moved_blocks_total 13",
            "mlxworker_kv_deduplicated_blocks_total 14",
            "mlxworker_constraint_masks_total 15",
            "mlxworker_constraint_mask_seconds_total 0.0016",
            "mlxworker_engine_late_draws_total 17",
            "mlxworker_requests_in_flight 2",
            "mlxworker_process_footprint_bytes 40",
            "mlxworker_looks_over_plan_total 3",
            "mlxworker_plan_drift_bytes -60",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is missing in\n{text}");
        }
    }
}

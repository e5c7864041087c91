//! Messages on the control socket between `swapd` and a worker: one JSON object a line, both ways.
//!
//! The socket is the worker's standard input; [`CONTROL_ENV`] set to [`CONTROL_STDIN`] says so. Its end of file tells
//! a worker that its proxy is gone, and a proxy that its worker is. Unknown fields are ignored and unknown events
//! are [`WorkerEvent::Unknown`], so that either side may be the newer one.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Environment variable that tells a worker that it is run by a proxy.
pub const CONTROL_ENV: &str = "MLXWORKER_CONTROL";
/// Its only value: the control socket is standard input.
pub const CONTROL_STDIN: &str = "stdin";

/// What a worker tells its proxy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum WorkerEvent {
    /// Still starting.
    Loading {
        /// What is going on: `weights` (taken from their files) and `pages` (files read ahead), in bytes; `warm-up`, in
        /// steps; `warm-prompts`, in tokens.
        phase: String,
        /// Of it done.
        #[serde(default)]
        done: u64,
        /// Of it in all; 0 when unknown.
        #[serde(default)]
        total: u64,
    },
    /// Requests are answered from now on, at `127.0.0.1:port`. Sent once, after a real prefill and decode.
    Ready {
        /// Where.
        port: u16,
        /// Who.
        pid: u32,
        /// Name of the model in the API.
        model: String,
        /// Effective limits, as free-form numbers.
        #[serde(default)]
        limits: Map<String, Value>,
    },
    /// Sent every second, from `ready` on.
    Heartbeat(Heartbeat),
    /// The worker gives up, with the reason; it exits non-zero right after.
    Fatal {
        /// For a person to read.
        message: String,
    },
    /// An event of a newer worker.
    #[serde(other)]
    Unknown,
}

/// The state of a worker's engine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Heartbeat {
    /// Engine steps since the start.
    pub steps: u64,
    /// Milliseconds since the last of them ended.
    pub last_step_age_ms: u64,
    /// Requests in prefill or decode.
    pub running: u64,
    /// Requests in the queue.
    pub waiting: u64,
    /// Bytes of keys and values that running requests hold.
    pub kv_used_bytes: u64,
    /// Bytes of those that only the prefix cache holds: they make room.
    pub kv_cached_bytes: u64,
    /// Bytes allocated by MLX.
    pub active_bytes: u64,
    /// Freed bytes that MLX keeps.
    pub buffer_cache_bytes: u64,
    /// Bytes that the process takes, by the system's count.
    pub footprint_bytes: u64,
    /// Bytes that its plan allows for; 0 without one.
    pub planned_bytes: u64,
}

/// What a proxy tells its worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case")]
pub enum ProxyCommand {
    /// Finish what is running, refuse what is new with 503.
    Drain,
    /// End now; what is still running is cut off with an error.
    Stop,
    /// A command of a newer proxy.
    #[serde(other)]
    Unknown,
}

/// One message as a line, newline included.
///
/// # Errors
/// None in practice: the messages above have string keys only.
pub fn to_line<T: Serialize>(message: &T) -> serde_json::Result<String> {
    let mut line = serde_json::to_string(message)?;
    line.push('\n');
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn worker_events_have_the_agreed_form() {
        let limits = json!({"max_num_seqs": 4}).as_object().unwrap().clone();
        let ready = WorkerEvent::Ready {
            port: 4711,
            pid: 42,
            model: "demo".into(),
            limits,
        };
        assert_eq!(
            to_line(&ready).unwrap(),
            "{\"event\":\"ready\",\"port\":4711,\"pid\":42,\"model\":\"demo\",\"limits\":{\"max_num_seqs\":4}}\n"
        );
        let beat = WorkerEvent::Heartbeat(Heartbeat {
            steps: 9,
            running: 1,
            ..Heartbeat::default()
        });
        assert_eq!(
            serde_json::to_value(&beat).unwrap(),
            json!({"event": "heartbeat", "steps": 9, "last_step_age_ms": 0, "running": 1, "waiting": 0,
                   "kv_used_bytes": 0, "kv_cached_bytes": 0, "active_bytes": 0, "buffer_cache_bytes": 0, "footprint_bytes": 0,
                   "planned_bytes": 0})
        );
        for event in [ready, beat, WorkerEvent::Fatal { message: "no".into() }] {
            let line = to_line(&event).unwrap();
            assert_eq!(serde_json::from_str::<WorkerEvent>(&line).unwrap(), event);
        }
    }

    #[test]
    fn either_side_may_be_newer() {
        let event: WorkerEvent =
            serde_json::from_str(r#"{"event":"heartbeat","steps":3,"gpu_watts":12.5}"#).unwrap();
        assert_eq!(
            event,
            WorkerEvent::Heartbeat(Heartbeat {
                steps: 3,
                ..Heartbeat::default()
            })
        );
        let event: WorkerEvent = serde_json::from_str(r#"{"event":"singing","tune":"la"}"#).unwrap();
        assert_eq!(event, WorkerEvent::Unknown);
        let command: ProxyCommand = serde_json::from_str(r#"{"command":"dance","steps":3}"#).unwrap();
        assert_eq!(command, ProxyCommand::Unknown);
        let command: ProxyCommand = serde_json::from_str(r#"{"command":"drain"}"#).unwrap();
        assert_eq!(command, ProxyCommand::Drain);
    }
}

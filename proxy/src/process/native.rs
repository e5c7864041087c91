//! Our own worker, over the control socket.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use api_types::control::{CONTROL_ENV, CONTROL_STDIN, ProxyCommand, WorkerEvent, to_line};
use http::HeaderValue;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::Command;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::{Definition, Order, Process, Report, describe, drain_output, signal_group, spawn};
use crate::logs::{Logs, Source};
use crate::upstream::Pool;

/// Environment variable that names the worker's program, for tests and unusual installations.
pub const PROGRAM_ENV: &str = "SWAPD_WORKER";

/// Environment variable with the milliseconds of [`SILENCE`], for tests and unusual installations.
pub const SILENCE_ENV: &str = "SWAPD_WORKER_SILENCE_MS";
/// A ready worker beats every second; one that is silent for this long is wedged and is killed.
pub const SILENCE: Duration = Duration::from_secs(30);

fn silence_limit() -> Duration {
    let named = std::env::var(SILENCE_ENV).ok().and_then(|v| v.parse().ok());
    named.map_or(SILENCE, Duration::from_millis)
}

/// The worker's program: named by the environment, else beside this program, else found in `PATH`.
#[must_use]
pub fn program() -> PathBuf {
    if let Some(named) = std::env::var_os(PROGRAM_ENV).filter(|p| !p.is_empty()) {
        return named.into();
    }
    let beside = std::env::current_exe()
        .ok()
        .and_then(|exe| Some(exe.parent()?.join("mlxworker")));
    beside
        .filter(|p| p.is_file())
        .unwrap_or_else(|| "mlxworker".into())
}

pub(super) async fn run(
    process: &Arc<Process>,
    launch: &registry::WorkerLaunch,
    definition: &Definition,
    mut orders: mpsc::Receiver<Order>,
    logs: &Logs,
    report: &(impl Fn(Report) + Send + Sync),
) -> Result<String, String> {
    let authorization = launch.api_key().map(bearer).transpose()?;
    let mut command = Command::new(program());
    command
        .args(launch.argv())
        .envs(launch.env.iter().map(|(k, v)| (k, v)))
        .env(CONTROL_ENV, CONTROL_STDIN);
    let spawned = spawn(command, &process.model, logs)?;
    let (mut child, output) = (spawned.child, spawned.output);
    let pid = child.id();
    if let Some(pid) = pid {
        let _ = process.pid.set(pid);
    }
    let (read, mut write) = spawned.control.into_split();
    let mut lines = BufReader::new(read).lines();
    let mut fatal = None;
    let mut listening = true;
    let limit = silence_limit();
    // `None`: not ready yet, or told to end.
    let mut silent_at: Option<Instant> = None;
    let mut silence = std::pin::pin!(tokio::time::sleep(Duration::ZERO));
    let mut stopping = false;
    let status = loop {
        tokio::select! {
            // What was said while this program was held up counts before the time that has passed meanwhile.
            biased;
            status = child.wait() => break status,
            line = lines.next_line(), if listening => match line {
                Ok(Some(line)) => {
                    fatal = heard(&line, process, definition, authorization.as_ref(), logs, report).or(fatal);
                    if !stopping && process.announced.get().is_some() {
                        let at = Instant::now() + limit;
                        silent_at = Some(at);
                        silence.as_mut().reset(at);
                    }
                }
                Ok(None) | Err(_) => listening = false,
            },
            () = &mut silence, if silent_at.is_some() => {
                silent_at = None;
                let message = format!("no heartbeat for {} ms", limit.as_millis());
                tracing::error!(model = %process.model, "{message}; killing");
                fatal = Some(message);
                signal_group(&child, Signal::SIGKILL);
            }
            Some(order) = orders.recv() => match order {
                Order::Stop => {
                    // From here on the grace of the stop counts.
                    (stopping, silent_at) = (true, None);
                    let line = to_line(&ProxyCommand::Stop).unwrap_or_default();
                    if write.write_all(line.as_bytes()).await.is_err() {
                        signal_group(&child, Signal::SIGTERM);
                    }
                }
                Order::Kill => signal_group(&child, Signal::SIGKILL),
            },
        }
    };
    // What it said last may still be in the socket.
    while let Ok(Ok(Some(line))) = tokio::time::timeout(Duration::from_millis(20), lines.next_line()).await {
        fatal = heard(&line, process, definition, None, logs, &|_| ()).or(fatal);
    }
    // Helpers that the worker may have left in its group go with it.
    if let Some(pid) = pid.and_then(|p| i32::try_from(p).ok()) {
        let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
    }
    drain_output(output).await;
    let ended = status.map_or_else(|e| e.to_string(), describe);
    Ok(match fatal {
        Some(message) => format!("{message} (worker ended with {ended})"),
        None => format!("worker ended with {ended}"),
    })
}

/// How swapd shows a worker its key: a client's own credentials are for swapd, and end there.
fn bearer(key: &str) -> Result<HeaderValue, String> {
    let value = HeaderValue::try_from(format!("Bearer {key}"));
    let mut value = value.map_err(|_| "its apiKey holds what no header can hold".to_owned())?;
    value.set_sensitive(true);
    Ok(value)
}

/// Takes one message of the worker; returns the message of a fatal one.
fn heard(
    line: &str,
    process: &Process,
    definition: &Definition,
    authorization: Option<&HeaderValue>,
    logs: &Logs,
    report: &(impl Fn(Report) + Send + Sync),
) -> Option<String> {
    match serde_json::from_str(line) {
        Ok(WorkerEvent::Loading { .. }) => report(Report::Progress),
        Ok(WorkerEvent::Ready { port, limits, .. }) => {
            let _ = process.announced.set(limits);
            report(Report::Ready(
                Pool::new("127.0.0.1", port, definition.limits, authorization.cloned()),
                String::new(),
            ));
        }
        Ok(WorkerEvent::Heartbeat(beat)) => *process.heartbeat.lock() = Some(beat),
        Ok(WorkerEvent::Fatal { message }) => return Some(message),
        Ok(WorkerEvent::Unknown) => {}
        Err(e) => {
            let note = format!("unreadable message on the control socket ({e}): {line}");
            logs.push(Source::Model(process.model.clone()), note.as_bytes());
        }
    }
    None
}

//! One running process of a model: spawn, hand-shake, orders, end.
//!
//! Our own worker is spawned directly; its standard input is the control socket (`api_types::control`). A foreign
//! command is spawned under [`supervise`], a small copy of this program that kills the command's whole process group
//! when the proxy is gone. Either way the end of the proxy is an end of file there, whatever killed it.

pub mod foreign;
pub mod native;
pub mod supervise;

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use api_types::control::Heartbeat;
use lifecycle::{Failure, Instance, ModelId};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use parking_lot::Mutex;
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use crate::logs::{Logs, MAX_LINE, Source};
use crate::upstream::{Limits, SharedPool};

/// Lines of a process's output that its failure quotes.
pub(crate) const TAIL_LINES: usize = 20;

/// How a model's process is started and reached.
#[derive(Clone, Debug)]
pub struct Definition {
    /// Model.
    pub id: ModelId,
    /// From the registry.
    pub launch: registry::Launch,
    /// Limits of connections to it.
    pub limits: Limits,
}

/// An order to the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// End in order.
    Stop,
    /// Be killed.
    Kill,
}

/// What a process's task tells the house.
#[derive(Debug)]
pub enum Report {
    /// Loading gets on.
    Progress,
    /// Requests may be sent here.
    Ready(SharedPool, String),
    /// Reaped, or never spawned.
    Exited(Arc<Failure>),
}

/// One process as the rest of the proxy sees it.
#[derive(Debug)]
pub struct Process {
    /// Which.
    pub instance: Instance,
    /// Whose.
    pub model: ModelId,
    /// Since when.
    pub spawned: Instant,
    /// Its pid, once spawned (a foreign command's own, not its supervisor's).
    pub pid: OnceLock<u32>,
    /// Its address, once ready: pool, and path prefix (empty or `/...` without a trailing slash).
    pub upstream: OnceLock<(SharedPool, String)>,
    /// Last heartbeat of a worker of ours.
    pub heartbeat: Mutex<Option<Heartbeat>>,
    /// Effective limits that a worker of ours has announced.
    pub announced: OnceLock<serde_json::Map<String, serde_json::Value>>,
    orders: mpsc::Sender<Order>,
    end: watch::Sender<bool>,
}

impl Process {
    /// A process to be, and the receiving end of its orders.
    #[must_use]
    pub fn new(model: ModelId, instance: Instance) -> (Arc<Self>, mpsc::Receiver<Order>) {
        let (orders, receiver) = mpsc::channel(4);
        let process = Self {
            instance,
            model,
            spawned: Instant::now(),
            pid: OnceLock::new(),
            upstream: OnceLock::new(),
            heartbeat: Mutex::new(None),
            announced: OnceLock::new(),
            orders,
            end: watch::Sender::new(false),
        };
        (Arc::new(process), receiver)
    }

    /// Waits until the process is gone, at most `limit`; whether it is.
    pub async fn ended(&self, limit: Duration) -> bool {
        let mut end = self.end.subscribe();
        tokio::time::timeout(limit, end.wait_for(|ended| *ended))
            .await
            .is_ok()
    }

    /// Takes over the limits of its model as it is defined now: they may have changed since the start.
    pub fn retune(&self, now: Option<&Arc<Definition>>) {
        if let (Some((pool, _)), Some(now)) = (self.upstream.get(), now) {
            pool.set_limits(now.limits);
        }
    }

    /// Passes an order on. (At most one stop and one kill are ever given: the channel holds them.)
    pub fn order(&self, order: Order) {
        let _ = self.orders.try_send(order);
    }
}

/// Runs one process from spawn to reaping; reports along the way. `Report::Exited` is the last one.
pub async fn run(
    process: Arc<Process>,
    definition: Arc<Definition>,
    orders: mpsc::Receiver<Order>,
    logs: Logs,
    report: impl Fn(Report) + Send + Sync,
) {
    let cause = match &definition.launch {
        registry::Launch::Worker(launch) => {
            native::run(&process, launch, &definition, orders, &logs, &report).await
        }
        registry::Launch::Command(launch) => {
            foreign::run(&process, launch, &definition, orders, &logs, &report).await
        }
    };
    let message = cause.unwrap_or_else(|e| e);
    process.end.send_replace(true);
    report(Report::Exited(Arc::new(Failure {
        message,
        log_tail: logs.tail(&process.model, TAIL_LINES),
    })));
}

/// A spawned child with its control socket; its output goes to the logs.
struct Spawned {
    child: Child,
    control: UnixStream,
    output: Vec<JoinHandle<()>>,
}

/// Spawns `command` in a process group of its own, with a socket as standard input.
///
/// Must be called on the main thread, which lives as long as the proxy: Linux's parent-death signal fires when the
/// *thread* that spawned the child ends.
fn spawn(mut command: Command, model: &ModelId, logs: &Logs) -> Result<Spawned, String> {
    let program = command.as_std().get_program().to_string_lossy().into_owned();
    let sockets = std::os::unix::net::UnixStream::pair().and_then(|(ours, theirs)| {
        ours.set_nonblocking(true)?;
        Ok((UnixStream::from_std(ours)?, OwnedFd::from(theirs)))
    });
    let (control, theirs) = sockets.map_err(|e| format!("cannot make a control socket: {e}"))?;
    command
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0);
    let mut child = command
        .spawn()
        .map_err(|e| format!("cannot start '{program}': {e}"))?;
    let mut output = Vec::new();
    if let Some(pipe) = child.stdout.take() {
        output.push(tokio::spawn(copy_lines(pipe, model.clone(), logs.clone())));
    }
    if let Some(pipe) = child.stderr.take() {
        output.push(tokio::spawn(copy_lines(pipe, model.clone(), logs.clone())));
    }
    Ok(Spawned {
        child,
        control,
        output,
    })
}

/// Copies a process's output to the logs, line by line, long lines in pieces.
async fn copy_lines(pipe: impl AsyncRead + Unpin, model: ModelId, logs: Logs) {
    let mut reader = BufReader::new(pipe);
    let mut line = Vec::new();
    loop {
        let Ok(available) = reader.fill_buf().await else {
            return;
        };
        if available.is_empty() {
            if !line.is_empty() {
                logs.push(Source::Model(model), &line);
            }
            return;
        }
        let end = memchr::memchr(b'\n', available);
        let used = end
            .map_or(available.len(), |i| i + 1)
            .min(MAX_LINE.saturating_sub(line.len()).max(1));
        line.extend_from_slice(available.get(..used).unwrap_or_default());
        reader.consume(used);
        if line.ends_with(b"\n") || line.len() >= MAX_LINE {
            logs.push(Source::Model(model.clone()), &line);
            line.clear();
        }
    }
}

/// Waits for what the process wrote last. A grandchild may hold the pipes open for ever, so not for long.
async fn drain_output(output: Vec<JoinHandle<()>>) {
    let deadline = tokio::time::Instant::now() + Duration::from_millis(200);
    for task in output {
        let abort = task.abort_handle();
        if tokio::time::timeout_at(deadline, task).await.is_err() {
            abort.abort();
        }
    }
}

/// Signals a child and its group.
fn signal_group(child: &Child, signal: Signal) {
    // Not reaped yet, or `id` were `None`: the number still means this process.
    if let Some(pid) = child.id().and_then(|p| i32::try_from(p).ok()) {
        let _ = killpg(Pid::from_raw(pid), signal);
    }
}

fn describe(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {}", signal_name(signal)),
        _ => status.to_string(),
    }
}

fn signal_name(number: i32) -> String {
    Signal::try_from(number).map_or_else(|_| number.to_string(), |s| s.as_str().to_owned())
}

/// This program, to be started again in another role.
fn own_program() -> PathBuf {
    // The link still works when the file has been replaced by a newer version.
    let link = PathBuf::from("/proc/self/exe");
    if link.exists() {
        link
    } else {
        std::env::current_exe().unwrap_or_else(|_| "swapd".into())
    }
}

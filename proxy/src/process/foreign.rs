//! A foreign command (`cmd:`), under a supervisor, polled until it answers.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::Request;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::Command;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::{
    Definition, Order, Process, Report, Spawned, describe, drain_output, own_program, signal_group, spawn,
    supervise,
};
use crate::logs::{Logs, Source};
use crate::upstream::{Address, Limits, Pool};

/// Time between two looks at whether the command answers.
const POLL: Duration = Duration::from_millis(40);
/// Longest wait for one answer to the health check.
const POLL_ANSWER: Duration = Duration::from_secs(5);
/// Longest wait for a stranger on the command's address to accept a connection.
const STRANGER_ANSWER: Duration = Duration::from_secs(1);
/// What a killed command gets before its supervisor is killed too.
const SUPERVISOR_GRACE: Duration = Duration::from_secs(2);

pub(super) async fn run(
    process: &Arc<Process>,
    launch: &registry::CommandLaunch,
    definition: &Definition,
    mut orders: mpsc::Receiver<Order>,
    logs: &Logs,
    report: &(impl Fn(Report) + Send + Sync),
) -> Result<String, String> {
    let address = Address::parse(&launch.proxy).map_err(|why| format!("proxy address {why}"))?;
    let Address { host, port, .. } = &address;
    // A stranger on the port would answer the health check in the command's place.
    if let Some(given) = launch.port {
        if let Err(e) = TcpListener::bind(("127.0.0.1", given)).await {
            return Err(format!("port {given} is not free for this model's command: {e}"));
        }
        // The address that is asked may be another one of this machine (`localhost`, `[::1]`).
        if given == *port && accepts(host, *port, STRANGER_ANSWER).await {
            return Err(format!(
                "port {port} is not free for this model's command: somebody listens on {host}"
            ));
        }
    }
    let mut command = Command::new(own_program());
    command
        .arg(supervise::ROLE)
        .args(&launch.argv)
        .envs(launch.env.iter().map(|(k, v)| (k, v)));
    let spawned = spawn(command, &process.model, logs)?;
    let (mut child, output) = (spawned.child, spawned.output);
    let (read, mut write) = spawned.control.into_split();
    let mut lines = BufReader::new(read).lines();
    let mut listening = true;
    let mut ended = None;
    let pool = Pool::far(&address, definition.limits);
    let mut health = std::pin::pin!(until_healthy(launch, &address, definition.limits));
    let mut ready = false;
    let mut stopper: Option<Spawned> = None;
    let mut kill_supervisor = std::pin::pin!(tokio::time::sleep(Duration::MAX));
    let status = loop {
        tokio::select! {
            status = child.wait() => break status,
            () = &mut health, if !ready && process.pid.get().is_some() => {
                ready = true;
                report(Report::Ready(pool.clone(), address.prefix.clone()));
            }
            line = lines.next_line(), if listening => match line {
                Ok(Some(line)) => match line.split_once(' ') {
                    Some(("pid", pid)) => {
                        if let Ok(pid) = pid.parse() {
                            let _ = process.pid.set(pid);
                        }
                    }
                    Some(("ended", how)) => ended = Some(how.to_owned()),
                    _ => {}
                },
                Ok(None) | Err(_) => listening = false,
            },
            Some(order) = orders.recv() => {
                let word = match (order, &launch.cmd_stop, process.pid.get()) {
                    (Order::Stop, Some(argv), Some(pid)) => {
                        stopper = run_stop_command(argv, *pid, launch, process, logs);
                        continue;
                    }
                    (Order::Stop, ..) => "stop\n",
                    (Order::Kill, ..) => {
                        if let Some(stopper) = &stopper {
                            signal_group(&stopper.child, Signal::SIGKILL);
                        }
                        kill_supervisor.as_mut().reset(tokio::time::Instant::now() + SUPERVISOR_GRACE);
                        "kill\n"
                    }
                };
                if write.write_all(word.as_bytes()).await.is_err() {
                    let _ = child.start_kill();
                }
            }
            () = &mut kill_supervisor => {
                let _ = child.start_kill();
                kill_supervisor.as_mut().reset(tokio::time::Instant::now() + SUPERVISOR_GRACE);
            }
        }
    };
    while let Ok(Ok(Some(line))) = timeout(Duration::from_millis(20), lines.next_line()).await {
        if let Some(("ended", how)) = line.split_once(' ') {
            ended = Some(how.to_owned());
        }
    }
    if ended.is_none()
        && let Some(pid) = process.pid.get().and_then(|p| i32::try_from(*p).ok())
    {
        // The supervisor was killed, and the kernel takes only the command itself along: the rest of its group goes too.
        let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
    }
    if let Some(mut stopper) = stopper {
        // It may have more to do than to end the command, and has what is left of the grace for it. The order to kill
        // comes at its end, if it has not come already.
        loop {
            tokio::select! {
                _ = stopper.child.wait() => break,
                Some(order) = orders.recv() => if order == Order::Kill {
                    let note = "cmdStop goes on without its command; killed".as_bytes();
                    logs.push(Source::Model(process.model.clone()), note);
                    signal_group(&stopper.child, Signal::SIGKILL);
                },
            }
        }
        drain_output(stopper.output).await;
    }
    drain_output(output).await;
    let how = ended.unwrap_or_else(|| status.map_or_else(|e| e.to_string(), describe));
    Ok(if ready {
        format!("command ended with {how}")
    } else {
        format!("command ended with {how} before it was ready")
    })
}

/// Runs `cmdStop`, with `${PID}` filled in. How it ends does not matter: the grace and the kill come anyway.
fn run_stop_command(
    argv: &[String],
    pid: u32,
    launch: &registry::CommandLaunch,
    process: &Process,
    logs: &Logs,
) -> Option<Spawned> {
    let mut argv = argv.iter().map(|a| a.replace("${PID}", &pid.to_string()));
    let mut command = Command::new(argv.next()?);
    command.args(argv).envs(launch.env.iter().map(|(k, v)| (k, v)));
    spawn(command, &process.model, logs)
        .map_err(|e| {
            let note = format!("cmdStop: {e}");
            logs.push(Source::Model(process.model.clone()), note.as_bytes());
        })
        .ok()
}

/// Whether somebody accepts connections there.
async fn accepts(host: &str, port: u16, limit: Duration) -> bool {
    let connected = timeout(limit, TcpStream::connect((host, port))).await;
    // On a port that nobody listens on, a connection may come to meet itself.
    connected.is_ok_and(|c| c.is_ok_and(|s| s.local_addr().ok() != s.peer_addr().ok()))
}

/// Returns when the command answers its health check with 200; without a check, when it accepts connections.
async fn until_healthy(launch: &registry::CommandLaunch, address: &Address, limits: Limits) {
    let Some(endpoint) = &launch.check_endpoint else {
        while !accepts(&address.host, address.port, POLL_ANSWER).await {
            tokio::time::sleep(POLL).await;
        }
        return;
    };
    let limits = Limits {
        connect: Some(POLL_ANSWER),
        response_header: Some(POLL_ANSWER),
        ..limits
    };
    let path = format!("{}/{}", address.prefix, endpoint.trim_start_matches('/'));
    loop {
        // A new connection each time: nothing of a half-started server is kept.
        let pool = Pool::far(address, limits);
        let request = Request::get(&path).header(http::header::HOST, &address.authority);
        let Ok(request) = request.body(Bytes::new()) else {
            return std::future::pending().await;
        };
        if let Ok(response) = pool.send(&request, &|_| ()).await
            && response.status() == http::StatusCode::OK
        {
            return;
        }
        tokio::time::sleep(POLL).await;
    }
}

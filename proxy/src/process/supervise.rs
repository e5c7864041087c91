//! `swapd __supervise COMMAND...`: stands between the proxy and a foreign command.
//!
//! It is the command's parent, in a process of its own, because only then can the end of the proxy be answered
//! whatever killed it: its standard input is a socket to the proxy, and its end of file means that the proxy is gone.
//! Lines in: `stop`, `kill`. Lines out: `pid N`, `ended HOW`. It ends when nothing of the command is left, so that
//! the proxy's wait for this process is a wait for all of it: on Linux it is the reaper of whatever the command
//! leaves behind, even of processes that made a session of their own.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::wait::{WaitStatus, wait};
use nix::unistd::{Pid, getppid};

/// First argument that starts this program as a supervisor.
pub const ROLE: &str = "__supervise";
/// First argument that starts this program as the command to be, one step before it becomes the command.
pub const EXEC_ROLE: &str = "__exec";
/// Time between asking and killing when the proxy is gone, or the command has left processes behind.
const GRACE: Duration = Duration::from_millis(1000);
/// Time between two rounds of killing: a process may be born, or become this one's child, while the others die.
const AGAIN: Duration = Duration::from_millis(50);

/// What the watching thread is told, or has read.
enum Word {
    Stop,
    Kill,
    ProxyGone,
    CommandGone,
}

/// Runs `argv` and stays until nothing of it is left.
#[must_use]
pub fn supervise(argv: &[String]) -> ExitCode {
    #[cfg(target_os = "linux")]
    let _ = nix::sys::prctl::set_child_subreaper(true);
    let socket = std::io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .map(UnixStream::from);
    let Ok(mut socket) = socket else {
        return ExitCode::from(2);
    };
    let mut command = Command::new(super::own_program());
    command
        .arg(EXEC_ROLE)
        .arg(std::process::id().to_string())
        .args(argv)
        .stdin(Stdio::null())
        .process_group(0);
    let child = match command.spawn() {
        Ok(child) => child,
        Err(e) => {
            let _ = writeln!(socket, "ended failure to start: {e}");
            return ExitCode::from(1);
        }
    };
    let Ok(pid) = i32::try_from(child.id()).map(Pid::from_raw) else {
        return ExitCode::from(2);
    };
    let _ = writeln!(socket, "pid {pid}");
    let (words, heard) = sync_channel(8);
    if let Ok(reading) = socket.try_clone() {
        let words = words.clone();
        std::thread::spawn(move || read_orders(reading, &words));
    }
    std::thread::spawn(move || {
        // `None`: nothing is to happen by itself.
        let mut kill_after: Option<Duration> = None;
        loop {
            let word = match kill_after {
                None => heard.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(time) => heard.recv_timeout(time),
            };
            match word {
                Ok(Word::Stop) => signal_all(pid, Signal::SIGTERM),
                Ok(Word::ProxyGone | Word::CommandGone) if kill_after != Some(AGAIN) => {
                    signal_all(pid, Signal::SIGTERM);
                    kill_after = Some(kill_after.unwrap_or(GRACE));
                }
                Ok(_) | Err(RecvTimeoutError::Timeout) => {
                    signal_all(pid, Signal::SIGKILL);
                    kill_after = Some(AGAIN);
                }
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    });
    loop {
        let how = match wait() {
            Ok(WaitStatus::Exited(who, code)) if who == pid => format!("exit code {code}"),
            Ok(WaitStatus::Signaled(who, signal, _)) if who == pid => format!("signal {signal}"),
            Err(Errno::ECHILD) => break,
            _ => continue,
        };
        let _ = writeln!(socket, "ended {how}");
        let _ = words.send(Word::CommandGone);
    }
    // Without a reaper's role (macOS) strays of the group are nobody's children here.
    let _ = killpg(pid, Signal::SIGKILL);
    ExitCode::SUCCESS
}

fn read_orders(socket: UnixStream, words: &SyncSender<Word>) {
    for line in BufReader::new(socket).lines() {
        let word = match line.as_deref() {
            Ok("stop") => Word::Stop,
            Ok("kill") => Word::Kill,
            Ok(_) => continue,
            Err(_) => break,
        };
        if words.send(word).is_err() {
            return;
        }
    }
    let _ = words.send(Word::ProxyGone);
}

/// Signals the command's group and every child of this process, adopted ones included.
fn signal_all(group: Pid, signal: Signal) {
    let _ = killpg(group, signal);
    for child in adopted() {
        if child != group {
            let _ = kill(child, signal);
        }
    }
}

/// Children of this process, by Linux's own list; empty elsewhere.
fn adopted() -> Vec<Pid> {
    let Ok(tasks) = std::fs::read_dir("/proc/self/task") else {
        return Vec::new();
    };
    let lists = tasks
        .flatten()
        .filter_map(|t| std::fs::read_to_string(t.path().join("children")).ok());
    lists
        .flat_map(|l| {
            l.split_whitespace()
                .filter_map(|p| p.parse().ok())
                .map(Pid::from_raw)
                .collect::<Vec<_>>()
        })
        .collect()
}

/// Becomes `argv`, after asking Linux for a kill should the supervisor be killed.
#[must_use]
pub fn exec(supervisor: &str, argv: &[String]) -> ExitCode {
    #[cfg(target_os = "linux")]
    let _ = nix::sys::prctl::set_pdeathsig(Signal::SIGKILL);
    if getppid().to_string() != supervisor {
        return ExitCode::from(1);
    }
    let [program, args @ ..] = argv else {
        return ExitCode::from(2);
    };
    let error = Command::new(program).args(args).exec();
    let _ = writeln!(std::io::stderr(), "cannot start '{program}': {error}");
    ExitCode::from(127)
}

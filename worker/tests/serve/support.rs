//! The program as a child, and what tests say to it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use api_types::control::{CONTROL_ENV, CONTROL_STDIN, ProxyCommand, WorkerEvent, to_line};
use serde_json::{Value, json};

pub(crate) fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo/model")
}

pub(crate) fn program(model: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mlxworker"));
    command
        .arg("serve")
        .arg(model)
        .args(arguments)
        .env_remove(CONTROL_ENV)
        .env_remove("RUST_LOG");
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    command
}

/// A worker that dies with the test.
pub(crate) struct Worker {
    pub(crate) child: Child,
    pub(crate) socket: Option<BufReader<UnixStream>>,
    /// What has been heard of its start: phase, done, total.
    pub(crate) progress: Vec<(String, u64, u64)>,
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Worker {
    /// Under control, as swapd starts it.
    pub(crate) fn supervised(model: &Path, arguments: &[&str]) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let child = program(model, arguments)
            .env(CONTROL_ENV, CONTROL_STDIN)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .spawn()
            .unwrap();
        Self {
            child,
            socket: Some(BufReader::new(ours)),
            progress: Vec::new(),
        }
    }

    pub(crate) fn event(&mut self) -> Option<WorkerEvent> {
        let mut line = String::new();
        let n = self.socket.as_mut().unwrap().read_line(&mut line).unwrap();
        (n > 0).then(|| serde_json::from_str(&line).unwrap())
    }

    /// Skips what comes before the announcement.
    pub(crate) fn ready(&mut self) -> (u16, Value) {
        loop {
            match self.event().expect("the worker is gone before it was ready") {
                WorkerEvent::Ready {
                    port,
                    pid,
                    model,
                    limits,
                } => {
                    assert_eq!(pid, self.child.id());
                    return (port, json!({"model": model, "limits": limits}));
                }
                WorkerEvent::Loading { phase, done, total } => {
                    let phases = ["weights", "pages", "warm-up", "warm-prompts"];
                    assert!(phases.contains(&phase.as_str()) && done <= total && total > 0);
                    self.progress.push((phase, done, total));
                }
                other => panic!("{other:?}"),
            }
        }
    }

    pub(crate) fn command(&mut self, command: ProxyCommand) {
        let socket = self.socket.as_mut().unwrap().get_mut();
        socket.write_all(to_line(&command).unwrap().as_bytes()).unwrap();
    }

    pub(crate) fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        nix::sys::signal::kill(pid, signal).unwrap();
    }

    /// Waits for the end, at most that long.
    pub(crate) fn ended_within(&mut self, limit: Duration) -> ExitStatus {
        let (sender, receiver) = std::sync::mpsc::channel();
        let stderr = self.child.stderr.take().unwrap();
        // The pipe closes with the process.
        std::thread::spawn(move || {
            let _ = sender.send(std::io::read_to_string(stderr));
        });
        receiver
            .recv_timeout(limit)
            .expect("the worker has not ended in time")
            .unwrap();
        self.child.wait().unwrap()
    }
}

/// Sends a request; gives status and body once the whole answer is here, and what was cut off as it is.
pub(crate) fn ask(port: u16, path: &str, body: &Value) -> (u16, String) {
    let mut stream = send(port, path, body);
    let mut text = String::new();
    let _ = stream.read_to_string(&mut text);
    let status = text
        .split(' ')
        .nth(1)
        .unwrap_or_else(|| panic!("{text:?}"))
        .parse()
        .unwrap();
    (status, text)
}

pub(crate) fn send(port: u16, path: &str, body: &Value) -> TcpStream {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let body = body.to_string();
    let method = if body == "null" { "GET" } else { "POST" };
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    stream
}

pub(crate) fn chat(max_tokens: usize) -> Value {
    json!({"messages": [{"role": "user", "content": "hello"}], "max_tokens": max_tokens, "temperature": 0,
           "ignore_eos": true, "stream": true, "model": "whatever the registry calls it"})
}

/// Copies the demo model, lets `break_it` do its work, and gives exit code and message.
pub(crate) fn start_broken(arguments: &[&str], break_it: impl FnOnce(&Path)) -> (Option<i32>, String) {
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(demo()).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    break_it(folder.path());
    let mut worker = Worker::supervised(folder.path(), arguments);
    let mut fatal = None;
    while let Some(event) = worker.event() {
        match event {
            WorkerEvent::Fatal { message } => fatal = Some(message),
            WorkerEvent::Loading { .. } => {}
            other => panic!("announced, though broken: {other:?}"),
        }
    }
    let mut stderr = String::new();
    worker
        .child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut stderr)
        .unwrap();
    let code = worker.child.wait().unwrap().code();
    let fatal = fatal.unwrap_or_else(|| panic!("no fatal event; stderr: {stderr}"));
    assert!(
        stderr.contains(&fatal),
        "told to proxy and terminal alike: {stderr}"
    );
    (code, fatal)
}

//! A real swapd with fake model servers behind it, and a client that shows how a reply really ended.
#![allow(
    dead_code,
    missing_docs,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::disallowed_methods
)]

pub mod secure;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// The fake model server, built by `cargo test` with the other examples.
pub fn fakeworker() -> PathBuf {
    let swapd = PathBuf::from(env!("CARGO_BIN_EXE_swapd"));
    let path = swapd.parent().unwrap().join("examples/fakeworker");
    assert!(
        path.is_file(),
        "build it first: cargo build -p swapd --example fakeworker"
    );
    path
}

pub struct Swapd {
    pub child: Child,
    pub address: String,
    pub dir: TempDir,
    pub config: PathBuf,
}

impl Drop for Swapd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Calls `check` until it returns something; fails after `limit`.
pub fn eventually<T>(what: &str, limit: Duration, mut check: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + limit;
    loop {
        if let Some(found) = check() {
            return found;
        }
        assert!(Instant::now() < end, "not within {limit:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Whether a process with this id exists and is not a zombie.
pub fn alive(pid: u32) -> bool {
    match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => !stat.rsplit(')').next().unwrap().trim_start().starts_with('Z'),
        Err(_) => false,
    }
}

pub fn signal(pid: u32, signal: nix::sys::signal::Signal) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid.try_into().unwrap()), signal).unwrap();
}

/// A directory of a test with this registry in it.
fn written(config: &str) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.yaml");
    // Tests run side by side, each with a range of ports of its own.
    static NEXT_PORT: AtomicU16 = AtomicU16::new(0);
    let offset =
        NEXT_PORT.fetch_add(10, Ordering::Relaxed) + u16::try_from(std::process::id() % 100).unwrap() * 100;
    let ports = if config.contains("startPort") {
        String::new()
    } else {
        format!("startPort: {}\n", 20_000 + offset % 10_000)
    };
    let text = ports + &expand(config, &dir);
    std::fs::write(&path, text).unwrap();
    (dir, path)
}

fn command(config: &Path, listen: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_swapd"));
    command
        .arg("--config")
        .arg(config)
        .args(["--listen", listen])
        .env("SWAPD_WORKER", fakeworker())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit());
    command
}

impl Swapd {
    /// Starts swapd with this registry. `FAKE` stands for the fake server's path, `DIR` for the test's directory.
    pub fn start(config: &str) -> Self {
        Self::start_with(config, &[])
    }

    pub fn start_with(config: &str, args: &[&str]) -> Self {
        Self::start_env(config, args, &[])
    }

    pub fn start_env(config: &str, args: &[&str], env: &[(&str, &str)]) -> Self {
        let (dir, path) = written(config);
        let mut child = command(&path, "127.0.0.1:0")
            .args(args)
            .envs(env.iter().copied())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let address = loop {
            let line = lines.next().expect("swapd ended before it listened").unwrap();
            if let Some((_, address)) = line.split_once("listening on http") {
                break address.split_once("://").unwrap().1.to_owned();
            }
        };
        // Read on, or the pipe fills up.
        std::thread::spawn(move || lines.for_each(drop));
        Self {
            child,
            address,
            dir,
            config: path,
        }
    }

    /// Starts one that may say nothing of where it listens; and what it says until its end.
    pub fn start_silent(config: &str) -> (Self, JoinHandle<String>) {
        let (dir, path) = written(config);
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = free.local_addr().unwrap().to_string();
        drop(free);
        let mut child = command(&path, &address).spawn().unwrap();
        let mut stdout = child.stdout.take().unwrap();
        let out = std::thread::spawn(move || {
            let mut out = String::new();
            stdout.read_to_string(&mut out).unwrap();
            out
        });
        eventually("it listens", Duration::from_secs(5), || {
            TcpStream::connect(&address).ok()
        });
        let swapd = Self {
            child,
            address,
            dir,
            config: path,
        };
        (swapd, out)
    }

    pub fn journal(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("journal")).unwrap_or_default()
    }

    /// Journal lines with this event: time in ms, pid.
    pub fn journalled(&self, event: &str) -> Vec<(u128, u32)> {
        let journal = self.journal();
        let lines = journal.lines().map(|l| l.split(' ').collect::<Vec<_>>());
        lines
            .filter(|l| l[2..].join(" ") == event)
            .map(|l| (l[0].parse().unwrap(), l[1].parse().unwrap()))
            .collect()
    }

    pub fn open(&self, method: &str, path: &str, headers: &str, body: &str) -> Reply {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let length = if body.is_empty() {
            String::new()
        } else {
            format!("Content-Length: {}\r\n", body.len())
        };
        let head = format!("{method} {path} HTTP/1.1\r\nHost: test\r\n{length}{headers}\r\n");
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(body.as_bytes()).unwrap();
        Reply::read_head(stream)
    }

    pub fn get(&self, path: &str) -> Answer {
        self.open("GET", path, "", "").finish()
    }

    pub fn post(&self, path: &str, body: &str) -> Answer {
        self.open("POST", path, "Content-Type: application/json\r\n", body)
            .finish()
    }

    /// A chat request with these further members of the body (`"key":value,...`, may be empty).
    pub fn chat(&self, model: &str, more: &str) -> Answer {
        self.post("/v1/chat/completions", &chat_body(model, more))
    }

    pub fn chat_open(&self, model: &str, more: &str) -> Reply {
        self.open("POST", "/v1/chat/completions", "", &chat_body(model, more))
    }

    pub fn running(&self) -> Vec<Value> {
        self.get("/running").json()["running"].as_array().unwrap().clone()
    }

    pub fn state(&self, model: &str) -> String {
        let running = self.running();
        let row = running.iter().find(|r| r["model"] == model);
        row.map_or("stopped".to_owned(), |r| r["state"].as_str().unwrap().to_owned())
    }

    pub fn rewrite(&self, config: &str) {
        let new = self.dir.path().join("config.new");
        std::fs::write(&new, expand(config, &self.dir)).unwrap();
        std::fs::rename(new, &self.config).unwrap();
    }

    /// Waits for the exit of swapd; its code.
    pub fn exit_code(&mut self, limit: Duration) -> Option<i32> {
        let child = &mut self.child;
        eventually("swapd ends", limit, || child.try_wait().unwrap()).code()
    }
}

pub fn expand(config: &str, dir: &TempDir) -> String {
    let journal = dir.path().join("journal").to_str().unwrap().to_owned();
    config
        .replace("JOURNAL", &format!("FAKE_JOURNAL={journal}"))
        .replace("FAKESERVER", fakeworker().to_str().unwrap())
        .replace("DIR", dir.path().to_str().unwrap())
}

pub fn chat_body(model: &str, more: &str) -> String {
    let comma = if more.is_empty() { "" } else { "," };
    format!(r#"{{"model":"{model}","messages":[]{comma}{more}}}"#)
}

/// A reply whose body has not been read.
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub reader: BufReader<TcpStream>,
}

/// A reply read to its end.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: String,
    /// The body ended as HTTP says that it must: all bytes of its length, or the last chunk.
    pub complete: bool,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e} in {self:?}"))
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(n, _)| n == name)
            .map(|(_, v)| v.as_str())
    }

    /// The message of an OpenAI error envelope; fails if it is none.
    pub fn error(&self) -> (String, String) {
        assert_eq!(self.header("content-type"), Some("application/json"), "{self:?}");
        let error = self.json()["error"].clone();
        let object = error
            .as_object()
            .unwrap_or_else(|| panic!("no envelope: {self:?}"));
        assert!(
            ["message", "type", "param", "code"]
                .iter()
                .all(|k| object.contains_key(*k)),
            "{self:?}"
        );
        (
            error["message"].as_str().unwrap().to_owned(),
            error["code"].as_str().unwrap_or("").to_owned(),
        )
    }
}

impl Reply {
    fn read_head(stream: TcpStream) -> Self {
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        let status = line
            .split(' ')
            .nth(1)
            .unwrap_or_else(|| panic!("no status line: {line:?}"))
            .parse()
            .unwrap();
        let mut headers = Vec::new();
        loop {
            line.clear();
            reader.read_line(&mut line).unwrap();
            let Some((name, value)) = line.trim_end().split_once(':') else {
                break;
            };
            headers.push((name.to_lowercase(), value.trim().to_owned()));
        }
        Self {
            status,
            headers,
            reader,
        }
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(n, _)| n == name)
            .map(|(_, v)| v.as_str())
    }

    /// The next chunk of a chunked body: `None` at its end mark.
    pub fn chunk(&mut self) -> std::io::Result<Option<String>> {
        let mut size = String::new();
        if self.reader.read_line(&mut size)? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        let size = usize::from_str_radix(size.trim(), 16).map_err(|_| std::io::ErrorKind::InvalidData)?;
        let mut data = vec![0; size + 2];
        self.reader.read_exact(&mut data)?;
        data.truncate(size);
        Ok((size > 0).then(|| String::from_utf8(data).unwrap()))
    }

    pub fn finish(mut self) -> Answer {
        let mut body = String::new();
        let complete = if self.header("transfer-encoding") == Some("chunked") {
            loop {
                match self.chunk() {
                    Ok(Some(chunk)) => body.push_str(&chunk),
                    Ok(None) => break true,
                    Err(_) => break false,
                }
            }
        } else if let Some(length) = self.header("content-length").map(|l| l.parse::<u64>().unwrap()) {
            let read = (&mut self.reader)
                .take(length)
                .read_to_string(&mut body)
                .unwrap_or(0);
            read as u64 == length
        } else {
            true
        };
        Answer {
            status: self.status,
            headers: self.headers,
            body,
            complete,
        }
    }
}

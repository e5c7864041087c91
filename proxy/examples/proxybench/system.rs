//! The programs under measurement, and what the system says of them.

use std::io::{BufRead, BufReader};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::wire::Client;

pub struct Killed(pub Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Ports that nobody listens on now.
pub fn free_ports<const N: usize>() -> [u16; N] {
    let held = [(); N].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    held.map(|l| l.local_addr().unwrap().port())
}

pub fn me() -> PathBuf {
    std::env::current_exe().unwrap()
}

pub struct Swapd {
    child: Killed,
    pub pid: u32,
    pub port: u16,
    /// From spawning it to an answer.
    pub start: Duration,
}

impl Swapd {
    pub fn start(config: &Path) -> Self {
        let program = me().parent().unwrap().parent().unwrap().join("swapd");
        let [port] = free_ports();
        let mut command = Command::new(program);
        command
            .args(["--config", config.to_str().unwrap()])
            .args(["--listen", &format!("127.0.0.1:{port}")])
            .env("SWAPD_WORKER", me())
            .stdout(Stdio::piped());
        let begun = Instant::now();
        let mut child = Killed(command.spawn().expect("swapd is built beside the benchmark"));
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(begun.elapsed() < Duration::from_secs(10), "swapd does not listen");
            std::thread::sleep(Duration::from_micros(200));
        }
        Client::new(port).ask(b"GET /health HTTP/1.1\r\nHost: bench\r\n\r\n", false);
        let start = begun.elapsed();
        let lines = BufReader::new(child.0.stdout.take().unwrap()).lines();
        std::thread::spawn(move || lines.for_each(drop));
        Self {
            pid: child.0.id(),
            child,
            port,
            start,
        }
    }

    pub fn is_running(&mut self) -> bool {
        self.child.0.try_wait().unwrap().is_none()
    }
}

pub fn relay(port: u16, to: u16) -> Killed {
    let mut command = Command::new(me());
    command.args(["relay", &port.to_string(), &to.to_string()]);
    let child = Killed(command.spawn().unwrap());
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        std::thread::sleep(Duration::from_millis(1));
    }
    child
}

/// CPU time of a process so far: in nanoseconds where the kernel tells, else in hundredths of a second.
pub fn cpu(pid: u32) -> Duration {
    if let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) {
        let times = tasks.flatten().filter_map(|t| {
            let text = std::fs::read_to_string(t.path().join("schedstat")).ok()?;
            text.split(' ').next()?.parse::<u64>().ok()
        });
        return Duration::from_nanos(times.sum());
    }
    let out = Command::new("ps")
        .args(["-o", "time=", "-p", &pid.to_string()])
        .output()
        .unwrap();
    let text = String::from_utf8(out.stdout).unwrap();
    let seconds = text
        .trim()
        .split(':')
        .fold(0.0, |s, part| s * 60.0 + part.parse::<f64>().unwrap());
    Duration::from_secs_f64(seconds)
}

pub fn rss_mb(pid: u32) -> f64 {
    hostmem::process(pid).unwrap().resident_bytes as f64 / 1e6
}

/// Most resident memory while `work` runs, beyond what was resident before, in MB. Watched from outside where the
/// system keeps no peak that can be reset.
pub fn growth_mb(pid: u32, work: impl FnOnce()) -> f64 {
    let before = rss_mb(pid);
    let done = std::sync::atomic::AtomicBool::new(false);
    let kept = std::fs::write(format!("/proc/{pid}/clear_refs"), "5").is_ok();
    let peak = std::thread::scope(|scope| {
        let watching = scope.spawn(|| {
            let mut peak = before;
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                peak = peak.max(rss_mb(pid));
                std::thread::sleep(Duration::from_millis(2));
            }
            peak
        });
        work();
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        watching.join().unwrap()
    });
    let told = std::fs::read_to_string(format!("/proc/{pid}/status"))
        .ok()
        .filter(|_| kept);
    let told = told.and_then(|s| {
        let line = s.lines().find(|l| l.starts_with("VmHWM"))?.to_owned();
        line.split_whitespace().nth(1)?.parse::<f64>().ok()
    });
    (told.map_or(peak, |kib| kib * 1024.0 / 1e6) - before).max(0.0)
}

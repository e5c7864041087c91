//! What the proxy costs: rounds of direct and proxied requests, interleaved, against the fake model server.
//!
//! `cargo build --release -p swapd --bins --examples && target/release/examples/proxybench [ROUNDS]`
//!
//! Prints one line per measurement: added latency of one request at a time, added time to the first byte of a stream,
//! throughput at concurrency 8 and 64, CPU time per 10,000 requests, CPU per forwarded event, memory idle and after.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::disallowed_methods,
    clippy::print_stdout
)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A keep-alive connection that sends the same request again and again.
struct Client {
    stream: TcpStream,
    request: Vec<u8>,
    buffer: Vec<u8>,
}

impl Client {
    fn new(port: u16, body: &str) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.set_nodelay(true).unwrap();
        let head = "POST /v1/chat/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n";
        let request = format!("{head}Content-Length: {}\r\n\r\n{body}", body.len()).into_bytes();
        Self {
            stream,
            request,
            buffer: vec![0; 1 << 16],
        }
    }

    /// One request; time to the first and to the last byte.
    fn ask(&mut self) -> (Duration, Duration) {
        let begun = Instant::now();
        self.stream.write_all(&self.request).unwrap();
        let mut got = self.stream.read(&mut self.buffer).unwrap();
        let first = begun.elapsed();
        loop {
            let text = &self.buffer[..got];
            if let Some(head) = text.windows(4).position(|w| w == b"\r\n\r\n") {
                let headers = String::from_utf8_lossy(&text[..head]).to_lowercase();
                let complete = match headers.split("content-length: ").nth(1) {
                    Some(rest) => {
                        let length: usize = rest.split("\r\n").next().unwrap().parse().unwrap();
                        got >= head + 4 + length
                    }
                    None => text.ends_with(b"0\r\n\r\n"),
                };
                if complete {
                    return (first, begun.elapsed());
                }
            }
            if got == self.buffer.len() {
                // Only the end matters of a long stream.
                self.buffer.copy_within(got - 16.., 1024);
                let head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
                self.buffer[..head.len()].copy_from_slice(head);
                self.buffer[head.len()..1024].fill(b' ');
                got = 1040;
            }
            let n = self.stream.read(&mut self.buffer[got..]).unwrap();
            assert!(n > 0, "closed in the middle of a reply");
            got += n;
        }
    }
}

fn percentile(times: &mut [Duration], p: f64) -> f64 {
    times.sort_unstable();
    times[((times.len() - 1) as f64 * p) as usize].as_secs_f64() * 1e6
}

/// CPU time of a process so far.
fn cpu(pid: u32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    Duration::from_millis(ticks * 10)
}

fn rss_mb(pid: u32) -> f64 {
    hostmem::process(pid).unwrap().resident_bytes as f64 / f64::from(1 << 20)
}

/// Most memory that it has had so far.
fn peak_mb(pid: u32) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|l| l.starts_with("VmHWM")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() / 1024.0
}

fn throughput(port: u16, body: &str, clients: usize, time: Duration) -> f64 {
    let total: usize = std::thread::scope(|scope| {
        let work = || {
            let mut client = Client::new(port, body);
            let (end, mut n) = (Instant::now() + time, 0);
            while Instant::now() < end {
                client.ask();
                n += 1;
            }
            n
        };
        let threads: Vec<_> = (0..clients).map(|_| scope.spawn(work)).collect();
        threads.into_iter().map(|t| t.join().unwrap()).sum()
    });
    total as f64 / time.as_secs_f64()
}

fn main() {
    let rounds: usize = std::env::args().nth(1).map_or(10, |n| n.parse().unwrap());
    let here = std::env::current_exe().unwrap();
    let fake = here.parent().unwrap().join("fakeworker");
    let program = here.parent().unwrap().parent().unwrap().join("swapd");
    let dir = std::env::temp_dir().join(format!("proxybench-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let config = dir.join("config.yaml");
    let text = format!(
        "startPort: 28100\nmodels: {{m: {{cmd: '{} --port ${{PORT}}'}}}}\n",
        fake.display()
    );
    std::fs::write(&config, text).unwrap();
    let begun = Instant::now();
    let mut command = Command::new(program);
    command
        .args(["--config", config.to_str().unwrap(), "--listen", "127.0.0.1:0"])
        .stdout(Stdio::piped());
    let mut swapd = Killed(command.spawn().unwrap());
    let mut lines = BufReader::new(swapd.0.stdout.take().unwrap()).lines();
    let port: u16 = loop {
        let line = lines.next().unwrap().unwrap();
        if let Some((_, address)) = line.split_once("listening on http://127.0.0.1:") {
            break address.trim().parse().unwrap();
        }
    };
    println!(
        "accepting after start            {:8.1} ms",
        begun.elapsed().as_secs_f64() * 1e3
    );
    std::thread::spawn(move || lines.for_each(drop));
    let pid = swapd.0.id();
    std::thread::sleep(Duration::from_millis(300));
    println!("memory idle                      {:8.1} MiB", rss_mb(pid));
    let small = r#"{"model":"m","messages":[{"role":"user","content":"hi"}]}"#;
    Client::new(port, small).ask();
    let direct_port = 28100;

    let (mut direct, mut proxied) = (Client::new(direct_port, small), Client::new(port, small));
    let (mut straight, mut through) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        straight.extend((0..300).map(|_| direct.ask().1));
        through.extend((0..300).map(|_| proxied.ask().1));
    }
    for (name, p) in [("p50", 0.5), ("p99", 0.99)] {
        let (d, t) = (percentile(&mut straight, p), percentile(&mut through, p));
        println!(
            "latency {name}: direct, proxied, added {d:8.0} {t:8.0} {:8.0} us",
            t - d
        );
    }

    let before = cpu(pid);
    for _ in 0..10_000 {
        proxied.ask();
    }
    println!(
        "CPU per 10,000 small requests    {:8.2} s",
        (cpu(pid) - before).as_secs_f64()
    );
    println!("memory after them                {:8.1} MiB", rss_mb(pid));

    let stream = r#"{"model":"m","stream":true,"events":20}"#;
    let (mut direct, mut proxied) = (Client::new(direct_port, stream), Client::new(port, stream));
    let (mut straight, mut through) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        straight.extend((0..100).map(|_| direct.ask().0));
        through.extend((0..100).map(|_| proxied.ask().0));
    }
    let (d, t) = (percentile(&mut straight, 0.99), percentile(&mut through, 0.99));
    println!(
        "first byte p99: direct, proxied, added {d:8.0} {t:8.0} {:8.0} us",
        t - d
    );

    let paced = r#"{"model":"m","stream":true,"events":2000,"gap_ms":1}"#;
    let before = cpu(pid);
    std::thread::scope(|scope| {
        for _ in 0..20 {
            scope.spawn(|| Client::new(port, paced).ask());
        }
    });
    let per_event = (cpu(pid) - before).as_secs_f64() * 1e6 / 40_000.0;
    println!("CPU per forwarded event (paced)  {per_event:8.2} us");
    let burst = r#"{"model":"m","stream":true,"events":200000}"#;
    let before = cpu(pid);
    Client::new(port, burst).ask();
    let per_event = (cpu(pid) - before).as_secs_f64() * 1e6 / 200_000.0;
    println!("CPU per forwarded event (burst)  {per_event:8.2} us");

    for clients in [8, 64] {
        let time = Duration::from_secs(2);
        let (mut d, mut t) = (0.0, 0.0);
        for _ in 0..2 {
            d += throughput(direct_port, small, clients, time) / 2.0;
            t += throughput(port, small, clients, time) / 2.0;
        }
        println!(
            "throughput at {clients:2}: direct, proxied  {d:8.0} {t:8.0} /s ({:.0} %)",
            t / d * 100.0
        );
    }
    let before = rss_mb(pid);
    Client::new(
        port,
        r#"{"model":"m","stream":true,"events":40000,"event_bytes":1000}"#,
    )
    .ask();
    println!(
        "peak growth for a 40 MB stream   {:8.1} MiB",
        (peak_mb(pid) - before).max(0.0)
    );
    let big = format!(r#"{{"model":"m","x":"{}"}}"#, "y".repeat(20 << 20));
    Client::new(port, &big).ask();
    println!(
        "peak growth for a 20 MiB body    {:8.1} MiB",
        peak_mb(pid) - before
    );
    drop(swapd);
    let _ = std::fs::remove_dir_all(dir);
}

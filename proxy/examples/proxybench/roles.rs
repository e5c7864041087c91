//! The other end: a model server that costs next to nothing, and a bare relay of bytes for comparison.

use std::io::Write;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use api_types::control::{CONTROL_ENV, Heartbeat, WorkerEvent, to_line};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::wire::{DONE, event, requests, runtime, streams};

/// Time that the server takes to get ready, in milliseconds.
pub const START_ENV: &str = "BENCH_START_MS";

/// Serves at `port`; as a worker of swapd's own kind wherever it likes.
pub fn upstream(port: u16) {
    let start = std::env::var(START_ENV).map_or(0, |ms| ms.parse().unwrap());
    std::thread::sleep(Duration::from_millis(start));
    runtime().block_on(async {
        let listener = TcpListener::bind(("127.0.0.1", port)).await.unwrap();
        let ready = Instant::now();
        if std::env::var_os(CONTROL_ENV).is_some() {
            announce(listener.local_addr().unwrap().port());
        }
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            stream.set_nodelay(true).unwrap();
            tokio::spawn(serve(stream, ready));
        }
    });
}

fn announce(port: u16) {
    let socket = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    let mut socket = std::os::unix::net::UnixStream::from(socket);
    let ready = WorkerEvent::Ready {
        port,
        pid: std::process::id(),
        model: "bench".into(),
        limits: serde_json::Map::new(),
    };
    socket.write_all(to_line(&ready).unwrap().as_bytes()).unwrap();
    std::thread::spawn(move || {
        let beat = to_line(&WorkerEvent::Heartbeat(Heartbeat::default())).unwrap();
        while socket.write_all(beat.as_bytes()).is_ok() {
            std::thread::sleep(Duration::from_secs(1));
        }
        std::process::exit(0);
    });
}

/// The number behind `"key":` in a body.
fn number(body: &[u8], key: &str) -> u64 {
    let Some(at) = memchr::memmem::find(body, key.as_bytes()) else {
        return 0;
    };
    let digits = body[at + key.len()..].iter().take_while(|b| b.is_ascii_digit());
    digits.fold(0, |n, d| n * 10 + u64::from(d - b'0'))
}

async fn serve(mut stream: TcpStream, ready: Instant) -> Option<()> {
    let mut buffer = vec![0; 64 * 1024];
    let mut received = Vec::new();
    let answer = |body: &str| {
        let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: ";
        format!("{head}{}\r\n\r\n{body}", body.len()).into_bytes()
    };
    let small = answer(
        r#"{"id":"x","object":"chat.completion","choices":[{"index":0,"message":{"role":"assistant","content":"hello"},"finish_reason":"stop"}],"usage":{"prompt_tokens":7,"completion_tokens":1,"total_tokens":8}}"#,
    );
    let mut used = false;
    loop {
        received.clear();
        let (head, length) = loop {
            let n = stream.read(&mut buffer).await.ok().filter(|n| *n > 0)?;
            received.extend_from_slice(&buffer[..n]);
            if let Some(end) = memchr::memmem::find(&received, b"\r\n\r\n") {
                let head = &received[..end];
                let length = number(head, "content-length: ").max(number(head, "Content-Length: "));
                break (end + 4, usize::try_from(length).unwrap());
            }
        };
        let begin = received[..received.len().min(head + 4096)].to_vec();
        let mut left = (head + length).saturating_sub(received.len());
        while left > 0 {
            left -= stream.read(&mut buffer).await.ok().filter(|n| *n > 0)?;
        }
        let body = &begin[head..];
        if begin.starts_with(b"GET") {
            stream.write_all(&answer("{}")).await.ok()?;
        } else if memchr::memmem::find(body, b"\"stream\":true").is_some() {
            events(&mut stream, body).await?;
        } else if memchr::memmem::find(body, b"\"since_ready\"").is_some() && !used {
            used = true;
            let since = ready.elapsed().as_micros();
            stream.write_all(&answer(&since.to_string())).await.ok()?;
        } else {
            stream.write_all(&small).await.ok()?;
        }
    }
}

async fn events(stream: &mut TcpStream, body: &[u8]) -> Option<()> {
    let [seed, events, bytes, gap] =
        ["\"seed\":", "\"events\":", "\"bytes\":", "\"gap_us\":"].map(|key| number(body, key));
    let mut out =
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n".to_vec();
    let mut pace = tokio::time::interval(Duration::from_micros(gap.max(1)));
    for i in 0..events {
        if gap > 0 && i > 0 {
            pace.tick().await;
        }
        let text = event(seed, i, usize::try_from(bytes).unwrap());
        out.extend_from_slice(format!("{:x}\r\n", text.len()).as_bytes());
        out.extend_from_slice(&text);
        out.extend_from_slice(b"\r\n");
        // Each event is a write of its own, as servers do it.
        stream.write_all(&out).await.ok()?;
        out.clear();
    }
    out.extend_from_slice(format!("{:x}\r\n", DONE.len()).as_bytes());
    out.extend_from_slice(DONE);
    out.extend_from_slice(b"\r\n0\r\n\r\n");
    stream.write_all(&out).await.ok()
}

/// Passes bytes on and knows nothing of HTTP: what any proxy in a process of its own costs at the least.
pub fn relay(port: u16, to: u16) {
    runtime().block_on(async {
        let listener = TcpListener::bind(("127.0.0.1", port)).await.unwrap();
        loop {
            let (mut client, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let mut server = TcpStream::connect(("127.0.0.1", to)).await.unwrap();
                client.set_nodelay(true).unwrap();
                server.set_nodelay(true).unwrap();
                let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
            });
        }
    });
}

/// Load for a profiler: `requests` sends this many small ones over each connection; `paced` asks for streams of this
/// many events, a thousand a second, and `burst` for such streams as fast as they come.
pub fn load(what: &str, port: u16, clients: u64, times: u64) {
    match what {
        "requests" => requests(port, clients, times),
        "paced" => assert_eq!(streams(port, clients, times, 60, 1000), 0),
        "burst" => assert_eq!(streams(port, clients, times, 60, 0), 0),
        _ => panic!("requests, paced or burst, not {what}"),
    }
}

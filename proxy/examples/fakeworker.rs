//! A model server that does what it is told: the upstream of the black-box tests and of the benchmark.
//!
//! As a worker (`MLXWORKER_CONTROL=stdin`, arguments `serve ... -- MODEL`) it speaks the control socket; as a foreign
//! command (`--port N`) it only serves. With `--api-key=K` it wants that key with every request. What it does is set by the environment or, per request, by the JSON body.
//!
//! Environment: `FAKE_START_MS` delay before it is ready; `FAKE_IGNORE_TERM=1` neither SIGTERM nor a stop order ends it;
//! `FAKE_FAIL=text` writes the text to stderr and exits 3 instead of getting ready; `FAKE_JOURNAL=file` one line per
//! event (start, ready, stop, gone, late, disconnect); `FAKE_FORK=1` leaves a child that ignores SIGTERM in a session of its own;
//! `FAKE_HTTP10=1` answers as HTTP/1.0, ended by closing;
//! `FAKE_MODELS=file` answers `GET /v1/models` with the names in the file, one a line; `FAKE_REFUSE=status` answers
//! every POST with this status;
//! `FAKE_CHATTER=n` lines on stderr at the start.
//!
//! Body: `{"stream":true,"events":n,"gap_ms":t,"die_after":k}` streams n events, dies after k; `{"delay_ms":t}` answers
//! late; `{"die":true}` dies before any reply; `{"echo":true}` (or a header `X-Echo`) answers with what it received; `{"bytes":n}` answers
//! n bytes; `{"stream":true,"say":[...]}` streams these objects and the end mark; `{"note":true}` puts the body into the
//! journal; `{"last_words":text}` writes the text to stderr first; `{"plain":true}` never streams; `{"status":n,"error":...}` is answered with this error. `/v1/embeddings` answers with two numbers for each text. A client that goes away in the middle is noted in the journal.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::disallowed_methods,
    clippy::panic,
    clippy::zombie_processes,
    clippy::indexing_slicing
)]

use std::convert::Infallible;
use std::io::Write;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use api_types::control::{Heartbeat, WorkerEvent, to_line};
use bytes::Bytes;
use http::{Request, Response};
use http_body::{Body, Frame};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::Sleep;

fn env(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|v| !v.is_empty())
}

fn journal(line: &str) {
    if let Some(path) = env("FAKE_JOURNAL") {
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap()
            .as_millis();
        // The test may be over, and its directory gone.
        if let Ok(mut file) = std::fs::OpenOptions::new().create(true).append(true).open(path) {
            let _ = file.write_all(format!("{now} {} {line}\n", std::process::id()).as_bytes());
        }
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().is_some_and(|a| a == "linger") {
        let mut term = signal(SignalKind::terminate()).unwrap();
        loop {
            term.recv().await;
        }
    }
    journal("start");
    for i in 0..env("FAKE_CHATTER").map_or(0, |n| n.parse().unwrap()) {
        eprintln!("chatter {i}");
    }
    if env("FAKE_FORK").is_some() {
        let mut child = std::process::Command::new("setsid");
        child.arg(std::env::current_exe().unwrap()).arg("linger");
        let child = child.spawn().unwrap();
        journal(&format!("child {}", child.id()));
    }
    if let Some(ms) = env("FAKE_START_MS") {
        tokio::time::sleep(Duration::from_millis(ms.parse().unwrap())).await;
    }
    if let Some(text) = env("FAKE_FAIL") {
        eprintln!("{text}");
        std::process::exit(3);
    }
    let port = args
        .iter()
        .position(|a| a == "--port")
        .map_or(0, |i| args[i + 1].parse().unwrap());
    let listener = TcpListener::bind(("127.0.0.1", port)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let stubborn = env("FAKE_IGNORE_TERM").is_some();
    tokio::spawn(async move {
        let mut term = signal(SignalKind::terminate()).unwrap();
        loop {
            term.recv().await;
            journal("term");
            if !stubborn {
                std::process::exit(0);
            }
        }
    });
    if env("MLXWORKER_CONTROL").is_some() {
        use std::os::fd::AsFd;
        let fd = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
        let socket = std::os::unix::net::UnixStream::from(fd);
        socket.set_nonblocking(true).unwrap();
        let socket = UnixStream::from_std(socket).unwrap();
        tokio::spawn(control(socket, port, stubborn));
    }
    journal("ready");
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        stream.set_nodelay(true).unwrap();
        if env("FAKE_HTTP10").is_some() {
            tokio::spawn(until_close(stream));
            continue;
        }
        tokio::spawn(
            http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service_fn(answer))
                .with_upgrades(),
        );
    }
}

async fn control(socket: UnixStream, port: u16, stubborn: bool) {
    let (read, mut write) = socket.into_split();
    let limits = json!({"max_num_seqs": 4}).as_object().unwrap().clone();
    let ready = WorkerEvent::Ready {
        port,
        pid: std::process::id(),
        model: "fake".into(),
        limits,
    };
    write
        .write_all(to_line(&ready).unwrap().as_bytes())
        .await
        .unwrap();
    let mut lines = BufReader::new(read).lines();
    let mut beat = tokio::time::interval(Duration::from_secs(1));
    let mut steps = 0;
    loop {
        tokio::select! {
            _ = beat.tick() => {
                steps += 1;
                let event = WorkerEvent::Heartbeat(Heartbeat { steps, kv_used_bytes: 7, kv_cached_bytes: 9, ..Heartbeat::default() });
                let _ = write.write_all(to_line(&event).unwrap().as_bytes()).await;
            }
            line = lines.next_line() => match line {
                Ok(Some(line)) if line.contains("stop") => {
                    journal("stop");
                    if !stubborn {
                        std::process::exit(0);
                    }
                }
                Ok(Some(_)) => {}
                _ => {
                    journal("gone");
                    std::process::exit(0);
                }
            },
        }
    }
}

/// As Python's http.server does it: neither length nor chunks, the end of the connection ends the reply.
async fn until_close(mut stream: tokio::net::TcpStream) {
    let mut request = Vec::new();
    let body = loop {
        let mut piece = [0; 4096];
        let n = tokio::io::AsyncReadExt::read(&mut stream, &mut piece)
            .await
            .unwrap();
        request.extend_from_slice(&piece[..n]);
        let text = String::from_utf8_lossy(&request).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n")
            && (head.starts_with("GET") || serde_json::from_str::<Value>(body).is_ok())
        {
            break body.to_owned();
        }
        if n == 0 {
            return;
        }
    };
    let ask: Value = serde_json::from_str(&body).unwrap_or(Value::Null);
    stream
        .write_all(b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        .await
        .unwrap();
    for n in 0..ask["events"].as_u64().unwrap_or(0) {
        if ask["die_after"] == n {
            die();
        }
        stream
            .write_all(format!("data: {n}\n\n").as_bytes())
            .await
            .unwrap();
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

fn die() -> ! {
    journal("die");
    nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::Signal::SIGKILL).unwrap();
    loop {
        std::thread::park();
    }
}

/// Notes a client that went away before the answer was complete.
struct Watch {
    complete: bool,
}

impl Drop for Watch {
    fn drop(&mut self) {
        if !self.complete {
            journal("disconnect");
        }
    }
}

/// Any upgrade is granted (but for one of `/hang`, which is never answered), and every byte comes back.
fn upgrade(mut request: Request<Incoming>) -> Response<Stream> {
    let granted = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let (mut read, mut write) = tokio::io::split(TokioIo::new(granted.await.unwrap()));
        let _ = tokio::io::copy(&mut read, &mut write).await;
        journal("upgrade ended");
    });
    let mut response = Response::new(Stream::text(""));
    *response.status_mut() = http::StatusCode::SWITCHING_PROTOCOLS;
    response
        .headers_mut()
        .insert("connection", "upgrade".parse().unwrap());
    response
        .headers_mut()
        .insert("upgrade", request.headers()["upgrade"].clone());
    response
}

/// As the real worker: a key that it was started with has to be shown, by the first of these headers that is there.
fn has_key(headers: &http::HeaderMap) -> bool {
    let Some(key) = std::env::args().find_map(|a| Some(a.strip_prefix("--api-key=")?.to_owned())) else {
        return true;
    };
    match (headers.get("x-api-key"), headers.get("authorization")) {
        (Some(given), _) => *given == key,
        (None, Some(given)) => *given == format!("Bearer {key}"),
        (None, None) => false,
    }
}

async fn answer(request: Request<Incoming>) -> Result<Response<Stream>, Infallible> {
    if !has_key(request.headers()) {
        let mut response = Response::new(Stream::text("no key"));
        *response.status_mut() = http::StatusCode::UNAUTHORIZED;
        return Ok(response);
    }
    if request.headers().contains_key("upgrade") {
        if request.uri().path() == "/hang" {
            let _watch = Watch { complete: false };
            journal("asked to upgrade");
            std::future::pending::<()>().await;
        }
        return Ok(upgrade(request));
    }
    let (parts, body) = request.into_parts();
    let Ok(body) = body.collect().await else {
        return Ok(Response::new(Stream::text("broken")));
    };
    let body = body.to_bytes();
    if parts.uri.path().ends_with("/v1/models")
        && let Some(path) = env("FAKE_MODELS")
    {
        let names = std::fs::read_to_string(path).unwrap_or_default();
        let rows: Vec<Value> = names.lines().map(|id| json!({"id": id})).collect();
        let list = json!({"object": "list", "data": rows});
        return Ok(Response::new(Stream::text(list.to_string())));
    }
    if let Some(status) = env("FAKE_REFUSE") {
        let mut response = Response::new(Stream::text("refused"));
        *response.status_mut() = status.parse().unwrap();
        return Ok(response);
    }
    if parts.method == http::Method::GET {
        return Ok(Response::new(Stream::text(parts.uri.to_string())));
    }
    let ask: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
    let number = |key: &str| ask[key].as_u64();
    if ask["note"] == true {
        journal(&format!("body {} {}", parts.uri, String::from_utf8_lossy(&body)));
    }
    if let Some(text) = ask["last_words"].as_str() {
        eprintln!("{text}");
    }
    let mut watch = Watch { complete: false };
    if ask["die"] == true {
        die();
    }
    if let Some(ms) = number("delay_ms") {
        journal("late");
        tokio::time::sleep(Duration::from_millis(ms)).await;
    }
    if let (Some(status), Some(error)) = (number("status"), ask.get("error")) {
        watch.complete = true;
        let mut response = Response::new(Stream::text(json!({ "error": error }).to_string()));
        *response.status_mut() = http::StatusCode::from_u16(u16::try_from(status).unwrap()).unwrap();
        return Ok(response);
    }
    let streams = ask["stream"] == true && ask["plain"] != true;
    if streams && ask["say"].is_array() {
        watch.complete = true;
        let events = ask["say"].as_array().unwrap();
        let mut text: String = events.iter().map(|e| format!("data: {e}\n\n")).collect();
        if ask["cut"] != true {
            text.push_str("data: [DONE]\n\n");
        }
        let mut response = Response::new(Stream::text(text));
        response
            .headers_mut()
            .insert("content-type", "text/event-stream".parse().unwrap());
        return Ok(response);
    }
    if streams {
        let stream = Stream {
            left: number("events").unwrap_or(3),
            sent: 0,
            gap: Duration::from_millis(number("gap_ms").unwrap_or(0)),
            die_after: number("die_after"),
            bytes: number("event_bytes").unwrap_or(0),
            sleep: None,
            whole: None,
            watch: Some(watch),
        };
        let mut response = Response::new(stream);
        response
            .headers_mut()
            .insert("content-type", "text/event-stream".parse().unwrap());
        return Ok(response);
    }
    watch.complete = true;
    if let Some(n) = number("bytes") {
        return Ok(Response::new(Stream::text(
            "x".repeat(usize::try_from(n).unwrap()),
        )));
    }
    let reply = if parts.uri.path() == "/v1/embeddings" && ask["echo"] != true {
        let texts = ask["input"].as_array().map_or(1, Vec::len);
        let rows: Vec<Value> = (0..texts)
            .map(|i| json!({"index": i, "embedding": [0.5, i]}))
            .collect();
        json!({"object": "list", "data": rows, "usage": {"prompt_tokens": texts, "total_tokens": texts}})
    } else if ask["echo"] == true || parts.headers.contains_key("x-echo") {
        let headers: Vec<Value> = parts
            .headers
            .iter()
            .map(|(k, v)| json!([k.as_str(), v.to_str().unwrap_or("")]))
            .collect();
        let received = String::from_utf8_lossy(&body).into_owned();
        json!({"method": parts.method.as_str(), "path": parts.uri.to_string(), "headers": headers, "body": received,
               "pid": std::process::id()})
    } else {
        json!({"id": "x", "object": "chat.completion", "model": ask["model"], "pid": std::process::id(),
               "choices": [{"index": 0, "message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}],
               "usage": {"prompt_tokens": 7, "completion_tokens": 1, "total_tokens": 8}})
    };
    let mut response = Response::new(Stream::text(reply.to_string()));
    response
        .headers_mut()
        .insert("content-type", "application/json".parse().unwrap());
    Ok(response)
}

/// Events at their pace, or one whole text.
struct Stream {
    left: u64,
    sent: u64,
    gap: Duration,
    die_after: Option<u64>,
    bytes: u64,
    sleep: Option<Pin<Box<Sleep>>>,
    whole: Option<Bytes>,
    watch: Option<Watch>,
}

impl Stream {
    fn text(text: impl Into<Bytes>) -> Self {
        let whole = Some(text.into());
        Self {
            left: 0,
            sent: 0,
            gap: Duration::ZERO,
            die_after: None,
            bytes: 0,
            sleep: None,
            whole,
            watch: None,
        }
    }
}

impl Body for Stream {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if let Some(whole) = self.whole.take() {
            return Poll::Ready(Some(Ok(Frame::data(whole))));
        }
        if let Some(sleep) = &mut self.sleep {
            std::task::ready!(sleep.as_mut().poll(cx));
            self.sleep = None;
        }
        if self.die_after == Some(self.sent) {
            die();
        }
        if self.left == 0 {
            if let Some(watch) = &mut self.watch {
                watch.complete = true;
            }
            return Poll::Ready(None);
        }
        self.left -= 1;
        self.sent += 1;
        if !self.gap.is_zero() {
            self.sleep = Some(Box::pin(tokio::time::sleep(self.gap)));
        }
        let event = if self.left == 0 {
            "data: [DONE]\n\n".to_owned()
        } else {
            let content = "x".repeat(usize::try_from(self.bytes).unwrap());
            let chunk = json!({"n": self.sent, "t": Instant::now().elapsed().as_nanos() as u64,
                               "choices": [{"delta": {"content": content}}]});
            format!("data: {chunk}\n\n")
        };
        Poll::Ready(Some(Ok(Frame::data(event.into()))))
    }

    fn is_end_stream(&self) -> bool {
        self.watch.is_none() && self.whole.as_ref().is_none_or(Bytes::is_empty)
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.whole.as_ref().map_or_else(Default::default, |w| {
            http_body::SizeHint::with_exact(w.len() as u64)
        })
    }
}

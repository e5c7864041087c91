//! Just enough HTTP/1.1 to be much cheaper than what is measured: raw sockets, one write and mostly one read a request.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// What an upstream sends as event number `i` of a stream.
pub fn event(seed: u64, i: u64, bytes: usize) -> Vec<u8> {
    let letter = b'a' + u8::try_from((seed * 31 + i) % 26).unwrap();
    let mut text = format!("data: {{\"i\":{i},\"choices\":[{{\"delta\":{{\"content\":\"").into_bytes();
    text.resize(text.len() + bytes, letter);
    text.extend_from_slice(b"\"}}]}\n\n");
    text
}

/// The last event of every stream.
pub const DONE: &[u8] = b"data: [DONE]\n\n";

/// Length and FNV-1a of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sum {
    pub bytes: u64,
    pub hash: u64,
}

impl Default for Sum {
    fn default() -> Self {
        Self {
            bytes: 0,
            hash: 0xcbf2_9ce4_8422_2325,
        }
    }
}

impl Sum {
    pub fn add(&mut self, data: &[u8]) {
        self.bytes += data.len() as u64;
        for byte in data {
            self.hash = (self.hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }

    /// Of a whole stream of these events.
    pub fn of_stream(seed: u64, events: u64, bytes: usize) -> Self {
        let mut sum = Self::default();
        (0..events).for_each(|i| sum.add(&event(seed, i, bytes)));
        sum.add(DONE);
        sum
    }
}

pub fn request(model: &str, more: &str) -> Vec<u8> {
    let body = format!(r#"{{"model":"{model}","messages":[{{"role":"user","content":"hi"}}]{more}}}"#);
    let head = "POST /v1/chat/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n";
    format!("{head}Content-Length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

pub fn stream(model: &str, seed: u64, events: u64, bytes: usize, gap_us: u64) -> Vec<u8> {
    let more = format!(r#","stream":true,"seed":{seed},"events":{events},"bytes":{bytes},"gap_us":{gap_us}"#);
    request(model, &more)
}

/// Reads one reply, piece by piece.
#[derive(Default)]
pub struct Reply {
    head: Vec<u8>,
    state: State,
    /// Of the body, if it is to be summed up.
    pub sum: Option<Sum>,
    /// The body, if it has a length.
    pub body: Vec<u8>,
}

#[derive(Default)]
enum State {
    #[default]
    Head,
    Length(usize),
    Size(usize),
    Data(usize),
    Lf(u8),
    Done,
}

impl Reply {
    /// Whether the reply is complete.
    pub fn feed(&mut self, mut data: &[u8]) -> bool {
        loop {
            if matches!(self.state, State::Done) {
                assert!(data.is_empty(), "more than the reply");
                return true;
            }
            if data.is_empty() {
                return false;
            }
            match &mut self.state {
                State::Done => unreachable!(),
                State::Head => {
                    let before = self.head.len();
                    self.head.extend_from_slice(data);
                    let Some(end) = memchr::memmem::find(&self.head, b"\r\n\r\n") else {
                        return false;
                    };
                    data = &data[end + 4 - before..];
                    self.head.truncate(end + 2);
                    assert!(
                        self.head.starts_with(b"HTTP/1.1 200"),
                        "{} {}",
                        String::from_utf8_lossy(&self.head),
                        String::from_utf8_lossy(data)
                    );
                    self.state = match memchr::memmem::find(&self.head, b"\r\ncontent-length: ") {
                        Some(at) => {
                            let digits = self.head[at + 18..].iter().take_while(|b| b.is_ascii_digit());
                            let n = digits.fold(0, |n, d| n * 10 + usize::from(d - b'0'));
                            if n == 0 { State::Done } else { State::Length(n) }
                        }
                        None => State::Size(0),
                    };
                }
                State::Length(left) => {
                    self.body.extend_from_slice(data);
                    *left -= data.len();
                    if *left == 0 {
                        self.state = State::Done;
                    }
                    data = &[];
                }
                State::Size(size) => {
                    match data[0] {
                        b'\r' => {}
                        b'\n' if *size > 0 => self.state = State::Data(*size),
                        b'\n' => self.state = State::Lf(1),
                        digit => *size = *size * 16 + char::from(digit).to_digit(16).unwrap() as usize,
                    }
                    data = &data[1..];
                }
                State::Data(left) => {
                    let (now, rest) = data.split_at(data.len().min(*left));
                    if let Some(sum) = &mut self.sum {
                        sum.add(now);
                    }
                    *left -= now.len();
                    if *left == 0 {
                        self.state = State::Lf(0);
                    }
                    data = rest;
                }
                State::Lf(last) => {
                    if data[0] == b'\n' {
                        self.state = if *last == 1 { State::Done } else { State::Size(0) };
                    }
                    data = &data[1..];
                }
            }
        }
    }
}

/// A connection for one request after the other.
pub struct Client {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Client {
    pub fn new(port: u16) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.set_nodelay(true).unwrap();
        Self {
            stream,
            buffer: vec![0; 1 << 16],
        }
    }

    /// Time to the first byte of the reply, and to the last.
    pub fn time(&mut self, request: &[u8]) -> (Duration, Duration) {
        let mut reply = Reply::default();
        let begun = Instant::now();
        self.stream.write_all(request).unwrap();
        let first = self.read(&mut reply, begun);
        (first, begun.elapsed())
    }

    pub fn ask(&mut self, request: &[u8], sum: bool) -> Reply {
        let mut reply = Reply {
            sum: sum.then(Sum::default),
            ..Reply::default()
        };
        self.stream.write_all(request).unwrap();
        self.read(&mut reply, Instant::now());
        reply
    }

    fn read(&mut self, reply: &mut Reply, begun: Instant) -> Duration {
        let mut first = None;
        loop {
            let n = self.stream.read(&mut self.buffer).unwrap();
            assert!(n > 0, "closed in the middle of a reply");
            let at = *first.get_or_insert_with(|| begun.elapsed());
            if reply.feed(&self.buffer[..n]) {
                return at;
            }
        }
    }
}

/// As [`Client::ask`], beside others on one thread.
pub async fn ask(stream: &mut tokio::net::TcpStream, request: &[u8], buffer: &mut [u8], sum: bool) -> Reply {
    let mut reply = Reply {
        sum: sum.then(Sum::default),
        ..Reply::default()
    };
    stream.write_all(request).await.unwrap();
    loop {
        let n = stream.read(buffer).await.unwrap();
        assert!(n > 0, "closed in the middle of a reply");
        if reply.feed(&buffer[..n]) {
            return reply;
        }
    }
}

/// Requests per second of `clients` connections, all on one thread.
pub fn throughput(port: u16, request: &[u8], clients: usize, time: Duration) -> f64 {
    let runtime = runtime();
    let total: u64 = runtime.block_on(async {
        let end = Instant::now() + time;
        let tasks: Vec<_> = (0..clients)
            .map(|_| {
                let request = request.to_vec();
                tokio::spawn(async move {
                    let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.unwrap();
                    stream.set_nodelay(true).unwrap();
                    let (mut n, mut buffer) = (0_u64, vec![0; 4096]);
                    while Instant::now() < end {
                        ask(&mut stream, &request, &mut buffer, false).await;
                        n += 1;
                    }
                    n
                })
            })
            .collect();
        let mut total = 0;
        for task in tasks {
            total += task.await.unwrap();
        }
        total
    });
    total as f64 / time.as_secs_f64()
}

/// This many small requests over each of `clients` connections.
pub fn requests(port: u16, clients: u64, each: u64) {
    runtime().block_on(async {
        let tasks: Vec<_> = (0..clients)
            .map(|_| {
                tokio::spawn(async move {
                    let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.unwrap();
                    stream.set_nodelay(true).unwrap();
                    let (request, mut buffer) = (request("m", ""), vec![0; 4096]);
                    for _ in 0..each {
                        ask(&mut stream, &request, &mut buffer, false).await;
                    }
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
    });
}

/// `clients` streams side by side; how many did not arrive as they were sent.
pub fn streams(port: u16, clients: u64, events: u64, bytes: usize, gap_us: u64) -> u64 {
    runtime().block_on(async {
        let tasks: Vec<_> = (0..clients)
            .map(|seed| {
                tokio::spawn(async move {
                    let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.unwrap();
                    stream.set_nodelay(true).unwrap();
                    let request = self::stream("m", seed, events, bytes, gap_us);
                    let reply = ask(&mut stream, &request, &mut vec![0; 16 * 1024], true).await;
                    reply.sum == Some(Sum::of_stream(seed, events, bytes))
                })
            })
            .collect();
        let mut lost = 0;
        for task in tasks {
            lost += u64::from(!task.await.unwrap_or(false));
        }
        lost
    })
}

pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

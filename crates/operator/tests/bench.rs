//! `mlx-bench` against a scripted server whose times and tokens are known. Time stands still but for the script's own
//! waits (tokio's paused clock), so that what is measured is exact.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use clap::Parser;
use operator::bench::client::Client;
use operator::bench::load::{self, Pace, Target};
use operator::bench::prompts::{self, Calibration};
use operator::bench::report::Latency;
use operator::bench::stats::Distribution;
use operator::bench::{self, BenchError, Options, Report};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::LocalSet;
use tokio::time::sleep;

/// First piece after this many milliseconds, each further one after so many more.
const FIRST: u64 = 70;
const NEXT: u64 = 20;

/// A server whose requests are answered as their model's name says.
struct Server {
    address: String,
    requests: Rc<RefCell<Vec<Value>>>,
}

impl Server {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let requests: Rc<RefCell<Vec<Value>>> = Rc::default();
        let seen = requests.clone();
        tokio::task::spawn_local(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                tokio::task::spawn_local(serve(stream, seen.clone()));
            }
        });
        Self { address, requests }
    }

    /// The requests under load, those that only count tokens left out.
    fn streamed(&self) -> Vec<Value> {
        let requests = self.requests.borrow();
        requests.iter().filter(|r| r["stream"] == true).cloned().collect()
    }
}

/// One connection; kept as long as the client does.
async fn serve(mut stream: TcpStream, seen: Rc<RefCell<Vec<Value>>>) {
    stream.set_nodelay(true).unwrap();
    let mut received = Vec::new();
    loop {
        let Some((head, body)) = request(&mut stream, &mut received).await else {
            return;
        };
        if head.starts_with("GET /v1/models ") {
            json_answer(&mut stream, 200, &json!({"data": [{"id": "steady"}]})).await;
            continue;
        }
        seen.borrow_mut().push(body.clone());
        if !answer(&mut stream, &body).await {
            return;
        }
    }
}

async fn request(stream: &mut TcpStream, received: &mut Vec<u8>) -> Option<(String, Value)> {
    loop {
        let text = String::from_utf8_lossy(received).into_owned();
        if let Some((head, rest)) = text.split_once("\r\n\r\n") {
            let length = head.lines().find_map(|l| l.strip_prefix("content-length: "));
            let length: usize = length.map_or(0, |l| l.parse().unwrap());
            if rest.len() >= length {
                received.drain(..head.len() + 4 + length);
                let body = serde_json::from_str(&rest[..length]).unwrap_or(Value::Null);
                return Some((head.to_owned(), body));
            }
        }
        if stream.read_buf(received).await.ok()? == 0 {
            return None;
        }
    }
}

async fn json_answer(stream: &mut TcpStream, status: u16, body: &Value) {
    let body = body.to_string();
    let length = body.len();
    let text = format!("HTTP/1.1 {status} X\r\ncontent-length: {length}\r\n\r\n{body}");
    stream.write_all(text.as_bytes()).await.unwrap();
}

/// Tokens of a prompt: 5, and 2 for each word.
fn prompt_tokens(body: &Value) -> usize {
    let text = match &body["messages"] {
        Value::Array(messages) => messages
            .iter()
            .map(|m| m["content"].as_str().unwrap())
            .collect::<Vec<_>>()
            .join(" "),
        _ => body["prompt"].as_str().unwrap().to_owned(),
    };
    5 + 2 * text.split_whitespace().count()
}

/// Whether the connection is kept.
async fn answer(stream: &mut TcpStream, body: &Value) -> bool {
    let model = body["model"].as_str().unwrap();
    if body["stream"] != true {
        if model == "strict" && body.get("ignore_eos").is_some() {
            json_answer(
                stream,
                400,
                &json!({"error": {"message": "unknown field ignore_eos"}}),
            )
            .await;
        } else {
            json_answer(
                stream,
                200,
                &json!({"usage": {"prompt_tokens": prompt_tokens(body)}}),
            )
            .await;
        }
        return true;
    }
    if model == "busy" {
        json_answer(stream, 503, &json!({"error": {"message": "come back later"}})).await;
        return true;
    }
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    let pieces = if model == "empty" {
        0
    } else {
        body["max_tokens"].as_u64().unwrap() / 2
    };
    let slow = if model == "slow" { 2 } else { 1 };
    for piece in 0..pieces {
        sleep(Duration::from_millis(
            slow * if piece == 0 { FIRST } else { NEXT },
        ))
        .await;
        match (model, piece) {
            ("cut", 3) => return false,
            ("failing", 3) => return event(stream, r#"{"error": {"message": "out of memory"}}"#).await,
            ("hanging", 3) => sleep(Duration::from_secs(3600)).await,
            ("garbage", 3) => return event(stream, "{").await,
            _ => {}
        }
        let text = format!("word{piece} ");
        let choice = if body.get("messages").is_some() {
            json!({"delta": {"content": text}})
        } else {
            json!({"text": text})
        };
        event(stream, &json!({"choices": [choice], "usage": null}).to_string()).await;
    }
    if model == "endless" {
        // The stream is over, but nobody said that the reply is.
        stream.write_all(b"0\r\n\r\n").await.unwrap();
        return true;
    }
    if model != "silent" {
        let cached = json!({"cached_tokens": 7});
        let usage = json!({"prompt_tokens": prompt_tokens(body), "completion_tokens": pieces * 2, "prompt_tokens_details": cached});
        event(stream, &json!({"choices": [], "usage": usage}).to_string()).await;
    }
    event(stream, "[DONE]").await;
    stream.write_all(b"0\r\n\r\n").await.unwrap();
    true
}

async fn event(stream: &mut TcpStream, data: &str) -> bool {
    let event = format!("data: {data}\n\n");
    let chunk = format!("{:x}\r\n{event}\r\n", event.len());
    stream.write_all(chunk.as_bytes()).await.unwrap();
    true
}

async fn measure(line: &[&str]) -> Result<Report, BenchError> {
    bench::run(&Options::try_parse_from(std::iter::once("mlx-bench").chain(line.iter().copied())).unwrap())
        .await
}

/// Runs with a server, on a clock that only moves while everybody waits for it.
fn scripted<F: Future<Output = ()>>(test: impl FnOnce(Server) -> F) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .unwrap();
    LocalSet::new().block_on(&runtime, async { test(Server::start().await).await });
}

#[track_caller]
fn times(found: Option<Latency>) -> Distribution {
    found.unwrap().times.unwrap()
}

#[track_caller]
fn near(found: f64, expected: f64) {
    assert!(
        (found - expected).abs() < 1e-6 * expected.abs().max(1.0) + 1.01,
        "{found}, not {expected}"
    );
}

#[test]
fn known_times_are_reported_as_they_are() {
    scripted(async |server| {
        // Two streams of 2 requests; each reply is 5 pieces of 2 tokens.
        let line = [
            server.address.as_str(),
            "--streams",
            "2",
            "--requests",
            "4",
            "--tokens",
            "10",
            "--prompt-tokens",
            "65",
        ];
        let report = measure(&line).await.unwrap();
        assert_eq!(report.exit_code(), 0);
        let found = &report.endpoints[0];
        assert_eq!(
            (found.model.as_str(), found.succeeded, found.failed),
            ("steady", 4, 0)
        );
        let (ttft, itl) = (times(found.ttft_ms), times(found.itl_ms));
        for value in [ttft.min, ttft.p50, ttft.p99, ttft.max] {
            near(value, 70.0);
        }
        assert_eq!(itl.count, 4 * 4);
        for value in [itl.min, itl.mean, itl.p99, itl.max] {
            near(value, 20.0);
        }
        near(times(found.duration_ms).p50, 150.0);
        // 80 ms for the 9 tokens after the first.
        let tpot = times(found.tpot_ms);
        assert_eq!(tpot.count, 4);
        assert!((tpot.p50 - 80.0 / 9.0).abs() < 0.3, "{tpot:?}");
        assert_eq!(found.completion_tokens.unwrap().mean, 10.0);
        assert_eq!(found.prompt_tokens.unwrap().mean, 65.0);
        assert_eq!(found.cached_tokens.unwrap().max, 7.0);
        // 40 tokens in two rows of 150 ms; while both write, 9 tokens of each in 80 ms.
        let close =
            |found: f64, expected: f64| assert!((found / expected - 1.0).abs() < 0.04, "{found} {expected}");
        close(found.tokens_per_second.unwrap().median, 40.0 / 0.3);
        close(found.full_tokens_per_second.unwrap().median, 18.0 / 0.08);
        close(found.requests_per_second.unwrap().median, 4.0 / 0.3);
        assert!(report.to_string().contains("first token, ms"));
    });
}

#[test]
fn endpoints_are_compared_round_by_round_with_the_same_prompts() {
    scripted(async |server| {
        let (fast, slow) = (
            format!("fast={}#steady", server.address),
            format!("slow={}#slow", server.address),
        );
        let line = [
            fast.as_str(),
            "--compare",
            slow.as_str(),
            "--rounds",
            "2",
            "--requests",
            "1",
            "--warmup",
            "0",
        ];
        let report = measure(&line).await.unwrap();
        let ratio = &report.ratios[0];
        assert_eq!(ratio.to, "slow");
        let close =
            |found: f64, expected: f64| assert!((found / expected - 1.0).abs() < 0.05, "{found} {expected}");
        close(ratio.ttft.unwrap().median, 0.5);
        close(ratio.tpot.unwrap().max, 0.5);
        close(ratio.tokens_per_second.unwrap().min, 2.0);
        close(ratio.full_tokens_per_second.unwrap().median, 2.0);
        let streamed = server.streamed();
        let order: Vec<_> = streamed.iter().map(|r| r["model"].as_str().unwrap()).collect();
        assert_eq!(order, ["steady", "slow", "slow", "steady"]);
        assert_eq!(streamed[0]["prompt"], streamed[1]["prompt"]);
        assert_eq!(streamed[2]["prompt"], streamed[3]["prompt"]);
        assert_ne!(streamed[0]["prompt"], streamed[2]["prompt"]);
        let json: Value = serde_json::from_str(&report.to_json()).unwrap();
        assert_eq!(json["endpoints"][1]["rounds"].as_array().unwrap().len(), 2);
        assert_eq!(json["ratios"][0]["to"], "slow");
    });
}

#[test]
fn every_failure_has_its_kind_and_does_not_count_as_success() {
    scripted(async |server| {
        // Whether it said something before.
        for (model, kind, spoke) in [
            ("busy", "http 503", false),
            ("cut", "broken off", true),
            ("endless", "broken off", true),
            ("failing", "stream error", true),
            ("garbage", "malformed", true),
            ("hanging", "timeout", true),
            ("empty", "empty", false),
        ] {
            let endpoint = format!("{}#{model}", server.address);
            let report = measure(&[&endpoint, "--requests", "2", "--warmup", "0", "--timeout", "5"])
                .await
                .unwrap();
            let found = &report.endpoints[0];
            assert_eq!((found.succeeded, found.failed), (0, 2), "{model}");
            assert_eq!(
                found.errors.keys().collect::<Vec<_>>(),
                [kind],
                "{model}: {:?}",
                found.errors
            );
            assert_eq!(found.tokens_per_second.unwrap().max, 0.0);
            // The first token counts, the rest does not; who never had one is told beside the percentiles.
            let ttft = found.ttft_ms.unwrap();
            assert_eq!(
                (ttft.times.map_or(0, |d| d.count), ttft.failed),
                if spoke { (2, 0) } else { (0, 2) },
                "{model}"
            );
            if let Some(times) = ttft.times {
                near(times.max, 70.0);
            }
            for latency in [found.tpot_ms, found.itl_ms, found.duration_ms] {
                let latency = latency.unwrap();
                assert_eq!((latency.times, latency.failed), (None, 2), "{model}");
            }
            let table = report.to_string();
            let row = table
                .lines()
                .find(|line| line.contains("last token, ms"))
                .unwrap();
            assert_eq!(
                row.split_whitespace().skip(3).collect::<Vec<_>>(),
                ["0", "2"],
                "{row}"
            );
            let json: Value = serde_json::from_str(&report.to_json()).unwrap();
            assert_eq!(json["endpoints"][0]["duration_ms"], json!({"failed": 2}));
            assert_eq!(report.exit_code(), bench::FAILED);
            assert!(report.to_string().contains(kind));
        }
    });
}

#[test]
fn a_server_that_counts_nothing_is_counted_by_pieces() {
    scripted(async |server| {
        let endpoint = format!("{}#silent", server.address);
        let report = measure(&[&endpoint, "--tokens", "10"]).await.unwrap();
        let found = &report.endpoints[0];
        assert_eq!(found.completion_tokens.unwrap().mean, 5.0);
        assert_eq!((found.prompt_tokens, found.cached_tokens), (None, None));
    });
}

#[test]
fn ignore_eos_is_sent_unless_refused_or_unwanted() {
    scripted(async |server| {
        for (model, more, sent) in [
            ("steady", None, true),
            ("strict", None, false),
            ("steady", Some("--allow-eos"), false),
        ] {
            let endpoint = format!("{}#{model}", server.address);
            server.requests.borrow_mut().clear();
            let line: Vec<&str> = std::iter::once(endpoint.as_str()).chain(more).collect();
            let report = measure(&line).await.unwrap();
            assert_eq!(
                (report.endpoints[0].ignore_eos_sent, report.exit_code()),
                (sent, 0)
            );
            let streamed = server.streamed();
            assert!(!streamed.is_empty() && streamed.iter().all(|r| r.get("ignore_eos").is_some() == sent));
        }
    });
}

#[test]
fn turns_and_repeats_are_told_apart() {
    scripted(async |server| {
        let line = [
            server.address.as_str(),
            "--api",
            "chat",
            "--turns",
            "2",
            "--repeats",
            "3",
            "--requests",
            "2",
            "--warmup",
            "0",
            "--shared-prefix",
            "0.5",
            "--body",
            r#"{"top_k": 3}"#,
        ];
        let report = measure(&line).await.unwrap();
        let found = &report.endpoints[0];
        assert_eq!(found.succeeded, 2 * 2 * 3);
        let counts = [found.ttft_ms, found.later_turn_ttft_ms, found.repeat_ttft_ms].map(|d| times(d).count);
        assert_eq!(counts, [2, 2, 8]);
        let streamed = server.streamed();
        assert!(streamed.iter().all(|r| r["top_k"] == 3));
        assert_eq!(streamed[0], streamed[2]);
        let messages = streamed[3]["messages"].as_array().unwrap();
        let roles: Vec<_> = messages.iter().map(|m| m["role"].as_str().unwrap()).collect();
        assert_eq!(roles, ["system", "user", "assistant", "user"]);
        assert!(
            messages[2]["content"]
                .as_str()
                .unwrap()
                .starts_with("word0 word1 ")
        );
        // The next conversation shares the system message alone.
        assert_eq!(streamed[6]["messages"][0], messages[0]);
        assert_ne!(streamed[6]["messages"][1], messages[1]);
    });
}

#[test]
fn a_rate_is_kept_however_slow_the_server() {
    scripted(async |server| {
        // A reply takes 150 ms, a new conversation comes every 50: three at the same time.
        let line = [
            server.address.as_str(),
            "--rate",
            "20",
            "--arrivals",
            "constant",
            "--requests",
            "10",
            "--tokens",
            "10",
            "--warmup",
            "0",
        ];
        let report = measure(&line).await.unwrap();
        let found = &report.endpoints[0];
        assert_eq!(found.succeeded, 10);
        let wall = found.rounds[0].wall;
        assert!((wall - (9.0 * 0.05 + 0.15)).abs() < 0.02, "{wall}");
        assert_eq!(found.full_tokens_per_second, None);
    });
}

#[test]
fn a_request_that_was_sent_late_waited_since_it_was_due() {
    scripted(async |server| {
        let line = ["mlx-bench", &server.address, "--tokens", "10", "--turns", "2"];
        let options = Options::try_parse_from(line).unwrap();
        let target = Rc::new(Target {
            client: Client::new(&options.endpoint, None, options.timeout),
            model: "steady".to_owned(),
            fields: serde_json::from_value(json!({"stream": true})).unwrap(),
            api: options.api,
            repeats: 1,
        });
        let conversations = prompts::conversations(&options, 1, 0, 3, &Calibration::default());
        // All three are due before the first can be sent, as on a machine that stood still for a moment.
        let pace = Pace::At([500, 100, 450].map(Duration::from_millis).to_vec());
        let round = load::round(&target, &pace, conversations).await;
        let mut found: Vec<(u128, usize, f64)> = round
            .records
            .iter()
            .map(|record| {
                let first = record.first.unwrap().as_secs_f64() * 1e3;
                assert_eq!(record.result.as_ref().unwrap().pieces[0], record.first.unwrap());
                (record.started.as_millis(), record.turn, first)
            })
            .collect();
        found.sort_by_key(|(due, turn, _)| (*turn, *due));
        let first_turns = [(100, 470.0), (450, 120.0), (500, 70.0)];
        for ((due, turn, first), (wanted_due, wanted)) in found.iter().zip(first_turns) {
            assert_eq!((*due, *turn), (wanted_due, 0));
            near(*first, wanted);
        }
        // What answers a reply is due when that has been read.
        for (_, turn, first) in &found[3..] {
            assert_eq!(*turn, 1);
            near(*first, 70.0);
        }
        assert_eq!(found.len(), 6);
    });
}

#[test]
fn an_endpoint_that_cannot_be_used_is_an_error() {
    scripted(async |_| {
        let closed = TcpListener::bind("127.0.0.1:0")
            .await
            .unwrap()
            .local_addr()
            .unwrap();
        let error = measure(&[&format!("gone=http://{closed}")])
            .await
            .unwrap_err()
            .to_string();
        assert!(error.starts_with("gone: cannot connect"), "{error}");
    });
}

/// The program itself: what it prints, and its exit codes.
#[test]
fn the_program_says_how_it_went_with_its_exit_code() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("report.json");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    LocalSet::new().block_on(&runtime, async {
        let server = Server::start().await;
        let busy = format!("{}#busy", server.address);
        let output = file.to_str().unwrap();
        for (line, code) in [
            (
                vec![
                    server.address.as_str(),
                    "--json",
                    "--requests",
                    "1",
                    "--output",
                    output,
                ],
                0,
            ),
            (vec![&busy], 1),
            (vec!["--nonsense"], 2),
            (vec!["http://127.0.0.1:1"], 3),
        ] {
            let line: Vec<String> = line.into_iter().map(str::to_owned).collect();
            // The server lives on this thread.
            let done = tokio::task::spawn_blocking(|| {
                std::process::Command::new(env!("CARGO_BIN_EXE_mlx-bench"))
                    .args(line)
                    .output()
                    .unwrap()
            });
            let done = done.await.unwrap();
            assert_eq!(done.status.code(), Some(code), "{done:?}");
            if code == 0 {
                let printed: Value = serde_json::from_slice(&done.stdout).unwrap();
                assert_eq!(printed["endpoints"][0]["succeeded"], 1);
                let written: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
                assert_eq!(printed, written);
            }
        }
    });
}

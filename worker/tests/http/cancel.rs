//! A client that goes away takes its request with it.

use std::time::Duration;

use futures_util::FutureExt as _;
use mlxworker::backend::GenerateRequest;
use mlxworker::backend::scripted::{Act, Ending, Plan, ScriptedBackend};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;

use super::support::*;

const LIMIT: Duration = Duration::from_millis(50);

fn cancelled(ending: &Ending) -> Instant {
    match ending {
        Ending::Cancelled(at) => *at,
        other => panic!("{other:?}"),
    }
}

/// The best of a few tries keeps the limit; a busy machine may miss it now and then.
fn assert_fast(delays: &[Duration]) {
    assert!(delays.iter().min().unwrap() <= &LIMIT, "{delays:?}");
    assert!(
        delays.iter().max().unwrap() <= &Duration::from_secs(2),
        "{delays:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_in_decode() {
    let server = start(|_| {
        let mut script = say("so far");
        script.push(Act::Hang);
        Ok(script)
    })
    .await;
    let mut delays = Vec::new();
    for n in 1..=5 {
        let mut open = server
            .open(
                "/v1/chat/completions",
                &with_message(json!({"stream": true, "n": 1})),
            )
            .await;
        open.first().await;
        let gone = Instant::now();
        open.disconnect();
        let endings = server.backend.endings(n).await;
        delays.push(cancelled(&endings[n - 1].1).saturating_duration_since(gone));
    }
    assert_fast(&delays);
    server.service.idle().await;
    let metrics = server.get("/metrics").await.text();
    assert!(
        metrics.contains("mlxworker_requests_total{route=\"chat\",outcome=\"cancelled\"} 5"),
        "{metrics}"
    );
}

/// Nothing has been answered yet: the handler itself is dropped. All choices go with it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn before_the_first_token_streamed_or_not() {
    let server = start(|_| Ok(vec![Act::Start(0), Act::Hang])).await;
    let mut delays = Vec::new();
    for round in 1..=4 {
        let body = with_message(json!({"stream": round % 2 == 0, "n": 2})).to_string();
        let mut socket = TcpStream::connect(server.address).await.unwrap();
        let head = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        socket.write_all(head.as_bytes()).await.unwrap();
        socket.write_all(body.as_bytes()).await.unwrap();
        while server.backend.requests().len() < 2 * round {
            tokio::task::yield_now().await;
        }
        let gone = Instant::now();
        drop(socket);
        let endings = server.backend.endings(2 * round).await;
        for (_, ending) in &endings[2 * (round - 1)..] {
            delays.push(cancelled(ending).saturating_duration_since(gone));
        }
    }
    assert_fast(&delays);
    assert_eq!(server.service.in_flight(), 0);
}

/// By its id, from another connection: the client is told, the engine is free, and an id that is none is no success.
#[tokio::test]
async fn a_request_can_be_cancelled_by_its_id() {
    let server = start(|_| {
        let mut script = say("so far so good");
        script.push(Act::Hang);
        Ok(script)
    })
    .await;
    for (number, method) in ["POST", "DELETE"].into_iter().enumerate() {
        let mut open = server
            .open("/v1/chat/completions", &with_message(json!({"stream": true})))
            .await;
        let first: serde_json::Value = serde_json::from_str(&open.first().await.data).unwrap();
        let id = first["id"].as_str().unwrap();
        let listed = server.get("/status").await.json()["requests"]["list"].clone();
        assert_eq!(
            (listed[0]["id"].as_str(), listed[0]["route"].as_str()),
            (Some(id), Some("chat"))
        );
        let path = match method {
            "POST" => format!("/v1/requests/{id}/cancel"),
            _ => format!("/v1/requests/{id}"),
        };
        let reply = server.send(server.request(method, &path, "")).await;
        assert_eq!(
            (reply.status, &reply.json()),
            (200, &json!({"id": id, "cancelled": true}))
        );
        let endings = server.backend.endings(number + 1).await;
        cancelled(&endings[number].1);
        while let Some(Ok(_)) = open.next().await {}
        let seen = String::from_utf8_lossy(&open.raw).into_owned();
        assert!(
            seen.contains("request_cancelled") && !seen.contains("[DONE]"),
            "{seen}"
        );
        let again = server.send(server.request(method, &path, "")).await;
        assert_eq!(
            (again.status, again.json()["error"]["code"].as_str()),
            (404, Some("request_not_found"))
        );
    }
    // Nothing has been answered yet: the cancelled one has a status of its own.
    let waiting = start(|_| Ok(vec![Act::Hang])).await;
    let whole = waiting.chat(json!({}));
    let cancel = async {
        waiting.backend_has_requests(1).await;
        let id = loop {
            let list = waiting.get("/status").await.json()["requests"]["list"].clone();
            if let Some(id) = list[0]["id"].as_str() {
                break id.to_owned();
            }
        };
        let path = format!("/v1/requests/{id}/cancel");
        assert_eq!(waiting.post(&path, &json!({})).await.status, 200);
    };
    let (reply, ()) = tokio::join!(whole, cancel);
    assert_eq!(
        (reply.status, reply.json()["error"]["code"].as_str()),
        (409, Some("request_cancelled"))
    );
    waiting.service.idle().await;
    assert!(
        waiting
            .get("/metrics")
            .await
            .text()
            .contains("mlxworker_requests_total{route=\"chat\",outcome=\"cancelled\"} 1")
    );
}

/// More than the connection's buffers hold, and a reply that goes on after that.
fn endless(_: &GenerateRequest) -> Plan {
    let likeliest: Vec<(u32, f32)> = (0..20).map(|id| (1000 + id, -1.5)).collect();
    let mut script = vec![Act::TokenWithLogprob(1000, -1.5, likeliest); 6000];
    script.push(Act::Hang);
    Ok(script)
}

/// Asks for a stream with log-probabilities, reads its first bytes, and then nothing more.
async fn standing_still(server: &Server) -> TcpStream {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut socket = socket.connect(server.address).await.unwrap();
    let body = with_message(json!({"stream": true, "logprobs": true, "top_logprobs": 20})).to_string();
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    socket.write_all(head.as_bytes()).await.unwrap();
    socket.write_all(body.as_bytes()).await.unwrap();
    socket.read_exact(&mut [0; 512]).await.unwrap();
    socket
}

/// What has been written waits for the client, and the server asks for no more: cancelling does not wait with it.
#[tokio::test]
async fn a_client_that_stands_still_does_not_keep_a_cancelled_request_running() {
    let server = start(endless).await;
    let socket = standing_still(&server).await;
    let list = server.get("/status").await.json()["requests"]["list"].clone();
    let id = list[0]["id"].as_str().unwrap();
    let path = format!("/v1/requests/{id}");
    assert_eq!(server.send(server.request("DELETE", &path, "")).await.status, 200);
    cancelled(&server.backend.endings(1).await[0].1);
    assert_eq!(server.send(server.request("DELETE", &path, "")).await.status, 404);
    drop(socket);
    server.service.idle().await;
}

/// A reply that is complete, and only waits for its client to read it, is not to be cancelled any more.
#[tokio::test]
async fn what_is_complete_is_not_said_to_be_cancelled() {
    // The prompt's text comes with the reply's end in one piece, which is more than the connection's buffers hold.
    let prompt = vec![tokenizer().token_id("additionalProperties").unwrap(); 1 << 20];
    let backend = ScriptedBackend::new(2 << 20, VOCABULARY, |_| stop(vec![]));
    let server = start_on(backend, |_| {}).await;
    let body = json!({"prompt": prompt, "echo": true, "stream": true});
    let mut open = server.open("/v1/completions", &body).await;
    server.backend.endings(1).await;
    let list = server.get("/status").await.json()["requests"]["list"].clone();
    let id = list[0]["id"].as_str().unwrap();
    let reply = server
        .send(server.request("DELETE", &format!("/v1/requests/{id}"), ""))
        .await;
    assert_eq!(
        (reply.status, reply.json()["error"]["code"].as_str()),
        (404, Some("request_not_found"))
    );
    while let Some(piece) = open.next().await {
        piece.unwrap();
    }
    assert!(open.raw.ends_with(b"data: [DONE]\n\n"));
    server.service.idle().await;
}

#[tokio::test(start_paused = true)]
async fn a_client_that_stands_still_does_not_hold_up_the_limits() {
    let server = start_with(|c| c.silence_limit = Duration::from_secs(60), endless).await;
    let step = |age| {
        server.backend.set_stats(mlxworker::backend::EngineStats {
            last_step_age: Duration::from_secs(age),
            ..Default::default()
        });
    };
    step(1);
    let socket = standing_still(&server).await;
    tokio::time::sleep(Duration::from_secs(1000)).await;
    let patient = server.backend.endings(1).now_or_never();
    assert!(patient.is_none(), "{patient:?}");
    step(61);
    cancelled(&server.backend.endings(1).await[0].1);
    drop(socket);
    server.service.idle().await;
}

#[tokio::test]
async fn a_refused_choice_leaves_nothing_of_the_others() {
    let server = start(|request| {
        if request.sampling.seed == Some(2) {
            return Err(mlxworker::backend::SubmitError::QueueFull {
                waiting: 9,
                retry_after: Duration::from_secs(3),
            });
        }
        Ok(vec![Act::Hang])
    })
    .await;
    // Somebody else is there too, so there may be room later.
    let other = server.chat(json!({"seed": 7}));
    let refused = async {
        server.backend_has_requests(1).await;
        let reply = server.chat(json!({"n": 3, "seed": 0})).await;
        assert_eq!(reply.status, 429, "{}", reply.text());
        assert_eq!(reply.headers["retry-after"], "3");
        assert_eq!(server.backend.requests().len(), 1);
    };
    tokio::select! {
        _ = other => panic!("it hangs"),
        () = refused => {}
    }
}

#[tokio::test]
async fn draining_finishes_what_runs_and_refuses_what_is_new() {
    let server = start(|_| {
        let mut script = say("a");
        script.push(wait(100));
        script.extend(say("b"));
        stop(script)
    })
    .await;
    let running = server.chat_stream(json!({}));
    let later = async {
        server.backend_has_requests(1).await;
        server.service.drain();
        let reply = server.chat(json!({})).await;
        assert_eq!(
            (reply.status, reply.json()["error"]["code"].as_str()),
            (503, Some("draining"))
        );
        assert_eq!(server.get("/health").await.status, 503);
        server.service.idle().await;
    };
    let (stream, ()) = tokio::join!(running, later);
    assert_eq!(stream.joined(0, "content"), "ab");
}

impl Server {
    async fn backend_has_requests(&self, count: usize) {
        while self.backend.requests().len() < count {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

/// A raw socket sees the stream's end as chunked encoding writes it, and the connection can be used again.
#[tokio::test]
async fn a_complete_stream_leaves_the_connection_usable() {
    let server = start(|_| stop(say("x"))).await;
    let mut socket = TcpStream::connect(server.address).await.unwrap();
    for _ in 0..2 {
        let body = with_message(json!({"stream": true})).to_string();
        let request = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        socket.write_all(request.as_bytes()).await.unwrap();
        let mut seen = Vec::new();
        let mut buffer = [0; 4096];
        while !seen.ends_with(b"0\r\n\r\n") {
            let n = socket.read(&mut buffer).await.unwrap();
            assert!(n > 0, "{}", String::from_utf8_lossy(&seen));
            seen.extend_from_slice(&buffer[..n]);
        }
        assert!(String::from_utf8_lossy(&seen).contains("data: [DONE]"));
    }
}

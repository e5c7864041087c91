//! Connections to a model's server, against servers that misbehave on purpose.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::disallowed_methods
)]

mod common;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use bytes::Bytes;
use common::Swapd;
use http::Request;
use http_body_util::BodyExt;
use swapd::upstream::{Limits, Pool};

/// Reads up to the end of a request's head, byte by byte: nothing of the body is taken.
fn read_head(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).unwrap_or(0) == 1 {
        head.push(byte[0]);
    }
    String::from_utf8(head).unwrap()
}

/// A server that answers before it has read the request leaves a connection that is never ready again.
#[tokio::test]
async fn a_used_connection_that_is_not_ready_holds_no_request_up() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = std::thread::spawn(move || {
        // Kept by the handle until the end: a reset would overtake the reply.
        (0..2)
            .map(|_| {
                let (mut stream, _) = listener.accept().unwrap();
                read_head(&mut stream);
                stream
                    .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
                    .unwrap();
                stream
            })
            .collect::<Vec<TcpStream>>()
    });
    let limits = Limits {
        connect: None,
        response_header: Some(Duration::from_secs(20)),
        idle: None,
        keepalive: None,
        tls_handshake: None,
    };
    let pool = Pool::new("127.0.0.1", port, limits, None);
    // More than the buffers of both ends hold.
    let body = Bytes::from(vec![b'x'; 64 << 20]);
    for _ in 0..2 {
        let request = Request::post("/").body(body.clone()).unwrap();
        let response = pool.send(&request, &|_| ()).await.unwrap();
        let answer = response.into_body().collect().await.unwrap().to_bytes();
        assert_eq!(&answer[..], b"ok");
    }
    server.join().unwrap();
}

/// A stranger as a model: `cmd` is idle, and the reply is what the test says. Returns what reached the client, and the
/// head that reached the server.
fn through_the_proxy(reply: &'static [u8], headers: &str) -> (common::Answer, String) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = std::thread::spawn(move || {
        loop {
            let (mut stream, _) = listener.accept().unwrap();
            let head = read_head(&mut stream);
            // The look of whether somebody listens sends nothing.
            if !head.is_empty() {
                stream.write_all(reply).unwrap();
                return head;
            }
        }
    });
    let config =
        format!("models: {{m: {{cmd: 'sleep 600', proxy: 'http://127.0.0.1:{port}', checkEndpoint: none}}}}");
    let swapd = Swapd::start(&config);
    let body = common::chat_body("m", "\"stream\":true");
    let answer = swapd
        .open("POST", "/v1/chat/completions", headers, &body)
        .finish();
    (answer, server.join().unwrap())
}

/// An event put into a compressed body, or into one of known length, would be garbage.
#[test]
fn a_broken_reply_gets_an_error_event_only_where_one_fits() {
    let plain: &[u8] =
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n\
        4\r\nab\n\n\r\n";
    let (answer, head) = through_the_proxy(plain, "Accept-Encoding: gzip\r\n");
    assert!(
        !answer.complete && answer.body.contains("upstream_died"),
        "{answer:?}"
    );
    assert!(!head.to_lowercase().contains("accept-encoding"), "{head}");
    let compressed: &[u8] =
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-encoding: gzip\r\n\
        transfer-encoding: chunked\r\n\r\n4\r\nab\n\n\r\n";
    let counted: &[u8] =
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 900\r\n\r\nab\n\n";
    for reply in [compressed, counted] {
        let (answer, _) = through_the_proxy(reply, "");
        assert!(
            !answer.complete && !answer.body.contains("upstream_died"),
            "{answer:?}"
        );
        assert_eq!(
            answer.body.trim_end(),
            if answer.body.is_empty() { "" } else { "ab" }
        );
    }
}

/// `swapd check` takes an https:// address of a command, and so does the program.
#[test]
fn a_command_that_serves_over_tls_is_spoken_to_over_tls() {
    let dir = tempfile::tempdir().unwrap();
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let file = |name: &str, text: String| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let cert = file("cert.pem", made.cert.pem());
    let key = file("key.pem", made.signing_key.serialize_pem());
    // The server at the end of it: it answers /health over TLS.
    let server = Swapd::start_with(
        "models: {m: {worker: {model: DIR}}}",
        &["--tls-cert-file", &cert, "--tls-key-file", &key],
    );
    let base = format!("https://localhost:{}", server.address.rsplit(':').next().unwrap());
    let config = format!("models: {{m: {{cmd: 'sleep 600', proxy: '{base}'}}}}");
    let swapd = Swapd::start_env(&config, &[], &[("SSL_CERT_FILE", &cert)]);
    let answer = swapd.chat("m", "");
    assert_eq!(answer.json()["object"], "chat.completion", "{answer:?}");
    assert_eq!(swapd.running()[0]["proxy"], base);
}

#[test]
fn changed_timeouts_hold_for_the_running_process() {
    let config = |timeouts: &str| {
        format!(
            "models:
  a: {{worker: {{model: DIR}}{timeouts}}}
  b: {{cmd: 'FAKESERVER --port ${{PORT}}'{timeouts}}}
groups: {{both: {{swap: false, members: [a, b]}}}}"
        )
    };
    let swapd = Swapd::start(&config(""));
    let pids = ["a", "b"].map(|m| swapd.chat(m, "").json()["pid"].clone());
    swapd.rewrite(&config(", timeouts: {responseHeader: 1}"));
    let diff = swapd.post("/api/reload", "").json();
    assert_eq!(diff["retuned"], serde_json::json!(["a", "b"]), "{diff}");
    for (model, pid) in ["a", "b"].into_iter().zip(pids) {
        let late = swapd.chat(model, r#""delay_ms":5000"#);
        assert!(late.error().0.contains("no reply within 1 s"), "{late:?}");
        assert_eq!(swapd.chat(model, "").json()["pid"], pid);
    }
}

//! TLS and HTTP/2 towards clients of the real program.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::disallowed_methods
)]

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use common::secure::{Certificate, echoes, upgrade};
use common::{Swapd, chat_body};
use http::{Request, Response, Version};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http2::{SendRequest, handshake};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName, pem::PemObject};
use tokio_rustls::rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

const ONE: &str = "models: {m: {worker: {model: DIR}}}";

/// A client that trusts this certificate alone.
fn trusting(files: &Certificate, protocols: &[&[u8]]) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_file(&files.cert).unwrap())
        .unwrap();
    let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = protocols.iter().map(|p| p.to_vec()).collect();
    Arc::new(config)
}
fn name() -> ServerName<'static> {
    "localhost".try_into().unwrap()
}

fn encrypted(swapd: &Swapd, files: &Certificate) -> StreamOwned<ClientConnection, TcpStream> {
    let stream = TcpStream::connect(&swapd.address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    StreamOwned::new(
        ClientConnection::new(trusting(files, &[]), name()).unwrap(),
        stream,
    )
}

fn request(body: &str) -> String {
    format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

#[test]
fn http1_over_tls() {
    let files = Certificate::new();
    let swapd = Swapd::start_with(ONE, &files.args());
    let mut stream = encrypted(&swapd, &files);
    stream
        .write_all(request(&chat_body("m", r#""stream":true,"events":3"#)).as_bytes())
        .unwrap();
    let mut reply = String::new();
    stream.read_to_string(&mut reply).unwrap();
    assert!(
        reply.starts_with("HTTP/1.1 200 OK") && reply.contains("[DONE]"),
        "{reply}"
    );
    // An upgraded connection passes bytes both ways.
    let mut stream = encrypted(&swapd, &files);
    upgrade(&mut stream, "/upstream/m/ws");
    echoes(&mut stream, "hello");
    // Plain words get no plain answer, and disturb nobody.
    let mut plain = TcpStream::connect(&swapd.address).unwrap();
    plain.write_all(request("{}").as_bytes()).unwrap();
    let mut reply = Vec::new();
    let _ = plain.read_to_end(&mut reply);
    assert!(!reply.starts_with(b"HTTP"), "{reply:?}");
    assert_eq!(
        reload(&swapd, &["--tls-cert-file", files.args()[1]])
            .status
            .code(),
        Some(0)
    );
    let other = Certificate::new();
    let refused = reload(&swapd, &["--tls-cert-file", other.args()[1]]);
    assert_eq!(refused.status.code(), Some(1), "another server's certificate");
}

/// A renewed certificate is taken up with a reload; a broken one is not.
#[test]
fn a_renewed_certificate_needs_no_restart() {
    let (files, renewed) = (Certificate::new(), Certificate::new());
    let swapd = Swapd::start_with(ONE, &files.args());
    let shown = |by: &Certificate| {
        let mut stream = encrypted(&swapd, by);
        stream
            .write_all(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            .is_ok()
    };
    assert!(shown(&files) && !shown(&renewed));
    std::fs::write(&files.key, "broken").unwrap();
    common::signal(swapd.child.id(), nix::sys::signal::Signal::SIGHUP);
    common::eventually("told", Duration::from_secs(3), || {
        let mut stream = encrypted(&swapd, &files);
        stream
            .write_all(b"GET /logs HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            .unwrap();
        let mut logs = String::new();
        stream.read_to_string(&mut logs).unwrap();
        logs.contains("certificate not taken up").then_some(())
    });
    let old = Certificate {
        dir: tempfile::tempdir().unwrap(),
        cert: files.cert.with_file_name("old.pem"),
        key: files.key.clone(),
    };
    std::fs::copy(&files.cert, &old.cert).unwrap();
    std::fs::copy(&renewed.cert, &files.cert).unwrap();
    std::fs::copy(&renewed.key, &files.key).unwrap();
    common::signal(swapd.child.id(), nix::sys::signal::Signal::SIGHUP);
    common::eventually("taken up", Duration::from_secs(3), || {
        shown(&renewed).then_some(())
    });
    assert!(!shown(&old));
}

fn reload(swapd: &Swapd, args: &[&str]) -> Output {
    let program = env!("CARGO_BIN_EXE_swapd");
    let mut command = Command::new(program);
    command
        .args(["reload", "--listen", &swapd.address])
        .args(args)
        .output()
        .unwrap()
}

#[test]
fn both_files_or_an_error() {
    let files = Certificate::new();
    let config = files.cert.with_file_name("models.yaml");
    std::fs::write(&config, "models: {}").unwrap();
    let run = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_swapd"));
        let out = command
            .args(["--config", config.to_str().unwrap(), "--listen", "127.0.0.1:0"])
            .args(args)
            .output()
            .unwrap();
        (out.status.code(), String::from_utf8(out.stderr).unwrap())
    };
    let [_, cert, _, key] = files.args();
    let cases: [(&[&str], &str); 5] = [
        (&["-tls-cert-file", cert], "needs --tls-key-file"),
        (&["-tls-key-file", key], "needs --tls-cert-file"),
        (
            &["-tls-cert-file", key, "-tls-key-file", key],
            "holds no certificate",
        ),
        (&["-tls-cert-file", cert, "-tls-key-file", cert], "no private key"),
        (
            &["-tls-cert-file", "/none.pem", "-tls-key-file", key],
            "/none.pem",
        ),
    ];
    for (args, expected) in cases {
        let (code, message) = run(args);
        assert!(
            code == Some(1) && message.contains(expected),
            "{args:?}: {code:?} {message}"
        );
    }
    let other = Certificate::new();
    let (code, message) = run(&["-tls-cert-file", cert, "-tls-key-file", other.args()[3]]);
    assert_eq!(code, Some(1), "a key that is not the certificate's: {message}");
}

async fn open(swapd: &Swapd, files: Option<&Certificate>) -> SendRequest<Full<Bytes>> {
    let stream = tokio::net::TcpStream::connect(&swapd.address).await.unwrap();
    let executor = TokioExecutor::new();
    match files {
        None => {
            let (sender, connection) = handshake(executor, TokioIo::new(stream)).await.unwrap();
            tokio::spawn(connection);
            sender
        }
        Some(files) => {
            let connector = TlsConnector::from(trusting(files, &[b"h2", b"http/1.1"]));
            let stream = connector.connect(name(), stream).await.unwrap();
            assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
            let (sender, connection) = handshake(executor, TokioIo::new(stream)).await.unwrap();
            tokio::spawn(connection);
            sender
        }
    }
}

async fn chat(sender: &mut SendRequest<Full<Bytes>>, more: &str) -> Response<Incoming> {
    let request = Request::post("http://swapd.test:1234/v1/chat/completions")
        .version(Version::HTTP_2)
        .header("cookie", "a=1")
        .header("cookie", "b=2")
        .header("authorization", "Bearer k")
        .body(Full::new(Bytes::from(chat_body("m", more))));
    sender.send_request(request.unwrap()).await.unwrap()
}

/// All that HTTP/2 must do, over a connection of either kind.
async fn speaks_http2(swapd: &Swapd, files: Option<&Certificate>) {
    let mut sender = open(swapd, files).await;
    let reply = chat(&mut sender, r#""echo":true"#).await;
    let body = reply.into_body().collect().await.unwrap().to_bytes();
    let echo: serde_json::Value = serde_json::from_slice(&body).unwrap();
    let header = |name: &str| {
        let headers = echo["headers"].as_array().unwrap().iter();
        let found: Vec<&str> = headers
            .filter(|h| h[0] == name)
            .map(|h| h[1].as_str().unwrap())
            .collect();
        found.join(" | ")
    };
    assert_eq!(
        (
            header("host").as_str(),
            header("cookie").as_str(),
            header("authorization").as_str()
        ),
        ("swapd.test:1234", "a=1; b=2", "")
    );
    // Many at once on one connection; every stream whole.
    let mut running = Vec::new();
    for _ in 0..150 {
        let mut sender = sender.clone();
        running.push(tokio::spawn(async move {
            let reply = chat(&mut sender, r#""stream":true,"events":20,"gap_ms":1"#).await;
            reply.into_body().collect().await.unwrap().to_bytes()
        }));
    }
    for stream in running {
        let body = stream.await.unwrap();
        let text = std::str::from_utf8(&body).unwrap();
        assert_eq!(text.matches("data: ").count(), 20);
        assert!(text.ends_with("data: [DONE]\n\n"));
    }
    // A reply that breaks off does not look complete, and takes no other stream along.
    let mut broken = chat(
        &mut sender,
        r#""stream":true,"events":20,"gap_ms":5,"die_after":3"#,
    )
    .await;
    let mut text = String::new();
    let ended = loop {
        match broken.body_mut().frame().await {
            Some(Ok(frame)) => text += std::str::from_utf8(frame.data_ref().unwrap()).unwrap(),
            Some(Err(error)) => break Err(error),
            None => break Ok(()),
        }
    };
    assert!(
        ended.is_err() && text.contains("upstream_died"),
        "{ended:?} {text}"
    );
    assert_eq!(chat(&mut sender, "").await.status(), 200);
    let missing = Request::get("http://x/nothing").body(Full::default()).unwrap();
    assert_eq!(sender.send_request(missing).await.unwrap().status(), 404);
}

#[tokio::test]
async fn http2_over_tls() {
    let files = Certificate::new();
    let swapd = Swapd::start_with(ONE, &files.args());
    speaks_http2(&swapd, Some(&files)).await;
}

#[tokio::test]
async fn http2_without_tls_by_prior_knowledge() {
    let swapd = Swapd::start(ONE);
    speaks_http2(&swapd, None).await;
}

#[test]
fn the_first_bytes_may_come_one_by_one() {
    let swapd = Swapd::start(ONE);
    let body = chat_body("m", "");
    let mut stream = TcpStream::connect(&swapd.address).unwrap();
    stream.set_nodelay(true).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    for byte in request(&body).as_bytes() {
        stream.write_all(&[*byte]).unwrap();
        std::thread::yield_now();
    }
    let mut reply = String::new();
    stream.read_to_string(&mut reply).unwrap();
    assert!(reply.starts_with("HTTP/1.1 200"), "{reply}");
}

/// One stream is given up; the others of the connection go on.
#[tokio::test]
async fn a_client_that_leaves_a_stream_of_http2_is_noticed() {
    let swapd = Swapd::start("models: {m: {worker: {model: DIR}, env: [JOURNAL]}}");
    let mut sender = open(&swapd, None).await;
    let mut stream = chat(&mut sender, r#""stream":true,"events":100,"gap_ms":10000"#).await;
    stream.body_mut().frame().await.unwrap().unwrap();
    let left = std::time::Instant::now();
    drop(stream);
    let noticed = tokio::task::spawn_blocking(move || {
        common::eventually("the worker stops", Duration::from_secs(2), || {
            (!swapd.journalled("disconnect").is_empty()).then_some(())
        });
        (left.elapsed(), swapd)
    });
    let (time, _swapd) = noticed.await.unwrap();
    assert!(time < Duration::from_millis(500), "{time:?}");
    assert_eq!(chat(&mut sender, "").await.status(), 200);
}

/// The signal ends an HTTP/2 connection that nobody uses, and lets a running stream finish.
#[tokio::test]
async fn shutdown_waits_for_streams() {
    let mut swapd = Swapd::start(ONE);
    let _idle = open(&swapd, None).await;
    let mut sender = open(&swapd, None).await;
    let reply = chat(&mut sender, r#""stream":true,"events":30,"gap_ms":20"#).await;
    common::signal(swapd.child.id(), nix::sys::signal::Signal::SIGTERM);
    let body = reply.into_body().collect().await.unwrap().to_bytes();
    assert!(body.ends_with(b"data: [DONE]\n\n"));
    assert_eq!(swapd.exit_code(Duration::from_secs(5)), Some(0));
}

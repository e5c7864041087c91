#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::convert::Infallible;

use bytes::Bytes;
use http_body_util::channel::{Channel, Sender};

use super::*;

type Pieces = Channel<Bytes, Infallible>;

fn request(version: Version, expect: bool) -> (Sender<Bytes, Infallible>, Request<Body<Pieces>>) {
    let (sender, body) = Pieces::new(1);
    let mut request = Request::builder().version(version);
    if expect {
        request = request.header(header::EXPECT, "100-continue");
    }
    (sender, Body::wrap(request.body(body).unwrap()))
}

/// Sends pieces until one is refused; how many were taken, 100 at most.
async fn send(sender: &mut Sender<Bytes, Infallible>) -> usize {
    for taken in 0..100 {
        if sender.send_data(Bytes::from_static(b"piece")).await.is_err() {
            return taken;
        }
    }
    100
}

#[tokio::test(start_paused = true)]
async fn what_nobody_reads_is_taken_in() {
    for version in [Version::HTTP_10, Version::HTTP_11] {
        let (mut sender, request) = request(version, false);
        drop(request);
        assert_eq!(send(&mut sender).await, 100);
    }
}

#[tokio::test(start_paused = true)]
async fn also_what_is_left_after_some_has_been_read() {
    let (mut sender, request) = request(Version::HTTP_11, false);
    let mut body = request.into_body();
    let (sent, read) = tokio::join!(sender.send_data(Bytes::from_static(b"first")), body.frame());
    sent.unwrap();
    assert_eq!(read.unwrap().unwrap().into_data().unwrap(), "first");
    assert!(!http_body::Body::is_end_stream(&body));
    drop(body);
    assert_eq!(send(&mut sender).await, 100);
}

#[tokio::test(start_paused = true)]
async fn a_client_that_waits_for_leave_or_speaks_http2_is_stopped() {
    for (version, expect) in [(Version::HTTP_11, true), (Version::HTTP_2, false)] {
        let (mut sender, request) = request(version, expect);
        drop(request);
        assert_eq!(send(&mut sender).await, 0, "{version:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn not_for_ever() {
    let (mut sender, request) = request(Version::HTTP_11, false);
    drop(request);
    assert_eq!(send(&mut sender).await, 100);
    tokio::time::sleep(LIMIT - Duration::from_millis(1)).await;
    assert_eq!(send(&mut sender).await, 100);
    tokio::time::sleep(Duration::from_millis(2)).await;
    // One may still fit into the channel of a reader that is gone.
    assert!(send(&mut sender).await <= 1);
}

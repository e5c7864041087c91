//! Every way to be refused: status, envelope, and a message that helps.

use std::time::Duration;

use bytes::Bytes;
use mlxworker::backend::SubmitError;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::support::*;

fn check(reply: &Reply, status: u16, param: Option<&str>, parts: &[&str]) {
    assert_eq!(reply.status, status, "{}", reply.text());
    assert_eq!(reply.headers["content-type"], "application/json");
    let json = reply.json();
    let error = json["error"].as_object().unwrap_or_else(|| panic!("{json}"));
    assert_eq!(
        error.keys().collect::<Vec<_>>(),
        ["message", "type", "param", "code"]
    );
    assert_eq!(error["param"].as_str(), param, "{json}");
    for part in parts {
        assert!(
            error["message"].as_str().unwrap().contains(part),
            "{part:?} is not in {json}"
        );
    }
}

#[tokio::test]
async fn ids_that_are_no_text() {
    let server = start(|_| panic!("no request gets here")).await;
    for (method, path) in [
        ("GET", "/v1/models/%FF"),
        ("DELETE", "/v1/requests/%FF"),
        ("POST", "/v1/requests/%FF/cancel"),
    ] {
        let request = http::Request::builder()
            .method(method)
            .uri(format!("http://{}{path}", server.address))
            .body(http_body_util::Full::new(Bytes::new()))
            .unwrap();
        check(&server.send(request).await, 400, None, &[path, "UTF-8"]);
    }
}

#[tokio::test]
async fn fields_out_of_range() {
    let server = start(|_| panic!("no request gets here")).await;
    for (extra, param, part) in [
        (json!({"temperature": 3}), "temperature", "got 3"),
        (json!({"top_p": 0}), "top_p", "got 0"),
        (json!({"n": 99}), "n", "99"),
        (
            json!({"logprobs": true, "top_logprobs": 21}),
            "top_logprobs",
            "21",
        ),
        (
            json!({"response_format": {"type": "yaml"}}),
            "response_format",
            "yaml",
        ),
        (json!({"logit_bias": {"2048": 1}}), "logit_bias", "2048"),
        (json!({"stop_token_ids": [9999]}), "stop_token_ids", "9999"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
            "messages[0].content[0].type",
            "image_url",
        ),
        (
            json!({"messages": [{"role": "user", "content": "word ".repeat(3000)}]}),
            "messages",
            "context length of 1024",
        ),
    ] {
        let reply = server.chat(extra).await;
        check(&reply, 400, Some(param), &[part]);
        assert_eq!(reply.json()["error"]["type"], "invalid_request_error");
    }
    for (body, param, part) in [
        (json!({"prompt": ""}), "prompt", "no tokens"),
        (json!({"prompt": [["a"]]}), "prompt[0][0]", "\"a\""),
        (json!({"prompt": [[1], [5000]]}), "prompt[1]", "5000"),
        (json!({"prompt": vec![1; 1024]}), "prompt", "1024 tokens"),
    ] {
        check(
            &server.post("/v1/completions", &body).await,
            400,
            Some(param),
            &[part],
        );
    }
    let metrics = server.get("/metrics").await.text();
    assert!(
        metrics.contains("route=\"chat\",outcome=\"client_error\"} 9"),
        "{metrics}"
    );
}

#[tokio::test]
async fn bodies_that_are_none() {
    let server = start_with(|c| c.max_body = 1000, |_| panic!("no request gets here")).await;
    let path = "/v1/chat/completions";
    let send = |body: &str| server.send(server.request("POST", path, body.to_owned()));
    check(
        &send("{\n \"model\": oops}").await,
        400,
        None,
        &["line 2 column 11"],
    );
    check(&send("").await, 400, None, &["empty"]);
    check(&send("[]").await, 400, None, &["an array"]);
    check(&send(&"x".repeat(1001)).await, 413, None, &["1000 bytes"]);
    let mut request = server.request("POST", path, "{}");
    request
        .headers_mut()
        .insert("content-type", "text/plain".parse().unwrap());
    check(&server.send(request).await, 415, None, &["text/plain"]);
    let mut request = server.request("POST", path, "{}");
    request
        .headers_mut()
        .insert("content-type", "application/json; charset=utf-8".parse().unwrap());
    check(&server.send(request).await, 400, Some("messages"), &["missing"]);
}

#[tokio::test]
async fn paths_methods_and_models() {
    let server = start(|_| stop(say("ok"))).await;
    check(&server.get("/v1/nothing").await, 404, None, &["GET /v1/nothing"]);
    check(&server.get("/v1/chat/completions").await, 405, None, &["GET"]);
    check(&server.post("/health", &json!({})).await, 405, None, &["POST"]);
    let reply = server.chat(json!({"model": "gpt-5"})).await;
    check(&reply, 404, Some("model"), &["gpt-5", MODEL]);
    assert_eq!(reply.json()["error"]["code"], "model_not_found");
    assert_eq!(
        server.chat(json!({"model": null})).await.status,
        200,
        "there is only one"
    );
    let any = start_with(|c| c.any_model = true, |_| stop(say("ok"))).await;
    let reply = any.chat(json!({"model": "an-alias"})).await;
    assert_eq!((reply.status, reply.json()["model"].as_str()), (200, Some(MODEL)));
}

#[tokio::test]
async fn what_the_engine_refuses() {
    for (error, status, code) in [
        (
            SubmitError::TooLong {
                prompt_tokens: 10,
                context_length: 10,
            },
            400,
            "context_length_exceeded",
        ),
        (
            SubmitError::NeverFits("needs 9 blocks of 8".into()),
            400,
            "never_fits",
        ),
        (
            SubmitError::QueueFull {
                waiting: 64,
                retry_after: Duration::from_secs(7),
            },
            429,
            "queue_full",
        ),
        (SubmitError::Stopped, 503, "draining"),
        (SubmitError::Dead("gone".into()), 503, "engine_dead"),
    ] {
        let text = error.to_string();
        let planned = error.clone();
        let server = start(move |_| Err(planned.clone())).await;
        for stream in [false, true] {
            let reply = server.chat(json!({"stream": stream})).await;
            check(&reply, status, None, &[&text]);
            assert_eq!(reply.json()["error"]["code"], code);
            let retry = reply
                .headers
                .get("retry-after")
                .map(|v| v.to_str().unwrap().to_owned());
            match error {
                SubmitError::QueueFull { .. } => assert_eq!(retry.as_deref(), Some("7")),
                _ => assert_eq!(retry.is_some(), status == 503),
            }
        }
    }
}

/// Told to come back, a request that fills the queue all by itself would do so for ever.
#[tokio::test]
async fn a_request_larger_than_the_queue() {
    let queued = std::sync::atomic::AtomicUsize::new(0);
    let server = start(
        move |_| match queued.fetch_add(1, std::sync::atomic::Ordering::Relaxed) {
            0..3 => Ok(vec![mlxworker::backend::scripted::Act::Hang]),
            waiting => Err(SubmitError::QueueFull {
                waiting,
                retry_after: Duration::from_secs(1),
            }),
        },
    )
    .await;
    let reply = server
        .post("/v1/completions", &json!({"prompt": ["a", "b"], "n": 4}))
        .await;
    check(&reply, 400, None, &["prompts times n is 8", "6 replies"]);
    assert!(!reply.headers.contains_key("retry-after"));
}

#[tokio::test]
async fn keys() {
    let server = start_with(|c| c.api_key = Some("sesame".into()), |_| stop(say("ok"))).await;
    let ask = |name: &'static str, value: &'static str| {
        let mut request = server.request("GET", "/v1/models", "");
        if !name.is_empty() {
            request.headers_mut().insert(name, value.parse().unwrap());
        }
        server.send(request)
    };
    for (name, value) in [
        ("authorization", "Bearer sesame"),
        ("authorization", "bearer  sesame"),
        ("x-api-key", "sesame"),
    ] {
        assert_eq!(ask(name, value).await.status, 200, "{name}: {value}");
    }
    for (name, value) in [
        ("", ""),
        ("authorization", "Bearer sesam"),
        ("authorization", "Bearer sesame2"),
        ("authorization", "Basic sesame"),
        ("authorization", "sesame"),
        ("x-api-key", "Sesame"),
    ] {
        let reply = ask(name, value).await;
        check(&reply, 401, None, &["API key"]);
        assert_eq!(reply.json()["error"]["type"], "authentication_error");
    }
    let reply = server.chat(json!({})).await;
    assert_eq!(reply.status, 401);
    assert_eq!(server.get("/health").await.status, 200, "health needs no key");
}

/// The client's announced length is looked at before a byte is read; without one, the bytes are counted.
#[tokio::test]
async fn a_body_without_a_length_is_counted() {
    let server = start_with(|c| c.max_body = 100, |_| panic!("no request gets here")).await;
    let stream = futures_util::stream::iter((0..100).map(|_| {
        Ok::<_, std::convert::Infallible>(http_body::Frame::data(Bytes::from_static(b"          ")))
    }));
    let body = axum::body::Body::new(http_body_util::StreamBody::new(stream));
    let io = hyper_util::rt::TokioIo::new(tokio::net::TcpStream::connect(server.address).await.unwrap());
    let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await.unwrap();
    tokio::spawn(connection);
    let request = http::Request::builder()
        .method("POST")
        .uri("/v1/chat/completions")
        .header("host", "x")
        .body(body)
        .unwrap();
    let response = sender.send_request(request).await.unwrap();
    assert_eq!(response.status(), 413);
}

/// Clients write all of a request before they look for an answer.
#[tokio::test]
async fn a_refusal_reaches_a_client_that_is_still_writing() {
    let server = start_with(
        |c| {
            c.max_body = 100;
            c.api_key = Some("right".to_owned());
        },
        |_| panic!("no request gets here"),
    )
    .await;
    let body = " ".repeat(32 << 20);
    let chat = "POST /v1/chat/completions";
    let cases = [
        (chat, "Authorization: Bearer right\r\n", "413"),
        (chat, "Authorization: Bearer wrong\r\n", "401"),
        ("POST /nowhere", "", "404"),
        ("POST /health", "", "405"),
    ];
    for (route, headers, status) in cases {
        let mut stream = tokio::net::TcpStream::connect(server.address).await.unwrap();
        let length = body.len();
        let head = format!(
            "{route} HTTP/1.1\r\nHost: test\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n"
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        stream.write_all(body.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer.split(' ').nth(1), Some(status), "{route}: {answer}");
        assert!(answer.contains(r#"{"error":{"message":"#), "{route}: {answer}");
    }
}

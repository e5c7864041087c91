//! Peers of the real program: a fake server, or another swapd, as the other side.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::disallowed_methods
)]

mod common;

use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command};
use std::time::Duration;

use common::secure::{Certificate, echoes, upgrade};
use common::{Answer, Swapd, chat_body, eventually, fakeworker};
use serde_json::Value;

const SEC: Duration = Duration::from_secs(1);

/// A fake server that nobody but the test has started.
struct Far {
    child: Child,
    port: u16,
    dir: tempfile::TempDir,
}

impl Drop for Far {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}

impl Far {
    fn start(env: &[(&str, &str)]) -> Self {
        Self::start_at(free_port(), env)
    }

    fn start_at(port: u16, env: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let child = Command::new(fakeworker())
            .args(["--port", &port.to_string()])
            .env("FAKE_MODELS", dir.path().join("models"))
            .env("FAKE_JOURNAL", dir.path().join("journal"))
            .envs(env.iter().copied())
            .spawn()
            .unwrap();
        eventually("listens", 5 * SEC, || {
            TcpStream::connect(("127.0.0.1", port)).ok()
        });
        Self { child, port, dir }
    }

    fn has(&self, models: &str) {
        std::fs::write(self.dir.path().join("new"), models).unwrap();
        std::fs::rename(self.dir.path().join("new"), self.dir.path().join("models")).unwrap();
    }

    fn journal(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("journal")).unwrap_or_default()
    }
}

/// What the fake server received.
struct Received(Value);

impl Received {
    fn of(answer: &Answer) -> Self {
        assert_eq!(answer.status, 200, "{answer:?}");
        Self(answer.json())
    }

    fn header(&self, name: &str) -> Option<&str> {
        let headers = self.0["headers"].as_array().unwrap();
        let found = headers.iter().find(|h| h[0] == name)?;
        found[1].as_str()
    }

    fn body(&self) -> &str {
        self.0["body"].as_str().unwrap()
    }

    fn path(&self) -> &str {
        self.0["path"].as_str().unwrap()
    }
}

#[test]
fn a_request_arrives_under_the_peers_own_names() {
    let far = Far::start(&[]);
    let config = format!(
        "
models: {{shared: {{worker: {{model: DIR}}}}}}
peers:
  gpu:
    proxy: http://127.0.0.1:{}/base/
    models: [org/big, shared]
    apiKey: secret
    filters: {{stripParams: top_k, setParams: {{temperature: 0.5}}, setParamsByID: {{gpu/org/big: {{n: 2}}}}}}
",
        far.port
    );
    let swapd = Swapd::start(&config);
    let sent = "{ \"model\":\"NAME\", \"top_k\":1, \"echo\":true }";
    let headers = "Authorization: Bearer mine\r\nX-Api-Key: mine\r\nCookie: a=b\r\nX-Forwarded-For: 10.0.0.1\r\n\
                   Content-Type: application/json\r\nX-Session-Id: s\r\n";
    let ask = |path: &str, name: &str| {
        let body = sent.replace("NAME", name);
        Received::of(&swapd.open("POST", path, headers, &body).finish())
    };
    let got = ask("/v1/chat/completions?a=b", "gpu/org/big");
    assert_eq!(got.path(), "/base/v1/chat/completions?a=b");
    assert_eq!(
        got.body(),
        r#"{ "model":"org/big", "echo":true,"temperature":0.5,"n":2 }"#
    );
    let host = format!("127.0.0.1:{}", far.port);
    for (name, value) in [
        ("host", Some(host.as_str())),
        ("authorization", Some("Bearer secret")),
        ("x-api-key", Some("secret")),
        ("cookie", None),
        ("x-forwarded-for", None),
        ("x-session-id", Some("s")),
    ] {
        assert_eq!(got.header(name), value, "{name}");
    }
    let got = ask("/v1/embeddings", "org/big");
    assert_eq!(
        got.body(),
        r#"{ "model":"org/big", "echo":true,"temperature":0.5 }"#
    );
    // What is here goes before what is elsewhere.
    let pid = swapd.chat("shared", "").json()["pid"].clone();
    assert_ne!(pid, swapd.chat("gpu/shared", "").json()["pid"]);
    // The same below /upstream, where other bodies stay as they are.
    let got = ask("/upstream/gpu/org/big/v1/chat/completions", "gpu/org/big");
    assert_eq!(
        (got.path(), got.body()),
        (
            "/base/v1/chat/completions",
            r#"{ "model":"org/big", "echo":true,"temperature":0.5,"n":2 }"#
        )
    );
    let got = ask("/upstream/gpu/org/big/other/a%2Fb?q=1", "x");
    assert_eq!(
        (got.path(), got.body()),
        ("/base/other/a%2Fb?q=1", &*sent.replace("NAME", "x"))
    );
    assert_eq!(got.header("authorization"), Some("Bearer secret"));
    // Forms and queries.
    let form = "--B\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\ngpu/org/big\r\n--B--\r\n";
    let kind = "Content-Type: multipart/form-data; boundary=B\r\nX-Echo: 1\r\n";
    let got = Received::of(
        &swapd
            .open("POST", "/v1/audio/transcriptions", kind, form)
            .finish(),
    );
    assert_eq!(got.body(), form.replace("gpu/org/big", "org/big"));
    assert_eq!(
        swapd.get("/v1/audio/voices?model=gpu%2Forg%2Fbig&x=1").body,
        "/base/v1/audio/voices?model=org%2Fbig&x=1"
    );
    // An upgraded connection.
    let mut socket = TcpStream::connect(&swapd.address).unwrap();
    upgrade(&mut socket, "/upstream/gpu/org/big/ws");
    echoes(&mut socket, "hello");
}

#[test]
fn peers_are_listed_counted_and_permitted() {
    let far = Far::start(&[]);
    let config = format!(
        "
apiKeys: [all, {{key: some, models: [gpu/big]}}]
models: {{m: {{worker: {{model: DIR}}}}}}
peers: {{gpu: {{proxy: 'http://127.0.0.1:{}', models: [big, small]}}}}
",
        far.port
    );
    let swapd = Swapd::start(&config);
    let get = |key: &str, path: &str| {
        let key = format!("x-api-key: {key}\r\n");
        swapd.open("GET", path, &key, "").finish()
    };
    let list = get("all", "/v1/models").json();
    let rows: Vec<&Value> = list["data"].as_array().unwrap().iter().collect();
    let ids: Vec<&str> = rows.iter().map(|r| r["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["gpu/big", "gpu/small", "m"]);
    assert_eq!(rows[0]["name"], "gpu: big");
    assert_eq!(rows[0]["meta"]["llamaswap"]["peerID"], "gpu");
    assert_eq!(get("all", "/v1/models/gpu/big").json()["id"], "gpu/big");
    assert_eq!(
        get("some", "/v1/models").json()["data"].as_array().unwrap().len(),
        1
    );
    let chat = |key: &str, name: &str| {
        let key = format!("x-api-key: {key}\r\n");
        swapd
            .open(
                "POST",
                "/v1/chat/completions",
                &key,
                &chat_body(name, r#""echo":true"#),
            )
            .finish()
    };
    let got = Received::of(&chat("some", "gpu/big"));
    assert_eq!(
        (got.header("authorization"), got.header("x-api-key")),
        (None, None)
    );
    assert_eq!(chat("some", "gpu/small").status, 403);
    assert_eq!(chat("all", "small").status, 200);
    let metrics = get("all", "/metrics").body;
    assert!(
        metrics.contains("swapd_requests_total{model=\"gpu/big\",code=\"200\"} 1"),
        "{metrics}"
    );
    assert!(metrics.contains("swapd_peer_up{peer=\"gpu\"} 1"), "{metrics}");
    let (message, _) = chat("all", "gpu/bug").error();
    assert!(message.contains("'gpu/big'"), "{message}");
}

#[test]
fn failures_are_told_and_a_stream_that_breaks_off_looks_so() {
    let far = Far::start(&[]);
    let dead = free_port();
    let config = format!(
        "peers:
  gpu: {{proxy: 'http://127.0.0.1:{}', models: [m], timeouts: {{responseHeader: 1}}}}
  dead: {{proxy: 'http://127.0.0.1:{dead}', models: [d]}}
",
        far.port
    );
    let swapd = Swapd::start(&config);
    let answer = swapd.chat("d", "");
    let (message, code) = answer.error();
    assert_eq!((answer.status, code.as_str()), (502, "peer_unreachable"));
    assert!(
        message.contains("peer 'dead'") && message.contains("refused"),
        "{message}"
    );
    // It fails again: for a moment nobody waits for it, and then it is tried anew.
    let answer = eventually("rests", 10 * SEC, || {
        let answer = swapd.chat("d", "");
        (answer.status == 503).then_some(answer)
    });
    let (message, code) = answer.error();
    assert_eq!(code, "peer_down");
    assert!(
        message.contains("refused") && answer.header("retry-after").is_some(),
        "{message}"
    );
    let _back = Far::start_at(dead, &[]);
    eventually("tried again", 15 * SEC, || {
        (swapd.chat("d", "").status == 200).then_some(())
    });
    let late = swapd.chat("m", r#""delay_ms":3000"#);
    assert_eq!(late.status, 504, "{late:?}");
    // The client's own going away reaches the peer.
    let mut leaving = swapd.chat_open("m", r#""stream":true,"events":1000,"gap_ms":5"#);
    leaving.chunk().unwrap();
    drop(leaving);
    eventually("the peer stops", SEC, || {
        far.journal().contains("disconnect").then_some(())
    });
    let broken = swapd
        .chat_open("m", r#""stream":true,"events":50,"gap_ms":5,"die_after":3"#)
        .finish();
    assert!(
        !broken.complete && broken.body.contains("upstream_died"),
        "{broken:?}"
    );
    let rows = swapd.get("/api/metrics/activity").json();
    assert_eq!(rows["data"][0]["model"], "gpu/m");
    assert!(
        rows["data"][0]["error_msg"]
            .as_str()
            .unwrap()
            .contains("broke off")
    );
}

#[test]
fn several_peers_stand_in_for_each_other() {
    let (a, b) = (Far::start(&[]), Far::start(&[("FAKE_REFUSE", "503")]));
    let gone = free_port();
    let config = format!(
        "peers:
  a: {{proxy: 'http://127.0.0.1:{}', models: [m]}}
  b: {{proxy: 'http://127.0.0.1:{}', models: [m], priority: 1}}
  gone: {{proxy: 'http://127.0.0.1:{gone}', models: [m], priority: 2}}
",
        a.port, b.port
    );
    let swapd = Swapd::start(&config);
    for _ in 0..4 {
        assert_eq!(swapd.chat("m", "").json()["pid"], a.child.id());
    }
    assert_eq!(swapd.chat("b/m", "").status, 503, "the full name is one place");
    let peers = swapd.get("/api/peers").json();
    let up: Vec<(&str, bool)> = peers["peers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|p| (p["id"].as_str().unwrap(), p["up"].as_bool().unwrap()))
        .collect();
    assert_eq!(up, [("gone", false), ("b", true), ("a", true)]);
    let rows = swapd.get("/api/metrics/activity?sort=id&order=asc").json();
    assert_eq!(rows["data"][0]["model"], "a/m", "counted where it was served");
    drop(a);
    assert_eq!(swapd.chat("m", "").status, 502, "none is left");
}

#[test]
fn what_has_no_room_here_spills_over() {
    let far = Far::start(&[]);
    let config = format!(
        "
models: {{here: {{worker: {{model: DIR}}}}}}
selectors: {{best: {{strategy: spillover, targets: [here, gpu/there], settings: {{spillover: 1}}}}}}
peers: {{gpu: {{proxy: 'http://127.0.0.1:{}', models: [there]}}}}
",
        far.port
    );
    let swapd = Swapd::start(&config);
    assert_ne!(swapd.chat("best", "").json()["pid"], far.child.id());
    let mut busy = swapd.chat_open("best", r#""stream":true,"events":300,"gap_ms":10"#);
    busy.chunk().unwrap();
    let got = Received::of(&swapd.chat("best", r#""echo":true"#));
    assert_eq!(got.0["pid"], far.child.id());
    assert!(got.body().contains(r#""model":"there""#), "{}", got.body());
    // A peer that is not there is no way out: the request waits its turn here.
    let here = busy_pid(&swapd);
    drop(far);
    for _ in 0..3 {
        assert_eq!(swapd.chat("best", "").json()["pid"], here);
    }
    drop(busy);
    eventually("room again", SEC, || {
        (swapd.running()[0]["inflight"] == 0).then_some(())
    });
    assert_eq!(swapd.chat("best", "").json()["pid"], here);
}

#[test]
fn whoever_stands_in_for_a_peer_has_to_be_permitted() {
    let config = format!(
        "
apiKeys: [all, {{key: some, models: [gpu/there]}}, {{key: named, models: [best]}}]
models: {{here: {{worker: {{model: DIR}}}}}}
selectors: {{best: {{strategy: spillover, targets: [here, gpu/there], settings: {{spillover: 1}}}}}}
peers: {{gpu: {{proxy: 'http://127.0.0.1:{}', models: [there]}}}}
",
        free_port()
    );
    let swapd = Swapd::start(&config);
    let open = |key: &str, more: &str| {
        let key = format!("x-api-key: {key}\r\n");
        swapd.open("POST", "/v1/chat/completions", &key, &chat_body("best", more))
    };
    let mut busy = open("all", r#""stream":true,"events":1000,"gap_ms":10"#);
    busy.chunk().unwrap();
    // The model of this machine is full, and the peer cannot be reached.
    let refused = open("some", "").finish();
    let (_, code) = refused.error();
    assert!(
        ["peer_unreachable", "peer_down"].contains(&code.as_str()),
        "{refused:?}"
    );
    drop(busy);
    // With room here too: what is not permitted is not chosen.
    let refused = open("some", "").finish();
    let (_, code) = refused.error();
    assert!(
        ["peer_unreachable", "peer_down"].contains(&code.as_str()),
        "{refused:?}"
    );
    assert_eq!(
        open("named", "").finish().status,
        200,
        "the selector itself is permitted"
    );
}

fn busy_pid(swapd: &Swapd) -> Value {
    swapd.running()[0]["pid"].clone()
}

#[test]
fn a_peers_list_is_looked_up_again() {
    let far = Far::start(&[]);
    far.has("one\ntwo\n");
    let config = format!(
        "peers: {{gpu: {{proxy: 'http://127.0.0.1:{}', refresh: 5, apiKey: k}}}}",
        far.port
    );
    let swapd = Swapd::start(&config);
    let ids = || -> Vec<String> {
        let list = swapd.get("/v1/models").json();
        let rows = list["data"].as_array().unwrap().iter();
        rows.map(|r| r["id"].as_str().unwrap().to_owned()).collect()
    };
    eventually("seen", 5 * SEC, || {
        (ids() == ["gpu/one", "gpu/two"]).then_some(())
    });
    assert_eq!(swapd.chat("two", "").status, 200);
    assert_eq!(swapd.chat("gpu/three", "").status, 404);
    far.has("one\nthree\n");
    eventually("seen again", 15 * SEC, || {
        (ids() == ["gpu/one", "gpu/three"]).then_some(())
    });
    assert_eq!(swapd.chat("gpu/three", "").status, 200);
    let peer = swapd.get("/api/peers").json()["peers"][0].clone();
    assert!(
        peer["up"] == true && peer["models"][0]["listed"] == true,
        "{peer}"
    );
}

/// Two proxies, each the other's peer: over TLS with a certificate that only the test trusts, and in a circle.
#[test]
fn another_swapd_over_tls_and_no_circles() {
    let shown = Certificate::new();
    let back = free_port();
    let other = Swapd::start_with(
        &format!(
            "apiKeys: [k]\nmodels: {{m: {{worker: {{model: DIR}}}}}}\n\
             peers: {{back: {{proxy: 'http://127.0.0.1:{back}', models: [lost]}}}}"
        ),
        &shown.args(),
    );
    let port = other.address.rsplit(':').next().unwrap().to_owned();
    let config =
        format!("peers: {{mac: {{proxy: 'https://localhost:{port}', apiKey: k, models: [m, lost]}}}}");
    let listen = format!("127.0.0.1:{back}");
    let swapd = Swapd::start_env(
        &config,
        &["--listen", &listen],
        &[("SSL_CERT_FILE", shown.args()[1])],
    );
    assert_eq!(swapd.chat("m", "").json()["object"], "chat.completion");
    let stream = swapd.chat("mac/m", r#""stream":true,"events":20,"gap_ms":1"#);
    assert!(
        stream.complete && stream.body.ends_with("data: [DONE]\n\n"),
        "{stream:?}"
    );
    let broken = swapd.chat("mac/m", r#""stream":true,"events":20,"gap_ms":1,"die_after":4"#);
    assert!(
        !broken.complete && broken.body.contains("upstream_died"),
        "{broken:?}"
    );
    let (message, code) = swapd.chat("lost", "").error();
    assert_eq!(code, "peer_loop", "{message}");
    // Without that trust there is no connection, and the reason is told.
    let doubting = Swapd::start(&config);
    let answer = doubting.chat("m", "");
    let (message, _) = answer.error();
    assert!(answer.status == 502 && message.contains("no TLS"), "{message}");
}

#[test]
fn a_reload_and_the_end_let_requests_at_peers_finish() {
    let far = Far::start(&[]);
    let config = format!(
        "peers: {{gpu: {{proxy: 'http://127.0.0.1:{}', models: [m]}}}}",
        far.port
    );
    let mut swapd = Swapd::start(&config);
    let mut first = swapd.chat_open("m", r#""stream":true,"events":50,"gap_ms":10"#);
    first.chunk().unwrap();
    swapd.rewrite("models: {}");
    assert_eq!(swapd.post("/api/reload", "").status, 200);
    assert_eq!(swapd.chat("m", "").status, 404);
    let first = first.finish();
    assert!(first.complete && first.body.ends_with("[DONE]\n\n"));
    swapd.rewrite(&config);
    assert_eq!(swapd.post("/api/reload", "").status, 200);
    let mut last = swapd.chat_open("m", r#""stream":true,"events":50,"gap_ms":10"#);
    last.chunk().unwrap();
    common::signal(swapd.child.id(), nix::sys::signal::Signal::SIGTERM);
    let last = last.finish();
    assert!(last.complete && last.body.ends_with("[DONE]\n\n"), "{last:?}");
    assert_eq!(swapd.exit_code(5 * SEC), Some(0));
}

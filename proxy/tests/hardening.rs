//! Faults of the world around: wedged workers, killed supervisors, strangers, stores without times.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::disallowed_methods
)]

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use common::{Swapd, alive, eventually, expand, fakeworker, signal};
use nix::sys::signal::Signal;
use tempfile::TempDir;

const SEC: Duration = Duration::from_secs(1);

/// A swapd whose registry is at a path of the test's own choice.
fn start_at(dir: TempDir, config: &Path, env: &[(&str, &str)]) -> Swapd {
    let mut child = Command::new(env!("CARGO_BIN_EXE_swapd"))
        .args(["--config", config.to_str().unwrap()])
        .args(["--listen", "127.0.0.1:0", "--watch-config"])
        .env("SWAPD_WORKER", fakeworker())
        .envs(env.iter().copied())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let address = lines
        .by_ref()
        .find_map(|l| Some(l.unwrap().split_once("listening on http://")?.1.to_owned()))
        .expect("swapd ended before it listened");
    std::thread::spawn(move || lines.for_each(drop));
    Swapd {
        child,
        address,
        config: config.to_owned(),
        dir,
    }
}

fn pid(swapd: &Swapd, model: &str) -> u32 {
    let answer = swapd.chat(model, "");
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()["pid"].as_u64().unwrap().try_into().unwrap()
}

fn parent(pid: u32) -> u32 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields = stat.rsplit(')').next().unwrap();
    fields.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn a_worker_without_heartbeat_is_killed_and_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("config.yaml");
    std::fs::write(&config, expand("models: {m: {worker: {model: DIR}}}", &dir)).unwrap();
    let swapd = start_at(dir, &config, &[("SWAPD_WORKER_SILENCE_MS", "4000")]);
    let wedged = pid(&swapd, "m");
    signal(wedged, Signal::SIGSTOP);
    eventually("killed", 10 * SEC, || (!alive(wedged)).then_some(()));
    eventually("told", 3 * SEC, || {
        let log = swapd.get("/logs").body;
        log.contains("no heartbeat for 4000 ms (worker ended with signal SIGKILL)")
            .then_some(())
    });
    assert_ne!(pid(&swapd, "m"), wedged);
}

#[test]
fn sigkill_of_the_supervisor_takes_the_commands_children_along() {
    let swapd = Swapd::start(r#"models: {m: {cmd: 'sh -c "FAKESERVER --port ${PORT} & wait"'}}"#);
    let server = pid(&swapd, "m");
    let shell = parent(server);
    let supervisor = parent(shell);
    assert_eq!(parent(supervisor), swapd.child.id());
    signal(supervisor, Signal::SIGKILL);
    eventually("server gone", 5 * SEC, || (!alive(server)).then_some(()));
    assert_ne!(pid(&swapd, "m"), server, "its port is free again");
}

#[test]
fn without_a_check_the_first_request_waits_until_the_command_listens() {
    let config = "
models:
  m: {cmd: 'FAKESERVER --port ${PORT}', checkEndpoint: none, env: [FAKE_START_MS=500]}
";
    pid(&Swapd::start(config), "m");
}

#[test]
fn a_stranger_on_the_address_that_is_asked_is_seen() {
    // Not the address that a bind to 127.0.0.1 would collide with.
    let stranger = std::net::TcpListener::bind("127.0.0.2:0").unwrap();
    let port = stranger.local_addr().unwrap().port();
    let config = format!(
        "startPort: {port}
models:
  m: {{cmd: 'FAKESERVER --port ${{PORT}}', proxy: 'http://127.0.0.2:${{PORT}}'}}"
    );
    let (message, code) = Swapd::start(&config).chat("m", "").error();
    assert!(message.contains(&format!("port {port} is not free")), "{message}");
    assert!(message.contains("somebody listens on 127.0.0.2"), "{message}");
    assert_eq!(code, "model_start_failed");
}

/// As Nix replaces a generation: no event in the watched directory, equal sizes, every file of the first second.
#[test]
fn a_moved_link_of_a_parent_directory_is_a_change() {
    let dir = tempfile::tempdir().unwrap();
    let current = dir.path().join("current");
    let turn_to = |store: &str| {
        let target = dir.path().join(store);
        std::fs::create_dir(&target).unwrap();
        let file = target.join("config.yaml");
        std::fs::write(&file, format!("models: {{{store}: {{worker: {{model: x}}}}}}")).unwrap();
        let time = SystemTime::UNIX_EPOCH + SEC;
        std::fs::File::open(&file).unwrap().set_modified(time).unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&target, &link).unwrap();
        std::fs::rename(&link, &current).unwrap();
    };
    turn_to("store1");
    let swapd = start_at(tempfile::tempdir().unwrap(), &current.join("config.yaml"), &[]);
    let listed = || swapd.get("/v1/models").json()["data"][0]["id"].clone();
    assert_eq!(listed(), "store1");
    turn_to("store2");
    eventually("taken up", 6 * SEC, || (listed() == "store2").then_some(()));
}

/// The core notices this failure by itself; the lines come from the house.
#[test]
fn a_start_that_takes_too_long_is_told_with_the_last_lines() {
    // 15 s is the least that the registry allows.
    let config = "healthCheckTimeout: 15
models: {m: {worker: {model: DIR, env: [FAKE_CHATTER=3, FAKE_START_MS=60000]}}}";
    let answer = Swapd::start(config).chat("m", "");
    assert_eq!((answer.status, answer.header("retry-after")), (502, Some("1")));
    let (message, code) = answer.error();
    assert!(message.contains("not ready within 15 s"), "{message}");
    assert!(message.contains("chatter 2"), "{message}");
    assert_eq!(code, "model_start_failed");
}

#[test]
fn a_second_sigterm_does_not_wait_for_a_stubborn_process() {
    let config = "
unloadTimeout: 60
models: {m: {worker: {model: DIR, env: [JOURNAL, FAKE_IGNORE_TERM=1]}}}";
    let mut swapd = Swapd::start(config);
    let worker = pid(&swapd, "m");
    signal(swapd.child.id(), Signal::SIGTERM);
    eventually("asked to end", 5 * SEC, || {
        (!swapd.journalled("stop").is_empty()).then_some(())
    });
    signal(swapd.child.id(), Signal::SIGTERM);
    assert_eq!(swapd.exit_code(5 * SEC), Some(0));
    assert!(!alive(worker));
}

#[test]
fn escapes_behind_the_name_reach_the_server_as_written() {
    let swapd = Swapd::start("models: {org/m: {worker: {model: DIR}}}");
    for name in ["org/m", "org%2Fm"] {
        let answer = swapd.get(&format!("/upstream/{name}/files/a%2Fb%2fc?x=%2F"));
        assert_eq!(answer.body, "/files/a%2Fb%2fc?x=%2F");
    }
}

#[test]
fn head_finds_its_model_in_the_query() {
    let swapd = Swapd::start("models: {m: {worker: {model: DIR}}}");
    let reply = swapd.open("HEAD", "/v1/audio/voices?model=m", "", "");
    assert_eq!(reply.status, 200);
}

/// Clients write all of a request before they look for an answer. The connection goes on afterwards.
#[test]
fn a_refusal_reaches_a_client_that_is_still_writing() {
    let swapd = Swapd::start("maxBodySize: 1\napiKeys: [right]\nmodels: {org/m: {worker: {model: DIR}}}");
    let body = " ".repeat(32 << 20);
    let chat = "POST /v1/chat/completions";
    let cases = [
        (chat, "Authorization: Bearer right\r\n", "413"),
        (chat, "Authorization: Bearer wrong\r\n", "401"),
        ("POST /nowhere", "", "404"),
        ("POST /v1/models", "", "405"),
    ];
    let mut stream = TcpStream::connect(&swapd.address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    for (route, headers, status) in cases {
        let length = body.len();
        let head = format!("{route} HTTP/1.1\r\nHost: test\r\nContent-Length: {length}\r\n{headers}\r\n");
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(body.as_bytes()).unwrap();
        let mut reader = BufReader::new(&mut stream);
        let mut lines = reader.by_ref().lines().map(Result::unwrap);
        let first = lines.next().unwrap();
        assert_eq!(first.split(' ').nth(1), Some(status), "{route}: {first}");
        let length = lines
            .take_while(|l| !l.is_empty())
            .filter_map(|l| l.to_lowercase().strip_prefix("content-length: ")?.parse().ok())
            .last();
        let mut answer = vec![0; length.unwrap()];
        reader.read_exact(&mut answer).unwrap();
        let answer: serde_json::Value = serde_json::from_slice(&answer).unwrap();
        assert!(answer["error"]["message"].is_string(), "{answer}");
    }
}

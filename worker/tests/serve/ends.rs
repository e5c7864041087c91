//! Drain, signals, and a proxy that goes away.

use std::io::{BufRead, BufReader, Read};
use std::time::{Duration, Instant};

use api_types::control::{ProxyCommand, WorkerEvent};
use serde_json::Value;

use super::support::*;

/// A step that takes longer than it may: the client is told, and the process ends with the reason.
#[test]
fn a_step_without_end_ends_the_worker() {
    let flags = ["--watchdog-seconds", "0.02", "--prefill-step-size", "4096"];
    let mut worker = Worker::supervised(&demo(), &flags);
    let (port, _) = worker.ready();
    let mut long = chat(4);
    long["messages"][0]["content"] = "one two three four five six seven ".repeat(180).into();
    let (status, text) = ask(port, "/v1/chat/completions", &long);
    assert!(
        status == 503 || text.contains("event: error") || text.contains("\"error\""),
        "{text}"
    );
    assert!(text.contains("--watchdog-seconds 0.02"), "{text}");
    let fatal = loop {
        match worker.event().expect("the reason is told before the end") {
            WorkerEvent::Fatal { message } => break message,
            WorkerEvent::Heartbeat(_) => {}
            other => panic!("{other:?}"),
        }
    };
    assert!(fatal.contains("a step has not ended for"), "{fatal}");
    assert_eq!(worker.ended_within(Duration::from_secs(10)).code(), Some(1));
}

#[test]
fn a_worker_ends_with_its_proxy() {
    let mut worker = Worker::supervised(&demo(), &[]);
    let (port, _) = worker.ready();
    let mut running = send(port, "/v1/chat/completions", &chat(4000));
    let mut first = [0; 64];
    running.read_exact(&mut first).unwrap();
    let gone = Instant::now();
    worker.socket = None;
    let status = worker.ended_within(Duration::from_secs(10));
    assert_eq!(status.code(), Some(0), "{status:?}");
    assert!(gone.elapsed() < Duration::from_secs(2), "{:?}", gone.elapsed());
}

#[test]
fn a_proxy_that_goes_while_the_model_loads() {
    let mut worker = Worker::supervised(&demo(), &[]);
    worker.socket = None;
    assert_eq!(worker.ended_within(Duration::from_secs(20)).code(), Some(0));
}

#[test]
fn draining_finishes_what_runs() {
    let mut worker = Worker::supervised(&demo(), &[]);
    let (port, _) = worker.ready();
    let mut running = send(port, "/v1/chat/completions", &chat(300));
    let mut first = [0; 64];
    running.read_exact(&mut first).unwrap();
    worker.command(ProxyCommand::Drain);
    let refused = loop {
        let (status, text) = ask(port, "/v1/chat/completions", &chat(1));
        if status != 200 {
            break (status, text);
        }
    };
    assert!(
        refused.0 == 503 && refused.1.contains("\"code\":\"draining\""),
        "{refused:?}"
    );
    let mut rest = String::new();
    running.read_to_string(&mut rest).unwrap();
    assert!(
        rest.contains("\"finish_reason\":\"length\"") && rest.contains("data: [DONE]"),
        "{rest}"
    );
    worker.command(ProxyCommand::Stop);
    assert_eq!(worker.ended_within(Duration::from_secs(10)).code(), Some(0));
}

#[test]
fn on_its_own_it_prints_its_address_and_ends_on_sigterm() {
    let mut child = program(&demo(), &[]).spawn().unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut port = None;
    let mut line = String::new();
    while port.is_none() && stderr.read_line(&mut line).unwrap() > 0 {
        let address = line
            .split("http://127.0.0.1:")
            .nth(1)
            .and_then(|rest| rest.split('/').next());
        port = address.and_then(|port| port.parse::<u16>().ok());
        line.clear();
    }
    let mut worker = Worker {
        child,
        socket: None,
        progress: Vec::new(),
    };
    let port = port.expect("no address on stderr");
    let (status, text) = ask(port, "/health", &Value::Null);
    assert_eq!(status, 200, "{text}");
    let (status, text) = ask(port, "/v1/chat/completions", &chat(1));
    assert!(
        status == 404 && text.contains("model_not_found"),
        "no proxy has chosen the model: {text}"
    );
    let mut long = chat(300);
    long["model"] = "model".into();
    let mut running = send(port, "/v1/chat/completions", &long);
    let mut first = [0; 64];
    running.read_exact(&mut first).unwrap();
    worker.signal(nix::sys::signal::Signal::SIGTERM);
    let mut rest = String::new();
    running.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("data: [DONE]"), "what runs is finished: {rest}");
    worker.child.stderr = Some(stderr.into_inner());
    assert_eq!(worker.ended_within(Duration::from_secs(20)).code(), Some(0));
}

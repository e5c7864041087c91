//! The real program with the demo model on MLX: hand-shake, heartbeat, drain, signals, and every way not to start.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use api_types::control::{CONTROL_ENV, CONTROL_STDIN, ProxyCommand, WorkerEvent, to_line};
use serde_json::{Value, json};

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo/model")
}

fn program(model: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mlxworker"));
    command
        .arg("serve")
        .arg(model)
        .args(arguments)
        .env_remove(CONTROL_ENV)
        .env_remove("RUST_LOG");
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    command
}

/// A worker that dies with the test.
struct Worker {
    child: Child,
    socket: Option<BufReader<UnixStream>>,
    /// What has been heard of its start: phase, done, total.
    progress: Vec<(String, u64, u64)>,
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Worker {
    /// Under control, as swapd starts it.
    fn supervised(model: &Path, arguments: &[&str]) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let child = program(model, arguments)
            .env(CONTROL_ENV, CONTROL_STDIN)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .spawn()
            .unwrap();
        Self {
            child,
            socket: Some(BufReader::new(ours)),
            progress: Vec::new(),
        }
    }

    fn event(&mut self) -> Option<WorkerEvent> {
        let mut line = String::new();
        let n = self.socket.as_mut().unwrap().read_line(&mut line).unwrap();
        (n > 0).then(|| serde_json::from_str(&line).unwrap())
    }

    /// Skips what comes before the announcement.
    fn ready(&mut self) -> (u16, Value) {
        loop {
            match self.event().expect("the worker is gone before it was ready") {
                WorkerEvent::Ready {
                    port,
                    pid,
                    model,
                    limits,
                } => {
                    assert_eq!(pid, self.child.id());
                    return (port, json!({"model": model, "limits": limits}));
                }
                WorkerEvent::Loading { phase, done, total } => {
                    let phases = ["weights", "pages", "warm-up", "warm-prompts"];
                    assert!(phases.contains(&phase.as_str()) && done <= total && total > 0);
                    self.progress.push((phase, done, total));
                }
                other => panic!("{other:?}"),
            }
        }
    }

    fn command(&mut self, command: ProxyCommand) {
        let socket = self.socket.as_mut().unwrap().get_mut();
        socket.write_all(to_line(&command).unwrap().as_bytes()).unwrap();
    }

    fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        nix::sys::signal::kill(pid, signal).unwrap();
    }

    /// Waits for the end, at most that long.
    fn ended_within(&mut self, limit: Duration) -> ExitStatus {
        let (sender, receiver) = std::sync::mpsc::channel();
        let stderr = self.child.stderr.take().unwrap();
        // The pipe closes with the process.
        std::thread::spawn(move || {
            let _ = sender.send(std::io::read_to_string(stderr));
        });
        receiver
            .recv_timeout(limit)
            .expect("the worker has not ended in time")
            .unwrap();
        self.child.wait().unwrap()
    }
}

/// Sends a request; gives status and body once the whole answer is here, and what was cut off as it is.
fn ask(port: u16, path: &str, body: &Value) -> (u16, String) {
    let mut stream = send(port, path, body);
    let mut text = String::new();
    let _ = stream.read_to_string(&mut text);
    let status = text
        .split(' ')
        .nth(1)
        .unwrap_or_else(|| panic!("{text:?}"))
        .parse()
        .unwrap();
    (status, text)
}

fn send(port: u16, path: &str, body: &Value) -> TcpStream {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let body = body.to_string();
    let method = if body == "null" { "GET" } else { "POST" };
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    stream
}

fn chat(max_tokens: usize) -> Value {
    json!({"messages": [{"role": "user", "content": "hello"}], "max_tokens": max_tokens, "temperature": 0,
           "ignore_eos": true, "stream": true, "model": "whatever the registry calls it"})
}

#[test]
fn a_proxy_gets_ready_heartbeats_and_answers() {
    let mut worker = Worker::supervised(&demo(), &["--served-model-name", "tiny", "--max-num-seqs", "2"]);
    let (port, ready) = worker.ready();
    assert_eq!(ready["model"], "tiny");
    assert_eq!(ready["limits"]["max_running"], 2);
    assert!(ready["limits"]["load_seconds"].as_f64().unwrap() > 0.0, "{ready}");
    assert!(
        ready["limits"]["load_resident_bytes"].as_u64().unwrap() > 10 << 20,
        "{ready}"
    );
    let (status, text) = ask(port, "/v1/chat/completions", &chat(8));
    assert_eq!(status, 200, "{text}");
    assert!(text.contains("data: [DONE]"), "{text}");
    // The first ones may have been sent before the request was worked on.
    let mut beats = Vec::new();
    while beats
        .last()
        .is_none_or(|beat: &api_types::control::Heartbeat| beat.steps < 8)
    {
        assert!(beats.len() < 30, "{beats:?}");
        if let WorkerEvent::Heartbeat(beat) = worker.event().unwrap() {
            beats.push(beat);
        }
    }
    assert!(beats.last().unwrap().active_bytes > 0, "{beats:?}");
    assert!(beats.last().unwrap().footprint_bytes > 0, "{beats:?}");
    worker.command(ProxyCommand::Stop);
    assert_eq!(worker.ended_within(Duration::from_secs(10)).code(), Some(0));
}

/// MLX reads its variables when it is first used: they are there before, under the same process id.
#[test]
#[cfg(target_os = "linux")]
fn mlx_variables_are_in_the_environment_from_the_start() {
    let flags = ["--mlx-max-ops-per-buffer", "17", "--mlx-max-mb-per-buffer=23"];
    let mut worker = Worker::supervised(&demo(), &flags);
    let (_, ready) = worker.ready();
    assert_eq!(ready["limits"]["mlx_max_ops_per_buffer"], 17);
    assert_eq!(ready["limits"]["mlx_max_mb_per_buffer"], 23);
    let environment = std::fs::read(format!("/proc/{}/environ", worker.child.id())).unwrap();
    let environment = String::from_utf8_lossy(&environment);
    let variables: Vec<&str> = environment.split('\0').collect();
    for variable in ["MLX_MAX_OPS_PER_BUFFER=17", "MLX_MAX_MB_PER_BUFFER=23"] {
        assert!(variables.contains(&variable), "{variables:?}");
    }
    assert!(variables.contains(&"MLXWORKER_CONTROL=stdin"));
}

/// What a proxy was told of its own log says nothing of the worker's.
#[test]
fn a_log_level_that_is_given_goes_before_the_environment() {
    let said = |variable: &str, arguments: &[&str]| {
        // Ends once it has loaded: there is no kernel on a CPU.
        let mut arguments = arguments.to_vec();
        arguments.extend(["--attention", "kernel", "--download-retries", "3"]);
        let output = program(&demo(), &arguments)
            .env("RUST_LOG", variable)
            .output()
            .unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        (text.contains(" INFO "), text.contains("DEBUG"), text)
    };
    let (info, debug, text) = said("swapd=debug", &[]);
    assert!(info && !debug, "{text}");
    assert!(
        text.contains("--download-retries 3 has no meaning here"),
        "{text}"
    );
    let (info, debug, text) = said("mlxworker=debug,warn", &["--log-level", "info"]);
    assert!(info && !debug, "{text}");
    let (info, _, text) = said("mlxworker=error", &[]);
    assert!(!info, "{text}");
    let (info, _, text) = said("mlxworker=debug", &["--log-level", "warn"]);
    assert!(!info, "{text}");
}

/// A benchmark takes the flags of a worker, and means them.
#[test]
fn a_benchmark_minds_the_flags_of_serve() {
    let output = Command::new(env!("CARGO_BIN_EXE_mlxworker"))
        .arg("bench")
        .arg(demo())
        .args(["--prompt-tokens", "4", "--tokens", "4", "--rounds", "1"])
        .args(["--mlx-max-ops-per-buffer", "17", "--download-retries", "3"])
        .env_remove("RUST_LOG")
        .env_remove(CONTROL_ENV)
        .env("MLX_MAX_OPS_PER_BUFFER", "99")
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{stderr}");
    assert!(
        stderr.contains("--download-retries 3 has no meaning here"),
        "{stderr}"
    );
    assert!(stderr.contains("MLX_MAX_OPS_PER_BUFFER=17"), "{stderr}");
}

/// However weights come into memory, the replies are the same.
#[test]
fn weights_can_be_read_instead_of_mapped() {
    let replies = ["mmap", "read"].map(|how| {
        let mut worker = Worker::supervised(&demo(), &["--weights", how]);
        let (port, ready) = worker.ready();
        let copied = ready["limits"]["weights_copied_bytes"].as_u64().unwrap();
        assert!(how == "mmap" || copied > 1 << 20, "{ready}");
        let between =
            |(phase, done, total): &&(String, u64, u64)| phase == "weights" && *done > 0 && done < total;
        let heard = worker.progress.iter().filter(between).count();
        assert!(heard > 5, "while the files are read: {:?}", worker.progress);
        let mut body = chat(16);
        body["stream"] = false.into();
        let (status, text) = ask(port, "/v1/chat/completions", &body);
        assert_eq!(status, 200, "{text}");
        let (_, json) = text.split_once("\r\n\r\n").unwrap();
        serde_json::from_str::<Value>(json).unwrap()["choices"][0]["message"]["content"].clone()
    });
    assert_eq!(replies[0], replies[1]);
}

/// The last resort for long contexts, as a user gets it: more tokens in the same reservation, and `/status` says why.
#[test]
fn a_quantised_kv_cache_answers_and_is_reported() {
    let reservation = ["--cache-memory-mb", "16"];
    let capacity = |flags: &[&str]| {
        let mut worker = Worker::supervised(&demo(), &[&reservation, flags].concat());
        let (port, ready) = worker.ready();
        let (status, text) = ask(port, "/v1/chat/completions", &chat(24));
        assert_eq!(status, 200, "{text}");
        assert!(text.contains("data: [DONE]"), "{text}");
        let (status, text) = ask(port, "/status", &Value::Null);
        assert_eq!(status, 200, "{text}");
        let (_, json) = text.split_once("\r\n\r\n").unwrap();
        let limits = serde_json::from_str::<Value>(json).unwrap()["limits"]["engine"].clone();
        assert_eq!(limits["kv_tokens"], ready["limits"]["kv_tokens"]);
        limits
    };
    let plain = capacity(&[]);
    assert!(plain["kv_bits"].is_null(), "{plain}");
    let limits = capacity(&["--kv-cache-quantization"]);
    assert_eq!(
        (&limits["kv_bits"], &limits["kv_group_size"]),
        (&json!(8), &json!(64)),
        "{limits}"
    );
    let reason = limits["decoding"]["reason"].as_str().unwrap();
    assert!(reason.contains("not quantised"), "{limits}");
    // A head of 64 float32 values: 256 bytes before, 64 and one scale and bias now.
    let tokens = |limits: &Value| limits["kv_tokens"].as_u64().unwrap();
    let expected = tokens(&plain) * 256 / 72;
    assert!(
        tokens(&limits).abs_diff(expected) <= 32,
        "{} of {expected}",
        tokens(&limits)
    );
}

/// What cannot fit is refused before the weights are loaded, and the message can be checked by hand.
#[test]
fn a_cache_larger_than_the_machine_is_refused_with_the_arithmetic() {
    let (code, message) = start_broken(
        &["--cache-memory-mb", "1048576", "--context-length", "4096"],
        |_| {},
    );
    assert_eq!(code, Some(1), "{message}");
    for part in [
        "does not fit into memory",
        "weights",
        "KV cache 1048576",
        "largest step",
        "(estimated)",
        "kept buffers",
        "head-room",
        "--gpu-memory-utilization 0.5 of the",
        "MiB are missing",
    ] {
        assert!(message.contains(part), "{part:?} is not in {message:?}");
    }
}

/// The plan in force and what the process really takes are both to be seen, and agree.
#[test]
fn the_plan_and_the_process_are_shown() {
    let mut worker = Worker::supervised(&demo(), &["--cache-memory-mb", "64"]);
    let (port, ready) = worker.ready();
    let limits = &ready["limits"];
    let number = |name: &str| {
        limits[name]
            .as_u64()
            .unwrap_or_else(|| panic!("{name}: {limits}"))
    };
    // On the CPU the warm-up leaves out the longest context, for which the estimate stands.
    let from = if limits["memory_device"] == "cpu" {
        "estimated"
    } else {
        "measured"
    };
    assert_eq!(limits["step_bytes_from"], from, "{limits}");
    assert!(
        number("kv_bytes") <= 64 << 20 && number("step_bytes") > 0,
        "{limits}"
    );
    assert!(
        number("memory_planned_bytes") <= number("memory_ceiling_bytes"),
        "{limits}"
    );
    assert_eq!(ask(port, "/v1/chat/completions", &chat(8)).0, 200);
    let (status, text) = ask(port, "/status", &Value::Null);
    assert_eq!(status, 200, "{text}");
    let (_, json) = text.split_once("\r\n\r\n").unwrap();
    let process = serde_json::from_str::<Value>(json).unwrap()["memory"]["process"].clone();
    assert_eq!(process["planned_bytes"], number("memory_planned_bytes"));
    assert!(
        process["drift_bytes"].as_i64().unwrap() < 0,
        "the demo model stays within its plan: {process}"
    );
    assert_eq!(process["looks_over_plan"], 0);
}

/// A KV cache smaller than the context: replies are clamped aloud, prompts refused with the numbers, and the models' list
/// promises no more.
#[test]
fn what_the_cache_has_no_room_for_is_said() {
    let mut worker = Worker::supervised(&demo(), &["--max-cache-blocks", "4", "--block-size", "32"]);
    let (port, _) = worker.ready();
    let (status, text) = ask(port, "/v1/models", &Value::Null);
    assert!(status == 200 && text.contains("\"max_model_len\":128"), "{text}");
    let mut body = chat(1000);
    body["stream"] = false.into();
    let (status, text) = ask(port, "/v1/chat/completions", &body);
    assert_eq!(status, 200, "{text}");
    let header = "x-max-tokens-clamped: asked=1000, allowed=";
    assert!(text.to_ascii_lowercase().contains(header), "{text}");
    body["messages"] = json!([{"role": "user", "content": "word ".repeat(300)}]);
    let (status, text) = ask(port, "/v1/chat/completions", &body);
    assert_eq!(status, 400, "{text}");
    for part in ["never_fits", "holds 128 tokens", "--cache-memory-mb"] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
}

/// What is computed at start is cached for the first request.
#[test]
fn warm_prompts_are_known_to_the_prefix_cache() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("prompts.json");
    let system = json!({"role": "system", "content": "You are told many things. ".repeat(30)});
    std::fs::write(
        &file,
        json!([[system, {"role": "user", "content": "Hi"}]]).to_string(),
    )
    .unwrap();
    let mut worker = Worker::supervised(&demo(), &["--warm-prompts", file.to_str().unwrap()]);
    let (port, _) = worker.ready();
    // A proxy gives up who is silent for long: every phase of a start is heard of.
    for phase in ["weights", "warm-up", "warm-prompts"] {
        let of = |at: fn(u64, u64) -> bool| {
            let mut all = worker.progress.iter();
            all.any(|(name, done, total)| name == phase && at(*done, *total))
        };
        assert!(
            of(|done, _| done == 0) && of(|done, total| done == total),
            "{phase}"
        );
    }
    let mut body = chat(1);
    body["stream"] = false.into();
    body["messages"] = json!([system, {"role": "user", "content": "Another question"}]);
    let (status, text) = ask(port, "/v1/chat/completions", &body);
    assert_eq!(status, 200, "{text}");
    let (_, json) = text.split_once("\r\n\r\n").unwrap();
    let usage = serde_json::from_str::<Value>(json).unwrap()["usage"].clone();
    let (prompt, cached) = (
        &usage["prompt_tokens"],
        &usage["prompt_tokens_details"]["cached_tokens"],
    );
    assert!(cached.as_u64().unwrap() * 2 > prompt.as_u64().unwrap(), "{usage}");
    let (code, message) = start_broken(&["--warm-prompts", "/no/such/file.json"], |_| {});
    assert!(
        code == Some(1) && message.contains("--warm-prompts /no/such/file.json"),
        "{message}"
    );
}

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

/// Copies the demo model, lets `break_it` do its work, and gives exit code and message.
fn start_broken(arguments: &[&str], break_it: impl FnOnce(&Path)) -> (Option<i32>, String) {
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(demo()).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    break_it(folder.path());
    let mut worker = Worker::supervised(folder.path(), arguments);
    let mut fatal = None;
    while let Some(event) = worker.event() {
        match event {
            WorkerEvent::Fatal { message } => fatal = Some(message),
            WorkerEvent::Loading { .. } => {}
            other => panic!("announced, though broken: {other:?}"),
        }
    }
    let mut stderr = String::new();
    worker
        .child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut stderr)
        .unwrap();
    let code = worker.child.wait().unwrap().code();
    let fatal = fatal.unwrap_or_else(|| panic!("no fatal event; stderr: {stderr}"));
    assert!(
        stderr.contains(&fatal),
        "told to proxy and terminal alike: {stderr}"
    );
    (code, fatal)
}

#[test]
fn what_cannot_be_loaded_is_named() {
    let write = |name: &'static str, text: &'static str| {
        move |folder: &Path| std::fs::write(folder.join(name), text).unwrap()
    };
    let remove = |name: &'static str| move |folder: &Path| std::fs::remove_file(folder.join(name)).unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    type Case<'a> = (&'a [&'a str], Box<dyn FnOnce(&Path)>, &'a [&'a str]);
    let cases: [Case<'_>; 13] = [
        (&[], Box::new(remove("config.json")), &["config.json"]),
        (
            &[],
            Box::new(write("config.json", "{\"model_type\": \"mamba\"}")),
            &["config.json", "mamba"],
        ),
        (&[], Box::new(remove("tokenizer.json")), &["tokenizer.json"]),
        (&[], Box::new(write("tokenizer.json", "{}")), &["tokenizer.json"]),
        (
            &[],
            Box::new(write("tokenizer_config.json", "{")),
            &["tokenizer_config.json"],
        ),
        (
            &[],
            Box::new(write("generation_config.json", "{\"top_p\": 9}")),
            &["generation_config.json", "top_p: 9"],
        ),
        (
            &[],
            Box::new(write("chat_template.jinja", "{% if %}")),
            &["template", "line 1"],
        ),
        (&[], Box::new(remove("model.safetensors")), &["safetensors"]),
        (
            &[],
            Box::new(|folder: &Path| {
                let path = folder.join("model.safetensors");
                let bytes = std::fs::read(&path).unwrap();
                std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
            }),
            &["model.safetensors"],
        ),
        (
            &["--context-length", "999999"],
            Box::new(|_: &Path| {}),
            &["context-length", "999999", "4096"],
        ),
        (
            &[
                "--kv-cache-quantization",
                "--kv-cache-quantization-group-size",
                "128",
            ],
            Box::new(|_: &Path| {}),
            &[
                "--kv-cache-quantization-group-size 128",
                "head size, 64",
                "32 or 64",
            ],
        ),
        (
            // None on a CPU.
            &["--attention", "kernel"],
            Box::new(|_: &Path| {}),
            &["--attention kernel", "no kernel"],
        ),
        (&["--port", &port], Box::new(|_: &Path| {}), &["--port", &port]),
    ];
    for (arguments, break_it, parts) in cases {
        let (code, message) = start_broken(arguments, break_it);
        assert_eq!(code, Some(1), "{message}");
        for part in parts {
            assert!(message.contains(part), "{part:?} is not in {message:?}");
        }
    }
}

#[test]
fn a_command_line_that_makes_no_sense() {
    for (arguments, part) in [
        (vec!["serve"], "which model"),
        (vec!["serve", "m", "--max-num-seq", "3"], "--max-num-seqs"),
        (vec!["serve", "m", "--draft-model", "x"], "--draft-model"),
        (vec!["sevre"], "serve"),
        (
            vec!["serve", "m", "--attention", "kernel", "--kv-cache-quantization"],
            "--attention kernel and --kv-cache-quantization",
        ),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_mlxworker"))
            .args(&arguments)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(stderr.contains(part), "{arguments:?}: {stderr}");
    }
    let output = Command::new(env!("CARGO_BIN_EXE_mlxworker"))
        .arg("--help")
        .output()
        .unwrap();
    assert!(
        output.status.success()
            && String::from_utf8(output.stdout)
                .unwrap()
                .contains("--max-num-seqs")
    );
}

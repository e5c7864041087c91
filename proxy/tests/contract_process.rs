//! Lines of llama-swap's contract about processes and configuration that no other test has, and what it does badly.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::disallowed_methods
)]

mod common;

use std::process::Command;
use std::time::{Duration, Instant};

use common::{Swapd, alive, eventually, signal};
use nix::sys::signal::Signal;

const SOON: Duration = Duration::from_secs(5);

fn pid(swapd: &Swapd, model: &str) -> u64 {
    let running = swapd.running();
    let row = running.iter().find(|r| r["model"] == model).unwrap();
    row["pid"].as_u64().unwrap()
}

#[test]
fn a_command_of_its_own_stops_the_model() {
    let swapd = Swapd::start(
        "models:
  m:
    cmd: |
      # a comment
      FAKESERVER \\
        --port ${PORT}
    checkEndpoint: /
    env: [JOURNAL]
    cmdStop: 'sh -c \"echo ${PID} ${MODEL_ID} > DIR/stopped; kill -TERM ${PID}\"'
",
    );
    assert_eq!(swapd.chat("m", "").status, 200);
    let (_, server) = swapd.journalled("ready")[0];
    assert_eq!(swapd.get("/unload").body, "OK");
    let told = std::fs::read_to_string(swapd.dir.path().join("stopped")).unwrap();
    let told: Vec<&str> = told.split_whitespace().collect();
    assert_eq!(told, [server.to_string().as_str(), "m"]);
    assert!(!alive(server));
    assert_eq!(swapd.journalled("term").len(), 1);
}

/// Neither one that has nothing left to stop nor one that stops nothing.
#[test]
fn a_stop_command_that_hangs_is_ended() {
    for (kill, end) in [
        ("kill -TERM ${PID};", false),
        ("", false),
        ("kill -TERM ${PID};", true),
    ] {
        let mut swapd = Swapd::start(&format!(
            "unloadTimeout: 1
models:
  m:
    cmd: 'FAKESERVER --port ${{PORT}}'
    env: [JOURNAL]
    cmdStop: 'sh -c \"echo $$ > DIR/stopper; {kill} sleep 600; true\"'
"
        ));
        assert_eq!(swapd.chat("m", "").status, 200);
        let (_, server) = swapd.journalled("ready")[0];
        let begun = Instant::now();
        if end {
            signal(swapd.child.id(), Signal::SIGTERM);
            assert_eq!(swapd.exit_code(SOON), Some(0));
        } else {
            assert_eq!(swapd.get("/unload").body, "OK");
        }
        assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
        let stopper = std::fs::read_to_string(swapd.dir.path().join("stopper")).unwrap();
        assert!(
            !alive(server) && !alive(stopper.trim().parse().unwrap()),
            "{kill} {end}"
        );
    }
}

/// It may have more to do than to end the command.
#[test]
fn a_stop_command_goes_on_when_the_model_has_ended() {
    let swapd = Swapd::start(
        "models:
  m:
    cmd: 'FAKESERVER --port ${PORT}'
    env: [JOURNAL]
    cmdStop: 'sh -c \"kill -TERM ${PID}; sleep 1.5; echo all > DIR/done\"'
",
    );
    assert_eq!(swapd.chat("m", "").status, 200);
    assert_eq!(swapd.get("/unload").body, "OK");
    let done = std::fs::read_to_string(swapd.dir.path().join("done"));
    assert_eq!(done.unwrap(), "all\n", "{}", swapd.get("/logs").body);
}

#[test]
fn models_are_preloaded_one_after_the_other() {
    let model = |id: &str| format!("  {id}: {{worker: {{model: DIR, env: [JOURNAL, FAKE_START_MS=200]}}}}\n");
    let swapd = Swapd::start(&format!(
        "models:\n{}groups: {{all: {{swap: false, members: [a, b, c]}}}}
hooks: {{on_startup: {{preload: [c, a, b]}}}}",
        ["a", "b", "c"].map(model).concat()
    ));
    eventually("all are ready", SOON, || {
        (swapd.journalled("ready").len() == 3).then_some(())
    });
    let journal = swapd.journal();
    let events: Vec<&str> = journal.lines().filter_map(|l| l.rsplit(' ').next()).collect();
    assert_eq!(events, ["start", "ready"].repeat(3), "{journal}");
    let order = |model: &str| {
        let pid = u32::try_from(pid(&swapd, model)).unwrap();
        swapd.journalled("ready").iter().position(|(_, p)| *p == pid)
    };
    eventually("the last is known as ready", SOON, || {
        (swapd.state("b") == "ready").then_some(())
    });
    assert_eq!(["c", "a", "b"].map(order), [Some(0), Some(1), Some(2)]);
}

#[test]
fn a_matrix_lets_sets_live_together_and_evicts_the_cheapest() {
    let swapd = Swapd::start(
        "models:
  a: {worker: {model: DIR}}
  b: {worker: {model: DIR}}
  c: {worker: {model: DIR}}
matrix:
  vars: {x: a, y: b, z: c}
  evict_costs: {x: 10}
  sets: {one: x & y, two: x & z}
",
    );
    for model in ["a", "b"] {
        assert_eq!(swapd.chat(model, "").status, 200);
    }
    let first = pid(&swapd, "a");
    assert_eq!(swapd.chat("c", "").status, 200);
    assert_eq!(
        (swapd.state("a"), swapd.state("b"), swapd.state("c")),
        ("ready".into(), "stopped".into(), "ready".into())
    );
    assert_eq!(pid(&swapd, "a"), first, "it was in the way of nobody");
}

#[test]
fn a_group_that_is_not_exclusive_or_persistent() {
    let swapd = Swapd::start(
        "models:
  big1: {worker: {model: DIR}}
  big2: {worker: {model: DIR}}
  small: {worker: {model: DIR}}
  kept: {worker: {model: DIR}}
groups:
  bigs: {members: [big1, big2]}
  smalls: {swap: false, exclusive: false, members: [small]}
  forever: {swap: false, exclusive: false, persistent: true, members: [kept]}
",
    );
    let states = || ["big1", "big2", "small", "kept"].map(|m| swapd.state(m));
    for model in ["kept", "big1", "small"] {
        assert_eq!(swapd.chat(model, "").status, 200);
    }
    assert_eq!(
        states(),
        ["ready", "stopped", "ready", "ready"],
        "small drives nobody out"
    );
    assert_eq!(swapd.chat("big2", "").status, 200);
    assert_eq!(
        states(),
        ["stopped", "ready", "stopped", "ready"],
        "big2 takes all but what is persistent"
    );
}

#[test]
fn steady_traffic_on_one_model_does_not_starve_another() {
    // llama-swap: for ever.
    let swapd = Swapd::start(
        "models: {a: {worker: {model: DIR}}, b: {worker: {model: DIR}}}
routing: {scheduler: {settings: {fifo: {maxWait: 1, maxPassed: 100000}}}}",
    );
    assert_eq!(swapd.chat("a", "").status, 200);
    let over = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !over.load(std::sync::atomic::Ordering::Relaxed) {
                    assert_eq!(swapd.chat("a", r#""delay_ms":20"#).status, 200);
                }
            });
        }
        let begun = Instant::now();
        let answer = swapd.chat("b", "");
        over.store(true, std::sync::atomic::Ordering::Relaxed);
        assert_eq!(answer.status, 200);
        assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    });
}

#[test]
fn a_load_whose_client_left_keeps_its_time_to_live() {
    // llama-swap: unloaded a second after it was ready.
    let swapd =
        Swapd::start("models: {m: {worker: {model: DIR}, ttl: 3, env: ['FAKE_START_MS=300', JOURNAL]}}");
    let client = std::net::TcpStream::connect(&swapd.address).unwrap();
    let body = common::chat_body("m", "");
    let text = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    std::io::Write::write_all(&mut &client, text.as_bytes()).unwrap();
    eventually("it starts", SOON, || {
        (swapd.state("m") == "starting").then_some(())
    });
    drop(client);
    eventually("it is ready all the same", SOON, || {
        (swapd.state("m") == "ready").then_some(())
    });
    let ready = Instant::now();
    eventually("its time is over", SOON, || {
        (swapd.state("m") == "stopped").then_some(())
    });
    assert!(
        ready.elapsed() > Duration::from_millis(2_500),
        "{:?}",
        ready.elapsed()
    );
}

#[test]
fn several_files_are_one_configuration() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(
        dir.path().join("10-a.yaml"),
        "models: {a: {cmd: 'a --port ${PORT}', aliases: [first]}}",
    )
    .unwrap();
    std::fs::write(
        dir.path().join("20-b.yml"),
        "models: {b: {cmd: 'b --port ${PORT}'}}\nttl: 3",
    )
    .unwrap();
    std::fs::write(dir.path().join("notes.txt"), "no configuration").unwrap();
    let more = dir.path().join("more");
    std::fs::create_dir(&more).unwrap();
    let swapd = Swapd::start_with(
        "models: {c: {worker: {model: DIR}}}",
        &["--config-dir", dir.path().to_str().unwrap()],
    );
    let listed = swapd.get("/v1/models").json();
    let ids: Vec<&str> = listed["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| m["id"].as_str().unwrap())
        .collect();
    assert_eq!(ids, ["a", "b", "c"]);
    assert_eq!(swapd.get("/v1/models/first").json()["id"], "a");
    // The same model in two files is an error that names both, and so is one setting with two values.
    std::fs::write(
        dir.path().join("30-c.yaml"),
        "models: {a: {cmd: 'x'}}\nstartPort: 7000",
    )
    .unwrap();
    std::fs::write(dir.path().join("40-d.yaml"), "startPort: 7001").unwrap();
    let check = Command::new(env!("CARGO_BIN_EXE_swapd"))
        .args(["check", "--config-dir", dir.path().to_str().unwrap()])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&check.stderr).into_owned();
    assert_eq!(check.status.code(), Some(1));
    for part in ["30-c.yaml", "40-d.yaml", "models", "startPort"] {
        assert!(said.contains(part), "{part} in {said}");
    }
}

#[test]
fn what_llama_swap_lets_pass_is_found_before_it_serves() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("c.yaml");
    for (config, wanted) in [
        ("models: {a: {}}", "cmd"),
        (
            "models: {a: {cmd: 'x --port ${PORT}', aliases: [b]}, b: {cmd: 'y --port ${PORT}'}}",
            "`b` is the id of a model",
        ),
        (
            "models: {a: {cmd: 'x --port ${PORT}'}}\ngroups: {g: {members: [nobody]}}",
            "nobody",
        ),
        (
            "models: {a: {cmd: 'x --port ${PORT}', concurencyLimit: 3}}",
            "concurrencyLimit",
        ),
    ] {
        std::fs::write(&file, config).unwrap();
        let check = Command::new(env!("CARGO_BIN_EXE_swapd"))
            .args(["check", "--config"])
            .arg(&file)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&check.stderr).into_owned();
        assert_eq!(check.status.code(), Some(1), "{config}: {said}");
        assert!(
            said.contains("c.yaml:") && said.contains(wanted),
            "{config}: {said}"
        );
    }
    // A drop-in file must start: what only loses its effect is a warning.
    std::fs::write(
        &file,
        "models: {a: {cmd: 'x --port ${PORT}'}}\nhooks: {on_startup: {preload: [nothing]}}",
    )
    .unwrap();
    let check = Command::new(env!("CARGO_BIN_EXE_swapd"))
        .args(["check", "--config"])
        .arg(&file)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&check.stderr).into_owned();
    assert!(
        check.status.success() && said.contains("warning") && said.contains("`nothing`"),
        "{said}"
    );
}

#[test]
fn logs_are_there_whatever_goes_to_standard_output() {
    for (wanted, own, models) in [
        ("none", false, false),
        ("upstream", false, true),
        ("proxy", true, false),
        ("both", true, true),
    ] {
        let (mut swapd, out) = Swapd::start_silent(&format!(
            "models: {{m: {{worker: {{model: DIR}}, env: ['FAKE_CHATTER=3']}}}}\nlogToStdout: {wanted}"
        ));
        assert_eq!(swapd.chat("m", "").status, 200);
        let log = swapd.get("/logs").body;
        assert!(
            log.contains("[INFO] listening on") && log.contains("chatter 2"),
            "{wanted}: {log}"
        );
        let mut of_model = swapd.open("GET", "/logs/stream/m", "", "");
        let lines = of_model.chunk().unwrap().unwrap();
        assert!(
            lines.contains("chatter 0") && !lines.contains("listening"),
            "{wanted}: {lines}"
        );
        drop(of_model);
        signal(swapd.child.id(), Signal::SIGTERM);
        assert_eq!(swapd.exit_code(SOON), Some(0));
        let out = out.join().unwrap();
        let found = (out.contains("[INFO] listening on"), out.contains("chatter 2"));
        assert_eq!(found, (own, models), "{wanted}: {out}");
    }
}

/// llama-swap: for ever.
#[test]
fn a_load_that_nobody_waits_for_is_given_up_where_that_is_wanted() {
    let swapd = Swapd::start(
        "unloadTimeout: 1
models: {m: {worker: {model: DIR, env: ['FAKE_START_MS=60000', JOURNAL]}}}
routing: {scheduler: {settings: {fifo: {keepAbandonedLoads: false}}}}",
    );
    let client = std::net::TcpStream::connect(&swapd.address).unwrap();
    let body = common::chat_body("m", "");
    let text = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    std::io::Write::write_all(&mut &client, text.as_bytes()).unwrap();
    let (_, loading) = eventually("it starts", SOON, || swapd.journalled("start").first().copied());
    assert!(alive(loading));
    drop(client);
    eventually("it is given up", SOON, || (!alive(loading)).then_some(()));
    eventually("stopped", SOON, || (swapd.state("m") == "stopped").then_some(()));
    assert_eq!(swapd.journalled("start").len(), 1);
}

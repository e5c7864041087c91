//! Hot reload on the real program: only what changed is touched, the last edit wins.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::disallowed_methods
)]

mod common;

use std::time::Duration;

use common::{Swapd, alive, eventually, signal};
use nix::sys::signal::Signal;

const SEC: Duration = Duration::from_secs(1);

/// Two models side by side.
fn config(ttl_a: u32, knob_b: &str) -> String {
    format!(
        "
models:
  a: {{worker: {{model: DIR, env: [JOURNAL]}}, ttl: {ttl_a}}}
  b: {{cmd: 'FAKESERVER --port ${{PORT}} {knob_b}', env: [JOURNAL]}}
groups: {{both: {{swap: false, members: [a, b]}}}}
"
    )
}

fn pid(swapd: &Swapd, model: &str) -> u64 {
    swapd.chat(model, "").json()["pid"].as_u64().unwrap()
}

fn listed(swapd: &Swapd) -> Vec<String> {
    let list = swapd.get("/v1/models").json();
    list["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| m["id"].as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn only_changed_models_are_restarted_and_requests_survive() {
    let swapd = Swapd::start_with(&config(100, ""), &["--watch-config"]);
    let (a, b) = (pid(&swapd, "a"), pid(&swapd, "b"));
    let mut on_a = swapd.chat_open("a", r#""stream":true,"events":25,"gap_ms":40"#);
    let mut on_b = swapd.chat_open("b", r#""stream":true,"events":25,"gap_ms":40"#);
    on_a.chunk().unwrap();
    on_b.chunk().unwrap();
    // a is retuned, b gets another command.
    swapd.rewrite(&config(200, "--other"));
    eventually("b drains", 3 * SEC, || {
        (swapd.state("b") == "draining").then_some(())
    });
    assert_eq!(swapd.state("a"), "ready");
    let (on_a, on_b) = (on_a.finish(), on_b.finish());
    assert!(on_a.complete && on_b.complete, "cut by the reload");
    eventually("b is back", 3 * SEC, || {
        (swapd.state("b") == "ready").then_some(())
    });
    assert!(!alive(b.try_into().unwrap()));
    assert_eq!(pid(&swapd, "a"), a, "unchanged in what it runs");
    assert_ne!(pid(&swapd, "b"), b);
    let ttl = swapd.running().iter().find(|r| r["model"] == "a").unwrap()["ttl"].clone();
    assert_eq!(ttl, 200);
}

#[test]
fn a_bad_file_changes_nothing_and_is_reported() {
    let swapd = Swapd::start_with(&config(100, ""), &["--watch-config"]);
    let a = pid(&swapd, "a");
    swapd.rewrite("models: {a: {cmd: [}}");
    eventually("reported", 3 * SEC, || {
        let errors = swapd.get("/running").json()["registry"]["errors"].clone();
        errors
            .as_array()
            .unwrap()
            .first()
            .map(|e| assert!(e.as_str().unwrap().contains("config.yaml:")))
    });
    assert_eq!(pid(&swapd, "a"), a);
    assert!(swapd.get("/logs").body.contains("registry not taken up"));
    swapd.rewrite(&config(100, ""));
    eventually("good again", 3 * SEC, || {
        (swapd.get("/running").json()["registry"]["in_force"] == true).then_some(())
    });
    assert_eq!(pid(&swapd, "a"), a);
}

#[test]
fn the_last_of_many_edits_wins_however_it_is_made() {
    let swapd = Swapd::start_with(&config(100, ""), &["--watch-config"]);
    let model = |name: &str| format!("models: {{{name}: {{worker: {{model: DIR}}}}}}");
    for i in 0..40 {
        let text = common::expand(&model(&format!("m{i}")), &swapd.dir);
        match i % 3 {
            0 => std::fs::write(&swapd.config, text).unwrap(),
            1 => swapd.rewrite(&model(&format!("m{i}"))),
            _ => {
                // Gone for a moment, then half of it, then all.
                std::fs::remove_file(&swapd.config).unwrap();
                std::fs::write(&swapd.config, &text[..10]).unwrap();
                std::fs::write(&swapd.config, text).unwrap();
            }
        }
    }
    eventually("the last edit", 4 * SEC, || {
        (listed(&swapd) == ["m39"]).then_some(())
    });
    // As Nix does it: a link to a store path, replaced by a link to another one.
    for name in ["store1", "store2"] {
        let target = swapd.dir.path().join(name);
        std::fs::create_dir(&target).unwrap();
        std::fs::write(target.join("c.yaml"), common::expand(&model(name), &swapd.dir)).unwrap();
        let link = swapd.dir.path().join("link");
        std::os::unix::fs::symlink(target.join("c.yaml"), &link).unwrap();
        std::fs::rename(&link, &swapd.config).unwrap();
        eventually("the link's content", 4 * SEC, || {
            (listed(&swapd) == [name]).then_some(())
        });
    }
}

#[test]
fn sighup_and_command_reload_without_watching() {
    let swapd = Swapd::start(&config(100, ""));
    let text = "models: {new: {worker: {model: DIR}}}";
    swapd.rewrite(text);
    signal(swapd.child.id(), Signal::SIGHUP);
    eventually("reloaded", 3 * SEC, || (listed(&swapd) == ["new"]).then_some(()));
    let reload = || {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_swapd"));
        command
            .args(["reload", "--wait", "--listen", &swapd.address])
            .output()
            .unwrap()
    };
    swapd.rewrite("models: {newer: {worker: {model: DIR}}}");
    let output = reload();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(listed(&swapd), ["newer"]);
    swapd.rewrite("models: 3");
    let output = reload();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8(output.stderr).unwrap().contains("config.yaml:"));
}

#[test]
fn a_removed_model_finishes_and_is_gone() {
    let swapd = Swapd::start(&config(100, ""));
    let mut on_b = swapd.chat_open("b", r#""stream":true,"events":15,"gap_ms":30"#);
    on_b.chunk().unwrap();
    swapd.rewrite("models: {a: {worker: {model: DIR, env: [JOURNAL]}}}");
    assert_eq!(swapd.post("/api/reload", "").json()["removed"][0], "b");
    assert_eq!(swapd.chat("b", "").status, 404);
    assert!(on_b.finish().complete);
    eventually("b stops", 3 * SEC, || {
        (swapd.state("b") == "stopped").then_some(())
    });
}

/// A link that leads nowhere, or a directory of such a name, is no reason to stop watching.
#[test]
fn a_directory_of_files_is_watched_whatever_else_lies_in_it() {
    let more = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink("nowhere", more.path().join("a.yaml")).unwrap();
    std::fs::create_dir(more.path().join("b.yaml")).unwrap();
    let args = ["--watch-config", "--config-dir", more.path().to_str().unwrap()];
    let swapd = Swapd::start_with("models: {one: {worker: {model: DIR}}}", &args);
    std::fs::write(
        more.path().join("c.yaml"),
        "models: {two: {worker: {model: org/name}}}",
    )
    .unwrap();
    eventually("the new file", 4 * SEC, || {
        (listed(&swapd) == ["one", "two"]).then_some(())
    });
    // And a file that stays away is reported, until it is back.
    std::fs::rename(&swapd.config, swapd.dir.path().join("away")).unwrap();
    let errors = || swapd.get("/running").json()["registry"]["errors"].to_string();
    eventually("reported", 8 * SEC, || {
        errors().contains("cannot be read").then_some(())
    });
    assert_eq!(listed(&swapd), ["one", "two"]);
    std::fs::rename(swapd.dir.path().join("away"), &swapd.config).unwrap();
    eventually("cleared", 4 * SEC, || (errors() == "[]").then_some(()));
    let log = swapd.get("/logs").body;
    assert_eq!(log.matches("cannot be read").count(), 1, "{log}");
}

/// A file that was empty when it was read is no file that somebody has just begun to write.
#[test]
fn an_empty_file_among_others_holds_no_edit_up() {
    let more = tempfile::tempdir().unwrap();
    std::fs::write(more.path().join("local.yaml"), "").unwrap();
    let args = ["--watch-config", "--config-dir", more.path().to_str().unwrap()];
    let model = |name: &str| format!("models: {{{name}: {{worker: {{model: DIR}}}}}}");
    let swapd = Swapd::start_with(&model("one"), &args);
    for name in ["two", "three"] {
        swapd.rewrite(&model(name));
        eventually(name, 4 * SEC, || (listed(&swapd) == [name]).then_some(()));
    }
    // One that is emptied by an order is empty from then on, too.
    std::fs::write(more.path().join("b.yaml"), "").unwrap();
    assert_eq!(swapd.post("/api/reload", "").status, 200);
    swapd.rewrite(&model("four"));
    eventually("four", 4 * SEC, || (listed(&swapd) == ["four"]).then_some(()));
}

/// An order to reload and the watcher have the same idea of what was last read.
#[test]
fn an_edit_taken_back_right_after_an_order_to_reload_is_taken_back() {
    let swapd = Swapd::start_with(&config(100, ""), &["--watch-config"]);
    let first = swapd.dir.path().join("first");
    std::fs::copy(&swapd.config, &first).unwrap();
    // The watcher has had its first look.
    std::thread::sleep(Duration::from_millis(300));
    swapd.rewrite("models: {new: {worker: {model: DIR}}}");
    assert_eq!(swapd.post("/api/reload", "").json()["added"][0], "new");
    std::fs::rename(first, &swapd.config).unwrap();
    eventually("the last edit", 4 * SEC, || {
        (listed(&swapd) == ["a", "b"]).then_some(())
    });
}

/// Half a file is a valid registry with fewer models, and none of it is one without any.
#[test]
fn a_writer_that_pauses_takes_nothing_away() {
    use std::io::Write;
    let swapd = Swapd::start_with(&config(100, ""), &["--watch-config"]);
    let b = pid(&swapd, "b");
    let model = |id: &str| format!("  {id}: {{cmd: 'FAKESERVER --port ${{PORT}} ', env: [JOURNAL]}}\n");
    let text = common::expand(&format!("models:\n{}{}", model("c"), model("b")), &swapd.dir);
    let half = text.find("  b:").unwrap();
    let mut file = std::fs::File::create(&swapd.config).unwrap();
    for part in [&text[..half], &text[half..]] {
        std::thread::sleep(Duration::from_millis(300));
        file.write_all(part.as_bytes()).unwrap();
    }
    drop(file);
    eventually("all of it", 4 * SEC, || {
        (listed(&swapd) == ["b", "c"]).then_some(())
    });
    assert_eq!(pid(&swapd, "b"), b, "{}", swapd.get("/logs").body);
    assert_eq!(swapd.get("/logs").body.matches("registry taken up").count(), 1);
}

#[test]
fn what_only_a_restart_takes_up_is_named() {
    // A port without a host is not llama-swap's: that is said too.
    let swapd = Swapd::start_with("models: {}", &["--listen", ":0"]);
    assert!(swapd.address.starts_with("127.0.0.1:"));
    assert!(swapd.get("/logs").body.contains("[WARN] ':0' names no host"));
    swapd.rewrite("logToStdout: both\nlogTimeFormat: rfc3339\nollama: {listen: '127.0.0.1:1'}");
    swapd.post("/api/reload", "");
    let log = swapd.get("/logs").body;
    for key in ["logToStdout", "logTimeFormat", "ollama.listen"] {
        assert!(
            log.contains(&format!("{key} has changed and stays as it was")),
            "{log}"
        );
    }
    swapd.rewrite("models: {}");
    swapd.post("/api/reload", "");
    assert_eq!(swapd.get("/logs").body.matches("stays as it was").count(), 3);
}

/// llama-swap loses both with every reload.
#[test]
fn the_profile_and_captures_stay_as_long_as_they_can() {
    let with = |profiles: &str| {
        format!("captureBuffer: 5\nmodels: {{m: {{worker: {{model: DIR}}}}}}\nprofiles: {profiles}")
    };
    let swapd = Swapd::start(&with("{day: {pins: {x: m}}, night: {pins: {x: null}}}"));
    let body = r#"{"name":"day"}"#;
    assert_eq!(
        swapd
            .open("PUT", "/api/profiles/active", "", body)
            .finish()
            .status,
        200
    );
    assert_eq!(swapd.chat("x", "").status, 200);
    let captured = || swapd.get("/api/captures/1").status;
    eventually("captured", SEC, || (captured() == 200).then_some(()));
    let active = || swapd.get("/api/profiles").json()["active"].clone();
    swapd.rewrite(&with("{day: {pins: {x: m, y: m}}}"));
    assert_eq!(swapd.post("/api/reload", "").status, 200);
    assert_eq!((active().as_str(), captured()), (Some("day"), 200));
    assert_eq!(swapd.chat("y", "").status, 200);
    // Taken out, it is off; put back, it is not on again by itself.
    for profiles in ["{night: {pins: {x: m}}}", "{day: {pins: {x: m}}}"] {
        swapd.rewrite(&with(profiles));
        assert_eq!(swapd.post("/api/reload", "").status, 200);
        assert!(active().is_null(), "{profiles}");
    }
    assert_eq!(swapd.chat("x", "").status, 404);
}

/// The old process ends only when it is killed, a second after it was told to stop. An edit that comes while it is
/// stopping counts (llama-swap forgets it), and nothing is started beside it (llama-swap does).
#[test]
fn an_edit_while_a_changed_model_is_stopping_is_what_starts() {
    // A journal of its own for each version. (Written so that the word is not replaced by the test's journal.)
    let config = |journal: &str| {
        format!(
            r#"unloadTimeout: 1
models: {{m: {{worker: {{model: DIR}}, env: [FAKE_IGNORE_TERM=1, "FAKE_J\x4fURNAL=DIR/{journal}"]}}}}"#
        )
    };
    let swapd = Swapd::start_with(&config("first"), &["--watch-config"]);
    let first = pid(&swapd, "m");
    // Time of an event in a journal.
    let at = |journal: &str, event: &str| -> Option<u128> {
        let text = std::fs::read_to_string(swapd.dir.path().join(journal)).ok()?;
        let line = text.lines().find(|l| l.ends_with(event))?;
        line.split(' ').next()?.parse().ok()
    };
    swapd.rewrite(&config("second"));
    eventually("stopping", 3 * SEC, || {
        (swapd.state("m") == "stopping").then_some(())
    });
    swapd.rewrite(&config("third"));
    eventually("the last edit runs", 5 * SEC, || at("third", "ready"));
    let (stop, start) = (at("first", "stop").unwrap(), at("third", "start").unwrap());
    assert!(start >= stop + 950, "{} ms after the order to stop", start - stop);
    assert!(!alive(first.try_into().unwrap()));
    assert!(at("second", "start").is_none(), "started and lost");
}

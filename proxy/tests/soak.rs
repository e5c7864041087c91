//! Everything at once: requests, swaps, kills, disconnects, unloads and reloads, at random. Every request must be
//! answered or clearly refused, and nothing may be left over. `SOAK_SECONDS` makes it longer.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::disallowed_methods
)]

mod common;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use common::{Swapd, alive, eventually, signal};
use nix::sys::signal::Signal;
use parking_lot::Mutex;

/// A small generator of its own (xorshift), so that a seed names a run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

fn config(variant: u64) -> String {
    format!(
        "
unloadTimeout: 1
models:
  a: {{worker: {{model: DIR, env: [JOURNAL, FAKE_START_MS=30]}}, ttl: {}}}
  b: {{cmd: 'FAKESERVER --port ${{PORT}}', env: [JOURNAL, FAKE_START_MS=50, FAKE_VARIANT={}]}}
  c: {{worker: {{model: DIR, env: [JOURNAL, FAKE_IGNORE_TERM=1]}}, aliases: [cc]}}
groups: {{side: {{swap: false, exclusive: false, members: [c]}}}}
",
        1 + variant % 3,
        variant % 2
    )
}

fn files(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

fn rss(pid: u32) -> u64 {
    hostmem::process(pid).unwrap().resident_bytes
}

#[test]
fn nothing_is_lost_and_nothing_is_left() {
    let time = Duration::from_secs(std::env::var("SOAK_SECONDS").map_or(6, |s| s.parse().unwrap()));
    let seed = u64::from(std::process::id()) << 20 | 1;
    println!("seed {seed}");
    let mut swapd = Swapd::start(&config(0));
    let pid = swapd.child.id();
    for model in ["a", "b", "c"] {
        assert_eq!(swapd.chat(model, "").status, 200);
    }
    let (files_before, rss_before) = (files(pid), rss(pid));
    let end = Instant::now() + time;
    let outcomes: Mutex<BTreeMap<String, u64>> = Mutex::new(BTreeMap::new());
    std::thread::scope(|scope| {
        let (swapd, outcomes) = (&swapd, &outcomes);
        for client in 0..6_u64 {
            scope.spawn(move || {
                let mut dice = Dice(seed + client * 7919);
                while Instant::now() < end {
                    let model = ["a", "b", "c", "cc"][dice.roll(4) as usize];
                    let begun = Instant::now();
                    let outcome = match dice.roll(8) {
                        0 => {
                            let mut reply =
                                swapd.chat_open(model, r#""stream":true,"events":50,"gap_ms":10"#);
                            if reply.status == 200 {
                                let _ = reply.chunk();
                            }
                            "left".to_owned()
                        }
                        1 => {
                            let answer = swapd.chat(model, r#""die":true"#);
                            assert!([502, 503].contains(&answer.status), "{answer:?}");
                            answer.error().1
                        }
                        2 => {
                            let answer =
                                swapd.chat(model, r#""stream":true,"events":20,"gap_ms":2,"die_after":7"#);
                            // Told in the stream or as a refusal; a clean end would be a lie.
                            let told = answer.body.contains("\"error\"");
                            assert!(told && (answer.status != 200 || !answer.complete), "{answer:?}");
                            "broken".to_owned()
                        }
                        3 => {
                            let answer = swapd.chat(model, r#""stream":true,"events":20,"gap_ms":5"#);
                            let whole = answer.complete && answer.body.ends_with("data: [DONE]\n\n");
                            assert!(whole || answer.body.contains("\"error\""), "{answer:?}");
                            if whole {
                                "whole".to_owned()
                            } else {
                                "told".to_owned()
                            }
                        }
                        _ => {
                            let answer = swapd.chat(model, "");
                            assert!(answer.complete, "{answer:?}");
                            if answer.status == 200 {
                                "ok".to_owned()
                            } else {
                                answer.error().1
                            }
                        }
                    };
                    let took = begun.elapsed();
                    assert!(
                        took < Duration::from_secs(15),
                        "{model} {outcome} took {took:?}; {:?}",
                        swapd.get("/running").body
                    );
                    *outcomes.lock().entry(outcome).or_default() += 1;
                }
            });
        }
        scope.spawn(move || {
            let mut dice = Dice(seed ^ 0xabcdef);
            while Instant::now() < end {
                std::thread::sleep(Duration::from_millis(50 + dice.roll(200)));
                match dice.roll(4) {
                    0 => {
                        swapd.rewrite(&config(dice.roll(6)));
                        assert_eq!(swapd.post("/api/reload", "").status, 200);
                    }
                    1 => assert_eq!(swapd.post("/api/models/unload/b", "").status, 200),
                    2 => {
                        // Whatever the outcome, it must come.
                        swapd.post("/api/models/load/a", "");
                    }
                    _ => {
                        let running = swapd.running();
                        if let Some(victim) = running.iter().filter_map(|r| r["pid"].as_u64()).next() {
                            let _ = nix::sys::signal::kill(
                                nix::unistd::Pid::from_raw(victim.try_into().unwrap()),
                                Signal::SIGKILL,
                            );
                        }
                    }
                }
            }
        });
    });
    let outcomes = outcomes.into_inner();
    println!("{outcomes:?}");
    assert!(outcomes["ok"] > 10, "{outcomes:?}");
    // Refusals are of the kinds that were provoked, and none else.
    let known = [
        "ok",
        "whole",
        "told",
        "broken",
        "left",
        "upstream_error",
        "model_backoff",
        "model_start_failed",
        "unloaded",
    ];
    assert!(
        outcomes.keys().all(|k| known.contains(&k.as_str())),
        "{outcomes:?}"
    );
    assert_eq!(swapd.get("/unload").status, 200);
    assert!(
        swapd.running().iter().all(|r| r["state"] == "backoff"),
        "{:?}",
        swapd.running()
    );
    let started: Vec<u32> = swapd
        .journalled("start")
        .into_iter()
        .map(|(_, pid)| pid)
        .collect();
    assert!(
        started.len() > 5 && !started.iter().any(|p| alive(*p)),
        "processes left over"
    );
    eventually("files are closed", Duration::from_secs(3), || {
        (files(pid) <= files_before + 2).then_some(())
    });
    let grown = rss(pid).saturating_sub(rss_before) >> 20;
    assert!(grown < 12, "grown by {grown} MiB");
    signal(pid, Signal::SIGTERM);
    assert_eq!(swapd.exit_code(Duration::from_secs(5)), Some(0));
}

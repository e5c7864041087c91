//! Steps that fail, on the real engine with failures put in.

use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use super::*;
use crate::backend::{FinishReason, SamplingParams};
use crate::engine::stepper::Faults;

/// An engine on a thread of its own, with failures to come.
struct Running {
    commands: SyncSender<Command>,
    counters: Arc<Counters>,
    ended: Receiver<String>,
}

impl Running {
    fn new(faults: Faults, max_running: usize) -> Self {
        let (commands, inbox) = sync_channel(64);
        let (end, ended) = sync_channel(1);
        let counters = Arc::new(Counters::new());
        let for_thread = Arc::clone(&counters);
        std::thread::spawn(move || {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/parity/dense-f32-tied");
            let config = EngineConfig {
                max_running,
                prefill_chunk: 16,
                ..EngineConfig::new(folder)
            };
            let (mut parts, _) = start::start(config, &mut |_| {}).unwrap();
            parts.stepper.faults = faults;
            let stopping = AtomicBool::new(false);
            let reason = Loop::new(parts, &for_thread, &inbox, &stopping).serve();
            end.send(reason).unwrap();
        });
        Self {
            commands,
            counters,
            ended,
        }
    }

    fn ask(&self, prompt: Vec<u32>, max_tokens: usize) -> mpsc::Receiver<GenerationEvent> {
        self.ask_until(prompt, max_tokens, Vec::new())
    }

    fn ask_until(
        &self,
        prompt: Vec<u32>,
        max_tokens: usize,
        stop_tokens: Vec<u32>,
    ) -> mpsc::Receiver<GenerationEvent> {
        let (events, receiver) = mpsc::channel(1024);
        let request = GenerateRequest {
            prompt,
            max_tokens,
            sampling: SamplingParams::greedy(),
            stop_tokens,
            logprobs: None,
        };
        let place = Counters::place(&self.counters, 64).unwrap();
        let arrival = Arrival {
            request,
            events,
            place,
        };
        self.commands.send(Command::Generate(vec![arrival])).unwrap();
        receiver
    }

    fn end(self) -> String {
        drop(self.commands);
        self.ended.recv().unwrap()
    }
}

#[derive(Debug, PartialEq)]
enum End {
    Done(Vec<u32>),
    Failed(String),
}

/// How many of the prompt's tokens were cached, and how it ended.
fn end(mut events: mpsc::Receiver<GenerationEvent>) -> (usize, End) {
    let (mut tokens, mut cached) = (Vec::new(), 0);
    while let Some(event) = events.blocking_recv() {
        match event {
            GenerationEvent::Started { cached_tokens, .. } | GenerationEvent::Reused { cached_tokens } => {
                cached = cached_tokens;
            }
            GenerationEvent::Token { id, .. } => tokens.push(id),
            GenerationEvent::Finished { reason, .. } => {
                assert_eq!(reason, FinishReason::Length);
                return (cached, End::Done(tokens));
            }
            GenerationEvent::Failed(error) => return (cached, End::Failed(error.to_string())),
        }
    }
    panic!("a request without an answer")
}

fn prompt(length: usize, seed: usize) -> Vec<u32> {
    (0..length)
        .map(|n| ((n * 7 + seed * 31 + 3) % 120) as u32 + 1)
        .collect()
}

#[test]
fn a_prompt_that_cannot_be_built_fails_alone() {
    let solo = Running::new(Faults::default(), 1);
    let expected = end(solo.ask(prompt(40, 1), 60)).1;
    solo.end();

    let faults = Faults {
        prompt: Some(50),
        ..Faults::default()
    };
    let engine = Running::new(faults, 4);
    let good = engine.ask(prompt(40, 1), 60);
    let bad = engine.ask(prompt(50, 2), 60);
    let (_, failed) = end(bad);
    assert!(
        matches!(&failed, End::Failed(reason) if reason.contains("no graph can be made of")),
        "{failed:?}"
    );
    assert_eq!(end(good).1, expected);
    engine.end();
}

#[test]
fn a_device_that_fails_ends_what_runs_and_keeps_nothing_of_it() {
    let solo = Running::new(Faults::default(), 2);
    let expected = end(solo.ask(prompt(70, 1), 30)).1;
    // The same prompt again finds itself in the cache.
    assert!(end(solo.ask(prompt(70, 1), 30)).0 >= 32);
    solo.end();

    // The failure shows with the decode of two, while the third prompt waits for a place.
    let faults = Faults {
        rows: Some(2),
        ..Faults::default()
    };
    let engine = Running::new(faults, 2);
    let running = [1, 2].map(|seed| engine.ask(prompt(70, seed), 30));
    let waiting = engine.ask(prompt(70, 1), 30);
    for events in running {
        let (_, failed) = end(events);
        assert!(
            matches!(&failed, End::Failed(reason) if reason.contains("the device failed")),
            "{failed:?}"
        );
    }
    // It is none the worse, and takes nothing from what may not have been written.
    assert_eq!(end(waiting), (0, expected));
    engine.end();
}

#[test]
fn a_device_that_is_lost_ends_the_engine_and_every_request() {
    let faults = Faults {
        rows: Some(1),
        lost: true,
        ..Faults::default()
    };
    let engine = Running::new(faults, 1);
    let all = [1, 2, 3].map(|seed| engine.ask(prompt(20, seed), 30));
    for events in all {
        let (_, failed) = end(events);
        assert!(
            matches!(&failed, End::Failed(reason) if reason.contains("the device")),
            "{failed:?}"
        );
    }
    let reason = engine.end();
    assert!(
        reason.contains("the device failed; and then: the device is lost"),
        "{reason}"
    );
}

/// A request ends with a token when the step after that is on the device already. Nobody waits for that one, but its
/// reading may hang like any other, and the watchdog has to know that there is something to watch.
#[test]
fn a_step_that_is_read_for_nobody_is_work() {
    let (release, hang) = sync_channel(0);
    let faults = Faults {
        hang: Some((1, hang)),
        ..Faults::default()
    };
    let engine = Running::new(faults, 1);
    let whatever_comes = (0..128).collect();
    let mut events = engine.ask_until(prompt(10, 1), 30, whatever_comes);
    while let Some(event) = events.blocking_recv() {
        if let GenerationEvent::Finished { reason, .. } = event {
            assert_eq!(reason, FinishReason::Stop);
        }
    }
    let stats = || engine.counters.read();
    while stats().running > 0 {
        std::thread::yield_now();
    }
    assert!(stats().busy, "{:?}", stats());
    let next = engine.ask(prompt(10, 2), 3);
    assert_eq!((stats().running, stats().waiting), (0, 1));
    drop(release);
    assert!(matches!(end(next).1, End::Done(tokens) if tokens.len() == 3));
    while stats().busy {
        std::thread::yield_now();
    }
    engine.end();
}

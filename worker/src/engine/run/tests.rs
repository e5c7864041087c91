//! Steps that fail, on the real engine with failures put in.

use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use constraint::{Form, Grammars, Opening, Token};

use super::*;
use crate::backend::{Constrained, FinishReason, SamplingParams};
use crate::engine::stepper::Faults;

/// An engine on a thread of its own, with failures to come.
struct Running {
    commands: SyncSender<Command>,
    counters: Arc<Counters>,
    ended: Receiver<String>,
}

fn config() -> EngineConfig {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/parity/dense-f32-tied");
    EngineConfig {
        prefill_chunk: 16,
        ..EngineConfig::new(folder)
    }
}

fn request(prompt: Vec<u32>, max_tokens: usize) -> GenerateRequest {
    GenerateRequest {
        prompt,
        max_tokens,
        sampling: SamplingParams::greedy(),
        stop_tokens: Vec::new(),
        logprobs: None,
        constraint: None,
    }
}

impl Running {
    fn new(faults: Faults, max_running: usize) -> Self {
        Self::with(faults, move |config| config.max_running = max_running)
    }

    fn with(faults: Faults, configure: impl FnOnce(&mut EngineConfig) + Send + 'static) -> Self {
        Self::reading(faults, Vec::new(), configure)
    }

    /// On a device that reads its weights from these files.
    fn reading(
        faults: Faults,
        files: Vec<WeightFile>,
        configure: impl FnOnce(&mut EngineConfig) + Send + 'static,
    ) -> Self {
        let (commands, inbox) = sync_channel(64);
        let (end, ended) = sync_channel(1);
        let counters = Arc::new(Counters::new());
        let for_thread = Arc::clone(&counters);
        std::thread::spawn(move || {
            let mut config = config();
            configure(&mut config);
            let (mut parts, _) = start::start(config, &mut |_| {}).unwrap();
            parts.stepper.faults = faults;
            parts.weight_files = files;
            let stopping = AtomicBool::new(false);
            let state = watch::Sender::new(EngineState::Running);
            Loop::new(parts, &for_thread, &inbox, &stopping).serve(&state);
            match &*state.borrow() {
                EngineState::Dead(reason) => end.send(reason.clone()).unwrap(),
                EngineState::Running => panic!("it has ended and says nothing"),
            }
        });
        Self {
            commands,
            counters,
            ended,
        }
    }

    fn ask(&self, prompt: Vec<u32>, max_tokens: usize) -> mpsc::Receiver<GenerationEvent> {
        self.send(request(prompt, max_tokens))
    }

    /// A reply of digits and nothing else.
    fn ask_digits(&self, prompt: Vec<u32>, max_tokens: usize) -> mpsc::Receiver<GenerationEvent> {
        let bytes: Vec<u8> = (0..128).collect();
        let grammars = Grammars::new(bytes.chunks(1).map(Token::Text)).unwrap();
        let form = grammars.compile(&Form::Regex("[0-9]+".to_owned())).unwrap();
        let opening = Opening::default();
        self.send(GenerateRequest {
            constraint: Some(Constrained { form, opening }),
            ..request(prompt, max_tokens)
        })
    }

    fn send(&self, request: GenerateRequest) -> mpsc::Receiver<GenerationEvent> {
        let (events, receiver) = mpsc::channel(1024);
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

/// Rows that are stepped together fail only where they cannot be stepped alone, and the others draw what they would have drawn.
#[test]
fn a_row_that_cannot_be_built_fails_alone() {
    let hot = || GenerateRequest {
        sampling: SamplingParams {
            temperature: 1.5,
            seed: Some(5),
            frequency_penalty: 0.5,
            ..SamplingParams::greedy()
        },
        ..request(prompt(30, 3), 25)
    };
    let solo = Running::new(Faults::default(), 1);
    let expected = [request(prompt(40, 1), 20), hot()].map(|one| end(solo.send(one)).1);
    solo.end();

    let faults = Faults {
        position: Some(60),
        ..Faults::default()
    };
    let engine = Running::new(faults, 4);
    let good = [request(prompt(40, 1), 20), hot()].map(|one| engine.send(one));
    let (_, failed) = end(engine.ask(prompt(50, 2), 30));
    assert!(
        matches!(&failed, End::Failed(reason) if reason.contains("no graph can be made of")),
        "{failed:?}"
    );
    assert_eq!(good.map(|events| end(events).1), expected);
    engine.end();
}

/// One that would go on with penalties that have forgotten what was drawn fails instead.
#[test]
fn a_preempted_one_whose_draws_cannot_be_kept_fails() {
    let faults = Faults {
        park: true,
        ..Faults::default()
    };
    let engine = Running::with(faults, |config| {
        config.max_running = 2;
        config.max_blocks = Some(6);
        config.generation_share = 1;
    });
    let [first, second] = [1, 2].map(|seed| engine.ask(prompt(40, seed), 100));
    let (_, failed) = end(second);
    assert!(
        matches!(&failed, End::Failed(reason) if reason.contains("cannot be kept")),
        "{failed:?}"
    );
    assert!(matches!(end(first).1, End::Done(tokens) if tokens.len() == 100));
    assert_eq!(engine.counters.read().preempted, 1);
    engine.end();
}

/// It says what it is, and not that somebody waited.
/// A request of ten tokens for five, handed to an engine that no thread runs.
fn submit_one(engine: &mut Loop<'_>) -> mpsc::Receiver<GenerationEvent> {
    let (events, receiver) = mpsc::channel(8);
    let arrival = Arrival {
        request: request(prompt(10, 1), 5),
        events,
        place: Counters::place(engine.counters, 1).unwrap(),
    };
    engine.submit(arrival, SeqId(0));
    receiver
}

#[test]
fn a_defect_of_the_cache_is_told_as_one() {
    std::thread::spawn(|| {
        let (parts, _) = start::start(config(), &mut |_| {}).unwrap();
        let counters = Arc::new(Counters::new());
        let (_commands, inbox) = sync_channel(1);
        let stopping = AtomicBool::new(false);
        let mut engine = Loop::new(parts, &counters, &inbox, &stopping);
        let receiver = submit_one(&mut engine);
        let plan = Plan {
            lost: vec![SeqId(0)],
            ..Plan::default()
        };
        assert!(engine.issue(plan).is_ok());
        let (_, failed) = end(receiver);
        assert!(
            matches!(&failed, End::Failed(reason) if reason.contains("a defect of the worker")),
            "{failed:?}"
        );
    })
    .join()
    .unwrap();
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
    let (held, hang) = sync_channel(1);
    let faults = Faults {
        rows: Some(1),
        lost: true,
        hang: Some((usize::MAX, hang)),
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
    // Nothing has been given back to such a device, which would end the process without a word.
    assert_eq!(held.send(()), Ok(()));
}

/// Giving an array back to a device that has failed may end the process: nothing is let go of before everybody has been told.
#[test]
fn what_has_failed_is_kept_until_it_has_been_told() {
    std::thread::spawn(|| {
        let (parts, _) = start::start(config(), &mut |_| {}).unwrap();
        let (_commands, inbox) = sync_channel(1);
        let (counters, stopping) = (Arc::new(Counters::new()), AtomicBool::new(false));
        let mut engine = Loop::new(parts, &counters, &inbox, &stopping);
        let _receiver = submit_one(&mut engine);
        assert!(engine.step().is_ok());
        engine.stepper.begin();
        engine.stepper.faults.rows = Some(1);
        assert!(engine.stepper.read().is_err());
        assert!(engine.stepper.is_flying());
        assert!(engine.stepper.read().is_ok());
        assert!(!engine.stepper.is_flying());
    })
    .join()
    .unwrap();
}

/// After its volume has gone, a device that can only add is one that fails with every request, for ever.
#[test]
fn a_device_whose_weight_file_is_gone_ends_the_engine_and_names_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let files: Vec<WeightFile> = ["whole.safetensors", "short.safetensors"]
        .iter()
        .map(|name| {
            let path = folder.path().join(name);
            std::fs::write(&path, [7; 5000]).unwrap();
            WeightFile::open(&path).unwrap()
        })
        .collect();
    let fails = || Faults {
        rows: Some(1),
        ..Faults::default()
    };
    let engine = Running::reading(fails(), files.clone(), |config| config.max_running = 1);
    assert!(matches!(end(engine.ask(prompt(20, 1), 30)).1, End::Failed(_)));
    assert!(matches!(end(engine.ask(prompt(20, 1), 30)).1, End::Done(_)));
    engine.end();

    let short = folder.path().join("short.safetensors");
    std::fs::OpenOptions::new()
        .write(true)
        .open(&short)
        .unwrap()
        .set_len(4999)
        .unwrap();
    let engine = Running::reading(fails(), files, |config| config.max_running = 1);
    let counters = Arc::clone(&engine.counters);
    for events in [1, 2].map(|seed| engine.ask(prompt(20, seed), 30)) {
        assert!(matches!(end(events).1, End::Failed(_)));
    }
    let reason = engine.end();
    assert!(
        reason.contains(&short.display().to_string()) && reason.contains("cannot be read any more"),
        "{reason}"
    );
    assert!(counters.weights_lost.load(Relaxed));
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
    let mut events = engine.send(GenerateRequest {
        stop_tokens: whatever_comes,
        ..request(prompt(10, 1), 30)
    });
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

/// The device fails while a step waits for its draws: these are given up with it.
#[test]
fn a_step_that_was_never_drawn_is_given_up_with_the_rest() {
    let solo = Running::new(Faults::default(), 2);
    let expected = end(solo.ask_digits(prompt(30, 1), 40)).1;
    let End::Done(digits) = &expected else {
        panic!("{expected:?}");
    };
    let digit = u32::from(b'0')..=u32::from(b'9');
    assert!(digits.len() == 40 && digits.iter().all(|id| digit.contains(id)));
    solo.end();

    let faults = Faults {
        rows: Some(2),
        ..Faults::default()
    };
    let engine = Running::new(faults, 2);
    let running = [
        engine.ask_digits(prompt(30, 1), 40),
        engine.ask(prompt(30, 2), 40),
    ];
    let waiting = engine.ask_digits(prompt(30, 1), 40);
    for events in running {
        let (_, failed) = end(events);
        assert!(
            matches!(&failed, End::Failed(reason) if reason.contains("the device failed")),
            "{failed:?}"
        );
    }
    assert_eq!(end(waiting), (0, expected));
    engine.end();
}

/// The same where the draws wait for the tokens before them.
#[test]
fn rows_that_draw_late_fail_alone_too() {
    let solo = Running::new(Faults::default(), 1);
    let free = end(solo.ask(prompt(40, 1), 20)).1;
    let digits = end(solo.ask_digits(prompt(20, 4), 35)).1;
    solo.end();

    let faults = Faults {
        position: Some(60),
        ..Faults::default()
    };
    let engine = Running::new(faults, 4);
    let good = [
        engine.ask(prompt(40, 1), 20),
        engine.ask_digits(prompt(20, 4), 35),
    ];
    let (_, failed) = end(engine.ask(prompt(50, 2), 30));
    assert!(
        matches!(&failed, End::Failed(reason) if reason.contains("no graph can be made of")),
        "{failed:?}"
    );
    assert_eq!(good.map(|events| end(events).1), [free, digits]);
    assert!(engine.counters.read().constraints.late_draws > 10);
    engine.end();
}

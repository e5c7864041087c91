//! Constrained decoding on the engine, with a model of random weights: whatever it writes has the form that was asked for, and
//! nobody beside it can tell. Its vocabulary is ASCII: a token is its own byte.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    missing_docs
)]

use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

use constraint::{Constraint, Form, Grammars, Opening, Thinking, Token};
use mlxworker::backend::{
    Backend, Constrained, EngineError, FinishReason, GenerateRequest, Generation, GenerationEvent,
    SamplingParams, TokenLogprobs, Usage,
};
use mlxworker::engine::{Engine, EngineConfig};
use serde_json::{Value, json};
use tokio::time::timeout;

const VOCAB: u32 = 128;
/// Ends a reply, and is no text.
const STOP: u32 = 0;
const OPEN: u32 = 1;
const CLOSE: u32 = 2;
const CALL: u32 = 3;
/// Not in the vocabulary of the grammars, though the model has a row for it.
const MISSING: u8 = b'~';

async fn engine(change: impl FnOnce(&mut EngineConfig)) -> Engine {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/parity/dense-f32-tied");
    let mut config = EngineConfig {
        max_running: 8,
        prefill_chunk: 16,
        block_size: 4,
        ..EngineConfig::new(folder)
    };
    change(&mut config);
    Engine::start(config, |_| {}).await.unwrap()
}

fn compile(form: &Form) -> Constraint {
    static SHARED: OnceLock<Grammars> = OnceLock::new();
    let grammars = SHARED.get_or_init(|| {
        let bytes: Vec<u8> = (0..128).collect();
        let tokens = bytes.chunks(1).map(|byte| match byte {
            [0..4] => Token::Special(byte),
            [MISSING] => Token::Absent,
            _ => Token::Text(byte),
        });
        Grammars::new(tokens).unwrap()
    });
    grammars.compile(form).unwrap()
}

fn schema() -> Form {
    Form::JsonSchema(json!({
        "type": "object", "additionalProperties": false, "required": ["name", "size", "tags"],
        "properties": {
            "name": {"type": "string", "maxLength": 6}, "size": {"type": "integer", "minimum": 0, "maximum": 999},
            "tags": {"type": "array", "items": {"enum": ["x", "yy", null]}, "minItems": 1, "maxItems": 3},
        },
    }))
}

fn is_valid(text: &str) -> bool {
    let Ok(Value::Object(map)) = serde_json::from_str::<Value>(text) else {
        return false;
    };
    let tags = map["tags"].as_array().unwrap();
    map.len() == 3
        && map["name"].as_str().is_some_and(|name| name.chars().count() <= 6)
        && map["size"].as_u64().is_some_and(|size| size <= 999)
        && (1..=3).contains(&tags.len())
        && tags
            .iter()
            .all(|tag| [json!("x"), json!("yy"), Value::Null].contains(tag))
}

fn prompt(seed: u32, length: u32) -> Vec<u32> {
    (0..length)
        .map(|n| (n * n * 3 + n * seed + seed) % (VOCAB - 4) + 4)
        .collect()
}

fn free(prompt: Vec<u32>, max_tokens: usize) -> GenerateRequest {
    GenerateRequest {
        prompt,
        max_tokens,
        sampling: SamplingParams::greedy(),
        stop_tokens: vec![STOP],
        logprobs: None,
        constraint: None,
    }
}

fn bound(prompt: Vec<u32>, form: &Form) -> GenerateRequest {
    GenerateRequest {
        constraint: Some(Constrained {
            form: compile(form),
            opening: Opening::default(),
        }),
        ..free(prompt, 400)
    }
}

fn hot(seed: u64, request: GenerateRequest) -> GenerateRequest {
    GenerateRequest {
        sampling: SamplingParams {
            temperature: 1.0,
            seed: Some(seed),
            ..SamplingParams::greedy()
        },
        ..request
    }
}

#[derive(Debug, Default, PartialEq)]
struct Reply {
    tokens: Vec<u32>,
    logprobs: Vec<TokenLogprobs>,
    cached: usize,
    end: Option<(FinishReason, Usage)>,
    failed: Option<EngineError>,
}

impl Reply {
    fn text(&self) -> String {
        let bytes = self.tokens.iter().map(|&id| u8::try_from(id).unwrap());
        String::from_utf8(bytes.collect()).unwrap()
    }

    fn reason(&self) -> FinishReason {
        self.end.as_ref().unwrap_or_else(|| panic!("{self:?}")).0
    }
}

async fn read(mut generation: Generation) -> Reply {
    let mut reply = Reply::default();
    while let Some(event) = timeout(Duration::from_secs(60), generation.events.recv())
        .await
        .expect("in time")
    {
        match event {
            GenerationEvent::Started { cached_tokens, .. } | GenerationEvent::Reused { cached_tokens } => {
                reply.cached = cached_tokens;
            }
            GenerationEvent::Token { id, logprob } => {
                reply.tokens.push(id);
                reply.logprobs.extend(logprob);
            }
            GenerationEvent::Finished { reason, usage } => reply.end = Some((reason, usage)),
            GenerationEvent::Failed(error) => reply.failed = Some(error),
        }
    }
    reply
}

/// All at once.
async fn ask(engine: &Engine, requests: &[GenerateRequest]) -> Vec<Reply> {
    let generations: Vec<Generation> = requests
        .iter()
        .map(|request| engine.submit(request.clone()).unwrap())
        .collect();
    let mut replies = Vec::new();
    for generation in generations {
        replies.push(read(generation).await);
    }
    replies
}

/// One after the other, each alone.
async fn alone(requests: &[GenerateRequest]) -> Vec<Reply> {
    let engine = engine(|config| {
        config.max_running = 1;
        config.prefix_cache = false;
    })
    .await;
    let mut replies = Vec::new();
    for request in requests {
        replies.extend(ask(&engine, std::slice::from_ref(request)).await);
    }
    replies
}

#[tokio::test]
async fn greedy_or_hot_the_form_is_kept() {
    let engine = engine(|_| {}).await;
    for seed in 0..12 {
        let request = bound(prompt(seed, 5 + seed * 3), &schema());
        let request = if seed % 2 == 0 {
            request
        } else {
            hot(seed.into(), request)
        };
        let reply = ask(&engine, &[request]).await.remove(0);
        assert!(is_valid(&reply.text()), "{:?}", reply.text());
        // The last brace ends it: no token is drawn for the end alone.
        let (reason, usage) = reply.end.unwrap();
        assert_eq!(
            (reason, usage.completion_tokens),
            (FinishReason::Stop, reply.tokens.len())
        );
    }
    let stats = engine.stats().constraints;
    assert!(stats.masks > 200 && stats.late_draws > 200, "{stats:?}");
    assert!(stats.mask_time > Duration::ZERO);
}

/// A text that may end or go on ends with a stop token, or at the limit.
#[tokio::test]
async fn the_end_of_a_reply() {
    let engine = engine(|_| {}).await;
    let digits = Form::Regex("[0-9]+".to_owned());
    let ended = GenerateRequest {
        sampling: SamplingParams {
            logit_bias: vec![(STOP, 100.0)],
            ..SamplingParams::greedy()
        },
        ..bound(prompt(1, 9), &digits)
    };
    let cut = GenerateRequest {
        max_tokens: 7,
        stop_tokens: Vec::new(),
        ..bound(prompt(1, 9), &digits)
    };
    let in_time = GenerateRequest {
        max_tokens: 3,
        ..bound(prompt(1, 9), &Form::Choice(vec!["abc".to_owned()]))
    };
    let replies = ask(&engine, &[ended, cut, in_time]).await;
    // Though the bias is for the end, there has to be a digit before it.
    assert_eq!(
        (replies[0].tokens.len(), replies[0].reason()),
        (1, FinishReason::Stop)
    );
    assert_eq!(replies[0].end.unwrap().1.completion_tokens, 2);
    assert_eq!(
        (replies[1].tokens.len(), replies[1].reason()),
        (7, FinishReason::Length)
    );
    for reply in &replies[..2] {
        assert!(
            reply.text().bytes().all(|byte| byte.is_ascii_digit()),
            "{reply:?}"
        );
    }
    assert_eq!(
        (replies[2].text().as_str(), replies[2].reason()),
        ("abc", FinishReason::Stop)
    );
}

/// Rows with two forms and rows without any, greedy and seeded, in the same steps: each as alone.
#[tokio::test]
async fn nobody_can_tell_who_else_is_there() {
    let number = Form::Regex(r"-?[1-9][0-9]{0,30}(\.[0-9]{40,60})?".to_owned());
    let mut requests = Vec::new();
    for n in 0..3 {
        requests.push(free(prompt(20 + n, 12), 90));
        requests.push(bound(prompt(30 + n, 20), &schema()));
        requests.push(hot(n.into(), free(prompt(40 + n, 30), 70)));
        requests.push(hot(n.into(), bound(prompt(50 + n, 9), &number)));
    }
    let expected = alone(&requests).await;
    for (n, reply) in expected.iter().enumerate() {
        match n % 4 {
            1 => assert!(is_valid(&reply.text()), "{:?}", reply.text()),
            3 => assert!(reply.text().parse::<f64>().is_ok(), "{:?}", reply.text()),
            _ => assert!(reply.text().parse::<f64>().is_err() && !is_valid(&reply.text())),
        }
    }
    let engine = engine(|config| config.max_running = 12).await;
    let together = ask(&engine, &requests).await;
    // A hot draw close to the edge of a token's share may fall to the other side of it, since a batch rounds differently.
    let same = |n: usize, alone: &Reply, other: &Reply| {
        let sure = if n % 4 < 2 { 400 } else { 10 };
        let first = |reply: &Reply| reply.tokens.iter().take(sure).copied().collect::<Vec<_>>();
        assert_eq!(first(alone), first(other), "request {n}");
        assert_eq!(alone.reason(), other.reason(), "request {n}");
        if n % 4 == 3 {
            assert!(other.text().parse::<f64>().is_ok(), "{:?}", other.text());
        }
    };
    for (n, (alone, together)) in expected.iter().zip(&together).enumerate() {
        same(n, alone, together);
    }
    // Asked again they find their prompts cached, and reply the same.
    let again = ask(&engine, &requests).await;
    for (n, (alone, again)) in expected.iter().zip(&again).enumerate() {
        same(n, alone, again);
        assert!(again.cached > 0, "request {n}");
    }
}

/// Without a constrained row nothing is drawn late.
#[tokio::test]
async fn free_steps_are_as_they_were() {
    let engine = engine(|_| {}).await;
    ask(&engine, &[free(prompt(1, 9), 40), hot(1, free(prompt(2, 9), 40))]).await;
    let stats = engine.stats().constraints;
    assert_eq!((stats.masks, stats.late_draws), (0, 0));
}

/// A pool too small for all: sequences are taken out in the middle of their texts and computed again.
#[tokio::test]
async fn preempted_replies_go_on_where_they_were() {
    let long = Form::Regex("(ab|cd|[0-9]{2}){30,40};".to_owned());
    let requests: Vec<GenerateRequest> = (0..6)
        .map(|n| {
            let request = if n % 2 == 0 {
                bound(prompt(n, 10), &long)
            } else {
                hot(n.into(), bound(prompt(n, 10), &schema()))
            };
            GenerateRequest {
                sampling: SamplingParams {
                    frequency_penalty: 0.3,
                    ..request.sampling.clone()
                },
                max_tokens: 100,
                ..request
            }
        })
        .collect();
    let expected = alone(&requests).await;
    let engine = engine(|config| {
        config.max_blocks = Some(40);
        config.generation_share = 4;
    })
    .await;
    let replies = ask(&engine, &requests).await;
    assert!(engine.stats().preempted > 2, "{:?}", engine.stats());
    for (n, (alone, reply)) in expected.iter().zip(&replies).enumerate() {
        assert_eq!(alone.text(), reply.text(), "request {n}");
        assert_eq!(reply.reason(), FinishReason::Stop, "request {n}");
        assert!(is_valid(&reply.text()) || reply.text().ends_with(';'));
    }
}

/// Penalties and bias choose among what is allowed; log-probabilities are shares of it.
#[tokio::test]
async fn parameters_work_on_what_is_allowed() {
    let engine = engine(|_| {}).await;
    let letters = Form::Regex("[abc]{30}".to_owned());
    let with = |sampling: SamplingParams, logprobs: Option<usize>| GenerateRequest {
        sampling,
        logprobs,
        ..bound(prompt(3, 12), &letters)
    };
    let biased = with(
        SamplingParams {
            logit_bias: vec![(u32::from(b'c'), 90.0), (u32::from(b'z'), 100.0)],
            ..SamplingParams::greedy()
        },
        None,
    );
    let fair = with(
        SamplingParams {
            frequency_penalty: 2.0,
            presence_penalty: 2.0,
            ..SamplingParams::greedy()
        },
        None,
    );
    let narrow = |top_k: usize, top_p: f32, min_p: f32| {
        with(
            SamplingParams {
                temperature: 1.0,
                seed: Some(5),
                top_k,
                top_p,
                min_p,
                ..SamplingParams::greedy()
            },
            Some(5),
        )
    };
    let requests = [
        biased,
        fair,
        narrow(0, 1.0, 0.0),
        narrow(1, 1.0, 0.0),
        narrow(0, 0.01, 0.0),
        narrow(40, 0.9, 0.05),
        with(SamplingParams::greedy(), Some(5)),
    ];
    let replies = ask(&engine, &requests).await;
    assert_eq!(replies[0].text(), "c".repeat(30));
    for letter in ["a", "b", "c"] {
        assert!(
            replies[1].text().matches(letter).count() >= 7,
            "{}",
            replies[1].text()
        );
    }
    for reply in &replies {
        assert!(
            reply.text().len() == 30 && reply.text().bytes().all(|byte| b"abc".contains(&byte)),
            "{:?}",
            reply.text()
        );
        assert_eq!(reply.reason(), FinishReason::Stop);
    }
    assert_eq!(
        replies[3].tokens, replies[6].tokens,
        "one candidate is the likeliest"
    );
    assert_eq!(replies[4].tokens, replies[6].tokens, "so is the smallest nucleus");
    for reply in &replies[2..] {
        assert_eq!(reply.logprobs.len(), 30);
        for (logprob, id) in reply.logprobs.iter().zip(&reply.tokens) {
            // Three are allowed, though five were asked for; together they are all there is.
            assert_eq!(logprob.top.len(), 3, "{logprob:?}");
            let all: f32 = logprob.top.iter().map(|(_, value)| value.exp()).sum();
            assert!((all - 1.0).abs() < 1e-4, "{logprob:?}");
            let own = logprob.top.iter().find(|(top, _)| top == id).unwrap();
            assert_eq!(own.1, logprob.logprob);
        }
    }
}

#[tokio::test]
async fn reasoning_and_calls_are_free() {
    let engine = engine(|_| {}).await;
    let push = |id: u32| SamplingParams {
        logit_bias: vec![(id, 40.0)],
        presence_penalty: 2.0,
        frequency_penalty: 2.0,
        ..SamplingParams::greedy()
    };
    let with = |thinking: Thinking, sampling: SamplingParams| {
        let mut request = bound(prompt(4, 8), &schema());
        let opening = Opening {
            thinking,
            instead: Some(CALL),
        };
        request.constraint.as_mut().unwrap().opening = opening;
        request.sampling = sampling;
        request
    };
    let may = Thinking::May {
        open: OPEN,
        close: CLOSE,
    };
    let mut requests = vec![
        with(may, push(OPEN)),
        with(Thinking::Inside { close: CLOSE }, push(STOP)),
        with(may, push(CALL)),
        with(may, SamplingParams::greedy()),
    ];
    requests[3].sampling.logit_bias = vec![(OPEN, -100.0), (CALL, -100.0)];
    // Thinking goes on until something closes it.
    requests[0].sampling.logit_bias.push((CLOSE, 20.0));
    // A call would do after it, too.
    requests[0].sampling.logit_bias.push((CALL, -100.0));
    requests[2].max_tokens = 30;
    let replies = ask(&engine, &requests).await;
    let thought = &replies[0].tokens;
    assert_eq!(thought[0], OPEN);
    let close = thought.iter().position(|id| *id == CLOSE).expect("it closes");
    let rest = String::from_utf8(thought[close + 1..].iter().map(|id| *id as u8).collect()).unwrap();
    assert!(is_valid(rest.trim_start_matches(['\n', '\r'])), "{rest:?}");
    assert_eq!(replies[0].reason(), FinishReason::Stop);
    // The end is no way out of the reasoning.
    assert!(
        !replies[1].tokens.contains(&STOP) && replies[1].tokens.len() > 40,
        "{:?}",
        replies[1]
    );
    // A call is no JSON.
    assert_eq!(replies[2].tokens[0], CALL);
    assert!(!is_valid(&replies[2].text()));
    assert!(is_valid(&replies[3].text()), "{:?}", replies[3].text());
}

/// A reply of a form goes on for as long as the form can.
#[tokio::test]
async fn the_end_of_a_form_is_put_off() {
    let engine = engine(|_| {}).await;
    let at_least = |min_tokens: usize, form: Form| {
        let mut request = bound(prompt(2, 8), &form);
        request.sampling.min_tokens = min_tokens;
        request.sampling.logit_bias = vec![(STOP, 100.0)];
        request
    };
    let requests = [
        at_least(7, Form::Regex("(ab)*".into())),
        at_least(0, Form::Regex("(ab)*".into())),
        at_least(7, Form::Choice(vec!["x".into()])),
    ];
    let replies = ask(&engine, &requests).await;
    let texts: Vec<String> = replies.iter().map(Reply::text).collect();
    assert_eq!(texts, ["abababab", "", "x"]);
    assert!(replies.iter().all(|reply| reply.reason() == FinishReason::Stop));
}

/// A parser that cannot go on ends its own request, and nobody else's.
#[tokio::test]
async fn a_failure_is_ones_own() {
    let neighbours = [free(prompt(5, 10), 60), bound(prompt(6, 10), &schema())];
    let expected = alone(&neighbours).await;
    let engine = engine(|_| {}).await;
    // After `ab` no token can go on: nothing that anybody could see at the beginning.
    let stuck = bound(prompt(7, 10), &Form::Regex(format!("ab{}", char::from(MISSING))));
    let [one, two] = neighbours;
    let replies = ask(&engine, &[one, stuck.clone(), two]).await;
    for (reply, expected) in [(&replies[0], &expected[0]), (&replies[2], &expected[1])] {
        assert_eq!(reply.tokens, expected.tokens);
    }
    let failed = &replies[1];
    assert!(
        matches!(&failed.failed, Some(EngineError::Constraint(_))) && failed.end.is_none(),
        "{failed:?}"
    );
    assert!("ab".starts_with(&failed.text()), "{failed:?}");
    // The same when it comes to light with the first token.
    let form = Form::Choice(vec![format!("{}x", char::from(MISSING)), "ok".to_owned()]);
    let replies = ask(&engine, &[bound(prompt(8, 10), &form), stuck]).await;
    assert_eq!(replies[0].text(), "ok");
    let idle = async {
        while (engine.stats().running, engine.stats().waiting) != (0, 0) {
            tokio::task::yield_now().await;
        }
    };
    timeout(Duration::from_secs(30), idle).await.expect("in time");
}

/// Whoever goes away frees the place within a step, in the middle of a text.
#[tokio::test]
async fn a_cancelled_reply_makes_room() {
    let engine = engine(|config| {
        config.max_running = 1;
        config.max_waiting = 1;
    })
    .await;
    let endless = GenerateRequest {
        max_tokens: 380,
        ..bound(prompt(9, 10), &Form::Regex("[a-z]{1000}".to_owned()))
    };
    let mut first = engine.submit(endless).unwrap();
    let second = engine.submit(bound(prompt(9, 10), &schema())).unwrap();
    for _ in 0..5 {
        timeout(Duration::from_secs(30), first.events.recv())
            .await
            .expect("in time")
            .expect("an event");
    }
    drop(first);
    let reply = read(second).await;
    assert!(is_valid(&reply.text()), "{reply:?}");
}

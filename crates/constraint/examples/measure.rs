//! What a vocabulary and its masks cost: `cargo run --release -p constraint --example measure -- FILE`.
//!
//! FILE is a vocabulary in tiktoken's format, a line a token: base64 of its bytes, and its id. The Python package `dashscope`
//! carries that of Qwen (`dashscope/resources/qwen.tiktoken`, 151,643 tokens).
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::cast_precision_loss
)]

use std::time::{Duration, Instant};

use constraint::{Form, Grammars, Opening, Token};
use serde_json::json;

fn main() {
    let path = std::env::args().nth(1).expect("a file in tiktoken's format");
    let text = std::fs::read_to_string(path).expect("a readable file");
    let mut words: Vec<Vec<u8>> = text
        .lines()
        .map(|line| decode(line.split(' ').next().unwrap_or_default()))
        .collect();
    words.push(b"<|im_end|>".to_vec());
    let stop = u32::try_from(words.len() - 1).unwrap();
    let before = resident();
    let started = Instant::now();
    let tokens = words.iter().zip(0..).map(|(word, id)| {
        if id == stop {
            Token::Special(word)
        } else {
            Token::Text(word)
        }
    });
    let grammars = Grammars::new(tokens).unwrap();
    println!(
        "tree of {} tokens: {:.0} ms, {:.1} MiB",
        words.len(),
        millis(started.elapsed()),
        (resident() - before) as f64 / 1024.0
    );
    let person = json!({"type": "object", "additionalProperties": false, "required": ["name", "age", "tags", "home"],
        "properties": {
            "name": {"type": "string"}, "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 8},
            "home": {"type": "object", "additionalProperties": false, "required": ["city"],
                "properties": {"city": {"type": "string", "maxLength": 60}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}}}}});
    let countries: Vec<String> = (0..500).map(|n| format!("choice number {n}")).collect();
    for (name, form) in [
        ("json_object", Form::JsonObject),
        ("a schema of 4 properties", Form::JsonSchema(person)),
        (
            "a date",
            Form::Regex(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z".to_owned()),
        ),
        ("one of 500", Form::Choice(countries)),
        (
            "sums (Lark)",
            Form::Grammar("start: term (\"+\" term)*\nterm: /[0-9]{1,9}/ | \"(\" start \")\"\n".to_owned()),
        ),
    ] {
        let before = resident();
        let started = Instant::now();
        let constraint = grammars.compile(&form).unwrap();
        let compiled = started.elapsed();
        let mut times = Vec::new();
        let mut random = fastrand::Rng::with_seed(7);
        let mut flags = vec![false; words.len()];
        let mut fills = Duration::ZERO;
        for _ in 0..40 {
            let mut walk = constraint.walk(Opening::default(), &[stop]);
            for _ in 0..60 {
                let started = Instant::now();
                let allowed = walk.allowed().unwrap().unwrap();
                times.push(started.elapsed());
                let started = Instant::now();
                allowed.fill(&mut flags);
                fills += started.elapsed();
                let ids: Vec<u32> = (0..stop).filter(|id| allowed.has(*id)).collect();
                let Some(&id) = ids.get(random.usize(..ids.len().max(1))) else {
                    break;
                };
                if walk.take(id).unwrap() {
                    break;
                }
            }
        }
        times.sort();
        let at = |share: f64| millis(times[((times.len() - 1) as f64 * share) as usize]) * 1e3;
        let mean = times.iter().sum::<Duration>().as_secs_f64() * 1e6 / times.len() as f64;
        println!(
            "{name}: compiled in {:.1} ms; {} masks: mean {mean:.0} µs, median {:.0}, p99 {:.0}, most {:.0}; flags {:.0} µs; {:.1} MiB",
            millis(compiled),
            times.len(),
            at(0.5),
            at(0.99),
            at(1.0),
            fills.as_secs_f64() * 1e6 / times.len() as f64,
            (resident() - before) as f64 / 1024.0,
        );
    }
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// KiB resident, where the system says so.
fn resident() -> i64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok())
        .unwrap_or_default()
}

fn decode(base64: &str) -> Vec<u8> {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut bytes = Vec::new();
    let (mut bits, mut have) = (0_u32, 0);
    for digit in base64.bytes().take_while(|digit| *digit != b'=') {
        let value = DIGITS.iter().position(|known| *known == digit).expect("base64");
        bits = bits << 6 | u32::try_from(value).unwrap();
        have += 6;
        if have >= 8 {
            have -= 8;
            bytes.push((bits >> have & 0xff) as u8);
        }
    }
    bytes
}

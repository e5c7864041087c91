//! From records to figures, a table, JSON, and an exit code.

use std::collections::BTreeMap;
use std::fmt::{self, Write};
use std::rc::Rc;
use std::time::Duration;

use serde::Serialize;
use serde_json::{Value, json};

use super::client::Reply;
use super::load::{Record, Round, Target};
use super::options::Options;
use super::prompts::Calibration;
use super::stats::{Arrival, Distribution, LEAST_SHARE, Rounds, full_rate};

/// Everything that was measured.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// How.
    pub settings: Value,
    /// What, for each endpoint, the measured one first.
    pub endpoints: Vec<Figures>,
    /// The first endpoint's figures divided by each other's, round by round.
    pub ratios: Vec<Ratio>,
}

/// One endpoint's figures over all rounds.
#[derive(Debug, Clone, Serialize)]
pub struct Figures {
    /// Its name.
    pub name: String,
    /// The model asked for.
    pub model: String,
    /// Whether replies were kept from ending: the endpoint did not refuse the field.
    pub ignore_eos_sent: bool,
    /// Requests that succeeded.
    pub succeeded: usize,
    /// Requests that failed.
    pub failed: usize,
    /// The failed ones by kind.
    pub errors: BTreeMap<String, Errors>,
    /// Milliseconds to the first text, of streams that broke afterwards too.
    pub ttft_ms: Option<Latency>,
    /// Of prompts that had been sent before, with `--repeats`; `ttft_ms` leaves them out.
    pub repeat_ttft_ms: Option<Latency>,
    /// Of second and later turns, with `--turns`; `ttft_ms` leaves them out.
    pub later_turn_ttft_ms: Option<Latency>,
    /// Milliseconds per token after the first, one value for each request.
    pub tpot_ms: Option<Latency>,
    /// Milliseconds between pieces of text.
    pub itl_ms: Option<Latency>,
    /// Milliseconds to the last text.
    pub duration_ms: Option<Latency>,
    /// Tokens of the prompts, as the server counts.
    pub prompt_tokens: Option<Distribution>,
    /// Of them from a cache, as the server says.
    pub cached_tokens: Option<Distribution>,
    /// Tokens of the replies.
    pub completion_tokens: Option<Distribution>,
    /// Tokens generated per second of the whole round.
    pub tokens_per_second: Option<Rounds>,
    /// The same over the time in which every stream was being written; nothing with `--rate`, and nothing of rounds in
    /// which that was less than a tenth of the time in which anything was.
    pub full_tokens_per_second: Option<Rounds>,
    /// Requests that ended per second.
    pub requests_per_second: Option<Rounds>,
    /// Those figures of each round.
    pub rounds: Vec<RoundFigures>,
}

/// How times are spread, and how many requests should have had one.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Latency {
    /// The times there are; nothing if every request failed.
    #[serde(flatten)]
    pub times: Option<Distribution>,
    /// Requests that failed before they had the time. They are in no percentile: a server that refuses the slow ones
    /// looks fast.
    pub failed: usize,
}

impl Latency {
    /// `None` where nothing was to be measured.
    fn of(times: impl IntoIterator<Item = Duration>, failed: usize) -> Option<Self> {
        let times = Distribution::of_millis(times);
        (times.is_some() || failed > 0).then_some(Self { times, failed })
    }

    /// To the first text, of the requests that are wanted.
    fn to_first(records: &[Record], wanted: fn(&Record) -> bool) -> Option<Self> {
        let silent = records.iter().filter(|r| wanted(r) && r.first.is_none());
        Self::of(first_text(records, wanted), silent.count())
    }
}

/// Failures of one kind.
#[derive(Debug, Clone, Serialize)]
pub struct Errors {
    /// How many.
    pub count: usize,
    /// The first.
    pub example: String,
}

/// One round of one endpoint.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct RoundFigures {
    /// Seconds.
    pub wall: f64,
    /// As in [`Figures`].
    pub tokens_per_second: f64,
    /// As in [`Figures`].
    pub full_tokens_per_second: Option<f64>,
    /// Share of the time in which anything was written that it is, or would be, measured over.
    pub full_share: Option<f64>,
    /// As in [`Figures`].
    pub requests_per_second: f64,
    /// The middle time to the first text, in milliseconds.
    pub ttft_ms: Option<f64>,
    /// The middle time to the first text of prompts sent again.
    pub repeat_ttft_ms: Option<f64>,
    /// The middle time per token.
    pub tpot_ms: Option<f64>,
}

/// The first endpoint beside another: figures divided, for each round, then the middle and the extremes.
#[derive(Debug, Clone, Serialize)]
pub struct Ratio {
    /// The other one.
    pub to: String,
    /// Above 1: the first is faster.
    pub tokens_per_second: Option<Rounds>,
    /// Above 1: the first is faster.
    pub full_tokens_per_second: Option<Rounds>,
    /// Below 1: the first is faster.
    pub ttft: Option<Rounds>,
    /// Below 1: the first is faster.
    pub repeat_ttft: Option<Rounds>,
    /// Below 1: the first is faster.
    pub tpot: Option<Rounds>,
}

impl Report {
    /// Sums the rounds up; `targets` and `measured` in the order of the options' endpoints.
    #[must_use]
    pub fn new(
        options: &Options,
        seed: u64,
        calibration: Calibration,
        targets: &[Rc<Target>],
        measured: &[Vec<Round>],
    ) -> Self {
        let streams = options.rate.is_none().then_some(options.streams);
        let endpoints: Vec<Figures> = options
            .endpoints()
            .zip(targets)
            .zip(measured)
            .map(|((endpoint, target), rounds)| figures(&endpoint.name, target, rounds, streams))
            .collect();
        let ratios = match endpoints.split_first() {
            Some((first, others)) => others.iter().map(|other| ratio(first, other)).collect(),
            None => Vec::new(),
        };
        let settings = json!({
            "api": options.api,
            "streams": streams,
            "rate": options.rate,
            "arrivals": options.rate.map(|_| options.arrivals),
            "rounds": options.rounds(),
            "conversations": options.conversations(),
            "warmup": options.warmup,
            "prompt_tokens": options.prompt_tokens,
            "tokens": options.tokens,
            "shared_prefix": options.shared_prefix,
            "turns": options.turns,
            "repeats": options.repeats,
            "temperature": options.temperature,
            "body": options.body,
            "seed": seed,
            "calibration": calibration,
        });
        Self {
            settings,
            endpoints,
            ratios,
        }
    }

    /// All of it.
    #[must_use]
    pub fn to_json(&self) -> String {
        // Numbers and strings: there is nothing that cannot be written.
        serde_json::to_string_pretty(self).unwrap_or_default()
    }

    /// 0, or [`super::FAILED`] when a request failed or none succeeded.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        let fine = self.endpoints.iter().all(|e| e.failed == 0 && e.succeeded > 0);
        if fine { 0 } else { super::FAILED }
    }
}

fn replies(records: &[Record]) -> impl Iterator<Item = (&Record, &Reply)> {
    records.iter().filter_map(|r| Some((r, r.result.as_ref().ok()?)))
}

fn first_text(records: &[Record], wanted: fn(&Record) -> bool) -> impl Iterator<Item = Duration> {
    records
        .iter()
        .filter(move |record| wanted(record))
        .filter_map(|record| record.first)
}

fn is_cold(record: &Record) -> bool {
    record.repeat == 0 && record.turn == 0
}

fn is_repeated(record: &Record) -> bool {
    record.repeat > 0
}

fn is_later_turn(record: &Record) -> bool {
    record.repeat == 0 && record.turn > 0
}

fn per_token(reply: &Reply) -> Option<Duration> {
    let (first, last) = (reply.pieces.first()?, reply.pieces.last()?);
    let after_first = u32::try_from(reply.tokens)
        .ok()?
        .checked_sub(1)
        .filter(|n| *n > 0)?;
    // All in one piece: nothing is known about a token's time.
    (first < last).then(|| (*last - *first) / after_first)
}

fn round_figures(round: &Round, streams: Option<usize>) -> RoundFigures {
    // Never 0, so that nothing in no time is 0 per second.
    let wall = round.wall.as_secs_f64().max(f64::MIN_POSITIVE);
    let tokens: usize = replies(&round.records).map(|(_, reply)| reply.tokens).sum();
    let arrivals: Vec<Arrival> = replies(&round.records)
        .map(|(record, reply)| Arrival {
            pieces: reply.pieces.iter().map(|piece| record.started + *piece).collect(),
            tokens: reply.tokens,
        })
        .collect();
    let full = streams.and_then(|streams| full_rate(&arrivals, streams));
    let middle = |values: Option<Distribution>| values.map(|d| d.p50);
    RoundFigures {
        wall,
        tokens_per_second: tokens as f64 / wall,
        full_tokens_per_second: full
            .filter(|full| full.share >= LEAST_SHARE)
            .map(|full| full.rate),
        full_share: full.map(|full| full.share),
        requests_per_second: replies(&round.records).count() as f64 / wall,
        ttft_ms: middle(Distribution::of_millis(first_text(&round.records, is_cold))),
        repeat_ttft_ms: middle(Distribution::of_millis(first_text(&round.records, is_repeated))),
        tpot_ms: middle(Distribution::of_millis(
            replies(&round.records).filter_map(|(_, reply)| per_token(reply)),
        )),
    }
}

fn figures(name: &str, target: &Target, rounds: &[Round], streams: Option<usize>) -> Figures {
    let records: Vec<Record> = rounds.iter().flat_map(|round| round.records.clone()).collect();
    let mut errors: BTreeMap<String, Errors> = BTreeMap::new();
    for failure in records.iter().filter_map(|r| r.result.as_ref().err()) {
        let entry = errors.entry(failure.kind()).or_insert_with(|| Errors {
            count: 0,
            example: failure.to_string(),
        });
        entry.count += 1;
    }
    let failed = errors.values().map(|e| e.count).sum();
    let rounds: Vec<RoundFigures> = rounds.iter().map(|round| round_figures(round, streams)).collect();
    let of = |figure: fn(&RoundFigures) -> Option<f64>| {
        let values: Vec<f64> = rounds.iter().filter_map(figure).collect();
        Rounds::of(&values)
    };
    let counts = |count: fn(&Reply) -> Option<f64>| {
        let values: Vec<f64> = replies(&records).filter_map(|(_, reply)| count(reply)).collect();
        Distribution::of(&values)
    };
    Figures {
        name: name.to_owned(),
        model: target.model.clone(),
        ignore_eos_sent: target.fields.contains_key("ignore_eos"),
        succeeded: records.len() - failed,
        failed,
        errors,
        ttft_ms: Latency::to_first(&records, is_cold),
        repeat_ttft_ms: Latency::to_first(&records, is_repeated),
        later_turn_ttft_ms: Latency::to_first(&records, is_later_turn),
        tpot_ms: Latency::of(
            replies(&records).filter_map(|(_, reply)| per_token(reply)),
            failed,
        ),
        itl_ms: Latency::of(
            replies(&records).flat_map(|(_, reply)| {
                let later = reply.pieces.iter().skip(1);
                later.zip(&reply.pieces).map(|(this, before)| *this - *before)
            }),
            failed,
        ),
        duration_ms: Latency::of(
            replies(&records).filter_map(|(_, reply)| reply.pieces.last().copied()),
            failed,
        ),
        prompt_tokens: counts(|reply| reply.prompt_tokens.map(|n| n as f64)),
        cached_tokens: counts(|reply| reply.cached_tokens.map(|n| n as f64)),
        completion_tokens: counts(|reply| Some(reply.tokens as f64)),
        tokens_per_second: of(|r| Some(r.tokens_per_second)),
        full_tokens_per_second: of(|r| r.full_tokens_per_second),
        requests_per_second: of(|r| Some(r.requests_per_second)),
        rounds,
    }
}

fn ratio(first: &Figures, other: &Figures) -> Ratio {
    let of = |figure: fn(&RoundFigures) -> Option<f64>| {
        let pairs = first.rounds.iter().zip(&other.rounds);
        let values: Vec<f64> = pairs
            .filter_map(|(a, b)| Some(figure(a)? / figure(b).filter(|b| *b > 0.0)?))
            .collect();
        Rounds::of(&values)
    };
    Ratio {
        to: other.name.clone(),
        tokens_per_second: of(|r| Some(r.tokens_per_second)),
        full_tokens_per_second: of(|r| r.full_tokens_per_second),
        ttft: of(|r| r.ttft_ms),
        repeat_ttft: of(|r| r.repeat_ttft_ms),
        tpot: of(|r| r.tpot_ms),
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for endpoint in &self.endpoints {
            endpoint.show(f)?;
        }
        let Some(first) = self.endpoints.first() else {
            return Ok(());
        };
        for ratio in &self.ratios {
            writeln!(f, "{} ÷ {}  (median of rounds, min..max)", first.name, ratio.to)?;
            for (label, value) in [
                ("tokens/s", ratio.tokens_per_second),
                ("tokens/s, all streams", ratio.full_tokens_per_second),
                ("time to first token", ratio.ttft),
                ("the same, repeated", ratio.repeat_ttft),
                ("time per token", ratio.tpot),
            ] {
                if let Some(value) = value {
                    writeln!(f, "  {label:<24} {}", spread(value, 2))?;
                }
            }
        }
        Ok(())
    }
}

fn spread(value: Rounds, digits: usize) -> String {
    format!(
        "{:.digits$}  ({:.digits$}..{:.digits$})",
        value.median, value.min, value.max
    )
}

impl Figures {
    fn show(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{}  {}  {} requests in {} rounds, {} failed",
            self.name,
            self.model,
            self.succeeded + self.failed,
            self.rounds.len(),
            self.failed
        )?;
        for (kind, errors) in &self.errors {
            writeln!(
                f,
                "  failed: {} × {kind}, such as: {}",
                errors.count, errors.example
            )?;
        }
        for (label, value) in [
            ("tokens/s", self.tokens_per_second),
            ("tokens/s, all streams", self.full_tokens_per_second),
            ("requests/s", self.requests_per_second),
        ] {
            if let Some(value) = value {
                writeln!(f, "  {label:<24} {}", spread(value, 1))?;
            }
        }
        let times = [
            ("first token, ms", self.ttft_ms),
            ("  of repeated prompts", self.repeat_ttft_ms),
            ("  of later turns", self.later_turn_ttft_ms),
            ("time per token, ms", self.tpot_ms),
            ("between pieces, ms", self.itl_ms),
            ("last token, ms", self.duration_ms),
        ];
        let counts = [
            ("prompt tokens", self.prompt_tokens),
            ("  from a cache", self.cached_tokens),
            ("generated tokens", self.completion_tokens),
        ];
        let times = times.map(|(label, latency)| (label, latency.map(|l| (l.times, Some(l.failed)))));
        let counts = counts.map(|(label, values)| (label, values.map(|d| (Some(d), None))));
        let mut table = String::new();
        for (label, row) in times.into_iter().chain(counts) {
            let Some((values, failed)) = row else { continue };
            write!(table, "  {label:<24}")?;
            match values {
                Some(d) => {
                    for value in [d.mean, d.p50, d.p90, d.p95, d.p99, d.max] {
                        write!(table, " {value:>9.1}")?;
                    }
                    write!(table, " {:>7}", d.count)?;
                }
                None => write!(table, " {:>67}", 0)?,
            }
            match failed {
                Some(failed) => writeln!(table, " {failed:>7}")?,
                None => writeln!(table)?,
            }
        }
        if !table.is_empty() {
            write!(f, "  {:<24}", "")?;
            for head in ["mean", "p50", "p90", "p95", "p99", "max"] {
                write!(f, " {head:>9}")?;
            }
            writeln!(f, " {:>7} {:>7}\n{table}", "values", "failed")?;
        }
        Ok(())
    }
}

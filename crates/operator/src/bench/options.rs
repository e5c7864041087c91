//! The command line of `mlx-bench`.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use serde::Serialize;
use serde_json::{Map, Value};

const EXIT_CODES: &str = "\
An ENDPOINT is [NAME=]URL[#MODEL], such as here=http://127.0.0.1:8000#demo; without a model, the first that
/v1/models lists. Endpoints get the same prompts, in interleaved rounds whose order rotates.

Exit codes: 0 every request succeeded; 1 some failed; 2 the command line makes no sense; 3 an endpoint cannot be used.";

/// How long conversations arrive with `--rate` where nobody says how many: time enough for a queue to show.
const SECONDS_OF_ARRIVALS: f64 = 30.0;

/// Measures OpenAI endpoints under load: time to first token, time per token, throughput, errors.
#[derive(Debug, Clone, Parser)]
#[command(name = "mlx-bench", version, after_help = EXIT_CODES)]
pub struct Options {
    /// What to measure.
    #[arg(value_name = "ENDPOINT")]
    pub endpoint: Endpoint,
    /// Another endpoint, measured beside it; may be given several times. Ratios are those of the first to each other.
    #[arg(long, value_name = "ENDPOINT")]
    pub compare: Vec<Endpoint>,
    /// Conversations at the same time.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_least_one)]
    pub streams: usize,
    /// Conversations started per second, however many are running, in place of --streams.
    #[arg(long, value_name = "R", conflicts_with = "streams", value_parser = positive)]
    pub rate: Option<f64>,
    /// How they arrive with --rate.
    #[arg(long, value_enum, default_value_t = Arrivals::Poisson)]
    pub arrivals: Arrivals,
    /// Conversations in each round [default: 2 for each stream, or what arrives in 30 s at the rate; at least 4].
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub requests: Option<usize>,
    /// Rounds [default: 1; 3 with --compare].
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub rounds: Option<usize>,
    /// Conversations before the first round that do not count, for each endpoint.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub warmup: usize,
    /// Tokens of each prompt, and of what each further turn adds: N, or A..B for any number in between.
    #[arg(long, value_name = "N", default_value = "64")]
    pub prompt_tokens: Span,
    /// Tokens of each reply: N or A..B.
    #[arg(long, value_name = "N", default_value = "128")]
    pub tokens: Span,
    /// Share of a prompt that is the same in every conversation, 0 to 1.
    #[arg(long, value_name = "F", default_value_t = 0.0, value_parser = share)]
    pub shared_prefix: f64,
    /// Turns of each conversation: a turn repeats everything before it, the replies included.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_least_one)]
    pub turns: usize,
    /// How often each prompt is sent in a row; what is sent again is also reported on its own.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_least_one)]
    pub repeats: usize,
    /// Which route.
    #[arg(long, value_enum, default_value_t = Api::Completions)]
    pub api: Api,
    /// Seed of prompts, lengths and arrivals [default: from the clock, so that no cache knows the prompts].
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Sampling temperature.
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    pub temperature: f64,
    /// Let replies end by themselves. Otherwise `ignore_eos` is sent to every endpoint that does not refuse it.
    #[arg(long)]
    pub allow_eos: bool,
    /// More fields for every request: a JSON object.
    #[arg(long, value_name = "JSON", value_parser = object)]
    pub body: Option<Map<String, Value>>,
    /// Sent as a bearer token.
    #[arg(long, value_name = "KEY")]
    pub api_key: Option<String>,
    /// Longest a request may take, in seconds.
    #[arg(long, value_name = "S", default_value = "300", value_parser = seconds)]
    pub timeout: Duration,
    /// Print JSON in place of the table.
    #[arg(long)]
    pub json: bool,
    /// Write the JSON to this file too.
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

impl Options {
    /// Every endpoint, the measured one first.
    pub fn endpoints(&self) -> impl Iterator<Item = &Endpoint> {
        std::iter::once(&self.endpoint).chain(&self.compare)
    }

    /// Rounds of each endpoint.
    #[must_use]
    pub fn rounds(&self) -> usize {
        self.rounds.unwrap_or(if self.compare.is_empty() { 1 } else { 3 })
    }

    /// Conversations of each round.
    #[must_use]
    pub fn conversations(&self) -> usize {
        self.requests.unwrap_or_else(|| {
            let natural = match self.rate {
                Some(rate) => (rate * SECONDS_OF_ARRIVALS).ceil() as usize,
                None => 2 * self.streams,
            };
            natural.max(4)
        })
    }
}

/// When conversations start with `--rate`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Arrivals {
    /// Independent of each other.
    Poisson,
    /// At equal distances.
    Constant,
}

/// Which route of the API.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Api {
    /// `/v1/completions`.
    Completions,
    /// `/v1/chat/completions`.
    Chat,
}

/// One server and one of its models.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// What reports call it: the address, unless a name was given.
    pub name: String,
    /// Host and port.
    pub authority: String,
    /// What comes before `/v1`, without a slash at its end.
    pub base: String,
    /// Name of the model.
    pub model: Option<String>,
}

impl FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, rest) = match text.split_once('=') {
            Some((name, rest)) if !name.contains("://") => (Some(name), rest),
            _ => (None, text),
        };
        let (url, model) = match rest.split_once('#') {
            Some((url, model)) => (url, Some(model.to_owned()).filter(|m| !m.is_empty())),
            None => (rest, None),
        };
        let uri: http::Uri = url.parse().map_err(|error| format!("{url}: {error}"))?;
        match uri.scheme_str() {
            Some("http") => {}
            Some(other) => return Err(format!("{other} is not spoken here, only http")),
            None => return Err("an address looks like http://127.0.0.1:8000".to_owned()),
        }
        let host = uri
            .host()
            .filter(|h| !h.is_empty())
            .ok_or("the address has no host")?;
        let base = uri.path().trim_end_matches('/');
        let base = base.strip_suffix("/v1").unwrap_or(base);
        Ok(Self {
            name: name.unwrap_or(url).to_owned(),
            authority: format!("{host}:{}", uri.port_u16().unwrap_or(80)),
            base: base.to_owned(),
            model,
        })
    }
}

/// A length, or all lengths between two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Span {
    /// The smallest, at least 1.
    pub low: usize,
    /// The largest.
    pub high: usize,
}

impl Span {
    /// Any of the lengths, each as likely.
    pub fn draw(self, random: &mut fastrand::Rng) -> usize {
        random.usize(self.low..=self.high)
    }
}

impl std::fmt::Display for Span {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.low == self.high {
            write!(f, "{}", self.low)
        } else {
            write!(f, "{}..{}", self.low, self.high)
        }
    }
}

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| {
            text.parse::<usize>()
                .map_err(|_| format!("`{text}` is no number"))
        };
        let (low, high) = match text.split_once("..") {
            Some((low, high)) => (number(low)?, number(high)?),
            None => (number(text)?, number(text)?),
        };
        if low == 0 || high < low {
            return Err("a length is at least 1, and A..B rises".to_owned());
        }
        Ok(Self { low, high })
    }
}

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) | Err(_) => Err("a whole number of at least 1 is wanted".to_owned()),
        Ok(number) => Ok(number),
    }
}

fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number > 0.0 && number.is_finite() => Ok(number),
        _ => Err("a number above 0 is wanted".to_owned()),
    }
}

fn share(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if (0.0..=1.0).contains(&number) => Ok(number),
        _ => Err("a number between 0 and 1 is wanted".to_owned()),
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    Duration::try_from_secs_f64(positive(text)?).map_err(|error| error.to_string())
}

fn object(text: &str) -> Result<Map<String, Value>, String> {
    serde_json::from_str(text).map_err(|error| format!("no JSON object: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_in_all_forms() {
        let full: Endpoint = "here=http://localhost:8000/upstream/x/v1/#a/b=c".parse().unwrap();
        assert_eq!(full.name, "here");
        assert_eq!(full.authority, "localhost:8000");
        assert_eq!(full.base, "/upstream/x");
        assert_eq!(full.model.as_deref(), Some("a/b=c"));
        let short: Endpoint = "http://[::1]".parse().unwrap();
        assert_eq!(
            (short.authority.as_str(), short.base.as_str(), short.model),
            ("[::1]:80", "", None)
        );
        assert_eq!(short.name, "http://[::1]");
        for wrong in ["https://x", "localhost:80", "http://", "x=", "http://a b"] {
            assert!(wrong.parse::<Endpoint>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn command_lines() {
        let options = Options::try_parse_from(["mlx-bench", "http://a", "--tokens", "3..5"]).unwrap();
        assert_eq!((options.tokens.low, options.tokens.high), (3, 5));
        assert_eq!((options.rounds(), options.conversations()), (1, 4));
        let compared = ["mlx-bench", "http://a", "--compare", "http://b", "--streams", "8"];
        let options = Options::try_parse_from(compared).unwrap();
        assert_eq!((options.rounds(), options.conversations()), (3, 16));
        for (rate, conversations) in [("10", 300), ("0.5", 15), ("0.01", 4)] {
            let options = Options::try_parse_from(["mlx-bench", "http://a", "--rate", rate]).unwrap();
            assert_eq!(options.conversations(), conversations);
        }
        for wrong in [
            &["--streams", "0"][..],
            &["--streams", "2", "--rate", "1"],
            &["--rate", "-1"],
            &["--tokens", "5..3"],
            &["--shared-prefix", "1.5"],
            &["--body", "[1]"],
            &["--timeout", "0"],
        ] {
            let line = ["mlx-bench", "http://a"].iter().chain(wrong);
            assert!(Options::try_parse_from(line).is_err(), "{wrong:?}");
        }
    }
}

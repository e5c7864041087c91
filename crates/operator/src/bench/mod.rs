//! `mlx-bench`: a load generator for any OpenAI endpoint, alone or several beside each other.
//!
//! | module    | idea                                                                          |
//! |-----------|-------------------------------------------------------------------------------|
//! | `options` | the command line                                                              |
//! | `prompts` | synthetic conversations of wanted lengths                                     |
//! | `client`  | one streamed request, its failure's kind, the moments at which its text came  |
//! | `load`    | conversations at a concurrency or a rate                                      |
//! | `stats`   | percentiles, and the rate while all streams are being written                 |
//! | `report`  | from records to figures, a table, JSON, an exit code                          |
//!
//! Everything runs on one thread, so that it takes little from the machine that it measures.

pub mod client;
pub mod load;
pub mod options;
pub mod prompts;
pub mod report;
pub mod stats;

use std::rc::Rc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http::Method;
use serde_json::{Map, Value};
use thiserror::Error;

use client::{Client, Connection, Failure};
use load::{Pace, Target};
use options::Endpoint;
pub use options::Options;
use prompts::{Calibration, History};
pub use report::Report;

/// Exit code: an endpoint cannot be used at all.
pub const UNUSABLE: u8 = 3;
/// Exit code: some requests failed.
pub const FAILED: u8 = 1;

/// Why nothing was measured.
#[derive(Debug, Error)]
pub enum BenchError {
    /// An endpoint does not answer as it should, before any load.
    #[error("{name}: {failure}")]
    Endpoint {
        /// The endpoint's name.
        name: String,
        /// What it did.
        failure: Failure,
    },
    /// No model was named, and the endpoint lists none.
    #[error("{0} lists no model; name one: URL#MODEL")]
    NoModel(String),
}

/// Measures as the options say. To be run within a `LocalSet`.
///
/// # Errors
/// An endpoint that cannot be used. Requests that fail under load are part of the report.
pub async fn run(options: &Options) -> Result<Report, BenchError> {
    let seed = options.seed.unwrap_or_else(clock);
    let mut targets = Vec::new();
    for endpoint in options.endpoints() {
        targets.push(Rc::new(prepare(options, endpoint).await?));
    }
    let calibration = match targets.first() {
        Some(first) => calibrate(first, seed)
            .await
            .map_err(|failure| BenchError::Endpoint {
                name: options.endpoint.name.clone(),
                failure,
            })?,
        None => Calibration::default(),
    };
    let (rounds, count) = (options.rounds(), options.conversations());
    let made = |round: u64, count| prompts::conversations(options, seed, round, count, &calibration);
    for target in &targets {
        // The last of all numbers: no round has the same prompts.
        load::round(
            target,
            &Pace::Streams(options.streams),
            made(u64::MAX, options.warmup),
        )
        .await;
    }
    let mut measured: Vec<Vec<load::Round>> = vec![Vec::new(); targets.len()];
    for round in 0..rounds {
        let pace = match options.rate {
            Some(rate) => {
                let mut random = fastrand::Rng::with_seed(seed.wrapping_add(round as u64));
                Pace::at_rate(rate, options.arrivals, count, &mut random)
            }
            None => Pace::Streams(options.streams),
        };
        // Another one begins each time, so that none always follows the same neighbour.
        for at in (0..targets.len()).map(|i| (i + round) % targets.len()) {
            if let (Some(target), Some(rounds)) = (targets.get(at), measured.get_mut(at)) {
                rounds.push(load::round(target, &pace, made(round as u64, count)).await);
            }
        }
    }
    Ok(Report::new(options, seed, calibration, &targets, &measured))
}

/// A seed that no earlier run had.
fn clock() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    // JSON readers keep whole numbers below 2^53 only.
    now.unwrap_or(Duration::ZERO).as_millis() as u64
}

/// Finds the model, and whether the endpoint lets replies be kept from ending.
async fn prepare(options: &Options, endpoint: &Endpoint) -> Result<Target, BenchError> {
    let client = Client::new(endpoint, options.api_key.as_deref(), options.timeout);
    let failed = |failure| BenchError::Endpoint {
        name: endpoint.name.clone(),
        failure,
    };
    let model = match &endpoint.model {
        Some(model) => model.clone(),
        None => {
            let list = client
                .json(
                    &mut Connection::default(),
                    Method::GET,
                    "/v1/models",
                    Bytes::new(),
                )
                .await
                .map_err(failed)?;
            let id = list.pointer("/data/0/id").and_then(Value::as_str);
            id.ok_or_else(|| BenchError::NoModel(endpoint.name.clone()))?
                .to_owned()
        }
    };
    let mut fields = Map::new();
    fields.insert("temperature".to_owned(), options.temperature.into());
    if !options.allow_eos {
        fields.insert("ignore_eos".to_owned(), true.into());
    }
    fields.extend(options.body.clone().unwrap_or_default());
    let mut target = Target {
        client,
        model,
        fields,
        api: options.api,
        repeats: options.repeats,
    };
    match count(&target, "Hello").await {
        Err(Failure::Status(400 | 422, message)) if message.contains("ignore_eos") => {
            target.fields.remove("ignore_eos");
            count(&target, "Hello").await.map_err(failed)?;
        }
        other => {
            other.map_err(failed)?;
        }
    }
    target.fields.insert("stream".to_owned(), true.into());
    target.fields.insert(
        "stream_options".to_owned(),
        serde_json::json!({"include_usage": true}),
    );
    Ok(target)
}

/// Tokens that the server makes of a prompt; `None` when it does not say.
async fn count(target: &Target, text: &str) -> Result<Option<u64>, Failure> {
    let mut history = History::new(target.api, "");
    history.ask(text);
    let mut body = history.request(&target.model, 1, &target.fields);
    body.remove("stream");
    body.remove("stream_options");
    let body = Bytes::from(Value::Object(body).to_string());
    let path = history.path();
    let mut connection = Connection::default();
    let reply = target
        .client
        .json(&mut connection, Method::POST, path, body)
        .await?;
    Ok(reply.pointer("/usage/prompt_tokens").and_then(Value::as_u64))
}

async fn calibrate(target: &Target, seed: u64) -> Result<Calibration, Failure> {
    const FEW: usize = 16;
    const MANY: usize = 240;
    let mut random = fastrand::Rng::with_seed(seed);
    let few = count(target, &prompts::words(&mut random, FEW)).await?;
    let many = count(target, &prompts::words(&mut random, MANY)).await?;
    Ok(match (few, many) {
        (Some(few), Some(many)) => Calibration::through((FEW, few), (MANY, many)),
        _ => Calibration::default(),
    })
}

//! Conversations at a wanted concurrency or rate, and what became of their requests.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use serde_json::{Map, Value};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::client::{Answer, Client, Connection, Failure, Reply};
use super::options::{Api, Arrivals};
use super::prompts::{Conversation, History};

/// What all requests to an endpoint have in common.
#[derive(Debug, Clone)]
pub struct Target {
    /// Where they go.
    pub client: Client,
    /// Name of the model.
    pub model: String,
    /// Fields of every request.
    pub fields: Map<String, Value>,
    /// Which route.
    pub api: Api,
    /// How often each prompt is sent.
    pub repeats: usize,
}

/// When conversations start.
#[derive(Debug, Clone, PartialEq)]
pub enum Pace {
    /// So many at the same time, each followed by the next.
    Streams(usize),
    /// At these moments, rising, one for each conversation.
    At(Vec<Duration>),
}

impl Pace {
    /// Moments for `count` conversations at `rate` per second.
    pub fn at_rate(rate: f64, arrivals: Arrivals, count: usize, random: &mut fastrand::Rng) -> Self {
        let mut moment = 0.0;
        let moments = (0..count).map(|_| {
            let this = Duration::try_from_secs_f64(moment).unwrap_or(Duration::MAX);
            moment += match arrivals {
                Arrivals::Constant => 1.0 / rate,
                // Distances of a Poisson process are exponential; 1 - u is never 0.
                Arrivals::Poisson => -(1.0 - random.f64()).ln() / rate,
            };
            this
        });
        Self::At(moments.collect())
    }
}

/// One request.
#[derive(Debug, Clone)]
pub struct Record {
    /// Turn of its conversation, from 0.
    pub turn: usize,
    /// How often the same prompt had been sent before.
    pub repeat: usize,
    /// When it was due, since the round began: with a rate, the first request of a conversation is due when the
    /// conversation is; any other when what it follows has ended. The reply's moments count from here.
    pub started: Duration,
    /// When the first text came, also of a stream that broke afterwards.
    pub first: Option<Duration>,
    /// What came.
    pub result: Result<Reply, Failure>,
}

/// One round at one endpoint.
#[derive(Debug, Clone)]
pub struct Round {
    /// Every request that was made, in the order in which they ended.
    pub records: Vec<Record>,
    /// From the first request to the end of the last.
    pub wall: Duration,
}

/// Runs all conversations; a request that fails ends its conversation.
pub async fn round(target: &Rc<Target>, pace: &Pace, conversations: Vec<Conversation>) -> Round {
    let began = Instant::now();
    let records = Rc::new(RefCell::new(Vec::new()));
    let waiting = Rc::new(RefCell::new(VecDeque::from(conversations)));
    let mut tasks = JoinSet::new();
    match pace {
        Pace::Streams(streams) => {
            for _ in 0..*streams {
                let (target, records, waiting) = (target.clone(), records.clone(), waiting.clone());
                tasks.spawn_local(async move {
                    let mut connection = Connection::default();
                    loop {
                        // Taken out before the wait: nothing is borrowed across it.
                        let Some(next) = waiting.borrow_mut().pop_front() else {
                            break;
                        };
                        converse(&target, &mut connection, next, (began, None), &records).await;
                    }
                });
            }
        }
        Pace::At(moments) => {
            let idle: Rc<RefCell<Vec<Connection>>> = Rc::default();
            for moment in moments {
                let Some(next) = waiting.borrow_mut().pop_front() else {
                    break;
                };
                let due = began + *moment;
                tokio::time::sleep_until(due).await;
                let (target, records, idle) = (target.clone(), records.clone(), idle.clone());
                tasks.spawn_local(async move {
                    let kept = idle.borrow_mut().pop();
                    let mut connection = kept.unwrap_or_default();
                    converse(&target, &mut connection, next, (began, Some(due)), &records).await;
                    idle.borrow_mut().push(connection);
                });
            }
        }
    }
    // A task that panicked says so on standard error; its conversation is missing in the count.
    while tasks.join_next().await.is_some() {}
    Round {
        records: records.take(),
        wall: began.elapsed(),
    }
}

async fn converse(
    target: &Target,
    connection: &mut Connection,
    conversation: Conversation,
    (began, mut due): (Instant, Option<Instant>),
    records: &RefCell<Vec<Record>>,
) {
    let mut history = History::new(target.api, &conversation.shared);
    for (turn, (text, max_tokens)) in conversation.turns.into_iter().enumerate() {
        history.ask(&text);
        let body = history.request(&target.model, max_tokens, &target.fields);
        let body = Bytes::from(Value::Object(body).to_string());
        let mut said = None;
        for repeat in 0..target.repeats {
            // Not when it is sent: a program that is late, as the whole machine is busy, would forgive the server that.
            let due = due.take().unwrap_or_else(Instant::now);
            let Answer { first, result } = target
                .client
                .stream(connection, history.path(), body.clone(), due)
                .await;
            said = result.as_ref().ok().map(|reply| reply.text.clone());
            records.borrow_mut().push(Record {
                turn,
                repeat,
                started: due - began,
                first,
                result,
            });
            if said.is_none() {
                return;
            }
        }
        history.replied(&said.unwrap_or_default());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn constant_arrivals_are_equally_far_apart() {
        let mut random = fastrand::Rng::with_seed(1);
        let pace = Pace::at_rate(4.0, Arrivals::Constant, 4, &mut random);
        assert_eq!(
            pace,
            Pace::At([0, 250, 500, 750].map(Duration::from_millis).to_vec())
        );
    }

    #[test]
    fn poisson_arrivals_have_the_rate_and_the_scatter() {
        let mut random = fastrand::Rng::with_seed(1);
        let Pace::At(moments) = Pace::at_rate(10.0, Arrivals::Poisson, 20_001, &mut random) else {
            panic!("no moments")
        };
        let gaps: Vec<f64> = moments.windows(2).map(|w| (w[1] - w[0]).as_secs_f64()).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let variance = gaps.iter().map(|g| (g - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
        // Exponential: the deviation is the mean. 20,000 draws scatter by some 0.7 and 1.4 %.
        assert!((mean - 0.1).abs() < 0.004, "{mean}");
        assert!(
            (variance.sqrt() / mean - 1.0).abs() < 0.08,
            "{}",
            variance.sqrt() / mean
        );
    }
}

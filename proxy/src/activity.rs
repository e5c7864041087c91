//! What goes on and what went on: requests in flight, the last finished ones, counters per model.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use indexmap::IndexMap;
use lifecycle::ModelId;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::sync::broadcast;

use crate::house::{Ordered, Wire};
use crate::usage::{Meter, Usage};

/// Changes that a slow reader of the feed may lag behind.
const FEED: usize = 256;
/// Upper bounds of the histograms' buckets, in seconds.
pub const BUCKETS: [f64; 12] = [0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0];

/// A histogram in Prometheus' sense.
#[derive(Clone, Debug, Default)]
pub struct Histogram {
    /// Observations per bucket, each counted once.
    pub counts: [u64; BUCKETS.len()],
    /// All observations.
    pub total: u64,
    /// Their sum, in seconds.
    pub sum: f64,
}

impl Histogram {
    fn observe(&mut self, time: Duration) {
        let seconds = time.as_secs_f64();
        if let Some(count) = BUCKETS
            .iter()
            .position(|b| seconds <= *b)
            .and_then(|i| self.counts.get_mut(i))
        {
            *count += 1;
        }
        self.total += 1;
        self.sum += seconds;
    }
}

/// Counters of one model since the start of the proxy.
#[derive(Clone, Debug, Default)]
pub struct Counters {
    /// Finished requests by status; 499 for clients that left before the end.
    pub requests: BTreeMap<u16, u64>,
    /// Tokens of prompts, generated, and taken from prefix caches.
    pub prompt_tokens: u64,
    /// Generated tokens.
    pub completion_tokens: u64,
    /// Tokens of prompts taken from prefix caches.
    pub cached_tokens: u64,
    /// From the request's arrival to the first byte of the reply's body.
    pub first_byte: Histogram,
    /// From the request's arrival to the reply's end.
    pub duration: Histogram,
    /// Waiting for the model, before the request was forwarded.
    pub waiting: Histogram,
}

/// One finished request.
#[derive(Clone, Debug)]
pub struct Row {
    /// Ascending.
    pub id: u64,
    /// Unix time of the end, milliseconds.
    pub unix_ms: u64,
    /// Model.
    pub model: ModelId,
    /// Path as requested.
    pub path: String,
    /// Content type of the reply.
    pub content_type: String,
    /// Status; 499 for a client that left before the end.
    pub status: u16,
    /// Tokens.
    pub usage: Usage,
    /// From arrival to end.
    pub duration: Duration,
    /// From the reply's first byte to its end.
    pub generating: Option<Duration>,
    /// From forwarding to the reply's first byte.
    pub reading: Option<Duration>,
    /// What went wrong.
    pub error: Option<String>,
}

impl Row {
    /// In llama-swap's form: unknown numbers are -1.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let count = |n: Option<u64>| n.map_or(json!(-1), |n| json!(n));
        let speed = |n: Option<u64>, time: Option<Duration>| match (n, time) {
            (Some(n), Some(t)) if n > 0 && !t.is_zero() => json!(n as f64 / t.as_secs_f64()),
            _ => json!(-1),
        };
        let fresh = self
            .usage
            .prompt
            .map(|p| p.saturating_sub(self.usage.cached.unwrap_or(0)));
        let mut row = json!({
            "id": self.id,
            "timestamp": rfc3339(self.unix_ms),
            "model": &*self.model,
            "req_path": self.path,
            "resp_content_type": self.content_type,
            "resp_status_code": self.status,
            "tokens": {
                "cache_tokens": count(self.usage.cached),
                "draft_tokens": -1,
                "draft_acc_tokens": -1,
                "input_tokens": count(self.usage.prompt),
                "output_tokens": count(self.usage.completion),
                "prompt_per_second": speed(fresh, self.reading),
                "tokens_per_second": speed(self.usage.completion, self.generating),
            },
            "duration_ms": u64::try_from(self.duration.as_millis()).unwrap_or(u64::MAX),
            "has_capture": false,
            "metadata": {},
        });
        if let (Some(error), Some(row)) = (&self.error, row.as_object_mut()) {
            row.insert("error_msg".to_owned(), error.as_str().into());
        }
        row
    }
}

/// A request that runs.
#[derive(Debug)]
pub struct Running {
    /// Name for cancelling; ascending.
    pub id: u64,
    /// Unix time of its arrival, milliseconds.
    pub unix_ms: u64,
    /// Model.
    pub model: ModelId,
    /// Method.
    pub method: http::Method,
    /// Path.
    pub path: String,
    /// The client.
    pub client: String,
    /// When it arrived.
    pub begun: Instant,
    /// Where it is told to end.
    pub wire: Arc<Wire>,
}

impl Running {
    /// In llama-swap's form.
    #[must_use]
    pub fn to_json(&self) -> Value {
        json!({
            "id": self.id,
            "timestamp": rfc3339(self.unix_ms),
            "model": &*self.model,
            "req_path": self.path,
            "method": self.method.as_str(),
            "remote_ip": self.client,
            "elapsed_ms": u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX),
        })
    }

    /// Whether somebody has cancelled it.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.wire.ordered() == Some(Ordered::Cancelled)
    }
}

/// Something has changed.
#[derive(Clone, Debug)]
pub enum Change {
    /// A request has arrived.
    Began(Arc<Running>),
    /// A request has ended.
    Ended(u64),
    /// A row was added.
    Finished(u64),
}

/// All of it.
#[derive(Debug)]
pub struct Activity {
    inner: Mutex<Inner>,
    feed: broadcast::Sender<Change>,
}

#[derive(Debug, Default)]
struct Inner {
    rows: VecDeque<Row>,
    limit: usize,
    running: IndexMap<u64, Arc<Running>>,
    counters: IndexMap<ModelId, Counters>,
    next_row: u64,
    next_running: u64,
}

impl Activity {
    /// Keeps the last `limit` finished requests.
    #[must_use]
    pub fn new(limit: usize) -> Arc<Self> {
        let inner = Inner {
            limit: limit.max(1),
            ..Inner::default()
        };
        Arc::new(Self {
            inner: Mutex::new(inner),
            feed: broadcast::channel(FEED).0,
        })
    }

    /// Changes from now on.
    #[must_use]
    pub fn changes(&self) -> broadcast::Receiver<Change> {
        self.feed.subscribe()
    }

    /// A request has arrived; it is running until the trace is dropped.
    #[must_use]
    pub fn begin(
        self: &Arc<Self>,
        model: ModelId,
        method: http::Method,
        path: String,
        client: String,
    ) -> Trace {
        let mut inner = self.inner.lock();
        inner.next_running += 1;
        let running = Arc::new(Running {
            id: inner.next_running,
            unix_ms: unix_ms(),
            model,
            method,
            path,
            client,
            begun: Instant::now(),
            wire: Arc::default(),
        });
        inner.running.insert(running.id, running.clone());
        drop(inner);
        self.tell(|| Change::Began(running.clone()));
        Trace {
            activity: self.clone(),
            running,
            forwarded: None,
            told: None,
            first_byte: None,
            status: None,
            content_type: String::new(),
            complete: false,
            error: None,
            meter: Meter::default(),
            server: None,
        }
    }

    fn tell(&self, change: impl FnOnce() -> Change) {
        if self.feed.receiver_count() > 0 {
            let _ = self.feed.send(change());
        }
    }

    /// Ends a running request; whether there was one.
    #[must_use]
    pub fn cancel(&self, id: u64) -> bool {
        let running = self.inner.lock().running.get(&id).cloned();
        running.map(|r| r.wire.cancel()).is_some()
    }

    /// All running requests, oldest first.
    #[must_use]
    pub fn running(&self) -> Vec<Arc<Running>> {
        self.inner.lock().running.values().cloned().collect()
    }

    /// Finished requests that `wanted` accepts, oldest first.
    #[must_use]
    pub fn rows(&self, wanted: impl Fn(&Row) -> bool) -> Vec<Row> {
        self.inner
            .lock()
            .rows
            .iter()
            .filter(|r| wanted(r))
            .cloned()
            .collect()
    }

    /// Counters of every model that has been asked for.
    #[must_use]
    pub fn counters(&self) -> IndexMap<ModelId, Counters> {
        self.inner.lock().counters.clone()
    }

    /// Another limit of rows.
    pub fn set_limit(&self, limit: usize) {
        self.inner.lock().limit = limit.max(1);
    }
}

/// When a request was first sent to its model's server. As an extension of a request it is filled in on the way.
#[derive(Clone, Debug, Default)]
pub struct ForwardedAt(pub Arc<OnceLock<Instant>>);

/// One request from arrival to end; its end is its drop.
#[derive(Debug)]
pub struct Trace {
    activity: Arc<Activity>,
    /// As others see it.
    pub running: Arc<Running>,
    forwarded: Option<Instant>,
    told: Option<ForwardedAt>,
    first_byte: Option<Instant>,
    status: Option<u16>,
    content_type: String,
    complete: bool,
    error: Option<String>,
    meter: Meter,
    /// Who has served it, if not the model that it was begun for.
    server: Option<ModelId>,
}

impl Trace {
    /// It is another model that serves it: counted there, and shown in the row.
    pub fn served_by(&mut self, model: ModelId) {
        self.server = Some(model);
    }

    /// It is being sent to the model's server.
    pub fn forwarded(&mut self) {
        let now = Instant::now();
        self.forwarded = Some(now);
        if let Some(told) = &self.told {
            let _ = told.0.set(now);
        }
    }

    /// Somebody wants to know when it was first forwarded.
    pub fn tell_forwarded(&mut self, told: Option<ForwardedAt>) {
        self.told = told;
    }

    /// The reply's head is there.
    pub fn head(&mut self, status: u16, content_type: &str) {
        self.status = Some(status);
        content_type.clone_into(&mut self.content_type);
    }

    /// A piece of the reply's body.
    pub fn piece(&mut self, bytes: &[u8]) {
        if self.first_byte.is_none() {
            self.first_byte = Some(Instant::now());
        }
        self.meter.feed(bytes);
    }

    /// Whether the reply's last bytes are the end mark of a stream (OpenAI's or Anthropic's).
    #[must_use]
    pub fn saw_end(&self) -> bool {
        self.meter.saw_end()
    }

    /// The reply is complete.
    pub fn complete(&mut self) {
        self.complete = true;
    }

    /// It ends with this error and status.
    pub fn failed(&mut self, status: u16, message: &str) {
        self.status = Some(status);
        self.complete = true;
        self.error = Some(message.chars().take(500).collect());
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        let now = Instant::now();
        let running = &self.running;
        let status = match (self.complete, self.status) {
            (true, Some(status)) => status,
            _ => 499,
        };
        if !self.complete {
            let why = if running.is_cancelled() {
                "cancelled"
            } else {
                "the client left"
            };
            self.error.get_or_insert_with(|| why.to_owned());
        }
        let usage = self.meter.usage();
        let since = |at: Option<Instant>, from: Instant| at.map(|at| at.duration_since(from));
        let mut inner = self.activity.inner.lock();
        inner.running.shift_remove(&running.id);
        inner.next_row += 1;
        let row = Row {
            id: inner.next_row,
            unix_ms: unix_ms(),
            model: self.server.take().unwrap_or_else(|| running.model.clone()),
            path: running.path.clone(),
            content_type: std::mem::take(&mut self.content_type),
            status,
            usage,
            duration: now - running.begun,
            generating: self.first_byte.map(|at| now - at),
            reading: self.forwarded.and_then(|from| since(self.first_byte, from)),
            error: self.error.take(),
        };
        let counters = inner.counters.entry(row.model.clone()).or_default();
        *counters.requests.entry(status).or_default() += 1;
        counters.prompt_tokens += usage.prompt.unwrap_or(0);
        counters.completion_tokens += usage.completion.unwrap_or(0);
        counters.cached_tokens += usage.cached.unwrap_or(0);
        counters.duration.observe(row.duration);
        if let Some(time) = since(self.first_byte, running.begun) {
            counters.first_byte.observe(time);
        }
        if let Some(time) = since(self.forwarded, running.begun) {
            counters.waiting.observe(time);
        }
        let id = row.id;
        inner.rows.push_back(row);
        while inner.rows.len() > inner.limit {
            inner.rows.pop_front();
        }
        drop(inner);
        self.activity.tell(|| Change::Ended(self.running.id));
        self.activity.tell(|| Change::Finished(id));
    }
}

pub(crate) fn unix_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

/// `2026-01-02T03:04:05.678Z`.
#[must_use]
pub fn rfc3339(unix_ms: u64) -> String {
    let (days, ms) = (unix_ms / 86_400_000, unix_ms % 86_400_000);
    let (year, month, day) = civil(days);
    let (h, m, s) = (ms / 3_600_000, ms / 60_000 % 60, ms / 1_000 % 60);
    format!(
        "{year:04}-{month:02}-{day:02}T{h:02}:{m:02}:{s:02}.{:03}Z",
        ms % 1_000
    )
}

/// Year, month and day of a day since 1970-01-01, counting in eras of 400 years that begin on the first of March.
fn civil(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 {
        march_month + 3
    } else {
        march_month - 9
    };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

/// Milliseconds since 1970 of a time in RFC 3339, with `Z` or an offset.
#[must_use]
pub fn parse_rfc3339(text: &str) -> Option<u64> {
    let (date, time) = text.split_once(['T', 't', ' '])?;
    let mut date = date.split('-').map(str::parse::<u64>);
    let (year, month, day) = (date.next()?.ok()?, date.next()?.ok()?, date.next()?.ok()?);
    let zone = time.find(['Z', 'z', '+', '-'])?;
    let (clock, zone) = time.split_at_checked(zone)?;
    let mut parts = clock.split(':');
    let (h, m) = (
        parts.next()?.parse::<u64>().ok()?,
        parts.next()?.parse::<u64>().ok()?,
    );
    let seconds: f64 = parts.next()?.parse().ok()?;
    if !(1970..=9999).contains(&year)
        || !(1..=12).contains(&month)
        || !(1..=31).contains(&day)
        || h > 23
        || m > 59
    {
        return None;
    }
    if !(0.0..=60.0).contains(&seconds) {
        return None;
    }
    // The day whose civil date this is, found from below: 365.2425 days a year on average.
    let guess = (year - 1970) * 365 + (year - 1970) / 4;
    let begin = guess.saturating_sub(40);
    let days = (begin..begin + 420).find(|d| civil(*d) == (year, month, day))?;
    let offset_minutes: i64 = match zone {
        "Z" | "z" => 0,
        _ => {
            let (hours, minutes) = zone.get(1..)?.split_once(':')?;
            let minutes = hours.parse::<i64>().ok()? * 60 + minutes.parse::<i64>().ok()?;
            if zone.starts_with('-') { -minutes } else { minutes }
        }
    };
    let ms = days * 86_400_000 + h * 3_600_000 + m * 60_000 + (seconds * 1_000.0) as u64;
    ms.checked_add_signed(-offset_minutes * 60_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_as_text() {
        for (ms, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400_000, "2000-02-29T00:00:00.000Z"),
            (1_795_430_865_123, "2026-11-23T10:47:45.123Z"),
            (4_102_444_799_999, "2099-12-31T23:59:59.999Z"),
        ] {
            assert_eq!(rfc3339(ms), text);
            assert_eq!(parse_rfc3339(text), Some(ms));
        }
        assert_eq!(
            parse_rfc3339("2026-11-23T12:47:45+02:00"),
            Some(1_795_430_865_000)
        );
        assert_eq!(parse_rfc3339("2026-02-30T00:00:00Z"), None);
        assert_eq!(parse_rfc3339("soon"), None);
    }

    #[test]
    fn a_trace_becomes_a_row_and_counters() {
        let activity = Activity::new(2);
        let mut changes = activity.changes();
        for status in [200, 200, 502] {
            let mut trace = activity.begin("m".into(), http::Method::POST, "/v1/x".into(), "::1".into());
            assert_eq!(activity.running().len(), 1);
            trace.forwarded();
            trace.head(status, "application/json");
            trace.piece(br#"{"usage":{"prompt_tokens":3,"completion_tokens":2}}"#);
            trace.complete();
        }
        drop(activity.begin("m".into(), http::Method::POST, "/v1/x".into(), "::1".into()));
        let rows = activity.rows(|_| true);
        assert_eq!(
            rows.iter().map(|r| (r.id, r.status)).collect::<Vec<_>>(),
            [(3, 502), (4, 499)]
        );
        assert_eq!(rows[1].error.as_deref(), Some("the client left"));
        let counters = &activity.counters()["m"];
        assert_eq!(
            (
                counters.requests[&200],
                counters.prompt_tokens,
                counters.completion_tokens
            ),
            (2, 9, 6)
        );
        assert_eq!((counters.duration.total, counters.first_byte.total), (4, 3));
        assert!(matches!(changes.try_recv(), Ok(Change::Began(r)) if r.id == 1));
        assert!(matches!(changes.try_recv(), Ok(Change::Ended(1))));
        assert!(matches!(changes.try_recv(), Ok(Change::Finished(1))));
        assert!(!activity.cancel(1));
    }
}

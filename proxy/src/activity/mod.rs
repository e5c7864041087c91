//! What goes on and what went on: requests in flight, the last finished ones, counters per model.
//!
//! Finished requests and captures are kept in memory, or in a database when the registry names one.
//!
//! Layout: `captures` whole requests and replies, `shelves` where they are kept in memory; `query` which finished requests are wanted; `store` the
//! database's thread, `sql` its tables; `trace` one request from arrival to end.

pub mod captures;
pub mod query;
mod shelves;
mod sql;
pub mod store;
mod trace;

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use http::HeaderMap;
use indexmap::IndexMap;
use lifecycle::ModelId;
use parking_lot::Mutex;
use registry::Globals;
use serde_json::{Value, json};
use tokio::sync::broadcast;

use self::captures::{Captured, Recording};
use self::query::{Found, Page, Totals};
use self::shelves::Captures;
use self::store::Store;
pub use self::trace::{ForwardedAt, Selected, Trace};
use crate::catalog::Catalog;
pub use crate::clock::{rfc3339, unix_ms};
use crate::house::{Ordered, Wire};
use crate::usage::Usage;

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
    /// Its model's priority; `None` at a peer.
    pub priority: Option<i32>,
    /// The selector that was asked for.
    pub selector: Option<Box<str>>,
}

impl Row {
    /// Tokens of the prompt per second that were read, not taken from a cache: as the server has measured, else as
    /// seen from here.
    #[must_use]
    pub fn prompt_speed(&self) -> Option<f64> {
        let cached = self.usage.cached.unwrap_or(0);
        let read = self.usage.prompt.map(|p| p.saturating_sub(cached));
        self.usage.prompt_speed.or_else(|| speed(read, self.reading))
    }

    /// Tokens generated per second.
    #[must_use]
    pub fn gen_speed(&self) -> Option<f64> {
        let seen = || speed(self.usage.completion, self.generating);
        self.usage.gen_speed.or_else(seen)
    }

    /// In llama-swap's form: unknown numbers are -1.
    #[must_use]
    pub fn to_json(&self, has_capture: bool) -> Value {
        let count = |n: Option<u64>| n.map_or(json!(-1), |n| json!(n));
        let speed = |s: Option<f64>| s.map_or(json!(-1), |s| json!(s));
        let mut row = json!({
            "id": self.id,
            "timestamp": rfc3339(self.unix_ms),
            "model": &*self.model,
            "req_path": self.path,
            "resp_content_type": self.content_type,
            "resp_status_code": self.status,
            "tokens": {
                "cache_tokens": count(self.usage.cached),
                "draft_tokens": count(self.usage.drafted),
                "draft_acc_tokens": count(self.usage.accepted),
                "input_tokens": count(self.usage.prompt),
                "output_tokens": count(self.usage.completion),
                "prompt_per_second": speed(self.prompt_speed()),
                "tokens_per_second": speed(self.gen_speed()),
            },
            "duration_ms": u64::try_from(self.duration.as_millis()).unwrap_or(u64::MAX),
            "has_capture": has_capture,
            "metadata": metadata(self.priority, self.selector.as_deref()),
        });
        if let (Some(error), Some(row)) = (&self.error, row.as_object_mut()) {
            row.insert("error_msg".to_owned(), error.as_str().into());
        }
        row
    }
}

/// What llama-swap tells besides, as text.
fn metadata(priority: Option<i32>, selector: Option<&str>) -> Value {
    let priority = priority.map(|p| ("fifo_priority", p.to_string()));
    let selector = selector.map(|s| ("selector", s.to_owned()));
    let pairs = priority.into_iter().chain(selector);
    pairs
        .map(|(k, v)| (k.to_owned(), v.into()))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

fn speed(tokens: Option<u64>, time: Option<Duration>) -> Option<f64> {
    match (tokens, time) {
        (Some(n), Some(t)) if n > 0 && !t.is_zero() => Some(n as f64 / t.as_secs_f64()),
        _ => None,
    }
}

/// What is made of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Shown while it runs; counted and kept as a row when it has ended.
    Metered,
    /// Shown while it runs.
    Shown,
    /// Neither: a part of a model's own page.
    Passing,
}

/// A request that runs.
#[derive(Debug)]
pub struct Running {
    /// What is made of it.
    pub kind: Kind,
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
    /// Its headers, one a line, secrets blanked; empty if it is not shown.
    head: Vec<u8>,
    /// The reply's, once they are there.
    reply: OnceLock<Vec<u8>>,
    /// Bytes of the reply's body so far.
    bytes: AtomicU64,
}

impl Running {
    /// In llama-swap's form. Whoever stands between has said for whom it asks.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let head = captures::shown(&self.head);
        let origin = head.get("x-forwarded-for").and_then(Value::as_str);
        let origin = origin.and_then(|list| list.split(',').next()).map(str::trim);
        json!({
            "id": self.id,
            "timestamp": rfc3339(self.unix_ms),
            "model": &*self.model,
            "req_path": self.path,
            "method": self.method.as_str(),
            "remote_ip": origin.filter(|o| !o.is_empty()).unwrap_or(&self.client),
            "req_headers": head,
            "resp_headers": captures::shown(self.reply.get().map_or(&[], Vec::as_slice)),
            "resp_bytes": self.bytes.load(Ordering::Relaxed),
            "elapsed_ms": u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX),
        })
    }

    /// How far its reply has come: whether its head is there, and the bytes so far.
    #[must_use]
    pub fn progress(&self) -> (bool, u64) {
        (self.reply.get().is_some(), self.bytes.load(Ordering::Relaxed))
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
    captures: Captures,
    feed: broadcast::Sender<Change>,
}

#[derive(Debug, Default)]
struct Inner {
    /// Empty while there is a store.
    rows: VecDeque<Row>,
    limit: usize,
    store: Option<Arc<Store>>,
    running: IndexMap<u64, Arc<Running>>,
    counters: IndexMap<ModelId, Counters>,
    /// Since the first reload: who may have counters.
    catalog: Option<Arc<Catalog>>,
    next_row: u64,
    next_running: u64,
}

impl Inner {
    /// The counters of a model; `None` if the last reload has let go of them: a request that ends later brings nothing
    /// of them back.
    fn counters_of(&mut self, model: &ModelId) -> Option<&mut Counters> {
        let known = |catalog: &Arc<Catalog>| catalog.destination(model).is_some();
        if !self.counters.contains_key(model) && !self.catalog.as_ref().is_none_or(known) {
            return None;
        }
        Some(self.counters.entry(model.clone()).or_default())
    }
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
            captures: Captures::default(),
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
        kind: Kind,
        model: ModelId,
        method: http::Method,
        path: String,
        client: String,
        headers: &HeaderMap,
    ) -> Trace {
        let head = match kind {
            Kind::Metered | Kind::Shown => captures::lines(headers),
            Kind::Passing => Vec::new(),
        };
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
            kind,
            head,
            reply: OnceLock::new(),
            bytes: AtomicU64::new(0),
        });
        inner.running.insert(running.id, running.clone());
        drop(inner);
        if kind != Kind::Passing {
            self.tell(|| Change::Began(running.clone()));
        }
        Trace::new(self.clone(), running)
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

    /// The running requests that are shown, oldest first.
    #[must_use]
    pub fn shown(&self) -> Vec<Arc<Running>> {
        let inner = self.inner.lock();
        let shown = inner.running.values().filter(|r| r.kind != Kind::Passing);
        shown.cloned().collect()
    }

    /// All running requests, oldest first.
    #[must_use]
    pub fn running(&self) -> Vec<Arc<Running>> {
        self.inner.lock().running.values().cloned().collect()
    }

    /// What `/api/metrics/activity` shows.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn page(&self, page: Page) -> Result<Found, String> {
        match self.store() {
            Some(store) => store.page(page).await,
            None => Ok(page.of(&self.inner.lock().rows, &self.captures.ids())),
        }
    }

    /// What `/api/metrics/stats` shows, of these models; of all if none is named.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn totals(&self, models: Vec<String>) -> Result<Totals, String> {
        match self.store() {
            Some(store) => store.totals(models).await,
            None => Ok(Totals::of(self.inner.lock().rows.iter(), &models)),
        }
    }

    /// A captured request.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn captured(&self, id: u64) -> Result<Option<Captured>, String> {
        let packed = match self.store() {
            Some(store) => store.capture(id).await?,
            None => self.captures.get(id),
        };
        Ok(packed.and_then(|packed| Captured::unpack(&packed)))
    }

    /// Whether requests are to be recorded, and how much of each body.
    #[must_use]
    pub fn capture_room(&self) -> usize {
        self.captures.room()
    }

    /// Rows that the database has not taken.
    #[must_use]
    pub fn lost_rows(&self) -> u64 {
        self.store().map_or(0, |s| s.lost())
    }

    fn store(&self) -> Option<Arc<Store>> {
        self.inner.lock().store.clone()
    }

    fn keep_capture(self: &Arc<Self>, id: u64, recording: Box<Recording>) {
        let kept = self.clone();
        let size = recording.len();
        let keep = move || {
            let taken = recording.taken();
            let packed = recording.pack();
            kept.captures.flying.give_back(taken);
            match kept.store() {
                Some(store) => store.put_capture(id, packed.into(), kept.captures.limit()),
                None => kept.captures.put(id, &packed),
            }
        };
        captures::off_the_way(size, keep);
    }

    /// Counters of every model that has been asked for.
    #[must_use]
    pub fn counters(&self) -> IndexMap<ModelId, Counters> {
        self.inner.lock().counters.clone()
    }

    /// Lets go of the counters of models that a new catalog does not have, for good.
    pub fn follow(&self, catalog: &Arc<Catalog>) {
        let mut inner = self.inner.lock();
        inner
            .counters
            .retain(|model, _| catalog.destination(model).is_some());
        inner.catalog = Some(catalog.clone());
    }

    /// Takes up what a registry says about keeping. A store that cannot be opened leaves everything as it was.
    ///
    /// # Errors
    /// A sentence that says why not.
    pub fn configure(&self, globals: &Globals) -> Result<(), String> {
        let before = self.store();
        let store = match &globals.store_path {
            None => None,
            Some(path) if before.as_ref().is_some_and(|s| s.path == *path) => before,
            Some(path) => Some(Arc::new(Store::open(path)?)),
        };
        self.captures
            .set_limit(globals.capture_buffer_mb, store.is_some());
        let mut inner = self.inner.lock();
        inner.limit = globals.metrics_max_in_memory.max(1);
        if let Some(store) = &store {
            inner.next_row = inner.next_row.max(store.last_id);
            inner.rows.clear();
        }
        inner.store = store;
        Ok(())
    }

    /// Writes what is still to be written.
    pub async fn close(&self) {
        let store = self.inner.lock().store.take();
        if let Some(store) = store {
            store.close().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_becomes_a_row_and_counters() {
        let activity = Activity::new(2);
        let mut changes = activity.changes();
        let begin = |kind| {
            let (method, path) = (http::Method::POST, "/v1/x".to_owned());
            activity.begin(kind, "m".into(), method, path, "::1".into(), &HeaderMap::new())
        };
        for status in [200, 200, 502] {
            let mut trace = begin(Kind::Metered);
            assert_eq!(activity.running().len(), 1);
            trace.forwarded();
            trace.head(status, "application/json");
            let reply = br#"{"usage":{"prompt_tokens":3,"completion_tokens":2}}"#;
            trace.piece(reply, Instant::now());
            trace.complete();
        }
        drop(begin(Kind::Metered));
        let rows: Vec<Row> = activity.inner.lock().rows.iter().cloned().collect();
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
        // Others leave nothing behind, and what is part of a page is not even shown.
        let (shown, passing) = (begin(Kind::Shown), begin(Kind::Passing));
        assert_eq!((activity.running().len(), activity.shown().len()), (2, 1));
        drop((shown, passing));
        assert_eq!(activity.inner.lock().rows.back().map(|r| r.id), Some(4));
        assert_eq!(activity.counters()["m"].duration.total, 4);
        let mut left = Vec::new();
        while let Ok(change) = changes.try_recv() {
            left.push(change);
        }
        let [
            ..,
            Change::Finished(4),
            Change::Began(began),
            Change::Ended(ended),
        ] = &left[..]
        else {
            panic!("{left:?}");
        };
        assert_eq!((began.id, *ended), (5, 5));
    }
}

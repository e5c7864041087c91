//! One request from arrival to end.

use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use bytes::Bytes;
use http::{Extensions, HeaderMap, StatusCode};
use lifecycle::ModelId;

use super::captures::{self, Recording};
use super::{Activity, Change, Kind, Row, Running};
use crate::clock::unix_ms;
use crate::usage::Meter;

/// Characters kept of an error.
const ERROR: usize = 500;

/// When a request was first sent to its model's server. As an extension of a request it is filled in on the way.
#[derive(Clone, Debug, Default)]
pub struct ForwardedAt(pub Arc<OnceLock<Instant>>);

/// The selector that a request has asked for, as an extension of it.
#[derive(Clone, Debug)]
pub struct Selected(pub Box<str>);

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
    recording: Option<Box<Recording>>,
    priority: Option<i32>,
    selector: Option<Box<str>>,
}

impl Trace {
    pub(super) fn new(activity: Arc<Activity>, running: Arc<Running>) -> Self {
        Self {
            activity,
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
            recording: None,
            priority: None,
            selector: None,
        }
    }

    /// Keeps the request, as the client sent it, and the reply to come.
    pub fn record(&mut self, headers: &HeaderMap, body: &Bytes) {
        let room = self.activity.capture_room();
        if room > 0 && self.running.kind == Kind::Metered {
            let (path, lines) = (&self.running.path, &self.running.head);
            let flying = &self.activity.captures.flying;
            let recording = Recording::new(path, headers, lines, body, room, flying);
            self.recording = Some(Box::new(recording));
        }
    }

    /// The headers of the reply to keep.
    pub fn record_reply(&mut self, headers: &HeaderMap) {
        if self.running.kind == Kind::Passing {
            return;
        }
        let lines = self.running.reply.get_or_init(|| captures::lines(headers));
        if let Some(recording) = &mut self.recording {
            recording.reply(headers, lines);
        }
    }

    /// It is another model that serves it: counted there, and shown in the row.
    pub fn served_by(&mut self, model: ModelId) {
        self.server = Some(model);
    }

    /// What the row says besides: the model's priority, and what the request brings along.
    pub fn describe(&mut self, priority: Option<i32>, extensions: &Extensions) {
        self.priority = priority;
        self.told = extensions.get().cloned();
        self.selector = extensions.get().map(|Selected(name)| name.clone());
    }

    /// It is being sent to the model's server.
    pub fn forwarded(&mut self) {
        let now = Instant::now();
        self.forwarded = Some(now);
        if let Some(told) = &self.told {
            let _ = told.0.set(now);
        }
    }

    /// The reply's head is there.
    pub fn head(&mut self, status: u16, content_type: &str) {
        self.status = Some(status);
        content_type.clone_into(&mut self.content_type);
    }

    /// A piece of the reply's body, which has arrived `now`.
    pub fn piece(&mut self, bytes: &[u8], now: Instant) {
        self.first_byte.get_or_insert(now);
        self.meter.feed(bytes);
        self.running.bytes.store(self.meter.bytes, Ordering::Relaxed);
        if let Some(recording) = &mut self.recording {
            recording.piece(bytes, &self.activity.captures.flying);
        }
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
        self.error = Some(message.chars().take(ERROR).collect());
    }

    /// What the model's server says to a request that it has refused.
    fn refused(&self, status: u16) -> String {
        let reason = || {
            let known = StatusCode::from_u16(status).ok();
            let reason = known.and_then(|s| s.canonical_reason());
            reason.map_or_else(|| status.to_string(), str::to_owned)
        };
        let said = self.meter.error_text().map(|t| t.chars().take(ERROR).collect());
        said.unwrap_or_else(reason)
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        let running = &self.running;
        if running.kind != Kind::Metered {
            self.activity.inner.lock().running.shift_remove(&running.id);
            if running.kind == Kind::Shown {
                self.activity.tell(|| Change::Ended(running.id));
            }
            return;
        }
        let now = Instant::now();
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
        if self.error.is_none() && status >= 300 {
            self.error = Some(self.refused(status));
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
            priority: self.priority,
            selector: self.selector.take(),
        };
        if let Some(counters) = inner.counters_of(&row.model) {
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
        }
        let id = row.id;
        match &inner.store {
            Some(store) => store.put(row),
            None => inner.rows.push_back(row),
        }
        while inner.rows.len() > inner.limit {
            inner.rows.pop_front();
        }
        drop(inner);
        if let Some(recording) = self.recording.take() {
            self.activity.keep_capture(id, recording);
        }
        self.activity.tell(|| Change::Ended(self.running.id));
        self.activity.tell(|| Change::Finished(id));
    }
}

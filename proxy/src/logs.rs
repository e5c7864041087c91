//! The last lines of the proxy and of each model, bounded, and a live feed of them.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use indexmap::IndexMap;
use lifecycle::ModelId;
use parking_lot::Mutex;
use tokio::sync::broadcast;

use crate::logline;
use crate::outlet::Outlet;

/// Bytes kept of the combined log.
const COMBINED_BYTES: usize = 100 * 1024;
/// Bytes kept per model.
const MODEL_BYTES: usize = 32 * 1024;
/// Longest line kept; the rest of a longer one is cut.
pub(crate) const MAX_LINE: usize = 8 * 1024;
/// Lines that a slow reader of the live feed may lag behind before it loses some.
const LIVE_LINES: usize = 256;

thread_local! {
    /// Where a line is put together.
    static SCRATCH: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Whose line it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// The proxy itself.
    Proxy,
    /// A model's process.
    Model(ModelId),
}

/// One line, with its newline.
#[derive(Clone, Debug)]
pub struct Line {
    /// Whose.
    pub source: Source,
    /// Text; may hold bytes that are not UTF-8.
    pub text: Bytes,
}

#[derive(Debug, Default)]
struct Ring {
    lines: VecDeque<Line>,
    bytes: usize,
}

impl Ring {
    fn push(&mut self, line: Line, capacity: usize) {
        self.bytes += line.text.len();
        self.lines.push_back(line);
        while self.bytes > capacity
            && let Some(old) = self.lines.pop_front()
        {
            self.bytes -= old.text.len();
        }
    }
}

/// All logs of the house. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Logs {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    combined: Mutex<Ring>,
    models: Mutex<IndexMap<ModelId, Ring>>,
    /// Models' lines go to standard output too.
    echo: AtomicBool,
    live: broadcast::Sender<Line>,
    /// Standard output, from the first line that goes there.
    stdout: OnceLock<Outlet>,
    /// Of the proxy's own lines, once the log has started.
    form: OnceLock<Form>,
}

/// The form of the proxy's own lines.
#[derive(Clone, Copy, Debug, Default)]
pub struct Form {
    /// They go to standard output too.
    pub stdout: bool,
    /// The time in front, in strftime's notation.
    pub time: Option<&'static str>,
}

impl Inner {
    fn stdout(&self) -> &Outlet {
        self.stdout.get_or_init(|| Outlet::new(std::io::stdout()))
    }
}

impl Default for Logs {
    fn default() -> Self {
        let inner = Inner {
            combined: Mutex::default(),
            models: Mutex::default(),
            echo: AtomicBool::new(false),
            live: broadcast::channel(LIVE_LINES).0,
            stdout: OnceLock::new(),
            form: OnceLock::new(),
        };
        Self {
            inner: Arc::new(inner),
        }
    }
}

impl Logs {
    /// Whether models' lines go to standard output too.
    pub fn echo_models(&self, echo: bool) {
        self.inner.echo.store(echo, Ordering::Relaxed);
    }

    /// Adds one line; a newline is appended if it has none.
    pub fn push(&self, source: Source, text: &[u8]) {
        let text = text.get(..text.len().min(MAX_LINE)).unwrap_or_default();
        let mut line = Vec::with_capacity(text.len() + 1);
        line.extend_from_slice(text);
        if !text.ends_with(b"\n") {
            line.push(b'\n');
        }
        self.keep(Line {
            source,
            text: line.into(),
        });
    }

    /// Says what the proxy's own lines look like; the first word counts.
    pub(crate) fn set_form(&self, form: Form) {
        let _ = self.inner.form.set(form);
    }

    /// Adds a line of the proxy's own at level `INFO`: as the log does it, without the machinery for events with fields,
    /// which costs more than all the rest of a small request's bookkeeping.
    pub(crate) fn inform(&self, write: impl FnOnce(&mut String)) {
        let form = self.inner.form.get().copied().unwrap_or_default();
        SCRATCH.with_borrow_mut(|text| {
            text.clear();
            if let Some(time) = form.time.and_then(logline::now) {
                text.push_str(&time);
                text.push(' ');
            }
            text.push_str("[INFO] ");
            write(text);
            text.truncate(text.floor_char_boundary(MAX_LINE));
            text.push('\n');
            if form.stdout {
                self.inner.stdout().write(text.as_bytes());
            }
            self.keep(Line {
                source: Source::Proxy,
                text: Bytes::copy_from_slice(text.as_bytes()),
            });
            text.shrink_to(MAX_LINE);
        });
    }

    fn keep(&self, line: Line) {
        // Under the lock of the history, so that a new reader sees each line once: in the history or live.
        let mut combined = self.inner.combined.lock();
        if let Source::Model(id) = &line.source {
            if self.inner.echo.load(Ordering::Relaxed) {
                self.inner.stdout().write(&line.text);
            }
            self.inner
                .models
                .lock()
                .entry(id.clone())
                .or_default()
                .push(line.clone(), MODEL_BYTES);
        }
        if self.inner.live.receiver_count() > 0 {
            let _ = self.inner.live.send(line.clone());
        }
        combined.push(line, COMBINED_BYTES);
    }

    /// Waits until standard output has taken all lines so far, at most `limit`.
    pub async fn flush(&self, limit: Duration) {
        if let Some(stdout) = self.inner.stdout.get() {
            stdout.flush(limit).await;
        }
    }

    /// What is kept, oldest first, of the sources that `wanted` accepts.
    #[must_use]
    pub fn history(&self, wanted: impl Fn(&Source) -> bool) -> Vec<u8> {
        self.subscribe(wanted).0
    }

    /// What is kept, and all that follows.
    #[must_use]
    pub fn subscribe(&self, wanted: impl Fn(&Source) -> bool) -> (Vec<u8>, broadcast::Receiver<Line>) {
        let combined = self.inner.combined.lock();
        let mut text = Vec::with_capacity(combined.bytes);
        for line in combined.lines.iter().filter(|l| wanted(&l.source)) {
            text.extend_from_slice(&line.text);
        }
        (text, self.inner.live.subscribe())
    }

    /// What is kept of one model, and all that follows of everybody.
    #[must_use]
    pub fn subscribe_model(&self, model: &str) -> (Vec<u8>, broadcast::Receiver<Line>) {
        let _combined = self.inner.combined.lock();
        (self.model_history(model), self.inner.live.subscribe())
    }

    /// Lets go of the models that are not to be kept.
    pub fn retain(&self, keep: impl Fn(&ModelId) -> bool) {
        self.inner.models.lock().retain(|model, _| keep(model));
    }

    /// What is kept of one model.
    #[must_use]
    pub fn model_history(&self, model: &str) -> Vec<u8> {
        let models = self.inner.models.lock();
        models
            .get(model)
            .map(|r| r.lines.iter().flat_map(|l| l.text.iter().copied()).collect())
            .unwrap_or_default()
    }

    /// The last lines of one model as plain text, for error messages: colours and other escapes are left out.
    #[must_use]
    pub fn tail(&self, model: &str, lines: usize) -> String {
        let models = self.inner.models.lock();
        let Some(ring) = models.get(model) else {
            return String::new();
        };
        let skip = ring.lines.len().saturating_sub(lines);
        ring.lines
            .iter()
            .skip(skip)
            .map(|l| plain(&String::from_utf8_lossy(&l.text)))
            .collect()
    }

    /// Writer for the proxy's own log: each line goes to the ring, and to standard output if `stdout`.
    #[must_use]
    pub fn writer(&self, stdout: bool) -> Writer {
        Writer {
            logs: self.clone(),
            stdout,
        }
    }
}

/// The text without terminal escapes (`ESC [ ... letter`) and other control characters.
fn plain(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            '\u{1b}' if chars.as_str().starts_with('[') => {
                chars.next();
                let _ = chars.find(|c| ('@'..='~').contains(c));
            }
            '\n' | '\t' => out.push(c),
            c if c.is_control() => {}
            c => out.push(c),
        }
    }
    out
}

/// Where the proxy's own log goes.
#[derive(Clone, Debug)]
pub struct Writer {
    logs: Logs,
    stdout: bool,
}

impl std::io::Write for Writer {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        if self.stdout {
            self.logs.inner.stdout().write(buf);
        }
        self.logs.push(Source::Proxy, buf);
        Ok(buf.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rings_are_bounded_and_separate() {
        let logs = Logs::default();
        let model = Source::Model("m".into());
        for i in 0..20_000 {
            logs.push(model.clone(), format!("line {i}").as_bytes());
        }
        logs.push(Source::Proxy, b"own\n");
        let all = logs.history(|_| true);
        assert!(all.len() <= COMBINED_BYTES && all.ends_with(b"line 19999\nown\n"));
        assert!(logs.model_history("m").len() <= MODEL_BYTES);
        assert_eq!(logs.tail("m", 2), "line 19998\nline 19999\n");
        assert_eq!(logs.history(|s| *s == Source::Proxy), b"own\n");
        logs.push(model.clone(), b"\x1b[2m10:00\x1b[0m \x1b[1;32mgreen\x1b[0m\r");
        assert_eq!(logs.tail("m", 1), "10:00 green\n");
        logs.push(model, &[b'x'; 3 * MAX_LINE]);
        assert_eq!(logs.tail("m", 1).len(), MAX_LINE + 1);
    }

    #[test]
    fn models_that_are_gone_leave_nothing() {
        let logs = Logs::default();
        for model in ["a", "b"] {
            logs.push(Source::Model(model.into()), b"line");
        }
        logs.retain(|m| &**m == "a");
        assert_eq!(
            (logs.model_history("a"), logs.model_history("b")),
            (b"line\n".to_vec(), vec![])
        );
    }

    #[test]
    fn a_reader_sees_each_line_once() {
        let logs = Logs::default();
        logs.push(Source::Proxy, b"before");
        let (history, mut live) = logs.subscribe(|_| true);
        logs.push(Source::Proxy, b"after");
        assert_eq!(history, b"before\n");
        assert_eq!(&live.try_recv().unwrap().text[..], b"after\n");
        assert!(live.try_recv().is_err());
    }
}

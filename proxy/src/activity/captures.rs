//! Whole requests and replies, for people who look for a fault: the last ones, within a bound of memory.
//!
//! Keys and cookies are blanked before anything is kept, and bodies that are no text are left out. Nothing waits for
//! a capture: a stream is copied as it passes, and what is large is packed on another thread.

use std::sync::atomic::{AtomicUsize, Ordering};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::HeaderMap;
use http::header::{
    AUTHORIZATION, CONTENT_ENCODING, CONTENT_TYPE, COOKIE, HeaderName, HeaderValue, PROXY_AUTHORIZATION,
    SET_COOKIE,
};
use serde_json::{Map, Value, json};

/// What is not for other eyes.
const SECRET: [HeaderName; 7] = [
    AUTHORIZATION,
    PROXY_AUTHORIZATION,
    COOKIE,
    SET_COOKIE,
    HeaderName::from_static("x-api-key"),
    HeaderName::from_static("api-key"),
    HeaderName::from_static("x-goog-api-key"),
];
/// Smaller ones are not worth packing.
const SMALL: usize = 1024;
/// Larger ones are packed on another thread.
const LARGE: usize = 16 * 1024;
/// A request that holds no more than this until its end takes nothing from what all share.
const FREE: usize = 4 * 1024;
/// Largest capture that is unpacked: what is larger was not made here.
const MAX_UNPACKED: u32 = 1 << 30;

/// One request and its reply while they pass, written down as it will be kept: path, request, reply, each part behind
/// its length. Most requests are small, and this is then one piece of memory from their arrival to their being shown.
#[derive(Debug)]
pub struct Recording {
    room: usize,
    plain: Vec<u8>,
    /// A request's body that is not worth a copy of its own until the end, and where it belongs.
    aside: Option<(usize, Bytes)>,
    /// Where the reply begins.
    reply_at: usize,
    /// Where its body begins, if it is kept: behind its length, which is known at the end.
    body_at: Option<usize>,
    /// Bytes taken from what all share.
    taken: usize,
}

/// Memory that captures hold before their requests have ended: as much as may be kept of finished ones.
#[derive(Debug, Default)]
pub struct Flying {
    pub(super) limit: AtomicUsize,
    used: AtomicUsize,
}

impl Flying {
    /// Whether there was room for so many bytes more.
    fn take(&self, bytes: usize) -> bool {
        let limit = self.limit.load(Ordering::Relaxed);
        let more = |used: usize| used.checked_add(bytes).filter(|sum| *sum <= limit);
        self.used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, more)
            .is_ok()
    }

    pub(super) fn give_back(&self, bytes: usize) {
        if bytes > 0 {
            self.used.fetch_sub(bytes, Ordering::Relaxed);
        }
    }
}

/// The length of a part that was not kept.
const LEFT_OUT: [u8; 4] = u32::MAX.to_le_bytes();

fn length(bytes: usize) -> [u8; 4] {
    u32::try_from(bytes).unwrap_or(u32::MAX).to_le_bytes()
}

/// Whether a body of this type can be read by people.
fn is_text(headers: &HeaderMap) -> bool {
    let kind = headers
        .get(CONTENT_TYPE)
        .map(HeaderValue::as_bytes)
        .unwrap_or_default()
        .trim_ascii_start();
    if headers.contains_key(CONTENT_ENCODING) {
        return false;
    }
    // What most are.
    if kind.starts_with(b"application/json") || kind.starts_with(b"text/") {
        return true;
    }
    let binary = [
        "audio/",
        "image/",
        "video/",
        "font/",
        "application/octet-stream",
        "application/zip",
        "application/pdf",
        "multipart/",
    ];
    let is = |b: &&str| {
        kind.get(..b.len())
            .is_some_and(|begin| begin.eq_ignore_ascii_case(b.as_bytes()))
    };
    !binary.iter().any(is)
}

impl Recording {
    /// Begins with the request, whose headers are written down as `lines` says; `room` is the largest body that is
    /// kept.
    #[must_use]
    pub fn new(
        path: &str,
        headers: &HeaderMap,
        lines: &[u8],
        body: &Bytes,
        room: usize,
        flying: &Flying,
    ) -> Self {
        let large = body.len() > FREE;
        let keep = is_text(headers) && body.len() <= room && (!large || flying.take(body.len()));
        let copy = if keep && body.len() <= LARGE {
            body.len()
        } else {
            0
        };
        let mut plain = Vec::with_capacity(copy + path.len() + 512);
        plain.push(0);
        plain.extend_from_slice(&length(path.len()));
        plain.extend_from_slice(path.as_bytes());
        push_part(&mut plain, lines);
        plain.extend_from_slice(&if keep { length(body.len()) } else { LEFT_OUT });
        let aside = if copy < body.len() && keep {
            Some((plain.len(), body.clone()))
        } else {
            plain.extend_from_slice(body.get(..copy).unwrap_or_default());
            None
        };
        Self {
            room,
            reply_at: plain.len(),
            plain,
            aside,
            body_at: None,
            taken: if keep && large { body.len() } else { 0 },
        }
    }

    /// The reply's head, whose headers are written down as `lines` says.
    pub fn reply(&mut self, headers: &HeaderMap, lines: &[u8]) {
        self.plain.truncate(self.reply_at);
        push_part(&mut self.plain, lines);
        self.plain.extend_from_slice(&LEFT_OUT);
        self.body_at = is_text(headers).then_some(self.plain.len());
    }

    /// A piece of the reply's body.
    pub fn piece(&mut self, piece: &[u8], flying: &Flying) {
        let Some(at) = self.body_at else {
            return;
        };
        let fits = self.plain.len() - at + piece.len() <= self.room;
        if fits {
            self.plain.extend_from_slice(piece);
        }
        if !fits || !self.is_paid(flying) {
            self.plain.truncate(at);
            self.plain.shrink_to_fit();
            self.body_at = None;
            let less = self.taken.saturating_sub(self.held());
            self.taken -= less;
            flying.give_back(less);
        }
    }

    /// Memory that it holds.
    fn held(&self) -> usize {
        self.plain.capacity() + self.aside.as_ref().map_or(0, |(_, body)| body.len())
    }

    /// Whether the memory that it holds is within its own part, or could be taken from what all share.
    fn is_paid(&mut self, flying: &Flying) -> bool {
        let held = self.held();
        if held <= self.taken.max(FREE) {
            return true;
        }
        let paid = flying.take(held - self.taken);
        if paid {
            self.taken = held;
        }
        paid
    }

    /// What has to be given back to [`Flying`].
    pub(super) fn taken(&self) -> usize {
        self.taken
    }

    /// Bytes of it.
    pub(super) fn len(&self) -> usize {
        self.plain.len() + self.aside.as_ref().map_or(0, |(_, body)| body.len())
    }

    /// As it is kept.
    pub(super) fn pack(mut self) -> Vec<u8> {
        if let Some(at) = self.body_at {
            let bytes = length(self.plain.len() - at);
            if let Some(place) = self.plain.get_mut(at - bytes.len()..at) {
                place.copy_from_slice(&bytes);
            }
        } else if self.plain.len() == self.reply_at {
            // There was none.
            self.plain.extend_from_slice(&length(0));
            self.plain.extend_from_slice(&LEFT_OUT);
        }
        let plain = match self.aside {
            None => self.plain,
            Some((at, body)) => {
                let (before, behind) = self.plain.split_at_checked(at).unwrap_or_default();
                [before, &body, behind].concat()
            }
        };
        if plain.len() < SMALL {
            return plain;
        }
        let mut packed = vec![1];
        packed.extend(lz4_flex::compress_prepend_size(
            plain.get(1..).unwrap_or_default(),
        ));
        packed
    }
}

/// Headers one a line, secrets blanked.
pub(super) fn lines(headers: &HeaderMap) -> Vec<u8> {
    let mut out = Vec::with_capacity(512);
    for (name, value) in headers {
        out.extend_from_slice(name.as_str().as_bytes());
        out.extend_from_slice(b": ");
        let blank = SECRET.contains(name);
        out.extend_from_slice(if blank { b"[REDACTED]" } else { value.as_bytes() });
        out.push(b'\n');
    }
    out
}

/// Headers written by `lines` as they are shown.
pub(super) fn shown(lines: &[u8]) -> Map<String, Value> {
    let mut map = Map::new();
    let text = String::from_utf8_lossy(lines);
    for (name, value) in text.lines().filter_map(|l| l.split_once(": ")) {
        let joined = match map.get(name).and_then(Value::as_str) {
            Some(before) => format!("{before}, {value}"),
            None => value.to_owned(),
        };
        map.insert(name.to_owned(), joined.into());
    }
    map
}

fn push_part(out: &mut Vec<u8>, part: &[u8]) {
    out.extend_from_slice(&length(part.len()));
    out.extend_from_slice(part);
}

/// A capture to be shown.
#[derive(Debug, PartialEq, Eq)]
pub struct Captured {
    path: String,
    request: Vec<u8>,
    request_body: Option<Vec<u8>>,
    reply: Vec<u8>,
    reply_body: Option<Vec<u8>>,
}

impl Captured {
    /// Reads what [`Recording`] has packed; `None` if it did not.
    #[must_use]
    pub fn unpack(packed: &[u8]) -> Option<Self> {
        let (kind, rest) = packed.split_first()?;
        let unpacked;
        let mut rest = if *kind == 0 {
            rest
        } else {
            let size = u32::from_le_bytes(*rest.first_chunk()?);
            if size > MAX_UNPACKED {
                return None;
            }
            unpacked = lz4_flex::decompress_size_prepended(rest).ok()?;
            &unpacked
        };
        let mut part = || -> Option<Option<Vec<u8>>> {
            let (length, behind) = rest.split_first_chunk()?;
            rest = behind;
            let length = u32::from_le_bytes(*length);
            if length == u32::MAX {
                return Some(None);
            }
            let (part, behind) = rest.split_at_checked(usize::try_from(length).ok()?)?;
            rest = behind;
            Some(Some(part.to_vec()))
        };
        Some(Self {
            path: String::from_utf8(part()??).ok()?,
            request: part()??,
            request_body: part()?,
            reply: part()??,
            reply_body: part()?,
        })
    }

    /// In llama-swap's form; a body that was not kept is empty, and its `..._left_out` is true.
    #[must_use]
    pub fn to_json(&self, id: u64) -> Value {
        let body = |body: &Option<Vec<u8>>| STANDARD.encode(body.as_deref().unwrap_or_default());
        json!({
            "id": id,
            "req_path": self.path,
            "req_headers": shown(&self.request),
            "req_body": body(&self.request_body),
            "req_body_left_out": self.request_body.is_none(),
            "resp_headers": shown(&self.reply),
            "resp_body": body(&self.reply_body),
            "resp_body_left_out": self.reply_body.is_none(),
        })
    }
}

/// Packs here what is small, and on another thread what would keep others waiting.
pub(super) fn off_the_way(size: usize, work: impl FnOnce() + Send + 'static) {
    match tokio::runtime::Handle::try_current() {
        Ok(runtime) if size > LARGE => drop(runtime.spawn_blocking(work)),
        _ => work(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::shelves::Captures;
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let pair =
            |(k, v): &(&'static str, &'static str)| (HeaderName::from_static(k), HeaderValue::from_static(v));
        pairs.iter().map(pair).collect()
    }

    fn plenty() -> Flying {
        Flying {
            limit: usize::MAX.into(),
            ..Flying::default()
        }
    }

    fn recording(kind: &'static str, body: &str) -> Recording {
        let request = headers(&[
            ("content-type", "application/json"),
            ("authorization", "Bearer secret"),
            ("x-api-key", "secret"),
            ("x-a", "1"),
        ]);
        let body = Bytes::copy_from_slice(body.as_bytes());
        let mut recording = Recording::new("/v1/x", &request, &lines(&request), &body, 100_000, &plenty());
        let reply = headers(&[("content-type", kind), ("set-cookie", "secret")]);
        recording.reply(&reply, &lines(&reply));
        recording.piece(b"data: 1\n\n", &plenty());
        recording.piece(b"data: 2\n\n", &plenty());
        recording
    }

    #[test]
    fn what_is_kept_comes_back_without_secrets() {
        for body in ["{}", &"long ".repeat(1_000), &"longer ".repeat(10_000)] {
            let packed = recording("text/event-stream", body).pack();
            let captured = Captured::unpack(&packed).unwrap();
            let shown = captured.to_json(7);
            assert_eq!(
                (shown["id"].as_u64(), shown["req_path"].as_str()),
                (Some(7), Some("/v1/x"))
            );
            assert_eq!(shown["req_body"], STANDARD.encode(body));
            assert_eq!(shown["resp_body"], STANDARD.encode("data: 1\n\ndata: 2\n\n"));
            assert_eq!(shown["req_headers"]["x-a"], "1");
            assert_eq!(shown["req_headers"]["authorization"], "[REDACTED]");
            assert_eq!(shown["resp_headers"]["set-cookie"], "[REDACTED]");
            assert!(!String::from_utf8_lossy(&packed).contains("secret"));
            for cut in 0..packed.len() {
                assert!(Captured::unpack(&packed[..cut]).is_none());
            }
        }
        assert!(
            recording("text/plain", &"long ".repeat(1_000)).pack().len() < 1_000,
            "packed"
        );
    }

    #[test]
    fn no_text_and_no_giants() {
        let captured = Captured::unpack(&recording("audio/mpeg", "{}").pack()).unwrap();
        assert_eq!(
            (captured.reply_body, captured.request_body),
            (None, Some(b"{}".to_vec()))
        );
        let mut big = recording("text/plain", &"x".repeat(100_001));
        big.piece(&[b'y'; 100_000], &plenty());
        big.piece(b"more", &plenty());
        let captured = Captured::unpack(&big.pack()).unwrap();
        assert_eq!((captured.reply_body, captured.request_body), (None, None));
        let unanswered = Recording::new(
            "/v1/x",
            &HeaderMap::new(),
            b"",
            &Bytes::from_static(b"{}"),
            10,
            &plenty(),
        );
        let captured = Captured::unpack(&unanswered.pack()).unwrap();
        assert_eq!(
            (captured.reply, captured.reply_body, captured.request_body),
            (vec![], None, Some(b"{}".to_vec()))
        );
    }

    #[test]
    fn a_second_head_takes_the_place_of_the_first() {
        let mut again = recording("text/plain", "{}");
        let reply = headers(&[("content-type", "text/plain")]);
        again.reply(&reply, &lines(&reply));
        again.piece(b"right", &plenty());
        let captured = Captured::unpack(&again.pack()).unwrap();
        assert_eq!(
            (captured.reply, captured.reply_body),
            (b"content-type: text/plain\n".to_vec(), Some(b"right".to_vec()))
        );
    }

    #[test]
    fn what_has_not_ended_shares_one_room() {
        let captures = Captures::default();
        captures.set_limit(1, false);
        let (flying, room) = (&captures.flying, captures.room());
        let text = headers(&[("content-type", "text/plain")]);
        let begin = |body: usize| {
            let body = Bytes::from(vec![b'x'; body]);
            let mut recording = Recording::new("/", &text, b"", &body, room, flying);
            recording.reply(&text, b"");
            recording
        };
        let mut all: Vec<Recording> = (0..100)
            .map(|i| begin(if i % 10 == 0 { 20_000 } else { 10 }))
            .collect();
        for _ in 0..100 {
            for recording in &mut all {
                recording.piece(&[b'y'; 1_000], flying);
                assert!(flying.used.load(Ordering::Relaxed) <= 1 << 20);
            }
        }
        let held: usize = all.iter().map(Recording::held).sum();
        assert!(held <= (1 << 20) + 100 * FREE, "{held}");
        assert!(all.iter().any(|r| r.body_at.is_some()), "some are kept");
        for recording in all {
            flying.give_back(recording.taken());
            assert!(Captured::unpack(&recording.pack()).is_some());
        }
        assert_eq!(flying.used.load(Ordering::Relaxed), 0);
        let mut small = begin(10);
        small.piece(b"yes", flying);
        assert_eq!(small.taken(), 0, "most take nothing");
        assert_eq!(
            Captured::unpack(&small.pack()).unwrap().reply_body,
            Some(b"yes".to_vec())
        );
    }
}

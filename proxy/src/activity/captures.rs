//! Whole requests and replies, for people who look for a fault: the last ones, within a bound of memory.
//!
//! Keys and cookies are blanked before anything is kept, and bodies that are no text are left out. Nothing waits for
//! a capture: a stream is copied as it passes, and what is large is packed on another thread.

use std::collections::{HashSet, VecDeque};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::HeaderMap;
use http::header::{AUTHORIZATION, CONTENT_TYPE, COOKIE, HeaderName, PROXY_AUTHORIZATION, SET_COOKIE};
use parking_lot::Mutex;
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
/// One body may take this part of all that is kept.
const PART: usize = 4;
/// Smaller ones are not worth packing.
const SMALL: usize = 1024;
/// Larger ones are packed on another thread.
const LARGE: usize = 16 * 1024;
/// Largest capture that is unpacked: what is larger was not made here.
const MAX_UNPACKED: u32 = 1 << 30;

/// One request and its reply while they pass.
#[derive(Debug)]
pub struct Recording {
    room: usize,
    request: HeaderMap,
    request_body: Option<Bytes>,
    reply: HeaderMap,
    /// `None`: no text, or too large.
    reply_body: Option<Vec<u8>>,
}

/// Whether a body of this type can be read by people.
fn is_text(headers: &HeaderMap) -> bool {
    let kind = headers
        .get(CONTENT_TYPE)
        .and_then(|v| v.to_str().ok())
        .unwrap_or_default()
        .trim_start()
        .to_ascii_lowercase();
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
    !binary.iter().any(|b| kind.starts_with(b)) && !headers.contains_key("content-encoding")
}

impl Recording {
    /// Begins with the request; `room` is the largest body that is kept.
    #[must_use]
    pub fn new(headers: &HeaderMap, body: &Bytes, room: usize) -> Self {
        let keep = is_text(headers) && body.len() <= room;
        Self {
            room,
            request: headers.clone(),
            request_body: keep.then(|| body.clone()),
            reply: HeaderMap::new(),
            reply_body: None,
        }
    }

    /// The reply's head.
    pub fn reply(&mut self, headers: &HeaderMap) {
        self.reply = headers.clone();
        self.reply_body = is_text(headers).then(Vec::new);
    }

    /// A piece of the reply's body.
    pub fn piece(&mut self, piece: &[u8]) {
        let room = self.room;
        if let Some(body) = &mut self.reply_body {
            if body.len() + piece.len() <= room {
                body.extend_from_slice(piece);
            } else {
                self.reply_body = None;
            }
        }
    }

    /// Bytes of both bodies.
    pub(super) fn len(&self) -> usize {
        self.request_body.as_ref().map_or(0, Bytes::len) + self.reply_body.as_ref().map_or(0, Vec::len)
    }

    /// As it is kept.
    pub(super) fn pack(self, path: &str) -> Box<[u8]> {
        let (request, reply) = (lines(&self.request), lines(&self.reply));
        let request_body = self.request_body.as_deref();
        let parts: [Option<&[u8]>; 5] = [
            Some(path.as_bytes()),
            Some(&request),
            request_body,
            Some(&reply),
            self.reply_body.as_deref(),
        ];
        let mut plain = Vec::with_capacity(self.len() + request.len() + reply.len() + path.len() + 32);
        plain.push(0);
        for part in parts {
            let length = part.map_or(u32::MAX, |p| u32::try_from(p.len()).unwrap_or(u32::MAX));
            plain.extend_from_slice(&length.to_le_bytes());
            plain.extend_from_slice(part.unwrap_or_default());
        }
        if plain.len() < SMALL {
            return plain.into();
        }
        let mut packed = vec![1];
        packed.extend(lz4_flex::compress_prepend_size(
            plain.get(1..).unwrap_or_default(),
        ));
        packed.into()
    }
}

/// One header a line, secrets blanked.
fn lines(headers: &HeaderMap) -> Vec<u8> {
    let mut out = Vec::with_capacity(64 * headers.len());
    for (name, value) in headers {
        out.extend_from_slice(name.as_str().as_bytes());
        out.extend_from_slice(b": ");
        let blank = SECRET.contains(name);
        out.extend_from_slice(if blank { b"[REDACTED]" } else { value.as_bytes() });
        out.push(b'\n');
    }
    out
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
        let headers = |text: &[u8]| {
            let mut map = Map::new();
            let text = String::from_utf8_lossy(text);
            for (name, value) in text.lines().filter_map(|l| l.split_once(": ")) {
                let joined = match map.get(name).and_then(Value::as_str) {
                    Some(before) => format!("{before}, {value}"),
                    None => value.to_owned(),
                };
                map.insert(name.to_owned(), joined.into());
            }
            map
        };
        let body = |body: &Option<Vec<u8>>| STANDARD.encode(body.as_deref().unwrap_or_default());
        json!({
            "id": id,
            "req_path": self.path,
            "req_headers": headers(&self.request),
            "req_body": body(&self.request_body),
            "req_body_left_out": self.request_body.is_none(),
            "resp_headers": headers(&self.reply),
            "resp_body": body(&self.reply_body),
            "resp_body_left_out": self.reply_body.is_none(),
        })
    }
}

/// The captures that are kept in memory.
#[derive(Debug, Default)]
pub struct Captures {
    inner: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    /// Bytes; 0 keeps nothing.
    limit: usize,
    bytes: usize,
    all: VecDeque<(u64, Box<[u8]>)>,
}

impl Held {
    fn shrink(&mut self, limit: usize) {
        while self.bytes > limit
            && let Some((_, oldest)) = self.all.pop_front()
        {
            self.bytes -= oldest.len();
        }
    }
}

impl Captures {
    /// Another limit. `elsewhere`: they are kept in a database from now on.
    pub fn set_limit(&self, megabytes: u64, elsewhere: bool) {
        let limit = usize::try_from(megabytes).map_or(usize::MAX, |m| m.saturating_mul(1 << 20));
        let mut held = self.inner.lock();
        held.limit = limit;
        held.shrink(if elsewhere { 0 } else { limit });
    }

    pub(super) fn limit(&self) -> usize {
        self.inner.lock().limit
    }

    /// The largest body that is kept; 0: nothing is.
    pub(super) fn room(&self) -> usize {
        self.limit() / PART
    }

    pub(super) fn put(&self, id: u64, packed: Box<[u8]>) {
        let mut held = self.inner.lock();
        if packed.len() <= held.limit {
            let room = held.limit - packed.len();
            held.shrink(room);
            held.bytes += packed.len();
            held.all.push_back((id, packed));
        }
    }

    pub(super) fn get(&self, id: u64) -> Option<Vec<u8>> {
        let held = self.inner.lock();
        held.all.iter().find(|(i, _)| *i == id).map(|(_, p)| p.to_vec())
    }

    pub(super) fn ids(&self) -> HashSet<u64> {
        self.inner.lock().all.iter().map(|(id, _)| *id).collect()
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
    use http::HeaderValue;

    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let pair =
            |(k, v): &(&'static str, &'static str)| (HeaderName::from_static(k), HeaderValue::from_static(v));
        pairs.iter().map(pair).collect()
    }

    fn recording(kind: &'static str, body: &str) -> Recording {
        let request = headers(&[
            ("content-type", "application/json"),
            ("authorization", "Bearer secret"),
            ("x-api-key", "secret"),
            ("x-a", "1"),
        ]);
        let mut recording = Recording::new(&request, &Bytes::copy_from_slice(body.as_bytes()), 10_000);
        recording.reply(&headers(&[("content-type", kind), ("set-cookie", "secret")]));
        recording.piece(b"data: 1\n\n");
        recording.piece(b"data: 2\n\n");
        recording
    }

    #[test]
    fn what_is_kept_comes_back_without_secrets() {
        for body in ["{}", &"long ".repeat(1_000)] {
            let packed = recording("text/event-stream", body).pack("/v1/x");
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
            recording("text/plain", &"long ".repeat(1_000)).pack("/").len() < 1_000,
            "packed"
        );
    }

    #[test]
    fn no_text_and_no_giants() {
        let captured = Captured::unpack(&recording("audio/mpeg", "{}").pack("/")).unwrap();
        assert_eq!(
            (captured.reply_body, captured.request_body),
            (None, Some(b"{}".to_vec()))
        );
        let mut big = recording("text/plain", &"x".repeat(10_001));
        big.piece(&[b'y'; 10_000]);
        let captured = Captured::unpack(&big.pack("/")).unwrap();
        assert_eq!((captured.reply_body, captured.request_body), (None, None));
    }

    #[test]
    fn the_oldest_make_room() {
        let captures = Captures::default();
        captures.put(1, vec![0; 10].into());
        assert!(captures.ids().is_empty(), "nothing is kept");
        captures.set_limit(1, false);
        for id in 1..=5 {
            captures.put(id, vec![0; 400_000].into());
        }
        captures.put(6, vec![0; 2_000_000].into());
        assert_eq!(captures.ids(), HashSet::from([4, 5]));
        assert_eq!(captures.get(4).unwrap().len(), 400_000);
        captures.set_limit(0, false);
        assert!(captures.ids().is_empty() && captures.room() == 0);
    }
}

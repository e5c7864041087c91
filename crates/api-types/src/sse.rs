//! Server-sent events: the few lines that an OpenAI stream consists of, and a decoder.
//!
//! Format: <https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation>.

use bytes::{BufMut, BytesMut};

use crate::error::ApiError;

/// The content type of a stream.
pub const CONTENT_TYPE: &str = "text/event-stream";
/// The end of an OpenAI stream.
pub const DONE: &[u8] = b"data: [DONE]\n\n";
/// A comment: keeps proxies and clients from giving up during silence, and is ignored by every parser.
pub const KEEP_ALIVE: &[u8] = b": keep-alive\n\n";

/// Appends an error event. The stream ends after it, without [`DONE`].
pub fn put_error(out: &mut BytesMut, error: &ApiError) {
    out.put_slice(b"data: ");
    out.put_slice(error.to_json().as_bytes());
    out.put_slice(b"\n\n");
}

/// One event as received.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Event {
    /// The `event` field; empty when there was none.
    pub name: String,
    /// The `data` lines, joined by newlines.
    pub data: String,
}

/// Puts events together from pieces of a byte stream, wherever they were cut. Comments and unknown fields are
/// skipped; an event that the stream's end cuts off is dropped, as the standard says.
#[derive(Debug, Clone, Default)]
pub struct Decoder {
    /// The line that is not complete yet.
    line: Vec<u8>,
    /// The last byte was a carriage return, so a newline right after it belongs to it.
    after_return: bool,
    event: Event,
    has_data: bool,
}

impl Decoder {
    /// At the start of a stream.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next bytes; gives the events that they complete.
    pub fn push(&mut self, bytes: &[u8]) -> Vec<Event> {
        let mut events = Vec::new();
        for &byte in bytes {
            let after_return = std::mem::replace(&mut self.after_return, byte == b'\r');
            match byte {
                b'\n' if after_return => {}
                b'\n' | b'\r' => events.extend(self.end_line()),
                _ => self.line.push(byte),
            }
        }
        events
    }

    /// Whether everything received so far has been given out as events: the stream may end here.
    #[must_use]
    pub fn is_between_events(&self) -> bool {
        self.line.is_empty() && !self.has_data
    }

    fn end_line(&mut self) -> Option<Event> {
        let line = std::mem::take(&mut self.line);
        if line.is_empty() {
            let event = std::mem::take(&mut self.event);
            return std::mem::take(&mut self.has_data).then_some(event);
        }
        let line = String::from_utf8_lossy(&line);
        let (field, value) = line.split_once(':').unwrap_or((&line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "data" => {
                if self.has_data {
                    self.event.data.push('\n');
                }
                self.event.data.push_str(value);
                self.has_data = true;
            }
            "event" => value.clone_into(&mut self.event.name),
            _ => {}
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn event(name: &str, data: &str) -> Event {
        Event {
            name: name.into(),
            data: data.into(),
        }
    }

    #[test]
    fn an_error_event_is_one_event() {
        let mut out = BytesMut::new();
        put_error(&mut out, &ApiError::internal("two\nlines"));
        let events = Decoder::new().push(&out);
        let [only] = events.as_slice() else {
            panic!("{events:?}")
        };
        let value: serde_json::Value = serde_json::from_str(&only.data).unwrap();
        assert_eq!(value["error"]["message"], "two\nlines");
        assert_eq!(value["error"]["type"], "server_error");
    }

    #[test]
    fn comments_and_keep_alives_are_no_events() {
        let mut decoder = Decoder::new();
        assert!(decoder.push(KEEP_ALIVE).is_empty());
        assert!(decoder.push(b"id: 5\nretry: 10\n\n").is_empty());
        assert_eq!(
            decoder.push(b"event: x\ndata: a\ndata:  b\n\n"),
            [event("x", "a\n b")]
        );
        assert_eq!(decoder.push(DONE), [event("", "[DONE]")]);
        assert!(decoder.is_between_events());
        decoder.push(b"data: a\n");
        assert!(!decoder.is_between_events());
    }

    proptest! {
        #[test]
        fn cuts_make_no_difference(cuts in proptest::collection::vec(0usize..60, 0..8)) {
            let text = "data: é🦀\r\n\r\n: c\r\rdata: b\n\nevent: e\ndata\n\ndata: last\n\n".as_bytes();
            let mut whole = Decoder::new();
            let expected = whole.push(text);
            prop_assert_eq!(expected.len(), 4);
            let mut cuts: Vec<usize> = cuts.into_iter().map(|c| c.min(text.len())).collect();
            cuts.sort_unstable();
            let mut decoder = Decoder::new();
            let mut events = Vec::new();
            let mut at = 0;
            for cut in cuts.into_iter().chain([text.len()]) {
                events.extend(decoder.push(&text[at..cut]));
                at = cut;
            }
            prop_assert_eq!(events, expected);
        }
    }
}

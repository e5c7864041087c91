//! HTTP/1.1 as the client's end speaks it (RFC 9112): a request's head out, a reply's head and chunks in.

use std::io::{Error, ErrorKind};
use std::mem::MaybeUninit;

use bytes::{Bytes, BytesMut};
use http::header::{
    AUTHORIZATION, CONNECTION, CONTENT_LENGTH, HOST, HeaderMap, HeaderName, HeaderValue, TRANSFER_ENCODING,
};
use http::{Method, Request, Response, StatusCode, Version};

/// Most bytes of a reply's head.
const MAX_HEAD: usize = 400 * 1024;
/// Most headers of a reply.
const MAX_HEADERS: usize = 128;
/// Most bytes of one chunk's extensions, and of all trailers.
const MAX_EXTRA: usize = 16 * 1024;

fn invalid(why: &'static str) -> Error {
    Error::new(ErrorKind::InvalidData, why)
}

/// The head of a request as it goes over the wire. Its length is that of the body; a `Host` that is missing is
/// `authority`; `authorization` goes before the request's own.
#[must_use]
pub(super) fn encode_head(
    request: &Request<Bytes>,
    authority: &str,
    authorization: Option<&HeaderValue>,
) -> Vec<u8> {
    let mut out = Vec::with_capacity(512);
    out.extend_from_slice(request.method().as_str().as_bytes());
    out.push(b' ');
    let path = request.uri().path_and_query().map_or("/", |p| p.as_str());
    out.extend_from_slice(path.as_bytes());
    out.extend_from_slice(b" HTTP/1.1\r\n");
    let mut line = |name: &[u8], value: &[u8]| {
        out.extend_from_slice(name);
        out.extend_from_slice(b": ");
        out.extend_from_slice(value);
        out.extend_from_slice(b"\r\n");
    };
    if !request.headers().contains_key(HOST) {
        line(b"host", authority.as_bytes());
    }
    if let Some(value) = authorization {
        line(b"authorization", value.as_bytes());
    }
    for (name, value) in request.headers() {
        if authorization.is_some() && name == AUTHORIZATION {
            continue;
        }
        line(name.as_str().as_bytes(), value.as_bytes());
    }
    let length = request.body().len();
    if length > 0 || matches!(*request.method(), Method::POST | Method::PUT | Method::PATCH) {
        line(b"content-length", length.to_string().as_bytes());
    }
    out.extend_from_slice(b"\r\n");
    out
}

/// How long a reply's body is.
#[derive(Debug)]
pub(super) enum Framing {
    /// So many bytes are still to come.
    Length(u64),
    /// In chunks.
    Chunked(Chunks),
    /// Up to the end of the connection.
    UntilClose,
    /// Another protocol begins.
    Upgrade,
}

/// A reply's head.
#[derive(Debug)]
pub(super) struct Head {
    pub(super) response: Response<()>,
    pub(super) framing: Framing,
    /// The connection may serve another request afterwards.
    pub(super) keep_alive: bool,
}

/// Where the first empty line ends.
fn end_of_head(received: &[u8]) -> Option<usize> {
    memchr::memchr_iter(b'\n', received).find_map(|i| match received.get(i + 1..)? {
        [b'\n', ..] => Some(i + 2),
        [b'\r', b'\n', ..] => Some(i + 3),
        _ => None,
    })
}

/// Takes a reply's head from `received`, once it is there. Interim replies (1xx) are skipped.
///
/// # Errors
/// It is no HTTP/1 reply, or promises a length that cannot be told.
pub(super) fn take_head(received: &mut BytesMut, method: &Method) -> Result<Option<Head>, Error> {
    loop {
        let Some(length) = end_of_head(received) else {
            return if received.len() < MAX_HEAD {
                Ok(None)
            } else {
                Err(invalid("the reply's head is too large"))
            };
        };
        // The values of the headers share the bytes of the head.
        let head = received.split_to(length).freeze();
        // Four kilobytes that nobody needs to be blank.
        let mut headers = [const { MaybeUninit::uninit() }; MAX_HEADERS];
        let mut parsed = httparse::Response::new(&mut []);
        let parser = httparse::ParserConfig::default();
        match parser.parse_response_with_uninit_headers(&mut parsed, &head, &mut headers) {
            Ok(httparse::Status::Complete(_)) => {}
            Err(httparse::Error::TooManyHeaders) => return Err(invalid("the reply's head is too large")),
            Ok(httparse::Status::Partial) | Err(_) => return Err(invalid("the reply is not HTTP/1.1")),
        }
        let status = parsed.code.and_then(|code| StatusCode::from_u16(code).ok());
        let status = status.ok_or_else(|| invalid("the reply has no valid status"))?;
        if status.is_informational() && status != StatusCode::SWITCHING_PROTOCOLS {
            continue;
        }
        let version = if parsed.version == Some(1) {
            Version::HTTP_11
        } else {
            Version::HTTP_10
        };
        let mut response = Response::new(());
        *response.status_mut() = status;
        let map = response.headers_mut();
        map.reserve(parsed.headers.len() + 2);
        for header in &*parsed.headers {
            let name = HeaderName::from_bytes(header.name.as_bytes());
            let value = HeaderValue::from_maybe_shared(head.slice_ref(header.value));
            let (Ok(name), Ok(value)) = (name, value) else {
                return Err(invalid("the reply has a malformed header"));
            };
            map.append(name, value);
        }
        let framing = framing(map, status, version, method)?;
        let keep_alive = keeps(map, version) && matches!(framing, Framing::Length(_) | Framing::Chunked(_));
        return Ok(Some(Head {
            response,
            framing,
            keep_alive,
        }));
    }
}

/// RFC 9112, section 6.3.
fn framing(
    headers: &mut HeaderMap,
    status: StatusCode,
    version: Version,
    method: &Method,
) -> Result<Framing, Error> {
    if status == StatusCode::SWITCHING_PROTOCOLS {
        return Ok(Framing::Upgrade);
    }
    let bodiless =
        *method == Method::HEAD || matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
    if headers.contains_key(TRANSFER_ENCODING) {
        if version == Version::HTTP_10 {
            return Err(invalid("a reply in HTTP/1.0 cannot be chunked"));
        }
        // Of the two the length is the lie.
        headers.remove(CONTENT_LENGTH);
        let last = headers.get_all(TRANSFER_ENCODING).iter().next_back();
        let coding = last
            .and_then(|v| v.to_str().ok())
            .and_then(|v| v.rsplit(',').next());
        let chunked = coding.is_some_and(|c| c.trim().eq_ignore_ascii_case("chunked"));
        return Ok(match (bodiless, chunked) {
            (true, _) => Framing::Length(0),
            (false, true) => Framing::Chunked(Chunks::default()),
            (false, false) => Framing::UntilClose,
        });
    }
    let mut length = None;
    for value in headers.get_all(CONTENT_LENGTH) {
        let digits = value.to_str().unwrap_or_default();
        let n = digits
            .bytes()
            .all(|b| b.is_ascii_digit())
            .then(|| digits.parse::<u64>().ok())
            .flatten()
            .ok_or_else(|| invalid("the reply's length is not a number"))?;
        if length.is_some_and(|before| before != n) {
            return Err(invalid("the reply has two lengths"));
        }
        length = Some(n);
    }
    Ok(match length {
        _ if bodiless => Framing::Length(0),
        Some(n) => Framing::Length(n),
        None => Framing::UntilClose,
    })
}

fn keeps(headers: &HeaderMap, version: Version) -> bool {
    let says = |word: &str| {
        let mut tokens = headers
            .get_all(CONNECTION)
            .iter()
            .filter_map(|v| v.to_str().ok())
            .flat_map(|v| v.split(','));
        tokens.any(|t| t.trim().eq_ignore_ascii_case(word))
    };
    if version == Version::HTTP_10 {
        says("keep-alive")
    } else {
        !says("close")
    }
}

/// A decoder of chunks (RFC 9112, section 7.1), fed piece by piece.
#[derive(Debug, Default)]
pub(super) struct Chunks {
    at: At,
    /// Bytes of the present chunk that are still to come; while in its size, the size so far.
    left: u64,
    digits: u8,
    /// Bytes of extensions or trailers so far.
    extra: usize,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum At {
    #[default]
    Size,
    /// Behind the size: extensions, up to the line's end.
    Extension,
    SizeLf,
    Data,
    DataCr,
    DataLf,
    /// At the beginning of a line of the trailers.
    TrailerLine,
    /// Within such a line.
    Trailer,
    TrailerLf,
    EndLf,
    End,
}

impl Chunks {
    /// Whether the last chunk and the trailers have been read.
    pub(super) fn is_end(&self) -> bool {
        self.at == At::End
    }

    /// Decodes `piece` onto the end of `out`. Returns how many bytes were used: all, unless the body ends within.
    ///
    /// # Errors
    /// Malformed chunks.
    pub(super) fn decode(&mut self, piece: &[u8], out: &mut BytesMut) -> Result<usize, Error> {
        let mut rest = piece;
        while let [byte, tail @ ..] = rest {
            if self.at == At::Data {
                let n = usize::try_from(self.left).map_or(rest.len(), |left| left.min(rest.len()));
                let (data, tail) = rest.split_at_checked(n).unwrap_or((rest, &[]));
                out.extend_from_slice(data);
                self.left -= data.len() as u64;
                if self.left == 0 {
                    self.at = At::DataCr;
                }
                rest = tail;
                continue;
            }
            rest = tail;
            self.at = self.step(*byte)?;
            if self.at == At::End {
                break;
            }
        }
        Ok(piece.len() - rest.len())
    }

    fn step(&mut self, byte: u8) -> Result<At, Error> {
        Ok(match (self.at, byte) {
            (At::Size, b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F') => {
                self.digits += 1;
                if self.digits > 16 {
                    return Err(invalid("the reply has a chunk that is too large"));
                }
                let digit = char::from(byte).to_digit(16).unwrap_or_default();
                self.left = self.left << 4 | u64::from(digit);
                At::Size
            }
            (At::Size, _) if self.digits == 0 => return Err(invalid("the reply has a malformed chunk")),
            (At::Size | At::Extension, b'\r') => At::SizeLf,
            (At::Size, b';' | b' ' | b'\t') => At::Extension,
            (At::Extension, b'\n') => return Err(invalid("the reply has a malformed chunk")),
            (At::Extension, _) => self.more(At::Extension)?,
            (At::SizeLf, b'\n') => {
                (self.digits, self.extra) = (0, 0);
                if self.left == 0 { At::TrailerLine } else { At::Data }
            }
            (At::DataCr, b'\r') => At::DataLf,
            (At::DataLf, b'\n') => At::Size,
            (At::TrailerLine, b'\r') => At::EndLf,
            (At::Trailer, b'\r') => At::TrailerLf,
            (At::TrailerLine | At::Trailer, b'\n') => {
                return Err(invalid("the reply has a malformed trailer"));
            }
            (At::TrailerLine | At::Trailer, _) => self.more(At::Trailer)?,
            (At::TrailerLf, b'\n') => At::TrailerLine,
            (At::EndLf, b'\n') => At::End,
            _ => return Err(invalid("the reply has a malformed chunk")),
        })
    }

    fn more(&mut self, at: At) -> Result<At, Error> {
        self.extra += 1;
        if self.extra > MAX_EXTRA {
            return Err(invalid("the reply has too long extensions or trailers"));
        }
        Ok(at)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn head(text: &str, method: &Method) -> Result<Option<(Head, BytesMut)>, String> {
        let mut received = BytesMut::from(text);
        let head = take_head(&mut received, method).map_err(|e| e.to_string())?;
        Ok(head.map(|h| (h, received)))
    }

    #[test]
    fn lengths_of_replies() {
        let framing = |headers: &str, method: Method| {
            let text = format!("HTTP/1.1 200 OK\r\n{headers}\r\n");
            head(&text, &method).map(|h| {
                let head = h.unwrap().0;
                (format!("{:?}", head.framing), head.keep_alive)
            })
        };
        let post = |headers: &str| framing(headers, Method::POST);
        assert_eq!(post("content-length: 5\r\n").unwrap(), ("Length(5)".into(), true));
        assert_eq!(
            post("Content-Length: 5\r\nContent-Length: 5\r\nConnection: x, Close\r\n").unwrap(),
            ("Length(5)".into(), false)
        );
        assert!(post("content-length: 5\r\ncontent-length: 6\r\n").is_err());
        assert!(post("content-length: +5\r\n").is_err());
        assert!(post("content-length: \r\n").is_err());
        assert_eq!(post("").unwrap(), ("UntilClose".into(), false));
        let both = post("content-length: 5\r\ntransfer-encoding: gzip, Chunked\r\n").unwrap();
        assert!(both.0.starts_with("Chunked") && both.1, "{both:?}");
        assert_eq!(
            post("transfer-encoding: chunked, gzip\r\n").unwrap(),
            ("UntilClose".into(), false)
        );
        assert_eq!(
            framing("content-length: 5\r\n", Method::HEAD).unwrap(),
            ("Length(0)".into(), true)
        );
        let old = |headers: &str| {
            head(&format!("HTTP/1.0 200 OK\r\n{headers}\r\n"), &Method::GET).map(|h| h.unwrap().0.keep_alive)
        };
        assert_eq!(old("content-length: 0\r\n"), Ok(false));
        assert_eq!(old("content-length: 0\r\nconnection: keep-alive\r\n"), Ok(true));
        assert!(old("transfer-encoding: chunked\r\n").is_err());
        let empty = head("HTTP/1.1 204 No Content\r\n\r\n", &Method::POST)
            .unwrap()
            .unwrap()
            .0;
        assert!(matches!(empty.framing, Framing::Length(0)) && empty.keep_alive);
    }

    #[test]
    fn heads_come_in_pieces_and_after_interim_replies() {
        let text = "HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 200 OK\r\nA: \r\nb:  c d \r\nA: 2\r\ncontent-length: 2\r\n\r\nok";
        let end = text.len() - 2;
        let mut received = BytesMut::new();
        for (i, byte) in text.bytes().enumerate() {
            received.extend_from_slice(&[byte]);
            let found = take_head(&mut received, &Method::GET).unwrap();
            assert_eq!(found.is_some(), i + 1 == end, "{i}");
            if let Some(found) = found {
                let headers = found.response.headers();
                assert_eq!(headers.get_all("a").iter().collect::<Vec<_>>(), ["", "2"]);
                assert_eq!(
                    (&headers["b"], headers.len()),
                    (&HeaderValue::from_static("c d"), 4)
                );
                break;
            }
        }
        assert!(head("SMTP ready\r\n\r\n", &Method::GET).is_err());
        assert!(head("HTTP/1.1 200 OK\r\na\r\n\r\n", &Method::GET).is_err());
        let long = format!("HTTP/1.1 200 OK\r\na: {}", "x".repeat(MAX_HEAD));
        assert!(head(&long, &Method::GET).unwrap_err().contains("too large"));
        let many = format!("HTTP/1.1 200 OK\r\n{}\r\n", "a: b\r\n".repeat(MAX_HEADERS + 1));
        assert!(head(&many, &Method::GET).unwrap_err().contains("too large"));
        let upgrade = head("HTTP/1.1 101 Switching Protocols\r\n\r\nhello", &Method::GET);
        let (upgrade, rest) = upgrade.unwrap().unwrap();
        assert!(matches!(upgrade.framing, Framing::Upgrade) && rest == "hello");
    }

    fn decode(pieces: &[&[u8]]) -> Result<(Vec<u8>, bool, usize), String> {
        let (mut chunks, mut out, mut unused) = (Chunks::default(), BytesMut::new(), 0);
        for piece in pieces {
            let used = chunks.decode(piece, &mut out).map_err(|e| e.to_string())?;
            unused += piece.len() - used;
        }
        Ok((out.to_vec(), chunks.is_end(), unused))
    }

    #[test]
    fn chunks_and_what_is_none() {
        let whole: &[u8] = b"4;a=\"b\"\r\nWiki\r\n00B \r\npedia in\r\n\r\r\n0\r\nx: y\r\n\r\nnext";
        assert_eq!(decode(&[whole]), Ok((b"Wikipedia in\r\n\r".to_vec(), true, 4)));
        assert_eq!(decode(&[b"5\r\nab"]), Ok((b"ab".to_vec(), false, 0)));
        for bad in [
            "\r\n",
            "g\r\n",
            "-1\r\n",
            "1\nx\r\n",
            "1\r\nxy\r\n",
            "1\r\nx\n0\r\n\r\n",
            "1 ;\n",
            "0\r\n\n",
            "0\r\nx\n",
            "10000000000000000\r\n",
        ] {
            assert!(decode(&[bad.as_bytes()]).is_err(), "{bad:?}");
        }
        let long = format!("1;{}", "x".repeat(MAX_EXTRA + 1));
        assert!(decode(&[long.as_bytes()]).is_err());
        let long = format!("0\r\n{}", "x: y\r\n".repeat(MAX_EXTRA));
        assert!(decode(&[long.as_bytes()]).is_err());
    }

    proptest! {
        #[test]
        fn chunks_survive_any_cut(
            data in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..40), 0..6),
            cuts in prop::collection::vec(0usize..400, 0..8),
        ) {
            let mut text = Vec::new();
            for piece in &data {
                text.extend_from_slice(format!("{:x}\r\n", piece.len()).as_bytes());
                text.extend_from_slice(piece);
                text.extend_from_slice(b"\r\n");
            }
            text.extend_from_slice(b"0\r\n\r\n");
            let mut cuts: Vec<usize> = cuts.into_iter().map(|c| c.min(text.len())).collect();
            cuts.extend([0, text.len()]);
            cuts.sort_unstable();
            let pieces: Vec<&[u8]> = cuts.windows(2).map(|w| &text[w[0]..w[1]]).collect();
            prop_assert_eq!(decode(&pieces), Ok((data.concat(), true, 0)));
        }
    }
}

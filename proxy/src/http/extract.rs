//! Which model a request names, and where the name stands: JSON, multipart form, urlencoded form or query.

use std::ops::Range;

use api_types::error::ApiError;
use bytes::Bytes;
use http::HeaderMap;
use http::header::CONTENT_TYPE;
use http::uri::PathAndQuery;
use memchr::memmem;

use super::routes::decode;
use crate::jsonscan;

/// Where the name stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// In a JSON object: filters apply. Whether it asks for a stream.
    Json {
        /// `"stream": true`.
        stream: bool,
    },
    /// In a form: these bytes of the body are the name.
    Form(Range<usize>),
    /// In a urlencoded form: these bytes are the encoded name.
    Encoded(Range<usize>),
    /// In the query.
    Query,
}

/// The name in the query of a request without a body.
///
/// # Errors
/// There is none.
pub fn from_query(query: Option<&str>) -> Result<String, ApiError> {
    let pairs = query
        .unwrap_or_default()
        .split('&')
        .filter_map(|p| p.split_once('='));
    let name = pairs
        .filter(|(k, _)| *k == "model")
        .map(|(_, v)| decode(&v.replace('+', " ")))
        .next();
    name.filter(|n| !n.is_empty())
        .ok_or_else(|| ApiError::invalid("model", "is missing from the query"))
}

/// Whether the headers call the body JSON.
#[must_use]
pub fn is_json(headers: &HeaderMap) -> bool {
    let kind = headers
        .get(CONTENT_TYPE)
        .and_then(|v| v.to_str().ok())
        .unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim();
    kind.eq_ignore_ascii_case("application/json") || kind.to_ascii_lowercase().ends_with("+json")
}

/// The name in a body of this content type.
///
/// # Errors
/// There is none, or the body is not what its type says.
pub fn from_body(content_type: &str, body: &Bytes) -> Result<(String, Place), ApiError> {
    let kind = content_type
        .split(';')
        .next()
        .unwrap_or_default()
        .trim()
        .to_ascii_lowercase();
    // curl calls everything a form unless told otherwise.
    let looks_like_json = || body.iter().find(|b| !b.is_ascii_whitespace()) == Some(&b'{');
    match kind.as_str() {
        "multipart/form-data" => {
            let boundary = boundary(content_type)
                .ok_or_else(|| ApiError::bad_request("the content type of the form names no boundary"))?;
            let range = multipart_field(body, &boundary, "model")
                .ok_or_else(|| ApiError::invalid("model", "is missing from the form"))?;
            let name = String::from_utf8_lossy(body.get(range.clone()).unwrap_or_default()).into_owned();
            named(name, Place::Form(range))
        }
        "application/x-www-form-urlencoded" if !looks_like_json() => {
            let range = encoded_field(body, b"model")
                .ok_or_else(|| ApiError::invalid("model", "is missing from the form"))?;
            let text = String::from_utf8_lossy(body.get(range.clone()).unwrap_or_default()).replace('+', " ");
            named(decode(&text), Place::Encoded(range))
        }
        _ => json(body).map(|(name, stream)| (name, Place::Json { stream })),
    }
}

fn named(name: String, place: Place) -> Result<(String, Place), ApiError> {
    if name.is_empty() {
        Err(ApiError::invalid("model", "is empty"))
    } else {
        Ok((name, place))
    }
}

/// The top-level `model` of a JSON body, and whether it asks for a stream.
fn json(body: &Bytes) -> Result<(String, bool), ApiError> {
    let [value, stream] = jsonscan::find_two(body, "model", "stream").map_err(|e| {
        ApiError::bad_request(format!(
            "the body is not a JSON object (byte {} of {})",
            e.at,
            body.len()
        ))
    })?;
    let token = value.and_then(|range| body.get(range));
    let stream = stream.and_then(|range| body.get(range)) == Some(b"true".as_slice());
    let Some(token) = token else {
        return Err(ApiError::invalid("model", "is missing"));
    };
    match jsonscan::string(token) {
        Some(name) if !name.is_empty() => Ok((name.into_owned(), stream)),
        _ => {
            let shown: String = String::from_utf8_lossy(token).chars().take(60).collect();
            Err(ApiError::invalid(
                "model",
                format!("{shown} is not the name of a model"),
            ))
        }
    }
}

fn boundary(content_type: &str) -> Option<String> {
    let value = content_type
        .split(';')
        .find_map(|p| p.trim().strip_prefix("boundary="))?;
    let value = value.trim().trim_matches('"');
    (!value.is_empty() && value.len() <= 70).then(|| value.to_owned())
}

/// The bytes of a form field's value (RFC 7578): of the first part with this name that is no file.
fn multipart_field(body: &[u8], boundary: &str, name: &str) -> Option<Range<usize>> {
    let delimiter = format!("--{boundary}");
    let mut at = memmem::find(body, delimiter.as_bytes())? + delimiter.len();
    let next = format!("\r\n--{boundary}");
    let finder = memmem::Finder::new(next.as_bytes());
    while body.get(at..at + 2)? == b"\r\n" {
        let begin = at + 2;
        let end = begin + finder.find(body.get(begin..)?)?;
        let part = body.get(begin..end)?;
        let head = memmem::find(part, b"\r\n\r\n")?;
        let headers = String::from_utf8_lossy(part.get(..head)?).into_owned();
        let disposition = headers.lines().find_map(|l| {
            let (key, value) = l.split_once(':')?;
            key.eq_ignore_ascii_case("content-disposition")
                .then(|| value.to_owned())
        })?;
        let parameter = |key: &str| {
            let found = disposition
                .split(';')
                .find_map(|p| p.trim().strip_prefix(key)?.strip_prefix('='));
            found.map(|v| v.trim_matches('"').to_owned())
        };
        if parameter("name").as_deref() == Some(name) && parameter("filename").is_none() {
            return Some(begin + head + 4..end);
        }
        at = end + next.len();
    }
    None
}

fn encoded_field(body: &[u8], name: &[u8]) -> Option<Range<usize>> {
    let mut at = 0;
    for pair in body.split(|b| *b == b'&') {
        if let Some(value) = pair.strip_prefix(name).and_then(|rest| rest.strip_prefix(b"=")) {
            return Some(at + pair.len() - value.len()..at + pair.len());
        }
        at += pair.len() + 1;
    }
    None
}

/// The body with another name in a form's place; everything else as it was.
#[must_use]
pub fn replace_name(body: &Bytes, place: &Place, name: &str) -> Bytes {
    let (range, name) = match place {
        Place::Form(range) => (range, name.to_owned()),
        Place::Encoded(range) => (range, encode(name)),
        Place::Json { .. } | Place::Query => return body.clone(),
    };
    let mut out = Vec::with_capacity(body.len() + name.len());
    out.extend_from_slice(body.get(..range.start).unwrap_or_default());
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(body.get(range.end..).unwrap_or_default());
    out.into()
}

/// The path with another name in its query's `model`.
#[must_use]
pub fn replace_in_query(path: &PathAndQuery, name: &str) -> PathAndQuery {
    let Some(query) = path.query() else {
        return path.clone();
    };
    let pairs = query.split('&').map(|pair| match pair.split_once('=') {
        Some(("model", _)) => format!("model={}", encode(name)),
        _ => pair.to_owned(),
    });
    let changed = format!("{}?{}", path.path(), pairs.collect::<Vec<_>>().join("&"));
    changed.parse().unwrap_or_else(|_| path.clone())
}

fn encode(text: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._~".contains(&b);
    text.bytes()
        .map(|b| {
            if plain(b) {
                char::from(b).to_string()
            } else {
                format!("%{b:02X}")
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(kind: &str, body: &str) -> Result<(String, Place), ApiError> {
        from_body(kind, &Bytes::copy_from_slice(body.as_bytes()))
    }

    #[test]
    fn json_and_its_mistakes() {
        assert_eq!(
            find("", r#"{"model":"m"}"#).unwrap(),
            ("m".into(), Place::Json { stream: false })
        );
        assert_eq!(
            find("application/x-www-form-urlencoded", r#" {"model":"m"}"#)
                .unwrap()
                .1,
            Place::Json { stream: false }
        );
        let message = |b: &str| find("application/json", b).unwrap_err().message;
        assert_eq!(message("{}"), "model: is missing");
        assert_eq!(message(r#"{"model":3}"#), "model: 3 is not the name of a model");
        assert!(message("hello").contains("byte 0 of 5"));
    }

    #[test]
    fn forms_keep_every_other_byte() {
        let body = "--XX\r\nContent-Disposition: form-data; name=\"file\"; filename=\"model\"\r\nContent-Type: audio/wav\r\n\r\nRIFF\r\n--X\0\r\n--XX\r\ncontent-disposition: form-data; name=\"model\"\r\n\r\nwhisper\r\n--XX--\r\n";
        let (name, place) = find("multipart/form-data; boundary=\"XX\"", body).unwrap();
        assert_eq!(name, "whisper");
        let changed = replace_name(&Bytes::copy_from_slice(body.as_bytes()), &place, "real/name");
        assert_eq!(changed, body.replace("whisper", "real/name"));
        assert!(find("multipart/form-data; boundary=YY", body).is_err());
        assert!(find("multipart/form-data", body).is_err());
    }

    #[test]
    fn urlencoded_forms_and_queries() {
        let body = "a=model=x&model=org%2Fm+1&b=2";
        let (name, place) = find("application/x-www-form-urlencoded", body).unwrap();
        assert_eq!(name, "org/m 1");
        let changed = replace_name(&Bytes::copy_from_slice(body.as_bytes()), &place, "q r");
        assert_eq!(changed, "a=model=x&model=q%20r&b=2");
        assert_eq!(from_query(Some("x=1&model=a%20b")).unwrap(), "a b");
        assert!(from_query(None).is_err());
        let path = PathAndQuery::from_static("/v1/x?a=b&model=p%2Fm&c");
        assert_eq!(replace_in_query(&path, "o/m n"), "/v1/x?a=b&model=o%2Fm%20n&c");
    }
}

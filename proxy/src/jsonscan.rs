//! Finds top-level keys of a JSON object in place, without building a tree.
//!
//! Routing needs one or two keys of a body that may be megabytes long (pictures, long contexts). The scan steps over
//! values by their quotes and brackets only; whether the rest is valid JSON is for the model's server to say.

use std::borrow::Cow;
use std::ops::Range;

/// One member of the top-level object. Ranges are byte offsets into the body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// The key with its quotes.
    pub key: Range<usize>,
    /// The value, without surrounding white space.
    pub value: Range<usize>,
}

/// Walks over the members of the top-level object.
#[derive(Debug)]
pub struct Members<'a> {
    body: &'a [u8],
    at: usize,
    started: bool,
}

/// The body is not a JSON object, or ends within one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed {
    /// Byte offset at which the scan gave up.
    pub at: usize,
}

/// The top-level members of `body`, in order.
#[must_use]
pub fn members(body: &[u8]) -> Members<'_> {
    Members {
        body,
        at: 0,
        started: false,
    }
}

/// The value of the first top-level member called `key`.
///
/// # Errors
/// The body is not an object, or is cut off before the key was found.
pub fn find(body: &[u8], key: &str) -> Result<Option<Range<usize>>, Malformed> {
    for member in members(body) {
        let member = member?;
        if key_is(body, &member, key) {
            return Ok(Some(member.value));
        }
    }
    Ok(None)
}

/// The values of the first top-level members called `first` and `second`, in one pass.
///
/// # Errors
/// The body is not an object, or is cut off before `first` was found.
pub fn find_two(body: &[u8], first: &str, second: &str) -> Result<[Option<Range<usize>>; 2], Malformed> {
    let mut found = [None, None];
    for member in members(body) {
        let member = match (member, &found) {
            (Ok(member), _) => member,
            (Err(_), [Some(_), _]) => break,
            (Err(error), _) => return Err(error),
        };
        match &mut found {
            [one @ None, _] if key_is(body, &member, first) => *one = Some(member.value),
            [_, two @ None] if key_is(body, &member, second) => *two = Some(member.value),
            [Some(_), Some(_)] => break,
            _ => {}
        }
    }
    Ok(found)
}

/// Whether the member's key is `name`, escapes resolved.
#[must_use]
pub fn key_is(body: &[u8], member: &Member, name: &str) -> bool {
    string(body.get(member.key.clone()).unwrap_or_default()).is_some_and(|k| k == name)
}

/// The text of a JSON string token (with its quotes); `None` if it is not a string.
#[must_use]
pub fn string(token: &[u8]) -> Option<Cow<'_, str>> {
    let inner = token.strip_prefix(b"\"")?.strip_suffix(b"\"")?;
    if memchr::memchr(b'\\', inner).is_none() {
        return std::str::from_utf8(inner).ok().map(Cow::Borrowed);
    }
    serde_json::from_slice::<String>(token).ok().map(Cow::Owned)
}

impl Members<'_> {
    fn peek(&self) -> Option<u8> {
        self.body.get(self.at).copied()
    }

    fn space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\n' | b'\r' | b'\t')) {
            self.at += 1;
        }
    }

    fn expect(&mut self, byte: u8) -> Result<(), Malformed> {
        self.space();
        if self.peek() == Some(byte) {
            self.at += 1;
            return Ok(());
        }
        Err(Malformed { at: self.at })
    }

    /// Steps over a string that begins here.
    fn skip_string(&mut self) -> Result<(), Malformed> {
        self.expect(b'"')?;
        loop {
            let rest = self.body.get(self.at..).unwrap_or_default();
            let Some(i) = memchr::memchr2(b'"', b'\\', rest) else {
                return Err(Malformed { at: self.body.len() });
            };
            let escaped = rest.get(i) == Some(&b'\\');
            self.at += i + if escaped { 2 } else { 1 };
            if !escaped {
                return Ok(());
            }
        }
    }

    fn skip_value(&mut self) -> Result<(), Malformed> {
        match self.peek() {
            Some(b'"') => self.skip_string(),
            Some(b'{' | b'[') => {
                let mut depth = 0_usize;
                loop {
                    let rest = self.body.get(self.at..).unwrap_or_default();
                    let step = rest
                        .iter()
                        .position(|b| matches!(b, b'"' | b'{' | b'}' | b'[' | b']'));
                    let Some(step) = step else {
                        return Err(Malformed { at: self.body.len() });
                    };
                    self.at += step;
                    match self.peek() {
                        Some(b'"') => {
                            self.skip_string()?;
                            continue;
                        }
                        Some(b'{' | b'[') => depth += 1,
                        _ => depth -= 1,
                    }
                    self.at += 1;
                    if depth == 0 {
                        return Ok(());
                    }
                }
            }
            _ => {
                let begin = self.at;
                while self
                    .peek()
                    .is_some_and(|b| !matches!(b, b',' | b'}' | b']' | b' ' | b'\n' | b'\r' | b'\t'))
                {
                    self.at += 1;
                }
                if self.at == begin {
                    Err(Malformed { at: begin })
                } else {
                    Ok(())
                }
            }
        }
    }

    fn member(&mut self) -> Result<Option<Member>, Malformed> {
        self.space();
        if !self.started {
            self.expect(b'{')?;
            self.space();
        }
        if self.peek() == Some(b'}') {
            return Ok(None);
        }
        if self.started {
            self.expect(b',')?;
            self.space();
        }
        self.started = true;
        let key = self.at;
        self.skip_string()?;
        let key = key..self.at;
        self.expect(b':')?;
        self.space();
        let value = self.at;
        self.skip_value()?;
        Ok(Some(Member {
            key,
            value: value..self.at,
        }))
    }
}

impl Iterator for Members<'_> {
    type Item = Result<Member, Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.at == usize::MAX {
            return None;
        }
        let member = self.member().transpose();
        if !matches!(member, Some(Ok(_))) {
            self.at = usize::MAX;
        }
        member
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get(body: &str, key: &str) -> Result<Option<String>, Malformed> {
        Ok(find(body.as_bytes(), key)?.map(|r| body[r].to_owned()))
    }

    #[test]
    fn finds_only_top_level_keys() {
        let body = r#" {"messages":[{"model":"inner","x":"}\"]"}], "mod\u0065l" : "a\"b" ,"stream":true}"#;
        assert_eq!(get(body, "model").unwrap().unwrap(), r#""a\"b""#);
        assert_eq!(get(body, "stream").unwrap().unwrap(), "true");
        assert_eq!(get(body, "x").unwrap(), None);
        assert_eq!(string(br#""a\"b""#).unwrap(), "a\"b");
    }

    #[test]
    fn stops_at_the_first_hit_and_says_where_it_gave_up() {
        assert_eq!(get(r#"{"model":"m", broken"#, "model").unwrap().unwrap(), "\"m\"");
        assert_eq!(get(r#"{"a":1, broken"#, "model"), Err(Malformed { at: 8 }));
        assert_eq!(get("[1]", "model"), Err(Malformed { at: 0 }));
        assert_eq!(get("", "model"), Err(Malformed { at: 0 }));
        assert_eq!(get(r#"{"a":"unfinished"#, "b"), Err(Malformed { at: 16 }));
        assert_eq!(get(r#"{"a":{"b":[1,2]"#, "b"), Err(Malformed { at: 15 }));
        assert_eq!(get("{}", "model"), Ok(None));
        let two = |body: &str| find_two(body.as_bytes(), "model", "stream");
        assert_eq!(
            two(r#"{"stream":true,"model":1}"#).unwrap(),
            [Some(23..24), Some(10..14)]
        );
        assert_eq!(two(r#"{"model":1, broken"#).unwrap(), [Some(9..10), None]);
        assert!(two(r#"{"stream":1, broken"#).is_err());
    }

    #[test]
    fn agrees_with_a_parser_on_member_values() {
        let body = r#"{"a":null,"b":-1.5e3,"c":[[],{}],"d":{"e":"\\"},"f":"","g":false}"#;
        let tree: serde_json::Value = serde_json::from_str(body).unwrap();
        let mut seen = 0;
        for m in members(body.as_bytes()) {
            let m = m.unwrap();
            let key: String = serde_json::from_str(&body[m.key]).unwrap();
            let value: serde_json::Value = serde_json::from_str(&body[m.value]).unwrap();
            assert_eq!(tree[&key], value);
            seen += 1;
        }
        assert_eq!(seen, 6);
    }
}

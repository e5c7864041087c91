//! Reading a JSON object field by field: strict about the fields that are known, silent about the others.
//!
//! Not serde's derive, because its messages name neither the field nor the value.

use serde_json::{Map, Value};

use crate::error::{ApiError, shown};

/// A request's JSON object.
#[derive(Debug, Clone)]
pub struct Fields {
    map: Map<String, Value>,
}

impl Fields {
    /// Parses a body.
    ///
    /// # Errors
    /// 400 with line and column for malformed JSON, 400 for JSON that is no object.
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        if body.iter().all(u8::is_ascii_whitespace) {
            return Err(ApiError::bad_request(
                "the body is empty; it must be a JSON object",
            ));
        }
        match serde_json::from_slice(body) {
            Ok(Value::Object(map)) => Ok(Self { map }),
            Ok(other) => Err(ApiError::bad_request(format!(
                "the body must be a JSON object, not {} ({})",
                kind_of(&other),
                shown(&other)
            ))),
            // serde_json's text ends with "at line L column C".
            Err(e) => {
                Err(ApiError::bad_request(format!("the body is not valid JSON: {e}"))
                    .with_code("invalid_json"))
            }
        }
    }

    /// The value of a field; `null` counts as absent, as with OpenAI.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.map.get(name).filter(|v| !v.is_null())
    }

    /// Moves a field's value out.
    pub fn take(&mut self, name: &str) -> Option<Value> {
        self.map.get_mut(name).map(Value::take).filter(|v| !v.is_null())
    }

    /// A switch.
    ///
    /// # Errors
    /// 400 for another kind of value; so with all the following ones.
    pub fn bool(&self, name: &str) -> Result<Option<bool>, ApiError> {
        self.read(name, "true or false", Value::as_bool)
    }

    /// A text.
    ///
    /// # Errors
    /// See [`Self::bool`].
    pub fn string(&self, name: &str) -> Result<Option<&str>, ApiError> {
        self.read(name, "a string", Value::as_str)
    }

    /// A number for which `fits` holds; `range` says so in words.
    ///
    /// # Errors
    /// See [`Self::bool`].
    pub fn number(
        &self,
        name: &str,
        range: &str,
        fits: impl Fn(f64) -> bool,
    ) -> Result<Option<f64>, ApiError> {
        self.read(name, &format!("a number {range}"), |v| {
            v.as_f64().filter(|x| fits(*x))
        })
    }

    /// A whole number in a range; `100.0` is one too.
    ///
    /// # Errors
    /// See [`Self::bool`].
    pub fn integer(&self, name: &str, min: i64, max: i64) -> Result<Option<i64>, ApiError> {
        let expected = if max == i64::MAX {
            format!("a whole number of at least {min}")
        } else {
            format!("a whole number from {min} to {max}")
        };
        self.read(name, &expected, |v| whole(v).filter(|i| (min..=max).contains(i)))
    }

    /// Moves an object out.
    ///
    /// # Errors
    /// See [`Self::bool`].
    pub fn take_object(&mut self, name: &str) -> Result<Option<Map<String, Value>>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(map)),
            Some(other) => Err(mismatch(name, "an object", &other)),
        }
    }

    /// Moves an array out.
    ///
    /// # Errors
    /// See [`Self::bool`].
    pub fn take_array(&mut self, name: &str) -> Result<Option<Vec<Value>>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Array(items)) => Ok(Some(items)),
            Some(other) => Err(mismatch(name, "an array", &other)),
        }
    }

    fn read<'a, T>(
        &'a self,
        name: &str,
        expected: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ApiError> {
        match self.get(name) {
            None => Ok(None),
            Some(value) => read(value)
                .map(Some)
                .ok_or_else(|| mismatch(name, expected, value)),
        }
    }
}

/// A whole number, also when written as `3.0`; none beyond what an `f64` holds exactly.
#[must_use]
pub fn whole(value: &Value) -> Option<i64> {
    const EXACT: f64 = 9_007_199_254_740_992.0;
    value.as_i64().or_else(|| {
        let x = value.as_f64().filter(|x| x.fract() == 0.0 && x.abs() <= EXACT)?;
        // In range by the filter.
        #[allow(clippy::cast_possible_truncation)]
        Some(x as i64)
    })
}

/// A field has the wrong kind of value, or one out of range.
#[must_use]
pub fn mismatch(name: &str, expected: &str, value: &Value) -> ApiError {
    ApiError::invalid(name, format!("must be {expected}, got {}", shown(value)))
}

/// What a value is, with its article.
#[must_use]
pub fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(text: &str) -> Fields {
        Fields::parse(text.as_bytes()).unwrap()
    }

    #[test]
    fn malformed_json_is_located() {
        let error = Fields::parse(b"{\n  \"a\": 1,\n  oops\n}").unwrap_err();
        assert_eq!(error.status, 400);
        assert!(error.message.contains("line 3 column 3"), "{}", error.message);
        assert_eq!(error.code, Some("invalid_json"));
        for (body, part) in [
            ("[1]", "an array ([1])"),
            ("", "empty"),
            (" \n", "empty"),
            ("3", "a number (3)"),
        ] {
            let error = Fields::parse(body.as_bytes()).unwrap_err();
            assert!(error.message.contains(part), "{body:?}: {}", error.message);
        }
        assert!(Fields::parse(&[b'"', 0xff, b'"']).is_err());
    }

    #[test]
    fn whole_numbers_may_be_written_as_floats() {
        let f = fields(
            r#"{"a": 3.0, "b": 3.5, "c": 1e300, "d": "3", "e": null, "f": -1, "g": 18446744073709551615}"#,
        );
        assert_eq!(f.integer("a", 0, 10).unwrap(), Some(3));
        for name in ["b", "c", "d", "f", "g"] {
            assert!(f.integer(name, 0, i64::MAX).is_err(), "{name}");
        }
        assert_eq!(f.integer("e", 0, 10).unwrap(), None);
        assert_eq!(f.integer("absent", 0, 10).unwrap(), None);
        let error = f.integer("a", 5, 10).unwrap_err();
        assert_eq!(error.message, "a: must be a whole number from 5 to 10, got 3.0");
        assert_eq!(error.param.as_deref(), Some("a"));
    }
}

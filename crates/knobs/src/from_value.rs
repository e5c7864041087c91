//! A resolved value into the type of its field.

use crate::knob::Value;
use serde_json::Map;

/// Takes a resolved value into a field's type.
pub(crate) trait FromValue: Sized {
    fn from_value(value: Option<Value>) -> Option<Self>;
}

impl FromValue for bool {
    fn from_value(value: Option<Value>) -> Option<Self> {
        match value {
            Some(Value::Bool(b)) => Some(b),
            _ => None,
        }
    }
}

impl FromValue for u64 {
    fn from_value(value: Option<Value>) -> Option<Self> {
        match value {
            Some(Value::Int(i)) => Self::try_from(i).ok(),
            _ => None,
        }
    }
}

impl FromValue for u16 {
    fn from_value(value: Option<Value>) -> Option<Self> {
        match value {
            Some(Value::Int(i)) => Self::try_from(i).ok(),
            _ => None,
        }
    }
}

impl FromValue for f64 {
    fn from_value(value: Option<Value>) -> Option<Self> {
        match value {
            Some(Value::Float(x)) => Some(x),
            _ => None,
        }
    }
}

impl FromValue for String {
    fn from_value(value: Option<Value>) -> Option<Self> {
        match value {
            Some(Value::Str(s)) => Some(s),
            _ => None,
        }
    }
}

impl FromValue for Map<String, serde_json::Value> {
    fn from_value(value: Option<Value>) -> Option<Self> {
        match value {
            Some(Value::Json(map)) => Some(map),
            _ => None,
        }
    }
}

impl<T: FromValue> FromValue for Option<T> {
    fn from_value(value: Option<Value>) -> Option<Self> {
        match value {
            None => Some(None),
            some => T::from_value(some).map(Some),
        }
    }
}

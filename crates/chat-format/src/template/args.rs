//! Arguments of methods, filters and functions as Python binds them: by place or by name.

use minijinja::value::{Kwargs, Rest, from_args};
use minijinja::{Error, ErrorKind, Value};

/// Positional and keyword arguments of one call, checked by name.
pub(crate) struct Args {
    positional: Vec<Value>,
    keywords: Kwargs,
}

impl Args {
    /// The arguments of a method, as minijinja gives them.
    pub(crate) fn of_method(args: &[Value]) -> Result<Self, Error> {
        let (positional, keywords) = from_args(args)?;
        Ok(Self::new(positional, keywords))
    }

    /// The arguments of a filter or function.
    pub(crate) fn new(positional: Rest<Value>, keywords: Kwargs) -> Self {
        Self {
            positional: positional.0,
            keywords,
        }
    }

    pub(crate) fn get(&self, index: usize, name: &str) -> Option<Value> {
        let given = self
            .positional
            .get(index)
            .cloned()
            .or_else(|| self.keywords.get::<Value>(name).ok());
        given.filter(|value| !value.is_none() && !value.is_undefined())
    }

    pub(crate) fn text(&self, index: usize, name: &str) -> Result<Option<String>, Error> {
        match self.get(index, name) {
            None => Ok(None),
            Some(value) => match value.as_str() {
                Some(text) => Ok(Some(text.to_owned())),
                None => Err(Error::new(
                    ErrorKind::InvalidOperation,
                    format!("argument {name} must be a string, not {}", value.kind()),
                )),
            },
        }
    }

    pub(crate) fn required(&self, index: usize, name: &str) -> Result<String, Error> {
        self.text(index, name)?
            .ok_or_else(|| Error::new(ErrorKind::MissingArgument, format!("missing argument {name}")))
    }

    pub(crate) fn integer(&self, index: usize, name: &str) -> Result<Option<i64>, Error> {
        self.get(index, name).map(i64::try_from).transpose()
    }

    pub(crate) fn flag(&self, index: usize, name: &str) -> bool {
        self.get(index, name).is_some_and(|value| value.is_true())
    }

    pub(crate) fn size(&self, index: usize, name: &str, default: usize) -> Result<usize, Error> {
        Ok(self
            .integer(index, name)?
            .map_or(default, |given| usize::try_from(given).unwrap_or(0)))
    }

    /// All positional arguments.
    pub(crate) fn positional(&self) -> &[Value] {
        &self.positional
    }

    /// The names and values of all keyword arguments.
    pub(crate) fn keywords(&self) -> Result<Vec<(String, Value)>, Error> {
        self.keywords
            .args()
            .map(|name| Ok((name.to_owned(), self.keywords.get::<Value>(name)?)))
            .collect()
    }

    /// Errors if a keyword was given that nobody asked for.
    pub(crate) fn finish(&self) -> Result<(), Error> {
        self.keywords.assert_all_used()
    }
}

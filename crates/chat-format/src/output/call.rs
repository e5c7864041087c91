//! Putting one tool call together from its JSON text, while that is still arriving.

use std::sync::Arc;

use serde_json::{Map, Value as Json};

use super::coerce::coerce;
use super::lenient::{Invalid, Kind, Lenient, Sink, Step};
use super::tools::{ToolSet, Types};

/// Where the strict text of the value that is being read goes.
#[derive(Debug, Clone, Default)]
enum Route {
    /// Punctuation of the call object itself.
    #[default]
    Drop,
    Name(String),
    /// The arguments object, streamed.
    Arguments,
    /// A parameter that may have to be coerced, until it is complete.
    Parameter(String, Types),
    /// Arguments given as a JSON string that holds the object.
    ArgumentsText(String),
    /// Any other key's value.
    Extra(String, String),
}

/// How far the arguments are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    Missing,
    /// The object has begun, but not its first value.
    Opened,
    /// Some of it can be shown.
    Showing,
    Complete,
}

/// The call that is being read. It is the [`Sink`] of the reader, and hands out what has become certain.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    tools: Arc<ToolSet>,
    name: Option<String>,
    progress: Progress,
    /// Strict text of the arguments that has not been handed out.
    arguments: String,
    route: Route,
    key: String,
    /// Depth of the call object's values: 1, or 2 inside of OpenAI's `"function": {...}`.
    call_depth: usize,
    /// Depth of the parameters' values while the arguments are read.
    parameter_depth: usize,
    extras: Map<String, Json>,
    is_call: bool,
}

impl Call {
    pub(crate) fn new(tools: Arc<ToolSet>) -> Self {
        Self {
            tools,
            name: None,
            progress: Progress::Missing,
            arguments: String::new(),
            route: Route::Drop,
            key: String::new(),
            call_depth: 1,
            parameter_depth: usize::MAX,
            extras: Map::new(),
            is_call: false,
        }
    }

    /// The name, once it is known and the arguments have come so far that they can be shown.
    pub(crate) fn showable_name(&self) -> Option<&str> {
        let name = self.name.as_deref()?;
        matches!(self.progress, Progress::Showing | Progress::Complete).then_some(name)
    }

    /// Takes the argument text that can be shown now.
    pub(crate) fn take_arguments(&mut self) -> String {
        std::mem::take(&mut self.arguments)
    }

    /// The output broke off: whatever of the arguments was still held back joins them.
    pub(crate) fn flush_partial(&mut self) {
        if let Route::Parameter(text, _) = std::mem::take(&mut self.route) {
            self.arguments.push_str(&text);
        }
    }

    /// For a call without tags: whether it can still be a call of a declared function.
    pub(crate) fn plausible_bare(&self) -> bool {
        self.extras.is_empty()
            && !matches!(&self.route, Route::Extra(key, _) if !is_envelope(key))
            && self.name.as_ref().is_none_or(|name| self.tools.contains(name))
    }

    /// Whether both a name and arguments were given.
    pub(crate) fn has_arguments(&self) -> bool {
        self.name.is_some() && self.progress == Progress::Complete
    }

    /// The call object is complete. Gives the text of keys that belong nowhere.
    ///
    /// Without any arguments, other keys are the arguments: `{"name": "f", "city": "Oslo"}`.
    pub(crate) fn complete(&mut self) -> Result<Option<String>, Invalid> {
        let name = self
            .name
            .as_deref()
            .filter(|name| !name.is_empty())
            .ok_or(Invalid)?;
        let extras = std::mem::take(&mut self.extras);
        if self.progress == Progress::Complete {
            return Ok((!extras.is_empty()).then(|| Json::Object(extras).to_string()));
        }
        let mut text = String::from("{");
        for (index, (key, value)) in extras.into_iter().enumerate() {
            if index > 0 {
                text.push_str(", ");
            }
            text.push_str(&Json::String(key.clone()).to_string());
            text.push_str(": ");
            text.push_str(&coerce(value.to_string(), self.tools.types(name, &key)));
        }
        text.push('}');
        self.arguments = text;
        self.progress = Progress::Complete;
        Ok(None)
    }

    fn start_call_value(&mut self, depth: usize, kind: Kind) -> Result<(), Invalid> {
        let key = self.key.clone();
        match (key.as_str(), kind) {
            ("name", Kind::String) if self.name.is_none() => self.route = Route::Name(String::new()),
            ("function", Kind::String) if self.name.is_none() => self.route = Route::Name(String::new()),
            ("function", Kind::Object) if depth == 1 => self.call_depth = 2,
            ("arguments" | "parameters", Kind::Object) if self.progress == Progress::Missing => {
                self.progress = Progress::Opened;
                self.route = Route::Arguments;
                self.parameter_depth = depth + 1;
            }
            ("arguments" | "parameters", Kind::String) if self.progress == Progress::Missing => {
                self.route = Route::ArgumentsText(String::new());
            }
            // `"arguments": null` means none.
            ("arguments" | "parameters", Kind::Word) if self.progress == Progress::Missing => {
                self.route = Route::ArgumentsText(String::new());
            }
            ("name" | "arguments" | "parameters", _) => return Err(Invalid),
            _ => self.route = Route::Extra(key, String::new()),
        }
        Ok(())
    }

    fn end_call_value(&mut self) -> Result<(), Invalid> {
        match std::mem::take(&mut self.route) {
            Route::Name(text) => {
                self.name = Some(serde_json::from_str(&text).map_err(|_| Invalid)?);
                if self.progress == Progress::Complete {
                    // The arguments came first: now their types are known.
                    let text = std::mem::take(&mut self.arguments);
                    self.read_arguments(&text)?;
                }
            }
            Route::ArgumentsText(text) => self.arguments_from_text(&text)?,
            Route::Extra(key, text) => {
                if !is_envelope(&key) {
                    self.extras
                        .insert(key, serde_json::from_str(&text).map_err(|_| Invalid)?);
                }
            }
            Route::Arguments => self.progress = Progress::Complete,
            Route::Drop | Route::Parameter(..) => {}
        }
        Ok(())
    }

    /// `"arguments": "{\"a\": 1}"`: the object is in the string.
    fn arguments_from_text(&mut self, text: &str) -> Result<(), Invalid> {
        let inner = match serde_json::from_str(text).map_err(|_| Invalid)? {
            Json::String(inner) => inner,
            Json::Null => String::new(),
            _ => return Err(Invalid),
        };
        let inner = inner.trim();
        if inner.is_empty() {
            self.arguments.push_str("{}");
            self.progress = Progress::Complete;
            return Ok(());
        }
        if inner.starts_with('{') {
            self.read_arguments(inner)
        } else {
            Err(Invalid)
        }
    }

    /// Reads an object's whole text as the arguments.
    fn read_arguments(&mut self, text: &str) -> Result<(), Invalid> {
        self.route = Route::Arguments;
        self.progress = Progress::Opened;
        self.parameter_depth = 1;
        // The object itself is at depth 0 here, which is never a call value's depth.
        let call_depth = std::mem::replace(&mut self.call_depth, usize::MAX);
        let mut reader = Lenient::default();
        let mut step = Step::More;
        for c in text.chars() {
            if step == Step::Done {
                return Err(Invalid);
            }
            step = reader.feed(c, self)?;
        }
        if step != Step::Done {
            return Err(Invalid);
        }
        self.call_depth = call_depth;
        self.route = Route::Drop;
        self.progress = Progress::Complete;
        Ok(())
    }

    fn is_parameter(&self, depth: usize) -> bool {
        depth == self.parameter_depth && matches!(self.route, Route::Arguments | Route::Parameter(..))
    }
}

/// What OpenAI's own form of a call carries beside name and arguments.
fn is_envelope(key: &str) -> bool {
    matches!(key, "type" | "id")
}

impl Sink for Call {
    fn text(&mut self, text: &str) {
        match &mut self.route {
            Route::Drop => {}
            Route::Name(held)
            | Route::Parameter(held, _)
            | Route::ArgumentsText(held)
            | Route::Extra(_, held) => {
                held.push_str(text);
            }
            Route::Arguments => self.arguments.push_str(text),
        }
    }

    fn key(&mut self, depth: usize, key: &str) -> Result<(), Invalid> {
        if depth == self.call_depth || depth == self.parameter_depth {
            key.clone_into(&mut self.key);
        }
        Ok(())
    }

    fn value_start(&mut self, depth: usize, kind: Kind) -> Result<(), Invalid> {
        if depth == 0 && self.parameter_depth == usize::MAX && !self.is_call {
            self.is_call = true;
            return if kind == Kind::Object {
                Ok(())
            } else {
                Err(Invalid)
            };
        }
        if self.is_parameter(depth) {
            if self.progress == Progress::Opened {
                self.progress = Progress::Showing;
            }
            // Arguments before the name: the types are not known yet, so they are coerced at their end.
            let types = self.name.as_deref().map(|name| self.tools.types(name, &self.key));
            if let Some(types) = types.filter(|types| types.may_coerce(kind)) {
                self.route = Route::Parameter(String::new(), types);
            }
        } else if depth == self.call_depth && matches!(self.route, Route::Drop) {
            self.start_call_value(depth, kind)?;
        }
        Ok(())
    }

    fn value_end(&mut self, depth: usize) -> Result<(), Invalid> {
        if self.is_parameter(depth) {
            if let Route::Parameter(text, types) = &mut self.route {
                let text = coerce(std::mem::take(text), *types);
                self.arguments.push_str(&text);
                self.route = Route::Arguments;
            }
        } else if depth == 1 && self.call_depth == 2 && matches!(self.route, Route::Drop) {
            self.call_depth = 1;
        } else if depth == self.call_depth {
            self.end_call_value()?;
        }
        Ok(())
    }
}

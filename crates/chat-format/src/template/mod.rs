//! Hugging Face chat templates: loaded once, rendered many times.

mod args;
mod clock;
mod environment;
mod error;
mod filters;
mod load;
mod messages;
mod methods;
mod python;

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use minijinja::{Environment, Value};
use serde_json::{Map, Value as Json};

pub use clock::{Clock, system_clock};
pub use error::TemplateError;
pub use messages::ContentStyle;

use crate::output::ToolFormat;

/// The name of the template that is used when no other is asked for.
const DEFAULT: &str = "default";
/// The name of the template that is used for requests with tools, where a model has one.
const TOOL_USE: &str = "tool_use";

/// What a chat template is rendered with.
#[derive(Debug, Clone, Default)]
pub struct RenderInputs<'a> {
    /// The conversation, in OpenAI's shape (`role`, `content`, `tool_calls`, `reasoning_content`, ...).
    pub messages: &'a [Json],
    /// OpenAI's tool definitions; `None` and an empty list mean no tools.
    pub tools: Option<&'a [Json]>,
    /// Documents for retrieval-augmented templates.
    pub documents: Option<&'a [Json]>,
    /// Whether the prompt ends with the opening of an assistant turn.
    pub add_generation_prompt: bool,
    /// Further variables: the request's `chat_template_kwargs`, `enable_thinking`, ... They win over special tokens.
    pub kwargs: Option<&'a Map<String, Json>>,
}

/// One model's chat template(s), compiled. `Send + Sync`; rendering takes `&self`.
pub struct ChatTemplate {
    env: Environment<'static>,
    sources: BTreeMap<String, String>,
    special_tokens: Map<String, Json>,
    content_style: ContentStyle,
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChatTemplate")
            .field("names", &self.sources.keys().collect::<Vec<_>>())
            .field("special_tokens", &self.special_tokens)
            .field("content_style", &self.content_style)
            .finish_non_exhaustive()
    }
}

impl ChatTemplate {
    /// Compiles one template. `special_tokens` (`bos_token`, `eos_token`, ...) become its variables.
    ///
    /// # Errors
    /// [`TemplateError::Syntax`] with the line.
    pub fn from_source(source: &str, special_tokens: Map<String, Json>) -> Result<Self, TemplateError> {
        Self::from_sources(
            BTreeMap::from([(DEFAULT.to_owned(), source.to_owned())]),
            special_tokens,
        )
    }

    /// Compiles several named templates (`default`, `tool_use`, ...).
    ///
    /// # Errors
    /// [`TemplateError::Syntax`] for the first that does not parse.
    pub fn from_sources(
        sources: BTreeMap<String, String>,
        special_tokens: Map<String, Json>,
    ) -> Result<Self, TemplateError> {
        let mut env = environment::environment(&system_clock())
            .map_err(|error| TemplateError::syntax(DEFAULT, &error))?;
        for (name, source) in &sources {
            env.add_template_owned(name.clone(), environment::prepare_source(source))
                .map_err(|error| TemplateError::syntax(name, &error))?;
        }
        let mut template = Self {
            env,
            sources,
            special_tokens,
            content_style: ContentStyle::default(),
        };
        template.content_style = messages::probe_content_style(&template);
        Ok(template)
    }

    /// Loads what a model directory holds: `chat_template.jinja` and `additional_chat_templates/NAME.jinja`, else the
    /// legacy `chat_template.json`, else `chat_template` in `tokenizer_config.json` (a string, or a list of
    /// `{name, template}`). The special tokens come from `tokenizer_config.json` and `special_tokens_map.json`.
    ///
    /// # Errors
    /// [`TemplateError::Missing`] without any template, [`TemplateError::File`] for unreadable files,
    /// [`TemplateError::Syntax`] for templates that do not parse.
    pub fn from_dir(dir: &Path) -> Result<Self, TemplateError> {
        let loaded = load::load(dir)?;
        if loaded.sources.is_empty() {
            return Err(TemplateError::Missing(dir.to_owned()));
        }
        Self::from_sources(loaded.sources, loaded.special_tokens)
    }

    /// Sets the clock that `strftime_now` reads. Default: [`system_clock`].
    #[must_use]
    pub fn with_clock(mut self, clock: Clock) -> Self {
        self.env.add_function("strftime_now", move |format: &str| {
            clock::strftime(clock(), format)
        });
        self
    }

    /// The source of the template that a request with or without tools would use.
    pub fn source(&self, with_tools: bool) -> &str {
        self.select(with_tools)
            .ok()
            .and_then(|name| self.sources.get(name))
            .map_or("", String::as_str)
    }

    /// The tool-call format that the template teaches the model, as far as it can be told from the source.
    pub fn tool_format(&self) -> ToolFormat {
        ToolFormat::detect(self.source(true))
    }

    /// Whether the template takes a message's content as a string or as a list of parts.
    pub fn content_style(&self) -> ContentStyle {
        self.content_style
    }

    /// The special tokens by name (`bos_token`, `eos_token`, ...).
    pub fn special_tokens(&self) -> &Map<String, Json> {
        &self.special_tokens
    }

    /// Renders a request in OpenAI's shape: first [`Self::normalize`], then [`Self::render_raw`].
    ///
    /// # Errors
    /// See [`TemplateError`]; all of them here are client errors, except [`TemplateError::NoDefault`].
    pub fn render(&self, inputs: &RenderInputs<'_>) -> Result<String, TemplateError> {
        let messages = self.normalize(inputs.messages)?;
        self.render_raw(&RenderInputs {
            messages: &messages,
            ..inputs.clone()
        })
    }

    /// Brings OpenAI's messages into the form that Hugging Face templates expect:
    ///
    /// - `tool_calls[].function.arguments` given as a string (OpenAI's wire form) becomes an object when it is the
    ///   JSON text of one (empty text: the empty object); templates apply `tojson` or `.items()` to it. Other text
    ///   stays as it is.
    /// - `content` given as a list of text parts becomes one string, the texts joined without anything between them,
    ///   unless the template only reads lists (see [`ContentStyle`]); then a string becomes a list of one part.
    ///
    /// # Errors
    /// [`TemplateError::Input`] for a message that is no object, and for parts other than text (images, ...) when the
    /// template does not read lists: they would vanish or end up in the prompt as garbage.
    pub fn normalize(&self, messages: &[Json]) -> Result<Vec<Json>, TemplateError> {
        messages::normalize(messages, self.content_style)
    }

    /// Renders exactly as `transformers`' `apply_chat_template(..., tokenize=False)` does, version 5.23: keys whose
    /// value is `null` are dropped from the messages, and reasoning is offered under all of its names
    /// (`reasoning_content`, and `thinking`).
    ///
    /// # Errors
    /// [`TemplateError::Raised`] when the template calls `raise_exception`, [`TemplateError::Render`] with the line
    /// for other failures, [`TemplateError::Input`] for messages that are no objects or an empty conversation.
    pub fn render_raw(&self, inputs: &RenderInputs<'_>) -> Result<String, TemplateError> {
        if inputs.messages.is_empty() {
            return Err(TemplateError::Input("messages must not be empty".to_owned()));
        }
        let tools = inputs.tools.filter(|tools| !tools.is_empty());
        let name = self.select(tools.is_some())?;
        let messages = messages::for_template(inputs.messages)?;
        let list = |items: Option<&[Json]>| match items {
            Some(items) => Value::from(
                items
                    .iter()
                    .map(environment::to_template_value)
                    .collect::<Vec<_>>(),
            ),
            None => Value::from(()),
        };
        let mut context: Vec<(Value, Value)> = Vec::new();
        for (key, value) in self
            .special_tokens
            .iter()
            .chain(inputs.kwargs.into_iter().flatten())
        {
            context.push((Value::from(key.as_str()), environment::to_template_value(value)));
        }
        context.push((Value::from("messages"), Value::from(messages)));
        context.push((Value::from("tools"), list(tools)));
        context.push((Value::from("documents"), list(inputs.documents)));
        context.push((
            Value::from("add_generation_prompt"),
            Value::from(inputs.add_generation_prompt),
        ));
        self.env
            .get_template(name)
            .and_then(|template| template.render(Value::from_pairs(context)))
            .map_err(|error| TemplateError::render(name, &error))
    }

    /// `transformers`' choice: `tool_use` for requests with tools where there is one, else `default`; a single
    /// template of any name is used for everything.
    fn select(&self, with_tools: bool) -> Result<&str, TemplateError> {
        let names = || self.sources.keys().map(String::as_str);
        if with_tools && self.sources.contains_key(TOOL_USE) {
            return Ok(TOOL_USE);
        }
        if self.sources.contains_key(DEFAULT) {
            return Ok(DEFAULT);
        }
        match (names().next(), self.sources.len()) {
            (Some(only), 1) => Ok(only),
            _ => Err(TemplateError::NoDefault(names().collect::<Vec<_>>().join(", "))),
        }
    }
}

//! Errors of loading and rendering chat templates.

use std::path::PathBuf;

use super::environment::Raised;

/// Why a chat template could not be loaded or rendered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TemplateError {
    /// The template refused the conversation by `raise_exception(message)`: the client's fault (HTTP 400).
    #[error("{message}")]
    Raised {
        /// What the template said.
        message: String,
        /// The template's line with the call, counted from 1 (0 if unknown).
        line: usize,
    },
    /// The template failed on this conversation for another reason, such as an operation on an undefined value.
    /// Usually the conversation has a shape that the template does not foresee: the client's fault (HTTP 400).
    #[error("chat template {name}, line {line}: {message}")]
    Render {
        /// The template's name (`default`, `tool_use`, ...).
        name: String,
        /// The failing line, counted from 1 (0 if unknown).
        line: usize,
        /// The engine's message.
        message: String,
    },
    /// The template does not parse: the model's fault, found when it is loaded.
    #[error("chat template {name}, line {line}: {message}")]
    Syntax {
        /// The template's name.
        name: String,
        /// The offending line, counted from 1 (0 if unknown).
        line: usize,
        /// The engine's message.
        message: String,
    },
    /// The model directory holds no chat template.
    #[error("no chat template in {}: neither chat_template.jinja nor chat_template in tokenizer_config.json", .0.display())]
    Missing(PathBuf),
    /// There are several templates, and none fits.
    #[error("no chat template named \"default\"; there are: {0}")]
    NoDefault(String),
    /// A file could not be read, or does not hold what it should.
    #[error("{}: {message}", .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// The messages or tools have a wrong shape: the client's fault (HTTP 400). The text names the field.
    #[error("{0}")]
    Input(String),
}

impl TemplateError {
    /// Whether the request is to blame (HTTP 400) rather than the model's files (HTTP 500).
    pub fn is_client_error(&self) -> bool {
        matches!(self, Self::Raised { .. } | Self::Render { .. } | Self::Input(_))
    }

    pub(crate) fn syntax(name: &str, error: &minijinja::Error) -> Self {
        Self::Syntax {
            name: name.to_owned(),
            line: error.line().unwrap_or(0),
            message: plain_message(error),
        }
    }

    pub(crate) fn render(name: &str, error: &minijinja::Error) -> Self {
        let line = error.line().unwrap_or(0);
        let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
        while let Some(inner) = source {
            if let Some(Raised(message)) = inner.downcast_ref::<Raised>() {
                return Self::Raised {
                    message: message.clone(),
                    line,
                };
            }
            source = inner.source();
        }
        Self::Render {
            name: name.to_owned(),
            line,
            message: plain_message(error),
        }
    }
}

/// The engine's message without the place, which is told separately.
fn plain_message(error: &minijinja::Error) -> String {
    match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    }
}

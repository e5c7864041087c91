//! Finding the chat templates and special tokens in a model directory.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value as Json};

use super::{DEFAULT, TemplateError};

/// The special tokens that `transformers` hands to templates by name.
const SPECIAL_TOKENS: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

/// What a model directory says about its chat format.
#[derive(Debug, Default)]
pub(crate) struct Loaded {
    pub(crate) sources: BTreeMap<String, String>,
    pub(crate) special_tokens: Map<String, Json>,
}

pub(crate) fn load(dir: &Path) -> Result<Loaded, TemplateError> {
    let mut loaded = Loaded::default();
    let config = read_json(&dir.join("tokenizer_config.json"))?;
    // Later files win, as in `transformers`: the map is the legacy one.
    for source in [read_json(&dir.join("special_tokens_map.json"))?, config.clone()]
        .into_iter()
        .flatten()
    {
        for name in SPECIAL_TOKENS {
            // Either the text itself, or an AddedToken object that holds it in `content`.
            let text = source
                .get(name)
                .and_then(|token| token.as_str().or_else(|| token.get("content")?.as_str()));
            if let Some(text) = text {
                loaded.special_tokens.insert(name.to_owned(), Json::from(text));
            }
        }
    }
    if let Some(source) = read_text(&dir.join("chat_template.jinja"))? {
        loaded.sources.insert(DEFAULT.to_owned(), source);
    }
    read_additional(dir, &mut loaded.sources)?;
    if loaded.sources.is_empty() {
        let legacy_path = dir.join("chat_template.json");
        let legacy = read_json(&legacy_path)?;
        for (path, file) in [(legacy_path, legacy), (dir.join("tokenizer_config.json"), config)] {
            let given = file.as_ref().and_then(|file| file.get("chat_template"));
            if let (Some(given), true) = (given, loaded.sources.is_empty()) {
                loaded.sources = named_templates(&path, given)?;
            }
        }
    }
    Ok(loaded)
}

/// `additional_chat_templates/NAME.jinja`
fn read_additional(dir: &Path, sources: &mut BTreeMap<String, String>) -> Result<(), TemplateError> {
    let dir = dir.join("additional_chat_templates");
    let Ok(entries) = std::fs::read_dir(&dir) else {
        return Ok(());
    };
    for entry in entries.flatten() {
        let path = entry.path();
        let is_template = path.extension().is_some_and(|extension| extension == "jinja");
        if let (true, Some(name)) = (is_template, path.file_stem().and_then(|stem| stem.to_str()))
            && let Some(source) = read_text(&path)?
        {
            sources.insert(name.to_owned(), source);
        }
    }
    Ok(())
}

/// `chat_template` as a string, as a list of `{name, template}`, or as an object of name to template.
fn named_templates(path: &Path, given: &Json) -> Result<BTreeMap<String, String>, TemplateError> {
    let wrong = || TemplateError::File {
        path: path.to_owned(),
        message: "chat_template must be a string or a list of {name, template}".to_owned(),
    };
    match given {
        Json::Null => Ok(BTreeMap::new()),
        Json::String(source) => Ok(BTreeMap::from([(DEFAULT.to_owned(), source.clone())])),
        Json::Array(items) => items
            .iter()
            .map(|item| {
                let text = |key: &str| item.get(key).and_then(Json::as_str).map(str::to_owned);
                text("name").zip(text("template")).ok_or_else(wrong)
            })
            .collect(),
        Json::Object(map) => map
            .iter()
            .map(|(name, source)| {
                source
                    .as_str()
                    .map(|source| (name.clone(), source.to_owned()))
                    .ok_or_else(wrong)
            })
            .collect(),
        _ => Err(wrong()),
    }
}

/// The file's text, or `None` if there is no such file.
fn read_text(path: &Path) -> Result<Option<String>, TemplateError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(TemplateError::File {
            path: path.to_owned(),
            message: error.to_string(),
        }),
    }
}

fn read_json(path: &Path) -> Result<Option<Json>, TemplateError> {
    let Some(text) = read_text(path)? else {
        return Ok(None);
    };
    serde_json::from_str(&text)
        .map(Some)
        .map_err(|error| TemplateError::File {
            path: path.to_owned(),
            message: error.to_string(),
        })
}

//! What a model's directory says about ending and sampling.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use thiserror::Error;

/// A file of a model's directory cannot be used.
#[derive(Debug, Error)]
#[error("{}: {problem}", path.display())]
pub struct LoadError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong, naming the key where there is one.
    pub problem: String,
}

impl LoadError {
    pub(super) fn new(path: &Path, problem: impl ToString) -> Self {
        Self {
            path: path.to_owned(),
            problem: problem.to_string(),
        }
    }
}

/// End-of-sequence ids and default sampling, as the model's authors have set them.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationDefaults {
    /// From generation_config.json's `eos_token_id` (a number or a list), else config.json's, without repeats.
    pub eos_token_ids: Vec<u32>,
    /// 0..=2. An explicit `"do_sample": false` without a temperature means 0.
    pub temperature: Option<f32>,
    /// Above 0, at most 1.
    pub top_p: Option<f32>,
    /// 0 keeps all.
    pub top_k: Option<usize>,
    /// 0..=1.
    pub min_p: Option<f32>,
    /// Above 0.
    pub repetition_penalty: Option<f32>,
}

impl GenerationDefaults {
    /// Reads `generation_config.json` (may be missing) and `config.json` (may not).
    ///
    /// # Errors
    /// A file that is unreadable or no JSON object, a value of the wrong kind or out of range.
    pub fn load(dir: &Path) -> Result<Self, LoadError> {
        let config_path = dir.join("config.json");
        let Some(config) = read_object(&config_path)? else {
            return Err(LoadError::new(&config_path, "there is no such file"));
        };
        let path = dir.join("generation_config.json");
        let generation = read_object(&path)?.unwrap_or_default();
        let mut eos = eos_ids(&path, &generation)?;
        if eos.is_empty() {
            eos = eos_ids(&config_path, &config)?;
        }
        if eos.is_empty()
            && let Some(Value::Object(text)) = config.get("text_config")
        {
            eos = eos_ids(&config_path, text)?;
        }
        let number = |key: &str, fits: fn(f64) -> bool| match generation.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(v) => match v.as_f64().filter(|x| fits(*x)) {
                #[allow(clippy::cast_possible_truncation)] // single precision is what is computed with
                Some(x) => Ok(Some(x as f32)),
                None => Err(LoadError::new(&path, format!("{key}: {v} is no possible value"))),
            },
        };
        let mut temperature = number("temperature", |x| (0.0..=100.0).contains(&x))?;
        if temperature.is_none() && generation.get("do_sample") == Some(&Value::Bool(false)) {
            temperature = Some(0.0);
        }
        let top_k = match generation.get("top_k") {
            None | Some(Value::Null) => None,
            Some(v) => match v.as_i64() {
                Some(k) => Some(usize::try_from(k).unwrap_or(0)),
                None => return Err(LoadError::new(&path, format!("top_k: {v} is no whole number"))),
            },
        };
        Ok(Self {
            eos_token_ids: eos,
            temperature,
            top_p: number("top_p", |x| (0.000_001..=1.0).contains(&x))?,
            top_k,
            min_p: number("min_p", |x| (0.0..=1.0).contains(&x))?,
            repetition_penalty: number("repetition_penalty", |x| (0.01..=10.0).contains(&x))?,
        })
    }
}

fn eos_ids(path: &Path, map: &Map<String, Value>) -> Result<Vec<u32>, LoadError> {
    let id = |v: &Value| {
        v.as_u64()
            .and_then(|id| u32::try_from(id).ok())
            .ok_or_else(|| LoadError::new(path, format!("eos_token_id: {v} is no token id")))
    };
    let mut ids = Vec::new();
    match map.get("eos_token_id") {
        None | Some(Value::Null) => {}
        Some(Value::Array(items)) => {
            for item in items {
                let id = id(item)?;
                if !ids.contains(&id) {
                    ids.push(id);
                }
            }
        }
        Some(one) => ids.push(id(one)?),
    }
    Ok(ids)
}

/// A JSON object from a file; `None` when there is no such file.
pub(super) fn read_object(path: &Path) -> Result<Option<Map<String, Value>>, LoadError> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(LoadError::new(path, e)),
    };
    match serde_json::from_slice(&bytes) {
        Ok(Value::Object(map)) => Ok(Some(map)),
        Ok(_) => Err(LoadError::new(path, "not a JSON object")),
        Err(e) => Err(LoadError::new(path, format!("not valid JSON: {e}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(generation: Option<&str>, config: &str) -> Result<GenerationDefaults, LoadError> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), config).unwrap();
        if let Some(text) = generation {
            std::fs::write(dir.path().join("generation_config.json"), text).unwrap();
        }
        GenerationDefaults::load(dir.path())
    }

    #[test]
    fn eos_ids_come_from_the_first_file_that_has_some() {
        let both = load(Some(r#"{"eos_token_id": [3, 4, 3]}"#), r#"{"eos_token_id": 5}"#).unwrap();
        assert_eq!(both.eos_token_ids, [3, 4]);
        assert_eq!(
            load(Some("{}"), r#"{"eos_token_id": 5}"#).unwrap().eos_token_ids,
            [5]
        );
        assert_eq!(
            load(None, r#"{"text_config": {"eos_token_id": [6]}}"#)
                .unwrap()
                .eos_token_ids,
            [6]
        );
        assert!(load(None, "{}").unwrap().eos_token_ids.is_empty());
    }

    #[test]
    fn sampling_defaults_are_read() {
        let text = r#"{"do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.1}"#;
        let defaults = load(Some(text), "{}").unwrap();
        assert_eq!(
            (defaults.temperature, defaults.top_k, defaults.top_p),
            (Some(0.6), Some(20), Some(0.95))
        );
        assert_eq!((defaults.min_p, defaults.repetition_penalty), (None, Some(1.1)));
        assert_eq!(
            load(Some(r#"{"do_sample": false}"#), "{}").unwrap().temperature,
            Some(0.0)
        );
    }

    #[test]
    fn errors_name_file_and_key() {
        for (generation, config, parts) in [
            (Some("{"), "{}", ["generation_config.json", "JSON"]),
            (
                Some(r#"{"top_p": 7}"#),
                "{}",
                ["generation_config.json", "top_p: 7"],
            ),
            (
                Some(r#"{"repetition_penalty": 1e-46}"#),
                "{}",
                ["generation_config.json", "repetition_penalty: 1e-46"],
            ),
            (
                None,
                r#"{"eos_token_id": "x"}"#,
                ["config.json", "eos_token_id: \"x\""],
            ),
            (None, "[]", ["config.json", "object"]),
        ] {
            let message = load(generation, config).unwrap_err().to_string();
            assert!(parts.iter().all(|p| message.contains(p)), "{message}");
        }
        let empty = tempfile::tempdir().unwrap();
        assert!(
            GenerationDefaults::load(empty.path())
                .unwrap_err()
                .to_string()
                .contains("config.json")
        );
    }
}

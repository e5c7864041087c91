//! Prompts that are computed before anybody asks, so that the prefix cache knows them.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::prompt;
use super::service::Service;
use crate::backend::{EngineError, GenerationEvent};

/// Reads a file of message lists, `[[{"role": ..., "content": ...}, ...], ...]`.
///
/// # Errors
/// It cannot be read, or holds something else.
pub fn read_prompts(file: &Path) -> Result<Vec<Value>> {
    let text = std::fs::read_to_string(file).with_context(|| format!("--warm-prompts {}", file.display()))?;
    let lists: Vec<Vec<Value>> = serde_json::from_str(&text).with_context(|| {
        format!(
            "--warm-prompts {}: not a list of lists of messages",
            file.display()
        )
    })?;
    Ok(lists.into_iter().map(Value::Array).collect())
}

/// Computes each of them, one after the other, as a chat that wants one token. Returns the number of prompt tokens.
///
/// # Errors
/// One that no chat could have sent, or that the engine fails on; the message has its number, from 0.
pub async fn warm(service: &Arc<Service>, prompts: Vec<Value>) -> Result<usize> {
    let mut tokens = 0;
    for (number, messages) in prompts.into_iter().enumerate() {
        let name = || format!("--warm-prompts: list {number}");
        let body = json!({"messages": messages, "max_tokens": 1}).to_string();
        let chat = prompt::chat(service, body.as_bytes())
            .map_err(|error| anyhow::anyhow!(error.message))
            .with_context(name)?;
        tokens += chat.generate.prompt.len();
        let mut generation = service.backend.submit(chat.generate).with_context(name)?;
        loop {
            match generation.events.recv().await {
                Some(GenerationEvent::Finished { .. }) => break,
                Some(GenerationEvent::Failed(error)) => return Err(error).with_context(name),
                Some(_) => {}
                None => bail!(EngineError::Dead(service.dead().await)),
            }
        }
    }
    Ok(tokens)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_none_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("prompts.json");
        let error = |text: Option<&str>| {
            if let Some(text) = text {
                std::fs::write(&file, text).unwrap();
            }
            format!("{:#}", read_prompts(&file).unwrap_err())
        };
        assert!(error(None).contains("prompts.json"));
        assert!(error(Some("{}")).contains("not a list of lists of messages"));
        std::fs::write(&file, r#"[[{"role": "user", "content": "Hi"}], []]"#).unwrap();
        assert_eq!(read_prompts(&file).unwrap().len(), 2);
    }
}

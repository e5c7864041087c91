//! Prompts that are computed before anybody asks, so that the prefix cache knows them.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use tokio::time::timeout;

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

/// Time between two looks at how far a long one is.
const LOOK: Duration = Duration::from_secs(1);

/// Computes each of them, one after the other, as a chat that wants one token. Returns the number of prompt tokens.
/// `progress` hears how many of how many are computed, after each prompt and within long ones.
///
/// # Errors
/// One that no chat could have sent, or that the engine fails on; the message has its number, from 0.
pub async fn warm(
    service: &Arc<Service>,
    prompts: Vec<Value>,
    mut progress: impl FnMut(u64, u64),
) -> Result<usize> {
    let name = |number: usize| format!("--warm-prompts: list {number}");
    let mut requests = Vec::with_capacity(prompts.len());
    for (number, messages) in prompts.into_iter().enumerate() {
        let body = json!({"messages": messages, "max_tokens": 1}).to_string();
        let chat = prompt::chat(service, body.as_bytes())
            .map_err(|error| anyhow::anyhow!(error.message))
            .with_context(|| name(number))?;
        requests.push(chat.generate);
    }
    let tokens = requests.iter().map(|request| request.prompt.len()).sum();
    let (mut done, total) = (0, tokens as u64);
    progress(done, total);
    for (number, request) in requests.into_iter().enumerate() {
        let name = || name(number);
        let length = request.prompt.len() as u64;
        let before = service.backend.stats().prefill_tokens;
        let mut told = 0;
        let mut generation = service.backend.submit(request).with_context(name)?;
        loop {
            let Ok(event) = timeout(LOOK, generation.events.recv()).await else {
                let computed = service.backend.stats().prefill_tokens.saturating_sub(before);
                if computed > told {
                    told = computed;
                    progress(done + computed.min(length), total);
                }
                continue;
            };
            match event {
                Some(GenerationEvent::Finished { .. }) => break,
                Some(GenerationEvent::Failed(error)) => return Err(error).with_context(name),
                Some(_) => {}
                None => bail!(EngineError::Dead(service.dead().await)),
            }
        }
        done += length;
        progress(done, total);
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

//! tokenizer.json, loaded once and shared by all requests.

use std::path::Path;
use std::sync::Arc;

use serde_json::Value;
use thiserror::Error;
use tokenizers::{DecoderWrapper, Tokenizer};

use super::config::{LoadError, read_object};
use super::detokenizer::{ByteTable, Detokenizer};

/// A model's tokenizer. Cheap to clone.
#[derive(Debug, Clone)]
pub struct TextTokenizer {
    pub(super) shared: Arc<Shared>,
}

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) tokenizer: Tokenizer,
    /// Each token's bytes, where the decoder is the byte-level one; then text needs no decoder at all.
    pub(super) bytes: Option<ByteTable>,
    bos: Option<u32>,
    eos: Option<u32>,
    /// One more than the highest id.
    id_limit: usize,
}

/// The tokenizer could not do its work.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("the tokenizer failed: {0}")]
pub struct TextError(pub String);

impl TextTokenizer {
    /// Loads `tokenizer.json`, and the names of the first and last token of a sequence from `tokenizer_config.json`
    /// (else `special_tokens_map.json`), where they may be strings or objects.
    ///
    /// # Errors
    /// A missing or malformed file.
    pub fn load(dir: &Path) -> Result<Self, LoadError> {
        let path = dir.join("tokenizer.json");
        let bytes = std::fs::read(&path).map_err(|e| LoadError::new(&path, e))?;
        let tokenizer = Tokenizer::from_bytes(&bytes).map_err(|e| LoadError::new(&path, e))?;
        let mut names = [None, None];
        for file in ["tokenizer_config.json", "special_tokens_map.json"] {
            if let Some(map) = read_object(&dir.join(file))? {
                for (name, key) in names.iter_mut().zip(["bos_token", "eos_token"]) {
                    let found = match map.get(key) {
                        Some(Value::String(text)) => Some(text.clone()),
                        Some(other) => other.get("content").and_then(Value::as_str).map(str::to_owned),
                        None => None,
                    };
                    *name = name.take().or(found);
                }
            }
        }
        let [bos, eos] = names;
        Self::new(tokenizer, bos.as_deref(), eos.as_deref()).map_err(|e| LoadError::new(&path, e.0))
    }

    /// Takes a tokenizer as it is, but for truncation and padding, which are turned off: a file that was saved with
    /// them would cut prompts in silence.
    ///
    /// # Errors
    /// None in practice: turning truncation off cannot fail.
    pub fn new(mut tokenizer: Tokenizer, bos: Option<&str>, eos: Option<&str>) -> Result<Self, TextError> {
        tokenizer
            .with_truncation(None)
            .map_err(|e| TextError(e.to_string()))?;
        tokenizer.with_padding(None);
        let vocabulary = tokenizer.get_vocab(true);
        let id_limit = vocabulary.values().max().map_or(0, |id| *id as usize + 1);
        let bytes = matches!(tokenizer.get_decoder(), Some(DecoderWrapper::ByteLevel(_)))
            .then(|| ByteTable::new(&vocabulary, id_limit, &tokenizer.get_added_tokens_decoder()));
        let id = |name: Option<&str>| name.and_then(|name| tokenizer.token_to_id(name));
        let (bos, eos) = (id(bos), id(eos));
        Ok(Self {
            shared: Arc::new(Shared {
                tokenizer,
                bytes,
                bos,
                eos,
                id_limit,
            }),
        })
    }

    /// The ids of a text. With `special`, as the tokenizer surrounds a whole sequence (a beginning-of-sequence token,
    /// for models that have one); never twice, should the text itself begin with it.
    ///
    /// # Errors
    /// [`TextError`] from the tokenizer; no known input leads to one.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, TextError> {
        let encoding = self
            .shared
            .tokenizer
            .encode_fast(text, special)
            .map_err(|e| TextError(e.to_string()))?;
        let ids = encoding.get_ids();
        let doubled = match (ids, self.shared.bos) {
            ([first, second, ..], Some(bos)) => special && *first == bos && *second == bos,
            _ => false,
        };
        Ok(ids.get(usize::from(doubled)..).unwrap_or_default().to_vec())
    }

    /// The text of a list of ids, special tokens left out.
    ///
    /// # Errors
    /// [`TextError`] from the decoder.
    pub fn decode(&self, ids: &[u32]) -> Result<String, TextError> {
        self.shared
            .tokenizer
            .decode(ids, true)
            .map_err(|e| TextError(e.to_string()))
    }

    /// A detokeniser for one reply.
    #[must_use]
    pub fn detokenizer(&self) -> Detokenizer {
        Detokenizer::new(Arc::clone(&self.shared))
    }

    /// One token's bytes, special ones by name; for log-probabilities.
    #[must_use]
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        if let Some(bytes) = self.shared.bytes.as_ref().and_then(|table| table.any(id)) {
            return bytes.to_vec();
        }
        self.shared
            .tokenizer
            .decode(&[id], false)
            .unwrap_or_default()
            .into_bytes()
    }

    /// The token that ends a sequence, by the tokenizer's own account.
    #[must_use]
    pub fn eos(&self) -> Option<u32> {
        self.shared.eos
    }

    /// The id of a token by its exact text.
    #[must_use]
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.shared.tokenizer.token_to_id(token)
    }

    /// One more than the highest id. Models often have more rows.
    #[must_use]
    pub fn id_limit(&self) -> usize {
        self.shared.id_limit
    }
}

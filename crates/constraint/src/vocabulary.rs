//! The bytes of all tokens as a tree, built once for a model.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{ParserFactory, token_bytes_from_tokenizer_json};
use serde_json::Value;

/// What a token stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Token<'a> {
    /// These bytes of text, not always whole characters.
    Text(&'a [u8]),
    /// No text: markup such as an end of turn. No text leads to it; a grammar can ask for it by name.
    Special(&'a [u8]),
    /// Nothing: an id that the tokenizer does not know.
    Absent,
}

/// The tree cannot be built.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the vocabulary cannot be used for constrained decoding: {0}")]
pub struct VocabularyError(String);

/// Longest token in the tree; the library holds no longer ones. Longer ones exist in vocabularies as runs of white space, and
/// are not offered.
const LONGEST: usize = 1000;

/// Most states of one constraint's lexer: what bounds its memory, at one to two kilobytes each. The library's own limit would
/// be five times as many.
const MOST_STATES: usize = 50_000;

/// A model's vocabulary, ready to compile constraints for.
pub struct Grammars {
    pub(crate) factory: ParserFactory,
    pub(crate) facts: Arc<Facts>,
}

/// What a walk has to know of the vocabulary.
#[derive(Debug)]
pub(crate) struct Facts {
    /// Tokens, without [`Self::end`].
    pub(crate) count: usize,
    /// The id that stands for any end of the reply: one more than the last token. Which tokens end a reply is a
    /// request's own business, and a grammar knows only this one.
    pub(crate) end: u32,
    /// Tokens of nothing but line breaks.
    pub(crate) breaks: Vec<u32>,
}

impl Grammars {
    /// From all tokens, by id.
    ///
    /// # Errors
    /// The library refuses the vocabulary: no tokens, too many, or too much text.
    pub fn new<'a>(tokens: impl IntoIterator<Item = Token<'a>>) -> Result<Self, VocabularyError> {
        Self::from_words(tokens.into_iter().map(word).collect())
    }

    /// From a `tokenizer.json`, with as many tokens as a model has rows: for vocabularies that write a space as another character and
    /// the bytes without a token as `<0xFF>`.
    ///
    /// # Errors
    /// As [`Self::new`]; and a decoder that is neither of this kind nor byte-level.
    pub fn from_tokenizer_json(json: &Value, rows: usize) -> Result<Self, VocabularyError> {
        // It panics at what it does not expect.
        let mut words = catch_unwind(AssertUnwindSafe(|| token_bytes_from_tokenizer_json(json)))
            .map_err(|_| VocabularyError("its tokens are not of the kind that its decoder says".to_owned()))?
            .map_err(|error| VocabularyError(error.to_string()))?;
        words.resize(rows, Vec::new());
        for word in words.iter_mut().filter(|word| word.len() > LONGEST) {
            word.clear();
        }
        Self::from_words(words)
    }

    fn from_words(mut words: Vec<Vec<u8>>) -> Result<Self, VocabularyError> {
        let breaks = (0..)
            .zip(&words)
            .filter(|(_, bytes)| !bytes.is_empty() && bytes.iter().all(|byte| matches!(byte, b'\n' | b'\r')))
            .map(|(id, _)| id)
            .collect();
        let count = words.len();
        let end = u32::try_from(count)
            .ok()
            // The tree has 24 bits for an id.
            .filter(|end| (1..(1 << 24) - 1).contains(end))
            .ok_or_else(|| VocabularyError(format!("it has {count} tokens")))?;
        // A name with spaces: no grammar can ask for it.
        words.push(word(Token::Special(b"<the end of the reply>")));
        let build = || {
            let trie = TokTrie::from(&TokRxInfo::new(end + 1, end), &words);
            let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
            ParserFactory::new_simple(&environment)
        };
        let mut factory = catch_unwind(AssertUnwindSafe(build))
            .map_err(|_| VocabularyError("the library gave up on it".to_owned()))?
            .map_err(|error| VocabularyError(error.to_string()))?;
        factory.quiet();
        let limits = factory.limits_mut();
        limits.max_lexer_states = MOST_STATES;
        limits.verbose_errors = false;
        let facts = Arc::new(Facts { count, end, breaks });
        Ok(Self { factory, facts })
    }
}

impl fmt::Debug for Grammars {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammars")
            .field("tokens", &self.facts.count)
            .finish_non_exhaustive()
    }
}

/// A token as the library's tree wants it: special ones behind a byte that no text has.
fn word(token: Token<'_>) -> Vec<u8> {
    match token {
        Token::Text(bytes) if bytes.len() <= LONGEST => bytes.to_vec(),
        Token::Special(bytes) if bytes.len() <= LONGEST => [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes].concat(),
        _ => Vec::new(),
    }
}

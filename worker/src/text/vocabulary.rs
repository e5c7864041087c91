//! A tokenizer's tokens as constrained decoding wants them.

use constraint::{Grammars, Token, VocabularyError};

use super::tokenizer::TextTokenizer;

impl TextTokenizer {
    /// The vocabulary of a model with that many rows, ready to compile constraints for. Takes some hundred milliseconds for a large
    /// one, and as much memory as its text several times over.
    ///
    /// # Errors
    /// A kind of tokenizer whose tokens' bytes are not known.
    pub fn grammars(&self, rows: usize) -> Result<Grammars, VocabularyError> {
        let Some(table) = &self.shared.bytes else {
            let json = serde_json::to_value(&self.shared.tokenizer).unwrap_or_default();
            return Grammars::from_tokenizer_json(&json, rows);
        };
        let tokens = (0..u32::try_from(rows).unwrap_or(u32::MAX)).map(|id| match table.any(id) {
            None | Some([]) => Token::Absent,
            Some(bytes) if table.is_special(id) => Token::Special(bytes),
            Some(bytes) => Token::Text(bytes),
        });
        Grammars::new(tokens)
    }
}

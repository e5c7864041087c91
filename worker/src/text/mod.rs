//! Text to token ids and back, and what a model's directory says about both.
//!
//! | module        | idea                                                                       |
//! |---------------|----------------------------------------------------------------------------|
//! | `tokenizer`   | tokenizer.json, loaded once and shared                                     |
//! | `detokenizer` | ids to text as they come, never half a character                           |
//! | `vocabulary`  | all tokens' bytes, for constrained decoding                                |
//! | `config`      | generation_config.json and its relatives: end-of-sequence ids, sampling    |

mod config;
mod detokenizer;
mod tokenizer;
mod vocabulary;

pub use config::{GenerationDefaults, LoadError};
pub use detokenizer::Detokenizer;
pub use tokenizer::{TextError, TextTokenizer};

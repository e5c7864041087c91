//! Ids to text as they come: what is emitted, put together, is what decoding all ids at once gives.

use std::collections::HashMap;
use std::sync::Arc;

use tokenizers::AddedToken;

use super::tokenizer::Shared;

/// Bytes of every token of a byte-level vocabulary.
///
/// Such a vocabulary writes each byte as one printable character: printable Latin-1 as itself, the other 68 from
/// U+0100 on (GPT-2's `bytes_to_unicode`). A token with any other character is its own text, as in `tokenizers`.
#[derive(Debug)]
pub(super) struct ByteTable {
    /// All tokens' bytes, one after the other.
    bytes: Vec<u8>,
    /// Token `id` is at `starts[id]..starts[id + 1]`.
    starts: Vec<u32>,
    special: Vec<bool>,
}

impl ByteTable {
    pub(super) fn new<S1: std::hash::BuildHasher, S2: std::hash::BuildHasher>(
        vocabulary: &HashMap<String, u32, S1>,
        id_limit: usize,
        added: &HashMap<u32, AddedToken, S2>,
    ) -> Self {
        let bytes_of_char = bytes_of_char();
        let mut texts: Vec<&str> = vec![""; id_limit];
        for (text, id) in vocabulary {
            if let Some(slot) = texts.get_mut(*id as usize) {
                *slot = text;
            }
        }
        let mut special = vec![false; id_limit];
        for (id, token) in added {
            if let Some(slot) = texts.get_mut(*id as usize) {
                *slot = &token.content;
            }
            if let Some(slot) = special.get_mut(*id as usize) {
                *slot = token.special;
            }
        }
        let mut bytes = Vec::new();
        let mut starts = Vec::with_capacity(id_limit + 1);
        for text in texts {
            starts.push(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
            let start = bytes.len();
            for c in text.chars() {
                if let Some(byte) = bytes_of_char.get(&c) {
                    bytes.push(*byte);
                } else {
                    bytes.truncate(start);
                    bytes.extend_from_slice(text.as_bytes());
                    break;
                }
            }
        }
        starts.push(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
        Self {
            bytes,
            starts,
            special,
        }
    }

    /// A token's bytes.
    pub(super) fn any(&self, id: u32) -> Option<&[u8]> {
        let id = id as usize;
        let range = *self.starts.get(id)? as usize..*self.starts.get(id + 1)? as usize;
        self.bytes.get(range)
    }

    /// Text does not show it.
    pub(super) fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).copied().unwrap_or(true)
    }

    /// A token's bytes as text shows them: none for special tokens and ids that are not in the vocabulary.
    fn visible(&self, id: u32) -> &[u8] {
        match self.special.get(id as usize) {
            Some(false) => self.any(id).unwrap_or_default(),
            _ => &[],
        }
    }
}

/// GPT-2's table, inverted.
fn bytes_of_char() -> HashMap<char, u8> {
    let mut table = HashMap::with_capacity(256);
    let mut next = 0x100_u32;
    for byte in 0..=u8::MAX {
        let printable = matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
        let c = if printable {
            char::from(byte)
        } else {
            let c = char::from_u32(next).unwrap_or('\u{fffd}');
            next += 1;
            c
        };
        table.insert(c, byte);
    }
    table
}

/// The text of one reply, token by token. Special tokens give none.
#[derive(Debug)]
pub struct Detokenizer {
    shared: Arc<Shared>,
    /// Byte-level: the bytes of a character that is not complete yet, at most 3.
    pending: Vec<u8>,
    /// Otherwise: the ids from `prefix` on are decoded anew for each token; what lies before `read` has been emitted.
    /// The ids between them give the decoder its left context (a leading space, for instance).
    ids: Vec<u32>,
    read: usize,
}

/// Tokens that one unfinished character can have at most, and a few more. Beyond that, a replacement character at the
/// end is what the model wrote.
const LONGEST_HOLD: usize = 8;

impl Detokenizer {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            pending: Vec::new(),
            ids: Vec::new(),
            read: 0,
        }
    }

    /// Takes the next token and appends the text that it completes, if any.
    pub fn push(&mut self, id: u32, out: &mut String) {
        let shared = Arc::clone(&self.shared);
        if let Some(table) = &shared.bytes {
            self.push_bytes(table.visible(id), out);
        } else {
            self.ids.push(id);
            self.emit_window(false, out);
        }
    }

    /// The reply is over: appends what was held back. An unfinished character becomes U+FFFD.
    pub fn finish(&mut self, out: &mut String) {
        if self.shared.bytes.is_some() {
            out.push_str(&String::from_utf8_lossy(&self.pending));
            self.pending.clear();
        } else {
            self.emit_window(true, out);
        }
    }

    fn push_bytes(&mut self, bytes: &[u8], out: &mut String) {
        if self.pending.is_empty()
            && let Ok(text) = std::str::from_utf8(bytes)
        {
            out.push_str(text);
            return;
        }
        self.pending.extend_from_slice(bytes);
        let mut chunks = self.pending.utf8_chunks().peekable();
        let mut kept = 0;
        while let Some(chunk) = chunks.next() {
            out.push_str(chunk.valid());
            let invalid = chunk.invalid();
            if invalid.is_empty() {
                continue;
            }
            // Invalid bytes at the very end may be a character's beginning; elsewhere they never will be.
            if chunks.peek().is_none() && is_unfinished(invalid) {
                kept = invalid.len();
            } else {
                out.push(char::REPLACEMENT_CHARACTER);
            }
        }
        self.pending.drain(..self.pending.len() - kept);
    }

    fn emit_window(&mut self, last: bool, out: &mut String) {
        let decode = |ids: &[u32]| self.shared.tokenizer.decode(ids, true).unwrap_or_default();
        let before = decode(self.ids.get(..self.read).unwrap_or_default());
        let now = decode(&self.ids);
        let held = self.ids.len() - self.read;
        if !last && now.ends_with(char::REPLACEMENT_CHARACTER) && held < LONGEST_HOLD {
            return;
        }
        if let Some(new) = now.strip_prefix(before.as_str()) {
            if new.is_empty() && !last {
                return;
            }
            out.push_str(new);
        } else {
            // The decoder has changed its mind about text that is already out (a run of byte tokens that turned
            // invalid): go on from here with the new tokens' own text.
            out.push_str(&decode(self.ids.get(self.read..).unwrap_or_default()));
        }
        self.ids.drain(..self.read);
        self.read = self.ids.len();
    }
}

/// Whether more bytes could make these a character.
fn is_unfinished(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|e| e.error_len().is_none())
}

#[cfg(test)]
mod tests {
    use super::super::TextTokenizer;
    use proptest::prelude::*;
    use tokenizers::Tokenizer;

    /// A byte-level vocabulary: ids 0..256 are the bytes in GPT-2's order of characters, then a few longer tokens.
    fn byte_level() -> TextTokenizer {
        let table = super::bytes_of_char();
        let mut vocab = serde_json::Map::new();
        for (c, byte) in &table {
            vocab.insert(c.to_string(), (*byte).into());
        }
        for (i, token) in ["Ġthe", "Ã©", "ðŁ", "¦Ģ"].iter().enumerate() {
            vocab.insert((*token).to_owned(), (256 + i).into());
        }
        let added = |id: u32, content: &str, special: bool| {
            serde_json::json!({"id": id, "content": content, "single_word": false, "lstrip": false,
                               "rstrip": false, "normalized": false, "special": special})
        };
        let json = serde_json::json!({
            "version": "1.0", "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
            "padding": null, "normalizer": null, "post_processor": null,
            "added_tokens": [added(260, "<|end|>", true), added(261, "<tool_call>", false), added(262, "<｜x▁y｜>", false)],
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "vocab": vocab, "merges": []},
        });
        TextTokenizer::new(
            Tokenizer::from_bytes(json.to_string()).unwrap(),
            None,
            Some("<|end|>"),
        )
        .unwrap()
    }

    /// Sentencepiece's manner: a prefix space, byte fallback.
    fn byte_fallback() -> TextTokenizer {
        let mut vocab = serde_json::Map::new();
        for (i, token) in ["<unk>", "▁", "a", "b", "▁a", "é"].iter().enumerate() {
            vocab.insert((*token).to_owned(), i.into());
        }
        for byte in 0..=255_u32 {
            vocab.insert(format!("<0x{byte:02X}>"), (6 + byte).into());
        }
        let json = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
            "pre_tokenizer": null, "post_processor": null,
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "BPE", "vocab": vocab, "merges": [["▁", "a"]], "byte_fallback": true, "unk_token": "<unk>"},
        });
        TextTokenizer::new(Tokenizer::from_bytes(json.to_string()).unwrap(), None, None).unwrap()
    }

    fn stream(tokenizer: &TextTokenizer, ids: &[u32]) -> Vec<String> {
        let mut detokenizer = tokenizer.detokenizer();
        let mut pieces: Vec<String> = ids
            .iter()
            .map(|id| {
                let mut piece = String::new();
                detokenizer.push(*id, &mut piece);
                piece
            })
            .collect();
        let mut last = String::new();
        detokenizer.finish(&mut last);
        pieces.push(last);
        pieces
    }

    #[test]
    fn a_character_is_held_back_until_it_is_whole() {
        let tokenizer = byte_level();
        assert_eq!(
            stream(&tokenizer, &[256, 258, 259, 0x21]),
            [" the", "", "🦀", "!", ""]
        );
        assert_eq!(stream(&tokenizer, &[0xc3, 0xa9, 0xc3]), ["", "é", "", "\u{fffd}"]);
        assert_eq!(stream(&tokenizer, &[0xc3, 0x41]), ["", "\u{fffd}A", ""]);
    }

    #[test]
    fn special_tokens_are_left_out_and_added_ones_kept() {
        let tokenizer = byte_level();
        assert_eq!(
            stream(&tokenizer, &[0x41, 260, 261, 262]).concat(),
            "A<tool_call><｜x▁y｜>"
        );
        assert_eq!(tokenizer.token_bytes(260), b"<|end|>");
        assert_eq!(tokenizer.eos(), Some(260));
        assert_eq!(tokenizer.id_limit(), 263);
        assert_eq!(
            stream(&tokenizer, &[9999, 0x41]).concat(),
            "A",
            "an id without a token gives no text"
        );
    }

    #[test]
    fn truncation_in_the_file_is_turned_off() {
        let tokenizer = byte_level();
        let ids = tokenizer.encode("hello <tool_call> world", false).unwrap();
        assert_eq!(tokenizer.decode(&ids).unwrap(), "hello <tool_call> world");
    }

    #[test]
    fn prefix_spaces_come_out_right() {
        let tokenizer = byte_fallback();
        assert_eq!(stream(&tokenizer, &[4, 4, 3]), ["a", " a", "b", ""]);
        let crab: Vec<u32> = "🦀".bytes().map(|b| 6 + u32::from(b)).collect();
        let mut ids = vec![4];
        ids.extend(&crab);
        ids.push(4);
        assert_eq!(stream(&tokenizer, &ids), ["a", "", "", "", "🦀", " a", ""]);
        assert_eq!(stream(&tokenizer, &crab[..2]).concat(), "\u{fffd}\u{fffd}");
    }

    proptest! {
        #[test]
        fn byte_level_stream_equals_decoding_at_once(ids in proptest::collection::vec(0u32..263, 0..60)) {
            let tokenizer = byte_level();
            prop_assert_eq!(stream(&tokenizer, &ids).concat(), tokenizer.decode(&ids).unwrap());
        }

        #[test]
        fn byte_fallback_stream_equals_decoding_at_once(text in "[ab é🦀漢 ]{0,40}") {
            let tokenizer = byte_fallback();
            let ids = tokenizer.encode(&text, false).unwrap();
            prop_assert_eq!(stream(&tokenizer, &ids).concat(), tokenizer.decode(&ids).unwrap());
        }
    }
}

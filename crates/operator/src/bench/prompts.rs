//! Synthetic conversations: English words in an order that no cache has seen, as many as a tokenizer makes the wanted
//! number of tokens of.

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::options::{Api, Options};

/// Common words; a tokenizer has most of them whole.
const WORDS: [&str; 48] = [
    "the", "time", "water", "people", "day", "house", "work", "place", "year", "hand", "part", "world",
    "life", "name", "side", "line", "light", "point", "city", "story", "night", "door", "table", "river",
    "paper", "group", "music", "field", "money", "book", "room", "land", "tree", "sea", "air", "food", "car",
    "road", "voice", "morning", "long", "small", "early", "white", "open", "over", "under", "with",
];

/// Tokens of a prompt as a function of its words: measured by asking the server for two prompts.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Calibration {
    /// What a template adds.
    pub overhead: f64,
    /// Tokens of a word with the space before it.
    pub tokens_per_word: f64,
    /// Whether a server said so; otherwise a guess, because it does not report usage.
    pub measured: bool,
}

impl Default for Calibration {
    fn default() -> Self {
        Self {
            overhead: 0.0,
            tokens_per_word: 1.3,
            measured: false,
        }
    }
}

impl Calibration {
    /// Through two points (words, tokens), the first with fewer words.
    #[must_use]
    pub fn through((few, of_few): (usize, u64), (many, of_many): (usize, u64)) -> Self {
        let slope = (of_many as f64 - of_few as f64) / (many as f64 - few as f64);
        if !slope.is_finite() || slope <= 0.0 {
            return Self::default();
        }
        Self {
            overhead: (of_few as f64 - slope * few as f64).max(0.0),
            tokens_per_word: slope,
            measured: true,
        }
    }

    /// Words for a whole prompt of `tokens`, at least one.
    fn prompt(&self, tokens: usize) -> usize {
        self.more((tokens as f64 - self.overhead).max(0.0))
    }

    fn more(&self, tokens: f64) -> usize {
        ((tokens / self.tokens_per_word).round() as usize).max(1)
    }
}

/// `count` words.
pub(super) fn words(random: &mut fastrand::Rng, count: usize) -> String {
    let mut text = String::with_capacity(count * 6);
    for _ in 0..count {
        if !text.is_empty() {
            text.push(' ');
        }
        text.push_str(random.choice(WORDS).unwrap_or_default());
    }
    text
}

/// One person's conversation, as far as it is known before the replies.
#[derive(Debug, Clone, PartialEq)]
pub struct Conversation {
    /// The same in every conversation; may be empty.
    pub shared: String,
    /// What the person says in each turn, and the tokens wanted for the reply.
    pub turns: Vec<(String, usize)>,
}

/// The conversations of a round: the same for the same seed and round.
#[must_use]
pub fn conversations(
    options: &Options,
    seed: u64,
    round: u64,
    count: usize,
    calibration: &Calibration,
) -> Vec<Conversation> {
    // What is shared is shared between rounds too.
    let mut common = fastrand::Rng::with_seed(seed);
    let shared_tokens = options.shared_prefix * options.prompt_tokens.high as f64;
    let all_shared = words(&mut common, calibration.more(shared_tokens));
    let mut random = fastrand::Rng::with_seed(mix(seed, round));
    (0..count)
        .map(|_| {
            let first = calibration.prompt(options.prompt_tokens.draw(&mut random));
            let shared = ((first as f64 * options.shared_prefix) as usize).min(first - 1);
            let turns = (0..options.turns).map(|turn| {
                let count = if turn == 0 {
                    first - shared
                } else {
                    calibration.more(options.prompt_tokens.draw(&mut random) as f64)
                };
                (words(&mut random, count), options.tokens.draw(&mut random))
            });
            let turns = turns.collect();
            let shared = all_shared.split(' ').take(shared).collect::<Vec<_>>().join(" ");
            Conversation { shared, turns }
        })
        .collect()
}

/// Seeds that lie close together give generators that have nothing in common (splitmix64's finaliser).
fn mix(seed: u64, round: u64) -> u64 {
    let mut x = seed ^ round.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A conversation under way: what the next request says.
#[derive(Debug, Clone)]
pub struct History {
    api: Api,
    text: String,
    messages: Vec<Value>,
}

impl History {
    /// Before the first turn.
    #[must_use]
    pub fn new(api: Api, shared: &str) -> Self {
        let mut messages = Vec::new();
        if api == Api::Chat && !shared.is_empty() {
            messages.push(json!({"role": "system", "content": shared}));
        }
        Self {
            api,
            text: shared.to_owned(),
            messages,
        }
    }

    /// The person speaks.
    pub fn ask(&mut self, text: &str) {
        match self.api {
            Api::Chat => self.messages.push(json!({"role": "user", "content": text})),
            Api::Completions => {
                if !self.text.is_empty() {
                    self.text.push(' ');
                }
                self.text.push_str(text);
            }
        }
    }

    /// The model has replied.
    pub fn replied(&mut self, text: &str) {
        match self.api {
            Api::Chat => self.messages.push(json!({"role": "assistant", "content": text})),
            Api::Completions => self.text.push_str(text),
        }
    }

    /// Path of the route, below the endpoint's base.
    #[must_use]
    pub fn path(&self) -> &'static str {
        match self.api {
            Api::Chat => "/v1/chat/completions",
            Api::Completions => "/v1/completions",
        }
    }

    /// A request for the next reply, with `more` fields.
    #[must_use]
    pub fn request(&self, model: &str, max_tokens: usize, more: &Map<String, Value>) -> Map<String, Value> {
        let mut body = Map::new();
        body.insert("model".to_owned(), model.into());
        match self.api {
            Api::Chat => body.insert("messages".to_owned(), self.messages.clone().into()),
            Api::Completions => body.insert("prompt".to_owned(), self.text.clone().into()),
        };
        body.insert("max_tokens".to_owned(), max_tokens.into());
        body.extend(more.clone());
        body
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    fn options(line: &[&str]) -> Options {
        Options::try_parse_from(["mlx-bench", "http://a"].iter().chain(line)).unwrap()
    }

    fn counted(text: &str) -> usize {
        text.split_whitespace().count()
    }

    #[test]
    fn lengths_follow_the_calibration() {
        let calibration = Calibration::through((32, 58), (160, 250));
        assert_eq!((calibration.tokens_per_word, calibration.overhead), (1.5, 10.0));
        let options = options(&[
            "--prompt-tokens",
            "310",
            "--shared-prefix",
            "0.25",
            "--turns",
            "2",
        ]);
        let made = conversations(&options, 5, 0, 3, &calibration);
        for conversation in &made {
            assert_eq!(counted(&conversation.shared), 50);
            assert_eq!(counted(&conversation.turns[0].0), 150);
            assert_eq!(counted(&conversation.turns[1].0), 207);
            assert_eq!(conversation.shared, made[0].shared);
        }
        assert_ne!(made[0].turns[0], made[1].turns[0]);
        assert_eq!(made, conversations(&options, 5, 0, 3, &calibration));
        let later = conversations(&options, 5, 1, 3, &calibration);
        assert_eq!(made[0].shared, later[0].shared);
        assert_ne!(made[0].turns, later[0].turns);
    }

    #[test]
    fn a_server_that_counts_nonsense_is_not_believed() {
        assert!(!Calibration::through((32, 50), (160, 50)).measured);
    }

    #[test]
    fn a_prompt_always_has_a_word_of_its_own() {
        let options = options(&["--prompt-tokens", "1", "--shared-prefix", "1"]);
        for conversation in conversations(&options, 1, 0, 4, &Calibration::default()) {
            assert_eq!(
                (conversation.shared.as_str(), counted(&conversation.turns[0].0)),
                ("", 1)
            );
        }
    }

    #[test]
    fn histories_grow() {
        let mut chat = History::new(Api::Chat, "be kind");
        chat.ask("one");
        chat.replied("two");
        chat.ask("three");
        let body = chat.request("m", 7, &Map::new());
        let roles: Vec<_> = body["messages"]
            .as_array()
            .unwrap()
            .iter()
            .map(|m| &m["role"])
            .collect();
        assert_eq!(roles, ["system", "user", "assistant", "user"]);
        let mut plain = History::new(Api::Completions, "be kind");
        plain.ask("one");
        plain.replied(" two");
        plain.ask("three");
        assert_eq!(
            plain.request("m", 7, &Map::new())["prompt"],
            "be kind one two three"
        );
    }
}

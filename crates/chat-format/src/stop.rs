//! Stop strings: cut the output at the first one, without ever showing a part of it.

/// Watches a text stream for stop strings.
///
/// Text that may turn out to be the start of a stop string is held back until it is decided, so [`Self::push`] emits
/// everything before the stop and nothing of it. Which stop ends the stream is decided byte by byte: the one that is
/// complete first, and of several complete at the same byte the longest. Where the text was cut into pieces makes no
/// difference. Each byte is looked at once per stop string (Knuth, Morris, Pratt).
#[derive(Debug, Clone, Default)]
pub struct StopMatcher {
    stops: Vec<Automaton>,
    /// The longest partial match: the tail of the input that has not been emitted.
    held: String,
    matched: Option<usize>,
}

/// One stop string with its failure table and how much of it the text's tail matches.
#[derive(Debug, Clone)]
struct Automaton {
    index: usize,
    stop: String,
    /// `fallback[n]`: length of the longest proper border of the first `n + 1` bytes.
    fallback: Vec<usize>,
    state: usize,
}

impl Automaton {
    fn new(index: usize, stop: String) -> Self {
        let bytes = stop.as_bytes();
        let mut fallback = vec![0; bytes.len()];
        let mut border = 0;
        for at in 1..bytes.len() {
            while border > 0 && bytes.get(at) != bytes.get(border) {
                border = fallback.get(border - 1).copied().unwrap_or(0);
            }
            if bytes.get(at) == bytes.get(border) {
                border += 1;
            }
            if let Some(slot) = fallback.get_mut(at) {
                *slot = border;
            }
        }
        Self {
            index,
            stop,
            fallback,
            state: 0,
        }
    }

    /// Takes one byte; true when the stop string is complete.
    fn step(&mut self, byte: u8) -> bool {
        while self.state > 0 && self.stop.as_bytes().get(self.state) != Some(&byte) {
            self.state = self.fallback.get(self.state - 1).copied().unwrap_or(0);
        }
        if self.stop.as_bytes().get(self.state) == Some(&byte) {
            self.state += 1;
        }
        self.state == self.stop.len()
    }
}

impl StopMatcher {
    /// A matcher for these stop strings; empty ones are ignored.
    pub fn new<S: Into<String>>(stops: impl IntoIterator<Item = S>) -> Self {
        let stops = stops.into_iter().map(Into::into).enumerate();
        let stops = stops
            .filter(|(_, stop)| !stop.is_empty())
            .map(|(index, stop)| Automaton::new(index, stop))
            .collect();
        Self {
            stops,
            held: String::new(),
            matched: None,
        }
    }

    /// Takes the next piece of text and appends what may be shown to `out`. Returns the index (in the list given to
    /// [`Self::new`]) of the stop string that has ended the stream; everything pushed after that is swallowed.
    pub fn push(&mut self, text: &str, out: &mut String) -> Option<usize> {
        if self.matched.is_some() {
            return self.matched;
        }
        if self.stops.is_empty() {
            out.push_str(text);
            return None;
        }
        for (at, byte) in text.bytes().enumerate() {
            let mut hit: Option<(usize, usize)> = None;
            for automaton in &mut self.stops {
                if automaton.step(byte) && hit.is_none_or(|(_, length)| automaton.stop.len() > length) {
                    hit = Some((automaton.index, automaton.stop.len()));
                }
            }
            if let Some((index, length)) = hit {
                self.held.push_str(text.get(..=at).unwrap_or_default());
                let shown = self.held.len().saturating_sub(length);
                out.push_str(self.held.get(..shown).unwrap_or_default());
                self.held.clear();
                self.matched = Some(index);
                return self.matched;
            }
        }
        self.held.push_str(text);
        let partial = self
            .stops
            .iter()
            .map(|automaton| automaton.state)
            .max()
            .unwrap_or(0);
        let shown = self.held.len().saturating_sub(partial);
        out.push_str(self.held.get(..shown).unwrap_or_default());
        self.held.drain(..shown);
        None
    }

    /// The stream has ended otherwise: appends what was still held back.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
    }

    /// The stop string that has ended the stream.
    pub fn matched(&self) -> Option<&str> {
        let index = self.matched?;
        self.stops
            .iter()
            .find(|automaton| automaton.index == index)
            .map(|automaton| automaton.stop.as_str())
    }
}

//! Tool calls in Hermes markup: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.

use std::sync::Arc;

use super::call::Call;
use super::delta::{CallOutcome, Delta, EndReason, MalformedReason, push_text};
use super::lenient::{Lenient, Step};
use super::tools::ToolSet;
use super::{Delivery, OutputConfig};

pub(crate) const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// Outside of calls.
    Text,
    /// Inside the tag, before, between or after objects.
    Between { objects: usize },
    /// Inside a call object. `bare`: without tags around it.
    Object { bare: bool, objects: usize },
    /// Inside the tag, after something that is no call.
    Broken(MalformedReason),
}

/// The incremental parser. Its result does not depend on how the text is cut into pieces.
#[derive(Debug)]
pub(crate) struct HermesParser {
    tools: Arc<ToolSet>,
    call_id_prefix: String,
    delivery: Delivery,
    mode: Mode,
    /// White space of the text that is only shown if more text follows: around calls it is layout.
    space: String,
    /// The start of what may become a tag.
    tag: String,
    /// The raw text of the current tag, as far as it is not settled.
    raw: String,
    reader: Lenient,
    call: Call,
    /// Whether the current call has been announced.
    begun: bool,
    next_index: usize,
    /// Nothing but white space so far: JSON that begins here may be a call without tags.
    at_start: bool,
    /// A call's tag was taken as closed although it was not: its closing tag may still come.
    swallow_close: bool,
}

impl HermesParser {
    pub(crate) fn new(config: &OutputConfig) -> Self {
        Self {
            tools: Arc::clone(&config.tools),
            call_id_prefix: config.call_id_prefix.clone(),
            delivery: config.delivery,
            mode: Mode::Text,
            space: String::new(),
            tag: String::new(),
            raw: String::new(),
            reader: Lenient::default(),
            call: Call::new(Arc::clone(&config.tools)),
            begun: false,
            next_index: 0,
            at_start: true,
            swallow_close: false,
        }
    }

    pub(crate) fn push(&mut self, text: &str, out: &mut Vec<Delta>) {
        for c in text.chars() {
            self.take(c, out);
        }
        self.show(out);
    }

    pub(crate) fn finish(&mut self, reason: EndReason, out: &mut Vec<Delta>) {
        if let Mode::Object { bare: true, .. } = self.mode {
            self.not_a_bare_call(out);
        }
        let tag = std::mem::take(&mut self.tag);
        match self.mode {
            Mode::Text => self.text(&tag, out),
            Mode::Object { .. } => self.finish_object(&tag, reason, out),
            Mode::Between { objects } => {
                self.raw.push_str(&tag);
                // After a complete call, half a closing tag is layout.
                if objects == 0 || !(tag.is_empty() || CLOSE.starts_with(&tag)) {
                    self.malformed(unfinished(reason, MalformedReason::Syntax), out);
                }
            }
            Mode::Broken(why) => {
                self.raw.push_str(&tag);
                self.malformed(why, out);
            }
        }
        self.mode = Mode::Text;
        if self.next_index == 0 {
            push_text(out, &self.space, false);
        }
        self.space.clear();
    }

    fn finish_object(&mut self, tag: &str, reason: EndReason, out: &mut Vec<Delta>) {
        let closes = (tag.is_empty() || CLOSE.starts_with(tag))
            && (reason == EndReason::Stop || self.call.has_arguments());
        if closes && self.reader.close_early(&mut self.call).is_ok() {
            self.complete(0, out);
            if self.mode == (Mode::Between { objects: 1 }) {
                return;
            }
        }
        self.raw.push_str(tag);
        if reason != EndReason::Stop {
            self.show(out);
            self.call.flush_partial();
            self.show(out);
        }
        if self.begun && reason != EndReason::Stop {
            self.end_call(CallOutcome::Truncated, out);
        } else {
            self.invalid(MalformedReason::Truncated, out);
            self.malformed(MalformedReason::Truncated, out);
        }
    }

    fn take(&mut self, c: char, out: &mut Vec<Delta>) {
        if !self.tag.is_empty() {
            self.tag.push(c);
            if self.tag == OPEN {
                self.tag.clear();
                self.open_tag(out);
            } else if self.tag == CLOSE {
                self.tag.clear();
                self.close_tag(out);
            } else if !OPEN.starts_with(self.tag.as_str()) && !CLOSE.starts_with(self.tag.as_str()) {
                self.tag.pop();
                let literal = std::mem::take(&mut self.tag);
                self.literal(&literal, out);
                self.take(c, out);
            }
            return;
        }
        match self.mode {
            Mode::Object { bare, objects } => self.in_object(c, bare, objects, out),
            _ if c == '<' => self.tag.push(c),
            Mode::Text => self.in_text(c, out),
            Mode::Between { objects } => self.between(c, objects, out),
            Mode::Broken(_) => self.raw.push(c),
        }
    }

    fn in_text(&mut self, c: char, out: &mut Vec<Delta>) {
        if c.is_whitespace() {
            self.space.push(c);
        } else if c == '{' && self.at_start && !self.tools.is_empty() {
            self.start_object(c, true, 0, out);
        } else {
            self.text(c.encode_utf8(&mut [0; 4]), out);
        }
    }

    /// Shows text, and the white space before it.
    fn text(&mut self, text: &str, out: &mut Vec<Delta>) {
        if text.is_empty() {
            return;
        }
        push_text(out, &self.space, false);
        self.space.clear();
        push_text(out, text, false);
        self.at_start = false;
    }

    fn between(&mut self, c: char, objects: usize, out: &mut Vec<Delta>) {
        match c {
            '{' => self.start_object(c, false, objects, out),
            _ if objects == 0 => {
                self.raw.push(c);
                if !c.is_whitespace() && c != '[' {
                    self.mode = Mode::Broken(MalformedReason::Syntax);
                }
            }
            // Superfluous or separating brackets around complete calls.
            '[' | ']' | '}' | ',' => {}
            c if c.is_whitespace() => self.space.push(c),
            _ => self.leave_unclosed(c.encode_utf8(&mut [0; 4]), out),
        }
    }

    /// Text after a complete call whose closing tag is missing.
    fn leave_unclosed(&mut self, text: &str, out: &mut Vec<Delta>) {
        self.mode = Mode::Text;
        self.swallow_close = true;
        self.text(text, out);
    }

    fn start_object(&mut self, c: char, bare: bool, objects: usize, out: &mut Vec<Delta>) {
        if bare || objects > 0 {
            self.raw.clear();
        }
        self.reader = Lenient::default();
        self.call = Call::new(Arc::clone(&self.tools));
        self.begun = false;
        self.mode = Mode::Object { bare, objects };
        self.in_object(c, bare, objects, out);
    }

    fn in_object(&mut self, c: char, bare: bool, objects: usize, out: &mut Vec<Delta>) {
        if c == '<' && !self.reader.in_string() {
            if bare {
                self.not_a_bare_call(out);
                self.take(c, out);
            } else {
                self.tag.push(c);
            }
            return;
        }
        self.raw.push(c);
        match self.reader.feed(c, &mut self.call) {
            _ if bare && !self.call.plausible_bare() => self.not_a_bare_call(out),
            Ok(Step::More) => {}
            Ok(Step::Done) if bare && !self.call.has_arguments() => self.not_a_bare_call(out),
            Ok(Step::Done) => {
                self.complete(objects, out);
                if bare {
                    self.mode = Mode::Text;
                }
            }
            Err(_) if bare => self.not_a_bare_call(out),
            Err(_) => {
                self.show(out);
                self.invalid(MalformedReason::Syntax, out);
            }
        }
    }

    /// JSON without tags that is no call of a declared function: it is an answer.
    fn not_a_bare_call(&mut self, out: &mut Vec<Delta>) {
        let raw = std::mem::take(&mut self.raw);
        self.mode = Mode::Text;
        self.at_start = false;
        for c in raw.chars() {
            self.take(c, out);
        }
    }

    fn open_tag(&mut self, out: &mut Vec<Delta>) {
        if let Mode::Object { objects, .. } = self.mode {
            self.close_object(objects, out);
        }
        if let Mode::Broken(why) = self.mode {
            self.malformed(why, out);
        }
        self.mode = Mode::Between { objects: 0 };
        self.swallow_close = false;
        OPEN.clone_into(&mut self.raw);
    }

    fn close_tag(&mut self, out: &mut Vec<Delta>) {
        match self.mode {
            Mode::Text if self.swallow_close => {}
            Mode::Text => self.text(CLOSE, out),
            Mode::Between { objects: 0 } => self.mode = Mode::Broken(MalformedReason::NotACall),
            Mode::Between { .. } | Mode::Broken(_) => {}
            Mode::Object { objects, .. } => self.close_object(objects, out),
        }
        self.swallow_close = false;
        if let Mode::Broken(why) = self.mode {
            self.raw.push_str(CLOSE);
            self.malformed(why, out);
        }
        self.mode = Mode::Text;
    }

    /// A tag has ended the object: what is missing may be only brackets.
    fn close_object(&mut self, objects: usize, out: &mut Vec<Delta>) {
        if self.reader.close_early(&mut self.call).is_ok() {
            self.complete(objects, out);
        } else {
            self.show(out);
            self.invalid(MalformedReason::Syntax, out);
        }
    }

    /// What looked like the start of a tag is none.
    fn literal(&mut self, text: &str, out: &mut Vec<Delta>) {
        match self.mode {
            Mode::Text => self.text(text, out),
            Mode::Between { objects: 0 } => {
                self.raw.push_str(text);
                self.mode = Mode::Broken(MalformedReason::Syntax);
            }
            Mode::Between { .. } => self.leave_unclosed(text, out),
            Mode::Object { .. } => {
                self.raw.push_str(text);
                self.show(out);
                self.invalid(MalformedReason::Syntax, out);
            }
            Mode::Broken(_) => self.raw.push_str(text),
        }
    }

    /// The object is complete: announces the call if need be, and ends it.
    fn complete(&mut self, objects: usize, out: &mut Vec<Delta>) {
        match self.call.complete() {
            Ok(extra) => {
                self.announce(out);
                self.end_call(CallOutcome::Complete, out);
                self.raw.clear();
                if let Some(text) = extra {
                    self.raw = text;
                    self.malformed(MalformedReason::ExtraKeys, out);
                }
                self.mode = Mode::Between { objects: objects + 1 };
            }
            Err(_) => self.invalid(MalformedReason::NotACall, out),
        }
    }

    /// The current object is no call. Its text is shown when the tag ends, or with the output.
    fn invalid(&mut self, why: MalformedReason, out: &mut Vec<Delta>) {
        if self.begun {
            self.end_call(CallOutcome::Invalid, out);
        }
        self.mode = Mode::Broken(why);
    }

    /// Hands out what has become certain of the current call.
    fn show(&mut self, out: &mut Vec<Delta>) {
        let incremental = self.delivery == Delivery::Incremental;
        if incremental && matches!(self.mode, Mode::Object { bare: false, .. }) {
            self.announce(out);
        }
    }

    fn announce(&mut self, out: &mut Vec<Delta>) {
        let index = self.next_index;
        let Some(name) = self.call.showable_name() else {
            return;
        };
        if !self.begun {
            let known = self.tools.contains(name);
            let id = format!("{}{index}", self.call_id_prefix);
            out.push(Delta::ToolCallBegin {
                index,
                id,
                name: name.to_owned(),
                known,
            });
            self.begun = true;
        }
        let fragment = self.call.take_arguments();
        if !fragment.is_empty() {
            out.push(Delta::ToolCallArguments { index, fragment });
        }
    }

    fn end_call(&mut self, outcome: CallOutcome, out: &mut Vec<Delta>) {
        out.push(Delta::ToolCallEnd {
            index: self.next_index,
            outcome,
        });
        self.next_index += 1;
        self.begun = false;
    }

    fn malformed(&mut self, reason: MalformedReason, out: &mut Vec<Delta>) {
        push_text(out, &self.space, false);
        self.space.clear();
        self.at_start = false;
        out.push(Delta::Malformed {
            text: std::mem::take(&mut self.raw),
            reason,
        });
    }
}

fn unfinished(reason: EndReason, otherwise: MalformedReason) -> MalformedReason {
    if reason == EndReason::Stop {
        otherwise
    } else {
        MalformedReason::Truncated
    }
}

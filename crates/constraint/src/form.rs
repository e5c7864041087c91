//! What is asked for, and as which grammar it is compiled.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use llguidance::Matcher;
use llguidance::api::TopLevelGrammar;
use parking_lot::Mutex;
use serde_json::{Map, Value, json};

use crate::vocabulary::{Facts, Grammars};
use crate::walk::{Opening, Walk};

/// The form that a text has to have.
#[derive(Debug, Clone, PartialEq)]
pub enum Form {
    /// Any JSON object.
    JsonObject,
    /// JSON that is valid under this schema.
    JsonSchema(Value),
    /// The regular expression, in the syntax of Rust's crate `regex`, matches all of it. `^` at its beginning and `$` at its end say
    /// nothing new.
    Regex(String),
    /// It is one of these.
    Choice(Vec<String>),
    /// The grammar derives it, in llguidance's variant of Lark's syntax.
    Grammar(String),
    /// Tool calls, whose arguments are valid under the tool's schema.
    Calls(Calls),
}

/// Calls of tools, one or several, in the markup that a model knows.
#[derive(Debug, Clone, PartialEq)]
pub struct Calls {
    /// Of each tool the text that leads from the beginning of the call to its arguments, and their schema.
    pub tools: Vec<(String, Value)>,
    /// What follows the arguments.
    pub end: String,
    /// What stands between one call and the next; `None`: there is one.
    pub between: Option<String>,
}

/// There is no grammar for it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct CompileError(pub(crate) String);

/// A compiled form. Cheap to clone; all replies under it share what is learnt about its lexer.
#[derive(Clone)]
pub struct Constraint {
    shared: Arc<Shared>,
}

struct Shared {
    /// At the grammar's beginning.
    matcher: Mutex<Matcher>,
    facts: Arc<Facts>,
}

/// White space between the parts of JSON: one space, or a line break and an indentation. Without a bound a model that has
/// lost its thread writes line breaks until its tokens are used up.
const WHITESPACE: &str = r"( |\r?\n[ \t]{0,32})?";

/// Most bytes of a schema, and of all choices together. The library bounds its own work, but some of it grows with the square of the
/// text: a schema of 10,000 properties takes it 10 seconds.
const LONGEST_SCHEMA: usize = 256 << 10;

/// Most bytes of a grammar or a regular expression.
const LONGEST_GRAMMAR: usize = 64 << 10;

impl Grammars {
    /// Compiles a form. Takes a millisecond or two, but many seconds for the worst that a client can think of; and may need much
    /// stack: see [`Self::STACK`].
    ///
    /// # Errors
    /// What is wrong with it, in the library's words; or it is too complex.
    pub fn compile(&self, form: &Form) -> Result<Constraint, CompileError> {
        let grammar = grammar(form)?;
        let build = || {
            let parser = self.factory.create_parser(grammar);
            let parser = parser.map_err(|error| clean(&format!("{error:#}")))?;
            let matcher = Matcher::new(Ok(parser));
            if let Some(error) = matcher.get_error() {
                return Err(clean(&error));
            }
            // What cannot begin at all is found now, and not by the engine; and the first mask is the dearest.
            let mut first = matcher.clone();
            first.compute_mask_or_eos().map_err(|error| {
                let said = clean(&error.to_string());
                CompileError(format!("no text of this form can be written: {}", said.0))
            })?;
            Ok(matcher)
        };
        let matcher = catch_unwind(AssertUnwindSafe(build))
            .map_err(|_| CompileError("the grammar compiler gave up on it".to_owned()))??;
        Ok(Constraint {
            shared: Arc::new(Shared {
                matcher: Mutex::new(matcher),
                facts: Arc::clone(&self.facts),
            }),
        })
    }

    /// Stack that [`Self::compile`] may need.
    pub const STACK: usize = 256 << 20;
}

impl Constraint {
    /// A reply's way through it. `stops`: the tokens that end the reply, allowed exactly where the text may end.
    #[must_use]
    pub fn walk(&self, opening: Opening, stops: &[u32]) -> Walk {
        let matcher = self.shared.matcher.lock().clone();
        Walk::new(matcher, Arc::clone(&self.shared.facts), opening, stops)
    }
}

impl fmt::Debug for Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Constraint").finish_non_exhaustive()
    }
}

/// The same one, not an equal one.
impl PartialEq for Constraint {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared)
    }
}

fn grammar(form: &Form) -> Result<TopLevelGrammar, CompileError> {
    match form {
        Form::JsonObject => schema(&json!({"type": "object"})),
        Form::JsonSchema(value) => schema(value),
        Form::Regex(text) => {
            bounded(text.len(), LONGEST_GRAMMAR)?;
            Ok(TopLevelGrammar::from_regex(unanchored(text)))
        }
        Form::Choice(texts) => {
            bounded(texts.iter().map(String::len).sum(), LONGEST_SCHEMA)?;
            if texts.is_empty() || texts.iter().any(String::is_empty) {
                return Err(CompileError("a choice needs texts that are not empty".to_owned()));
            }
            let escaped: Vec<String> = texts.iter().map(|text| regex::escape(text)).collect();
            Ok(TopLevelGrammar::from_regex(&escaped.join("|")))
        }
        Form::Grammar(text) => {
            bounded(text.len(), LONGEST_GRAMMAR)?;
            Ok(TopLevelGrammar::from_lark(text.clone()))
        }
        Form::Calls(calls) => self::calls(calls),
    }
}

fn calls(calls: &Calls) -> Result<TopLevelGrammar, CompileError> {
    let quoted = |text: &str| Value::from(text).to_string();
    let mut rules = match &calls.between {
        Some(between) => format!("start: call ({} call)*\n", quoted(between)),
        None => "start: call\n".to_owned(),
    };
    let mut each = Vec::new();
    for (number, (begin, schema)) in calls.tools.iter().enumerate() {
        let schema = Value::Object(prepared(schema)?);
        rules.push_str(&format!("arguments{number}: %json {schema}\n"));
        each.push(format!(
            "{} arguments{number} {}",
            quoted(begin),
            quoted(&calls.end)
        ));
    }
    bounded(rules.len(), LONGEST_SCHEMA)?;
    rules.push_str(&format!("call: {}\n", each.join(" | ")));
    Ok(TopLevelGrammar::from_lark(rules))
}

fn schema(value: &Value) -> Result<TopLevelGrammar, CompileError> {
    Ok(TopLevelGrammar::from_json_schema(Value::Object(prepared(value)?)))
}

/// A schema with what is said here of white space and alternatives.
fn prepared(value: &Value) -> Result<Map<String, Value>, CompileError> {
    let Value::Object(map) = value else {
        return Err(CompileError("a schema must be an object".to_owned()));
    };
    bounded(value.to_string().len(), LONGEST_SCHEMA)?;
    let mut map = map.clone();
    map.entry("x-guidance")
        .or_insert_with(|| json!({"whitespace_pattern": WHITESPACE, "coerce_one_of": true}));
    Ok(map)
}

fn bounded(bytes: usize, most: usize) -> Result<(), CompileError> {
    if bytes > most {
        return Err(CompileError(format!(
            "it has {bytes} bytes; at most {most} are compiled"
        )));
    }
    Ok(())
}

/// Without the anchors around it, which the grammar's regular expressions do not have: they always match all.
fn unanchored(regex: &str) -> &str {
    let regex = regex.strip_prefix('^').unwrap_or(regex);
    match regex.strip_suffix('$') {
        Some(rest) if rest.bytes().rev().take_while(|byte| *byte == b'\\').count() % 2 == 0 => rest,
        _ => regex,
    }
}

/// The library's message without what is for its authors: states, grammars, backtraces.
pub(crate) fn clean(error: &str) -> CompileError {
    let end = ["<non-verbose/>", "<backtrace>", "<state>"]
        .iter()
        .filter_map(|mark| error.find(mark))
        .min();
    let text = error.get(..end.unwrap_or(error.len())).unwrap_or(error).trim();
    let mut short: String = text.chars().take(300).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    CompileError(short)
}

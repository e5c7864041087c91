//! The language of allowed sets: `a & (b | c)`, `+other` for another set.
//!
//! An expression stands for its expansions: `&` joins, `|` chooses. A model may run together with any part of an
//! expansion that has it. To start a model, the expansion is taken that keeps the running models which cost most to
//! unload. Expansions are never listed: an expression is evaluated to the subsets of *running* models that it can keep,
//! of which there are few, and of those only the ones that no other contains.

use indexmap::IndexMap;

/// Allowed sets of models.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Matrix {
    /// Sets, each after those that it refers to, else in the order of the file.
    sets: IndexMap<String, Expr>,
    /// Cost of unloading, by model id; 1 where nothing is said.
    costs: IndexMap<String, u64>,
}

/// An expression; `Set` refers to an earlier set by index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Expr {
    Model(String),
    Set(usize),
    And(Vec<Expr>),
    Or(Vec<Expr>),
}

/// An expression as written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Raw {
    Name(String),
    Set(String),
    And(Vec<Raw>),
    Or(Vec<Raw>),
}

/// Deepest nesting of parentheses.
const MAX_DEPTH: usize = 32;
/// Most candidates that are followed at once; past it, the cheapest are kept. Reached only when dozens of models run.
const MAX_CANDIDATES: usize = 256;

impl Matrix {
    pub(crate) fn new(sets: IndexMap<String, Expr>, costs: IndexMap<String, u64>) -> Self {
        Self { sets, costs }
    }

    /// What unloading a model costs.
    #[must_use]
    pub fn cost(&self, id: &str) -> u64 {
        self.costs.get(id).copied().unwrap_or(1)
    }

    /// The sets in the order in which ties are broken, with their members spelled out.
    pub fn sets(&self) -> impl Iterator<Item = (&str, String)> {
        self.sets
            .iter()
            .map(|(name, expr)| (name.as_str(), self.show(expr, false)))
    }

    fn show(&self, expr: &Expr, inside: bool) -> String {
        let list = |exprs: &[Expr], between: &str| -> String {
            let shown: Vec<String> = exprs.iter().map(|e| self.show(e, true)).collect();
            let joined = shown.join(between);
            if inside { format!("({joined})") } else { joined }
        };
        match expr {
            Expr::Model(id) => id.clone(),
            Expr::Set(index) => format!("+{}", self.sets.get_index(*index).map_or("?", |(name, _)| name)),
            Expr::And(exprs) => list(exprs, " & "),
            Expr::Or(exprs) => list(exprs, " | "),
        }
    }

    /// The models among `running` that must go before `target` starts: the cheapest choice, the first set among equals.
    /// A target in no set runs alone.
    pub(crate) fn evictions<'i>(&self, target: &str, running: &[&'i str]) -> Vec<&'i str> {
        // Bit 63 is the target; the others are the running models that can be told apart.
        const TARGET: u64 = 1 << 63;
        let seen: Vec<&str> = running.iter().copied().take(63).collect();
        let bit = |id: &str| -> u64 {
            if id == target {
                return TARGET;
            }
            seen.iter().position(|r| *r == id).map_or(0, |i| 1 << i)
        };
        let kept_value = |mask: u64| -> u64 {
            let kept = seen.iter().enumerate().filter(|(i, _)| mask & (1 << i) != 0);
            kept.fold(0, |sum: u64, (_, id)| sum.saturating_add(self.cost(id)))
        };
        let mut values: Vec<Vec<u64>> = Vec::with_capacity(self.sets.len());
        let mut best: Option<(u64, u64)> = None;
        for expr in self.sets.values() {
            let masks = masks(expr, &values, &bit, &kept_value);
            for mask in masks.iter().filter(|m| **m & TARGET != 0) {
                let value = kept_value(*mask);
                if best.is_none_or(|(most, _)| value > most) {
                    best = Some((value, *mask));
                }
            }
            values.push(masks);
        }
        let kept = best.map_or(0, |(_, mask)| mask);
        running
            .iter()
            .copied()
            .enumerate()
            .filter(|(i, _)| *i >= 63 || kept & (1 << i) == 0)
            .map(|(_, id)| id)
            .collect()
    }
}

/// The subsets that an expression can keep, without those that another one contains, first ones first.
fn masks(expr: &Expr, sets: &[Vec<u64>], bit: &dyn Fn(&str) -> u64, value: &dyn Fn(u64) -> u64) -> Vec<u64> {
    match expr {
        Expr::Model(id) => vec![bit(id)],
        Expr::Set(index) => sets.get(*index).cloned().unwrap_or_default(),
        Expr::Or(exprs) => maximal(
            exprs.iter().flat_map(|e| masks(e, sets, bit, value)).collect(),
            value,
        ),
        Expr::And(exprs) => exprs.iter().fold(vec![0], |sofar, e| {
            let more = masks(e, sets, bit, value);
            maximal(
                sofar
                    .iter()
                    .flat_map(|a| more.iter().map(move |b| a | b))
                    .collect(),
                value,
            )
        }),
    }
}

fn maximal(masks: Vec<u64>, value: &dyn Fn(u64) -> u64) -> Vec<u64> {
    let mut kept: Vec<u64> = Vec::new();
    for mask in masks {
        if kept.iter().any(|k| k & mask == mask) {
            continue;
        }
        kept.retain(|k| k & mask != *k);
        kept.push(mask);
    }
    if kept.len() > MAX_CANDIDATES {
        // Stable: equals stay in order.
        kept.sort_by_key(|mask| std::cmp::Reverse((mask >> 63, value(*mask))));
        kept.truncate(MAX_CANDIDATES);
    }
    kept
}

/// Parses one expression.
///
/// # Errors
/// What is wrong, with the column in the expression.
pub(crate) fn parse(text: &str) -> Result<Raw, String> {
    let mut parser = Parser {
        tokens: tokens(text)?,
        next: 0,
        depth: 0,
    };
    if parser.tokens.is_empty() {
        return Err("is empty: a set needs at least one model".to_owned());
    }
    let expr = parser.or()?;
    match parser.peek() {
        None => Ok(expr),
        Some((column, token)) => Err(format!(
            "unexpected `{token}` at column {column} of the expression"
        )),
    }
}

/// Tokens with their columns, from 1.
fn tokens(text: &str) -> Result<Vec<(usize, String)>, String> {
    let mut tokens: Vec<(usize, String)> = Vec::new();
    let mut open = false;
    for (i, c) in text.chars().enumerate() {
        match c {
            c if c.is_whitespace() => open = false,
            '&' | '|' | '(' | ')' | '+' => {
                tokens.push((i + 1, c.to_string()));
                open = false;
            }
            c if c.is_alphanumeric() || matches!(c, '_' | '-' | '.') => match tokens.last_mut() {
                Some((_, word)) if open => word.push(c),
                _ => {
                    tokens.push((i + 1, c.to_string()));
                    open = true;
                }
            },
            c => return Err(format!("unexpected `{c}` at column {} of the expression", i + 1)),
        }
    }
    Ok(tokens)
}

struct Parser {
    tokens: Vec<(usize, String)>,
    next: usize,
    depth: usize,
}

impl Parser {
    fn peek(&self) -> Option<(usize, &str)> {
        self.tokens
            .get(self.next)
            .map(|(column, token)| (*column, token.as_str()))
    }

    fn take(&mut self, wanted: &str) -> bool {
        let found = self.peek().is_some_and(|(_, token)| token == wanted);
        self.next += usize::from(found);
        found
    }

    fn or(&mut self) -> Result<Raw, String> {
        let mut parts = vec![self.and()?];
        while self.take("|") {
            parts.push(self.and()?);
        }
        Ok(single(parts, Raw::Or))
    }

    fn and(&mut self) -> Result<Raw, String> {
        let mut parts = vec![self.atom()?];
        while self.take("&") {
            parts.push(self.atom()?);
        }
        Ok(single(parts, Raw::And))
    }

    fn atom(&mut self) -> Result<Raw, String> {
        let Some((column, token)) = self.peek() else {
            return Err("ends where a model is expected".to_owned());
        };
        let token = token.to_owned();
        self.next += 1;
        match token.as_str() {
            "(" => {
                self.depth += 1;
                if self.depth > MAX_DEPTH {
                    return Err(format!("has more than {MAX_DEPTH} nested parentheses"));
                }
                let inner = self.or()?;
                self.depth -= 1;
                if self.take(")") {
                    Ok(inner)
                } else {
                    Err(format!(
                        "the parenthesis at column {column} of the expression is not closed"
                    ))
                }
            }
            // Looked at, not parsed: a row of pluses is no recursion.
            "+" => match self.peek().map(|(_, next)| next.to_owned()) {
                Some(name) if !matches!(name.as_str(), "&" | "|" | "(" | ")" | "+") => {
                    self.next += 1;
                    Ok(Raw::Set(name))
                }
                _ => Err(format!(
                    "`+` at column {column} of the expression needs the name of a set"
                )),
            },
            "&" | "|" | ")" => Err(format!(
                "unexpected `{token}` at column {column} of the expression"
            )),
            _ => Ok(Raw::Name(token)),
        }
    }
}

fn single(mut parts: Vec<Raw>, many: fn(Vec<Raw>) -> Raw) -> Raw {
    match (parts.len(), parts.pop()) {
        (1, Some(only)) => only,
        (_, last) => {
            parts.extend(last);
            many(parts)
        }
    }
}

/// Replaces names by model ids and set names by indices, and orders the sets so that each comes after those it refers
/// to. `broken` sets exist and could not be parsed. Errors carry the index of their set.
pub(crate) fn resolve<P>(
    parsed: &[(String, Raw, P, String)],
    broken: &[&str],
    known: &dyn Fn(&str) -> Option<String>,
) -> (IndexMap<String, Expr>, Vec<(usize, String)>) {
    let mut resolver = Resolver {
        parsed: parsed
            .iter()
            .map(|(name, raw, ..)| (name.as_str(), raw))
            .collect(),
        broken,
        known,
        done: IndexMap::new(),
        path: Vec::new(),
        errors: Vec::new(),
    };
    for index in 0..parsed.len() {
        resolver.set(index);
    }
    (resolver.done, resolver.errors)
}

struct Resolver<'a> {
    parsed: Vec<(&'a str, &'a Raw)>,
    broken: &'a [&'a str],
    known: &'a dyn Fn(&str) -> Option<String>,
    done: IndexMap<String, Expr>,
    path: Vec<usize>,
    errors: Vec<(usize, String)>,
}

impl Resolver<'_> {
    fn set(&mut self, index: usize) {
        let Some((name, raw)) = self.parsed.get(index).copied() else {
            return;
        };
        if self.done.contains_key(name) {
            return;
        }
        self.path.push(index);
        let expr = self.expr(raw, index);
        self.path.pop();
        self.done.insert(name.to_owned(), expr);
    }

    fn expr(&mut self, raw: &Raw, index: usize) -> Expr {
        match raw {
            Raw::And(parts) => Expr::And(parts.iter().map(|p| self.expr(p, index)).collect()),
            Raw::Or(parts) => Expr::Or(parts.iter().map(|p| self.expr(p, index)).collect()),
            Raw::Name(name) => {
                let id = (self.known)(name);
                if id.is_none() {
                    let is_set = self.parsed.iter().any(|(set, _)| set == name);
                    let hint = if is_set {
                        format!("; for the set of that name write `+{name}`")
                    } else {
                        String::new()
                    };
                    self.errors.push((
                        index,
                        format!("`{name}` is neither in `vars` nor the id of a model{hint}"),
                    ));
                }
                Expr::Model(id.unwrap_or_else(|| name.clone()))
            }
            Raw::Set(name) => {
                let Some(target) = self.parsed.iter().position(|(set, _)| set == name) else {
                    if !self.broken.contains(&name.as_str()) {
                        self.errors
                            .push((index, format!("`+{name}` refers to a set that does not exist")));
                    }
                    return Expr::Or(Vec::new());
                };
                if self.path.contains(&target) {
                    self.errors
                        .push((index, format!("`+{name}` leads back to the set itself")));
                    return Expr::Or(Vec::new());
                }
                // Chains of sets are as deep as they are many; they must not exhaust the stack.
                if self.path.len() > 32 {
                    self.errors
                        .push((index, "sets refer to each other more than 32 deep".to_owned()));
                    return Expr::Or(Vec::new());
                }
                self.set(target);
                self.done
                    .get_index_of(name.as_str())
                    .map_or(Expr::Or(Vec::new()), Expr::Set)
            }
        }
    }
}

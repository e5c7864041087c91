//! Text to a tree in which every key and value knows its place.
//!
//! The parser is saphyr-parser's event stream (YAML 1.2, so JSON too): it gives line and column of every event, which
//! serde_yaml's values do not have. Anchors, aliases and merge keys (`<<`) are resolved here; the size of what aliases
//! unfold to is bounded.

use std::collections::HashMap;

use saphyr_parser::{Event, Parser, ScalarStyle, Span, Tag};

use crate::diagnostic::{Code, Findings, Pos};

/// A value and its place.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Node {
    pub(crate) at: Pos,
    pub(crate) data: Data,
}

/// A value.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Data {
    Null,
    Bool(bool),
    /// With the text as written: `0x10` in a text field stays `0x10`.
    Int(i64, Box<str>),
    /// With the text as written: `1.10` in a text field stays `1.10`.
    Float(f64, Box<str>),
    Str(String),
    Seq(Vec<Node>),
    Map(Vec<Entry>),
}

/// A key, its place and its value.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Entry {
    pub(crate) key: String,
    pub(crate) at: Pos,
    pub(crate) value: Node,
}

/// Deepest nesting; everything that walks a tree may recurse that far.
const MAX_DEPTH: usize = 100;
/// Most values after aliases have been unfolded.
const MAX_NODES: usize = 500_000;

impl Node {
    pub(crate) fn get(&self, key: &str) -> Option<&Node> {
        self.entries().iter().find(|e| e.key == key).map(|e| &e.value)
    }

    /// Entries of a mapping; none for anything else.
    pub(crate) fn entries(&self) -> &[Entry] {
        match &self.data {
            Data::Map(entries) => entries,
            _ => &[],
        }
    }

    /// Items of a sequence; none for anything else.
    pub(crate) fn items(&self) -> &[Node] {
        match &self.data {
            Data::Seq(items) => items,
            _ => &[],
        }
    }

    pub(crate) fn is_null(&self) -> bool {
        matches!(self.data, Data::Null)
    }

    /// The text of a scalar as written.
    pub(crate) fn text(&self) -> Option<String> {
        match &self.data {
            Data::Str(s) => Some(s.clone()),
            Data::Int(_, raw) | Data::Float(_, raw) => Some(raw.to_string()),
            Data::Bool(b) => Some(b.to_string()),
            Data::Null | Data::Seq(_) | Data::Map(_) => None,
        }
    }

    /// Words for the type.
    pub(crate) fn kind(&self) -> &'static str {
        match self.data {
            Data::Null => "null",
            Data::Bool(_) => "true/false",
            Data::Int(..) => "a whole number",
            Data::Float(..) => "a number",
            Data::Str(_) => "text",
            Data::Seq(_) => "a list",
            Data::Map(_) => "a mapping",
        }
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        use serde_json::Value as J;
        match &self.data {
            Data::Null => J::Null,
            Data::Bool(b) => J::Bool(*b),
            Data::Int(i, _) => J::from(*i),
            Data::Float(x, raw) => {
                serde_json::Number::from_f64(*x).map_or_else(|| J::String(raw.to_string()), J::Number)
            }
            Data::Str(s) => J::String(s.clone()),
            Data::Seq(items) => J::Array(items.iter().map(Node::json).collect()),
            Data::Map(entries) => {
                J::Object(entries.iter().map(|e| (e.key.clone(), e.value.json())).collect())
            }
        }
    }

    fn size(&self) -> usize {
        1 + match &self.data {
            Data::Seq(items) => items.iter().map(Node::size).sum(),
            Data::Map(entries) => entries.iter().map(|e| e.value.size()).sum(),
            _ => 0,
        }
    }
}

/// An open sequence or mapping.
struct Frame {
    at: Pos,
    anchor: usize,
    kind: Open,
}

enum Open {
    Seq(Vec<Node>),
    Map {
        entries: Vec<Entry>,
        merges: Vec<Node>,
        key: Option<(String, Pos, bool)>,
    },
}

struct Builder<'f> {
    file: usize,
    findings: &'f mut Findings,
    /// Corrects places for text that was replaced before parsing.
    origin: &'f dyn Fn(u32, u32) -> (u32, u32),
    stack: Vec<Frame>,
    anchors: HashMap<usize, Node>,
    nodes: usize,
    root: Option<Node>,
    ok: bool,
}

/// Parses one source. `origin` maps a line and column of `text` to those of the file. `None` when it is not YAML; what
/// is wrong is in `findings`. An empty source is an empty mapping.
pub(crate) fn parse(
    text: &str,
    file: usize,
    findings: &mut Findings,
    origin: &dyn Fn(u32, u32) -> (u32, u32),
) -> Option<Node> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut builder = Builder {
        file,
        findings,
        origin,
        stack: Vec::new(),
        anchors: HashMap::new(),
        nodes: 0,
        root: None,
        ok: true,
    };
    let mut documents = 0;
    for event in Parser::new_from_str(text) {
        match event {
            Ok((Event::DocumentStart(_), span)) => {
                documents += 1;
                if documents > 1 {
                    let at = builder.pos(&span);
                    builder.findings.warn(
                        Code::NoEffect,
                        at,
                        "",
                        "only the first YAML document of a file is read",
                    );
                    break;
                }
            }
            Ok((event, span)) => {
                builder.event(event, &span)?;
            }
            Err(e) => {
                let marker = e.marker();
                let at = builder.place(marker.line(), marker.col());
                builder
                    .findings
                    .error(Code::Syntax, at, "", format!("not valid YAML: {}", e.info()));
                return None;
            }
        }
    }
    let top = Pos {
        file,
        line: 1,
        column: 1,
    };
    let root = match builder.root.take() {
        None => Node {
            at: top,
            data: Data::Map(Vec::new()),
        },
        Some(Node { data: Data::Null, at }) => Node {
            at,
            data: Data::Map(Vec::new()),
        },
        Some(root) => root,
    };
    if !matches!(root.data, Data::Map(_)) {
        let message = format!("the top level must be a mapping, not {}", root.kind());
        builder.findings.error(Code::Type, root.at, "", message);
        return None;
    }
    builder.ok.then_some(root)
}

impl Builder<'_> {
    fn place(&self, line: usize, column: usize) -> Pos {
        let small = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let (line, column) = (self.origin)(small(line), small(column).saturating_add(1));
        Pos {
            file: self.file,
            line,
            column,
        }
    }

    fn pos(&self, span: &Span) -> Pos {
        self.place(span.start.line(), span.start.col())
    }

    /// Path of the value that is being read.
    fn path(&self) -> String {
        let mut path = String::new();
        for frame in &self.stack {
            match &frame.kind {
                Open::Seq(items) => path.push_str(&format!("[{}]", items.len())),
                Open::Map {
                    key: Some((key, ..)), ..
                } => {
                    if !path.is_empty() {
                        path.push('.');
                    }
                    path.push_str(key);
                }
                Open::Map { key: None, .. } => {}
            }
        }
        path
    }

    fn event(&mut self, event: Event<'_>, span: &Span) -> Option<()> {
        let at = self.pos(span);
        match event {
            Event::Scalar(text, style, anchor, tag) => {
                if let Some(frame) = self.stack.last_mut()
                    && let Open::Map { key: key @ None, .. } = &mut frame.kind
                {
                    let merge = text == "<<" && style == ScalarStyle::Plain;
                    *key = Some((text.into_owned(), at, merge));
                    return Some(());
                }
                let data = scalar(&text, style, tag.as_deref());
                self.value(Node { at, data }, anchor)
            }
            Event::SequenceStart(anchor, _) => self.open(Frame {
                at,
                anchor,
                kind: Open::Seq(Vec::new()),
            }),
            Event::MappingStart(anchor, _) => {
                let kind = Open::Map {
                    entries: Vec::new(),
                    merges: Vec::new(),
                    key: None,
                };
                self.open(Frame { at, anchor, kind })
            }
            Event::SequenceEnd | Event::MappingEnd => {
                let frame = self.stack.pop()?;
                let data = match frame.kind {
                    Open::Seq(items) => Data::Seq(items),
                    Open::Map { entries, merges, .. } => Data::Map(merged(entries, merges)),
                };
                self.value(Node { at: frame.at, data }, frame.anchor)
            }
            Event::Alias(id) => {
                let Some(node) = self.anchors.get(&id).cloned() else {
                    let path = self.path();
                    self.findings
                        .error(Code::Syntax, at, path, "an alias inside its own anchor");
                    return None;
                };
                if let Some(Frame {
                    kind: Open::Map { key: None, .. },
                    ..
                }) = self.stack.last()
                {
                    let Some(text) = node.text() else {
                        return self.bad_key(at);
                    };
                    return self.event(
                        Event::Scalar(text.into(), ScalarStyle::DoubleQuoted, 0, None),
                        span,
                    );
                }
                self.nodes += node.size();
                self.value(node, 0)
            }
            Event::Nothing
            | Event::StreamStart
            | Event::StreamEnd
            | Event::DocumentStart(_)
            | Event::DocumentEnd => Some(()),
        }
    }

    fn bad_key(&mut self, at: Pos) -> Option<()> {
        let path = self.path();
        self.findings.error(
            Code::Syntax,
            at,
            path,
            "a key must be plain text, not a list or mapping",
        );
        None
    }

    fn open(&mut self, frame: Frame) -> Option<()> {
        if let Some(Frame {
            kind: Open::Map { key: None, .. },
            ..
        }) = self.stack.last()
        {
            return self.bad_key(frame.at);
        }
        if self.stack.len() >= MAX_DEPTH {
            let path = self.path();
            self.findings.error(
                Code::Syntax,
                frame.at,
                path,
                format!("nested deeper than {MAX_DEPTH} levels"),
            );
            return None;
        }
        self.stack.push(frame);
        Some(())
    }

    fn value(&mut self, node: Node, anchor: usize) -> Option<()> {
        self.nodes += 1;
        if self.nodes > MAX_NODES {
            self.findings
                .error(Code::Syntax, node.at, "", format!("more than {MAX_NODES} values"));
            return None;
        }
        if anchor > 0 {
            self.anchors.insert(anchor, node.clone());
        }
        let Some(frame) = self.stack.last_mut() else {
            self.root = Some(node);
            return Some(());
        };
        match &mut frame.kind {
            Open::Seq(items) => items.push(node),
            Open::Map { entries, merges, key } => {
                let (key, at, merge) = key.take()?;
                if merge {
                    let fits = |n: &Node| matches!(n.data, Data::Map(_));
                    if fits(&node) {
                        merges.push(node);
                    } else if !node.items().is_empty() && node.items().iter().all(fits) {
                        merges.extend(node.items().iter().cloned());
                    } else {
                        self.findings.error(
                            Code::Type,
                            at,
                            self.path(),
                            "`<<` takes a mapping or a list of mappings",
                        );
                        self.ok = false;
                    }
                } else if let Some(first) = entries.iter().find(|e| e.key == key) {
                    let message = format!("`{key}` is given twice; the first is on line {}", first.at.line);
                    let mut path = self.path();
                    if !path.is_empty() {
                        path.push('.');
                    }
                    path.push_str(&key);
                    self.findings.error(Code::Conflict, at, path, message);
                    self.ok = false;
                } else {
                    entries.push(Entry { key, at, value: node });
                }
            }
        }
        Some(())
    }
}

/// Own keys go before merged ones, and earlier merges before later ones.
fn merged(mut entries: Vec<Entry>, merges: Vec<Node>) -> Vec<Entry> {
    for node in merges {
        if let Data::Map(more) = node.data {
            for entry in more {
                if !entries.iter().any(|e| e.key == entry.key) {
                    entries.push(entry);
                }
            }
        }
    }
    entries
}

fn scalar(text: &str, style: ScalarStyle, tag: Option<&Tag>) -> Data {
    let tagged = tag.filter(|t| t.is_yaml_core_schema()).map(|t| t.suffix.as_str());
    match tagged {
        Some("str") => Data::Str(text.to_owned()),
        Some("int" | "float" | "bool" | "null") => plain(text),
        _ if style == ScalarStyle::Plain => plain(text),
        _ => Data::Str(text.to_owned()),
    }
}

/// A plain scalar's type, by YAML 1.2's core schema.
pub(crate) fn plain(text: &str) -> Data {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Data::Null,
        "true" | "True" | "TRUE" => return Data::Bool(true),
        "false" | "False" | "FALSE" => return Data::Bool(false),
        _ => {}
    }
    let unsigned = text.strip_prefix(['-', '+']).unwrap_or(text);
    let radix = |prefix: &str, radix: u32| {
        unsigned.strip_prefix(prefix).and_then(|digits| {
            let value = i64::from_str_radix(digits, radix)
                .ok()
                .filter(|_| !digits.starts_with(['-', '+']))?;
            Some(if text.starts_with('-') { -value } else { value })
        })
    };
    if let Some(value) = radix("0x", 16)
        .or_else(|| radix("0o", 8))
        .or_else(|| radix("0b", 2))
    {
        return Data::Int(value, text.into());
    }
    let digits = !unsigned.is_empty() && unsigned.bytes().all(|b| b.is_ascii_digit());
    if let (true, Ok(value)) = (digits, text.parse::<i64>()) {
        return Data::Int(value, text.into());
    }
    let numeric = unsigned.starts_with(|c: char| c.is_ascii_digit() || c == '.')
        && unsigned.bytes().any(|b| b.is_ascii_digit())
        && unsigned
            .bytes()
            .all(|b| b.is_ascii_digit() || matches!(b, b'.' | b'e' | b'E' | b'+' | b'-'));
    match text.parse::<f64>() {
        Ok(value) if numeric && value.is_finite() => Data::Float(value, text.into()),
        _ => Data::Str(text.to_owned()),
    }
}

#[cfg(test)]
mod tests;

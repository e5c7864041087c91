//! Changes to a JSON body in place: only the named keys, every other byte as the client sent it.

use bytes::Bytes;
use indexmap::IndexMap;
use registry::{Filters, Json};
use serde_json::Value;

use crate::jsonscan::{Malformed, key_is, members};

/// What is to become of a body.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rewrite {
    root: Node,
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Node {
    action: Option<Action>,
    below: IndexMap<String, Node>,
}

#[derive(Clone, Debug, PartialEq)]
enum Action {
    Remove,
    Set(Value),
}

/// Deepest nesting that a rewrite follows.
const MAX_DEPTH: usize = 32;

impl Rewrite {
    /// What a model's filters do to requests that name it `requested`; `None`: nothing.
    ///
    /// The order is llama-swap's: the model's name, keys out, keys in, keys in for this name. Later ones win.
    #[must_use]
    pub fn new(filters: &Filters, model_name: Option<&str>, requested: &str) -> Option<Self> {
        let mut rewrite = Self::default();
        if let Some(name) = model_name {
            rewrite
                .root
                .below
                .insert("model".to_owned(), Node::set(name.into()));
        }
        for path in &filters.strip_params {
            rewrite.change(path, &Action::Remove);
        }
        let empty = Json::new();
        for (path, value) in filters
            .set_params
            .iter()
            .chain(filters.set_params_by_id.get(requested).unwrap_or(&empty))
        {
            rewrite.change(path, &Action::Set(value.clone()));
        }
        (!rewrite.root.below.is_empty()).then_some(rewrite)
    }

    fn change(&mut self, path: &str, action: &Action) {
        let steps = split_path(path);
        if steps.first().is_none_or(|s| s == "model") || steps.len() > MAX_DEPTH {
            return;
        }
        let mut node = &mut self.root;
        for (i, step) in steps.iter().enumerate() {
            // What was set as a whole before is opened, so that one key in it can be changed.
            if let Some(Action::Set(Value::Object(map))) = node
                .action
                .take_if(|a| matches!(a, Action::Set(Value::Object(_))))
            {
                node.action = Some(Action::Set(Value::Object(Json::new())));
                node.below = map.into_iter().map(|(k, v)| (k, Node::set(v))).collect();
            }
            if *action == Action::Remove && node.action == Some(Action::Remove) {
                // Gone as a whole.
                return;
            }
            node = node.below.entry(step.clone()).or_default();
            if i + 1 == steps.len() {
                *node = Node {
                    action: Some(action.clone()),
                    below: IndexMap::new(),
                };
            }
        }
    }

    /// The changed body.
    ///
    /// # Errors
    /// The body is not a JSON object, or is cut off.
    pub fn apply(&self, body: &[u8]) -> Result<Bytes, Malformed> {
        let mut out = Vec::with_capacity(body.len() + 64);
        self.root.edit(body, &mut out)?;
        Ok(out.into())
    }
}

impl Node {
    fn set(value: Value) -> Self {
        Self {
            action: Some(Action::Set(value)),
            below: IndexMap::new(),
        }
    }

    /// Writes the object in `body`, changed, to `out`.
    fn edit(&self, body: &[u8], out: &mut Vec<u8>) -> Result<(), Malformed> {
        let slice = |from: usize, to: usize| body.get(from..to).unwrap_or_default();
        let mut used = vec![false; self.below.len()];
        let mut written = false;
        // End of the last member as received; what lies between two members is kept with the second.
        let mut last = body.iter().position(|b| *b == b'{').map_or(0, |i| i + 1);
        out.extend_from_slice(slice(0, last));
        for member in members(body) {
            let member = member?;
            let found = self
                .below
                .iter()
                .enumerate()
                .find(|(_, (k, _))| key_is(body, &member, k));
            let between = slice(last, member.key.start);
            last = member.value.end;
            if let Some((i, (_, node))) = found {
                if let Some(seen) = used.get_mut(i) {
                    *seen = true;
                }
                if node.action == Some(Action::Remove) && node.below.is_empty() {
                    continue;
                }
            }
            separate(&mut written, between, out);
            out.extend_from_slice(slice(member.key.start, member.value.start));
            let value = slice(member.value.start, member.value.end);
            match found {
                None => out.extend_from_slice(value),
                Some((_, (_, node))) => node.replace(value, out)?,
            }
        }
        for (_, (key, node)) in self
            .below
            .iter()
            .enumerate()
            .filter(|(i, _)| used.get(*i) == Some(&false))
        {
            if let Some(value) = node.value() {
                separate(&mut written, b"", out);
                out.extend_from_slice(Value::from(key.as_str()).to_string().as_bytes());
                out.push(b':');
                out.extend_from_slice(value.to_string().as_bytes());
            }
        }
        out.extend_from_slice(slice(last, body.len()));
        Ok(())
    }

    /// Writes what becomes of a value that is there.
    fn replace(&self, value: &[u8], out: &mut Vec<u8>) -> Result<(), Malformed> {
        if self.action.is_none() && value.first() == Some(&b'{') {
            return self.edit(value, out);
        }
        match self.value() {
            Some(new) => out.extend_from_slice(new.to_string().as_bytes()),
            None => out.extend_from_slice(value),
        }
        Ok(())
    }

    /// The value that this part sets where nothing is.
    fn value(&self) -> Option<Value> {
        match &self.action {
            Some(Action::Remove) if self.below.is_empty() => None,
            Some(Action::Set(value)) if self.below.is_empty() => Some(value.clone()),
            _ => {
                let below: Json = self
                    .below
                    .iter()
                    .filter_map(|(k, n)| Some((k.clone(), n.value()?)))
                    .collect();
                (!below.is_empty() || self.action.is_some()).then_some(Value::Object(below))
            }
        }
    }
}

/// Puts a comma before every member but the first, and keeps the white space that stood before this one.
fn separate(written: &mut bool, between: &[u8], out: &mut Vec<u8>) {
    if *written {
        out.push(b',');
    }
    *written = true;
    let space = between.iter().filter(|b| b.is_ascii_whitespace());
    out.extend(space.copied());
}

/// Steps of a dotted path; `\.` is a dot within a step.
fn split_path(path: &str) -> Vec<String> {
    let mut steps = vec![String::new()];
    let mut chars = path.chars();
    while let Some(c) = chars.next() {
        match (c, steps.last_mut()) {
            ('.', _) => steps.push(String::new()),
            ('\\', Some(step)) => step.extend(chars.next()),
            (c, Some(step)) => step.push(c),
            _ => {}
        }
    }
    steps.retain(|s| !s.is_empty());
    steps
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn filters(strip: &[&str], set: Value, by_id: Value) -> Filters {
        let by_id = by_id
            .as_object()
            .unwrap()
            .iter()
            .map(|(k, v)| (k.clone(), v.as_object().unwrap().clone()));
        Filters {
            strip_params: strip.iter().map(|s| (*s).to_owned()).collect(),
            set_params: set.as_object().unwrap().clone(),
            set_params_by_id: by_id.collect(),
        }
    }

    fn apply(filters: &Filters, name: Option<&str>, requested: &str, body: &str) -> String {
        let rewrite = Rewrite::new(filters, name, requested).unwrap();
        String::from_utf8(rewrite.apply(body.as_bytes()).unwrap().to_vec()).unwrap()
    }

    #[test]
    fn other_bytes_stay() {
        let f = filters(&["top_k"], json!({"temperature": 0.5}), json!({"fast": {"n": 1}}));
        let body =
            "{ \"a\" : [1.50, {\"top_k\":1}],\n  \"top_k\": 3, \"temperature\":1e0, \"model\" : \"fast\" }";
        let expected = "{ \"a\" : [1.50, {\"top_k\":1}], \"temperature\":0.5, \"model\" : \"real\",\"n\":1 }";
        assert_eq!(apply(&f, Some("real"), "fast", body), expected);
        assert!(!apply(&f, None, "slow", body).contains("\"n\":1"));
    }

    #[test]
    fn edges_of_the_object() {
        let f = filters(&["a"], json!({}), json!({}));
        for (body, expected) in [
            (r#"{"a":1}"#, "{}"),
            (r#"{"a":1,"b":2}"#, r#"{"b":2}"#),
            (r#"{"b":2,"a":1}"#, r#"{"b":2}"#),
            (r#"{"b":2,"a":1,"a":3,"c":4}"#, r#"{"b":2,"c":4}"#),
            ("{}", "{}"),
        ] {
            assert_eq!(apply(&f, None, "", body), expected);
        }
        let f = filters(&[], json!({"a": {"b": 1}}), json!({}));
        assert_eq!(apply(&f, None, "", "{}"), r#"{"a":{"b":1}}"#);
        assert_eq!(apply(&f, None, "", "{ }"), r#"{"a":{"b":1} }"#);
    }

    #[test]
    fn paths_reach_into_objects_and_model_is_protected() {
        let f = filters(
            &["kw.x", "none.y", "model"],
            json!({"kw.z": true, "new.deep": 1, "a\\.b": 2, "model": "evil"}),
            json!({}),
        );
        let out = apply(&f, None, "", r#"{"model":"m","kw":{"x":1,"y":2}}"#);
        assert_eq!(
            out,
            r#"{"model":"m","kw":{"y":2,"z":true},"new":{"deep":1},"a.b":2}"#
        );
        let f = filters(&[], json!({"o": {"x": 1}, "o.y": 2}), json!({}));
        assert_eq!(apply(&f, None, "", r#"{"o":5}"#), r#"{"o":{"x":1,"y":2}}"#);
        assert!(Rewrite::new(&filters(&["model"], json!({}), json!({})), None, "").is_none());
    }

    /// Found by fuzzing: `b` came into being, empty.
    #[test]
    fn what_is_removed_as_a_whole_is_not_made_to_remove_a_part() {
        let f = filters(&["b", "b.c.d"], json!({}), json!({}));
        assert_eq!(apply(&f, None, "", r#"{"a":1}"#), r#"{"a":1}"#);
        assert_eq!(apply(&f, None, "", r#"{"b":{"c":1}}"#), "{}");
        let f = filters(&["b", "b.c.d"], json!({"b.e": 1}), json!({}));
        assert_eq!(apply(&f, None, "", r#"{"b":{"c":1}}"#), r#"{"b":{"e":1}}"#);
    }

    #[test]
    fn the_result_is_what_a_parser_would_make() {
        let f = filters(&["b", "c.d"], json!({"e": [1, 2], "c.f": "x"}), json!({}));
        for body in [
            json!({"a": 1, "b": {"c": 2}, "c": {"d": 1, "g": "}"}, "e": 0}),
            json!({"c": 3}),
            json!({}),
        ] {
            let got: Value = serde_json::from_str(&apply(&f, Some("n"), "", &body.to_string())).unwrap();
            let mut want = body.as_object().unwrap().clone();
            want.insert("model".into(), "n".into());
            want.remove("b");
            let c = want.entry("c").or_insert(json!({}));
            match c.as_object_mut() {
                Some(c) => {
                    c.remove("d");
                    c.insert("f".into(), "x".into());
                }
                None => *c = json!({"f": "x"}),
            }
            want.insert("e".into(), json!([1, 2]));
            assert_eq!(got, Value::Object(want));
        }
    }
}

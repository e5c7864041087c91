//! Reads values that `check` has found to be of their type; anything else is as good as absent.

use std::time::Duration;

use crate::check::{boolean, integer};
use crate::types::Json;
use crate::yaml::Node;

/// A text that is there and not empty.
pub(super) fn text(node: &Node, key: &str) -> Option<String> {
    node.get(key)
        .and_then(Node::text)
        .map(|t| t.trim().to_owned())
        .filter(|t| !t.is_empty())
}

pub(super) fn flag(node: &Node, key: &str) -> Option<bool> {
    node.get(key).and_then(boolean)
}

pub(super) fn int(node: &Node, key: &str) -> Option<i64> {
    node.get(key).and_then(integer)
}

/// A number that fits the type, which `check`'s range guarantees.
pub(super) fn number<T: TryFrom<i64>>(node: &Node, key: &str) -> Option<T> {
    int(node, key).and_then(|i| T::try_from(i).ok())
}

pub(super) fn seconds(node: &Node, key: &str) -> Option<Duration> {
    number::<u64>(node, key).map(Duration::from_secs)
}

/// Every text of a list, with its node.
pub(super) fn texts<'n>(node: &'n Node, key: &str) -> Vec<(&'n Node, String)> {
    let items = node.get(key).map(Node::items).unwrap_or_default();
    items
        .iter()
        .filter_map(|item| Some((item, item.text()?.trim().to_owned())))
        .collect()
}

pub(super) fn strings(node: &Node, key: &str) -> Vec<String> {
    texts(node, key).into_iter().map(|(_, text)| text).collect()
}

pub(super) fn object(node: &Node, key: &str) -> Json {
    match node.get(key).map(Node::json) {
        Some(serde_json::Value::Object(map)) => map,
        _ => Json::new(),
    }
}

//! Names: what they stand for, that none stands for two things, and that every reference leads somewhere.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use indexmap::IndexMap;

use super::model::{base_address, filters, timeouts};
use super::read::{flag, number, object, seconds, strings, text, texts};
use crate::check::join;
use crate::diagnostic::{Code, Findings, Pos};
use crate::types::{Model, Peer, Profile, Selector, Strategy};
use crate::yaml::Node;

/// Shortest time between two looks at a peer.
const MIN_REFRESH: Duration = Duration::from_secs(5);

/// What a name stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Meaning {
    /// A model, by its id.
    Model(String),
    /// A model of a peer.
    Peer,
    /// A selector.
    Selector,
}

/// Every name of a configuration.
#[derive(Debug, Default)]
pub(super) struct Names {
    known: BTreeMap<String, Meaning>,
    /// `peer/` of every peer whose models are not written here.
    open: Vec<String>,
}

impl Names {
    /// Gathers ids, aliases, peers' models and selectors, and reports every name that two of them have.
    pub(super) fn collect(root: &Node, models: &IndexMap<String, Model>, findings: &mut Findings) -> Self {
        let mut names = Self::default();
        for id in models.keys() {
            names.known.insert(id.clone(), Meaning::Model(id.clone()));
        }
        let entries = root.get("models").map(Node::entries).unwrap_or_default();
        for entry in entries {
            let path = format!("models.{}.aliases", entry.key);
            let mut own: Vec<String> = Vec::new();
            for (i, (item, alias)) in texts(&entry.value, "aliases").into_iter().enumerate() {
                let path = format!("{path}[{i}]");
                if alias.is_empty() {
                    findings.error(Code::Value, item.at, path, "an alias must not be empty");
                } else if own.contains(&alias) {
                    findings.error(
                        Code::Conflict,
                        item.at,
                        path,
                        format!("duplicate alias `{alias}` in the model itself"),
                    );
                } else {
                    names.alias(&alias, &entry.key, item.at, &path, findings);
                    own.push(alias);
                }
            }
            let by_id = entry.value.get("filters").and_then(|f| f.get("setParamsByID"));
            for name in by_id.map(Node::entries).unwrap_or_default() {
                let path = format!("models.{}.filters.setParamsByID.{}", entry.key, name.key);
                names.alias(&name.key, &entry.key, name.at, &path, findings);
            }
        }
        let bare = names.add_peers(root, findings);
        for entry in root.get("selectors").map(Node::entries).unwrap_or_default() {
            let path = join("selectors", &entry.key);
            names.add(&entry.key, Meaning::Selector, entry.at, &path, findings);
        }
        // A bare name gives way to everything that is called so here.
        for model in bare {
            names.known.entry(model).or_insert(Meaning::Peer);
        }
        names
    }

    fn alias(&mut self, alias: &str, id: &str, at: Pos, path: &str, findings: &mut Findings) {
        match self.known.get(alias) {
            Some(Meaning::Model(owner)) if owner == id => {
                if alias == id {
                    findings.warn(
                        Code::NoEffect,
                        at,
                        path,
                        format!("`{alias}` is the model's id already"),
                    );
                }
            }
            Some(Meaning::Model(owner)) if owner == alias => {
                let message = format!("`{alias}` is the id of a model: an alias would hide it or be hidden");
                findings.error(Code::Conflict, at, path, message);
            }
            Some(Meaning::Model(owner)) => {
                findings.error(
                    Code::Conflict,
                    at,
                    path,
                    format!("duplicate alias `{alias}`: model `{owner}` has it too"),
                );
            }
            _ => {
                self.known.insert(alias.to_owned(), Meaning::Model(id.to_owned()));
            }
        }
    }

    fn add(&mut self, name: &str, meaning: Meaning, at: Pos, path: &str, findings: &mut Findings) {
        match self.known.get(name) {
            None => {
                self.known.insert(name.to_owned(), meaning);
            }
            Some(taken) => {
                let what = match taken {
                    Meaning::Model(id) if id == name => "the id of a model".to_owned(),
                    Meaning::Model(id) => format!("an alias of model `{id}`"),
                    Meaning::Peer => "a model of a peer".to_owned(),
                    Meaning::Selector => "a selector".to_owned(),
                };
                findings.error(Code::Conflict, at, path, format!("`{name}` is already {what}"));
            }
        }
    }

    /// Adds every `peer/model`. Returns the bare names.
    fn add_peers(&mut self, root: &Node, findings: &mut Findings) -> BTreeSet<String> {
        let mut bare = BTreeSet::new();
        for peer in root.get("peers").map(Node::entries).unwrap_or_default() {
            let mut own: Vec<String> = Vec::new();
            if texts(&peer.value, "models").is_empty() {
                self.open.push(format!("{}/", peer.key));
            }
            for (i, (item, model)) in texts(&peer.value, "models").into_iter().enumerate() {
                let path = format!("peers.{}.models[{i}]", peer.key);
                if model.is_empty() {
                    findings.error(Code::Value, item.at, path, "a model's name must not be empty");
                    continue;
                }
                if own.contains(&model) {
                    findings.warn(
                        Code::Conflict,
                        item.at,
                        path,
                        format!("`{model}` is listed twice"),
                    );
                    continue;
                }
                self.add(
                    &format!("{}/{model}", peer.key),
                    Meaning::Peer,
                    item.at,
                    &path,
                    findings,
                );
                bare.insert(model.clone());
                own.push(model);
            }
        }
        bare
    }

    /// The id of the model that a name stands for.
    pub(super) fn model(&self, name: &str) -> Option<&str> {
        match self.known.get(name) {
            Some(Meaning::Model(id)) => Some(id),
            _ => None,
        }
    }

    pub(super) fn get(&self, name: &str) -> Option<&Meaning> {
        let open = || {
            let at = |peer: &String| name.strip_prefix(peer.as_str()).is_some_and(|m| !m.is_empty());
            self.open.iter().any(at).then_some(&Meaning::Peer)
        };
        self.known.get(name).or_else(open)
    }

    /// ` is no known model; did you mean ...?`
    pub(super) fn unknown(&self, name: &str) -> String {
        let near = knobs::closest(name, self.known.keys().map(String::as_str));
        let hint = near.map(|n| format!("; did you mean `{n}`?")).unwrap_or_default();
        format!("references unknown model `{name}`{hint}")
    }
}

pub(super) fn peers(root: &Node, findings: &mut Findings) -> IndexMap<String, Peer> {
    let mut peers = IndexMap::new();
    for entry in root.get("peers").map(Node::entries).unwrap_or_default() {
        let (node, path) = (&entry.value, join("peers", &entry.key));
        let proxy = text(node, "proxy").unwrap_or_default();
        if node.get("proxy").is_some_and(|n| !n.is_null()) {
            base_address(&proxy, node.get("proxy"), &join(&path, "proxy"), findings);
        }
        let mut models: Vec<String> = Vec::new();
        for model in strings(node, "models") {
            if !model.is_empty() && !models.contains(&model) {
                models.push(model);
            }
        }
        let refresh = seconds(node, "refresh").filter(|t| !t.is_zero());
        if models.is_empty() && refresh.is_none() {
            let list = node.get("models").filter(|n| !n.is_null());
            let message = match list {
                Some(_) => "needs at least one model, or `refresh` beside it",
                None => "is missing, and so is `refresh`, which finds the models out",
            };
            findings.error(
                Code::Missing,
                list.map_or(entry.at, |n| n.at),
                join(&path, "models"),
                message,
            );
        }
        let peer = Peer {
            proxy: proxy.trim_end_matches('/').to_owned(),
            models,
            refresh: refresh.map(|t| t.max(MIN_REFRESH)),
            priority: number(node, "priority").unwrap_or(0),
            api_key: text(node, "apiKey"),
            filters: node
                .get("filters")
                .map(|n| filters(n, &join(&path, "filters"), findings))
                .unwrap_or_default(),
            timeouts: timeouts(node.get("timeouts"), 60),
        };
        peers.insert(entry.key.clone(), peer);
    }
    peers
}

pub(super) fn selectors(root: &Node, names: &Names, findings: &mut Findings) -> IndexMap<String, Selector> {
    let mut selectors = IndexMap::new();
    for entry in root.get("selectors").map(Node::entries).unwrap_or_default() {
        let (node, path) = (&entry.value, join("selectors", &entry.key));
        let strategy = match text(node, "strategy").as_deref() {
            Some("warm") => Strategy::Warm,
            Some("spillover") => Strategy::Spillover,
            _ => Strategy::Pin,
        };
        let mut targets: Vec<String> = Vec::new();
        for (i, (item, target)) in texts(node, "targets").into_iter().enumerate() {
            let path = format!("{path}.targets[{i}]");
            match names.get(&target) {
                None => findings.error(Code::UnknownName, item.at, path, names.unknown(&target)),
                Some(Meaning::Selector) => {
                    let message = format!("`{target}` is a selector: selectors do not lead to selectors");
                    findings.error(Code::Value, item.at, path, message);
                }
                Some(Meaning::Peer) if strategy == Strategy::Warm => {
                    let message = format!(
                        "`{target}` is a peer's model: whether it is loaded cannot be known, as `warm` needs"
                    );
                    findings.error(Code::Value, item.at, path, message);
                }
                Some(Meaning::Model(_) | Meaning::Peer) if targets.contains(&target) => {
                    findings.error(
                        Code::Conflict,
                        item.at,
                        path,
                        format!("`{target}` is listed twice"),
                    );
                }
                Some(Meaning::Model(_) | Meaning::Peer) => targets.push(target),
            }
        }
        if let Some(list) = node.get("targets").filter(|n| !n.is_null())
            && list.items().is_empty()
        {
            findings.error(
                Code::Missing,
                list.at,
                join(&path, "targets"),
                "needs at least one target",
            );
        }
        let selector = Selector {
            strategy,
            targets,
            spillover: node
                .get("settings")
                .and_then(|s| number(s, "spillover"))
                .unwrap_or(1),
            name: text(node, "name"),
            description: text(node, "description"),
            unlisted: flag(node, "unlisted").unwrap_or(false),
            metadata: object(node, "metadata"),
        };
        selectors.insert(entry.key.clone(), selector);
    }
    selectors
}

pub(super) fn profiles(root: &Node, names: &Names, findings: &mut Findings) -> IndexMap<String, Profile> {
    let mut profiles = IndexMap::new();
    for entry in root.get("profiles").map(Node::entries).unwrap_or_default() {
        let (node, path) = (&entry.value, join("profiles", &entry.key));
        let mut pins = IndexMap::new();
        let pins_node = node.get("pins").filter(|n| !n.is_null());
        for pin in pins_node.map(Node::entries).unwrap_or_default() {
            let path = format!("{path}.pins.{}", pin.key);
            let target = pin
                .value
                .text()
                .map(|t| t.trim().to_owned())
                .filter(|t| !t.is_empty());
            if let Some(target) = &target
                && names.get(target).is_none()
            {
                findings.error(Code::UnknownName, pin.value.at, path, names.unknown(target));
            }
            pins.insert(pin.key.trim().to_owned(), target);
        }
        if let Some(node) = pins_node
            && pins.is_empty()
        {
            findings.error(
                Code::Missing,
                node.at,
                join(&path, "pins"),
                "needs at least one entry",
            );
        }
        profiles.insert(
            entry.key.clone(),
            Profile {
                description: text(node, "description"),
                pins,
            },
        );
    }
    profiles
}

/// Ids of the models to load at the start. A name that nothing has is a warning: the start must not fail for it.
pub(super) fn preload(root: &Node, names: &Names, findings: &mut Findings) -> Vec<String> {
    let Some(hook) = root.get("hooks").and_then(|h| h.get("on_startup")) else {
        return Vec::new();
    };
    let mut ids: Vec<String> = Vec::new();
    for (i, (item, name)) in texts(hook, "preload").into_iter().enumerate() {
        match names.model(&name) {
            Some(id) if ids.iter().any(|known| known == id) => {}
            Some(id) => ids.push(id.to_owned()),
            None if name.is_empty() => {}
            None => {
                let path = format!("hooks.on_startup.preload[{i}]");
                findings.warn(
                    Code::UnknownName,
                    item.at,
                    path,
                    format!("is left out: {}", names.unknown(&name)),
                );
            }
        }
    }
    ids
}

/// A key for models that do not exist opens nothing; that is worth a word.
pub(super) fn api_key_models(root: &Node, names: &Names, findings: &mut Findings) {
    for (i, key) in root
        .get("apiKeys")
        .map(Node::items)
        .unwrap_or_default()
        .iter()
        .enumerate()
    {
        for (j, (item, name)) in texts(key, "models").into_iter().enumerate() {
            if names.get(&name).is_none() {
                let path = format!("apiKeys[{i}].models[{j}]");
                findings.warn(Code::UnknownName, item.at, path, names.unknown(&name));
            }
        }
    }
}

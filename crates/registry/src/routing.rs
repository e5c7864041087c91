//! What a name leads to, and who must go when a model starts.

use crate::types::{Model, Peer, Registry, Routing, Selector};

/// What a requested name leads to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Target<'r> {
    /// A model of this registry, by id or alias.
    Model(&'r Model),
    /// A selector.
    Selector(&'r Selector),
    /// A model of a peer.
    Peer {
        /// The peer's name here.
        peer_id: &'r str,
        /// The peer.
        peer: &'r Peer,
        /// The model's name there.
        model: &'r str,
    },
}

impl Registry {
    /// Looks up a name: a model's id, an alias, a selector, `peer/model`, or a peer's model by its bare name, in this
    /// order; of several peers that have it, the one that is to be asked first. Profiles are not applied: which of them
    /// is active is not written here, and neither are models that a peer lists itself.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<Target<'_>> {
        if let Some(model) = self.model(name) {
            return Some(Target::Model(model));
        }
        if let Some(selector) = self.selectors.get(name) {
            return Some(Target::Selector(selector));
        }
        let peer_models = || {
            self.peers.iter().flat_map(|(peer_id, peer)| {
                peer.models
                    .iter()
                    .map(move |model| (peer_id.as_str(), peer, model.as_str()))
            })
        };
        let qualified = peer_models().find(|(peer_id, _, model)| {
            name.strip_prefix(peer_id).and_then(|rest| rest.strip_prefix('/')) == Some(model)
        });
        let target = |(peer_id, peer, model)| Target::Peer { peer_id, peer, model };
        if let Some(found) = qualified {
            return Some(target(found));
        }
        let bare = peer_models().filter(|(_, _, model)| *model == name);
        // The first of those with the highest priority.
        bare.reduce(|best, other| {
            if other.1.priority > best.1.priority {
                other
            } else {
                best
            }
        })
        .map(target)
    }

    /// The model with this id or alias.
    #[must_use]
    pub fn model(&self, name: &str) -> Option<&Model> {
        let by_alias = || self.models.values().find(|m| m.aliases.iter().any(|a| a == name));
        self.models.get(name).or_else(by_alias)
    }

    /// The models among `running` that must be unloaded before `target` starts. Ids that are not in the registry (any
    /// more) must go: nothing says that they fit.
    #[must_use]
    pub fn evictions<'i>(&self, target: &str, running: &[&'i str]) -> Vec<&'i str> {
        if running.contains(&target) {
            return Vec::new();
        }
        match &self.routing {
            Routing::Matrix(matrix) => matrix.evictions(target, running),
            Routing::Groups(groups) => {
                let group_of = |id: &str| groups.iter().find(|(_, g)| g.members.iter().any(|m| m == id));
                let Some((own, group)) = group_of(target) else {
                    return running.to_vec();
                };
                let goes = |id: &&str| match group_of(id) {
                    None => true,
                    Some((name, _)) if name == own => group.swap,
                    Some((_, other)) => group.exclusive && !other.persistent,
                };
                running.iter().copied().filter(goes).collect()
            }
        }
    }

    /// Whether all of these can be in memory together without any of them evicting another.
    #[must_use]
    pub fn can_coexist(&self, ids: &[&str]) -> bool {
        ids.iter().all(|target| {
            let others: Vec<&str> = ids.iter().copied().filter(|id| id != target).collect();
            self.evictions(target, &others).is_empty()
        })
    }
}

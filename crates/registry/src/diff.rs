//! What changed between two registries.

use crate::types::Registry;

/// The difference of two registries. Ids are in the order of the new file; removed ones in the order of the old.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RegistryDiff {
    /// Models that were not there.
    pub added: Vec<String>,
    /// Models that are no longer there.
    pub removed: Vec<String>,
    /// Models whose process must be restarted: how it is started has changed.
    pub changed: Vec<String>,
    /// Models that keep their process and get new settings (aliases, ttl, filters, limits, texts).
    pub retuned: Vec<String>,
    /// Models that are as they were.
    pub unchanged: Vec<String>,
    /// Something that is not about one model has changed: globals, groups, selectors, profiles or peers.
    pub globals_changed: bool,
}

impl RegistryDiff {
    /// Whether nothing has changed at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.added.is_empty()
            && self.removed.is_empty()
            && self.changed.is_empty()
            && self.retuned.is_empty()
            && !self.globals_changed
    }
}

impl Registry {
    /// Compares two registries by what they resolve to: moved lines, comments and macros that mean the same are no
    /// difference.
    #[must_use]
    pub fn diff(old: &Self, new: &Self) -> RegistryDiff {
        let mut diff = RegistryDiff::default();
        for (id, model) in &new.models {
            let list = match old.models.get(id) {
                None => &mut diff.added,
                Some(before) if before == model => &mut diff.unchanged,
                Some(before) if before.launch == model.launch => &mut diff.retuned,
                Some(_) => &mut diff.changed,
            };
            list.push(id.clone());
        }
        diff.removed = old
            .models
            .keys()
            .filter(|id| !new.models.contains_key(*id))
            .cloned()
            .collect();
        diff.globals_changed = old.globals != new.globals
            || old.routing != new.routing
            || old.selectors != new.selectors
            || old.profiles != new.profiles
            || old.peers != new.peers;
        diff
    }
}

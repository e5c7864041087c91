//! A checked tree to a [`Registry`]: defaults, and everything that one table cannot say.

mod globals;
mod model;
mod names;
mod read;
mod router;

pub use globals::parse_loopback;

use std::collections::BTreeMap;
use std::path::PathBuf;

use indexmap::IndexMap;

use crate::check::join;
use crate::diagnostic::Findings;
use crate::types::Registry;
use crate::yaml::Node;

/// Decodes the whole tree. When `findings` has errors, the registry is of no use.
pub(crate) fn decode(
    root: &Node,
    bases: &[PathBuf],
    ports: &BTreeMap<String, u16>,
    findings: &mut Findings,
) -> Registry {
    let mut globals = globals::globals(root, bases, findings);
    let mut models = IndexMap::new();
    for entry in root.get("models").map(Node::entries).unwrap_or_default() {
        let path = join("models", &entry.key);
        let context = model::Context {
            globals: &globals,
            bases,
            port: ports.get(&entry.key).copied(),
        };
        let model = model::model(entry, &path, &context, findings);
        models.insert(entry.key.clone(), model);
    }
    let names = names::Names::collect(root, &models, findings);
    let peers = names::peers(root, findings);
    let selectors = names::selectors(root, &names, findings);
    let profiles = names::profiles(root, &names, findings);
    let routing = router::routing(root, &models, findings);
    router::priorities(root, &mut models, &names, findings);
    names::api_key_models(root, &names, findings);
    globals.preload = names::preload(root, &names, findings);
    let registry = Registry {
        models,
        globals,
        routing,
        selectors,
        profiles,
        peers,
    };
    router::spillover_targets_fit(root, &registry, findings);
    registry
}

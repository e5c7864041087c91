//! The registry's groups and matrix as the lifecycle asks for them.

use std::sync::Arc;

use lifecycle::{ModelId, Residency};
use registry::Registry;

#[derive(Debug)]
struct ByRegistry(Arc<Registry>);

impl Residency for ByRegistry {
    fn evictions<'a>(&self, target: &ModelId, running: &[&'a ModelId]) -> Vec<&'a ModelId> {
        let ids: Vec<&str> = running.iter().map(|m| &***m).collect();
        let out = self.0.evictions(target, &ids);
        running
            .iter()
            .filter(|m| out.contains(&&****m))
            .copied()
            .collect()
    }
}

/// The rule of this registry.
#[must_use]
pub fn of(registry: &Arc<Registry>) -> Arc<dyn Residency> {
    Arc::new(ByRegistry(registry.clone()))
}

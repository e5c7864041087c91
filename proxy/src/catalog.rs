//! The registry as the proxy asks it: which model answers to a name, under which rules.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use lifecycle::{Abandoned, Config, Fairness, MemoryPolicy, ModelId, Policy};
use regex::Regex;
use registry::Registry;

use crate::peers::Peers;
use crate::process::Definition;
use crate::residency;
use crate::rewrite::Rewrite;
use crate::select::Destination;

/// One registry in force, with its names looked up once.
#[derive(Debug)]
pub struct Catalog {
    /// The registry itself.
    pub registry: Arc<Registry>,
    /// Other servers.
    pub peers: Peers,
    names: HashMap<Box<str>, ModelId>,
    definitions: HashMap<ModelId, Arc<Definition>>,
    /// Paths below `/upstream` that never start a model, from the first such request: the machinery for patterns is a
    /// large part of the program, which most never need.
    ignored: OnceLock<Vec<Regex>>,
    /// By requested name; names that change nothing are absent.
    rewrites: HashMap<Box<str>, Rewrite>,
}

impl Catalog {
    /// Indexes a registry.
    #[must_use]
    pub fn new(registry: Registry) -> Self {
        Self::following(registry, None)
    }

    /// As [`Catalog::new`], with what peers are known for from the catalog before.
    #[must_use]
    pub fn following(registry: Registry, before: Option<&Self>) -> Self {
        let mut names = HashMap::new();
        let mut definitions = HashMap::new();
        let mut rewrites = HashMap::new();
        for (id, model) in &registry.models {
            let model_id: ModelId = id.as_str().into();
            for alias in &model.aliases {
                names.insert(alias.as_str().into(), model_id.clone());
            }
            for name in model.aliases.iter().chain([id]) {
                if let Some(rewrite) = Rewrite::new(&model.filters, model.use_model_name.as_deref(), name) {
                    rewrites.insert(name.as_str().into(), rewrite);
                }
            }
            let definition = Definition {
                id: model_id.clone(),
                launch: model.launch.clone(),
                limits: (&model.timeouts).into(),
            };
            definitions.insert(model_id, Arc::new(definition));
        }
        // A model's own id wins over any alias.
        names.extend(definitions.keys().map(|id| (Box::from(&**id), id.clone())));
        Self {
            ignored: OnceLock::new(),
            peers: Peers::new(&registry, before.map(|b| &b.peers)),
            registry: Arc::new(registry),
            names,
            definitions,
            rewrites,
        }
    }

    /// The model that answers to this id or alias.
    #[must_use]
    pub fn resolve(&self, name: &str) -> Option<&ModelId> {
        self.names.get(name)
    }

    /// What is to be changed in JSON bodies that ask for this name.
    #[must_use]
    pub fn rewrite(&self, name: &str) -> Option<&Rewrite> {
        self.rewrites.get(name)
    }

    /// Whether a request for this path below `/upstream` never starts a model.
    #[must_use]
    pub fn never_starts(&self, path: &str) -> bool {
        let ignored = self.ignored.get_or_init(|| {
            let patterns = self.registry.globals.ignore_paths.iter();
            // The registry has checked them.
            patterns.filter_map(|p| Regex::new(p).ok()).collect()
        });
        ignored.iter().any(|p| p.is_match(path))
    }

    /// Where the longest id, alias or peer's model that `path` (without a leading slash) begins with leads, and what
    /// follows it: empty, or beginning with a slash.
    #[must_use]
    pub fn resolve_prefix<'a>(&self, path: &'a str) -> Option<(Destination, &'a str)> {
        let mut ends: Vec<usize> = path.match_indices('/').map(|(i, _)| i).collect();
        ends.push(path.len());
        ends.iter().rev().find_map(|end| {
            let (name, rest) = path.split_at_checked(*end)?;
            Some((self.destination(name)?, rest))
        })
    }

    /// Where an id, an alias or the name of a peer's model leads.
    #[must_use]
    pub fn destination(&self, name: &str) -> Option<Destination> {
        if let Some(model) = self.names.get(name) {
            return Some(Destination::Model(model.clone()));
        }
        let far = self.peers.find(name);
        (!far.is_empty()).then_some(Destination::Peers(far))
    }

    /// The name most like `name`, for error messages.
    #[must_use]
    pub fn near(&self, name: &str) -> Option<String> {
        let far = self.peers.models();
        let own = self.names.keys().map(|k| &**k);
        knobs::closest(name, own.chain(far.keys().map(String::as_str))).map(str::to_owned)
    }

    /// How a model is started.
    #[must_use]
    pub fn definition(&self, id: &str) -> Option<&Arc<Definition>> {
        self.definitions.get(id)
    }

    /// A model's registry entry.
    #[must_use]
    pub fn model(&self, id: &str) -> Option<&registry::Model> {
        self.registry.models.get(id)
    }

    /// The rules for the lifecycle.
    #[must_use]
    pub fn rules(&self) -> Config {
        let scheduler = &self.registry.globals.scheduler;
        let policy = |m: &registry::Model| Policy {
            concurrency_limit: m.concurrency_limit,
            queue_limit: scheduler.max_queue,
            max_wait_ms: millis(scheduler.max_queue_age),
            ttl_ms: m.ttl.map(millis),
            drain_grace_ms: millis(m.unload_timeout),
            stop_grace_ms: millis(m.unload_timeout),
            start_timeout_ms: millis(m.health_check_timeout),
            priority: m.priority,
            min_stay_ms: millis(scheduler.min_stay),
            abandoned: if scheduler.keep_abandoned_loads {
                Abandoned::Keep
            } else {
                Abandoned::Cancel
            },
        };
        Config {
            models: self
                .registry
                .models
                .iter()
                .map(|(id, m)| (id.as_str().into(), policy(m)))
                .collect(),
            residency: residency::of(&self.registry),
            fairness: Fairness {
                max_passed: scheduler.max_passed,
                max_passing_ms: millis(scheduler.max_wait),
                ..Fairness::default()
            },
            memory: self.registry.globals.memory.as_ref().map(|m| MemoryPolicy {
                warning_hold_ms: millis(m.warning_hold),
                evict_gap_ms: millis(m.evict_gap),
                recover_ms: millis(m.recover),
                max_wait_ms: millis(m.max_wait),
                cut_after_ms: m.cut_after.map(millis),
            }),
        }
    }
}

fn millis(d: Duration) -> u64 {
    u64::try_from(d.as_millis()).unwrap_or(u64::MAX)
}

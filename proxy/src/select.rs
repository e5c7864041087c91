//! From a requested name to a model: the active profile's pins, then selectors, then ids and aliases.

use api_types::error::ApiError;
use lifecycle::{ModelId, ModelStatus, State};
use registry::{Selector, Strategy};

use crate::catalog::Catalog;

/// Where a name leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The model.
    pub model: ModelId,
    /// The name of a pin's or selector's target, which takes the requested one's place in the body.
    pub target: Option<String>,
}

/// Why it leads nowhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Nowhere {
    /// Nothing has this name.
    Unknown,
    /// The active profile switches the name off.
    SwitchedOff,
    /// A selector without a target that can serve.
    NoTarget,
}

/// Follows a name. `status` tells the state of a model.
///
/// # Errors
/// It leads nowhere.
pub fn follow(
    catalog: &Catalog,
    profile: Option<&str>,
    name: &str,
    status: impl Fn(&ModelId) -> Option<ModelStatus>,
) -> Result<Choice, Nowhere> {
    let registry = &catalog.registry;
    let pin = profile
        .and_then(|p| registry.profiles.get(p))
        .and_then(|p| p.pins.get(name));
    let (name, pinned) = match pin {
        Some(None) => return Err(Nowhere::SwitchedOff),
        Some(Some(target)) => (target.as_str(), true),
        None => (name, false),
    };
    if let Some(selector) = registry.selectors.get(name) {
        return choose(catalog, selector, status).ok_or(Nowhere::NoTarget);
    }
    let model = catalog.resolve(name).ok_or(Nowhere::Unknown)?.clone();
    Ok(Choice {
        model,
        target: pinned.then(|| name.to_owned()),
    })
}

fn choose(
    catalog: &Catalog,
    selector: &Selector,
    status: impl Fn(&ModelId) -> Option<ModelStatus>,
) -> Option<Choice> {
    let targets: Vec<(&String, &ModelId, ModelStatus)> = selector
        .targets
        .iter()
        .filter_map(|t| {
            let model = catalog.resolve(t)?;
            Some((t, model, status(model)?))
        })
        .collect();
    let state = |wanted: State| targets.iter().find(move |(_, _, s)| s.state == wanted);
    let found = match selector.strategy {
        Strategy::Pin => targets.first(),
        Strategy::Warm => state(State::Ready)
            .or_else(|| state(State::Starting))
            .or(targets.first()),
        Strategy::Spillover => {
            let busy = |s: &ModelStatus| u64::from(s.inflight) + s.waiting as u64;
            let active = targets
                .iter()
                .filter(|(_, _, s)| matches!(s.state, State::Ready | State::Starting));
            let least = active.min_by_key(|(_, _, s)| busy(s));
            match least {
                Some(target) if busy(&target.2) < u64::from(selector.spillover) => Some(target),
                _ => state(State::Stopped).or(least),
            }
        }
    };
    found.map(|(name, model, _)| Choice {
        model: (*model).clone(),
        target: Some((*name).clone()),
    })
}

impl Nowhere {
    /// As an error for the client.
    #[must_use]
    pub fn to_error(&self, catalog: &Catalog, name: &str) -> ApiError {
        match self {
            Self::Unknown => crate::http::error::unknown_model(catalog, name),
            Self::SwitchedOff => {
                ApiError::model_not_found(format!("the active profile switches '{name}' off"))
            }
            Self::NoTarget => ApiError::unavailable(
                "no_target",
                format!("no target of selector '{name}' can serve now"),
                Some(1),
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    const CONFIG: &str = "
models:
  a: {cmd: 'x --port ${PORT}', aliases: [al]}
  b: {cmd: 'x --port ${PORT}'}
groups: {g: {swap: false, members: [a, b]}}
selectors:
  first: {strategy: pin, targets: [al, b]}
  hot: {strategy: warm, targets: [a, b]}
  wide: {strategy: spillover, targets: [a, b], settings: {spillover: 2}}
profiles:
  day: {pins: {main: b, a: null, sel: hot}}
";

    fn catalog() -> Catalog {
        let (registry, _) = registry::Registry::from_yaml(CONFIG, Path::new("c.yaml")).unwrap();
        Catalog::new(registry)
    }

    fn status(state: State, inflight: u32) -> Option<ModelStatus> {
        Some(ModelStatus {
            state,
            instance: None,
            inflight,
            waiting: 0,
            failures: 0,
            failure: None,
            retry_in_ms: 0,
            expires_in_ms: None,
        })
    }

    fn model(profile: Option<&str>, name: &str, a: (State, u32), b: (State, u32)) -> Result<String, Nowhere> {
        let of = |m: &ModelId| {
            if &**m == "a" {
                status(a.0, a.1)
            } else {
                status(b.0, b.1)
            }
        };
        follow(&catalog(), profile, name, of).map(|c| c.model.to_string())
    }

    #[test]
    fn pins_then_selectors_then_names() {
        use State::{Ready, Starting, Stopped, Stopping};
        let (cold, warm) = ((Stopped, 0), (Ready, 0));
        assert_eq!(model(None, "al", cold, cold).unwrap(), "a");
        assert_eq!(model(None, "main", cold, cold), Err(Nowhere::Unknown));
        assert_eq!(model(Some("day"), "main", cold, cold).unwrap(), "b");
        assert_eq!(model(Some("day"), "a", cold, cold), Err(Nowhere::SwitchedOff));
        assert_eq!(model(Some("day"), "sel", cold, warm).unwrap(), "b");
        assert_eq!(model(None, "first", cold, warm).unwrap(), "a");
        assert_eq!(model(None, "hot", cold, (Starting, 0)).unwrap(), "b");
        assert_eq!(model(None, "hot", cold, cold).unwrap(), "a");
        assert_eq!(model(None, "wide", (Ready, 1), cold).unwrap(), "a");
        assert_eq!(model(None, "wide", (Ready, 2), cold).unwrap(), "b", "spills over");
        assert_eq!(
            model(None, "wide", (Ready, 5), (Ready, 3)).unwrap(),
            "b",
            "the least busy"
        );
        assert_eq!(
            model(None, "wide", (Stopping, 0), (Stopping, 0)),
            Err(Nowhere::NoTarget)
        );
        let choice = follow(&catalog(), None, "first", |_| status(Stopped, 0)).unwrap();
        assert_eq!(choice.target.as_deref(), Some("al"));
    }
}

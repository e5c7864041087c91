//! From a requested name to a model: the active profile's pins, then selectors, then ids and aliases.

use api_types::error::ApiError;
use lifecycle::{ModelId, ModelStatus, State};
use registry::{Selector, Strategy};

use crate::catalog::Catalog;
use crate::peers::Far;

/// Where a name leads.
#[derive(Clone, Debug)]
pub struct Choice {
    /// The model, here or elsewhere.
    pub to: Destination,
    /// The name of a pin's or selector's target, which takes the requested one's place in the body.
    pub target: Option<String>,
    /// The model of this machine, and its name as a target, that serves should no peer take the request.
    pub otherwise: Option<(ModelId, String)>,
    /// The selector that has chosen.
    pub selector: Option<String>,
}

impl Choice {
    /// The model, if it is one of this machine.
    #[must_use]
    pub fn model(&self) -> Option<&ModelId> {
        match &self.to {
            Destination::Model(model) => Some(model),
            Destination::Peers(_) => None,
        }
    }
}

/// Who serves.
#[derive(Clone, Debug)]
pub enum Destination {
    /// A model of this machine.
    Model(ModelId),
    /// Peers that have the model, in the order in which to ask; never empty.
    Peers(Vec<Far>),
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
    /// A selector without a target that this client may use.
    NotPermitted,
}

/// Whether a client may use a model or a peer's model; `None`: every one.
pub type Permits<'p> = Option<&'p dyn Fn(&str) -> bool>;

/// Follows a name. `status` tells the state of a model; selectors choose among what `permits` accepts.
///
/// # Errors
/// It leads nowhere.
pub fn follow(
    catalog: &Catalog,
    profile: Option<&str>,
    name: &str,
    status: impl Fn(&ModelId) -> Option<ModelStatus>,
    permits: Permits<'_>,
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
        let choice = choose(catalog, selector, status, permits)?;
        return Ok(Choice {
            selector: Some(name.to_owned()),
            ..choice
        });
    }
    Ok(Choice {
        to: catalog.destination(name).ok_or(Nowhere::Unknown)?,
        target: pinned.then(|| name.to_owned()),
        otherwise: None,
        selector: None,
    })
}

/// A selector's target that can be asked now.
enum Target<'a> {
    Here(&'a str, &'a ModelId, ModelStatus),
    There(&'a str, Vec<Far>),
}

impl Target<'_> {
    /// Requests that it has of ours, waiting ones included.
    fn busy(&self) -> u64 {
        match self {
            Self::Here(_, _, s) => u64::from(s.inflight) + s.waiting as u64,
            Self::There(_, far) => far.first().map_or(0, |f| u64::from(f.busy())),
        }
    }

    fn is(&self, wanted: State) -> bool {
        matches!(self, Self::Here(_, _, s) if s.state == wanted)
    }

    /// It serves without a model having to be started.
    fn is_active(&self) -> bool {
        match self {
            Self::Here(..) => self.is(State::Ready) || self.is(State::Starting),
            Self::There(_, far) => far.iter().any(|f| f.peer.rests().is_none()),
        }
    }

    fn is_there(&self) -> bool {
        matches!(self, Self::There(..))
    }
}

fn choose(
    catalog: &Catalog,
    selector: &Selector,
    status: impl Fn(&ModelId) -> Option<ModelStatus>,
    permits: Permits<'_>,
) -> Result<Choice, Nowhere> {
    let mut refused = false;
    let mut targets = Vec::new();
    for t in &selector.targets {
        match catalog.resolve(t) {
            Some(model) if permits.is_some_and(|may| !may(model)) => refused = true,
            Some(model) => targets.extend(status(model).map(|s| Target::Here(t, model, s))),
            None => {
                let mut far = catalog.peers.find(t);
                if let Some(may) = permits {
                    let all = far.len();
                    far.retain(|f| may(&f.name()));
                    refused |= far.len() < all;
                }
                if !far.is_empty() {
                    targets.push(Target::There(t, far));
                }
            }
        }
        // A pin is the first that there is: where that is not permitted, nothing takes its place.
        if selector.strategy == Strategy::Pin && (refused || !targets.is_empty()) {
            break;
        }
    }
    if targets.is_empty() && refused {
        return Err(Nowhere::NotPermitted);
    }
    let found = match selector.strategy {
        Strategy::Pin => targets.first(),
        Strategy::Warm => targets
            .iter()
            .find(|t| t.is(State::Ready))
            .or_else(|| targets.iter().find(|t| t.is(State::Starting)))
            .or(targets.first()),
        Strategy::Spillover => spill(&targets, u64::from(selector.spillover)),
    };
    let choice = found.map(|target| match target {
        Target::Here(name, model, _) => Choice {
            to: Destination::Model((*model).clone()),
            target: Some((*name).to_owned()),
            otherwise: None,
            selector: None,
        },
        Target::There(name, far) => Choice {
            to: Destination::Peers(far.clone()),
            target: Some((*name).to_owned()),
            otherwise: if selector.strategy == Strategy::Spillover {
                stand_in(&targets)
            } else {
                None
            },
            selector: None,
        },
    });
    choice.ok_or(Nowhere::NoTarget)
}

/// The model of this machine that is least busy.
fn stand_in(targets: &[Target<'_>]) -> Option<(ModelId, String)> {
    let here = |t: &&Target<'_>| t.is(State::Stopped) || (t.is_active() && !t.is_there());
    let found = targets.iter().filter(here).min_by_key(|t| t.busy());
    match found {
        Some(Target::Here(name, model, _)) => Some(((*model).clone(), (*name).to_owned())),
        _ => None,
    }
}

/// The target that is to take one more request, each of them up to `room` while another has some left.
///
/// Neighbours of one kind are filled together, models of this machine before the peers behind them (or the other way
/// round, as they are listed): among models the least busy one, or a cold one when all are full; among peers the first
/// with room. When nobody has room, the least busy of all.
fn spill<'t, 'a>(targets: &'t [Target<'a>], room: u64) -> Option<&'t Target<'a>> {
    for run in targets.chunk_by(|a, b| a.is_there() == b.is_there()) {
        let mut active = run.iter().filter(|t| t.is_active());
        let found = match run.first() {
            Some(Target::There(..)) => active.find(|t| t.busy() < room),
            _ => active
                .min_by_key(|t| t.busy())
                .filter(|t| t.busy() < room)
                .or_else(|| run.iter().find(|t| t.is(State::Stopped))),
        };
        if found.is_some() {
            return found;
        }
    }
    targets.iter().filter(|t| t.is_active()).min_by_key(|t| t.busy())
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
            Self::NotPermitted => crate::http::error::not_permitted(name),
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
  out: {strategy: spillover, targets: [a, near/x, far/x], settings: {spillover: 2}}
  away: {strategy: pin, targets: [seen/x, b, a]}
peers:
  seen: {proxy: 'http://seen', refresh: 60}
  near: {proxy: 'http://near', models: [x]}
  far: {proxy: 'http://far', models: [x]}
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
        follow(&catalog(), profile, name, of, None).map(|c| match c.to {
            Destination::Model(model) => model.to_string(),
            Destination::Peers(far) => far[0].name().to_string(),
        })
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
        assert_eq!(model(None, "near/x", cold, cold).unwrap(), "near/x");
        let choice = follow(&catalog(), None, "first", |_| status(Stopped, 0), None).unwrap();
        assert_eq!(choice.target.as_deref(), Some("al"));
    }

    #[test]
    fn selectors_choose_among_what_is_permitted() {
        let catalog = catalog();
        let chosen = |name: &str, allowed: &[&str]| {
            let may = |model: &str| allowed.contains(&model);
            let choice = follow(&catalog, None, name, |_| status(State::Stopped, 0), Some(&may));
            choice.map(|c| {
                let to = match c.to {
                    Destination::Model(model) => model.to_string(),
                    Destination::Peers(far) => far[0].name().to_string(),
                };
                (to, c.otherwise.map(|(model, _)| model.to_string()))
            })
        };
        let to = |name: &str| Ok((name.to_owned(), None));
        assert_eq!(chosen("hot", &["b"]), to("b"));
        assert_eq!(
            chosen("out", &["far/x"]),
            to("far/x"),
            "nobody of this machine stands in"
        );
        assert_eq!(chosen("out", &["a", "far/x"]), to("a"));
        assert_eq!(chosen("out", &["b"]), Err(Nowhere::NotPermitted));
        assert_eq!(chosen("first", &["a"]), to("a"));
        assert_eq!(chosen("first", &["b"]), Err(Nowhere::NotPermitted), "a pin");
        assert_eq!(
            chosen("away", &["b"]),
            Err(Nowhere::NotPermitted),
            "it may be there"
        );
        catalog
            .peers
            .iter()
            .find(|p| p.id == "seen")
            .unwrap()
            .saw(Vec::new());
        assert_eq!(chosen("away", &["b"]), to("b"), "it is not there, for nobody");
        assert_eq!(chosen("away", &["a"]), Err(Nowhere::NotPermitted));
    }

    #[test]
    fn what_has_no_room_here_goes_to_peers() {
        use State::{BackOff, Ready, Stopped};
        let catalog = catalog();
        let chosen = |state, inflight| {
            let choice = follow(&catalog, None, "out", |_| status(state, inflight), None).unwrap();
            match choice.to {
                Destination::Model(model) => model.to_string(),
                Destination::Peers(far) => far[0].name().to_string(),
            }
        };
        let at = |name: &str| catalog.peers.visit(&catalog.peers.find(name)[0]);
        assert_eq!(chosen(Stopped, 0), "a", "this machine first, even if cold");
        assert_eq!(chosen(Ready, 1), "a");
        assert_eq!(chosen(Ready, 2), "near/x", "full");
        assert_eq!(chosen(BackOff, 0), "near/x", "cannot be started");
        let near = [at("near/x"), at("near/x")];
        assert_eq!(chosen(Ready, 2), "far/x");
        let far = [at("far/x"), at("far/x"), at("far/x")];
        assert_eq!(chosen(Ready, 5), "near/x", "all full: the least busy");
        assert_eq!(chosen(Ready, 1), "a");
        drop((near, far));
        let peer = catalog.peers.find("near/x")[0].peer.clone();
        peer.failed("refused");
        peer.failed("refused");
        assert_eq!(chosen(Ready, 2), "far/x", "one that rests is left out");
    }
}

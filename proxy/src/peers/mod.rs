//! Other servers whose models appear here: which there are, how they are, what they have.
//!
//! A peer keeps its state (health, connections, the models it was seen to have) over reloads that leave its entry as
//! it was.

pub mod refresh;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use indexmap::IndexMap;
use lifecycle::ModelId;
use parking_lot::Mutex;
use registry::Registry;
use serde_json::{Value, json};
use tokio::sync::{Notify, watch};

use crate::upstream::{Address, Pool, SharedPool};

/// Failures in a row after which a peer is not asked for a while.
const PATIENCE: u32 = 2;
/// That while: doubled with every failure.
const FIRST_REST: Duration = Duration::from_millis(500);
const LONGEST_REST: Duration = Duration::from_secs(10);

/// All peers of one registry.
#[derive(Debug, Default)]
pub struct Peers {
    /// In the order in which they are asked for a model that several have.
    all: Vec<Arc<Peer>>,
    traffic: Arc<Traffic>,
}

/// Requests at peers, those that have left the registry included.
#[derive(Debug, Default)]
struct Traffic {
    running: Mutex<usize>,
    none: Notify,
    /// Upgraded connections end.
    cut: watch::Sender<bool>,
}

/// One peer.
#[derive(Debug)]
pub struct Peer {
    /// Its name here.
    pub id: String,
    /// Its entry in the registry.
    pub entry: registry::Peer,
    /// Connections.
    pub pool: SharedPool,
    /// Path that goes before every path; empty or without a trailing slash.
    pub prefix: String,
    /// What it calls itself, for `Host`.
    pub host: HeaderValue,
    /// `Bearer ...` and the key itself.
    keys: Option<(HeaderValue, HeaderValue)>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Models that it was seen to have; `None`: nobody has looked.
    seen: Option<Arc<[String]>>,
    /// When it was seen.
    looked: Option<Instant>,
    /// Looking at it has begun.
    watched: bool,
    /// Failures in a row, and what the last one was.
    failures: u32,
    error: Option<String>,
    rest_until: Option<Instant>,
    running: HashMap<String, u32>,
}

/// A model at a peer.
#[derive(Clone, Debug)]
pub struct Far {
    /// The peer.
    pub peer: Arc<Peer>,
    /// The model's name there.
    pub model: String,
}

impl Far {
    /// `peer/model`.
    #[must_use]
    pub fn name(&self) -> ModelId {
        format!("{}/{}", self.peer.id, self.model).into()
    }

    /// Requests that it has of ours.
    #[must_use]
    pub fn busy(&self) -> u32 {
        self.peer
            .state
            .lock()
            .running
            .get(&self.model)
            .copied()
            .unwrap_or(0)
    }
}

/// One request at a peer, counted until dropped.
#[derive(Debug)]
pub struct Visit {
    /// Where.
    pub far: Far,
    traffic: Arc<Traffic>,
}

impl Visit {
    /// Returns when connections that have no end of their own have to end.
    pub async fn cut(&self) {
        let mut cut = self.traffic.cut.subscribe();
        let _ = cut.wait_for(|cut| *cut).await;
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        let mut state = self.far.peer.state.lock();
        if let Some(count) = state.running.get_mut(&self.far.model) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                state.running.remove(&self.far.model);
            }
        }
        drop(state);
        let mut running = self.traffic.running.lock();
        *running = running.saturating_sub(1);
        if *running == 0 {
            self.traffic.none.notify_waiters();
        }
    }
}

impl Peers {
    /// The peers of a registry. `old` ones whose entry is the same live on.
    #[must_use]
    pub fn new(registry: &Registry, old: Option<&Self>) -> Self {
        let mut all: Vec<Arc<Peer>> = Vec::new();
        for (id, entry) in &registry.peers {
            let same = old.and_then(|o| o.all.iter().find(|p| p.id == *id && p.entry == *entry));
            match same
                .cloned()
                .map_or_else(|| Peer::new(id, entry).map(Arc::new), Ok)
            {
                Ok(peer) => all.push(peer),
                Err(why) => tracing::error!(peer = %id, "left out: {why}"),
            }
        }
        // Stable: the file's order among equals.
        all.sort_by_key(|p| std::cmp::Reverse(p.entry.priority));
        let traffic = old.map(|o| o.traffic.clone()).unwrap_or_default();
        Self { all, traffic }
    }

    /// All of them, in the order in which they are asked.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Peer>> {
        self.all.iter()
    }

    /// Where `peer/model`, or a bare name, leads: more than one place if several peers have the model, in the order in
    /// which to ask, those that rest last. Empty: nowhere.
    #[must_use]
    pub fn find(&self, name: &str) -> Vec<Far> {
        let far = |peer: &Arc<Peer>, model: &str| Far {
            peer: peer.clone(),
            model: model.to_owned(),
        };
        let qualified = self.all.iter().find_map(|peer| {
            let model = name.strip_prefix(peer.id.as_str())?.strip_prefix('/')?;
            peer.may_have(model).then(|| far(peer, model))
        });
        if let Some(found) = qualified {
            return vec![found];
        }
        let has = |peer: &&Arc<Peer>| peer.models().iter().any(|m| m == name);
        let mut found: Vec<Far> = self.all.iter().filter(has).map(|p| far(p, name)).collect();
        found.sort_by_key(|f| f.peer.rests().is_some());
        found
    }

    /// Counts a request.
    #[must_use]
    pub fn visit(&self, far: &Far) -> Visit {
        *self.traffic.running.lock() += 1;
        *far.peer
            .state
            .lock()
            .running
            .entry(far.model.clone())
            .or_default() += 1;
        Visit {
            far: far.clone(),
            traffic: self.traffic.clone(),
        }
    }

    /// Returns when no request is at any peer.
    pub async fn quiet(&self) {
        loop {
            let none = self.traffic.none.notified();
            if *self.traffic.running.lock() == 0 {
                return;
            }
            none.await;
        }
    }

    /// Ends connections that have no end of their own.
    pub fn cut(&self) {
        self.traffic.cut.send_replace(true);
    }

    /// `peer/model` of every model, sorted, with its peer.
    #[must_use]
    pub fn models(&self) -> IndexMap<String, Far> {
        let mut rows = IndexMap::new();
        for peer in &self.all {
            for model in peer.models().iter() {
                let far = Far {
                    peer: peer.clone(),
                    model: model.clone(),
                };
                rows.insert(far.name().to_string(), far);
            }
        }
        rows.sort_unstable_keys();
        rows
    }
}

impl Peer {
    fn new(id: &str, entry: &registry::Peer) -> Result<Self, String> {
        let address = Address::parse(&entry.proxy)?;
        let value = |text: &str| {
            let value = HeaderValue::from_str(text);
            value.map_err(|_| "its apiKey or address holds what no header can hold".to_owned())
        };
        let secret = |text: &str| {
            let mut value = value(text)?;
            value.set_sensitive(true);
            Ok::<_, String>(value)
        };
        let keys = match &entry.api_key {
            Some(key) => Some((secret(&format!("Bearer {key}"))?, secret(key)?)),
            None => None,
        };
        Ok(Self {
            id: id.to_owned(),
            host: value(&address.authority)?,
            pool: Pool::far(&address, (&entry.timeouts).into()),
            entry: entry.clone(),
            prefix: address.prefix,
            keys,
            state: Mutex::default(),
        })
    }

    /// Shows the peer its own key.
    pub fn present_key(&self, headers: &mut HeaderMap) {
        if let Some((bearer, key)) = &self.keys {
            headers.insert(AUTHORIZATION, bearer.clone());
            headers.insert("x-api-key", key.clone());
        }
    }

    /// Models that it has: those of its entry, else those that it was seen to have.
    #[must_use]
    pub fn models(&self) -> Arc<[String]> {
        if !self.entry.models.is_empty() {
            return self.entry.models.as_slice().into();
        }
        self.state.lock().seen.clone().unwrap_or_default()
    }

    /// Whether it has this model, or might: nobody has looked yet.
    fn may_have(&self, model: &str) -> bool {
        let unseen = || self.entry.models.is_empty() && self.state.lock().seen.is_none();
        !model.is_empty() && (self.models().iter().any(|m| m == model) || unseen())
    }

    /// How long it will not be asked, and why, after failures in a row.
    #[must_use]
    pub fn rests(&self) -> Option<(Duration, String)> {
        let state = self.state.lock();
        let left = state.rest_until?.checked_duration_since(Instant::now())?;
        let why = state.error.clone().unwrap_or_default();
        (!left.is_zero()).then_some((left, why))
    }

    /// It has answered.
    pub fn answered(&self) {
        let mut state = self.state.lock();
        if state.failures > 0 {
            tracing::info!(peer = %self.id, "answers again");
            state.failures = 0;
            state.error = None;
            state.rest_until = None;
        }
    }

    /// It could not be reached.
    pub fn failed(&self, why: &str) {
        let mut state = self.state.lock();
        state.failures = state.failures.saturating_add(1);
        if state.error.as_deref() != Some(why) {
            tracing::warn!(peer = %self.id, "not reached: {why}");
            state.error = Some(why.to_owned());
        }
        if let Some(beyond) = state.failures.checked_sub(PATIENCE) {
            let rest = FIRST_REST.saturating_mul(1 << beyond.min(8));
            state.rest_until = Some(Instant::now() + rest.min(LONGEST_REST));
        }
    }

    fn looked_at(&self) -> bool {
        self.state.lock().watched
    }

    fn mark_looked_at(&self) {
        self.state.lock().watched = true;
    }

    /// Takes note of the models that it says it has.
    pub(crate) fn saw(&self, models: Vec<String>) {
        let mut state = self.state.lock();
        state.looked = Some(Instant::now());
        if state.seen.as_deref() != Some(models.as_slice()) {
            tracing::info!(peer = %self.id, models = models.len(), "models seen");
            state.seen = Some(models.into());
        }
    }

    /// Whether the last attempt to reach it went well, or there was none.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.state.lock().failures == 0
    }

    /// Requests that it has of ours.
    #[must_use]
    pub fn busy(&self) -> u32 {
        self.state.lock().running.values().sum()
    }

    /// For people and programs; the key is not in it.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let models = self.models();
        let state = self.state.lock();
        let listed = |m: &String| state.seen.as_ref().map(|seen| seen.contains(m));
        let models: Vec<Value> = models
            .iter()
            .map(|m| json!({"id": m, "listed": listed(m), "inflight": state.running.get(m).unwrap_or(&0)}))
            .collect();
        json!({
            "id": self.id,
            "proxy": self.entry.proxy,
            "priority": self.entry.priority,
            "up": state.failures == 0,
            "error": state.error,
            "failures": state.failures,
            "looked_s_ago": state.looked.map(|at| at.elapsed().as_secs()),
            "models": models,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn peers(text: &str, old: Option<&Peers>) -> Peers {
        let (registry, _) = Registry::from_yaml(text, Path::new("c.yaml")).unwrap();
        Peers::new(&registry, old)
    }

    fn names(peers: &Peers, name: &str) -> Vec<String> {
        peers.find(name).iter().map(|f| f.name().to_string()).collect()
    }

    const CONFIG: &str = "peers:
  a: {proxy: 'http://a', models: [x, both]}
  b: {proxy: 'http://b', models: [both, y/z], priority: 1}
  c: {proxy: 'http://c', refresh: 60}
";

    #[test]
    fn names_lead_to_peers_in_order() {
        let peers = peers(CONFIG, None);
        assert_eq!(names(&peers, "a/x"), ["a/x"]);
        assert_eq!(names(&peers, "x"), ["a/x"]);
        assert_eq!(names(&peers, "both"), ["b/both", "a/both"], "priority goes first");
        assert_eq!(names(&peers, "a/both"), ["a/both"], "the full name is one place");
        assert_eq!(names(&peers, "b/y/z"), ["b/y/z"]);
        assert!(names(&peers, "z").is_empty() && names(&peers, "a/z").is_empty());
        assert_eq!(names(&peers, "c/any"), ["c/any"], "nobody has looked");
        let c = peers.all[2].clone();
        c.saw(vec!["both".to_owned()]);
        assert!(names(&peers, "c/any").is_empty());
        assert_eq!(names(&peers, "both"), ["b/both", "a/both", "c/both"]);
    }

    #[test]
    fn a_peer_that_fails_rests_and_goes_last() {
        let first = peers(CONFIG, None);
        let b = first.all[0].clone();
        b.failed("refused");
        assert!(b.rests().is_none() && !b.is_up(), "once may be chance");
        b.failed("refused");
        let (left, why) = b.rests().unwrap();
        assert!(left <= FIRST_REST && why == "refused");
        assert_eq!(names(&first, "both"), ["a/both", "b/both"]);
        // A reload that leaves the entry as it was leaves the state; another entry begins anew.
        assert!(peers(CONFIG, Some(&first)).all[0].rests().is_some());
        let other = CONFIG.replace("http://b", "http://b:2");
        assert!(peers(&other, Some(&first)).all[0].rests().is_none());
        b.answered();
        assert!(b.rests().is_none() && b.is_up());
        for _ in 0..40 {
            b.failed("refused");
        }
        assert!(b.rests().unwrap().0 <= LONGEST_REST);
    }

    #[tokio::test]
    async fn visits_are_counted() {
        let peers = peers(CONFIG, None);
        let far = peers.find("a/x").remove(0);
        let (one, two) = (peers.visit(&far), peers.visit(&far));
        assert_eq!((far.busy(), far.peer.busy()), (2, 2));
        drop(one);
        let mut quiet = std::pin::pin!(peers.quiet());
        tokio::select! {
            biased;
            () = &mut quiet => panic!("one is left"),
            () = tokio::task::yield_now() => {}
        }
        drop(two);
        quiet.await;
        assert_eq!(far.busy(), 0);
    }
}

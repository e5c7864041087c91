//! What there is and what runs, as JSON.

use lifecycle::State;
use registry::Launch;
use serde_json::{Map, Value, json};

use super::App;
use super::auth::Access;
use crate::catalog::Catalog;
use crate::peers::Far;
use crate::pressure;
use crate::select::Destination;

/// `GET /v1/models`: what this client may use.
#[must_use]
pub fn models(app: &App, catalog: &Catalog, access: &Access) -> Value {
    let mut rows: Vec<(String, Value)> = Vec::new();
    for entry in catalog
        .registry
        .models
        .values()
        .filter(|m| !m.unlisted && access.permits(&m.id, &m.id))
    {
        if catalog.registry.globals.include_aliases_in_list {
            for alias in &entry.aliases {
                rows.push((alias.clone(), Value::Object(alias_row(app, entry, alias))));
            }
        }
        rows.push((entry.id.clone(), Value::Object(model(app, entry))));
    }
    for (id, selector) in catalog
        .registry
        .selectors
        .iter()
        .filter(|(id, s)| !s.unlisted && access.permits(id, id))
    {
        rows.push((
            id.clone(),
            Value::Object(selector_row(app, catalog, id, selector)),
        ));
    }
    for (id, far) in catalog.peers.models() {
        if access.permits(&id, &id) {
            rows.push((id.clone(), Value::Object(peer_row(app, &id, &far))));
        }
    }
    let active = active(app, catalog);
    for id in active.iter().flat_map(|p| p.pins.keys()) {
        if access.permits(id, id)
            && let Some(row) = pin_row(app, catalog, id)
        {
            rows.push((id.clone(), Value::Object(row)));
        }
    }
    rows.sort_by(|a, b| a.0.cmp(&b.0));
    let rows: Vec<Value> = rows.into_iter().map(|(_, row)| row).collect();
    json!({"object": "list", "data": rows})
}

fn active<'c>(app: &App, catalog: &'c Catalog) -> Option<&'c registry::Profile> {
    let name = app.profile.lock().clone()?;
    catalog.registry.profiles.get(&name)
}

/// The row of a name that is there only while its profile is active.
fn pin_row(app: &App, catalog: &Catalog, id: &str) -> Option<Map<String, Value>> {
    let target = active(app, catalog)?.pins.get(id)?.as_deref()?;
    let new = catalog.destination(id).is_none() && !catalog.registry.selectors.contains_key(id);
    let own = object(json!({"type": "profile", "modelID": target}));
    new.then(|| bare_row(app, id, own, &None, &None, loaded(app, catalog, target)))
}

/// Whether a request for this name is served without a model having to be loaded.
fn loaded(app: &App, catalog: &Catalog, name: &str) -> bool {
    if let Some(selector) = catalog.registry.selectors.get(name) {
        return selector.targets.iter().any(|t| reaches(app, catalog, t));
    }
    reaches(app, catalog, name)
}

fn reaches(app: &App, catalog: &Catalog, name: &str) -> bool {
    match catalog.destination(name) {
        Some(Destination::Model(model)) => is_ready(app, &model),
        Some(Destination::Peers(far)) => far.iter().any(|f| f.peer.is_up()),
        None => false,
    }
}

fn is_ready(app: &App, model: &str) -> bool {
    app.house.status(model).is_some_and(|s| s.state == State::Ready)
}

fn status(loaded: bool) -> Value {
    json!({"value": if loaded { "loaded" } else { "unloaded" }})
}

/// The row of one name, and the id under which permissions know it.
#[must_use]
pub fn one(app: &App, catalog: &Catalog, name: &str) -> Option<(String, Map<String, Value>)> {
    if let Some(entry) = catalog.resolve(name).and_then(|id| catalog.model(id)) {
        return Some((entry.id.clone(), model(app, entry)));
    }
    if let Some(selector) = catalog.registry.selectors.get(name) {
        return Some((name.to_owned(), selector_row(app, catalog, name, selector)));
    }
    let Some(far) = catalog.peers.find(name).into_iter().next() else {
        return pin_row(app, catalog, name).map(|row| (name.to_owned(), row));
    };
    let id = far.name().to_string();
    let row = peer_row(app, &id, &far);
    Some((id, row))
}

fn selector_row(app: &App, catalog: &Catalog, id: &str, selector: &registry::Selector) -> Map<String, Value> {
    let mut own = object(json!({
        "type": "selector", "strategy": strategy(selector), "targets": selector.targets, "spillover": selector.spillover,
    }));
    own.extend(selector.metadata.clone());
    bare_row(
        app,
        id,
        own,
        &selector.name,
        &selector.description,
        loaded(app, catalog, id),
    )
}

fn peer_row(app: &App, id: &str, far: &Far) -> Map<String, Value> {
    let own = object(json!({"type": "peer", "peerID": far.peer.id, "modelID": far.model}));
    let name = Some(format!("{}: {}", far.peer.id, far.model));
    bare_row(app, id, own, &name, &None, far.peer.is_up())
}

/// One row of it.
#[must_use]
pub fn model(app: &App, model: &registry::Model) -> Map<String, Value> {
    row(
        app,
        model,
        &model.id,
        object(json!({"type": "model", "aliases": model.aliases})),
    )
}

fn strategy(selector: &registry::Selector) -> &'static str {
    match selector.strategy {
        registry::Strategy::Pin => "pin",
        registry::Strategy::Warm => "warm",
        registry::Strategy::Spillover => "spillover",
    }
}

/// A row of a name that is no model itself.
fn bare_row(
    app: &App,
    id: &str,
    own: Map<String, Value>,
    name: &Option<String>,
    description: &Option<String>,
    loaded: bool,
) -> Map<String, Value> {
    let mut row = object(json!({
        "id": id,
        "object": "model",
        "created": app.started_unix,
        "owned_by": "swapd",
        "meta": {"llamaswap": own},
        "status": status(loaded),
    }));
    for (key, text) in [("name", name), ("description", description)] {
        if let Some(text) = text {
            row.insert(key.to_owned(), text.trim().into());
        }
    }
    row
}

fn alias_row(app: &App, model: &registry::Model, alias: &str) -> Map<String, Value> {
    row(
        app,
        model,
        alias,
        object(json!({"type": "alias", "modelID": model.id})),
    )
}

fn object(value: Value) -> Map<String, Value> {
    if let Value::Object(map) = value {
        map
    } else {
        Map::new()
    }
}

fn row(app: &App, model: &registry::Model, id: &str, mut own: Map<String, Value>) -> Map<String, Value> {
    // What `capabilities` says is not said twice.
    let said = [
        "architecture",
        "capabilities",
        "supported_parameters",
        "context_length",
    ];
    let free = |key: &str| model.capabilities.is_none() || !said.contains(&key);
    own.extend(
        model
            .metadata
            .iter()
            .filter(|(k, _)| free(k))
            .map(|(k, v)| (k.clone(), v.clone())),
    );
    let mut row = object(json!({
        "id": id,
        "object": "model",
        "created": app.started_unix,
        "owned_by": "swapd",
        "meta": {"llamaswap": own},
        "status": status(is_ready(app, &model.id)),
    }));
    for (key, text) in [("name", &model.name), ("description", &model.description)] {
        if let Some(text) = text.as_deref().map(str::trim).filter(|t| !t.is_empty()) {
            row.insert(key.to_owned(), text.into());
        }
    }
    if let Some(capabilities) = &model.capabilities {
        row.extend(capability_keys(capabilities));
    }
    row
}

fn capability_keys(c: &registry::Capabilities) -> Map<String, Value> {
    let takes = |what: &str| c.input.iter().any(|m| m == what);
    let gives = |what: &str| c.output.iter().any(|m| m == what);
    let mut keys = object(json!({
        "architecture": {
            "input_modalities": c.input,
            "output_modalities": c.output,
            "modality": format!("{}->{}", c.input.join("+"), c.output.join("+")),
        },
        "capabilities": {
            "vision": takes("image") && gives("text"),
            "audio_transcriptions": takes("audio") && gives("text"),
            "audio_speech": takes("text") && gives("audio"),
            "image_generation": takes("text") && gives("image"),
            "image_to_image": takes("image") && gives("image"),
            "function_calling": c.tools,
            "reranker": c.reranker,
        },
    }));
    if c.tools {
        keys.insert("supported_parameters".to_owned(), json!(["tools", "tool_choice"]));
    }
    if let Some(context) = c.context {
        keys.insert("context_length".to_owned(), context.into());
    }
    keys
}

/// `GET /running`: every model with a process, or backing off after a failure.
#[must_use]
pub fn running(app: &App) -> Value {
    let catalog = app.house.catalog();
    let mut rows = Vec::new();
    for (id, status, process) in app.house.statuses() {
        if status.state == State::Stopped {
            continue;
        }
        let (cmd, proxy) = command_of(&catalog, &id);
        let model = catalog.model(&id);
        let address = process
            .as_ref()
            .and_then(|p| p.upstream.get())
            .map(|(pool, _)| pool.address());
        let mut row = object(json!({
            "model": &*id,
            "state": status.state.as_str(),
            "cmd": cmd,
            "proxy": proxy.or(address).unwrap_or_default(),
            "ttl": model.and_then(|m| m.ttl).map_or(0, |t| t.as_secs()),
            "name": model.and_then(|m| m.name.clone()).unwrap_or_default(),
            "description": model.and_then(|m| m.description.clone()).unwrap_or_default(),
            "inflight": status.inflight,
            "waiting": status.waiting,
        }));
        if let Some(process) = process {
            row.insert("pid".to_owned(), json!(process.pid.get()));
            row.insert("uptime_s".to_owned(), json!(process.spawned.elapsed().as_secs()));
            if let Some(limits) = process.announced.get() {
                row.insert("limits".to_owned(), Value::Object(limits.clone()));
            }
            if let Some(beat) = *process.heartbeat.lock() {
                row.insert("heartbeat".to_owned(), json!(beat));
            }
        }
        if let Some(failure) = &status.failure {
            let failure =
                json!({"message": failure.message, "log": failure.log_tail, "count": status.failures});
            row.insert("failure".to_owned(), failure);
        }
        rows.push(Value::Object(row));
    }
    let registry = app.reloader.outcome();
    let (level, reading, evicted) = app.house.memory_state();
    let memory = json!({"level": pressure::name(level), "available_bytes": reading.available_bytes,
        "total_bytes": reading.total_bytes, "swap_used_bytes": reading.swap_used_bytes, "evictions": evicted});
    json!({"running": rows, "memory": memory, "registry": {"in_force": registry.errors.is_empty(), "errors": registry.errors}})
}

fn command_of(catalog: &Catalog, id: &str) -> (String, Option<String>) {
    match catalog.model(id).map(|m| &m.launch) {
        Some(Launch::Command(c)) => (c.cmd.clone(), Some(c.proxy.clone())),
        Some(Launch::Worker(w)) => (format!("mlxworker {}", w.shown_argv().join(" ")), None),
        None => (String::new(), None),
    }
}

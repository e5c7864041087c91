//! Ollama's lists: all models, those that are loaded, and one of them.

use std::time::Duration;

use api_types::error::ApiError;
use http::Response;
use lifecycle::State;
use serde_json::{Value, json};

use super::{choose, json_reply};
use crate::activity::{rfc3339, unix_ms};
use crate::catalog::Catalog;
use crate::http::App;
use crate::http::auth::Access;
use crate::http::body::Body;
use crate::ollama::facts::{self, Facts};
use crate::ollama::request;

/// What stands for "never" where a time of expiry is asked for.
const NEVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// Reads the files of some models, away from the thread that serves.
async fn facts_of(models: Vec<registry::Model>) -> Vec<(registry::Model, Facts)> {
    let read = || {
        models.into_iter().map(|m| {
            let facts = Facts::of(&m, |name| std::env::var(name).ok());
            (m, facts)
        })
    };
    tokio::task::spawn_blocking(|| read().collect())
        .await
        .unwrap_or_default()
}

fn row(model: &registry::Model, facts: &Facts) -> Value {
    json!({
        "name": model.id,
        "model": model.id,
        "modified_at": rfc3339(facts.modified_ms),
        "size": facts.size,
        "digest": facts.digest(model),
        "details": facts.details(),
    })
}

/// All names of `/v1/models` but aliases: models, selectors, and what peers have.
pub(super) async fn tags(catalog: &Catalog, access: &Access) -> Result<Response<Body>, ApiError> {
    let listed = catalog.registry.models.values();
    let listed = listed
        .filter(|m| !m.unlisted && access.permits(&m.id, &m.id))
        .cloned()
        .collect();
    let mut rows: Vec<Value> = facts_of(listed).await.iter().map(|(m, f)| row(m, f)).collect();
    let selectors = catalog.registry.selectors.iter().filter(|(_, s)| !s.unlisted);
    let names = selectors
        .map(|(name, _)| name.clone())
        .chain(catalog.peers.models().into_keys());
    rows.extend(
        names
            .filter(|name| access.permits(name, name))
            .map(|name| bare_row(&name)),
    );
    Ok(json_reply(&json!({"models": rows})))
}

/// A name of whose files nothing is known here.
fn bare_row(name: &str) -> Value {
    let unknown = Facts::default();
    json!({
        "name": name,
        "model": name,
        "modified_at": rfc3339(0),
        "size": 0,
        "digest": facts::digest_of(name),
        "details": unknown.details(),
    })
}

pub(super) async fn ps(app: &App, catalog: &Catalog, access: &Access) -> Result<Response<Body>, ApiError> {
    let mut loaded = Vec::new();
    let mut statuses = Vec::new();
    for (id, status, process) in app.house.statuses() {
        let Some(model) = catalog.model(&id).filter(|m| access.permits(&m.id, &m.id)) else {
            continue;
        };
        if status.state == State::Ready {
            loaded.push(model.clone());
            statuses.push((status, process));
        }
    }
    let now = unix_ms();
    let rows = facts_of(loaded).await;
    let rows = rows
        .iter()
        .zip(statuses)
        .map(|((model, facts), (status, process))| {
            let mut row = row(model, facts);
            let never = u64::try_from(NEVER.as_millis()).unwrap_or(u64::MAX);
            let memory = process.and_then(|p| hostmem::process(*p.pid.get()?).ok());
            let size = facts.size.max(memory.map_or(0, |m| m.footprint_bytes));
            if let Some(row) = row.as_object_mut() {
                row.shift_remove("modified_at");
                row.insert("size".to_owned(), size.into());
                row.insert("size_vram".to_owned(), size.into());
                row.insert(
                    "expires_at".to_owned(),
                    rfc3339(now + status.expires_in_ms.unwrap_or(never)).into(),
                );
                if let Some(context) = model
                    .capabilities
                    .as_ref()
                    .and_then(|c| c.context)
                    .or(facts.context())
                {
                    row.insert("context_length".to_owned(), context.into());
                }
            }
            row
        });
    Ok(json_reply(&json!({"models": rows.collect::<Vec<_>>()})))
}

pub(super) async fn show(
    app: &App,
    catalog: &Catalog,
    access: &Access,
    body: &[u8],
) -> Result<Response<Body>, ApiError> {
    let (_, written) = request::object(body)?;
    let (choice, _) = choose(app, catalog, access, &written)?;
    let model = choice.model().and_then(|m| catalog.model(m));
    let model = model.cloned().into_iter().collect();
    let found = facts_of(model).await;
    let Some((model, facts)) = found.first() else {
        // A peer's: that it answers is all that is known of it.
        return Ok(json_reply(
            &json!({"modelfile": "", "parameters": "", "template": "", "model_info": {},
            "details": Facts::default().details(), "capabilities": ["completion"], "modified_at": rfc3339(0)}),
        ));
    };
    let from = facts
        .dir
        .as_ref()
        .map_or_else(|| model.id.clone(), |d| d.display().to_string());
    Ok(json_reply(&json!({
        "modelfile": format!("# Made from swapd's registry\nFROM {from}\n"),
        "parameters": "",
        "template": facts.template,
        "details": facts.details(),
        "model_info": facts.info(),
        "capabilities": facts.capabilities(model),
        "modified_at": rfc3339(facts.modified_ms),
    })))
}

//! A look at peers now and then, where the registry asks for it: whether they answer, and which models they list.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use http::Request;
use http::header::{ACCEPT, HOST, HeaderValue};
use http_body_util::{BodyExt, Limited};
use serde_json::Value;
use tokio::sync::watch;
use tokio::time::Instant;

use super::Peer;
use crate::house::House;
use crate::reload::Outcome;

/// Largest list of models that is read, and most names taken from it.
const MAX_LIST: usize = 4 << 20;
const MAX_MODELS: usize = 2000;

/// Looks at every peer that has a `refresh`, each at its own interval. Runs as long as the proxy; `reloads` tells that
/// there may be other peers.
pub async fn keep(house: Arc<House>, mut reloads: watch::Receiver<Outcome>) {
    let mut due: HashMap<String, Instant> = HashMap::new();
    loop {
        let now = Instant::now();
        let catalog = house.catalog();
        let mut next: Option<Instant> = None;
        for peer in catalog.peers.iter() {
            let Some(every) = peer.entry.refresh else { continue };
            let at = due.entry(peer.id.clone()).or_insert(now);
            // A peer whose entry has changed has not been looked at.
            if *at <= now || !peer.looked_at() {
                *at = now + every;
                peer.mark_looked_at();
                let peer = peer.clone();
                tokio::spawn(async move { look(&peer).await });
            }
            next = Some(next.map_or(*at, |n| n.min(*at)));
        }
        due.retain(|id, _| catalog.peers.iter().any(|p| p.id == *id));
        drop(catalog);
        let until_due = async {
            match next {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = until_due => {}
            changed = reloads.changed() => if changed.is_err() { return },
        }
    }
}

async fn look(peer: &Peer) {
    match list(peer).await {
        Ok(models) => {
            peer.answered();
            peer.saw(models);
        }
        Err(why) => peer.failed(&why),
    }
}

async fn list(peer: &Peer) -> Result<Vec<String>, String> {
    let path = format!("{}/v1/models", peer.prefix);
    let mut request = Request::get(&path)
        .body(Bytes::new())
        .map_err(|e| e.to_string())?;
    let headers = request.headers_mut();
    headers.insert(HOST, peer.host.clone());
    headers.insert(ACCEPT, HeaderValue::from_static("application/json"));
    peer.present_key(headers);
    let reply = peer
        .pool
        .send(&request, &|_| ())
        .await
        .map_err(|e| e.to_string())?;
    let status = reply.status();
    let body = Limited::new(reply.into_body(), MAX_LIST).collect().await;
    let body = body.map_err(|e| format!("{path}: {e}"))?.to_bytes();
    if !status.is_success() {
        return Err(format!("{path} answers {status}"));
    }
    names(&body).ok_or_else(|| format!("{path} answers no list of models"))
}

/// The models that are the peer's own. What it has from peers of its own is left out: two that know each other would
/// tell each other's models back and forth without end.
fn names(body: &[u8]) -> Option<Vec<String>> {
    let list: Value = serde_json::from_slice(body).ok()?;
    let own = |row: &&Value| {
        let kind = row.pointer("/meta/llamaswap/type").and_then(Value::as_str);
        !matches!(kind, Some("peer" | "profile"))
    };
    let rows = list.get("data")?.as_array()?.iter().filter(own);
    let mut names: Vec<String> = Vec::new();
    for name in rows.filter_map(|row| row.get("id")?.as_str()).take(MAX_MODELS) {
        if !name.is_empty() && !names.iter().any(|n| n == name) {
            names.push(name.to_owned());
        }
    }
    Some(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_models() {
        let body =
            br#"{"object":"list","data":[{"id":"a"},{"id":"b/c","meta":{"llamaswap":{"type":"model"}}},
            {"id":"p/x","meta":{"llamaswap":{"type":"peer"}}},{"id":"a"},{"id":""},{"name":"d"}]}"#;
        assert_eq!(names(body).unwrap(), ["a", "b/c"]);
        assert_eq!(names(b"{\"data\":[]}").unwrap(), Vec::<String>::new());
        assert!(names(b"[]").is_none() && names(b"<html>").is_none());
    }
}

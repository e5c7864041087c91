//! `/api/events`: everything that changes, as server-sent events in llama-swap's form.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::Response;
use http::header::{CONTENT_TYPE, HeaderName, HeaderValue};
use serde_json::{Value, json};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;

use super::App;
use super::body::Body;
use crate::activity::{Change, Running};
use crate::logs::{Line, Source};

/// Events that wait for a slow reader.
const WAITING: usize = 64;
/// Time between two looks at how far the replies in flight have come.
const PROGRESS: Duration = Duration::from_millis(250);

fn event(kind: &str, data: &Value) -> Bytes {
    let message = json!({"type": kind, "data": data.to_string()});
    Bytes::from(format!("event:message\ndata:{message}\n\n"))
}

fn log(source: &str, text: &[u8]) -> Bytes {
    event(
        "logData",
        &json!({"source": source, "data": String::from_utf8_lossy(text)}),
    )
}

fn line(line: &Line) -> Bytes {
    log(
        if line.source == Source::Proxy {
            "proxy"
        } else {
            "upstream"
        },
        &line.text,
    )
}

/// All models with their states.
fn models(app: &App) -> Bytes {
    let catalog = app.house.catalog();
    let rows = app.house.statuses().into_iter().filter_map(|(id, status, _)| {
        let model = catalog.model(&id)?;
        Some(json!({
            "id": &*id,
            "name": model.name.clone().unwrap_or_default(),
            "description": model.description.clone().unwrap_or_default(),
            "state": status.state.as_str(),
            "unlisted": model.unlisted,
            "peerID": "",
            "aliases": model.aliases,
            "inflight": status.inflight,
            "waiting": status.waiting,
        }))
    });
    let far = catalog.peers.models().into_iter().map(|(id, far)| {
        let state = if far.peer.is_up() { "ready" } else { "backoff" };
        json!({"id": id, "name": format!("{}: {}", far.peer.id, far.model), "description": "", "state": state,
               "unlisted": false, "peerID": far.peer.id, "aliases": [], "inflight": far.busy(), "waiting": 0})
    });
    event("modelStatus", &Value::Array(rows.chain(far).collect()))
}

fn registry(app: &App) -> Bytes {
    let outcome = app.reloader.outcome();
    event(
        "registry",
        &json!({"in_force": outcome.errors.is_empty(), "errors": outcome.errors}),
    )
}

fn profile(active: Option<&str>) -> Bytes {
    event("profileChanged", &json!({ "active": active }))
}

fn change(change: &Change) -> Bytes {
    match change {
        Change::Began(request) => upsert(request),
        Change::Ended(id) => event("inflight", &json!({"operation": "remove", "id": id})),
        Change::Finished(id) => event("activity", &json!({"id": id})),
    }
}

fn upsert(request: &Running) -> Bytes {
    event(
        "inflight",
        &json!({"operation": "upsert", "request": request.to_json()}),
    )
}

fn snapshot(running: &[Arc<Running>]) -> Bytes {
    let running: Vec<Value> = running.iter().map(|r| r.to_json()).collect();
    event("inflight", &json!({"operation": "snapshot", "requests": running}))
}

/// How far the replies had come when a reader was last told.
struct Progress(HashMap<u64, (bool, u64)>);

impl Progress {
    fn of(running: &[Arc<Running>]) -> Self {
        Self(running.iter().map(|r| (r.id, r.progress())).collect())
    }

    /// What has changed since; `None` if nothing has.
    fn news(&mut self, app: &App) -> Option<Bytes> {
        let running = app.activity.shown();
        // One that is not known has not begun to be answered when its arrival was told.
        let before = |r: &Running| self.0.get(&r.id).copied().unwrap_or_default();
        let news: Vec<Bytes> = running
            .iter()
            .filter(|r| before(r) != r.progress())
            .map(|r| upsert(r))
            .collect();
        *self = Self::of(&running);
        (!news.is_empty()).then(|| news.concat().into())
    }
}

/// Present state, then every change. A reader that is too slow loses log lines and gets the state anew.
#[must_use]
pub fn stream(app: &Arc<App>) -> Response<Body> {
    let (sender, receiver) = mpsc::channel(WAITING);
    let app = app.clone();
    tokio::spawn(async move {
        let mut changes = app.activity.changes();
        let mut states = app.house.states();
        let mut outcomes = app.reloader.outcomes();
        let mut profiles = app.profile_feed.subscribe();
        let active = profiles.borrow_and_update().clone();
        let (proxy, _) = app.house.logs.subscribe(|s| *s == Source::Proxy);
        let (upstream, mut lines) = app.house.logs.subscribe(|s| *s != Source::Proxy);
        let running = app.activity.shown();
        let mut progress = Progress::of(&running);
        let headers = &app.house.catalog().registry.globals.session_id_headers.clone();
        let first = [
            log("proxy", &proxy),
            log("upstream", &upstream),
            models(&app),
            event("uiConfig", &json!({"activity": {"session_id": headers}})),
            profile(active.as_deref()),
            registry(&app),
            snapshot(&running),
        ];
        for piece in first {
            if sender.send(piece).await.is_err() {
                return;
            }
        }
        // Requests pay nothing for it that somebody looks on: they are looked at.
        let mut look = tokio::time::interval(PROGRESS);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let piece = tokio::select! {
                () = sender.closed() => return,
                _ = look.tick() => {
                    // A reader that stands still is told later how far they are then, not all that was between.
                    if sender.capacity() < sender.max_capacity() {
                        continue;
                    }
                    match progress.news(&app) {
                        Some(news) => news,
                        None => continue,
                    }
                },
                next = lines.recv() => match next {
                    Ok(next) => line(&next),
                    Err(RecvError::Lagged(n)) => log("proxy", format!("... {n} lines lost\n").as_bytes()),
                    Err(RecvError::Closed) => return,
                },
                next = states.recv() => match next {
                    Ok(_) | Err(RecvError::Lagged(_)) => models(&app),
                    Err(RecvError::Closed) => return,
                },
                next = changes.recv() => match next {
                    Ok(next) => change(&next),
                    Err(RecvError::Lagged(_)) => {
                        let running = app.activity.shown();
                        progress = Progress::of(&running);
                        snapshot(&running)
                    }
                    Err(RecvError::Closed) => return,
                },
                next = profiles.changed() => match next {
                    Ok(()) => {
                        let active = profiles.borrow_and_update().clone();
                        profile(active.as_deref())
                    }
                    Err(_) => return,
                },
                next = outcomes.changed() => match next {
                    Ok(()) => registry(&app),
                    Err(_) => return,
                },
            };
            if sender.send(piece).await.is_err() {
                return;
            }
        }
    });
    let mut response = Response::new(Body::Channel(receiver));
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    response.headers_mut().insert(
        HeaderName::from_static("x-accel-buffering"),
        HeaderValue::from_static("no"),
    );
    response
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use http::{HeaderMap, Method};
    use http_body_util::BodyExt;
    use parking_lot::Mutex;
    use registry::{Options, Registry};
    use tokio::sync::watch;

    use super::*;
    use crate::activity::{Activity, Kind};
    use crate::catalog::Catalog;
    use crate::cli::Paths;
    use crate::house::House;
    use crate::logline::Level;
    use crate::logs::Logs;
    use crate::performance::Performance;
    use crate::reload::Reloader;
    use crate::watched::Contents;

    fn app() -> Arc<App> {
        let paths = Paths {
            config: None,
            config_dir: None,
        };
        let (registry, _) = Registry::from_sources(&[], &Options::default()).unwrap();
        let house = House::new(Arc::new(Catalog::new(registry)), Logs::default());
        let (activity, performance) = (Activity::new(10), Performance::new(None));
        let contents = Contents::read(&paths).unwrap();
        let (a, p, level) = (activity.clone(), performance.clone(), Level::fixed());
        let reloader = Reloader::new(paths, &contents, house.clone(), a, p, None, level);
        Arc::new(App {
            house,
            activity,
            reloader,
            performance,
            hardware: None,
            profile: Mutex::new(None),
            profile_feed: watch::Sender::new(None),
            started_unix: 0,
            via: String::new(),
        })
    }

    #[tokio::test(start_paused = true)]
    async fn progress_does_not_pile_up_for_a_reader_that_stands_still() {
        let app = app();
        let (path, headers) = ("/v1/x".to_owned(), HeaderMap::new());
        let client = "::1".to_owned();
        let mut trace = app
            .activity
            .begin(Kind::Shown, "m".into(), Method::POST, path, client, &headers);
        let mut body = stream(&app).into_body();
        for _ in 0..40 {
            trace.piece(b"12345", Instant::now());
            tokio::time::sleep(PROGRESS).await;
        }
        // Read on until nothing comes for a while.
        let mut told = Vec::new();
        while let Ok(Some(Ok(frame))) = tokio::time::timeout(4 * PROGRESS, body.frame()).await {
            let text = String::from_utf8(frame.into_data().unwrap().to_vec()).unwrap();
            told.extend(text.contains("upsert").then_some(text));
        }
        let [last] = &told[..] else {
            panic!("{} pieces: {told:?}", told.len());
        };
        assert!(last.contains("resp_bytes\\\":200"), "where it is now: {last}");
    }
}

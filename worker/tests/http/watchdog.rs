//! An engine whose step never ends: nobody waits for it for ever.

use std::time::Duration;

use mlxworker::backend::EngineStats;
use mlxworker::backend::scripted::Act;
use mlxworker::serve::Watchdog;
use serde_json::json;

use super::support::*;

const LIMIT: Duration = Duration::from_millis(200);

/// A server whose engine says a word to each request, and then stands still in its step.
async fn hanging() -> Server {
    let server = start(|_| {
        let mut script = say("so far so good");
        script.push(Act::Hang);
        Ok(script)
    })
    .await;
    server.backend.set_stats(EngineStats {
        running: 2,
        steps: 7,
        last_step_age: Duration::from_secs(3600),
        ..EngineStats::default()
    });
    server
}

#[tokio::test]
async fn a_step_that_never_ends_is_told_to_every_client() {
    let server = hanging().await;
    let _watchdog = Watchdog::start(&server.service, LIMIT).unwrap();
    let (stream, whole, reason) = tokio::join!(
        server.chat_stream(json!({})),
        server.chat(json!({})),
        server.service.dead(),
    );
    assert!(
        reason.contains("--watchdog-seconds 0.2") && reason.contains("after 7 steps"),
        "{reason}"
    );
    assert!(server.service.is_declared_dead());
    let last = &stream.events.last().unwrap().data;
    assert!(!stream.clean || !stream.raw.contains("[DONE]"), "{}", stream.raw);
    assert!(last.contains("engine_dead") && last.contains(&reason), "{last}");
    assert!(
        stream.raw.contains("\"content\":\"so\""),
        "what was known is kept: {}",
        stream.raw
    );
    assert_eq!(
        (whole.status, whole.json()["error"]["code"].as_str()),
        (503, Some("engine_dead"))
    );
    // The requests are over, and later ones are refused.
    server.service.idle().await;
    let later = server.chat(json!({})).await;
    assert_eq!(later.status, 503, "{}", later.text());
    assert_eq!(server.get("/health").await.status, 503);
}

/// The engine of this server stands still, too: a watchdog of its own finds that, and the other one has nothing that
/// could look.
#[tokio::test]
async fn without_a_limit_nobody_looks() {
    let server = hanging().await;
    let none = Watchdog::start(&server.service, Duration::ZERO).unwrap();
    assert!(!none.watches());
    assert!(!server.service.is_declared_dead());
    let some = Watchdog::start(&server.service, LIMIT).unwrap();
    assert!(some.watches());
}

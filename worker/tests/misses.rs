//! What the log says at debug when a prompt is not found in the prefix cache: the program's own lines, over HTTP, with the real
//! engine and the demonstration model. In a file of its own, as a process has one log.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    dead_code
)]

#[path = "http/support.rs"]
mod support;

use std::io::Write;

use mlxworker::engine::{Engine, EngineConfig};
use parking_lot::Mutex;
use serde_json::json;
use support::{Server, model_folder, start_on};

static LOG: Mutex<Vec<u8>> = Mutex::new(Vec::new());

struct Log;

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        LOG.lock().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The lines about misses since the last call.
fn misses() -> Vec<String> {
    let log = String::from_utf8(std::mem::take(&mut *LOG.lock())).unwrap();
    let lines = log.lines().filter(|line| line.contains("first_different_token"));
    lines.map(str::to_owned).collect()
}

async fn start(configure: impl FnOnce(&mut EngineConfig)) -> Server<Engine> {
    let mut config = EngineConfig::new(model_folder());
    configure(&mut config);
    start_on(Engine::start(config, |_| {}).await.unwrap(), |_| {}).await
}

async fn ask(server: &Server<Engine>, system: &str) {
    let messages = json!([{"role": "system", "content": system}, {"role": "user", "content": "Hi"}]);
    let body = json!({"messages": messages, "max_tokens": 2});
    let reply = server.post("/v1/chat/completions", &body).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
}

/// A quoted field of a line.
fn field<'a>(line: &'a str, name: &str) -> &'a str {
    let (_, rest) = line
        .split_once(&format!(" {name}=\""))
        .unwrap_or_else(|| panic!("{line}"));
    rest.split_once('"').unwrap().0
}

#[tokio::test]
async fn a_miss_is_told_with_text_around_it_and_only_where_it_is_one() {
    tracing_subscriber::fmt()
        .with_max_level(tracing::Level::DEBUG)
        .with_ansi(false)
        .with_writer(|| Log)
        .init();
    let on = |day: &str| {
        let rules = "Answer in short sentences, and say so where you do not know the answer. ".repeat(3);
        format!("You are of help. {rules}Today is {day}, and it will stay so until midnight. {rules}")
    };
    let server = start(|config| config.max_running = 1).await;
    ask(&server, &on("Monday")).await;
    assert_eq!(
        misses(),
        [""; 0],
        "nothing was cached that it could have been like"
    );
    ask(&server, &on("Tuesday")).await;
    let lines = misses();
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(
        lines[0].contains("the prompt parts from the cached one"),
        "{lines:?}"
    );
    let [before, asked, cached] = ["before", "asked", "cached"].map(|name| field(&lines[0], name));
    assert!(before.contains("do not know the answer. Today is"), "{lines:?}");
    assert!(
        [before, asked, cached]
            .iter()
            .all(|text| text.chars().count() == 40),
        "{lines:?}"
    );
    let after = ", and it will stay so";
    assert!(
        asked.contains(&format!("uesday{after}")) && cached.contains(&format!("onday{after}")),
        "{lines:?}"
    );

    // The second one waits behind the first, which has computed all that it needs when it is its turn.
    let wednesday = on("Wednesday");
    tokio::join!(ask(&server, &wednesday), ask(&server, &wednesday));
    let lines = misses();
    assert_eq!(lines.len(), 1, "{lines:?}");
    ask(&server, &wednesday).await;
    assert_eq!(misses(), [""; 0]);

    // Two prompts that have no room beside one another.
    let small = start(|config| config.max_blocks = Some(14)).await;
    let [one, other] =
        ["Rivers run down to the sea. ", "Clouds bring the rain back. "].map(|text| text.repeat(20));
    ask(&small, &one).await;
    ask(&small, &other).await;
    misses();
    ask(&small, &one).await;
    let lines = misses();
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(
        lines[0].contains("the prompt was cached, and has made room for others"),
        "{lines:?}"
    );
    assert!(field(&lines[0], "asked").contains("run down"), "{lines:?}");
}

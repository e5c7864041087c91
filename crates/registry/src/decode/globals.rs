//! What is not about one model.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::read::{flag, int, number, seconds, strings, text, texts};
use crate::diagnostic::{Code, Findings, Pos};
use crate::duration;
use crate::types::{ApiKey, Globals, LogLevel, LogTo, MemoryRules, Scheduler};
use crate::yaml::{Data, Node};

const TIME_FORMATS: [&str; 14] = [
    "ansic",
    "unixdate",
    "rubydate",
    "rfc822",
    "rfc822z",
    "rfc850",
    "rfc1123",
    "rfc1123z",
    "rfc3339",
    "rfc3339nano",
    "kitchen",
    "stamp",
    "stampmilli",
    "stampmicro",
];
const DEFAULT_IGNORE: &str = r".*\.(js|json|css|png|gif|jpg|jpeg|ico|txt)$";
/// Less is raised to this: no model is ready sooner than a person would give up on it.
const MIN_HEALTH_CHECK: Duration = Duration::from_secs(15);

pub(super) fn globals(root: &Node, bases: &[PathBuf], findings: &mut Findings) -> Globals {
    let nothing = Node {
        at: Pos::default(),
        data: Data::Null,
    };
    let section = |name: &str| root.get(name).unwrap_or(&nothing);
    let performance = section("performance");
    Globals {
        // Unlike a model's, the global 0 is a very short time.
        health_check_timeout: match int(root, "healthCheckTimeout") {
            Some(0) => MIN_HEALTH_CHECK,
            _ => health_check_timeout(root).unwrap_or(Duration::from_secs(120)),
        },
        unload_timeout: seconds(root, "unloadTimeout")
            .filter(|t| !t.is_zero())
            .unwrap_or(Duration::from_secs(10)),
        ttl: seconds(root, "globalTTL").filter(|t| !t.is_zero()),
        log_level: log_level(root, findings),
        log_time_format: log_time_format(root, findings),
        log_to_stdout: match text(root, "logToStdout").as_deref() {
            Some("upstream") => LogTo::Upstream,
            Some("both") => LogTo::Both,
            Some("none") => LogTo::None,
            _ => LogTo::Proxy,
        },
        metrics_max_in_memory: number(root, "metricsMaxInMemory")
            .filter(|n| *n > 0)
            .unwrap_or(1000),
        capture_buffer_mb: number(root, "captureBuffer").unwrap_or(5),
        max_body: number(root, "maxBodySize").unwrap_or(256_usize) << 20,
        store_path: store_path(root, bases, findings),
        session_id_headers: session_id_headers(section("ui")),
        performance_disabled: flag(performance, "disabled").unwrap_or(false),
        performance_every: performance_every(performance, findings),
        memory: memory(section("memory"), bases, findings),
        ollama_listen: ollama_listen(section("ollama"), findings),
        start_port: number(root, "startPort").unwrap_or(5800),
        send_loading_state: flag(root, "sendLoadingState").unwrap_or(false),
        include_aliases_in_list: flag(root, "includeAliasesInList").unwrap_or(false),
        ignore_paths: ignore_paths(section("upstream"), findings),
        api_keys: api_keys(root, findings),
        preload: Vec::new(),
        scheduler: scheduler(root),
    }
}

/// At least 15 s; absent when 0.
pub(super) fn health_check_timeout(node: &Node) -> Option<Duration> {
    let seconds = int(node, "healthCheckTimeout").filter(|s| *s != 0)?;
    Some(Duration::from_secs(u64::try_from(seconds).unwrap_or(0)).max(MIN_HEALTH_CHECK))
}

fn log_level(root: &Node, findings: &mut Findings) -> LogLevel {
    let Some(level) = text(root, "logLevel") else {
        return LogLevel::Info;
    };
    match level.to_ascii_lowercase().as_str() {
        "debug" | "trace" => LogLevel::Debug,
        "info" => LogLevel::Info,
        "warn" | "warning" => LogLevel::Warn,
        "error" => LogLevel::Error,
        _ => {
            let at = root.get("logLevel").map(|n| n.at).unwrap_or_default();
            let message = format!("`{level}` is not one of debug, info, warn, error; info is used");
            findings.warn(Code::Value, at, "logLevel", message);
            LogLevel::Info
        }
    }
}

fn log_time_format(root: &Node, findings: &mut Findings) -> Option<String> {
    let format = text(root, "logTimeFormat")?.to_ascii_lowercase();
    if TIME_FORMATS.contains(&format.as_str()) || format == "stampnano" {
        return Some(format);
    }
    let at = root.get("logTimeFormat").map(|n| n.at).unwrap_or_default();
    let near = knobs::closest(&format, TIME_FORMATS)
        .map(|f| format!("; did you mean {f}?"))
        .unwrap_or_default();
    findings.warn(
        Code::Value,
        at,
        "logTimeFormat",
        format!("`{format}` is no known format: no times are shown{near}"),
    );
    None
}

fn store_path(root: &Node, bases: &[PathBuf], findings: &mut Findings) -> Option<PathBuf> {
    let node = root.get("store")?.get("path")?;
    let path = node.text()?;
    if path.trim().is_empty() {
        findings.error(Code::Value, node.at, "store.path", "must not be empty");
        return None;
    }
    // Whether it can be written is found out when it is opened: nothing here touches the system.
    let base = bases.get(node.at.file).cloned().unwrap_or_default();
    Some(base.join(super::model::expand_home(path.trim())))
}

fn session_id_headers(ui: &Node) -> Vec<String> {
    let Some(activity) = ui
        .get("activity")
        .filter(|a| a.get("session_id").is_some_and(|n| !n.is_null()))
    else {
        return vec!["X-Session-ID".to_owned(), "X-Litellm-Session-Id".to_owned()];
    };
    let mut headers: Vec<String> = Vec::new();
    for header in strings(activity, "session_id") {
        if !header.is_empty() && !headers.iter().any(|h| h.eq_ignore_ascii_case(&header)) {
            headers.push(header);
        }
    }
    headers
}

fn performance_every(performance: &Node, findings: &mut Findings) -> Duration {
    const LEAST: Duration = Duration::from_secs(5);
    let Some(node) = performance.get("every") else {
        return LEAST;
    };
    let Some(every) = node.text().and_then(|t| duration::parse(&t)) else {
        return LEAST;
    };
    if every < LEAST {
        let written = node.text().unwrap_or_default();
        let message = format!("must be at least 5s, got {written}");
        findings.error(Code::Value, node.at, "performance.every", message);
    }
    every.max(LEAST)
}

fn memory(memory: &Node, bases: &[PathBuf], findings: &mut Findings) -> Option<MemoryRules> {
    const LEAST: Duration = Duration::from_millis(100);
    let time = |key: &str, default: u64| {
        let written = memory.get(key).and_then(Node::text);
        written
            .and_then(|t| duration::parse(&t))
            .unwrap_or(Duration::from_secs(default))
    };
    let every = time("every", 2);
    if every < LEAST {
        let at = memory.get("every").map(|n| n.at).unwrap_or_default();
        findings.error(Code::Value, at, "memory.every", "must be at least 100ms");
    }
    let readings = memory.get("readings").and_then(|node| {
        let path = node.text().filter(|p| !p.trim().is_empty())?;
        let base = bases.get(node.at.file).cloned().unwrap_or_default();
        Some(base.join(super::model::expand_home(path.trim())))
    });
    (!flag(memory, "disabled").unwrap_or(false)).then(|| MemoryRules {
        every: every.max(LEAST),
        warning_hold: time("warningHold", 30),
        evict_gap: time("evictGap", 5),
        recover: time("recover", 10),
        max_wait: time("maxWait", 10),
        cut_after: Some(time("cutAfter", 60)).filter(|t| !t.is_zero()),
        readings,
    })
}

fn ollama_listen(ollama: &Node, findings: &mut Findings) -> Option<SocketAddr> {
    let written = text(ollama, "listen")?;
    match parse_loopback(&written) {
        Ok(address) => Some(address),
        Err(why) => {
            let at = ollama.get("listen").map(|n| n.at).unwrap_or_default();
            findings.error(Code::Value, at, "ollama.listen", format!("`{written}` {why}"));
            None
        }
    }
}

/// An address of this machine for itself: `127.0.0.1:PORT`, `[::1]:PORT`, `localhost:PORT` or `:PORT`.
///
/// # Errors
/// It is none; says why.
pub fn parse_loopback(text: &str) -> Result<SocketAddr, &'static str> {
    let text = text.trim();
    let whole = match text.strip_prefix("localhost:").or_else(|| text.strip_prefix(':')) {
        Some(port) => format!("127.0.0.1:{port}"),
        None => text.to_owned(),
    };
    let address: SocketAddr = whole
        .parse()
        .map_err(|_| "is no address; write it as 127.0.0.1:PORT")?;
    if address.ip().is_loopback() {
        Ok(address)
    } else {
        Err("is not a loopback address")
    }
}

fn ignore_paths(upstream: &Node, findings: &mut Findings) -> Vec<String> {
    let mut patterns = Vec::new();
    for (i, (node, pattern)) in texts(upstream, "ignorePaths").into_iter().enumerate() {
        match regex::Regex::new(&pattern) {
            Ok(_) => patterns.push(pattern),
            Err(e) => {
                let why = e.to_string().lines().last().unwrap_or_default().trim().to_owned();
                let message = format!("`{pattern}` is not a valid pattern: {why}");
                findings.error(
                    Code::Value,
                    node.at,
                    format!("upstream.ignorePaths[{i}]"),
                    message,
                );
            }
        }
    }
    if patterns.is_empty() {
        patterns.push(DEFAULT_IGNORE.to_owned());
    }
    patterns
}

fn api_keys(root: &Node, findings: &mut Findings) -> Vec<ApiKey> {
    let mut keys: Vec<ApiKey> = Vec::new();
    for (i, item) in root
        .get("apiKeys")
        .map(Node::items)
        .unwrap_or_default()
        .iter()
        .enumerate()
    {
        let path = format!("apiKeys[{i}]");
        let (key, models) = match &item.data {
            Data::Map(_) => {
                let models = item
                    .get("models")
                    .filter(|n| !n.is_null())
                    .map(|_| strings(item, "models"));
                (item.get("key").and_then(Node::text), models)
            }
            Data::Null => (Some(String::new()), None),
            _ => (item.text(), None),
        };
        let Some(key) = key else { continue };
        if let Some(why) = no_key(&key) {
            findings.error(Code::Value, item.at, path, why);
        } else if keys.iter().any(|k| k.key == key) {
            findings.warn(
                Code::Conflict,
                item.at,
                path,
                "this key is listed twice; the first one counts",
            );
        } else {
            keys.push(ApiKey { key, models });
        }
    }
    keys
}

/// Why no request could carry this key.
pub(super) fn no_key(key: &str) -> Option<&'static str> {
    if key.is_empty() {
        Some("empty api key")
    } else if key.contains(char::is_whitespace) {
        Some("an api key cannot contain spaces")
    } else if key.contains(char::is_control) {
        Some("an api key cannot contain control characters")
    } else {
        None
    }
}

fn scheduler(root: &Node) -> Scheduler {
    let nothing = Node {
        at: Pos::default(),
        data: Data::Null,
    };
    let path = ["routing", "scheduler", "settings", "fifo"];
    let fifo = path
        .iter()
        .try_fold(root, |node, key| node.get(key))
        .unwrap_or(&nothing);
    let time = |key: &str, default: u64| seconds(fifo, key).unwrap_or(Duration::from_secs(default));
    Scheduler {
        max_wait: time("maxWait", 30),
        max_passed: number(fifo, "maxPassed").unwrap_or(16),
        max_queue: number(fifo, "maxQueue").unwrap_or(256),
        max_queue_age: time("maxQueueAge", 600),
        min_stay: time("minStay", 0),
        keep_abandoned_loads: flag(fifo, "keepAbandonedLoads").unwrap_or(true),
    }
}

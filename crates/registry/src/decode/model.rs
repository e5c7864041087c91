//! One model.

use std::path::{Path, PathBuf};
use std::time::Duration;

use indexmap::IndexMap;
use knobs::{Effect, KnobError, Settings, by_yaml_key};

use super::globals::{health_check_timeout, no_key};
use super::read::{flag, int, number, object, seconds, strings, text, texts};
use crate::check::join;
use crate::diagnostic::{Code, Findings};
use crate::shell;
use crate::types::{
    Capabilities, CommandLaunch, Filters, Globals, Json, Launch, Model, Timeouts, WorkerLaunch,
};
use crate::yaml::{Data, Entry, Node};

/// What a model takes from elsewhere.
pub(super) struct Context<'a> {
    pub(super) globals: &'a Globals,
    /// Directory of every source.
    pub(super) bases: &'a [PathBuf],
    /// Its `${PORT}`.
    pub(super) port: Option<u16>,
}

pub(super) fn model(entry: &Entry, path: &str, context: &Context<'_>, findings: &mut Findings) -> Model {
    let node = &entry.value;
    let id = entry.key.clone();
    let use_model_name = text(node, "useModelName");
    let launch = launch(entry, path, context, use_model_name.as_deref(), findings);
    let comfyui = id == "comfyui_auto";
    let filters = node
        .get("filters")
        .map(|n| filters(n, &join(path, "filters"), findings))
        .unwrap_or_default();
    let concurrency_limit = number(node, "concurrencyLimit").filter(|n| *n > 0);
    let compat = node
        .get("compat")
        .and_then(|c| flag(c, "ignoreWebsockets"))
        .unwrap_or(false);
    Model {
        name: text(node, "name"),
        description: text(node, "description"),
        // Other names are gathered later, when all of them are known.
        aliases: aliases(node, &id, &filters),
        launch,
        ttl: match int(node, "ttl") {
            None | Some(-1) => context.globals.ttl,
            Some(seconds) => u64::try_from(seconds)
                .ok()
                .filter(|s| *s > 0)
                .map(Duration::from_secs),
        },
        unload_timeout: seconds(node, "unloadTimeout")
            .filter(|t| !t.is_zero())
            .unwrap_or(context.globals.unload_timeout),
        health_check_timeout: health_check_timeout(node).unwrap_or(context.globals.health_check_timeout),
        // A page of ComfyUI opens dozens of connections at once.
        concurrency_limit: if comfyui {
            concurrency_limit.map(|n: u32| n.max(50))
        } else {
            concurrency_limit
        },
        priority: 0,
        use_model_name,
        filters,
        unlisted: flag(node, "unlisted").unwrap_or(false),
        metadata: object(node, "metadata"),
        send_loading_state: flag(node, "sendLoadingState").unwrap_or(context.globals.send_loading_state),
        timeouts: timeouts(node.get("timeouts"), 0),
        ignore_websockets: compat || comfyui,
        capabilities: node
            .get("capabilities")
            .filter(|n| !n.is_null())
            .map(capabilities),
        id,
    }
}

fn launch(
    entry: &Entry,
    path: &str,
    context: &Context<'_>,
    use_model_name: Option<&str>,
    findings: &mut Findings,
) -> Launch {
    let node = &entry.value;
    let set = |key: &str| node.get(key).filter(|n| !n.is_null());
    let cmd = set("cmd").filter(|n| n.text().is_some_and(|t| !t.trim().is_empty()));
    match (set("worker"), cmd) {
        (Some(worker), Some(cmd)) => {
            let message = "has both `worker` and `cmd`: one process serves a model";
            findings.error(Code::Conflict, cmd.at, path, message);
            self::worker(worker, entry, path, context, use_model_name, findings)
        }
        (Some(worker), None) => {
            for key in ["cmdStop", "proxy", "checkEndpoint"] {
                if let Some(entry) = node.entries().iter().find(|e| e.key == key && !e.value.is_null()) {
                    let message = "has no effect beside `worker`: swapd and its worker share a socket";
                    findings.warn(Code::NoEffect, entry.at, join(path, key), message);
                }
            }
            self::worker(worker, entry, path, context, use_model_name, findings)
        }
        (None, cmd) => {
            if cmd.is_none() {
                match set("cmd") {
                    Some(cmd) => {
                        findings.error(Code::Missing, cmd.at, join(path, "cmd"), "has no command in it")
                    }
                    None => {
                        let message = "needs `worker` or `cmd`: nothing says how to run it";
                        findings.error(Code::Missing, entry.at, path, message);
                    }
                }
            }
            command(node, path, context, findings)
        }
    }
}

fn worker(
    node: &Node,
    entry: &Entry,
    path: &str,
    context: &Context<'_>,
    use_model_name: Option<&str>,
    findings: &mut Findings,
) -> Launch {
    let path = join(path, "worker");
    let mut settings = Settings::new();
    for knob in node
        .entries()
        .iter()
        .filter(|e| e.key != "model" && e.key != "env")
    {
        knob_setting(knob, &join(&path, &knob.key), &mut settings, findings);
    }
    if let Err(e) = settings.resolve() {
        findings.error(Code::Conflict, node.at, &path, e.to_string());
    }
    if let Some(knobs::Value::Str(key)) = settings.get("api-key")
        && let Some(why) = no_key(key)
    {
        findings.error(Code::Value, node.at, join(&path, "apiKey"), why);
    }
    let mut env = env(&entry.value, path.trim_end_matches(".worker"), findings);
    env.extend(self::env(node, &path, findings));
    let (model, is_path) = match node.get("model").filter(|n| !n.is_null()) {
        None => {
            let message = "is missing: the directory of a model, or a hub id such as `org/name`";
            findings.error(Code::Missing, node.at, join(&path, "model"), message);
            (String::new(), false)
        }
        Some(model) => {
            let base = context
                .bases
                .get(model.at.file)
                .map(PathBuf::as_path)
                .unwrap_or(Path::new("."));
            self::model_path(model, base, &join(&path, "model"), findings)
        }
    };
    let served = settings.get("served-model-name").map(ToString::to_string);
    let served = served
        .or_else(|| use_model_name.map(str::to_owned))
        .unwrap_or_else(|| entry.key.clone());
    Launch::Worker(WorkerLaunch {
        model,
        is_path,
        served_model_name: served,
        settings,
        env,
    })
}

fn knob_setting(entry: &Entry, path: &str, settings: &mut Settings, findings: &mut Findings) {
    let knob = by_yaml_key(&entry.key);
    if let Some(knob) = knob
        && matches!(knob.flag, "host" | "port")
    {
        let message = "swapd chooses where its worker listens; the key is not used";
        findings.warn(Code::NoEffect, entry.at, path, message);
        return;
    }
    if let Some(knob) = knob
        && settings.get(knob.flag).is_some()
    {
        let message = format!("is given twice, as `{}` in two spellings", knob.yaml_key());
        findings.error(Code::Conflict, entry.at, path, message);
        return;
    }
    let value = match &entry.value.data {
        // A text knob takes numbers and such as written.
        Data::Int(_, raw) | Data::Float(_, raw) if knob.is_some_and(|k| k.kind == knobs::Kind::Str) => {
            serde_json::Value::String(raw.to_string())
        }
        _ => match (knob.map(|k| k.kind), crate::check::boolean(&entry.value)) {
            (Some(knobs::Kind::Bool), Some(b)) => serde_json::Value::Bool(b),
            _ => entry.value.json(),
        },
    };
    match settings.set_yaml(&entry.key, &value) {
        Ok(()) => match knob.map(|k| k.effect) {
            Some(Effect::AcceptedOnly(why)) if !entry.value.is_null() => {
                findings.warn(
                    Code::NoEffect,
                    entry.at,
                    path,
                    format!("is accepted and has no effect yet: {why}"),
                );
            }
            Some(Effect::NoMeaning(why)) if !entry.value.is_null() => {
                findings.warn(
                    Code::NoEffect,
                    entry.at,
                    path,
                    format!("has no meaning here: {why}"),
                );
            }
            _ => {}
        },
        Err(e) => {
            let code = match e {
                KnobError::Unknown { .. } => Code::UnknownKey,
                KnobError::Speculative { .. } => Code::Speculative,
                KnobError::BadValue { .. } => Code::Type,
                _ => Code::Value,
            };
            let at = if matches!(code, Code::UnknownKey | Code::Speculative) {
                entry.at
            } else {
                entry.value.at
            };
            // A knob that nobody knows would change the worker's behaviour if it were known: unlike a stray key of
            // llama-swap's part, it stops the start.
            findings.error(code, at, path, e.to_string());
        }
    }
}

/// A model's place. `org/name` and a bare name are hub ids; everything else is a directory, relative ones starting at
/// the configuration's own.
fn model_path(node: &Node, base: &Path, path: &str, findings: &mut Findings) -> (String, bool) {
    let Some(written) = node.text().map(|t| t.trim().to_owned()) else {
        findings.error(
            Code::Type,
            node.at,
            path,
            format!("expected text, found {}", node.kind()),
        );
        return (String::new(), false);
    };
    if written.is_empty() || written.starts_with('-') {
        let message = format!("`{written}` is neither a directory nor a hub id");
        findings.error(Code::Value, node.at, path, message);
        return (written, false);
    }
    let id_char = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let hub_id = !written.starts_with(['.', '~', '/'])
        && written.split('/').count() <= 2
        && written
            .split('/')
            .all(|part| !part.is_empty() && part.chars().all(id_char));
    if hub_id {
        return (written, false);
    }
    (base.join(expand_home(&written)).display().to_string(), true)
}

/// `~/x` to the home directory, if there is one.
pub(super) fn expand_home(path: &str) -> PathBuf {
    match (path.strip_prefix("~/"), std::env::var_os("HOME")) {
        (Some(rest), Some(home)) => PathBuf::from(home).join(rest),
        _ => PathBuf::from(path),
    }
}

fn command(node: &Node, path: &str, context: &Context<'_>, findings: &mut Findings) -> Launch {
    let mut argv_of = |key: &str| -> Option<Vec<String>> {
        let written = node.get(key)?;
        let text = written.text().filter(|t| !t.trim().is_empty())?;
        match shell::split(&text) {
            Ok(argv) if argv.is_empty() => {
                findings.error(
                    Code::Value,
                    written.at,
                    join(path, key),
                    "has no command left without its comments",
                );
                None
            }
            Ok(argv) => Some(argv),
            Err(why) => {
                findings.error(
                    Code::Value,
                    written.at,
                    join(path, key),
                    format!("cannot be split: {why}"),
                );
                None
            }
        }
    };
    let argv = argv_of("cmd").unwrap_or_default();
    let cmd_stop = argv_of("cmdStop");
    if let Some(flag) = argv
        .iter()
        .skip(1)
        .find(|a| a.starts_with('-') && knobs::is_speculative(a))
    {
        let at = node.get("cmd").map(|n| n.at).unwrap_or_default();
        let message = format!(
            "`{flag}` asks for speculative decoding: {}",
            knobs::SPECULATIVE_REASON
        );
        findings.warn(Code::Speculative, at, join(path, "cmd"), message);
    }
    let proxy = text(node, "proxy").unwrap_or_default();
    if !proxy.is_empty() {
        base_address(&proxy, node.get("proxy"), &join(path, "proxy"), findings);
    }
    let check = text(node, "checkEndpoint").unwrap_or_else(|| "/health".to_owned());
    Launch::Command(CommandLaunch {
        cmd: argv.iter().map(|a| shell::quote(a)).collect::<Vec<_>>().join(" "),
        argv,
        cmd_stop,
        env: env(node, path, findings),
        proxy: proxy.trim_end_matches('/').to_owned(),
        check_endpoint: match check.as_str() {
            "none" => None,
            path if path.starts_with('/') => Some(check),
            path => Some(format!("/{path}")),
        },
        port: context.port,
    })
}

/// `http://host[:port][/path]`.
pub(super) fn base_address(address: &str, node: Option<&Node>, path: &str, findings: &mut Findings) {
    let rest = address
        .strip_prefix("http://")
        .or_else(|| address.strip_prefix("https://"));
    let authority = rest
        .map(|r| r.split(['/', '?', '#']).next().unwrap_or_default())
        .unwrap_or_default();
    let host_port = authority.rsplit('@').next().unwrap_or_default();
    let (host, port) = match host_port.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
        _ => (host_port, None),
    };
    let port_ok = port.is_none_or(|p| p.parse::<u16>().is_ok());
    // A macro that is still there has been reported already.
    if address.contains("${") || (!host.is_empty() && port_ok && !address.contains(char::is_whitespace)) {
        return;
    }
    let at = node.map(|n| n.at).unwrap_or_default();
    let message = format!("`{address}` is not an address such as http://host:port");
    findings.error(Code::Value, at, path, message);
}

fn env(node: &Node, path: &str, findings: &mut Findings) -> Vec<(String, String)> {
    let mut env: Vec<(String, String)> = Vec::new();
    for (i, (item, _)) in texts(node, "env").into_iter().enumerate() {
        let written = item.text().unwrap_or_default();
        match written
            .split_once('=')
            .filter(|(name, _)| !name.trim().is_empty())
        {
            Some((name, value)) => env.push((name.trim().to_owned(), value.to_owned())),
            None => {
                let message = format!("`{written}` is not of the form NAME=value");
                findings.error(Code::Value, item.at, format!("{path}.env[{i}]"), message);
            }
        }
    }
    env
}

/// Names under which requests find a model, its id left out.
fn aliases(node: &Node, id: &str, filters: &Filters) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for name in strings(node, "aliases")
        .into_iter()
        .chain(filters.set_params_by_id.keys().cloned())
    {
        if !name.is_empty() && name != id && !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

/// Reads a `filters` block.
pub(super) fn filters(node: &Node, path: &str, findings: &mut Findings) -> Filters {
    let list = text(node, "stripParams")
        .or_else(|| text(node, "strip_params"))
        .unwrap_or_default();
    let mut strip_params: Vec<String> = Vec::new();
    for key in list.split(',').map(str::trim).filter(|k| !k.is_empty()) {
        if key == "model" {
            let at = node
                .get("stripParams")
                .or_else(|| node.get("strip_params"))
                .map(|n| n.at)
                .unwrap_or_default();
            findings.warn(
                Code::NoEffect,
                at,
                join(path, "stripParams"),
                "`model` is never taken out",
            );
        } else if !strip_params.iter().any(|k| k == key) {
            strip_params.push(key.to_owned());
        }
    }
    let mut set = |node: &Node, path: &str| -> Json {
        let mut map = match node.json() {
            serde_json::Value::Object(map) => map,
            _ => Json::new(),
        };
        if map.shift_remove("model").is_some() {
            findings.warn(
                Code::NoEffect,
                node.at,
                path,
                "`model` is never set; `useModelName` does that",
            );
        }
        map
    };
    let set_params = node
        .get("setParams")
        .map(|n| set(n, &join(path, "setParams")))
        .unwrap_or_default();
    let mut set_params_by_id = IndexMap::new();
    for entry in node.get("setParamsByID").map(Node::entries).unwrap_or_default() {
        let path = format!("{path}.setParamsByID.{}", entry.key);
        set_params_by_id.insert(entry.key.clone(), set(&entry.value, &path));
    }
    Filters {
        strip_params,
        set_params,
        set_params_by_id,
    }
}

/// Reads a `timeouts` block.
pub(super) fn timeouts(node: Option<&Node>, response_header: u64) -> Timeouts {
    let limit = |key: &str, default: u64| {
        let set = node
            .and_then(|n| seconds(n, key))
            .unwrap_or(Duration::from_secs(default));
        Some(set).filter(|t| !t.is_zero())
    };
    Timeouts {
        connect: limit("connect", 30),
        keepalive: limit("keepalive", 30),
        response_header: limit("responseHeader", response_header),
        tls_handshake: limit("tlsHandshake", 10),
        expect_continue: limit("expectContinue", 1),
        idle_conn: limit("idleConn", 90),
    }
}

fn capabilities(node: &Node) -> Capabilities {
    Capabilities {
        input: strings(node, "in"),
        output: strings(node, "out"),
        tools: flag(node, "tools").unwrap_or(false),
        reranker: flag(node, "reranker").unwrap_or(false),
        context: number(node, "context").filter(|n| *n > 0),
    }
}

//! A resolved registry for people and programs: `swapd config show`.

use std::time::Duration;

use serde_json::{Map, Value, json};

use crate::types::{Filters, Launch, Model, Peer, Registry, Routing, Strategy, Timeouts};

impl Registry {
    /// What the configuration resolves to, with every default, in the order of the file. Keys are hidden.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let models: Map<String, Value> = self.models.iter().map(|(id, m)| (id.clone(), model(m))).collect();
        let peers: Map<String, Value> = self.peers.iter().map(|(id, p)| (id.clone(), peer(p))).collect();
        let g = &self.globals;
        let s = &g.scheduler;
        let routing = match &self.routing {
            Routing::Groups(groups) => {
                let groups: Map<String, Value> = groups
                    .iter()
                    .map(|(name, g)| {
                        let shown = json!({"swap": g.swap, "exclusive": g.exclusive, "persistent": g.persistent, "members": g.members});
                        (name.clone(), shown)
                    })
                    .collect();
                json!({"use": "group", "groups": groups})
            }
            Routing::Matrix(matrix) => {
                let sets: Map<String, Value> = matrix.sets().map(|(n, e)| (n.to_owned(), json!(e))).collect();
                let costs: Map<String, Value> = self
                    .models
                    .keys()
                    .map(|id| (id.clone(), json!(matrix.cost(id))))
                    .collect();
                json!({"use": "matrix", "sets": sets, "evict_costs": costs})
            }
        };
        let selectors: Map<String, Value> = self
            .selectors
            .iter()
            .map(|(name, s)| {
                let strategy = match s.strategy {
                    Strategy::Pin => "pin",
                    Strategy::Warm => "warm",
                    Strategy::Spillover => "spillover",
                };
                let shown = json!({"strategy": strategy, "targets": s.targets, "spillover": s.spillover,
                    "name": s.name, "description": s.description, "unlisted": s.unlisted, "metadata": s.metadata});
                (name.clone(), shown)
            })
            .collect();
        let profiles: Map<String, Value> = self
            .profiles
            .iter()
            .map(|(name, p)| {
                let pins: Map<String, Value> = p.pins.iter().map(|(k, v)| (k.clone(), json!(v))).collect();
                (name.clone(), json!({"description": p.description, "pins": pins}))
            })
            .collect();
        let keys: Vec<Value> = g
            .api_keys
            .iter()
            .map(|k| json!({"key": "(hidden)", "models": k.models}))
            .collect();
        json!({
            "models": models,
            "routing": routing,
            "scheduler": {
                "maxWait": seconds(s.max_wait), "maxPassed": s.max_passed, "maxQueue": s.max_queue,
                "maxQueueAge": seconds(s.max_queue_age), "minStay": seconds(s.min_stay),
                "keepAbandonedLoads": s.keep_abandoned_loads,
            },
            "selectors": selectors,
            "profiles": profiles,
            "peers": peers,
            "apiKeys": keys,
            "preload": g.preload,
            "startPort": g.start_port,
            "includeAliasesInList": g.include_aliases_in_list,
            "ignorePaths": g.ignore_paths,
            "logLevel": format!("{:?}", g.log_level).to_lowercase(),
            "logTimeFormat": g.log_time_format,
            "logToStdout": format!("{:?}", g.log_to_stdout).to_lowercase(),
            "metricsMaxInMemory": g.metrics_max_in_memory,
            "captureBuffer": g.capture_buffer_mb,
            "maxBodySize": g.max_body >> 20,
            "store": g.store_path,
            "sessionIdHeaders": g.session_id_headers,
            "memory": g.memory.as_ref().map(|m| json!({
                "every": seconds(m.every), "warningHold": seconds(m.warning_hold), "evictGap": seconds(m.evict_gap),
                "recover": seconds(m.recover), "maxWait": seconds(m.max_wait), "cutAfter": m.cut_after.map(seconds),
                "readings": m.readings,
            })),
            "ollama": {"listen": g.ollama_listen},
            "performance": {"disabled": g.performance_disabled, "every": seconds(g.performance_every)},
        })
    }

    /// The same as YAML.
    #[must_use]
    pub fn to_yaml(&self) -> String {
        // JSON values always have a YAML form.
        serde_yaml::to_string(&self.to_json()).unwrap_or_default()
    }
}

fn model(m: &Model) -> Value {
    let launch = match &m.launch {
        Launch::Worker(w) => json!({"worker": w.model, "directory": w.is_path,
            "argv": w.shown_argv(), "env": variables(&w.env)}),
        Launch::Command(c) => json!({"argv": hide_keys(c.argv.clone()), "cmdStop": c.cmd_stop,
            "env": variables(&c.env), "proxy": c.proxy, "checkEndpoint": c.check_endpoint, "port": c.port}),
    };
    json!({
        "launch": launch,
        "name": m.name,
        "description": m.description,
        "aliases": m.aliases,
        "ttl": m.ttl.map(seconds),
        "unloadTimeout": seconds(m.unload_timeout),
        "healthCheckTimeout": seconds(m.health_check_timeout),
        "concurrencyLimit": m.concurrency_limit,
        "priority": m.priority,
        "useModelName": m.use_model_name,
        "filters": filters(&m.filters),
        "unlisted": m.unlisted,
        "metadata": m.metadata,
        "sendLoadingState": m.send_loading_state,
        "timeouts": timeouts(&m.timeouts),
        "ignoreWebsockets": m.ignore_websockets,
        "capabilities": m.capabilities.as_ref().map(|c| json!({
            "in": c.input, "out": c.output, "tools": c.tools, "reranker": c.reranker, "context": c.context})),
    })
}

fn peer(p: &Peer) -> Value {
    json!({"proxy": p.proxy, "models": p.models, "refresh": p.refresh.map(seconds), "priority": p.priority,
        "apiKey": p.api_key.as_ref().map(|_| "(hidden)"),
        "filters": filters(&p.filters), "timeouts": timeouts(&p.timeouts)})
}

fn filters(f: &Filters) -> Value {
    let by_id: Map<String, Value> = f
        .set_params_by_id
        .iter()
        .map(|(id, set)| (id.clone(), Value::Object(set.clone())))
        .collect();
    json!({"stripParams": f.strip_params, "setParams": f.set_params, "setParamsByID": by_id})
}

fn timeouts(t: &Timeouts) -> Value {
    json!({
        "connect": t.connect.map(seconds), "keepalive": t.keepalive.map(seconds),
        "responseHeader": t.response_header.map(seconds), "tlsHandshake": t.tls_handshake.map(seconds),
        "expectContinue": t.expect_continue.map(seconds), "idleConn": t.idle_conn.map(seconds),
    })
}

/// Whole seconds as whole numbers.
fn seconds(time: Duration) -> Value {
    if time.subsec_nanos() == 0 {
        json!(time.as_secs())
    } else {
        json!(time.as_secs_f64())
    }
}

/// Names with their values; what looks like a secret is hidden.
fn variables(env: &[(String, String)]) -> Vec<String> {
    let secret = |name: &str| {
        let name = name.to_ascii_uppercase();
        ["KEY", "TOKEN", "SECRET", "PASSWORD"]
            .iter()
            .any(|word| name.contains(word))
    };
    env.iter()
        .map(|(n, v)| format!("{n}={}", if secret(n) { "(hidden)" } else { v }))
        .collect()
}

pub(crate) fn hide_keys(argv: Vec<String>) -> Vec<String> {
    let mut after_key = false;
    argv.into_iter()
        .map(|arg| {
            let hidden = std::mem::replace(&mut after_key, arg == "--api-key");
            match arg.strip_prefix("--api-key=") {
                Some(_) => "--api-key=(hidden)".to_owned(),
                None if hidden => "(hidden)".to_owned(),
                None => arg,
            }
        })
        .collect()
}

//! Paths to routes.

use http::Method;
use http::uri::PathAndQuery;

use super::ollama::Call;

/// What a path leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// Forwarded to the model that the body names.
    Inference,
    /// Forwarded to the model that the path names.
    Upstream,
    /// Forwarded to the one model that `/comfyui` stands for.
    ComfyUi,
    /// A sign of life for people.
    Home,
    /// The icon that browsers ask for.
    Icon,
    /// The page with all models, from which `/upstream/...` is reached.
    UpstreamPage,
    /// All models.
    Models,
    /// One model, by id or alias.
    Model(String),
    /// Models with a process.
    Running,
    /// The proxy lives.
    Health,
    /// Unload all, text answer.
    Unload,
    /// Unload all, JSON answer.
    ApiUnload,
    /// Unload one.
    ApiUnloadOne(String),
    /// Load one.
    ApiLoad(String),
    /// The log's history.
    Logs,
    /// The log's history and what follows; of one source if named.
    LogStream(Option<String>),
    /// Counters for Prometheus.
    Metrics,
    /// Finished requests.
    Activity,
    /// Totals and distributions of finished requests.
    Stats,
    /// One captured request.
    Capture(String),
    /// Live changes of everything.
    Events,
    /// End a running request.
    Cancel(String),
    /// All profiles and which is active.
    Profiles,
    /// Switch a profile on or off.
    ActiveProfile,
    /// Other servers and how they are.
    Peers,
    /// Take up the registry's file now.
    Reload,
    /// Program and version.
    Version,
    /// What the machine is.
    Hardware,
    /// How busy it is.
    Performance,
    /// One of Ollama's.
    Ollama(Call),
}

/// Why there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoRoute {
    /// The path leads nowhere.
    Path,
    /// The path has other methods: these.
    Method(&'static str),
}

/// Paths outside `/v1` whose body names the model.
const INFERENCE: [&str; 7] = [
    "/reranking",
    "/rerank",
    "/infill",
    "/completion",
    "/sdapi/v1/txt2img",
    "/sdapi/v1/img2img",
    "/audioapi/v1/tasks/run",
];

/// Paths below `/v`, for clients that leave the version's number out; the `/v` is not passed on.
const BELOW_V: [&str; 8] = [
    "chat/completions",
    "responses",
    "completions",
    "messages",
    "messages/count_tokens",
    "embeddings",
    "rerank",
    "reranking",
];

/// Paths whose query names the model.
const BY_QUERY: [&str; 3] = ["/v1/audio/voices", "/sdapi/v1/loras", "/props"];

/// The path that the model's server sees.
#[must_use]
pub fn upstream_path(path: PathAndQuery) -> PathAndQuery {
    let text = path.as_str();
    let below_v = text.strip_prefix("/v").filter(|rest| rest.starts_with('/'));
    let rest = text.strip_prefix("/audioapi").or(below_v);
    rest.and_then(|rest| rest.parse().ok()).unwrap_or(path)
}

/// Looks a path up. `HEAD` is to be given as `GET`.
///
/// # Errors
/// No such path, or not with this method.
pub fn find(method: &Method, path: &str) -> Result<Route, NoRoute> {
    let get = |route| {
        if method == Method::GET {
            Ok(route)
        } else {
            Err(NoRoute::Method("GET, HEAD"))
        }
    };
    let post = |route| {
        if method == Method::POST {
            Ok(route)
        } else {
            Err(NoRoute::Method("POST"))
        }
    };
    match path {
        "/v1/models" | "/models" => return get(Route::Models),
        "/" => return get(Route::Home),
        "/favicon.ico" => return get(Route::Icon),
        "/upstream" | "/upstream/" => return get(Route::UpstreamPage),
        "/metrics" => return get(Route::Metrics),
        "/api/metrics/activity" => return get(Route::Activity),
        "/api/metrics/stats" => return get(Route::Stats),
        "/api/events" => return get(Route::Events),
        "/running" => return get(Route::Running),
        "/health" | "/wol-health" => return get(Route::Health),
        "/unload" => return get(Route::Unload),
        "/logs" => return get(Route::Logs),
        "/logs/stream" => return get(Route::LogStream(None)),
        "/api/version" => return get(Route::Version),
        "/api/peers" => return get(Route::Peers),
        "/api/profiles" => return get(Route::Profiles),
        "/api/profiles/active" if method == Method::PUT => return Ok(Route::ActiveProfile),
        "/api/profiles/active" => return Err(NoRoute::Method("PUT")),
        "/v1/realtime" => return get(Route::Inference),
        "/api/reload" => return post(Route::Reload),
        "/api/models/unload" => return post(Route::ApiUnload),
        "/api/hardware" => return get(Route::Hardware),
        "/api/performance" => return get(Route::Performance),
        "/api/tags" => return get(Route::Ollama(Call::Tags)),
        "/api/ps" => return get(Route::Ollama(Call::Ps)),
        "/api/show" => return post(Route::Ollama(Call::Show)),
        "/api/chat" => return post(Route::Ollama(Call::Chat)),
        "/api/generate" => return post(Route::Ollama(Call::Generate)),
        "/api/embed" => return post(Route::Ollama(Call::Embed)),
        "/api/embeddings" => return post(Route::Ollama(Call::Embeddings)),
        "/api/pull" | "/api/push" | "/api/create" | "/api/copy" => return post(Route::Ollama(Call::Files)),
        "/api/delete" if method == Method::DELETE => return Ok(Route::Ollama(Call::Files)),
        "/api/delete" => return Err(NoRoute::Method("DELETE")),
        _ => {}
    }
    let rest = |prefix: &str| path.strip_prefix(prefix).filter(|rest| !rest.is_empty());
    if path == "/comfyui" || path.starts_with("/comfyui/") {
        return Ok(Route::ComfyUi);
    }
    if rest("/upstream/").is_some() {
        return Ok(Route::Upstream);
    }
    if let Some(id) = rest("/v1/models/") {
        return get(Route::Model(decode(id)));
    }
    if let Some(id) = rest("/api/models/unload/") {
        return post(Route::ApiUnloadOne(decode(id)));
    }
    if let Some(id) = rest("/api/models/load/") {
        return post(Route::ApiLoad(decode(id)));
    }
    if let Some(id) = rest("/api/inflight/").and_then(|r| r.strip_suffix("/cancel")) {
        return post(Route::Cancel(decode(id)));
    }
    if let Some(id) = rest("/api/captures/") {
        return get(Route::Capture(decode(id)));
    }
    if let Some(source) = rest("/logs/stream/") {
        return get(Route::LogStream(Some(decode(source))));
    }
    if BY_QUERY.contains(&path) && (method == Method::GET || path != "/v1/audio/voices") {
        return get(Route::Inference);
    }
    if rest("/v/").is_some_and(|rest| BELOW_V.contains(&rest)) {
        return post(Route::Inference);
    }
    if INFERENCE.contains(&path) || (rest("/v1/").is_some() && !path.ends_with('/')) {
        return post(Route::Inference);
    }
    Err(NoRoute::Path)
}

/// Whether errors of this path have Ollama's form: they are for its clients.
#[must_use]
pub fn speaks_ollama(path: &str) -> bool {
    const PATHS: [&str; 12] = [
        "tags",
        "ps",
        "show",
        "chat",
        "generate",
        "embed",
        "embeddings",
        "pull",
        "push",
        "create",
        "copy",
        "delete",
    ];
    path.strip_prefix("/api/")
        .is_some_and(|rest| PATHS.contains(&rest))
}

/// Whether this path is served on the port that is Ollama's alone: its own routes, and the OpenAI ones that it has too.
#[must_use]
pub fn is_ollamas(path: &str) -> bool {
    speaks_ollama(path) || path.starts_with("/v1/") || ["/", "/api/version"].contains(&path)
}

/// The byte that an escape (`%XX`) at the beginning of `text` stands for.
#[must_use]
pub fn escaped(text: &[u8]) -> Option<u8> {
    let digit = |b: u8| char::from(b).to_digit(16).and_then(|d| u8::try_from(d).ok());
    match text {
        [b'%', high, low, ..] => Some(digit(*high)? << 4 | digit(*low)?),
        _ => None,
    }
}

/// Resolves `%XX`; what is malformed stays as it is.
#[must_use]
pub fn decode(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        match escaped(rest) {
            Some(byte) => {
                out.push(byte);
                rest = tail.get(2..).unwrap_or_default();
            }
            None => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_methods() {
        assert_eq!(find(&Method::POST, "/v1/chat/completions"), Ok(Route::Inference));
        assert_eq!(
            find(&Method::GET, "/v1/chat/completions"),
            Err(NoRoute::Method("POST"))
        );
        assert_eq!(
            find(&Method::GET, "/v1/models/org/name%20x"),
            Ok(Route::Model("org/name x".into()))
        );
        assert_eq!(
            find(&Method::DELETE, "/running"),
            Err(NoRoute::Method("GET, HEAD"))
        );
        assert_eq!(find(&Method::PUT, "/upstream/m/x"), Ok(Route::Upstream));
        assert_eq!(
            find(&Method::POST, "/api/models/load/a%2Fb"),
            Ok(Route::ApiLoad("a/b".into()))
        );
        assert_eq!(find(&Method::GET, "/nothing"), Err(NoRoute::Path));
        assert_eq!(find(&Method::POST, "/v1/chat/completions/"), Err(NoRoute::Path));
        let upstream = |p: &'static str| upstream_path(PathAndQuery::from_static(p)).to_string();
        assert_eq!(upstream("/v/embeddings?a=b"), "/embeddings?a=b");
        assert_eq!(upstream("/audioapi/v1/tasks/run"), "/v1/tasks/run");
        assert_eq!(upstream("/v1/messages"), "/v1/messages");
        assert_eq!(find(&Method::GET, "/v1/audio/voices"), Ok(Route::Inference));
        assert_eq!(find(&Method::POST, "/v1/audio/voices"), Ok(Route::Inference));
        assert_eq!(find(&Method::POST, "/v/messages"), Ok(Route::Inference));
        assert_eq!(find(&Method::POST, "/v/other"), Err(NoRoute::Path));
        assert_eq!(decode("a%2fb%zz%4"), "a/b%zz%4");
    }
}

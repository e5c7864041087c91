//! Paths to routes.

use http::Method;

/// What a path leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// Forwarded to the model that the body names.
    Inference,
    /// Forwarded to the model that the path names.
    Upstream,
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
    /// Program and version.
    Version,
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
const INFERENCE: [&str; 9] = [
    "/reranking",
    "/rerank",
    "/infill",
    "/completion",
    "/sdapi/v1/txt2img",
    "/sdapi/v1/img2img",
    "/audioapi/v1/tasks/run",
    "/completions",
    "/chat/completions",
];

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
        "/running" => return get(Route::Running),
        "/health" | "/wol-health" => return get(Route::Health),
        "/unload" => return get(Route::Unload),
        "/logs" => return get(Route::Logs),
        "/logs/stream" => return get(Route::LogStream(None)),
        "/api/version" => return get(Route::Version),
        "/api/models/unload" => return post(Route::ApiUnload),
        _ => {}
    }
    let rest = |prefix: &str| path.strip_prefix(prefix).filter(|rest| !rest.is_empty());
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
    if let Some(source) = rest("/logs/stream/") {
        return get(Route::LogStream(Some(decode(source))));
    }
    if INFERENCE.contains(&path) || (rest("/v1/").is_some() && !path.ends_with('/')) {
        return post(Route::Inference);
    }
    Err(NoRoute::Path)
}

/// Resolves `%XX`; what is malformed stays as it is.
#[must_use]
pub fn decode(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let hex = tail
            .first_chunk::<2>()
            .filter(|_| *first == b'%')
            .and_then(|h| std::str::from_utf8(h).ok());
        match hex.and_then(|h| u8::from_str_radix(h, 16).ok()) {
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
        assert_eq!(decode("a%2fb%zz%4"), "a/b%zz%4");
    }
}

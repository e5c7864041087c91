//! A resolved registry: defaults filled in, macros expanded, names checked.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use indexmap::IndexMap;
use serde_json::Map;

use crate::matrix::Matrix;

/// A JSON object, in the order of the file.
pub type Json = Map<String, serde_json::Value>;

/// Everything that a configuration says.
#[derive(Debug, Clone, PartialEq)]
pub struct Registry {
    /// Models by id, in the order of the file.
    pub models: IndexMap<String, Model>,
    /// What is not about one model.
    pub globals: Globals,
    /// Which models may be in memory together.
    pub routing: Routing,
    /// Names that stand for a choice among models.
    pub selectors: IndexMap<String, Selector>,
    /// Sets of re-pointed names, one of which can be switched on.
    pub profiles: IndexMap<String, Profile>,
    /// Other servers whose models appear here.
    pub peers: IndexMap<String, Peer>,
}

/// One model.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    /// Key in `models`.
    pub id: String,
    /// Name for people.
    pub name: Option<String>,
    /// Text for people.
    pub description: Option<String>,
    /// Other names under which requests find it, those of `filters.setParamsByID` included.
    pub aliases: Vec<String>,
    /// How its process is started.
    pub launch: Launch,
    /// Idle time after which it is unloaded; `None` keeps it for ever.
    pub ttl: Option<Duration>,
    /// Grace between the wish to stop and the kill.
    pub unload_timeout: Duration,
    /// Longest time from start to ready.
    pub health_check_timeout: Duration,
    /// Most requests, running and waiting together, before 429. `None`: requests queue.
    pub concurrency_limit: Option<u32>,
    /// Place in the queue: higher goes first.
    pub priority: i32,
    /// Name that replaces the request's `model` on the way upstream.
    pub use_model_name: Option<String>,
    /// Changes to request bodies.
    pub filters: Filters,
    /// Not listed in `/v1/models`, still answering.
    pub unlisted: bool,
    /// Free data, listed with the model.
    pub metadata: Json,
    /// Show the progress of loading as reasoning text in the stream.
    pub send_loading_state: bool,
    /// Limits of the connection to the process.
    pub timeouts: Timeouts,
    /// WebSocket upgrades bypass queue, ttl and limit.
    pub ignore_websockets: bool,
    /// What it can do, as listed.
    pub capabilities: Option<Capabilities>,
}

/// How a model's process is started.
#[derive(Debug, Clone, PartialEq)]
pub enum Launch {
    /// Our own worker, over the control socket.
    Worker(WorkerLaunch),
    /// Any other server.
    Command(CommandLaunch),
}

/// A `worker:` block.
#[derive(Debug, Clone, PartialEq)]
pub struct WorkerLaunch {
    /// Directory of the model (absolute when the configuration's own place is), or its hub id.
    pub model: String,
    /// Whether `model` is a directory.
    pub is_path: bool,
    /// Name that the worker serves it under: `servedModelName` if set, else `useModelName`, else the model's id.
    pub served_model_name: String,
    /// Knobs as written.
    pub settings: knobs::Settings,
    /// Variables on top of swapd's own.
    pub env: Vec<(String, String)>,
}

impl WorkerLaunch {
    /// Arguments after the worker's program name: `serve MODEL --served-model-name NAME ...knobs`.
    #[must_use]
    pub fn argv(&self) -> Vec<String> {
        // A model never begins with a dash: the decoder refuses it.
        let mut argv = vec!["serve".to_owned(), self.model.clone()];
        if self.settings.get("served-model-name").is_none() {
            argv.push(format!("--served-model-name={}", self.served_model_name));
        }
        argv.extend(self.settings.to_argv());
        argv
    }

    /// [`Self::argv`] for people's eyes: without the key.
    #[must_use]
    pub fn shown_argv(&self) -> Vec<String> {
        crate::show::hide_keys(self.argv())
    }

    /// The key that the worker asks every request for.
    #[must_use]
    pub fn api_key(&self) -> Option<&str> {
        match self.settings.get("api-key") {
            Some(knobs::Value::Str(key)) => Some(key),
            _ => None,
        }
    }
}

/// A `cmd:` in llama-swap's manner.
#[derive(Debug, Clone, PartialEq)]
pub struct CommandLaunch {
    /// The command as text, macros expanded, for `/running` and people.
    pub cmd: String,
    /// The command as arguments; never empty.
    pub argv: Vec<String>,
    /// Command that stops it (`${PID}` still in it), instead of SIGTERM.
    pub cmd_stop: Option<Vec<String>>,
    /// Variables on top of swapd's own.
    pub env: Vec<(String, String)>,
    /// Base address of the server.
    pub proxy: String,
    /// Path that answers 200 when it is ready; `None`: ready at once.
    pub check_endpoint: Option<String>,
    /// The port behind `${PORT}`, if the command uses it.
    pub port: Option<u16>,
}

/// Changes to request bodies, in this order.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Filters {
    /// Keys taken out (dotted paths reach into objects). Never `model`.
    pub strip_params: Vec<String>,
    /// Keys set or replaced. Never `model`.
    pub set_params: Json,
    /// The same for requests that name the model by this id or alias.
    pub set_params_by_id: IndexMap<String, Json>,
}

/// Limits of an upstream connection; `None` is no limit.
#[derive(Debug, Clone, PartialEq)]
pub struct Timeouts {
    /// To establish the connection.
    pub connect: Option<Duration>,
    /// Between TCP keep-alive probes.
    pub keepalive: Option<Duration>,
    /// To the first byte of the reply's head.
    pub response_header: Option<Duration>,
    /// For the TLS handshake.
    pub tls_handshake: Option<Duration>,
    /// For `100 Continue`.
    pub expect_continue: Option<Duration>,
    /// That an unused connection is kept.
    pub idle_conn: Option<Duration>,
}

/// What a model can do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// Input modalities: text, audio, image.
    pub input: Vec<String>,
    /// Output modalities.
    pub output: Vec<String>,
    /// Tool calls.
    pub tools: bool,
    /// It ranks documents.
    pub reranker: bool,
    /// Context length in tokens, if known.
    pub context: Option<u64>,
}

/// Level of the proxy's own log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogLevel {
    /// Everything.
    Debug,
    /// Normal.
    Info,
    /// Only what may need attention.
    Warn,
    /// Only what failed.
    Error,
}

/// Which log goes to standard output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogTo {
    /// The proxy's.
    Proxy,
    /// The models'.
    Upstream,
    /// Both.
    Both,
    /// None.
    None,
}

/// A key that clients may present.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiKey {
    /// The key.
    pub key: String,
    /// Names that it may use; `None`: all.
    pub models: Option<Vec<String>>,
}

impl std::fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ApiKey")
            .field("key", &"(hidden)")
            .field("models", &self.models)
            .finish()
    }
}

/// What is not about one model.
#[derive(Debug, Clone, PartialEq)]
pub struct Globals {
    /// Default of a model's own.
    pub health_check_timeout: Duration,
    /// Default of a model's own.
    pub unload_timeout: Duration,
    /// Default of a model's own; `None` is never.
    pub ttl: Option<Duration>,
    /// Level of the proxy's log.
    pub log_level: LogLevel,
    /// Name of the time format in the proxy's log (`rfc3339`, ...), lower case; `None`: no times.
    pub log_time_format: Option<String>,
    /// What goes to standard output.
    pub log_to_stdout: LogTo,
    /// Rows of activity kept in memory.
    pub metrics_max_in_memory: usize,
    /// Size of the store of captured requests; 0 keeps none.
    pub capture_buffer_mb: u64,
    /// Largest request body, in bytes.
    pub max_body: usize,
    /// File of the activity database; `None`: memory only.
    pub store_path: Option<PathBuf>,
    /// Request headers that carry a client's session id.
    pub session_id_headers: Vec<String>,
    /// No measurements of the machine.
    pub performance_disabled: bool,
    /// Time between two of them.
    pub performance_every: Duration,
    /// What want of memory leads to; `None`: nothing.
    pub memory: Option<MemoryRules>,
    /// Address of the port that serves Ollama's API alone, on loopback.
    pub ollama_listen: Option<SocketAddr>,
    /// First port for `${PORT}`.
    pub start_port: u16,
    /// Default of a model's own.
    pub send_loading_state: bool,
    /// Aliases are rows of `/v1/models` too.
    pub include_aliases_in_list: bool,
    /// Patterns (RE2 syntax) of `/upstream` paths that never start a model.
    pub ignore_paths: Vec<String>,
    /// Keys; empty: no authentication.
    pub api_keys: Vec<ApiKey>,
    /// Models to load at the start, ids of `models`.
    pub preload: Vec<String>,
    /// How waiting requests are served.
    pub scheduler: Scheduler,
}

/// What want of memory leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryRules {
    /// Time between two readings.
    pub every: Duration,
    /// Idle models are unloaded after a warning has lasted so long.
    pub warning_hold: Duration,
    /// Least time between two of these unloads.
    pub evict_gap: Duration,
    /// Readings must have been better for so long before a better level counts.
    pub recover: Duration,
    /// A request for a model that cannot be started while memory is critical waits so long.
    pub max_wait: Duration,
    /// Requests in flight are cut after memory has been critical for so long; `None`: never.
    pub cut_after: Option<Duration>,
    /// File to read instead of asking the system.
    pub readings: Option<PathBuf>,
}

/// How waiting requests are served.
#[derive(Debug, Clone, PartialEq)]
pub struct Scheduler {
    /// A model whose request has waited so long goes next, whatever else comes.
    pub max_wait: Duration,
    /// Requests that may be served past a waiting one before it goes next.
    pub max_passed: u32,
    /// Requests that may wait for one model; one more is answered 429.
    pub max_queue: u32,
    /// A request that has waited so long is answered 503.
    pub max_queue_age: Duration,
    /// Time that a model stays after it became ready, even when another is wanted.
    pub min_stay: Duration,
    /// A load that nobody waits for any more is finished, not cancelled.
    pub keep_abandoned_loads: bool,
}

/// Which models may be in memory together.
#[derive(Debug, Clone, PartialEq)]
pub enum Routing {
    /// By groups; every model is in exactly one.
    Groups(IndexMap<String, Group>),
    /// By the matrix language.
    Matrix(Matrix),
}

/// A group of models.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// Its members take turns.
    pub swap: bool,
    /// When one of its members runs, models of other groups stop.
    pub exclusive: bool,
    /// Its members are not stopped by other groups.
    pub persistent: bool,
    /// Ids of models.
    pub members: Vec<String>,
}

/// How a selector chooses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strategy {
    /// Always the first target.
    Pin,
    /// The first one that is loaded, else the first one that is loading, else the first.
    Warm,
    /// The least busy one, and the next one when all are busy.
    Spillover,
}

/// A name that stands for a choice among models.
#[derive(Debug, Clone, PartialEq)]
pub struct Selector {
    /// How it chooses.
    pub strategy: Strategy,
    /// Names of models or of peers' models, in order.
    pub targets: Vec<String>,
    /// Requests in flight per target before the next one is used.
    pub spillover: u32,
    /// Name for people.
    pub name: Option<String>,
    /// Text for people.
    pub description: Option<String>,
    /// Not listed.
    pub unlisted: bool,
    /// Free data, listed.
    pub metadata: Json,
}

/// A set of re-pointed names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Profile {
    /// Text for people.
    pub description: Option<String>,
    /// Requested name to the name used instead; `None` switches the name off.
    pub pins: IndexMap<String, Option<String>>,
}

/// Another server.
#[derive(Clone, PartialEq)]
pub struct Peer {
    /// Base address.
    pub proxy: String,
    /// Its models' names, there; empty: those that it lists, looked up every `refresh`.
    pub models: Vec<String>,
    /// Time between two looks at its `/v1/models`; `None`: never.
    pub refresh: Option<Duration>,
    /// Place among peers that have the same model: higher is asked first, then the order of the file.
    pub priority: i32,
    /// Key to present there.
    pub api_key: Option<String>,
    /// Changes to request bodies.
    pub filters: Filters,
    /// Limits of the connection.
    pub timeouts: Timeouts,
}

impl std::fmt::Debug for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Peer")
            .field("proxy", &self.proxy)
            .field("models", &self.models)
            .field("refresh", &self.refresh)
            .field("priority", &self.priority)
            .field("api_key", &self.api_key.as_ref().map(|_| "(hidden)"))
            .field("filters", &self.filters)
            .field("timeouts", &self.timeouts)
            .finish()
    }
}

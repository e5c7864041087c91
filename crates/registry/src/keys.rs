//! Every key of the configuration once: type, default, meaning. The check of a file, the JSON Schema and the reference
//! page are all made from these tables.

mod routing;

use routing::{GROUP, HOOKS, MATRIX, PEER, PROFILE, ROUTING, SELECTOR};

/// The type of a value.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Ty {
    Bool,
    /// Whole number, both ends included.
    Int {
        min: i64,
        max: i64,
    },
    /// Text. Numbers and true/false are taken as written.
    Str,
    /// One of these words.
    OneOf(&'static [&'static str]),
    /// A Go duration (`5s`, `1m30s`); a plain number counts seconds.
    Duration,
    /// A list.
    List(&'static Ty),
    /// A mapping with free keys.
    Map(&'static Ty),
    /// A mapping with known keys.
    Object(&'static Object),
    /// A `worker:` block: `model`, `env` and knobs.
    Worker,
    /// The first type or the second.
    Either(&'static Ty, &'static Ty),
    /// Anything.
    Any,
}

/// A mapping with known keys.
#[derive(Debug)]
pub(crate) struct Object {
    /// Heading on the reference page, and name of its definition in the schema.
    pub(crate) name: &'static str,
    pub(crate) keys: &'static [Key],
}

/// One key.
#[derive(Debug)]
pub(crate) struct Key {
    pub(crate) name: &'static str,
    /// Older spellings.
    pub(crate) aliases: &'static [&'static str],
    pub(crate) ty: Ty,
    /// As text, for people; empty if there is none.
    pub(crate) default: &'static str,
    pub(crate) help: &'static str,
    /// Accepted without any effect, for this reason.
    pub(crate) no_effect: &'static str,
    /// It must be there.
    pub(crate) required: bool,
}

const fn key(name: &'static str, ty: Ty, default: &'static str, help: &'static str) -> Key {
    Key {
        name,
        aliases: &[],
        ty,
        default,
        help,
        no_effect: "",
        required: false,
    }
}

impl Key {
    const fn aliases(mut self, aliases: &'static [&'static str]) -> Self {
        self.aliases = aliases;
        self
    }

    const fn no_effect(mut self, why: &'static str) -> Self {
        self.no_effect = why;
        self
    }

    const fn required(mut self) -> Self {
        self.required = true;
        self
    }
}

const SECONDS: Ty = Ty::Int {
    min: 0,
    max: 31_536_000,
};
const SECONDS_OR_NONE: Ty = Ty::Int {
    min: -1,
    max: 31_536_000,
};
const COUNT: Ty = Ty::Int {
    min: 0,
    max: 1_000_000_000,
};
const STRINGS: Ty = Ty::List(&Ty::Str);
const ANY_MAP: Ty = Ty::Map(&Ty::Any);
const MODALITIES: Ty = Ty::List(&Ty::OneOf(&["text", "audio", "image"]));

pub(crate) static ROOT: Object = Object {
    name: "Top level",
    keys: &[
        key(
            "models",
            Ty::Map(&Ty::Object(&MODEL)),
            "",
            "The models, by id. A request's `model` names one by id or alias.",
        ),
        key(
            "globalTTL",
            SECONDS,
            "0",
            "Idle seconds after which a model is unloaded, unless it has its own `ttl`; 0 is never.",
        ),
        key(
            "healthCheckTimeout",
            SECONDS,
            "120",
            "Seconds from a model's start until it must be ready; less than 15 counts as 15.",
        ),
        key(
            "unloadTimeout",
            SECONDS,
            "10",
            "Seconds that a model gets to stop by itself; 0 counts as 10.",
        ),
        key(
            "startPort",
            Ty::Int { min: 1, max: 65_535 },
            "5800",
            "First port for `${PORT}`. A model keeps its port over reloads.",
        ),
        key(
            "sendLoadingState",
            Ty::Bool,
            "false",
            "Show the progress of loading in streams: chats as reasoning text, other APIs in what clients pass over.",
        ),
        key(
            "includeAliasesInList",
            Ty::Bool,
            "false",
            "List aliases as rows of `/v1/models` too.",
        ),
        key(
            "logLevel",
            Ty::Str,
            "info",
            "Level of the proxy's log: debug, info, warn, error.",
        ),
        key(
            "logTimeFormat",
            Ty::Str,
            "",
            "Time format of the log: rfc3339, rfc3339nano, rfc1123, kitchen, stamp, ...; empty for none. Taken up at the start only.",
        ),
        key(
            "logToStdout",
            Ty::OneOf(&["proxy", "upstream", "both", "none"]),
            "proxy",
            "Which log goes to standard output. Taken up at the start only.",
        ),
        key("logRequests", Ty::Bool, "", "").no_effect("requests are logged, always"),
        key(
            "metricsMaxInMemory",
            Ty::Int {
                min: i64::MIN,
                max: 10_000_000,
            },
            "1000",
            "Rows of activity kept in memory; 0 or less counts as 1000.",
        ),
        key(
            "captureBuffer",
            COUNT,
            "5",
            "Megabytes for captured requests, and as much again for those in flight; 0 keeps none.",
        ),
        key(
            "maxBodySize",
            Ty::Int { min: 1, max: 65_536 },
            "256",
            "Megabytes of a request's body; a larger one is answered 413.",
        ),
        key("store", Ty::Object(&STORE), "", "Where activity is kept."),
        key("ui", Ty::Object(&UI), "", "The web page."),
        key(
            "performance",
            Ty::Object(&PERFORMANCE),
            "",
            "Measurements of the machine.",
        ),
        key("memory", Ty::Object(&MEMORY), "", "What want of memory leads to."),
        key(
            "ollama",
            Ty::Object(&OLLAMA),
            "",
            "Ollama's API, which is served beside OpenAI's in any case.",
        ),
        key("upstream", Ty::Object(&UPSTREAM), "", "The `/upstream` routes."),
        key("macros", Ty::Any, "", "Values to be used as `${name}` elsewhere."),
        key(
            "apiKeys",
            Ty::List(&Ty::Either(&Ty::Str, &Ty::Object(&API_KEY))),
            "",
            "Keys that clients must present; none: no authentication.",
        ),
        key(
            "profiles",
            Ty::Map(&Ty::Object(&PROFILE)),
            "",
            "Sets of re-pointed names.",
        ),
        key(
            "selectors",
            Ty::Map(&Ty::Object(&SELECTOR)),
            "",
            "Names that stand for a choice among models.",
        ),
        key(
            "groups",
            Ty::Map(&Ty::Object(&GROUP)),
            "",
            "Older place of `routing.router.settings.groups`.",
        ),
        key(
            "matrix",
            Ty::Object(&MATRIX),
            "",
            "Older place of `routing.router.settings.matrix`.",
        ),
        key(
            "routing",
            Ty::Object(&ROUTING),
            "",
            "Which models may be in memory together, and who goes first.",
        ),
        key("hooks", Ty::Object(&HOOKS), "", "What happens by itself."),
        key(
            "peers",
            Ty::Map(&Ty::Object(&PEER)),
            "",
            "Other servers, whose models appear as `peer/model` and, where the name is free, as `model`.",
        ),
    ],
};

pub(crate) static MODEL: Object = Object {
    name: "models.<id>",
    keys: &[
        key(
            "worker",
            Ty::Worker,
            "",
            "Run the model in mlxworker: `model` and knobs. Either this or `cmd`.",
        ),
        key(
            "cmd",
            Ty::Str,
            "",
            "Command of any other server. No shell: quotes and backslashes are understood, lines beginning with `#` are dropped.",
        ),
        key(
            "cmdStop",
            Ty::Str,
            "",
            "Command that stops it, instead of SIGTERM; `${PID}` is its process. Both have `unloadTimeout` to end in: it \
             may go on when the process has ended, and is killed then.",
        ),
        key(
            "proxy",
            Ty::Str,
            "http://localhost:${PORT}",
            "Base address of the server that `cmd` starts, http:// or https://.",
        ),
        key(
            "checkEndpoint",
            Ty::Str,
            "/health",
            "Path that answers 200 once it is ready; `none`: ready as soon as it accepts connections.",
        ),
        key(
            "env",
            STRINGS,
            "",
            "`NAME=value`, on top of swapd's own environment.",
        ),
        key(
            "aliases",
            STRINGS,
            "",
            "Other names. No name may belong to two models.",
        ),
        key(
            "ttl",
            SECONDS_OR_NONE,
            "-1",
            "Idle seconds after which it is unloaded; 0 is never, -1 is `globalTTL`.",
        ),
        key(
            "unloadTimeout",
            SECONDS,
            "0",
            "Seconds that it gets to stop by itself; 0 is the global one.",
        ),
        key(
            "healthCheckTimeout",
            SECONDS,
            "0",
            "Seconds from its start until it must be ready; 0 is the global one.",
        ),
        key(
            "useModelName",
            Ty::Str,
            "",
            "Replaces `model` in requests on their way upstream.",
        ),
        key("name", Ty::Str, "", "Name for people."),
        key("description", Ty::Str, "", "Text for people."),
        key(
            "unlisted",
            Ty::Bool,
            "false",
            "Leave it out of `/v1/models`; it still answers.",
        ),
        key("filters", Ty::Object(&FILTERS), "", "Changes to request bodies."),
        key(
            "macros",
            Ty::Any,
            "",
            "Macros of this model, before the global ones of the same name.",
        ),
        key(
            "metadata",
            ANY_MAP,
            "",
            "Free data, listed in `/v1/models` under `meta`.",
        ),
        key(
            "concurrencyLimit",
            Ty::Int {
                min: 0,
                max: 1_000_000,
            },
            "0",
            "Most requests, running and waiting together; one more is answered 429. 0: they queue.",
        ),
        key(
            "sendLoadingState",
            Ty::Bool,
            "",
            "As the global one, for this model.",
        ),
        key(
            "timeouts",
            Ty::Object(&TIMEOUTS),
            "",
            "Limits of the connection to it.",
        ),
        key("compat", Ty::Object(&COMPAT), "", "Ways around clients' habits."),
        key(
            "capabilities",
            Ty::Object(&CAPABILITIES),
            "",
            "What it can do, as listed in `/v1/models`.",
        ),
    ],
};

static FILTERS: Object = Object {
    name: "models.<id>.filters",
    keys: &[
        key("stripParams", Ty::Str, "", "Keys to take out of the body, separated by commas; dots reach into objects. `model` always stays.")
            .aliases(&["strip_params"]),
        key("setParams", ANY_MAP, "", "Keys to set or replace in the body. `model` always stays."),
        key("setParamsByID", Ty::Map(&ANY_MAP), "", "The same for requests under one name; each name becomes an alias."),
    ],
};

static TIMEOUTS: Object = Object {
    name: "timeouts",
    keys: &[
        key(
            "connect",
            SECONDS,
            "30",
            "Seconds to connect; 0 is no limit, here and below.",
        ),
        key(
            "keepalive",
            SECONDS,
            "30",
            "Seconds between TCP keep-alive probes of a server on another machine.",
        ),
        key(
            "responseHeader",
            SECONDS,
            "0 (peers: 60)",
            "Seconds to the head of the reply.",
        ),
        key(
            "tlsHandshake",
            SECONDS,
            "10",
            "Seconds for TLS, where the address is https://.",
        ),
        key("expectContinue", SECONDS, "1", "")
            .no_effect("a body is sent with its head, and nobody is asked first"),
        key(
            "idleConn",
            SECONDS,
            "90",
            "Seconds that an unused connection is kept.",
        ),
    ],
};

static COMPAT: Object = Object {
    name: "models.<id>.compat",
    keys: &[key(
        "ignoreWebsockets",
        Ty::Bool,
        "false",
        "WebSocket upgrades bypass queue, ttl and limit, and are refused with 409 while it is not ready.",
    )],
};

static CAPABILITIES: Object = Object {
    name: "models.<id>.capabilities",
    keys: &[
        key("in", MODALITIES, "", "Input: text, audio, image."),
        key("out", MODALITIES, "", "Output: text, audio, image."),
        key("tools", Ty::Bool, "false", "It calls tools."),
        key("reranker", Ty::Bool, "false", "It ranks documents."),
        key("context", COUNT, "0", "Context length in tokens; 0: not said."),
    ],
};

static STORE: Object = Object {
    name: "store",
    keys: &[key(
        "path",
        Ty::Str,
        "",
        "File of the activity database; without it, activity is kept in memory.",
    )],
};

static UI: Object = Object {
    name: "ui",
    keys: &[key(
        "activity",
        Ty::Object(&UI_ACTIVITY),
        "",
        "The activity table.",
    )],
};

static UI_ACTIVITY: Object = Object {
    name: "ui.activity",
    keys: &[key(
        "session_id",
        STRINGS,
        "X-Session-ID, X-Litellm-Session-Id",
        "Request headers that hold a client's session id.",
    )],
};

static PERFORMANCE: Object = Object {
    name: "performance",
    keys: &[
        key("disabled", Ty::Bool, "false", "Measure nothing."),
        key(
            "every",
            Ty::Duration,
            "5s",
            "Time between measurements, at least 5s.",
        ),
    ],
};

static MEMORY: Object = Object {
    name: "memory",
    keys: &[
        key("disabled", Ty::Bool, "false", "Do nothing about it."),
        key(
            "every",
            Ty::Duration,
            "2s",
            "Time between two readings, at least 100ms. A kernel tells of a new level within seconds; one reading costs some \
             tens of microseconds.",
        ),
        key(
            "warningHold",
            Ty::Duration,
            "30s",
            "How long the system must have been short of memory before idle models are unloaded, the least recently used \
             first: long enough for a passing need, short enough to be ahead of compression and swap.",
        ),
        key(
            "evictGap",
            Ty::Duration,
            "5s",
            "Least time between two of these unloads, so that the effect of one shows before the next.",
        ),
        key(
            "recover",
            Ty::Duration,
            "10s",
            "How long readings must have been better before a better level counts: macOS smooths them over 5 s.",
        ),
        key(
            "maxWait",
            Ty::Duration,
            "10s",
            "While memory is critically short nothing is started. A request that needs a start waits so long, then it is \
             answered 503 with the numbers.",
        ),
        key(
            "cutAfter",
            Ty::Duration,
            "60s",
            "Memory critical for so long with no idle model left: a model with requests in flight is unloaded, after its \
             `unloadTimeout`. 0: never.",
        ),
        key(
            "readings",
            Ty::Str,
            "",
            "File to read instead of asking the system, for trying these rules out: JSON with `level` (normal, warning, \
             critical) and, if wanted, `available_bytes`, `total_bytes`, `swap_used_bytes`.",
        ),
    ],
};

static OLLAMA: Object = Object {
    name: "ollama",
    keys: &[key(
        "listen",
        Ty::Str,
        "",
        "Address of a second port that serves nothing else, on loopback; `:PORT` is `127.0.0.1:PORT`. For clients that look for \
         Ollama at its own address while swapd listens at another. Taken up at the start only; `--ollama-listen` comes \
         before it.",
    )],
};

static UPSTREAM: Object = Object {
    name: "upstream",
    keys: &[key(
        "ignorePaths",
        STRINGS,
        r"`.*\.(js|json|css|png|gif|jpg|jpeg|ico|txt)$`",
        "Patterns of paths under `/upstream/<model>/` that never start the model.",
    )],
};

static API_KEY: Object = Object {
    name: "apiKeys[]",
    keys: &[
        key("key", Ty::Str, "", "The key.").required(),
        key(
            "models",
            STRINGS,
            "",
            "Names of the models that it may use; all without this.",
        ),
    ],
};

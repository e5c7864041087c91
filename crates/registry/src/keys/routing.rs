//! Keys about more than one model: profiles, selectors, groups, the matrix, the scheduler, hooks, peers.

use super::{ANY_MAP, COUNT, FILTERS, Object, SECONDS, STRINGS, TIMEOUTS, Ty, key};

pub(super) static PROFILE: Object = Object {
    name: "profiles.<name>",
    keys: &[
        key("description", Ty::Str, "", "Text for people."),
        key(
            "pins",
            Ty::Map(&Ty::Str),
            "",
            "Requested name to the name used instead; `null` switches a name off (404).",
        )
        .required(),
    ],
};

pub(super) static SELECTOR: Object = Object {
    name: "selectors.<name>",
    keys: &[
        key("strategy", Ty::OneOf(&["pin", "warm", "spillover"]), "", "`pin`: the first target. `warm`: the first that is loaded, else loading, else the first. `spillover`: the least busy one, the next one when all are busy.").required(),
        key("targets", STRINGS, "", "Models, in order.").required(),
        key("settings", Ty::Object(&SELECTOR_SETTINGS), "", "Settings of the strategy."),
        key("name", Ty::Str, "", "Name for people."),
        key("description", Ty::Str, "", "Text for people."),
        key("unlisted", Ty::Bool, "false", "Leave it out of `/v1/models`."),
        key("metadata", ANY_MAP, "", "Free data, listed."),
    ],
};

static SELECTOR_SETTINGS: Object = Object {
    name: "selectors.<name>.settings",
    keys: &[key(
        "spillover",
        Ty::Int {
            min: 1,
            max: 1_000_000,
        },
        "1",
        "Requests per target before the next one is used.",
    )],
};

pub(super) static GROUP: Object = Object {
    name: "routing.router.settings.groups.<name>",
    keys: &[
        key("swap", Ty::Bool, "true", "Members take turns: one at a time."),
        key(
            "exclusive",
            Ty::Bool,
            "true",
            "When a member starts, models of other groups stop (unless theirs are persistent).",
        ),
        key(
            "persistent",
            Ty::Bool,
            "false",
            "Other groups never stop the members.",
        ),
        key(
            "members",
            STRINGS,
            "",
            "Ids of models. A model is in one group; those in none are in `(default)`, which swaps and is exclusive.",
        ),
    ],
};

pub(super) static MATRIX: Object = Object {
    name: "routing.router.settings.matrix",
    keys: &[
        key("vars", Ty::Map(&Ty::Str), "", "Short names for model ids."),
        key(
            "evict_costs",
            Ty::Map(&Ty::Int {
                min: 1,
                max: 1_000_000_000,
            }),
            "1 each",
            "What it costs to unload a model, by short name or id.",
        ),
        key(
            "sets",
            Ty::Map(&Ty::Str),
            "",
            "Allowed sets: `a & (b | c)`, `+other` for another set. `&` binds tighter than `|`.",
        )
        .required(),
    ],
};

pub(super) static ROUTING: Object = Object {
    name: "routing",
    keys: &[
        key(
            "router",
            Ty::Object(&ROUTER),
            "",
            "Which models may be in memory together.",
        ),
        key("scheduler", Ty::Object(&SCHEDULER), "", "Who goes first."),
    ],
};

static ROUTER: Object = Object {
    name: "routing.router",
    keys: &[
        key(
            "use",
            Ty::OneOf(&["group", "matrix"]),
            "group",
            "Which of the two settings counts.",
        ),
        key(
            "settings",
            Ty::Object(&ROUTER_SETTINGS),
            "",
            "Both may be present.",
        ),
    ],
};

static ROUTER_SETTINGS: Object = Object {
    name: "routing.router.settings",
    keys: &[
        key("groups", Ty::Map(&Ty::Object(&GROUP)), "", "Groups of models."),
        key("matrix", Ty::Object(&MATRIX), "", "Allowed sets of models."),
    ],
};

static SCHEDULER: Object = Object {
    name: "routing.scheduler",
    keys: &[
        key("use", Ty::OneOf(&["fifo"]), "fifo", "The one there is."),
        key("settings", Ty::Object(&SCHEDULER_SETTINGS), "", "Its settings."),
    ],
};

static SCHEDULER_SETTINGS: Object = Object {
    name: "routing.scheduler.settings",
    keys: &[key("fifo", Ty::Object(&FIFO), "", "Settings of `fifo`.")],
};

static FIFO: Object = Object {
    name: "routing.scheduler.settings.fifo",
    keys: &[
        key(
            "priority",
            Ty::Map(&Ty::Int {
                min: -1_000_000,
                max: 1_000_000,
            }),
            "0 each",
            "Place in the queue by model; higher goes first.",
        ),
        key(
            "maxWait",
            SECONDS,
            "30",
            "Seconds after which a waiting request's model goes next, whatever else comes.",
        ),
        key(
            "maxPassed",
            COUNT,
            "16",
            "Requests that may be served past a waiting one before its model goes next.",
        ),
        key(
            "maxQueue",
            Ty::Int {
                min: 1,
                max: 1_000_000,
            },
            "256",
            "Requests that may wait for one model; one more is answered 429.",
        ),
        key(
            "maxQueueAge",
            SECONDS,
            "600",
            "Seconds after which a waiting request is answered 503.",
        ),
        key(
            "minStay",
            SECONDS,
            "0",
            "Seconds that a model stays after it became ready, even when another is wanted.",
        ),
        key(
            "keepAbandonedLoads",
            Ty::Bool,
            "true",
            "Finish a load that nobody waits for any more, unless its room is wanted; false: cancel it at once.",
        ),
    ],
};

pub(super) static HOOKS: Object = Object {
    name: "hooks",
    keys: &[key(
        "on_startup",
        Ty::Object(&ON_STARTUP),
        "",
        "When swapd has started.",
    )],
};

static ON_STARTUP: Object = Object {
    name: "hooks.on_startup",
    keys: &[key(
        "preload",
        STRINGS,
        "",
        "Models (or aliases) to load, one after the other. A reload loads none.",
    )],
};

pub(super) static PEER: Object = Object {
    name: "peers.<name>",
    keys: &[
        key("proxy", Ty::Str, "", "Base address. With `https://` its certificate must be one that the system trusts, and `HTTPS_PROXY` and `NO_PROXY` count.").required(),
        key(
            "models",
            STRINGS,
            "",
            "Its models' names there. May be left out with `refresh`: then all that it lists itself are taken.",
        ),
        key(
            "refresh",
            SECONDS,
            "0",
            "Seconds between two looks at its `/v1/models`, for its health and its list of models; less than 5 counts as 5, 0 is never.",
        ),
        key(
            "priority",
            Ty::Int {
                min: -1_000_000,
                max: 1_000_000,
            },
            "0",
            "Order of the peers that have the same model, asked for by its bare name: higher first, then the order of the file. The next one is asked when one cannot be reached or refuses (429, 503).",
        ),
        key("apiKey", Ty::Str, "", "Key to present there."),
        key("filters", Ty::Object(&FILTERS), "", "Changes to request bodies."),
        key("timeouts", Ty::Object(&TIMEOUTS), "", "Limits of the connection."),
    ],
};

//! The model registry: text to a checked, resolved [`Registry`]; the difference of two registries.
//!
//! llama-swap's configuration, whole, and beside its `cmd:` the native `worker:` with typed knobs. The way of a file:
//!
//! | module       | step                                                                                   |
//! |--------------|----------------------------------------------------------------------------------------|
//! | `env`        | `${env.NAME}` in the text                                                               |
//! | `yaml`       | text to a tree in which every key and value knows its line and column                   |
//! | `merge`      | several sources to one tree (`--config-dir`)                                            |
//! | `macros`     | `${name}`, `${MODEL_ID}`, `${PORT}`                                                     |
//! | `keys`       | every key once: type, default, meaning                                                  |
//! | `check`      | the tree against `keys`: types, ranges, unknown keys with a did-you-mean                |
//! | `decode`     | tree to [`Registry`]: defaults, names that must exist, names that must not clash        |
//! | `matrix`     | the language of allowed sets, and the cheapest eviction                                 |
//! | `routing`    | who must go when a model starts                                                         |
//! | `diff`       | what changed between two registries                                                     |
//! | `show`, `schema`, `docs` | a registry for people, the JSON Schema, the reference page                  |
//!
//! Reading goes on after an error, so that all of them are reported at once, each with file, line, column and key.
//! [`Registry::from_sources`] reads no file: environment variables (through [`Options`]), the home directory and the
//! current directory are all that it asks the system for.

mod check;
mod decode;
mod diagnostic;
mod diff;
mod docs;
mod duration;
mod env;
mod keys;
mod load;
mod macros;
mod matrix;
mod merge;
mod routing;
mod schema;
mod shell;
mod show;
mod types;
mod yaml;

pub use decode::parse_loopback;
pub use diagnostic::{Code, Diagnostic, Severity, Warning};
pub use diff::RegistryDiff;
pub use docs::configuration_markdown;
pub use duration::parse as parse_duration;
pub use load::{Options, Source, config_files, read_sources};
pub use matrix::Matrix;
pub use routing::Target;
pub use schema::schema;
pub use types::{
    ApiKey, Capabilities, CommandLaunch, Filters, Globals, Group, Json, Launch, LogLevel, LogTo, MemoryRules,
    Model, Peer, Profile, Registry, Routing, Scheduler, Selector, Strategy, Timeouts, WorkerLaunch,
};

//! Every tuning knob of a worker once: flag, YAML key, default, range, unit, and the reason for the default.
//!
//! One table ([`TABLE`]) yields everything else, so that none of it can drift:
//!
//! | module     | idea                                                                                |
//! |------------|-------------------------------------------------------------------------------------|
//! | `table`    | the table itself, and [`Knobs`], the typed values that it resolves to               |
//! | `knob`     | what a table row says: [`Knob`], [`Kind`], [`Effect`], [`Value`]                    |
//! | `settings` | [`Settings`]: what somebody wrote (flags or YAML), checked one by one; to argv again |
//! | `args`     | `mlxworker serve MODEL --flag value ...` to [`ParsedArgs`]                          |
//! | `docs`     | `--help` and the reference page                                                     |
//! | `from_value` | a resolved value into the type of its field                                       |
//!
//! There are two stages, as in ripgrep: [`Settings`] is what was written, sparse; [`Knobs`] is what it resolves to.
//! Flag names are vllm-mlx's wherever the meaning is the same, so a registry keeps its arguments when the program's
//! name changes. A knob whose engine part does not exist yet is accepted, validated and *named in a warning* when it
//! is set ([`Effect::AcceptedOnly`]); one that cannot be had is refused with the reason ([`Effect::Refused`]); none is
//! silently ignored. Speculative decoding is refused everywhere.

mod args;
mod docs;
mod from_value;
mod knob;
mod settings;
mod speculative;
mod suggest;
mod table;

pub use args::{Command, ParsedArgs, parse_args, parse_command};
pub use docs::{help_text, reference_markdown};
pub use knob::{Effect, Fixed, Group, Kind, Knob, KnobError, Value};
pub use settings::Settings;
pub use speculative::{SPECULATIVE_REASON, is_speculative};
pub use suggest::closest;
pub use table::{Knobs, TABLE, by_flag, by_yaml_key};

/// Sampling values when neither the request, nor a `--default-*` knob, nor the model's `generation_config.json` says
/// anything. Temperature and top-p are vllm-mlx's own fallbacks, so a client sees the same distribution as before.
pub mod fallback {
    /// Softmax temperature.
    pub const TEMPERATURE: f64 = 0.7;
    /// Nucleus mass.
    pub const TOP_P: f64 = 0.9;
    /// Candidates kept; 0 keeps all.
    pub const TOP_K: u64 = 0;
    /// Smallest probability relative to the most likely token.
    pub const MIN_P: f64 = 0.0;
    /// Multiplicative penalty; 1 is none.
    pub const REPETITION_PENALTY: f64 = 1.0;
}

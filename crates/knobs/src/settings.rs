//! What somebody wrote: a sparse set of checked values.

use std::collections::BTreeMap;

use crate::knob::{Effect, Fixed, Kind, Knob, KnobError, Value};
use crate::table::{Knobs, TABLE, by_flag, by_yaml_key};
use crate::{closest, is_speculative};

/// Knobs that were set, by flag or by YAML key, each already checked on its own. Two are equal when they would start
/// the same worker.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Settings {
    /// Canonical flag to value.
    values: BTreeMap<&'static str, Value>,
}

impl Settings {
    /// Nothing set.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets a knob by its YAML key. `null` leaves it unset.
    ///
    /// # Errors
    /// An unknown key (with the nearest known one), a speculative-decoding key, a value of the wrong kind or out of
    /// range. The message names key and value, not the place: that is the caller's.
    pub fn set_yaml(&mut self, key: &str, value: &serde_json::Value) -> Result<(), KnobError> {
        let Some(knob) = by_yaml_key(key) else {
            if is_speculative(key) {
                return Err(KnobError::Speculative { name: key.to_owned() });
            }
            let keys: Vec<String> = TABLE.iter().map(Knob::yaml_key).collect();
            return Err(KnobError::Unknown {
                what: "worker key",
                name: format!("`{key}`"),
                suggestion: closest(key, keys.iter().map(String::as_str)).map(|k| format!("`{k}`")),
            });
        };
        if value.is_null() {
            self.values.remove(knob.flag);
            return Ok(());
        }
        let checked = knob.check(key, &enum_number(knob, value))?;
        self.values.insert(knob.flag, checked);
        Ok(())
    }

    /// Every key of a map, as [`Settings::set_yaml`] takes them.
    ///
    /// # Errors
    /// All errors at once.
    pub fn from_map<'a>(
        map: impl IntoIterator<Item = (&'a String, &'a serde_json::Value)>,
    ) -> Result<Self, Vec<KnobError>> {
        let mut settings = Self::new();
        let errors: Vec<KnobError> = map
            .into_iter()
            .filter_map(|(key, value)| settings.set_yaml(key, value).err())
            .collect();
        if errors.is_empty() {
            Ok(settings)
        } else {
            Err(errors)
        }
    }

    /// Sets a knob by its flag. `text` is the value, absent for a switch.
    pub(crate) fn set_flag(&mut self, flag: &str, text: Option<&str>) -> Result<(), KnobError> {
        let Some((knob, on)) = by_flag(flag) else {
            return Err(KnobError::Usage(format!("unknown flag {flag}")));
        };
        let value = match (knob.kind, text) {
            (Kind::Bool, None) => Value::Bool(on),
            (Kind::Bool, Some(text)) => match knob.check_text(flag, text)? {
                Value::Bool(given) => Value::Bool(given == on),
                other => other,
            },
            (_, Some(text)) => knob.check_text(flag, text)?,
            (_, None) => {
                return Err(KnobError::MissingValue {
                    name: flag.to_owned(),
                    expected: knob.expects(),
                });
            }
        };
        self.values.insert(knob.flag, value);
        Ok(())
    }

    /// The value set for a canonical flag, if it was set.
    #[must_use]
    pub fn get(&self, flag: &str) -> Option<&Value> {
        self.values.get(flag)
    }

    /// Whether nothing is set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// What is set, with its row, in the table's order.
    pub fn iter(&self) -> impl Iterator<Item = (&'static Knob, &Value)> {
        TABLE
            .iter()
            .filter_map(|knob| self.values.get(knob.flag).map(|v| (knob, v)))
    }

    /// The flags that say the same, in the table's order: `--max-num-seqs 8 --disable-prefix-cache`. Parsing them
    /// gives these settings again.
    #[must_use]
    pub fn to_argv(&self) -> Vec<String> {
        let mut argv = Vec::new();
        for (knob, value) in self.iter() {
            match value {
                Value::Bool(true) => argv.push(format!("--{}", knob.flag)),
                Value::Bool(false) => argv.push(format!("--no-{}", knob.flag)),
                // A value that begins with a dash must not look like the next flag.
                other => argv.push(format!("--{}={other}", knob.flag)),
            }
        }
        argv
    }

    /// One line for each knob that was set and does nothing, in this version or beside the others.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        let quantized = self.get("kv-cache-quantization") == Some(&Value::Bool(true));
        self.iter()
            .filter_map(|(knob, value)| {
                let value = if knob.secret {
                    "(hidden)".to_owned()
                } else {
                    value.to_string()
                };
                if OF_KV_QUANTIZATION.contains(&knob.flag) && !quantized {
                    return Some(format!(
                        "--{} {value} has no effect without --kv-cache-quantization",
                        knob.flag
                    ));
                }
                match knob.effect {
                    // A refused one never gets as far as a worker.
                    Effect::Active | Effect::Refused(_) => None,
                    // Asking for what happens anyway needs no answer.
                    Effect::NoMeaning(_)
                        if Some(&value) == knob.default.value().map(|v| v.to_string()).as_ref() =>
                    {
                        None
                    }
                    Effect::AcceptedOnly(why) => Some(format!(
                        "--{} {value} is accepted and has no effect yet: {why}",
                        knob.flag
                    )),
                    Effect::NoMeaning(why) => {
                        Some(format!("--{} {value} has no meaning here: {why}", knob.flag))
                    }
                }
            })
            .collect()
    }

    /// Fills in the defaults and checks the knobs against each other.
    ///
    /// # Errors
    /// [`KnobError::Refused`] for a knob that cannot be had; [`KnobError::Conflict`] naming knobs and values.
    pub fn resolve(&self) -> Result<Knobs, KnobError> {
        let mut knobs = Knobs::read(|knob| self.values.get(knob.flag).cloned().or_else(|| default(knob)))?;
        for (knob, value) in self.iter() {
            if let Effect::Refused(why) = knob.effect
                && default(knob).as_ref() != Some(value)
            {
                return Err(KnobError::Refused {
                    name: format!("--{}", knob.flag),
                    why,
                });
            }
        }
        if !knobs.paged_cache_block_size.is_power_of_two() {
            return Err(KnobError::Conflict(format!(
                "--paged-cache-block-size {}: must be a power of two",
                knobs.paged_cache_block_size
            )));
        }
        if knobs.kv_cache_quantization && knobs.attention == "kernel" {
            return Err(KnobError::Conflict(
                "--attention kernel and --kv-cache-quantization: the kernels read keys and values as they are, not \
                 quantised; leave one of the two out"
                    .to_owned(),
            ));
        }
        if !knobs.continuous_batching {
            if self.get("max-num-seqs").is_some() && knobs.max_num_seqs > 1 {
                return Err(KnobError::Conflict(format!(
                    "--max-num-seqs {} needs --continuous-batching: without it one request runs at a time",
                    knobs.max_num_seqs
                )));
            }
            knobs.max_num_seqs = 1;
        }
        if let Some((knob, _)) = by_flag("prefill-step-size")
            && let Kind::Int { min, .. } = knob.kind
            && (1..min.unsigned_abs()).contains(&knobs.chunked_prefill_tokens)
        {
            return Err(KnobError::Conflict(format!(
                "--chunked-prefill-tokens {}: must be 0, or at least the {min} of --prefill-step-size, which it stands for",
                knobs.chunked_prefill_tokens
            )));
        }
        if knobs.chunked_prefill_tokens > 0 {
            knobs.prefill_step_size = knobs.chunked_prefill_tokens;
        }
        if knobs.max_tokens > knobs.max_request_tokens {
            match (
                self.get("max-tokens").is_some(),
                self.get("max-request-tokens").is_some(),
            ) {
                (true, true) => {
                    return Err(KnobError::Conflict(format!(
                        "--max-tokens {} is larger than --max-request-tokens {}: the length of a reply that nobody \
                         asked for would exceed the longest that may be asked for",
                        knobs.max_tokens, knobs.max_request_tokens
                    )));
                }
                (true, false) => knobs.max_request_tokens = knobs.max_tokens,
                (false, _) => knobs.max_tokens = knobs.max_request_tokens,
            }
        }
        if !knobs.use_paged_cache && knobs.enable_prefix_cache {
            if self.get("enable-prefix-cache").is_some() {
                return Err(KnobError::Conflict(
                    "--enable-prefix-cache needs --use-paged-cache: shared prefixes are shared blocks"
                        .to_owned(),
                ));
            }
            knobs.enable_prefix_cache = false;
        }
        Ok(knobs)
    }
}

/// What they say counts only with the switch itself.
const OF_KV_QUANTIZATION: [&str; 2] = ["kv-cache-quantization-bits", "kv-cache-quantization-group-size"];

fn default(knob: &Knob) -> Option<Value> {
    match (knob.kind, knob.default) {
        // A switch without a default is off.
        (Kind::Bool, Fixed::None) => Some(Value::Bool(false)),
        (_, fixed) => fixed.value(),
    }
}

/// `kvCacheQuantizationBits: 8` is a number in YAML and a name in the table.
fn enum_number(knob: &Knob, value: &serde_json::Value) -> serde_json::Value {
    match (knob.kind, value) {
        (Kind::Enum(_), serde_json::Value::Number(n)) => serde_json::Value::String(n.to_string()),
        _ => value.clone(),
    }
}

impl Default for Knobs {
    /// Every knob at its default.
    fn default() -> Self {
        // The table's own test shows that the defaults always fit.
        match Settings::new().resolve() {
            Ok(knobs) => knobs,
            Err(e) => unreachable!("{e}"),
        }
    }
}

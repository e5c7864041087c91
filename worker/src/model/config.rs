//! config.json, checked: what is missing, out of range or not supported is named before any weight is read.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::LoadError;

/// Architecture and sizes of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// `model_type`.
    pub model_type: String,
    /// Width of the residual stream.
    pub hidden: i32,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: i32,
    /// Key and value heads; divides `heads`.
    pub kv_heads: i32,
    /// Width of a head.
    pub head_dim: i32,
    /// Width inside the dense feed-forward network.
    pub intermediate: i32,
    /// Rows of the embedding.
    pub vocab: i32,
    /// Epsilon of every normalisation.
    pub norm_eps: f32,
    /// Positions that the model knows.
    pub max_positions: usize,
    /// Rotary embedding.
    pub rope: Rope,
    /// The embedding is the output matrix too.
    pub tied: bool,
    /// The attention's projections have biases.
    pub attention_bias: bool,
    /// Mixture of experts, if any layer has one.
    pub moe: Option<Moe>,
    /// How weights with scales are quantised.
    pub quantization: Option<Quantization>,
}

/// Rotary position embedding.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f32,
    /// Positions are multiplied by this (1, or 1/factor for linear scaling).
    pub scale: f32,
}

/// Sparse layers.
#[derive(Debug, Clone, PartialEq)]
pub struct Moe {
    /// Experts of a layer.
    pub experts: i32,
    /// Experts that each token passes through.
    pub active: i32,
    /// Width inside an expert.
    pub intermediate: i32,
    /// Weights of the chosen experts are scaled to sum to one.
    pub normalise: bool,
    /// `layer` is sparse when `(layer + 1) % step == 0`...
    step: usize,
    /// ...and it is not among these.
    dense_layers: Vec<usize>,
}

impl Moe {
    /// Whether that layer has experts.
    #[must_use]
    pub fn is_sparse(&self, layer: usize) -> bool {
        !self.dense_layers.contains(&layer) && (layer + 1).is_multiple_of(self.step)
    }
}

/// Affine quantisation: `bits` per weight, a scale and a bias for each group of weights in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Affine {
    /// Weights that share a scale: 32, 64 or 128.
    pub group: i32,
    /// Bits of a weight: 2, 3, 4, 5, 6 or 8.
    pub bits: i32,
}

/// The `quantization` entry: a default, and layers that differ from it.
#[derive(Debug, Clone, PartialEq)]
pub struct Quantization {
    default: Affine,
    overrides: HashMap<String, Affine>,
}

impl Quantization {
    /// Of the layer at that path, such as `model.layers.0.mlp.gate`.
    #[must_use]
    pub fn of(&self, path: &str) -> Affine {
        self.overrides.get(path).copied().unwrap_or(self.default)
    }

    /// Bits of the most coarsely quantised layers.
    #[must_use]
    pub fn fewest_bits(&self) -> i32 {
        let overrides = self.overrides.values().map(|affine| affine.bits);
        overrides.fold(self.default.bits, i32::min)
    }
}

impl ModelConfig {
    /// Reads and checks a config.json.
    ///
    /// # Errors
    ///
    /// The file cannot be read or parsed; a key is missing, wrong or asks for what is not supported.
    pub fn read(file: &Path) -> Result<Self, LoadError> {
        let failed = |reason: String| LoadError::File {
            file: file.to_path_buf(),
            reason,
        };
        let text = fs::read_to_string(file).map_err(|error| failed(error.to_string()))?;
        let value: Value =
            serde_json::from_str(&text).map_err(|error| failed(format!("not JSON: {error}")))?;
        let Value::Object(keys) = value else {
            return Err(failed("not a JSON object".to_owned()));
        };
        Reader { file, keys: &keys }.config()
    }
}

/// The keys of one file, with errors that name it.
struct Reader<'a> {
    file: &'a Path,
    keys: &'a Map<String, Value>,
}

const SUPPORTED: [&str; 2] = ["qwen3", "qwen3_moe"];

impl Reader<'_> {
    fn config(&self) -> Result<ModelConfig, LoadError> {
        let model_type = self
            .keys
            .get("model_type")
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned();
        if !SUPPORTED.contains(&model_type.as_str()) {
            let found = self
                .keys
                .get("model_type")
                .map_or_else(|| "missing".to_owned(), Value::to_string);
            return Err(self.error(
                "model_type",
                format!(
                    "{found}: this architecture is not supported (supported: {})",
                    SUPPORTED.join(", ")
                ),
            ));
        }
        let hidden = self.size("hidden_size")?;
        let heads = self.size("num_attention_heads")?;
        let kv_heads = self.size_or("num_key_value_heads", heads)?;
        if heads % kv_heads != 0 {
            return Err(self.error(
                "num_key_value_heads",
                format!("{kv_heads} does not divide num_attention_heads = {heads}"),
            ));
        }
        let moe = if model_type == "qwen3_moe" {
            Some(self.moe()?)
        } else {
            None
        };
        // A model without dense layers may leave the dense width out.
        let intermediate = match moe {
            Some(_) => self.size_or("intermediate_size", hidden)?,
            None => self.size("intermediate_size")?,
        };
        Ok(ModelConfig {
            hidden,
            layers: usize::try_from(self.size("num_hidden_layers")?).unwrap_or_default(),
            heads,
            kv_heads,
            head_dim: self.size_or("head_dim", hidden / heads)?,
            intermediate,
            vocab: self.size("vocab_size")?,
            norm_eps: self.number_or("rms_norm_eps", 1e-6)?,
            max_positions: usize::try_from(self.size("max_position_embeddings")?).unwrap_or_default(),
            rope: self.rope()?,
            tied: self.flag_or("tie_word_embeddings", false)?,
            attention_bias: self.flag_or("attention_bias", false)?,
            moe,
            quantization: self.quantization()?,
            model_type,
        })
    }

    fn moe(&self) -> Result<Moe, LoadError> {
        let experts = self.size("num_experts")?;
        let active = self.size("num_experts_per_tok")?;
        if active > experts {
            return Err(self.error(
                "num_experts_per_tok",
                format!("{active} is more than num_experts = {experts}"),
            ));
        }
        let dense_layers = match self.keys.get("mlp_only_layers") {
            None | Some(Value::Null) => Vec::new(),
            Some(value) => value
                .as_array()
                .and_then(|layers| layers.iter().map(|n| usize::try_from(n.as_u64()?).ok()).collect())
                .ok_or_else(|| {
                    self.error(
                        "mlp_only_layers",
                        format!("{value} is not a list of layer numbers"),
                    )
                })?,
        };
        Ok(Moe {
            experts,
            active,
            intermediate: self.size("moe_intermediate_size")?,
            normalise: self.flag_or("norm_topk_prob", false)?,
            step: usize::try_from(self.size_or("decoder_sparse_step", 1)?).unwrap_or(1),
            dense_layers,
        })
    }

    /// `rope_theta` and `rope_scaling`, or both inside `rope_parameters`, as newer files have it.
    fn rope(&self) -> Result<Rope, LoadError> {
        let (key, scaling) = match self.keys.get("rope_parameters") {
            Some(value @ Value::Object(_)) => ("rope_parameters", Some(value)),
            _ => (
                "rope_scaling",
                self.keys.get("rope_scaling").filter(|value| !value.is_null()),
            ),
        };
        let inner = |name: &str| scaling.and_then(|value| value.get(name));
        let theta = match inner("rope_theta") {
            Some(value) => value
                .as_f64()
                .filter(|&theta| theta > 0.0)
                .ok_or_else(|| self.error(key, format!("rope_theta: {value} is not a positive number")))?
                as f32,
            None => self.number_or("rope_theta", 10_000.0)?,
        };
        let kind = inner("rope_type")
            .or_else(|| inner("type"))
            .and_then(Value::as_str)
            .unwrap_or("default");
        let scale = match kind {
            "default" => 1.0,
            "linear" => {
                let factor = inner("factor")
                    .and_then(Value::as_f64)
                    .filter(|&factor| factor > 0.0);
                let factor =
                    factor.ok_or_else(|| self.error(key, "factor: missing or not positive".to_owned()))?;
                (1.0 / factor) as f32
            }
            other => {
                let reason = format!("rope_type: \"{other}\" is not supported (supported: default, linear)");
                return Err(self.error(key, reason));
            }
        };
        Ok(Rope { theta, scale })
    }

    fn quantization(&self) -> Result<Option<Quantization>, LoadError> {
        let present = |key: &&str| self.keys.get(*key).is_some_and(|value| !value.is_null());
        let Some(key) = ["quantization", "quantization_config"]
            .into_iter()
            .find(|key| present(key))
        else {
            return Ok(None);
        };
        let entry = self.keys.get(key).and_then(Value::as_object);
        let entry = entry.ok_or_else(|| self.error(key, "not an object".to_owned()))?;
        if let Some(method) = entry.get("quant_method").and_then(Value::as_str)
            && !entry.contains_key("group_size")
        {
            return Err(self.error(
                key,
                format!("quant_method: \"{method}\" is not supported; convert the model to MLX's affine quantisation"),
            ));
        }
        let default = self.affine(key, entry)?;
        let mut overrides = HashMap::new();
        for (path, value) in entry {
            // `false` says that this layer is not quantised; its missing scales say the same.
            if let Value::Object(inner) = value {
                overrides.insert(path.clone(), self.affine(&format!("{key}.{path}"), inner)?);
            }
        }
        Ok(Some(Quantization { default, overrides }))
    }

    fn affine(&self, key: &str, entry: &Map<String, Value>) -> Result<Affine, LoadError> {
        let mode = entry.get("mode").and_then(Value::as_str).unwrap_or("affine");
        if mode != "affine" {
            return Err(self.error(
                key,
                format!("mode: \"{mode}\" is not supported (supported: affine)"),
            ));
        }
        let one_of = |name: &str, allowed: &[i32]| {
            let value = entry.get(name).unwrap_or(&Value::Null);
            let number = value.as_i64().and_then(|number| i32::try_from(number).ok());
            number.filter(|number| allowed.contains(number)).ok_or_else(|| {
                self.error(
                    key,
                    format!("{name}: {value} is not supported (supported: {allowed:?})"),
                )
            })
        };
        Ok(Affine {
            group: one_of("group_size", &[32, 64, 128])?,
            bits: one_of("bits", &[2, 3, 4, 5, 6, 8])?,
        })
    }

    /// A positive whole number.
    fn size(&self, key: &str) -> Result<i32, LoadError> {
        match self.keys.get(key) {
            None | Some(Value::Null) => Err(self.error(key, "missing".to_owned())),
            Some(value) => {
                let number = value.as_i64().and_then(|number| i32::try_from(number).ok());
                number.filter(|&number| number > 0).ok_or_else(|| {
                    self.error(
                        key,
                        format!("{value} is not a whole number from 1 to {}", i32::MAX),
                    )
                })
            }
        }
    }

    fn size_or(&self, key: &str, default: i32) -> Result<i32, LoadError> {
        if self.absent(key) {
            Ok(default)
        } else {
            self.size(key)
        }
    }

    fn number_or(&self, key: &str, default: f32) -> Result<f32, LoadError> {
        if self.absent(key) {
            return Ok(default);
        }
        let value = self.keys.get(key).unwrap_or(&Value::Null);
        let number = value
            .as_f64()
            .filter(|number| *number > 0.0 && number.is_finite());
        number
            .map(|number| number as f32)
            .ok_or_else(|| self.error(key, format!("{value} is not a positive number")))
    }

    fn flag_or(&self, key: &str, default: bool) -> Result<bool, LoadError> {
        if self.absent(key) {
            return Ok(default);
        }
        let value = self.keys.get(key).unwrap_or(&Value::Null);
        value
            .as_bool()
            .ok_or_else(|| self.error(key, format!("{value} is neither true nor false")))
    }

    fn absent(&self, key: &str) -> bool {
        self.keys.get(key).is_none_or(Value::is_null)
    }

    fn error(&self, key: &str, reason: String) -> LoadError {
        LoadError::Config {
            file: PathBuf::from(self.file),
            key: key.to_owned(),
            reason,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn base() -> Value {
        json!({
            "model_type": "qwen3_moe", "hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 128,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 100,
            "max_position_embeddings": 512, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32
        })
    }

    fn read(value: &Value) -> Result<ModelConfig, String> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("config.json");
        fs::write(&file, value.to_string()).unwrap();
        ModelConfig::read(&file).map_err(|error| error.to_string())
    }

    fn with(key: &str, value: Value) -> Value {
        let mut config = base();
        config[key] = value;
        config
    }

    #[test]
    fn sizes_and_defaults() {
        let config = read(&base()).unwrap();
        assert_eq!(
            (config.hidden, config.layers, config.kv_heads, config.head_dim),
            (64, 4, 2, 32)
        );
        assert_eq!(
            config.rope,
            Rope {
                theta: 10_000.0,
                scale: 1.0
            }
        );
        assert!(!config.tied && config.quantization.is_none());
        assert!((0..4).all(|layer| config.moe.as_ref().unwrap().is_sparse(layer)));
    }

    #[test]
    fn sparse_layers_follow_step_and_list() {
        let mut config = with("decoder_sparse_step", json!(2));
        config["mlp_only_layers"] = json!([3]);
        let moe = read(&config).unwrap().moe.unwrap();
        assert_eq!(
            (0..4).filter(|&layer| moe.is_sparse(layer)).collect::<Vec<_>>(),
            [1]
        );
    }

    #[test]
    fn both_spellings_of_the_rotary_settings() {
        let old = with("rope_theta", json!(1e6));
        let new = with(
            "rope_parameters",
            json!({"rope_theta": 1e6, "rope_type": "default"}),
        );
        assert_eq!(read(&old).unwrap().rope, read(&new).unwrap().rope);
        let linear = with("rope_scaling", json!({"type": "linear", "factor": 4.0}));
        assert_eq!(read(&linear).unwrap().rope.scale, 0.25);
    }

    #[test]
    fn quantisation_with_overrides() {
        let entry = json!({"group_size": 64, "bits": 4, "mode": "affine",
            "model.layers.0.mlp.gate": {"group_size": 32, "bits": 8}, "lm_head": false});
        let quantization = read(&with("quantization", entry)).unwrap().quantization.unwrap();
        assert_eq!(
            quantization.of("model.embed_tokens"),
            Affine { group: 64, bits: 4 }
        );
        assert_eq!(
            quantization.of("model.layers.0.mlp.gate"),
            Affine { group: 32, bits: 8 }
        );
    }

    #[test]
    fn errors_name_file_key_and_value() {
        for (key, value, says) in [
            ("model_type", json!("mamba"), "\"mamba\""),
            ("hidden_size", json!(-1), "-1"),
            ("hidden_size", Value::Null, "missing"),
            ("num_key_value_heads", json!(3), "does not divide"),
            ("num_experts_per_tok", json!(9), "num_experts = 8"),
            ("tie_word_embeddings", json!("yes"), "\"yes\""),
            ("rope_scaling", json!({"rope_type": "yarn"}), "yarn"),
            ("quantization", json!({"group_size": 48, "bits": 4}), "48"),
            ("quantization", json!({"group_size": 64, "bits": 7}), "7"),
            (
                "quantization",
                json!({"group_size": 32, "bits": 4, "mode": "mxfp4"}),
                "mxfp4",
            ),
            ("quantization_config", json!({"quant_method": "gptq"}), "gptq"),
        ] {
            let message = read(&with(key, value)).unwrap_err();
            assert!(
                message.contains("config.json") && message.contains(key),
                "{message}"
            );
            assert!(message.contains(says), "{message}");
        }
    }

    #[test]
    fn a_broken_file_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("config.json");
        assert!(
            ModelConfig::read(&file)
                .unwrap_err()
                .to_string()
                .contains("config.json")
        );
        fs::write(&file, "{\"a\": ").unwrap();
        assert!(
            ModelConfig::read(&file)
                .unwrap_err()
                .to_string()
                .contains("not JSON")
        );
    }
}

//! What a model's own files say of it, for `/api/tags`, `/api/ps` and `/api/show`.
//!
//! Only files of a `worker:` are looked at: where those of a `cmd:` lie is known to its command alone.

use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use registry::{Launch, Model};
use serde_json::{Map, Value, json};

/// Everything found. What is not known is empty, or zero.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Facts {
    /// Directory of the files.
    pub dir: Option<PathBuf>,
    /// Size of the weights, in bytes.
    pub size: u64,
    /// Unix time of the youngest of the files, milliseconds.
    pub modified_ms: u64,
    /// `config.json`.
    pub config: Value,
    /// Parameters, from the index of the weights.
    pub parameters: Option<u64>,
    /// The chat template.
    pub template: String,
}

impl Facts {
    /// Looks at the files of a model. `variable` gives environment variables.
    #[must_use]
    pub fn of(model: &Model, variable: impl Fn(&str) -> Option<String>) -> Self {
        let Launch::Worker(worker) = &model.launch else {
            return Self::default();
        };
        // The worker's own variables come before the proxy's.
        let own = |name: &str| {
            worker
                .env
                .iter()
                .rev()
                .find(|(k, _)| k == name)
                .map(|(_, v)| v.clone())
        };
        let dir = if worker.is_path {
            Some(PathBuf::from(&worker.model))
        } else {
            snapshot(&worker.model, |name| {
                own(name).or_else(|| variable(name)).filter(|v| !v.is_empty())
            })
        };
        dir.map(Self::in_dir).unwrap_or_default()
    }

    fn in_dir(dir: PathBuf) -> Self {
        let json = |name: &str| {
            let text = std::fs::read_to_string(dir.join(name)).ok()?;
            serde_json::from_str::<Value>(&text).ok()
        };
        let mut facts = Self {
            config: json("config.json").unwrap_or_default(),
            ..Self::default()
        };
        for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
            // Follows links: a hub's snapshot is made of them.
            let Ok(meta) = std::fs::metadata(entry.path()) else {
                continue;
            };
            let modified = meta
                .modified()
                .ok()
                .and_then(|t| t.duration_since(UNIX_EPOCH).ok());
            let modified = modified.and_then(|t| u64::try_from(t.as_millis()).ok());
            facts.modified_ms = facts.modified_ms.max(modified.unwrap_or(0));
            if entry.path().extension().is_some_and(|e| e == "safetensors") {
                facts.size += meta.len();
            }
        }
        let index = json("model.safetensors.index.json").unwrap_or_default();
        facts.parameters = index
            .pointer("/metadata/total_parameters")
            .and_then(Value::as_u64);
        facts.template = std::fs::read_to_string(dir.join("chat_template.jinja"))
            .ok()
            .or_else(|| {
                json("tokenizer_config.json")?
                    .get("chat_template")?
                    .as_str()
                    .map(str::to_owned)
            })
            .unwrap_or_default();
        facts.dir = Some(dir);
        facts
    }

    /// `model_type`, such as `qwen3_moe`.
    #[must_use]
    pub fn family(&self) -> &str {
        self.config
            .get("model_type")
            .and_then(Value::as_str)
            .unwrap_or_default()
    }

    /// A number of `config.json`, which a model with vision keeps one floor further down.
    fn number(&self, key: &str) -> Option<u64> {
        let text = self.config.get("text_config");
        [Some(&self.config), text]
            .into_iter()
            .flatten()
            .find_map(|c| c.get(key)?.as_u64())
    }

    /// Longest context in tokens.
    #[must_use]
    pub fn context(&self) -> Option<u64> {
        self.number("max_position_embeddings")
    }

    /// `Q4` and the like for quantised weights, else their type.
    #[must_use]
    pub fn quantization(&self) -> String {
        let quantization = self
            .config
            .get("quantization")
            .or_else(|| self.config.get("quantization_config"));
        let mode = quantization
            .and_then(|q| q.get("mode")?.as_str())
            .filter(|m| *m != "affine");
        let bits = quantization.and_then(|q| q.get("bits")?.as_u64());
        let plain = || {
            self.config
                .get("torch_dtype")
                .or_else(|| self.config.get("dtype"))?
                .as_str()
        };
        match (mode, bits) {
            (Some(mode), _) => mode.to_uppercase(),
            (None, Some(bits)) => format!("Q{bits}"),
            (None, None) => match plain() {
                Some("bfloat16") => "BF16".to_owned(),
                Some("float16") => "F16".to_owned(),
                Some("float32") => "F32".to_owned(),
                other => other.unwrap_or_default().to_uppercase(),
            },
        }
    }

    /// Ollama's `details`.
    #[must_use]
    pub fn details(&self) -> Value {
        let family = self.family();
        let families: Vec<&str> = Some(family).into_iter().filter(|f| !f.is_empty()).collect();
        json!({
            "parent_model": "",
            "format": if self.dir.is_some() { "safetensors" } else { "" },
            "family": family,
            "families": families,
            "parameter_size": self.parameters.map(human).unwrap_or_default(),
            "quantization_level": self.quantization(),
        })
    }

    /// Ollama's `model_info`: the keys of a GGUF file, as far as they are known.
    #[must_use]
    pub fn info(&self) -> Value {
        let family = self.family();
        let mut info = Map::new();
        if family.is_empty() {
            return Value::Object(info);
        }
        info.insert("general.architecture".to_owned(), family.into());
        if let Some(n) = self.parameters {
            info.insert("general.parameter_count".to_owned(), n.into());
        }
        let known = [
            ("context_length", "max_position_embeddings"),
            ("embedding_length", "hidden_size"),
            ("block_count", "num_hidden_layers"),
            ("attention.head_count", "num_attention_heads"),
            ("attention.head_count_kv", "num_key_value_heads"),
            ("vocab_size", "vocab_size"),
            ("expert_count", "num_experts"),
        ];
        for (name, key) in known {
            if let Some(n) = self.number(key) {
                info.insert(format!("{family}.{name}"), n.into());
            }
        }
        Value::Object(info)
    }

    /// Ollama's `capabilities`: what the registry says, else what the template knows of.
    #[must_use]
    pub fn capabilities(&self, model: &Model) -> Vec<&'static str> {
        let says = model.capabilities.as_ref();
        let has = |list: &[String], word: &str| list.iter().any(|m| m == word);
        let mut found = Vec::new();
        if says.is_none_or(|c| c.output.is_empty() || has(&c.output, "text")) {
            found.push("completion");
        }
        if says.map_or(self.template.contains("tools"), |c| c.tools) {
            found.push("tools");
        }
        if says.is_some_and(|c| has(&c.input, "image")) {
            found.push("vision");
        }
        if self.template.contains("enable_thinking") || self.template.contains("reasoning_content") {
            found.push("thinking");
        }
        found
    }

    /// A name for this very state of the model. It tells states apart; it is no proof of the files' contents.
    #[must_use]
    pub fn digest(&self, model: &Model) -> String {
        let seen = format!(
            "{}\0{:?}\0{}\0{}",
            model.id, model.launch, self.size, self.modified_ms
        );
        digest_of(&seen)
    }
}

/// 64 hexadecimal digits that stand for this text. No proof of anything.
#[must_use]
pub fn digest_of(text: &str) -> String {
    (0..4_u64)
        .map(|seed| format!("{:016x}", fnv(seed, text.as_bytes())))
        .collect()
}

/// Fowler, Noll and Vo's hash, 1a, in 64 bits.
fn fnv(seed: u64, bytes: &[u8]) -> u64 {
    let begin = 0xcbf2_9ce4_8422_2325 ^ seed;
    bytes
        .iter()
        .fold(begin, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3))
}

/// `30.5B`, `600M`.
fn human(n: u64) -> String {
    let scaled = |unit: u64, name: &str| {
        let tenths = (n.saturating_mul(10) + unit / 2) / unit;
        match tenths % 10 {
            0 => format!("{}{name}", tenths / 10),
            rest => format!("{}.{rest}{name}", tenths / 10),
        }
    };
    match n {
        1_000_000_000.. => scaled(1_000_000_000, "B"),
        1_000_000.. => scaled(1_000_000, "M"),
        _ => scaled(1_000, "K"),
    }
}

/// The files of a hub id in the local cache, where `huggingface_hub` keeps them.
fn snapshot(model: &str, variable: impl Fn(&str) -> Option<String>) -> Option<PathBuf> {
    let path = |name: &str| variable(name).map(PathBuf::from);
    let cache = path("HF_HUB_CACHE")
        .or_else(|| path("HF_HOME").map(|p| p.join("hub")))
        .or_else(|| path("XDG_CACHE_HOME").map(|p| p.join("huggingface/hub")))
        .or_else(|| path("HOME").map(|p| p.join(".cache/huggingface/hub")))?;
    let (id, revision) = model.split_once('@').unwrap_or((model, "main"));
    let root = cache.join(format!("models--{}", id.replace('/', "--")));
    let commit = std::fs::read_to_string(root.join("refs").join(revision));
    let commit = commit.map_or_else(|_| revision.to_owned(), |c| c.trim().to_owned());
    Some(root.join("snapshots").join(commit)).filter(|dir: &PathBuf| Path::is_dir(dir))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(yaml: &str) -> Model {
        let text = format!("models: {{m: {yaml}}}");
        let (registry, _) = registry::Registry::from_yaml(&text, Path::new("c.yaml")).unwrap();
        registry.models["m"].clone()
    }

    #[test]
    fn files_of_a_directory_and_of_a_hub_cache() {
        let place = tempfile::tempdir().unwrap();
        let dir = place.path().join("models--org--m/snapshots/abc");
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::create_dir_all(place.path().join("models--org--m/refs")).unwrap();
        std::fs::write(place.path().join("models--org--m/refs/main"), "abc\n").unwrap();
        let config = json!({"model_type": "qwen3", "quantization": {"bits": 4, "group_size": 64},
                            "text_config": {"max_position_embeddings": 4096}, "hidden_size": 8});
        std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
        std::fs::write(dir.join("model-1.safetensors"), [0; 100]).unwrap();
        std::fs::write(dir.join("model-2.safetensors"), [0; 20]).unwrap();
        let index = json!({"metadata": {"total_parameters": 30_510_000_000_u64}});
        std::fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
        std::fs::write(
            dir.join("tokenizer_config.json"),
            r#"{"chat_template": "{% if tools %}{{ enable_thinking }}"}"#,
        )
        .unwrap();
        let env = format!("[HF_HUB_CACHE={}]", place.path().display());
        let by_id = model(&format!("{{worker: {{model: org/m}}, env: {env}}}"));
        let facts = Facts::of(&by_id, |_| None);
        assert_eq!((facts.size, facts.context()), (120, Some(4096)));
        assert!(facts.modified_ms > 1_600_000_000_000);
        let details = facts.details();
        assert_eq!(
            (&details["parameter_size"], &details["quantization_level"]),
            (&json!("30.5B"), &json!("Q4"))
        );
        assert_eq!(facts.info()["qwen3.context_length"], 4096);
        assert_eq!(facts.capabilities(&by_id), ["completion", "tools", "thinking"]);
        let by_path = model(&format!("{{worker: {{model: {}}}}}", dir.display()));
        assert_eq!(Facts::of(&by_path, |_| None), facts);
        assert_eq!(facts.digest(&by_id).len(), 64);
        assert_ne!(facts.digest(&by_id), facts.digest(&by_path));
    }

    #[test]
    fn nothing_is_known_of_a_command() {
        let command = model("{cmd: 'x --port ${PORT}', capabilities: {in: [text, image], out: [text]}}");
        let facts = Facts::of(&command, |_| None);
        assert_eq!(facts, Facts::default());
        assert_eq!(facts.capabilities(&command), ["completion", "vision"]);
        assert_eq!(facts.details()["family"], "");
        assert_eq!(facts.info(), json!({}));
        let missing = model("{worker: {model: /nowhere/at/all}}");
        assert_eq!(Facts::of(&missing, |_| None).size, 0);
    }

    #[test]
    fn sizes_for_people() {
        assert_eq!(
            [human(595_800_000), human(7_000_000_000), human(3_400)],
            ["595.8M", "7B", "3.4K"]
        );
    }
}

//! A model's directory and the knobs to what the HTTP layer needs.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use chat_format::{ChatTemplate, TemplateError, ToolFormat};
use knobs::{Knobs, ParsedArgs, fallback};
use kv_cache::KvQuantization;

use crate::backend::{Backend, SamplingParams};
use crate::engine::{AttentionChoice, Dequantize, EngineConfig};
use crate::http::{ChatFormat, HttpConfig, LoadReport, ServiceParts};
use crate::text::{GenerationDefaults, TextTokenizer};

/// Everything about text, read from the model's directory while the weights load.
pub(super) struct Text {
    tokenizer: TextTokenizer,
    chat: Option<ChatFormat>,
    config: HttpConfig,
}

impl Text {
    /// `supervised`: a proxy has chosen the model already, whatever name the request has for it.
    pub(super) fn load(args: &ParsedArgs, folder: &Path, supervised: bool) -> Result<Self> {
        let knobs = &args.knobs;
        let tokenizer = TextTokenizer::load(folder)?;
        let defaults = GenerationDefaults::load(folder)?;
        let mut eos_tokens = defaults.eos_token_ids.clone();
        if let Some(eos) = tokenizer.eos().filter(|eos| !eos_tokens.contains(eos)) {
            eos_tokens.push(eos);
        }
        if eos_tokens.is_empty() {
            tracing::warn!(
                "no end-of-sequence token in generation_config.json, config.json or tokenizer_config.json: replies end at their length limit only"
            );
        }
        let served_model = knobs
            .served_model_name
            .clone()
            .unwrap_or_else(|| served_name(&args.model));
        let config = HttpConfig {
            aliases: vec![args.model.clone(), "default".to_owned()],
            any_model: supervised,
            served_model,
            api_key: knobs.api_key.clone(),
            default_max_tokens: usize::try_from(knobs.max_tokens).unwrap_or(usize::MAX),
            max_request_tokens: usize::try_from(knobs.max_request_tokens).unwrap_or(usize::MAX),
            sampling: sampling(knobs, &defaults),
            eos_tokens,
            silence_limit: Duration::from_secs_f64(knobs.timeout),
            queue_limit: Duration::from_secs_f64(knobs.max_wait_seconds),
            stall_limit: stall_limit(knobs.watchdog_seconds),
            metrics: knobs.enable_metrics,
            ..HttpConfig::default()
        };
        Ok(Self {
            chat: chat_format(knobs, folder)?,
            tokenizer,
            config,
        })
    }

    /// With the engine.
    pub(super) fn into_parts(mut self, backend: Arc<dyn Backend>, load: LoadReport) -> Result<ServiceParts> {
        self.config.load = load;
        let rows = backend.info().vocab_size;
        if let Some(id) = self.config.eos_tokens.iter().find(|id| **id as usize >= rows) {
            bail!("end-of-sequence token {id} is not below the model's vocabulary size of {rows}");
        }
        Ok(ServiceParts {
            config: self.config,
            tokenizer: self.tokenizer,
            chat: self.chat,
            backend,
        })
    }
}

/// What the knobs say to the engine.
///
/// # Errors
/// A number that this machine cannot count to.
pub fn engine(knobs: &Knobs, model: PathBuf) -> Result<EngineConfig> {
    Ok(EngineConfig {
        model,
        mapped: knobs.weights == "mmap",
        dequantize: match knobs.cpu_dequantize.as_str() {
            "on" => Dequantize::On,
            "off" => Dequantize::Off,
            _ => Dequantize::Auto,
        },
        attention: match knobs.attention.as_str() {
            "reference" => AttentionChoice::Reference,
            "kernel" => AttentionChoice::Kernel,
            _ => AttentionChoice::Auto,
        },
        context_length: knobs.context_length.map(size).transpose()?,
        max_running: size(knobs.max_num_seqs)?,
        max_waiting: size(knobs.max_waiting)?,
        max_wait: Some(Duration::from_secs_f64(knobs.max_wait_seconds)),
        prefill_chunk: size(knobs.prefill_step_size)?,
        step_budget: knobs.step_budget,
        watchdog: Duration::from_secs_f64(knobs.watchdog_seconds),
        kv_bytes: knobs
            .cache_memory_mb
            .map(|mebibytes| mebibytes.saturating_mul(MEBIBYTE)),
        kv_share: knobs.cache_memory_percent,
        max_blocks: knobs.max_cache_blocks.map(size).transpose()?,
        block_size: size(knobs.paged_cache_block_size)?,
        kv_quantization: kv_quantization(knobs)?,
        generation_share: kv_cache::GENERATION_SHARE,
        prefix_cache: knobs.enable_prefix_cache,
        memory_utilization: knobs.gpu_memory_utilization,
        buffer_cache_bytes: size(knobs.mlx_cache_limit_mb.saturating_mul(MEBIBYTE))?,
    })
}

fn kv_quantization(knobs: &Knobs) -> Result<Option<KvQuantization>> {
    if !knobs.kv_cache_quantization {
        return Ok(None);
    }
    let number = |flag: &str, value: &str| {
        value
            .parse::<u8>()
            .with_context(|| format!("--kv-cache-quantization-{flag} {value}"))
    };
    Ok(Some(KvQuantization {
        bits: number("bits", &knobs.kv_cache_quantization_bits)?,
        group_size: number("group-size", &knobs.kv_cache_quantization_group_size)?,
    }))
}

/// Half of the time after which the watchdog ends the process: whoever asks hears of a step that takes suspiciously long
/// before its end. Without a watchdog there is no such time.
fn stall_limit(watchdog_seconds: f64) -> Option<Duration> {
    (watchdog_seconds > 0.0).then(|| Duration::from_secs_f64(watchdog_seconds / 2.0))
}

const MEBIBYTE: u64 = 1 << 20;

fn size(number: u64) -> Result<usize> {
    usize::try_from(number).with_context(|| format!("{number} is too large for this machine"))
}

/// A path's last part; a hub id as it is.
fn served_name(model: &str) -> String {
    let path = Path::new(model);
    match path.file_name().and_then(|name| name.to_str()) {
        Some(name) if path.is_dir() => name.to_owned(),
        // Such as `.`: the directory's real name.
        None if path.is_dir() => std::fs::canonicalize(path)
            .ok()
            .and_then(|path| Some(path.file_name()?.to_str()?.to_owned()))
            .unwrap_or_else(|| model.to_owned()),
        _ => model.to_owned(),
    }
}

fn chat_format(knobs: &Knobs, folder: &Path) -> Result<Option<ChatFormat>> {
    let template = match ChatTemplate::from_dir(folder) {
        Ok(template) => template,
        Err(e @ TemplateError::Missing(_)) => {
            tracing::warn!("{e}: /v1/chat/completions will be refused");
            return Ok(None);
        }
        Err(e) => return Err(e).with_context(|| format!("the chat template in {}", folder.display())),
    };
    let tool_format = ToolFormat::resolve(&knobs.tool_call_parser, template.source(true))
        .with_context(|| format!("--tool-call-parser {}", knobs.tool_call_parser))?;
    // Where nobody asked for none.
    let unknown_tools =
        ToolFormat::unknown(template.source(true)).filter(|_| knobs.tool_call_parser == "auto");
    if let Some(markup) = unknown_tools {
        tracing::warn!(
            "the chat template teaches tool calls as {markup}, which is not parsed here yet: calls in replies stay text"
        );
    }
    let reasoning = knobs
        .reasoning_parser
        .parse()
        .with_context(|| format!("--reasoning-parser {}", knobs.reasoning_parser))?;
    Ok(Some(ChatFormat {
        template,
        tool_format,
        unknown_tools,
        reasoning,
        auto_tools: knobs.enable_auto_tool_choice,
        template_kwargs: knobs.default_chat_template_kwargs.clone().unwrap_or_default(),
    }))
}

/// What a request gets that says nothing about sampling, for the model in `folder`.
///
/// # Errors
/// A model's file that makes no sense.
pub fn default_sampling(knobs: &Knobs, folder: &Path) -> Result<SamplingParams> {
    Ok(sampling(knobs, &GenerationDefaults::load(folder)?))
}

/// Knob, else the model's own, else the fallback.
fn sampling(knobs: &Knobs, model: &GenerationDefaults) -> SamplingParams {
    #[allow(clippy::cast_possible_truncation)] // single precision is what is computed with
    let single = |x: f64| x as f32;
    let top_k = |k: u64| usize::try_from(k).unwrap_or(usize::MAX);
    SamplingParams {
        temperature: knobs
            .default_temperature
            .map(single)
            .or(model.temperature)
            .unwrap_or(single(fallback::TEMPERATURE)),
        top_p: knobs
            .default_top_p
            .map(single)
            .or(model.top_p)
            .unwrap_or(single(fallback::TOP_P)),
        top_k: knobs
            .default_top_k
            .map(top_k)
            .or(model.top_k)
            .unwrap_or(top_k(fallback::TOP_K)),
        min_p: knobs
            .default_min_p
            .map(single)
            .or(model.min_p)
            .unwrap_or(single(fallback::MIN_P)),
        repetition_penalty: knobs
            .default_repetition_penalty
            .map(single)
            .or(model.repetition_penalty)
            .unwrap_or(single(fallback::REPETITION_PENALTY)),
        presence_penalty: single(knobs.default_presence_penalty),
        frequency_penalty: single(knobs.default_frequency_penalty),
        logit_bias: Vec::new(),
        seed: None,
        min_tokens: 0,
    }
}

#[cfg(test)]
mod tests {
    use chat_format::ReasoningFormat;

    use super::*;

    #[test]
    fn sampling_prefers_the_knob_then_the_model() {
        let model = GenerationDefaults {
            temperature: Some(0.6),
            top_k: Some(20),
            ..GenerationDefaults::default()
        };
        let knobs = Knobs {
            default_temperature: Some(0.1),
            ..Knobs::default()
        };
        let resolved = sampling(&knobs, &model);
        assert_eq!(
            (resolved.temperature, resolved.top_k, resolved.top_p),
            (0.1, 20, 0.9)
        );
        assert_eq!(sampling(&Knobs::default(), &model).temperature, 0.6);
        assert_eq!(
            sampling(&Knobs::default(), &GenerationDefaults::default()).temperature,
            0.7
        );
    }

    #[test]
    fn the_engine_hears_of_every_knob_of_its_own() {
        let line = "m --weights read --cpu-dequantize off --attention reference --context-length 1000 --max-num-seqs 3 \
                    --max-waiting 5 --max-wait-seconds 7 --chunked-prefill-tokens 128 --step-budget 100000 \
                    --watchdog-seconds 9 --cache-memory-mb 100 --max-cache-blocks 11 --block-size 64 \
                    --disable-prefix-cache --gpu-memory-utilization 0.25 --mlx-cache-limit-mb 3 \
                    --kv-cache-quantization --kv-cache-quantization-bits 4 --kv-cache-quantization-group-size 128";
        let engine = |line: &str| {
            let args: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
            engine(&knobs::parse_args(&args).unwrap().knobs, PathBuf::from("folder")).unwrap()
        };
        let seconds = Duration::from_secs;
        let expected = EngineConfig {
            model: PathBuf::from("folder"),
            mapped: false,
            dequantize: Dequantize::Off,
            attention: AttentionChoice::Reference,
            context_length: Some(1000),
            max_running: 3,
            max_waiting: 5,
            max_wait: Some(seconds(7)),
            prefill_chunk: 128,
            step_budget: 100_000,
            watchdog: seconds(9),
            kv_bytes: Some(100 << 20),
            kv_share: None,
            max_blocks: Some(11),
            block_size: 64,
            kv_quantization: Some(KvQuantization {
                bits: 4,
                group_size: 128,
            }),
            generation_share: kv_cache::GENERATION_SHARE,
            prefix_cache: false,
            memory_utilization: 0.25,
            buffer_cache_bytes: 3 << 20,
        };
        assert_eq!(engine(line), expected);
        assert_eq!(engine("m --no-continuous-batching").max_running, 1);
        let kept = |line: &str| engine(line).kv_quantization;
        assert_eq!(kept("m --kv-cache-quantization-bits 4"), None);
        let (bits, group_size) = (8, 64);
        assert_eq!(
            kept("m --kv-cache-quantization"),
            Some(KvQuantization { bits, group_size })
        );
        assert!(!engine("m --disable-paged-cache").prefix_cache);
        assert_eq!(engine("m --cache-memory-percent 0.5").kv_share, Some(0.5));
    }

    /// What the table lets pass, the worker has to take; what it refuses, the worker does not know.
    #[test]
    fn every_name_of_an_enumeration_is_one_that_the_worker_knows() {
        let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo/model");
        let mut names_seen = 0;
        for knob in knobs::TABLE {
            let knobs::Kind::Enum(names) = knob.kind else {
                continue;
            };
            if knob.effect != knobs::Effect::Active {
                continue;
            }
            for name in names {
                let arguments = ["m".to_owned(), format!("--{}={name}", knob.flag)];
                let knobs = knobs::parse_args(&arguments).unwrap().knobs;
                engine(&knobs, demo.clone()).unwrap();
                let chat = chat_format(&knobs, &demo)
                    .unwrap_or_else(|error| panic!("--{} {name}: {error:#}", knob.flag));
                assert!(chat.is_some());
                names_seen += 1;
            }
            for name in knob.to_come {
                let known = match knob.flag {
                    "tool-call-parser" => name.parse::<ToolFormat>().is_ok(),
                    "reasoning-parser" => name.parse::<ReasoningFormat>().is_ok(),
                    other => panic!("names to come of --{other}"),
                };
                assert!(
                    !known,
                    "--{} {name} is there, but the table refuses it",
                    knob.flag
                );
            }
        }
        assert!(names_seen > 15, "{names_seen}");
    }

    /// A model whose calls would stay text without a word.
    #[test]
    fn tool_calls_that_nobody_parses_are_told() {
        let folder = tempfile::tempdir().unwrap();
        let read = |template: &str, line: &str| {
            std::fs::write(folder.path().join("chat_template.jinja"), template).unwrap();
            let arguments: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
            let knobs = knobs::parse_args(&arguments).unwrap().knobs;
            chat_format(&knobs, folder.path()).unwrap().unwrap()
        };
        let tags = "{% for tool in tools %}{{ tool }}{% endfor %}<tool_call><function=name></tool_call>";
        let chat = read(tags, "m");
        assert_eq!(chat.tool_format, ToolFormat::None);
        assert!(chat.unknown_tools.unwrap().contains("Qwen3-Coder"));
        // Nothing to tell of what was asked for, and of a format that is known.
        assert_eq!(read(tags, "m --tool-call-parser none").unknown_tools, None);
        assert_eq!(read("{{ tools }}<tool_call>", "m").unknown_tools, None);
        assert_eq!(
            read("{{ messages }}", "m --reasoning-parser qwen3").reasoning,
            ReasoningFormat::Think
        );
    }

    #[test]
    fn a_step_is_suspicious_at_half_of_the_watchdogs_time() {
        let seconds = Duration::from_secs;
        assert_eq!(stall_limit(Knobs::default().watchdog_seconds), Some(seconds(60)));
        assert_eq!(stall_limit(600.0), Some(seconds(300)));
        assert_eq!(stall_limit(0.0), None);
    }

    #[test]
    fn a_path_is_served_under_its_last_part() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("my-model");
        std::fs::create_dir(&folder).unwrap();
        assert_eq!(served_name(folder.to_str().unwrap()), "my-model");
        assert_eq!(served_name(&format!("{}/", folder.display())), "my-model");
        assert_eq!(served_name("org/name"), "org/name");
    }
}

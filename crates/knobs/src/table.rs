//! The table. A row's doc comment is its help text; everything else about a knob is in the row.

use crate::from_value::FromValue;
use crate::knob::{Effect, Fixed, Group, Kind, Knob, KnobError, Value};
use serde_json::Map;

const ROW: Knob = Knob {
    field: "",
    flag: "",
    aliases: &[],
    off: &[],
    group: Group::Legacy,
    kind: Kind::Bool,
    to_come: &[],
    default: Fixed::None,
    unit: "",
    help: "",
    reason: "",
    effect: Effect::Active,
    secret: false,
};

macro_rules! knob_table {
    ($( $(#[doc = $doc:literal])+ $field:ident: $ty:ty = $flag:literal { $($key:ident: $value:expr),* $(,)? } )*) => {
        /// Every knob.
        pub static TABLE: &[Knob] = &[$(
            Knob { field: stringify!($field), flag: $flag, help: concat!($($doc),+), $($key: $value,)* ..ROW },
        )*];

        /// The resolved value of every knob, as the worker reads them. `None` means that the worker decides, as the
        /// field's text says.
        #[derive(Debug, Clone, PartialEq)]
        pub struct Knobs {
            $( $(#[doc = $doc])+ pub $field: $ty, )*
        }

        impl Knobs {
            /// Reads every field through `get`.
            pub(crate) fn read(get: impl Fn(&Knob) -> Option<Value>) -> Result<Self, KnobError> {
                let row = |field: &str| TABLE.iter().find(|k| k.field == field).and_then(&get);
                Ok(Self { $(
                    $field: <$ty as FromValue>::from_value(row(stringify!($field))).ok_or_else(|| {
                        KnobError::Usage(format!("the table's row --{} does not fit its field", $flag))
                    })?,
                )* })
            }
        }
    };
}

/// Names of the tool-call formats that replies are parsed for; `auto` reads the model's template. The worker's own test
/// parses every name of these four lists.
const TOOL_PARSERS: &[&str] = &["auto", "none", "hermes", "nous", "qwen", "qwen3"];

/// The predecessor's other ones: known, and refused as long as they are not to be had.
const TOOL_PARSERS_TO_COME: &[&str] = &[
    "generic",
    "qwen3_xml",
    "qwen3.5",
    "qwen3_coder",
    "llama",
    "llama3",
    "llama4",
    "mistral",
    "deepseek",
    "deepseek_v3",
    "deepseek_r1",
    "deepseek_v4",
    "dsml",
    "kimi",
    "kimi_k2",
    "moonshot",
    "granite",
    "granite3",
    "nemotron",
    "nemotron3",
    "xlam",
    "functionary",
    "meetkai",
    "glm47",
    "glm4",
    "gemma4",
    "harmony",
    "gpt-oss",
    "minimax",
    "minimax_m2",
    "step3p5",
    "step",
    "poolside_v1",
];

/// Names of the reasoning formats, which are one (`<think>`); `auto` reads the model's template.
const REASONING_PARSERS: &[&str] = &["auto", "none", "qwen3", "deepseek_r1", "glm4"];

/// As [`TOOL_PARSERS_TO_COME`].
const REASONING_PARSERS_TO_COME: &[&str] = &[
    "deepseek_v4",
    "gpt_oss",
    "harmony",
    "gemma4",
    "mistral",
    "poolside_v1",
    "step3p5",
];

const COUNT: Kind = Kind::Int {
    min: 1,
    max: i64::MAX,
};
const COUNT0: Kind = Kind::Int {
    min: 0,
    max: i64::MAX,
};
const SECONDS: Kind = Kind::Float {
    min: 0.001,
    max: 1_000_000.0,
};
const PENALTY: Kind = Kind::Float { min: -2.0, max: 2.0 };

const NO_PYTHON: &str = "models are read by our own code, never by code from the model's directory";
const ONE_MODEL: &str = "a worker serves one model; swapd's registry holds many";
const TEXT_ONLY: Effect = Effect::AcceptedOnly("it comes with that kind of model");

knob_table! {
    /// Address to listen on.
    host: String = "host" {
        group: Group::Server, kind: Kind::Str, default: Fixed::Str("127.0.0.1"),
        reason: "a worker is reached through swapd on the same machine, and has no business on the network",
    }
    /// Port to listen on; 0 lets the operating system choose a free one, which is then announced.
    port: u16 = "port" {
        group: Group::Server, kind: Kind::Int { min: 0, max: 65_535 }, default: Fixed::Int(0),
        reason: "a port that nobody chose can collide with nobody, not even with a worker that is still dying",
    }
    /// Model name in the API. Unset: the model argument as written, for a path its last part.
    served_model_name: Option<String> = "served-model-name" {
        group: Group::Server, kind: Kind::Str,
        reason: "a client that names the model as it was started must find it",
    }
    /// Key that requests must carry, as `Authorization: Bearer` or `x-api-key`. swapd shows it to a worker that it starts with one.
    api_key: Option<String> = "api-key" {
        group: Group::Server, kind: Kind::Str, secret: true,
        reason: "on loopback behind swapd, keys are checked by swapd",
    }
    /// Longest silence while a request runs, before it is ended with an error; but only where the engine has not stepped
    /// for as long either: a long prompt is silent while it is computed. A total limit for nothing: a reply that keeps
    /// coming is never cut. A request's own `timeout` holds beside it.
    timeout: f64 = "timeout" {
        group: Group::Server, kind: SECONDS, default: Fixed::Float(300.0), unit: "s",
        reason: "a total limit of 300 s cut long replies in mid-generation; silence is what shows a hang",
    }
    /// How much is written to stderr. Unset, RUST_LOG adds to the default (`RUST_LOG=mlxworker=debug`); a level that is
    /// given goes before RUST_LOG, which a worker inherits from swapd.
    log_level: String = "log-level" {
        group: Group::Server, kind: Kind::Enum(&["error", "warn", "info", "debug", "trace"]),
        default: Fixed::Str("info"),
        reason: "one line for each thing that happens to the worker, and none for a token",
    }
    /// Serve Prometheus metrics at `/metrics`.
    enable_metrics: bool = "enable-metrics" {
        group: Group::Server, off: &["disable-metrics"], default: Fixed::Bool(true),
        reason: "a counter that nobody switched on explains nothing afterwards",
    }
    /// Requests per minute for one client; 0 for no limit.
    rate_limit: u64 = "rate-limit" {
        group: Group::Server, kind: COUNT0, default: Fixed::Int(0), unit: "requests/min",
        effect: Effect::AcceptedOnly("it comes with the worker's request limits"),
        reason: "one person's machine: the queue is the limit",
    }

    /// Length of a reply when the request does not say.
    max_tokens: u64 = "max-tokens" {
        group: Group::Lengths, kind: COUNT, default: Fixed::Int(8192), unit: "tokens",
        reason: "4096 cut off code; when only --max-request-tokens is given and is smaller, this follows it",
    }
    /// Longest reply that a request may ask for. A larger wish is clamped, and the reply says so.
    max_request_tokens: u64 = "max-request-tokens" {
        group: Group::Lengths, kind: COUNT, default: Fixed::Int(8192), unit: "tokens",
        reason: "32768 led to replies that filled the context and were retried for ever; when only --max-tokens is \
                 given and is larger, this follows it",
    }
    /// Longest prompt plus reply. Unset: what the model's configuration says; larger than that is refused at start.
    context_length: Option<u64> = "context-length" {
        group: Group::Lengths, aliases: &["max-model-len"], kind: COUNT, unit: "tokens",
        reason: "the model knows what it was trained for",
    }
    /// Force the end of reasoning after this many tokens.
    default_thinking_token_budget: Option<u64> = "default-thinking-token-budget" {
        group: Group::Lengths, kind: COUNT, unit: "tokens",
        effect: Effect::Refused("the length of the reasoning cannot be limited by itself; --default-chat-template-kwargs \
                                 {\"enable_thinking\": false} turns it off, --max-tokens limits all of the reply"),
    }

    /// Temperature when the request does not say. Unset: the model's generation_config.json, else 0.7.
    default_temperature: Option<f64> = "default-temperature" {
        group: Group::Sampling, aliases: &["temp"], kind: Kind::Float { min: 0.0, max: 2.0 },
        reason: "the model's authors have measured theirs",
    }
    /// Nucleus mass when the request does not say. Unset: the model's generation_config.json, else 0.9.
    default_top_p: Option<f64> = "default-top-p" {
        group: Group::Sampling, aliases: &["top-p"], kind: Kind::Float { min: 0.000_001, max: 1.0 },
        reason: "the model's authors have measured theirs",
    }
    /// Number of candidates when the request does not say; 0 keeps all. Unset: generation_config.json, else 0.
    default_top_k: Option<u64> = "default-top-k" {
        group: Group::Sampling, aliases: &["top-k"], kind: Kind::Int { min: 0, max: 1_000_000 },
        reason: "the model's authors have measured theirs",
    }
    /// Smallest probability relative to the likeliest token, when the request does not say. Unset:
    /// generation_config.json, else 0.
    default_min_p: Option<f64> = "default-min-p" {
        group: Group::Sampling, aliases: &["min-p"], kind: Kind::Float { min: 0.0, max: 1.0 },
        reason: "the model's authors have measured theirs; where they say nothing, --default-top-p cuts the tail off already",
    }
    /// Penalty for any token that the reply already has, when the request does not say.
    default_presence_penalty: f64 = "default-presence-penalty" {
        group: Group::Sampling, kind: PENALTY, default: Fixed::Float(0.1),
        reason: "a greedy loop had to be stopped by hand; 0.1 tips a near tie towards a new token and leaves clear choices \
                 alone. A comparison with another engine's greedy replies sets 0",
    }
    /// Penalty that grows with every occurrence of a token in the reply, when the request does not say.
    default_frequency_penalty: f64 = "default-frequency-penalty" {
        group: Group::Sampling, kind: PENALTY, default: Fixed::Float(0.01),
        reason: "it grows without end: at 0.3 a newline that code has used a hundred times is down by 30, at 0.01 by 1, \
                 while a loop is still left sooner or later",
    }
    /// Factor that divides the scores of tokens already seen, when the request does not say; 1 is none. Unset:
    /// generation_config.json, else 1.
    default_repetition_penalty: Option<f64> = "default-repetition-penalty" {
        group: Group::Sampling, kind: Kind::Float { min: 0.01, max: 10.0 },
        reason: "the model's authors have measured theirs; it counts the prompt too, so that it penalises names and code that \
                 a reply has to repeat",
    }

    /// Variables for the chat template, as a JSON object; a request's own come on top.
    default_chat_template_kwargs: Option<Map<String, serde_json::Value>> = "default-chat-template-kwargs" {
        group: Group::Chat, aliases: &["chat-template-args"], kind: Kind::Json,
        reason: "the template has defaults of its own for what nobody sets, such as `enable_thinking`",
    }
    /// Parse tool calls out of the reply when the request brings tools.
    enable_auto_tool_choice: bool = "enable-auto-tool-choice" {
        group: Group::Chat, off: &["disable-auto-tool-choice"], default: Fixed::Bool(true),
        reason: "a client that sends tools wants calls, not markup in the text",
    }
    /// Format of the model's tool calls; `auto` reads it from the chat template.
    tool_call_parser: String = "tool-call-parser" {
        group: Group::Chat, kind: Kind::Enum(TOOL_PARSERS), to_come: TOOL_PARSERS_TO_COME, default: Fixed::Str("auto"),
        reason: "a parser chosen by hand for another model gave empty function names",
    }
    /// Format of the model's reasoning; `auto` reads it from the chat template.
    reasoning_parser: String = "reasoning-parser" {
        group: Group::Chat, kind: Kind::Enum(REASONING_PARSERS), to_come: REASONING_PARSERS_TO_COME, default: Fixed::Str("auto"),
        reason: "a parser chosen by hand for another model swallowed its tool calls",
    }

    /// Requests that run at the same time. More wait.
    max_num_seqs: u64 = "max-num-seqs" {
        group: Group::Scheduling, aliases: &["decode-concurrency"], kind: Kind::Int { min: 1, max: 1024 },
        default: Fixed::Int(4), unit: "requests",
        reason: "past four streams a Mac's memory bandwidth shares out rather than adds up, and each needs its KV",
    }
    /// Requests that may wait for a place. One more is answered 429 with Retry-After.
    max_waiting: u64 = "max-waiting" {
        group: Group::Scheduling, aliases: &["max-queue-size"], kind: Kind::Int { min: 0, max: 100_000 },
        default: Fixed::Int(64), unit: "requests",
        reason: "room for a burst of agents; behind 64 others nobody is still listening",
    }
    /// Longest time a request may wait for a place before it is answered 503 with Retry-After. Once one of its choices or
    /// prompts has a place, the others wait for as long as it takes.
    max_wait_seconds: f64 = "max-wait-seconds" {
        group: Group::Scheduling, kind: SECONDS, default: Fixed::Float(300.0), unit: "s",
        reason: "clients give up after about five minutes of silence",
    }
    /// Prompt tokens computed in one step of prefill.
    prefill_step_size: u64 = "prefill-step-size" {
        group: Group::Scheduling, kind: Kind::Int { min: 16, max: 1_048_576 }, default: Fixed::Int(512),
        unit: "tokens",
        reason: "a step is what everybody else waits for: 2048 stalled running streams by up to 10 s, 512 halved \
                 the time to first token under load",
    }
    /// Another name for --prefill-step-size, which it overrides when larger than 0.
    chunked_prefill_tokens: u64 = "chunked-prefill-tokens" {
        group: Group::Scheduling, kind: Kind::Int { min: 0, max: 1_048_576 }, default: Fixed::Int(0), unit: "tokens",
        reason: "prefill is always chunked",
    }
    /// Most work of one step: tokens computed times the context that each of them looks back on. A chunk of a long prompt
    /// gets shorter as its context grows.
    step_budget: u64 = "step-budget" {
        group: Group::Scheduling, kind: Kind::Int { min: 65_536, max: 1_000_000_000_000 },
        default: Fixed::Int(16_777_216), unit: "tokens x context",
        reason: "512 tokens at a context of 32,768: about a second of attention on a large Mac with a 30B model; macOS ends \
                 a GPU command that takes several",
    }
    /// Longest time that one step may take; 0 waits for ever. Past it every client is told, and the process ends with an
    /// error, so that swapd starts another. Loading with warm-up, and warm prompts, have an hour each, or ten times this
    /// where that is more.
    watchdog_seconds: f64 = "watchdog-seconds" {
        group: Group::Scheduling, kind: Kind::Float { min: 0.0, max: 1_000_000.0 }, default: Fixed::Float(120.0),
        unit: "s",
        reason: "a step takes a second or two, on a machine that swaps a minute; a GPU command that hangs never ends, and \
                 nothing else would notice",
    }
    /// How attention over the paged cache is computed: `reference` gathers the blocks and uses MLX's own attention,
    /// `kernel` insists on this program's kernel and does not start without it, `auto` takes the kernel where it agrees
    /// with the reference on this device and is faster.
    attention: String = "attention" {
        group: Group::Scheduling, kind: Kind::Enum(&["auto", "reference", "kernel"]), default: Fixed::Str("auto"),
        reason: "a kernel that has been compared with the reference at start, on this very device, can be trusted",
    }
    /// Turn quantised weights to float32 while loading, when MLX runs on the CPU: `auto` where memory suffices.
    cpu_dequantize: String = "cpu-dequantize" {
        group: Group::Memory, kind: Kind::Enum(&["auto", "on", "off"]), default: Fixed::Str("auto"),
        reason: "MLX multiplies quantised matrices on the CPU one number at a time; its float32 product is many times \
                 faster, for up to eight times the memory",
    }
    /// Let requests join and leave a running batch between steps. Off: one request at a time (--max-num-seqs 1).
    continuous_batching: bool = "continuous-batching" {
        group: Group::Scheduling, off: &["disable-continuous-batching"], default: Fixed::Bool(true),
        reason: "one request at a time wastes the memory bandwidth that all of them could share",
    }
    /// Prompts prefilled together.
    prefill_batch_size: u64 = "prefill-batch-size" {
        group: Group::Scheduling, aliases: &["prompt-concurrency"], kind: Kind::Int { min: 1, max: 1024 },
        default: Fixed::Int(1), unit: "requests",
        effect: Effect::NoMeaning("prompts are computed in chunks, one prompt at a time, between the steps of those that run"),
        reason: "one prompt fills the GPU by itself; the next one's first token only gets later",
    }
    /// Most sequences decoded in one step. Unset: --max-num-seqs.
    completion_batch_size: Option<u64> = "completion-batch-size" {
        group: Group::Scheduling, kind: Kind::Int { min: 1, max: 1024 }, unit: "requests",
        effect: Effect::NoMeaning("every running request is decoded in every step; --max-num-seqs is the limit"),
    }
    /// Tokens gathered into one event of a stream.
    stream_interval: u64 = "stream-interval" {
        group: Group::Scheduling, kind: Kind::Int { min: 1, max: 1024 }, default: Fixed::Int(1), unit: "tokens",
        effect: Effect::NoMeaning("every token is sent as soon as it is known"), reason: "a token that is known is sent",
    }

    /// How weights come into memory: `mmap` maps the files (on Metal without a copy), `read` reads them up front.
    weights: String = "weights" {
        group: Group::Memory, kind: Kind::Enum(&["mmap", "read"]), default: Fixed::Str("mmap"),
        reason: "mapped weights stay clean file pages: they load at once, and memory pressure drops instead of swaps \
                 them",
    }
    /// Freed buffers that MLX keeps for reuse, at most; 0 keeps none. No more than four times what the largest step takes
    /// (but 64 MiB in any case), and no more than the other parts leave under the ceiling.
    mlx_cache_limit_mb: u64 = "mlx-cache-limit-mb" {
        group: Group::Memory, kind: COUNT0, default: Fixed::Int(2048), unit: "MiB",
        reason: "MLX's own default is as large as the GPU's whole working set: kept buffers look like use and push the \
                 machine into swap; none at all costs speed",
    }
    /// Memory reserved for the KV cache. Unset: the smallest of 8 GiB, 1/16 of memory, and four whole contexts for each
    /// sequence that may run.
    cache_memory_mb: Option<u64> = "cache-memory-mb" {
        group: Group::Memory, kind: Kind::Int { min: 16, max: 1_048_576 }, unit: "MiB",
        reason: "32 GiB drove a 128 GB machine into 24 GB of swap and one token a second; 8 GiB did not",
    }
    /// Memory reserved for the KV cache, as a share of all memory: the GPU's where it has its own, else the machine's.
    /// --cache-memory-mb goes before it.
    cache_memory_percent: Option<f64> = "cache-memory-percent" {
        group: Group::Memory, kind: Kind::Float { min: 0.001, max: 0.9 }, unit: "share",
        reason: "a share means more on a larger machine, whatever the model; the default knows the model, and has a bound",
    }
    /// Hard ceiling of this worker, as a share of the memory that the GPU may use (all memory, on the CPU): weights, KV
    /// cache, the largest step and kept buffers must fit under it, or the worker does not start.
    gpu_memory_utilization: f64 = "gpu-memory-utilization" {
        group: Group::Memory, kind: Kind::Float { min: 0.01, max: 1.0 }, default: Fixed::Float(0.5), unit: "share",
        reason: "the desktop, the compressor and the file cache live in the same memory",
    }
    /// Let requests share the blocks of the KV cache. Off: every request has blocks of its own, and there is no prefix
    /// cache. The pool of blocks is fixed either way.
    use_paged_cache: bool = "use-paged-cache" {
        group: Group::Memory, off: &["disable-paged-cache"], default: Fixed::Bool(true),
        reason: "blocks are shared between requests, and none is ever copied to grow",
    }
    /// Tokens in a KV block, a power of two.
    paged_cache_block_size: u64 = "paged-cache-block-size" {
        group: Group::Memory, aliases: &["block-size"], kind: Kind::Int { min: 16, max: 512 },
        default: Fixed::Int(32), unit: "tokens",
        reason: "a power of two between what sharing wants (small: a prefix is shared by whole blocks, and the last one of a \
                 request stands half empty) and what reading wants (long runs of memory)",
    }
    /// Most KV blocks. Unset: as many as the reservation holds.
    max_cache_blocks: Option<u64> = "max-cache-blocks" {
        group: Group::Memory, kind: COUNT, unit: "blocks",
        reason: "bytes are what is short; a number of blocks is for comparing runs of different block sizes",
    }
    /// Reuse the KV of prompts that begin alike. Needs --use-paged-cache. Off: a request for `n` choices computes its prompt
    /// `n` times.
    enable_prefix_cache: bool = "enable-prefix-cache" {
        group: Group::Memory, off: &["disable-prefix-cache"], default: Fixed::Bool(true),
        reason: "the biggest gain of all in conversations of many turns",
    }
    /// JSON file with lists of messages that are computed at start, before the worker is ready, so that the prefix cache
    /// knows them: `[[{"role": "system", "content": "..."}], ...]`.
    warm_prompts: Option<String> = "warm-prompts" {
        group: Group::Memory, kind: Kind::Str,
        reason: "only its user knows which beginnings come again, and each makes every start longer",
    }
    /// Most tokens of KV for one request.
    max_kv_size: Option<u64> = "max-kv-size" {
        group: Group::Memory, kind: COUNT, unit: "tokens",
        effect: Effect::Refused("a window that forgets the start of the conversation is not implemented; --context-length \
                                 limits a request instead"),
        reason: "a window that forgets the start of the conversation is the last resort",
    }
    /// Keep the KV cache quantised: the same reservation holds 1.9 times as many tokens of a 16-bit model with 8 bits, 3.6 times
    /// with 4. Every step turns what it reads back into numbers, by MLX's own operations; the kernels of --attention do not
    /// serve then.
    kv_cache_quantization: bool = "kv-cache-quantization" {
        group: Group::Memory, off: &["disable-kv-cache-quantization"], default: Fixed::Bool(false),
        reason: "it costs quality and speed; a last resort for long contexts",
    }
    /// Bits of a quantised KV value. Needs --kv-cache-quantization.
    kv_cache_quantization_bits: String = "kv-cache-quantization-bits" {
        group: Group::Memory, kind: Kind::Enum(&["4", "8"]), default: Fixed::Str("8"), unit: "bits",
        reason: "4 bits are visible in the replies",
    }
    /// KV values that share one scale and one bias; has to divide the model's head size. Needs --kv-cache-quantization.
    kv_cache_quantization_group_size: String = "kv-cache-quantization-group-size" {
        group: Group::Memory, kind: Kind::Enum(&["32", "64", "128"]), default: Fixed::Str("64"), unit: "values",
        reason: "it divides nearly every head size in use; 32 is finer and takes 6 % more with 8 bits",
    }
    /// Prompts shorter than this keep their KV unquantised.
    kv_cache_min_quantize_tokens: u64 = "kv-cache-min-quantize-tokens" {
        group: Group::Memory, kind: COUNT0, default: Fixed::Int(256), unit: "tokens",
        effect: Effect::NoMeaning("the KV of all requests lies in one pool of one form, whose blocks they share, so that a short \
                                   prompt cannot have another one"),
        reason: "short ones have nothing to save",
    }
    /// GPU operations in one command buffer: MLX_MAX_OPS_PER_BUFFER in the worker's environment. Unset: what the
    /// environment says, else MLX's choice for the chip.
    mlx_max_ops_per_buffer: Option<u64> = "mlx-max-ops-per-buffer" {
        group: Group::Memory, kind: Kind::Int { min: 1, max: 1_000_000 }, unit: "operations",
        reason: "a buffer's end costs the host time: with 1000 instead of 50, others measured decoding 3 to 21 % faster on M1 to \
                 M4, but prefills that took twice the memory (36 GB for 20), and no gain on M5; so MLX's own choice stays \
                 until somebody has measured the machine at hand",
    }
    /// What one command buffer may touch, in millions (MLX counts elements there, not bytes): MLX_MAX_MB_PER_BUFFER in the
    /// worker's environment. Unset: what the environment says, else MLX's choice for the chip.
    mlx_max_mb_per_buffer: Option<u64> = "mlx-max-mb-per-buffer" {
        group: Group::Memory, kind: Kind::Int { min: 1, max: 1_000_000 }, unit: "MB",
        reason: "it ends a buffer before --mlx-max-ops-per-buffer does where matrices are large: who raises one raises both, \
                 and looks at the memory of a long prefill",
    }
    /// Directory for KV that no longer fits into memory.
    ssd_cache_dir: Option<String> = "ssd-cache-dir" {
        group: Group::Memory, kind: Kind::Str, effect: Effect::AcceptedOnly("it comes with the prefix cache on disk"),
    }
    /// Size of that directory.
    ssd_cache_max_gb: f64 = "ssd-cache-max-gb" {
        group: Group::Memory, kind: Kind::Float { min: 0.001, max: 1_000_000.0 }, default: Fixed::Float(10.0),
        unit: "GB", effect: Effect::AcceptedOnly("it comes with the prefix cache on disk"),
        reason: "a place that is forgotten must stay small",
    }
    /// Use only what is already on this machine.
    offline: bool = "offline" {
        group: Group::Memory, default: Fixed::Bool(true),
        effect: Effect::NoMeaning("the worker never downloads; a hub id is looked up in HF_HOME"),
        reason: "a server that downloads 60 GB on its first request looks like one that hangs",
    }

    /// Model for /v1/embeddings.
    embedding_model: Option<String> = "embedding-model" { group: Group::Other, kind: Kind::Str, effect: TEXT_ONLY }
    /// Longest input of an embedding: `auto` or a number of tokens.
    embedding_max_length: String = "embedding-max-length" {
        group: Group::Other, kind: Kind::Str, default: Fixed::Str("auto"), unit: "tokens", effect: TEXT_ONLY,
        reason: "the model knows",
    }
    /// What to do with a longer one.
    embedding_overflow_policy: String = "embedding-overflow-policy" {
        group: Group::Other, kind: Kind::Enum(&["truncate", "error"]), default: Fixed::Str("error"),
        effect: TEXT_ONLY, reason: "a text cut without a word is a wrong answer",
    }
    /// Model for /v1/rerank.
    rerank_model: Option<String> = "rerank-model" { group: Group::Other, kind: Kind::Str, effect: TEXT_ONLY }
    /// Load the model's vision part.
    mllm: bool = "mllm" { group: Group::Other, default: Fixed::Bool(false), effect: TEXT_ONLY }
    /// Prefill step for prompts with images; 0 for --prefill-step-size.
    mllm_prefill_step_size: u64 = "mllm-prefill-step-size" {
        group: Group::Other, kind: COUNT0, default: Fixed::Int(0), unit: "tokens", effect: TEXT_ONLY,
    }
    /// Largest audio upload.
    max_audio_upload_mb: u64 = "max-audio-upload-mb" {
        group: Group::Other, kind: COUNT, default: Fixed::Int(25), unit: "MB", effect: TEXT_ONLY,
    }
    /// Longest text to be spoken.
    max_tts_input_chars: u64 = "max-tts-input-chars" {
        group: Group::Other, kind: COUNT, default: Fixed::Int(4096), unit: "characters", effect: TEXT_ONLY,
    }

    /// Registry of several models.
    models_config: Option<String> = "models-config" {
        kind: Kind::Str, effect: Effect::NoMeaning(ONE_MODEL),
    }
    /// Weights of all models together.
    memory_budget_gb: Option<f64> = "memory-budget-gb" {
        kind: Kind::Float { min: 0.001, max: 1_000_000.0 }, unit: "GB", effect: Effect::NoMeaning(ONE_MODEL),
    }
    /// Unload the model after this many idle seconds.
    auto_unload_idle_seconds: f64 = "auto-unload-idle-seconds" {
        kind: Kind::Float { min: 0.0, max: 1_000_000.0 }, default: Fixed::Float(0.0), unit: "s",
        effect: Effect::NoMeaning("swapd ends the whole process after `ttl`, which surely gives the memory back"),
    }
    /// Load the model on the first request.
    lazy_load_model: bool = "lazy-load-model" {
        default: Fixed::Bool(false),
        effect: Effect::NoMeaning("swapd starts the worker on the first request"),
    }
    /// Entry-count prefix cache.
    no_memory_aware_cache: bool = "no-memory-aware-cache" {
        default: Fixed::Bool(false), effect: Effect::NoMeaning("the prefix cache counts bytes, always"),
    }
    /// Entries of that cache.
    prefix_cache_size: Option<u64> = "prefix-cache-size" {
        kind: COUNT0, unit: "entries", effect: Effect::NoMeaning("the prefix cache counts bytes, always"),
    }
    /// Prefix cache of the predecessor's simple engine.
    prefix_trie_cache: bool = "prefix-trie-cache" {
        default: Fixed::Bool(false), effect: Effect::NoMeaning("there is one engine and one prefix cache"),
    }
    /// Its entries.
    prefix_trie_cache_size: Option<u64> = "prefix-trie-cache-size" {
        aliases: &["prefix-trie-size", "prompt-cache-size"], kind: COUNT0, unit: "entries",
        effect: Effect::NoMeaning("there is one engine and one prefix cache"),
    }
    /// Its bytes.
    prefix_trie_cache_memory_mb: Option<u64> = "prefix-trie-cache-memory-mb" {
        aliases: &["prefix-trie-memory-mb"], kind: COUNT0, unit: "MiB",
        effect: Effect::NoMeaning("there is one engine and one prefix cache"),
    }
    /// MCP servers.
    mcp_config: Option<String> = "mcp-config" {
        kind: Kind::Str, effect: Effect::NoMeaning("tools run in the client, never in the worker"),
    }
    /// Run code from the model's directory.
    trust_remote_code: bool = "trust-remote-code" {
        default: Fixed::Bool(false), effect: Effect::NoMeaning(NO_PYTHON),
    }
    /// Time for a download.
    download_timeout: Option<f64> = "download-timeout" {
        kind: Kind::Float { min: 0.0, max: 1_000_000.0 }, unit: "s",
        effect: Effect::NoMeaning("the worker never downloads"),
    }
    /// Tries of a download.
    download_retries: Option<u64> = "download-retries" {
        kind: COUNT0, effect: Effect::NoMeaning("the worker never downloads"),
    }
}

/// The row of a flag (with or without its leading `--`), an alias or a switch's negation; with the value `false` in
/// the last case.
#[must_use]
pub fn by_flag(flag: &str) -> Option<(&'static Knob, bool)> {
    let name = flag.strip_prefix("--").unwrap_or(flag);
    TABLE.iter().find_map(|knob| {
        if knob.flag == name || knob.aliases.contains(&name) {
            return Some((knob, true));
        }
        let negated = knob.kind == Kind::Bool
            && (knob.off.contains(&name)
                || name
                    .strip_prefix("no-")
                    .is_some_and(|n| n == knob.flag || knob.aliases.contains(&n)));
        negated.then_some((knob, false))
    })
}

/// The row of a YAML key, in camel case, snake case or the flag's own spelling.
#[must_use]
pub fn by_yaml_key(key: &str) -> Option<&'static Knob> {
    let dashed = key.replace('_', "-");
    TABLE
        .iter()
        .find(|k| k.yaml_key() == key || k.flag == dashed || k.aliases.contains(&dashed.as_str()))
}

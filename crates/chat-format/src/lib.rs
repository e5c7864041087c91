//! Chat templates in, tool calls and reasoning out.
//!
//! A request's messages become a prompt by the model's own chat template ([`ChatTemplate`]), equal to what
//! `transformers` renders; the model's text becomes content, reasoning and tool calls while it streams
//! ([`OutputParser`]), and ends at stop strings ([`StopMatcher`]). Nothing here does I/O except
//! [`ChatTemplate::from_dir`], and nothing knows about HTTP: messages and tools are `serde_json` values.
//!
//! # How a server uses it
//!
//! Request: [`ChatTemplate::render`] gives the prompt; [`Reasoning::detect`] tells from its end whether the model starts
//! inside of reasoning; an [`OutputConfig`] takes that, the [`ToolFormat`] (none for `tool_choice: "none"`), and the
//! tools as a [`ToolSet`]. Reply: the detokenised text goes through a [`StopMatcher`] and then an [`OutputParser`]. The
//! detokeniser must not drop special tokens such as `<tool_call>` and `<think>`: they are the markup.
//!
//! | [`Delta`] | OpenAI stream | not streamed ([`ParsedOutput`]) |
//! |---|---|---|
//! | `Content`, `Malformed` | `delta.content` | `content` |
//! | `Reasoning` | `delta.reasoning_content` | `reasoning` |
//! | `ToolCallBegin` | `delta.tool_calls[{index, id, type, function: {name, arguments: ""}}]` | `tool_calls` |
//! | `ToolCallArguments` | `delta.tool_calls[{index, function: {arguments}}]` | |
//! | `ToolCallEnd` | nothing; any `Complete` one makes a finish reason of `stop` to `tool_calls` | |
//!
//! # Layout
//!
//! - `template/`: Hugging Face chat templates on minijinja.
//!   - `environment`: the Jinja settings, filters, tests and globals of `transformers`
//!   - `python`: `str`, `repr`, `json.dumps` as CPython writes them
//!   - `filters`: Jinja2's filters and tests, where minijinja lacks one or differs
//!   - `args`: arguments by place or by name
//!   - `methods`: Python's methods of strings, dicts and lists
//!   - `clock`: `strftime_now` with a clock that tests can set
//!   - `messages`: from OpenAI's messages to the ones that templates read
//!   - `load`: templates and special tokens of a model directory
//!   - `error`: [`TemplateError`]
//! - `output/`: what the model wrote.
//!   - `delta`: [`Delta`] and its sum, [`ParsedOutput`]
//!   - `format`: [`ToolFormat`] and [`Reasoning`], and how they are detected
//!   - `reasoning`: splits `<think>…</think>` from the answer
//!   - `hermes`: `<tool_call>…</tool_call>`
//!   - `late_call`: a call inside of reasoning that was never closed
//!   - `call`: one call from its JSON text
//!   - `lenient`: the incremental JSON reader that repairs
//!   - `tools`, `coerce`: declared parameter types, and bringing values to them
//! - `stop`: stop strings

mod output;
mod stop;
mod template;

pub use jiff::civil::DateTime;
pub use output::{
    CallOutcome, Delivery, Delta, EndReason, MalformedReason, OutputConfig, OutputParser, ParsedOutput,
    Reasoning, ReasoningFormat, ToolCall, ToolFormat, ToolSet, UnknownReasoningFormat, UnknownToolFormat,
};
pub use stop::StopMatcher;
pub use template::{ChatTemplate, Clock, ContentStyle, RenderInputs, TemplateError, system_clock};

//! OpenAI's chat completions, completions and models: requests in, replies and stream chunks out.

mod chat;
mod completion;
mod constraint;
mod messages;
mod options;
mod reply;
mod stream;
mod unsupported;

pub use chat::{ChatRequest, ToolChoice};
pub use completion::{CompletionRequest, Prompt};
pub use constraint::{AskedForm, Form};
pub use options::{GenerationOptions, Sampling};
pub use reply::{
    ChatChoice, ChatCompletion, ChatLogprobs, ChatMessage, Completion, CompletionChoice, CompletionLogprobs,
    CompletionTokensDetails, FinishReason, FunctionCall, ModelCard, ModelList, PromptTokensDetails,
    TokenLogprob, ToolCall, TopLogprob, Usage,
};
pub use stream::{ChatChunks, CompletionChunks};

//! Wire types of the OpenAI-compatible API, its stream events, one error envelope, the control-socket messages.
//!
//! | module    | idea                                                                                    |
//! |-----------|-----------------------------------------------------------------------------------------|
//! | `openai`  | chat completions, completions, models: requests checked, replies and chunks written      |
//! | `sse`     | server-sent events: fixed lines, errors in mid-stream, a decoder                        |
//! | `error`   | the one error that a client sees, and its envelope                                      |
//! | `fields`  | strict reading of a request's known fields, with messages that name field and value     |
//! | `control` | the JSON lines between `swapd` and a worker                                             |

pub mod control;
pub mod error;
pub mod fields;
pub mod openai;
pub mod sse;

pub use error::ApiError;

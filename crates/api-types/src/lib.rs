//! Wire types of the OpenAI-compatible API, its stream events, one error envelope, the control-socket messages.
//!
//! | module    | idea                                                                                    |
//! |-----------|-----------------------------------------------------------------------------------------|
//! | `control` | the JSON lines between `swapd` and a worker                                             |

pub mod control;

//! mlxworker: MLX inference of one model behind an OpenAI-compatible HTTP front.
//!
//! | module    | idea                                                                 |
//! |-----------|----------------------------------------------------------------------|
//! | `engine`  | the thread that owns MLX and every sequence                            |
//! | `model`   | config.json, weights, layers: a model directory run through MLX      |
//! | `backend` | the seam to the engine, and a scripted engine for tests               |
//! | `http`    | the OpenAI-compatible routes over a backend                           |
//! | `serve`   | `mlxworker serve`: start-up, control socket, shutdown                 |
//! | `text`    | tokenizer, incremental detokeniser                                    |
//! | `volumes` | why a file is not there                                               |

pub mod backend;
pub mod engine;
pub mod http;
pub mod model;
pub mod serve;
pub mod text;
mod volumes;

//! mlxworker: MLX inference of one model behind an OpenAI-compatible HTTP front.
//!
//! | module    | idea                                                                 |
//! |-----------|----------------------------------------------------------------------|
//! | `backend` | the seam to the engine, and a scripted engine for tests               |

pub mod backend;

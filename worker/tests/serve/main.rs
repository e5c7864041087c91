//! The real program with the demo model on MLX: hand-shake, heartbeat, drain, signals, and every way not to start.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod ends;
mod flags;
mod memory;
mod refusals;
mod start;
mod support;

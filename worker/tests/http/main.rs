//! The whole HTTP layer over real sockets, against a scripted backend (in `real` against the engine), with the demo model's tokenizer and template.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod cancel;
mod chat;
mod completions;
mod constrained;
mod errors;
mod info;
mod real;
mod streams;
mod support;
mod watchdog;

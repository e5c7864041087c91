//! The whole HTTP layer over real sockets, against a scripted backend, with the demo model's tokenizer and template.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod cancel;
mod chat;
mod completions;
mod errors;
mod info;
mod streams;
mod support;
mod watchdog;

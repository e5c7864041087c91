//! Who runs, who waits, who is evicted: the pure core of the proxy.
//!
//! [`Lifecycle::step`] takes the time, one [`Event`] and answers with [`Effect`]s. It does no I/O, reads no clock and
//! spawns nothing, so that its promises can be checked by properties over random event orders:
//!
//! - one model never has two processes, and a new process never starts before those it replaces have been reaped;
//! - every request is answered exactly once: dispatched, or refused with a reason;
//! - every wait is bounded, and steady traffic on one model cannot starve another;
//! - a process is unloaded for want of memory only when it is idle, unless memory has been critical for long;
//! - a swap never cuts a request in flight; an unload drains first and cuts after its grace.
//!
//! A model goes `stopped → starting → ready → draining → stopping → stopped`; after a failure it is `backoff` for a while.
//!
//! Layout: `event` what comes in and goes out; `config` the rules of each model; `residency` the rule of who may
//! be resident beside whom; `memory` what want of memory leads to; `model` the state of one model; `machine` the reaction to each event; `settle` what
//! follows from time and from the queues.

mod config;
mod event;
mod machine;
mod memory;
mod model;
mod residency;
mod settle;

pub use config::{Abandoned, Config, Fairness, MemoryPolicy, Policy};
pub use event::{
    CutReason, Effect, Event, Failure, Instance, Kind, Millis, ModelId, Rejection, RequestId, State, Ticket,
};
pub use machine::{Lifecycle, ModelStatus};
pub use memory::{MemoryLevel, MemoryReading};
pub use residency::{OneAtATime, Residency};

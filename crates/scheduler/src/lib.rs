//! The engine's scheduler: which sequences decode in the next step, which parts of which prompts are computed in it,
//! who waits and who has to give way.
//!
//! Pure: no MLX, no I/O, no clock; times come in as durations since the engine's start. The engine thread owns a
//! [`Scheduler`], and the scheduler owns the [`kv_cache::KvCache`]. For each step the engine asks for a [`Plan`],
//! issues it, and brings back the tokens that were drawn.
//!
//! # One step ahead
//!
//! The engine plans and issues step n+1 while the tokens drawn in step n are still on the device, and only then reads
//! step n. So a [`Decode`] hands out the position of a token whose value nobody knows yet; [`Scheduler::token`] brings
//! the value later. A sequence that turns out to have ended in step n has a draw in step n+1 that nobody reads.
//!
//! ```
//! use std::time::Duration;
//! use kv_cache::{CacheConfig, SeqId};
//! use scheduler::{Config, NewRequest, Scheduler};
//!
//! let mut scheduler = Scheduler::new(Config {
//!     cache: CacheConfig::for_pool(1 << 20, 64, 16),
//!     context_length: 4096,
//!     max_running: 4,
//!     prefill_chunk: 512,
//!     step_budget: 1 << 22,
//!     compact_decodes: true,
//!     max_wait: Some(Duration::from_secs(60)),
//! })?;
//! let id = SeqId(1);
//! let now = Duration::ZERO;
//! scheduler.submit(NewRequest { id, group: id, prompt: (0..700).collect(), max_new_tokens: 100, now })?;
//!
//! // Two chunks of the prompt; the second one draws the first token.
//! let plan = scheduler.plan(now);
//! assert_eq!((plan.prefill[0].tokens.len(), plan.prefill[0].last), (512, false));
//! let plan = scheduler.plan(now);
//! assert_eq!((plan.prefill[0].start, plan.prefill[0].last), (512, true));
//! // Step 3 is planned before the token drawn in step 2 is known.
//! let plan = scheduler.plan(now);
//! assert_eq!(plan.decode[0].position, 700);
//! scheduler.token(id, 17);
//! // Say that 17 ends the reply.
//! scheduler.finish(id);
//! assert!(scheduler.is_idle());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What an engine must do with a plan
//!
//! Issue `copies` in their order ([`kv_cache::copy_runs`] joins those of neighbours), then the prefills in theirs; the decodes may go before, between or after the
//! prefills. All of it on one stream, and all of it before the next plan is asked for: a block may have changed hands
//! in the plan. The block tables ([`Scheduler::table`]) are those of the sequences as the whole plan leaves them; read
//! them after [`Scheduler::plan`] and before anything else is called.
//!
//! # Rules
//!
//! - **Admission** is in order of arrival. While the head of the queue waits for room, nobody overtakes it.
//! - **Waiting** too long ends requests of which nothing has run. Once one sequence of a request is admitted, the others wait
//!   for as long as it takes.
//! - **Decode**: every sequence whose prompt is done decodes in every step.
//! - **Prefill**: every step computes at most [`Config::prefill_chunk`] prompt tokens, so nobody's decode is held up for
//!   longer, and at least one while any prompt is unfinished, so steady decoding cannot starve a prompt. The shortest
//!   rest of a prompt goes first. A prompt that got nothing in [`PATIENCE`] steps goes before the others, the longest
//!   passed over first: so none is passed over in more than `PATIENCE + max_running - 1` steps in a row. A prompt is cut
//!   where it would be cut alone, whatever its company: a piece that a step has no room for waits.
//! - **Step budget**: the prefill of a step covers at most [`Config::step_budget`] tokens × context, all prompts together, or
//!   one token.
//! - **Preemption**: when the pool is dry, the last to have arrived goes back to the queue, at its old place. It keeps
//!   its tokens, and is prefilled again from what is still cached.
//! - **Neighbours**: wherever there is room for that, the blocks of a sequence follow one another
//!   ([`kv_cache::runs`]); for that blocks are copied, at most half of the pool in one step.
//! - **The end**: after `max_new_tokens` draws, or at the context length, a sequence is not planned again; the engine
//!   ends it by [`Scheduler::finish`] when it has read the last draw.
//!
//! Layout: `config` sizes; `types` what goes in and out; `job` the state of one request; `scheduler` arrivals, tokens,
//! ends; `plan` the next step; `prefill` whose prompt goes next, and how much of it.

mod config;
mod job;
mod plan;
mod prefill;
mod scheduler;
mod types;

pub use config::{Config, ConfigError};
pub use prefill::PATIENCE;
pub use scheduler::{Scheduler, Totals};
pub use types::{Decode, NewRequest, Plan, Prefill, Refusal};

//! The paged KV cache's decisions: block pool, block tables, prefix tree, admission arithmetic.
//!
//! Pure: no MLX, no I/O, no clock. The engine owns one slab per layer, `[total_blocks, block_size, kv_heads, head_dim]`,
//! and does what it is told: copy a block ([`CopyBlock`]), write these positions ([`SlotRun`]), attend over this block
//! table ([`KvCache::table`]). It must issue what it is told in the order in which it was told, on one stream; then a
//! block may change hands while a step that reads it is still in flight.
//!
//! Promises, checked by properties over random traffic:
//!
//! - A block is free, cached, or in use; its holders are counted; nobody writes to a block that someone else can read.
//! - A cached block is found by all tokens from the start of the prompt to its end, compared one by one.
//! - What is in use is not evicted; of the rest the least recently used goes first, a conversation's end before its start.
//! - What is promised to a sequence is free, and its blocks are neighbours wherever there is room for that ([`runs`]).
//! - An exact repeat leaves one token to prefill, never none.
//! - An admitted request can always take the blocks promised to it. Past them, [`KvCache::make_room`] preempts juniors;
//!   the most senior always gets through, so every admitted request finishes.
//!
//! # One step of an engine
//!
//! ```
//! use kv_cache::{Admission, CacheConfig, KvCache, KvShape, Request, SeqId};
//!
//! let shape = KvShape { layers: 28, kv_heads: 8, key_dim: 128, value_dim: 128, bytes_per_element: 2, quantization: None };
//! let mut cache: KvCache<()> = KvCache::new(CacheConfig::for_pool(1 << 30, shape.bytes_per_token(), 16))?;
//!
//! // A request comes to the head of the queue.
//! let prompt: Vec<u32> = (0..100).collect();
//! let id = SeqId(1);
//! let request = Request { id, arrival: 1, prompt: &prompt, max_new_tokens: 200 };
//! let cached = match cache.admit(&request)? {
//!     // Issue `copies`; restore `snapshot` if the model has layers that need one.
//!     Admission::Admit(admitted) => admitted.cached_tokens,
//!     // Leave it at the head of the queue until a sequence has been freed.
//!     Admission::Wait(_) => return Ok(()),
//!     // 400, with these numbers.
//!     Admission::Never(too_large) => return Err(too_large.to_string().into()),
//! };
//!
//! // Issue these copies too: they make the sequence one run, for which cached blocks move.
//! let copies = cache.compact(id, 1000)?;
//! assert!(copies.is_empty(), "the pool is empty");
//!
//! // Prefill in chunks; before each, skip what others have computed in the meantime.
//! let mut done = cached;
//! while done < prompt.len() {
//!     done += cache.skip_cached(id, &prompt[done..])?;
//!     let chunk = (prompt.len() - done).min(64);
//!     let extension = cache.extend(id, chunk)?;
//!     // Issue the forward pass, which writes K and V of the chunk to `extension.runs` and attends over
//!     // `cache.table(id)`.
//!     cache.record(id, &prompt[done..done + chunk])?;
//!     done += chunk;
//! }
//!
//! // Decode. Senior sequences first; when the pool is dry, juniors go back to the queue.
//! for preempted in cache.make_room(id, 1)? {
//!     // Queue it again, by `preempted.arrival`, with prompt + generated tokens as its prompt.
//!     assert_ne!(preempted.id, id, "alone it always has room");
//! }
//! let copies = cache.stay_compact(id, 1000)?; // To be issued before the step.
//! let extension = cache.extend(id, 1)?; // The position of a token that may still be on the device.
//! assert_eq!(extension.slots().count(), 1);
//! // ... issue step n+1, then read step n ...
//! cache.record(id, &[7])?;
//!
//! // Finished, cancelled or failed: all the same.
//! cache.free(id)?;
//! assert_eq!(cache.peek(&prompt), prompt.len() - 1);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! A request with `n > 1` is `n` sequences. Those that are admitted after the first has computed a block find it in the
//! tree, or skip to it ([`KvCache::skip_cached`]).
//!
//! For models with recurrent or sliding-window layers, use [`Reuse::Snapshots`], split prefill at the history boundary
//! and leave the state there ([`KvCache::snapshot`]); an admission then ends its match at such a state and returns it.
//!
//! To tell a person why a prompt was not reused, ask [`KvCache::divergence`] before admitting it: an admission may evict.
//!
//! Layout: `types` names, effects, errors; `config` sizes; `pool` free list and holders; `tree` the prefix tree;
//! `lookup` matches and divergence; `evicted` what went lately; `placement` which block is next; `compact` moving
//! blocks together; `snapshots` states at positions; `sequence` block tables, end; `cache`
//! admission, growth, recording, preemption; `usage` numbers; `audit` the invariants.

mod audit;
mod cache;
mod compact;
mod config;
mod evicted;
mod lookup;
mod placement;
mod pool;
mod sequence;
mod snapshots;
mod tree;
mod types;
mod usage;

pub use cache::KvCache;
pub use compact::copy_runs;
pub use config::{CacheConfig, ConfigError, GENERATION_SHARE, KvQuantization, KvShape, Reuse};
pub use lookup::Divergence;
pub use placement::runs;
pub use types::{
    Admission, Admitted, BlockId, CacheError, CopyBlock, Extension, Preempted, Request, SeqId, Shortage,
    SlotRun, Token, TooLarge,
};
pub use usage::{Counters, Usage};

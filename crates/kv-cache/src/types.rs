//! Names, effects and errors shared by the modules.

use std::fmt;

/// A token id of the model's vocabulary.
pub type Token = u32;

/// Index of a block in the pool, `0..total_blocks`; also its index in each layer's slab.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId(pub u32);

/// One running sequence, named by the caller. A request with `n > 1` is `n` of them, which share their prompt's blocks
/// through the prefix tree like any others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SeqId(pub u64);

impl fmt::Display for SeqId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Effect: copy the first `tokens` positions of block `from` to block `to`, in every layer, before any write that
/// was handed out together with this effect or later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyBlock {
    /// Block to read; it may be handed to someone else by the next call, so copies go out in order.
    pub from: BlockId,
    /// Block to write; nobody else reads it yet.
    pub to: BlockId,
    /// How many positions of `from` matter, `1..=block_size`. The rest may be copied too: nobody reads it.
    pub tokens: usize,
}

/// Consecutive positions inside one block, to be written by one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotRun {
    /// The block.
    pub block: BlockId,
    /// First position in it.
    pub offset: usize,
    /// How many, at least 1; `offset + len <= block_size`.
    pub len: usize,
}

/// Where the K and V of the next tokens of a sequence go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extension {
    /// The positions, in token order.
    pub runs: Vec<SlotRun>,
}

impl Extension {
    /// Every single position as (block, offset), in token order: the indices of a scatter.
    pub fn slots(&self) -> impl Iterator<Item = (BlockId, usize)> + '_ {
        self.runs
            .iter()
            .flat_map(|run| (run.offset..run.offset + run.len).map(|offset| (run.block, offset)))
    }
}

/// What a request asks of the cache.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Its name; not in use.
    pub id: SeqId,
    /// Place in the order of arrival. A preempted request keeps its old one, and so grows senior to newcomers.
    pub arrival: u64,
    /// All tokens whose KV is needed before the first new token; for a preempted request also those it generated.
    pub prompt: &'a [Token],
    /// Most tokens that it may still generate.
    pub max_new_tokens: usize,
}

/// Answer to a [`Request`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Admission<S> {
    /// The sequence exists now, and its blocks are promised.
    Admit(Admitted<S>),
    /// Not now: too much is promised to others. Ask again after a sequence has been freed.
    Wait(Shortage),
    /// Not ever, not even alone in an empty pool: the client's fault, with the numbers.
    Never(TooLarge),
}

/// What an admitted request got.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admitted<S> {
    /// Blocks promised beyond those that it shares with the prefix tree.
    pub blocks: usize,
    /// Prompt tokens whose KV is there already; prefill begins at this position, and there is always something left.
    pub cached_tokens: usize,
    /// Copies to make before the first write, at most one: the part of a block that the prompt shares with another.
    pub copies: Vec<CopyBlock>,
    /// With [`Reuse::Snapshots`](crate::Reuse::Snapshots) the state of the other layers after `cached_tokens`.
    pub snapshot: Option<S>,
}

/// Why a request waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shortage {
    /// Blocks that it needs beyond what is cached.
    pub needed_blocks: usize,
    /// Blocks that are free or evictable, and promised to no one.
    pub available_blocks: usize,
}

/// Why a request can never run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooLarge {
    /// Tokens of KV at its longest: prompt and `max_new_tokens`.
    pub needed_tokens: usize,
    /// Tokens of KV that the whole pool holds.
    pub capacity_tokens: usize,
    /// Blocks that these take.
    pub needed_blocks: usize,
    /// Blocks in the pool.
    pub capacity_blocks: usize,
    /// Bytes of `needed_blocks`.
    pub needed_bytes: u64,
    /// Bytes of the pool.
    pub capacity_bytes: u64,
}

impl fmt::Display for TooLarge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the request needs KV for {} tokens ({} blocks, {} bytes), but the KV cache holds {} tokens ({} blocks, {} bytes)",
            self.needed_tokens,
            self.needed_blocks,
            self.needed_bytes,
            self.capacity_tokens,
            self.capacity_blocks,
            self.capacity_bytes
        )
    }
}

/// A sequence that lost its blocks, to be admitted again later with prompt = old prompt + generated tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preempted {
    /// The sequence; its name is free again.
    pub id: SeqId,
    /// Its place in the order of arrival: what to ask with next time.
    pub arrival: u64,
    /// Positions of KV that had been recorded. They stay cached for as long as nobody needs the room.
    pub recorded_tokens: usize,
}

/// A call that the cache cannot follow. Only [`CacheError::OutOfBlocks`] happens to a caller without a bug.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CacheError {
    /// No sequence has this name.
    UnknownSequence(SeqId),
    /// A running sequence has this name already.
    DuplicateSequence(SeqId),
    /// The prompt is empty: there is nothing to run.
    EmptyRequest,
    /// The sequence used up its promise and the pool is dry: preempt someone (`make_room`).
    OutOfBlocks(Shortage),
    /// The sequence would grow past prompt + `max_new_tokens`.
    PastLimit {
        /// Tokens that it would have.
        asked: usize,
        /// Tokens that it was admitted for.
        limit: usize,
    },
    /// More tokens were recorded than positions had been handed out.
    RecordPastEnd {
        /// Tokens given.
        given: usize,
        /// Positions that were waiting for theirs.
        open: usize,
    },
}

impl fmt::Display for CacheError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownSequence(id) => write!(f, "no sequence {id} is running"),
            Self::DuplicateSequence(id) => write!(f, "sequence {id} is running already"),
            Self::EmptyRequest => f.write_str("an empty prompt has nothing to run"),
            Self::OutOfBlocks(shortage) => write!(
                f,
                "{} more KV blocks needed, {} available",
                shortage.needed_blocks, shortage.available_blocks
            ),
            Self::PastLimit { asked, limit } => {
                write!(f, "a sequence admitted for {limit} tokens would grow to {asked}")
            }
            Self::RecordPastEnd { given, open } => {
                write!(f, "{given} tokens recorded where {open} positions were open")
            }
        }
    }
}

impl std::error::Error for CacheError {}

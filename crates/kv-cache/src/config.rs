//! Sizes: from a model's shape and a byte budget to blocks.

use std::fmt;

/// K and V of one group of equal attention layers. Models with several kinds of layers add the bytes up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// Layers that keep K and V for every position.
    pub layers: usize,
    /// KV heads per layer (not query heads).
    pub kv_heads: usize,
    /// Elements of K per head and token.
    pub key_dim: usize,
    /// Elements of V per head and token; most models have `key_dim`.
    pub value_dim: usize,
    /// Bytes per element: 2 for float16 and bfloat16, 4 for float32.
    pub bytes_per_element: usize,
    /// `None`: elements are kept as they are.
    pub quantization: Option<KvQuantization>,
}

/// K and V kept in fewer bits: neighbouring elements of one head and token share a scale and a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvQuantization {
    /// Bits of an element.
    pub bits: u8,
    /// Elements that share a scale and a bias; divides the width of a head.
    pub group_size: u8,
}

impl fmt::Display for KvQuantization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bits in groups of {}", self.bits, self.group_size)
    }
}

impl KvShape {
    /// `layers × kv_heads × (key_dim + value_dim) × bytes_per_element`; quantised, an element takes its bits and its share of a
    /// scale and a bias, which take `bytes_per_element` each.
    pub fn bytes_per_token(&self) -> u64 {
        let head = self
            .head_bytes(self.key_dim)
            .saturating_add(self.head_bytes(self.value_dim));
        [self.layers as u64, self.kv_heads as u64, head]
            .into_iter()
            .fold(1, u64::saturating_mul)
    }

    /// Bytes of the K or V of one head and token.
    fn head_bytes(&self, dim: usize) -> u64 {
        let (dim, element) = (dim as u64, self.bytes_per_element as u64);
        match self.quantization {
            None => dim.saturating_mul(element),
            Some(KvQuantization { bits, group_size }) => {
                let packed = dim.saturating_mul(u64::from(bits)).div_ceil(8);
                let groups = dim.div_ceil(u64::from(group_size).max(1));
                packed.saturating_add(groups.saturating_mul(element).saturating_mul(2))
            }
        }
    }
}

/// From which positions a cached prefix can be continued.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reuse {
    /// From any: every layer keeps K and V of every position.
    #[default]
    Positions,
    /// Only from where a snapshot was taken: some layers (recurrent, sliding-window) keep a state that cannot be cut
    /// back.
    Snapshots,
}

/// Everything that the cache is told at its start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheConfig {
    /// Blocks in the pool.
    pub total_blocks: usize,
    /// Positions per block.
    pub block_size: usize,
    /// KV bytes of one position, all layers together.
    pub bytes_per_token: u64,
    /// New tokens per sequence whose blocks are promised at admission. Past them a sequence lives on what is left, and
    /// may be preempted: promising `max_new_tokens` in full would leave most of the pool idle, since few replies get
    /// that long.
    pub generation_share: usize,
    /// Keep the blocks of freed and running sequences for others.
    pub prefix_cache: bool,
    /// Fewest tokens of a partly shared block that are worth a copy, at least 1. Fewer are taken where it costs no copy,
    /// as the block holds nothing else, and where they are all that is wanted: an exact repeat.
    pub min_tail: usize,
    /// From which positions a prefix can be continued.
    pub reuse: Reuse,
    /// Most bytes of snapshots kept; the least recently used go first.
    pub snapshot_bytes: u64,
}

/// New tokens promised to a sequence at its admission, unless told otherwise: most replies are no longer.
pub const GENERATION_SHARE: usize = 512;

/// What part of a block is worth a copy, unless told otherwise. A copy is two commands in every layer, however few
/// tokens it saves; a few tokens more in a prefill that has to be made anyway cost next to nothing. And every chat
/// begins with the same few tokens. On the CPU, with the demonstration model's four layers, a copy took as long as one
/// to three tokens of a prompt (0.1 to 0.4 ms beside 0.15); a device that computes faster than it is given commands
/// loses more by it.
const TAIL_PART: usize = 4;

impl CacheConfig {
    /// A cache of as many blocks as fit into `pool_bytes`, with [`GENERATION_SHARE`], prefix reuse, and no snapshots.
    pub fn for_pool(pool_bytes: u64, bytes_per_token: u64, block_size: usize) -> Self {
        let block_bytes = bytes_per_token.saturating_mul(block_size as u64).max(1);
        Self {
            total_blocks: usize::try_from(pool_bytes / block_bytes).unwrap_or(usize::MAX),
            block_size,
            bytes_per_token,
            generation_share: GENERATION_SHARE,
            prefix_cache: true,
            min_tail: (block_size / TAIL_PART).max(1),
            reuse: Reuse::Positions,
            snapshot_bytes: 0,
        }
    }

    /// Bytes of one block.
    pub fn block_bytes(&self) -> u64 {
        self.bytes_per_token.saturating_mul(self.block_size as u64)
    }

    /// Blocks for so many positions, rounded up.
    pub fn blocks_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.block_size.max(1))
    }

    /// Positions in the whole pool.
    pub fn capacity_tokens(&self) -> usize {
        self.total_blocks.saturating_mul(self.block_size)
    }

    /// Most new tokens that a single sequence with such a prompt may be admitted for; 0 where it never fits.
    /// For clamping a client's `max_tokens`.
    pub fn room_after(&self, prompt_tokens: usize) -> usize {
        self.capacity_tokens().saturating_sub(prompt_tokens)
    }

    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        if self.block_size == 0 {
            return Err(ConfigError::NoBlockSize);
        }
        if self.total_blocks == 0 {
            return Err(ConfigError::NoBlocks {
                block_bytes: self.block_bytes(),
            });
        }
        if u32::try_from(self.total_blocks).is_err() {
            return Err(ConfigError::TooManyBlocks {
                blocks: self.total_blocks,
            });
        }
        Ok(())
    }
}

/// Sizes that make no cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConfigError {
    /// Blocks of zero tokens.
    NoBlockSize,
    /// The byte budget holds not one block.
    NoBlocks {
        /// What one block takes.
        block_bytes: u64,
    },
    /// More blocks than a `u32` counts.
    TooManyBlocks {
        /// How many.
        blocks: usize,
    },
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoBlockSize => f.write_str("a KV block must hold at least one token"),
            Self::NoBlocks { block_bytes } => {
                write!(
                    f,
                    "the KV cache must hold at least one block of {block_bytes} bytes"
                )
            }
            Self::TooManyBlocks { blocks } => write!(f, "{blocks} KV blocks are more than {}", u32::MAX),
        }
    }
}

impl std::error::Error for ConfigError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_a_known_model() {
        // Qwen3-0.6B: 28 layers, 8 KV heads of 128, bfloat16: 112 KiB a token.
        let shape = KvShape {
            layers: 28,
            kv_heads: 8,
            key_dim: 128,
            value_dim: 128,
            bytes_per_element: 2,
            quantization: None,
        };
        assert_eq!(shape.bytes_per_token(), 114_688);
        // A head's 128 elements and two scales and biases: 136 bytes instead of 256; with 4 bits, 72.
        let quantized = |bits, group_size| KvShape {
            quantization: Some(KvQuantization { bits, group_size }),
            ..shape
        };
        assert_eq!(quantized(8, 64).bytes_per_token(), 28 * 8 * 2 * 136);
        assert_eq!(quantized(4, 64).bytes_per_token(), 28 * 8 * 2 * 72);
        assert_eq!(quantized(8, 32).bytes_per_token(), 28 * 8 * 2 * 144);
        let config = CacheConfig::for_pool(8 << 30, shape.bytes_per_token(), 32);
        assert_eq!(config.block_bytes(), 3_670_016);
        assert_eq!(config.total_blocks, 2340);
        assert_eq!(config.room_after(74_000), 880);
        assert_eq!(config.room_after(80_000), 0);
    }

    #[test]
    fn sizes_that_make_no_cache_are_refused() {
        let none = CacheConfig::for_pool(1000, 100, 16);
        assert_eq!(none.check(), Err(ConfigError::NoBlocks { block_bytes: 1600 }));
        assert_eq!(
            CacheConfig {
                block_size: 0,
                ..none.clone()
            }
            .check(),
            Err(ConfigError::NoBlockSize)
        );
        assert!(matches!(
            CacheConfig {
                total_blocks: usize::MAX,
                ..none
            }
            .check(),
            Err(ConfigError::TooManyBlocks { .. })
        ));
    }
}

//! Where the positions of a sequence lie in the slabs.

use kv_cache::{BlockId, SlotRun};
use mlx_rs::error::{Exception, Result};

use crate::model::kv::Span;

/// Where `length` positions from `start` on lie in a block table, in order.
pub(super) fn runs(table: &[BlockId], block_size: usize, start: usize, length: usize) -> Vec<SlotRun> {
    let mut runs = Vec::new();
    let mut at = start;
    while at < start + length {
        let offset = at % block_size;
        let len = (block_size - offset).min(start + length - at);
        if let Some(&block) = table.get(at / block_size) {
            runs.push(SlotRun { block, offset, len });
        }
        at += len;
    }
    runs
}

/// The slab positions of the first `length` tokens of a sequence with that block table.
pub(super) fn spans(table: &[BlockId], block_size: usize, length: usize) -> Result<Vec<Span>> {
    let mut spans = Vec::new();
    let mut left = length;
    for &block in table {
        if left == 0 {
            break;
        }
        let here = left.min(block_size);
        let start = int(flat(block, block_size)?)?;
        join(
            &mut spans,
            Span {
                start,
                length: int(here)?,
            },
        );
        left -= here;
    }
    if left > 0 {
        return Err(Exception::custom(format!(
            "a block table of {} blocks for {length} tokens",
            table.len()
        )));
    }
    Ok(spans)
}

/// A block table as kernels read it.
pub(super) fn blocks(table: &[BlockId]) -> Result<Vec<i32>> {
    let number =
        |block: &BlockId| i32::try_from(block.0).map_err(|_| Exception::custom("a block out of range"));
    table.iter().map(number).collect()
}

/// Appends a span, to the last one when it follows that immediately.
pub(super) fn join(spans: &mut Vec<Span>, next: Span) {
    match spans.last_mut() {
        Some(last) if last.start + last.length == next.start => last.length += next.length,
        _ => spans.push(next),
    }
}

pub(super) fn flat(block: BlockId, block_size: usize) -> Result<usize> {
    let block = usize::try_from(block.0).map_err(|_| Exception::custom("a block out of range"))?;
    Ok(block * block_size)
}

pub(super) fn int(number: usize) -> Result<i32> {
    i32::try_from(number).map_err(|_| Exception::custom(format!("{number} is too large for MLX")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn consecutive_blocks_are_one_span() {
        let table = [3, 4, 5, 9, 2].map(BlockId);
        let found = spans(&table, 16, 70).unwrap();
        let span = |start, length| Span { start, length };
        assert_eq!(found, [span(48, 48), span(144, 16), span(32, 6)]);
        assert_eq!(spans(&table, 16, 5).unwrap(), [span(48, 5)]);
        assert!(spans(&table, 16, 81).is_err());
    }
}

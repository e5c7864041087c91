//! Whose prompt goes next, and how much of it.

use std::cmp::Reverse;

use kv_cache::{Extension, SeqId};

use crate::scheduler::Scheduler;
use crate::types::{Plan, Prefill};

/// A prompt that got nothing in so many steps in which others did goes before these.
///
/// Shortest-first alone would let a stream of short prompts starve a long one; taking turns would make a short prompt
/// wait for as many chunks as there are long ones. With 4, a long prompt gets a fifth of the prefill at the least.
pub const PATIENCE: usize = 4;

/// What a step still has room for.
struct Left {
    tokens: usize,
    /// Of [`work`].
    work: u64,
}

impl Scheduler {
    pub(crate) fn plan_prefills(&mut self, plan: &mut Plan) {
        let mut order: Vec<_> = self
            .jobs
            .iter()
            .filter_map(|(&id, job)| {
                let running = job.running.as_ref().filter(|running| running.prefilling())?;
                let overdue = if running.passed < PATIENCE {
                    0
                } else {
                    running.passed
                };
                Some((Reverse(overdue), running.target - running.done, job.arrival, id))
            })
            .collect();
        order.sort_unstable();
        let mut left = Left {
            tokens: self.config.prefill_chunk,
            work: self.config.step_budget,
        };
        for (.., id) in order {
            let planned = self.plan_prefill(id, &mut left, plan);
            if let Some(running) = self.jobs.get_mut(&id).and_then(|job| job.running.as_mut()) {
                running.passed = if planned > 0 { 0 } else { running.passed + 1 };
            }
        }
    }

    /// Plans the next piece of one prompt if the step has room for it; gives how many tokens.
    ///
    /// A prompt is cut where it would be cut alone, and a piece waits for a step that has room for all of it: how many
    /// tokens are computed together decides how a device rounds, and a prompt's company shall not.
    fn plan_prefill(&mut self, id: SeqId, left: &mut Left, plan: &mut Plan) -> usize {
        let Some(job) = self.jobs.get_mut(&id) else {
            return 0;
        };
        let Some(running) = &mut job.running else { return 0 };
        if left.tokens == 0 {
            return 0;
        }
        // What others have computed since it was admitted, also earlier in this very plan.
        let upcoming = job.tokens.get(running.done..running.target).unwrap_or(&[]);
        let skipped = self.cache.skip_cached(id, upcoming).unwrap_or(0);
        if running.sure == running.done {
            running.sure += skipped;
        }
        running.done += skipped;
        running.recorded += skipped;
        let start = running.done;
        self.totals.cached(job, start);
        let Some(running) = &mut job.running else { return 0 };

        let rest = running.target - start;
        let len = piece(
            start,
            rest,
            self.config.prefill_chunk,
            self.config.step_budget,
            self.config.cache.block_size,
        );
        let work = work(start, len);
        // The first piece always goes: one token at a long context may be more work than the budget allows.
        let over_budget = work > u128::from(left.work) && !plan.prefill.is_empty();
        if len > left.tokens || over_budget {
            return 0;
        }
        let tokens = job.tokens.get(start..start + len).unwrap_or(&[]).to_vec();
        let booked = self.cache.extend(id, len).and_then(|extension| {
            self.cache.record(id, &tokens)?;
            Ok(extension)
        });
        let Ok(Extension { runs }) = booked else {
            self.give_up(id, plan);
            return 0;
        };
        // Its blocks are in the tree now, and may be those that the head of the queue wants.
        self.ask_again = true;
        running.done += len;
        running.recorded += len;
        job.reached = job.reached.max(running.done);
        let last = !running.prefilling();
        job.drawn += usize::from(last);
        plan.prefill.push(Prefill {
            id,
            tokens,
            start,
            runs,
            last,
            first: (!job.reported).then_some(job.cached),
        });
        job.reported = true;
        left.tokens -= len;
        left.work = left.work.saturating_sub(u64::try_from(work).unwrap_or(u64::MAX));
        len
    }
}

/// How many of `rest` tokens from `start` on to compute at once: at most `chunk`, within the budget, at least one. Where
/// the prompt is cut, better at the end of a block (only there can a sequence go on with blocks that others computed),
/// else after a multiple of 16 tokens, as matrix kernels like it.
fn piece(start: usize, rest: usize, chunk: usize, budget: u64, block_size: usize) -> usize {
    let most = rest.min(chunk).min(within_budget(start, budget));
    if most == rest {
        return rest;
    }
    let to_block_end = most.saturating_sub((start + most) % block_size.max(1));
    if to_block_end * 2 >= most {
        to_block_end
    } else if most >= 16 {
        most - most % 16
    } else {
        most
    }
}

/// The largest `len` with `len × (start + len) <= budget`, but at least 1.
fn within_budget(start: usize, budget: u64) -> usize {
    // From len² + start·len - budget = 0.
    let half = start as u128 / 2 + start as u128 % 2;
    let root = (half * half + u128::from(budget)).isqrt();
    let mut len = root.saturating_sub(half);
    let fits = |len: u128| len * (start as u128 + len) <= u128::from(budget);
    if fits(len + 1) {
        len += 1;
    }
    while len > 1 && !fits(len) {
        len -= 1;
    }
    usize::try_from(len).unwrap_or(usize::MAX).max(1)
}

/// What `len` tokens from `start` on cost: each looks back on all before the piece's end.
fn work(start: usize, len: usize) -> u128 {
    len as u128 * (start as u128 + len as u128)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_budget_is_used_up_and_not_exceeded() {
        for start in [0usize, 1, 2, 15, 16, 100, 1023, 32_768, 99_999] {
            for budget in [1u64, 2, 15, 16, 17, 1000, 65_537, 4_000_000, 300_000_001] {
                let len = within_budget(start, budget);
                let cost = |len: usize| (len as u64) * (start as u64 + len as u64);
                assert!(len == 1 || cost(len) <= budget, "{start} {budget} {len}");
                assert!(cost(len + 1) > budget, "{start} {budget} {len}");
            }
        }
        assert_eq!(within_budget(usize::MAX, u64::MAX), 1);
    }

    #[test]
    fn a_prompt_is_cut_at_the_end_of_a_block_or_after_a_multiple_of_16() {
        let cut = |start, rest, chunk, block_size| piece(start, rest, chunk, u64::MAX, block_size);
        assert_eq!(cut(0, 1000, 512, 32), 512);
        assert_eq!(cut(0, 500, 512, 32), 500);
        assert_eq!(cut(5, 1000, 512, 32), 507);
        assert_eq!(cut(0, 1000, 100, 32), 96);
        assert_eq!(cut(0, 1000, 40, 64), 32);
        assert_eq!(cut(60, 1000, 20, 64), 16);
        assert_eq!(cut(0, 1000, 7, 64), 7);
        // 100,000 × 17 is within the budget, and 16 is what is taken of it.
        assert_eq!(piece(100_000, 1000, 512, 1_700_500, 64), 16);
        assert_eq!(piece(100_000, 1000, 512, 10, 64), 1);
    }
}

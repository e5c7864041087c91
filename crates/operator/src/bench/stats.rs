//! Percentiles, and what they are taken of.

use std::time::Duration;

use serde::Serialize;

/// The value below which a share `p` (0 to 1) of rising values lies, interpolated between neighbours (R's type 7,
/// NumPy's default). `None` of nothing.
#[must_use]
pub fn percentile(sorted: &[f64], p: f64) -> Option<f64> {
    let last = sorted.len().checked_sub(1)?;
    let at = p.clamp(0.0, 1.0) * last as f64;
    let below = at.floor() as usize;
    let low = *sorted.get(below)?;
    let high = sorted.get(below + 1).copied().unwrap_or(low);
    // So written, the result never leaves the two neighbours, whatever is rounded.
    Some((low + (high - low) * (at - below as f64)).max(low).min(high))
}

/// The middle value.
#[must_use]
pub fn median(values: &[f64]) -> Option<f64> {
    percentile(&sorted(values), 0.5)
}

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut values = values.to_vec();
    values.sort_unstable_by(f64::total_cmp);
    values
}

/// How values are spread.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Distribution {
    /// How many there are.
    pub count: usize,
    /// Their mean.
    pub mean: f64,
    /// The smallest.
    pub min: f64,
    /// The middle one.
    pub p50: f64,
    /// Nine of ten are below.
    pub p90: f64,
    /// 95 of 100 are below.
    pub p95: f64,
    /// 99 of 100 are below.
    pub p99: f64,
    /// The largest.
    pub max: f64,
}

impl Distribution {
    /// Of values in any order; `None` of nothing.
    #[must_use]
    pub fn of(values: &[f64]) -> Option<Self> {
        let sorted = sorted(values);
        let at = |p| percentile(&sorted, p);
        Some(Self {
            count: sorted.len(),
            mean: sorted.iter().sum::<f64>() / sorted.len() as f64,
            min: *sorted.first()?,
            p50: at(0.5)?,
            p90: at(0.9)?,
            p95: at(0.95)?,
            p99: at(0.99)?,
            max: *sorted.last()?,
        })
    }

    /// Of durations, in milliseconds.
    #[must_use]
    pub fn of_millis(durations: impl IntoIterator<Item = Duration>) -> Option<Self> {
        let values: Vec<f64> = durations.into_iter().map(|d| d.as_secs_f64() * 1e3).collect();
        Self::of(&values)
    }
}

/// A value of every round: the middle one and the extremes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Rounds {
    /// The middle one.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

impl Rounds {
    /// `None` when no round has the value.
    #[must_use]
    pub fn of(values: &[f64]) -> Option<Self> {
        let sorted = sorted(values);
        Some(Self {
            median: percentile(&sorted, 0.5)?,
            min: *sorted.first()?,
            max: *sorted.last()?,
        })
    }
}

/// When one reply's text came, measured from any common moment.
#[derive(Debug, Clone)]
pub struct Arrival {
    /// Moments of its pieces, rising.
    pub pieces: Vec<Duration>,
    /// Tokens in all of them together.
    pub tokens: usize,
}

/// A rate over stretches shorter than this share of all the time in which anything was written says little: one stall
/// or one burst would be the whole of it.
pub const LEAST_SHARE: f64 = 0.1;

/// The rate while a wanted number of replies was being written.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Full {
    /// Tokens per second of all replies together.
    pub rate: f64,
    /// How much of the time in which anything was written it was measured over, above 0 and at most 1.
    pub share: f64,
}

/// Tokens per second of all replies together, over all the time in which exactly `streams` of them were being written:
/// the rate of decoding, without the prompts before it and the thinning out after. A reply is being written from its
/// first piece to its last. `None` when there was no such time.
///
/// A reply's tokens are spread evenly over its pieces, and a piece's evenly over the time since the piece before it of
/// the same reply; of them counts what lies in such time. So replies that come evenly give their rate however short
/// the time is that they have in common. The first piece's belong to the time before it.
#[must_use]
pub fn full_rate(arrivals: &[Arrival], streams: usize) -> Option<Full> {
    let mut changes: Vec<(Duration, isize)> = Vec::new();
    for arrival in arrivals {
        if let (Some(&first), Some(&last)) = (arrival.pieces.first(), arrival.pieces.last())
            && first < last
        {
            changes.extend([(first, 1), (last, -1)]);
        }
    }
    // At the same moment, an end comes first.
    changes.sort_unstable();
    let wanted = isize::try_from(streams).ok().filter(|wanted| *wanted > 0)?;
    let mut full: Vec<(Duration, Duration)> = Vec::new();
    let (mut time, mut busy) = (Duration::ZERO, Duration::ZERO);
    let (mut writing, mut since) = (0, Duration::ZERO);
    for (moment, change) in changes {
        if writing > 0 {
            busy += moment - since;
        }
        if writing == wanted && since < moment {
            time += moment - since;
            full.push((since, moment));
        }
        writing += change;
        since = moment;
    }
    if time.is_zero() {
        return None;
    }
    let tokens: f64 = arrivals.iter().map(|arrival| tokens_within(arrival, &full)).sum();
    Some(Full {
        rate: tokens / time.as_secs_f64(),
        share: time.as_secs_f64() / busy.as_secs_f64(),
    })
}

/// What was written of a reply within the stretches, which rise and do not overlap.
fn tokens_within(arrival: &Arrival, stretches: &[(Duration, Duration)]) -> f64 {
    let Some((&first, later)) = arrival.pieces.split_first() else {
        return 0.0;
    };
    // One token came with the first piece.
    let each = arrival.tokens.saturating_sub(1) as f64 / later.len().max(1) as f64;
    let mut tokens = 0.0;
    let mut before = first;
    // What came at one moment was written together.
    for pieces in later.chunk_by(|a, b| a == b) {
        let Some(&moment) = pieces.first() else { continue };
        let whole = moment.saturating_sub(before);
        if whole.is_zero() {
            continue;
        }
        let from = stretches.partition_point(|(_, end)| *end <= before);
        let inside: Duration = stretches
            .iter()
            .skip(from)
            .take_while(|(start, _)| *start < moment)
            .map(|(start, end)| (*end).min(moment) - (*start).max(before))
            .sum();
        tokens += each * pieces.len() as f64 * inside.as_secs_f64() / whole.as_secs_f64();
        before = moment;
    }
    tokens
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_percentiles() {
        // numpy.percentile([15, 20, 35, 40, 50], [0, 40, 50, 90, 100])
        let values = [15.0, 20.0, 35.0, 40.0, 50.0];
        for (p, expected) in [(0.0, 15.0), (0.4, 29.0), (0.5, 35.0), (0.9, 46.0), (1.0, 50.0)] {
            let found = percentile(&values, p).unwrap();
            assert!((found - expected).abs() < 1e-9, "{p}: {found}");
        }
        assert_eq!(percentile(&[], 0.5), None);
        assert_eq!(Distribution::of(&[]), None);
        assert_eq!(Rounds::of(&[]), None);
    }

    proptest! {
        #[test]
        fn percentiles_are_where_they_belong(
            mut values in proptest::collection::vec(-1e6f64..1e6, 1..200),
            p in 0.0f64..=1.0,
            q in 0.0f64..=1.0,
        ) {
            let all = Distribution::of(&values).unwrap();
            values.sort_unstable_by(f64::total_cmp);
            let found = percentile(&values, p).unwrap();
            // At least a share p of the other values lies at or below the next rank, and at most that below.
            let last = (values.len() - 1) as f64;
            let below = values.iter().filter(|v| **v < found).count() as f64;
            let not_above = values.iter().filter(|v| **v <= found).count() as f64;
            prop_assert!(below <= (p * last).ceil() && not_above >= (p * last).floor() + 1.0);
            let (low, high) = (p.min(q), p.max(q));
            prop_assert!(percentile(&values, low) <= percentile(&values, high));
            let ordered = [all.min, all.p50, all.p90, all.p95, all.p99, all.max];
            prop_assert!(ordered.is_sorted());
            prop_assert_eq!((all.min, all.max), (values[0], values[values.len() - 1]));
            prop_assert!(all.min - 1e-6 <= all.mean && all.mean <= all.max + 1e-6);
        }
    }

    fn arrival(millis: &[u64], tokens: usize) -> Arrival {
        Arrival {
            pieces: millis.iter().map(|m| Duration::from_millis(*m)).collect(),
            tokens,
        }
    }

    #[track_caller]
    fn close(found: Option<Full>, rate: f64, share: f64) {
        let found = found.unwrap();
        assert!((found.rate / rate - 1.0).abs() < 1e-9, "{found:?}, not {rate}");
        assert!((found.share - share).abs() < 1e-9, "{found:?}, not {share}");
    }

    #[test]
    fn the_full_rate_leaves_out_ramps() {
        // One begins 100 ms later than the other, which ends 100 ms earlier. Between, each has a token every 100 ms.
        let one = arrival(&[0, 100, 200, 300, 400], 5);
        let other = arrival(&[100, 200, 300, 400, 500], 5);
        close(full_rate(&[one.clone(), other.clone()], 2), 20.0, 0.6);
        // Alone: 100 ms at either end, a token each.
        close(full_rate(&[one.clone(), other], 1), 10.0, 0.4);
        close(full_rate(std::slice::from_ref(&one), 1), 10.0, 1.0);
        assert_eq!(full_rate(std::slice::from_ref(&one), 2), None);
        assert_eq!(full_rate(std::slice::from_ref(&one), 0), None);
        // Two tokens in each piece but the first.
        close(full_rate(&[arrival(&[0, 100, 200], 5)], 1), 20.0, 1.0);
        assert_eq!(full_rate(&[arrival(&[7], 1)], 1), None);
    }

    #[test]
    fn a_piece_counts_for_its_part_of_a_stretch_alone() {
        // Ten tokens a second each, and 5 ms in common: 1000 to 1005. The pieces at 1000 and 1005 lie in it whole only
        // if one looks at their ends.
        let one = arrival(&[5, 105, 205, 305, 405, 505, 605, 705, 805, 905, 1005], 11);
        let other = arrival(&[1000, 1100, 1200], 3);
        close(full_rate(&[one, other], 2), 20.0, 5.0 / 1195.0);
        // One stretch may lie within one piece: of a token in 1000 ms, 100 ms count.
        let slow = arrival(&[0, 1000], 2);
        let quick = arrival(&[300, 350, 400], 3);
        close(full_rate(&[slow, quick], 2), 1.0 + 20.0, 0.1);
        // Two replies after each other beside one: both stretches count, and the pause between them does not.
        let long = arrival(&[0, 250, 500, 750, 1000], 5);
        let (first, second) = (arrival(&[100, 200, 300], 3), arrival(&[700, 750, 800], 3));
        close(full_rate(&[long, first, second], 2), 4.0 + 4.0 / 0.3, 0.3);
    }

    #[test]
    fn pieces_of_one_moment_were_written_before_it() {
        // Two tokens every 200 ms, each in an event of its own but in one packet.
        let one = arrival(&[0, 200, 200, 400, 400, 600, 600], 7);
        close(full_rate(std::slice::from_ref(&one), 1), 10.0, 1.0);
        // The second half of each pair does not depend on where a stretch begins.
        let other = arrival(&[300, 400, 500, 600], 4);
        close(full_rate(&[one, other], 2), 20.0, 0.5);
    }

    proptest! {
        #[test]
        fn even_replies_give_their_rate_whatever_they_have_in_common(
            // Start, distance of the pieces, their number, and the tokens of one.
            replies in proptest::collection::vec((0u64..800, 1u64..60, 2usize..20, 1usize..5), 1..6),
        ) {
            let arrivals: Vec<Arrival> = replies
                .iter()
                .map(|&(start, gap, count, each)| {
                    let pieces: Vec<u64> = (0..count as u64).map(|piece| start + piece * gap).collect();
                    arrival(&pieces, 1 + (count - 1) * each)
                })
                .collect();
            let spans: Vec<(u64, u64, f64)> = replies
                .iter()
                .map(|&(start, gap, count, each)| (start, start + (count as u64 - 1) * gap, each as f64 / gap as f64))
                .collect();
            // Millisecond by millisecond: who writes, and how fast.
            for streams in 1..=replies.len() {
                let (mut time, mut busy, mut tokens) = (0u64, 0u64, 0.0);
                for now in 0..2_000 {
                    let writing = spans.iter().filter(|(from, to, _)| (*from..*to).contains(&now));
                    let (count, rate) = writing.fold((0, 0.0), |(count, rate), (.., each)| (count + 1, rate + each));
                    busy += u64::from(count > 0);
                    if count == streams {
                        time += 1;
                        tokens += rate;
                    }
                }
                match full_rate(&arrivals, streams) {
                    None => prop_assert_eq!(time, 0),
                    Some(found) => {
                        let rate = tokens / time as f64 * 1e3;
                        prop_assert!((found.rate / rate - 1.0).abs() < 1e-6, "{:?}, not {}", found, rate);
                        prop_assert!((found.share - time as f64 / busy as f64).abs() < 1e-9, "{:?}", found);
                    }
                }
            }
        }
    }
}

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

/// Tokens per second of all replies together, over the time in which exactly `streams` of them were being written:
/// the rate of decoding, without the prompts before it and the thinning out after. `None` when there was no such time.
///
/// A piece counts for the time since the piece before it in the same reply; a reply's tokens are spread evenly over
/// its pieces.
#[must_use]
pub fn full_rate(arrivals: &[Arrival], streams: usize) -> Option<f64> {
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
    let wanted = isize::try_from(streams).ok()?;
    let mut full: Vec<(Duration, Duration)> = Vec::new();
    let mut writing = 0;
    let mut since = None;
    for (moment, change) in changes {
        writing += change;
        if writing == wanted {
            since = Some(moment);
        } else if let Some(since) = since.take()
            && since < moment
        {
            full.push((since, moment));
        }
    }
    let time: Duration = full.iter().map(|(from, to)| *to - *from).sum();
    if time.is_zero() {
        return None;
    }
    let mut tokens = 0.0;
    for arrival in arrivals {
        let steps = arrival.pieces.len().saturating_sub(1);
        if steps == 0 {
            continue;
        }
        // One token came with the first piece, before this stretch began.
        let each = arrival.tokens.saturating_sub(1) as f64 / steps as f64;
        let inside = arrival.pieces.iter().skip(1).filter(|&&piece| {
            let next = full.partition_point(|(from, _)| *from < piece);
            next.checked_sub(1)
                .and_then(|at| full.get(at))
                .is_some_and(|(_, to)| piece <= *to)
        });
        tokens += inside.count() as f64 * each;
    }
    Some(tokens / time.as_secs_f64())
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

    #[test]
    fn the_full_rate_leaves_out_ramps() {
        // One begins 100 ms later than the other, which ends 100 ms earlier. Between, each has a token every 100 ms.
        let one = arrival(&[0, 100, 200, 300, 400], 5);
        let other = arrival(&[100, 200, 300, 400, 500], 5);
        assert_eq!(full_rate(&[one.clone(), other.clone()], 2), Some(20.0));
        // Alone: 100 ms at either end, a token each.
        assert_eq!(full_rate(&[one.clone(), other], 1), Some(10.0));
        assert_eq!(full_rate(std::slice::from_ref(&one), 1), Some(10.0));
        assert_eq!(full_rate(&[one], 2), None);
        // Two tokens in each piece but the first.
        assert_eq!(full_rate(&[arrival(&[0, 100, 200], 5)], 1), Some(20.0));
        assert_eq!(full_rate(&[arrival(&[7], 1)], 1), None);
    }
}

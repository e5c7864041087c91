//! Which finished requests are wanted, and what is to be known of them.

use std::cmp::Ordering;
use std::collections::{HashSet, VecDeque};
use std::ops::RangeInclusive;

use super::Row;

/// One page of finished requests.
#[derive(Clone, Debug)]
pub struct Page {
    /// Of these models; empty: of all.
    pub models: Vec<String>,
    /// Ended within this time, Unix milliseconds.
    pub time: RangeInclusive<u64>,
    /// With these ids.
    pub ids: RangeInclusive<u64>,
    /// In the order of this.
    pub sort: Column,
    /// From the largest to the smallest.
    pub descending: bool,
    /// Rows on a page.
    pub limit: u64,
    /// Which page, from 1.
    pub page: u64,
}

/// The rows of a page.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// The rows, each with whether it has a capture.
    pub rows: Vec<(Row, bool)>,
    /// How many there are on all pages.
    pub total: u64,
}

/// Sums over finished requests.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Totals {
    /// Requests.
    pub requests: u64,
    /// Tokens of prompts.
    pub prompt: u64,
    /// Tokens generated.
    pub completion: u64,
    /// Tokens from caches.
    pub cached: u64,
    /// Tokens of prompts per second, of each request where it is known.
    pub prompt_speeds: Vec<f64>,
    /// Tokens generated per second.
    pub gen_speeds: Vec<f64>,
}

/// What rows can be sorted by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Column {
    /// Order of their ends.
    Id,
    /// Time of their ends.
    Time,
    /// Model.
    Model,
    /// Path.
    Path,
    /// Status.
    Status,
    /// Content type of the reply.
    ContentType,
    /// Tokens from caches.
    Cached,
    /// Tokens of the prompt.
    Prompt,
    /// Tokens generated.
    Generated,
    /// Tokens proposed by a draft model.
    Drafted,
    /// Tokens of the prompt per second.
    PromptSpeed,
    /// Tokens generated per second.
    GenSpeed,
    /// Time from arrival to end.
    Duration,
}

impl Column {
    /// By llama-swap's name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Some(match name {
            "id" => Self::Id,
            "time" => Self::Time,
            "model" => Self::Model,
            "req_path" => Self::Path,
            "resp_status_code" => Self::Status,
            "resp_content_type" => Self::ContentType,
            "cached" => Self::Cached,
            "prompt" => Self::Prompt,
            "generated" => Self::Generated,
            "drafted" => Self::Drafted,
            "prompt_speed" => Self::PromptSpeed,
            "gen_speed" => Self::GenSpeed,
            "duration" => Self::Duration,
            _ => return None,
        })
    }

    fn compare(self, a: &Row, b: &Row) -> Ordering {
        // What is not known goes before everything.
        let speeds = |a: Option<f64>, b: Option<f64>| a.unwrap_or(-1.0).total_cmp(&b.unwrap_or(-1.0));
        match self {
            Self::Id => a.id.cmp(&b.id),
            Self::Time => a.unix_ms.cmp(&b.unix_ms),
            Self::Model => a.model.cmp(&b.model),
            Self::Path => a.path.cmp(&b.path),
            Self::Status => a.status.cmp(&b.status),
            Self::ContentType => a.content_type.cmp(&b.content_type),
            Self::Cached => a.usage.cached.cmp(&b.usage.cached),
            Self::Prompt => a.usage.prompt.cmp(&b.usage.prompt),
            Self::Generated => a.usage.completion.cmp(&b.usage.completion),
            Self::Drafted => a.usage.drafted.cmp(&b.usage.drafted),
            Self::PromptSpeed => speeds(a.prompt_speed(), b.prompt_speed()),
            Self::GenSpeed => speeds(a.gen_speed(), b.gen_speed()),
            Self::Duration => a.duration.cmp(&b.duration),
        }
    }
}

impl Page {
    /// Rows before this page.
    #[must_use]
    pub fn skipped(&self) -> u64 {
        self.page.saturating_sub(1).saturating_mul(self.limit)
    }

    /// The page of these rows.
    #[must_use]
    pub fn of(&self, rows: &VecDeque<Row>, captured: &HashSet<u64>) -> Found {
        let wanted = |r: &&Row| {
            (self.models.is_empty() || self.models.iter().any(|m| **m == *r.model))
                && self.time.contains(&r.unix_ms)
                && self.ids.contains(&r.id)
        };
        let mut rows: Vec<&Row> = rows.iter().filter(wanted).collect();
        rows.sort_by(|a, b| {
            let order = self.sort.compare(a, b).then(a.id.cmp(&b.id));
            if self.descending { order.reverse() } else { order }
        });
        let page = rows
            .iter()
            .skip(usize::try_from(self.skipped()).unwrap_or(usize::MAX))
            .take(usize::try_from(self.limit).unwrap_or(usize::MAX));
        Found {
            rows: page.map(|r| ((*r).clone(), captured.contains(&r.id))).collect(),
            total: rows.len() as u64,
        }
    }
}

impl Totals {
    /// Of these rows, of these models; of all if none is named.
    #[must_use]
    pub fn of<'r>(rows: impl Iterator<Item = &'r Row>, models: &[String]) -> Self {
        let mut totals = Self::default();
        for row in rows.filter(|r| models.is_empty() || models.iter().any(|m| **m == *r.model)) {
            totals.requests += 1;
            totals.prompt += row.usage.prompt.unwrap_or(0);
            totals.completion += row.usage.completion.unwrap_or(0);
            totals.cached += row.usage.cached.unwrap_or(0);
            totals.prompt_speeds.extend(row.prompt_speed());
            totals.gen_speeds.extend(row.gen_speed());
        }
        totals
    }
}

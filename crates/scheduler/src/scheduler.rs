//! Arrivals, tokens and ends; the numbers.

use std::collections::BTreeMap;

use kv_cache::{BlockId, Counters, Divergence, KvCache, SeqId, Token, Usage};

use crate::config::{Config, ConfigError};
use crate::job::Job;
use crate::types::{NewRequest, Refusal};

/// Who runs, who waits, and what the next step does.
#[derive(Debug)]
pub struct Scheduler {
    pub(crate) config: Config,
    pub(crate) cache: KvCache<()>,
    pub(crate) jobs: BTreeMap<SeqId, Job>,
    /// By arrival.
    pub(crate) queue: BTreeMap<u64, SeqId>,
    arrivals: u64,
    /// Something happened since the head of the queue was last told to wait that may have changed the answer. Asking
    /// compares its whole prompt with the tree, which is too much for every step.
    pub(crate) ask_again: bool,
    pub(crate) totals: Totals,
    /// Tokens to show of what was not found.
    pub(crate) explained: Option<usize>,
}

/// What has happened since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Plans with something to issue.
    pub steps: u64,
    /// Prompt tokens planned, after preemptions again.
    pub prefill_tokens: u64,
    /// Decodes planned.
    pub decode_tokens: u64,
    /// Requests admitted, each counted once.
    pub admitted: u64,
    /// Of these, how many found at least a quarter of their prompt cached. Almost every prompt begins like another for
    /// a token or two, which is no hit.
    pub hits: u64,
    /// Tokens of their prompts.
    pub prompt_tokens: u64,
    /// Of these, how many they took from the cache without having computed them before: what a preempted request finds
    /// of its own is none of them. `cached_tokens / prompt_tokens` is the hit rate.
    pub cached_tokens: u64,
    /// Requests that waited too long.
    pub expired: u64,
}

/// Which part of its prompt a request must find cached to count as a hit: one so many-th.
const HIT_SHARE: usize = 4;

impl Totals {
    /// A job goes on from `end`, with what is cached before that.
    pub(crate) fn cached(&mut self, job: &mut Job, end: usize) {
        let enough = |job: &Job| job.cached > 0 && job.cached.saturating_mul(HIT_SHARE) >= job.prompt();
        let before = enough(job);
        let new = job.note_cached(end);
        self.hits += u64::from(!before && enough(job));
        self.cached_tokens += new as u64;
    }
}

impl Scheduler {
    /// A scheduler without requests, with an empty cache.
    ///
    /// # Errors
    /// Sizes with which nothing could run.
    pub fn new(config: Config) -> Result<Self, ConfigError> {
        config.check()?;
        Ok(Self {
            cache: KvCache::new(config.cache.clone()).map_err(ConfigError::Cache)?,
            config,
            jobs: BTreeMap::new(),
            queue: BTreeMap::new(),
            arrivals: 0,
            ask_again: true,
            totals: Totals::default(),
            explained: None,
        })
    }

    /// Puts a request at the end of the queue. How long the queue may get is the caller's business.
    ///
    /// # Errors
    /// It can never run, with the numbers.
    pub fn submit(&mut self, request: NewRequest) -> Result<(), Refusal> {
        let NewRequest {
            id,
            group,
            prompt,
            max_new_tokens,
            now,
        } = request;
        if self.jobs.contains_key(&id) {
            return Err(Refusal::Duplicate);
        }
        if prompt.is_empty() || max_new_tokens == 0 {
            return Err(Refusal::Empty);
        }
        let draws = self.config.draws(prompt.len(), max_new_tokens);
        if draws == 0 {
            return Err(Refusal::TooLong {
                prompt_tokens: prompt.len(),
                context_length: self.config.context_length,
            });
        }
        if let Some(too_large) = self.cache.never_fits(prompt.len(), draws) {
            return Err(Refusal::NeverFits(too_large));
        }
        let arrival = self.arrivals;
        self.arrivals += 1;
        self.ask_again |= self.queue.is_empty();
        self.queue.insert(arrival, id);
        self.jobs.insert(id, Job::new(group, arrival, now, prompt, draws));
        Ok(())
    }

    /// The value of the oldest unread draw of a sequence. Nothing happens if it is gone, or has no such draw.
    pub fn token(&mut self, id: SeqId, token: Token) {
        if let Some(job) = self.jobs.get_mut(&id)
            && job.unread()
        {
            if let Some(running) = &mut job.running {
                running.sure = job.tokens.len();
            }
            job.tokens.push(token);
            self.record_known(id);
        }
    }

    /// Tells the cache the tokens of all positions that were issued and whose tokens are known.
    pub(crate) fn record_known(&mut self, id: SeqId) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let Some(running) = &mut job.running else { return };
        let end = running.done.min(job.tokens.len());
        if let Some(tokens) = job.tokens.get(running.recorded..end)
            && !tokens.is_empty()
        {
            // Blocks that turn out to be there already are given back.
            self.ask_again |= self.cache.record(id, tokens) != Ok(0);
            running.recorded = end;
        }
    }

    /// A sequence ended by itself. Its blocks are free, and stay cached until the room is needed.
    pub fn finish(&mut self, id: SeqId) {
        self.end(id);
    }

    /// Takes a request out, wherever it is: its client went away. False if it is not here. What it had computed stays
    /// cached.
    pub fn cancel(&mut self, id: SeqId) -> bool {
        self.end(id)
    }

    /// Takes requests out whose part of a step failed, when it was issued or when it was read, and with them all that
    /// have relied on what was not written: these would go on from garbage. Gives all that are gone, to be answered.
    /// Nothing that they computed since their last token was read stays cached.
    ///
    /// For failures that belong to these requests alone. Where the device failed, or the copies of a plan, nobody knows what
    /// lies where: see [`Self::fail_running`].
    pub fn fail(&mut self, ids: &[SeqId]) -> Vec<SeqId> {
        let mut gone = Vec::new();
        for &id in ids {
            let Some(job) = self.jobs.get(&id) else { continue };
            let Some(running) = &job.running else {
                self.end(id);
                gone.push(id);
                continue;
            };
            let ended = self.cache.forget(id, running.sure);
            debug_assert!(ended.is_ok(), "{ended:?}");
            for id in ended.unwrap_or_default() {
                self.jobs.remove(&id);
                gone.push(id);
            }
            self.ask_again = true;
        }
        gone
    }

    /// Takes out all that is running, and all that has a draw in flight, and forgets everything cached: the device failed, and
    /// nobody knows what of the last steps was written. Whoever waits goes on waiting. Gives all that are gone, to be
    /// answered.
    pub fn fail_running(&mut self) -> Vec<SeqId> {
        let running: Vec<SeqId> = self
            .jobs
            .iter()
            // A preempted one whose draw is lost could never be admitted again, and nobody behind it.
            .filter(|(_, job)| job.running.is_some() || job.unread())
            .map(|(&id, _)| id)
            .collect();
        let gone = self.fail(&running);
        self.clear_cache();
        gone
    }

    pub(crate) fn end(&mut self, id: SeqId) -> bool {
        self.record_known(id);
        let Some(job) = self.jobs.remove(&id) else {
            return false;
        };
        if job.running.is_some() {
            let freed = self.cache.free(id);
            debug_assert!(freed.is_ok(), "{freed:?}");
        } else {
            self.queue.remove(&job.arrival);
        }
        self.ask_again = true;
        true
    }

    /// The block table of a running sequence: block `i` holds the positions from `i * block_size` on. Empty if it is
    /// not running.
    pub fn table(&self, id: SeqId) -> &[BlockId] {
        self.cache.table(id).unwrap_or(&[])
    }

    /// Tokens of its prompt that a sequence did not compute itself: more than its [first part](crate::Prefill::first)
    /// said, if others have computed some since. What it had computed before it was preempted does not count. 0 if it
    /// is unknown.
    pub fn cached_tokens(&self, id: SeqId) -> usize {
        self.jobs.get(&id).map_or(0, |job| job.cached)
    }

    /// Forgets all cached prefixes that no running sequence uses. Gives how many blocks became free.
    pub fn clear_cache(&mut self) -> usize {
        self.ask_again = true;
        self.cache.clear()
    }

    /// Whether plans say why prompts were not found in the cache, and with how many tokens at most before, after and in
    /// place of what differs. It compares every prompt with the tree once more.
    pub fn explain(&mut self, tokens: Option<usize>) {
        self.explained = tokens;
    }

    /// Where a prompt and the nearest cached one part, with at most `window` tokens of both from there.
    pub fn divergence(&self, prompt: &[Token], window: usize) -> Divergence {
        self.cache.divergence(prompt, window)
    }

    /// Where the blocks are now.
    pub fn usage(&self) -> Usage {
        self.cache.usage()
    }

    /// What has happened in the cache: hits, cached tokens, evictions, preemptions.
    pub fn counters(&self) -> Counters {
        self.cache.counters()
    }

    /// What has been planned.
    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// What it was told at its start.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Sequences that hold blocks.
    pub fn running(&self) -> usize {
        self.jobs.len() - self.queue.len()
    }

    /// Requests in the queue, the preempted among them.
    pub fn waiting(&self) -> usize {
        self.queue.len()
    }

    /// No request is here. Not the same as an empty plan: a sequence may wait for its last draw to be read.
    pub fn is_idle(&self) -> bool {
        self.jobs.is_empty()
    }

    /// Counts everything in the cache again, and compares. Slow; for tests.
    ///
    /// # Errors
    /// What does not hold, in words.
    pub fn audit(&self) -> Result<(), String> {
        self.cache.audit()?;
        for (id, job) in &self.jobs {
            let queued = self.queue.get(&job.arrival) == Some(id);
            let (len, recorded) = (self.cache.len(*id).ok(), self.cache.recorded(*id).ok());
            let agrees = match &job.running {
                None => queued && len.is_none(),
                Some(running) => !queued && len == Some(running.done) && recorded == Some(running.recorded),
            };
            if !agrees {
                return Err(format!("sequence {id}: {job:?}, cache {len:?}, {recorded:?}"));
            }
        }
        Ok(())
    }
}

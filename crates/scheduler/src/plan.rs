//! The next step.
//!
//! The order of the parts matters. Decodes come first: they may preempt, and who is preempted must not be in the plan.
//! Then admissions. Both may copy blocks, and copies are issued before all writes of this plan, so that they must not
//! read or write what it writes. Then prefills, whose blocks were promised at admission: they preempt nobody.
//!
//! Tokens of decoded positions are recorded before all that, or between plans, never after: recording may give a block
//! back, which must not go to someone else in a plan that still writes to it.

use std::time::Duration;

use kv_cache::{Admission, CacheError, CopyBlock, Request, SeqId};

use crate::job::Running;
use crate::scheduler::Scheduler;
use crate::types::{Decode, Plan};

impl Scheduler {
    /// Decides the next step, and books it: positions are handed out, and the prompt tokens in it count as cached from
    /// here on. It must be issued before the next call.
    pub fn plan(&mut self, now: Duration) -> Plan {
        let mut plan = Plan::default();
        let ids: Vec<SeqId> = self.cache.by_seniority().collect();
        for &id in &ids {
            self.record_known(id);
        }
        self.expire(now, &mut plan);
        let mut movable = self.most_moved();
        self.plan_decodes(&ids, &mut movable, &mut plan);
        self.admit(&mut movable, &mut plan);
        self.plan_prefills(&mut plan);
        self.totals.steps += u64::from(!plan.is_empty());
        self.totals.decode_tokens += plan.decode.len() as u64;
        self.totals.prefill_tokens += plan
            .prefill
            .iter()
            .map(|part| part.tokens.len() as u64)
            .sum::<u64>();
        plan
    }

    /// Only those of whose request nothing ever ran: a reply that has begun is not given up for having to wait, and the choices
    /// of one request are one reply.
    fn expire(&mut self, now: Duration, plan: &mut Plan) {
        let Some(max_wait) = self.config.max_wait else {
            return;
        };
        let too_old = |id: &SeqId| {
            self.jobs
                .get(id)
                .is_some_and(|job| !job.begun && now.saturating_sub(job.submitted) > max_wait)
        };
        plan.expired = self.queue.values().copied().filter(too_old).collect();
        for &id in &plan.expired {
            self.end(id);
        }
        self.totals.expired += plan.expired.len() as u64;
    }

    fn plan_decodes(&mut self, by_seniority: &[SeqId], movable: &mut usize, plan: &mut Plan) {
        for &id in by_seniority {
            if !self.jobs.get(&id).is_some_and(|job| job.decodes()) {
                continue;
            }
            let Ok(preempted) = self.cache.make_room(id, 1) else {
                self.give_up(id, plan);
                continue;
            };
            for junior in preempted {
                if let Some(job) = self.jobs.get_mut(&junior.id) {
                    job.running = None;
                    self.queue.insert(job.arrival, junior.id);
                }
                plan.preempted.push(junior.id);
                self.ask_again = true;
            }
            let Some(job) = self.jobs.get_mut(&id) else {
                continue;
            };
            let Some(running) = &mut job.running else {
                continue; // It was the most junior itself.
            };
            if self.config.compact_decodes {
                move_blocks(self.cache.stay_compact(id, *movable), movable, plan);
            }
            let extension = self.cache.extend(id, 1).ok();
            let slot = extension.and_then(|extension| extension.slots().next());
            let Some(slot) = slot else {
                self.give_up(id, plan);
                continue;
            };
            plan.decode.push(Decode {
                id,
                position: running.done,
                slot,
            });
            running.done += 1;
            job.drawn += 1;
        }
    }

    /// Strictly in order of arrival.
    fn admit(&mut self, movable: &mut usize, plan: &mut Plan) {
        while self.ask_again
            && self.running() < self.config.max_running
            && let Some((&arrival, &id)) = self.queue.first_key_value()
        {
            let Some(job) = self.jobs.get_mut(&id) else { return };
            // A preempted one whose last draw is still on the device: its prompt is not known yet.
            if job.unread() {
                return;
            }
            // Before the admission: that may evict what it tells of.
            let miss = self
                .explained
                .filter(|_| !job.started)
                .map(|tokens| self.cache.divergence(&job.tokens, tokens))
                .filter(|found| found.differs() || found.evicted);
            let answer = self.cache.admit(&Request {
                id,
                arrival,
                prompt: &job.tokens,
                max_new_tokens: job.rest(),
            });
            match answer {
                Ok(Admission::Admit(admitted)) => {
                    self.queue.remove(&arrival);
                    plan.misses.extend(miss.map(|miss| (id, miss)));
                    let (first, group) = (!job.begun, job.group);
                    plan.copies.extend(admitted.copies);
                    move_blocks(self.cache.compact(id, *movable), movable, plan);
                    if !std::mem::replace(&mut job.started, true) {
                        self.totals.admitted += 1;
                        self.totals.prompt_tokens += job.prompt() as u64;
                    }
                    self.totals.cached(job, admitted.cached_tokens);
                    job.running = Some(Running {
                        target: job.tokens.len(),
                        done: admitted.cached_tokens,
                        sure: admitted.cached_tokens,
                        recorded: admitted.cached_tokens,
                        passed: 0,
                    });
                    if first {
                        self.begin(group);
                    }
                }
                Ok(Admission::Wait(_)) => self.ask_again = false,
                Ok(Admission::Never(_)) | Err(_) => self.give_up(id, plan),
            }
        }
    }

    /// The first sequence of a request is admitted.
    fn begin(&mut self, group: SeqId) {
        for job in self.jobs.values_mut().filter(|job| job.group == group) {
            job.begun = true;
        }
    }

    /// Most blocks to move in one step so that sequences are one run each: half of the pool. To gather a scattered sequence for a
    /// single step of decoding costs as much as to move it once, so this is only there to bound a step: a machine copies
    /// half of a pool of a sixteenth of its memory in 10 to 20 ms, each byte read and written at 120 (16 GB) to 546 GB/s
    /// (128 GB).
    fn most_moved(&self) -> usize {
        self.config.cache.total_blocks / 2
    }

    /// The cache refuses what it never should. Better one request lost than an engine that waits for it for ever.
    pub(crate) fn give_up(&mut self, id: SeqId, plan: &mut Plan) {
        debug_assert!(false, "the cache refuses sequence {id}");
        self.end(id);
        plan.lost.push(id);
    }
}

/// What was moved leaves less to be moved in the same step.
fn move_blocks(moved: Result<Vec<CopyBlock>, CacheError>, movable: &mut usize, plan: &mut Plan) {
    let moved = moved.unwrap_or_default();
    *movable = movable.saturating_sub(moved.len());
    plan.copies.extend(moved);
}

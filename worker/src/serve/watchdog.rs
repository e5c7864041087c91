//! A step that never ends: no error comes back from it, so somebody has to look from outside.
//!
//! A thread of its own looks, since a worker in trouble may have no thread to spare for timers.

use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use crate::backend::EngineStats;
use crate::http::Service;

/// Looks per time limit, so that a step is found within an eighth more than the limit.
const LOOKS: u32 = 8;
const SHORTEST_LOOK: Duration = Duration::from_millis(10);
const LONGEST_LOOK: Duration = Duration::from_secs(1);

/// Watches until dropped.
#[derive(Debug)]
pub struct Watchdog {
    until_dropped: Option<SyncSender<()>>,
}

impl Watchdog {
    /// Declares the engine of `service` dead when a step takes longer than `limit`: every client is
    /// told, and whoever waits for [`Service::dead`] ends the process. Zero never does.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start(service: &Arc<Service>, limit: Duration) -> std::io::Result<Self> {
        if limit.is_zero() {
            return Ok(Self { until_dropped: None });
        }
        let (until_dropped, dropped) = sync_channel(0);
        let service = Arc::downgrade(service);
        let pause = (limit / LOOKS).clamp(SHORTEST_LOOK, LONGEST_LOOK);
        std::thread::Builder::new()
            .name("watchdog".to_owned())
            .spawn(move || {
                let mut watch = Watch::new(limit, pause);
                let mut looked = Instant::now();
                while dropped.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
                    let Some(service) = service.upgrade() else { return };
                    let now = Instant::now();
                    if let Some(reason) = watch.look(&service.engine_stats(), now - looked) {
                        // First of all: a log that nobody reads may not let this thread go on.
                        service.declare_dead(reason.clone());
                        tracing::error!("{reason}");
                        return;
                    }
                    looked = now;
                }
            })?;
        Ok(Self {
            until_dropped: Some(until_dropped),
        })
    }

    /// Whether there is a thread that looks: not with a limit of zero.
    #[must_use]
    pub fn watches(&self) -> bool {
        self.until_dropped.is_some()
    }
}

/// What the watchdog thinks.
#[derive(Debug)]
struct Watch {
    limit: Duration,
    pause: Duration,
    /// How long it has seen the engine stand still.
    still: Duration,
}

impl Watch {
    fn new(limit: Duration, pause: Duration) -> Self {
        Self {
            limit,
            pause,
            still: Duration::ZERO,
        }
    }

    /// One look, so long after the last one. Gives the reason when the limit is over.
    fn look(&mut self, stats: &EngineStats, since_last: Duration) -> Option<String> {
        // A step may be under way for nobody: the one that was issued before its last request's end was read.
        let idle = !stats.busy && stats.running + stats.waiting == 0;
        if idle || stats.last_step_age < since_last {
            self.still = Duration::ZERO;
            return None;
        }
        // A process that was stopped, or a machine that slept, stood still as a whole: that time does not count.
        self.still += since_last.min(self.pause * 2);
        (self.still >= self.limit).then(|| {
            format!(
                "a step has not ended for {:.1} s (--watchdog-seconds {}), with {} requests running and {} waiting, after {} \
                 steps",
                stats.last_step_age.as_secs_f64(),
                self.limit.as_secs_f64(),
                stats.running,
                stats.waiting,
                stats.steps
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn stats(running: usize, age: Duration) -> EngineStats {
        EngineStats {
            running,
            last_step_age: age,
            ..EngineStats::default()
        }
    }

    /// So many looks, a second apart, at an engine that stands still.
    fn looks(watch: &mut Watch, count: u32) -> Option<String> {
        (1..=count).find_map(|n| watch.look(&stats(1, SECOND * n), SECOND))
    }

    #[test]
    fn a_step_is_too_long_at_its_limit_and_not_before() {
        let mut watch = Watch::new(SECOND * 8, SECOND);
        assert_eq!(looks(&mut watch, 7), None);
        let reason = watch.look(&stats(2, SECOND * 8), SECOND).unwrap();
        assert!(
            reason.contains("for 8.0 s") && reason.contains("2 requests running"),
            "{reason}"
        );
    }

    #[test]
    fn steps_and_idle_engines_begin_anew() {
        let mut watch = Watch::new(SECOND * 8, SECOND);
        assert_eq!(looks(&mut watch, 7), None);
        assert_eq!(
            watch.look(&stats(1, SECOND / 2), SECOND),
            None,
            "a step has ended"
        );
        assert_eq!(looks(&mut watch, 7), None);
        assert_eq!(watch.look(&stats(0, SECOND * 8), SECOND), None, "nothing to do");
        assert_eq!(looks(&mut watch, 7), None);
    }

    /// The step issued before the last request's end was known may hang when nobody waits for it any more; so may the
    /// engine while all requests are still in its queue.
    #[test]
    fn a_step_for_nobody_is_a_step() {
        let still = |busy, waiting| {
            let mut watch = Watch::new(SECOND * 8, SECOND);
            (1..=9).find_map(|n| {
                let stats = EngineStats {
                    busy,
                    waiting,
                    ..stats(0, SECOND * n)
                };
                watch.look(&stats, SECOND)
            })
        };
        assert!(still(true, 0).is_some(), "nothing but a step to read");
        assert!(still(false, 2).unwrap().contains("2 waiting"));
        assert_eq!(still(false, 0), None);
    }

    #[test]
    fn a_process_that_was_stopped_gets_its_time() {
        let mut watch = Watch::new(SECOND * 8, SECOND);
        assert_eq!(watch.look(&stats(1, SECOND * 3600), SECOND * 3600), None);
        assert!(watch.still <= SECOND * 2);
    }
}

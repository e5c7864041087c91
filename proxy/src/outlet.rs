//! A way out that may be stuck: lines go to a thread of their own, and are dropped and counted when it falls behind.
//!
//! Everything else of the proxy runs on one thread; a pipe that nobody reads must not stop it.

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use tokio::sync::oneshot;

/// Lines that may wait to be written.
const QUEUE: usize = 1024;
/// Lines of a busy time: the next ones are not waited for.
const BUSY: usize = 256;
/// Pause after a write: the lines of a busy time share a write, and nobody is woken for each of them.
const PAUSE: Duration = Duration::from_millis(5);
/// Room that is kept for the next lines.
const ROOM: usize = 32 * 1024;

/// What waits to be written: one text, so that a line costs its copy and no memory of its own.
#[derive(Debug, Default)]
struct Waiting {
    text: Vec<u8>,
    lines: usize,
    /// Lines for which there was no room.
    dropped: u64,
    /// Answered when all before them has been written.
    marks: Vec<oneshot::Sender<()>>,
    /// The writer sleeps until it is woken.
    asleep: bool,
    closed: bool,
}

#[derive(Debug, Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    filled: Condvar,
}

impl Queue {
    fn put(&self, change: impl FnOnce(&mut Waiting)) {
        let mut waiting = self.waiting.lock();
        change(&mut waiting);
        let wake = std::mem::take(&mut waiting.asleep);
        drop(waiting);
        if wake {
            self.filled.notify_one();
        }
    }
}

/// The queue to one writer.
#[derive(Debug)]
pub(crate) struct Outlet(Arc<Queue>);

impl Outlet {
    /// An outlet to `to`, on a thread that ends with the outlet.
    pub(crate) fn new(to: impl Write + Send + 'static) -> Self {
        let queue = Arc::new(Queue::default());
        let filled = queue.clone();
        std::thread::spawn(move || copy(to, &filled));
        Self(queue)
    }

    /// Hands one line over; never waits for the writer.
    pub(crate) fn write(&self, line: &[u8]) {
        self.0.put(|waiting| {
            if waiting.lines < QUEUE {
                waiting.text.extend_from_slice(line);
                waiting.lines += 1;
            } else {
                waiting.dropped += 1;
            }
        });
    }

    /// Waits until everything handed over has been written, at most `limit`.
    pub(crate) async fn flush(&self, limit: Duration) {
        let (mark, reached) = oneshot::channel();
        self.0.put(|waiting| waiting.marks.push(mark));
        let _ = tokio::time::timeout(limit, reached).await;
    }
}

impl Drop for Outlet {
    fn drop(&mut self) {
        self.0.put(|waiting| waiting.closed = true);
    }
}

fn copy(mut to: impl Write, queue: &Queue) {
    let mut text = Vec::new();
    loop {
        text.clear();
        text.shrink_to(ROOM);
        let mut waiting = queue.waiting.lock();
        while waiting.lines == 0 && waiting.marks.is_empty() {
            if waiting.closed {
                return;
            }
            waiting.asleep = true;
            queue.filled.wait(&mut waiting);
        }
        std::mem::swap(&mut text, &mut waiting.text);
        let lines = std::mem::take(&mut waiting.lines);
        let missing = std::mem::take(&mut waiting.dropped);
        let marks = std::mem::take(&mut waiting.marks);
        drop(waiting);
        // A closed output is no reason to stop serving.
        let _ = to.write_all(&text);
        if missing > 0 {
            let _ = writeln!(
                to,
                "({missing} log lines dropped: standard output is not read fast enough)"
            );
        }
        if !marks.is_empty() {
            let _ = to.flush();
            marks.into_iter().for_each(|mark| _ = mark.send(()));
        }
        // Not a wait for anything: whatever comes meanwhile is written next.
        if lines < BUSY {
            std::thread::park_timeout(PAUSE);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;

    /// Takes nothing until it is released, then tells what it takes.
    struct Stuck {
        asked: Sender<()>,
        release: Receiver<()>,
        open: bool,
        taken: Sender<Vec<u8>>,
    }

    impl Write for Stuck {
        fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
            let _ = self.asked.send(());
            self.open = self.open || self.release.recv().is_ok();
            self.taken.send(buf.to_vec()).unwrap();
            Ok(buf.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_stuck_output_holds_nobody_up_and_what_is_lost_is_told() {
        let (open, release) = channel();
        let (taken, written) = channel();
        let (asked, stuck) = channel();
        let outlet = Outlet::new(Stuck {
            asked,
            release,
            open: false,
            taken,
        });
        // The writer holds one line, and nothing more is taken; every call comes back all the same.
        outlet.write(b"line\n");
        stuck.recv().unwrap();
        for _ in 0..3 * QUEUE {
            outlet.write(b"line\n");
        }
        assert_eq!(outlet.0.waiting.lock().dropped, 2 * QUEUE as u64);
        open.send(()).unwrap();
        drop(outlet);
        let text: Vec<u8> = written.iter().flatten().collect();
        let text = String::from_utf8(text).unwrap();
        assert_eq!(text.lines().filter(|l| *l == "line").count(), 1 + QUEUE);
        assert!(
            text.contains(&format!("({} log lines dropped", 2 * QUEUE)),
            "{text}"
        );
    }

    #[tokio::test]
    async fn a_flush_returns_when_all_before_it_is_written() {
        let (open, release) = channel();
        let (taken, written) = channel();
        open.send(()).unwrap();
        let outlet = Outlet::new(Stuck {
            asked: channel().0,
            release,
            open: false,
            taken,
        });
        for i in 0..100 {
            outlet.write(format!("{i}\n").as_bytes());
            if i % 7 == 0 {
                outlet.flush(Duration::from_secs(60)).await;
                let text: Vec<u8> = written.try_iter().flatten().collect();
                assert!(text.ends_with(format!("{i}\n").as_bytes()), "{i}");
            }
        }
    }
}

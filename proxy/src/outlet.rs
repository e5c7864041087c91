//! A way out that may be stuck: lines go to a thread of their own, and are dropped and counted when it falls behind.
//!
//! Everything else of the proxy runs on one thread; a pipe that nobody reads must not stop it.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::oneshot;

/// Lines that may wait to be written.
const QUEUE: usize = 1024;
/// Most lines that are written in one go.
const BATCH: usize = 256;
/// Pause after a write: the lines of a busy time share a write, and nobody is woken for each of them.
const PAUSE: Duration = Duration::from_millis(5);
/// Time between two tries to put a mark into a full queue.
const AGAIN: Duration = Duration::from_millis(10);

enum Piece {
    Text(Bytes),
    /// Answered when all before it has been written.
    Mark(oneshot::Sender<()>),
}

/// The queue to one writer.
#[derive(Debug)]
pub(crate) struct Outlet {
    queue: SyncSender<Piece>,
    dropped: Arc<AtomicU64>,
}

impl Outlet {
    /// An outlet to `to`, on a thread that ends with the outlet.
    pub(crate) fn new(to: impl Write + Send + 'static) -> Self {
        let (queue, pieces) = sync_channel(QUEUE);
        let dropped = Arc::new(AtomicU64::new(0));
        let missing = dropped.clone();
        std::thread::spawn(move || copy(to, &pieces, &missing));
        Self { queue, dropped }
    }

    /// Hands one line over; never waits.
    pub(crate) fn write(&self, line: Bytes) {
        if self.queue.try_send(Piece::Text(line)).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Waits until everything handed over has been written, at most `limit`.
    pub(crate) async fn flush(&self, limit: Duration) {
        let written = async {
            loop {
                let (mark, reached) = oneshot::channel();
                if self.queue.try_send(Piece::Mark(mark)).is_ok() {
                    let _ = reached.await;
                    return;
                }
                tokio::time::sleep(AGAIN).await;
            }
        };
        let _ = tokio::time::timeout(limit, written).await;
    }
}

fn copy(mut to: impl Write, pieces: &Receiver<Piece>, dropped: &AtomicU64) {
    let mut text = Vec::new();
    while let Ok(first) = pieces.recv() {
        text.clear();
        let (mut lines, mut marks) = (0, Vec::new());
        for piece in std::iter::once(first).chain(pieces.try_iter()).take(BATCH) {
            match piece {
                Piece::Text(line) => {
                    text.extend_from_slice(&line);
                    lines += 1;
                }
                Piece::Mark(mark) => marks.push(mark),
            }
        }
        // A closed output is no reason to stop serving.
        let _ = to.write_all(&text);
        if !marks.is_empty() {
            let _ = to.flush();
            marks.into_iter().for_each(|mark| _ = mark.send(()));
        }
        let missing = dropped.swap(0, Ordering::Relaxed);
        if missing > 0 {
            let _ = writeln!(
                to,
                "({missing} log lines dropped: standard output is not read fast enough)"
            );
        }
        // Not a wait for anything: whatever comes meanwhile is written next.
        if lines < BATCH {
            std::thread::park_timeout(PAUSE);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Sender, channel};

    use super::*;

    /// Takes nothing until it is released, then tells what it takes.
    struct Stuck {
        release: Receiver<()>,
        open: bool,
        taken: Sender<Vec<u8>>,
    }

    impl Write for Stuck {
        fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
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
        let outlet = Outlet::new(Stuck {
            release,
            open: false,
            taken,
        });
        // Comes back, although nothing is taken.
        for _ in 0..3 * QUEUE {
            outlet.write(Bytes::from_static(b"line\n"));
        }
        let lost = outlet.dropped.load(Ordering::Relaxed);
        assert!(lost >= (2 * QUEUE - BATCH) as u64, "{lost}");
        open.send(()).unwrap();
        drop(outlet);
        let text: Vec<u8> = written.iter().flatten().collect();
        let text = String::from_utf8(text).unwrap();
        let lines = text.lines().filter(|l| *l == "line").count() as u64;
        assert_eq!(lines + lost, 3 * QUEUE as u64);
        assert!(text.contains(&format!("({lost} log lines dropped")), "{text}");
    }
}

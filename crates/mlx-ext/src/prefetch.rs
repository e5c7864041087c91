//! Mapped files read into memory ahead of use, in the background.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;

use crate::mapped::{MappedFile, page_size};

/// Bytes asked for at a time: enough for the disk to be busy, few enough to stop soon.
const SLICE: usize = 32 << 20;

/// A thread of low priority that reads mapped files. Dropping it stops it, without waiting for that: the thread may stand
/// in the page fault of a volume that never answers.
#[derive(Debug)]
pub struct Prefetch {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Prefetch {
    /// Reads the files one after the other; calls `progress` with the number of bytes that are in memory after each slice,
    /// for the last time when all are.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start(
        files: Vec<MappedFile>,
        mut progress: impl FnMut(u64) + Send + 'static,
    ) -> std::io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("prefetch".to_owned())
            .spawn(move || {
                lower_priority();
                let mut done = 0;
                for file in files {
                    for slice in file.slices(SLICE) {
                        if stopped.load(Relaxed) {
                            return;
                        }
                        done += slice.len() as u64;
                        file.fetch(slice);
                        progress(done);
                    }
                }
            })?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }

    /// Waits until everything has been read.
    pub fn finish(mut self) {
        if let Some(thread) = self.thread.take() {
            // It has nothing to tell; a panic of `progress` has been printed.
            let _ = thread.join();
        }
    }
}

impl Drop for Prefetch {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
    }
}

impl MappedFile {
    fn slices(&self, size: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
        let length = self.bytes().len();
        (0..length)
            .step_by(size.max(1))
            .map(move |start| start..(start + size).min(length))
    }

    /// Asks the system to read a range, then waits for each of its pages by touching it.
    fn fetch(&self, range: std::ops::Range<usize>) {
        // Advice only: where it is not taken, touching reads page by page.
        let _ = self.will_need(range.clone());
        let pages = self.bytes().get(range).unwrap_or_default().chunks(page_size());
        for page in pages {
            std::hint::black_box(page.first());
        }
    }
}

/// Lets everybody else go first.
fn lower_priority() {
    #[cfg(target_os = "macos")]
    // SAFETY: takes two numbers and concerns the calling thread only.
    let _ = unsafe { libc::pthread_set_qos_class_self_np(libc::qos_class_t::QOS_CLASS_UTILITY, 0) };
    #[cfg(target_os = "linux")]
    // SAFETY: takes three numbers; on Linux 0 stands for the calling thread.
    let _ = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 10) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::sync::mpsc::channel;

    fn file(length: usize) -> (tempfile::NamedTempFile, MappedFile) {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&vec![7; length]).unwrap();
        let mapped = MappedFile::open(file.path()).unwrap();
        (file, mapped)
    }

    #[test]
    fn slices_cover_a_file_once() {
        let (_file, mapped) = file(100);
        let covered: Vec<usize> = mapped.slices(33).flatten().collect();
        assert_eq!(covered, (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn progress_counts_every_byte_of_every_file() {
        let ((_one, one), (_two, two)) = (file(SLICE + 5), file(70_000));
        let (sender, seen) = channel();
        let prefetch = Prefetch::start(vec![one, two], move |done| sender.send(done).unwrap()).unwrap();
        prefetch.finish();
        let slice = SLICE as u64;
        assert_eq!(
            seen.iter().collect::<Vec<_>>(),
            [slice, slice + 5, slice + 70_005]
        );
    }

    #[test]
    fn dropping_stops_it() {
        let (_file, mapped) = file(SLICE * 2);
        let (sender, seen) = channel();
        let (go, wait) = channel::<()>();
        let prefetch = Prefetch::start(vec![mapped], move |done| {
            sender.send(done).unwrap();
            let _ = wait.recv();
        })
        .unwrap();
        assert_eq!(seen.recv(), Ok(SLICE as u64));
        // On a thread of its own, so that one that waits for ever fails and does not hang.
        let (dropped, is_dropped) = channel();
        std::thread::spawn(move || {
            drop(prefetch);
            dropped.send(()).unwrap();
        });
        is_dropped
            .recv_timeout(std::time::Duration::from_secs(30))
            .expect("it waited for a thread that stands still");
        drop(go);
        assert!(seen.recv().is_err(), "nothing after the stop");
    }
}

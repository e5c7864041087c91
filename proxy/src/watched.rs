//! The registry's files as they lie on the disk: what they hold, whether something moves there, and whether somebody is
//! in the middle of writing one.
//!
//! Half a file is often a valid registry with fewer models in it, so that its text does not tell. What tells is how it
//! came to be: a file that was moved into place, or a link that leads elsewhere, is whole at once; one that is written
//! in place is whole when its writer closes it. Linux says when that is. macOS does not: there, and where no events
//! come at all, it is whole when it has not been written to for a while.

use std::collections::HashMap;
use std::ffi::OsString;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use notify::event::{AccessKind, AccessMode, ModifyKind};
use notify::{Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use parking_lot::Mutex;
use registry::{Diagnostic, Source};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};

use crate::cli::Paths;

/// Time without a further event after which the files are read.
const SETTLE: Duration = Duration::from_millis(100);
/// Longest time that events may go on before the files are read all the same.
const SETTLE_LIMIT: Duration = Duration::from_secs(1);
/// As [`SETTLE`], while a file has been written to in place and not been closed, as far as one can know.
const WRITING: Duration = Duration::from_secs(1);
/// As [`SETTLE_LIMIT`] for these.
const WRITING_LIMIT: Duration = Duration::from_secs(10);
/// Time between two looks at the files.
pub(crate) const LOOK: Duration = Duration::from_secs(2);

/// What the files hold.
#[derive(Debug)]
pub struct Contents {
    /// Every file.
    pub sources: Vec<Source>,
    /// Hash of their names and texts.
    pub fingerprint: u64,
}

impl Contents {
    /// Reads the files.
    ///
    /// # Errors
    /// Every file that cannot be read.
    pub fn read(paths: &Paths) -> Result<Self, Vec<Diagnostic>> {
        let sources = registry::read_sources(paths.config.as_deref(), paths.config_dir.as_deref())?;
        let mut hasher = DefaultHasher::new();
        for source in &sources {
            source.path.hash(&mut hasher);
            source.text.hash(&mut hasher);
        }
        Ok(Self {
            sources,
            fingerprint: hasher.finish(),
        })
    }

    /// Files without a single byte: whoever writes one that was not so before has only just begun.
    pub(crate) fn empty_files(&self) -> impl Iterator<Item = &Path> {
        let empty = self.sources.iter().filter(|s| s.text.is_empty());
        empty.map(|s| s.path.as_path())
    }
}

/// Follows the files.
pub(crate) struct Watched {
    paths: Paths,
    /// Files that are being written, by their real paths.
    writing: Arc<Mutex<Writing>>,
    nudges: Nudges,
    /// What the files looked like when they had last come to rest.
    rested: Looks,
    /// Sends events as long as it is held.
    _watcher: Option<RecommendedWatcher>,
}

impl Watched {
    pub(crate) fn new(paths: &Paths) -> Self {
        let nudges = Nudges::new();
        let writing = Arc::new(Mutex::new(Writing::of(paths)));
        let (nudge, noted) = (nudges.sender.clone(), writing.clone());
        let watcher = notify::recommended_watcher(move |event: notify::Result<Event>| {
            if let Ok(event) = &event {
                // Reading, this program's own included, changes nothing.
                let closed = AccessKind::Close(AccessMode::Write);
                if matches!(event.kind, EventKind::Access(a) if a != closed) {
                    return;
                }
                if !noted.lock().note(event) {
                    return;
                }
            }
            // Full is as good as sent: the files are read after the last event.
            let _ = nudge.try_send(());
        });
        let mut watcher = watcher
            .map_err(|error| tracing::warn!(%error, "no file events; looking every 2 s"))
            .ok();
        for dir in directories(paths) {
            if let Some(Err(error)) = watcher
                .as_mut()
                .map(|w| w.watch(&dir, RecursiveMode::NonRecursive))
            {
                tracing::warn!(dir = %dir.display(), %error, "no file events; looking every 2 s");
            }
        }
        Self {
            rested: looks(paths),
            paths: paths.clone(),
            writing,
            nudges,
            _watcher: watcher,
        }
    }

    /// Waits until something may have changed and has come to rest again, at most the time between two looks. Whether
    /// there was anything.
    pub(crate) async fn changed(&mut self) -> bool {
        let told = timeout_at(Instant::now() + LOOK, self.nudges.next())
            .await
            .is_ok();
        if !told && looks(&self.paths) == self.rested {
            return false;
        }
        self.rest(told).await;
        true
    }

    /// Waits until the files are at rest. `told`: by an event that something had changed.
    pub(crate) async fn rest(&mut self, told: bool) {
        let begun = Instant::now();
        let mut seen = looks(&self.paths);
        loop {
            let (quiet, limit) = if self.is_writing(&seen, told) {
                (WRITING, WRITING_LIMIT)
            } else {
                (SETTLE, SETTLE_LIMIT)
            };
            let end = (Instant::now() + quiet).min(begun + limit);
            let moved = timeout_at(end, self.nudges.next()).await.is_ok();
            let now = looks(&self.paths);
            if (!moved && now == seen) || Instant::now() >= begun + limit {
                break;
            }
            seen = now;
        }
        // A link may lead to a file of another name now.
        *self.writing.lock() = Writing::of(&self.paths);
        self.rested = seen;
    }

    fn is_writing(&self, seen: &[(PathBuf, Option<Look>)], told: bool) -> bool {
        let writing = self.writing.lock();
        seen.iter().any(|(path, look)| {
            let Some(look) = look else { return false };
            let before = self.rested.iter().find(|(p, _)| p == path);
            let before = before.and_then(|(_, look)| *look);
            let same_file = before.is_some_and(|b| b.inode == look.inode);
            match path
                .canonicalize()
                .ok()
                .and_then(|real| writing.files.get(&real).copied())
            {
                Some(written) => written.unfinished(same_file),
                None => !told && same_file && before != Some(*look),
            }
        })
    }
}

/// The directories whose entries decide what the files are.
fn directories(paths: &Paths) -> Vec<PathBuf> {
    let parent = |p: &PathBuf| {
        let absolute = std::path::absolute(p).unwrap_or_else(|_| p.clone());
        absolute.parent().map(PathBuf::from)
    };
    let mut dirs: Vec<PathBuf> = paths.config.iter().filter_map(parent).collect();
    dirs.extend(paths.config_dir.clone());
    // A link's target may be edited in place.
    let real = paths.config.iter().filter_map(|p| p.canonicalize().ok());
    dirs.extend(real.filter_map(|p| p.parent().map(PathBuf::from)));
    dirs.sort();
    dirs.dedup();
    dirs
}

/// What has happened to a file since the files were last at rest.
#[derive(Clone, Copy, Debug, Default)]
struct Written {
    /// It was made or written to, and not closed since.
    bytes: bool,
    /// It was moved to its place. (macOS tells what happened, but not in which order.)
    moved: bool,
}

impl Written {
    /// Whether more may come. `same_file`: it is the file that was here before, and not one that took its place.
    fn unfinished(self, same_file: bool) -> bool {
        self.bytes && (same_file || !self.moved)
    }
}

/// The events of files that are being written.
#[derive(Debug)]
struct Writing {
    /// Events come in the order of what they tell of, and closing is one of them.
    ordered: bool,
    /// Names of files that matter, beside those that end like YAML.
    names: Vec<OsString>,
    files: HashMap<PathBuf, Written>,
}

impl Writing {
    fn of(paths: &Paths) -> Self {
        let written = paths.config.iter().cloned();
        let real = paths.config.iter().filter_map(|p| p.canonicalize().ok());
        Self {
            ordered: cfg!(target_os = "linux"),
            names: written
                .chain(real)
                .filter_map(|p| p.file_name().map(OsString::from))
                .collect(),
            files: HashMap::new(),
        }
    }

    /// Takes note of an event; whether something may have changed by it. What is made or written under a name that
    /// does not matter changes nothing (a log beside the files may be written to all the time), while what is moved or
    /// removed there may be a link that leads to them.
    fn note(&mut self, event: &Event) -> bool {
        let mut matters = !matches!(
            event.kind,
            EventKind::Create(_)
                | EventKind::Modify(ModifyKind::Data(_) | ModifyKind::Metadata(_) | ModifyKind::Any)
                | EventKind::Access(_)
        );
        for path in &event.paths {
            let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
                continue;
            };
            let yaml = path.extension().is_some_and(|e| e == "yml" || e == "yaml");
            if !yaml && !self.names.iter().any(|n| n == name) {
                continue;
            }
            matters = true;
            // The name of a link stays: what happens to it does not happen to the file that it leads to.
            let real = dir.canonicalize().unwrap_or_else(|_| dir.to_owned()).join(name);
            match event.kind {
                EventKind::Create(_) | EventKind::Modify(ModifyKind::Data(_) | ModifyKind::Any) => {
                    self.files.entry(real).or_default().bytes = true;
                }
                // In order, whatever came before was another file's.
                EventKind::Modify(ModifyKind::Name(_)) if !self.ordered => {
                    self.files.entry(real).or_default().moved = true;
                }
                EventKind::Access(_) | EventKind::Remove(_) | EventKind::Modify(ModifyKind::Name(_)) => {
                    self.files.remove(&real);
                }
                _ => {}
            }
        }
        matters
    }
}

/// Events of the file system, as far as they may matter.
#[derive(Debug)]
struct Nudges {
    /// Held here too: without a watcher a closed channel would be an event without end.
    sender: mpsc::Sender<()>,
    receiver: mpsc::Receiver<()>,
}

impl Nudges {
    fn new() -> Self {
        let (sender, receiver) = mpsc::channel(1);
        Self { sender, receiver }
    }

    async fn next(&mut self) {
        let _ = self.receiver.recv().await;
    }
}

/// What all files look like from outside.
type Looks = Vec<(PathBuf, Option<Look>)>;

/// Cheap to compare.
fn looks(paths: &Paths) -> Looks {
    let files = registry::config_files(paths.config.as_deref(), paths.config_dir.as_deref());
    let files = files.unwrap_or_else(|_| paths.config.iter().cloned().collect());
    let looked = files.into_iter().map(|p| {
        let look = Look::at(&p);
        (p, look)
    });
    looked.collect()
}

/// A file from outside, links followed. Size and time alone would miss Nix's files, whose time is always the same: a
/// link (or the link of a parent directory) that leads elsewhere leads to another inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Look {
    inode: (u64, u64),
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Look {
    /// `None` if there is no such file.
    fn at(path: &Path) -> Option<Self> {
        let m = std::fs::metadata(path).ok()?;
        Some(Self {
            inode: (m.dev(), m.ino()),
            size: m.len(),
            modified: (m.mtime(), m.mtime_nsec()),
            changed: (m.ctime(), m.ctime_nsec()),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::task::{Context, Poll, Waker};
    use std::time::SystemTime;

    use super::*;

    fn poll(nudges: &mut Nudges) -> Poll<()> {
        let mut next = std::pin::pin!(nudges.next());
        next.as_mut().poll(&mut Context::from_waker(Waker::noop()))
    }

    /// As when the system grants no watcher: its closure is dropped unused.
    #[test]
    fn without_a_watcher_there_are_no_events() {
        let mut nudges = Nudges::new();
        drop(nudges.sender.clone());
        assert_eq!(poll(&mut nudges), Poll::Pending);
        nudges.sender.try_send(()).unwrap();
        assert_eq!(poll(&mut nudges), Poll::Ready(()));
        assert_eq!(poll(&mut nudges), Poll::Pending);
    }

    /// What is known of `config.yaml` after these events.
    fn written(ordered: bool, kinds: &[EventKind]) -> Option<Written> {
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().canonicalize().unwrap().join("config.yaml");
        let mut writing = Writing {
            ordered,
            names: Vec::new(),
            files: HashMap::new(),
        };
        for kind in kinds {
            assert!(writing.note(&Event::new(*kind).add_path(dir.path().join("config.yaml"))));
            let other = writing.note(&Event::new(*kind).add_path(dir.path().join("other.log")));
            let moved = matches!(
                kind,
                EventKind::Modify(ModifyKind::Name(_)) | EventKind::Remove(_)
            );
            assert_eq!(
                other, moved,
                "only a link that leads to the files may be among others: {kind:?}"
            );
        }
        assert!(writing.files.len() <= 1, "other files do not matter");
        writing.files.get(&real).copied()
    }

    #[test]
    fn events_tell_what_is_being_written() {
        use notify::event::{CreateKind, DataChange, RenameMode};
        let made = EventKind::Create(CreateKind::File);
        let data = EventKind::Modify(ModifyKind::Data(DataChange::Any));
        let moved = EventKind::Modify(ModifyKind::Name(RenameMode::Any));
        let closed = EventKind::Access(AccessKind::Close(AccessMode::Write));
        let unfinished = |ordered, kinds: &[EventKind], same_file| {
            written(ordered, kinds).is_some_and(|w| w.unfinished(same_file))
        };
        for ordered in [true, false] {
            assert!(unfinished(ordered, &[data], true));
            assert!(unfinished(ordered, &[made, data], false));
            assert!(!unfinished(ordered, &[data, closed], true));
            assert!(
                !unfinished(ordered, &[moved], false),
                "another file took its place"
            );
        }
        // Linux: first moved, then written to. macOS tells the same of a file that was written and then moved.
        assert!(unfinished(true, &[moved, data], false));
        assert!(!unfinished(false, &[made, moved, data], false));
        // And it may mention again how the file that is written to now once came to its place.
        assert!(unfinished(false, &[made, moved, data], true));
    }

    /// With the system's own events: what is moved into place counts at once, what is being written does not.
    #[tokio::test]
    async fn a_file_in_its_place_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("config.yaml"), "a").unwrap();
        let paths = Paths {
            config: Some(at("config.yaml")),
            config_dir: None,
        };
        let mut watched = Watched::new(&paths);
        watched.rest(true).await;
        std::fs::write(at("new"), "b").unwrap();
        let begun = Instant::now();
        std::fs::rename(at("new"), at("config.yaml")).unwrap();
        assert!(watched.changed().await);
        assert!(begun.elapsed() < WRITING, "replaced: {:?}", begun.elapsed());
        std::fs::write(at("store"), "c").unwrap();
        std::os::unix::fs::symlink(at("store"), at("link")).unwrap();
        let begun = Instant::now();
        std::fs::rename(at("link"), at("config.yaml")).unwrap();
        assert!(watched.changed().await);
        assert!(begun.elapsed() < WRITING, "linked: {:?}", begun.elapsed());
        // Only Linux tells of closing.
        if cfg!(target_os = "linux") {
            let mut file = std::fs::File::create(at("store")).unwrap();
            std::io::Write::write_all(&mut file, b"d").unwrap();
            let mut changed = std::pin::pin!(watched.changed());
            let waited = tokio::time::timeout(4 * SETTLE, &mut changed).await;
            assert!(waited.is_err(), "it is still being written");
            drop(file);
            assert!(
                tokio::time::timeout(WRITING, changed).await.unwrap_or(false),
                "it is closed"
            );
        }
    }

    /// Nix's store: equal sizes, one time for all files, and the link of a directory that moves.
    #[test]
    fn a_link_that_leads_elsewhere_looks_different() {
        let dir = tempfile::tempdir().unwrap();
        let current = dir.path().join("current");
        let mut looks = Vec::new();
        for store in ["store1", "store2"] {
            let target = dir.path().join(store);
            std::fs::create_dir(&target).unwrap();
            let file = target.join("config.yaml");
            std::fs::write(&file, store).unwrap();
            let time = SystemTime::UNIX_EPOCH + Duration::from_secs(1);
            std::fs::File::open(&file).unwrap().set_modified(time).unwrap();
            let link = dir.path().join("link");
            std::os::unix::fs::symlink(&target, &link).unwrap();
            std::fs::rename(&link, &current).unwrap();
            let look = Look::at(&current.join("config.yaml")).unwrap();
            assert_eq!(look, Look::at(&current.join("config.yaml")).unwrap());
            assert_eq!((look.size, look.modified), (6, (1, 0)));
            looks.push(look);
        }
        assert_ne!(looks[0], looks[1]);
    }
}

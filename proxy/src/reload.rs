//! Hot reload as a difference: only models whose definition changed are touched.
//!
//! A change is noticed by the file system's own events on the directories that the registry is in, and by a look at
//! the files every two seconds for what sends no events (network volumes, replaced parent directories, Nix's links).
//! What counts is the content: it is read when nothing has moved for a moment, so that a burst of edits is one reload
//! and a half-written file is none, and it is always read again afterwards, so that the last edit wins.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use notify::event::{AccessKind, AccessMode};
use notify::{Event, EventKind, RecursiveMode, Watcher};
use registry::{Code, Diagnostic, Options, Registry, RegistryDiff, Severity};
use tokio::sync::{Mutex, mpsc, watch};
use tokio::time::{Instant, timeout_at};

use crate::activity::Activity;
use crate::catalog::Catalog;
use crate::cli::{self, Paths};
use crate::house::House;
use crate::logline::Level;
use crate::performance::{self, Performance};
use crate::tls::Shown;

/// Time without a further event after which the files are read.
const SETTLE: Duration = Duration::from_millis(100);
/// Longest time that events may go on before the files are read all the same.
const SETTLE_LIMIT: Duration = Duration::from_secs(1);
/// Time between two looks at the files.
const LOOK: Duration = Duration::from_secs(2);

/// How the last attempt went.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Attempts so far, the start not counted.
    pub attempts: u64,
    /// What is wrong with the file as it is now; empty when the registry in force is the file's.
    pub errors: Vec<String>,
}

/// Puts a changed registry in force.
#[derive(Debug)]
pub struct Reloader {
    paths: Paths,
    house: Arc<House>,
    activity: Arc<Activity>,
    performance: Arc<Performance>,
    certificate: Option<Arc<Shown>>,
    level: Level,
    outcome: watch::Sender<Outcome>,
    /// Held during a reload: one at a time, in order.
    turn: Mutex<()>,
}

impl Reloader {
    /// A reloader of this registry's files.
    #[must_use]
    pub fn new(
        paths: Paths,
        house: Arc<House>,
        activity: Arc<Activity>,
        performance: Arc<Performance>,
        certificate: Option<Arc<Shown>>,
        level: Level,
    ) -> Arc<Self> {
        Arc::new(Self {
            paths,
            house,
            activity,
            performance,
            certificate,
            level,
            outcome: watch::Sender::new(Outcome::default()),
            turn: Mutex::new(()),
        })
    }

    /// How the last attempt went.
    #[must_use]
    pub fn outcome(&self) -> Outcome {
        self.outcome.borrow().clone()
    }

    /// Changes of it.
    #[must_use]
    pub fn outcomes(&self) -> watch::Receiver<Outcome> {
        self.outcome.subscribe()
    }

    /// Reads the files and puts what they say in force; a renewed certificate too. A bad file leaves everything as it is.
    ///
    /// # Errors
    /// Everything that is wrong with the files.
    pub async fn reload(&self) -> Result<RegistryDiff, Vec<Diagnostic>> {
        let _turn = self.turn.lock().await;
        if let Some(Err(why)) = self.certificate.as_ref().map(|c| c.read_again()) {
            tracing::error!("certificate not taken up: {why}");
        }
        let old = self.house.catalog();
        let options = Options {
            keep_ports: old.registry.ports(),
            ..Options::default()
        };
        let result = cli::load(&self.paths, &options).and_then(|(registry, warnings)| {
            let taken = self.activity.configure(&registry.globals);
            taken.map_err(|why| vec![self.not_kept(why)])?;
            Ok((registry, warnings))
        });
        let (registry, warnings) = match result {
            Ok(read) => read,
            Err(errors) => {
                let lines: Vec<String> = errors.iter().map(ToString::to_string).collect();
                for line in &lines {
                    tracing::error!("registry not taken up: {line}");
                }
                self.outcome
                    .send_modify(|o| (o.attempts, o.errors) = (o.attempts + 1, lines));
                return Err(errors);
            }
        };
        self.outcome
            .send_modify(|o| (o.attempts, o.errors) = (o.attempts + 1, Vec::new()));
        for warning in warnings {
            tracing::warn!("{warning}");
        }
        let diff = Registry::diff(&old.registry, &registry);
        tracing::info!(
            added = ?diff.added, removed = ?diff.removed, restarted = ?diff.changed, retuned = ?diff.retuned,
            unchanged = diff.unchanged.len(), "registry taken up"
        );
        // After what was said of this reload: at its old level.
        self.level.set(registry.globals.log_level);
        self.performance.set_every(performance::every(&registry.globals));
        let changed = diff.changed.iter().map(|id| id.as_str().into()).collect();
        let catalog = Catalog::following(registry, Some(&old));
        self.house.reload(Arc::new(catalog), changed);
        Ok(diff)
    }

    /// The finding that what is to be kept cannot be.
    fn not_kept(&self, message: String) -> Diagnostic {
        let file = self.paths.config.as_ref().or(self.paths.config_dir.as_ref());
        Diagnostic {
            severity: Severity::Error,
            code: Code::Io,
            file: file.map(|f| f.display().to_string()).unwrap_or_default().into(),
            line: 0,
            column: 0,
            key: String::new(),
            message,
        }
    }

    /// Follows the files for ever.
    pub async fn watch(self: Arc<Self>) {
        let mut nudges = Nudges::new();
        let nudge = nudges.sender.clone();
        let watcher = notify::recommended_watcher(move |event: notify::Result<Event>| {
            // Reading, this program's own included, changes nothing.
            let read =
                |kind| matches!(kind, EventKind::Access(a) if a != AccessKind::Close(AccessMode::Write));
            if event.is_ok_and(|e| read(e.kind)) {
                return;
            }
            // Full is as good as sent: the files are read after the last event.
            let _ = nudge.try_send(());
        });
        let mut watcher = watcher
            .map_err(|error| tracing::warn!(%error, "no file events; looking every 2 s"))
            .ok();
        for dir in self.directories() {
            if let Some(Err(error)) = watcher
                .as_mut()
                .map(|w| w.watch(&dir, RecursiveMode::NonRecursive))
            {
                tracing::warn!(dir = %dir.display(), %error, "no file events; looking every 2 s");
            }
        }
        let mut taken = self.content();
        let mut looks = self.looks();
        loop {
            let event = timeout_at(Instant::now() + LOOK, nudges.next()).await;
            if event.is_err() {
                let now = self.looks();
                if now == looks {
                    continue;
                }
                looks = now;
            }
            let limit = Instant::now() + SETTLE_LIMIT;
            while timeout_at((Instant::now() + SETTLE).min(limit), nudges.next())
                .await
                .is_ok()
            {
                if Instant::now() >= limit {
                    break;
                }
            }
            // A file that is missing for a moment is no change; it will be back.
            let Some(content) = self.content() else { continue };
            if taken != Some(content) {
                taken = Some(content);
                let _ = self.reload().await;
            }
        }
    }

    /// The directories whose entries decide what the files are.
    fn directories(&self) -> Vec<PathBuf> {
        let parent = |p: &PathBuf| {
            let absolute = std::path::absolute(p).unwrap_or_else(|_| p.clone());
            absolute.parent().map(PathBuf::from)
        };
        let mut dirs: Vec<PathBuf> = self.paths.config.iter().filter_map(parent).collect();
        dirs.extend(self.paths.config_dir.clone());
        // A link's target may be edited in place.
        let real = self.paths.config.iter().filter_map(|p| p.canonicalize().ok());
        dirs.extend(real.filter_map(|p| p.parent().map(PathBuf::from)));
        dirs.sort();
        dirs.dedup();
        dirs
    }

    fn files(&self) -> Option<Vec<PathBuf>> {
        let mut files: Vec<PathBuf> = self.paths.config.iter().cloned().collect();
        if let Some(dir) = &self.paths.config_dir {
            let entries = std::fs::read_dir(dir).ok()?.flatten().map(|e| e.path());
            let yaml = |p: &PathBuf| p.extension().is_some_and(|e| e == "yml" || e == "yaml");
            let mut found: Vec<PathBuf> = entries.filter(yaml).collect();
            found.sort();
            files.extend(found);
        }
        Some(files)
    }

    /// Hash of all files' names and contents; `None` if one cannot be read now.
    fn content(&self) -> Option<u64> {
        let mut hasher = DefaultHasher::new();
        for file in self.files()? {
            std::fs::read(&file).ok()?.hash(&mut hasher);
            file.hash(&mut hasher);
        }
        Some(hasher.finish())
    }

    /// What all files look like from outside: cheap to compare.
    fn looks(&self) -> Vec<(PathBuf, Option<Look>)> {
        let files = self.files().unwrap_or_default();
        files
            .into_iter()
            .map(|p| {
                let look = Look::at(&p);
                (p, look)
            })
            .collect()
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

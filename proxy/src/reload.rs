//! Hot reload as a difference: only models whose definition changed are touched.
//!
//! A change is noticed by the file system's own events on the directories that the registry is in, and by a look at
//! the files every two seconds for what sends no events (network volumes, replaced parent directories, Nix's links).
//! What counts is the content: it is read when the files have come to rest (`watched`), so that a burst of edits is one
//! reload and a half-written file is none. It is compared with what was last parsed, by whoever's order, and always
//! read again afterwards, so that the last edit wins.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use registry::{Code, Diagnostic, Globals, Options, Registry, RegistryDiff, Severity};
use tokio::sync::{Mutex, watch};
use tokio::time::Instant;

use crate::activity::Activity;
use crate::catalog::Catalog;
use crate::cli::Paths;
use crate::house::House;
use crate::logline::Level;
use crate::performance::{self, Performance};
use crate::tls::Shown;
use crate::watched::{Contents, LOOK, Watched};

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
    /// What is taken up at the start only, as it was then.
    started: Globals,
    /// The files as last parsed, in force or not. Held during a reload: one at a time, in order.
    parsed: Mutex<Parsed>,
}

/// What the files were when they were last parsed.
#[derive(Debug)]
struct Parsed {
    /// None when they could not be read.
    fingerprint: Option<u64>,
    /// Those without a byte: nobody was in the middle of writing them.
    empty: HashSet<PathBuf>,
}

impl Parsed {
    fn new(contents: &Contents) -> Self {
        Self {
            fingerprint: Some(contents.fingerprint),
            empty: contents.empty_files().map(Path::to_owned).collect(),
        }
    }
}

impl Reloader {
    /// A reloader of this registry's files, which were parsed when they held this.
    #[must_use]
    pub fn new(
        paths: Paths,
        parsed: &Contents,
        house: Arc<House>,
        activity: Arc<Activity>,
        performance: Arc<Performance>,
        certificate: Option<Arc<Shown>>,
        level: Level,
    ) -> Arc<Self> {
        let started = house.catalog().registry.globals.clone();
        Arc::new(Self {
            started,
            paths,
            house,
            activity,
            performance,
            certificate,
            level,
            outcome: watch::Sender::new(Outcome::default()),
            parsed: Mutex::new(Parsed::new(parsed)),
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
        let mut parsed = self.parsed.lock().await;
        match Contents::read(&self.paths) {
            Ok(contents) => {
                *parsed = Parsed::new(&contents);
                self.take(&contents)
            }
            Err(errors) => {
                parsed.fingerprint = None;
                Err(self.refuse(errors))
            }
        }
    }

    /// Puts in force what the files said.
    fn take(&self, contents: &Contents) -> Result<RegistryDiff, Vec<Diagnostic>> {
        if let Some(Err(why)) = self.certificate.as_ref().map(|c| c.read_again()) {
            tracing::error!("certificate not taken up: {why}");
        }
        let old = self.house.catalog();
        let options = Options {
            keep_ports: old.registry.ports(),
            ..Options::default()
        };
        let result = Registry::from_sources(&contents.sources, &options).and_then(|(registry, warnings)| {
            let kept = self.activity.configure(&registry.globals);
            let file = self.paths.config.as_ref().or(self.paths.config_dir.as_ref());
            kept.map_err(|why| vec![about(file.map_or(Path::new(""), PathBuf::as_path), why)])?;
            Ok((registry, warnings))
        });
        let (registry, warnings) = result.map_err(|errors| self.refuse(errors))?;
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
        for key in only_at_start(&self.started, &registry.globals) {
            tracing::warn!("{key} has changed and stays as it was: a restart takes it up");
        }
        // After what was said of this reload: at its old level.
        self.level.set(registry.globals.log_level);
        self.performance.set_every(performance::every(&registry.globals));
        let changed = diff.changed.iter().map(|id| id.as_str().into()).collect();
        let catalog = Arc::new(Catalog::following(registry, Some(&old)));
        self.activity.follow(&catalog);
        self.house.reload(catalog, changed);
        Ok(diff)
    }

    /// Leaves everything as it is, and says why.
    fn refuse(&self, errors: Vec<Diagnostic>) -> Vec<Diagnostic> {
        let lines: Vec<String> = errors.iter().map(ToString::to_string).collect();
        for line in &lines {
            tracing::error!("registry not taken up: {line}");
        }
        self.outcome
            .send_modify(|o| (o.attempts, o.errors) = (o.attempts + 1, lines));
        errors
    }

    /// Follows the files for ever.
    pub async fn watch(self: Arc<Self>) {
        let mut watched = Watched::new(&self.paths);
        // The files may have changed between their first reading and now, without an event.
        watched.rest(true).await;
        let mut changed = true;
        // Since when they cannot be read; whether that has been said.
        let mut unreadable: Option<(Instant, bool)> = None;
        loop {
            // What was not read may have changed before it looked as it does now.
            if changed || unreadable.is_some() {
                unreadable = match self.follow().await {
                    Ok(()) => None,
                    Err(why) => Some(self.grow_tired(unreadable, why).await),
                };
            }
            changed = watched.changed().await;
        }
    }

    /// Puts the files in force if they are not what was last parsed.
    ///
    /// # Errors
    /// They cannot be read, or not sensibly, now.
    async fn follow(&self) -> Result<(), Vec<Diagnostic>> {
        let mut parsed = self.parsed.lock().await;
        // What the files hold is read while nobody else does: it is newer than whatever was parsed.
        let contents = Contents::read(&self.paths)?;
        if parsed.fingerprint == Some(contents.fingerprint) {
            return Ok(());
        }
        if let Some(file) = contents.empty_files().find(|f| !parsed.empty.contains(*f)) {
            let why = "is empty, as if its writer had only just begun; `swapd reload` takes it as it is";
            return Err(vec![about(file, why.to_owned())]);
        }
        *parsed = Parsed::new(&contents);
        let _ = self.take(&contents);
        Ok(())
    }

    /// A file that is missing for a moment is no change: it will be back. One that stays away is reported, once.
    async fn grow_tired(&self, before: Option<(Instant, bool)>, why: Vec<Diagnostic>) -> (Instant, bool) {
        let (since, said) = before.unwrap_or((Instant::now(), false));
        if said || since.elapsed() < LOOK {
            return (since, said);
        }
        // When they are back, they are taken up even if they are as they were: that clears the error.
        self.parsed.lock().await.fingerprint = None;
        self.refuse(why);
        (since, true)
    }
}

/// Keys that are taken up at the start only, and are not what they were then.
fn only_at_start(started: &Globals, now: &Globals) -> Vec<&'static str> {
    let changed = [
        ("logToStdout", started.log_to_stdout != now.log_to_stdout),
        ("logTimeFormat", started.log_time_format != now.log_time_format),
        ("ollama.listen", started.ollama_listen != now.ollama_listen),
    ];
    changed
        .into_iter()
        .filter(|(_, c)| *c)
        .map(|(key, _)| key)
        .collect()
}

/// A finding about a whole file.
fn about(file: &Path, message: String) -> Diagnostic {
    Diagnostic {
        severity: Severity::Error,
        code: Code::Io,
        file: file.display().to_string().into(),
        line: 0,
        column: 0,
        key: String::new(),
        message,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// An edit after the registry was read, and before anybody watched.
    #[tokio::test]
    async fn an_edit_during_the_start_is_taken_up() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.yaml");
        std::fs::write(&file, "models: {old: {worker: {model: org/name}}}").unwrap();
        let paths = Paths {
            config: Some(file.clone()),
            config_dir: None,
        };
        let contents = Contents::read(&paths).unwrap();
        let (registry, _) = Registry::from_sources(&contents.sources, &Options::default()).unwrap();
        std::fs::write(&file, "models: {new: {worker: {model: org/name}}}").unwrap();
        let house = House::new(Arc::new(Catalog::new(registry)), crate::logs::Logs::default());
        let reloader = Reloader::new(
            paths,
            &contents,
            house.clone(),
            Activity::new(10),
            Performance::new(None),
            None,
            Level::fixed(),
        );
        let mut outcomes = reloader.outcomes();
        let watching = tokio::spawn(reloader.watch());
        let taken =
            tokio::time::timeout(Duration::from_secs(5), outcomes.wait_for(|o| o.attempts == 1)).await;
        watching.abort();
        assert!(taken.is_ok(), "the edit became what later ones are compared with");
        assert!(house.catalog().resolve("new").is_some());
    }
}

//! From sources to a registry.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::diagnostic::{Code, Diagnostic, Findings, Pos, Warning};
use crate::keys::ROOT;
use crate::types::{Launch, Registry};
use crate::{check, decode, env, macros, merge, yaml};

/// One file.
#[derive(Debug, Clone)]
pub struct Source {
    /// Its path: findings name it, and relative model paths start in its directory.
    pub path: PathBuf,
    /// Its content.
    pub text: String,
}

/// What a configuration depends on beside its text.
pub struct Options<'a> {
    /// Looks up an environment variable.
    pub env: &'a dyn Fn(&str) -> Option<String>,
    /// Ports that models of the registry in force have: they keep them, so that a reload changes no running command.
    pub keep_ports: BTreeMap<String, u16>,
}

impl Default for Options<'_> {
    fn default() -> Self {
        Self {
            env: &|name| std::env::var(name).ok(),
            keep_ports: BTreeMap::new(),
        }
    }
}

impl Registry {
    /// Reads one YAML (or JSON) text. `origin` is its file: findings name it, and relative model paths start in its
    /// directory.
    ///
    /// # Errors
    /// Everything that is wrong, warnings among it, in the order of the file.
    pub fn from_yaml(text: &str, origin: &Path) -> Result<(Self, Vec<Warning>), Vec<Diagnostic>> {
        let source = Source {
            path: origin.to_owned(),
            text: text.to_owned(),
        };
        Self::from_sources(&[source], &Options::default())
    }

    /// Reads several sources as one configuration: mappings are merged, lists joined, and whatever two sources say
    /// differently is an error. No source at all is a configuration without models.
    ///
    /// # Errors
    /// Everything that is wrong in any of them, warnings among it.
    pub fn from_sources(
        sources: &[Source],
        options: &Options<'_>,
    ) -> Result<(Self, Vec<Warning>), Vec<Diagnostic>> {
        let files = sources
            .iter()
            .map(|s| Arc::from(s.path.display().to_string()))
            .collect();
        let mut findings = Findings::new(files);
        let mut trees = Vec::new();
        for (index, source) in sources.iter().enumerate() {
            let replaced = env::substitute(&source.text, index, options.env, &mut findings);
            let origin = |line, column| replaced.origin(line, column);
            trees.extend(yaml::parse(&replaced.text, index, &mut findings, &origin));
        }
        if trees.len() < sources.len() {
            return Err(findings.finish());
        }
        let mut root = merge::merge(trees, &mut findings);
        let ports = macros::expand(&mut root, &options.keep_ports, &mut findings);
        check::check(&root, &ROOT, &mut findings);
        let bases: Vec<PathBuf> = sources.iter().map(|s| base(&s.path)).collect();
        let registry = decode::decode(&root, &bases, &ports, &mut findings);
        if findings.has_errors() {
            return Err(findings.finish());
        }
        Ok((registry, findings.finish()))
    }

    /// Reads `file`, if given, and then every `*.yml` and `*.yaml` of `dir`, if given, by name.
    ///
    /// # Errors
    /// As [`Registry::from_sources`]; a file that cannot be read is a finding of its own.
    pub fn from_paths(
        file: Option<&Path>,
        dir: Option<&Path>,
        options: &Options<'_>,
    ) -> Result<(Self, Vec<Warning>), Vec<Diagnostic>> {
        Self::from_sources(&read_sources(file, dir)?, options)
    }

    /// The ports behind `${PORT}`, for [`Options::keep_ports`] of the next reading.
    #[must_use]
    pub fn ports(&self) -> BTreeMap<String, u16> {
        let port = |launch: &Launch| match launch {
            Launch::Command(command) => command.port,
            Launch::Worker(_) => None,
        };
        self.models
            .iter()
            .filter_map(|(id, m)| Some((id.clone(), port(&m.launch)?)))
            .collect()
    }
}

/// Reads the files of a configuration, as [`config_files`] names them.
///
/// # Errors
/// Every file that cannot be read.
pub fn read_sources(file: Option<&Path>, dir: Option<&Path>) -> Result<Vec<Source>, Vec<Diagnostic>> {
    let mut sources = Vec::new();
    let mut unread = Vec::new();
    for path in config_files(file, dir).map_err(|found| vec![found])? {
        match std::fs::read_to_string(&path) {
            Ok(text) => sources.push(Source { path, text }),
            Err(e) => unread.push(io_error(&path, &format!("cannot be read: {e}"))),
        }
    }
    if unread.is_empty() {
        Ok(sources)
    } else {
        Err(unread)
    }
}

/// The files of a configuration: `file`, then the `*.yml` and `*.yaml` directly in `dir` by name. What is no file (a
/// directory of that name, a link that leads nowhere) is left out.
///
/// # Errors
/// A directory that cannot be listed, or a `file` that is in it too.
pub fn config_files(file: Option<&Path>, dir: Option<&Path>) -> Result<Vec<PathBuf>, Diagnostic> {
    let mut paths: Vec<PathBuf> = file.map(Path::to_owned).into_iter().collect();
    let Some(dir) = dir else { return Ok(paths) };
    let listing = std::fs::read_dir(dir).map_err(|e| io_error(dir, &format!("cannot be listed: {e}")))?;
    let mut found = Vec::new();
    for entry in listing {
        let path = entry
            .map_err(|e| io_error(dir, &format!("cannot be listed: {e}")))?
            .path();
        let yaml = path.extension().is_some_and(|e| e == "yml" || e == "yaml");
        if yaml && path.is_file() {
            found.push(path);
        }
    }
    found.sort();
    if let Some(file) = file {
        let real = |p: &Path| p.canonicalize().unwrap_or_else(|_| p.to_owned());
        if found.iter().any(|p| real(p) == real(file)) {
            return Err(io_error(
                file,
                "is also in the configuration directory: it would be read twice",
            ));
        }
    }
    paths.extend(found);
    Ok(paths)
}

fn io_error(path: &Path, message: &str) -> Diagnostic {
    let mut findings = Findings::new(vec![Arc::from(path.display().to_string())]);
    findings.error(Code::Io, Pos::default(), "", message);
    let mut all = findings.finish();
    all.remove(0)
}

/// The directory that relative paths of a file start in.
fn base(path: &Path) -> PathBuf {
    let whole = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    whole.parent().map_or_else(|| PathBuf::from("."), Path::to_owned)
}

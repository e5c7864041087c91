//! A model argument to a directory: a path, or a hub id in the local cache. Nothing is ever downloaded.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::volumes::missing_volume;

/// Where hub ids and `~` are looked up.
#[derive(Debug, Clone, Default)]
pub struct HubPlaces {
    /// Directories that hold `models--ORG--NAME`, in order.
    pub caches: Vec<PathBuf>,
    /// What `~` means.
    pub home: Option<PathBuf>,
}

impl HubPlaces {
    /// As `huggingface_hub` does: `HF_HUB_CACHE`, else `HF_HOME/hub`, else `XDG_CACHE_HOME/huggingface/hub`, else
    /// `~/.cache/huggingface/hub`.
    #[must_use]
    pub fn from_environment() -> Self {
        Self::from_variables(|name| std::env::var_os(name))
    }

    fn from_variables(variable: impl Fn(&str) -> Option<OsString>) -> Self {
        let path = |name: &str| variable(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let home = path("HOME");
        let cache = path("HF_HUB_CACHE")
            .or_else(|| path("HF_HOME").map(|p| p.join("hub")))
            .or_else(|| path("XDG_CACHE_HOME").map(|p| p.join("huggingface/hub")))
            .or_else(|| home.as_ref().map(|p| p.join(".cache/huggingface/hub")));
        let caches = cache
            .into_iter()
            .filter_map(|cache| expand(&cache, home.as_deref()))
            .collect();
        Self { caches, home }
    }
}

/// The directory of a model given as a path or as a hub id (`ORG/NAME`, `ORG/NAME@REVISION`).
///
/// # Errors
/// Names every place that was looked at, and what is wrong with what was found.
pub fn resolve_model(model: &str, places: &HubPlaces) -> Result<PathBuf> {
    let path = expand(Path::new(model), places.home.as_deref()).context("~ without HOME")?;
    if path.is_dir() {
        return with_config(path, model);
    }
    let mut looked = vec![path.clone()];
    if let Some((id, revision)) = hub_id(model) {
        for cache in &places.caches {
            let root = cache.join(format!("models--{}", id.replace('/', "--")));
            if !root.is_dir() {
                looked.push(root);
                continue;
            }
            return with_config(snapshot(&root, revision)?, model);
        }
    }
    if path.exists() {
        bail!("model {model}: {} is no directory", path.display());
    }
    if let Some(volume) = looked.iter().find_map(|path| missing_volume(path)) {
        bail!(
            "model {model}: not found: {} does not exist: is the volume mounted?",
            volume.display()
        );
    }
    let looked: Vec<String> = looked.iter().map(|p| p.display().to_string()).collect();
    bail!(
        "model {model}: not found; looked at {}. A model is a directory, or a hub id that has been downloaded \
         (hf download {model})",
        looked.join(", ")
    )
}

/// `ORG/NAME` or `NAME`, with an optional revision; not a path by its looks.
fn hub_id(model: &str) -> Option<(&str, &str)> {
    let (id, revision) = model.split_once('@').unwrap_or((model, "main"));
    let part = |p: &str| {
        !p.is_empty()
            && !p.starts_with('.')
            && p.chars()
                .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
    };
    let mut parts = id.split('/');
    let first = parts.next().is_some_and(part);
    let second = parts.next().is_none_or(part);
    let safe = !revision.is_empty() && !revision.split('/').any(|p| p.is_empty() || p.starts_with('.'));
    (first && second && parts.next().is_none() && safe).then_some((id, revision))
}

/// The snapshot of a revision: a branch or tag named in `refs`, or a commit.
fn snapshot(root: &Path, revision: &str) -> Result<PathBuf> {
    let reference = root.join("refs").join(revision);
    let commit = match std::fs::read_to_string(&reference) {
        Ok(text) => text.trim().to_owned(),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => revision.to_owned(),
        Err(e) => return Err(e).with_context(|| format!("{}", reference.display())),
    };
    let folder = root.join("snapshots").join(&commit);
    if !folder.is_dir() {
        bail!(
            "{}: revision {revision} is not there: neither {} nor {}",
            root.display(),
            reference.display(),
            folder.display()
        );
    }
    Ok(folder)
}

fn with_config(folder: PathBuf, model: &str) -> Result<PathBuf> {
    if !folder.join("config.json").is_file() {
        bail!("model {model}: {} holds no config.json", folder.display());
    }
    Ok(folder)
}

fn expand(path: &Path, home: Option<&Path>) -> Option<PathBuf> {
    match path.strip_prefix("~") {
        Ok(rest) => home.map(|home| home.join(rest)),
        Err(_) => Some(path.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(dir: &Path) -> HubPlaces {
        HubPlaces {
            caches: vec![dir.join("hub")],
            home: Some(dir.join("home")),
        }
    }

    fn model_at(folder: &Path) {
        std::fs::create_dir_all(folder).unwrap();
        std::fs::write(folder.join("config.json"), "{}").unwrap();
    }

    #[test]
    fn paths_and_ids_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let places = places(dir.path());
        let plain = dir.path().join("plain");
        model_at(&plain);
        assert_eq!(resolve_model(plain.to_str().unwrap(), &places).unwrap(), plain);
        let at_home = dir.path().join("home/m");
        model_at(&at_home);
        assert_eq!(resolve_model("~/m", &places).unwrap(), at_home);

        let root = dir.path().join("hub/models--org--name.v1");
        let snapshot = root.join("snapshots/abc");
        model_at(&snapshot);
        std::fs::create_dir_all(root.join("refs")).unwrap();
        std::fs::write(root.join("refs/main"), "abc\n").unwrap();
        assert_eq!(resolve_model("org/name.v1", &places).unwrap(), snapshot);
        assert_eq!(resolve_model("org/name.v1@abc", &places).unwrap(), snapshot);
        let message = resolve_model("org/name.v1@other", &places)
            .unwrap_err()
            .to_string();
        assert!(
            message.contains("revision other") && message.contains("snapshots/other"),
            "{message}"
        );
    }

    #[test]
    fn an_error_lists_the_places() {
        let dir = tempfile::tempdir().unwrap();
        let places = places(dir.path());
        let message = resolve_model("org/none", &places).unwrap_err().to_string();
        assert!(
            message.contains("hub/models--org--none") && message.contains("looked at org/none"),
            "{message}"
        );
        for path in [
            "./org/none",
            "/org/none",
            "../x",
            "a/b/c",
            "org/../x",
            "o/n@../../x",
        ] {
            let message = resolve_model(path, &places).unwrap_err().to_string();
            assert!(!message.contains("models--"), "{message}");
        }
        let gone = HubPlaces {
            caches: vec![PathBuf::from("/mnt/no-such-volume-here/hub")],
            home: None,
        };
        for model in ["org/none", "/mnt/no-such-volume-here/m"] {
            let message = resolve_model(model, &gone).unwrap_err().to_string();
            assert!(
                message.contains("/mnt/no-such-volume-here does not exist: is the volume mounted?"),
                "{message}"
            );
        }
        let empty = dir.path().join("empty");
        std::fs::create_dir(&empty).unwrap();
        assert!(
            resolve_model(empty.to_str().unwrap(), &places)
                .unwrap_err()
                .to_string()
                .contains("config.json")
        );
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert!(
            resolve_model(file.to_str().unwrap(), &places)
                .unwrap_err()
                .to_string()
                .contains("no directory")
        );
    }

    #[test]
    fn the_environment_is_read_as_the_hub_does() {
        let caches = |pairs: &[(&str, &str)]| {
            HubPlaces::from_variables(|name| {
                pairs
                    .iter()
                    .find(|(key, _)| *key == name)
                    .map(|(_, value)| OsString::from(value))
            })
            .caches
        };
        let home = ("HOME", "/h");
        assert_eq!(caches(&[home]), [Path::new("/h/.cache/huggingface/hub")]);
        assert_eq!(
            caches(&[home, ("XDG_CACHE_HOME", "/x")]),
            [Path::new("/x/huggingface/hub")]
        );
        assert_eq!(caches(&[home, ("HF_HOME", "~/hf")]), [Path::new("/h/hf/hub")]);
        assert_eq!(
            caches(&[home, ("HF_HOME", "/hf"), ("HF_HUB_CACHE", "/c")]),
            [Path::new("/c")]
        );
    }
}

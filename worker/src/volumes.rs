//! A file that is not there: why that may be.

use std::io;
use std::path::{Component, Path, PathBuf};

/// Folders in which systems mount volumes, with the number of parts of a volume's name below them.
const MOUNT_FOLDERS: &[(&str, usize)] = &[("/Volumes", 1), ("/mnt", 1), ("/run/media", 2), ("/media", 2)];

/// What the system said about a path, and what more can be said: a link that leads nowhere, a volume that is not there.
pub(crate) fn explain(path: &Path, error: &io::Error) -> String {
    let mut reason = error.to_string();
    if error.kind() != io::ErrorKind::NotFound {
        return reason;
    }
    let mut looked_at = path.to_path_buf();
    if let Ok(target) = std::fs::read_link(path) {
        // A link's target is told from the link's own folder.
        looked_at = path
            .parent()
            .map_or_else(|| target.clone(), |folder| folder.join(&target));
        reason = format!(
            "{reason}: it is a link to {}, which is not there",
            target.display()
        );
    }
    if let Some(volume) = missing_volume(&looked_at) {
        reason = format!(
            "{reason}; {} does not exist: is the volume mounted?",
            volume.display()
        );
    }
    reason
}

/// The volume that a path lies on, when it is not mounted.
pub(crate) fn missing_volume(path: &Path) -> Option<PathBuf> {
    let (folder, parts) = MOUNT_FOLDERS
        .iter()
        .find(|(folder, _)| path.starts_with(folder))?;
    let below = path.strip_prefix(folder).ok()?;
    let name: PathBuf = below
        .components()
        .filter(|part| matches!(part, Component::Normal(_)))
        .take(*parts)
        .collect();
    let volume = Path::new(folder).join(&name);
    (!name.as_os_str().is_empty() && !volume.exists()).then_some(volume)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn not_found(path: &Path) -> String {
        explain(path, &std::fs::metadata(path).unwrap_err())
    }

    #[test]
    fn a_volume_that_is_not_mounted_is_named() {
        let said = not_found(Path::new("/mnt/no-such-volume-here/models/m/config.json"));
        assert!(
            said.contains("/mnt/no-such-volume-here does not exist: is the volume mounted?"),
            "{said}"
        );
        assert_eq!(missing_volume(Path::new("/mnt")), None);
        let said = not_found(Path::new("/no/such/place"));
        assert!(!said.contains("volume"), "{said}");
    }

    #[test]
    fn a_link_that_leads_nowhere_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let link = folder.path().join("model.safetensors");
        std::os::unix::fs::symlink("../blobs/abc", &link).unwrap();
        let said = not_found(&link);
        assert!(
            said.contains("a link to ../blobs/abc, which is not there"),
            "{said}"
        );
        std::fs::remove_file(&link).unwrap();
        std::os::unix::fs::symlink("/mnt/no-such-volume-here/abc", &link).unwrap();
        assert!(not_found(&link).contains("is the volume mounted?"));
    }

    #[test]
    fn other_errors_stay_as_they_are() {
        let error = io::Error::from(io::ErrorKind::PermissionDenied);
        assert_eq!(explain(Path::new("/mnt/x"), &error), error.to_string());
    }
}

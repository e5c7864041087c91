//! Fetches pinned Python wheels: the form in which prebuilt libmlx, OpenBLAS and libclang are published for every
//! platform alike. pip verifies the sha256; nothing is installed into any Python.

use super::{Context, Result, output};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{fs, io};

/// A line of `native/wheels.txt`.
struct Wheel<'a> {
    tag: &'a str,
    requirement: &'a str,
    sha256: &'a str,
}

/// The folder with the unpacked wheel for `what` (`mlx`, `blas` or `clang`), fetched when it is not there yet.
///
/// libclang runs in this build, so it is taken for the host; all else for the target.
pub(crate) fn fetch(context: &Context, what: &str) -> Result<PathBuf> {
    let platform = match what {
        "clang" => format!("{}-{}", std::env::consts::OS, std::env::consts::ARCH),
        "mlx" if context.cuda => format!("{}-{}+cuda", context.os, context.arch),
        _ => format!("{}-{}", context.os, context.arch),
    };
    let list = fs::read_to_string(context.manifest_dir.join("native/wheels.txt"))
        .map_err(|error| format!("cannot read native/wheels.txt: {error}"))?;
    let wheel = find(&list, what, &platform).ok_or_else(|| {
        format!("no published build of '{what}' is known for {platform}; set MLX_ROOT (and LIBCLANG_PATH) to your own")
    })?;

    let home = target_dir(&context.out_dir).join("native-libs");
    let unpacked = home.join(format!("{}-{}", wheel.requirement.replace("==", "-"), platform));
    if unpacked.is_dir() {
        return Ok(unpacked);
    }
    // Unpacked beside its place and renamed, so that a folder of that name is always whole.
    let staging = home.join(format!(".{what}-{}", std::process::id()));
    let _ = fs::remove_dir_all(&staging);
    let at = |error: io::Error| format!("cannot write below {}: {error}", home.display());
    fs::create_dir_all(&staging).map_err(at)?;
    download(&wheel, &staging)?;
    unzip(&staging)?;
    if let Err(error) = fs::rename(staging.join("files"), &unpacked)
        && !unpacked.is_dir()
    {
        return Err(at(error));
    }
    let _ = fs::remove_dir_all(&staging);
    Ok(unpacked)
}

fn find<'a>(list: &'a str, what: &str, platform: &str) -> Option<Wheel<'a>> {
    list.lines()
        .filter(|line| !line.starts_with('#'))
        .find_map(|line| {
            let mut words = line.split_whitespace();
            let (this, here) = (words.next()?, words.next()?);
            let (tag, requirement, sha256) = (words.next()?, words.next()?, words.next()?);
            (this == what && here == platform).then_some(Wheel {
                tag,
                requirement,
                sha256,
            })
        })
}

fn python() -> Command {
    Command::new(std::env::var_os("PYTHON").unwrap_or_else(|| "python3".into()))
}

fn download(wheel: &Wheel<'_>, into: &Path) -> Result<()> {
    let pins = into.join("pins.txt");
    fs::write(
        &pins,
        format!("{} --hash=sha256:{}\n", wheel.requirement, wheel.sha256),
    )
    .map_err(|error| format!("cannot write {}: {error}", pins.display()))?;
    output(
        python()
            .args([
                "-m",
                "pip",
                "download",
                "--quiet",
                "--disable-pip-version-check",
                "--no-deps",
            ])
            .args([
                "--only-binary=:all:",
                "--require-hashes",
                "--platform",
                wheel.tag,
                "--dest",
            ])
            .arg(into)
            .arg("-r")
            .arg(&pins),
        &format!(
            "{} is needed once: install Python 3 with pip and check the network, or set MLX_ROOT (and LIBCLANG_PATH) \
             to libraries that you have",
            wheel.requirement
        ),
    )?;
    Ok(())
}

/// A wheel is a zip archive; Python, already needed for pip, unpacks it.
fn unzip(staging: &Path) -> Result<()> {
    let archive = fs::read_dir(staging)
        .ok()
        .and_then(|entries| {
            entries
                .flatten()
                .map(|entry| entry.path())
                .find(|path| path.extension().is_some_and(|e| e == "whl"))
        })
        .ok_or_else(|| "pip reported success but left no wheel".to_owned())?;
    let advice = "Delete target/native-libs and build again";
    output(
        python()
            .args(["-m", "zipfile", "-e"])
            .arg(&archive)
            .arg(staging.join("files")),
        advice,
    )?;
    Ok(())
}

/// Cargo's target directory: the nearest folder above OUT_DIR that Cargo marked as a cache, so that debug and release
/// builds share one download.
fn target_dir(out_dir: &Path) -> PathBuf {
    let marked = out_dir
        .ancestors()
        .find(|folder| folder.join("CACHEDIR.TAG").is_file());
    marked.unwrap_or(out_dir).to_path_buf()
}

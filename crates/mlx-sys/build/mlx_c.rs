//! mlx-c: the C interface of MLX, compiled from the sources inside the published `mlx-sys` package.

use super::{Context, Mlx, Result, display, output};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The folder that holds `mlx/c/*.cpp`.
pub(crate) fn find(context: &Context) -> Result<PathBuf> {
    let root = match std::env::var_os("MLX_C_ROOT") {
        Some(root) => PathBuf::from(root),
        None => from_registry(context)?,
    };
    if !root.join("mlx/c/mlx.h").is_file() {
        return Err(format!("no mlx-c at {}: mlx/c/mlx.h is missing", root.display()));
    }
    Ok(root)
}

fn from_registry(context: &Context) -> Result<PathBuf> {
    let manifest = context.manifest_dir.join("native/mlx-c-source/Cargo.toml");
    let advice = "The published mlx-sys package is needed once: check the network, or set MLX_C_ROOT to mlx-c's sources";
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let json = output(
        Command::new(cargo)
            .args([
                "metadata",
                "--format-version",
                "1",
                "--locked",
                "--quiet",
                "--manifest-path",
            ])
            .arg(&manifest),
        advice,
    )?;
    let metadata: serde_json::Value =
        serde_json::from_str(&json).map_err(|error| format!("cargo metadata printed no JSON: {error}"))?;
    let package = metadata["packages"]
        .as_array()
        .and_then(|packages| packages.iter().find(|package| package["name"] == "mlx-sys"))
        .and_then(|package| package["manifest_path"].as_str())
        .ok_or_else(|| "cargo metadata does not name mlx-sys".to_owned())?;
    Path::new(package)
        .parent()
        .map(|folder| folder.join("src/mlx-c"))
        .ok_or_else(|| format!("{package} has no folder"))
}

pub(crate) fn compile(context: &Context, mlx: &Mlx, mlx_c: &Path) -> Result<()> {
    let sources = files(&mlx_c.join("mlx/c"), "cpp")?;
    let native = context.manifest_dir.join("native");
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++20")
        .include(mlx_c)
        .include(&mlx.include)
        .flag("-include")
        .flag(display(&native.join("format_stand_in.h")))
        .flag("-include")
        .flag(display(&native.join("half_for_cpp.h")))
        .warnings(false)
        // Thin wrappers: optimising them costs build time and gains nothing that a measurement shows.
        .opt_level(1)
        .files(sources)
        .file(native.join("alias.cpp"));
    build.try_compile("mlxc").map_err(|error| {
        let first = error.to_string();
        let first = first.lines().next().unwrap_or("no message");
        format!("compiling mlx-c failed: {first}. A C++20 compiler is needed (GCC 12, Clang 16 or newer)")
    })
}

/// Every file with that extension directly in `folder`, sorted.
pub(crate) fn files(folder: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    let entries =
        std::fs::read_dir(folder).map_err(|error| format!("cannot read {}: {error}", folder.display()))?;
    let mut found: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension() == Some(OsStr::new(extension)))
        .collect();
    found.sort();
    Ok(found)
}

//! Links Apple's prebuilt libmlx, compiles mlx-c against it and generates the bindings.
//!
//! Where libmlx comes from: `MLX_ROOT` when set (a folder with `include/mlx/mlx.h` and `lib/libmlx.*`: Nix, Homebrew, a
//! CUDA build), else the published Python wheel for this platform, pinned in `native/wheels.txt` and fetched once into
//! the target directory. mlx-c comes from the published `mlx-sys` package: from `MLX_C_ROOT` when set, else through
//! `cargo metadata` on `native/mlx-c-source`.

mod bindings;
mod mlx_c;
mod openblas;
mod wheels;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// A failure as one line that says what to do.
type Result<T> = std::result::Result<T, String>;

/// What Cargo says of this build.
struct Context {
    manifest_dir: PathBuf,
    out_dir: PathBuf,
    /// Operating system of the target, as Cargo spells it: `linux`, `macos`.
    os: String,
    arch: String,
    cuda: bool,
}

/// A usable MLX: headers below `include`, libmlx in `lib`.
struct Mlx {
    include: PathBuf,
    lib: PathBuf,
    /// True for the CPU wheel, whose BLAS is the slow reference one.
    reference_blas: bool,
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            println!("cargo::error={message}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    for name in ["MLX_ROOT", "MLX_C_ROOT", "LIBCLANG_PATH", "PYTHON"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    for path in ["build", "native"] {
        println!("cargo::rerun-if-changed={path}");
    }
    let context = Context {
        manifest_dir: variable("CARGO_MANIFEST_DIR")?.into(),
        out_dir: variable("OUT_DIR")?.into(),
        os: variable("CARGO_CFG_TARGET_OS")?,
        arch: variable("CARGO_CFG_TARGET_ARCH")?,
        cuda: std::env::var_os("CARGO_FEATURE_CUDA").is_some(),
    };

    let mlx = find_mlx(&context)?;
    let mlx_c = mlx_c::find(&context)?;
    mlx_c::compile(&context, &mlx, &mlx_c)?;
    bindings::generate(&context, &mlx_c)?;

    let mut library_dirs = Vec::new();
    // Before libmlx, so that its symbols are found first (native/blas_shim.c).
    println!("cargo::rustc-check-cfg=cfg(openblas)");
    if mlx.reference_blas {
        library_dirs.push(openblas::build_shim(&context)?);
        println!("cargo::rustc-cfg=openblas");
    }
    println!("cargo::rustc-link-search=native={}", mlx.lib.display());
    println!("cargo::rustc-link-lib=dylib=mlx");
    library_dirs.push(mlx.lib.clone());

    // Dependents read these as DEP_MLX_LIBRARY_DIRS and DEP_MLX_INCLUDE.
    let dirs = std::env::join_paths(&library_dirs)
        .map_err(|_| "a library folder's name contains ':'; move the target directory".to_owned())?;
    println!("cargo::metadata=LIBRARY_DIRS={}", dirs.to_string_lossy());
    println!("cargo::metadata=INCLUDE={}", mlx.include.display());
    Ok(())
}

fn find_mlx(context: &Context) -> Result<Mlx> {
    let (root, reference_blas) = match std::env::var_os("MLX_ROOT") {
        Some(root) => (PathBuf::from(root), false),
        None => {
            let root = wheels::fetch(context, "mlx")?.join("mlx");
            (root, context.os == "linux" && !context.cuda)
        }
    };
    let mlx = Mlx {
        include: root.join("include"),
        lib: root.join("lib"),
        reference_blas,
    };
    let library = mlx.lib.join(if context.os == "macos" {
        "libmlx.dylib"
    } else {
        "libmlx.so"
    });
    for file in [&mlx.include.join("mlx/mlx.h"), &library] {
        if !file.is_file() {
            return Err(format!(
                "no MLX at {}: {} is missing. Point MLX_ROOT to a folder with include/mlx/mlx.h and lib/libmlx, \
                 or unset it to use the published build",
                root.display(),
                file.display()
            ));
        }
    }
    Ok(mlx)
}

fn variable(name: &str) -> Result<String> {
    std::env::var(name).map_err(|_| format!("Cargo did not set {name}; run this through cargo"))
}

/// Runs a command to its end and returns what it printed, or one line that says what went wrong.
fn output(command: &mut Command, advice: &str) -> Result<String> {
    // The program and its first words; the rest is noise in a line for a person.
    let words = std::iter::once(command.get_program()).chain(command.get_args().take(3));
    let shown = words
        .map(|word| word.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ");
    let done = command
        .output()
        .map_err(|error| format!("cannot run {shown}: {error}. {advice}"))?;
    if done.status.success() {
        return Ok(String::from_utf8_lossy(&done.stdout).into_owned());
    }
    let stderr = String::from_utf8_lossy(&done.stderr);
    let reason = stderr
        .lines()
        .rev()
        .find(|line| !line.trim().is_empty())
        .unwrap_or("no message");
    Err(format!("{shown} failed: {}. {advice}", reason.trim()))
}

fn display(path: &Path) -> String {
    path.display().to_string()
}

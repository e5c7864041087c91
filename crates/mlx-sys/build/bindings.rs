//! Rust declarations of mlx-c's functions, by bindgen.

use super::{Context, Result, mlx_c, output, wheels};
use std::path::Path;
use std::process::Command;

pub(crate) fn generate(context: &Context, mlx_c_root: &Path) -> Result<()> {
    provide_libclang(context)?;
    let headers = mlx_c::files(&mlx_c_root.join("mlx/c"), "h")?;
    let half = context.manifest_dir.join("native/half_for_bindings.h");
    let mut builder = bindgen::Builder::default()
        .rust_edition(bindgen::RustEdition::Edition2024)
        .clang_arg(format!("-I{}", mlx_c_root.display()))
        .clang_args(["-include".to_owned(), half.display().to_string()])
        .clang_args(system_headers(context))
        // Their size types differ from Rust's own declarations of the same functions.
        .blocklist_function("malloc")
        .blocklist_function("realloc");
    for header in headers {
        builder = builder.header(header.display().to_string());
    }
    let bindings = builder.generate().map_err(|error| {
        format!(
            "bindgen failed on mlx-c's headers: {}",
            error.to_string().replace('\n', "; ")
        )
    })?;
    let path = context.out_dir.join("bindings.rs");
    bindings
        .write_to_file(&path)
        .map_err(|error| format!("cannot write {}: {error}", path.display()))
}

/// bindgen loads libclang at run time and finds it through an environment variable only.
fn provide_libclang(context: &Context) -> Result<()> {
    if std::env::var_os("LIBCLANG_PATH").is_some() {
        return Ok(());
    }
    let wheel = wheels::fetch(context, "clang")?;
    let folder = ["libclang-18.1.1.data/platlib/clang/native", "clang/native"]
        .iter()
        .map(|inside| wheel.join(inside))
        .find(|folder| folder.is_dir())
        .ok_or_else(|| format!("no libclang inside {}", wheel.display()))?;
    // SAFETY: this process has a single thread so far; bindgen and cc start theirs later.
    #[allow(clippy::disallowed_methods)]
    unsafe {
        std::env::set_var("LIBCLANG_PATH", folder);
    }
    Ok(())
}

/// The wheel's libclang brings no headers of its own (stddef.h and its kin): it borrows those of the C compiler that is
/// there anyway. A cross build names its own through bindgen's variables.
fn system_headers(context: &Context) -> Vec<String> {
    let target = std::env::var("TARGET").unwrap_or_default();
    let names = [
        "BINDGEN_EXTRA_CLANG_ARGS".to_owned(),
        format!("BINDGEN_EXTRA_CLANG_ARGS_{target}"),
        format!("BINDGEN_EXTRA_CLANG_ARGS_{}", target.replace('-', "_")),
    ];
    if names.iter().any(|name| std::env::var_os(name).is_some()) {
        return Vec::new();
    }
    let ask = |program: &str, args: &[&str]| {
        output(Command::new(program).args(args), "")
            .ok()
            .map(|text| text.trim().to_owned())
    };
    let mut args = Vec::new();
    if context.os == "macos" {
        if let Some(sdk) = ask("xcrun", &["--show-sdk-path"]) {
            args.extend(["-isysroot".to_owned(), sdk]);
        }
        if let Some(folder) = ask("cc", &["-print-resource-dir"]) {
            args.extend(["-resource-dir".to_owned(), folder]);
        }
    } else if let Some(folder) = ask("cc", &["-print-file-name=include"]) {
        args.extend(["-isystem".to_owned(), folder]);
    }
    args
}

//! OpenBLAS in front of the reference BLAS of Linux' CPU build (`native/blas_shim.c` says how).

use super::{Context, Result, output, wheels};
use std::path::PathBuf;

/// Builds the shim and tells Cargo to link it. Returns the folder it lies in.
pub(crate) fn build_shim(context: &Context) -> Result<PathBuf> {
    let openblas = wheels::fetch(context, "blas")?.join("scipy_openblas32/lib");
    let folder = context.out_dir.join("blas");
    std::fs::create_dir_all(&folder)
        .map_err(|error| format!("cannot create {}: {error}", folder.display()))?;
    let compiler = cc::Build::new().cargo_warnings(false).get_compiler();
    output(
        compiler
            .to_command()
            .args(["-shared", "-fPIC", "-O1"])
            .arg(context.manifest_dir.join("native/blas_shim.c"))
            .arg("-o")
            .arg(folder.join("libmlx_blas.so"))
            .arg("-Wl,-soname,libmlx_blas.so")
            .arg(format!("-L{}", openblas.display()))
            .arg("-lscipy_openblas")
            .arg(format!("-Wl,-rpath,{}", openblas.display())),
        "A C compiler is needed",
    )?;
    println!("cargo::rustc-link-search=native={}", folder.display());
    println!("cargo::rustc-link-lib=dylib=mlx_blas");
    Ok(folder)
}

//! Tells the worker where libmlx lies: beside an installed program (`../lib`), or where the build found or fetched it.

fn main() {
    println!("cargo::rerun-if-env-changed=DEP_MLX_LIBRARY_DIRS");
    let origin = if std::env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("macos") {
        "@executable_path"
    } else {
        "$ORIGIN"
    };
    println!("cargo::rustc-link-arg=-Wl,-rpath,{origin}/../lib");
    if std::env::var_os("CARGO_FEATURE_CUDA").is_some() {
        // NVIDIA's libraries are found on the machine that has the GPU, not necessarily on this one.
        println!("cargo::rustc-link-arg=-Wl,--allow-shlib-undefined");
    }
    if let Some(dirs) = std::env::var_os("DEP_MLX_LIBRARY_DIRS") {
        for dir in std::env::split_paths(&dirs) {
            println!("cargo::rustc-link-arg=-Wl,-rpath,{}", dir.display());
        }
    }
}

//! The tests of this crate are programs that load libmlx: they are told where it lies.

fn main() {
    println!("cargo::rerun-if-env-changed=DEP_MLX_LIBRARY_DIRS");
    if let Some(dirs) = std::env::var_os("DEP_MLX_LIBRARY_DIRS") {
        for dir in std::env::split_paths(&dirs) {
            println!("cargo::rustc-link-arg=-Wl,-rpath,{}", dir.display());
        }
    }
}

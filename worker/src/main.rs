//! The `mlxworker` program: see the library.

fn main() {}

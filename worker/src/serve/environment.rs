//! Variables that MLX reads once, when it is first used: they must be in the environment before.
//!
//! A program cannot safely change its own environment once there are threads, and Rust's tests and lints forbid it at
//! all; so it starts itself over with the right one. That keeps process id, standard streams and control socket.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::Command;

use knobs::Knobs;

use crate::engine::device::{MAX_MB_PER_BUFFER, MAX_OPS_PER_BUFFER};

/// Replaces this process by itself with the variables that the knobs ask for, unless they are set so already. To be
/// called before anything else is open.
///
/// # Errors
/// The system's, when it does not let this program start again. Returns normally when there is nothing to change.
pub fn apply(knobs: &Knobs) -> std::io::Result<()> {
    let missing: Vec<(&str, String)> = wanted(knobs)
        .into_iter()
        .filter(|(name, value)| std::env::var_os(name) != Some(OsString::from(value)))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let program = std::env::current_exe()?;
    let mut arguments = std::env::args_os();
    let mut command = Command::new(program);
    if let Some(name) = arguments.next() {
        command.arg0(name);
    }
    // Only comes back when it could not.
    Err(command.args(arguments).envs(missing).exec())
}

fn wanted(knobs: &Knobs) -> Vec<(&'static str, String)> {
    [
        (MAX_OPS_PER_BUFFER, knobs.mlx_max_ops_per_buffer),
        (MAX_MB_PER_BUFFER, knobs.mlx_max_mb_per_buffer),
    ]
    .into_iter()
    .filter_map(|(name, value)| Some((name, value?.to_string())))
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_set_is_wanted() {
        assert!(wanted(&Knobs::default()).is_empty());
        let knobs = Knobs {
            mlx_max_mb_per_buffer: Some(40),
            ..Knobs::default()
        };
        assert_eq!(wanted(&knobs), [("MLX_MAX_MB_PER_BUFFER", "40".to_owned())]);
    }
}

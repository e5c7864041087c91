//! The end of a process that has used MLX.

/// Ends the process at once, without the destructors of MLX's static objects: they wait for the GPU, for ever if a
/// command hangs, and a thread that is still inside MLX may crash under them. Whatever is to be written must have been
/// written.
pub fn exit_now(code: u8) -> ! {
    // SAFETY: takes a number and does not return; no code of ours runs afterwards.
    unsafe { libc::_exit(i32::from(code)) }
}

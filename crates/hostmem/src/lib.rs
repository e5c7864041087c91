//! Memory facts of the host and of a process.

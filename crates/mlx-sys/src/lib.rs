//! Bindings to mlx-c.

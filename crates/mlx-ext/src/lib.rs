//! Safe additions to mlx-rs.

//! The commands that a person types. So far one: `mlx-bench`.
//!
//! | module  | idea                                                        |
//! |---------|-------------------------------------------------------------|
//! | `bench` | `mlx-bench`: a load generator for any OpenAI endpoint       |

pub mod bench;

//! What a slab takes, by MLX's peak. That is one counter for the whole process, so these tests have a process of their
//! own, and in it one place to take turns.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    missing_docs
)]

use mlx_ext::Slab;
use mlx_ext::ops::slice;
use mlx_rs::transforms::async_eval;
use mlx_rs::{Array, Dtype, ops};
use parking_lot::{Mutex, MutexGuard};

/// Nobody else allocates until the guard is dropped.
fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock()
}

#[test]
fn writes_are_in_place_while_others_read() {
    let _alone = alone();
    let slab = Slab::zeros(&[1024, 1024], Dtype::Float32).unwrap();
    mlx_rs::memory::reset_peak_memory().unwrap();
    let before = mlx_rs::memory::active_memory().unwrap();
    let mut held = Vec::new();
    for step in 0..20 {
        let update = ops::ones::<f32>(&[1, 1024]).unwrap();
        let written = slab.write(&update, &[step, 0], &[step + 1, 1024]).unwrap();
        let read = slice(&written, &[step, 0], &[step + 1, 1024])
            .unwrap()
            .sum(false)
            .unwrap();
        async_eval([&read]).unwrap();
        // The steps before stay in somebody's hands.
        held.push((written, read));
    }
    for (_, read) in &held {
        assert_eq!(read.item_cast::<f32>(), 1024.0);
    }
    let grown = mlx_rs::memory::peak_memory().unwrap().saturating_sub(before);
    assert!(grown < 1 << 20, "the slab of 4 MiB was copied: {grown} bytes");
    assert_eq!(slab.array().sum(false).unwrap().item_cast::<f32>(), 20.0 * 1024.0);
}

#[test]
fn memory_is_taken_when_it_is_written() {
    let _alone = alone();
    // 4 GiB: a copy of it would show.
    mlx_rs::memory::reset_peak_memory().unwrap();
    let slab = Slab::new(&[1 << 20, 1 << 10], Dtype::Float32).unwrap();
    let one = Array::from_slice(&[7.0_f32], &[1, 1]);
    let last = [(1 << 20) - 1, (1 << 10) - 1];
    let end = [1 << 20, 1 << 10];
    slab.write(&one, &last, &end).unwrap().eval().unwrap();
    assert!(mlx_rs::memory::peak_memory().unwrap() < 5 << 30);
    let read = slice(slab.array(), &last, &end).unwrap();
    assert_eq!(read.item_cast::<f32>(), 7.0);
    assert!(Slab::new(&[3, 0], Dtype::Float32).is_err());
}

//! The part of MLX that this project uses, each operation once with a result known by hand: it shows that the native
//! library, mlx-c and mlx-rs fit together on this machine.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use mlx_ext::ops::{gather_mm, slice, slice_update, view};
use mlx_rs::fast::{ScaledDotProductAttentionMask, rms_norm, rope, scaled_dot_product_attention};
use mlx_rs::ops::indexing::{take_along_axis, take_axis};
use mlx_rs::{Array, Dtype, ops};

fn floats(array: &Array) -> Vec<f32> {
    array.to_vec_cast::<f32>().unwrap()
}

fn close(found: &Array, expected: &[f32]) {
    let found = floats(found);
    assert_eq!(found.len(), expected.len(), "{found:?} against {expected:?}");
    for (a, b) in found.iter().zip(expected) {
        assert!(
            (a - b).abs() <= 1e-4 * b.abs().max(1.0),
            "{found:?} against {expected:?}"
        );
    }
}

fn ramp(shape: &[i32]) -> Array {
    let count: i32 = shape.iter().product();
    let values: Vec<f32> = (0..count).map(|n| n as f32 / count as f32 - 0.4).collect();
    Array::from_slice(&values, shape)
}

#[test]
fn the_runtime_names_itself() {
    let runtime = mlx_ext::runtime().unwrap();
    assert_eq!(runtime.version, "0.32.2");
    assert!(["cpu", "metal", "cuda"].contains(&runtime.device));
    // The Linux CPU build must not multiply with the reference BLAS; see crates/mlx-sys/build/openblas.rs.
    if cfg!(target_os = "linux") && runtime.device == "cpu" {
        assert!(runtime.cpu_blas.contains("OpenBLAS"), "{}", runtime.cpu_blas);
    }
}

#[test]
fn a_failing_operation_brings_mlx_own_message() {
    let error = gather_mm(&ramp(&[2, 3]), &ramp(&[4, 5, 6]), None, None, false).unwrap_err();
    assert!(
        error.what().contains("gather_mm") || error.what().contains("shape"),
        "{}",
        error.what()
    );
    // mlx-rs' own functions still get theirs.
    let error = ramp(&[2, 3]).matmul(ramp(&[2, 3])).unwrap_err();
    assert!(error.what().contains("matmul"), "{}", error.what());
}

#[test]
fn matmul_and_softmax() {
    let a = Array::from_slice(&[1.0_f32, 2.0, 3.0, 4.0], &[2, 2]);
    close(&a.matmul(&a).unwrap(), &[7.0, 10.0, 15.0, 22.0]);
    let row = Array::from_slice(&[0.0_f32, 2.0_f32.ln()], &[1, 2]);
    close(
        &ops::softmax_axis(&row, -1, true).unwrap(),
        &[1.0 / 3.0, 2.0 / 3.0],
    );
}

/// Large enough that the BLAS kernels, and not a special case for small sizes, do the work.
#[test]
fn a_large_product_equals_the_sum_of_its_parts() {
    let (rows, inner, columns) = (65, 130, 97);
    let (a, b) = (ramp(&[rows, inner]), ramp(&[inner, columns]));
    let (left, right) = (floats(&a), floats(&b));
    let product = floats(&a.matmul(&b).unwrap());
    let (inner, columns) = (inner as usize, columns as usize);
    for (row, column) in [(0, 0), (64, 96), (31, 50)] {
        let expected: f32 = (0..inner)
            .map(|k| left[row * inner + k] * right[k * columns + column])
            .sum();
        assert!((product[row * columns + column] - expected).abs() < 1e-3);
    }
}

#[test]
fn quantised_products_equal_products_with_the_dequantised_matrix() {
    for bits in [2, 3, 4, 5, 6, 8] {
        for group in [32, 64, 128] {
            let weight = ramp(&[8, 256]);
            let (packed, scales, biases) = ops::quantize(&weight, group, bits).unwrap();
            let plain = ops::dequantize(&packed, &scales, &biases, group, bits).unwrap();
            let x = ramp(&[3, 256]);
            let expected = floats(&x.matmul(plain.transpose().unwrap()).unwrap());
            let found = ops::quantized_matmul(&x, &packed, &scales, &biases, true, group, bits).unwrap();
            close(&found, &expected);
        }
    }
}

#[test]
fn gathered_products_pick_their_matrix() {
    let experts = ramp(&[4, 64, 8]);
    let x = ramp(&[2, 1, 64]);
    let picked = Array::from_slice(&[3_u32, 1], &[2]);
    let found = gather_mm(&x, &experts, None, Some(&picked), false).unwrap();
    assert_eq!(found.shape(), [2, 1, 8]);
    for (row, expert) in [(0, 3), (1, 1)] {
        let one = slice(&x, &[row, 0, 0], &[row + 1, 1, 64]).unwrap();
        let matrix = slice(&experts, &[expert, 0, 0], &[expert + 1, 64, 8]).unwrap();
        let expected = floats(&one.matmul(&matrix).unwrap());
        close(&slice(&found, &[row, 0, 0], &[row + 1, 1, 8]).unwrap(), &expected);
    }

    let weight = ramp(&[4, 8, 64]);
    let (packed, scales, biases) = ops::quantize(&weight, 64, 4).unwrap();
    let plain = ops::dequantize(&packed, &scales, &biases, 64, 4).unwrap();
    let quantised =
        ops::gather_qmm(&x, &packed, &scales, &biases, None, &picked, true, 64, 4, false).unwrap();
    let transposed = plain.swap_axes(-1, -2).unwrap();
    close(
        &quantised,
        &floats(&gather_mm(&x, &transposed, None, Some(&picked), false).unwrap()),
    );
}

#[test]
fn attention_normalisation_and_rotation() {
    // One key only: attention returns its value, whatever the scores.
    let (q, k, v) = (ramp(&[1, 2, 1, 64]), ramp(&[1, 1, 1, 64]), ramp(&[1, 1, 1, 64]));
    let found =
        scaled_dot_product_attention(&q, &k, &v, 0.125, ScaledDotProductAttentionMask::Causal, None).unwrap();
    assert_eq!(found.shape(), [1, 2, 1, 64]);
    close(
        &slice(&found, &[0, 1, 0, 0], &[1, 2, 1, 64]).unwrap(),
        &floats(&v),
    );

    let x = Array::from_slice(&[3.0_f32, 4.0], &[1, 2]);
    let weight = Array::from_slice(&[1.0_f32, 2.0], &[2]);
    let root = (12.5_f32).sqrt();
    close(
        &rms_norm(&x, Some(&weight), 0.0).unwrap(),
        &[3.0 / root, 8.0 / root],
    );

    // Position 1 turns the pair (first half, second half) by one radian.
    let pair = Array::from_slice(&[1.0_f32, 0.0], &[1, 1, 1, 2]);
    let turned = rope(&pair, 2, false, 10_000.0, 1.0, 1, None).unwrap();
    close(&turned, &[1.0_f32.cos(), 1.0_f32.sin()]);
}

#[test]
fn picking_and_sorting() {
    let row = Array::from_slice(&[0.1_f32, 0.9, 0.5, 0.7], &[1, 4]);
    assert_eq!(
        ops::indexing::argmax_axis(&row, -1, false)
            .unwrap()
            .to_vec_cast::<u32>()
            .unwrap(),
        [1]
    );
    let order = ops::argsort_axis(&row, -1).unwrap();
    assert_eq!(order.to_vec_cast::<u32>().unwrap(), [0, 2, 3, 1]);
    close(&take_along_axis(&row, &order, -1).unwrap(), &[0.1, 0.5, 0.7, 0.9]);
    let top = ops::argpartition_axis(&row, -2, -1).unwrap();
    let top = slice(&top, &[0, 2], &[1, 4]).unwrap();
    let mut top = top.to_vec_cast::<u32>().unwrap();
    top.sort_unstable();
    assert_eq!(top, [1, 3]);
    let table = ramp(&[4, 2]);
    let rows = take_axis(&table, Array::from_slice(&[2_u32, 0], &[2]), 0).unwrap();
    close(&rows, &[0.1, 0.225, -0.4, -0.275]);
}

#[test]
fn slices_updates_and_views() {
    let base = Array::zeros::<f32>(&[1, 1, 4, 2]).unwrap();
    let update = Array::from_slice(&[1.0_f32, 2.0], &[1, 1, 1, 2]);
    let changed = slice_update(&base, &update, &[0, 0, 2, 0], &[1, 1, 3, 2]).unwrap();
    close(&changed, &[0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 0.0, 0.0]);
    close(&base, &[0.0; 8]);
    assert!(slice(&base, &[0], &[1]).unwrap_err().what().contains("axes"));

    let bits = view(&Array::from_slice(&[1.0_f32], &[1]), Dtype::Uint32).unwrap();
    assert_eq!(bits.to_vec_cast::<u32>().unwrap(), [1.0_f32.to_bits()]);
}

#[test]
fn arithmetic_and_reductions() {
    let x = Array::from_slice(&[1.0_f32, -2.0, 4.0], &[1, 3]);
    let two = Array::from_f32(2.0);
    close(
        &x.add(&two)
            .unwrap()
            .subtract(&two)
            .unwrap()
            .multiply(&two)
            .unwrap()
            .divide(&two)
            .unwrap(),
        &[1.0, -2.0, 4.0],
    );
    close(&x.negative().unwrap(), &[-1.0, 2.0, -4.0]);
    close(&ops::sigmoid(Array::from_f32(0.0)).unwrap(), &[0.5]);
    close(&ops::maximum(&x, &two).unwrap(), &[2.0, 2.0, 4.0]);
    close(
        &ops::select(x.gt(&two).unwrap(), &two, &x).unwrap(),
        &[1.0, -2.0, 2.0],
    );
    close(
        &ops::select(x.lt(&two).unwrap(), &two, &x).unwrap(),
        &[2.0, 2.0, 4.0],
    );
    close(&x.eq(&two).unwrap().as_type::<f32>().unwrap(), &[0.0, 0.0, 0.0]);
    close(&x.sum_axis(-1, true).unwrap(), &[3.0]);
    close(&x.max_axis(-1, true).unwrap(), &[4.0]);
    close(&x.cumsum(-1, None, false).unwrap(), &[0.0, 1.0, -1.0]);
    let total = (1.0_f32.exp() + (-2.0_f32).exp() + 4.0_f32.exp()).ln();
    close(&x.logsumexp_axis(-1, true).unwrap(), &[total]);
    let halves = Array::from_slice(&[0_u32, 1, 2, 5], &[4])
        .floor_divide(Array::from_slice(&[2_u32], &[1]))
        .unwrap();
    assert_eq!(halves.to_vec_cast::<u32>().unwrap(), [0, 0, 1, 2]);
    assert_eq!(
        ops::arange::<_, u32>(None, 3, None)
            .unwrap()
            .to_vec_cast::<u32>()
            .unwrap(),
        [0, 1, 2]
    );
}

#[test]
fn shapes() {
    let x = ramp(&[2, 3]);
    assert_eq!(x.expand_dims(-1).unwrap().shape(), [2, 3, 1]);
    assert_eq!(ops::swap_axes(&x, 0, 1).unwrap().shape(), [3, 2]);
    assert_eq!(ops::concatenate(&[&x, &x], 1).unwrap().shape(), [2, 6]);
    assert_eq!(ops::stack(&[&x, &x], 0).unwrap().shape(), [2, 2, 3]);
    assert_eq!(
        ops::zeros_dtype(&[2, 2], Dtype::Float16).unwrap().dtype(),
        Dtype::Float16
    );
    close(
        &x.transpose().unwrap().reshape(&[6]).unwrap(),
        &[
            -0.4,
            0.1,
            -0.4 + 1.0 / 6.0,
            0.1 + 1.0 / 6.0,
            -0.4 + 1.0 / 3.0,
            0.1 + 1.0 / 3.0,
        ],
    );
}

#[test]
fn random_numbers_follow_their_key() {
    let logits = Array::from_slice(&[0.0_f32; 64], &[1, 64]);
    let draw = |seed: u64| {
        let key = mlx_rs::random::key(seed).unwrap();
        let draws =
            mlx_rs::random::categorical(&logits, -1, mlx_rs::random::ShapeOrCount::Count(16), &key).unwrap();
        draws.to_vec_cast::<u32>().unwrap()
    };
    assert_eq!(draw(7), draw(7));
    assert_ne!(draw(7), draw(8));
    let (one, other) = mlx_rs::random::split(mlx_rs::random::key(7).unwrap(), 2).unwrap();
    assert_ne!(
        one.to_vec_cast::<u32>().unwrap(),
        other.to_vec_cast::<u32>().unwrap()
    );
}

#[test]
fn work_runs_ahead_of_its_reader() {
    let mut value = ramp(&[64, 64]);
    for _ in 0..8 {
        value = value.matmul(ramp(&[64, 64])).unwrap();
        mlx_rs::transforms::async_eval([&value]).unwrap();
    }
    mlx_ext::synchronize().unwrap();
    assert!(floats(&value).iter().all(|x| x.is_finite()));
    assert!(mlx_rs::memory::active_memory().unwrap() > 0);
}

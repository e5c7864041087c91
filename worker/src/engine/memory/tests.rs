use proptest::prelude::*;

use super::*;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Qwen3-30B-A3B in 4 bits on a Mac with 128 GiB.
fn large_mac() -> MemoryFacts {
    MemoryFacts {
        device: DeviceFacts {
            kind: DeviceKind::Metal,
            bytes: 96 * GIB,
            free_bytes: None,
            memory_bytes: 128 * GIB,
        },
        weight_bytes: 17 * GIB,
        kv_bytes_per_token: 96 << 10,
        kv_quantization: None,
        step_bytes: GIB,
        context_length: 40_960,
    }
}

fn wishes() -> MemoryWishes {
    MemoryWishes {
        utilization: 0.5,
        kv_bytes: None,
        max_running: 4,
        max_blocks: None,
        block_size: 32,
        buffer_cache_bytes: 2 * GIB,
    }
}

#[test]
fn what_fits_is_divided_as_asked() {
    let plan = MemoryPlan::new(&large_mac(), &wishes()).unwrap();
    assert_eq!(plan.ceiling_bytes, 48 * GIB);
    let block = 3 * MIB;
    assert_eq!(
        plan.kv_bytes,
        8 * GIB / block * block,
        "the smaller of 8 GiB and 1/16 of 128 GiB, in whole blocks"
    );
    assert_eq!(plan.kv_blocks, 8 * 1024 * 1024 / (96 * 32));
    assert_eq!(plan.buffer_cache_bytes, 2 * GIB);
    assert_eq!(
        plan.sum(),
        17 * GIB + plan.kv_bytes + GIB + 2 * GIB + plan.head_room_bytes
    );
    let line = plan.to_string();
    for part in [
        "weights 17408",
        "KV cache 8190",
        "1024 (estimated)",
        "49152 MiB",
        "0.5",
        "98304",
        "Metal",
    ] {
        assert!(line.contains(part), "{part:?} is not in {line:?}");
    }
    let limits = plan.limits();
    assert_eq!(limits["kv_bytes"], 8190 * MIB);
    assert_eq!(limits["memory_planned_bytes"], plan.sum());
}

#[test]
fn the_default_cache_follows_memory_and_model() {
    let kv = |facts: &MemoryFacts| MemoryPlan::new(facts, &wishes()).unwrap().kv_bytes;
    let mut facts = large_mac();
    facts.device.memory_bytes = 64 * GIB;
    assert_eq!(kv(&facts), 4095 * MIB, "whole blocks of 3 MiB");
    facts.context_length = 4096;
    facts.kv_bytes_per_token = 4096;
    assert_eq!(kv(&facts), 256 * MIB, "four contexts for each of four");
}

/// A refusal can be checked by hand: every part, the sum, the ceiling, where it comes from, and what would do.
#[test]
fn a_refusal_shows_the_whole_arithmetic() {
    let mut facts = large_mac();
    facts.weight_bytes = 60 * GIB;
    let message = MemoryPlan::new(&facts, &wishes()).unwrap_err().to_string();
    let head_room = 256 + 48 * 1024 / 64;
    let sum = 60 * 1024 + 8190 + 1024 + 64 + head_room;
    for part in [
        "weights 61440".to_owned(),
        "KV cache 8190 (2730 blocks of 32 tokens)".to_owned(),
        "largest step 1024 (estimated)".to_owned(),
        "kept buffers 64".to_owned(),
        format!("head-room {head_room} = {sum} MiB"),
        "49152 MiB (--gpu-memory-utilization 0.5 of the 98304 MiB".to_owned(),
        format!("{} MiB are missing", sum - 49152),
        "--gpu-memory-utilization 0.74 would do".to_owned(),
        "--cache-memory-mb".to_owned(),
    ] {
        assert!(message.contains(&part), "{part:?} is not in {message:?}");
    }
    let enough = MemoryWishes {
        utilization: 0.74,
        ..wishes()
    };
    assert!(MemoryPlan::new(&facts, &enough).is_ok());
    let less = MemoryWishes {
        utilization: 0.73,
        ..wishes()
    };
    assert!(MemoryPlan::new(&facts, &less).is_err());
    facts.weight_bytes = 100 * GIB;
    let message = MemoryPlan::new(&facts, &wishes()).unwrap_err().to_string();
    assert!(
        message.contains("No --gpu-memory-utilization would do"),
        "{message}"
    );
}

#[test]
fn what_others_use_of_a_gpu_cannot_be_used() {
    let mut facts = large_mac();
    facts.device = DeviceFacts {
        kind: DeviceKind::Cuda,
        bytes: 80 * GIB,
        free_bytes: Some(20 * GIB),
        memory_bytes: 80 * GIB,
    };
    let message = MemoryPlan::new(&facts, &wishes()).unwrap_err().to_string();
    assert!(message.contains("of which only 20480 MiB are free"), "{message}");
    assert!(
        message.contains("No --gpu-memory-utilization would do"),
        "{message}"
    );
    facts.device.free_bytes = Some(79 * GIB);
    assert_eq!(
        MemoryPlan::new(&facts, &wishes()).unwrap().ceiling_bytes,
        40 * GIB
    );
}

#[test]
fn a_measured_step_takes_the_estimates_place() {
    let plan = MemoryPlan::new(&large_mac(), &wishes()).unwrap();
    let measured = plan.measured(3 * GIB).unwrap();
    assert_eq!(
        (measured.step_bytes, measured.step_figure),
        (3 * GIB, StepFigure::Measured)
    );
    assert_eq!(measured.sum(), plan.sum() + 2 * GIB);
    let message = plan.measured(40 * GIB).unwrap_err().to_string();
    assert!(message.contains("largest step 40960 (measured)"), "{message}");
}

#[test]
fn a_quantised_cache_says_so() {
    let plain = MemoryPlan::new(&large_mac(), &wishes()).unwrap();
    assert!(plain.to_string().contains(" blocks of 32 tokens) + "), "{plain}");
    assert!(plain.limits()["kv_bits"].is_null() && plain.limits()["kv_group_size"].is_null());
    // Qwen3-30B-A3B's 48 layers with 4 heads of 128: 136 bytes for 256.
    let (bits, group_size) = (8, 64);
    let facts = MemoryFacts {
        kv_bytes_per_token: 48 * 4 * 2 * 136,
        kv_quantization: Some(KvQuantization { bits, group_size }),
        ..large_mac()
    };
    let plan = MemoryPlan::new(&facts, &wishes()).unwrap();
    assert_eq!((plain.kv_blocks, plan.kv_blocks), (2730, 5140));
    let line = plan.to_string();
    assert!(
        line.contains("blocks of 32 tokens, 8 bits in groups of 64) + "),
        "{line}"
    );
    let limits = plan.limits();
    assert_eq!(
        (&limits["kv_bits"], &limits["kv_group_size"]),
        (&json!(8), &json!(64))
    );
    assert_eq!(limits["kv_bytes_per_token"], 48 * 4 * 2 * 136);
}

#[test]
fn a_cache_without_a_block_is_refused() {
    let kv = MemoryWishes {
        kv_bytes: Some(32 * (96 << 10) - 1),
        ..wishes()
    };
    let message = MemoryPlan::new(&large_mac(), &kv).unwrap_err().to_string();
    assert!(
        message.contains("3145727 bytes") && message.contains("takes 3145728 bytes"),
        "{message}"
    );
    let blocks = MemoryWishes {
        max_blocks: Some(7),
        ..wishes()
    };
    let plan = MemoryPlan::new(&large_mac(), &blocks).unwrap();
    assert_eq!((plan.kv_blocks, plan.kv_tokens()), (7, 224));
}

#[test]
fn the_estimate_knows_what_dominates() {
    let shape = StepShape {
        tokens: 512,
        pairs: 512 * 32_768,
        rows: 4,
        hidden: 2048,
        feed_forward: 8 * 768,
        heads: 32,
        head_dim: 128,
        vocabulary: 151_936,
        element_bytes: 2,
        fused_attention: true,
        gathered: 0,
    };
    let token = 2 * (2048 * 4 + 8 * 768 * 3 + 32 * 128 * 4);
    let logits = 151_936 * 4 * 4;
    // A chunk and all rows, in one step.
    let whole = (512 + 4) * token + (4 + 1) * logits;
    assert_eq!(shape.estimate(), whole);
    let scores = 512 * 32_768 * 32 * 2 * 2;
    assert_eq!(
        StepShape {
            fused_attention: false,
            ..shape
        }
        .estimate(),
        whole + scores
    );
    // Keys and values of a whole context.
    assert_eq!(
        StepShape {
            gathered: 2 * 32_768 * 4 * 128,
            ..shape
        }
        .estimate(),
        whole + 2 * 32_768 * 4 * 128 * 2
    );
    let decode = StepShape {
        tokens: 1,
        rows: 64,
        ..shape
    };
    assert_eq!(decode.estimate(), 65 * (token + logits));
}

fn any_facts() -> impl Strategy<Value = MemoryFacts> {
    (
        (0..200 * GIB, prop::option::of(0..200 * GIB), 0..200 * GIB),
        (0..200 * GIB, 0_u64..1 << 20, 0..50 * GIB, 0_usize..200_000),
    )
        .prop_map(
            |((bytes, free_bytes, memory_bytes), (weight_bytes, kv, step_bytes, context_length))| {
                MemoryFacts {
                    device: DeviceFacts {
                        kind: DeviceKind::Cpu,
                        bytes,
                        free_bytes,
                        memory_bytes,
                    },
                    weight_bytes,
                    kv_bytes_per_token: kv,
                    kv_quantization: None,
                    step_bytes,
                    context_length,
                }
            },
        )
}

fn any_wishes() -> impl Strategy<Value = MemoryWishes> {
    (
        0.01..1.0_f64,
        prop::option::of(0..50 * GIB),
        1_usize..65,
        prop::option::of(1_usize..100_000),
        4_u32..10,
        0..20 * GIB,
    )
        .prop_map(
            |(utilization, kv_bytes, max_running, max_blocks, block, buffer_cache_bytes)| MemoryWishes {
                utilization,
                kv_bytes,
                max_running,
                max_blocks,
                block_size: 1 << block,
                buffer_cache_bytes,
            },
        )
}

proptest! {
    #[test]
    fn no_plan_exceeds_its_ceiling(facts in any_facts(), wishes in any_wishes(), step in 0..100 * GIB) {
        let Ok(plan) = MemoryPlan::new(&facts, &wishes) else { return Ok(()) };
        for plan in [Some(plan), plan.measured(step).ok()].into_iter().flatten() {
            prop_assert!(plan.sum() <= plan.ceiling_bytes);
            prop_assert!(plan.ceiling_bytes <= facts.device.bytes);
            prop_assert!(facts.device.free_bytes.is_none_or(|free| plan.ceiling_bytes <= free));
            prop_assert!(plan.kv_blocks >= 1 && plan.kv_blocks <= wishes.max_blocks.unwrap_or(usize::MAX));
            prop_assert!(wishes.kv_bytes.is_none_or(|wish| plan.kv_bytes <= wish));
            prop_assert_eq!(plan.kv_bytes, plan.kv_tokens() as u64 * facts.kv_bytes_per_token);
            prop_assert!(plan.buffer_cache_bytes <= wishes.buffer_cache_bytes);
            prop_assert!(plan.buffer_cache_bytes >= wishes.buffer_cache_bytes.min(64 * MIB));
        }
    }

    /// Kept buffers give way before anything is refused, and only as far as they must.
    #[test]
    fn kept_buffers_take_what_is_left(facts in any_facts(), wishes in any_wishes()) {
        let Ok(plan) = MemoryPlan::new(&facts, &wishes) else { return Ok(()) };
        prop_assert!(plan.buffer_cache_bytes == wishes.buffer_cache_bytes || plan.sum() == plan.ceiling_bytes);
    }

    #[test]
    fn more_memory_never_hurts(facts in any_facts(), wishes in any_wishes(), more in 0.0..1.0_f64, step in 0..GIB) {
        let wider = MemoryWishes { utilization: wishes.utilization + (1.0 - wishes.utilization) * more, ..wishes };
        let smaller = MemoryFacts { step_bytes: facts.step_bytes.min(step), ..facts };
        if let Ok(plan) = MemoryPlan::new(&facts, &wishes) {
            let wide = MemoryPlan::new(&facts, &wider);
            prop_assert!(wide.as_ref().is_ok_and(|wide| wide.kv_bytes == plan.kv_bytes), "{wide:?}");
            let small = MemoryPlan::new(&smaller, &wishes);
            prop_assert!(small.is_ok_and(|small| small.buffer_cache_bytes >= plan.buffer_cache_bytes));
        }
    }

    #[test]
    fn a_refusal_names_a_share_that_does(facts in any_facts(), wishes in any_wishes()) {
        let Err(refusal) = MemoryPlan::new(&facts, &wishes) else { return Ok(()) };
        let message = refusal.to_string();
        let named = message.split("--gpu-memory-utilization ").nth(2).and_then(|rest| rest.split(' ').next());
        if let Some(utilization) = named.and_then(|share| share.parse::<f64>().ok()) {
            let enough = MemoryWishes { utilization, ..wishes };
            prop_assert!(MemoryPlan::new(&facts, &enough).is_ok(), "{message}");
            prop_assert!(utilization > wishes.utilization, "{message}");
        }
    }
}

//! The table is consistent with itself, and every form of a setting leads to the same worker.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::collections::HashSet;

use knobs::{
    Command, Effect, Kind, KnobError, Knobs, Settings, TABLE, by_flag, by_yaml_key, parse_args, parse_command,
};
use proptest::prelude::*;
use serde_json::json;

fn args(line: &str) -> Vec<String> {
    line.split_whitespace().map(str::to_owned).collect()
}

#[test]
fn names_are_unique_over_flags_aliases_negations_and_keys() {
    let mut flags = HashSet::new();
    let mut keys = HashSet::new();
    for knob in TABLE {
        let mut names: Vec<String> = vec![knob.flag.to_owned()];
        names.extend(knob.aliases.iter().chain(knob.off).map(|s| (*s).to_owned()));
        if knob.kind == Kind::Bool {
            names.push(format!("no-{}", knob.flag));
        } else {
            assert!(knob.off.is_empty(), "{} is no switch", knob.flag);
        }
        for name in names {
            assert!(flags.insert(name.clone()), "{name} twice");
            assert!(!knobs::is_speculative(&format!("--{name}")), "{name}");
        }
        assert!(keys.insert(knob.yaml_key()), "{}", knob.yaml_key());
        assert_eq!(by_yaml_key(&knob.yaml_key()).unwrap().flag, knob.flag);
        assert_eq!(by_yaml_key(&knob.flag.replace('-', "_")).unwrap().flag, knob.flag);
        assert_eq!(
            knob.field,
            knob.flag.replace('-', "_"),
            "field and flag say the same"
        );
    }
}

#[test]
fn every_default_lies_in_its_own_range_and_has_a_text() {
    for knob in TABLE {
        assert!(!knob.help.trim().is_empty(), "{}", knob.flag);
        if let Some(value) = knob.default.value() {
            assert_eq!(
                knob.check_text(knob.flag, &value.to_string()),
                Ok(value),
                "{}",
                knob.flag
            );
        }
        // No default is a choice too.
        assert!(
            knob.effect != Effect::Active || !knob.reason.trim().is_empty(),
            "--{} without a reason",
            knob.flag
        );
    }
    let knobs = Knobs::default();
    assert_eq!(
        (knobs.host.as_str(), knobs.port, knobs.max_num_seqs),
        ("127.0.0.1", 0, 4)
    );
}

/// What nix-ai 1.85 runs; only the program's name has changed.
#[test]
fn the_predecessors_command_line_is_accepted() {
    let line = "serve org/model --port 11436 --host 127.0.0.1 --cache-memory-mb 8192 --gpu-memory-utilization 0.500000 \
                --auto-unload-idle-seconds 1800 --enable-metrics --continuous-batching --enable-prefix-cache \
                --use-paged-cache --max-num-seqs 4 --max-tokens 8192 --max-request-tokens 8192 \
                --enable-auto-tool-choice --tool-call-parser hermes";
    let Command::Serve(parsed) = parse_command(&args(line)).unwrap() else {
        panic!("no serve")
    };
    assert_eq!(parsed.model, "org/model");
    assert_eq!(
        (parsed.knobs.port, parsed.knobs.cache_memory_mb),
        (11436, Some(8192))
    );
    assert_eq!(parsed.knobs.tool_call_parser, "hermes");
    assert!((parsed.knobs.gpu_memory_utilization - 0.5).abs() < 1e-12);
    assert!(
        parsed
            .warnings
            .iter()
            .any(|w| w.starts_with("--auto-unload-idle-seconds 1800 has no meaning here: swapd"))
    );
    assert!(!parsed.warnings.iter().any(|w| w.contains("max-num-seqs")));
}

#[test]
fn every_vllm_mlx_flag_is_known_or_refused_with_the_reason() {
    let kept = "models-config memory-budget-gb served-model-name host port max-num-seqs prefill-batch-size \
        completion-batch-size mllm-prefill-step-size enable-prefix-cache disable-prefix-cache prefix-cache-size \
        cache-memory-mb cache-memory-percent no-memory-aware-cache kv-cache-quantization kv-cache-quantization-bits \
        kv-cache-quantization-group-size kv-cache-min-quantize-tokens ssd-cache-dir ssd-cache-max-gb warm-prompts \
        stream-interval max-kv-size max-tokens max-request-tokens continuous-batching gpu-memory-utilization \
        use-paged-cache paged-cache-block-size max-cache-blocks chunked-prefill-tokens prefill-step-size \
        prefix-trie-cache mcp-config api-key rate-limit timeout enable-metrics auto-unload-idle-seconds \
        lazy-load-model max-audio-upload-mb max-tts-input-chars enable-auto-tool-choice tool-call-parser \
        reasoning-parser mllm trust-remote-code default-temperature default-top-p default-top-k default-min-p \
        default-presence-penalty default-repetition-penalty default-thinking-token-budget \
        default-chat-template-kwargs embedding-model embedding-max-length embedding-overflow-policy rerank-model \
        download-timeout download-retries offline";
    for flag in kept.split_whitespace() {
        assert!(by_flag(flag).is_some(), "--{flag}");
    }
    let refused = "enable-mtp mtp-num-draft-tokens mtp-optimistic specprefill specprefill-threshold \
        specprefill-keep-pct specprefill-backbone-pct specprefill-draft-model mllm-draft-model mllm-draft-kind \
        mllm-draft-block-size default-mllm-draft draft-model num-draft-tokens speculative-config";
    for flag in refused.split_whitespace() {
        let error = parse_args(&args(&format!("m --{flag} 1"))).unwrap_err();
        assert_eq!(
            error,
            KnobError::Speculative {
                name: format!("--{flag}")
            }
        );
        assert!(
            error.to_string().contains("speculative decoding is off"),
            "{error}"
        );
    }
}

#[test]
fn both_forms_of_a_value_and_the_last_one_counts() {
    let parsed = parse_args(&args(
        "--max-num-seqs=2 m --max-num-seqs 3 --default-presence-penalty -1.5",
    ))
    .unwrap();
    assert_eq!(parsed.knobs.max_num_seqs, 3);
    assert_eq!(parsed.knobs.default_presence_penalty, -1.5);
    let parsed = parse_args(&args(
        "--model a/b --disable-prefix-cache --no-continuous-batching",
    ))
    .unwrap();
    assert_eq!(parsed.model, "a/b");
    assert!(!parsed.knobs.enable_prefix_cache && !parsed.knobs.continuous_batching);
    assert!(
        parse_args(&args("m --continuous-batching=false"))
            .unwrap()
            .settings
            .get("continuous-batching")
            .is_some()
    );
}

#[test]
fn errors_name_flag_value_and_range() {
    let says = |line: &str| parse_args(&args(line)).unwrap_err().to_string();
    assert_eq!(
        says("m --max-num-seqs 0"),
        "--max-num-seqs: 0 is out of range; expected a whole number from 1 to 1024 (requests)"
    );
    assert_eq!(
        says("m --port 70000"),
        "--port: 70000 is out of range; expected a whole number from 0 to 65535"
    );
    assert_eq!(
        says("m --max-num-seq 4"),
        "unknown flag --max-num-seq; did you mean --max-num-seqs?"
    );
    assert_eq!(says("m --frobnicate"), "unknown flag --frobnicate");
    assert_eq!(says("m -p 1"), "unknown flag -p");
    assert_eq!(
        says("m --max-tokens --port 1"),
        "--max-tokens needs a value: a whole number of at least 1 (tokens)"
    );
    assert!(
        says("m --max-tokens many").starts_with("--max-tokens: `many` is not valid; expected a whole number")
    );
    assert!(says("m --tool-call-parser herms").ends_with("did you mean hermes?"));
    assert!(
        says("m --default-temperature nan").contains("nan")
            || says("m --default-temperature nan").contains("NaN")
    );
    assert!(says("m --default-chat-template-kwargs [1]").contains("expected a JSON object"));
    assert_eq!(
        says("--port 1"),
        "which model? usage: mlxworker serve MODEL [flags]"
    );
    assert_eq!(says("a b"), "one model at a time: got `a` and `b`");
    assert!(says("m --max-tokens 100 --max-request-tokens 50").contains("--max-tokens 100 is larger"));
    assert!(says("m --no-use-paged-cache --enable-prefix-cache").contains("needs --use-paged-cache"));
    assert!(says("m --weights slurp").contains("one of mmap, read"));
    assert_eq!(
        says("m --block-size 48"),
        "--paged-cache-block-size 48: must be a power of two"
    );
    assert!(says("m --paged-cache-block-size 8").contains("from 16 to 512"));
    assert!(says("m --no-continuous-batching --max-num-seqs 2").contains("--max-num-seqs 2 needs"));
}

/// What cannot be had stops the start; asking for what happens anyway does not.
#[test]
fn a_knob_that_cannot_be_had_is_refused_and_not_ignored() {
    for (flag, instead) in [
        ("--max-kv-size 4096", "--context-length"),
        ("--default-thinking-token-budget 512", "enable_thinking"),
    ] {
        let error = parse_args(&args(&format!("m {flag}"))).expect_err(flag);
        assert!(matches!(error, KnobError::Refused { .. }), "{error:?}");
        let message = error.to_string();
        assert!(
            message.contains("is refused") && message.contains(instead),
            "{message}"
        );
    }
}

#[test]
fn a_quantised_kv_cache_and_what_belongs_to_it() {
    let parsed = |line: &str| parse_args(&args(line)).unwrap();
    let all = parsed(
        "m --kv-cache-quantization --kv-cache-quantization-bits 4 --kv-cache-quantization-group-size 32 \
         --attention reference",
    );
    assert!(
        all.knobs.kv_cache_quantization && all.warnings.is_empty(),
        "{all:?}"
    );
    assert!(parsed("m --disable-kv-cache-quantization").warnings.is_empty());
    // Vllm-mlx's threshold is checked, and means something only when it is moved.
    assert!(parsed("m --kv-cache-min-quantize-tokens 256").warnings.is_empty());
    let moved = parsed("m --kv-cache-quantization --kv-cache-min-quantize-tokens 0").warnings;
    assert!(
        moved.len() == 1 && moved[0].contains("has no meaning here: the KV of all requests lies in one pool"),
        "{moved:?}"
    );
    // Without the switch its siblings do nothing, and say so.
    for alone in [
        "m --kv-cache-quantization-bits 8",
        "m --kv-cache-quantization-group-size 32 --no-kv-cache-quantization",
    ] {
        let warnings: Vec<String> = parsed(alone).warnings;
        assert!(
            warnings.len() == 1 && warnings[0].ends_with("has no effect without --kv-cache-quantization"),
            "{warnings:?}"
        );
    }
    let refused = |line: &str| parse_args(&args(line)).unwrap_err().to_string();
    assert!(refused("m --kv-cache-quantization-bits 3").contains("one of 4, 8"));
    assert!(refused("m --kv-cache-quantization-group-size 48").contains("one of 32, 64, 128"));
    let kernel = refused("m --attention kernel --kv-cache-quantization");
    assert!(
        kernel.contains("--attention kernel and --kv-cache-quantization"),
        "{kernel}"
    );
    assert!(parse_args(&args("m --attention kernel")).is_ok());
}

#[test]
fn without_batching_one_request_runs_at_a_time() {
    let knobs = parse_args(&args("m --no-continuous-batching")).unwrap().knobs;
    assert_eq!(knobs.max_num_seqs, 1);
    let knobs = parse_args(&args("m --no-continuous-batching --max-num-seqs 1"))
        .unwrap()
        .knobs;
    assert_eq!(knobs.max_num_seqs, 1);
}

/// Every knob that the engine's issue names does something; those that do nothing say so when they are set.
#[test]
fn the_engines_knobs_are_active() {
    for flag in [
        "cache-memory-mb",
        "gpu-memory-utilization",
        "use-paged-cache",
        "paged-cache-block-size",
        "enable-prefix-cache",
        "continuous-batching",
        "max-num-seqs",
        "prefill-step-size",
        "step-budget",
        "watchdog-seconds",
        "attention",
        "cpu-dequantize",
        "mlx-cache-limit-mb",
        "mlx-max-ops-per-buffer",
        "mlx-max-mb-per-buffer",
        "weights",
        "kv-cache-quantization",
        "kv-cache-quantization-bits",
        "kv-cache-quantization-group-size",
    ] {
        assert_eq!(by_flag(flag).unwrap().0.effect, Effect::Active, "--{flag}");
    }
}

#[test]
fn a_length_that_is_given_alone_moves_the_other_one() {
    let knobs = parse_args(&args("m --max-tokens 65536")).unwrap().knobs;
    assert_eq!((knobs.max_tokens, knobs.max_request_tokens), (65536, 65536));
    let knobs = parse_args(&args("m --max-request-tokens 100")).unwrap().knobs;
    assert_eq!((knobs.max_tokens, knobs.max_request_tokens), (100, 100));
    let knobs = parse_args(&args("m --chunked-prefill-tokens 128 --prefill-step-size 64"))
        .unwrap()
        .knobs;
    assert_eq!(knobs.prefill_step_size, 128);
    // No way around the other one's range.
    for (tokens, fits) in [(0, true), (1, false), (15, false), (16, true)] {
        let line = format!("m --chunked-prefill-tokens {tokens}");
        assert_eq!(parse_args(&args(&line)).is_ok(), fits, "{tokens}");
    }
}

#[test]
fn yaml_spellings_kinds_and_errors() {
    let map = json!({
        "maxNumSeqs": 2, "max_tokens": 100.0, "prefill-step-size": 64, "weights": "read", "apiKey": 12345,
        "enableMetrics": false, "kvCacheQuantizationBits": 4, "defaultTemperature": 1, "timeout": null,
        "defaultChatTemplateKwargs": {"enable_thinking": false},
    });
    let settings = Settings::from_map(map.as_object().unwrap()).unwrap();
    let knobs = settings.resolve().unwrap();
    assert_eq!(
        (knobs.max_num_seqs, knobs.max_tokens, knobs.prefill_step_size),
        (2, 100, 64)
    );
    assert_eq!(knobs.api_key.as_deref(), Some("12345"));
    assert_eq!(knobs.default_temperature, Some(1.0));
    assert!(settings.get("timeout").is_none());

    let wrong = json!({"maxNumSeq": 2, "maxTokens": "many", "draftModel": "x", "port": 1.5, "apiKey": [1]});
    let errors = Settings::from_map(wrong.as_object().unwrap()).unwrap_err();
    let text: Vec<String> = errors.iter().map(ToString::to_string).collect();
    assert_eq!(text.len(), 5, "{text:?}");
    assert_eq!(
        text[0],
        "unknown worker key `maxNumSeq`; did you mean `maxNumSeqs`?"
    );
    assert!(text[1].contains("`many`") && text[2].contains("speculative decoding is off"));
    assert!(text[3].contains("port") && text[4].contains("(hidden)"));
}

#[test]
fn the_help_text_and_the_reference_name_every_flag() {
    let (help, page) = (knobs::help_text(), knobs::reference_markdown());
    for knob in TABLE {
        assert!(help.contains(&format!("--{}", knob.flag)), "{}", knob.flag);
        assert!(page.contains(&format!("`{}`", knob.yaml_key())), "{}", knob.flag);
    }
    assert!(help.lines().all(|l| l.len() <= 130));
    assert_eq!(parse_command(&args("serve --help")), Ok(Command::Help));
    assert_eq!(parse_command(&[]), Ok(Command::Help));
    assert_eq!(
        parse_command(&args("serv m")).unwrap_err().to_string(),
        "unknown command `serv`; did you mean `serve`?"
    );
}

/// A parser that is known and not there yet must not pass the check of a registry, to fail at the worker's start.
#[test]
fn names_with_nothing_behind_them_are_refused_by_the_table() {
    let page = knobs::reference_markdown();
    for knob in TABLE {
        let Kind::Enum(names) = knob.kind else {
            assert!(knob.to_come.is_empty(), "{} is no enumeration", knob.flag);
            continue;
        };
        for name in names {
            assert!(
                knob.check(knob.flag, &json!(name)).is_ok(),
                "{} {name}",
                knob.flag
            );
        }
        for name in knob.to_come {
            assert!(
                !names.contains(name) && page.contains(name),
                "{} {name}",
                knob.flag
            );
            let error = Settings::new()
                .set_yaml(&knob.yaml_key(), &json!(name))
                .unwrap_err()
                .to_string();
            assert!(
                error.contains(name) && error.contains("not available yet; expected one of auto, none"),
                "{error}"
            );
            assert!(parse_args(&args(&format!("m --{} {name}", knob.flag))).is_err());
        }
    }
    let (parser, _) = by_flag("tool-call-parser").unwrap();
    assert!(parser.to_come.contains(&"qwen3_coder"));
}

/// Any knob with any value in its range.
fn setting() -> impl Strategy<Value = (String, serde_json::Value)> {
    prop::sample::select(TABLE).prop_flat_map(|knob| {
        let key = knob.yaml_key();
        let value = match knob.kind {
            Kind::Bool => any::<bool>().prop_map(|b| json!(b)).boxed(),
            Kind::Int { min, max } => (min..=max).prop_map(|i| json!(i)).boxed(),
            Kind::Float { min, max } => (min..=max).prop_map(|x| json!(x)).boxed(),
            Kind::Str => "[a-z/ =\"-]{0,8}[a-z]".prop_map(|s| json!(s)).boxed(),
            Kind::Enum(names) => prop::sample::select(names).prop_map(|s| json!(s)).boxed(),
            Kind::Json => "[a-z\"]{0,4}"
                .prop_map(|s| json!({ s.clone(): [s, 1, null] }))
                .boxed(),
        };
        value.prop_map(move |v| (key.clone(), v))
    })
}

proptest! {
    #[test]
    fn argv_made_from_yaml_parses_to_the_same_settings(map in prop::collection::btree_map(any::<u8>(), setting(), 0..12)) {
        let mut settings = Settings::new();
        for (key, value) in map.values() {
            settings.set_yaml(key, value).unwrap();
        }
        let mut argv = vec!["some/model".to_owned()];
        argv.extend(settings.to_argv());
        match parse_args(&argv) {
            Ok(parsed) => {
                prop_assert_eq!(&parsed.settings, &settings);
                prop_assert_eq!(parsed.knobs, settings.resolve().unwrap());
            }
            Err(e) => prop_assert_eq!(Err(e), settings.resolve()),
        }
    }

    #[test]
    fn no_command_line_panics(argv in prop::collection::vec("(--)?[a-z=0-9 {}-]{0,20}", 0..6)) {
        let _ = parse_command(&argv);
        let _ = parse_args(&argv);
    }
}

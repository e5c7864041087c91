//! Flags get where they are meant to.

use std::process::Command;

use api_types::control::CONTROL_ENV;

use super::support::*;

/// MLX reads its variables when it is first used: they are there before, under the same process id.
#[test]
#[cfg(target_os = "linux")]
fn mlx_variables_are_in_the_environment_from_the_start() {
    let flags = ["--mlx-max-ops-per-buffer", "17", "--mlx-max-mb-per-buffer=23"];
    let mut worker = Worker::supervised(&demo(), &flags);
    let (_, ready) = worker.ready();
    assert_eq!(ready["limits"]["mlx_max_ops_per_buffer"], 17);
    assert_eq!(ready["limits"]["mlx_max_mb_per_buffer"], 23);
    let environment = std::fs::read(format!("/proc/{}/environ", worker.child.id())).unwrap();
    let environment = String::from_utf8_lossy(&environment);
    let variables: Vec<&str> = environment.split('\0').collect();
    for variable in ["MLX_MAX_OPS_PER_BUFFER=17", "MLX_MAX_MB_PER_BUFFER=23"] {
        assert!(variables.contains(&variable), "{variables:?}");
    }
    assert!(variables.contains(&"MLXWORKER_CONTROL=stdin"));
}

/// What a proxy was told of its own log says nothing of the worker's.
#[test]
fn a_log_level_that_is_given_goes_before_the_environment() {
    let said = |variable: &str, arguments: &[&str]| {
        // Ends once it has loaded: there is no kernel on a CPU.
        let mut arguments = arguments.to_vec();
        arguments.extend(["--attention", "kernel", "--download-retries", "3"]);
        let output = program(&demo(), &arguments)
            .env("RUST_LOG", variable)
            .output()
            .unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        (text.contains(" INFO "), text.contains("DEBUG"), text)
    };
    let (info, debug, text) = said("swapd=debug", &[]);
    assert!(info && !debug, "{text}");
    assert!(
        text.contains("--download-retries 3 has no meaning here"),
        "{text}"
    );
    let (info, debug, text) = said("mlxworker=debug,warn", &["--log-level", "info"]);
    assert!(info && !debug, "{text}");
    let (info, _, text) = said("mlxworker=error", &[]);
    assert!(!info, "{text}");
    let (info, _, text) = said("mlxworker=debug", &["--log-level", "warn"]);
    assert!(!info, "{text}");
}

/// A benchmark takes the flags of a worker, and means them.
#[test]
fn a_benchmark_minds_the_flags_of_serve() {
    let output = Command::new(env!("CARGO_BIN_EXE_mlxworker"))
        .arg("bench")
        .arg(demo())
        .args(["--prompt-tokens", "4", "--tokens", "4", "--rounds", "1"])
        .args(["--mlx-max-ops-per-buffer", "17", "--download-retries", "3"])
        .env_remove("RUST_LOG")
        .env_remove(CONTROL_ENV)
        .env("MLX_MAX_OPS_PER_BUFFER", "99")
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{stderr}");
    assert!(
        stderr.contains("--download-retries 3 has no meaning here"),
        "{stderr}"
    );
    assert!(stderr.contains("MLX_MAX_OPS_PER_BUFFER=17"), "{stderr}");
}

//! Every way not to start.

use std::path::Path;
use std::process::Command;

use super::support::*;

#[test]
fn what_cannot_be_loaded_is_named() {
    let write = |name: &'static str, text: &'static str| {
        move |folder: &Path| std::fs::write(folder.join(name), text).unwrap()
    };
    let remove = |name: &'static str| move |folder: &Path| std::fs::remove_file(folder.join(name)).unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    type Case<'a> = (&'a [&'a str], Box<dyn FnOnce(&Path)>, &'a [&'a str]);
    let cases: [Case<'_>; 13] = [
        (&[], Box::new(remove("config.json")), &["config.json"]),
        (
            &[],
            Box::new(write("config.json", "{\"model_type\": \"mamba\"}")),
            &["config.json", "mamba"],
        ),
        (&[], Box::new(remove("tokenizer.json")), &["tokenizer.json"]),
        (&[], Box::new(write("tokenizer.json", "{}")), &["tokenizer.json"]),
        (
            &[],
            Box::new(write("tokenizer_config.json", "{")),
            &["tokenizer_config.json"],
        ),
        (
            &[],
            Box::new(write("generation_config.json", "{\"top_p\": 9}")),
            &["generation_config.json", "top_p: 9"],
        ),
        (
            &[],
            Box::new(write("chat_template.jinja", "{% if %}")),
            &["template", "line 1"],
        ),
        (&[], Box::new(remove("model.safetensors")), &["safetensors"]),
        (
            &[],
            Box::new(|folder: &Path| {
                let path = folder.join("model.safetensors");
                let bytes = std::fs::read(&path).unwrap();
                std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
            }),
            &["model.safetensors"],
        ),
        (
            &["--context-length", "999999"],
            Box::new(|_: &Path| {}),
            &["context-length", "999999", "4096"],
        ),
        (
            &[
                "--kv-cache-quantization",
                "--kv-cache-quantization-group-size",
                "128",
            ],
            Box::new(|_: &Path| {}),
            &[
                "--kv-cache-quantization-group-size 128",
                "head size, 64",
                "32 or 64",
            ],
        ),
        (
            // None on a CPU.
            &["--attention", "kernel"],
            Box::new(|_: &Path| {}),
            &["--attention kernel", "no kernel"],
        ),
        (&["--port", &port], Box::new(|_: &Path| {}), &["--port", &port]),
    ];
    for (arguments, break_it, parts) in cases {
        let (code, message) = start_broken(arguments, break_it);
        assert_eq!(code, Some(1), "{message}");
        for part in parts {
            assert!(message.contains(part), "{part:?} is not in {message:?}");
        }
    }
}

#[test]
fn a_command_line_that_makes_no_sense() {
    for (arguments, part) in [
        (vec!["serve"], "which model"),
        (vec!["serve", "m", "--max-num-seq", "3"], "--max-num-seqs"),
        (vec!["serve", "m", "--draft-model", "x"], "--draft-model"),
        (vec!["sevre"], "serve"),
        (
            vec!["serve", "m", "--attention", "kernel", "--kv-cache-quantization"],
            "--attention kernel and --kv-cache-quantization",
        ),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_mlxworker"))
            .args(&arguments)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(stderr.contains(part), "{arguments:?}: {stderr}");
    }
    let output = Command::new(env!("CARGO_BIN_EXE_mlxworker"))
        .arg("--help")
        .output()
        .unwrap();
    assert!(
        output.status.success()
            && String::from_utf8(output.stdout)
                .unwrap()
                .contains("--max-num-seqs")
    );
}

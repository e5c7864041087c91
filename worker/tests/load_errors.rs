//! Broken model folders: each fault is named, with file and tensor, before anything runs.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    missing_docs
)]

use std::fs;
use std::path::{Path, PathBuf};

use mlxworker::model::{LoadOptions, Model};

const MAPPED: LoadOptions = LoadOptions {
    mapped: true,
    expand: false,
};

/// A copy of a parity fixture to be broken.
fn folder(fixture: &str) -> tempfile::TempDir {
    let from = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/parity")
        .join(fixture);
    let to = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, to.path().join(path.file_name().unwrap())).unwrap();
    }
    to
}

fn error(folder: &Path) -> String {
    Model::load(folder, MAPPED, &mut |_| {})
        .expect_err("a broken model must not load")
        .to_string()
}

#[track_caller]
fn says(message: &str, words: &[&str]) {
    for word in words {
        assert!(message.contains(word), "no {word:?} in: {message}");
    }
}

/// Rewrites the JSON header of a safetensors file; the data stay.
fn rewrite_header(file: &Path, change: impl FnOnce(&mut serde_json::Value)) {
    let bytes = fs::read(file).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    change(&mut header);
    let header = header.to_string();
    let mut changed = (header.len() as u64).to_le_bytes().to_vec();
    changed.extend(header.bytes());
    changed.extend(&bytes[8 + length..]);
    fs::write(file, changed).unwrap();
}

fn weights(folder: &Path) -> PathBuf {
    folder.join("model.safetensors")
}

#[test]
fn missing_files() {
    let broken = folder("dense-f32-tied");
    fs::remove_file(weights(broken.path())).unwrap();
    says(&error(broken.path()), &["no model*.safetensors"]);
    fs::remove_file(broken.path().join("config.json")).unwrap();
    says(&error(broken.path()), &["config.json"]);
    says(&error(Path::new("/nonexistent")), &["/nonexistent/config.json"]);

    let broken = folder("dense-f32-untied-shards");
    fs::remove_file(broken.path().join("model-00002-of-00003.safetensors")).unwrap();
    says(
        &error(broken.path()),
        &["model-00002-of-00003.safetensors", "No such file"],
    );
    // As in a hub cache whose volume is gone.
    let link = broken.path().join("model-00002-of-00003.safetensors");
    std::os::unix::fs::symlink("/mnt/no-such-volume-here/blobs/abc", link).unwrap();
    says(
        &error(broken.path()),
        &[
            "model-00002-of-00003.safetensors",
            "a link to /mnt/no-such-volume-here/blobs/abc, which is not there",
            "/mnt/no-such-volume-here does not exist: is the volume mounted?",
        ],
    );
}

#[test]
fn truncated_and_corrupt_files() {
    let broken = folder("dense-f32-tied");
    let whole = fs::read(weights(broken.path())).unwrap();
    for length in [0, 4, 100, whole.len() / 2, whole.len() - 1] {
        fs::write(weights(broken.path()), &whole[..length]).unwrap();
        let found = error(broken.path());
        says(&found, &["model.safetensors"]);
        assert!(
            found.contains("truncated or corrupt") || found.contains("empty"),
            "{found}"
        );
    }
    let mut longer = whole.clone();
    longer.push(0);
    fs::write(weights(broken.path()), longer).unwrap();
    says(
        &error(broken.path()),
        &["model.safetensors", "truncated or corrupt"],
    );
    let mut noise = whole;
    noise[8..40].fill(0xff);
    fs::write(weights(broken.path()), noise).unwrap();
    says(
        &error(broken.path()),
        &["model.safetensors", "truncated or corrupt"],
    );
}

#[test]
fn missing_tensor() {
    let broken = folder("dense-f32-tied");
    rewrite_header(&weights(broken.path()), |header| {
        let tensor = header["model.norm.weight"].take();
        header.as_object_mut().unwrap().remove("model.norm.weight");
        header["model.other.weight"] = tensor;
    });
    says(
        &error(broken.path()),
        &["model.safetensors", "model.norm.weight", "missing"],
    );

    let broken = folder("moe-f32-untied-original");
    let index = broken.path().join("model.safetensors.index.json");
    let text = fs::read_to_string(&index).unwrap();
    fs::write(&index, "{}").unwrap();
    says(&error(broken.path()), &["index.json", "weight_map"]);
    fs::write(&index, text.replace("model-00001", "../model-00001")).unwrap();
    says(&error(broken.path()), &["index.json", "not a file name"]);
}

#[test]
fn wrong_type_or_shape() {
    let name = "model.layers.1.self_attn.k_norm.weight";
    let broken = folder("dense-f32-tied");
    rewrite_header(&weights(broken.path()), |header| {
        header[name]["dtype"] = "I32".into()
    });
    says(&error(broken.path()), &["model.safetensors", name, "I32", "F32"]);

    let broken = folder("dense-f32-tied");
    rewrite_header(&weights(broken.path()), |header| {
        header[name]["shape"] = serde_json::json!([16, 2])
    });
    says(
        &error(broken.path()),
        &["model.safetensors", name, "[16, 2]", "[32]"],
    );

    // Quantised with other bits than config.json says.
    let broken = folder("dense-8bit-tied");
    let config = broken.path().join("config.json");
    let text = fs::read_to_string(&config)
        .unwrap()
        .replace("\"bits\": 8", "\"bits\": 4");
    fs::write(&config, text).unwrap();
    says(
        &error(broken.path()),
        &[
            "model.safetensors",
            "model.embed_tokens.weight",
            "[128, 16]",
            "[128, 8]",
        ],
    );
}

#[test]
fn unknown_architecture() {
    let broken = folder("dense-f32-tied");
    let config = broken.path().join("config.json");
    let text = fs::read_to_string(&config)
        .unwrap()
        .replace("\"qwen3\"", "\"mamba2\"");
    fs::write(&config, text).unwrap();
    says(
        &error(broken.path()),
        &["config.json", "model_type", "mamba2", "qwen3_moe"],
    );
}

/// Tensors at odd addresses cannot be views of the mapped file; they are copied and counted.
#[test]
fn odd_addresses_are_copied() {
    let odd = folder("moe-4bit-tied");
    let plain = Model::load(odd.path(), MAPPED, &mut |_| {}).unwrap();
    let file = weights(odd.path());
    // A header longer by one byte each time moves all data by one.
    let mut copied = Vec::new();
    for spaces in 0..4 {
        let bytes = fs::read(&file).unwrap();
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let mut moved = ((length + 1) as u64).to_le_bytes().to_vec();
        moved.extend(&bytes[8..8 + length]);
        moved.push(b' ');
        moved.extend(&bytes[8 + length..]);
        fs::write(&file, moved).unwrap();
        let model = Model::load(odd.path(), MAPPED, &mut |_| {}).unwrap();
        let total = |model: &Model| model.storage().copied_bytes + model.storage().mapped_bytes;
        assert_eq!(total(&model), total(&plain), "{spaces}");
        copied.push(model.storage().copied_bytes > 0);
    }
    // All tensors of this model have elements of four bytes: one address in four fits.
    assert_eq!(copied.iter().filter(|&&copied| !copied).count(), 1, "{copied:?}");
}

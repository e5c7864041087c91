//! The language of allowed sets: expressions as text are refused or work; expressions made here evict what a listing
//! of every expansion would evict.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use registry::Registry;

const MODELS: [&str; 6] = ["a", "b", "c", "d", "e", "f"];

fn load(sets: &[String]) -> Option<Registry> {
    let models: String = MODELS
        .iter()
        .map(|m| format!("  {m}: {{cmd: 'x', proxy: 'http://127.0.0.1:1'}}\n"))
        .collect();
    let sets: String = sets
        .iter()
        .enumerate()
        .map(|(i, text)| format!("    s{i}: {}\n", serde_json::Value::from(text.as_str())))
        .collect();
    let text = format!("models:\n{models}matrix:\n  sets:\n{sets}");
    Registry::from_yaml(&text, Path::new("/nowhere/c.yaml"))
        .ok()
        .map(|(registry, _)| registry)
}

/// An expression as text, and the sets of models it stands for as bits.
fn grow(bytes: &mut impl Iterator<Item = u8>, depth: u8) -> (String, Vec<u8>) {
    let byte = bytes.next().unwrap_or(0);
    if depth == 0 || byte % 3 == 0 {
        let i = usize::from(byte / 3) % MODELS.len();
        return (MODELS[i].to_owned(), vec![1 << i]);
    }
    let parts: Vec<(String, Vec<u8>)> = (0..2 + byte % 2).map(|_| grow(bytes, depth - 1)).collect();
    let and = byte % 3 == 1;
    let text: Vec<&str> = parts.iter().map(|(text, _)| text.as_str()).collect();
    let text = format!("({})", text.join(if and { " & " } else { "|" }));
    let sets = parts.into_iter().map(|(_, sets)| sets);
    let sets = if and {
        sets.fold(vec![0], |all, more| {
            all.iter().flat_map(|a| more.iter().map(move |b| a | b)).collect()
        })
    } else {
        sets.flatten().collect()
    };
    (text, sets)
}

fn check(registry: &Registry, sets: Option<&[u8]>) {
    for target in 0..MODELS.len() {
        for running in 0_u8..1 << MODELS.len() {
            if running & 1 << target != 0 {
                continue;
            }
            let ids: Vec<&str> = (0..MODELS.len())
                .filter(|i| running & 1 << i != 0)
                .map(|i| MODELS[i])
                .collect();
            let gone = registry.evictions(MODELS[target], &ids);
            assert!(gone.iter().all(|id| ids.contains(id)));
            let Some(sets) = sets else { continue };
            let allowed = || sets.iter().filter(|s| *s & 1 << target != 0);
            let most = allowed().map(|s| (s & running).count_ones()).max().unwrap_or(0);
            let kept = ids.iter().filter(|id| !gone.contains(id));
            let kept = kept.fold(0_u8, |bits, id| {
                bits | 1 << MODELS.iter().position(|m| m == id).unwrap_or(0)
            });
            assert_eq!(kept.count_ones(), most);
            assert!(kept == 0 || allowed().any(|s| s & kept == kept));
        }
    }
}

fuzz_target!(|data: &[u8]| {
    match data.split_first() {
        Some((0, bytes)) if bytes.len() < 64 => {
            let mut bytes = bytes.iter().copied();
            let (first, mut sets) = grow(&mut bytes, 3);
            let (second, more) = grow(&mut bytes, 2);
            sets.extend(more);
            let registry = load(&[first, second]).expect("well-formed");
            check(&registry, Some(&sets));
        }
        Some((_, text)) => {
            let Ok(text) = std::str::from_utf8(text) else {
                return;
            };
            let sets: Vec<String> = text.split('\n').map(str::to_owned).collect();
            if let Some(registry) = load(&sets) {
                check(&registry, None);
            }
        }
        None => {}
    }
});

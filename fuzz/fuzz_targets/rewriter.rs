//! Bodies changed in place, beside the same change of a parsed tree; and the scan of keys that both rest on.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use registry::Filters;
use serde_json::{Map, Value, json};
use swapd::http::extract;
use swapd::jsonscan;
use swapd::rewrite::Rewrite;
use swapd::usage::Meter;

/// Paths as written in a registry, with their steps.
const PATHS: [(&str, &[&str]); 6] = [
    ("a", &["a"]),
    ("b.c", &["b", "c"]),
    ("b", &["b"]),
    ("x\\.y", &["x.y"]),
    ("b.c.d", &["b", "c", "d"]),
    ("é", &["é"]),
];

fn values() -> [Value; 4] {
    [json!(1), json!({"c": [1, "}"], "k": null}), json!("\"\u{1}"), Value::Null]
}

fn set(map: &mut Map<String, Value>, steps: &[&str], value: &Value) {
    match steps {
        [] => {}
        [last] => {
            map.insert((*last).to_owned(), value.clone());
        }
        [first, rest @ ..] => {
            let below = map.entry((*first).to_owned()).or_insert(Value::Null);
            if !below.is_object() {
                *below = json!({});
            }
            set(below.as_object_mut().expect("just made"), rest, value);
        }
    }
}

fn strip(map: &mut Map<String, Value>, steps: &[&str]) {
    match steps {
        [] => {}
        [last] => {
            map.shift_remove(*last);
        }
        [first, rest @ ..] => {
            if let Some(Value::Object(below)) = map.get_mut(*first) {
                strip(below, rest);
            }
        }
    }
}

fn scanned(body: &[u8], tree: &Map<String, Value>) {
    let mut last = Map::new();
    for member in jsonscan::members(body) {
        let member = member.expect("valid JSON");
        let key: String = serde_json::from_slice(&body[member.key]).expect("a key");
        let value: Value = serde_json::from_slice(&body[member.value]).expect("a value");
        last.insert(key, value);
    }
    assert_eq!(&last, tree);
}

fuzz_target!(|data: &[u8]| {
    let Some(([strips, sets, chosen], body)) = data.split_first_chunk::<3>().map(|(a, b)| (*a, b)) else {
        return;
    };
    let mut meter = Meter::default();
    body.chunks(usize::from(chosen) + 1).for_each(|piece| meter.feed(piece));
    let _ = meter.usage();
    let _ = extract::from_body("application/json", &Bytes::copy_from_slice(body));
    let mut filters = Filters::default();
    let mut expected: Option<Map<String, Value>> = serde_json::from_slice(body).ok();
    if let Some(tree) = &expected {
        scanned(body, tree);
    }
    if chosen & 128 != 0
        && let Some(tree) = &mut expected
    {
        tree.insert("model".to_owned(), json!("real"));
    }
    for (i, (path, steps)) in PATHS.iter().enumerate() {
        if strips & 1 << i != 0 {
            filters.strip_params.push((*path).to_owned());
            if let Some(tree) = &mut expected {
                strip(tree, steps);
            }
        }
    }
    for (i, (path, steps)) in PATHS.iter().enumerate() {
        if sets & 1 << i != 0 {
            let value = &values()[usize::from(chosen.rotate_left(i as u32)) % 4];
            filters.set_params.insert((*path).to_owned(), value.clone());
            if let Some(tree) = &mut expected {
                set(tree, steps, value);
            }
        }
    }
    let name = (chosen & 128 != 0).then_some("real");
    let Some(rewrite) = Rewrite::new(&filters, name, "m") else {
        return;
    };
    let result = rewrite.apply(body);
    if let Some(expected) = expected {
        let got: Value = serde_json::from_slice(&result.expect("valid JSON")).expect("still valid");
        assert_eq!(got, Value::Object(expected));
    }
});

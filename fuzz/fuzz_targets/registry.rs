//! Any text as a registry: it is refused with its mistakes named, or it is consistent.
#![no_main]

use libfuzzer_sys::fuzz_target;
use registry::{Options, Registry, Severity, Source};

fuzz_target!(|text: &str| {
    let options = Options {
        env: &|name| (name == "SET").then(|| "value: 1".to_owned()),
        keep_ports: Default::default(),
    };
    let source = Source {
        path: "/nowhere/config.yaml".into(),
        text: text.to_owned(),
    };
    match Registry::from_sources(&[source], &options) {
        Ok((registry, warnings)) => {
            assert!(warnings.iter().all(|w| w.severity != Severity::Error));
            assert!(!registry.to_yaml().is_empty());
            let ids: Vec<&str> = registry.models.keys().map(String::as_str).take(8).collect();
            for target in &ids {
                assert_eq!(registry.model(target).map(|m| m.id.as_str()), Some(*target));
                let running: Vec<&str> = ids.iter().copied().filter(|id| id != target).collect();
                let gone = registry.evictions(target, &running);
                assert!(gone.iter().all(|id| running.contains(id)));
            }
        }
        Err(found) => {
            assert!(found.iter().any(|d| d.severity == Severity::Error));
            for finding in found {
                assert!(!finding.to_string().is_empty());
            }
        }
    }
});

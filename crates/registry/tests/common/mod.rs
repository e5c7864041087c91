//! Reading texts as if they were `/etc/swap/c.yaml`.
#![allow(dead_code, clippy::unwrap_used, clippy::panic, unreachable_pub)]

use std::path::Path;

use registry::{Diagnostic, Options, Registry, Severity, Source, Warning};

pub fn read(
    text: &str,
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<(Registry, Vec<Warning>), Vec<Diagnostic>> {
    let source = Source {
        path: Path::new("/etc/swap/c.yaml").to_owned(),
        text: text.to_owned(),
    };
    Registry::from_sources(
        &[source],
        &Options {
            env,
            ..Options::default()
        },
    )
}

pub fn load_with_warnings(text: &str) -> (Registry, Vec<Warning>) {
    match read(text, &|_| None) {
        Ok(found) => found,
        Err(found) => {
            let lines: Vec<String> = found.iter().map(ToString::to_string).collect();
            panic!("{text}\n{}", lines.join("\n"))
        }
    }
}

pub fn load(text: &str) -> Registry {
    load_with_warnings(text).0
}

pub fn warnings(text: &str) -> Vec<String> {
    load_with_warnings(text)
        .1
        .iter()
        .map(ToString::to_string)
        .collect()
}

/// The errors only, as lines.
pub fn errors(text: &str) -> Vec<String> {
    match read(text, &|_| None) {
        Ok((_, warnings)) => panic!("no error in:\n{text}\n{warnings:?}"),
        Err(found) => found
            .iter()
            .filter(|d| d.severity == Severity::Error)
            .map(ToString::to_string)
            .collect(),
    }
}

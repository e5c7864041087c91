//! Several files as one configuration.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use registry::{Launch, Options, Registry, Routing, Source};

fn sources(texts: &[&str]) -> Result<Registry, Vec<String>> {
    let sources: Vec<Source> = texts
        .iter()
        .enumerate()
        .map(|(i, text)| Source {
            path: PathBuf::from(format!("/d{i}/f{i}.yaml")),
            text: (*text).to_owned(),
        })
        .collect();
    let options = Options {
        env: &|_| None,
        keep_ports: BTreeMap::new(),
    };
    match Registry::from_sources(&sources, &options) {
        Ok((registry, _)) => Ok(registry),
        Err(found) => Err(found.iter().map(ToString::to_string).collect()),
    }
}

#[test]
fn sources_are_merged() {
    let registry = sources(&[
        "logLevel: debug\nmodels:\n  a: {worker: {model: ./m}}\napiKeys: [k1]\nmacros: {x: 1}\nhooks:\n",
        "logLevel: debug\nmodels:\n  b: {worker: {model: ./m}, ttl: '${x}'}\napiKeys: [k2]\nstore: null\nhooks: {on_startup: {preload: [a]}}\n",
        "",
    ])
    .unwrap();
    let place = |id: &str| match &registry.models[id].launch {
        Launch::Worker(worker) => worker.model.clone(),
        Launch::Command(_) => panic!("command"),
    };
    assert_eq!(
        (place("a"), place("b")),
        ("/d0/./m".to_owned(), "/d1/./m".to_owned()),
        "each from its own file"
    );
    assert_eq!(registry.globals.api_keys.len(), 2);
    assert_eq!(registry.models["b"].ttl.unwrap().as_secs(), 1);
    assert_eq!(registry.globals.preload, ["a"]);
}

#[test]
fn sources_must_not_contradict_each_other() {
    let found = sources(&[
        "logLevel: debug\nglobalTTL: 1\nmodels:\n  a: {cmd: 'x ${PORT}'}\nstore: {path: x}\n",
        "logLevel: info\nglobalTTL: [1]\nmodels:\n  a: {cmd: 'x ${PORT}'}\nstore: {path: y}\n",
    ])
    .unwrap_err();
    let wanted = [
        "/d1/f1.yaml:1:11: error: logLevel: sets a different value than /d0/f0.yaml does on line 1",
        "/d1/f1.yaml:2:12: error: globalTTL: sets a different value than /d0/f0.yaml does on line 2",
        "/d1/f1.yaml:4:3: error: models.a: duplicate models \"a\": already defined in /d0/f0.yaml on line 4",
        "/d1/f1.yaml:5:15: error: store.path: sets a different value",
    ];
    for wanted in wanted {
        assert!(
            found.iter().any(|f| f.starts_with(wanted)),
            "{wanted}\n{found:#?}"
        );
    }
    // Errors of all files at once.
    let found = sources(&["a: [", "b: ]"]).unwrap_err();
    assert!(
        found[0].starts_with("/d0/") && found[1].starts_with("/d1/"),
        "{found:?}"
    );
}

#[test]
fn a_directory_is_read_by_name_after_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        std::fs::write(dir.path().join(name), text).unwrap();
        dir.path().join(name)
    };
    std::fs::create_dir(dir.path().join("sub.yaml")).unwrap();
    write("b.yml", "models: {b: {cmd: 'x ${PORT}'}}");
    write("a.yaml", "models: {a: {cmd: 'x ${PORT}'}}");
    write("c.json", "not read");
    let elsewhere = tempfile::tempdir().unwrap();
    let file = elsewhere.path().join("main.yaml");
    std::fs::write(&file, "models: {z: {cmd: 'x ${PORT}'}}").unwrap();
    let options = Options::default();
    let (registry, _) = Registry::from_paths(Some(&file), Some(dir.path()), &options).unwrap();
    assert_eq!(registry.models.keys().collect::<Vec<_>>(), ["z", "a", "b"]);
    let twice =
        Registry::from_paths(Some(&dir.path().join("a.yaml")), Some(dir.path()), &options).unwrap_err();
    assert!(
        twice[0]
            .to_string()
            .contains("is also in the configuration directory"),
        "{twice:?}"
    );
    let gone = Registry::from_paths(Some(Path::new("/nonexistent/c.yaml")), None, &options).unwrap_err();
    assert!(
        gone[0]
            .to_string()
            .starts_with("/nonexistent/c.yaml: error: cannot be read"),
        "{gone:?}"
    );
    assert!(Registry::from_paths(None, Some(Path::new("/nonexistent")), &options).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    /// A configuration cut into two between its models says what the whole says.
    #[test]
    fn two_sources_say_what_one_says(sides in prop::collection::vec(any::<bool>(), 1..8), globals in any::<bool>()) {
        let model = |i: usize| format!("  m{i}: {{cmd: 'x ${{PORT}}', aliases: [a{i}], ttl: {i}}}\n");
        let head = "globalTTL: 5\nmacros: {k: v}\n";
        let part = |side: bool| -> String {
            let mine: String = sides.iter().enumerate().filter(|(_, s)| **s == side).map(|(i, _)| model(i)).collect();
            format!("{}models:\n{mine}", if side == globals { head } else { "" })
        };
        let whole = format!("{head}models:\n{}", (0..sides.len()).map(model).collect::<String>());
        let (mut one, two) = (sources(&[&whole]).unwrap(), sources(&[&part(true), &part(false)]).unwrap());
        // The order of the models is that of the sources; everything else is the same.
        one.models.sort_by(|a, _, b, _| two.models.get_index_of(a).cmp(&two.models.get_index_of(b)));
        let members = |r: &Registry| match &r.routing {
            Routing::Groups(groups) => { let mut m = groups["(default)"].members.clone(); m.sort(); m }
            Routing::Matrix(_) => Vec::new(),
        };
        prop_assert_eq!(members(&one), members(&two));
        prop_assert_eq!(one.models, two.models);
        prop_assert_eq!(one.globals, two.globals);
    }
}

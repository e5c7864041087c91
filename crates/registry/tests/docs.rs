//! The reference page says what the code does.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::path::Path;

#[test]
fn the_page_and_the_code_are_the_same() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/configuration.md");
    let page = registry::configuration_markdown();
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(&file, &page).unwrap();
    }
    let written = std::fs::read_to_string(&file).unwrap_or_default();
    if written != page {
        let line = written.lines().zip(page.lines()).position(|(a, b)| a != b);
        let line = line.map_or_else(|| "at the end".to_owned(), |l| format!("from line {}", l + 1));
        panic!(
            "docs/configuration.md differs {line}; UPDATE_DOCS=1 cargo test -p registry --test docs rewrites it"
        );
    }
}

#[test]
fn the_page_names_every_key_of_the_schema() {
    let page = registry::configuration_markdown();
    let schema = registry::schema();
    let mut seen = 0;
    let mut objects = vec![&schema];
    objects.extend(schema["definitions"].as_object().unwrap().values());
    for object in objects {
        for key in object["properties"]
            .as_object()
            .into_iter()
            .flat_map(|p| p.keys())
        {
            assert!(page.contains(&format!("`{key}`")), "{key}");
            seen += 1;
        }
    }
    assert!(seen > 100, "{seen}");
}

//! The tree against serde_yaml, and places.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::{Data, parse, plain};
use crate::diagnostic::Findings;

fn tree(text: &str) -> super::Node {
    let mut findings = Findings::default();
    let tree = parse(text, 0, &mut findings, &|line, column| (line, column));
    tree.unwrap_or_else(|| panic!("{text}\n{:?}", findings.finish()))
}

#[test]
fn plain_scalars_have_the_core_schemas_types() {
    let int = |text: &str| match plain(text) {
        Data::Int(i, raw) => {
            assert_eq!(&*raw, text);
            Some(i)
        }
        _ => None,
    };
    assert_eq!(int("12"), Some(12));
    assert_eq!(int("-3"), Some(-3));
    assert_eq!(int("+3"), Some(3));
    assert_eq!(int("0x1F"), Some(31));
    assert_eq!(int("0o17"), Some(15));
    assert_eq!(int("0b11"), Some(3));
    assert_eq!(int("1_000"), None);
    for float in [
        "1.5",
        ".5",
        "-1e3",
        "1.",
        "1E-2",
        "123456789012345678901234567890",
    ] {
        assert!(matches!(plain(float), Data::Float(..)), "{float}");
    }
    for text in [
        "yes", "1.2.3", "-", ".", "e3", "0x", "0xg", "0x-1", "inf", "nan", ".inf", "1e999", "12:30", "+",
        "v1",
    ] {
        assert!(matches!(plain(text), Data::Str(_)), "{text}");
    }
    for null in ["", "~", "null"] {
        assert!(matches!(plain(null), Data::Null), "{null:?}");
    }
}

#[test]
fn quotes_and_tags_make_text() {
    let tree = tree("a: '1'\nb: \"true\"\nc: !!str 5\nd: !!int '7'\ne: |\n  x\n  y\nf: !other 3\n");
    assert_eq!(
        tree.json(),
        json!({"a": "1", "b": "true", "c": "5", "d": 7, "e": "x\ny\n", "f": 3})
    );
}

#[test]
fn every_key_and_value_knows_its_place() {
    let tree = tree("a:\n  - x\n  - {b: 1,   ü: [2]}\n'q r': |\n  text\n");
    let [a, q] = tree.entries() else {
        panic!("two keys")
    };
    assert_eq!((a.at.line, a.at.column), (1, 1));
    let [x, map] = a.value.items() else {
        panic!("two items")
    };
    assert_eq!((x.at.line, x.at.column), (2, 5));
    let [b, u] = map.entries() else { panic!("two keys") };
    assert_eq!((b.at.line, b.at.column), (3, 6));
    assert_eq!((b.value.at.line, b.value.at.column), (3, 9));
    assert_eq!((u.at.line, u.at.column), (3, 14));
    assert_eq!(
        (u.value.items()[0].at.line, u.value.items()[0].at.column),
        (3, 18)
    );
    assert_eq!((q.at.line, q.at.column), (4, 1));
}

fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(|b| json!(b)),
        any::<i64>().prop_map(|i| json!(i)),
        (-1e6..1e6f64).prop_map(|x| json!(x)),
        "[ -~\n\u{e9}\u{4e2d}]{0,12}".prop_map(|s| json!(s)),
        "(true|null|0x1|1e3|~|- a|a: b|#c|'|\"|<<|\\*a|&a|!x|%d|@|`| x|x )".prop_map(|s| json!(s)),
    ];
    leaf.prop_recursive(3, 24, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(|v| json!(v)),
            prop::collection::btree_map("[a-z .:#-]{1,6}", inner, 0..4).prop_map(|m| json!(m)),
        ]
    })
}

proptest! {
    #[test]
    fn what_serde_yaml_writes_is_read_back(map in prop::collection::btree_map("[a-z]{1,4}", value(), 0..4)) {
        let value = json!(map);
        let text = serde_yaml::to_string(&value).unwrap();
        prop_assert_eq!(tree(&text).json(), value, "{}", text);
    }

    #[test]
    fn json_is_yaml(map in prop::collection::btree_map("[a-z]{1,4}", value(), 0..4), pretty in any::<bool>()) {
        let value = json!(map);
        let text = if pretty { serde_json::to_string_pretty(&value) } else { serde_json::to_string(&value) }.unwrap();
        prop_assert_eq!(tree(&text).json(), value, "{}", text);
    }
}

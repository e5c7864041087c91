//! Names, selectors, profiles, peers, keys, hooks.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use common::{errors, load, load_with_warnings, warnings};
use registry::{Strategy, Target};

const MODELS: &str =
    "models:\n  a: {cmd: 'x ${PORT}', aliases: [al, be]}\n  b: {cmd: 'x ${PORT}'}\n  c: {cmd: 'x ${PORT}'}\n";

#[test]
fn no_name_stands_for_two_models() {
    let found = errors(
        "models:\n  a: {cmd: 'x ${PORT}', aliases: [x, b, x]}\n  b: {cmd: 'x ${PORT}', aliases: [x]}\n  \
         c: {cmd: 'x ${PORT}', filters: {setParamsByID: {a: {}}}}\n  d: {cmd: 'x ${PORT}', aliases: ['']}\n",
    );
    assert_eq!(
        found[0],
        "/etc/swap/c.yaml:2:38: error: models.a.aliases[1]: `b` is the id of a model: an alias would hide it or be hidden"
    );
    assert_eq!(
        found[1],
        "/etc/swap/c.yaml:2:41: error: models.a.aliases[2]: duplicate alias `x` in the model itself"
    );
    assert_eq!(
        found[2],
        "/etc/swap/c.yaml:3:35: error: models.b.aliases[0]: duplicate alias `x`: model `a` has it too"
    );
    assert!(found[3].starts_with(
        "/etc/swap/c.yaml:4:51: error: models.c.filters.setParamsByID.a: `a` is the id of a model"
    ));
    assert!(found[4].contains("models.d.aliases[0]: an alias must not be empty"));
    assert_eq!(found.len(), 5);
    assert!(
        warnings("models: {a: {cmd: 'x ${PORT}', aliases: [a]}}")[0].contains("is the model's id already")
    );
}

#[test]
fn every_name_leads_somewhere() {
    let registry = load(&format!(
        "{MODELS}selectors:\n  s: {{strategy: pin, targets: [al, p/far]}}\npeers:\n  \
         p: {{proxy: 'https://h/v/', models: [far, b, both, 'org/deep'], apiKey: k}}\n  q: {{proxy: 'http://h', models: [both]}}\n"
    ));
    let id = |name: &str| match registry.find(name) {
        Some(Target::Model(model)) => format!("model {}", model.id),
        Some(Target::Selector(selector)) => format!("selector {:?}", selector.targets),
        Some(Target::Peer { peer_id, model, peer }) => format!("{peer_id}@{} {model}", peer.proxy),
        None => "nothing".to_owned(),
    };
    assert_eq!(id("a"), "model a");
    assert_eq!(id("al"), "model a");
    assert_eq!(id("s"), "selector [\"al\", \"p/far\"]");
    assert_eq!(id("p/far"), "p@https://h/v far");
    assert_eq!(id("far"), "p@https://h/v far");
    assert_eq!(id("b"), "model b", "local goes before a peer");
    assert_eq!(id("p/b"), "p@https://h/v b");
    assert_eq!(
        id("both"),
        "p@https://h/v both",
        "two peers have it: the first is asked first"
    );
    assert_eq!(id("q/both"), "q@http://h both");
    assert_eq!(id("p/org/deep"), "p@https://h/v org/deep");
    assert_eq!(id("nope"), "nothing");
    assert!(
        !format!("{:?}", registry.peers["p"]).contains("\"k\""),
        "keys do not show"
    );
}

#[test]
fn selectors_are_checked() {
    let registry = load(&format!(
        "{MODELS}selectors:\n  s:\n    strategy: spillover\n    targets: [b, c]\n    settings: {{spillover: 3}}\n    metadata: {{k: 1}}\n    \
         unlisted: true\ngroups: {{g: {{swap: false, members: [b, c]}}}}\n"
    ));
    let s = &registry.selectors["s"];
    assert_eq!(
        (s.strategy, s.spillover, s.unlisted),
        (Strategy::Spillover, 3, true)
    );

    let found = errors(&format!(
        "{MODELS}selectors:\n  a: {{strategy: pin, targets: [b]}}\n  al: {{strategy: pin, targets: [b]}}\n  \
         s: {{strategy: best, targets: [b]}}\n  t: {{strategy: warm, targets: [s, p/x, nope, b, b]}}\n  \
         u: {{strategy: pin, targets: []}}\n  v: {{targets: [b]}}\n  w: {{strategy: pin}}\n  \
         x: {{strategy: spillover, targets: [b, c]}}\n  p/x: {{strategy: pin, targets: [b]}}\npeers: {{p: {{proxy: 'http://h', models: [x]}}}}\n"
    ));
    for text in [
        "selectors.a: `a` is already the id of a model",
        "selectors.al: `al` is already an alias of model `a`",
        "selectors.s.strategy: expected one of pin, warm, spillover, found text (`best`)",
        "selectors.t.targets[0]: `s` is a selector: selectors do not lead to selectors",
        "selectors.t.targets[1]: `p/x` is a peer's model: whether it is loaded cannot be known, as `warm` needs",
        "selectors.t.targets[2]: references unknown model `nope`",
        "selectors.t.targets[4]: `b` is listed twice",
        "selectors.u.targets: needs at least one target",
        "selectors.v.strategy: is missing",
        "selectors.w.targets: is missing",
        "selectors.x.targets: `b`, `c` cannot be in memory together, as `spillover` needs",
        "selectors.p/x: `p/x` is already a model of a peer",
    ] {
        assert!(found.iter().any(|f| f.contains(text)), "{text}\n{found:#?}");
    }
    assert_eq!(found.len(), 12, "{found:#?}");
}

#[test]
fn spillover_over_peers_needs_no_room_here() {
    load(&format!(
        "{MODELS}selectors: {{s: {{strategy: spillover, targets: [b, p/x]}}}}\npeers: {{p: {{proxy: 'http://h', models: [x]}}}}\n"
    ));
}

#[test]
fn profiles_pin_names() {
    let registry = load(&format!(
        "{MODELS}profiles:\n  work:\n    description: d\n    pins: {{gpt-4: al, off: null, none: ''}}\n"
    ));
    let pins = &registry.profiles["work"].pins;
    assert_eq!(pins["gpt-4"].as_deref(), Some("al"));
    assert_eq!((&pins["off"], &pins["none"]), (&None, &None));
    let found = errors(&format!(
        "{MODELS}profiles:\n  p: {{pins: {{x: nope}}}}\n  q: {{pins: {{}}}}\n  r: {{}}\n  old: [a, b]\n  s: {{pins: {{'': a}}}}\n"
    ));
    for text in [
        "profiles.p.pins.x: references unknown model `nope`",
        "profiles.q.pins: needs at least one entry",
        "profiles.r.pins: is missing",
        "profiles.old: expected a mapping, found a list; lists of models are the old form",
        "profiles.s.pins.: a name must not be empty",
    ] {
        assert!(found.iter().any(|f| f.contains(text)), "{text}\n{found:#?}");
    }
}

#[test]
fn peers_are_checked() {
    let registry = load(
        "peers: {p: {proxy: 'http://h:1/base', models: [m], timeouts: {connect: 5}, filters: {stripParams: a}}}",
    );
    let peer = &registry.peers["p"];
    assert_eq!(peer.timeouts.response_header.unwrap().as_secs(), 60);
    assert_eq!(peer.timeouts.connect.unwrap().as_secs(), 5);
    assert_eq!(peer.filters.strip_params, ["a"]);
    assert_eq!((peer.refresh, peer.priority), (None, 0));
    let registry = load(
        "peers: {p: {proxy: 'http://h', refresh: 1}, q: {proxy: 'http://i', models: [m], priority: 2}, r: {proxy: 'http://j', models: [m], priority: 3}}\n\
         selectors: {s: {strategy: pin, targets: [p/anything, m]}}",
    );
    let peer = &registry.peers["p"];
    assert_eq!((peer.refresh.unwrap().as_secs(), peer.models.len()), (5, 0));
    assert!(matches!(
        registry.find("m"),
        Some(Target::Peer { peer_id: "r", .. })
    ));
    let found = errors(
        "models: {p/m: {cmd: 'x ${PORT}'}}\npeers:\n  p: {proxy: 'http://h', models: [m]}\n  q: {models: [m]}\n  \
         r: {proxy: nonsense, models: []}\n  s: {proxy: 'http://h'}\n",
    );
    for text in [
        "peers.p.models[0]: `p/m` is already the id of a model",
        "peers.q.proxy: is missing",
        "peers.r.proxy: `nonsense` is not an address",
        "peers.r.models: needs at least one model, or `refresh`",
        "peers.s.models: is missing, and so is `refresh`",
    ] {
        assert!(found.iter().any(|f| f.contains(text)), "{text}\n{found:#?}");
    }
    let found =
        errors("peers: {a: {proxy: 'http://h', models: [b/c]}, a/b: {proxy: 'http://h', models: [c]}}");
    assert!(
        found[0].contains("`a/b/c` is already a model of a peer"),
        "{found:?}"
    );
}

#[test]
fn preload_follows_aliases_and_survives_unknown_names() {
    let (registry, found) = load_with_warnings(&format!(
        "{MODELS}hooks: {{on_startup: {{preload: [' be ', a, nope, b]}}}}\napiKeys: [k1, {{key: k2, models: [a, zzz]}}]\n"
    ));
    assert_eq!(registry.globals.preload, ["a", "b"]);
    assert_eq!(
        registry.globals.api_keys[1].models.as_deref().unwrap(),
        ["a", "zzz"]
    );
    assert!(
        found[0]
            .to_string()
            .contains("hooks.on_startup.preload[2]: is left out: references unknown model `nope`")
    );
    assert!(
        found[1]
            .to_string()
            .contains("apiKeys[1].models[1]: references unknown model `zzz`")
    );
    assert!(found.iter().all(|w| w.fails_check(false) && !w.fails_check(true)));
}

#[test]
fn api_keys_are_checked_and_never_shown() {
    let found = errors("apiKeys: ['', 'a b', {models: [x]}, null]\n");
    assert!(found[0].contains("apiKeys[0]: empty api key"));
    assert!(found[1].contains("apiKeys[1]: an api key cannot contain spaces"));
    assert!(found[2].contains("apiKeys[2].key: is missing"));
    assert!(found[3].contains("apiKeys[3]: empty api key"));
    for (key, why) in [
        ("''", "expected text"),
        ("a b", "spaces"),
        (r#""a\x01b""#, "control characters"),
    ] {
        let found = errors(&format!(
            "models: {{m: {{worker: {{model: a/b, apiKey: {key}}}}}}}\n"
        ));
        assert!(
            found[0].contains("models.m.worker.apiKey: ") && found[0].contains(why),
            "{found:?}"
        );
    }
    let registry = load("apiKeys: [hunter2, 12345, hunter2]");
    assert_eq!(registry.globals.api_keys.len(), 2);
    assert_eq!(registry.globals.api_keys[1].key, "12345");
    assert!(!format!("{registry:?}").contains("hunter2") && !registry.to_yaml().contains("hunter2"));
}

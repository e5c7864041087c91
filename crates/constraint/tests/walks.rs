//! Random walks over a small vocabulary: what they write is what was asked for.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    missing_docs
)]

use std::sync::OnceLock;

use constraint::{Calls, Form, Grammars, Opening, Thinking, Token, Walk};
use proptest::prelude::*;
use serde_json::{Map, Value, json};

/// Tokens of more than a byte; two of them write the same.
const LONGER: [&str; 20] = [
    "{\"", "\": ", "\", \"", "\":", "},", "[[", "true", "fal", "null", "12", "-1", "\n\n", "\n", "yes", "no",
    "é", " the", "ab", "ab", "<think>",
];
const THINK: u32 = 256 + 19;
const UNTHINK: u32 = 256 + 20;
const CALL: u32 = 256 + 21;
const STOP: u32 = 256 + 22;
const ABSENT: u32 = 256 + 23;
const OTHER: u32 = 256 + 24;
const COUNT: u32 = 256 + 25;

fn word(id: u32) -> Vec<u8> {
    match id {
        0..256 => vec![u8::try_from(id).unwrap()],
        UNTHINK => b"</think>".to_vec(),
        CALL => b"<tool_call>".to_vec(),
        STOP | OTHER => b"<|end|>".to_vec(),
        ABSENT => Vec::new(),
        id => LONGER[id as usize - 256].as_bytes().to_vec(),
    }
}

fn grammars() -> &'static Grammars {
    static SHARED: OnceLock<Grammars> = OnceLock::new();
    SHARED.get_or_init(|| {
        let words: Vec<Vec<u8>> = (0..COUNT).map(word).collect();
        let token = |(id, word)| match id {
            STOP | OTHER => Token::Special(word),
            ABSENT => Token::Absent,
            _ => Token::Text(word),
        };
        Grammars::new((0..).zip(words.iter().map(Vec::as_slice)).map(token)).unwrap()
    })
}

fn walk(form: &Form) -> Walk {
    grammars()
        .compile(form)
        .unwrap()
        .walk(Opening::default(), &[STOP])
}

fn ids(walk: &mut Walk) -> Vec<u32> {
    let allowed = walk.allowed().unwrap().expect("constrained");
    let ids: Vec<u32> = (0..COUNT + 40).filter(|id| allowed.has(*id)).collect();
    let mut flags = vec![true; COUNT as usize + 40];
    allowed.fill(&mut flags);
    let filled = (0..).zip(&flags).filter(|(_, flag)| **flag);
    assert!(filled.map(|(id, _)| id).eq(ids.iter().copied()));
    ids
}

/// Writes on, at first anything, then what brings it to an end; the text.
fn finish(walk: &mut Walk, random: &mut fastrand::Rng, patience: usize) -> String {
    let mut text = Vec::new();
    for step in 0..20_000 {
        let ids = ids(walk);
        assert!(
            !ids.contains(&ABSENT) && !ids.contains(&OTHER) && !ids.contains(&COUNT),
            "{ids:?}"
        );
        let closing = |id: &&u32| "\"}]".bytes().any(|byte| u32::from(byte) == **id);
        let id = match ids.iter().find(closing) {
            Some(&id) if step > patience => id,
            _ if ids.contains(&STOP) && (step > patience || random.u8(..4) == 0) => STOP,
            _ => ids[random.usize(..ids.len())],
        };
        if id == STOP {
            return String::from_utf8(text).expect("whole characters");
        }
        text.extend(word(id));
        if walk.take(id).unwrap() {
            return String::from_utf8(text).expect("whole characters");
        }
    }
    panic!("no end: {}", String::from_utf8_lossy(&text));
}

/// A schema of the kinds that [`valid`] knows.
fn schemas() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(json!({"type": "boolean"})),
        Just(json!({"type": "null"})),
        (-50_i64..50, 0_i64..60).prop_map(|(least, more)| {
            json!({"type": "integer", "minimum": least, "maximum": least + more})
        }),
        (0_usize..3, 0_usize..6).prop_map(|(least, more)| {
            json!({"type": "string", "minLength": least, "maxLength": least + more})
        }),
        Just(json!({"enum": ["é\"\\", 1, null, [true], {"a": "b"}]})),
        Just(json!({"type": "number", "minimum": -2.5, "maximum": 9})),
    ];
    leaf.prop_recursive(3, 12, 4, |inner| {
        prop_oneof![
            (inner.clone(), 0_usize..2, 0_usize..3).prop_map(|(items, least, more)| {
                json!({"type": "array", "items": items, "minItems": least, "maxItems": least + more})
            }),
            prop::collection::vec((inner.clone(), any::<bool>()), 0..4).prop_map(|members| {
                let (mut properties, mut required) = (Map::new(), Vec::new());
                for (n, (schema, needed)) in members.into_iter().enumerate() {
                    let name = ["a", "é b", "c\"", "d"][n];
                    properties.insert(name.to_owned(), schema);
                    required.extend(needed.then_some(name));
                }
                json!({"type": "object", "properties": properties, "required": required,
                       "additionalProperties": false})
            }),
            (inner.clone(), inner).prop_map(|(one, other)| json!({"anyOf": [one, other]})),
        ]
    })
}

fn valid(value: &Value, schema: &Value) -> bool {
    let bound = |key: &str, holds: &dyn Fn(f64) -> bool| schema[key].as_f64().is_none_or(holds);
    if let Some(options) = schema["anyOf"].as_array() {
        return options.iter().any(|option| valid(value, option));
    }
    if let Some(values) = schema["enum"].as_array() {
        return values.contains(value);
    }
    match schema["type"].as_str().unwrap() {
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        kind @ ("integer" | "number") => value.as_f64().is_some_and(|number| {
            (kind == "number" || number.fract() == 0.0)
                && bound("minimum", &|least| number >= least)
                && bound("maximum", &|most| number <= most)
        }),
        "string" => value.as_str().is_some_and(|text| {
            let length = text.chars().count() as f64;
            bound("minLength", &|least| length >= least) && bound("maxLength", &|most| length <= most)
        }),
        "array" => value.as_array().is_some_and(|items| {
            let length = items.len() as f64;
            bound("minItems", &|least| length >= least)
                && bound("maxItems", &|most| length <= most)
                && items.iter().all(|item| valid(item, &schema["items"]))
        }),
        "object" => value.as_object().is_some_and(|members| {
            let known = members.iter().all(|(name, member)| {
                schema["properties"]
                    .get(name)
                    .is_some_and(|inner| valid(member, inner))
            });
            let required = schema["required"].as_array().unwrap();
            known
                && required
                    .iter()
                    .all(|name| members.contains_key(name.as_str().unwrap()))
        }),
        other => panic!("{other}"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn what_is_written_is_valid_under_the_schema(schema in schemas(), seed in any::<u64>()) {
        let constraint = grammars().compile(&Form::JsonSchema(schema.clone())).unwrap();
        let mut random = fastrand::Rng::with_seed(seed);
        for patience in [0, 30, 200] {
            let text = finish(&mut constraint.walk(Opening::default(), &[STOP]), &mut random, patience);
            let value: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text} under {schema}"));
            prop_assert!(valid(&value, &schema), "{} under {}", text, schema);
        }
    }

    #[test]
    fn what_is_written_matches(seed in any::<u64>(), which in 0_usize..5) {
        let text = [
            r"^\d{3}-[a-c]+(é|yes)?$", r"ab(ab)*|no\$", r"[^a-z]{2,4}", r"(?i)yes|/\w/", "line\\n+",
        ][which];
        let found = finish(&mut walk(&Form::Regex(text.to_owned())), &mut fastrand::Rng::with_seed(seed), 40);
        let whole = regex::Regex::new(&format!("^(?:{text})$")).unwrap();
        prop_assert!(whole.is_match(&found), "{:?} of {}", found, text);
    }

    #[test]
    fn one_of_the_choices(choices in prop::collection::hash_set("[a-c\"\\\\.+ é/\n]{1,6}", 1..8), seed in any::<u64>()) {
        let choices: Vec<String> = choices.into_iter().collect();
        let constraint = grammars().compile(&Form::Choice(choices.clone())).unwrap();
        let mut random = fastrand::Rng::with_seed(seed);
        for _ in 0..8 {
            let text = finish(&mut constraint.walk(Opening::default(), &[STOP]), &mut random, 100);
            prop_assert!(choices.contains(&text), "{:?} of {:?}", text, choices);
        }
        // And each of them can be written.
        for text in &choices {
            let mut walk = constraint.walk(Opening::default(), &[STOP]);
            let mut over = false;
            for byte in text.bytes() {
                prop_assert!(!over && ids(&mut walk).contains(&u32::from(byte)));
                over = walk.take(u32::from(byte)).unwrap();
            }
            prop_assert!(over || ids(&mut walk).contains(&STOP), "{:?}", text);
        }
    }
}

#[test]
fn any_object_but_nothing_else() {
    for seed in 0..20 {
        let text = finish(
            &mut walk(&Form::JsonObject),
            &mut fastrand::Rng::with_seed(seed),
            50,
        );
        let value: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
        assert!(value.is_object(), "{text}");
    }
    assert_eq!(ids(&mut walk(&Form::JsonObject)), [u32::from(b'{'), 256]);
}

#[test]
fn a_grammar_of_ones_own() {
    let sum = "start: term (\"+\" term)*\nterm: /[0-9]{1,3}/ | \"(\" start \")\"\n";
    for seed in 0..20 {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut walk = walk(&Form::Grammar(sum.to_owned()));
        let (mut text, mut depth) = (String::new(), 0_i32);
        for _ in 0..60 {
            let ids = ids(&mut walk);
            assert_eq!(
                ids.contains(&STOP),
                depth == 0 && text.ends_with(|c: char| c.is_ascii_digit() || c == ')'),
                "{text:?}"
            );
            let id = ids[random.usize(..ids.len())];
            if id == STOP {
                break;
            }
            text.push_str(&String::from_utf8(word(id)).unwrap());
            depth = text.matches('(').count() as i32 - text.matches(')').count() as i32;
            assert!(depth >= 0 && !walk.take(id).unwrap(), "{text:?}");
        }
    }
}

fn take(walk: &mut Walk, text: &str) -> bool {
    text.bytes()
        .map(|byte| walk.take(u32::from(byte)).unwrap())
        .last()
        .unwrap()
}

#[test]
fn the_end_is_allowed_exactly_where_the_text_may_end() {
    let form = Form::Regex("(ab)+".to_owned());
    let constraint = grammars().compile(&form).unwrap();
    // A request's own stop token may be text, too; and one that the vocabulary does not have changes nothing.
    let mut walk = constraint.walk(Opening::default(), &[STOP, u32::from(b'a'), 70_000]);
    assert_eq!(
        ids(&mut walk),
        [256 + 17, 256 + 18],
        "both tokens of the same text"
    );
    assert!(!walk.take(256 + 18).unwrap());
    let next = ids(&mut walk);
    assert_eq!(next, [u32::from(b'a'), 256 + 17, 256 + 18, STOP]);

    // Where the reply is to go on it does not end, but where there is nothing else.
    let mut rather = walk.allowed().unwrap().unwrap();
    rather.rather_not(&[STOP, COUNT + 1]);
    assert!(!rather.has(STOP) && rather.has(u32::from(b'a')));
    rather.rather_not(&next);
    assert!(rather.has(u32::from(b'a')));

    let mut unending = constraint.walk(Opening::default(), &[]);
    take(&mut unending, "ab");
    assert_eq!(ids(&mut unending), [u32::from(b'a'), 256 + 17, 256 + 18]);
}

#[test]
fn walks_of_one_form_are_independent() {
    let constraint = grammars()
        .compile(&Form::Choice(vec!["yes!".into(), "no?".into()]))
        .unwrap();
    let mut one = constraint.walk(Opening::default(), &[STOP]);
    let mut other = constraint.walk(Opening::default(), &[STOP]);
    take(&mut one, "ye");
    take(&mut other, "n");
    assert_eq!(ids(&mut one), [u32::from(b's')]);
    assert_eq!(ids(&mut other), [u32::from(b'o')]);
    assert!(take(&mut one, "s!"));
    let error = other.take(u32::from(b'x')).unwrap_err();
    assert!(!error.to_string().is_empty());
    assert!(other.allowed().is_err(), "an error stays");
}

#[test]
fn line_breaks_that_the_text_begins_with_are_the_texts() {
    let constraint = grammars().compile(&Form::Regex("\n+yes".to_owned())).unwrap();
    let opening = Opening {
        thinking: Thinking::Inside { close: UNTHINK },
        instead: Some(CALL),
    };
    let mut walk = constraint.walk(opening, &[STOP]);
    assert!(!walk.take(UNTHINK).unwrap());
    assert!(ids(&mut walk).contains(&CALL));
    assert!(!walk.take(u32::from(b'\n')).unwrap());
    assert!(!ids(&mut walk).contains(&CALL), "the text has begun");
}

#[test]
fn reasoning_comes_first_and_is_free() {
    let constraint = grammars().compile(&Form::Choice(vec!["yes".into()])).unwrap();
    let yes = [u32::from(b'y'), 256 + 13];
    let inside_opening = || Opening {
        thinking: Thinking::Inside { close: UNTHINK },
        instead: Some(CALL),
    };
    let mut inside = constraint.walk(inside_opening(), &[STOP]);
    // Everything but the end of the reply.
    assert_eq!(
        ids(&mut inside),
        (0..COUNT).filter(|id| *id != STOP).collect::<Vec<_>>()
    );
    for id in [u32::from(b'x'), CALL, THINK, UNTHINK] {
        assert!(inside.is_constrained() && !inside.take(id).unwrap());
    }
    // Line breaks, once; then the answer, or a call in its place.
    let breaks = [u32::from(b'\n'), u32::from(b'\r'), 256 + 11, 256 + 12];
    let mut expected = [yes.as_slice(), &breaks, &[CALL]].concat();
    expected.sort_unstable();
    assert_eq!(ids(&mut inside), expected);
    let mut direct = constraint.walk(inside_opening(), &[STOP]);
    assert!(!direct.take(UNTHINK).unwrap() && !direct.take(CALL).unwrap());
    assert!(!direct.is_constrained());
    // After the breaks still either of them, as in the layout that models have learnt.
    assert!(!inside.take(256 + 11).unwrap());
    let mut either = [yes.as_slice(), &[CALL]].concat();
    either.sort_unstable();
    assert_eq!(ids(&mut inside), either);
    let mut called = constraint.walk(inside_opening(), &[STOP]);
    for id in [UNTHINK, 256 + 11, CALL, 7] {
        assert!(!called.take(id).unwrap());
    }
    assert!(!called.is_constrained() && called.allowed().unwrap().is_none());
    assert!(inside.take(256 + 13).unwrap());
    assert!(!ids(&mut inside).contains(&CALL), "the text has been written");

    let may = Thinking::May {
        open: THINK,
        close: UNTHINK,
    };
    let opening = || Opening {
        thinking: may,
        instead: None,
    };
    let mut thinking = constraint.walk(opening(), &[STOP]);
    assert_eq!(ids(&mut thinking), [yes[0], yes[1], THINK]);
    for id in [THINK, 7, UNTHINK] {
        assert!(!thinking.take(id).unwrap());
    }
    assert!(thinking.take(yes[1]).unwrap());
    let mut at_once = constraint.walk(opening(), &[STOP]);
    assert!(!at_once.take(yes[0]).unwrap());
    assert_eq!(ids(&mut at_once), [u32::from(b'e')]);
}

#[test]
fn a_call_lifts_the_constraint() {
    let constraint = grammars().compile(&Form::JsonObject).unwrap();
    let opening = Opening {
        thinking: Thinking::No,
        instead: Some(CALL),
    };
    let mut called = constraint.walk(opening.clone(), &[STOP]);
    assert_eq!(ids(&mut called), [u32::from(b'{'), 256, CALL]);
    assert!(!called.take(CALL).unwrap());
    assert!(called.allowed().unwrap().is_none() && !called.is_constrained());
    assert!(!called.take(7).unwrap());

    // Only in the text's place.
    let mut text = constraint.walk(opening, &[STOP]);
    take(&mut text, "{\"a\"");
    assert!(!ids(&mut text).contains(&CALL));
}

fn calls(between: Option<&str>) -> Form {
    let city = json!({"type": "object", "additionalProperties": false, "required": ["a"],
                      "properties": {"a": {"enum": ["b", "ab"]}, "n": {"type": "integer", "minimum": 1, "maximum": 9}}});
    let none = json!({"type": "object", "additionalProperties": false, "properties": {}});
    Form::Calls(Calls {
        tools: vec![("yes\", \"x\": ".into(), city), ("no\\\", \"x\": ".into(), none)],
        end: "}\n</t>".into(),
        between: between.map(str::to_owned),
    })
}

#[test]
fn a_call_names_a_tool_and_has_the_arguments_of_its_schema() {
    let constraint = grammars().compile(&calls(None)).unwrap();
    let mut said = [0; 2];
    for seed in 0..200 {
        let mut walk = constraint.walk(Opening::default(), &[STOP]);
        let text = finish(&mut walk, &mut fastrand::Rng::with_seed(seed), 60);
        let (name, rest) = text.split_once("\", \"x\": ").unwrap();
        let arguments: Value = serde_json::from_str(rest.strip_suffix("}\n</t>").unwrap()).unwrap();
        if name == "yes" {
            assert!(["b", "ab"].map(Value::from).contains(&arguments["a"]), "{text}");
            let number = arguments
                .get("n")
                .is_none_or(|n| (1..=9).contains(&n.as_u64().unwrap()));
            assert!(number && arguments.as_object().unwrap().len() <= 2, "{text}");
        } else {
            assert_eq!((name, arguments), ("no\\", json!({})), "{text}");
        }
        said[usize::from(name == "yes")] += 1;
    }
    assert!(said[0] > 20 && said[1] > 20, "{said:?}");

    // Where one call is complete there is nothing but the end.
    let mut walk = constraint.walk(Opening::default(), &[STOP]);
    assert!(take(&mut walk, "yes\", \"x\": {\"a\": \"b\"}}\n</t>"));
}

#[test]
fn calls_may_follow_one_another() {
    let constraint = grammars().compile(&calls(Some("\n<t>"))).unwrap();
    let mut walk = constraint.walk(Opening::default(), &[STOP]);
    for text in [
        "yes\", \"x\": {\"a\": \"b\"}}\n</t>",
        "\n<t>no\\\", \"x\": {}}\n</t>",
    ] {
        assert!(!take(&mut walk, text));
        assert_eq!(
            ids(&mut walk),
            [u32::from(b'\n'), 256 + 12, STOP],
            "the next one, or the end"
        );
    }
    assert!(walk.take(u32::from(b'x')).is_err());
}

#[test]
fn what_cannot_be_compiled_says_why() {
    for (form, part) in [
        (Form::JsonSchema(json!({"type": "strin"})), "strin"),
        (Form::JsonSchema(json!({"$ref": "#/$defs/x"})), "x"),
        (
            Form::JsonSchema(json!({"$ref": "https://example.org/schema"})),
            "example.org",
        ),
        (Form::JsonSchema(json!({"not": {"type": "string"}})), "not"),
        (
            Form::JsonSchema(json!({"type": "integer", "minimum": 5, "maximum": 3})),
            "nsatisfiable",
        ),
        (Form::JsonSchema(json!([])), "object"),
        (Form::Regex("a(b".into()), "unclosed group"),
        (Form::Regex(r"a\bc".into()), "look"),
        (Form::Choice(vec![]), "empty"),
        (Form::Choice(vec!["a".into(), String::new()]), "empty"),
        (
            Form::Calls(Calls {
                tools: vec![
                    ("f".into(), json!({"type": "object"})),
                    ("g".into(), json!({"type": "strin"})),
                ],
                end: "}".into(),
                between: None,
            }),
            "strin",
        ),
        (Form::Grammar("start: x".into()), "unknown name"),
        (Form::Grammar("start: \"a".into()), "1("),
        (Form::Grammar("root ::= \"a\"".into()), "1("),
    ] {
        let error = grammars()
            .compile(&form)
            .expect_err(&format!("{form:?}"))
            .to_string();
        assert!(error.contains(part), "{form:?}: {error}");
        assert!(
            error.chars().count() <= 301 && !error.contains("backtrace"),
            "{form:?}: {error}"
        );
    }
}

/// Whatever a client writes comes to an end, on the stack that is said to do.
#[test]
fn hostile_forms_are_bounded() {
    let definitions = |count: usize, last: &dyn Fn(usize) -> Value| -> Value {
        let all: Map<String, Value> = (0..count).map(|n| (format!("d{n}"), last(n + 1))).collect();
        let mut all = all;
        all.insert(format!("d{count}"), json!({"type": "integer"}));
        json!({"$ref": "#/$defs/d0", "$defs": all})
    };
    let to = |n: usize| json!({"$ref": format!("#/$defs/d{n}")});
    let alternatives: Vec<Value> = (0..10)
        .map(|n| json!({"type": "object", "properties": {format!("p{n}"): {"type": "integer"}}}))
        .collect();
    let forms = vec![
        Form::JsonSchema(definitions(6000, &|n| to(n))),
        Form::JsonSchema(definitions(
            3000,
            &|n| json!({"allOf": [to(n), {"type": "integer"}]}),
        )),
        Form::JsonSchema(definitions(3000, &|n| json!({"type": "array", "items": to(n)}))),
        Form::JsonSchema(definitions(40, &|n| json!({"anyOf": [to(n), to(n)]}))),
        Form::JsonSchema(json!({"allOf": vec![json!({"anyOf": alternatives}); 8]})),
        Form::JsonSchema(json!({"type": "array", "items": {"type": "integer"}, "minItems": 1_000_000})),
        Form::JsonSchema(json!({"type": "string", "maxLength": 1_000_000_000})),
        Form::Regex("((a{1,1000}){1,1000}){1,1000}".into()),
        Form::Regex("(a|b)*a(a|b){25}".into()),
        Form::Regex(format!("{}a{}", "(".repeat(30_000), ")".repeat(30_000))),
        Form::Grammar(format!(
            "start: {}\"a\"{}",
            "(".repeat(30_000),
            ")".repeat(30_000)
        )),
        Form::Grammar("start: start start | start start start | \"a\" | \"\"".into()),
        Form::Grammar("a".repeat(65 << 10)),
        Form::Regex("a".repeat(65 << 10)),
        Form::Choice(vec!["a".repeat(257 << 10)]),
        Form::JsonSchema(json!({"description": "a".repeat(257 << 10)})),
    ];
    let worker = std::thread::Builder::new().stack_size(Grammars::STACK);
    let compiled = worker.spawn(move || {
        let all = forms.iter().map(|form| grammars().compile(form).map(drop));
        all.collect::<Vec<_>>()
    });
    let compiled = compiled.unwrap().join().unwrap();
    for late in &compiled[12..] {
        let error = late.as_ref().unwrap_err().to_string();
        assert!(error.contains("at most"), "{error}");
    }
}

/// The other kind of vocabulary: `▁` for a space, `<0x0A>` for bytes.
#[test]
fn a_vocabulary_with_byte_fallback() {
    let mut vocabulary = json!({"<unk>": 0, "▁": 1, "a": 2, "▁a": 3, "</s>": 4, "é": 5});
    for byte in 0..256_u32 {
        vocabulary[format!("<0x{byte:02X}>")] = json!(6 + byte);
    }
    let tokenizer = json!({
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "added_tokens": [{"id": 4, "content": "</s>", "special": true}, {"id": 0, "content": "<unk>", "special": true}],
        "model": {"vocab": vocabulary},
    });
    let grammars = Grammars::from_tokenizer_json(&tokenizer, 300).unwrap();
    let form = Form::Choice(vec![" aé".into(), "</s>".into()]);
    let mut walk = grammars.compile(&form).unwrap().walk(Opening::default(), &[4]);
    let list = |walk: &mut Walk| {
        let allowed = walk.allowed().unwrap().unwrap();
        (0..400).filter(|id| allowed.has(*id)).collect::<Vec<u32>>()
    };
    assert_eq!(list(&mut walk), [1, 3, 6 + u32::from(b' '), 6 + u32::from(b'<')]);
    walk.take(3).unwrap();
    assert_eq!(list(&mut walk), [5, 6 + 0xc3]);
    walk.take(6 + 0xc3).unwrap();
    assert!(walk.take(6 + 0xa9).unwrap());
    let unknown = json!({"decoder": {"type": "WordPiece"}, "added_tokens": [], "model": {"vocab": {}}});
    assert!(Grammars::from_tokenizer_json(&unknown, 300).is_err());
    assert!(Grammars::new([]).is_err());
}

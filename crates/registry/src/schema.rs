//! The JSON Schema of a configuration, for editors.

use serde_json::{Map, Value, json};

use crate::keys::{Object, ROOT, Ty};

/// The JSON Schema (draft 7, which editors' YAML modes understand) of a configuration, knobs included. Wherever a number
/// or a truth value is expected, a macro may stand instead.
#[must_use]
pub fn schema() -> Value {
    let mut definitions = Map::new();
    let mut root = object(&ROOT, &mut definitions);
    definitions.insert(
        "macro".to_owned(),
        json!({"type": "string", "pattern": r"\$\{[A-Za-z0-9_.-]+\}"}),
    );
    definitions.insert("macros".to_owned(), macros());
    if let Value::Object(map) = &mut root {
        map.insert(
            "$schema".to_owned(),
            json!("http://json-schema.org/draft-07/schema#"),
        );
        map.insert("title".to_owned(), json!("swapd configuration"));
        map.insert("definitions".to_owned(), Value::Object(definitions));
    }
    root
}

fn object(object: &Object, definitions: &mut Map<String, Value>) -> Value {
    let mut properties = Map::new();
    for key in object.keys {
        let mut schema = match key.name {
            "macros" => reference("macros"),
            _ => ty(key.ty, definitions),
        };
        if let Value::Object(map) = &mut schema {
            // Beside a `$ref`, draft 7 ignores everything: wrap it.
            if let Some(target) = map.remove("$ref") {
                map.insert("allOf".to_owned(), json!([{ "$ref": target }]));
            }
            let mut text = key.help.to_owned();
            if !key.no_effect.is_empty() {
                text = format!("No effect: {}.", key.no_effect);
            } else if !key.default.is_empty() {
                text = format!("{text} Default: {}.", key.default);
            }
            map.insert("description".to_owned(), json!(text));
        }
        for alias in key.aliases {
            properties.insert((*alias).to_owned(), schema.clone());
        }
        properties.insert(key.name.to_owned(), schema);
    }
    let required: Vec<&str> = object
        .keys
        .iter()
        .filter(|k| k.required)
        .map(|k| k.name)
        .collect();
    let mut schema = json!({
        "type": ["object", "null"],
        "properties": properties,
        "patternProperties": {"^x-": true, "^\\.": true},
        "additionalProperties": false,
    });
    if let (false, Value::Object(map)) = (required.is_empty(), &mut schema) {
        map.insert("required".to_owned(), json!(required));
    }
    schema
}

fn ty(ty: Ty, definitions: &mut Map<String, Value>) -> Value {
    match ty {
        Ty::Bool => or_macro(json!({"type": ["boolean", "null"]})),
        Ty::Int { min, max } => {
            let mut number = json!({"type": ["integer", "null"], "maximum": max});
            if let (true, Value::Object(map)) = (min > i64::MIN, &mut number) {
                map.insert("minimum".to_owned(), json!(min));
            }
            or_macro(number)
        }
        Ty::Str => json!({"type": ["string", "number", "boolean", "null"]}),
        Ty::OneOf(words) => {
            let mut allowed: Vec<Value> = words.iter().map(|w| json!(w)).collect();
            allowed.push(Value::Null);
            or_macro(json!({"enum": allowed}))
        }
        Ty::Duration => json!({"type": ["string", "number", "null"]}),
        Ty::List(inner) => json!({"type": ["array", "null"], "items": self::ty(*inner, definitions)}),
        Ty::Map(inner) => {
            json!({"type": ["object", "null"], "additionalProperties": self::ty(*inner, definitions)})
        }
        Ty::Object(inner) => {
            if !definitions.contains_key(inner.name) {
                // Reserves the name first: a definition that contained itself would never end.
                definitions.insert(inner.name.to_owned(), Value::Null);
                let schema = object(inner, definitions);
                definitions.insert(inner.name.to_owned(), schema);
            }
            reference(inner.name)
        }
        Ty::Worker => {
            definitions.entry("worker").or_insert_with(worker);
            reference("worker")
        }
        Ty::Either(a, b) => json!({"anyOf": [self::ty(*a, definitions), self::ty(*b, definitions)]}),
        Ty::Any => json!({}),
    }
}

fn or_macro(schema: Value) -> Value {
    json!({"anyOf": [schema, reference("macro")]})
}

/// A name goes into a URI fragment: `<`, `>`, `[`, `]` must be escaped.
fn reference(name: &str) -> Value {
    let escaped: String = name
        .chars()
        .map(|c| match c {
            '<' => "%3C".to_owned(),
            '>' => "%3E".to_owned(),
            '[' => "%5B".to_owned(),
            ']' => "%5D".to_owned(),
            ' ' => "%20".to_owned(),
            c => c.to_string(),
        })
        .collect();
    json!({"$ref": format!("#/definitions/{escaped}")})
}

fn macros() -> Value {
    json!({
        "type": ["object", "null"],
        "propertyNames": {"pattern": "^[A-Za-z0-9_-]{1,63}$", "not": {"enum": ["PID", "PORT", "MODEL_ID"]}},
        "additionalProperties": {"type": ["string", "number", "boolean"]},
    })
}

/// `worker:`, from the knobs.
fn worker() -> Value {
    let mut properties = Map::new();
    properties.insert(
        "model".to_owned(),
        json!({"type": "string", "description": "Directory of the model (relative ones start at the file's own), or hub id."}),
    );
    properties.insert(
        "env".to_owned(),
        json!({"type": ["array", "null"], "items": {"type": "string"}, "description": "NAME=value for this worker."}),
    );
    for knob in knobs::TABLE.iter().filter(|k| !matches!(k.flag, "host" | "port")) {
        let value = match knob.kind {
            knobs::Kind::Bool => or_macro(json!({"type": ["boolean", "null"]})),
            knobs::Kind::Int { min, max } => {
                or_macro(json!({"type": ["integer", "null"], "minimum": min, "maximum": max}))
            }
            knobs::Kind::Float { min, max } => {
                or_macro(json!({"type": ["number", "null"], "minimum": min, "maximum": max}))
            }
            knobs::Kind::Str => json!({"type": ["string", "number", "null"]}),
            knobs::Kind::Enum(names) => {
                let mut allowed: Vec<Value> = names.iter().map(|n| json!(n)).collect();
                allowed.extend(
                    names
                        .iter()
                        .filter_map(|n| n.parse::<i64>().ok())
                        .map(|n| json!(n)),
                );
                allowed.push(Value::Null);
                or_macro(json!({"enum": allowed}))
            }
            knobs::Kind::Json => json!({"type": ["object", "string", "null"]}),
        };
        let mut described = Map::new();
        described.insert("allOf".to_owned(), json!([value]));
        described.insert("description".to_owned(), json!(knob.help.trim()));
        if let Some(default) = knob.default.value() {
            described.insert("default".to_owned(), json!(default.to_string()));
        }
        properties.insert(knob.yaml_key(), Value::Object(described));
    }
    // Other spellings of a knob are understood too, so unknown keys are not refused here; `swapd check` does that.
    json!({"type": "object", "properties": properties, "required": ["model"]})
}

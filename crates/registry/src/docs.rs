//! The reference page, from the tables of keys and knobs.

use std::fmt::Write as _;

use crate::check::describe;
use crate::keys::{Object, ROOT, Ty};

const INTRODUCTION: &str = "\
# Configuration

<!-- Generated from crates/registry/src/keys.rs and crates/knobs/src/table.rs. To change it, change them, and run
     UPDATE_DOCS=1 cargo test -p registry --test docs -->

`swapd --config FILE` reads one YAML or JSON file; `--config-dir DIR` reads every `*.yml` and `*.yaml` in a directory, by
name, after the file if both are given. Sources are merged: mappings recurse, lists are joined, and two different values
for one key, or one model in two sources, are an error. `swapd check` reports everything that is wrong, with file, line,
column and key, all at once; a key that nobody reads is a warning when serving and a failure in `swapd check`, unless it is
`--lenient`. llama-swap's configurations work as they are.

```yaml
models:
  demo:
    ttl: 600
    aliases: [default]
    worker:                        # our own worker, by its knobs
      model: ../models/demo/model  # a directory, from this file's own; or a hub id such as org/name
      maxNumSeqs: 4
  other:
    cmd: some-server --port ${PORT}  # any other server
```

A worker's `model` is a hub id when it looks like `name` or `org/name` (it is then found in `HF_HOME`); everything else is
a directory, and relative ones start in the directory of the file that names them. Write `./name` for a directory there.

## Macros

`${name}` is replaced by the macro of that name, declared under `macros` at the top or in a model; a model's own go before
the global ones. A macro may use those declared before it. A value that is nothing but `${name}` takes the macro's type.
`${MODEL_ID}` is the model's id, `${PORT}` a free port given to a model whose `cmd` uses it, `${PID}` (in `cmdStop` only)
its process. `${env.NAME}` is an environment variable, replaced before the file is parsed, outside comments. Anything
that is still `${...}` afterwards is an error. Keys are not expanded, except under `setParamsByID`.

## Names

A request's `model` is looked up as model id, alias, selector, `peer/model`, and last as a model that peers have: if
there are several, they are asked in the order of their `priority`. No name may stand for two things: a model's id is never
an alias of another.
";

/// The reference page, in Markdown.
#[must_use]
pub fn configuration_markdown() -> String {
    let mut out = INTRODUCTION.to_owned();
    out.push_str("\n## Keys\n\nA key without a value counts as absent. Keys that begin with `x-` or `.` are left alone: a place for anchors.\n");
    let mut objects: Vec<&'static Object> = Vec::new();
    collect(&ROOT, &mut objects);
    for object in objects {
        let _ = writeln!(out, "\n### {}\n", heading(object.name));
        let _ = writeln!(out, "| key | value | default | meaning |\n|---|---|---|---|");
        for key in object.keys {
            let mut meaning = key.help.to_owned();
            if key.required {
                meaning.push_str(" Required.");
            }
            if !key.no_effect.is_empty() {
                meaning = format!("No effect: {}.", key.no_effect);
            }
            for alias in key.aliases {
                let _ = write!(meaning, " Older spelling: `{alias}`.");
            }
            let default = match key.default {
                "" => "–".to_owned(),
                text if text.contains('`') => text.to_owned(),
                text => format!("`{text}`"),
            };
            let cell = |text: &str| text.replace('|', "\\|");
            let _ = writeln!(
                out,
                "| `{}` | {} | {} | {} |",
                key.name,
                cell(&value(key.ty)),
                cell(&default),
                cell(&meaning)
            );
        }
    }
    out.push_str(
        "\n## Knobs of a worker\n\nThe keys of `models.<id>.worker`, beside `model` and `env` (a list of `NAME=value`). \
         Each is also a flag of `mlxworker serve`; in YAML the flag's own spelling and snake case are understood as well. \
         `host` and `port` are swapd's to choose.\n\n",
    );
    out.push_str(&knobs::reference_markdown());
    let _ = writeln!(out, "There is no draft flag: {}.", knobs::SPECULATIVE_REASON);
    out
}

/// Every object once, in the order in which the page comes to them.
fn collect(object: &'static Object, objects: &mut Vec<&'static Object>) {
    if objects.iter().any(|o| o.name == object.name) {
        return;
    }
    objects.push(object);
    for key in object.keys {
        inner(key.ty, objects);
    }
}

fn inner(ty: Ty, objects: &mut Vec<&'static Object>) {
    match ty {
        Ty::Object(object) => collect(object, objects),
        Ty::List(ty) | Ty::Map(ty) => inner(*ty, objects),
        Ty::Either(a, b) => {
            inner(*a, objects);
            inner(*b, objects);
        }
        _ => {}
    }
}

fn heading(name: &str) -> String {
    if name.contains(' ') {
        name.to_owned()
    } else {
        format!("`{name}`")
    }
}

fn value(ty: Ty) -> String {
    match ty {
        Ty::Object(object) => format!("see {}", heading(object.name)),
        Ty::Map(Ty::Object(object)) => format!("names, each with {}", heading(object.name)),
        Ty::Map(Ty::Any) => "a mapping".to_owned(),
        Ty::List(Ty::Str) => "a list of texts".to_owned(),
        Ty::Either(a, b) => format!("{} or {}", value(*a), value(*b)),
        Ty::List(ty @ Ty::Either(..)) => format!("a list, each {}", value(*ty)),
        Ty::Worker => "`model` and knobs, see below".to_owned(),
        ty => describe(ty),
    }
}

//! What the parser knows about the request's tools: names, and the types of their parameters.

use std::collections::HashMap;

use serde_json::Value as Json;

use super::lenient::Kind;

/// The tools of one request, by name. Cheap to clone? No: build it once per request.
#[derive(Debug, Clone, Default)]
pub struct ToolSet {
    tools: HashMap<String, HashMap<String, Types>>,
}

impl ToolSet {
    /// Reads OpenAI's tool definitions (`{"type": "function", "function": {"name", "parameters"}}`; the flat form
    /// `{"name", "parameters"}` and Anthropic's `input_schema` as well). Entries without a name are skipped: they are
    /// the HTTP layer's to refuse.
    pub fn from_openai(tools: &[Json]) -> Self {
        let one = |tool: &Json| {
            let function = tool.get("function").unwrap_or(tool);
            let name = function.get("name")?.as_str()?.to_owned();
            let schema = function
                .get("parameters")
                .or_else(|| function.get("input_schema"));
            let properties = schema
                .and_then(|schema| schema.get("properties"))
                .and_then(Json::as_object);
            let types = properties
                .into_iter()
                .flatten()
                .map(|(key, schema)| (key.clone(), Types::of(schema)));
            Some((name, types.collect()))
        };
        Self {
            tools: tools.iter().filter_map(one).collect(),
        }
    }

    /// Whether no tool was declared.
    pub fn is_empty(&self) -> bool {
        self.tools.is_empty()
    }

    /// Whether a tool of this name was declared.
    pub fn contains(&self, name: &str) -> bool {
        self.tools.contains_key(name)
    }

    /// The declared types of a tool's parameter; nothing is known about undeclared ones.
    pub(crate) fn types(&self, tool: &str, parameter: &str) -> Types {
        self.tools
            .get(tool)
            .and_then(|parameters| parameters.get(parameter))
            .copied()
            .unwrap_or_default()
    }
}

/// The set of JSON types that a schema allows; empty when the schema does not say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Types {
    pub(crate) string: bool,
    pub(crate) integer: bool,
    pub(crate) number: bool,
    pub(crate) boolean: bool,
    pub(crate) object: bool,
    pub(crate) array: bool,
    pub(crate) null: bool,
}

impl Types {
    /// Reads `type` (a name or a list of names) and the alternatives of `anyOf` and `oneOf`. As soon as one part
    /// says nothing about types (`$ref`, `enum` without a type, ...), nothing is known.
    fn of(schema: &Json) -> Self {
        let mut types = Self::default();
        if let Some(alternatives) = schema
            .get("anyOf")
            .or_else(|| schema.get("oneOf"))
            .and_then(Json::as_array)
        {
            for alternative in alternatives {
                let more = Self::of(alternative);
                if more == Self::default() {
                    return more;
                }
                types = types.or(more);
            }
            return types;
        }
        match schema.get("type") {
            Some(Json::String(name)) => types.add(name),
            Some(Json::Array(names)) => names
                .iter()
                .filter_map(Json::as_str)
                .for_each(|name| types.add(name)),
            _ => {}
        }
        types
    }

    fn add(&mut self, name: &str) {
        match name {
            "string" => self.string = true,
            "integer" => self.integer = true,
            "number" => self.number = true,
            "boolean" => self.boolean = true,
            "object" => self.object = true,
            "array" => self.array = true,
            "null" => self.null = true,
            _ => {}
        }
    }

    fn or(self, other: Self) -> Self {
        Self {
            string: self.string | other.string,
            integer: self.integer | other.integer,
            number: self.number | other.number,
            boolean: self.boolean | other.boolean,
            object: self.object | other.object,
            array: self.array | other.array,
            null: self.null | other.null,
        }
    }

    /// Whether a value that begins like this may need [`coerce`](super::coerce::coerce), and so must be seen whole.
    pub(crate) fn may_coerce(self, kind: Kind) -> bool {
        if self == Self::default() {
            return false;
        }
        match kind {
            Kind::String => !self.string,
            Kind::Number => !self.number,
            Kind::Object => self.string && !self.object,
            Kind::Array => self.string && !self.array,
            Kind::Word => self.string && !self.boolean,
        }
    }
}

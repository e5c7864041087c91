//! Chat templates: loading, normalising, errors, size.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::fs;
use std::path::Path;

use chat_format::{ChatTemplate, ContentStyle, RenderInputs, TemplateError, ToolFormat};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

/// A model directory with these files.
fn model(files: &[(&str, &str)]) -> TempDir {
    let dir = TempDir::new().unwrap();
    for (name, text) in files {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    dir
}

fn render(template: &ChatTemplate, messages: &Value, tools: Option<&Value>) -> Result<String, TemplateError> {
    template.render(&RenderInputs {
        messages: messages.as_array().unwrap(),
        tools: tools.map(|tools| tools.as_array().unwrap().as_slice()),
        ..RenderInputs::default()
    })
}

fn source(text: &str) -> ChatTemplate {
    ChatTemplate::from_source(text, Map::new()).unwrap()
}

fn hello() -> Value {
    json!([{"role": "user", "content": "hello"}])
}

#[test]
fn templates_are_shared_between_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<ChatTemplate>();
}

#[test]
fn loads_the_template_file_before_the_configuration() {
    let config = json!({
        "chat_template": "config",
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": false},
        "pad_token": null,
    });
    let dir = model(&[
        ("tokenizer_config.json", &config.to_string()),
        (
            "chat_template.jinja",
            "{{ bos_token }}file{{ eos_token }}{{ pad_token is defined }}\n",
        ),
    ]);
    let template = ChatTemplate::from_dir(dir.path()).unwrap();
    assert_eq!(render(&template, &hello(), None).unwrap(), "<s>file</s>False");
    fs::remove_file(dir.path().join("chat_template.jinja")).unwrap();
    assert_eq!(
        render(&ChatTemplate::from_dir(dir.path()).unwrap(), &hello(), None).unwrap(),
        "config"
    );
    // The configuration's tokens win over the legacy map's.
    fs::write(
        dir.path().join("special_tokens_map.json"),
        json!({"bos_token": "old", "unk_token": "?"}).to_string(),
    )
    .unwrap();
    let template = ChatTemplate::from_dir(dir.path()).unwrap();
    assert_eq!(template.special_tokens()["bos_token"], "<s>");
    assert_eq!(template.special_tokens()["unk_token"], "?");
}

#[test]
fn chooses_the_template_for_tools() {
    let list = json!({"chat_template": [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "tools <tool_call>"},
        {"name": "rag", "template": "rag"},
    ]});
    let tools = json!([{"type": "function", "function": {"name": "f"}}]);
    let from_list = model(&[("tokenizer_config.json", &list.to_string())]);
    let from_files = model(&[
        ("chat_template.jinja", "plain"),
        ("additional_chat_templates/tool_use.jinja", "tools <tool_call>"),
    ]);
    for dir in [from_list, from_files] {
        let template = ChatTemplate::from_dir(dir.path()).unwrap();
        assert_eq!(render(&template, &hello(), None).unwrap(), "plain");
        assert_eq!(render(&template, &hello(), Some(&json!([]))).unwrap(), "plain");
        assert_eq!(
            render(&template, &hello(), Some(&tools)).unwrap(),
            "tools <tool_call>"
        );
        assert_eq!(template.tool_format(), ToolFormat::Hermes);
        assert_eq!(template.source(false), "plain");
    }
    let neither = json!({"chat_template": [{"name": "a", "template": "x"}, {"name": "b", "template": "y"}]});
    let dir = model(&[("tokenizer_config.json", &neither.to_string())]);
    let error = render(&ChatTemplate::from_dir(dir.path()).unwrap(), &hello(), None).unwrap_err();
    assert_eq!(
        error.to_string(),
        "no chat template named \"default\"; there are: a, b"
    );
    assert!(!error.is_client_error());
}

#[test]
fn bad_model_directories() {
    let load = |files: &[(&str, &str)]| {
        let dir = model(files);
        let error = ChatTemplate::from_dir(dir.path()).unwrap_err();
        (
            error
                .to_string()
                .replace(&dir.path().display().to_string(), "DIR"),
            error.is_client_error(),
        )
    };
    let missing =
        "no chat template in DIR: neither chat_template.jinja nor chat_template in tokenizer_config.json";
    assert_eq!(load(&[]), (missing.to_owned(), false));
    assert_eq!(
        load(&[("tokenizer_config.json", "{\"chat_template\": null}")]).0,
        missing
    );
    assert!(
        load(&[("tokenizer_config.json", "{\"chat_tem")])
            .0
            .starts_with("DIR/tokenizer_config.json: EOF")
    );
    assert_eq!(
        load(&[(
            "tokenizer_config.json",
            "{\"chat_template\": [{\"name\": \"default\"}]}"
        )])
        .0,
        "DIR/tokenizer_config.json: chat_template must be a string or a list of {name, template}"
    );
    let (message, client) = load(&[("chat_template.jinja", "a\n{% if x %}\n{{ y }")]);
    assert!(
        message.starts_with("chat template default, line 3: syntax error: "),
        "{message}"
    );
    assert!(!client);
    assert!(ChatTemplate::from_dir(Path::new("/nonexistent/model")).is_err());
}

#[test]
fn errors_name_the_line() {
    let template = source(
        "a\r\n{% generation %}\n{% for m in messages %}\n  {{ m.nope.deeper }}\n{% endfor %}{% endgeneration %}",
    );
    let error = render(&template, &hello(), None).unwrap_err();
    assert!(
        matches!(&error, TemplateError::Render { line: 4, name, .. } if name == "default"),
        "{error:?}"
    );
    assert!(
        error
            .to_string()
            .starts_with("chat template default, line 4: undefined value"),
        "{error}"
    );
    assert!(error.is_client_error());

    let template = source("\n\n{{ raise_exception('Only ' ~ messages[0].role ~ \" isn't <enough>\") }}");
    let error = render(&template, &hello(), None).unwrap_err();
    assert!(
        matches!(&error, TemplateError::Raised { line: 3, .. }),
        "{error:?}"
    );
    assert_eq!(error.to_string(), "Only user isn't <enough>");
    assert!(error.is_client_error());
}

#[test]
fn wrong_messages_are_named() {
    let template = source("{% for m in messages %}{{ m.content }}{% endfor %}");
    let text = |messages: Value| {
        let error = render(&template, &messages, None).unwrap_err();
        assert!(error.is_client_error());
        error.to_string()
    };
    assert_eq!(text(json!([])), "messages must not be empty");
    assert_eq!(
        text(json!([{"role": "user"}, 5])),
        "messages[1] must be an object, not 5"
    );
    let parts = json!([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]}]);
    assert_eq!(
        text(parts),
        "messages[0].content[1] is of type \"image_url\": this model takes only text"
    );
}

#[test]
fn content_goes_in_the_form_that_the_template_reads() {
    let text = "{% for m in messages %}{{ m.content }}|{% endfor %}";
    let both = "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text if p.type == 'text' else '<' ~ p.type ~ '>' }}{% endfor %}{% endif %}|{% endfor %}";
    let parts = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}|{% endfor %}";
    for (template, style) in [
        (text, ContentStyle::Text),
        (both, ContentStyle::TextOrParts),
        (parts, ContentStyle::Parts),
    ] {
        let template = source(template);
        assert_eq!(template.content_style(), style);
        let messages = json!([
            {"role": "user", "content": "a"},
            {"role": "user", "content": [{"type": "text", "text": "b "}, {"type": "text", "text": "c"}]},
            {"role": "user", "content": [{"type": "input_text", "text": "d"}, "e", {"text": "f"}]},
        ]);
        // A template that reads only lists gets them as they came: what it does with bare strings is its own affair.
        let expected = if style == ContentStyle::Parts {
            "a|b c|df|"
        } else {
            "a|b c|def|"
        };
        assert_eq!(render(&template, &messages, None).unwrap(), expected);
    }
    let image = json!([{"role": "user", "content": [{"type": "text", "text": "see "}, {"type": "image"}]}]);
    assert_eq!(render(&source(both), &image, None).unwrap(), "see <image>|");
}

#[test]
fn arguments_are_parsed_when_they_are_an_object() {
    let template = source(
        "{% for c in messages[0].tool_calls %}{{ (c.function or c).arguments is mapping }}{{ (c.function or c).arguments|tojson }};{% endfor %}",
    );
    let messages = json!([{"role": "assistant", "tool_calls": [
        {"function": {"name": "f", "arguments": "{\"b\": 1.0, \"a\": [\"é\", null, 1e3]}"}},
        {"function": {"name": "f", "arguments": {"a": 1}}},
        {"function": {"name": "f", "arguments": " "}},
        {"function": {"name": "f", "arguments": "[1]"}},
        {"function": {"name": "f", "arguments": "{broken"}},
        {"name": "f", "arguments": "{}"},
        {"function": {"name": "f"}},
        7,
    ]}]);
    let normalized = template.normalize(messages.as_array().unwrap()).unwrap();
    let arguments: Vec<&Value> = normalized[0]["tool_calls"]
        .as_array()
        .unwrap()
        .iter()
        .take(5)
        .map(|call| &call["function"]["arguments"])
        .collect();
    assert_eq!(
        arguments,
        [
            &json!({"b": 1.0, "a": ["é", null, 1000.0]}),
            &json!({"a": 1}),
            &json!({}),
            &json!("[1]"),
            &json!("{broken")
        ]
    );
    assert_eq!(normalized[0]["tool_calls"][5]["arguments"], json!({}));
    let five =
        json!([{"role": "assistant", "tool_calls": messages[0]["tool_calls"].as_array().unwrap()[..3]}]);
    assert_eq!(
        render(&template, &five, None).unwrap(),
        "True{\"b\": 1.0, \"a\": [\"é\", null, 1000.0]};True{\"a\": 1};True{};"
    );
}

/// A long conversation renders, and a template that never ends does not hang the server.
#[test]
fn size_has_its_limits_where_they_belong() {
    let text =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/templates/qwen3.jinja"))
            .unwrap();
    let template = source(&text);
    let turns: Vec<Value> = (0..4000)
        .map(|turn| {
            let role = if turn % 2 == 0 { "user" } else { "assistant" };
            json!({"role": role, "content": "lorem ipsum \u{e9} ".repeat(300)})
        })
        .collect();
    let prompt = render(&template, &Value::from(turns), None).unwrap();
    assert!(prompt.len() > 16_000_000, "{}", prompt.len());

    let endless = source(
        "{% if messages|length > 1 %}{% for i in range(100000) %}{{ range(100000)|sum }}{% endfor %}{% endif %}",
    );
    let two = json!([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]);
    let error = render(&endless, &two, None).unwrap_err();
    assert!(error.to_string().contains("out of fuel"), "{error}");
}

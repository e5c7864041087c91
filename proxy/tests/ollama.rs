//! Ollama's API on the real program, with a model server that says what the test has it say.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::disallowed_methods
)]

mod common;

use std::time::Duration;

use common::{Answer, Swapd, eventually};
use serde_json::{Value, json};

/// A registry with one model whose server says `events`; `more` are further parameters of its bodies.
fn talking(events: &Value, more: &Value) -> String {
    let mut set = json!({"say": events, "note": true});
    set.as_object_mut()
        .unwrap()
        .extend(more.as_object().unwrap().clone());
    let model = json!({"worker": {"model": "DIR"}, "aliases": ["short"], "env": ["JOURNAL"],
                       "filters": {"setParams": set}});
    format!("models: {{org/m: {model}}}")
}

fn text(content: &str) -> Value {
    json!({"choices": [{"index": 0, "delta": {"content": content}, "finish_reason": null}]})
}

fn end(reason: &str) -> Value {
    json!({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}],
           "usage": {"prompt_tokens": 11, "completion_tokens": 4}})
}

fn lines(answer: &Answer) -> Vec<Value> {
    assert_eq!(
        answer.header("content-type"),
        Some("application/x-ndjson"),
        "{answer:?}"
    );
    answer
        .body
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect()
}

/// The body that the model's server received last, and its path.
fn received(swapd: &Swapd) -> (String, Value) {
    let journal = swapd.journal();
    let line = journal
        .lines()
        .rev()
        .find(|l| l.contains(" body "))
        .expect("nothing received");
    let (path, body) = line.split_once(" body ").unwrap().1.split_once(' ').unwrap();
    (path.to_owned(), serde_json::from_str(body).unwrap())
}

#[test]
fn chat_streams_lines_and_ends_with_counts_and_times() {
    let call = json!({"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, "id": "c1", "type": "function",
        "function": {"name": "weather", "arguments": "{\"city\": \"Bern\"}"}}]}}]});
    let thought = json!({"choices": [{"index": 0, "delta": {"reasoning_content": "hm"}}]});
    let swapd = Swapd::start(&talking(
        &json!([thought, text("Hel"), text("lo"), call, end("tool_calls")]),
        &json!({}),
    ));
    let body = json!({
        "model": "short:latest", "think": true, "format": {"type": "object"},
        "messages": [{"role": "user", "content": "hi", "images": ["iVBORw0KGgoAAA"]}],
        "tools": [{"type": "function", "function": {"name": "weather", "parameters": {}}}],
        "options": {"temperature": 0.5, "num_predict": 20, "seed": 3, "stop": ["x"], "num_ctx": 8192},
    });
    let answer = swapd.post("/api/chat", &body.to_string());
    assert!(answer.status == 200 && answer.complete, "{answer:?}");
    let lines = lines(&answer);
    let said: Vec<&Value> = lines.iter().map(|l| &l["message"]).collect();
    assert_eq!(
        said,
        [
            &json!({"role": "assistant", "content": "", "thinking": "hm"}),
            &json!({"role": "assistant", "content": "Hel"}),
            &json!({"role": "assistant", "content": "lo"}),
            &json!({"role": "assistant", "content": "", "tool_calls":
                [{"id": "c1", "function": {"index": 0, "name": "weather", "arguments": {"city": "Bern"}}}]}),
            &json!({"role": "assistant", "content": ""}),
        ]
    );
    assert!(
        lines
            .iter()
            .all(|l| l["model"] == "short:latest" && l["created_at"].as_str().unwrap().ends_with('Z'))
    );
    let last = lines.last().unwrap();
    assert_eq!(
        (&last["done"], &last["done_reason"]),
        (&json!(true), &json!("stop"))
    );
    assert_eq!(
        (&last["prompt_eval_count"], &last["eval_count"]),
        (&json!(11), &json!(4))
    );
    let time = |key: &str| last[key].as_u64().unwrap();
    let parts = time("load_duration") + time("prompt_eval_duration") + time("eval_duration");
    assert!(
        time("load_duration") > 1_000_000,
        "the process had to start: {last}"
    );
    assert!(
        parts <= time("total_duration") + 1_000 && time("total_duration") < 20_000_000_000,
        "{last}"
    );

    let (path, body) = received(&swapd);
    assert_eq!(
        (path.as_str(), &body["model"]),
        ("/v1/chat/completions", &json!("short"))
    );
    assert_eq!(
        body["messages"][0]["content"][1]["image_url"]["url"],
        "data:image/png;base64,iVBORw0KGgoAAA"
    );
    assert_eq!(
        (&body["max_tokens"], &body["seed"], &body["stop"]),
        (&json!(20), &json!(3), &json!(["x"]))
    );
    assert_eq!(
        body["response_format"]["json_schema"]["schema"],
        json!({"type": "object"})
    );
    assert_eq!(body["chat_template_kwargs"], json!({"enable_thinking": true}));
    assert!(body.get("options").is_none() && body["stream"] == true);
    // The activity shows what the client asked, and what it cost.
    let rows = swapd.get("/api/metrics/activity").json();
    let row = &rows["data"][0];
    assert_eq!(
        (&row["req_path"], &row["tokens"]["output_tokens"]),
        (&json!("/api/chat"), &json!(4))
    );
}

#[test]
fn one_object_when_no_stream_is_wanted() {
    let swapd = Swapd::start(&talking(
        &json!([text("Hel"), text("lo"), end("length")]),
        &json!({}),
    ));
    let chat = json!({"model": "org/m", "stream": false, "messages": [{"role": "user", "content": "hi"}]});
    let answer = swapd.post("/api/chat", &chat.to_string());
    assert_eq!(
        answer.header("content-type"),
        Some("application/json; charset=utf-8")
    );
    let reply = answer.json();
    assert_eq!(reply["message"], json!({"role": "assistant", "content": "Hello"}));
    assert_eq!(
        (&reply["done_reason"], &reply["eval_count"]),
        (&json!("length"), &json!(4))
    );
    // A prompt is a conversation of one, unless it is raw.
    let generate = json!({"model": "org/m", "stream": false, "prompt": "p", "system": "s"});
    assert_eq!(
        swapd.post("/api/generate", &generate.to_string()).json()["response"],
        "Hello"
    );
    assert_eq!(
        received(&swapd).1["messages"][0],
        json!({"role": "system", "content": "s"})
    );
    let raw = json!({"model": "org/m", "prompt": "p", "raw": true});
    let streamed = lines(&swapd.post("/api/generate", &raw.to_string()));
    assert_eq!(
        (&streamed[0]["response"], &streamed[0]["done"]),
        (&json!("Hel"), &json!(false))
    );
    assert_eq!(
        (received(&swapd).0.as_str(), &received(&swapd).1["prompt"]),
        ("/v1/completions", &json!("p"))
    );
}

#[test]
fn vectors_in_both_forms() {
    let swapd = Swapd::start(&talking(&json!([]), &json!({})));
    let embed = swapd
        .post("/api/embed", r#"{"model":"org/m","input":["a","b"]}"#)
        .json();
    assert_eq!(embed["embeddings"], json!([[0.5, 0], [0.5, 1]]));
    assert_eq!(
        (&embed["model"], &embed["prompt_eval_count"]),
        (&json!("org/m"), &json!(2))
    );
    let old = swapd
        .post("/api/embeddings", r#"{"model":"org/m","prompt":"a"}"#)
        .json();
    assert_eq!(old, json!({"embedding": [0.5, 0]}));
    assert_eq!(received(&swapd).0, "/v1/embeddings");
}

#[test]
fn failures_have_ollamas_form() {
    let swapd = Swapd::start(&talking(
        &json!([text("x"), {"error": {"message": "out of memory"}}]),
        &json!({}),
    ));
    let error = |answer: &Answer| {
        let error = answer.json();
        assert_eq!(error.as_object().unwrap().len(), 1, "{answer:?}");
        error["error"].as_str().unwrap().to_owned()
    };
    let chat =
        |model: &str| json!({"model": model, "messages": [{"role": "user", "content": "x"}]}).to_string();
    let unknown = swapd.post("/api/chat", &chat("nothing"));
    assert!(
        unknown.status == 404 && error(&unknown).contains("'nothing' not found"),
        "{unknown:?}"
    );
    let tagged = swapd.post("/api/show", r#"{"model":"nothing:latest"}"#);
    assert!(
        tagged.status == 404 && error(&tagged).contains("nothing:latest"),
        "{tagged:?}"
    );
    for (path, body, status) in [
        ("/api/chat", "{", 400),
        ("/api/chat", "{}", 400),
        (
            "/api/generate",
            r#"{"model":"org/m","prompt":"x","context":[1]}"#,
            400,
        ),
        ("/api/pull", r#"{"model":"org/m"}"#, 501),
    ] {
        let answer = swapd.post(path, body);
        assert_eq!(answer.status, status, "{answer:?}");
        assert!(!error(&answer).is_empty());
    }
    let method = swapd.get("/api/chat");
    assert_eq!((method.status, method.header("allow")), (405, Some("POST")));
    assert!(error(&method).contains("GET"));
    // In the middle of a stream: a line, and nothing that looks like an end.
    let streamed = lines(&swapd.post("/api/chat", &chat("org/m")));
    assert_eq!(streamed[1], json!({"error": "out of memory"}));
    assert_eq!(streamed.len(), 2);
    let mut whole: Value = serde_json::from_str(&chat("org/m")).unwrap();
    whole["stream"] = json!(false);
    let whole = swapd.post("/api/chat", &whole.to_string());
    assert_eq!((whole.status, error(&whole)), (502, "out of memory".to_owned()));
    assert_eq!(whole.header("retry-after"), Some("1"));

    let refusing = Swapd::start(&talking(
        &json!([]),
        &json!({"status": 422, "error": {"message": "too long"}}),
    ));
    let refused = refusing.post("/api/chat", &chat("org/m"));
    assert_eq!((refused.status, error(&refused)), (422, "too long".to_owned()));
}

#[test]
fn a_server_that_dies_is_no_clean_end() {
    let config = r#"models: {m: {worker: {model: DIR}, filters: {setParams: {events: 9, event_bytes: 3, gap_ms: 20, die_after: 3}}}}"#;
    let swapd = Swapd::start(config);
    let answer = swapd.post(
        "/api/chat",
        r#"{"model":"m","messages":[{"role":"user","content":"x"}]}"#,
    );
    let lines = lines(&answer);
    assert_eq!(lines[0]["message"]["content"], "xxx");
    assert!(
        lines.last().unwrap()["error"].as_str().unwrap().contains("died"),
        "{lines:?}"
    );
    assert!(!answer.complete, "the connection is closed without the end mark");
}

#[test]
fn keep_alive_loads_keeps_and_unloads() {
    let config = talking(&json!([text("x"), end("stop")]), &json!({}));
    let swapd = Swapd::start(&config);
    let ask = |body: Value| swapd.post("/api/generate", &body.to_string()).json();
    let load = ask(json!({"model": "org/m", "keep_alive": "10m"}));
    assert_eq!(
        (&load["done_reason"], &load["response"]),
        (&json!("load"), &json!(""))
    );
    let ps = swapd.get("/api/ps").json();
    let row = &ps["models"][0];
    assert_eq!(
        (&row["name"], swapd.state("org/m").as_str()),
        (&json!("org/m"), "ready")
    );
    assert!(row["size"].as_u64().unwrap() > 0, "{row}");
    let year = |row: &Value| row["expires_at"].as_str().unwrap()[..4].parse::<u32>().unwrap();
    let soon = year(row);
    // For ever, then as long as the request lasts.
    ask(json!({"model": "org/m", "prompt": "x", "keep_alive": -1, "stream": false}));
    assert!(year(&swapd.get("/api/ps").json()["models"][0]) > soon + 50);
    let streamed = swapd.post(
        "/api/generate",
        r#"{"model":"org/m","prompt":"x","keep_alive":0}"#,
    );
    assert_eq!(lines(&streamed).last().unwrap()["done_reason"], "stop");
    eventually("unloaded after the request", Duration::from_secs(5), || {
        (swapd.state("org/m") == "stopped").then_some(())
    });
    assert_eq!(swapd.get("/api/ps").json(), json!({"models": []}));
    // With nothing to say, zero is an order.
    ask(json!({"model": "org/m"}));
    assert_eq!(
        ask(json!({"model": "org/m", "keep_alive": "0"}))["done_reason"],
        "unload"
    );
    eventually("unloaded by order", Duration::from_secs(5), || {
        (swapd.state("org/m") == "stopped").then_some(())
    });
    assert_eq!(swapd.journalled("stop").len(), 2);
}

#[test]
fn lists_show_what_there_is() {
    let config = "
models:
  a: {worker: {model: DIR}, aliases: [al]}
  b: {cmd: 'FAKESERVER --port ${PORT}', capabilities: {in: [text, image], out: [text], tools: true, context: 4096}}
  hidden: {worker: {model: DIR}, unlisted: true}
selectors: {any: {strategy: pin, targets: [a, b]}}
peers: {far: {proxy: 'http://127.0.0.1:9', models: [x]}}
apiKeys: [all, {key: only-b, models: [b]}]
";
    let swapd = Swapd::start(config);
    std::fs::write(
        swapd.dir.path().join("config.json"),
        r#"{"model_type":"qwen3","max_position_embeddings":99}"#,
    )
    .unwrap();
    std::fs::write(swapd.dir.path().join("w.safetensors"), [0; 64]).unwrap();
    let get = |path: &str, key: &str| {
        swapd
            .open("GET", path, &format!("Authorization: Bearer {key}\r\n"), "")
            .finish()
    };
    let show = |model: &str, key: &str| {
        let body = json!({ "model": model }).to_string();
        swapd
            .open(
                "POST",
                "/api/show",
                &format!("Authorization: Bearer {key}\r\n"),
                &body,
            )
            .finish()
    };
    let tags = get("/api/tags", "all").json();
    let names: Vec<&str> = tags["models"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| m["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["a", "b", "any", "far/x"]);
    assert_eq!(show("far/x", "all").json()["capabilities"], json!(["completion"]));
    let a = &tags["models"][0];
    assert_eq!(
        (&a["size"], &a["details"]["family"]),
        (&json!(64), &json!("qwen3"))
    );
    assert_eq!(a["digest"].as_str().unwrap().len(), 64);
    assert_eq!(
        get("/api/tags", "only-b").json()["models"]
            .as_array()
            .unwrap()
            .len(),
        1
    );
    assert_eq!(
        show("al:latest", "all").json()["model_info"]["qwen3.context_length"],
        99
    );
    assert_eq!(
        show("b", "only-b").json()["capabilities"],
        json!(["completion", "tools", "vision"])
    );
    assert_eq!(show("a", "only-b").status, 403);
    let closed = swapd.get("/api/tags");
    assert_eq!(closed.status, 401);
    assert!(closed.json()["error"].is_string() && closed.header("www-authenticate").is_some());
}

#[test]
fn a_port_of_its_own_serves_nothing_else() {
    let config = "ollama: {listen: '127.0.0.1:0'}\nmodels: {m: {worker: {model: DIR}}}\n";
    let swapd = Swapd::start(config);
    let log = swapd.get("/logs").body;
    let own = log
        .split("clients of Ollama: http://")
        .nth(1)
        .unwrap()
        .lines()
        .next()
        .unwrap()
        .to_owned();
    let main = swapd.address.clone();
    let mut swapd = swapd;
    swapd.address = own;
    assert_eq!(swapd.get("/").body, "Ollama is running");
    let version = swapd.get("/api/version").json();
    assert!(version["version"] == swapd::ollama::API_LEVEL && version["swapd_version"].is_string());
    assert_eq!(swapd.get("/api/tags").json()["models"][0]["name"], "m");
    assert_eq!(swapd.get("/v1/models").json()["data"][0]["id"], "m");
    assert_eq!(swapd.chat("m", "").status, 200);
    for path in [
        "/running",
        "/unload",
        "/api/models/unload",
        "/logs",
        "/metrics",
        "/api/events",
        "/upstream/m/x",
    ] {
        let answer = swapd.get(path);
        assert_eq!(answer.status, 404, "{path}");
        assert!(answer.json()["error"].is_string());
    }
    swapd.address = main;
    // llama-swap's answer, with Ollama's level beside it.
    let version = swapd.get("/api/version").json();
    for key in ["version", "commit", "build_date", "ollama_version"] {
        assert!(version[key].is_string(), "{version}");
    }
    assert_eq!(swapd.get("/").body, "swapd is running\n");
}

//! A server on a free port, and a client that looks closely.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use api_types::sse::{Decoder, Event};
use bytes::Bytes;
use chat_format::{ChatTemplate, ReasoningFormat};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use mlxworker::backend::scripted::{Act, Plan, Script, ScriptedBackend};
use mlxworker::backend::{Backend, FinishReason, GenerateRequest};
use mlxworker::http::{ChatFormat, HttpConfig, Service, ServiceParts, router};
use mlxworker::text::TextTokenizer;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};

pub(crate) const MODEL: &str = "demo";
pub(crate) const CONTEXT: usize = 1024;
pub(crate) const VOCABULARY: usize = 2048;

pub(crate) fn model_folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../models/demo/model")
}

pub(crate) fn tokenizer() -> TextTokenizer {
    static SHARED: OnceLock<TextTokenizer> = OnceLock::new();
    SHARED
        .get_or_init(|| TextTokenizer::load(&model_folder()).unwrap())
        .clone()
}

/// The demonstration model's tokenizer, were it one that begins every sequence with this token.
pub(crate) fn beginning_with(token: &str) -> TextTokenizer {
    let text = std::fs::read_to_string(model_folder().join("tokenizer.json")).unwrap();
    let mut file: Value = serde_json::from_str(&text).unwrap();
    let id = tokenizer().token_id(token).unwrap();
    let (first, text) = (
        json!({"SpecialToken": {"id": token, "type_id": 0}}),
        |id: &str| json!({"Sequence": {"id": id, "type_id": 0}}),
    );
    file["post_processor"] = json!({
        "type": "TemplateProcessing",
        "single": [first, text("A")],
        "pair": [first, text("A"), text("B")],
        "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}},
    });
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), file.to_string()).unwrap();
    let found = TextTokenizer::load(folder.path()).unwrap();
    assert_eq!(found.encode("", true).unwrap(), [id]);
    found
}

/// The tokens of a text, as a model would write it.
pub(crate) fn say(text: &str) -> Script {
    tokenizer()
        .encode(text, false)
        .unwrap()
        .into_iter()
        .map(Act::Token)
        .collect()
}

/// One token per character, so that nothing comes out whole.
pub(crate) fn spell(text: &str) -> Script {
    text.chars().flat_map(|c| say(&c.to_string())).collect()
}

pub(crate) fn stop(mut script: Script) -> Plan {
    script.push(Act::Finish(FinishReason::Stop));
    Ok(script)
}

pub(crate) fn length(mut script: Script) -> Plan {
    script.push(Act::Finish(FinishReason::Length));
    Ok(script)
}

pub(crate) fn wait(millis: u64) -> Act {
    Act::Wait(Duration::from_millis(millis))
}

/// The prompt as text, special tokens left out.
pub(crate) fn prompt_text(request: &GenerateRequest) -> String {
    tokenizer().decode(&request.prompt).unwrap()
}

pub(crate) struct Server<B = ScriptedBackend> {
    pub(crate) address: SocketAddr,
    pub(crate) backend: Arc<B>,
    pub(crate) service: Arc<Service>,
}

pub(crate) async fn start(planner: impl Fn(&GenerateRequest) -> Plan + Send + Sync + 'static) -> Server {
    start_with(|_| {}, planner).await
}

pub(crate) async fn start_with(
    configure: impl FnOnce(&mut HttpConfig),
    planner: impl Fn(&GenerateRequest) -> Plan + Send + Sync + 'static,
) -> Server {
    start_on(ScriptedBackend::new(CONTEXT, VOCABULARY, planner), configure).await
}

/// With another way of writing chats than the demonstration model's.
pub(crate) async fn start_chat(
    chat: Option<ChatFormat>,
    planner: impl Fn(&GenerateRequest) -> Plan + Send + Sync + 'static,
) -> Server {
    let backend = ScriptedBackend::new(CONTEXT, VOCABULARY, planner);
    start_all(backend, |_| {}, chat, tokenizer()).await
}

/// With another tokenizer than the demonstration model's.
pub(crate) async fn start_tokenizing(
    tokenizer: TextTokenizer,
    planner: impl Fn(&GenerateRequest) -> Plan + Send + Sync + 'static,
) -> Server {
    let backend = ScriptedBackend::new(CONTEXT, VOCABULARY, planner);
    start_all(backend, |_| {}, Some(demo_chat()), tokenizer).await
}

fn demo_chat() -> ChatFormat {
    let template = ChatTemplate::from_dir(&model_folder()).unwrap();
    ChatFormat {
        tool_format: template.tool_format(),
        template,
        unknown_tools: None,
        reasoning: ReasoningFormat::Auto,
        auto_tools: true,
        template_kwargs: serde_json::Map::new(),
    }
}

pub(crate) async fn start_on<B: Backend>(backend: B, configure: impl FnOnce(&mut HttpConfig)) -> Server<B> {
    start_all(backend, configure, Some(demo_chat()), tokenizer()).await
}

async fn start_all<B: Backend>(
    backend: B,
    configure: impl FnOnce(&mut HttpConfig),
    chat: Option<ChatFormat>,
    tokenizer: TextTokenizer,
) -> Server<B> {
    let backend = Arc::new(backend);
    let mut config = HttpConfig {
        served_model: MODEL.to_owned(),
        default_max_tokens: 100,
        max_request_tokens: 200,
        eos_tokens: vec![2041, 2039],
        ..HttpConfig::default()
    };
    configure(&mut config);
    let service = Service::new(ServiceParts {
        config,
        tokenizer,
        chat,
        backend: Arc::clone(&backend) as Arc<dyn Backend>,
    });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(axum::serve(listener, router(Arc::clone(&service))).into_future());
    Server {
        address,
        backend,
        service,
    }
}

pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: http::HeaderMap,
    pub(crate) body: Vec<u8>,
}

impl Reply {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.text()))
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

impl<B> Server<B> {
    /// A connection of its own, and the task that drives it: aborting that is a disconnect.
    async fn connect(&self) -> (SendRequest<Full<Bytes>>, tokio::task::JoinHandle<()>) {
        let io = TokioIo::new(TcpStream::connect(self.address).await.unwrap());
        let (sender, connection) = hyper::client::conn::http1::handshake(io).await.unwrap();
        let task = tokio::spawn(async move {
            let _ = connection.await;
        });
        (sender, task)
    }

    pub(crate) async fn send(&self, request: http::Request<Full<Bytes>>) -> Reply {
        let (mut sender, _connection) = self.connect().await;
        let response = sender.send_request(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let body = body.collect().await.unwrap().to_bytes().to_vec();
        Reply {
            status: parts.status.as_u16(),
            headers: parts.headers,
            body,
        }
    }

    pub(crate) fn request(
        &self,
        method: &str,
        path: &str,
        body: impl Into<Bytes>,
    ) -> http::Request<Full<Bytes>> {
        http::Request::builder()
            .method(method)
            .uri(path)
            .header("host", "localhost")
            .header("content-type", "application/json")
            .body(Full::new(body.into()))
            .unwrap()
    }

    pub(crate) async fn get(&self, path: &str) -> Reply {
        self.send(self.request("GET", path, "")).await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Reply {
        self.send(self.request("POST", path, body.to_string())).await
    }

    /// A chat with one message of the user and whatever else.
    pub(crate) async fn chat(&self, extra: Value) -> Reply {
        self.post("/v1/chat/completions", &with_message(extra)).await
    }

    pub(crate) async fn open(&self, path: &str, body: &Value) -> Open {
        let (mut sender, connection) = self.connect().await;
        let request = self.request("POST", path, body.to_string());
        let response = sender.send_request(request).await.unwrap();
        Open {
            _sender: sender,
            connection,
            response,
            decoder: Decoder::new(),
            raw: Vec::new(),
        }
    }

    /// Opens a stream, checks its headers, and reads it to its end.
    pub(crate) async fn stream(&self, path: &str, mut body: Value) -> Stream {
        body["stream"] = true.into();
        let mut open = self.open(path, &body).await;
        assert_eq!(open.response.status(), 200);
        assert_eq!(open.response.headers()["content-type"], "text/event-stream");
        let mut events = Vec::new();
        let clean = loop {
            match open.next().await {
                Some(Ok(more)) => events.extend(more),
                Some(Err(_)) => break false,
                None => break true,
            }
        };
        assert!(
            open.decoder.is_between_events(),
            "the stream ends within an event"
        );
        let raw = String::from_utf8(open.raw).unwrap();
        Stream { events, clean, raw }
    }

    pub(crate) async fn chat_stream(&self, extra: Value) -> Stream {
        self.stream("/v1/chat/completions", with_message(extra)).await
    }
}

pub(crate) fn with_message(extra: Value) -> Value {
    let mut body = json!({"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]});
    for (key, value) in extra.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

/// A response that is still coming.
pub(crate) struct Open {
    _sender: SendRequest<Full<Bytes>>,
    connection: tokio::task::JoinHandle<()>,
    pub(crate) response: hyper::Response<Incoming>,
    pub(crate) decoder: Decoder,
    pub(crate) raw: Vec<u8>,
}

impl Open {
    /// The events of the next piece of the body; an error when the connection was cut.
    pub(crate) async fn next(&mut self) -> Option<Result<Vec<Event>, hyper::Error>> {
        let frame = match self.response.body_mut().frame().await? {
            Ok(frame) => frame,
            Err(e) => return Some(Err(e)),
        };
        let data = frame.into_data().unwrap();
        self.raw.extend_from_slice(&data);
        Some(Ok(self.decoder.push(&data)))
    }

    /// Reads until the first event.
    pub(crate) async fn first(&mut self) -> Event {
        loop {
            if let Some(event) = self.next().await.unwrap().unwrap().into_iter().next() {
                return event;
            }
        }
    }

    /// Drops the connection as a client does that goes away.
    pub(crate) fn disconnect(self) {
        self.connection.abort();
    }
}

/// A stream that has ended.
#[derive(Debug)]
pub(crate) struct Stream {
    pub(crate) events: Vec<Event>,
    /// The body's end was sent.
    pub(crate) clean: bool,
    pub(crate) raw: String,
}

impl Stream {
    /// All chunks; checks that the stream is complete and strictly formed.
    pub(crate) fn chunks(&self) -> Vec<Value> {
        assert!(self.clean, "{}", self.raw);
        // Nothing but `data: ...` lines and comments, each followed by one empty line.
        for block in self.raw.strip_suffix("\n\n").unwrap().split("\n\n") {
            assert!(!block.contains('\n') && !block.contains('\r'), "{block:?}");
            assert!(
                block.starts_with("data: ") || block.starts_with(": "),
                "{block:?}"
            );
        }
        let (last, chunks) = self.events.split_last().unwrap();
        assert_eq!(last.data, "[DONE]");
        let chunks: Vec<Value> = chunks
            .iter()
            .map(|e| serde_json::from_str(&e.data).unwrap())
            .collect();
        for chunk in &chunks {
            for key in ["id", "object", "created", "model"] {
                assert_eq!(chunk[key], chunks[0][key], "{key} changes within a stream");
            }
        }
        chunks
    }

    /// The concatenation of a delta's text over all chunks of a choice.
    pub(crate) fn joined(&self, index: usize, field: &str) -> String {
        self.deltas(index)
            .iter()
            .filter_map(|delta| delta[field].as_str())
            .collect()
    }

    pub(crate) fn deltas(&self, index: usize) -> Vec<Value> {
        let choices = self
            .chunks()
            .into_iter()
            .flat_map(|chunk| chunk["choices"].as_array().unwrap().clone());
        choices
            .filter(|choice| choice["index"] == index)
            .map(|choice| choice["delta"].clone())
            .collect()
    }

    /// The one finish reason of a choice.
    pub(crate) fn finish_reason(&self, index: usize) -> String {
        let choices = self
            .chunks()
            .into_iter()
            .flat_map(|chunk| chunk["choices"].as_array().unwrap().clone());
        let reasons: Vec<Value> = choices
            .filter(|choice| choice["index"] == index)
            .map(|choice| choice["finish_reason"].clone())
            .collect();
        let (last, others) = reasons.split_last().unwrap();
        assert!(others.iter().all(Value::is_null), "{reasons:?}");
        last.as_str().unwrap().to_owned()
    }
}

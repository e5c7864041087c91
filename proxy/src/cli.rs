//! Command line: llama-swap's flags with one dash or two, and the commands of our own.

use std::hash::{BuildHasher, RandomState};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use registry::{Code, Diagnostic, Options, Registry, Severity};
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{ClientConnection, StreamOwned};

use crate::activity::Activity;
use crate::catalog::Catalog;
use crate::house::House;
use crate::http::{self, App};
use crate::logline;
use crate::logs::Logs;
use crate::peers;
use crate::performance::{self, Performance};
use crate::process::supervise;
use crate::reload::Reloader;
use crate::tls::{self, Shown};
use crate::watched::Contents;

/// Where it listens unless told otherwise.
pub const DEFAULT_LISTEN: &str = "127.0.0.1:11434";
/// Environment variable with the API key that `swapd reload` presents.
pub const KEY_ENV: &str = "SWAPD_API_KEY";
/// Said where nothing names a registry. llama-swap ends with 1 then, as with one that cannot be read.
const NO_CONFIG: &str = "--config FILE or --config-dir DIR is required";

const HELP: &str = "\
swapd: one address in front of many model servers

Usage:
  swapd --config FILE [--config-dir DIR] [--listen ADDR] [--watch-config]   serve
  swapd check --config FILE [--config-dir DIR] [--lenient]                   validate, exit 0 or 1
  swapd reload [--listen ADDR] [--tls-cert-file FILE]                        take up the file now, exit 0 or 1
  swapd config show --config FILE [--config-dir DIR]                         what the registry resolves to
  swapd schema                                                               its JSON Schema, for editors
  swapd --version

Options (one dash or two):
  --config FILE       registry, YAML or JSON
  --config-dir DIR    more registry files, *.yml and *.yaml, merged by name
  --listen ADDR       address, default 127.0.0.1:11434; ':PORT' means 127.0.0.1:PORT
                      (llama-swap: all addresses of the machine)
  --tls-cert-file FILE, --tls-key-file FILE
                      serve TLS (PEM; certificate chain and key); for 'reload': the certificate that swapd shows
  --ollama-listen A   a second port for clients of Ollama, loopback only; comes before the registry's ollama.listen
  --watch-config      take up changes of the registry without a restart
  --lenient           check: unknown keys are no failure

Environment:
  SWAPD_API_KEY       reload: the API key to present, where the registry has apiKeys
";

/// What the command line asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Serve.
    Serve(Paths, ServeOptions),
    /// Validate; whether unknown keys are forgiven.
    Check(Paths, bool),
    /// Print what the registry resolves to.
    Show(Paths),
    /// Print the JSON Schema of the registry, for editors.
    Schema,
    /// Have the swapd at this address take up its registry; over TLS if it shows the certificate of this file.
    Reload(String, Option<PathBuf>),
    /// Print the version.
    Version,
    /// Print the help.
    Help,
}

/// Where the registry is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Paths {
    /// One file.
    pub config: Option<PathBuf>,
    /// A directory of files.
    pub config_dir: Option<PathBuf>,
}

/// How to serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServeOptions {
    /// Address as written.
    pub listen: String,
    /// Whether to follow changes of the registry.
    pub watch: bool,
    /// PEM file of the certificate chain.
    pub tls_cert: Option<PathBuf>,
    /// PEM file of its key.
    pub tls_key: Option<PathBuf>,
    /// Address of the port that is Ollama's alone.
    pub ollama: Option<SocketAddr>,
}

/// Reads the arguments after the program's name.
///
/// # Errors
/// A sentence that says what is wrong.
pub fn parse(args: &[String]) -> Result<Command, String> {
    let mut args = args.iter().peekable();
    let reload = args.next_if(|a| *a == "reload").is_some();
    let check = !reload && args.next_if(|a| *a == "check").is_some();
    let show = !reload && !check && args.next_if(|a| *a == "config").is_some();
    if show && args.next_if(|a| *a == "show").is_none() {
        return Err("'config' is followed by 'show'".to_owned());
    }
    let serves = !check && !reload && !show;
    if serves && args.next_if(|a| *a == "schema").is_some() {
        return Ok(Command::Schema);
    }
    // The word may be left out, as llama-swap has it.
    let _ = args.next_if(|a| serves && *a == "serve");
    let mut paths = Paths::default();
    let mut options = ServeOptions {
        listen: DEFAULT_LISTEN.to_owned(),
        watch: false,
        tls_cert: None,
        tls_key: None,
        ollama: None,
    };
    let mut lenient = false;
    while let Some(arg) = args.next() {
        let Some(flag) = arg.strip_prefix('-') else {
            return Err(format!("unexpected argument '{arg}'"));
        };
        let flag = flag.strip_prefix('-').unwrap_or(flag);
        let (name, mut inline) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (flag, None),
        };
        let mut value = || {
            inline
                .take()
                .or_else(|| args.next().cloned())
                .ok_or_else(|| format!("--{name} needs a value"))
        };
        match name {
            "config" if !reload => paths.config = Some(value()?.into()),
            "config-dir" if !reload => paths.config_dir = Some(value()?.into()),
            "listen" if serves || reload => options.listen = value()?,
            "tls-cert-file" if serves || reload => options.tls_cert = Some(value()?.into()),
            "tls-key-file" if serves => options.tls_key = Some(value()?.into()),
            "ollama-listen" if serves => {
                let written = value()?;
                let address = registry::parse_loopback(&written);
                options.ollama = Some(address.map_err(|why| format!("--{name} {written}: {why}"))?);
            }
            "watch-config" if serves => options.watch = boolean(name, inline)?,
            // The answer comes when the file is in force or refused: there is nothing more to wait for.
            "wait" if reload => drop(boolean(name, inline)?),
            "lenient" if check => lenient = boolean(name, inline)?,
            "version" => return Ok(Command::Version),
            "h" | "help" => return Ok(Command::Help),
            _ => return Err(format!("unknown option '{arg}'")),
        }
    }
    if reload {
        return Ok(Command::Reload(options.listen, options.tls_cert));
    }
    if paths.config.is_none() && paths.config_dir.is_none() {
        return Err(NO_CONFIG.to_owned());
    }
    if show {
        return Ok(Command::Show(paths));
    }
    Ok(if check {
        Command::Check(paths, lenient)
    } else {
        Command::Serve(paths, options)
    })
}

fn boolean(name: &str, value: Option<String>) -> Result<bool, String> {
    match value.as_deref() {
        None | Some("true" | "1" | "t") => Ok(true),
        Some("false" | "0" | "f") => Ok(false),
        Some(other) => Err(format!("--{name}={other} is neither true nor false")),
    }
}

/// An address as written: `HOST:PORT`; without a host, loopback.
///
/// # Errors
/// A sentence that says what is wrong.
pub fn parse_listen(listen: &str) -> Result<SocketAddr, String> {
    let whole = if listen.starts_with(':') {
        format!("127.0.0.1{listen}")
    } else {
        listen.to_owned()
    };
    let mut found = whole
        .to_socket_addrs()
        .map_err(|e| format!("--listen {listen}: {e}"))?;
    found
        .next()
        .ok_or_else(|| format!("--listen {listen}: no address"))
}

/// The whole program: returns its exit code. 0 normal, 1 a bad registry or address or none, 2 a bad command line.
#[must_use]
pub fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.as_slice() {
        [role, rest @ ..] if role == supervise::ROLE => return supervise::supervise(rest),
        [role, parent, rest @ ..] if role == supervise::EXEC_ROLE => return supervise::exec(parent, rest),
        _ => {}
    }
    match parse(&args) {
        Ok(Command::Version) => {
            say(&format!("swapd {}", env!("CARGO_PKG_VERSION")));
            ExitCode::SUCCESS
        }
        Ok(Command::Help) => {
            say(HELP.trim_end());
            ExitCode::SUCCESS
        }
        Ok(Command::Show(paths)) => show(&paths),
        Ok(Command::Schema) => {
            say(&format!("{:#}", registry::schema()));
            ExitCode::SUCCESS
        }
        Ok(Command::Reload(listen, certificate)) => reload(&listen, certificate.as_deref()),
        Ok(Command::Check(paths, lenient)) => check(&paths, lenient),
        Ok(Command::Serve(paths, options)) => match serve(&paths, &options) {
            Ok(()) => ExitCode::SUCCESS,
            Err(message) => {
                complain(&message);
                ExitCode::from(1)
            }
        },
        Err(message) => {
            complain(&format!("swapd: {message}\n\n{}", HELP.trim_end()));
            ExitCode::from(if message == NO_CONFIG { 1 } else { 2 })
        }
    }
}

fn say(text: &str) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

fn complain(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Reads the registry.
///
/// # Errors
/// All findings, warnings among them.
pub fn load(paths: &Paths, options: &Options<'_>) -> Result<(Registry, Vec<Diagnostic>), Vec<Diagnostic>> {
    Registry::from_paths(paths.config.as_deref(), paths.config_dir.as_deref(), options)
}

fn lines(findings: &[Diagnostic]) -> String {
    findings
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join("\n")
}

fn check(paths: &Paths, lenient: bool) -> ExitCode {
    let (findings, models) = match load(paths, &Options::default()) {
        Ok((registry, warnings)) => (warnings, Some(registry.models.len())),
        Err(errors) => (errors, None),
    };
    if !findings.is_empty() {
        complain(&lines(&findings));
    }
    let fails = |d: &Diagnostic| d.severity == Severity::Error || (!lenient && d.code == Code::UnknownKey);
    match models {
        Some(n) if !findings.iter().any(fails) => {
            say(&format!("ok: {n} model{}", if n == 1 { "" } else { "s" }));
            ExitCode::SUCCESS
        }
        _ => ExitCode::from(1),
    }
}

fn serve(paths: &Paths, options: &ServeOptions) -> Result<(), String> {
    // Everything is parsed before a port is bound.
    let address = parse_listen(&options.listen)?;
    let certificate = certificate(options)?;
    let acceptor = certificate.clone().map(Shown::acceptor).transpose()?;
    let contents = Contents::read(paths).map_err(|errors| lines(&errors))?;
    let parsed = Registry::from_sources(&contents.sources, &Options::default());
    let (registry, warnings) = parsed.map_err(|errors| lines(&errors))?;
    let logs = Logs::default();
    let level = logline::start(&registry.globals, &logs);
    for warning in warnings {
        tracing::warn!("{warning}");
    }
    if let Some(port) = options.listen.strip_prefix(':') {
        tracing::warn!(
            "'{}' names no host: swapd listens on 127.0.0.1, for this machine only. For others too, as llama-swap \
             has it: --listen 0.0.0.0:{port}, and apiKeys in the registry",
            options.listen
        );
    }
    let activity = Activity::new(registry.globals.metrics_max_in_memory);
    activity.configure(&registry.globals)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|e| format!("cannot start the runtime: {e}"))?;
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind(address).await;
        let listener = listener.map_err(|e| format!("cannot listen on {address}: {e}"))?;
        let ollama = match options.ollama.or(registry.globals.ollama_listen) {
            None => None,
            Some(own) => {
                let bound = tokio::net::TcpListener::bind(own).await;
                Some(bound.map_err(|e| format!("cannot listen on {own} for clients of Ollama: {e}"))?)
            }
        };
        let preload = registry.globals.preload.clone();
        let performance = Performance::new(performance::every(&registry.globals));
        let house = House::new(Arc::new(Catalog::new(registry)), logs);
        let loading = house.clone();
        tokio::spawn(async move {
            // One after the other: together they would want everybody's memory, and disk, at once.
            for name in preload {
                if let Err(reason) = loading.load(&name.as_str().into()).await {
                    tracing::warn!(model = %name, ?reason, "preload");
                }
            }
        });
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |d| d.as_secs());
        let reloader = Reloader::new(
            paths.clone(),
            &contents,
            house.clone(),
            activity.clone(),
            performance.clone(),
            certificate,
            level,
        );
        if options.watch {
            tokio::spawn(reloader.clone().watch());
        }
        tokio::spawn(peers::refresh::keep(house.clone(), reloader.outcomes()));
        tokio::spawn(performance.clone().run());
        tokio::spawn(crate::pressure::watch(house.clone()));
        let hardware = performance::hardware();
        if let Err(error) = &hardware {
            tracing::warn!(%error, "what this machine is cannot be found out");
        }
        let app = Arc::new(App {
            activity,
            house,
            reloader,
            performance,
            hardware: hardware.ok(),
            profile: Mutex::new(None),
            profile_feed: tokio::sync::watch::Sender::new(None),
            started_unix: now,
            via: format!("swapd-{:016x}", RandomState::new().hash_one(std::process::id())),
        });
        tokio::spawn(http::control::drop_lost_profile(app.clone()));
        crate::serve::serve(app, listener, acceptor, ollama)
            .await
            .map_err(|e| e.to_string())
    })
}

/// Prints what the registry resolves to, as YAML.
fn show(paths: &Paths) -> ExitCode {
    match load(paths, &Options::default()) {
        Ok((registry, warnings)) => {
            if !warnings.is_empty() {
                complain(&lines(&warnings));
            }
            say(registry.to_yaml().trim_end());
            ExitCode::SUCCESS
        }
        Err(errors) => {
            complain(&lines(&errors));
            ExitCode::from(1)
        }
    }
}

/// TLS as ordered; both files or none.
fn certificate(options: &ServeOptions) -> Result<Option<Arc<Shown>>, String> {
    match (&options.tls_cert, &options.tls_key) {
        (None, None) => Ok(None),
        (Some(certificate), Some(key)) => Shown::read(certificate, key).map(Some),
        (Some(_), None) => Err("--tls-cert-file needs --tls-key-file: TLS takes both".to_owned()),
        (None, Some(_)) => Err("--tls-key-file needs --tls-cert-file: TLS takes both".to_owned()),
    }
}

/// Asks the swapd at `listen` to take up its registry; 0 if it did.
fn reload(listen: &str, certificate: Option<&Path>) -> ExitCode {
    let asked = parse_listen(listen).and_then(|address| {
        let stream = TcpStream::connect(address).map_err(|e| format!("no swapd at {address}: {e}"))?;
        let key = std::env::var(KEY_ENV).map(|k| format!("Authorization: Bearer {k}\r\n")).unwrap_or_default();
        let request = format!(
            "POST /api/reload HTTP/1.1\r\nHost: {address}\r\nContent-Length: 0\r\nConnection: close\r\n{key}\r\n"
        );
        match certificate {
            None => ask(stream, &request),
            Some(certificate) => {
                let config = tls::pinned(certificate)?;
                let connection = ClientConnection::new(config, ServerName::IpAddress(address.ip().into()));
                ask(StreamOwned::new(connection.map_err(|e| e.to_string())?, stream), &request)
            }
        }
    });
    let answer = match asked {
        Ok(answer) => answer,
        Err(message) => {
            complain(&format!("swapd: {message}"));
            return ExitCode::from(1);
        }
    };
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    if head.split(' ').nth(1) == Some("200") {
        say(body);
        return ExitCode::SUCCESS;
    }
    let error: serde_json::Value = serde_json::from_str(body).unwrap_or_default();
    complain(
        error
            .pointer("/error/message")
            .and_then(|m| m.as_str())
            .unwrap_or(body),
    );
    ExitCode::from(1)
}

/// Sends a request and reads until the other side has no more to say.
fn ask(mut stream: impl Read + Write, request: &str) -> Result<String, String> {
    let mut answer = String::new();
    let asked = stream.write_all(request.as_bytes());
    asked
        .and_then(|()| stream.read_to_string(&mut answer))
        .map_err(|e| e.to_string())?;
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(line: &str) -> Result<Command, String> {
        parse(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn one_dash_or_two() {
        let expected = Command::Serve(
            Paths {
                config: Some("f.yaml".into()),
                config_dir: None,
            },
            ServeOptions {
                listen: ":8080".into(),
                watch: true,
                tls_cert: None,
                tls_key: None,
                ollama: None,
            },
        );
        assert_eq!(
            args("-config f.yaml -listen :8080 -watch-config").unwrap(),
            expected
        );
        assert_eq!(
            args("--config=f.yaml --watch-config=true --listen=:8080").unwrap(),
            expected
        );
        assert_eq!(
            args("serve --config f.yaml --listen :8080 --watch-config").unwrap(),
            args("-config f.yaml -listen :8080 -watch-config").unwrap()
        );
        assert!(matches!(
            args("config show --config f").unwrap(),
            Command::Show(_)
        ));
        assert_eq!(args("schema").unwrap(), Command::Schema);
        assert_eq!(args("--version").unwrap(), Command::Version);
        assert!(matches!(
            args("check --config f --lenient").unwrap(),
            Command::Check(_, true)
        ));
    }

    #[test]
    fn mistakes_are_named() {
        assert_eq!(args("--confg f").unwrap_err(), "unknown option '--confg'");
        assert_eq!(args("--config").unwrap_err(), "--config needs a value");
        assert!(args("").unwrap_err().contains("required"));
        assert!(
            args("--config f --watch-config=maybe")
                .unwrap_err()
                .contains("maybe")
        );
        assert!(
            args("--config f --ollama-listen 0.0.0.0:1")
                .unwrap_err()
                .contains("loopback")
        );
        assert_eq!(parse_listen(":81").unwrap().to_string(), "127.0.0.1:81");
        assert!(parse_listen("nonsense").is_err());
    }
}

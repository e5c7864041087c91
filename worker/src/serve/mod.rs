//! `mlxworker serve`: from a command line to a worker that answers, and to its end.
//!
//! | module    | idea                                                                       |
//! |-----------|----------------------------------------------------------------------------|
//! | `hub`     | a model argument to a directory                                            |
//! | `startup` | a directory and knobs to a service                                         |
//! | `control` | the control socket: lines out, commands and the end of file in             |
//! | `server`  | answering until something ends it                                          |
//!
//! Order: command line, directory, port (reserved, not listening), then weights, tokenizer and template at once; only
//! when a real prefill and decode have run does the socket listen and the port get announced.

mod control;
mod hub;
mod server;
mod startup;

use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use api_types::control::WorkerEvent;
use knobs::ParsedArgs;
use tokio::net::TcpSocket;
use tokio::sync::mpsc;

pub use control::Control;
pub use hub::{HubPlaces, resolve_model};
pub use server::{Ending, Signals, serve};

use crate::backend::Backend;
use crate::engine::{Engine, EngineConfig};
use crate::http::Service;

/// Runs a worker to its end.
///
/// # Errors
/// Whatever keeps it from serving, and the engine's death: the message is for a person, the exit code is to be
/// non-zero. It has been told to the proxy already.
pub async fn run(args: ParsedArgs) -> Result<Ending> {
    let mut control = Control::from_environment()?;
    match start_and_serve(&args, control.as_mut()).await {
        Ok(ending) => Ok(ending),
        Err(error) => {
            if let Some(control) = &mut control {
                control
                    .send(&WorkerEvent::Fatal {
                        message: format!("{error:#}"),
                    })
                    .await;
            }
            Err(error)
        }
    }
}

async fn start_and_serve(args: &ParsedArgs, mut control: Option<&mut Control>) -> Result<Ending> {
    let knobs = &args.knobs;
    let folder = resolve_model(&args.model, &HubPlaces::from_environment())?;
    let socket = reserve_port(&knobs.host, knobs.port)?;
    let text_folder = folder.clone();
    let text = tokio::task::spawn_blocking({
        let (args, supervised) = (args.clone(), control.is_some());
        move || startup::Text::load(&args, &text_folder, supervised)
    });
    let engine = Engine::start(
        EngineConfig {
            model: folder,
            mapped: knobs.weights == "mmap",
            context_length: knobs.context_length.map(size).transpose()?,
            max_running: size(knobs.max_num_seqs)?,
            max_waiting: size(knobs.max_waiting)?,
            prefill_chunk: size(knobs.prefill_step_size)?,
            buffer_cache_bytes: size(knobs.mlx_cache_limit_mb)?.saturating_mul(1 << 20),
        },
        progress(control.as_deref()),
    );
    let started = async {
        let text = async { text.await.context("loading the tokenizer")? };
        let engine = async { engine.await.map_err(anyhow::Error::from) };
        tokio::try_join!(text, engine)
    };
    let loaded = match control.as_deref_mut() {
        // A proxy that dies while a big model loads must not leave the loading behind.
        Some(control) => tokio::select! {
            loaded = started => Some(loaded),
            () = control.gone_or_stopped() => None,
        },
        None => Some(started.await),
    };
    let Some(loaded) = loaded else {
        return Ok(Ending::Stopped);
    };
    let (text, engine) = loaded?;
    let backend: Arc<dyn Backend> = Arc::new(engine);
    let service = Service::new(text.into_parts(Arc::clone(&backend))?);
    let listener = socket.listen(1024).context("listening")?;
    let address = listener.local_addr().context("the listening address")?;
    let limits = backend.info().limits.clone();
    let model = service.served_model().to_owned();
    match control.as_deref_mut() {
        Some(control) => {
            let ready = WorkerEvent::Ready {
                port: address.port(),
                pid: std::process::id(),
                model,
                limits,
            };
            control.send(&ready).await;
        }
        None => say(&format!("{model} is served at http://{address}/v1")),
    }
    let signals = Signals::install().context("watching for signals")?;
    match serve(listener, service, control, signals).await? {
        Ending::EngineDied(reason) => bail!("the engine has died: {reason}"),
        ending => Ok(ending),
    }
}

/// Takes the port without listening: a taken port shows before minutes of loading, and nobody can connect too early.
fn reserve_port(host: &str, port: u16) -> Result<TcpSocket> {
    let ip: IpAddr = match host {
        "localhost" => [127, 0, 0, 1].into(),
        other => other
            .parse()
            .with_context(|| format!("--host {other}: not an IP address"))?,
    };
    let address = SocketAddr::new(ip, port);
    let socket = if ip.is_ipv4() {
        TcpSocket::new_v4()
    } else {
        TcpSocket::new_v6()
    }
    .context("a socket")?;
    socket.set_reuseaddr(true).context("a socket")?;
    socket
        .bind(address)
        .with_context(|| format!("--host {host} --port {port}: {address} cannot be used"))?;
    Ok(socket)
}

/// Tells how far loading has come: the proxy, or a person.
fn progress(control: Option<&Control>) -> impl FnMut(crate::model::LoadProgress) + Send + 'static {
    let events: Option<mpsc::Sender<WorkerEvent>> = control.map(Control::events);
    move |progress| match &events {
        // Progress may be lost when nobody reads; nothing may wait for it.
        Some(events) => {
            let phase = "weights".to_owned();
            let _ = events.try_send(WorkerEvent::Loading {
                phase,
                done: progress.done,
                total: progress.total,
            });
        }
        None => {
            let megabytes = |bytes: u64| bytes / 1_000_000;
            say(&format!(
                "weights: {} of {} MB",
                megabytes(progress.done),
                megabytes(progress.total)
            ));
        }
    }
}

/// A line for the person at the terminal, whatever the log level.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr().lock(), "mlxworker: {line}");
}

fn size(number: u64) -> Result<usize> {
    usize::try_from(number).with_context(|| format!("{number} is too large for this machine"))
}

//! `mlxworker serve`: from a command line to a worker that answers, and to its end.
//!
//! | module    | idea                                                                       |
//! |-----------|----------------------------------------------------------------------------|
//! | `hub`     | a model argument to a directory                                            |
//! | `startup` | a directory and knobs to a service                                         |
//! | `control` | the control socket: lines out, commands and the end of file in             |
//! | `environment` | variables that MLX reads at its start                                   |
//! | `prefetch` | weight files read ahead while the model loads                              |
//! | `watchdog` | a step that never ends                                                    |
//! | `server`  | answering until something ends it                                          |
//!
//! Order: command line, directory, port (reserved, not listening), then weights, tokenizer and template at once; only
//! when a real prefill and decode have run does the socket listen and the port get announced.

mod control;
pub mod environment;
mod hub;
mod prefetch;
mod server;
mod startup;
mod watchdog;

use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use api_types::control::WorkerEvent;
use knobs::ParsedArgs;
use tokio::net::TcpSocket;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;

pub use control::Control;
pub use hub::{HubPlaces, resolve_model};
pub use server::{Ending, Signals, serve};
pub use startup::{default_sampling, engine as engine_config};
pub use watchdog::Watchdog;

use crate::backend::{Backend, EngineState};
use crate::engine::{Engine, StartError};
use crate::http::{LoadReport, Service, read_prompts, warm};
use crate::model::{LoadPhase, LoadProgress};

/// A worker could not serve, or not any more. Why has been told, on standard error and to the proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Failed {
    /// What the process is to exit with: [`mlx_ext::LOST_PAGE`] where a weight file can no longer be read, else 1.
    pub code: u8,
}

/// The engine has died, since what it reads its weights from is gone.
#[derive(Debug, thiserror::Error)]
#[error("the engine has died: {0}")]
struct WeightsLost(String);

/// Time for a loading that nobody waits for any more to come to its end.
const LOADING_END: Duration = Duration::from_secs(5);

/// Longest time for loading and warming up, and again for warm prompts. Generous, since both read the weights from
/// whatever disk they lie on, and a GPU's kernels may be compiled for minutes: this is for a device that never answers.
const START_LIMIT: Duration = Duration::from_secs(3600);

/// A start that takes longer than [`START_LIMIT`], or than ten steps may where that is more, is given up. Like the
/// watchdog, which begins with the first request, it waits for ever where `watchdog` is zero.
///
/// # Errors
/// The start's own, or that it has not ended.
async fn in_time<T>(watchdog: Duration, what: &str, start: impl Future<Output = Result<T>>) -> Result<T> {
    if watchdog.is_zero() {
        return start.await;
    }
    let limit = START_LIMIT.max(watchdog.saturating_mul(10));
    timeout(limit, start).await.unwrap_or_else(|_| {
        bail!(
            "{what} has not ended for {} s: the device may hang (--watchdog-seconds 0 waits for ever)",
            limit.as_secs()
        )
    })
}

/// How far the engine has come, for the end.
enum Started {
    Nothing,
    Loading(JoinHandle<Result<Engine, StartError>>),
    Engine(Arc<dyn Backend>),
}

/// Runs a worker to its end.
///
/// # Errors
/// [`Failed`] for whatever keeps it from serving, and for the engine's death.
pub async fn run(args: ParsedArgs) -> Result<Ending, Failed> {
    let mut control = None;
    let mut started = Started::Nothing;
    let result = match Control::from_environment() {
        Ok(found) => {
            control = found;
            start_and_serve(&args, control.as_mut(), &mut started).await
        }
        Err(error) => Err(error),
    };
    let mut failed = None;
    let result = match result {
        Ok(ending) => Ok(ending),
        Err(error) => {
            let code = if error.is::<WeightsLost>() {
                mlx_ext::LOST_PAGE
            } else {
                1
            };
            failed = Some(LastResort::arm(code));
            let message = format!("{error:#}");
            say(&message);
            if let Some(control) = &mut control {
                control.send(&WorkerEvent::Fatal { message }).await;
            }
            Err(Failed { code })
        }
    };
    if result == Ok(Ending::ProxyGone) {
        // Nobody is left to read an exit code; the memory is wanted back at once.
        return result;
    }
    // A process that ends while another thread is inside MLX may crash on its way out, and lose its exit code.
    let engine = match started {
        Started::Nothing => None,
        Started::Loading(loading) => match timeout(LOADING_END, loading).await {
            Ok(Ok(Ok(engine))) => Some(Arc::new(engine) as Arc<dyn Backend>),
            _ => None,
        },
        Started::Engine(engine) => Some(engine),
    };
    if let Some(engine) = engine {
        engine.stop();
        let mut state = engine.state();
        let _ = timeout(
            LOADING_END,
            state.wait_for(|state| *state != EngineState::Running),
        )
        .await;
    }
    drop(failed);
    result
}

/// Ends the process when its own way to the end takes too long, wherever that stands still: a proxy that is alive and
/// reads neither control socket nor log can hold up every line that is written.
struct LastResort {
    _until_dropped: std::sync::mpsc::Sender<()>,
}

/// Time for the way to the end: more than all its parts may take together.
const LAST_RESORT: Duration = Duration::from_secs(30);

impl LastResort {
    /// From now on, until dropped.
    fn arm(code: u8) -> Self {
        let (dropped, drop_seen) = std::sync::mpsc::channel();
        // Without a thread there is no last resort, and the usual way remains.
        let _ = std::thread::Builder::new()
            .name("last-resort".to_owned())
            .spawn(move || {
                if drop_seen.recv_timeout(LAST_RESORT) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                    mlx_ext::exit_now(code);
                }
            });
        Self {
            _until_dropped: dropped,
        }
    }
}

/// Leaves in `started` what has been started.
async fn start_and_serve(
    args: &ParsedArgs,
    mut control: Option<&mut Control>,
    started: &mut Started,
) -> Result<Ending> {
    let knobs = &args.knobs;
    let folder = resolve_model(&args.model, &HubPlaces::from_environment())?;
    let socket = reserve_port(&knobs.host, knobs.port)?;
    let text = tokio::task::spawn_blocking({
        let (args, folder, supervised) = (args.clone(), folder.clone(), control.is_some());
        move || startup::Text::load(&args, &folder, supervised)
    });
    let began = Instant::now();
    let mut ahead = (knobs.weights == "mmap")
        .then(|| prefetch::Ahead::start(&folder, control.as_deref().map(Control::events)));
    let config = startup::engine(knobs, folder)?;
    let warm_prompts = match &knobs.warm_prompts {
        Some(file) if !knobs.enable_prefix_cache => {
            bail!("--warm-prompts {file} needs --enable-prefix-cache: nothing would remember them")
        }
        Some(file) => read_prompts(Path::new(file))?,
        None => Vec::new(),
    };
    let watchdog = config.watchdog;
    *started = Started::Loading(tokio::spawn(Engine::start(config, progress(control.as_deref()))));
    // Both are under way; what is wrong with the text shows first.
    let loaded = in_time(watchdog, "loading and warming up the model", async {
        let text = text.await.context("loading the tokenizer")??;
        let Started::Loading(engine) = started else {
            bail!("the engine was not started")
        };
        let engine = engine.await;
        *started = Started::Nothing;
        let engine: Arc<dyn Backend> = Arc::new(engine.context("loading the model")??);
        *started = Started::Engine(Arc::clone(&engine));
        Ok((text, engine))
    });
    let (text, backend) = match control.as_deref_mut() {
        // A proxy that dies while a big model loads must not leave the loading behind.
        Some(control) => tokio::select! {
            loaded = loaded => loaded?,
            ending = control.gone_or_stopped() => return Ok(ending),
        },
        None => loaded.await?,
    };
    let in_place = backend.info().limits.get("weights_in_place") == Some(&true.into());
    if let Some(ahead) = &mut ahead {
        ahead.loaded(in_place);
    }
    let load = LoadReport::new(began.elapsed());
    tracing::info!(
        seconds = load.seconds,
        resident = load.resident_bytes,
        footprint = load.footprint_bytes,
        "loaded and warmed up"
    );
    let service = Service::new(text.into_parts(Arc::clone(&backend), load)?);
    if !warm_prompts.is_empty() {
        let events = control.as_deref().map(Control::events);
        let warming = in_time(watchdog, "computing the warm prompts", async {
            let tell = tokens_computed(events);
            let tokens = warm(&service, warm_prompts, tell).await?;
            tracing::info!(tokens, "warm prompts are computed");
            Ok(())
        });
        match control.as_deref_mut() {
            Some(control) => tokio::select! {
                warmed = warming => warmed?,
                ending = control.gone_or_stopped() => return Ok(ending),
            },
            None => warming.await?,
        }
    }
    let listener = socket.listen(1024).context("listening")?;
    let address = listener.local_addr().context("the listening address")?;
    let mut limits = backend.info().limits.clone();
    limits.extend(load.fields());
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
    let watchdog = Watchdog::start(&service, watchdog).context("starting the watchdog")?;
    let ending = serve(listener, Arc::clone(&service), control, signals).await;
    drop(watchdog);
    if service.is_declared_dead() {
        // Its thread is not waited for: it will not end.
        *started = Started::Nothing;
    }
    match ending? {
        Ending::EngineDied(reason) if backend.weights_lost() => Err(WeightsLost(reason).into()),
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

/// Tells how far loading has come: the proxy, or a person, who hears of each tenth.
fn progress(control: Option<&Control>) -> impl FnMut(LoadProgress) + Send + 'static {
    let events: Option<mpsc::Sender<WorkerEvent>> = control.map(Control::events);
    let mut said = None;
    move |LoadProgress { phase, done, total }| match &events {
        Some(events) => loading(events, phase.name(), done, total),
        None => {
            let tenth = done.saturating_mul(10) / total.max(1);
            if said.replace((phase, tenth)) == Some((phase, tenth)) {
                return;
            }
            let (unit, size) = match phase {
                LoadPhase::Weights => ("MB", 1_000_000),
                LoadPhase::WarmUp => ("steps", 1),
            };
            let (percent, total) = (done.saturating_mul(100) / total.max(1), total / size);
            say(&format!("{}: {percent} % of {total} {unit}", phase.name()));
        }
    }
}

/// The same for warm prompts; a person reads of them in the log.
fn tokens_computed(events: Option<mpsc::Sender<WorkerEvent>>) -> impl FnMut(u64, u64) {
    move |done, total| {
        if let Some(events) = &events {
            loading(events, "warm-prompts", done, total);
        }
    }
}

/// Progress may be lost when nobody reads; nothing may wait for it.
fn loading(events: &mpsc::Sender<WorkerEvent>, phase: &str, done: u64, total: u64) {
    let phase = phase.to_owned();
    let _ = events.try_send(WorkerEvent::Loading { phase, done, total });
}

/// A line for the person at the terminal, whatever the log level.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr().lock(), "mlxworker: {line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_start_that_never_ends_is_given_up() {
        let hangs = || std::future::pending::<Result<()>>();
        let began = tokio::time::Instant::now();
        for (watchdog, limit) in [(120, 3600), (1000, 10_000)] {
            let error = in_time(Duration::from_secs(watchdog), "loading", hangs())
                .await
                .unwrap_err()
                .to_string();
            assert!(
                error.contains(&format!("loading has not ended for {limit} s")),
                "{error}"
            );
        }
        assert_eq!(began.elapsed().as_secs(), 13_600);
        let unwatched = in_time(Duration::ZERO, "loading", hangs());
        assert!(timeout(START_LIMIT * 1000, unwatched).await.is_err());
        assert_eq!(
            in_time(Duration::from_secs(1), "", async { Ok(5) })
                .await
                .unwrap(),
            5
        );
    }
}

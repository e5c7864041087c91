//! Answering until something ends it.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use api_types::control::{Heartbeat, ProxyCommand, WorkerEvent};
use axum::serve::ListenerExt;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::time::{MissedTickBehavior, timeout};

use super::control::Control;
use crate::http::{FootprintReading, Service, router};

/// Time between two heartbeats.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// How long running requests may go on after SIGTERM or SIGINT.
const DRAIN_GRACE: Duration = Duration::from_secs(30);
/// How long clients may take to read their error.
const FAREWELL: Duration = Duration::from_secs(1);

/// How long the engine's thread may take to end its step.
const ENGINE_END: Duration = Duration::from_millis(500);

/// Why a worker ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// Running requests were finished (or their grace was over).
    Drained,
    /// The proxy said so; running requests got an error.
    Stopped,
    /// The proxy is gone.
    ProxyGone,
    /// The engine is dead, with the reason.
    EngineDied(String),
}

/// SIGTERM and SIGINT.
#[derive(Debug)]
pub struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    /// Catches them from now on.
    ///
    /// # Errors
    /// The operating system's.
    pub fn install() -> std::io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Serves until a signal, the proxy or the engine ends it. The engine has been told to stop when this returns.
///
/// # Errors
/// The listener's.
pub async fn serve(
    listener: TcpListener,
    service: Arc<Service>,
    mut control: Option<&mut Control>,
    mut signals: Signals,
) -> Result<Ending> {
    let (stop_accepting, stopped) = oneshot::channel::<()>();
    let listener = listener.tap_io(|stream| {
        // A token that is known is sent.
        if let Err(e) = stream.set_nodelay(true) {
            tracing::debug!("TCP_NODELAY: {e}");
        }
    });
    let server = axum::serve(listener, router(Arc::clone(&service))).with_graceful_shutdown(async {
        let _ = stopped.await;
    });
    let mut server = tokio::spawn(server.into_future());
    let mut beat = tokio::time::interval(HEARTBEAT);
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let ending = loop {
        tokio::select! {
            result = &mut server => {
                result.context("the HTTP server")?.context("the HTTP server")?;
                break Ending::Stopped;
            }
            reason = service.dead() => break Ending::EngineDied(reason),
            () = signals.next() => {
                service.drain();
                break drained(&service, control.as_deref_mut(), &mut signals).await;
            }
            command = next_command(control.as_deref_mut()) => match command {
                Some(ProxyCommand::Drain) => service.drain(),
                Some(ProxyCommand::Stop) => break Ending::Stopped,
                Some(ProxyCommand::Unknown) => tracing::warn!("an unknown command on the control socket"),
                None => break Ending::ProxyGone,
            },
            _ = beat.tick() => {
                let process = service.look_at_footprint();
                if let Some(control) = control.as_deref() {
                    // A proxy that does not read gets none; it will see the next one.
                    let _ = control.events().try_send(heartbeat(&service, &process));
                }
            }
        }
    };
    service.drain();
    service.stop_engine();
    if ending != Ending::ProxyGone {
        // What still runs ends with an error now; give it the time to be read.
        let _ = timeout(FAREWELL, service.idle()).await;
        let _ = stop_accepting.send(());
        let _ = timeout(FAREWELL, server).await;
    }
    // A process that ends while another thread is inside MLX may crash on its way out.
    let _ = timeout(ENGINE_END, service.dead()).await;
    Ok(ending)
}

/// After a signal: until nothing runs, the grace is over, or something more urgent.
async fn drained(service: &Service, mut control: Option<&mut Control>, signals: &mut Signals) -> Ending {
    tracing::info!("shutting down: {} requests in flight", service.in_flight());
    let idle = timeout(DRAIN_GRACE, service.idle());
    tokio::pin!(idle);
    loop {
        tokio::select! {
            _ = &mut idle => return Ending::Drained,
            () = signals.next() => return Ending::Stopped,
            reason = service.dead() => return Ending::EngineDied(reason),
            command = next_command(control.as_deref_mut()) => match command {
                Some(ProxyCommand::Stop) => return Ending::Stopped,
                Some(_) => {}
                None => return Ending::ProxyGone,
            },
        }
    }
}

async fn next_command(control: Option<&mut Control>) -> Option<ProxyCommand> {
    match control {
        Some(control) => control.command().await,
        None => std::future::pending().await,
    }
}

fn heartbeat(service: &Service, process: &FootprintReading) -> WorkerEvent {
    let stats = service.engine_stats();
    WorkerEvent::Heartbeat(Heartbeat {
        steps: stats.steps,
        last_step_age_ms: u64::try_from(stats.last_step_age.as_millis()).unwrap_or(u64::MAX),
        running: stats.running as u64,
        waiting: stats.waiting as u64,
        kv_used_bytes: stats.kv_used_bytes,
        kv_cached_bytes: stats.kv_cached_bytes,
        active_bytes: stats.active_bytes,
        buffer_cache_bytes: stats.buffer_cache_bytes,
        footprint_bytes: process.footprint_bytes,
        planned_bytes: process.planned_bytes,
    })
}

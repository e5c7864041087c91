//! The listener, the signals, and the end of it all.

use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;

use crate::connection::{self, Caller, Front, until};
use crate::http::App;

/// Longest grace of a shutdown: requests in flight, then the processes' own end.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(30);
/// Longest wait for standard output to take the last lines.
const LAST_LINES: Duration = Duration::from_millis(500);
/// Delay after a failed accept (too many open files, mostly).
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves until SIGTERM or SIGINT; SIGHUP takes up the registry's file. Returns when no process is left.
///
/// The first signal lets requests in flight finish, within the longest unload grace of the registry; each further one
/// cuts what is still in flight and kills the processes that have been asked to end already. With an `acceptor` clients
/// speak TLS. `ollama` is the port that serves Ollama's API alone, on loopback and so without TLS.
///
/// # Errors
/// The signals cannot be listened to.
pub async fn serve(
    app: Arc<App>,
    listener: TcpListener,
    acceptor: Option<TlsAcceptor>,
    ollama: Option<TcpListener>,
) -> std::io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    // Whoever reads this line may send signals.
    let scheme = if acceptor.is_some() { "https" } else { "http" };
    tracing::info!("listening on {scheme}://{}", listener.local_addr()?);
    if let Some(ollama) = &ollama {
        tracing::info!("clients of Ollama: http://{}", ollama.local_addr()?);
    }
    tokio::spawn(app.house.clone().keep_time());
    let (closing, closed) = watch::channel(false);
    let mut accepting = tokio::task::JoinSet::new();
    accepting.spawn(accept(
        app.clone(),
        Front::All,
        listener,
        acceptor,
        closed.clone(),
    ));
    if let Some(listener) = ollama {
        accepting.spawn(accept(app.clone(), Front::Ollama, listener, None, closed));
    }
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = hangup.recv() => {
                let app = app.clone();
                tokio::spawn(async move { app.reloader.reload().await.map_err(drop) });
            }
        }
    }
    tracing::info!("shutting down");
    let _ = closing.send(true);
    let models = &app.house.catalog().registry.clone().models;
    let grace = models
        .values()
        .map(|m| m.unload_timeout)
        .max()
        .unwrap_or(Duration::ZERO)
        .min(SHUTDOWN_GRACE);
    let mut emptied =
        std::pin::pin!(async { tokio::join!(app.house.shut_down(grace), leave_peers(&app, SHUTDOWN_GRACE)) });
    loop {
        tokio::select! {
            _ = &mut emptied => break,
            _ = terminate.recv() => end_now(&app),
            _ = interrupt.recv() => end_now(&app),
        }
    }
    // Replies that are on their way out get a moment.
    let _ = tokio::time::timeout(Duration::from_millis(500), accepting.join_all()).await;
    app.activity.close().await;
    tracing::info!("shutdown complete");
    app.house.logs.flush(LAST_LINES).await;
    Ok(())
}

/// Waits for requests at peers; cuts them when the grace is over.
async fn leave_peers(app: &App, grace: Duration) {
    if tokio::time::timeout(grace, app.house.catalog().peers.quiet())
        .await
        .is_err()
    {
        cut_at_peers(app);
    }
}

fn end_now(app: &App) {
    app.house.order_shutdown(Duration::ZERO);
    cut_at_peers(app);
}

fn cut_at_peers(app: &App) {
    let catalog = app.house.catalog();
    catalog.peers.cut();
    for request in app.activity.running() {
        if catalog.model(&request.model).is_none() {
            let _ = app.activity.cancel(request.id);
        }
    }
}

/// Accepts connections until `closed`, then waits for those that are open.
async fn accept(
    app: Arc<App>,
    front: Front,
    listener: TcpListener,
    acceptor: Option<TlsAcceptor>,
    mut closed: watch::Receiver<bool>,
) {
    let mut connections = tokio::task::JoinSet::new();
    let mut stop = closed.clone();
    loop {
        tokio::select! {
            () = until(&mut stop) => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, client)) => {
                    let caller = Caller { app: app.clone(), client, front };
                    connections.spawn(connection::serve(caller, stream, closed.clone(), acceptor.clone()));
                }
                Err(error) => {
                    tracing::warn!(%error, "accept");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
    drop(listener);
    until(&mut closed).await;
    while connections.join_next().await.is_some() {}
}

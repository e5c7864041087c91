//! The control socket: lines out, commands and the end of file in. See `api_types::control`.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use api_types::control::{CONTROL_ENV, CONTROL_STDIN, ProxyCommand, WorkerEvent, to_line};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use super::server::Ending;

/// Events that may wait for a slow reader.
const BACKLOG: usize = 64;

/// Longest wait for a proxy to read.
const SEND_LIMIT: Duration = Duration::from_secs(5);

/// The worker's end of the control socket. Reading and writing happen in tasks of their own.
#[derive(Debug)]
pub struct Control {
    events: mpsc::Sender<(WorkerEvent, Option<oneshot::Sender<()>>)>,
    unacknowledged: mpsc::Sender<WorkerEvent>,
    commands: mpsc::Receiver<ProxyCommand>,
}

impl Control {
    /// The socket that the environment speaks of; `None` for a worker that runs on its own.
    ///
    /// # Errors
    /// The environment promises a socket and there is none.
    pub fn from_environment() -> Result<Option<Self>> {
        match std::env::var(CONTROL_ENV) {
            Err(std::env::VarError::NotPresent) => Ok(None),
            Ok(place) if place == CONTROL_STDIN => {
                let fd = std::io::stdin()
                    .as_fd()
                    .try_clone_to_owned()
                    .context("standard input")?;
                Self::new(fd.into()).map(Some)
            }
            other => bail!("{CONTROL_ENV} must be {CONTROL_STDIN:?}, got {other:?}"),
        }
    }

    /// Takes a connected socket.
    ///
    /// # Errors
    /// It is no socket.
    pub fn new(socket: StdUnixStream) -> Result<Self> {
        socket.set_nonblocking(true).context("the control socket")?;
        socket.peer_addr().context("the control socket")?;
        let (reader, mut writer) = UnixStream::from_std(socket)
            .context("the control socket")?
            .into_split();
        let (events, mut outbox) = mpsc::channel::<(WorkerEvent, Option<oneshot::Sender<()>>)>(BACKLOG);
        let (unacknowledged, mut progress) = mpsc::channel::<WorkerEvent>(BACKLOG);
        let (command_sender, commands) = mpsc::channel(BACKLOG);
        tokio::spawn(async move {
            loop {
                // Progress first: it was said before what follows it.
                let (event, sent) = tokio::select! {
                    biased;
                    Some(event) = progress.recv() => (event, None),
                    Some(event) = outbox.recv() => event,
                    else => break,
                };
                let Ok(line) = to_line(&event) else { continue };
                if writer.write_all(line.as_bytes()).await.is_err() {
                    break;
                }
                if let Some(sent) = sent {
                    let _ = sent.send(());
                }
            }
        });
        tokio::spawn(async move {
            let mut lines = BufReader::new(reader).lines();
            // The channel closes with this task: that is how the end of file is seen.
            while let Ok(Some(line)) = lines.next_line().await {
                match serde_json::from_str(&line) {
                    Ok(command) => {
                        if command_sender.send(command).await.is_err() {
                            break;
                        }
                    }
                    Err(e) => tracing::warn!("control socket: {line:?} is no command: {e}"),
                }
            }
        });
        Ok(Self {
            events,
            unacknowledged,
            commands,
        })
    }

    /// Sends an event and waits until it is written, or the proxy is gone, or has not read for five seconds: it may live
    /// and stand still, and a worker that is about to end must end.
    pub async fn send(&mut self, event: &WorkerEvent) {
        let (sent, written) = oneshot::channel();
        let writing = async {
            if self.events.send((event.clone(), Some(sent))).await.is_ok() {
                let _ = written.await;
            }
        };
        if timeout(SEND_LIMIT, writing).await.is_err() {
            tracing::warn!("the proxy does not read its control socket");
        }
    }

    /// Where events go that nobody waits for.
    #[must_use]
    pub fn events(&self) -> mpsc::Sender<WorkerEvent> {
        self.unacknowledged.clone()
    }

    /// The next command; `None` when the proxy is gone.
    pub async fn command(&mut self) -> Option<ProxyCommand> {
        self.commands.recv().await
    }

    /// Waits until there is no reason to start any more, and says why.
    pub(super) async fn gone_or_stopped(&mut self) -> Ending {
        while let Some(command) = self.command().await {
            if matches!(command, ProxyCommand::Stop | ProxyCommand::Drain) {
                return Ending::Stopped;
            }
        }
        Ending::ProxyGone
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A proxy that lives and never reads: what a worker says at its end must not hold it up.
    #[tokio::test(start_paused = true)]
    async fn a_proxy_that_does_not_read_is_not_waited_for() {
        let (ours, theirs) = StdUnixStream::pair().unwrap();
        let mut control = Control::new(ours).unwrap();
        let long = WorkerEvent::Fatal {
            message: "x".repeat(16 << 20),
        };
        let began = tokio::time::Instant::now();
        control.send(&long).await;
        assert_eq!(began.elapsed(), SEND_LIMIT);
        drop(theirs);
        // Nobody is there any more: known at once.
        control.send(&long).await;
        assert_eq!(began.elapsed(), SEND_LIMIT);
    }
}

//! What comes in and what goes out.

use std::sync::Arc;

use crate::config::Config;
use crate::memory::MemoryReading;

/// Milliseconds of a monotonic clock whose origin is the caller's.
pub type Millis = u64;

/// Resolved id of a model (never an alias).
pub type ModelId = Arc<str>;

/// One client request, named by the caller; never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// One process of a model. A restarted model gets a new instance, so that a late report of the old one is recognised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Instance(pub u64);

/// One unload order whose completion is reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ticket(pub u64);

/// What a request wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// To be forwarded: counts as in flight from [`Effect::Dispatch`] to [`Event::Finished`].
    Serve,
    /// Only that the model is ready: answered by [`Effect::Loaded`].
    Load,
}

/// Why a process could not become ready, or ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// One sentence with the cause.
    pub message: String,
    /// The last lines that the process wrote, oldest first, may be empty.
    pub log_tail: String,
}

/// Something that happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// A client asks for a model.
    Request {
        /// Name of this request.
        id: RequestId,
        /// Resolved model.
        model: ModelId,
        /// What it wants.
        kind: Kind,
    },
    /// The client of a waiting or running request has gone away.
    Cancelled(RequestId),
    /// A dispatched request has ended, well or badly.
    Finished(RequestId),
    /// A starting process shows that it is getting on (it reads weights): its time to become ready starts anew.
    Progress(ModelId, Instance),
    /// A process can serve.
    Ready(ModelId, Instance),
    /// A process is gone and has been reaped, or could not be spawned at all.
    Exited(ModelId, Instance, Arc<Failure>),
    /// Unload one model, or all. Waiting requests of it are refused; those in flight get the grace.
    Unload {
        /// `None`: all models.
        model: Option<ModelId>,
        /// Reported by [`Effect::Unloaded`] when no process is left.
        ticket: Ticket,
    },
    /// From now until its process ends, a model's idle time is this, whatever its policy says: `Some(0)` ends it as soon
    /// as it is idle, `None` never. Without a ready process nothing happens.
    KeepAlive(ModelId, Option<Millis>),
    /// The host's memory, read now. Expected at short and regular intervals.
    Memory(MemoryReading),
    /// A new configuration is in force.
    Reload {
        /// The new rules.
        config: Config,
        /// Models whose process must be replaced because its definition changed. (Removed ones are found by themselves.)
        changed: Vec<ModelId>,
    },
    /// The proxy ends: nothing new is accepted, requests in flight have this long. Given again, it is in a hurry:
    /// processes that have been asked to end have this long too.
    Shutdown {
        /// Milliseconds until requests in flight are cut.
        grace_ms: Millis,
    },
    /// Time has passed; due at [`crate::Lifecycle::deadline`] at the latest.
    Tick,
}

/// Why a request is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rejection {
    /// No such model.
    UnknownModel,
    /// The model's explicit `concurrencyLimit` (running plus waiting) is reached.
    ConcurrencyLimit(u32),
    /// The model's queue is full; the number is its capacity.
    QueueFull(u32),
    /// It has waited this long (ms) without its model becoming ready.
    WaitedTooLong(Millis),
    /// The model's process failed while the request waited for it.
    StartFailed(Arc<Failure>),
    /// The model's process failed just before; it is tried again after so many milliseconds.
    BackOff(Arc<Failure>, Millis),
    /// The model was unloaded while the request waited.
    Unloaded,
    /// The model was taken out of the configuration while the request waited.
    Removed,
    /// Memory is critically short, so that the model cannot be started.
    Memory {
        /// What there is.
        reading: MemoryReading,
        /// How long the request has waited for it to get better.
        waited_ms: Millis,
        /// When it makes sense to try again.
        retry_ms: Millis,
    },
    /// The proxy is shutting down.
    ShuttingDown,
}

/// Why a request in flight is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CutReason {
    /// Its model was unloaded and the grace is over.
    Unloaded,
    /// Its model was unloaded because memory was critically short, and the grace is over.
    Memory,
    /// The proxy is shutting down and the grace is over.
    ShuttingDown,
}

/// State of a model as shown to people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// No process.
    Stopped,
    /// Process spawned, not ready.
    Starting,
    /// Serves.
    Ready,
    /// Serves what is in flight, takes nothing new.
    Draining,
    /// Told to end, not reaped yet.
    Stopping,
    /// No process, because the last one failed; not tried again for a while.
    BackOff,
}

impl State {
    /// Lower-case name, as in `/running`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stopped => "stopped",
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Draining => "draining",
            Self::Stopping => "stopping",
            Self::BackOff => "backoff",
        }
    }
}

/// Something to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Spawn the model's process; report [`Event::Ready`] and [`Event::Exited`] under this instance.
    Start(ModelId, Instance),
    /// Ask the process to end.
    Stop(ModelId, Instance),
    /// Kill the process.
    Kill(ModelId, Instance),
    /// Forward the request to this process.
    Dispatch(RequestId, ModelId, Instance),
    /// The model that a [`Kind::Load`] request asked for is ready.
    Loaded(RequestId),
    /// Refuse the request.
    Reject(RequestId, Rejection),
    /// Abort the request in flight; [`Event::Finished`] for it is not expected any more (and ignored).
    Cut(RequestId, CutReason),
    /// This model is being unloaded for want of memory; what that means for its process follows.
    Evicted(ModelId, MemoryReading),
    /// The unload is complete.
    Unloaded(Ticket),
    /// The model has entered this state.
    State(ModelId, State),
    /// After [`Event::Shutdown`]: no process is left.
    ShutdownComplete,
}

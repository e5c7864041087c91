//! The thin shell around `lifecycle`: events in, effects out, nothing decided here.
//!
//! One lock guards the core; a request for a ready model takes it once on the way in and once on the way out. Nothing
//! waits while holding it.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use lifecycle::{
    Effect, Event, Failure, Instance, Kind, Lifecycle, MemoryLevel, MemoryReading, ModelId, ModelStatus,
    Rejection, RequestId, State, Ticket,
};
use parking_lot::Mutex;
use tokio::sync::{Notify, broadcast, oneshot};

use crate::catalog::Catalog;
use crate::logs::Logs;
use crate::pressure;
use crate::process::{self, Order, Process, Report};
use crate::upstream::SharedPool;
pub use crate::wire::{Ordered, Wire};

/// State changes that a slow reader of the feed may lag behind.
const FEED: usize = 256;

/// A model has changed its state.
#[derive(Clone, Debug)]
pub struct StateChange {
    /// Which.
    pub model: ModelId,
    /// Now.
    pub state: State,
}

/// Starts and ends of a model's processes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Loads {
    /// Times that it became ready.
    pub ready: u64,
    /// Time that this took, in all.
    pub time: Duration,
    /// Processes that have ended.
    pub exits: u64,
}

/// All models and their processes.
#[derive(Debug)]
pub struct House {
    inner: Mutex<Inner>,
    epoch: Instant,
    next_id: AtomicU64,
    rearm: Notify,
    empty: Notify,
    states: broadcast::Sender<StateChange>,
    /// What the processes write.
    pub logs: Logs,
}

#[derive(Debug)]
struct Inner {
    core: Lifecycle,
    catalog: Arc<Catalog>,
    /// Few, with ascending numbers: cheaper than hashing.
    slots: BTreeMap<RequestId, Slot>,
    processes: HashMap<Instance, Arc<Process>>,
    unloads: HashMap<Ticket, oneshot::Sender<()>>,
    loads: HashMap<ModelId, Loads>,
    effects: Vec<Effect>,
    /// When the timer fires next.
    armed: Option<u64>,
    empty: bool,
    /// Unloads for want of memory.
    evicted: u64,
}

#[derive(Debug)]
enum Slot {
    Waiting(ModelId, Arc<Wire>, oneshot::Sender<Answer>),
    Running(Arc<Wire>),
}

/// To a request: its process; to an explicit load: none.
type Answer = Result<Option<Arc<Process>>, Rejection>;

/// The right to use a ready process for one request; given back when dropped.
#[derive(Debug)]
pub struct Lease {
    house: Arc<House>,
    id: RequestId,
    /// The process.
    pub process: Arc<Process>,
}

impl Lease {
    /// Where to send the request: connections and path prefix.
    #[must_use]
    pub fn upstream(&self) -> Option<&(SharedPool, String)> {
        self.process.upstream.get()
    }

    /// What the process has written last.
    #[must_use]
    pub fn log_tail(&self) -> String {
        self.house.logs.tail(&self.process.model, 20)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.house.forget(self.id, Event::Finished(self.id));
    }
}

/// A request that waits; cancelled when dropped.
struct Waiting<'a> {
    house: &'a Arc<House>,
    id: RequestId,
    answered: bool,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if !self.answered {
            self.house.forget(self.id, Event::Cancelled(self.id));
        }
    }
}

impl House {
    /// A house with every model stopped. [`House::keep_time`] must run beside it.
    #[must_use]
    pub fn new(catalog: Arc<Catalog>, logs: Logs) -> Arc<Self> {
        let inner = Inner {
            core: Lifecycle::new(catalog.rules()),
            catalog,
            slots: BTreeMap::new(),
            processes: HashMap::new(),
            unloads: HashMap::new(),
            loads: HashMap::new(),
            effects: Vec::new(),
            armed: None,
            empty: false,
            evicted: 0,
        };
        Arc::new(Self {
            inner: Mutex::new(inner),
            epoch: Instant::now(),
            next_id: AtomicU64::new(1),
            rearm: Notify::new(),
            empty: Notify::new(),
            states: broadcast::channel(FEED).0,
            logs,
        })
    }

    fn now(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn fresh(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    /// The catalog in force.
    #[must_use]
    pub fn catalog(&self) -> Arc<Catalog> {
        self.inner.lock().catalog.clone()
    }

    /// Changes of state from now on.
    #[must_use]
    pub fn states(&self) -> broadcast::Receiver<StateChange> {
        self.states.subscribe()
    }

    /// Waits for the right to send one request to a model. Dropping the future gives the place up; `wire` is told
    /// should the request be cut later.
    ///
    /// # Errors
    /// The reason for which the request is refused.
    pub async fn lease(self: &Arc<Self>, model: &ModelId, wire: &Arc<Wire>) -> Result<Lease, Rejection> {
        let id = RequestId(self.fresh());
        let granted = match self.ask(id, model, Kind::Serve, wire) {
            Ok(answer) => answer?,
            Err(receiver) => self.wait(id, receiver).await?,
        };
        // `None` answers a load, which this is not.
        let Some(process) = granted else {
            return Err(Rejection::UnknownModel);
        };
        Ok(Lease {
            house: self.clone(),
            id,
            process,
        })
    }

    /// Waits until a model is ready, starting it if need be.
    ///
    /// # Errors
    /// The reason for which it is not.
    pub async fn load(self: &Arc<Self>, model: &ModelId) -> Result<(), Rejection> {
        let id = RequestId(self.fresh());
        match self.ask(id, model, Kind::Load, &Arc::default()) {
            Ok(answer) => answer.map(drop),
            Err(receiver) => self.wait(id, receiver).await.map(drop),
        }
    }

    async fn wait(self: &Arc<Self>, id: RequestId, receiver: oneshot::Receiver<Answer>) -> Answer {
        let mut waiting = Waiting {
            house: self,
            id,
            answered: false,
        };
        let answer = receiver.await;
        waiting.answered = true;
        // The slot is dropped only with an answer; a missing one can only mean the end of everything.
        answer.unwrap_or(Err(Rejection::ShuttingDown))
    }

    /// The answer, if there is one at once; else where it will come.
    fn ask(
        self: &Arc<Self>,
        id: RequestId,
        model: &ModelId,
        kind: Kind,
        wire: &Arc<Wire>,
    ) -> Result<Answer, oneshot::Receiver<Answer>> {
        let now = self.now();
        let mut inner = self.inner.lock();
        let (sender, mut receiver) = oneshot::channel();
        inner
            .slots
            .insert(id, Slot::Waiting(model.clone(), wire.clone(), sender));
        self.step(
            &mut inner,
            now,
            Event::Request {
                id,
                model: model.clone(),
                kind,
            },
        );
        drop(inner);
        receiver.try_recv().map_err(|_| receiver)
    }

    fn forget(self: &Arc<Self>, id: RequestId, event: Event) {
        let now = self.now();
        let mut inner = self.inner.lock();
        inner.slots.remove(&id);
        self.step(&mut inner, now, event);
    }

    /// Unloads one model, or all; returns when no process is left.
    pub async fn unload(self: &Arc<Self>, model: Option<ModelId>) {
        let ticket = Ticket(self.fresh());
        let (sender, receiver) = oneshot::channel();
        {
            let now = self.now();
            let mut inner = self.inner.lock();
            inner.unloads.insert(ticket, sender);
            self.step(&mut inner, now, Event::Unload { model, ticket });
        }
        let _ = receiver.await;
    }

    /// Changes the idle time of a model's present process: zero ends it as soon as it is idle, `None` never.
    pub fn keep_alive(self: &Arc<Self>, model: &ModelId, time: Option<Duration>) {
        let now = self.now();
        let ttl_ms = time.map(|t| u64::try_from(t.as_millis()).unwrap_or(u64::MAX));
        let mut inner = self.inner.lock();
        self.step(&mut inner, now, Event::KeepAlive(model.clone(), ttl_ms));
    }

    /// Hands a reading of the host's memory on.
    pub fn memory(self: &Arc<Self>, reading: MemoryReading) {
        let now = self.now();
        let mut inner = self.inner.lock();
        let (before, _) = inner.core.memory();
        self.step(&mut inner, now, Event::Memory(reading));
        let (level, _) = inner.core.memory();
        if level != before {
            tracing::warn!(
                from = pressure::name(before),
                to = pressure::name(level),
                "memory: {}",
                pressure::shown(&reading)
            );
        }
    }

    /// The level of memory that counts, the last reading, and how often a model has been unloaded for want of it.
    #[must_use]
    pub fn memory_state(&self) -> (MemoryLevel, MemoryReading, u64) {
        let inner = self.inner.lock();
        let (level, reading) = inner.core.memory();
        (level, reading, inner.evicted)
    }

    /// Puts another catalog in force; `changed` are the models whose process must be replaced.
    pub fn reload(self: &Arc<Self>, catalog: Arc<Catalog>, changed: Vec<ModelId>) {
        let now = self.now();
        let mut inner = self.inner.lock();
        let config = catalog.rules();
        for process in inner.processes.values() {
            process.retune(catalog.definition(&process.model));
        }
        inner.catalog = catalog;
        self.step(&mut inner, now, Event::Reload { config, changed });
        self.forget_removed(&mut inner);
    }

    /// What a model that is not configured any more has left behind, once its process has ended.
    fn forget_removed(&self, inner: &mut Inner) {
        let Inner {
            loads,
            processes,
            catalog,
            ..
        } = inner;
        let known = |m: &ModelId| catalog.model(m).is_some() || processes.values().any(|p| p.model == *m);
        loads.retain(|m, _| known(m));
        self.logs.retain(known);
    }

    /// Takes nothing new, and stops every process. Ordered again, processes that have been asked to end already are
    /// killed when the grace is over.
    pub fn order_shutdown(self: &Arc<Self>, grace: Duration) {
        let now = self.now();
        let mut inner = self.inner.lock();
        let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
        self.step(&mut inner, now, Event::Shutdown { grace_ms });
    }

    /// As [`House::order_shutdown`]; returns when no process is left.
    pub async fn shut_down(self: &Arc<Self>, grace: Duration) {
        self.order_shutdown(grace);
        loop {
            let emptied = self.empty.notified();
            if self.inner.lock().empty {
                return;
            }
            emptied.await;
        }
    }

    /// State of one model.
    #[must_use]
    pub fn status(&self, model: &str) -> Option<ModelStatus> {
        self.inner.lock().core.status(self.now(), model)
    }

    /// State of every model, with its process if it has one.
    #[must_use]
    pub fn statuses(&self) -> Vec<(ModelId, ModelStatus, Option<Arc<Process>>)> {
        let now = self.now();
        let inner = self.inner.lock();
        let process = |s: &ModelStatus| s.instance.and_then(|i| inner.processes.get(&i).cloned());
        inner
            .core
            .statuses(now)
            .map(|(id, s)| (id.clone(), s.clone(), process(&s)))
            .collect()
    }

    /// Starts and ends of every model that has been started.
    #[must_use]
    pub fn loads(&self) -> Vec<(ModelId, Loads)> {
        self.inner
            .lock()
            .loads
            .iter()
            .map(|(m, l)| (m.clone(), *l))
            .collect()
    }

    /// Feeds time to the core. Runs as long as the proxy.
    pub async fn keep_time(self: Arc<Self>) {
        loop {
            let rearmed = self.rearm.notified();
            let armed = self.inner.lock().armed;
            match armed {
                None => rearmed.await,
                Some(at) => {
                    // A millisecond later: the core's clock is cut to whole ones.
                    let at = self.epoch + Duration::from_millis(at) + Duration::from_millis(1);
                    tokio::select! {
                        () = rearmed => {}
                        () = tokio::time::sleep_until(at.into()) => {
                            let now = self.now();
                            let mut inner = self.inner.lock();
                            inner.armed = None;
                            self.step(&mut inner, now, Event::Tick);
                        }
                    }
                }
            }
        }
    }

    /// A report of a process's task.
    fn reported(self: &Arc<Self>, process: &Arc<Process>, report: Report) {
        let now = self.now();
        let (model, instance) = (process.model.clone(), process.instance);
        let mut inner = self.inner.lock();
        let event = match report {
            Report::Progress => Event::Progress(model, instance),
            Report::Ready(pool, prefix) => {
                let time = process.spawned.elapsed();
                let ms = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
                let loads = inner.loads.entry(model.clone()).or_default();
                (loads.ready, loads.time) = (loads.ready + 1, loads.time + time);
                tracing::info!(%model, ms, "ready");
                let _ = process.upstream.set((pool, prefix));
                process.retune(inner.catalog.definition(&model));
                Event::Ready(model, instance)
            }
            Report::Exited(failure) => {
                tracing::info!(%model, "{}", failure.message);
                inner.processes.remove(&instance);
                inner.loads.entry(model.clone()).or_default().exits += 1;
                if inner.catalog.model(&model).is_none() {
                    self.forget_removed(&mut inner);
                }
                Event::Exited(model, instance, failure)
            }
        };
        self.step(&mut inner, now, event);
    }

    fn step(self: &Arc<Self>, inner: &mut Inner, now: u64, event: Event) {
        let mut effects = std::mem::take(&mut inner.effects);
        inner.core.step(now, event, &mut effects);
        for effect in effects.drain(..) {
            self.act(inner, effect);
        }
        inner.effects = effects;
        // Only ever earlier: what was due before is on the timer already.
        if let Some(at) = inner.core.deadline(now)
            && inner.armed.is_none_or(|armed| at < armed)
        {
            inner.armed = Some(at);
            self.rearm.notify_one();
        }
    }

    fn act(self: &Arc<Self>, inner: &mut Inner, effect: Effect) {
        match effect {
            Effect::Dispatch(id, _, instance) => {
                let Some(process) = inner.processes.get(&instance).cloned() else {
                    return;
                };
                if let Some(slot) = inner.slots.get_mut(&id)
                    && let Slot::Waiting(_, wire, _) = slot
                {
                    let running = Slot::Running(wire.clone());
                    if let Slot::Waiting(_, _, sender) = std::mem::replace(slot, running) {
                        // A client that has just left gives its place back itself.
                        let _ = sender.send(Ok(Some(process)));
                    }
                }
            }
            Effect::Loaded(id) => {
                if let Some(Slot::Waiting(_, _, sender)) = inner.slots.remove(&id) {
                    let _ = sender.send(Ok(None));
                }
            }
            Effect::Reject(id, reason) => {
                if let Some(Slot::Waiting(model, _, sender)) = inner.slots.remove(&id) {
                    let _ = sender.send(Err(self.with_log_tail(&model, reason)));
                }
            }
            Effect::Cut(id, reason) => {
                if let Some(Slot::Running(wire)) = inner.slots.remove(&id) {
                    wire.order(Ordered::Cut(reason));
                }
            }
            Effect::Start(model, instance) => self.start(inner, &model, instance),
            Effect::Stop(model, instance) => {
                tracing::info!(%model, "stopping");
                if let Some(process) = inner.processes.get(&instance) {
                    process.order(Order::Stop);
                }
            }
            Effect::Kill(model, instance) => {
                tracing::warn!(%model, "killing");
                if let Some(process) = inner.processes.get(&instance) {
                    process.order(Order::Kill);
                }
            }
            Effect::Evicted(model, reading) => {
                inner.evicted += 1;
                tracing::warn!(%model, "unloaded for want of memory: {}", pressure::shown(&reading));
            }
            Effect::Unloaded(ticket) => {
                if let Some(sender) = inner.unloads.remove(&ticket) {
                    let _ = sender.send(());
                }
            }
            Effect::State(model, state) => {
                let _ = self.states.send(StateChange { model, state });
            }
            Effect::ShutdownComplete => {
                inner.empty = true;
                self.empty.notify_waiters();
            }
        }
    }

    /// A failure that the core found by itself (a start that took too long) quotes the process's last lines too.
    fn with_log_tail(&self, model: &ModelId, mut reason: Rejection) -> Rejection {
        if let Rejection::StartFailed(failure) | Rejection::BackOff(failure, _) = &mut reason
            && failure.log_tail.is_empty()
        {
            *failure = Arc::new(Failure {
                message: failure.message.clone(),
                log_tail: self.logs.tail(model, process::TAIL_LINES),
            });
        }
        reason
    }

    fn start(self: &Arc<Self>, inner: &mut Inner, model: &ModelId, instance: Instance) {
        let Some(definition) = inner.catalog.definition(model).cloned() else {
            return;
        };
        tracing::info!(%model, "starting");
        let (process, orders) = Process::new(model.clone(), instance);
        inner.processes.insert(instance, process.clone());
        let (house, logs) = (self.clone(), self.logs.clone());
        tokio::spawn(async move {
            let reporter = process.clone();
            let report = move |report| house.reported(&reporter, report);
            process::run(process, definition, orders, logs, report).await;
        });
    }
}

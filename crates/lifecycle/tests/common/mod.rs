//! A core that is stepped by hand.
#![allow(
    dead_code,
    missing_docs,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::sync::Arc;

use lifecycle::{
    Config, Effect, Event, Failure, Instance, Kind, Lifecycle, ModelId, Policy, RequestId, State,
};

/// The core, and the time.
pub struct House {
    pub core: Lifecycle,
    pub now: u64,
    pub next: u64,
}

pub fn config(models: &[&str], policy: &Policy) -> Config {
    Config {
        models: models.iter().map(|m| ((*m).into(), policy.clone())).collect(),
        ..Config::default()
    }
}

pub fn failure(message: &str) -> Arc<Failure> {
    Arc::new(Failure {
        message: message.into(),
        log_tail: "last line".into(),
    })
}

impl House {
    pub fn new(models: &[&str], policy: &Policy) -> Self {
        Self {
            core: Lifecycle::new(config(models, policy)),
            now: 0,
            next: 0,
        }
    }

    /// Effects without the reports of states.
    pub fn step(&mut self, event: Event) -> Vec<Effect> {
        let mut effects = Vec::new();
        self.core.step(self.now, event, &mut effects);
        effects.retain(|e| !matches!(e, Effect::State(..)));
        effects
    }

    pub fn request(&mut self, model: &str) -> (RequestId, Vec<Effect>) {
        self.next += 1;
        let id = RequestId(self.next);
        (
            id,
            self.step(Event::Request {
                id,
                model: model.into(),
                kind: Kind::Serve,
            }),
        )
    }

    pub fn tick_at(&mut self, now: u64) -> Vec<Effect> {
        self.now = now;
        self.step(Event::Tick)
    }

    pub fn instance(&self, model: &str) -> Instance {
        self.core.status(self.now, model).unwrap().instance.unwrap()
    }

    pub fn state(&self, model: &str) -> State {
        self.core.status(self.now, model).unwrap().state
    }

    pub fn ready(&mut self, model: &str) -> Vec<Effect> {
        let instance = self.instance(model);
        self.step(Event::Ready(model.into(), instance))
    }

    pub fn exit(&mut self, model: &str) -> Vec<Effect> {
        let instance = self.instance(model);
        self.step(Event::Exited(model.into(), instance, failure("exit status 1")))
    }

    /// A model with one request in flight.
    pub fn serving(&mut self, model: &str) -> RequestId {
        let (request, _) = self.request(model);
        let effects = self.ready(model);
        assert_eq!(
            effects,
            [Effect::Dispatch(request, model.into(), self.instance(model))]
        );
        request
    }
}

pub fn name(s: &str) -> ModelId {
    s.into()
}

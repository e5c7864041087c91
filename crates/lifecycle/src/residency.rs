//! Who may be resident beside whom: the rule comes from outside (groups, a matrix of allowed sets).

use crate::event::ModelId;

/// The rule of who must go.
pub trait Residency: std::fmt::Debug + Send + Sync {
    /// Which of `running` must be gone before `target` may start. A target that runs already evicts nothing.
    fn evictions<'a>(&self, target: &ModelId, running: &[&'a ModelId]) -> Vec<&'a ModelId>;
}

/// One model at a time.
#[derive(Clone, Copy, Debug, Default)]
pub struct OneAtATime;

impl Residency for OneAtATime {
    fn evictions<'a>(&self, target: &ModelId, running: &[&'a ModelId]) -> Vec<&'a ModelId> {
        if running.contains(&target) {
            Vec::new()
        } else {
            running.to_vec()
        }
    }
}

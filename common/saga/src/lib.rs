//! A small engine for operations that must end whole: *completed*, or undone
//! as if they had never begun, whatever dies in between.
//!
//! A [`Saga`] is a fixed line of steps. The engine writes down what it is about
//! to do ([`journal`]), does it ([`executor`]), and writes down what came of
//! it; a restarted process reads the journal and goes on. So a step runs *at
//! least* once: it must be idempotent, and what later steps need of it lies in
//! the saga's data, journalled with its success.
//!
//! * Before the *point of no return* a step that fails for good is undone, and
//!   all before it, last first.
//! * After it nothing is undone: a step that fails for good is put off (its
//!   work is left to a background pass) and the saga goes on.
//! * A step that does not know what happened ([`ErrorClass::Lost`]) is never
//!   undone on a guess. It is tried until patience ends; then the saga is
//!   *stuck*, visibly, until it is resumed.
//!
//! [`ErrorClass::Lost`]: drover_model::error::ErrorClass::Lost

pub mod executor;
pub mod journal;

use async_trait::async_trait;
use drover_model::error::ErrorClass;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

pub use executor::{DriveError, Patience, drive};
pub use journal::{Event, Journal, JournalError, State};

/// Why a step did not succeed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct StepError {
    /// What may be done about it.
    pub class: ErrorClass,
    /// What happened, in words.
    pub message: String,
    /// What the saga wants to remember of it, in a form of its own.
    #[serde(default)]
    pub detail: serde_json::Value,
}

impl StepError {
    /// An error without detail.
    pub fn new(class: ErrorClass, message: impl Into<String>) -> Self {
        Self {
            class,
            message: message.into(),
            detail: serde_json::Value::Null,
        }
    }

    /// The same with detail.
    #[must_use]
    pub fn with_detail(mut self, detail: serde_json::Value) -> Self {
        self.detail = detail;
        self
    }
}

/// How a saga ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Every step is done (or, after the point of no return, put off).
    Completed,
    /// It failed and everything was undone.
    RolledBack(StepError),
}

/// An operation as a line of steps.
#[async_trait]
pub trait Saga: Send + Sync {
    /// Names a step.
    type Step: Copy + Send + Sync + PartialEq + 'static;
    /// What steps learn and later steps need; journalled with each success.
    type Data: Clone + Send + Sync + Serialize + DeserializeOwned;

    /// The steps in order.
    const STEPS: &'static [Self::Step];
    /// The step whose success is the point of no return.
    const COMMIT: Self::Step;

    /// A step's name in the journal. Names are for ever.
    fn name(step: Self::Step) -> &'static str;

    /// Does a step. May be called again after a success that was not journalled.
    async fn run(&self, step: Self::Step, data: &mut Self::Data) -> Result<(), StepError>;

    /// Takes a step back, also one that failed half-way or was done by a
    /// process that died. Undoing what was never done is no error.
    async fn undo(&self, step: Self::Step, data: &Self::Data) -> Result<(), StepError>;

    /// Resolves when somebody wants the operation stopped. Raced against each
    /// step before the commit that says it may be [`Saga::interruptible`].
    async fn interrupted(&self) -> StepError;

    /// Whether a step may be dropped in the middle; one that may not watches
    /// for interruption itself.
    fn interruptible(step: Self::Step) -> bool;
}

/// Position of a step in its saga.
pub(crate) fn position<S: Saga>(name: &str) -> Option<usize> {
    S::STEPS.iter().position(|s| S::name(*s) == name)
}

/// Position of the commit step.
pub(crate) fn commit_position<S: Saga>() -> usize {
    S::STEPS
        .iter()
        .position(|s| *s == S::COMMIT)
        .expect("COMMIT is one of STEPS, by the saga's declaration")
}

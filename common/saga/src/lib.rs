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

use std::pin::Pin;

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

/// What a step does, or undoes: it ends with why it did not.
pub type Doing<'a> = Pin<Box<dyn Future<Output = Result<(), StepError>> + Send + 'a>>;

/// One step of a saga: a row in its list.
pub struct Step<S: Saga> {
    /// In the journal. Names are for ever.
    pub name: &'static str,
    /// Whether its success is the point of no return; so it is of one step.
    pub commits: bool,
    /// Whether it may not be dropped in the middle: it watches for interruption itself.
    pub is_whole: bool,
    /// Does it. May be called again after a success that was not journalled.
    pub run: for<'a> fn(&'a S, &'a mut S::Data) -> Doing<'a>,
    /// Takes it back, also if it failed half-way or was done by a process that died.
    /// Undoing what was never done is no error.
    pub undo: for<'a> fn(&'a S, &'a S::Data) -> Doing<'a>,
    /// What it means to whoever keeps the journal.
    pub note: S::Note,
}

impl<S: Saga> Step<S> {
    /// A step that is before or after the point of no return, may be dropped in the
    /// middle, and leaves nothing to undo.
    pub const fn new(
        name: &'static str,
        note: S::Note,
        run: for<'a> fn(&'a S, &'a mut S::Data) -> Doing<'a>,
    ) -> Self {
        Self {
            name,
            commits: false,
            is_whole: false,
            run,
            undo: |_, _| Box::pin(async { Ok(()) }),
            note,
        }
    }
}

/// An operation as a line of steps.
#[async_trait]
pub trait Saga: Sized + Send + Sync + 'static {
    /// What steps learn and later steps need; journalled with each success.
    type Data: Clone + Send + Sync + Serialize + DeserializeOwned;
    /// What a step means to whoever keeps the journal.
    type Note: Send + Sync + 'static;

    /// The steps in order.
    const STEPS: &'static [Step<Self>];

    /// Resolves when somebody wants the operation stopped. Raced against each
    /// step before the point of no return that is not [`Step::is_whole`].
    async fn interrupted(&self) -> StepError;
}

/// Position of a step in its saga.
pub(crate) fn position<S: Saga>(name: &str) -> Option<usize> {
    S::STEPS.iter().position(|step| step.name == name)
}

/// Position of the step whose success is the point of no return.
pub(crate) fn commit_position<S: Saga>() -> usize {
    S::STEPS
        .iter()
        .position(|step| step.commits)
        .expect("one of STEPS commits, by the saga's declaration")
}

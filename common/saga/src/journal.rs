//! The journal: events, and the one function that says which may follow which.
//!
//! ```text
//!            started            succeeded (not last)
//! Ready(n) ──────────► Running(n) ──────────► Ready(n+1)
//!                       │   │  └── put off (after commit) ─► Ready(n+1)
//!                       │   └───── succeeded (last) ───────► Done(completed)
//!                       └ failed (before commit) ─► Unwinding(n) ─ undone ─► Unwinding(n-1)
//!                                                        └─ undone (first) ─► Done(rolled back)
//! Running(n) | Unwinding(n) ── stuck ─► Stuck(that) ── resumed ─► that
//! ```
//!
//! A journal may have been written by a program of another version. One that knew fewer
//! steps has passed over those that are new here: they count as done, and undoing them
//! finds nothing. One that knew more has written of steps that are unknown here: that is
//! [`JournalError::Newer`], and whoever reads it leaves the saga alone.

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{Outcome, Saga, StepError, commit_position, position};

/// One line of a journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A step is about to run.
    Started {
        /// Which.
        step: String,
    },
    /// A step is done.
    Succeeded {
        /// Which.
        step: String,
        /// The saga's data after it.
        data: Value,
    },
    /// A step failed for good; undoing begins with it.
    Failed {
        /// Which.
        step: String,
        /// Why.
        error: StepError,
    },
    /// A step after the point of no return failed for good; its work is left
    /// to a background pass.
    PutOff {
        /// Which.
        step: String,
        /// Why.
        error: StepError,
    },
    /// A step is undone.
    Undone {
        /// Which.
        step: String,
    },
    /// The saga cannot go on alone.
    Stuck {
        /// At which step.
        step: String,
        /// Why.
        error: StepError,
    },
    /// Somebody, or a recovering node, has it tried again.
    Resumed {
        /// At which step.
        step: String,
    },
}

impl Event {
    /// The step an event is about.
    pub fn step(&self) -> &str {
        match self {
            Self::Started { step }
            | Self::Succeeded { step, .. }
            | Self::Failed { step, .. }
            | Self::PutOff { step, .. }
            | Self::Undone { step }
            | Self::Stuck { step, .. }
            | Self::Resumed { step } => step,
        }
    }
}

/// Trouble with a journal.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// Another process has taken the saga over; this one must let go of it.
    #[error("the saga was taken over by another conductor")]
    Fenced,
    /// It cannot be written or read now.
    #[error("the journal cannot be used: {0}")]
    Unavailable(String),
    /// A newer program has written it: this one neither goes on with it nor undoes it.
    #[error("the journal is of a newer Drover: {0}")]
    Newer(String),
    /// It holds what no run of this saga can have written.
    #[error("the journal makes no sense: {0}")]
    Illegal(String),
}

/// Where one saga's events are kept. Whoever implements it commits the events
/// of one call together, and refuses them with [`JournalError::Fenced`] if
/// another process has taken over since.
#[async_trait]
pub trait Journal: Send + Sync {
    /// Everything so far, in order.
    async fn load(&self) -> Result<Vec<Event>, JournalError>;
    /// Appends events behind the `at` that are there.
    async fn append(&self, at: usize, events: &[Event]) -> Result<(), JournalError>;
}

/// Where a saga stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// The step of this position may start.
    Ready(usize),
    /// It may have run, in part or whole.
    Running(usize),
    /// This one is to be undone next, because of that error.
    Unwinding(usize, StepError),
    /// Waits to be resumed where it was.
    Stuck(Box<State>),
    /// Over.
    Done(Outcome),
}

impl State {
    /// The state after one more event, or why that event cannot be.
    pub fn after<S: Saga>(self, event: &Event) -> Result<Self, JournalError> {
        let commit = commit_position::<S>();
        let illegal =
            |state: &Self| JournalError::Illegal(format!("{event:?} cannot follow on {state:?}"));
        let at = position::<S>(event.step()).ok_or_else(|| {
            JournalError::Newer(format!("no step is called '{}' here", event.step()))
        })?;
        // Who passed over a step did not know it. Nobody passes over the point of no return.
        let known_fewer = |from: usize, to: usize| from < to && (to <= commit || from > commit);
        let next_ready = |n: usize| match n + 1 == S::STEPS.len() {
            true => Self::Done(Outcome::Completed),
            false => Self::Ready(n + 1),
        };
        match (self, event) {
            (Self::Ready(n), Event::Started { .. }) if n == at || known_fewer(n, at) => {
                Ok(Self::Running(at))
            }
            (Self::Running(n), Event::Succeeded { .. }) if n == at => Ok(next_ready(n)),
            (Self::Running(n), Event::PutOff { .. }) if n == at && n > commit => Ok(next_ready(n)),
            (Self::Running(n), Event::Failed { error, .. }) if n == at && n <= commit => {
                Ok(Self::Unwinding(n, error.clone()))
            }
            (Self::Unwinding(n, error), Event::Undone { .. }) if at <= n => Ok(match at {
                0 => Self::Done(Outcome::RolledBack(error)),
                at => Self::Unwinding(at - 1, error),
            }),
            (state @ (Self::Running(_) | Self::Unwinding(..)), Event::Stuck { .. })
                if state.step_position() == Some(at) =>
            {
                Ok(Self::Stuck(Box::new(state)))
            }
            (Self::Stuck(state), Event::Resumed { .. }) if state.step_position() == Some(at) => {
                Ok(*state)
            }
            (state, _) => Err(illegal(&state)),
        }
    }

    /// Position of the step this state is about.
    pub fn step_position(&self) -> Option<usize> {
        match self {
            Self::Ready(n) | Self::Running(n) | Self::Unwinding(n, _) => Some(*n),
            Self::Stuck(state) => state.step_position(),
            Self::Done(_) => None,
        }
    }
}

/// Reads a journal: where the saga stands, and its data if any step succeeded.
pub fn replay<S: Saga>(events: &[Event]) -> Result<(State, Option<S::Data>), JournalError> {
    let mut state = State::Ready(0);
    let mut data = None;
    for event in events {
        state = state.after::<S>(event)?;
        if let Event::Succeeded { data: value, .. } = event {
            let read = serde_json::from_value(value.clone());
            data = Some(read.map_err(|e| JournalError::Newer(format!("its data: {e}")))?);
        }
    }
    Ok((state, data))
}

//! The engine: takes a saga from wherever its journal says it stands to its
//! end. One task drives one saga; whoever else wants something of it leaves
//! word where [`Saga::interrupted`] finds it.

use std::time::Duration;

use drover_model::error::ErrorClass;
use tokio::time::Instant;
use tracing::{info, warn};

use crate::{
    Outcome, Saga, StepError, commit_position,
    journal::{Event, Journal, JournalError, State, replay},
};

/// How long a step is tried again before its trouble counts as lasting.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// With passing trouble before the point of no return.
    pub forward: Duration,
    /// With undoing, and with not knowing what happened, before it is *stuck*.
    pub unknown: Duration,
    /// With tidying after the point of no return before it is put off.
    pub after_commit: Duration,
    /// Longest pause between two tries.
    pub max_pause: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            forward: Duration::from_secs(30),
            unknown: Duration::from_secs(120),
            after_commit: Duration::from_secs(20),
            max_pause: Duration::from_secs(5),
        }
    }
}

/// Why a saga is not at its end.
#[derive(Debug, thiserror::Error)]
pub enum DriveError {
    /// It waits to be resumed.
    #[error("stuck: {0}")]
    Stuck(StepError),
    /// Its journal failed; it can be taken up again when that works.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

/// Drives a saga to its end. `initial` is its data before the first step.
/// A saga that is stuck is resumed.
///
/// # Errors
/// It got stuck, or the journal failed or was taken over.
pub async fn drive<S: Saga>(
    saga: &S,
    journal: &dyn Journal,
    patience: Patience,
    initial: S::Data,
) -> Result<Outcome, DriveError> {
    let events = journal.load().await?;
    let (state, data) = replay::<S>(&events)?;
    let mut driver = Driver {
        saga,
        journal,
        patience,
        state,
        data: data.unwrap_or(initial),
        written: events.len(),
    };
    driver.finish().await
}

struct Driver<'a, S: Saga> {
    saga: &'a S,
    journal: &'a dyn Journal,
    patience: Patience,
    state: State,
    data: S::Data,
    written: usize,
}

impl<S: Saga> Driver<'_, S> {
    async fn finish(&mut self) -> Result<Outcome, DriveError> {
        loop {
            match self.state.clone() {
                State::Done(outcome) => return Ok(outcome),
                State::Ready(n) => self.write(&[started::<S>(n)]).await?,
                State::Running(n) => self.run(n).await?,
                State::Unwinding(n, _) => self.undo(n).await?,
                State::Stuck(inner) => {
                    let step = name::<S>(inner.step_position().unwrap_or_default());
                    self.write(&[Event::Resumed { step }]).await?;
                }
            }
        }
    }

    async fn write(&mut self, events: &[Event]) -> Result<(), DriveError> {
        let mut state = self.state.clone();
        for event in events {
            state = state.after::<S>(event)?;
        }
        self.journal.append(self.written, events).await?;
        self.written += events.len();
        self.state = state;
        Ok(())
    }

    async fn run(&mut self, n: usize) -> Result<(), DriveError> {
        let step = name::<S>(n);
        let committed = n > commit_position::<S>();
        match self.try_forward(n, committed).await {
            Ok(data) => {
                let value = serde_json::to_value(&data)
                    .map_err(|e| JournalError::Illegal(format!("data cannot be written: {e}")))?;
                self.data = data;
                let succeeded = Event::Succeeded { step, data: value };
                // One commit for both: what is done, and what is begun.
                match S::STEPS.get(n + 1) {
                    Some(_) => self.write(&[succeeded, started::<S>(n + 1)]).await,
                    None => self.write(&[succeeded]).await,
                }
            }
            // Whoever drives it now finds in the journal where it stands.
            Err(error) if error.class == ErrorClass::Fenced => Err(JournalError::Fenced.into()),
            Err(error) if committed => {
                warn!(step, %error, "left for later");
                self.write(&[Event::PutOff { step, error }]).await
            }
            Err(error) if error.class == ErrorClass::Lost => self.stuck(step, error).await,
            Err(error) => {
                info!(step, %error, "failed, undoing");
                self.write(&[Event::Failed { step, error }]).await
            }
        }
    }

    /// Runs a step until it succeeds, fails for good, or patience ends. The
    /// data it works on is a copy: a failed try leaves none of it behind. After a try
    /// of which nobody knows what it did, passing trouble says nothing of it either.
    async fn try_forward(&self, n: usize, committed: bool) -> Result<S::Data, StepError> {
        let step = &S::STEPS[n];
        let mut pause = Pause::new(self.patience.max_pause);
        let began = Instant::now();
        let mut is_in_doubt = false;
        loop {
            let mut data = self.data.clone();
            let run = (step.run)(self.saga, &mut data);
            let result = if committed || step.is_whole {
                run.await
            } else {
                tokio::select! {
                    biased;
                    error = self.saga.interrupted() => return Err(error),
                    result = run => result,
                }
            };
            let mut error = match result {
                Ok(()) => return Ok(data),
                Err(error) => error,
            };
            is_in_doubt |= error.class == ErrorClass::Lost;
            if is_in_doubt && error.class == ErrorClass::Retryable {
                error.class = ErrorClass::Lost;
            }
            let limit = match error.class {
                ErrorClass::Refused | ErrorClass::Bug | ErrorClass::Fenced => return Err(error),
                _ if committed => self.patience.after_commit,
                ErrorClass::Retryable => self.patience.forward,
                ErrorClass::Lost => self.patience.unknown,
            };
            if began.elapsed() >= limit {
                return Err(error);
            }
            info!(step = step.name, %error, "trying again");
            tokio::select! {
                biased;
                () = pause.wait() => {}
                error = self.saga.interrupted(), if !committed && !step.is_whole => {
                    return Err(error);
                }
            }
        }
    }

    async fn undo(&mut self, n: usize) -> Result<(), DriveError> {
        let mut pause = Pause::new(self.patience.max_pause);
        let began = Instant::now();
        loop {
            let Err(error) = (S::STEPS[n].undo)(self.saga, &self.data).await else {
                return self.write(&[Event::Undone { step: name::<S>(n) }]).await;
            };
            if error.class == ErrorClass::Fenced {
                return Err(JournalError::Fenced.into());
            }
            if began.elapsed() >= self.patience.unknown {
                return self.stuck(name::<S>(n), error).await;
            }
            info!(step = name::<S>(n), %error, "undoing again");
            pause.wait().await;
        }
    }

    async fn stuck(&mut self, step: String, error: StepError) -> Result<(), DriveError> {
        warn!(step, %error, "stuck: 'drover migration resume' tries again");
        let event = Event::Stuck {
            step,
            error: error.clone(),
        };
        self.write(&[event]).await?;
        Err(DriveError::Stuck(error))
    }
}

/// Doubling pauses with jitter, so that many sagas do not knock together.
struct Pause {
    next: Duration,
    max: Duration,
}

impl Pause {
    fn new(max: Duration) -> Self {
        let next = Duration::from_millis(100).min(max);
        Self { next, max }
    }

    async fn wait(&mut self) {
        let jittered = self.next.mul_f64(0.5 + fastrand::f64() / 2.0);
        self.next = (self.next * 2).min(self.max);
        tokio::time::sleep(jittered).await;
    }
}

fn name<S: Saga>(n: usize) -> String {
    S::STEPS[n].name.to_owned()
}

fn started<S: Saga>(n: usize) -> Event {
    Event::Started { step: name::<S>(n) }
}

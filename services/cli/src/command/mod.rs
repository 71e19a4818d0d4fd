//! What the verbs do, one module per noun. A command gets a [`Session`], writes
//! its result to the session's screen and ends with an exit code or trouble.

pub mod doctor;
pub mod follow;
pub mod instance;
pub mod migration;
pub mod node;
pub mod settle;

use std::{io::BufRead, pin::Pin, time::Duration};

use drover_model::{error::ErrorClass, migration::Migration};
use tokio::time::Instant;

use crate::{
    args::Patience,
    client::Client,
    exit::{Exit, Trouble},
    render::{clean, describe, screen::Screen},
};

/// Completes when the operator interrupts.
pub type Interrupt = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Where an operator answers questions; none where nobody sits.
pub type Answers = Option<Box<dyn BufRead + Send>>;

/// What a command works with.
pub struct Session {
    /// Whom to ask.
    pub client: Client,
    /// Where to write.
    pub screen: Screen,
    /// When to stop waiting.
    pub interrupt: Interrupt,
    /// Who may be asked.
    pub answers: Answers,
}

impl Session {
    /// Asks the operator. No answer is an empty one.
    ///
    /// # Errors
    /// Interrupted before there was an answer.
    async fn ask(&mut self, question: &str) -> Result<String, Trouble> {
        self.screen.ask(question);
        let Some(mut answers) = self.answers.take() else {
            return Ok(String::new());
        };
        let read = tokio::task::spawn_blocking(move || {
            let mut answer = String::new();
            let read = answers.read_line(&mut answer);
            read.map(|_| answer).unwrap_or_default()
        });
        let answer = tokio::select! {
            biased;
            answer = read => Ok(answer.unwrap_or_default()),
            () = &mut self.interrupt => {
                Err(Trouble::new(Exit::Interrupted, "interrupted: nothing was done"))
            }
        };
        if !matches!(&answer, Ok(text) if text.ends_with('\n')) {
            // Nobody has ended the question's line.
            self.screen.notice("");
        }
        answer
    }
}

/// When waiting ends.
fn deadline(patience: Patience) -> Option<Instant> {
    let seconds = patience.timeout?;
    Instant::now().checked_add(Duration::from_secs(seconds))
}

/// How long an answer may take that takes `most` at the most.
fn left(deadline: Option<Instant>, most: Duration) -> Duration {
    let left = deadline.map(|at| at.duration_since(Instant::now()));
    left.map_or(most, |left| left.min(most))
}

/// Tells what would be done with a migration, and shows its record.
fn would(session: &mut Session, m: &Migration, what: &str) -> Result<Exit, Trouble> {
    session.screen.value(m, |m| {
        format!("{} ({}) {what}", describe::subject(m), m.status)
    })?;
    Ok(Exit::Done)
}

/// The answer to a request, unless the operator interrupts first.
async fn heard<T>(
    interrupt: &mut Interrupt,
    asked: impl Future<Output = Result<T, Trouble>>,
) -> Result<T, Trouble> {
    tokio::select! {
        biased;
        answer = asked => answer,
        () = interrupt => {
            let message = "interrupted before the conductor answered";
            Err(Trouble::new(Exit::Interrupted, message).kind(ErrorClass::Lost))
        }
    }
}

/// A request whose answer was lost may have been taken: asking for it again
/// blindly could be wrong.
fn uncertain(trouble: Trouble, what: &str, instance: &str) -> Trouble {
    if trouble.kind != ErrorClass::Lost {
        return trouble;
    }
    let message = format!("{}: {what} may or may not have begun", trouble.message);
    let name = clean(instance);
    let look = format!("`drover migration list --instance {name}` tells whether it has");
    Trouble { message, ..trouble }.remedy(look)
}

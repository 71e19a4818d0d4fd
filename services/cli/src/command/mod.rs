//! What the verbs do, one module per noun. A command gets a [`Session`], writes
//! its result to the session's screen and ends with an exit code or trouble.

pub mod doctor;
pub mod follow;
pub mod instance;
pub mod migration;
pub mod node;
pub mod operate;
pub mod operation;
pub mod project;
pub mod settle;
pub mod transfer;
mod waiting;
pub mod watch;

use std::{
    io::{BufRead, Read},
    pin::Pin,
    time::Duration,
};

use drover_model::{api::conductor::Plan, error::ErrorClass, migration::Migration};
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};
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
    /// What was given on standard input instead, where nobody sits.
    pub input: Answers,
}

/// So much is read of a line that is typed or given, bytes.
const LONGEST_LINE: u64 = 4096;

impl Session {
    /// Asks the operator. No answer is an empty one.
    ///
    /// # Errors
    /// Interrupted before there was an answer.
    async fn ask(&mut self, question: &str) -> Result<String, Trouble> {
        self.screen.ask(question);
        let Some(answers) = self.answers.take() else {
            return Ok(String::new());
        };
        let answer = self.line_of(answers).await;
        if !matches!(&answer, Ok(text) if text.ends_with('\n')) {
            // Nobody has ended the question's line.
            self.screen.notice("");
        }
        answer
    }

    /// A secret: the first line of standard input, or what the operator types
    /// without it being shown. Nothing is an empty one.
    ///
    /// # Errors
    /// Nobody can be asked, or interrupted before there was an answer.
    async fn secret(&mut self, question: &str, nobody: Trouble) -> Result<String, Trouble> {
        if let Some(input) = self.input.take() {
            return self.line_of(input).await;
        }
        let Some(answers) = self.answers.take() else {
            return Err(nobody);
        };
        self.screen.ask(question);
        let hushed = Hushed::terminal();
        let answer = self.line_of(answers).await;
        drop(hushed);
        // What ended the line was not shown either.
        self.screen.notice("");
        answer
    }

    async fn line_of(&mut self, from: Box<dyn BufRead + Send>) -> Result<String, Trouble> {
        let read = tokio::task::spawn_blocking(move || {
            let mut line = String::new();
            let read = from.take(LONGEST_LINE).read_line(&mut line);
            read.map(|_| line).unwrap_or_default()
        });
        tokio::select! {
            biased;
            line = read => Ok(line.unwrap_or_default()),
            () = &mut self.interrupt => {
                Err(Trouble::new(Exit::Interrupted, "interrupted: nothing was done"))
            }
        }
    }
}

/// Keeps the terminal from showing what is typed, until it is dropped.
struct Hushed(Termios);

impl Hushed {
    /// Hushes the terminal of standard input; nothing where there is none.
    fn terminal() -> Option<Self> {
        let before = tcgetattr(std::io::stdin()).ok()?;
        let mut hushed = before.clone();
        hushed.local_modes.remove(LocalModes::ECHO);
        tcsetattr(std::io::stdin(), OptionalActions::Flush, &hushed).ok()?;
        Some(Self(before))
    }
}

impl Drop for Hushed {
    fn drop(&mut self) {
        // A terminal that is gone shows nothing anyway.
        let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, &self.0);
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

/// Shows what a dry run found, and ends as the real one would.
fn show_plan(
    session: &mut Session,
    plan: &Plan,
    text: impl FnOnce(&Plan) -> String,
) -> Result<Exit, Trouble> {
    session.screen.value(plan, text)?;
    Ok(if plan.failures.is_empty() {
        Exit::Done
    } else {
        Exit::Refused
    })
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
    let name = clean(instance);
    let look = format!("`drover migration list --instance {name}` tells whether it has");
    perhaps(trouble, &format!("{what} may or may not have begun"), look)
}

/// The same of anything else: what may be, and what tells whether it is.
fn perhaps(trouble: Trouble, what: &str, look: String) -> Trouble {
    if trouble.kind != ErrorClass::Lost {
        return trouble;
    }
    let message = format!("{}: {what}", trouble.message);
    Trouble { message, ..trouble }.remedy(look)
}

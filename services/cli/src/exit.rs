//! How a command ends: its exit code, and trouble told as one line that says
//! what, where and what to do.

use drover_model::{check::CheckFailure, error::ErrorClass};
use serde::Serialize;

/// Exit codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Exit {
    /// What was asked is done.
    Done,
    /// It failed.
    Failed,
    /// The command or the configuration is wrong.
    Usage,
    /// A check said no.
    Refused,
    /// Nobody answered in time, or it took longer than the caller would wait.
    TimedOut,
    /// Interrupted from the keyboard; what was begun goes on.
    Interrupted,
}

impl Exit {
    /// The number that the shell sees.
    pub fn code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Failed => 1,
            Self::Usage => 2,
            Self::Refused => 3,
            Self::TimedOut => 4,
            Self::Interrupted => 130,
        }
    }
}

/// Where trouble lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In this command, its arguments or its configuration.
    Here,
    /// At the message broker.
    Broker,
    /// At whoever was asked.
    Peer,
}

/// Why a command did not do what was asked.
#[derive(Debug, Clone, PartialEq)]
pub struct Trouble {
    /// How the command ends.
    pub exit: Exit,
    /// Where the trouble lies.
    pub place: Place,
    /// What happened, and where.
    pub message: String,
    /// What to do about it.
    pub remedy: Option<String>,
    /// Class of the far end's exception, if it was one.
    pub class: Option<String>,
    /// Failed checks, if that is what it was.
    pub checks: Vec<CheckFailure>,
    /// What may be done about it: whether asking again may help, and whether
    /// what was asked may have been done all the same.
    pub kind: ErrorClass,
}

impl Trouble {
    /// Trouble without further detail.
    pub fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self {
            exit,
            place: Place::Here,
            message: message.into(),
            remedy: None,
            class: None,
            checks: Vec::new(),
            kind: ErrorClass::Refused,
        }
    }

    /// A wrong command or configuration.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Exit::Usage, message)
    }

    /// The same with something to do about it.
    #[must_use]
    pub fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = Some(remedy.into());
        self
    }

    /// Refused by these checks.
    pub fn refused(message: impl Into<String>, checks: Vec<CheckFailure>) -> Self {
        Self {
            checks,
            place: Place::Peer,
            ..Self::new(Exit::Refused, message)
        }
    }

    /// The same at another place.
    #[must_use]
    pub fn place(mut self, place: Place) -> Self {
        self.place = place;
        self
    }

    /// The same of another kind.
    #[must_use]
    pub fn kind(mut self, kind: ErrorClass) -> Self {
        self.kind = kind;
        self
    }

    /// Whether a question may be asked again.
    pub fn may_pass(&self) -> bool {
        matches!(self.kind, ErrorClass::Retryable | ErrorClass::Lost)
    }
}

impl From<std::io::Error> for Trouble {
    /// The output cannot be written. A reader that has seen enough (`| head`)
    /// is nothing to complain about: that trouble has no words.
    fn from(error: std::io::Error) -> Self {
        let message = match error.kind() {
            std::io::ErrorKind::BrokenPipe => String::new(),
            _ => format!("cannot write the output: {error}"),
        };
        Self::new(Exit::Failed, message)
    }
}

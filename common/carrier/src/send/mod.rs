//! The source's side.

mod coverage;
mod ledger;
mod prepare;
mod session;
mod walk;

use std::{
    io,
    path::PathBuf,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use self::{
    ledger::Ledger,
    session::{Cut, Dial},
};
use crate::{
    control::Control,
    disk::{self, Source},
    extents,
    protocol::nonce,
    receive::MOST_FILES,
    token::Token,
};

/// First pause before the connection is tried again. Each further one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// How long a destination that answers, and does not know us, may have been
/// restarted just now.
const UNKNOWN: Duration = Duration::from_secs(3);
/// Longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// A file to be sent: plain, or a block device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outgoing {
    /// Where it is.
    pub path: PathBuf,
}

/// What to send where.
#[derive(Debug, Clone)]
pub struct SendSpec {
    /// The destination's address on the migration network, or its name.
    pub address: String,
    /// The port of its receiver.
    pub port: u16,
    /// What the files belong to, as the receiver was told.
    pub migration: Uuid,
    /// What lets us in, as the receiver was told.
    pub token: Token,
    /// The files, in the order in which the receiver was told.
    pub files: Vec<Outgoing>,
    /// Part may be there from an earlier attempt: ask before sending.
    pub resume: bool,
    /// After so long without progress it is given up.
    pub progress_timeout: Duration,
}

/// What was done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    /// Bytes of data that travelled, those that had to travel twice counted twice.
    pub sent_bytes: u64,
    /// Bytes of data that were there already.
    pub reused_bytes: u64,
    /// Bytes of data in all files.
    pub total_bytes: u64,
    /// How often the connection had to be made again.
    pub reconnects: u64,
}

/// Why not all was sent.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// The receiver does not know the migration, or the token is another.
    #[error("the destination refused: {0}")]
    Refused(String),
    /// A file cannot be read here.
    #[error("reading {}: {error}", path.display())]
    Source {
        /// The file.
        path: PathBuf,
        /// What happened.
        error: io::Error,
    },
    /// A file cannot be written, or read back, there.
    #[error("file {file} at the destination: {reason}")]
    Destination {
        /// Its number in the list, from zero.
        file: usize,
        /// What happened, in the destination's words.
        reason: String,
    },
    /// A file that should be there already is not the same there.
    #[error("file {file} is not the same at the destination")]
    Differs {
        /// Its number in the list, from zero.
        file: usize,
    },
    /// What was written reads back as something else, again and again.
    #[error("file {file} at offset {offset} does not arrive as it was sent")]
    Corrupt {
        /// Its number in the list, from zero.
        file: usize,
        /// Where in it.
        offset: u64,
    },
    /// There was no progress for too long.
    #[error("no progress for {} s: {cause}", after.as_secs_f32().round())]
    Stalled {
        /// For how long.
        after: Duration,
        /// What was in the way last.
        cause: String,
    },
    /// It was cancelled.
    #[error("cancelled")]
    Cancelled,
}

impl SendError {
    fn source(source: &Source, error: io::Error) -> Self {
        let path = source.path.clone();
        Self::Source { path, error }
    }

    /// The bookkeeping contradicts itself; nothing it says can be believed.
    fn bug(what: &str, file: usize) -> Self {
        let reason = format!("bug: {what}");
        Self::Destination { file, reason }
    }
}

/// Sends the files, and returns when every byte of them is verified at the
/// destination, and on stable storage there. Blocks; connections that break are
/// made again.
///
/// # Errors
/// Not everything is there, or not known to be. What has arrived stays, for
/// another attempt with [`SendSpec::resume`].
pub fn send(spec: &SendSpec, control: &Control) -> Result<Summary, SendError> {
    let sources = open(spec)?;
    let total_bytes = look_through(&sources, control)?;
    control.begin(total_bytes);
    let ledger = Ledger::new(&sources, control, spec.resume);
    let run = nonce();
    let dial = Dial {
        spec,
        run,
        control,
        ledger: &ledger,
        sources: &sources,
    };
    persist(&dial)?;
    for source in &sources {
        let unchanged = source.check_unchanged();
        unchanged.map_err(|error| SendError::source(source, error))?;
    }
    Ok(Summary {
        sent_bytes: control.sent(),
        reused_bytes: ledger.reused(),
        total_bytes,
        reconnects: control.progress().reconnects,
    })
}

fn open(spec: &SendSpec) -> Result<Vec<Source>, SendError> {
    let failed = |path: &PathBuf, error| SendError::Source {
        path: path.clone(),
        error,
    };
    if let Some(beyond) = spec.files.get(MOST_FILES) {
        let error = io::Error::other(format!("more than {MOST_FILES} files"));
        return Err(failed(&beyond.path, error));
    }
    let sources = spec
        .files
        .iter()
        .map(|Outgoing { path }| disk::open_source(path).map_err(|error| failed(path, error)));
    sources.collect()
}

/// Counts the data.
fn look_through(sources: &[Source], control: &Control) -> Result<u64, SendError> {
    enum Ended {
        Cancelled,
        Failed(io::Error),
    }
    impl From<io::Error> for Ended {
        fn from(error: io::Error) -> Self {
            Self::Failed(error)
        }
    }
    let tick = || match control.is_cancelled() {
        true => Err(Ended::Cancelled),
        false => Ok(()),
    };
    let mut total = 0;
    for source in sources {
        total += extents::count(source, tick).map_err(|ended| match ended {
            Ended::Cancelled => SendError::Cancelled,
            Ended::Failed(error) => SendError::source(source, error),
        })?;
    }
    Ok(total)
}

/// Connects again and again, until all is done or there is no hope.
fn persist(dial: &Dial) -> Result<(), SendError> {
    let mut welcome = false;
    let mut unknown_since = None;
    let mut pause = FIRST_PAUSE;
    loop {
        let begun = Instant::now();
        let cause = match session::run(dial, &mut welcome) {
            Ok(()) => return Ok(()),
            Err(Cut::Fatal(error)) => return Err(error),
            // It was restarted and is not told yet; or it has forgotten us.
            Err(Cut::Refused(reason)) => {
                let since = *unknown_since.get_or_insert(begun);
                if !welcome && since.elapsed() > UNKNOWN {
                    return Err(SendError::Refused(reason));
                }
                format!("the destination refused: {reason}")
            }
            Err(Cut::Link(error)) => {
                unknown_since = None;
                error.to_string()
            }
        };
        tracing::debug!(migration = %dial.spec.migration, cause, "the connection is lost");
        if dial.ledger.progressed() > begun {
            pause = FIRST_PAUSE;
        }
        let until = Instant::now() + pause.mul_f64(0.5 + fastrand::f64() / 2.0);
        while Instant::now() < until {
            dial.check(&cause)?;
            dial.control
                .sleep(until.saturating_duration_since(Instant::now()));
        }
        dial.check(&cause)?;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

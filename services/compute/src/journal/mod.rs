//! What the agent must still know after `kill -9`: one small JSON file per
//! migration, written before the deed it speaks of (invariant 4).
//!
//! ```text
//! <state_dir>/identity.json            which state directory this is
//! <state_dir>/migrations/<uuid>.json   what this node does for a migration
//! <state_dir>/seen/<uuid>.json         its highest epoch, and how it ended here
//! <state_dir>/marks/<uuid>.json        marks left beside a guest's disks
//! <state_dir>/definitions/<uuid>.json  a definition on its way (see [`definition`])
//! ```
//!
//! A file appears whole or not at all: written beside its place, flushed to the
//! disk, renamed ([`files`]); each has one writer at a time ([`shelf`]). One that
//! is damaged is set aside as `<name>.corrupt` with a line in the log; one that
//! cannot be read now stays where it is, and holds.

pub mod definition;
mod files;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
mod identity;
mod record;
mod shelf;

use std::{
    io,
    path::{Path, PathBuf},
};

use drover_model::{
    api::{
        compute::Doing,
        fault::{Fault, code},
    },
    error::ErrorClass,
    ids::{MigrationId, StateId},
};

use files::Flush;
pub use files::StateDisk;
pub(crate) use files::{Unread, read_whole, set_aside, write_whole};
pub use record::{
    ComingFile, ComingRecord, CopiedDisk, DestinationRecord, Ended, Inodes, KeptFile,
    LeavingRecord, MarksRecord, NewDisk, Over, RebuildRecord, Record, Seen, SeenRecord, SentFile,
    SourceRecord, Thaw, TransferRecord,
};
pub use shelf::{Loaded, Shelf, Shelved, UnreadFile};

/// A file that could not be written, read or removed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {verb} {path}: {source}")]
pub struct JournalError {
    verb: &'static str,
    path: PathBuf,
    source: io::Error,
}

impl From<JournalError> for Fault {
    fn from(error: JournalError) -> Self {
        let class = match error.source.kind() {
            // It will be as long the next time.
            io::ErrorKind::FileTooLarge => ErrorClass::Refused,
            _ => ErrorClass::Retryable,
        };
        let message = format!("the agent's journal: {error}");
        Self::new(class, code::JOURNAL_UNWRITABLE, message)
    }
}

/// A new secret, hexadecimal: 32 bytes from the operating system's random numbers.
pub fn token() -> String {
    let halves = [
        uuid::Uuid::new_v4(),
        uuid::Uuid::new_v4(),
        uuid::Uuid::new_v4(),
    ];
    let text: String = halves
        .iter()
        .map(|half| half.simple().to_string())
        .collect();
    // Each holds six bits that are always the same: three have more than enough.
    text.chars().take(64).collect()
}

/// The files an agent keeps. Cheap to clone.
#[derive(Clone)]
pub struct Journal {
    /// Migrations under way.
    pub migrations: Shelf<Record>,
    /// What was seen of migrations, also of those that are over.
    pub seen: Shelf<SeenRecord>,
    /// Marks that are to be removed again.
    pub marks: Shelf<MarksRecord>,
    state: StateId,
    disk: StateDisk,
}

impl Journal {
    /// Opens the journal below a directory, which is made if it is not there.
    ///
    /// # Errors
    /// A directory cannot be made, or its identity not be read.
    pub fn open(state_dir: &Path, disk: &StateDisk) -> Result<Self, JournalError> {
        let shelf = |name: &str| state_dir.join(name);
        let migrations = Shelf::open(shelf("migrations"), Flush::ToDisk, disk.clone())?;
        let seen = Shelf::open(shelf("seen"), Flush::ToDisk, disk.clone())?;
        // A mark that a power cut leaves behind harms nobody.
        let marks = Shelf::open(shelf("marks"), Flush::Never, disk.clone())?;
        Ok(Self {
            migrations,
            seen,
            marks,
            state: identity::of(state_dir, disk)?,
            disk: disk.clone(),
        })
    }

    /// Which state directory it is.
    pub fn state(&self) -> StateId {
        self.state
    }

    /// What it says this node does for a migration.
    pub fn doing(&self, migration: MigrationId) -> Option<Doing> {
        self.migrations.summary(migration)
    }

    /// The disk it is on.
    pub fn disk(&self) -> &StateDisk {
        &self.disk
    }
}

//! What the agent must still know after `kill -9`: one small JSON file per
//! migration, written before the deed it speaks of (invariant 4).
//!
//! ```text
//! <state_dir>/migrations/<uuid>.json   what this node does for a migration
//! <state_dir>/marks/<uuid>.json        marks left beside a guest's disks
//! <state_dir>/definitions/<uuid>.json  a definition on its way (see [`definition`])
//! ```
//!
//! A file appears whole or not at all: written beside its place, flushed to the
//! disk, renamed. One that cannot be read is set aside as `<name>.corrupt` with
//! a line in the log; it never stops the agent.

pub mod definition;
mod record;

use std::{
    ffi::OsStr,
    fs, io,
    io::{Read, Write},
    marker::PhantomData,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    str::FromStr,
};

use drover_model::{
    api::fault::{Fault, code},
    error::ErrorClass,
    ids::MigrationId,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tracing::{error, warn};

pub use record::{
    ComingFile, ComingRecord, CopiedDisk, DestinationRecord, Ended, KeptFile, LeavingRecord,
    MarksRecord, NewDisk, RebuildRecord, Record, SourceRecord, TransferRecord,
};

/// Version of the files' form.
const VERSION: u32 = 1;
/// The longest file that is read, bytes. What the agent writes is far smaller.
const MAX_BYTES: u64 = 4 << 20;

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
        Self::new(
            ErrorClass::Retryable,
            code::JOURNAL_UNWRITABLE,
            format!("the agent's journal: {error}"),
        )
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

/// The two kinds of files an agent keeps.
#[derive(Debug, Clone)]
pub struct Journal {
    /// Migrations under way.
    pub migrations: Shelf<Record>,
    /// Marks that are to be removed again.
    pub marks: Shelf<MarksRecord>,
}

impl Journal {
    /// Opens the journal below a directory, which is made if it is not there.
    ///
    /// # Errors
    /// A directory cannot be made.
    pub fn open(state_dir: &Path) -> Result<Self, JournalError> {
        Ok(Self {
            migrations: Shelf::open(state_dir.join("migrations"), Flush::ToDisk)?,
            // A mark that a power cut leaves behind harms nobody.
            marks: Shelf::open(state_dir.join("marks"), Flush::Never)?,
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flush {
    /// Survives a power cut.
    ToDisk,
    /// Survives the end of the process.
    Never,
}

/// A directory of files of one kind, one per migration.
#[derive(Debug)]
pub struct Shelf<T> {
    directory: PathBuf,
    flush: Flush,
    kind: PhantomData<fn() -> T>,
}

impl<T> Clone for Shelf<T> {
    fn clone(&self) -> Self {
        Self {
            directory: self.directory.clone(),
            flush: self.flush,
            kind: PhantomData,
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Versioned<T> {
    version: u32,
    #[serde(flatten)]
    content: T,
}

impl<T: Serialize + DeserializeOwned + Send + 'static> Shelf<T> {
    fn open(directory: PathBuf, flush: Flush) -> Result<Self, JournalError> {
        fs::create_dir_all(&directory).map_err(failed("make", &directory))?;
        Ok(Self {
            directory,
            flush,
            kind: PhantomData,
        })
    }

    fn path(&self, migration: MigrationId) -> PathBuf {
        self.directory.join(format!("{migration}.json"))
    }

    /// Writes the file of a migration, in place of the one before.
    ///
    /// # Errors
    /// The file system refuses; the file before is untouched.
    pub async fn store(&self, migration: MigrationId, content: &T) -> Result<(), JournalError>
    where
        T: Clone,
    {
        let file = Versioned {
            version: VERSION,
            content: content.clone(),
        };
        let (path, flush) = (self.path(migration), self.flush);
        off_the_runtime(move || {
            let text = serde_json::to_vec_pretty(&file).map_err(io::Error::other);
            let text = text.map_err(failed("write", &path))?;
            replace(&path, &text, flush).map_err(failed("write", &path))
        })
        .await
    }

    /// Removes the file of a migration; one that is not there is no error.
    ///
    /// # Errors
    /// The file system refuses.
    pub async fn remove(&self, migration: MigrationId) -> Result<(), JournalError> {
        let path = self.path(migration);
        off_the_runtime(move || match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed("remove", &path)(e)),
            _ => Ok(()),
        })
        .await
    }

    /// Every file that can be read. Those that cannot are set aside.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn load(&self) -> Result<Vec<(MigrationId, T)>, JournalError> {
        let listing = fs::read_dir(&self.directory).map_err(failed("read", &self.directory))?;
        let mut found = Vec::new();
        for entry in listing {
            let path = entry.map_err(failed("read", &self.directory))?.path();
            match path.extension().and_then(OsStr::to_str) {
                Some("json") => match read(&path) {
                    Ok(pair) => found.push(pair),
                    Err(reason) => set_aside(&path, &reason),
                },
                // Left by a death between writing and renaming: never in force.
                Some("new") => drop(fs::remove_file(&path)),
                _ => {}
            }
        }
        found.sort_by_key(|(migration, _)| *migration);
        Ok(found)
    }
}

fn failed(verb: &'static str, path: &Path) -> impl FnOnce(io::Error) -> JournalError {
    let path = path.to_owned();
    move |source| JournalError { verb, path, source }
}

/// Flushing takes as long as the disk likes, so it has a thread of its own.
async fn off_the_runtime<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, JournalError> + Send + 'static,
) -> Result<T, JournalError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(e) => Err(failed("reach", Path::new("the journal"))(io::Error::other(
            e,
        ))),
    }
}

fn replace(path: &Path, text: &[u8], flush: Flush) -> io::Result<()> {
    let beside = path.with_extension("new");
    // Definitions in it hold secrets of guests.
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&beside)?;
    file.write_all(text)?;
    if flush == Flush::ToDisk {
        file.sync_all()?;
    }
    drop(file);
    fs::rename(&beside, path)?;
    match path.parent() {
        Some(directory) if flush == Flush::ToDisk => fs::File::open(directory)?.sync_all(),
        _ => Ok(()),
    }
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<(MigrationId, T), String> {
    let stem = path.file_stem().and_then(OsStr::to_str).unwrap_or_default();
    let migration = MigrationId::from_str(stem).map_err(|e| format!("its name: {e}"))?;
    let mut text = Vec::new();
    let file = fs::File::open(path).map_err(|e| e.to_string())?;
    let length = file.take(MAX_BYTES + 1).read_to_end(&mut text);
    if length.map_err(|e| e.to_string())? as u64 > MAX_BYTES {
        return Err(format!("longer than {MAX_BYTES} bytes"));
    }
    let file: Versioned<T> = serde_json::from_slice(&text).map_err(|e| e.to_string())?;
    if file.version != VERSION {
        let version = file.version;
        return Err(format!("version {version}; this agent reads {VERSION}"));
    }
    Ok((migration, file.content))
}

fn set_aside(path: &Path, reason: &str) {
    let aside = path.with_extension("json.corrupt");
    error!(
        file = %path.display(), kept_as = %aside.display(), reason,
        "a journal file cannot be read and is set aside: what this node was doing for that \
         migration is unknown; look for a leftover domain or disk of it"
    );
    if let Err(e) = fs::rename(path, &aside) {
        warn!(file = %path.display(), error = %e, "it could not be set aside");
    }
}

#[cfg(test)]
mod tests {
    use drover_model::ids::InstanceId;
    use uuid::Uuid;

    use super::*;

    fn record() -> Record {
        Record::Destination(DestinationRecord {
            instance: InstanceId(Uuid::from_u128(7)),
            disks: Vec::new(),
            prepared: false,
        })
    }

    #[tokio::test]
    async fn what_was_stored_is_there_after_opening_again() {
        let dir = tempfile::tempdir().unwrap();
        let id = MigrationId::generate();
        let journal = Journal::open(dir.path()).unwrap();
        journal.migrations.store(id, &record()).await.unwrap();
        let again = Journal::open(dir.path()).unwrap();
        assert_eq!(again.migrations.load().unwrap(), vec![(id, record())]);
        again.migrations.remove(id).await.unwrap();
        again.migrations.remove(id).await.unwrap();
        assert!(again.migrations.load().unwrap().is_empty());
    }

    #[tokio::test]
    async fn what_cannot_be_read_is_set_aside_and_the_rest_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        let good = MigrationId::generate();
        journal.migrations.store(good, &record()).await.unwrap();
        let folder = dir.path().join("migrations");
        let text = fs::read_to_string(journal.migrations.path(good)).unwrap();
        let cut = folder.join(format!("{}.json", MigrationId::generate()));
        fs::write(&cut, &text[..text.len() / 2]).unwrap();
        let future = folder.join(format!("{}.json", MigrationId::generate()));
        fs::write(&future, text.replace("\"version\": 1", "\"version\": 2")).unwrap();
        fs::write(folder.join("no-uuid.json"), &text).unwrap();
        fs::write(folder.join("half.new"), "{").unwrap();

        let loaded = journal.migrations.load().unwrap();
        assert_eq!(loaded, vec![(good, record())]);
        let names: Vec<String> = fs::read_dir(&folder)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        assert_eq!(names.len(), 4, "{names:?}");
        assert_eq!(names.iter().filter(|n| n.ends_with(".corrupt")).count(), 3);
    }

    #[tokio::test]
    async fn an_unwritable_place_is_a_retryable_fault_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        fs::remove_dir(dir.path().join("migrations")).unwrap();
        let error = journal
            .migrations
            .store(MigrationId::generate(), &record())
            .await
            .unwrap_err();
        let fault = Fault::from(error);
        assert_eq!(fault.class, ErrorClass::Retryable);
        assert!(fault.message.contains("migrations/"), "{fault}");
    }
}

//! A directory of files of one kind, one per migration.
//!
//! Each file has one writer at a time, and the order in which writing was asked
//! for is the order in which it counts: what was asked for earlier and comes
//! later is dropped. So nothing comes back that was replaced or removed.

use std::{
    collections::HashMap,
    ffi::OsStr,
    fs,
    future::Future,
    io,
    path::{Path, PathBuf},
    str::FromStr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use drover_model::ids::{InstanceId, MigrationId};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use sha2::{Digest, Sha256};

use super::{
    JournalError,
    files::{self, Flush, MAX_BYTES, StateDisk, Unread, failed, off_the_runtime},
};

/// Version of the files' form.
const VERSION: u32 = 1;

/// What a shelf can hold.
pub trait Shelved: Serialize + DeserializeOwned + Clone + Send + 'static {
    /// What is kept of each in memory.
    type Summary: Clone + Send + 'static;

    /// What is to be kept in memory.
    fn summary(&self) -> Self::Summary;
}

/// See the module. Cheap to clone.
#[derive(Clone)]
pub struct Shelf<T: Shelved> {
    directory: Arc<Path>,
    flush: Flush,
    disk: StateDisk,
    max_bytes: u64,
    state: Arc<Mutex<State<T>>>,
}

struct State<T: Shelved> {
    /// What is on disk.
    summaries: HashMap<MigrationId, T::Summary>,
    /// Turns given out.
    turns: u64,
    /// Files for which a turn is waited for or taken.
    writers: HashMap<MigrationId, Writers>,
}

#[derive(Default, Clone)]
struct Writers {
    /// The latest turn that was taken; held while the file is written.
    latest: Arc<Mutex<u64>>,
    /// How many turns of it are not over.
    turns: usize,
}

/// What a directory held.
pub struct Loaded<T> {
    /// What could be read.
    pub read: Vec<(MigrationId, T)>,
    /// What could not be read now.
    pub unread: Vec<UnreadFile>,
    /// What was damaged, and is set aside.
    pub corrupt: Vec<MigrationId>,
}

/// A file that could not be read now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnreadFile {
    /// The migration.
    pub migration: MigrationId,
    /// Its instance, if as much could be made out.
    pub instance: Option<InstanceId>,
    /// Which file, and why.
    pub why: String,
}

#[derive(Serialize, Deserialize)]
struct Versioned<T> {
    version: u32,
    /// See [`seal`].
    #[serde(default)]
    sum: String,
    #[serde(flatten)]
    content: T,
}

#[derive(Deserialize)]
struct VersionOnly {
    version: u32,
    sum: Option<String>,
}

/// What is looked for in a file of a form that is not known.
#[derive(Deserialize)]
struct Hint {
    instance: Option<InstanceId>,
    request: Option<Subject>,
}

#[derive(Deserialize)]
struct Subject {
    instance: Option<InstanceId>,
}

impl<T: Shelved> Shelf<T> {
    pub(super) fn open(
        directory: PathBuf,
        flush: Flush,
        disk: StateDisk,
    ) -> Result<Self, JournalError> {
        fs::create_dir_all(&directory).map_err(failed("make", &directory))?;
        Ok(Self {
            directory: directory.into(),
            flush,
            disk,
            max_bytes: MAX_BYTES,
            state: Arc::new(Mutex::new(State {
                summaries: HashMap::new(),
                turns: 0,
                writers: HashMap::new(),
            })),
        })
    }

    pub(super) fn path(&self, migration: MigrationId) -> PathBuf {
        self.directory.join(format!("{migration}.json"))
    }

    /// What is kept in memory of a file that is on disk.
    pub fn summary(&self, migration: MigrationId) -> Option<T::Summary> {
        self.lock().summaries.get(&migration).cloned()
    }

    /// The same of all of them.
    pub fn summaries(&self) -> Vec<(MigrationId, T::Summary)> {
        let state = self.lock();
        let all = state.summaries.iter();
        all.map(|(id, summary)| (*id, summary.clone())).collect()
    }

    /// Whether one of them is so.
    pub fn any(&self, is_so: impl FnMut(&T::Summary) -> bool) -> bool {
        self.lock().summaries.values().any(is_so)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.lock().summaries.len()
    }

    /// Writes the file of a migration, in place of the one before. Its turn is
    /// that of this call, not of the future's first poll.
    ///
    /// # Errors
    /// The file system refuses, or it was overtaken by a later call; the file
    /// before is untouched.
    pub fn store(
        &self,
        migration: MigrationId,
        content: &T,
    ) -> impl Future<Output = Result<(), JournalError>> + Send + use<T> {
        let turn = self.turn(migration);
        let (shelf, content) = (self.clone(), content.clone());
        let work = move || {
            let path = shelf.path(migration);
            turn.take(&path, || {
                let summary = content.summary();
                let written = encode(migration, content).and_then(|text| {
                    let (flush, disk) = (shelf.flush, &shelf.disk);
                    files::replace_within(&path, &text, flush, disk, shelf.max_bytes)
                });
                written.map_err(failed("write", &path))?;
                shelf.lock().summaries.insert(migration, summary);
                Ok(())
            })
        };
        async { off_the_runtime(work).await? }
    }

    /// Removes the file of a migration; one that is not there is no error. Its
    /// turn is that of this call.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn remove(
        &self,
        migration: MigrationId,
    ) -> impl Future<Output = Result<(), JournalError>> + Send + use<T> {
        let turn = self.turn(migration);
        let shelf = self.clone();
        let work = move || {
            let path = shelf.path(migration);
            turn.take(&path, || {
                files::remove(&path, shelf.flush)?;
                shelf.lock().summaries.remove(&migration);
                Ok(())
            })
        };
        async { off_the_runtime(work).await? }
    }

    /// Reads the file of a migration; none if it is not there.
    pub(crate) async fn read(&self, migration: MigrationId) -> Result<Option<T>, Unread> {
        let shelf = self.clone();
        let read = off_the_runtime(move || shelf.read_file(migration)).await;
        read.unwrap_or_else(|e| Err(Unread::NotNow(e.to_string())))
    }

    /// Takes up a file that could not be read when all were.
    pub(crate) async fn load_again(&self, migration: MigrationId) -> Result<Option<T>, Unread> {
        let read = self.read(migration).await;
        match &read {
            Ok(Some(content)) => {
                let summary = content.summary();
                self.lock().summaries.insert(migration, summary);
            }
            Err(Unread::Corrupt(why)) => files::set_aside(&self.path(migration), why),
            Ok(None) | Err(Unread::NotNow(_)) => {}
        }
        read
    }

    /// Every file that can be read; damaged ones are set aside.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn load(&self) -> Result<Loaded<T>, JournalError> {
        let listing = fs::read_dir(&self.directory).map_err(failed("read", &self.directory))?;
        let mut loaded = Loaded {
            read: Vec::new(),
            unread: Vec::new(),
            corrupt: Vec::new(),
        };
        for entry in listing {
            let path = entry.map_err(failed("read", &self.directory))?.path();
            match path.extension().and_then(OsStr::to_str) {
                Some("json") => self.load_file(&path, &mut loaded),
                // Left by a death between writing and renaming: never in force.
                Some("new") => drop(fs::remove_file(&path)),
                _ => {}
            }
        }
        loaded.read.sort_by_key(|(migration, _)| *migration);
        Ok(loaded)
    }

    fn load_file(&self, path: &Path, loaded: &mut Loaded<T>) {
        let stem = path.file_stem().and_then(OsStr::to_str).unwrap_or_default();
        let migration = match MigrationId::from_str(stem) {
            Ok(migration) => migration,
            Err(e) => return files::set_aside(path, &format!("its name: {e}")),
        };
        match self.read_file(migration) {
            Ok(Some(content)) => {
                let summary = content.summary();
                self.lock().summaries.insert(migration, summary);
                loaded.read.push((migration, content));
            }
            Ok(None) => {}
            Err(Unread::Corrupt(why)) => {
                files::set_aside(path, &why);
                loaded.corrupt.push(migration);
            }
            Err(Unread::NotNow(why)) => loaded.unread.push(UnreadFile {
                migration,
                instance: self.hint(path),
                why: format!("{}: {why}", path.display()),
            }),
        }
    }

    fn read_file(&self, migration: MigrationId) -> Result<Option<T>, Unread> {
        let text = files::read(&self.path(migration), self.max_bytes)?;
        text.map(|text| decode(migration, &text)).transpose()
    }

    /// The instance of a file, whatever else it says.
    fn hint(&self, path: &Path) -> Option<InstanceId> {
        let text = files::read(path, self.max_bytes).ok()??;
        let hint: Hint = serde_json::from_slice(&text).ok()?;
        hint.instance.or_else(|| hint.request?.instance)
    }

    fn turn(&self, migration: MigrationId) -> Turn<T> {
        let mut state = self.lock();
        state.turns += 1;
        let number = state.turns;
        let writers = state.writers.entry(migration).or_default();
        writers.turns += 1;
        Turn {
            latest: writers.latest.clone(),
            number,
            migration,
            shelf: self.clone(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        // Nothing is left half done under this lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the file of a migration says, as text.
pub(super) fn encode<T: Serialize>(migration: MigrationId, content: T) -> io::Result<Vec<u8>> {
    let file = Versioned {
        version: VERSION,
        sum: "0".repeat(SUM),
        content,
    };
    let mut text = serde_json::to_vec_pretty(&file)?;
    seal(migration, &mut text)?;
    Ok(text)
}

/// Reads such a text.
pub(super) fn decode<T: DeserializeOwned>(
    migration: MigrationId,
    text: &[u8],
) -> Result<T, Unread> {
    let VersionOnly { version, sum } =
        serde_json::from_slice(text).map_err(|e| Unread::from_json(&e))?;
    if version != VERSION {
        let why = format!("it is of version {version}, and this agent reads {VERSION}");
        return Err(Unread::NotNow(why));
    }
    match (parts(text), sum) {
        (Some((said, rest)), _) if said == sum_of(migration, rest).as_bytes() => {}
        // Written before there were sums.
        (None, None) => {}
        _ => return Err(Unread::Corrupt("its sum is another".to_owned())),
    }
    let file: Versioned<T> = serde_json::from_slice(text).map_err(|e| Unread::from_json(&e))?;
    Ok(file.content)
}

/// How every file begins. The sum is of all that comes after it, and of the
/// migration: a bit that fell over may have made another guest's name, or another
/// disk's, of one.
const BEGINNING: &[u8] = b"{\n  \"version\": 1,\n  \"sum\": \"";
/// Digits of a sum.
const SUM: usize = 64;

/// The sum in a text, and what it is of.
fn parts(text: &[u8]) -> Option<(&[u8], &[u8])> {
    text.strip_prefix(BEGINNING)?.split_at_checked(SUM)
}

fn sum_of(migration: MigrationId, rest: &[u8]) -> String {
    let sum = Sha256::new().chain_update(migration.0).chain_update(rest);
    format!("{:x}", sum.finalize())
}

fn seal(migration: MigrationId, text: &mut [u8]) -> io::Result<()> {
    let sum = parts(text).map(|(_, rest)| sum_of(migration, rest));
    let sum = sum.ok_or_else(|| io::Error::other("a file of the journal begins otherwise"))?;
    let at = BEGINNING.len();
    text[at..at + SUM].copy_from_slice(sum.as_bytes());
    Ok(())
}

/// The right to write a file, in the order of asking.
struct Turn<T: Shelved> {
    latest: Arc<Mutex<u64>>,
    number: u64,
    migration: MigrationId,
    shelf: Shelf<T>,
}

impl<T: Shelved> Turn<T> {
    /// Does the work unless somebody who asked later has done theirs.
    fn take(
        &self,
        path: &Path,
        work: impl FnOnce() -> Result<(), JournalError>,
    ) -> Result<(), JournalError> {
        let mut latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        if *latest > self.number {
            let overtaken = io::Error::other("what was to be written is out of date");
            return Err(failed("write", path)(overtaken));
        }
        *latest = self.number;
        work()
    }
}

impl<T: Shelved> Drop for Turn<T> {
    fn drop(&mut self) {
        let mut state = self.shelf.lock();
        if let Some(writers) = state.writers.get_mut(&self.migration) {
            writers.turns -= 1;
            if writers.turns == 0 {
                state.writers.remove(&self.migration);
            }
        }
    }
}

#[cfg(test)]
mod tests;

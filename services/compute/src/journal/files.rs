//! Files that appear whole or not at all, and stay after a power cut.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use serde::{Serialize, de::DeserializeOwned};
use serde_json::error::Category;
use tracing::{error, warn};

use super::JournalError;

/// The longest file that is read, and so the longest that is written, bytes. A
/// definition with its snapshots may take megabytes.
pub(super) const MAX_BYTES: u64 = 128 << 20;
/// Files of a directory that are kept after they were set aside as corrupt.
const MAX_CORRUPT: usize = 32;

/// The disk below the state directory, which a test may fill.
#[derive(Debug, Clone, Default)]
pub struct StateDisk {
    full: Arc<AtomicBool>,
}

impl StateDisk {
    /// Has every write fail as on a full disk, or succeed again.
    pub fn fill(&self, full: bool) {
        self.full.store(full, Ordering::Relaxed);
    }

    fn check(&self) -> io::Result<()> {
        match self.full.load(Ordering::Relaxed) {
            true => Err(io::ErrorKind::StorageFull.into()),
            false => Ok(()),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flush {
    /// Survives a power cut.
    ToDisk,
    /// Survives the end of the process.
    Never,
}

/// Why a file was not read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unread {
    /// It may be readable another time, or by another agent: what it says holds.
    #[error("{0}")]
    NotNow(String),
    /// It is damaged: what it said is lost.
    #[error("{0}")]
    Corrupt(String),
}

impl Unread {
    /// A text that is no JSON was cut off or overwritten; one that is JSON and not
    /// understood is some other agent's.
    pub(super) fn from_json(error: &serde_json::Error) -> Self {
        match error.classify() {
            Category::Syntax | Category::Eof => Self::Corrupt(error.to_string()),
            Category::Data | Category::Io => {
                Self::NotNow(format!("it says what this agent does not know: {error}"))
            }
        }
    }
}

/// Puts a text in the place of a file. Of two that do so at once one is there
/// afterwards, never a mixture.
///
/// # Errors
/// The file system refuses, or the text is longer than what is read; the file
/// before is untouched.
pub(super) fn replace(
    path: &Path,
    text: &[u8],
    flush: Flush,
    disk: &StateDisk,
) -> Result<(), JournalError> {
    replace_within(path, text, flush, disk, MAX_BYTES).map_err(failed("write", path))
}

pub(super) fn replace_within(
    path: &Path,
    text: &[u8],
    flush: Flush,
    disk: &StateDisk,
    max_bytes: u64,
) -> io::Result<()> {
    if text.len() as u64 > max_bytes {
        let length = text.len();
        let message = format!("{length} bytes; no more than {max_bytes} are read back");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, message));
    }
    let beside = path.with_extension(format!("{}.new", uuid::Uuid::new_v4().simple()));
    let renamed = write_new(&beside, text, flush, disk).and_then(|()| fs::rename(&beside, path));
    if let Err(error) = renamed {
        // A leftover is never in force, and removed at the next start.
        drop(fs::remove_file(&beside));
        return Err(error);
    }
    match flush {
        Flush::ToDisk => sync_directory_of(path),
        Flush::Never => Ok(()),
    }
}

fn write_new(path: &Path, text: &[u8], flush: Flush, disk: &StateDisk) -> io::Result<()> {
    // Definitions in it hold secrets of guests.
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    disk.check()?;
    file.write_all(text)?;
    match flush {
        Flush::ToDisk => sync(&file, path),
        Flush::Never => Ok(()),
    }
}

/// Writes a file of one's own form.
///
/// # Errors
/// As [`replace`].
pub(crate) async fn write_whole<T: Serialize>(
    path: &Path,
    content: &T,
    disk: &StateDisk,
) -> Result<(), JournalError> {
    let text = serde_json::to_vec(content).map_err(io::Error::other);
    let text = text.map_err(failed("write", path))?;
    let (path, disk) = (path.to_owned(), disk.clone());
    off_the_runtime(move || replace(&path, &text, Flush::ToDisk, &disk)).await?
}

/// Reads such a file; none if it is not there.
pub(crate) async fn read_whole<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, Unread> {
    let path = path.to_owned();
    let read = off_the_runtime(move || read(&path, MAX_BYTES)).await;
    let text = read.unwrap_or_else(|e| Err(Unread::NotNow(e.to_string())))?;
    let parse = |text: Vec<u8>| serde_json::from_slice(&text);
    let content = text.map(parse).transpose();
    content.map_err(|e| Unread::from_json(&e))
}

/// Removes a file; one that is not there is no error.
///
/// # Errors
/// The file system refuses.
pub(super) fn remove(path: &Path, flush: Flush) -> Result<(), JournalError> {
    let removed = match fs::remove_file(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
        // One that a power cut brought back would speak of what is over.
        Ok(()) if flush == Flush::ToDisk => sync_directory_of(path),
        Ok(()) => Ok(()),
    };
    removed.map_err(failed("remove", path))
}

fn sync_directory_of(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(directory) => sync(&File::open(directory)?, directory),
        None => Ok(()),
    }
}

fn sync(file: &File, _path: &Path) -> io::Result<()> {
    file.sync_all()?;
    #[cfg(test)]
    tests::SYNCED.with_borrow_mut(|synced| synced.push(_path.to_owned()));
    Ok(())
}

/// The bytes of a file; none if it is not there.
pub(super) fn read(path: &Path, max_bytes: u64) -> Result<Option<Vec<u8>>, Unread> {
    let not_now = |e: io::Error| Unread::NotNow(e.to_string());
    let file = match File::open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(not_now)?,
    };
    let mut text = Vec::new();
    let length = file.take(max_bytes + 1).read_to_end(&mut text);
    match length.map_err(not_now)? as u64 > max_bytes {
        true => Err(Unread::NotNow(format!("longer than {max_bytes} bytes"))),
        false => Ok(Some(text)),
    }
}

/// Keeps a damaged file out of the way, and no more than some of them.
pub(crate) fn set_aside(path: &Path, reason: &str) {
    let mut aside = path.as_os_str().to_owned();
    aside.push(".corrupt");
    let aside = PathBuf::from(aside);
    error!(
        file = %path.display(), kept_as = %aside.display(), reason,
        "a file of the agent's state is damaged and is set aside: what it said is unknown from \
         now on; look for a leftover domain or disk of it"
    );
    if let Err(e) = fs::rename(path, &aside) {
        warn!(file = %path.display(), error = %e, "it could not be set aside");
    }
    if let Some(directory) = path.parent() {
        bound_corrupt(directory);
    }
}

fn bound_corrupt(directory: &Path) {
    let Ok(listing) = fs::read_dir(directory) else {
        return;
    };
    let corrupt = listing.flatten().map(|entry| entry.path());
    let corrupt = corrupt.filter(|path| path.extension().is_some_and(|e| e == "corrupt"));
    let mut by_age: Vec<_> = corrupt
        .map(|path| (fs::metadata(&path).and_then(|m| m.modified()).ok(), path))
        .collect();
    by_age.sort();
    let excess = by_age.len().saturating_sub(MAX_CORRUPT);
    for (_, path) in by_age.drain(..excess) {
        warn!(file = %path.display(), "the oldest of many damaged files is removed");
        drop(fs::remove_file(path));
    }
}

pub(super) fn failed(verb: &'static str, path: &Path) -> impl FnOnce(io::Error) -> JournalError {
    let path = path.to_owned();
    move |source| JournalError { verb, path, source }
}

/// Flushing takes as long as the disk likes, so it has a thread of its own.
pub(super) async fn off_the_runtime<R: Send + 'static>(
    work: impl FnOnce() -> R + Send + 'static,
) -> Result<R, JournalError> {
    let reached = drover_runtime::blocking::blocking(work).await;
    reached.map_err(|e| failed("reach", Path::new("the journal"))(io::Error::other(e)))
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    thread_local! {
        /// What was brought to stable storage, in order.
        pub(super) static SYNCED: RefCell<Vec<PathBuf>> = const { RefCell::new(Vec::new()) };
    }

    #[test]
    fn what_is_written_or_removed_is_so_after_a_power_cut() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("m.json");
        replace(&path, b"1", Flush::ToDisk, &StateDisk::default()).unwrap();
        // Its bytes, and only then its name.
        let order = SYNCED.take();
        assert_eq!(order.len(), 2, "{order:?}");
        assert_eq!(order[0].extension(), Some("new".as_ref()), "{order:?}");
        assert_eq!(order[1], directory.path());
        remove(&path, Flush::ToDisk).unwrap();
        assert_eq!(SYNCED.take(), [directory.path()]);
    }
}

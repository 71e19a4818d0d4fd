//! Definitions on their way: written down by the source's agent, carried as one
//! more file, read by the destination's. So what is secret in them goes neither
//! over the broker nor into the conductor's record.

use std::{fs, io, os::unix::fs::OpenOptionsExt, path::Path};

use super::{
    JournalError, StateDisk,
    files::{self, Flush, MAX_BYTES, Unread, failed, off_the_runtime},
};
use crate::hypervisor::Definition;

/// Writes one down, readable for this process's user alone.
///
/// # Errors
/// The file system refuses.
pub async fn write(
    path: &Path,
    definition: &Definition,
    disk: &StateDisk,
) -> Result<(), JournalError> {
    let (path, definition, disk) = (path.to_owned(), definition.clone(), disk.clone());
    off_the_runtime(move || {
        make_directory(&path)?;
        let text = serde_json::to_vec(&definition).map_err(io::Error::other);
        let text = text.map_err(failed("write", &path))?;
        files::replace(&path, &text, Flush::ToDisk, &disk)
    })
    .await?
}

/// Makes an empty file for one to come; one that is there stays.
///
/// # Errors
/// The file system refuses.
pub async fn reserve(path: &Path) -> Result<(), JournalError> {
    let path = path.to_owned();
    off_the_runtime(move || {
        make_directory(&path)?;
        let opened = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path);
        opened.map(drop).map_err(failed("make", &path))
    })
    .await?
}

/// Reads one that has come.
///
/// # Errors
/// It is not there, or not whole.
pub async fn read(path: &Path) -> Result<Definition, JournalError> {
    let path = path.to_owned();
    off_the_runtime(move || {
        let text = files::read(&path, MAX_BYTES).and_then(|text| {
            let missing = || Unread::NotNow("it is not there".to_owned());
            text.ok_or_else(missing)
        });
        let text = text.map_err(|why| failed("read", &path)(io::Error::other(why)))?;
        serde_json::from_slice(&text).map_err(|e| failed("read", &path)(io::Error::other(e)))
    })
    .await?
}

/// Removes one; one that is not there is no error.
///
/// # Errors
/// The file system refuses.
pub async fn remove(path: &Path) -> Result<(), JournalError> {
    let path = path.to_owned();
    off_the_runtime(move || files::remove(&path, Flush::ToDisk)).await?
}

fn make_directory(path: &Path) -> Result<(), JournalError> {
    let directory = path.parent().unwrap_or(path);
    let made = fs::create_dir_all(directory);
    made.map_err(failed("make", directory))
}

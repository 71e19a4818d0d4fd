//! Definitions on their way: written down by the source's agent, carried as one
//! more file, read by the destination's. So what is secret in them goes neither
//! over the broker nor into the conductor's record.

use std::{ffi::OsStr, fs, io, os::unix::fs::OpenOptionsExt, path::Path, str::FromStr};

use drover_model::ids::MigrationId;
use tracing::warn;

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

/// Definitions that stay although nothing is known of their migration: one may be
/// the last of a guest whose agent lost its state.
const MAX_STRAY: usize = 256;

/// Removes those of migrations that are over, and the oldest of very many of which
/// nothing is known. One that goes on is not asked about.
pub(crate) fn sweep(directory: &Path, is_over: impl Fn(MigrationId) -> Option<bool>) {
    let Ok(listing) = fs::read_dir(directory) else {
        // None was ever made.
        return;
    };
    let mut stray = Vec::new();
    for path in listing.flatten().map(|entry| entry.path()) {
        let stem = path.file_stem().and_then(OsStr::to_str).unwrap_or_default();
        let unfinished = path.extension().is_some_and(|e| e == "new");
        match MigrationId::from_str(stem).ok().map(&is_over) {
            _ if unfinished => drop(fs::remove_file(&path)),
            Some(Some(true)) => drop(files::remove(&path, Flush::ToDisk)),
            Some(None) => stray.push((fs::metadata(&path).and_then(|m| m.modified()).ok(), path)),
            Some(Some(false)) | None => {}
        }
    }
    stray.sort();
    let excess = stray.len().saturating_sub(MAX_STRAY);
    for (_, path) in stray.drain(..excess) {
        warn!(file = %path.display(), "the oldest of many definitions of which nothing is known is removed");
        drop(fs::remove_file(path));
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn definitions_of_what_is_over_go_and_strays_do_not_gather() {
        let dir = tempfile::tempdir().unwrap();
        let place = |id: MigrationId| dir.path().join(format!("{id}.json"));
        let (over, goes_on) = (MigrationId::generate(), MigrationId::generate());
        for id in [over, goes_on] {
            reserve(&place(id)).await.unwrap();
        }
        for _ in 0..MAX_STRAY + 10 {
            fs::write(place(MigrationId::generate()), "{}").unwrap();
        }
        fs::write(dir.path().join("half.new"), "{").unwrap();
        sweep(dir.path(), |id| match id {
            id if id == over => Some(true),
            id if id == goes_on => Some(false),
            _ => None,
        });
        assert!(!place(over).exists() && place(goes_on).exists());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), MAX_STRAY + 1);
    }
}

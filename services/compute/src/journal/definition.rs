//! Definitions on their way: written down by the source's agent, carried as one
//! more file, read by the destination's. So what is secret in them goes neither
//! over the broker nor into the conductor's record.

use std::{
    fs,
    io::{self, Read},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use super::{Flush, JournalError, failed, off_the_runtime, replace};
use crate::hypervisor::Definition;

/// Longest definition that is read, bytes.
const MAX_BYTES: u64 = 64 << 20;

/// Writes one down, readable for this process's user alone.
///
/// # Errors
/// The file system refuses.
pub async fn write(path: &Path, definition: &Definition) -> Result<(), JournalError> {
    let (path, definition) = (path.to_owned(), definition.clone());
    off_the_runtime(move || {
        make_directory(&path)?;
        let text = serde_json::to_vec(&definition).map_err(io::Error::other);
        let text = text.map_err(failed("write", &path))?;
        replace(&path, &text, Flush::ToDisk).map_err(failed("write", &path))
    })
    .await
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
    .await
}

/// Reads one that has come.
///
/// # Errors
/// It is not there, or not whole.
pub async fn read(path: &Path) -> Result<Definition, JournalError> {
    let path = path.to_owned();
    off_the_runtime(move || {
        let mut text = Vec::new();
        let file = fs::File::open(&path).map_err(failed("read", &path))?;
        let length = file.take(MAX_BYTES + 1).read_to_end(&mut text);
        if length.map_err(failed("read", &path))? as u64 > MAX_BYTES {
            let error = io::Error::other(format!("longer than {MAX_BYTES} bytes"));
            return Err(failed("read", &path)(error));
        }
        serde_json::from_slice(&text).map_err(|e| failed("read", &path)(io::Error::other(e)))
    })
    .await
}

/// Removes one; one that is not there is no error.
///
/// # Errors
/// The file system refuses.
pub async fn remove(path: &Path) -> Result<(), JournalError> {
    let path = path.to_owned();
    off_the_runtime(move || match fs::remove_file(&path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed("remove", &path)(e)),
        _ => Ok(()),
    })
    .await
}

fn make_directory(path: &Path) -> Result<(), JournalError> {
    let directory = path.parent().unwrap_or(path);
    let made = fs::create_dir_all(directory);
    made.map_err(failed("make", directory))
}

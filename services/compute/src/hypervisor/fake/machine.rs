//! Files of the machine on which the tests run: agents under test keep their
//! state in directories for temporary files, and carry some of it.

use std::{fs, io::ErrorKind, path::Path};

use drover_model::api::compute::FileFact;

use super::super::{HypervisorError, Result};

/// Free room that is told of the machine's file system, bytes.
const ROOM: u64 = 1 << 40;

/// Where files are in memory.
const MEMORY: &str = "/dev/shm";

/// Whether a path is the machine's.
pub(super) fn has(path: &str) -> bool {
    let path = Path::new(path);
    path.starts_with(std::env::temp_dir()) || path.starts_with(MEMORY)
}

fn failed(path: &str, error: &std::io::Error) -> HypervisorError {
    HypervisorError::Failed(format!("{path}: {error}"))
}

fn exists(path: &str) -> bool {
    fs::symlink_metadata(path).is_ok()
}

fn directory(path: &str) -> &Path {
    Path::new(path).parent().unwrap_or(Path::new("/"))
}

pub(super) fn fact(path: &str) -> FileFact {
    FileFact {
        path: path.to_owned(),
        exists: exists(path),
        directory_exists: directory(path).is_dir(),
        file_system: "machine".to_owned(),
        free_bytes: ROOM,
        length_bytes: fs::metadata(path).map_or(0, |m| m.len()),
        in_use: false,
    }
}

pub(super) fn reserve(path: &str, with_directory: bool) -> Result<()> {
    if with_directory {
        fs::create_dir_all(directory(path)).map_err(|e| failed(path, &e))?;
    }
    match fs::File::create_new(path) {
        Ok(_) => Ok(()),
        Err(e) if e.kind() == ErrorKind::AlreadyExists => {
            Err(HypervisorError::Exists(path.to_owned()))
        }
        Err(e) => Err(failed(path, &e)),
    }
}

pub(super) fn rename(from: &str, to: &str) -> Result<()> {
    match (exists(from), exists(to)) {
        (false, true) => Ok(()),
        (true, true) => Err(HypervisorError::Exists(to.to_owned())),
        _ => fs::rename(from, to).map_err(|e| failed(from, &e)),
    }
}

pub(super) fn remove(path: &str) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(failed(path, &e)),
        _ => Ok(()),
    }
}

pub(super) fn read(path: &str) -> std::result::Result<String, String> {
    fs::read_to_string(path).map_err(|e| e.to_string())
}

pub(super) fn write(path: &str, text: &str) -> std::result::Result<(), String> {
    fs::write(path, text).map_err(|e| e.to_string())
}

//! A guest's files as such: reserved for bytes to come, set aside and put back,
//! flushed, looked at.

use std::{
    fs::File,
    io::ErrorKind,
    os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use drover_model::{
    api::compute::FileFact,
    guest::{GuestFile, GuestFileKind},
    ids::InstanceId,
};

use super::{
    beneath, checked, directory, failed, image,
    sizes::{self, Sizes},
};
use crate::hypervisor::{HypervisorError, Result, libvirt::ffi};

/// Where libvirt keeps the state of emulated TPMs.
const TPM_STATE: &str = "/var/lib/libvirt/swtpm";
/// Files of one TPM's state; swtpm keeps a handful.
const MOST_TPM_FILES: usize = 64;

/// What this node says to a file of that path.
pub(in super::super) fn fact(path: &str, used: &[String]) -> Result<FileFact> {
    let checked_path = checked(path)?;
    let wanted = directory(&checked_path);
    // What is below the TPMs' directory is made as it is needed.
    let made = wanted.starts_with(TPM_STATE);
    let place = nearest(wanted, made);
    let room = place.as_ref().and_then(|p| ffi::room(p).ok());
    let sizes = match sizes::measure(&checked_path, "raw") {
        // Nothing that could have a length is there.
        Err(error) if beneath::is_nothing(&error) => Sizes::default(),
        measured => measured.map_err(|e| failed("measuring", &checked_path, &e))?,
    };
    Ok(FileFact {
        path: path.to_owned(),
        exists: !is_absent(&checked_path),
        directory_exists: place.is_some(),
        file_system: place.as_deref().map(file_system).unwrap_or_default(),
        free_bytes: room.map_or(0, |room| room.free_bytes),
        length_bytes: sizes.virtual_bytes,
        in_use: image::is_among(&checked_path, used) || is_claimed(&checked_path),
    })
}

/// Whether this machine itself uses a block device: it is mounted, swapped to, or part
/// of a volume group, an array, ….
fn is_claimed(path: &Path) -> bool {
    if !std::fs::metadata(path).is_ok_and(|m| m.file_type().is_block_device()) {
        return false;
    }
    let mut exclusively = std::fs::OpenOptions::new();
    exclusively
        .read(true)
        .custom_flags(libc::O_EXCL | libc::O_NONBLOCK);
    let opened = exclusively.open(path);
    opened.is_err_and(|e| e.kind() == ErrorKind::ResourceBusy)
}

fn nearest(wanted: &Path, made: bool) -> Option<PathBuf> {
    let mut at = wanted.to_path_buf();
    while !at.is_dir() {
        if !made || !at.pop() {
            return None;
        }
    }
    Some(at)
}

fn file_system(directory: &Path) -> String {
    std::fs::metadata(directory).map_or_else(|_| String::new(), |m| super::file_system(&m))
}

pub(in super::super) fn is_absent(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_err_and(|e| e.kind() == ErrorKind::NotFound)
}

/// The path by which a file is carried. Names of block devices are mostly links,
/// made by the administrator; of anything else a link is not followed.
pub(in super::super) fn opened_as(path: &str) -> PathBuf {
    let path = PathBuf::from(path);
    let is_device = std::fs::metadata(&path).is_ok_and(|m| m.file_type().is_block_device());
    match std::fs::canonicalize(&path) {
        Ok(device) if is_device => device,
        _ => path,
    }
}

/// Makes an empty file, exclusively.
pub(in super::super) fn reserve(
    path: &str,
    with_directory: bool,
    owner: Option<(u32, u32)>,
) -> Result<()> {
    let path = checked(path)?;
    if with_directory {
        let directory = directory(&path);
        std::fs::create_dir_all(directory).map_err(|e| failed("making", directory, &e))?;
    }
    let reserved = image::reserve(&path)?;
    reserved.keep(owner)?;
    super::sync_directory(&path);
    Ok(())
}

/// Renames within a directory, over nothing.
pub(in super::super) fn rename(from: &str, to: &str, used: &[String]) -> Result<()> {
    let (from, to) = (checked(from)?, checked(to)?);
    if directory(&from) != directory(&to) {
        return Err(HypervisorError::Failed(format!(
            "{} is not beside {}",
            to.display(),
            from.display()
        )));
    }
    if is_absent(&from) && !is_absent(&to) {
        return Ok(());
    }
    if let Some(file) = image::unused(&from, used)? {
        drop(file);
        // A link fails where something stands; a rename would replace it.
        match std::fs::hard_link(&from, &to) {
            // It was broken off between the two: the file has both names.
            Err(e) if e.kind() == ErrorKind::AlreadyExists && is_same(&from, &to) => {}
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {
                return Err(HypervisorError::Exists(to.display().to_string()));
            }
            linked => linked.map_err(|e| failed("renaming", &from, &e))?,
        }
        std::fs::remove_file(&from).map_err(|e| failed("renaming", &from, &e))?;
        super::sync_directory(&to);
        return Ok(());
    }
    Err(HypervisorError::Failed(format!(
        "{} is not here",
        from.display()
    )))
}

fn is_same(a: &Path, b: &Path) -> bool {
    let number = |path| {
        let metadata = std::fs::symlink_metadata(path).ok()?;
        Some((metadata.dev(), metadata.ino()))
    };
    number(a).is_some_and(|a| Some(a) == number(b))
}

/// Has bytes and length reach stable storage. It takes as long as the disk takes.
pub(in super::super) async fn flush(path: &str) -> Result<()> {
    let path = checked(path)?;
    let flushed = tokio::task::spawn_blocking(move || {
        let file = File::open(&path).map_err(|e| failed("opening", &path, &e))?;
        file.sync_all().map_err(|e| {
            // Whoever reads it next sees what the disk holds.
            let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
            failed("flushing", &path, &e)
        })?;
        super::sync_directory(&path);
        Ok(())
    });
    let died = |e: tokio::task::JoinError| Err(HypervisorError::Bug(e.to_string()));
    flushed.await.unwrap_or_else(died)
}

/// The files of an emulated TPM.
pub(in super::super) fn tpm_state(id: InstanceId) -> std::io::Result<Vec<GuestFile>> {
    let mut found = Vec::new();
    let mut left = vec![Path::new(TPM_STATE).join(id.to_string())];
    while let Some(directory) = left.pop() {
        let listing = match std::fs::read_dir(&directory) {
            Err(e) if e.kind() == ErrorKind::NotFound => continue,
            listing => listing?,
        };
        for entry in listing {
            let entry = entry?;
            let kind = entry.file_type()?;
            if kind.is_dir() {
                left.push(entry.path());
            } else if kind.is_file() && entry.file_name() != ".lock" {
                found.push(described(&entry.path(), GuestFileKind::Tpm));
            }
            if found.len() + left.len() > MOST_TPM_FILES {
                return Err(std::io::Error::other("more files than a TPM has"));
            }
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(found)
}

/// The firmware's variables, if their file is there: a guest that never ran has none.
pub(in super::super) fn nvram(path: &str) -> Option<GuestFile> {
    let path = checked(path).ok()?;
    path.is_file()
        .then(|| described(&path, GuestFileKind::Nvram))
}

fn described(path: &Path, kind: GuestFileKind) -> GuestFile {
    let sizes = sizes::measure(path, "raw").unwrap_or_default();
    GuestFile {
        path: path.display().to_string(),
        kind,
        allocated_bytes: sizes.allocated_bytes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_renamed_over_nothing_and_once() {
        let place = tempfile::tempdir().unwrap();
        let at = |name: &str| place.path().join(name).display().to_string();
        std::fs::write(at("a"), "bytes").unwrap();
        std::fs::write(at("b"), "others").unwrap();
        assert!(matches!(
            rename(&at("a"), &at("b"), &[]),
            Err(HypervisorError::Exists(_))
        ));
        assert!(
            rename(&at("a"), &at("c"), &[at("a")]).is_err(),
            "it is in use"
        );
        assert!(rename(&at("a"), "/tmp/c", &[]).is_err());
        rename(&at("a"), &at("c"), &[]).unwrap();
        rename(&at("a"), &at("c"), &[]).unwrap();
        assert_eq!(std::fs::read_to_string(at("c")).unwrap(), "bytes");
        assert!(rename(&at("x"), &at("y"), &[]).is_err());
    }

    #[test]
    fn a_rename_that_was_broken_off_is_ended() {
        let place = tempfile::tempdir().unwrap();
        let at = |name: &str| place.path().join(name).display().to_string();
        std::fs::write(at("a"), "bytes").unwrap();
        std::fs::hard_link(at("a"), at("b")).unwrap();
        rename(&at("a"), &at("b"), &[]).unwrap();
        assert!(is_absent(Path::new(&at("a"))));
        assert_eq!(std::fs::read_to_string(at("b")).unwrap(), "bytes");
    }

    #[test]
    fn a_file_is_reserved_where_nothing_is() {
        let place = tempfile::tempdir().unwrap();
        let at = |name: &str| place.path().join(name).display().to_string();
        reserve(&at("a"), false, None).unwrap();
        assert!(matches!(
            reserve(&at("a"), false, None),
            Err(HypervisorError::Exists(_))
        ));
        assert!(reserve(&at("d/a"), false, None).is_err());
        reserve(&at("d/a"), true, None).unwrap();
        let used = [at("d/a")];
        let facts = ["d/a", "d/b"].map(|name| fact(&at(name), &used).unwrap());
        assert!(facts[0].exists && facts[0].in_use);
        assert!(!facts[1].exists && !facts[1].in_use && facts[1].directory_exists);
    }
}

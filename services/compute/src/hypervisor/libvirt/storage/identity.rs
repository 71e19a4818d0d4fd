//! On which storage a file is, in words that another node can compare while this
//! one is dead: what the *identity file* of its directory holds, and the file's
//! number there.
//!
//! The identity file (`.drover-storage`, a random UUID) is written once, into
//! directories that hold a guest's files and no others, and never changed: two
//! nodes that read the same UUID see the same directory.

use std::{
    fs::{File, OpenOptions},
    io::{ErrorKind, Read, Write},
    os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use drover_model::api::compute::StorageIdentity;
use uuid::Uuid;

use super::{checked, directory, sync_directory};
use crate::hypervisor::StorageFact;

/// Name of the identity file.
const NAME: &str = ".drover-storage";
/// Length of a UUID as text, bytes.
const LENGTH: u64 = 36;

/// On which storage a file is. Leaves the identity file if there is none yet.
pub(in super::super) fn of(path: &str) -> StorageIdentity {
    let identity = file(path).and_then(|file| {
        leave(&file)?;
        read(&file)
    });
    StorageIdentity {
        path: path.to_owned(),
        error: identity.as_ref().err().cloned(),
        identity: identity.ok(),
    }
}

/// Whether another node's file is the same here. Writes nothing.
pub(in super::super) fn compare(theirs: &StorageIdentity) -> StorageFact {
    let same = match &theirs.identity {
        None => Err(theirs.error.clone().unwrap_or_else(|| "unknown".to_owned())),
        Some(identity) => match file(&theirs.path).and_then(|file| read(&file)) {
            Ok(own) if own == *identity => Ok(()),
            Ok(_) => Err("another file is there".to_owned()),
            Err(words) => Err(words),
        },
    };
    StorageFact {
        path: theirs.path.clone(),
        same,
    }
}

/// Where the file really is, if it is one.
fn file(path: &str) -> Result<PathBuf, String> {
    let path = checked(path).map_err(|e| e.to_string())?;
    let real = std::fs::canonicalize(&path).map_err(|e| e.to_string())?;
    let kind = std::fs::metadata(&real).map_err(|e| e.to_string())?;
    if kind.file_type().is_block_device() {
        return Err("a block device cannot be told from another node's".to_owned());
    }
    match kind.is_file() {
        true => Ok(real),
        false => Err("it is no file".to_owned()),
    }
}

fn read(file: &Path) -> Result<String, String> {
    let name = directory(file).join(NAME);
    let words = |e: std::io::Error| format!("{}: {e}", name.display());
    let uuid = content(&name).map_err(words)?;
    let number = std::fs::metadata(file).map_err(|e| e.to_string())?.ino();
    Ok(format!("{uuid}:{number}"))
}

fn content(name: &Path) -> std::io::Result<Uuid> {
    let file = OpenOptions::new()
        .read(true)
        // Neither a link nor a pipe that somebody put there may mislead or hang us.
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(name)?;
    let mut text = String::new();
    file.take(LENGTH).read_to_string(&mut text)?;
    text.parse()
        .map_err(|_| std::io::Error::other("it holds no UUID; remove it"))
}

/// Leaves the identity file beside a file. It appears whole or not at all, and
/// whoever is first wins, on whichever node.
fn leave(file: &Path) -> Result<(), String> {
    let name = directory(file).join(NAME);
    if std::fs::symlink_metadata(&name).is_ok() {
        return Ok(());
    }
    let uuid = Uuid::new_v4();
    let beside = directory(file).join(format!("{NAME}-{uuid}"));
    let written = write(&beside, uuid).and_then(|()| match std::fs::hard_link(&beside, &name) {
        Err(e) if e.kind() != ErrorKind::AlreadyExists => Err(e),
        _ => Ok(()),
    });
    // One that is left behind harms nobody.
    drop(std::fs::remove_file(&beside));
    written.map_err(|e| format!("{} cannot be made: {e}", name.display()))?;
    sync_directory(&name);
    Ok(())
}

fn write(path: &Path, uuid: Uuid) -> std::io::Result<()> {
    let mut file: File = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o644)
        .open(path)?;
    writeln!(file, "{uuid}")?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place() -> (tempfile::TempDir, String) {
        let place = tempfile::tempdir().unwrap();
        let disk = place.path().join("a.img").display().to_string();
        std::fs::write(&disk, "bytes").unwrap();
        (place, disk)
    }

    #[test]
    fn the_same_file_is_known_again_and_another_is_not() {
        let (place, disk) = place();
        let identity = of(&disk);
        assert_eq!(identity.error, None);
        assert_eq!(identity, of(&disk), "asked twice it is the same");
        assert_eq!(compare(&identity).same, Ok(()));
        let names: Vec<_> = std::fs::read_dir(place.path()).unwrap().collect();
        assert_eq!(names.len(), 2, "one identity file: {names:?}");
        // Replaced by another of that name.
        let other = place.path().join("b.img");
        std::fs::write(&other, "others").unwrap();
        std::fs::rename(&other, &disk).unwrap();
        assert!(compare(&identity).same.is_err());
        std::fs::remove_file(&disk).unwrap();
        assert!(compare(&identity).same.is_err());
    }

    #[test]
    fn a_link_is_what_it_leads_to() {
        let (_there, disk) = place();
        let (here, _) = place();
        let link = here.path().join("link.img").display().to_string();
        std::os::unix::fs::symlink(&disk, &link).unwrap();
        assert_eq!(of(&link).identity, of(&disk).identity);
    }

    #[test]
    fn comparing_writes_nothing() {
        let (place, disk) = place();
        let theirs = StorageIdentity {
            path: disk,
            identity: Some("x:1".to_owned()),
            error: None,
        };
        assert!(compare(&theirs).same.is_err());
        assert!(!place.path().join(NAME).exists());
    }

    #[test]
    fn what_cannot_be_identified_says_why() {
        for path in ["/dev/null", "/nonexistent/a.img", "relative"] {
            let identity = of(path);
            assert!(
                identity.identity.is_none() && identity.error.is_some(),
                "{path}"
            );
            assert!(compare(&identity).same.is_err());
        }
    }
}

//! Marks: small files that a source leaves beside its disks and what lies under
//! them. A destination that finds one with the same content sees the same directory.
//!
//! A file that is a link to another directory has its mark there: the directory of
//! the link says nothing about what it leads to.

use std::{
    collections::BTreeSet,
    fs::{File, OpenOptions},
    io::{ErrorKind, Read, Write},
    os::unix::fs::{FileTypeExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use drover_model::{
    api::compute::Mark,
    guest::{Disk, DiskSource},
    ids::MigrationId,
};
use uuid::Uuid;

use super::{checked, directory, failed};
use crate::hypervisor::{HypervisorError, Result};

/// How a mark's name begins; the migration's UUID follows.
const PREFIX: &str = ".drover-mark-";
/// Longest mark that is read, bytes.
const LONGEST_MARK: u64 = 200;

/// Leaves a mark in the directory of each local disk and of each image under one.
/// What goes wrong with one is told in it and hinders no other.
pub(in super::super) fn leave(migration: MigrationId, disks: &[Disk]) -> Vec<Mark> {
    let mut marks = Vec::new();
    for directory in directories(disks) {
        let path = directory.join(format!("{PREFIX}{migration}"));
        let written = write(&path, migration);
        let (path, content, error) = match written {
            Ok(content) => (Some(path.display().to_string()), content, None),
            Err(error) => (None, String::new(), Some(error.to_string())),
        };
        marks.push(Mark {
            directory: directory.display().to_string(),
            path,
            content,
            error,
        });
    }
    marks.extend(block_devices(disks).map(|directory| Mark {
        directory,
        path: None,
        content: String::new(),
        error: Some("no mark can be left beside a block device".to_owned()),
    }));
    marks
}

fn directories(disks: &[Disk]) -> BTreeSet<PathBuf> {
    let tops = disks.iter().filter_map(|disk| match &disk.source {
        DiskSource::File { path } => checked(path).ok(),
        _ => None,
    });
    let images = disks.iter().flat_map(|disk| &disk.backing);
    let images = images.filter_map(|image| checked(&image.path).ok());
    let files = tops.chain(images.filter(|path| !is_device(path)));
    files.map(|path| place_of(&path)).collect()
}

fn is_device(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|m| m.file_type().is_block_device())
}

/// The directory that a file is in: its own name's, unless that is a link.
fn place_of(path: &Path) -> PathBuf {
    let is_link = std::fs::symlink_metadata(path).is_ok_and(|m| m.is_symlink());
    let leads_to = is_link.then(|| std::fs::canonicalize(path).ok()).flatten();
    directory(leads_to.as_deref().unwrap_or(path)).to_path_buf()
}

/// Whether one of these marks lies beside a file here.
pub(in super::super) fn is_beside(path: &Path, marks: &[Mark]) -> bool {
    let place = place_of(path).display().to_string();
    let mut of_place = marks.iter().filter(|mark| mark.directory == place);
    of_place.any(is_seen)
}

fn block_devices(disks: &[Disk]) -> impl Iterator<Item = String> {
    let devices: BTreeSet<String> = disks
        .iter()
        .filter_map(|disk| match &disk.source {
            DiskSource::Block { path } => checked(path).ok(),
            _ => None,
        })
        .map(|path| directory(&path).display().to_string())
        .collect();
    devices.into_iter()
}

/// Writes the mark, or reads back the one an earlier call left.
fn write(path: &Path, migration: MigrationId) -> std::io::Result<String> {
    let content = format!("drover {migration} {}\n", Uuid::new_v4());
    let made = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o644)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path);
    match made {
        Ok(mut file) => {
            // A mark must be on storage, not in this node's memory, to be seen elsewhere.
            file.write_all(content.as_bytes())?;
            file.sync_all()?;
            Ok(content)
        }
        Err(error) if error.kind() == ErrorKind::AlreadyExists => match read(path)? {
            old if old.starts_with("drover ") && old.ends_with('\n') => Ok(old),
            // A write that broke off: nobody has been told of it yet.
            _ => {
                std::fs::remove_file(path)?;
                write_again(path, &content)
            }
        },
        Err(error) => Err(error),
    }
}

fn write_again(path: &Path, content: &str) -> std::io::Result<String> {
    let mut file = File::create_new(path)?;
    file.write_all(content.as_bytes())?;
    file.sync_all()?;
    Ok(content.to_owned())
}

/// Reads a mark: a plain file only, and not much of it.
fn read(path: &Path) -> std::io::Result<String> {
    let file = OpenOptions::new()
        .read(true)
        // Neither a link nor a pipe that somebody put there may mislead or hang us.
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)?;
    if !file.metadata()?.is_file() {
        return Err(std::io::Error::other("it is no plain file"));
    }
    let mut content = String::new();
    file.take(LONGEST_MARK).read_to_string(&mut content)?;
    Ok(content)
}

/// Removes marks; those already gone are no error.
pub(in super::super) fn remove(marks: &[Mark]) -> Result<()> {
    let paths = marks.iter().filter_map(|mark| mark.path.as_deref());
    let errors: Vec<String> = paths
        .filter_map(|path| remove_one(path).err())
        .map(|error| error.to_string())
        .collect();
    if errors.is_empty() {
        Ok(())
    } else {
        Err(HypervisorError::Failed(errors.join("; ")))
    }
}

fn remove_one(path: &str) -> Result<()> {
    let path = checked(path)?;
    let name = path.file_name().and_then(|name| name.to_str());
    let migration = name.and_then(|name| name.strip_prefix(PREFIX));
    if migration
        .and_then(|text| text.parse::<MigrationId>().ok())
        .is_none()
    {
        let shown = path.display();
        return Err(HypervisorError::Failed(format!("{shown} is no mark")));
    }
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(failed("removing mark", &path, &error))
        }
        _ => Ok(()),
    }
}

fn is_seen(mark: &Mark) -> bool {
    let Some(path) = mark.path.as_deref().and_then(|path| checked(path).ok()) else {
        return false;
    };
    directory(&path) == Path::new(&mark.directory)
        && !mark.content.is_empty()
        && read(&path).is_ok_and(|content| content == mark.content)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(path: &str) -> Disk {
        Disk {
            target: "vda".to_owned(),
            device: "disk".to_owned(),
            source: DiskSource::File {
                path: path.to_owned(),
            },
            format: "raw".to_owned(),
            cache: None,
            read_only: false,
            shareable: false,
            virtual_bytes: 0,
            allocated_bytes: 0,
            backing: Vec::new(),
        }
    }

    #[test]
    fn a_mark_is_left_once_seen_and_removed() {
        let place = tempfile::tempdir().unwrap();
        let place = place.path().to_str().unwrap().to_owned();
        let disks = [
            disk(&format!("{place}/a.img")),
            disk(&format!("{place}/b.img")),
        ];
        let migration = MigrationId::generate();
        let marks = leave(migration, &disks);
        assert_eq!(marks.len(), 1, "one directory, one mark");
        assert_eq!(marks, leave(migration, &disks), "asking twice leaves one");
        assert!(is_beside(Path::new(&format!("{place}/a.img")), &marks));

        let mut forged = marks.clone();
        forged[0].content = "something else".to_owned();
        assert!(!is_beside(Path::new(&format!("{place}/a.img")), &forged));

        remove(&marks).unwrap();
        remove(&marks).unwrap();
        assert!(!is_beside(Path::new(&format!("{place}/a.img")), &marks));
    }

    #[test]
    fn a_directory_that_cannot_be_written_is_told() {
        let marks = leave(MigrationId::generate(), &[disk("/nonexistent/a.img")]);
        assert!(marks[0].path.is_none());
        assert!(marks[0].error.is_some());
        remove(&marks).unwrap();
    }

    #[test]
    fn only_marks_are_removed_and_links_are_not_followed() {
        let place = tempfile::tempdir().unwrap();
        let victim = place.path().join("disk.img");
        std::fs::write(&victim, "bytes").unwrap();
        let mark = |path: &Path| Mark {
            directory: place.path().display().to_string(),
            path: Some(path.display().to_string()),
            content: "bytes".to_owned(),
            error: None,
        };
        assert!(remove(&[mark(&victim)]).is_err());
        let link = place
            .path()
            .join(format!("{PREFIX}{}", MigrationId::generate()));
        std::os::unix::fs::symlink(&victim, &link).unwrap();
        assert!(!is_beside(&victim, &[mark(&link)]));
        remove(&[mark(&link)]).unwrap();
        assert!(victim.exists());
    }

    #[test]
    fn a_link_has_its_mark_where_it_leads() {
        let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let target = there.path().join("base.img");
        std::fs::write(&target, "bytes").unwrap();
        let link = here.path().join("base.img");
        std::os::unix::fs::symlink(&target, &link).unwrap();
        let plain = here.path().join("a.img");
        let mut over = disk(plain.to_str().unwrap());
        over.backing.push(drover_model::guest::BackingImage {
            path: link.display().to_string(),
            format: "raw".to_owned(),
            allocated_bytes: 0,
        });
        let marks = leave(MigrationId::generate(), &[over]);
        assert_eq!(
            marks.len(),
            2,
            "of the disk and of what lies under it: {marks:?}"
        );
        assert!(is_beside(&plain, &marks) && is_beside(&link, &marks));
        // Another node's link of that name leads elsewhere.
        let elsewhere = tempfile::tempdir().unwrap();
        std::fs::write(elsewhere.path().join("base.img"), "others").unwrap();
        std::fs::remove_file(&link).unwrap();
        std::os::unix::fs::symlink(elsewhere.path().join("base.img"), &link).unwrap();
        assert!(!is_beside(&link, &marks));
        remove(&marks).unwrap();
    }
}

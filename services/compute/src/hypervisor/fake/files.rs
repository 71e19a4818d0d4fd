//! What callers do to a node's files: marks, disks made and removed, files
//! reserved and renamed.

use std::collections::BTreeMap;

use drover_model::{
    api::compute::{FileFact, Mark},
    guest::{Disk, Guest},
    ids::{HostName, MigrationId},
};

use super::{
    super::{HypervisorError, Result},
    answers::TPM_STATE,
    machine,
    node::Domain,
    storage::{Content, EMPTY_IMAGE_BYTES, File, directory_of, is_device},
    world::World,
};

fn failed<T>(words: impl Into<String>) -> Result<T> {
    Err(HypervisorError::Failed(words.into()))
}

fn left_alone(path: &str, why: &str) -> Result<()> {
    let words = format!("{path} is left alone: {why}");
    Err(HypervisorError::WrongState(words))
}

/// How long a disk's file is when so much of it is in use.
fn length_of(disk: &Disk, allocated_bytes: u64) -> u64 {
    let path = disk.local_path().unwrap_or_default();
    if disk.format == "raw" || is_device(path) {
        disk.virtual_bytes
    } else {
        allocated_bytes
    }
}

/// Whether a path is one of a guest's files, whatever they are to it.
pub(super) fn uses(guest: &Guest, path: &str) -> bool {
    let of_disk = |disk: &Disk| {
        disk.local_path() == Some(path) || disk.backing.iter().any(|b| b.path == path)
    };
    guest.disks.iter().any(of_disk) || guest.files.iter().any(|f| f.path == path)
}

impl World {
    pub(super) fn leave_marks(
        &mut self,
        host: &HostName,
        migration: MigrationId,
        disks: &[Disk],
    ) -> Vec<Mark> {
        let mut directories: Vec<&str> = disks
            .iter()
            .filter_map(Disk::local_path)
            .map(directory_of)
            .collect();
        directories.sort_unstable();
        directories.dedup();
        directories
            .into_iter()
            .map(|directory| self.leave_mark(host, migration, directory))
            .collect()
    }

    fn leave_mark(&mut self, host: &HostName, migration: MigrationId, directory: &str) -> Mark {
        let path = format!("{}/.drover-{migration}", directory.trim_end_matches('/'));
        let content = format!("{migration} from {host}");
        let file = File::dense(Content::Text(content.clone()), 4096);
        let there = self.storage.file(host, &path) == Some(&file);
        let written = if there {
            Ok(())
        } else {
            self.storage.create(host, &path, file)
        };
        Mark {
            directory: directory.to_owned(),
            path: written.is_ok().then_some(path),
            content,
            error: written.err(),
        }
    }

    pub(super) fn remove_marks(&mut self, host: &HostName, marks: &[Mark]) {
        for mark in marks {
            // Only what is that mark: a path alone is no licence to remove.
            if let Some(path) = mark.path.as_ref().filter(|_| self.sees_mark(host, mark)) {
                self.storage.remove(host, path);
            }
        }
    }

    pub(super) fn create_disk(&mut self, host: &HostName, disk: &Disk, inode: u64) -> Result<()> {
        let Some(path) = disk.local_path() else {
            return failed(format!("disk {} has no file", disk.target));
        };
        if let Some(missing) = self.missing_backing(host, disk).first() {
            return failed(format!("{missing}: No such file or directory"));
        }
        self.check_unused(host, path)?;
        let is_reserved = self.inode(host, path) == inode;
        let Some(file) = self.storage.file_mut(host, path) else {
            return failed(format!("{path}: No such file or directory"));
        };
        if !is_reserved || file.content != Content::Empty {
            return Err(HypervisorError::Exists(path.to_owned()));
        }
        *file = File {
            length_bytes: length_of(disk, EMPTY_IMAGE_BYTES),
            ..File::dense(Content::Empty, EMPTY_IMAGE_BYTES)
        };
        Ok(())
    }

    pub(super) fn remove_disk(&mut self, host: &HostName, path: &str) -> Result<()> {
        if machine::has(path) {
            return machine::remove(path);
        }
        if self.storage.file(host, path).is_none() {
            return Ok(());
        }
        self.check_movable(host, path)?;
        self.storage.remove(host, path);
        Ok(())
    }

    fn check_unused(&self, host: &HostName, path: &str) -> Result<()> {
        let mut domains = self.node(host).domains.values();
        let copies_to = |d: &Domain| d.mirrors.values().any(|job| job.to == path);
        match domains.find(|d| d.both().any(|guest| uses(guest, path)) || copies_to(d)) {
            Some(user) => left_alone(path, &format!("{} uses it", user.guest.name)),
            None => Ok(()),
        }
    }

    /// The same of what shall get another name, or go.
    fn check_movable(&self, host: &HostName, path: &str) -> Result<()> {
        if is_device(path) {
            return left_alone(path, "it is no plain file");
        }
        self.check_unused(host, path)
    }

    pub(super) fn file_fact(&self, host: &HostName, path: &str) -> FileFact {
        if machine::has(path) {
            return machine::fact(path);
        }
        let directory = directory_of(path);
        let volume = self.storage.volume_at(host, directory);
        let file = self.storage.file(host, path);
        FileFact {
            path: path.to_owned(),
            exists: file.is_some(),
            // What is below the TPMs' directory is made as it is needed.
            directory_exists: self.storage.has_directory(host, directory)
                || path.starts_with(TPM_STATE),
            file_system: volume.map_or_else(String::new, |v| v.name.clone()),
            free_bytes: volume.map_or(0, |v| v.free_bytes()),
            length_bytes: file.map_or(0, |f| f.length_bytes),
            in_use: self.check_unused(host, path).is_err(),
        }
    }

    pub(super) fn reserve_file(
        &mut self,
        host: &HostName,
        path: &str,
        with_directory: bool,
    ) -> Result<()> {
        if machine::has(path) {
            return machine::reserve(path, with_directory);
        }
        if self.storage.file(host, path).is_some() {
            return Err(HypervisorError::Exists(path.to_owned()));
        }
        if with_directory {
            self.storage.make_directory(host, directory_of(path));
        }
        let file = File::dense(Content::Empty, 0);
        self.storage
            .create(host, path, file)
            .map_err(HypervisorError::Failed)
    }

    pub(super) fn rename_file(&mut self, host: &HostName, from: &str, to: &str) -> Result<()> {
        if directory_of(from) != directory_of(to) {
            return failed(format!("{to} is not beside {from}"));
        }
        if machine::has(from) {
            return machine::rename(from, to);
        }
        let there = |path| self.storage.file(host, path).is_some();
        match (there(from), there(to)) {
            (false, true) => Ok(()),
            (false, false) => failed(format!("{from}: No such file or directory")),
            (true, taken) => {
                self.check_movable(host, from)?;
                if taken {
                    return Err(HypervisorError::Exists(to.to_owned()));
                }
                if let Some(words) = self.storage.denies(host, from) {
                    return failed(words);
                }
                self.storage.rename(host, from, to);
                Ok(())
            }
        }
    }

    pub(super) fn flush_file(&self, host: &HostName, path: &str) -> Result<()> {
        let there = machine::has(path) && machine::fact(path).exists;
        if there || self.storage.file(host, path).is_some() {
            return Ok(());
        }
        failed(format!("opening {path}: No such file or directory"))
    }

    /// Makes the files beside a guest's disks, and says what they ought to hold.
    pub(super) fn make_files(&mut self, host: &HostName, guest: &Guest) -> BTreeMap<String, u64> {
        let mut tokens = BTreeMap::new();
        for file in &guest.files {
            let token = self.rng.u64(1..);
            let content = Content::Disk {
                token,
                written: std::time::Duration::ZERO,
            };
            let made = File::dense(content, file.allocated_bytes);
            self.put_file(host, &file.path, made);
            tokens.insert(file.path.clone(), token);
        }
        tokens
    }

    pub(super) fn make_disks(&mut self, host: &HostName, guest: &Guest) -> BTreeMap<String, u64> {
        let mut tokens = BTreeMap::new();
        for disk in &guest.disks {
            let Some(path) = disk.local_path() else {
                continue;
            };
            for image in &disk.backing {
                let content = Content::Text("base image".to_owned());
                let file = File::dense(content, image.allocated_bytes);
                self.put_file(host, &image.path, file);
            }
            let token = self.rng.u64(1..);
            let content = Content::Disk {
                token,
                written: std::time::Duration::ZERO,
            };
            let file = File {
                length_bytes: length_of(disk, disk.allocated_bytes),
                ..File::dense(content, disk.allocated_bytes)
            };
            self.put_file(host, path, file);
            if !disk.read_only && !disk.shareable {
                tokens.insert(disk.target.clone(), token);
            }
        }
        tokens
    }

    /// Writes a file if nothing is there, and its directory.
    pub(super) fn put_file(&mut self, host: &HostName, path: &str, file: File) {
        self.storage.make_directory(host, directory_of(path));
        // What is there already is what the test put there.
        let _ = self.storage.create(host, path, file);
    }
}

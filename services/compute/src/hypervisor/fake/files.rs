//! What callers do to a node's files: marks, and disks made and removed.

use std::collections::BTreeMap;

use drover_model::{
    api::compute::Mark,
    guest::{Disk, Guest},
    ids::{HostName, MigrationId},
};

use super::{
    super::{HypervisorError, Result},
    node::Domain,
    storage::{Content, EMPTY_IMAGE_BYTES, File, directory_of},
    world::World,
};

fn failed<T>(words: impl Into<String>) -> Result<T> {
    Err(HypervisorError::Failed(words.into()))
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
        let file = File {
            content: Content::Text(content.clone()),
            allocated_bytes: 4096,
        };
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

    pub(super) fn create_disk(&mut self, host: &HostName, disk: &Disk) -> Result<()> {
        let Some(path) = disk.local_path() else {
            return failed(format!("disk {} has no file", disk.target));
        };
        if self.storage.file(host, path).is_some() {
            return Err(HypervisorError::Exists(path.to_owned()));
        }
        if let Some(missing) = self.missing_backing(host, disk).first() {
            return failed(format!("{missing}: No such file or directory"));
        }
        let file = File {
            content: Content::Empty,
            allocated_bytes: EMPTY_IMAGE_BYTES,
        };
        self.storage
            .create(host, path, file)
            .map_err(HypervisorError::Failed)
    }

    pub(super) fn remove_disk(&mut self, host: &HostName, path: &str) -> Result<()> {
        let uses = |d: &&Domain| {
            let mut disks = d.guest.disks.iter();
            disks.any(|disk| {
                disk.local_path() == Some(path) || disk.backing.iter().any(|b| b.path == path)
            })
        };
        if let Some(user) = self.node(host).domains.values().find(uses) {
            return failed(format!("{path} is used by {}", user.guest.name));
        }
        self.storage.remove(host, path);
        Ok(())
    }

    pub(super) fn make_disks(&mut self, host: &HostName, guest: &Guest) -> BTreeMap<String, u64> {
        let mut tokens = BTreeMap::new();
        for disk in &guest.disks {
            let Some(path) = disk.local_path() else {
                continue;
            };
            for image in &disk.backing {
                let file = File {
                    content: Content::Text("base image".to_owned()),
                    allocated_bytes: 0,
                };
                self.put_file(host, &image.path, file);
            }
            let token = self.rng.u64(1..);
            let file = File {
                content: Content::Disk {
                    token,
                    written: std::time::Duration::ZERO,
                },
                allocated_bytes: disk.allocated_bytes,
            };
            self.put_file(host, path, file);
            if !disk.read_only && !disk.shareable {
                tokens.insert(disk.target.clone(), token);
            }
        }
        tokens
    }

    /// Writes a file if nothing is there, and its directory.
    fn put_file(&mut self, host: &HostName, path: &str, file: File) {
        self.storage.make_directory(host, directory_of(path));
        // What is there already is what the test put there.
        let _ = self.storage.create(host, path, file);
    }
}

//! The nodes' file systems: volumes with files and directories, and which node
//! sees which volume where. Contents are tokens, so that it can be told whose
//! bytes a file holds and how recent they are.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use drover_model::ids::HostName;

/// Room an empty image takes, bytes (a qcow2 header and its tables).
pub(super) const EMPTY_IMAGE_BYTES: u64 = 200 * 1024;

/// What a file holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// A disk nobody has written to.
    Empty,
    /// A guest's disk.
    Disk {
        /// Whose and which: drawn when the guest was made.
        token: u64,
        /// The guest's counter at its last write.
        written: Duration,
    },
    /// Text (a mark, a base image).
    Text(String),
    /// The first bytes of something that is on its way here.
    Partial {
        /// Of what.
        of: Box<Content>,
        /// How many.
        bytes: u64,
    },
}

/// A file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct File {
    /// What it holds.
    pub content: Content,
    /// Room it takes, bytes.
    pub allocated_bytes: u64,
    /// How long it is, bytes.
    pub length_bytes: u64,
}

impl File {
    /// One without holes.
    pub(super) fn dense(content: Content, bytes: u64) -> Self {
        Self {
            content,
            allocated_bytes: bytes,
            length_bytes: bytes,
        }
    }
}

/// Whether a path names a device: there whatever is on it, and as long as it is.
pub(super) fn is_device(path: &str) -> bool {
    path.starts_with("/dev/")
}

/// A file system.
#[derive(Debug)]
pub(super) struct Volume {
    /// Its name, the same wherever it is seen.
    pub(super) name: String,
    capacity_bytes: u64,
    files: BTreeMap<String, File>,
    directories: BTreeSet<String>,
}

impl Volume {
    /// Free room, bytes.
    pub(super) fn free_bytes(&self) -> u64 {
        let used: u64 = self.files.values().map(|f| f.allocated_bytes).sum();
        self.capacity_bytes.saturating_sub(used)
    }

    /// Size, bytes.
    pub(super) fn capacity_bytes(&self) -> u64 {
        self.capacity_bytes
    }

    /// Its files.
    pub(super) fn files(&self) -> impl Iterator<Item = (&str, &File)> {
        self.files.iter().map(|(path, file)| (path.as_str(), file))
    }
}

/// All volumes, and who sees them.
#[derive(Debug, Default)]
pub(super) struct Storage {
    volumes: Vec<Volume>,
    /// Per node: where a volume is mounted.
    mounts: BTreeMap<HostName, Vec<(String, usize)>>,
    /// Directories a node cannot write to.
    unwritable: BTreeSet<(HostName, String)>,
}

/// The directory a path lies in.
pub(super) fn directory_of(path: &str) -> &str {
    match path.rfind('/') {
        Some(0) | None => "/",
        Some(end) => &path[..end],
    }
}

fn lies_under(path: &str, directory: &str) -> bool {
    directory == "/"
        || path == directory
        || path
            .strip_prefix(directory)
            .is_some_and(|rest| rest.starts_with('/'))
}

impl Storage {
    /// A new volume, seen at `directory` by all of `nodes`.
    pub(super) fn mount(
        &mut self,
        name: &str,
        directory: &str,
        nodes: &[HostName],
        capacity_bytes: u64,
    ) {
        self.volumes.push(Volume {
            name: name.to_owned(),
            capacity_bytes,
            files: BTreeMap::new(),
            directories: BTreeSet::from([directory.to_owned()]),
        });
        let volume = self.volumes.len() - 1;
        for node in nodes {
            self.mounts
                .entry(node.clone())
                .or_default()
                .push((directory.to_owned(), volume));
        }
    }

    /// Has one more node, or one less, see a volume there.
    pub(super) fn set_mounted(
        &mut self,
        name: &str,
        directory: &str,
        node: &HostName,
        mounted: bool,
    ) {
        let mounts = self.mounts.entry(node.clone()).or_default();
        mounts.retain(|(at, _)| at != directory);
        let volume = self.volumes.iter().position(|v| v.name == name);
        mounts.extend(
            volume
                .filter(|_| mounted)
                .map(|v| (directory.to_owned(), v)),
        );
    }

    /// Which volume a path of a node lies on: that of the longest mount over it.
    fn index_at(&self, node: &HostName, path: &str) -> Option<usize> {
        self.mounts
            .get(node)?
            .iter()
            .filter(|(directory, _)| lies_under(path, directory))
            .max_by_key(|(directory, _)| directory.len())
            .map(|(_, volume)| *volume)
    }

    /// The volume a path of a node lies on.
    pub(super) fn volume_at(&self, node: &HostName, path: &str) -> Option<&Volume> {
        self.index_at(node, path).map(|i| &self.volumes[i])
    }

    /// Whether a path is the same file from both nodes.
    pub(super) fn is_shared(&self, path: &str, a: &HostName, b: &HostName) -> bool {
        let at = self.index_at(a, path);
        at.is_some() && at == self.index_at(b, path)
    }

    /// A file as a node sees it.
    pub(super) fn file(&self, node: &HostName, path: &str) -> Option<&File> {
        self.volume_at(node, path)?.files.get(path)
    }

    /// The files that a node has below a directory.
    pub(super) fn paths_under(&self, node: &HostName, directory: &str) -> Vec<String> {
        let files = self.volume_at(node, directory).map(|volume| &volume.files);
        let paths = files.into_iter().flat_map(BTreeMap::keys);
        let below = paths.filter(|path| lies_under(path, directory));
        below.cloned().collect()
    }

    /// A file as a node sees it, to be changed.
    pub(super) fn file_mut(&mut self, node: &HostName, path: &str) -> Option<&mut File> {
        let volume = self.index_at(node, path)?;
        self.volumes[volume].files.get_mut(path)
    }

    /// Whether a node has that directory.
    pub(super) fn has_directory(&self, node: &HostName, directory: &str) -> bool {
        self.volume_at(node, directory)
            .is_some_and(|v| v.directories.iter().any(|d| lies_under(d, directory)))
    }

    /// Makes a directory.
    pub(super) fn make_directory(&mut self, node: &HostName, directory: &str) {
        if let Some(volume) = self.index_at(node, directory) {
            self.volumes[volume]
                .directories
                .insert(directory.to_owned());
        }
    }

    /// Takes a directory away, and what is in it.
    pub(super) fn remove_directory(&mut self, node: &HostName, directory: &str) {
        if let Some(volume) = self.index_at(node, directory) {
            let volume = &mut self.volumes[volume];
            volume.directories.retain(|d| !lies_under(d, directory));
            volume.files.retain(|path, _| !lies_under(path, directory));
        }
    }

    /// Lets a node write to a directory, or not.
    pub(super) fn set_writable(&mut self, node: &HostName, directory: &str, writable: bool) {
        let key = (node.clone(), directory.to_owned());
        if writable {
            self.unwritable.remove(&key);
        } else {
            self.unwritable.insert(key);
        }
    }

    /// Why a node may not write to a path's directory, if it may not.
    pub(super) fn denies(&self, node: &HostName, path: &str) -> Option<String> {
        let key = (node.clone(), directory_of(path).to_owned());
        let denied = self.unwritable.contains(&key);
        denied.then(|| format!("{path}: Permission denied"))
    }

    /// Writes a new file, or says in words why not.
    pub(super) fn create(&mut self, node: &HostName, path: &str, file: File) -> Result<(), String> {
        let directory = directory_of(path);
        if !self.has_directory(node, directory) {
            return Err(format!("{path}: No such file or directory"));
        }
        if let Some(words) = self.denies(node, path) {
            return Err(words);
        }
        let Some(index) = self.index_at(node, path) else {
            return Err(format!("{path}: No such file or directory"));
        };
        let volume = &mut self.volumes[index];
        if volume.files.contains_key(path) {
            return Err(format!("{path}: File exists"));
        }
        if volume.free_bytes() < file.allocated_bytes {
            return Err(format!("{path}: No space left on device"));
        }
        volume.files.insert(path.to_owned(), file);
        Ok(())
    }

    /// Gives a file another name in its directory. Both are known to be right.
    pub(super) fn rename(&mut self, node: &HostName, from: &str, to: &str) {
        if let Some(index) = self.index_at(node, from) {
            let files = &mut self.volumes[index].files;
            if let Some(file) = files.remove(from) {
                files.insert(to.to_owned(), file);
            }
        }
    }

    /// Removes a file; false if there was none.
    pub(super) fn remove(&mut self, node: &HostName, path: &str) -> bool {
        match self.index_at(node, path) {
            Some(volume) => self.volumes[volume].files.remove(path).is_some(),
            None => false,
        }
    }

    /// Sets the size of the volume that a path of a node lies on, bytes.
    pub(super) fn set_capacity(&mut self, node: &HostName, path: &str, capacity_bytes: u64) {
        if let Some(volume) = self.index_at(node, path) {
            self.volumes[volume].capacity_bytes = capacity_bytes;
        }
    }

    /// Every volume with the nodes that see it.
    pub(super) fn volumes(&self) -> impl Iterator<Item = (&Volume, Vec<&HostName>)> {
        self.volumes.iter().enumerate().map(|(i, volume)| {
            let seers = self
                .mounts
                .iter()
                .filter(|(_, mounts)| mounts.iter().any(|(_, v)| *v == i))
                .map(|(node, _)| node)
                .collect();
            (volume, seers)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str) -> HostName {
        name.parse().unwrap()
    }

    fn empty(allocated_bytes: u64) -> File {
        File::dense(Content::Empty, allocated_bytes)
    }

    fn two_nodes() -> (Storage, HostName, HostName) {
        let (a, b) = (node("a"), node("b"));
        let mut storage = Storage::default();
        storage.mount("a-root", "/", std::slice::from_ref(&a), 100);
        storage.mount("b-root", "/", std::slice::from_ref(&b), 100);
        storage.mount("nfs", "/shared", &[a.clone(), b.clone()], 1000);
        storage.make_directory(&a, "/disks");
        (storage, a, b)
    }

    #[test]
    fn a_shared_file_is_seen_by_both() {
        let (mut storage, a, b) = two_nodes();
        storage.create(&a, "/shared/x", empty(1)).unwrap();
        storage.create(&a, "/disks/x", empty(1)).unwrap();
        assert!(storage.file(&b, "/shared/x").is_some());
        assert!(storage.file(&b, "/disks/x").is_none());
        assert!(storage.is_shared("/shared/x", &a, &b));
        assert!(!storage.is_shared("/disks/x", &a, &b));
    }

    #[test]
    fn a_file_is_not_created_where_it_cannot_be() {
        let (mut storage, a, b) = two_nodes();
        let why = |r: Result<(), String>| r.unwrap_err();
        storage.create(&a, "/disks/x", empty(60)).unwrap();
        assert!(why(storage.create(&a, "/disks/x", empty(1))).contains("exists"));
        assert!(why(storage.create(&a, "/disks/y", empty(60))).contains("No space"));
        assert!(why(storage.create(&b, "/disks/x", empty(1))).contains("No such"));
        storage.set_writable(&a, "/disks", false);
        assert!(why(storage.create(&a, "/disks/z", empty(1))).contains("denied"));
    }

    #[test]
    fn a_mount_is_not_a_prefix_of_letters() {
        let (storage, a, b) = two_nodes();
        assert!(!storage.is_shared("/sharedx/y", &a, &b));
        assert_eq!(storage.volume_at(&a, "/shared").unwrap().name, "nfs");
    }
}

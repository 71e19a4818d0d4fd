//! Files that a guest uses on its node, and what is in them. The same name on two
//! nodes is not the same content: what a destination is to use and is not copied
//! must be the same file, or of proven equal content.

use serde::{Deserialize, Serialize};

use crate::guest::{Disk, Guest};

/// A file that a guest's definition names and that is no drive of it: its kernel,
/// its firmware, an option ROM, ….
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadFile {
    /// Absolute path.
    pub path: String,
    /// What it is to the guest, in words (`kernel`, `firmware`, …).
    pub what: String,
}

/// A local file or device that a guest uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Use {
    /// Absolute path.
    pub path: String,
    /// What it is to the guest, in words (`disk vda`, `base image of disk vda`, `kernel`).
    pub what: String,
    /// How it is used.
    pub role: UseRole,
}

/// How a guest uses a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UseRole {
    /// A disk that the guest writes, alone: shared, or copied.
    Own,
    /// A disk that several guests write: of use only if it is the same.
    SharedDisk,
    /// A drive that is only read.
    ReadDisk,
    /// An image under a drive, never written.
    Backing,
    /// Another file that is only read.
    Read,
}

impl Guest {
    /// Every local file and device that its drives, and what lies under them,
    /// and its start need. Files of its own beside its disks
    /// ([`Guest::files`]) are not among them.
    pub fn uses(&self) -> Vec<Use> {
        let mut uses: Vec<Use> = Vec::new();
        let mut add = |path: &str, what: String, role| {
            if !uses.iter().any(|u| u.path == path) {
                let path = path.to_owned();
                uses.push(Use { path, what, role });
            }
        };
        for disk in &self.disks {
            if let Some(path) = disk.local_path() {
                add(path, format!("disk {}", disk.target), role_of(disk));
            }
        }
        for disk in &self.disks {
            for image in &disk.backing {
                let what = format!("base image of disk {}", disk.target);
                add(&image.path, what, UseRole::Backing);
            }
        }
        for file in &self.reads {
            add(&file.path, file.what.clone(), UseRole::Read);
        }
        uses
    }
}

fn role_of(disk: &Disk) -> UseRole {
    if disk.read_only {
        UseRole::ReadDisk
    } else if disk.shareable {
        UseRole::SharedDisk
    } else {
        UseRole::Own
    }
}

/// A file as one node sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileContent {
    /// Absolute path.
    pub path: String,
    /// What is there.
    pub seen: Seen,
}

/// What a node sees at a path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub enum Seen {
    /// Nothing.
    Missing,
    /// Something that cannot be read.
    Unreadable {
        /// Why.
        error: String,
    },
    /// A file or a block device.
    File {
        /// How long it is, bytes.
        length_bytes: u64,
        /// Its number on its storage.
        inode: u64,
        /// Changes when the file does: device, number, length and time of the last
        /// write. Means something on this node alone.
        stamp: String,
        /// The other node's mark lies beside it, or (of a dead node) its storage
        /// and number are the same.
        #[serde(default)]
        marked: bool,
        /// What is in it.
        #[serde(default)]
        digest: Digest,
    },
    /// Said by another version in a way that this one does not understand.
    #[serde(other)]
    Unknown,
}

/// What is known of a file's bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum Digest {
    /// It is being read: ask again.
    Working {
        /// So far, bytes.
        done_bytes: u64,
    },
    /// It cannot be had.
    Failed {
        /// Why.
        error: String,
    },
    /// It is this.
    Known {
        /// SHA-256, hexadecimal, as `sha256sum` prints it.
        sha256: String,
    },
    /// Nobody asked, or another version said something that this one does not know.
    #[default]
    #[serde(other)]
    Unasked,
}

impl FileContent {
    /// What is known of its bytes, if it is a file.
    pub fn digest(&self) -> Option<&Digest> {
        match &self.seen {
            Seen::File { digest, .. } => Some(digest),
            _ => None,
        }
    }

    /// Whether its digest is being computed.
    pub fn is_working(&self) -> bool {
        matches!(self.digest(), Some(Digest::Working { .. }))
    }

    /// Its stamp, if it is a file.
    pub fn stamp(&self) -> Option<&str> {
        match &self.seen {
            Seen::File { stamp, .. } => Some(stamp),
            _ => None,
        }
    }
}

/// A file that was found to be the right one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckedFile {
    /// Absolute path.
    pub path: String,
    /// Its stamp, if its content was compared: with another it is to be compared
    /// again. None of one that is the same file on both nodes.
    #[serde(default)]
    pub stamp: Option<String>,
}

/// An address of its node to which a guest's QEMU is bound.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct BoundAddress {
    /// Address or name, as the definition has it.
    pub address: String,
    /// The port, if the definition fixes it.
    pub port: Option<u16>,
    /// It is a UDP port.
    #[serde(default)]
    pub udp: bool,
    /// What listens there, in words (`its VNC display`).
    pub what: String,
}

/// Whether a guest could be bound to an address on a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressFact {
    /// Which.
    pub bound: BoundAddress,
    /// Why not.
    pub error: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_another_version_says_is_unknown() {
        let seen: Seen = serde_json::from_str(r#"{"is":"object","bucket":"x"}"#).unwrap();
        assert_eq!(seen, Seen::Unknown);
        let digest: Digest = serde_json::from_str(r#"{"state":"blake3"}"#).unwrap();
        assert_eq!(digest, Digest::Unasked);
        let file = r#"{"is":"file","length_bytes":1,"inode":2,"stamp":"s","more":true}"#;
        let Seen::File { marked, digest, .. } = serde_json::from_str(file).unwrap() else {
            panic!("it is a file");
        };
        assert_eq!((marked, digest), (false, Digest::Unasked));
    }
}

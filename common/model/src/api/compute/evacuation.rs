//! What goes to and from nodes about definitions that are kept for the day on
//! which their node is dead, and about starting guests elsewhere from them.

use serde::{Deserialize, Serialize};

use crate::{
    content::{CheckedFile, FileContent},
    guest::Guest,
    ids::{InstanceId, MigrationId},
};

/// Names an instance of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceOnNode {
    /// Which.
    pub instance: InstanceId,
}

/// Everything needed to start a guest elsewhere, if its disks are reached there.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct KeptDefinition {
    /// Which.
    pub instance: InstanceId,
    /// The same as in its report.
    pub digest: String,
    /// Its lasting definition, libvirt's XML, without secrets.
    pub domain: String,
    /// Whether it has secrets (a password of its display), which are not told.
    pub has_secrets: bool,
    /// The guest as it will be after its next start.
    pub guest: Guest,
    /// Of each of its files on this node, on which storage it is.
    pub identities: Vec<StorageIdentity>,
    /// What is in the files that it only reads.
    #[serde(default)]
    pub contents: Vec<FileContent>,
}

/// On which storage a file is: two nodes that read the same of a path see the
/// same file. Read while the node still lived, because a dead one leaves no mark.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StorageIdentity {
    /// Absolute path of the disk, the image under it, ….
    pub path: String,
    /// What its directory's identity file holds and the file's number there; none
    /// if it could not be written or read.
    pub identity: Option<String>,
    /// Why not.
    pub error: Option<String>,
}

/// Ask a node whether it can start a guest of a dead one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CheckEvacuation {
    /// The evacuation.
    pub migration: MigrationId,
    /// The guest as its node described it last.
    pub guest: Guest,
    /// Where its files are.
    pub identities: Vec<StorageIdentity>,
    /// What was in those that it only reads.
    #[serde(default)]
    pub contents: Vec<FileContent>,
}

/// What the node found. Facts only: the conductor judges them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvacuationFacts {
    /// What a destination of any migration says. Its disks are *shared* where
    /// the identity is the same here.
    pub destination: super::DestinationFacts,
    /// Files other than disks that are not the same here, in words: path and why.
    /// Those whose content was told are in the destination's contents instead.
    pub foreign_files: Vec<String>,
}

/// Define a guest of a dead node, and start it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RebuildInstance {
    /// The evacuation.
    pub migration: MigrationId,
    /// The instance.
    pub instance: InstanceId,
    /// Its definition as its node told it last.
    pub domain: String,
    /// Generation that it has from now on (invariant 1).
    pub generation: u64,
    /// Files that it only reads, as they were when they were compared.
    #[serde(default)]
    pub checked: Vec<CheckedFile>,
}

/// Ask a node whether it reaches an address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeAddress {
    /// Address or name.
    pub address: String,
    /// TCP port.
    pub port: u16,
}

/// What the node found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeAnswer {
    /// Whether a connection was taken, or why not.
    pub reached: Result<(), String>,
    /// Whether the connection was refused: nobody listens there, but the machine
    /// runs.
    #[serde(default)]
    pub refused: bool,
}

/// How fast a guest writes memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirtyRate {
    /// MiB/s; none if the hypervisor cannot say.
    pub mib_s: Option<u64>,
}

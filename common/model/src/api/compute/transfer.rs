//! What goes to and from a node where an instance changes hands.

use serde::{Deserialize, Serialize};

use super::FileFact;
use crate::{
    guest::{BackingImage, Guest, NicAttachment},
    ids::{InstanceId, MigrationId, ProjectId},
    migration::{TransferMode, TransferOptions},
    project::Location,
};

/// Ask a node about an instance that is to change hands there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckTransfer {
    /// The migration.
    pub migration: MigrationId,
    /// The instance.
    pub instance: InstanceId,
    /// Networks that are asked after.
    pub networks: Vec<NicAttachment>,
    /// Locations that are asked after: the giver's and the receiver's.
    pub locations: Vec<Location>,
}

/// What the node found. Facts only: the conductor judges them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TransferFacts {
    /// The guest as it is now; none if libvirt has no such domain.
    pub guest: Option<Guest>,
    /// The guest as it will be after its next start.
    pub lasting: Option<Guest>,
    /// Networks that were asked after and are here, and in use.
    pub networks: Vec<NicAttachment>,
    /// Locations that were asked after, in that order.
    pub locations: Vec<LocationFact>,
    /// Files of the guest's disks.
    pub files: Vec<FileFact>,
    /// Those of them that other domains of this node use too.
    pub shared: Vec<SharedFile>,
}

/// A location as its node sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocationFact {
    /// Which.
    pub location: Location,
    /// Its directory here, or why there is none.
    pub directory: Result<String, String>,
    /// Which file system that is on.
    pub file_system: String,
    /// Free room there, bytes.
    pub free_bytes: u64,
    /// Names of what is in it and has the name of one of the guest's disks.
    pub taken: Vec<String>,
}

/// A file that another domain uses too.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedFile {
    /// Absolute path.
    pub path: String,
    /// The other domain's name.
    pub domain: String,
}

/// What changes about an instance that changes hands. Made by the conductor,
/// carried out by the agent as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransferPlan {
    /// Whether the guest runs on.
    pub mode: TransferMode,
    /// Whose it becomes.
    pub project: ProjectId,
    /// What people call that project.
    pub project_name: String,
    /// NICs that are plugged into something else.
    pub nics: Vec<NicMove>,
    /// Disks that go elsewhere.
    pub disks: Vec<DiskMove>,
    /// New name, if it gets one.
    pub name: Option<String>,
    /// New title, if it gets one.
    pub title: Option<String>,
}

/// A NIC that is plugged into something else.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicMove {
    /// Its MAC address.
    pub mac: String,
    /// What it is plugged into before.
    pub from: NicAttachment,
    /// And afterwards.
    pub to: NicAttachment,
    /// Its MAC address afterwards, if that changes (cold only).
    pub new_mac: Option<String>,
}

/// A disk that goes elsewhere on its node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskMove {
    /// Name in the guest (`vda`).
    pub target: String,
    /// The file it is before.
    pub from: String,
    /// The file it is afterwards. Nothing was there when this was planned.
    pub to: String,
    /// Image format; stays.
    pub format: String,
    /// Images below it before, nearest first.
    pub backing: Vec<BackingImage>,
    /// It takes what is in the images below it along, and has none afterwards.
    pub flatten: bool,
    /// Bytes of data to copy, when this was planned.
    pub data_bytes: u64,
}

impl DiskMove {
    /// The way back: as the disk is afterwards, to where it was.
    #[must_use]
    pub fn reversed(&self) -> Self {
        Self {
            from: self.to.clone(),
            to: self.from.clone(),
            backing: match self.flatten {
                true => Vec::new(),
                false => self.backing.clone(),
            },
            ..self.clone()
        }
    }
}

/// Write down what is to be done to an instance that changes hands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrepTransfer {
    /// The migration.
    pub migration: MigrationId,
    /// The instance.
    pub instance: InstanceId,
    /// What.
    pub plan: TransferPlan,
    /// How.
    pub options: TransferOptions,
}

/// A part of the work of a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TransferPart {
    /// The guest shuts down (cold).
    Stop,
    /// Disks are copied to where they will be. The guest still uses the old ones.
    Copy,
    /// Networks, metadata and disks become the receiver's; a cold one is started
    /// again if it ran.
    HandOver,
    /// Everything is as it was before.
    TakeBack,
}

/// Do, or go on with, a part of the work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransferWork {
    /// The migration.
    pub migration: MigrationId,
    /// The instance.
    pub instance: InstanceId,
    /// Which part.
    pub part: TransferPart,
    /// Of what is taken back by a node that has forgotten all of it: the guest ran, was
    /// asked to shut down, and is nowhere else.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ran: bool,
}

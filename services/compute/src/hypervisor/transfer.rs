//! The part of the hypervisor driver that an instance needs which changes hands
//! on its node: its NICs, its metadata and the place of its disks.
//!
//! As with [`super::Hypervisor`]: single acts, all safe to repeat, no memory of
//! migrations, one contract for the real driver and the fake.

use std::{fmt, time::Duration};

use async_trait::async_trait;
use drover_model::{
    api::compute::{DiskMove, LocationFact, SharedFile, TransferPlan},
    guest::NicAttachment,
    ids::InstanceId,
    project::Location,
};
use serde::{Deserialize, Serialize};

use super::{Definition, Result};

/// NICs and metadata of an active guest as they were, for a way back. Each
/// driver's own form; not for logs, nor for the broker.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Standing {
    /// Of the running guest.
    pub live: String,
    /// After its next start.
    pub lasting: String,
}

impl fmt::Debug for Standing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (live, lasting) = (self.live.len(), self.lasting.len());
        write!(f, "Standing({live} and {lasting} bytes)")
    }
}

/// How far a running guest's disk has got to another file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mirror {
    /// It is being copied.
    Copying {
        /// So far, bytes.
        done_bytes: u64,
        /// In all, bytes.
        total_bytes: u64,
    },
    /// The copy is whole, and follows every write.
    Ready,
    /// The guest is on the other file already.
    Moved,
}

/// See the module.
#[async_trait]
pub trait TransferDriver: Send + Sync + 'static {
    /// Which of these networks are here, and in use.
    async fn networks_present(&self, networks: &[NicAttachment]) -> Result<Vec<NicAttachment>>;

    /// Locations as this node sees them, in that order, and which of `names`
    /// are in each.
    async fn location_facts(
        &self,
        locations: &[Location],
        names: &[String],
    ) -> Result<Vec<LocationFact>>;

    /// Which of these files domains of this node use other than that one.
    async fn other_users(&self, id: InstanceId, paths: &[String]) -> Result<Vec<SharedFile>>;

    /// NICs and metadata of an active, persistent guest as they are now;
    /// `WrongState` if it is off or transient.
    async fn standing(&self, id: InstanceId) -> Result<Standing>;

    /// Gives an active guest's NICs and metadata to the plan's project, in the
    /// running guest and the lasting definition. Each NIC's link goes down and up,
    /// so that the guest asks for its lease again. Says for how long the longest
    /// was cut. What is the receiver's already stays as it is. `WrongState` if the
    /// guest is off.
    async fn hand_over(&self, id: InstanceId, plan: &TransferPlan) -> Result<Duration>;

    /// Takes that back, whether all, some or none of it was done.
    async fn hand_back(&self, id: InstanceId, before: &Standing) -> Result<()>;

    /// Begins to copy a disk of an active guest to another file, or tells how far
    /// that is. The file is made; `Exists` if something is there that this copy
    /// did not make. `WrongState` if the guest is off.
    async fn mirror_disk(
        &self,
        id: InstanceId,
        disk: &DiskMove,
        bandwidth_bytes_s: Option<u64>,
    ) -> Result<Mirror>;

    /// Has an active guest go on with the copy, in the lasting definition too;
    /// the old file stays as it was at that moment. Done already is no error;
    /// `WrongState` if the copy is not ready.
    async fn pivot_disk(&self, id: InstanceId, disk: &DiskMove) -> Result<()>;

    /// Ends such copying, also one that a daemon which died in the middle of it
    /// has lost track of; the guest goes on with the old file, and the new one
    /// stays for the caller to remove. None under way is no error.
    async fn abandon_mirror(&self, id: InstanceId, disk: &DiskMove) -> Result<()>;

    /// Puts the disk of a guest that is off at another place too, whole and on
    /// stable storage: the same file under another name where that is possible,
    /// else a copy. Begins anew if something is there. The old one stays.
    async fn place_disk(&self, disk: &DiskMove, bandwidth_bytes_s: Option<u64>) -> Result<()>;

    /// Whether what is at a disk's new place has all that the old one has: it is
    /// the same file, or nothing was written to the old one since it was copied.
    async fn is_placed(&self, disk: &DiskMove) -> Result<bool>;

    /// The definition of a guest that is off as it is to be for the receiver.
    fn transferred(&self, definition: &Definition, plan: &TransferPlan) -> Result<Definition>;
}

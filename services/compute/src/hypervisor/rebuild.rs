//! The part of the hypervisor driver that guests of dead nodes need: what is kept
//! of them while their node lives, and how they are defined anew on another.
//!
//! As with [`super::Hypervisor`]: single acts, all safe to repeat, no memory of
//! migrations, one contract for the real driver and the fake.

use async_trait::async_trait;
use drover_model::{
    api::compute::{KeptDefinition, StorageIdentity},
    ids::InstanceId,
};

use super::Result;

/// A file as a node other than its guest's sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StorageFact {
    /// Absolute path.
    pub path: String,
    /// Whether it is the same file here, or why it is not.
    pub same: std::result::Result<(), String>,
}

/// See the module.
#[async_trait]
pub trait RebuildDriver: Send + Sync + 'static {
    /// Everything needed to start a guest elsewhere without asking this node
    /// again. Leaves an identity file in the directories of its disks, once and
    /// for good. `NoSuchGuest` if it is not here.
    async fn kept_definition(&self, id: InstanceId) -> Result<KeptDefinition>;

    /// Which of another node's files are the same here, in that order. Writes
    /// nothing.
    async fn storage_facts(&self, identities: &[StorageIdentity]) -> Result<Vec<StorageFact>>;

    /// Defines a guest from a kept definition, shut off, with that generation in
    /// its metadata. Of a guest that is here already, `WrongState`, unless it has
    /// that generation: then nothing is done. `Failed` if another has its name.
    async fn define_rebuilt(&self, id: InstanceId, domain: &str, generation: u64) -> Result<()>;

    /// How fast a running guest writes memory, MiB/s, measured for a second; none
    /// if the hypervisor cannot tell.
    async fn dirty_rate(&self, id: InstanceId) -> Result<Option<u64>>;

    /// Guests that the hypervisor starts by itself when the node boots, asking
    /// nobody.
    async fn unguarded_autostarts(&self) -> Result<Vec<InstanceId>>;

    /// Writes the wish to be started at boot into a guest's metadata, and has the
    /// hypervisor not do it by itself any more. Never wished is no error.
    async fn take_over_autostart(&self, id: InstanceId) -> Result<()>;
}

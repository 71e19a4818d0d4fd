//! The part of the hypervisor driver that a move of a shut-off guest needs:
//! stopping and starting, definitions, and the guest's files, which go from
//! node to node without libvirt.
//!
//! As with [`super::Hypervisor`]: single acts, all safe to repeat, no memory of
//! migrations, one contract for the real driver and the fake.

use std::{fmt, time::Duration};

use async_trait::async_trait;
use drover_model::{api::compute::FileFact, guest::Guest, ids::InstanceId, migration::Flavor};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{HypervisorError, Result};

/// Everything libvirt keeps of a guest that is off, secrets included: not for
/// logs, nor for the broker.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Definition {
    /// The domain.
    pub domain: String,
    /// Its internal snapshots, parents first.
    pub snapshots: Vec<String>,
    /// Name of the current one of them.
    pub current_snapshot: Option<String>,
}

impl Definition {
    /// Of a domain that has no internal snapshots, as far as is known.
    pub(crate) fn of_domain(domain: String) -> Self {
        Self {
            domain,
            snapshots: Vec::new(),
            current_snapshot: None,
        }
    }
}

impl fmt::Debug for Definition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (bytes, snapshots) = (self.domain.len(), self.snapshots.len());
        write!(f, "Definition({bytes} bytes, {snapshots} snapshots)")
    }
}

/// A disk whose guest writes to a file over it, so that the image under it
/// stays as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Overlay {
    /// Name in the guest.
    pub target: String,
    /// The file with what was written since, a qcow2 image.
    pub path: String,
    /// The image under it.
    pub image: String,
    /// That image's format.
    pub format: String,
}

/// A file to be taken in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Incoming {
    /// Where.
    pub path: String,
    /// It is there already and is compared, never written.
    pub present: bool,
}

/// Files to be sent, in the order in which the other side was told of them.
#[derive(Clone, PartialEq, Eq)]
pub struct SendSpec {
    /// What the other side knows them by.
    pub key: Uuid,
    /// The secret that opens it, hexadecimal.
    pub token: String,
    /// Address of the other node.
    pub address: String,
    /// Port of its agent for disks.
    pub port: u16,
    /// Paths.
    pub files: Vec<String>,
    /// An earlier attempt may have sent some of it.
    pub resume: bool,
    /// Upper limit, bytes per second.
    pub bandwidth_bytes_s: Option<u64>,
    /// Give up when nothing has got through for so long.
    pub progress_timeout: Duration,
}

impl fmt::Debug for SendSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "SendSpec({} to {}:{}, {:?})",
            self.key, self.address, self.port, self.files
        )
    }
}

/// How far sending has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sent {
    /// Data in the files, bytes.
    pub total_bytes: u64,
    /// Of it on the other side and verified, bytes.
    pub done_bytes: u64,
    /// Of that, bytes which were there already.
    pub reused_bytes: u64,
    /// How often a broken connection was made anew.
    pub reconnects: u64,
}

/// Why files were not sent whole.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// It was cancelled.
    #[error("cancelled")]
    Cancelled,
    /// Nothing got through for too long.
    #[error("{0}")]
    Stalled(String),
    /// A file of this node or the other refuses, or the two differ where they
    /// must not.
    #[error("{0}")]
    Failed(String),
}

/// See the module.
#[async_trait]
pub trait ColdDriver: Send + Sync + 'static {
    /// One domain as it will be after its next start: with whatever lies under
    /// its disks and beside them, and with its power state now. What cannot be
    /// carried is among its immovables. None if there is no such domain.
    async fn lasting_guest(&self, id: InstanceId) -> Result<Option<Guest>>;

    /// Asks a running guest to shut down, as its power button or its agent
    /// would; it may not obey. `WrongState` if it does not run.
    async fn shut_down(&self, id: InstanceId) -> Result<()>;

    /// Stops a guest hard. One that is off already is no error.
    async fn stop(&self, id: InstanceId) -> Result<()>;

    /// Starts a guest that is off. One that is active already is no error.
    async fn start(&self, id: InstanceId) -> Result<()>;

    /// Whether a guest is in shutdown: it has ended, and the hypervisor, to which it is
    /// active still, has not tidied up yet. It will be off by itself.
    async fn is_going_off(&self, id: InstanceId) -> Result<bool>;

    /// What [`Self::define`] wants; none if there is no such domain.
    async fn definition(&self, id: InstanceId) -> Result<Option<Definition>>;

    /// Another for each definition, apart from what the agent notes in it while a
    /// guest may be on its way (that it is to be started at boot).
    fn fingerprint(&self, definition: &Definition) -> Result<String>;

    /// Defines a domain, shut off, of another size if asked; one that is there
    /// is changed accordingly. `WrongState` if it is active.
    async fn define(&self, definition: &Definition, flavor: Option<Flavor>) -> Result<()>;

    /// Removes the definition of a domain that is shut off, snapshots' included;
    /// its files stay. `WrongState` if it is active, or if libvirt would remove the state
    /// of its emulated TPM; absent is no error.
    async fn withdraw(&self, id: InstanceId) -> Result<()>;

    /// The same, but the state of its emulated TPM may be removed with it if that is in
    /// no other files than these.
    async fn withdraw_with_tpm(&self, id: InstanceId, files: &[String]) -> Result<()>;

    /// Has a running guest's writes to these disks go to overlays from now on;
    /// the images under them stay as they are at this moment, for all disks the
    /// same. Done already is no error.
    async fn freeze_disks(&self, id: InstanceId, overlays: &[Overlay]) -> Result<()>;

    /// Takes that back for a guest that still runs: overlays are merged into
    /// their images, which the guest uses again. Never done, or taken back
    /// already, is no error.
    async fn thaw_disks(&self, id: InstanceId, overlays: &[Overlay]) -> Result<()>;

    /// Merges an overlay into its image where no guest runs on them, and has that
    /// reach stable storage. Again, it changes nothing. `Failed` if it is not there: it
    /// may lie on a file system that is not mounted.
    async fn merge_overlay(&self, overlay: &Overlay) -> Result<()>;

    /// What this node says to files of these paths.
    async fn file_facts(&self, paths: &[String]) -> Result<Vec<FileFact>>;

    /// Makes an empty file for bytes to come, readable for none but this
    /// process and QEMU's user; its directory too, if told. `Exists`, and
    /// touches nothing, if anything is there.
    async fn reserve_file(&self, path: &str, with_directory: bool) -> Result<()>;

    /// Renames a file within its directory, over nothing. One already renamed
    /// is no error. Refuses a file that a domain of this node uses.
    async fn rename_file(&self, from: &str, to: &str) -> Result<()>;

    /// Has a file's bytes reach stable storage.
    async fn flush_file(&self, path: &str) -> Result<()>;

    /// TCP port at which this node takes files, or why it does not.
    fn disk_port(&self) -> std::result::Result<u16, String>;

    /// Takes files in under a key, from whoever has the token. Asked again with
    /// the same, goes on.
    async fn receive(&self, key: Uuid, token: &str, files: &[Incoming]) -> Result<()>;

    /// Takes in no more; nothing writes to these files any more when it returns.
    async fn stop_receiving(&self, key: Uuid);

    /// Sends files until they are there and verified; shows how far it is. A
    /// broken connection is made anew. Ends soon after it is cancelled or dropped.
    async fn send(
        &self,
        spec: SendSpec,
        shown: watch::Sender<Sent>,
        cancel: CancellationToken,
    ) -> std::result::Result<Sent, SendError>;
}

impl From<HypervisorError> for SendError {
    fn from(error: HypervisorError) -> Self {
        Self::Failed(error.to_string())
    }
}

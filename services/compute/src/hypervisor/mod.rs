//! The hypervisor driver: everything an agent asks of its node's hypervisor.
//!
//! Two implementations: [`libvirt`] for real, and [`fake`], whose nodes share
//! one fabric in virtual time. One contract suite (`tests/tests/contract.rs`)
//! holds both to what is written here. A driver gives facts and carries out
//! single acts; it judges nothing and remembers nothing about migrations.

mod cold;
pub mod fake;
pub mod libvirt;
mod rebuild;
mod transfer;

use async_trait::async_trait;
use drover_model::{
    api::compute::{CpuVerdict, DiskFact, Mark, NetworkFact},
    content::{AddressFact, BoundAddress, FileContent},
    error::ErrorClass,
    guest::{Disk, Guest, Presence},
    ids::{InstanceId, MigrationId},
    migration::{LiveOptions, Transfer},
    node::{InstanceReport, Inventory},
};
use tokio::sync::broadcast;

pub use cold::{ColdDriver, Definition, Incoming, Overlay, SendError, SendSpec, Sent};
pub use rebuild::{RebuildDriver, StorageFact};
pub use transfer::{Mirror, Standing, TransferDriver};

/// Result of a driver call.
pub type Result<T> = std::result::Result<T, HypervisorError>;

/// Why a TCP port was not reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unreached {
    /// In words.
    pub message: String,
    /// Whether the other machine refused: nobody listens there, but it runs.
    pub refused: bool,
}

impl Unreached {
    /// Nothing came back.
    pub fn silent(message: String) -> Self {
        Self {
            message,
            refused: false,
        }
    }
}

impl From<Unreached> for String {
    fn from(unreached: Unreached) -> Self {
        unreached.message
    }
}

/// What can go wrong with a hypervisor.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum HypervisorError {
    /// libvirt does not answer; nothing is known about its guests.
    #[error("libvirt at {uri} does not answer: {message}")]
    Unreachable {
        /// Where it was sought.
        uri: String,
        /// In libvirt's words.
        message: String,
    },
    /// There is no such domain.
    #[error("the hypervisor has no domain {0}")]
    NoSuchGuest(InstanceId),
    /// The domain is not in a state for this, or has no job to act on.
    #[error("not possible now: {0}")]
    WrongState(String),
    /// The job was aborted on request.
    #[error("aborted: {0}")]
    Aborted(String),
    /// Something is at that path already.
    #[error("{0} is there already")]
    Exists(String),
    /// libvirt, QEMU or the file system said no.
    #[error("{0}")]
    Failed(String),
    /// Nothing was done, as storage of this node does not tell what has to be known.
    #[error("{0}")]
    Untold(String),
    /// The connection broke in the middle: nobody knows whether it happened.
    #[error("lost libvirt in the middle of it: {0}")]
    Lost(String),
    /// The driver's own mistake.
    #[error("driver error: {0}")]
    Bug(String),
}

impl HypervisorError {
    /// Its class.
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Unreachable { .. } | Self::Untold(_) => ErrorClass::Retryable,
            Self::NoSuchGuest(_)
            | Self::WrongState(_)
            | Self::Aborted(_)
            | Self::Exists(_)
            | Self::Failed(_) => ErrorClass::Refused,
            Self::Lost(_) => ErrorClass::Lost,
            Self::Bug(_) => ErrorClass::Bug,
        }
    }
}

/// Something happened on the node. A hint to look, never the only source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A domain was defined, started, stopped, …: report soon.
    Guest(InstanceId),
    /// A migration's memory went through another round over this domain.
    MigrationIteration(InstanceId),
    /// A migration stopped this domain: what is left of its memory is the last.
    SwitchOver(InstanceId),
    /// A job on this domain ended.
    JobCompleted(InstanceId),
    /// The connection to the hypervisor came or went.
    Connection {
        /// Whether it is up now.
        up: bool,
    },
}

/// What a destination is asked about a guest to come, apart from the network.
#[derive(Debug, Clone)]
pub struct DestinationQuestion<'a> {
    /// The guest as its source described it.
    pub guest: &'a Guest,
    /// Marks that the source left beside its disks.
    pub marks: &'a [Mark],
}

/// What a destination's hypervisor knows.
#[derive(Debug, Clone, PartialEq)]
pub struct DestinationAnswer {
    /// Whether the guest's emulator is there.
    pub emulator_present: bool,
    /// Whether it knows the guest's machine type.
    pub machine_supported: bool,
    /// Whether the guest's virt type can run.
    pub virt_type_supported: bool,
    /// The CPU.
    pub cpu: CpuVerdict,
    /// The networks of its NICs.
    pub networks: Vec<NetworkFact>,
    /// A domain of its UUID.
    pub same_uuid: Presence,
    /// Another domain of its name.
    pub same_name: Option<InstanceId>,
    /// Its disks, seen from here.
    pub disks: Vec<DiskFact>,
}

/// A migration to carry out.
#[derive(Debug, Clone, PartialEq)]
pub struct MigrateSpec {
    /// The guest.
    pub instance: InstanceId,
    /// URI with which this node's libvirtd reaches the other's.
    pub dest_libvirt_uri: String,
    /// Address for the migration's own streams.
    pub dest_address: String,
    /// Disks to copy, by target name; none of the others is touched.
    pub copied_disks: Vec<String>,
    /// Disks that the marks proved to lie on storage both nodes share. libvirt
    /// itself believes that only of NFS, Ceph and the like and refuses others as
    /// unsafe: if all of those that it would refuse are in this list, and are not
    /// cached by the host, it is told to take our word (`VIR_MIGRATE_UNSAFE`).
    pub shared_disks: Vec<String>,
    /// Downtime to start with, ms; the monitor raises it later.
    pub initial_downtime_ms: Option<u64>,
    /// The caller's wishes.
    pub options: LiveOptions,
}

/// A job on a domain.
#[derive(Debug, Clone, PartialEq)]
pub enum Job {
    /// None is running.
    None,
    /// An outgoing or incoming migration.
    Migration(JobSample),
    /// Something else (backup, snapshot, …).
    Other(String),
}

/// One sample of a migration job, as the hypervisor gives it.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct JobSample {
    /// Time since it began, ms.
    pub elapsed_ms: u64,
    /// Memory.
    pub memory: Transfer,
    /// Disks.
    pub disk: Transfer,
    /// Memory rate, bytes per second.
    pub rate_bytes_s: u64,
    /// Dirty rate, bytes per second; 0 until the hypervisor has measured it.
    pub dirty_rate_bytes_s: u64,
    /// Rounds over memory.
    pub iteration: u64,
    /// Expected (or, at the end, measured) downtime, ms.
    pub downtime_ms: Option<u64>,
    /// The guest runs on the destination already.
    pub post_copy: bool,
    /// It does, and libvirt has given the rest of its memory up.
    pub post_copy_failed: bool,
    /// Throttling of the guest's vCPUs by auto-converge, percent.
    pub throttle_percent: Option<u64>,
}

/// A node's hypervisor. Calls never block the runtime. All are safe to repeat.
#[async_trait]
pub trait Hypervisor: ColdDriver + TransferDriver + RebuildDriver {
    /// What the node has.
    async fn inventory(&self) -> Result<Inventory>;

    /// Every domain on it. An error, never an empty list, if libvirt is away.
    /// `migration` is left `None`: that is the agent's knowledge.
    async fn guests(&self) -> Result<Vec<InstanceReport>>;

    /// One domain whole; none if libvirt has no such domain.
    async fn guest(&self, id: InstanceId) -> Result<Option<Guest>>;

    /// Where a domain stands here.
    async fn presence(&self, id: InstanceId) -> Result<Presence>;

    /// What happens from now on. A receiver that lags is told so and looks itself.
    fn events(&self) -> broadcast::Receiver<Event>;

    /// Leaves a mark (a small, uniquely named file) in the directory of each
    /// local disk and of each image under one. Named by migration, so asking twice
    /// leaves one.
    async fn leave_marks(&self, migration: MigrationId, disks: &[Disk]) -> Result<Vec<Mark>>;

    /// Removes such marks; those already gone are no error.
    async fn remove_marks(&self, marks: &[Mark]) -> Result<()>;

    /// What this node knows about a guest that may come.
    async fn answer_destination(
        &self,
        question: DestinationQuestion<'_>,
    ) -> Result<DestinationAnswer>;

    /// What is at these paths, in that order; links are followed. A file is
    /// *marked* if one of `marks` lies beside it. Digests are not asked for.
    async fn contents(&self, paths: &[String], marks: &[Mark]) -> Result<Vec<FileContent>>;

    /// The same with digests, of files that are small at once, of others when
    /// they are asked for again. A file for which nobody asks for a minute is
    /// given up.
    async fn digests(&self, paths: &[String]) -> Result<Vec<FileContent>>;

    /// Whether a guest could be bound to these addresses, in that order.
    async fn addresses(&self, bound: &[BoundAddress]) -> Result<Vec<AddressFact>>;

    /// Whether a TCP port can be reached from this node, within a few seconds.
    async fn reach(&self, address: &str, port: u16) -> std::result::Result<(), Unreached>;

    /// Opens a free port of the migration range for a few seconds, for another
    /// node to try; says which.
    async fn open_probe_port(&self) -> std::result::Result<u16, String>;

    /// Makes the file that was reserved at the disk's path, which has this number, an
    /// empty image of the disk's format, size and backing; also if a former attempt made it
    /// so. Touches nothing and is `Exists` if another file is there, or somebody has written
    /// to this one, `WrongState` if a domain of this node uses it.
    async fn create_disk(&self, disk: &Disk, inode: u64) -> Result<()>;

    /// Removes a disk's file. One already gone is no error. Refuses a path that
    /// a domain of this node uses.
    async fn remove_disk(&self, path: &str) -> Result<()>;

    /// Moves a guest away, peer to peer; returns when the hypervisor is done
    /// with it. Dropping the future does not stop the migration. `Err(Lost)`
    /// says nothing about the guest: ask both nodes.
    async fn migrate(&self, spec: MigrateSpec) -> Result<()>;

    /// The job on a domain.
    async fn job(&self, id: InstanceId) -> Result<Job>;

    /// Statistics of the last migration that ended well on this domain, here,
    /// if the hypervisor still has them. (On the destination after a move.)
    async fn completed_job(&self, id: InstanceId) -> Result<Option<JobSample>>;

    /// Aborts a migration. `WrongState` if none runs or it is past return.
    async fn abort(&self, id: InstanceId) -> Result<()>;

    /// Cuts an outgoing migration's streams: a peer that died without a word can
    /// hold the guest, and the hypervisor's own word on it, for long. The
    /// migration then fails, unless it is past return; one that has switched to
    /// post-copy must not be cut. Asks no daemon. No stream left is no error.
    async fn sever(&self, id: InstanceId, dest_address: &str) -> Result<()>;

    /// Switches a migration to post-copy. `WrongState` if it was not started so.
    async fn start_post_copy(&self, id: InstanceId) -> Result<()>;

    /// Pauses the guest so that its migration ends at once, whatever bandwidth it was
    /// given; it runs again on the destination when the migration is over.
    async fn pause_for_switch_over(&self, id: InstanceId) -> Result<()>;

    /// Lets a paused guest run on here (after a failed migration).
    async fn resume(&self, id: InstanceId) -> Result<()>;

    /// Allowed downtime of a running migration, ms.
    async fn set_max_downtime_ms(&self, id: InstanceId, downtime_ms: u64) -> Result<()>;

    /// Kills a QEMU that waits for a migration that will not come, and its
    /// definition. `WrongState` if the guest is anything but `Incoming`;
    /// absent is no error.
    async fn discard_incoming(&self, id: InstanceId) -> Result<()>;

    /// Kills a guest that libvirt left standing still after it had moved away
    /// (its daemon died at the wrong moment), and its definition. Only for a
    /// guest that was seen to run elsewhere since. `WrongState` if the guest is
    /// anything but paused by a migration that is no longer under way; absent is
    /// no error.
    async fn discard_outgoing(&self, id: InstanceId) -> Result<()>;

    /// Kills what stands still of a guest that switched over in a post-copy whose
    /// other half is gone, and its definition: no QEMU has the rest of its memory.
    /// Only for a guest that was seen off on its destination since, or there under no
    /// migration. `WrongState` if the guest is anything but such a half; absent is no
    /// error.
    async fn discard_half(&self, id: InstanceId) -> Result<()>;

    /// Removes the definition of a domain that is shut off. `WrongState` if it
    /// is active; absent is no error.
    async fn undefine(&self, id: InstanceId) -> Result<()>;
}

//! Topic `compute`, server = host name, namespace `drover` 1.x: the steps that
//! the conductor asks of an agent. Each is idempotent and keyed by the
//! migration's UUID; asked twice, it answers with what is there.

use serde::{Deserialize, Serialize};

use crate::{
    guest::{Guest, NicAttachment, Presence},
    ids::{HostName, InstanceId, MigrationId},
    migration::{LiveOptions, Progress},
    node::{Endpoint, Inventory},
};

/// Names of the methods, in the order in which a live migration uses them.
pub mod method {
    /// No arguments → [`super::AgentStatus`]
    pub const GET_STATUS: &str = "get_status";
    /// [`super::CheckSource`] → [`super::SourceFacts`]
    pub const CHECK_SOURCE: &str = "check_can_live_migrate_source";
    /// [`super::CheckDestination`] → [`super::DestinationFacts`]
    pub const CHECK_DESTINATION: &str = "check_can_live_migrate_destination";
    /// [`super::CheckPath`] → [`super::PathFacts`]; also removes the marks.
    pub const CHECK_PATH: &str = "check_migration_path";
    /// [`super::PreLiveMigration`] → `null`, on the destination.
    pub const PRE_LIVE_MIGRATION: &str = "pre_live_migration";
    /// [`super::LiveMigration`] → [`super::JobState`], on the source: starts, does not wait.
    pub const LIVE_MIGRATION: &str = "live_migration";
    /// [`super::StepRef`] → [`super::JobState`], on the source.
    pub const GET_JOB: &str = "get_live_migration";
    /// [`super::StepRef`] → `null`, on the source.
    pub const ABORT: &str = "abort_live_migration";
    /// [`super::StepRef`] → `null`, on the source.
    pub const FORCE_COMPLETE: &str = "force_complete_live_migration";
    /// [`super::StepRef`] → [`super::GuestLocation`], on either side.
    pub const LOCATE: &str = "locate_instance";
    /// [`super::PostLiveMigration`] → [`super::CleanUp`], on the source after the switch-over.
    pub const POST_LIVE_MIGRATION: &str = "post_live_migration";
    /// [`super::StepRef`] → [`super::CleanUp`], on the destination after the switch-over.
    pub const POST_AT_DESTINATION: &str = "post_live_migration_at_destination";
    /// [`super::StepRef`] → [`super::CleanUp`], on the destination, only when the
    /// guest is known to run on the source.
    pub const ROLLBACK_AT_DESTINATION: &str = "rollback_live_migration_at_destination";
    /// [`super::StepRef`] → `null`, on the source: forgets a migration that ended there.
    pub const ROLLBACK_AT_SOURCE: &str = "rollback_live_migration_at_source";
}

/// Names a step's subject.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepRef {
    /// The migration.
    pub migration: MigrationId,
    /// The instance it moves.
    pub instance: InstanceId,
}

/// How an agent is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AgentStatus {
    /// Which node.
    pub host: HostName,
    /// Version of the agent.
    pub version: String,
    /// Its clock, milliseconds since 1970.
    pub clock_ms: u64,
    /// What libvirt says, or the error in words.
    pub libvirt: Result<Inventory, String>,
    /// Migrations it is carrying out.
    pub migrations: Vec<MigrationId>,
    /// Counters since it started, by name.
    pub counters: std::collections::BTreeMap<String, u64>,
}

/// Ask the source what it is to give away.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckSource {
    /// The migration.
    pub migration: MigrationId,
    /// The instance.
    pub instance: InstanceId,
}

/// What the source found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SourceFacts {
    /// The guest; none if libvirt has no such domain.
    pub guest: Option<Guest>,
    /// Files left beside its disks for the destination to look for.
    pub marks: Vec<Mark>,
    /// The source's hypervisor, asked now.
    pub inventory: Inventory,
}

/// A file that the source left in a disk's directory: a destination that sees
/// it shares that directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// Directory of one or more disks.
    pub directory: String,
    /// Absolute path of the file; none if it could not be written.
    pub path: Option<String>,
    /// What the file holds, to be compared.
    pub content: String,
    /// Why it could not be written.
    pub error: Option<String>,
}

/// Ask the destination whether the guest can come.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CheckDestination {
    /// The migration.
    pub migration: MigrationId,
    /// The guest as the source described it.
    pub guest: Guest,
    /// What the source left beside the disks.
    pub marks: Vec<Mark>,
    /// Where the source is.
    pub source: Endpoint,
}

/// What the destination found. Facts only: the conductor judges them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DestinationFacts {
    /// The destination's hypervisor, asked now.
    pub inventory: Inventory,
    /// Whether the guest's emulator is there.
    pub emulator_present: bool,
    /// Whether that emulator knows the guest's machine type.
    pub machine_supported: bool,
    /// Whether it can run guests of the guest's virt type (`kvm`, `qemu`).
    pub virt_type_supported: bool,
    /// What libvirt says of the guest's CPU.
    pub cpu: CpuVerdict,
    /// Whether what each NIC is plugged into is there too.
    pub networks: Vec<NetworkFact>,
    /// A domain with the guest's UUID that is here already.
    pub same_uuid: Presence,
    /// A domain with another UUID that has the guest's name.
    pub same_name: Option<InstanceId>,
    /// The guest's disks, as seen from here.
    pub disks: Vec<DiskFact>,
    /// Whether the source's libvirt port can be reached from here, or why not.
    pub reach_source: Result<(), String>,
    /// A migration port that listens here for the source to try, or why none could.
    pub probe_port: Result<u16, String>,
}

/// libvirt's verdict on a guest's CPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verdict", rename_all = "snake_case")]
pub enum CpuVerdict {
    /// The node can provide it.
    Compatible,
    /// It cannot.
    Incompatible {
        /// What libvirt said is missing.
        detail: String,
    },
    /// Nothing to compare (emulated CPU, or libvirt cannot say).
    Unknown {
        /// Why.
        detail: String,
    },
}

/// Whether what a NIC is plugged into is at the destination.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkFact {
    /// MAC address of the NIC.
    pub mac: String,
    /// What it is plugged into.
    pub attachment: NicAttachment,
    /// Whether that is here, and in use.
    pub present: bool,
}

/// A disk as the destination sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskFact {
    /// Name in the guest.
    pub target: String,
    /// The source's mark was found beside it.
    pub shared: bool,
    /// A file or device of its path is here.
    pub exists: bool,
    /// Its directory is here.
    pub directory_exists: bool,
    /// Which file system its directory is on; disks on one share its room.
    pub file_system: String,
    /// Free room there, bytes.
    pub free_bytes: u64,
    /// Images below it that are missing here.
    pub missing_backing: Vec<String>,
}

/// Ask the source whether it can reach the destination.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckPath {
    /// The migration.
    pub migration: MigrationId,
    /// The instance.
    pub instance: InstanceId,
    /// Where the destination is.
    pub destination: Endpoint,
    /// Migration port that listens there.
    pub probe_port: Option<u16>,
}

/// What the source found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathFacts {
    /// Whether the destination's libvirt port can be reached, or why not.
    pub libvirt: Result<(), String>,
    /// Whether the probe port can be reached, or why not.
    pub migration_port: Result<(), String>,
}

/// Make the destination ready.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PreLiveMigration {
    /// The migration.
    pub migration: MigrationId,
    /// The guest as the source described it.
    pub guest: Guest,
    /// Names (`vda`) of the disks that will be copied and must be created.
    pub copied_disks: Vec<String>,
}

/// Start sending.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LiveMigration {
    /// The migration.
    pub migration: MigrationId,
    /// The instance.
    pub instance: InstanceId,
    /// The destination's name.
    pub dest_host: HostName,
    /// Where it is.
    pub destination: Endpoint,
    /// Names (`vda`) of the disks to copy; none if all are shared.
    pub copied_disks: Vec<String>,
    /// Names of the disks that were proven to lie on storage both nodes share.
    #[serde(default)]
    pub shared_disks: Vec<String>,
    /// How.
    pub options: LiveOptions,
}

/// Tidy the source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PostLiveMigration {
    /// The migration.
    pub migration: MigrationId,
    /// The instance.
    pub instance: InstanceId,
    /// The node that was seen to run the guest just now. With this proof the
    /// source gives up a copy that its libvirt left standing still.
    #[serde(default)]
    pub runs_on: Option<HostName>,
}

/// Where a migration's transfer stands on the source.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "job", rename_all = "snake_case")]
pub enum JobState {
    /// This agent has never heard of it.
    Unknown,
    /// It goes on.
    Running {
        /// Sample.
        progress: Box<Progress>,
    },
    /// It ended.
    Ended {
        /// How, as far as the source can tell.
        outcome: Outcome,
        /// Last sample.
        progress: Box<Progress>,
    },
}

/// How a transfer ended, as far as the source can tell. Where the guest runs is
/// asked of both nodes before anything is done about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Outcome {
    /// libvirt reports success.
    Moved {
        /// Measured downtime, ms.
        downtime_ms: Option<u64>,
        /// Measured time of libvirt's job, ms.
        total_ms: Option<u64>,
    },
    /// libvirt reports failure.
    Failed {
        /// In libvirt's words.
        message: String,
    },
    /// It was aborted.
    Aborted,
    /// It was given up for lack of progress.
    Stalled {
        /// What was seen.
        message: String,
    },
}

/// Where an agent sees a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestLocation {
    /// The answer of this node's libvirt, asked now.
    pub presence: Presence,
    /// Whether a libvirt migration job runs on it here.
    pub migrating: bool,
}

/// What a clean-up did. A failed part is a warning (invariant 2).
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CleanUp {
    /// Files that were removed.
    pub removed: Vec<String>,
    /// What did not work.
    pub warnings: Vec<String>,
    /// How long the guest stood still, measured by the hypervisor, ms. Known on
    /// the destination alone.
    #[serde(default)]
    pub downtime_ms: Option<u64>,
    /// How long the hypervisor's job took, ms. Known on the destination alone.
    #[serde(default)]
    pub total_ms: Option<u64>,
}

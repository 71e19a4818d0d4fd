//! Topic `compute`, server = host name, namespace `drover` 1.x: the steps that
//! the conductor asks of an agent. Each is idempotent and keyed by the
//! migration's UUID; asked twice, it answers with what is there.

mod copy;
mod evacuation;
mod known;
mod transfer;

use serde::{
    Deserialize, Serialize,
    de::{DeserializeOwned, IgnoredAny},
};

pub use copy::{AsideSeen, CopyHistory, CopySeen, FileSeen, RemoveCopy, Survivor};
pub use evacuation::{
    CheckEvacuation, DirtyRate, EvacuationFacts, InstanceOnNode, KeptDefinition, ProbeAddress,
    ProbeAnswer, RebuildInstance, StorageIdentity,
};
pub use known::{Doing, Ended, GuestLocation, Known};
pub use transfer::{
    CheckTransfer, DiskMove, LocationFact, NicMove, PrepTransfer, SharedFile, TransferFacts,
    TransferPart, TransferPlan, TransferWork,
};

use crate::{
    content::{AddressFact, CheckedFile, FileContent},
    guest::{Guest, NicAttachment, Presence},
    ids::{HostName, InstanceId, MigrationId, StateId},
    migration::{ColdOptions, Flavor, LiveOptions, Progress},
    node::{Endpoint, Inventory},
    unknown::Unknown,
    version::Spoken,
};

/// What is asked of an agent.
pub trait Call: Serialize + Send + Sync {
    /// Its method.
    const METHOD: &'static str;
    /// What is answered.
    type Answer;
    /// In which form that travels.
    type Wire: DeserializeOwned + Into<Self::Answer>;
    /// What it does there: [`Question`], [`Act`] or [`Removal`].
    type Kind;
}

/// It is answered at once, and changes nothing that takes long.
#[derive(Debug)]
pub enum Question {}
/// It works on disks, and may take long.
#[derive(Debug)]
pub enum Act {}
/// It removes something by evidence, which is stale before long.
#[derive(Debug)]
pub enum Removal {}

/// Done, whatever else a newer agent says of it.
#[derive(Debug, Deserialize)]
pub struct Done(#[allow(dead_code)] IgnoredAny);

impl From<Done> for () {
    fn from(_: Done) {}
}

/// `METHOD = "its name": what is asked => what is answered, kind`. A call of the form
/// `Name(What)` is a type of its own around arguments that it shares with others.
macro_rules! calls {
    ($($(#[$doc:meta])* $const:ident = $name:literal:
       $call:ident $(($of:ident))? => $answer:tt, $kind:ident;)+) => {
        /// Names of the methods.
        pub mod method {
            $($(#[$doc])* pub const $const: &str = $name;)+
        }
        $(calls!(@type [$(#[$doc])*] $call $($of)?);
        impl Call for $call {
            const METHOD: &'static str = $name;
            type Answer = calls!(@answer $answer);
            type Wire = calls!(@wire $answer);
            type Kind = $kind;
        })+
    };
    (@type [$($doc:tt)*] $call:ident $of:ident) => {
        $($doc)*
        #[derive(Debug, Clone, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $call(pub $of);
    };
    (@type [$($doc:tt)*] $call:ident) => {};
    (@answer ()) => { () };
    (@answer $answer:ident) => { $answer };
    (@wire ()) => { Done };
    (@wire $answer:ident) => { $answer };
}

calls! {
    /// How the agent is.
    GET_STATUS = "get_status": GetStatus => AgentStatus, Question;
    /// What the source has to give away.
    CHECK_SOURCE = "check_can_live_migrate_source": CheckSource => SourceFacts, Question;
    /// What the destination says to it.
    CHECK_DESTINATION = "check_can_live_migrate_destination":
        CheckDestination => DestinationFacts, Question;
    /// Whether the source reaches the destination; also removes the marks.
    CHECK_PATH = "check_migration_path": CheckPath => PathFacts, Question;
    /// On the destination: makes it ready.
    PRE_LIVE_MIGRATION = "pre_live_migration": PreLiveMigration => (), Act;
    /// On the source: starts the transfer, or finds it started; does not wait.
    LIVE_MIGRATION = "live_migration": LiveMigration => JobState, Question;
    /// On the source: where the transfer stands.
    GET_JOB = "get_live_migration": GetJob(StepRef) => JobState, Question;
    /// On the source: aborts the transfer.
    ABORT = "abort_live_migration": Abort(StepRef) => (), Question;
    /// On the source: the transfer ends soon, whatever it costs the guest.
    FORCE_COMPLETE = "force_complete_live_migration": ForceComplete(StepRef) => (), Question;
    /// On either side: where it sees the guest.
    LOCATE = "locate_instance": Locate(StepRef) => GuestLocation, Question;
    /// On either side: what it sees of its copy, evidence for what removes one.
    LOOK_AT_COPY = "look_at_instance_copy": LookAtCopy(StepRef) => CopySeen, Question;
    /// On the source after the switch-over: tidies.
    POST_LIVE_MIGRATION = "post_live_migration": PostLiveMigration => CleanUp, Removal;
    /// On the destination after the switch-over: tidies.
    POST_AT_DESTINATION = "post_live_migration_at_destination":
        PostAtDestination(StepRef) => CleanUp, Act;
    /// On the destination, only when the guest's copy on the source was seen whole.
    ROLLBACK_AT_DESTINATION = "rollback_live_migration_at_destination":
        RollbackAtDestination(RemoveCopy) => CleanUp, Removal;
    /// On the source: forgets a migration that ended there.
    ROLLBACK_AT_SOURCE = "rollback_live_migration_at_source": RollbackAtSource(StepRef) => (), Act;

    // Cold, in the order in which one uses them.

    /// On the destination: empty files for what will come, the door open.
    PREP_RESIZE = "prep_resize": PrepResize => Inbox, Act;
    /// On the source: starts a part of the work, or finds it started; does not wait.
    RESIZE_INSTANCE = "resize_instance": ResizeInstance => JobState, Question;
    /// On the source: stops the part under way.
    ABORT_RESIZE = "abort_resize": AbortResize(StepRef) => (), Act;
    /// On the source: keeps definition and disks aside, unable to start.
    SET_ASIDE = "set_aside_instance": SetAside => CleanUp, Act;
    /// On the destination: defines the guest and starts it if it ran.
    FINISH_RESIZE = "finish_resize": FinishResize => GuestLocation, Act;
    /// On the destination, only when another copy was seen whole: takes back what was made.
    ROLLBACK_RESIZE = "rollback_resize_at_destination":
        RollbackResize(RemoveCopy) => CleanUp, Removal;
    /// On the source: the guest is there as it was before.
    FINISH_REVERT_RESIZE = "finish_revert_resize": FinishRevertResize => GuestLocation, Act;
    /// On the destination: what came is on stable storage and is the guest's; the source's
    /// copy may go.
    CONFIRM_AT_DESTINATION = "confirm_resize_at_destination":
        ConfirmAtDestination(StepRef) => CleanUp, Act;
    /// On the source: removes what was set aside, as the destination's copy was seen whole.
    /// Without a survivor nothing is removed: a guest that was brought back by hand is let
    /// go of.
    CONFIRM_RESIZE = "confirm_resize": ConfirmResize(RemoveCopy) => CleanUp, Removal;
    /// On the destination: stops the guest and takes its definition away; the disks stay.
    REVERT_RESIZE = "revert_resize": RevertResize => GuestLocation, Removal;

    // Between projects, in the order in which a transfer uses them; all on the node where
    // the instance is and stays.

    /// What the node has to say before an instance changes hands there.
    CHECK_TRANSFER = "check_can_transfer_instance": CheckTransfer => TransferFacts, Question;
    /// Writes down what is to be done.
    PREP_TRANSFER = "prep_transfer": PrepTransfer => (), Act;
    /// Starts a part of the work, or finds it started; does not wait.
    TRANSFER_INSTANCE = "transfer_instance": TransferWork => JobState, Question;
    /// Stops the part under way.
    ABORT_TRANSFER = "abort_transfer": AbortTransfer(StepRef) => (), Act;
    /// The instance is the receiver's for good: removes what it had of the giver's.
    POST_TRANSFER = "post_transfer": PostTransfer(StepRef) => CleanUp, Act;
    /// Forgets a transfer that was taken back.
    ROLLBACK_TRANSFER = "rollback_transfer": RollbackTransfer(StepRef) => CleanUp, Act;

    // Of dead nodes, and of those that may be.

    /// An instance's lasting definition, while its node lives.
    GET_DEFINITION = "get_instance_definition":
        GetDefinition(InstanceOnNode) => KeptDefinition, Question;
    /// Measures for a second.
    MEASURE_DIRTY_RATE = "measure_dirty_rate":
        MeasureDirtyRate(InstanceOnNode) => DirtyRate, Question;
    /// Whether a node reaches an address.
    PROBE_ADDRESS = "probe_address": ProbeAddress => ProbeAnswer, Question;
    /// Which of a dead node's guests a node has active.
    FIND_ACTIVE = "find_active_instances": FindActive => Active, Question;
    /// On either node: what is in files; of long ones, how far reading is.
    GET_CONTENTS = "get_file_contents": GetContents => Contents, Question;
    /// On the new home: whether it can start a guest of a dead node.
    CHECK_EVACUATION = "check_can_rebuild_instance": CheckEvacuation => EvacuationFacts, Question;
    /// On the new home: defined, not started.
    PREP_REBUILD = "prep_rebuild_instance": RebuildInstance => (), Act;
    /// On the new home: starts what was defined; started already, it is that.
    REBUILD = "rebuild_instance": Rebuild(StepRef) => GuestLocation, Act;
    /// On the new home: the guest was seen to run; the evacuation is forgotten here.
    POST_REBUILD = "post_rebuild_instance": PostRebuild(StepRef) => CleanUp, Act;
    /// On the new home, only when the guest never ran there: takes the definition back.
    ROLLBACK_REBUILD = "rollback_rebuild_instance": RollbackRebuild(StepRef) => CleanUp, Removal;
}

/// Asks how an agent is.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct GetStatus {}

/// Names a step's subject.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepRef {
    /// The migration.
    pub migration: MigrationId,
    /// The instance it moves.
    pub instance: InstanceId,
}

/// A step, which has a subject.
pub trait Subject: serde::de::DeserializeOwned {
    /// What it is about.
    fn subject(&self) -> StepRef;
}

impl Subject for StepRef {
    fn subject(&self) -> StepRef {
        *self
    }
}

macro_rules! subjects {
    ($($step:ty: $($instance:ident).+;)*) => {
        $(impl Subject for $step {
            fn subject(&self) -> StepRef {
                StepRef {
                    migration: self.migration,
                    instance: self.$($instance).+,
                }
            }
        })*
    };
}

subjects! {
    CheckSource: instance;
    CheckDestination: guest.id;
    CheckPath: instance;
    PreLiveMigration: guest.id;
    LiveMigration: instance;
    PostLiveMigration: instance;
    PrepResize: instance;
    ResizeInstance: instance;
    SetAside: instance;
    FinishResize: instance;
    FinishRevertResize: instance;
    RevertResize: instance;
    RemoveCopy: instance;
    CheckTransfer: instance;
    PrepTransfer: instance;
    TransferWork: instance;
    CheckEvacuation: guest.id;
    RebuildInstance: instance;
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
    /// Which state directory it works from; none of an agent too old to say.
    #[serde(default)]
    pub state: Option<StateId>,
    /// Which incarnation of the node's agent it is.
    #[serde(default)]
    pub incarnation: u64,
    /// Why the conductor refuses its reports, if it does.
    #[serde(default)]
    pub refused: Option<String>,
    /// Versions of RPC that it speaks.
    #[serde(default, skip_serializing_if = "Spoken::is_unsaid")]
    pub speaks: Spoken,
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
    /// Look at the guest as it will be after its next start (for a cold
    /// migration), rather than as it is now.
    #[serde(default)]
    pub lasting: bool,
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
    /// The files that it uses, as seen there; of an agent too old to say, none.
    #[serde(default)]
    pub contents: Vec<FileContent>,
}

/// Ask a node which of these guests it has active.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FindActive {
    /// Guests.
    pub instances: Vec<InstanceId>,
}

/// Which of them are there.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Active {
    /// Those that are active, or on their way in.
    pub active: Vec<InstanceId>,
    /// Those of which it could not be seen at once.
    #[serde(default)]
    pub unseen: Vec<InstanceId>,
}

/// Ask a node what is in files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GetContents {
    /// Absolute paths.
    pub paths: Vec<String>,
}

/// What the node found, in the order in which it was asked. A digest that is
/// being computed is there later: ask again, within a minute.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Contents {
    /// File by file.
    pub files: Vec<FileContent>,
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
    /// What lies beside them, as seen from here.
    #[serde(default)]
    pub files: Vec<FileFact>,
    /// Port at which this node's agent takes disks of guests that are off, or
    /// why it does not.
    #[serde(default = "no_disk_port")]
    pub disk_port: Result<u16, String>,
    /// The files that the guest uses, as seen from here; of an agent too old to
    /// say, none.
    #[serde(default)]
    pub contents: Vec<FileContent>,
    /// Whether the guest could be bound to what it is bound to.
    #[serde(default)]
    pub addresses: Vec<AddressFact>,
    /// Whether the source's libvirt port can be reached from here, or why not.
    pub reach_source: Result<(), String>,
    /// A migration port that listens here for the source to try, or why none could.
    pub probe_port: Result<u16, String>,
}

fn no_disk_port() -> Result<u16, String> {
    Err("its agent is too old to take disks".to_owned())
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

/// A file beside the disks (an image under one, the firmware's variables, the
/// TPM's state) as the destination sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileFact {
    /// Absolute path, the same on both nodes.
    pub path: String,
    /// A file of that path is here.
    pub exists: bool,
    /// Its directory is here, or will be made.
    pub directory_exists: bool,
    /// Which file system its directory is on.
    pub file_system: String,
    /// Free room there, bytes.
    pub free_bytes: u64,
    /// How long it is, if it exists, bytes.
    #[serde(default)]
    pub length_bytes: u64,
    /// A domain of this node uses it, or, if it is a block device, the node itself.
    #[serde(default)]
    pub in_use: bool,
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
    /// Port at which its agent takes disks, if that is to be tried.
    #[serde(default)]
    pub disk_port: Option<u16>,
}

/// What the source found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathFacts {
    /// Whether the destination's libvirt port can be reached, or why not.
    pub libvirt: Result<(), String>,
    /// Whether the probe port can be reached, or why not.
    pub migration_port: Result<(), String>,
    /// Whether the disk port can be reached, or why not; `Ok` if it was not tried.
    #[serde(default = "not_tried")]
    pub disk_port: Result<(), String>,
}

fn not_tried() -> Result<(), String> {
    Ok(())
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
    /// What is there already and was found to be right: it must be so still.
    #[serde(default)]
    pub checked: Vec<CheckedFile>,
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
    /// Every file that the guest uses and that is not copied, as it was when it was
    /// compared; none from a conductor too old to say.
    #[serde(default)]
    pub checked: Option<Vec<CheckedFile>>,
    /// libvirt sends it already, and the destination has it as arriving: the agent
    /// that began it has forgotten that. It is watched to its end, and not begun.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub attach: bool,
    /// The disks that the guest had when it was decided which are copied; none from a
    /// conductor too old to say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disks: Option<Vec<KnownDisk>>,
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
    /// The copy on the destination, seen now. Without one nothing is removed.
    #[serde(default)]
    pub survivor: Option<Survivor>,
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
        /// Whether it lies with the guest (it writes faster than the link carries,
        /// does not shut down), which no other destination would change.
        #[serde(default)]
        of_guest: bool,
    },
    /// The source no longer has the guest, and nobody there saw how it went: it moved, or
    /// somebody took it away.
    Gone,
    /// One that this version does not know: where the guest is tells what became of it.
    #[serde(untagged)]
    Other(Unknown),
}

/// What a clean-up did. A failed part is a warning (invariant 2).
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CleanUp {
    /// Files that were removed.
    pub removed: Vec<String>,
    /// What did not work, and is tried again.
    pub warnings: Vec<String>,
    /// What was left for good, and why: it may be somebody's only copy.
    #[serde(default)]
    pub kept: Vec<String>,
    /// How long the guest stood still, measured by the hypervisor, ms. Known on
    /// the destination alone.
    #[serde(default)]
    pub downtime_ms: Option<u64>,
    /// How long the hypervisor's job took, ms. Known on the destination alone.
    #[serde(default)]
    pub total_ms: Option<u64>,
}

/// A file that a cold migration carries. Its path is the same on both nodes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CarriedFile {
    /// Absolute path.
    pub path: String,
    /// What it is to the guest.
    pub role: FileRole,
    /// The destination has a file of that path: it is compared, never written.
    pub present: bool,
    /// Bytes of data in it when the move was planned.
    pub data_bytes: u64,
    /// Of a [`FileRole::Delta`], what it lies over.
    #[serde(default)]
    pub over: Option<Frozen>,
}

/// A disk that is copied while its guest runs: frozen, with the guest's further
/// writes in a file over it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frozen {
    /// Name in the guest.
    pub target: String,
    /// Its image, which nobody writes meanwhile.
    pub image: String,
    /// That image's format.
    pub format: String,
}

/// What a file is to its guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileRole {
    /// An image under a disk: never written, perhaps by others used too.
    Backing,
    /// A disk that is a file.
    Disk,
    /// A disk that is a block device, on both nodes: written, never made nor removed.
    Device,
    /// What the guest wrote to a disk since that was frozen.
    Delta,
    /// The firmware's variables.
    Nvram,
    /// State of an emulated TPM.
    Tpm,
}

/// A disk that a guest writes alone, and where it was when the guest was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownDisk {
    /// Name in the guest.
    pub target: String,
    /// Absolute path.
    pub path: String,
}

impl KnownDisk {
    /// Those of a guest.
    pub fn of(guest: &Guest) -> Vec<Self> {
        let own = guest.disks.iter().filter(|d| d.is_copied_when_local());
        let known = own.filter_map(|disk| {
            Some(Self {
                target: disk.target.clone(),
                path: disk.local_path()?.to_owned(),
            })
        });
        known.collect()
    }
}

/// Make the destination ready for a guest that comes shut off.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PrepResize {
    /// The migration.
    pub migration: MigrationId,
    /// The instance.
    pub instance: InstanceId,
    /// What will come.
    pub files: Vec<CarriedFile>,
}

/// Where the destination takes files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inbox {
    /// TCP port, at the address of the node's endpoint.
    pub port: u16,
    /// The key to it, hexadecimal.
    pub token: String,
}

/// A part of the source's work in a cold migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ColdPart {
    /// What can be carried while the guest runs.
    PreCopy,
    /// The guest shuts down.
    Stop,
    /// What could not be carried before.
    Copy,
}

/// Do, or go on with, a part of the source's work.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ResizeInstance {
    /// The migration.
    pub migration: MigrationId,
    /// The instance.
    pub instance: InstanceId,
    /// Which part.
    pub part: ColdPart,
    /// Address of the destination.
    pub dest_address: String,
    /// Where the destination takes files.
    pub inbox: Inbox,
    /// Everything that will be carried, as the destination was told.
    pub files: Vec<CarriedFile>,
    /// The guest's definition before its disks stood still, where some are to: an
    /// agent that has lost its journal since finds a definition that names overlays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain: Option<String>,
    /// The disks that the guest had when it was decided what is carried, those on
    /// shared storage too; none from a conductor too old to say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disks: Option<Vec<KnownDisk>>,
    /// How.
    pub options: ColdOptions,
}

/// What the source of a cold migration needs to go on with it, or to take it back,
/// when its agent has lost its journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ColdMemory {
    /// Everything that is carried, as the source was told when it began.
    pub files: Vec<CarriedFile>,
    /// The guest's lasting definition before anything happened to it: libvirt's XML,
    /// without secrets.
    pub domain: String,
}

/// Keep the guest's definition and disks so that nothing starts it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetAside {
    /// The migration.
    pub migration: MigrationId,
    /// The instance.
    pub instance: InstanceId,
    /// For a source that knows nothing of the migration any more. All of the guest
    /// was carried, and no node has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<ColdMemory>,
}

/// Define the guest that has come, and start it if it ran.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FinishResize {
    /// The migration.
    pub migration: MigrationId,
    /// The instance.
    pub instance: InstanceId,
    /// Whether it is to run. Only with proof that it runs nowhere else.
    pub start: bool,
    /// Its new size, if that changes.
    pub flavor: Option<Flavor>,
    /// Every file that the guest uses and that was not carried, as it was when it
    /// was compared; none from a conductor too old to say.
    #[serde(default)]
    pub checked: Option<Vec<CheckedFile>>,
}

/// Have the guest on its source as it was before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FinishRevertResize {
    /// The migration.
    pub migration: MigrationId,
    /// The instance.
    pub instance: InstanceId,
    /// The other node was asked just now and does not run it (invariant 1).
    pub runs_nowhere_else: bool,
    /// It ran when the migration began. An agent that has lost its journal since found
    /// it off, where it had asked it to go off itself.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ran: bool,
    /// For a source that knows nothing of the migration any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<ColdMemory>,
    /// Somebody has brought the guest to another node: here it is left off.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_elsewhere: bool,
}

/// Stop the guest on its destination and take its definition away.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RevertResize {
    /// The migration.
    pub migration: MigrationId,
    /// The instance.
    pub instance: InstanceId,
    /// The copy that the source keeps aside, seen now. Without one nothing is
    /// stopped.
    #[serde(default)]
    pub survivor: Option<Survivor>,
}

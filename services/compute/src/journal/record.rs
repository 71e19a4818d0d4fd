//! What the journal's files say.

use std::collections::BTreeMap;

use drover_model::{
    api::compute::{
        CarriedFile, CleanUp, ColdPart, Doing, Ended as How, FileRole, Frozen, JobState,
        LiveMigration, Mark, Outcome, TransferPart, TransferPlan,
    },
    content::CheckedFile,
    guest::Disk,
    ids::InstanceId,
    migration::{Decision, Progress, TransferOptions},
};
use serde::{Deserialize, Serialize};

use super::Shelved;
use crate::hypervisor::{Definition, Overlay, Standing};

/// What this node does for a migration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "role", rename_all = "snake_case")]
pub enum Record {
    /// It gives the guest away.
    Source(Box<SourceRecord>),
    /// It takes the guest.
    Destination(DestinationRecord),
    /// It gives the guest away, shut off.
    Leaving(Box<LeavingRecord>),
    /// It takes the guest, shut off.
    Coming(Box<ComingRecord>),
    /// The guest stays and changes hands.
    Transfer(Box<TransferRecord>),
    /// It is the new home of a guest of a dead node.
    Rebuild(Box<RebuildRecord>),
}

impl Record {
    /// The instance that moves.
    pub fn instance(&self) -> InstanceId {
        match self {
            Self::Source(record) => record.request.instance,
            Self::Destination(record) => record.instance,
            Self::Leaving(record) => record.instance,
            Self::Coming(record) => record.instance,
            Self::Transfer(record) => record.instance,
            Self::Rebuild(record) => record.instance,
        }
    }

    /// Files and devices of this node that are promised to the migration: those that it
    /// makes here, and those to which its guest may go back once it is set aside.
    pub(crate) fn places(&self) -> Vec<String> {
        match self {
            Self::Destination(record) => record.places(),
            Self::Leaving(record) => record.devices.clone(),
            Self::Coming(record) => record.places(),
            Self::Source(_) | Self::Transfer(_) | Self::Rebuild(_) => Vec::new(),
        }
    }
}

impl Shelved for Record {
    type Summary = Doing;

    fn summary(&self) -> Doing {
        match self {
            Self::Source(_) => Doing::Sending,
            Self::Destination(_) => Doing::Arriving,
            Self::Leaving(record) if record.aside => Doing::SetAside,
            Self::Leaving(_) => Doing::Leaving,
            Self::Coming(_) => Doing::Coming,
            Self::Transfer(_) => Doing::Transferring,
            Self::Rebuild(_) => Doing::Rebuilding,
        }
    }
}

impl Shelved for MarksRecord {
    type Summary = ();

    fn summary(&self) {}
}

/// A migration from this node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SourceRecord {
    /// What the conductor asked for.
    pub request: LiveMigration,
    /// The disks it copies: all that may be removed here afterwards.
    pub disks: Vec<CopiedDisk>,
    /// The guest's memory, bytes.
    pub memory_bytes: u64,
    /// Whether the guest ran (rather than stood paused) when it began.
    pub was_running: bool,
    /// Whether a force-complete was about to pause the guest.
    pub paused_by_force_complete: bool,
    /// The guest's generation when it began.
    #[serde(default)]
    pub generation: u64,
    /// When it began, milliseconds since 1970.
    pub started_at_ms: u64,
    /// Fingerprint of its lasting definition just before, which the hypervisor takes
    /// along as it was then. None of one that has none, and from a version that did not
    /// look.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lasting: Option<String>,
    /// What was decided on the way, the last few.
    pub decisions: Vec<Decision>,
    /// How it ended; none while it is being sent.
    pub ended: Option<Ended>,
}

/// A disk that a migration copies, on its source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopiedDisk {
    /// Name in the guest.
    pub target: String,
    /// Where it is here.
    pub path: String,
}

/// How a transfer ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ended {
    /// How.
    pub outcome: Outcome,
    /// The last sample.
    pub progress: Progress,
}

/// A migration to this node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DestinationRecord {
    /// The instance. libvirt had no such domain when this was written.
    pub instance: InstanceId,
    /// Disks to create: all that may be removed here if the guest does not come.
    pub disks: Vec<NewDisk>,
    /// Whether all of them are there.
    pub prepared: bool,
    /// The guest was seen to be active here: nothing of it is taken back any more.
    #[serde(default)]
    pub ran_here: bool,
    /// By path: the numbers of the files that hold the places of the disks, and become
    /// these.
    #[serde(default)]
    pub inodes: Inodes,
}

/// By path: the number that a file has on its storage.
pub type Inodes = BTreeMap<String, u64>;

/// A disk that a migration creates on its destination. Nothing was at its path when the
/// intent was written; an empty file comes first. Until that has a number in the record,
/// what is there and is not empty is somebody else's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NewDisk {
    /// What to create.
    pub disk: Disk,
    /// Where.
    pub path: String,
    /// Whether it is known to be whole.
    pub created: bool,
}

/// A cold migration from this node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LeavingRecord {
    /// The instance.
    pub instance: InstanceId,
    /// Whether the guest ran when it began, and so is to run in the end.
    pub was_running: bool,
    /// Whether it was, or was about to be, asked to shut down.
    pub asked_to_stop: bool,
    /// Parts that are done.
    pub done: Vec<ColdPart>,
    /// Parts that were begun.
    pub begun: Vec<ColdPart>,
    /// Its definition, from when its disks were sent.
    pub definition: Option<Definition>,
    /// Disks that were frozen, or are to be, so that they can be copied beforehand.
    #[serde(default)]
    pub overlays: Vec<Overlay>,
    /// Files that are set aside, or are to be.
    pub kept: Vec<KeptFile>,
    /// Block devices of the guest, which keep name and content while it is set aside.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<String>,
    /// Images under them, which stay where they are.
    #[serde(default)]
    pub under: Vec<String>,
    /// The guest's generation when it began.
    #[serde(default)]
    pub generation: u64,
    /// Whether this agent has withdrawn the definition, or was about to. (A version
    /// that did not write it down may have.)
    #[serde(default = "perhaps")]
    pub withdrawn: bool,
    /// Whether all that is done.
    pub aside: bool,
    /// Its own files as they were before they were sent. None from a version that did
    /// not look, of an agent that forgot, and once all is aside.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sent: Vec<SentFile>,
    /// How its domain was defined then, or when its disks were frozen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sent_as: Option<Definition>,
    /// What was aside is brought back, up to its definition: that of the guest here is
    /// this agent's, or is about to be.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub defines: bool,
    /// How far its disks are off their overlays again.
    #[serde(default, skip_serializing_if = "Thaw::is_not_begun")]
    pub thaw: Thaw,
}

/// Whether what an overlay holds is newer than the image under it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Thaw {
    /// It is: the overlays are the newest there is.
    #[default]
    NotBegun,
    /// It is where the guest still has its disk on it.
    Begun,
    /// It is not, unless the guest was started on it since: what was merged is to be
    /// defined.
    Merged,
    /// It is not: all of them are merged, and the guest may have written since.
    Done,
}

impl Thaw {
    #[allow(clippy::trivially_copy_pass_by_ref)] // serde asks so
    fn is_not_begun(&self) -> bool {
        *self == Self::NotBegun
    }
}

/// A file that is sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SentFile {
    /// Where the guest has it.
    pub path: String,
    /// Changes when the file does.
    pub stamp: String,
}

impl LeavingRecord {
    /// Whether a file is an overlay, which goes with the image under it.
    pub(crate) fn is_overlay(&self, path: &str) -> bool {
        self.overlays.iter().any(|overlay| overlay.path == path)
    }
}

fn perhaps() -> bool {
    true
}

/// A file that is set aside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptFile {
    /// Where the guest has it.
    pub path: String,
    /// Where it is while set aside.
    pub kept: String,
}

/// A cold migration to this node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ComingRecord {
    /// The instance. libvirt had no such domain when this was written.
    pub instance: InstanceId,
    /// Its files, in the order in which both sides name them.
    pub files: Vec<ComingFile>,
    /// The key to the door through which they come, hexadecimal.
    pub token: String,
    /// Whether the files are reserved.
    pub prepared: bool,
    /// The guest's definition, once it has come whole.
    pub definition: Option<Definition>,
    /// Whether it was, or was about to be, started here: its files are not taken
    /// back any more, unless it is reverted.
    #[serde(default)]
    pub ran_here: bool,
    /// Whether it was once here as it was to be: what becomes of it then is its
    /// owner's doing.
    #[serde(default)]
    pub arrived: bool,
    /// It is to be reverted; whether it was active when that was asked for.
    #[serde(default)]
    pub reverted: Option<bool>,
    /// By path: the numbers of its images as they were made.
    #[serde(default)]
    pub inodes: Inodes,
    /// The overlays that are merged into their images, by path. A version before this
    /// wrote none down.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub absorbed: Vec<String>,
}

impl DestinationRecord {
    /// The disks that the migration makes here.
    pub(crate) fn places(&self) -> Vec<String> {
        self.disks.iter().map(|disk| disk.path.clone()).collect()
    }

    /// Whether what is at a disk's place is the migration's own, whatever is in it.
    pub(crate) fn has_made(&self, disk: &NewDisk) -> bool {
        self.prepared || disk.created || self.inodes.contains_key(&disk.path)
    }
}

impl ComingRecord {
    /// What the migration writes here.
    pub(crate) fn places(&self) -> Vec<String> {
        let written = self.files.iter().filter(|file| !file.present);
        written.map(|file| file.path.clone()).collect()
    }

    /// Whether an overlay is known to be merged: before the guest was here, all were.
    pub(crate) fn has_absorbed(&self, overlay: &str) -> bool {
        self.ran_here || self.arrived || self.absorbed.iter().any(|path| path == overlay)
    }
}

/// A file of a guest that comes. One that is not `present` was not there when
/// the intent was written: what is there now is the migration's own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ComingFile {
    /// Where.
    pub path: String,
    /// What it is to the guest.
    pub role: FileRole,
    /// It was there before: compared, never written nor removed.
    pub present: bool,
    /// Of a delta, what it lies over.
    #[serde(default)]
    pub over: Option<Frozen>,
}

impl ComingFile {
    /// Whether it has to be there before anything comes.
    pub fn must_exist(&self) -> bool {
        self.present || self.role == FileRole::Device
    }

    /// Whether the migration makes it, and so may remove it.
    pub fn is_made(&self) -> bool {
        !self.must_exist()
    }
}

impl From<&CarriedFile> for ComingFile {
    fn from(file: &CarriedFile) -> Self {
        Self {
            path: file.path.clone(),
            role: file.role,
            present: file.present,
            over: file.over.clone(),
        }
    }
}

impl From<&ComingFile> for CarriedFile {
    fn from(file: &ComingFile) -> Self {
        Self {
            path: file.path.clone(),
            role: file.role,
            present: file.present,
            data_bytes: 0,
            over: file.over.clone(),
        }
    }
}

/// A transfer to another project on this node. Nothing was at the places where
/// its plan puts disks when this was written: what is there now is the transfer's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TransferRecord {
    /// The instance.
    pub instance: InstanceId,
    /// What changes.
    pub plan: TransferPlan,
    /// How.
    pub options: TransferOptions,
    /// Whether the places of its disks are taken by files of its own.
    pub reserved: bool,
    /// Whether the guest ran when it began, and so is to run in the end.
    pub was_running: bool,
    /// Its lasting definition before.
    pub definition: Definition,
    /// Its NICs and metadata before, if it runs on.
    pub standing: Option<Standing>,
    /// Parts that were begun.
    pub begun: Vec<TransferPart>,
    /// Parts that are done.
    pub done: Vec<TransferPart>,
}

/// An evacuation to this node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RebuildRecord {
    /// The instance. libvirt had no such domain when this was written.
    pub instance: InstanceId,
    /// Its definition as its dead node told it last.
    pub domain: String,
    /// Generation that it is defined with: what has it is this evacuation's own.
    pub generation: u64,
    /// Whether it was, or was about to be, started. Not if the hypervisor refused to.
    pub started: bool,
    /// Files that it only reads, as they were when they were compared.
    #[serde(default)]
    pub checked: Vec<CheckedFile>,
}

/// What was seen of a migration here.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SeenRecord {
    /// The instance.
    pub instance: InstanceId,
    /// The highest epoch under which a step was asked for.
    pub epoch: u64,
    /// Whether a [`Record`] of it was written.
    #[serde(default)]
    pub begun: bool,
    /// How it ended here.
    #[serde(default)]
    pub over: Option<Over>,
    /// When this was written last, milliseconds since 1970.
    pub at_ms: u64,
}

/// How a migration ended here.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Over {
    /// Under which epoch.
    pub epoch: u64,
    /// How.
    pub how: How,
    /// How the transfer ended, if this was the source.
    #[serde(default)]
    pub job: Option<JobState>,
    /// What the last step answered.
    #[serde(default)]
    pub clean_up: CleanUp,
}

/// What is kept in memory of a [`SeenRecord`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// The instance.
    pub instance: InstanceId,
    /// The highest epoch.
    pub epoch: u64,
    /// Whether a record of it was written.
    pub begun: bool,
    /// How it ended, and under which epoch.
    pub how: Option<(How, u64)>,
    /// When it was written last, milliseconds since 1970.
    pub at_ms: u64,
}

impl Shelved for SeenRecord {
    type Summary = Seen;

    fn summary(&self) -> Seen {
        Seen {
            instance: self.instance,
            epoch: self.epoch,
            begun: self.begun,
            how: self.over.as_ref().map(|over| (over.how, over.epoch)),
            at_ms: self.at_ms,
        }
    }
}

/// Marks that were left, or were about to be.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MarksRecord {
    /// The disks beside which they lie.
    pub disks: Vec<Disk>,
    /// The marks, once they are there.
    pub marks: Vec<Mark>,
}

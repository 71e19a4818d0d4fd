//! A typed refusal (invariant 8): which check failed, on which side, what was
//! seen, and what to do about it.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::unknown::Word;

/// One failed check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckFailure {
    /// Machine-readable code.
    pub code: CheckCode,
    /// Where the trouble is.
    pub side: Side,
    /// What was found, with the values seen.
    pub message: String,
    /// What an operator can do about it.
    pub remedy: String,
}

impl fmt::Display for CheckFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}): {}", self.code, self.side, self.message)
    }
}

/// Failed checks as one line.
pub fn texts(failures: &[CheckFailure]) -> String {
    let texts: Vec<String> = failures.iter().map(ToString::to_string).collect();
    texts.join("; ")
}

/// Where a failed check points.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// The request itself.
    Request,
    /// The instance.
    Instance,
    /// The node it runs on.
    Source,
    /// The node it is to go to.
    Destination,
    /// What lies between them.
    Path,
    /// The project that gives or gets it.
    Project,
    /// One that this version does not know.
    #[serde(untagged)]
    Other(Word),
}

macro_rules! codes {
    ($($(#[$doc:meta])* $variant:ident => $text:literal,)*) => {
        /// Every check there is. The text is what stands in JSON and tables.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        pub enum CheckCode {
            $($(#[$doc])* #[serde(rename = $text)] $variant,)*
            /// One that this version does not know.
            #[serde(untagged)]
            Other(Word),
        }

        impl CheckCode {
            /// All codes, for tests that want every one of them to be reachable.
            pub const ALL: &'static [CheckCode] = &[$(CheckCode::$variant,)*];

            /// The code as text.
            pub fn as_str(&self) -> &str {
                match self {
                    $(Self::$variant => $text,)*
                    Self::Other(word) => word.as_str(),
                }
            }
        }
    };
}

codes! {
    /// Its state does not allow this move.
    InstanceState => "instance_state",
    /// It cannot be read on its node.
    InstanceUnreadable => "instance_unreadable",
    /// A copy of it is active on another node.
    TwoCopies => "two_copies",
    /// Another operation has the node.
    HostBusy => "host_busy",
    /// Another operation has it.
    InstanceBusy => "instance_busy",
    /// The source's libvirt no longer has it, or never had.
    InstanceMissing => "instance_missing",
    /// libvirt is doing something else with it (backup, block job, …).
    InstanceJob => "instance_job",
    /// Source and destination are one node.
    SameHost => "same_host",
    /// No such node.
    UnknownHost => "unknown_host",
    /// No node is fit to take it.
    NoValidHost => "no_valid_host",
    /// The node was switched off for new instances.
    HostDisabled => "host_disabled",
    /// Nothing was heard of the node for too long, or its agent does not answer.
    HostDown => "host_down",
    /// The node's agent and the conductor have no version in common, or do not
    /// understand each other.
    Version => "version",
    /// The node's agent is up and its libvirt is not.
    LibvirtDown => "libvirt_down",
    /// One node cannot reach the other's libvirt.
    LibvirtUnreachable => "libvirt_unreachable",
    /// The source cannot reach a migration port of the destination.
    MigrationPortUnreachable => "migration_port_unreachable",
    /// Another kind of hypervisor.
    HypervisorType => "hypervisor_type",
    /// The destination's hypervisor or libvirt is older than the source's.
    HypervisorVersion => "hypervisor_version",
    /// Another architecture.
    Architecture => "architecture",
    /// KVM guest, and no KVM there.
    VirtType => "virt_type",
    /// The destination's QEMU does not know the machine type.
    MachineType => "machine_type",
    /// The emulator is not there.
    Emulator => "emulator",
    /// The guest's CPU has what the destination's lacks.
    Cpu => "cpu",
    /// Not enough memory left.
    Memory => "memory",
    /// Not enough vCPUs left.
    Vcpus => "vcpus",
    /// Not enough room for its disks.
    DiskSpace => "disk_space",
    /// The destination lacks the directory of a disk.
    DiskDirectory => "disk_directory",
    /// A file stands where a disk is to be copied to.
    DiskExists => "disk_exists",
    /// Disks are not shared, and copying was forbidden or can no more be done.
    DiskNotShared => "disk_not_shared",
    /// Disks are shared and copying was demanded.
    DiskShared => "disk_shared",
    /// A shared disk is cached by the host.
    DiskCache => "disk_cache",
    /// A disk that cannot be copied while the guest runs.
    DiskNotCopyable => "disk_not_copyable",
    /// A base image is missing at the destination.
    BackingImage => "backing_image",
    /// A file that is used and not copied is another one there, or nobody can tell.
    FileContent => "file_content",
    /// The guest is bound to an address that the destination does not have.
    BoundAddress => "bound_address",
    /// A bridge or network is missing at the destination, or the receiver has
    /// none that fits.
    Network => "network",
    /// A device of the host.
    HostDevice => "host_device",
    /// A mediated device.
    MediatedDevice => "mediated_device",
    /// A shared directory.
    Filesystem => "filesystem",
    /// Another device or setting that ties the guest to its node.
    ImmovableDevice => "immovable_device",
    /// Snapshots that block.
    Snapshots => "snapshots",
    /// The destination has a domain with this UUID.
    UuidTaken => "uuid_taken",
    /// The destination has another domain with this name, or the receiving
    /// project an instance.
    NameTaken => "name_taken",
    /// Options that exclude each other or that a side cannot do.
    Options => "options",
    /// No such project.
    UnknownProject => "unknown_project",
    /// The project may not get instances.
    ProjectDisabled => "project_disabled",
    /// The instance is that project's already.
    SameProject => "same_project",
    /// More than the project may have.
    Quota => "quota",
    /// The receiver has no storage here, or it cannot be used.
    Storage => "storage",
    /// Another guest uses a disk too.
    DiskInUse => "disk_in_use",
    /// A node that is to be evacuated is not down.
    HostUp => "host_up",
    /// A node that is said to be off shows that it is not.
    HostAlive => "host_alive",
    /// Nothing proves that the node is off.
    NotFenced => "not_fenced",
    /// What is known of the node does not suffice to cut its power unattended.
    NoEvidence => "no_evidence",
    /// As many nodes were fenced within the hour as may be unattended.
    FenceLimit => "fence_limit",
    /// So many nodes are silent that the conductor may be the one that is cut off.
    TooManyLost => "too_many_lost",
    /// Its node never told how it is defined.
    NoDefinition => "no_definition",
    /// Its definition has a secret, which is told to nobody.
    DefinitionSecret => "definition_secret",
    /// A guest of the same anti-affinity group is there, or on its way.
    AntiAffinity => "anti_affinity",
}

impl fmt::Display for CheckCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Request => "request",
            Self::Instance => "instance",
            Self::Source => "source",
            Self::Destination => "destination",
            Self::Path => "path",
            Self::Project => "project",
            Self::Other(word) => word.as_str(),
        })
    }
}

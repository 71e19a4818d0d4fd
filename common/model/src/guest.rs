//! A guest as its hypervisor describes it: the part of a domain that decides
//! whether and how it can move.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{
    content::{BoundAddress, ReadFile},
    ids::InstanceId,
    unknown::Word,
};

/// Where a domain stands, in Nova's words for libvirt's states.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PowerState {
    /// vCPUs run.
    Running,
    /// Stopped by somebody, memory in place.
    Paused,
    /// Not running; the definition is there.
    Shutdown,
    /// The guest or its QEMU crashed.
    Crashed,
    /// Suspended by the guest's own power management.
    Suspended,
    /// One that this version does not know.
    #[serde(untagged)]
    Other(Word),
}

impl PowerState {
    /// Whether a QEMU process holds the guest's memory.
    pub fn is_active(self) -> bool {
        // What is not known may be running.
        !matches!(self, Self::Shutdown | Self::Crashed)
    }
}

/// As people say it.
impl fmt::Display for PowerState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Shutdown => "shut off",
            Self::Crashed => "crashed",
            Self::Suspended => "suspended",
            Self::Other(word) => word.as_str(),
        })
    }
}

/// What a node knows of a guest when asked where it is (invariant 3: a node
/// that cannot tell answers with an error, never with `Absent`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Presence {
    /// libvirt was asked and has no such domain.
    Absent,
    /// A QEMU waits here for a migration to arrive; it has never run here.
    Incoming,
    /// The domain is here, in this state.
    Present(PowerState),
}

/// As people say it.
impl fmt::Display for Presence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Absent => f.write_str("absent"),
            Self::Incoming => f.write_str("about to arrive"),
            Self::Present(state) => state.fmt(f),
        }
    }
}

impl Presence {
    /// Whether the guest's one running copy is here.
    pub fn is_active(self) -> bool {
        matches!(self, Self::Present(state) if state.is_active())
    }

    /// Whether a QEMU is here for it, be it that its guest is still to come.
    pub fn has_qemu(self) -> bool {
        self.is_active() || self == Self::Incoming
    }

    /// The state of a domain that is here.
    pub fn power_state(self) -> Option<PowerState> {
        match self {
            Self::Present(state) => Some(state),
            Self::Absent | Self::Incoming => None,
        }
    }
}

/// A guest, read from its live definition.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Guest {
    /// Domain UUID.
    pub id: InstanceId,
    /// Domain name.
    pub name: String,
    /// Owning project, from the domain's metadata (Drover's or Nova's).
    pub project: String,
    /// How often the instance has been rebuilt elsewhere; 0 if it never was.
    pub generation: u64,
    /// State now.
    pub power_state: PowerState,
    /// Whether the definition outlives the process.
    pub persistent: bool,
    /// vCPUs.
    pub vcpus: u32,
    /// Memory, MiB.
    pub memory_mib: u64,
    /// `kvm` or `qemu`.
    pub virt_type: String,
    /// `x86_64`, ….
    pub arch: String,
    /// Machine type as the running guest has it (`pc-q35-7.2`, never an alias).
    pub machine: String,
    /// Path of the emulator.
    pub emulator: String,
    /// The live definition's `<cpu>` element, for the destination to compare.
    pub cpu_xml: Option<String>,
    /// Its disks, CD-ROMs and floppies.
    pub disks: Vec<Disk>,
    /// Its network interfaces.
    pub nics: Vec<Nic>,
    /// Devices that tie it to this node, one by one.
    pub immovable: Vec<Immovable>,
    /// Files beside its disks that belong to it.
    #[serde(default)]
    pub files: Vec<GuestFile>,
    /// Further files that its definition names, which it only reads.
    #[serde(default)]
    pub reads: Vec<ReadFile>,
    /// Addresses of its node to which it is bound.
    #[serde(default)]
    pub bound: Vec<BoundAddress>,
    /// Names of snapshots that libvirt keeps for it.
    pub snapshots: Vec<String>,
    /// Those of them that are not all inside the disks' images.
    #[serde(default)]
    pub external_snapshots: Vec<String>,
    /// Its images that hold snapshots, whether libvirt knows of those or not: who copies
    /// what the guest sees leaves them behind.
    #[serde(default)]
    pub images_with_snapshots: Vec<String>,
    /// It has an emulated TPM whose state is removed with the definition by a libvirt that
    /// cannot keep it; of an agent too old to say, no.
    #[serde(default)]
    pub tpm_goes_with_definition: bool,
    /// A job that libvirt is running on it (backup, migration, …), in words.
    pub active_job: Option<String>,
}

impl Guest {
    /// Whether an image holds snapshots while libvirt lists none of the guest: those that
    /// it lists are named already.
    pub fn has_unlisted_snapshots(&self, path: &str) -> bool {
        self.snapshots.is_empty() && self.images_with_snapshots.iter().any(|p| p == path)
    }

    /// Whether it has a TPM whose state is in files.
    pub fn has_emulated_tpm(&self) -> bool {
        let mut kinds = self.immovable.iter().map(|i| i.kind);
        kinds.any(|kind| kind == ImmovableKind::EmulatedTpm)
    }
}

/// A drive of a guest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Disk {
    /// Name in the guest (`vda`): libvirt's handle for it.
    pub target: String,
    /// `disk`, `cdrom`, `floppy` or `lun`.
    pub device: String,
    /// Where its bytes are.
    pub source: DiskSource,
    /// Image format as the definition says (never probed).
    pub format: String,
    /// Host cache mode as the definition says (`none`, `writeback`, …), if it does.
    #[serde(default)]
    pub cache: Option<String>,
    /// The guest cannot write it.
    pub read_only: bool,
    /// Marked as shared between guests.
    pub shareable: bool,
    /// Size the guest sees, bytes.
    pub virtual_bytes: u64,
    /// Room it takes on this node, bytes.
    pub allocated_bytes: u64,
    /// Images below it, nearest first.
    pub backing: Vec<BackingImage>,
}

impl Disk {
    /// The file or device on this node, if its bytes are on this node.
    pub fn local_path(&self) -> Option<&str> {
        match &self.source {
            DiskSource::File { path } | DiskSource::Block { path } => Some(path),
            DiskSource::Network { .. } | DiskSource::Empty | DiskSource::Other { .. } => None,
        }
    }

    /// Whether both nodes see the same bytes at every moment when it lies on
    /// storage that they share: a host cache would hide one's writes from the other.
    pub fn is_coherent_when_shared(&self) -> bool {
        self.read_only || matches!(self.cache.as_deref(), Some("none" | "directsync"))
    }

    /// Whether a move without shared storage must carry its bytes.
    pub fn is_copied_when_local(&self) -> bool {
        self.local_path().is_some() && !self.read_only && !self.shareable
    }
}

/// Where a disk's bytes are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum DiskSource {
    /// A file.
    File {
        /// Absolute path.
        path: String,
    },
    /// A block device.
    Block {
        /// Absolute path.
        path: String,
    },
    /// On the network: reachable from both nodes alike.
    Network {
        /// `rbd`, `iscsi`, `nbd`, ….
        protocol: String,
        /// Name there.
        name: String,
    },
    /// A drive with nothing in it.
    Empty,
    /// Anything Drover cannot carry (directory, vhost-user, NVMe, …).
    Other {
        /// libvirt's word for it.
        kind: String,
    },
}

/// An image under a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackingImage {
    /// Absolute path.
    pub path: String,
    /// Its format.
    pub format: String,
    /// Room it takes on this node, bytes.
    #[serde(default)]
    pub allocated_bytes: u64,
}

/// A file that belongs to a guest and is no disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestFile {
    /// Absolute path.
    pub path: String,
    /// What it holds.
    pub kind: GuestFileKind,
    /// Room it takes on this node, bytes.
    pub allocated_bytes: u64,
}

/// What a guest's file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GuestFileKind {
    /// Variables of its firmware.
    Nvram,
    /// State of its emulated TPM.
    Tpm,
}

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    /// MAC address, lower case.
    pub mac: String,
    /// What it is plugged into.
    pub attachment: NicAttachment,
    /// What its port has of its own there (VLAN, port group, port profile), in words.
    #[serde(default)]
    pub port: Option<String>,
}

/// What a network interface is plugged into on its node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum NicAttachment {
    /// A bridge of the host.
    Bridge {
        /// Its name.
        bridge: String,
    },
    /// A libvirt network.
    Network {
        /// Its name.
        network: String,
    },
    /// macvtap on a host's interface.
    Direct {
        /// Name of that interface.
        device: String,
    },
    /// QEMU's own user-mode network: needs nothing from the node.
    User,
    /// Anything else.
    Other {
        /// libvirt's word for it.
        kind: String,
    },
}

/// A device or setting that cannot leave its node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Immovable {
    /// What kind.
    pub kind: ImmovableKind,
    /// Which one, as the operator knows it (PCI address, mount tag, path, …).
    pub what: String,
}

/// Kinds of devices and settings that cannot live-migrate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImmovableKind {
    /// A PCI, USB or SCSI device of the host.
    HostDevice,
    /// A mediated device (vGPU).
    MediatedDevice,
    /// A directory of the host shared into the guest (virtiofs, 9p).
    Filesystem,
    /// A TPM whose hardware stays on the node.
    Tpm,
    /// An emulated TPM, whose state is in files of the node: they follow a guest
    /// that is off.
    EmulatedTpm,
    /// A non-volatile memory device backed by the node.
    Nvdimm,
    /// Memory encrypted with a key of this node's processor (SEV).
    LaunchSecurity,
    /// A disk kind that cannot be carried.
    Disk,
    /// An interface that belongs to the node's hardware (SR-IOV, vDPA).
    Interface,
    /// A character device connected to the node's own hardware or pipes.
    CharacterDevice,
}

//! What a fake guest is made from.

use std::time::Duration;

use drover_model::{
    DEFAULT_PROJECT,
    content::{BoundAddress, ReadFile},
    guest::{
        BackingImage, Disk, DiskSource, Guest, GuestFile, GuestFileKind, Immovable, ImmovableKind,
        Nic, NicAttachment, PowerState,
    },
    ids::InstanceId,
};

use super::{
    answers::TPM_STATE,
    node::{Habits, Manner, Notes},
    storage::is_device,
    transfer::MemoryLoad,
};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// Room that the firmware's variables take, bytes.
const NVRAM_BYTES: u64 = 528 * 1024;
/// Room that a TPM's state takes, bytes.
const TPM_BYTES: u64 = 8 * 1024;
/// How long a guest takes to shut down unless told otherwise.
const SHUTDOWN: Duration = Duration::from_secs(3);
/// How much of a CPU an idle guest keeps busy, percent.
const IDLE_PERCENT: u64 = 1;

/// A guest to be. Idle, running, diskless, one vCPU, 512 MiB, one NIC on
/// `br-guests`, off 3 s after it is asked to shut down, unless told otherwise.
#[derive(Debug, Clone)]
pub struct GuestBuilder {
    guest: Guest,
    id: Option<InstanceId>,
    dirty_mib_s: u64,
    working_set_mib: Option<u64>,
    has_tpm: bool,
    obeys_after: Option<Duration>,
    in_shutdown: Duration,
    cpu_percent: u64,
    rss_mib: Option<u64>,
    notes: Notes,
    autostart: bool,
}

impl GuestBuilder {
    /// A guest of that name.
    pub fn new(name: &str) -> Self {
        Self {
            guest: plain_guest(name),
            id: None,
            dirty_mib_s: 0,
            working_set_mib: None,
            has_tpm: false,
            obeys_after: Some(SHUTDOWN),
            in_shutdown: Duration::ZERO,
            cpu_percent: IDLE_PERCENT,
            rss_mib: None,
            notes: Notes::default(),
            autostart: false,
        }
    }

    /// Its UUID; otherwise the fabric draws one.
    pub fn id(mut self, id: InstanceId) -> Self {
        self.id = Some(id);
        self
    }

    /// Its project.
    pub fn project(mut self, project: &str) -> Self {
        project.clone_into(&mut self.guest.project);
        self
    }

    /// Its state to begin with.
    pub fn state(mut self, state: PowerState) -> Self {
        self.guest.power_state = state;
        self
    }

    /// Defined only as long as it runs.
    pub fn transient(mut self) -> Self {
        self.guest.persistent = false;
        self
    }

    /// Its vCPUs.
    pub fn vcpus(mut self, vcpus: u32) -> Self {
        self.guest.vcpus = vcpus;
        self
    }

    /// Its memory, MiB.
    pub fn memory_mib(mut self, memory_mib: u64) -> Self {
        self.guest.memory_mib = memory_mib;
        self
    }

    /// How fast it writes memory, MiB/s.
    pub fn dirty_mib_s(mut self, dirty_mib_s: u64) -> Self {
        self.dirty_mib_s = dirty_mib_s;
        self
    }

    /// How much of its memory it writes to, MiB; all of it otherwise.
    pub fn working_set_mib(mut self, working_set_mib: u64) -> Self {
        self.working_set_mib = Some(working_set_mib);
        self
    }

    /// How much of a CPU it keeps busy, percent.
    pub fn cpu_percent(mut self, cpu_percent: u64) -> Self {
        self.cpu_percent = cpu_percent;
        self
    }

    /// Memory of its node that it holds while it is active, MiB; all of its own
    /// otherwise.
    pub fn rss_mib(mut self, rss_mib: u64) -> Self {
        self.rss_mib = Some(rss_mib);
        self
    }

    /// Its place among others where nodes are emptied.
    pub fn priority(mut self, priority: i32) -> Self {
        self.notes.wishes.priority = priority;
        self
    }

    /// One more group no two of which shall be on one node.
    pub fn anti_affinity(mut self, group: &str) -> Self {
        self.notes.wishes.anti_affinity.push(group.to_owned());
        self
    }

    /// Its node's hypervisor starts it at boot, asking nobody.
    pub fn autostart(mut self) -> Self {
        self.autostart = true;
        self
    }

    /// Its display has a password.
    pub fn password(mut self) -> Self {
        self.notes.has_secrets = true;
        self
    }

    /// One more qcow2 disk, not cached by the host, of 10 GiB with
    /// `allocated_mib` MiB in use. Below `/dev` it is a device.
    pub fn disk(mut self, path: &str, allocated_mib: u64) -> Self {
        let target = self.next_target();
        self.guest.disks.push(Disk {
            target,
            device: "disk".to_owned(),
            source: match is_device(path) {
                true => DiskSource::Block {
                    path: path.to_owned(),
                },
                false => DiskSource::File {
                    path: path.to_owned(),
                },
            },
            format: "qcow2".to_owned(),
            cache: Some("none".to_owned()),
            read_only: false,
            shareable: false,
            virtual_bytes: 10 * GIB,
            allocated_bytes: allocated_mib * MIB,
            backing: Vec::new(),
        });
        self
    }

    /// A base image under the disk that was added last; it takes no room.
    pub fn backing(self, path: &str) -> Self {
        self.backing_mib(path, 0)
    }

    /// The same with `allocated_mib` MiB in use.
    pub fn backing_mib(mut self, path: &str, allocated_mib: u64) -> Self {
        if let Some(disk) = self.guest.disks.last_mut() {
            disk.backing.push(BackingImage {
                path: path.to_owned(),
                format: "qcow2".to_owned(),
                allocated_bytes: allocated_mib * MIB,
            });
        }
        self
    }

    /// Variables of UEFI firmware in a file there.
    pub fn nvram(mut self, path: &str) -> Self {
        self.guest.files.push(GuestFile {
            path: path.to_owned(),
            kind: GuestFileKind::Nvram,
            allocated_bytes: NVRAM_BYTES,
        });
        self
    }

    /// A file that it only reads, such as its kernel.
    pub fn reads(mut self, path: &str, what: &str) -> Self {
        self.guest.reads.push(ReadFile {
            path: path.to_owned(),
            what: what.to_owned(),
        });
        self
    }

    /// Something of it is bound to that address.
    pub fn bound_to(mut self, address: &str) -> Self {
        self.guest.bound.push(BoundAddress {
            address: address.to_owned(),
            port: None,
            udp: false,
            what: "its VNC display".to_owned(),
        });
        self
    }

    /// A CD in a drive.
    pub fn cdrom(mut self, path: &str) -> Self {
        let target = self.next_target();
        self.guest.disks.push(Disk {
            target,
            device: "cdrom".to_owned(),
            source: DiskSource::File {
                path: path.to_owned(),
            },
            format: "raw".to_owned(),
            cache: None,
            read_only: true,
            shareable: false,
            virtual_bytes: MIB,
            allocated_bytes: MIB,
            backing: Vec::new(),
        });
        self
    }

    /// An emulated TPM, with its state in a file.
    pub fn tpm(mut self) -> Self {
        self.has_tpm = true;
        self.guest.tpm_goes_with_definition = true;
        self.immovable(ImmovableKind::EmulatedTpm, "TPM emulator")
    }

    /// A snapshot inside the disks' images.
    pub fn snapshot(mut self, name: &str) -> Self {
        self.guest.snapshots.push(name.to_owned());
        self
    }

    /// A snapshot that is not inside them.
    pub fn external_snapshot(mut self, name: &str) -> Self {
        self.guest.external_snapshots.push(name.to_owned());
        self.snapshot(name)
    }

    /// So long after it is asked to, it has shut down.
    pub fn shuts_down_after(mut self, time: Duration) -> Self {
        self.obeys_after = Some(time);
        self
    }

    /// So long before it has shut down it is in shutdown: its hypervisor takes that
    /// long to tidy up.
    pub fn in_shutdown_for(mut self, time: Duration) -> Self {
        self.in_shutdown = time;
        self
    }

    /// It does not shut down when it is asked to.
    pub fn ignores_shutdown(mut self) -> Self {
        self.obeys_after = None;
        self
    }

    /// One more drive, whatever it is. Its file is made if the node lacks it.
    pub fn drive(mut self, disk: Disk) -> Self {
        self.guest.disks.push(disk);
        self
    }

    /// Its NICs, instead of the one on `br-guests`.
    pub fn nics(mut self, attachments: &[NicAttachment]) -> Self {
        self.guest.nics = attachments
            .iter()
            .enumerate()
            .map(|(i, attachment)| Nic {
                mac: format!("52:54:00:00:00:{i:02x}"),
                attachment: attachment.clone(),
                port: None,
            })
            .collect();
        self
    }

    /// CPU features it was started with and needs wherever it runs.
    pub fn cpu_features(mut self, features: &[&str]) -> Self {
        self.guest.cpu_xml = Some(cpu_xml(features));
        self
    }

    /// A device that ties it to its node.
    pub fn immovable(mut self, kind: ImmovableKind, what: &str) -> Self {
        self.guest.immovable.push(Immovable {
            kind,
            what: what.to_owned(),
        });
        self
    }

    /// Anything else about its description.
    pub fn with(mut self, change: impl FnOnce(&mut Guest)) -> Self {
        change(&mut self.guest);
        self
    }

    fn next_target(&self) -> String {
        let letter = (b'a'..=b'z')
            .nth(self.guest.disks.len())
            .expect("a fake guest has at most 26 drives");
        format!("vd{}", char::from(letter))
    }

    pub(super) fn build(self, drawn: InstanceId) -> (Guest, Manner) {
        let mut guest = self.guest;
        guest.id = self.id.unwrap_or(drawn);
        if self.has_tpm {
            guest.files.push(GuestFile {
                path: format!("{TPM_STATE}/{}/tpm2/tpm2-00.permall", guest.id),
                kind: GuestFileKind::Tpm,
                allocated_bytes: TPM_BYTES,
            });
        }
        let total_bytes = guest.memory_mib * MIB;
        let load = MemoryLoad {
            total_bytes,
            dirty_bytes_s: self.dirty_mib_s * MIB,
            working_set_bytes: self.working_set_mib.map_or(total_bytes, |mib| mib * MIB),
        };
        let habits = Habits {
            load,
            obeys_after: self.obeys_after,
            in_shutdown: self.in_shutdown,
            cpu_percent: self.cpu_percent,
            rss_mib: self.rss_mib.unwrap_or(guest.memory_mib),
        };
        let manner = Manner {
            habits,
            notes: self.notes,
            autostart: self.autostart,
        };
        (guest, manner)
    }
}

fn plain_guest(name: &str) -> Guest {
    Guest {
        id: InstanceId(uuid::Uuid::nil()),
        name: name.to_owned(),
        project: DEFAULT_PROJECT.to_owned(),
        generation: 0,
        power_state: PowerState::Running,
        persistent: true,
        vcpus: 1,
        memory_mib: 512,
        virt_type: "qemu".to_owned(),
        arch: "x86_64".to_owned(),
        machine: super::node::MACHINE.to_owned(),
        emulator: super::node::EMULATOR.to_owned(),
        cpu_xml: Some(cpu_xml(&["sse4.2"])),
        disks: Vec::new(),
        nics: vec![Nic {
            mac: "52:54:00:00:00:01".to_owned(),
            attachment: NicAttachment::Bridge {
                bridge: super::node::BRIDGE.to_owned(),
            },
            port: None,
        }],
        immovable: Vec::new(),
        files: Vec::new(),
        reads: Vec::new(),
        bound: Vec::new(),
        snapshots: Vec::new(),
        external_snapshots: Vec::new(),
        images_with_snapshots: Vec::new(),
        tpm_goes_with_definition: false,
        active_job: None,
    }
}

fn cpu_xml(features: &[&str]) -> String {
    let features: String = features
        .iter()
        .map(|name| format!("<feature policy='require' name='{name}'/>"))
        .collect();
    format!("<cpu mode='custom' match='exact'><model>qemu64</model>{features}</cpu>")
}

/// The features that [`cpu_xml`] wrote into a `<cpu>` element.
pub(super) fn features_in(cpu_xml: &str) -> impl Iterator<Item = &str> {
    cpu_xml
        .split(" name='")
        .skip(1)
        .filter_map(|rest| rest.split('\'').next())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_read_back() {
        let xml = cpu_xml(&["avx2", "pcid"]);
        assert_eq!(features_in(&xml).collect::<Vec<_>>(), ["avx2", "pcid"]);
        assert_eq!(features_in("<cpu/>").count(), 0);
    }

    #[test]
    fn disks_get_names_in_turn() {
        let builder = GuestBuilder::new("g").disk("/a/1", 1).disk("/a/2", 1);
        let (guest, _) = builder.build(InstanceId(uuid::Uuid::from_u128(7)));
        let targets: Vec<&str> = guest.disks.iter().map(|d| d.target.as_str()).collect();
        assert_eq!(targets, ["vda", "vdb"]);
        assert_eq!(guest.id.0.as_u128(), 7);
    }
}

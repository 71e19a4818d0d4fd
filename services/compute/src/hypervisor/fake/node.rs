//! A fake node: its facts, its libvirtd, its domains.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Weak,
    time::Duration,
};

use drover_model::{
    guest::{Guest, NicAttachment, PowerState, Presence},
    ids::InstanceId,
    node::Wishes,
};
use tokio::{sync::broadcast, time::Instant};
use uuid::Uuid;

use super::{
    super::JobSample,
    inbox::{Inbox, Process},
    mirrors::MirrorJob,
    script::{CallScript, SendScript},
    storage::Content,
    transfer::MemoryLoad,
};
use crate::hypervisor::Event;

/// Machine type that guests have and nodes know.
pub(super) const MACHINE: &str = "pc-q35-7.2";
/// Emulator that guests use and nodes have.
pub(super) const EMULATOR: &str = "/usr/bin/qemu-system-x86_64";
/// Bridge that guests are on and nodes have.
pub(super) const BRIDGE: &str = "br-guests";
/// Events a receiver may lag behind; it is told when it lags further.
const EVENT_BACKLOG: usize = 256;

/// What a node is like. Change any of it at any time with
/// [`super::Fabric::edit_node`].
#[derive(Debug, Clone)]
pub struct NodeSpec {
    /// Address on the migration network; none gives it one of its own.
    pub address: Option<String>,
    /// Port of its libvirtd.
    pub libvirt_port: u16,
    /// Ports for migrations: the first, and one past the last.
    pub migration_ports: (u16, u16),
    /// Port at which its agent takes files.
    pub disk_port: u16,
    /// Its agent cannot open that port, and says this instead.
    pub disk_port_error: Option<String>,
    /// Ports that a firewall closes.
    pub blocked_ports: BTreeSet<u16>,
    /// What it can send and receive, bytes per second, shared by its migrations.
    pub bandwidth_bytes_s: u64,
    /// Kind of hypervisor.
    pub hypervisor_type: String,
    /// Its version, in libvirt's counting.
    pub hypervisor_version: u64,
    /// libvirt's version, in its counting.
    pub libvirt_version: u64,
    /// Architecture.
    pub arch: String,
    /// CPU model.
    pub cpu_model: String,
    /// CPU features it can give to guests.
    pub cpu_features: BTreeSet<String>,
    /// libvirt cannot compare CPUs, and says this instead.
    pub cpu_unknown: Option<String>,
    /// Whether it has KVM.
    pub kvm: bool,
    /// Logical CPUs.
    pub vcpus: u32,
    /// Memory, MiB.
    pub memory_mib: u64,
    /// Machine types its emulator knows.
    pub machines: BTreeSet<String>,
    /// Emulators it has.
    pub emulators: BTreeSet<String>,
    /// Bridges it has.
    pub bridges: BTreeSet<String>,
    /// libvirt networks that are active.
    pub networks: BTreeSet<String>,
    /// Interfaces of the host.
    pub interfaces: BTreeSet<String>,
    /// libvirt's storage pools: the directory of each, by name.
    pub pools: BTreeMap<String, String>,
    /// What it copies from file to file, bytes per second. With 0, copies that
    /// begin from then on stand still.
    pub disk_bytes_s: u64,
    /// Whether its hypervisor can tell how fast a guest writes memory.
    pub tells_dirty_rate: bool,
    /// How often a file's digest is asked for until it is there.
    pub digest_takes_asks: u32,
}

impl Default for NodeSpec {
    fn default() -> Self {
        let set = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect();
        Self {
            address: None,
            libvirt_port: 16509,
            migration_ports: (49152, 49216),
            disk_port: 49215,
            disk_port_error: None,
            blocked_ports: BTreeSet::new(),
            bandwidth_bytes_s: 1_000 << 20,
            hypervisor_type: "QEMU".to_owned(),
            hypervisor_version: 7_002_000,
            libvirt_version: 9_000_000,
            arch: "x86_64".to_owned(),
            cpu_model: "Cascadelake-Server".to_owned(),
            cpu_features: set(&["aes", "avx2", "sse4.2"]),
            cpu_unknown: None,
            kvm: false,
            vcpus: 16,
            memory_mib: 65_536,
            machines: set(&[MACHINE, "pc-i440fx-7.2"]),
            emulators: set(&[EMULATOR]),
            bridges: set(&[BRIDGE]),
            networks: set(&["default"]),
            interfaces: set(&["eth0"]),
            pools: BTreeMap::new(),
            disk_bytes_s: 500 << 20,
            tells_dirty_rate: true,
            digest_takes_asks: 0,
        }
    }
}

impl NodeSpec {
    /// Whether what a NIC is plugged into is here.
    pub(super) fn has_attachment(&self, attachment: &NicAttachment) -> bool {
        match attachment {
            NicAttachment::Bridge { bridge } => self.bridges.contains(bridge),
            NicAttachment::Network { network } => self.networks.contains(network),
            NicAttachment::Direct { device } => self.interfaces.contains(device),
            NicAttachment::User => true,
            NicAttachment::Other { .. } => false,
        }
    }

    /// Whether guests of that virt type can run here.
    pub(super) fn runs(&self, virt_type: &str) -> bool {
        virt_type == "qemu" || (virt_type == "kvm" && self.kvm)
    }

    /// CPU features that a guest needs and the node lacks.
    pub(super) fn missing_features(&self, cpu_xml: &str) -> Vec<String> {
        super::guest_builder::features_in(cpu_xml)
            .filter(|name| !self.cpu_features.contains(*name))
            .map(str::to_owned)
            .collect()
    }
}

/// How a node's libvirtd is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Libvirtd {
    /// It answers.
    Up,
    /// It answers nobody; what it does goes on.
    Away,
    /// There is none.
    Dead,
}

/// How a guest behaves, wherever it runs.
#[derive(Debug, Clone, Copy)]
pub(super) struct Habits {
    /// How it treats its memory.
    pub(super) load: MemoryLoad,
    /// How long after it was asked to it has shut down, if it obeys.
    pub(super) obeys_after: Option<Duration>,
    /// The last part of that, which it is in shutdown.
    pub(super) in_shutdown: Duration,
    /// How much of a CPU it keeps busy, percent; 200 is two of them.
    pub(super) cpu_percent: u64,
    /// Memory of the node that it holds while it is active, MiB.
    pub(super) rss_mib: u64,
}

/// What a guest's metadata says beside whose it is.
#[derive(Debug, Clone, Default)]
pub(super) struct Notes {
    /// What it is wished for where nodes are emptied.
    pub(super) wishes: Wishes,
    /// It is to be started at boot, by who asks first.
    pub(super) autostart: bool,
    /// Its definition has a password in it.
    pub(super) has_secrets: bool,
}

/// How a guest that is made begins.
#[derive(Debug, Clone)]
pub(super) struct Manner {
    /// How it behaves.
    pub(super) habits: Habits,
    /// What is written about it.
    pub(super) notes: Notes,
    /// Its node's hypervisor starts it at boot, asking nobody.
    pub(super) autostart: bool,
}

/// What a guest is, apart from what any node believes of it.
#[derive(Debug, Clone)]
pub(super) struct Nature {
    /// How it behaves.
    pub(super) habits: Habits,
    /// What is written about it.
    pub(super) notes: Notes,
    /// What its disks ought to hold, by target.
    pub(super) tokens: BTreeMap<String, u64>,
    /// What the files beside them ought to hold, by path.
    pub(super) file_tokens: BTreeMap<String, u64>,
    /// What the files hold that it only reads, by path.
    pub(super) reads: BTreeMap<String, Content>,
}

/// A guest's memory as one copy has it. It holds a counter that grows while
/// the copy's vCPUs run, so that a copy shows how long its guest has run.
#[derive(Debug, Clone, Copy)]
pub(super) struct Memory {
    counted: Duration,
    running_since: Option<Instant>,
}

impl Memory {
    /// Memory that stands still at that count.
    pub(super) fn at(counted: Duration) -> Self {
        Self {
            counted,
            running_since: None,
        }
    }

    /// The counter.
    pub(super) fn counter(&self, now: Instant) -> Duration {
        let since = self.running_since.map_or(Duration::ZERO, |t| now - t);
        self.counted + since
    }

    pub(super) fn start(&mut self, now: Instant) {
        self.running_since = Some(now);
    }

    pub(super) fn stop(&mut self, now: Instant) {
        *self = Self::at(self.counter(now));
    }
}

/// A domain on a node: one copy of a guest, or a definition, or both.
#[derive(Debug, Clone)]
pub(super) struct Domain {
    /// Its description; state and job in it are filled in when it is read.
    pub(super) guest: Guest,
    /// What it will be from its next start on, if it was defined anew since it runs.
    pub(super) next: Option<Guest>,
    /// State of this copy.
    pub(super) state: PowerState,
    /// It waits for a migration.
    pub(super) incoming: bool,
    /// A definition was here before a migration came in.
    pub(super) defined_before: bool,
    /// All of its memory is here: it can run.
    pub(super) whole: bool,
    /// How it treats its memory.
    pub(super) load: MemoryLoad,
    /// Its memory.
    pub(super) memory: Memory,
    /// What its disks ought to hold, by target.
    pub(super) tokens: BTreeMap<String, u64>,
    /// Statistics of the migration that brought it here.
    pub(super) completed: Option<JobSample>,
    /// Another job that libvirt runs on it.
    pub(super) other_job: Option<String>,
    /// Disks that its QEMU copies to other files, by target.
    pub(super) mirrors: BTreeMap<String, MirrorJob>,
    /// A script left this old copy behind: the checker knows.
    pub(super) left_by_script: bool,
    /// It went to another node in a post-copy that broke there: it stands still for
    /// good.
    pub(super) lost_its_other_half: bool,
    /// It was asked to shut down, obeys, and is off then.
    pub(super) goes_off_at: Option<Instant>,
    /// The node's hypervisor starts it at boot, asking nobody.
    pub(super) autostart: bool,
    /// CPU time that this copy has used.
    pub(super) cpu: CpuTime,
}

/// CPU time of a copy, counted along its memory's counter.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct CpuTime {
    used: Duration,
    counted_to: Duration,
}

impl CpuTime {
    /// Nothing yet, of a copy whose counter is there.
    pub(super) fn from(counter: Duration) -> Self {
        Self {
            used: Duration::ZERO,
            counted_to: counter,
        }
    }

    /// What was used when the counter is there, if so much of a CPU was busy since.
    pub(super) fn at(self, counter: Duration, percent: u64) -> Self {
        let ran = counter.saturating_sub(self.counted_to);
        let percent = u32::try_from(percent).unwrap_or(u32::MAX);
        Self {
            used: self.used + ran.saturating_mul(percent) / 100,
            counted_to: counter,
        }
    }

    /// All of it, ns.
    pub(super) fn used_ns(self) -> u64 {
        u64::try_from(self.used.as_nanos()).unwrap_or(u64::MAX)
    }
}

impl Domain {
    /// Where it stands.
    pub(super) fn presence(&self) -> Presence {
        if self.incoming {
            Presence::Incoming
        } else {
            Presence::Present(self.state)
        }
    }

    /// What libvirt does to it besides migrations, in words.
    pub(super) fn job_besides(&self) -> Option<String> {
        let copied = self.mirrors.keys().next();
        let copying = copied.map(|target| format!("block job (copy) on {target}"));
        self.other_job.clone().or(copying)
    }

    /// Its lasting description.
    pub(super) fn lasting(&self) -> &Guest {
        self.next.as_ref().unwrap_or(&self.guest)
    }

    /// Its descriptions, of the running guest and, where that is another, of the
    /// lasting one.
    pub(super) fn both(&self) -> impl Iterator<Item = &Guest> {
        std::iter::once(&self.guest).chain(&self.next)
    }

    /// The same, to be changed.
    pub(super) fn both_mut(&mut self) -> impl Iterator<Item = &mut Guest> {
        std::iter::once(&mut self.guest).chain(&mut self.next)
    }

    /// Whether its vCPUs run.
    pub(super) fn runs(&self) -> bool {
        self.presence() == Presence::Present(PowerState::Running)
    }
}

/// A node.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) spec: NodeSpec,
    pub(super) address: String,
    pub(super) powered: bool,
    pub(super) libvirtd: Libvirtd,
    pub(super) domains: BTreeMap<InstanceId, Domain>,
    pub(super) events: broadcast::Sender<Event>,
    pub(super) call_scripts: Vec<CallScript>,
    /// Ports that were opened to be tried, and until when.
    pub(super) probe_ports: BTreeMap<u16, Instant>,
    /// Agents that have opened the port for files, if they live.
    pub(super) doors: Vec<Weak<Process>>,
    /// What is to come in through it.
    pub(super) inboxes: BTreeMap<Uuid, Inbox>,
    pub(super) send_scripts: Vec<SendScript>,
    /// Files that it sends stand still.
    pub(super) sends_stalled: bool,
    /// Files that its agent cannot read.
    pub(super) unreadable: BTreeSet<String>,
    /// How often the digest of a content was asked for.
    pub(super) digests_asked: BTreeMap<String, u32>,
}

impl Node {
    pub(super) fn new(spec: NodeSpec, address: String) -> Self {
        Self {
            spec,
            address,
            powered: true,
            libvirtd: Libvirtd::Up,
            domains: BTreeMap::new(),
            events: broadcast::channel(EVENT_BACKLOG).0,
            call_scripts: Vec::new(),
            probe_ports: BTreeMap::new(),
            doors: Vec::new(),
            inboxes: BTreeMap::new(),
            send_scripts: Vec::new(),
            sends_stalled: false,
            unreadable: BTreeSet::new(),
            digests_asked: BTreeMap::new(),
        }
    }

    /// Whether its libvirtd answers.
    pub(super) fn answers(&self) -> bool {
        self.powered && self.libvirtd == Libvirtd::Up
    }

    /// Tells whoever listens; a libvirtd that answers nobody tells nobody.
    pub(super) fn emit(&self, event: Event) {
        if self.answers() || matches!(event, Event::Connection { .. }) {
            // Nobody listening is no error: an event is only a hint.
            let _ = self.events.send(event);
        }
    }

    /// Memory of the active guests, MiB.
    pub(super) fn used_memory_mib(&self) -> u64 {
        self.domains
            .values()
            .filter(|d| d.incoming || d.state.is_active())
            .map(|d| d.guest.memory_mib)
            .sum()
    }
}

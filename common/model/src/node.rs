//! A compute node as its agent reports it.

use serde::{Deserialize, Serialize};

use crate::{
    guest::PowerState,
    ids::{HostName, InstanceId, MigrationId},
};

/// What a node offers and what it runs on. Versions are libvirt's numbers:
/// major × 1,000,000 + minor × 1,000 + release.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Inventory {
    /// `QEMU`.
    pub hypervisor_type: String,
    /// Version of the hypervisor.
    pub hypervisor_version: u64,
    /// Version of libvirt's daemon.
    pub libvirt_version: u64,
    /// The host's architecture.
    pub arch: String,
    /// The host's CPU model in libvirt's words.
    pub cpu_model: String,
    /// Whether guests can use KVM here.
    pub kvm: bool,
    /// Logical CPUs.
    pub vcpus: u32,
    /// Memory, MiB.
    pub memory_mib: u64,
    /// Size of the file system that holds the instances' disks, bytes.
    pub disk_bytes: u64,
    /// Free there now, bytes.
    pub disk_free_bytes: u64,
}

/// How much of a node may be given to guests.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AllocationPolicy {
    /// vCPUs that may be given out per logical CPU.
    pub cpu_allocation_ratio: f64,
    /// Guest memory that may be given out per MiB of the host's.
    pub ram_allocation_ratio: f64,
    /// Kept for the host itself, MiB.
    pub reserved_memory_mib: u64,
}

impl Default for AllocationPolicy {
    /// Nova's defaults since 2023: CPU 4.0, memory 1.0, 512 MiB kept.
    fn default() -> Self {
        Self {
            cpu_allocation_ratio: 4.0,
            ram_allocation_ratio: 1.0,
            reserved_memory_mib: 512,
        }
    }
}

/// Where a node is reached by other nodes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// Address or name on the migration network.
    pub address: String,
    /// URI with which another node's libvirtd connects to this one's.
    pub libvirt_uri: String,
    /// TCP port behind that URI.
    pub libvirt_port: u16,
}

/// One report of an agent: the whole truth of its node at a moment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NodeReport {
    /// Which node.
    pub host: HostName,
    /// Version of the agent.
    pub agent_version: String,
    /// New at every start of the agent; with `sequence` it orders reports.
    pub agent_started_ms: u64,
    /// Counts up within one run of the agent.
    pub sequence: u64,
    /// The node's own clock, milliseconds since 1970.
    pub clock_ms: u64,
    /// Where it is reached.
    pub endpoint: Endpoint,
    /// How much of it may be used.
    pub policy: AllocationPolicy,
    /// What libvirt says, or why it says nothing (invariant 3: unknown is not
    /// absent, so there is no empty list for a libvirt that does not answer).
    pub hypervisor: HypervisorReport,
}

impl NodeReport {
    /// What no node can say: numbers with which nobody could go on calculating,
    /// or a start so far ahead of `now_ms` that every later one would be older.
    pub fn problem(&self, now_ms: u64) -> Option<&'static str> {
        const DAY_MS: u64 = 86_400_000;
        const MOST: u64 = 1 << 50;
        if self.agent_started_ms > now_ms.saturating_add(DAY_MS) {
            return Some("the agent's clock is more than a day ahead: set the node's clock");
        }
        let HypervisorReport::Up {
            inventory,
            instances,
        } = &self.hypervisor
        else {
            return None;
        };
        let of_node = [inventory.memory_mib, inventory.disk_bytes];
        let of_guests = instances
            .iter()
            .flat_map(|i| [i.memory_mib, i.disk_bytes, i.generation]);
        let absurd = of_node.into_iter().chain(of_guests).any(|n| n > MOST);
        absurd.then_some("a size in the report is beyond any machine's")
    }
}

/// The part of a report that only libvirt can give.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum HypervisorReport {
    /// libvirt answered.
    Up {
        /// What the node has.
        inventory: Inventory,
        /// Every domain on it.
        instances: Vec<InstanceReport>,
    },
    /// libvirt did not answer.
    Down {
        /// What was tried and what came of it.
        reason: String,
    },
}

/// A domain in a report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceReport {
    /// Domain UUID.
    pub id: InstanceId,
    /// Domain name.
    pub name: String,
    /// Owning project.
    pub project: String,
    /// Generation in its metadata.
    pub generation: u64,
    /// State.
    pub power_state: PowerState,
    /// Whether it is only waiting here for a migration to arrive.
    pub incoming: bool,
    /// vCPUs.
    pub vcpus: u32,
    /// Memory, MiB.
    pub memory_mib: u64,
    /// Size of its disks, bytes.
    pub disk_bytes: u64,
    /// A migration this node's agent is carrying out for it.
    pub migration: Option<MigrationId>,
    /// What it has been wished for it where nodes are emptied.
    #[serde(default)]
    pub wishes: Wishes,
    /// What it used so far; none while it is off, or if libvirt cannot say.
    #[serde(default)]
    pub usage: Option<GuestUsage>,
    /// Changes whenever its lasting definition does. Whoever keeps definitions
    /// asks for one anew when this is another.
    #[serde(default)]
    pub definition_digest: Option<String>,
    /// Whether it is started when its node boots: by the node's agent, once that
    /// has asked, or by libvirt as long as the agent has not taken that over.
    #[serde(default)]
    pub autostart: bool,
}

/// What an instance's metadata says of its place among others
/// (`<drover:priority>`, `<drover:anti_affinity>`).
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Wishes {
    /// Higher is moved, and started elsewhere, before lower; 0 if nothing is said.
    pub priority: i32,
    /// Groups no two of which shall be on one node.
    pub anti_affinity: Vec<String>,
}

/// What a guest has used, as counters and levels: rates follow from two reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct GuestUsage {
    /// CPU time since it was started here, ns.
    pub cpu_time_ns: u64,
    /// Memory of the node that it holds now, MiB.
    pub memory_rss_mib: u64,
}

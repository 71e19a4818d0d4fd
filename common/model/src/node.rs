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

/// The first libvirt that can keep the state of an emulated TPM without its definition.
const KEEPS_TPM_STATE: u64 = 8_009_000;

impl Inventory {
    /// Whether its libvirt can remove the definition of any guest and keep the state of
    /// an emulated TPM of that.
    pub fn keeps_tpm_state(&self) -> bool {
        self.libvirt_version >= KEEPS_TPM_STATE
    }
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
    /// When the agent started, by the node's clock, milliseconds since 1970; shown alone.
    pub agent_started_ms: u64,
    /// As the conductor handed it out at that start; with `sequence` it orders reports.
    #[serde(default)]
    pub incarnation: u64,
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
    #[serde(deserialize_with = "tolerant::hypervisor")]
    pub hypervisor: HypervisorReport,
}

impl NodeReport {
    /// What no node can say: numbers with which nobody could go on calculating.
    pub fn problem(&self) -> Option<&'static str> {
        let HypervisorReport::Up { inventory, .. } = &self.hypervisor else {
            return None;
        };
        let absurd = inventory.memory_mib > MOST_MEMORY_MIB || inventory.disk_bytes > MOST_BYTES;
        absurd.then_some("the node's memory or disk is said to be beyond any machine's")
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
        /// Every domain on it. One that cannot be taken in is unreadable, and
        /// costs none of the others its place.
        #[serde(deserialize_with = "tolerant::instances")]
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
    /// What of it cannot be read, or does not answer, and why. The rest of this is
    /// what is known nevertheless; what is not is 0 or empty.
    #[serde(default)]
    pub unreadable: Option<String>,
}

/// Most memory that is believed of anything, MiB.
const MOST_MEMORY_MIB: u64 = 1 << 30;
/// Largest disk that is believed of anything, bytes.
const MOST_BYTES: u64 = 1 << 50;
/// Most vCPUs that are believed of a guest.
const MOST_VCPUS: u32 = 1 << 14;
/// Highest generation that is believed of a guest.
const MOST_GENERATION: u64 = 1 << 50;
/// Longest name of a guest, a project or a group that is kept, characters.
const LONGEST_NAME: usize = 255;
/// Longest reason that is kept, characters.
const LONGEST_REASON: usize = 500;
/// Groups of one guest that are kept.
const MOST_GROUPS: usize = 32;

impl InstanceReport {
    /// One of which nothing else can be read. Its state is not known: it counts as
    /// running, for unknown is not off.
    pub fn unreadable(id: InstanceId, name: &str, reason: &str) -> Self {
        Self {
            id,
            name: name.to_owned(),
            project: String::new(),
            generation: 0,
            power_state: PowerState::Running,
            incoming: false,
            vcpus: 0,
            memory_mib: 0,
            disk_bytes: 0,
            migration: None,
            wishes: Wishes::default(),
            usage: None,
            definition_digest: None,
            autostart: false,
            unreadable: Some(reason.to_owned()),
        }
        .within_bounds()
    }

    /// With what cannot be left out, and said to be unreadable for it.
    #[must_use]
    pub fn within_bounds(mut self) -> Self {
        let mut odd = Vec::new();
        let mut most = |what: &str, value: &mut u64, most: u64| {
            if *value > most {
                odd.push(format!("{what} of {value} (at most {most} is believed)"));
                *value = 0;
            }
        };
        most("memory in MiB", &mut self.memory_mib, MOST_MEMORY_MIB);
        most("disks in bytes", &mut self.disk_bytes, MOST_BYTES);
        most("a generation", &mut self.generation, MOST_GENERATION);
        let mut vcpus = u64::from(self.vcpus);
        most("vCPUs", &mut vcpus, u64::from(MOST_VCPUS));
        self.vcpus = u32::try_from(vcpus).unwrap_or(0);
        let mut short = |what: &str, text: &mut String| {
            let length = text.chars().count();
            if length > LONGEST_NAME {
                odd.push(format!("{what} of {length} characters"));
                *text = text.chars().take(LONGEST_NAME).collect();
            }
        };
        short("a name", &mut self.name);
        short("a project's name", &mut self.project);
        let digest = self.definition_digest.as_ref();
        if digest.is_some_and(|digest| digest.len() > LONGEST_NAME) {
            odd.push("a definition's digest that is none".to_owned());
            self.definition_digest = None;
        }
        let groups = &mut self.wishes.anti_affinity;
        groups.retain(|group| group.chars().count() <= LONGEST_NAME);
        groups.truncate(MOST_GROUPS);
        if !odd.is_empty() {
            let said = format!("it is said to have {}", odd.join(", "));
            let before = self.unreadable.take().map(|reason| format!("{reason}; "));
            self.unreadable = Some(before.unwrap_or_default() + &said);
        }
        if let Some(reason) = &mut self.unreadable
            && reason.chars().count() > LONGEST_REASON
        {
            *reason = reason.chars().take(LONGEST_REASON).collect();
        }
        self
    }
}

/// Readers of reports that lose nothing of what can be read.
mod tolerant {
    use std::collections::BTreeSet;

    use serde::{Deserialize, Deserializer};
    use serde_json::Value;

    use super::{HypervisorReport, InstanceReport};
    use crate::ids::InstanceId;

    /// What cannot be read at all is a hypervisor of which nothing is known.
    pub(super) fn hypervisor<'de, D>(from: D) -> Result<HypervisorReport, D::Error>
    where
        D: Deserializer<'de>,
    {
        let value = Value::deserialize(from)?;
        let read = serde_json::from_value(value);
        Ok(read.unwrap_or_else(|e| HypervisorReport::Down {
            reason: format!("what its agent says of it cannot be read here: {e}"),
        }))
    }

    /// Guest by guest.
    pub(super) fn instances<'de, D>(from: D) -> Result<Vec<InstanceReport>, D::Error>
    where
        D: Deserializer<'de>,
    {
        let mut seen = BTreeSet::new();
        let mut twice = BTreeSet::new();
        let mut all = Vec::new();
        for value in Vec::<Value>::deserialize(from)? {
            let one = instance(value);
            if one.id == InstanceId::NONE || seen.insert(one.id) {
                all.push(one);
            } else {
                twice.insert(one.id);
            }
        }
        for one in all.iter_mut().filter(|one| twice.contains(&one.id)) {
            one.unreadable = Some("its node lists its UUID twice".to_owned());
        }
        Ok(all)
    }

    fn instance(mut value: Value) -> InstanceReport {
        match InstanceReport::deserialize(&value) {
            Ok(one) => one.within_bounds(),
            Err(error) => salvage(&mut value, &error.to_string()),
        }
    }

    /// What is readable of an entry that is not: field by field.
    fn salvage(value: &mut Value, error: &str) -> InstanceReport {
        let text = |value: &Value, key: &str| value.get(key)?.as_str().map(str::to_owned);
        let id = text(value, "id").and_then(|id| id.parse().ok());
        let name = text(value, "name").unwrap_or_default();
        let reason = format!("its entry in the report cannot be read: {error}");
        let mut one = InstanceReport::unreadable(id.unwrap_or(InstanceId::NONE), &name, &reason);
        let number = |key: &str| value.get(key).and_then(Value::as_u64).unwrap_or(0);
        one.vcpus = u32::try_from(number("vcpus")).unwrap_or(0);
        one.memory_mib = number("memory_mib");
        one.disk_bytes = number("disk_bytes");
        one.generation = number("generation");
        one.project = text(value, "project").unwrap_or_default();
        one.incoming = value.get("incoming") == Some(&Value::Bool(true));
        if let Some(Ok(state)) = value.get("power_state").map(Deserialize::deserialize) {
            one.power_state = state;
        }
        one.within_bounds()
    }
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

#[cfg(test)]
#[path = "node_tests.rs"]
mod tests;

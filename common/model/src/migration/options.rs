//! How a migration is to be done: what may be wished of each kind, and within
//! which bounds.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::MigrationType;
use crate::{
    evidence::Life,
    ids::{HostName, OperationId, ProjectId},
    unknown::Unknown,
};

/// Whether disks are copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BlockMigration {
    /// Copy what proves not to be shared.
    #[default]
    Auto,
    /// Copy; refuse if a disk is shared.
    Yes,
    /// Never copy; refuse if a disk is not shared.
    No,
}

/// How a live migration is to be done. `None` leaves it to the settings.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct LiveOptions {
    /// Whether disks are copied.
    pub block_migration: BlockMigration,
    /// Let the guest run on the destination before all its memory is there, if
    /// it does not converge otherwise or on `force-complete`.
    pub post_copy: bool,
    /// Slow a guest that writes faster than the link carries.
    pub auto_converge: bool,
    /// Streams for memory, 2 to 255.
    pub parallel_connections: Option<u32>,
    /// Upper limit for memory and for each disk, MiB/s.
    pub bandwidth_mib_s: Option<u64>,
    /// How long the guest may stand still at switch-over at the most, ms.
    pub max_downtime_ms: Option<u64>,
    /// Give up when nothing has got nearer to the end for so long, seconds.
    pub progress_timeout_s: Option<u64>,
    /// What a newer version wishes.
    #[serde(flatten)]
    pub unknown: Unknown,
}

impl LiveOptions {
    /// What is wrong with these options in themselves; empty if nothing is.
    pub fn problems(&self) -> Vec<String> {
        let connections = self.parallel_connections.map(u64::from);
        problems(
            &self.unknown,
            &[
                ("parallel_connections", connections, 2, 255),
                ("bandwidth_mib_s", self.bandwidth_mib_s, 1, 1_000_000),
                // QEMU's own limit is 2000 s; a guest that stands still for longer than
                // a minute is not migrated live.
                ("max_downtime_ms", self.max_downtime_ms, 1, 60_000),
                ("progress_timeout_s", self.progress_timeout_s, 5, 86_400),
            ],
        )
    }
}

/// How a cold migration is to be done. `None` leaves it to the settings.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ColdOptions {
    /// How long the guest may take to shut down when asked to, seconds.
    pub shutdown_timeout_s: Option<u64>,
    /// Stop the guest hard if it has not shut down after so long, seconds. The
    /// caller's permission: without it no guest is ever stopped hard.
    pub force_stop_after_s: Option<u64>,
    /// Copy disks while the guest still runs, then only what changed.
    pub pre_copy: bool,
    /// Upper limit for disks, MiB/s.
    pub bandwidth_mib_s: Option<u64>,
    /// Give up when nothing has got nearer to the end for so long, seconds.
    pub progress_timeout_s: Option<u64>,
    /// New size of the guest on the destination (Nova's *resize*).
    pub flavor: Option<Flavor>,
    /// What a newer version wishes.
    #[serde(flatten)]
    pub unknown: Unknown,
}

impl ColdOptions {
    /// What is wrong with these options in themselves; empty if nothing is.
    pub fn problems(&self) -> Vec<String> {
        let flavor = self.flavor.unwrap_or(Flavor {
            vcpus: 1,
            memory_mb: 1,
        });
        problems(
            &self.unknown,
            &[
                ("shutdown_timeout_s", self.shutdown_timeout_s, 1, 86_400),
                ("force_stop_after_s", self.force_stop_after_s, 0, 86_400),
                ("bandwidth_mib_s", self.bandwidth_mib_s, 1, 1_000_000),
                ("progress_timeout_s", self.progress_timeout_s, 5, 86_400),
                ("flavor.vcpus", Some(flavor.vcpus.into()), 1, 4096),
                ("flavor.memory_mb", Some(flavor.memory_mb), 1, 1 << 30),
            ],
        )
    }
}

/// How an instance changes hands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TransferMode {
    /// The guest runs on. One that is off stays off.
    #[default]
    Live,
    /// The guest is shut down, and started again as the receiver's.
    Cold,
}

/// How a transfer to another project is to be done. `None` leaves it to the settings.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct TransferOptions {
    /// Whether the guest runs on.
    pub mode: TransferMode,
    /// Which network of the receiver's takes the place of one that the guest is
    /// on. The old one is named by the giver's logical name, by what it is on
    /// the node (bridge, libvirt network), or by the MAC address of the NIC.
    pub networks: BTreeMap<String, String>,
    /// Leave disks where they are.
    pub keep_disk: bool,
    /// Give every NIC a new MAC address (cold only).
    pub new_mac: bool,
    /// New name (cold only: libvirt renames no running domain).
    pub name: Option<String>,
    /// New title.
    pub title: Option<String>,
    /// How long the guest may take to shut down when asked to, seconds (cold).
    pub shutdown_timeout_s: Option<u64>,
    /// Stop the guest hard if it has not shut down after so long, seconds
    /// (cold). Without it no guest is ever stopped hard.
    pub force_stop_after_s: Option<u64>,
    /// Upper limit for each disk, MiB/s.
    pub bandwidth_mib_s: Option<u64>,
    /// Give up when nothing has got nearer to the end for so long, seconds.
    pub progress_timeout_s: Option<u64>,
    /// What a newer version wishes.
    #[serde(flatten)]
    pub unknown: Unknown,
}

impl TransferOptions {
    /// What is wrong with these options in themselves; empty if nothing is.
    pub fn problems(&self) -> Vec<String> {
        /// Networks that are named at the most.
        const MOST_NETWORKS: usize = 64;
        let mut problems = problems(
            &self.unknown,
            &[
                ("shutdown_timeout_s", self.shutdown_timeout_s, 1, 86_400),
                ("force_stop_after_s", self.force_stop_after_s, 0, 86_400),
                ("bandwidth_mib_s", self.bandwidth_mib_s, 1, 1_000_000),
                ("progress_timeout_s", self.progress_timeout_s, 5, 86_400),
            ],
        );
        if self.networks.len() > MOST_NETWORKS {
            problems.push(format!("at most {MOST_NETWORKS} networks are mapped"));
        }
        let is_name = |text: &str| {
            (1..=255).contains(&text.chars().count()) && !text.chars().any(char::is_control)
        };
        if self
            .name
            .as_deref()
            .is_some_and(|n| !is_name(n) || n.contains('/'))
        {
            problems.push("name is 1 to 255 characters without '/'".to_owned());
        }
        if self.title.as_deref().is_some_and(|t| !is_name(t)) {
            problems.push("title is one line of 1 to 255 characters".to_owned());
        }
        problems
    }

    /// What the rules of a cold migration need of it.
    pub fn as_cold(&self) -> ColdOptions {
        ColdOptions {
            shutdown_timeout_s: self.shutdown_timeout_s,
            force_stop_after_s: self.force_stop_after_s,
            bandwidth_mib_s: self.bandwidth_mib_s,
            progress_timeout_s: self.progress_timeout_s,
            ..ColdOptions::default()
        }
    }
}

/// A transfer to another project: which, and how.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProjectTransfer {
    /// Who gets the instance.
    pub project: ProjectId,
    /// How.
    #[serde(flatten)]
    pub options: TransferOptions,
}

/// What proves that the node of an evacuated guest is dead (invariant 1).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "by", rename_all = "snake_case")]
pub enum ProofOfDeath {
    /// Its fencing agent said *off*.
    Fence {
        /// Which agent.
        agent: String,
        /// When, milliseconds since 1970.
        at_ms: u64,
        /// What was heard of the node last.
        #[serde(default)]
        life: Option<Life>,
    },
    /// An operator answers for it.
    Operator {
        /// Who, as the request's context names them.
        user: Option<String>,
        /// When, milliseconds since 1970.
        at_ms: u64,
        /// What was heard of the node last.
        #[serde(default)]
        life: Option<Life>,
    },
}

impl ProofOfDeath {
    /// When it was given, milliseconds since 1970.
    pub fn at_ms(&self) -> u64 {
        match self {
            Self::Fence { at_ms, .. } | Self::Operator { at_ms, .. } => *at_ms,
        }
    }

    /// What was heard of the node before it was given.
    pub fn life(&self) -> Option<Life> {
        match self {
            Self::Fence { life, .. } | Self::Operator { life, .. } => *life,
        }
    }
}

/// An evacuation: of which operation, and by what right.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evacuation {
    /// The operation that collected the evidence.
    pub operation: OperationId,
    /// What it came to.
    pub proof: ProofOfDeath,
    /// Only to these nodes; to any if it is empty.
    #[serde(default)]
    pub to: Vec<HostName>,
}

/// The size of a guest, as Nova's flavors name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flavor {
    /// vCPUs.
    pub vcpus: u32,
    /// Memory, MB in Nova's sense (MiB).
    pub memory_mb: u64,
}

/// The kind of a migration with what may be wished of that kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "migration_type", content = "options")]
pub enum Way {
    /// The guest runs on while it moves.
    #[serde(rename = "live-migration")]
    Live(LiveOptions),
    /// The guest is off while it moves.
    #[serde(rename = "migration")]
    Cold(ColdOptions),
    /// The guest stays on its node and changes hands.
    #[serde(rename = "project-transfer")]
    Transfer(ProjectTransfer),
    /// The guest's node is dead; it is started elsewhere.
    #[serde(rename = "evacuation")]
    Evacuation(Evacuation),
}

impl Way {
    /// The kind alone.
    pub fn migration_type(&self) -> MigrationType {
        match self {
            Self::Live(_) => MigrationType::LiveMigration,
            Self::Cold(_) => MigrationType::Migration,
            Self::Transfer(_) => MigrationType::ProjectTransfer,
            Self::Evacuation(_) => MigrationType::Evacuation,
        }
    }

    /// What is wrong with the options in themselves; empty if nothing is.
    pub fn problems(&self) -> Vec<String> {
        match self {
            Self::Live(options) => options.problems(),
            Self::Cold(options) => options.problems(),
            Self::Transfer(transfer) => transfer.options.problems(),
            Self::Evacuation(_) => Vec::new(),
        }
    }
}

impl Default for Way {
    fn default() -> Self {
        Self::Live(LiveOptions::default())
    }
}

fn problems(unknown: &Unknown, values: &[(&str, Option<u64>, u64, u64)]) -> Vec<String> {
    let out_of_bounds = values.iter().filter_map(|(name, value, low, high)| {
        let v = value.filter(|v| !(low..=high).contains(&v))?;
        Some(format!("{name} is {v}; it may be {low} to {high}"))
    });
    out_of_bounds.chain(unknown.problems()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_out_of_bounds_are_named() {
        assert!(LiveOptions::default().problems().is_empty());
        let bad = LiveOptions {
            parallel_connections: Some(1),
            max_downtime_ms: Some(0),
            ..Default::default()
        };
        let problems = bad.problems();
        assert_eq!(problems.len(), 2);
        assert!(problems[0].contains("parallel_connections is 1"));
    }
}

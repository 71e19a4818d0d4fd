//! What goes to and from the conductor about operations on nodes.

use serde::{Deserialize, Serialize};

use crate::{
    api::compute::CopySeen,
    check::CheckFailure,
    ids::{HostName, InstanceId, MigrationId},
    migration::Migration,
    operation::{
        BalanceOptions, DrainOptions, EvacuateOptions, Evidence, Operation, OperationPlan,
        RestoreOptions,
    },
};

/// Empty a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainNode {
    /// Which, and how.
    #[serde(flatten)]
    pub options: DrainOptions,
    /// Plan everything, change nothing.
    #[serde(default)]
    pub dry_run: bool,
}

/// Open a node again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreNode {
    /// Which, and what comes back.
    #[serde(flatten)]
    pub options: RestoreOptions,
    /// Plan everything, change nothing.
    #[serde(default)]
    pub dry_run: bool,
}

/// Start elsewhere what ran on a dead node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EvacuateNode {
    /// Which, and how.
    #[serde(flatten)]
    pub options: EvacuateOptions,
    /// Collect evidence and plan, change nothing: the node is not fenced.
    #[serde(default)]
    pub dry_run: bool,
}

/// What is known of a node that may be dead.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvidenceAnswer {
    /// What was seen just now.
    pub evidence: Evidence,
    /// What of it forbids an evacuation as it is asked for.
    pub failures: Vec<CheckFailure>,
}

/// Spread load.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct BalanceNodes {
    /// How.
    #[serde(flatten)]
    pub options: BalanceOptions,
    /// Plan everything, change nothing.
    #[serde(default)]
    pub dry_run: bool,
}

/// What came of asking for an operation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum OperationAnswer {
    /// It is on its way. Asked for what is under way already, that.
    Accepted {
        /// Its record.
        operation: Box<Operation>,
    },
    /// It was a dry run.
    Plan {
        /// What would be done.
        plan: Box<OperationPlan>,
        /// What stands in the way of all of it; it would be accepted if there
        /// is nothing.
        failures: Vec<CheckFailure>,
        /// Of an evacuation, what is known of the node.
        #[serde(default)]
        evidence: Option<Box<Evidence>>,
    },
}

/// Names an operation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OperationRef {
    /// Integer id, UUID, or unique prefix of one.
    pub operation: String,
}

/// Wait until an operation's record, or a migration of it, has changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WaitOperation {
    /// Integer id, UUID, or unique prefix of one.
    pub operation: String,
    /// Version the caller has seen.
    #[serde(default)]
    pub seen_version: u64,
    /// Answer after so long even if nothing changed, milliseconds; at most 30 s.
    #[serde(default)]
    pub timeout_ms: u64,
}

/// An operation, and its migrations that are under way.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OperationView {
    /// The operation.
    pub operation: Operation,
    /// Migrations of it that are under way, in the order of its guests.
    pub migrations: Vec<Migration>,
}

/// Which operations to list.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ListOperations {
    /// Only on this node.
    pub host: Option<HostName>,
    /// Only of this kind (`drain`, `restore`, `evacuate`, `balance`).
    pub kind: Option<String>,
    /// Only unfinished ones.
    pub active: bool,
    /// At most so many (default 100, at most 1000).
    pub limit: Option<u32>,
}

/// Declare a node down without waiting for its silence, or take that back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ForceDown {
    /// Its host name.
    pub host: HostName,
    /// Whether it is to count as down, whatever it says.
    #[serde(default = "yes")]
    pub forced_down: bool,
}

/// End a node that was scrapped. It must be silent, and nothing may need it. Guests
/// that another node lists are on the record there from then on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ForgetNode {
    /// Its host name.
    pub host: HostName,
    /// Check everything, change nothing.
    #[serde(default)]
    pub dry_run: bool,
    /// Guests that are nowhere else go with it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub despite_lost_guests: bool,
}

fn yes() -> bool {
    true
}

/// What the conductor does by itself, and whether it may now. The settings say
/// whether it does at all; this switches it off for a maintenance window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SetAutomation {
    /// Evacuate dead nodes; `None` leaves it.
    pub evacuate: Option<bool>,
    /// Balance load; `None` leaves it.
    pub balance: Option<bool>,
}

/// What the conductor does by itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Automation {
    /// `off`, `on`, or `paused` (on by the settings, switched off for now).
    pub evacuate: String,
    /// `off`, `shadow`, `on`, or `paused`.
    pub balance: String,
}

/// An agent asks what of its node lives elsewhere by now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListEvacuated {
    /// Its node.
    pub host: HostName,
    /// Guests that it is about to start because its node booted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub starting: Vec<InstanceId>,
}

/// An instance that was evacuated from a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evacuated {
    /// Which.
    pub instance: InstanceId,
    /// The evacuation.
    pub migration: MigrationId,
    /// Generation it has, or is to have, elsewhere. A copy of a lower one must
    /// not run.
    pub generation: u64,
    /// Where it lives now; none while its evacuation is not at its end.
    pub host: Option<HostName>,
    /// Its new home was asked just now, and has it in that generation.
    pub confirmed: bool,
    /// What the new home saw of it then: evidence without which no old copy goes.
    #[serde(default)]
    pub seen: Option<CopySeen>,
}

/// Everything that an agent must know before anything runs on its node.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct EvacuatedAnswer {
    /// Instances that were evacuated from it, or are being so.
    pub instances: Vec<Evacuated>,
    /// Those of [`ListEvacuated::starting`] that must not be started; an older
    /// conductor names none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub kept_off: Vec<KeptOff>,
}

/// A guest that must not be started where its node booted: nothing proves that it
/// runs nowhere else (invariant 1).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptOff {
    /// Which.
    pub instance: InstanceId,
    /// In words.
    pub reason: String,
    /// The node that has it by now: it is that one's to start. None if that is not
    /// decided yet, and to be asked again.
    #[serde(default)]
    pub lives_on: Option<HostName>,
}

/// An agent tells that it removed the old copy of an evacuated instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EvacuatedRemoved {
    /// Its node.
    pub host: HostName,
    /// The evacuation.
    pub migration: MigrationId,
}

//! Topic `conductor`, namespace `drover` 1.x: what operators, frontends and
//! agents say to the conductor.

mod agent;
mod operation;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use agent::{AgentLeaves, Heard, Heartbeat, Identity, RegisterAgent, Registered, Word};
pub use operation::{
    Automation, BalanceNodes, DrainNode, EvacuateNode, Evacuated, EvacuatedAnswer,
    EvacuatedRemoved, EvidenceAnswer, ForceDown, ForgetNode, KeptOff, ListEvacuated,
    ListOperations, OperationAnswer, OperationRef, OperationView, RestoreNode, SetAutomation,
    WaitOperation,
};

use super::compute::Outcome;
use crate::{
    check::CheckFailure,
    evidence::AgentLost,
    guest::PowerState,
    ids::{HostName, InstanceId, MigrationId, OfferId, ProjectId},
    migration::{Migration, MigrationType, Progress, Requester, TransferOptions, Way},
    node::NodeReport,
    project::{Limit, NetworkPlace, Project, ProjectUsage, StoragePlace},
    version::Spoken,
};

/// Names of the methods.
pub mod method {
    /// [`super::MigrateInstance`] → [`super::MigrateAnswer`]
    pub const MIGRATE_INSTANCE: &str = "migrate_instance";
    /// [`super::TransferInstance`] → [`super::MigrateAnswer`]: to another project,
    /// for whoever may speak for both sides.
    pub const TRANSFER_INSTANCE: &str = "transfer_instance";
    /// [`super::OfferTransfer`] → [`super::OfferMade`]: the giver's side of a transfer.
    pub const OFFER_TRANSFER: &str = "offer_transfer";
    /// [`super::AcceptTransfer`] → [`super::MigrateAnswer`]: the receiver's.
    pub const ACCEPT_TRANSFER: &str = "accept_transfer";
    /// [`super::OfferRef`] → [`super::Offer`]
    pub const WITHDRAW_TRANSFER: &str = "withdraw_transfer";
    /// [`super::OfferRef`] → [`super::Offer`]
    pub const GET_TRANSFER: &str = "get_transfer";
    /// [`super::ListOffers`] → `Vec<`[`super::Offer`]`>`, newest first.
    pub const LIST_TRANSFERS: &str = "list_transfers";
    /// [`Project`](crate::project::Project) → [`super::ProjectView`]
    pub const CREATE_PROJECT: &str = "create_project";
    /// [`super::SetProject`] → [`super::ProjectView`]
    pub const SET_PROJECT: &str = "set_project";
    /// [`super::ProjectRef`] → [`super::ProjectView`]
    pub const GET_PROJECT: &str = "get_project";
    /// No arguments → `Vec<`[`super::ProjectView`]`>`, by id.
    pub const LIST_PROJECTS: &str = "list_projects";
    /// [`super::MigrationRef`] → [`super::Migration`]
    pub const ABORT_MIGRATION: &str = "abort_migration";
    /// [`super::MigrationRef`] → [`super::Migration`]
    pub const FORCE_COMPLETE_MIGRATION: &str = "force_complete_migration";
    /// [`super::MigrationRef`] → [`super::Migration`]: of a cold one that is
    /// *finished*, the source's copy is removed.
    pub const CONFIRM_MIGRATION: &str = "confirm_migration";
    /// [`super::RevertMigration`] → [`super::Migration`]: of a cold one that is
    /// *finished*, the guest goes back.
    pub const REVERT_MIGRATION: &str = "revert_migration";
    /// [`super::MigrationRef`] → [`super::Migration`]: takes a *stuck* one up again.
    pub const RESUME_MIGRATION: &str = "resume_migration";
    /// [`super::MigrationRef`] → [`super::Migration`]
    pub const GET_MIGRATION: &str = "get_migration";
    /// [`super::WaitMigration`] → [`super::Migration`]
    pub const WAIT_MIGRATION: &str = "wait_migration";
    /// [`super::ListMigrations`] → `Vec<`[`super::Migration`]`>`, newest first.
    pub const LIST_MIGRATIONS: &str = "list_migrations";
    /// [`super::InstanceRef`] → [`super::Instance`]
    pub const GET_INSTANCE: &str = "get_instance";
    /// [`super::InstanceRef`] → [`super::Definition`]
    pub const GET_KEPT_DEFINITION: &str = "get_kept_definition";
    /// [`super::ForgetInstance`] → `null`
    pub const FORGET_INSTANCE: &str = "forget_instance";
    /// [`super::ListInstances`] → `Vec<`[`super::Instance`]`>`
    pub const LIST_INSTANCES: &str = "list_instances";
    /// [`super::NodeRef`] → [`super::Node`]
    pub const GET_NODE: &str = "get_node";
    /// No arguments → `Vec<`[`super::Node`]`>`
    pub const LIST_NODES: &str = "list_nodes";
    /// [`super::SetNode`] → [`super::Node`]
    pub const SET_NODE: &str = "set_node";
    /// [`super::ForceDown`] → [`super::Node`]
    pub const FORCE_DOWN: &str = "force_down_node";
    /// [`super::ForgetNode`] → `null`
    pub const FORGET_NODE: &str = "forget_node";
    /// [`super::DrainNode`] → [`super::OperationAnswer`]
    pub const DRAIN_NODE: &str = "drain_node";
    /// [`super::RestoreNode`] → [`super::OperationAnswer`]
    pub const RESTORE_NODE: &str = "restore_node";
    /// [`super::EvacuateNode`] → [`super::OperationAnswer`]
    pub const EVACUATE_NODE: &str = "evacuate_node";
    /// [`super::EvacuateNode`] → [`super::EvidenceAnswer`]; nothing is done to the node.
    pub const GET_EVIDENCE: &str = "get_evidence";
    /// [`super::BalanceNodes`] → [`super::OperationAnswer`]
    pub const BALANCE_NODES: &str = "balance_nodes";
    /// [`super::OperationRef`] → [`super::OperationView`]
    pub const GET_OPERATION: &str = "get_operation";
    /// [`super::WaitOperation`] → [`super::OperationView`]
    pub const WAIT_OPERATION: &str = "wait_operation";
    /// [`super::ListOperations`] → `Vec<`[`Operation`](crate::operation::Operation)`>`, newest first.
    pub const LIST_OPERATIONS: &str = "list_operations";
    /// [`super::OperationRef`] → [`super::OperationView`]: no more guests begin, and
    /// those on their way are called back. Asked twice it is one cancel.
    pub const CANCEL_OPERATION: &str = "cancel_operation";
    /// [`super::SetAutomation`] → [`super::Automation`]; without a change, how it is.
    pub const SET_AUTOMATION: &str = "set_automation";
    /// [`super::ListEvacuated`] → [`super::EvacuatedAnswer`], for agents.
    pub const LIST_EVACUATED: &str = "list_evacuated";
    /// [`super::EvacuatedRemoved`] → `null`, for agents.
    pub const EVACUATED_REMOVED: &str = "evacuated_removed";
    /// No arguments → [`super::ConductorStatus`]
    pub const GET_STATUS: &str = "get_status";
    /// [`super::RegisterAgent`] → [`super::Registered`], by agents at their start.
    pub const REGISTER_AGENT: &str = "register_agent";
    /// [`super::Heartbeat`] → [`super::Heard`], by agents.
    pub const HEARTBEAT: &str = "heartbeat";
    /// [`super::AgentLeaves`] → `null`, by agents.
    pub const AGENT_LEAVES: &str = "agent_leaves";
    /// [`super::NodeReport`] → [`super::Word`], by agents.
    pub const REPORT_STATE: &str = "report_state";
    /// [`super::MigrationReport`], cast by agents.
    pub const MIGRATION_PROGRESS: &str = "migration_progress";
}

/// Ask for a migration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigrateInstance {
    /// UUID, unique prefix of one (at least 4 characters), or name.
    pub instance: String,
    /// Which kind.
    #[serde(rename = "type", default = "live")]
    pub migration_type: MigrationType,
    /// Where to; the conductor chooses if it is left out.
    #[serde(default)]
    pub host: Option<HostName>,
    /// How: [`LiveOptions`](crate::migration::LiveOptions) or [`ColdOptions`](crate::migration::ColdOptions), by the type.
    #[serde(default)]
    pub options: serde_json::Map<String, serde_json::Value>,
    /// Check everything, change nothing.
    #[serde(default)]
    pub dry_run: bool,
}

impl MigrateInstance {
    /// Asks for a migration of that kind.
    pub fn new(instance: impl Into<String>, host: Option<HostName>, way: &Way) -> Self {
        let options = match way {
            Way::Live(options) => serde_json::to_value(options),
            Way::Cold(options) => serde_json::to_value(options),
            Way::Transfer(transfer) => serde_json::to_value(transfer),
            Way::Evacuation(evacuation) => serde_json::to_value(evacuation),
        };
        let options = match options {
            Ok(serde_json::Value::Object(options)) => options,
            // Structures of numbers and truth values are always written as objects.
            _ => serde_json::Map::new(),
        };
        Self {
            instance: instance.into(),
            migration_type: way.migration_type(),
            host,
            options,
            dry_run: false,
        }
    }

    /// Kind and options together.
    ///
    /// # Errors
    /// An option is unknown to that kind, or its value cannot be; says which.
    pub fn way(&self) -> Result<Way, serde_json::Error> {
        let options = serde_json::Value::Object(self.options.clone());
        Ok(match self.migration_type {
            MigrationType::LiveMigration => Way::Live(serde_json::from_value(options)?),
            MigrationType::Migration => Way::Cold(serde_json::from_value(options)?),
            MigrationType::ProjectTransfer => Way::Transfer(serde_json::from_value(options)?),
            MigrationType::Evacuation => Way::Evacuation(serde_json::from_value(options)?),
        })
    }
}

fn live() -> MigrationType {
    MigrationType::LiveMigration
}

/// What came of asking for a migration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum MigrateAnswer {
    /// It is on its way.
    Accepted {
        /// Its record.
        migration: Box<Migration>,
    },
    /// It was a dry run.
    Plan {
        /// What would be done.
        plan: Plan,
    },
}

/// What a dry run found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// What would move.
    pub instance_uuid: InstanceId,
    /// Its name.
    pub instance_name: String,
    /// From.
    pub source_host: HostName,
    /// The destination it would take; none if no node is fit.
    pub dest_host: Option<HostName>,
    /// Every failed check; a migration would be accepted if there is none.
    pub failures: Vec<CheckFailure>,
    /// Disks (of a cold migration, files by path) that would be copied, and how
    /// big they are.
    pub copied_disks: Vec<PlannedDisk>,
    /// Memory to send, MiB; of a cold migration none.
    pub memory_mib: u64,
    /// What would be decided, in words.
    pub decisions: Vec<String>,
}

/// A disk that a migration would copy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedDisk {
    /// Name in the guest, or path of the file.
    pub target: String,
    /// Bytes that would really be sent.
    pub allocated_bytes: u64,
}

/// Names a migration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigrationRef {
    /// Integer id, UUID, or unique prefix of one.
    pub migration: String,
}

/// Take a guest back from where a cold migration brought it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RevertMigration {
    /// Integer id, UUID, or unique prefix of one.
    pub migration: String,
    /// Keep what the guest wrote since: confirm, and migrate it back cold. Else
    /// that is lost, unless its disks are shared.
    #[serde(default)]
    pub keep_changes: bool,
}

/// Wait until a migration's record has changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WaitMigration {
    /// Integer id, UUID, or unique prefix of one.
    pub migration: String,
    /// Version the caller has seen.
    #[serde(default)]
    pub seen_version: u64,
    /// Answer after so long even if nothing changed, milliseconds; at most 30 s.
    #[serde(default)]
    pub timeout_ms: u64,
}

/// Which migrations to list.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ListMigrations {
    /// Only of this instance (UUID, prefix or name).
    pub instance: Option<String>,
    /// Only from or to this node.
    pub host: Option<HostName>,
    /// Only unfinished ones.
    pub active: bool,
    /// At most so many (default 100, at most 1000).
    pub limit: Option<u32>,
}

/// Names an instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InstanceRef {
    /// UUID, unique prefix of one (at least 4 characters), or name.
    pub instance: String,
}

/// Which instances to list.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ListInstances {
    /// Only on this node.
    pub host: Option<HostName>,
    /// Only of this project.
    pub project: Option<String>,
}

/// Move an instance to another project on its node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransferInstance {
    /// UUID, unique prefix of one (at least 4 characters), or name.
    pub instance: String,
    /// Id or unique name of the project that gets it.
    pub project: String,
    /// How.
    #[serde(default)]
    pub options: TransferOptions,
    /// Check everything, change nothing.
    #[serde(default)]
    pub dry_run: bool,
}

/// Offer an instance to another project.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OfferTransfer {
    /// UUID, unique prefix of one (at least 4 characters), or name.
    pub instance: String,
    /// The one project that may accept; whoever has the key, if it is left out.
    #[serde(default)]
    pub project: Option<String>,
    /// For how long, seconds: a day if it is left out, 30 days at the most.
    #[serde(default)]
    pub expires_in_s: Option<u64>,
}

/// An offer that was made.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OfferMade {
    /// The offer.
    pub offer: Offer,
    /// What the receiver needs to accept it. It is told this once, and kept nowhere.
    pub key: String,
}

impl std::fmt::Debug for OfferMade {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "OfferMade({:?})", self.offer)
    }
}

/// Where an offer stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OfferState {
    /// It can be accepted.
    Open,
    /// It was accepted, and the transfer is under way or done. One that fails
    /// leaves the offer open again.
    Accepted,
    /// Its time is over.
    Expired,
    /// The giver took it back.
    Withdrawn,
    /// Too many wrong keys were tried.
    Locked,
    /// The instance is gone, or another project's by now.
    Void,
}

impl OfferState {
    /// The state as a word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Accepted => "accepted",
            Self::Expired => "expired",
            Self::Withdrawn => "withdrawn",
            Self::Locked => "locked",
            Self::Void => "void",
        }
    }
}

/// An offer of an instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// Names it.
    pub id: OfferId,
    /// What is offered.
    pub instance_uuid: InstanceId,
    /// Its name when it was offered.
    pub instance_name: String,
    /// Whose it is.
    pub from_project: String,
    /// Who alone may accept, if anybody is named.
    pub to_project: Option<ProjectId>,
    /// Where it stands.
    pub state: OfferState,
    /// Who offered.
    pub offered_by: Requester,
    /// When, milliseconds since 1970.
    pub created_at_ms: u64,
    /// Until when it can be accepted, milliseconds since 1970.
    pub expires_at_ms: u64,
    /// Wrong keys that were tried.
    pub wrong_keys: u32,
    /// The transfer that came of it last.
    pub migration: Option<MigrationId>,
}

/// Names an offer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OfferRef {
    /// UUID or unique prefix of one (at least 4 characters).
    pub offer: String,
}

/// Which offers to list.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ListOffers {
    /// Only those by or for this project (id).
    pub project: Option<String>,
    /// Also those that can no longer be accepted.
    pub all: bool,
}

/// Accept an offer.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AcceptTransfer {
    /// UUID or unique prefix of one (at least 4 characters).
    pub offer: String,
    /// The key that the giver was told.
    pub key: String,
    /// Id or unique name of the project that gets the instance.
    pub project: String,
    /// How.
    #[serde(default)]
    pub options: TransferOptions,
    /// Check everything, change nothing.
    #[serde(default)]
    pub dry_run: bool,
}

impl std::fmt::Debug for AcceptTransfer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AcceptTransfer({} for {})", self.offer, self.project)
    }
}

/// Names a project.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProjectRef {
    /// Id or unique name.
    pub project: String,
}

/// Change a project; what is left out stays.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetProject {
    /// Id or unique name.
    pub project: String,
    /// What changes.
    #[serde(default)]
    pub change: ProjectChange,
}

/// A change of a project; what is left out stays.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ProjectChange {
    /// What people call it.
    pub name: Option<String>,
    /// Whether it may get instances.
    pub enabled: Option<bool>,
    /// Instances it may have.
    pub instances: Option<Limit>,
    /// vCPUs it may have.
    pub vcpus: Option<Limit>,
    /// Memory it may have, MB in Nova's sense (MiB).
    pub memory_mb: Option<Limit>,
    /// Disks it may have, GB in Nova's sense (GiB).
    pub disk_gb: Option<Limit>,
    /// Networks that are new, or said anew; an empty list takes one away.
    pub networks: BTreeMap<String, Vec<NetworkPlace>>,
    /// Where disks are, said anew.
    pub storage: Option<Vec<StoragePlace>>,
}

impl ProjectChange {
    /// The project with the change.
    #[must_use]
    pub fn applied(&self, project: &Project) -> Project {
        let mut changed = project.clone();
        let set = |limit: &mut Limit, new: Option<Limit>| *limit = new.unwrap_or(*limit);
        if let Some(name) = &self.name {
            changed.name.clone_from(name);
        }
        changed.enabled = self.enabled.unwrap_or(changed.enabled);
        set(&mut changed.quota.instances, self.instances);
        set(&mut changed.quota.vcpus, self.vcpus);
        set(&mut changed.quota.memory_mb, self.memory_mb);
        set(&mut changed.quota.disk_gb, self.disk_gb);
        for (network, places) in &self.networks {
            match places.as_slice() {
                [] => drop(changed.networks.remove(network)),
                _ => drop(changed.networks.insert(network.clone(), places.clone())),
            }
        }
        if let Some(storage) = &self.storage {
            changed.storage.clone_from(storage);
        }
        changed
    }
}

/// A project as the record has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProjectView {
    /// The project. One that was never created, and is only named by instances,
    /// has no limits, and may get none.
    pub project: Project,
    /// Whether it was created.
    pub created: bool,
    /// What it has, by its instances (invariant 7).
    pub usage: ProjectUsage,
    /// What it is about to get, by transfers under way.
    pub promised: ProjectUsage,
}

/// Names a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeRef {
    /// Its host name.
    pub host: HostName,
}

/// Open or close a node for instances to come.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetNode {
    /// Its host name.
    pub host: HostName,
    /// Whether instances may be placed there.
    pub enabled: bool,
    /// Why not.
    #[serde(default)]
    pub reason: Option<String>,
}

/// An instance as the record has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instance {
    /// Domain UUID.
    pub uuid: InstanceId,
    /// Domain name.
    pub name: String,
    /// Owning project.
    pub project_id: String,
    /// Where the hypervisors say it runs (invariant 2).
    pub host: HostName,
    /// State there.
    pub power_state: PowerState,
    /// Nova's word for what it is.
    pub vm_state: String,
    /// Nova's word for what is being done with it, if anything.
    pub task_state: Option<String>,
    /// vCPUs.
    pub vcpus: u32,
    /// Memory, MB in Nova's sense (MiB).
    pub memory_mb: u64,
    /// Disks, bytes.
    pub disk_bytes: u64,
    /// Generation.
    pub generation: u64,
    /// Migration under way.
    pub migration: Option<MigrationId>,
    /// When its node last reported it, milliseconds since 1970.
    pub seen_at_ms: u64,
    /// What of it cannot be read on its node, and why.
    #[serde(default)]
    pub unreadable: Option<String>,
    /// A copy of it that is active on another node.
    #[serde(default)]
    pub other_copy: Option<OtherCopy>,
    /// Why its node does not list it, and what to do, if that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lost: Option<CheckFailure>,
}

/// Take an instance that was lost with its node from the record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ForgetInstance {
    /// UUID, prefix or name.
    pub instance: String,
    /// Check everything, change nothing.
    #[serde(default)]
    pub dry_run: bool,
}

/// How an instance was defined when its node told it last. It may be gone since.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Definition {
    /// Which.
    pub instance: InstanceId,
    /// The node that told it.
    pub host: HostName,
    /// When, milliseconds since 1970.
    pub taken_at_ms: u64,
    /// Whether there are secrets, which no node tells.
    pub has_secrets: bool,
    /// As libvirt writes it.
    pub domain: String,
}

/// A copy of an instance that is active on another node than the record's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OtherCopy {
    /// Where.
    pub host: HostName,
    /// State there.
    pub power_state: PowerState,
    /// Since when it is known, milliseconds since 1970.
    pub since_ms: u64,
    /// Whether both copies were seen to run at one time.
    pub both_run: bool,
}

/// A node as the record has it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Node {
    /// Host name.
    pub host: HostName,
    /// Whether instances may be placed there.
    pub enabled: bool,
    /// Why not.
    pub disabled_reason: Option<String>,
    /// Heard from recently, and not declared down.
    pub up: bool,
    /// Declared down by an operator.
    #[serde(default)]
    pub forced_down: bool,
    /// When it was last heard from by the conductor's clock, milliseconds since 1970.
    pub heard_at_ms: u64,
    /// How long ago that was, ms.
    pub report_age_ms: u64,
    /// Its clock less the conductor's, ms, as of its last heartbeat.
    pub clock_offset_ms: i64,
    /// Which incarnation its agent is; 0 if none has registered.
    #[serde(default)]
    pub incarnation: u64,
    /// What a conductor refused in its name lately, and why: another agent of
    /// that name, or reports that are too old.
    #[serde(default)]
    pub refusal: Option<String>,
    /// Versions of RPC that its agent speaks.
    #[serde(default, skip_serializing_if = "Spoken::is_unsaid")]
    pub speaks: Spoken,
    /// Why nothing is asked of its agent, if the conductor has no version in common
    /// with it: it lives, and takes part in nothing.
    #[serde(default)]
    pub version_mismatch: Option<String>,
    /// vCPUs in use and on their way there.
    pub vcpus_used: u64,
    /// Memory in use and on its way there, MiB.
    pub memory_used_mib: u64,
    /// Disk room claimed by migrations on their way there, bytes.
    pub disk_claimed_bytes: u64,
    /// vCPUs that may be given out.
    pub vcpus_usable: u64,
    /// Memory that may be given out, MiB.
    pub memory_usable_mib: u64,
    /// Instances on it; none known while its libvirt does not answer.
    pub instances: Option<u64>,
    /// Its agent is silent, and nothing proves that the node is dead.
    #[serde(default)]
    pub agent_lost: Option<AgentLost>,
    /// What its agent said last.
    pub report: NodeReport,
}

/// How a conductor is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConductorStatus {
    /// Name of the conductor that answered.
    pub conductor: String,
    /// Its version.
    pub version: String,
    /// Its clock, milliseconds since 1970.
    pub clock_ms: u64,
    /// Kind of database (`sqlite`, `postgresql`).
    pub database: String,
    /// Unfinished migrations it works on.
    pub migrations_owned: u64,
    /// Counters since it started, by name.
    pub counters: std::collections::BTreeMap<String, u64>,
    /// After how long without a report a node counts as down, seconds.
    pub service_down_time_s: u64,
    /// Versions of RPC that it speaks.
    #[serde(default, skip_serializing_if = "Spoken::is_unsaid")]
    pub speaks: Spoken,
    /// What it leaves alone because a newer Drover wrote it, and why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left_alone: Vec<LeftAlone>,
}

/// What a conductor leaves alone because a newer Drover wrote it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftAlone {
    /// Which, in words: `migration 2f…`.
    pub what: String,
    /// What of it cannot be read.
    pub why: String,
}

/// An agent's word on a migration it carries out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MigrationReport {
    /// Which.
    pub migration: MigrationId,
    /// Who says it.
    pub host: HostName,
    /// Sample.
    pub progress: Progress,
    /// Decisions taken since the last report.
    #[serde(default)]
    pub decisions: Vec<String>,
    /// How the transfer ended, once it has.
    #[serde(default)]
    pub outcome: Option<Outcome>,
}

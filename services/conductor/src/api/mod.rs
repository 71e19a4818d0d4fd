//! What the conductor serves: decode, admit, journal, acknowledge, answer.
//!
//! [`DroverEndpoint`] (namespace `drover`) is for operators, frontends and
//! agents; [`ComputeTaskEndpoint`] (namespace `compute_task`) takes what Nova's
//! frontends cast. [`convert`] turns rows into answers;
//! [`failure`] turns refusals into the exceptions that callers know.

pub mod convert;
mod ending;
mod evacuation;
pub mod failure;
pub mod migrate;
mod nova;
mod operation;
mod project;
mod transfer;
mod wait;

use std::{collections::BTreeMap, sync::Arc};

use async_trait::async_trait;
use drover_model::{
    api::{
        NAMESPACE,
        conductor::{
            AgentLeaves, ConductorStatus, Definition, ForgetInstance, Heartbeat, InstanceRef,
            ListInstances, ListMigrations, MigrateInstance, MigrationRef, MigrationReport, NodeRef,
            RegisterAgent, SetNode, WaitMigration, Word, method,
        },
    },
    ids::{InstanceId, MigrationId},
    migration::{Ending, Migration, MigrationStatus, Phase, Way},
    node::NodeReport,
};
use drover_rpc::{Endpoint, Notifier, Priority, RemoteFailure, Request, RpcStats};
use drover_store::{StoreError, nodes::Reported};
use serde::Serialize;
use serde_json::Value;
use tokio::sync::Semaphore;
use tracing::{info, warn};

pub use nova::ComputeTaskEndpoint;

use crate::{
    api::failure::{store_failure, to_value},
    app::Context,
    operation::runner::OperationRunner,
    task::{
        journal::notification,
        runner::{Aborting, Runner},
    },
};

/// Result of a method.
pub(crate) type Answer = Result<Value, RemoteFailure>;

/// Namespace `drover`.
pub struct DroverEndpoint {
    pub(crate) context: Context,
    pub(crate) runner: Runner,
    pub(crate) operations: OperationRunner,
    notifier: Notifier,
    stats: Arc<RpcStats>,
    waits: Semaphore,
    /// The newest version that it answers in.
    version: String,
}

#[async_trait]
impl Endpoint for DroverEndpoint {
    fn namespace(&self) -> Option<&str> {
        Some(NAMESPACE)
    }

    fn version(&self) -> &str {
        &self.version
    }

    fn methods(&self) -> &[&str] {
        &[
            method::MIGRATE_INSTANCE,
            method::TRANSFER_INSTANCE,
            method::OFFER_TRANSFER,
            method::ACCEPT_TRANSFER,
            method::WITHDRAW_TRANSFER,
            method::GET_TRANSFER,
            method::LIST_TRANSFERS,
            method::CREATE_PROJECT,
            method::SET_PROJECT,
            method::GET_PROJECT,
            method::LIST_PROJECTS,
            method::ABORT_MIGRATION,
            method::FORCE_COMPLETE_MIGRATION,
            method::CONFIRM_MIGRATION,
            method::REVERT_MIGRATION,
            method::RESUME_MIGRATION,
            method::GET_MIGRATION,
            method::WAIT_MIGRATION,
            method::LIST_MIGRATIONS,
            method::GET_INSTANCE,
            method::GET_KEPT_DEFINITION,
            method::FORGET_INSTANCE,
            method::LIST_INSTANCES,
            method::GET_NODE,
            method::LIST_NODES,
            method::SET_NODE,
            method::FORCE_DOWN,
            method::FORGET_NODE,
            method::LIST_EVACUATED,
            method::EVACUATED_REMOVED,
            method::DRAIN_NODE,
            method::RESTORE_NODE,
            method::EVACUATE_NODE,
            method::GET_EVIDENCE,
            method::BALANCE_NODES,
            method::GET_OPERATION,
            method::WAIT_OPERATION,
            method::LIST_OPERATIONS,
            method::CANCEL_OPERATION,
            method::SET_AUTOMATION,
            method::GET_STATUS,
            method::REGISTER_AGENT,
            method::HEARTBEAT,
            method::AGENT_LEAVES,
            method::REPORT_STATE,
            method::MIGRATION_PROGRESS,
        ]
    }

    async fn handle(&self, request: Request) -> Answer {
        match request.method() {
            method::MIGRATE_INSTANCE => {
                let ask: MigrateInstance = request.args()?;
                to_value(&self.migrate_instance(&request, &ask).await?)
            }
            method::ABORT_MIGRATION => to_value(&self.abort(&request.args()?).await?),
            method::FORCE_COMPLETE_MIGRATION => to_value(&self.force(&request.args()?).await?),
            method::CONFIRM_MIGRATION => {
                let ask: MigrationRef = request.args()?;
                to_value(&self.end_with(&ask.migration, Ending::Confirm).await?)
            }
            method::REVERT_MIGRATION => to_value(&self.revert(&request).await?),
            method::RESUME_MIGRATION => to_value(&self.resume(&request.args()?).await?),
            method::GET_MIGRATION => self.get_migration(&request.args()?).await,
            method::WAIT_MIGRATION => {
                let ask: WaitMigration = request.args()?;
                // A long wait holds no unacknowledged message.
                request.accept().await;
                to_value(&self.wait(&ask).await?)
            }
            method::LIST_MIGRATIONS => self.list_migrations(&request.args()?).await,
            method::GET_INSTANCE => self.get_instance(&request.args()?).await,
            method::GET_KEPT_DEFINITION => self.kept_definition(&request.args()?).await,
            method::FORGET_INSTANCE => self.forget_instance(&request.args()?).await,
            method::LIST_INSTANCES => self.list_instances(&request.args()?).await,
            method::GET_NODE => self.get_node(&request.args()?).await,
            method::LIST_NODES => self.list_nodes().await,
            method::SET_NODE => self.set_node(&request.args()?).await,
            method::GET_STATUS => to_value(&self.status()),
            method::REGISTER_AGENT => self.register_agent(&request.args()?).await,
            method::HEARTBEAT => self.heartbeat(&request.args()?).await,
            method::AGENT_LEAVES => self.agent_leaves(&request.args()?).await,
            // Of what is followed by newer word the old is worth nothing later.
            method::REPORT_STATE => {
                let reported = self.report_state(&request.args()?).await;
                to_value(&reported.map_err(RemoteFailure::final_at_once)?)
            }
            method::MIGRATION_PROGRESS => {
                let reported = self.migration_progress(request.args()?).await;
                reported.map_err(RemoteFailure::final_at_once)
            }
            _ => self.handle_operations(&request).await,
        }
    }
}

impl DroverEndpoint {
    /// The endpoint of a conductor.
    pub fn new(
        context: Context,
        (runner, operations): (Runner, OperationRunner),
        notifier: Notifier,
        stats: Arc<RpcStats>,
    ) -> Self {
        let version = context.store.hearing().speaks().max.to_string();
        Self {
            context,
            runner,
            operations,
            notifier,
            stats,
            version,
            waits: Semaphore::new(wait::MAX_WAITS),
        }
    }

    /// Projects, and what goes between them.
    async fn handle_projects(&self, request: &Request) -> Answer {
        match request.method() {
            method::TRANSFER_INSTANCE => {
                to_value(&self.transfer_instance(request, &request.args()?).await?)
            }
            method::OFFER_TRANSFER => {
                to_value(&self.offer_transfer(request, &request.args()?).await?)
            }
            method::ACCEPT_TRANSFER => {
                to_value(&self.accept_transfer(request, &request.args()?).await?)
            }
            method::WITHDRAW_TRANSFER => to_value(&self.withdraw_transfer(&request.args()?).await?),
            method::GET_TRANSFER => to_value(&self.get_transfer(&request.args()?).await?),
            method::LIST_TRANSFERS => to_value(&self.list_transfers(&request.args()?).await?),
            method::CREATE_PROJECT => to_value(&self.create_project(&request.args()?).await?),
            method::SET_PROJECT => to_value(&self.set_project(&request.args()?).await?),
            method::GET_PROJECT => to_value(&self.get_project(&request.args()?).await?),
            method::LIST_PROJECTS => to_value(&self.list_projects().await?),
            _ => self.handle_evacuation(request).await,
        }
    }

    // ---- migrations

    async fn find(&self, ask: &MigrationRef) -> Result<Migration, RemoteFailure> {
        let found = self.context.store.find_migration(&ask.migration).await;
        found.map_err(|e| store_failure(&e))
    }

    /// As it is kept: who asks may be newer than this conductor.
    async fn get_migration(&self, ask: &MigrationRef) -> Answer {
        let kept = self.context.store.migration_as_kept(&ask.migration).await;
        kept.map_err(|e| store_failure(&e))
    }

    async fn change(
        &self,
        id: MigrationId,
        change: impl FnMut(&mut Migration) -> bool + Send,
    ) -> Result<Migration, RemoteFailure> {
        let changed = self.context.store.update_migration(id, change).await;
        changed.map_err(|e| store_failure(&e))
    }

    /// Asks for an abort. Valid in every state before the switch-over; asked
    /// twice it is one abort.
    pub(crate) async fn abort(&self, ask: &MigrationRef) -> Result<Migration, RemoteFailure> {
        let found = self.find(ask).await?;
        let aborted = self.runner.abort_by_word(found.uuid).await;
        match aborted.map_err(|e| store_failure(&e))? {
            Aborting::Asked(migration) => {
                self.tell(&migration, abort_event(&migration.way)).await;
                Ok(*migration)
            }
            Aborting::AskedBefore(migration) => Ok(*migration),
            Aborting::TooLate(migration) => Err(failure::wrong_state(&migration, "abort")),
        }
    }

    /// Asks for the end of a transfer at the guest's expense.
    pub(crate) async fn force(&self, ask: &MigrationRef) -> Result<Migration, RemoteFailure> {
        let found = self.find(ask).await?;
        let mut wrong = false;
        let migration = self
            .change(found.uuid, |m| {
                let steered = matches!(m.way, Way::Live(_)) && m.status == MigrationStatus::Running;
                wrong = !steered || m.past_return();
                !wrong && !std::mem::replace(&mut m.force_complete_requested, true)
            })
            .await?;
        if wrong {
            return Err(failure::wrong_state(&migration, "force-complete"));
        }
        if !found.force_complete_requested {
            self.tell(&migration, "instance.live_migration_force_complete.start")
                .await;
        }
        Ok(migration)
    }

    async fn resume(&self, ask: &MigrationRef) -> Result<Migration, RemoteFailure> {
        let migration = self.find(ask).await?;
        if migration.status != MigrationStatus::Stuck {
            return Err(failure::wrong_state(&migration, "resume"));
        }
        let resumed = self.runner.resume(migration.uuid).await;
        resumed.map_err(|e| store_failure(&e))?;
        Ok(migration)
    }

    async fn list_migrations(&self, ask: &ListMigrations) -> Answer {
        let instance: Option<InstanceId> = match &ask.instance {
            None => None,
            Some(text) => match text.parse() {
                // An instance that is gone keeps its history.
                Ok(id) => Some(id),
                Err(_) => Some(self.instance(text).await?.id),
            },
        };
        let listed = self.context.store.migrations_as_kept(ask, instance).await;
        to_value(&listed.map_err(|e| store_failure(&e))?)
    }

    async fn tell(&self, migration: &Migration, event_type: &str) {
        let n = notification(migration, event_type, "INFO");
        let context = drover_rpc::RequestContext::service(
            migration.requester.request_id.clone().unwrap_or_default(),
        );
        let sent = self
            .notifier
            .notify(&context, Priority::Info, event_type, &n.payload)
            .await;
        if let Err(error) = sent {
            warn!(%error, event_type, "a notification was not sent");
        }
    }

    // ---- instances and nodes

    pub(crate) async fn instance(
        &self,
        reference: &str,
    ) -> Result<drover_store::instances::InstanceRow, RemoteFailure> {
        let found = self.context.store.find_instance(reference).await;
        found.map_err(|e| store_failure(&e))
    }

    async fn get_instance(&self, ask: &InstanceRef) -> Answer {
        let row = self.instance(&ask.instance).await?;
        let moving = match self.context.store.active_migration(row.id).await {
            // Looked at it may be, whatever a newer conductor does with it.
            Err(StoreError::Newer { .. }) => None,
            moving => moving.map_err(|e| store_failure(&e))?,
        };
        to_value(&convert::instance(&row, moving.as_slice()))
    }

    async fn forget_instance(&self, ask: &ForgetInstance) -> Answer {
        let row = self.instance(&ask.instance).await?;
        let forgotten = self.context.store.forget_instance(row.id, !ask.dry_run);
        forgotten.await.map_err(|e| store_failure(&e))?;
        if !ask.dry_run {
            info!(instance = %row.id, host = %row.host, "the lost instance is forgotten");
        }
        Ok(Value::Null)
    }

    /// Also of one that is no longer on the record, by its UUID.
    async fn kept_definition(&self, ask: &InstanceRef) -> Answer {
        let id = match ask.instance.parse() {
            Ok(id) => id,
            Err(_) => self.instance(&ask.instance).await?.id,
        };
        let kept = self.context.store.kept_definition(id).await;
        let kept = kept.and_then(|kept| {
            kept.ok_or_else(|| StoreError::NotFound(format!("instance '{id}' with a definition")))
        });
        let row = kept.map_err(|e| store_failure(&e))?;
        to_value(&Definition {
            instance: id,
            host: row.host,
            taken_at_ms: row.taken_at_ms,
            has_secrets: row.kept.has_secrets,
            domain: row.kept.domain,
        })
    }

    async fn list_instances(&self, ask: &ListInstances) -> Answer {
        let rows = self
            .context
            .store
            .instances(ask.host.as_ref(), ask.project.as_deref())
            .await;
        let rows = rows.map_err(|e| store_failure(&e))?;
        let moving = self.active_of(&rows).await?;
        let all: Vec<_> = rows
            .iter()
            .map(|row| convert::instance(row, &moving))
            .collect();
        to_value(&all)
    }

    async fn active_of(
        &self,
        rows: &[drover_store::instances::InstanceRow],
    ) -> Result<Vec<Migration>, RemoteFailure> {
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        let active = self.context.store.active_migrations().await;
        active.map_err(|e| store_failure(&e))
    }

    async fn get_node(&self, ask: &NodeRef) -> Answer {
        let row = self
            .context
            .store
            .node(&ask.host)
            .await
            .map_err(|e| store_failure(&e))?;
        to_value(&self.node(&row).await?)
    }

    async fn list_nodes(&self) -> Answer {
        let rows = self
            .context
            .store
            .nodes()
            .await
            .map_err(|e| store_failure(&e))?;
        let reports: Vec<&NodeReport> = rows.iter().map(|row| &row.report).collect();
        let usages = self.context.store.usages(&reports).await;
        let usages = usages.map_err(|e| store_failure(&e))?;
        let live = self.context.liveness();
        let hosts = self.context.store.agents_lost().await;
        let mut lost = BTreeMap::new();
        for host in hosts.map_err(|e| store_failure(&e))? {
            let of_host = self.context.store.agent_lost(&host).await;
            lost.insert(host, of_host.map_err(|e| store_failure(&e))?);
        }
        let nodes = rows.iter().zip(&usages).map(|(row, usage)| {
            let lost = lost.remove(&row.report.host).flatten();
            convert::node(row, usage, lost, live)
        });
        to_value(&nodes.collect::<Vec<_>>())
    }

    async fn node(
        &self,
        row: &drover_store::nodes::NodeRow,
    ) -> Result<drover_model::api::conductor::Node, RemoteFailure> {
        let usage = self
            .context
            .store
            .usage(&row.report)
            .await
            .map_err(|e| store_failure(&e))?;
        let lost = self.context.store.agent_lost(&row.report.host).await;
        let lost = lost.map_err(|e| store_failure(&e))?;
        Ok(convert::node(row, &usage, lost, self.context.liveness()))
    }

    async fn set_node(&self, ask: &SetNode) -> Answer {
        let set = self
            .context
            .store
            .set_node(&ask.host, ask.enabled, ask.reason.as_deref())
            .await;
        let row = set.map_err(|e| store_failure(&e))?;
        info!(host = %ask.host, enabled = ask.enabled, "node set");
        to_value(&self.node(&row).await?)
    }

    fn status(&self) -> ConductorStatus {
        ConductorStatus {
            conductor: self.runner.owner().to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            clock_ms: self.context.clock.now_ms(),
            database: self.context.store.kind().as_str().to_owned(),
            migrations_owned: self.runner.driven() as u64,
            counters: counters(&self.stats.snapshot()),
            service_down_time_s: self.context.down_after_ms / 1000,
            speaks: self.context.store.hearing().speaks().into(),
            left_alone: self.context.left_alone.all(),
        }
    }

    // ---- what agents say

    async fn register_agent(&self, ask: &RegisterAgent) -> Answer {
        let answer = self.context.register(ask).await;
        to_value(&answer.map_err(|e| store_failure(&e))?)
    }

    async fn heartbeat(&self, beat: &Heartbeat) -> Answer {
        let word = self.context.heartbeat(beat).await;
        to_value(&word.map_err(|e| store_failure(&e))?)
    }

    async fn agent_leaves(&self, who: &AgentLeaves) -> Answer {
        let left = self.context.agent_leaves(who).await;
        to_value(&left.map_err(|e| store_failure(&e))?)
    }

    async fn report_state(&self, report: &NodeReport) -> Result<Word, RemoteFailure> {
        let heard_at_ms = self.context.clock.now_ms();
        if let Some(problem) = report.problem() {
            let what = "a report that cannot be";
            self.context.refuse(&report.host, what, problem).await;
            let reason = problem.to_owned();
            return Ok(Word::Unfit { reason });
        }
        let kept = self.context.store.record_report(report, heard_at_ms).await;
        Ok(match kept.map_err(|e| store_failure(&e))? {
            Reported::Kept { notes } => {
                self.context.definitions.feed(report);
                self.context.loads.feed(report);
                for note in notes {
                    warn!(note, "noticed in a report");
                }
                Word::Taken
            }
            Reported::Stale => Word::Stale {
                reason: "a later report of this agent came before".to_owned(),
            },
            Reported::Stranger { reason } => {
                self.context.refuse(&report.host, "a report", &reason).await;
                Word::Stranger { reason }
            }
        })
    }

    async fn migration_progress(&self, report: MigrationReport) -> Answer {
        let now_ms = self.context.clock.now_ms();
        let migration = self
            .change(report.migration, |m| {
                // Word from another node, or late word, changes nothing.
                if m.source_host != report.host || m.status.rests() {
                    return false;
                }
                take_in(m, &report, now_ms);
                m.deadline_at_ms = m.progress.patience_ms.map(|ms| now_ms.saturating_add(ms));
                true
            })
            .await?;
        if migration.source_host != report.host {
            warn!(migration = migration.id, host = %report.host, "word on a migration from a node that is not its source");
            return Ok(Value::Null);
        }
        if let Some(outcome) = &report.outcome {
            let kept = self
                .context
                .store
                .set_outcome(report.migration, outcome)
                .await;
            kept.map_err(|e| store_failure(&e))?;
        }
        if !migration.status.rests() {
            let event_type = match migration.way {
                Way::Live(_) => "instance.live_migration.progress",
                Way::Cold(_) => "instance.resize.progress",
                Way::Transfer(_) => "instance.transfer.progress",
                Way::Evacuation(_) => "instance.rebuild.progress",
            };
            let mut n = notification(&migration, event_type, "INFO");
            n.payload["progress"] = to_value(&migration.progress)?;
            let context = drover_rpc::RequestContext::service(
                migration.requester.request_id.clone().unwrap_or_default(),
            );
            // Progress that is lost is followed by more.
            let _ = self
                .notifier
                .notify(&context, Priority::Info, &n.event_type, &n.payload)
                .await;
        }
        Ok(Value::Null)
    }
}

/// What is told when a migration of that kind is to be aborted.
fn abort_event(way: &Way) -> &'static str {
    match way {
        Way::Live(_) => "instance.live_migration_abort.start",
        Way::Cold(_) => "instance.resize_abort.start",
        Way::Transfer(_) => "instance.transfer_abort.start",
        Way::Evacuation(_) => "instance.rebuild_abort.start",
    }
}

/// Takes an agent's word into the record.
fn take_in(m: &mut Migration, report: &MigrationReport, now_ms: u64) {
    /// Decisions kept of one migration.
    const MAX_DECISIONS: usize = 200;
    m.updated_at_ms = now_ms;
    let phase = m.progress.phase;
    m.progress = report.progress.clone();
    // Samples may come late or twice; what was reached is not taken back.
    m.progress.phase = m.progress.phase.max(phase);
    if m.progress.phase == Phase::PostCopy && m.status == MigrationStatus::Running {
        // Cannot fail: from running one may go to post-copy.
        let _ = m.become_status(MigrationStatus::RunningPostCopy);
    }
    for text in &report.decisions {
        if m.decisions.len() < MAX_DECISIONS {
            m.decisions.push(drover_model::migration::Decision {
                at_ms: now_ms,
                text: text.clone(),
            });
        }
    }
}

fn counters(snapshot: &impl Serialize) -> std::collections::BTreeMap<String, u64> {
    let value = serde_json::to_value(snapshot).unwrap_or_default();
    let all = value.as_object().into_iter().flatten();
    all.filter_map(|(name, v)| Some((name.clone(), v.as_u64()?)))
        .collect()
}

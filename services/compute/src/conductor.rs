//! The way to the conductor: what the agent says to it, and how losing it is
//! borne. Reports may be lost, and wait for nobody for long; the conductor asks if it
//! wonders.

use std::{sync::Arc, time::Duration};

use drover_model::{
    api::{
        CONDUCTOR_TOPIC, NAMESPACE, VERSION,
        conductor::{
            AgentLeaves, EvacuatedAnswer, EvacuatedRemoved, Heard, Heartbeat, ListEvacuated,
            ListMigrations, MigrationRef, MigrationReport, RegisterAgent, Registered, Word, method,
        },
    },
    ids::{HostName, InstanceId, MigrationId},
    migration::{Ending, Migration},
    node::NodeReport,
};
use drover_rpc::{CallOptions, RequestContext, RpcClient, RpcError, Target, Transport};
use tokio::sync::mpsc;
use tracing::debug;

/// Reports that may wait for the broker; one a second per migration, so this is
/// a minute of one migration. Beyond it the newest is dropped: nobody reads
/// progress that old.
const MAX_WAITING_REPORTS: usize = 64;
/// How long a good-bye waits for the conductor.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a report on a migration may wait to be read; newer ones follow it.
const PROGRESS_WAITS: Duration = Duration::from_secs(30);
/// How long a frontend's wish waits for the conductor.
const ASK_TIMEOUT: Duration = Duration::from_secs(10);

/// The conductor as the agent sees it.
#[derive(Clone)]
pub(crate) struct Conductor {
    client: RpcClient,
    target: Target,
    transport: Arc<dyn Transport>,
    reports: mpsc::Sender<MigrationReport>,
}

impl Conductor {
    /// The way to the conductor, and the reports that [`Self::report`] queues
    /// for somebody to send.
    pub(crate) fn new(
        client: RpcClient,
        transport: Arc<dyn Transport>,
    ) -> (Self, mpsc::Receiver<MigrationReport>) {
        let (reports, waiting) = mpsc::channel(MAX_WAITING_REPORTS);
        let target = Target::topic(CONDUCTOR_TOPIC)
            .namespace(NAMESPACE)
            .version(VERSION);
        let conductor = Self {
            client,
            target,
            transport,
            reports,
        };
        (conductor, waiting)
    }

    /// Counters of the messaging below, by name.
    pub(crate) fn messaging_counters(&self) -> serde_json::Value {
        serde_json::to_value(self.transport.stats().snapshot()).unwrap_or_default()
    }

    /// Queues a report without ever waiting; says whether there was room.
    pub(crate) fn report(&self, report: MigrationReport) -> bool {
        self.reports.try_send(report).is_ok()
    }

    /// Sends a report on a migration.
    pub(crate) async fn send_report(&self, report: &MigrationReport) -> Result<(), RpcError> {
        let waits = Some(PROGRESS_WAITS);
        self.cast(method::MIGRATION_PROGRESS, report, &service(), waits)
            .await
    }

    /// Sends a report on the node. One that nobody takes in time is worth nothing.
    pub(crate) async fn report_state(
        &self,
        report: &NodeReport,
        limit: Duration,
    ) -> Result<Word, RpcError> {
        self.ask_within(method::REPORT_STATE, report, limit).await
    }

    /// Asks for an incarnation.
    pub(crate) async fn register(&self, ask: &RegisterAgent) -> Result<Registered, RpcError> {
        self.ask(method::REGISTER_AGENT, ask, &service()).await
    }

    /// Sends a sign of life. One that nobody takes in time is worth nothing.
    pub(crate) async fn heartbeat(
        &self,
        beat: &Heartbeat,
        limit: Duration,
    ) -> Result<Heard, RpcError> {
        self.ask_within(method::HEARTBEAT, beat, limit).await
    }

    /// Says good-bye.
    pub(crate) async fn leave(&self, who: &AgentLeaves) -> Result<(), RpcError> {
        self.ask_within(method::AGENT_LEAVES, who, LEAVE_TIMEOUT)
            .await
    }

    /// Passes on a frontend's wish to abort.
    pub(crate) async fn abort(
        &self,
        migration: String,
        who: &RequestContext,
    ) -> Result<(), RpcError> {
        let which = MigrationRef { migration };
        self.cast(method::ABORT_MIGRATION, &which, who, None).await
    }

    /// Passes on a frontend's wish to force a migration to its end.
    pub(crate) async fn force_complete(
        &self,
        migration: MigrationId,
        who: &RequestContext,
    ) -> Result<(), RpcError> {
        let migration = migration.to_string();
        let which = MigrationRef { migration };
        self.cast(method::FORCE_COMPLETE_MIGRATION, &which, who, None)
            .await
    }

    /// The unfinished migration of an instance, if there is one.
    pub(crate) async fn active_migration(
        &self,
        instance: InstanceId,
        who: &RequestContext,
    ) -> Result<Option<Migration>, RpcError> {
        let which = ListMigrations {
            instance: Some(instance.to_string()),
            active: true,
            limit: Some(1),
            ..ListMigrations::default()
        };
        let mut found: Vec<Migration> = self.ask(method::LIST_MIGRATIONS, &which, who).await?;
        Ok(found.pop())
    }

    /// What of this node lives elsewhere by now, and which of those that are about to
    /// be started must not be.
    pub(crate) async fn list_evacuated(
        &self,
        host: &HostName,
        starting: Vec<InstanceId>,
    ) -> Result<EvacuatedAnswer, RpcError> {
        let host = host.clone();
        let which = ListEvacuated { host, starting };
        match self.ask(method::LIST_EVACUATED, &which, &service()).await {
            // An older conductor evacuates nobody.
            Err(error) if is_unknown_method(&error) => {
                debug!("the conductor is too old to evacuate nodes");
                Ok(EvacuatedAnswer::default())
            }
            other => other,
        }
    }

    /// Tells that the old copy of an evacuated instance is gone from this node.
    pub(crate) async fn evacuated_removed(
        &self,
        host: &HostName,
        migration: MigrationId,
    ) -> Result<(), RpcError> {
        let which = EvacuatedRemoved {
            host: host.clone(),
            migration,
        };
        self.ask(method::EVACUATED_REMOVED, &which, &service())
            .await
    }

    async fn ask<R: serde::de::DeserializeOwned>(
        &self,
        method: &str,
        args: &(impl serde::Serialize + Sync),
        who: &RequestContext,
    ) -> Result<R, RpcError> {
        self.ask_as(method, args, who, ASK_TIMEOUT).await
    }

    async fn ask_within<R: serde::de::DeserializeOwned>(
        &self,
        method: &str,
        args: &(impl serde::Serialize + Sync),
        limit: Duration,
    ) -> Result<R, RpcError> {
        self.ask_as(method, args, &service(), limit).await
    }

    async fn ask_as<R: serde::de::DeserializeOwned>(
        &self,
        method: &str,
        args: &(impl serde::Serialize + Sync),
        who: &RequestContext,
        limit: Duration,
    ) -> Result<R, RpcError> {
        let options = CallOptions {
            timeout: Some(limit),
            ..CallOptions::default()
        };
        self.client
            .call_with(&self.target, who, method, args, options)
            .await
    }

    /// Passes on a frontend's wish to confirm or to revert, and the answer back.
    pub(crate) async fn end_with(
        &self,
        migration: MigrationId,
        ending: Ending,
        who: &RequestContext,
    ) -> Result<(), RpcError> {
        let method = match ending {
            Ending::Confirm => method::CONFIRM_MIGRATION,
            Ending::Revert => method::REVERT_MIGRATION,
        };
        let which = MigrationRef {
            migration: migration.to_string(),
        };
        let _: Migration = self.ask(method, &which, who).await?;
        Ok(())
    }

    async fn cast<A: serde::Serialize + Sync>(
        &self,
        method: &str,
        args: &A,
        who: &RequestContext,
        waits: Option<Duration>,
    ) -> Result<(), RpcError> {
        self.client
            .cast_within(&self.target, who, method, args, waits)
            .await
    }
}

fn is_unknown_method(error: &RpcError) -> bool {
    let failure = error.failure();
    let unknown = ["NoSuchMethod", "UnsupportedVersion"];
    failure.is_some_and(|failure| unknown.iter().any(|class| failure.class == *class))
}

fn service() -> RequestContext {
    RequestContext::service(format!("req-{}", uuid::Uuid::new_v4()))
}

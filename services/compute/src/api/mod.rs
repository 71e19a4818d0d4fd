//! What the agent serves: decode, act, answer. Two interfaces on one server:
//! Drover's own steps here, and what Nova's frontends ask of a node in [`nova`].
//!
//! A request is acknowledged when its step is done. A step begun by an agent
//! that died is delivered again, and finds in the journal what was done.

mod evacuation;
pub(crate) mod nova;

use std::sync::Arc;

use async_trait::async_trait;
use drover_model::api::{
    NAMESPACE, VERSION,
    compute::{
        AgentStatus, CheckDestination, CheckPath, CheckSource, CheckTransfer, FinishResize,
        FinishRevertResize, GuestLocation, LiveMigration, PostLiveMigration, PreLiveMigration,
        PrepResize, PrepTransfer, ResizeInstance, RevertResize, StepRef, TransferWork, method,
    },
    fault::Fault,
};
use drover_rpc::{Endpoint, RemoteFailure, Request};
use serde::Serialize;
use serde_json::Value;
use tracing::{debug, warn};

use crate::{
    faults,
    hypervisor::{HypervisorError, Job},
    migration::{Command, Registry},
    node::{Counters, Node},
};

const METHODS: &[&str] = &[
    method::GET_STATUS,
    method::CHECK_SOURCE,
    method::CHECK_DESTINATION,
    method::CHECK_PATH,
    method::PRE_LIVE_MIGRATION,
    method::LIVE_MIGRATION,
    method::GET_JOB,
    method::ABORT,
    method::FORCE_COMPLETE,
    method::LOCATE,
    method::POST_LIVE_MIGRATION,
    method::POST_AT_DESTINATION,
    method::ROLLBACK_AT_DESTINATION,
    method::ROLLBACK_AT_SOURCE,
    method::PREP_RESIZE,
    method::RESIZE_INSTANCE,
    method::ABORT_RESIZE,
    method::SET_ASIDE,
    method::FINISH_RESIZE,
    method::ROLLBACK_RESIZE,
    method::FINISH_REVERT_RESIZE,
    method::CONFIRM_AT_DESTINATION,
    method::CONFIRM_RESIZE,
    method::REVERT_RESIZE,
    method::CHECK_TRANSFER,
    method::PREP_TRANSFER,
    method::TRANSFER_INSTANCE,
    method::ABORT_TRANSFER,
    method::POST_TRANSFER,
    method::ROLLBACK_TRANSFER,
    method::GET_DEFINITION,
    method::MEASURE_DIRTY_RATE,
    method::PROBE_ADDRESS,
    method::GET_CONTENTS,
    method::CHECK_EVACUATION,
    method::PREP_REBUILD,
    method::REBUILD,
    method::POST_REBUILD,
    method::ROLLBACK_REBUILD,
];

/// Drover's own steps.
pub(crate) struct Steps {
    pub(crate) node: Arc<Node>,
    pub(crate) registry: Arc<Registry>,
}

#[async_trait]
impl Endpoint for Steps {
    fn namespace(&self) -> Option<&str> {
        Some(NAMESPACE)
    }

    fn version(&self) -> &str {
        VERSION
    }

    fn methods(&self) -> &[&str] {
        METHODS
    }

    async fn handle(&self, request: Request) -> Result<Value, RemoteFailure> {
        let answer = self.serve(&request).await;
        let counters = &self.node.counters;
        match &answer {
            Ok(_) => {
                debug!(method = request.method(), "step done");
                Counters::add(&counters.steps_done);
            }
            Err(failure) => {
                let (method, request_id) = (request.method(), request.context().request_id());
                warn!(method, request_id, %failure, "step not done");
                Counters::add(&counters.steps_failed);
            }
        }
        answer
    }
}

impl Steps {
    async fn serve(&self, request: &Request) -> Result<Value, RemoteFailure> {
        use Command as C;
        let actors = &self.registry;
        self.may_serve(request.method())
            .await
            .map_err(faults::exception)?;
        match request.method() {
            method::GET_STATUS => answer(Ok(self.status().await)),
            method::LOCATE => answer(self.locate(request.args()?).await),
            method::CHECK_SOURCE => {
                let step: CheckSource = request.args()?;
                answer(
                    actors
                        .ask(step.migration, |to| C::CheckSource(step, to))
                        .await,
                )
            }
            method::CHECK_DESTINATION => {
                let step: Box<CheckDestination> = request.args()?;
                answer(
                    actors
                        .ask(step.migration, |to| C::CheckDestination(step, to))
                        .await,
                )
            }
            method::CHECK_PATH => {
                let step: CheckPath = request.args()?;
                answer(
                    actors
                        .ask(step.migration, |to| C::CheckPath(step, to))
                        .await,
                )
            }
            method::PRE_LIVE_MIGRATION => {
                let step: Box<PreLiveMigration> = request.args()?;
                answer(
                    actors
                        .ask(step.migration, |to| C::PreLiveMigration(step, to))
                        .await,
                )
            }
            method::LIVE_MIGRATION => {
                let step: Box<LiveMigration> = request.args()?;
                answer(
                    actors
                        .ask(step.migration, |to| C::LiveMigration(step, to))
                        .await,
                )
            }
            method::POST_LIVE_MIGRATION => {
                let step: PostLiveMigration = request.args()?;
                answer(
                    actors
                        .ask(step.migration, |to| C::PostLiveMigration(step, to))
                        .await,
                )
            }
            method::PREP_RESIZE
            | method::RESIZE_INSTANCE
            | method::FINISH_RESIZE
            | method::FINISH_REVERT_RESIZE
            | method::REVERT_RESIZE => self.serve_cold(request).await,
            method::CHECK_TRANSFER | method::PREP_TRANSFER | method::TRANSFER_INSTANCE => {
                self.serve_transfer(request).await
            }
            method::GET_DEFINITION
            | method::MEASURE_DIRTY_RATE
            | method::PROBE_ADDRESS
            | method::GET_CONTENTS
            | method::CHECK_EVACUATION
            | method::PREP_REBUILD => self.serve_evacuation(request).await,
            _ => self.serve_by_reference(request).await,
        }
    }

    /// Steps of a cold migration that need more than the name of their subject.
    async fn serve_cold(&self, request: &Request) -> Result<Value, RemoteFailure> {
        use Command as C;
        let actors = &self.registry;
        match request.method() {
            method::PREP_RESIZE => {
                let step: Box<PrepResize> = request.args()?;
                let id = step.migration;
                answer(actors.ask(id, |to| C::PrepResize(step, to)).await)
            }
            method::RESIZE_INSTANCE => {
                let step: Box<ResizeInstance> = request.args()?;
                let id = step.migration;
                answer(actors.ask(id, |to| C::ResizeInstance(step, to)).await)
            }
            method::FINISH_RESIZE => {
                let step: FinishResize = request.args()?;
                let id = step.migration;
                answer(actors.ask(id, |to| C::FinishResize(step, to)).await)
            }
            method::FINISH_REVERT_RESIZE => {
                let step: FinishRevertResize = request.args()?;
                let id = step.migration;
                answer(actors.ask(id, |to| C::FinishRevertResize(step, to)).await)
            }
            _ => {
                let step: RevertResize = request.args()?;
                let id = step.migration;
                answer(actors.ask(id, |to| C::RevertResize(step, to)).await)
            }
        }
    }

    /// Steps of a transfer that need more than the name of their subject.
    async fn serve_transfer(&self, request: &Request) -> Result<Value, RemoteFailure> {
        use Command as C;
        let actors = &self.registry;
        match request.method() {
            method::CHECK_TRANSFER => {
                let step: CheckTransfer = request.args()?;
                let id = step.migration;
                answer(actors.ask(id, |to| C::CheckTransfer(step, to)).await)
            }
            method::PREP_TRANSFER => {
                let step: Box<PrepTransfer> = request.args()?;
                let id = step.migration;
                answer(actors.ask(id, |to| C::PrepTransfer(step, to)).await)
            }
            _ => {
                let step: TransferWork = request.args()?;
                let id = step.migration;
                answer(actors.ask(id, |to| C::Transfer(step, to)).await)
            }
        }
    }

    /// Steps that need nothing but the name of their subject.
    async fn serve_by_reference(&self, request: &Request) -> Result<Value, RemoteFailure> {
        use Command as C;
        let step: StepRef = request.args()?;
        let (actors, id) = (&self.registry, step.migration);
        match request.method() {
            method::GET_JOB => answer(actors.ask(id, |to| C::GetJob(step, to)).await),
            method::ABORT => answer(actors.ask(id, |to| C::Abort(step, to)).await),
            method::FORCE_COMPLETE => answer(actors.ask(id, |to| C::ForceComplete(step, to)).await),
            method::POST_AT_DESTINATION => {
                answer(actors.ask(id, |to| C::PostAtDestination(step, to)).await)
            }
            method::ROLLBACK_AT_DESTINATION => answer(
                actors
                    .ask(id, |to| C::RollbackAtDestination(step, to))
                    .await,
            ),
            method::ROLLBACK_AT_SOURCE => {
                answer(actors.ask(id, |to| C::RollbackAtSource(step, to)).await)
            }
            method::ABORT_RESIZE => answer(actors.ask(id, |to| C::AbortResize(step, to)).await),
            method::SET_ASIDE => answer(actors.ask(id, |to| C::SetAside(step, to)).await),
            method::ROLLBACK_RESIZE => {
                answer(actors.ask(id, |to| C::RollbackResize(step, to)).await)
            }
            method::CONFIRM_AT_DESTINATION => {
                answer(actors.ask(id, |to| C::ConfirmAtDestination(step, to)).await)
            }
            method::CONFIRM_RESIZE => answer(actors.ask(id, |to| C::ConfirmResize(step, to)).await),
            method::ABORT_TRANSFER => answer(actors.ask(id, |to| C::AbortTransfer(step, to)).await),
            method::POST_TRANSFER => answer(actors.ask(id, |to| C::PostTransfer(step, to)).await),
            method::ROLLBACK_TRANSFER => {
                answer(actors.ask(id, |to| C::RollbackTransfer(step, to)).await)
            }
            method::REBUILD => answer(actors.ask(id, |to| C::Rebuild(step, to)).await),
            method::POST_REBUILD => answer(actors.ask(id, |to| C::PostRebuild(step, to)).await),
            method::ROLLBACK_REBUILD => {
                answer(actors.ask(id, |to| C::RollbackRebuild(step, to)).await)
            }
            other => {
                let message = format!("'{other}' is listed and not served");
                Err(faults::exception(Fault::bug(message)))
            }
        }
    }

    async fn status(&self) -> AgentStatus {
        let mut counters = self.node.counters.snapshot();
        if let Value::Object(messaging) = self.node.conductor.messaging_counters() {
            for (name, value) in messaging {
                counters.extend(value.as_u64().map(|v| (format!("rpc_{name}"), v)));
            }
        }
        let mut migrations: Vec<_> = self.registry.under_way().into_values().collect();
        migrations.sort();
        AgentStatus {
            host: self.node.settings.host.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            clock_ms: self.node.now_ms(),
            libvirt: self
                .node
                .hypervisor
                .inventory()
                .await
                .map_err(|e| e.to_string()),
            migrations,
            state: Some(self.node.journal.state()),
            counters,
        }
    }

    /// Asked of libvirt at once, past whatever the migration's actor is doing.
    async fn locate(&self, step: StepRef) -> Result<GuestLocation, Fault> {
        let hypervisor = &self.node.hypervisor;
        let job = async {
            match hypervisor.job(step.instance).await {
                Err(HypervisorError::NoSuchGuest(_)) => Ok(Job::None),
                other => other,
            }
        };
        let asked = tokio::try_join!(hypervisor.presence(step.instance), job);
        let (presence, job) = asked.map_err(faults::hypervisor)?;
        Ok(GuestLocation {
            presence,
            migrating: matches!(job, Job::Migration(_)),
            known: self.registry.known(step.migration),
            state: Some(self.node.journal.state()),
        })
    }
}

fn answer<T: Serialize>(answer: Result<T, Fault>) -> Result<Value, RemoteFailure> {
    let answer = answer.map_err(faults::exception)?;
    serde_json::to_value(answer).map_err(|e| faults::exception(Fault::bug(e.to_string())))
}

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
    INCARNATION_KEY, NAMESPACE, OLDEST,
    compute::{AgentStatus, GuestLocation, StepRef, Subject, method},
    fault::Fault,
};
use drover_rpc::{Endpoint, RemoteFailure, Request};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tracing::{debug, warn};

use crate::{
    faults,
    hypervisor::{HypervisorError, Job},
    migration::{Command, Registry, Reply},
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
    method::LOOK_AT_COPY,
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
    method::FIND_ACTIVE,
    method::GET_CONTENTS,
    method::CHECK_EVACUATION,
    method::PREP_REBUILD,
    method::REBUILD,
    method::POST_REBUILD,
    method::ROLLBACK_REBUILD,
];

/// The epoch of the lease under which a conductor asks; none of an older one.
#[derive(Deserialize)]
struct Under {
    #[serde(default)]
    epoch: u64,
}

/// Drover's own steps.
pub(crate) struct Steps {
    pub(crate) node: Arc<Node>,
    pub(crate) registry: Arc<Registry>,
    /// The newest version that it serves.
    pub(crate) version: String,
}

#[async_trait]
impl Endpoint for Steps {
    fn namespace(&self) -> Option<&str> {
        Some(NAMESPACE)
    }

    fn version(&self) -> &str {
        &self.version
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
        self.is_spoken(request)?;
        self.is_meant(request).map_err(faults::exception)?;
        match request.method() {
            method::GET_STATUS => answer(Ok(self.status().await)),
            method::LOCATE => {
                let Under { epoch } = request.args()?;
                answer(self.locate(request.args()?, epoch).await)
            }
            method::CHECK_SOURCE => self.step(request, C::CheckSource).await,
            method::CHECK_DESTINATION => self.step(request, C::CheckDestination).await,
            method::CHECK_PATH => self.step(request, C::CheckPath).await,
            method::PRE_LIVE_MIGRATION => self.step(request, C::PreLiveMigration).await,
            method::LIVE_MIGRATION => self.step(request, C::LiveMigration).await,
            method::GET_JOB => self.step(request, C::GetJob).await,
            method::ABORT => self.step(request, C::Abort).await,
            method::FORCE_COMPLETE => self.step(request, C::ForceComplete).await,
            method::POST_LIVE_MIGRATION => self.step(request, C::PostLiveMigration).await,
            method::POST_AT_DESTINATION => self.step(request, C::PostAtDestination).await,
            method::ROLLBACK_AT_DESTINATION => self.step(request, C::RollbackAtDestination).await,
            method::ROLLBACK_AT_SOURCE => self.step(request, C::RollbackAtSource).await,
            method::PREP_RESIZE => self.step(request, C::PrepResize).await,
            method::RESIZE_INSTANCE => self.step(request, C::ResizeInstance).await,
            method::ABORT_RESIZE => self.step(request, C::AbortResize).await,
            method::SET_ASIDE => self.step(request, C::SetAside).await,
            method::FINISH_RESIZE => self.step(request, C::FinishResize).await,
            method::ROLLBACK_RESIZE => self.step(request, C::RollbackResize).await,
            method::FINISH_REVERT_RESIZE => self.step(request, C::FinishRevertResize).await,
            method::CONFIRM_AT_DESTINATION => self.step(request, C::ConfirmAtDestination).await,
            method::LOOK_AT_COPY => self.step(request, C::LookAtCopy).await,
            method::CONFIRM_RESIZE => self.step(request, C::ConfirmResize).await,
            method::REVERT_RESIZE => self.step(request, C::RevertResize).await,
            method::CHECK_TRANSFER => self.step(request, C::CheckTransfer).await,
            method::PREP_TRANSFER => self.step(request, C::PrepTransfer).await,
            method::TRANSFER_INSTANCE => self.step(request, C::Transfer).await,
            method::ABORT_TRANSFER => self.step(request, C::AbortTransfer).await,
            method::POST_TRANSFER => self.step(request, C::PostTransfer).await,
            method::ROLLBACK_TRANSFER => self.step(request, C::RollbackTransfer).await,
            method::CHECK_EVACUATION => self.step(request, C::CheckEvacuation).await,
            method::PREP_REBUILD => self.step(request, C::PrepRebuild).await,
            method::REBUILD => self.step(request, C::Rebuild).await,
            method::POST_REBUILD => self.step(request, C::PostRebuild).await,
            method::ROLLBACK_REBUILD => self.step(request, C::RollbackRebuild).await,
            _ => self.serve_question(request).await,
        }
    }

    /// Has a step done by its migration's actor: the one way from a conductor to
    /// what an agent does. It is in the mailbox before anything is waited for.
    async fn step<S: Subject, T: Serialize>(
        &self,
        request: &Request,
        command: impl FnOnce(S, Reply<T>) -> Command,
    ) -> Result<Value, RemoteFailure> {
        let Under { epoch } = request.args()?;
        let step: S = request.args()?;
        let subject = step.subject();
        let asked = self.registry.ask(subject, epoch, |to| command(step, to));
        answer(asked.await)
    }

    /// Refuses a version that is too old. How it is it says to everybody.
    fn is_spoken(&self, request: &Request) -> Result<(), RemoteFailure> {
        let asked = request.version().map_or(Ok(OLDEST), str::parse);
        // What is no version was answered by dispatch.
        let is_older = asked.is_ok_and(|asked| asked < self.node.settings.speaks.min);
        match is_older && request.method() != method::GET_STATUS {
            true => Err(request.unsupported_version()),
            false => Ok(()),
        }
    }

    /// Refuses what is meant for the agent that took this one's place.
    fn is_meant(&self, request: &Request) -> Result<(), Fault> {
        let meant = request.context().get(INCARNATION_KEY);
        let meant = meant.and_then(Value::as_u64).unwrap_or(0);
        let own = self.node.standing.borrow().incarnation().unwrap_or(0);
        if meant <= own {
            return Ok(());
        }
        Err(Fault::not_now(format!(
            "this is incarnation {own} of the agent of {}, and incarnation {meant} was meant",
            self.node.settings.host
        )))
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
            incarnation: self.node.standing.borrow().incarnation().unwrap_or(0),
            refused: self.node.refused.borrow().clone(),
            speaks: self.node.settings.speaks.into(),
            counters,
        }
    }

    /// Asked of libvirt at once, past whatever the migration's actor is doing; from
    /// then on nothing is done that was asked for under a lower epoch.
    async fn locate(&self, step: StepRef, epoch: u64) -> Result<GuestLocation, Fault> {
        self.registry.question(step, epoch).await?;
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
            post_copy: matches!(job, Job::Migration(sample) if sample.post_copy),
            known: self.registry.known(step.migration),
            state: Some(self.node.journal.state()),
        })
    }
}

fn answer<T: Serialize>(answer: Result<T, Fault>) -> Result<Value, RemoteFailure> {
    let answer = answer.map_err(faults::exception)?;
    serde_json::to_value(answer).map_err(|e| faults::exception(Fault::bug(e.to_string())))
}

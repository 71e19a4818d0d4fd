//! What the agent serves: decode, act, answer. Two interfaces on one server:
//! Drover's own steps here, and what Nova's frontends ask of a node in [`nova`].
//!
//! A request is acknowledged when its step is done. A step begun by an agent
//! that died is delivered again, and finds in the journal what was done.

mod evacuation;
pub(crate) mod nova;

use std::sync::{Arc, LazyLock};

use async_trait::async_trait;
use drover_model::api::{
    INCARNATION_KEY, NAMESPACE, OLDEST,
    compute::{AgentStatus, GuestLocation, StepRef, method},
    fault::Fault,
};
use drover_rpc::{Endpoint, RemoteFailure, Request};
use serde_json::Value;
use tracing::{debug, warn};

use crate::{
    faults::{self, answer},
    hypervisor::{HypervisorError, Job},
    migration::{
        Registry,
        steps::{self, Under},
    },
    node::{Counters, Node},
};

/// What is asked of the agent itself, or of no migration's actor.
const QUESTIONS: &[&str] = &[
    method::GET_STATUS,
    method::LOCATE,
    method::GET_DEFINITION,
    method::MEASURE_DIRTY_RATE,
    method::PROBE_ADDRESS,
    method::FIND_ACTIVE,
    method::GET_CONTENTS,
];

static METHODS: LazyLock<Vec<&str>> = LazyLock::new(|| {
    let steps = steps::STEPS.iter().map(|step| step.method);
    steps.chain(QUESTIONS.iter().copied()).collect()
});

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
        &METHODS
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
        self.is_spoken(request)?;
        self.is_meant(request).map_err(faults::exception)?;
        if let Some(step) = steps::step(request.method()) {
            return step.serve(&self.registry, request).await;
        }
        match request.method() {
            method::GET_STATUS => answer(Ok(self.status().await)),
            method::LOCATE => {
                let Under { epoch } = request.args()?;
                answer(self.locate(request.args()?, epoch).await)
            }
            _ => self.serve_question(request).await,
        }
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

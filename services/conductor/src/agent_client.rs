//! What the conductor asks of agents: typed calls, each with a time limit, and
//! every way they can fail reduced to an error class. Agents' steps are
//! idempotent, so an answer that did not come is passing trouble: ask again.

use std::time::Duration;

use drover_model::{
    api::{
        self, compute as c,
        fault::{Fault, code},
    },
    error::ErrorClass,
    ids::{HostName, InstanceId},
    version::{Mismatch, RpcVersion},
};
use drover_rpc::{
    BUILTINS_MODULE, CallOptions, DISPATCHER_MODULE, RequestContext, RpcClient, RpcError, Target,
};
use drover_runtime::error_chain::Chain;
use drover_store::{hearing::Hearing, migrations::Lease};
use serde::{
    Serialize,
    de::{DeserializeOwned, IgnoredAny},
};
use tracing::warn;

use crate::task::proof::{NeverRan, Redundant};

/// Why an agent did not do as asked.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct AgentError {
    /// What may be done about it.
    pub class: ErrorClass,
    /// In words.
    pub message: String,
    /// It was the agent that said so: others may fare better there.
    pub answered: bool,
    /// Another migration has the instance on that node.
    pub busy: bool,
    /// What does not fit, if the two are of versions that do not understand each other.
    pub mismatch: Option<Box<Mismatch>>,
}

impl From<Mismatch> for AgentError {
    fn from(mismatch: Mismatch) -> Self {
        Self {
            class: ErrorClass::Refused,
            message: mismatch.to_string(),
            answered: true,
            busy: false,
            mismatch: Some(Box::new(mismatch)),
        }
    }
}

/// Time limits of calls to agents.
#[derive(Debug, Clone, Copy)]
pub struct CallLimits {
    /// For questions.
    pub check: Duration,
    /// For acts that work on disks.
    pub act: Duration,
    /// For the agent's sign of life during those.
    pub silence: Duration,
}

impl Default for CallLimits {
    fn default() -> Self {
        Self {
            check: Duration::from_secs(15),
            act: Duration::from_secs(600),
            silence: Duration::from_secs(20),
        }
    }
}

/// How long evidence of another copy is good for the removal of one.
const EVIDENCE_HOLDS: Duration = Duration::from_secs(60);

/// Speaks to agents. Cheap to clone.
#[derive(Clone)]
pub struct AgentClient {
    rpc: RpcClient,
    limits: CallLimits,
    hearing: Hearing,
    /// The epoch of the lease under which it asks; none for what is of no migration
    /// that is driven.
    epoch: Option<i64>,
}

/// What is asked, and under which lease.
#[derive(Serialize)]
struct Fenced<'a, A> {
    #[serde(flatten)]
    args: &'a A,
    #[serde(skip_serializing_if = "Option::is_none")]
    epoch: Option<i64>,
}

/// Result of a call.
pub type Result<T> = std::result::Result<T, AgentError>;

impl AgentClient {
    /// A client over this process's RPC client.
    pub fn new(rpc: RpcClient, limits: CallLimits) -> Self {
        Self {
            rpc,
            limits,
            hearing: Hearing::default(),
            epoch: None,
        }
    }

    /// What is asked of a node is meant for the agent that is known there, and
    /// for none that it took the place of.
    #[must_use]
    pub fn for_incarnations_of(self, hearing: Hearing) -> Self {
        Self { hearing, ..self }
    }

    /// One that asks under a lease: agents refuse what comes under an older one.
    #[must_use]
    pub fn under(&self, lease: Lease) -> Self {
        Self {
            epoch: Some(lease.epoch),
            ..self.clone()
        }
    }

    async fn ask<A, R>(&self, host: &HostName, method: &str, args: &A) -> Result<R>
    where
        A: Serialize + Sync,
        R: DeserializeOwned,
    {
        let options = CallOptions {
            timeout: Some(self.limits.check),
            ..CallOptions::default()
        };
        match self.call(host, method, args, options).await {
            // It was just being stopped. Whoever takes its place is asked again.
            Err(error) if error.class == ErrorClass::Lost => {
                self.call(host, method, args, options).await
            }
            answered => answered,
        }
    }

    /// Asks once, and not for long.
    async fn ask_briefly<A, R>(
        &self,
        host: &HostName,
        method: &str,
        args: &A,
        limit: Duration,
    ) -> Result<R>
    where
        A: Serialize + Sync,
        R: DeserializeOwned,
    {
        let options = CallOptions {
            timeout: Some(limit),
            ..CallOptions::default()
        };
        self.call(host, method, args, options).await
    }

    async fn act<A, R>(&self, host: &HostName, method: &str, args: &A) -> Result<R>
    where
        A: Serialize + Sync,
        R: DeserializeOwned,
    {
        let options = CallOptions {
            timeout: Some(self.limits.act),
            monitor_timeout: Some(self.limits.silence),
            ..CallOptions::default()
        };
        self.call(host, method, args, options).await
    }

    /// As [`Self::act`], where that it was done is the whole answer.
    async fn have_done<A>(&self, host: &HostName, method: &str, args: &A) -> Result<()>
    where
        A: Serialize + Sync,
    {
        let done: Result<IgnoredAny> = self.act(host, method, args).await;
        done.map(drop)
    }

    /// As [`Self::ask`], likewise.
    async fn have_taken<A>(&self, host: &HostName, method: &str, args: &A) -> Result<()>
    where
        A: Serialize + Sync,
    {
        let taken: Result<IgnoredAny> = self.ask(host, method, args).await;
        taken.map(drop)
    }

    /// Has something removed by evidence, which is stale before long: what is not
    /// begun by then is not done, and has to be proven again.
    async fn remove<A, R>(&self, host: &HostName, method: &str, args: &A) -> Result<R>
    where
        A: Serialize + Sync,
        R: DeserializeOwned,
    {
        let options = CallOptions {
            timeout: Some(EVIDENCE_HOLDS.min(self.limits.act)),
            monitor_timeout: Some(self.limits.silence),
            ..CallOptions::default()
        };
        self.call(host, method, args, options).await
    }

    async fn call<A, R>(
        &self,
        host: &HostName,
        method: &str,
        args: &A,
        options: CallOptions,
    ) -> Result<R>
    where
        A: Serialize + Sync,
        R: DeserializeOwned,
    {
        let pinned = self.hearing.pinned(host)?;
        let called = self.called(host, method, args, (pinned, options)).await;
        let error = match called {
            Ok(answer) => return Ok(answer),
            Err(error) => error,
        };
        // It may have been replaced by one of another version, and not be heard of yet.
        if knows_another_version(&error)
            && let Ok(pinned) = self.pin_anew(host).await
        {
            let called = self.called(host, method, args, (pinned, options)).await;
            return called.map_err(|e| self.error(host, &e));
        }
        Err(self.error(host, &error))
    }

    /// Asks an agent itself what it speaks; the version in which it is asked from now
    /// on, if that is another one.
    async fn pin_anew(&self, host: &HostName) -> std::result::Result<RpcVersion, ()> {
        let before = self.hearing.pinned(host);
        let none = serde_json::Map::new();
        let options = CallOptions {
            timeout: Some(self.limits.check),
            ..CallOptions::default()
        };
        let asked = (api::OLDEST, options);
        let status: c::AgentStatus = self
            .called(host, c::method::GET_STATUS, &none, asked)
            .await
            .map_err(drop)?;
        let said = (status.version.as_str(), &status.speaks);
        self.hearing.said(host, status.incarnation, said);
        let now = self.hearing.pinned(host);
        now.clone().ok().filter(|_| now != before).ok_or(())
    }

    /// A call's error, and whose versions do not fit if that is what it is.
    fn error(&self, host: &HostName, error: &RpcError) -> AgentError {
        let Some(what) = not_understood(host, error) else {
            return agent_error(host, error);
        };
        let (versions, remedy) = self.hearing.versions(host);
        Mismatch {
            message: format!("{what}; {versions}"),
            remedy,
        }
        .into()
    }

    async fn called<A, R>(
        &self,
        host: &HostName,
        method: &str,
        args: &A,
        (version, options): (RpcVersion, CallOptions),
    ) -> std::result::Result<R, RpcError>
    where
        A: Serialize + Sync,
        R: DeserializeOwned,
    {
        let target = Target::topic(api::COMPUTE_TOPIC)
            .server(host.as_str())
            .namespace(api::NAMESPACE)
            .version(version.to_string());
        let incarnation = self.hearing.state(host).incarnation;
        let context = RequestContext::service(format!("req-{}", uuid::Uuid::new_v4()))
            .with(api::INCARNATION_KEY, incarnation);
        let args = Fenced {
            args,
            epoch: self.epoch,
        };
        let called = self
            .rpc
            .call_with(&target, &context, method, &args, options);
        called.await
    }

    /// How an agent is.
    pub async fn status(&self, host: &HostName) -> Result<c::AgentStatus> {
        let none = serde_json::Map::new();
        self.ask(host, c::method::GET_STATUS, &none).await
    }

    /// What the source has to give.
    pub async fn check_source(
        &self,
        host: &HostName,
        ask: &c::CheckSource,
    ) -> Result<c::SourceFacts> {
        self.ask(host, c::method::CHECK_SOURCE, ask).await
    }

    /// What the destination says to it.
    pub async fn check_destination(
        &self,
        host: &HostName,
        ask: &c::CheckDestination,
    ) -> Result<c::DestinationFacts> {
        self.ask(host, c::method::CHECK_DESTINATION, ask).await
    }

    /// What is in files of a node; of long ones, how far reading is.
    pub async fn contents(&self, host: &HostName, ask: &c::GetContents) -> Result<c::Contents> {
        self.ask(host, c::method::GET_CONTENTS, ask).await
    }

    /// Whether the source reaches the destination.
    pub async fn check_path(&self, host: &HostName, ask: &c::CheckPath) -> Result<c::PathFacts> {
        self.ask(host, c::method::CHECK_PATH, ask).await
    }

    /// Makes the destination ready.
    pub async fn prepare(&self, host: &HostName, ask: &c::PreLiveMigration) -> Result<()> {
        self.have_done(host, c::method::PRE_LIVE_MIGRATION, ask)
            .await
    }

    /// Starts the transfer on the source, or finds it started.
    pub async fn start(&self, host: &HostName, ask: &c::LiveMigration) -> Result<c::JobState> {
        self.ask(host, c::method::LIVE_MIGRATION, ask).await
    }

    /// Where the transfer stands.
    pub async fn job(&self, host: &HostName, step: c::StepRef) -> Result<c::JobState> {
        self.ask(host, c::method::GET_JOB, &step).await
    }

    /// Aborts the transfer.
    pub async fn abort(&self, host: &HostName, step: c::StepRef) -> Result<()> {
        self.have_taken(host, c::method::ABORT, &step).await
    }

    /// Has the transfer end soon, whatever it costs the guest.
    pub async fn force_complete(&self, host: &HostName, step: c::StepRef) -> Result<()> {
        self.have_taken(host, c::method::FORCE_COMPLETE, &step)
            .await
    }

    /// Where a node sees the guest.
    pub async fn locate(&self, host: &HostName, step: c::StepRef) -> Result<c::GuestLocation> {
        self.ask(host, c::method::LOCATE, &step).await
    }

    /// What a node sees of its copy: evidence for what removes one.
    pub async fn look_at_copy(&self, host: &HostName, step: c::StepRef) -> Result<c::CopySeen> {
        self.ask(host, c::method::LOOK_AT_COPY, &step).await
    }

    /// Tidies the source after the switch-over.
    pub async fn post_at_source(
        &self,
        host: &HostName,
        step: c::StepRef,
        proof: &Redundant,
    ) -> Result<c::CleanUp> {
        let survivor = proof.survivor();
        let ask = c::PostLiveMigration {
            migration: step.migration,
            instance: step.instance,
            // What agents went by that know of no evidence.
            runs_on: proof.runs().then(|| survivor.host.clone()),
            survivor: Some(survivor),
        };
        self.remove(host, c::method::POST_LIVE_MIGRATION, &ask)
            .await
    }

    /// Has the source forget a migration whose guest is back there; it removes nothing.
    pub async fn leave_at_source(&self, host: &HostName, step: c::StepRef) -> Result<c::CleanUp> {
        let ask = c::PostLiveMigration {
            migration: step.migration,
            instance: step.instance,
            runs_on: None,
            survivor: None,
        };
        self.remove(host, c::method::POST_LIVE_MIGRATION, &ask)
            .await
    }

    /// Tidies the destination after the switch-over.
    pub async fn post_at_destination(
        &self,
        host: &HostName,
        step: c::StepRef,
    ) -> Result<c::CleanUp> {
        self.act(host, c::method::POST_AT_DESTINATION, &step).await
    }

    /// Takes back what was prepared on the destination.
    pub async fn rollback_at_destination(
        &self,
        host: &HostName,
        step: c::StepRef,
        proof: &Redundant,
    ) -> Result<c::CleanUp> {
        let ask = removal(step, proof);
        self.remove(host, c::method::ROLLBACK_AT_DESTINATION, &ask)
            .await
    }

    /// Has the source forget the migration.
    pub async fn rollback_at_source(&self, host: &HostName, step: c::StepRef) -> Result<()> {
        self.have_done(host, c::method::ROLLBACK_AT_SOURCE, &step)
            .await
    }

    // ---- cold

    /// Makes the destination ready for files.
    pub async fn prep_resize(&self, host: &HostName, ask: &c::PrepResize) -> Result<c::Inbox> {
        self.act(host, c::method::PREP_RESIZE, ask).await
    }

    /// Has the source do a part of its work, or finds it at it.
    pub async fn resize(&self, host: &HostName, ask: &c::ResizeInstance) -> Result<c::JobState> {
        self.ask(host, c::method::RESIZE_INSTANCE, ask).await
    }

    /// Stops the part under way.
    pub async fn abort_resize(&self, host: &HostName, step: c::StepRef) -> Result<()> {
        self.have_done(host, c::method::ABORT_RESIZE, &step).await
    }

    /// Keeps the source's copy from starting.
    pub async fn set_aside(&self, host: &HostName, ask: &c::SetAside) -> Result<c::CleanUp> {
        self.act(host, c::method::SET_ASIDE, ask).await
    }

    /// Has the guest on the destination.
    pub async fn finish_resize(
        &self,
        host: &HostName,
        ask: &c::FinishResize,
    ) -> Result<c::GuestLocation> {
        self.act(host, c::method::FINISH_RESIZE, ask).await
    }

    /// Removes what was made on the destination.
    pub async fn rollback_resize(
        &self,
        host: &HostName,
        step: c::StepRef,
        proof: &Redundant,
    ) -> Result<c::CleanUp> {
        let ask = removal(step, proof);
        self.remove(host, c::method::ROLLBACK_RESIZE, &ask).await
    }

    /// Has the guest on the source as it was.
    pub async fn finish_revert_resize(
        &self,
        host: &HostName,
        ask: &c::FinishRevertResize,
    ) -> Result<c::GuestLocation> {
        self.act(host, c::method::FINISH_REVERT_RESIZE, ask).await
    }

    /// Has what came to the destination be there for good.
    pub async fn confirm_at_destination(
        &self,
        host: &HostName,
        step: c::StepRef,
    ) -> Result<c::CleanUp> {
        self.act(host, c::method::CONFIRM_AT_DESTINATION, &step)
            .await
    }

    /// Removes what the source kept.
    pub async fn confirm_resize(
        &self,
        host: &HostName,
        step: c::StepRef,
        proof: &Redundant,
    ) -> Result<c::CleanUp> {
        let ask = removal(step, proof);
        self.remove(host, c::method::CONFIRM_RESIZE, &ask).await
    }

    /// Has the source of a cold migration forget it, whose guest was brought back there
    /// by hand; it removes nothing, and says what is left. An older agent refuses.
    pub async fn leave_aside(&self, host: &HostName, step: c::StepRef) -> Result<c::CleanUp> {
        let ask = c::RemoveCopy {
            migration: step.migration,
            instance: step.instance,
            survivor: None,
        };
        self.remove(host, c::method::CONFIRM_RESIZE, &ask).await
    }

    /// Stops the guest on the destination and takes its definition away.
    pub async fn revert_resize(
        &self,
        host: &HostName,
        step: c::StepRef,
        proof: &Redundant,
    ) -> Result<c::GuestLocation> {
        let ask = c::RevertResize {
            migration: step.migration,
            instance: step.instance,
            survivor: Some(proof.survivor()),
        };
        self.remove(host, c::method::REVERT_RESIZE, &ask).await
    }

    // ---- between projects

    /// What the node has to say before an instance changes hands there.
    pub async fn check_transfer(
        &self,
        host: &HostName,
        ask: &c::CheckTransfer,
    ) -> Result<c::TransferFacts> {
        self.ask(host, c::method::CHECK_TRANSFER, ask).await
    }

    /// Has the node write down what is to be done.
    pub async fn prep_transfer(&self, host: &HostName, ask: &c::PrepTransfer) -> Result<()> {
        self.have_done(host, c::method::PREP_TRANSFER, ask).await
    }

    /// Has the node do a part of it, or finds it at it.
    pub async fn transfer(&self, host: &HostName, ask: &c::TransferWork) -> Result<c::JobState> {
        self.ask(host, c::method::TRANSFER_INSTANCE, ask).await
    }

    /// Stops the part under way.
    pub async fn abort_transfer(&self, host: &HostName, step: c::StepRef) -> Result<()> {
        self.have_done(host, c::method::ABORT_TRANSFER, &step).await
    }

    /// Removes what the instance had of the giver's.
    pub async fn post_transfer(&self, host: &HostName, step: c::StepRef) -> Result<c::CleanUp> {
        self.act(host, c::method::POST_TRANSFER, &step).await
    }

    /// Has the node forget a transfer that was taken back.
    pub async fn rollback_transfer(&self, host: &HostName, step: c::StepRef) -> Result<c::CleanUp> {
        self.act(host, c::method::ROLLBACK_TRANSFER, &step).await
    }

    // ---- of dead nodes

    /// An instance's lasting definition, while its node lives.
    pub async fn definition(
        &self,
        host: &HostName,
        instance: InstanceId,
    ) -> Result<c::KeptDefinition> {
        let ask = c::InstanceOnNode { instance };
        self.ask(host, c::method::GET_DEFINITION, &ask).await
    }

    /// Whether an agent answers within a time.
    pub async fn answers(&self, host: &HostName, limit: Duration) -> Result<()> {
        let none = serde_json::Map::new();
        let options = CallOptions {
            timeout: Some(limit),
            ..CallOptions::default()
        };
        let method = c::method::GET_STATUS;
        // It lives, whatever it speaks.
        let asked = (api::OLDEST, options);
        match self
            .called::<_, IgnoredAny>(host, method, &none, asked)
            .await
        {
            Ok(IgnoredAny) => Ok(()),
            // A refusal, or what cannot be understood, comes from somebody as well.
            Err(error @ (RpcError::Remote { .. } | RpcError::BadReply { .. })) => {
                warn!(%host, error = %Chain(&error), "its agent answers, though not as it should");
                Ok(())
            }
            Err(error) => Err(agent_error(host, &error)),
        }
    }

    /// Whether a node reaches an address, asked for so long at the most.
    pub async fn probe(
        &self,
        host: &HostName,
        ask: &c::ProbeAddress,
        limit: Duration,
    ) -> Result<c::ProbeAnswer> {
        self.ask_briefly(host, c::method::PROBE_ADDRESS, ask, limit)
            .await
    }

    /// Which of a dead node's guests a node has active.
    pub async fn find_active(
        &self,
        host: &HostName,
        ask: &c::FindActive,
        limit: Duration,
    ) -> Result<c::Active> {
        self.ask_briefly(host, c::method::FIND_ACTIVE, ask, limit)
            .await
    }

    /// Consumers of a node's queue by the broker's word, or why it says nothing.
    pub async fn consumers(
        &self,
        host: &HostName,
        limit: Duration,
    ) -> std::result::Result<u32, String> {
        let counted = self
            .rpc
            .consumers(api::COMPUTE_TOPIC, host.as_str(), limit)
            .await;
        let counted = counted.map_err(|e| Chain(&e).to_string())?;
        // A queue that is gone has nobody at it.
        Ok(counted.unwrap_or_default())
    }

    /// Whether a node can start a guest of a dead one.
    pub async fn check_evacuation(
        &self,
        host: &HostName,
        ask: &c::CheckEvacuation,
    ) -> Result<c::EvacuationFacts> {
        self.ask(host, c::method::CHECK_EVACUATION, ask).await
    }

    /// Has a guest of a dead node defined, not started.
    pub async fn prep_rebuild(&self, host: &HostName, ask: &c::RebuildInstance) -> Result<()> {
        self.have_done(host, c::method::PREP_REBUILD, ask).await
    }

    /// Has it started.
    pub async fn rebuild(&self, host: &HostName, step: c::StepRef) -> Result<c::GuestLocation> {
        self.act(host, c::method::REBUILD, &step).await
    }

    /// Has its new home forget the evacuation.
    pub async fn post_rebuild(&self, host: &HostName, step: c::StepRef) -> Result<c::CleanUp> {
        self.act(host, c::method::POST_REBUILD, &step).await
    }

    /// Takes back a guest that was defined and never ran there.
    pub async fn rollback_rebuild(
        &self,
        host: &HostName,
        step: c::StepRef,
        _: &NeverRan,
    ) -> Result<c::CleanUp> {
        self.remove(host, c::method::ROLLBACK_REBUILD, &step).await
    }
}

fn removal(step: c::StepRef, proof: &Redundant) -> c::RemoveCopy {
    c::RemoveCopy {
        migration: step.migration,
        instance: step.instance,
        survivor: Some(proof.survivor()),
    }
}

fn agent_error(host: &HostName, error: &RpcError) -> AgentError {
    let fault = error
        .failure()
        .and_then(|f| Fault::from_parts(&f.module, &f.class, &f.message, &f.kwargs));
    match (fault, error.failure()) {
        (Some(fault), _) => AgentError {
            class: fault.class,
            message: format!("{host}: {}", fault.message),
            answered: true,
            busy: fault.code == code::INSTANCE_BUSY,
            mismatch: None,
        },
        (None, Some(failure)) => AgentError {
            class: ErrorClass::Refused,
            message: format!("{host}: {}: {}", failure.class, failure.message),
            answered: true,
            busy: false,
            mismatch: None,
        },
        (None, None) => AgentError {
            class: match error {
                RpcError::BadArguments { .. } => ErrorClass::Bug,
                _ => ErrorClass::Retryable,
            },
            message: Chain(error).to_string(),
            answered: false,
            busy: false,
            mismatch: None,
        },
    }
}

/// Whether an agent says that it does not serve the version that it is asked in.
fn knows_another_version(error: &RpcError) -> bool {
    let failure = error.failure();
    failure.is_some_and(|f| f.module == DISPATCHER_MODULE && f.class == "UnsupportedVersion")
}

/// What of a call or of its answer the other side does not understand, in words.
fn not_understood(host: &HostName, error: &RpcError) -> Option<String> {
    if let RpcError::BadReply { method, reason, .. } = error {
        return Some(format!(
            "what {host} answers to {method} cannot be read here: {reason}"
        ));
    }
    let RpcError::Remote {
        method, failure, ..
    } = error
    else {
        return None;
    };
    let of_dispatch = failure.module == DISPATCHER_MODULE;
    // What decoding the arguments ends with.
    let of_arguments = failure.module == BUILTINS_MODULE
        && ["TypeError", "ValueError"].contains(&failure.class.as_ref());
    (of_dispatch || of_arguments)
        .then(|| format!("{host} does not understand {method}: {}", failure.message))
}

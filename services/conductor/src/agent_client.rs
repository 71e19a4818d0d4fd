//! What the conductor asks of agents: typed calls, each with a time limit, and
//! every way they can fail reduced to an error class. Agents' steps are
//! idempotent, so an answer that did not come is passing trouble: ask again.

use std::time::Duration;

use drover_model::{
    api::{
        self,
        compute::{self as c, Act, Call, Question, Removal},
        fault::{Fault, code},
    },
    error::ErrorClass,
    ids::HostName,
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

    /// Has a question answered.
    ///
    /// # Errors
    /// Why it was not.
    pub async fn ask<C: Call<Kind = Question>>(
        &self,
        host: &HostName,
        call: &C,
    ) -> Result<C::Answer> {
        let options = CallOptions {
            timeout: Some(self.limits.check),
            ..CallOptions::default()
        };
        match self.call(host, call, options).await {
            // It was just being stopped. Whoever takes its place is asked again.
            Err(error) if error.class == ErrorClass::Lost => self.call(host, call, options).await,
            answered => answered,
        }
    }

    /// Asks once, and not for long.
    ///
    /// # Errors
    /// Why it was not answered.
    pub async fn ask_briefly<C: Call<Kind = Question>>(
        &self,
        host: &HostName,
        call: &C,
        limit: Duration,
    ) -> Result<C::Answer> {
        let options = CallOptions {
            timeout: Some(limit),
            ..CallOptions::default()
        };
        self.call(host, call, options).await
    }

    /// Has something done that may take long.
    ///
    /// # Errors
    /// Why it was not, or was not seen to be.
    pub async fn act<C: Call<Kind = Act>>(&self, host: &HostName, call: &C) -> Result<C::Answer> {
        let options = CallOptions {
            timeout: Some(self.limits.act),
            monitor_timeout: Some(self.limits.silence),
            ..CallOptions::default()
        };
        self.call(host, call, options).await
    }

    /// Has something removed by evidence, which is stale before long: what is not
    /// begun by then is not done, and has to be proven again. Whoever calls this has the
    /// proof.
    async fn remove<C: Call<Kind = Removal>>(
        &self,
        host: &HostName,
        call: &C,
    ) -> Result<C::Answer> {
        let options = CallOptions {
            timeout: Some(EVIDENCE_HOLDS.min(self.limits.act)),
            monitor_timeout: Some(self.limits.silence),
            ..CallOptions::default()
        };
        self.call(host, call, options).await
    }

    async fn call<C: Call>(
        &self,
        host: &HostName,
        call: &C,
        options: CallOptions,
    ) -> Result<C::Answer> {
        let pinned = self.hearing.pinned(host)?;
        let called = self.called::<_, C::Wire>(host, call, (pinned, options));
        let error = match called.await {
            Ok(answer) => return Ok(answer.into()),
            Err(error) => error,
        };
        // It may have been replaced by one of another version, and not be heard of yet.
        if knows_another_version(&error)
            && let Ok(pinned) = self.pin_anew(host).await
        {
            let called = self.called::<_, C::Wire>(host, call, (pinned, options));
            return called
                .await
                .map(Into::into)
                .map_err(|e| self.error(host, &e));
        }
        Err(self.error(host, &error))
    }

    /// Asks an agent itself what it speaks; the version in which it is asked from now
    /// on, if that is another one.
    async fn pin_anew(&self, host: &HostName) -> std::result::Result<RpcVersion, ()> {
        let before = self.hearing.pinned(host);
        let options = CallOptions {
            timeout: Some(self.limits.check),
            ..CallOptions::default()
        };
        let asked = (api::OLDEST, options);
        let status: c::AgentStatus = self
            .called(host, &c::GetStatus {}, asked)
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

    async fn called<C: Call, R: DeserializeOwned>(
        &self,
        host: &HostName,
        call: &C,
        (version, options): (RpcVersion, CallOptions),
    ) -> std::result::Result<R, RpcError> {
        let target = Target::topic(api::COMPUTE_TOPIC)
            .server(host.as_str())
            .namespace(api::NAMESPACE)
            .version(version.to_string());
        let incarnation = self.hearing.state(host).incarnation;
        let context = RequestContext::service(format!("req-{}", uuid::Uuid::new_v4()))
            .with(api::INCARNATION_KEY, incarnation);
        let args = Fenced {
            args: call,
            epoch: self.epoch,
        };
        let called = self
            .rpc
            .call_with(&target, &context, C::METHOD, &args, options);
        called.await
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
        self.remove(host, &ask).await
    }

    /// Has the source forget a migration whose guest is back there; it removes nothing.
    pub async fn leave_at_source(&self, host: &HostName, step: c::StepRef) -> Result<c::CleanUp> {
        let ask = c::PostLiveMigration {
            migration: step.migration,
            instance: step.instance,
            runs_on: None,
            survivor: None,
        };
        self.remove(host, &ask).await
    }

    /// Takes back what was prepared on the destination.
    pub async fn rollback_at_destination(
        &self,
        host: &HostName,
        step: c::StepRef,
        proof: &Redundant,
    ) -> Result<c::CleanUp> {
        let ask = c::RollbackAtDestination(removal(step, proof));
        self.remove(host, &ask).await
    }

    // ---- cold

    /// Removes what was made on the destination.
    pub async fn rollback_resize(
        &self,
        host: &HostName,
        step: c::StepRef,
        proof: &Redundant,
    ) -> Result<c::CleanUp> {
        let ask = c::RollbackResize(removal(step, proof));
        self.remove(host, &ask).await
    }

    /// Removes what the source kept.
    pub async fn confirm_resize(
        &self,
        host: &HostName,
        step: c::StepRef,
        proof: &Redundant,
    ) -> Result<c::CleanUp> {
        let ask = c::ConfirmResize(removal(step, proof));
        self.remove(host, &ask).await
    }

    /// Has the source of a cold migration forget it, whose guest was brought back there
    /// by hand; it removes nothing, and says what is left. An older agent refuses.
    pub async fn leave_aside(&self, host: &HostName, step: c::StepRef) -> Result<c::CleanUp> {
        let ask = c::RemoveCopy {
            migration: step.migration,
            instance: step.instance,
            survivor: None,
        };
        self.remove(host, &c::ConfirmResize(ask)).await
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
        self.remove(host, &ask).await
    }

    // ---- of dead nodes

    /// Whether an agent answers within a time.
    pub async fn answers(&self, host: &HostName, limit: Duration) -> Result<()> {
        let options = CallOptions {
            timeout: Some(limit),
            ..CallOptions::default()
        };
        // It lives, whatever it speaks.
        let asked = (api::OLDEST, options);
        match self
            .called::<_, IgnoredAny>(host, &c::GetStatus {}, asked)
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

    /// Takes back a guest that was defined and never ran there.
    pub async fn rollback_rebuild(
        &self,
        host: &HostName,
        step: c::StepRef,
        _: &NeverRan,
    ) -> Result<c::CleanUp> {
        self.remove(host, &c::RollbackRebuild(step)).await
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

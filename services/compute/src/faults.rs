//! What goes wrong in a step, in the words in which the conductor is told.

use drover_model::{
    api::fault::{Fault, MODULE, code},
    error::ErrorClass,
    ids::{InstanceId, MigrationId},
};
use drover_rpc::RemoteFailure;
use serde::Serialize;
use serde_json::Value;

use crate::hypervisor::HypervisorError;

/// A hypervisor's error as the fault of a step.
pub(crate) fn hypervisor(error: HypervisorError) -> Fault {
    let code = match &error {
        HypervisorError::Unreachable { .. } => code::HYPERVISOR_UNREACHABLE,
        HypervisorError::NoSuchGuest(_) | HypervisorError::WrongState(_) => code::STEP_REFUSED,
        HypervisorError::Aborted(_) | HypervisorError::Exists(_) | HypervisorError::Failed(_) => {
            code::HYPERVISOR_REFUSED
        }
        HypervisorError::Untold(_) => code::STEP_NOT_NOW,
        HypervisorError::Lost(_) => code::STEP_LOST,
        HypervisorError::Bug(_) => code::AGENT_BUG,
    };
    Fault::new(error.class(), code, error.to_string())
}

/// Another migration has the instance.
pub(crate) fn busy(instance: InstanceId, holder: MigrationId) -> Fault {
    let message = format!(
        "this node is carrying out migration {holder} for instance {instance}; it has to end first"
    );
    Fault::new(ErrorClass::Refused, code::INSTANCE_BUSY, message)
}

/// Somebody else drives the migration by now.
pub(crate) fn fenced(migration: MigrationId, epoch: u64, highest: u64) -> Fault {
    let message = format!(
        "migration {migration} was taken over: this step was asked for under epoch {epoch}, and \
         {highest} has been seen here"
    );
    Fault::new(ErrorClass::Fenced, code::STEP_FENCED, message)
}

/// What this node has written down cannot be read now.
pub(crate) fn unreadable(why: &str) -> Fault {
    let message = format!("the agent's journal cannot be read now, so nothing is done: {why}");
    Fault::new(ErrorClass::Retryable, code::JOURNAL_UNREADABLE, message)
}

/// What this node had written down of a migration is gone.
pub(crate) fn journal_lost(migration: MigrationId) -> Fault {
    let message = format!(
        "something was begun here for migration {migration}, and the agent's journal of it is \
         gone: look for what is left of the guest on this node"
    );
    Fault::new(ErrorClass::Refused, code::JOURNAL_LOST, message)
}

/// What a step answers, as it travels.
pub(crate) fn answer<T: Serialize>(answer: Result<T, Fault>) -> Result<Value, RemoteFailure> {
    let answer = answer.map_err(exception)?;
    serde_json::to_value(answer).map_err(|e| exception(Fault::bug(e.to_string())))
}

/// A fault as the exception that travels.
pub(crate) fn exception(fault: Fault) -> RemoteFailure {
    let kwargs = fault.kwargs();
    let passes = fault.class == ErrorClass::Retryable;
    let failure = RemoteFailure::new(MODULE, fault.code, fault.message);
    let failure = match passes {
        true => failure.passing(),
        false => failure,
    };
    kwargs.into_iter().fold(failure, |failure, (key, value)| {
        failure.with_kwarg(&key, value)
    })
}

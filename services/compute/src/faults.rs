//! What goes wrong in a step, in the words in which the conductor is told.

use drover_model::{
    api::fault::{Fault, MODULE, code},
    error::ErrorClass,
    ids::{InstanceId, MigrationId},
};
use drover_rpc::RemoteFailure;

use crate::hypervisor::HypervisorError;

/// A hypervisor's error as the fault of a step.
pub(crate) fn hypervisor(error: HypervisorError) -> Fault {
    let code = match &error {
        HypervisorError::Unreachable { .. } => code::HYPERVISOR_UNREACHABLE,
        HypervisorError::NoSuchGuest(_) | HypervisorError::WrongState(_) => code::STEP_REFUSED,
        HypervisorError::Aborted(_) | HypervisorError::Exists(_) | HypervisorError::Failed(_) => {
            code::HYPERVISOR_REFUSED
        }
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

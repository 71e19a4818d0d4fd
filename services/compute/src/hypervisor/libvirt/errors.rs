//! libvirt's errors in the driver's words: by code, never by text. The text
//! goes along unchanged, for a human.

use drover_model::ids::InstanceId;
use virt::error::{Error, ErrorNumber};

use crate::hypervisor::HypervisorError;

/// What a blocking call ends with when it does not succeed.
#[derive(Debug)]
pub(super) enum CallError {
    /// libvirt said so; what it means depends on whether the connection lives.
    Virt(Error),
    /// Already decided.
    Decided(HypervisorError),
}

impl std::fmt::Display for CallError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Virt(error) => f.write_str(error.message()),
            Self::Decided(error) => error.fmt(f),
        }
    }
}

impl From<Error> for CallError {
    fn from(error: Error) -> Self {
        Self::Virt(error)
    }
}

impl From<HypervisorError> for CallError {
    fn from(error: HypervisorError) -> Self {
        Self::Decided(error)
    }
}

/// Result of a blocking call.
pub(super) type CallResult<T> = std::result::Result<T, CallError>;

/// Whether libvirt's error has this code.
pub(super) fn is(error: &Error, number: ErrorNumber) -> bool {
    error.code().is_known_and(|known| known == number)
}

/// What an error means that came over a living connection.
pub(super) fn classify(error: &Error, guest: Option<InstanceId>) -> HypervisorError {
    let message = error.message().to_owned();
    if let (true, Some(id)) = (is(error, ErrorNumber::NoDomain), guest) {
        return HypervisorError::NoSuchGuest(id);
    }
    let state_forbids = [
        ErrorNumber::OperationInvalid,
        ErrorNumber::OperationTimeout,
        ErrorNumber::ResourceBusy,
        ErrorNumber::BlockCopyActive,
    ];
    if state_forbids.iter().any(|number| is(error, *number)) {
        HypervisorError::WrongState(message)
    } else if is(error, ErrorNumber::OperationAborted) {
        HypervisorError::Aborted(message)
    } else {
        HypervisorError::Failed(message)
    }
}

/// Turns "there is no such domain" into `None`.
pub(super) fn absent_is_none<T>(
    result: std::result::Result<T, Error>,
) -> std::result::Result<Option<T>, Error> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if is(&error, ErrorNumber::NoDomain) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Refuses a text from outside that C could not be given whole.
pub(super) fn without_nul<'a>(
    what: &str,
    text: &'a str,
) -> std::result::Result<&'a str, HypervisorError> {
    if text.contains('\0') {
        return Err(HypervisorError::Failed(format!("{what} holds a NUL")));
    }
    Ok(text)
}

//! Refusals as exceptions: Nova's where Nova has one, so that a Nova-style
//! client raises its own class again. Every failed check travels along in the
//! keyword argument `checks`.

use drover_model::{
    api::conductor::Offer,
    check::{self, CheckCode, CheckFailure},
    error::ErrorClass,
    migration::Migration,
    operation::Operation,
};
use drover_rpc::RemoteFailure;
use drover_runtime::error_chain::Chain;
use drover_store::StoreError;
use serde::Serialize;
use serde_json::Value;
use tracing::error;

/// An answer as JSON.
pub(crate) fn to_value<T: Serialize>(answer: &T) -> Result<Value, RemoteFailure> {
    serde_json::to_value(answer)
        .map_err(|e| RemoteFailure::runtime_error(format!("the answer cannot be written: {e}")))
}

/// Trouble with the record.
pub(crate) fn store_failure(error: &StoreError) -> RemoteFailure {
    match error {
        StoreError::NotFound(what) => {
            let class = match what.split(' ').next() {
                Some("instance") => "InstanceNotFound",
                Some("node") => "ComputeHostNotFound",
                Some("migration" | "unfinished") => "MigrationNotFound",
                Some("operation") => "OperationNotFound",
                Some("project") => "ProjectNotFound",
                Some("offer") => "OfferNotFound",
                _ => "NotFound",
            };
            nova(class, format!("There is no {what}."), 404)
        }
        StoreError::Ambiguous(text) | StoreError::Invalid(text) => {
            nova("Invalid", text.clone(), 400)
        }
        error @ (StoreError::Conflict(_) | StoreError::Raced(_)) => {
            nova("Conflict", format!("{error}. Try again."), 409).passing()
        }
        error @ StoreError::Newer { .. } => nova("Invalid", format!("{error}."), 409),
        StoreError::Exists(what) => nova("ProjectExists", format!("There is {what} already."), 409),
        other => {
            error!(error = %Chain(other), "the record failed");
            let failure = RemoteFailure::runtime_error(Chain(other).to_string());
            match other.class() {
                ErrorClass::Retryable => failure.passing(),
                _ => failure,
            }
        }
    }
}

/// A migration is not in a state for this.
pub(crate) fn wrong_state(m: &Migration, what: &str) -> RemoteFailure {
    let step = match m.status.is_final() {
        true => String::new(),
        false => format!(" in step '{}'", m.step),
    };
    let message = format!(
        "Migration {} is {}{step}: {what} is not possible.",
        m.id, m.status
    );
    nova("InvalidMigrationState", message, 409)
        .with_kwarg("migration_id", m.id)
        .with_kwarg("instance_uuid", m.instance_uuid.to_string())
        .with_kwarg("state", m.status.as_str())
        .with_kwarg("method", what)
}

/// An offer cannot be accepted, or made.
pub(crate) fn offer_not_open(offer: &Offer, why: &str) -> RemoteFailure {
    let message = format!(
        "Offer {} of {} is {}: {why}.",
        offer.id,
        offer.instance_name,
        offer.state.as_str()
    );
    nova("OfferNotOpen", message, 409)
        .with_kwarg("offer", offer.id.to_string())
        .with_kwarg("state", offer.state.as_str())
}

/// The key is another one.
pub(crate) fn wrong_key(offer: &Offer, left: u32) -> RemoteFailure {
    let message = match left {
        0 => format!(
            "That is not the key of offer {}, which is locked now.",
            offer.id
        ),
        left => format!(
            "That is not the key of offer {}; it is locked after {left} more wrong ones.",
            offer.id
        ),
    };
    nova("WrongKey", message, 403)
        .with_kwarg("offer", offer.id.to_string())
        .with_kwarg("tries_left", left)
}

/// Checks said no.
pub(crate) fn refused(checks: &[CheckFailure], migration: Option<&Migration>) -> RemoteFailure {
    let failure = refusal("Migration pre-check error", checks);
    match migration {
        Some(m) => failure.with_kwarg("migration_id", m.id),
        None => failure,
    }
}

/// Checks said no to an operation.
pub(crate) fn operation_refused(kind: &str, checks: &[CheckFailure]) -> RemoteFailure {
    refusal(&format!("The {kind} is refused"), checks)
}

fn refusal(what: &str, checks: &[CheckFailure]) -> RemoteFailure {
    let reason = check::texts(checks);
    let class = match checks {
        [one] => class_of(one.code),
        _ => "MigrationPreCheckError",
    };
    nova(class, format!("{what}: {reason}"), 400)
        .with_kwarg("reason", reason)
        .with_kwarg("checks", serde_json::to_value(checks).unwrap_or_default())
}

/// An operation is at its end already.
pub(crate) fn operation_over(operation: &Operation, what: &str) -> RemoteFailure {
    let message = format!(
        "Operation {} is {}: {what} is not possible.",
        operation.id, operation.status
    );
    nova("InvalidOperationState", message, 409)
        .with_kwarg("operation_id", operation.id)
        .with_kwarg("state", operation.status.as_str())
}

/// Nova's class for a check that failed alone.
fn class_of(code: CheckCode) -> &'static str {
    match code {
        CheckCode::InstanceState | CheckCode::InstanceBusy => "InstanceInvalidState",
        CheckCode::InstanceMissing => "InstanceNotFound",
        CheckCode::SameHost => "UnableToMigrateToSelf",
        CheckCode::UnknownHost => "ComputeHostNotFound",
        CheckCode::HostDown => "ComputeServiceUnavailable",
        CheckCode::NoValidHost => "NoValidHost",
        CheckCode::Quota => "OverQuota",
        CheckCode::HostUp => "ComputeServiceInUse",
        _ => "MigrationPreCheckError",
    }
}

fn nova(class: &'static str, message: String, http_code: u16) -> RemoteFailure {
    RemoteFailure::nova(class, message).with_kwarg("code", http_code)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A cast that met them is put back into its queue, and not lost.
    #[test]
    fn what_may_go_better_next_time_passes() {
        let busy = "a row of migrations".to_owned();
        for (error, passes) in [
            (StoreError::Conflict(busy.clone()), true),
            (StoreError::NotFound(busy.clone()), false),
            (StoreError::Invalid(busy.clone()), false),
            (StoreError::Exists(busy), false),
        ] {
            assert_eq!(store_failure(&error).is_passing, passes, "{error}");
        }
    }
}

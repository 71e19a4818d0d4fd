//! What can go wrong between two services, each error with the class that says
//! what its receiver may do about it.

use std::time::Duration;

use crate::failure::RemoteFailure;

/// What the one who gets an error may do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorClass {
    /// Passing trouble, and the request was not run: the same thing may be asked again.
    Retryable,
    /// A clear no: asking again changes nothing until somebody acts.
    Refused,
    /// Nobody knows whether it happened: ask what is there before acting.
    Lost,
    /// A mistake in a program, ours or the peer's.
    Bug,
}

/// Why a transport could not do its work.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TransportError {
    /// No broker took the message before the deadline.
    #[error(
        "the message broker at {broker} did not take the message within {waited_ms} ms: {reason}"
    )]
    Unavailable {
        /// Hosts tried, without credentials.
        broker: String,
        /// How long the sender waited, milliseconds.
        waited_ms: u64,
        /// What was seen last.
        reason: String,
    },
    /// The broker has stopped taking messages (its memory or disk alarm).
    #[error("the message broker blocks publishers: {reason}; free its memory or disk")]
    Blocked {
        /// The broker's own words.
        reason: String,
    },
    /// A mandatory message found no queue.
    #[error("nobody listens at {address}")]
    NoRoute {
        /// Where the message was sent.
        address: String,
    },
    /// The broker refuses, and will go on refusing.
    #[error("the message broker refuses: {reason}")]
    Refused {
        /// The broker's own words.
        reason: String,
    },
    /// A name is too long for the wire, or empty.
    #[error("{what} is not a usable name: {reason}")]
    BadName {
        /// What the name is for.
        what: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// This transport was closed.
    #[error("the messaging transport is closed")]
    Closed,
}

impl TransportError {
    /// What the sender may do about it.
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Unavailable { .. } | Self::Blocked { .. } | Self::NoRoute { .. } => {
                ErrorClass::Retryable
            }
            Self::Refused { .. } => ErrorClass::Refused,
            Self::BadName { .. } => ErrorClass::Bug,
            Self::Closed => ErrorClass::Retryable,
        }
    }
}

/// Why a call or cast brought no result.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RpcError {
    /// The peer ran the request and answered with an exception.
    #[error("{method} failed at {target_name}")]
    Remote {
        /// Method called.
        method: String,
        /// Where it was sent.
        target_name: String,
        /// The peer's exception.
        #[source]
        failure: RemoteFailure,
    },
    /// No answer in time. The request may have run.
    #[error("no answer to {method} from {target_name} within {waited:?} (message {msg_id})")]
    Timeout {
        /// Method called.
        method: String,
        /// Where it was sent.
        target_name: String,
        /// Id of the message, as in the peer's log.
        msg_id: String,
        /// How long the caller waited.
        waited: Duration,
    },
    /// The peer's heartbeats for this call stopped. The request may have run.
    #[error(
        "{target_name} went silent during {method}: no heartbeat for {silence:?} (message {msg_id})"
    )]
    PeerSilent {
        /// Method called.
        method: String,
        /// Where it was sent.
        target_name: String,
        /// Id of the message, as in the peer's log.
        msg_id: String,
        /// How long nothing was heard.
        silence: Duration,
    },
    /// The request was not taken by the broker.
    #[error("{method} was not sent to {target_name}")]
    NotSent {
        /// Method called.
        method: String,
        /// Where it was to go.
        target_name: String,
        /// What the transport said.
        #[source]
        source: TransportError,
    },
    /// As many calls as allowed wait for their answers already.
    #[error("{limit} calls wait for an answer already, {method} was not sent")]
    TooManyCalls {
        /// Method called.
        method: String,
        /// The limit.
        limit: usize,
    },
    /// The arguments cannot be sent.
    #[error("the arguments of {method} cannot be sent: {reason}")]
    BadArguments {
        /// Method called.
        method: String,
        /// What is wrong with them.
        reason: String,
    },
    /// The peer answered something that is no answer. The request has run.
    #[error("{target_name} answered {method} with something unusable: {reason}")]
    BadReply {
        /// Method called.
        method: String,
        /// Where it was sent.
        target_name: String,
        /// What is wrong with the answer.
        reason: String,
    },
}

impl RpcError {
    /// What the caller may do about it.
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Remote { .. } => ErrorClass::Refused,
            Self::Timeout { .. } | Self::PeerSilent { .. } => ErrorClass::Lost,
            Self::NotSent { source, .. } => source.class(),
            Self::TooManyCalls { .. } => ErrorClass::Retryable,
            Self::BadArguments { .. } | Self::BadReply { .. } => ErrorClass::Bug,
        }
    }

    /// The peer's exception, if that is what this is.
    pub fn failure(&self) -> Option<&RemoteFailure> {
        match self {
            Self::Remote { failure, .. } => Some(failure),
            _ => None,
        }
    }
}

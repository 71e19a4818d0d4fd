//! What kind of trouble an error is, so that policy is a `match` and never a
//! search through texts.

use serde::{Deserialize, Serialize};

/// The class of an error: what the one who gets it may do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorClass {
    /// Passing trouble: the same thing may be asked again.
    Retryable,
    /// A clear no: asking again changes nothing until somebody acts.
    Refused,
    /// Nobody knows whether it happened: ask what is there before acting.
    Lost,
    /// Drover's own mistake.
    Bug,
    /// Whoever asked has been replaced: stop, and undo nothing on this account.
    Fenced,
}

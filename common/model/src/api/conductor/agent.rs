//! What an agent says of itself: that it starts, lives, and goes.
//!
//! The conductor hands an *incarnation* to each agent that starts, a counter per
//! host in the record. With it and a sequence of their own, heartbeats and reports
//! are in order; no clock orders anything.

use serde::{Deserialize, Serialize};

use crate::{ids::HostName, version::Spoken};

/// Who an agent is, so that a restart can be told from a second agent of one name.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Identity {
    /// Of its state directory: the same after a restart, another on a rebuilt node.
    pub state: String,
    /// Of the machine (`/etc/machine-id`).
    pub machine: String,
    /// Of the machine's boot.
    pub boot: String,
    /// Of this run of the agent.
    pub process: String,
}

impl Identity {
    /// Whether that one is this agent's earlier run: of the same state on the same machine.
    pub fn succeeds(&self, earlier: &Self) -> bool {
        !self.state.is_empty() && self.state == earlier.state && self.machine == earlier.machine
    }

    /// Whether it is on the machine of that one, or has its state: not a second node
    /// of one name.
    pub fn is_akin(&self, other: &Self) -> bool {
        let same = |own: &str, other: &str| !own.is_empty() && own == other;
        same(&self.machine, &other.machine) || same(&self.state, &other.state)
    }
}

/// An agent starts, and asks for its incarnation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegisterAgent {
    /// Which node it serves.
    pub host: HostName,
    /// Who it is.
    pub identity: Identity,
    /// Version of the agent.
    pub agent_version: String,
    /// The incarnation that this run had before, if it was told that it has none
    /// any more: then it is no restart.
    #[serde(default)]
    pub held: Option<u64>,
    /// Versions of RPC that it speaks.
    #[serde(default, skip_serializing_if = "Spoken::is_unsaid")]
    pub speaks: Spoken,
}

/// What became of that.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum Registered {
    /// It is the node's agent.
    Admitted {
        /// Which incarnation it is.
        incarnation: u64,
        /// Versions of RPC that the conductor speaks.
        #[serde(default, skip_serializing_if = "Spoken::is_unsaid")]
        speaks: Spoken,
    },
    /// It is not: another one is, and lives.
    Refused {
        /// In words.
        reason: String,
    },
}

/// A sign of life. It needs neither libvirt nor storage.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heartbeat {
    /// Which node.
    pub host: HostName,
    /// As handed out.
    pub incarnation: u64,
    /// Counts up within one run of the agent.
    pub sequence: u64,
    /// Version of the agent.
    pub agent_version: String,
    /// The node's own clock, milliseconds since 1970; shown, and compared with nothing.
    pub clock_ms: u64,
    /// Versions of RPC that it speaks.
    #[serde(default, skip_serializing_if = "Spoken::is_unsaid")]
    pub speaks: Spoken,
}

/// What comes back for a sign of life.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heard {
    /// Whether it counts.
    #[serde(flatten)]
    pub word: Word,
    /// Versions of RPC that the conductor speaks.
    #[serde(default, skip_serializing_if = "Spoken::is_unsaid")]
    pub speaks: Spoken,
}

/// What a conductor says to a heartbeat or a report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "word", rename_all = "snake_case")]
pub enum Word {
    /// It counts.
    Taken,
    /// It does not count: a later one was there before.
    Stale {
        /// In words.
        reason: String,
    },
    /// It does not count: who says it is not the node's agent (any more).
    Stranger {
        /// In words.
        reason: String,
    },
    /// A report that cannot be taken in at all.
    Unfit {
        /// In words.
        reason: String,
    },
}

impl Word {
    /// Why it does not count.
    pub fn refusal(&self) -> Option<&str> {
        match self {
            Self::Taken => None,
            Self::Stale { reason } | Self::Stranger { reason } | Self::Unfit { reason } => {
                Some(reason)
            }
        }
    }
}

/// An agent stops and says so: the next one on its machine, or with its state, need
/// not wait for its silence.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentLeaves {
    /// Which node.
    pub host: HostName,
    /// As handed out.
    pub incarnation: u64,
}

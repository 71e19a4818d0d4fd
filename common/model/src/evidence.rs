//! What is known of a node that may be dead: facts, each with who saw it and
//! when. The conductor judges them; an operation keeps them.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{check::CheckFailure, ids::HostName, migration::Requester, node::Endpoint};

/// What a fencing agent said of a node's power.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "fence", rename_all = "snake_case")]
pub enum FenceAnswer {
    /// The settings name none for this node.
    NotConfigured,
    /// It is off.
    Off {
        /// Which agent says so.
        agent: String,
        /// When, milliseconds since 1970.
        at_ms: u64,
    },
    /// It is on.
    On {
        /// Which agent says so.
        agent: String,
    },
    /// It could not be told, or not be done.
    Failed {
        /// Which agent was asked.
        agent: String,
        /// What came of it.
        message: String,
    },
}

impl FenceAnswer {
    /// Whether it says that the node has no power.
    pub fn is_off(&self) -> bool {
        matches!(self, Self::Off { .. })
    }
}

/// A third node that a witness was asked to reach: whether it can reach
/// anybody at all.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Control {
    /// Which node.
    pub host: HostName,
    /// Whether its libvirtd was reached, or why not.
    pub reached: Result<(), String>,
}

/// Whether another node, a witness, reaches something of the node in question.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reach {
    /// Who tried.
    pub from: HostName,
    /// Whether its libvirtd answers there, or why not.
    pub libvirt: Result<(), String>,
    /// Whether the witness itself answered.
    #[serde(default)]
    pub answered: bool,
    /// Whether the connection was refused: no libvirtd listens, but the
    /// machine runs.
    #[serde(default)]
    pub refused: bool,
    /// What else the witness was asked to reach meanwhile.
    #[serde(default)]
    pub controls: Vec<Control>,
    /// When the witness had answered, milliseconds since 1970.
    #[serde(default)]
    pub at_ms: u64,
}

impl Reach {
    /// Whether the machine was seen to run.
    pub fn shows_life(&self) -> bool {
        self.libvirt.is_ok() || self.refused
    }

    /// Whether that this witness does not reach the node says anything: it
    /// answered, and reaches others.
    pub fn counts(&self) -> bool {
        self.answered && self.controls.iter().any(|c| c.reached.is_ok())
    }
}

/// Something that shows that a node runs, whatever was said of it. Its name is
/// what an operator says to overrule it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LifeSign {
    /// Its agent answers a question.
    AgentAnswers,
    /// Another node reaches its libvirtd.
    LibvirtReachable,
    /// It refuses another node's connection: no libvirtd, but a machine that runs.
    HostResponds,
}

impl LifeSign {
    /// Every sign.
    pub const ALL: &'static [Self] = &[
        Self::AgentAnswers,
        Self::LibvirtReachable,
        Self::HostResponds,
    ];

    /// The sign as a word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::AgentAnswers => "agent-answers",
            Self::LibvirtReachable => "libvirt-reachable",
            Self::HostResponds => "host-responds",
        }
    }
}

impl fmt::Display for LifeSign {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The last that was heard of a node's agent. Of two of one node the later is the
/// larger, whatever any clock says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Life {
    /// Which run of the agent.
    pub incarnation: u64,
    /// Sequence of its heartbeat.
    pub beat: u64,
}

/// What is known of a node that may be dead.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evidence {
    /// When it was collected, milliseconds since 1970.
    pub at_ms: u64,
    /// Which conductor collected it.
    #[serde(default)]
    pub conductor: String,
    /// For how long that conductor could have heard nodes, ms: what it did not
    /// hear before says nothing.
    #[serde(default)]
    pub listening_ms: u64,
    /// Where the node was looked for, by its last report.
    #[serde(default)]
    pub endpoint: Option<Endpoint>,
    /// Which run of the node's agent was heard last: when it began, milliseconds
    /// since 1970.
    #[serde(default)]
    pub agent_started_ms: u64,
    /// When it was heard of last, milliseconds since 1970.
    #[serde(default)]
    pub heard_at_ms: u64,
    /// What was heard of it last; none of an agent that never registered.
    #[serde(default)]
    pub life: Option<Life>,
    /// Since when nothing was heard of it, ms.
    pub silent_ms: u64,
    /// After so long it counts as down, ms.
    pub down_after_ms: u64,
    /// Whether an operator declared it down.
    pub forced_down: bool,
    /// Consumers of its queue at the broker, or why that cannot be told. (A
    /// broker drops a consumer that lost its power only after a while.)
    pub queue_consumers: Result<u32, String>,
    /// What the other nodes see of it.
    pub reach: Vec<Reach>,
    /// Whether its agent answers, or why not; none if it was not asked.
    #[serde(default)]
    pub agent: Option<Result<(), String>>,
    /// What its fencing agent says.
    pub fence: FenceAnswer,
    /// When the fencing agent was told to cut the power, milliseconds since
    /// 1970; what the nodes see is of afterwards then, unless the node was off by
    /// its status before.
    #[serde(default)]
    pub cut_at_ms: Option<u64>,
    /// Who answers for its being off, if somebody said so.
    pub confirmed_by: Option<Requester>,
    /// Nodes that should be up, and how many of them are silent, this one among
    /// them.
    pub nodes_expected: u32,
    /// See above.
    pub nodes_silent: u32,
}

impl Evidence {
    /// What shows that the node runs, and who sees it. Consumers of its queue do
    /// not: a broker keeps those of a dead node for a while.
    pub fn life_signs(&self) -> Vec<(LifeSign, String)> {
        let agent = matches!(self.agent, Some(Ok(())));
        let agent = agent.then(|| (LifeSign::AgentAnswers, "its agent answers".to_owned()));
        let seen = |what: fn(&&Reach) -> bool| {
            let by = self.reach.iter().filter(what).map(|r| r.from.as_str());
            let by: Vec<_> = by.collect();
            (!by.is_empty()).then(|| by.join(", "))
        };
        let reached = seen(|r| r.libvirt.is_ok()).map(|by| {
            (
                LifeSign::LibvirtReachable,
                format!("{by} reaches its libvirtd"),
            )
        });
        let refused = seen(|r| r.refused && r.libvirt.is_err()).map(|by| {
            let words = format!("it refuses a connection from {by}, so the machine runs");
            (LifeSign::HostResponds, words)
        });
        agent.into_iter().chain(reached).chain(refused).collect()
    }

    /// Whether the conductor has heard nodes for long enough that a silence counts.
    pub fn has_listened(&self) -> bool {
        self.listening_ms > self.down_after_ms
    }

    /// Nodes whose not reaching it says something.
    pub fn witnesses(&self) -> usize {
        self.reach.iter().filter(|r| r.counts()).count()
    }
}

/// A node whose agent is silent and of which nothing proves that it is dead: it
/// waits for people, and its power is not cut unattended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentLost {
    /// Since when, milliseconds since 1970.
    pub since_ms: u64,
    /// Why its guests are not started elsewhere unattended.
    pub reasons: Vec<CheckFailure>,
    /// What was seen last.
    pub evidence: Evidence,
}

//! An operation on nodes: many moves of guests, planned and carried out as one.
//!
//! ```text
//! planning ─► running ─┬─► completed    every guest that was to move has moved
//!    │           │     └─► incomplete   the rest stays where it is, each with its reason
//!    │           └─► cancelling ─► cancelled
//!    └─► failed                         nothing was begun (no proof, no plan)
//! ```
//!
//! A drained node is one whose drain is *completed*; while it is *running* the
//! node is draining. Of each guest:
//!
//! ```text
//! waiting ─► moving ─┬─► moved
//!    ▲               ├─► failed      no destination is left to try
//!    └───────────────┘ next destination, or next way if that was allowed
//! waiting ─► stays                   nothing moves it; it runs on
//! waiting ─► cancelled
//! ```

use std::fmt;

use serde::{Deserialize, Serialize};

pub use crate::evidence::{Control, Evidence, FenceAnswer, Life, LifeSign, Reach};
use crate::{
    check::CheckFailure,
    ids::{HostName, InstanceId, MigrationId, OperationId},
    migration::{ColdOptions, Decision, LiveOptions, ProofOfDeath, Requester},
    unknown::Unknown,
};

/// Which kind, and how.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", content = "options", rename_all = "snake_case")]
pub enum Task {
    /// A node is emptied.
    Drain(DrainOptions),
    /// A node is opened again, and gets back what left it.
    Restore(RestoreOptions),
    /// What ran on a dead node is started elsewhere.
    Evacuate(EvacuateOptions),
    /// Guests leave nodes that are loaded more than others.
    Balance(BalanceOptions),
}

impl Task {
    /// What a newer version wishes of it.
    pub fn unknown(&self) -> &Unknown {
        match self {
            Self::Drain(o) => &o.unknown,
            Self::Restore(o) => &o.unknown,
            Self::Evacuate(o) => &o.unknown,
            Self::Balance(o) => &o.unknown,
        }
    }

    /// The kind alone, as a word.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Drain(_) => "drain",
            Self::Restore(_) => "restore",
            Self::Evacuate(_) => "evacuate",
            Self::Balance(_) => "balance",
        }
    }

    /// The node it is about; a balance is about all of them.
    pub fn host(&self) -> Option<&HostName> {
        match self {
            Self::Drain(o) => Some(&o.host),
            Self::Restore(o) => Some(&o.host),
            Self::Evacuate(o) => Some(&o.host),
            Self::Balance(_) => None,
        }
    }

    /// Most guests that it may have under way at once, if the caller said.
    pub fn max_parallel(&self) -> Option<u32> {
        match self {
            Self::Drain(o) => o.max_parallel,
            Self::Restore(o) => o.max_parallel,
            Self::Evacuate(o) => o.max_parallel,
            Self::Balance(o) => o.max_parallel,
        }
    }
}

/// How guests may leave their node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MoveMode {
    /// Live or not at all.
    #[default]
    Live,
    /// Shut down, moved, started.
    Cold,
    /// Live where that can be, else cold: the caller's consent to both.
    Mixed,
}

impl MoveMode {
    /// The mode as a word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Live => "live",
            Self::Cold => "cold",
            Self::Mixed => "mixed",
        }
    }
}

/// How a node is emptied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainOptions {
    /// Which node.
    pub host: HostName,
    /// How guests may leave.
    #[serde(default)]
    pub mode: MoveMode,
    /// Only to these nodes; to any if it is empty.
    #[serde(default)]
    pub to: Vec<HostName>,
    /// Guests under way at once, 1 to 1000; the settings' limits go as well.
    #[serde(default)]
    pub max_parallel: Option<u32>,
    /// Why, for whoever wonders why the node is closed.
    #[serde(default)]
    pub reason: Option<String>,
    /// How those that move live do so.
    #[serde(default)]
    pub live: LiveOptions,
    /// How those that move cold do so.
    #[serde(default)]
    pub cold: ColdOptions,
    /// What a newer version wishes.
    #[serde(flatten)]
    pub unknown: Unknown,
}

impl DrainOptions {
    /// Empties a node live, with nothing else said.
    pub fn new(host: HostName) -> Self {
        Self {
            host,
            mode: MoveMode::default(),
            to: Vec::new(),
            max_parallel: None,
            reason: None,
            live: LiveOptions::default(),
            cold: ColdOptions::default(),
            unknown: Unknown::default(),
        }
    }
}

/// Which guests come back to a restored node.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Returning {
    /// All that its last drain took away and that are still where it put them.
    #[default]
    All,
    /// None: the node is only opened.
    None,
    /// These of them (UUIDs, prefixes or names).
    Only(Vec<String>),
}

/// How a node is restored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreOptions {
    /// Which node.
    pub host: HostName,
    /// Which guests come back.
    #[serde(default)]
    pub returning: Returning,
    /// How they may do so.
    #[serde(default)]
    pub mode: MoveMode,
    /// Guests under way at once, 1 to 1000.
    #[serde(default)]
    pub max_parallel: Option<u32>,
    /// What a newer version wishes.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// How a dead node is evacuated.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EvacuateOptions {
    /// Which node.
    pub host: HostName,
    /// Only to these nodes; to any if it is empty.
    #[serde(default)]
    pub to: Vec<HostName>,
    /// Only these instances; all if it is empty.
    #[serde(default)]
    pub only: Vec<InstanceId>,
    /// Guests started at once, 1 to 1000.
    #[serde(default)]
    pub max_parallel: Option<u32>,
    /// The caller has seen that the node is off, and answers for it (invariant 1).
    #[serde(default)]
    pub confirmed_off: bool,
    /// Go on although so many nodes are lost that the conductor may be the one
    /// that is cut off.
    #[serde(default)]
    pub despite_many_lost: bool,
    /// Signs of life that the caller has seen and overrules: the node's power is
    /// cut although they are there. What is there and not named, or named and
    /// not there, refuses it.
    #[serde(default)]
    pub despite: Vec<LifeSign>,
    /// Whether the conductor began it by itself: then evidence decides alone.
    #[serde(default)]
    pub automatic: bool,
    /// What a newer version wishes.
    #[serde(flatten)]
    pub unknown: Unknown,
}

impl EvacuateOptions {
    /// Evacuates a node, with nothing else said.
    pub fn new(host: HostName) -> Self {
        Self {
            host,
            to: Vec::new(),
            only: Vec::new(),
            max_parallel: None,
            confirmed_off: false,
            despite_many_lost: false,
            despite: Vec::new(),
            automatic: false,
            unknown: Unknown::default(),
        }
    }
}

/// How load is spread.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct BalanceOptions {
    /// Largest spread that is left: the most loaded node's load less the mean,
    /// percent points. Default by the settings.
    pub threshold_percent: Option<u32>,
    /// Guests under way at once, 1 to 1000.
    pub max_parallel: Option<u32>,
    /// Moves of one run at the most, 1 to 1000.
    pub max_moves: Option<u32>,
    /// Whether the conductor began it by itself.
    pub automatic: bool,
    /// What a newer version wishes.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// Where an operation stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OperationStatus {
    /// Journalled; nodes are asked, nothing is moved.
    Planning,
    /// Guests move.
    Running,
    /// No more begin; those on their way are called back.
    Cancelling,
    /// Every guest that was to move has moved.
    Completed,
    /// Some stay, each with its reason.
    Incomplete,
    /// Ended on request.
    Cancelled,
    /// Nothing was begun.
    Failed,
}

impl OperationStatus {
    /// Every status.
    pub const ALL: &'static [Self] = &[
        Self::Planning,
        Self::Running,
        Self::Cancelling,
        Self::Completed,
        Self::Incomplete,
        Self::Cancelled,
        Self::Failed,
    ];

    /// The status as a word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Planning => "planning",
            Self::Running => "running",
            Self::Cancelling => "cancelling",
            Self::Completed => "completed",
            Self::Incomplete => "incomplete",
            Self::Cancelled => "cancelled",
            Self::Failed => "failed",
        }
    }

    /// Whether nothing more will happen.
    pub fn is_final(self) -> bool {
        !matches!(self, Self::Planning | Self::Running | Self::Cancelling)
    }

    /// The one transition function. Staying is always allowed.
    pub fn may_become(self, next: Self) -> bool {
        use OperationStatus as S;
        match (self, next) {
            (from, to) if from == to => true,
            (S::Planning, S::Running | S::Cancelling | S::Failed) => true,
            (S::Running, S::Cancelling | S::Completed | S::Incomplete) => true,
            (S::Cancelling, S::Cancelled) => true,
            _ => false,
        }
    }
}

impl fmt::Display for OperationStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A way for a guest to leave its node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MoveWay {
    /// It runs on.
    Live,
    /// It is off while it moves.
    Cold,
    /// Its node is dead, and it is started elsewhere.
    Evacuate,
}

impl MoveWay {
    /// The way as a word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Live => "live",
            Self::Cold => "cold",
            Self::Evacuate => "evacuate",
        }
    }
}

/// What was found of a guest when the plan was made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "verdict", rename_all = "snake_case")]
pub enum Verdict {
    /// It moves.
    Moves {
        /// How.
        way: MoveWay,
        /// Where to.
        to: HostName,
        /// How long it will take once begun, ms: an estimate.
        expected_ms: u64,
        /// How long the guest will stand still, or be off, ms: an estimate.
        expected_downtime_ms: u64,
        /// Why there, and why so, in words.
        why: String,
    },
    /// It stays.
    Stays {
        /// Every reason.
        reasons: Vec<CheckFailure>,
        /// Whether that keeps the operation from being complete. A guest that
        /// is off is in nobody's way.
        blocks: bool,
    },
}

/// A guest in a plan, in the order in which they go.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlannedMove {
    /// Which.
    pub instance: InstanceId,
    /// Its name.
    pub name: String,
    /// Its project.
    pub project: String,
    /// Where it is.
    pub source: HostName,
    /// vCPUs.
    pub vcpus: u32,
    /// Memory, MiB.
    pub memory_mib: u64,
    /// Whether it runs.
    pub runs: bool,
    /// Higher goes first.
    pub priority: i32,
    /// What comes of it.
    pub verdict: Verdict,
    /// Of a balance, the spread after this step, percent points.
    #[serde(default)]
    pub spread_after_percent: Option<f64>,
}

/// How full a node is.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Fill {
    /// Guests that run there.
    pub guests: u64,
    /// vCPUs given out.
    pub vcpus: u64,
    /// Memory given out, MiB.
    pub memory_mib: u64,
    /// CPU that guests use, percent of the node's; none if it is not known.
    pub cpu_load_percent: Option<f64>,
    /// Memory that guests hold, percent of the node's; none if it is not known.
    pub memory_load_percent: Option<f64>,
}

/// A node before and after.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Forecast {
    /// Which.
    pub host: HostName,
    /// vCPUs that may be given out.
    pub vcpus_usable: u64,
    /// Memory that may be given out, MiB.
    pub memory_usable_mib: u64,
    /// Now.
    pub before: Fill,
    /// When the plan is carried out.
    pub after: Fill,
}

/// Everything that would be done, or is.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct OperationPlan {
    /// Guest by guest, in order.
    pub moves: Vec<PlannedMove>,
    /// Node by node.
    pub nodes: Vec<Forecast>,
    /// How long all of it will take, ms: an estimate.
    pub expected_ms: u64,
    /// Of a balance, the spread now and in the end, percent points.
    #[serde(default)]
    pub spread_percent: Option<(f64, f64)>,
    /// What was decided about the whole, in words.
    #[serde(default)]
    pub notes: Vec<String>,
}

impl OperationPlan {
    /// Guests that move.
    pub fn moving(&self) -> impl Iterator<Item = &PlannedMove> {
        let moves = |m: &&PlannedMove| matches!(m.verdict, Verdict::Moves { .. });
        self.moves.iter().filter(moves)
    }
}

/// An attempt that came to nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tried {
    /// Where to.
    pub host: HostName,
    /// How.
    pub way: MoveWay,
    /// Its migration, if it came to one.
    pub migration: Option<MigrationId>,
    /// Why it came to nothing.
    pub reason: String,
    /// Whether the node is tried again for this guest.
    pub again: bool,
}

/// Where a guest of an operation stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum ItemState {
    /// It is its turn later.
    Waiting {
        /// What it waits for, in words.
        why: String,
    },
    /// It is on its way.
    Moving {
        /// By this migration.
        migration: MigrationId,
        /// The same as a number.
        number: i64,
    },
    /// It is there.
    Moved {
        /// By this migration.
        migration: MigrationId,
        /// The same as a number.
        number: i64,
        /// Where.
        host: HostName,
        /// How long it stood still, or was off, ms.
        downtime_ms: Option<u64>,
    },
    /// Nothing was tried: it runs on where it is.
    Stays {
        /// Why.
        reason: String,
        /// As in [`Verdict::Stays`].
        blocks: bool,
    },
    /// Everything was tried: it runs on where it is.
    Failed {
        /// What came of the last attempt.
        reason: String,
    },
    /// It was called off.
    Cancelled,
}

impl ItemState {
    /// Whether nothing more will happen with it.
    pub fn is_final(&self) -> bool {
        !matches!(self, Self::Waiting { .. } | Self::Moving { .. })
    }

    /// The state as a word.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Waiting { .. } => "waiting",
            Self::Moving { .. } => "moving",
            Self::Moved { .. } => "moved",
            Self::Stays { .. } => "stays",
            Self::Failed { .. } => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

/// A guest of an operation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Item {
    /// What the plan says of it. Its way and target follow what is tried next.
    #[serde(flatten)]
    pub planned: PlannedMove,
    /// What came to nothing.
    #[serde(default)]
    pub tried: Vec<Tried>,
    /// Where it stands.
    #[serde(flatten)]
    pub state: ItemState,
}

/// The record of an operation. Kept for ever.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Operation {
    /// Counts up.
    pub id: i64,
    /// Names it.
    pub uuid: OperationId,
    /// Which kind, and how.
    #[serde(flatten)]
    pub task: Task,
    /// Where it stands.
    pub status: OperationStatus,
    /// Whether somebody called it off.
    pub cancel_requested: bool,
    /// Guest by guest, in the order in which they go.
    pub items: Vec<Item>,
    /// How the nodes were, and were to be, when the plan was made.
    pub nodes: Vec<Forecast>,
    /// How long it was to take, ms.
    pub expected_ms: u64,
    /// Of a balance, the spread then and in the end, percent points.
    #[serde(default)]
    pub spread_percent: Option<(f64, f64)>,
    /// Of an evacuation, what proves that the node is dead.
    #[serde(default)]
    pub evidence: Option<Evidence>,
    /// Of an evacuation, what the evidence came to: the right to start guests
    /// elsewhere.
    #[serde(default)]
    pub proof: Option<ProofOfDeath>,
    /// Why it failed.
    #[serde(default)]
    pub failure: Option<String>,
    /// Checks that refused it, if it failed so.
    #[serde(default)]
    pub refusals: Vec<CheckFailure>,
    /// What was decided on the way.
    pub decisions: Vec<Decision>,
    /// Conductor that works on it.
    pub owner: String,
    /// How often a conductor took it up.
    pub attempt: u32,
    /// Who asked.
    pub requester: Requester,
    /// When it was accepted, milliseconds since 1970.
    pub created_at_ms: u64,
    /// Last change, milliseconds since 1970.
    pub updated_at_ms: u64,
    /// When it ended, milliseconds since 1970.
    pub finished_at_ms: Option<u64>,
    /// Counts changes of this record; what `wait_operation` waits on.
    pub version: u64,
    /// What a newer version keeps here.
    #[serde(flatten)]
    pub unknown: Unknown,
}

impl Operation {
    /// One that was just accepted, with a new id.
    pub fn new(task: Task, requester: Requester, owner: &str, now_ms: u64) -> Self {
        Self {
            id: 0,
            uuid: OperationId::generate(),
            task,
            status: OperationStatus::Planning,
            cancel_requested: false,
            items: Vec::new(),
            nodes: Vec::new(),
            expected_ms: 0,
            spread_percent: None,
            evidence: None,
            proof: None,
            failure: None,
            refusals: Vec::new(),
            decisions: Vec::new(),
            owner: owner.to_owned(),
            attempt: 1,
            requester,
            created_at_ms: now_ms,
            updated_at_ms: now_ms,
            finished_at_ms: None,
            version: 0,
            unknown: Unknown::default(),
        }
    }

    /// Guests by the word for where they stand.
    pub fn count(&self, state: &str) -> usize {
        let is = |item: &&Item| item.state.as_str() == state;
        self.items.iter().filter(is).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn final_is_final() {
        for from in OperationStatus::ALL.iter().filter(|s| s.is_final()) {
            for to in OperationStatus::ALL.iter().filter(|to| *to != from) {
                assert!(!from.may_become(*to), "{from} -> {to}");
            }
        }
    }

    #[test]
    fn a_record_reads_back() {
        let host: HostName = "kvm1".parse().unwrap();
        let options = DrainOptions::new(host.clone());
        let task = Task::Drain(options);
        let operation = Operation {
            id: 1,
            status: OperationStatus::Running,
            items: vec![Item {
                planned: PlannedMove {
                    instance: InstanceId(uuid::Uuid::nil()),
                    name: "vm1".into(),
                    project: "demo".into(),
                    source: host.clone(),
                    vcpus: 1,
                    memory_mib: 128,
                    runs: true,
                    priority: 0,
                    verdict: Verdict::Moves {
                        way: MoveWay::Live,
                        to: "kvm2".parse().unwrap(),
                        expected_ms: 1,
                        expected_downtime_ms: 1,
                        why: String::new(),
                    },
                    spread_after_percent: None,
                },
                tried: Vec::new(),
                state: ItemState::Waiting { why: "x".into() },
            }],
            version: 1,
            ..Operation::new(task, Requester::default(), "ctl", 0)
        };
        let text = serde_json::to_string(&operation).unwrap();
        let back: Operation = serde_json::from_str(&text).unwrap();
        assert_eq!(back, operation);
        assert!(text.contains(r#""kind":"drain""#), "{text}");
    }
}

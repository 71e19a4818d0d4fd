//! A migration: what was asked, where it stands, how it ended.
//!
//! ```text
//! live, and project transfers of either kind (which have no post-copy)
//! accepted ─► queued ─► preparing ─► running ─┬──────────────► completed
//!    │          │           │          │      └► running (post-copy) ─► completed
//!    └──────────┴───────────┴──────────┴─► failed │ cancelled          └► failed
//!
//! cold
//! accepted ─► queued ─► pre-migrating ─► migrating ─► post-migrating ─► finished ─┬─► confirming ─► confirmed
//!    └──────────┴─────────────┴──────────────┴──────────────┴─► failed │ cancelled └─► reverting ─► reverted
//!                                                                                          └─► finished
//!
//! evacuation
//! accepted ─► pre-migrating ─► done ─► completed
//!    └──────────────┴───────────┴─► failed (cancelled only before done)
//!
//!  any unfinished state ─► stuck ─► (resume) the state it came from
//! ```
//!
//! A cold one that is *finished* rests: the guest is on the destination, the
//! source keeps its copy aside, and somebody has to confirm or to revert.

mod options;

use std::{cmp::Ordering, fmt};

use serde::{Deserialize, Serialize};

pub use options::{
    BlockMigration, ColdOptions, Evacuation, Flavor, LiveOptions, ProjectTransfer, ProofOfDeath,
    TransferMode, TransferOptions, Way,
};

use crate::{
    check::{self, CheckFailure},
    ids::{HostName, InstanceId, MigrationId, OfferId, OperationId},
    unknown::{Unknown, Word},
};

/// What kind of move.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum MigrationType {
    /// The guest runs on while it moves.
    #[serde(rename = "live-migration")]
    LiveMigration,
    /// The guest is off while it moves.
    #[serde(rename = "migration")]
    Migration,
    /// The guest stays on its node and changes hands.
    #[serde(rename = "project-transfer")]
    ProjectTransfer,
    /// The guest's node is dead, and it is started elsewhere.
    #[serde(rename = "evacuation")]
    Evacuation,
}

impl fmt::Display for MigrationType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::LiveMigration => "live-migration",
            Self::Migration => "migration",
            Self::ProjectTransfer => "project-transfer",
            Self::Evacuation => "evacuation",
        })
    }
}

/// Where a migration stands, in Nova's spellings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum MigrationStatus {
    /// Journalled; nothing touched.
    #[serde(rename = "accepted")]
    Accepted,
    /// Checked and claimed; waits for its turn.
    #[serde(rename = "queued")]
    Queued,
    /// The destination is being made ready.
    #[serde(rename = "preparing")]
    Preparing,
    /// Disks and memory are on their way.
    #[serde(rename = "running")]
    Running,
    /// The guest runs on the destination, the rest of its memory follows.
    #[serde(rename = "running (post-copy)")]
    RunningPostCopy,
    /// The destination is being made ready; what can be copied beforehand is.
    #[serde(rename = "pre-migrating")]
    PreMigrating,
    /// The guest is shut down and its disks are on their way.
    #[serde(rename = "migrating")]
    Migrating,
    /// Its disks are there; the guest is being defined and started.
    #[serde(rename = "post-migrating")]
    PostMigrating,
    /// The guest is on the destination, the source keeps its copy aside.
    #[serde(rename = "finished")]
    Finished,
    /// The source's copy is being removed.
    #[serde(rename = "confirming")]
    Confirming,
    /// The source's copy is gone.
    #[serde(rename = "confirmed")]
    Confirmed,
    /// The guest is being brought back to the source.
    #[serde(rename = "reverting")]
    Reverting,
    /// The guest is on the source again.
    #[serde(rename = "reverted")]
    Reverted,
    /// Started elsewhere, after its node had died; not yet seen to run.
    #[serde(rename = "done")]
    Done,
    /// Seen running on the destination.
    #[serde(rename = "completed")]
    Completed,
    /// Ended without moving; the guest is where it was.
    #[serde(rename = "failed")]
    Failed,
    /// Ended on request; the guest is where it was.
    #[serde(rename = "cancelled")]
    Cancelled,
    /// Cannot go on alone (invariant 4).
    #[serde(rename = "stuck")]
    Stuck,
}

impl MigrationStatus {
    /// Every status.
    pub const ALL: &'static [Self] = &[
        Self::Accepted,
        Self::Queued,
        Self::Preparing,
        Self::Running,
        Self::RunningPostCopy,
        Self::PreMigrating,
        Self::Migrating,
        Self::PostMigrating,
        Self::Finished,
        Self::Confirming,
        Self::Confirmed,
        Self::Reverting,
        Self::Reverted,
        Self::Done,
        Self::Completed,
        Self::Failed,
        Self::Cancelled,
        Self::Stuck,
    ];

    /// The status as text, as Nova spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::Queued => "queued",
            Self::Preparing => "preparing",
            Self::Running => "running",
            Self::RunningPostCopy => "running (post-copy)",
            Self::PreMigrating => "pre-migrating",
            Self::Migrating => "migrating",
            Self::PostMigrating => "post-migrating",
            Self::Finished => "finished",
            Self::Confirming => "confirming",
            Self::Confirmed => "confirmed",
            Self::Reverting => "reverting",
            Self::Reverted => "reverted",
            Self::Done => "done",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Stuck => "stuck",
        }
    }

    /// The status of that text.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|s| s.as_str() == text)
    }

    /// Whether nothing more will happen.
    pub fn is_final(self) -> bool {
        matches!(
            self,
            Self::Completed | Self::Failed | Self::Cancelled | Self::Confirmed | Self::Reverted
        )
    }

    /// Whether nothing more will happen by itself.
    pub fn rests(self) -> bool {
        self.is_final() || self == Self::Finished
    }

    /// Whether the move is done, whatever is left to confirm.
    pub fn has_moved(self) -> bool {
        matches!(self, Self::Completed | Self::Finished | Self::Confirmed)
    }

    /// The one transition function: may a migration go from `self` to `next`?
    /// Staying is always allowed, so that a repeated step changes nothing.
    pub fn may_become(self, next: Self) -> bool {
        use MigrationStatus as S;
        if self == next {
            return true;
        }
        match (self, next) {
            (from, _) if from.is_final() => false,
            (_, S::Stuck) => true,
            // From here on the guest has moved: a copy of it is removed, one way or the other.
            (S::Finished, next) => matches!(next, S::Confirming | S::Reverting),
            (S::Confirming, next) => matches!(next, S::Confirmed | S::Finished),
            (S::Reverting, next) => matches!(next, S::Reverted | S::Finished),
            (S::Stuck, S::Confirmed | S::Reverted) => true,
            (_, S::Failed) => true,
            // After the switch to post-copy there is nothing left to cancel.
            // Nor once a guest was started whose node is dead.
            (from, S::Cancelled) => !matches!(from, S::RunningPostCopy | S::Done),
            (S::Accepted, S::PreMigrating)
            | (S::PreMigrating, S::Done)
            | (S::Done, S::Completed) => true,
            // A migration may prove complete from wherever the record was left.
            (S::Preparing | S::Running | S::RunningPostCopy | S::Stuck, S::Completed) => true,
            (S::Accepted, S::Queued) => true,
            (S::Queued, S::Preparing | S::PreMigrating) => true,
            (S::Preparing, S::Running) | (S::Running, S::RunningPostCopy) => true,
            (S::PreMigrating, S::Migrating)
            | (S::Migrating, S::PostMigrating)
            | (S::PostMigrating, S::Finished) => true,
            (S::Stuck, next) => !next.is_final(),
            _ => false,
        }
    }
}

impl fmt::Display for MigrationStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What became of a cold migration after it had finished.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    /// The source's copy is removed.
    Confirm,
    /// The guest goes back to the source's copy.
    Revert,
}

/// Bytes of one kind on their way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Transfer {
    /// In all, bytes.
    pub total_bytes: u64,
    /// Sent so far (what was sent twice counts twice), bytes.
    pub processed_bytes: u64,
    /// Still to send, bytes.
    pub remaining_bytes: u64,
}

/// What is being done right now, finer than the status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Waiting to begin.
    #[default]
    Waiting,
    /// The nodes are asked.
    Checking,
    /// What it goes to is made ready.
    Preparing,
    /// Disks are copied while the guest runs on, before a cold move.
    PreCopy,
    /// The guest was asked to shut down.
    Stopping,
    /// Disks are copied.
    Disk,
    /// Memory is copied while the guest runs.
    Memory,
    /// The guest runs on the destination, memory follows.
    PostCopy,
    /// The guest stands still and changes sides.
    SwitchOver,
    /// The old side is tidied.
    Finishing,
    /// Over.
    Done,
    /// One that this version does not know.
    #[serde(untagged)]
    Other(Word),
}

impl Ord for Phase {
    /// As they follow on each other. One that is not known comes before all others,
    /// so that it takes the place of none.
    fn cmp(&self, other: &Self) -> Ordering {
        let place = |phase: &Self| match phase {
            Self::Other(word) => (0, Some(*word)),
            Self::Waiting => (1, None),
            Self::Checking => (2, None),
            Self::Preparing => (3, None),
            Self::PreCopy => (4, None),
            Self::Stopping => (5, None),
            Self::Disk => (6, None),
            Self::Memory => (7, None),
            Self::PostCopy => (8, None),
            Self::SwitchOver => (9, None),
            Self::Finishing => (10, None),
            Self::Done => (11, None),
        };
        place(self).cmp(&place(other))
    }
}

impl PartialOrd for Phase {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Phase {
    /// The phase as a short word for tables.
    pub fn as_str(&self) -> &str {
        match self {
            Self::Other(word) => word.as_str(),
            Self::Waiting => "waiting",
            Self::Checking => "checking",
            Self::Preparing => "preparing",
            Self::PreCopy => "pre-copy",
            Self::Stopping => "stopping",
            Self::Disk => "disk",
            Self::Memory => "memory",
            Self::PostCopy => "post-copy",
            Self::SwitchOver => "switch-over",
            Self::Finishing => "finishing",
            Self::Done => "done",
        }
    }
}

/// A sample of a running migration.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Progress {
    /// What is being done.
    pub phase: Phase,
    /// Memory.
    pub memory: Transfer,
    /// Disks.
    pub disk: Transfer,
    /// Memory rate, bytes per second.
    pub rate_bytes_s: u64,
    /// How fast the guest writes memory anew, bytes per second.
    pub dirty_rate_bytes_s: u64,
    /// Pre-copy rounds over memory so far.
    pub iteration: u64,
    /// How long the guest would stand still if it switched now, ms.
    pub expected_downtime_ms: Option<u64>,
    /// Downtime it may take, ms.
    pub allowed_downtime_ms: Option<u64>,
    /// Time until the end at this rate, ms; none while it does not converge.
    pub eta_ms: Option<u64>,
    /// Time left to get nearer to the end before it is given up, ms.
    #[serde(default)]
    pub patience_ms: Option<u64>,
    /// Time since the transfer began, ms.
    pub elapsed_ms: u64,
    /// Why it takes long, in words, when it does.
    pub note: Option<String>,
}

/// Something that was decided on the way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// When, milliseconds since 1970.
    pub at_ms: u64,
    /// What and why.
    pub text: String,
}

/// Time a phase of the operation took.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepTiming {
    /// Name of the saga's step.
    pub step: String,
    /// How long, ms.
    pub duration_ms: u64,
}

/// Why a migration ended other than *completed*.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum EndReason {
    /// Checks said no.
    Refused {
        /// Every failed check.
        checks: Vec<CheckFailure>,
    },
    /// Something broke; the guest is where it was.
    Failed {
        /// What, with the words of whoever said it.
        message: String,
    },
    /// Somebody asked for it.
    Aborted,
    /// No progress for too long.
    Stalled {
        /// What was seen.
        message: String,
        /// Whether it lies with the guest (it writes faster than the link carries,
        /// does not shut down), which no other destination would change.
        #[serde(default)]
        of_guest: bool,
    },
    /// One that this version does not know.
    #[serde(untagged)]
    Other(Unknown),
}

impl fmt::Display for EndReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused { checks } => write!(f, "refused: {}", check::texts(checks)),
            Self::Failed { message } => f.write_str(message),
            Self::Aborted => f.write_str("aborted on request"),
            Self::Stalled { message, .. } => write!(f, "gave up: {message}"),
            Self::Other(unknown) => write!(f, "a reason of a newer Drover: {unknown}"),
        }
    }
}

/// Who asked, from the request's context.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Requester {
    /// `request_id` of the context.
    pub request_id: Option<String>,
    /// User id.
    pub user_id: Option<String>,
    /// Project id of the user, not of the instance.
    pub project_id: Option<String>,
}

/// Who agreed to a transfer, and when. An administrator may be both sides.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Consent {
    /// The offer that was accepted; none if both sides asked at once.
    pub offer: Option<OfferId>,
    /// Who offered.
    pub offered_by: Requester,
    /// When, milliseconds since 1970.
    pub offered_at_ms: u64,
    /// Who accepted.
    pub accepted_by: Requester,
    /// When, milliseconds since 1970.
    pub accepted_at_ms: u64,
}

/// The record of a migration. Kept for ever.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Migration {
    /// Counts up; Nova's frontends name migrations by it.
    pub id: i64,
    /// Keys every step.
    pub uuid: MigrationId,
    /// What moves.
    pub instance_uuid: InstanceId,
    /// Its name when it was asked for.
    pub instance_name: String,
    /// Its project when it was asked for.
    pub project_id: String,
    /// Which kind, and how: `migration_type` and `options`.
    #[serde(flatten)]
    pub way: Way,
    /// Where it stands.
    pub status: MigrationStatus,
    /// From.
    pub source_host: HostName,
    /// To; none until placed.
    pub dest_host: Option<HostName>,
    /// Whether the caller named the destination.
    pub dest_requested: bool,
    /// Step of the saga that runs or ran last.
    pub step: String,
    /// When that step began, milliseconds since 1970.
    pub step_started_at_ms: u64,
    /// How often a conductor took it up: 1, and one more after each recovery.
    pub attempt: u32,
    /// Conductor that works on it.
    pub owner: String,
    /// Who asked.
    pub requester: Requester,
    /// Of a project transfer, who agreed to it.
    #[serde(default)]
    pub consent: Option<Consent>,
    /// The operation it is part of.
    #[serde(default)]
    pub operation: Option<OperationId>,
    /// Whether an abort was asked for.
    pub abort_requested: bool,
    /// Whether that was a person's word that the guest goes back although its dead
    /// destination may have run it (cold).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub given_up: bool,
    /// Whether a force-complete was asked for.
    pub force_complete_requested: bool,
    /// What was decided on after it had finished (cold only).
    #[serde(default)]
    pub ending: Option<Ending>,
    /// How often that was begun: one that failed is begun anew.
    #[serde(default)]
    pub ending_attempt: u32,
    /// Why it did not complete.
    pub end_reason: Option<EndReason>,
    /// What went wrong without harm to the outcome.
    pub warnings: Vec<String>,
    /// What was decided on the way.
    pub decisions: Vec<Decision>,
    /// How long each step took.
    pub timings: Vec<StepTiming>,
    /// Last sample.
    pub progress: Progress,
    /// How long the guest stood still, measured by the hypervisor, ms; of a cold
    /// one, how long it was off; of a live transfer, how long its network was cut.
    pub downtime_ms: Option<u64>,
    /// When it was accepted, milliseconds since 1970.
    pub created_at_ms: u64,
    /// Last change, milliseconds since 1970.
    pub updated_at_ms: u64,
    /// When it ended, milliseconds since 1970.
    pub finished_at_ms: Option<u64>,
    /// When it is given up unless it gets nearer to its end, milliseconds since 1970.
    pub deadline_at_ms: Option<u64>,
    /// Counts changes of this record; what `wait_migration` waits on.
    pub version: u64,
    /// What a newer version keeps here.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// A status that cannot follow on another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a migration that is {from} cannot become {to}")]
pub struct IllegalTransition {
    /// Where it stands.
    pub from: MigrationStatus,
    /// What it was to become.
    pub to: MigrationStatus,
}

impl Migration {
    /// One that was just accepted, with a new id; whose it is and where it leads
    /// is the caller's to say.
    pub fn new(instance: InstanceId, source: HostName, way: Way, now_ms: u64) -> Self {
        Self {
            id: 0,
            uuid: MigrationId::generate(),
            instance_uuid: instance,
            instance_name: String::new(),
            project_id: String::new(),
            way,
            status: MigrationStatus::Accepted,
            source_host: source,
            dest_host: None,
            dest_requested: false,
            step: String::new(),
            step_started_at_ms: now_ms,
            attempt: 1,
            owner: String::new(),
            requester: Requester::default(),
            consent: None,
            operation: None,
            abort_requested: false,
            given_up: false,
            force_complete_requested: false,
            ending: None,
            ending_attempt: 0,
            end_reason: None,
            warnings: Vec::new(),
            decisions: Vec::new(),
            timings: Vec::new(),
            progress: Progress::default(),
            downtime_ms: None,
            created_at_ms: now_ms,
            updated_at_ms: now_ms,
            finished_at_ms: None,
            deadline_at_ms: None,
            version: 0,
            unknown: Unknown::default(),
        }
    }

    /// Goes on to a status, and says so if it cannot.
    ///
    /// # Errors
    /// [`MigrationStatus::may_become`] says no.
    pub fn become_status(&mut self, to: MigrationStatus) -> Result<(), IllegalTransition> {
        let from = self.status;
        if !from.may_become(to) {
            return Err(IllegalTransition { from, to });
        }
        self.status = to;
        Ok(())
    }

    /// Whether the guest may already run on the destination.
    pub fn past_return(&self) -> bool {
        self.status == MigrationStatus::RunningPostCopy
            || self.status.rests()
            || self.ending.is_some()
            || matches!(
                self.step.as_str(),
                "finish" | "hand_over" | "settle" | "tidy"
            )
    }

    /// Whether the guest, set aside on its source, stays off should its destination die
    /// now: asked for, it goes back all the same.
    pub fn may_be_lost_with_dest(&self) -> bool {
        matches!(self.way, Way::Cold(_)) && self.ending.is_none() && self.step == "finish"
    }

    /// Time from acceptance to the end (or to the last change), ms.
    pub fn total_time_ms(&self) -> u64 {
        let end = self.finished_at_ms.unwrap_or(self.updated_at_ms);
        end.saturating_sub(self.created_at_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::MigrationStatus as S;

    #[test]
    fn every_status_reads_back() {
        for status in S::ALL {
            assert_eq!(S::parse(status.as_str()), Some(*status));
            let json = serde_json::to_string(status).unwrap();
            assert_eq!(json, format!("\"{status}\""));
        }
        assert_eq!(S::parse("over"), None);
    }

    #[test]
    fn final_is_final() {
        for from in S::ALL.iter().filter(|s| s.is_final()) {
            for to in S::ALL.iter().filter(|to| *to != from) {
                assert!(!from.may_become(*to), "{from} -> {to}");
            }
        }
    }

    #[test]
    fn the_way_is_one_way() {
        let way = [
            S::Accepted,
            S::Queued,
            S::Preparing,
            S::Running,
            S::RunningPostCopy,
        ];
        for (i, from) in way.iter().enumerate() {
            for to in &way[..i] {
                assert!(!from.may_become(*to), "{from} -> {to}");
            }
        }
        assert!(
            !S::RunningPostCopy.may_become(S::Cancelled),
            "past the point of no return"
        );
        assert!(
            !S::Accepted.may_become(S::Completed),
            "nothing was observed"
        );
    }
}

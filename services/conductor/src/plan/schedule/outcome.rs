//! What became of the migrations of an operation.

use drover_model::{
    check::{CheckCode, CheckFailure, Side},
    migration::{EndReason, Migration, MigrationStatus, Way},
    operation::{Item, ItemState, MoveWay, Tried, Verdict},
};

/// What a migration came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It is under way.
    Moves,
    /// The guest is there.
    Moved,
    /// The guest was there, and was brought back by somebody.
    Reverted,
    /// The guest is where it was.
    Nothing {
        /// Whether another destination may do better.
        another_place: bool,
    },
}

/// The migration that stands for an item now: the one that it names, or of an
/// item that waits the newest that nobody has written down yet.
pub(super) fn of_item<'a>(own: &'a [Migration], item: &Item) -> Option<&'a Migration> {
    match &item.state {
        ItemState::Moving { migration, .. } => own.iter().find(|m| m.uuid == *migration),
        ItemState::Waiting { .. } => {
            let of_guest = own
                .iter()
                .filter(|m| m.instance_uuid == item.planned.instance);
            let written = |m: &Migration| item.tried.iter().any(|t| t.migration == Some(m.uuid));
            let newest = of_guest.max_by_key(|m| m.id)?;
            (!written(newest)).then_some(newest)
        }
        _ => None,
    }
}

pub(super) fn of(migration: &Migration) -> Outcome {
    match migration.status {
        status if status.has_moved() => Outcome::Moved,
        MigrationStatus::Reverted => Outcome::Reverted,
        MigrationStatus::Failed | MigrationStatus::Cancelled => Outcome::Nothing {
            another_place: !lies_with_the_guest(migration.end_reason.as_ref()),
        },
        _ => Outcome::Moves,
    }
}

/// Whether it would come to nothing anywhere else too.
fn lies_with_the_guest(reason: Option<&EndReason>) -> bool {
    match reason {
        Some(EndReason::Stalled { of_guest, .. }) => *of_guest,
        Some(EndReason::Refused { checks }) => {
            let of_guest = |c: &CheckFailure| matches!(c.side, Side::Source | Side::Instance);
            !checks.is_empty() && checks.iter().all(of_guest)
        }
        Some(EndReason::Failed { .. } | EndReason::Aborted | EndReason::Other(_)) | None => false,
    }
}

/// Whether the node had no room just then: that may change.
fn was_full(reason: Option<&EndReason>) -> bool {
    let room = |c: &CheckFailure| matches!(c.code, CheckCode::Memory | CheckCode::Vcpus);
    match reason {
        Some(EndReason::Refused { checks }) => !checks.is_empty() && checks.iter().all(room),
        _ => false,
    }
}

pub(super) fn can_be_called_back(migration: &Migration) -> bool {
    use MigrationStatus as S;
    let too_late = matches!(
        migration.status,
        S::RunningPostCopy | S::Done | S::Confirming | S::Reverting
    );
    !migration.abort_requested && !too_late
}

/// Whether it was called back and cannot go on for now, as its node is silent: that may
/// be for good, and whoever calls an operation off need not wait for it.
pub(super) fn is_stuck_on_its_way_back(migration: &Migration) -> bool {
    migration.abort_requested && migration.status == MigrationStatus::Stuck
}

pub(super) fn moved(migration: &Migration, item: &Item) -> ItemState {
    let planned = match &item.planned.verdict {
        Verdict::Moves { to, .. } => to,
        Verdict::Stays { .. } => &item.planned.source,
    };
    ItemState::Moved {
        migration: migration.uuid,
        number: migration.id,
        host: migration.dest_host.as_ref().unwrap_or(planned).clone(),
        downtime_ms: migration.downtime_ms,
    }
}

pub(super) fn tried(migration: &Migration, item: &Item) -> Tried {
    let planned = match &item.planned.verdict {
        Verdict::Moves { to, .. } => to,
        Verdict::Stays { .. } => &item.planned.source,
    };
    let reason = migration.end_reason.as_ref();
    Tried {
        host: migration.dest_host.as_ref().unwrap_or(planned).clone(),
        way: match migration.way {
            Way::Live(_) | Way::Transfer(_) => MoveWay::Live,
            Way::Cold(_) => MoveWay::Cold,
            Way::Evacuation(_) => MoveWay::Evacuate,
        },
        migration: Some(migration.uuid),
        reason: reason.map_or_else(
            || format!("migration {} is {}", migration.id, migration.status),
            ToString::to_string,
        ),
        again: was_full(reason),
    }
}

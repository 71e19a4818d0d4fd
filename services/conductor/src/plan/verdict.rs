//! What comes of one guest: whether it moves, how and where to, or why not. The
//! same for every kind of plan.

use std::cmp::Reverse;

use drover_model::{
    check::{CheckCode, CheckFailure, Side},
    ids::HostName,
    operation::{MoveMode, MoveWay, OperationPlan, PlannedMove, Verdict},
};

use super::{
    Costs, Examination, GuestView, World, estimate, forecast,
    pack::{Ledger, Place, Wanted},
};

/// What is allowed.
#[derive(Debug, Clone, Copy)]
pub struct Rules<'a> {
    /// Only to these nodes; to any if it is empty.
    pub to: &'a [HostName],
    /// For estimates.
    pub costs: Costs,
}

/// Ways that a mode allows for a guest, best first; none for one that is off
/// where all are to move live.
pub fn ways(mode: MoveMode, runs: bool) -> &'static [MoveWay] {
    match (mode, runs) {
        (MoveMode::Live, true) => &[MoveWay::Live],
        (MoveMode::Live, false) => &[],
        (MoveMode::Mixed, true) => &[MoveWay::Live, MoveWay::Cold],
        (MoveMode::Cold, _) | (MoveMode::Mixed, false) => &[MoveWay::Cold],
    }
}

/// What comes of a guest whose node is well; a move is written into the ledger.
pub fn of_mode<'a>(
    guest: &'a GuestView,
    mode: MoveMode,
    rules: Rules<'_>,
    examination: Option<&Examination>,
    ledger: &mut Ledger<'a>,
) -> Verdict {
    match ways(mode, guest.runs) {
        [] => Verdict::Stays {
            reasons: vec![is_off(
                "it is off, and only a guest that runs moves live".to_owned(),
                "allow it to move while it is off, with --mixed or --cold",
            )],
            blocks: false,
        },
        ways => of(guest, ways, rules, examination, ledger),
    }
}

/// What comes of a guest that may move in these ways, the first that can be.
pub fn of<'a>(
    guest: &'a GuestView,
    ways: &[MoveWay],
    rules: Rules<'_>,
    examination: Option<&Examination>,
    ledger: &mut Ledger<'a>,
) -> Verdict {
    let ends_with_its_node = guest.leaves_live && ways == [MoveWay::Evacuate];
    if let Some(what) = guest.busy.as_ref().filter(|_| !ends_with_its_node) {
        return stays(vec![busy(what)]);
    }
    let hindered = |way: MoveWay| examination.and_then(|e| e.source.get(&way));
    let mut reasons: Vec<CheckFailure> = Vec::new();
    for way in ways {
        let failures = hindered(*way).map_or(&[][..], Vec::as_slice);
        if !failures.is_empty() {
            add_new(&mut reasons, failures);
            continue;
        }
        let wanted = Wanted {
            guest,
            way: *way,
            to: rules.to,
            examination,
            except: &[],
        };
        match ledger.choose(&wanted) {
            Ok(place) => {
                ledger.take(guest, &place.host);
                return moves(guest, *way, place, reasons.first(), rules.costs);
            }
            Err(nowhere) => add_new(&mut reasons, &nowhere),
        }
    }
    stays(reasons)
}

/// What was not said before.
fn add_new(reasons: &mut Vec<CheckFailure>, failures: &[CheckFailure]) {
    for failure in failures {
        if !reasons.contains(failure) {
            reasons.push(failure.clone());
        }
    }
}

fn stays(reasons: Vec<CheckFailure>) -> Verdict {
    Verdict::Stays {
        reasons,
        blocks: true,
    }
}

fn moves(
    guest: &GuestView,
    way: MoveWay,
    place: Place,
    not_live: Option<&CheckFailure>,
    costs: Costs,
) -> Verdict {
    let (expected_ms, expected_downtime_ms) = estimate::times(guest, way, costs);
    let mut why = most_room(&place);
    if let Some(failure) = not_live {
        why += &format!(
            "; {way} because not live: {}",
            failure.message,
            way = way.as_str()
        );
    }
    Verdict::Moves {
        way,
        to: place.host,
        expected_ms,
        expected_downtime_ms,
        why,
    }
}

/// Why a node was chosen, in words.
pub fn most_room(place: &Place) -> String {
    let left = place.memory_left_mib;
    format!("most room of the nodes that can take it: {left} MiB left with it")
}

/// It is off, and what that means here.
pub fn is_off(message: String, remedy: &str) -> CheckFailure {
    CheckFailure {
        code: CheckCode::InstanceState,
        side: Side::Instance,
        message,
        remedy: remedy.to_owned(),
    }
}

/// Something else has it.
pub fn busy(what: &str) -> CheckFailure {
    CheckFailure {
        code: CheckCode::InstanceBusy,
        side: Side::Instance,
        message: format!("another operation has it: {what}"),
        remedy: "wait for that, or end it, and do this again".to_owned(),
    }
}

/// Orders guests as they go: higher priority first, then larger ones, because
/// what takes long and begins early shortens the whole.
pub fn in_order(guests: &mut [&GuestView]) {
    guests.sort_by_key(|g| {
        (
            Reverse(g.priority),
            Reverse(g.memory_mib),
            g.name.as_str(),
            g.id,
        )
    });
}

/// A guest in a plan.
pub fn planned(guest: &GuestView, verdict: Verdict) -> PlannedMove {
    PlannedMove {
        instance: guest.id,
        name: guest.name.clone(),
        project: guest.project.clone(),
        source: guest.host.clone(),
        vcpus: guest.vcpus,
        memory_mib: guest.memory_mib,
        runs: guest.runs,
        priority: guest.priority,
        verdict,
        spread_after_percent: None,
    }
}

/// A plan of these moves about a node.
pub fn plan(
    world: &World,
    moves: Vec<PlannedMove>,
    about: Option<&HostName>,
    parallel: Option<u32>,
) -> OperationPlan {
    OperationPlan {
        nodes: forecast::of(world, &moves, about),
        expected_ms: estimate::whole(&moves, parallel.unwrap_or(estimate::PARALLEL)),
        moves,
        spread_percent: None,
        notes: Vec::new(),
    }
}

//! Where the guests of a dead node start again.

use std::collections::HashSet;

use drover_model::{
    ids::InstanceId,
    operation::{EvacuateOptions, MoveWay, OperationPlan, Verdict},
};

use super::{
    Costs, Examinations, World,
    pack::Ledger,
    verdict::{self, Rules},
};

/// A verdict for every guest of the node, in the order in which they start.
pub fn plan(
    world: &World,
    options: &EvacuateOptions,
    examinations: &Examinations,
    costs: Costs,
) -> OperationPlan {
    let only: HashSet<InstanceId> = options.only.iter().copied().collect();
    let here = world.guests.iter().filter(|g| g.host == options.host);
    let mut guests: Vec<_> = here
        .filter(|g| only.is_empty() || only.contains(&g.id))
        .collect();
    verdict::in_order(&mut guests);
    let rules = Rules {
        to: &options.to,
        costs,
    };
    let mut ledger = Ledger::new(world);
    let mut moves = Vec::with_capacity(guests.len());
    for guest in &guests {
        let examination = examinations.get(&guest.id);
        let verdict = match guest.runs {
            true => verdict::of(guest, &[MoveWay::Evacuate], rules, examination, &mut ledger),
            false => Verdict::Stays {
                reasons: vec![verdict::is_off(
                    format!("it was off; its definition stays on {}", options.host),
                    "it is there again when the node is",
                )],
                blocks: false,
            },
        };
        moves.push(verdict::planned(guest, verdict));
    }
    let found: HashSet<InstanceId> = guests.iter().map(|g| g.id).collect();
    let missing = options.only.iter().filter(|id| !found.contains(id));
    let mut notes: Vec<String> = missing
        .map(|id| format!("{id} is not on {}", options.host))
        .collect();
    let going = moves
        .iter()
        .filter(|m| matches!(m.verdict, Verdict::Moves { .. }));
    notes.extend(going.filter_map(|m| {
        let doubt = examinations.get(&m.instance)?.doubt.as_ref()?;
        Some(format!("{}: {doubt}", m.name))
    }));
    OperationPlan {
        notes,
        ..verdict::plan(world, moves, Some(&options.host), options.max_parallel)
    }
}

#[cfg(test)]
#[path = "evacuate_tests.rs"]
mod tests;

//! What it takes to empty a node.

use drover_model::operation::{DrainOptions, OperationPlan};

use super::{
    Costs, Examinations, World,
    pack::Ledger,
    verdict::{self, Rules},
};

/// A verdict for every guest of the node, in the order in which they go.
pub fn plan(
    world: &World,
    options: &DrainOptions,
    examinations: &Examinations,
    costs: Costs,
) -> OperationPlan {
    let here = world.guests.iter().filter(|g| g.host == options.host);
    let mut guests: Vec<_> = here.collect();
    verdict::in_order(&mut guests);
    let rules = Rules {
        to: &options.to,
        costs,
    };
    let mut ledger = Ledger::new(world);
    let moves = guests.into_iter().map(|guest| {
        let examination = examinations.get(&guest.id);
        let verdict = verdict::of_mode(guest, options.mode, rules, examination, &mut ledger);
        verdict::planned(guest, verdict)
    });
    let moves = moves.collect();
    verdict::plan(world, moves, Some(&options.host), options.max_parallel)
}

#[cfg(test)]
#[path = "drain_tests.rs"]
mod tests;

//! From the way that a plan names to the options of the migration.

use drover_model::{
    ids::OperationId,
    migration::{ColdOptions, Evacuation, LiveOptions, ProofOfDeath, Way},
    operation::{MoveWay, Operation, Task},
};

/// The options of a move, as far as they matter before it is begun.
pub fn options(task: &Task, way: MoveWay) -> Way {
    let (live, cold) = match task {
        Task::Drain(o) => (o.live.clone(), o.cold.clone()),
        _ => (LiveOptions::default(), ColdOptions::default()),
    };
    match way {
        MoveWay::Cold => Way::Cold(cold),
        // Of an evacuation nothing but the proof matters, and it has that later.
        MoveWay::Live | MoveWay::Evacuate => Way::Live(live),
    }
}

/// The migration that a guest of an operation is moved by; none if it is an
/// evacuation without proof (invariant 1).
pub fn migration(operation: &Operation, way: MoveWay) -> Option<Way> {
    match (way, &operation.task, &operation.proof) {
        (MoveWay::Evacuate, Task::Evacuate(o), Some(proof)) => {
            Some(Way::Evacuation(evacuation(operation.uuid, proof, &o.to)))
        }
        (MoveWay::Evacuate, ..) => None,
        _ => Some(options(&operation.task, way)),
    }
}

fn evacuation(
    operation: OperationId,
    proof: &ProofOfDeath,
    to: &[drover_model::ids::HostName],
) -> Evacuation {
    Evacuation {
        operation,
        proof: proof.clone(),
        to: to.to_vec(),
    }
}

//! What comes back to a node that was drained.

use std::{
    collections::{HashMap, HashSet},
    slice,
};

use drover_model::{
    ids::InstanceId,
    operation::{OperationPlan, RestoreOptions, Returning},
};

use super::{
    Costs, Examinations, GuestView, World,
    pack::Ledger,
    verdict::{self, Rules},
};

/// Shortest beginning of an id that names a guest, characters.
const SHORTEST_PREFIX: usize = 4;

/// A verdict for every guest that its last drain took away (`left`, in its order)
/// and that is still elsewhere.
pub fn plan(
    world: &World,
    options: &RestoreOptions,
    left: &[InstanceId],
    examinations: &Examinations,
    costs: Costs,
) -> OperationPlan {
    let mut notes = Vec::new();
    let gone = known(world, left, &mut notes);
    let wished = wished(&options.returning, &gone, &mut notes);
    let rules = Rules {
        to: slice::from_ref(&options.host),
        costs,
    };
    let mut ledger = Ledger::new(world);
    ledger.open_anyway(&options.host);
    let mut moves = Vec::new();
    for guest in gone {
        if guest.host == options.host || !wished.contains(&guest.id) {
            continue;
        }
        let examination = examinations.get(&guest.id);
        let verdict = verdict::of_mode(guest, options.mode, rules, examination, &mut ledger);
        moves.push(verdict::planned(guest, verdict));
    }
    OperationPlan {
        notes,
        ..verdict::plan(world, moves, Some(&options.host), options.max_parallel)
    }
}

/// Those that are still known, in the order in which they left.
fn known<'a>(world: &'a World, left: &[InstanceId], notes: &mut Vec<String>) -> Vec<&'a GuestView> {
    let wanted: HashSet<&InstanceId> = left.iter().collect();
    let guests = world.guests.iter().filter(|g| wanted.contains(&g.id));
    let by_id: HashMap<InstanceId, &GuestView> = guests.map(|g| (g.id, g)).collect();
    let mut seen = HashSet::new();
    let mut known = Vec::new();
    for id in left.iter().filter(|id| seen.insert(**id)) {
        match by_id.get(id) {
            Some(guest) => known.push(*guest),
            None => notes.push(format!("{id} left it and is known no more")),
        }
    }
    known
}

fn wished(
    returning: &Returning,
    gone: &[&GuestView],
    notes: &mut Vec<String>,
) -> HashSet<InstanceId> {
    match returning {
        Returning::All => gone.iter().map(|g| g.id).collect(),
        Returning::None => HashSet::new(),
        Returning::Only(names) => {
            let mut wished = HashSet::new();
            for name in names {
                match named(name, gone).as_slice() {
                    [] => notes.push(format!("'{name}' is none of those that left it")),
                    [guest] => {
                        wished.insert(guest.id);
                    }
                    several => notes.push(format!(
                        "'{name}' may be any of {} that left it: give a longer part of the id",
                        several.len()
                    )),
                }
            }
            wished
        }
    }
}

/// Guests with this id, this name, or an id that begins so.
fn named<'a>(name: &str, gone: &[&'a GuestView]) -> Vec<&'a GuestView> {
    let id = name.to_lowercase();
    let is = |g: &&&GuestView| g.name == name || g.id.to_string() == id;
    let exactly: Vec<_> = gone.iter().filter(is).copied().collect();
    if !exactly.is_empty() || id.len() < SHORTEST_PREFIX {
        return exactly;
    }
    let begins = |g: &&&GuestView| g.id.to_string().starts_with(&id);
    gone.iter().filter(begins).copied().collect()
}

#[cfg(test)]
#[path = "restore_tests.rs"]
mod tests;

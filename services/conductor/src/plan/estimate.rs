//! How long moves will take, as far as that can be told beforehand.

use std::{cmp::Reverse, collections::BinaryHeap};

use drover_model::operation::{MoveWay, PlannedMove, Verdict};

use super::{Costs, GuestView};

/// Guests under way at once where nobody said.
pub const PARALLEL: u32 = 4;

/// A guest that writes its memory is thought to be sent so many times at the
/// most: beyond that it is slowed, or given up.
const MOST_ROUNDS: u64 = 3;

/// How long a move takes once begun, and how long the guest stands still or is
/// off by it, ms.
pub fn times(guest: &GuestView, way: MoveWay, costs: Costs) -> (u64, u64) {
    let link = costs.link_mib_s.max(1);
    let sent_ms = |mib: u64| mib.saturating_mul(1000) / link;
    let copied_ms = sent_ms(guest.disk_bytes >> 20);
    match way {
        MoveWay::Live => {
            let once_ms = sent_ms(guest.memory_mib);
            let dirty = guest.dirty_rate_mib_s.unwrap_or(0);
            let again_ms = once_ms.saturating_mul(dirty) / link;
            let memory_ms = once_ms.saturating_add(again_ms.min(once_ms * (MOST_ROUNDS - 1)));
            (costs.overhead_ms + memory_ms, costs.switch_over_ms)
        }
        MoveWay::Cold if guest.runs => {
            let off_ms = costs.restart_ms + copied_ms;
            (costs.overhead_ms + off_ms, off_ms)
        }
        MoveWay::Cold => (costs.overhead_ms + copied_ms, 0),
        MoveWay::Evacuate => {
            let off_ms = costs.overhead_ms + costs.restart_ms;
            (off_ms, off_ms)
        }
    }
}

/// How long all of it takes if so many are under way at once and the next begins
/// whenever one is done, ms.
pub fn whole(moves: &[PlannedMove], parallel: u32) -> u64 {
    let lanes = usize::try_from(parallel.max(1)).unwrap_or(usize::MAX);
    let mut ends: BinaryHeap<Reverse<u64>> = BinaryHeap::new();
    let mut last = 0;
    for planned in moves {
        let Verdict::Moves { expected_ms, .. } = planned.verdict else {
            continue;
        };
        let begins = match ends.len() < lanes {
            true => 0,
            false => ends.pop().map_or(0, |Reverse(end)| end),
        };
        let end = begins.saturating_add(expected_ms);
        ends.push(Reverse(end));
        last = last.max(end);
    }
    last
}

//! Makes a plan that fails smaller, as long as it still fails.

use super::plan::Plan;

/// Takes away what is not needed for it to fail: events by halves, then by quarters,
/// down to one by one.
pub(super) fn shrink(plan: &Plan, fails: &mut dyn FnMut(&Plan) -> bool) -> Plan {
    let mut least = plan.clone();
    let mut piece = least.events.len().div_ceil(2);
    while piece > 0 {
        let before = least.events.len();
        let mut at = 0;
        while at < least.events.len() {
            let mut less = least.clone();
            less.events.drain(at..(at + piece).min(less.events.len()));
            if fails(&less) {
                least = less;
            } else {
                at += piece;
            }
        }
        // What could go may have kept something else from going.
        if piece > 1 || least.events.len() == before {
            piece /= 2;
        }
    }
    for conductors in 1..least.conductors {
        let less = Plan {
            conductors,
            ..least.clone()
        };
        if less.names_only_what_it_has() && fails(&less) {
            return less;
        }
    }
    least
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::swarm::plan::{Event, Planned};

    #[test]
    fn what_is_needed_is_left() {
        let mut plan = Plan::draw(3);
        let stops = |guest| Planned {
            at_ms: 1,
            event: Event::GuestStops { guest },
        };
        plan.events.truncate(5);
        plan.events.insert(1, stops(77));
        plan.events.push(stops(78));
        let mut needs_both = |p: &Plan| {
            let has = |guest| p.events.contains(&stops(guest));
            has(77) && has(78)
        };
        let least = shrink(&plan, &mut needs_both);
        assert_eq!(least.events, [stops(77), stops(78)]);
    }
}

//! A balance: few guests, cheap ones, no target too full, never worse.

use drover_model::{
    check::{CheckCode, Side},
    ids::InstanceId,
};
use proptest::prelude::*;

use super::{super::samples::*, *};
use crate::plan::{Examination, Load};

const GOAL: Goal = Goal {
    threshold_percent: 10,
    cool_down_ms: 100_000,
    target_limit_percent: 80,
    max_moves: 10,
};

fn balanced(world: &World, goal: &Goal, examinations: &Examinations) -> OperationPlan {
    let plan = plan(world, goal, examinations, Costs::default());
    check(world, &plan, examinations);
    plan
}

fn names(plan: &OperationPlan) -> Vec<&str> {
    plan.moves.iter().map(|m| m.name.as_str()).collect()
}

/// Two nodes of four CPUs; the first's guests use these.
fn skewed(cpus: &[f64]) -> World {
    let mut guests = Vec::new();
    for (n, cpus) in cpus.iter().enumerate() {
        let mut guest = guest(n + 1, "n0");
        guest.load = Some(Load {
            cpus: *cpus,
            memory_mib: 10,
        });
        guests.push(guest);
    }
    world(vec![node("n0"), node("n1")], guests)
}

#[test]
fn one_guest_that_is_enough_is_better_than_several() {
    let plan = balanced(&skewed(&[0.4, 0.4, 1.6, 0.4]), &GOAL, &Examinations::new());
    assert_eq!(names(&plan), ["vm3"]);
    assert_eq!(plan.spread_percent, Some((35.0, 5.0)));
    assert_eq!(plan.moves[0].spread_after_percent, Some(5.0));
}

#[test]
fn of_guests_that_help_alike_the_cheapest_goes() {
    let mut world = skewed(&[1.0, 1.0, 1.0]);
    world.guests[0].dirty_rate_mib_s = Some(900);
    world.guests[1].memory_mib = 256;
    assert_eq!(
        names(&balanced(&world, &GOAL, &Examinations::new())),
        ["vm2"]
    );
}

#[test]
fn what_must_not_move_is_left_and_counted() {
    let mut world = skewed(&[1.0; 5]);
    world.guests[0].busy = Some("migration 3".into());
    world.guests[1].moved_at_ms = Some(world.now_ms - 99_999);
    world.guests[2].load = None;
    let held = Examination {
        source: [(
            MoveWay::Live,
            vec![failure(CheckCode::HostDevice, Side::Instance)],
        )]
        .into(),
        ..Examination::default()
    };
    let mut examinations = unfit(5, &["n1"]);
    examinations.insert(id(4), held);
    let plan = balanced(&world, &GOAL, &examinations);
    assert!(plan.moves.is_empty());
    assert_eq!(
        plan.notes[0],
        "no guest of n0 is left that would help: 1 are busy, 1 cannot move live, \
         1 fit on no less loaded node, 1 moved a short while ago, \
         1 were not watched for long enough"
    );
    world.guests[1].moved_at_ms = Some(world.now_ms - 100_000);
    assert_eq!(names(&balanced(&world, &GOAL, &examinations)), ["vm2"]);
}

#[test]
fn a_small_spread_is_left_alone_and_a_run_has_an_end() {
    assert!(
        balanced(&skewed(&[0.4]), &GOAL, &Examinations::new())
            .moves
            .is_empty()
    );
    let one = Goal {
        max_moves: 1,
        threshold_percent: 1,
        ..GOAL
    };
    let plan = balanced(&skewed(&[0.4; 8]), &one, &Examinations::new());
    assert_eq!(
        (plan.moves.len(), plan.notes[0].as_str()),
        (1, "1 moves are the most of one run")
    );
}

/// CPU and memory load of a node, percent.
fn loads(world: &World, host: &HostName) -> (f64, f64) {
    let node = world.nodes.iter().find(|n| n.host == *host).unwrap();
    let mut used = Used::default();
    for guest in world.guests.iter().filter(|g| g.host == *host) {
        used.add(Used::by(guest));
    }
    (
        percent(used.cpu_load(node)),
        percent(used.memory_load(node)),
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn it_never_makes_anything_worse(
        (world, examinations) in any_world(), threshold in 0..30u32, limit in 30..120u32,
    ) {
        let goal = Goal { threshold_percent: threshold, target_limit_percent: limit, ..GOAL };
        let plan = balanced(&world, &goal, &examinations);
        let (before, after) = plan.spread_percent.unwrap();
        prop_assert!(after <= before);
        let last = plan.moves.last().and_then(|m| m.spread_after_percent);
        prop_assert_eq!(last.unwrap_or(before), after);
        let done = applied(&world, &plan);
        let again = super::plan(&done, &goal, &examinations, Costs::default());
        prop_assert_eq!(again.spread_percent.unwrap().0, after, "what was promised");
        for planned in &plan.moves {
            let guest: InstanceId = planned.instance;
            let guest = world.guests.iter().find(|g| g.id == guest).unwrap();
            prop_assert!(guest.runs && guest.busy.is_none() && guest.load.is_some());
            let rested = |at: u64| world.now_ms - at >= goal.cool_down_ms;
            prop_assert!(guest.moved_at_ms.is_none_or(rested));
            let Verdict::Moves { to, .. } = &planned.verdict else {
                panic!("a balance plans only moves");
            };
            let (cpu, memory) = loads(&done, to);
            prop_assert!(cpu <= f64::from(limit) && memory <= f64::from(limit));
        }
        let turned = super::plan(&turned(&world), &goal, &examinations, Costs::default());
        prop_assert_eq!(plan, turned);
    }
}

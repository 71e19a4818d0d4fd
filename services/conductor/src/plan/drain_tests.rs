//! A drain: who moves, how, where to, in which order, and who stays and why.

use drover_model::{
    check::{CheckCode, Side},
    operation::{MoveMode, MoveWay, Verdict},
};
use proptest::prelude::*;

use super::{super::samples::*, *};
use crate::plan::Examination;

fn drain(mode: MoveMode) -> DrainOptions {
    DrainOptions {
        mode,
        ..DrainOptions::new(host("n0"))
    }
}

fn planned(world: &World, mode: MoveMode, examinations: &Examinations) -> OperationPlan {
    let plan = plan(world, &drain(mode), examinations, Costs::default());
    check(world, &plan, examinations);
    plan
}

/// Name, way and target of those that move; reasons and weight of those that stay.
fn told(plan: &OperationPlan) -> Vec<String> {
    let one = |m: &drover_model::operation::PlannedMove| match &m.verdict {
        Verdict::Moves { way, to, .. } => format!("{} {} {to}", m.name, way.as_str()),
        Verdict::Stays { reasons, blocks } => {
            let codes: Vec<_> = reasons.iter().map(|r| r.code.as_str()).collect();
            format!("{} stays {} {blocks}", m.name, codes.join(","))
        }
    };
    plan.moves.iter().map(one).collect()
}

/// vm1 plain, vm2 important, vm3 large, vm4 off, vm5 busy, vm6 held by a device.
fn cluster() -> (World, Examinations) {
    let mut guests: Vec<_> = (1..=6).map(|n| guest(n, "n0")).collect();
    guests[1].priority = 1;
    guests[2].memory_mib = 1024;
    guests[3].runs = false;
    guests[4].busy = Some("migration 7".into());
    let held = Examination {
        source: [(
            MoveWay::Live,
            vec![failure(CheckCode::HostDevice, Side::Instance)],
        )]
        .into(),
        ..Examination::default()
    };
    let world = world(vec![node("n0"), node("n1"), node("n2")], guests);
    (world, [(id(6), held)].into())
}

#[test]
fn live_leaves_what_cannot_move_live() {
    let (world, examinations) = cluster();
    let expected = [
        "vm2 live n1",
        "vm3 live n2",
        "vm1 live n1",
        "vm4 stays instance_state false",
        "vm5 stays instance_busy true",
        "vm6 stays host_device true",
    ];
    assert_eq!(
        told(&planned(&world, MoveMode::Live, &examinations)),
        expected
    );
}

#[test]
fn mixed_moves_cold_what_cannot_move_live() {
    let (world, examinations) = cluster();
    let plan = planned(&world, MoveMode::Mixed, &examinations);
    let expected = [
        "vm2 live n1",
        "vm3 live n2",
        "vm1 live n1",
        "vm4 cold n2",
        "vm5 stays instance_busy true",
        "vm6 cold n2",
    ];
    assert_eq!(told(&plan), expected);
    let Verdict::Moves { why, .. } = &plan.moves[5].verdict else {
        panic!("it moves");
    };
    assert!(
        why.contains("cold because not live: no: host_device"),
        "{why}"
    );
}

#[test]
fn cold_moves_everything_cold() {
    let (world, examinations) = cluster();
    let plan = planned(&world, MoveMode::Cold, &examinations);
    assert!(plan.moving().all(|m| matches!(
        m.verdict,
        Verdict::Moves {
            way: MoveWay::Cold,
            ..
        }
    )));
    assert_eq!(plan.moving().count(), 5);
}

#[test]
fn a_full_cluster_says_what_each_node_lacks() {
    let (mut world, _) = cluster();
    for node in &mut world.nodes {
        node.usage.usable.memory_mib = 600;
    }
    let lines = told(&planned(&world, MoveMode::Mixed, &Examinations::new()));
    assert_eq!(lines[1], "vm3 stays no_valid_host,memory,memory true");
}

#[test]
fn times_follow_from_size_and_dirty_rate() {
    let mut world = world(
        vec![node("n0"), node("n1")],
        vec![guest(1, "n0"), guest(2, "n0")],
    );
    world.guests[1].dirty_rate_mib_s = Some(500);
    let costs = Costs {
        link_mib_s: 1000,
        overhead_ms: 100,
        restart_ms: 2000,
        switch_over_ms: 30,
    };
    let times = |mode, parallel| {
        let options = DrainOptions {
            max_parallel: Some(parallel),
            ..drain(mode)
        };
        let plan = plan(&world, &options, &Examinations::new(), costs);
        let each = plan.moves.iter().map(|m| match m.verdict {
            Verdict::Moves {
                expected_ms,
                expected_downtime_ms,
                ..
            } => (expected_ms, expected_downtime_ms),
            Verdict::Stays { .. } => panic!("it moves"),
        });
        (each.collect::<Vec<_>>(), plan.expected_ms)
    };
    assert_eq!(times(MoveMode::Live, 2), (vec![(612, 30), (868, 30)], 868));
    assert_eq!(times(MoveMode::Live, 1).1, 612 + 868);
    assert_eq!(times(MoveMode::Cold, 2).0, [(3124, 3024), (3124, 3024)]);
}

fn any_mode() -> impl Strategy<Value = MoveMode> {
    prop_oneof![
        Just(MoveMode::Live),
        Just(MoveMode::Cold),
        Just(MoveMode::Mixed)
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn nothing_is_placed_wrongly_and_what_is_promised_comes_true(
        (world, examinations) in any_world(), mode in any_mode(), only in prop::bool::ANY,
    ) {
        let mut options = drain(mode);
        if only {
            options.to = vec![host("n1"), host("n2")];
        }
        let plan = super::plan(&world, &options, &examinations, Costs::default());
        check(&world, &plan, &examinations);
        let here = world.guests.iter().filter(|g| g.host == options.host).count();
        prop_assert_eq!(plan.moves.len(), here);
        for planned in &plan.moves {
            match &planned.verdict {
                Verdict::Moves { to, .. } => prop_assert!(!only || options.to.contains(to)),
                Verdict::Stays { reasons, .. } => prop_assert!(!reasons.is_empty()),
            }
        }
        prop_assert_eq!(&plan, &super::plan(&turned(&world), &options, &examinations, Costs::default()));
    }
}

#[test]
fn a_node_that_refuses_it_live_may_take_it_cold() {
    let world = world(vec![node("n0"), node("n1")], vec![guest(1, "n0")]);
    let no = vec![failure(CheckCode::DiskCache, Side::Instance)];
    let mut examination = Examination::default();
    examination.refuse(MoveWay::Live, host("n1"), no);
    let examinations = Examinations::from([(id(1), examination)]);
    let verdict = |mode| {
        planned(&world, mode, &examinations).moves[0]
            .verdict
            .clone()
    };
    let stays = verdict(MoveMode::Live);
    let Verdict::Stays { reasons, .. } = &stays else {
        panic!("{stays:?}")
    };
    assert!(reasons.iter().any(|r| r.code == CheckCode::DiskCache));
    let moves = verdict(MoveMode::Mixed);
    assert!(
        matches!(&moves, Verdict::Moves { way: MoveWay::Cold, to, .. } if *to == host("n1")),
        "{moves:?}"
    );
}

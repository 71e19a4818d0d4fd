//! An evacuation: what ran starts elsewhere, and nothing else.

use drover_model::{
    check::{CheckCode, Side},
    ids::HostName,
};
use proptest::prelude::*;

use super::{super::samples::*, *};
use crate::plan::Examination;

fn options(only: Vec<InstanceId>, to: Vec<HostName>) -> EvacuateOptions {
    EvacuateOptions {
        to,
        only,
        ..EvacuateOptions::new(host("n0"))
    }
}

#[test]
fn what_ran_starts_elsewhere() {
    let mut guests: Vec<_> = (1..=4).map(|n| guest(n, "n0")).collect();
    guests[0].runs = false;
    guests[2].priority = 5;
    let no = failure(CheckCode::DiskNotShared, Side::Source);
    let local = Examination {
        source: [(MoveWay::Evacuate, vec![no.clone()])].into(),
        ..Examination::default()
    };
    let examinations = Examinations::from([(id(4), local)]);
    let world = world(vec![node("n0"), node("n1")], guests);
    let plan = plan(
        &world,
        &options(vec![], vec![]),
        &examinations,
        Costs::default(),
    );
    check(&world, &plan, &examinations);
    let verdicts: Vec<_> = plan
        .moves
        .iter()
        .map(|m| (m.name.as_str(), &m.verdict))
        .collect();
    let [(a, first), (b, off), (c, second), (d, held)] = verdicts.as_slice() else {
        panic!("four verdicts");
    };
    assert_eq!([*a, *b, *c, *d], ["vm3", "vm1", "vm2", "vm4"]);
    for verdict in [first, second] {
        assert!(matches!(
            verdict,
            Verdict::Moves {
                way: MoveWay::Evacuate,
                ..
            }
        ));
    }
    assert!(matches!(off, Verdict::Stays { blocks: false, .. }));
    let expected = Verdict::Stays {
        reasons: vec![no],
        blocks: true,
    };
    assert_eq!(**held, expected);
}

#[test]
fn only_those_asked_for_and_those_not_there_are_named() {
    let world = world(
        vec![node("n0"), node("n1")],
        vec![guest(1, "n0"), guest(2, "n0"), guest(3, "n1")],
    );
    let options = options(vec![id(2), id(3)], vec![]);
    let plan = plan(&world, &options, &Examinations::new(), Costs::default());
    let names: Vec<_> = plan.moves.iter().map(|m| m.name.as_str()).collect();
    assert_eq!(names, ["vm2"]);
    assert_eq!(plan.notes, [format!("{} is not on n0", id(3))]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn nothing_is_placed_wrongly((world, examinations) in any_world()) {
        let options = options(vec![], vec![]);
        let plan = super::plan(&world, &options, &examinations, Costs::default());
        check(&world, &plan, &examinations);
        let again = super::plan(&turned(&world), &options, &examinations, Costs::default());
        prop_assert_eq!(plan, again);
    }
}

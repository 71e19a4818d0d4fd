//! A restore: what comes back, and what is said of the rest.

use drover_model::{
    check::{CheckCode, Side},
    operation::{MoveMode, Verdict},
};
use proptest::prelude::*;

use super::{super::samples::*, *};

fn options(returning: Returning) -> RestoreOptions {
    RestoreOptions {
        host: host("n0"),
        returning,
        mode: MoveMode::Live,
        max_parallel: None,
        unknown: Default::default(),
    }
}

/// vm1 to vm4 left n0; vm3 is back by now, and vm9 was deleted.
fn cluster() -> (World, Vec<InstanceId>) {
    let guests = vec![
        guest(1, "n1"),
        guest(2, "n1"),
        guest(3, "n0"),
        guest(4, "n2"),
    ];
    let mut world = world(vec![node("n0"), node("n1"), node("n2")], guests);
    world.nodes[0].closed = vec![failure(CheckCode::HostDisabled, Side::Destination)];
    (world, [4, 3, 9, 2, 1].map(id).to_vec())
}

fn planned(returning: Returning) -> (Vec<String>, Vec<String>) {
    let (world, left) = cluster();
    let options = options(returning);
    let plan = plan(
        &world,
        &options,
        &left,
        &Examinations::new(),
        Costs::default(),
    );
    let to_n0 = |m: &drover_model::operation::PlannedMove| match &m.verdict {
        Verdict::Moves { to, .. } => *to == options.host,
        Verdict::Stays { .. } => false,
    };
    assert!(plan.moves.iter().all(to_n0), "{plan:?}");
    let names = plan.moves.iter().map(|m| m.name.clone());
    (names.collect(), plan.notes)
}

#[test]
fn all_that_left_come_back_to_a_node_that_is_still_switched_off() {
    let (names, notes) = planned(Returning::All);
    assert_eq!(names, ["vm4", "vm2", "vm1"]);
    assert_eq!(notes, [format!("{} left it and is known no more", id(9))]);
}

#[test]
fn none_comes_back_if_none_is_wished() {
    assert!(planned(Returning::None).0.is_empty());
}

#[test]
fn only_those_named_come_back() {
    let whole_id = id(2).to_string();
    let (names, notes) = planned(Returning::Only(vec!["vm1".into(), whole_id, "vm7".into()]));
    assert_eq!(names, ["vm2", "vm1"]);
    assert_eq!(notes[1], "'vm7' is none of those that left it");
}

#[test]
fn a_beginning_that_fits_several_names_none() {
    let (names, notes) = planned(Returning::Only(vec!["0000".into(), "000".into()]));
    assert!(names.is_empty());
    assert!(notes[1].contains("any of 4"), "{notes:?}");
    assert!(notes[2].contains("none of those"), "{notes:?}");
}

#[test]
fn a_node_that_is_down_gets_nothing_back() {
    let (mut world, left) = cluster();
    world.nodes[0].closed = vec![failure(CheckCode::HostDown, Side::Destination)];
    let plan = plan(
        &world,
        &options(Returning::All),
        &left,
        &Examinations::new(),
        Costs::default(),
    );
    assert_eq!((plan.moves.len(), plan.moving().count()), (3, 0));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn nothing_is_placed_wrongly((world, examinations) in any_world()) {
        let left: Vec<_> = world.guests.iter().rev().map(|g| g.id).collect();
        let options = options(Returning::All);
        let plan = super::plan(&world, &options, &left, &examinations, Costs::default());
        check(&world, &plan, &examinations);
        let again = super::plan(&turned(&world), &options, &left, &examinations, Costs::default());
        prop_assert_eq!(plan, again);
    }
}

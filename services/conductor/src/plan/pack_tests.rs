//! Each reason against a node is seen alone; the best of the others is taken.

use super::{super::samples::*, *};

fn wanted(guest: &GuestView) -> Wanted<'_> {
    Wanted {
        guest,
        way: MoveWay::Live,
        to: &[],
        examination: None,
        except: &[],
    }
}

fn codes(failures: &[CheckFailure]) -> Vec<CheckCode> {
    failures.iter().map(|f| f.code).collect()
}

#[test]
fn most_memory_then_most_vcpus_then_the_name_decides() {
    let mut world = world(
        vec![node("n3"), node("n2"), node("n1"), node("n0")],
        vec![guest(1, "n0"), guest(2, "n1")],
    );
    world.nodes[0].usage.used.vcpus = 1;
    let mut ledger = Ledger::new(&world);
    let mut chosen = Vec::new();
    for _ in 0..4 {
        let place = ledger.choose(&wanted(&world.guests[0])).unwrap();
        chosen.push((place.host.to_string(), place.memory_left_mib));
        ledger.take(&world.guests[0], &place.host);
    }
    let expected = [("n2", 3584), ("n3", 3584), ("n1", 3072), ("n2", 3072)];
    assert_eq!(chosen, expected.map(|(n, left)| (n.to_owned(), left)));
}

#[test]
fn every_reason_against_a_node_is_told() {
    let mut world = world(
        vec![node("n0"), node("n1")],
        vec![guest(1, "n0"), guest(2, "n1")],
    );
    for guest in &mut world.guests {
        guest.anti_affinity = vec!["web".into()];
    }
    world.nodes[1].closed = vec![failure(CheckCode::HostDisabled, Side::Destination)];
    world.nodes[1].usage.used = world.nodes[1].usage.usable;
    let unfit = unfit(1, &["n1"]);
    let to = [host("n1"), host("n9")];
    let wanted = Wanted {
        examination: unfit.get(&id(1)),
        to: &to,
        ..wanted(&world.guests[0])
    };
    let failures = Ledger::new(&world).choose(&wanted).unwrap_err();
    let expected = [
        CheckCode::NoValidHost,
        CheckCode::HostDisabled,
        CheckCode::Vcpus,
        CheckCode::Memory,
        CheckCode::AntiAffinity,
        CheckCode::Cpu,
        CheckCode::UnknownHost,
    ];
    assert_eq!(codes(&failures), expected);
}

#[test]
fn any_one_reason_is_enough() {
    let base = world(
        vec![node("n0"), node("n1")],
        vec![guest(1, "n0"), guest(2, "n1")],
    );
    let fits = |world: &World, examinations: &super::super::Examinations| {
        let examination = examinations.get(&id(1));
        let wanted = Wanted {
            examination,
            ..wanted(&world.guests[0])
        };
        Ledger::new(world).choose(&wanted).is_ok()
    };
    let none = super::super::Examinations::new();
    assert!(fits(&base, &none));
    assert!(!fits(&base, &unfit(1, &["n1"])));
    let spoil: [fn(&mut World); 4] = [
        |w| w.nodes[1].closed = vec![failure(CheckCode::HostDown, Side::Destination)],
        |w| w.nodes[1].usage.used.memory_mib = 4096 - 511,
        |w| w.nodes[1].usage.used.vcpus = 16,
        |w| {
            w.guests
                .iter_mut()
                .for_each(|g| g.anti_affinity = vec!["a".into()])
        },
    ];
    for (i, spoil) in spoil.iter().enumerate() {
        let mut world = base.clone();
        spoil(&mut world);
        assert!(!fits(&world, &none), "case {i}");
    }
}

#[test]
fn a_guest_that_is_off_needs_no_room() {
    let mut world = world(vec![node("n0"), node("n1")], vec![guest(1, "n0")]);
    world.guests[0].runs = false;
    world.nodes[1].usage.used = world.nodes[1].usage.usable;
    let place = Ledger::new(&world).choose(&wanted(&world.guests[0]));
    assert_eq!(place.map(|p| p.host), Ok(host("n1")));
}

#[test]
fn a_large_cluster_does_not_list_all_its_nodes() {
    let mut nodes: Vec<NodeView> = (0..100).map(|n| node(&format!("n{n}"))).collect();
    for node in &mut nodes {
        node.usage.usable.memory_mib = 100;
    }
    let world = world(nodes, vec![guest(1, "n0")]);
    let failures = Ledger::new(&world)
        .choose(&wanted(&world.guests[0]))
        .unwrap_err();
    assert_eq!(failures.len(), 1 + MOST_TOLD);
    assert!(
        failures[0].message.ends_with(" and 91 more"),
        "{}",
        failures[0].message
    );
}

//! What an evacuation is judged by: each check has a case that makes it fail,
//! and it alone.

use drover_model::{
    api::compute::{EvacuationFacts, KeptDefinition, StorageIdentity},
    evidence::Life,
    migration::ProofOfDeath,
    operation::FenceAnswer,
};
use drover_store::{definitions::DefinitionRow, nodes::ReportPlace};

use super::{
    evacuation::{alone, definition, destination, evacuated_node, has_power, last_digest},
    tests::{codes, destination_facts, disk_fact, guest, host, instance},
    *,
};
use crate::tests_support::node_row;

fn kept() -> KeptDefinition {
    KeptDefinition {
        instance: guest().id,
        digest: "d".into(),
        domain: "<domain/>".into(),
        has_secrets: false,
        guest: guest(),
        identities: vec![StorageIdentity {
            path: "/images/vm1.qcow2".into(),
            identity: Some("x 1".into()),
            error: None,
        }],
        contents: vec![],
    }
}

fn facts() -> EvacuationFacts {
    EvacuationFacts {
        destination: DestinationFacts {
            disks: vec![DiskFact {
                shared: true,
                exists: true,
                ..disk_fact()
            }],
            ..destination_facts()
        },
        foreign_files: vec![],
    }
}

fn at_destination(
    change: impl FnOnce(&mut KeptDefinition, &mut EvacuationFacts),
) -> Vec<CheckCode> {
    let (mut kept, mut facts) = (kept(), facts());
    change(&mut kept, &mut facts);
    codes(&destination(&kept, &facts, &host("kvm2")))
}

#[test]
fn a_new_home_needs_all_that_the_guest_needs() {
    use CheckCode as C;
    assert_eq!(at_destination(|_, _| {}), []);
    type Change = fn(&mut KeptDefinition, &mut EvacuationFacts);
    let table: [(C, Change); 7] = [
        (C::DiskNotShared, |_, f| {
            f.destination.disks[0].shared = false
        }),
        (C::DiskNotShared, |_, f| f.destination.disks.clear()),
        (C::DiskNotShared, |k, f| {
            k.guest.disks[0].shareable = true;
            f.destination.disks[0].shared = false;
        }),
        (C::DiskNotShared, |_, f| {
            f.foreign_files = vec!["/nvram/vm1 is another file".into()];
        }),
        (C::Network, |_, f| f.destination.networks[0].present = false),
        (C::UuidTaken, |_, f| {
            f.destination.same_uuid = Presence::Present(PowerState::Shutdown);
        }),
        (C::MachineType, |_, f| {
            f.destination.machine_supported = false
        }),
    ];
    for (code, change) in table {
        assert_eq!(at_destination(change), [code]);
    }
    let copied = at_destination(|k, f| {
        k.guest.disks[0].read_only = true;
        f.destination.disks[0].shared = false;
    });
    assert_eq!(copied, [], "what is only read is judged by its content");
}

#[test]
fn a_guest_starts_from_what_its_own_node_told() {
    use CheckCode as C;
    let kvm1 = host("kvm1");
    let row = |change: fn(&mut DefinitionRow)| {
        let mut row = DefinitionRow {
            host: host("kvm1"),
            taken_at_ms: 1,
            kept: kept(),
            after: None,
        };
        change(&mut row);
        codes(&definition(&kvm1, Some(&row), Some("d")))
    };
    assert_eq!(row(|_| {}), []);
    assert_eq!(codes(&definition(&kvm1, None, None)), [C::NoDefinition]);
    assert_eq!(row(|r| r.host = host("kvm2")), [C::NoDefinition]);
    assert_eq!(row(|r| r.kept.digest = "older".into()), [C::NoDefinition]);
    assert_eq!(row(|r| r.kept.digest.clear()), [], "nobody can tell");
    assert_eq!(row(|r| r.kept.has_secrets = true), [C::DefinitionSecret]);
    let of_host = row(|r| {
        r.kept.guest.immovable = vec![Immovable {
            kind: ImmovableKind::HostDevice,
            what: "PCI device 0000:01:00.0".into(),
        }];
    });
    assert_eq!(of_host, [C::HostDevice]);
    let strange = row(|r| {
        r.kept.guest.disks[0].source = DiskSource::Other { kind: "dir".into() };
    });
    assert_eq!(strange, [C::DiskNotCopyable]);
}

#[test]
fn a_disk_that_nobody_shares_is_named() {
    let kvm1 = host("kvm1");
    let apart = |change: fn(&mut EvacuationFacts)| {
        let mut facts = facts();
        change(&mut facts);
        facts
    };
    let here = apart(|_| {});
    let there = apart(|f| f.destination.disks[0].shared = false);
    assert_eq!(
        alone(&kept(), &[], &kvm1),
        [],
        "nobody answered: nobody knows"
    );
    assert_eq!(alone(&kept(), &[there.clone(), here], &kvm1), []);
    let failures = alone(&kept(), &[there.clone(), there], &kvm1);
    assert_eq!(codes(&failures), [CheckCode::DiskNotShared]);
    let expected = "its disk vda (/images/vm1.qcow2) is on kvm1 alone: not rebuilt";
    assert_eq!(failures[0].message, expected);
}

#[test]
fn a_node_that_was_heard_of_since_is_back() {
    let live = Liveness {
        down_after_ms: 30_000,
        now_ms: 100_000,
    };
    let kvm1 = host("kvm1");
    let proof = ProofOfDeath::Fence {
        agent: "fence".into(),
        at_ms: 60_000,
        life: None,
    };
    let code = |row: Option<&NodeRow>| {
        let failure = evacuated_node(&kvm1, row, &proof, live);
        failure.map(|f| f.code)
    };
    assert_eq!(code(Some(&node_row("kvm1", 50_000))), None);
    let alive = Some(CheckCode::HostAlive);
    assert_eq!(code(Some(&node_row("kvm1", 61_000))), alive, "silent again");
    assert_eq!(code(Some(&node_row("kvm1", 99_000))), alive);
    let mut declared = node_row("kvm1", 59_000);
    declared.forced_down = true;
    assert_eq!(code(Some(&declared)), None);
    declared.heard_at_ms = 99_000;
    assert_eq!(code(Some(&declared)), alive, "whatever was declared before");
    assert_eq!(code(None), Some(CheckCode::UnknownHost));
}

#[test]
fn whether_it_was_heard_of_since_is_no_matter_of_clocks() {
    let live = Liveness {
        down_after_ms: 30_000,
        now_ms: 100_000,
    };
    let life = |incarnation, beat| Life { incarnation, beat };
    // The clock was ten hours ahead when it was proven off, or ten hours behind.
    for at_ms in [36_060_000, 1] {
        let proof = ProofOfDeath::Fence {
            agent: "fence".into(),
            at_ms,
            life: Some(life(3, 500)),
        };
        let is_back = |life| {
            let mut row = node_row("kvm1", 50_000);
            row.agent.life = Some(life);
            evacuated_node(&host("kvm1"), Some(&row), &proof, live).is_some()
        };
        assert!(!is_back(life(3, 500)));
        assert!(is_back(life(3, 501)), "a heartbeat");
        assert!(is_back(life(4, 0)), "it registered anew");
    }
}

#[test]
fn a_node_that_has_power_again_is_noticed() {
    let kvm1 = "kvm1".parse().unwrap();
    let agent = || "fence".to_owned();
    let on = has_power(&kvm1, &FenceAnswer::On { agent: agent() });
    assert_eq!(on.map(|f| f.code), Some(CheckCode::HostAlive));
    let off = FenceAnswer::Off {
        agent: agent(),
        at_ms: 1,
    };
    let silent = FenceAnswer::Failed {
        agent: agent(),
        message: String::new(),
    };
    for says_nothing in [off, silent, FenceAnswer::NotConfigured] {
        assert_eq!(has_power(&kvm1, &says_nothing), None);
    }
}

#[test]
fn what_was_told_after_the_last_report_is_not_old() {
    let mut node = node_row("kvm1", 1);
    let kept = |after| DefinitionRow {
        host: host("kvm1"),
        taken_at_ms: 1,
        kept: kept(),
        after,
    };
    let (unknown, after_this) = (kept(None), kept(Some(ReportPlace::from(&node.report))));
    let row = instance();
    assert_eq!(last_digest(&node, &row, Some(&unknown)), None);
    assert_eq!(last_digest(&node, &row, Some(&after_this)), Some("d"));
    node.report.sequence += 1;
    assert_eq!(last_digest(&node, &row, Some(&after_this)), None);
}

//! The record's promises, each kept in both databases.

#![allow(clippy::unwrap_used)] // all of it is test

use std::path::PathBuf;

use crate::common::{
    HELD, host, in_memory, listed, lists_nothing, migration, passed, report, term,
};
use drover_model::{
    api::{
        compute::Outcome,
        conductor::{Heartbeat, Identity, ListMigrations, RegisterAgent, Registered},
    },
    evidence::Life,
    guest::PowerState,
    migration::{Migration, MigrationStatus},
    node::{HypervisorReport, InstanceReport, NodeReport},
    version::{RpcVersion, Spoken, VersionRange},
};
use drover_saga::{Event, JournalError};
use drover_store::{
    Store, StoreError,
    claims::Resources,
    instances::{FORGET_AFTER_REPORTS, InstanceRow},
    migrations::{Admitted, Lease},
    nodes::Reported,
    retention::Forgetting,
    sagas::SagaKey,
};

promises! {
    versions_are_said_by_one_incarnation,
    a_request_is_carried_out_once_and_an_instance_moves_once,
    what_is_final_stays,
    migrations_are_found_by_number_uuid_and_prefix,
    instances_are_adopted_found_and_forgotten_late,
    a_clock_that_jumps_makes_nothing_forgotten,
    a_guest_that_is_forgotten_is_told_of,
    what_a_node_that_was_installed_anew_does_not_list_stays,
    a_lost_guest_is_forgotten_when_somebody_says_so,
    silence_and_old_news_change_nothing,
    two_nodes_that_list_one_instance_are_told_of_and_nothing_flips,
    the_record_follows_the_copy_that_runs,
    a_guest_that_waits_to_be_confirmed_is_followed_too,
    two_copies_that_run_are_an_alarm_until_one_is_gone,
    a_report_that_was_under_way_when_a_move_settled_changes_nothing,
    of_a_guest_that_cannot_be_read_what_was_read_is_kept,
    an_agent_of_another_incarnation_is_refused_aloud,
    during_a_migration_reports_do_not_move_the_instance,
    claims_balance,
    rival_claims_never_exceed_the_node,
    a_journal_has_one_writer,
    leases_are_renewed_for_what_is_driven_and_no_other,
    put_off_tidying_is_done_by_one_and_ever_more_seldom,
    an_outcome_is_kept_for_whoever_drives,
}

const HOUR_MS: u64 = 3_600_000;

#[tokio::test]
async fn a_thousand_moves_hide_none() {
    in_memory(async |store: Store| {
        for n in 1..=1_001 {
            let m = migration(n, n);
            let admitted = store.admit(&m, None, None, term(1, 60_000)).await.unwrap();
            assert!(matches!(admitted, Admitted::New(_)));
        }
        assert_eq!(store.active_migrations().await.unwrap().len(), 1_001);
        let last = migration(1_001, 1_001).instance_uuid;
        assert!(store.active_migration(last).await.unwrap().is_some());
    })
    .await;
}

fn life(incarnation: u64, beat: u64) -> Life {
    Life { incarnation, beat }
}

fn lease(m: &Migration) -> Lease {
    Store::first_lease(m.uuid)
}

async fn admit(store: &Store, m: &Migration, unique_id: Option<&str>) -> Admitted {
    store
        .admit(m, None, unique_id, term(0, HELD))
        .await
        .unwrap()
}

async fn a_request_is_carried_out_once_and_an_instance_moves_once(store: Store) {
    let first = migration(1, 7);
    let Admitted::New(kept) = admit(&store, &first, Some("u1")).await else {
        panic!("new")
    };
    assert_eq!((kept.id, kept.version), (1, 1));
    let again = admit(&store, &migration(2, 7), Some("u1")).await;
    assert_eq!(
        again,
        Admitted::Repeated(kept.clone()),
        "the same request comes again"
    );
    let rival = admit(&store, &migration(3, 7), Some("u2")).await;
    assert_eq!(
        rival,
        Admitted::Busy(kept.clone()),
        "another request for the same instance"
    );
    assert!(matches!(admit(&store, &migration(4, 8), None).await, Admitted::New(m) if m.id == 2));
    let ended = |m: &mut Migration| {
        m.status = MigrationStatus::Failed;
        true
    };
    store.update_migration(kept.uuid, ended).await.unwrap();
    assert!(matches!(
        admit(&store, &migration(5, 7), None).await,
        Admitted::New(_)
    ));
}

async fn what_is_final_stays(store: Store) {
    let m = migration(1, 7);
    admit(&store, &m, None).await;
    let to = |status| {
        move |m: &mut Migration| {
            m.status = status;
            true
        }
    };
    store
        .update_migration(m.uuid, to(MigrationStatus::Cancelled))
        .await
        .unwrap();
    let revived = store
        .update_migration(m.uuid, to(MigrationStatus::Running))
        .await;
    assert!(
        matches!(revived, Err(StoreError::Illegal(_))),
        "{revived:?}"
    );
}

async fn migrations_are_found_by_number_uuid_and_prefix(store: Store) {
    for n in [1, 2] {
        admit(&store, &migration(n, n), None).await;
    }
    let uuid = migration(2, 2).uuid;
    for reference in ["2", &uuid.to_string(), &uuid.to_string()[..8]] {
        assert_eq!(
            store.find_migration(reference).await.unwrap().uuid,
            uuid,
            "{reference}"
        );
    }
    assert!(matches!(
        store.find_migration("0000").await,
        Err(StoreError::Ambiguous(_))
    ));
    for bad in ["9", "", "abc'--", "ffffffff", "%"] {
        assert!(
            matches!(
                store.find_migration(bad).await,
                Err(StoreError::NotFound(_))
            ),
            "{bad}"
        );
    }
    let all = store
        .migrations(&ListMigrations::default(), None)
        .await
        .unwrap();
    assert_eq!(
        all.iter().map(|m| m.id).collect::<Vec<_>>(),
        [2, 1],
        "newest first"
    );
}

async fn instances_are_adopted_found_and_forgotten_late(store: Store) {
    store
        .record_report(&report("kvm1", 1, vec![listed(1), listed(2)]), 1000)
        .await
        .unwrap();
    let row = store.find_instance("vm1").await.unwrap();
    assert_eq!((row.host.as_str(), row.missing_since_ms), ("kvm1", None));
    assert!(matches!(
        store.find_instance("0000").await,
        Err(StoreError::Ambiguous(_))
    ));
    assert!(matches!(
        store.find_instance("vm9").await,
        Err(StoreError::NotFound(_))
    ));
    // Its node no longer lists vm1: missing, not gone.
    store
        .record_report(&report("kvm1", 2, vec![listed(2)]), 2000)
        .await
        .unwrap();
    assert_eq!(
        store.find_instance("vm1").await.unwrap().missing_since_ms,
        Some(2000)
    );
    // Another node lists it: it moved.
    store
        .record_report(&report("kvm2", 1, vec![listed(1)]), 3000)
        .await
        .unwrap();
    let row = store.find_instance("vm1").await.unwrap();
    assert_eq!((row.host.as_str(), row.missing_since_ms), ("kvm2", None));
    // Missing for long: forgotten.
    lists_nothing(&store, "kvm2", 2, 4000).await;
    assert!(matches!(
        store.find_instance("vm1").await,
        Err(StoreError::NotFound(_))
    ));
}

async fn a_clock_that_jumps_makes_nothing_forgotten(store: Store) {
    says(&store, "kvm1", 1, ON).await;
    says(&store, "kvm1", 2, None).await;
    // Another conductor takes the next ones in: its clock is an hour ahead.
    let later = |sequence| report("kvm1", sequence, vec![]);
    for sequence in 3..=FORGET_AFTER_REPORTS + 1 {
        let sequence = sequence.into();
        store
            .record_report(&later(sequence), HOUR_MS)
            .await
            .unwrap();
        let row = store.find_instance("vm1").await.unwrap();
        assert_eq!(row.missing_since_ms, Some(2), "in report {sequence}");
    }
    // One that comes back is missing anew.
    says(&store, "kvm1", 20, ON).await;
    says(&store, "kvm1", 21, None).await;
    store.record_report(&later(22), HOUR_MS).await.unwrap();
    assert_eq!(store.find_instance("vm1").await.unwrap().missing_reports, 2);
    // Nor is it for many reports in no time.
    for sequence in 23..100 {
        store.record_report(&later(sequence), 99).await.unwrap();
    }
    assert!(store.find_instance("vm1").await.is_ok());
    store.record_report(&later(100), HOUR_MS).await.unwrap();
    assert!(store.find_instance("vm1").await.is_err());
}

async fn a_guest_that_is_forgotten_is_told_of(store: Store) {
    says(&store, "kvm1", 1, ON).await;
    let noticed = lists_nothing(&store, "kvm1", 2, 2).await;
    let [note] = noticed.as_slice() else {
        panic!("{noticed:?}");
    };
    let id = listed(1).id;
    assert!(
        note.contains("(vm1)") && note.contains(&id.to_string()),
        "{note}"
    );
    let told = store.unpublished(10, u64::MAX).await.unwrap();
    let told: Vec<_> = told.iter().map(|n| n.event_type.as_str()).collect();
    assert_eq!(told, ["instance.forgotten"]);
}

fn installed(state: &str) -> RegisterAgent {
    RegisterAgent {
        speaks: Spoken::Unsaid,
        host: host("kvm1"),
        identity: Identity {
            state: state.into(),
            machine: "m".into(),
            boot: "b".into(),
            process: format!("process of {state}"),
        },
        agent_version: "1".into(),
        held: None,
    }
}

fn of(incarnation: u64, sequence: u64, instances: Vec<InstanceReport>) -> NodeReport {
    NodeReport {
        incarnation,
        ..report("kvm1", sequence, instances)
    }
}

async fn what_a_node_that_was_installed_anew_does_not_list_stays(store: Store) {
    store.register_agent(&installed("old"), None).await.unwrap();
    let before = of(1, 1, vec![listed(1), listed(2), listed(3)]);
    store.record_report(&before, 1).await.unwrap();
    let dead = Some(life(1, 0));
    store.register_agent(&installed("new"), dead).await.unwrap();
    let mut noticed = Vec::new();
    for n in 1..=20 {
        // Of those that are there one is undefined later, as ever.
        let there = match n {
            1..=3 => vec![listed(2)],
            _ => vec![],
        };
        let kept = store.record_report(&of(2, n, there), n * 10_000).await;
        match kept.unwrap() {
            Reported::Kept { notes } => noticed.extend(notes),
            other => panic!("{other:?}"),
        }
    }
    for lost in ["vm1", "vm3"] {
        assert!(store.find_instance(lost).await.unwrap().is_lost());
        let told = noticed
            .iter()
            .filter(|note| note.contains(&format!("({lost})")));
        assert_eq!(told.count(), 1, "{noticed:?}");
    }
    assert!(store.find_instance("vm2").await.is_err(), "nobody wants it");
    // What is not there uses nothing.
    let empty = of(2, 20, vec![]);
    let usages = store.usages(&[&empty]).await.unwrap();
    assert_eq!(usages[0].used.vcpus, 0);
    // Of those that are lost one can be forgotten, and of the others none.
    let vm4 = report("kvm2", 1, vec![listed(4)]);
    store.record_report(&vm4, 250_000).await.unwrap();
    for (n, is_lost) in [(1, true), (4, false)] {
        let asked = store.forget_instance(listed(n).id, false).await;
        assert_eq!(asked.is_ok(), is_lost, "{asked:?}");
    }
    assert!(store.find_instance("vm1").await.is_ok(), "only asked");
    // Somebody defines one elsewhere, and one here.
    let elsewhere = report("kvm2", 2, vec![listed(1), listed(4)]);
    store.record_report(&elsewhere, 300_000).await.unwrap();
    let row = store.find_instance("vm1").await.unwrap();
    assert_eq!((row.host.as_str(), row.is_lost()), ("kvm2", false));
    let here = of(2, 21, vec![listed(3)]);
    store.record_report(&here, 300_000).await.unwrap();
    let row = store.find_instance("vm3").await.unwrap();
    assert!(!row.node_is_new && row.missing_since_ms.is_none());
}

async fn a_lost_guest_is_forgotten_when_somebody_says_so(store: Store) {
    store.register_agent(&installed("old"), None).await.unwrap();
    let before = of(1, 1, vec![listed(1)]);
    store.record_report(&before, 1).await.unwrap();
    let dead = Some(life(1, 0));
    store.register_agent(&installed("new"), dead).await.unwrap();
    for n in 1..=20 {
        let report = of(2, n, vec![]);
        store.record_report(&report, n * 10_000).await.unwrap();
    }
    let id = listed(1).id;
    let mut m = migration(1, 1);
    m.instance_uuid = id;
    store.admit(&m, None, None, term(1, HELD)).await.unwrap();
    let refused = store.forget_instance(id, true).await.unwrap_err();
    assert!(refused.to_string().contains("a migration"), "{refused}");
    let over = |m: &mut Migration| {
        m.status = MigrationStatus::Failed;
        true
    };
    store.update_migration(m.uuid, over).await.unwrap();
    store.forget_instance(id, true).await.unwrap();
    assert!(store.find_instance("vm1").await.is_err());
}

async fn silence_and_old_news_change_nothing(store: Store) {
    store
        .record_report(&report("kvm1", 5, vec![listed(1)]), 1000)
        .await
        .unwrap();
    let old = store
        .record_report(&report("kvm1", 4, vec![]), 1001)
        .await
        .unwrap();
    assert_eq!(old, Reported::Stale);
    let mut down = report("kvm1", 6, vec![]);
    down.hypervisor = HypervisorReport::Down {
        reason: "refused".into(),
    };
    store.record_report(&down, 100_000).await.unwrap();
    assert_eq!(
        store.find_instance("vm1").await.unwrap().missing_since_ms,
        None,
        "unknown is not absent"
    );
}

async fn two_nodes_that_list_one_instance_are_told_of_and_nothing_flips(store: Store) {
    store
        .record_report(&report("kvm1", 1, vec![listed(1)]), 1000)
        .await
        .unwrap();
    let kept = store
        .record_report(&report("kvm2", 1, vec![listed(1)]), 1001)
        .await
        .unwrap();
    assert!(
        matches!(&kept, Reported::Kept { notes } if notes.len() == 1),
        "{kept:?}"
    );
    assert_eq!(
        store.find_instance("vm1").await.unwrap().host.as_str(),
        "kvm1"
    );
    let waiting = InstanceReport {
        incoming: true,
        ..listed(1)
    };
    let kept = store
        .record_report(&report("kvm2", 2, vec![waiting]), 1002)
        .await
        .unwrap();
    assert_eq!(
        kept,
        Reported::Kept { notes: vec![] },
        "a copy that waits is no second copy"
    );
}

/// What a node says of instance 1 in its report of that number.
async fn says(store: &Store, node: &str, sequence: u64, state: Option<PowerState>) -> InstanceRow {
    let seen = state.map(|power_state| InstanceReport {
        power_state,
        ..listed(1)
    });
    let report = report(node, sequence, seen.into_iter().collect());
    store.record_report(&report, sequence).await.unwrap();
    store.find_instance("vm1").await.unwrap()
}

const ON: Option<PowerState> = Some(PowerState::Running);
const OFF: Option<PowerState> = Some(PowerState::Shutdown);

async fn the_record_follows_the_copy_that_runs(store: Store) {
    // Moved by hand, its old node keeps the definition.
    says(&store, "kvm1", 1, ON).await;
    let row = says(&store, "kvm2", 1, ON).await;
    assert_eq!(
        row.host.as_str(),
        "kvm1",
        "the first may have been moved back"
    );
    assert!(row.other_copy().is_some_and(|o| o.host.as_str() == "kvm2"));
    let row = says(&store, "kvm1", 2, OFF).await;
    assert_eq!((row.host.as_str(), row.other_copy()), ("kvm2", None));
    // Started on its old node while it is off on the new one.
    says(&store, "kvm2", 2, OFF).await;
    says(&store, "kvm1", 3, ON).await;
    let row = says(&store, "kvm2", 3, OFF).await;
    assert_eq!(row.host.as_str(), "kvm1");
    // Undefined where it was, before it was seen elsewhere, and after.
    says(&store, "kvm2", 4, ON).await;
    let row = says(&store, "kvm1", 4, None).await;
    assert_eq!((row.host.as_str(), row.missing_since_ms), ("kvm2", None));
    // One that goes again leaves nothing behind.
    says(&store, "kvm1", 5, ON).await;
    let row = says(&store, "kvm1", 6, None).await;
    assert_eq!((row.host.as_str(), row.other_copy()), ("kvm2", None));
    assert!(
        store.unpublished(10, u64::MAX).await.unwrap().is_empty(),
        "no alarm"
    );
}

/// A cold migration that nobody has confirmed yet holds no guest where it arrived.
async fn a_guest_that_waits_to_be_confirmed_is_followed_too(store: Store) {
    says(&store, "kvm1", 1, OFF).await;
    let m = migration(1, 1);
    admit(&store, &m, None).await;
    let (kvm2, id) = (host("kvm2"), m.instance_uuid);
    let settled = store.settle(lease(&m), id, &kvm2, None, None, 5).await;
    settled.unwrap();
    let finishes = |m: &mut Migration| {
        m.status = MigrationStatus::Finished;
        true
    };
    store.update_migration(m.uuid, finishes).await.unwrap();
    says(&store, "kvm1", 2, None).await;
    says(&store, "kvm2", 1, OFF).await;
    let row = says(&store, "kvm2", 2, OFF).await;
    assert_eq!((row.host.as_str(), row.missing_since_ms), ("kvm2", None));
    // Somebody takes it elsewhere, off.
    let row = says(&store, "kvm2", 3, None).await;
    assert_eq!(row.missing_since_ms, Some(3));
    let row = says(&store, "kvm3", 1, OFF).await;
    assert_eq!((row.host.as_str(), row.missing_since_ms), ("kvm3", None));
    // And back, where it runs.
    says(&store, "kvm1", 3, ON).await;
    let row = says(&store, "kvm3", 2, None).await;
    assert_eq!(
        (row.host.as_str(), row.power_state),
        ("kvm1", PowerState::Running)
    );
    // It is not forgotten before that is confirmed, or reverted.
    let late = report("kvm1", 4, vec![]);
    for at_ms in [10, u64::MAX >> 8] {
        let late = NodeReport {
            sequence: at_ms,
            ..late.clone()
        };
        store.record_report(&late, at_ms).await.unwrap();
    }
    assert!(store.find_instance("vm1").await.is_ok());
}

async fn two_copies_that_run_are_an_alarm_until_one_is_gone(store: Store) {
    says(&store, "kvm1", 1, ON).await;
    for n in 1..=4 {
        says(&store, "kvm2", n, ON).await;
        let row = says(&store, "kvm1", n + 1, ON).await;
        let other = row.other_copy().expect("it was seen");
        assert_eq!(row.host.as_str(), "kvm1");
        assert_eq!(other.both_run, n >= 4, "seen to run in turns: {n}");
    }
    says(&store, "kvm2", 5, ON).await;
    let told = store.unpublished(10, u64::MAX).await.unwrap();
    assert_eq!(told.len(), 1, "said once");
    assert_eq!(told[0].event_type, "instance.two_copies");
    let row = says(&store, "kvm2", 6, OFF).await;
    assert_eq!((row.host.as_str(), row.other_copy()), ("kvm1", None));
}

async fn a_report_that_was_under_way_when_a_move_settled_changes_nothing(store: Store) {
    says(&store, "kvm1", 1, ON).await;
    store
        .record_report(&report("kvm2", 1, vec![]), 1)
        .await
        .unwrap();
    let m = migration(1, 1);
    admit(&store, &m, None).await;
    let kvm2 = host("kvm2");
    let id = m.instance_uuid;
    store
        .settle(lease(&m), id, &kvm2, None, None, 5)
        .await
        .unwrap();
    store
        .update_migration(m.uuid, |m| {
            m.status = MigrationStatus::Completed;
            true
        })
        .await
        .unwrap();
    // Both were composed before: the destination's has only a copy that waits.
    let row = says(&store, "kvm2", 2, None).await;
    assert_eq!((row.host.as_str(), row.missing_since_ms), ("kvm2", None));
    let row = says(&store, "kvm1", 2, Some(PowerState::Paused)).await;
    assert_eq!((row.host.as_str(), row.other_copy()), ("kvm2", None));
    // Those after count.
    let row = says(&store, "kvm2", 3, Some(PowerState::Paused)).await;
    assert_eq!(row.power_state, PowerState::Paused);
    says(&store, "kvm1", 3, ON).await;
    let row = says(&store, "kvm2", 4, OFF).await;
    assert_eq!(row.host.as_str(), "kvm1");
}

async fn of_a_guest_that_cannot_be_read_what_was_read_is_kept(store: Store) {
    says(&store, "kvm1", 1, ON).await;
    let lost = InstanceReport::unreadable(listed(1).id, "", "its XML is nested too deep");
    let report = report("kvm1", 2, vec![lost, listed(2)]);
    store.record_report(&report, 2).await.unwrap();
    let row = store.find_instance("vm1").await.unwrap();
    assert_eq!((row.vcpus, row.memory_mib), (1, 1024));
    assert_eq!(row.project, "demo");
    assert_eq!(
        row.unreadable.as_deref(),
        Some("its XML is nested too deep")
    );
    assert_eq!(store.find_instance("vm2").await.unwrap().unreadable, None);
    assert_eq!(says(&store, "kvm1", 3, ON).await.unreadable, None);
}

async fn an_agent_of_another_incarnation_is_refused_aloud(store: Store) {
    let on = |machine: &str, state: &str, process: &str, held| RegisterAgent {
        speaks: Spoken::Unsaid,
        host: host("kvm1"),
        identity: Identity {
            state: state.into(),
            machine: machine.into(),
            boot: "b".into(),
            process: process.into(),
        },
        agent_version: "1".into(),
        held,
    };
    let ask = |state: &str, process: &str, held| on("m", state, process, held);
    let admitted = |incarnation| Registered::Admitted {
        incarnation,
        speaks: Spoken::Unsaid,
    };
    let register = async |ask: &RegisterAgent| store.register_agent(ask, None).await.unwrap();
    assert_eq!(register(&ask("s", "p1", None)).await, admitted(1));
    assert_eq!(
        register(&ask("s", "p1", None)).await,
        admitted(1),
        "asked twice"
    );
    assert_eq!(
        register(&ask("s", "p2", None)).await,
        admitted(2),
        "a restart"
    );
    let refused = |answer: Registered| matches!(answer, Registered::Refused { .. });
    assert!(
        refused(register(&ask("s", "p1", Some(1))).await),
        "no restart"
    );
    assert!(refused(register(&ask("other", "p3", None)).await), "a twin");
    let of = |incarnation, sequence| NodeReport {
        incarnation,
        ..report("kvm1", sequence, vec![listed(1)])
    };
    let kept = async |incarnation, sequence| {
        store
            .record_report(&of(incarnation, sequence), 1)
            .await
            .unwrap()
    };
    assert!(matches!(kept(2, 1).await, Reported::Kept { .. }));
    assert!(matches!(kept(1, 900).await, Reported::Stranger { .. }));
    assert!(matches!(kept(3, 1).await, Reported::Stranger { .. }));
    assert_eq!(kept(2, 1).await, Reported::Stale);
    // Silent for long: as of its last sign of life, and of no other.
    let twin = ask("other", "p3", None);
    let late = store.register_agent(&twin, Some(life(2, 9))).await.unwrap();
    assert!(refused(late));
    let now = store.register_agent(&twin, Some(life(2, 0))).await.unwrap();
    assert_eq!(now, admitted(3));
    assert!(
        matches!(kept(3, 1).await, Reported::Kept { .. }),
        "a low sequence counts anew"
    );
    // A good-bye frees the name for the node's own machine, or its state.
    store.agent_left(&host("kvm1"), 3).await.unwrap();
    let twin = on("another", "s", "p4", None);
    assert!(refused(register(&twin).await), "another machine");
    assert!(refused(register(&on("", "", "p4", None)).await), "unknown");
    assert_eq!(register(&ask("s", "p4", None)).await, admitted(4));
    store.agent_left(&host("kvm1"), 4).await.unwrap();
    assert_eq!(register(&twin).await, admitted(5), "its state, moved");
    store.agent_left(&host("kvm1"), 5).await.unwrap();
    assert!(refused(register(&ask("new", "p5", None)).await));
    let late = store
        .register_agent(&ask("new", "p5", None), Some(life(5, 0)))
        .await;
    assert_eq!(late.unwrap(), admitted(6), "after the silence");
    let row = store.agent(&host("kvm1")).await.unwrap().unwrap();
    assert!(row.refusals >= 3 && row.refusal.is_some() && !row.gone);
    // Forgotten, the name is anybody's; what was known of the old one's life is less
    // than the new one's.
    let how = Forgetting {
        silent_since_ms: 10,
        despite_lost_guests: true,
        ..Forgetting::default()
    };
    store.forget_node(&host("kvm1"), &how).await.unwrap();
    assert!(matches!(kept(6, 900).await, Reported::Stranger { .. }));
    let namesake = on("another", "", "p6", None);
    assert_eq!(register(&namesake).await, admitted(8));
}

async fn versions_are_said_by_one_incarnation(store: Store) {
    let spoken = |minor| {
        let max = RpcVersion::new(1, minor);
        Spoken::from(VersionRange::new(RpcVersion::new(1, 0), max))
    };
    let ask = |process: &str, speaks| RegisterAgent {
        host: host("kvm1"),
        identity: Identity {
            state: "s".into(),
            machine: "m".into(),
            boot: "b".into(),
            process: process.into(),
        },
        agent_version: "1".into(),
        held: None,
        speaks,
    };
    let kept = async || store.agent(&host("kvm1")).await.unwrap().unwrap().speaks;
    let first = ask("p1", spoken(4));
    store.register_agent(&first, None).await.unwrap();
    assert_eq!(kept().await, spoken(4));
    let beat = |incarnation, sequence, speaks| Heartbeat {
        host: host("kvm1"),
        incarnation,
        sequence,
        agent_version: "1".into(),
        clock_ms: 1,
        speaks,
    };
    let garbled = Spoken::Garbled("soup".into());
    let beats = [(beat(1, 1, garbled.clone()), 0)];
    let rows = store.hear(&beats, &[], 1).await.unwrap();
    assert_eq!(rows[0].speaks, garbled);
    // One that an older conductor lets in: the column is another incarnation's.
    let older = "UPDATE agents SET incarnation = 2, beat = 0";
    store.damage(older).await.unwrap();
    assert_eq!(kept().await, Spoken::Unsaid);
    let beats = [(beat(2, 1, spoken(5)), 0)];
    store.hear(&beats, &[], 1).await.unwrap();
    assert_eq!(kept().await, spoken(5));
}

async fn during_a_migration_reports_do_not_move_the_instance(store: Store) {
    store
        .record_report(&report("kvm1", 1, vec![listed(1)]), 1000)
        .await
        .unwrap();
    store
        .record_report(&report("kvm2", 1, vec![]), 1000)
        .await
        .unwrap();
    let m = migration(1, 1);
    admit(&store, &m, None).await;
    store
        .record_report(&report("kvm1", 2, vec![]), 1001)
        .await
        .unwrap();
    store
        .record_report(&report("kvm2", 2, vec![listed(1)]), 1002)
        .await
        .unwrap();
    let row = store.find_instance("vm1").await.unwrap();
    assert_eq!((row.host.as_str(), row.missing_since_ms), ("kvm1", None));
    store
        .settle(lease(&m), m.instance_uuid, &host("kvm2"), None, None, 1003)
        .await
        .unwrap();
    assert_eq!(
        store.find_instance("vm1").await.unwrap().host.as_str(),
        "kvm2"
    );
}

async fn claims_balance(store: Store) {
    let node = report("kvm2", 1, vec![listed(1)]);
    store.record_report(&node, 1000).await.unwrap();
    store
        .record_report(&report("kvm1", 1, vec![listed(2)]), 1000)
        .await
        .unwrap();
    let before = store.usage(&node).await.unwrap();
    assert_eq!((before.used.vcpus, before.used.memory_mib), (1, 1024));
    let wanted = Resources {
        vcpus: 1,
        memory_mib: 1024,
        disk_bytes: 1 << 30,
    };
    let (a, b) = (migration(1, 2), migration(2, 3));
    for m in [&a, &b] {
        admit(&store, m, None).await;
    }
    for _ in 0..2 {
        store
            .claim(lease(&a), &host("kvm2"), wanted)
            .await
            .unwrap()
            .unwrap();
    }
    let claimed = store.usage(&node).await.unwrap();
    assert_eq!(claimed.used.vcpus, 2, "claimed twice is claimed once");
    let greedy = Resources {
        memory_mib: 2049,
        ..wanted
    };
    let short = store
        .claim(lease(&b), &host("kvm2"), greedy)
        .await
        .unwrap()
        .unwrap_err();
    assert_eq!(short.len(), 1, "only memory is short: {short:?}");
    // Settled: the instance's own use takes the claim's place.
    store
        .settle(lease(&a), a.instance_uuid, &host("kvm2"), None, None, 1001)
        .await
        .unwrap();
    assert_eq!(store.usage(&node).await.unwrap().used.vcpus, 2);
    assert!(store.claims().await.unwrap().is_empty());
    store
        .claim(lease(&b), &host("kvm2"), wanted)
        .await
        .unwrap()
        .unwrap();
    store.release_claim(lease(&b)).await.unwrap();
    store.release_claim(lease(&b)).await.unwrap();
    assert_eq!(store.usage(&node).await.unwrap().used.vcpus, 2);
}

async fn rival_claims_never_exceed_the_node(store: Store) {
    let node = report("kvm2", 1, vec![]);
    store.record_report(&node, 1000).await.unwrap();
    let wanted = Resources {
        vcpus: 1,
        memory_mib: 1500,
        disk_bytes: 0,
    };
    let rivals = (1..=8).map(|n| {
        let store = store.clone();
        tokio::spawn(async move {
            let m = migration(n, n);
            admit(&store, &m, None).await;
            store
                .claim(lease(&m), &host("kvm2"), wanted)
                .await
                .unwrap()
                .is_ok()
        })
    });
    let mut won = 0;
    for rival in rivals.collect::<Vec<_>>() {
        won += usize::from(rival.await.unwrap());
    }
    assert_eq!(won, 2, "4096 MiB hold two of 1500");
}

fn nothing(
    _: &mut Migration,
) -> Result<Vec<drover_store::outbox::Notification>, drover_model::migration::IllegalTransition> {
    Ok(vec![])
}

async fn a_journal_has_one_writer(store: Store) {
    let m = migration(1, 7);
    admit(&store, &m, None).await;
    let lease = Store::first_lease(m.uuid);
    let event = |step: &str| [Event::Started { step: step.into() }];
    let saga = SagaKey::of_move(m.uuid);
    store
        .append_saga_events((lease, &saga), 0, &event("place"), 1, nothing)
        .await
        .unwrap();
    // Another conductor takes over after the lease ran out.
    let undriven = async || store.undriven("other", &[], term(150, 0)).await.unwrap();
    let renew = async |term| store.renew_leases("ctl", &[lease], term).await.unwrap();
    renew(term(150, HELD)).await;
    assert_eq!(undriven().await, [], "still held");
    renew(term(100, 0)).await;
    passed().await;
    assert_eq!(undriven().await, [lease]);
    let taken = store
        .take_over(lease, "other", term(150, HELD))
        .await
        .unwrap();
    let taken = taken.expect("nobody was faster");
    assert_eq!(taken, Lease { epoch: 2, ..lease });
    let too_late = store
        .take_over(lease, "third", term(150, HELD))
        .await
        .unwrap();
    assert_eq!(too_late, None, "of two one has it");
    let late = store
        .append_saga_events((lease, &saga), 1, &event("prepare"), 2, nothing)
        .await;
    assert!(matches!(late, Err(JournalError::Fenced)), "{late:?}");
    assert_eq!(
        store.saga_events(&saga).await.unwrap().len(),
        1,
        "nothing was written"
    );
    store
        .append_saga_events((taken, &saga), 1, &event("prepare"), 2, nothing)
        .await
        .unwrap();
    let note = |m: &mut Migration| {
        m.attempt += 1;
        true
    };
    let shut_out = store.update_driven(lease, note).await;
    assert!(
        matches!(shut_out, Err(StoreError::Fenced(_))),
        "{shut_out:?}"
    );
    assert_eq!(
        store.update_driven(taken, note).await.unwrap().attempt,
        m.attempt + 1
    );
}

async fn leases_are_renewed_for_what_is_driven_and_no_other(store: Store) {
    let mut held = Vec::new();
    for n in 1..=40 {
        let m = migration(n, n);
        admit(&store, &m, None).await;
        held.push(Store::first_lease(m.uuid));
    }
    let (orphan, driven) = held.split_first().unwrap();
    let owner = migration(1, 1).owner;
    let all = store
        .renew_leases(&owner, &held, term(100, 0))
        .await
        .unwrap();
    assert_eq!(all.len(), 40);
    let renew = async || {
        store
            .renew_leases(&owner, driven, term(600, HELD))
            .await
            .unwrap()
    };
    assert_eq!(renew().await.len(), 39);
    passed().await;
    let left = store.undriven("other", &[], term(500, 0)).await.unwrap();
    assert_eq!(left, [*orphan], "its lease ran out");
    let own = store.undriven(&owner, driven, term(50, 0)).await.unwrap();
    assert_eq!(own, [*orphan], "its owner sees that it is not driven");
    // What was taken over is not renewed.
    let taken = store.take_over(driven[0], "other", term(500, HELD)).await;
    assert!(taken.unwrap().is_some());
    assert_eq!(renew().await.len(), 38);
}

async fn put_off_tidying_is_done_by_one_and_ever_more_seldom(store: Store) {
    let (first, second) = (migration(1, 1), migration(2, 2));
    for m in [&first, &second] {
        admit(&store, m, None).await;
        let lease = Store::first_lease(m.uuid);
        store.put_off(lease, "tidy", 10).await.unwrap();
    }
    let due = async |owner: &str, at_ms| {
        let steps = store
            .put_off_steps(owner, term(at_ms, 0), 10)
            .await
            .unwrap();
        steps.iter().map(|s| s.lease.migration).collect::<Vec<_>>()
    };
    assert_eq!(due(&first.owner, 20).await, [], "they are still driven");
    for m in [&first, &second] {
        let end = |m: &mut Migration| m.become_status(MigrationStatus::Failed).is_ok();
        store.update_migration(m.uuid, end).await.unwrap();
    }
    assert_eq!(due(&first.owner, 20).await, [first.uuid, second.uuid]);
    let renew = async |term| {
        let leases = [&first, &second].map(|m| Store::first_lease(m.uuid));
        store
            .renew_leases(&first.owner, &leases, term)
            .await
            .unwrap()
    };
    renew(term(20, HELD)).await;
    assert_eq!(due("other", 20).await, [], "their owner has them");
    renew(term(20, 0)).await;
    passed().await;
    assert_eq!(due("other", 150).await.len(), 2, "its lease ran out");
    // What failed comes after what did not.
    store
        .put_off_again(first.uuid, "tidy", (60, true))
        .await
        .unwrap();
    assert_eq!(due(&first.owner, 59).await, [second.uuid]);
    assert_eq!(due(&first.owner, 60).await, [second.uuid, first.uuid]);
    let lease = Store::first_lease(second.uuid);
    let taken = store
        .take_over(lease, "other", term(60, HELD))
        .await
        .unwrap()
        .unwrap();
    let late = store.tidied(lease, "tidy", "done").await;
    assert!(matches!(late, Err(StoreError::Fenced(_))), "{late:?}");
    store.tidied(taken, "tidy", "done").await.unwrap();
    let told = store.migration(second.uuid).await.unwrap();
    assert_eq!(told.warnings, ["done"]);
    assert_eq!(due(&first.owner, 60).await, [first.uuid]);
}

async fn an_outcome_is_kept_for_whoever_drives(store: Store) {
    let m = migration(1, 7);
    admit(&store, &m, None).await;
    assert_eq!(store.outcome(m.uuid).await.unwrap(), None);
    let moved = Outcome::Moved {
        downtime_ms: Some(5),
        total_ms: None,
    };
    store.set_outcome(m.uuid, &moved).await.unwrap();
    assert_eq!(store.outcome(m.uuid).await.unwrap(), Some(moved));
}

#[tokio::test]
async fn the_record_survives_the_process() {
    let directory = tempfile::tempdir().unwrap();
    let path: PathBuf = directory.path().join("conductor.sqlite");
    let url = format!("sqlite://{}", path.display());
    let m = migration(1, 7);
    let first = Store::open(&url).await.unwrap();
    admit(&first, &m, Some("u1")).await;
    drop(first);
    let second = Store::open(&url).await.unwrap();
    assert_eq!(second.migration(m.uuid).await.unwrap().instance_name, "vm7");
}

#[tokio::test]
async fn a_database_that_cannot_be_opened_says_what_to_do() {
    for (url, expected) in [
        (
            "sqlite:///nonexistent/directory/x.sqlite",
            "make its directory",
        ),
        ("mysql://root@localhost/x", "use sqlite:///"),
        ("nonsense", "use sqlite:///"),
        ("postgresql://drover:x@127.0.0.1:1/x", "refused"),
        ("postgresql://drover:x@127.0.0.1:1/x", "start the server"),
    ] {
        let error = Store::open(url).await.err().expect("must fail").to_string();
        assert!(error.contains(expected), "{error}");
    }
}

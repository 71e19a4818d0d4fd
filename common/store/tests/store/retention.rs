//! What the record forgets, and what it keeps, in both databases.

#![allow(clippy::unwrap_used)] // all of it is test

use crate::common::{HELD, host, listed, lists_nothing, migration, report, term};
use drover_model::{
    api::{
        compute::KeptDefinition,
        conductor::{ListMigrations, ListOperations},
    },
    guest::PowerState,
    ids::{InstanceId, OperationId},
    migration::{Evacuation, Migration, MigrationStatus, ProofOfDeath, Requester, Way},
    operation::{DrainOptions, EvacuateOptions, Operation, OperationStatus, Task},
};
use drover_saga::Event;
use drover_store::{
    Store, StoreError,
    migrations::{Admitted, Lease},
    operations::Begun,
    outbox::Notification,
    retention::{Forgetting, Retention},
    sagas::SagaKey,
};
use uuid::Uuid;

promises! {
    what_is_over_goes_by_age_and_by_number_and_numbers_go_on,
    what_is_unfinished_or_needed_stays,
    a_journal_goes_before_its_migration,
    operations_go_with_their_migrations,
    the_last_evacuation_of_a_node_stays_as_long_as_the_node,
    what_could_not_be_tidied_is_given_up,
    what_cannot_be_read_holds_up_no_retention,
    a_definition_outlives_its_guest_for_a_while,
    a_scrapped_node_is_forgotten_when_nothing_needs_it,
    guests_of_a_scrapped_node_follow_their_other_copy_or_are_named,
    a_notification_that_is_refused_steps_aside,
}

const DAY_MS: u64 = 86_400_000;
const KEEP: Retention = Retention {
    keep_ms: 90 * DAY_MS,
    keep_count: 1000,
    journal_ms: 7 * DAY_MS,
};

async fn admitted(store: &Store, m: &Migration) -> Migration {
    let unique_id = m.uuid.to_string();
    let admitted = store.admit(m, None, Some(&unique_id), term(0, HELD));
    match admitted.await.unwrap() {
        Admitted::New(m) => *m,
        other => panic!("{other:?}"),
    }
}

/// Begins a migration, and ends it at a moment with a journal of one event.
async fn over(store: &Store, m: &Migration, at_ms: u64) -> Migration {
    let m = admitted(store, m).await;
    let step = "place".to_owned();
    let lease = Lease {
        migration: m.uuid,
        epoch: 1,
    };
    let end = |m: &mut Migration| {
        m.status = MigrationStatus::Failed;
        m.updated_at_ms = at_ms;
        Ok(Vec::new())
    };
    let saga = SagaKey::of_move(m.uuid);
    let events = [Event::Started { step }];
    let ended = store.append_saga_events((lease, &saga), 0, &events, at_ms, end);
    ended.await.unwrap()
}

async fn prune(store: &Store, keep: Retention, now_ms: u64) {
    while store.prune(keep, now_ms).await.unwrap() > 0 {}
}

async fn numbers(store: &Store) -> Vec<i64> {
    let all = ListMigrations {
        limit: Some(1000),
        ..ListMigrations::default()
    };
    let all = store.migrations(&all, None).await.unwrap();
    all.iter().map(|m| m.id).collect()
}

async fn what_is_over_goes_by_age_and_by_number_and_numbers_go_on(store: Store) {
    for n in 1..=6 {
        over(&store, &migration(n, n), u64::try_from(n).unwrap() * DAY_MS).await;
    }
    prune(&store, KEEP, 60 * DAY_MS).await;
    assert_eq!(numbers(&store).await.len(), 6, "nothing is old");
    prune(&store, KEEP, 93 * DAY_MS).await;
    assert_eq!(numbers(&store).await, [6, 5, 4, 3]);
    let few = Retention {
        keep_count: 2,
        ..KEEP
    };
    prune(&store, few, 93 * DAY_MS).await;
    assert_eq!(numbers(&store).await, [6, 5]);
    let none = Retention { keep_ms: 0, ..KEEP };
    prune(&store, none, 93 * DAY_MS).await;
    assert!(numbers(&store).await.is_empty());
    let next = admitted(&store, &migration(7, 7)).await;
    assert_eq!(next.id, 7, "no number is given twice");
}

fn definition(id: InstanceId) -> KeptDefinition {
    let guest = serde_json::json!({
        "id": id, "name": "vm1", "project": "demo", "generation": 0, "power_state": "running",
        "persistent": true, "vcpus": 1, "memory_mib": 1024, "virt_type": "kvm",
        "arch": "x86_64", "machine": "q35", "emulator": "/usr/bin/qemu-system-x86_64",
        "cpu_xml": null, "disks": [], "nics": [], "immovable": [], "files": [], "reads": [],
        "bound": [], "snapshots": [], "external_snapshots": [], "active_job": null,
    });
    KeptDefinition {
        instance: id,
        digest: "d".into(),
        domain: "<domain/>".into(),
        has_secrets: false,
        guest: serde_json::from_value(guest).unwrap(),
        identities: vec![],
        contents: vec![],
    }
}

async fn a_definition_outlives_its_guest_for_a_while(store: Store) {
    let kvm1 = host("kvm1");
    let id = listed(1).id;
    let is_there = async |sequence, at_ms| {
        let report = report("kvm1", sequence, vec![listed(1)]);
        store.record_report(&report, at_ms).await.unwrap();
    };
    let goes = async |first, at_ms| {
        lists_nothing(&store, "kvm1", first, at_ms).await;
        assert!(store.find_instance("vm1").await.is_err());
    };
    let is_kept = async || store.kept_definition(id).await.unwrap().is_some();
    is_there(1, 1).await;
    let kept = definition(id);
    assert!(store.keep_definition(&kvm1, &kept, None, 1).await.unwrap());
    goes(2, 100 * DAY_MS).await;
    prune(&store, KEEP, 101 * DAY_MS).await;
    prune(&store, KEEP, 180 * DAY_MS).await;
    assert!(is_kept().await, "however old it is");
    // It is back: then it is no more gone than one that never was.
    is_there(20, 190 * DAY_MS).await;
    prune(&store, KEEP, 300 * DAY_MS).await;
    goes(21, 300 * DAY_MS).await;
    prune(&store, KEEP, 301 * DAY_MS).await;
    prune(&store, KEEP, 390 * DAY_MS).await;
    assert!(is_kept().await);
    prune(&store, KEEP, 392 * DAY_MS).await;
    assert!(!is_kept().await);
    // Nor does it go with its guest's node.
    is_there(40, 400 * DAY_MS).await;
    assert!(store.keep_definition(&kvm1, &kept, None, 1).await.unwrap());
    let despite = Forgetting {
        now_ms: 401 * DAY_MS,
        silent_since_ms: 401 * DAY_MS,
        despite_lost_guests: true,
        ..Forgetting::default()
    };
    store.forget_node(&kvm1, &despite).await.unwrap();
    prune(&store, KEEP, 401 * DAY_MS).await;
    assert!(is_kept().await);
    prune(&store, KEEP, 492 * DAY_MS).await;
    assert!(!is_kept().await);
}

async fn what_is_unfinished_or_needed_stays(store: Store) {
    let none = Retention {
        keep_ms: 0,
        keep_count: 0,
        journal_ms: 0,
    };
    let told = report("kvm1", 1, vec![listed(3)]);
    store.record_report(&told, 1).await.unwrap();
    let waits = admitted(&store, &migration(1, 1)).await;
    let tidied_later = over(&store, &migration(2, 2), 1).await;
    let lease = Lease {
        migration: tidied_later.uuid,
        epoch: 1,
    };
    store.put_off(lease, "tidy", 500 * DAY_MS).await.unwrap();
    let mut evacuation = migration(3, 3);
    evacuation.way = Way::Evacuation(Evacuation {
        operation: OperationId(Uuid::from_u128(1)),
        proof: ProofOfDeath::Fence {
            agent: "fence".into(),
            at_ms: 1,
            life: None,
        },
        to: Vec::new(),
    });
    let evacuated = admitted(&store, &evacuation).await;
    let completed = store.update_migration(evacuated.uuid, |m| {
        m.status = MigrationStatus::Completed;
        m.updated_at_ms = 1;
        true
    });
    completed.await.unwrap();
    prune(&store, none, 400 * DAY_MS).await;
    assert_eq!(
        numbers(&store).await,
        [evacuated.id, tidied_later.id, waits.id]
    );
    // Its node has given the old copy up, and the rest is tidied.
    let kvm1 = host("kvm1");
    let removed = store.old_copy_removed(&kvm1, evacuated.uuid);
    removed.await.unwrap();
    let lease = Store::first_lease(tidied_later.uuid);
    store.tidied(lease, "tidy", "done").await.unwrap();
    prune(&store, none, 400 * DAY_MS).await;
    assert_eq!(numbers(&store).await, [waits.id]);
}

async fn a_journal_goes_before_its_migration(store: Store) {
    let m = over(&store, &migration(1, 1), DAY_MS).await;
    let events = async || {
        let saga = SagaKey::of_move(m.uuid);
        store.saga_events(&saga).await.unwrap().len()
    };
    prune(&store, KEEP, 7 * DAY_MS).await;
    assert_eq!(events().await, 1);
    prune(&store, KEEP, 9 * DAY_MS).await;
    assert_eq!(events().await, 0);
    assert_eq!(numbers(&store).await, [1]);
}

async fn begun(store: &Store, n: u128, node: &str) -> Operation {
    begun_task(store, n, Task::Drain(DrainOptions::new(host(node)))).await
}

async fn begun_task(store: &Store, n: u128, task: Task) -> Operation {
    let operation = Operation {
        uuid: OperationId(Uuid::from_u128(n << 96 | n)),
        ..Operation::new(task, Requester::default(), "ctl", 1)
    };
    let begun = store.begin_operation(&operation, None, term(0, HELD)).await;
    match begun.unwrap() {
        Begun::New(operation) => *operation,
        other => panic!("{other:?}"),
    }
}

async fn finish(store: &Store, operation: &Operation) {
    let ended = store.update_operation(operation.uuid, None, |o| {
        o.status = OperationStatus::Failed;
        o.finished_at_ms = Some(DAY_MS);
        true
    });
    ended.await.unwrap();
}

async fn operations_go_with_their_migrations(store: Store) {
    for n in [1, 2] {
        let operation = begun(&store, n, &format!("kvm{n}")).await;
        for i in [10 * n, 10 * n + 1] {
            let m = Migration {
                operation: Some(operation.uuid),
                ..migration(i, i)
            };
            over(&store, &m, DAY_MS).await;
        }
        if n == 1 {
            finish(&store, &operation).await;
        }
    }
    // Only one migration too many: the operation that names it stays whole.
    let few = |keep_count| Retention { keep_count, ..KEEP };
    prune(&store, few(3), 2 * DAY_MS).await;
    assert_eq!(numbers(&store).await, [4, 3, 2, 1]);
    prune(&store, few(1), 2 * DAY_MS).await;
    assert_eq!(
        numbers(&store).await,
        [4, 3],
        "what an unfinished one names"
    );
    let left = store.operations(&ListOperations::default()).await.unwrap();
    assert_eq!(left.iter().map(|o| o.id).collect::<Vec<_>>(), [2]);
}

async fn the_last_evacuation_of_a_node_stays_as_long_as_the_node(store: Store) {
    let (kvm1, heard_ms) = (host("kvm1"), 1000);
    let told = report("kvm1", 1, vec![]);
    store.record_report(&told, heard_ms).await.unwrap();
    for n in [1, 2] {
        let task = Task::Evacuate(EvacuateOptions::new(kvm1.clone()));
        finish(&store, &begun_task(&store, n, task).await).await;
    }
    let left = async || {
        prune(&store, KEEP, 400 * DAY_MS).await;
        let left = store.operations(&ListOperations::default()).await.unwrap();
        left.iter().map(|o| o.id).collect::<Vec<_>>()
    };
    assert_eq!(left().await, [2], "it is known that this was tried");
    let how = Forgetting {
        silent_since_ms: heard_ms,
        ..Forgetting::default()
    };
    store.forget_node(&kvm1, &how).await.unwrap();
    assert_eq!(left().await, [0; 0]);
}

async fn what_could_not_be_tidied_is_given_up(store: Store) {
    let m = over(&store, &migration(1, 1), 10 * DAY_MS).await;
    let lease = Lease {
        migration: m.uuid,
        epoch: 1,
    };
    store.put_off(lease, "tidy", DAY_MS).await.unwrap();
    // What is promised where nobody tidies any more is promised to nobody.
    let claim = format!(
        "INSERT INTO claims (migration_uuid, host, vcpus, memory_mib, disk_bytes) \
         VALUES ('{}', 'kvm1', 1, 512, 0)",
        m.uuid
    );
    store.damage(claim.leak()).await.unwrap();
    prune(&store, KEEP, 91 * DAY_MS).await;
    assert_eq!(store.claims().await.unwrap().len(), 1);
    prune(&store, KEEP, 92 * DAY_MS).await;
    assert_eq!(store.claims().await.unwrap(), []);
    let left = store.put_off_steps(&m.owner, term(92 * DAY_MS, HELD), 10);
    assert_eq!(left.await.unwrap(), []);
    let told = store.migration(m.uuid).await.unwrap().warnings;
    assert!(told[0].contains("given up"), "{told:?}");
}

async fn what_cannot_be_read_holds_up_no_retention(store: Store) {
    let mut put_off = Vec::new();
    for n in 1..=3 {
        let m = over(&store, &migration(n, n), DAY_MS).await;
        let lease = Lease {
            migration: m.uuid,
            epoch: 1,
        };
        store.put_off(lease, "tidy", DAY_MS).await.unwrap();
        put_off.push(m);
    }
    for damage in [
        "UPDATE migrations SET record = replace(record, '\"failed\"', '\"hovering\"') WHERE id = 1",
        "UPDATE migrations SET record = 'x' WHERE id = 2",
    ] {
        store.damage(damage).await.unwrap();
    }
    let mut passes = 0;
    while store.prune(KEEP, 200 * DAY_MS).await.unwrap() > 0 {
        passes += 1;
        assert!(passes < 10, "it comes to an end");
    }
    // The newer one is left to whoever understands it.
    for (m, events) in put_off.iter().zip([1, 0, 0]) {
        let left = store.saga_events(&SagaKey::of_move(m.uuid)).await.unwrap();
        assert_eq!(left.len(), events, "migration {}", m.id);
    }
    assert_eq!(store.size().await.unwrap().migrations, 1);
}

async fn a_scrapped_node_is_forgotten_when_nothing_needs_it(store: Store) {
    let (kvm1, heard_ms) = (host("kvm1"), 1000);
    let told = report("kvm1", 1, vec![listed(7)]);
    store.record_report(&told, heard_ms).await.unwrap();
    let m = admitted(&store, &migration(1, 8)).await;
    begun(&store, 1, "kvm1").await;
    let how = |silent_since_ms| Forgetting {
        silent_since_ms,
        ..Forgetting::default()
    };
    let refused =
        async |silent_since_ms| match store.forget_node(&kvm1, &how(silent_since_ms)).await {
            Err(StoreError::Invalid(words)) => words,
            other => panic!("{other:?}"),
        };
    let words = refused(heard_ms - 1).await;
    for part in ["stop it first", "vm7", "migration 1", "operation 1"] {
        assert!(words.contains(part), "{words}");
    }
    let ended = store.update_migration(m.uuid, |m| {
        m.status = MigrationStatus::Failed;
        true
    });
    ended.await.unwrap();
    finish(&store, &store.find_operation("1").await.unwrap()).await;
    assert!(refused(heard_ms).await.contains("vm7"));
    lists_nothing(&store, "kvm1", 2, 2000).await;
    store.may_forget_node(&kvm1, &how(100_000)).await.unwrap();
    store.node(&kvm1).await.unwrap();
    store.forget_node(&kvm1, &how(100_000)).await.unwrap();
    let gone = store.node(&kvm1).await;
    assert!(matches!(gone, Err(StoreError::NotFound(_))), "{gone:?}");
    // It comes back all the same: as one that nobody knows.
    let again = report("kvm1", 1, vec![]);
    store.record_report(&again, 200_000).await.unwrap();
    store.node(&kvm1).await.unwrap();
}

async fn guests_of_a_scrapped_node_follow_their_other_copy_or_are_named(store: Store) {
    let kvm1 = host("kvm1");
    let off = |n| {
        let mut seen = listed(n);
        seen.power_state = PowerState::Shutdown;
        seen
    };
    // Started on kvm2 by hand, defined there, on shared disks, and with disks of its own.
    let told = report("kvm1", 1, vec![listed(1), off(2), listed(3), off(4)]);
    store.record_report(&told, 1000).await.unwrap();
    let there = report("kvm2", 1, vec![listed(1), off(2), listed(5)]);
    store.record_report(&there, 2000).await.unwrap();
    // At home on kvm2, and seen on kvm1 as well.
    let told = report(
        "kvm1",
        2,
        vec![listed(1), off(2), listed(3), off(4), listed(5)],
    );
    store.record_report(&told, 2500).await.unwrap();
    let how = Forgetting {
        now_ms: 3000,
        silent_since_ms: 3000,
        evacuable: vec![listed(3).id],
        despite_lost_guests: false,
    };
    let words = match store.forget_node(&kvm1, &how).await {
        Err(StoreError::Invalid(words)) => words,
        other => panic!("{other:?}"),
    };
    let mut names = words.split([' ', ',', ';']);
    assert!(!names.any(|w| w == "vm1" || w == "vm2"), "{words}");
    let (saved, lost) = words.split_once("; ").unwrap();
    assert!(
        saved.contains("vm3") && saved.contains("evacuate kvm1"),
        "{words}"
    );
    assert!(
        lost.contains("vm4") && lost.contains("--despite-lost-guests"),
        "{words}"
    );
    let home = async |n| store.find_instance(&listed(n).id.to_string()).await;
    assert!(home(5).await.unwrap().other.is_some());
    assert_eq!(home(1).await.unwrap().host, kvm1, "nothing was done");
    let despite = Forgetting {
        despite_lost_guests: true,
        ..how
    };
    store.may_forget_node(&kvm1, &despite).await.unwrap();
    assert_eq!(home(4).await.unwrap().host, kvm1, "nothing was done");
    store.forget_node(&kvm1, &despite).await.unwrap();
    for n in [1, 2, 5] {
        let guest = home(n).await.unwrap();
        assert_eq!((guest.host, guest.other), (host("kvm2"), None));
    }
    for n in [3, 4] {
        let gone = home(n).await;
        assert!(matches!(gone, Err(StoreError::NotFound(_))), "{gone:?}");
    }
}

async fn a_notification_that_is_refused_steps_aside(store: Store) {
    let m = admitted(&store, &migration(1, 1)).await;
    let lease = Lease {
        migration: m.uuid,
        epoch: 1,
    };
    let event = |name: &str| Notification::new(name, "INFO", serde_json::json!({}));
    let told = [event("first"), event("second")];
    let tell = |_: &mut Migration| Ok(told.to_vec());
    let saga = SagaKey::of_move(m.uuid);
    let appended = store.append_saga_events((lease, &saga), 0, &[], 1, tell);
    appended.await.unwrap();
    assert_eq!(store.refused(told[0].id, 1000).await.unwrap(), 1);
    let now = store.unpublished(10, 999).await.unwrap();
    assert_eq!(now, [told[1].clone()]);
    assert_eq!(store.unpublished(10, 1000).await.unwrap().len(), 2);
    assert_eq!(store.refused(told[0].id, 2000).await.unwrap(), 2);
}

/// Ten thousand migrations later the record is as large as what is kept.
#[tokio::test]
async fn the_record_grows_no_larger_than_what_is_kept() {
    let store = Store::in_memory().await.unwrap();
    let keep = Retention {
        keep_count: 100,
        ..KEEP
    };
    for n in 1..=10_000 {
        over(&store, &migration(n, n), u64::try_from(n).unwrap()).await;
        if n % 1000 == 0 {
            prune(&store, keep, u64::try_from(n).unwrap()).await;
            let left = store.size().await.unwrap();
            let rows = left.migrations + left.events + left.requests + left.notifications;
            assert!(rows <= 3 * 100, "{left:?} after {n}");
        }
    }
    let next = over(&store, &migration(20_000, 1), 20_000).await;
    assert_eq!(next.id, 10_001);
}

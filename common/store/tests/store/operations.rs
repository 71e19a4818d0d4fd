//! The record's promises about operations on nodes, about turns to send, and
//! about what is kept for the day on which a node is dead.

#![allow(clippy::unwrap_used)] // all of it is test

use crate::common::{HELD, host, listed, lists_nothing, migration, report, term};
use drover_model::{
    api::conductor::ListOperations,
    ids::{InstanceId, OperationId},
    migration::{Evacuation, Migration, MigrationStatus, ProofOfDeath, Requester, Way},
    operation::{
        BalanceOptions, DrainOptions, EvacuateOptions, Operation, OperationStatus, RestoreOptions,
        Returning, Task,
    },
};
use drover_store::{
    Store, StoreError,
    fencing::{FenceClaim, FenceRefusal},
    migrations::Admitted,
    operations::{Begun, OperationLease, Turn, TurnLimits},
};
use uuid::Uuid;

promises! {
    one_operation_has_a_node_and_a_request_makes_one,
    operations_are_found_by_number_uuid_and_prefix,
    what_an_operation_has_become_stays_and_only_its_driver_writes,
    an_operation_is_taken_up_by_one,
    turns_keep_every_limit_and_come_back,
    rivals_for_a_turn_never_exceed_it,
    an_evacuated_instance_is_remembered_until_its_old_copy_is_gone,
    a_node_declared_down_stays_so_whatever_it_says,
    switches_are_on_until_switched,
    power_is_cut_by_one_that_still_may,
}

fn operation(n: u128, task: Task) -> Operation {
    Operation {
        uuid: OperationId(Uuid::from_u128(n << 96 | n)),
        ..Operation::new(task, Requester::default(), "ctl", 1)
    }
}

fn drain(n: u128, name: &str) -> Operation {
    operation(n, Task::Drain(DrainOptions::new(host(name))))
}

async fn begin(store: &Store, new: &Operation, unique_id: &str) -> Begun {
    store
        .begin_operation(new, Some(unique_id), term(0, HELD))
        .await
        .unwrap()
}

async fn begun(store: &Store, new: &Operation) -> Operation {
    match store
        .begin_operation(new, None, term(0, HELD))
        .await
        .unwrap()
    {
        Begun::New(operation) => *operation,
        other => panic!("{other:?}"),
    }
}

async fn become_status(
    store: &Store,
    id: OperationId,
    status: OperationStatus,
) -> drover_store::Result<Operation> {
    let change = |o: &mut Operation| {
        o.status = status;
        true
    };
    store.update_operation(id, None, change).await
}

async fn one_operation_has_a_node_and_a_request_makes_one(store: Store) {
    let Begun::New(first) = begin(&store, &drain(1, "kvm1"), "u1").await else {
        panic!("new")
    };
    assert_eq!((first.id, first.version), (1, 1));
    let again = begin(&store, &drain(2, "kvm1"), "u1").await;
    assert_eq!(again, Begun::Repeated(first.clone()));
    let restore = operation(
        3,
        Task::Restore(RestoreOptions {
            host: host("kvm1"),
            returning: Returning::All,
            mode: drover_model::operation::MoveMode::Live,
            max_parallel: None,
            unknown: Default::default(),
        }),
    );
    let rival = begin(&store, &restore, "u3").await;
    assert_eq!(rival, Begun::Busy(first.clone()), "of whatever kind");
    assert!(matches!(
        begin(&store, &drain(4, "kvm2"), "u4").await,
        Begun::New(_)
    ));
    let all = operation(5, Task::Balance(BalanceOptions::default()));
    assert!(matches!(begin(&store, &all, "u5").await, Begun::New(_)));
    become_status(&store, first.uuid, OperationStatus::Failed)
        .await
        .unwrap();
    assert!(matches!(begin(&store, &restore, "u3").await, Begun::New(_)));
}

async fn operations_are_found_by_number_uuid_and_prefix(store: Store) {
    let first = begun(&store, &drain(0xa1, "kvm1")).await;
    let second = begun(&store, &drain(0xa2, "kvm2")).await;
    for reference in [second.id.to_string(), second.uuid.to_string()] {
        assert_eq!(store.find_operation(&reference).await.unwrap(), second);
    }
    let ambiguous = store.find_operation("0000").await;
    assert!(matches!(ambiguous, Err(StoreError::Ambiguous(_))));
    let absent = store.find_operation("99").await;
    assert!(matches!(absent, Err(StoreError::NotFound(_))));
    let listed = |filter: ListOperations| {
        let store = store.clone();
        async move { store.operations(&filter).await.unwrap() }
    };
    let newest_first = listed(ListOperations::default()).await;
    assert_eq!(newest_first, [second.clone(), first.clone()]);
    let of_host = listed(ListOperations {
        host: Some(host("kvm1")),
        ..Default::default()
    });
    assert_eq!(of_host.await, [first]);
    become_status(&store, second.uuid, OperationStatus::Failed)
        .await
        .unwrap();
    let active = listed(ListOperations {
        active: true,
        kind: Some("drain".into()),
        ..Default::default()
    });
    assert_eq!(active.await.len(), 1);
}

async fn what_an_operation_has_become_stays_and_only_its_driver_writes(store: Store) {
    let new = begun(&store, &drain(1, "kvm1")).await;
    let mut changes = store.operation_changes();
    let running = become_status(&store, new.uuid, OperationStatus::Running)
        .await
        .unwrap();
    assert_eq!(running.version, 2);
    assert_eq!(changes.recv().await.unwrap(), new.uuid, "it is told");
    let back = become_status(&store, new.uuid, OperationStatus::Planning).await;
    assert!(matches!(back, Err(StoreError::Illegal(_))), "{back:?}");
    let old = Store::first_operation_lease(new.uuid);
    let newer = store
        .take_over_operation(old, "ctl2", term(101, HELD))
        .await
        .unwrap();
    let newer = newer.expect("nobody was faster");
    assert_eq!(newer, OperationLease { epoch: 2, ..old });
    let note = |o: &mut Operation| {
        o.expected_ms = 7;
        true
    };
    let shut_out = store.update_operation(new.uuid, Some(old), note).await;
    assert!(matches!(shut_out, Err(StoreError::Fenced(_))));
    let driver = store.update_operation(new.uuid, Some(newer), note).await;
    assert_eq!(driver.unwrap().expected_ms, 7);
    become_status(&store, new.uuid, OperationStatus::Completed)
        .await
        .unwrap();
    let late = become_status(&store, new.uuid, OperationStatus::Cancelling).await;
    assert!(matches!(late, Err(StoreError::Illegal(_))));
}

async fn an_operation_is_taken_up_by_one(store: Store) {
    let mine = begun(&store, &drain(1, "kvm1")).await;
    let undriven = async |owner: &str, driven: &[OperationLease], at_ms| {
        store
            .undriven_operations(owner, driven, term(at_ms, 0))
            .await
            .unwrap()
    };
    let lease = Store::first_operation_lease(mine.uuid);
    assert_eq!(undriven("ctl2", &[], 100).await, [], "its lease holds");
    assert_eq!(undriven("ctl", &[lease], 50).await, [], "it is driven");
    assert_eq!(
        undriven("ctl", &[], 50).await,
        [lease],
        "its own of an earlier life"
    );
    let own = store
        .take_over_operation(lease, "ctl", term(50, 0))
        .await
        .unwrap();
    let own = own.expect("nobody was faster");
    let again = store
        .take_over_operation(lease, "ctl2", term(50, HELD))
        .await
        .unwrap();
    assert_eq!(again, None);
    let renew = async |held| {
        store
            .renew_operation_leases("ctl", &[held], term(800, HELD))
            .await
            .unwrap()
    };
    assert_eq!(renew(lease).await, [], "an older one is not held");
    assert_eq!(renew(own).await, [own]);
    assert_eq!(undriven("ctl2", &[], 800).await, [], "renewed");
    become_status(&store, mine.uuid, OperationStatus::Failed)
        .await
        .unwrap();
    assert_eq!(
        undriven("ctl2", &[], 2000).await,
        [],
        "what is over is nobody's"
    );
}

/// A migration on its way from one node to another.
async fn under_way(store: &Store, n: u128, from: &str, to: &str) -> Migration {
    let mut m = migration(n, n);
    m.source_host = host(from);
    m.dest_host = Some(host(to));
    match store.admit(&m, None, None, term(0, HELD)).await.unwrap() {
        Admitted::New(m) => *m,
        other => panic!("{other:?}"),
    }
}

async fn turns_keep_every_limit_and_come_back(store: Store) {
    let limits = TurnLimits {
        outbound: 2,
        inbound: 2,
        cluster: 3,
    };
    let turn = |m: &Migration| {
        let (store, id) = (store.clone(), m.uuid);
        async move { store.take_turn(id, limits).await.unwrap() }
    };
    let wait = |why: &str| Turn::Wait { why: why.into() };
    let out1 = under_way(&store, 1, "kvm1", "kvm2").await;
    let out2 = under_way(&store, 2, "kvm1", "kvm3").await;
    let out3 = under_way(&store, 3, "kvm1", "kvm4").await;
    assert_eq!(turn(&out1).await, Turn::Go);
    assert_eq!(turn(&out1).await, Turn::Go, "it keeps its turn");
    assert_eq!(turn(&out2).await, Turn::Go);
    assert_eq!(turn(&out3).await, wait("kvm1 sends 2 already"));
    let in1 = under_way(&store, 4, "kvm5", "kvm2").await;
    assert_eq!(turn(&in1).await, Turn::Go);
    let in2 = under_way(&store, 5, "kvm6", "kvm2").await;
    assert_eq!(turn(&in2).await, wait("kvm2 receives 2 already"));
    let other = under_way(&store, 6, "kvm7", "kvm8").await;
    assert_eq!(turn(&other).await, wait("3 are being sent in all already"));
    let mut changes = store.changes();
    store.end_turn(out1.uuid).await.unwrap();
    assert_eq!(
        changes.recv().await.unwrap(),
        out1.uuid,
        "those who wait wake"
    );
    assert_eq!(turn(&out3).await, Turn::Go);
    // What is over sends no more, whoever forgot to say so.
    let end = |m: &mut Migration| {
        m.status = MigrationStatus::Failed;
        true
    };
    store.update_migration(in1.uuid, end).await.unwrap();
    assert_eq!(turn(&in2).await, Turn::Go);
}

async fn power_is_cut_by_one_that_still_may(store: Store) {
    let silent = report("kvm1", 1, vec![]);
    store.record_report(&silent, 100).await.unwrap();
    let asked = EvacuateOptions::new(host("kvm1"));
    let first = begun(&store, &operation(1, Task::Evacuate(asked))).await;
    let second = begun(&store, &drain(2, "kvm2")).await;
    let claim = async |lease, conductor, at_ms| {
        let claim = FenceClaim {
            host: &host("kvm1"),
            lease,
            conductor,
            term: term(at_ms, HELD),
            life: None,
            heard_at_ms: 100,
            limits: None,
        };
        store.claim_fence(&claim).await
    };
    let lease = Store::first_operation_lease(first.uuid);
    assert_eq!(claim(lease, "ctl", 0).await.unwrap(), Ok(()));
    assert_eq!(claim(lease, "ctl", 1).await.unwrap(), Ok(()), "asked again");
    let another = Store::first_operation_lease(second.uuid);
    let busy = claim(another, "ctl2", 1).await.unwrap();
    assert!(
        matches!(busy, Err(FenceRefusal::UnderWay { .. })),
        "{busy:?}"
    );
    let newer = store
        .take_over_operation(lease, "ctl", term(1_000_000, HELD))
        .await
        .unwrap();
    let newer = newer.expect("its time is up");
    let late = claim(lease, "ctl", 1_000_001).await;
    assert!(matches!(late, Err(StoreError::Fenced(_))), "{late:?}");
    store
        .record_report(&report("kvm1", 2, vec![]), 200)
        .await
        .unwrap();
    let heard = claim(newer, "ctl", 1_000_002).await.unwrap();
    assert_eq!(heard, Err(FenceRefusal::Heard));
}

async fn rivals_for_a_turn_never_exceed_it(store: Store) {
    let limits = TurnLimits {
        outbound: 3,
        inbound: 100,
        cluster: 100,
    };
    let mut tasks = Vec::new();
    for n in 1..=12 {
        let m = under_way(&store, n, "kvm1", "kvm2").await;
        let store = store.clone();
        tasks.push(tokio::spawn(async move {
            store.take_turn(m.uuid, limits).await.unwrap()
        }));
    }
    let mut going = 0;
    for task in tasks {
        going += usize::from(task.await.unwrap() == Turn::Go);
    }
    assert_eq!(going, 3);
}

fn evacuation(n: u128, instance: u128) -> Migration {
    let mut m = migration(n, instance);
    m.way = Way::Evacuation(Evacuation {
        operation: OperationId(Uuid::from_u128(1)),
        proof: ProofOfDeath::Fence {
            agent: "fence".into(),
            at_ms: 1,
            life: None,
        },
        to: Vec::new(),
    });
    m.dest_host = Some(host("kvm2"));
    m
}

async fn an_evacuated_instance_is_remembered_until_its_old_copy_is_gone(store: Store) {
    let kvm1 = host("kvm1");
    let seen = vec![listed(7), listed(8)];
    store
        .record_report(&report("kvm1", 1, seen), 10)
        .await
        .unwrap();
    for m in [evacuation(1, 7), evacuation(2, 8)] {
        store.admit(&m, None, None, term(0, HELD)).await.unwrap();
    }
    let [(moving, unfinished), _] = &store.evacuated_from(&kvm1).await.unwrap()[..] else {
        panic!("two")
    };
    assert_eq!(unfinished.host, None, "not at its end");
    assert_eq!(unfinished.generation, 1, "the old copy has 0");
    let end = |status| {
        move |m: &mut Migration| {
            for next in [MigrationStatus::PreMigrating, MigrationStatus::Done, status] {
                m.become_status(next).unwrap();
            }
            true
        }
    };
    store
        .update_migration(moving.uuid, end(MigrationStatus::Completed))
        .await
        .unwrap();
    let failed = evacuation(2, 8);
    store
        .update_migration(failed.uuid, |m| {
            m.status = MigrationStatus::Failed;
            true
        })
        .await
        .unwrap();
    let left = store.evacuated_from(&kvm1).await.unwrap();
    assert_eq!(left.len(), 1, "one that failed took nothing away");
    assert_eq!(left[0].1.instance, InstanceId(Uuid::from_u128(7)));
    assert_eq!(left[0].1.host, Some(host("kvm2")));
    let (instance, home) = (moving.instance_uuid, host("kvm2"));
    for _ in 0..2 {
        let rebuilt = store
            .rebuilt(Store::first_lease(moving.uuid), instance, &home, 1, 20)
            .await;
        rebuilt.unwrap();
    }
    let row = store.find_instance(&instance.to_string()).await.unwrap();
    assert_eq!((row.host, row.generation), (home, 1));
    assert_eq!(store.claims().await.unwrap(), []);
    store
        .old_copy_removed(&host("kvm2"), moving.uuid)
        .await
        .unwrap();
    assert_eq!(
        store.evacuated_from(&kvm1).await.unwrap().len(),
        1,
        "another node's word is not its own"
    );
    // Deleted since, it is told of all the same: the old copy must not come up.
    let late = report("kvm2", 1, vec![]);
    store.record_report(&late, 30).await.unwrap();
    lists_nothing(&store, "kvm2", 2, 40).await;
    let gone = store.find_instance(&instance.to_string()).await;
    assert!(matches!(gone, Err(StoreError::NotFound(_))), "{gone:?}");
    let left = store.evacuated_from(&kvm1).await.unwrap();
    assert_eq!((left.len(), left[0].1.generation), (1, 1));
    store.old_copy_removed(&kvm1, moving.uuid).await.unwrap();
    assert_eq!(store.evacuated_from(&kvm1).await.unwrap(), []);
}

async fn a_node_declared_down_stays_so_whatever_it_says(store: Store) {
    let kvm1 = host("kvm1");
    let unknown = store.force_down(&kvm1, true).await;
    assert!(matches!(unknown, Err(StoreError::NotFound(_))));
    let say = |n| report("kvm1", n, Vec::new());
    store.record_report(&say(1), 10).await.unwrap();
    assert!(store.force_down(&kvm1, true).await.unwrap().forced_down);
    store.record_report(&say(2), 20).await.unwrap();
    let node = store.node(&kvm1).await.unwrap();
    assert!(node.forced_down && node.heard_at_ms == 20);
    for at_ms in [30, 25] {
        store.heard(&kvm1, at_ms).await.unwrap();
    }
    assert_eq!(store.node(&kvm1).await.unwrap().heard_at_ms, 30);
    assert!(!store.force_down(&kvm1, false).await.unwrap().forced_down);
}

async fn switches_are_on_until_switched(store: Store) {
    assert!(store.is_switched_on("evacuate").await.unwrap());
    store.switch("evacuate", false).await.unwrap();
    assert!(!store.is_switched_on("evacuate").await.unwrap());
    assert!(store.is_switched_on("balance").await.unwrap());
    store.switch("evacuate", true).await.unwrap();
    assert!(store.is_switched_on("evacuate").await.unwrap());
}

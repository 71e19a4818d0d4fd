//! The record's promises to several conductors at once: none fails because another
//! was at it, and none undoes what another wrote.

#![allow(clippy::unwrap_used)] // all of it is test

use std::{collections::BTreeSet, time::Duration};

use crate::common::{HELD, host, listed, migration, postgresql_url, report, term};
use drover_model::{
    guest::PowerState,
    ids::{MigrationId, OperationId},
    migration::{Migration, MigrationStatus, Requester},
    node::InstanceReport,
    operation::{DrainOptions, Operation, Task},
    project::ProjectUsage,
};
use drover_saga::{Event, StepError};
use drover_store::{
    Store, StoreError,
    claims::Resources,
    migrations::{Admitted, Lease},
    operations::Begun,
    sagas::{PutOff, SagaKey},
};
use sqlx::{AnyPool, Row, any::AnyPoolOptions};
use uuid::Uuid;

/// As many as two drains admit at once, and more than there are connections.
const RIVALS: u128 = 40;

promises! {
    those_that_are_admitted_at_once_have_numbers_of_their_own,
    of_rivals_for_one_instance_one_is_admitted_and_the_others_are_told,
    a_request_that_comes_several_times_at_once_makes_one_migration,
    operations_begun_at_once_have_numbers_of_their_own,
    of_rivals_for_one_node_one_begins_and_the_others_are_told,
    what_has_changed_since_it_was_seen_is_not_admitted,
    what_is_put_off_is_on_the_record_with_the_event_that_says_so,
    what_was_put_off_moves_no_guest_that_others_have_moved_since,
    a_guest_that_arrives_counts_all_the_time,
    what_was_taken_over_settles_nothing_by_its_old_lease,
}

/// Has as many do something at once.
async fn at_once<T: Send + 'static, W>(store: &Store, work: impl Fn(Store, u128) -> W) -> Vec<T>
where
    W: Future<Output = T> + Send + 'static,
{
    let tasks: Vec<_> = (1..=RIVALS)
        .map(|n| tokio::spawn(work(store.clone(), n)))
        .collect();
    let mut all = Vec::new();
    for task in tasks {
        all.push(task.await.unwrap());
    }
    all
}

fn lease(m: &Migration) -> Lease {
    Store::first_lease(m.uuid)
}

async fn admit(store: &Store, m: &Migration, unique_id: Option<&str>) -> Admitted {
    let admitted = store.admit(m, None, unique_id, term(0, HELD)).await;
    admitted.unwrap()
}

async fn those_that_are_admitted_at_once_have_numbers_of_their_own(store: Store) {
    let one = |store: Store, n| async move { admit(&store, &migration(n, n), None).await };
    let ids = at_once(&store, one).await.into_iter().map(|a| match a {
        Admitted::New(m) => m.id,
        other => panic!("{other:?}"),
    });
    let ids: BTreeSet<i64> = ids.collect();
    assert!(ids.into_iter().eq(1..=40));
}

async fn of_rivals_for_one_instance_one_is_admitted_and_the_others_are_told(store: Store) {
    let one = |store: Store, n| async move { admit(&store, &migration(n, 7), None).await };
    let (mut new, mut busy) = (0, 0);
    for admitted in at_once(&store, one).await {
        match admitted {
            Admitted::New(_) => new += 1,
            Admitted::Busy(_) => busy += 1,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((new, busy), (1, RIVALS - 1));
}

async fn a_request_that_comes_several_times_at_once_makes_one_migration(store: Store) {
    let one = |store: Store, n| async move { admit(&store, &migration(n, n), Some("u1")).await };
    let (mut new, mut repeated) = (0, 0);
    for admitted in at_once(&store, one).await {
        match admitted {
            Admitted::New(_) => new += 1,
            Admitted::Repeated(_) => repeated += 1,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((new, repeated), (1, RIVALS - 1));
}

async fn begin(store: &Store, n: u128, node: &str) -> Begun {
    let task = Task::Drain(DrainOptions::new(host(node)));
    let operation = Operation {
        uuid: OperationId(Uuid::from_u128(n << 96 | n)),
        ..Operation::new(task, Requester::default(), "ctl", 1)
    };
    let begun = store.begin_operation(&operation, None, term(0, HELD)).await;
    begun.unwrap()
}

async fn operations_begun_at_once_have_numbers_of_their_own(store: Store) {
    let one = |store: Store, n| async move { begin(&store, n, &format!("kvm{n}")).await };
    let ids = at_once(&store, one).await.into_iter().map(|b| match b {
        Begun::New(o) => o.id,
        other => panic!("{other:?}"),
    });
    let ids: BTreeSet<i64> = ids.collect();
    assert!(ids.into_iter().eq(1..=40));
}

async fn of_rivals_for_one_node_one_begins_and_the_others_are_told(store: Store) {
    let one = |store: Store, n| async move { begin(&store, n, "kvm1").await };
    let (mut new, mut busy) = (0, 0);
    for begun in at_once(&store, one).await {
        match begun {
            Begun::New(_) => new += 1,
            Begun::Busy(_) => busy += 1,
            Begun::Repeated(_) => panic!("{begun:?}"),
        }
    }
    assert_eq!((new, busy), (1, RIVALS - 1));
}

/// One guest, on `kvm1`.
async fn with_guest(store: &Store) {
    for (node, guests) in [("kvm1", vec![listed(7)]), ("kvm2", vec![])] {
        let told = report(node, 1, guests);
        store.record_report(&told, 1000).await.unwrap();
    }
}

async fn what_has_changed_since_it_was_seen_is_not_admitted(store: Store) {
    with_guest(&store).await;
    let seen = store.find_instance("vm7").await.unwrap();
    let by = |n, seen| (migration(n, 7), seen);
    let admit = async |(m, seen): (Migration, _)| {
        let admitted = store.admit(&m, Some(seen), None, term(0, HELD)).await;
        admitted.unwrap()
    };
    let Admitted::New(first) = admit(by(1, &seen)).await else {
        panic!("it is as it was seen")
    };
    settle(&store, &first, "kvm2").await;
    let busy = admit(by(2, &seen)).await;
    assert!(matches!(busy, Admitted::Busy(_)), "{busy:?}");
    end(&store, &first).await;
    let moved = admit(by(2, &seen)).await;
    let Admitted::Changed(Some(now)) = moved else {
        panic!("it was moved: {moved:?}")
    };
    assert_eq!(now.host, host("kvm2"));
    let new = admit(by(2, &now)).await;
    assert!(matches!(new, Admitted::New(_)), "{new:?}");
    let mut gone = (*now).clone();
    gone.id.0 = Uuid::from_u128(8);
    let gone = admit((migration(3, 8), &gone)).await;
    assert_eq!(gone, Admitted::Changed(None));
}

async fn settle(store: &Store, m: &Migration, node: &str) {
    let (lease, instance, node) = (lease(m), m.instance_uuid, host(node));
    let settled = store.settle(lease, instance, &node, None, None, 1001);
    settled.await.unwrap();
}

async fn end(store: &Store, m: &Migration) {
    let ended = store.update_migration(m.uuid, |m| {
        m.status = MigrationStatus::Completed;
        true
    });
    ended.await.unwrap();
}

async fn what_is_put_off_is_on_the_record_with_the_event_that_says_so(store: Store) {
    let m = migration(1, 7);
    admit(&store, &m, None).await;
    let saga = SagaKey::of_move(m.uuid);
    let put_off = [Event::PutOff {
        step: "tidy".into(),
        error: StepError::new(drover_model::error::ErrorClass::Retryable, "away"),
    }];
    let append = async |epoch| {
        let lease = Lease {
            migration: m.uuid,
            epoch,
        };
        let tell = |_: &mut Migration| Ok(Vec::new());
        let by = (lease, &saga);
        store.append_saga_events(by, 0, &put_off, 5, tell).await
    };
    let put_off_steps = async || store.put_off_steps("ctl", term(5, HELD), 10).await.unwrap();
    append(7).await.unwrap_err();
    end(&store, &m).await;
    assert_eq!(put_off_steps().await, [], "not its");
    append(1).await.unwrap();
    let tidy = PutOff {
        lease: Store::first_lease(m.uuid),
        step: "tidy".to_owned(),
        attempts: 0,
    };
    assert_eq!(put_off_steps().await, [tidy]);
}

async fn what_was_put_off_moves_no_guest_that_others_have_moved_since(store: Store) {
    with_guest(&store).await;
    let (kvm1, kvm2) = (host("kvm1"), host("kvm2"));
    let claimed = Resources {
        vcpus: 1,
        ..Resources::default()
    };
    let begun = async |n| {
        let m = admit(&store, &migration(n, 7), None).await;
        let Admitted::New(m) = m else { panic!("{m:?}") };
        let claim = store.claim(lease(&m), &kvm2, claimed).await;
        claim.unwrap().unwrap();
        m
    };
    let late = async |m: &Migration| {
        let settled = store.settle_late(m, &kvm1, &kvm2, None, None, 1002).await;
        settled.unwrap();
        assert_eq!(store.claims().await.unwrap(), [], "the claim is free");
        store.find_instance("vm7").await.unwrap().host
    };
    // It was put off, and nobody touched the guest since: the record follows.
    let first = begun(1).await;
    end(&store, &first).await;
    assert_eq!(late(&first).await, kvm2);
    assert_eq!(late(&first).await, kvm2, "once more changes nothing");
    // Moved back since, it stays where that put it.
    let back = begun(2).await;
    settle(&store, &back, "kvm1").await;
    end(&store, &back).await;
    assert_eq!(late(&first).await, kvm1);
}

async fn a_guest_that_arrives_counts_all_the_time(store: Store) {
    let arriving = report("kvm2", 1, vec![]);
    store.record_report(&arriving, 1000).await.unwrap();
    with_guest(&store).await;
    let wanted = Resources {
        vcpus: 1,
        ..Resources::default()
    };
    for n in 1..=50 {
        let m = migration(n, 7);
        admit(&store, &m, None).await;
        settle(&store, &m, "kvm1").await;
        let claim = store.claim(lease(&m), &host("kvm2"), wanted).await;
        claim.unwrap().unwrap();
        let settling = tokio::spawn({
            let (store, m) = (store.clone(), m.clone());
            async move { settle(&store, &m, "kvm2").await }
        });
        while !settling.is_finished() {
            let used = store.usage(&arriving).await.unwrap().used.vcpus;
            assert_eq!(used, 1, "neither on its way nor there, or both");
            let all = store.usages(&[&arriving]).await.unwrap();
            assert_eq!(all[0].used.vcpus, 1);
            // A record that answers at once waits for nobody.
            tokio::task::yield_now().await;
        }
        settling.await.unwrap();
        end(&store, &m).await;
    }
}

async fn what_was_taken_over_settles_nothing_by_its_old_lease(store: Store) {
    let node = report("kvm2", 1, vec![]);
    store.record_report(&node, 1000).await.unwrap();
    with_guest(&store).await;
    let m = migration(1, 7);
    admit(&store, &m, None).await;
    let (old, kvm2, id) = (lease(&m), host("kvm2"), m.instance_uuid);
    let wanted = Resources {
        vcpus: 1,
        ..Resources::default()
    };
    let new = store.take_over(old, "another", term(1_000_000, HELD)).await;
    let new = new.unwrap().expect("its time is up");
    store.claim(new, &kvm2, wanted).await.unwrap().unwrap();
    let project = "other".parse().unwrap();
    let fenced = [
        store.claim(old, &kvm2, wanted).await.map(drop),
        store.release_claim(old).await,
        store.settle(old, id, &kvm2, None, None, 2).await,
        store.rebuilt(old, id, &kvm2, 1, 2).await,
        store
            .claim_quota(old, &project, ProjectUsage::default())
            .await
            .map(drop),
        store.release_quota(old).await,
        store.hand_over(old, id, &project, None, 2).await,
    ];
    for written in fenced {
        assert!(matches!(written, Err(StoreError::Fenced(_))), "{written:?}");
    }
    assert_eq!(store.claims().await.unwrap().len(), 1);
    assert_eq!(store.find_instance("vm7").await.unwrap().host, host("kvm1"));
    let settled = store.settle(new, id, &kvm2, None, None, 3).await;
    settled.unwrap();
    assert_eq!(store.claims().await.unwrap(), []);
}

#[tokio::test]
async fn a_schema_is_not_changed_under_those_who_use_it_unless_somebody_says_so() {
    let Some(url) = postgresql_url().await else {
        return;
    };
    let pool = AnyPool::connect(&url).await.unwrap();
    let mut tables = pool.acquire().await.unwrap();
    let at_work = Store::open(&url).await.unwrap();
    let older = "DELETE FROM _sqlx_migrations \
        WHERE version = (SELECT MAX(version) FROM _sqlx_migrations)";
    let newer = "UPDATE _sqlx_migrations SET version = version + 93 \
        WHERE version = (SELECT MAX(version) FROM _sqlx_migrations)";
    let stop = "UPDATE compatibility SET minimum = 100";
    sqlx::query(newer).execute(&mut *tables).await.unwrap();
    Store::open(&url)
        .await
        .expect("a newer one that only expanded");
    sqlx::query(stop).execute(&mut *tables).await.unwrap();
    let error = Store::open(&url).await.err().expect("it contracted");
    assert!(error.to_string().contains("use the newer one"), "{error}");

    let Some(url) = postgresql_url().await else {
        return;
    };
    let older_pool = AnyPool::connect(&url).await.unwrap();
    drop(at_work);
    let at_work = Store::open(&url).await.unwrap();
    sqlx::query(older).execute(&older_pool).await.unwrap();
    let error = Store::open(&url).await.err().expect("others use it");
    assert!(
        error.to_string().contains("drover-conductor migrate"),
        "{error}"
    );
    drop(at_work);
}

#[tokio::test]
async fn those_who_are_at_work_while_the_schema_is_changed_go_on() {
    let Some(url) = postgresql_url().await else {
        return;
    };
    let newer = Store::open(&url).await.unwrap();
    let work = "SELECT * FROM instances WHERE uuid = 'x'";
    // As an older conductor does: by the schema before the last change, under the lock
    // that all hold.
    let older = AnyPoolOptions::new()
        .max_connections(1)
        .after_connect(|connection, _| {
            Box::pin(async move {
                let hold = "SELECT pg_advisory_lock_shared(3335, hashtext(current_schema()))";
                sqlx::query(hold).execute(connection).await.map(drop)
            })
        })
        .connect(&url)
        .await
        .unwrap();
    let without = "ALTER TABLE instances DROP COLUMN missing_reports, DROP COLUMN node_is_new; \
         ALTER TABLE definitions DROP COLUMN gone_at_ms; \
         DELETE FROM _sqlx_migrations WHERE version = 9";
    sqlx::raw_sql(without).execute(&older).await.unwrap();
    drop(newer);
    for _ in 0..2 {
        sqlx::query(work).fetch_all(&older).await.unwrap();
    }
    Store::migrate(&url).await.unwrap();
    sqlx::query(work).fetch_all(&older).await.unwrap();
}

/// Waits until somebody waits for a backend, and says who.
async fn waits_for(pool: &AnyPool, pid: i32) -> i32 {
    loop {
        let waiting =
            sqlx::query("SELECT pid FROM pg_stat_activity WHERE $1 = ANY(pg_blocking_pids(pid))")
                .bind(pid)
                .fetch_optional(pool)
                .await
                .unwrap();
        if let Some(row) = waiting {
            return row.get(0);
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_report_that_is_older_than_a_move_does_not_undo_it() {
    let Some(url) = postgresql_url().await else {
        return;
    };
    let store = Store::open(&url).await.unwrap();
    with_guest(&store).await;
    let m = migration(1, 7);
    admit(&store, &m, None).await;
    let nothing = Resources::default();
    let claim = store.claim(lease(&m), &host("kvm2"), nothing).await;
    claim.unwrap().unwrap();

    // Somebody keeps the move from its commit, after it has written where the guest is.
    let pool = AnyPool::connect(&url).await.unwrap();
    let mut held = pool.begin().await.unwrap();
    let row = sqlx::query("SELECT pg_backend_pid() FROM claims FOR UPDATE");
    let holder: i32 = row.fetch_one(&mut *held).await.unwrap().get(0);
    let (moving, moved) = (store.clone(), m.clone());
    let moving = tokio::spawn(async move { settle(&moving, &moved, "kvm2").await });
    let mover = waits_for(&pool, holder).await;

    // The old node reports what it saw at the switch-over.
    let paused = InstanceReport {
        power_state: PowerState::Paused,
        ..listed(7)
    };
    let old = report("kvm1", 2, vec![paused]);
    let reporting = store.clone();
    let reporting = tokio::spawn(async move { reporting.record_report(&old, 1002).await });
    waits_for(&pool, mover).await;
    held.rollback().await.unwrap();
    moving.await.unwrap();
    reporting.await.unwrap().unwrap();
    let row = store.find_instance("vm7").await.unwrap();
    assert_eq!(row.host, host("kvm2"), "{row:?}");
}

#[tokio::test]
async fn conductors_hold_leases_by_one_clock() {
    let Some(url) = postgresql_url().await else {
        return;
    };
    let store = Store::open(&url).await.unwrap();
    let id: MigrationId = migration(1, 7).uuid;
    admit(&store, &migration(1, 7), None).await;
    let lease = Store::first_lease(id);
    for ahead in [term(u64::MAX / 4, HELD), term(0, HELD)] {
        let free = store.undriven("other", &[], ahead).await.unwrap();
        assert_eq!(free, [], "a clock that is wrong frees nothing");
    }
    store
        .renew_leases("ctl", &[lease], term(u64::MAX / 4, 0))
        .await
        .unwrap();
    crate::common::passed().await;
    let free = store.undriven("other", &[], term(0, HELD)).await.unwrap();
    assert_eq!(free, [lease]);
}

//! Leases, in virtual time: nothing is owned without being
//! driven, nothing waits for what does not answer, and one that stood still does
//! nothing more with what is another's by now.

#![allow(clippy::unwrap_used)] // all of it is test

use std::time::Duration;

use drover_compute::hypervisor::fake::{GuestBuilder, NodeSpec};
use drover_model::{
    api::conductor::{MigrationRef, method},
    ids::{HostName, InstanceId},
    migration::{
        ColdOptions, Ending, LiveOptions, Migration, MigrationStatus as S, Requester, Way,
    },
    operation::{DrainOptions, EvacuateOptions, Operation, OperationStatus, Task},
};
use drover_saga::Event;
use drover_store::{Store, Term, sagas::SagaKey};
use drover_tests::cloud::{CTL, Cloud, eventually};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};

const IMAGES: &str = "/var/lib/libvirt/images";
const GIB: u64 = 1 << 30;
/// A lease that ran out long ago.
const SHORT: Term = Term {
    now_ms: 0,
    lease_ms: 1,
};

fn host(name: &str) -> HostName {
    name.parse().unwrap()
}

async fn guest(cloud: &Cloud, node: &str, name: &str, memory_mib: u64) -> InstanceId {
    let disk = format!("{IMAGES}/{name}.qcow2");
    let builder = GuestBuilder::new(name).memory_mib(memory_mib);
    let id = cloud.fabric.add_guest(node, builder.disk(&disk, 64));
    cloud.adopted(id).await;
    id
}

async fn moving(cloud: &Cloud, id: InstanceId, to: &str) -> Migration {
    let accepted = cloud.migrate(id, Some(to), LiveOptions::default()).await;
    accepted.unwrap()
}

/// Three nodes that share their images; the first two are slow to send.
async fn slow_cloud(seed: u64) -> Cloud {
    let mut cloud = Cloud::start(seed).await;
    cloud.add_node("kvm3", NodeSpec::default()).await;
    let nodes = ["kvm1", "kvm2", "kvm3"];
    cloud.fabric.share_directory(IMAGES, &nodes, 1000 * GIB);
    cloud.fabric.set_link_mib_s("kvm1", "kvm2", 10);
    cloud
}

async fn now(cloud: &Cloud, m: &Migration) -> Migration {
    cloud.store.migration(m.uuid).await.unwrap()
}

async fn until(cloud: &Cloud, m: &Migration, status: S) -> Migration {
    let there = |m: &Migration| m.status == status;
    cloud.until(m.uuid, status.as_str(), there).await
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_read_does_not_keep_the_rest_from_going_on() {
    let mut cloud = slow_cloud(1).await;
    let mut under_way = Vec::new();
    for name in ["web1", "web2"] {
        let id = guest(&cloud, "kvm1", name, 1024).await;
        under_way.push(moving(&cloud, id, "kvm2").await);
    }
    until(&cloud, &under_way[1], S::Running).await;
    cloud.kill_conductor();
    let spoilt = "UPDATE migrations SET record = '{' WHERE id = 1";
    cloud.store.damage(spoilt).await.unwrap();
    cloud.start_conductor().await;
    let m = cloud.end(under_way[1].uuid).await;
    assert_eq!((m.status, m.attempt), (S::Completed, 2), "{m:#?}");
}

#[tokio::test(start_paused = true)]
async fn an_operation_that_cannot_be_read_does_not_keep_others_from_going_on() {
    let mut cloud = Cloud::start(2).await;
    cloud.kill_conductor();
    for (n, name) in ["kvm1", "kvm2"].into_iter().enumerate() {
        let task = Task::Drain(DrainOptions::new(host(name)));
        let new = Operation::new(task, Requester::default(), CTL, n as u64);
        cloud
            .store
            .begin_operation(&new, None, SHORT)
            .await
            .unwrap();
    }
    let spoilt = "UPDATE operations SET record = '{' WHERE id = 1";
    cloud.store.damage(spoilt).await.unwrap();
    cloud.start_conductor().await;
    let second = cloud.store.find_operation("2").await.unwrap();
    assert!(cloud.operation_end(second.uuid).await.status.is_final());
}

#[tokio::test(start_paused = true)]
async fn a_wish_that_nobody_drives_is_taken_up() {
    let cloud = Cloud::start(3).await;
    let id = guest(&cloud, "kvm1", "web", 512).await;
    let way = Way::Cold(ColdOptions::default());
    let m = cloud.migrate_by(id, Some("kvm2"), &way).await.unwrap();
    until(&cloud, &m, S::Finished).await;
    // As whoever was asked leaves it when the record fails right after the commit.
    let wish = |m: &mut Migration| {
        m.ending = Some(Ending::Confirm);
        m.ending_attempt += 1;
        m.become_status(S::Confirming).is_ok()
    };
    cloud.store.update_migration(m.uuid, wish).await.unwrap();
    let m = cloud.end(m.uuid).await;
    assert_eq!(m.status, S::Confirmed, "{m:#?}");
}

#[tokio::test(start_paused = true)]
async fn an_operation_that_nobody_drives_is_taken_up() {
    let cloud = Cloud::start(4).await;
    let task = Task::Drain(DrainOptions::new(host("kvm2")));
    let new = Operation::new(task, Requester::default(), CTL, 0);
    let long = Term {
        lease_ms: 1 << 50,
        ..SHORT
    };
    let begun = cloud.store.begin_operation(&new, None, long);
    begun.await.unwrap();
    let ended = cloud.operation_end(new.uuid).await;
    assert_eq!(ended.status, OperationStatus::Completed, "{ended:#?}");
}

#[tokio::test(start_paused = true)]
async fn a_journal_that_makes_no_sense_is_stuck_and_says_so() {
    let mut cloud = slow_cloud(5).await;
    let id = guest(&cloud, "kvm1", "web", 1024).await;
    let m = moving(&cloud, id, "kvm2").await;
    until(&cloud, &m, S::Running).await;
    cloud.kill_conductor();
    let saga = SagaKey::of_move(m.uuid);
    let at = cloud.store.saga_events(&saga).await.unwrap().len();
    let step = "settle".to_owned();
    let lease = Store::first_lease(m.uuid);
    let senseless = [Event::Undone { step }];
    let nothing = |_: &mut Migration| Ok(Vec::new());
    let written = cloud
        .store
        .append_saga_events((lease, &saga), at, &senseless, 1, nothing);
    written.await.unwrap();
    cloud.start_conductor().await;
    until(&cloud, &m, S::Stuck).await;
    // Tried again and again it says so once.
    sleep(Duration::from_secs(300)).await;
    let m = now(&cloud, &m).await;
    assert_eq!(m.status, S::Stuck);
    let said = m
        .decisions
        .iter()
        .filter(|d| d.text.contains("makes no sense"));
    assert_eq!(said.count(), 1, "{m:#?}");
}

/// A migration that is over has a step of tidying put off.
async fn tidied_later(cloud: &Cloud, m: &Migration, step: &str) {
    let put_off = cloud.store.put_off(Store::first_lease(m.uuid), step, 1);
    put_off.await.unwrap();
}

fn was_tidied(m: &Migration) -> bool {
    m.warnings.iter().any(|text| text.contains("is done now"))
}

#[tokio::test(start_paused = true)]
async fn a_node_that_does_not_answer_holds_up_no_lease() {
    let mut cloud = slow_cloud(6).await;
    cloud.start_conductor_named("other").await;
    let mut over = Vec::new();
    for n in 0..12 {
        let id = guest(&cloud, "kvm1", &format!("web{n}"), 64).await;
        let m = moving(&cloud, id, "kvm3").await;
        over.push(cloud.end(m.uuid).await);
    }
    let id = guest(&cloud, "kvm1", "big", 4096).await;
    let m = moving(&cloud, id, "kvm2").await;
    let running = until(&cloud, &m, S::Running).await;
    for m in &over {
        tidied_later(&cloud, m, "settle").await;
    }
    cloud.broker.cut("kvm3");
    sleep(Duration::from_secs(240)).await;
    cloud.broker.heal("kvm3");
    let m = cloud.end(m.uuid).await;
    assert_eq!(m.status, S::Completed, "{m:#?}");
    assert_eq!((m.attempt, &m.owner), (1, &running.owner), "{m:#?}");
    for m in over {
        cloud.until(m.uuid, "tidied", was_tidied).await;
    }
}

/// The guest has moved, and the database does not take that down: what is put off then is
/// the record's own part, claims and all.
#[tokio::test(start_paused = true)]
async fn a_move_that_cannot_be_recorded_is_recorded_later() {
    for way in [Way::default(), Way::Cold(ColdOptions::default())] {
        let cloud = slow_cloud(12).await;
        let id = guest(&cloud, "kvm1", "web", 64).await;
        let full = "CREATE TRIGGER full BEFORE UPDATE OF host ON instances \
                    WHEN NEW.host <> OLD.host BEGIN SELECT RAISE(ABORT, 'full'); END";
        cloud.store.damage(full).await.unwrap();
        let m = cloud.migrate_by(id, Some("kvm2"), &way).await.unwrap();
        let m = cloud.until(m.uuid, "at rest", |m| m.status.rests()).await;
        let row = async || cloud.store.find_instance(&id.to_string()).await.unwrap();
        assert_eq!(row().await.host, host("kvm1"), "{m:#?}");
        cloud.store.damage("DROP TRIGGER full").await.unwrap();
        let m = cloud.until(m.uuid, "tidied", was_tidied).await;
        assert_eq!(row().await.host, host("kvm2"), "{m:#?}");
        let claims = cloud.store.claims().await.unwrap();
        assert_eq!(claims.len(), usize::from(m.status == S::Finished));
    }
}

#[tokio::test(start_paused = true)]
async fn what_fails_for_ever_starves_nothing() {
    let cloud = Cloud::start(7).await;
    for n in 0..300_u128 {
        let instance = InstanceId(uuid::Uuid::from_u128(1 << 64 | n));
        let mut m = Migration::new(instance, host("kvm1"), Way::default(), 1);
        m.owner = CTL.to_owned();
        m.status = S::Failed;
        cloud.store.admit(&m, None, None, SHORT).await.unwrap();
        tidied_later(&cloud, &m, "prepare").await;
    }
    let id = guest(&cloud, "kvm1", "web", 64).await;
    let m = moving(&cloud, id, "kvm2").await;
    let m = cloud.end(m.uuid).await;
    tidied_later(&cloud, &m, "settle").await;
    let tidied = cloud.until(m.uuid, "tidied", was_tidied);
    let tidied = timeout(Duration::from_secs(300), tidied).await;
    assert_eq!(tidied.unwrap().status, S::Completed);
}

#[tokio::test(start_paused = true)]
async fn two_conductors_do_not_tidy_up_the_same() {
    let mut cloud = Cloud::start(8).await;
    cloud.start_conductor_named("other").await;
    let mut over = Vec::new();
    for n in 0..10 {
        let id = guest(&cloud, "kvm1", &format!("web{n}"), 64).await;
        let m = moving(&cloud, id, "kvm2").await;
        over.push(cloud.end(m.uuid).await);
    }
    // Of one that is gone either may do it.
    let gone = "UPDATE migrations SET owner = 'gone', lease_until_ms = 0";
    cloud.store.damage(gone).await.unwrap();
    for m in &over {
        tidied_later(&cloud, m, "settle").await;
    }
    for m in &over {
        cloud.until(m.uuid, "tidied", was_tidied).await;
    }
    sleep(Duration::from_secs(60)).await;
    for m in &over {
        let m = now(&cloud, m).await;
        let said = m.warnings.iter().filter(|t| t.contains("is done now"));
        assert_eq!(said.count(), 1, "{m:#?}");
    }
}

/// One live migration sends and five wait, for a turn or for a slot.
async fn queued_live_migrations(seed: u64, slots: usize) {
    let mut cloud = slow_cloud(seed).await;
    cloud.settings.max_concurrent_migrations = slots;
    cloud.settings.max_transfers = 1;
    cloud
        .kill_and_start("conductor", Duration::from_secs(1))
        .await;
    let lost = guest(&cloud, "kvm3", "lost", 64).await;
    eventually("its definition is kept", async || {
        cloud.store.kept_definition(lost).await.unwrap()
    })
    .await;
    let cold = guest(&cloud, "kvm1", "cold", 64).await;
    let way = Way::Cold(ColdOptions::default());
    let cold = cloud.migrate_by(cold, Some("kvm2"), &way).await.unwrap();
    until(&cloud, &cold, S::Finished).await;
    let mut queued = Vec::new();
    for n in 0..6 {
        let memory_mib = if n == 0 { 4096 } else { 64 };
        let id = guest(&cloud, "kvm1", &format!("web{n}"), memory_mib).await;
        queued.push(moving(&cloud, id, "kvm2").await);
    }
    let first = queued.remove(0);
    until(&cloud, &first, S::Running).await;
    for m in &queued {
        let waits = |m: &Migration| match slots {
            1 => m.status == S::Accepted,
            // All are made ready meanwhile: what waits for its turn has no slot.
            _ => m.progress.note.is_some(),
        };
        let waiting = cloud.until(m.uuid, "waiting", waits);
        timeout(Duration::from_secs(60), waiting).await.unwrap();
    }
    cloud.fabric.power_off("kvm3");
    cloud.kill_agent("kvm3");
    let work = async {
        let which = MigrationRef {
            migration: cold.uuid.to_string(),
        };
        let asked = cloud.call::<_, Migration>(method::CONFIRM_MIGRATION, &which);
        asked.await.unwrap();
        assert_eq!(cloud.end(cold.uuid).await.status, S::Confirmed);
        let options = EvacuateOptions {
            confirmed_off: true,
            ..EvacuateOptions::new(host("kvm3"))
        };
        sleep(Duration::from_secs(40)).await;
        let evacuated = cloud.operate(&Task::Evacuate(options)).await.unwrap();
        let ended = cloud.operation_end(evacuated.uuid).await;
        assert_eq!(ended.status, OperationStatus::Completed, "{ended:#?}");
    };
    timeout(Duration::from_secs(120), work).await.unwrap();
    let first = now(&cloud, &first).await;
    assert_eq!(first.status, S::Running, "all the while");
}

#[tokio::test(start_paused = true)]
async fn queued_live_migrations_hold_up_nothing_else() {
    queued_live_migrations(9, 2).await;
}

#[tokio::test(start_paused = true)]
async fn an_evacuation_and_a_confirm_need_no_slot() {
    queued_live_migrations(12, 1).await;
}

#[tokio::test(start_paused = true)]
async fn one_that_waits_for_a_slot_is_aborted_at_once() {
    let mut cloud = slow_cloud(10).await;
    cloud.settings.max_concurrent_migrations = 1;
    cloud
        .kill_and_start("conductor", Duration::from_secs(1))
        .await;
    let mut under_way = Vec::new();
    for n in 0..3 {
        let id = guest(&cloud, "kvm1", &format!("web{n}"), 4096).await;
        under_way.push(moving(&cloud, id, "kvm2").await);
    }
    until(&cloud, &under_way[0], S::Running).await;
    let last = now(&cloud, &under_way[2]).await;
    assert_eq!(last.status, S::Accepted);
    cloud.abort(last.uuid).await.unwrap();
    let ended = timeout(Duration::from_secs(10), cloud.end(last.uuid)).await;
    assert_eq!(ended.unwrap().status, S::Cancelled);
    assert_eq!(now(&cloud, &under_way[0]).await.status, S::Running);
}

#[tokio::test(start_paused = true)]
async fn one_that_stood_still_lets_go_of_what_it_drives() {
    let mut cloud = slow_cloud(11).await;
    let (stands, standing) = watch::channel(false);
    cloud.kill_conductor();
    let hanging = cloud.store.of_another_process(standing);
    cloud.start_conductor_on("hanging", hanging).await;
    let id = guest(&cloud, "kvm1", "big", 4096).await;
    let m = moving(&cloud, id, "kvm2").await;
    until(&cloud, &m, S::Running).await;
    assert_eq!(cloud.driven_by("hanging"), 1);
    // It neither reads nor writes nor hears anything, longer than its lease.
    stands.send_replace(true);
    cloud.broker.cut("hanging");
    cloud.start_conductor_named("other").await;
    let taken = |m: &Migration| m.attempt == 2;
    let m = cloud.until(m.uuid, "taken over", taken).await;
    assert_eq!(m.owner, "other");
    assert_eq!(cloud.driven_by("hanging"), 0, "it let go in time");
    cloud.broker.heal("hanging");
    stands.send_replace(false);
    let m = cloud.end(m.uuid).await;
    assert_eq!((m.status, m.attempt), (S::Completed, 2), "{m:#?}");
    assert_eq!(m.owner, "other");
    // And the agents know: each step said under which lease it was asked for.
    let journal = cloud.journal("kvm1", m.uuid);
    let state = journal.parent().unwrap().parent().unwrap();
    let seen = std::fs::read_to_string(state.join(format!("seen/{}.json", m.uuid))).unwrap();
    assert!(seen.contains("\"epoch\": 2"), "{seen}");
    cloud.check(&m).await;
}

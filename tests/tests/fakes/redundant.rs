//! Nothing is destroyed but what is proven redundant: journals that are lost, files
//! that are missing, nodes that were installed anew, and people who move, stop,
//! start and undefine guests by hand, at every moment between two steps.

#![allow(clippy::unwrap_used)] // all of it is test

use std::time::Duration;

use drover_compute::hypervisor::{
    ColdDriver, Definition, Hypervisor, HypervisorError,
    fake::{At, Call, Content, Fault, GuestBuilder, NodeSpec, script::Effect},
};
use drover_model::{
    api::conductor::{MigrationRef, method},
    guest::{PowerState, Presence},
    ids::InstanceId,
    migration::{ColdOptions, LiveOptions, Migration, MigrationStatus as S, Way},
};
use drover_tests::cloud::{Cloud, eventually};

const IMAGES: &str = "/var/lib/libvirt/images";
const DISK: &str = "/var/lib/libvirt/images/web.qcow2";
const DATA: &str = "/var/lib/libvirt/images/data.raw";
const OFF: Presence = Presence::Present(PowerState::Shutdown);

fn web() -> GuestBuilder {
    GuestBuilder::new("web")
        .memory_mib(1024)
        .dirty_mib_s(50)
        .working_set_mib(128)
        .disk(DISK, 256)
        .disk(DATA, 64)
}

async fn guest(cloud: &Cloud, builder: GuestBuilder) -> InstanceId {
    let id = cloud.fabric.add_guest("kvm1", builder);
    cloud.adopted(id).await;
    id
}

async fn rest(cloud: &Cloud, m: &Migration) -> Migration {
    cloud.until(m.uuid, "at rest", |m| m.status.rests()).await
}

async fn end_with(cloud: &Cloud, m: &Migration, what: &str) {
    let which = MigrationRef {
        migration: m.uuid.to_string(),
    };
    let taken: Migration = cloud.call(what, &which).await.expect("it is taken");
    assert_eq!(taken.uuid, m.uuid);
}

/// A guest that has moved cold from kvm1 to kvm2, and was not confirmed.
async fn finished(state: PowerState) -> (Cloud, InstanceId, Migration) {
    let cloud = Cloud::start(1).await;
    let id = guest(&cloud, web().state(state)).await;
    let way = Way::Cold(ColdOptions::default());
    let m = cloud.migrate_by(id, Some("kvm2"), &way).await;
    let m = rest(&cloud, &m.expect("it is accepted")).await;
    assert_eq!(m.status, S::Finished, "{m:#?}");
    (cloud, id, m)
}

/// The guest's disk on a node, if all of it is there.
fn disk(cloud: &Cloud, host: &str) -> Option<Content> {
    let whole = |path| {
        let file = cloud.fabric.file(host, path)?;
        matches!(file.content, Content::Disk { .. }).then_some(file.content)
    };
    whole(DATA)?;
    whole(DISK)
}

fn at(cloud: &Cloud, host: &str, id: InstanceId) -> Presence {
    let places = cloud.fabric.whereabouts(id);
    let here = places.into_iter().find(|(name, _)| name.as_str() == host);
    here.map_or(Presence::Absent, |(_, presence)| presence)
}

fn runs_on(cloud: &Cloud, id: InstanceId) -> Option<String> {
    cloud.fabric.running_on(id).map(|host| host.to_string())
}

fn said(m: &Migration, words: &str) -> bool {
    let warned = m.warnings.iter().any(|w| w.contains(words));
    warned
        || m.end_reason
            .as_ref()
            .is_some_and(|r| r.to_string().contains(words))
}

// ---- revert and confirm

/// The source's agent loses its state, with the node or without.
#[tokio::test(start_paused = true)]
async fn a_source_that_lost_what_it_kept_refuses_a_revert_and_the_guest_runs_on() {
    for files_too in [false, true] {
        let (mut cloud, id, m) = finished(PowerState::Running).await;
        cloud.kill_agent("kvm1");
        cloud.lose_state("kvm1");
        if files_too {
            cloud.fabric.remove_directory("kvm1", IMAGES);
        }
        cloud.start_agent("kvm1").await;
        end_with(&cloud, &m, method::REVERT_MIGRATION).await;
        let m = rest(&cloud, &m).await;
        assert_eq!(m.status, S::Finished, "{m:#?}");
        assert!(said(&m, "keeps nothing aside"), "{m:#?}");
        assert_eq!(runs_on(&cloud, id).as_deref(), Some("kvm2"));
        assert!(disk(&cloud, "kvm2").is_some());
        cloud.fabric.check_invariants().unwrap();
        // What the guest has is confirmed all the same, and nothing more is lost.
        end_with(&cloud, &m, method::CONFIRM_MIGRATION).await;
        let m = rest(&cloud, &m).await;
        assert_eq!(m.status, S::Confirmed, "{m:#?}");
        assert!(said(&m, "knows nothing of this migration"), "{m:#?}");
        assert_eq!(runs_on(&cloud, id).as_deref(), Some("kvm2"));
        cloud.fabric.check_invariants().unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_source_that_lacks_one_file_refuses_a_revert() {
    for path in [DISK, DATA] {
        let (cloud, id, m) = finished(PowerState::Running).await;
        let kept = format!("{path}.kept-{}", m.uuid);
        let driver = cloud.fabric.driver("kvm1");
        driver.remove_disk(&kept).await.expect("it is there");
        end_with(&cloud, &m, method::REVERT_MIGRATION).await;
        let m = rest(&cloud, &m).await;
        assert_eq!(m.status, S::Finished, "{m:#?}");
        assert!(said(&m, &format!("lacks {path}")), "{m:#?}");
        assert_eq!(runs_on(&cloud, id).as_deref(), Some("kvm2"));
        assert!(disk(&cloud, "kvm2").is_some());
        cloud.fabric.check_invariants().unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_destination_that_lost_its_journal_keeps_its_guest() {
    let (mut cloud, id, m) = finished(PowerState::Running).await;
    cloud.kill_agent("kvm2");
    cloud.lose_state("kvm2");
    cloud.start_agent("kvm2").await;
    end_with(&cloud, &m, method::REVERT_MIGRATION).await;
    let m = rest(&cloud, &m).await;
    assert_eq!(m.status, S::Finished, "{m:#?}");
    assert_eq!(runs_on(&cloud, id).as_deref(), Some("kvm2"));
    assert!(disk(&cloud, "kvm2").is_some());
    cloud.fabric.check_invariants().unwrap();
    end_with(&cloud, &m, method::CONFIRM_MIGRATION).await;
    let m = rest(&cloud, &m).await;
    assert_eq!(m.status, S::Confirmed, "{m:#?}");
    assert_eq!(runs_on(&cloud, id).as_deref(), Some("kvm2"));
}

/// Somebody moved it on to a third node; the record may know it by now, or not, and the
/// node from which it went may have lost its journal.
#[tokio::test(start_paused = true)]
async fn a_guest_that_was_moved_on_by_hand_is_not_reverted_and_is_confirmed() {
    for (is_known, forgets) in [(true, false), (false, false), (true, true)] {
        let (mut cloud, id, m) = finished(PowerState::Running).await;
        cloud.add_node("kvm3", NodeSpec::default()).await;
        if forgets {
            cloud.kill_agent("kvm2");
            cloud.lose_state("kvm2");
            cloud.start_agent("kvm2").await;
        }
        if !is_known {
            cloud.kill_agent("kvm3");
        }
        by_hand(&cloud, id, Hand::MovesOn).await;
        if is_known {
            follows(&cloud, id, "kvm3").await;
        }
        end_with(&cloud, &m, method::REVERT_MIGRATION).await;
        let m = rest(&cloud, &m).await;
        assert_eq!(m.status, S::Finished, "{m:#?}");
        assert!(said(&m, "not on kvm2 any more, and kvm3"), "{m:#?}");
        assert_eq!(runs_on(&cloud, id).as_deref(), Some("kvm3"));
        cloud.fabric.check_invariants().unwrap();
        assert_eq!(at(&cloud, "kvm2", id), Presence::Absent);

        if !is_known {
            cloud.start_agent("kvm3").await;
            follows(&cloud, id, "kvm3").await;
        }
        end_with(&cloud, &m, method::CONFIRM_MIGRATION).await;
        let m = rest(&cloud, &m).await;
        assert_eq!(m.status, S::Confirmed, "{m:#?}");
        assert_eq!(runs_on(&cloud, id).as_deref(), Some("kvm3"));
        assert!(disk(&cloud, "kvm3").is_some());
        // Nothing holds it.
        let on = cloud.migrate(id, Some("kvm1"), LiveOptions::default());
        let on = rest(&cloud, &on.await.expect("it is accepted")).await;
        assert_eq!(on.status, S::Completed, "{on:#?}");
    }
}

async fn follows(cloud: &Cloud, id: InstanceId, host: &str) {
    eventually("the record follows", async || {
        let row = cloud.store.find_instance(&id.to_string()).await.unwrap();
        (row.host.as_str() == host).then_some(())
    })
    .await;
}

/// Undefined by hand on its destination, it is nowhere: what the source keeps is all
/// there is.
#[tokio::test(start_paused = true)]
async fn a_guest_that_is_nowhere_any_more_is_reverted() {
    let (mut cloud, id, m) = finished(PowerState::Running).await;
    cloud.add_node("kvm3", NodeSpec::default()).await;
    by_hand(&cloud, id, Hand::Undefines).await;
    end_with(&cloud, &m, method::REVERT_MIGRATION).await;
    let m = rest(&cloud, &m).await;
    assert_eq!(m.status, S::Reverted, "{m:#?}");
    assert_eq!(runs_on(&cloud, id).as_deref(), Some("kvm1"));
}

/// A source that fails to bring it back after it said that it could.
#[tokio::test(start_paused = true)]
async fn a_revert_that_fails_midway_leaves_the_guest_as_it_was_there() {
    for call in [Call::RenameFile, Call::Define, Call::Start] {
        let (cloud, id, m) = finished(PowerState::Running).await;
        let no = Effect::Refuse(HypervisorError::Failed("no".to_owned()));
        cloud.fabric.on_call("kvm1", call, 1, no);
        cloud.fabric.accept_older_disks(id);
        end_with(&cloud, &m, method::REVERT_MIGRATION).await;
        let m = rest(&cloud, &m).await;
        let host = match m.status {
            S::Finished => "kvm2",
            S::Reverted => "kvm1",
            other => panic!("{call:?}: it is {other}: {m:#?}"),
        };
        assert_eq!(
            runs_on(&cloud, id).as_deref(),
            Some(host),
            "{call:?} {m:#?}"
        );
        assert!(disk(&cloud, host).is_some(), "{call:?}");
        if m.status == S::Finished {
            // And again, now that nothing fails.
            end_with(&cloud, &m, method::REVERT_MIGRATION).await;
            let m = rest(&cloud, &m).await;
            assert_eq!(m.status, S::Reverted, "{call:?} {m:#?}");
            assert_eq!(runs_on(&cloud, id).as_deref(), Some("kvm1"));
        }
    }
}

/// What was copied stays at a source that has forgotten it; nobody has to find that out.
#[tokio::test(start_paused = true)]
async fn copies_that_a_source_has_forgotten_are_named() {
    let (mut cloud, _, m) = arrived_unseen(&["kvm1"], 1).await;
    cloud.lose_state("kvm1");
    cloud.start_agent("kvm1").await;
    cloud.start_conductor().await;
    let m = rest(&cloud, &m).await;
    assert_eq!(m.status, S::Completed, "{m:#?}");
    assert!(cloud.fabric.file("kvm1", DISK).is_some(), "{m:#?}");
    assert!(said(&m, "is left"), "{m:#?}");
}

/// The owner's doing since then is not undone: a guest that he shut down stays off.
#[tokio::test(start_paused = true)]
async fn a_refused_revert_touches_nothing_of_a_guest_that_was_shut_down() {
    let (mut cloud, id, m) = finished(PowerState::Running).await;
    cloud.fabric.shut_down_guest(id);
    let fabric = cloud.fabric.clone();
    eventually("it is off", async || {
        fabric.running_on(id).is_none().then_some(())
    })
    .await;
    cloud.kill_agent("kvm1");
    cloud.lose_state("kvm1");
    cloud.start_agent("kvm1").await;
    end_with(&cloud, &m, method::REVERT_MIGRATION).await;
    let m = rest(&cloud, &m).await;
    assert_eq!(m.status, S::Finished, "{m:#?}");
    assert_eq!(at(&cloud, "kvm2", id), OFF);
    assert!(disk(&cloud, "kvm2").is_some());
}

#[tokio::test(start_paused = true)]
async fn a_destination_that_lost_a_disk_is_not_confirmed() {
    let (cloud, id, m) = finished(PowerState::Shutdown).await;
    cloud.fabric.remove_directory("kvm2", IMAGES);
    end_with(&cloud, &m, method::CONFIRM_MIGRATION).await;
    let m = rest(&cloud, &m).await;
    assert_eq!(m.status, S::Finished, "{m:#?}");
    assert!(said(&m, DISK), "{m:#?}");
    for path in [DISK, DATA] {
        let kept = format!("{path}.kept-{}", m.uuid);
        assert!(cloud.fabric.file("kvm1", &kept).is_some(), "{kept}");
    }
    // The source has it still.
    cloud.fabric.make_directory("kvm2", IMAGES);
    end_with(&cloud, &m, method::REVERT_MIGRATION).await;
    let m = rest(&cloud, &m).await;
    assert_eq!(m.status, S::Reverted, "{m:#?}");
    assert_eq!(at(&cloud, "kvm1", id), OFF);
    assert!(disk(&cloud, "kvm1").is_some());
}

/// The confirmation is on its way; its second half comes when the world has changed.
#[tokio::test(start_paused = true)]
async fn a_put_off_confirmation_looks_again_before_it_removes() {
    let (mut cloud, id, m) = finished(PowerState::Shutdown).await;
    cloud.kill_agent("kvm1");
    end_with(&cloud, &m, method::CONFIRM_MIGRATION).await;
    let m = rest(&cloud, &m).await;
    assert_eq!(m.status, S::Confirmed, "{m:#?}");
    // Somebody takes it away there before the source is back.
    let driver = cloud.fabric.driver("kvm2");
    let was = driver.definition(id).await.unwrap().expect("it is there");
    driver.withdraw(id).await.unwrap();
    // What was asked for by what was seen before is stale by now.
    tokio::time::sleep(Duration::from_secs(120)).await;
    cloud.start_agent("kvm1").await;
    tokio::time::sleep(Duration::from_secs(300)).await;
    let kept = format!("{DISK}.kept-{}", m.uuid);
    assert!(
        cloud.fabric.file("kvm1", &kept).is_some(),
        "it may be the last"
    );
    driver.define(&was, None).await.unwrap();
    let fabric = cloud.fabric.clone();
    eventually("the source's copy goes", async || {
        fabric.file("kvm1", &kept).is_none().then_some(())
    })
    .await;
    assert!(disk(&cloud, "kvm2").is_some());
}

/// What a revert was to remove is kept for a guest that was brought there again.
#[tokio::test(start_paused = true)]
async fn a_put_off_revert_removes_nothing_of_a_guest_that_is_there_again() {
    let (mut cloud, id, m) = finished(PowerState::Shutdown).await;
    let was = cloud.fabric.driver("kvm2").definition(id).await.unwrap();
    let no = Effect::Refuse(HypervisorError::Failed("no".to_owned()));
    cloud.fabric.on_call("kvm2", Call::RemoveDisk, 100, no);
    end_with(&cloud, &m, method::REVERT_MIGRATION).await;
    let m = rest(&cloud, &m).await;
    assert_eq!(m.status, S::Reverted, "{m:#?}");
    cloud.kill_conductor();
    let driver = cloud.fabric.driver("kvm2");
    driver
        .define(&was.expect("it was there"), None)
        .await
        .unwrap();
    cloud.start_conductor().await;
    tokio::time::sleep(Duration::from_secs(300)).await;
    assert_eq!(at(&cloud, "kvm2", id), OFF);
    assert!(disk(&cloud, "kvm1").is_some());
}

// ---- live

/// What somebody does by hand to a guest that has just arrived.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Hand {
    Destroys,
    Reboots,
    Pauses,
    DefinesAnew,
    Undefines,
    MovesBack,
    MovesOn,
}

async fn by_hand(cloud: &Cloud, id: InstanceId, hand: Hand) {
    let (kvm1, kvm2) = (cloud.fabric.driver("kvm1"), cloud.fabric.driver("kvm2"));
    match hand {
        Hand::Destroys => cloud.fabric.kill_guest(id),
        Hand::Reboots => {
            cloud.fabric.kill_guest(id);
            kvm2.start(id).await.unwrap();
        }
        Hand::Pauses => cloud.fabric.pause_guest("kvm2", id),
        Hand::DefinesAnew => {
            cloud.fabric.kill_guest(id);
            let was: Option<Definition> = kvm2.definition(id).await.unwrap();
            kvm2.withdraw(id).await.unwrap();
            kvm2.define(&was.expect("it is there"), None).await.unwrap();
        }
        Hand::Undefines => {
            cloud.fabric.kill_guest(id);
            kvm2.withdraw(id).await.unwrap();
        }
        Hand::MovesBack | Hand::MovesOn => {
            cloud.fabric.kill_guest(id);
            let was = kvm2.definition(id).await.unwrap().expect("it is there");
            kvm2.withdraw(id).await.unwrap();
            let (driver, host) = match hand {
                Hand::MovesBack => (kvm1, "kvm1"),
                _ => (cloud.fabric.driver("kvm3"), "kvm3"),
            };
            for path in [DISK, DATA] {
                cloud.fabric.copy_file("kvm2", host, path);
            }
            driver.define(&was, None).await.unwrap();
            driver.start(id).await.unwrap();
        }
    }
}

/// The conductor, and perhaps the agents too, are dead while the guest arrives.
async fn arrived_unseen(agents_too: &[&str], seed: u64) -> (Cloud, InstanceId, Migration) {
    let mut cloud = Cloud::start(seed).await;
    cloud.add_node("kvm3", NodeSpec::default()).await;
    let id = guest(&cloud, web()).await;
    let m = cloud
        .migrate(id, Some("kvm2"), LiveOptions::default())
        .await;
    let m = m.expect("it is accepted");
    let sending = |m: &Migration| m.progress.memory.total_bytes > 0;
    let m = cloud.until(m.uuid, "sending", sending).await;
    cloud.kill_conductor();
    for host in agents_too {
        cloud.kill_agent(host);
    }
    let fabric = cloud.fabric.clone();
    eventually("it has arrived", async || {
        let there = fabric
            .running_on(id)
            .is_some_and(|host| host.as_str() == "kvm2");
        (there && fabric.migrating().is_empty()).then_some(())
    })
    .await;
    (cloud, id, m)
}

const HANDS: [Hand; 7] = [
    Hand::Destroys,
    Hand::Reboots,
    Hand::Pauses,
    Hand::DefinesAnew,
    Hand::Undefines,
    Hand::MovesBack,
    Hand::MovesOn,
];

#[tokio::test(start_paused = true)]
async fn whatever_is_done_to_a_guest_that_arrived_its_disks_stay() {
    for agents in [&[][..], &["kvm1"], &["kvm2"], &["kvm1", "kvm2"]] {
        for hand in HANDS {
            let (mut cloud, id, m) = arrived_unseen(agents, 3).await;
            by_hand(&cloud, id, hand).await;
            let home = match hand {
                Hand::MovesBack => "kvm1",
                Hand::MovesOn => "kvm3",
                _ => "kvm2",
            };
            let newest = disk(&cloud, home).expect("it is whole");
            for host in agents {
                cloud.start_agent(host).await;
            }
            cloud.start_conductor().await;
            let m = rest(&cloud, &m).await;
            let what = format!("{hand:?} {agents:?}: {m:#?}");
            let expected = match hand {
                Hand::MovesBack => S::Failed,
                _ => S::Completed,
            };
            assert_eq!(m.status, expected, "{what}");
            tokio::time::sleep(Duration::from_secs(300)).await;
            if !matches!(hand, Hand::Reboots | Hand::MovesBack | Hand::MovesOn) {
                assert_eq!(disk(&cloud, home), Some(newest), "{what}");
            }
            assert!(disk(&cloud, home).is_some(), "{what}");
            // Of one that is back nobody may know that it was ever away.
            let unseen = hand == Hand::MovesBack && agents.len() == 2;
            let there = disk(&cloud, "kvm2").is_some();
            assert!(there || unseen, "what ran there stays: {what}");
            let expected = match hand {
                Hand::Destroys | Hand::DefinesAnew => OFF,
                Hand::Pauses => Presence::Present(PowerState::Paused),
                Hand::Undefines => Presence::Absent,
                Hand::Reboots | Hand::MovesBack | Hand::MovesOn => {
                    Presence::Present(PowerState::Running)
                }
            };
            assert_eq!(at(&cloud, home, id), expected, "{what}");
            // Undefined, and nowhere else: the source's disks may be wanted too.
            assert_eq!(
                disk(&cloud, "kvm1").is_some(),
                matches!(hand, Hand::Undefines | Hand::MovesBack),
                "{what}"
            );
            // Nothing holds the guest for ever.
            if matches!(hand, Hand::Reboots | Hand::Pauses) {
                let back = cloud
                    .migrate(id, Some("kvm1"), LiveOptions::default())
                    .await;
                let back = rest(&cloud, &back.expect("it is accepted")).await;
                assert_eq!(back.status, S::Completed, "{what}\n{back:#?}");
            }
        }
    }
}

/// The guest goes off at every turn of the record, until it has arrived and after.
#[tokio::test(start_paused = true)]
async fn a_guest_that_goes_off_at_any_turn_keeps_one_whole_copy() {
    for turn in 1.. {
        let cloud = Cloud::start(turn).await;
        let id = guest(&cloud, web()).await;
        let m = cloud
            .migrate(id, Some("kvm2"), LiveOptions::default())
            .await;
        let m = cloud.until_version(m.expect("accepted").uuid, turn).await;
        let over = m.status.is_final();
        cloud.fabric.kill_guest(id);
        let m = rest(&cloud, &m).await;
        assert_ne!(m.status, S::Stuck, "{turn}: {m:#?}");
        tokio::time::sleep(Duration::from_secs(120)).await;
        let host = match m.status {
            S::Completed => "kvm2",
            _ => "kvm1",
        };
        assert_eq!(at(&cloud, host, id), OFF, "{turn}: {m:#?}");
        assert!(disk(&cloud, host).is_some(), "{turn}: {m:#?}");
        // The destination does not wait for it for ever.
        assert_eq!(
            cloud.fabric.leftovers(),
            Vec::<String>::new(),
            "{turn}: {m:#?}"
        );
        if over {
            assert!(turn > 8, "it went off at every turn: {turn}");
            return;
        }
    }
}

/// A source that libvirt left standing still is no copy that stays.
#[tokio::test(start_paused = true)]
async fn a_stale_copy_is_not_taken_for_the_guest() {
    let mut cloud = Cloud::start(4).await;
    let id = guest(&cloud, web()).await;
    cloud
        .fabric
        .on_migration(id, At::Start, Fault::LeaveStaleCopy);
    let m = cloud
        .migrate(id, Some("kvm2"), LiveOptions::default())
        .await;
    let m = m.expect("it is accepted");
    let sending = |m: &Migration| m.progress.memory.total_bytes > 0;
    cloud.until(m.uuid, "sending", sending).await;
    cloud.kill_conductor();
    let fabric = cloud.fabric.clone();
    eventually("it has arrived", async || {
        let there = fabric
            .running_on(id)
            .is_some_and(|host| host.as_str() == "kvm2");
        (there && fabric.migrating().is_empty()).then_some(())
    })
    .await;
    tokio::time::sleep(Duration::from_secs(10)).await;
    cloud.fabric.kill_guest(id);
    let newest = disk(&cloud, "kvm2");
    cloud.start_conductor().await;
    let m = rest(&cloud, &m).await;
    tokio::time::sleep(Duration::from_secs(120)).await;
    assert_eq!(disk(&cloud, "kvm2"), newest, "{m:#?}");
    assert_eq!(at(&cloud, "kvm2", id), OFF, "{m:#?}");
}

// ---- clean-ups that were put off

/// A destination died before the guest came; when it is back the world has changed.
#[tokio::test(start_paused = true)]
async fn a_put_off_take_back_leaves_a_guest_that_was_started_there_by_hand() {
    let mut cloud = Cloud::start(5).await;
    let id = guest(&cloud, web()).await;
    let m = cloud
        .migrate(id, Some("kvm2"), LiveOptions::default())
        .await;
    let m = m.expect("it is accepted");
    let sending = |m: &Migration| m.progress.memory.processed_bytes > 0;
    cloud.until(m.uuid, "sending", sending).await;
    cloud.fabric.power_off("kvm2");
    cloud.kill_agent("kvm2");
    let m = cloud.end(m.uuid).await;
    assert_eq!(m.status, S::Failed, "{m:#?}");
    // Somebody brings the guest there past Drover, before its agent is back.
    cloud.kill_conductor();
    cloud.fabric.power_on("kvm2");
    let (kvm1, kvm2) = (cloud.fabric.driver("kvm1"), cloud.fabric.driver("kvm2"));
    cloud.fabric.kill_guest(id);
    let was = kvm1.definition(id).await.unwrap().expect("it is there");
    kvm1.withdraw(id).await.unwrap();
    for path in [DISK, DATA] {
        cloud.fabric.copy_file("kvm1", "kvm2", path);
    }
    kvm2.define(&was, None).await.unwrap();
    kvm2.start(id).await.unwrap();
    cloud.start_agent("kvm2").await;
    cloud.start_conductor().await;
    tokio::time::sleep(Duration::from_secs(300)).await;
    assert_eq!(runs_on(&cloud, id).as_deref(), Some("kvm2"));
    assert!(disk(&cloud, "kvm2").is_some() && disk(&cloud, "kvm1").is_some());
    cloud.fabric.check_invariants().unwrap();
    // And can be moved from there, once what lies in the way is gone.
    for path in [DISK, DATA] {
        kvm1.remove_disk(path).await.unwrap();
    }
    let back = cloud
        .migrate(id, Some("kvm1"), LiveOptions::default())
        .await;
    let back = rest(&cloud, &back.expect("it is accepted")).await;
    assert_eq!(back.status, S::Completed, "{back:#?}");
}

/// The source was to give up its disks, and was dead; then the guest comes back.
#[tokio::test(start_paused = true)]
async fn a_put_off_tidying_leaves_a_guest_that_was_brought_back_by_hand() {
    let mut cloud = Cloud::start(6).await;
    let id = guest(&cloud, web()).await;
    let m = cloud
        .migrate(id, Some("kvm2"), LiveOptions::default())
        .await;
    let m = m.expect("it is accepted");
    cloud
        .until(m.uuid, "settling", |m| m.step == "settle")
        .await;
    cloud.kill_agent("kvm1");
    let m = rest(&cloud, &m).await;
    assert_eq!(m.status, S::Completed, "{m:#?}");
    tokio::time::sleep(Duration::from_secs(120)).await;
    by_hand(&cloud, id, Hand::MovesBack).await;
    cloud.start_agent("kvm1").await;
    tokio::time::sleep(Duration::from_secs(300)).await;
    assert_eq!(runs_on(&cloud, id).as_deref(), Some("kvm1"));
    assert!(disk(&cloud, "kvm1").is_some() && disk(&cloud, "kvm2").is_some());
    cloud.fabric.check_invariants().unwrap();
    // Nothing of the old migration holds it.
    for path in [DISK, DATA] {
        let driver = cloud.fabric.driver("kvm2");
        driver.remove_disk(path).await.unwrap();
    }
    let again = cloud
        .migrate(id, Some("kvm2"), LiveOptions::default())
        .await;
    let again = rest(&cloud, &again.expect("it is accepted")).await;
    assert_eq!(again.status, S::Completed, "{again:#?}");
}

// ---- cold moves

/// A guest that ran on the destination, if only for a moment, has moved.
#[tokio::test(start_paused = true)]
async fn a_cold_move_whose_guest_goes_off_at_once_is_finished() {
    let cloud = Cloud::start(7).await;
    let id = guest(&cloud, web()).await;
    let late = Effect::SlowAfter(Duration::from_secs(5));
    cloud.fabric.on_call("kvm2", Call::Start, 1, late);
    let way = Way::Cold(ColdOptions::default());
    let m = cloud.migrate_by(id, Some("kvm2"), &way).await;
    let m = m.expect("it is accepted");
    let fabric = cloud.fabric.clone();
    eventually("it runs there", async || {
        fabric.running_on(id).filter(|host| host.as_str() == "kvm2")
    })
    .await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    cloud.fabric.kill_guest(id);
    let newest = disk(&cloud, "kvm2");
    let m = rest(&cloud, &m).await;
    assert_eq!(m.status, S::Finished, "{m:#?}");
    assert!(said(&m, "is off again"), "{m:#?}");
    assert_eq!(disk(&cloud, "kvm2"), newest);
    assert_eq!(at(&cloud, "kvm2", id), OFF);
}

/// One that the destination refuses to start never ran there, and goes back.
#[tokio::test(start_paused = true)]
async fn a_cold_move_whose_guest_does_not_start_is_taken_back() {
    let cloud = Cloud::start(8).await;
    let id = guest(&cloud, web()).await;
    let no = Effect::Refuse(HypervisorError::Failed("no memory".to_owned()));
    cloud.fabric.on_call("kvm2", Call::Start, 1, no);
    let way = Way::Cold(ColdOptions::default());
    let m = cloud.migrate_by(id, Some("kvm2"), &way).await;
    let m = rest(&cloud, &m.expect("it is accepted")).await;
    assert_eq!(m.status, S::Failed, "{m:#?}");
    assert_eq!(runs_on(&cloud, id).as_deref(), Some("kvm1"));
    assert!(disk(&cloud, "kvm1").is_some());
    assert_eq!(cloud.fabric.leftovers(), Vec::<String>::new());
    cloud.fabric.check_invariants().unwrap();
}

/// An agent that is installed anew while its libvirt sends a guest takes that up.
#[tokio::test(start_paused = true)]
async fn a_transfer_that_its_source_has_forgotten_is_watched_again() {
    let mut cloud = Cloud::start(1).await;
    // It never ends by itself: whoever watches has to see that.
    let id = guest(&cloud, web().dirty_mib_s(2000).working_set_mib(512)).await;
    let m = cloud
        .migrate(id, Some("kvm2"), LiveOptions::default())
        .await;
    let m = m.expect("it is accepted");
    let sending = |m: &Migration| m.progress.memory.total_bytes > 0;
    let m = cloud.until(m.uuid, "sending", sending).await;
    cloud.kill_agent("kvm1");
    cloud.lose_state("kvm1");
    cloud.start_agent("kvm1").await;
    let m = cloud.end(m.uuid).await;
    assert_eq!(m.status, S::Failed, "{m:#?}");
    cloud.check(&m).await;
}

/// The same while the disks of a guest stand still, to be copied before it stops.
#[tokio::test(start_paused = true)]
async fn disks_that_their_agent_has_forgotten_to_have_frozen_are_thawed() {
    let mut cloud = Cloud::start(1).await;
    let id = guest(&cloud, web()).await;
    let options = ColdOptions {
        pre_copy: true,
        ..ColdOptions::default()
    };
    let m = cloud
        .migrate_by(id, Some("kvm2"), &Way::Cold(options))
        .await;
    let m = m.expect("it is accepted");
    let fabric = cloud.fabric.clone();
    eventually("its disks stand still", async || {
        let guest = fabric.guest("kvm1", id)?;
        let mut paths = guest.disks.iter().filter_map(|disk| disk.local_path());
        paths.any(|path| path.contains(".delta-")).then_some(())
    })
    .await;
    cloud.kill_agent("kvm1");
    cloud.lose_state("kvm1");
    cloud.start_agent("kvm1").await;
    let m = rest(&cloud, &m).await;
    assert_eq!(m.status, S::Finished, "{m:#?}");
    let runs_on = cloud.fabric.running_on(id);
    assert_eq!(runs_on, m.dest_host);
    cloud.fabric.check_invariants().expect("they hold");
}

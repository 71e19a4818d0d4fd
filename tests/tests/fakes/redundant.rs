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
    guest::{Disk, DiskSource, Guest, PowerState, Presence},
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

/// It is reverted, and runs on its source again.
async fn goes_home(cloud: &Cloud, m: &Migration) {
    end_with(cloud, m, method::REVERT_MIGRATION).await;
    let m = rest(cloud, m).await;
    assert_eq!(m.status, S::Reverted, "{m:#?}");
    assert_eq!(runs_on(cloud, m.instance_uuid).as_deref(), Some("kvm1"));
}

/// A guest that has moved cold from kvm1 to kvm2, and was not confirmed.
async fn finished(state: PowerState) -> (Cloud, InstanceId, Migration) {
    finished_by(state, false).await
}

async fn finished_by(state: PowerState, pre_copy: bool) -> (Cloud, InstanceId, Migration) {
    let cloud = Cloud::start(1).await;
    let id = guest(&cloud, web().state(state)).await;
    let way = Way::Cold(ColdOptions {
        pre_copy,
        ..ColdOptions::default()
    });
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

#[tokio::test(start_paused = true)]
async fn a_definition_that_was_left_behind_is_not_reverted_for_the_guest() {
    for is_known in [true, false] {
        let (mut cloud, id, m) = finished(PowerState::Running).await;
        cloud.add_node("kvm3", NodeSpec::default()).await;
        if !is_known {
            cloud.kill_agent("kvm3");
        }
        by_hand(&cloud, id, Hand::LeavesItsDefinition).await;
        if is_known {
            follows(&cloud, id, "kvm3").await;
        }
        end_with(&cloud, &m, method::REVERT_MIGRATION).await;
        let m = rest(&cloud, &m).await;
        assert_eq!(m.status, S::Finished, "{m:#?}");
        assert!(said(&m, "kvm3"), "{m:#?}");
        assert_eq!(runs_on(&cloud, id).as_deref(), Some("kvm3"));
        cloud.fabric.check_invariants().unwrap();
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
    goes_home(&cloud, &m).await;
}

/// A source that fails to bring it back after it said that it could.
#[tokio::test(start_paused = true)]
async fn a_revert_that_fails_midway_leaves_the_guest_as_it_was_there() {
    let calls = [
        Call::RenameFile,
        Call::Define,
        Call::Start,
        Call::RemoveDisk,
    ];
    for (call, pre_copy) in calls
        .into_iter()
        .flat_map(|call| [(call, false), (call, true)])
    {
        let (cloud, id, m) = finished_by(PowerState::Running, pre_copy).await;
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

/// Brought back to its source by hand, with its disks where they were.
async fn taken_home(cloud: &Cloud, id: InstanceId) {
    let (kvm1, kvm2) = (cloud.fabric.driver("kvm1"), cloud.fabric.driver("kvm2"));
    let was = kvm2.definition(id).await.unwrap();
    kvm2.withdraw(id).await.unwrap();
    for path in [DISK, DATA] {
        cloud.fabric.copy_file("kvm2", "kvm1", path);
    }
    kvm1.define(&was.expect("it is there"), None).await.unwrap();
}

/// What is aside on the source, and what came to the destination, is there still and
/// is named.
fn is_left(cloud: &Cloud, m: &Migration, kept: &[&str], came: &[&str]) {
    let kept = kept.iter().map(|path| format!("{path}.kept-{}", m.uuid));
    let kept = kept.map(|path| ("kvm1", path));
    let came = came.iter().map(|path| ("kvm2", (*path).to_owned()));
    for (host, path) in kept.chain(came) {
        assert!(cloud.fabric.file(host, &path).is_some(), "{host}: {path}");
        assert!(said(m, &format!("{path} is left on {host}")), "{m:#?}");
    }
}

/// Nothing holds a guest that is on its source again.
async fn moves_again(cloud: &Cloud, id: InstanceId) {
    follows(cloud, id, "kvm1").await;
    assert!(cloud.store.claims().await.unwrap().is_empty());
    let kvm2 = cloud.fabric.driver("kvm2");
    for path in [DISK, DATA] {
        if cloud.fabric.file("kvm2", path).is_some() {
            kvm2.remove_disk(path).await.unwrap();
        }
    }
    let way = Way::Cold(ColdOptions::default());
    let again = cloud.migrate_by(id, Some("kvm2"), &way).await;
    let again = rest(cloud, &again.expect("it is accepted")).await;
    assert_eq!(again.status, S::Finished, "{again:#?}");
    assert!(disk(cloud, "kvm2").is_some());
}

/// Whoever took it home past Drover ends the move with a revert, which touches nothing;
/// also where the source's agent has forgotten that it kept anything.
#[tokio::test(start_paused = true)]
async fn a_guest_that_was_brought_back_by_hand_is_left_alone_by_a_revert() {
    for (starts, forgets) in [(false, false), (true, false), (false, true)] {
        let what = format!("starts: {starts}, forgets: {forgets}");
        let (mut cloud, id, m) = finished(PowerState::Shutdown).await;
        if forgets {
            cloud.kill_agent("kvm1");
            cloud.lose_state("kvm1");
            cloud.start_agent("kvm1").await;
        }
        taken_home(&cloud, id).await;
        let newest = disk(&cloud, "kvm1").expect("it is whole");
        if starts {
            let kvm1 = cloud.fabric.driver("kvm1");
            kvm1.start(id).await.unwrap();
        }
        end_with(&cloud, &m, method::CONFIRM_MIGRATION).await;
        let m = rest(&cloud, &m).await;
        assert_eq!(m.status, S::Finished, "{what}: {m:#?}");
        assert!(said(&m, "ask for revert"), "{what}: {m:#?}");
        end_with(&cloud, &m, method::REVERT_MIGRATION).await;
        let m = rest(&cloud, &m).await;
        assert_eq!(m.status, S::Reverted, "{what}: {m:#?}");
        assert_eq!(at(&cloud, "kvm1", id).is_active(), starts, "{what}");
        assert_eq!(at(&cloud, "kvm2", id), Presence::Absent, "{what}");
        match forgets {
            true => {
                assert!(said(&m, "knows nothing of this migration"), "{m:#?}");
                is_left(&cloud, &m, &[], &[DISK, DATA]);
            }
            false => is_left(&cloud, &m, &[DISK, DATA], &[DISK, DATA]),
        }
        if !starts {
            assert_eq!(disk(&cloud, "kvm1"), Some(newest), "{what}");
        }
        cloud.fabric.check_invariants().unwrap();
        moves_again(&cloud, id).await;
    }
}

/// The same with what the source kept, under its own names again, and started.
#[tokio::test(start_paused = true)]
async fn a_guest_that_was_put_back_by_hand_is_left_alone_by_a_revert() {
    let (cloud, id, m) = finished(PowerState::Running).await;
    let (kvm1, kvm2) = (cloud.fabric.driver("kvm1"), cloud.fabric.driver("kvm2"));
    let was = kvm2.definition(id).await.unwrap().expect("it is there");
    by_hand(&cloud, id, Hand::Undefines).await;
    for path in [DISK, DATA] {
        kvm2.remove_disk(path).await.unwrap();
        let kept = format!("{path}.kept-{}", m.uuid);
        kvm1.rename_file(&kept, path).await.unwrap();
    }
    cloud.fabric.accept_older_disks(id);
    kvm1.define(&was, None).await.unwrap();
    kvm1.start(id).await.unwrap();
    end_with(&cloud, &m, method::REVERT_MIGRATION).await;
    let m = rest(&cloud, &m).await;
    assert_eq!(m.status, S::Reverted, "{m:#?}");
    assert!(!said(&m, "is left on"), "{m:#?}");
    assert_eq!(runs_on(&cloud, id).as_deref(), Some("kvm1"));
    assert!(disk(&cloud, "kvm1").is_some());
    cloud.fabric.check_invariants().unwrap();
    moves_again(&cloud, id).await;
}

/// Whoever dies meanwhile: each step may be done twice.
#[tokio::test(start_paused = true)]
async fn a_revert_of_a_guest_that_was_brought_back_is_survived_by_all() {
    for who in ["conductor", "kvm1", "kvm2"] {
        for turn in 0.. {
            let (mut cloud, id, m) = finished(PowerState::Shutdown).await;
            taken_home(&cloud, id).await;
            let newest = disk(&cloud, "kvm1").expect("it is whole");
            end_with(&cloud, &m, method::REVERT_MIGRATION).await;
            let m = cloud.store.migration(m.uuid).await.unwrap();
            let m = cloud.until_version(m.uuid, m.version + turn).await;
            let over = m.status.rests();
            cloud.kill_and_start(who, Duration::from_secs(3)).await;
            let m = rest(&cloud, &m).await;
            assert_eq!(m.status, S::Reverted, "{who} {turn}: {m:#?}");
            // The destination's part may have been put off.
            let tidied = |m: &Migration| said(m, "is left on kvm2");
            let m = cloud.until(m.uuid, "tidied", tidied).await;
            is_left(&cloud, &m, &[DISK, DATA], &[DISK, DATA]);
            assert_eq!(at(&cloud, "kvm1", id), OFF, "{who} {turn}");
            assert_eq!(at(&cloud, "kvm2", id), Presence::Absent, "{who} {turn}");
            assert_eq!(disk(&cloud, "kvm1"), Some(newest), "{who} {turn}");
            moves_again(&cloud, id).await;
            if over {
                assert!(turn > 1, "{who} was killed at every turn: {turn}");
                break;
            }
        }
    }
}

/// Defined on both nodes it is nobody's to choose, and it is said how to.
#[tokio::test(start_paused = true)]
async fn a_guest_that_is_defined_on_both_nodes_is_neither_reverted_nor_confirmed() {
    for stays in ["kvm1", "kvm2"] {
        let (cloud, id, m) = finished(PowerState::Shutdown).await;
        let (kvm1, kvm2) = (cloud.fabric.driver("kvm1"), cloud.fabric.driver("kvm2"));
        let was = kvm2.definition(id).await.unwrap().expect("it is there");
        for path in [DISK, DATA] {
            cloud.fabric.copy_file("kvm2", "kvm1", path);
        }
        kvm1.define(&was, None).await.unwrap();
        for ending in [method::REVERT_MIGRATION, method::CONFIRM_MIGRATION] {
            end_with(&cloud, &m, ending).await;
            let m = rest(&cloud, &m).await;
            assert_eq!(m.status, S::Finished, "{ending}: {m:#?}");
            let last = m.warnings.last().expect("it says why");
            assert!(last.contains("brought the guest to kvm1 again"), "{last}");
            assert!(last.contains("undefine the one"), "{last}");
            for host in ["kvm1", "kvm2"] {
                assert_eq!(at(&cloud, host, id), OFF, "{ending} {host}");
                assert!(disk(&cloud, host).is_some(), "{ending} {host}");
            }
        }
        let (other, ending, status) = match stays {
            "kvm1" => (kvm2, method::REVERT_MIGRATION, S::Reverted),
            _ => (kvm1, method::CONFIRM_MIGRATION, S::Confirmed),
        };
        other.withdraw(id).await.unwrap();
        end_with(&cloud, &m, ending).await;
        let m = rest(&cloud, &m).await;
        assert_eq!(m.status, status, "{stays}: {m:#?}");
        assert_eq!(at(&cloud, stays, id), OFF, "{m:#?}");
        assert!(disk(&cloud, stays).is_some(), "{m:#?}");
    }
}

/// Brought back, and on a third node as well.
#[tokio::test(start_paused = true)]
async fn a_guest_that_was_brought_back_and_is_elsewhere_too_is_not_reverted() {
    let (mut cloud, id, m) = finished(PowerState::Shutdown).await;
    cloud.add_node("kvm3", NodeSpec::default()).await;
    let was = cloud.fabric.driver("kvm2").definition(id).await.unwrap();
    taken_home(&cloud, id).await;
    for path in [DISK, DATA] {
        cloud.fabric.copy_file("kvm2", "kvm3", path);
    }
    let kvm3 = cloud.fabric.driver("kvm3");
    kvm3.define(&was.expect("it was there"), None)
        .await
        .unwrap();
    end_with(&cloud, &m, method::REVERT_MIGRATION).await;
    let m = rest(&cloud, &m).await;
    assert_eq!(m.status, S::Finished, "{m:#?}");
    assert!(said(&m, "kvm3 has it"), "{m:#?}");
    kvm3.withdraw(id).await.unwrap();
    end_with(&cloud, &m, method::REVERT_MIGRATION).await;
    let m = rest(&cloud, &m).await;
    assert_eq!(m.status, S::Reverted, "{m:#?}");
    assert_eq!(at(&cloud, "kvm1", id), OFF);
}

/// The same after the source was asked whether it could take the guest back.
#[tokio::test(start_paused = true)]
async fn a_definition_that_somebody_made_is_not_withdrawn_by_a_revert_that_fails() {
    let (cloud, id, m) = finished(PowerState::Shutdown).await;
    let late = Effect::SlowAfter(Duration::from_secs(10));
    cloud.fabric.on_call("kvm2", Call::Withdraw, 1, late);
    let was = cloud.fabric.driver("kvm2").definition(id).await.unwrap();
    end_with(&cloud, &m, method::REVERT_MIGRATION).await;
    eventually("it is withdrawn", async || {
        (at(&cloud, "kvm2", id) == Presence::Absent).then_some(())
    })
    .await;
    for path in [DISK, DATA] {
        cloud.fabric.copy_file("kvm2", "kvm1", path);
    }
    let kvm1 = cloud.fabric.driver("kvm1");
    kvm1.define(&was.expect("it was there"), None)
        .await
        .unwrap();
    let m = rest(&cloud, &m).await;
    assert_eq!(m.status, S::Finished, "{m:#?}");
    assert!(said(&m, "somebody has defined it here again"), "{m:#?}");
    assert_eq!(at(&cloud, "kvm1", id), OFF);
    assert_eq!(at(&cloud, "kvm2", id), OFF);
    assert!(disk(&cloud, "kvm1").is_some() && disk(&cloud, "kvm2").is_some());
}

/// The source was away when its copy was to go, and the guest is brought back there then.
#[tokio::test(start_paused = true)]
async fn a_confirmed_guest_that_is_brought_home_by_hand_leaves_no_claim() {
    let (mut cloud, id, m) = finished(PowerState::Shutdown).await;
    cloud.kill_agent("kvm1");
    end_with(&cloud, &m, method::CONFIRM_MIGRATION).await;
    let m = cloud.end(m.uuid).await;
    assert_eq!(m.status, S::Confirmed, "{m:#?}");
    assert_eq!(cloud.store.claims().await.unwrap().len(), 1, "put off");
    taken_home(&cloud, id).await;
    cloud.start_agent("kvm1").await;
    eventually("it claims nothing", async || {
        let claims = cloud.store.claims().await.unwrap();
        claims.is_empty().then_some(())
    })
    .await;
    let m = cloud.store.migration(m.uuid).await.unwrap();
    assert!(said(&m, "is left on kvm1"), "{m:#?}");
    assert_eq!(at(&cloud, "kvm1", id), OFF);
    assert!(
        disk(&cloud, "kvm1").is_some(),
        "what was brought back stays"
    );
}

/// Its source had it shut down, and lost its journal then: for the new one it was off.
#[tokio::test(start_paused = true)]
async fn a_guest_that_ran_before_its_source_forgot_so_runs_when_it_is_back() {
    let mut cloud = Cloud::start(1).await;
    let id = guest(&cloud, web().shuts_down_after(Duration::from_secs(2))).await;
    let way = Way::Cold(ColdOptions::default());
    let m = cloud.migrate_by(id, Some("kvm2"), &way).await;
    let m = m.expect("it is accepted");
    cloud.until(m.uuid, "stopping", |m| m.step == "stop").await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    cloud.kill_agent("kvm1");
    cloud.lose_state("kvm1");
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(at(&cloud, "kvm1", id), OFF);
    cloud.start_agent("kvm1").await;
    let m = rest(&cloud, &m).await;
    assert_eq!(m.status, S::Finished, "{m:#?}");
    assert_eq!(runs_on(&cloud, id).as_deref(), Some("kvm2"));
    cloud.fabric.accept_older_disks(id);
    goes_home(&cloud, &m).await;
}

/// The source had been asked, and loses its state when the guest is off already.
#[tokio::test(start_paused = true)]
async fn a_guest_that_cannot_go_back_any_more_is_started_again_where_it_was() {
    for state in [PowerState::Running, PowerState::Shutdown] {
        let (mut cloud, id, m) = finished(state).await;
        let late = Effect::SlowAfter(Duration::from_secs(10));
        cloud.fabric.on_call("kvm2", Call::Withdraw, 1, late);
        end_with(&cloud, &m, method::REVERT_MIGRATION).await;
        eventually("it is withdrawn", async || {
            (at(&cloud, "kvm2", id) == Presence::Absent).then_some(())
        })
        .await;
        cloud.kill_agent("kvm1");
        cloud.lose_state("kvm1");
        cloud.start_agent("kvm1").await;
        let m = rest(&cloud, &m).await;
        assert_eq!(m.status, S::Finished, "{m:#?}");
        assert_eq!(at(&cloud, "kvm2", id), Presence::Present(state));
        assert!(disk(&cloud, "kvm2").is_some());
        cloud.fabric.check_invariants().unwrap();
    }
}

/// The conductor that had it brought back dies before it hears so, and the destination is
/// away for longer than anybody is patient.
#[tokio::test(start_paused = true)]
async fn a_guest_that_is_back_is_reverted_though_nobody_heard_of_it() {
    let (mut cloud, id, m) = finished(PowerState::Running).await;
    let late = Effect::SlowAfter(Duration::from_secs(5));
    cloud.fabric.on_call("kvm1", Call::Start, 1, late);
    cloud.fabric.accept_older_disks(id);
    end_with(&cloud, &m, method::REVERT_MIGRATION).await;
    eventually("it is back", async || {
        (runs_on(&cloud, id).as_deref() == Some("kvm1")).then_some(())
    })
    .await;
    cloud.kill_conductor();
    cloud.broker.cut("kvm2");
    cloud.start_conductor().await;
    cloud.until(m.uuid, "stuck", |m| m.status == S::Stuck).await;
    cloud.broker.heal("kvm2");
    let m = cloud.end(m.uuid).await;
    assert_eq!(m.status, S::Reverted, "{m:#?}");
    assert_eq!(runs_on(&cloud, id).as_deref(), Some("kvm1"));
    cloud.check(&m).await;
}

// ---- what is promised, and what only one side has

const DEVICE: &str = "/dev/vg/shared-name";

fn on_device(name: &str) -> GuestBuilder {
    GuestBuilder::new(name).memory_mib(512).disk(DEVICE, 64)
}

async fn on(cloud: &Cloud, node: &str, builder: GuestBuilder) -> InstanceId {
    let id = cloud.fabric.add_guest(node, builder);
    cloud.adopted(id).await;
    id
}

/// A guest after its cold move.
async fn moved(cloud: &Cloud, id: InstanceId, to: &str) -> Migration {
    let way = Way::Cold(ColdOptions::default());
    let m = cloud.migrate_by(id, Some(to), &way).await;
    rest(cloud, &m.expect("it is accepted")).await
}

/// Whose content it was is not to be seen from its name.
#[tokio::test(start_paused = true)]
async fn a_device_to_which_a_guest_may_go_back_is_no_other_guests() {
    let mut cloud = Cloud::start(1).await;
    cloud.add_node("kvm3", NodeSpec::default()).await;
    let id = on(&cloud, "kvm1", on_device("web")).await;
    cloud.fabric.add_device("kvm2", DEVICE, 10 << 30);
    let m = moved(&cloud, id, "kvm2").await;
    assert_eq!(m.status, S::Finished, "{m:#?}");
    let other = on(&cloud, "kvm3", on_device("other")).await;
    for restarts in [false, true] {
        if restarts {
            cloud.kill_agent("kvm1");
            cloud.start_agent("kvm1").await;
        }
        let refused = moved(&cloud, other, "kvm1").await;
        assert_eq!(refused.status, S::Failed, "{refused:#?}");
        let why = format!("{:?}", refused.end_reason);
        assert!(why.contains("is promised to migration"), "{why}");
        assert_eq!(runs_on(&cloud, other).as_deref(), Some("kvm3"));
    }
    cloud.fabric.accept_older_disks(id);
    goes_home(&cloud, &m).await;
    cloud.fabric.check_invariants().unwrap();
}

#[tokio::test(start_paused = true)]
async fn two_guests_that_come_at_once_do_not_get_one_device() {
    let mut cloud = Cloud::start(1).await;
    cloud.add_node("kvm3", NodeSpec::default()).await;
    cloud.fabric.add_device("kvm3", DEVICE, 10 << 30);
    let one = on(&cloud, "kvm1", on_device("one")).await;
    let two = on(&cloud, "kvm2", on_device("two")).await;
    let (one_m, two_m) = tokio::join!(moved(&cloud, one, "kvm3"), moved(&cloud, two, "kvm3"));
    let mut ends = [one_m.status, two_m.status];
    ends.sort_by_key(|status| *status == S::Finished);
    assert_eq!(ends, [S::Failed, S::Finished], "{one_m:#?} {two_m:#?}");
    assert_eq!(cloud.fabric.lost_bytes(), Vec::<String>::new());
    cloud.fabric.check_invariants().unwrap();
}

/// It was made ready with a disk that its owner takes from it before it goes.
#[tokio::test(start_paused = true)]
async fn a_disk_that_was_taken_from_the_guest_meanwhile_holds_nothing_up() {
    let ways = [
        Way::Live(LiveOptions::default()),
        Way::Cold(ColdOptions::default()),
    ];
    for way in ways {
        let cloud = Cloud::start(1).await;
        let id = guest(&cloud, web().ignores_shutdown()).await;
        let late = Effect::SlowBefore(Duration::from_secs(30));
        cloud.fabric.on_call("kvm1", Call::Migrate, 1, late);
        let m = cloud.migrate_by(id, Some("kvm2"), &way).await;
        let m = m.expect("it is accepted");
        eventually("its files are made", async || {
            let driver = cloud.fabric.driver("kvm2");
            let facts = driver.file_facts(&[DATA.to_owned()]).await;
            facts.unwrap()[0].exists.then_some(())
        })
        .await;
        cloud.fabric.edit_guest("kvm1", id, |guest| {
            guest.disks.retain(|d| d.target != "vdb")
        });
        let m = rest(&cloud, &m).await;
        assert_eq!(m.status, S::Failed, "{m:#?}");
        assert!(said(&m, &format!("{DATA} is left on kvm2")), "{m:#?}");
        assert_eq!(runs_on(&cloud, id).as_deref(), Some("kvm1"));
        // And it is free.
        let way = Way::Live(LiveOptions::default());
        let again = cloud.migrate_by(id, Some("kvm2"), &way).await;
        let again = cloud.end(again.expect("it is accepted").uuid).await;
        assert_eq!(again.status, S::Completed, "{again:#?}");
    }
}

/// Somebody tidies up on the destination before the guest is defined there.
#[tokio::test(start_paused = true)]
async fn a_guest_that_did_not_come_whole_is_not_defined() {
    for state in [PowerState::Running, PowerState::Shutdown] {
        let cloud = Cloud::start(1).await;
        let id = guest(&cloud, web().state(state)).await;
        let late = Effect::SlowBefore(Duration::from_secs(10));
        cloud.fabric.on_call("kvm1", Call::RenameFile, 1, late);
        let way = Way::Cold(ColdOptions::default());
        let m = cloud.migrate_by(id, Some("kvm2"), &way).await;
        let m = m.expect("it is accepted");
        cloud
            .until(m.uuid, "all is sent", |m| m.step == "set_aside")
            .await;
        let kvm2 = cloud.fabric.driver("kvm2");
        kvm2.remove_disk(DATA).await.unwrap();
        let m = rest(&cloud, &m).await;
        assert_eq!(m.status, S::Failed, "{m:#?}");
        let why = format!("{:?}", m.end_reason);
        assert!(why.contains("is missing or empty now"), "{why}");
        assert_eq!(at(&cloud, "kvm1", id), Presence::Present(state));
        assert_eq!(at(&cloud, "kvm2", id), Presence::Absent);
        cloud.fabric.check_invariants().unwrap();
    }
}

/// A file of its name is there by now: seen before anything is stopped.
#[tokio::test(start_paused = true)]
async fn a_guest_whose_place_is_taken_on_its_source_runs_on() {
    for path in [DISK, DATA] {
        let (cloud, id, m) = finished(PowerState::Running).await;
        cloud.fabric.write_file("kvm1", path, "another's").unwrap();
        end_with(&cloud, &m, method::REVERT_MIGRATION).await;
        let m = rest(&cloud, &m).await;
        assert_eq!(m.status, S::Finished, "{m:#?}");
        assert!(said(&m, path), "{m:#?}");
        assert_eq!(runs_on(&cloud, id).as_deref(), Some("kvm2"));
        cloud.fabric.check_invariants().unwrap();
        // And back, once it is gone.
        let kvm1 = cloud.fabric.driver("kvm1");
        kvm1.remove_disk(path).await.unwrap();
        cloud.fabric.accept_older_disks(id);
        goes_home(&cloud, &m).await;
    }
}

/// The same between two of its files.
#[tokio::test(start_paused = true)]
async fn a_revert_that_meets_another_file_midway_is_undone() {
    let (cloud, id, m) = finished(PowerState::Shutdown).await;
    let late = Effect::SlowAfter(Duration::from_secs(10));
    cloud.fabric.on_call("kvm1", Call::RenameFile, 1, late);
    end_with(&cloud, &m, method::REVERT_MIGRATION).await;
    let fabric = cloud.fabric.clone();
    let first = eventually("one has its name back", async || {
        let mut paths = [DISK, DATA].into_iter();
        paths.find(|path| fabric.file("kvm1", path).is_some())
    })
    .await;
    let other = if first == DISK { DATA } else { DISK };
    cloud.fabric.write_file("kvm1", other, "another's").unwrap();
    let m = rest(&cloud, &m).await;
    assert_eq!(m.status, S::Finished, "{m:#?}");
    assert_eq!(at(&cloud, "kvm1", id), Presence::Absent);
    assert_eq!(at(&cloud, "kvm2", id), OFF);
    for path in [DISK, DATA] {
        let kept = format!("{path}.kept-{}", m.uuid);
        assert!(cloud.fabric.file("kvm1", &kept).is_some(), "{kept}");
    }
    let kvm1 = cloud.fabric.driver("kvm1");
    kvm1.remove_disk(other).await.unwrap();
    end_with(&cloud, &m, method::REVERT_MIGRATION).await;
    let m = rest(&cloud, &m).await;
    assert_eq!(m.status, S::Reverted, "{m:#?}");
    assert_eq!(at(&cloud, "kvm1", id), OFF);
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
    /// Moves on, as `virsh migrate` does unless it is told to undefine.
    LeavesItsDefinition,
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
        Hand::MovesBack | Hand::MovesOn | Hand::LeavesItsDefinition => {
            cloud.fabric.kill_guest(id);
            let was = kvm2.definition(id).await.unwrap().expect("it is there");
            if hand != Hand::LeavesItsDefinition {
                kvm2.withdraw(id).await.unwrap();
            }
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

/// Undefined, or transient and gone with its QEMU, while it is on its way: it has not
/// moved, whether its node's agent saw it go or not, and nothing that it wrote is removed.
#[tokio::test(start_paused = true)]
async fn a_guest_that_is_gone_in_the_midst_of_its_move_has_not_moved() {
    for (watched, builder) in [(true, web().transient()), (false, web())] {
        let mut cloud = Cloud::start(1).await;
        cloud.add_node("kvm3", NodeSpec::default()).await;
        let id = guest(&cloud, builder).await;
        let m = cloud.migrate(id, Some("kvm2"), LiveOptions::default());
        let m = m.await.expect("it is accepted");
        let sending = |m: &Migration| m.progress.memory.total_bytes > 0;
        cloud.until(m.uuid, "sending", sending).await;
        if watched {
            cloud.fabric.kill_guest(id);
        } else {
            cloud.kill_agent("kvm1");
            cloud.fabric.kill_guest(id);
            cloud.fabric.driver("kvm1").withdraw(id).await.unwrap();
            cloud.start_agent("kvm1").await;
        }
        let m = cloud.end(m.uuid).await;
        assert_eq!(m.status, S::Failed, "{watched}: {m:#?}");
        let why = m.end_reason.as_ref().expect("a reason").to_string();
        assert!(why.contains("undefined on kvm1 during the move"), "{why}");
        // What was put off is looked at again, and goes nowhere.
        tokio::time::sleep(Duration::from_secs(600)).await;
        for host in ["kvm1", "kvm2"] {
            let left = cloud.fabric.file(host, DISK);
            assert!(left.is_some(), "{host}: {m:#?}");
        }
        assert!(cloud.store.claims().await.unwrap().is_empty(), "{m:#?}");
    }
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
            // Nobody saw it come, and it is not there any more.
            let unseen = agents.len() == 2 && matches!(hand, Hand::Undefines | Hand::MovesOn);
            let expected = match hand {
                Hand::MovesBack => S::Failed,
                _ if unseen => S::Failed,
                _ => S::Completed,
            };
            assert_eq!(m.status, expected, "{what}");
            tokio::time::sleep(Duration::from_secs(300)).await;
            if !matches!(hand, Hand::Reboots | Hand::MovesBack | Hand::MovesOn) {
                assert_eq!(disk(&cloud, home), Some(newest), "{what}");
            }
            assert!(disk(&cloud, home).is_some(), "{what}");
            // Of one that runs elsewhere nobody may know that it was ever there.
            let forgotten = agents.len() == 2 && matches!(hand, Hand::MovesBack | Hand::MovesOn);
            let there = disk(&cloud, "kvm2").is_some();
            assert!(there || forgotten, "what ran there stays: {what}");
            let expected = match hand {
                Hand::Destroys | Hand::DefinesAnew => OFF,
                Hand::Pauses => Presence::Present(PowerState::Paused),
                Hand::Undefines => Presence::Absent,
                Hand::Reboots | Hand::MovesBack | Hand::MovesOn | Hand::LeavesItsDefinition => {
                    Presence::Present(PowerState::Running)
                }
            };
            assert_eq!(at(&cloud, home, id), expected, "{what}");
            // Undefined, and nowhere else: the source's disks may be wanted too.
            assert_eq!(
                disk(&cloud, "kvm1").is_some(),
                unseen || matches!(hand, Hand::Undefines | Hand::MovesBack),
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

/// Somebody shuts a guest down and takes it, with its disks, from wherever it is to a
/// third node, at every turn: it runs there alone, the migration ends and the record follows.
#[tokio::test(start_paused = true)]
async fn a_guest_that_is_taken_to_a_third_node_at_any_turn_runs_there_alone() {
    for way in [
        Way::Live(LiveOptions::default()),
        Way::Cold(ColdOptions::default()),
    ] {
        for turn in 1.. {
            let mut cloud = Cloud::start(turn).await;
            cloud.add_node("kvm3", NodeSpec::default()).await;
            let id = guest(&cloud, web()).await;
            let m = cloud.migrate_by(id, Some("kvm2"), &way).await;
            let m = cloud.until_version(m.expect("accepted").uuid, turn).await;
            let over = m.status.rests();
            // Nobody who looks finds it anywhere while it changes sides.
            let changes_sides = ["set_aside", "finish"].contains(&m.step.as_str());
            let taken = !changes_sides && taken_away(&cloud, id).await;
            let m = rest(&cloud, &m).await;
            let what = format!("{turn}, taken: {taken}: {m:#?}");
            assert_ne!(m.status, S::Stuck, "{what}");
            if taken {
                assert_eq!(runs_on(&cloud, id).as_deref(), Some("kvm3"), "{what}");
                follows(&cloud, id, "kvm3").await;
                assert!(disk(&cloud, "kvm3").is_some(), "{what}");
            }
            if over {
                assert!(turn > 8, "it was taken away at every turn: {turn}");
                break;
            }
        }
    }
}

/// Somebody starts a guest that is off for its move on a third node, while its source is
/// away: nothing starts it elsewhere, the move ends, and the record follows.
#[tokio::test(start_paused = true)]
async fn a_guest_that_was_started_on_a_third_node_is_started_nowhere_else() {
    for aborted in [false, true] {
        let mut started = 0;
        for turn in 1.. {
            let mut cloud = Cloud::start(turn).await;
            cloud.add_node("kvm3", NodeSpec::default()).await;
            let nodes = ["kvm1", "kvm2", "kvm3"];
            cloud.fabric.share_directory(IMAGES, &nodes, 1 << 40);
            let id = guest(&cloud, web()).await;
            let defined = cloud.fabric.driver("kvm1").definition(id).await.unwrap();
            let way = Way::Cold(ColdOptions::default());
            let m = cloud.migrate_by(id, Some("kvm2"), &way).await;
            let m = cloud.until_version(m.expect("accepted").uuid, turn).await;
            if m.status.rests() {
                break;
            }
            // Nobody who looks finds it anywhere while it changes sides.
            let changes_sides = ["set_aside", "finish"].contains(&m.step.as_str());
            if changes_sides || runs_on(&cloud, id).is_some() {
                continue;
            }
            cloud.kill_agent("kvm1");
            let kvm3 = cloud.fabric.driver("kvm3");
            kvm3.define(&defined.unwrap(), None).await.unwrap();
            if kvm3.start(id).await.is_err() {
                continue;
            }
            started += 1;
            eventually("it is seen there", async || {
                let row = cloud.store.find_instance(&id.to_string()).await.unwrap();
                row.other.map(drop)
            })
            .await;
            if aborted {
                let _ = cloud.abort(m.uuid).await;
            }
            cloud.start_agent("kvm1").await;
            let m = cloud.end(m.uuid).await;
            assert!(matches!(m.status, S::Failed | S::Cancelled), "{m:#?}");
            follows(&cloud, id, "kvm3").await;
            assert_eq!(runs_on(&cloud, id).as_deref(), Some("kvm3"), "{m:#?}");
            cloud.fabric.check_invariants().unwrap();
        }
        assert!(started > 1, "{started}");
    }
}

/// Of a guest that is defined on one node alone, and that no migration job holds.
async fn taken_away(cloud: &Cloud, id: InstanceId) -> bool {
    let [(from, _)] = &cloud.fabric.whereabouts(id)[..] else {
        return false;
    };
    if cloud.fabric.migrating().contains(&id) {
        return false;
    }
    let (here, there) = (
        cloud.fabric.driver(from.as_str()),
        cloud.fabric.driver("kvm3"),
    );
    let Ok(Some(was)) = here.definition(id).await else {
        return false;
    };
    cloud.fabric.kill_guest(id);
    here.withdraw(id).await.expect("it is off");
    for path in [DISK, DATA] {
        cloud.fabric.copy_file(from.as_str(), "kvm3", path);
    }
    there.define(&was, None).await.expect("nobody else has it");
    there.start(id).await.expect("it is off");
    true
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

/// A guest has moved live from kvm1 to kvm2, and kvm1's agent dies before it tidies up.
async fn moved_while_its_source_went_away() -> (Cloud, InstanceId) {
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
    (cloud, id)
}

/// The source was to give up its disks, and was dead; then the guest comes back.
#[tokio::test(start_paused = true)]
async fn a_put_off_tidying_leaves_a_guest_that_was_brought_back_by_hand() {
    let (mut cloud, id) = moved_while_its_source_went_away().await;
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

/// The same, and it is off by then; whoever brought it back left a definition behind.
#[tokio::test(start_paused = true)]
async fn a_put_off_tidying_leaves_a_guest_that_was_brought_back_and_is_off() {
    let (mut cloud, id) = moved_while_its_source_went_away().await;
    let (kvm1, kvm2) = (cloud.fabric.driver("kvm1"), cloud.fabric.driver("kvm2"));
    let was = kvm2.definition(id).await.unwrap().expect("it is there");
    cloud.fabric.kill_guest(id);
    for path in [DISK, DATA] {
        cloud.fabric.copy_file("kvm2", "kvm1", path);
    }
    kvm1.define(&was, None).await.unwrap();
    kvm1.start(id).await.unwrap();
    tokio::time::sleep(Duration::from_secs(60)).await;
    cloud.fabric.kill_guest(id);
    let newest = disk(&cloud, "kvm1");
    cloud.start_agent("kvm1").await;
    tokio::time::sleep(Duration::from_secs(300)).await;
    assert_eq!(at(&cloud, "kvm1", id), OFF);
    assert_eq!(disk(&cloud, "kvm1"), newest);
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

/// There libvirt cannot keep the state of a TPM, and what came of it is on the source too.
#[tokio::test(start_paused = true)]
async fn a_cold_move_is_taken_back_also_where_a_tpm_is_lost_with_the_definition() {
    let cloud = Cloud::start(8).await;
    let id = guest(&cloud, web().tpm()).await;
    let no = Effect::Refuse(HypervisorError::Failed("no memory".to_owned()));
    cloud.fabric.on_call("kvm2", Call::Start, 1, no);
    let way = Way::Cold(ColdOptions::default());
    let m = cloud.migrate_by(id, Some("kvm2"), &way).await;
    let m = m.expect("it is accepted");
    cloud.until(m.uuid, "copying", |m| m.step == "copy").await;
    let downgrade = |node: &mut NodeSpec| node.libvirt_version = 8_000_000;
    cloud.fabric.edit_node("kvm2", downgrade);
    let m = rest(&cloud, &m).await;
    assert_eq!(m.status, S::Failed, "{m:#?}");
    assert_eq!(runs_on(&cloud, id).as_deref(), Some("kvm1"));
    let kvm1 = cloud.fabric.driver("kvm1");
    let back = kvm1.lasting_guest(id).await.unwrap().expect("it is there");
    assert_eq!(back.files.len(), 1, "{back:?}");
    assert!(cloud.fabric.file("kvm1", &back.files[0].path).is_some());
    assert_eq!(cloud.fabric.leftovers(), Vec::<String>::new());
    cloud.fabric.check_invariants().unwrap();
    // From there on it is refused beforehand.
    let again = cloud.migrate_by(id, Some("kvm2"), &way).await;
    let again = rest(&cloud, &again.expect("it is accepted")).await;
    assert!(said(&again, "would remove the state"), "{again:#?}");
    assert_eq!(runs_on(&cloud, id).as_deref(), Some("kvm1"));
}

/// Started by hand where its move had failed, it ran there: what it wrote is the newest.
#[tokio::test(start_paused = true)]
async fn a_guest_that_was_started_by_hand_where_it_had_come_keeps_its_disks() {
    let mut cloud = Cloud::start(8).await;
    let id = guest(&cloud, web()).await;
    let no = Effect::Refuse(HypervisorError::Failed("no bridge".to_owned()));
    cloud.fabric.on_call("kvm2", Call::Start, 1, no);
    let slow = Effect::SlowBefore(Duration::from_secs(10));
    cloud.fabric.on_call("kvm2", Call::Define, 1, slow);
    let way = Way::Cold(ColdOptions::default());
    let m = cloud.migrate_by(id, Some("kvm2"), &way).await;
    let m = m.expect("it is accepted");
    cloud.until(m.uuid, "coming", |m| m.step == "finish").await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    cloud.kill_agent("kvm1");
    tokio::time::sleep(Duration::from_secs(60)).await;
    let kvm2 = cloud.fabric.driver("kvm2");
    kvm2.start(id).await.expect("the bridge is there now");
    tokio::time::sleep(Duration::from_secs(60)).await;
    cloud.fabric.kill_guest(id);
    let newest = disk(&cloud, "kvm2");
    assert!(newest.is_some());
    cloud.start_agent("kvm1").await;
    tokio::time::sleep(Duration::from_secs(400)).await;
    assert_eq!(disk(&cloud, "kvm2"), newest);
    assert_eq!(at(&cloud, "kvm2", id), OFF);
    assert_eq!(runs_on(&cloud, id), None);
}

/// What one guest brought along lies under another that lies aside by now.
#[tokio::test(start_paused = true)]
async fn an_image_under_a_guest_that_lies_aside_stays() {
    const BASE: &str = "/var/lib/libvirt/images/base.qcow2";
    let mut cloud = Cloud::start(8).await;
    cloud.add_node("kvm3", NodeSpec::default()).await;
    let on_base = |name: &str| {
        let disk = format!("{IMAGES}/{name}.qcow2");
        GuestBuilder::new(name)
            .disk(&disk, 64)
            .backing_mib(BASE, 64)
    };
    let brings = guest(&cloud, on_base("brings")).await;
    let uses = guest(&cloud, on_base("uses")).await;
    let brought = moved(&cloud, brings, "kvm2").await;
    let first = moved(&cloud, uses, "kvm2").await;
    end_with(&cloud, &first, method::CONFIRM_MIGRATION).await;
    assert_eq!(rest(&cloud, &first).await.status, S::Confirmed);
    let second = moved(&cloud, uses, "kvm3").await;
    goes_home(&cloud, &brought).await;
    tokio::time::sleep(Duration::from_secs(120)).await;
    assert!(cloud.fabric.file("kvm2", BASE).is_some(), "it is needed");
    end_with(&cloud, &second, method::REVERT_MIGRATION).await;
    assert_eq!(rest(&cloud, &second).await.status, S::Reverted);
    assert_eq!(runs_on(&cloud, uses).as_deref(), Some("kvm2"));
}

/// A file that somebody puts where a place was not reserved yet is not the migration's.
#[tokio::test(start_paused = true)]
async fn a_file_that_came_before_its_place_was_reserved_stays() {
    let mut cloud = Cloud::start(8).await;
    let id = guest(&cloud, web()).await;
    let slow = Effect::SlowBefore(Duration::from_secs(10));
    cloud.fabric.on_call("kvm2", Call::ReserveFile, 1, slow);
    let way = Way::Cold(ColdOptions::default());
    let m = cloud.migrate_by(id, Some("kvm2"), &way).await;
    let m = m.expect("it is accepted");
    cloud
        .until(m.uuid, "preparing", |m| m.step == "prepare")
        .await;
    let journal = cloud.journal("kvm2", m.uuid);
    eventually("it is to be reserved", async || {
        journal.exists().then_some(())
    })
    .await;
    cloud.kill_agent("kvm2");
    let put = cloud.fabric.write_file("kvm2", DATA, "somebody's");
    put.expect("there is room");
    cloud.start_agent("kvm2").await;
    let m = rest(&cloud, &m).await;
    assert_eq!(m.status, S::Failed, "{m:#?}");
    assert!(said(&m, DATA), "{m:#?}");
    let there = cloud.fabric.file("kvm2", DATA).expect("it stays");
    assert_eq!(there.content, Content::Text("somebody's".to_owned()));
    assert!(cloud.fabric.file("kvm2", DISK).is_none());
    assert_eq!(runs_on(&cloud, id).as_deref(), Some("kvm1"));
}

/// The same of a live move.
#[tokio::test(start_paused = true)]
async fn a_file_that_came_before_its_disk_was_made_stays() {
    for go_on in [true, false] {
        let mut cloud = Cloud::start(8).await;
        let id = guest(&cloud, web()).await;
        for call in [Call::ReserveFile, Call::CreateDisk] {
            let slow = Effect::SlowBefore(Duration::from_secs(10));
            cloud.fabric.on_call("kvm2", call, 2, slow);
        }
        let m = cloud.migrate(id, Some("kvm2"), LiveOptions::default());
        let m = m.await.expect("it is accepted");
        let journal = cloud.journal("kvm2", m.uuid);
        eventually("it is to be made", async || journal.exists().then_some(())).await;
        cloud.kill_agent("kvm2");
        let put = cloud.fabric.write_file("kvm2", DATA, "somebody's");
        put.expect("there is room");
        if !go_on {
            cloud.abort(m.uuid).await.expect("it is taken");
            tokio::time::sleep(Duration::from_secs(30)).await;
        }
        cloud.start_agent("kvm2").await;
        let m = rest(&cloud, &m).await;
        let ended = if go_on { S::Failed } else { S::Cancelled };
        assert_eq!(m.status, ended, "{m:#?}");
        assert!(said(&m, DATA), "{m:#?}");
        let there = cloud.fabric.file("kvm2", DATA).expect("it stays");
        assert_eq!(there.content, Content::Text("somebody's".to_owned()));
        tokio::time::sleep(Duration::from_secs(120)).await;
        assert!(cloud.fabric.file("kvm2", DISK).is_none());
        assert_eq!(runs_on(&cloud, id).as_deref(), Some("kvm1"));
    }
}

/// What somebody puts into a file that holds a disk's place is not the migration's, and
/// is named: it may be written by hand, or another guest's by then.
#[tokio::test(start_paused = true)]
async fn a_file_that_is_put_to_use_before_its_disk_was_made_stays() {
    for is_used in [false, true] {
        let mut cloud = Cloud::start(8).await;
        let id = guest(&cloud, web()).await;
        let slow = Effect::SlowBefore(Duration::from_secs(60));
        cloud.fabric.on_call("kvm2", Call::CreateDisk, 2, slow);
        let m = cloud.migrate(id, Some("kvm2"), LiveOptions::default());
        let m = m.await.expect("it is accepted");
        eventually("its place is held", async || {
            cloud.fabric.file("kvm2", DATA)
        })
        .await;
        tokio::time::sleep(Duration::from_secs(5)).await;
        cloud.kill_agent("kvm2");
        if is_used {
            let other = GuestBuilder::new("other").disk(DATA, 64);
            let other = other.state(PowerState::Shutdown);
            cloud.fabric.add_guest("kvm2", other);
        } else {
            let put = cloud.fabric.change_file("kvm2", DATA);
            put.expect("a file is there");
        }
        let before = cloud.fabric.file("kvm2", DATA).expect("it is there");
        cloud.start_agent("kvm2").await;
        let m = rest(&cloud, &m).await;
        assert_eq!(m.status, S::Failed, "{m:#?}");
        assert!(said(&m, DATA), "{m:#?}");
        tokio::time::sleep(Duration::from_secs(120)).await;
        let there = cloud.fabric.file("kvm2", DATA).expect("it stays");
        assert_eq!(there.content, before.content);
        assert_eq!(there.length_bytes, before.length_bytes);
        assert!(cloud.fabric.file("kvm2", DISK).is_none());
        assert_eq!(runs_on(&cloud, id).as_deref(), Some("kvm1"));
    }
}

/// What is done by hand to a guest that was sent, and not set aside yet.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Late {
    Runs,
    IsResized,
    NothingIsDone,
}

/// A cold move whose conductor dies during the copy, which the agent ends by itself.
async fn sent_unseen(cloud: &mut Cloud, state: PowerState) -> (InstanceId, Migration) {
    let id = guest(cloud, web().state(state)).await;
    let way = Way::Cold(ColdOptions::default());
    let m = cloud.migrate_by(id, Some("kvm2"), &way).await;
    let m = m.expect("it is accepted");
    let m = cloud.until(m.uuid, "copying", |m| m.step == "copy").await;
    let journal = cloud.journal("kvm1", m.uuid);
    let parts = |which: &str| -> Vec<String> {
        let text = std::fs::read_to_string(&journal).unwrap_or_default();
        let entry: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
        let find = |value: &serde_json::Value| serde_json::from_value(value[which].clone()).ok();
        find(&entry)
            .or_else(|| entry.as_object()?.values().find_map(find))
            .unwrap_or_default()
    };
    let has = |which: &str| parts(which).iter().any(|part| part == "copy");
    eventually("it is being copied", async || has("begun").then_some(())).await;
    cloud.kill_conductor();
    eventually("it was copied", async || has("done").then_some(())).await;
    (id, m)
}

/// Nothing newer than what was sent is taken for what was sent.
#[tokio::test(start_paused = true)]
async fn a_guest_that_was_changed_by_hand_after_it_was_sent_stays_as_it_is() {
    let mut cases = Vec::new();
    for state in [PowerState::Running, PowerState::Shutdown] {
        for late in [Late::Runs, Late::IsResized, Late::NothingIsDone] {
            cases.push((state, late));
        }
    }
    for (state, late) in cases {
        let what = format!("{state:?} {late:?}");
        let mut cloud = Cloud::start(9).await;
        let (id, m) = sent_unseen(&mut cloud, state).await;
        match late {
            Late::Runs => {
                let driver = cloud.fabric.driver("kvm1");
                driver.start(id).await.expect("it is off");
                tokio::time::sleep(Duration::from_secs(5)).await;
                cloud.fabric.kill_guest(id);
            }
            Late::IsResized => {
                let grow = |guest: &mut Guest| guest.memory_mib = 1536;
                cloud.fabric.edit_guest("kvm1", id, grow);
            }
            Late::NothingIsDone => {}
        }
        cloud.start_conductor().await;
        let m = rest(&cloud, &m).await;
        cloud.fabric.check_invariants().expect(&what);
        if late == Late::NothingIsDone {
            assert_eq!(m.status, S::Finished, "{what}: {m:#?}");
            continue;
        }
        assert_eq!(m.status, S::Failed, "{what}: {m:#?}");
        let words = match late {
            Late::Runs => "was written or replaced since",
            _ => "its definition was changed since",
        };
        assert!(said(&m, words), "{what}: {m:#?}");
        assert_eq!(at(&cloud, "kvm1", id).is_active(), state.is_active());
        assert_eq!(at(&cloud, "kvm2", id), Presence::Absent, "{what}");
        if late == Late::IsResized {
            let guest = cloud.fabric.guest("kvm1", id).expect("it is there");
            assert_eq!(guest.memory_mib, 1536, "{what}");
        }
        assert!(cloud.fabric.file("kvm2", DISK).is_none(), "{what}");
        // What it wrote last is what it starts from.
        let started = cloud.fabric.driver("kvm1").start(id).await;
        started.expect("it is defined");
        cloud.fabric.check_invariants().expect(&what);
    }
}

/// A disk that came after it was decided what is carried is carried by nobody: on the
/// destination another's file may have its name.
#[tokio::test(start_paused = true)]
async fn a_guest_that_gets_a_disk_while_it_is_to_leave_stays() {
    let new = format!("{IMAGES}/new.raw");
    let cloud = Cloud::start(10).await;
    for host in ["kvm1", "kvm2"] {
        let written = cloud.fabric.write_file(host, &new, host);
        written.expect("there is room");
    }
    let leisurely = web().shuts_down_after(Duration::from_secs(20));
    let id = guest(&cloud, leisurely).await;
    let way = Way::Cold(ColdOptions::default());
    let m = cloud.migrate_by(id, Some("kvm2"), &way).await;
    let m = m.expect("it is accepted");
    let journal = cloud.journal("kvm1", m.uuid);
    eventually("it is to stop", async || journal.exists().then_some(())).await;
    cloud.fabric.edit_guest("kvm1", id, |guest| {
        let disk = Disk {
            target: "vdz".to_owned(),
            source: DiskSource::File { path: new.clone() },
            ..guest.disks[0].clone()
        };
        guest.disks.push(disk);
    });
    let m = rest(&cloud, &m).await;
    assert_eq!(m.status, S::Failed, "{m:#?}");
    assert!(said(&m, "got disk vdz"), "{m:#?}");
    assert_eq!(runs_on(&cloud, id).as_deref(), Some("kvm1"));
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

/// Its source forgot that the guest was sent, and somebody let it run since: what was sent
/// is old, and the guest stays.
#[tokio::test(start_paused = true)]
async fn a_guest_that_ran_since_its_source_forgot_is_not_set_aside() {
    let mut cloud = Cloud::start(1).await;
    let id = guest(&cloud, web().state(PowerState::Shutdown)).await;
    let slow = Effect::SlowBefore(Duration::from_secs(60));
    cloud.fabric.on_call("kvm1", Call::Withdraw, 1, slow);
    let way = Way::Cold(ColdOptions::default());
    let m = cloud.migrate_by(id, Some("kvm2"), &way).await.unwrap();
    cloud.until(m.uuid, "sent", |m| m.step == "set_aside").await;
    cloud.kill_conductor();
    cloud.kill_agent("kvm1");
    cloud.lose_state("kvm1");
    assert_eq!(at(&cloud, "kvm1", id), OFF);
    cloud.fabric.start_guest("kvm1", id);
    tokio::time::sleep(Duration::from_secs(60)).await;
    cloud.fabric.shut_down_guest(id);
    tokio::time::sleep(Duration::from_secs(10)).await;
    cloud.start_agent("kvm1").await;
    cloud.start_conductor().await;
    let m = rest(&cloud, &m).await;
    let found = cloud.fabric.check_invariants();
    found.unwrap_or_else(|found| panic!("{found:?}\n{m:#?}"));
    assert_eq!(cloud.fabric.lost_bytes(), Vec::<String>::new(), "{m:#?}");
    assert_eq!(m.status, S::Failed, "{m:#?}");
}

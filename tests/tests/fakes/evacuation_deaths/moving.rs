//! A node that dies while a guest leaves it live. The migration ends, and the guest
//! runs once: where it has arrived, or where it is evacuated to.

use drover_compute::hypervisor::{
    ColdDriver,
    fake::script::{At, End, Fault},
};
use drover_model::{
    api::conductor::{MigrationRef, method},
    guest::{PowerState, Presence},
    migration::{ColdOptions, LiveOptions},
};

use super::*;

/// A guest that leaves `kvm1` for `kvm2` so slowly that it is on its way for minutes.
async fn leaving(cloud: &Cloud) -> (InstanceId, Migration) {
    leaving_by(cloud, LiveOptions::default()).await
}

async fn leaving_by(cloud: &Cloud, options: LiveOptions) -> (InstanceId, Migration) {
    let id = guest(cloud).await;
    let options = LiveOptions {
        bandwidth_mib_s: Some(4),
        ..options
    };
    let m = cloud.migrate(id, Some("kvm2"), options).await;
    let m = m.expect("it is accepted");
    let sending = |m: &Migration| m.progress.memory.processed_bytes > 0;
    let m = cloud.until(m.uuid, "sending", sending).await;
    (id, m)
}

async fn runs_on_kvm2(cloud: &Cloud, id: InstanceId) {
    let fabric = cloud.fabric.clone();
    eventually("it runs there", async || {
        fabric.running_on(id).filter(|host| *host == name("kvm2"))
    })
    .await;
}

/// A guest that is moved to `kvm2` cold and runs there, which nobody has heard yet.
async fn starting(cloud: &Cloud, id: InstanceId) -> Migration {
    let late = Effect::SlowAfter(Duration::from_secs(5));
    cloud.fabric.on_call("kvm2", Call::Start, 1, late);
    let way = Way::Cold(ColdOptions::default());
    let m = cloud.migrate_by(id, Some("kvm2"), &way).await;
    let m = m.expect("it is accepted");
    runs_on_kvm2(cloud, id).await;
    m
}

/// A step that was put off is done.
async fn was_done_late(cloud: &Cloud, m: &Migration, step: &str) {
    let done = format!("{step} was put off, and is done now");
    eventually("nothing is put off any more", async || {
        let m = cloud.store.migration(m.uuid).await.expect("on the record");
        m.warnings.contains(&done).then_some(())
    })
    .await;
}

/// Its agent is gone before the guest arrives, and its power after that: nobody is
/// left there who says so.
#[tokio::test(start_paused = true)]
async fn a_guest_that_arrived_unheard_has_moved() {
    let mut cloud = cloud(1).await;
    let (id, m) = leaving(&cloud).await;
    cloud.kill_agent("kvm1");
    runs_on_kvm2(&cloud, id).await;
    dies(&mut cloud, "kvm1");
    let stands = |m: &Migration| m.status.is_final() || m.status == S::Stuck;
    let mut m = cloud.until(m.uuid, "ended or stuck", stands).await;
    if m.status == S::Stuck {
        // It was while the guest was on its way yet.
        cloud.resume(m.uuid).await.expect("it is stuck");
        m = cloud.end(m.uuid).await;
    }
    assert_eq!(m.status, S::Completed, "{m:#?}");
    check(&cloud, &m, Some("kvm2"));
    let row = cloud.store.find_instance(&id.to_string()).await;
    assert_eq!(row.expect("on the record").host, name("kvm2"));
}

/// Its destination loses its power right when it has taken the guest: the guest has moved,
/// and is off there. A source whose agent has lost its journal sends its old copy over
/// nothing.
#[tokio::test(start_paused = true)]
async fn a_guest_whose_destination_died_at_the_hand_over_has_moved() {
    for journal_is_lost in [false, true] {
        let mut cloud = cloud(1).await;
        let (id, m) = leaving(&cloud).await;
        let power_off = Fault::PowerOff(End::Destination);
        cloud.fabric.on_migration(id, At::Finish, power_off);
        let fabric = cloud.fabric.clone();
        eventually("the hand-over", async || {
            let paused = (name("kvm1"), Presence::Present(PowerState::Paused));
            let stands = fabric.whereabouts(id).contains(&paused);
            (stands && fabric.running_on(id).is_none()).then_some(())
        })
        .await;
        cloud.kill_agent("kvm2");
        if journal_is_lost {
            cloud.kill_agent("kvm1");
            cloud.lose_state("kvm1");
            cloud.start_agent("kvm1").await;
        }
        silence().await;
        returns(&mut cloud, "kvm2").await;
        let m = cloud.end(m.uuid).await;
        assert_eq!(m.status, S::Completed, "{m:#?}");
        check(&cloud, &m, None);
        assert_eq!(cloud.fabric.lost_bytes(), Vec::<String>::new());
        let row = cloud.store.find_instance(&id.to_string()).await;
        assert_eq!(row.expect("on the record").host, name("kvm2"));
    }
}

/// It dies when nothing was sent yet, with the conductor: the guest stays, and its
/// migration ends, though nobody proves that node dead.
#[tokio::test(start_paused = true)]
async fn a_destination_that_died_before_anything_was_sent_holds_nobody_up() {
    let mut cloud = cloud(1).await;
    let id = guest(&cloud).await;
    let m = cloud.migrate(id, Some("kvm2"), LiveOptions::default());
    let m = m.await.expect("it is accepted");
    cloud
        .until(m.uuid, "prepared", |m| m.step == "transfer")
        .await;
    cloud.kill_conductor();
    dies(&mut cloud, "kvm2");
    silence().await;
    cloud.start_conductor().await;
    let m = cloud.end(m.uuid).await;
    assert_eq!(m.status, S::Failed, "{m:#?}");
    check(&cloud, &m, Some("kvm1"));
}

/// libvirt left a paused copy of the guest where it was, and the agent there has lost its
/// journal: the copy goes by libvirt's own word, as the guest runs where it moved to.
#[tokio::test(start_paused = true)]
async fn an_old_copy_goes_without_its_journal() {
    let mut cloud = cloud(1).await;
    let (id, m) = leaving(&cloud).await;
    cloud
        .fabric
        .on_migration(id, At::SwitchOver, Fault::LeaveStaleCopy);
    runs_on_kvm2(&cloud, id).await;
    cloud.kill_agent("kvm1");
    cloud.lose_state("kvm1");
    cloud.start_agent("kvm1").await;
    let m = cloud.end(m.uuid).await;
    assert_eq!(m.status, S::Completed, "{m:#?}");
    check(&cloud, &m, Some("kvm2"));
    assert!(cloud.fabric.guest("kvm1", id).is_none());
}

/// It has not arrived, and its node will never say so: the migration ends, and the
/// guest is evacuated, to where it was on its way to if nothing else is allowed.
#[tokio::test(start_paused = true)]
async fn a_guest_whose_node_died_while_it_was_leaving_is_evacuated() {
    let mut cloud = cloud(1).await;
    with_fences(&mut cloud).await;
    let (id, m) = leaving(&cloud).await;
    dies(&mut cloud, "kvm1");
    silence().await;
    let to_where_it_went = EvacuateOptions {
        to: vec![name("kvm2")],
        ..options(false)
    };
    let begun = cloud.operate(&Task::Evacuate(to_where_it_went)).await;
    let ended = cloud.operation_end(begun.expect("it is taken").uuid).await;
    check_evacuated(&cloud, &ended, id).await;
    let m = cloud.store.migration(m.uuid).await.expect("on the record");
    assert_eq!(m.status, S::Failed, "{m:#?}");
    let why = m.end_reason.as_ref().expect("a reason").to_string();
    assert!(why.contains("kvm1 is off, says fence_fabric"), "{why}");
    assert!(cloud.store.claims().await.expect("readable").is_empty());
    // What its agent keeps of the migration is forgotten when it is back.
    returns(&mut cloud, "kvm1").await;
    eventually("the old copy is given up", async || {
        cloud.fabric.guest("kvm1", id).is_none().then_some(())
    })
    .await;
    was_done_late(&cloud, &m, "transfer").await;
}

/// It was off, and set aside at its source, which died: the proof of that stands for its
/// word, and the guest starts where it was going.
#[tokio::test(start_paused = true)]
async fn a_guest_that_its_dead_source_had_set_aside_starts_where_it_went() {
    let mut cloud = cloud(1).await;
    with_fences(&mut cloud).await;
    let id = guest(&cloud).await;
    let late = Effect::SlowAfter(Duration::from_secs(5));
    cloud.fabric.on_call("kvm1", Call::Withdraw, 1, late);
    let way = Way::Cold(ColdOptions::default());
    let m = cloud.migrate_by(id, Some("kvm2"), &way).await;
    let m = m.expect("it is accepted");
    cloud.until(m.uuid, "sent", |m| m.step == "set_aside").await;
    cloud.kill_agent("kvm2");
    cloud
        .until(m.uuid, "set aside", |m| m.step == "finish")
        .await;
    dies(&mut cloud, "kvm1");
    silence().await;
    let asked = EvacuateOptions {
        despite_many_lost: true,
        ..EvacuateOptions::new(name("kvm1"))
    };
    let begun = cloud.operate(&Task::Evacuate(asked)).await;
    begun.expect("it is taken");
    cloud.start_agent("kvm2").await;
    let m = cloud.until(m.uuid, "at rest", |m| m.status.rests()).await;
    assert_eq!(m.status, S::Finished, "{m:#?}");
    check(&cloud, &m, Some("kvm2"));
    returns(&mut cloud, "kvm1").await;
    silence().await;
    check(&cloud, &m, Some("kvm2"));
    assert!(cloud.fabric.guest("kvm1", id).is_none());
}

/// It was started where it went, and its source and the conductor died before anybody had
/// heard so: that it runs there is seen, and nobody has to prove the source dead.
#[tokio::test(start_paused = true)]
async fn a_guest_that_runs_where_it_went_needs_no_word_of_its_source() {
    let mut cloud = cloud(1).await;
    let id = guest(&cloud).await;
    let m = starting(&cloud, id).await;
    cloud.kill_conductor();
    dies(&mut cloud, "kvm1");
    cloud.start_conductor().await;
    let rests = |m: &Migration| m.status.rests() || m.status == S::Stuck;
    let m = cloud.until(m.uuid, "at rest", rests).await;
    assert_eq!(m.status, S::Finished, "{m:#?}");
    check(&cloud, &m, Some("kvm2"));
}

/// A guest that was moved to `kvm2` and started there, which nobody has heard when that
/// node dies.
async fn started_unheard(cloud: &mut Cloud, id: InstanceId) -> Migration {
    let m = starting(cloud, id).await;
    dies(cloud, "kvm2");
    let stuck = |m: &Migration| m.status == S::Stuck;
    cloud.until(m.uuid, "stuck", stuck).await
}

/// Its destination died when it may have run there: asked for, it goes back, once that
/// node is proven dead. What came there stays, as the guest may have written to it.
#[tokio::test(start_paused = true)]
async fn a_guest_goes_back_whose_dead_destination_may_have_run_it() {
    for is_shared in [true, false] {
        let mut cloud = match is_shared {
            true => cloud(1).await,
            false => unshared(1).await,
        };
        let id = guest(&cloud).await;
        let m = started_unheard(&mut cloud, id).await;
        cloud.abort(m.uuid).await.expect_err("it may run there");
        is_said_off(&cloud, "kvm2").await;
        let proven = |m: &Migration| m.end_reason.is_none() && m.status == S::Stuck;
        cloud.until(m.uuid, "waits for a word", proven).await;
        check(&cloud, &m, None);
        cloud.fabric.accept_older_disks(id);
        cloud.abort(m.uuid).await.expect("it is taken");
        let m = cloud.end(m.uuid).await;
        assert_eq!(m.status, S::Cancelled, "{m:#?}");
        check(&cloud, &m, Some("kvm1"));
        assert!(cloud.store.claims().await.expect("readable").is_empty());
        returns(&mut cloud, "kvm2").await;
        was_done_late(&cloud, &m, "prepare").await;
        check(&cloud, &m, Some("kvm1"));
        let again = cloud.migrate(id, Some("kvm3"), LiveOptions::default());
        let again = cloud.end(again.await.expect("it is accepted").uuid).await;
        assert_eq!(again.status, S::Completed, "{again:#?}");
        check(&cloud, &again, Some("kvm3"));
    }
}

/// It is back before all is undone: the word that was given holds.
#[tokio::test(start_paused = true)]
async fn a_guest_goes_back_though_its_destination_returns_midway() {
    let mut cloud = cloud(1).await;
    let id = guest(&cloud).await;
    let m = started_unheard(&mut cloud, id).await;
    is_said_off(&cloud, "kvm2").await;
    cloud.kill_agent("kvm1");
    cloud.abort(m.uuid).await.expect("it is taken");
    silence().await;
    returns(&mut cloud, "kvm2").await;
    silence().await;
    check(&cloud, &m, None);
    cloud.start_agent("kvm1").await;
    let m = cloud.end(m.uuid).await;
    assert_eq!(m.status, S::Cancelled, "{m:#?}");
    check(&cloud, &m, Some("kvm1"));
    let stays = |w: &String| w.contains("what came there is not removed");
    assert!(m.warnings.iter().any(stays), "{m:#?}");
    assert!(cloud.store.claims().await.expect("readable").is_empty());
}

/// Nobody goes back on a guess, nor without being asked: the destination comes back.
#[tokio::test(start_paused = true)]
async fn a_guest_whose_destination_comes_back_has_moved() {
    let mut cloud = cloud(1).await;
    let id = guest(&cloud).await;
    let m = started_unheard(&mut cloud, id).await;
    is_said_off(&cloud, "kvm2").await;
    tokio::time::sleep(Duration::from_secs(600)).await;
    check(&cloud, &m, None);
    returns(&mut cloud, "kvm2").await;
    let m = cloud.until(m.uuid, "at rest", |m| m.status.rests()).await;
    assert_eq!(m.status, S::Finished, "{m:#?}");
    check(&cloud, &m, Some("kvm2"));
}

/// Its destination died after all had gone well: it is reverted without that node, which
/// is tidied when it is back.
#[tokio::test(start_paused = true)]
async fn a_guest_is_reverted_without_its_dead_destination() {
    for is_shared in [true, false] {
        let mut cloud = match is_shared {
            true => cloud(1).await,
            false => unshared(1).await,
        };
        let id = guest(&cloud).await;
        let way = Way::Cold(ColdOptions::default());
        let m = cloud.migrate_by(id, Some("kvm2"), &way).await;
        let m = m.expect("it is accepted");
        let m = cloud.until(m.uuid, "at rest", |m| m.status.rests()).await;
        assert_eq!(m.status, S::Finished, "{m:#?}");
        dies(&mut cloud, "kvm2");
        is_said_off(&cloud, "kvm2").await;
        cloud.fabric.accept_older_disks(id);
        let asked = MigrationRef {
            migration: m.uuid.to_string(),
        };
        let answer = cloud.call(method::REVERT_MIGRATION, &asked).await;
        let _: Migration = answer.expect("it is taken");
        let m = cloud.end(m.uuid).await;
        assert_eq!(m.status, S::Reverted, "{m:#?}");
        check(&cloud, &m, Some("kvm1"));
        returns(&mut cloud, "kvm2").await;
        was_done_late(&cloud, &m, "revert_tidy").await;
        assert!(cloud.fabric.guest("kvm2", id).is_none());
        assert_eq!(cloud.fabric.leftovers(), Vec::<String>::new());
        check(&cloud, &m, Some("kvm1"));
    }
}

/// That node was said to be off, and is switched on again with its agent disabled, and
/// somebody starts the guest there: it is not started where it came from.
#[tokio::test(start_paused = true)]
async fn a_node_that_is_on_again_without_its_agent_is_not_dead() {
    let mut cloud = cloud(1).await;
    let id = guest(&cloud).await;
    let way = Way::Cold(ColdOptions::default());
    let m = cloud.migrate_by(id, Some("kvm2"), &way).await;
    let m = m.expect("it is accepted");
    let m = cloud.until(m.uuid, "at rest", |m| m.status.rests()).await;
    dies(&mut cloud, "kvm2");
    is_said_off(&cloud, "kvm2").await;
    cloud.fabric.power_on("kvm2");
    cloud.fabric.start_guest("kvm2", id);
    let asked = MigrationRef {
        migration: m.uuid.to_string(),
    };
    let _ = cloud
        .call::<_, Migration>(method::REVERT_MIGRATION, &asked)
        .await;
    tokio::time::sleep(Duration::from_secs(600)).await;
    check(&cloud, &m, Some("kvm2"));
}

/// Somebody has just started the guest of a dead node by hand, and no report says so yet:
/// the nodes themselves are asked before it is started on another, together with all
/// others of the dead node, and alone where one of them hides the others.
#[tokio::test(start_paused = true)]
async fn a_guest_that_was_started_by_hand_is_not_evacuated() {
    for is_slow in [false, true] {
        let mut cloud = cloud(1).await;
        let id = guest(&cloud).await;
        let other = GuestBuilder::new("db").disk(&format!("{IMAGES}/db.qcow2"), 256);
        let other = cloud.fabric.add_guest("kvm1", other);
        cloud.adopted(other).await;
        let was = cloud.fabric.driver("kvm1").definition(id).await;
        let was = was.expect("it answers").expect("it is there");
        dies(&mut cloud, "kvm1");
        silence().await;
        let slow = |call, seconds| {
            let effect = Effect::SlowBefore(Duration::from_millis(seconds));
            cloud.fabric.on_call("kvm2", call, 1000, effect);
        };
        slow(Call::Inventory, 900_000);
        slow(Call::Guests, 900_000);
        cloud.fabric.accept_older_disks(id);
        let kvm2 = cloud.fabric.driver("kvm2");
        kvm2.define(&was, None).await.expect("nobody else has it");
        cloud.fabric.start_guest("kvm2", id);
        if is_slow {
            slow(Call::Presence, 1500);
        }
        let m = begin(&cloud, id, &["kvm3"]).await;
        let m = cloud.end(m.uuid).await;
        assert_eq!(m.status, S::Failed, "{m:#?}");
        check(&cloud, &m, Some("kvm2"));
        let why = m.end_reason.as_ref().expect("a reason").to_string();
        assert!(why.contains("kvm2 has the guest"), "{why}");
    }
}

/// Both of its nodes die, and stay away: when both are proven off the migration ends, and
/// the guest is evacuated to a third.
#[tokio::test(start_paused = true)]
async fn a_guest_whose_nodes_both_died_is_evacuated() {
    let mut cloud = cloud(1).await;
    with_fences(&mut cloud).await;
    let (id, m) = leaving(&cloud).await;
    dies(&mut cloud, "kvm1");
    dies(&mut cloud, "kvm2");
    silence().await;
    let mut begun = Vec::new();
    for host in ["kvm2", "kvm1"] {
        let asked = EvacuateOptions {
            despite_many_lost: true,
            ..EvacuateOptions::new(name(host))
        };
        let operation = cloud.operate(&Task::Evacuate(asked)).await;
        begun.push(operation.expect("it is taken").uuid);
    }
    for operation in begun {
        let ended = cloud.operation_end(operation).await;
        assert_eq!(ended.status, OperationStatus::Completed, "{ended:#?}");
    }
    let m = cloud.store.migration(m.uuid).await.expect("on the record");
    assert_eq!(m.status, S::Failed, "{m:#?}");
    check(&cloud, &m, Some("kvm3"));
    for host in ["kvm1", "kvm2"] {
        returns(&mut cloud, host).await;
    }
    eventually("the old copy is given up", async || {
        cloud.fabric.guest("kvm1", id).is_none().then_some(())
    })
    .await;
    check(&cloud, &m, Some("kvm3"));
    assert!(cloud.store.claims().await.expect("readable").is_empty());
}

/// A guest of which one half has gone to `kvm2`, and the other follows slowly.
async fn halved(cloud: &Cloud) -> (InstanceId, Migration) {
    let options = LiveOptions {
        post_copy: true,
        ..LiveOptions::default()
    };
    let (id, m) = leaving_by(cloud, options).await;
    cloud.force_complete(m.uuid).await.expect("it is taken");
    let in_post_copy = |m: &Migration| m.status == S::RunningPostCopy;
    let m = cloud.until(m.uuid, "in post-copy", in_post_copy).await;
    (id, m)
}

/// Its memory is lost, and its disks are not: it is off where it went, and nothing of it
/// is left where it was.
#[tokio::test(start_paused = true)]
async fn a_half_is_removed_when_the_other_is_lost() {
    let mut cloud = cloud(1).await;
    let (id, m) = halved(&cloud).await;
    dies(&mut cloud, "kvm2");
    silence().await;
    let still = cloud.store.migration(m.uuid).await.expect("on the record");
    assert!(!still.status.is_final(), "{still:#?}");
    returns(&mut cloud, "kvm2").await;
    let ended = cloud.end(m.uuid).await;
    assert_eq!(ended.status, S::Completed, "{ended:#?}");
    let says = |w: &String| w.contains("memory is lost");
    assert!(ended.warnings.iter().any(says), "{ended:#?}");
    eventually("the half is gone", async || {
        cloud.fabric.guest("kvm1", id).is_none().then_some(())
    })
    .await;
    assert!(cloud.fabric.guest("kvm2", id).is_some());
}

/// So it is if its own agent was restarted in between, to which nobody answers how the
/// migration ended, and if somebody starts the guest again where it is off.
#[tokio::test(start_paused = true)]
async fn a_half_is_removed_whoever_was_away() {
    for starts_it_by_hand in [false, true] {
        let mut cloud = cloud(1).await;
        let (id, m) = halved(&cloud).await;
        cloud.kill_agent("kvm1");
        cloud.start_agent("kvm1").await;
        dies(&mut cloud, "kvm2");
        silence().await;
        if starts_it_by_hand {
            cloud.fabric.power_on("kvm2");
            let started = cloud.fabric.driver("kvm2").start(id).await;
            started.expect("its disks are there");
        }
        returns(&mut cloud, "kvm2").await;
        let ended = cloud.end(m.uuid).await;
        assert_eq!(ended.status, S::Completed, "{ended:#?}");
        eventually("the half is gone", async || {
            cloud.fabric.guest("kvm1", id).is_none().then_some(())
        })
        .await;
        let runs = cloud.fabric.running_on(id);
        assert_eq!(runs.is_some(), starts_it_by_hand, "{runs:?}");
    }
}

/// It stays away, and is proven off: the migration ends, and the guest counts as gone
/// there. Nobody has told how it was defined there, which an evacuation says.
#[tokio::test(start_paused = true)]
async fn a_guest_whose_other_half_is_lost_for_good_has_moved() {
    let mut cloud = cloud(1).await;
    with_fences(&mut cloud).await;
    let (id, m) = halved(&cloud).await;
    dies(&mut cloud, "kvm2");
    silence().await;
    let evacuated = async || {
        let task = Task::Evacuate(EvacuateOptions::new(name("kvm2")));
        let begun = cloud.operate(&task).await.expect("it is taken").uuid;
        cloud.operation_end(begun).await
    };
    // It brings the proof.
    evacuated().await;
    let ended = cloud.end(m.uuid).await;
    assert_eq!(ended.status, S::Completed, "{ended:#?}");
    let row = cloud.store.find_instance(&id.to_string()).await;
    assert_eq!(row.expect("on the record").host, name("kvm2"));
    let stays = format!("{:?}", evacuated().await.items);
    assert!(stays.contains("its definition is from kvm1"), "{stays}");
}

/// Without proof nobody ends it: its node may run the guest.
#[tokio::test(start_paused = true)]
async fn a_migration_from_a_silent_node_waits_for_it() {
    let mut cloud = cloud(1).await;
    let (id, m) = leaving(&cloud).await;
    dies(&mut cloud, "kvm1");
    let stuck = |m: &Migration| m.status == S::Stuck;
    cloud.until(m.uuid, "stuck", stuck).await;
    cloud.abort(m.uuid).await.expect("it is taken");
    tokio::time::sleep(Duration::from_secs(900)).await;
    let m = cloud.store.migration(m.uuid).await.expect("on the record");
    assert!(!m.status.is_final(), "{m:#?}");
    check(&cloud, &m, None);
    assert_eq!(m.instance_uuid, id);
}

/// At every moment of a migration.
#[tokio::test(start_paused = true)]
async fn a_source_that_dies_for_good_at_any_moment_holds_nobody_up() {
    let (mut ended, mut moved) = (0, 0);
    for turn in 0.. {
        let mut cloud = cloud(turn).await;
        with_fences(&mut cloud).await;
        let id = guest(&cloud).await;
        let m = cloud.migrate(id, Some("kvm2"), LiveOptions::default());
        let m = m.await.expect("it is accepted");
        let m = cloud.until_version(m.uuid, m.version + turn).await;
        if m.status.is_final() {
            break;
        }
        dies(&mut cloud, "kvm1");
        silence().await;
        let begun = cloud.operate(&Task::Evacuate(options(false))).await;
        let begun = begun.expect("it is taken").uuid;
        let operation = cloud.operation_end(begun).await;
        let completed = operation.status == OperationStatus::Completed;
        assert!(completed, "turn {turn}: {operation:#?}");
        let m = cloud.end(m.uuid).await;
        let home = match m.status {
            S::Completed => m.dest_host.clone(),
            _ => {
                let moved = cloud.store.migrations_of(operation.uuid).await;
                let moved = moved.expect("readable").pop();
                moved.expect("it was evacuated").dest_host
            }
        };
        let home = home.expect("it went somewhere");
        check(&cloud, &m, Some(home.as_str()));
        assert!(cloud.store.claims().await.expect("readable").is_empty());
        match m.status {
            S::Completed => moved += 1,
            _ => ended += 1,
        }
    }
    assert!(ended > 3 && moved > 0, "{ended} ended, {moved} moved");
}

//! A node comes back after its guests were evacuated, or not: nothing runs twice,
//! and nothing is removed that has no other home.

use std::collections::BTreeSet;

use drover_compute::hypervisor::fake::GuestBuilder;
use drover_model::{
    api::{
        compute::{CopyHistory, CopySeen, StepRef, method},
        conductor::{Evacuated, EvacuatedAnswer, KeptOff},
    },
    guest::{PowerState, Presence},
    ids::{InstanceId, MigrationId},
};

use crate::{harness::*, rebuild::SHARED};

const RUNNING: Presence = Presence::Present(PowerState::Running);
const OFF: Presence = Presence::Present(PowerState::Shutdown);

async fn cloud() -> World {
    let mut world = World::without_agents().await;
    world.fabric.share_directory(SHARED, &[A, B], 1 << 40);
    boot(&world, "first");
    world.start(A).await;
    pause(1000).await;
    world
}

/// From now on the node is in that boot.
fn boot(world: &World, id: &str) {
    std::fs::write(world.state_dir(A).with_extension("boot"), id).unwrap();
}

fn guest(name: &str) -> GuestBuilder {
    GuestBuilder::new(name).disk(&format!("{SHARED}/{name}.qcow2"), 10)
}

fn seen(presence: Presence, generation: u64) -> CopySeen {
    CopySeen {
        presence,
        migrating: false,
        generation: Some(generation),
        files: Vec::new(),
        aside: None,
        known: CopyHistory::default(),
    }
}

/// The conductor says so of a guest from now on.
fn evacuated(world: &World, instance: InstanceId, confirmed: bool) -> MigrationId {
    let migration = MigrationId::generate();
    *world.heard.evacuated.lock().unwrap() = Some(EvacuatedAnswer {
        instances: vec![Evacuated {
            instance,
            migration,
            generation: 1,
            host: confirmed.then(|| host(B)),
            confirmed,
            seen: confirmed.then(|| seen(RUNNING, 1)),
        }],
        ..EvacuatedAnswer::default()
    });
    migration
}

/// The conductor says from now on that a guest must not be started at boot.
fn kept_off(world: &World, instance: InstanceId, lives_on: Option<&str>) {
    *world.heard.evacuated.lock().unwrap() = Some(EvacuatedAnswer {
        kept_off: vec![KeptOff {
            instance,
            reason: "it is somewhere else".to_owned(),
            lives_on: lives_on.map(host),
        }],
        ..EvacuatedAnswer::default()
    });
}

fn on_a(world: &World, instance: InstanceId) -> Presence {
    let places = world.fabric.whereabouts(instance);
    let here = places.into_iter().find(|(name, _)| *name == host(A));
    here.map_or(Presence::Absent, |(_, presence)| presence)
}

fn removed(world: &World) -> Vec<MigrationId> {
    world.heard.removed.lock().unwrap().clone()
}

/// The node's agent dies and its power goes; then both are back.
async fn return_of(world: &mut World) {
    world.fabric.power_on(A);
    boot(world, "second");
    world.start(A).await;
    pause(5_000).await;
}

fn dies(world: &mut World) {
    world.kill(A);
    world.fabric.power_off(A);
}

#[tokio::test(start_paused = true)]
async fn what_lives_elsewhere_is_removed_and_its_disks_stay() {
    let mut world = cloud().await;
    let id = world.fabric.add_guest(A, guest("web").autostart());
    pause(40_000).await;
    dies(&mut world);
    let migration = evacuated(&world, id, true);
    return_of(&mut world).await;
    assert_eq!(on_a(&world, id), Presence::Absent);
    assert!(world.fabric.file(A, "/shared/web.qcow2").is_some());
    assert_eq!(removed(&world), [migration]);
    world.fabric.check_invariants().unwrap();
}

#[tokio::test(start_paused = true)]
async fn what_has_no_confirmed_home_stays_off_until_it_has() {
    let mut world = cloud().await;
    let id = world.fabric.add_guest(A, guest("web").autostart());
    pause(40_000).await;
    dies(&mut world);
    evacuated(&world, id, false);
    return_of(&mut world).await;
    pause(120_000).await;
    assert_eq!(on_a(&world, id), OFF, "neither started nor removed");
    assert_eq!(removed(&world), []);
    let migration = evacuated(&world, id, true);
    pause(40_000).await;
    assert_eq!(on_a(&world, id), Presence::Absent);
    assert_eq!(removed(&world), [migration]);
}

#[tokio::test(start_paused = true)]
async fn an_evacuation_that_is_given_up_lets_the_guest_start() {
    let mut world = cloud().await;
    let id = world.fabric.add_guest(A, guest("web").autostart());
    let other = world.fabric.add_guest(A, guest("plain"));
    pause(40_000).await;
    dies(&mut world);
    evacuated(&world, id, false);
    return_of(&mut world).await;
    assert_eq!(on_a(&world, id), OFF);
    *world.heard.evacuated.lock().unwrap() = Some(EvacuatedAnswer::default());
    pause(40_000).await;
    assert_eq!(on_a(&world, id), RUNNING);
    assert_eq!(on_a(&world, other), OFF, "it never wished to be started");
    world.fabric.check_invariants().unwrap();
}

#[tokio::test(start_paused = true)]
async fn what_lives_elsewhere_stays_off_until_the_next_boot_and_the_rest_is_started() {
    let mut world = cloud().await;
    let moved = world.fabric.add_guest(A, guest("web").autostart());
    let own = world.fabric.add_guest(A, guest("db").autostart());
    world.fabric.add_guest(A, guest("plain"));
    pause(40_000).await;
    dies(&mut world);
    kept_off(&world, moved, Some(B));
    return_of(&mut world).await;
    let asked = world.heard.starting.lock().unwrap().clone();
    assert_eq!(
        BTreeSet::from_iter(asked),
        BTreeSet::from([moved, own]),
        "those alone that wish it"
    );
    assert_eq!((on_a(&world, moved), on_a(&world, own)), (OFF, RUNNING));
    // It is removed there long after; what is left here is no guest to wake.
    *world.heard.evacuated.lock().unwrap() = Some(EvacuatedAnswer::default());
    world.fabric.restart_libvirtd(A);
    pause(120_000).await;
    world.restart(A).await;
    pause(120_000).await;
    assert_eq!(on_a(&world, moved), OFF);
    dies(&mut world);
    boot(&world, "third");
    world.fabric.power_on(A);
    world.start(A).await;
    pause(5_000).await;
    assert_eq!(on_a(&world, moved), RUNNING, "nobody has it any more");
}

#[tokio::test(start_paused = true)]
async fn where_a_guest_lives_is_asked_again_until_it_is_decided() {
    let mut world = cloud().await;
    let id = world.fabric.add_guest(A, guest("web").autostart());
    pause(40_000).await;
    dies(&mut world);
    kept_off(&world, id, None);
    return_of(&mut world).await;
    pause(120_000).await;
    assert_eq!(on_a(&world, id), OFF);
    *world.heard.evacuated.lock().unwrap() = Some(EvacuatedAnswer::default());
    pause(40_000).await;
    assert_eq!(on_a(&world, id), RUNNING);
    world.fabric.check_invariants().unwrap();
}

#[tokio::test(start_paused = true)]
async fn nothing_starts_and_no_step_is_served_before_the_conductor_answers() {
    let mut world = cloud().await;
    let id = world.fabric.add_guest(A, guest("web").autostart());
    pause(40_000).await;
    dies(&mut world);
    *world.heard.evacuated.lock().unwrap() = None;
    return_of(&mut world).await;
    pause(60_000).await;
    assert_eq!(on_a(&world, id), OFF);
    let step = StepRef {
        migration: MigrationId::generate(),
        instance: id,
    };
    let refused = world.call::<()>(A, method::REBUILD, &step).await;
    let refused = refused.unwrap_err();
    assert!(refused.message.contains("evacuated"), "{refused}");
    *world.heard.evacuated.lock().unwrap() = Some(EvacuatedAnswer::default());
    pause(40_000).await;
    assert_eq!(on_a(&world, id), RUNNING);
}

#[tokio::test(start_paused = true)]
async fn started_at_boot_once_and_not_after_every_start_of_the_agent() {
    let mut world = cloud().await;
    let id = world.fabric.add_guest(A, guest("web").autostart());
    pause(40_000).await;
    dies(&mut world);
    return_of(&mut world).await;
    assert_eq!(on_a(&world, id), RUNNING);
    world.fabric.shut_down_guest(id);
    world.restart(A).await;
    pause(60_000).await;
    assert_eq!(on_a(&world, id), OFF, "somebody shut it down");
}

#[tokio::test(start_paused = true)]
async fn guests_are_started_also_if_what_was_written_at_the_last_boot_was_cut_short() {
    let mut world = cloud().await;
    let id = world.fabric.add_guest(A, guest("web").autostart());
    pause(40_000).await;
    dies(&mut world);
    std::fs::write(world.state_dir(A).join("boot.json"), "").unwrap();
    return_of(&mut world).await;
    assert_eq!(on_a(&world, id), RUNNING);
    world.fabric.shut_down_guest(id);
    world.restart(A).await;
    pause(60_000).await;
    assert_eq!(on_a(&world, id), OFF, "once");
}

#[tokio::test(start_paused = true)]
async fn a_boot_file_that_cannot_be_read_now_is_waited_for() {
    let mut world = cloud().await;
    let id = world.fabric.add_guest(A, guest("web").autostart());
    pause(40_000).await;
    dies(&mut world);
    let file = world.state_dir(A).join("boot.json");
    let kept = file.with_extension("kept");
    std::fs::rename(&file, &kept).unwrap();
    // It opens, and cannot be read: an I/O error also for root.
    std::fs::create_dir(&file).unwrap();
    return_of(&mut world).await;
    pause(60_000).await;
    assert_eq!(on_a(&world, id), OFF);
    std::fs::remove_dir(&file).unwrap();
    std::fs::rename(&kept, &file).unwrap();
    pause(40_000).await;
    assert_eq!(on_a(&world, id), RUNNING);
}

#[tokio::test(start_paused = true)]
async fn of_two_active_copies_the_older_is_stopped_if_the_other_is_confirmed() {
    for confirmed in [false, true] {
        let mut world = cloud().await;
        let id = world.fabric.add_guest(A, guest("web"));
        world.kill(A);
        let migration = evacuated(&world, id, confirmed);
        world.start(A).await;
        pause(5_000).await;
        if confirmed {
            assert_eq!(on_a(&world, id), Presence::Absent);
            assert_eq!(removed(&world), [migration]);
        } else {
            assert_eq!(on_a(&world, id), RUNNING, "unknown is not absent");
            assert_eq!(removed(&world), []);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn the_new_copy_itself_is_left_alone_wherever_it_is() {
    let mut world = cloud().await;
    let moved_back = guest("web").with(|guest| guest.generation = 1);
    let id = world.fabric.add_guest(A, moved_back);
    world.kill(A);
    let migration = evacuated(&world, id, true);
    world.start(A).await;
    pause(5_000).await;
    assert_eq!(on_a(&world, id), RUNNING);
    assert_eq!(removed(&world), [migration]);
}

#[tokio::test(start_paused = true)]
async fn it_is_asked_again_when_libvirt_is_back() {
    let world = cloud().await;
    let id = world
        .fabric
        .add_guest(A, guest("web").state(PowerState::Shutdown));
    let migration = evacuated(&world, id, true);
    pause(120_000).await;
    assert_eq!(on_a(&world, id), OFF, "nothing asks without a reason");
    world.fabric.restart_libvirtd(A);
    pause(5_000).await;
    assert_eq!(on_a(&world, id), Presence::Absent);
    assert_eq!(removed(&world), [migration]);
}

/// What the answer says is not what counts, but what was seen.
#[tokio::test(start_paused = true)]
async fn an_old_copy_stays_without_the_sight_of_a_newer_one() {
    let off_there = seen(OFF, 1);
    let same_age = seen(RUNNING, 0);
    for evidence in [None, Some(off_there), Some(same_age)] {
        let mut world = cloud().await;
        let id = world.fabric.add_guest(A, guest("web"));
        world.kill(A);
        evacuated(&world, id, true);
        let set = |answer: &mut Option<EvacuatedAnswer>| {
            answer.as_mut().unwrap().instances[0].seen = evidence.clone();
        };
        set(&mut world.heard.evacuated.lock().unwrap());
        world.start(A).await;
        pause(5_000).await;
        assert_eq!(on_a(&world, id), RUNNING, "{evidence:?}");
        assert_eq!(removed(&world), [], "{evidence:?}");
    }
}

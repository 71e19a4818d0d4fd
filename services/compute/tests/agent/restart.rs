//! `kill -9` of an agent in every phase: it takes up what it finds.

use drover_compute::hypervisor::fake::{At, Fault as Mishap};
use drover_model::{
    api::compute::{AgentStatus, JobState, Outcome, method},
    guest::Presence,
    migration::Phase,
};

use crate::harness::*;

/// The guest is on the other side, whether somebody saw it go or not.
fn has_left(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Moved { .. } | Outcome::Gone)
}

#[tokio::test(start_paused = true)]
async fn a_source_that_dies_at_any_moment_still_tells_the_end() {
    // Setting up, disk, memory, about the switch-over, and after the end.
    for after_ms in [5, 50, 150, 300, 450, 600, 800, 900, 950, 1000, 1100, 3000] {
        let mut world = World::new().await;
        let m = world.migration(small());
        world.prepare(&m).await.unwrap();
        world.send(&m).await.unwrap();
        pause(after_ms).await;
        world.restart(A).await;
        let outcome = world.outcome(&m).await;
        assert!(has_left(&outcome), "after {after_ms} ms: {outcome:?}");
        world.settle(&m).await;
        world.assert_tidy(&m, B);
    }
}

#[tokio::test(start_paused = true)]
async fn a_source_that_dies_before_libvirt_was_asked_finds_the_guest_where_it_was() {
    let mut world = World::new().await;
    let m = world.migration(small());
    world.prepare(&m).await.unwrap();
    world.send(&m).await.unwrap();
    world.restart(A).await;
    let outcome = world.outcome(&m).await;
    assert!(matches!(outcome, Outcome::Failed { .. }), "{outcome:?}");
    world.take_back(&m).await;
    world.assert_tidy(&m, A);
}

#[tokio::test(start_paused = true)]
async fn a_source_that_was_away_while_the_guest_left_finds_it_gone() {
    let mut world = World::new().await;
    let m = world.migration(small());
    world.prepare(&m).await.unwrap();
    world.send(&m).await.unwrap();
    pause(300).await;
    world.kill(A);
    pause(10_000).await;
    world.start(A).await;
    assert_eq!(world.outcome(&m).await, Outcome::Gone);
    world.restart(A).await;
    assert!(
        matches!(world.job(&m).await, JobState::Ended { .. }),
        "and remembers it"
    );
    world.settle(&m).await;
    world.assert_tidy(&m, B);
}

#[tokio::test(start_paused = true)]
async fn or_finds_it_still_there() {
    let mut world = World::new().await;
    let m = world.migration(small());
    world.prepare(&m).await.unwrap();
    world.fabric.on_migration(
        m.step.instance,
        At::Memory(50),
        Mishap::Fail("no".to_owned()),
    );
    world.send(&m).await.unwrap();
    pause(300).await;
    world.kill(A);
    pause(10_000).await;
    world.start(A).await;
    assert!(matches!(world.outcome(&m).await, Outcome::Failed { .. }));
    world.take_back(&m).await;
    world.assert_tidy(&m, A);
}

#[tokio::test(start_paused = true)]
async fn an_attached_transfer_can_be_aborted_and_forced() {
    let mut world = World::new().await;
    let m = world.migration(busy());
    world.prepare(&m).await.unwrap();
    world.send(&m).await.unwrap();
    pause(2_000).await;
    world.restart(A).await;
    pause(1_000).await;
    let JobState::Running { progress } = world.job(&m).await else {
        panic!()
    };
    assert_eq!(progress.phase, Phase::Memory);
    assert!(
        progress.elapsed_ms >= 2_900,
        "its time goes on: {}",
        progress.elapsed_ms
    );
    world.ask(A, method::ABORT, &m).await.unwrap();
    assert_eq!(world.outcome(&m).await, Outcome::Aborted);
    world.take_back(&m).await;
    world.assert_tidy(&m, A);

    let m = world.migration_of(m.step.instance);
    world.prepare(&m).await.unwrap();
    world.send(&m).await.unwrap();
    pause(2_000).await;
    world.restart(A).await;
    world.ask(A, method::FORCE_COMPLETE, &m).await.unwrap();
    assert!(has_left(&world.outcome(&m).await));
    world.settle(&m).await;
    world.assert_tidy(&m, B);
}

#[tokio::test(start_paused = true)]
async fn a_stall_is_seen_by_an_attached_monitor_too() {
    let mut world = World::new().await;
    let m = world.migration(small());
    world.send_into(&m, At::Memory(50), Mishap::Stall).await;
    pause(2_000).await;
    world.restart(A).await;
    assert!(matches!(world.outcome(&m).await, Outcome::Stalled { .. }));
    world.take_back(&m).await;
    world.assert_tidy(&m, A);
}

#[tokio::test(start_paused = true)]
async fn agent_and_libvirtd_may_both_be_away() {
    let mut world = World::new().await;
    let m = world.migration(small());
    world.prepare(&m).await.unwrap();
    world.send(&m).await.unwrap();
    pause(300).await;
    world.kill(A);
    world.fabric.libvirtd_away(A);
    world.launch(A);
    pause(20_000).await;
    let JobState::Running { progress } = world.job(&m).await else {
        panic!("unknown is not ended")
    };
    assert!(
        progress
            .note
            .unwrap()
            .contains("waiting for this node's libvirt")
    );
    world.fabric.libvirtd_back(A);
    assert!(has_left(&world.outcome(&m).await));
    world.settle(&m).await;
    world.assert_tidy(&m, B);
}

#[tokio::test(start_paused = true)]
async fn a_destination_that_dies_remembers_what_it_made() {
    // After preparing, during the transfer, after it.
    for after_ms in [None, Some(0), Some(600), Some(5_000)] {
        let mut world = World::new().await;
        let m = world.migration(small());
        world.prepare(&m).await.unwrap();
        let Some(after_ms) = after_ms else {
            world.restart(B).await;
            assert_eq!(world.prepare(&m).await, Ok(()), "it is ready");
            world.restart(B).await;
            world.take_back(&m).await;
            world.assert_tidy(&m, A);
            continue;
        };
        world.send(&m).await.unwrap();
        pause(after_ms).await;
        world.restart(B).await;
        assert!(has_left(&world.outcome(&m).await));
        world.settle(&m).await;
        world.assert_tidy(&m, B);
    }
}

#[tokio::test(start_paused = true)]
async fn a_destination_that_dies_while_it_creates_takes_back_what_there_may_be() {
    use drover_compute::hypervisor::fake::{Call, script::Effect};
    for slow in [
        Effect::SlowBefore(std::time::Duration::from_secs(5)),
        Effect::SlowAfter(std::time::Duration::from_secs(5)),
    ] {
        for go_on in [false, true] {
            let mut world = World::new().await;
            let m = world.migration(small());
            let ask = m.prepare(world.guest(&m).await);
            world.check_path(&m).await.unwrap();
            world.fabric.on_call(B, Call::CreateDisk, 1, slow.clone());
            let lost = tokio::time::timeout(
                std::time::Duration::from_secs(1),
                world.call::<()>(B, method::PRE_LIVE_MIGRATION, &ask),
            );
            assert!(lost.await.is_err());
            world.restart(B).await;
            if go_on {
                world
                    .call::<()>(B, method::PRE_LIVE_MIGRATION, &ask)
                    .await
                    .unwrap();
                world.send(&m).await.unwrap();
                assert!(has_left(&world.outcome(&m).await));
                world.settle(&m).await;
                world.assert_tidy(&m, B);
            } else {
                world.take_back(&m).await;
                world.assert_tidy(&m, A);
            }
        }
    }
}

/// A former version of the agent made disks without writing down which files they are.
#[tokio::test(start_paused = true)]
async fn what_is_not_known_to_be_the_migrations_own_stays_and_is_named() {
    use drover_compute::hypervisor::fake::{Call, script::Effect};
    let mut world = World::new().await;
    let m = world.migration(small());
    let ask = m.prepare(world.guest(&m).await);
    world.check_path(&m).await.unwrap();
    let slow = Effect::SlowBefore(std::time::Duration::from_secs(5));
    world.fabric.on_call(B, Call::ReserveFile, 1, slow);
    let lost = tokio::time::timeout(
        std::time::Duration::from_secs(1),
        world.call::<()>(B, method::PRE_LIVE_MIGRATION, &ask),
    );
    assert!(lost.await.is_err());
    world.fabric.write_file(B, DISK, "half an image").unwrap();
    world.restart(B).await;
    for _ in ["once", "again"] {
        let asked = world.call::<()>(B, method::PRE_LIVE_MIGRATION, &ask);
        let refused = asked.await.unwrap_err();
        assert!(refused.message.contains(DISK), "{refused}");
    }
    world.ask(A, method::ROLLBACK_AT_SOURCE, &m).await.unwrap();
    let undone = world.clean_up(B, method::ROLLBACK_AT_DESTINATION, &m);
    let undone = undone.await.unwrap();
    assert!(undone.kept.iter().any(|words| words.contains(DISK)));
    assert!(world.fabric.file(B, DISK).is_some());
    assert_eq!(world.journal_files(B), Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn marks_of_a_former_life_are_removed_at_the_start() {
    let mut world = World::new().await;
    let m = world.migration(small());
    world.guest(&m).await;
    assert_eq!(world.fabric.leftovers().len(), 1, "the mark");
    world.restart(A).await;
    pause(100).await;
    world.assert_tidy(&m, A);
}

#[tokio::test(start_paused = true)]
async fn a_journal_that_cannot_be_read_stops_nothing() {
    let mut world = World::new().await;
    let m = world.migration(small());
    world.prepare(&m).await.unwrap();
    world.kill(B);
    let file = world
        .state_dir(B)
        .join(format!("migrations/{}.json", m.step.migration));
    std::fs::write(&file, "{ half").unwrap();
    world.start(B).await;
    assert!(file.with_extension("json.corrupt").exists());
    // It knows of nothing, so it removes nothing.
    let undone = world
        .clean_up(B, method::ROLLBACK_AT_DESTINATION, &m)
        .await
        .unwrap();
    assert_eq!(undone.removed, Vec::<String>::new());
    assert_eq!(world.locate(B, &m).await, Presence::Absent);
}

#[tokio::test(start_paused = true)]
async fn a_stopped_agent_lets_the_transfer_go_on() {
    let mut world = World::new().await;
    let m = world.migration(small());
    world.prepare(&m).await.unwrap();
    world.send(&m).await.unwrap();
    pause(300).await;
    world.stop(A).await;
    world.start(A).await;
    let status: AgentStatus = world
        .call(A, method::GET_STATUS, &serde_json::json!({}))
        .await
        .unwrap();
    assert_eq!(status.migrations, vec![m.step.migration]);
    assert_eq!(status.counters["transfers_attached"], 1);
    assert!(has_left(&world.outcome(&m).await));
    world.settle(&m).await;
    world.assert_tidy(&m, B);
}

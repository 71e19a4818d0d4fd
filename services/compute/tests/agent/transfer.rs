//! Every way a transfer can go and end, and what is wanted of it on the way.

use drover_compute::hypervisor::{
    ColdDriver, HypervisorError, RebuildDriver,
    fake::{At, Call, End, Fault as Mishap, script::Effect},
};
use drover_model::{
    api::compute::{JobState, Outcome, method},
    error::ErrorClass,
    guest::{PowerState, Presence},
    migration::Phase,
};

use crate::harness::*;

/// Longer than a transfer without news is waited for, and its end after that.
const PATIENCE_MS: u64 = 200_000;

#[tokio::test(start_paused = true)]
async fn an_abort_is_heeded_in_every_phase_before_the_switch_over() {
    // 200 ms of setting up, 200 ms of disk, then half a second of memory.
    for after_ms in [0, 100, 300, 500, 700] {
        let world = World::new().await;
        let m = world.migration(small());
        world.prepare(&m).await.unwrap();
        world.send(&m).await.unwrap();
        pause(after_ms).await;
        world.ask(A, method::ABORT, &m).await.unwrap();
        world.ask(A, method::ABORT, &m).await.unwrap();
        assert_eq!(
            world.outcome(&m).await,
            Outcome::Aborted,
            "after {after_ms} ms"
        );
        world.ask(A, method::ABORT, &m).await.unwrap();
        world.take_back(&m).await;
        world.take_back(&m).await;
        world.assert_tidy(&m, A);
        assert_eq!(world.job(&m).await.clone(), world.job(&m).await);
    }
}

#[tokio::test(start_paused = true)]
async fn there_is_nothing_to_abort_before_and_nothing_to_stop_after() {
    let world = World::new().await;
    let mut m = world.migration(busy());
    for wish in [method::ABORT, method::FORCE_COMPLETE] {
        assert_eq!(
            world.ask(A, wish, &m).await.unwrap_err().class,
            ErrorClass::Refused
        );
    }
    m.options.post_copy = true;
    world.send_into(&m, At::PostCopy(0), Mishap::Stall).await;
    let phase = loop {
        pause(200).await;
        match world.job(&m).await {
            JobState::Running { progress } if progress.phase < Phase::PostCopy => {}
            JobState::Running { progress } => break progress.phase,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(phase, Phase::PostCopy);
    let late = world.ask(A, method::ABORT, &m).await.unwrap_err();
    assert!(late.message.contains("too late"), "{late}");
    world.fabric.unstall(m.step.instance);
    assert!(matches!(world.outcome(&m).await, Outcome::Moved { .. }));
    world.settle(&m).await;
    world.assert_tidy(&m, B);
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_does_not_converge_is_given_up_with_the_reason() {
    let world = World::new().await;
    let m = world.migration(busy());
    world.prepare(&m).await.unwrap();
    world.send(&m).await.unwrap();
    let Outcome::Stalled {
        message,
        of_guest: true,
    } = world.outcome(&m).await
    else {
        panic!("must stall")
    };
    assert!(
        message.contains("the guest dirties") && message.contains("the link carries"),
        "{message}"
    );
    pause(100).await;
    let reports = world.reports(&m);
    let decisions: Vec<String> = reports.iter().flat_map(|r| r.decisions.clone()).collect();
    assert!(
        decisions
            .iter()
            .any(|d| d.starts_with("allowed downtime raised to 500 ms")),
        "{decisions:?}"
    );
    assert!(
        decisions.iter().any(|d| d.starts_with("given up")),
        "{decisions:?}"
    );
    let stuck = reports
        .iter()
        .rev()
        .find(|r| r.progress.note.is_some())
        .unwrap();
    assert_eq!(stuck.progress.eta_ms, None, "no time of arrival is made up");
    world.take_back(&m).await;
    world.assert_tidy(&m, A);
}

#[tokio::test(start_paused = true)]
async fn or_runs_ahead_of_its_memory_if_it_may() {
    let world = World::new().await;
    let mut m = world.migration(busy());
    m.options.post_copy = true;
    world.prepare(&m).await.unwrap();
    world.send(&m).await.unwrap();
    assert!(matches!(world.outcome(&m).await, Outcome::Moved { .. }));
    world.settle(&m).await;
    world.assert_tidy(&m, B);
}

#[tokio::test(start_paused = true)]
async fn a_stalled_link_is_no_reason_to_wait_for_ever() {
    for at in [At::Start, At::Disk(50), At::Memory(50)] {
        let world = World::new().await;
        let m = world.migration(small());
        world.send_into(&m, at, Mishap::Stall).await;
        let outcome = world.outcome(&m).await;
        assert!(
            matches!(
                &outcome,
                Outcome::Stalled {
                    of_guest: false,
                    ..
                }
            ),
            "{at:?}: {outcome:?}"
        );
        world.take_back(&m).await;
        world.assert_tidy(&m, A);
    }
}

/// A QEMU that waits for a dead peer answers nobody, nor does libvirt for it.
#[tokio::test(start_paused = true)]
async fn what_is_not_heard_of_any_more_is_cut_off_in_the_end() {
    let world = World::new().await;
    let m = world.migration(small());
    world.send_into(&m, At::Memory(50), Mishap::Stall).await;
    pause(2_000).await;
    world.fabric.libvirtd_away(A);
    assert_eq!(world.locate(B, &m).await, Presence::Incoming);
    pause(PATIENCE_MS).await;
    assert_eq!(world.locate(B, &m).await, Presence::Absent);
    assert!(matches!(world.job(&m).await, JobState::Running { .. }));
    world.fabric.libvirtd_back(A);
    let outcome = world.outcome(&m).await;
    let Outcome::Stalled {
        message,
        of_guest: false,
    } = &outcome
    else {
        panic!("{outcome:?}")
    };
    assert!(message.contains("nothing was heard"), "{message}");
    world.take_back(&m).await;
    world.assert_tidy(&m, A);
}

#[tokio::test(start_paused = true)]
async fn force_complete_ends_what_would_not_end() {
    for post_copy in [false, true] {
        let world = World::new().await;
        let mut m = world.migration(busy());
        m.options.post_copy = post_copy;
        world.prepare(&m).await.unwrap();
        world.send(&m).await.unwrap();
        // While its disk is copied the wish is kept, not refused.
        pause(250).await;
        world.ask(A, method::FORCE_COMPLETE, &m).await.unwrap();
        world.ask(A, method::FORCE_COMPLETE, &m).await.unwrap();
        assert!(matches!(world.outcome(&m).await, Outcome::Moved { .. }));
        assert_eq!(
            world.locate(B, &m).await,
            Presence::Present(PowerState::Running)
        );
        world.ask(A, method::FORCE_COMPLETE, &m).await.unwrap();
        world.settle(&m).await;
        world.assert_tidy(&m, B);
    }
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_force_complete_paused_runs_on_when_it_stays() {
    let world = World::new().await;
    let m = world.migration(busy());
    world.prepare(&m).await.unwrap();
    world.send(&m).await.unwrap();
    pause(1_000).await;
    world.ask(A, method::FORCE_COMPLETE, &m).await.unwrap();
    world.fabric.on_migration(
        m.step.instance,
        At::SwitchOver,
        Mishap::Fail("no".to_owned()),
    );
    world
        .fabric
        .on_migration(m.step.instance, At::SwitchOver, Mishap::LeavePaused);
    let outcome = world.outcome(&m).await;
    assert!(matches!(outcome, Outcome::Failed { .. }), "{outcome:?}");
    world.take_back(&m).await;
    assert_eq!(
        world.locate(A, &m).await,
        Presence::Present(PowerState::Running)
    );
    world.assert_tidy(&m, A);
}

#[tokio::test(start_paused = true)]
async fn a_failure_says_whose_words_it_has_and_leaves_the_guest() {
    for (at, mishap) in [
        (At::Start, Mishap::Fail("internal error: boom".to_owned())),
        (
            At::Disk(50),
            Mishap::Fail("internal error: boom".to_owned()),
        ),
        (At::Memory(50), Mishap::QemuDies(End::Destination)),
        (At::Memory(50), Mishap::LibvirtdDies(End::Destination)),
        (
            At::SwitchOver,
            Mishap::Fail("internal error: boom".to_owned()),
        ),
    ] {
        let world = World::new().await;
        let m = world.migration(small());
        world.prepare(&m).await.unwrap();
        world
            .fabric
            .on_migration(m.step.instance, at, mishap.clone());
        world.send(&m).await.unwrap();
        let Outcome::Failed { message } = world.outcome(&m).await else {
            panic!("{at:?} {mishap:?}")
        };
        assert!(!message.is_empty());
        world.fabric.libvirtd_back(B);
        world.take_back(&m).await;
        world.assert_tidy(&m, A);
    }
}

#[tokio::test(start_paused = true)]
async fn a_transfer_whose_answer_is_lost_is_looked_after() {
    for at in [At::Disk(50), At::Memory(50), At::SwitchOver, At::Finish] {
        let world = World::new().await;
        let m = world.migration(small());
        world.send_into(&m, at, Mishap::LoseCaller).await;
        let outcome = world.outcome(&m).await;
        assert!(
            matches!(outcome, Outcome::Moved { .. } | Outcome::Gone),
            "{at:?}: {outcome:?}"
        );
        world.settle(&m).await;
        world.assert_tidy(&m, B);
    }
}

/// The hypervisor took along what lasted before, and would remove what lasts now.
#[tokio::test(start_paused = true)]
async fn a_guest_that_is_defined_anew_while_it_is_sent_stays_with_what_it_got() {
    for agent_dies in [false, true] {
        let mut world = World::new().await;
        let m = world.migration(busy());
        let id = m.step.instance;
        world.prepare(&m).await.unwrap();
        world.send(&m).await.unwrap();
        pause(3000).await;
        if agent_dies {
            world.kill(A);
        }
        world.fabric.redefine(A, id, |guest| guest.vcpus = 4);
        if agent_dies {
            world.start(A).await;
        }
        let outcome = world.outcome(&m).await;
        let Outcome::Failed { message } = &outcome else {
            panic!("{agent_dies}: {outcome:?}")
        };
        let words = "lasting definition was changed during the move";
        assert!(message.contains(words), "{message}");
        world.take_back(&m).await;
        world.assert_tidy(&m, A);
        let lasting = world.fabric.driver(A).lasting_guest(id).await;
        assert_eq!(lasting.unwrap().unwrap().vcpus, 4, "{agent_dies}");
    }
}

#[tokio::test(start_paused = true)]
async fn drovers_own_note_stops_no_transfer_nor_does_what_cannot_be_read() {
    let world = World::new().await;
    let m = world.migration(small());
    world.prepare(&m).await.unwrap();
    world.send(&m).await.unwrap();
    world.fabric.set_autostart(A, m.step.instance, true);
    let driver = world.fabric.driver(A);
    driver.take_over_autostart(m.step.instance).await.unwrap();
    let no = Effect::Refuse(HypervisorError::Failed("no".to_owned()));
    world.fabric.on_call(A, Call::Definition, 2, no);
    assert!(matches!(world.outcome(&m).await, Outcome::Moved { .. }));
    world.settle(&m).await;
    world.assert_tidy(&m, B);
}

#[tokio::test(start_paused = true)]
async fn who_defines_a_guest_anew_at_its_switch_over_comes_too_late() {
    let world = World::new().await;
    let m = world.migration(small());
    world.send_into(&m, At::SwitchOver, Mishap::Stall).await;
    loop {
        pause(200).await;
        match world.job(&m).await {
            JobState::Running { progress } if progress.phase < Phase::SwitchOver => {}
            JobState::Running { .. } => break,
            other => panic!("{other:?}"),
        }
    }
    world
        .fabric
        .redefine(A, m.step.instance, |guest| guest.vcpus = 4);
    pause(2000).await;
    world.fabric.unstall(m.step.instance);
    assert!(matches!(world.outcome(&m).await, Outcome::Moved { .. }));
    world.settle(&m).await;
    world.assert_tidy(&m, B);
}

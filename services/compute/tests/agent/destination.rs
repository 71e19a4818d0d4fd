//! The destination's steps: what it makes, keeps, takes back and never touches.

use drover_compute::hypervisor::{
    HypervisorError,
    fake::{At, Call, Fault as Mishap, script::Effect},
};
use drover_model::{
    api::{
        compute::{CopyHistory, CopySeen, FileSeen, Outcome, PreLiveMigration, Survivor, method},
        fault::{Fault, code},
    },
    content::CheckedFile,
    error::ErrorClass,
    guest::{PowerState, Presence},
};

use crate::harness::*;

#[tokio::test(start_paused = true)]
async fn what_was_made_ready_is_taken_back() {
    let world = World::new().await;
    let m = world.migration(small());
    world.prepare(&m).await.unwrap();
    assert!(world.fabric.file(B, DISK).is_some());
    let undone = world
        .clean_up(B, method::ROLLBACK_AT_DESTINATION, &m)
        .await
        .unwrap();
    assert_eq!(undone.removed, vec![DISK.to_owned()]);
    let again = world
        .clean_up(B, method::ROLLBACK_AT_DESTINATION, &m)
        .await
        .unwrap();
    assert_eq!(again, undone);
    world.assert_tidy(&m, A);
    let late = world.prepare(&m).await.unwrap_err();
    assert!(
        late.message.contains("over"),
        "a late repeat creates nothing: {late}"
    );
    world.assert_tidy(&m, A);
}

#[tokio::test(start_paused = true)]
async fn what_was_made_ready_keeps_another_migration_away_until_it_is_taken_back() {
    let world = World::new().await;
    let m = world.migration(small());
    world.prepare(&m).await.unwrap();
    let other = world.migration_of(m.step.instance);
    let busy = world.check_destination(&other).await.unwrap_err();
    assert_eq!(&*busy.code, code::INSTANCE_BUSY, "{busy}");
    world
        .clean_up(B, method::ROLLBACK_AT_DESTINATION, &m)
        .await
        .unwrap();
    world.check_destination(&other).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn asked_twice_at_once_it_is_made_once() {
    let world = World::new().await;
    let m = world.migration(small());
    let ask = m.prepare(world.guest(&m).await);
    world.check_path(&m).await.unwrap();
    let (one, two) = tokio::join!(
        world.call::<()>(B, method::PRE_LIVE_MIGRATION, &ask),
        world.call::<()>(B, method::PRE_LIVE_MIGRATION, &ask),
    );
    assert_eq!((one, two), (Ok(()), Ok(())));
}

#[tokio::test(start_paused = true)]
async fn somebody_elses_file_is_never_touched() {
    let world = World::new().await;
    let m = world.migration(small());
    world.fabric.write_file(B, DISK, "precious").unwrap();
    let refused = world.prepare(&m).await.unwrap_err();
    assert_eq!(refused.class, ErrorClass::Refused);
    assert!(refused.message.contains("already"), "{refused}");
    let undone = world
        .clean_up(B, method::ROLLBACK_AT_DESTINATION, &m)
        .await
        .unwrap();
    assert_eq!(undone.removed, Vec::<String>::new());
    assert!(world.fabric.file(B, DISK).is_some());
    assert_eq!(world.journal_files(B), Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn a_disk_that_could_not_be_created_is_tried_again() {
    let world = World::new().await;
    let m = world.migration(small());
    let full = HypervisorError::Failed("No space left on device".to_owned());
    world
        .fabric
        .on_call(B, Call::CreateDisk, 1, Effect::Refuse(full));
    let refused = world.prepare(&m).await.unwrap_err();
    assert_eq!(&*refused.code, code::HYPERVISOR_REFUSED);
    assert_eq!(world.prepare(&m).await, Ok(()));
    // Created, and the answer lost: the second attempt makes it anew.
    let other = world.migration(
        small()
            .id(drover_model::ids::InstanceId(uuid::Uuid::from_u128(3)))
            .with(|g| {
                g.name = "other".to_owned();
                for disk in &mut g.disks {
                    disk.source = drover_model::guest::DiskSource::File {
                        path: format!("{DISK}.2"),
                    };
                }
            }),
    );
    let lost = Effect::Forget(HypervisorError::Lost("gone".to_owned()));
    world.fabric.on_call(B, Call::CreateDisk, 1, lost);
    assert_eq!(
        world.prepare(&other).await.unwrap_err().class,
        ErrorClass::Lost
    );
    assert_eq!(world.prepare(&other).await, Ok(()));
    for m in [&m, &other] {
        world.take_back(m).await;
    }
    world.assert_tidy(&m, A);
}

#[tokio::test(start_paused = true)]
async fn a_domain_that_is_here_already_refuses_the_guest() {
    let world = World::new().await;
    let m = world.migration(small());
    let guest = world.guest(&m).await;
    world.fabric.add_guest(
        B,
        small()
            .id(m.step.instance)
            .state(PowerState::Shutdown)
            .disk("/var/lib/libvirt/images/b.qcow2", 1),
    );
    let ask = m.prepare(guest);
    let refused = world
        .call::<()>(B, method::PRE_LIVE_MIGRATION, &ask)
        .await
        .unwrap_err();
    assert!(
        refused.message.contains("on this node already"),
        "{refused}"
    );
    // And a take-back leaves it alone, for it was not made by this migration.
    let undone = world
        .clean_up(B, method::ROLLBACK_AT_DESTINATION, &m)
        .await
        .unwrap();
    assert_eq!((undone.removed.len(), undone.warnings.len()), (0, 0));
    assert_eq!(
        world.locate(B, &m).await,
        Presence::Present(PowerState::Shutdown)
    );
}

#[tokio::test(start_paused = true)]
async fn disks_that_cannot_be_copied_are_refused() {
    let world = World::new().await;
    let m = world.migration(small());
    let good = m.prepare(world.guest(&m).await);
    let mut read_only = good.clone();
    read_only.guest.disks[0].read_only = true;
    let mut relative = good.clone();
    relative.guest.disks[0].source = drover_model::guest::DiskSource::File {
        path: "x".to_owned(),
    };
    let mut unknown = good.clone();
    unknown.copied_disks = vec!["vdq".to_owned()];
    for bad in [read_only, relative, unknown] {
        let refused = world
            .call::<()>(B, method::PRE_LIVE_MIGRATION, &bad)
            .await
            .unwrap_err();
        assert!(
            refused.message.contains("no disk that could be copied"),
            "{refused}"
        );
    }
    assert_eq!(world.journal_files(B), Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_is_active_here_is_never_taken_back() {
    let world = World::new().await;
    let m = world.migration(small());
    world.prepare(&m).await.unwrap();
    world.send(&m).await.unwrap();
    assert!(matches!(world.outcome(&m).await, Outcome::Moved { .. }));
    let refused = world
        .clean_up(B, method::ROLLBACK_AT_DESTINATION, &m)
        .await
        .unwrap_err();
    assert_eq!(refused.class, ErrorClass::Refused);
    assert!(refused.message.contains("active on this node"), "{refused}");
    world.settle(&m).await;
    world.assert_tidy(&m, B);
}

#[tokio::test(start_paused = true)]
async fn what_a_failed_move_left_behind_is_removed() {
    for left in [Mishap::LeaveIncoming, Mishap::LeaveStaleCopy] {
        let world = World::new().await;
        let m = world.migration(small());
        world.prepare(&m).await.unwrap();
        world
            .fabric
            .on_migration(m.step.instance, At::Memory(50), left.clone());
        world.fabric.on_migration(
            m.step.instance,
            At::Memory(60),
            Mishap::Fail("no".to_owned()),
        );
        world.send(&m).await.unwrap();
        assert!(
            matches!(world.outcome(&m).await, Outcome::Failed { .. }),
            "{left:?}"
        );
        if world.locate(B, &m).await.is_active() {
            // That is for a conductor to sort out; the agent keeps its hands off.
            world
                .clean_up(B, method::ROLLBACK_AT_DESTINATION, &m)
                .await
                .unwrap_err();
            continue;
        }
        world.take_back(&m).await;
        world.assert_tidy(&m, A);
    }
}

#[tokio::test(start_paused = true)]
async fn arrival_is_confirmed_only_of_a_guest_that_runs_here() {
    let world = World::new().await;
    let m = world.migration(small());
    world.prepare(&m).await.unwrap();
    world.send(&m).await.unwrap();
    pause(600).await;
    let arriving = world
        .clean_up(B, method::POST_AT_DESTINATION, &m)
        .await
        .unwrap_err();
    assert_eq!(arriving.class, ErrorClass::Retryable);
    world.outcome(&m).await;
    world
        .fabric
        .edit_guest(B, m.step.instance, |guest| guest.persistent = false);
    let there = world
        .clean_up(B, method::POST_AT_DESTINATION, &m)
        .await
        .unwrap();
    assert!(there.warnings[0].contains("transient"), "{there:?}");
    assert_eq!(world.journal_files(B), Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn what_could_not_be_removed_is_removed_when_asked_again() {
    let world = World::new().await;
    let m = world.migration(small());
    world.prepare(&m).await.unwrap();
    let busy = Effect::Refuse(HypervisorError::Failed(
        "Device or resource busy".to_owned(),
    ));
    world.fabric.on_call(B, Call::RemoveDisk, 1, busy);
    let first = world
        .clean_up(B, method::ROLLBACK_AT_DESTINATION, &m)
        .await
        .unwrap();
    assert!(first.warnings[0].contains("busy"), "{first:?}");
    world.take_back(&m).await;
    world.assert_tidy(&m, A);
}

#[tokio::test(start_paused = true)]
async fn while_libvirt_is_away_nothing_is_removed_or_forgotten() {
    let world = World::new().await;
    let m = world.migration(small());
    world.prepare(&m).await.unwrap();
    world.fabric.libvirtd_away(B);
    let fault = world
        .clean_up(B, method::ROLLBACK_AT_DESTINATION, &m)
        .await
        .unwrap_err();
    assert_eq!(
        (fault.class, &*fault.code),
        (ErrorClass::Retryable, code::HYPERVISOR_UNREACHABLE)
    );
    assert!(world.fabric.file(B, DISK).is_some());
    world.fabric.libvirtd_back(B);
    pause(1000).await;
    world.take_back(&m).await;
    world.assert_tidy(&m, A);
}

#[tokio::test(start_paused = true)]
async fn nothing_is_taken_back_without_the_sight_of_another_copy() {
    let world = World::new().await;
    let m = world.migration(small());
    world.prepare(&m).await.unwrap();
    let refused = world.remove(B, method::ROLLBACK_AT_DESTINATION, &m, None);
    let refused = refused.await.unwrap_err();
    assert!(refused.message.contains("no copy is named"), "{refused}");
    let mut absent = world.survivor(A, &m).await.unwrap();
    absent.copy.presence = Presence::Absent;
    let mut lost = world.survivor(A, &m).await.unwrap();
    lost.copy.files[0].exists = false;
    let mut gave = world.survivor(A, &m).await.unwrap();
    gave.copy.known.moved_away = true;
    for evidence in [absent, lost, gave] {
        let asked = world.remove(B, method::ROLLBACK_AT_DESTINATION, &m, Some(evidence));
        let refused = asked.await.unwrap_err();
        assert_eq!(refused.class, ErrorClass::Refused);
        assert!(world.fabric.file(B, DISK).is_some(), "{refused}");
    }
    world.take_back(&m).await;
    world.assert_tidy(&m, A);
}

/// Its agent has seen it run, or finds so when it is back; the journal has it then.
#[tokio::test(start_paused = true)]
async fn a_guest_that_ran_here_is_never_taken_back_also_when_it_is_off() {
    for agent_restarts in [false, true] {
        let mut world = World::new().await;
        let m = world.migration(small());
        world.prepare(&m).await.unwrap();
        world.send(&m).await.unwrap();
        assert!(matches!(world.outcome(&m).await, Outcome::Moved { .. }));
        if agent_restarts {
            world.restart(B).await;
        }
        pause(1_000).await;
        world.fabric.kill_guest(m.step.instance);
        world.restart(B).await;
        let evidence = Survivor {
            host: host(A),
            seen_at_ms: 1,
            copy: CopySeen {
                presence: Presence::Present(PowerState::Shutdown),
                migrating: false,
                generation: Some(0),
                files: vec![FileSeen {
                    path: DISK.to_owned(),
                    exists: true,
                    length_bytes: 1 << 30,
                }],
                aside: None,
                known: CopyHistory::default(),
            },
            moved_on: false,
        };
        let asked = world.remove(B, method::ROLLBACK_AT_DESTINATION, &m, Some(evidence));
        let refused = asked.await.unwrap_err();
        assert!(refused.message.contains("ran on this node"), "{refused}");
        assert!(world.fabric.file(B, DISK).is_some());
        let (there, here) = world.settle(&m).await;
        assert!(
            there.warnings.iter().any(|w| w.contains("off")),
            "{there:?}"
        );
        assert_eq!(
            here.removed,
            [DISK.to_owned()],
            "the newer one is seen at B"
        );
        assert!(world.fabric.file(B, DISK).is_some());
        assert_eq!(world.journal_files(B), Vec::<String>::new());
    }
}

#[tokio::test(start_paused = true)]
async fn a_source_gives_nothing_up_without_the_sight_of_the_copy_there() {
    let world = World::new().await;
    let m = world.migration(small());
    world.prepare(&m).await.unwrap();
    world.send(&m).await.unwrap();
    assert!(matches!(world.outcome(&m).await, Outcome::Moved { .. }));
    let mut lost = world.survivor(B, &m).await.unwrap();
    lost.copy.files.clear();
    for evidence in [None, Some(lost)] {
        let asked = world.remove(A, method::POST_LIVE_MIGRATION, &m, evidence);
        let refused = asked.await.unwrap_err();
        assert_eq!(refused.class, ErrorClass::Refused, "{refused}");
        assert!(world.fabric.file(A, DISK).is_some(), "{refused}");
    }
    world.settle(&m).await;
    world.assert_tidy(&m, B);
}

#[tokio::test(start_paused = true)]
async fn nothing_is_made_ready_over_a_file_that_changed_since_it_was_compared() {
    let world = World::new().await;
    let m = world.migration(busy());
    let iso = "/var/lib/libvirt/images/tools.iso";
    world.fabric.write_file(B, iso, "bytes").unwrap();
    let guest = world.guest(&m).await;
    let ask = |stamp| PreLiveMigration {
        checked: vec![CheckedFile {
            path: iso.to_owned(),
            stamp,
        }],
        ..m.prepare(guest.clone())
    };
    let stamp = world.stamp(B, iso).await;
    let prepared: Result<(), Fault> = world
        .call(B, method::PRE_LIVE_MIGRATION, &ask(stamp.clone()))
        .await;
    prepared.unwrap();
    world.fabric.change_file(B, iso).unwrap();
    let again: Result<(), Fault> = world.call(B, method::PRE_LIVE_MIGRATION, &ask(stamp)).await;
    let fault = again.unwrap_err();
    assert_eq!(fault.class, ErrorClass::Refused);
    assert!(fault.message.contains(iso), "{}", fault.message);
}

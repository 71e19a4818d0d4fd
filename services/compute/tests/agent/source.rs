//! The source's steps.

use drover_compute::hypervisor::{
    HypervisorError,
    fake::{At, Call, Fault as Mishap, script::Effect},
};
use drover_model::{
    api::{
        compute::{JobState, KnownDisk, LiveMigration, Outcome, PathFacts, SourceFacts, method},
        fault::{Fault, code},
    },
    content::CheckedFile,
    error::ErrorClass,
    guest::Presence,
    migration::Phase,
};

use crate::harness::*;

#[tokio::test(start_paused = true)]
async fn a_guest_moves_and_every_step_may_be_asked_twice() {
    let world = World::new().await;
    let m = world.migration(small());
    let facts = world.check_destination(&m).await.unwrap();
    assert!(facts.reach_source.is_ok() && facts.probe_port.is_ok());
    assert_eq!(world.prepare(&m).await, Ok(()));
    assert_eq!(world.prepare(&m).await, Ok(()));
    let (first, second) = tokio::join!(world.send(&m), world.send(&m));
    assert!(matches!(first, Ok(JobState::Running { .. })));
    assert!(matches!(second, Ok(JobState::Running { .. })));
    let Outcome::Moved { total_ms, .. } = world.outcome(&m).await else {
        panic!("must move")
    };
    assert!(total_ms.is_some());
    assert!(
        matches!(world.send(&m).await, Ok(JobState::Ended { .. })),
        "not sent again"
    );

    let (there, here) = world.settle(&m).await;
    assert_eq!(there.warnings, Vec::<String>::new());
    assert!(
        there.downtime_ms.is_some() && there.total_ms.is_some(),
        "{there:?}"
    );
    assert_eq!(here.removed, vec![DISK.to_owned()]);
    world.assert_tidy(&m, B);

    let (there_again, here_again) = world.settle(&m).await;
    assert_eq!(
        (there_again.downtime_ms, here_again),
        (there.downtime_ms, here)
    );
    assert!(matches!(world.job(&m).await, JobState::Ended { .. }));
    assert!(
        matches!(world.send(&m).await, Ok(JobState::Ended { .. })),
        "a late repeat"
    );
    world.assert_tidy(&m, B);
}

#[tokio::test(start_paused = true)]
async fn the_outcome_is_reported_the_moment_the_transfer_ends() {
    let world = World::new().await;
    let m = world.migration(small());
    world.prepare(&m).await.unwrap();
    world.send(&m).await.unwrap();
    world.outcome(&m).await;
    pause(1000).await;
    let reports = world.reports(&m);
    let (last, before) = reports.split_last().unwrap();
    assert!(matches!(last.outcome, Some(Outcome::Moved { .. })));
    assert_eq!(last.progress.phase, Phase::Finishing);
    assert!(before.iter().all(|r| r.outcome.is_none()));
    assert!(before.iter().any(|r| r.progress.phase == Phase::Disk));
    let phases: Vec<Phase> = reports.iter().map(|r| r.progress.phase).collect();
    assert!(phases.is_sorted(), "{phases:?}");
    let heard = world.heard.migrations.lock().unwrap().last().unwrap().0;
    let Outcome::Moved { total_ms, .. } = last.outcome.clone().unwrap() else {
        panic!()
    };
    // The fabric's own time of the job, and not a polling interval more.
    assert!(total_ms.unwrap() <= last.progress.elapsed_ms);
    assert!(
        heard.elapsed().as_millis() >= 900,
        "long before the pause above ended"
    );
}

#[tokio::test(start_paused = true)]
async fn progress_is_reported_once_a_second() {
    let world = World::new().await;
    let m = world.migration(small().memory_mib(40_000));
    world.prepare(&m).await.unwrap();
    world.send(&m).await.unwrap();
    pause(20_000).await;
    let reports = world.reports(&m);
    assert!((18..=24).contains(&reports.len()), "{}", reports.len());
    let processed: Vec<u64> = reports
        .iter()
        .map(|r| r.progress.memory.processed_bytes)
        .collect();
    assert!(processed.is_sorted());
    assert!(reports.last().unwrap().progress.eta_ms.is_some());
    assert!(matches!(world.outcome(&m).await, Outcome::Moved { .. }));
}

#[tokio::test(start_paused = true)]
async fn marks_go_when_the_path_is_checked_or_after_a_minute() {
    let world = World::new().await;
    let m = world.migration(small());
    let first: SourceFacts = world
        .call(A, method::CHECK_SOURCE, &m.check_source())
        .await
        .unwrap();
    let second: SourceFacts = world
        .call(A, method::CHECK_SOURCE, &m.check_source())
        .await
        .unwrap();
    assert_eq!(first.marks, second.marks);
    let mark = first.marks[0].path.clone().unwrap();
    assert!(world.fabric.file(A, &mark).is_some());
    let path: PathFacts = world.check_path(&m).await.unwrap();
    assert!(path.libvirt.is_ok() && path.migration_port.is_err());
    assert!(world.fabric.file(A, &mark).is_none());

    let _: SourceFacts = world
        .call(A, method::CHECK_SOURCE, &m.check_source())
        .await
        .unwrap();
    pause(59_000).await;
    assert!(world.fabric.file(A, &mark).is_some());
    pause(2_000).await;
    assert!(world.fabric.file(A, &mark).is_none());
    world.assert_tidy(&m, A);
}

#[tokio::test(start_paused = true)]
async fn an_instance_that_is_not_here_is_no_error_of_the_check() {
    let world = World::new().await;
    let mut m = world.migration(small());
    m.step.instance = drover_model::ids::InstanceId(uuid::Uuid::from_u128(99));
    let facts: SourceFacts = world
        .call(A, method::CHECK_SOURCE, &m.check_source())
        .await
        .unwrap();
    assert!(facts.guest.is_none() && facts.marks.is_empty());
    let refused = world.send(&m).await.unwrap_err();
    assert_eq!(
        (refused.class, &*refused.code),
        (ErrorClass::Refused, code::STEP_REFUSED)
    );
    assert_eq!(world.job(&m).await, JobState::Unknown);
    assert_eq!(world.locate(A, &m).await, Presence::Absent);
}

#[tokio::test(start_paused = true)]
async fn what_does_not_fit_the_guest_is_refused_and_leaves_nothing() {
    let world = World::new().await;
    let mut m = world.migration(small());
    m.copied = vec!["vdz".to_owned()];
    assert!(world.send(&m).await.unwrap_err().message.contains("vdz"));
    m.copied.clear();
    m.options.max_downtime_ms = Some(0);
    assert!(
        world
            .send(&m)
            .await
            .unwrap_err()
            .message
            .contains("max_downtime_ms")
    );
    m.options.max_downtime_ms = None;
    world
        .fabric
        .set_other_job(A, m.step.instance, Some("backup"));
    assert!(
        world
            .send(&m)
            .await
            .unwrap_err()
            .message
            .contains("busy with the guest")
    );
    world.fabric.set_other_job(A, m.step.instance, None);
    world.fabric.shut_down_guest(m.step.instance);
    assert!(
        world
            .send(&m)
            .await
            .unwrap_err()
            .message
            .contains("not running")
    );
    assert_eq!(world.journal_files(A), Vec::<String>::new());
    assert_eq!(world.job(&m).await, JobState::Unknown);
}

#[tokio::test(start_paused = true)]
async fn two_migrations_never_have_one_instance() {
    let world = World::new().await;
    let m = world.migration(busy());
    world.prepare(&m).await.unwrap();
    world.send(&m).await.unwrap();
    let other = world.migration_of(m.step.instance);
    let refused = world.send(&other).await.unwrap_err();
    assert_eq!(&*refused.code, code::INSTANCE_BUSY);
    assert!(refused.message.contains(&m.step.migration.to_string()));
    let refused = world.check_destination(&other).await.unwrap_err();
    assert_eq!(&*refused.code, code::INSTANCE_BUSY);
    let mut stranger = world.migration_of(drover_model::ids::InstanceId(uuid::Uuid::from_u128(5)));
    stranger.step.migration = m.step.migration;
    assert!(
        world
            .ask(A, method::ABORT, &stranger)
            .await
            .unwrap_err()
            .message
            .contains("moves instance")
    );
}

#[tokio::test(start_paused = true)]
async fn a_migration_whose_end_was_never_told_makes_way() {
    let world = World::new().await;
    let lost = world.migration(small());
    world.prepare(&lost).await.unwrap();
    world.fabric.on_migration(
        lost.step.instance,
        At::Memory(50),
        Mishap::Fail("no".to_owned()),
    );
    world.send(&lost).await.unwrap();
    assert!(matches!(world.outcome(&lost).await, Outcome::Failed { .. }));
    world
        .clean_up(B, method::ROLLBACK_AT_DESTINATION, &lost)
        .await
        .unwrap();
    // The source is never told; the guest plainly runs there.
    let m = world.migration_of(lost.step.instance);
    world.prepare(&m).await.unwrap();
    world.send(&m).await.unwrap();
    assert!(matches!(world.outcome(&m).await, Outcome::Moved { .. }));
    world.settle(&m).await;
    world.assert_tidy(&m, B);
}

#[tokio::test(start_paused = true)]
async fn nothing_is_removed_from_a_source_that_still_has_the_guest() {
    let world = World::new().await;
    let m = world.migration(small());
    world.prepare(&m).await.unwrap();
    world.send(&m).await.unwrap();
    let early = world
        .clean_up(A, method::POST_LIVE_MIGRATION, &m)
        .await
        .unwrap_err();
    assert_eq!(early.class, ErrorClass::Retryable);
    let early = world
        .ask(A, method::ROLLBACK_AT_SOURCE, &m)
        .await
        .unwrap_err();
    assert_eq!(early.class, ErrorClass::Retryable);
    world.ask(A, method::ABORT, &m).await.unwrap();
    world.outcome(&m).await;
    let kept = world.clean_up(A, method::POST_LIVE_MIGRATION, &m).await;
    let kept = kept.unwrap().kept;
    assert!(kept[0].contains("nothing is removed"), "{kept:?}");
    assert!(world.fabric.file(A, DISK).is_some());
    world.take_back(&m).await;
    world.assert_tidy(&m, A);
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_tidied_at_the_source_is_a_warning() {
    let world = World::new().await;
    let m = world.migration(small());
    world
        .send_into(&m, At::Finish, Mishap::KeepDefinition)
        .await;
    world.outcome(&m).await;
    let refuse = Effect::Refuse(HypervisorError::Failed(
        "Operation not permitted".to_owned(),
    ));
    world.fabric.on_call(A, Call::RemoveDisk, 1, refuse);
    let (_, here) = world.settle(&m).await;
    assert!(here.removed.is_empty());
    assert!(here.warnings[0].contains(DISK), "{here:?}");
    assert_eq!(
        world.locate(A, &m).await,
        Presence::Absent,
        "the definition is gone"
    );
    assert_eq!(world.journal_files(A), Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_uses_more_than_was_looked_at_is_not_sent() {
    let world = World::new().await;
    let m = world.migration(busy().cdrom("/var/lib/libvirt/images/tools.iso"));
    let file = |stamp: Option<&str>| CheckedFile {
        path: "/var/lib/libvirt/images/tools.iso".to_owned(),
        stamp: stamp.map(str::to_owned),
    };
    for checked in [vec![], vec![file(Some("another"))]] {
        let ask = LiveMigration {
            checked: Some(checked),
            ..m.live_migration(&world)
        };
        let sent: Result<JobState, Fault> = world.call(A, method::LIVE_MIGRATION, &ask).await;
        let fault = sent.unwrap_err();
        assert_eq!(fault.class, ErrorClass::Refused);
        assert!(fault.message.contains("tools.iso"), "{}", fault.message);
    }
}

/// Its target is known, and what was to be copied is not what it is now.
#[tokio::test(start_paused = true)]
async fn a_guest_whose_disk_is_another_file_by_now_is_not_sent() {
    let world = World::new().await;
    let m = world.migration(small());
    let known = |path: &str| KnownDisk {
        target: "vda".to_owned(),
        path: path.to_owned(),
    };
    let ask = |path| LiveMigration {
        checked: Some(Vec::new()),
        disks: Some(vec![known(path)]),
        ..m.live_migration(&world)
    };
    let before = ask("/var/lib/libvirt/images/before.qcow2");
    let sent: Result<JobState, Fault> = world.call(A, method::LIVE_MIGRATION, &before).await;
    let fault = sent.unwrap_err();
    assert_eq!(fault.class, ErrorClass::Refused);
    assert!(fault.message.contains(DISK), "{}", fault.message);
    world.prepare(&m).await.unwrap();
    let sent: Result<JobState, Fault> = world.call(A, method::LIVE_MIGRATION, &ask(DISK)).await;
    sent.unwrap();
}

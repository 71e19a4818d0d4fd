//! What an agent remembers, and what it says when it has lost its memory.

use std::{str::FromStr, time::Duration};

use drover_compute::hypervisor::fake::{Call, GuestBuilder, script::Effect};
use drover_model::{
    api::{
        compute::{
            AgentStatus, CleanUp, Doing, Ended, GuestLocation, JobState, KeptDefinition, Known,
            LiveMigration, Outcome, RebuildInstance, RemoveCopy, TransferPlan, method,
        },
        conductor::EvacuatedAnswer,
        fault::{Fault, code},
    },
    error::ErrorClass,
    guest::{Guest, PowerState, Presence},
    ids::{ProjectId, StateId},
    migration::{ColdOptions, TransferMode, TransferOptions},
};
use serde_json::{Value, json};

use crate::{harness::*, rebuild::SHARED};

async fn located(world: &World, node: &str, m: &Move) -> GuestLocation {
    world.call(node, method::LOCATE, &m.step).await.unwrap()
}

async fn state(world: &World, node: &str) -> StateId {
    let status: AgentStatus = world
        .call(node, method::GET_STATUS, &json!({}))
        .await
        .unwrap();
    status.state.unwrap()
}

#[tokio::test(start_paused = true)]
async fn an_agent_tells_what_its_journal_knows() {
    let mut world = World::new().await;
    let m = world.migration(small());
    assert_eq!(located(&world, A, &m).await.known, Known::Nothing);
    world.prepare(&m).await.unwrap();
    let doing = |doing| Known::UnderWay { doing };
    assert_eq!(located(&world, B, &m).await.known, doing(Doing::Arriving));
    assert_eq!(located(&world, A, &m).await.known, Known::Nothing);
    world.send(&m).await.unwrap();
    assert_eq!(located(&world, A, &m).await.known, doing(Doing::Sending));
    world.restart(B).await;
    assert_eq!(located(&world, B, &m).await.known, doing(Doing::Arriving));
    world.outcome(&m).await;
    world.settle(&m).await;
    let ended = |how| Known::Ended { how };
    assert_eq!(located(&world, A, &m).await.known, ended(Ended::Left));
    assert_eq!(located(&world, B, &m).await.known, ended(Ended::Arrived));
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_lost_its_state_is_another_one() {
    let mut world = World::new().await;
    let m = world.migration(small());
    world.prepare(&m).await.unwrap();
    let before = located(&world, B, &m).await;
    assert_eq!(before.state, Some(state(&world, B).await));
    assert_ne!(before.state, located(&world, A, &m).await.state);
    world.restart(B).await;
    assert_eq!(located(&world, B, &m).await, before, "a restart is no loss");
    world.kill(B);
    world.lose_state(B);
    world.start(B).await;
    let after = located(&world, B, &m).await;
    assert_eq!(after.known, Known::Nothing);
    assert!(after.state.is_some() && after.state != before.state);
}

// ---- epochs

#[tokio::test(start_paused = true)]
async fn a_step_under_a_lower_epoch_is_fenced_also_after_a_restart() {
    let mut world = World::new().await;
    let m = world.migration(small());
    let guest = world.guest(&m).await;
    let prepare = m.prepare(guest);
    let ready: Result<(), Fault> = world
        .call_under(2, B, method::PRE_LIVE_MIGRATION, &prepare)
        .await;
    ready.unwrap();
    for restarted in [false, true] {
        if restarted {
            world.restart(B).await;
        }
        for epoch in [0, 1] {
            let late: Result<CleanUp, Fault> = world
                .call_under(epoch, B, method::ROLLBACK_AT_DESTINATION, &m.step)
                .await;
            let late = late.unwrap_err();
            assert_eq!(
                (late.class, late.code.as_ref()),
                (ErrorClass::Fenced, code::STEP_FENCED)
            );
        }
        // Of a conductor that knows of no epochs too.
        let late = world.clean_up(B, method::ROLLBACK_AT_DESTINATION, &m).await;
        assert_eq!(late.unwrap_err().class, ErrorClass::Fenced);
        let known = located(&world, B, &m).await.known;
        let doing = Doing::Arriving;
        assert_eq!(known, Known::UnderWay { doing }, "nothing was undone");
    }
    let undo = RemoveCopy {
        migration: m.step.migration,
        instance: m.step.instance,
        survivor: world.survivor(A, &m).await,
    };
    let undone: CleanUp = world
        .call_under(3, B, method::ROLLBACK_AT_DESTINATION, &undo)
        .await
        .unwrap();
    assert_eq!(undone.removed.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn whoever_asked_where_the_guest_is_may_rely_on_the_answer() {
    let world = World::new().await;
    let m = world.migration(small());
    let guest = world.guest(&m).await;
    let seen: GuestLocation = world
        .call_under(2, B, method::LOCATE, &m.step)
        .await
        .unwrap();
    assert_eq!(seen.presence, Presence::Absent);
    // Sent before the take-over, and late.
    let late: Result<(), Fault> = world
        .call_under(1, B, method::PRE_LIVE_MIGRATION, &m.prepare(guest))
        .await;
    assert_eq!(late.unwrap_err().class, ErrorClass::Fenced);
    assert_eq!(world.journal_files(B), Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn no_place_is_told_while_a_step_of_the_conductor_before_is_under_way() {
    let world = World::new().await;
    let m = world.migration(small());
    let guest = world.guest(&m).await;
    let slow = Effect::SlowBefore(Duration::from_secs(10));
    world.fabric.on_call(B, Call::CreateDisk, 1, slow);
    let prepare = m.prepare(guest);
    let step = world.call_under::<()>(1, B, method::PRE_LIVE_MIGRATION, &prepare);
    let question = async {
        pause(1_000).await;
        let same: Result<GuestLocation, Fault> =
            world.call_under(1, B, method::LOCATE, &m.step).await;
        same.unwrap();
        let next: Result<GuestLocation, Fault> =
            world.call_under(2, B, method::LOCATE, &m.step).await;
        assert_eq!(next.unwrap_err().class, ErrorClass::Retryable);
        pause(15_000).await;
        world
            .call_under::<GuestLocation>(2, B, method::LOCATE, &m.step)
            .await
    };
    let (_, located) = tokio::join!(step, question);
    located.unwrap();
}

// ---- what is over

#[tokio::test(start_paused = true)]
async fn what_ended_stays_ended_over_restarts() {
    let mut world = World::new().await;
    let m = world.migration(small());
    let guest = world.guest(&m).await;
    world.prepare(&m).await.unwrap();
    world.send(&m).await.unwrap();
    world.outcome(&m).await;
    let (there, here) = world.settle(&m).await;
    let job = world.job(&m).await;
    for node in [A, B] {
        world.restart(node).await;
    }
    assert_eq!(world.job(&m).await, job);
    assert_eq!(world.send(&m).await.unwrap(), job, "it is not sent again");
    let again = world.clean_up(A, method::POST_LIVE_MIGRATION, &m).await;
    assert_eq!(again.unwrap(), here);
    let again = world.clean_up(B, method::ROLLBACK_AT_DESTINATION, &m).await;
    again.unwrap_err();
    let began: Result<(), Fault> = world
        .call(B, method::PRE_LIVE_MIGRATION, &m.prepare(guest))
        .await;
    assert!(began.unwrap_err().message.contains("over"));
    assert!(there.downtime_ms.is_some());
    world.assert_tidy(&m, B);
}

/// The first steps of every kind of migration, and what takes each back.
fn beginnings(world: &World, m: &Move, guest: &Guest) -> Vec<(&'static str, Value, &'static str)> {
    let step = serde_json::to_value(m.step).unwrap();
    let with = |more: Value| {
        let mut all = step.clone();
        for (key, value) in more.as_object().unwrap() {
            all[key] = value.clone();
        }
        all
    };
    let live = LiveMigration {
        migration: m.step.migration,
        instance: m.step.instance,
        dest_host: host(A),
        destination: world.fabric.endpoint(A),
        copied_disks: m.copied.clone(),
        shared_disks: Vec::new(),
        options: m.options.clone(),
        checked: None,
        attach: false,
        disks: None,
    };
    let rebuild = json!({"domain": "<domain/>", "generation": 1});
    let leave = json!({
        "part": "stop", "dest_address": "100.64.0.1", "files": [],
        "inbox": {"port": 1, "token": ""}, "options": ColdOptions::default(),
    });
    let plan = TransferPlan {
        mode: TransferMode::Live,
        project: ProjectId::from_str("p2").unwrap(),
        project_name: "p2".to_owned(),
        nics: Vec::new(),
        disks: Vec::new(),
        name: None,
        title: None,
    };
    let transfer = json!({"plan": plan, "options": TransferOptions::default()});
    vec![
        (
            method::PRE_LIVE_MIGRATION,
            serde_json::to_value(m.prepare(guest.clone())).unwrap(),
            method::ROLLBACK_AT_DESTINATION,
        ),
        (
            method::LIVE_MIGRATION,
            serde_json::to_value(live).unwrap(),
            method::ROLLBACK_AT_SOURCE,
        ),
        (
            method::PREP_RESIZE,
            with(json!({"files": []})),
            method::ROLLBACK_RESIZE,
        ),
        (
            method::RESIZE_INSTANCE,
            with(leave),
            method::FINISH_REVERT_RESIZE,
        ),
        (
            method::PREP_REBUILD,
            with(rebuild),
            method::ROLLBACK_REBUILD,
        ),
        (
            method::PREP_TRANSFER,
            with(transfer),
            method::ROLLBACK_TRANSFER,
        ),
    ]
}

#[tokio::test(start_paused = true)]
async fn what_was_taken_back_before_it_began_does_not_begin() {
    for nth in 0..6 {
        let mut world = World::new().await;
        let m = world.migration(small());
        let guest = world.guest(&m).await;
        world.check_path(&m).await.unwrap();
        let (begin, args, take_back) = beginnings(&world, &m, &guest).swap_remove(nth);
        let mut step = serde_json::to_value(m.step).unwrap();
        step["runs_nowhere_else"] = true.into();
        let _: Value = world.call_under(2, B, take_back, &step).await.unwrap();
        world.restart(B).await;
        for epoch in [1, 2] {
            let late: Result<Value, Fault> = world.call_under(epoch, B, begin, &args).await;
            let late = late.unwrap_err();
            let class = match epoch {
                1 => ErrorClass::Fenced,
                _ => ErrorClass::Refused,
            };
            assert_eq!(late.class, class, "{begin}: {late}");
            assert!(
                epoch == 1 || late.message.contains("over"),
                "{begin}: {late}"
            );
        }
        assert_eq!(world.journal_files(B), Vec::<String>::new(), "{begin}");
        assert_eq!(located(&world, B, &m).await.presence, Presence::Absent);
    }
}

#[tokio::test(start_paused = true)]
async fn a_step_that_has_to_wait_is_not_overtaken_by_what_takes_it_back() {
    let mut world = World::without_agents().await;
    *world.heard.evacuated.lock().unwrap() = None;
    world.fabric.share_directory(SHARED, &[A, B], 1 << 40);
    let disk = format!("{SHARED}/vm.qcow2");
    let m = world.migration(GuestBuilder::new("vm").disk(&disk, 100));
    world.start(A).await;
    world.start(B).await;
    let which = json!({"instance": m.step.instance});
    let kept: KeptDefinition = world.call(A, method::GET_DEFINITION, &which).await.unwrap();
    world.kill(A);
    world.fabric.power_off(A);
    let rebuild = RebuildInstance {
        migration: m.step.migration,
        instance: m.step.instance,
        domain: kept.domain,
        generation: 1,
        checked: Vec::new(),
    };
    let prepared = world.call::<()>(B, method::PREP_REBUILD, &rebuild);
    let taken_back = async {
        pause(1_000).await;
        // The conductor answers while both wait.
        let answers = async {
            pause(1_000).await;
            *world.heard.evacuated.lock().unwrap() = Some(EvacuatedAnswer::default());
        };
        let rollback = world.clean_up(B, method::ROLLBACK_REBUILD, &m);
        tokio::join!(rollback, answers).0
    };
    let (_, undone) = tokio::join!(prepared, taken_back);
    undone.unwrap();
    assert_eq!(located(&world, B, &m).await.presence, Presence::Absent);
    assert_eq!(world.journal_files(B), Vec::<String>::new());
}

// ---- a journal that cannot be read, is lost, or cannot be written

#[tokio::test(start_paused = true)]
async fn a_journal_that_cannot_be_read_now_holds_the_instance_until_it_can() {
    let mut world = World::new().await;
    let m = world.migration(small());
    world.prepare(&m).await.unwrap();
    world.kill(B);
    let file = world
        .state_dir(B)
        .join(format!("migrations/{}.json", m.step.migration));
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text.replace("\"version\": 1", "\"version\": 9")).unwrap();
    world.start(B).await;

    assert_eq!(located(&world, B, &m).await.known, Known::Unreadable);
    let undone = world.clean_up(B, method::ROLLBACK_AT_DESTINATION, &m).await;
    let undone = undone.unwrap_err();
    assert_eq!(undone.class, ErrorClass::Retryable);
    assert!(undone.message.contains("version 9"), "{undone}");
    let other = world.migration_of(m.step.instance);
    let other = world.check_destination(&other).await.unwrap_err();
    assert!(other.message.contains("version 9"), "{other}");
    assert!(file.exists(), "it stays where it is");

    std::fs::write(&file, text).unwrap();
    pause(70_000).await;
    let undone = world.clean_up(B, method::ROLLBACK_AT_DESTINATION, &m).await;
    assert_eq!(undone.unwrap().removed.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_source_whose_journal_is_gone_does_not_say_that_all_is_as_before() {
    for damaged in [false, true] {
        let mut world = World::new().await;
        let m = world.migration(small().state(PowerState::Shutdown));
        let leave = json!({
            "migration": m.step.migration, "instance": m.step.instance,
            "part": "stop", "dest_address": "100.64.0.1", "files": [],
            "inbox": {"port": 1, "token": ""}, "options": ColdOptions::default(),
        });
        let _: Value = world
            .call(A, method::RESIZE_INSTANCE, &leave)
            .await
            .unwrap();
        pause(1_000).await;
        world.kill(A);
        let folder = world.state_dir(A).join("migrations");
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            match damaged {
                true => std::fs::write(path, "{").unwrap(),
                false => std::fs::remove_file(path).unwrap(),
            }
        }
        world.start(A).await;
        assert_eq!(located(&world, A, &m).await.known, Known::Lost);
        let mut back = serde_json::to_value(m.step).unwrap();
        back["runs_nowhere_else"] = true.into();
        for method in [method::FINISH_REVERT_RESIZE, method::CONFIRM_RESIZE] {
            let refused: Result<Value, Fault> = world.call(A, method, &back).await;
            let refused = refused.unwrap_err();
            assert_eq!(refused.class, ErrorClass::Refused, "{method}");
            assert_eq!(refused.code, code::JOURNAL_LOST, "{method}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn with_a_full_disk_a_step_fails_before_it_does_anything() {
    let world = World::new().await;
    let m = world.migration(small());
    let guest = world.guest(&m).await;
    world.check_path(&m).await.unwrap();
    for (nth, (begin, args, _)) in beginnings(&world, &m, &guest).into_iter().enumerate() {
        let node = if [1, 3, 5].contains(&nth) { A } else { B };
        world.disk(node).fill(true);
        for epoch in [0, 1] {
            let failed: Result<Value, Fault> = world.call_under(epoch, node, begin, &args).await;
            let failed = failed.unwrap_err();
            assert_eq!(failed.class, ErrorClass::Retryable, "{begin}: {failed}");
            assert_eq!(failed.code, code::JOURNAL_UNWRITABLE, "{begin}: {failed}");
        }
        world.disk(node).fill(false);
        assert_eq!(world.fabric.leftovers(), Vec::<String>::new(), "{begin}");
        assert_eq!(world.journal_files(node), Vec::<String>::new(), "{begin}");
        assert_eq!(world.fabric.running_on(m.step.instance), Some(host(A)));
    }
    world.prepare(&m).await.unwrap();
    world.send(&m).await.unwrap();
    world.outcome(&m).await;
    world.settle(&m).await;
    world.assert_tidy(&m, B);
}

// ---- actors that die

#[tokio::test(start_paused = true)]
async fn a_migration_whose_actor_died_is_taken_up_again() {
    let world = World::new().await;
    let m = world.migration(small());
    world.prepare(&m).await.unwrap();
    for times in 1..4 {
        world.fabric.on_call(B, Call::Presence, 1, Effect::Panic);
        let died = world.clean_up(B, method::ROLLBACK_AT_DESTINATION, &m).await;
        assert_eq!(died.unwrap_err().class, ErrorClass::Lost);
        let waits = world.clean_up(B, method::ROLLBACK_AT_DESTINATION, &m).await;
        let waits = waits.unwrap_err();
        assert_eq!(waits.class, ErrorClass::Retryable);
        assert!(waits.message.contains("died"), "{waits}");
        assert!(!waits.message.contains("waiting already"), "{waits}");
        pause(1_000 << times).await;
    }
    let undone = world.clean_up(B, method::ROLLBACK_AT_DESTINATION, &m).await;
    assert_eq!(undone.unwrap().removed.len(), 1);
    let other = world.migration_of(m.step.instance);
    world.prepare(&other).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_actor_that_dies_before_anything_began_leaves_nothing_held() {
    let world = World::new().await;
    let m = world.migration(small());
    let guest = world.guest(&m).await;
    world.fabric.on_call(B, Call::Presence, 1, Effect::Panic);
    let died: Result<(), Fault> = world
        .call(B, method::PRE_LIVE_MIGRATION, &m.prepare(guest))
        .await;
    assert_eq!(died.unwrap_err().class, ErrorClass::Lost);
    pause(5_000).await;
    let other = world.migration_of(m.step.instance);
    world.prepare(&other).await.unwrap();
}

// ---- what is counted

#[tokio::test(start_paused = true)]
async fn a_migration_is_counted_once() {
    let world = World::new().await;
    let m = world.migration(small());
    world.prepare(&m).await.unwrap();
    world.send(&m).await.unwrap();
    world.outcome(&m).await;
    world.settle(&m).await;
    let status: AgentStatus = world.call(A, method::GET_STATUS, &json!({})).await.unwrap();
    assert_eq!(status.counters["transfers_started"], 1);
    assert_eq!(status.counters["transfers_moved"], 1);
}

#[tokio::test(start_paused = true)]
async fn a_cold_migration_is_counted_once_and_not_by_its_parts() {
    let world = World::new().await;
    let m = world.migration(small().state(PowerState::Shutdown));
    let files = json!([{"path": DISK, "role": "disk", "present": false, "data_bytes": 1}]);
    let mut ask = serde_json::to_value(m.step).unwrap();
    ask["files"] = files;
    let inbox: Value = world.call(B, method::PREP_RESIZE, &ask).await.unwrap();
    ask["inbox"] = inbox;
    ask["dest_address"] = world.fabric.endpoint(B).address.into();
    ask["options"] = serde_json::to_value(ColdOptions::default()).unwrap();
    for part in ["stop", "copy"] {
        ask["part"] = part.into();
        let outcome = loop {
            let job: JobState = world.call(A, method::RESIZE_INSTANCE, &ask).await.unwrap();
            match job {
                JobState::Ended { outcome, .. } => break outcome,
                _ => pause(100).await,
            }
        };
        assert!(
            matches!(outcome, Outcome::Moved { .. }),
            "{part}: {outcome:?}"
        );
    }
    for _ in 0..2 {
        world.clean_up(A, method::SET_ASIDE, &m).await.unwrap();
    }
    let status: AgentStatus = world.call(A, method::GET_STATUS, &json!({})).await.unwrap();
    assert_eq!(status.counters["transfers_started"], 1);
    assert_eq!(status.counters["transfers_moved"], 1);
    assert_eq!(status.counters["transfers_failed"], 0);
}

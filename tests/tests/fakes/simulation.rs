//! Whole migrations in virtual time, with everything that can die dying at
//! every moment, and a network that loses, doubles and reorders. What must hold
//! afterwards is checked by `Cloud::check`, apart from the code under test.

use std::time::Duration;

use drover_compute::hypervisor::fake::{At, End, Fault, GuestBuilder, NodeSpec};
use drover_model::{
    guest::NicAttachment,
    ids::InstanceId,
    migration::{EndReason, LiveOptions, Migration, MigrationStatus as S, Phase},
};
use drover_rpc::memory::Faults;
use drover_tests::cloud::{Cloud, eventually};

const LOCAL: &str = "/var/lib/libvirt/images/web.qcow2";

async fn guest(cloud: &Cloud) -> InstanceId {
    let builder = GuestBuilder::new("web")
        .memory_mib(1024)
        .dirty_mib_s(50)
        .working_set_mib(128);
    let id = cloud.fabric.add_guest("kvm1", builder.disk(LOCAL, 256));
    cloud.adopted(id).await;
    id
}

async fn started(cloud: &Cloud, id: InstanceId) -> Migration {
    let accepted = cloud
        .migrate(id, Some("kvm2"), LiveOptions::default())
        .await;
    accepted.expect("it is accepted")
}

#[tokio::test(start_paused = true)]
async fn a_guest_moves_and_the_record_tells_how() {
    let cloud = Cloud::start(1).await;
    let id = guest(&cloud).await;
    let accepted = started(&cloud, id).await;
    assert_eq!((accepted.id, accepted.status), (1, S::Accepted));
    let m = cloud.wait(accepted.uuid).await.unwrap();
    assert_eq!(m.status, S::Completed, "{m:#?}");
    assert!(m.downtime_ms.is_some() && m.warnings.is_empty(), "{m:#?}");
    let steps: Vec<&str> = m.timings.iter().map(|t| t.step.as_str()).collect();
    assert_eq!(
        steps,
        ["place", "prepare", "turn", "transfer", "settle", "tidy"]
    );
    assert_eq!(m.progress.phase, Phase::Done);
    assert!(
        m.progress.memory.total_bytes > 0 && m.progress.disk.total_bytes > 0,
        "{m:#?}"
    );
    cloud.check(&m).await;
}

#[tokio::test(start_paused = true)]
async fn another_conductor_goes_on_with_what_a_dead_one_began() {
    let mut cloud = Cloud::start(1).await;
    cloud.start_conductor_named("other").await;
    let id = guest(&cloud).await;
    let accepted = started(&cloud, id).await;
    let m = cloud.until_version(accepted.uuid, 4).await;
    cloud.kill_conductor_named(&m.owner);
    let m = cloud.end(m.uuid).await;
    assert_eq!((m.status, m.attempt), (S::Completed, 2), "{m:#?}");
    cloud.check(&m).await;
}

#[tokio::test(start_paused = true)]
async fn a_destination_is_chosen_and_one_that_fails_its_checks_is_passed_over() {
    let mut cloud = Cloud::start(2).await;
    let bridge = NicAttachment::Bridge {
        bridge: "br-guests".into(),
    };
    let plugged = |spec: &mut NodeSpec| spec.bridges = ["br-guests".to_owned()].into();
    cloud.fabric.edit_node("kvm1", plugged);
    let id = cloud
        .fabric
        .add_guest("kvm1", GuestBuilder::new("web").nics(&[bridge]));
    cloud.adopted(id).await;
    // kvm2 has more room and would be first, but lacks the bridge.
    cloud.fabric.edit_node("kvm2", |spec| {
        spec.bridges.clear();
        spec.memory_mib *= 2;
    });
    cloud.add_node("kvm3", NodeSpec::default()).await;
    cloud.fabric.edit_node("kvm3", plugged);
    tokio::time::sleep(Duration::from_secs(6)).await;
    let m = cloud
        .migrate(id, None, LiveOptions::default())
        .await
        .unwrap();
    let m = cloud.end(m.uuid).await;
    assert_eq!(m.status, S::Completed, "{m:#?}");
    assert_eq!(m.dest_host.as_ref().map(|h| h.as_str()), Some("kvm3"));
    assert!(
        m.decisions
            .iter()
            .any(|d| d.text.contains("passed over kvm2")),
        "{m:#?}"
    );
    cloud.check(&m).await;
}

/// Kills one process whenever the record has reached a version, for every
/// version there is, and starts it again after a while.
async fn killed_everywhere(who: &str, dead_for: Duration) {
    for at_version in 1.. {
        let mut cloud = Cloud::start(at_version).await;
        let id = guest(&cloud).await;
        let m = started(&cloud, id).await;
        let m = cloud.until_version(m.uuid, at_version).await;
        let over = m.status.is_final();
        cloud.kill_and_start(who, dead_for).await;
        let m = cloud.end(m.uuid).await;
        assert_eq!(
            m.status,
            S::Completed,
            "killed {who} at {at_version}: {m:#?}"
        );
        cloud.check(&m).await;
        if over {
            assert!(at_version > 8, "it was killed at every turn: {at_version}");
            return;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn the_conductor_dies_at_every_turn_of_a_migration() {
    killed_everywhere("conductor", Duration::from_millis(300)).await;
}

#[tokio::test(start_paused = true)]
async fn the_conductor_is_away_until_all_is_over() {
    killed_everywhere("conductor", Duration::from_secs(60)).await;
}

#[tokio::test(start_paused = true)]
async fn the_source_agent_dies_at_every_turn_of_a_migration() {
    killed_everywhere("kvm1", Duration::from_millis(300)).await;
}

#[tokio::test(start_paused = true)]
async fn the_destination_agent_dies_at_every_turn_of_a_migration() {
    killed_everywhere("kvm2", Duration::from_millis(300)).await;
}

#[tokio::test(start_paused = true)]
async fn the_source_agent_is_away_until_libvirt_has_moved_the_guest() {
    let mut cloud = Cloud::start(3).await;
    let id = guest(&cloud).await;
    let m = started(&cloud, id).await;
    let m = cloud
        .until(m.uuid, "sending", |m| m.progress.memory.total_bytes > 0)
        .await;
    cloud.kill_agent("kvm1");
    let fabric = cloud.fabric.clone();
    let moved = async || fabric.running_on(id).filter(|host| host.as_str() == "kvm2");
    eventually("libvirt's hand-over", moved).await;
    cloud.start_agent("kvm1").await;
    let m = cloud.end(m.uuid).await;
    assert_eq!(m.status, S::Completed, "{m:#?}");
    cloud.check(&m).await;
}

/// Aborts at every version of the record: it ends cancelled, or completed when
/// the abort came too late, and never anything else.
#[tokio::test(start_paused = true)]
async fn an_abort_is_taken_in_every_state_before_the_switch_over() {
    let mut cancelled = 0;
    for at_version in 1.. {
        let cloud = Cloud::start(at_version).await;
        let id = guest(&cloud).await;
        let m = started(&cloud, id).await;
        let m = cloud.until_version(m.uuid, at_version).await;
        if m.status.is_final() {
            assert!(
                cancelled > 5,
                "most of a migration can be aborted: {cancelled}"
            );
            return;
        }
        let asked = cloud.abort(m.uuid).await;
        let m = cloud.end(m.uuid).await;
        match m.status {
            S::Cancelled => {
                assert_eq!(m.end_reason, Some(EndReason::Aborted));
                cancelled += 1;
            }
            // Too late: either said at once, or found out by libvirt.
            S::Completed => assert!(asked.is_err() || m.abort_requested, "{m:#?}"),
            _ => panic!("{m:#?}"),
        }
        cloud.check(&m).await;
    }
}

/// Faults of the hypervisors before the switch-over: it fails, and the guest
/// runs on where it was.
#[tokio::test(start_paused = true)]
async fn a_fault_before_the_switch_over_leaves_everything_as_it_was() {
    let moments = [At::Start, At::Disk(50), At::Memory(10), At::Memory(80)];
    let words = || Fault::Fail("unable to connect to server".into());
    let faults = [
        vec![words()],
        vec![Fault::QemuDies(End::Destination)],
        vec![Fault::LeaveIncoming, words()],
    ];
    for at in &moments {
        for fault in &faults {
            let cloud = Cloud::start(4).await;
            let id = guest(&cloud).await;
            for part in fault {
                cloud.fabric.on_migration(id, *at, part.clone());
            }
            let m = started(&cloud, id).await;
            let m = cloud.end(m.uuid).await;
            assert!(
                matches!(m.end_reason, Some(EndReason::Failed { .. })),
                "{at:?} {fault:?}: {m:#?}"
            );
            cloud.check(&m).await;
        }
    }
}

/// Whatever the source's libvirt says, or fails to say, of the end: the record
/// follows where the guest runs.
#[tokio::test(start_paused = true)]
async fn the_end_is_what_is_seen_not_what_is_said() {
    let cases = [
        (At::Memory(50), Fault::LoseCaller),
        (At::SwitchOver, Fault::LoseCaller),
        (At::Finish, Fault::LoseCaller),
        (At::Finish, Fault::ReportLate(Duration::from_secs(20))),
        (At::Finish, Fault::KeepDefinition),
        (At::Finish, Fault::LibvirtdAway(End::Source)),
        (At::Memory(50), Fault::LibvirtdAway(End::Source)),
        (At::Finish, Fault::LibvirtdAway(End::Destination)),
        (At::Finish, Fault::LibvirtdDies(End::Source)),
        (At::Start, Fault::LeaveStaleCopy),
    ];
    for (at, fault) in cases {
        let cloud = Cloud::start(5).await;
        let id = guest(&cloud).await;
        cloud.fabric.on_migration(id, at, fault.clone());
        let m = started(&cloud, id).await;
        tokio::time::sleep(Duration::from_secs(30)).await;
        for host in ["kvm1", "kvm2"] {
            cloud.fabric.libvirtd_back(host);
        }
        let m = cloud.end(m.uuid).await;
        assert_eq!(m.status, S::Completed, "{at:?} {fault:?}: {m:#?}");
        cloud.check(&m).await;
    }
}

/// A guest that writes faster than its memory can be sent.
async fn busy(cloud: &Cloud) -> InstanceId {
    let builder = GuestBuilder::new("busy")
        .memory_mib(4096)
        .dirty_mib_s(5000)
        .working_set_mib(4000);
    let id = cloud.fabric.add_guest("kvm1", builder);
    cloud.adopted(id).await;
    id
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_never_converges_is_given_up_and_runs_on() {
    let cloud = Cloud::start(6).await;
    let id = busy(&cloud).await;
    let options = LiveOptions {
        progress_timeout_s: Some(30),
        ..LiveOptions::default()
    };
    let m = cloud.migrate(id, Some("kvm2"), options).await.unwrap();
    let m = cloud.end(m.uuid).await;
    assert!(
        matches!(m.end_reason, Some(EndReason::Stalled { .. })),
        "{m:#?}"
    );
    cloud.check(&m).await;
    // The same guest with leave to finish after the switch-over.
    let options = LiveOptions {
        post_copy: true,
        ..LiveOptions::default()
    };
    let m = cloud.migrate(id, Some("kvm2"), options).await.unwrap();
    let m = cloud.end(m.uuid).await;
    assert_eq!(m.status, S::Completed, "{m:#?}");
    cloud.check(&m).await;
}

/// The guest runs on and can be moved elsewhere while the node it was to go to
/// is dead; what was made there is taken away when that is back.
#[tokio::test(start_paused = true)]
async fn a_destination_that_dies_holds_nobody_up() {
    let mut cloud = Cloud::start(9).await;
    cloud.add_node("kvm3", NodeSpec::default()).await;
    let id = guest(&cloud).await;
    let m = started(&cloud, id).await;
    let sending = |m: &Migration| m.progress.memory.processed_bytes > 0;
    cloud.until(m.uuid, "sending", sending).await;
    cloud.fabric.power_off("kvm2");
    cloud.kill_agent("kvm2");
    let m = cloud.end(m.uuid).await;
    assert_eq!(m.status, S::Failed, "{m:#?}");
    assert_eq!(cloud.fabric.running_on(id), Some(m.source_host.clone()));
    let options = LiveOptions::default();
    let next = cloud.migrate(id, Some("kvm3"), options).await.unwrap();
    let next = cloud.end(next.uuid).await;
    assert_eq!(next.status, S::Completed, "{next:#?}");
    assert!(!cloud.fabric.leftovers().is_empty(), "kvm2 was reached");
    cloud.fabric.power_on("kvm2");
    cloud.start_agent("kvm2").await;
    cloud.check(&next).await;
}

#[tokio::test(start_paused = true)]
async fn force_complete_ends_a_transfer_that_would_not() {
    let cloud = Cloud::start(7).await;
    let id = busy(&cloud).await;
    let m = cloud
        .migrate(id, Some("kvm2"), LiveOptions::default())
        .await
        .unwrap();
    cloud
        .until(m.uuid, "sending", |m| m.progress.iteration > 2)
        .await;
    let ask = drover_model::api::conductor::MigrationRef {
        migration: m.id.to_string(),
    };
    let forced: Migration = cloud
        .call(
            drover_model::api::conductor::method::FORCE_COMPLETE_MIGRATION,
            &ask,
        )
        .await
        .unwrap();
    assert!(forced.force_complete_requested);
    let m = cloud.end(m.uuid).await;
    assert_eq!(m.status, S::Completed, "{m:#?}");
    cloud.check(&m).await;
}

/// A network that loses, delays, doubles and reorders. The swarm does that too, with
/// everything else; here it is alone.
#[tokio::test(start_paused = true)]
async fn a_bad_network_loses_no_guest() {
    let faults = Faults {
        delay_min: Duration::from_millis(1),
        delay_max: Duration::from_millis(400),
        loss: 0.05,
        duplication: 0.1,
        reordering: 0.2,
    };
    let mut moved = 0;
    for seed in 0..8 {
        let cloud = Cloud::with_faults(seed, faults.clone()).await;
        let id = guest(&cloud).await;
        // The answer may be lost; the record has it then.
        let Ok(m) = cloud
            .migrate(id, Some("kvm2"), LiveOptions::default())
            .await
        else {
            continue;
        };
        let m = cloud.end(m.uuid).await;
        moved += u32::from(m.status == S::Completed);
        cloud.broker.set_faults(Faults::default());
        cloud.check(&m).await;
    }
    assert!(moved >= 4, "most of them arrive: {moved} of 8");
}

#[tokio::test(start_paused = true)]
async fn of_two_that_want_one_guest_one_wins_and_the_other_is_told_why() {
    let cloud = Cloud::start(8).await;
    let id = guest(&cloud).await;
    let ask = || cloud.migrate(id, Some("kvm2"), LiveOptions::default());
    let (a, b) = tokio::join!(ask(), ask());
    let (won, lost) = if a.is_ok() { (a, b) } else { (b, a) };
    let refusal = lost.expect_err("one is refused");
    let failure = refusal.failure().expect("by an exception");
    assert!(
        failure.is("nova.exception", "InstanceInvalidState"),
        "{failure:?}"
    );
    assert!(
        failure.kwargs["checks"]
            .to_string()
            .contains("instance_busy")
    );
    let m = cloud.end(won.unwrap().uuid).await;
    assert_eq!(m.status, S::Completed);
    cloud.check(&m).await;
}

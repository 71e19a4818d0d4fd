//! Cold migrations in virtual time, with every process dying at every turn. What
//! must hold afterwards is checked apart from the code under test.

use std::time::Duration;

use drover_compute::hypervisor::{
    ColdDriver, Hypervisor, HypervisorError, Overlay,
    fake::{Call, GuestBuilder, script::Effect},
};
use drover_model::{
    api::conductor::{MigrationRef, method},
    guest::PowerState,
    ids::InstanceId,
    migration::{ColdOptions, Migration, MigrationStatus as S, Way},
};
use drover_tests::{
    cloud::{CTL, Cloud, eventually},
    tap::Tap,
};

const BASE: &str = "/var/lib/libvirt/images/base.qcow2";
const LOCAL: &str = "/var/lib/libvirt/images/web.qcow2";

fn web() -> GuestBuilder {
    GuestBuilder::new("web")
        .memory_mib(1024)
        .disk(LOCAL, 256)
        .backing_mib(BASE, 64)
        .disk("/var/lib/libvirt/images/data.raw", 64)
}

async fn guest(cloud: &Cloud, builder: GuestBuilder) -> InstanceId {
    let id = cloud.fabric.add_guest("kvm1", builder);
    cloud.adopted(id).await;
    id
}

fn cold(pre_copy: bool) -> Way {
    Way::Cold(ColdOptions {
        pre_copy,
        ..ColdOptions::default()
    })
}

async fn started(cloud: &Cloud, id: InstanceId, way: &Way) -> Migration {
    let accepted = cloud.migrate_by(id, Some("kvm2"), way).await;
    accepted.expect("it is accepted")
}

async fn end_with(cloud: &Cloud, m: &Migration, what: &str) -> Migration {
    let which = MigrationRef {
        migration: m.uuid.to_string(),
    };
    cloud.call(what, &which).await.expect("it is taken")
}

/// What must hold of a cold migration that rests.
async fn check(cloud: &Cloud, m: &Migration, ran: bool) {
    let there = m.status.has_moved();
    let host = if there { "kvm2" } else { "kvm1" };
    if let Err(found) = cloud.fabric.check_invariants() {
        panic!("{found:?}\n{m:#?}");
    }
    let running = cloud.fabric.running_on(m.instance_uuid);
    let expected = ran.then(|| host.parse().expect("a host name"));
    assert_eq!(running, expected, "{m:#?}");
    let name = m.instance_uuid.to_string();
    let row = cloud.store.find_instance(&name).await;
    let row = row.expect("on the record");
    assert_eq!(row.host.as_str(), host, "{m:#?}");
    if there {
        // Seen there, not to be reported first: what is asked next is judged by it.
        assert_eq!(row.power_state.is_active(), ran, "{m:#?}");
    }
    let claims = cloud.store.claims().await.expect("readable");
    assert_eq!(
        claims.len(),
        usize::from(m.status == S::Finished),
        "{claims:?}\n{m:#?}"
    );
    if m.status.is_final() {
        let fabric = cloud.fabric.clone();
        eventually("nothing is left behind", async || {
            fabric.leftovers().is_empty().then_some(())
        })
        .await;
    }
}

async fn rest(cloud: &Cloud, m: &Migration) -> Migration {
    cloud.until(m.uuid, "at rest", |m| m.status.rests()).await
}

#[tokio::test(start_paused = true)]
async fn a_guest_goes_there_and_back() {
    for (state, pre_copy) in [
        (PowerState::Running, false),
        (PowerState::Running, true),
        (PowerState::Shutdown, false),
        (PowerState::Shutdown, true),
    ] {
        let ran = state == PowerState::Running;
        let cloud = Cloud::start(1).await;
        let id = guest(&cloud, web().state(state)).await;
        let m = started(&cloud, id, &cold(pre_copy)).await;
        let m = rest(&cloud, &m).await;
        assert_eq!(m.status, S::Finished, "{m:#?}");
        assert_eq!(m.downtime_ms.is_some(), ran, "{m:#?}");
        check(&cloud, &m, ran).await;
        end_with(&cloud, &m, method::CONFIRM_MIGRATION).await;
        let m = cloud.end(m.uuid).await;
        assert_eq!(m.status, S::Confirmed, "{m:#?}");
        check(&cloud, &m, ran).await;
        let back = cloud.migrate_by(id, Some("kvm1"), &cold(pre_copy)).await;
        let back = rest(&cloud, &back.expect("it is accepted")).await;
        assert_eq!(back.status, S::Finished, "{back:#?}");
        cloud.fabric.accept_older_disks(id);
        end_with(&cloud, &back, method::REVERT_MIGRATION).await;
        let back = cloud.end(back.uuid).await;
        assert_eq!(back.status, S::Reverted, "{back:#?}");
        let running = cloud.fabric.running_on(id);
        assert_eq!(
            running.map(|h| h.to_string()),
            ran.then(|| "kvm2".to_owned())
        );
        cloud.fabric.check_invariants().unwrap();
    }
}

/// The way back is kept for all of the window, whatever clocks say.
#[tokio::test(start_paused = true)]
async fn a_clock_that_jumps_confirms_nothing() {
    const WINDOW_S: u64 = 600;
    let mut cloud = Cloud::start(1).await;
    cloud.settings.resize_confirm_window_s = WINDOW_S;
    let restart = Duration::from_secs(1);
    cloud.kill_and_start("conductor", restart).await;
    let id = guest(&cloud, web()).await;
    let m = started(&cloud, id, &cold(false)).await;
    let m = rest(&cloud, &m).await;
    assert_eq!(m.status, S::Finished, "{m:#?}");
    cloud.set_clock("ctl", 24 * 3600);
    tokio::time::sleep(Duration::from_secs(WINDOW_S / 2)).await;
    let waits = async || cloud.store.migration(m.uuid).await.unwrap().status;
    assert_eq!(waits().await, S::Finished);
    tokio::time::sleep(Duration::from_secs(WINDOW_S)).await;
    assert_eq!(waits().await, S::Confirmed);
}

/// Which part of a migration's life is disturbed.
#[derive(Clone, Copy, PartialEq)]
enum During {
    Move { pre_copy: bool },
    Confirm,
    Revert,
}

/// Kills one process whenever the record has reached a version of that part, for
/// every version there is, and starts it again after a while.
async fn killed_everywhere(who: &str, dead_for: Duration, during: During) {
    let stride = if dead_for == LONG { 3 } else { 1 };
    for turn in (0..).step_by(stride) {
        let mut cloud = Cloud::start(turn).await;
        let id = guest(&cloud, web()).await;
        let pre_copy = during == During::Move { pre_copy: true };
        let mut m = started(&cloud, id, &cold(pre_copy)).await;
        if !matches!(during, During::Move { .. }) {
            m = rest(&cloud, &m).await;
            assert_eq!(m.status, S::Finished, "{m:#?}");
            cloud.fabric.accept_older_disks(id);
            m = match during {
                During::Confirm => end_with(&cloud, &m, method::CONFIRM_MIGRATION).await,
                _ => end_with(&cloud, &m, method::REVERT_MIGRATION).await,
            };
        }
        let at_version = m.version + turn;
        let m = cloud.until_version(m.uuid, at_version).await;
        let over = m.status.rests();
        cloud.kill_and_start(who, dead_for).await;
        let m = rest(&cloud, &m).await;
        let expected = match during {
            During::Move { .. } => S::Finished,
            During::Confirm => S::Confirmed,
            During::Revert => S::Reverted,
        };
        // Before the guest was touched, an absence that lasts is a reason to fail.
        let gave_up = dead_for == LONG && during == MOVE && m.status == S::Failed;
        let killed = format!("killed {who} at {at_version}: {m:#?}");
        assert!(m.status == expected || gave_up, "{killed}");
        check(&cloud, &m, true).await;
        if over {
            assert!(turn > 1, "it was killed at every turn: {turn}");
            return;
        }
    }
}

const MOVE: During = During::Move { pre_copy: false };
const PRE_COPY: During = During::Move { pre_copy: true };
const SHORT: Duration = Duration::from_secs(3);
/// Long enough for everybody to lose patience. That takes long here too: not at each
/// turn, of which two that follow each other mostly differ in progress alone.
const LONG: Duration = Duration::from_secs(200);

#[tokio::test(start_paused = true)]
async fn the_conductor_dies_at_every_turn() {
    for during in [MOVE, PRE_COPY, During::Confirm, During::Revert] {
        killed_everywhere("conductor", SHORT, during).await;
    }
}

#[tokio::test(start_paused = true)]
async fn the_source_dies_at_every_turn() {
    for during in [MOVE, PRE_COPY, During::Confirm, During::Revert] {
        killed_everywhere("kvm1", SHORT, during).await;
    }
}

#[tokio::test(start_paused = true)]
async fn the_destination_dies_at_every_turn() {
    for during in [MOVE, PRE_COPY, During::Confirm, During::Revert] {
        killed_everywhere("kvm2", SHORT, during).await;
    }
}

/// Whoever works with it has lost patience meanwhile: what was stuck goes on.
#[tokio::test(start_paused = true)]
async fn the_source_is_away_for_long() {
    killed_everywhere("kvm1", LONG, MOVE).await;
}

#[tokio::test(start_paused = true)]
async fn the_destination_is_away_for_long() {
    killed_everywhere("kvm2", LONG, MOVE).await;
    killed_everywhere("kvm2", LONG, During::Revert).await;
}

/// An agent dies and comes back with an empty state directory, or both do, whenever the
/// record has reached a version. What is left over then nobody knows any more; the
/// guest is whole and runs, on one side.
#[tokio::test(start_paused = true)]
async fn journals_are_lost_at_every_turn() {
    const ON: PowerState = PowerState::Running;
    const OFF: PowerState = PowerState::Shutdown;
    for (agents, cases) in [
        (&["kvm1"][..], &[(false, ON), (true, ON), (false, OFF)][..]),
        (&["kvm2"], &[(true, ON)]),
        (&["kvm1", "kvm2"], &[(true, ON)]),
    ] {
        for (pre_copy, state) in cases.iter().copied() {
            // Those that follow each other mostly differ in progress alone.
            for at_version in (1..).step_by(3) {
                let mut cloud = Cloud::start(at_version).await;
                let id = guest(&cloud, web().state(state)).await;
                let m = started(&cloud, id, &cold(pre_copy)).await;
                let m = cloud.until_version(m.uuid, at_version).await;
                let over = m.status.rests();
                agents.iter().for_each(|host| cloud.kill_agent(host));
                agents.iter().for_each(|host| cloud.lose_state(host));
                tokio::time::sleep(SHORT).await;
                for host in agents {
                    cloud.start_agent(host).await;
                }
                let m = rest(&cloud, &m).await;
                let what = format!("{agents:?} at {at_version}: {m:#?}");
                assert!(matches!(m.status, S::Finished | S::Failed), "{what}");
                let host = if m.status == S::Finished {
                    "kvm2"
                } else {
                    "kvm1"
                };
                let found = cloud.fabric.whereabouts(id);
                let [(at, here)] = &found[..] else {
                    panic!("{found:?}: {what}");
                };
                assert_eq!(at.as_str(), host, "{what}");
                assert_eq!(here.is_active(), state == ON, "{what}");
                let whole = cloud.fabric.guest(host, id).expect(&what);
                let path = whole.disks[0].local_path();
                assert_eq!(path, Some(LOCAL), "no overlay is left under it: {what}");
                cloud.fabric.check_invariants().expect(&what);
                if over {
                    assert!(at_version > 8, "they were lost at every turn: {at_version}");
                    break;
                }
            }
        }
    }
}

/// Until the source is set aside the destination cannot have the guest, so it need
/// not be back for the guest to be; what was made there goes when it is.
#[tokio::test(start_paused = true)]
async fn a_destination_that_dies_for_good_keeps_no_guest_off() {
    for step in ["prepare", "pre_copy", "stop", "copy"] {
        let mut cloud = Cloud::start(9).await;
        let id = guest(&cloud, web()).await;
        let m = started(&cloud, id, &cold(true)).await;
        cloud.until(m.uuid, step, |m| m.step == step).await;
        cloud.fabric.power_off("kvm2");
        cloud.kill_agent("kvm2");
        let m = cloud.end(m.uuid).await;
        assert_eq!(m.status, S::Failed, "{step}: {m:#?}");
        let running = cloud.fabric.running_on(id);
        assert_eq!(running, Some(m.source_host.clone()), "{step}: {m:#?}");
        cloud.fabric.power_on("kvm2");
        cloud.start_agent("kvm2").await;
        check(&cloud, &m, true).await;
    }
}

/// Aborts whenever the record has reached a version, for every version there is.
#[tokio::test(start_paused = true)]
async fn it_is_aborted_at_every_turn() {
    for pre_copy in [false, true] {
        for at_version in 1.. {
            let cloud = Cloud::start(at_version).await;
            let id = guest(&cloud, web()).await;
            let m = started(&cloud, id, &cold(pre_copy)).await;
            let m = cloud.until_version(m.uuid, at_version).await;
            let over = m.status.rests();
            let taken = cloud.abort(m.uuid).await;
            assert!(!over || taken.is_err(), "what is finished is not aborted");
            let m = rest(&cloud, &m).await;
            assert!(matches!(m.status, S::Cancelled | S::Finished), "{m:#?}");
            check(&cloud, &m, true).await;
            if over {
                break;
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_told_of_an_abort_is_told_of_a_resize() {
    let tap = Tap::default();
    let mut cloud = Cloud::start(1).await;
    cloud.listen_to(tap.clone());
    cloud
        .kill_and_start("conductor", Duration::from_secs(1))
        .await;
    let id = guest(&cloud, web()).await;
    let m = started(&cloud, id, &cold(false)).await;
    cloud.abort(m.uuid).await.unwrap();
    assert_eq!(rest(&cloud, &m).await.status, S::Cancelled);
    let told = tap.notified();
    assert!(
        told.iter().any(|e| e == "instance.resize_abort.start"),
        "{told:?}"
    );
    assert!(
        !told.iter().any(|e| e.contains("live_migration")),
        "{told:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_does_not_obey_runs_on() {
    let cloud = Cloud::start(3).await;
    for (pre_copy, host) in [(false, "kvm1"), (true, "kvm1")] {
        let name = if pre_copy { "deaf2" } else { "deaf1" };
        let disk = format!("/var/lib/libvirt/images/{name}.qcow2");
        let deaf = GuestBuilder::new(name).disk(&disk, 64).ignores_shutdown();
        let id = guest(&cloud, deaf).await;
        let m = started(&cloud, id, &cold(pre_copy)).await;
        let m = rest(&cloud, &m).await;
        assert_eq!(m.status, S::Failed, "{m:#?}");
        let reason = m.end_reason.as_ref().unwrap().to_string();
        assert!(reason.contains("did not shut down"), "{reason}");
        assert_eq!(cloud.fabric.running_on(id).unwrap().as_str(), host);
        check(&cloud, &m, true).await;
        let allowed = Way::Cold(ColdOptions {
            force_stop_after_s: Some(5),
            pre_copy,
            ..ColdOptions::default()
        });
        let m = started(&cloud, id, &allowed).await;
        let m = rest(&cloud, &m).await;
        assert_eq!(m.status, S::Finished, "{m:#?}");
        assert!(
            m.decisions.iter().any(|d| d.text.contains("stopped hard")),
            "{m:#?}"
        );
        end_with(&cloud, &m, method::CONFIRM_MIGRATION).await;
        cloud.end(m.uuid).await;
    }
}

/// Its disks are thawed, and their overlays cannot be removed before the guest has written
/// for a while, and is off: they are older than what it wrote.
#[tokio::test(start_paused = true)]
async fn an_overlay_that_the_guest_has_left_is_not_merged_any_more() {
    let cloud = Cloud::start(13).await;
    let id = guest(&cloud, web().ignores_shutdown()).await;
    let untold = HypervisorError::Untold("another guest's image cannot be read".to_owned());
    let refuse = Effect::Refuse(untold);
    cloud.fabric.on_call("kvm1", Call::RemoveDisk, 20, refuse);
    let m = started(&cloud, id, &cold(true)).await;
    for is_frozen in [true, false] {
        eventually("its disks are frozen, then thawed", async || {
            let guest = cloud.fabric.guest("kvm1", id)?;
            let on_image = guest.disks.iter().any(|d| d.local_path() == Some(LOCAL));
            (on_image != is_frozen).then_some(())
        })
        .await;
    }
    tokio::time::sleep(Duration::from_secs(10)).await;
    let now = cloud.store.migration(m.uuid).await.expect("on the record");
    assert!(!now.status.rests(), "{now:#?}");
    cloud.fabric.kill_guest(id);
    let m = rest(&cloud, &m).await;
    assert_eq!(m.status, S::Failed, "{m:#?}");
    check(&cloud, &m, true).await;
}

/// Somebody merges a guest's overlays into its images while they are sent, and what it
/// writes then is newer than they are.
#[tokio::test(start_paused = true)]
async fn an_overlay_that_somebody_took_off_the_guest_is_not_merged() {
    let cloud = Cloud::start(14).await;
    let leisurely = web().shuts_down_after(Duration::from_secs(30));
    let id = guest(&cloud, leisurely).await;
    let m = started(&cloud, id, &cold(true)).await;
    let m = cloud.until(m.uuid, "stopping", |m| m.step == "stop").await;
    let frozen = cloud.fabric.guest("kvm1", id).expect("it runs");
    let overlays = frozen.disks.iter().map(|disk| {
        let path = disk.local_path().expect("it is a file").to_owned();
        let (image, _) = path.split_once(".delta-").expect("it is an overlay");
        Overlay {
            target: disk.target.clone(),
            image: image.to_owned(),
            format: disk.backing[0].format.clone(),
            path,
        }
    });
    let overlays: Vec<_> = overlays.collect();
    let thawed = cloud.fabric.driver("kvm1").thaw_disks(id, &overlays).await;
    thawed.expect("they can be merged");
    let m = rest(&cloud, &m).await;
    assert_eq!(m.status, S::Failed, "{m:#?}");
    cloud.fabric.check_invariants().expect("nothing is lost");
    let running = cloud.fabric.running_on(id);
    assert_eq!(running, Some(m.source_host.clone()), "{m:#?}");
}

/// A move with a copy before, whose source is just being set aside.
async fn being_set_aside(cloud: &Cloud) -> Migration {
    let id = guest(cloud, web()).await;
    let slow = Effect::SlowBefore(Duration::from_secs(5));
    cloud.fabric.on_call("kvm1", Call::RenameFile, 1, slow);
    let m = started(cloud, id, &cold(true)).await;
    let is_reached = |m: &Migration| m.step == "set_aside";
    cloud.until(m.uuid, "set aside", is_reached).await
}

/// What came with the frozen disks is cleared away before it is merged: the guest goes back
/// to where all of it is.
#[tokio::test(start_paused = true)]
async fn a_guest_is_not_started_without_what_it_wrote_last() {
    let mut cloud = Cloud::start(15).await;
    let m = being_set_aside(&cloud).await;
    cloud.kill_agent("kvm2");
    cloud.until(m.uuid, "to come", |m| m.step == "finish").await;
    let overlay = format!("{LOCAL}.delta-{}", m.uuid);
    assert!(cloud.fabric.file("kvm2", &overlay).is_some(), "{m:#?}");
    let cleared = cloud.fabric.driver("kvm2").remove_disk(&overlay).await;
    cleared.expect("nobody uses it");
    cloud.start_agent("kvm2").await;
    let m = rest(&cloud, &m).await;
    assert_eq!(m.status, S::Failed, "{m:#?}");
    let reason = m.end_reason.as_ref().expect("why").to_string();
    assert!(reason.contains(&overlay), "{reason}");
    assert_eq!(cloud.fabric.lost_bytes(), Vec::<String>::new(), "{m:#?}");
    check(&cloud, &m, true).await;
}

/// An agent that dies after a merge, or cannot remove what is merged, goes on from there.
#[tokio::test(start_paused = true)]
async fn an_overlay_that_is_merged_need_not_be_there() {
    for call in [Call::MergeOverlay, Call::RemoveDisk, Call::Define] {
        let cloud = Cloud::start(16).await;
        let m = being_set_aside(&cloud).await;
        let untold = HypervisorError::Untold("libvirt is away".to_owned());
        let forget = Effect::Forget(untold);
        cloud.fabric.on_call("kvm2", call, 2, forget);
        let m = rest(&cloud, &m).await;
        assert_eq!(m.status, S::Finished, "{call:?}: {m:#?}");
        assert_eq!(cloud.fabric.lost_bytes(), Vec::<String>::new(), "{m:#?}");
        check(&cloud, &m, true).await;
    }
}

/// Patience ends, and only then the guest obeys: it has to run again.
#[tokio::test(start_paused = true)]
async fn a_guest_that_obeys_too_late_is_started_again() {
    for late_s in (120..127).step_by(2) {
        let cloud = Cloud::start(late_s).await;
        let late = web().shuts_down_after(Duration::from_secs(late_s));
        let id = guest(&cloud, late).await;
        let m = started(&cloud, id, &cold(false)).await;
        let m = rest(&cloud, &m).await;
        assert!(matches!(m.status, S::Failed | S::Finished), "{m:#?}");
        check(&cloud, &m, true).await;
    }
}

/// Patience ends while libvirt tidies up after it, which lasts: it has to run again,
/// also if nobody waits for that long at once.
#[tokio::test(start_paused = true)]
async fn a_guest_that_is_long_in_shutdown_is_started_again() {
    for late_s in [123, 140, 400] {
        let cloud = Cloud::start(late_s).await;
        let lingers = web()
            .shuts_down_after(Duration::from_secs(late_s))
            .in_shutdown_for(Duration::from_secs(late_s - 110));
        let id = guest(&cloud, lingers).await;
        let m = started(&cloud, id, &cold(false)).await;
        let m = rest(&cloud, &m).await;
        assert_eq!(m.status, S::Failed, "{m:#?}");
        check(&cloud, &m, true).await;
        tokio::time::sleep(Duration::from_secs(late_s)).await;
        check(&cloud, &m, true).await;
    }
}

/// The database has lost the last of what it was told (a standby took over, a backup was
/// restored): the source says that the guest lies aside, and the destination is asked.
#[tokio::test(start_paused = true)]
async fn a_record_that_went_back_in_time_starts_nothing_twice() {
    for step in ["stop", "copy", "set_aside"] {
        let place = tempfile::tempdir().unwrap();
        let mut cloud = Cloud::start(1).await;
        let id = guest(&cloud, web()).await;
        let m = started(&cloud, id, &cold(false)).await;
        cloud.until(m.uuid, "midway", |m| m.step == step).await;
        cloud.kill_conductor();
        let file = place.path().join("before").display().to_string();
        let before = cloud.store.copied(&file).unwrap();
        cloud.start_conductor().await;
        let m = rest(&cloud, &m).await;
        assert_eq!(m.status, S::Finished, "{step}: {m:#?}");
        cloud.kill_conductor();
        assert_eq!(before.migration(m.uuid).await.unwrap().step, step);
        cloud.start_conductor_on(CTL, before).await;
        tokio::time::sleep(Duration::from_secs(600)).await;
        let found = cloud.fabric.check_invariants();
        found.unwrap_or_else(|found| panic!("{step}: {found:?}"));
        let running = cloud.fabric.running_on(id).expect("it runs");
        assert_eq!(running.as_str(), "kvm2", "{step}");
    }
}

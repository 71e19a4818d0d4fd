//! The fake's own tests: that time passes as modelled, that every fault does
//! what it says, and that the checker sees what it is there to see. What it
//! has in common with libvirt is in the contract suite.

use drover_model::{
    content::Seen,
    error::ErrorClass,
    guest::{Guest, PowerState, Presence},
    ids::InstanceId,
    migration::LiveOptions,
};
use tokio::{
    task::JoinHandle,
    time::{advance, timeout},
};

use super::{
    super::{ColdDriver, Hypervisor, Job, MigrateSpec},
    *,
};

const SHARED: &str = "/srv/shared";
const RUNNING: Presence = Presence::Present(PowerState::Running);
const PAUSED: Presence = Presence::Present(PowerState::Paused);
const OFF: Presence = Presence::Present(PowerState::Shutdown);

struct Scene {
    fabric: Fabric,
    a: FakeDriver,
    b: FakeDriver,
    id: InstanceId,
}

/// A guest of 1000 MiB that writes 50 MiB/s, 100 MiB/s of link, a shared disk.
fn scene() -> Scene {
    scene_with(7, |guest| guest.disk("/srv/shared/web.qcow2", 100))
}

fn scene_with(seed: u64, change: impl FnOnce(GuestBuilder) -> GuestBuilder) -> Scene {
    let fabric = Fabric::new(seed);
    let a = fabric.add_node("kvm1", NodeSpec::default());
    let b = fabric.add_node("kvm2", NodeSpec::default());
    fabric.share_directory(SHARED, &["kvm1", "kvm2"], 100 << 30);
    fabric.set_link_mib_s("kvm1", "kvm2", 100);
    let guest = GuestBuilder::new("web").memory_mib(1000).dirty_mib_s(50);
    let id = fabric.add_guest("kvm1", change(guest));
    Scene { fabric, a, b, id }
}

impl Scene {
    fn spec(&self) -> MigrateSpec {
        spec_for(&self.fabric, self.id)
    }

    /// The destination makes a place for the guest's disk.
    async fn makes_disk_for(&self, guest: &Guest) {
        let disk = &guest.disks[0];
        let path = disk.local_path().unwrap().to_owned();
        self.b.reserve_file(&path, false).await.unwrap();
        let seen = self.b.contents(&[path], &[]).await.unwrap();
        let Seen::File { inode, .. } = seen[0].seen else {
            panic!("it was just made: {seen:?}");
        };
        self.b.create_disk(disk, inode).await.unwrap();
    }

    fn set_off(&self, spec: MigrateSpec) -> JoinHandle<Result<()>> {
        let a = self.a.clone();
        tokio::spawn(async move { a.migrate(spec).await })
    }

    fn places(&self) -> (Presence, Presence) {
        let truth = self.fabric.whereabouts(self.id);
        let at = |host: &FakeDriver| {
            let place = truth.iter().find(|(name, _)| name == host.host());
            place.map_or(Presence::Absent, |(_, presence)| *presence)
        };
        (at(&self.a), at(&self.b))
    }

    fn assert_sound(&self, what: &str) {
        if let Err(violations) = self.fabric.check_invariants() {
            let texts: Vec<String> = violations.iter().map(ToString::to_string).collect();
            panic!("{what}: {}", texts.join("; "));
        }
    }
}

fn spec_for(fabric: &Fabric, instance: InstanceId) -> MigrateSpec {
    let to = fabric.endpoint("kvm2");
    MigrateSpec {
        instance,
        dest_libvirt_uri: to.libvirt_uri,
        dest_address: to.address,
        copied_disks: Vec::new(),
        shared_disks: vec!["vda".to_owned()],
        initial_downtime_ms: None,
        options: LiveOptions::default(),
    }
}

async fn sample(driver: &FakeDriver, id: InstanceId) -> JobSample {
    match driver.job(id).await.unwrap() {
        Job::Migration(sample) => sample,
        other => panic!("no migration but {other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn a_move_takes_the_time_that_its_bytes_take() {
    let scene = scene();
    let begun = Instant::now();
    scene.a.migrate(scene.spec()).await.unwrap();
    let took = begun.elapsed().as_millis();
    // Rounds of 10 s, 5 s, 2.5 s, … until 0.3 s are left, then those.
    assert!((19_500..20_600).contains(&took), "{took} ms");
    assert_eq!(scene.places(), (Presence::Absent, RUNNING));
    let done = scene.b.completed_job(scene.id).await.unwrap().unwrap();
    let downtime = done.downtime_ms.unwrap();
    assert!((100..=340).contains(&downtime), "{downtime} ms");
    scene.assert_sound("moved");
    assert_eq!(scene.fabric.leftovers(), Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn memory_counts_on_but_for_the_downtime() {
    let scene = scene();
    let begun = Instant::now();
    scene.a.migrate(scene.spec()).await.unwrap();
    let lived = begun.elapsed();
    let counted = scene.fabric.counter("kvm2", scene.id).unwrap();
    let stood = lived - counted;
    let downtime = scene
        .b
        .completed_job(scene.id)
        .await
        .unwrap()
        .unwrap()
        .downtime_ms;
    assert_eq!(u64::try_from(stood.as_millis()).unwrap(), downtime.unwrap());
}

#[tokio::test(start_paused = true)]
async fn the_same_seed_gives_the_same_history() {
    let history = async |seed| {
        let scene = scene_with(seed, |g| g.disk("/srv/shared/web.qcow2", 100));
        let begun = Instant::now();
        let underway = scene.set_off(scene.spec());
        let mut seen = Vec::new();
        while !underway.is_finished() {
            let job = scene.a.job(scene.id).await;
            seen.push((begun.elapsed(), format!("{job:?}")));
            sleep(Duration::from_millis(500)).await;
        }
        seen
    };
    let first = history(1).await;
    assert_eq!(first, history(1).await);
    let times = |h: &[(Duration, String)]| h.iter().map(|s| s.0).collect::<Vec<_>>();
    assert_ne!(
        times(&first),
        times(&history(2).await),
        "the seed draws latencies"
    );
}

#[tokio::test(start_paused = true)]
async fn two_migrations_share_the_road() {
    let scene = scene_with(7, |g| g.disk("/srv/shared/web.qcow2", 1).dirty_mib_s(0));
    let slow = |node: &mut NodeSpec| node.bandwidth_bytes_s = 100 << 20;
    scene.fabric.edit_node("kvm1", slow);
    let other = GuestBuilder::new("db").memory_mib(1000);
    let other = other.disk("/srv/shared/db.qcow2", 1);
    let other = scene.fabric.add_guest("kvm1", other);
    let begun = Instant::now();
    let first = scene.set_off(scene.spec());
    let second = scene.set_off(spec_for(&scene.fabric, other));
    first.await.unwrap().unwrap();
    second.await.unwrap().unwrap();
    let took = begun.elapsed().as_secs_f64();
    assert!((20.0..21.0).contains(&took), "{took} s");
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_writes_too_fast_goes_on_for_ever() {
    let scene = scene_with(7, |g| g.disk("/srv/shared/web.qcow2", 1).dirty_mib_s(200));
    let underway = scene.set_off(scene.spec());
    sleep(Duration::from_secs(3600)).await;
    assert!(!underway.is_finished());
    let seen = sample(&scene.a, scene.id).await;
    assert!(seen.iteration > 100, "{seen:?}");
    assert_eq!(seen.dirty_rate_bytes_s, 100 << 20, "bounded by its memory");
    scene.a.abort(scene.id).await.unwrap();
    let ended = underway.await.unwrap();
    assert!(
        matches!(ended, Err(HypervisorError::Aborted(_))),
        "{ended:?}"
    );
    scene.assert_sound("aborted");
}

#[tokio::test(start_paused = true)]
async fn auto_converge_brings_it_to_an_end() {
    let scene = scene_with(7, |g| g.disk("/srv/shared/web.qcow2", 1).dirty_mib_s(200));
    let mut spec = scene.spec();
    spec.options.auto_converge = true;
    let moved = timeout(Duration::from_secs(3600), scene.a.migrate(spec)).await;
    moved.expect("it converges").unwrap();
    let done = scene.b.completed_job(scene.id).await.unwrap().unwrap();
    assert!(done.throttle_percent >= Some(20), "{done:?}");
}

#[tokio::test(start_paused = true)]
async fn a_migration_goes_on_without_its_driver() {
    let scene = scene();
    let Scene { fabric, a, id, .. } = &scene;
    let agent = {
        let (a, spec) = (fabric.driver("kvm1"), scene.spec());
        tokio::spawn(async move { a.migrate(spec).await })
    };
    sleep(Duration::from_secs(3)).await;
    agent.abort();
    assert!(agent.await.unwrap_err().is_cancelled());
    let seen = sample(&fabric.driver("kvm1"), *id).await;
    assert!(seen.memory.processed_bytes > 0, "{seen:?}");
    sleep(Duration::from_secs(30)).await;
    assert_eq!(a.presence(*id).await.unwrap(), Presence::Absent);
    assert_eq!(scene.places(), (Presence::Absent, RUNNING));
    scene.assert_sound("moved");
}

#[tokio::test(start_paused = true)]
async fn post_copy_goes_at_once_and_catches_up() {
    let scene = scene_with(7, |g| g.disk("/srv/shared/web.qcow2", 1).dirty_mib_s(200));
    let mut spec = scene.spec();
    spec.options.post_copy = true;
    let underway = scene.set_off(spec);
    sleep(Duration::from_secs(3)).await;
    scene.a.start_post_copy(scene.id).await.unwrap();
    sleep(Duration::from_secs(1)).await;
    assert_eq!(scene.places(), (PAUSED, RUNNING));
    let seen = sample(&scene.a, scene.id).await;
    assert!(
        seen.post_copy && seen.memory.remaining_bytes > 0,
        "{seen:?}"
    );
    for (what, refused) in [
        ("abort", scene.a.abort(scene.id).await),
        ("resume", scene.a.resume(scene.id).await),
        ("resume on b", scene.b.resume(scene.id).await),
        ("undefine", scene.a.undefine(scene.id).await),
    ] {
        let wrong = matches!(refused, Err(HypervisorError::WrongState(_)));
        assert!(wrong, "{what}: {refused:?}");
    }
    underway.await.unwrap().unwrap();
    assert_eq!(scene.places(), (Presence::Absent, RUNNING));
    scene.assert_sound("moved");
}

// ---- faults -------------------------------------------------------------------------

/// Where the guest may be when a fault has had its effect.
fn allowed(at: At, fault: &Fault) -> &'static [(Presence, Presence)] {
    use Presence::{Absent, Incoming};
    let committed = matches!(at, At::PostCopy(_) | At::Finish);
    match (fault, committed) {
        (Fault::Stall, false) => &[(RUNNING, Incoming), (PAUSED, Incoming)],
        (Fault::Stall, true) => &[(PAUSED, RUNNING)],
        (Fault::Fail(_), false) => &[(RUNNING, Absent)],
        (Fault::QemuDies(End::Source) | Fault::PowerOff(End::Source), false) => &[(OFF, Absent)],
        (Fault::QemuDies(End::Source), true) if at == At::Finish => &[(Absent, RUNNING)],
        (Fault::PowerOff(End::Source), true) if at == At::Finish => &[(OFF, RUNNING)],
        (Fault::QemuDies(End::Source) | Fault::PowerOff(End::Source), true) => &[(OFF, PAUSED)],
        (Fault::QemuDies(End::Destination), true) if at == At::Finish => &[(Absent, OFF)],
        (Fault::PowerOff(End::Destination), true) if at == At::Finish => &[(PAUSED, OFF)],
        (Fault::QemuDies(_) | Fault::PowerOff(_), true) => &[(PAUSED, OFF)],
        (Fault::QemuDies(_) | Fault::PowerOff(_), false) => &[(RUNNING, Absent)],
        (Fault::CutLink, false) | (Fault::LibvirtdDies(_), false) => &[(RUNNING, Absent)],
        (Fault::CutLink, true) => &[(PAUSED, RUNNING)],
        (Fault::LibvirtdDies(_), true) if at == At::Finish => &[(PAUSED, RUNNING)],
        (Fault::LeaveStaleCopy, _) => &[(PAUSED, RUNNING)],
        (Fault::KeepDefinition, _) => &[(OFF, RUNNING)],
        _ => &[(Absent, RUNNING)],
    }
}

fn every_fault() -> Vec<Fault> {
    vec![
        Fault::Stall,
        Fault::QemuDies(End::Source),
        Fault::QemuDies(End::Destination),
        Fault::CutLink,
        Fault::LibvirtdAway(End::Source),
        Fault::LibvirtdAway(End::Destination),
        Fault::LibvirtdDies(End::Source),
        Fault::LibvirtdDies(End::Destination),
        Fault::PowerOff(End::Source),
        Fault::PowerOff(End::Destination),
        Fault::LoseCaller,
        Fault::ReportLate(Duration::from_secs(5)),
        Fault::LeaveIncoming,
        Fault::LeavePaused,
        Fault::LeaveStaleCopy,
        Fault::KeepDefinition,
    ]
}

async fn play(at: At, fault: &Fault) {
    let scene = scene_with(7, |g| g.disk("/var/lib/libvirt/images/web.qcow2", 300));
    let guest = scene.a.guest(scene.id).await.unwrap().unwrap();
    scene.makes_disk_for(&guest).await;
    let mut spec = scene.spec();
    spec.copied_disks = std::mem::take(&mut spec.shared_disks);
    spec.options.post_copy = true;
    scene.fabric.on_migration(scene.id, at, fault.clone());
    let underway = scene.set_off(spec);
    sleep(Duration::from_secs(5)).await;
    if matches!(at, At::PostCopy(_)) {
        scene.a.start_post_copy(scene.id).await.unwrap();
    }
    sleep(Duration::from_secs(120)).await;
    let places = scene.places();
    let what = format!("{fault:?} at {at:?}");
    assert!(allowed(at, fault).contains(&places), "{what}: {places:?}");
    scene.assert_sound(&what);
    let stuck = scene.fabric.migrating().contains(&scene.id);
    let told = underway.is_finished();
    assert!(told || stuck, "{what}: its caller waits for nothing");
}

#[tokio::test(start_paused = true)]
async fn every_fault_at_every_point_ends_as_it_says_and_breaks_no_promise() {
    let points = [
        At::Start,
        At::Disk(50),
        At::Memory(30),
        At::Round(2),
        At::SwitchOver,
        At::PostCopy(50),
        At::Finish,
    ];
    for at in points {
        for fault in every_fault() {
            play(at, &fault).await;
        }
        if !matches!(at, At::PostCopy(_) | At::Finish) {
            play(at, &Fault::Fail("by script".to_owned())).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_stalled_migration_goes_on_when_it_may() {
    let scene = scene();
    scene
        .fabric
        .on_migration(scene.id, At::Memory(50), Fault::Stall);
    let underway = scene.set_off(scene.spec());
    sleep(Duration::from_secs(1000)).await;
    let first = sample(&scene.a, scene.id).await.memory;
    sleep(Duration::from_secs(1000)).await;
    assert_eq!(sample(&scene.a, scene.id).await.memory, first);
    assert_eq!(first.processed_bytes, 500 << 20);
    scene.fabric.unstall(scene.id);
    underway.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_link_that_is_mended_in_time_costs_time_alone() {
    let scene = scene();
    let underway = scene.set_off(scene.spec());
    sleep(Duration::from_secs(3)).await;
    scene.fabric.cut_link("kvm1", "kvm2");
    sleep(Duration::from_secs(20)).await;
    scene.fabric.mend_link("kvm2", "kvm1");
    underway.await.unwrap().unwrap();
    assert_eq!(scene.places(), (Presence::Absent, RUNNING));
}

#[tokio::test(start_paused = true)]
async fn a_link_that_stays_cut_is_given_up_after_30_s() {
    let scene = scene();
    let underway = scene.set_off(scene.spec());
    sleep(Duration::from_secs(3)).await;
    scene.fabric.cut_link("kvm1", "kvm2");
    let cut = Instant::now();
    let ended = underway.await.unwrap();
    assert!(
        matches!(ended, Err(HypervisorError::Failed(_))),
        "{ended:?}"
    );
    let waited = cut.elapsed().as_secs();
    assert!((29..=31).contains(&waited), "{waited} s");
    assert_eq!(scene.places(), (RUNNING, Presence::Absent));
    let reached = scene.a.reach("kvm2", 16509).await;
    assert!(reached.is_err_and(|e| e.message.contains("timed out") && !e.refused));
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_is_lost_learns_nothing_and_the_guest_moves() {
    let scene = scene();
    scene
        .fabric
        .on_migration(scene.id, At::Memory(50), Fault::LoseCaller);
    let told = scene.a.migrate(scene.spec()).await.unwrap_err();
    assert_eq!(told.class(), ErrorClass::Lost);
    assert_eq!(scene.places(), (RUNNING, Presence::Incoming));
    sleep(Duration::from_secs(30)).await;
    assert_eq!(scene.places(), (Presence::Absent, RUNNING));
}

#[tokio::test(start_paused = true)]
async fn a_failure_is_told_as_late_as_it_was_scripted() {
    let scene = scene();
    let late = Duration::from_secs(60);
    scene
        .fabric
        .on_migration(scene.id, At::Start, Fault::ReportLate(late));
    scene
        .fabric
        .on_migration(scene.id, At::Memory(50), Fault::Fail("no".to_owned()));
    let begun = Instant::now();
    let told = scene.a.migrate(scene.spec()).await;
    assert_eq!(told, Err(HypervisorError::Failed("no".to_owned())));
    let took = begun.elapsed().as_secs();
    assert!((64..=67).contains(&took), "{took} s");
}

#[tokio::test(start_paused = true)]
async fn what_a_failed_migration_leaves_can_be_discarded() {
    let scene = scene();
    scene
        .fabric
        .on_migration(scene.id, At::Start, Fault::LeaveIncoming);
    scene
        .fabric
        .on_migration(scene.id, At::Memory(50), Fault::Fail("no".to_owned()));
    scene.a.migrate(scene.spec()).await.unwrap_err();
    assert_eq!(scene.places(), (RUNNING, Presence::Incoming));
    assert_eq!(scene.fabric.leftovers().len(), 1);
    scene.b.discard_incoming(scene.id).await.unwrap();
    assert_eq!(scene.places(), (RUNNING, Presence::Absent));
    scene.assert_sound("discarded");
    assert_eq!(scene.fabric.leftovers().len(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_failed_paused_is_resumed() {
    let scene = scene();
    scene
        .fabric
        .on_migration(scene.id, At::Start, Fault::LeavePaused);
    scene
        .fabric
        .on_migration(scene.id, At::Memory(50), Fault::Fail("no".to_owned()));
    scene.a.migrate(scene.spec()).await.unwrap_err();
    assert_eq!(scene.places(), (PAUSED, Presence::Absent));
    scene.a.resume(scene.id).await.unwrap();
    assert_eq!(scene.places(), (RUNNING, Presence::Absent));
    scene.assert_sound("resumed");
}

#[tokio::test(start_paused = true)]
async fn calls_go_as_scripted_and_as_often() {
    let scene = scene();
    let Scene { fabric, a, id, .. } = &scene;
    let no = HypervisorError::Failed("No space left on device".to_owned());
    fabric.on_call("kvm1", Call::Presence, 2, Effect::Refuse(no.clone()));
    assert_eq!(a.presence(*id).await, Err(no.clone()));
    assert_eq!(a.presence(*id).await, Err(no));
    assert_eq!(a.presence(*id).await, Ok(RUNNING));
    let minute = Duration::from_secs(60);
    for effect in [Effect::SlowBefore(minute), Effect::SlowAfter(minute)] {
        fabric.on_call("kvm1", Call::Presence, 1, effect);
        let begun = Instant::now();
        assert_eq!(a.presence(*id).await, Ok(RUNNING));
        assert!(begun.elapsed() >= minute);
    }
    let lost = HypervisorError::Lost("by script".to_owned());
    fabric.on_call("kvm1", Call::Migrate, 1, Effect::Forget(lost.clone()));
    assert_eq!(a.migrate(scene.spec()).await, Err(lost));
    assert_eq!(fabric.migrating(), [*id]);
}

#[tokio::test(start_paused = true)]
async fn a_slow_call_that_is_dropped_does_nothing() {
    let scene = scene();
    let slow = Effect::SlowBefore(Duration::from_secs(60));
    scene.fabric.on_call("kvm1", Call::Migrate, 1, slow);
    let underway = scene.set_off(scene.spec());
    sleep(Duration::from_secs(1)).await;
    underway.abort();
    sleep(Duration::from_secs(600)).await;
    assert_eq!(scene.places(), (RUNNING, Presence::Absent));
}

#[tokio::test(start_paused = true)]
async fn a_node_without_power_keeps_definitions_alone() {
    let scene = scene();
    scene.fabric.power_off("kvm1");
    let error = scene.a.guests().await.unwrap_err();
    assert_eq!(error.class(), ErrorClass::Retryable);
    scene.fabric.power_on("kvm1");
    assert_eq!(scene.a.presence(scene.id).await, Ok(OFF));
    scene.assert_sound("a script took its power");
    scene.fabric.start_guest("kvm1", scene.id);
    assert_eq!(scene.a.presence(scene.id).await, Ok(RUNNING));
    scene.assert_sound("started again");
}

#[tokio::test(start_paused = true)]
async fn a_full_disk_ends_a_copy() {
    let scene = scene_with(7, |g| g.disk("/var/lib/libvirt/images/web.qcow2", 300));
    let guest = scene.a.guest(scene.id).await.unwrap().unwrap();
    scene.makes_disk_for(&guest).await;
    scene.fabric.set_disk_bytes("kvm2", "/var/lib", 100 << 20);
    let mut spec = scene.spec();
    spec.copied_disks = std::mem::take(&mut spec.shared_disks);
    let error = scene.a.migrate(spec).await.unwrap_err();
    assert!(error.to_string().contains("No space left"), "{error}");
    assert_eq!(scene.places(), (RUNNING, Presence::Absent));
}

#[tokio::test(start_paused = true)]
async fn what_a_destination_lacks_is_told_and_refused() {
    type Change = fn(&mut NodeSpec);
    let changes: [(&str, Change); 5] = [
        ("emulator", |n| n.emulators.clear()),
        ("machine", |n| n.machines.clear()),
        ("cpu", |n| n.cpu_features.clear()),
        ("network", |n| n.bridges.clear()),
        ("memory", |n| n.memory_mib = 100),
    ];
    for (what, change) in changes {
        let scene = scene();
        scene.fabric.edit_node("kvm2", change);
        let guest = scene.a.guest(scene.id).await.unwrap().unwrap();
        let (guest, marks) = (&guest, &[][..]);
        let question = DestinationQuestion { guest, marks };
        let fit = scene.b.answer_destination(question).await.unwrap();
        let told = match what {
            "emulator" => !fit.emulator_present,
            "machine" => !fit.machine_supported,
            "cpu" => fit.cpu != drover_model::api::compute::CpuVerdict::Compatible,
            "network" => !fit.networks[0].present,
            _ => scene.b.inventory().await.unwrap().memory_mib == 100,
        };
        assert!(told, "{what}: {fit:?}");
        let refused = scene.a.migrate(scene.spec()).await;
        assert!(matches!(refused, Err(HypervisorError::Failed(_))), "{what}");
        assert_eq!(scene.places(), (RUNNING, Presence::Absent), "{what}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_stale_copy_is_discarded() {
    let scene = scene();
    scene
        .fabric
        .on_migration(scene.id, At::Start, Fault::LeaveStaleCopy);
    scene.a.migrate(scene.spec()).await.unwrap_err();
    let taken = scene.b.discard_outgoing(scene.id).await;
    assert!(matches!(taken, Err(HypervisorError::WrongState(_))));
    scene.a.discard_outgoing(scene.id).await.unwrap();
    assert_eq!(scene.places(), (Presence::Absent, RUNNING));
    assert_eq!(scene.fabric.leftovers(), Vec::<String>::new());
    scene.a.discard_outgoing(scene.id).await.unwrap();
    scene.assert_sound("the old copy is gone");
}

// ---- the checker --------------------------------------------------------------------

#[tokio::test(start_paused = true)]
async fn a_stale_copy_that_is_resumed_is_found() {
    let scene = scene();
    scene
        .fabric
        .on_migration(scene.id, At::Start, Fault::LeaveStaleCopy);
    let told = scene.a.migrate(scene.spec()).await.unwrap_err();
    assert_eq!(told.class(), ErrorClass::Lost);
    scene.assert_sound("the copy stands still");
    assert_eq!(scene.fabric.leftovers().len(), 1);
    scene.a.resume(scene.id).await.unwrap();
    let found = scene.fabric.violations();
    let two = |v: &Violation| matches!(v, Violation::TwoRunning { .. });
    let lost = |v: &Violation| matches!(v, Violation::MemoryLost { .. });
    assert!(found.iter().any(two) && found.iter().any(lost), "{found:?}");
    scene.fabric.kill_guest(scene.id);
    assert!(
        scene.fabric.check_invariants().is_err(),
        "it is not forgotten"
    );
}

#[tokio::test(start_paused = true)]
async fn a_shared_disk_that_is_removed_is_found() {
    let scene = scene();
    scene.a.migrate(scene.spec()).await.unwrap();
    // The source no longer knows a user of it, and so does not refuse.
    scene.a.remove_disk("/srv/shared/web.qcow2").await.unwrap();
    let found = scene.fabric.check_invariants().unwrap_err();
    assert!(matches!(found[0], Violation::DiskLost { .. }), "{found:?}");
}

#[tokio::test(start_paused = true)]
async fn a_disk_that_was_taken_for_shared_is_found() {
    let scene = scene_with(7, |g| g.disk("/var/lib/libvirt/images/web.qcow2", 300));
    let guest = scene.a.guest(scene.id).await.unwrap().unwrap();
    scene.makes_disk_for(&guest).await;
    scene.a.migrate(scene.spec()).await.unwrap();
    let found = scene.fabric.check_invariants().unwrap_err();
    assert!(matches!(found[0], Violation::DiskLost { .. }), "{found:?}");
}

#[tokio::test(start_paused = true)]
async fn a_host_cache_on_a_shared_disk_is_refused() {
    let scene = scene();
    scene.fabric.edit_guest("kvm1", scene.id, |guest| {
        guest.disks[0].cache = Some("writeback".to_owned());
    });
    let refused = scene.a.migrate(scene.spec()).await.unwrap_err();
    assert!(refused.to_string().contains("nsafe"), "{refused}");
    assert_eq!(scene.fabric.check_invariants(), Ok(()));
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_is_nowhere_is_found_unless_it_was_killed() {
    let scene = scene();
    scene.fabric.kill_guest(scene.id);
    scene.assert_sound("a script killed it");
    scene.fabric.start_guest("kvm1", scene.id);
    advance(Duration::from_secs(1)).await;
    scene.fabric.with(|world, now| {
        let host = scene.a.host().clone();
        world.stop_vcpus(&host, scene.id, now, PowerState::Shutdown);
    });
    let guest = scene.id;
    let found = scene.fabric.check_invariants();
    assert_eq!(found, Err(vec![Violation::NowhereActive { guest }]));
}

#[tokio::test(start_paused = true)]
async fn what_is_defined_anew_while_a_guest_moves_does_not_come_along() {
    let scene = scene();
    let underway = scene.set_off(scene.spec());
    sleep(Duration::from_secs(3)).await;
    scene
        .fabric
        .redefine("kvm1", scene.id, |guest| guest.vcpus = 2);
    underway.await.unwrap().unwrap();
    assert_eq!(scene.places(), (Presence::Absent, RUNNING));
    let lasting = scene.b.lasting_guest(scene.id).await.unwrap().unwrap();
    assert_eq!(lasting.vcpus, 1);
}

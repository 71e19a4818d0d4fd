//! Storage that is mounted late, or is not there for a while: what has a file's name then
//! is not that file, and what is not seen is not gone.

use std::time::Duration;

use drover_compute::hypervisor::fake::{Call, GuestBuilder, script::Effect};
use drover_model::{
    guest::{DiskSource, Guest, PowerState},
    ids::InstanceId,
    migration::{ColdOptions, LiveOptions, Migration, MigrationStatus as S, Way},
};
use drover_tests::cloud::Cloud;

const DATA: &str = "/srv/data";
const DISK: &str = "/srv/data/web.qcow2";

/// Two nodes, of which one sees the storage of a guest.
async fn cloud() -> Cloud {
    let cloud = Cloud::start(1).await;
    cloud.fabric.make_directory("kvm2", DATA);
    cloud.fabric.share_directory(DATA, &["kvm1"], 1 << 40);
    cloud
}

async fn guest(cloud: &Cloud, state: PowerState) -> InstanceId {
    let builder = GuestBuilder::new("web").memory_mib(1024).state(state);
    let id = cloud.fabric.add_guest("kvm1", builder.disk(DISK, 256));
    cloud.adopted(id).await;
    id
}

/// A cold move whose bytes begin to go only after a while.
async fn leaving(cloud: &Cloud, id: InstanceId, pre_copy: bool) -> Migration {
    let slow = Effect::SlowBefore(Duration::from_secs(20));
    cloud.fabric.on_call("kvm1", Call::Send, 1, slow);
    let way = Way::Cold(ColdOptions {
        pre_copy,
        ..ColdOptions::default()
    });
    let accepted = cloud.migrate_by(id, Some("kvm2"), &way).await;
    accepted.expect("it is accepted")
}

fn nothing_is_lost(cloud: &Cloud, m: &Migration) {
    let found = cloud.fabric.check_invariants();
    found.unwrap_or_else(|found| panic!("{found:?}\n{m:#?}"));
}

async fn is_taken_back(cloud: &Cloud, m: &Migration) {
    let m = cloud.until(m.uuid, "at rest", |m| m.status.rests()).await;
    assert!(matches!(m.status, S::Cancelled | S::Failed), "{m:#?}");
    assert!(cloud.fabric.file("kvm1", DISK).is_some(), "{m:#?}");
    let stays =
        |w: &String| w.contains(DISK) && w.contains("is not the file that this migration made");
    assert!(m.warnings.iter().any(stays), "{m:#?}");
    nothing_is_lost(cloud, &m);
}

/// The destination sees the guest's own disk where it had made one, and takes that back.
#[tokio::test(start_paused = true)]
async fn a_share_that_is_mounted_late_keeps_the_only_disk() {
    let cloud = cloud().await;
    let id = guest(&cloud, PowerState::Shutdown).await;
    let m = leaving(&cloud, id, false).await;
    cloud.until(m.uuid, "prepared", |m| m.step == "copy").await;
    cloud.fabric.set_mounted("kvm2", DATA, true);
    cloud.abort(m.uuid).await.expect("it is taken");
    is_taken_back(&cloud, &m).await;
}

#[tokio::test(start_paused = true)]
async fn a_share_that_is_mounted_late_keeps_the_disk_of_a_guest_that_runs() {
    let cloud = cloud().await;
    let id = guest(&cloud, PowerState::Running).await;
    let options = LiveOptions {
        bandwidth_mib_s: Some(4),
        ..LiveOptions::default()
    };
    let m = cloud.migrate(id, Some("kvm2"), options).await;
    let m = m.expect("it is accepted");
    let sending = |m: &Migration| m.progress.disk.processed_bytes > 0;
    cloud.until(m.uuid, "sending", sending).await;
    cloud.fabric.set_mounted("kvm2", DATA, true);
    cloud.abort(m.uuid).await.expect("it is taken");
    is_taken_back(&cloud, &m).await;
}

/// The source had its disks stand still, and has booted without the storage of what was
/// written since: nothing is merged, and nothing started on older bytes.
#[tokio::test(start_paused = true)]
async fn an_overlay_that_is_not_mounted_is_waited_for() {
    let mut cloud = cloud().await;
    let id = guest(&cloud, PowerState::Running).await;
    let m = leaving(&cloud, id, true).await;
    cloud
        .until(m.uuid, "frozen", |m| m.step == "pre_copy")
        .await;
    tokio::time::sleep(Duration::from_secs(10)).await;
    cloud.fabric.power_off("kvm1");
    cloud.kill_agent("kvm1");
    tokio::time::sleep(Duration::from_secs(60)).await;
    cloud.fabric.set_mounted("kvm1", DATA, false);
    cloud.fabric.power_on("kvm1");
    cloud.start_agent("kvm1").await;
    let asked = cloud.abort(m.uuid).await;
    asked.expect("it is taken");
    tokio::time::sleep(Duration::from_secs(300)).await;
    cloud.fabric.set_mounted("kvm1", DATA, true);
    let _ = cloud.resume(m.uuid).await;
    let m = cloud.until(m.uuid, "at rest", |m| m.status.rests()).await;
    assert_eq!(m.status, S::Cancelled, "{m:#?}");
    nothing_is_lost(&cloud, &m);
    assert_eq!(cloud.fabric.lost_bytes(), Vec::<String>::new(), "{m:#?}");
}

/// A guest of the destination that is off names a file that is not there: whoever put one
/// there would have that guest start on it.
#[tokio::test(start_paused = true)]
async fn a_file_that_another_guest_misses_is_not_made() {
    const OTHERS: &str = "/var/lib/libvirt/images/other.qcow2";
    const MOVED: &str = "/var/lib/libvirt/images/web.qcow2";
    let cold = Way::Cold(ColdOptions::default());
    let live = Way::Live(LiveOptions::default());
    for (state, way) in [(PowerState::Running, live), (PowerState::Shutdown, cold)] {
        let cloud = Cloud::start(1).await;
        let other = GuestBuilder::new("other").state(PowerState::Shutdown);
        let other = cloud.fabric.add_guest("kvm2", other.disk(OTHERS, 64));
        let names = |path: &str| {
            let source = DiskSource::File { path: path.into() };
            let change = |g: &mut Guest| g.disks[0].source = source;
            cloud.fabric.redefine("kvm2", other, change);
        };
        names(MOVED);
        let web = GuestBuilder::new("web").memory_mib(1024).state(state);
        let id = cloud.fabric.add_guest("kvm1", web.disk(MOVED, 64));
        cloud.adopted(id).await;
        let moved = async || {
            let m = cloud.migrate_by(id, Some("kvm2"), &way).await;
            let m = m.expect("it is accepted");
            cloud.until(m.uuid, "at rest", |m| m.status.rests()).await
        };
        let m = moved().await;
        assert_eq!(m.status, S::Failed, "{m:#?}");
        let reason = m.end_reason.as_ref().expect("why").to_string();
        let says = reason.contains(MOVED) && reason.contains("another guest");
        assert!(says, "{reason}");
        assert!(cloud.fabric.file("kvm2", MOVED).is_none(), "{m:#?}");
        names(OTHERS);
        let m = moved().await;
        assert!(m.status.has_moved(), "{m:#?}");
        nothing_is_lost(&cloud, &m);
    }
}

//! Guests that change hands: what the fake does beyond the contract, what breaks,
//! and what the checker sees.

use std::time::Duration;

use drover_model::{
    api::compute::{DiskMove, NicMove, TransferPlan},
    guest::{BackingImage, NicAttachment, PowerState, Presence},
    ids::InstanceId,
    migration::{LiveOptions, TransferMode},
    project::Location,
};
use tokio::time::{Instant, sleep};

use super::{
    super::{ColdDriver, Hypervisor, HypervisorError, Job, MigrateSpec, Mirror, TransferDriver},
    Call, Effect, Fabric, FakeDriver, File, GuestBuilder, NodeSpec,
};

const OLD: &str = "/var/lib/libvirt/images/web.qcow2";
const BESIDE: &str = "/var/lib/libvirt/images/p2-web.qcow2";
/// On another file system.
const ELSEWHERE: &str = "/srv/p2/web.qcow2";
const MIB: u64 = 1 << 20;
const SECOND: Duration = Duration::from_secs(1);

struct Scene {
    fabric: Fabric,
    a: FakeDriver,
    id: InstanceId,
}

fn scene() -> Scene {
    scene_with(|guest| guest.disk(OLD, 100))
}

/// A guest on a node that copies 100 MiB in 10 s.
fn scene_with(change: impl FnOnce(GuestBuilder) -> GuestBuilder) -> Scene {
    let fabric = Fabric::new(7);
    let spec = NodeSpec {
        disk_bytes_s: 10 * MIB,
        bridges: ["br-guests", "br-p2"].map(str::to_owned).into(),
        pools: [("p2".to_owned(), "/srv/p2".to_owned())].into(),
        ..NodeSpec::default()
    };
    let a = fabric.add_node("kvm1", spec);
    fabric.add_node("kvm2", NodeSpec::default());
    fabric.share_directory("/srv/p2", &["kvm1"], 1 << 30);
    fabric.make_directory("kvm1", "/srv/p2");
    let guest = GuestBuilder::new("web").project("p1");
    let id = fabric.add_guest("kvm1", change(guest));
    Scene { fabric, a, id }
}

fn to(path: &str) -> DiskMove {
    DiskMove {
        target: "vda".to_owned(),
        from: OLD.to_owned(),
        to: path.to_owned(),
        format: "qcow2".to_owned(),
        backing: Vec::new(),
        flatten: false,
        data_bytes: 100 * MIB,
    }
}

fn bridge(name: &str) -> NicAttachment {
    let bridge = name.to_owned();
    NicAttachment::Bridge { bridge }
}

fn nic(number: u8, to: &str) -> NicMove {
    NicMove {
        mac: format!("52:54:00:00:00:{number:02x}"),
        from: bridge("br-guests"),
        to: bridge(to),
        new_mac: None,
    }
}

fn plan(nics: Vec<NicMove>, disks: Vec<DiskMove>) -> TransferPlan {
    TransferPlan {
        mode: TransferMode::Live,
        project: "p2".parse().unwrap(),
        project_name: "Two".to_owned(),
        nics,
        disks,
        name: None,
        title: None,
    }
}

impl Scene {
    fn assert_sound(&self) {
        if let Err(violations) = self.fabric.check_invariants() {
            let texts: Vec<String> = violations.iter().map(ToString::to_string).collect();
            panic!("{}", texts.join("; "));
        }
    }

    fn found(&self) -> String {
        let found = self.fabric.check_invariants().unwrap_err();
        let texts: Vec<String> = found.iter().map(ToString::to_string).collect();
        texts.join("; ")
    }

    async fn mirror(&self, disk: &DiskMove) -> Mirror {
        self.a.mirror_disk(self.id, disk, None).await.unwrap()
    }

    async fn until_ready(&self, disk: &DiskMove) {
        while self.mirror(disk).await != Mirror::Ready {
            sleep(SECOND).await;
        }
    }

    fn disk(&self) -> String {
        let guest = self.fabric.guest("kvm1", self.id).unwrap();
        guest.disks[0].local_path().unwrap().to_owned()
    }

    fn file(&self, path: &str) -> File {
        self.fabric.file("kvm1", path).unwrap()
    }

    fn has(&self, path: &str) -> bool {
        self.fabric.file("kvm1", path).is_some()
    }
}

#[track_caller]
fn assert_wrong<T: std::fmt::Debug>(result: Result<T, HypervisorError>) {
    let wrong = matches!(result, Err(HypervisorError::WrongState(_)));
    assert!(wrong, "{result:?}");
}

// ---- networks and project ------------------------------------------------------------

#[tokio::test(start_paused = true)]
async fn what_was_half_handed_over_goes_back() {
    let both = [bridge("br-guests"), bridge("br-guests")];
    let scene = scene_with(|guest| guest.nics(&both));
    let before = scene.a.guest(scene.id).await.unwrap();
    let standing = scene.a.standing(scene.id).await.unwrap();
    let plan = plan(vec![nic(0, "br-p2"), nic(1, "br-none")], Vec::new());
    scene.a.hand_over(scene.id, &plan).await.unwrap_err();
    let half = scene.a.guest(scene.id).await.unwrap().unwrap();
    assert_eq!(half.nics[0].attachment, bridge("br-p2"));
    assert_eq!(half.nics[1].attachment, bridge("br-guests"));
    assert_eq!(half.project, "p1");
    scene.a.hand_back(scene.id, &standing).await.unwrap();
    assert_eq!(scene.a.guest(scene.id).await.unwrap(), before);
}

#[tokio::test(start_paused = true)]
async fn only_what_changes_is_cut() {
    let scene = scene();
    let plan = plan(vec![nic(1, "br-p2")], Vec::new());
    let hand_over = async || scene.a.hand_over(scene.id, &plan).await.unwrap();
    assert!(hand_over().await > Duration::ZERO);
    assert_eq!(hand_over().await, Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_is_not_defined_has_no_standing() {
    let scene = scene_with(GuestBuilder::transient);
    assert_wrong(scene.a.standing(scene.id).await);
}

#[tokio::test(start_paused = true)]
async fn a_pool_is_its_directory() {
    let scene = scene();
    let pool = |name: &str| Location::Pool {
        pool: name.to_owned(),
    };
    scene.fabric.write_file("kvm1", ELSEWHERE, "x").unwrap();
    let names = ["web.qcow2".to_owned(), "other.qcow2".to_owned()];
    let asked = [pool("p2"), pool("none")];
    let facts = scene.a.location_facts(&asked, &names).await.unwrap();
    assert_eq!(facts[0].directory.as_deref(), Ok("/srv/p2"));
    assert_eq!(facts[0].free_bytes, (1 << 30) - 4096);
    assert_eq!(facts[0].taken, ["web.qcow2"]);
    assert!(facts[1].directory.is_err());
    scene.fabric.remove_directory("kvm1", "/srv/p2");
    let facts = scene.a.location_facts(&asked, &names).await.unwrap();
    assert!(facts[0].directory.is_err(), "{:?}", facts[0]);
}

#[tokio::test(start_paused = true)]
async fn a_base_image_has_other_users() {
    let base = "/var/lib/libvirt/images/base.qcow2";
    let scene = scene_with(|guest| guest.disk(OLD, 1).backing(base));
    let other = GuestBuilder::new("db").disk(BESIDE, 1).backing(base);
    let state = PowerState::Shutdown;
    scene.fabric.add_guest("kvm1", other.state(state));
    let paths = [OLD.to_owned(), base.to_owned()];
    let shared = scene.a.other_users(scene.id, &paths).await.unwrap();
    assert_eq!(shared.len(), 1, "{shared:?}");
    assert_eq!((&*shared[0].path, &*shared[0].domain), (base, "db"));
}

// ---- disks of running guests ---------------------------------------------------------

#[tokio::test(start_paused = true)]
async fn a_copy_takes_its_time_and_outlives_who_asked() {
    let scene = scene();
    let disk = to(BESIDE);
    let begun = scene.mirror(&disk).await;
    let total_bytes = 100 * MIB;
    assert_eq!(
        begun,
        Mirror::Copying {
            done_bytes: 0,
            total_bytes
        }
    );
    let Scene { fabric, a, id } = scene;
    drop(a);
    sleep(5 * SECOND).await;
    fabric.restart_libvirtd("kvm1");
    let a = fabric.driver("kvm1");
    let scene = Scene { fabric, a, id };
    let Mirror::Copying { done_bytes, .. } = scene.mirror(&disk).await else {
        panic!("10 s are not over");
    };
    assert!((50 * MIB..51 * MIB).contains(&done_bytes), "{done_bytes}");
    assert_wrong(scene.a.pivot_disk(id, &disk).await);
    sleep(5 * SECOND).await;
    assert_eq!(scene.mirror(&disk).await, Mirror::Ready);
    scene.assert_sound();
}

#[tokio::test(start_paused = true)]
async fn a_limit_is_kept() {
    let scene = scene();
    let disk = to(BESIDE);
    let mirror = async || {
        let limit = Some(MIB);
        scene.a.mirror_disk(scene.id, &disk, limit).await.unwrap()
    };
    mirror().await;
    sleep(99 * SECOND).await;
    assert!(matches!(mirror().await, Mirror::Copying { .. }));
    sleep(SECOND).await;
    assert_eq!(mirror().await, Mirror::Ready);
}

#[tokio::test(start_paused = true)]
async fn after_the_pivot_only_the_new_file_is_the_guests() {
    let scene = scene();
    let disk = to(ELSEWHERE);
    scene.until_ready(&disk).await;
    sleep(3 * SECOND).await;
    scene.a.pivot_disk(scene.id, &disk).await.unwrap();
    sleep(SECOND).await;
    scene.assert_sound();
    assert!(scene.fabric.leftovers().iter().any(|l| l.contains(OLD)));
    scene.a.remove_disk(OLD).await.unwrap();
    assert_eq!(scene.fabric.leftovers(), Vec::<String>::new());
    scene.a.stop(scene.id).await.unwrap();
    scene.a.start(scene.id).await.unwrap();
    sleep(SECOND).await;
    scene.assert_sound();
    assert_eq!(scene.disk(), ELSEWHERE);
}

#[tokio::test(start_paused = true)]
async fn a_guest_on_its_old_file_again_is_found_out() {
    let scene = scene();
    let old = scene.a.definition(scene.id).await.unwrap().unwrap();
    let disk = to(BESIDE);
    scene.until_ready(&disk).await;
    scene.a.pivot_disk(scene.id, &disk).await.unwrap();
    sleep(SECOND).await;
    scene.a.stop(scene.id).await.unwrap();
    scene.a.define(&old, None).await.unwrap();
    scene.a.start(scene.id).await.unwrap();
    assert!(scene.found().contains("last written"), "{}", scene.found());
}

#[tokio::test(start_paused = true)]
async fn a_copy_ends_with_its_guest_and_is_no_disk() {
    for copied in [false, true] {
        let scene = scene();
        let disk = to(BESIDE);
        scene.mirror(&disk).await;
        if copied {
            scene.until_ready(&disk).await;
            sleep(SECOND).await;
        }
        scene.fabric.kill_guest(scene.id);
        assert_wrong(scene.a.mirror_disk(scene.id, &disk, None).await);
        assert_wrong(scene.a.pivot_disk(scene.id, &disk).await);
        assert_eq!(scene.a.job(scene.id).await, Ok(Job::None));
        assert!(scene.has(BESIDE), "it stays for the caller to remove");
        scene.a.start(scene.id).await.unwrap();
        scene.assert_sound();
        let again = scene.a.mirror_disk(scene.id, &disk, None).await;
        assert!(
            matches!(again, Err(HypervisorError::Exists(_))),
            "{again:?}"
        );
        // Who takes it for the disk all the same loses something.
        scene.a.stop(scene.id).await.unwrap();
        let definition = scene.a.definition(scene.id).await.unwrap().unwrap();
        let plan = plan(Vec::new(), vec![disk]);
        let wrong = scene.a.transferred(&definition, &plan).unwrap();
        scene.a.define(&wrong, None).await.unwrap();
        scene.a.start(scene.id).await.unwrap();
        assert!(scene.found().contains(BESIDE), "{}", scene.found());
    }
}

#[tokio::test(start_paused = true)]
async fn while_a_disk_is_copied_nothing_else_is_done_with_it() {
    let scene = scene();
    let disk = to(BESIDE);
    scene.mirror(&disk).await;
    let job = "block job (copy) on vda".to_owned();
    let guest = scene.a.guest(scene.id).await.unwrap().unwrap();
    assert_eq!(guest.active_job.as_ref(), Some(&job));
    assert_eq!(scene.a.job(scene.id).await, Ok(Job::Other(job)));
    let away = MigrateSpec {
        instance: scene.id,
        dest_libvirt_uri: scene.fabric.endpoint("kvm2").libvirt_uri,
        dest_address: scene.fabric.endpoint("kvm2").address,
        copied_disks: vec!["vda".to_owned()],
        shared_disks: Vec::new(),
        initial_downtime_ms: None,
        options: LiveOptions::default(),
    };
    assert_wrong(scene.a.migrate(away).await);
    assert_wrong(scene.a.remove_disk(BESIDE).await);
    assert_wrong(scene.a.mirror_disk(scene.id, &to(ELSEWHERE), None).await);
    let left = scene.fabric.leftovers();
    assert!(left.iter().any(|l| l.contains("being copied")), "{left:?}");
    // Not this copy, so it goes on.
    let other = to(ELSEWHERE);
    scene.a.abandon_mirror(scene.id, &other).await.unwrap();
    scene.until_ready(&disk).await;
    scene.a.abandon_mirror(scene.id, &disk).await.unwrap();
    assert_wrong(scene.a.pivot_disk(scene.id, &disk).await);
    assert!(!scene.fabric.leftovers().is_empty(), "the copy lies about");
    scene.a.remove_disk(BESIDE).await.unwrap();
    assert_eq!(scene.fabric.leftovers(), Vec::<String>::new());
    scene.assert_sound();
}

#[tokio::test(start_paused = true)]
async fn a_copy_breaks_off_where_there_is_no_room() {
    let scene = scene();
    scene.fabric.set_disk_bytes("kvm1", ELSEWHERE, 50 * MIB);
    let disk = to(ELSEWHERE);
    scene.mirror(&disk).await;
    sleep(9 * SECOND).await;
    let broken = scene.a.mirror_disk(scene.id, &disk, None).await;
    let words = broken.unwrap_err().to_string();
    assert!(words.contains("No space left"), "{words}");
    assert_eq!(scene.a.job(scene.id).await, Ok(Job::None));
    assert!(scene.has(ELSEWHERE));
    assert_eq!(scene.disk(), OLD);
    scene.assert_sound();
}

#[tokio::test(start_paused = true)]
async fn a_flattened_disk_has_nothing_under_it() {
    let base = "/var/lib/libvirt/images/base.qcow2";
    let scene = scene_with(|guest| guest.disk(OLD, 100).backing_mib(base, 50));
    let disk = DiskMove {
        flatten: true,
        backing: vec![BackingImage {
            path: base.to_owned(),
            format: "qcow2".to_owned(),
            allocated_bytes: 50 * MIB,
        }],
        ..to(ELSEWHERE)
    };
    scene.until_ready(&disk).await;
    scene.a.pivot_disk(scene.id, &disk).await.unwrap();
    let guest = scene.a.guest(scene.id).await.unwrap().unwrap();
    assert!(guest.disks[0].backing.is_empty());
    assert_eq!(guest.disks[0].allocated_bytes, 150 * MIB);
    scene.assert_sound();
}

// ---- disks of guests that are off ----------------------------------------------------

#[tokio::test(start_paused = true)]
async fn a_link_is_there_at_once_and_a_copy_is_not() {
    let scene = scene();
    assert_wrong(scene.a.place_disk(&to(BESIDE), None).await);
    scene.a.stop(scene.id).await.unwrap();
    for (path, least) in [(BESIDE, 0), (ELSEWHERE, 10)] {
        let began = Instant::now();
        scene.a.place_disk(&to(path), None).await.unwrap();
        let took = began.elapsed().as_secs();
        assert_eq!(took, least, "{path}");
        let (old, new) = (scene.file(OLD), scene.file(path));
        assert_eq!(old, new, "{path}");
    }
}

#[tokio::test(start_paused = true)]
async fn who_stops_placing_leaves_no_disk() {
    let scene = scene();
    scene.a.stop(scene.id).await.unwrap();
    let disk = to(ELSEWHERE);
    tokio::select! {
        placed = scene.a.place_disk(&disk, None) => panic!("{placed:?}"),
        () = sleep(SECOND) => {}
    }
    sleep(20 * SECOND).await;
    let (old, new) = (scene.file(OLD), scene.file(ELSEWHERE));
    assert_ne!(old.content, new.content);
    scene.a.place_disk(&disk, None).await.unwrap();
    let (old, new) = (scene.file(OLD), scene.file(ELSEWHERE));
    assert_eq!(old, new);
}

#[tokio::test(start_paused = true)]
async fn a_placed_disk_boots_for_the_receiver() {
    let scene = scene();
    scene.a.stop(scene.id).await.unwrap();
    let mut disk = to(ELSEWHERE);
    scene.a.place_disk(&disk, None).await.unwrap();
    let definition = scene.a.definition(scene.id).await.unwrap().unwrap();
    let new_mac = "52:54:00:00:00:aa".to_owned();
    let mut plan = plan(vec![nic(1, "br-p2")], vec![disk.clone()]);
    plan.nics[0].new_mac = Some(new_mac.clone());
    plan.name = Some("shop".to_owned());
    let new = scene.a.transferred(&definition, &plan).unwrap();
    scene.a.withdraw(scene.id).await.unwrap();
    scene.a.define(&new, None).await.unwrap();
    scene.a.start(scene.id).await.unwrap();
    sleep(SECOND).await;
    let guest = scene.a.guest(scene.id).await.unwrap().unwrap();
    assert_eq!((&*guest.name, &*guest.project), ("shop", "p2"));
    assert_eq!(guest.nics[0].mac, new_mac);
    assert_eq!(guest.nics[0].attachment, bridge("br-p2"));
    assert_eq!(scene.disk(), ELSEWHERE);
    scene.a.remove_disk(OLD).await.unwrap();
    assert_eq!(scene.fabric.leftovers(), Vec::<String>::new());
    scene.assert_sound();
    // Of what it is no longer, nothing is made.
    disk.from = BESIDE.to_owned();
    plan.disks = vec![disk];
    scene.a.transferred(&definition, &plan).unwrap_err();
}

// ---- scripts -------------------------------------------------------------------------

#[tokio::test(start_paused = true)]
async fn every_act_can_be_refused_and_forgotten() {
    let scene = scene();
    let (a, id) = (&scene.a, scene.id);
    let lost = HypervisorError::Lost("away".to_owned());
    let forget = |call| {
        let effect = Effect::Forget(lost.clone());
        scene.fabric.on_call("kvm1", call, 1, effect);
    };
    let refuse = |call| {
        let effect = Effect::Refuse(lost.clone());
        scene.fabric.on_call("kvm1", call, 1, effect);
    };
    let disk = to(BESIDE);
    let plan = plan(vec![nic(1, "br-p2")], Vec::new());
    let project = || scene.fabric.guest("kvm1", id).unwrap().project;

    refuse(Call::Standing);
    a.standing(id).await.unwrap_err();
    let standing = a.standing(id).await.unwrap();
    refuse(Call::HandOver);
    a.hand_over(id, &plan).await.unwrap_err();
    assert_eq!(project(), "p1");
    forget(Call::HandOver);
    a.hand_over(id, &plan).await.unwrap_err();
    assert_eq!(project(), "p2");
    forget(Call::HandBack);
    a.hand_back(id, &standing).await.unwrap_err();
    assert_eq!(project(), "p1");

    refuse(Call::MirrorDisk);
    a.mirror_disk(id, &disk, None).await.unwrap_err();
    assert!(!scene.has(BESIDE));
    forget(Call::MirrorDisk);
    a.mirror_disk(id, &disk, None).await.unwrap_err();
    scene.until_ready(&disk).await;
    refuse(Call::PivotDisk);
    a.pivot_disk(id, &disk).await.unwrap_err();
    assert_eq!(scene.disk(), OLD);
    forget(Call::AbandonMirror);
    a.abandon_mirror(id, &disk).await.unwrap_err();
    assert_eq!(a.job(id).await, Ok(Job::None));
    a.remove_disk(BESIDE).await.unwrap();
    scene.until_ready(&disk).await;
    forget(Call::PivotDisk);
    a.pivot_disk(id, &disk).await.unwrap_err();
    assert_eq!(scene.disk(), BESIDE);

    a.stop(id).await.unwrap();
    let back = disk.reversed();
    a.remove_disk(OLD).await.unwrap();
    refuse(Call::PlaceDisk);
    a.place_disk(&back, None).await.unwrap_err();
    assert!(!scene.has(OLD));
    forget(Call::PlaceDisk);
    a.place_disk(&back, None).await.unwrap_err();
    assert!(scene.has(OLD));

    for call in [Call::NetworksPresent, Call::LocationFacts, Call::OtherUsers] {
        refuse(call);
    }
    a.networks_present(&[]).await.unwrap_err();
    a.location_facts(&[], &[]).await.unwrap_err();
    a.other_users(id, &[]).await.unwrap_err();
    let off = Presence::Present(PowerState::Shutdown);
    assert_eq!(a.presence(id).await, Ok(off));
}

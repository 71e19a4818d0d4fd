//! Guests that are shut down, defined elsewhere and started: what the fake does,
//! and what the checker sees.

use std::time::Duration;

use drover_model::{
    guest::{DiskSource, ImmovableKind, PowerState, Presence},
    ids::InstanceId,
    migration::Flavor,
};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::{
    super::{ColdDriver, Event, Hypervisor, HypervisorError, Incoming, SendSpec},
    Call, Effect, Fabric, FakeDriver, GuestBuilder, NodeSpec, Violation,
    carriage_tests::{TOKEN, send},
};

const RUNNING: Presence = Presence::Present(PowerState::Running);
const PAUSED: Presence = Presence::Present(PowerState::Paused);
const OFF: Presence = Presence::Present(PowerState::Shutdown);
const DISK: &str = "/var/lib/libvirt/images/web.qcow2";
const NVRAM: &str = "/var/lib/libvirt/qemu/nvram/web.fd";
const SECOND: Duration = Duration::from_secs(1);

struct Scene {
    fabric: Fabric,
    a: FakeDriver,
    b: FakeDriver,
    id: InstanceId,
}

fn scene() -> Scene {
    scene_with(|guest| guest.disk(DISK, 100))
}

fn scene_with(change: impl FnOnce(GuestBuilder) -> GuestBuilder) -> Scene {
    let fabric = Fabric::new(7);
    let a = fabric.add_node("kvm1", NodeSpec::default());
    let b = fabric.add_node("kvm2", NodeSpec::default());
    let id = fabric.add_guest("kvm1", change(GuestBuilder::new("web")));
    Scene { fabric, a, b, id }
}

impl Scene {
    fn assert_sound(&self, what: &str) {
        if let Err(violations) = self.fabric.check_invariants() {
            let texts: Vec<String> = violations.iter().map(ToString::to_string).collect();
            panic!("{what}: {}", texts.join("; "));
        }
    }

    /// What the checker found, in words.
    fn found(&self) -> String {
        let found = self.fabric.check_invariants().unwrap_err();
        let texts: Vec<String> = found.iter().map(ToString::to_string).collect();
        texts.join("; ")
    }

    async fn shut_down(&self, driver: &FakeDriver) {
        driver.shut_down(self.id).await.unwrap();
        sleep(4 * SECOND).await;
        assert_eq!(driver.presence(self.id).await, Ok(OFF));
    }

    async fn carry(&self, from: &FakeDriver, to: &FakeDriver, path: &str) {
        let key = Uuid::new_v4();
        to.reserve_file(path, true).await.unwrap();
        let file = Incoming {
            path: path.to_owned(),
            present: false,
        };
        to.receive(key, TOKEN, &[file]).await.unwrap();
        let port = to.disk_port().unwrap();
        let spec = SendSpec {
            key,
            token: TOKEN.to_owned(),
            address: self.fabric.endpoint(to.host().as_str()).address,
            port,
            files: vec![path.to_owned()],
            resume: false,
            bandwidth_bytes_s: None,
            progress_timeout: 30 * SECOND,
        };
        send(from, spec).await.unwrap();
        to.stop_receiving(key).await;
    }

    /// From a to b, the old disk kept aside.
    async fn move_cold(&self) {
        self.shut_down(&self.a).await;
        self.carry(&self.a, &self.b, DISK).await;
        let definition = self.a.definition(self.id).await.unwrap().unwrap();
        self.a.withdraw(self.id).await.unwrap();
        self.a.rename_file(DISK, &kept()).await.unwrap();
        self.b.define(&definition, None).await.unwrap();
        self.b.start(self.id).await.unwrap();
    }

    /// And back to what was kept.
    async fn take_back(&self) {
        let definition = self.b.definition(self.id).await.unwrap().unwrap();
        self.b.stop(self.id).await.unwrap();
        self.b.withdraw(self.id).await.unwrap();
        self.b.remove_disk(DISK).await.unwrap();
        self.a.rename_file(&kept(), DISK).await.unwrap();
        self.a.define(&definition, None).await.unwrap();
        self.a.start(self.id).await.unwrap();
        sleep(SECOND).await;
    }
}

fn kept() -> String {
    format!("{DISK}.kept")
}

#[tokio::test(start_paused = true)]
async fn a_guest_shuts_down_in_its_time_and_says_so() {
    let scene = scene_with(|g| g.disk(DISK, 1).shuts_down_after(20 * SECOND));
    let mut events = scene.a.events();
    let asked = Instant::now();
    for _ in 0..2 {
        scene.a.shut_down(scene.id).await.unwrap();
        sleep(5 * SECOND).await;
    }
    assert_eq!(scene.a.presence(scene.id).await, Ok(RUNNING));
    assert_eq!(events.recv().await, Ok(Event::Guest(scene.id)));
    let took = asked.elapsed().as_secs();
    assert_eq!(took, 20, "the first time counts");
    assert_eq!(scene.a.presence(scene.id).await, Ok(OFF));
    scene.assert_sound("it went by itself");
    let again = scene.a.shut_down(scene.id).await;
    assert!(matches!(again, Err(HypervisorError::WrongState(_))));
}

#[tokio::test(start_paused = true)]
async fn a_guest_may_be_in_shutdown_before_it_is_off() {
    let lingers = |g: GuestBuilder| g.shuts_down_after(20 * SECOND).in_shutdown_for(5 * SECOND);
    let scene = scene_with(|g| lingers(g.disk(DISK, 1)));
    scene.a.shut_down(scene.id).await.unwrap();
    sleep(10 * SECOND).await;
    assert_eq!(scene.a.is_going_off(scene.id).await, Ok(false));
    sleep(6 * SECOND).await;
    assert_eq!(scene.a.is_going_off(scene.id).await, Ok(true));
    assert_eq!(scene.a.presence(scene.id).await, Ok(RUNNING));
    sleep(5 * SECOND).await;
    assert_eq!(scene.a.is_going_off(scene.id).await, Ok(false));
    assert_eq!(scene.a.presence(scene.id).await, Ok(OFF));
    scene.assert_sound("it went by itself");
}

#[tokio::test(start_paused = true)]
async fn what_is_defined_anew_is_so_from_the_next_start_on() {
    let scene = scene();
    let vcpus = async || {
        let now = scene.a.guest(scene.id).await.unwrap().unwrap().vcpus;
        let lasting = scene.a.lasting_guest(scene.id).await.unwrap().unwrap();
        (now, lasting.vcpus)
    };
    scene
        .fabric
        .redefine("kvm1", scene.id, |guest| guest.vcpus = 2);
    assert_eq!(vcpus().await, (1, 2));
    scene.a.stop(scene.id).await.unwrap();
    scene.a.start(scene.id).await.unwrap();
    assert_eq!(vcpus().await, (2, 2));
    let other = "/var/lib/libvirt/images/other.qcow2".to_owned();
    scene.fabric.redefine("kvm1", scene.id, |guest| {
        guest.disks[0].source = DiskSource::File { path: other };
    });
    let guest = scene.a.guest(scene.id).await.unwrap().unwrap();
    assert_eq!(guest.disks[0].local_path(), Some(DISK));
    assert!(guest.immovable[0].what.contains("from its next start on"));
    let lasting = scene.a.lasting_guest(scene.id).await.unwrap().unwrap();
    assert!(
        lasting
            .immovable
            .iter()
            .all(|i| i.what.starts_with("vda: "))
    );
    assert!(!lasting.immovable.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_deaf_guest_is_stopped_hard() {
    let scene = scene_with(|g| g.disk(DISK, 1).ignores_shutdown());
    scene.a.shut_down(scene.id).await.unwrap();
    sleep(3600 * SECOND).await;
    assert_eq!(scene.a.presence(scene.id).await, Ok(RUNNING));
    for _ in 0..2 {
        scene.a.stop(scene.id).await.unwrap();
        assert_eq!(scene.a.presence(scene.id).await, Ok(OFF));
    }
    scene.assert_sound("stopped");
}

#[tokio::test(start_paused = true)]
async fn a_paused_guest_does_not_obey() {
    let scene = scene();
    scene.a.shut_down(scene.id).await.unwrap();
    scene.fabric.pause_guest("kvm1", scene.id);
    sleep(60 * SECOND).await;
    assert_eq!(scene.a.presence(scene.id).await, Ok(PAUSED));
    let asked = scene.a.shut_down(scene.id).await;
    assert!(matches!(asked, Err(HypervisorError::WrongState(_))));
}

#[tokio::test(start_paused = true)]
async fn calls_of_the_cold_kind_go_as_scripted() {
    let scene = scene();
    let no = HypervisorError::Failed("no".to_owned());
    let refuse = Effect::Refuse(no.clone());
    scene
        .fabric
        .on_call("kvm1", Call::ShutDown, 1, refuse.clone());
    assert_eq!(scene.a.shut_down(scene.id).await, Err(no.clone()));
    let forget = Effect::Forget(no.clone());
    scene.fabric.on_call("kvm1", Call::Stop, 1, forget);
    assert_eq!(scene.a.stop(scene.id).await, Err(no.clone()));
    assert_eq!(scene.a.presence(scene.id).await, Ok(OFF));
    scene.fabric.on_call("kvm1", Call::DiskPort, 1, refuse);
    assert_eq!(scene.a.disk_port(), Err("no".to_owned()));
    assert_eq!(scene.a.disk_port(), Ok(49215));
    scene
        .fabric
        .edit_node("kvm1", |n| n.disk_port_error = Some("taken".to_owned()));
    assert_eq!(scene.a.disk_port(), Err("taken".to_owned()));
}

// ---- what the checker sees -----------------------------------------------------------

#[tokio::test(start_paused = true)]
async fn memory_may_go_and_disks_may_not() {
    let scene = scene();
    sleep(10 * SECOND).await;
    scene.shut_down(&scene.a).await;
    sleep(10 * SECOND).await;
    for _ in 0..2 {
        scene.a.start(scene.id).await.unwrap();
    }
    sleep(10 * SECOND).await;
    scene.assert_sound("started again");
    assert_eq!(scene.a.presence(scene.id).await, Ok(RUNNING));
    scene.a.stop(scene.id).await.unwrap();
    scene.fabric.with(|world, _| {
        let file = world.storage.file_mut(scene.a.host(), DISK).unwrap();
        file.content = super::Content::Empty;
    });
    scene.a.start(scene.id).await.unwrap();
    assert!(scene.found().contains("never copied"), "{}", scene.found());
}

#[tokio::test(start_paused = true)]
async fn a_cold_move_keeps_every_promise() {
    let scene = scene();
    sleep(10 * SECOND).await;
    scene.move_cold().await;
    sleep(10 * SECOND).await;
    scene.assert_sound("moved");
    assert_eq!(scene.b.presence(scene.id).await, Ok(RUNNING));
    assert_eq!(scene.a.presence(scene.id).await, Ok(Presence::Absent));
    assert_eq!(scene.fabric.leftovers().len(), 1, "the kept disk");
    scene.a.remove_disk(&kept()).await.unwrap();
    assert_eq!(scene.fabric.leftovers(), Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn an_old_disk_is_found_unless_somebody_agreed_to_it() {
    for agreed in [false, true] {
        let scene = scene();
        sleep(10 * SECOND).await;
        scene.move_cold().await;
        sleep(10 * SECOND).await;
        if agreed {
            scene.fabric.accept_older_disks(scene.id);
        }
        scene.take_back().await;
        if agreed {
            scene.assert_sound("it was agreed to");
            // Once.
            scene.a.stop(scene.id).await.unwrap();
            scene.a.start(scene.id).await.unwrap();
            scene.assert_sound("and goes on from there");
        } else {
            assert!(scene.found().contains("last written"), "{}", scene.found());
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_second_copy_is_found() {
    let scene = scene_with(|g| g);
    let definition = scene.a.definition(scene.id).await.unwrap().unwrap();
    let over = scene.a.define(&definition, None).await;
    assert!(matches!(over, Err(HypervisorError::WrongState(_))));
    scene.b.define(&definition, None).await.unwrap();
    scene.assert_sound("a definition is no copy");
    assert_eq!(scene.fabric.leftovers().len(), 1);
    scene.b.start(scene.id).await.unwrap();
    let found = scene.fabric.violations();
    let two = |v: &Violation| matches!(v, Violation::TwoRunning { .. });
    assert!(found.iter().any(two), "{found:?}");
}

#[tokio::test(start_paused = true)]
async fn lost_firmware_variables_are_found() {
    let scene = scene_with(|g| g.nvram(NVRAM));
    let guest = scene.a.lasting_guest(scene.id).await.unwrap().unwrap();
    assert_eq!(guest.files.len(), 1);
    scene.shut_down(&scene.a).await;
    let refused = scene.a.remove_disk(NVRAM).await;
    assert!(matches!(refused, Err(HypervisorError::WrongState(_))));
    let definition = scene.a.definition(scene.id).await.unwrap().unwrap();
    scene.a.withdraw(scene.id).await.unwrap();
    scene.b.define(&definition, None).await.unwrap();
    let guest = scene.b.lasting_guest(scene.id).await.unwrap().unwrap();
    assert_eq!(guest.files, [], "they are not here");
    scene.b.start(scene.id).await.unwrap();
    assert!(scene.found().contains("is gone"), "{}", scene.found());
}

#[tokio::test(start_paused = true)]
async fn what_was_left_open_or_reserved_is_left_over() {
    let scene = scene();
    let key = Uuid::new_v4();
    let path = "/var/lib/libvirt/images/new.qcow2";
    scene.b.reserve_file(path, false).await.unwrap();
    let file = Incoming {
        path: path.to_owned(),
        present: false,
    };
    scene.b.receive(key, TOKEN, &[file]).await.unwrap();
    assert_eq!(scene.fabric.receiving("kvm2"), [key]);
    assert_eq!(scene.fabric.leftovers().len(), 2);
    scene.b.stop_receiving(key).await;
    scene.b.remove_disk(path).await.unwrap();
    assert_eq!(scene.fabric.leftovers(), Vec::<String>::new());
}

// ---- definitions and facts -----------------------------------------------------------

#[tokio::test(start_paused = true)]
async fn a_definition_of_another_size_is_another_size() {
    let scene = scene_with(|g| {
        g.disk(DISK, 1)
            .snapshot("s1")
            .tpm()
            .state(PowerState::Shutdown)
    });
    let definition = scene.a.definition(scene.id).await.unwrap().unwrap();
    assert_eq!(definition.current_snapshot.as_deref(), Some("s1"));
    let flavor = Flavor {
        vcpus: 4,
        memory_mb: 2048,
    };
    scene.a.define(&definition, Some(flavor)).await.unwrap();
    let guest = scene.a.lasting_guest(scene.id).await.unwrap().unwrap();
    assert_eq!((guest.vcpus, guest.memory_mib), (4, 2048));
    assert_eq!(guest.snapshots, ["s1"]);
    assert!(
        guest.has_emulated_tpm() && guest.files.len() == 1,
        "{guest:?}"
    );
    scene
        .fabric
        .edit_node("kvm1", |node| node.memory_mib = 1024);
    let started = scene.a.start(scene.id).await;
    assert!(
        matches!(started, Err(HypervisorError::Failed(_))),
        "{started:?}"
    );
    assert_eq!(scene.a.presence(scene.id).await, Ok(OFF));
}

#[tokio::test(start_paused = true)]
async fn what_lies_under_a_disk_and_is_not_there_is_an_obstacle() {
    let base = "/var/lib/libvirt/images/base.qcow2";
    let scene = scene_with(|g| g.disk(DISK, 1).backing_mib(base, 7));
    let guest = scene.a.lasting_guest(scene.id).await.unwrap().unwrap();
    assert_eq!(guest.disks[0].backing[0].allocated_bytes, 7 << 20);
    assert_eq!(guest.immovable, []);
    scene
        .fabric
        .remove_directory("kvm1", "/var/lib/libvirt/images");
    let guest = scene.a.lasting_guest(scene.id).await.unwrap().unwrap();
    assert_eq!(guest.immovable.len(), 2, "{:?}", guest.immovable);
    assert!(
        guest
            .immovable
            .iter()
            .all(|i| i.kind == ImmovableKind::Disk)
    );
}

#[tokio::test(start_paused = true)]
async fn files_of_the_machine_are_files_too() {
    let scene = scene();
    let place = tempfile::tempdir().unwrap();
    let at = |name: &str| place.path().join(name).display().to_string();
    scene.a.reserve_file(&at("d/x"), true).await.unwrap();
    let again = scene.a.reserve_file(&at("d/x"), true).await;
    assert!(matches!(again, Err(HypervisorError::Exists(_))));
    for _ in 0..2 {
        scene.a.rename_file(&at("d/x"), &at("d/y")).await.unwrap();
    }
    scene.a.flush_file(&at("d/y")).await.unwrap();
    assert!(scene.a.flush_file(&at("d/x")).await.is_err());
    let facts = scene.b.file_facts(&[at("d/y"), at("e/y")]).await.unwrap();
    assert!(facts[0].exists && facts[0].directory_exists);
    assert!(!facts[1].exists && !facts[1].directory_exists);
    scene.a.remove_disk(&at("d/y")).await.unwrap();
    assert!(!place.path().join("d/y").exists());
}

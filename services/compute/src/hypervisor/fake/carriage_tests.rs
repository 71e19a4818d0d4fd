//! Files on their way: that they take their time, and that every obstacle on the
//! road does what it says.

use std::time::Duration;

use drover_model::{guest::PowerState, ids::InstanceId};
use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{
    super::{ColdDriver, Hypervisor, Incoming, SendError, SendSpec, Sent},
    Content, End, Fabric, FakeDriver, Fault, GuestBuilder, NodeSpec,
};

pub(super) const TOKEN: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";
const DISK: &str = "/var/lib/libvirt/images/web.qcow2";
const KEY: Uuid = Uuid::from_u128(7);
const MIB: u64 = 1 << 20;
const SECOND: Duration = Duration::from_secs(1);

pub(super) async fn send(driver: &FakeDriver, spec: SendSpec) -> Result<Sent, SendError> {
    let (shown, _) = watch::channel(Sent::default());
    driver.send(spec, shown, CancellationToken::new()).await
}

struct Scene {
    fabric: Fabric,
    a: FakeDriver,
    b: FakeDriver,
    id: InstanceId,
}

/// A guest that is off, 1000 MiB of disk, 100 MiB/s of link, and b expects it.
async fn scene() -> Scene {
    let scene = closed(|guest| guest.state(PowerState::Shutdown));
    scene.b.reserve_file(DISK, false).await.unwrap();
    scene.open(&scene.b, false).await;
    scene
}

fn closed(change: impl FnOnce(GuestBuilder) -> GuestBuilder) -> Scene {
    let fabric = Fabric::new(7);
    let a = fabric.add_node("kvm1", NodeSpec::default());
    let b = fabric.add_node("kvm2", NodeSpec::default());
    fabric.set_link_mib_s("kvm1", "kvm2", 100);
    let guest = change(GuestBuilder::new("web").disk(DISK, 1000));
    let id = fabric.add_guest("kvm1", guest);
    Scene { fabric, a, b, id }
}

impl Scene {
    async fn open(&self, driver: &FakeDriver, present: bool) {
        let file = Incoming {
            path: DISK.to_owned(),
            present,
        };
        driver.receive(KEY, TOKEN, &[file]).await.unwrap();
    }

    fn spec(&self) -> SendSpec {
        SendSpec {
            key: KEY,
            token: TOKEN.to_owned(),
            address: self.fabric.endpoint("kvm2").address,
            port: 49215,
            files: vec![DISK.to_owned()],
            resume: true,
            bandwidth_bytes_s: None,
            progress_timeout: 30 * SECOND,
        }
    }

    fn set_off(&self) -> (JoinHandle<Result<Sent, SendError>>, watch::Receiver<Sent>) {
        let (a, spec) = (self.a.clone(), self.spec());
        let (shown, view) = watch::channel(Sent::default());
        let cancel = CancellationToken::new();
        let sending = tokio::spawn(async move { a.send(spec, shown, cancel).await });
        (sending, view)
    }

    fn same_on_both(&self) -> bool {
        let content = |node| self.fabric.file(node, DISK).map(|f| f.content);
        content("kvm1").is_some() && content("kvm1") == content("kvm2")
    }
}

fn words<T: std::fmt::Debug>(result: Result<T, SendError>) -> String {
    match result {
        Err(SendError::Failed(words)) => words,
        other => panic!("Failed expected, got {other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn files_take_the_time_that_their_bytes_take() {
    let scene = scene().await;
    let begun = Instant::now();
    let (sending, view) = scene.set_off();
    sleep(5 * SECOND).await;
    let half = view.borrow().done_bytes;
    assert!((480 * MIB..=500 * MIB).contains(&half), "{half}");
    let file = scene.fabric.file("kvm2", DISK).unwrap();
    assert!(matches!(file.content, Content::Partial { .. }), "{file:?}");
    let sent = sending.await.unwrap().unwrap();
    let took = begun.elapsed().as_millis();
    assert!((10_000..10_010).contains(&took), "{took} ms");
    let expected = Sent {
        total_bytes: 1000 * MIB,
        done_bytes: 1000 * MIB,
        ..Sent::default()
    };
    assert_eq!((sent, *view.borrow()), (expected, expected));
    assert!(scene.same_on_both());
}

#[tokio::test(start_paused = true)]
async fn a_limit_is_kept() {
    let scene = scene().await;
    let begun = Instant::now();
    let spec = SendSpec {
        bandwidth_bytes_s: Some(10 * MIB),
        ..scene.spec()
    };
    send(&scene.a, spec).await.unwrap();
    assert_eq!(begun.elapsed().as_secs(), 100);
}

#[tokio::test(start_paused = true)]
async fn a_link_that_is_mended_in_time_costs_time_and_a_connection() {
    let scene = scene().await;
    let begun = Instant::now();
    scene.fabric.on_send("kvm1", 50, Fault::CutLink);
    let (sending, view) = scene.set_off();
    sleep(20 * SECOND).await;
    assert_eq!(view.borrow().done_bytes, 500 * MIB);
    scene.fabric.mend_link("kvm1", "kvm2");
    let sent = sending.await.unwrap().unwrap();
    assert_eq!((sent.reconnects, sent.reused_bytes), (1, 0));
    assert_eq!(begun.elapsed().as_secs(), 25);
    assert!(scene.same_on_both());
}

#[tokio::test(start_paused = true)]
async fn a_link_that_stays_cut_is_a_stall_and_can_be_taken_up() {
    let scene = scene().await;
    scene.fabric.on_send("kvm1", 50, Fault::CutLink);
    let begun = Instant::now();
    let ended = send(&scene.a, scene.spec()).await;
    assert!(matches!(ended, Err(SendError::Stalled(_))), "{ended:?}");
    assert_eq!(begun.elapsed().as_secs(), 35);
    scene.fabric.mend_link("kvm1", "kvm2");
    let sent = send(&scene.a, scene.spec()).await.unwrap();
    assert_eq!(sent.reused_bytes, 500 * MIB);
    assert!(scene.same_on_both());
}

#[tokio::test(start_paused = true)]
async fn what_is_not_to_be_resumed_begins_anew() {
    let scene = scene().await;
    scene
        .fabric
        .on_send("kvm1", 50, Fault::Fail("by script".to_owned()));
    assert_eq!(words(send(&scene.a, scene.spec()).await), "by script");
    let spec = SendSpec {
        resume: false,
        ..scene.spec()
    };
    assert_eq!(send(&scene.a, spec).await.unwrap().reused_bytes, 0);
}

#[tokio::test(start_paused = true)]
async fn a_stall_lasts_until_it_may_go_on() {
    let scene = scene().await;
    scene.fabric.on_send("kvm1", 10, Fault::Stall);
    let (sending, view) = scene.set_off();
    sleep(20 * SECOND).await;
    assert_eq!(view.borrow().done_bytes, 100 * MIB);
    scene.fabric.unstall_sends("kvm1");
    assert_eq!(sending.await.unwrap().unwrap().reconnects, 0);
}

#[tokio::test(start_paused = true)]
async fn a_destination_without_power_is_waited_for() {
    let scene = scene().await;
    let off = Fault::PowerOff(End::Destination);
    scene.fabric.on_send("kvm1", 50, off);
    let (sending, _view) = scene.set_off();
    sleep(10 * SECOND).await;
    scene.fabric.power_on("kvm2");
    sleep(10 * SECOND).await;
    assert!(!sending.is_finished(), "its agent has not been started");
    scene.open(&scene.fabric.driver("kvm2"), false).await;
    sleep(SECOND).await;
    let ended = sending.await.unwrap();
    assert!(
        matches!(ended, Err(SendError::Stalled(_))),
        "its driver went"
    );
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_dies_takes_in_no_more_until_it_is_asked_again() {
    let Scene { fabric, a, b, id } = scene().await;
    let (sending, view) = {
        let scene = Scene {
            fabric: fabric.clone(),
            a: a.clone(),
            b: b.clone(),
            id,
        };
        scene.set_off()
    };
    sleep(2 * SECOND).await;
    drop(b);
    assert!(fabric.receiving("kvm2").is_empty());
    sleep(5 * SECOND).await;
    let stands = view.borrow().done_bytes;
    sleep(5 * SECOND).await;
    assert_eq!(view.borrow().done_bytes, stands);
    let b = fabric.driver("kvm2");
    b.disk_port().unwrap();
    sleep(2 * SECOND).await;
    assert!(!sending.is_finished(), "it is asked to later");
    let scene = Scene { fabric, a, b, id };
    scene.open(&scene.b, false).await;
    let sent = sending.await.unwrap().unwrap();
    assert_eq!(sent.reconnects, 1);
    assert!(scene.same_on_both());
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_dies_sends_no_more() {
    let scene = scene().await;
    let (sending, _view) = scene.set_off();
    sleep(2 * SECOND).await;
    sending.abort();
    sleep(SECOND).await;
    let stands = scene.fabric.file("kvm2", DISK).unwrap();
    sleep(5 * SECOND).await;
    assert_eq!(scene.fabric.file("kvm2", DISK).unwrap(), stands);
}

#[tokio::test(start_paused = true)]
async fn nothing_is_written_once_it_is_no_longer_taken_in() {
    let scene = scene().await;
    let (sending, _view) = scene.set_off();
    sleep(2 * SECOND).await;
    scene.b.stop_receiving(KEY).await;
    scene.b.remove_disk(DISK).await.unwrap();
    let ended = sending.await.unwrap();
    assert!(matches!(ended, Err(SendError::Stalled(_))), "{ended:?}");
    assert_eq!(scene.fabric.file("kvm2", DISK), None);
}

#[tokio::test(start_paused = true)]
async fn a_stranger_is_refused_at_once() {
    let scene = scene().await;
    let begun = Instant::now();
    let token = TOKEN.replace('0', "1");
    let spec = SendSpec {
        token: token.clone(),
        ..scene.spec()
    };
    assert!(words(send(&scene.a, spec).await).contains("refused"));
    assert!(begun.elapsed() < SECOND);
    let file = Incoming {
        path: DISK.to_owned(),
        present: false,
    };
    scene.open(&scene.b, false).await;
    assert!(
        scene
            .b
            .receive(KEY, &token, std::slice::from_ref(&file))
            .await
            .is_err()
    );
    assert!(scene.b.receive(KEY, "short", &[file]).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn a_full_disk_ends_it() {
    let scene = scene().await;
    scene.fabric.set_disk_bytes("kvm2", "/var/lib", 300 * MIB);
    let words = words(send(&scene.a, scene.spec()).await);
    assert!(words.contains("No space left on device"), "{words}");
}

#[tokio::test(start_paused = true)]
async fn what_is_there_is_compared_and_never_written() {
    let scene = closed(|guest| guest.state(PowerState::Shutdown));
    scene.fabric.write_file("kvm2", DISK, "another").unwrap();
    scene.open(&scene.b, true).await;
    let told = words(send(&scene.a, scene.spec()).await);
    assert!(told.contains("not the same"), "{told}");
    let kept = scene.fabric.file("kvm2", DISK).unwrap();
    assert_eq!(kept.content, Content::Text("another".to_owned()));
    let same = scene.fabric.file("kvm1", DISK).unwrap();
    let host = scene.b.host();
    scene.fabric.with(|world, _| {
        *world.storage.file_mut(host, DISK).unwrap() = same;
    });
    let sent = send(&scene.a, scene.spec()).await.unwrap();
    assert_eq!(sent.reused_bytes, sent.total_bytes);
}

#[tokio::test(start_paused = true)]
async fn a_disk_that_is_written_meanwhile_is_told() {
    let scene = closed(|guest| guest);
    scene.open(&scene.b, false).await;
    let told = words(send(&scene.a, scene.spec()).await);
    assert!(told.contains("was changed while it was sent"), "{told}");
    scene.a.stop(scene.id).await.unwrap();
    let sent = send(&scene.a, scene.spec()).await.unwrap();
    let again = sent.total_bytes - sent.reused_bytes;
    assert!(
        (9 * MIB..11 * MIB).contains(&again),
        "{again} bytes had changed"
    );
    assert!(scene.same_on_both());
}

#[tokio::test(start_paused = true)]
async fn a_cancelled_one_ends_at_once_and_can_be_taken_up() {
    let scene = scene().await;
    let cancel = CancellationToken::new();
    let (shown, view) = watch::channel(Sent::default());
    let sending = scene.a.send(scene.spec(), shown, cancel.clone());
    let stop = async {
        sleep(5 * SECOND).await;
        cancel.cancel();
    };
    let (ended, ()) = tokio::join!(sending, stop);
    assert_eq!(ended, Err(SendError::Cancelled));
    let done = view.borrow().done_bytes;
    let sent = send(&scene.a, scene.spec()).await.unwrap();
    assert_eq!(sent.reused_bytes, done);
}

#[tokio::test(start_paused = true)]
async fn a_device_must_be_there_and_long_enough() {
    let device = "/dev/vg/web";
    let scene = closed(|guest| guest.state(PowerState::Shutdown));
    let spec = |key| SendSpec {
        key,
        ..scene.spec()
    };
    let cases = [
        (1, 0, "No such file"),
        (2, 1000, "are needed"),
        (3, 2000 * MIB, ""),
    ];
    for (number, length, told) in cases {
        let key = Uuid::from_u128(number);
        let path = format!("{device}{number}");
        if length > 0 {
            scene.fabric.add_device("kvm2", &path, length);
        }
        let present = false;
        scene
            .b
            .receive(key, TOKEN, &[Incoming { path, present }])
            .await
            .unwrap();
        let ended = send(&scene.a, spec(key)).await;
        assert_eq!(ended.is_ok(), told.is_empty(), "{ended:?}");
        if let Err(error) = ended {
            assert!(error.to_string().contains(told), "{error}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn files_of_the_machine_are_carried_as_bytes() {
    let scene = closed(|guest| guest);
    let place = tempfile::tempdir().unwrap();
    let at = |name: &str| place.path().join(name).display().to_string();
    std::fs::write(at("a"), "a definition").unwrap();
    let path = at("b");
    let present = false;
    scene
        .b
        .receive(KEY, TOKEN, &[Incoming { path, present }])
        .await
        .unwrap();
    let spec = SendSpec {
        files: vec![at("a")],
        ..scene.spec()
    };
    let sent = send(&scene.a, spec).await.unwrap();
    assert_eq!(sent.done_bytes, 12);
    assert_eq!(std::fs::read_to_string(at("b")).unwrap(), "a definition");
}

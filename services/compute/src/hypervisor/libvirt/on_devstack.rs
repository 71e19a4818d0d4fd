//! What only a real libvirtd shows: killed, frozen, killed in mid-migration,
//! images copied over a chain, and guests that change hands. Runs on the devstack whose directory is in
//! `DROVER_DEVSTACK`; without one it says `SKIPPED`, and fails if
//! `DROVER_REQUIRE_REAL=1`.

mod transfer;

use std::{
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, MutexGuard, PoisonError},
};

use drover_model::{
    guest::{BackingImage, DiskSource, PowerState},
    migration::LiveOptions,
};
use uuid::Uuid;

use super::*;
use crate::hypervisor::ColdDriver;

/// These take nodes' libvirtd away, so one at a time.
static ALONE: Mutex<()> = Mutex::new(());
const FROM: &str = "kvm1";
const TO: &str = "kvm2";

struct Stack {
    commands: PathBuf,
    run: PathBuf,
    state: PathBuf,
    shared: PathBuf,
    _alone: MutexGuard<'static, ()>,
}

impl Stack {
    fn find() -> Option<Self> {
        let Some(commands) = std::env::var_os("DROVER_DEVSTACK").map(PathBuf::from) else {
            let required = std::env::var("DROVER_REQUIRE_REAL").is_ok_and(|v| v == "1");
            assert!(
                !required,
                "DROVER_REQUIRE_REAL is 1 and there is no devstack"
            );
            println!("SKIPPED: DROVER_DEVSTACK names no devstack");
            return None;
        };
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let text = output(&mut Command::new(commands.join("env")));
        let value = |name: &str| {
            let prefix = format!("export {name}=");
            let line = text.lines().find_map(|l| l.strip_prefix(&prefix));
            PathBuf::from(line.unwrap_or_else(|| panic!("devstack/env tells no {name}")))
        };
        Some(Self {
            run: value("DROVER_DEVSTACK_RUN"),
            state: value("DROVER_DEVSTACK_STATE"),
            shared: value("DROVER_SHARED"),
            commands,
            _alone: alone,
        })
    }

    fn uri(&self, node: &str) -> String {
        let socket = self.run.join(node).join("run/libvirt/libvirt-sock");
        format!("qemu:///system?socket={}", socket.display())
    }

    fn driver(&self, node: &str) -> Arc<LibvirtDriver> {
        let settings = LibvirtSettings {
            libvirt_uri: self.uri(node),
            call_timeout_s: 5,
            keepalive_interval_s: 1,
            keepalive_count: 2,
            reconnect_max_ms: 500,
            image_paths: vec![self.shared.display().to_string()],
            ..LibvirtSettings::default()
        };
        LibvirtDriver::start(settings).unwrap()
    }

    fn libvirtd(&self, node: &str, action: &str) -> String {
        let mut command = Command::new(self.commands.join("service"));
        output(command.args([node, "libvirtd", action]))
    }

    /// Kills a node's libvirtd until the guard goes.
    fn kill(&self, node: &'static str) -> Down<'_> {
        self.libvirtd(node, "kill");
        Down(self, node)
    }

    /// Freezes a node's libvirtd until the guard goes.
    fn freeze(&self, node: &'static str) -> Frozen<'_> {
        self.signal(node, "-STOP");
        Frozen(self, node)
    }

    fn signal(&self, node: &str, signal: &str) {
        let pid = self.libvirtd(node, "pid");
        output(Command::new("kill").args([signal, pid.trim()]));
    }

    fn virsh(&self, node: &str, arguments: &[&str]) -> String {
        let mut command = Command::new("virsh");
        output(command.args(["-q", "-c", &self.uri(node)]).args(arguments))
    }

    /// A node's private file, as it is seen from outside.
    fn private(&self, node: &str, path: &str) -> PathBuf {
        self.state.join(node).join(path.trim_start_matches('/'))
    }
}

struct Down<'a>(&'a Stack, &'static str);

impl Drop for Down<'_> {
    fn drop(&mut self) {
        self.0.libvirtd(self.1, "start");
    }
}

struct Frozen<'a>(&'a Stack, &'static str);

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        self.0.signal(self.1, "-CONT");
    }
}

fn output(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {words}");
    String::from_utf8(output.stdout).unwrap()
}

fn qemu_img(arguments: &[&str]) -> String {
    output(Command::new("qemu-img").args(arguments))
}

/// A guest without a system, running on [`FROM`], with the given disk.
struct Subject<'a> {
    stack: &'a Stack,
    id: InstanceId,
    disk: String,
}

impl<'a> Subject<'a> {
    /// Its disk lies on the node; `make` gets its path as seen from outside.
    fn new(stack: &'a Stack, make: impl FnOnce(&Path)) -> Self {
        Self::with_metadata(stack, make, "")
    }

    fn with_metadata(stack: &'a Stack, make: impl FnOnce(&Path), metadata: &str) -> Self {
        let id = InstanceId(Uuid::new_v4());
        let disk = format!("/var/lib/libvirt/images/real-{id}.qcow2");
        make(&stack.private(FROM, &disk));
        let xml = format!(
            "<domain type='qemu'><name>real-{id}</name><uuid>{id}</uuid>
             <metadata>{metadata}</metadata><memory unit='MiB'>32</memory><vcpu>1</vcpu>
             <os><type arch='x86_64' machine='pc'>hvm</type></os>
             <devices><disk type='file' device='disk'>
               <driver name='qemu' type='qcow2' cache='none'/><source file='{disk}'/>
               <target dev='vda' bus='virtio'/></disk></devices></domain>"
        );
        let file = stack.shared.join(format!("{id}.xml"));
        std::fs::write(&file, xml).unwrap();
        stack.virsh(FROM, &["define", &file.to_string_lossy()]);
        std::fs::remove_file(&file).unwrap();
        stack.virsh(FROM, &["start", &id.to_string()]);
        Self { stack, id, disk }
    }

    fn spec(&self, bandwidth_mib_s: Option<u64>) -> MigrateSpec {
        MigrateSpec {
            instance: self.id,
            dest_libvirt_uri: format!("qemu+tcp://{TO}/system"),
            dest_address: TO.to_owned(),
            copied_disks: vec!["vda".to_owned()],
            shared_disks: Vec::new(),
            initial_downtime_ms: Some(123),
            options: LiveOptions {
                bandwidth_mib_s,
                ..LiveOptions::default()
            },
        }
    }
}

impl Drop for Subject<'_> {
    fn drop(&mut self) {
        for node in [FROM, TO] {
            for act in ["destroy", "undefine"] {
                let mut virsh = Command::new("virsh");
                let uri = self.stack.uri(node);
                // Where it is not, there is nothing to do.
                let _ = virsh
                    .args(["-q", "-c", &uri, act, &self.id.to_string()])
                    .output();
            }
            let _ = std::fs::remove_file(self.stack.private(node, &self.disk));
        }
    }
}

async fn until<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    for _ in 0..400 {
        if let Some(found) = look().await {
            return found;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("never seen: {what}");
}

async fn connection(events: &mut broadcast::Receiver<Event>, wanted: bool) {
    let seen = async {
        while !matches!(events.recv().await, Ok(Event::Connection { up }) if up == wanted) {}
    };
    let seen = tokio::time::timeout(Duration::from_secs(20), seen).await;
    seen.unwrap_or_else(|_| panic!("never told that up is {wanted}"));
}

fn is_unreachable<T>(result: Result<T>) -> bool {
    matches!(result, Err(HypervisorError::Unreachable { .. }))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_libvirtd_is_told_and_found_again() {
    let Some(stack) = Stack::find() else { return };
    let driver = stack.driver(FROM);
    let before = driver.guests().await.unwrap();
    let mut events = driver.events();
    for _ in 0..2 {
        let down = stack.kill(FROM);
        connection(&mut events, false).await;
        assert!(is_unreachable(driver.guests().await));
        assert!(is_unreachable(
            driver.presence(InstanceId(Uuid::nil())).await
        ));
        drop(down);
        connection(&mut events, true).await;
    }
    assert_eq!(driver.guests().await.unwrap().len(), before.len());
}

/// What somebody wrote into one guest's metadata costs its node nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_cannot_be_read_hides_no_other() {
    let Some(stack) = Stack::find() else { return };
    let sane = Subject::new(&stack, |path| random_image(path, &[]));
    let (open, close) = ("<d>".repeat(70), "</d>".repeat(70));
    let metadata = format!("<x:deep xmlns:x='urn:deep'>{open}{close}</x:deep>");
    let image = |path: &Path| random_image(path, &[]);
    let deep = Subject::with_metadata(&stack, image, &metadata);
    let listed = stack.driver(FROM).guests().await.unwrap();
    let why = |id| {
        let found = listed.iter().find(|report| report.id == id);
        found.expect("it is listed").unreadable.clone()
    };
    assert_eq!(why(sane.id), None);
    assert!(why(deep.id).is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_libvirtd_hangs_nobody() {
    let Some(stack) = Stack::find() else { return };
    let driver = stack.driver(FROM);
    driver.inventory().await.unwrap();
    let mut events = driver.events();
    let frozen = stack.freeze(FROM);
    let begun = std::time::Instant::now();
    let answers = many_questions(&driver, 12).await;
    let took = begun.elapsed();
    connection(&mut events, false).await;
    // Longer than an attempt to connect may take: it must not pile up threads.
    tokio::time::sleep(Duration::from_secs(7)).await;
    let late = driver.guests().await;
    drop(frozen);
    connection(&mut events, true).await;
    assert!(answers.into_iter().all(is_unreachable));
    assert!(is_unreachable(late));
    assert!(took < Duration::from_secs(11), "{took:?}");
    driver.guests().await.unwrap();
}

async fn many_questions(
    driver: &Arc<LibvirtDriver>,
    count: usize,
) -> Vec<Result<Vec<InstanceReport>>> {
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..count {
        let driver = driver.clone();
        tasks.spawn(async move { driver.guests().await });
    }
    tasks.join_all().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_libvirtd_that_dies_under_a_migration_is_lost_not_failed() {
    let Some(stack) = Stack::find() else { return };
    let (from, to) = (stack.driver(FROM), stack.driver(TO));
    let subject = Subject::new(&stack, |path| random_image(path, &[]));
    let target = stack.private(TO, &subject.disk);
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        &target.to_string_lossy(),
        "16M",
    ]);
    let sender = from.clone();
    let spec = subject.spec(Some(1));
    let migration = tokio::spawn(async move { sender.migrate(spec).await });
    let id = subject.id;
    until("disks on their way", async || match from.job(id).await {
        Ok(Job::Migration(sample)) if sample.disk.processed_bytes > 0 => Some(()),
        _ => None,
    })
    .await;
    assert_eq!(to.presence(id).await, Ok(Presence::Incoming));
    assert_eq!(to.job(id).await, Ok(Job::Migration(JobSample::default())));
    assert!(
        to.guests()
            .await
            .unwrap()
            .iter()
            .any(|g| g.id == id && g.incoming)
    );
    let ours = from.guest(id).await.unwrap().unwrap();
    assert_eq!(ours.active_job.as_deref(), Some("migration"));
    let theirs = to.guest(id).await.unwrap().unwrap();
    assert_eq!(theirs.active_job.as_deref(), Some("incoming migration"));

    let down = stack.kill(FROM);
    let ended = migration.await.unwrap();
    assert!(matches!(ended, Err(HypervisorError::Lost(_))), "{ended:?}");
    drop(down);
    let running = Presence::Present(PowerState::Running);
    until("the guest running where it was", async || {
        (from.presence(id).await == Ok(running)).then_some(())
    })
    .await;
    until("the destination gave it up", async || {
        let _ = to.discard_incoming(id).await;
        (to.presence(id).await == Ok(Presence::Absent)).then_some(())
    })
    .await;
    assert!(is_wrong_state(from.discard_incoming(id).await));
    assert!(is_wrong_state(from.undefine(id).await));
}

fn is_wrong_state<T>(result: Result<T>) -> bool {
    matches!(result, Err(HypervisorError::WrongState(_)))
}

/// A qcow2 image of 16 MiB with 8 MiB of noise in it, over what `options` say.
fn random_image(path: &Path, options: &[&str]) {
    let path = path.to_string_lossy();
    let mut arguments = vec!["create", "-q", "-f", "qcow2"];
    arguments.extend(options);
    arguments.extend([&*path, "16M"]);
    qemu_img(&arguments);
    let noise = format!("{path}.noise");
    let mut content = vec![0_u8; 8 << 20];
    fastrand::fill(&mut content);
    std::fs::write(&noise, content).unwrap();
    let write = format!("write -q -s {noise} 1M 8M");
    output(Command::new("qemu-io").args(["-f", "qcow2", "-c", &write, &path]));
    std::fs::remove_file(noise).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_over_a_base_arrives_whole_and_thin() {
    let Some(stack) = Stack::find() else { return };
    let (from, to) = (stack.driver(FROM), stack.driver(TO));
    let base = stack.shared.join(format!("base-{}.raw", Uuid::new_v4()));
    let mut content = vec![0_u8; 16 << 20];
    fastrand::fill(&mut content);
    std::fs::write(&base, content).unwrap();
    let base_text = base.display().to_string();
    let over = ["-F", "raw", "-b", &base_text];
    let subject = Subject::new(&stack, |path| random_image(path, &over));

    let guest = from.guest(subject.id).await.unwrap().unwrap();
    let chain = [BackingImage {
        path: base_text.clone(),
        format: "raw".to_owned(),
        allocated_bytes: 0,
    }];
    assert_eq!(guest.disks[0].backing, chain);
    // The driver sees the machine's files and not its node's, hence the path.
    let target = stack.private(TO, &subject.disk).display().to_string();
    let mut disk = guest.disks[0].clone();
    disk.source = DiskSource::File {
        path: target.clone(),
    };
    disk.virtual_bytes = 16 << 20;
    to.reserve_file(&target, false).await.unwrap();
    let inode = std::fs::metadata(&target).unwrap().ino();
    to.create_disk(&disk, inode).await.unwrap();
    from.migrate(subject.spec(None)).await.unwrap();

    let running = Presence::Present(PowerState::Running);
    assert_eq!(to.presence(subject.id).await, Ok(running));
    let done = to.completed_job(subject.id).await.unwrap().unwrap();
    assert!(
        done.downtime_ms.is_some() && done.memory.total_bytes > 0,
        "{done:?}"
    );
    println!("{done:?}");
    let source = stack.private(FROM, &subject.disk).display().to_string();
    qemu_img(&["compare", "-q", "-U", &source, &target]);
    let sizes = storage::sizes::measure(Path::new(&target), "qcow2").unwrap();
    assert!(
        sizes.allocated_bytes < 12 << 20,
        "the base came along: {sizes:?}"
    );
    drop(subject);
    std::fs::remove_file(base).unwrap();
}

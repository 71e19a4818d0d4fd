//! libvirt's stage: two nodes of a running devstack, with guests that each
//! point defines for itself and that are gone when it ends, well or badly.
//!
//! Driver a reaches its libvirtd through a proxy, so that it can be cut off
//! without harm to what else runs there. The drivers see this process's files,
//! not their node's: what they do to files they do in the directory that all
//! nodes share under one path.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, Mutex},
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use async_trait::async_trait;
use drover_compute::hypervisor::{
    Hypervisor, MigrateSpec,
    libvirt::{LibvirtDriver, LibvirtSettings},
};
use drover_model::{
    METADATA_NAMESPACE,
    guest::{NicAttachment, PowerState, Presence},
    ids::InstanceId,
    migration::LiveOptions,
};
use tokio::{
    net::{UnixListener, UnixStream},
    task::JoinHandle,
    task::JoinSet,
};

use super::{MEMORY_MIB, Place, REDEFINED_VCPUS, Receiver, Stage, Wish, until};

/// Directory of the devstack's commands; without it there is no real libvirt.
const DEVSTACK: &str = "DROVER_DEVSTACK";
/// Set to `1`, it turns the absence of a devstack into a failure.
const REQUIRED: &str = "DROVER_REQUIRE_REAL";
/// Where a node keeps local disks, as the node sees it.
const IMAGES: &str = "/var/lib/libvirt/images";
/// Where a node has the kernel for guests.
const BOOT: &str = "/var/lib/libvirt/boot";
/// A node's bridge to the guests' network.
const BRIDGE: &str = "br-guests";
/// Longest time for any one command, seconds.
const COMMAND_S: &str = "30";
/// Size of the guests' disks.
const DISK_SIZE: &str = "16M";
/// What the guests' system says when it is up.
const UP: &[u8] = b"guestd: contract is up";
const NODES: [&str; 2] = ["kvm1", "kvm2"];

/// Runs a point of the contract on libvirt, or says that it cannot.
pub fn run(point: impl AsyncFn(&dyn Stage) -> Result<()>) {
    let Some(devstack) = std::env::var_os(DEVSTACK) else {
        let required = std::env::var(REQUIRED).is_ok_and(|value| value == "1");
        assert!(
            !required,
            "{REQUIRED} is 1, and {DEVSTACK} names no devstack"
        );
        println!("SKIPPED: {DEVSTACK} names no devstack, so libvirt is not held to this point");
        return;
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime for the test");
    let outcome = runtime.block_on(async {
        let stage = RealStage::new(Path::new(&devstack))?;
        point(&stage).await
    });
    if let Err(error) = outcome {
        panic!("the libvirt driver breaks the contract: {error:#}");
    }
}

/// Two nodes of the devstack.
pub struct RealStage {
    devstack: Devstack,
    /// This stage's own directory on the shared one.
    directory: PathBuf,
    proxy: Proxy,
    a: Arc<LibvirtDriver>,
    b: Arc<LibvirtDriver>,
    guests: Mutex<BTreeMap<InstanceId, Wish>>,
    receiver: Mutex<Option<Receiver>>,
}

impl RealStage {
    fn new(devstack: &Path) -> Result<Self> {
        let devstack = Devstack::find(devstack)?;
        let directory = devstack.shared.join(format!("contract-{}", short()));
        std::fs::create_dir(&directory)?;
        let proxy = Proxy::open(directory.join("a.sock"), devstack.socket(NODES[0]))?;
        Ok(Self {
            a: driver(proxy.path.clone(), &directory)?,
            b: driver(devstack.socket(NODES[1]), &directory)?,
            devstack,
            directory,
            proxy,
            guests: Mutex::default(),
            receiver: Mutex::default(),
        })
    }

    fn guests(&self) -> Result<std::sync::MutexGuard<'_, BTreeMap<InstanceId, Wish>>> {
        self.guests.lock().map_err(|_| anyhow!("a point panicked"))
    }

    fn wish(&self, id: InstanceId) -> Result<Wish> {
        Ok(self.guests()?.get(&id).copied().unwrap_or_default())
    }

    /// A guest's disk, as its nodes see it.
    fn disk_path(&self, id: InstanceId, place: Place) -> PathBuf {
        match place {
            Place::Shared => self.directory.join(format!("{id}.qcow2")),
            Place::Local => Path::new(IMAGES).join(format!("contract-{id}.qcow2")),
        }
    }

    /// The same, as the machine under the nodes sees it.
    fn host_path(&self, id: InstanceId, place: Place, node: &str) -> PathBuf {
        let path = self.disk_path(id, place);
        match place {
            Place::Shared => path,
            Place::Local => self.devstack.in_node(node, &path),
        }
    }

    /// What its system says, on the shared directory, so that it can go on there.
    fn console(&self, id: InstanceId) -> PathBuf {
        self.directory.join(format!("{id}.console"))
    }

    fn define(&self, id: InstanceId, wish: Wish) -> Result<()> {
        let xml = self.directory.join(format!("{id}.xml"));
        std::fs::write(&xml, self.definition(id, wish))?;
        if let Some(place) = wish.disk {
            self.make_disk(&self.host_path(id, place, NODES[0]), wish.data_mib)?;
        }
        let virsh = |arguments: &[&str]| self.devstack.virsh(NODES[0], arguments);
        let uuid = id.to_string();
        virsh(&["define", &xml.to_string_lossy()])?;
        match wish.state {
            PowerState::Shutdown => {}
            PowerState::Paused => virsh(&["start", "--paused", &uuid])?,
            _ => virsh(&["start", &uuid])?,
        }
        Ok(())
    }

    /// A disk with something in it that would be missed.
    fn make_disk(&self, path: &Path, data_mib: usize) -> Result<()> {
        let raw = path.with_extension("raw");
        let mut content = vec![0_u8; data_mib << 20];
        fastrand::fill(&mut content);
        std::fs::write(&raw, content)?;
        let (raw, path) = (raw.to_string_lossy(), path.to_string_lossy());
        run_command("qemu-img", &["resize", "-q", "-f", "raw", &raw, DISK_SIZE])?;
        let convert = ["convert", "-q", "-f", "raw", "-O", "qcow2", &raw, &path];
        let made = run_command("qemu-img", &convert);
        std::fs::remove_file(&*raw)?;
        made
    }

    fn definition(&self, id: InstanceId, wish: Wish) -> String {
        let disk = wish.disk.map_or_else(String::new, |place| {
            let path = self.disk_path(id, place);
            format!(
                "<disk type='file' device='disk'>\
                 <driver name='qemu' type='qcow2' cache='none'/>\
                 <source file='{}'/><target dev='vda' bus='virtio'/></disk>",
                path.display()
            )
        });
        let nic = match wish.nic {
            true => format!(
                "<interface type='bridge'><mac address='{}'/><source bridge='{BRIDGE}'/>\
                 <model type='virtio'/><rom enabled='no'/></interface>",
                mac_of(id)
            ),
            false => String::new(),
        };
        // Whoever needs no busy guest gets one without a system: it is there at once.
        let system = match wish.dirty_mib_s {
            0 if !wish.obeys => String::new(),
            rate => format!(
                "<kernel>{BOOT}/vmlinuz</kernel><initrd>{BOOT}/initrd</initrd>\
                 <cmdline>console=ttyS0 quiet panic=1 mitigations=off drover.name=contract \
                 drover.mem_mib=32 drover.dirty_mib_s={rate} drover.disk_hz=0</cmdline>"
            ),
        };
        let group = wish.group.map_or_else(String::new, |group| {
            format!("<drover:anti_affinity>{group}</drover:anti_affinity>")
        });
        let metadata = match (wish.priority, wish.group) {
            (0, None) => String::new(),
            (priority, _) => format!(
                "<metadata><drover:instance xmlns:drover='{METADATA_NAMESPACE}'>\
                 <drover:priority>{priority}</drover:priority>{group}\
                 </drover:instance></metadata>"
            ),
        };
        format!(
            "<domain type='qemu'><name>contract-{id}</name><uuid>{id}</uuid>{metadata}\
             <memory unit='MiB'>{MEMORY_MIB}</memory><vcpu>1</vcpu>\
             <os><type arch='x86_64' machine='pc'>hvm</type>{system}</os>\
             <features><acpi/></features>\
             <cpu mode='custom' match='exact'><model fallback='forbid'>qemu64</model></cpu>\
             <devices><emulator>/usr/bin/qemu-system-x86_64</emulator>{disk}{nic}\
             <controller type='usb' model='none'/><serial type='file'><source path='{}'/></serial>\
             <memballoon model='none'/></devices></domain>",
            self.console(id).display()
        )
    }

    /// What this stage's receiver has on a, if it is not there yet.
    fn receive(&self) -> Result<Receiver> {
        let mut receiver = self
            .receiver
            .lock()
            .map_err(|_| anyhow!("a point panicked"))?;
        if let Some(receiver) = &*receiver {
            return Ok(receiver.clone());
        }
        let (bridge, pool) = (format!("br-{}", short()), format!("contract-{}", short()));
        let directory = self.directory.join("receiver");
        std::fs::create_dir(&directory)?;
        let directory = directory.to_string_lossy().into_owned();
        let made = Receiver {
            bridge: NicAttachment::Bridge {
                bridge: bridge.clone(),
            },
            directories: vec![directory.clone()],
            pool: pool.clone(),
        };
        // Before it exists, so that all of it is cleared.
        *receiver = Some(made.clone());
        let link = |arguments: &[&str]| self.devstack.on(NODES[0], arguments);
        link(&["ip", "link", "add", &bridge, "type", "bridge"])?;
        link(&["ip", "link", "set", &bridge, "up"])?;
        let create = ["pool-create-as", &pool, "dir", "--target", &directory];
        self.devstack.virsh(NODES[0], &create)?;
        Ok(made)
    }

    fn clear_receiver(&self) {
        let Ok(Some(receiver)) = self.receiver.lock().map(|r| r.clone()) else {
            return;
        };
        // What is not there cannot be removed, and need not be.
        let pool = ["pool-destroy", &receiver.pool];
        let _ = self.devstack.virsh(NODES[0], &pool);
        if let NicAttachment::Bridge { bridge } = &receiver.bridge {
            let remove = ["ip", "link", "delete", bridge];
            let _ = self.devstack.on(NODES[0], &remove);
        }
    }

    fn clear(&self) {
        let Ok(guests) = self.guests.lock() else {
            return;
        };
        for (id, wish) in guests.iter() {
            for node in NODES {
                let uuid = id.to_string();
                // What is not there cannot be removed, and need not be.
                let _ = self.devstack.virsh(node, &["destroy", &uuid]);
                let _ = self.devstack.virsh(node, &["undefine", &uuid]);
                if let Some(place) = wish.disk {
                    let _ = std::fs::remove_file(self.host_path(*id, place, node));
                }
            }
        }
        self.clear_receiver();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// A guest's MAC address: of QEMU's range, and its own.
fn mac_of(id: InstanceId) -> String {
    let [.., a, b, c] = id.0.into_bytes();
    format!("52:54:00:{a:02x}:{b:02x}:{c:02x}")
}

impl Drop for RealStage {
    fn drop(&mut self) {
        self.clear();
    }
}

fn driver(socket: PathBuf, directory: &Path) -> Result<Arc<LibvirtDriver>> {
    let settings = LibvirtSettings {
        libvirt_uri: format!("qemu:///system?socket={}", socket.display()),
        instances_path: directory.to_string_lossy().into_owned(),
        // Two drivers in one process take two ports.
        disk_port: 0,
        reconnect_max_ms: 500,
        ..LibvirtSettings::default()
    };
    Ok(LibvirtDriver::start(settings)?)
}

#[async_trait(?Send)]
impl Stage for RealStage {
    fn a(&self) -> Arc<dyn Hypervisor> {
        self.a.clone()
    }

    fn b(&self) -> Arc<dyn Hypervisor> {
        self.b.clone()
    }

    async fn guest(&self, wish: Wish) -> Result<InstanceId> {
        let id = super::nobody();
        // Before anything of it exists, so that all of it is cleared.
        self.guests()?.insert(id, wish);
        tokio::task::block_in_place(|| self.define(id, wish))?;
        until("the guest is as wished", async || {
            let wanted = Presence::Present(wish.state);
            Ok((self.a.presence(id).await? == wanted).then_some(()))
        })
        .await?;
        if wish.dirty_mib_s > 0 || wish.obeys {
            // Its system says when it has begun to write, and listens.
            until("the guest's system is up", async || {
                let said = std::fs::read(self.console(id)).unwrap_or_default();
                Ok(said.windows(UP.len()).any(|w| w == UP).then_some(()))
            })
            .await?;
        }
        Ok(id)
    }

    async fn way(&self, id: InstanceId) -> Result<MigrateSpec> {
        let place = self.wish(id)?.disk;
        let disk = || vec!["vda".to_owned()];
        if place == Some(Place::Local) {
            let path = self.host_path(id, Place::Local, NODES[1]);
            let path = path.to_string_lossy();
            run_command(
                "qemu-img",
                &["create", "-q", "-f", "qcow2", &path, DISK_SIZE],
            )?;
        }
        Ok(MigrateSpec {
            instance: id,
            dest_libvirt_uri: format!("qemu+tcp://{}/system", NODES[1]),
            dest_address: NODES[1].to_owned(),
            copied_disks: if place == Some(Place::Local) {
                disk()
            } else {
                Vec::new()
            },
            shared_disks: if place == Some(Place::Shared) {
                disk()
            } else {
                Vec::new()
            },
            initial_downtime_ms: None,
            options: LiveOptions::default(),
        })
    }

    async fn verify(&self, id: InstanceId) -> Result<()> {
        let Some(place @ Place::Local) = self.wish(id)?.disk else {
            return Ok(());
        };
        let [from, to] = NODES.map(|node| self.host_path(id, place, node));
        // The guest never writes, so that its old disk is what its new one must be.
        let (from, to) = (from.to_string_lossy(), to.to_string_lossy());
        run_command("qemu-img", &["compare", "-q", "-U", &from, &to])
            .context("the copied disk differs from the original")
    }

    async fn cut_off_a(&self) -> Result<()> {
        self.proxy.close().await;
        Ok(())
    }

    async fn reconnect_a(&self) -> Result<()> {
        self.proxy.reopen()
    }

    fn shared_directory(&self) -> String {
        self.directory.to_string_lossy().into_owned()
    }

    fn local_directory(&self) -> Option<String> {
        None
    }

    async fn write(&self, path: &str, text: &str) -> Result<()> {
        Ok(std::fs::write(path, text)?)
    }

    async fn change(&self, path: &str) -> Result<()> {
        use std::io::Write;
        let mut file = std::fs::OpenOptions::new().write(true).open(path)?;
        Ok(file.write_all(b"changed!")?)
    }

    async fn same(&self, on_a: &str, on_b: &str) -> Result<bool> {
        Ok(std::fs::read(on_a)? == std::fs::read(on_b)?)
    }

    async fn fingerprint(&self, path: &str) -> Result<Option<String>> {
        use std::os::unix::fs::MetadataExt;
        let Ok(meta) = std::fs::symlink_metadata(path) else {
            return Ok(None);
        };
        let content = std::fs::read(path)?;
        let changed = (meta.ino(), meta.mtime(), meta.mtime_nsec());
        Ok(Some(format!("{changed:?} {content:?}")))
    }

    async fn receiver(&self) -> Result<Receiver> {
        tokio::task::block_in_place(|| self.receive())
    }

    async fn set_autostart(&self, id: InstanceId) -> Result<()> {
        self.devstack
            .virsh(NODES[0], &["autostart", &id.to_string()])
    }

    async fn redefine(&self, id: InstanceId) -> Result<()> {
        let vcpus = format!("<vcpu>{REDEFINED_VCPUS}</vcpu>");
        let definition = self.definition(id, self.wish(id)?);
        let xml = self.directory.join(format!("{id}.xml"));
        std::fs::write(&xml, definition.replace("<vcpu>1</vcpu>", &vcpus))?;
        self.devstack
            .virsh(NODES[0], &["define", &xml.to_string_lossy()])
    }

    fn network_in_sight(&self) -> NicAttachment {
        // Drivers see this process's network, where no bridge is for certain.
        let bridge = "lo".to_owned();
        NicAttachment::Bridge { bridge }
    }

    async fn same_disk(&self, one: &str, other: &str) -> Result<bool> {
        let output = Command::new("timeout")
            .args([COMMAND_S, "qemu-img", "compare", "-q", "-U", one, other])
            .output()?;
        match output.status.code() {
            Some(0) => Ok(true),
            Some(1) => Ok(false),
            _ => bail!("qemu-img compare {one} {other}: {output:?}"),
        }
    }

    fn probe_address(&self) -> String {
        // Probe ports are this process's own.
        "127.0.0.1".to_owned()
    }
}

/// The running devstack.
struct Devstack {
    commands: PathBuf,
    run: PathBuf,
    state: PathBuf,
    shared: PathBuf,
}

impl Devstack {
    fn find(commands: &Path) -> Result<Self> {
        let output = Command::new(commands.join("env")).output();
        let output = output.with_context(|| format!("{}/env", commands.display()))?;
        ensure!(output.status.success(), "{output:?}");
        let text = String::from_utf8(output.stdout)?;
        let value = |name: &str| {
            let prefix = format!("export {name}=");
            let line = text.lines().find_map(|line| line.strip_prefix(&prefix));
            let path = line.map(|path| PathBuf::from(path.trim_matches(['"', '\''])));
            path.with_context(|| format!("devstack/env tells no {name}"))
        };
        Ok(Self {
            commands: commands.to_owned(),
            run: value("DROVER_DEVSTACK_RUN")?,
            state: value("DROVER_DEVSTACK_STATE")?,
            shared: value("DROVER_SHARED")?,
        })
    }

    /// A node's libvirtd, reached from anywhere.
    fn socket(&self, node: &str) -> PathBuf {
        self.run.join(node).join("run/libvirt/libvirt-sock")
    }

    /// A node's private path, as the machine under the nodes sees it.
    fn in_node(&self, node: &str, path: &Path) -> PathBuf {
        let inner = path.strip_prefix("/").unwrap_or(path);
        self.state.join(node).join(inner)
    }

    /// Runs a command on a node.
    fn on(&self, node: &str, arguments: &[&str]) -> Result<()> {
        let on = self.commands.join("on");
        run_command(&on.to_string_lossy(), &[&[node], arguments].concat())
    }

    fn virsh(&self, node: &str, arguments: &[&str]) -> Result<()> {
        let uri = format!("qemu:///system?socket={}", self.socket(node).display());
        let mut all = vec!["-q", "-c", &uri];
        all.extend(arguments);
        run_command("virsh", &all)
    }
}

/// Runs a command, for a bounded time.
fn run_command(program: &str, arguments: &[&str]) -> Result<()> {
    let output = Command::new("timeout")
        .args([COMMAND_S, program])
        .args(arguments)
        .stdin(Stdio::null())
        .output()?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr);
        bail!("{program} {}: {}", arguments.join(" "), words.trim());
    }
    Ok(())
}

fn short() -> String {
    uuid::Uuid::new_v4().simple().to_string().split_off(24)
}

/// A way to a socket that can be cut.
struct Proxy {
    path: PathBuf,
    target: PathBuf,
    serving: Mutex<Option<JoinHandle<()>>>,
}

impl Proxy {
    fn open(path: PathBuf, target: PathBuf) -> Result<Self> {
        let proxy = Self {
            path,
            target,
            serving: Mutex::new(None),
        };
        proxy.reopen()?;
        Ok(proxy)
    }

    /// Lets callers through.
    fn reopen(&self) -> Result<()> {
        let listener = UnixListener::bind(&self.path)?;
        let serving = tokio::spawn(serve(listener, self.target.clone()));
        let mut slot = self
            .serving
            .lock()
            .map_err(|_| anyhow!("a point panicked"))?;
        *slot = Some(serving);
        Ok(())
    }

    /// Breaks every connection and takes no more.
    async fn close(&self) {
        let serving = self.serving.lock().ok().and_then(|mut slot| slot.take());
        // Gone first: who comes next finds nothing.
        let _ = std::fs::remove_file(&self.path);
        if let Some(serving) = serving {
            serving.abort();
            let _ = serving.await;
        }
    }
}

/// Passes bytes on; its end ends every connection.
async fn serve(listener: UnixListener, target: PathBuf) {
    let mut connections = JoinSet::new();
    while let Ok((mut near, _)) = listener.accept().await {
        while connections.try_join_next().is_some() {}
        let target = target.clone();
        connections.spawn(async move {
            if let Ok(mut far) = UnixStream::connect(target).await {
                // Either side may go whenever it likes.
                let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
            }
        });
    }
}

//! The handle on the world that tests hold: builds it, breaks it, looks at it,
//! and checks it.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use drover_model::{
    guest::{Guest, PowerState, Presence},
    ids::{HostName, InstanceId},
    node::Endpoint,
};
use tokio::{sync::Notify, time::Instant};

use super::{
    FakeDriver,
    answers::IMAGES,
    guest_builder::GuestBuilder,
    ledger::Violation,
    node::{CpuTime, Domain, Memory, Node, NodeSpec},
    script::{At, Call, CallScript, Effect, Fault, MigrationScript, SendScript},
    storage::{Content, File},
    world::{World, pair},
};

/// Size of a node's own file system, bytes.
const ROOT_BYTES: u64 = 200 << 30;
/// Most nodes one fabric has: their addresses come from one /24.
const MAX_NODES: usize = 200;

/// One world of fake nodes. Clones are handles on the same one.
///
/// Migrations live here, as libvirt's live in libvirtd: they go on when the
/// `migrate` future, or the driver, is dropped. They are carried on by a task
/// of the runtime in which the first of them began. Everything is decided by
/// tokio's clock and the seed.
///
/// Methods that name a node panic if it was never added: a test's own mistake.
#[derive(Debug, Clone)]
pub struct Fabric {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    world: Mutex<World>,
    /// Wakes the task that carries migrations on: something was changed.
    changed: Arc<Notify>,
}

impl Drop for Shared {
    fn drop(&mut self) {
        // The task sees that its world is gone, and ends.
        self.changed.notify_one();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, World> {
        // A test that panicked has failed already; its clean-up may go on.
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn host(name: &str) -> HostName {
    name.parse()
        .expect("a test names its nodes with host names")
}

impl Fabric {
    /// An empty world.
    pub fn new(seed: u64) -> Self {
        Self {
            shared: Arc::new(Shared {
                world: Mutex::new(World::new(seed)),
                changed: Arc::new(Notify::new()),
            }),
        }
    }

    /// Does something to the world as it is now.
    pub(super) fn with<T>(&self, act: impl FnOnce(&mut World, Instant) -> T) -> T {
        let mut world = self.shared.lock();
        let now = Instant::now();
        world.settle(now);
        let result = act(&mut world, now);
        let begins = !world.ticking && world.is_restless();
        world.ticking |= begins;
        drop(world);
        if begins {
            let world = Arc::downgrade(&self.shared);
            tokio::spawn(carry_on(world, Arc::clone(&self.shared.changed)));
        }
        self.shared.changed.notify_one();
        result
    }

    // ---- building ----------------------------------------------------------------

    /// Adds a node with a file system of its own.
    pub fn add_node(&self, name: &str, spec: NodeSpec) -> FakeDriver {
        let name = host(name);
        self.with(|world, _| {
            let number = world.nodes.len() + 1;
            assert!(
                number <= MAX_NODES,
                "a fabric has at most {MAX_NODES} nodes"
            );
            let address = spec
                .address
                .clone()
                .unwrap_or_else(|| format!("10.0.0.{number}"));
            let root = std::slice::from_ref(&name);
            world
                .storage
                .mount(&format!("{name}:/"), "/", root, ROOT_BYTES);
            world.storage.make_directory(&name, IMAGES);
            world.nodes.insert(name.clone(), Node::new(spec, address));
        });
        FakeDriver::new(self.clone(), name)
    }

    /// A directory that is the same on all these nodes, of that size in bytes.
    pub fn share_directory(&self, directory: &str, nodes: &[&str], capacity_bytes: u64) {
        let nodes: Vec<HostName> = nodes.iter().map(|n| host(n)).collect();
        self.with(|world, _| {
            let name = format!("shared:{directory}");
            world
                .storage
                .mount(&name, directory, &nodes, capacity_bytes);
        });
    }

    /// Has a node see a directory that others share, or see it no more.
    pub fn set_mounted(&self, node: &str, directory: &str, mounted: bool) {
        let node = host(node);
        self.with(|world, _| {
            let name = format!("shared:{directory}");
            world.storage.set_mounted(&name, directory, &node, mounted);
        });
    }

    /// Puts a guest on a node, with its disks; returns its UUID.
    pub fn add_guest(&self, node: &str, guest: GuestBuilder) -> InstanceId {
        let node = host(node);
        self.with(|world, now| {
            let bytes = world.rng.u128(..).to_be_bytes();
            let drawn = uuid::Builder::from_random_bytes(bytes).into_uuid();
            let (guest, manner) = guest.build(InstanceId(drawn));
            let id = guest.id;
            world.add_guest(&node, guest, manner, now);
            id
        })
    }

    /// A driver of a node: a new one finds what an older one left.
    pub fn driver(&self, node: &str) -> FakeDriver {
        let node = host(node);
        self.with(|world, _| {
            world.node(&node);
        });
        FakeDriver::new(self.clone(), node)
    }

    /// Where other nodes reach a node.
    pub fn endpoint(&self, node: &str) -> Endpoint {
        let name = host(node);
        self.with(|world, _| {
            let node = world.node(&name);
            Endpoint {
                address: node.address.clone(),
                libvirt_uri: format!("qemu+tcp://{name}/system"),
                libvirt_port: node.spec.libvirt_port,
            }
        })
    }

    /// Names of all nodes.
    pub fn nodes(&self) -> Vec<HostName> {
        self.with(|world, _| world.nodes.keys().cloned().collect())
    }

    // ---- changing ----------------------------------------------------------------

    /// Changes what a node is like: any fact of a check can be made to fail.
    pub fn edit_node(&self, node: &str, change: impl FnOnce(&mut NodeSpec)) {
        let node = host(node);
        self.with(|world, _| change(&mut world.node_mut(&node).spec));
    }

    /// Changes what a guest is like, where it is.
    pub fn edit_guest(&self, node: &str, id: InstanceId, change: impl FnOnce(&mut Guest)) {
        self.on_domain(node, id, |domain| change(&mut domain.guest));
    }

    /// Somebody defines a guest anew (`virsh define`): from its next start on, if it is
    /// active.
    pub fn redefine(&self, node: &str, id: InstanceId, change: impl FnOnce(&mut Guest)) {
        let node = host(node);
        self.with(|world, _| world.redefine(&node, id, change));
    }

    /// Changes how fast a guest writes memory, MiB/s; not for a migration that
    /// has begun.
    pub fn set_dirty_mib_s(&self, node: &str, id: InstanceId, mib_s: u64) {
        self.on_domain(node, id, |domain| domain.load.dirty_bytes_s = mib_s << 20);
    }

    /// Changes how much of a CPU a guest keeps busy, percent, from now on.
    pub fn set_cpu_percent(&self, id: InstanceId, percent: u64) {
        self.with(|world, now| world.set_cpu_percent(id, percent, now));
    }

    /// libvirt runs another job (a backup, …) on a guest, or no longer.
    pub fn set_other_job(&self, node: &str, id: InstanceId, job: Option<&str>) {
        self.on_domain(node, id, |domain| domain.other_job = job.map(str::to_owned));
    }

    fn on_domain(&self, node: &str, id: InstanceId, act: impl FnOnce(&mut Domain)) {
        let node = host(node);
        self.with(|world, _| {
            let domain = world.domain_mut(&node, id);
            act(domain.expect("a test changes guests where they are"));
        });
    }

    /// Starts a guest that is shut off: a boot, which finds its count on its disk.
    pub fn start_guest(&self, node: &str, id: InstanceId) {
        let node = host(node);
        self.with(|world, now| {
            let counter = world.last_written(&node, id);
            world.ledger.born(id, true, counter);
            if let Some(domain) = world.domain_mut(&node, id) {
                domain.memory = Memory::at(counter);
                domain.cpu = CpuTime::from(counter);
            }
            world.start_vcpus(&node, id, now);
        });
    }

    /// A guest cannot be read any more (its XML, its storage, …), or can again.
    pub fn set_unreadable(&self, id: InstanceId, reason: Option<&str>) {
        self.with(|world, _| match reason {
            Some(reason) => drop(world.unreadable.insert(id, reason.to_owned())),
            None => drop(world.unreadable.remove(&id)),
        });
    }

    /// A guest shuts itself down.
    pub fn shut_down_guest(&self, id: InstanceId) {
        self.kill_guest(id);
    }

    /// A guest dies with its QEMU, wherever it is active.
    pub fn kill_guest(&self, id: InstanceId) {
        self.with(|world, now| {
            let hosts: Vec<HostName> = world.nodes.keys().cloned().collect();
            for host in hosts {
                if world.presence(&host, id).is_active() {
                    world.qemu_dies(&host, id, now);
                }
            }
        });
    }

    /// Somebody pauses a guest.
    pub fn pause_guest(&self, node: &str, id: InstanceId) {
        let node = host(node);
        self.with(|world, now| {
            if world.domain(&node, id).is_some_and(Domain::runs) {
                world.stop_vcpus(&node, id, now, PowerState::Paused);
            }
        });
    }

    /// Somebody who may has agreed that a guest goes back to older disks: the
    /// next time it is started on disks older than they once were is no loss.
    pub fn accept_older_disks(&self, id: InstanceId) {
        self.with(|world, _| world.ledger.accept_older_disks(id));
    }

    /// A node's hypervisor is told to start a guest at boot (`virsh autostart`).
    pub fn set_autostart(&self, node: &str, id: InstanceId, autostart: bool) {
        self.on_domain(node, id, |domain| domain.autostart = autostart);
    }

    // ---- breaking ----------------------------------------------------------------

    /// The next `times` calls of that kind to a node's drivers go this way.
    pub fn on_call(&self, node: &str, call: Call, times: u32, effect: Effect) {
        let node = host(node);
        self.with(|world, _| {
            world.node_mut(&node).call_scripts.push(CallScript {
                call,
                effect,
                times,
            });
        });
    }

    /// At that point of a guest's migration (the running one, or the next), this happens.
    pub fn on_migration(&self, id: InstanceId, at: At, fault: Fault) {
        self.with(|world, _| {
            let script = MigrationScript { at, fault };
            match world.journeys.get_mut(&id) {
                Some(journey) => journey.scripts.push(script),
                None => world.scripts.entry(id).or_default().push(script),
            }
        });
    }

    /// When so many percent of the bytes of a node's next `send` are there, this
    /// happens. Of the faults `Stall` (until [`Self::unstall_sends`]), `Fail`,
    /// `CutLink`, `LibvirtdAway`, `LibvirtdDies` and `PowerOff` mean something here.
    pub fn on_send(&self, node: &str, percent: u8, fault: Fault) {
        let node = host(node);
        self.with(|world, _| {
            let script = SendScript { percent, fault };
            world.node_mut(&node).send_scripts.push(script);
        });
    }

    /// Files that a node sends, and stood still, go on.
    pub fn unstall_sends(&self, node: &str) {
        let node = host(node);
        self.with(|world, _| world.node_mut(&node).sends_stalled = false);
    }

    /// A migration that stood still goes on.
    pub fn unstall(&self, id: InstanceId) {
        self.with(|world, _| {
            if let Some(journey) = world.journeys.get_mut(&id) {
                journey.stalled = false;
            }
        });
    }

    /// A node's libvirtd answers no caller any more. What it does goes on.
    pub fn libvirtd_away(&self, node: &str) {
        let node = host(node);
        self.with(|world, _| world.libvirtd_away(&node));
    }

    /// A node's libvirtd dies: its migrations fail on both sides, as far as
    /// they still can. Guests run on.
    pub fn libvirtd_dies(&self, node: &str) {
        let node = host(node);
        self.with(|world, now| world.libvirtd_dies(&node, now));
    }

    /// A node's libvirtd is there again, after either.
    pub fn libvirtd_back(&self, node: &str) {
        let node = host(node);
        self.with(|world, _| world.libvirtd_back(&node));
    }

    /// A libvirtd dies and is there again at once.
    pub fn restart_libvirtd(&self, node: &str) {
        self.libvirtd_dies(node);
        self.libvirtd_back(node);
    }

    /// A node loses power: its guests die, its links are down.
    pub fn power_off(&self, node: &str) {
        let node = host(node);
        self.with(|world, now| world.power_off(&node, now));
    }

    /// A node's power is back: its libvirtd answers, and nothing runs but what
    /// that starts by itself.
    pub fn power_on(&self, node: &str) {
        let node = host(node);
        self.with(|world, now| world.power_on(&node, now));
    }

    /// Cuts the link between two nodes. Their libvirtds give up a migration
    /// after 30 s of it; post-copy waits for as long as it takes.
    pub fn cut_link(&self, a: &str, b: &str) {
        let key = pair(&host(a), &host(b));
        self.with(|world, _| world.cut.insert(key));
    }

    /// Mends it.
    pub fn mend_link(&self, a: &str, b: &str) {
        let key = pair(&host(a), &host(b));
        self.with(|world, _| world.cut.remove(&key));
    }

    /// What the link between two nodes carries at most, MiB/s.
    pub fn set_link_mib_s(&self, a: &str, b: &str, mib_s: u64) {
        let key = pair(&host(a), &host(b));
        self.with(|world, _| world.links.insert(key, mib_s << 20));
    }

    // ---- files -------------------------------------------------------------------

    /// A file as a node sees it.
    pub fn file(&self, node: &str, path: &str) -> Option<File> {
        let node = host(node);
        self.with(|world, _| world.storage.file(&node, path).cloned())
    }

    /// Puts a file there that no guest made, with that text; fails in words.
    pub fn write_file(&self, node: &str, path: &str, text: &str) -> Result<(), String> {
        let node = host(node);
        let bytes = text.len().max(4096) as u64;
        let file = File::dense(Content::Text(text.to_owned()), bytes);
        self.with(|world, _| world.storage.create(&node, path, file))
    }

    /// Somebody copies a file to another node, over what is there.
    pub fn copy_file(&self, from: &str, to: &str, path: &str) {
        let (from, to) = (host(from), host(to));
        self.with(|world, _| {
            if let Some(file) = world.storage.file(&from, path).cloned() {
                world.storage.remove(&to, path);
                world.put_file(&to, path, file);
            }
        })
    }

    /// Lets a node's agent read a file, or not.
    pub fn set_readable(&self, node: &str, path: &str, readable: bool) {
        let node = host(node);
        self.with(|world, _| {
            let unreadable = &mut world.node_mut(&node).unreadable;
            match readable {
                true => unreadable.remove(path),
                false => unreadable.insert(path.to_owned()),
            };
        });
    }

    /// Somebody writes to a file with text in it, or nothing; fails in words.
    pub fn change_file(&self, node: &str, path: &str) -> Result<(), String> {
        let node = host(node);
        self.with(|world, _| {
            let file = world.storage.file_mut(&node, path);
            let Some(file) = file else {
                return Err(format!("{path}: No such file or directory"));
            };
            match &mut file.content {
                Content::Text(text) => {
                    text.insert_str(0, "changed!");
                    Ok(())
                }
                Content::Empty => {
                    *file = File::dense(Content::Text("changed!".to_owned()), 4096);
                    Ok(())
                }
                _ => Err(format!("{path}: no text is there")),
            }
        })
    }

    /// Gives a node a block device of that length with nothing on it, below `/dev`.
    pub fn add_device(&self, node: &str, path: &str, length_bytes: u64) {
        let node = host(node);
        let file = File {
            length_bytes,
            ..File::dense(Content::Empty, 0)
        };
        self.with(|world, _| world.put_file(&node, path, file));
    }

    /// Makes a directory on a node.
    pub fn make_directory(&self, node: &str, directory: &str) {
        let node = host(node);
        self.with(|world, _| world.storage.make_directory(&node, directory));
    }

    /// Takes a directory from a node, with what is in it.
    pub fn remove_directory(&self, node: &str, directory: &str) {
        let node = host(node);
        self.with(|world, _| world.storage.remove_directory(&node, directory));
    }

    /// Lets a node write to a directory, or not.
    pub fn set_writable(&self, node: &str, directory: &str, writable: bool) {
        let node = host(node);
        self.with(|world, _| world.storage.set_writable(&node, directory, writable));
    }

    /// Size of the file system that a node's path lies on, bytes.
    pub fn set_disk_bytes(&self, node: &str, path: &str, bytes: u64) {
        let node = host(node);
        self.with(|world, _| world.storage.set_capacity(&node, path, bytes));
    }

    // ---- looking -----------------------------------------------------------------

    /// Where a guest is, on every node that has anything of it. The truth,
    /// whether libvirtd answers or not.
    pub fn whereabouts(&self, id: InstanceId) -> Vec<(HostName, Presence)> {
        self.with(|world, _| {
            let nodes = world.nodes.keys();
            nodes
                .map(|name| (name.clone(), world.presence(name, id)))
                .filter(|(_, presence)| *presence != Presence::Absent)
                .collect()
        })
    }

    /// The node on which a guest's vCPUs run.
    pub fn running_on(&self, id: InstanceId) -> Option<HostName> {
        let here = Presence::Present(PowerState::Running);
        let places = self.whereabouts(id);
        places
            .into_iter()
            .find(|p| p.1 == here)
            .map(|(name, _)| name)
    }

    /// A guest as a node has it, whether its libvirtd answers or not.
    pub fn guest(&self, node: &str, id: InstanceId) -> Option<Guest> {
        let node = host(node);
        self.with(|world, _| world.describe(&node, id))
    }

    /// The counter in the memory of a guest's copy: how long it has run.
    pub fn counter(&self, node: &str, id: InstanceId) -> Option<Duration> {
        let node = host(node);
        self.with(|world, now| world.domain(&node, id).map(|d| d.memory.counter(now)))
    }

    /// Guests that are being migrated.
    pub fn migrating(&self) -> Vec<InstanceId> {
        self.with(|world, _| world.journeys.keys().copied().collect())
    }

    /// The keys under which a node takes files in.
    pub fn receiving(&self, node: &str) -> Vec<uuid::Uuid> {
        let node = host(node);
        self.with(|world, _| {
            let inboxes = world.node(&node).inboxes.iter();
            let open = inboxes.filter(|(_, inbox)| inbox.is_open());
            open.map(|(key, _)| *key).collect()
        })
    }

    /// Every violation there ever was, even for a moment.
    pub fn violations(&self) -> Vec<Violation> {
        self.with(|world, _| world.ledger.violations().to_vec())
    }

    /// Whether every promise to every guest holds now and always held: active
    /// on one node at the most, and on one unless a script (or itself) ended
    /// it; with its memory; on its own, up-to-date disks.
    pub fn check_invariants(&self) -> Result<(), Vec<Violation>> {
        let violations = self.with(|world, now| {
            world.inspect(now);
            world.ledger.violations().to_vec()
        });
        if violations.is_empty() {
            Ok(())
        } else {
            Err(violations)
        }
    }

    /// Disks of which the newest bytes are nowhere any more, in words. A guest that
    /// was let go back to older ones has lost nothing.
    pub fn lost_bytes(&self) -> Vec<String> {
        self.with(|world, now| world.lost_bytes(now))
    }

    /// What a guest that is defined lacks of itself where it is, in words; that it is
    /// defined nowhere, if so.
    pub fn incomplete(&self, id: InstanceId) -> Vec<String> {
        self.with(|world, _| world.incomplete(id))
    }

    /// What lies about and belongs to nobody, in words: copies that wait for a
    /// migration that is over, definitions and old copies of guests that are
    /// active elsewhere, second definitions of those that are off, marks, files
    /// that no domain uses, disks that are being copied, open inboxes. Empty after every migration that was
    /// tidied up (confirmed or reverted, if it was a cold one).
    pub fn leftovers(&self) -> Vec<String> {
        self.with(|world, _| world.leftovers())
    }
}

/// Carries migrations on, and guests that shut down, until none is left: sleeps
/// until something is due.
async fn carry_on(shared: Weak<Shared>, changed: Arc<Notify>) {
    loop {
        let next = {
            let Some(shared) = shared.upgrade() else {
                return;
            };
            let mut world = shared.lock();
            world.settle(Instant::now());
            if !world.is_restless() {
                world.ticking = false;
                return;
            }
            world.next_wake()
        };
        match next {
            Some(next) => tokio::select! {
                biased;
                () = changed.notified() => {}
                () = tokio::time::sleep_until(next) => {}
            },
            // Everything is stalled.
            None => changed.notified().await,
        }
    }
}

//! The real hypervisor: a node's libvirt.
//!
//! Owns the connection to libvirtd and all that is said over it. Nothing else
//! in Drover names `virt`, and nothing but [`ffi`] here contains `unsafe` code.
//!
//! ```text
//!   LibvirtDriver ── Calls ──► blocking pool ──► Link's connection ──► libvirtd
//!        │                                          │  ▲
//!        │                                   events │  │ reconnects for ever
//!        ├─ events() ◄── broadcast ◄────────────────┘  │ (connection.rs)
//!        ├─ migrate() ── Mover ──► thread and connection of its own
//!        └─ send(), receive() ── carrier ══► the other node's agent (cold.rs)
//! ```
//!
//! What blocks runs off the runtime, with a bound in number and in time
//! ([`blocking`]). While libvirtd is away every call fails at once, saying where
//! it was sought and why it did not answer. Needs libvirt 6.0 or later.

mod blocking;
mod capabilities;
mod cold;
mod connection;
mod definitions;
mod destination;
mod errors;
mod event_loop;
mod ffi;
mod guests;
mod jobs;
mod lifecycle;
mod migrate;
mod network;
#[cfg(test)]
mod on_devstack;
mod overlays;
mod rebuild;
mod settings;
mod sever;
mod standing;
mod storage;
mod transfer;
mod usage;
mod xml;

/// What fuzz targets call.
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing {
    pub use super::{storage::fuzzing::qcow2, xml::fuzzing::domain};
}

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use drover_model::{
    api::compute::Mark,
    content::{AddressFact, BoundAddress, FileContent, Seen},
    guest::{Disk, Guest, Presence},
    ids::{InstanceId, MigrationId},
    node::{InstanceReport, Inventory},
};
use tokio::sync::broadcast;

pub use self::settings::LibvirtSettings;
use self::{
    blocking::{Calls, Effect},
    cold::Door,
    connection::Link,
    ffi::Room,
    jobs::Switching,
    migrate::Mover,
    network::Ports,
    storage::{
        content::{self, Digests},
        image, marks,
        measure::Measurer,
        memory::Memory,
    },
    usage::Usages,
};
use super::{
    DestinationAnswer, DestinationQuestion, Event, Hypervisor, HypervisorError, Job, JobSample,
    MigrateSpec, Result, Unreached,
};

/// A node's libvirt.
#[derive(Debug)]
pub struct LibvirtDriver {
    settings: LibvirtSettings,
    link: Arc<Link>,
    calls: Calls,
    mover: Mover,
    ports: Ports,
    door: Door,
    switching: Arc<Switching>,
    usages: Usages,
    measurer: Measurer,
    memory: Memory,
    /// When it was last looked at which files domains use.
    looked_at: Mutex<Option<Instant>>,
    /// The room of the instances' file system, as it was last known.
    room: Mutex<Option<Room>>,
    digests: Digests,
}

/// How long small files' digests are waited for.
const AT_ONCE: Duration = Duration::from_secs(1);
/// How often it is looked at which files domains use.
const LOOK_AT_STORAGE: Duration = Duration::from_secs(60);
/// Pause between two looks at them.
const LOOK: Duration = Duration::from_millis(10);

impl LibvirtDriver {
    /// Starts to connect and returns at once, whether libvirt is there or not;
    /// it is sought for ever. Calls made before the first answer wait for it.
    ///
    /// # Errors
    /// `Failed` for settings that make no sense; `Bug` outside a tokio runtime
    /// or if libvirt's event loop cannot be started.
    pub fn start(settings: LibvirtSettings) -> Result<Arc<Self>> {
        settings.check()?;
        tokio::runtime::Handle::try_current().map_err(|e| HypervisorError::Bug(e.to_string()))?;
        ffi::keep_arenas_few();
        event_loop::start()?;
        let link = Link::start(settings.clone());
        let deadline = Duration::from_secs(settings.call_timeout_s);
        Ok(Arc::new(Self {
            calls: Calls::new(link.clone(), deadline),
            mover: Mover::new(link.clone()),
            ports: Ports::new(&settings),
            door: Door::new(&settings),
            switching: Arc::default(),
            usages: Usages::default(),
            measurer: Measurer::default(),
            memory: Memory::new(settings.memory_file.clone()),
            looked_at: Mutex::default(),
            room: Mutex::default(),
            digests: Digests::default(),
            link,
            settings,
        }))
    }
}

impl LibvirtDriver {
    /// Fills in the sizes of a guest's local disks, if their storage answers.
    async fn measured(&self, guest: &mut Guest) -> Result<()> {
        let silent = self.measurer.fill(&mut [guest]).await;
        let reason = silent.into_iter().flatten().next();
        reason.map_or(Ok(()), |reason| Err(HypervisorError::Failed(reason)))
    }

    /// What domains of this node use, as far as their storage answers.
    async fn storage_in_use(&self) -> Result<guests::InUse> {
        let named = self.calls.node(guests::storage_in_use).await?;
        self.memory.take_up(&self.measurer).await;
        let in_use = named.answering(&self.measurer).await;
        self.memory.keep(&self.measurer).await;
        Ok(in_use)
    }

    /// Looks at what domains use now and then, so that it is known when the storage of one
    /// of them does not answer any more.
    async fn look_at_storage(&self) {
        let is_due = {
            let looked_at = self.looked_at.lock();
            let mut at = looked_at.unwrap_or_else(PoisonError::into_inner);
            let is_due = at.is_none_or(|at| at.elapsed() >= LOOK_AT_STORAGE);
            if is_due {
                *at = Some(Instant::now());
            }
            is_due
        };
        if is_due && let Err(error) = self.storage_in_use().await {
            tracing::debug!(%error, "files that domains use were not looked at");
        }
    }

    /// Room for instances' disks; as last known while their storage does not answer.
    async fn room(&self, path: PathBuf) -> Result<Room> {
        let looked = path.clone();
        let look = move || capabilities::instances_room(&looked);
        let last = || *self.room.lock().unwrap_or_else(PoisonError::into_inner);
        match self.measurer.ask(&path, look).await {
            Some(room) => {
                let room = room?;
                *self.room.lock().unwrap_or_else(PoisonError::into_inner) = Some(room);
                Ok(room)
            }
            None => Ok(last().unwrap_or_default()),
        }
    }

    /// What is in files; what takes longer to read is said to be under way.
    async fn digests_within(&self, paths: &[String], limit: Duration) -> Result<Vec<FileContent>> {
        let deadline = tokio::time::Instant::now() + limit;
        loop {
            let (paths, digests) = (paths.to_vec(), self.digests.clone());
            let look = move || Ok(paths.iter().map(|p| digested(p, &digests)).collect());
            let found: Vec<FileContent> = self.calls.files(Effect::Read, look).await?;
            let over = tokio::time::Instant::now() >= deadline;
            if over || !found.iter().any(FileContent::is_working) {
                return Ok(found);
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}

fn digested(path: &str, digests: &Digests) -> FileContent {
    let mut found = content::look(path, &[]);
    if let Seen::File { digest, .. } = &mut found.seen {
        *digest = digests.of(path);
    }
    found
}

#[async_trait]
impl Hypervisor for LibvirtDriver {
    async fn inventory(&self) -> Result<Inventory> {
        let path = PathBuf::from(&self.settings.instances_path);
        let mut inventory = self.calls.node(capabilities::inventory).await?;
        let room = self.room(path).await?;
        inventory.disk_bytes = room.total_bytes;
        inventory.disk_free_bytes = room.free_bytes;
        Ok(inventory)
    }

    async fn guests(&self) -> Result<Vec<InstanceReport>> {
        let (found, usages, ()) = tokio::join!(
            self.calls.node(guests::all),
            self.usages.ask(&self.calls),
            self.look_at_storage()
        );
        let reports = guests::measured(found?, &self.measurer, &usages).await;
        ffi::give_memory_back();
        Ok(reports)
    }

    async fn guest(&self, id: InstanceId) -> Result<Option<Guest>> {
        let read = move |connect: &_| guests::current(connect, id);
        let Some(mut found) = self.calls.guest(Effect::Read, id, read).await? else {
            return Ok(None);
        };
        self.measured(&mut found.guest).await?;
        let is_arriving = found.is_arriving;
        let guest = match found.has_files() {
            true => {
                let look = move || Ok(guests::with_own_files(found));
                self.calls.files(Effect::Read, look).await?
            }
            false => found.guest,
        };
        if is_arriving || !guest.disks.iter().any(guests::is_unmeasured) {
            return Ok(Some(guest));
        }
        let ask = move |connect: &_| guests::with_missing_sizes(connect, guest);
        self.calls.guest(Effect::Read, id, ask).await.map(Some)
    }

    async fn presence(&self, id: InstanceId) -> Result<Presence> {
        let look = move |connect: &_| {
            let Some(domain) = guests::find(connect, id)? else {
                return Ok(Presence::Absent);
            };
            let presence = errors::absent_is_none(standing::presence(&domain))?;
            Ok(presence.unwrap_or(Presence::Absent))
        };
        self.calls.guest(Effect::Read, id, look).await
    }

    fn events(&self) -> broadcast::Receiver<Event> {
        self.link.events()
    }

    async fn leave_marks(&self, migration: MigrationId, disks: &[Disk]) -> Result<Vec<Mark>> {
        let disks = disks.to_vec();
        let leave = move || Ok(marks::leave(migration, &disks));
        self.calls.files(Effect::Change, leave).await
    }

    async fn remove_marks(&self, marks: &[Mark]) -> Result<()> {
        let marks = marks.to_vec();
        let remove = move || marks::remove(&marks);
        self.calls.files(Effect::Change, remove).await
    }

    async fn answer_destination(
        &self,
        question: DestinationQuestion<'_>,
    ) -> Result<DestinationAnswer> {
        destination::check(question.guest)?;
        let (guest, marks) = (Arc::new(question.guest.clone()), question.marks.to_vec());
        let asked = guest.clone();
        let ask = move |connect: &_| destination::ask_libvirt(connect, &asked);
        let libvirt = self.calls.node(ask).await?;
        let look = move || destination::ask_files(&guest, &marks);
        let files = self.calls.files(Effect::Read, look).await?;
        Ok(DestinationAnswer {
            emulator_present: files.emulator_present,
            machine_supported: libvirt.machine_supported,
            virt_type_supported: libvirt.virt_type_supported,
            cpu: libvirt.cpu,
            networks: libvirt.networks,
            same_uuid: libvirt.same_uuid,
            same_name: libvirt.same_name,
            disks: files.disks,
        })
    }

    async fn contents(&self, paths: &[String], marks: &[Mark]) -> Result<Vec<FileContent>> {
        let (paths, marks) = (paths.to_vec(), marks.to_vec());
        let look = move || Ok(paths.iter().map(|p| content::look(p, &marks)).collect());
        self.calls.files(Effect::Read, look).await
    }

    async fn digests(&self, paths: &[String]) -> Result<Vec<FileContent>> {
        self.digests_within(paths, AT_ONCE).await
    }

    async fn addresses(&self, bound: &[BoundAddress]) -> Result<Vec<AddressFact>> {
        let bound = bound.to_vec();
        // Names are looked up, which blocks.
        let look = move || Ok(bound.iter().map(destination::address_fact).collect());
        self.calls.files(Effect::Read, look).await
    }

    async fn reach(&self, address: &str, port: u16) -> std::result::Result<(), Unreached> {
        self.ports.reach(address, port).await
    }

    async fn open_probe_port(&self) -> std::result::Result<u16, String> {
        self.ports.open_probe().await
    }

    async fn create_disk(&self, disk: &Disk, inode: u64) -> Result<()> {
        let recipe = image::recipe(disk)?;
        let limit = Duration::from_secs(self.settings.qemu_img_timeout_s);
        let in_use = self.storage_in_use().await?;
        let path = recipe.path().to_owned();
        let name = path.display().to_string();
        // With an empty file nobody loses anything: what is not known holds up no move.
        let used = move |is_empty| match is_empty {
            true => Ok(in_use.paths()),
            false => in_use.all_paths(&name),
        };
        let open = move || image::reserved(&path, inode, used);
        let file = self.calls.files(Effect::Change, open).await?;
        image::create(recipe, file, &self.settings.qemu_img, limit).await
    }

    async fn remove_disk(&self, path: &str) -> Result<()> {
        let path = path.to_owned();
        let used = self.storage_in_use().await?;
        let remove = move || image::remove(&path, &used.all_paths(&path)?);
        self.calls.files(Effect::Change, remove).await
    }

    async fn migrate(&self, spec: MigrateSpec) -> Result<()> {
        self.mover.migrate(spec).await
    }

    async fn job(&self, id: InstanceId) -> Result<Job> {
        let look = move |connect: &_| jobs::current(connect, id);
        self.calls.guest(Effect::Read, id, look).await
    }

    async fn completed_job(&self, id: InstanceId) -> Result<Option<JobSample>> {
        let look = move |connect: &_| jobs::completed(connect, id);
        self.calls.guest(Effect::Read, id, look).await
    }

    async fn abort(&self, id: InstanceId) -> Result<()> {
        let switching = self.switching.clone();
        let act = move |connect: &_| jobs::abort(connect, id, &switching);
        self.calls.guest(Effect::Change, id, act).await
    }

    async fn sever(&self, id: InstanceId, dest_address: &str) -> Result<()> {
        let (address, ports) = (dest_address.to_owned(), self.ports.range());
        let cut = move || sever::sever(id, &address, &ports);
        let count = self.calls.files(Effect::Change, cut).await?;
        tracing::info!(instance = %id, to = dest_address, count, "connections are cut");
        Ok(())
    }

    async fn start_post_copy(&self, id: InstanceId) -> Result<()> {
        let switching = self.switching.clone();
        let act = move |connect: &_| jobs::start_post_copy(connect, id, &switching);
        self.calls.guest(Effect::Change, id, act).await
    }

    async fn pause_for_switch_over(&self, id: InstanceId) -> Result<()> {
        let act = move |connect: &_| jobs::pause(connect, id);
        self.calls.guest(Effect::Change, id, act).await
    }

    async fn resume(&self, id: InstanceId) -> Result<()> {
        let act = move |connect: &_| jobs::resume(connect, id);
        self.calls.guest(Effect::Change, id, act).await
    }

    async fn set_max_downtime_ms(&self, id: InstanceId, downtime_ms: u64) -> Result<()> {
        let act = move |connect: &_| jobs::set_max_downtime(connect, id, downtime_ms);
        self.calls.guest(Effect::Change, id, act).await
    }

    async fn discard_incoming(&self, id: InstanceId) -> Result<()> {
        let act = move |connect: &_| lifecycle::discard_incoming(connect, id);
        self.calls.guest(Effect::Change, id, act).await
    }

    async fn discard_outgoing(&self, id: InstanceId) -> Result<()> {
        let act = move |connect: &_| lifecycle::discard_outgoing(connect, id);
        self.calls.guest(Effect::Change, id, act).await
    }

    async fn discard_half(&self, id: InstanceId) -> Result<()> {
        let act = move |connect: &_| lifecycle::discard_half(connect, id);
        self.calls.guest(Effect::Change, id, act).await
    }

    async fn undefine(&self, id: InstanceId) -> Result<()> {
        let act = move |connect: &_| lifecycle::undefine(connect, id);
        self.calls.guest(Effect::Change, id, act).await
    }
}

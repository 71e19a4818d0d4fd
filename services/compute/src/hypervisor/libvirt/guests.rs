//! Reading guests off a connection. Everything here blocks.

use std::path::Path;

use drover_model::{
    guest::{Disk, Guest, Immovable, ImmovableKind, Presence},
    ids::InstanceId,
    node::InstanceReport,
};
use virt::{connect::Connect, domain::Domain, sys};

use super::{
    definitions,
    errors::{self, CallResult},
    jobs, rebuild,
    standing::{self, presence},
    storage::{
        chain::{self, Places},
        files,
        measure::Measurer,
        sizes,
    },
    usage::Usage,
    xml::{
        self, Outside,
        notes::{self, Notes},
    },
};
use crate::hypervisor::HypervisorError;

/// The domain, if libvirt has it.
pub(super) fn find(connect: &Connect, id: InstanceId) -> CallResult<Option<Domain>> {
    Ok(errors::absent_is_none(connect.lookup_domain_by_uuid(id.0))?)
}

/// The domain, which must be there.
pub(super) fn get(connect: &Connect, id: InstanceId) -> CallResult<Domain> {
    find(connect, id)?.ok_or_else(|| HypervisorError::NoSuchGuest(id).into())
}

/// Every domain. Sizes of disks are filled in by [`measured`], without libvirt.
/// One that cannot be read is said to be, and costs no other its place.
pub(super) fn all(connect: &Connect) -> CallResult<Vec<Found>> {
    let autostarts = autostarts(connect)?;
    let mut guests = Vec::new();
    for domain in connect.list_all_domains(0)? {
        let found = match read(&domain, &autostarts) {
            Ok(found) => found,
            // Without the connection nothing is known of any.
            Err(error) if !connect.is_alive().unwrap_or(false) => return Err(error),
            Err(error) => unreadable(&domain, &error.to_string())
                .map(|report| Found::Unreadable(Box::new(report))),
        };
        guests.extend(found);
    }
    Ok(guests)
}

/// A domain as a report tells of it.
pub(super) enum Found {
    /// All that is wanted.
    Whole(Box<Whole>),
    /// What could be had of one that cannot be read.
    Unreadable(Box<InstanceReport>),
}

/// A domain that could be read.
pub(super) struct Whole {
    guest: Guest,
    presence: Presence,
    /// By its lasting definition.
    notes: Notes,
    /// Its lasting definition.
    lasting: String,
    /// libvirt starts it at boot.
    autostart: bool,
}

fn read(domain: &Domain, autostarts: &[InstanceId]) -> CallResult<Option<Found>> {
    // One that goes while the others are read is not there.
    let Some(found) = errors::absent_is_none(basics(domain))? else {
        return Ok(None);
    };
    let inactive = domain.xml_desc(sys::VIR_DOMAIN_XML_INACTIVE);
    let Some(lasting) = errors::absent_is_none(inactive)? else {
        return Ok(None);
    };
    let (guest, presence) = found?;
    Ok(Some(Found::Whole(Box::new(Whole {
        notes: notes::read(&lasting).map_err(HypervisorError::from)?,
        autostart: autostarts.contains(&guest.id),
        guest,
        presence,
        lasting,
    }))))
}

/// What libvirt says of a domain without its XML.
fn unreadable(domain: &Domain, reason: &str) -> Option<InstanceReport> {
    let id = InstanceId(domain.uuid().ok()?);
    let name = domain.name().unwrap_or_default();
    let mut report = InstanceReport::unreadable(id, &name, reason);
    if let Ok(presence) = presence(domain) {
        report.power_state = standing::power_state(presence);
        report.incoming = presence == Presence::Incoming;
    }
    if let Ok(info) = domain.info() {
        report.vcpus = info.nr_virt_cpu;
        report.memory_mib = info.max_mem / 1024;
    }
    Some(report.within_bounds())
}

/// The domains that libvirt starts at boot.
pub(super) fn autostarts(connect: &Connect) -> CallResult<Vec<InstanceId>> {
    let flagged = connect.list_all_domains(sys::VIR_CONNECT_LIST_DOMAINS_AUTOSTART)?;
    let ids = flagged.iter().map(|domain| domain.uuid().map(InstanceId));
    Ok(ids.collect::<std::result::Result<_, _>>()?)
}

type Basics = std::result::Result<(Guest, Presence), HypervisorError>;

fn basics(domain: &Domain) -> std::result::Result<Basics, virt::error::Error> {
    let presence = presence(domain)?;
    let outside = Outside {
        power_state: standing::power_state(presence),
        persistent: domain.is_persistent()?,
    };
    let text = domain.xml_desc(0)?;
    let guest = xml::guest(&text, outside).map_err(HypervisorError::from);
    Ok(guest.map(|guest| (guest, presence)))
}

/// One domain whole, but for the sizes of its disks, and whether it is arriving.
pub(super) fn whole(connect: &Connect, id: InstanceId) -> CallResult<Option<(Guest, bool)>> {
    let Some(domain) = find(connect, id)? else {
        return Ok(None);
    };
    let Some(found) = errors::absent_is_none(basics(&domain))? else {
        return Ok(None);
    };
    let (mut guest, presence) = found?;
    note_snapshots(&domain, &mut guest)?;
    if domain.has_managed_save(0)? {
        guest.active_job = Some("a state saved with 'virsh managedsave' waits for it".to_owned());
    }
    if presence.is_active() || presence == Presence::Incoming {
        let job = jobs::words(&domain)?;
        guest.active_job = job.or(guest.active_job);
    }
    Ok(Some((guest, presence == Presence::Incoming)))
}

/// The guest with the sizes that its files did not tell; libvirt would make one
/// that is still arriving wait.
pub(super) fn with_missing_sizes(connect: &Connect, mut guest: Guest) -> CallResult<Guest> {
    if let Some(domain) = find(connect, guest.id)? {
        ask_for_missing_sizes(&domain, &mut guest);
    }
    Ok(guest)
}

fn note_snapshots(domain: &Domain, guest: &mut Guest) -> CallResult<()> {
    for snapshot in definitions::in_order(domain)? {
        let name = snapshot.name()?;
        if xml::is_external_snapshot(&snapshot.xml_desc(0)?).map_err(HypervisorError::from)? {
            guest.external_snapshots.push(name.clone());
        }
        guest.snapshots.push(name);
    }
    Ok(())
}

/// One domain as its lasting definition has it; what the files tell is filled
/// in by [`with_files`], without libvirt.
pub(super) fn lasting(connect: &Connect, id: InstanceId) -> CallResult<Option<Lasting>> {
    let Some(domain) = find(connect, id)? else {
        return Ok(None);
    };
    let Some(found) = errors::absent_is_none(basics(&domain))? else {
        return Ok(None);
    };
    let (mut now, presence) = found?;
    let inactive = domain.xml_desc(sys::VIR_DOMAIN_XML_INACTIVE);
    let Some(text) = errors::absent_is_none(inactive)? else {
        return Ok(None);
    };
    let outside = Outside {
        power_state: now.power_state,
        persistent: now.persistent,
    };
    let mut guest = xml::guest(&text, outside).map_err(HypervisorError::from)?;
    note_snapshots(&domain, &mut guest)?;
    if domain.has_managed_save(0)? {
        guest.active_job = Some("a state saved with 'virsh managedsave' waits for it".to_owned());
    }
    if presence.is_active() || presence == Presence::Incoming {
        guest.active_job = jobs::words(&domain)?.or(now.active_job.take());
    }
    let nvram = xml::nvram(&text).map_err(HypervisorError::from)?;
    Ok(Some(Lasting { guest, now, nvram }))
}

/// A domain by its lasting definition.
pub(super) struct Lasting {
    guest: Guest,
    /// By its running one.
    now: Guest,
    /// Where the firmware's variables are.
    nvram: Option<String>,
}

impl Lasting {
    pub(super) fn guest_mut(&mut self) -> &mut Guest {
        &mut self.guest
    }
}

/// Fills in what only files tell: sizes, what lies under disks and beside them.
/// What cannot be carried for their sake becomes an immovable.
pub(super) fn with_files(lasting: Lasting, places: &Places) -> Guest {
    let Lasting {
        mut guest,
        now,
        nvram,
    } = lasting;
    sizes::fill(&mut guest);
    let mut obstacles = Vec::new();
    for disk in &mut guest.disks {
        let running = now.disks.iter().find(|d| d.target == disk.target);
        if running.is_none_or(|d| d.source != disk.source) && now.power_state.is_active() {
            obstacles.push(format!(
                "{}: the running guest has another disk there",
                disk.target
            ));
        }
        let Some(path) = disk.local_path() else {
            continue;
        };
        if let Err(words) = sizes::is_image(Path::new(path)) {
            obstacles.push(format!("{}: {path}: {words}", disk.target));
            continue;
        }
        match chain::below(path, &disk.format, places) {
            Ok(backing) => disk.backing = backing,
            Err(words) => obstacles.push(format!("{}: {words}", disk.target)),
        }
    }
    let added = now
        .disks
        .iter()
        .filter(|d| !guest.disks.iter().any(|l| l.target == d.target));
    obstacles.extend(added.map(|d| format!("{}: only the running guest has it", d.target)));
    guest
        .files
        .extend(nvram.and_then(|path| files::nvram(&path)));
    match files::tpm_state(guest.id) {
        Ok(state) if guest.has_emulated_tpm() => guest.files.extend(state),
        Ok(_) => {}
        Err(e) => obstacles.push(format!("the TPM's state: {e}")),
    }
    let kind = ImmovableKind::Disk;
    let found = obstacles.into_iter().map(|what| Immovable { kind, what });
    guest.immovable.extend(found);
    guest
}

/// Sizes of disks that no file of this node tells (network disks, rare
/// formats), from libvirt. It opens what it finds there: of what is no image, it
/// is not asked.
fn ask_for_missing_sizes(domain: &Domain, guest: &mut Guest) {
    let can_be_opened = |disk: &Disk| {
        let path = disk.local_path();
        path.is_none_or(|path| sizes::is_image(Path::new(path)).is_ok())
    };
    let missing = guest.disks.iter_mut().filter(|d| is_unmeasured(d));
    for disk in missing.filter(|d| can_be_opened(d)) {
        match domain.block_info(&disk.target, 0) {
            Ok(info) => {
                disk.virtual_bytes = info.capacity;
                disk.allocated_bytes = info.allocation;
            }
            Err(error) => {
                tracing::debug!(disk = disk.target, error = error.message(), "size unknown");
            }
        }
    }
}

/// Whether no file told how large a disk is.
pub(super) fn is_unmeasured(disk: &Disk) -> bool {
    use drover_model::guest::DiskSource as S;
    disk.virtual_bytes == 0 && !matches!(disk.source, S::Empty) && !disk.target.contains('\0')
}

/// Fills in sizes and makes a report's line of each.
pub(super) async fn measured(
    mut found: Vec<Found>,
    measurer: &Measurer,
    usages: &Usage,
) -> Vec<InstanceReport> {
    let mut guests: Vec<&mut Guest> = found
        .iter_mut()
        .filter_map(|found| match found {
            Found::Whole(whole) => Some(&mut whole.guest),
            Found::Unreadable(_) => None,
        })
        .collect();
    let mut silences = measurer.fill(&mut guests).await.into_iter();
    let reports = found.into_iter().map(|found| match found {
        Found::Unreadable(report) => *report,
        Found::Whole(whole) => whole.report(silences.next().flatten(), usages),
    });
    reports.collect()
}

impl Whole {
    fn report(self, unreadable: Option<String>, usages: &Usage) -> InstanceReport {
        let Self { guest, notes, .. } = self;
        InstanceReport {
            disk_bytes: disk_bytes(&guest),
            id: guest.id,
            name: guest.name,
            project: guest.project,
            generation: guest.generation,
            power_state: guest.power_state,
            incoming: self.presence == Presence::Incoming,
            vcpus: guest.vcpus,
            memory_mib: guest.memory_mib,
            migration: None,
            wishes: notes.wishes,
            usage: usages.get(&guest.id).copied(),
            definition_digest: rebuild::digest(&self.lasting),
            autostart: self.autostart || notes.autostart,
            unreadable,
        }
    }
}

fn disk_bytes(guest: &Guest) -> u64 {
    let disks = guest.disks.iter().filter(|disk| disk.device == "disk");
    disks.fold(0, |sum, disk| sum.saturating_add(disk.virtual_bytes))
}

/// Files and devices that domains of this node use, by their running or their
/// lasting definitions.
pub(super) struct InUse(Vec<User>);

/// What one domain uses.
pub(super) struct User {
    /// Which.
    pub(super) id: InstanceId,
    /// Its name.
    pub(super) name: String,
    paths: Vec<String>,
    /// Images whose headers may name further ones: path and format.
    tops: Vec<(String, String)>,
}

impl User {
    /// All of it, with what lies under images of a guest that is off. What
    /// cannot be followed is no file that Drover would remove.
    pub(super) fn paths(self) -> Vec<String> {
        let mut paths = self.paths;
        for (top, format) in self.tops {
            // Wherever it leads: this only keeps files from being removed.
            let anywhere = Places(vec!["/".into()]);
            let below = chain::below(&top, &format, &anywhere).unwrap_or_default();
            paths.extend(below.into_iter().map(|image| image.path));
        }
        paths
    }
}

impl InUse {
    /// All that they use.
    pub(super) fn paths(self) -> Vec<String> {
        self.0.into_iter().flat_map(User::paths).collect()
    }

    /// One by one.
    pub(super) fn users(self) -> Vec<User> {
        self.0
    }
}

/// Asks libvirt for it.
pub(super) fn storage_in_use(connect: &Connect) -> CallResult<InUse> {
    let mut users = Vec::new();
    for domain in connect.list_all_domains(0)? {
        let mut user = User {
            id: InstanceId(domain.uuid()?),
            name: domain.name()?,
            paths: Vec::new(),
            tops: Vec::new(),
        };
        for flags in [0, sys::VIR_DOMAIN_XML_INACTIVE] {
            let Some(text) = errors::absent_is_none(domain.xml_desc(flags))? else {
                continue;
            };
            let storage = xml::storage(&text).map_err(HypervisorError::from)?;
            user.paths.extend(storage.paths);
            user.tops.extend(storage.tops);
        }
        users.push(user);
    }
    Ok(InUse(users))
}

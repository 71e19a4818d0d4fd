//! Reading guests off a connection. Everything here blocks.

use std::path::Path;

use drover_model::{
    content::ReadFile,
    guest::{BackingImage, Disk, DiskSource, Guest, Immovable, ImmovableKind, Presence},
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
        image::{self, Identity},
        measure::{At, Measurer},
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
    pub(super) lasting: String,
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

/// A domain by its running definition; what its files tell is filled in by
/// [`measured`] and [`with_own_files`], without libvirt.
pub(super) struct Current {
    pub(super) guest: Guest,
    /// A migration brings it.
    pub(super) is_arriving: bool,
    /// Where the firmware's variables are.
    nvram: Option<String>,
    /// Files that it reads from its next start on.
    next: Vec<ReadFile>,
}

impl Current {
    /// Whether [`with_own_files`] has anything to look at.
    pub(super) fn has_files(&self) -> bool {
        self.nvram.is_some() || !self.next.is_empty()
    }
}

/// Fills in what lies beside its disks, and what it reads from its next start on. What
/// is not there it does not read: its medium was taken away since it was started.
pub(super) fn with_own_files(current: Current) -> Guest {
    let Current {
        mut guest,
        nvram,
        next,
        ..
    } = current;
    guest
        .files
        .extend(nvram.and_then(|path| files::nvram(&path)));
    let there = |file: &ReadFile| Path::new(&file.path).exists();
    guest.reads.extend(next.into_iter().filter(there));
    guest
}

/// What libvirt restores at the next start, whatever the definition says by then.
pub(super) const SAVED: &str = "a state saved with 'virsh managedsave' waits for it";

/// One domain by its running definition.
pub(super) fn current(connect: &Connect, id: InstanceId) -> CallResult<Option<Current>> {
    let Some(domain) = find(connect, id)? else {
        return Ok(None);
    };
    let Some(found) = errors::absent_is_none(basics(&domain))? else {
        return Ok(None);
    };
    let (mut guest, presence) = found?;
    note_snapshots(&domain, &mut guest)?;
    if domain.has_managed_save(0)? {
        guest.active_job = Some(SAVED.to_owned());
    }
    if presence.has_qemu() {
        let job = jobs::words(&domain)?;
        guest.active_job = job.or(guest.active_job);
    }
    let next = match presence.is_active() && guest.persistent {
        true => note_next_start(&domain, &mut guest)?,
        false => Vec::new(),
    };
    let Some(text) = errors::absent_is_none(domain.xml_desc(0))? else {
        return Ok(None);
    };
    Ok(Some(Current {
        guest,
        is_arriving: presence == Presence::Incoming,
        nvram: xml::nvram(&text).map_err(HypervisorError::from)?,
        next,
    }))
}

/// A guest that moves takes its lasting definition along: what that names and the
/// running one does not is used there from the next start on. Says which files are
/// only read; anything else ties the guest to its node.
fn note_next_start(domain: &Domain, guest: &mut Guest) -> CallResult<Vec<ReadFile>> {
    let inactive = domain.xml_desc(sys::VIR_DOMAIN_XML_INACTIVE);
    let Some(text) = errors::absent_is_none(inactive)? else {
        return Ok(Vec::new());
    };
    let outside = Outside {
        power_state: guest.power_state,
        persistent: true,
    };
    let next = xml::guest(&text, outside).map_err(HypervisorError::from)?;
    let mut ties: Vec<Immovable> = Vec::new();
    let mut reads: Vec<ReadFile> = next.reads;
    for disk in &next.disks {
        let now = guest.disks.iter().find(|now| now.target == disk.target);
        if now.is_some_and(|now| now.source == disk.source) || disk.source == DiskSource::Empty {
            continue;
        }
        match disk.local_path() {
            Some(path) if disk.read_only => reads.push(ReadFile {
                path: path.to_owned(),
                what: format!("disk {}", disk.target),
            }),
            _ => ties.push(Immovable {
                kind: ImmovableKind::Disk,
                what: format!("{}: from its next start on it has another", disk.target),
            }),
        }
    }
    let is_tied = |tie: &Immovable| guest.immovable.iter().any(|own| own.kind == tie.kind);
    let new = next.immovable.into_iter().filter(|tie| !is_tied(tie));
    ties.extend(new);
    guest.immovable.extend(ties);
    reads.retain(|file| !guest.reads.iter().any(|own| own.path == file.path));
    for file in &mut reads {
        file.what = format!("{}, from its next start on", file.what);
    }
    Ok(reads)
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
        guest.active_job = Some(SAVED.to_owned());
    }
    if presence.has_qemu() {
        guest.active_job = jobs::words(&domain)?.or(now.active_job.take());
    }
    let nvram = xml::nvram(&text).map_err(HypervisorError::from)?;
    let ended = xml::ended_chains(&text).map_err(HypervisorError::from)?;
    Ok(Some(Lasting {
        guest,
        now,
        nvram,
        ended,
    }))
}

/// A domain by its lasting definition.
pub(super) struct Lasting {
    guest: Guest,
    /// By its running one.
    now: Guest,
    /// Where the firmware's variables are.
    nvram: Option<String>,
    /// Drives whose definition spells the chain under them to its end.
    ended: Vec<String>,
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
        ended,
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
            Ok(backing) if !spells_another(disk, &backing, &ended) => disk.backing = backing,
            Ok(_) => obstacles.push(format!(
                "{}: its definition names other images under it than its image does",
                disk.target
            )),
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

/// Whether a definition has libvirt take other images under a disk than the headers
/// name, of which alone the rest of Drover speaks.
fn spells_another(disk: &Disk, below: &[BackingImage], ended: &[String]) -> bool {
    let same = |spelled: &BackingImage, image: &BackingImage| {
        spelled.path == image.path && spelled.format == image.format
    };
    let spelled = &disk.backing;
    let is_longer = spelled.len() > below.len();
    let is_shorter = spelled.len() < below.len() && ended.contains(&disk.target);
    let differs = spelled.iter().zip(below).any(|(s, b)| !same(s, b));
    is_longer || is_shorter || differs
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
    disk.virtual_bytes == 0
        && !matches!(disk.source, DiskSource::Empty)
        && !disk.target.contains('\0')
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
    let silences = measurer.fill(&mut guests).await;
    let digests = rebuild::digests(&found, measurer).await;
    let mut told = silences.into_iter().zip(digests);
    let reports = found.into_iter().map(|found| match found {
        Found::Unreadable(report) => *report,
        Found::Whole(whole) => {
            let (silence, digest) = told.next().unwrap_or_default();
            whole.report(silence, digest, usages)
        }
    });
    reports.collect()
}

impl Whole {
    fn report(
        self,
        unreadable: Option<String>,
        definition_digest: Option<String>,
        usages: &Usage,
    ) -> InstanceReport {
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
            definition_digest,
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
pub(super) struct InUse {
    users: Vec<User>,
    /// Paths whose storage does not answer, and what was there when it did.
    silent: Vec<(String, Option<Option<Identity>>)>,
    /// In words, images that cannot be read, and never were: what is beneath them is
    /// not known.
    unread: Vec<String>,
}

/// What one domain uses.
pub(super) struct User {
    /// Which.
    pub(super) id: InstanceId,
    /// Its name.
    pub(super) name: String,
    /// All of it.
    pub(super) paths: Vec<String>,
    /// Images whose headers may name further ones: path and format.
    tops: Vec<(String, String)>,
}

impl InUse {
    /// With what is beneath images of guests that are off, and with what is on storage
    /// that does not answer set apart.
    pub(super) async fn answering(mut self, measurer: &Measurer) -> Self {
        let (mut named, mut tops) = (Vec::new(), Vec::new());
        for (n, user) in self.users.iter_mut().enumerate() {
            named.extend(user.paths.drain(..).map(|path| (n, path)));
            tops.extend(user.tops.drain(..).map(|top| (n, top)));
        }
        let images = tops.iter().map(|(_, top)| top.clone()).collect();
        for ((n, _), beneath) in tops.into_iter().zip(measurer.beneath(images).await) {
            named.extend(beneath.paths.into_iter().map(|path| (n, path)));
            self.unread.extend(beneath.unread);
        }
        let paths = named.iter().map(|(_, path)| path.clone()).collect();
        let there = measurer.identities(paths).await;
        for ((n, path), at) in named.into_iter().zip(there) {
            match at {
                At::Answers => self.users[n].paths.push(path),
                At::Silent(last) => self.silent.push((path, last)),
            }
        }
        self
    }

    /// Whether a domain names a path whose storage does not answer.
    pub(super) fn is_silent(&self, path: &str) -> bool {
        self.silent.iter().any(|(silent, _)| silent == path)
    }

    /// All that they use, of what answers.
    pub(super) fn paths(self) -> Vec<String> {
        self.users.into_iter().flat_map(|user| user.paths).collect()
    }

    /// All that they use, for whoever takes that file away. Blocks.
    ///
    /// # Errors
    /// `Untold` if it is not known of a domain whether it uses the file.
    pub(super) fn all_paths(self, taken: &str) -> Result<Vec<String>, HypervisorError> {
        let own = image::identity(taken);
        let is_other = |(path, last): &&(String, Option<Option<Identity>>)| {
            path != taken && last.is_some_and(|last| last != own)
        };
        let silent = self.silent.iter().find(|silent| !is_other(silent));
        let silent = silent.map(|(path, _)| format!("the storage of {path} does not answer"));
        match silent.or_else(|| self.unread.first().cloned()) {
            None => Ok(self.paths()),
            Some(why) => Err(HypervisorError::Untold(format!(
                "whether a domain of this node uses {taken} cannot be told, as {why}: see to that \
                 storage"
            ))),
        }
    }

    /// One by one.
    pub(super) fn users(self) -> Vec<User> {
        self.users
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
            match xml::storage(&text) {
                Ok(storage) => {
                    user.paths.extend(storage.paths);
                    user.tops.extend(storage.tops);
                }
                // That costs no other guest of the node anything, nor this one a file.
                Err(_) => {
                    let paths = xml::perhaps_paths(&text);
                    let tops = paths.iter().map(|path| (path.clone(), "qcow2".to_owned()));
                    user.tops.extend(tops);
                    user.paths.extend(paths);
                }
            }
        }
        users.push(user);
    }
    Ok(InUse {
        users,
        silent: Vec::new(),
        unread: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_taken_away_while_a_domain_may_use_it_on_storage_that_is_silent() {
        let place = tempfile::tempdir().unwrap();
        let at = |name: &str| place.path().join(name).display().to_string();
        std::fs::write(at("own"), "").unwrap();
        let own = image::identity(&at("own"));
        let is_told = |path: &str, last| {
            let used = InUse {
                users: Vec::new(),
                silent: vec![(at(path), last)],
                unread: Vec::new(),
            };
            used.all_paths(&at("own")).is_ok()
        };
        assert!(is_told("other", Some(Some((0, 0)))), "another file");
        assert!(is_told("other", Some(None)), "none was there");
        assert!(!is_told("other", Some(own)), "the file by another name");
        assert!(!is_told("other", None), "it never answered");
        assert!(!is_told("own", Some(Some((0, 0)))), "its name");
    }

    #[test]
    fn a_definition_may_not_spell_another_chain_than_the_headers() {
        let image = |path: &str| BackingImage {
            path: path.to_owned(),
            format: "raw".to_owned(),
            allocated_bytes: 0,
        };
        let differs = |spelled: &[&str], below: &[&str], is_ended: bool| {
            let mut disk = Disk {
                target: "vda".to_owned(),
                device: "disk".to_owned(),
                source: DiskSource::File {
                    path: "/a".to_owned(),
                },
                format: "qcow2".to_owned(),
                cache: None,
                read_only: false,
                shareable: false,
                virtual_bytes: 0,
                allocated_bytes: 0,
                backing: Vec::new(),
            };
            disk.backing = spelled.iter().map(|path| image(path)).collect();
            let below: Vec<_> = below.iter().map(|path| image(path)).collect();
            let ended = is_ended.then(|| "vda".to_owned());
            spells_another(&disk, &below, &ended.into_iter().collect::<Vec<_>>())
        };
        assert!(!differs(&[], &["/b", "/c"], false), "not spelled");
        assert!(!differs(&["/b"], &["/b", "/c"], false), "as far as it goes");
        assert!(!differs(&["/b", "/c"], &["/b", "/c"], true));
        assert!(differs(&["/x"], &["/b"], false), "another image");
        assert!(differs(&["/b", "/c"], &["/b"], false), "one more");
        assert!(differs(&["/b"], &["/b", "/c"], true), "ends before");
        assert!(differs(&[], &["/b"], true), "ends at once");
    }
}

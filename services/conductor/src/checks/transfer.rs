//! Checks and plan of a transfer to another project: from what was asked, what
//! both projects are and what the node found, to what changes about the guest,
//! or to every reason why it cannot. Pure: the same input gives the same plan.

use std::collections::BTreeSet;

use drover_model::{
    api::compute::{DiskMove, LocationFact, NicMove, TransferFacts, TransferPlan},
    check::{CheckCode, CheckFailure, Side},
    guest::{Disk, DiskSource, Guest, Immovable, ImmovableKind, Nic, NicAttachment},
    ids::{HostName, MigrationId, ProjectId},
    migration::{ProjectTransfer, TransferMode, TransferOptions},
    project::{Location, Project, ProjectUsage, QuotaShortfall},
};
use drover_store::instances::InstanceRow;

use super::fail;

/// What is asked, and of whom.
#[derive(Debug, Clone, Copy)]
pub struct Hands<'a> {
    /// Keys what has to be made up.
    pub migration: MigrationId,
    /// The node.
    pub host: &'a HostName,
    /// The giver, if it is on the record.
    pub giver: Option<&'a Project>,
    /// The receiver.
    pub receiver: &'a Project,
    /// How.
    pub options: &'a TransferOptions,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Judged {
    /// The guest that changes hands, if it is there.
    pub guest: Option<Guest>,
    /// What changes, if nothing stands in the way.
    pub plan: Option<TransferPlan>,
    /// What that means, in words.
    pub words: Vec<String>,
    /// Every reason why not.
    pub failures: Vec<CheckFailure>,
}

/// What the record can say about the receiver: it exists, it may get instances,
/// it has not this one, and none of that name.
pub fn receiver(
    instance: &InstanceRow,
    transfer: &ProjectTransfer,
    project: Option<&Project>,
    others: &[InstanceRow],
) -> Vec<CheckFailure> {
    let id = &transfer.project;
    let mut failures = Vec::new();
    match project {
        None => failures.push(fail(
            CheckCode::UnknownProject,
            Side::Project,
            format!("there is no project {id}"),
            format!("see 'drover project list', or 'drover project create {id}'"),
        )),
        Some(project) if !project.enabled => failures.push(fail(
            CheckCode::ProjectDisabled,
            Side::Project,
            format!("project {id} may not get instances"),
            format!("'drover project set {id} --enable'"),
        )),
        Some(_) => {}
    }
    if instance.project == id.as_str() {
        failures.push(fail(
            CheckCode::SameProject,
            Side::Request,
            format!("it is project {id}'s already"),
            "name another project",
        ));
    }
    let name = transfer.options.name.as_ref().unwrap_or(&instance.name);
    let clashes = |other: &&InstanceRow| {
        let near = other.project == id.as_str() || other.host == instance.host;
        other.id != instance.id && other.name == *name && near
    };
    if let Some(other) = others.iter().find(clashes) {
        failures.push(fail(
            CheckCode::NameTaken,
            Side::Project,
            format!(
                "instance {} of project {} on {} is called {name} too",
                other.id, other.project, other.host
            ),
            "rename one of them: '--cold --name NAME' does it on the way",
        ));
    }
    failures
}

/// What the receiver may not have more of.
pub fn quota(project: &ProjectId, short: &[QuotaShortfall]) -> Vec<CheckFailure> {
    let failures = short.iter().map(|short| {
        let (resource, sum, limit) = (short.resource, short.would_be, short.limit);
        let option = match resource {
            "memory_mb" => "memory-mib",
            "disk_gb" => "disk-gib",
            other => other,
        };
        fail(
            CheckCode::Quota,
            Side::Project,
            format!("project {project} would have {sum} {resource}, and may have {limit}"),
            format!("free some, or 'drover project set {project} --{option} {sum}'"),
        )
    });
    failures.collect()
}

/// What the instance takes of a quota.
pub fn usage_of(instance: &InstanceRow) -> ProjectUsage {
    ProjectUsage {
        instances: 1,
        vcpus: u64::from(instance.vcpus),
        memory_mb: instance.memory_mib,
        disk_bytes: instance.disk_bytes,
    }
}

/// Networks and locations that the node is asked after.
pub fn questions(hands: Hands<'_>) -> (Vec<NicAttachment>, Vec<Location>) {
    let networks = hands.receiver.networks_on(hands.host);
    let networks = networks.into_values().cloned().collect();
    let sides = hands.giver.into_iter().chain([hands.receiver]);
    let locations = sides.filter_map(|p| p.storage_on(hands.host)).cloned();
    (networks, locations.collect())
}

/// Every check that needs the node, and the plan.
pub fn judge(hands: Hands<'_>, facts: &TransferFacts) -> Judged {
    let (Some(running), Some(lasting)) = (&facts.guest, &facts.lasting) else {
        return Judged {
            guest: None,
            plan: None,
            words: Vec::new(),
            failures: vec![fail(
                CheckCode::InstanceMissing,
                Side::Source,
                format!("libvirt on {} has no such domain", hands.host),
                "it was moved or undefined by hand; the record follows with the next report",
            )],
        };
    };
    let mut planner = Planner {
        hands,
        facts,
        mode: match running.power_state.is_active() {
            true => hands.options.mode,
            false => TransferMode::Cold,
        },
        words: Vec::new(),
        failures: Vec::new(),
    };
    let subject = match planner.mode {
        TransferMode::Live => running,
        TransferMode::Cold => lasting,
    };
    planner.guest(running, lasting);
    let nics = planner.nics(running, lasting);
    let disks = planner.disks(subject, lasting);
    planner.room(&disks);
    let plan = TransferPlan {
        mode: planner.mode,
        project: hands.receiver.id.clone(),
        project_name: hands.receiver.name.clone(),
        nics,
        disks,
        name: hands.options.name.clone().filter(|n| *n != running.name),
        title: hands.options.title.clone(),
    };
    Judged {
        guest: Some(subject.clone()),
        plan: planner.failures.is_empty().then_some(plan),
        words: planner.words,
        failures: planner.failures,
    }
}

struct Planner<'a> {
    hands: Hands<'a>,
    facts: &'a TransferFacts,
    mode: TransferMode,
    words: Vec<String>,
    failures: Vec<CheckFailure>,
}

impl Planner<'_> {
    fn fail(&mut self, code: CheckCode, side: Side, message: String, remedy: &str) {
        self.failures.push(fail(code, side, message, remedy));
    }

    // ---- the guest

    fn guest(&mut self, running: &Guest, lasting: &Guest) {
        let is_live = self.mode == TransferMode::Live;
        self.words
            .push(match (is_live, running.power_state.is_active()) {
                (true, _) => "the guest runs on while it changes hands".to_owned(),
                (false, true) => {
                    "the guest is shut down, and started again as the receiver's".to_owned()
                }
                (false, false) => "the guest is off, and stays off".to_owned(),
            });
        if !running.persistent {
            self.fail(
                CheckCode::InstanceState,
                Side::Instance,
                "its definition goes when it stops: nothing of the receiver's would last"
                    .to_owned(),
                "define it for good first ('virsh define')",
            );
        }
        if let Some(job) = running.active_job.as_ref().or(lasting.active_job.as_ref()) {
            self.fail(
                CheckCode::InstanceJob,
                Side::Instance,
                format!("libvirt is doing something else with it: {job}"),
                "wait for it, or end it ('virsh domjobabort', 'virsh blockjob --abort')",
            );
        }
        if !lasting.snapshots.is_empty() {
            self.fail(
                CheckCode::Snapshots,
                Side::Instance,
                format!(
                    "its snapshots hold the giver's definition, and would bring it back: {}",
                    lasting.snapshots.join(", ")
                ),
                "delete them ('virsh snapshot-delete')",
            );
        }
        self.own_options(is_live);
        for thing in both(running, lasting, |g| &g.immovable) {
            self.immovable(thing);
        }
    }

    fn own_options(&mut self, is_live: bool) {
        let options = self.hands.options;
        let wishes = [
            (options.name.is_some(), "libvirt renames no running domain"),
            (
                options.new_mac,
                "a NIC keeps its MAC address while its guest runs",
            ),
        ];
        for (_, why) in wishes.into_iter().filter(|(wished, _)| *wished && is_live) {
            let remedy = "leave it out, or transfer it with --cold";
            self.fail(CheckCode::Options, Side::Request, why.to_owned(), remedy);
        }
    }

    fn immovable(&mut self, thing: &Immovable) {
        use ImmovableKind as K;
        let code = match thing.kind {
            // They are the guest's own.
            K::EmulatedTpm | K::LaunchSecurity => return,
            K::Disk if self.hands.options.keep_disk => return,
            K::Disk => CheckCode::DiskNotCopyable,
            K::HostDevice => CheckCode::HostDevice,
            K::MediatedDevice => CheckCode::MediatedDevice,
            K::Filesystem => CheckCode::Filesystem,
            K::Tpm | K::Nvdimm | K::Interface | K::CharacterDevice => CheckCode::ImmovableDevice,
        };
        let (message, remedy) = match thing.kind {
            K::Disk => (thing.what.clone(), "--keep-disk leaves disks as they are"),
            _ => (
                format!("{} was granted to the giver", thing.what),
                "take it from the guest first",
            ),
        };
        self.fail(code, Side::Instance, message, remedy);
    }

    // ---- networks

    fn nics(&mut self, running: &Guest, lasting: &Guest) -> Vec<NicMove> {
        let subjects = match self.mode {
            TransferMode::Live => both(running, lasting, |g| &g.nics),
            TransferMode::Cold => lasting.nics.iter().collect(),
        };
        let mut used = BTreeSet::new();
        let mut moves: Vec<NicMove> = Vec::new();
        if self.mode == TransferMode::Live {
            self.plugged_in_half(running, lasting);
        }
        for nic in subjects {
            if moves.iter().any(|m| m.mac == nic.mac) {
                let message = format!(
                    "NIC {} is plugged into something else now than after the next start",
                    nic.mac
                );
                self.fail(
                    CheckCode::Network,
                    Side::Instance,
                    message,
                    "make both the same",
                );
                continue;
            }
            let Some(to) = self.target(nic, &mut used) else {
                continue;
            };
            let place = u64::try_from(moves.len()).unwrap_or(0);
            let wants_mac = self.hands.options.new_mac && self.mode == TransferMode::Cold;
            let new_mac = wants_mac.then(|| mac_of(self.hands.migration, place));
            if to != nic.attachment {
                let (from, to) = (words(&nic.attachment), words(&to));
                self.words
                    .push(format!("NIC {} goes from {from} to {to}", nic.mac));
            }
            if let Some(new) = &new_mac {
                self.words.push(format!("NIC {} becomes {new}", nic.mac));
            }
            moves.push(NicMove {
                mac: nic.mac.clone(),
                from: nic.attachment.clone(),
                to,
                new_mac,
            });
        }
        self.unused(&used);
        // Written anew, it keeps nothing of its old port.
        let has_port = |mac: &str| {
            lasting
                .nics
                .iter()
                .any(|n| n.mac == mac && n.port.is_some())
        };
        moves.retain(|m| m.from != m.to || m.new_mac.is_some() || has_port(&m.mac));
        moves
    }

    /// A NIC that only one of the two has could not be handed over in both.
    fn plugged_in_half(&mut self, running: &Guest, lasting: &Guest) {
        let has = |guest: &Guest, mac: &str| guest.nics.iter().any(|nic| nic.mac == mac);
        let half = both(running, lasting, |g| &g.nics)
            .into_iter()
            .filter(|nic| !has(running, &nic.mac) || !has(lasting, &nic.mac));
        let macs: Vec<&str> = half.map(|nic| nic.mac.as_str()).collect();
        for mac in macs {
            let message =
                format!("NIC {mac} is in only one of the running guest and its next start");
            let remedy = "plug it in, or take it out, in both ('--live --config')";
            self.fail(CheckCode::Network, Side::Instance, message, remedy);
        }
    }

    /// What a NIC is to be plugged into: what it is in already, where it stays.
    fn target(&mut self, nic: &Nic, used: &mut BTreeSet<String>) -> Option<NicAttachment> {
        match &nic.attachment {
            NicAttachment::User => return Some(NicAttachment::User),
            NicAttachment::Other { kind } if kind == "null" => return Some(nic.attachment.clone()),
            NicAttachment::Other { kind } => {
                let message = format!("NIC {} is of type {kind}: it cannot be re-plugged", nic.mac);
                let remedy = "take it from the guest first";
                self.fail(CheckCode::Network, Side::Instance, message, remedy);
                return None;
            }
            _ if nic.port.is_some() && self.mode == TransferMode::Live => {
                let port = nic.port.as_deref().unwrap_or_default();
                let message = format!(
                    "NIC {} has {port} of its own: libvirt re-plugs none such while it runs",
                    nic.mac
                );
                let remedy = "transfer it with --cold";
                self.fail(CheckCode::Network, Side::Instance, message, remedy);
                return None;
            }
            NicAttachment::Direct { .. } if self.mode == TransferMode::Live => {
                let message = format!(
                    "NIC {} sits on the node's own interface: libvirt re-plugs none while it runs",
                    nic.mac
                );
                let remedy = "transfer it with --cold";
                self.fail(CheckCode::Network, Side::Instance, message, remedy);
                return None;
            }
            _ => {}
        }
        let (receiver, host) = (self.hands.receiver, self.hands.host);
        let names = self.names_of(nic);
        let networks = receiver.networks_on(host);
        let found = match wished(self.hands.options, &names) {
            Some((old, new)) => {
                used.insert(old.clone());
                networks.get(new.as_str()).copied()
            }
            None if networks.values().any(|there| **there == nic.attachment) => {
                return Some(nic.attachment.clone());
            }
            None => names.iter().find_map(|n| networks.get(n.as_str()).copied()),
        };
        let Some(to) = found.cloned() else {
            self.no_network(nic, &names);
            return None;
        };
        if !self.facts.networks.contains(&to) {
            let message = format!("{} is not there, or down, on {host}", words(&to));
            let remedy = "bring it up on the node, or mend the project's networks";
            self.fail(CheckCode::Network, Side::Source, message, remedy);
        }
        Some(to)
    }

    /// What a NIC's network may be called: the giver's logical names first.
    fn names_of(&self, nic: &Nic) -> Vec<String> {
        let logical = self.hands.giver.into_iter().flat_map(|giver| {
            let all = giver.networks_on(self.hands.host).into_iter();
            all.filter(|(_, there)| **there == nic.attachment)
                .map(|(name, _)| name.to_owned())
        });
        let own = match &nic.attachment {
            NicAttachment::Bridge { bridge } => Some(bridge.clone()),
            NicAttachment::Network { network } => Some(network.clone()),
            NicAttachment::Direct { device } => Some(device.clone()),
            NicAttachment::User | NicAttachment::Other { .. } => None,
        };
        logical.chain(own).chain([nic.mac.clone()]).collect()
    }

    fn no_network(&mut self, nic: &Nic, names: &[String]) {
        let receiver = self.hands.receiver;
        let networks = receiver.networks_on(self.hands.host);
        let there: Vec<&str> = networks.into_keys().collect();
        let old = names.first().map_or("", String::as_str);
        let message = match wished(self.hands.options, names) {
            Some((_, new)) => format!(
                "project {} has no network {new} on {}",
                receiver.id, self.hands.host
            ),
            None => format!(
                "project {} has no network that takes the place of {} (NIC {})",
                receiver.id,
                words(&nic.attachment),
                nic.mac
            ),
        };
        let remedy = match there.as_slice() {
            [] => format!(
                "give it one: 'drover project set {} --network NAME=bridge:BRIDGE'",
                receiver.id
            ),
            there => format!("name one of its own: --network {old}={}", there.join("|")),
        };
        self.failures
            .push(fail(CheckCode::Network, Side::Project, message, remedy));
    }

    fn unused(&mut self, used: &BTreeSet<String>) {
        let keys = self.hands.options.networks.keys();
        let unused: Vec<&String> = keys.filter(|old| !used.contains(*old)).collect();
        for old in unused {
            let message = format!("no NIC of the guest is on {old}");
            let remedy = "name the giver's network, what it is on the node, or a NIC's MAC address";
            self.fail(CheckCode::Options, Side::Request, message, remedy);
        }
    }

    // ---- disks

    fn location(&self, project: Option<&Project>) -> Option<&LocationFact> {
        let wanted = project?.storage_on(self.hands.host)?;
        let mut facts = self.facts.locations.iter();
        facts.find(|fact| fact.location == *wanted)
    }

    fn directory(&self, project: Option<&Project>) -> Option<&str> {
        self.location(project)?.directory.as_deref().ok()
    }

    fn disks(&mut self, guest: &Guest, lasting: &Guest) -> Vec<DiskMove> {
        let giver = self.directory(self.hands.giver).map(str::to_owned);
        let giver = giver.as_deref();
        for shared in &self.facts.shared {
            let message = format!("{} is {}'s too", shared.path, shared.domain);
            let remedy = "a disk that two guests use has one owner: take it from one of them";
            self.fail(CheckCode::DiskInUse, Side::Instance, message, remedy);
        }
        if self.hands.options.keep_disk {
            self.words
                .push("disks stay where they are, as asked".to_owned());
            return Vec::new();
        }
        let place = self.directory(Some(self.hands.receiver)).map(str::to_owned);
        // What lies beside its disks is told of the lasting guest alone.
        for file in &lasting.files {
            if is_givers(&file.path, giver, place.as_deref()) {
                let message = format!("{} lies in the giver's storage", file.path);
                let remedy = "move it by hand, with the guest off";
                self.fail(CheckCode::ImmovableDevice, Side::Instance, message, remedy);
            }
        }
        let receiver = self.receivers_directory(guest, giver);
        let mut moves = Vec::new();
        for disk in &guest.disks {
            let moved = self.disk(disk, giver, receiver.as_deref(), &moves);
            moves.extend(moved);
        }
        for disk in &moves {
            if lasting.has_unlisted_snapshots(&disk.from) {
                let message = format!("{}: {} holds snapshots inside", disk.target, disk.from);
                let remedy = "delete them ('qemu-img snapshot -l' lists them), or --keep-disk";
                self.fail(CheckCode::Snapshots, Side::Instance, message, remedy);
            }
        }
        moves
    }

    /// Where disks go, if they go anywhere.
    fn receivers_directory(&mut self, guest: &Guest, giver: Option<&str>) -> Option<String> {
        let receiver = self.hands.receiver;
        let Some(location) = receiver.storage_on(self.hands.host) else {
            let mut paths = guest.disks.iter().flat_map(|disk| {
                let below = disk.backing.iter().map(|image| image.path.as_str());
                disk.local_path().into_iter().chain(below)
            });
            if let Some(path) = paths.find(|path| is_within(path, giver)) {
                let message = format!(
                    "{path} lies in the giver's storage, and project {} has none on {}",
                    receiver.id, self.hands.host
                );
                let remedy = format!(
                    "'drover project set {} --storage directory:PATH', or --keep-disk",
                    receiver.id
                );
                self.fail(CheckCode::Storage, Side::Project, message, &remedy);
            }
            return None;
        };
        let fact = self.location(Some(receiver)).map(|f| f.directory.clone());
        match fact {
            Some(Ok(directory)) => Some(directory),
            Some(Err(why)) => {
                let message = format!("{location} on {}: {why}", self.hands.host);
                let remedy = "make it on the node, or mend the project's storage";
                self.fail(CheckCode::Storage, Side::Source, message, remedy);
                None
            }
            None => None,
        }
    }

    fn disk(
        &mut self,
        disk: &Disk,
        giver: Option<&str>,
        receiver: Option<&str>,
        others: &[DiskMove],
    ) -> Option<DiskMove> {
        let target = &disk.target;
        let not_copyable = |planner: &mut Self, why: &str| {
            let message = format!("{target}: {why}");
            let remedy = "--keep-disk leaves disks where they are";
            planner.fail(CheckCode::DiskNotCopyable, Side::Instance, message, remedy);
            None
        };
        let path = match &disk.source {
            DiskSource::File { path } => path,
            DiskSource::Empty => return None,
            // Named among what cannot be moved.
            DiskSource::Other { .. } => return None,
            DiskSource::Block { path } => {
                receiver?;
                return not_copyable(
                    self,
                    &format!("block device {path} is in no project's storage"),
                );
            }
            DiskSource::Network { protocol, name } => {
                receiver?;
                return not_copyable(
                    self,
                    &format!("{protocol} {name} is in no project's storage"),
                );
            }
        };
        let directory = receiver?;
        let givers = |path: &str| is_givers(path, giver, Some(directory));
        let below = disk.backing.iter();
        let flatten = below.clone().any(|image| givers(&image.path));
        if is_within(path, Some(directory)) && !givers(path) {
            return match flatten {
                true => not_copyable(self, "what is below it lies in the giver's storage"),
                false => None,
            };
        }
        if disk.read_only {
            return match givers(path) {
                true => not_copyable(
                    self,
                    &format!("{path} is the giver's, and is only read: eject it"),
                ),
                false => None,
            };
        }
        if disk.shareable {
            return not_copyable(self, "it is marked as shared between guests");
        }
        if !matches!(disk.format.as_str(), "raw" | "qcow2") {
            return not_copyable(self, &format!("its format is {}", disk.format));
        }
        let name = path.rsplit('/').next().unwrap_or_default();
        let to = format!("{}/{name}", directory.trim_end_matches('/'));
        let receiver = self.hands.receiver;
        let taken = self
            .location(Some(receiver))
            .is_some_and(|f| f.taken.iter().any(|t| t == name));
        if taken || others.iter().any(|other| other.to == to) {
            let message = format!("{to} is there already: nothing is written over it");
            let remedy = "move it out of the way, or rename the guest's disk";
            self.fail(CheckCode::DiskExists, Side::Source, message, remedy);
        }
        // The running definition does not tell how large they are.
        let lasting = self.facts.lasting.iter().flat_map(|guest| &guest.disks);
        let measured = lasting
            .filter(|d| d.target == *target)
            .flat_map(|d| &d.backing);
        let below_bytes: u64 = measured.map(|image| image.allocated_bytes).sum();
        self.words.push(format!(
            "disk {target} goes from {path} to {to}{}",
            if flatten {
                ", with what is below it"
            } else {
                ""
            }
        ));
        Some(DiskMove {
            target: target.clone(),
            from: path.clone(),
            to,
            format: disk.format.clone(),
            backing: disk.backing.clone(),
            flatten,
            data_bytes: disk.allocated_bytes + if flatten { below_bytes } else { 0 },
        })
    }

    /// Room for what is really written: a file that only gets another name takes none.
    fn room(&mut self, disks: &[DiskMove]) {
        let receiver = self.hands.receiver;
        let Some(fact) = self.location(Some(receiver)).cloned() else {
            return;
        };
        let takes_room = |disk: &&DiskMove| {
            let mut files = self.facts.files.iter();
            let here = files.find(|file| file.path == disk.from);
            let renamed = here.is_some_and(|file| file.file_system == fact.file_system);
            self.mode == TransferMode::Live || disk.flatten || !renamed
        };
        let wanted: u64 = disks.iter().filter(takes_room).map(|d| d.data_bytes).sum();
        if wanted > fact.free_bytes {
            let message = format!(
                "{} on {}: its disks take {} MiB, {} MiB are free",
                fact.location,
                self.hands.host,
                wanted.div_ceil(1 << 20),
                fact.free_bytes >> 20
            );
            let remedy = "make room there, or --keep-disk";
            self.fail(CheckCode::DiskSpace, Side::Source, message, remedy);
        }
    }
}

/// Which network is wished for one that is called so.
fn wished<'a>(options: &'a TransferOptions, names: &[String]) -> Option<(&'a String, &'a String)> {
    let mut wishes = options.networks.iter();
    wishes.find(|(old, _)| names.iter().any(|name| name.eq_ignore_ascii_case(old)))
}

/// What two descriptions of a guest have, each thing once.
fn both<'a, T: PartialEq>(
    running: &'a Guest,
    lasting: &'a Guest,
    of: impl Fn(&'a Guest) -> &'a Vec<T>,
) -> Vec<&'a T> {
    let mut all: Vec<&T> = of(running).iter().collect();
    let more = of(lasting)
        .iter()
        .filter(|thing| !of(running).contains(thing));
    all.extend(more);
    all
}

/// Whether a path lies in a directory.
fn is_within(path: &str, directory: Option<&str>) -> bool {
    directory.is_some_and(|directory| {
        let rest = path.strip_prefix(directory.trim_end_matches('/'));
        rest.is_some_and(|rest| rest.starts_with('/'))
    })
}

/// Whether a path lies in the giver's directory, and not in a receiver's within it.
fn is_givers(path: &str, giver: Option<&str>, receiver: Option<&str>) -> bool {
    let receivers =
        is_within(path, receiver) && giver.map_or(0, str::len) <= receiver.map_or(0, str::len);
    is_within(path, giver) && !receivers
}

fn words(attachment: &NicAttachment) -> String {
    match attachment {
        NicAttachment::Bridge { bridge } => format!("bridge {bridge}"),
        NicAttachment::Network { network } => format!("libvirt network {network}"),
        NicAttachment::Direct { device } => format!("interface {device}"),
        NicAttachment::User => "QEMU's own network".to_owned(),
        NicAttachment::Other { kind } => format!("a network of type {kind}"),
    }
}

/// A MAC address in QEMU's range, made of a migration's random bits, so that the
/// same plan has the same.
fn mac_of(migration: MigrationId, place: u64) -> String {
    let bytes = migration.0.as_bytes();
    let random = u32::from_be_bytes([0, bytes[13], bytes[14], bytes[15]]);
    let place = u32::try_from(place).unwrap_or(0);
    let [_, a, b, c] = (random.wrapping_add(place) & 0x00ff_ffff).to_be_bytes();
    format!("52:54:00:{a:02x}:{b:02x}:{c:02x}")
}

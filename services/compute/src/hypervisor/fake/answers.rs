//! What a node says when it is asked: its inventory, its domains, and what it
//! knows of a guest that may come.

use drover_model::{
    api::compute::{CpuVerdict, DiskFact, Mark, NetworkFact},
    guest::{Disk, Guest, GuestFile, Immovable, ImmovableKind, Presence},
    ids::{HostName, InstanceId},
    node::{InstanceReport, Inventory},
};
use tokio::time::Instant;

use super::{
    super::{DestinationAnswer, DestinationQuestion},
    node::Domain,
    storage::{Content, directory_of},
    world::World,
};

/// Where a node keeps the state of emulated TPMs.
pub(super) const TPM_STATE: &str = "/var/lib/libvirt/swtpm";
/// Where a node keeps its guests' disks unless it is told otherwise.
pub(super) const IMAGES: &str = "/var/lib/libvirt/images";

impl World {
    pub(super) fn inventory(&self, host: &HostName) -> Inventory {
        let spec = &self.node(host).spec;
        let volume = self.storage.volume_at(host, IMAGES);
        Inventory {
            hypervisor_type: spec.hypervisor_type.clone(),
            hypervisor_version: spec.hypervisor_version,
            libvirt_version: spec.libvirt_version,
            arch: spec.arch.clone(),
            cpu_model: spec.cpu_model.clone(),
            kvm: spec.kvm,
            vcpus: spec.vcpus,
            memory_mib: spec.memory_mib,
            disk_bytes: volume.map_or(0, |v| v.capacity_bytes()),
            disk_free_bytes: volume.map_or(0, |v| v.free_bytes()),
        }
    }

    pub(super) fn reports(&self, host: &HostName, now: Instant) -> Vec<InstanceReport> {
        let domains = self.node(host).domains.values();
        domains.map(|d| self.report(host, d, now)).collect()
    }

    fn report(&self, host: &HostName, domain: &Domain, now: Instant) -> InstanceReport {
        let guest = &domain.guest;
        let notes = self.notes(guest.id);
        InstanceReport {
            id: guest.id,
            name: guest.name.clone(),
            project: guest.project.clone(),
            generation: guest.generation,
            power_state: domain.state,
            incoming: domain.incoming,
            vcpus: guest.vcpus,
            memory_mib: guest.memory_mib,
            disk_bytes: guest.disks.iter().map(|d| d.virtual_bytes).sum(),
            migration: None,
            usage: self.usage(domain, now),
            definition_digest: Some(self.digest(host, domain)),
            autostart: domain.autostart || notes.autostart,
            unreadable: self.unreadable.get(&guest.id).cloned(),
            wishes: notes.wishes,
        }
    }

    pub(super) fn describe(&self, host: &HostName, id: InstanceId) -> Option<Guest> {
        let domain = self.domain(host, id)?;
        let mut guest = self.filled_in(host, domain, &domain.guest);
        // A move takes them along, for its next start.
        let next = only_in(domain.lasting(), &guest);
        let ties = next.map(|disk| Immovable {
            kind: ImmovableKind::Disk,
            what: format!("{}: from its next start on it has another", disk.target),
        });
        let ties: Vec<Immovable> = ties.collect();
        guest.immovable.extend(ties);
        Some(guest)
    }

    /// One of a domain's descriptions, with what is so now.
    fn filled_in(&self, host: &HostName, domain: &Domain, described: &Guest) -> Guest {
        let mut guest = described.clone();
        guest.power_state = domain.state;
        guest.active_job = match self.journey_at(host, guest.id) {
            Some(journey) if journey.from == *host => Some("migration out".to_owned()),
            Some(_) => Some("migration in".to_owned()),
            None => domain.job_besides(),
        };
        for disk in &mut guest.disks {
            let file = disk.local_path().and_then(|p| self.storage.file(host, p));
            disk.allocated_bytes = file.map_or(0, |f| f.allocated_bytes);
        }
        // Only who asks for the lasting guest is told of them.
        guest.files.clear();
        guest
    }

    /// A domain with what lies under its disks and beside them, as files tell.
    pub(super) fn describe_lasting(&self, host: &HostName, id: InstanceId) -> Option<Guest> {
        let domain = self.domain(host, id)?;
        let mut guest = self.filled_in(host, domain, domain.lasting());
        let running = only_in(&guest, &domain.guest);
        let other = |disk: &Disk| format!("{}: the running guest has another disk", disk.target);
        let mut obstacles: Vec<String> = running.map(other).collect();
        let carried = |d: &&mut Disk| d.local_path().is_some() && d.format == "qcow2";
        for disk in guest.disks.iter_mut().filter(carried) {
            let path = disk.local_path().unwrap_or_default().to_owned();
            let mut missing = |path: &str| {
                obstacles.push(format!(
                    "{}: {path}: No such file or directory",
                    disk.target
                ));
            };
            if self.storage.file(host, &path).is_none() {
                missing(&path);
            }
            for image in &mut disk.backing {
                match self.storage.file(host, &image.path) {
                    Some(file) => image.allocated_bytes = file.allocated_bytes,
                    None => missing(&image.path),
                }
            }
        }
        let kind = ImmovableKind::Disk;
        let obstacles = obstacles.into_iter().map(|what| Immovable { kind, what });
        guest.immovable.extend(obstacles);
        let files = domain.lasting().files.iter();
        let there = files.filter_map(|file| {
            let found = self.storage.file(host, &file.path)?;
            Some(GuestFile {
                allocated_bytes: found.allocated_bytes,
                ..file.clone()
            })
        });
        guest.files = there.collect();
        Some(guest)
    }

    pub(super) fn presence(&self, host: &HostName, id: InstanceId) -> Presence {
        self.domain(host, id)
            .map_or(Presence::Absent, Domain::presence)
    }

    pub(super) fn answer(
        &self,
        host: &HostName,
        question: &DestinationQuestion<'_>,
    ) -> DestinationAnswer {
        let guest = question.guest;
        let spec = &self.node(host).spec;
        let networks = guest.nics.iter().map(|nic| NetworkFact {
            mac: nic.mac.clone(),
            attachment: nic.attachment.clone(),
            present: spec.has_attachment(&nic.attachment),
        });
        DestinationAnswer {
            emulator_present: spec.emulators.contains(&guest.emulator),
            machine_supported: spec.machines.contains(&guest.machine),
            virt_type_supported: spec.runs(&guest.virt_type),
            cpu: self.cpu_verdict(host, guest),
            networks: networks.collect(),
            same_uuid: self.presence(host, guest.id),
            same_name: self.other_of_name(host, guest),
            disks: self.disk_facts(host, question),
        }
    }

    fn cpu_verdict(&self, host: &HostName, guest: &Guest) -> CpuVerdict {
        let spec = &self.node(host).spec;
        let unknown = |detail: &str| CpuVerdict::Unknown {
            detail: detail.to_owned(),
        };
        let Some(cpu_xml) = &guest.cpu_xml else {
            return unknown("the guest's definition names no CPU");
        };
        if let Some(detail) = &spec.cpu_unknown {
            return unknown(detail);
        }
        match spec.missing_features(cpu_xml) {
            missing if missing.is_empty() => CpuVerdict::Compatible,
            missing => CpuVerdict::Incompatible {
                detail: format!("missing features: {}", missing.join(", ")),
            },
        }
    }

    pub(super) fn other_of_name(&self, host: &HostName, guest: &Guest) -> Option<InstanceId> {
        self.node(host)
            .domains
            .values()
            .find(|d| d.guest.name == guest.name && d.guest.id != guest.id)
            .map(|d| d.guest.id)
    }

    fn disk_facts(&self, host: &HostName, question: &DestinationQuestion<'_>) -> Vec<DiskFact> {
        let disks = question.guest.disks.iter();
        disks
            .filter_map(|disk| Some((disk, disk.local_path()?)))
            .map(|(disk, path)| {
                let directory = directory_of(path);
                let volume = self.storage.volume_at(host, directory);
                DiskFact {
                    target: disk.target.clone(),
                    shared: question
                        .marks
                        .iter()
                        .any(|m| m.directory == directory && self.sees_mark(host, m)),
                    exists: self.storage.file(host, path).is_some(),
                    directory_exists: self.storage.has_directory(host, directory),
                    file_system: volume.map_or_else(String::new, |v| v.name.clone()),
                    free_bytes: volume.map_or(0, |v| v.free_bytes()),
                    missing_backing: self.missing_backing(host, disk),
                }
            })
            .collect()
    }

    pub(super) fn sees_mark(&self, host: &HostName, mark: &Mark) -> bool {
        let file = mark
            .path
            .as_ref()
            .and_then(|path| self.storage.file(host, path));
        file.is_some_and(|f| f.content == Content::Text(mark.content.clone()))
    }

    pub(super) fn missing_backing(&self, host: &HostName, disk: &Disk) -> Vec<String> {
        let paths = disk.backing.iter().map(|image| &image.path);
        paths
            .filter(|path| self.storage.file(host, path).is_none())
            .cloned()
            .collect()
    }
}

/// Disks of one description that are not, or otherwise, in another.
fn only_in<'a>(one: &'a Guest, other: &'a Guest) -> impl Iterator<Item = &'a Disk> {
    let is_same = |a: &Disk, b: &Disk| a.target == b.target && a.source == b.source;
    let disks = one.disks.iter();
    disks.filter(move |a| !other.disks.iter().any(|b| is_same(a, b)))
}

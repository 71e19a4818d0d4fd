//! A migration's begin: all that libvirt and QEMU check by themselves before
//! the first byte is sent, with libvirt's rules for what they refuse.

use std::collections::BTreeMap;

use drover_model::{
    guest::{Guest, PowerState, Presence},
    ids::HostName,
};
use tokio::{sync::watch, time::Instant};

use super::{
    super::{Event, HypervisorError, MigrateSpec, Result},
    journey::{Journey, Outcome},
    node::{CpuTime, Domain, Libvirtd, Memory},
    world::World,
};

fn failed<T>(words: impl Into<String>) -> Result<T> {
    Err(HypervisorError::Failed(words.into()))
}

fn wrong_state<T>(words: impl Into<String>) -> Result<T> {
    Err(HypervisorError::WrongState(words.into()))
}

impl World {
    /// Begins a migration; its end is told through what this returns.
    pub(super) fn begin(
        &mut self,
        from: &HostName,
        spec: MigrateSpec,
        now: Instant,
    ) -> Result<watch::Receiver<Outcome>> {
        let id = spec.instance;
        self.check_source(from, &spec)?;
        let to = self.destination_of(from, &spec.dest_libvirt_uri)?;
        let Some(source) = self.domain(from, id) else {
            return Err(HypervisorError::NoSuchGuest(id));
        };
        let source = source.clone();
        self.check_destination(&to, &source.guest)?;
        let disk_bytes = self.check_disks_of(from, &to, &source.guest, &spec)?;
        let ends = (from.clone(), to.clone());
        let mut journey = Journey::new(spec, ends, source.load, disk_bytes, now);
        journey.guest_ran = source.runs();
        if !journey.guest_ran {
            journey.precopy.stop_guest();
        }
        journey.scripts = self.scripts.remove(&id).unwrap_or_default();
        let outcome = journey.outcome.subscribe();
        self.journeys.insert(id, journey);
        self.expect_incoming(&to, source);
        Ok(outcome)
    }

    fn check_source(&self, from: &HostName, spec: &MigrateSpec) -> Result<()> {
        let id = spec.instance;
        let Some(domain) = self.domain(from, id) else {
            return Err(HypervisorError::NoSuchGuest(id));
        };
        if self.journeys.contains_key(&id) {
            return wrong_state("another migration job is already running for this domain");
        }
        if let Some(job) = &domain.other_job {
            return wrong_state(format!("domain has a job of its own: {job}"));
        }
        if !domain.mirrors.is_empty() {
            return wrong_state("domain has active block job");
        }
        if domain.incoming || !domain.state.is_active() {
            return wrong_state("domain is not running");
        }
        if !domain.whole {
            return wrong_state("domain lost its memory in post-copy");
        }
        match domain.guest.immovable.first() {
            Some(device) => failed(format!("cannot migrate domain with {}", device.what)),
            None => Ok(()),
        }
    }

    fn destination_of(&self, from: &HostName, uri: &str) -> Result<HostName> {
        let host = uri
            .split_once("://")
            .and_then(|(_, rest)| rest.split(['/', ':', '?']).next())
            .unwrap_or_default();
        let Some(to) = self.host_at(host) else {
            return failed(format!("unable to resolve address '{host}'"));
        };
        if to == *from {
            return failed("Attempt to migrate guest to the same host");
        }
        let node = self.node(&to);
        let blocked = node.spec.blocked_ports.contains(&node.spec.libvirt_port);
        if !self.is_linked(from, &to) || blocked || node.libvirtd == Libvirtd::Dead {
            return failed(format!("unable to connect to server at '{uri}'"));
        }
        Ok(to)
    }

    /// The node of that name or address.
    pub(super) fn host_at(&self, name_or_address: &str) -> Option<HostName> {
        self.nodes
            .iter()
            .find(|(name, node)| {
                name.as_str() == name_or_address || node.address == name_or_address
            })
            .map(|(name, _)| name.clone())
    }

    /// What the destination's libvirt and QEMU refuse by themselves.
    fn check_destination(&self, to: &HostName, guest: &Guest) -> Result<()> {
        if self.presence(to, guest.id).is_active()
            || self.presence(to, guest.id) == Presence::Incoming
        {
            return failed(format!("domain '{}' is already active", guest.name));
        }
        self.check_name(to, guest)?;
        self.check_fit(to, guest)
    }

    /// No other domain of its name is there.
    pub(super) fn check_name(&self, to: &HostName, guest: &Guest) -> Result<()> {
        match self.other_of_name(to, guest) {
            Some(other) => {
                let name = &guest.name;
                failed(format!("domain '{name}' already exists with uuid {other}"))
            }
            None => Ok(()),
        }
    }

    /// A QEMU for it can be started.
    pub(super) fn check_fit(&self, to: &HostName, guest: &Guest) -> Result<()> {
        let node = self.node(to);
        if !node.spec.emulators.contains(&guest.emulator) {
            return failed(format!("Cannot check QEMU binary {}", guest.emulator));
        }
        if !node.spec.machines.contains(&guest.machine) {
            return failed(format!("unsupported machine type {}", guest.machine));
        }
        if !node.spec.runs(&guest.virt_type) || node.spec.arch != guest.arch {
            let (virt, arch) = (&guest.virt_type, &guest.arch);
            return failed(format!("no emulator for domain type {virt}, arch {arch}"));
        }
        let missing = node
            .spec
            .missing_features(guest.cpu_xml.as_deref().unwrap_or(""));
        if !missing.is_empty() {
            let missing = missing.join(",");
            return failed(format!(
                "guest CPU doesn't match: missing features: {missing}"
            ));
        }
        let absent = guest
            .nics
            .iter()
            .find(|nic| !node.spec.has_attachment(&nic.attachment));
        if let Some(nic) = absent {
            return failed(format!(
                "cannot plug in interface {}: no such device",
                nic.mac
            ));
        }
        if node.used_memory_mib() + guest.memory_mib > node.spec.memory_mib {
            return failed("cannot set up guest memory: Cannot allocate memory");
        }
        Ok(())
    }

    /// Whether the destination's QEMU can open every disk; bytes to copy.
    fn check_disks_of(
        &self,
        from: &HostName,
        to: &HostName,
        guest: &Guest,
        spec: &MigrateSpec,
    ) -> Result<u64> {
        let mut bytes = 0;
        for target in &spec.copied_disks {
            let Some(disk) = guest.disks.iter().find(|d| d.target == *target) else {
                return failed(format!("disk target {target} not found"));
            };
            let Some(path) = disk.local_path() else {
                return failed(format!("disk {target} cannot be copied"));
            };
            if self.storage.is_shared(path, from, to) {
                return failed(format!("{path}: Failed to get \"write\" lock"));
            }
            bytes += self
                .storage
                .file(from, path)
                .map_or(0, |f| f.allocated_bytes);
        }
        for disk in &guest.disks {
            let copied = spec.copied_disks.contains(&disk.target);
            let local = disk.local_path().is_some() && !disk.read_only;
            let vouched =
                spec.shared_disks.contains(&disk.target) && disk.is_coherent_when_shared();
            // Fake storage is of no kind that libvirt knows to be shared.
            if local && !copied && !vouched {
                return failed("Unsafe migration: without shared storage is unsafe");
            }
            let path = disk.local_path().map(str::to_owned);
            let needed = path.into_iter().chain(self.missing_backing(to, disk));
            for path in needed {
                if self.storage.file(to, &path).is_none() {
                    return failed(format!(
                        "Could not open '{path}': No such file or directory"
                    ));
                }
            }
        }
        Ok(bytes)
    }

    fn expect_incoming(&mut self, to: &HostName, source: Domain) {
        let id = source.guest.id;
        let defined_before = self.domain(to, id).is_some();
        let domain = Domain {
            state: PowerState::Paused,
            incoming: true,
            defined_before,
            whole: false,
            memory: Memory::at(std::time::Duration::ZERO),
            completed: None,
            other_job: None,
            mirrors: BTreeMap::new(),
            left_by_script: false,
            lost_its_other_half: false,
            goes_off_at: None,
            autostart: false,
            cpu: CpuTime::default(),
            // As it lasts now: what is defined from now on does not come along.
            next: source.next,
            guest: Guest {
                persistent: defined_before,
                ..source.guest
            },
            load: source.load,
            tokens: source.tokens,
        };
        self.node_mut(to).domains.insert(id, domain);
        self.node(to).emit(Event::Guest(id));
    }
}

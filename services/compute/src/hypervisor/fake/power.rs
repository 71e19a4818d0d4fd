//! Guests that shut down, are stopped, and are started: what a boot may find.

use std::time::Duration;

use drover_model::{
    guest::{Guest, PowerState, Presence},
    ids::{HostName, InstanceId},
};
use tokio::time::Instant;

use super::{
    super::{HypervisorError, Result},
    ledger::Violation,
    node::{CpuTime, Memory},
    storage::Content,
    vcpus::own_disks,
    world::World,
};

fn failed<T>(words: impl Into<String>) -> Result<T> {
    Err(HypervisorError::Failed(words.into()))
}

fn wrong_state<T>(words: impl Into<String>) -> Result<T> {
    Err(HypervisorError::WrongState(words.into()))
}

impl World {
    /// Somebody presses a guest's power button. The first time counts.
    pub(super) fn shut_down(
        &mut self,
        host: &HostName,
        id: InstanceId,
        now: Instant,
    ) -> Result<()> {
        let obeys_after = self.natures.get(&id).and_then(|n| n.habits.obeys_after);
        let Some(domain) = self.domain_mut(host, id) else {
            return Err(HypervisorError::NoSuchGuest(id));
        };
        if !domain.runs() {
            return wrong_state("domain is not running");
        }
        if let Some(time) = obeys_after {
            domain.goes_off_at.get_or_insert(now + time);
        }
        Ok(())
    }

    /// Whether a guest has done what it was asked to, and is not tidied up yet.
    pub(super) fn is_going_off(
        &self,
        host: &HostName,
        id: InstanceId,
        now: Instant,
    ) -> Result<bool> {
        let Some(domain) = self.domain(host, id) else {
            return Err(HypervisorError::NoSuchGuest(id));
        };
        let nature = self.natures.get(&id);
        let lingers = nature.map_or(Duration::ZERO, |n| n.habits.in_shutdown);
        let is_soon = domain.goes_off_at.is_some_and(|at| at <= now + lingers);
        Ok(domain.runs() && is_soon)
    }

    /// The guest that will be off next, of those that were asked to shut down.
    pub(super) fn next_shutdown(&self) -> Option<(Instant, HostName, InstanceId)> {
        let nodes = self.nodes.iter();
        let all = nodes.flat_map(|(host, node)| {
            let domains = node.domains.iter();
            domains.filter_map(move |(id, d)| Some((d.goes_off_at?, host, *id)))
        });
        let next = all.min_by_key(|(at, ..)| *at);
        next.map(|(at, host, id)| (at, host.clone(), id))
    }

    /// A guest has done what it was asked to.
    pub(super) fn has_shut_down(&mut self, host: &HostName, id: InstanceId, at: Instant) {
        let Some(domain) = self.domain_mut(host, id) else {
            return;
        };
        let obeys = domain.goes_off_at.take().is_some() && domain.runs();
        if obeys {
            self.qemu_dies(host, id, at);
        }
    }

    pub(super) fn stop(&mut self, host: &HostName, id: InstanceId, now: Instant) -> Result<()> {
        match self.presence(host, id) {
            Presence::Absent => Err(HypervisorError::NoSuchGuest(id)),
            Presence::Incoming => wrong_state("domain waits for a migration"),
            Presence::Present(state) => {
                if state.is_active() {
                    self.qemu_dies(host, id, now);
                }
                Ok(())
            }
        }
    }

    pub(super) fn start(&mut self, host: &HostName, id: InstanceId, now: Instant) -> Result<()> {
        match self.presence(host, id) {
            Presence::Absent => return Err(HypervisorError::NoSuchGuest(id)),
            Presence::Incoming => return wrong_state("domain waits for a migration"),
            Presence::Present(state) if state.is_active() => return Ok(()),
            Presence::Present(_) => {}
        }
        let Some(guest) = self.domain(host, id).map(|d| d.guest.clone()) else {
            return Err(HypervisorError::NoSuchGuest(id));
        };
        self.check_fit(host, &guest)?;
        self.check_drives(host, &guest)?;
        let counter = self.count_at_boot(host, id, now);
        self.ledger.boots(id, counter);
        if let Some(domain) = self.domain_mut(host, id) {
            domain.memory = Memory::at(counter);
            domain.cpu = CpuTime::from(counter);
            domain.whole = true;
            domain.completed = None;
            domain.state = PowerState::Shutdown;
        }
        self.check_files(host, id);
        self.start_vcpus(host, id, now);
        Ok(())
    }

    /// QEMU can open every drive.
    fn check_drives(&self, host: &HostName, guest: &Guest) -> Result<()> {
        for disk in &guest.disks {
            let path = disk.local_path().map(str::to_owned);
            let needed = path.into_iter().chain(self.missing_backing(host, disk));
            for path in needed {
                if self.storage.file(host, &path).is_none() {
                    return failed(format!(
                        "Could not open '{path}': No such file or directory"
                    ));
                }
            }
        }
        Ok(())
    }

    /// Where a guest's count goes on: where it stopped, which its disks must hold
    /// ([`World::check_disks`] sees to that); or, if somebody gave leave to go
    /// back, where older disks have it.
    fn count_at_boot(&mut self, host: &HostName, id: InstanceId, now: Instant) -> Duration {
        let ran = self.ledger.ran(id, now);
        let has_disks = self
            .domain(host, id)
            .is_some_and(|d| !own_disks(d).is_empty());
        let written = self.last_written(host, id);
        if has_disks && written < ran && self.ledger.goes_back(id) {
            written
        } else {
            ran
        }
    }

    /// The files beside a guest's disks are there and its own.
    fn check_files(&mut self, host: &HostName, id: InstanceId) {
        let Some(nature) = self.natures.get(&id) else {
            return;
        };
        let lost = nature.file_tokens.iter().filter_map(|(path, token)| {
            match self.storage.file(host, path).map(|f| &f.content) {
                Some(Content::Disk { token: t, .. }) if t == token => None,
                Some(_) => Some(format!("file {path} is another's")),
                None => Some(format!("file {path} is gone")),
            }
        });
        for what in lost.collect::<Vec<_>>() {
            self.ledger.record(Violation::DiskLost {
                guest: id,
                node: host.clone(),
                what,
            });
        }
    }
}

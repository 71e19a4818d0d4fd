//! A copy's vCPUs and what they leave on its disks: the one place where a guest
//! starts and stops, and so where the ledger hears of it.

use drover_model::{
    guest::{DiskSource, PowerState},
    ids::{HostName, InstanceId},
};
use tokio::time::Instant;

use super::{super::Event, ledger::Violation, node::Domain, storage::Content, world::World};

impl World {
    /// A copy's vCPUs begin to run.
    pub(super) fn start_vcpus(&mut self, host: &HostName, id: InstanceId, at: Instant) {
        let Some(domain) = self.domain_mut(host, id).filter(|d| !d.runs()) else {
            return;
        };
        domain.state = PowerState::Running;
        domain.memory.start(at);
        let counter = domain.memory.counter(at);
        self.ledger.starts(id, host, at, counter);
        self.check_disks(host, id, at);
        self.node(host).emit(Event::Guest(id));
    }

    /// A copy's vCPUs stop, if they run; its state is then that one.
    pub(super) fn stop_vcpus(
        &mut self,
        host: &HostName,
        id: InstanceId,
        at: Instant,
        state: PowerState,
    ) {
        self.write_disks(host, id, at);
        let Some(domain) = self.domain_mut(host, id) else {
            return;
        };
        if domain.runs() {
            domain.memory.stop(at);
            self.ledger.stops(id, host, at);
        }
        if let Some(domain) = self.domain_mut(host, id) {
            domain.state = state;
            domain.goes_off_at = None;
        }
        self.node(host).emit(Event::Guest(id));
    }

    /// A running guest has written its counter to its disks, up to now.
    pub(super) fn write_disks(&mut self, host: &HostName, id: InstanceId, at: Instant) {
        let Some(domain) = self.domain(host, id).filter(|d| d.runs()) else {
            return;
        };
        let counter = domain.memory.counter(at);
        for (path, token) in own_disks(domain) {
            if let Some(Content::Disk { token: t, written }) =
                self.storage.file_mut(host, &path).map(|f| &mut f.content)
                && *t == token
            {
                *written = counter;
            }
        }
    }

    /// Whether a copy's disks are its own and as recent as its memory.
    pub(super) fn check_disks(&mut self, host: &HostName, id: InstanceId, at: Instant) {
        let Some(domain) = self.domain(host, id) else {
            return;
        };
        let counter = domain.memory.counter(at);
        let problems: Vec<String> = own_disks(domain)
            .into_iter()
            .filter_map(|(path, token)| {
                let wrong = match self.storage.file(host, &path).map(|f| &f.content) {
                    None => "is gone".to_owned(),
                    Some(Content::Disk { token: t, .. }) if *t != token => {
                        "is another's".to_owned()
                    }
                    Some(Content::Disk { written, .. }) if *written != counter => {
                        format!("was last written at {written:?}, its guest is at {counter:?}")
                    }
                    Some(Content::Disk { .. }) => return None,
                    Some(_) => "was never copied".to_owned(),
                };
                Some(format!("disk {path} {wrong}"))
            })
            .collect();
        for what in problems {
            self.ledger.record(Violation::DiskLost {
                guest: id,
                node: host.clone(),
                what,
            });
        }
    }
}

/// The disks that a guest writes to, and what they ought to hold.
pub(super) fn own_disks(domain: &Domain) -> Vec<(String, u64)> {
    domain
        .guest
        .disks
        .iter()
        .filter_map(|disk| {
            let token = domain.tokens.get(&disk.target)?;
            match &disk.source {
                DiskSource::File { path } | DiskSource::Block { path } => {
                    Some((path.clone(), *token))
                }
                _ => None,
            }
        })
        .collect()
}

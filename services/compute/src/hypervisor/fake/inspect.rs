//! The checker's look at the world as it is now; what happened before is in
//! [`super::ledger`].

use std::time::Duration;

use drover_model::{
    guest::PowerState,
    ids::{HostName, InstanceId},
};
use tokio::time::Instant;

use super::{
    files::uses,
    ledger::Violation,
    node::Domain,
    rebuild::IDENTITY_FILE,
    storage::{Content, Volume, is_device},
    vcpus::own_disks,
    world::World,
};

impl World {
    /// Notes every violation that can be seen now.
    pub(super) fn inspect(&mut self, now: Instant) {
        for guest in self.ledger.guests() {
            self.inspect_guest(guest, now);
        }
    }

    fn inspect_guest(&mut self, guest: InstanceId, now: Instant) {
        let running = self.hosts_where(guest, Domain::runs);
        let active = self.hosts_where(guest, |d| {
            !d.incoming && !d.left_by_script && d.state.is_active()
        });
        for host in &running {
            self.write_disks(host, guest, now);
            self.check_disks(host, guest, now);
            self.check_reads(host, guest);
        }
        let ended = self.ledger.has_ended(guest);
        if running.len() > 1 {
            let nodes = running;
            self.ledger.record(Violation::TwoRunning { guest, nodes });
        } else if active.len() > 1 && !ended && !self.journeys.contains_key(&guest) {
            let nodes = active;
            self.ledger.record(Violation::TwoActive { guest, nodes });
        } else if active.is_empty() && !ended {
            self.ledger.record(Violation::NowhereActive { guest });
        }
    }

    fn hosts_where(&self, guest: InstanceId, holds: impl Fn(&Domain) -> bool) -> Vec<HostName> {
        self.nodes
            .iter()
            .filter(|(_, node)| node.domains.get(&guest).is_some_and(&holds))
            .map(|(name, _)| name.clone())
            .collect()
    }

    /// What a guest's disks say how long it had run.
    pub(super) fn last_written(&self, host: &HostName, id: InstanceId) -> Duration {
        let disks = self.domain(host, id).map(own_disks).unwrap_or_default();
        let written =
            disks.iter().filter_map(
                |(path, token)| match self.storage.file(host, path)?.content {
                    Content::Disk { token: t, written } if t == *token => Some(written),
                    _ => None,
                },
            );
        written.max().unwrap_or_default()
    }

    /// Of each disk that a guest writes to, somewhere there must be a copy with all
    /// that was written; also while it is on its way.
    pub(super) fn lost_bytes(&mut self, now: Instant) -> Vec<String> {
        self.inspect(now);
        let mut lost = Vec::new();
        for (id, nature) in &self.natures {
            let ran = self.ledger.ran(*id, now);
            for (target, token) in &nature.tokens {
                let newest = self.newest_written(*token);
                if newest.is_none_or(|newest| newest < ran) && !self.ledger.may_go_back(*id) {
                    lost.push(format!(
                        "{target} of {id} was written at {ran:?}; of it is left {newest:?}"
                    ));
                }
            }
        }
        lost
    }

    fn newest_written(&self, of: u64) -> Option<Duration> {
        let files = self
            .storage
            .volumes()
            .flat_map(|(volume, _)| volume.files());
        let written = files.filter_map(|(_, file)| match &file.content {
            Content::Disk { token, written } if *token == of => Some(*written),
            _ => None,
        });
        written.max()
    }

    pub(super) fn incomplete(&self, id: InstanceId) -> Vec<String> {
        let hosts = self.hosts_where(id, |d| !d.incoming);
        if hosts.is_empty() {
            return vec![format!("{id} is defined nowhere")];
        }
        let mut lacking = Vec::new();
        for host in hosts {
            for (path, own) in self.domain(&host, id).map(own_disks).unwrap_or_default() {
                let content = self.storage.file(&host, &path).map(|f| &f.content);
                let is_own = matches!(content, Some(Content::Disk { token, .. }) if *token == own);
                if !is_own {
                    lacking.push(format!("{id} on {host}: {path} is {content:?}"));
                }
            }
        }
        lacking
    }

    /// What belongs to nobody, in words.
    pub(super) fn leftovers(&self) -> Vec<String> {
        let mut found = Vec::new();
        for (host, node) in &self.nodes {
            for (id, domain) in &node.domains {
                if let Some(what) = self.leftover_of(host, *id, domain) {
                    found.push(format!("{host}: {what} of {}", domain.guest.name));
                }
            }
            let inboxes = node.inboxes.iter().filter(|(_, inbox)| inbox.is_open());
            found.extend(inboxes.map(|(key, _)| format!("{host}: open inbox {key}")));
        }
        for (volume, hosts) in self.storage.volumes() {
            let paths = volume.files().map(|(path, _)| path);
            let lost = paths.filter(|path| self.is_lost_file(volume, path, &hosts));
            found.extend(lost.map(|path| format!("{}: file {path}", volume.name)));
        }
        found
    }

    fn leftover_of(
        &self,
        host: &HostName,
        id: InstanceId,
        domain: &Domain,
    ) -> Option<&'static str> {
        if self.journeys.contains_key(&id) {
            return None;
        }
        let elsewhere = |d: &Domain| !d.incoming && !d.left_by_script && d.state.is_active();
        let lives_elsewhere = self.hosts_where(id, elsewhere).iter().any(|h| h != host);
        match domain.state {
            _ if domain.incoming => Some("waiting copy"),
            _ if domain.left_by_script => Some("old copy"),
            _ if !domain.mirrors.is_empty() => Some("disk being copied"),
            PowerState::Shutdown | PowerState::Crashed if lives_elsewhere => Some("definition"),
            PowerState::Shutdown | PowerState::Crashed
                if self.hosts_where(id, |_| true).len() > 1 =>
            {
                Some("one of two definitions")
            }
            _ => None,
        }
    }

    fn is_lost_file(&self, volume: &Volume, path: &str, hosts: &[&HostName]) -> bool {
        let Some((_, file)) = volume.files().find(|(p, _)| *p == path) else {
            return false;
        };
        if is_device(path) {
            return false;
        }
        if let Content::Text(_) = file.content {
            return path.contains("/.drover-") && !path.ends_with(IDENTITY_FILE);
        }
        !hosts.iter().any(|host| {
            let mut domains = self.node(host).domains.values();
            domains.any(|d| d.both().any(|guest| uses(guest, path)))
        })
    }
}

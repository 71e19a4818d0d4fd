//! The fake's half of what guests of dead nodes need.

use std::time::Duration;

use async_trait::async_trait;
use drover_model::{
    api::compute::{KeptDefinition, StorageIdentity},
    guest::{Guest, PowerState, Presence},
    ids::{HostName, InstanceId},
    node::GuestUsage,
};
use sha2::{Digest, Sha256};
use tokio::time::{Instant, sleep};

use super::{
    super::{Definition, HypervisorError, RebuildDriver, Result, StorageFact},
    FakeDriver,
    contents::read_paths,
    node::{Domain, Notes},
    script::Call,
    storage::{Content, File, directory_of, is_device},
    world::World,
};

/// Name of the file that makes a directory known to other nodes.
pub(super) const IDENTITY_FILE: &str = "/.drover-storage";
/// How long a dirty rate is measured.
const MEASURING: Duration = Duration::from_secs(1);

#[async_trait]
impl RebuildDriver for FakeDriver {
    async fn kept_definition(&self, id: InstanceId) -> Result<KeptDefinition> {
        self.call(Call::KeptDefinition, |world, host, _| {
            world.kept_definition(host, id)
        })
        .await
    }

    async fn storage_facts(&self, identities: &[StorageIdentity]) -> Result<Vec<StorageFact>> {
        self.call(Call::StorageFacts, |world, host, _| {
            let facts = identities.iter();
            Ok(facts.map(|its| world.storage_fact(host, its)).collect())
        })
        .await
    }

    async fn define_rebuilt(&self, id: InstanceId, domain: &str, generation: u64) -> Result<()> {
        self.call(Call::DefineRebuilt, |world, host, _| {
            world.define_rebuilt(host, id, domain, generation)
        })
        .await
    }

    async fn dirty_rate(&self, id: InstanceId) -> Result<Option<u64>> {
        let measured = self.call(Call::DirtyRate, |world, host, _| world.dirty_rate(host, id));
        let measured = measured.await?;
        if measured.is_some() {
            sleep(MEASURING).await;
        }
        Ok(measured)
    }

    async fn unguarded_autostarts(&self) -> Result<Vec<InstanceId>> {
        self.call(Call::UnguardedAutostarts, |world, host, _| {
            let domains = world.node(host).domains.iter();
            let flagged = domains.filter(|(_, domain)| domain.autostart);
            Ok(flagged.map(|(id, _)| *id).collect())
        })
        .await
    }

    async fn take_over_autostart(&self, id: InstanceId) -> Result<()> {
        self.call(Call::TakeOverAutostart, |world, host, _| {
            world.take_over_autostart(host, id)
        })
        .await
    }
}

impl World {
    /// What is written about a guest.
    pub(super) fn notes(&self, id: InstanceId) -> Notes {
        let nature = self.natures.get(&id);
        nature.map(|n| n.notes.clone()).unwrap_or_default()
    }

    /// What a copy has used, if it is active.
    pub(super) fn usage(&self, domain: &Domain, now: Instant) -> Option<GuestUsage> {
        let habits = self.natures.get(&domain.guest.id)?.habits;
        let active = domain.presence().is_active();
        active.then(|| GuestUsage {
            cpu_time_ns: domain
                .cpu
                .at(domain.memory.counter(now), habits.cpu_percent)
                .used_ns(),
            memory_rss_mib: habits.rss_mib,
        })
    }

    pub(super) fn set_cpu_percent(&mut self, id: InstanceId, percent: u64, now: Instant) {
        let Some(nature) = self.natures.get_mut(&id) else {
            return;
        };
        let before = std::mem::replace(&mut nature.habits.cpu_percent, percent);
        let nodes = self.nodes.values_mut();
        for domain in nodes.filter_map(|node| node.domains.get_mut(&id)) {
            domain.cpu = domain.cpu.at(domain.memory.counter(now), before);
        }
    }

    /// A fingerprint of a domain's lasting definition.
    pub(super) fn digest(&self, host: &HostName, domain: &Domain) -> String {
        let reads = self.read_contents(host, domain.lasting());
        let guest = Guest {
            power_state: PowerState::Shutdown,
            active_job: None,
            ..domain.lasting().clone()
        };
        let text = format!("{guest:?} {:?} {reads:?}", self.notes(guest.id));
        format!("{:x}", Sha256::digest(text))
    }

    fn kept_definition(&mut self, host: &HostName, id: InstanceId) -> Result<KeptDefinition> {
        let gone = HypervisorError::NoSuchGuest(id);
        let (Some(definition), Some(guest)) =
            (self.definition(host, id)?, self.describe_lasting(host, id))
        else {
            return Err(gone);
        };
        let digest = self
            .domain(host, id)
            .map(|domain| self.digest(host, domain));
        let paths = files_of(&guest);
        Ok(KeptDefinition {
            instance: id,
            digest: digest.ok_or(gone)?,
            domain: definition.domain,
            has_secrets: self.notes(id).has_secrets,
            identities: paths
                .into_iter()
                .map(|path| self.identify(host, path))
                .collect(),
            contents: read_paths(&guest)
                .iter()
                .map(|path| self.digested(host, path))
                .collect(),
            guest,
        })
    }

    /// On which storage a file is; leaves the identity file if there is none yet.
    fn identify(&mut self, host: &HostName, path: String) -> StorageIdentity {
        let identity = if is_device(&path) {
            Err("a block device cannot be told from another node's".to_owned())
        } else {
            self.leave_identity(host, &path)
                .and_then(|()| self.identity(host, &path))
        };
        StorageIdentity {
            error: identity.as_ref().err().cloned(),
            identity: identity.ok(),
            path,
        }
    }

    fn leave_identity(&mut self, host: &HostName, path: &str) -> std::result::Result<(), String> {
        let file = format!("{}{IDENTITY_FILE}", directory_of(path));
        if self.storage.file(host, &file).is_some() {
            return Ok(());
        }
        let text = Content::Text(format!("{:032x}", self.rng.u128(..)));
        self.storage.create(host, &file, File::dense(text, 4096))
    }

    fn identity(&self, host: &HostName, path: &str) -> std::result::Result<String, String> {
        let missing = |path: &str| format!("{path}: No such file or directory");
        let file = format!("{}{IDENTITY_FILE}", directory_of(path));
        if self.storage.file(host, path).is_none() {
            return Err(missing(path));
        }
        match self.storage.file(host, &file).map(|f| &f.content) {
            Some(Content::Text(text)) => Ok(format!("{text}:{path}")),
            _ => Err(missing(&file)),
        }
    }

    fn storage_fact(&self, host: &HostName, theirs: &StorageIdentity) -> StorageFact {
        let path = theirs.path.clone();
        let same = match &theirs.identity {
            None => Err(theirs.error.clone().unwrap_or_default()),
            Some(identity) => match self.identity(host, &path) {
                Ok(own) if own == *identity => Ok(()),
                Ok(_) => Err("another file is there".to_owned()),
                Err(words) => Err(words),
            },
        };
        StorageFact { path, same }
    }

    fn define_rebuilt(
        &mut self,
        host: &HostName,
        id: InstanceId,
        domain: &str,
        generation: u64,
    ) -> Result<()> {
        let mut guest: Guest = serde_json::from_str(domain)
            .map_err(|e| HypervisorError::Failed(format!("malformed definition: {e}")))?;
        if guest.id != id {
            let words = format!("the definition is {}'s", guest.id);
            return Err(HypervisorError::Failed(words));
        }
        if let Some(here) = self.domain(host, id) {
            return match here.presence() {
                Presence::Present(_) if here.guest.generation == generation => Ok(()),
                presence => Err(HypervisorError::WrongState(format!(
                    "the guest is here already: {presence}, generation {}",
                    here.guest.generation
                ))),
            };
        }
        guest.generation = generation;
        let domain = serde_json::to_string(&guest);
        let definition = Definition {
            domain: domain.map_err(|e| HypervisorError::Bug(e.to_string()))?,
            snapshots: Vec::new(),
            current_snapshot: None,
        };
        self.define(host, &definition, None)
    }

    fn dirty_rate(&self, host: &HostName, id: InstanceId) -> Result<Option<u64>> {
        let Some(domain) = self.domain(host, id) else {
            return Err(HypervisorError::NoSuchGuest(id));
        };
        if !domain.runs() {
            let words = "domain is not running".to_owned();
            return Err(HypervisorError::WrongState(words));
        }
        let told = self.node(host).spec.tells_dirty_rate;
        Ok(told.then_some(domain.load.dirty_bytes_s >> 20))
    }

    fn take_over_autostart(&mut self, host: &HostName, id: InstanceId) -> Result<()> {
        let Some(domain) = self.domain_mut(host, id) else {
            return Err(HypervisorError::NoSuchGuest(id));
        };
        let wished = std::mem::take(&mut domain.autostart);
        if let Some(nature) = self.natures.get_mut(&id) {
            nature.notes.autostart |= wished;
        }
        Ok(())
    }
}

/// Every local file of a guest, once.
fn files_of(guest: &Guest) -> Vec<String> {
    let disks = guest.disks.iter();
    let images = disks.flat_map(|disk| {
        let own = disk.local_path().map(str::to_owned);
        own.into_iter()
            .chain(disk.backing.iter().map(|b| b.path.clone()))
    });
    let beside = guest.files.iter().map(|file| file.path.clone());
    let mut paths: Vec<String> = images.chain(beside).collect();
    paths.sort_unstable();
    paths.dedup();
    paths
}

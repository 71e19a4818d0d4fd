//! Guests that are started when the node boots. libvirt does that by itself and
//! asks nobody, which may start a guest that was evacuated meanwhile; so the agent
//! takes it over (`[compute] guard_autostart`).
//!
//! ```text
//!  libvirt's flag ─► wish in the domain's metadata, flag off      (at any time)
//!
//!  the node boots ─► wanted: all that are off and wish it ─┬─ evacuated ───────► waits; goes when it
//!                    (journalled with the boot's id)       │                     is no longer here
//!                                                          ├─ in a migration ──► waits
//!                                                          ├─ active elsewhere ► waits
//!                                                          ├─ lives elsewhere ─► stays off
//!                                                          └─ else ────────────► started, once
//! ```
//!
//! Where a guest lives is on the conductor's record, and asked for right before any is
//! started: somebody may have moved it by hand and left its definition here, or have
//! brought it up elsewhere while this node was away (invariant 1). Whatever is stopped
//! or stays off after that does so until the next boot.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use drover_model::{
    api::conductor::KeptOff, error::ErrorClass, ids::InstanceId, node::InstanceReport,
};
use drover_rpc::RpcError;
use drover_runtime::{blocking::blocking_io, error_chain::Chain};
use serde::{Deserialize, Serialize};
use tracing::{debug, error, info, warn};

use crate::{
    hypervisor,
    journal::{self, Unread},
    migration::Registry,
    node::Node,
};

/// Longest text of a boot's id, bytes; the kernel's has 37.
const LONGEST_ID: usize = 256;

/// What is remembered from boot to boot.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
struct Boot {
    /// The boot's id.
    id: String,
    /// Guests that are still to be started; none while nobody has looked.
    wanted: Option<BTreeSet<InstanceId>>,
}

/// See the module.
pub(crate) struct Autostart {
    node: Arc<Node>,
    registry: Arc<Registry>,
    file: PathBuf,
    /// None while what was written of it cannot be read.
    boot: Option<Boot>,
    /// Why guests are kept off, as it was said last.
    said: BTreeMap<InstanceId, String>,
}

impl Autostart {
    /// Finds out whether the node booted since the agent ran last.
    pub(crate) async fn open(node: Arc<Node>, registry: Arc<Registry>) -> Self {
        let file = node.settings.state_dir.join("boot.json");
        let mut autostart = Self {
            node,
            registry,
            file,
            boot: None,
            said: BTreeMap::new(),
        };
        autostart.remember().await;
        autostart
    }

    /// Reads what was written at the last boot, if that was not done yet. A file that
    /// is damaged was most likely cut short by the end of that boot: the guests that
    /// wish it are started. One that cannot be read now is waited for.
    async fn remember(&mut self) {
        if self.boot.is_some() {
            return;
        }
        let file = self.file.display();
        let id = boot_id(&self.node.settings.boot_id_file).await;
        let booted = |id: Option<String>| Boot {
            id: id.unwrap_or_default(),
            wanted: None,
        };
        self.boot = match (id, journal::read_whole::<Boot>(&self.file).await) {
            (Some(id), Ok(Some(before))) if id == before.id => Some(before),
            (None, Ok(Some(before))) => Some(before),
            (id, Ok(Some(_))) => {
                info!(
                    "the node booted: guests that wish it are started once the conductor was asked"
                );
                Some(booted(id))
            }
            // An agent that is new here has nothing to catch up on.
            (id, Ok(None)) => Some(Boot {
                wanted: Some(BTreeSet::new()),
                ..booted(id)
            }),
            (id, Err(Unread::Corrupt(why))) => {
                error!(%file, why, "which guests were started at the last boot is not known any \
                    more: all that are off and wish to be started at boot are started");
                journal::set_aside(&self.file, &why);
                Some(booted(id))
            }
            (_, Err(Unread::NotNow(why))) => {
                error!(%file, why, "whether the node booted cannot be told now: no guest is \
                    started for that until this file can be read; it is tried again");
                None
            }
        };
    }

    /// Takes over what libvirt would do, and starts what is to be started, except
    /// for these. Says whether nothing is left.
    pub(crate) async fn pass(&mut self, evacuated: &BTreeSet<InstanceId>) -> bool {
        self.take_over().await;
        self.remember().await;
        match self.try_pass(evacuated).await {
            Ok(left) => left == 0,
            Err(error) => {
                warn!(%error, "guests cannot be started at boot yet");
                false
            }
        }
    }

    /// Takes over what libvirt would do.
    pub(crate) async fn take_over(&self) {
        if !self.node.settings.guard_autostart {
            return;
        }
        let flagged = match self.node.hypervisor.unguarded_autostarts().await {
            Ok(flagged) => flagged,
            Err(error) => return debug!(%error, "autostart flags cannot be read"),
        };
        for instance in flagged {
            match self.node.hypervisor.take_over_autostart(instance).await {
                Ok(()) => info!(%instance, "starting it at boot is the agent's from now on"),
                Err(error) => {
                    warn!(%instance, %error, "starting it at boot could not be taken over from libvirt");
                }
            }
        }
    }

    async fn try_pass(&mut self, evacuated: &BTreeSet<InstanceId>) -> hypervisor::Result<usize> {
        let Some(mut boot) = self.boot.clone() else {
            // All that wish it may have to be started.
            return Ok(usize::MAX);
        };
        if !self.node.settings.guard_autostart {
            boot.wanted = Some(BTreeSet::new());
        }
        if boot.wanted.as_ref().is_some_and(BTreeSet::is_empty) {
            self.store(boot).await;
            return Ok(0);
        }
        let here = self.node.hypervisor.guests().await?;
        let off = |report: &&InstanceReport| !report.power_state.is_active() && !report.incoming;
        let off: BTreeSet<InstanceId> = here
            .iter()
            .filter(off)
            .filter(|report| report.autostart)
            .map(|report| report.id)
            .collect();
        let wanted = match boot.wanted.take() {
            Some(wanted) => wanted.intersection(&off).copied().collect(),
            None => off,
        };
        boot.wanted = Some(wanted.clone());
        self.store(boot.clone()).await;
        let left = match self.kept_off(&wanted).await {
            Ok(kept_off) => self.start_others(wanted, &kept_off, evacuated).await,
            Err(error) => {
                warn!(
                    "the conductor does not say which guests may be started at boot: {}; it is \
                    asked again",
                    Chain(&error)
                );
                wanted
            }
        };
        let waiting = left.len();
        boot.wanted = Some(left);
        self.store(boot).await;
        Ok(waiting)
    }

    /// Asks which of these must not be started here, by what is on the record now.
    async fn kept_off(
        &self,
        wanted: &BTreeSet<InstanceId>,
    ) -> Result<BTreeMap<InstanceId, KeptOff>, RpcError> {
        if wanted.is_empty() {
            return Ok(BTreeMap::new());
        }
        let starting = wanted.iter().copied().collect();
        let host = &self.node.settings.host;
        let answer = self.node.conductor.list_evacuated(host, starting).await?;
        let kept_off = answer.kept_off.into_iter();
        Ok(kept_off.map(|kept| (kept.instance, kept)).collect())
    }

    /// Starts those that may be started; says which are left for later.
    async fn start_others(
        &mut self,
        wanted: BTreeSet<InstanceId>,
        kept_off: &BTreeMap<InstanceId, KeptOff>,
        evacuated: &BTreeSet<InstanceId>,
    ) -> BTreeSet<InstanceId> {
        let mut left = wanted.clone();
        for instance in wanted {
            let waits = evacuated.contains(&instance)
                || self.registry.holder(instance).is_some()
                || self.registry.held_back(instance).is_some();
            let is_over = match kept_off.get(&instance) {
                Some(kept) => {
                    self.say(kept);
                    kept.lives_on.is_some()
                }
                None => !waits && self.start(instance).await,
            };
            if is_over {
                left.remove(&instance);
            }
        }
        left
    }

    /// Says once why a guest stays off.
    fn say(&mut self, kept: &KeptOff) {
        let KeptOff {
            instance, reason, ..
        } = kept;
        if self.said.insert(*instance, reason.clone()).as_ref() != Some(reason) {
            warn!(%instance, "the guest wishes to be started at boot and stays off: {reason}");
        }
    }

    /// Starts one; says whether that is over, well or not.
    async fn start(&self, instance: InstanceId) -> bool {
        match self.node.hypervisor.start(instance).await {
            Ok(()) => {
                info!(%instance, "started at boot");
                true
            }
            Err(error) => {
                warn!(%instance, %error, "the guest could not be started at boot");
                error.class() == ErrorClass::Refused
            }
        }
    }

    async fn store(&mut self, boot: Boot) {
        let stored = journal::write_whole(&self.file, &boot, self.node.journal.disk()).await;
        if let Err(error) = stored {
            warn!(%error, "which guests were started at boot cannot be written down");
        }
        self.boot = Some(boot);
    }
}

async fn boot_id(path: &Path) -> Option<String> {
    let file = path.to_owned();
    match blocking_io(move || fs::read_to_string(file)).await {
        Ok(text) => Some(text.trim().chars().take(LONGEST_ID).collect()),
        Err(error) => {
            let path = path.display();
            warn!(%path, %error, "whether the node booted cannot be told: no guest is started \
                 for that; correct [compute] boot_id_file");
            None
        }
    }
}

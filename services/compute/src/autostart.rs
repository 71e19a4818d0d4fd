//! Guests that are started when the node boots. libvirt does that by itself and
//! asks nobody, which may start a guest that was evacuated meanwhile; so the agent
//! takes it over (`[compute] guard_autostart`).
//!
//! ```text
//!  libvirt's flag ─► wish in the domain's metadata, flag off      (at any time)
//!
//!  the node boots ─► wanted: all that are off and wish it ─┬─ evacuated ──────► waits; goes when it
//!                    (journalled with the boot's id)       │                    is no longer here
//!                                                          ├─ in a migration ─► waits
//!                                                          └─ else ───────────► started, once
//! ```
//!
//! Whatever is stopped after that stays so until the next boot.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use drover_model::{error::ErrorClass, ids::InstanceId, node::InstanceReport};
use drover_runtime::blocking::blocking_io;
use serde::{Deserialize, Serialize};
use tracing::{debug, info, warn};

use crate::{hypervisor, migration::Registry, node::Node};

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
    boot: Boot,
}

impl Autostart {
    /// Finds out whether the node booted since the agent ran last.
    pub(crate) async fn open(node: Arc<Node>, registry: Arc<Registry>) -> Self {
        let file = node.settings.state_dir.join("boot.json");
        let (id, before) = tokio::join!(boot_id(&node.settings.boot_id_file), read(&file));
        let boot = match (id, before) {
            (Some(id), Some(before)) if id == before.id => before,
            (None, Some(before)) => before,
            (Some(id), Some(_)) => {
                info!(
                    "the node booted: guests that wish it are started once the conductor was asked"
                );
                Boot { id, wanted: None }
            }
            // An agent that is new here has nothing to catch up on.
            (id, _) => Boot {
                id: id.unwrap_or_default(),
                wanted: Some(BTreeSet::new()),
            },
        };
        Self {
            node,
            registry,
            file,
            boot,
        }
    }

    /// Takes over what libvirt would do, and starts what is to be started, except
    /// for these. Says whether nothing is left.
    pub(crate) async fn pass(&mut self, evacuated: &BTreeSet<InstanceId>) -> bool {
        self.take_over().await;
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
        if !self.node.settings.guard_autostart {
            self.boot.wanted = Some(BTreeSet::new());
        }
        if self.boot.wanted.as_ref().is_some_and(BTreeSet::is_empty) {
            self.store().await;
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
        let mut wanted = match self.boot.wanted.take() {
            Some(wanted) => wanted.intersection(&off).copied().collect(),
            None => off,
        };
        self.boot.wanted = Some(wanted.clone());
        self.store().await;
        for instance in wanted.clone() {
            let waits = evacuated.contains(&instance) || self.registry.holder(instance).is_some();
            if !waits && self.start(instance).await {
                wanted.remove(&instance);
            }
        }
        let left = wanted.len();
        self.boot.wanted = Some(wanted);
        self.store().await;
        Ok(left)
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

    async fn store(&self) {
        let text = serde_json::to_vec(&self.boot).map_err(io::Error::other);
        let beside = self.file.with_extension("new");
        let file = self.file.clone();
        let stored = blocking_io(move || {
            fs::write(&beside, text?)?;
            fs::rename(&beside, &file)
        });
        if let Err(error) = stored.await {
            let path = self.file.display();
            warn!(%path, %error, "which guests were started at boot cannot be written down");
        }
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

async fn read(path: &Path) -> Option<Boot> {
    let file = path.to_owned();
    let text = blocking_io(move || fs::read(file)).await.ok()?;
    serde_json::from_slice(&text).ok()
}

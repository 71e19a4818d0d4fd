//! What every part of the agent shares: the hypervisor, the journal, the way to
//! the conductor, the settings, the clock and the counters.

use std::{
    collections::BTreeMap,
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use drover_model::api::conductor::Identity;
use drover_model::{
    api::compute::Outcome,
    ids::HostName,
    node::{AllocationPolicy, Endpoint},
    version::VersionRange,
};
use tokio::{sync::watch, task::JoinHandle};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    conductor::Conductor,
    hypervisor::Hypervisor,
    journal::{Journal, StateDisk},
    standing::Standing,
};

/// The wall clock: milliseconds since 1970. Waiting is tokio's.
pub type Clock = Arc<dyn Fn() -> u64 + Send + Sync>;

/// How an agent is to work; all checked.
#[derive(Debug, Clone)]
pub struct AgentSettings {
    /// The node's name: the agent's server name.
    pub host: HostName,
    /// Where other nodes reach this one.
    pub endpoint: Endpoint,
    /// How much of the node may be given to guests.
    pub policy: AllocationPolicy,
    /// Where the journal is.
    pub state_dir: std::path::PathBuf,
    /// The disk it is on.
    pub state_disk: StateDisk,
    /// Time between reports, seconds.
    pub report_interval_s: u64,
    /// Downtime of a migration that asks for none in particular, ms.
    pub max_downtime_ms: u64,
    /// Progress timeout of a migration that asks for none in particular, seconds.
    pub progress_timeout_s: u64,
    /// Whether the agent starts guests at boot in libvirt's stead, having asked.
    pub guard_autostart: bool,
    /// A file that holds another text after each boot of the node.
    pub boot_id_file: std::path::PathBuf,
    /// A file that holds the machine's identity.
    pub machine_id_file: std::path::PathBuf,
    /// Versions of RPC that it speaks: this build's, but for tests.
    pub speaks: VersionRange,
}

/// The shared parts.
pub(crate) struct Node {
    pub(crate) hypervisor: Arc<dyn Hypervisor>,
    pub(crate) journal: Journal,
    pub(crate) conductor: Conductor,
    pub(crate) settings: AgentSettings,
    pub(crate) clock: Clock,
    pub(crate) counters: Counters,
    pub(crate) tasks: TaskTracker,
    pub(crate) stop: CancellationToken,
    /// Whether the conductor has told what of this node lives elsewhere by now.
    pub(crate) has_asked: watch::Sender<bool>,
    /// Who this run of the agent is.
    pub(crate) identity: Identity,
    /// Whether it is its node's agent.
    pub(crate) standing: watch::Sender<Standing>,
    /// Why the conductor does not take its reports, if it does not.
    pub(crate) refused: watch::Sender<Option<String>>,
}

impl Node {
    /// Runs something beside everything else until it ends or the agent stops.
    /// Every task of the agent is one of these, so none outlives it.
    pub(crate) fn spawn<F>(&self, work: F) -> JoinHandle<Option<F::Output>>
    where
        F: Future<Output: Send + 'static> + Send + 'static,
    {
        let stop = self.stop.clone();
        self.tasks.spawn(stop.run_until_cancelled_owned(work))
    }

    /// Waits until this is the node's agent; says as which incarnation.
    pub(crate) async fn admitted(&self) -> u64 {
        let mut standing = self.standing.subscribe();
        // The sender is this node's: it does not go while somebody waits here.
        let admitted = standing.wait_for(|s| s.incarnation().is_some()).await;
        admitted.map_or(0, |s| s.incarnation().unwrap_or(0))
    }

    /// The time now, milliseconds since 1970.
    pub(crate) fn now_ms(&self) -> u64 {
        (self.clock)()
    }
}

macro_rules! counters {
    ($($name:ident,)*) => {
        /// What the agent has done since it started.
        #[derive(Debug, Default)]
        pub(crate) struct Counters { $(pub(crate) $name: AtomicU64,)* }

        impl Counters {
            /// All of them by name.
            pub(crate) fn snapshot(&self) -> BTreeMap<String, u64> {
                BTreeMap::from([$((stringify!($name).to_owned(), self.$name.load(Ordering::Relaxed)),)*])
            }
        }
    };
}

counters! {
    steps_done,
    steps_failed,
    transfers_started,
    transfers_attached,
    transfers_moved,
    transfers_failed,
    transfers_aborted,
    transfers_stalled,
    node_reports_sent,
    node_reports_lost,
    migration_reports_sent,
    migration_reports_lost,
}

impl Counters {
    pub(crate) fn add(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn count_outcome(&self, outcome: &Outcome) {
        Self::add(match outcome {
            Outcome::Moved { .. } | Outcome::Gone => &self.transfers_moved,
            Outcome::Failed { .. } | Outcome::Other(_) => &self.transfers_failed,
            Outcome::Aborted => &self.transfers_aborted,
            Outcome::Stalled { .. } => &self.transfers_stalled,
        });
    }
}

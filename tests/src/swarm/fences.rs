//! What cuts nodes' power, and whoever sees that it was right to.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use drover_compute::hypervisor::fake::Fabric;
use drover_conductor::operation::fence::{Action, Fences};
use drover_model::operation::FenceAnswer;
use tokio::time::Instant;

use super::{plan::Fence, process::Life, trace::Trace};

/// For how long a node has to show signs of life before it is wrong to cut its power:
/// what was seen just before may still count.
const ALIVE_FOR: Duration = Duration::from_secs(60);

/// A node, as whoever stands before it sees it.
#[derive(Default)]
struct Seen {
    is_off: bool,
    /// Since when its agent or its libvirtd can be reached.
    alive_since: Option<Instant>,
    agent: Weak<Life>,
}

/// The switches of all nodes. Cheap to clone.
#[derive(Clone)]
pub(super) struct Switches {
    fabric: Fabric,
    fence: Fence,
    trace: Trace,
    seen: Arc<Mutex<BTreeMap<String, Seen>>>,
    /// Nodes that were cut and not yet noticed.
    cut: Arc<Mutex<Vec<String>>>,
    wrong: Arc<Mutex<Vec<String>>>,
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Switches {
    pub(super) fn new(fabric: &Fabric, fence: Fence, trace: &Trace) -> Self {
        Self {
            fabric: fabric.clone(),
            fence,
            trace: trace.clone(),
            seen: Arc::default(),
            cut: Arc::default(),
            wrong: Arc::default(),
        }
    }

    /// What the conductors have of them.
    pub(super) fn fences(&self) -> Fences {
        match self.fence {
            Fence::None => Fences::default(),
            Fence::Works | Fence::Fails => {
                let switches = self.clone();
                Fences::from_fn(move |host, action| switches.asked(host.as_str(), action))
            }
        }
    }

    fn asked(&self, host: &str, action: Action) -> FenceAnswer {
        let agent = "fence_swarm".to_owned();
        let mut seen = lock(&self.seen);
        let node = seen.entry(host.to_owned()).or_default();
        if action == Action::Off {
            self.trace
                .note("fence", format_args!("{host} is to be cut"));
            let alive = node.alive_since.filter(|since| since.elapsed() > ALIVE_FOR);
            if let Some(since) = alive {
                let for_s = since.elapsed().as_secs();
                let words =
                    format!("the power of {host} was to be cut, which is alive for {for_s} s");
                lock(&self.wrong).push(words);
            }
            if self.fence == Fence::Fails {
                let message = "exit code 1".to_owned();
                return FenceAnswer::Failed { agent, message };
            }
            if !node.is_off {
                node.is_off = true;
                node.alive_since = None;
                self.fabric.power_off(host);
                // It is dead: nothing that it does reaches anybody.
                node.agent.upgrade().iter().for_each(|life| life.freeze());
                lock(&self.cut).push(host.to_owned());
            }
        }
        match node.is_off {
            true => FenceAnswer::Off { agent, at_ms: 1 },
            false => FenceAnswer::On { agent },
        }
    }

    /// How a node is from now on.
    pub(super) fn see(&self, host: &str, is_off: bool, is_alive: bool, agent: Option<&Arc<Life>>) {
        let mut seen = lock(&self.seen);
        let node = seen.entry(host.to_owned()).or_default();
        node.is_off = is_off;
        node.alive_since = is_alive.then(|| node.alive_since.unwrap_or_else(Instant::now));
        node.agent = agent.map(Arc::downgrade).unwrap_or_default();
    }

    /// Nodes whose power was cut since this was last asked.
    pub(super) fn cut(&self) -> Vec<String> {
        std::mem::take(&mut lock(&self.cut))
    }

    /// What was wrong.
    pub(super) fn wrong(&self) -> Vec<String> {
        lock(&self.wrong).clone()
    }
}

//! Plans for whole nodes. Pure: from what is known of the cluster to what is to
//! be done about it, the same for the same.
//!
//! [`drain`], [`restore`], [`evacuate`] and [`balance`] plan; [`pack`] finds room
//! for one guest after the other, which all of them share, as they do [`verdict`]s,
//! estimates of time and the [`forecast`]; [`schedule`] says what of a plan may
//! begin now. What they see is a [`World`], and of each guest an
//! [`Examination`] if its node was asked about it.

pub mod balance;
pub mod drain;
pub mod estimate;
pub mod evacuate;
pub mod forecast;
pub mod pack;
pub mod restore;
pub mod schedule;
pub mod verdict;

#[cfg(test)]
mod samples;

use std::collections::BTreeMap;

use drover_model::{
    check::CheckFailure,
    ids::{HostName, InstanceId},
    migration::Migration,
    operation::MoveWay,
};
use drover_store::claims::Usage;

/// The cluster at a moment.
#[derive(Debug, Clone, Default)]
pub struct World {
    /// Now, milliseconds since 1970.
    pub now_ms: u64,
    /// Every node, by name.
    pub nodes: Vec<NodeView>,
    /// Every guest, by id.
    pub guests: Vec<GuestView>,
}

/// A node as planners see it.
#[derive(Debug, Clone)]
pub struct NodeView {
    /// Which.
    pub host: HostName,
    /// Why no guest may come; it may if there is nothing.
    pub closed: Vec<CheckFailure>,
    /// What runs there and what is promised; what may be given out.
    pub usage: Usage,
    /// Logical CPUs.
    pub vcpus: u32,
    /// Memory, MiB.
    pub memory_mib: u64,
}

/// A guest as planners see it.
#[derive(Debug, Clone)]
pub struct GuestView {
    /// Which.
    pub id: InstanceId,
    /// Its name.
    pub name: String,
    /// Its project.
    pub project: String,
    /// Where it is.
    pub host: HostName,
    /// vCPUs.
    pub vcpus: u32,
    /// Memory, MiB.
    pub memory_mib: u64,
    /// Disks, bytes.
    pub disk_bytes: u64,
    /// Whether it runs (a QEMU holds its memory).
    pub runs: bool,
    /// Higher goes first.
    pub priority: i32,
    /// Groups no two of which shall be on one node.
    pub anti_affinity: Vec<String>,
    /// Another operation that has it, in words.
    pub busy: Option<String>,
    /// Whether that is a live migration from where it is: it ends when its source is
    /// dead, and an evacuation waits for that.
    pub leaves_live: bool,
    /// What it uses, averaged over the settings' window; none if not known for
    /// long enough.
    pub load: Option<Load>,
    /// How fast it writes memory, MiB/s, if that was measured.
    pub dirty_rate_mib_s: Option<u64>,
    /// When it moved last, milliseconds since 1970.
    pub moved_at_ms: Option<u64>,
}

/// A migration that has a guest, in words.
pub fn has_it(m: &Migration) -> String {
    let kind = m.way.migration_type();
    format!("migration {} ({kind}) of it is {}", m.id, m.status)
}

/// What a guest uses.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Load {
    /// CPUs kept busy (1.5: one and a half).
    pub cpus: f64,
    /// Memory held, MiB.
    pub memory_mib: u64,
}

/// What nodes said when they were asked about a guest.
#[derive(Debug, Clone, Default)]
pub struct Examination {
    /// What stands in the way at its source, by way; a way not named was not
    /// looked into and counts as possible.
    pub source: BTreeMap<MoveWay, Vec<CheckFailure>>,
    /// Destinations that said no to it, and why, by way.
    pub unfit: BTreeMap<MoveWay, BTreeMap<HostName, Vec<CheckFailure>>>,
    /// What is not known of it, in words, although it may go.
    pub doubt: Option<String>,
}

impl Examination {
    /// What a destination has against a guest that comes in that way, if it said no.
    pub fn refusal(&self, way: MoveWay, host: &HostName) -> Option<&Vec<CheckFailure>> {
        self.unfit.get(&way)?.get(host)
    }

    /// A destination said no.
    pub fn refuse(&mut self, way: MoveWay, host: HostName, why: Vec<CheckFailure>) {
        self.unfit.entry(way).or_default().insert(host, why);
    }
}

/// By guest.
pub type Examinations = BTreeMap<InstanceId, Examination>;

/// What it costs to move, for estimates.
#[derive(Debug, Clone, Copy)]
pub struct Costs {
    /// What a link carries, MiB/s.
    pub link_mib_s: u64,
    /// What every move takes beside sending (checks, preparing, tidying), ms.
    pub overhead_ms: u64,
    /// What a guest takes to shut down and to start, ms.
    pub restart_ms: u64,
    /// How long a guest stands still at a live switch-over, ms.
    pub switch_over_ms: u64,
}

impl Default for Costs {
    /// A 10 Gbit/s link, as sagas are measured on it.
    fn default() -> Self {
        Self {
            link_mib_s: 1000,
            overhead_ms: 1500,
            restart_ms: 20_000,
            switch_over_ms: 300,
        }
    }
}

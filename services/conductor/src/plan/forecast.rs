//! How full nodes are, and will be when a plan is carried out.

use std::collections::{BTreeMap, HashMap};

use drover_model::{
    ids::{HostName, InstanceId},
    operation::{Fill, Forecast, PlannedMove, Verdict},
};

use super::{GuestView, NodeView, World};

/// What guests use of a node. Whole numbers, so that no order of adding them
/// makes a difference.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Used {
    /// Guests that run.
    pub guests: u64,
    /// Guests that run and of which nobody knows yet what they use.
    pub unknown: u64,
    /// CPUs kept busy, thousandths.
    pub milli_cpus: u64,
    /// Memory held, MiB.
    pub memory_mib: u64,
}

impl Used {
    /// What one guest uses.
    pub fn by(guest: &GuestView) -> Self {
        if !guest.runs {
            return Self::default();
        }
        // No guest keeps more CPUs busy than fit; a negative one is none.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let milli = |cpus: f64| (cpus.clamp(0.0, 1e6) * 1000.0).round() as u64;
        Self {
            guests: 1,
            unknown: u64::from(guest.load.is_none()),
            milli_cpus: guest.load.map_or(0, |load| milli(load.cpus)),
            memory_mib: guest.load.map_or(0, |load| load.memory_mib),
        }
    }

    /// One guest more.
    pub fn add(&mut self, other: Self) {
        self.guests += other.guests;
        self.unknown += other.unknown;
        self.milli_cpus += other.milli_cpus;
        self.memory_mib += other.memory_mib;
    }

    /// One guest fewer.
    pub fn take_off(&mut self, other: Self) {
        self.guests = self.guests.saturating_sub(other.guests);
        self.unknown = self.unknown.saturating_sub(other.unknown);
        self.milli_cpus = self.milli_cpus.saturating_sub(other.milli_cpus);
        self.memory_mib = self.memory_mib.saturating_sub(other.memory_mib);
    }

    /// CPUs kept busy, thousandths of a percent of the node's.
    pub fn cpu_load(&self, node: &NodeView) -> u64 {
        self.milli_cpus * 100 / u64::from(node.vcpus).max(1)
    }

    /// Memory held, thousandths of a percent of the node's.
    pub fn memory_load(&self, node: &NodeView) -> u64 {
        self.memory_mib * 100_000 / node.memory_mib.max(1)
    }
}

/// Thousandths of a percent as percent.
pub fn percent(thousandths: u64) -> f64 {
    // At most some millions.
    #[allow(clippy::cast_precision_loss)]
    let thousandths = thousandths as f64;
    thousandths / 1000.0
}

/// A node while guests come and go.
struct Node<'a> {
    view: &'a NodeView,
    before: Fill,
    used: Used,
    vcpus: u64,
    memory_mib: u64,
}

impl Node<'_> {
    fn fill(&self) -> Fill {
        let known = self.used.unknown == 0;
        Fill {
            guests: self.used.guests,
            vcpus: self.vcpus,
            memory_mib: self.memory_mib,
            cpu_load_percent: known.then(|| percent(self.used.cpu_load(self.view))),
            memory_load_percent: known.then(|| percent(self.used.memory_load(self.view))),
        }
    }
}

/// Before and after of every node that gives or takes a guest, and of `besides`,
/// by name.
pub fn of(world: &World, moves: &[PlannedMove], besides: Option<&HostName>) -> Vec<Forecast> {
    let moved: HashMap<InstanceId, (&HostName, &HostName)> = moves
        .iter()
        .filter_map(|m| match &m.verdict {
            Verdict::Moves { to, .. } => Some((m.instance, (&m.source, to))),
            Verdict::Stays { .. } => None,
        })
        .collect();
    let mut nodes = involved(world, &moved, besides);
    for guest in &world.guests {
        if let Some(node) = nodes.get_mut(&guest.host) {
            node.used.add(Used::by(guest));
        }
    }
    for node in nodes.values_mut() {
        node.before = node.fill();
    }
    let goes = |g: &&GuestView| g.runs && moved.contains_key(&g.id);
    for guest in world.guests.iter().filter(goes) {
        let (source, to) = moved[&guest.id];
        let (vcpus, memory_mib) = (u64::from(guest.vcpus), guest.memory_mib);
        if let Some(node) = nodes.get_mut(source) {
            node.used.take_off(Used::by(guest));
            node.vcpus = node.vcpus.saturating_sub(vcpus);
            node.memory_mib = node.memory_mib.saturating_sub(memory_mib);
        }
        if let Some(node) = nodes.get_mut(to) {
            node.used.add(Used::by(guest));
            node.vcpus += vcpus;
            node.memory_mib += memory_mib;
        }
    }
    let forecast = |node: &Node<'_>| Forecast {
        host: node.view.host.clone(),
        vcpus_usable: node.view.usage.usable.vcpus,
        memory_usable_mib: node.view.usage.usable.memory_mib,
        before: node.before,
        after: node.fill(),
    };
    nodes.values().map(forecast).collect()
}

fn involved<'a>(
    world: &'a World,
    moved: &HashMap<InstanceId, (&HostName, &HostName)>,
    besides: Option<&HostName>,
) -> BTreeMap<&'a HostName, Node<'a>> {
    let ends = moved.values().flat_map(|(source, to)| [*source, *to]);
    let hosts: std::collections::HashSet<&HostName> = ends.chain(besides).collect();
    let views = world.nodes.iter().filter(|n| hosts.contains(&n.host));
    let node = |view: &'a NodeView| Node {
        view,
        before: Fill::default(),
        used: Used::default(),
        vcpus: view.usage.used.vcpus,
        memory_mib: view.usage.used.memory_mib,
    };
    views.map(|view| (&view.host, node(view))).collect()
}

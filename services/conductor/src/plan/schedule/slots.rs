//! Who may begin: how many are under way from a node, to a node, in all, and of
//! the operation. An evacuation waits for other evacuations alone: its guest is off.

use std::collections::{HashMap, HashSet};

use drover_model::{
    ids::HostName,
    migration::{Migration, MigrationType},
    operation::{MoveWay, Operation},
};
use drover_store::operations::UnderWay;

use super::Limits;

/// What is under way.
#[derive(Debug)]
pub(super) struct Slots {
    limits: Limits,
    of_operation: u32,
    own: u32,
    cluster: u32,
    outbound: HashMap<HostName, u32>,
    inbound: HashMap<HostName, u32>,
    /// Of those that come to a node, the evacuations.
    evacuated_to: HashMap<HostName, u32>,
}

impl Slots {
    /// Counts every migration once that is under way between nodes.
    pub(super) fn new(
        operation: &Operation,
        own: &[Migration],
        active: &UnderWay,
        limits: Limits,
    ) -> Self {
        let mut slots = Self {
            limits,
            of_operation: operation
                .task
                .max_parallel()
                .unwrap_or(limits.per_operation),
            own: 0,
            cluster: 0,
            outbound: HashMap::new(),
            inbound: HashMap::new(),
            evacuated_to: HashMap::new(),
        };
        let mut seen = HashSet::new();
        let under_way = |m: &&Migration| {
            !m.status.rests() && m.way.migration_type() != MigrationType::ProjectTransfer
        };
        // What is known of the operation's own may be newer.
        for migration in own.iter().chain(&active.known).filter(under_way) {
            if !seen.insert(migration.uuid) {
                continue;
            }
            let is_own = migration.operation == Some(operation.uuid);
            slots.own += u32::from(is_own);
            let is_evacuation = migration.way.migration_type() == MigrationType::Evacuation;
            let dest = migration.dest_host.as_ref();
            slots.count(&migration.source_host, dest, is_evacuation);
        }
        for unread in active.unread.iter().filter(|m| !m.rests()) {
            if unread.is(MigrationType::ProjectTransfer) {
                continue;
            }
            let is_evacuation = unread.is(MigrationType::Evacuation);
            slots.count(&unread.source, unread.dest.as_ref(), is_evacuation);
        }
        slots
    }

    fn count(&mut self, source: &HostName, dest: Option<&HostName>, is_evacuation: bool) {
        // A dead node sends nothing.
        if !is_evacuation {
            self.cluster += 1;
            *self.outbound.entry(source.clone()).or_default() += 1;
        }
        let Some(dest) = dest else { return };
        *self.inbound.entry(dest.clone()).or_default() += 1;
        if is_evacuation {
            *self.evacuated_to.entry(dest.clone()).or_default() += 1;
        }
    }

    /// What keeps a guest from leaving its node now, wherever it goes, in words.
    pub(super) fn missing(&self, source: &HostName, way: MoveWay) -> Option<String> {
        let ahead = self.ahead(way);
        if self.own >= self.of_operation {
            return Some(format!(
                "waits for its turn: {} of this operation are under way already",
                self.own
            ));
        }
        if way != MoveWay::Evacuate && self.cluster >= self.limits.cluster.saturating_add(ahead) {
            return Some(format!(
                "waits for the cluster: {} are under way already",
                self.cluster
            ));
        }
        let leaving = self.outbound.get(source).copied().unwrap_or(0);
        let full = leaving >= self.limits.outbound.saturating_add(ahead);
        (full && way != MoveWay::Evacuate)
            .then(|| format!("waits for {source}: {leaving} leave it already"))
    }

    /// What keeps a guest from going to a node now, in words.
    pub(super) fn missing_there(&self, to: &HostName, way: MoveWay) -> Option<String> {
        let coming = match way {
            MoveWay::Evacuate => &self.evacuated_to,
            MoveWay::Live | MoveWay::Cold => &self.inbound,
        };
        let coming = coming.get(to).copied().unwrap_or(0);
        let full = coming >= self.limits.inbound.saturating_add(self.ahead(way));
        full.then(|| format!("waits for {to}: {coming} go there already"))
    }

    /// Counts a guest that begins.
    pub(super) fn take(&mut self, source: &HostName, to: &HostName, way: MoveWay) {
        self.own += 1;
        self.count(source, Some(to), way == MoveWay::Evacuate);
    }

    fn ahead(&self, way: MoveWay) -> u32 {
        match way {
            MoveWay::Live => self.limits.ahead,
            MoveWay::Cold | MoveWay::Evacuate => 0,
        }
    }
}

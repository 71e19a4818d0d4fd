//! The world behind all fake drivers, and what happens in it by itself: how
//! migrations go on and end. What breaks is in [`super::breakage`], what
//! callers do in [`super::departure`] and [`super::acts`].
//!
//! Time passes in [`World::settle`]: everything that should have happened by
//! then happens, each thing at its own moment. Whoever looks or acts settles
//! first, so nobody ever sees a world that is behind its clock.

use std::collections::{BTreeMap, BTreeSet};

use drover_model::{
    guest::PowerState,
    ids::{HostName, InstanceId},
};
use tokio::time::Instant;

use super::{
    super::{Event, HypervisorError},
    journey::{Boundary, Journey, Leg},
    ledger::{Ledger, Violation},
    node::{CpuTime, Domain, Memory, Nature, Node},
    script::MigrationScript,
    storage::{File, Storage},
};

/// Boundaries one migration may cross in one settling. A round takes a
/// millisecond at the least, so this is minutes of the worst convergence.
const MAX_BOUNDARIES: usize = 1_000_000;

/// Everything there is.
#[derive(Debug)]
pub(super) struct World {
    pub(super) rng: fastrand::Rng,
    pub(super) nodes: BTreeMap<HostName, Node>,
    pub(super) storage: Storage,
    /// Pairs that cannot reach each other, in order of name.
    pub(super) cut: BTreeSet<(HostName, HostName)>,
    /// What a pair's link carries, bytes per second, if less than its nodes do.
    pub(super) links: BTreeMap<(HostName, HostName), u64>,
    pub(super) journeys: BTreeMap<InstanceId, Journey>,
    /// For migrations that have not begun.
    pub(super) scripts: BTreeMap<InstanceId, Vec<MigrationScript>>,
    pub(super) ledger: Ledger,
    /// What the guests are, apart from what nodes believe.
    pub(super) natures: BTreeMap<InstanceId, Nature>,
    /// Guests that cannot be read, and why.
    pub(super) unreadable: BTreeMap<InstanceId, String>,
    /// A task carries the migrations on.
    pub(super) ticking: bool,
}

/// A pair of nodes, in order of name.
pub(super) fn pair(a: &HostName, b: &HostName) -> (HostName, HostName) {
    if a < b {
        (a.clone(), b.clone())
    } else {
        (b.clone(), a.clone())
    }
}

impl World {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            rng: fastrand::Rng::with_seed(seed),
            nodes: BTreeMap::new(),
            storage: Storage::default(),
            cut: BTreeSet::new(),
            links: BTreeMap::new(),
            journeys: BTreeMap::new(),
            scripts: BTreeMap::new(),
            ledger: Ledger::default(),
            natures: BTreeMap::new(),
            unreadable: BTreeMap::new(),
            ticking: false,
        }
    }

    pub(super) fn node(&self, host: &HostName) -> &Node {
        self.nodes
            .get(host)
            .expect("drivers and scripts are only made for nodes that were added")
    }

    pub(super) fn node_mut(&mut self, host: &HostName) -> &mut Node {
        self.nodes
            .get_mut(host)
            .expect("drivers and scripts are only made for nodes that were added")
    }

    pub(super) fn domain(&self, host: &HostName, id: InstanceId) -> Option<&Domain> {
        self.node(host).domains.get(&id)
    }

    pub(super) fn domain_mut(&mut self, host: &HostName, id: InstanceId) -> Option<&mut Domain> {
        self.node_mut(host).domains.get_mut(&id)
    }

    /// The migration of a guest, if that node takes part in it.
    pub(super) fn journey_at(&self, host: &HostName, id: InstanceId) -> Option<&Journey> {
        self.journeys
            .get(&id)
            .filter(|j| j.from == *host || j.to == *host)
    }

    // ---- time ------------------------------------------------------------------

    /// Lets everything happen that is due by now.
    pub(super) fn settle(&mut self, now: Instant) {
        while let Some((at, host, id)) = self.next_shutdown().filter(|(at, ..)| *at <= now) {
            self.settle_journeys(at);
            self.has_shut_down(&host, id, at);
        }
        self.settle_journeys(now);
    }

    fn settle_journeys(&mut self, now: Instant) {
        let ids: Vec<InstanceId> = self.journeys.keys().copied().collect();
        for id in ids {
            self.settle_one(id, now);
        }
    }

    fn settle_one(&mut self, id: InstanceId, now: Instant) {
        for _ in 0..MAX_BOUNDARIES {
            let Some(journey) = self.journeys.get(&id) else {
                return;
            };
            let rate = self.rate(journey);
            let Some(journey) = self.journeys.get_mut(&id) else {
                return;
            };
            let Some(boundary) = journey.advance(now, rate) else {
                return;
            };
            self.cross(id, boundary, rate.unwrap_or(1));
        }
    }

    /// When something will happen by itself next.
    pub(super) fn next_wake(&self) -> Option<Instant> {
        self.journeys
            .values()
            .filter_map(|j| j.until_boundary(self.rate(j)).map(|d| j.settled() + d))
            .chain(self.next_shutdown().map(|(at, ..)| at))
            .min()
    }

    /// Whether something may happen by itself.
    pub(super) fn is_restless(&self) -> bool {
        !self.journeys.is_empty() || self.next_shutdown().is_some()
    }

    /// What the road of a migration carries now, bytes per second: each node's
    /// share of what all its migrations have together. None if it is cut.
    fn rate(&self, journey: &Journey) -> Option<u64> {
        let (from, to) = (&journey.from, &journey.to);
        if !self.is_linked(from, to) {
            return None;
        }
        let share = |host: &HostName| {
            let users = self
                .journeys
                .values()
                .filter(|j| j.from == *host || j.to == *host);
            self.node(host).spec.bandwidth_bytes_s / (users.count().max(1) as u64)
        };
        let link = self.links.get(&pair(from, to)).copied().unwrap_or(u64::MAX);
        let asked = journey.spec.options.bandwidth_mib_s;
        let asked = asked.map_or(u64::MAX, |mib| mib.saturating_mul(1 << 20));
        Some(share(from).min(share(to)).min(link).min(asked).max(1))
    }

    /// Whether two nodes reach each other.
    pub(super) fn is_linked(&self, a: &HostName, b: &HostName) -> bool {
        self.node(a).powered && self.node(b).powered && !self.cut.contains(&pair(a, b))
    }

    // ---- what a migration meets on its way ---------------------------------------

    fn cross(&mut self, id: InstanceId, boundary: Boundary, rate: u64) {
        let Some(journey) = self.journeys.get(&id) else {
            return;
        };
        let at = journey.settled();
        match boundary {
            Boundary::Scripted(fault) => self.apply(id, fault, at),
            Boundary::Ready => self.set_leg(id, Leg::Disk),
            Boundary::DisksCopied => self.disks_copied(id, at),
            Boundary::Round { last } => {
                self.node(&journey.from).emit(Event::MigrationIteration(id));
                if last {
                    self.switch_over(id, at, rate, false);
                }
            }
            Boundary::Commit => self.commit(id, at),
            Boundary::Whole => {
                let to = journey.to.clone();
                if let Some(domain) = self.domain_mut(&to, id) {
                    domain.whole = true;
                }
                if let Some(journey) = self.journeys.get_mut(&id) {
                    journey.enter_finish();
                }
            }
            Boundary::Finished => self.finished(id, at),
            Boundary::ConnectionDied => self.connection_died(id, at),
        }
    }

    fn set_leg(&mut self, id: InstanceId, leg: Leg) {
        if let Some(journey) = self.journeys.get_mut(&id) {
            journey.leg = leg;
        }
    }

    fn disks_copied(&mut self, id: InstanceId, at: Instant) {
        if let Err(message) = self.fill_copied_disks(id) {
            self.fail(id, HypervisorError::Failed(message), at);
        } else {
            self.set_leg(id, Leg::Memory);
        }
    }

    /// The copied disks take their room at the destination.
    fn fill_copied_disks(&mut self, id: InstanceId) -> Result<(), String> {
        for (path, size) in self.copied_files(id) {
            let Some(journey) = self.journeys.get(&id) else {
                return Ok(());
            };
            let to = journey.to.clone();
            let free = self
                .storage
                .volume_at(&to, &path)
                .map_or(0, |v| v.free_bytes());
            let Some(file) = self.storage.file_mut(&to, &path) else {
                return Err(format!("{path}: the copy's target is gone"));
            };
            if size.saturating_sub(file.allocated_bytes) > free {
                return Err(format!("{path}: No space left on device"));
            }
            file.allocated_bytes = size;
        }
        Ok(())
    }

    /// Paths of the disks that a migration copies, and the room they take.
    fn copied_files(&self, id: InstanceId) -> Vec<(String, u64)> {
        let Some(journey) = self.journeys.get(&id) else {
            return Vec::new();
        };
        let Some(domain) = self.domain(&journey.from, id) else {
            return Vec::new();
        };
        let copied = |target: &String| journey.spec.copied_disks.contains(target);
        domain
            .guest
            .disks
            .iter()
            .filter(|d| copied(&d.target))
            .filter_map(|d| {
                let path = d.local_path()?;
                let file = self.storage.file(&journey.from, path)?;
                Some((path.to_owned(), file.allocated_bytes))
            })
            .collect()
    }

    /// The guest stops at the source, to go on at the destination.
    pub(super) fn switch_over(&mut self, id: InstanceId, at: Instant, rate: u64, post_copy: bool) {
        self.stop_for_journey(id, at);
        if let Some(journey) = self.journeys.get_mut(&id) {
            journey.enter_switch_over(rate, post_copy);
        }
    }

    /// Stops the guest at the source for its migration, if it runs.
    pub(super) fn stop_for_journey(&mut self, id: InstanceId, at: Instant) {
        let Some(journey) = self.journeys.get_mut(&id) else {
            return;
        };
        journey.precopy.stop_guest();
        let from = journey.from.clone();
        if self.domain(&from, id).is_some_and(Domain::runs) {
            self.stop_vcpus(&from, id, at, PowerState::Paused);
            self.node(&from).emit(Event::SwitchOver(id));
            if let Some(journey) = self.journeys.get_mut(&id) {
                journey.stopped_at = Some(at);
            }
        }
    }

    /// The hand-over: from here on the guest is the destination's.
    fn commit(&mut self, id: InstanceId, at: Instant) {
        let Some(journey) = self.journeys.get_mut(&id) else {
            return;
        };
        let Leg::SwitchOver { then_post_copy, .. } = journey.leg else {
            return;
        };
        journey.downtime = journey.stopped_at.map(|t| at - t);
        journey.enter_commit(then_post_copy);
        let (from, to, ran) = (journey.from.clone(), journey.to.clone(), journey.guest_ran);
        let Some(source) = self.domain_mut(&from, id) else {
            return;
        };
        // Post-copy takes the source's pages away: it can never run again.
        source.whole = !then_post_copy;
        let memory = Memory::at(source.memory.counter(at));
        self.hand_over_disks(id, &from, &to);
        self.check_caches(id, &from);
        if let Some(dest) = self.domain_mut(&to, id) {
            dest.incoming = false;
            dest.guest.persistent = true;
            dest.whole = !then_post_copy;
            dest.memory = memory;
            dest.cpu = CpuTime::from(memory.counter(at));
            dest.state = PowerState::Paused;
        }
        if ran {
            self.start_vcpus(&to, id, at);
        }
        self.node(&from).emit(Event::Guest(id));
        self.node(&to).emit(Event::Guest(id));
    }

    /// The mirrors are complete: what the source has, the destination has.
    fn hand_over_disks(&mut self, id: InstanceId, from: &HostName, to: &HostName) {
        for (path, allocated_bytes) in self.copied_files(id) {
            let Some(content) = self.storage.file(from, &path).map(|f| f.content.clone()) else {
                continue;
            };
            if let Some(file) = self.storage.file_mut(to, &path) {
                *file = File {
                    content,
                    allocated_bytes,
                    ..file.clone()
                };
            }
        }
    }

    /// A shared disk that the source's host caches has not all of its writes.
    fn check_caches(&mut self, id: InstanceId, from: &HostName) {
        let (Some(journey), Some(domain)) = (self.journeys.get(&id), self.domain(from, id)) else {
            return;
        };
        let (node, copied) = (journey.to.clone(), &journey.spec.copied_disks);
        let cached = domain.guest.disks.iter().find(|d| {
            domain.tokens.contains_key(&d.target)
                && !copied.contains(&d.target)
                && !d.is_coherent_when_shared()
        });
        if let Some(disk) = cached {
            let what = format!("writes to {} stayed in {from}'s cache", disk.target);
            let guest = id;
            self.ledger
                .record(Violation::DiskLost { guest, node, what });
        }
    }

    /// The source has learnt of it.
    pub(super) fn finished(&mut self, id: InstanceId, at: Instant) {
        let Some(journey) = self.journeys.get(&id) else {
            return;
        };
        if journey.leave_stale_copy {
            let lost = "the daemon went away before it confirmed the migration";
            return self.end_unconfirmed(id, HypervisorError::Lost(lost.to_owned()));
        }
        let (from, keep) = (journey.from.clone(), journey.keep_definition);
        self.settle_destination(id);
        self.end_copy(&from, id, at);
        if !keep {
            self.node_mut(&from).domains.remove(&id);
        }
        self.end(id, Ok(()));
    }

    /// The destination's copy becomes an ordinary domain.
    pub(super) fn settle_destination(&mut self, id: InstanceId) {
        let Some(journey) = self.journeys.get(&id) else {
            return;
        };
        let mut sample = journey.sample();
        sample.memory.remaining_bytes = 0;
        sample.post_copy = false;
        let to = journey.to.clone();
        if let Some(domain) = self.domain_mut(&to, id) {
            domain.completed = Some(sample);
        }
    }

    /// It moved, and the source never learns: its copy stays, paused and old.
    pub(super) fn end_unconfirmed(&mut self, id: InstanceId, error: HypervisorError) {
        let Some(journey) = self.journeys.get(&id) else {
            return;
        };
        let from = journey.from.clone();
        self.settle_destination(id);
        if let Some(domain) = self.domain_mut(&from, id) {
            domain.left_by_script = true;
        }
        self.end(id, Err(error));
    }

    /// The migration is over: nothing but the news is left of it.
    pub(super) fn end(&mut self, id: InstanceId, result: super::super::Result<()>) {
        let Some(journey) = self.journeys.remove(&id) else {
            return;
        };
        for host in [&journey.from, &journey.to] {
            self.node(host).emit(Event::JobCompleted(id));
            self.node(host).emit(Event::Guest(id));
        }
        journey.tell(result);
    }
}

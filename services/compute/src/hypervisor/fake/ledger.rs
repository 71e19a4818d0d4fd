//! The checker's own book: who ran where, kept apart from what the nodes
//! believe, so that a mistake in either shows.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    time::Duration,
};

use drover_model::ids::{HostName, InstanceId};
use tokio::time::Instant;

/// A promise to a guest that was broken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Violation {
    /// Two copies ran at once.
    TwoRunning {
        /// Whose.
        guest: InstanceId,
        /// Where.
        nodes: Vec<HostName>,
    },
    /// Two copies are active with no migration between them.
    TwoActive {
        /// Whose.
        guest: InstanceId,
        /// Where.
        nodes: Vec<HostName>,
    },
    /// No copy is active, and no script killed it.
    NowhereActive {
        /// Whose.
        guest: InstanceId,
    },
    /// It was started with other memory than it had when it last ran.
    MemoryLost {
        /// Whose.
        guest: InstanceId,
        /// Where it was started.
        node: HostName,
        /// How long it had run.
        expected: Duration,
        /// How long its memory says that it had.
        found: Duration,
    },
    /// It runs on a disk that is not its own, is old, or is gone.
    DiskLost {
        /// Whose.
        guest: InstanceId,
        /// Where it runs.
        node: HostName,
        /// Which disk, and what is wrong with it.
        what: String,
    },
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TwoRunning { guest, nodes } => {
                write!(f, "{guest} ran at once on {}", names(nodes))
            }
            Self::TwoActive { guest, nodes } => {
                write!(f, "{guest} is active at once on {}", names(nodes))
            }
            Self::NowhereActive { guest } => write!(f, "{guest} is active nowhere"),
            Self::MemoryLost {
                guest,
                node,
                expected,
                found,
            } => write!(
                f,
                "{guest} was started on {node} with memory of {found:?}, it had run {expected:?}"
            ),
            Self::DiskLost { guest, node, what } => write!(f, "{guest} on {node}: {what}"),
        }
    }
}

fn names(nodes: &[HostName]) -> String {
    let names: Vec<&str> = nodes.iter().map(HostName::as_str).collect();
    names.join(" and ")
}

/// What is known of one guest.
#[derive(Debug, Default)]
struct Life {
    running_on: BTreeSet<HostName>,
    /// How long it ran, up to `since`.
    ran: Duration,
    /// Since when it runs, if it does.
    since: Option<Instant>,
    /// It may be active nowhere.
    ended: bool,
    /// Its next boot may find disks older than they were.
    may_go_back: bool,
}

impl Life {
    fn ran_until(&self, now: Instant) -> Duration {
        self.ran + self.since.map_or(Duration::ZERO, |t| now - t)
    }
}

/// The book.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    lives: BTreeMap<InstanceId, Life>,
    violations: Vec<Violation>,
}

impl Ledger {
    /// A guest begins its life, or a new one after its end.
    pub(super) fn born(&mut self, guest: InstanceId, active: bool, counter: Duration) {
        let life = self.lives.entry(guest).or_default();
        life.ended = !active;
        life.ran = counter;
        life.since = None;
    }

    /// How long it has run, wherever it did.
    pub(super) fn ran(&self, guest: InstanceId, now: Instant) -> Duration {
        let life = self.lives.get(&guest);
        life.map_or(Duration::ZERO, |life| life.ran_until(now))
    }

    /// It boots: with new memory, which counts on from there.
    pub(super) fn boots(&mut self, guest: InstanceId, counter: Duration) {
        let life = self.lives.entry(guest).or_default();
        life.ended = false;
        if life.running_on.is_empty() {
            life.ran = counter;
            life.since = None;
        }
    }

    /// Somebody gave leave to go back to older disks, once.
    pub(super) fn accept_older_disks(&mut self, guest: InstanceId) {
        self.lives.entry(guest).or_default().may_go_back = true;
    }

    /// Whether there is such a leave.
    pub(super) fn may_go_back(&self, guest: InstanceId) -> bool {
        self.lives.get(&guest).is_some_and(|life| life.may_go_back)
    }

    /// Uses such a leave up, if there is one.
    pub(super) fn goes_back(&mut self, guest: InstanceId) -> bool {
        let life = self.lives.get_mut(&guest);
        life.is_some_and(|life| std::mem::take(&mut life.may_go_back))
    }

    /// Its vCPUs begin to run there.
    pub(super) fn starts(
        &mut self,
        guest: InstanceId,
        node: &HostName,
        now: Instant,
        counter: Duration,
    ) {
        let life = self.lives.entry(guest).or_default();
        let expected = life.ran_until(now);
        life.running_on.insert(node.clone());
        life.since.get_or_insert(now);
        life.ran = expected - life.since.map_or(Duration::ZERO, |t| now - t);
        let nodes: Vec<HostName> = life.running_on.iter().cloned().collect();
        if nodes.len() > 1 {
            self.record(Violation::TwoRunning { guest, nodes });
        }
        if counter != expected {
            self.record(Violation::MemoryLost {
                guest,
                node: node.clone(),
                expected,
                found: counter,
            });
        }
    }

    /// Its vCPUs stop there.
    pub(super) fn stops(&mut self, guest: InstanceId, node: &HostName, now: Instant) {
        let Some(life) = self.lives.get_mut(&guest) else {
            return;
        };
        if life.running_on.remove(node) && life.running_on.is_empty() {
            life.ran = life.ran_until(now);
            life.since = None;
        }
    }

    /// It may be active nowhere from now on: a script killed it, or it went by itself.
    pub(super) fn ends(&mut self, guest: InstanceId) {
        if let Some(life) = self.lives.get_mut(&guest) {
            life.ended = true;
        }
    }

    /// Whether it may be active nowhere.
    pub(super) fn has_ended(&self, guest: InstanceId) -> bool {
        self.lives.get(&guest).is_none_or(|life| life.ended)
    }

    /// Every guest there ever was.
    pub(super) fn guests(&self) -> Vec<InstanceId> {
        self.lives.keys().copied().collect()
    }

    /// Notes a violation, once.
    pub(super) fn record(&mut self, violation: Violation) {
        if !self.violations.contains(&violation) {
            self.violations.push(violation);
        }
    }

    /// All that were noted.
    pub(super) fn violations(&self) -> &[Violation] {
        &self.violations
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str) -> HostName {
        name.parse().unwrap()
    }

    const SECOND: Duration = Duration::from_secs(1);

    fn ledger_with_guest() -> (Ledger, InstanceId, Instant) {
        let guest = InstanceId(uuid::Uuid::from_u128(1));
        let mut ledger = Ledger::default();
        ledger.born(guest, true, Duration::ZERO);
        (ledger, guest, Instant::now())
    }

    #[test]
    fn a_move_with_its_memory_is_well() {
        let (mut ledger, guest, t0) = ledger_with_guest();
        ledger.starts(guest, &node("a"), t0, Duration::ZERO);
        ledger.stops(guest, &node("a"), t0 + SECOND);
        ledger.starts(guest, &node("b"), t0 + 3 * SECOND, SECOND);
        assert_eq!(ledger.violations(), []);
    }

    #[test]
    fn two_at_once_are_found_even_for_a_moment() {
        let (mut ledger, guest, t0) = ledger_with_guest();
        ledger.starts(guest, &node("a"), t0, Duration::ZERO);
        ledger.starts(guest, &node("b"), t0 + SECOND, SECOND);
        ledger.stops(guest, &node("a"), t0 + SECOND);
        assert_eq!(
            ledger.violations(),
            [Violation::TwoRunning {
                guest,
                nodes: vec![node("a"), node("b")]
            }]
        );
    }

    #[test]
    fn old_memory_is_found() {
        let (mut ledger, guest, t0) = ledger_with_guest();
        ledger.starts(guest, &node("a"), t0, Duration::ZERO);
        ledger.stops(guest, &node("a"), t0 + 2 * SECOND);
        ledger.starts(guest, &node("b"), t0 + 2 * SECOND, SECOND);
        assert!(matches!(
            ledger.violations(),
            [Violation::MemoryLost { .. }]
        ));
    }
}

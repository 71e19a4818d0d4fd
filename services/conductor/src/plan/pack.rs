//! Room for one guest after the other: a ledger of what nodes still have, which
//! every planner writes its moves into.
//!
//! It is careful: what comes is counted, what leaves is not taken off, because
//! the one may be there before the other is gone. Disks are left to the nodes'
//! own checks: only they know which of them are copied.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, HashSet},
};

use drover_model::{
    check::{CheckCode, CheckFailure, Side},
    ids::HostName,
    operation::MoveWay,
};
use drover_store::claims::{Resources, Usage};

use super::{Examination, GuestView, NodeView, World};
use crate::{
    checks::{self, Liveness},
    placement,
};

/// Nodes whose reasons are told when none can take a guest, at the most.
const MOST_TOLD: usize = 8;

/// Most memory left first, then most vCPUs left, then by name.
type ByRoom<'a> = (Reverse<u64>, Reverse<u64>, &'a HostName);

/// What nodes still have.
#[derive(Debug)]
pub struct Ledger<'a> {
    rooms: BTreeMap<&'a HostName, Room<'a>>,
    open: BTreeSet<ByRoom<'a>>,
    /// Anti-affinity groups of which a node has a member, or will have.
    groups: HashSet<(&'a str, &'a HostName)>,
}

#[derive(Debug)]
struct Room<'a> {
    node: &'a NodeView,
    usage: Usage,
    /// As a restore sees its own node: whether it is switched off is no matter.
    open_anyway: bool,
}

/// What is to be placed.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    /// The guest.
    pub guest: &'a GuestView,
    /// How it is to come.
    pub way: MoveWay,
    /// Only to these nodes; to any if it is empty.
    pub to: &'a [HostName],
    /// What the nodes said.
    pub examination: Option<&'a Examination>,
    /// Not to these either.
    pub except: &'a [HostName],
}

impl Wanted<'_> {
    fn refusal(&self, host: &HostName) -> Option<&Vec<CheckFailure>> {
        self.examination?.refusal(self.way, host)
    }
}

/// A place for a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Where.
    pub host: HostName,
    /// Memory left there when it has come, MiB.
    pub memory_left_mib: u64,
}

impl Room<'_> {
    fn closed(&self) -> impl Iterator<Item = &CheckFailure> {
        let counts = |f: &&CheckFailure| !(self.open_anyway && f.code == CheckCode::HostDisabled);
        self.node.closed.iter().filter(counts)
    }

    fn memory_left_mib(&self) -> u64 {
        let usage = &self.usage;
        usage
            .usable
            .memory_mib
            .saturating_sub(usage.used.memory_mib)
    }

    fn vcpus_left(&self) -> u64 {
        self.usage
            .usable
            .vcpus
            .saturating_sub(self.usage.used.vcpus)
    }
}

fn by_room<'a>(room: &Room<'a>) -> ByRoom<'a> {
    let (memory, vcpus) = (room.memory_left_mib(), room.vcpus_left());
    (Reverse(memory), Reverse(vcpus), &room.node.host)
}

/// What a guest takes of its node; one that is off takes nothing.
pub fn needs(guest: &GuestView) -> Resources {
    match guest.runs {
        true => Resources {
            vcpus: u64::from(guest.vcpus),
            memory_mib: guest.memory_mib,
            disk_bytes: 0,
        },
        false => Resources::default(),
    }
}

impl<'a> Ledger<'a> {
    /// What nodes have now.
    pub fn new(world: &'a World) -> Self {
        let room = |node: &'a NodeView| {
            let room = Room {
                node,
                usage: node.usage,
                open_anyway: false,
            };
            (&node.host, room)
        };
        let rooms: BTreeMap<_, _> = world.nodes.iter().map(room).collect();
        let is_open = |room: &&Room<'a>| room.closed().next().is_none();
        let open = rooms.values().filter(is_open).map(by_room).collect();
        let of_guest = |g: &'a GuestView| {
            g.anti_affinity
                .iter()
                .map(move |group| (group.as_str(), &g.host))
        };
        let groups = world.guests.iter().flat_map(of_guest).collect();
        Self {
            rooms,
            open,
            groups,
        }
    }

    /// Takes a node as open although it is switched off for new guests: it is to
    /// be opened before any of them comes.
    pub fn open_anyway(&mut self, host: &HostName) {
        if let Some(room) = self.rooms.get_mut(host) {
            room.open_anyway = true;
            if room.closed().next().is_none() {
                self.open.insert(by_room(room));
            }
        }
    }

    /// The node with the most room of those that can take a guest.
    ///
    /// # Errors
    /// There is none; why not, node by node.
    pub fn choose(&self, wanted: &Wanted<'_>) -> Result<Place, Vec<CheckFailure>> {
        let needs = needs(wanted.guest);
        for (Reverse(memory_left), _, host) in &self.open {
            if *memory_left < needs.memory_mib {
                break; // and so have all that follow
            }
            if self.fits(wanted, host) {
                return Ok(Place {
                    host: (*host).clone(),
                    memory_left_mib: memory_left - needs.memory_mib,
                });
            }
        }
        Err(self.nowhere(wanted))
    }

    /// Whether an open node can take a guest.
    pub fn fits(&self, wanted: &Wanted<'_>, host: &HostName) -> bool {
        self.rooms.get(host).is_some_and(|room| {
            may_go(wanted, host)
                && wanted.refusal(host).is_none()
                && room.usage.shortfalls(&needs(wanted.guest)).is_empty()
                && self.same_group(wanted.guest, host).is_none()
                && room.closed().next().is_none()
        })
    }

    /// Everything that keeps a node from taking a guest, leaving aside whether
    /// anybody wants it there.
    pub fn refusals(&self, wanted: &Wanted<'_>, host: &HostName) -> Vec<CheckFailure> {
        let Some(room) = self.rooms.get(host) else {
            let unheeded = Liveness {
                down_after_ms: 0,
                now_ms: 0,
            };
            return checks::node(host, None, Side::Destination, unheeded);
        };
        let mut failures: Vec<CheckFailure> = room.closed().cloned().collect();
        failures.extend(checks::room(
            &room.usage.shortfalls(&needs(wanted.guest)),
            host,
        ));
        failures.extend(self.same_group(wanted.guest, host).map(|g| apart(g, host)));
        failures.extend(wanted.refusal(host).into_iter().flatten().cloned());
        failures
    }

    /// Why a node is closed to everybody; empty if it is open.
    pub fn closed(&self, host: &HostName) -> Vec<CheckFailure> {
        let room = self.rooms.get(host);
        room.map_or_else(Vec::new, |room| room.closed().cloned().collect())
    }

    /// Writes a guest down on a node.
    pub fn take(&mut self, guest: &'a GuestView, host: &HostName) {
        let Some(room) = self.rooms.get_mut(host) else {
            return;
        };
        let was_open = self.open.remove(&by_room(room));
        let needs = needs(guest);
        room.usage.used.vcpus += needs.vcpus;
        room.usage.used.memory_mib += needs.memory_mib;
        if was_open {
            self.open.insert(by_room(room));
        }
        self.expect(guest, host);
    }

    /// Remembers that a guest is on its way to a node whose room is promised to
    /// it already.
    pub fn expect(&mut self, guest: &'a GuestView, host: &HostName) {
        let Some((host, _)) = self.rooms.get_key_value(host) else {
            return;
        };
        let groups = guest.anti_affinity.iter().map(|g| (g.as_str(), *host));
        self.groups.extend(groups);
    }

    fn same_group<'g>(&self, guest: &'g GuestView, host: &HostName) -> Option<&'g str> {
        let mut groups = guest.anti_affinity.iter().map(String::as_str);
        groups.find(|group| self.groups.contains(&(*group, host)))
    }

    fn nowhere(&self, wanted: &Wanted<'_>) -> Vec<CheckFailure> {
        // Open ones first: what is missing there is missing least.
        let open = self.open.iter().map(|(_, _, host)| *host);
        let closed = self.rooms.values().filter(|r| r.closed().next().is_some());
        let known = open.chain(closed.map(|r| &r.node.host));
        let unknown = wanted.to.iter().filter(|h| !self.rooms.contains_key(h));
        let asked: Vec<&HostName> = known
            .chain(unknown)
            .filter(|host| may_go(wanted, host))
            .collect();
        let told: Vec<(HostName, Vec<CheckFailure>)> = asked
            .iter()
            .take(MOST_TOLD)
            .map(|host| ((*host).clone(), self.refusals(wanted, host)))
            .collect();
        let mut failures = placement::nowhere(&told);
        let more = asked.len() - told.len();
        if let Some(first) = failures.first_mut().filter(|_| more > 0) {
            first.message += &format!(" and {more} more");
        }
        failures
    }
}

/// Whether anybody wants a guest on that node.
fn may_go(wanted: &Wanted<'_>, host: &HostName) -> bool {
    let named = wanted.to.is_empty() || wanted.to.contains(host);
    named && *host != wanted.guest.host && !wanted.except.contains(host)
}

fn apart(group: &str, host: &HostName) -> CheckFailure {
    CheckFailure {
        code: CheckCode::AntiAffinity,
        side: Side::Destination,
        message: format!("a guest of its group '{group}' is on {host}, or on its way there"),
        remedy: "choose another node, or take one of them out of the group".to_owned(),
    }
}

#[cfg(test)]
#[path = "pack_tests.rs"]
mod tests;

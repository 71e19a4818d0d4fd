//! Which guests leave the most loaded nodes, and where to.
//!
//! A node's load is the larger of two shares: CPUs that its guests keep busy, and
//! memory that they hold. The spread is the most loaded node's load less the mean
//! of all open nodes. Each step takes one guest from the most loaded node to the
//! least loaded one that can have it: the guest that relieves it most, or a
//! cheaper one that does nearly as well, until the spread is small enough or
//! nothing helps.

use std::collections::{BTreeMap, BTreeSet};

use drover_model::{
    ids::HostName,
    operation::{MoveWay, OperationPlan, PlannedMove, Verdict},
};

use super::{
    Costs, Examinations, GuestView, NodeView, World, estimate,
    forecast::{Used, percent},
    pack::{Ledger, Wanted},
    verdict,
};

/// A move that relieves a node by less is not worth its cost, thousandths of a
/// percent point.
const LEAST_RELIEF: u64 = 1000;

/// What balance there is to be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Goal {
    /// Largest spread that is left: the most loaded node's load less the mean,
    /// percent points.
    pub threshold_percent: u32,
    /// A guest that moved is left alone for so long, ms.
    pub cool_down_ms: u64,
    /// No target is loaded more than this by it, percent.
    pub target_limit_percent: u32,
    /// Moves at the most.
    pub max_moves: usize,
}

/// The moves, in order, each with the spread after it.
pub fn plan(
    world: &World,
    goal: &Goal,
    examinations: &Examinations,
    costs: Costs,
) -> OperationPlan {
    let mut cluster = Cluster::new(world, goal, examinations, costs);
    let before = cluster.spread();
    let mut steps: Vec<(PlannedMove, f64)> = Vec::new();
    let stopped = loop {
        if cluster.spread() <= f64::from(goal.threshold_percent) {
            break format!("the spread is within {} points", goal.threshold_percent);
        }
        if steps.len() >= goal.max_moves {
            break format!("{} moves are the most of one run", goal.max_moves);
        }
        match cluster.step() {
            Ok(planned) => steps.push((planned, cluster.spread())),
            Err(why) => break why,
        }
    };
    // Steps that brought nothing in the end are not taken.
    let mut best = (0, before);
    for (i, (_, spread)) in steps.iter().enumerate() {
        if *spread < best.1 {
            best = (i + 1, *spread);
        }
    }
    steps.truncate(best.0);
    let mark = |(planned, spread): (PlannedMove, f64)| PlannedMove {
        spread_after_percent: Some(spread),
        ..planned
    };
    let moves = steps.into_iter().map(mark).collect();
    let mut notes = vec![stopped];
    notes.extend(cluster.unknown_note());
    OperationPlan {
        spread_percent: Some((before, best.1)),
        notes,
        ..verdict::plan(world, moves, None, None)
    }
}

/// A node that takes part.
struct Node<'a> {
    view: &'a NodeView,
    used: Used,
    guests: Vec<&'a GuestView>,
}

impl Node<'_> {
    fn load(&self) -> u64 {
        load(self.view, self.used)
    }
}

/// Thousandths of a percent.
fn load(node: &NodeView, used: Used) -> u64 {
    used.cpu_load(node).max(used.memory_load(node))
}

/// A step that could be taken.
struct Choice<'a> {
    guest: &'a GuestView,
    to: &'a HostName,
    relief: u64,
    cost_ms: u64,
}

struct Cluster<'a> {
    now_ms: u64,
    goal: &'a Goal,
    examinations: &'a Examinations,
    costs: Costs,
    nodes: BTreeMap<&'a HostName, Node<'a>>,
    by_load: BTreeSet<(u64, &'a HostName)>,
    total: u64,
    ledger: Ledger<'a>,
}

impl<'a> Cluster<'a> {
    fn new(world: &'a World, goal: &'a Goal, examinations: &'a Examinations, costs: Costs) -> Self {
        let open = world.nodes.iter().filter(|n| n.closed.is_empty());
        let node = |view: &'a NodeView| Node {
            view,
            used: Used::default(),
            guests: Vec::new(),
        };
        let mut nodes: BTreeMap<_, _> = open.map(|n| (&n.host, node(n))).collect();
        for guest in &world.guests {
            if let Some(node) = nodes.get_mut(&guest.host) {
                node.used.add(Used::by(guest));
                node.guests.push(guest);
            }
        }
        for node in nodes.values_mut() {
            node.guests.sort_unstable_by_key(|g| g.id);
        }
        let by_load: BTreeSet<_> = nodes.iter().map(|(host, n)| (n.load(), *host)).collect();
        Self {
            now_ms: world.now_ms,
            goal,
            examinations,
            costs,
            total: by_load.iter().map(|(load, _)| load).sum(),
            nodes,
            by_load,
            ledger: Ledger::new(world),
        }
    }

    fn mean(&self) -> u64 {
        self.total / u64::try_from(self.nodes.len().max(1)).unwrap_or(u64::MAX)
    }

    /// Percent points.
    fn spread(&self) -> f64 {
        let most = self.by_load.last().map_or(0, |(load, _)| *load);
        percent(most.saturating_sub(self.mean()))
    }

    /// Takes the best step, or says why there is none.
    fn step(&mut self) -> Result<PlannedMove, String> {
        let Some((most, source)) = self.by_load.last().copied() else {
            return Err("there is no open node".to_owned());
        };
        let need = most
            .saturating_sub(self.mean() + u64::from(self.goal.threshold_percent) * 1000)
            .max(LEAST_RELIEF);
        let mut left: BTreeMap<&'static str, usize> = BTreeMap::new();
        let mut choices = Vec::new();
        for guest in &self.nodes[source].guests {
            match self.choice(guest, source, most) {
                Ok(choice) => choices.push(choice),
                Err(why) => *left.entry(why).or_default() += 1,
            }
        }
        // More than is needed is worth nothing; a fifth less is nearly as good.
        let worth = |c: &Choice<'_>| c.relief.min(need);
        let best = choices.iter().map(worth).max().unwrap_or(0);
        let good = choices.into_iter().filter(|c| worth(c) * 5 >= best * 4);
        let chosen = good.min_by_key(|c| (c.cost_ms, u64::MAX - c.relief, c.guest.id));
        let Some(choice) = chosen else {
            let reasons: Vec<String> = left.iter().map(|(why, n)| format!("{n} {why}")).collect();
            return Err(format!(
                "no guest of {source} is left that would help: {}",
                reasons.join(", ")
            ));
        };
        Ok(self.take(source, &choice))
    }

    /// What moving a guest would bring, or why it is left alone.
    fn choice(
        &self,
        guest: &'a GuestView,
        source: &HostName,
        most: u64,
    ) -> Result<Choice<'a>, &'static str> {
        self.may_move(guest)?;
        let from = &self.nodes[source];
        let used = Used::by(guest);
        let mut rest = from.used;
        rest.take_off(used);
        let after_here = load(from.view, rest);
        if most.saturating_sub(after_here) < LEAST_RELIEF {
            return Err("use too little");
        }
        let examination = self.examinations.get(&guest.id);
        let wanted = Wanted {
            guest,
            way: MoveWay::Live,
            to: &[],
            examination,
            except: &[],
        };
        let limit = u64::from(self.goal.target_limit_percent) * 1000;
        for (there, to) in &self.by_load {
            if there + LEAST_RELIEF > most {
                break;
            }
            let node = &self.nodes[to];
            let mut with = node.used;
            with.add(used);
            let after = load(node.view, with);
            let helps = after <= limit && after.max(after_here) + LEAST_RELIEF <= most;
            if node.used.unknown > 0 || !helps || !self.ledger.fits(&wanted, to) {
                continue;
            }
            let (cost_ms, _) = estimate::times(guest, MoveWay::Live, self.costs);
            return Ok(Choice {
                guest,
                to,
                relief: most - after.max(after_here),
                cost_ms,
            });
        }
        Err("fit on no less loaded node")
    }

    fn may_move(&self, guest: &GuestView) -> Result<(), &'static str> {
        let held = |e: &super::Examination| {
            let source = e.source.get(&MoveWay::Live);
            source.is_some_and(|failures| !failures.is_empty())
        };
        let lately = |at: u64| self.now_ms.saturating_sub(at) < self.goal.cool_down_ms;
        if !guest.runs {
            return Err("are off");
        }
        if guest.busy.is_some() {
            return Err("are busy");
        }
        if guest.load.is_none() {
            return Err("were not watched for long enough");
        }
        if guest.moved_at_ms.is_some_and(lately) {
            return Err("moved a short while ago");
        }
        if self.examinations.get(&guest.id).is_some_and(held) {
            return Err("cannot move live");
        }
        Ok(())
    }

    fn take(&mut self, source: &'a HostName, choice: &Choice<'a>) -> PlannedMove {
        let Choice { guest, to, .. } = *choice;
        let used = Used::by(guest);
        let (here, there) = (self.nodes[source].load(), self.nodes[to].load());
        self.change(source, |node| {
            node.used.take_off(used);
            node.guests.retain(|g| g.id != guest.id);
        });
        // It is not among the target's guests: nobody moves twice.
        self.change(to, |node| node.used.add(used));
        self.ledger.take(guest, to);
        let (expected_ms, expected_downtime_ms) = estimate::times(guest, MoveWay::Live, self.costs);
        let loads = [
            here,
            self.nodes[source].load(),
            there,
            self.nodes[to].load(),
        ];
        let [a, b, c, d] = loads.map(percent);
        verdict::planned(
            guest,
            Verdict::Moves {
                way: MoveWay::Live,
                to: to.clone(),
                expected_ms,
                expected_downtime_ms,
                why: format!(
                    "{source} goes from {a:.0} % to {b:.0} %, {to} from {c:.0} % to {d:.0} %"
                ),
            },
        )
    }

    fn change(&mut self, host: &'a HostName, change: impl FnOnce(&mut Node<'a>)) {
        let Some(node) = self.nodes.get_mut(host) else {
            return;
        };
        let before = node.load();
        change(node);
        let after = node.load();
        self.by_load.remove(&(before, host));
        self.by_load.insert((after, host));
        self.total = self.total - before + after;
    }

    fn unknown_note(&self) -> Option<String> {
        let unknown = self.nodes.values().filter(|n| n.used.unknown > 0).count();
        (unknown > 0).then(|| {
            format!(
                "nodes that take nothing, as it is not known for long enough what some of their guests use: {unknown}"
            )
        })
    }
}

#[cfg(test)]
#[path = "balance_tests.rs"]
mod tests;

//! Looks at the world and asks the nodes, so that a plan can be made: the same
//! for a dry run and for the plan that runs.
//!
//! A plan is made, every move in it is examined as its migration will be, and
//! what the nodes refuse is kept in mind for the next plan, until none is
//! refused.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use drover_model::{
    check::{CheckCode, CheckFailure, Side},
    ids::{HostName, InstanceId, MigrationId, OperationId},
    migration::Way,
    node::{HypervisorReport, Wishes},
    operation::{Evidence, MoveMode, MoveWay, OperationPlan, Task, Verdict},
};
use drover_store::{claims::Usage, instances::InstanceRow, nodes::NodeRow, operations::UnderWay};
use futures_util::{StreamExt, stream};

use super::{origin, ways};
use crate::{
    app::Context,
    checks,
    comparing::Patience,
    plan::{self, Examinations, GuestView, Load, NodeView, World, balance::Goal},
    survey::Survey,
};

/// Guests that are asked about at once.
const ASKED_AT_ONCE: usize = 8;
/// Plans made before one is taken as it is.
const ROUNDS: usize = 4;
/// Moves looked at for when a guest moved last.
const NEWEST_MOVES: u32 = 5000;

/// What the record says of the cluster.
pub struct View {
    /// As planners see it.
    pub world: World,
    /// Every unfinished migration.
    pub active: UnderWay,
    rows: BTreeMap<InstanceId, InstanceRow>,
}

/// Whose eyes it is seen with.
#[derive(Debug, Clone, Copy, Default)]
pub struct Eyes {
    /// Migrations of this operation keep no guest busy.
    pub own: Option<OperationId>,
    /// Whether it matters when guests moved last.
    pub moves: bool,
}

/// A plan, and what it was made of.
#[derive(Debug, Default)]
pub struct Planned {
    /// What is to be done.
    pub plan: OperationPlan,
    /// What the nodes said.
    pub examinations: Examinations,
    /// Of an evacuation, what is known of its node.
    pub evidence: Option<Evidence>,
}

/// Reads the world.
///
/// # Errors
/// The record cannot be read.
pub async fn view(context: &Context, eyes: Eyes) -> drover_store::Result<View> {
    let store = &context.store;
    let rows = store.nodes().await?;
    let reports: Vec<_> = rows.iter().map(|row| &row.report).collect();
    let usages = store.usages(&reports).await?;
    let live = context.liveness();
    let nodes = rows.iter().zip(usages).map(|(row, usage)| {
        let closed = checks::node(&row.report.host, Some(row), Side::Destination, live);
        node_view(row, usage, closed)
    });
    let nodes = nodes.collect();
    let active = store.under_way().await?;
    let mut about = About::read(context, &rows, &active, eyes).await?;
    let instances = store.instances(None, None).await?;
    // One that its node no longer lists is gone, unless it is on its way just now.
    let there =
        |row: &&InstanceRow| row.missing_since_ms.is_none() || about.busy.contains_key(&row.id);
    let there: Vec<_> = instances.iter().filter(there).collect();
    let guests = there.into_iter().map(|row| about.guest(row)).collect();
    let world = World {
        now_ms: live.now_ms,
        nodes,
        guests,
    };
    let rows = instances.into_iter().map(|row| (row.id, row)).collect();
    Ok(View {
        world,
        active,
        rows,
    })
}

fn node_view(row: &NodeRow, usage: Usage, closed: Vec<CheckFailure>) -> NodeView {
    let (vcpus, memory_mib) = match &row.report.hypervisor {
        HypervisorReport::Up { inventory, .. } => (inventory.vcpus, inventory.memory_mib),
        HypervisorReport::Down { .. } => (0, 0),
    };
    NodeView {
        host: row.report.host.clone(),
        closed,
        usage,
        vcpus,
        memory_mib,
    }
}

/// That a node is closed does not count if it is about to be opened.
fn without_door(
    mut failures: Vec<CheckFailure>,
    opened: Option<&HostName>,
    host: &HostName,
) -> Vec<CheckFailure> {
    if opened == Some(host) {
        failures.retain(|f| f.code != CheckCode::HostDisabled);
    }
    failures
}

/// What is known of guests beside their rows.
struct About {
    wishes: HashMap<InstanceId, Wishes>,
    /// What has them, and the node that they leave live by it.
    busy: HashMap<InstanceId, (String, Option<HostName>)>,
    loads: HashMap<InstanceId, Load>,
    moved_at_ms: HashMap<InstanceId, u64>,
}

impl About {
    async fn read(
        context: &Context,
        nodes: &[NodeRow],
        active: &UnderWay,
        eyes: Eyes,
    ) -> drover_store::Result<Self> {
        let mut wishes = HashMap::new();
        for node in nodes {
            if let HypervisorReport::Up { instances, .. } = &node.report.hypervisor {
                let listed = instances.iter().filter(|i| !i.incoming);
                wishes.extend(listed.map(|i| (i.id, i.wishes.clone())));
            }
        }
        let mut busy = HashMap::new();
        for m in &active.known {
            if eyes.own.is_none() || m.operation != eyes.own {
                let leaves = matches!(m.way, Way::Live(_)).then(|| m.source_host.clone());
                busy.insert(m.instance_uuid, (plan::has_it(m), leaves));
            }
        }
        // Also of this operation: what comes of it is not seen here.
        for m in &active.unread {
            let words = format!("migration {} ({}) of it cannot be read here", m.id, m.kind);
            busy.insert(m.instance, (words, None));
        }
        let mut moved_at_ms = HashMap::new();
        if eyes.moves {
            // Newest first: the first of each counts.
            for m in context.store.newest_moves(NEWEST_MOVES).await? {
                let at_ms = m.finished_at_ms.unwrap_or(m.updated_at_ms);
                moved_at_ms.entry(m.instance_uuid).or_insert(at_ms);
            }
        }
        Ok(Self {
            wishes,
            busy,
            loads: context.loads.all(),
            moved_at_ms,
        })
    }

    fn guest(&mut self, row: &InstanceRow) -> GuestView {
        let wishes = self.wishes.remove(&row.id).unwrap_or_default();
        let (busy, leaves) = self.busy.remove(&row.id).unzip();
        GuestView {
            id: row.id,
            name: row.name.clone(),
            project: row.project.clone(),
            host: row.host.clone(),
            vcpus: row.vcpus,
            memory_mib: row.memory_mib,
            disk_bytes: row.disk_bytes,
            runs: row.power_state.is_active(),
            priority: wishes.priority,
            anti_affinity: wishes.anti_affinity,
            busy,
            leaves_live: leaves.flatten().as_ref() == Some(&row.host),
            load: self.loads.get(&row.id).copied(),
            dirty_rate_mib_s: None,
            moved_at_ms: self.moved_at_ms.get(&row.id).copied(),
        }
    }
}

/// Everything that would be done about a task, as the nodes see it now.
///
/// # Errors
/// The record cannot be read.
pub async fn plan(
    context: &Context,
    task: &Task,
    own: Option<OperationId>,
    examinations: Examinations,
) -> drover_store::Result<Planned> {
    let eyes = Eyes {
        own,
        moves: matches!(task, Task::Balance(_)),
    };
    let looker = Looker {
        context,
        task,
        opened: match task {
            Task::Restore(options) => Some(&options.host),
            _ => None,
        },
        view: view(context, eyes).await?,
    };
    let left = match task {
        Task::Restore(options) => origin::left(context, options, &looker.view.world).await?,
        _ => origin::Left::default(),
    };
    let mut examinations = examinations;
    looker.ask_sources(&left, &mut examinations).await?;
    let mut planned = looker.refine(&left, examinations).await?;
    planned.plan.notes.extend(left.notes);
    Ok(planned)
}

struct Looker<'a> {
    context: &'a Context,
    task: &'a Task,
    /// This node is about to be opened.
    opened: Option<&'a HostName>,
    view: View,
}

impl Looker<'_> {
    /// Asks the nodes of guests that are to leave whether they can.
    async fn ask_sources(
        &self,
        left: &origin::Left,
        examinations: &mut Examinations,
    ) -> drover_store::Result<()> {
        let answers: Vec<_> = stream::iter(self.questions(left))
            .map(|(guest, way)| self.ask_source(guest, way))
            .buffer_unordered(ASKED_AT_ONCE)
            .collect()
            .await;
        for answer in answers {
            let (id, way, failures) = answer?;
            examinations
                .entry(id)
                .or_default()
                .source
                .insert(way, failures);
        }
        Ok(())
    }

    fn questions(&self, left: &origin::Left) -> Vec<(InstanceId, MoveWay)> {
        let guests = self.view.world.guests.iter();
        let asked = guests.filter(|g| g.busy.is_none()).flat_map(|guest| {
            let mode = match self.task {
                Task::Drain(o) if guest.host == o.host => Some(o.mode),
                Task::Restore(o) if left.guests.contains(&guest.id) => Some(o.mode),
                // A dead node answers nothing; a balance asks about what it would move.
                _ => None,
            };
            let ways = mode.map_or(&[][..], |mode| ways_to_ask(mode, guest.runs));
            ways.iter().map(|way| (guest.id, *way))
        });
        asked.collect()
    }

    async fn ask_source(
        &self,
        guest: InstanceId,
        way: MoveWay,
    ) -> drover_store::Result<(InstanceId, MoveWay, Vec<CheckFailure>)> {
        let Some(row) = self.view.rows.get(&guest) else {
            return Ok((guest, way, Vec::new()));
        };
        let options = ways::options(self.task, way);
        let mut failures = checks::request(row, &options, None);
        if failures.is_empty() {
            failures = self.survey(row, &options).source().await?.1;
        }
        Ok((guest, way, failures))
    }

    fn survey<'a>(&'a self, instance: &'a InstanceRow, way: &'a Way) -> Survey<'a> {
        Survey {
            store: &self.context.store,
            agents: &self.context.agents,
            live: self.context.liveness(),
            migration: MigrationId::generate(),
            instance,
            way,
            patience: Patience::ForPlan,
        }
    }

    /// Plans until the nodes let every move through.
    async fn refine(
        &self,
        left: &origin::Left,
        mut examinations: Examinations,
    ) -> drover_store::Result<Planned> {
        let mut seen = BTreeSet::new();
        for _ in 0..ROUNDS {
            let plan = self.make(left, &examinations);
            let fresh: Vec<_> = moves(&plan)
                .into_iter()
                .filter(|planned| seen.insert(planned.clone()))
                .collect();
            if !self.examine(fresh, &mut examinations).await? {
                return Ok(Planned {
                    plan,
                    examinations,
                    evidence: None,
                });
            }
        }
        Ok(Planned {
            plan: self.make(left, &examinations),
            examinations,
            evidence: None,
        })
    }

    fn make(&self, left: &origin::Left, examinations: &Examinations) -> OperationPlan {
        let (world, costs) = (&self.view.world, self.context.costs);
        match self.task {
            Task::Drain(o) => plan::drain::plan(world, o, examinations, costs),
            Task::Restore(o) => plan::restore::plan(world, o, &left.guests, examinations, costs),
            Task::Evacuate(o) => plan::evacuate::plan(world, o, examinations, costs),
            Task::Balance(o) => {
                let goal = goal(self.context.balance.goal, o);
                plan::balance::plan(world, &goal, examinations, costs)
            }
        }
    }

    /// Examines moves; says whether any was refused.
    async fn examine(
        &self,
        moves: Vec<(InstanceId, HostName, MoveWay)>,
        examinations: &mut Examinations,
    ) -> drover_store::Result<bool> {
        let asked = moves
            .into_iter()
            .filter(|(_, _, way)| *way != MoveWay::Evacuate);
        let answers: Vec<_> = stream::iter(asked)
            .map(|planned| self.examine_one(planned))
            .buffer_unordered(ASKED_AT_ONCE)
            .collect()
            .await;
        let mut refused = false;
        for answer in answers {
            let ((id, host, way), source, destination) = answer?;
            let examination = examinations.entry(id).or_default();
            if !source.is_empty() {
                refused = true;
                examination.source.insert(way, source);
            }
            if !destination.is_empty() {
                refused = true;
                examination.refuse(way, host, destination);
            }
        }
        Ok(refused)
    }

    async fn examine_one(
        &self,
        planned: (InstanceId, HostName, MoveWay),
    ) -> drover_store::Result<Examined> {
        let (id, host, way) = &planned;
        let Some(row) = self.view.rows.get(id) else {
            return Ok((planned, Vec::new(), Vec::new()));
        };
        let options = ways::options(self.task, *way);
        let examined = self.survey(row, &options).examine(host).await?;
        let destination = without_door(examined.destination, self.opened, host);
        Ok((planned, examined.source, destination))
    }
}

/// A move, what its source and its destination have against it.
type Examined = (
    (InstanceId, HostName, MoveWay),
    Vec<CheckFailure>,
    Vec<CheckFailure>,
);

fn moves(plan: &OperationPlan) -> Vec<(InstanceId, HostName, MoveWay)> {
    let moves = plan.moves.iter().filter_map(|m| match &m.verdict {
        Verdict::Moves { way, to, .. } => Some((m.instance, to.clone(), *way)),
        Verdict::Stays { .. } => None,
    });
    moves.collect()
}

/// Ways that a guest may go, by what the caller allows. One that is off moves
/// as it is.
fn ways_to_ask(mode: MoveMode, runs: bool) -> &'static [MoveWay] {
    match (mode, runs) {
        (_, false) | (MoveMode::Cold, true) => &[MoveWay::Cold],
        (MoveMode::Live, true) => &[MoveWay::Live],
        (MoveMode::Mixed, true) => &[MoveWay::Live, MoveWay::Cold],
    }
}

/// What the caller of a balance wants, where they said.
pub fn goal(settings: Goal, options: &drover_model::operation::BalanceOptions) -> Goal {
    let max_moves = options.max_moves.map(|n| n as usize);
    Goal {
        threshold_percent: options
            .threshold_percent
            .unwrap_or(settings.threshold_percent),
        max_moves: max_moves.unwrap_or(settings.max_moves),
        ..settings
    }
}

#[cfg(test)]
mod tests {
    use drover_model::operation::BalanceOptions;

    use super::*;

    #[test]
    fn only_ways_that_were_allowed_are_asked_for() {
        assert_eq!(ways_to_ask(MoveMode::Live, true), [MoveWay::Live]);
        assert_eq!(ways_to_ask(MoveMode::Live, false), [MoveWay::Cold]);
        assert_eq!(ways_to_ask(MoveMode::Cold, true), [MoveWay::Cold]);
        let both = [MoveWay::Live, MoveWay::Cold];
        assert_eq!(ways_to_ask(MoveMode::Mixed, true), both);
    }

    #[test]
    fn a_node_that_is_to_be_opened_is_not_closed_and_still_may_be_down() {
        let failure = |code| CheckFailure {
            code,
            side: Side::Destination,
            message: String::new(),
            remedy: String::new(),
        };
        let both = vec![
            failure(CheckCode::HostDisabled),
            failure(CheckCode::HostDown),
        ];
        let host: HostName = "kvm1".parse().unwrap();
        let other: HostName = "kvm2".parse().unwrap();
        let seen = without_door(both.clone(), Some(&host), &host);
        assert_eq!(seen, [failure(CheckCode::HostDown)]);
        assert_eq!(without_door(both.clone(), Some(&other), &host), both);
    }

    #[test]
    fn what_the_caller_says_goes_before_the_settings() {
        let settings = Goal {
            threshold_percent: 20,
            cool_down_ms: 1,
            target_limit_percent: 80,
            max_moves: 5,
        };
        let asked = BalanceOptions {
            threshold_percent: Some(10),
            ..BalanceOptions::default()
        };
        let merged = goal(settings, &asked);
        assert_eq!((merged.threshold_percent, merged.max_moves), (10, 5));
    }
}

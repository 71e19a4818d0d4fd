//! The schedule in a simulated cluster: limits, retries, cancelling, ends.

use std::collections::BTreeMap;

use drover_model::{
    check::{CheckCode, Side},
    ids::{MigrationId, OperationId},
    migration::{ColdOptions, EndReason, LiveOptions, MigrationStatus, Requester, Way},
    operation::{DrainOptions, EvacuateOptions, Item, OperationPlan},
};
use drover_store::operations::UnreadMove;
use proptest::prelude::*;
use uuid::Uuid;

use super::{super::samples::*, *};
use crate::{
    plan::{self, drain},
    tests_support,
};

const LIMITS: Limits = Limits {
    ahead: 0,
    outbound: 2,
    inbound: 2,
    cluster: 3,
    per_operation: 3,
};

/// A cluster, an operation in it, and its migrations.
struct Stage {
    world: World,
    operation: Operation,
    examinations: Examinations,
    migrations: Vec<Migration>,
    unread: Vec<UnreadMove>,
    limits: Limits,
}

fn operation(task: Task, plan: OperationPlan) -> Operation {
    let item = |planned: drover_model::operation::PlannedMove| Item {
        state: match &planned.verdict {
            Verdict::Moves { .. } => ItemState::Waiting { why: "new".into() },
            verdict @ Verdict::Stays { .. } => draft::stays(verdict),
        },
        tried: vec![],
        planned,
    };
    Operation {
        id: 1,
        uuid: OperationId(Uuid::from_u128(1)),
        status: OperationStatus::Running,
        items: plan.moves.into_iter().map(item).collect(),
        nodes: plan.nodes,
        version: 1,
        ..Operation::new(task, Requester::default(), "ctl", 0)
    }
}

impl Stage {
    fn drain(world: World, mode: MoveMode, examinations: Examinations) -> Self {
        let options = DrainOptions {
            mode,
            ..DrainOptions::new(host("n0"))
        };
        let plan = drain::plan(&world, &options, &examinations, Costs::default());
        Self {
            operation: operation(Task::Drain(options), plan),
            world,
            examinations,
            migrations: vec![],
            unread: vec![],
            limits: LIMITS,
        }
    }

    fn active(&self) -> Vec<Migration> {
        let active = self.migrations.iter().filter(|m| !m.status.is_final());
        active.cloned().collect()
    }

    fn acts(&self) -> Vec<Act> {
        let own = |m: &&Migration| m.operation == Some(self.operation.uuid);
        let own: Vec<_> = self.migrations.iter().filter(own).cloned().collect();
        let active = UnderWay {
            known: self.active(),
            unread: self.unread.clone(),
        };
        let how = (self.limits, Costs::default());
        next(
            &self.operation,
            &self.world,
            &own,
            &active,
            &self.examinations,
            how,
        )
    }

    /// Does what is to be done, after which there is nothing more to do.
    fn step(&mut self) -> Vec<Act> {
        let acts = self.acts();
        for act in &acts {
            self.apply(act.clone());
        }
        assert_eq!(self.acts(), [], "after {acts:#?}");
        self.check_limits();
        acts
    }

    fn apply(&mut self, act: Act) {
        match act {
            Act::Start {
                instance,
                way,
                to,
                attempt,
            } => self.start(instance, way, to, attempt),
            Act::Note(note) => {
                let item = self.item(note.instance);
                item.state = note.state;
                item.tried.extend(note.tried);
                if let Some(verdict) = note.verdict {
                    item.planned.verdict = verdict;
                }
            }
            Act::Abort(uuid) => {
                let migration = self.migrations.iter_mut().find(|m| m.uuid == uuid).unwrap();
                migration.abort_requested = true;
            }
            Act::End(status) => {
                assert!(self.operation.status.may_become(status));
                self.operation.status = status;
            }
        }
    }

    fn item(&mut self, instance: InstanceId) -> &mut Item {
        let mut items = self.operation.items.iter_mut();
        items.find(|i| i.planned.instance == instance).unwrap()
    }

    fn start(&mut self, instance: InstanceId, way: MoveWay, to: HostName, attempt: usize) {
        let under_way = |m: &Migration| m.instance_uuid == instance && !m.status.is_final();
        assert!(!self.migrations.iter().any(under_way), "two at once");
        let n = self.migrations.len() + 1;
        let item = self.item(instance);
        assert_eq!(attempt, item.tried.len());
        let source = item.planned.source.clone();
        let uuid = MigrationId(Uuid::from_u128(n as u128));
        let number = i64::try_from(n).unwrap();
        item.state = ItemState::Moving {
            migration: uuid,
            number,
        };
        self.claim(instance, &to, true);
        self.migrations.push(Migration {
            id: number,
            uuid,
            instance_uuid: instance,
            way: match way {
                MoveWay::Live => Way::Live(LiveOptions::default()),
                _ => Way::Cold(ColdOptions::default()),
            },
            status: MigrationStatus::Running,
            source_host: source,
            dest_host: Some(to),
            operation: Some(self.operation.uuid),
            ..tests_support::migration()
        });
    }

    fn claim(&mut self, instance: InstanceId, to: &HostName, claims: bool) {
        let guest = self.world.guests.iter().find(|g| g.id == instance).unwrap();
        if !guest.runs {
            return;
        }
        let node = self.world.nodes.iter_mut().find(|n| n.host == *to).unwrap();
        let used = &mut node.usage.used;
        let (vcpus, memory) = (u64::from(guest.vcpus), guest.memory_mib);
        match claims {
            true => (used.vcpus, used.memory_mib) = (used.vcpus + vcpus, used.memory_mib + memory),
            false => (used.vcpus, used.memory_mib) = (used.vcpus - vcpus, used.memory_mib - memory),
        }
        assert!(
            used.memory_mib <= node.usage.usable.memory_mib,
            "{to} is overfull"
        );
        assert!(used.vcpus <= node.usage.usable.vcpus, "{to} is overfull");
    }

    /// The n-th of those under way ends.
    fn end(&mut self, nth: usize, status: MigrationStatus, reason: Option<EndReason>) {
        let under_way = |m: &&mut Migration| !m.status.rests();
        let migration = self
            .migrations
            .iter_mut()
            .filter(under_way)
            .nth(nth)
            .unwrap();
        migration.status = status;
        migration.end_reason = reason;
        let (instance, to) = (
            migration.instance_uuid,
            migration.dest_host.clone().unwrap(),
        );
        self.claim(instance, &to, false);
        if status.has_moved() {
            move_to(&mut self.world, instance, &to);
        }
    }

    fn under_way(&self) -> usize {
        self.migrations.iter().filter(|m| !m.status.rests()).count()
    }

    fn check_limits(&self) {
        let mut from: BTreeMap<&HostName, u32> = BTreeMap::new();
        let mut to: BTreeMap<&HostName, u32> = BTreeMap::new();
        let active = self.migrations.iter().filter(|m| !m.status.rests());
        for migration in active {
            *from.entry(&migration.source_host).or_default() += 1;
            *to.entry(migration.dest_host.as_ref().unwrap()).or_default() += 1;
        }
        let (limits, ahead) = (self.limits, self.limits.ahead);
        assert!(
            from.values().all(|n| *n <= limits.outbound + ahead),
            "{from:?}"
        );
        assert!(to.values().all(|n| *n <= limits.inbound + ahead), "{to:?}");
        let all = u32::try_from(self.under_way()).unwrap();
        assert!(all <= limits.per_operation.min(limits.cluster + ahead));
    }

    fn states(&self) -> Vec<&'static str> {
        self.operation
            .items
            .iter()
            .map(|i| i.state.as_str())
            .collect()
    }
}

fn broke() -> Option<EndReason> {
    let message = "the link broke".to_owned();
    Some(EndReason::Failed { message })
}

fn stalled() -> Option<EndReason> {
    let message = "dirties faster than the link carries".to_owned();
    Some(EndReason::Stalled {
        message,
        of_guest: true,
    })
}

fn small(guests: usize, mode: MoveMode) -> Stage {
    let guests = (1..=guests).map(|n| guest(n, "n0")).collect();
    let nodes = ["n0", "n1", "n2", "n3"].map(node).to_vec();
    Stage::drain(world(nodes, guests), mode, Examinations::new())
}

#[test]
fn what_cannot_be_read_costs_its_guest_and_a_slot() {
    let mut stage = small(3, MoveMode::Live);
    let waits = stage.operation.items[0].planned.instance;
    stage.unread.push(UnreadMove {
        id: 7,
        instance: waits,
        source: host("n0"),
        dest: Some(host("n1")),
        kind: "teleport".into(),
        status: "hovering".into(),
    });
    stage.step();
    assert_eq!(stage.under_way(), 1, "of the two that may leave the node");
    let ItemState::Waiting { why } = &stage.operation.items[0].state else {
        panic!("{:#?}", stage.operation);
    };
    assert!(why.contains("migration 7"), "{why}");
    stage.unread[0].status = "stuck".into();
    stage.step();
    assert_eq!(stage.under_way(), 2, "it holds no slot");
    stage.unread.clear();
    stage.end(0, MigrationStatus::Completed, None);
    stage.step();
    assert_eq!(stage.under_way(), 2);
}

#[test]
fn a_free_slot_is_filled_at_once_and_who_waits_says_why() {
    let mut stage = small(3, MoveMode::Live);
    stage.step();
    assert_eq!(stage.states(), ["moving", "moving", "waiting"]);
    let why = ItemState::Waiting {
        why: "waits for n0: 2 leave it already".into(),
    };
    assert_eq!(stage.operation.items[2].state, why);
    stage.end(0, MigrationStatus::Completed, None);
    stage.step();
    assert_eq!(stage.states(), ["moved", "moving", "moving"]);
    stage.end(0, MigrationStatus::Completed, None);
    stage.end(0, MigrationStatus::Completed, None);
    stage.step();
    assert_eq!(stage.operation.status, OperationStatus::Completed);
}

#[test]
fn live_ones_are_made_ready_ahead() {
    let mut stage = small(6, MoveMode::Live);
    stage.limits.ahead = 1;
    stage.limits.per_operation = 10;
    stage.step();
    assert_eq!(stage.under_way(), 3);
}

#[test]
fn each_destination_is_tried_once_then_it_fails() {
    let mut stage = small(1, MoveMode::Live);
    for tried in 1..=3 {
        stage.step();
        assert_eq!(stage.under_way(), 1);
        stage.end(0, MigrationStatus::Failed, broke());
        assert_eq!(stage.operation.items[0].tried.len(), tried - 1);
    }
    stage.step();
    let tried = &stage.operation.items[0].tried;
    let mut hosts: Vec<_> = tried.iter().map(|t| t.host.as_str()).collect();
    hosts.sort_unstable();
    assert_eq!(hosts, ["n1", "n2", "n3"]);
    assert_eq!(stage.states(), ["failed"]);
    assert_eq!(stage.operation.status, OperationStatus::Incomplete);
}

#[test]
fn one_that_never_converges_goes_cold_only_with_consent() {
    for (mode, expected) in [(MoveMode::Live, "failed"), (MoveMode::Mixed, "moving")] {
        let mut stage = small(1, mode);
        stage.step();
        stage.end(0, MigrationStatus::Failed, stalled());
        stage.step();
        assert_eq!(stage.states(), [expected]);
        let last = &stage.migrations.last().unwrap().way;
        assert_eq!(matches!(last, Way::Cold(_)), mode == MoveMode::Mixed);
    }
}

#[test]
fn what_lies_with_the_guest_is_not_tried_elsewhere() {
    let mut stage = small(1, MoveMode::Live);
    stage.step();
    let checks = vec![failure(CheckCode::InstanceBusy, Side::Instance)];
    stage.end(
        0,
        MigrationStatus::Failed,
        Some(EndReason::Refused { checks }),
    );
    stage.step();
    assert_eq!(
        (stage.states(), stage.migrations.len()),
        (vec!["failed"], 1)
    );
}

#[test]
fn a_closed_target_is_replaced_before_it_is_tried() {
    let mut stage = small(1, MoveMode::Live);
    let Some(Verdict::Moves { to, .. }) = stage.operation.items.first().map(|i| &i.planned.verdict)
    else {
        panic!("it moves");
    };
    let planned = to.clone();
    let closed = vec![failure(CheckCode::HostDown, Side::Destination)];
    let node = stage.world.nodes.iter_mut().find(|n| n.host == planned);
    node.unwrap().closed = closed.clone();
    stage.step();
    assert_ne!(stage.migrations[0].dest_host, Some(planned));

    let mut stage = small(1, MoveMode::Live);
    stage
        .world
        .nodes
        .iter_mut()
        .for_each(|n| n.closed = closed.clone());
    stage.step();
    assert_eq!((stage.states(), stage.migrations.len()), (vec!["stays"], 0));
    assert_eq!(stage.operation.status, OperationStatus::Incomplete);
}

#[test]
fn cancelling_calls_back_what_moves_and_ends() {
    let mut stage = small(3, MoveMode::Live);
    stage.step();
    stage.operation.cancel_requested = true;
    stage.operation.status = OperationStatus::Cancelling;
    let acts = stage.step();
    assert_eq!(
        acts.iter().filter(|a| matches!(a, Act::Abort(_))).count(),
        2
    );
    assert_eq!(stage.states(), ["moving", "moving", "cancelled"]);
    stage.end(0, MigrationStatus::Cancelled, Some(EndReason::Aborted));
    stage.end(0, MigrationStatus::Completed, None);
    stage.step();
    assert_eq!(stage.states(), ["cancelled", "moved", "cancelled"]);
    assert_eq!(stage.operation.status, OperationStatus::Cancelled);
}

/// Its node is silent, perhaps for good: an evacuation of it could not begin while the
/// drain waits.
#[test]
fn what_is_stuck_on_its_way_back_is_not_waited_for() {
    let mut stage = small(2, MoveMode::Live);
    stage.step();
    stage.operation.cancel_requested = true;
    stage.operation.status = OperationStatus::Cancelling;
    stage.step();
    stage.end(0, MigrationStatus::Cancelled, Some(EndReason::Aborted));
    stage.migrations[1].status = MigrationStatus::Stuck;
    stage.step();
    assert_eq!(stage.states(), ["cancelled", "failed"]);
    assert_eq!(stage.operation.status, OperationStatus::Cancelled);
}

#[test]
fn a_move_that_was_begun_and_not_written_down_is_taken_up() {
    let mut stage = small(1, MoveMode::Live);
    stage.step();
    stage.operation.items[0].state = ItemState::Waiting { why: "new".into() };
    stage.step();
    assert_eq!(
        (stage.states(), stage.migrations.len()),
        (vec!["moving"], 1)
    );
}

#[test]
fn a_guest_that_left_by_itself_is_in_nobodys_way() {
    let mut stage = small(1, MoveMode::Live);
    move_to(&mut stage.world, id(1), &host("n2"));
    stage.step();
    assert_eq!((stage.states(), stage.migrations.len()), (vec!["stays"], 0));
    assert_eq!(stage.operation.status, OperationStatus::Completed);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn whatever_happens_limits_hold_and_it_ends(
        (world, examinations) in any_world(),
        mixed in any::<bool>(),
        limits in (0..2u32, 1..4u32, 1..3u32, 1..5u32, 1..4u32),
        luck in prop::collection::vec((0..100usize, 0..5u8, any::<bool>()), 1..40),
        cancel_at in prop::option::of(0..20usize),
    ) {
        let mode = if mixed { MoveMode::Mixed } else { MoveMode::Live };
        let mut stage = Stage::drain(world, mode, examinations);
        let (ahead, outbound, inbound, cluster, per_operation) = limits;
        stage.limits = Limits { ahead, outbound, inbound, cluster, per_operation };
        let mut events = luck.iter().cycle();
        for round in 0..400 {
            if cancel_at == Some(round) && stage.operation.status == OperationStatus::Running {
                stage.operation.status = OperationStatus::Cancelling;
            }
            stage.step();
            if stage.operation.status.is_final() {
                break;
            }
            prop_assert!(stage.under_way() > 0, "nothing moves and nothing ends");
            let (which, what, close) = events.next().unwrap();
            let which = which % stage.under_way();
            match what {
                0 => stage.end(which, MigrationStatus::Failed, broke()),
                1 => stage.end(which, MigrationStatus::Failed, stalled()),
                _ => stage.end(which, MigrationStatus::Completed, None),
            }
            if *close {
                let nodes = stage.world.nodes.len();
                let closed = &mut stage.world.nodes[round % nodes].closed;
                match closed.is_empty() {
                    true => closed.push(failure(CheckCode::HostDown, Side::Destination)),
                    false => closed.clear(),
                }
            }
        }
        prop_assert!(stage.operation.status.is_final());
        prop_assert!(stage.operation.items.iter().all(|i| i.state.is_final()));
    }
}

/// A live migration from a node that is dead is called back, and its end waited for;
/// not for ever.
#[test]
fn an_evacuation_waits_for_a_migration_from_its_node() {
    let mut world = world(vec![node("n0"), node("n1")], vec![guest(1, "n0")]);
    world.guests[0].busy = Some("migration 7".into());
    let options = EvacuateOptions::new(host("n0"));
    let of = |world: &World| {
        let examinations = Examinations::new();
        plan::evacuate::plan(world, &options, &examinations, Costs::default())
    };
    let held = of(&world);
    assert_eq!(held.moving().count(), 0, "something else has it");
    world.guests[0].leaves_live = true;
    let planned = of(&world);
    assert_eq!(planned.moving().count(), 1, "{planned:#?}");
    let mut stage = Stage {
        operation: operation(Task::Evacuate(options), planned),
        world,
        examinations: Examinations::new(),
        migrations: vec![Migration {
            id: 7,
            instance_uuid: id(1),
            way: Way::Live(LiveOptions::default()),
            status: MigrationStatus::Running,
            source_host: host("n0"),
            dest_host: Some(host("n1")),
            ..tests_support::migration()
        }],
        unread: Vec::new(),
        limits: LIMITS,
    };
    stage.operation.updated_at_ms = stage.world.now_ms;
    let other = stage.migrations[0].uuid;
    let acts = stage.step();
    assert!(acts.contains(&Act::Abort(other)), "{acts:#?}");
    let waits = ItemState::Waiting {
        why: "waits for the end of migration 7 from its dead node".to_owned(),
    };
    assert_eq!(stage.operation.items[0].state, waits);
    let mut ended = stage.migrations.clone();
    ended[0].status = MigrationStatus::Failed;
    let still = std::mem::replace(&mut stage.migrations, ended);
    let acts = stage.acts();
    let starts = |act: &Act| {
        matches!(
            act,
            Act::Start {
                way: MoveWay::Evacuate,
                ..
            }
        )
    };
    assert!(acts.iter().any(starts), "{acts:#?}");
    stage.migrations = still;
    stage.world.now_ms += LONGEST_WAIT_MS;
    let acts = stage.acts();
    assert!(
        acts.contains(&Act::End(OperationStatus::Incomplete)),
        "{acts:#?}"
    );
}

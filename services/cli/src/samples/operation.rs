//! Operations for tests.

use drover_model::{
    api::conductor::OperationView,
    check::{CheckCode, CheckFailure, Side},
    evidence::AgentLost,
    migration::Migration,
    operation::{
        Control, DrainOptions, Evidence, FenceAnswer, Fill, Forecast, Item, ItemState, MoveWay,
        Operation, OperationPlan, OperationStatus, PlannedMove, Reach, Task, Tried, Verdict,
    },
};
use serde_json::json;

use super::{MIGRATION, T0, host, migration, running};

/// UUID of the operation.
pub(crate) const OPERATION: &str = "01997777-0000-7000-8000-00000000beef";

/// An operation that was just accepted.
pub(crate) fn planning(task: &Task) -> Operation {
    let mut record = json!({
        "id": 4, "uuid": OPERATION, "status": "planning", "cancel_requested": false,
        "items": [], "nodes": [], "expected_ms": 0, "decisions": [], "owner": "ctl",
        "attempt": 1, "requester": {"user_id": "ann"}, "created_at_ms": T0,
        "updated_at_ms": T0, "finished_at_ms": null, "version": 1,
    });
    let task = serde_json::to_value(task).unwrap();
    let fields = record.as_object_mut().unwrap();
    fields.extend(task.as_object().unwrap().clone());
    serde_json::from_value(record).unwrap()
}

/// Emptying kvm1.
pub(crate) fn emptying() -> Task {
    Task::Drain(DrainOptions {
        reason: Some("new disks".to_owned()),
        ..DrainOptions::new(host("kvm1"))
    })
}

/// A guest of kvm1 that is to move.
pub(crate) fn planned(n: u8, way: MoveWay, to: &str) -> PlannedMove {
    PlannedMove {
        instance: uuid(n).parse().unwrap(),
        name: format!("vm{n}"),
        project: "default".to_owned(),
        source: host("kvm1"),
        vcpus: 1,
        memory_mib: 128,
        runs: true,
        priority: 0,
        verdict: Verdict::Moves {
            way,
            to: host(to),
            expected_ms: 2500,
            expected_downtime_ms: 120,
            why: format!("{to} has the most room"),
        },
        spread_after_percent: None,
    }
}

fn uuid(n: u8) -> String {
    format!("11111111-2222-4333-8444-0000000000{n:02}")
}

/// Why a guest cannot move live.
pub(crate) fn device() -> CheckFailure {
    CheckFailure {
        code: CheckCode::HostDevice,
        side: Side::Instance,
        message: "it has the host's device 0000:01:00.0".to_owned(),
        remedy: "detach it, or allow cold with --mixed".to_owned(),
    }
}

/// A guest of kvm1 that stays.
pub(crate) fn staying(n: u8, blocks: bool) -> PlannedMove {
    PlannedMove {
        verdict: Verdict::Stays {
            reasons: vec![device()],
            blocks,
        },
        runs: blocks,
        ..planned(n, MoveWay::Live, "kvm2")
    }
}

/// A guest of an operation.
pub(crate) fn item(planned: PlannedMove, state: ItemState) -> Item {
    Item {
        planned,
        tried: Vec::new(),
        state,
    }
}

/// It is there.
pub(crate) fn moved(to: &str, downtime_ms: Option<u64>) -> ItemState {
    ItemState::Moved {
        migration: MIGRATION.parse().unwrap(),
        number: 6,
        host: host(to),
        downtime_ms,
    }
}

/// A drain in its midst: of five guests one has moved, one moves, one waits, one
/// failed and one was never to move.
pub(crate) fn drain() -> Operation {
    let live = |n, to| planned(n, MoveWay::Live, to);
    let mut failed = item(
        live(4, "kvm3"),
        ItemState::Failed {
            reason: "QEMU on kvm3 died".to_owned(),
        },
    );
    failed.tried = vec![Tried {
        host: host("kvm2"),
        way: MoveWay::Live,
        migration: None,
        reason: "bridge br1\x1b[2J is missing".to_owned(),
        again: false,
    }];
    let moving = ItemState::Moving {
        migration: MIGRATION.parse().unwrap(),
        number: 7,
    };
    let waits = ItemState::Waiting {
        why: "kvm2 takes 1 guest at a time".to_owned(),
    };
    let stays = ItemState::Stays {
        reason: device().message,
        blocks: true,
    };
    let mut o = planning(&emptying());
    o.status = OperationStatus::Running;
    o.items = vec![
        item(live(1, "kvm2"), moved("kvm2", Some(212))),
        item(live(2, "kvm2"), moving),
        item(live(3, "kvm2"), waits),
        failed,
        item(staying(5, true), stays),
    ];
    o.nodes = forecasts();
    o.expected_ms = 40_000;
    o.updated_at_ms = T0 + 12_300;
    o.version = 5;
    o
}

/// It, with the migration that is under way.
pub(crate) fn drain_view() -> OperationView {
    let moving = Migration {
        instance_name: "vm2".to_owned(),
        ..running(migration())
    };
    OperationView {
        operation: drain(),
        migrations: vec![moving],
    }
}

/// A drain at its good end: one guest moved live, one cold.
pub(crate) fn drained() -> Operation {
    let mut o = drain();
    let cold = planned(2, MoveWay::Cold, "kvm3");
    o.items.truncate(1);
    o.items.push(item(cold, moved("kvm3", Some(14_300))));
    ended(o, OperationStatus::Completed)
}

/// It, at its end.
pub(crate) fn ended(mut o: Operation, status: OperationStatus) -> Operation {
    o.status = status;
    o.updated_at_ms = T0 + 21_500;
    o.finished_at_ms = Some(T0 + 21_500);
    o.version = 9;
    o
}

/// An operation without migrations under way.
pub(crate) fn view(operation: Operation) -> OperationView {
    OperationView {
        operation,
        migrations: Vec::new(),
    }
}

fn forecasts() -> Vec<Forecast> {
    let fill = |guests, load| Fill {
        guests,
        vcpus: guests,
        memory_mib: guests * 128,
        cpu_load_percent: Some(load),
        memory_load_percent: None,
    };
    let node = |name: &str, before, after| Forecast {
        host: host(name),
        vcpus_usable: 16,
        memory_usable_mib: 7680,
        before,
        after,
    };
    vec![
        node("kvm1", fill(3, 71.4), fill(1, 30.0)),
        node("kvm2", fill(0, 0.0), fill(2, 41.0)),
        node("kvm3", fill(1, 5.0), fill(1, 5.0)),
    ]
}

/// A plan of four guests.
pub(crate) fn operation_plan() -> OperationPlan {
    OperationPlan {
        moves: vec![
            planned(1, MoveWay::Live, "kvm2"),
            planned(2, MoveWay::Cold, "kvm2"),
            staying(3, true),
            staying(4, false),
        ],
        nodes: forecasts(),
        expected_ms: 40_000,
        spread_percent: None,
        notes: vec!["2 at a time: the link of kvm1 carries no more".to_owned()],
    }
}

/// A node of which nothing proves that it is dead.
pub(crate) fn agent_lost() -> AgentLost {
    AgentLost {
        since_ms: T0,
        reasons: vec![CheckFailure {
            code: CheckCode::HostAlive,
            side: Side::Source,
            message: "kvm1 is not dead: kvm3 reaches its libvirtd".to_owned(),
            remedy: "start its agent".to_owned(),
        }],
        evidence: evidence(),
    }
}

/// What is known of a node that may be dead.
pub(crate) fn evidence() -> Evidence {
    let reach = |from: &str, libvirt| Reach {
        from: host(from),
        libvirt,
        answered: true,
        refused: false,
        controls: vec![Control {
            host: host("kvm4"),
            reached: Ok(()),
        }],
        at_ms: T0,
    };
    Evidence {
        at_ms: T0,
        conductor: "ctl".to_owned(),
        listening_ms: 600_000,
        endpoint: None,
        agent_started_ms: T0 - 86_400_000,
        heard_at_ms: T0 - 95_000,
        life: None,
        silent_ms: 95_000,
        down_after_ms: 60_000,
        forced_down: false,
        queue_consumers: Ok(0),
        reach: vec![
            reach("kvm2", Err("connection\x07 timed out".to_owned())),
            reach("kvm3", Ok(())),
        ],
        agent: None,
        fence: FenceAnswer::NotConfigured,
        cut_at_ms: None,
        confirmed_by: None,
        nodes_expected: 3,
        nodes_silent: 1,
    }
}

//! What becomes of an operation's record, and what is told of it. Pure.

use drover_model::{
    check,
    ids::InstanceId,
    migration::{Decision, Migration},
    operation::{Item, ItemState, Operation, OperationPlan, OperationStatus, PlannedMove, Verdict},
};
use drover_store::outbox::Notification;
use serde_json::json;

use crate::plan::schedule::Note;

/// Decisions kept of one operation.
const MAX_DECISIONS: usize = 200;

impl Note {
    /// It is on its way.
    pub fn moving(m: &Migration) -> Self {
        Self {
            instance: m.instance_uuid,
            state: ItemState::Moving {
                migration: m.uuid,
                number: m.id,
            },
            tried: None,
            verdict: None,
        }
    }

    /// There is nothing left to move.
    pub fn gone(instance: InstanceId) -> Self {
        Self {
            instance,
            state: ItemState::Stays {
                reason: "it is no more".to_owned(),
                blocks: false,
            },
            tried: None,
            verdict: None,
        }
    }
}

/// Writes down why something was done.
pub fn decide(operation: &mut Operation, at_ms: u64, text: impl Into<String>) {
    operation.updated_at_ms = at_ms;
    if operation.decisions.len() < MAX_DECISIONS {
        let text = text.into();
        operation.decisions.push(Decision { at_ms, text });
    }
}

/// The plan becomes the operation's items, and it runs.
pub fn take_plan(operation: &mut Operation, plan: &OperationPlan, now_ms: u64) {
    operation.items = plan.moves.iter().map(item).collect();
    operation.nodes.clone_from(&plan.nodes);
    operation.expected_ms = plan.expected_ms;
    operation.spread_percent = plan.spread_percent;
    operation.status = OperationStatus::Running;
    for note in &plan.notes {
        decide(operation, now_ms, note.clone());
    }
    decide(operation, now_ms, summary(plan));
}

fn item(planned: &PlannedMove) -> Item {
    let state = match &planned.verdict {
        Verdict::Moves { .. } => ItemState::Waiting {
            why: "the plan was just made".to_owned(),
        },
        Verdict::Stays { reasons, blocks } => ItemState::Stays {
            reason: check::texts(reasons),
            blocks: *blocks,
        },
    };
    Item {
        planned: planned.clone(),
        tried: Vec::new(),
        state,
    }
}

fn summary(plan: &OperationPlan) -> String {
    let moving = plan.moving().count();
    format!(
        "planned: {moving} move, {} stay, in about {} s",
        plan.moves.len() - moving,
        plan.expected_ms.div_ceil(1000)
    )
}

/// Takes notes in; says whether anything changed.
pub fn take_notes(operation: &mut Operation, notes: &[Note], now_ms: u64) -> bool {
    let mut changed = false;
    for note in notes {
        let item = operation.items.iter_mut();
        let Some(item) = item
            .into_iter()
            .find(|i| i.planned.instance == note.instance)
        else {
            continue;
        };
        let tried = note
            .tried
            .as_ref()
            .filter(|tried| !item.tried.contains(tried));
        let verdict = note
            .verdict
            .as_ref()
            .filter(|v| **v != item.planned.verdict);
        if item.state == note.state && tried.is_none() && verdict.is_none() {
            continue;
        }
        changed = true;
        item.state = note.state.clone();
        if let Some(verdict) = verdict {
            item.planned.verdict = verdict.clone();
        }
        let name = item.planned.name.clone();
        if let Some(tried) = tried {
            item.tried.push(tried.clone());
            let next = what_next(&note.state, note.verdict.as_ref());
            let (way, host) = (tried.way.as_str(), &tried.host);
            let text = format!(
                "{name} did not go {way} to {host} ({}): {next}",
                tried.reason
            );
            decide(operation, now_ms, text);
        }
    }
    if changed {
        operation.updated_at_ms = now_ms;
    }
    changed
}

fn what_next(state: &ItemState, verdict: Option<&Verdict>) -> String {
    match (state, verdict) {
        (ItemState::Waiting { .. }, Some(Verdict::Moves { way, to, .. })) => {
            format!("{} to {to} is next", way.as_str())
        }
        (ItemState::Waiting { .. }, _) => "it is tried again".to_owned(),
        (ItemState::Moved { .. }, _) => "it has moved since".to_owned(),
        (ItemState::Moving { .. }, _) => "another move is under way".to_owned(),
        _ => "it stays where it is".to_owned(),
    }
}

/// It is over.
pub fn end(operation: &mut Operation, status: OperationStatus, now_ms: u64) {
    operation.status = status;
    operation.finished_at_ms = Some(now_ms);
    let (moved, failed) = (operation.count("moved"), operation.count("failed"));
    let stay = operation.count("stays");
    let text = format!("{status}: {moved} moved, {failed} failed, {stay} stay");
    decide(operation, now_ms, text);
}

/// What is told of it: `node.drain.start`, `.end` or `.error`.
pub fn told(operation: &Operation, what: &str) -> Notification {
    let priority = if what == "error" { "ERROR" } else { "INFO" };
    let event_type = format!("node.{}.{what}", operation.task.kind());
    Notification::new(&event_type, priority, payload(operation))
}

/// What is told at its end.
pub fn told_at_end(operation: &Operation) -> Notification {
    match operation.status {
        OperationStatus::Failed | OperationStatus::Incomplete => told(operation, "error"),
        _ => told(operation, "end"),
    }
}

fn payload(operation: &Operation) -> serde_json::Value {
    let reason = match &operation.task {
        drover_model::operation::Task::Drain(o) => o.reason.clone(),
        _ => None,
    };
    json!({
        "operation_id": operation.id,
        "operation_uuid": operation.uuid,
        "kind": operation.task.kind(),
        "host": operation.task.host(),
        "status": operation.status,
        "instances": operation.items.len(),
        "moved": operation.count("moved"),
        "failed": operation.count("failed"),
        "stay": operation.count("stays"),
        "cancelled": operation.count("cancelled"),
        "reason": operation.failure.clone().or(reason),
        "request_id": operation.requester.request_id,
    })
}

//! How an operation ended: the line that tells it, every guest that did not move
//! with its reason, and what an operator may do next.

use drover_model::operation::{
    Item, ItemState, MoveWay, Operation, OperationStatus, Task, Verdict,
};

use super::{longest_downtime_ms, noun, plan::from_to, took_ms};
use crate::render::{
    clean,
    describe::handle,
    outcome::failures,
    units::{number, span},
};

/// So many guests of a kind are named; of more, how many there are.
const NAMED: usize = 20;

/// All of it.
pub fn text(o: &Operation) -> String {
    let mut lines = vec![first_line(o)];
    let stay = o.items.iter().filter_map(reason_to_stay);
    lines.extend(some(stay.collect()));
    lines.extend(
        failures(&o.refusals)
            .into_iter()
            .map(|line| format!("  {line}")),
    );
    let cold = o.items.iter().filter(|item| moved_cold(item));
    let cold = cold.map(confirmable).collect::<Vec<_>>();
    if !cold.is_empty() {
        lines.push("to be confirmed, or taken back with `drover instance revert`:".to_owned());
        lines.extend(some(cold));
    }
    lines.extend(next(o));
    lines.join("\n")
}

fn some(lines: Vec<String>) -> Vec<String> {
    let more = lines.len().saturating_sub(NAMED);
    let mut some: Vec<String> = lines
        .into_iter()
        .take(NAMED)
        .map(|l| format!("  {l}"))
        .collect();
    some.extend((more > 0).then(|| format!("  and {more} more")));
    some
}

fn first_line(o: &Operation) -> String {
    use OperationStatus as S;
    let (moved, left) = (o.count("moved"), unmoved(o));
    match o.status {
        S::Completed => completed(o),
        S::Incomplete => {
            let stay = if left == 1 { "stays" } else { "stay" };
            format!("{}: {moved} moved, {left} {stay}:", not_done(&o.task))
        }
        S::Cancelled => {
            let called_off = number(o.count("cancelled"), "guest");
            let noun = noun(&o.task);
            format!("{noun} is cancelled: {moved} moved, {called_off} called off")
        }
        S::Failed => {
            let why = o.failure.as_deref().map(clean);
            let why = why.unwrap_or_else(|| "no reason is recorded".to_owned());
            format!("{} failed: {why}", noun(&o.task))
        }
        status => format!("{} is {status}", noun(&o.task)),
    }
}

fn completed(o: &Operation) -> String {
    let moved = number(o.count("moved"), "guest");
    let time = span(took_ms(o));
    let downtime = longest_downtime_ms(o);
    let downtime = downtime.map(|ms| format!(", longest downtime {}", span(ms)));
    let downtime = downtime.unwrap_or_default();
    let did = match &o.task {
        Task::Drain(t) => format!("{} is drained: {moved} moved", t.host),
        Task::Restore(t) => format!("{} is restored: {moved} came back", t.host),
        Task::Evacuate(t) => format!("{} is evacuated: {moved} started elsewhere", t.host),
        Task::Balance(_) => format!("balanced: {moved} moved"),
    };
    let spread = o.spread_percent.map(from_to);
    let spread = spread.map(|spread| format!("; spread {spread} points as planned"));
    format!("{did} in {time}{downtime}{}", spread.unwrap_or_default())
}

fn not_done(task: &Task) -> String {
    match task {
        Task::Drain(t) => format!("{} is not drained", t.host),
        Task::Restore(t) => format!("{} is open, but not all came back", t.host),
        Task::Evacuate(t) => format!("{} is not evacuated", t.host),
        Task::Balance(_) => "not balanced".to_owned(),
    }
}

/// Guests that keep it from being complete.
fn unmoved(o: &Operation) -> usize {
    o.items
        .iter()
        .filter(|item| reason_to_stay(item).is_some())
        .count()
}

/// Why a guest that was in the way is so still.
fn reason_to_stay(item: &Item) -> Option<String> {
    let reason = match &item.state {
        ItemState::Stays {
            reason,
            blocks: true,
        }
        | ItemState::Failed { reason } => reason,
        _ => return None,
    };
    Some(format!("{}: {}", clean(&item.planned.name), clean(reason)))
}

fn moved_cold(item: &Item) -> bool {
    let is_moved = matches!(item.state, ItemState::Moved { .. });
    let way = match &item.planned.verdict {
        Verdict::Moves { way, .. } => Some(*way),
        Verdict::Stays { .. } => None,
    };
    is_moved && way == Some(MoveWay::Cold)
}

fn confirmable(item: &Item) -> String {
    let planned = &item.planned;
    format!(
        "`drover instance confirm {}`: {} removes its copy",
        handle(&planned.name, planned.instance),
        planned.source
    )
}

/// What to do next.
fn next(o: &Operation) -> Option<String> {
    use OperationStatus as S;
    let (host, id) = (o.task.host(), o.id);
    match (&o.task, o.status, host) {
        (_, S::Incomplete, _) if !matches!(o.task, Task::Drain(_)) => {
            Some(format!("`drover operation show {id}` tells what was tried"))
        }
        (Task::Drain(_), S::Incomplete, Some(host)) => Some(format!(
            "`drover operation show {id}` tells what was tried; {host} stays disabled: \
             `drover node drain {host}` tries again, `drover node restore {host}` brings all back"
        )),
        (Task::Drain(_), S::Completed, Some(host)) => {
            Some(format!("to bring them back: `drover node restore {host}`"))
        }
        (Task::Drain(_), S::Cancelled, Some(host)) => Some(format!(
            "{host} stays disabled: `drover node restore {host}` opens it and brings back what left"
        )),
        _ => None,
    }
}

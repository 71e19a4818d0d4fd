//! Operations on nodes: as a table and whole. Plans are in [`plan`], the display
//! of one that goes on in [`board`], how one ended in [`ending`].

pub mod board;
pub mod ending;
pub mod evidence;
pub mod plan;

use drover_model::{
    api::conductor::OperationView,
    operation::{Item, ItemState, Operation, OperationStatus, Task, Tried},
};

use super::{
    clean,
    describe::{facts, or_nothing, section, who},
    outcome::failures,
    table::{grid, nothing},
    units::{moment, number, span},
};

/// What is being done, for a headline: `draining kvm1`.
pub fn doing(task: &Task) -> String {
    match task {
        Task::Drain(o) => format!("draining {}", o.host),
        Task::Restore(o) => format!("restoring {}", o.host),
        Task::Evacuate(o) => format!("evacuating {}", o.host),
        Task::Balance(_) => "balancing".to_owned(),
    }
}

/// What it is, in a sentence: `the drain of kvm1`.
pub fn noun(task: &Task) -> String {
    match task {
        Task::Drain(o) => format!("the drain of {}", o.host),
        Task::Restore(o) => format!("the restore of {}", o.host),
        Task::Evacuate(o) => format!("the evacuation of {}", o.host),
        Task::Balance(_) => "the balance".to_owned(),
    }
}

/// How long it took, or takes so far, by the record's clock, ms.
fn took_ms(o: &Operation) -> u64 {
    let until_ms = o.finished_at_ms.unwrap_or(o.updated_at_ms);
    until_ms.saturating_sub(o.created_at_ms)
}

/// Guests that are to move, or were.
fn to_move(o: &Operation) -> usize {
    o.items.len() - o.count("stays")
}

/// What became of its guests so far, but for those that have moved: `2 moving,
/// 1 waits`.
fn others(o: &Operation) -> Vec<String> {
    let words = [
        ("moving", "moving", "moving"),
        ("waiting", "waits", "wait"),
        ("stays", "stays", "stay"),
        ("failed", "failed", "failed"),
        ("cancelled", "called off", "called off"),
    ];
    let counted = words.iter().filter_map(|(state, one, many)| {
        let n = o.count(state);
        let word = if n == 1 { one } else { many };
        (n > 0).then(|| format!("{n} {word}"))
    });
    counted.collect()
}

/// Operations.
pub fn table(operations: &[Operation]) -> String {
    if operations.is_empty() {
        return "no operations".to_owned();
    }
    let header = [
        "ID", "KIND", "HOST", "STATUS", "MOVED", "OTHERS", "TIME", "ACCEPTED", "BY", "REASON",
    ];
    grid(&header, operations.iter().map(row))
}

fn row(o: &Operation) -> Vec<String> {
    let or_none = |text: String| if text.is_empty() { nothing() } else { text };
    vec![
        o.id.to_string(),
        o.task.kind().to_owned(),
        o.task.host().map_or_else(nothing, ToString::to_string),
        status(o),
        format!("{}/{}", o.count("moved"), to_move(o)),
        or_none(others(o).join(", ")),
        span(took_ms(o)),
        moment(o.created_at_ms),
        by(o),
        or_none(o.failure.clone().unwrap_or_else(|| why(&o.task))),
    ]
}

/// Where it stands; one that was called off a moment ago is told as such.
fn status(o: &Operation) -> String {
    match o.status {
        S::Planning | S::Running if o.cancel_requested => format!("{}, called off", o.status),
        status => status.to_string(),
    }
}

use OperationStatus as S;

fn by(o: &Operation) -> String {
    match (&o.task, &o.requester.user_id) {
        (Task::Balance(options), _) if options.automatic => "itself".to_owned(),
        (_, user) => user.clone().unwrap_or_else(nothing),
    }
}

/// Why it was asked for, if that was said.
fn why(task: &Task) -> String {
    match task {
        Task::Drain(options) => options.reason.clone().unwrap_or_default(),
        _ => String::new(),
    }
}

/// An operation's whole record.
pub fn whole(view: &OperationView) -> String {
    let o = &view.operation;
    let pairs = vec![
        ("id", o.id.to_string()),
        ("uuid", o.uuid.to_string()),
        ("kind", o.task.kind().to_owned()),
        ("host", or_nothing(o.task.host())),
        ("status", status(o)),
        ("failed because", or_nothing(o.failure.as_ref())),
        ("options", options(&o.task)),
        ("guests", guests(o)),
        ("expected", span(o.expected_ms)),
        ("time", span(took_ms(o))),
        ("spread", or_nothing(o.spread_percent.map(plan::from_to))),
        ("requester", who(&o.requester)),
        ("conductor", format!("{}, attempt {}", o.owner, o.attempt)),
        ("accepted", moment(o.created_at_ms)),
        ("changed", moment(o.updated_at_ms)),
        ("ended", or_nothing(o.finished_at_ms.map(moment))),
    ];
    let absent = |(name, value): &(&str, String)| {
        let may_be_absent = matches!(*name, "failed because" | "spread");
        !(may_be_absent && *value == nothing())
    };
    let pairs = pairs.into_iter().filter(absent).collect();
    let at = |ms: u64| format!("+{}", span(ms.saturating_sub(o.created_at_ms)));
    let decisions = o.decisions.iter();
    let decisions = decisions.map(|d| format!("{:>9}  {}", at(d.at_ms), clean(&d.text)));
    let nodes = plan::nodes(&o.nodes, matches!(o.task, Task::Balance(_)));
    facts(pairs)
        + &section("failed checks", failures(&o.refusals))
        + &section("evidence", o.evidence.iter().flat_map(evidence::lines))
        + &section("guests", board::table(view))
        + &section("came to nothing", o.items.iter().flat_map(tried))
        + &section("nodes", nodes)
        + &section("decisions", decisions)
}

fn guests(o: &Operation) -> String {
    let moved = format!("{} of {} moved", o.count("moved"), to_move(o));
    [vec![moved], others(o)].concat().join(", ")
}

fn options(task: &Task) -> String {
    let hosts = |to: &[drover_model::ids::HostName]| {
        let names: Vec<&str> = to.iter().map(|host| host.as_str()).collect();
        (!names.is_empty()).then(|| format!("only to {}", names.join(", ")))
    };
    let mut words = Vec::new();
    match task {
        Task::Drain(o) => {
            words.push(o.mode.as_str().to_owned());
            words.extend(hosts(&o.to));
            words.extend(o.reason.as_ref().map(|text| format!("reason: {text}")));
        }
        Task::Restore(o) => {
            use drover_model::operation::Returning as R;
            words.push(match &o.returning {
                R::All => "all come back".to_owned(),
                R::None => "none comes back".to_owned(),
                R::Only(some) => format!("{} come back", some.join(", ")),
            });
            words.push(o.mode.as_str().to_owned());
        }
        Task::Evacuate(o) => {
            words.extend(hosts(&o.to));
            let only = number(o.only.len(), "guest");
            words.extend((!o.only.is_empty()).then(|| format!("only {only}")));
            let off = o.confirmed_off.then(|| "confirmed to be off".to_owned());
            words.extend(off);
            let lost = o
                .despite_many_lost
                .then_some("although many nodes are lost");
            words.extend(lost.map(str::to_owned));
        }
        Task::Balance(o) => {
            words.extend(
                o.threshold_percent
                    .map(|n| format!("spread at most {n} points")),
            );
            words.extend(o.max_moves.map(|n| format!("at most {n} moves")));
            words.extend(o.automatic.then(|| "begun by itself".to_owned()));
        }
    }
    words.extend(task.max_parallel().map(|n| format!("{n} at once")));
    if words.is_empty() {
        nothing()
    } else {
        words.join(", ")
    }
}

/// Attempts for a guest that came to nothing, one a line.
fn tried(item: &Item) -> Vec<String> {
    let name = clean(&item.planned.name);
    let line = |t: &Tried| {
        let (way, reason) = (t.way.as_str(), clean(&t.reason));
        format!("{name}: {way} to {}: {reason}", t.host)
    };
    item.tried.iter().map(line).collect()
}

/// How long guests stood still that ran on meanwhile, and how long those were off
/// that did not: the longest of each, ms.
fn longest_downtime_ms(o: &Operation) -> Option<u64> {
    let downtimes = o.items.iter().filter_map(|item| match item.state {
        ItemState::Moved { downtime_ms, .. } => downtime_ms,
        _ => None,
    });
    downtimes.max()
}

#[cfg(test)]
#[path = "operation_tests.rs"]
mod tests;

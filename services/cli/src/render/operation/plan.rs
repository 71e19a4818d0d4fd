//! What a dry run of an operation found: guest by guest, node by node, in all.

use drover_model::{
    check::CheckFailure,
    operation::{Evidence, Fill, Forecast, MoveWay, OperationPlan, PlannedMove, Task, Verdict},
};

use super::{evidence, noun};
use crate::render::{
    clean,
    describe::block,
    outcome::{failed, failures},
    table::{grid, nothing},
    units::{mib, number, span},
};

/// Everything of it. What stands in the way of the whole comes before it.
pub fn text(
    task: &Task,
    plan: &OperationPlan,
    refusals: &[CheckFailure],
    evidence: Option<&Evidence>,
) -> String {
    let is_balance = matches!(task, Task::Balance(_));
    let evidence = evidence.map(evidence::lines).unwrap_or_default();
    let notes: Vec<String> = plan.notes.iter().map(|text| clean(text)).collect();
    let verdict = match refusals.len() {
        0 => format!("{} would be accepted", noun(task)),
        n => format!("{} would be refused: {}", noun(task), failed(n)),
    };
    let spread = plan.spread_percent.map(from_to);
    let spread = spread.map(|spread| format!("spread {spread} points"));
    let sum = [Some(totals(plan)), spread, Some(verdict)];
    let parts = [
        block("evidence", evidence),
        block("what stands in the way", failures(refusals)),
        block("guests", guests(plan, is_balance)),
        block("those that stay", plan.moves.iter().flat_map(reasons)),
        block("nodes", nodes(&plan.nodes, is_balance)),
        block("notes", notes),
        sum.into_iter().flatten().collect::<Vec<_>>().join("\n"),
    ];
    let parts: Vec<String> = parts.into_iter().filter(|part| !part.is_empty()).collect();
    parts.join("\n\n")
}

fn lines_of(table: &str) -> Vec<String> {
    table.lines().map(str::to_owned).collect()
}

fn guests(plan: &OperationPlan, is_balance: bool) -> Vec<String> {
    if plan.moves.is_empty() {
        return Vec::new();
    }
    let mut header = vec!["INSTANCE", "PROJECT", "MEMORY", "PRIO", "WAY"];
    header.extend(is_balance.then_some("FROM"));
    header.extend(["TARGET", "EXPECTED", "DOWNTIME"]);
    header.extend(is_balance.then_some("SPREAD"));
    header.push("WHY");
    let mut spread = plan.spread_percent.map(|(now, _)| now);
    let rows = plan.moves.iter().map(|m| {
        let before = spread;
        spread = m.spread_after_percent.or(spread);
        let step = before.zip(m.spread_after_percent).map(from_to);
        guest(m, is_balance, step)
    });
    let rows: Vec<Vec<String>> = rows.collect();
    lines_of(&grid(&header, rows))
}

fn guest(m: &PlannedMove, is_balance: bool, step: Option<String>) -> Vec<String> {
    let (way, to, expected, downtime, why) = match &m.verdict {
        Verdict::Moves {
            way,
            to,
            expected_ms,
            expected_downtime_ms,
            why,
        } => (
            way.as_str(),
            to.to_string(),
            span(*expected_ms),
            format!("~{}", span(*expected_downtime_ms)),
            why.clone(),
        ),
        Verdict::Stays { reasons, .. } => {
            ("stays", nothing(), nothing(), nothing(), codes(reasons))
        }
    };
    let mut row = vec![
        m.name.clone(),
        m.project.clone(),
        mib(m.memory_mib),
        m.priority.to_string(),
        way.to_owned(),
    ];
    row.extend(is_balance.then(|| m.source.to_string()));
    row.extend([to, expected, downtime]);
    row.extend(is_balance.then(|| step.unwrap_or_else(nothing)));
    row.push(why);
    row
}

fn codes(reasons: &[CheckFailure]) -> String {
    let mut codes: Vec<&str> = reasons.iter().map(|r| r.code.as_str()).collect();
    codes.dedup();
    codes.join(", ")
}

/// Why a guest stays, every reason with what to do about it.
fn reasons(m: &PlannedMove) -> Vec<String> {
    let Verdict::Stays { reasons, blocks } = &m.verdict else {
        return Vec::new();
    };
    let harmless = if *blocks { "" } else { " (in nobody's way)" };
    let mut lines = vec![format!("{}{harmless}", clean(&m.name))];
    lines.extend(
        failures(reasons)
            .into_iter()
            .map(|line| format!("  {line}")),
    );
    lines
}

/// Nodes before and after; those of which nothing changes are only counted.
pub fn nodes(nodes: &[Forecast], is_balance: bool) -> Vec<String> {
    let changes = |n: &&Forecast| n.before != n.after;
    let changed: Vec<&Forecast> = nodes.iter().filter(changes).collect();
    let mut lines = Vec::new();
    if !changed.is_empty() {
        let mut header = vec!["HOST", "GUESTS", "VCPUS", "MEMORY"];
        header.extend(
            is_balance
                .then_some(["CPU LOAD", "MEMORY LOAD"])
                .into_iter()
                .flatten(),
        );
        let rows = changed.iter().map(|n| node(n, is_balance));
        lines = lines_of(&grid(&header, rows));
    }
    match nodes.len() - changed.len() {
        0 => {}
        1 => lines.push("1 node stays as it is".to_owned()),
        n => lines.push(format!("{n} nodes stay as they are")),
    }
    lines
}

fn node(n: &Forecast, is_balance: bool) -> Vec<String> {
    let Forecast { before, after, .. } = n;
    let memory = |fill: &Fill| mib(fill.memory_mib);
    let mut row = vec![
        n.host.to_string(),
        format!("{} -> {}", before.guests, after.guests),
        format!("{} -> {} of {}", before.vcpus, after.vcpus, n.vcpus_usable),
        format!(
            "{} -> {} of {}",
            memory(before),
            memory(after),
            mib(n.memory_usable_mib)
        ),
    ];
    if is_balance {
        row.push(load(before.cpu_load_percent, after.cpu_load_percent));
        row.push(load(before.memory_load_percent, after.memory_load_percent));
    }
    row
}

fn load(before: Option<f64>, after: Option<f64>) -> String {
    let word = |load: Option<f64>| load.map_or_else(nothing, |load| format!("{load:.0} %"));
    format!("{} -> {}", word(before), word(after))
}

/// A spread before and after, percent points.
pub fn from_to((before, after): (f64, f64)) -> String {
    format!("{before:.1} -> {after:.1}")
}

/// `6 guests: 4 live, 1 cold, 1 stays; about 40.0 s`
fn totals(plan: &OperationPlan) -> String {
    if plan.moves.is_empty() {
        return "no guest is to move".to_owned();
    }
    let of_way = |way: MoveWay| {
        let is =
            |m: &&PlannedMove| matches!(&m.verdict, Verdict::Moves { way: w, .. } if *w == way);
        let n = plan.moves.iter().filter(is).count();
        let word = match way {
            MoveWay::Evacuate => "started elsewhere",
            way => way.as_str(),
        };
        (n > 0).then(|| format!("{n} {word}"))
    };
    let ways = [MoveWay::Live, MoveWay::Cold, MoveWay::Evacuate];
    let mut parts: Vec<String> = ways.into_iter().filter_map(of_way).collect();
    let stays = plan.moves.iter().filter_map(|m| match &m.verdict {
        Verdict::Stays { blocks, .. } => Some(*blocks),
        Verdict::Moves { .. } => None,
    });
    let (blocking, harmless): (Vec<bool>, Vec<bool>) = stays.partition(|blocks| *blocks);
    let stay = |n: usize| {
        if n == 1 {
            "1 stays".to_owned()
        } else {
            format!("{n} stay")
        }
    };
    if !blocking.is_empty() {
        parts.push(stay(blocking.len()));
    }
    if !harmless.is_empty() {
        parts.push(format!("{} in nobody's way", stay(harmless.len())));
    }
    let all = number(plan.moves.len(), "guest");
    format!(
        "{all}: {}; about {}",
        parts.join(", "),
        span(plan.expected_ms)
    )
}

//! Shows an operation while it goes on, one line a guest: redrawn in place on a
//! terminal, a line at each change elsewhere, one object a line as JSON.

use std::collections::HashMap;

use drover_model::{
    api::conductor::OperationView,
    ids::{HostName, InstanceId, MigrationId},
    migration::Migration,
    operation::{Item, ItemState, Operation, OperationStatus, Verdict},
};
use tokio::time::Instant;

use super::{doing, others, to_move, took_ms};
use crate::{
    exit::Trouble,
    render::{
        clean,
        frame::Frame,
        json,
        progress::{self, Shown},
        screen::{Manner, Screen},
        table::{grid, nothing},
        units::{clock, rate, share, span},
    },
};

const HEADER: [&str; 11] = [
    "VM", "PROJECT", "PHASE", "TARGET", "%", "MOVED", "RATE", "DIRTY", "ETA", "DOWNTIME", "REASON",
];
/// Lines of the display that are not of guests: headline, header, how many more,
/// and the one on which the cursor stands.
const AROUND: usize = 4;

/// What has been shown so far.
#[derive(Debug, Default)]
pub struct Board {
    /// JSON of every record, or of none.
    stream: bool,
    /// Of each migration what was shown: it never runs backwards.
    shown: HashMap<MigrationId, Shown>,
    frame: Frame,
    /// Of each guest what was said last.
    said: HashMap<InstanceId, String>,
    headline: Option<(OperationStatus, bool)>,
    /// Versions of what was written as JSON last.
    written: Option<Vec<u64>>,
    /// When the first record came, and how old the operation was then, ms.
    began: Option<(Instant, u64)>,
}

impl Board {
    /// A board that shows nothing as JSON: its reader gets the last record.
    pub fn new() -> Self {
        Self::default()
    }

    /// A board that writes every record as JSON.
    pub fn streaming() -> Self {
        Self {
            stream: true,
            ..Self::default()
        }
    }

    /// Whether every record is written as JSON.
    pub fn is_streaming(&self) -> bool {
        self.stream
    }

    /// Shows a record.
    pub fn show(&mut self, screen: &mut Screen, view: &OperationView) -> Result<(), Trouble> {
        self.take(view);
        match screen.manner() {
            Manner::Json if self.stream && self.is_new(view) => screen.line(&json::line(view)),
            Manner::Json => Ok(()),
            Manner::Terminal => {
                let lines = self.lines(view, screen.rows().saturating_sub(AROUND).max(1));
                self.frame.draw(screen, &lines)
            }
            Manner::Plain => self.say(screen, view),
        }
    }

    /// Says something in between; the display is drawn anew below it.
    pub fn notice(&mut self, screen: &mut Screen, text: &str) {
        self.frame.leave();
        screen.notice(&clean(text));
    }

    fn is_new(&mut self, view: &OperationView) -> bool {
        let versions = view.migrations.iter().map(|m| m.version);
        let versions: Vec<u64> = std::iter::once(view.operation.version)
            .chain(versions)
            .collect();
        let is_new = self.written.as_ref() != Some(&versions);
        self.written = Some(versions);
        is_new
    }

    fn take(&mut self, view: &OperationView) {
        let age_ms = took_ms(&view.operation);
        self.began.get_or_insert((Instant::now(), age_ms));
        let under_way = |id: &MigrationId| view.migrations.iter().any(|m| m.uuid == *id);
        self.shown.retain(|id, _| under_way(id));
        for m in &view.migrations {
            self.shown.entry(m.uuid).or_default().take(m);
        }
    }

    /// How long it takes so far, ms.
    fn elapsed_ms(&self, o: &Operation) -> u64 {
        let by_record = took_ms(o);
        match self.began {
            Some((at, age_ms)) if !o.status.is_final() => {
                let since_ms = u64::try_from(at.elapsed().as_millis()).unwrap_or(u64::MAX);
                by_record.max(age_ms.saturating_add(since_ms))
            }
            _ => by_record,
        }
    }

    /// What a terminal shows, with so many guests at the most.
    fn lines(&self, view: &OperationView, most: usize) -> Vec<String> {
        let o = &view.operation;
        let mut lines = vec![headline(o, self.elapsed_ms(o))];
        let (chosen, more) = choose(&o.items, most);
        lines.extend(rows(view, &chosen, &self.shown));
        lines.extend((more > 0).then(|| format!("and {more} more")));
        lines
    }

    /// A line for all that changed.
    fn say(&mut self, screen: &mut Screen, view: &OperationView) -> Result<(), Trouble> {
        let o = &view.operation;
        let elapsed_ms = self.elapsed_ms(o);
        let headed = (o.status, o.cancel_requested);
        if self.headline != Some(headed) && !o.status.is_final() {
            screen.line(&headline(o, elapsed_ms))?;
        }
        self.headline = Some(headed);
        for item in &o.items {
            let moving = migration(view, item);
            let event = event(item, moving);
            let new = self.said.get(&item.planned.instance) != Some(&event);
            if new {
                let beside = moving.map(|m| progress::numbers(m, &self.shown[&m.uuid]));
                let beside = beside.unwrap_or_default();
                screen.line(&format!("{:>7}  {event}{beside}", clock(elapsed_ms)))?;
                self.said.insert(item.planned.instance, event);
            }
        }
        Ok(())
    }
}

/// `draining kvm1: 3 of 6 moved, 2 moving, 1 waits  0:12`
fn headline(o: &Operation, elapsed_ms: u64) -> String {
    let counts = || {
        let moved = format!("{} of {} moved", o.count("moved"), to_move(o));
        [vec![moved], others(o)].concat().join(", ")
    };
    let state = match o.status {
        OperationStatus::Planning => "planning".to_owned(),
        OperationStatus::Cancelling => format!("calling it off, {}", counts()),
        _ if o.cancel_requested => format!("called off, {}", counts()),
        _ => counts(),
    };
    format!("{}: {state}  {}", doing(&o.task), clock(elapsed_ms))
}

/// Guests to show where not all find room, those first of which there is most to
/// see, and how many do not.
fn choose(items: &[Item], most: usize) -> (Vec<&Item>, usize) {
    let rank = |item: &Item| match item.state {
        ItemState::Moving { .. } => 0,
        ItemState::Failed { .. } => 1,
        ItemState::Waiting { .. } => 2,
        ItemState::Stays { .. } | ItemState::Cancelled => 3,
        ItemState::Moved { .. } => 4,
    };
    let mut order: Vec<usize> = (0..items.len()).collect();
    order.sort_by_key(|place| (rank(&items[*place]), *place));
    order.truncate(most);
    order.sort_unstable();
    let chosen: Vec<&Item> = order.into_iter().map(|place| &items[place]).collect();
    let more = items.len() - chosen.len();
    (chosen, more)
}

/// All guests of a record that is looked at once.
pub fn table(view: &OperationView) -> Vec<String> {
    let shown = view.migrations.iter().map(|m| (m.uuid, Shown::of(m)));
    let all: Vec<&Item> = view.operation.items.iter().collect();
    rows(view, &all, &shown.collect())
}

fn rows(view: &OperationView, items: &[&Item], shown: &HashMap<MigrationId, Shown>) -> Vec<String> {
    if items.is_empty() {
        return Vec::new();
    }
    let rows = items.iter().map(|item| {
        let moving = migration(view, item);
        let moving = moving.and_then(|m| Some((m, shown.get(&m.uuid)?)));
        row(item, moving)
    });
    grid(&HEADER, rows).lines().map(str::to_owned).collect()
}

/// The migration that a guest is moved by now.
fn migration<'a>(view: &'a OperationView, item: &Item) -> Option<&'a Migration> {
    let ItemState::Moving { migration, .. } = &item.state else {
        return None;
    };
    view.migrations.iter().find(|m| m.uuid == *migration)
}

fn row(item: &Item, moving: Option<(&Migration, &Shown)>) -> Vec<String> {
    let mut row = vec![
        item.planned.name.clone(),
        item.planned.project.clone(),
        phase(item, moving.map(|(m, _)| m)).to_owned(),
        target(item).map_or_else(nothing, ToString::to_string),
    ];
    row.extend(match moving {
        Some((m, shown)) => [
            shown.percent.to_string(),
            share(shown.moved(), shown.total()),
            some_rate(m.progress.rate_bytes_s),
            some_rate(m.progress.dirty_rate_bytes_s),
            m.progress.eta_ms.map_or_else(nothing, span),
        ],
        None => {
            let percent = match item.state {
                ItemState::Moved { .. } => "100".to_owned(),
                _ => nothing(),
            };
            [percent, nothing(), nothing(), nothing(), nothing()]
        }
    });
    row.push(downtime(item, moving.map(|(m, _)| m)));
    row.push(reason(item, moving.map(|(m, _)| m)).unwrap_or_else(nothing));
    row
}

fn phase<'a>(item: &'a Item, moving: Option<&'a Migration>) -> &'a str {
    moving.map_or(item.state.as_str(), |m| m.progress.phase.as_str())
}

fn target(item: &Item) -> Option<&HostName> {
    match (&item.state, &item.planned.verdict) {
        (ItemState::Moved { host, .. }, _) => Some(host),
        (ItemState::Waiting { .. } | ItemState::Moving { .. }, Verdict::Moves { to, .. }) => {
            Some(to)
        }
        _ => None,
    }
}

fn some_rate(bytes_s: u64) -> String {
    if bytes_s > 0 {
        rate(bytes_s)
    } else {
        nothing()
    }
}

/// Measured, or expected.
fn downtime(item: &Item, moving: Option<&Migration>) -> String {
    let planned = match &item.planned.verdict {
        Verdict::Moves {
            expected_downtime_ms,
            ..
        } => Some(*expected_downtime_ms),
        Verdict::Stays { .. } => None,
    };
    let (measured, expected) = match &item.state {
        ItemState::Moved { downtime_ms, .. } => (*downtime_ms, None),
        ItemState::Moving { .. } => (
            moving.and_then(|m| m.downtime_ms),
            moving
                .and_then(|m| m.progress.expected_downtime_ms)
                .or(planned),
        ),
        ItemState::Waiting { .. } => (None, planned),
        _ => (None, None),
    };
    let expected = expected.map(|ms| format!("~{}", span(ms)));
    measured.map(span).or(expected).unwrap_or_else(nothing)
}

/// Why it is as it is: what it waits for, why it takes long, why it stays.
fn reason(item: &Item, moving: Option<&Migration>) -> Option<String> {
    match &item.state {
        ItemState::Waiting { why } => Some(why.clone()),
        ItemState::Moving { .. } => moving
            .and_then(|m| m.progress.note.clone())
            .or_else(|| again(item)),
        ItemState::Stays { reason, .. } | ItemState::Failed { reason } => Some(reason.clone()),
        ItemState::Moved { .. } | ItemState::Cancelled => None,
    }
}

/// What was tried before.
fn again(item: &Item) -> Option<String> {
    let last = item.tried.last()?;
    Some(format!("after {}: {}", last.host, last.reason))
}

/// What is said of a guest where nothing is redrawn; the same as long as nothing
/// changed but numbers.
fn event(item: &Item, moving: Option<&Migration>) -> String {
    let (name, source) = (clean(&item.planned.name), &item.planned.source);
    let why = |text: &str| format!(": {}", clean(text));
    match &item.state {
        ItemState::Waiting { why: text } => format!("{name}  waits{}", why(text)),
        ItemState::Moving { number, .. } => {
            let target = target(item).map_or_else(nothing, ToString::to_string);
            let phase = phase(item, moving);
            let before = again(item).map(|text| why(&text)).unwrap_or_default();
            format!("{name}  {source} -> {target}  {phase} (migration {number}){before}")
        }
        ItemState::Moved {
            host, downtime_ms, ..
        } => {
            let downtime = downtime_ms.map(|ms| format!(", downtime {}", span(ms)));
            format!("{name}  moved to {host}{}", downtime.unwrap_or_default())
        }
        ItemState::Stays { reason, .. } => format!("{name}  stays on {source}{}", why(reason)),
        ItemState::Failed { reason } => format!("{name}  failed, on {source}{}", why(reason)),
        ItemState::Cancelled => format!("{name}  called off, on {source}"),
    }
}

#[cfg(test)]
#[path = "board_tests.rs"]
mod tests;

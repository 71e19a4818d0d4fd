//! What of an operation may begin now: limits of nodes, cluster and operation;
//! the next destination for what came to nothing; and the end.
//!
//! It compares what is with what is to be, so it may be asked at any time, as
//! often as anybody likes: done twice in the same world, the second time says
//! nothing new. [`outcome`] is what became of migrations, [`slots`] who may begin, [`draft`]
//! what is decided about a guest.

mod draft;
mod outcome;
mod slots;

use std::collections::{HashMap, HashSet};

use drover_model::{
    check::CheckFailure,
    ids::{HostName, InstanceId},
    migration::{Migration, Way},
    operation::{ItemState, MoveMode, MoveWay, Operation, OperationStatus, Task, Tried, Verdict},
};
use drover_store::operations::UnderWay;

use self::{draft::Draft, outcome::Outcome, slots::Slots};
use super::{
    Costs, Examinations, GuestView, World, estimate,
    pack::{Ledger, Wanted},
    verdict::{self, most_room},
};

/// An operation of which nothing changes for so long waits no longer for a migration
/// whose node is dead, ms.
const LONGEST_WAIT_MS: u64 = 300_000;
/// A guest is tried so many times each way at the most.
const MOST_ATTEMPTS: usize = 3;

/// Most moves at one time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Live moves that may be made ready beyond those that send: destinations are
    /// prepared in parallel while few send.
    pub ahead: u32,
    /// From one node.
    pub outbound: u32,
    /// To one node.
    pub inbound: u32,
    /// In all.
    pub cluster: u32,
    /// Of an operation whose caller did not say.
    pub per_operation: u32,
}

/// A change of one guest of an operation.
#[derive(Debug, Clone, PartialEq)]
pub struct Note {
    /// Which.
    pub instance: InstanceId,
    /// Where it stands now.
    pub state: ItemState,
    /// What came to nothing meanwhile.
    pub tried: Option<Tried>,
    /// What is tried next, if that is another.
    pub verdict: Option<Verdict>,
}

/// Something to do about an operation.
#[derive(Debug, Clone, PartialEq)]
pub enum Act {
    /// Have a guest moved. Done again after a crash it is the same move, by
    /// operation, guest and attempt.
    Start {
        /// Which.
        instance: InstanceId,
        /// How.
        way: MoveWay,
        /// Where to.
        to: HostName,
        /// Counts this guest's attempts, from 0.
        attempt: usize,
    },
    /// Write down where a guest stands.
    Note(Note),
    /// Call a migration back.
    Abort(drover_model::ids::MigrationId),
    /// It is over.
    End(OperationStatus),
}

/// What is to be done now. `own` are the operation's migrations, `active` all
/// unfinished ones of the cluster. A guest of which one cannot be read waits for
/// whoever can.
pub fn next(
    operation: &Operation,
    world: &World,
    own: &[Migration],
    active: &UnderWay,
    examinations: &Examinations,
    (limits, costs): (Limits, Costs),
) -> Vec<Act> {
    if operation.status.is_final() || operation.status == OperationStatus::Planning {
        return Vec::new();
    }
    let mut round = Round::new(
        operation,
        world,
        (own, active),
        examinations,
        (limits, costs),
    );
    let mut items: Vec<Draft<'_>> = operation.items.iter().map(Draft::new).collect();
    for draft in &mut items {
        round.settle(draft);
    }
    for draft in &mut items {
        round.begin(draft);
    }
    // Only now is it known who has the slots.
    for draft in &mut items {
        round.wait(draft);
    }
    // What came to nothing is written down before the next attempt begins.
    let mut acts: Vec<Act> = items.iter().filter_map(Draft::note).collect();
    acts.append(&mut round.acts);
    acts.extend(end(operation, round.cancelling, &items).map(Act::End));
    acts
}

/// How it ended, if nothing is left to do.
fn end(operation: &Operation, cancelling: bool, items: &[Draft<'_>]) -> Option<OperationStatus> {
    if items.iter().any(|d| !d.state.is_final() || d.starts) {
        return None;
    }
    if cancelling {
        // Whoever called it off says so in its status first.
        let said = operation.status == OperationStatus::Cancelling;
        return said.then_some(OperationStatus::Cancelled);
    }
    let left = |state: &ItemState| {
        matches!(
            state,
            ItemState::Failed { .. } | ItemState::Cancelled | ItemState::Stays { blocks: true, .. }
        )
    };
    Some(match items.iter().any(|d| left(&d.state)) {
        true => OperationStatus::Incomplete,
        false => OperationStatus::Completed,
    })
}

/// One look at an operation.
struct Round<'a> {
    operation: &'a Operation,
    own: &'a [Migration],
    examinations: &'a Examinations,
    costs: Costs,
    cancelling: bool,
    guests: HashMap<InstanceId, &'a GuestView>,
    /// Live migrations that are not the operation's own.
    others: HashMap<InstanceId, &'a Migration>,
    now_ms: u64,
    ledger: Ledger<'a>,
    slots: Slots,
    /// Guests of which a migration cannot be read, and its number.
    unread: HashMap<InstanceId, i64>,
    acts: Vec<Act>,
}

impl<'a> Round<'a> {
    fn new(
        operation: &'a Operation,
        world: &'a World,
        (own, active): (&'a [Migration], &'a UnderWay),
        examinations: &'a Examinations,
        (limits, costs): (Limits, Costs),
    ) -> Self {
        let items = operation.items.iter().map(|i| i.planned.instance);
        let known = active.known.iter().filter(|m| !m.status.rests());
        let known = known.map(|m| (m.instance_uuid, m.dest_host.as_ref()));
        let unread = active.unread.iter().filter(|m| !m.rests());
        let unread = unread.map(|m| (m.instance, m.dest.as_ref()));
        let moving: Vec<_> = known.chain(unread).collect();
        let wanted = items.chain(moving.iter().map(|(guest, _)| *guest));
        let wanted: HashSet<InstanceId> = wanted.collect();
        let guests = world.guests.iter().filter(|g| wanted.contains(&g.id));
        let guests: HashMap<_, _> = guests.map(|g| (g.id, g)).collect();
        let mut ledger = Ledger::new(world);
        for (guest, host) in moving {
            if let (Some(guest), Some(host)) = (guests.get(&guest), host) {
                ledger.expect(guest, host);
            }
        }
        let others = active
            .known
            .iter()
            .filter(|m| matches!(m.way, Way::Live(_)) && m.operation != Some(operation.uuid));
        Self {
            operation,
            own,
            examinations,
            costs,
            cancelling: operation.cancel_requested
                || operation.status == OperationStatus::Cancelling,
            guests,
            others: others.map(|m| (m.instance_uuid, m)).collect(),
            now_ms: world.now_ms,
            ledger,
            slots: Slots::new(operation, own, active, limits),
            unread: active.unread.iter().map(|m| (m.instance, m.id)).collect(),
            acts: Vec::new(),
        }
    }

    /// Takes up what became of an item's migration.
    fn settle(&mut self, draft: &mut Draft<'_>) {
        let Some(migration) = outcome::of_item(self.own, draft.item) else {
            if self.cancelling && draft.is_waiting() {
                draft.state = ItemState::Cancelled;
            }
            return;
        };
        match outcome::of(migration) {
            Outcome::Moves if self.cancelling && outcome::is_stuck_on_its_way_back(migration) => {
                draft.state = ItemState::Failed {
                    reason: format!("{}: it was called back", super::has_it(migration)),
                };
            }
            Outcome::Moves => {
                draft.state = ItemState::Moving {
                    migration: migration.uuid,
                    number: migration.id,
                };
                if self.cancelling && outcome::can_be_called_back(migration) {
                    self.acts.push(Act::Abort(migration.uuid));
                }
            }
            Outcome::Moved => draft.state = outcome::moved(migration, draft.item),
            Outcome::Reverted => {
                draft.state = ItemState::Failed {
                    reason: "it was moved, and brought back on request".to_owned(),
                };
            }
            Outcome::Nothing { another_place } => {
                let tried = outcome::tried(migration, draft.item);
                let reason = tried.reason.clone();
                draft.tried = Some(tried);
                match self.cancelling {
                    true => draft.state = ItemState::Cancelled,
                    false => self.go_on(draft, another_place, &reason),
                }
            }
        }
    }

    /// The next destination, the next way, or the end of it.
    fn go_on(&mut self, draft: &mut Draft<'_>, another_place: bool, reason: &str) {
        let Some((way, _)) = draft.target() else {
            return;
        };
        let found = match another_place {
            true => self.place(draft, way),
            false => Err(Vec::new()),
        };
        let found = found.or_else(|_| self.place_cold(draft, way));
        match found {
            Ok(mut verdict) => {
                if let Verdict::Moves { why, .. } = &mut verdict {
                    *why = format!("after an attempt that came to nothing ({reason}): {why}");
                }
                draft.verdict = Some(verdict);
                draft.state = ItemState::Waiting {
                    why: "is tried again".to_owned(),
                };
            }
            Err(_) => draft.state = draft::given_up(draft, &[]),
        }
    }

    /// Another way, if the caller agreed to it.
    fn place_cold(&self, draft: &Draft<'_>, way: MoveWay) -> Result<Verdict, Vec<CheckFailure>> {
        let mode = match &self.operation.task {
            Task::Drain(options) => options.mode,
            Task::Restore(options) => options.mode,
            Task::Evacuate(_) | Task::Balance(_) => MoveMode::Live,
        };
        match way == MoveWay::Live && mode == MoveMode::Mixed {
            true => self.place(draft, MoveWay::Cold),
            false => Err(Vec::new()),
        }
    }

    /// Where a guest can go now.
    fn place(&self, draft: &Draft<'_>, way: MoveWay) -> Result<Verdict, Vec<CheckFailure>> {
        let planned = &draft.item.planned;
        let Some(guest) = self.guests.get(&planned.instance) else {
            return Err(Vec::new());
        };
        let this_way: Vec<&Tried> = draft.all_tried().filter(|t| t.way == way).collect();
        if this_way.len() >= MOST_ATTEMPTS {
            return Err(Vec::new());
        }
        let examination = self.examinations.get(&planned.instance);
        let hindered = examination.and_then(|e| e.source.get(&way));
        if let Some(failures) = hindered.filter(|f| !f.is_empty()) {
            return Err(failures.clone());
        }
        let failed = this_way.iter().filter(|t| !t.again);
        let except: Vec<HostName> = failed.map(|t| t.host.clone()).collect();
        let to = self.allowed(draft);
        let place = self.ledger.choose(&Wanted {
            guest,
            way,
            to: &to,
            examination,
            except: &except,
        })?;
        let (expected_ms, expected_downtime_ms) = estimate::times(guest, way, self.costs);
        Ok(Verdict::Moves {
            way,
            why: most_room(&place),
            to: place.host,
            expected_ms,
            expected_downtime_ms,
        })
    }

    /// Nodes that the operation may use; any if there are none.
    fn allowed(&self, draft: &Draft<'_>) -> Vec<HostName> {
        match &self.operation.task {
            Task::Drain(options) => options.to.clone(),
            Task::Evacuate(options) => options.to.clone(),
            Task::Restore(options) => vec![options.host.clone()],
            // Only the plan knows loads; anywhere else it might do harm.
            Task::Balance(_) => draft.target().into_iter().map(|(_, to)| to).collect(),
        }
    }

    /// Has a waiting guest begin, if it may.
    fn begin(&mut self, draft: &mut Draft<'_>) {
        if !draft.is_waiting() {
            return;
        }
        let planned = &draft.item.planned;
        let Some((way, _)) = draft.target() else {
            draft.state = draft::stays(&planned.verdict);
            return;
        };
        let Some(guest) = self.guests.get(&planned.instance).copied() else {
            draft.state = draft::gone("it is known no more".to_owned());
            return;
        };
        if let Some(id) = self.unread.get(&planned.instance) {
            let why = format!("waits for migration {id}, which cannot be read here");
            draft.state = ItemState::Waiting { why };
            return;
        }
        if guest.host != planned.source {
            draft.state = draft::gone(format!("it is on {} by now", guest.host));
            return;
        }
        if way == MoveWay::Evacuate
            && let Some(other) = self.others.get(&planned.instance).copied()
        {
            self.await_end(draft, other);
            return;
        }
        if self.slots.missing(&planned.source, way).is_some() {
            return;
        }
        let Some((way, to)) = self.target_now(draft, guest) else {
            return;
        };
        // Another way or target may have other limits.
        let full = self.slots.missing(&planned.source, way);
        if full
            .or_else(|| self.slots.missing_there(&to, way))
            .is_some()
        {
            return;
        }
        self.slots.take(&planned.source, &to, way);
        self.ledger.take(guest, &to);
        draft.starts = true;
        self.acts.push(Act::Start {
            instance: planned.instance,
            way,
            to,
            attempt: draft.all_tried().count(),
        });
    }

    /// A live migration from a node that is dead is called back; its end shows where
    /// the guest is.
    fn await_end(&mut self, draft: &mut Draft<'_>, other: &Migration) {
        if outcome::can_be_called_back(other) {
            self.acts.push(Act::Abort(other.uuid));
        }
        let unchanged_ms = self.now_ms.saturating_sub(self.operation.updated_at_ms);
        draft.state = match unchanged_ms < LONGEST_WAIT_MS {
            true => ItemState::Waiting {
                why: format!(
                    "waits for the end of migration {} from its dead node",
                    other.id
                ),
            },
            false => ItemState::Stays {
                reason: verdict::busy(&super::has_it(other)).message,
                blocks: true,
            },
        };
    }

    /// Its target, or another if that is closed or full by now. Whether there is
    /// room matters only when its turn has come.
    fn target_now(&self, draft: &mut Draft<'_>, guest: &GuestView) -> Option<(MoveWay, HostName)> {
        let (mut way, mut to) = draft.target()?;
        if !self.ledger.closed(&to).is_empty() {
            (way, to) = self.elsewhere(draft)?;
        }
        let wanted = Wanted {
            guest,
            way,
            to: &[],
            examination: self.examinations.get(&guest.id),
            except: &[],
        };
        let its_turn = self.slots.missing_there(&to, way).is_none();
        match its_turn && !self.ledger.fits(&wanted, &to) {
            true => self.elsewhere(draft),
            false => Some((way, to)),
        }
    }

    /// Another destination for a guest whose own has become impossible; if there
    /// is none, that is its end.
    fn elsewhere(&self, draft: &mut Draft<'_>) -> Option<(MoveWay, HostName)> {
        let (way, to) = draft.target()?;
        let found = self.place(draft, way);
        match found.or_else(|why| self.place_cold(draft, way).map_err(|_| why)) {
            Ok(mut verdict) => {
                if let Verdict::Moves { why, .. } = &mut verdict {
                    *why = format!("{to} cannot take it any more; {why}");
                }
                draft.verdict = Some(verdict);
                draft.target()
            }
            Err(reasons) => {
                draft.state = draft::given_up(draft, &reasons);
                None
            }
        }
    }

    /// Says what a guest waits for that could not begin.
    fn wait(&self, draft: &mut Draft<'_>) {
        if !draft.is_waiting() || draft.starts {
            return;
        }
        let Some((way, to)) = draft.target() else {
            return;
        };
        if self.unread.contains_key(&draft.item.planned.instance) {
            return;
        }
        let here = self.slots.missing(&draft.item.planned.source, way);
        if let Some(why) = here.or_else(|| self.slots.missing_there(&to, way)) {
            draft.state = ItemState::Waiting { why };
        }
    }
}

#[cfg(test)]
#[path = "schedule_tests.rs"]
mod tests;

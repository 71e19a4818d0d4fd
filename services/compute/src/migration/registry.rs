//! Which migrations this node is carrying out, and the way to their actors.
//!
//! An instance belongs to one migration from the first journalled step to the
//! last clean-up; steps of another one are refused meanwhile. One whose end the
//! conductor never told (it was lost on the way) steps aside when it is plain
//! from the guest that it is over, so that nothing blocks a guest for ever.
//!
//! Where the journal of a migration cannot be read, or its actor died, the
//! instance is held all the same until the migration can be taken up again
//! ([`Held`]); of which instance it is being unknown, every one is.

use std::{
    collections::HashMap,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use drover_model::{
    api::{
        compute::{Known, StepRef},
        fault::{Fault, code},
    },
    error::ErrorClass,
    ids::{InstanceId, MigrationId},
};
use tokio::{
    sync::{
        mpsc::{self, error::TrySendError},
        oneshot,
    },
    time::sleep,
};
use tracing::{error, info, warn};

use super::{
    actor::{Actor, Asked, Gate, Stage},
    past::{Finished, Past},
    steps::{Doing, Kind, Reply, Work},
};
use crate::{
    faults,
    journal::{JournalError, MarksRecord, Record, Unread, UnreadFile, definition},
    node::Node,
};

/// Steps of one migration that may wait for each other. The conductor asks for
/// one at a time; the rest is for repeats, polls and an abort.
const MAILBOX: usize = 16;
/// Migrations at one time, checks included: of each guest that is asked about an
/// actor stays for as long as marks lie beside its disks, and a drain asks about all.
const MAX_ACTORS: usize = 4096;
/// Time until what could not be taken up is tried again; doubled each time.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest such time.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// See the module.
pub(crate) struct Registry {
    node: Arc<Node>,
    past: Past,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    actors: HashMap<MigrationId, mpsc::Sender<Asked>>,
    holders: HashMap<InstanceId, MigrationId>,
    /// Files and devices that are promised to a migration.
    claims: HashMap<String, MigrationId>,
    /// Images under the disks of guests that lie aside, which no domain shows.
    beneath: HashMap<MigrationId, Vec<String>>,
    held: HashMap<MigrationId, Held>,
    /// How often the actor of a migration has died, until one goes in peace.
    deaths: HashMap<MigrationId, u32>,
}

/// A migration that goes on here, and cannot be carried on now.
#[derive(Debug, Clone)]
struct Held {
    instance: Option<InstanceId>,
    why: String,
}

impl Registry {
    /// Takes up what the journal says was under way.
    ///
    /// # Errors
    /// The journal's directories cannot be read.
    pub(crate) fn start(node: Arc<Node>) -> Result<Arc<Self>, JournalError> {
        let journal = node.journal.clone();
        let seen = journal.seen.load()?;
        let migrations = journal.migrations.load()?;
        let marks = journal.marks.load()?.read;
        let registry = Arc::new(Self {
            past: Past::new(journal),
            node,
            state: Mutex::default(),
        });
        for file in seen.unread.into_iter().chain(migrations.unread) {
            registry.hold_back(file);
        }
        for migration in registry.past.lost() {
            error!(%migration, "something was begun here for a migration, and the journal of it is \
                gone: look for what is left of its guest; its steps are refused");
        }
        let mut left: HashMap<_, _> = marks.into_iter().collect();
        for (migration, record) in migrations.read {
            let marks = left.remove(&migration);
            registry.take_up(migration, record, marks);
        }
        for (migration, marks) in left {
            registry.spawn(migration, |inbox| {
                Actor::sweep(&registry, migration, marks, inbox)
            });
        }
        let definitions = registry.node.settings.state_dir.join("definitions");
        definition::sweep(&definitions, |migration| match registry.known(migration) {
            Known::Ended { .. } => Some(true),
            Known::Nothing => None,
            _ => Some(false),
        });
        Ok(registry)
    }

    fn take_up(
        self: &Arc<Self>,
        migration: MigrationId,
        record: Record,
        marks: Option<MarksRecord>,
    ) {
        let instance = record.instance();
        if self.past.is_over(migration) {
            info!(%migration, %instance, "the migration was over: only its file was left");
            let removed = self.node.journal.migrations.remove(migration);
            drop(self.node.spawn(removed));
            return;
        }
        if self.is_held(migration) {
            return;
        }
        info!(%migration, %instance, "taking up a migration found in the journal");
        self.lock().holders.insert(instance, migration);
        if let Record::Leaving(record) = &record {
            self.lies_aside_over(migration, record.under.clone());
        }
        for place in record.places() {
            if let Err(fault) = self.claim(migration, std::slice::from_ref(&place)) {
                error!(%migration, %fault, "two migrations have one place: look at both guests");
            }
        }
        self.spawn(migration, |inbox| {
            Actor::resume(self, migration, record, marks, inbox)
        });
    }

    fn spawn(
        self: &Arc<Self>,
        migration: MigrationId,
        make: impl FnOnce(mpsc::Receiver<Asked>) -> Actor,
    ) {
        let (sender, inbox) = mpsc::channel(MAILBOX);
        self.lock().actors.insert(migration, sender);
        self.drive(make(inbox));
    }

    fn drive(self: &Arc<Self>, actor: Actor) {
        let (registry, migration) = (self.clone(), actor.migration);
        let running = self.node.spawn(actor.run());
        drop(self.node.spawn(async move {
            if running.await.is_err_and(|ended| ended.is_panic()) {
                registry.died(migration).await;
            }
        }));
    }

    // ---- what cannot be carried on now

    /// Holds an instance for a migration of which a file cannot be read.
    fn hold_back(self: &Arc<Self>, file: UnreadFile) {
        let migration = file.migration;
        let seen = self.node.journal.seen.summary(migration);
        let instance = file.instance.or(seen.map(|seen| seen.instance));
        error!(%migration, instance = ?instance, why = file.why,
            "the journal of a migration cannot be read now: its instance is held, and steps that \
             have to do with it are refused until it can be");
        let why = file.why;
        self.set_held(migration, Held { instance, why });
        let registry = self.clone();
        drop(
            self.node
                .spawn(async move { registry.take_up_again(migration, FIRST_PAUSE).await }),
        );
    }

    /// The actor of a migration panicked. It is taken up again as after a restart
    /// of the agent, later each time.
    async fn died(self: &Arc<Self>, migration: MigrationId) {
        let (times, instance) = {
            let mut state = self.lock();
            state.actors.remove(&migration);
            let times = state.deaths.entry(migration).or_default();
            *times += 1;
            let times = *times;
            let held = state
                .holders
                .iter()
                .find(|(_, holder)| **holder == migration);
            (times, held.map(|(instance, _)| *instance))
        };
        self.past.leave(migration);
        error!(%migration, times, "carrying out a step failed by a mistake of the agent's; it is taken up again");
        if instance.is_none() && self.node.journal.doing(migration).is_none() {
            return;
        }
        let why = format!("the agent's work on it died ({times} times by now)");
        self.set_held(migration, Held { instance, why });
        let pause = FIRST_PAUSE * 2_u32.saturating_pow((times - 1).min(6));
        self.take_up_again(migration, pause.min(LONGEST_PAUSE))
            .await;
    }

    fn set_held(&self, migration: MigrationId, held: Held) {
        let mut state = self.lock();
        if let Some(instance) = held.instance {
            state.holders.insert(instance, migration);
        }
        state.held.insert(migration, held);
    }

    /// Tries until the journal can be read.
    async fn take_up_again(self: &Arc<Self>, migration: MigrationId, first: Duration) {
        let mut pause = first;
        loop {
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
            let journal = &self.node.journal;
            // Both, for one of them may be what could not be read.
            let read = match journal.seen.load_again(migration).await {
                Ok(_) => journal.migrations.load_again(migration).await,
                Err(unread) => Err(unread),
            };
            let record = match read {
                Ok(record) => record,
                Err(Unread::Corrupt(_)) => None,
                Err(Unread::NotNow(why)) => {
                    warn!(%migration, why, "the journal of a migration still cannot be read");
                    continue;
                }
            };
            self.let_go(migration);
            match record {
                Some(record) => self.take_up(migration, record, None),
                None => self.lock().claims.retain(|_, m| *m != migration),
            }
            return;
        }
    }

    fn let_go(&self, migration: MigrationId) {
        let mut state = self.lock();
        state.held.remove(&migration);
        state.holders.retain(|_, holder| *holder != migration);
    }

    fn is_held(&self, migration: MigrationId) -> bool {
        self.lock().held.contains_key(&migration)
    }

    // ---- the way to actors

    /// Has a step of a conductor done by the migration's actor. It is in the
    /// mailbox when this returns for the first time: steps are done in the order
    /// in which they are asked for.
    ///
    /// # Errors
    /// The step's own fault; retryable if too much is waiting already.
    pub(super) async fn ask<T>(
        self: &Arc<Self>,
        step: StepRef,
        epoch: u64,
        kind: Kind,
        work: impl FnOnce(Reply<T>) -> Work,
    ) -> Result<T, Fault> {
        let (refused, refusal) = oneshot::channel();
        let gate = Gate {
            step,
            epoch,
            kind,
            refused,
        };
        self.ask_by(step.migration, Some(gate), refusal, work).await
    }

    /// The same for a step of the agent's own.
    async fn ask_inside<T>(
        self: &Arc<Self>,
        migration: MigrationId,
        work: impl FnOnce(Reply<T>) -> Work,
    ) -> Result<T, Fault> {
        let (_, refusal) = oneshot::channel();
        self.ask_by(migration, None, refusal, work).await
    }

    async fn ask_by<T>(
        self: &Arc<Self>,
        migration: MigrationId,
        gate: Option<Gate>,
        mut refusal: oneshot::Receiver<Fault>,
        work: impl FnOnce(Reply<T>) -> Work,
    ) -> Result<T, Fault> {
        let (reply, answer) = oneshot::channel();
        let work = work(reply);
        self.enqueue(migration, Asked { work, gate })?;
        answer.await.unwrap_or_else(|_| {
            let message = "the agent stopped, or failed, before the step was answered";
            let lost = || Fault::new(ErrorClass::Lost, code::STEP_LOST, message);
            Err(refusal.try_recv().unwrap_or_else(|_| lost()))
        })
    }

    fn enqueue(self: &Arc<Self>, migration: MigrationId, asked: Asked) -> Result<(), Fault> {
        let mut state = self.lock();
        if let Some(held) = state.held.get(&migration) {
            return Err(faults::unreadable(&held.why));
        }
        if let Some(actor) = state.actors.get(&migration) {
            // Under the lock, so that no actor retires with a step in its mailbox.
            return actor.try_send(asked).map_err(|unsent| {
                Fault::not_now(match unsent {
                    TrySendError::Full(_) => {
                        format!("{MAILBOX} steps of migration {migration} are waiting already")
                    }
                    TrySendError::Closed(_) => {
                        format!("the agent's work on migration {migration} has just died")
                    }
                })
            });
        }
        if state.actors.len() >= MAX_ACTORS {
            let message = format!("this node is busy with {MAX_ACTORS} migrations");
            return Err(Fault::not_now(message));
        }
        let (sender, inbox) = mpsc::channel(MAILBOX);
        // The mailbox is new and empty.
        drop(sender.try_send(asked));
        state.actors.insert(migration, sender);
        drop(state);
        self.drive(Actor::new(self, migration, Stage::Idle, inbox));
        Ok(())
    }

    /// Lets an actor with nothing left to do go, unless a step has just come.
    pub(super) fn retire(&self, migration: MigrationId, inbox: &mpsc::Receiver<Asked>) -> bool {
        let mut state = self.lock();
        let idle = inbox.is_empty();
        if idle {
            state.actors.remove(&migration);
            state.deaths.remove(&migration);
        }
        idle
    }

    // ---- who has which instance

    /// Gives an instance to a migration, or keeps it there.
    ///
    /// # Errors
    /// Refused if another migration has it and is not plainly over.
    pub(super) async fn hold(self: &Arc<Self>, step: StepRef) -> Result<(), Fault> {
        self.make_way(step).await?;
        let mut state = self.lock();
        let holder = *state.holders.entry(step.instance).or_insert(step.migration);
        match holder == step.migration {
            true => Ok(()),
            false => Err(faults::busy(step.instance, holder)),
        }
    }

    /// Makes sure that no other migration has an instance.
    async fn make_way(self: &Arc<Self>, step: StepRef) -> Result<(), Fault> {
        self.ask_holder(step, |actor, instance| Box::pin(actor.step_aside(instance)))
            .await
    }

    /// Whether [`Self::hold`] would give the instance to a migration. Nobody makes way
    /// for a question.
    ///
    /// # Errors
    /// As [`Self::hold`].
    pub(super) async fn could_have(self: &Arc<Self>, step: StepRef) -> Result<(), Fault> {
        self.ask_holder(step, |actor, instance| {
            Box::pin(actor.may_step_aside(instance))
        })
        .await
    }

    async fn ask_holder(
        self: &Arc<Self>,
        step: StepRef,
        serve: for<'a> fn(&'a mut Actor, InstanceId) -> Doing<'a, Result<(), Fault>>,
    ) -> Result<(), Fault> {
        if let Some(why) = self.held_back(step.instance) {
            return Err(faults::unreadable(&why));
        }
        let instance = step.instance;
        let work = move |to: Reply<()>| -> Work {
            Box::new(move |actor| {
                Box::pin(async move { drop(to.send(serve(actor, instance).await)) })
            })
        };
        let holder = self.holder(instance);
        match holder.filter(|holder| *holder != step.migration) {
            None => Ok(()),
            // Only a holder is asked, and a holder asks nobody: no circle.
            Some(other) => self.ask_inside(other, work).await,
        }
    }

    /// Why nothing may be begun with an instance now, if nothing may.
    pub(crate) fn held_back(&self, instance: InstanceId) -> Option<String> {
        let state = self.lock();
        let mut held = state.held.values();
        let held = held.find(|held| held.instance.is_none_or(|own| own == instance));
        held.map(|held| held.why.clone())
    }

    /// Promises files and devices to a migration until it is over here.
    ///
    /// # Errors
    /// Refused if one of them is another's, retryable while the journal of another, which may
    /// have it, cannot be read; then none is promised.
    pub(super) fn claim(&self, migration: MigrationId, places: &[String]) -> Result<(), Fault> {
        let mut state = self.lock();
        for place in places {
            let mut claims = state.claims.iter().filter(|(_, m)| **m != migration);
            if let Some((_, other)) = claims.find(|(claimed, _)| are_one(claimed, place)) {
                return Err(Fault::refused(format!(
                    "{place} is promised to migration {other} on this node: confirm or revert \
                     that one, or wait for its end"
                )));
            }
            let mut held = state.held.iter().filter(|(m, _)| **m != migration);
            if let Some((_, held)) = held.next().filter(|_| is_device(place)) {
                return Err(faults::unreadable(&held.why));
            }
        }
        let claims = places.iter().map(|place| (place.clone(), migration));
        state.claims.extend(claims);
        Ok(())
    }

    /// A guest is set aside, and these images stay where they are.
    pub(super) fn lies_aside_over(&self, migration: MigrationId, images: Vec<String>) {
        self.lock().beneath.insert(migration, images);
    }

    /// Whose guest lies aside over an image.
    pub(super) fn who_lies_over(&self, image: &str, but: MigrationId) -> Option<MigrationId> {
        let state = self.lock();
        let mut others = state.beneath.iter().filter(|(m, _)| **m != but);
        let found = others.find(|(_, images)| images.iter().any(|i| i == image));
        found.map(|(migration, _)| *migration)
    }

    /// Takes an instance back from a migration, and whatever was promised to it.
    pub(super) fn release(&self, step: StepRef) {
        let mut state = self.lock();
        state.beneath.remove(&step.migration);
        state.claims.retain(|_, holder| *holder != step.migration);
        if state.holders.get(&step.instance) == Some(&step.migration) {
            state.holders.remove(&step.instance);
        }
    }

    /// What is remembered of migrations.
    pub(super) fn past(&self) -> &Past {
        &self.past
    }

    /// How a migration ended here, if it did.
    ///
    /// # Errors
    /// Retryable while what was written of it cannot be read.
    pub(super) async fn finished(&self, migration: MigrationId) -> Result<Option<Finished>, Fault> {
        self.past.finished(migration).await
    }

    /// What the journal knows of a migration here.
    pub(crate) fn known(&self, migration: MigrationId) -> Known {
        match self.is_held(migration) {
            true => Known::Unreadable,
            false => self.past.known(migration),
        }
    }

    /// Lets a question of a conductor in that is answered past the actor.
    ///
    /// # Errors
    /// It is fenced, or cannot be answered now.
    pub(crate) async fn question(&self, step: StepRef, epoch: u64) -> Result<(), Fault> {
        self.past.question(step, epoch, self.node.now_ms()).await
    }

    /// The migration that has an instance.
    pub(crate) fn holder(&self, instance: InstanceId) -> Option<MigrationId> {
        self.lock().holders.get(&instance).copied()
    }

    /// The migrations that have an instance here.
    pub(crate) fn under_way(&self) -> HashMap<InstanceId, MigrationId> {
        self.lock().holders.clone()
    }

    pub(super) fn node(&self) -> &Arc<Node> {
        &self.node
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing is left half done under this lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_device(place: &str) -> bool {
    place.starts_with("/dev/")
}

/// Whether two names are of one place. A device has several, and which of them lead to it
/// changes: they are looked at now.
fn are_one(a: &str, b: &str) -> bool {
    let real = |place: &str| Path::new(place).canonicalize().ok();
    let both_devices = is_device(a) && is_device(b);
    a == b || (both_devices && real(a).is_some_and(|real_a| Some(real_a) == real(b)))
}

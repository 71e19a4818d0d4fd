//! Which migrations this node is carrying out, and the way to their actors.
//!
//! An instance belongs to one migration from the first journalled step to the
//! last clean-up; steps of another one are refused meanwhile. One whose end the
//! conductor never told (it was lost on the way) steps aside when it is plain
//! from the guest that it is over, so that nothing blocks a guest for ever.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use drover_model::{
    api::{
        compute::{CleanUp, Ended, JobState, Known, StepRef},
        fault::{Fault, code},
    },
    error::ErrorClass,
    ids::{InstanceId, MigrationId},
};
use tokio::sync::{mpsc, oneshot};
use tracing::info;

use super::actor::{Actor, Command, Reply, Stage};
use crate::{faults, journal::JournalError, node::Node};

/// Steps of one migration that may wait for each other. The conductor asks for
/// one at a time; the rest is for repeats, polls and an abort.
const MAILBOX: usize = 16;
/// Migrations at one time, checks included: of each guest that is asked about an
/// actor stays for as long as marks lie beside its disks, and a drain asks about all.
const MAX_ACTORS: usize = 4096;
/// Migrations remembered after their last step, for steps that come again.
const MAX_FINISHED: usize = 256;

/// See the module.
pub(crate) struct Registry {
    node: Arc<Node>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    actors: HashMap<MigrationId, mpsc::Sender<Command>>,
    holders: HashMap<InstanceId, MigrationId>,
    finished: VecDeque<(MigrationId, Finished)>,
}

/// What is remembered of a migration after its last step here.
#[derive(Debug, Clone)]
pub(super) struct Finished {
    /// How it ended here.
    pub(super) how: Ended,
    /// How the transfer ended, if this was the source.
    pub(super) job: Option<JobState>,
    /// What the last step answered.
    pub(super) clean_up: CleanUp,
}

impl Finished {
    /// With nothing more to say of it.
    pub(super) fn with(how: Ended) -> Self {
        Self {
            how,
            job: None,
            clean_up: CleanUp::default(),
        }
    }
}

impl Registry {
    /// Takes up what the journal says was under way.
    ///
    /// # Errors
    /// The journal's directories cannot be read.
    pub(crate) fn start(node: Arc<Node>) -> Result<Arc<Self>, JournalError> {
        let migrations = node.journal.migrations.load()?.read;
        let marks = node.journal.marks.load()?.read;
        let registry = Arc::new(Self {
            node,
            state: Mutex::default(),
        });
        let mut left: HashMap<_, _> = marks.into_iter().collect();
        for (migration, record) in migrations {
            let instance = record.instance();
            info!(%migration, %instance, "taking up a migration found in the journal");
            registry.lock().holders.insert(instance, migration);
            let marks = left.remove(&migration);
            registry.take_up(
                |inbox| Actor::resume(&registry, migration, record, marks, inbox),
                migration,
            );
        }
        for (migration, marks) in left {
            registry.take_up(
                |inbox| Actor::sweep(&registry, migration, marks, inbox),
                migration,
            );
        }
        Ok(registry)
    }

    fn take_up(&self, make: impl FnOnce(mpsc::Receiver<Command>) -> Actor, migration: MigrationId) {
        let (sender, inbox) = mpsc::channel(MAILBOX);
        self.lock().actors.insert(migration, sender);
        drop(self.node.spawn(make(inbox).run()));
    }

    /// Has a step done by the migration's actor.
    ///
    /// # Errors
    /// The step's own fault; retryable if too much is waiting already.
    pub(crate) async fn ask<T>(
        self: &Arc<Self>,
        migration: MigrationId,
        step: impl FnOnce(Reply<T>) -> Command,
    ) -> Result<T, Fault> {
        let (reply, answer) = oneshot::channel();
        self.enqueue(migration, step(reply))?;
        answer.await.unwrap_or_else(|_| {
            let message = "the agent stopped, or failed, before the step was answered";
            Err(Fault::new(ErrorClass::Lost, code::STEP_LOST, message))
        })
    }

    fn enqueue(self: &Arc<Self>, migration: MigrationId, command: Command) -> Result<(), Fault> {
        let mut state = self.lock();
        if let Some(actor) = state.actors.get(&migration) {
            // Under the lock, so that no actor retires with a step in its mailbox.
            return actor.try_send(command).map_err(|_| {
                Fault::not_now(format!(
                    "{MAILBOX} steps of migration {migration} are waiting already"
                ))
            });
        }
        if state.actors.len() >= MAX_ACTORS {
            let message = format!("this node is busy with {MAX_ACTORS} migrations");
            return Err(Fault::not_now(message));
        }
        let (sender, inbox) = mpsc::channel(MAILBOX);
        // The mailbox is new and empty.
        drop(sender.try_send(command));
        state.actors.insert(migration, sender);
        drop(state);
        let actor = Actor::new(self, migration, Stage::Idle, inbox);
        drop(self.node.spawn(actor.run()));
        Ok(())
    }

    /// Lets an actor with nothing left to do go, unless a step has just come.
    pub(super) fn retire(&self, migration: MigrationId, inbox: &mpsc::Receiver<Command>) -> bool {
        let mut state = self.lock();
        let idle = inbox.is_empty();
        if idle {
            state.actors.remove(&migration);
        }
        idle
    }

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
    ///
    /// # Errors
    /// As [`Self::hold`].
    pub(super) async fn make_way(self: &Arc<Self>, step: StepRef) -> Result<(), Fault> {
        let holder = self.holder(step.instance);
        match holder.filter(|holder| *holder != step.migration) {
            None => Ok(()),
            // Only a holder is asked, and a holder asks nobody: no circle.
            Some(other) => {
                self.ask(other, |reply| Command::StepAside(step.instance, reply))
                    .await
            }
        }
    }

    /// Takes an instance back from a migration, and remembers how that ended.
    pub(super) fn release(&self, step: StepRef, finished: Option<Finished>) {
        let mut state = self.lock();
        if state.holders.get(&step.instance) == Some(&step.migration) {
            state.holders.remove(&step.instance);
        }
        if let Some(finished) = finished {
            if state.finished.len() >= MAX_FINISHED {
                state.finished.pop_front();
            }
            state.finished.push_back((step.migration, finished));
        }
    }

    /// What is remembered of a migration that was finished here.
    pub(super) fn finished(&self, migration: MigrationId) -> Option<Finished> {
        let state = self.lock();
        let found = state.finished.iter().rev().find(|(id, _)| *id == migration);
        found.map(|(_, finished)| finished.clone())
    }

    /// What the journal knows of a migration here.
    pub(crate) fn known(&self, migration: MigrationId) -> Known {
        match (self.finished(migration), self.node.journal.doing(migration)) {
            (_, Some(doing)) => Known::UnderWay { doing },
            (Some(Finished { how, .. }), None) => Known::Ended { how },
            (None, None) => Known::Nothing,
        }
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

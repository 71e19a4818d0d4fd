//! What this node has seen of migrations, over restarts: the highest epoch under
//! which a conductor asked for a step, whether anything was begun here, and how
//! it ended. So a step that is late is known as such.
//!
//! ```text
//! epoch of a step    lower than one seen ─► fenced: whoever asks drives it no more
//!                    higher ─► written down, then the step is done
//! begun, no end and no record ─► lost: the journal is not what it was
//! ended              the same step again ─► what it answered; a first one ─► refused
//! ```
//!
//! A conductor that takes a migration over and asks where the guest is may rely
//! on the answer: from then on no step of the conductor before it is done.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use drover_model::{
    api::{
        compute::{CleanUp, Ended, JobState, Known, StepRef},
        fault::Fault,
    },
    ids::MigrationId,
};
use tracing::warn;

use crate::{
    faults,
    journal::{Journal, Over, Seen, SeenRecord},
};

/// How long it is remembered how a migration ended, ms: far longer than any
/// message lives, or any conductor stands still.
const KEPT_MS: u64 = 30 * 86_400_000;
/// Migrations remembered at the most.
const MAX_SEEN: usize = 4096;

/// See the module.
pub(super) struct Past {
    journal: Journal,
    /// Held while what was seen is changed.
    changing: tokio::sync::Mutex<()>,
    max_seen: usize,
    kept_ms: u64,
    /// Steps under way, by the epoch under which they were asked for.
    serving: Mutex<HashMap<MigrationId, u64>>,
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

impl Past {
    pub(super) fn new(journal: Journal) -> Self {
        Self {
            journal,
            changing: tokio::sync::Mutex::default(),
            max_seen: MAX_SEEN,
            kept_ms: KEPT_MS,
            serving: Mutex::default(),
        }
    }

    #[cfg(test)]
    fn remembering(mut self, max_seen: usize, kept_ms: u64) -> Self {
        (self.max_seen, self.kept_ms) = (max_seen, kept_ms);
        self
    }

    fn seen(&self, migration: MigrationId) -> Option<Seen> {
        self.journal.seen.summary(migration)
    }

    /// Lets a step in whose epoch is not lower than any before it, and has it
    /// written down. To be let out with [`Self::leave`].
    ///
    /// # Errors
    /// It is fenced, or its epoch cannot be written down: nothing was done.
    pub(super) async fn enter(&self, step: StepRef, epoch: u64, now_ms: u64) -> Result<(), Fault> {
        self.raise(step, epoch, now_ms).await?;
        self.serving().insert(step.migration, epoch);
        // A question under a higher epoch may have come in between: it has either
        // seen this step, or is seen by it.
        let raised = self.check(step.migration, epoch);
        if raised.is_err() {
            self.leave(step.migration);
        }
        raised
    }

    /// The step is over.
    pub(super) fn leave(&self, migration: MigrationId) {
        self.serving().remove(&migration);
    }

    /// Lets a question in that is answered past the migration's steps.
    ///
    /// # Errors
    /// It is fenced, or a step that was asked for under a lower epoch is still
    /// being done: what is seen now may change.
    pub(super) async fn question(
        &self,
        step: StepRef,
        epoch: u64,
        now_ms: u64,
    ) -> Result<(), Fault> {
        if epoch == 0 {
            return Ok(());
        }
        self.raise(step, epoch, now_ms).await?;
        match self.serving().get(&step.migration) {
            Some(under_way) if *under_way < epoch => Err(Fault::not_now(
                "a step that was asked for before the migration was taken over is still being done",
            )),
            _ => Ok(()),
        }
    }

    fn check(&self, migration: MigrationId, epoch: u64) -> Result<(), Fault> {
        match self.seen(migration).map_or(0, |seen| seen.epoch) {
            highest if highest > epoch => Err(faults::fenced(migration, epoch, highest)),
            _ => Ok(()),
        }
    }

    async fn raise(&self, step: StepRef, epoch: u64, now_ms: u64) -> Result<(), Fault> {
        let highest = self.seen(step.migration).map_or(0, |seen| seen.epoch);
        if epoch > highest {
            let raise = |record: &mut SeenRecord| record.epoch = record.epoch.max(epoch);
            self.change(step, now_ms, raise).await?;
        }
        self.check(step.migration, epoch)
    }

    /// Something of it is on disk from now on, until it ends.
    pub(super) async fn began(&self, step: StepRef, now_ms: u64) -> Result<(), Fault> {
        if self.seen(step.migration).is_some_and(|seen| seen.begun) {
            return Ok(());
        }
        self.change(step, now_ms, |record| record.begun = true)
            .await
    }

    /// It is over here.
    pub(super) async fn ended(
        &self,
        step: StepRef,
        finished: Finished,
        now_ms: u64,
    ) -> Result<(), Fault> {
        let end = |record: &mut SeenRecord| {
            record.over = Some(Over {
                epoch: record.epoch,
                how: finished.how,
                job: finished.job,
                clean_up: finished.clean_up,
            });
        };
        self.change(step, now_ms, end).await
    }

    /// Makes sure that a migration may begin here. One that was taken back before
    /// it began may do so by the word of whoever took it over since.
    ///
    /// # Errors
    /// Refused if it is over here, or the journal of it is lost.
    pub(super) async fn may_begin(&self, step: StepRef, now_ms: u64) -> Result<(), Fault> {
        let migration = step.migration;
        if self.known(migration) == Known::Lost {
            return Err(faults::journal_lost(migration));
        }
        match self.seen(migration) {
            Some(Seen {
                how: Some((Ended::NeverBegun, then)),
                epoch,
                ..
            }) if then < epoch => self.change(step, now_ms, |record| record.over = None).await,
            Some(Seen { how: Some(_), .. }) => Err(Fault::refused("this migration is over here")),
            _ => Ok(()),
        }
    }

    /// How a migration ended here, if it did.
    ///
    /// # Errors
    /// Retryable while what was written of it cannot be read.
    pub(super) async fn finished(&self, migration: MigrationId) -> Result<Option<Finished>, Fault> {
        if self.seen(migration).is_none_or(|seen| seen.how.is_none()) {
            return Ok(None);
        }
        let read = self.journal.seen.read(migration).await;
        let record = read.map_err(|why| faults::unreadable(&why.to_string()))?;
        Ok(record.and_then(|record| record.over).map(|over| Finished {
            how: over.how,
            job: over.job,
            clean_up: over.clean_up,
        }))
    }

    /// What the journal knows of a migration here, as far as it can be read.
    pub(super) fn known(&self, migration: MigrationId) -> Known {
        match (self.seen(migration), self.journal.doing(migration)) {
            (_, Some(doing)) => Known::UnderWay { doing },
            (Some(Seen { how: Some(how), .. }), None) => Known::Ended { how: how.0 },
            (Some(Seen { begun: true, .. }), None) => Known::Lost,
            (_, None) => Known::Nothing,
        }
    }

    async fn change(
        &self,
        step: StepRef,
        now_ms: u64,
        change: impl FnOnce(&mut SeenRecord),
    ) -> Result<(), Fault> {
        let _one = self.changing.lock().await;
        let read = self.journal.seen.read(step.migration).await;
        let before = read.map_err(|why| faults::unreadable(&why.to_string()))?;
        let mut record = before.unwrap_or(SeenRecord {
            instance: step.instance,
            epoch: 0,
            begun: false,
            over: None,
            at_ms: now_ms,
        });
        change(&mut record);
        record.at_ms = now_ms;
        self.journal.seen.store(step.migration, &record).await?;
        self.prune(step.migration, now_ms).await;
        Ok(())
    }

    /// Forgets what is very old, or the oldest of very many; never what goes on.
    async fn prune(&self, newest: MigrationId, now_ms: u64) {
        for migration in self.superfluous(newest, now_ms) {
            if let Err(error) = self.journal.seen.remove(migration).await {
                warn!(%migration, %error, "what is long over cannot be forgotten");
                return;
            }
        }
    }

    fn superfluous(&self, newest: MigrationId, now_ms: u64) -> Vec<MigrationId> {
        let seen = &self.journal.seen;
        let excess = seen.count().saturating_sub(self.max_seen);
        let is_old = |seen: &Seen| now_ms.saturating_sub(seen.at_ms) > self.kept_ms;
        if excess == 0 && !seen.any(is_old) {
            return Vec::new();
        }
        let mut over: Vec<(u64, MigrationId, bool)> = seen
            .summaries()
            .into_iter()
            .filter(|(id, _)| *id != newest && self.journal.doing(*id).is_none())
            .map(|(id, seen)| (seen.at_ms, id, is_old(&seen)))
            .collect();
        over.sort_unstable();
        let spare = over.into_iter().enumerate();
        let spare = spare.filter(|(nth, (_, _, is_old))| *is_old || *nth < excess);
        spare.map(|(_, (_, id, _))| id).collect()
    }

    /// Whether it is written down that it ended here.
    pub(super) fn is_over(&self, migration: MigrationId) -> bool {
        self.seen(migration).is_some_and(|seen| seen.how.is_some())
    }

    /// The migrations that were begun here and of which no record is left.
    pub(super) fn lost(&self) -> Vec<MigrationId> {
        let all = self.journal.seen.summaries().into_iter();
        let ids = all.map(|(id, _)| id);
        ids.filter(|id| self.known(*id) == Known::Lost).collect()
    }

    fn serving(&self) -> MutexGuard<'_, HashMap<MigrationId, u64>> {
        // Nothing is left half done under this lock.
        self.serving.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;

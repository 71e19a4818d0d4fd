//! Marks: files left beside a guest's disks for the destination to look for.
//! They are removed when the path has been checked, or after a minute if that
//! never happens, or at the agent's next start if it dies in between.

use std::time::Duration;

use drover_model::{
    api::compute::Mark,
    guest::{Disk, Guest},
};
use tokio::time::Instant;
use tracing::warn;

use super::actor::Actor;
use crate::{
    hypervisor::{HypervisorError, Result},
    journal::MarksRecord,
};

/// How long marks stay when nobody has them removed; checking takes seconds.
const LIFETIME: Duration = Duration::from_secs(60);

/// Marks that are to be removed.
pub(super) struct Marks {
    record: MarksRecord,
    pub(super) due: Instant,
}

impl Marks {
    fn new(record: MarksRecord) -> Self {
        Self {
            record,
            due: Instant::now() + LIFETIME,
        }
    }

    /// Marks of a former life of the agent.
    pub(super) fn due_now(record: MarksRecord) -> Self {
        Self {
            record,
            due: Instant::now(),
        }
    }
}

impl Actor {
    /// Leaves marks beside the disks of a guest. A journal that cannot be
    /// written is no reason not to look: the worst is a stale mark.
    pub(super) async fn leave_marks(&mut self, guest: &Guest) -> Result<Vec<Mark>> {
        let disks: Vec<Disk> = guest.disks.clone();
        let mut record = MarksRecord {
            disks,
            marks: Vec::new(),
        };
        self.note_marks(&record).await;
        let marks = self
            .node
            .hypervisor
            .leave_marks(self.migration, &record.disks)
            .await?;
        record.marks = marks.clone();
        self.marks = Some(Marks::new(record));
        Ok(marks)
    }

    async fn note_marks(&self, record: &MarksRecord) {
        if let Err(e) = self.node.journal.marks.store(self.migration, record).await {
            warn!(migration = %self.migration, error = %e, "marks are left unrecorded");
        }
    }

    /// Removes the marks, if there are any; tries again later if that fails.
    pub(super) async fn remove_marks(&mut self) {
        let Some(mut marks) = self.marks.take() else {
            return;
        };
        if let Err(e) = self.take_away(&mut marks.record).await {
            warn!(migration = %self.migration, error = %e, "marks beside disks could not be removed yet");
            marks.due = Instant::now() + LIFETIME;
            self.marks = Some(marks);
            return;
        }
        if let Err(e) = self.node.journal.marks.remove(self.migration).await {
            warn!(migration = %self.migration, error = %e, "the record of marks stays behind");
        }
    }

    async fn take_away(&self, record: &mut MarksRecord) -> Result<()> {
        let hypervisor = &self.node.hypervisor;
        if record.marks.is_empty() && !record.disks.is_empty() {
            // The agent died while it left them, so where they are is unknown.
            // Leaving is by name: it tells where, and leaves no second one.
            record.marks = hypervisor
                .leave_marks(self.migration, &record.disks)
                .await?;
        }
        match hypervisor.remove_marks(&record.marks).await {
            // What cannot be done at all is not tried for ever.
            Err(HypervisorError::Failed(message)) => {
                warn!(migration = %self.migration, message, "a mark beside a disk stays behind");
                Ok(())
            }
            other => other,
        }
    }
}

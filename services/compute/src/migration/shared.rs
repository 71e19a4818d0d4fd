//! What the steps of both sides share.

use drover_model::{
    api::{
        compute::{CleanUp, Ended, GuestLocation, JobState, Known, Outcome, StepRef},
        fault::Fault,
    },
    error::ErrorClass,
    ids::InstanceId,
};
use tracing::{info, warn};

use super::{
    actor::{Actor, Stage},
    past::Finished,
    sending::job_of,
};
use crate::{
    faults::{self, hypervisor as fault},
    hypervisor::{HypervisorError, Job},
    journal::TransferRecord,
};

impl Actor {
    /// What the last step here answered, for the same step come again.
    ///
    /// # Errors
    /// Refused if the journal of it is lost: nobody knows what is left.
    pub(super) async fn remembered(&self) -> Result<CleanUp, Fault> {
        if self.registry.known(self.migration) == Known::Lost {
            return Err(faults::journal_lost(self.migration));
        }
        let finished = self.registry.finished(self.migration).await?;
        Ok(finished.map(|f| f.clean_up).unwrap_or_default())
    }

    /// What came of removing one of the migration's own files. What does not work
    /// is a warning, unless libvirt is away: then it is for later.
    pub(super) fn note_removed(
        &self,
        path: &str,
        removed: Result<(), HypervisorError>,
        clean_up: &mut CleanUp,
    ) -> Result<(), Fault> {
        match removed {
            Ok(()) => clean_up.removed.push(path.to_owned()),
            Err(e) if e.class() == ErrorClass::Refused => {
                let warning = format!("{path} was not removed: {e}");
                warn!(migration = %self.migration, warning);
                clean_up.warnings.push(warning);
            }
            Err(e) => return Err(fault(e)),
        }
        Ok(())
    }

    /// A clean-up that left nothing is the end of the migration here. Else the
    /// journal keeps what is left, for whoever asks again.
    pub(super) async fn forget_if_clean(
        &mut self,
        step: StepRef,
        how: Ended,
        clean_up: CleanUp,
    ) -> Result<CleanUp, Fault> {
        if clean_up.warnings.is_empty() {
            let finished = Finished {
                how,
                job: None,
                clean_up: clean_up.clone(),
            };
            self.forget(step, finished).await?;
        }
        Ok(clean_up)
    }

    /// Where the guest is here; no migration of libvirt's runs on it.
    pub(super) async fn location(&self, instance: InstanceId) -> Result<GuestLocation, Fault> {
        let presence = self.node.hypervisor.presence(instance).await;
        Ok(GuestLocation {
            known: self.registry.known(self.migration),
            state: Some(self.node.journal.state()),
            ..GuestLocation::seen(presence.map_err(fault)?)
        })
    }

    /// Refuses a step that names another instance than the migration's.
    pub(super) fn same_instance(&self, step: StepRef) -> Result<(), Fault> {
        let own = match &self.stage {
            Stage::Idle => return Ok(()),
            Stage::Sending(sending) => sending.record.request.instance,
            Stage::Ended(record) => record.request.instance,
            Stage::Arriving(record) => record.instance,
            Stage::Leaving(leaving) => leaving.record.instance,
            Stage::Coming(record) => record.instance,
            Stage::Transferring(transferring) => transferring.record.instance,
            Stage::Rebuilding(record) => record.instance,
        };
        match own == step.instance {
            true => Ok(()),
            false => Err(Fault::refused(format!(
                "migration {} moves instance {own}, not {}",
                self.migration, step.instance
            ))),
        }
    }

    /// Lets another migration have the instance if this one is plainly over: it ended
    /// without a move, or arrived, and the guest is active here.
    ///
    /// # Errors
    /// It is busy with it.
    pub(super) async fn may_step_aside(&self, instance: InstanceId) -> Result<(), Fault> {
        match matches!(self.stage, Stage::Idle) || self.is_over_for(instance).await? {
            true => Ok(()),
            false => Err(faults::busy(instance, self.migration)),
        }
    }

    /// Gives the instance up to another migration; what was left to tidy is tidied
    /// first.
    pub(super) async fn step_aside(&mut self, instance: InstanceId) -> Result<(), Fault> {
        if matches!(self.stage, Stage::Idle) {
            return Ok(());
        }
        self.may_step_aside(instance).await?;
        info!(migration = %self.migration, %instance, "the migration is over and makes way for another");
        let finished = match &self.stage {
            Stage::Ended(record) => Finished {
                job: Some(job_of(record)),
                ..Finished::with(Ended::MadeWay)
            },
            Stage::Transferring(transferring) => {
                let record = transferring.record.clone();
                Finished {
                    clean_up: self.last_clean_up(&record).await,
                    ..Finished::with(Ended::HandedOver)
                }
            }
            Stage::Arriving(record) if record.ran_here => Finished::with(Ended::Arrived),
            Stage::Rebuilding(record) if record.started => Finished::with(Ended::Arrived),
            _ => Finished::with(Ended::MadeWay),
        };
        self.forget(self.step(instance), finished).await
    }

    /// Removes what the giver had, if that can be done now: nobody waits for it. What is
    /// left nobody tries again, and whoever asks is told.
    async fn last_clean_up(&self, record: &TransferRecord) -> CleanUp {
        match self.remove_givers_files(record).await {
            Ok(mut clean_up) => {
                clean_up.kept.append(&mut clean_up.warnings);
                clean_up
            }
            Err(error) => {
                let disks = record.plan.disks.iter();
                let left = disks.map(|d| format!("{} may be left over: {}", d.from, error.message));
                CleanUp {
                    kept: left.collect(),
                    ..CleanUp::default()
                }
            }
        }
    }

    async fn is_over_for(&self, instance: InstanceId) -> Result<bool, Fault> {
        let settled = match &self.stage {
            // A cold one ends when it is confirmed or reverted.
            Stage::Idle | Stage::Sending(_) | Stage::Leaving(_) | Stage::Coming(_) => false,
            // Only old files are left of it.
            Stage::Transferring(transferring) => return Ok(transferring.is_handed_over()),
            Stage::Ended(record) => !may_have_moved(&job_of(record)),
            Stage::Arriving(record) => record.prepared,
            Stage::Rebuilding(record) => record.started,
        };
        if !settled {
            return Ok(false);
        }
        let hypervisor = &self.node.hypervisor;
        let presence = hypervisor.presence(instance).await.map_err(fault)?;
        if !presence.is_active() {
            return Ok(false);
        }
        match hypervisor.job(instance).await {
            Ok(job) => Ok(job == Job::None),
            // It went meanwhile.
            Err(HypervisorError::NoSuchGuest(_)) => Ok(false),
            Err(error) => Err(fault(error)),
        }
    }
}

/// Whether a transfer ended with the guest on the other side, or gone unseen.
fn may_have_moved(job: &JobState) -> bool {
    let gone = matches!(
        job,
        JobState::Ended {
            outcome: Outcome::Gone,
            ..
        }
    );
    gone || has_moved(job)
}

/// Whether a transfer ended with the guest on the other side, as the hypervisor said.
pub(super) fn has_moved(job: &JobState) -> bool {
    matches!(
        job,
        JobState::Ended {
            outcome: Outcome::Moved { .. },
            ..
        }
    )
}

//! A transfer to another project as a saga: the guest stays on its node and
//! changes hands, running (live) or off meanwhile (cold).

use drover_model::{
    api::compute::{
        AbortTransfer, Ended, JobState, Known, Outcome, PostTransfer, PrepTransfer,
        RollbackTransfer, TransferPart, TransferWork,
    },
    error::ErrorClass,
    migration::{EndReason, Migration, MigrationStatus as S, ProjectTransfer, TransferMode},
};
use drover_saga::StepError;

use super::{
    job::{
        ASK_AFTER, Data, Job, agent_error, all_clean, ended, lost, moved, patient, repeatable,
        store_error,
    },
    journal::{Recorded, Told},
    steps::steps,
};
use crate::{checks::transfer as checks, transfer_survey::TransferSurvey};

/// One transfer under way.
pub struct Transfer {
    job: Job,
    wanted: ProjectTransfer,
}

steps! { Transfer |it, data| until { it.job.interrupted() }
    // Every check, the plan; promises the receiver's quota. What takes long and may fail comes
    // while nothing has changed for anybody.
    CHECK = "check" [Accepted, Checking]
        { it.check(data) }
        undo { it.release_quota() };
    // Node: writes down the plan and what was before.
    PREPARE = "prepare" [Preparing, Preparing]
        tells "instance.transfer.start"
        { it.prepare(data) }
        undo { it.take_back() };
    // Cold: the guest shuts down (started again with what `prepare` undoes). A live one has
    // nothing to stop.
    STOP = "stop" [Running, Preparing]
        { it.stop(data) }
        undo { it.undo_stop(data) };
    // To the receiver's storage, the guest still on the old disks.
    COPY = "copy" [_, Disk]
        { it.copy(data) }
        undo { it.abort() };
    // Networks, metadata, then disks are the receiver's: a network is given back in a moment, a
    // disk that was written to has to be copied. The point of no return: the node says that all
    // of it is done. It is undone with `prepare`. Short, and better ended than left half done.
    HAND_OVER = "hand_over" [_, Finishing, commits, is_whole]
        { it.hand_over(data) };
    // The record follows the node, never the other way round.
    SETTLE = "settle" [_, Finishing]
        { it.settle(data) };
    // Node: removes the old disks.
    TIDY = "tidy" [_, Finishing]
        { it.tidy() };
}

impl Recorded for Transfer {
    fn told_at_failure() -> Told {
        Told::error("instance.transfer.error")
    }

    fn told_at_end(status: S) -> Vec<Told> {
        match status {
            S::Completed => vec![Told::info("instance.transfer.end")],
            _ => Vec::new(),
        }
    }

    fn status_after(_: &Migration) -> S {
        S::Completed
    }
}

impl Transfer {
    /// The saga of a transfer on the record.
    pub(super) fn new(job: Job, wanted: ProjectTransfer) -> Self {
        Self { job, wanted }
    }

    async fn check(&self, data: &mut Data) -> Result<(), StepError> {
        let m = &self.job.migration;
        let uuid = m.instance_uuid.to_string();
        let instance = self.job.store().find_instance(&uuid).await;
        let instance = instance.map_err(|e| store_error(&e))?;
        let survey = TransferSurvey {
            store: self.job.store(),
            agents: self.job.agents(),
            live: self.job.context.liveness(),
            migration: m.uuid,
            instance: &instance,
            transfer: &self.wanted,
        };
        let examined = survey.examine().await.map_err(|e| store_error(&e))?;
        let refused = |checks| Err(ended(EndReason::Refused { checks }));
        let (Some(plan), Some(guest)) = (examined.plan, examined.guest) else {
            return refused(examined.failures);
        };
        if !examined.failures.is_empty() {
            return refused(examined.failures);
        }
        let wanted = checks::usage_of(&instance);
        let project = &self.wanted.project;
        let store = self.job.store();
        let claimed = store.claim_quota(self.job.lease, project, wanted).await;
        if let Err(short) = claimed.map_err(|e| store_error(&e))? {
            return refused(checks::quota(project, &short));
        }
        for text in examined.words {
            data.decide(CHECK, text);
        }
        data.ran = guest.power_state.is_active();
        data.transfer = Some(plan);
        Ok(())
    }

    async fn prepare(&self, data: &Data) -> Result<(), StepError> {
        let ask = PrepTransfer {
            migration: self.job.migration.uuid,
            instance: self.job.migration.instance_uuid,
            plan: data.transfer()?.clone(),
            options: self.wanted.options.clone(),
        };
        let prepared = self.job.agents().act(self.job.source(), &ask);
        prepared.await.map_err(repeatable)
    }

    async fn stop(&self, data: &mut Data) -> Result<(), StepError> {
        if !data.ran || data.transfer()?.mode == TransferMode::Live {
            return Ok(());
        }
        self.work(TransferPart::Stop).await?;
        data.stopped_at_ms = Some(self.job.context.clock.now_ms());
        Ok(())
    }

    async fn copy(&self, data: &Data) -> Result<(), StepError> {
        match data.transfer()?.disks.is_empty() {
            true => Ok(()),
            false => self.work(TransferPart::Copy).await.map(drop),
        }
    }

    async fn hand_over(&self, data: &mut Data) -> Result<(), StepError> {
        let network_cut_ms = self.work(TransferPart::HandOver).await?;
        let now_ms = self.job.context.clock.now_ms();
        data.downtime_ms = match data.transfer()?.mode {
            TransferMode::Live => network_cut_ms,
            TransferMode::Cold => data.stopped_at_ms.map(|at| now_ms.saturating_sub(at)),
        };
        Ok(())
    }

    async fn settle(&self, data: &Data) -> Result<(), StepError> {
        let m = &self.job.migration;
        let now_ms = self.job.context.clock.now_ms();
        let name = data.transfer()?.name.as_deref();
        let project = &self.wanted.project;
        let settled =
            self.job
                .store()
                .hand_over(self.job.lease, m.instance_uuid, project, name, now_ms);
        settled.await.map_err(|e| store_error(&e))
    }

    /// Does again what was put off.
    pub(super) async fn tidy_again(&self, step: &str, data: &Data) -> Result<(), StepError> {
        if step != SETTLE {
            return self.tidy().await;
        }
        let now_ms = self.job.context.clock.now_ms();
        let name = data.transfer()?.name.as_deref();
        let (m, project) = (&self.job.migration, &self.wanted.project);
        let settled = self.job.store().hand_over_late(m, project, name, now_ms);
        settled.await.map_err(|e| store_error(&e))
    }

    /// Removes what the instance had of the giver's.
    async fn tidy(&self) -> Result<(), StepError> {
        let (host, step) = (self.job.source(), self.job.step());
        let tidied = self.job.agents().act(host, &PostTransfer(step)).await;
        self.job.cleaned(tidied).await
    }

    /// Has the node do a part, or finds it at it, and waits for its end. Says
    /// for how long the guest was cut off, where that is known.
    async fn work(&self, part: TransferPart) -> Result<Option<u64>, StepError> {
        moved(self.ended(part).await?).map_err(ended)
    }

    async fn ended(&self, part: TransferPart) -> Result<Outcome, StepError> {
        let ask = TransferWork {
            migration: self.job.migration.uuid,
            instance: self.job.migration.instance_uuid,
            part,
            ran: false,
        };
        let mut changes = self.job.store().changes();
        loop {
            let job = self.job.agents().ask(self.job.source(), &ask).await;
            match job.map_err(patient)? {
                JobState::Ended { outcome, .. } => return Ok(outcome),
                JobState::Running { .. } | JobState::Unknown => {}
            }
            tokio::select! {
                biased;
                () = self.job.changed(&mut changes) => {}
                () = tokio::time::sleep(ASK_AFTER) => {}
            }
        }
    }

    async fn release_quota(&self) -> Result<(), StepError> {
        let released = self.job.store().release_quota(self.job.lease).await;
        released.map_err(|e| store_error(&e))
    }

    /// The node stops copying, or asking the guest to shut down.
    async fn abort(&self) -> Result<(), StepError> {
        let (host, step) = (self.job.source(), self.job.step());
        let aborted = self.job.agents().act(host, &AbortTransfer(step)).await;
        aborted.map_err(agent_error)
    }

    async fn undo_stop(&self, data: &Data) -> Result<(), StepError> {
        self.abort().await?;
        self.start_what_is_forgotten(data).await
    }

    /// A node that has lost its journal does not know that the guest was asked to shut
    /// down, and is to run.
    async fn start_what_is_forgotten(&self, data: &Data) -> Result<(), StepError> {
        if !data.ran || data.transfer()?.mode == TransferMode::Live {
            return Ok(());
        }
        let host = self.job.source();
        let here = self.job.locate(host).await?;
        let is_forgotten = matches!(
            here.known,
            Known::Nothing
                | Known::Ended {
                    how: Ended::NeverBegun
                }
        );
        if !is_forgotten || here.presence.is_active() {
            return Ok(());
        }
        self.job.is_on_no_other_node(host).await.map_err(lost)?;
        let ask = TransferWork {
            migration: self.job.migration.uuid,
            instance: self.job.migration.instance_uuid,
            part: TransferPart::TakeBack,
            ran: true,
        };
        let started = self.job.agents().ask(host, &ask).await;
        started.map(drop).map_err(patient)
    }

    /// The node makes everything be as it was, and forgets.
    async fn take_back(&self) -> Result<(), StepError> {
        let (host, step) = (self.job.source(), self.job.step());
        match self.ended(TransferPart::TakeBack).await? {
            Outcome::Moved { .. } => {}
            Outcome::Failed { message } | Outcome::Stalled { message, .. } => {
                return Err(StepError::new(ErrorClass::Retryable, message));
            }
            Outcome::Aborted => {
                return Err(StepError::new(ErrorClass::Retryable, "it was stopped"));
            }
            Outcome::Gone => {
                return Err(StepError::new(ErrorClass::Retryable, "the guest was gone"));
            }
            Outcome::Other(what) => {
                let message = format!("it ended as only a newer conductor understands: {what}");
                return Err(StepError::new(ErrorClass::Retryable, message));
            }
        }
        let forgotten = self.job.agents().act(host, &RollbackTransfer(step)).await;
        all_clean(forgotten.map_err(agent_error)?)
    }
}

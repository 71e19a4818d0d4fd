//! A finished cold migration is confirmed: the source's copy is removed.
//!
//! | step | does | undo |
//! |---|---|---|
//! | `confirm_destination` | destination: what came is on stable storage, the guest is there | |
//! | — | *point of no return* | |
//! | `confirm_source` | source: removes what was set aside; the room for a way back is free | |
//!
//! The destination is asked first: the source's copy goes only when the other was
//! seen whole and in place, then and again when it goes (invariant 11). A guest that
//! somebody has brought back to the source is not confirmed: a revert ends that move.

use async_trait::async_trait;
use drover_model::migration::{EndReason, Migration, MigrationStatus as S, Phase};
use drover_saga::{Saga, StepError};

use super::{
    job::{Data, Job, agent_error, ended, lost},
    journal::{Recorded, Told},
    proof,
};

/// The steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The destination's copy is for good.
    ConfirmDestination,
    /// The source's copy goes.
    ConfirmSource,
}

/// One confirmation under way.
pub struct Confirm {
    job: Job,
}

impl Confirm {
    pub(super) fn new(job: Job) -> Self {
        Self { job }
    }

    async fn confirm_destination(&self) -> Result<(), StepError> {
        let Some(dest) = &self.job.migration.dest_host else {
            let message = "no destination is on the record".to_owned();
            return Err(ended(EndReason::Failed { message }));
        };
        // There, or where somebody has moved it on since.
        let there = self.job.look_for_it(dest, self.job.source()).await?;
        // One that does not answer is looked at when its copy goes.
        let source = self.job.look_at(self.job.source()).await.ok();
        let whole = proof::may_confirm(source.as_ref(), &there);
        whole.map_err(|message| ended(EndReason::Failed { message }))?;
        let step = self.job.step();
        let confirmed = self.job.agents().confirm_at_destination(dest, step).await;
        confirmed.map(drop).map_err(agent_error)
    }

    /// Whether the source has the guest again, and no other node.
    async fn is_back(&self) -> Result<bool, StepError> {
        let source = self.job.source();
        let here = self.job.look_at(source).await?;
        if !here.is_present() || !here.copy().is_whole() {
            return Ok(false);
        }
        self.job.is_on_no_other_node(source).await.map_err(lost)?;
        Ok(true)
    }

    /// Removes what the source keeps, and its claim. Of a guest that somebody has brought
    /// back there since, nothing is removed.
    pub(super) async fn confirm_source(&self) -> Result<(), StepError> {
        let (source, step) = (self.job.source(), self.job.step());
        let dest = self.job.migration.dest_host.as_ref().unwrap_or(source);
        let stays = self.job.look_for_it(dest, source).await?;
        let agents = self.job.agents();
        let confirmed = match !stays.is_present() && self.is_back().await? {
            true => agents.leave_aside(source, step).await,
            false => {
                let moved_on = self.job.has_moved_on().await?;
                let proof = proof::kept_aside(source, &stays, moved_on).map_err(lost)?;
                agents.confirm_resize(source, step, &proof).await
            }
        };
        self.job.cleaned(confirmed).await?;
        self.job.release_claim().await
    }
}

#[async_trait]
impl Saga for Confirm {
    type Step = Step;
    type Data = Data;

    const STEPS: &'static [Step] = &[Step::ConfirmDestination, Step::ConfirmSource];
    const COMMIT: Step = Step::ConfirmDestination;

    fn name(step: Step) -> &'static str {
        match step {
            Step::ConfirmDestination => "confirm_destination",
            Step::ConfirmSource => "confirm_source",
        }
    }

    async fn run(&self, step: Step, _: &mut Data) -> Result<(), StepError> {
        match step {
            Step::ConfirmDestination => self.confirm_destination().await,
            Step::ConfirmSource => self.confirm_source().await,
        }
    }

    async fn undo(&self, _: Step, _: &Data) -> Result<(), StepError> {
        Ok(())
    }

    async fn interrupted(&self) -> StepError {
        std::future::pending().await
    }

    fn interruptible(_: Step) -> bool {
        false
    }
}

impl Recorded for Confirm {
    fn status_during(_: Step) -> Option<S> {
        Some(S::Confirming)
    }

    fn phase_during(_: Step) -> Phase {
        Phase::Done
    }

    fn told_at_start(step: Step) -> Option<Told> {
        (step == Step::ConfirmDestination).then(|| Told::info("instance.resize_confirm.start"))
    }

    fn told_at_success(_: Step) -> Option<Told> {
        None
    }

    fn told_at_failure() -> Told {
        Told::error("instance.resize_confirm.error")
    }

    fn told_at_end(status: S) -> Vec<Told> {
        match status {
            S::Confirmed => vec![Told::info("instance.resize_confirm.end")],
            _ => Vec::new(),
        }
    }

    fn status_after(_: &Migration) -> S {
        S::Confirmed
    }

    fn status_undone(_: &Migration) -> S {
        S::Finished
    }

    fn at_end(m: &mut Migration) {
        super::ending_over(m);
    }
}

//! A finished cold migration is confirmed: the source's copy is removed.
//!
//! The destination is asked first: the source's copy goes only when the other was
//! seen whole and in place, then and again when it goes (invariant 11). A guest that
//! somebody has brought back to the source is not confirmed: a revert ends that move.

use drover_model::{
    api::compute::ConfirmAtDestination,
    migration::{EndReason, Migration, MigrationStatus as S},
};
use drover_saga::StepError;

use super::{
    job::{Job, agent_error, ended, lost},
    journal::{Recorded, Told},
    proof,
    steps::steps,
};

/// One confirmation under way.
pub struct Confirm {
    job: Job,
}

steps! { Confirm |it, data| until { std::future::pending() }
    // What came is on stable storage, and the guest is there: the source's copy goes only when
    // the other was seen whole and in place, now and again when it goes (invariant 11).
    CONFIRM_DESTINATION = "confirm_destination" [Confirming, Done, commits]
        tells "instance.resize_confirm.start"
        { it.confirm_destination() };
    // Source: removes what was set aside; the room for a way back is free.
    CONFIRM_SOURCE = "confirm_source" [Confirming, Done]
        { it.confirm_source() };
}

impl Recorded for Confirm {
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
        let confirmed = self
            .job
            .agents()
            .act(dest, &ConfirmAtDestination(step))
            .await;
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

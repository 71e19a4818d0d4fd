//! A finished cold migration is reverted: the guest is on its source again, as
//! it was when it left.
//!
//! | step | does | undo |
//! |---|---|---|
//! | `revert_destination` | destination: stops the guest, takes its definition away | destination: guest there again |
//! | `restore` | source: puts files and definition back, starts the guest if it ran | source: sets it aside again |
//! | — | *point of no return: the guest was seen on the source* | |
//! | `settle` | record and claim follow the guest | |
//! | `tidy` | destination: removes the files that came | |
//!
//! Before anything is stopped the source is asked whether it still has all that it
//! set aside: one that has lost it refuses, and the guest runs on. The destination
//! is stopped before the source starts anything (invariant 1), and keeps its disks
//! until the source was seen to have the guest, with its files in place. That it is
//! *absent* there is no success (invariant 11): then every other node is asked, as
//! somebody may have moved it on.

use async_trait::async_trait;
use drover_model::{
    api::compute::{FinishResize, FinishRevertResize},
    guest::{PowerState, Presence},
    ids::HostName,
    migration::{EndReason, Migration, MigrationStatus as S, Phase, Way},
};
use drover_saga::{Saga, StepError};
use futures_util::future::join_all;

use super::{
    job::{Data, Job, agent_error, all_clean, ended, lost, patient, store_error},
    journal::{Recorded, Told},
    proof::{self, TakeBack},
};

/// The steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Stop it on the destination.
    RevertDestination,
    /// Have it on the source.
    Restore,
    /// Have the record follow.
    Settle,
    /// Remove what came to the destination.
    Tidy,
}

/// One way back under way.
pub struct Revert {
    job: Job,
}

impl Revert {
    pub(super) fn new(job: Job) -> Self {
        Self { job }
    }

    fn dest(&self) -> Result<&HostName, StepError> {
        let message = "no destination is on the record".to_owned();
        let dest = self.job.migration.dest_host.as_ref();
        dest.ok_or_else(|| ended(EndReason::Failed { message }))
    }

    async fn revert_destination(&self) -> Result<(), StepError> {
        let source = self.job.look_at(self.job.source()).await?;
        let proof = proof::way_back(&source).map_err(cannot_go_back)?;
        let (dest, step) = (self.dest()?, self.job.step());
        // One that is away is waited for, as it is when it is told to stop the guest.
        let there = self.job.look_at(dest).await;
        let there = there.map_err(|error| lost(error.to_string()))?;
        if !there.is_present() {
            self.is_on_no_other_node(dest)
                .await
                .map_err(cannot_go_back)?;
        }
        let reverted = self.job.agents().revert_resize(dest, step, &proof).await;
        reverted.map(drop).map_err(patient)
    }

    /// That the destination has it no longer does not mean that nobody has: somebody may
    /// have moved it on, which the record need not know yet. Every other node has to say
    /// that it is not there.
    async fn is_on_no_other_node(&self, dest: &HostName) -> Result<(), String> {
        let nodes = self.job.store().nodes().await.map_err(|e| e.to_string())?;
        let hosts = nodes.into_iter().map(|node| node.report.host);
        let others: Vec<_> = hosts
            .filter(|host| host != dest && host != self.job.source())
            .collect();
        let asked = join_all(others.iter().map(|host| self.job.locate(host))).await;
        for (host, answer) in others.iter().zip(asked) {
            match answer {
                Ok(found) if found.presence == Presence::Absent => {}
                Ok(found) => {
                    let presence = found.presence;
                    return Err(format!(
                        "it is not on {dest} any more, and {host} has it ({presence})"
                    ));
                }
                Err(error) => {
                    return Err(format!(
                        "it is not on {dest} any more, and {host} does not say whether it is there: \
                         {error}"
                    ));
                }
            }
        }
        Ok(())
    }

    /// The guest is on the destination again, as it was there.
    async fn undo_destination(&self) -> Result<(), StepError> {
        let here = self.job.locate(self.job.source()).await?;
        let flavor = match &self.job.migration.way {
            Way::Cold(options) => options.flavor,
            Way::Live(_) | Way::Transfer(_) | Way::Evacuation(_) => None,
        };
        let ask = FinishResize {
            migration: self.job.migration.uuid,
            instance: self.job.migration.instance_uuid,
            // Only a guest that ran has a downtime on its record.
            start: here.presence == Presence::Absent && self.job.migration.downtime_ms.is_some(),
            flavor,
            checked: None,
        };
        let again = self.job.agents().finish_resize(self.dest()?, &ask).await;
        let Err(error) = again else {
            return Ok(());
        };
        // An agent that knows nothing of it stopped nothing that it could start again.
        let there = self.job.look_at(self.dest()?).await?;
        match there.copy().known.under_way {
            false => Ok(()),
            true => Err(agent_error(error)),
        }
    }

    async fn restore(&self, data: &mut Data) -> Result<(), StepError> {
        let dest = self.job.locate(self.dest()?).await?;
        let ask = FinishRevertResize {
            migration: self.job.migration.uuid,
            instance: self.job.migration.instance_uuid,
            runs_nowhere_else: dest.presence == Presence::Absent,
            ran: false,
        };
        let source = self.job.source();
        let restored = self.job.agents().finish_revert_resize(source, &ask).await;
        restored.map_err(patient)?;
        // What was answered is not enough: it is looked at.
        let seen = self.job.look_at(source).await;
        let seen = seen.map_err(|error| lost(error.to_string()))?;
        if !seen.is_present() || !seen.copy().is_whole() {
            return Err(cannot_go_back(seen.words()));
        }
        data.arrived = seen.copy().presence.power_state();
        Ok(())
    }

    async fn settle(&self, arrived: Option<PowerState>) -> Result<(), StepError> {
        let m = &self.job.migration;
        let now_ms = self.job.context.clock.now_ms();
        let (id, host) = (m.instance_uuid, &m.source_host);
        let settled = self
            .job
            .store()
            .settle(self.job.lease, id, host, arrived, None, now_ms)
            .await;
        settled.map_err(|e| store_error(&e))?;
        self.job.context.definitions.moved(id, host);
        Ok(())
    }

    /// Does again what was put off.
    pub(super) async fn tidy_again(
        &self,
        step: &str,
        dest: &HostName,
        data: &Data,
    ) -> Result<(), StepError> {
        if step == Self::name(Step::Tidy) {
            return self.tidy().await;
        }
        let source = self.job.source();
        self.job.settle_late(dest, source, data.arrived, None).await
    }

    /// Removes the files that came to the destination. A guest that somebody has
    /// brought there again keeps them.
    pub(super) async fn tidy(&self) -> Result<(), StepError> {
        let (dest_host, step) = (self.dest()?, self.job.step());
        let stays = self.job.look_for_it(self.job.source(), dest_host).await?;
        let dest = self.job.look_at(dest_host).await?;
        let agents = self.job.agents();
        match proof::reverted(&stays, &dest) {
            TakeBack::Redundant(proof) => {
                let tidied = agents.rollback_resize(dest_host, step, &proof).await;
                all_clean(tidied.map_err(agent_error)?)
            }
            TakeBack::Stays(why) => {
                let left = agents.confirm_at_destination(dest_host, step).await;
                left.map_err(agent_error)?;
                let words = format!("{why}: the files that came there are not removed");
                self.job.note_kept(vec![words]).await
            }
            TakeBack::Unproven(why) => Err(lost(why)),
        }
    }
}

fn cannot_go_back(why: String) -> StepError {
    ended(EndReason::Failed {
        message: format!("it cannot go back: {why}"),
    })
}

#[async_trait]
impl Saga for Revert {
    type Step = Step;
    type Data = Data;

    const STEPS: &'static [Step] = &[
        Step::RevertDestination,
        Step::Restore,
        Step::Settle,
        Step::Tidy,
    ];
    const COMMIT: Step = Step::Restore;

    fn name(step: Step) -> &'static str {
        match step {
            Step::RevertDestination => "revert_destination",
            Step::Restore => "restore",
            // Names of their own: what is put off is found by them.
            Step::Settle => "revert_settle",
            Step::Tidy => "revert_tidy",
        }
    }

    async fn run(&self, step: Step, data: &mut Data) -> Result<(), StepError> {
        match step {
            Step::RevertDestination => self.revert_destination().await,
            Step::Restore => self.restore(data).await,
            Step::Settle => self.settle(data.arrived).await,
            Step::Tidy => self.tidy().await,
        }
    }

    async fn undo(&self, step: Step, _: &Data) -> Result<(), StepError> {
        match step {
            Step::RevertDestination => self.undo_destination().await,
            Step::Restore => {
                let (source, step) = (self.job.source(), self.job.step());
                let aside = self.job.agents().set_aside(source, step).await;
                aside.map(drop).map_err(agent_error)
            }
            Step::Settle | Step::Tidy => Ok(()),
        }
    }

    async fn interrupted(&self) -> StepError {
        std::future::pending().await
    }

    fn interruptible(_: Step) -> bool {
        false
    }
}

impl Recorded for Revert {
    fn status_during(_: Step) -> Option<S> {
        Some(S::Reverting)
    }

    fn phase_during(_: Step) -> Phase {
        Phase::Done
    }

    fn told_at_start(step: Step) -> Option<Told> {
        (step == Step::RevertDestination).then(|| Told::info("instance.resize_revert.start"))
    }

    fn told_at_success(_: Step) -> Option<Told> {
        None
    }

    fn told_at_failure() -> Told {
        Told::error("instance.resize_revert.error")
    }

    fn told_at_end(status: S) -> Vec<Told> {
        match status {
            S::Reverted => vec![Told::info("instance.resize_revert.end")],
            _ => Vec::new(),
        }
    }

    fn status_after(_: &Migration) -> S {
        S::Reverted
    }

    fn status_undone(_: &Migration) -> S {
        S::Finished
    }

    fn at_end(m: &mut Migration) {
        super::ending_over(m);
    }
}

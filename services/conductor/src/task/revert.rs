//! A finished cold migration is reverted: the guest is on its source again, as
//! it was when it left.
//!
//! Before anything is stopped the source is asked whether it still has all that it
//! set aside, and room for it: one that has lost it, or that has the guest or other files
//! in its place, refuses, and the guest runs on. The destination
//! is stopped before the source starts anything (invariant 1), and keeps its disks
//! until the source was seen to have the guest, with its files in place. That it is
//! *absent* there is no success (invariant 11): then every other node is asked, as
//! somebody may have moved it on.
//!
//! A guest that somebody has brought back to the source by hand, that the destination
//! itself says it has not, and no other node has, is reverted already: the agents forget
//! the migration, the record follows, and nothing is done to the guest or to a file.

use drover_model::{
    api::compute::{CleanUp, ConfirmAtDestination, Ended, FinishResize, FinishRevertResize, Known},
    error::ErrorClass,
    guest::Presence,
    ids::HostName,
    migration::{EndReason, Migration, MigrationStatus as S, Way},
};
use drover_saga::StepError;

use super::{
    job::{Data, Job, agent_error, ended, lost, patient, repeatable, store_error},
    journal::{Recorded, Told},
    proof::{self, Seen, TakeBack},
    steps::steps,
};
use crate::agent_client::AgentError;

/// One way back under way.
pub struct Revert {
    job: Job,
}

steps! { Revert |it, data| until { std::future::pending() }
    // Destination: stops the guest, takes its definition away. Before anything is stopped the
    // source is asked whether it still has all that it set aside, and room for it.
    REVERT_DESTINATION = "revert_destination" [Reverting, Done]
        tells "instance.resize_revert.start"
        { it.revert_destination(data) }
        undo { it.unless_taken_back(data, it.undo_destination()) };
    // Source: puts files and definition back, starts the guest if it ran. The point of no
    // return: the guest was seen on the source.
    RESTORE = "restore" [Reverting, Done, commits]
        { it.restore(data) }
        undo { it.unless_taken_back(data, it.undo_restore()) };
    // What is put off is found by name: that of a cold migration's step is another one.
    SETTLE = "revert_settle" [Reverting, Done]
        { it.settle(data) };
    // Destination: removes the files that came, kept until the source was seen to have them.
    TIDY = "revert_tidy" [Reverting, Done]
        { it.tidy(data) };
}

impl Recorded for Revert {
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

impl Revert {
    pub(super) fn new(job: Job) -> Self {
        Self { job }
    }

    fn dest(&self) -> Result<&HostName, StepError> {
        let message = "no destination is on the record".to_owned();
        let dest = self.job.migration.dest_host.as_ref();
        dest.ok_or_else(|| ended(EndReason::Failed { message }))
    }

    async fn revert_destination(&self, data: &mut Data) -> Result<(), StepError> {
        let source = self.job.look_at(self.job.source()).await?;
        data.taken_back = source.is_present();
        if data.taken_back {
            return self.is_brought_back(&source).await;
        }
        let proof = proof::way_back(&source).map_err(cannot_go_back)?;
        let (dest, step) = (self.dest()?, self.job.step());
        // One that is away is waited for, as it is when it is told to stop the guest, unless
        // it is proven dead.
        let there = match self.job.look_at(dest).await {
            Ok(there) => there,
            Err(error) => {
                let dead = self.job.is_dead(dest).await?;
                let dead = dead.ok_or_else(|| lost(error.to_string()))?;
                return self.is_off_with(dest, dead, data).await;
            }
        };
        if !there.is_active() {
            self.is_nowhere_else(&there).await.map_err(cannot_go_back)?;
        }
        let reverted = self.job.agents().revert_resize(dest, step, &proof).await;
        reverted.map(drop).map_err(patient)
    }

    /// A destination that is proven dead runs the guest no more, and is not asked.
    async fn is_off_with(
        &self,
        dest: &HostName,
        dead: String,
        data: &mut Data,
    ) -> Result<(), StepError> {
        let alone = self.job.is_on_no_other_node(dest).await;
        alone.map_err(cannot_go_back)?;
        data.without_dest = true;
        data.decide(REVERT_DESTINATION, dead);
        Ok(())
    }

    /// Makes sure that a guest which does not run on the destination was not moved on from
    /// there: what is left may be a definition alone. Of one that is off as it came, a node
    /// that does not say is no reason against it.
    async fn is_nowhere_else(&self, there: &Seen) -> Result<(), String> {
        let dest = self.dest().map_err(|error| error.message)?;
        if !there.is_present() {
            return self.job.is_on_no_other_node(dest).await;
        }
        let third = self.job.on_third_node(dest).await;
        if let Some(why) = third.map_err(|error| error.message)? {
            return Err(why);
        }
        match self.job.elsewhere(dest).await {
            Ok(Some((host, presence))) => Err(format!("{host} has it ({presence})")),
            Err(why) if self.job.migration.downtime_ms.is_some() => Err(format!(
                "it is off on {dest}, and {why}: start it on {dest}, if it is there alone, and ask \
                 again"
            )),
            Ok(None) | Err(_) => Ok(()),
        }
    }

    /// Makes sure that a guest which somebody has brought back to the source is there alone.
    async fn is_brought_back(&self, source: &Seen) -> Result<(), StepError> {
        let dest = self.dest()?;
        let is_back = proof::is_back(source);
        let there = self.job.look_at(dest).await.map_err(|error| {
            // Nothing was asked for that would have to be known.
            let class = match error.class {
                ErrorClass::Lost => ErrorClass::Retryable,
                class => class,
            };
            let words = format!("{is_back}, and {dest} does not say whether it is there: {error}");
            StepError::new(class, words)
        })?;
        proof::brought_back(source, &there).map_err(cannot_go_back)?;
        let alone = self.job.is_on_no_other_node(dest).await;
        alone.map_err(|why| {
            cannot_go_back(format!(
                "{is_back}; {why}: every node but one has to say that it has no definition of it"
            ))
        })
    }

    /// Of a guest that was brought back by hand nothing is undone: nothing was done to it,
    /// nor to a file of it.
    async fn unless_taken_back(
        &self,
        data: &Data,
        undo: impl Future<Output = Result<(), StepError>>,
    ) -> Result<(), StepError> {
        match data.taken_back {
            true => Ok(()),
            false => undo.await,
        }
    }

    /// The guest is on the destination again, as it was there.
    async fn undo_destination(&self) -> Result<(), StepError> {
        let here = self.job.locate(self.job.source()).await?;
        let is_third = self.job.on_third_node(self.dest()?).await?.is_some();
        let flavor = match &self.job.migration.way {
            Way::Cold(options) => options.flavor,
            Way::Live(_) | Way::Transfer(_) | Way::Evacuation(_) => None,
        };
        let ask = FinishResize {
            migration: self.job.migration.uuid,
            instance: self.job.migration.instance_uuid,
            // Only a guest that ran has a downtime on its record.
            start: here.presence == Presence::Absent
                && self.job.migration.downtime_ms.is_some()
                && !is_third,
            flavor,
            checked: None,
        };
        let again = self.job.agents().act(self.dest()?, &ask).await;
        let Err(error) = again else {
            return Ok(());
        };
        // An agent that knows nothing of it stopped nothing that it could start again.
        let dest = self.dest()?;
        let there = match self.job.look_at(dest).await {
            Ok(there) => there,
            // It is off with its node, as it was.
            Err(_) if self.job.is_dead(dest).await?.is_some() => return Ok(()),
            Err(error) => return Err(error),
        };
        match there.copy().known.under_way {
            false => Ok(()),
            true => Err(agent_error(error)),
        }
    }

    async fn restore(&self, data: &mut Data) -> Result<(), StepError> {
        if data.taken_back {
            return self.leave_source(data).await;
        }
        // It may have been asked for before, by a try that heard no answer: trouble with the
        // destination says nothing of that.
        let dest = self.job.presence_unless_dead(self.dest()?).await;
        let dest = dest.map_err(|error| lost(error.message))?;
        if let Some(why) = self.job.on_third_node(self.dest()?).await? {
            return Err(cannot_go_back(why));
        }
        let ask = FinishRevertResize {
            migration: self.job.migration.uuid,
            instance: self.job.migration.instance_uuid,
            runs_nowhere_else: dest == Presence::Absent,
            // The source may have forgotten that it had it shut down; only a guest that ran
            // has a downtime on its record.
            ran: self.job.migration.downtime_ms.is_some(),
            memory: None,
            is_elsewhere: false,
        };
        let source = self.job.source();
        let restored = self.job.agents().act(source, &ask).await;
        // What was answered is not enough: it is looked at. An agent that did it and has
        // forgotten it since refuses.
        let seen = self.job.look_at(source).await;
        let seen = seen.map_err(|error| lost(error.message))?;
        let is_back = seen.is_present() && seen.copy().is_whole();
        match restored {
            Err(error) if !is_back || seen.copy().known.under_way => return Err(patient(error)),
            _ if !is_back => return Err(cannot_go_back(seen.words())),
            _ => {}
        }
        data.arrived = seen.copy().presence.power_state();
        Ok(())
    }

    /// The source forgets a guest that was brought back there by hand.
    async fn leave_source(&self, data: &mut Data) -> Result<(), StepError> {
        let (host, dest) = (self.job.source(), self.dest()?);
        let source = self.job.look_at(host).await?;
        if !source.is_present() {
            return Err(cannot_go_back(source.words()));
        }
        self.is_brought_back(&source).await?;
        let left = self.job.agents().leave_aside(host, self.job.step()).await;
        let kept = self.left_on(host, left).await.map_err(|error| {
            let is_back = proof::is_back(&source);
            match error.class {
                ErrorClass::Refused => cannot_go_back(format!(
                    "{is_back}, and its agent does not let go of it: {error}"
                )),
                _ => error,
            }
        })?;
        let step = RESTORE;
        data.arrived = source.copy().presence.power_state();
        data.decide(
            step,
            format!(
                "somebody has brought it back by hand ({}), and {dest} has it no more: everything \
                 stays as it is",
                source.words()
            ),
        );
        data.warn(step, kept);
        Ok(())
    }

    /// What an agent left that was to forget the migration. One that knows nothing of it
    /// any more holds nothing.
    async fn left_on(
        &self,
        host: &HostName,
        left: Result<CleanUp, AgentError>,
    ) -> Result<Vec<String>, StepError> {
        let error = match left {
            Ok(left) => return Ok(left.kept),
            Err(error) if error.class == ErrorClass::Refused => error,
            Err(error) => return Err(repeatable(error)),
        };
        let seen = self.job.look_at(host).await?;
        match seen.copy().known.under_way {
            true => Err(agent_error(error)),
            false => Ok(vec![format!(
                "{host} has forgotten what it had of this migration: look for files of the guest \
                 that are left there"
            )]),
        }
    }

    /// The source keeps its copy aside again. One that has all of it aside brought
    /// nothing back: a guest that is defined there is somebody else's doing. Nor did one
    /// that has lost its copy, and never knew that it brought it back.
    async fn undo_restore(&self) -> Result<(), StepError> {
        let here = self.job.look_at(self.job.source()).await?;
        let copy = here.copy();
        if here.is_present() && copy.is_kept_aside() {
            return Ok(());
        }
        let is_idle = !copy.known.under_way && !copy.is_kept_aside();
        if copy.presence == Presence::Absent && is_idle {
            return self.brought_nothing_back().await;
        }
        let aside = self.job.set_aside(None).await;
        aside.map_err(agent_error)
    }

    /// Of a guest that the source has no more: it is not there because it was brought back,
    /// and moved on since.
    async fn brought_nothing_back(&self) -> Result<(), StepError> {
        let (source, dest) = (self.job.source(), self.dest()?);
        let known = self.job.locate(source).await?.known;
        if matches!(known, Known::Ended { how } if how != Ended::NeverBegun) {
            return Err(lost(format!(
                "{source} had brought it back, and has it no more: look for it"
            )));
        }
        self.job.is_on_no_other_node(dest).await.map_err(lost)
    }

    async fn settle(&self, data: &Data) -> Result<(), StepError> {
        let m = &self.job.migration;
        let now_ms = self.job.context.clock.now_ms();
        let (id, host) = (m.instance_uuid, &m.source_host);
        let settled = self
            .job
            .store()
            .settle(self.job.lease, id, host, data.arrived, None, now_ms)
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
        if step == TIDY {
            return self.tidy(data).await;
        }
        let source = self.job.source();
        self.job.settle_late(dest, source, data.arrived, None).await
    }

    /// Removes the files that came to the destination. A guest that somebody has
    /// brought there again, or taken away from there, keeps them.
    async fn tidy(&self, data: &Data) -> Result<(), StepError> {
        let (dest_host, step) = (self.dest()?, self.job.step());
        if data.taken_back {
            let agents = self.job.agents();
            let left = agents.act(dest_host, &ConfirmAtDestination(step)).await;
            let kept = self.left_on(dest_host, left).await?;
            return self.job.note_kept(kept).await;
        }
        let stays = self.job.look_for_it(self.job.source(), dest_host).await?;
        let mut dest = self.job.look_at(dest_host).await?;
        let agents = self.job.agents();
        if data.without_dest
            && let Some(proof) = proof::reverted_before(&stays, &dest)
        {
            let reverted = agents.revert_resize(dest_host, step, &proof).await;
            reverted.map_err(agent_error)?;
            dest = self.job.look_at(dest_host).await?;
        }
        match proof::reverted(&stays, &dest) {
            TakeBack::Redundant(proof) => {
                let tidied = agents.rollback_resize(dest_host, step, &proof).await;
                self.job.cleaned(tidied).await
            }
            TakeBack::Stays(why) => {
                let left = agents.act(dest_host, &ConfirmAtDestination(step)).await;
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

//! Cold migration as a saga: the guest is off while it moves.
//!
//! Until the source is set aside the destination cannot have the guest, and is not
//! asked: one that died keeps nobody's guest off. Undoing goes the same way backwards.
//!
//! What then becomes of the source's copy is another saga's: [`super::confirm`]
//! or [`super::revert`].

use drover_model::{
    api::compute::{
        AbortResize, ColdMemory, ColdPart, ConfirmAtDestination, FileRole, FinishResize,
        FinishRevertResize, GetDefinition, InstanceOnNode, JobState, KnownDisk, Outcome,
        PrepResize, ResizeInstance,
    },
    error::ErrorClass,
    guest::Presence,
    ids::HostName,
    migration::{ColdOptions, EndReason, Migration, MigrationStatus as S},
};
use drover_saga::StepError;
use drover_store::claims::Resources;

use super::{
    job::{ASK_AFTER, Data, Job, agent_error, ended, in_doubt, lost, moved, patient, repeatable},
    journal::{Recorded, Told},
    proof::{self, Seen, TakeBack},
    steps::steps,
};
use crate::survey::Chosen;

/// One cold migration under way.
pub struct ColdMigrate {
    job: Job,
    options: ColdOptions,
}

steps! { ColdMigrate |it, data| until { it.job.interrupted() }
    // What can fail slowly (checks, room, base images that differ) comes before the guest is
    // asked to stop.
    PLACE = "place" [Accepted, Checking]
        { it.place(data) }
        undo { it.job.release_claim() };
    // Destination: empty files for what will come, door open.
    PREPARE = "prepare" [PreMigrating, Preparing]
        tells "instance.resize_prep.start" then "instance.resize_prep.end"
        { it.prepare(data) }
        undo { it.undo_prepare(data) };
    // Source: sends, or compares, what can go while the guest runs.
    PRE_COPY = "pre_copy" [_, Preparing]
        { it.pre_copy(data) }
        undo { it.restore(data, false) };
    STOP = "stop" [Migrating, Stopping]
        tells "instance.resize.start"
        { it.stop(data) }
        undo { it.restore(data, true) };
    // Source: sends disks and definition; every byte is verified.
    COPY = "copy" [_, Disk]
        { it.work(ColdPart::Copy, data) }
        undo { it.undo_copy() };
    // Before the destination defines the guest: at no moment could two nodes start it
    // (invariant 1). It is undone with `stop`: the guest is started again on the source only
    // after the destination has taken its definition back. Short, and better ended than left
    // half done; so is the next.
    SET_ASIDE = "set_aside" [PostMigrating, Finishing, is_whole]
        then "instance.resize.end"
        { it.set_aside(data) };
    // Destination: defines the guest, starts it if it ran. The point of no return: the guest
    // was seen there. Trouble with the record says nothing of the guest.
    FINISH = "finish" [_, Finishing, commits, is_whole]
        tells "instance.resize_finish.start" then "instance.resize_finish.end"
        { async { it.finish(data).await.map_err(in_doubt) } }
        undo { it.undo_finish(data) };
    // Record and claim follow the guest; room for a way back stays claimed.
    SETTLE = "settle" [_, Finishing]
        { it.settle(data) };
}

impl Recorded for ColdMigrate {
    fn told_at_failure() -> Told {
        Told::error("instance.resize.error")
    }

    fn told_at_end(status: S) -> Vec<Told> {
        match status {
            S::Failed => vec![Told::error("compute_task.migrate_server.error")],
            _ => Vec::new(),
        }
    }

    fn status_after(_: &Migration) -> S {
        S::Finished
    }
}

impl ColdMigrate {
    /// The saga of a cold migration on the record.
    pub(super) fn new(job: Job, options: ColdOptions) -> Self {
        Self { job, options }
    }

    // ---- before anything happens to the guest

    async fn place(&self, data: &mut Data) -> Result<(), StepError> {
        let (chosen, why) = self.job.place().await?;
        let name = PLACE;
        for text in why {
            data.decide(name, text);
        }
        for text in what_moves(&chosen, &self.options) {
            data.decide(name, text);
        }
        data.chosen = Some(chosen);
        let (source, id) = (self.job.source(), self.job.migration.instance_uuid);
        let kept = self
            .job
            .agents()
            .ask(source, &GetDefinition(InstanceOnNode { instance: id }))
            .await;
        data.domain = Some(kept.map_err(repeatable)?.domain);
        Ok(())
    }

    async fn prepare(&self, data: &mut Data) -> Result<(), StepError> {
        let chosen = data.chosen()?;
        let ask = PrepResize {
            migration: self.job.migration.uuid,
            instance: self.job.migration.instance_uuid,
            files: chosen.files.clone(),
        };
        let prepared = self.job.agents().act(&chosen.host, &ask).await;
        data.inbox = Some(prepared.map_err(repeatable)?);
        Ok(())
    }

    async fn pre_copy(&self, data: &mut Data) -> Result<(), StepError> {
        let files = &data.chosen()?.files;
        let can_go = |role| matches!(role, FileRole::Backing | FileRole::Delta);
        match files.iter().any(|file| can_go(file.role)) {
            true => self.work(ColdPart::PreCopy, data).await,
            false => Ok(()),
        }
    }

    // ---- the guest is off

    async fn stop(&self, data: &mut Data) -> Result<(), StepError> {
        if !was_running(data.chosen()?) {
            return Ok(());
        }
        self.work(ColdPart::Stop, data).await?;
        data.stopped_at_ms = Some(self.job.context.clock.now_ms());
        Ok(())
    }

    /// Has the source do a part of its work, or finds it at it, and waits for the end.
    async fn work(&self, part: ColdPart, data: &Data) -> Result<(), StepError> {
        let chosen = data.chosen()?;
        let missing = || StepError::new(ErrorClass::Bug, "no inbox was journalled");
        let ask = ResizeInstance {
            migration: self.job.migration.uuid,
            instance: self.job.migration.instance_uuid,
            part,
            dest_address: chosen.endpoint.address.clone(),
            inbox: data.inbox.clone().ok_or_else(missing)?,
            files: chosen.files.clone(),
            domain: match chosen.files.iter().any(|file| file.over.is_some()) {
                true => data.domain.clone(),
                false => None,
            },
            disks: Some(KnownDisk::of(&chosen.guest)),
            options: self.options.clone(),
        };
        let mut changes = self.job.store().changes();
        loop {
            let job = self.job.agents().ask(self.job.source(), &ask).await;
            match job.map_err(patient)? {
                JobState::Ended { outcome, .. } => return judge(outcome),
                JobState::Running { .. } | JobState::Unknown => {}
            }
            tokio::select! {
                biased;
                () = self.job.changed(&mut changes) => {}
                () = tokio::time::sleep(ASK_AFTER) => {}
            }
        }
    }

    async fn set_aside(&self, data: &mut Data) -> Result<(), StepError> {
        let here = self.job.look_at(self.job.source()).await;
        let here = here.map_err(in_doubt)?;
        let memory = self.memory(&here, data, DestMay::LackIt).await?;
        self.job.set_aside(memory).await.map_err(patient)?;
        data.handed_over = true;
        Ok(())
    }

    /// What a source is told whose agent knows nothing of the migration any more: none
    /// of a guest that somebody has taken elsewhere. What is on no node lies on the
    /// source, in whatever state the agent had it when it forgot.
    async fn memory(
        &self,
        here: &Seen,
        data: &Data,
        dest_may: DestMay,
    ) -> Result<Option<ColdMemory>, StepError> {
        let (Some(domain), Some(chosen)) = (&data.domain, &data.chosen) else {
            return Ok(None);
        };
        let knows = here.copy().known.under_way;
        if knows || (!here.is_present() && self.is_elsewhere(chosen, dest_may).await?) {
            return Ok(None);
        }
        Ok(Some(ColdMemory {
            files: chosen.files.clone(),
            domain: domain.clone(),
        }))
    }

    async fn is_elsewhere(&self, chosen: &Chosen, dest_may: DestMay) -> Result<bool, StepError> {
        let dest = self.job.presence_unless_dead(&chosen.host).await;
        let dest = dest.map_err(in_doubt)?;
        let has_it = match dest_may {
            DestMay::LackIt => dest != Presence::Absent,
            DestMay::HaveItOff => dest.has_qemu(),
        };
        if has_it {
            return Ok(true);
        }
        let elsewhere = self.job.elsewhere(&chosen.host).await;
        elsewhere.map(|found| found.is_some()).map_err(|silent| {
            let source = self.job.source();
            lost(format!(
                "the agent of {source} has lost its journal, the guest is not there, and {silent}"
            ))
        })
    }

    async fn finish(&self, data: &mut Data) -> Result<(), StepError> {
        let chosen = data.chosen()?.clone();
        let start = was_running(&chosen);
        let dead = self.job.is_dead(&chosen.host).await;
        if let Some(dead) = dead.map_err(|error| lost(error.message))? {
            return Err(self.died_with_it(dead).await?);
        }
        self.take_back_word().await?;
        self.is_gone_from_source(&chosen.host).await?;
        if let Some(message) = self.job.on_third_node(&chosen.host).await? {
            let there = self.job.locate(&chosen.host).await.map_err(in_doubt)?;
            // An earlier try may have started it.
            if !there.presence.is_active() {
                return Err(ended(EndReason::Failed { message }));
            }
        }
        let ask = FinishResize {
            migration: self.job.migration.uuid,
            instance: self.job.migration.instance_uuid,
            start,
            flavor: self.options.flavor,
            checked: Some(chosen.checked.clone()),
        };
        let finished = self.job.agents().act(&chosen.host, &ask).await;
        let presence = match finished {
            Ok(location) => location.presence,
            // Whatever was said, where the guest is decides (invariant 9).
            Err(error) => match self.job.look_at(&chosen.host).await {
                Ok(seen) if seen.is_active() => seen.copy().presence,
                // It may have run there: it is asked for again.
                Ok(seen) if seen.copy().known.ran_here => return Err(lost(error.message)),
                Ok(_) if error.class == ErrorClass::Refused => return Err(agent_error(error)),
                Ok(_) | Err(_) => return Err(patient(error)),
            },
        };
        data.arrived = presence.power_state();
        match presence {
            Presence::Present(state) if start && !state.is_active() => {
                let words = format!("it was started on {}, and is off again", chosen.host);
                data.warn(FINISH, vec![words]);
            }
            Presence::Present(_) => {}
            // Somebody took away what had come: nothing is undone on a guess.
            _ => {
                return Err(lost(format!(
                    "the guest came to {} and is not there any more: {presence}",
                    chosen.host
                )));
            }
        }
        let now_ms = self.job.context.clock.now_ms();
        data.downtime_ms = data.stopped_at_ms.map(|at| now_ms.saturating_sub(at));
        Ok(())
    }

    /// A word that was given while the destination was dead holds for that death alone.
    async fn take_back_word(&self) -> Result<(), StepError> {
        let change = |m: &mut Migration| std::mem::take(&mut m.given_up);
        let taken = self
            .job
            .store()
            .update_migration(self.job.lease.migration, change);
        let taken = taken.await;
        taken.map(drop).map_err(|e| super::job::store_error(&e))
    }

    /// A destination that died may have started the guest, which may have written what
    /// its source has not: only people can say that it goes back without that.
    async fn died_with_it(&self, dead: String) -> Result<StepError, StepError> {
        if self.was_given_up().await? {
            return Ok(ended(EndReason::Aborted));
        }
        let (source, id) = (self.job.source(), self.job.migration.id);
        Ok(lost(format!(
            "{dead}: what the guest has written there, if it was started, is there alone; 'drover \
             migration abort {id}' has it back on {source} without that"
        )))
    }

    /// Proof that it runs nowhere else: the source says so now, or has been proven dead
    /// since it set its copy aside. Of one that was started nothing is to be proven.
    async fn is_gone_from_source(&self, dest: &HostName) -> Result<(), StepError> {
        let source = self.job.source();
        let here = match self.job.locate(source).await {
            Ok(here) => here,
            Err(error) => {
                let there = self.job.look_at(dest).await;
                let runs = there.is_ok_and(|there| there.is_active());
                return match runs || self.job.is_dead(source).await?.is_some() {
                    true => Ok(()),
                    false => Err(in_doubt(error)),
                };
            }
        };
        match here.presence {
            Presence::Absent => Ok(()),
            other => Err(ended(EndReason::Failed {
                message: format!(
                    "the guest is on {source} again ({other:?}): not started on {dest}"
                ),
            })),
        }
    }

    async fn settle(&self, data: &mut Data) -> Result<(), StepError> {
        data.domain = None;
        let chosen = data.chosen()?;
        let keep = kept_for_a_way_back(chosen);
        let m = &self.job.migration;
        let now_ms = self.job.context.clock.now_ms();
        let settled = self.job.store().settle(
            self.job.lease,
            m.instance_uuid,
            &chosen.host,
            data.arrived,
            Some((&m.source_host, keep)),
            now_ms,
        );
        settled.await.map_err(|e| super::job::store_error(&e))?;
        let definitions = &self.job.context.definitions;
        definitions.moved(m.instance_uuid, &chosen.host);
        let (source, name) = (&m.source_host, &m.instance_name);
        data.decide(
            SETTLE,
            format!(
                "{source} keeps its copy aside until 'drover instance confirm {name}' or \
                 'drover instance revert {name}'"
            ),
        );
        Ok(())
    }

    // ---- undoing

    /// The source stops sending.
    async fn undo_copy(&self) -> Result<(), StepError> {
        let (source, step) = (self.job.source(), self.job.step());
        let aborted = self.job.agents().act(source, &AbortResize(step)).await;
        aborted.map_err(agent_error)
    }

    /// The destination has no definition of it any more. One that is proven dead runs
    /// nothing, and is tidied when it is up again. If it is up again by now, and had
    /// started the guest before it died, the word that was given holds.
    async fn undo_finish(&self, data: &Data) -> Result<(), StepError> {
        let dest = &data.chosen()?.host;
        if self.job.is_dead(dest).await?.is_some() {
            return Ok(());
        }
        if data.handed_over {
            self.remind(data).await?;
        }
        match self.take_back(dest).await? {
            Taken::All => Ok(()),
            Taken::Nothing { why, .. } => {
                match self.was_given_up().await? && self.is_off_there(dest).await? {
                    true => Ok(()),
                    false => Err(lost(why)),
                }
            }
        }
    }

    async fn was_given_up(&self) -> Result<bool, StepError> {
        let record = self.job.record().await;
        Ok(record.map_err(|e| super::job::store_error(&e))?.given_up)
    }

    async fn is_off_there(&self, dest: &HostName) -> Result<bool, StepError> {
        let there = self.job.locate(dest).await?.presence;
        Ok(!there.is_active() && there != Presence::Incoming)
    }

    async fn undo_prepare(&self, data: &Data) -> Result<(), StepError> {
        let Some(chosen) = &data.chosen else {
            return Ok(());
        };
        let step = PREPARE;
        if data.handed_over {
            // The guest is on its source by now, and waits for nothing that is left here.
            return match self.take_back_late(&chosen.host).await {
                Err(error) if error.class != ErrorClass::Fenced => {
                    self.job.put_off(&chosen.host, step, &error.message).await
                }
                taken_back => taken_back,
            };
        }
        match self.take_back(&chosen.host).await {
            Ok(Taken::All) => Ok(()),
            Ok(Taken::Nothing { why, .. }) => self.job.put_off(&chosen.host, step, &why).await,
            Err(error) => self.job.or_put_off(&chosen.host, step, Err(error)).await,
        }
    }

    /// Takes back what was made on the destination, if the nodes' answers prove that
    /// another copy stays (invariant 11): on the source, aside there, or where the
    /// guest has moved since.
    async fn take_back(&self, dest_host: &HostName) -> Result<Taken, StepError> {
        let stays = self.job.look_for_it(self.job.source(), dest_host).await?;
        let dest = self.job.look_at(dest_host).await?;
        let moved_on = self.job.has_moved_on().await?;
        match proof::cold_destination(&stays, &dest, moved_on) {
            TakeBack::Redundant(proof) => {
                let (agents, step) = (self.job.agents(), self.job.step());
                let undone = agents.rollback_resize(dest_host, step, &proof).await;
                self.job.cleaned(undone).await?;
                if dest.is_present() && !dest.copy().known.under_way {
                    let left = format!(
                        "{dest_host} knows nothing of it any more (did its agent lose its \
                         state?): its definition is left there"
                    );
                    self.job.note_kept(vec![left]).await?;
                }
                Ok(Taken::All)
            }
            TakeBack::Stays(why) => Ok(Taken::Nothing { why, ever: true }),
            TakeBack::Unproven(why) => Ok(Taken::Nothing { why, ever: false }),
        }
    }

    /// A source that has lost its journal since is told what lies aside there.
    async fn remind(&self, data: &Data) -> Result<(), StepError> {
        let here = self.job.look_at(self.job.source()).await?;
        if here.is_present() {
            return Ok(());
        }
        match self.memory(&here, data, DestMay::HaveItOff).await? {
            None => Ok(()),
            memory => self.job.set_aside(memory).await.map_err(patient),
        }
    }

    /// Takes it back once the guest is where it stays. What came is the guest's for good
    /// where it is too, or ran.
    async fn take_back_late(&self, dest_host: &HostName) -> Result<(), StepError> {
        match self.take_back(dest_host).await? {
            Taken::All => Ok(()),
            Taken::Nothing { why, ever: false } => Err(lost(why)),
            Taken::Nothing { why, ever: true } => {
                let (agents, step) = (self.job.agents(), self.job.step());
                let left = agents.act(dest_host, &ConfirmAtDestination(step)).await;
                let mut kept = left.map_err(agent_error)?.kept;
                kept.push(format!("{why}: what came there is not removed"));
                self.job.note_kept(kept).await
            }
        }
    }

    /// Does again what was put off. The world may have changed since, so it is looked
    /// at anew. A guest that somebody defined there meanwhile keeps what it has.
    pub(super) async fn tidy_again(
        &self,
        step: &str,
        dest: &HostName,
        data: &Data,
    ) -> Result<(), StepError> {
        if step == PREPARE {
            return self.take_back_late(dest).await;
        }
        let keep = Some((self.job.source(), kept_for_a_way_back(data.chosen()?)));
        let settled = self
            .job
            .settle_late(self.job.source(), dest, data.arrived, keep);
        settled.await
    }

    /// The guest is on the source as it was.
    async fn restore(&self, data: &Data, was_stopped: bool) -> Result<(), StepError> {
        let Some(chosen) = &data.chosen else {
            return Ok(());
        };
        let is_elsewhere = self.job.on_third_node(&chosen.host).await?.is_some();
        let here = self.job.look_at(self.job.source()).await?;
        // A record that a database has lost the end of says less than the source.
        let handed_over = data.handed_over || here.was_set_aside();
        let dest = &chosen.host;
        if handed_over
            && !is_elsewhere
            && !self.job.is_gone(dest).await?
            && !self.is_off_there(dest).await?
        {
            return Err(lost(format!(
                "{dest} has the guest: it is not brought back to {}",
                self.job.source()
            )));
        }
        let dest_may = match handed_over {
            true => DestMay::HaveItOff,
            false => DestMay::LackIt,
        };
        let ask = FinishRevertResize {
            migration: self.job.migration.uuid,
            instance: self.job.migration.instance_uuid,
            runs_nowhere_else: !is_elsewhere,
            ran: was_stopped && was_running(chosen),
            memory: self.memory(&here, data, dest_may).await?,
            is_elsewhere,
        };
        let restored = self.job.agents().act(self.job.source(), &ask).await;
        let there = restored.map_err(agent_error)?.presence;
        match handed_over && !matches!(there, Presence::Present(_)) {
            false => Ok(()),
            true => Err(lost(format!(
                "{} no longer has the guest that it had set aside ({there})",
                self.job.source()
            ))),
        }
    }
}

/// What was taken back of what was made on a destination.
enum Taken {
    All,
    /// Nothing: `ever` if it is the guest's there for good.
    Nothing {
        why: String,
        ever: bool,
    },
}

/// What the destination may have of a guest that is to lie aside on its source.
#[derive(Debug, Clone, Copy)]
enum DestMay {
    /// No domain.
    LackIt,
    /// The one that this migration defined, and did not start.
    HaveItOff,
}

/// What the guest held on the source stays promised to it.
fn kept_for_a_way_back(chosen: &Chosen) -> Resources {
    let active = u64::from(was_running(chosen));
    Resources {
        vcpus: u64::from(chosen.guest.vcpus) * active,
        memory_mib: chosen.guest.memory_mib * active,
        disk_bytes: 0,
    }
}

/// Whether the guest ran when it was looked at, and so is to run in the end.
pub(super) fn was_running(chosen: &Chosen) -> bool {
    chosen.guest.power_state.is_active()
}

fn judge(outcome: Outcome) -> Result<(), StepError> {
    moved(outcome).map(drop).map_err(ended)
}

/// What is carried and what is not, in words.
fn what_moves(chosen: &Chosen, options: &ColdOptions) -> Vec<String> {
    let mut texts = Vec::new();
    let names = |present| {
        let files = chosen.files.iter().filter(|f| f.over.is_none());
        let files = files.filter(|f| f.present == present);
        files.map(|f| f.path.as_str()).collect::<Vec<_>>()
    };
    let (carried, compared) = (names(false), names(true));
    texts.push(match was_running(chosen) {
        true => "the guest runs: it is shut down, and started on the destination".to_owned(),
        false => "the guest is off, and stays off".to_owned(),
    });
    if !carried.is_empty() {
        texts.push(format!("carries {}", carried.join(", ")));
    }
    if !compared.is_empty() {
        texts.push(format!(
            "{} has images of the same names, which are compared and not copied: {}",
            chosen.host,
            compared.join(", ")
        ));
    }
    if !chosen.shared_disks.is_empty() {
        texts.push(format!(
            "disks are shared by both nodes, nothing to copy: {}",
            chosen.shared_disks.join(", ")
        ));
    }
    let frozen = chosen.files.iter().filter_map(|f| f.over.as_ref());
    let frozen: Vec<&str> = frozen.map(|over| over.target.as_str()).collect();
    if !frozen.is_empty() {
        texts.push(format!(
            "copied while the guest runs, then what it wrote since: {}",
            frozen.join(", ")
        ));
    } else if options.pre_copy {
        texts.push("there is nothing to copy beforehand".to_owned());
    }
    if let Some(flavor) = options.flavor {
        let (vcpus, memory_mb) = (flavor.vcpus, flavor.memory_mb);
        texts.push(format!("resized to {vcpus} vCPUs and {memory_mb} MiB"));
    }
    texts
}

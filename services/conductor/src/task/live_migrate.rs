//! Live migration as a saga.
//!
//! `transfer` never fails on a guess (invariants 2 and 3). Whatever the source
//! says of the job's end, or if it says nothing, both nodes are asked where the
//! guest is; while that cannot be told the step is *lost*, not failed, and nothing
//! is undone. Of a source that is proven off (an evacuation has the proof) nothing is
//! asked: its guest runs there no more, and what it would have to say or to forget is
//! put off until it is back.

use std::time::Duration;

use drover_model::{
    api::compute::{
        Abort, CleanUp, CopyHistory, ForceComplete, GetJob, GuestLocation, JobState, Known,
        KnownDisk, LiveMigration, Outcome, PostAtDestination, PreLiveMigration, RollbackAtSource,
    },
    error::ErrorClass,
    guest::{PowerState, Presence},
    ids::HostName,
    migration::{EndReason, LiveOptions, Migration, MigrationStatus as S, Phase},
};
use drover_saga::StepError;
use drover_store::operations::{Turn, TurnLimits};
use tokio::time::timeout;
use tracing::{info, warn};

use super::{
    job::{ASK_AFTER, Data, Job, agent_error, ended, lost, moved, repeatable, store_error},
    journal::{Recorded, Told},
    proof::{self, TakeBack},
    steps::steps,
};
use crate::{agent_client::AgentError, plan::schedule::Limits, survey::Chosen};

/// Pause between two looks for a guest that changes sides right now.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// How long to look before the step counts as lost.
const LOOK_FOR: Duration = Duration::from_secs(60);

/// One live migration under way.
pub struct LiveMigrate {
    job: Job,
    options: LiveOptions,
}

steps! { LiveMigrate |it, data| until { it.job.interrupted() }
    // Checks both nodes, chooses a destination. The claim comes before anything is made there:
    // two guests never prepare for the same room.
    PLACE = "place" [Accepted, Checking]
        { it.place(data) }
        undo { it.job.release_claim() };
    // Destination: makes the disks to be copied, as libvirt copies into what is there.
    PREPARE = "prepare" [Preparing, Preparing]
        tells "instance.live_migration_pre.start" then "instance.live_migration_pre.end"
        { it.prepare(data) }
        undo { it.undo_prepare(data) };
    // Many destinations are made ready while few sources send. A saga that is taken up again
    // keeps the turn that it has.
    TURN = "turn" [Preparing, Waiting]
        { it.turn(data) }
        undo { it.end_turn() };
    // Source: libvirt sends disks and memory, and the guest switches over. The point of no
    // return: the guest was seen on the destination. An abort is handed on to libvirt, and it
    // is seen what comes of it.
    TRANSFER = "transfer" [Running, Waiting, commits, is_whole]
        { it.transfer(data) }
        undo { it.undo_transfer() };
    // The record follows the guest before the source is tidied: at no moment does it name a
    // node whose disks are gone.
    SETTLE = "settle" [_, Finishing]
        tells "instance.live_migration_post.start" then "instance.live_migration_post_dest.end"
        { it.settle(data) };
    // Source: removes the disks that were copied away.
    TIDY = "tidy" [_, Finishing]
        { it.tidy(data) };
}

impl Recorded for LiveMigrate {
    fn status_after(_: &Migration) -> S {
        S::Completed
    }

    fn told_at_end(status: S) -> Vec<Told> {
        let rolled_back = Told::info("instance.live_migration_rollback.end");
        match status {
            S::Completed => vec![Told::info("instance.live_migration_post.end")],
            S::Failed => vec![
                rolled_back,
                Told::error("compute_task.migrate_server.error"),
            ],
            _ => vec![rolled_back, Told::info("instance.live_migration_abort.end")],
        }
    }

    fn told_at_failure() -> Told {
        Told::info("instance.live_migration_rollback.start")
    }
}

impl LiveMigrate {
    /// The saga of a live migration on the record.
    pub(super) fn new(job: Job, options: LiveOptions) -> Self {
        Self { job, options }
    }

    // ---- place

    async fn place(&self, data: &mut Data) -> Result<(), StepError> {
        let (chosen, why) = self.job.place().await?;
        for text in why {
            data.decide("place", text);
        }
        data.decide("place", what_moves(&chosen));
        data.chosen = Some(chosen);
        Ok(())
    }

    // ---- prepare

    async fn prepare(&self, data: &mut Data) -> Result<(), StepError> {
        let chosen = data.chosen()?;
        let ask = PreLiveMigration {
            migration: self.job.migration.uuid,
            guest: chosen.guest.clone(),
            copied_disks: chosen.copied_disks.clone(),
            checked: chosen.checked.clone(),
        };
        let prepared = self.job.agents().act(&chosen.host, &ask).await;
        prepared.map_err(repeatable)
    }

    async fn undo_prepare(&self, data: &Data) -> Result<(), StepError> {
        let Some(chosen) = &data.chosen else {
            return Ok(());
        };
        let step = PREPARE;
        if let Some(dead) = self.job.is_dead(self.job.source()).await? {
            return self.without_survivor(chosen, &dead).await;
        }
        match self.take_back(&chosen.host).await {
            Ok(None) => Ok(()),
            Ok(Some(unproven)) => self.job.put_off(&chosen.host, step, &unproven).await,
            Err(error) => self.job.or_put_off(&chosen.host, step, Err(error)).await,
        }
    }

    /// Its source is dead, and nobody shows a copy that would stay: nothing is removed
    /// for now. A destination at which nothing was made is free at once, as the guest
    /// may be evacuated to it.
    async fn without_survivor(&self, chosen: &Chosen, dead: &str) -> Result<(), StepError> {
        let host = &chosen.host;
        if chosen.copied_disks.is_empty() && self.lets_go(host).await.is_ok() {
            return Ok(());
        }
        let why = format!("{dead}: what was made on {host} is taken back when that is up again");
        self.job.put_off(host, PREPARE, &why).await
    }

    /// Has a destination forget of a guest that never came.
    async fn lets_go(&self, host: &HostName) -> Result<(), StepError> {
        let dest = self.job.look_at(host).await?;
        if dest.copy().presence != Presence::Absent || dest.copy().known.ran_here {
            return Err(lost(dest.words()));
        }
        let post = PostAtDestination(self.job.step());
        let left = self.job.agents().act(host, &post).await;
        self.job.note_kept(left.map_err(agent_error)?.kept).await
    }

    /// Takes back what was made on the destination, if both nodes' answers prove that
    /// nobody needs it (invariant 11). A guest that is or was there keeps it. Says
    /// what is not proven.
    async fn take_back(&self, dest_host: &HostName) -> Result<Option<String>, StepError> {
        let source_host = &self.job.migration.source_host;
        let source = self.job.look_at(source_host).await?;
        let dest = self.job.look_at(dest_host).await?;
        let stays = match source.is_present() {
            true => source.clone(),
            false => self.job.look_for_it(source_host, dest_host).await?,
        };
        let (agents, step) = (self.job.agents(), self.job.step());
        let moved_on = self.job.has_moved_on().await?;
        match proof::live_destination(&source, &stays, &dest, moved_on) {
            TakeBack::Redundant(proof) => {
                let undone = agents.rollback_at_destination(dest_host, step, &proof);
                self.job.cleaned(undone.await).await?;
                Ok(None)
            }
            TakeBack::Stays(why) => {
                let left = agents.act(dest_host, &PostAtDestination(step)).await;
                let left = left.map_err(agent_error)?;
                warn!(migration = %self.job.migration.uuid, why, "nothing is taken back");
                let words = format!("{why}: what was made there is not taken back");
                let kept = std::iter::once(words).chain(left.kept);
                self.job.note_kept(kept.collect()).await?;
                Ok(None)
            }
            TakeBack::Unproven(why) => Ok(Some(why)),
        }
    }

    // ---- turn

    /// Waits until few enough others send, and says meanwhile what it waits for. The
    /// destination looks once more, then, at the files that were compared.
    async fn turn(&self, data: &mut Data) -> Result<(), StepError> {
        let has_waited = self.wait_for_turn().await?;
        match has_waited && !data.chosen()?.checked.is_empty() {
            true => self.prepare(data).await,
            false => Ok(()),
        }
    }

    async fn wait_for_turn(&self) -> Result<bool, StepError> {
        let store = self.job.store();
        let id = self.job.migration.uuid;
        let mut noted = None;
        loop {
            let mut given_back = store.turns();
            let turn = store
                .take_turn(id, turn_limits(self.job.context.limits))
                .await;
            let why = match turn.map_err(|e| store_error(&e))? {
                Turn::Go => None,
                Turn::Wait { why } => Some(format!("waits for its turn: {why}")),
            };
            if why.is_some() {
                // Others are made ready meanwhile.
                self.job.slot.give_back();
            }
            if noted != why {
                let noting = store.update_driven(self.job.lease, |m| {
                    let changes = m.progress.note != why;
                    m.progress.note.clone_from(&why);
                    changes
                });
                noting.await.map_err(|e| store_error(&e))?;
            }
            if why.is_none() {
                return Ok(noted.is_some());
            }
            noted = why;
            // Another conductor may give a turn back: look now and then.
            let _ = timeout(ASK_AFTER, given_back.changed()).await;
        }
    }

    async fn end_turn(&self) -> Result<(), StepError> {
        let ended = self.job.store().end_turn(self.job.migration.uuid).await;
        ended.map_err(|e| store_error(&e))
    }

    // ---- transfer

    async fn transfer(&self, data: &mut Data) -> Result<(), StepError> {
        let chosen = data.chosen()?.clone();
        let mut moved_away = false;
        let heard = match self.watch(&chosen).await {
            Ok(outcome) => {
                info!(migration = %self.job.migration.uuid, ?outcome, "the transfer ended");
                if let Outcome::Moved { downtime_ms, .. } = &outcome {
                    moved_away = true;
                    data.downtime_ms = *downtime_ms;
                }
                self.verdict(&chosen, outcome).await
            }
            Err(unheard) => Err(unheard),
        };
        let noted = match heard {
            Err(unheard) if unheard.class == ErrorClass::Lost => {
                self.unheard(&chosen, moved_away, unheard).await?
            }
            heard => heard?,
        };
        data.warn(TRANSFER, noted);
        Ok(())
    }

    /// The source does not say how it ended, perhaps never will. A guest that runs on
    /// the destination has moved all the same; else a proof that the source is off
    /// stands for its answer, and without one nothing is known. Of two nodes that are
    /// off neither runs it.
    ///
    /// Says what is to be noted about a guest that has moved.
    async fn unheard(
        &self,
        chosen: &Chosen,
        moved_away: bool,
        unheard: StepError,
    ) -> Result<Vec<String>, StepError> {
        let host = &chosen.host;
        let dead = self.job.is_dead(self.job.source()).await?;
        let Ok(dest) = self.job.look_at(host).await else {
            let neither = dead.zip(self.job.is_dead(host).await?);
            return Err(neither.map_or(unheard, |(source, dest)| {
                let message = format!("{source}, and {dest}");
                ended(EndReason::Failed { message })
            }));
        };
        let at_dest = GuestLocation::seen(dest.copy().presence);
        let runs_there = at_dest.presence == Presence::Present(PowerState::Running);
        let at_source = match dead {
            Some(_) => Some(GuestLocation::seen(Presence::Absent)),
            None if runs_there => self.job.locate(self.job.source()).await.ok(),
            None => return Err(unheard),
        };
        let told = ToldBy {
            moved_away,
            ran_there: dest.copy().known.ran_here,
        };
        let verdict = judge(at_source.as_ref(), Some(&at_dest), told);
        info!(migration = %self.job.migration.uuid, %unheard, ?verdict, "the destination alone was asked");
        match (verdict, dead) {
            (Verdict::Moved, _) => Ok(moved_how(host, Some(&at_dest), false)),
            // It runs nowhere, and nothing is left that could bring it there.
            (Verdict::Unknown, Some(dead)) if at_dest.presence == Presence::Absent => {
                Err(ended(EndReason::Failed {
                    message: format!("{dead}, and the guest never came to {host}"),
                }))
            }
            _ => Err(unheard),
        }
    }

    /// Has the source start, or finds it started, and waits for the end.
    async fn watch(&self, chosen: &Chosen) -> Result<Outcome, StepError> {
        let agents = self.job.agents();
        let source = &self.job.migration.source_host;
        let mut changes = self.job.store().changes();
        if let Some(outcome) = self.outcome().await? {
            return Ok(outcome);
        }
        if let Some(outcome) = self.handed_over(chosen).await? {
            return Ok(outcome);
        }
        let mut ask = LiveMigration {
            migration: self.job.migration.uuid,
            instance: self.job.migration.instance_uuid,
            dest_host: chosen.host.clone(),
            destination: chosen.endpoint.clone(),
            copied_disks: chosen.copied_disks.clone(),
            shared_disks: chosen.shared_disks.clone(),
            checked: Some(chosen.checked_at_source.clone()),
            attach: false,
            disks: Some(KnownDisk::of(&chosen.guest)),
            options: self.options.clone(),
        };
        let mut started = agents.ask(source, &ask).await;
        let is_refused = started
            .as_ref()
            .is_err_and(|e| e.class == ErrorClass::Refused);
        if is_refused && self.is_sent_unwatched(chosen).await {
            ask.attach = true;
            started = agents.ask(source, &ask).await;
        }
        match started {
            Ok(JobState::Ended { outcome, .. }) => return Ok(outcome),
            Ok(_) => {}
            Err(e) if e.class == ErrorClass::Refused => {
                return Ok(Outcome::Failed { message: e.message });
            }
            Err(e) => return Err(lost(e.message)),
        }
        let mut asked = Asked::default();
        loop {
            self.pass_on_wishes(&mut asked).await;
            let silent = tokio::select! {
                biased;
                () = self.job.changed(&mut changes) => false,
                () = tokio::time::sleep(ASK_AFTER) => true,
            };
            if let Some(outcome) = self.outcome().await? {
                return Ok(outcome);
            }
            if silent {
                match agents.ask(source, &GetJob(self.job.step())).await {
                    Ok(JobState::Ended { outcome, .. }) => return Ok(outcome),
                    Ok(JobState::Running { .. }) => {}
                    // Where the guest is will tell what became of it.
                    Ok(JobState::Unknown) => {
                        let message = format!("{source} no longer knows of this migration");
                        return Ok(Outcome::Failed { message });
                    }
                    Err(e) => return Err(lost(e.message)),
                }
            }
        }
    }

    /// A destination that has the guest got it by an earlier try, which its source may
    /// have forgotten: nothing is sent over it.
    async fn handed_over(&self, chosen: &Chosen) -> Result<Option<Outcome>, StepError> {
        let there = self.job.locate(&chosen.host).await;
        let has_it = |there: &GuestLocation| matches!(there.presence, Presence::Present(_));
        if there.as_ref().is_ok_and(|there| !has_it(there)) {
            return Ok(None);
        }
        let ask = GetJob(self.job.step());
        let job = self.job.agents().ask(self.job.source(), &ask).await;
        match (job, there) {
            (Ok(JobState::Ended { outcome, .. }), _) => Ok(Some(outcome)),
            (Ok(JobState::Running { .. }), _) => Ok(None),
            (Ok(JobState::Unknown), Ok(there)) => {
                let message = format!("{} has the guest: {}", chosen.host, there.presence);
                Ok(Some(Outcome::Failed { message }))
            }
            (Ok(JobState::Unknown), Err(error)) => match self.job.agent_is_up(&chosen.host).await {
                // It is asked again soon.
                Ok(true) | Err(_) => Err(lost(error.message)),
                // Nothing is sent to one that is silent, and where the guest is decides.
                Ok(false) => {
                    let message = error.message;
                    Ok(Some(Outcome::Failed { message }))
                }
            },
            (Err(error), _) => Err(lost(error.message)),
        }
    }

    /// libvirt sends the guest and it is arriving, and the source's agent knows nothing
    /// of that: it has lost its journal.
    async fn is_sent_unwatched(&self, chosen: &Chosen) -> bool {
        let source = self.job.locate(&self.job.migration.source_host).await;
        let dest = self.job.locate(&chosen.host).await;
        let forgotten = source.is_ok_and(|l| l.migrating && l.known == Known::Nothing);
        forgotten && dest.is_ok_and(|l| l.presence == Presence::Incoming)
    }

    async fn outcome(&self) -> Result<Option<Outcome>, StepError> {
        let outcome = self.job.store().outcome(self.job.lease.migration).await;
        outcome.map_err(|e| lost(e.to_string()))
    }

    /// Hands on an abort or a force-complete, each once it was taken; gives the turn
    /// back to whoever waits.
    async fn pass_on_wishes(&self, asked: &mut Asked) {
        let Ok(record) = self.job.record().await else {
            return;
        };
        let source = &self.job.migration.source_host;
        if record.abort_requested && !asked.abort {
            asked.abort = taken(
                "abort",
                self.job.agents().ask(source, &Abort(self.job.step())).await,
            );
        }
        // What is left is the last, but for a guest that was stopped with much left to
        // send. libvirt takes seconds to end it, in which others can send.
        let is_last =
            record.progress.phase == Phase::SwitchOver && !record.force_complete_requested;
        if is_last && !asked.turn_ended {
            asked.turn_ended = self.end_turn().await.is_ok();
        }
        if record.force_complete_requested && !asked.force {
            let forced = self
                .job
                .agents()
                .ask(source, &ForceComplete(self.job.step()))
                .await;
            asked.force = taken("force-complete", forced);
        }
    }

    /// Where the guest is, whatever was said of the job.
    ///
    /// Says what is to be noted about a guest that has moved.
    async fn verdict(&self, chosen: &Chosen, outcome: Outcome) -> Result<Vec<String>, StepError> {
        let source_host = &self.job.migration.source_host;
        let began = tokio::time::Instant::now();
        loop {
            let dest = self.job.locate(&chosen.host).await;
            let source = self.job.locate(source_host).await;
            let told = self.told(chosen, &outcome, dest.as_ref().ok()).await;
            match judge(source.as_ref().ok(), dest.as_ref().ok(), told) {
                Verdict::Moved => {
                    let halved = source.is_ok_and(|source| source.is_half());
                    return Ok(moved_how(&chosen.host, dest.as_ref().ok(), halved));
                }
                Verdict::Stayed => return Err(ended(reason(outcome, source_host))),
                Verdict::Stopped => {
                    return Err(ended(EndReason::Failed {
                        message: format!(
                            "the guest stopped during the migration: {}",
                            said(source_host, &chosen.host, &source, &dest)
                        ),
                    }));
                }
                Verdict::InBetween if began.elapsed() < LOOK_FOR => {
                    tokio::time::sleep(LOOK_AGAIN).await;
                }
                Verdict::InBetween | Verdict::Unknown => {
                    let by_hand = match (&source, &dest) {
                        (Ok(source), Ok(dest)) => self.by_hand(chosen, source, dest).await,
                        _ => None,
                    };
                    if let Some(message) = by_hand {
                        return Err(ended(EndReason::Failed { message }));
                    }
                    if let Some(lost) = self.is_lost_with(&chosen.host, &source, &dest).await? {
                        return Ok(vec![lost]);
                    }
                    return Err(lost(format!(
                        "where the guest is cannot be told: {}",
                        said(source_host, &chosen.host, &source, &dest)
                    )));
                }
            }
        }
    }

    /// What somebody did with a guest that is active on neither side, in words: it is on
    /// another node that says so, or on the source again if no other has it; or it was
    /// undefined, if no node has it and it never came to the destination.
    async fn by_hand(
        &self,
        chosen: &Chosen,
        source: &GuestLocation,
        dest: &GuestLocation,
    ) -> Option<String> {
        if source.migrating || source.presence.is_active() || dest.presence != Presence::Absent {
            return None;
        }
        let moved = |host: &HostName| format!("somebody else moved the guest: it is on {host}");
        let (from, to) = (self.job.source(), &chosen.host);
        match (self.job.elsewhere(to).await, source.presence) {
            (Ok(Some((host, Presence::Present(_)))), _) => Some(moved(&host)),
            (Ok(None), Presence::Present(_)) => Some(moved(from)),
            (Ok(None), Presence::Absent) if self.never_came(to, dest).await => Some(format!(
                "the guest was undefined on {from} during the move, and never came to {to}: its \
                 disks are left on both"
            )),
            _ => None,
        }
    }

    /// Of a guest in post-copy whose silent destination is proven off, what is to be
    /// noted: it ran there, and no more.
    async fn is_lost_with(
        &self,
        host: &HostName,
        source: &Result<GuestLocation, StepError>,
        dest: &Result<GuestLocation, StepError>,
    ) -> Result<Option<String>, StepError> {
        if dest.is_ok() || !source.as_ref().is_ok_and(GuestLocation::is_half) {
            return Ok(None);
        }
        let dead = self.job.is_dead(host).await?;
        Ok(dead.map(|dead| format!("{dead}, in post-copy: the guest's memory is lost")))
    }

    /// Whether a destination that has kept its journal says that it never had the guest.
    async fn never_came(&self, host: &HostName, dest: &GuestLocation) -> bool {
        if !matches!(dest.known, Known::UnderWay { .. }) {
            return false;
        }
        let seen = self.job.look_at(host).await;
        seen.is_ok_and(|seen| {
            seen.copy().presence == Presence::Absent && !seen.copy().known.ran_here
        })
    }

    /// What the nodes know beyond where the guest is now. Asked only where it is
    /// not seen on the destination.
    async fn told(
        &self,
        chosen: &Chosen,
        outcome: &Outcome,
        dest: Option<&GuestLocation>,
    ) -> ToldBy {
        let moved_away = matches!(outcome, Outcome::Moved { .. });
        if dest.is_none_or(|dest| dest.presence.is_active()) {
            return ToldBy {
                moved_away,
                ran_there: false,
            };
        }
        // libvirt defines it where it was absent only when it hands it over: it ran there,
        // though an agent that died with its node has not seen it. One that was paused
        // before does not run there, and is paused where it failed.
        let ran = chosen.guest.power_state == PowerState::Running;
        let arrived = |seen: proof::Seen| {
            let known = seen.copy().known;
            known.ran_here || (ran && known.under_way && seen.is_present())
        };
        let seen = self.job.look_at(&chosen.host).await;
        ToldBy {
            moved_away,
            ran_there: seen.is_ok_and(arrived),
        }
    }

    /// An agent that died with its node forgets of the transfer when it is back.
    async fn undo_transfer(&self) -> Result<(), StepError> {
        let Some(dead) = self.job.is_dead(self.job.source()).await? else {
            return self.forget_transfer().await;
        };
        let source = self.job.source();
        let why = format!("{dead}: its agent forgets of the transfer when it is up again");
        self.job.put_off(source, TRANSFER, &why).await
    }

    async fn forget_transfer(&self) -> Result<(), StepError> {
        let (agents, source) = (self.job.agents(), self.job.source());
        let forgotten = agents.act(source, &RollbackAtSource(self.job.step())).await;
        forgotten.map_err(agent_error)
    }

    // ---- settle and tidy

    async fn settle(&self, data: &mut Data) -> Result<(), StepError> {
        self.end_turn().await?;
        let host = data.chosen()?.host.clone();
        let now_ms = self.job.context.clock.now_ms();
        let id = self.job.migration.instance_uuid;
        let settled = self
            .job
            .store()
            .settle(self.job.lease, id, &host, None, None, now_ms)
            .await;
        settled.map_err(|e| store_error(&e))?;
        self.job.context.definitions.moved(id, &host);
        let cleaned = self
            .job
            .agents()
            .act(&host, &PostAtDestination(self.job.step()))
            .await;
        let cleaned = cleaned.map_err(agent_error)?;
        data.downtime_ms = cleaned.downtime_ms.or(data.downtime_ms);
        let noted = cleaned.warnings.into_iter().chain(cleaned.kept);
        data.warn(SETTLE, noted.collect());
        Ok(())
    }

    async fn tidy(&self, data: &mut Data) -> Result<(), StepError> {
        let source = &self.job.migration.source_host;
        let dest = &data.chosen()?.host;
        let copied = &data.chosen()?.copied_disks;
        let mut cleaned = self.tidy_source(dest).await?;
        cleaned
            .kept
            .extend(self.left_unknown(&cleaned, copied).await);
        if !cleaned.removed.is_empty() {
            data.decide(
                TIDY,
                format!("removed from {source}: {}", cleaned.removed.join(", ")),
            );
        }
        let noted = cleaned.warnings.into_iter().chain(cleaned.kept);
        data.warn(TIDY, noted.collect());
        Ok(())
    }

    /// What a source that removed nothing has still, as it knows nothing of the
    /// migration any more.
    async fn left_unknown(&self, cleaned: &CleanUp, copied: &[String]) -> Option<String> {
        let source = self.job.source();
        if *cleaned != CleanUp::default() {
            return None;
        }
        let here = self.job.look_at(source).await.ok()?;
        let runs = here.copy().presence == Presence::Present(PowerState::Running);
        let defined = (here.is_present() && !runs).then(|| "its definition".to_owned());
        let disks = (!copied.is_empty()).then(|| format!("its copy of {}", copied.join(", ")));
        let left: Vec<String> = defined.into_iter().chain(disks).collect();
        let is_known = here.copy().known != CopyHistory::default();
        (!is_known && !left.is_empty()).then(|| {
            format!(
                "{source} knows nothing of it any more (did its agent lose its state?): {} \
                 is left there",
                left.join(" and ")
            )
        })
    }

    /// Does a step again that was put off; says what remains amiss. The world may
    /// have changed since, so it is looked at anew.
    pub async fn tidy_again(&self, step: &str, dest: &HostName) -> Result<(), StepError> {
        if step == PREPARE {
            return match self.take_back(dest).await? {
                None => Ok(()),
                Some(unproven) => Err(lost(unproven)),
            };
        }
        if step == TRANSFER {
            return self.forget_transfer().await;
        }
        let cleaned = match step == SETTLE {
            true => {
                self.end_turn().await?;
                let took = self.job.source();
                self.job.settle_late(took, dest, None, None).await?;
                let agents = self.job.agents();
                let posted = agents.act(dest, &PostAtDestination(self.job.step())).await;
                posted.map_err(agent_error)?
            }
            false => {
                let mut cleaned = self.tidy_source(dest).await?;
                cleaned.kept.extend(self.left_unknown(&cleaned, &[]).await);
                cleaned
            }
        };
        self.job.note_kept(cleaned.kept).await
    }

    /// Only by evidence of the guest's copy on its destination, or where it has moved
    /// since (invariant 11). One that is back on the source is the source's to judge.
    async fn tidy_source(&self, dest: &HostName) -> Result<CleanUp, StepError> {
        let (agents, source) = (self.job.agents(), &self.job.migration.source_host);
        let stays = self.job.look_for_it(dest, source).await?;
        let cleaned = match proof::live_source(source, &stays) {
            Ok(proof) => agents.post_at_source(source, self.job.step(), &proof).await,
            Err(unproven) => {
                let here = self.job.look_at(source).await?;
                if self.options.post_copy && stays.copy().migrating && !here.is_active() {
                    return Err(lost(format!(
                        "{}, and lacks memory that {source} no longer has, as that ended in \
                         post-copy; it hangs when it needs it: stop it hard, and start it",
                        stays.words()
                    )));
                }
                if here.copy().presence != Presence::Present(PowerState::Running) {
                    return Err(lost(unproven));
                }
                // Somebody brought it back.
                agents.leave_at_source(source, self.job.step()).await
            }
        };
        cleaned.map_err(agent_error)
    }
}

fn turn_limits(limits: Limits) -> TurnLimits {
    TurnLimits {
        outbound: limits.outbound,
        inbound: limits.inbound,
        cluster: limits.cluster,
    }
}

/// Which disks are copied, in words.
fn what_moves(chosen: &Chosen) -> String {
    let (copied, shared) = (&chosen.copied_disks, &chosen.shared_disks);
    match (copied.as_slice(), shared.as_slice()) {
        ([], []) => "no disk to move".to_owned(),
        ([], shared) => format!(
            "disks are shared by both nodes, nothing to copy: {}",
            shared.join(", ")
        ),
        (copied, []) => format!("disks are not shared and are copied: {}", copied.join(", ")),
        (copied, shared) => format!(
            "copies {}, which is not shared; {} is",
            copied.join(", "),
            shared.join(", ")
        ),
    }
}

/// Which wishes the source has taken.
#[derive(Default)]
struct Asked {
    abort: bool,
    force: bool,
    /// Its turn to send was given back.
    turn_ended: bool,
}

/// Whether a wish need not be repeated.
fn taken(what: &str, result: Result<(), AgentError>) -> bool {
    match result {
        Ok(()) => true,
        Err(error) => {
            warn!(%error, "the source did not take the {what}");
            error.class == ErrorClass::Refused
        }
    }
}

/// Where a guest is after a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// On the destination, or it was.
    Moved,
    /// On the source, and only there.
    Stayed,
    /// Off on the source, and it never came to the destination.
    Stopped,
    /// libvirt is still at it.
    InBetween,
    /// Nobody can say.
    Unknown,
}

/// What is known of a transfer beyond where the guest is now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct ToldBy {
    /// The source's libvirt says that it handed the guest over; that the guest is gone
    /// from there does not say so.
    moved_away: bool,
    /// The destination's journal says that it ran there.
    ran_there: bool,
}

/// Judges what the nodes say; `None` is a node that did not answer. A guest
/// that *runs* on the destination has switched over: QEMU lets it run there
/// only once the source's copy stands still for good. One that arrived has moved,
/// whatever became of it since: it may have gone off, or away. That neither node
/// has it proves nothing.
fn judge(source: Option<&GuestLocation>, dest: Option<&GuestLocation>, told: ToldBy) -> Verdict {
    let runs = |l: &&GuestLocation| l.presence == Presence::Present(PowerState::Running);
    let source_runs = source.filter(runs).is_some();
    let arrived = told.moved_away || told.ran_there;
    if source.is_some_and(|l| l.migrating) {
        // A post-copy whose other half died is libvirt's for ever; of one that still
        // comes in libvirt has a job there.
        let is_over = |l: &GuestLocation| match l.presence {
            Presence::Present(PowerState::Running) => !l.migrating,
            Presence::Present(state) => !state.is_active(),
            Presence::Absent | Presence::Incoming => false,
        };
        let is_half = source.is_some_and(GuestLocation::is_half);
        return match is_half && dest.is_some_and(is_over) {
            true => Verdict::Moved,
            false => Verdict::InBetween,
        };
    }
    match (source, dest) {
        (_, Some(d)) if runs(&d) && !source_runs => Verdict::Moved,
        (Some(_), None) if source_runs => Verdict::Stayed,
        (Some(s), Some(d)) => match (s.presence, d.presence) {
            (s, d) if s.is_active() && d.is_active() => Verdict::Unknown,
            (_, d) if d.is_active() => Verdict::Moved,
            _ if source_runs => Verdict::Stayed,
            // A copy that stands still may be what libvirt left of one that moved.
            (s, Presence::Present(_)) if s.is_active() => match arrived {
                true => Verdict::Moved,
                false => Verdict::Unknown,
            },
            (s, _) if s.is_active() => match arrived {
                true => Verdict::Unknown,
                false => Verdict::Stayed,
            },
            (_, Presence::Incoming) => Verdict::InBetween,
            // Nothing but an arrival defines it there.
            (_, Presence::Present(_)) => Verdict::Moved,
            (Presence::Absent, _) if arrived => Verdict::Moved,
            (Presence::Present(_), _) if !arrived => Verdict::Stopped,
            _ => Verdict::Unknown,
        },
        _ => Verdict::Unknown,
    }
}

/// What is to be noted about a guest that has moved, and is not active there; of a
/// `halved` one a part of the memory is left on the source.
fn moved_how(dest: &HostName, seen: Option<&GuestLocation>, halved: bool) -> Vec<String> {
    match seen.map(|l| l.presence) {
        Some(Presence::Absent) => vec![format!(
            "it moved to {dest}, and is no longer defined there: somebody took it away"
        )],
        Some(presence) if !presence.is_active() && halved => vec![format!(
            "{dest} ended in post-copy: the guest's memory is lost, and it is off there, with its disks"
        )],
        Some(presence) if !presence.is_active() => {
            vec![format!("it moved to {dest}, and is off there by now")]
        }
        _ => Vec::new(),
    }
}

fn said(
    source: &HostName,
    dest: &HostName,
    at_source: &Result<GuestLocation, StepError>,
    at_dest: &Result<GuestLocation, StepError>,
) -> String {
    let one = |host: &HostName, said: &Result<GuestLocation, StepError>| match said {
        Ok(l) => format!("on {host} it is {}", l.presence),
        Err(e) => format!("{host} does not say ({e})"),
    };
    format!("{}, {}", one(source, at_source), one(dest, at_dest))
}

fn reason(outcome: Outcome, source: &HostName) -> EndReason {
    match moved(outcome) {
        Ok(_) => EndReason::Failed {
            message: format!("libvirt reported success, and the guest still runs on {source}"),
        },
        Err(reason) => reason,
    }
}

#[cfg(test)]
#[path = "live_migrate_tests.rs"]
mod tests;

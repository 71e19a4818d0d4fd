//! The source's steps of a cold migration: its parts of the work, what is set
//! aside, and how the guest is brought back or given up for good.

use std::time::Duration;

use drover_model::{
    api::{
        compute::{
            CarriedFile, CleanUp, ColdPart, Ended as Over, FileRole, FinishRevertResize,
            GuestLocation, JobState, Known, Outcome, RemoveCopy, ResizeInstance, SetAside, StepRef,
        },
        fault::Fault,
    },
    content::FileContent,
    guest::{Guest, PowerState, Presence},
    ids::InstanceId,
    migration::{Phase, Transfer},
};
use tracing::{info, warn};

use super::{
    super::{
        actor::{Actor, Stage},
        destroy::{self, Aside, Redundant},
        past::Finished,
        work::{self, Parts, Task, Work},
    },
    files,
};
use crate::{
    faults::{hypervisor as fault, journal_lost},
    hypervisor::{Definition, HypervisorError, Overlay, SendSpec},
    journal::{Ended, KeptFile, LeavingRecord, Record, Thaw, definition},
    node::Counters,
};

/// How long after it was last asked a guest that still runs may go off: it is
/// waited for, so that a guest which was asked in vain does not stay off.
const SECOND_THOUGHTS: Duration = Duration::from_secs(5);
/// Time between two looks at such a guest.
const LOOK: Duration = Duration::from_millis(250);

/// A guest that is leaving, as its actor holds it.
pub(in super::super) struct Leaving {
    pub(in super::super) record: Box<LeavingRecord>,
    pub(in super::super) parts: Parts<ColdPart>,
}

impl Leaving {
    /// As the journal has it.
    pub(in super::super) fn resume(record: Box<LeavingRecord>) -> Self {
        Self {
            record,
            parts: Parts::none(),
        }
    }
}

impl Actor {
    /// Does a part of the work, or says how it goes.
    pub(in super::super) async fn resize_instance(
        &mut self,
        step: ResizeInstance,
    ) -> Result<JobState, Fault> {
        let reference = self.step(step.instance);
        self.same_instance(reference)?;
        if matches!(self.stage, Stage::Idle) {
            self.begin_leaving(&step).await?;
        }
        let Stage::Leaving(leaving) = &self.stage else {
            return Err(Fault::refused(
                "this node does something else for this migration",
            ));
        };
        match leaving.parts.job(step.part)? {
            Some(job) => Ok(job),
            None => self.begin_part(step).await,
        }
    }

    async fn begin_leaving(&mut self, step: &ResizeInstance) -> Result<(), Fault> {
        self.may_begin(self.step(step.instance)).await?;
        files::check(&step.files)?;
        let problems = step.options.problems();
        if !problems.is_empty() {
            return Err(Fault::refused(problems.join("; ")));
        }
        let reference = self.step(step.instance);
        self.registry.hold(reference).await?;
        let begun = async {
            let presence = self.node.hypervisor.presence(step.instance).await;
            let was_running = match presence.map_err(fault)? {
                Presence::Present(state) => state.is_active(),
                other => {
                    let message = format!("the guest is not on this node ({other:?})");
                    return Err(Fault::refused(message));
                }
            };
            self.all_disks_are_known(step).await?;
            let guests = self.both(step.instance).await?;
            let (overlays, definition) = self.frozen_before(step, &guests)?;
            let record = LeavingRecord {
                instance: step.instance,
                generation: guests.first().map_or(0, |guest| guest.generation),
                under: Vec::new(),
                was_running,
                asked_to_stop: false,
                done: Vec::new(),
                begun: Vec::new(),
                definition,
                overlays,
                kept: Vec::new(),
                devices: Vec::new(),
                withdrawn: false,
                aside: false,
                sent: Vec::new(),
                sent_as: None,
                defines: false,
                thaw: Thaw::NotBegun,
            };
            self.write_leaving(&record).await?;
            Ok(record)
        };
        match begun.await {
            Ok(record) => {
                info!(migration = %self.migration, instance = %step.instance,
                    was_running = record.was_running, "the guest is to leave, shut off");
                Counters::add(&self.node.counters.transfers_started);
                self.stage = Stage::Leaving(Box::new(Leaving::resume(Box::new(record))));
                Ok(())
            }
            Err(fault) => {
                self.registry.release(reference);
                Err(fault)
            }
        }
    }

    /// Disks that stand still since a time that this agent has forgotten, and the
    /// definition from before. One that is to have them stand still thaws them itself.
    fn frozen_before(
        &self,
        step: &ResizeInstance,
        guests: &[Guest],
    ) -> Result<(Vec<Overlay>, Option<Definition>), Fault> {
        let used = files::used_overlays(&step.files, guests);
        if used.is_empty() || step.part == ColdPart::PreCopy {
            return Ok((Vec::new(), None));
        }
        let domain = step.domain.clone();
        let domain = domain.ok_or_else(|| journal_lost(self.migration))?;
        Ok((used, Some(Definition::of_domain(domain))))
    }

    pub(super) async fn write_leaving(&self, record: &LeavingRecord) -> Result<(), Fault> {
        let entry = Record::Leaving(Box::new(record.clone()));
        self.write_down(&entry).await
    }

    async fn begin_part(&mut self, step: ResizeInstance) -> Result<JobState, Fault> {
        let mut record = self.leaving()?.clone();
        if record.aside {
            return Err(Fault::refused("the guest is set aside already"));
        }
        let task = match step.part {
            ColdPart::Stop => {
                record.asked_to_stop = true;
                let [early_bytes, total_bytes] = bytes_to_carry(&step.files);
                Task::Stop {
                    options: step.options.clone(),
                    disk: Transfer {
                        total_bytes,
                        processed_bytes: early_bytes,
                        remaining_bytes: total_bytes.saturating_sub(early_bytes),
                    },
                }
            }
            ColdPart::PreCopy => {
                self.freeze(&step, &mut record).await?;
                self.sending(&step, &mut record).await?
            }
            ColdPart::Copy => self.sending(&step, &mut record).await?,
        };
        // What it was done with before may have changed.
        record.done.retain(|part| *part != step.part);
        if !record.begun.contains(&step.part) {
            record.begun.push(step.part);
        }
        self.write_leaving(&record).await?;
        let work = Work::begin(&self.node, self.migration, step.instance, step.part, task);
        let job = work.job();
        if let Stage::Leaving(leaving) = &mut self.stage {
            *leaving.record = record;
            leaving.parts.begin(work);
        }
        Ok(job)
    }

    /// How a move or a transfer that is taken back ended.
    pub(in super::super) fn failure(&self) -> Outcome {
        match &self.stage {
            Stage::Leaving(leaving) => leaving.parts.failure(),
            Stage::Transferring(transferring) => transferring.parts.failure(),
            _ => work::failed("it was taken back"),
        }
    }

    fn leaving(&self) -> Result<&LeavingRecord, Fault> {
        match &self.stage {
            Stage::Leaving(leaving) => Ok(&leaving.record),
            _ => Err(Fault::refused("this node is not the migration's source")),
        }
    }

    /// Has disks that are to be copied beforehand stand still under their guest.
    async fn freeze(
        &mut self,
        step: &ResizeInstance,
        record: &mut LeavingRecord,
    ) -> Result<(), Fault> {
        let overlays = files::overlays(&step.files);
        if overlays.is_empty() {
            return Ok(());
        }
        let hypervisor = self.node.hypervisor.clone();
        if record.definition.is_none() {
            self.thaw_what_is_forgotten(step).await?;
            // As it is without overlays; what is frozen is no lasting change.
            let taken = hypervisor.definition(step.instance).await.map_err(fault)?;
            record.definition = Some(taken.ok_or_else(no_longer_defined)?);
        }
        if record.overlays.is_empty() {
            record.overlays.clone_from(&overlays);
            self.write_leaving(record).await?;
            self.keep(record.clone());
        }
        let frozen = hypervisor.freeze_disks(step.instance, &overlays).await;
        frozen.map_err(fault)?;
        if record.sent.is_empty() {
            let images = overlays.iter().map(|overlay| overlay.image.clone());
            record.sent = self.stamps_of(images.collect()).await?;
        }
        if record.sent_as.is_none() {
            record.sent_as = hypervisor.definition(step.instance).await.map_err(fault)?;
        }
        Ok(())
    }

    /// A life of this agent whose journal is lost may have had the same disks stand
    /// still: the guest's definition names their overlays until those are merged.
    async fn thaw_what_is_forgotten(&self, step: &ResizeInstance) -> Result<(), Fault> {
        let (hypervisor, instance) = (&self.node.hypervisor, step.instance);
        let guest = hypervisor.guest(instance).await.map_err(fault)?;
        let guest = guest.ok_or_else(no_longer_defined)?;
        if files::used_overlays(&step.files, &[guest]).is_empty() {
            return Ok(());
        }
        let overlays = files::overlays(&step.files);
        warn!(migration = %self.migration, %instance,
            "its disks stand still since a time that this agent has forgotten: they are thawed");
        let thawed = hypervisor.thaw_disks(instance, &overlays).await;
        thawed.map_err(fault)?;
        for overlay in &overlays {
            let removed = destroy::remove_thawed(&self.node, overlay).await;
            removed.map_err(fault)?;
        }
        Ok(())
    }

    /// What a part sends. Disks go only when the guest is off, together with its
    /// definition as it is then.
    async fn sending(
        &self,
        step: &ResizeInstance,
        record: &mut LeavingRecord,
    ) -> Result<Task, Fault> {
        let mut paths: Vec<String> = files::of_part(&step.files, step.part)
            .map(|file| file.path.clone())
            .collect();
        if step.part == ColdPart::Copy {
            let path = self.write_definition(step, record).await?;
            paths.push(path);
            record.sent = self.stamps(&step.files).await?;
            record.under = files::under(&step.files);
            record.kept = files::kept(&step.files, self.migration);
            record.devices = files::devices(&step.files);
        }
        let [early_bytes, total_bytes] = bytes_to_carry(&step.files);
        let options = &step.options;
        let timeout_s = options.progress_timeout_s;
        Ok(Task::Send {
            spec: SendSpec {
                key: files::key(self.migration, step.part),
                token: step.inbox.token.clone(),
                address: step.dest_address.clone(),
                port: step.inbox.port,
                files: paths,
                // A device is looked at first: on storage that both nodes share, all
                // of it is there already.
                resume: record.begun.contains(&step.part) || has_device(&step.files),
                bandwidth_bytes_s: options.bandwidth_mib_s.map(|mib| mib << 20),
                progress_timeout: Duration::from_secs(
                    timeout_s.unwrap_or(self.node.settings.progress_timeout_s),
                ),
            },
            phase: match step.part {
                ColdPart::PreCopy => Phase::PreCopy,
                _ => Phase::Disk,
            },
            before_bytes: match step.part {
                ColdPart::PreCopy => 0,
                _ => early_bytes,
            },
            total_bytes,
        })
    }

    async fn write_definition(
        &self,
        step: &ResizeInstance,
        record: &mut LeavingRecord,
    ) -> Result<String, Fault> {
        let (hypervisor, instance) = (&self.node.hypervisor, step.instance);
        let presence = hypervisor.presence(instance).await.map_err(fault)?;
        if !matches!(presence, Presence::Present(state) if !state.is_active()) {
            let message = format!("the guest is not shut off on this node ({presence})");
            return Err(Fault::refused(message));
        }
        let now = hypervisor.definition(instance).await.map_err(fault)?;
        let now = now.ok_or_else(no_longer_defined)?;
        let before = record.definition.as_ref();
        let before = before.filter(|_| !record.overlays.is_empty());
        if before.is_some() && record.sent_as.as_ref().is_some_and(|then| *then != now) {
            return Err(Fault::refused(
                "the guest's definition was changed since its disks were made to stand still: it \
                 stays as it is on this node; migrate it again",
            ));
        }
        let taken = before.unwrap_or(&now).clone();
        // After the definition was taken, so that it has no disk that is not seen here.
        self.all_disks_are_known(step).await?;
        let path = files::definition_path(&self.node.settings.state_dir, self.migration);
        definition::write(&path, &taken, self.node.journal.disk()).await?;
        record.definition = Some(taken);
        record.sent_as = Some(now);
        Ok(path.display().to_string())
    }

    /// A part is over.
    pub(in super::super) async fn worked(&mut self, part: ColdPart, ended: Ended) {
        let Stage::Leaving(leaving) = &mut self.stage else {
            return;
        };
        leaving.parts.ended(part, ended.clone());
        if matches!(ended.outcome, Outcome::Moved { .. }) && !leaving.record.done.contains(&part) {
            leaving.record.done.push(part);
            let record = leaving.record.clone();
            if let Err(e) = self.write_leaving(&record).await {
                // Asked again after a restart, the part finds it done.
                warn!(migration = %self.migration, error = %e, "the journal lacks the end of a part");
            }
        }
    }

    /// Has the part under way end, and waits for that.
    pub(in super::super) async fn abort_resize(&mut self, step: StepRef) -> Result<(), Fault> {
        self.same_instance(step)?;
        if let Stage::Leaving(leaving) = &mut self.stage
            && let Some((part, ended)) = leaving.parts.cancel().await
        {
            self.worked(part, ended).await;
        }
        Ok(())
    }

    /// Keeps definition and disks aside, so that nothing starts the guest here.
    pub(in super::super) async fn set_aside(&mut self, step: SetAside) -> Result<CleanUp, Fault> {
        let reference = self.step(step.instance);
        self.same_instance(reference)?;
        self.recall(reference, step.memory, false).await?;
        let mut record = self.leaving()?.clone();
        let clean_up = CleanUp::default();
        let hypervisor = self.node.hypervisor.clone();
        let presence = hypervisor.presence(step.instance).await.map_err(fault)?;
        if presence.has_qemu() {
            let message = format!("the guest is active on this node ({presence})");
            return Err(Fault::refused(message));
        }
        let was_aside = record.aside && !record.defines && presence == Presence::Absent;
        if was_aside && self.is_all_aside(&record).await? {
            return Ok(clean_up);
        }
        if presence == Presence::Absent && !record.withdrawn {
            return Err(Fault::refused(
                "somebody else has undefined the guest on this node, or moved it",
            ));
        }
        self.is_ours_to_withdraw(&record, presence).await?;
        let remaining = self.remaining(&record, presence).await?;
        let proof = match Aside::of(&record, &remaining) {
            Ok(proof) => proof,
            Err(changed) => {
                self.has_to_be_sent_again(record).await?;
                return Err(changed);
            }
        };
        self.registry.claim(self.migration, &record.devices)?;
        self.registry
            .lies_aside_over(self.migration, record.under.clone());
        if !record.withdrawn {
            record.withdrawn = true;
            self.write_leaving(&record).await?;
            self.keep(record.clone());
        }
        // Also after a way back that was broken off: some may have their own names.
        let withdrawn = destroy::withdraw(&self.node, step.instance, &proof).await;
        withdrawn.map_err(fault)?;
        for file in &record.kept {
            match destroy::rename_away(&self.node, file, &proof).await {
                // It is aside already: what has its name now is somebody else's.
                Err(HypervisorError::Exists(_)) if presence == Presence::Absent => {}
                renamed => renamed.map_err(fault)?,
            }
        }
        record.aside = true;
        record.defines = false;
        // Names, and who writes them, change from now on.
        record.sent.clear();
        record.sent_as = None;
        self.write_leaving(&record).await?;
        self.node.counters.count_outcome(&work::done());
        info!(migration = %self.migration, instance = %step.instance,
            files = record.kept.len(), "the guest is set aside");
        self.keep(record);
        Ok(clean_up)
    }

    /// Refuses to withdraw a definition that somebody else made of a guest that is aside,
    /// wholly or in part.
    async fn is_ours_to_withdraw(
        &self,
        record: &LeavingRecord,
        presence: Presence,
    ) -> Result<(), Fault> {
        if presence == Presence::Absent {
            return Ok(());
        }
        if record.aside && !record.defines {
            return Err(defined_by_others());
        }
        match self.renamed(record).await?.first() {
            None => Ok(()),
            Some(path) => Err(Fault::refused(format!(
                "the guest is defined on this node while its {path} is set aside: its definition \
                 is not withdrawn"
            ))),
        }
    }

    async fn is_all_aside(&self, record: &LeavingRecord) -> Result<bool, Fault> {
        let kept = record.kept.iter().map(|file| (&file.kept, &file.kept));
        let kept = self.see_files(kept).await?;
        Ok(kept.iter().all(|file| file.exists))
    }

    /// The guest is another than the one that was sent.
    async fn has_to_be_sent_again(&mut self, mut record: LeavingRecord) -> Result<(), Fault> {
        record.done.retain(|part| *part != ColdPart::Copy);
        self.write_leaving(&record).await?;
        if let Stage::Leaving(leaving) = &mut self.stage {
            *leaving.record = record;
            leaving.parts.forget();
        }
        Ok(())
    }

    fn keep(&mut self, record: LeavingRecord) {
        if let Stage::Leaving(leaving) = &mut self.stage {
            *leaving.record = record;
        }
    }

    /// Makes the guest be here as it was before the migration.
    pub(in super::super) async fn finish_revert_resize(
        &mut self,
        step: FinishRevertResize,
    ) -> Result<GuestLocation, Fault> {
        let reference = self.step(step.instance);
        self.abort_resize(reference).await?;
        self.recall(reference, step.memory.clone(), step.ran)
            .await?;
        if matches!(self.stage, Stage::Idle) {
            // Nothing was begun here, or it was brought back before.
            if self.registry.known(self.migration) == Known::Lost {
                return Err(journal_lost(self.migration));
            }
            self.never_begun(reference).await?;
            return self.location(step.instance).await;
        }
        let mut record = self.leaving()?.clone();
        if !record.withdrawn && !self.is_here(step.instance).await? {
            return self.leave_to_others(reference, &record).await;
        }
        let failure = self.failure();
        // One that was set aside has been counted as moved.
        let counts = !record.aside;
        self.put_back(&mut record).await?;
        if (record.was_running || step.ran) && !step.is_elsewhere {
            self.start_again(&record, step.runs_nowhere_else).await?;
        }
        let path = files::definition_path(&self.node.settings.state_dir, self.migration);
        definition::remove(&path).await?;
        info!(migration = %self.migration, instance = %step.instance,
            "the guest is here as it was before");
        self.forget(reference, Finished::with(Over::Stayed)).await?;
        if counts {
            self.node.counters.count_outcome(&failure);
        }
        self.location(step.instance).await
    }

    async fn is_here(&self, instance: InstanceId) -> Result<bool, Fault> {
        let presence = self.node.hypervisor.presence(instance).await;
        Ok(presence.map_err(fault)? != Presence::Absent)
    }

    /// Somebody else has undefined the guest, or moved it: it is theirs.
    async fn leave_to_others(
        &mut self,
        step: StepRef,
        record: &LeavingRecord,
    ) -> Result<GuestLocation, Fault> {
        let overlays: Vec<_> = record.overlays.iter().map(|o| &o.path).collect();
        warn!(migration = %self.migration, instance = %step.instance, ?overlays,
            "somebody else has undefined the guest: what is left of it here stays as it is");
        let path = files::definition_path(&self.node.settings.state_dir, self.migration);
        definition::remove(&path).await?;
        self.forget(step, Finished::with(Over::MadeWay)).await?;
        self.location(step.instance).await
    }

    /// Files and definition are where they were.
    async fn put_back(&mut self, record: &mut LeavingRecord) -> Result<(), Fault> {
        let hypervisor = self.node.hypervisor.clone();
        let presence = hypervisor.presence(record.instance).await.map_err(fault)?;
        match presence {
            Presence::Absent if record.thaw == Thaw::Begun => return Err(half_thawed(record)),
            Presence::Absent => self.all_can_go_back(record).await?,
            state if !state.is_active() && record.aside && !record.defines => {
                return Err(defined_by_others());
            }
            _ => {}
        }
        if !presence.is_active() {
            // Also where the agent died while it renamed.
            for file in record.kept.iter().rev() {
                // What is defined again has its overlays merged, and removed.
                let may_be_gone = presence != Presence::Absent && record.is_overlay(&file.path);
                match destroy::rename_back(&self.node, file).await {
                    Ok(()) => {}
                    // It was not renamed yet, and the guest has it.
                    Err(HypervisorError::Failed(_)) if !record.aside || may_be_gone => {}
                    Err(HypervisorError::Exists(_)) if !record.aside => {}
                    Err(e) => return Err(fault(e)),
                }
            }
        }
        let merged = self.take_off_overlays(record, presence).await?;
        let must_define = merged || presence == Presence::Absent;
        if must_define {
            let lost = || Fault::bug("the guest is gone, and so is its definition");
            let definition = record.definition.clone().ok_or_else(lost)?;
            if record.aside && !record.defines {
                record.defines = true;
                self.write_leaving(record).await?;
                self.keep(record.clone());
            }
            hypervisor.define(&definition, None).await.map_err(fault)?;
        }
        // Only now: a life that died before this has to define the guest on its images.
        if !record.overlays.is_empty() {
            self.note_thaw(record, Thaw::Done).await?;
        }
        for overlay in &record.overlays {
            let removed = destroy::remove_thawed(&self.node, overlay).await;
            removed.map_err(fault)?;
        }
        if record.aside || !record.overlays.is_empty() {
            record.aside = false;
            let overlays = std::mem::take(&mut record.overlays);
            let is_overlay = |path: &String| overlays.iter().any(|o| o.path == *path);
            record.kept.retain(|file| !is_overlay(&file.path));
            record.thaw = Thaw::NotBegun;
            // Whoever sets it aside again has to find it like this.
            let own = record.kept.iter().map(|file| file.path.clone());
            record.sent = self.stamps_of(own.collect()).await?;
            record.sent_as = hypervisor
                .definition(record.instance)
                .await
                .map_err(fault)?;
            self.write_leaving(record).await?;
            self.keep(record.clone());
        }
        Ok(())
    }

    /// What the overlays hold is in the images under them, on stable storage where there may
    /// be no other copy of it. Says whether the guest is to be defined on those.
    async fn take_off_overlays(
        &mut self,
        record: &mut LeavingRecord,
        presence: Presence,
    ) -> Result<bool, Fault> {
        if record.overlays.is_empty() || record.thaw == Thaw::Done {
            return Ok(false);
        }
        let hypervisor = self.node.hypervisor.clone();
        if presence.is_active() {
            self.note_thaw(record, Thaw::Begun).await?;
            let overlays = &record.overlays;
            let thawed = hypervisor.thaw_disks(record.instance, overlays).await;
            thawed.map_err(fault)?;
            return Ok(false);
        }
        let guests = self.both(record.instance).await?;
        let (mut merged, mut left) = (false, Vec::new());
        for overlay in record.overlays.clone() {
            let is_used = presence == Presence::Absent || files::is_used(&overlay.path, &guests);
            let is_first = record.thaw == Thaw::NotBegun;
            let is_below = files::is_used(&overlay.image, &guests);
            if is_used || (is_first && is_below && self.is_as_frozen(record, &overlay).await?) {
                self.is_here_to_merge(&overlay).await?;
                hypervisor.merge_overlay(&overlay).await.map_err(fault)?;
                merged = true;
            } else if is_first {
                left.push(overlay.path);
            }
        }
        if !left.is_empty() {
            warn!(migration = %self.migration, instance = %record.instance, ?left,
                "the guest is no longer on these overlays, and may have written since: they stay \
                 as they are");
            record.overlays.retain(|o| !left.contains(&o.path));
            record.kept.retain(|file| !left.contains(&file.path));
            self.write_leaving(record).await?;
            self.keep(record.clone());
        }
        if merged {
            self.note_thaw(record, Thaw::Merged).await?;
        }
        Ok(merged)
    }

    /// Nothing has removed an overlay before its guest is defined without it: one that
    /// is not seen lies on a file system that is not mounted.
    async fn is_here_to_merge(&self, overlay: &Overlay) -> Result<(), Fault> {
        let seen = self.see_files([(&overlay.path, &overlay.path)].into_iter());
        match seen.await?.iter().all(|file| file.exists) {
            true => Ok(()),
            false => Err(Fault::not_now(format!(
                "{} holds what the guest wrote since its disks were made to stand still, and is \
                 not here: mount its file system",
                overlay.path
            ))),
        }
    }

    /// Whether nobody has written to the image under an overlay since it stands still.
    async fn is_as_frozen(&self, record: &LeavingRecord, over: &Overlay) -> Result<bool, Fault> {
        let now = self.stamps_of(vec![over.image.clone()]).await?;
        let then = record.sent.iter().find(|sent| sent.path == over.image);
        Ok(then.is_some() && now.first() == then)
    }

    async fn note_thaw(&mut self, record: &mut LeavingRecord, thaw: Thaw) -> Result<(), Fault> {
        if record.thaw == thaw {
            return Ok(());
        }
        record.thaw = thaw;
        self.write_leaving(record).await?;
        self.keep(record.clone());
        Ok(())
    }

    /// Every file that was set aside is there, under one name or the other, and nothing
    /// else has its name. Looked at before the first is touched.
    async fn all_can_go_back(&self, record: &LeavingRecord) -> Result<(), Fault> {
        for KeptFile { path, kept } in &record.kept {
            let seen = self.see_files([(kept, kept), (path, path)].into_iter());
            let seen = seen.await?;
            let there = |name: &String| seen.iter().any(|f| f.path == *name && f.exists);
            match (there(kept), there(path)) {
                (false, false) => {
                    return Err(Fault::refused(format!(
                        "{path} was set aside as {kept} and is gone: the guest cannot be brought \
                         back"
                    )));
                }
                (true, true) if !self.is_one_file(kept, path).await? => {
                    return Err(Fault::refused(format!(
                        "{path} was set aside as {kept}, and another file has its name by now: \
                         move that away, and ask again"
                    )));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Two names of one file: giving it another name was broken off.
    async fn is_one_file(&self, a: &str, b: &str) -> Result<bool, Fault> {
        let both = [a.to_owned(), b.to_owned()];
        let found = self.node.hypervisor.contents(&both, &[]).await;
        let found = found.map_err(fault)?;
        let mut stamps = found.iter().map(FileContent::stamp);
        let first = stamps.next().flatten();
        Ok(first.is_some() && stamps.all(|stamp| stamp == first))
    }

    /// Has a guest run that ran before, also if it only now obeys.
    async fn start_again(
        &self,
        record: &LeavingRecord,
        runs_nowhere_else: bool,
    ) -> Result<(), Fault> {
        let hypervisor = &self.node.hypervisor;
        let until = tokio::time::Instant::now() + SECOND_THOUGHTS;
        loop {
            let is_going_off = hypervisor.is_going_off(record.instance).await;
            let is_going_off = is_going_off.map_err(fault)?;
            let presence = hypervisor.presence(record.instance).await.map_err(fault)?;
            if !presence.is_active() {
                break;
            }
            let runs = presence == Presence::Present(PowerState::Running);
            let may_go_off = is_going_off || (runs && record.asked_to_stop);
            match tokio::time::Instant::now() < until {
                true if may_go_off => tokio::time::sleep(LOOK).await,
                // Whoever asks again finds it off some day.
                false if is_going_off => return Err(Fault::not_now(work::IN_SHUTDOWN)),
                _ => return Ok(()),
            }
        }
        if !runs_nowhere_else {
            return Err(Fault::refused(
                "nobody says that the guest runs nowhere else: not started",
            ));
        }
        hypervisor.start(record.instance).await.map_err(fault)
    }

    /// Removes what was set aside, for good, by evidence of the destination's copy.
    /// Without any it leaves a guest alone that somebody has brought back here.
    pub(in super::super) async fn confirm_resize(
        &mut self,
        ask: RemoveCopy,
    ) -> Result<CleanUp, Fault> {
        let step = self.step(ask.instance);
        self.same_instance(step)?;
        if matches!(self.stage, Stage::Idle) {
            return self.nothing_known().await;
        }
        let record = self.leaving()?.clone();
        if !record.aside {
            return Err(Fault::refused("the guest was never set aside here"));
        }
        let presence = self.node.hypervisor.presence(step.instance).await;
        let presence = presence.map_err(fault)?;
        let is_theirs = matches!(presence, Presence::Present(_)) && !record.defines;
        if ask.survivor.is_none() && is_theirs {
            return self.leave_what_came_back(step, &record).await;
        }
        if presence != Presence::Absent {
            return Err(Fault::refused(
                "the guest is defined on this node: nothing is removed",
            ));
        }
        let proof = self.destination_stays(&ask, &record).await?;
        let mut clean_up = CleanUp::default();
        for file in &record.kept {
            let removed = destroy::remove_kept(&self.node, file, &record.overlays, &proof).await;
            self.note_removed(&file.kept, removed, &mut clean_up)?;
        }
        let path = files::definition_path(&self.node.settings.state_dir, self.migration);
        definition::remove(&path).await?;
        self.forget_if_clean(step, Over::Left, clean_up).await
    }

    /// Somebody has brought the guest back here past Drover, and it is nowhere else: it
    /// is theirs, and what lies aside stays where it is.
    async fn leave_what_came_back(
        &mut self,
        step: StepRef,
        record: &LeavingRecord,
    ) -> Result<CleanUp, Fault> {
        let kept = record.kept.iter().map(|file| file.kept.clone());
        let clean_up = CleanUp {
            kept: self.left_of(kept.collect()).await?,
            ..CleanUp::default()
        };
        warn!(migration = %self.migration, instance = %step.instance, left = ?clean_up.kept,
            "somebody has brought the guest back here: what was set aside stays as it is");
        let path = files::definition_path(&self.node.settings.state_dir, self.migration);
        definition::remove(&path).await?;
        self.forget_if_clean(step, Over::MadeWay, clean_up).await
    }

    /// Of what lies here aside all that is still there has to be in place there. (A
    /// file that somebody removed by hand needs no other.)
    async fn destination_stays(
        &self,
        ask: &RemoveCopy,
        record: &LeavingRecord,
    ) -> Result<Redundant, Fault> {
        let own = &self.node.settings.host;
        let kept = record.kept.iter();
        let kept = kept.filter(|file| !record.is_overlay(&file.path));
        let here = self.see_files(kept.map(|file| (&file.path, &file.kept)));
        let mut here = here.await?;
        here.retain(|file| file.exists);
        let lengths = here.iter().map(|file| (&*file.path, file.length_bytes));
        let survivor = ask.survivor.as_ref();
        let paths = here.iter().map(|file| &*file.path);
        let proof = Redundant::by(survivor, own, record.generation, paths)?;
        Redundant::none_is_longer(survivor, lengths)?;
        Ok(proof)
    }

    /// What was answered last; of a migration that this agent does not know, that
    /// it may have left something here.
    async fn nothing_known(&self) -> Result<CleanUp, Fault> {
        if self.registry.known(self.migration) == Known::Lost {
            return Err(journal_lost(self.migration));
        }
        let finished = self.registry.finished(self.migration).await?;
        Ok(match finished {
            Some(finished) => finished.clean_up,
            None => CleanUp {
                kept: vec![format!(
                    "{} knows nothing of this migration: files named *.kept-{} are left there, \
                     if it kept any",
                    self.node.settings.host, self.migration
                )],
                ..CleanUp::default()
            },
        })
    }
}

fn has_device(files: &[CarriedFile]) -> bool {
    files.iter().any(|file| file.role == FileRole::Device)
}

fn half_thawed(record: &LeavingRecord) -> Fault {
    let overlays: Vec<&str> = record.overlays.iter().map(|o| &*o.path).collect();
    Fault::refused(format!(
        "somebody has undefined the guest while its disks were merged with {}: which of them hold \
         newer bytes than the images under them is not known. Define the guest with what it had",
        overlays.join(", ")
    ))
}

fn defined_by_others() -> Fault {
    Fault::refused(
        "the guest is set aside on this node, and somebody has defined it here again: neither is \
         touched; undefine the one that is not wanted",
    )
}

fn no_longer_defined() -> Fault {
    Fault::refused("the guest is no longer defined here")
}

/// Bytes to carry: before the guest stops, and in all.
fn bytes_to_carry(files: &[CarriedFile]) -> [u64; 2] {
    let bytes_of = |part| {
        let files = files::of_part(files, part);
        files.fold(0, |sum: u64, file: &CarriedFile| {
            sum.saturating_add(file.data_bytes)
        })
    };
    let early_bytes = bytes_of(ColdPart::PreCopy);
    [
        early_bytes,
        early_bytes.saturating_add(bytes_of(ColdPart::Copy)),
    ]
}

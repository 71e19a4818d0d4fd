//! The node's steps of a transfer: what is looked at, what is written down, the
//! parts of the work, and the end.

use std::path::Path;

use drover_model::{
    api::{
        compute::{
            CheckTransfer, CleanUp, Ended as Over, JobState, Outcome, PrepTransfer, StepRef,
            TransferFacts, TransferPart, TransferWork,
        },
        fault::Fault,
    },
    guest::{Guest, Presence},
    ids::InstanceId,
    migration::TransferMode,
};
use tracing::{info, warn};

use super::{
    super::{
        actor::{Actor, Stage},
        destroy::{self, OtherFiles, Unused},
        look::fingerprint,
        past::Finished,
        work::{self, Parts, Work},
    },
    work::{Task, is_off},
};
use crate::{
    faults::hypervisor as fault,
    hypervisor::HypervisorError,
    journal::{Ended, Record, TransferRecord},
    node::Counters,
};

/// A guest that changes hands, as its actor holds it.
pub(in super::super) struct Transferring {
    pub(in super::super) record: Box<TransferRecord>,
    pub(in super::super) parts: Parts<TransferPart>,
}

impl Transferring {
    /// As the journal has it.
    pub(in super::super) fn resume(record: Box<TransferRecord>) -> Self {
        Self {
            record,
            parts: Parts::none(),
        }
    }

    /// Whether nothing but tidying is left to do.
    pub(in super::super) fn is_handed_over(&self) -> bool {
        let record = &self.record;
        record.done.contains(&TransferPart::HandOver)
            && !record.begun.contains(&TransferPart::TakeBack)
    }
}

impl Actor {
    /// What the conductor has to know before it plans.
    pub(in super::super) async fn check_transfer(
        &mut self,
        step: CheckTransfer,
    ) -> Result<TransferFacts, Fault> {
        self.registry.could_have(self.step(step.instance)).await?;
        let hypervisor = self.node.hypervisor.clone();
        let asked = tokio::try_join!(
            hypervisor.guest(step.instance),
            hypervisor.lasting_guest(step.instance),
            hypervisor.networks_present(&step.networks)
        );
        let (guest, lasting, networks) = asked.map_err(fault)?;
        let paths = paths_of(guest.iter().chain(&lasting));
        let names = paths.iter().filter_map(|path| Path::new(path).file_name());
        let names: Vec<String> = names
            .map(|name| name.to_string_lossy().into_owned())
            .collect();
        let asked = tokio::try_join!(
            hypervisor.location_facts(&step.locations, &names),
            hypervisor.file_facts(&paths),
            hypervisor.other_users(step.instance, &paths)
        );
        let (locations, files, shared) = asked.map_err(fault)?;
        Ok(TransferFacts {
            guest,
            lasting,
            networks,
            locations,
            files,
            shared,
        })
    }

    /// Writes down what is to be done, and what was before.
    pub(in super::super) async fn prep_transfer(
        &mut self,
        step: PrepTransfer,
    ) -> Result<(), Fault> {
        let reference = self.step(step.instance);
        self.same_instance(reference)?;
        match &self.stage {
            Stage::Idle => {}
            Stage::Transferring(t) if t.record.plan == step.plan => {
                let record = t.record.clone();
                return self.take_places(record, false).await;
            }
            _ => {
                return Err(Fault::refused(
                    "this node does something else for this migration",
                ));
            }
        }
        self.may_begin(self.step(step.instance)).await?;
        let problems = step.options.problems();
        if !problems.is_empty() {
            return Err(Fault::refused(problems.join("; ")));
        }
        self.registry.hold(reference).await?;
        match self.plan_transfer(step).await {
            Ok(record) => {
                info!(migration = %self.migration, instance = %record.instance,
                    project = %record.plan.project, "the guest is to change hands");
                Counters::add(&self.node.counters.transfers_started);
                self.stage = Stage::Transferring(Box::new(Transferring::resume(record.clone())));
                self.take_places(record, true).await
            }
            Err(fault) => {
                self.registry.release(reference);
                Err(fault)
            }
        }
    }

    async fn plan_transfer(&self, step: PrepTransfer) -> Result<Box<TransferRecord>, Fault> {
        let hypervisor = &self.node.hypervisor;
        let presence = hypervisor.presence(step.instance).await.map_err(fault)?;
        let Presence::Present(state) = presence else {
            let message = format!("the guest is not on this node ({presence})");
            return Err(Fault::refused(message));
        };
        let is_live = step.plan.mode == TransferMode::Live;
        if is_live && !state.is_active() {
            return Err(Fault::refused("the guest is off by now: ask again"));
        }
        let places: Vec<String> = step.plan.disks.iter().map(|d| d.to.clone()).collect();
        let facts = hypervisor.file_facts(&places).await.map_err(fault)?;
        if let Some(there) = facts.iter().find(|fact| fact.exists) {
            let message = format!(
                "{} is there already: nothing is written over it",
                there.path
            );
            return Err(Fault::refused(message));
        }
        let definition = hypervisor.definition(step.instance).await.map_err(fault)?;
        let definition =
            definition.ok_or_else(|| Fault::refused("the guest is no longer defined here"))?;
        let standing = match is_live {
            true => Some(hypervisor.standing(step.instance).await.map_err(fault)?),
            false => None,
        };
        let record = Box::new(TransferRecord {
            instance: step.instance,
            plan: step.plan,
            options: step.options,
            reserved: false,
            was_running: state.is_active(),
            definition,
            standing,
            begun: Vec::new(),
            done: Vec::new(),
        });
        self.write_transfer(&record).await?;
        Ok(record)
    }

    /// Puts an empty file wherever a disk will be, so that nobody else takes the
    /// place. One that is there is somebody else's, unless an attempt before may
    /// have made it: then it is empty.
    async fn take_places(
        &mut self,
        mut record: Box<TransferRecord>,
        first: bool,
    ) -> Result<(), Fault> {
        if record.reserved {
            return Ok(());
        }
        let hypervisor = self.node.hypervisor.clone();
        let mut made = Vec::new();
        for disk in &record.plan.disks {
            match hypervisor.reserve_file(&disk.to, false).await {
                Ok(()) => made.push(disk.to.clone()),
                Err(HypervisorError::Exists(path)) if first => {
                    let unused = Unused::places(&record, made.iter().cloned());
                    for path in &made {
                        let removed = destroy::remove(&self.node, path, &unused).await;
                        removed.map_err(fault)?;
                    }
                    let step = self.step(record.instance);
                    self.forget(step, Finished::with(Over::TakenBack)).await?;
                    return Err(fault(HypervisorError::Exists(path)));
                }
                Err(HypervisorError::Exists(_)) if self.is_empty(&disk.to).await? => {}
                Err(error) => return Err(fault(error)),
            }
        }
        record.reserved = true;
        self.write_transfer(&record).await?;
        if let Stage::Transferring(transferring) = &mut self.stage {
            transferring.record = record;
        }
        Ok(())
    }

    /// Removes what was reserved of a transfer that went no further.
    async fn give_places_up(&self, record: &TransferRecord) -> Result<(), Fault> {
        for disk in &record.plan.disks {
            if self.is_empty(&disk.to).await? {
                let unused = Unused::places(record, [disk.to.clone()]);
                let removed = destroy::remove(&self.node, &disk.to, &unused).await;
                removed.map_err(fault)?;
            }
        }
        Ok(())
    }

    async fn write_transfer(&self, record: &TransferRecord) -> Result<(), Fault> {
        let entry = Record::Transfer(Box::new(record.clone()));
        self.write_down(&entry).await
    }

    /// Does a part of the work, or says how it goes.
    pub(in super::super) async fn transfer_instance(
        &mut self,
        step: TransferWork,
    ) -> Result<JobState, Fault> {
        let reference = self.step(step.instance);
        self.same_instance(reference)?;
        if let Stage::Transferring(t) = &self.stage
            && step.part == TransferPart::TakeBack
            && !t.record.reserved
        {
            let record = t.record.clone();
            self.give_places_up(&record).await?;
            return Ok(nothing_left());
        }
        let Stage::Transferring(transferring) = &mut self.stage else {
            return match step.part {
                // It was taken back, and forgotten, before; or never begun.
                TransferPart::TakeBack => {
                    if step.ran {
                        self.start_forgotten(step.instance).await?;
                    }
                    self.never_begun(reference).await?;
                    Ok(nothing_left())
                }
                _ => Err(Fault::refused("this node has not been told of it")),
            };
        };
        let Some(job) = transferring.parts.job(step.part)? else {
            return self.begin_transfer_part(step.part).await;
        };
        let failed = matches!(&job, JobState::Ended { outcome, .. } if *outcome != work::done());
        if step.part == TransferPart::TakeBack && failed {
            // Told once: whoever asks again wants it tried again.
            transferring.parts.forget();
        }
        Ok(job)
    }

    /// Starts a guest that a life of this agent had shut down whose journal is lost.
    async fn start_forgotten(&self, instance: InstanceId) -> Result<(), Fault> {
        let finished = self.registry.finished(self.migration).await?;
        let presence = self.node.hypervisor.presence(instance).await;
        let presence = presence.map_err(fault)?;
        if finished.is_some_and(|f| f.how != Over::NeverBegun) || !is_off(presence) {
            return Ok(());
        }
        warn!(migration = %self.migration, %instance,
            "it was shut down for a transfer that this agent has forgotten: it is started again");
        let started = self.node.hypervisor.start(instance).await;
        started.map_err(fault)
    }

    async fn begin_transfer_part(&mut self, part: TransferPart) -> Result<JobState, Fault> {
        let mut record = self.transferring()?.clone();
        if record.begun.contains(&TransferPart::TakeBack) && part != TransferPart::TakeBack {
            return Err(Fault::refused("it is being taken back"));
        }
        if record.done.contains(&part) && part != TransferPart::TakeBack {
            // What became of the guest since is its owner's doing.
            return Ok(nothing_left());
        }
        if !record.begun.contains(&part) {
            if part == TransferPart::HandOver {
                self.is_as_planned(&record).await?;
            }
            record.begun.push(part);
            self.write_transfer(&record).await?;
        }
        let task = match part {
            TransferPart::Stop => work::Task::Stop {
                options: record.options.as_cold(),
                disk: drover_model::migration::Transfer::default(),
            },
            _ => work::Task::Transfer(Task {
                part,
                record: Box::new(record.clone()),
            }),
        };
        let work = Work::begin(&self.node, self.migration, record.instance, part, task);
        let job = work.job();
        if let Stage::Transferring(transferring) = &mut self.stage {
            *transferring.record = record;
            transferring.parts.begin(work);
        }
        Ok(job)
    }

    /// Refuses if somebody has defined the guest anew since it was planned what changes:
    /// some of that would be lost by handing over, or by taking that back.
    async fn is_as_planned(&self, record: &TransferRecord) -> Result<(), Fault> {
        let hypervisor = &self.node.hypervisor;
        let now = fingerprint(&**hypervisor, record.instance).await;
        let now = now.map_err(fault)?;
        let before = hypervisor.fingerprint(&record.definition).map_err(fault)?;
        match now.is_some_and(|now| now != before) {
            false => Ok(()),
            true => Err(Fault::refused(
                "the guest's lasting definition was changed during the transfer, which would \
                 lose the change: ask again",
            )),
        }
    }

    fn transferring(&self) -> Result<&TransferRecord, Fault> {
        match &self.stage {
            Stage::Transferring(transferring) => Ok(&transferring.record),
            _ => Err(Fault::refused("no transfer is under way here")),
        }
    }

    /// A part is over.
    pub(in super::super) async fn transferred(&mut self, part: TransferPart, ended: Ended) {
        let Stage::Transferring(transferring) = &mut self.stage else {
            return;
        };
        transferring.parts.ended(part, ended.clone());
        let record = &mut transferring.record;
        if matches!(ended.outcome, Outcome::Moved { .. }) && !record.done.contains(&part) {
            record.done.push(part);
            let record = record.clone();
            if let Err(e) = self.write_transfer(&record).await {
                // Asked again after a restart, the part finds it done.
                warn!(migration = %self.migration, error = %e, "the journal lacks the end of a part");
            }
        }
    }

    /// Has the part under way end, and waits for that; what is short is let end.
    pub(in super::super) async fn abort_transfer(&mut self, step: StepRef) -> Result<(), Fault> {
        self.same_instance(step)?;
        if let Stage::Transferring(transferring) = &mut self.stage
            && let Some(TransferPart::Stop | TransferPart::Copy) = transferring.parts.under_way()
            && let Some((part, ended)) = transferring.parts.cancel().await
        {
            self.transferred(part, ended).await;
        }
        Ok(())
    }

    /// The guest is the receiver's for good: its old disks go.
    pub(in super::super) async fn post_transfer(
        &mut self,
        step: StepRef,
    ) -> Result<CleanUp, Fault> {
        self.same_instance(step)?;
        if matches!(self.stage, Stage::Idle) {
            return self.remembered().await;
        }
        let record = self.transferring()?.clone();
        let begun = |part| record.begun.contains(&part);
        if !begun(TransferPart::HandOver) || begun(TransferPart::TakeBack) {
            return Err(Fault::refused("the guest was not handed over here"));
        }
        let clean_up = self.remove_givers_files(&record).await?;
        let over = self.forget_if_clean(step, Over::HandedOver, clean_up).await;
        if matches!(self.stage, Stage::Idle) {
            self.node.counters.count_outcome(&work::done());
        }
        over
    }

    /// Removes the disks that the guest had before; those that it was not seen to do
    /// without are kept.
    pub(in super::super) async fn remove_givers_files(
        &self,
        record: &TransferRecord,
    ) -> Result<CleanUp, Fault> {
        let mut clean_up = CleanUp::default();
        let proof = self.on_new_files(record).await?;
        for disk in &record.plan.disks {
            if proof.covers(&disk.from) {
                let removed = destroy::remove(&self.node, &disk.from, &proof).await;
                self.note_removed(&disk.from, removed, &mut clean_up)?;
            } else {
                clean_up.kept.push(format!(
                    "{} is left: the guest was not seen to use {} instead",
                    disk.from, disk.to
                ));
            }
        }
        Ok(clean_up)
    }

    /// Which of the giver's files the guest does without, now and after its next
    /// start: it has the receiver's.
    async fn on_new_files(&self, record: &TransferRecord) -> Result<OtherFiles, Fault> {
        let guests = self.both(record.instance).await?;
        let disks = &record.plan.disks;
        let new = self.see_files(disks.iter().map(|disk| (&disk.to, &disk.to)));
        let new = new.await?;
        let is_there = |path: &str| new.iter().any(|f| f.path == path && f.is_in_place());
        let pairs = disks.iter().map(|disk| (&*disk.from, &*disk.to));
        Ok(OtherFiles::used(&guests, pairs, is_there))
    }

    /// Forgets a transfer that was taken back.
    pub(in super::super) async fn rollback_transfer(
        &mut self,
        step: StepRef,
    ) -> Result<CleanUp, Fault> {
        self.same_instance(step)?;
        if matches!(self.stage, Stage::Idle) {
            return self.never_begun(step).await;
        }
        let record = self.transferring()?;
        if !record.begun.is_empty() && !record.done.contains(&TransferPart::TakeBack) {
            return Err(Fault::refused("the transfer was not taken back here"));
        }
        let failure = self.failure();
        self.forget(step, Finished::with(Over::Stayed)).await?;
        self.node.counters.count_outcome(&failure);
        Ok(CleanUp::default())
    }
}

/// Files of a guest, by its running and its lasting definition, that it writes.
fn paths_of<'a>(guests: impl Iterator<Item = &'a Guest>) -> Vec<String> {
    let disks = guests.flat_map(|guest| guest.disks.iter());
    let mut paths: Vec<String> = disks
        .filter(|disk| !disk.read_only)
        .filter_map(|disk| disk.local_path().map(str::to_owned))
        .collect();
    paths.sort();
    paths.dedup();
    paths
}

fn nothing_left() -> JobState {
    JobState::Ended {
        outcome: work::done(),
        progress: Box::default(),
    }
}

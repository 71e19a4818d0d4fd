//! The destination's steps: what it answers, what it makes ready, and what it
//! keeps or takes back. It never touches what a migration did not make here.

use std::path::Path;

use drover_model::{
    api::{
        compute::{
            CheckDestination, CleanUp, DestinationFacts, Ended, Mark, PreLiveMigration, RemoveCopy,
            StepRef,
        },
        fault::Fault,
    },
    guest::{Disk, DiskSource, Guest, PowerState, Presence},
};
use drover_runtime::blocking::blocking_io;
use tokio::task::JoinSet;
use tracing::{info, warn};

use super::{
    actor::{Actor, Stage},
    contents::{are_as_checked, used_paths},
    destroy::{self, Redundant},
    past::Finished,
};
use crate::{
    faults::hypervisor as fault,
    hypervisor::{DestinationQuestion, HypervisorError},
    journal::{DestinationRecord, Inodes, NewDisk, Record},
};

/// Disks of one guest. A virtual machine has far fewer slots.
const MAX_DISKS: usize = 256;

impl Actor {
    /// What this node is and has for a guest that may come.
    pub(super) async fn check_destination(
        &mut self,
        step: CheckDestination,
    ) -> Result<DestinationFacts, Fault> {
        self.registry.could_have(self.step(step.guest.id)).await?;
        let (hypervisor, source) = (&self.node.hypervisor, &step.source);
        let (facts, reach_source, probe_port) = tokio::join!(
            self.destination_facts(&step.guest, &step.marks),
            hypervisor.reach(&source.address, source.libvirt_port),
            hypervisor.open_probe_port(),
        );
        Ok(DestinationFacts {
            reach_source: reach_source.map_err(String::from),
            probe_port,
            ..facts?
        })
    }

    /// What can be said of a guest that may come, roads apart: none was tried.
    pub(super) async fn destination_facts(
        &self,
        guest: &Guest,
        marks: &[Mark],
    ) -> Result<DestinationFacts, Fault> {
        let hypervisor = &self.node.hypervisor;
        let (paths, used) = (beside(guest), used_paths(guest));
        let (inventory, answer, files, contents, addresses) = tokio::join!(
            hypervisor.inventory(),
            hypervisor.answer_destination(DestinationQuestion { guest, marks }),
            hypervisor.file_facts(&paths),
            hypervisor.contents(&used, marks),
            hypervisor.addresses(&guest.bound),
        );
        let (inventory, answer) = (inventory.map_err(fault)?, answer.map_err(fault)?);
        Ok(DestinationFacts {
            inventory,
            emulator_present: answer.emulator_present,
            machine_supported: answer.machine_supported,
            virt_type_supported: answer.virt_type_supported,
            cpu: answer.cpu,
            networks: answer.networks,
            same_uuid: answer.same_uuid,
            same_name: answer.same_name,
            disks: answer.disks,
            files: files.map_err(fault)?,
            contents: contents.map_err(fault)?,
            addresses: addresses.map_err(fault)?,
            disk_port: hypervisor.disk_port(),
            reach_source: Ok(()),
            probe_port: Err("none was opened".to_owned()),
        })
    }

    /// Makes ready for the guest: its disks to be copied are created, empty. Asked
    /// again, looks once more at what is there and is not copied.
    pub(super) async fn pre_live_migration(&mut self, step: PreLiveMigration) -> Result<(), Fault> {
        let reference = self.step(step.guest.id);
        self.same_instance(reference)?;
        are_as_checked(&*self.node.hypervisor, &step.checked).await?;
        if let Stage::Arriving(record) = &self.stage {
            all_are_ours(record, &new_disks(&step.guest, &step.copied_disks)?)?;
        }
        let (record, first) = match &self.stage {
            Stage::Arriving(record) if record.prepared => return Ok(()),
            // Begun by a former life of the agent, or broken off by a fault.
            Stage::Arriving(record) => (record.clone(), false),
            Stage::Idle => (self.begin_arriving(&step).await?, true),
            _ => {
                return Err(Fault::refused(
                    "this node does something else for this migration",
                ));
            }
        };
        self.create_disks(record, first).await
    }

    /// Writes down what is to be created, having seen that nothing is there.
    async fn begin_arriving(
        &mut self,
        step: &PreLiveMigration,
    ) -> Result<DestinationRecord, Fault> {
        self.may_begin(self.step(step.guest.id)).await?;
        let instance = step.guest.id;
        let disks = new_disks(&step.guest, &step.copied_disks)?;
        let reference = self.step(instance);
        self.registry.hold(reference).await?;
        let record = DestinationRecord {
            instance,
            disks,
            prepared: false,
            ran_here: false,
            inodes: Inodes::new(),
        };
        let begun = async {
            self.registry.claim(self.migration, &record.places())?;
            self.nothing_is_here(&record).await?;
            self.nobody_else_writes(step, &record).await?;
            self.write(&record).await
        };
        if let Err(fault) = begun.await {
            self.registry.release(reference);
            return Err(fault);
        }
        self.stage = Stage::Arriving(record.clone());
        Ok(record)
    }

    /// Nothing is there before the migration holds these places.
    async fn nothing_is_here(&self, record: &DestinationRecord) -> Result<(), Fault> {
        let presence = self.node.hypervisor.presence(record.instance).await;
        let presence = presence.map_err(fault)?;
        if presence != Presence::Absent {
            let message = format!("the instance is on this node already ({presence})");
            return Err(Fault::refused(message));
        }
        for disk in &record.disks {
            let path = disk.path.clone();
            let found = blocking_io(move || std::fs::symlink_metadata(path));
            if found.await.is_ok() {
                return Err(Fault::refused(format!("{} is there already", disk.path)));
            }
        }
        Ok(())
    }

    /// What the guest writes is no other guest's: nor is a disk that is not there, whose
    /// guest would find this one's in its place.
    async fn nobody_else_writes(
        &self,
        step: &PreLiveMigration,
        record: &DestinationRecord,
    ) -> Result<(), Fault> {
        let beside = step.guest.files.iter().map(|file| file.path.clone());
        let paths: Vec<String> = beside.chain(record.places()).collect();
        let facts = self.node.hypervisor.file_facts(&paths).await;
        for (path, fact) in paths.iter().zip(facts.map_err(fault)?) {
            if fact.in_use {
                return Err(Fault::refused(format!(
                    "another guest of this node uses {path}, which this one would write"
                )));
            }
        }
        Ok(())
    }

    async fn create_disks(
        &mut self,
        mut record: DestinationRecord,
        first: bool,
    ) -> Result<(), Fault> {
        if !first {
            self.has_not_come(&record).await?;
        }
        self.hold_places(&mut record, first).await?;
        let mut creating = JoinSet::new();
        for new in record.disks.iter().filter(|new| !new.created).cloned() {
            let inode = record.inodes.get(&new.path).copied();
            let inode = inode.ok_or_else(|| {
                Fault::not_now(format!("{} holds a disk's place and is not seen", new.path))
            })?;
            let node = self.node.clone();
            creating.spawn(async move {
                let created = node.hypervisor.create_disk(&new.disk, inode).await;
                (new.path, created)
            });
        }
        let mut failure = None;
        while let Some(ended) = creating.join_next().await {
            match ended {
                Ok((path, created)) => {
                    if let Err(e) = take_note(&mut record.disks, &path, created) {
                        failure = Some(e);
                    }
                }
                Err(died) => failure = Some(Fault::bug(format!("creating a disk died: {died}"))),
            }
        }
        record.prepared = failure.is_none();
        let instance = record.instance;
        self.keep_arriving(record).await?;
        match failure {
            Some(fault) => Err(fault),
            None => {
                info!(migration = %self.migration, %instance, "ready for the guest to come");
                Ok(())
            }
        }
    }

    /// What a former attempt has left in a disk's place is nobody's: the transfer begins
    /// when all of them are there.
    async fn has_not_come(&self, record: &DestinationRecord) -> Result<(), Fault> {
        let presence = self.node.hypervisor.presence(record.instance).await;
        let presence = presence.map_err(fault)?;
        match presence == Presence::Absent && !record.ran_here {
            true => Ok(()),
            false => Err(Fault::refused(format!(
                "the guest may have come to this node ({presence}): its disks stay"
            ))),
        }
    }

    /// Holds the places of the disks, and writes down by which files: whatever is in those
    /// later is the migration's own.
    async fn hold_places(
        &mut self,
        record: &mut DestinationRecord,
        first: bool,
    ) -> Result<(), Fault> {
        let open = record.disks.iter().filter(|disk| !record.has_made(disk));
        let open: Vec<String> = open.map(|disk| disk.path.clone()).collect();
        if open.is_empty() {
            return Ok(());
        }
        for path in &open {
            if !self.hold_place(path, false, first).await? {
                // Later on, a former version of the agent may have half made it: it stays,
                // and is named when the rest is taken back.
                if first {
                    record.disks.retain(|disk| disk.path != *path);
                    self.keep_arriving(record.clone()).await?;
                }
                return Err(fault(HypervisorError::Exists(path.clone())));
            }
        }
        record.inodes.extend(self.inodes(open).await?);
        self.keep_arriving(record.clone()).await
    }

    async fn keep_arriving(&mut self, record: DestinationRecord) -> Result<(), Fault> {
        self.write(&record).await?;
        self.stage = Stage::Arriving(record);
        Ok(())
    }

    /// The places where the migration has made something.
    async fn made_by(&self, record: &DestinationRecord) -> Result<Vec<String>, Fault> {
        let mut made = Vec::new();
        for disk in &record.disks {
            if record.has_made(disk) || self.is_empty(&disk.path).await? {
                made.push(disk.path.clone());
            }
        }
        Ok(made)
    }

    /// What is in the places that the migration was to have here, or had, and is not known
    /// to be its own; in words.
    async fn left_of_others(
        &self,
        record: &DestinationRecord,
        known: impl Fn(&String) -> bool,
    ) -> Result<Vec<String>, Fault> {
        let mut places = record.places();
        places.extend(record.inodes.keys().cloned());
        places.sort_unstable();
        places.dedup();
        places.retain(|path| !known(path));
        self.left_of(places).await
    }

    async fn write(&self, record: &DestinationRecord) -> Result<(), Fault> {
        let entry = Record::Destination(record.clone());
        self.write_down(&entry).await
    }

    /// The guest came: what was made for it is its own from now on, whatever became
    /// of it since. Nothing is removed.
    pub(super) async fn post_at_destination(&mut self, step: StepRef) -> Result<CleanUp, Fault> {
        self.same_instance(step)?;
        let hypervisor = self.node.hypervisor.clone();
        let presence = hypervisor.presence(step.instance).await.map_err(fault)?;
        match presence {
            Presence::Present(_) => {}
            Presence::Incoming => return Err(Fault::not_now("the guest is still arriving")),
            Presence::Absent => return self.leave_what_came(step).await,
        }
        let (guest, job) = tokio::join!(
            hypervisor.guest(step.instance),
            hypervisor.completed_job(step.instance)
        );
        let mut clean_up = CleanUp {
            warnings: arrival_warnings(guest),
            ..CleanUp::default()
        };
        if let Ok(Some(job)) = job {
            clean_up.downtime_ms = job.downtime_ms;
            clean_up.total_ms = Some(job.elapsed_ms);
        }
        if matches!(self.stage, Stage::Arriving(_)) {
            let finished = Finished {
                how: Ended::Arrived,
                job: None,
                clean_up: clean_up.clone(),
            };
            self.forget(step, finished).await?;
        }
        Ok(clean_up)
    }

    /// The guest came, and is no longer defined here: its disks may be the newest
    /// there are.
    async fn leave_what_came(&mut self, step: StepRef) -> Result<CleanUp, Fault> {
        let Stage::Arriving(record) = &self.stage else {
            return self.remembered().await;
        };
        let how = match record.ran_here {
            true => Ended::Arrived,
            false => Ended::MadeWay,
        };
        let left = record.disks.iter().map(|disk| &disk.path);
        let left = left.map(|path| format!("{path} is left: the guest was taken away by hand"));
        let clean_up = CleanUp {
            kept: left.collect(),
            ..CleanUp::default()
        };
        warn!(migration = %self.migration, instance = %step.instance, kept = ?clean_up.kept,
            "the guest that came is no longer defined on this node");
        self.forget_if_clean(step, how, clean_up).await
    }

    /// Takes back what this migration made here for a guest that never came, by
    /// evidence of the copy that stays (invariant 11).
    pub(super) async fn rollback_at_destination(
        &mut self,
        ask: RemoveCopy,
    ) -> Result<CleanUp, Fault> {
        let step = self.step(ask.instance);
        self.same_instance(step)?;
        self.note_arrival().await;
        let presence = self.node.hypervisor.presence(step.instance).await;
        let presence = presence.map_err(fault)?;
        if presence.is_active() {
            let message = format!("the guest is active on this node ({presence})");
            return Err(Fault::refused(message));
        }
        let record = match &self.stage {
            Stage::Arriving(record) => record.clone(),
            Stage::Idle => {
                self.leave_alone(step, presence);
                return self.never_begun(step).await;
            }
            _ => {
                return Err(Fault::refused(
                    "this node does something else for this migration",
                ));
            }
        };
        if record.ran_here || presence != Presence::Absent && presence != Presence::Incoming {
            return Err(Fault::refused(format!(
                "the guest ran on this node ({presence} now): nothing of it is taken back"
            )));
        }
        let survivor = ask.survivor.as_ref();
        let made = self.made_by(&record).await?;
        let replaced = self.replaced(&record.inodes).await?;
        let is_known = |path: &String| made.contains(path) || replaced.contains(path);
        let mut kept = self.left_of_others(&record, is_known).await?;
        let (twice, alone): (Vec<String>, Vec<String>) = made
            .into_iter()
            .partition(|path| destroy::has_its_own(survivor, path) && !replaced.contains(path));
        kept.extend(self.left_here(alone, &replaced).await?);
        let mut clean_up = CleanUp {
            kept,
            ..CleanUp::default()
        };
        if presence == Presence::Incoming || !record.disks.is_empty() {
            let proof = self.source_stays(&ask, &twice)?;
            if presence == Presence::Incoming {
                let discarded = destroy::discard_incoming(&self.node, step.instance, &proof);
                discarded.await.map_err(fault)?;
            }
            for path in &twice {
                let removed = destroy::remove(&self.node, path, &proof).await;
                self.note_removed(path, removed, &mut clean_up)?;
            }
        }
        info!(migration = %self.migration, instance = %step.instance,
            removed = ?clean_up.removed, "took back what was made ready for the guest");
        self.forget_if_clean(step, Ended::TakenBack, clean_up).await
    }

    /// The journal knows of nothing that this migration made here.
    fn leave_alone(&self, step: StepRef, presence: Presence) {
        if presence != Presence::Absent {
            warn!(migration = %self.migration, instance = %step.instance, ?presence,
                "a domain of the instance is here that, as far as the journal knows, this \
                 migration did not make: left alone");
        }
    }

    fn source_stays(&self, ask: &RemoveCopy, disks: &[String]) -> Result<Redundant, Fault> {
        let survivor = ask.survivor.as_ref();
        if let Some(there) = survivor.filter(|s| s.copy.known.moved_away) {
            return Err(Fault::refused(format!(
                "{} handed the guest over to this node: nothing of it is taken back",
                there.host
            )));
        }
        let disks = disks.iter().map(String::as_str);
        Redundant::by(survivor, &self.node.settings.host, 0, disks)
    }
}

/// Refuses to go on without a disk in whose place somebody else has put a file.
fn all_are_ours(record: &DestinationRecord, disks: &[NewDisk]) -> Result<(), Fault> {
    let is_ours = |disk: &NewDisk| record.disks.iter().any(|own| own.path == disk.path);
    match disks.iter().find(|disk| !is_ours(disk)) {
        None => Ok(()),
        Some(other) => Err(Fault::refused(format!(
            "somebody has put another file at {}",
            other.path
        ))),
    }
}

/// Notes what came of creating a disk. What somebody else has put there since, or uses,
/// is not the migration's own and leaves the list.
fn take_note(
    disks: &mut Vec<NewDisk>,
    path: &str,
    created: Result<(), HypervisorError>,
) -> Result<(), Fault> {
    if let Err(HypervisorError::Exists(_) | HypervisorError::WrongState(_)) = &created {
        disks.retain(|disk| disk.path != path);
    }
    created.map_err(fault)?;
    for disk in disks.iter_mut().filter(|disk| disk.path == path) {
        disk.created = true;
    }
    Ok(())
}

/// What is wrong with a guest that has arrived. It is healthy, so these are
/// warnings (invariant 2).
fn arrival_warnings(guest: Result<Option<Guest>, HypervisorError>) -> Vec<String> {
    let mut warnings = Vec::new();
    match guest {
        Ok(Some(guest)) => {
            if !guest.persistent {
                warnings.push(
                    "its definition is transient here and will be gone when it stops: \
                     define it with virsh"
                        .to_owned(),
                );
            }
            match guest.power_state {
                PowerState::Paused => warnings.push("the guest is paused".to_owned()),
                state if !state.is_active() => warnings.push("the guest is off".to_owned()),
                _ => {}
            }
        }
        Ok(None) => warnings.push("libvirt no longer knows the guest".to_owned()),
        Err(e) => {
            warn!(error = %e, "the guest that arrived could not be looked at");
            warnings.push(format!("its definition could not be looked at: {e}"));
        }
    }
    warnings
}

/// What lies under a guest's disks and beside them, and its block devices.
pub(super) fn beside(guest: &Guest) -> Vec<String> {
    let under = guest.disks.iter().flat_map(|disk| &disk.backing);
    let mut paths: Vec<String> = under.map(|image| image.path.clone()).collect();
    let devices = guest.disks.iter().filter_map(|disk| match &disk.source {
        DiskSource::Block { path } => Some(path.clone()),
        _ => None,
    });
    paths.extend(devices);
    paths.extend(guest.files.iter().map(|file| file.path.clone()));
    paths.sort_unstable();
    paths.dedup();
    paths
}

/// The disks to create, all of them such as a migration may copy.
fn new_disks(guest: &Guest, targets: &[String]) -> Result<Vec<NewDisk>, Fault> {
    if targets.len() > MAX_DISKS {
        return Err(Fault::refused(format!("more than {MAX_DISKS} disks")));
    }
    targets
        .iter()
        .map(|target| new_disk(guest, target))
        .collect()
}

fn new_disk(guest: &Guest, target: &str) -> Result<NewDisk, Fault> {
    let disk = guest.disks.iter().find(|disk| disk.target == target);
    let path = disk
        .filter(|disk| disk.is_copied_when_local())
        .and_then(Disk::local_path)
        .filter(|path| Path::new(path).is_absolute());
    match (disk, path) {
        (Some(disk), Some(path)) => Ok(NewDisk {
            disk: disk.clone(),
            path: path.to_owned(),
            created: false,
        }),
        _ => Err(Fault::refused(format!(
            "{target} is no disk that could be copied"
        ))),
    }
}

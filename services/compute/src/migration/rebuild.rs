//! The new home's steps of an evacuation: a guest of a dead node is defined here
//! from what was kept of it, and started.
//!
//! ```text
//!  check ─► prep_rebuild ─► Rebuilding ─► rebuild ─► (guest runs) ─► post_rebuild ─► (nothing left)
//!             journal first ┘   ▲ restart    │
//!                               └────────────┴─ it does not run ─► rollback_rebuild ─► (nothing left)
//! ```
//!
//! The conductor alone knows that the other node is dead (invariant 1); it asks
//! for nothing here before. Disks are shared, so none is made or removed. What is
//! taken back is the definition that has this evacuation's generation, and only
//! while the guest is off.

use drover_model::{
    api::{
        compute::{
            CheckEvacuation, CleanUp, Ended, EvacuationFacts, GuestLocation, RebuildInstance,
            StepRef,
        },
        fault::Fault,
    },
    content::Seen,
    error::ErrorClass,
    guest::{Disk, Presence},
};
use tracing::{info, warn};

use super::{
    actor::{Actor, Stage},
    contents::are_as_checked,
    destroy::{self, NeverRan},
    past::Finished,
};
use crate::{
    faults::hypervisor as fault,
    hypervisor::{HypervisorError, StorageFact},
    journal::{RebuildRecord, Record},
};

impl Actor {
    /// What this node is and has for a guest whose own node is dead.
    pub(super) async fn check_evacuation(
        &mut self,
        step: CheckEvacuation,
    ) -> Result<EvacuationFacts, Fault> {
        self.registry.could_have(self.step(step.guest.id)).await?;
        let (facts, storage) = tokio::join!(
            // Nothing comes from a dead node, so no road is tried.
            self.destination_facts(&step.guest, &[]),
            self.node.hypervisor.storage_facts(&step.identities),
        );
        let (mut destination, storage) = (facts?, storage.map_err(fault)?);
        for disk in &mut destination.disks {
            let own = step.guest.disks.iter().find(|d| d.target == disk.target);
            let path = own.and_then(Disk::local_path);
            disk.shared = path.is_some_and(|path| is_same(&storage, path));
        }
        for file in &mut destination.contents {
            if let Seen::File { marked, .. } = &mut file.seen {
                *marked = is_same(&storage, &file.path);
            }
        }
        Ok(EvacuationFacts {
            destination,
            foreign_files: foreign(&step, &storage),
        })
    }

    /// Defines the guest, shut off.
    pub(super) async fn prep_rebuild(&mut self, step: RebuildInstance) -> Result<(), Fault> {
        self.same_instance(self.step(step.instance))?;
        let record = match &self.stage {
            // Begun by a former life of the agent, or broken off by a fault.
            Stage::Rebuilding(record) if record.generation == step.generation => (**record).clone(),
            Stage::Idle => self.begin_rebuilding(step).await?,
            _ => {
                return Err(Fault::refused(
                    "this node does something else for this migration",
                ));
            }
        };
        self.define_rebuilt(&record).await?;
        info!(migration = %self.migration, instance = %record.instance,
            generation = record.generation, "the guest of a dead node is defined");
        Ok(())
    }

    async fn begin_rebuilding(&mut self, step: RebuildInstance) -> Result<RebuildRecord, Fault> {
        self.may_begin(self.step(step.instance)).await?;
        let reference = self.step(step.instance);
        self.registry.hold(reference).await?;
        let record = RebuildRecord {
            instance: step.instance,
            domain: step.domain,
            generation: step.generation,
            checked: step.checked,
            started: false,
        };
        let begun = async {
            let presence = self.node.hypervisor.presence(record.instance).await;
            let presence = presence.map_err(fault)?;
            if presence != Presence::Absent {
                let message = format!("the instance is on this node already ({presence})");
                return Err(Fault::refused(message));
            }
            self.write_rebuilding(&record).await
        };
        if let Err(fault) = begun.await {
            self.registry.release(reference);
            return Err(fault);
        }
        self.stage = Stage::Rebuilding(Box::new(record.clone()));
        Ok(record)
    }

    async fn write_rebuilding(&self, record: &RebuildRecord) -> Result<(), Fault> {
        let entry = Record::Rebuild(Box::new(record.clone()));
        self.write_down(&entry).await
    }

    async fn define_rebuilt(&self, record: &RebuildRecord) -> Result<(), Fault> {
        let hypervisor = &self.node.hypervisor;
        let defined = hypervisor.define_rebuilt(record.instance, &record.domain, record.generation);
        defined.await.map_err(fault)
    }

    /// Starts the guest.
    pub(super) async fn rebuild(&mut self, step: StepRef) -> Result<GuestLocation, Fault> {
        self.same_instance(step)?;
        let Stage::Rebuilding(record) = &self.stage else {
            let location = self.location(step.instance).await?;
            // Kept here already, and asked for again.
            let finished = self.registry.finished(self.migration).await?;
            if finished.is_some() && location.presence.is_active() {
                return Ok(location);
            }
            let message = "nothing was defined on this node for this migration";
            return Err(Fault::refused(message));
        };
        let mut record = (**record).clone();
        let ran_before = record.started;
        if !record.started {
            record.started = true;
            self.write_rebuilding(&record).await?;
            self.stage = Stage::Rebuilding(Box::new(record.clone()));
        }
        // Nothing if it is there. Never starts what another has put in its place.
        self.define_rebuilt(&record).await?;
        are_as_checked(&*self.node.hypervisor, &record.checked).await?;
        let started = self.node.hypervisor.start(step.instance).await;
        if let Err(error) = started {
            return Err(self.not_started(record, ran_before, error).await?);
        }
        let location = self.location(step.instance).await?;
        info!(migration = %self.migration, instance = %step.instance,
            presence = ?location.presence, "the guest of a dead node is started");
        Ok(location)
    }

    /// What the hypervisor refused to start never ran here, unless it may have been
    /// started before.
    async fn not_started(
        &mut self,
        mut record: RebuildRecord,
        ran_before: bool,
        error: HypervisorError,
    ) -> Result<Fault, Fault> {
        let presence = self.node.hypervisor.presence(record.instance).await;
        let presence = presence.map_err(fault)?;
        if error.class() == ErrorClass::Refused && !ran_before && !presence.is_active() {
            record.started = false;
            self.write_rebuilding(&record).await?;
            self.stage = Stage::Rebuilding(Box::new(record));
        }
        Ok(fault(error))
    }

    /// The guest is here for good.
    pub(super) async fn post_rebuild(&mut self, step: StepRef) -> Result<CleanUp, Fault> {
        self.same_instance(step)?;
        let Stage::Rebuilding(record) = &self.stage else {
            return self.remembered().await;
        };
        let started = record.started;
        let presence = self.node.hypervisor.presence(step.instance).await;
        let presence = presence.map_err(fault)?;
        // Whether it is off by now is its owner's doing.
        if !started || !matches!(presence, Presence::Present(_)) {
            let message = format!("the guest does not run on this node ({presence})");
            return Err(Fault::refused(message));
        }
        self.forget(step, Finished::with(Ended::Arrived)).await?;
        Ok(CleanUp::default())
    }

    /// Takes back what this migration defined here. Refused if the guest ran here.
    pub(super) async fn rollback_rebuild(&mut self, step: StepRef) -> Result<CleanUp, Fault> {
        self.same_instance(step)?;
        let record = match &self.stage {
            Stage::Rebuilding(record) => (**record).clone(),
            Stage::Idle => return self.never_begun(step).await,
            _ => {
                return Err(Fault::refused(
                    "this node does something else for this migration",
                ));
            }
        };
        let hypervisor = self.node.hypervisor.clone();
        let presence = hypervisor.presence(step.instance).await.map_err(fault)?;
        let proof = match presence {
            // Nothing is taken back of what is not there, though it ran.
            Presence::Absent => None,
            _ => Some(NeverRan::of(&record, presence)?),
        };
        let here = hypervisor.guest(step.instance).await.map_err(fault)?;
        match (here.map(|guest| guest.generation), &proof) {
            (None, _) => {}
            (Some(generation), Some(proof)) if generation == record.generation => {
                let withdrawn = destroy::withdraw(&self.node, step.instance, proof).await;
                withdrawn.map_err(fault)?;
                info!(migration = %self.migration, instance = %step.instance,
                    "took back the definition that was made for the guest");
            }
            (Some(generation), _) => warn!(migration = %self.migration, instance = %step.instance,
                generation, "a domain of the instance is here that this migration did not \
                 define: left alone"),
        }
        self.forget_if_clean(step, Ended::TakenBack, CleanUp::default())
            .await
    }
}

fn is_same(storage: &[StorageFact], path: &str) -> bool {
    let fact = storage.iter().find(|fact| fact.path == path);
    fact.is_some_and(|fact| fact.same.is_ok())
}

/// Files other than disks that are not the same here, and why; those whose content
/// was told are compared by that.
fn foreign(step: &CheckEvacuation, storage: &[StorageFact]) -> Vec<String> {
    let disks = step.guest.disks.iter().filter_map(Disk::local_path);
    let disks: Vec<&str> = disks.collect();
    let is_disk = |path: &str| disks.contains(&path);
    let is_told = |path: &str| step.contents.iter().any(|file| file.path == path);
    let others = storage
        .iter()
        .filter(|fact| !is_disk(&fact.path) && !is_told(&fact.path));
    let foreign = others.filter_map(|fact| {
        let why = fact.same.as_ref().err()?;
        Some(format!("{}: {why}", fact.path))
    });
    foreign.collect()
}

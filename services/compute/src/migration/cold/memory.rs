//! A cold migration's source whose agent has lost its journal, and is told by the
//! conductor what was under way: how far it had come shows in libvirt and in the
//! names of the guest's files.

use drover_model::{
    api::{
        compute::{ColdMemory, ColdPart, StepRef},
        fault::Fault,
    },
    guest::Presence,
};
use tracing::warn;

use super::{
    super::actor::{Actor, Stage},
    files,
    source::Leaving,
};
use crate::{
    faults::hypervisor as fault,
    hypervisor::Definition,
    journal::{LeavingRecord, Thaw},
};

impl Actor {
    /// Takes a migration up again of which nothing is known here. One that ended
    /// here has ended.
    ///
    /// # Errors
    /// The list of files is none that is made here, another migration has the guest,
    /// or the journal cannot be written.
    pub(super) async fn recall(
        &mut self,
        step: StepRef,
        memory: Option<ColdMemory>,
        ran: bool,
    ) -> Result<(), Fault> {
        let Some(memory) = memory else {
            return Ok(());
        };
        let over = self.registry.finished(self.migration).await?;
        if !matches!(self.stage, Stage::Idle) || over.is_some() {
            return Ok(());
        }
        files::check(&memory.files)?;
        self.registry.hold(step).await?;
        let recalled = async {
            let record = self.remembered_record(step, memory, ran).await?;
            self.write_leaving(&record).await?;
            Ok(record)
        };
        match recalled.await {
            Ok(record) => {
                warn!(migration = %self.migration, instance = %step.instance,
                    "the journal of this migration is lost: it is taken up as the conductor tells it");
                self.stage = Stage::Leaving(Box::new(Leaving::resume(Box::new(record))));
                Ok(())
            }
            Err(fault) => {
                self.registry.release(step);
                Err(fault)
            }
        }
    }

    async fn remembered_record(
        &self,
        step: StepRef,
        memory: ColdMemory,
        ran: bool,
    ) -> Result<LeavingRecord, Fault> {
        let hypervisor = &self.node.hypervisor;
        let presence = hypervisor.presence(step.instance).await.map_err(fault)?;
        let guests = self.both(step.instance).await?;
        let overlays = match presence {
            Presence::Absent => files::overlays(&memory.files),
            // One that is not used was never written to.
            _ => files::used_overlays(&memory.files, &guests),
        };
        Ok(LeavingRecord {
            instance: step.instance,
            was_running: ran,
            asked_to_stop: ran,
            done: vec![ColdPart::Copy],
            begun: vec![ColdPart::PreCopy, ColdPart::Stop, ColdPart::Copy],
            definition: Some(Definition::of_domain(memory.domain)),
            overlays,
            kept: files::kept(&memory.files, self.migration),
            devices: files::devices(&memory.files),
            under: files::under(&memory.files),
            generation: guests.first().map_or(0, |guest| guest.generation),
            withdrawn: true,
            aside: false,
            sent: Vec::new(),
            sent_as: None,
            defines: false,
            thaw: Thaw::NotBegun,
        })
    }
}

//! What this node sees of its copy of a guest, for whoever has to prove that
//! another may go.

use drover_model::{
    api::{
        compute::{AsideSeen, CopyHistory, CopySeen, FileSeen, StepRef},
        fault::Fault,
    },
    guest::{Disk, Guest, Presence},
    ids::InstanceId,
};
use tracing::{info, warn};

use super::{
    actor::{Actor, Stage},
    sending::job_of,
    shared::has_moved,
};
use crate::{
    faults::hypervisor as fault,
    hypervisor::{HypervisorError, Job},
    journal::{LeavingRecord, Record},
};

impl Actor {
    /// This node's copy, looked at now.
    pub(super) async fn look_at_copy(&mut self, step: StepRef) -> Result<CopySeen, Fault> {
        self.same_instance(step)?;
        self.note_arrival().await;
        let hypervisor = &self.node.hypervisor;
        let job = async {
            match hypervisor.job(step.instance).await {
                Err(HypervisorError::NoSuchGuest(_)) => Ok(Job::None),
                other => other,
            }
        };
        let asked = tokio::try_join!(
            hypervisor.presence(step.instance),
            job,
            hypervisor.guest(step.instance),
            hypervisor.lasting_guest(step.instance)
        );
        let (presence, job, now, lasting) = asked.map_err(fault)?;
        let mut paths: Vec<String> = now.iter().chain(&lasting).flat_map(files_of).collect();
        paths.sort_unstable();
        paths.dedup();
        let files = match presence {
            Presence::Absent => Vec::new(),
            _ => self.see_files(paths.iter().map(|p| (p, p))).await?,
        };
        let aside = match &self.stage {
            Stage::Leaving(leaving) if leaving.record.aside => {
                let record = leaving.record.clone();
                Some(self.see_aside(&record).await?)
            }
            _ => None,
        };
        Ok(CopySeen {
            presence,
            migrating: matches!(job, Job::Migration(_)),
            generation: lasting.or(now).map(|guest| guest.generation),
            files,
            aside,
            known: self.history().await?,
        })
    }

    async fn see_aside(&self, record: &LeavingRecord) -> Result<AsideSeen, Fault> {
        // Overlays go with the images under them, which are among the files.
        let is_overlay = |path: &String| record.overlays.iter().any(|o| o.path == *path);
        let kept = record.kept.iter().filter(|file| !is_overlay(&file.path));
        let kept = kept.map(|file| (&file.path, &file.kept));
        let under = record.under.iter().map(|path| (path, path));
        Ok(AsideSeen {
            complete: record.aside,
            defined: record.definition.is_some(),
            files: self.see_files(kept.chain(under)).await?,
        })
    }

    /// Files by the paths that their guest has for them, and where they are now.
    pub(super) async fn see_files<'a>(
        &self,
        files: impl Iterator<Item = (&'a String, &'a String)>,
    ) -> Result<Vec<FileSeen>, Fault> {
        let (paths, places): (Vec<String>, Vec<String>) = files
            .map(|(path, place)| (path.clone(), place.clone()))
            .unzip();
        let facts = self.node.hypervisor.file_facts(&places).await;
        let facts = facts.map_err(fault)?;
        let seen = paths.into_iter().zip(facts).map(|(path, fact)| FileSeen {
            path,
            exists: fact.exists,
            length_bytes: fact.length_bytes,
        });
        Ok(seen.collect())
    }

    /// What the journal knows of the migration.
    async fn history(&self) -> Result<CopyHistory, Fault> {
        let finished = self.registry.finished(self.migration).await?;
        let job = finished.and_then(|finished| finished.job);
        Ok(CopyHistory {
            under_way: !matches!(self.stage, Stage::Idle),
            ran_here: match &self.stage {
                Stage::Arriving(record) => record.ran_here,
                Stage::Coming(record) => record.ran_here,
                Stage::Rebuilding(record) => record.started,
                _ => false,
            },
            moved_away: match &self.stage {
                Stage::Ended(record) => has_moved(&job_of(record)),
                Stage::Sending(sending) => has_moved(&sending.job()),
                _ => job.is_some_and(|job| has_moved(&job)),
            },
        })
    }

    /// Writes down that a guest which was to come has come: from then on what is
    /// here is not taken back, whatever becomes of it.
    pub(super) async fn note_arrival(&mut self) {
        let Stage::Arriving(record) = &self.stage else {
            return;
        };
        if record.ran_here {
            return;
        }
        let instance = record.instance;
        match self.node.hypervisor.presence(instance).await {
            Ok(presence) if presence.is_active() => {}
            // What cannot be told now is looked for at the next event or step.
            Ok(_) | Err(_) => return,
        }
        let mut record = record.clone();
        record.ran_here = true;
        let entry = Record::Destination(record.clone());
        let stored = self.node.journal.migrations.store(self.migration, &entry);
        match stored.await {
            Ok(()) => info!(migration = %self.migration, %instance, "the guest has arrived"),
            Err(error) => {
                warn!(migration = %self.migration, %instance, %error,
                    "the journal lacks that the guest has arrived");
            }
        }
        self.stage = Stage::Arriving(record);
    }

    /// The domain of an instance, now and after its next start.
    pub(super) async fn both(&self, instance: InstanceId) -> Result<Vec<Guest>, Fault> {
        let hypervisor = &self.node.hypervisor;
        let asked = tokio::try_join!(
            hypervisor.guest(instance),
            hypervisor.lasting_guest(instance)
        );
        let (now, lasting) = asked.map_err(fault)?;
        Ok(now.into_iter().chain(lasting).collect())
    }
}

/// What a guest cannot start without: the files and devices that it writes, what
/// lies under them and beside them.
fn files_of(guest: &Guest) -> Vec<String> {
    let written = guest.disks.iter().filter(|disk| !disk.read_only);
    let written = written.filter(|disk| disk.local_path().is_some());
    let own = written.clone().filter_map(Disk::local_path);
    let under = written.flat_map(|disk| &disk.backing);
    let beside = guest.files.iter().map(|file| file.path.clone());
    own.map(str::to_owned)
        .chain(under.map(|image| image.path.clone()))
        .chain(beside)
        .collect()
}

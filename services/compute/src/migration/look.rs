//! What this node sees of its copy of a guest, for whoever has to prove that
//! another may go.

use std::{collections::BTreeSet, time::Duration};

use drover_model::{
    api::{
        compute::{AsideSeen, CopyHistory, CopySeen, Ended, FileSeen, StepRef},
        fault::Fault,
    },
    content::Seen,
    guest::{Disk, Guest, PowerState, Presence},
    ids::InstanceId,
};
use tokio::time::sleep;
use tracing::{info, warn};

use super::{
    actor::{Actor, Stage},
    sending::job_of,
    shared::has_moved,
};
use crate::{
    faults::hypervisor as fault,
    hypervisor::{self, Hypervisor, HypervisorError, Job},
    journal::{Inodes, LeavingRecord, Record},
};

/// A QEMU that is told to go is gone by then.
const A_MOMENT: Duration = Duration::from_secs(2);

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
        // The images under overlays are among the files.
        let kept = record.kept.iter();
        let kept = kept.filter(|file| !record.is_overlay(&file.path));
        let kept = kept.map(|file| (&file.path, &file.kept));
        let under = record.under.iter().map(|path| (path, path));
        let places = record.kept.iter().map(|file| (&file.path, &file.path));
        let places = self.see_files(places).await?.into_iter();
        let places = places.filter(|place| place.exists).map(|place| place.path);
        // Once it is defined here again, the guest itself uses them.
        let devices = match record.aside && !record.defines && !record.devices.is_empty() {
            true => self.node.hypervisor.file_facts(&record.devices).await,
            false => Ok(Vec::new()),
        };
        let devices = devices.map_err(fault)?.into_iter();
        let used = devices.filter(|device| device.in_use);
        let taken = places.chain(used.map(|device| device.path)).collect();
        Ok(AsideSeen {
            complete: record.aside && !record.defines,
            defined: record.definition.is_some(),
            files: self.see_files(kept.chain(under)).await?,
            taken,
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

    /// Whether nothing was written to a file, or it is not here.
    pub(super) async fn is_empty(&self, path: &str) -> Result<bool, Fault> {
        let paths = [path.to_owned()];
        let facts = self.node.hypervisor.file_facts(&paths).await;
        let facts = facts.map_err(fault)?;
        Ok(facts.iter().all(|fact| fact.length_bytes == 0))
    }

    /// Holds a place with an empty file; false if somebody else has another there. One
    /// that is empty a former attempt has made: nothing has come yet.
    pub(super) async fn hold_place(
        &self,
        path: &str,
        with_directory: bool,
        first: bool,
    ) -> Result<bool, Fault> {
        let reserved = self.node.hypervisor.reserve_file(path, with_directory);
        match reserved.await {
            Err(HypervisorError::Exists(_)) => Ok(!first && self.is_empty(path).await?),
            reserved => reserved.map(|()| true).map_err(fault),
        }
    }

    /// Those of these files that are here, as something that is left, in words.
    pub(super) async fn left_of(&self, paths: Vec<String>) -> Result<Vec<String>, Fault> {
        let mut seen = self
            .see_files(paths.iter().map(|path| (path, path)))
            .await?;
        seen.retain(|file| file.exists);
        let host = &self.node.settings.host;
        let words =
            |path| format!("{path} is left on {host}: remove it by hand if it is not wanted");
        Ok(seen.iter().map(|file| words(&file.path)).collect())
    }

    /// The numbers of those of these files that are here.
    pub(super) async fn inodes(&self, paths: Vec<String>) -> Result<Inodes, Fault> {
        let found = self.node.hypervisor.contents(&paths, &[]).await;
        let found = found.map_err(fault)?.into_iter();
        let numbered = found.filter_map(|file| match file.seen {
            Seen::File { inode, .. } => Some((file.path, inode)),
            Seen::Missing | Seen::Unreadable { .. } | Seen::Unknown => None,
        });
        Ok(numbered.collect())
    }

    /// Those of what was made here in whose place is another file by now: storage that was
    /// mounted since may have the survivor itself there.
    pub(super) async fn replaced(&self, made: &Inodes) -> Result<BTreeSet<String>, Fault> {
        let now = self.inodes(made.keys().cloned().collect()).await?;
        let other = |(path, inode): &(&String, &u64)| now.get(*path).is_some_and(|n| n != *inode);
        let replaced: BTreeSet<String> = made
            .iter()
            .filter(other)
            .map(|(path, _)| path.clone())
            .collect();
        if !replaced.is_empty() {
            warn!(migration = %self.migration, ?replaced,
                "these are not the files that this migration made (was storage mounted over \
                 them?): they stay");
        }
        Ok(replaced)
    }

    /// What is left of what was made here and has no other copy; another file that has
    /// the name of one may be the guest's own.
    pub(super) async fn left_here(
        &self,
        alone: Vec<String>,
        replaced: &BTreeSet<String>,
    ) -> Result<Vec<String>, Fault> {
        let own = alone.into_iter().filter(|path| !replaced.contains(path));
        let mut left = self.left_of(own.collect()).await?;
        let host = &self.node.settings.host;
        left.extend(replaced.iter().map(|path| {
            format!(
                "{path} on {host} is not the file that this migration made (was storage mounted \
                 over it?): it stays"
            )
        }));
        Ok(left)
    }

    /// What the journal knows of the migration.
    async fn history(&self) -> Result<CopyHistory, Fault> {
        let finished = self.registry.finished(self.migration).await?;
        let has_come = finished.as_ref().is_some_and(|f| f.how == Ended::Arrived);
        let job = finished.and_then(|finished| finished.job);
        Ok(CopyHistory {
            under_way: !matches!(self.stage, Stage::Idle),
            ran_here: match &self.stage {
                Stage::Arriving(record) => record.ran_here,
                Stage::Coming(record) => record.ran_here,
                Stage::Rebuilding(record) => record.started,
                _ => has_come,
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
        let Some(instance) = awaited(&self.stage) else {
            return;
        };
        // What cannot be told now is looked for at the next event or step.
        if !self
            .has_arrived(instance)
            .await
            .is_ok_and(|arrived| arrived)
        {
            return;
        }
        let entry = match &mut self.stage {
            Stage::Arriving(record) => {
                record.ran_here = true;
                Record::Destination(record.clone())
            }
            Stage::Coming(record) => {
                record.ran_here = true;
                Record::Coming(record.clone())
            }
            _ => return,
        };
        let stored = self.node.journal.migrations.store(self.migration, &entry);
        match stored.await {
            Ok(()) => info!(migration = %self.migration, %instance, "the guest has arrived"),
            Err(error) => {
                warn!(migration = %self.migration, %instance, %error,
                    "the journal lacks that the guest has arrived");
            }
        }
    }

    /// A QEMU that is being killed, as its source is gone, has no job any more, and is
    /// *paused* or *in shutdown* to libvirt, which stands for running. libvirt defines
    /// what arrives before that runs; of a guest that is not to be defined here, that
    /// it still runs a moment later tells.
    async fn has_arrived(&self, instance: InstanceId) -> hypervisor::Result<bool> {
        let hypervisor = &self.node.hypervisor;
        let presence = hypervisor.presence(instance).await?;
        if !presence.is_active() {
            return Ok(false);
        }
        let guest = hypervisor.guest(instance).await?;
        if guest.is_some_and(|guest| guest.persistent && guest.power_state.is_active()) {
            return Ok(true);
        }
        sleep(A_MOMENT).await;
        let later = hypervisor.presence(instance).await?;
        Ok(later == presence && later != Presence::Present(PowerState::Paused))
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

/// The guest that is to come live, or was defined here to be started, and has not run
/// here: somebody may start it by hand.
pub(super) fn awaited(stage: &Stage) -> Option<InstanceId> {
    match stage {
        Stage::Arriving(record) if !record.ran_here => Some(record.instance),
        Stage::Coming(record) if record.definition.is_some() && !record.ran_here => {
            Some(record.instance)
        }
        _ => None,
    }
}

/// What tells one lasting definition of a guest from another; none if it is not here.
pub(super) async fn fingerprint(
    hypervisor: &dyn Hypervisor,
    instance: InstanceId,
) -> hypervisor::Result<Option<String>> {
    let definition = hypervisor.definition(instance).await?;
    let fingerprint = definition.map(|definition| hypervisor.fingerprint(&definition));
    fingerprint.transpose()
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

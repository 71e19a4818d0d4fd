//! Whether a guest that leaves is still as it was when it was sent: somebody may have
//! started it or changed it by hand since, while no conductor looked.

use drover_model::{
    api::{
        compute::{CarriedFile, FileRole, KnownDisk, ResizeInstance},
        fault::Fault,
    },
    guest::Presence,
};

use super::{
    super::{actor::Actor, contents::no_disk_is_new, destroy::Remaining},
    files,
};
use crate::{
    faults::hypervisor as fault,
    journal::{LeavingRecord, SentFile},
};

impl Actor {
    /// The guest's own files as they are before they are opened. Block devices do not
    /// tell when they were written.
    pub(super) async fn stamps(&self, files: &[CarriedFile]) -> Result<Vec<SentFile>, Fault> {
        let own = files.iter().filter(|file| files::is_own(file.role));
        let own = own.filter(|file| file.role != FileRole::Device);
        self.stamps_of(own.map(|file| file.path.clone()).collect())
            .await
    }

    /// Files as they are now.
    pub(super) async fn stamps_of(&self, paths: Vec<String>) -> Result<Vec<SentFile>, Fault> {
        let found = self.node.hypervisor.contents(&paths, &[]).await;
        let stamped = found.map_err(fault)?.into_iter().filter_map(|file| {
            let stamp = file.stamp()?.to_owned();
            let path = file.path;
            Some(SentFile { path, stamp })
        });
        Ok(stamped.collect())
    }

    /// Refuses if the guest writes a disk that is neither carried nor known to be
    /// shared: it would lie on the destination under another's file, or under none.
    pub(super) async fn all_disks_are_known(&self, step: &ResizeInstance) -> Result<(), Fault> {
        let Some(known) = &step.disks else {
            return Ok(());
        };
        let guest = self.node.hypervisor.lasting_guest(step.instance).await;
        let mut now = guest
            .map_err(fault)?
            .as_ref()
            .map_or_else(Vec::new, KnownDisk::of);
        let overlays = files::overlays(&step.files);
        for disk in &mut now {
            // A frozen disk is the image under its overlay.
            if let Some(over) = overlays.iter().find(|over| over.path == disk.path) {
                disk.path.clone_from(&over.image);
            }
        }
        no_disk_is_new(known, &now)
    }

    /// What of the guest has not been set aside yet.
    pub(super) async fn remaining(
        &self,
        record: &LeavingRecord,
        presence: Presence,
    ) -> Result<Remaining, Fault> {
        let hypervisor = &self.node.hypervisor;
        let (definition, renamed) = match presence {
            // What nobody could start since was looked at before it was renamed.
            Presence::Absent => (None, self.renamed(record).await?),
            _ => {
                let defined = hypervisor.definition(record.instance).await;
                (defined.map_err(fault)?, Vec::new())
            }
        };
        let sent = record.sent.iter().map(|sent| sent.path.clone());
        let paths: Vec<String> = sent.filter(|path| !renamed.contains(path)).collect();
        let files = hypervisor.contents(&paths, &[]).await.map_err(fault)?;
        Ok(Remaining { definition, files })
    }

    /// Those of the guest's files that have the names they have while it is aside.
    pub(super) async fn renamed(&self, record: &LeavingRecord) -> Result<Vec<String>, Fault> {
        let kept = record.kept.iter().map(|file| (&file.path, &file.kept));
        let seen = self.see_files(kept).await?;
        let there = seen.into_iter().filter(|file| file.exists);
        Ok(there.map(|file| file.path).collect())
    }
}

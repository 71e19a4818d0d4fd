//! Disks frozen while their guest runs: the guest uses another file, which
//! begins as what is under it; and back.

use drover_model::{
    guest::{BackingImage, Disk, DiskSource},
    ids::{HostName, InstanceId},
};
use tokio::time::Instant;

use super::{
    super::{HypervisorError, Overlay, Result},
    node::Domain,
    storage::{EMPTY_IMAGE_BYTES, File},
    world::World,
};

impl World {
    pub(super) fn freeze_disks(
        &mut self,
        host: &HostName,
        id: InstanceId,
        overlays: &[Overlay],
        now: Instant,
    ) -> Result<()> {
        self.write_disks(host, id, now);
        for overlay in overlays {
            let uses = self.disk_path(host, id, &overlay.target)?;
            if uses == overlay.path {
                continue;
            }
            if uses != overlay.image {
                let words = format!("disk {} is no longer {}", overlay.target, overlay.image);
                return Err(HypervisorError::WrongState(words));
            }
            let under = self.storage.file(host, &overlay.image).cloned();
            let under = under.ok_or_else(|| HypervisorError::Failed("no image".to_owned()))?;
            self.storage.remove(host, &overlay.path);
            let over = File {
                allocated_bytes: EMPTY_IMAGE_BYTES,
                ..under
            };
            let made = self.storage.create(host, &overlay.path, over);
            made.map_err(HypervisorError::Failed)?;
            self.plug(host, id, &overlay.target, &overlay.path, |backing| {
                backing.insert(
                    0,
                    BackingImage {
                        path: overlay.image.clone(),
                        format: overlay.format.clone(),
                        allocated_bytes: 0,
                    },
                );
            });
        }
        Ok(())
    }

    pub(super) fn thaw_disks(
        &mut self,
        host: &HostName,
        id: InstanceId,
        overlays: &[Overlay],
        now: Instant,
    ) -> Result<()> {
        self.write_disks(host, id, now);
        for overlay in overlays {
            if self.disk_path(host, id, &overlay.target)? == overlay.path {
                self.merge_overlay(host, overlay)?;
                self.plug(host, id, &overlay.target, &overlay.image, |backing| {
                    backing.retain(|image| image.path != overlay.image);
                });
            }
        }
        Ok(())
    }

    pub(super) fn merge_overlay(&mut self, host: &HostName, overlay: &Overlay) -> Result<()> {
        let over = self.storage.file(host, &overlay.path).cloned();
        let over = over.ok_or_else(|| HypervisorError::Failed("no overlay".to_owned()))?;
        let image = self.storage.file_mut(host, &overlay.image);
        let image = image.ok_or_else(|| HypervisorError::Failed("no image".to_owned()))?;
        image.content = over.content;
        Ok(())
    }

    pub(super) fn disk_path(
        &self,
        host: &HostName,
        id: InstanceId,
        target: &str,
    ) -> Result<String> {
        let domain = self.domain(host, id);
        let domain = domain.ok_or(HypervisorError::NoSuchGuest(id))?;
        let disk = domain.guest.disks.iter().find(|d| d.target == target);
        let path = disk.and_then(|d| d.local_path()).map(str::to_owned);
        path.ok_or_else(|| HypervisorError::Failed(format!("no disk {target}")))
    }

    /// Has a disk be another file, over other images.
    pub(super) fn plug(
        &mut self,
        host: &HostName,
        id: InstanceId,
        target: &str,
        path: &str,
        change: impl Fn(&mut Vec<BackingImage>),
    ) {
        let Ok(before) = self.disk_path(host, id, target) else {
            return;
        };
        let guests = self.domain_mut(host, id).into_iter();
        let disks = guests.flat_map(Domain::both_mut).flat_map(|g| &mut g.disks);
        // One that is another from the next start on stays so.
        let is_it = |d: &&mut Disk| d.target == target && d.local_path() == Some(&before);
        for disk in disks.filter(is_it) {
            let path = path.to_owned();
            disk.source = DiskSource::File { path };
            change(&mut disk.backing);
        }
    }
}

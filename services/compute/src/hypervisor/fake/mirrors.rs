//! Disks that go to other files of their node: copied under a running guest by
//! its QEMU, which ends with it and outlives everything else; or, of a guest
//! that is off, by the agent itself.

use std::time::Duration;

use drover_model::{
    api::compute::DiskMove,
    ids::{HostName, InstanceId},
};
use tokio::time::Instant;

use super::{
    super::{HypervisorError, Mirror, Result},
    files::uses,
    storage::{Content, EMPTY_IMAGE_BYTES, File},
    transfer::{bytes_in, time_for},
    world::World,
};

/// A copy under way, of a running guest's disk.
#[derive(Debug, Clone)]
pub(super) struct MirrorJob {
    /// The file it makes.
    pub(super) to: String,
    /// Bytes to copy.
    total_bytes: u64,
    began: Instant,
    bytes_s: u64,
}

impl MirrorJob {
    fn done_bytes(&self, now: Instant) -> u64 {
        bytes_in(self.bytes_s, now - self.began).min(self.total_bytes)
    }
}

fn wrong_state<T>(words: impl Into<String>) -> Result<T> {
    Err(HypervisorError::WrongState(words.into()))
}

fn failed<T>(words: impl Into<String>) -> Result<T> {
    Err(HypervisorError::Failed(words.into()))
}

impl World {
    // ---- of a running guest ----------------------------------------------------------

    pub(super) fn mirror_disk(
        &mut self,
        host: &HostName,
        id: InstanceId,
        disk: &DiskMove,
        bandwidth_bytes_s: Option<u64>,
        now: Instant,
    ) -> Result<Mirror> {
        let domain = self.active(host, id)?;
        let job = domain.mirrors.get(&disk.target);
        let (begun, to) = (job.is_some(), job.map(|job| job.to.clone()));
        let uses = self.disk_path(host, id, &disk.target)?;
        if uses == disk.to {
            return Ok(Mirror::Moved);
        }
        if uses != disk.from {
            return wrong_state(format!("disk {} is no longer {}", disk.target, disk.from));
        }
        if !begun {
            self.begin_mirror(host, id, disk, bandwidth_bytes_s, now)?;
        } else if to.as_ref() != Some(&disk.to) {
            return wrong_state(format!("disk {} has an active block job", disk.target));
        }
        self.look_at_mirror(host, id, disk, now)
    }

    fn begin_mirror(
        &mut self,
        host: &HostName,
        id: InstanceId,
        disk: &DiskMove,
        bandwidth_bytes_s: Option<u64>,
        now: Instant,
    ) -> Result<()> {
        if let Some(job) = &self.active(host, id)?.other_job {
            return wrong_state(format!("domain has a job of its own: {job}"));
        }
        if self.storage.file(host, &disk.to).is_some() {
            return Err(HypervisorError::Exists(disk.to.clone()));
        }
        let whole = self.copy_of(host, disk)?;
        let begun = File {
            content: Content::Empty,
            allocated_bytes: EMPTY_IMAGE_BYTES.min(whole.allocated_bytes),
            ..whole
        };
        let made = self.storage.create(host, &disk.to, begun);
        made.map_err(HypervisorError::Failed)?;
        let job = MirrorJob {
            to: disk.to.clone(),
            total_bytes: whole.allocated_bytes,
            began: now,
            bytes_s: self.copy_bytes_s(host, bandwidth_bytes_s),
        };
        if let Some(domain) = self.domain_mut(host, id) {
            domain.mirrors.insert(disk.target.clone(), job);
        }
        Ok(())
    }

    /// How far a copy is. Once it is whole it is what the disk is now.
    fn look_at_mirror(
        &mut self,
        host: &HostName,
        id: InstanceId,
        disk: &DiskMove,
        now: Instant,
    ) -> Result<Mirror> {
        let job = self
            .domain(host, id)
            .and_then(|d| d.mirrors.get(&disk.target));
        let Some(job) = job.filter(|job| job.to == disk.to) else {
            return wrong_state(format!("disk {} is not being copied", disk.target));
        };
        let (done_bytes, total_bytes) = (job.done_bytes(now), job.total_bytes);
        self.write_disks(host, id, now);
        let mut copy = self.copy_of(host, disk)?;
        if done_bytes < total_bytes {
            let of = Box::new(copy.content);
            copy.content = Content::Partial {
                of,
                bytes: done_bytes,
            };
            copy.allocated_bytes = done_bytes;
        }
        if let Err(words) = self.fill(host, &disk.to, copy) {
            self.end_mirror(host, id, &disk.target);
            return failed(format!("the copy of {} broke off: {words}", disk.target));
        }
        Ok(match done_bytes < total_bytes {
            true => Mirror::Copying {
                done_bytes,
                total_bytes,
            },
            false => Mirror::Ready,
        })
    }

    pub(super) fn pivot_disk(
        &mut self,
        host: &HostName,
        id: InstanceId,
        disk: &DiskMove,
        now: Instant,
    ) -> Result<()> {
        self.active(host, id)?;
        if self.disk_path(host, id, &disk.target)? == disk.to {
            return Ok(());
        }
        if self.look_at_mirror(host, id, disk, now)? != Mirror::Ready {
            return wrong_state(format!("block copy of {} is not ready", disk.target));
        }
        self.end_mirror(host, id, &disk.target);
        self.plug(host, id, &disk.target, &disk.to, |backing| {
            if disk.flatten {
                backing.clear();
            }
        });
        Ok(())
    }

    pub(super) fn abandon_mirror(
        &mut self,
        host: &HostName,
        id: InstanceId,
        disk: &DiskMove,
    ) -> Result<()> {
        let Some(domain) = self.domain(host, id) else {
            return Err(HypervisorError::NoSuchGuest(id));
        };
        let job = domain.mirrors.get(&disk.target);
        if job.is_some_and(|job| job.to == disk.to) {
            self.end_mirror(host, id, &disk.target);
        }
        Ok(())
    }

    fn end_mirror(&mut self, host: &HostName, id: InstanceId, target: &str) {
        if let Some(domain) = self.domain_mut(host, id) {
            domain.mirrors.remove(target);
        }
    }

    // ---- of a guest that is off ------------------------------------------------------

    /// Begins to put a disk at another place; how long that takes.
    pub(super) fn begin_placing(
        &mut self,
        host: &HostName,
        disk: &DiskMove,
        bandwidth_bytes_s: Option<u64>,
    ) -> Result<Duration> {
        self.check_stands_still(host, disk)?;
        let whole = self.copy_of(host, disk)?;
        if disk.from == disk.to {
            return failed(format!("{} is where it is to be", disk.from));
        }
        self.storage.remove(host, &disk.to);
        let begun = File {
            content: Content::Empty,
            allocated_bytes: 0,
            ..whole
        };
        let made = self.storage.create(host, &disk.to, begun);
        made.map_err(HypervisorError::Failed)?;
        if self.is_link(host, disk) {
            return Ok(Duration::ZERO);
        }
        let bytes_s = self.copy_bytes_s(host, bandwidth_bytes_s);
        Ok(time_for(whole.allocated_bytes, bytes_s))
    }

    /// The same file under another name is there at once.
    fn is_link(&self, host: &HostName, disk: &DiskMove) -> bool {
        let volume = |path| self.storage.volume_at(host, path).map(|v| &v.name);
        !disk.flatten && volume(&disk.from) == volume(&disk.to)
    }

    /// It is there.
    pub(super) fn finish_placing(&mut self, host: &HostName, disk: &DiskMove) -> Result<()> {
        self.check_stands_still(host, disk)?;
        let copy = self.copy_of(host, disk)?;
        self.fill(host, &disk.to, copy)
            .map_err(HypervisorError::Failed)
    }

    /// No guest that is active uses a disk's files.
    fn check_stands_still(&self, host: &HostName, disk: &DiskMove) -> Result<()> {
        let domains = self.node(host).domains.values();
        let mut active = domains.filter(|d| d.incoming || d.state.is_active());
        let of_disk = |guest| uses(guest, &disk.from) || uses(guest, &disk.to);
        match active.find(|d| of_disk(&d.guest)) {
            Some(user) => wrong_state(format!("{} runs on {}", user.guest.name, disk.from)),
            None => Ok(()),
        }
    }

    // ---- of both ---------------------------------------------------------------------

    /// The file that a disk is now, with what is under it if that goes along.
    fn copy_of(&self, host: &HostName, disk: &DiskMove) -> Result<File> {
        let Some(file) = self.storage.file(host, &disk.from) else {
            let from = &disk.from;
            return failed(format!("{from}: No such file or directory"));
        };
        let mut copy = file.clone();
        for image in disk.backing.iter().filter(|_| disk.flatten) {
            let under = self.storage.file(host, &image.path);
            copy.allocated_bytes += under.map_or(0, |file| file.allocated_bytes);
        }
        copy.length_bytes = copy.length_bytes.max(copy.allocated_bytes);
        Ok(copy)
    }

    /// Puts content into a file that is there, if there is room.
    fn fill(&mut self, host: &HostName, path: &str, copy: File) -> std::result::Result<(), String> {
        let volume = self.storage.volume_at(host, path);
        let free = volume.map_or(0, |v| v.free_bytes());
        let Some(file) = self.storage.file_mut(host, path) else {
            return Err(format!("{path}: No such file or directory"));
        };
        if copy.allocated_bytes.saturating_sub(file.allocated_bytes) > free {
            return Err(format!("{path}: No space left on device"));
        }
        *file = copy;
        Ok(())
    }

    /// What a node copies within itself, bytes per second.
    fn copy_bytes_s(&self, host: &HostName, asked: Option<u64>) -> u64 {
        let limit = asked.filter(|limit| *limit > 0).unwrap_or(u64::MAX);
        self.node(host).spec.disk_bytes_s.min(limit)
    }
}

//! Measuring what may not answer: storage that hangs (NFS without its server)
//! holds up its own guests' sizes, and nothing else.
//!
//! Of each file system one question is under way at a time, on a thread of its
//! own, and nobody waits for it longer than [`WITHIN`]. Meanwhile the last known
//! sizes serve, with their age. Which file system a path is on is read from the
//! kernel's list of mounts, which asks none of them.

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use drover_model::guest::{Disk, Guest};
use tokio::{sync::Semaphore, task::JoinSet};

use super::sizes::{self, Sizes};

/// How long an answer is waited for.
const WITHIN: Duration = Duration::from_secs(2);
/// The kernel's list of mounts.
const MOUNTS: &str = "/proc/self/mountinfo";

/// Measures. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(in super::super) struct Measurer(Arc<Mutex<Known>>);

#[derive(Debug, Default)]
struct Known {
    /// By path: what was measured last, and when.
    disks: HashMap<String, (Sizes, Instant)>,
    /// By file system.
    mounts: HashMap<String, Mount>,
}

#[derive(Debug)]
struct Mount {
    gate: Arc<Semaphore>,
    /// Since when a question has gone unanswered.
    asked_at: Option<Instant>,
}

impl Measurer {
    fn with<T>(&self, work: impl FnOnce(&mut Known) -> T) -> T {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Fills in the sizes of guests' local disks; says of each guest what of its
    /// storage does not answer.
    pub(in super::super) async fn fill(&self, guests: &mut [&mut Guest]) -> Vec<Option<String>> {
        let mounts = mounts();
        let mut by_mount: BTreeMap<String, Vec<(String, String)>> = BTreeMap::new();
        for disk in guests.iter().flat_map(|guest| &guest.disks) {
            if let Some(path) = disk.local_path() {
                let wanted = (path.to_owned(), disk.format.clone());
                by_mount
                    .entry(mount_of(&mounts, path))
                    .or_default()
                    .push(wanted);
            }
        }
        let mut asking = JoinSet::new();
        for (mount, wanted) in by_mount {
            let (asker, known) = (self.clone(), self.clone());
            asking.spawn(async move {
                let answer = asker.in_time(&mount, move || known.measure(&wanted)).await;
                answer.is_none().then_some(mount)
            });
        }
        let silent: Vec<String> = asking.join_all().await.into_iter().flatten().collect();
        let words = |guest: &mut &mut Guest| {
            let places = guest.disks.iter_mut().filter_map(|disk| {
                self.know(disk);
                let mount = mount_of(&mounts, disk.local_path()?);
                silent.contains(&mount).then(|| self.silence(disk, &mount))
            });
            // The first says enough.
            places.collect::<Vec<_>>().into_iter().next()
        };
        guests.iter_mut().map(words).collect()
    }

    /// Asks a path's file system something; none if it does not answer in time, or
    /// has not answered an earlier question.
    pub(in super::super) async fn ask<T: Send + 'static>(
        &self,
        path: &Path,
        question: impl FnOnce() -> T + Send + 'static,
    ) -> Option<T> {
        let mount = mount_of(&mounts(), &path.to_string_lossy());
        self.in_time(&mount, question).await
    }

    async fn in_time<T: Send + 'static>(
        &self,
        mount: &str,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Option<T> {
        let asked_at = Instant::now();
        let gate = self.with(|known| {
            let mount = known.mounts.entry(mount.to_owned());
            let mount = mount.or_insert_with(|| Mount {
                gate: Arc::new(Semaphore::new(1)),
                asked_at: None,
            });
            mount.asked_at.get_or_insert(asked_at);
            mount.gate.clone()
        });
        let asking = async {
            let permit = gate.acquire_owned().await.ok()?;
            let (known, key) = (self.clone(), mount.to_owned());
            let task = tokio::task::spawn_blocking(move || {
                let answer = work();
                known.with(|known| {
                    if let Some(mount) = known.mounts.get_mut(&key) {
                        mount.asked_at = None;
                    }
                });
                drop(permit);
                answer
            });
            task.await.ok()
        };
        tokio::time::timeout(WITHIN, asking).await.ok().flatten()
    }

    /// Blocks for as long as the file system likes.
    fn measure(&self, wanted: &[(String, String)]) {
        for (path, format) in wanted {
            match sizes::measure(Path::new(path), format) {
                Ok(sizes) => self.with(|known| {
                    known.disks.insert(path.clone(), (sizes, Instant::now()));
                }),
                Err(error) => {
                    self.with(|known| known.disks.remove(path));
                    tracing::debug!(path, %error, "size of a disk cannot be read");
                }
            }
        }
    }

    fn know(&self, disk: &mut Disk) {
        let known = disk
            .local_path()
            .and_then(|path| self.with(|known| known.disks.get(path).copied()));
        if let Some((sizes, _)) = known {
            disk.virtual_bytes = sizes.virtual_bytes;
            disk.allocated_bytes = sizes.allocated_bytes;
        }
    }

    fn silence(&self, disk: &Disk, mount: &str) -> String {
        let path = disk.local_path().unwrap_or_default();
        let (silent, age) = self.with(|known| {
            let silent = known.mounts.get(mount).and_then(|m| m.asked_at);
            let age = known.disks.get(path).map(|(_, at)| at.elapsed());
            (silent.map_or(WITHIN, |at| at.elapsed()), age)
        });
        let sizes = match age {
            Some(age) => format!("its size is of {} s ago", age.as_secs()),
            None => "its size is not known".to_owned(),
        };
        format!(
            "disk {}: the storage at {mount} has not answered for {} s; {sizes}",
            disk.target,
            silent.as_secs()
        )
    }
}

/// Where file systems are mounted.
fn mounts() -> Vec<String> {
    let text = std::fs::read_to_string(MOUNTS).unwrap_or_default();
    text.lines().filter_map(mount_point).collect()
}

/// The fifth word of a line, in which blanks are written as octal numbers.
fn mount_point(line: &str) -> Option<String> {
    let word = line.split(' ').nth(4)?;
    let plain = word.replace("\\040", " ").replace("\\011", "\t");
    Some(plain.replace("\\012", "\n").replace("\\134", "\\"))
}

/// The file system that a path is on, without looking at the path.
fn mount_of(mounts: &[String], path: &str) -> String {
    let holds = |mount: &&String| Path::new(path).starts_with(mount);
    let deepest = mounts.iter().filter(holds).max_by_key(|mount| mount.len());
    deepest.cloned().unwrap_or_else(|| "/".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_on_the_deepest_mount_that_holds_it() {
        let lines = [
            "22 1 0:20 / / rw - ext4 /dev/vda rw",
            "40 22 0:44 / /mnt/nfs rw - nfs4 server:/x rw",
            "41 22 0:45 / /mnt/my\\040disk rw - ext4 /dev/vdb rw",
        ];
        let mounts: Vec<String> = lines.iter().filter_map(|l| mount_point(l)).collect();
        assert_eq!(mount_of(&mounts, "/mnt/nfs/vm.qcow2"), "/mnt/nfs");
        assert_eq!(mount_of(&mounts, "/mnt/nfs2/vm.qcow2"), "/");
        assert_eq!(mount_of(&mounts, "/mnt/my disk/a"), "/mnt/my disk");
        assert_eq!(mount_of(&[], "/a"), "/");
    }

    #[tokio::test]
    async fn a_file_system_that_hangs_holds_up_nobody_else() {
        let measurer = Measurer::default();
        let (release, held) = std::sync::mpsc::channel::<()>();
        let hang = move || held.recv().is_ok();
        assert_eq!(measurer.in_time("/mnt/nfs", hang).await, None, "it hangs");
        let began = Instant::now();
        // Asked again and again, it takes no second thread.
        assert_eq!(measurer.in_time("/mnt/nfs", || 1).await, None);
        assert!(began.elapsed() >= WITHIN);
        assert_eq!(measurer.in_time("/", || 2).await, Some(2));
        release.send(()).unwrap();
        assert_eq!(measurer.in_time("/mnt/nfs", || 3).await, Some(3));
    }
}

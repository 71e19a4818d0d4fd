//! Measuring what may not answer: storage that hangs (NFS without its server)
//! holds up its own guests, and nothing else.
//!
//! Of each file system one question is under way at a time, on a thread of its
//! own, and nobody waits for it longer than [`WITHIN`]. Meanwhile what was known
//! last serves, with its age. Which file system a path is on is read from the
//! kernel's list of mounts, which asks none of them; where a link of one leads to
//! another, its own thread finds out and hands the question on. A block device is a
//! place of its own.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs,
    os::unix::fs::FileTypeExt,
    path::{Component, Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use drover_model::guest::{Disk, Guest};
use tokio::{sync::Semaphore, task::JoinSet};

use super::{
    beneath::{self, Named, can_name_others},
    image::{self, Identity},
    links::{Beneath, Links, Walk},
    memory::Remembered,
    sizes::{self, Sizes},
};

/// How long an answer is waited for.
const WITHIN: Duration = Duration::from_secs(2);
/// Links from one file system to the next that are followed.
const MOST_LINKS: usize = 40;
/// The kernel's list of mounts.
const MOUNTS: &str = "/proc/self/mountinfo";

/// Measures. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(in super::super) struct Measurer(Arc<Mutex<Known>>);

#[derive(Debug, Default)]
struct Known {
    /// By path: what was measured last, and when.
    disks: HashMap<String, (Sizes, Instant)>,
    links: Links,
    /// By path: which file it was when it answered last; none if there was none.
    identities: HashMap<String, Option<Identity>>,
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

    /// Knows what was seen before, of which nothing is known yet.
    pub(super) fn take_up(&self, remembered: Remembered) {
        self.with(|known| {
            known.links = Links::of(remembered.links, remembered.whole, remembered.beneath);
            known.identities = remembered.identities.into_iter().collect();
        });
    }

    /// What is to be known after a restart.
    pub(super) fn remembered(&self) -> Remembered {
        self.with(|known| Remembered {
            beneath: known.links.beneath(),
            whole: Some(known.links.whole()),
            links: known.links.by_path(),
            identities: known.identities.clone().into_iter().collect(),
            ..Remembered::default()
        })
    }

    /// Fills in the sizes of guests' local disks; says of each guest what of its
    /// storage does not answer.
    pub(in super::super) async fn fill(&self, guests: &mut [&mut Guest]) -> Vec<Option<String>> {
        let disks = guests.iter().flat_map(|guest| &guest.disks);
        let wanted = disks.filter_map(|disk| {
            let path = disk.local_path()?.to_owned();
            Some((path, disk.format.clone()))
        });
        let wanted: Vec<(String, String)> = wanted.collect();
        let paths: Vec<String> = wanted.iter().map(|(path, _)| path.clone()).collect();
        let known = self.clone();
        let measure = move |path: &str, format: &String| known.measure(path, format);
        let answers = self.ask_each(wanted, measure).await;
        let answers = paths.into_iter().zip(answers);
        let silent: HashMap<String, String> = answers
            .filter_map(|(path, answer)| Some((path, answer.err()?.0)))
            .collect();
        let words = |guest: &mut &mut Guest| {
            sizes::fill_by(guest, |disk| self.known(disk));
            let places = guest.disks.iter().filter_map(|disk| {
                let place = silent.get(disk.local_path()?)?;
                Some(self.silence(disk, place))
            });
            // The first says enough.
            places.collect::<Vec<_>>().into_iter().next()
        };
        guests.iter_mut().map(words).collect()
    }

    /// Which files are at paths, all that are of interest: as it was last, where the
    /// storage does not answer or fails; none of one that never did.
    pub(in super::super) async fn identities(&self, paths: Vec<String>) -> Vec<At> {
        let wanted = paths.iter().map(|path| (path.clone(), ())).collect();
        let look = |path: &str, (): &()| image::identified(path);
        let answers = self.ask_each(wanted, look).await;
        let asked: HashSet<String> = paths.iter().cloned().collect();
        self.with(|known| known.identities.retain(|path, _| asked.contains(path)));
        let known = |(path, answer)| {
            self.with(|known| match answer {
                Ok(Ok(identity)) => {
                    known.identities.insert(path, identity);
                    At::Answers
                }
                Ok(Err(_)) | Err(Silent(_)) => At::Silent(known.identities.get(&path).copied()),
            })
        };
        paths.into_iter().zip(answers).map(known).collect()
    }

    /// The files beneath images, all that are of interest, by their path and format. Of
    /// what cannot be read now, as it was last.
    pub(in super::super) async fn beneath(&self, tops: Vec<(String, String)>) -> Vec<Beneath> {
        let mut walks = vec![Walk::default(); tops.len()];
        let (mut met, mut silent) = (HashSet::new(), HashSet::new());
        let named = tops.iter().cloned().enumerate();
        // Level by level, each file in the thread of its own storage.
        let mut to_see: Vec<(usize, Named)> = named
            .map(|(n, (path, format))| (n, (path, Some(format))))
            .collect();
        loop {
            to_see.retain(|(_, (_, format))| can_name_others(format.as_deref()));
            if to_see.is_empty() {
                break;
            }
            let wanted = to_see.iter().map(|(_, (path, _))| (path.clone(), ()));
            let look = |path: &str, (): &()| beneath::read(path);
            let answers = self.ask_but(&mut silent, wanted.collect(), look).await;
            let mut below = Vec::new();
            for ((n, (path, _)), answer) in to_see.into_iter().zip(answers) {
                let read = match answer {
                    Ok(Ok(found)) => Ok(found),
                    Ok(Err(error)) => Err(format!("{path} cannot be read ({error})")),
                    Err(_) => Err(format!("the storage of {path} does not answer")),
                };
                let step = self.with(|known| known.links.step(&path, read));
                let new = walks[n].go_on(&path, step).into_iter();
                below.extend(new.map(|named| (n, named)));
                met.insert(path);
            }
            to_see = below;
        }
        self.with(|known| known.links.settle(&tops, walks, &met))
    }

    /// Asks about each of some paths, in the thread of the file system that it is on.
    /// What was asked goes on when nobody waits for it any more.
    pub(in super::super) async fn ask_each<T, A>(
        &self,
        wanted: Vec<(String, T)>,
        question: impl Fn(&str, &T) -> A + Send + Sync + 'static,
    ) -> Vec<Result<A, Silent>>
    where
        T: Send + 'static,
        A: Send + 'static,
    {
        self.ask_but(&mut HashSet::new(), wanted, question).await
    }

    /// The same; places that are known to be silent are not asked again, and those that
    /// turn out to be become known.
    async fn ask_but<T, A>(
        &self,
        silent: &mut HashSet<String>,
        wanted: Vec<(String, T)>,
        question: impl Fn(&str, &T) -> A + Send + Sync + 'static,
    ) -> Vec<Result<A, Silent>>
    where
        T: Send + 'static,
        A: Send + 'static,
    {
        let mounts: Arc<Vec<String>> = Arc::new(mounts());
        let question = Arc::new(question);
        let mut answers: Vec<Result<A, Silent>> = Vec::new();
        answers.resize_with(wanted.len(), || Err(Silent("a circle of links".to_owned())));
        let wanted = wanted.into_iter().enumerate();
        let mut asked: Vec<Asked<T>> = wanted
            .map(|(number, (path, what))| Asked {
                number,
                at: Place::of(&mounts, PathBuf::from(&path)),
                path,
                what,
            })
            .collect();
        for _ in 0..MOST_LINKS {
            if asked.is_empty() {
                break;
            }
            let mut by_place: BTreeMap<String, Vec<Asked<T>>> = BTreeMap::new();
            for one in asked.drain(..) {
                by_place.entry(one.at.key.clone()).or_default().push(one);
            }
            let mut asking = JoinSet::new();
            for (key, group) in by_place {
                if silent.contains(&key) {
                    let numbers = group.iter().map(|one| one.number);
                    numbers.for_each(|number| answers[number] = Err(Silent(key.clone())));
                    continue;
                }
                let (asker, question, mounts) = (self.clone(), question.clone(), mounts.clone());
                asking.spawn(async move { asker.ask_group(key, group, &mounts, question).await });
            }
            for (answered, further) in asking.join_all().await {
                for (number, answer) in answered {
                    silent.extend(answer.as_ref().err().map(|Silent(key)| key.clone()));
                    answers[number] = answer;
                }
                asked.extend(further);
            }
        }
        answers
    }

    /// Asks of one place what is asked of it; says what was answered, and what is to
    /// be asked elsewhere.
    async fn ask_group<T: Send + 'static, A: Send + 'static>(
        &self,
        key: String,
        group: Vec<Asked<T>>,
        mounts: &Arc<Vec<String>>,
        question: Arc<impl Fn(&str, &T) -> A + Send + Sync + 'static>,
    ) -> (Vec<(usize, Result<A, Silent>)>, Vec<Asked<T>>) {
        let numbers: Vec<usize> = group.iter().map(|one| one.number).collect();
        // What was answered before the place fell silent counts.
        let answered = Arc::new(Mutex::new((HashMap::new(), Vec::new())));
        let (into, mounts) = (answered.clone(), mounts.clone());
        let work = move || {
            for one in group {
                let found = match one.at.leads_elsewhere(&mounts) {
                    Some(at) => Err(Asked { at, ..one }),
                    None => Ok((one.number, question(&one.path, &one.what))),
                };
                let mut into = into.lock().unwrap_or_else(PoisonError::into_inner);
                match found {
                    Ok((number, answer)) => drop(into.0.insert(number, answer)),
                    Err(further) => into.1.push(further),
                }
            }
        };
        // Whether it answered in time shows in what it answered.
        let _ = self.in_time(&key, work).await;
        let mut answered = answered.lock().unwrap_or_else(PoisonError::into_inner);
        let further = std::mem::take(&mut answered.1);
        let is_further = |number: &usize| further.iter().any(|one| one.number == *number);
        let answers = numbers.into_iter().filter(|number| !is_further(number));
        let answers = answers
            .map(|number| {
                let answer = answered.0.remove(&number);
                (number, answer.ok_or_else(|| Silent(key.clone())))
            })
            .collect();
        (answers, further)
    }

    /// Asks a path's file system something; none if it does not answer in time, or
    /// has not answered an earlier question.
    pub(in super::super) async fn ask<T: Send + 'static>(
        &self,
        path: &Path,
        question: impl FnOnce() -> T + Send + 'static,
    ) -> Option<T> {
        let mount = mount_of(&mounts(), path);
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
    fn measure(&self, path: &str, format: &str) {
        match sizes::measure(Path::new(path), format) {
            Ok(sizes) => self.with(|known| {
                known.disks.insert(path.to_owned(), (sizes, Instant::now()));
            }),
            Err(error) => {
                self.with(|known| known.disks.remove(path));
                tracing::debug!(path, %error, "size of a disk cannot be read");
            }
        }
    }

    fn known(&self, disk: &Disk) -> Option<Sizes> {
        let path = disk.local_path()?;
        self.with(|known| known.disks.get(path).map(|(sizes, _)| *sizes))
    }

    fn silence(&self, disk: &Disk, place: &str) -> String {
        let path = disk.local_path().unwrap_or_default();
        let (silent, age) = self.with(|known| {
            let silent = known.mounts.get(place).and_then(|m| m.asked_at);
            let age = known.disks.get(path).map(|(_, at)| at.elapsed());
            (silent.map_or(WITHIN, |at| at.elapsed()), age)
        });
        let sizes = match age {
            Some(age) => format!("its size is of {} s ago", age.as_secs()),
            None => "its size is not known".to_owned(),
        };
        format!(
            "disk {}: the storage at {place} has not answered for {} s; {sizes}",
            disk.target,
            silent.as_secs()
        )
    }
}

/// What is known of a path.
#[derive(Debug, Clone, Copy)]
pub(in super::super) enum At {
    /// Its storage answers: it can be looked at.
    Answers,
    /// It does not, and this was there when it did last.
    Silent(Option<Option<Identity>>),
}

/// The place that did not answer.
#[derive(Debug)]
pub(in super::super) struct Silent(String);

/// One of several questions.
struct Asked<T> {
    number: usize,
    /// As it was asked for.
    path: String,
    at: Place,
    what: T,
}

/// What answers for a path, and the path there, followed as far as it is known.
struct Place {
    key: String,
    path: PathBuf,
}

impl Place {
    fn of(mounts: &[String], path: PathBuf) -> Self {
        let key = mount_of(mounts, &path);
        Self { key, path }
    }

    /// Where a link in the path leads, if that is another place. Blocks, and asks
    /// nothing but this place.
    fn leads_elsewhere(&self, mounts: &[String]) -> Option<Self> {
        if Path::new(&self.key) == self.path {
            return None;
        }
        let mut path = self.path.clone();
        for _ in 0..MOST_LINKS {
            let Some(led) = first_link(&self.key, &path) else {
                let is_device = fs::metadata(&path).is_ok_and(|m| m.file_type().is_block_device());
                let key = path.to_string_lossy().into_owned();
                return is_device.then_some(Self { key, path });
            };
            path = led;
            if mount_of(mounts, &path) != self.key {
                return Some(Self::of(mounts, path));
            }
        }
        None
    }
}

/// The path with its first link replaced by what that says, if it has one below the
/// mount.
fn first_link(mount: &str, path: &Path) -> Option<PathBuf> {
    let mut parts = path.components();
    let mut before = PathBuf::new();
    while let Some(part) = parts.next() {
        let at = before.join(part);
        let is_below = at.starts_with(mount) && at != Path::new(mount);
        if let (true, Ok(target)) = (is_below, fs::read_link(&at)) {
            return Some(plain(&before.join(target).join(parts.as_path())));
        }
        before = at;
    }
    None
}

/// The path without dots.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir => drop(plain.pop()),
            part => plain.push(part),
        }
    }
    plain
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
fn mount_of(mounts: &[String], path: &Path) -> String {
    let holds = |mount: &&String| path.starts_with(mount);
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
        assert_eq!(
            mount_of(&mounts, Path::new("/mnt/nfs/vm.qcow2")),
            "/mnt/nfs"
        );
        assert_eq!(mount_of(&mounts, Path::new("/mnt/nfs2/vm.qcow2")), "/");
        assert_eq!(
            mount_of(&mounts, Path::new("/mnt/my disk/a")),
            "/mnt/my disk"
        );
        assert_eq!(mount_of(&[], Path::new("/a")), "/");
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

    #[tokio::test]
    async fn a_link_to_storage_that_hangs_holds_up_its_own_guest_alone() {
        let place = tempfile::tempdir().unwrap();
        let at = |name: &str| place.path().join(name).display().to_string();
        for name in ["own", "other"] {
            fs::write(at(name), name).unwrap();
        }
        // On another file system.
        std::os::unix::fs::symlink("/dev/null", at("no")).unwrap();
        let wanted = ["own", "no", "other"].map(|name| (at(name), ()));
        let measurer = Measurer::default();
        let elsewhere = mount_of(&mounts(), Path::new("/dev/null"));
        let (release, held) = std::sync::mpsc::channel::<()>();
        let hang = move || held.recv().is_ok();
        assert_eq!(measurer.in_time(&elsewhere, hang).await, None, "it hangs");
        let answers = measurer
            .ask_each(wanted.to_vec(), |path, ()| path.len())
            .await;
        let found: Vec<bool> = answers.iter().map(Result::is_ok).collect();
        assert_eq!(found, [true, false, true]);
        release.send(()).unwrap();
        let answers = measurer
            .ask_each(wanted.to_vec(), |path, ()| path.len())
            .await;
        assert!(answers.iter().all(Result::is_ok));
    }

    #[test]
    fn links_are_followed_one_by_one() {
        let place = tempfile::tempdir().unwrap();
        let root = place.path();
        fs::create_dir(root.join("d")).unwrap();
        std::os::unix::fs::symlink("../d", root.join("d/up")).unwrap();
        let mount = root.display().to_string();
        let led = first_link(&mount, &root.join("d/up/a"));
        assert_eq!(led, Some(root.join("d/a")));
        assert_eq!(first_link(&mount, &root.join("d/a")), None);
    }
}

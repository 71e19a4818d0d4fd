//! What is in files that a guest uses and that are not its own: whether a mark
//! lies beside one, and its digest.
//!
//! Digests are computed by threads of their own, two at a time, file after file,
//! and remembered for as long as a file's stamp stays as it is. A file that nobody
//! asks for any more is given up: nobody's question waits for it.

use std::{
    collections::{HashMap, VecDeque},
    fs::{File, Metadata, OpenOptions},
    io::{ErrorKind, Read, Seek, SeekFrom},
    os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use drover_model::{
    api::compute::Mark,
    content::{Digest, FileContent, Seen},
};
use sha2::{Digest as _, Sha256};

use super::{chain, checked, marks, sizes};

/// Files that are read at once.
const AT_ONCE: usize = 2;
/// Files that wait to be read; more are asked for again later.
const MOST_WAITING: usize = 1024;
/// Digests that are remembered.
const MOST_KNOWN: usize = 4096;
/// How long a file is read on when nobody asks for it any more.
const UNASKED: Duration = Duration::from_secs(60);
/// How long the digest of a device holds: nothing tells that one was written.
const OF_DEVICE: Duration = Duration::from_secs(60);
/// Bytes read at once.
const CHUNK: usize = 1 << 20;

/// What is at a path; no digest.
pub(in super::super) fn look(path: &str, marks: &[Mark]) -> FileContent {
    let seen = match open(path) {
        // Equal headers say nothing about what is elsewhere.
        Ok((file, _)) if chain::has_data_elsewhere(&file) => Seen::Unreadable {
            error: "its data are in another file".to_owned(),
        },
        Ok((_, found)) => Seen::File {
            length_bytes: found.length_bytes,
            inode: found.inode,
            stamp: found.stamp,
            marked: marks::is_beside(Path::new(path), marks),
            digest: Digest::Unasked,
        },
        Err(error) if is_absence(&error) => Seen::Missing,
        Err(error) => Seen::Unreadable {
            error: error.to_string(),
        },
    };
    FileContent {
        path: path.to_owned(),
        seen,
    }
}

/// Device, number, length and time of the last write of what is at a path; none if
/// nothing is there.
///
/// # Errors
/// It cannot be looked at.
pub(in super::super) fn stamp(path: &str) -> std::io::Result<Option<String>> {
    match std::fs::metadata(path) {
        Ok(metadata) => Ok(Some(stamp_of(&metadata, metadata.len()))),
        Err(error) if is_absence(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

fn is_absence(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}

struct Found {
    length_bytes: u64,
    inode: u64,
    stamp: String,
    is_device: bool,
}

/// Opens what a path leads to: a file or a block device, nothing that could hang.
fn open(path: &str) -> std::io::Result<(File, Found)> {
    let path = checked(path).map_err(|e| std::io::Error::other(e.to_string()))?;
    sizes::is_image(&path)?;
    let mut file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    let metadata = file.metadata()?;
    let kind = metadata.file_type();
    let is_device = kind.is_block_device();
    if !is_device && !kind.is_file() {
        let words = "it is neither a file nor a block device";
        return Err(std::io::Error::other(words));
    }
    let length_bytes = match is_device {
        true => file.seek(SeekFrom::End(0))?,
        false => metadata.len(),
    };
    file.seek(SeekFrom::Start(0))?;
    let found = Found {
        length_bytes,
        inode: metadata.ino(),
        stamp: stamp_of(&metadata, length_bytes),
        is_device,
    };
    Ok((file, found))
}

fn stamp_of(metadata: &Metadata, length_bytes: u64) -> String {
    match metadata.file_type().is_block_device() {
        // The node's own times are those of its entry, not of what is on it.
        true => format!("device {}:{length_bytes}", metadata.rdev()),
        false => format!(
            "{}:{}:{length_bytes}:{}.{:09}",
            metadata.dev(),
            metadata.ino(),
            metadata.mtime(),
            metadata.mtime_nsec()
        ),
    }
}

/// Digests of this node's files. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(in super::super) struct Digests(Arc<Mutex<Book>>);

#[derive(Debug, Default)]
struct Book {
    known: HashMap<String, Known>,
    /// Stamps of those, oldest first.
    order: VecDeque<String>,
    waiting: VecDeque<Arc<Work>>,
    working: Vec<Arc<Work>>,
    /// What came of work that failed; told once.
    failed: HashMap<String, String>,
}

#[derive(Debug)]
struct Known {
    sha256: String,
    until: Option<Instant>,
}

#[derive(Debug)]
struct Work {
    path: PathBuf,
    stamp: String,
    is_device: bool,
    done_bytes: AtomicU64,
    asked: Mutex<Instant>,
}

impl Work {
    fn ask(&self) -> Digest {
        *lock(&self.asked) = Instant::now();
        Digest::Working {
            done_bytes: self.done_bytes.load(Ordering::Relaxed),
        }
    }

    fn is_wanted(&self) -> bool {
        lock(&self.asked).elapsed() < UNASKED
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Digests {
    /// The digest of a file as it is now, or how far reading it is. Starts that.
    pub(in super::super) fn of(&self, path: &str) -> Digest {
        let failed = |error: std::io::Error| Digest::Failed {
            error: error.to_string(),
        };
        let found = match open(path) {
            Ok((_, found)) => found,
            Err(error) => return failed(error),
        };
        let mut book = lock(&self.0);
        if let Some(sha256) = book.known(&found.stamp) {
            return Digest::Known { sha256 };
        }
        if let Some(error) = book.failed.remove(&found.stamp) {
            return Digest::Failed { error };
        }
        let mut under_way = book.working.iter().chain(&book.waiting);
        if let Some(work) = under_way.find(|work| work.stamp == found.stamp) {
            return work.ask();
        }
        if book.waiting.len() >= MOST_WAITING {
            return Digest::Working { done_bytes: 0 };
        }
        let work = Arc::new(Work {
            path: PathBuf::from(path),
            stamp: found.stamp,
            is_device: found.is_device,
            done_bytes: AtomicU64::new(0),
            asked: Mutex::new(Instant::now()),
        });
        let answer = work.ask();
        book.waiting.push_back(work);
        if book.working.len() < AT_ONCE {
            let digests = self.clone();
            let thread = std::thread::Builder::new().name("digest".to_owned());
            if let Err(error) = thread.spawn(move || digests.work()) {
                book.waiting.pop_back();
                return failed(error);
            }
        }
        answer
    }

    /// Reads files until none waits.
    fn work(&self) {
        while let Some(work) = self.next() {
            let ended = digest(&work);
            let mut book = lock(&self.0);
            book.working.retain(|w| w.stamp != work.stamp);
            match ended {
                Ok(sha256) => book.remember(&work, sha256),
                Err(error) => book.note_failure(&work, error),
            }
        }
    }

    fn next(&self) -> Option<Arc<Work>> {
        let mut book = lock(&self.0);
        if book.working.len() >= AT_ONCE {
            return None;
        }
        let work = book.waiting.pop_front()?;
        book.working.push(work.clone());
        Some(work)
    }
}

impl Book {
    fn known(&mut self, stamp: &str) -> Option<String> {
        let known = self.known.get(stamp)?;
        if known.until.is_some_and(|until| until < Instant::now()) {
            self.known.remove(stamp);
            self.order.retain(|s| s != stamp);
            return None;
        }
        Some(known.sha256.clone())
    }

    fn remember(&mut self, work: &Work, sha256: String) {
        while self.order.len() >= MOST_KNOWN {
            if let Some(oldest) = self.order.pop_front() {
                self.known.remove(&oldest);
            }
        }
        let until = work.is_device.then(|| Instant::now() + OF_DEVICE);
        let known = Known { sha256, until };
        if self.known.insert(work.stamp.clone(), known).is_none() {
            self.order.push_back(work.stamp.clone());
        }
    }

    fn note_failure(&mut self, work: &Work, error: String) {
        if self.failed.len() >= MOST_WAITING {
            self.failed.clear();
        }
        // Who no longer asks is told nothing; asked again, it is tried again.
        if work.is_wanted() {
            self.failed.insert(work.stamp.clone(), error);
        }
    }
}

/// Reads a file to its end.
fn digest(work: &Work) -> Result<String, String> {
    let path = work.path.to_string_lossy();
    let (mut file, found) = open(&path).map_err(|e| e.to_string())?;
    let changed = || "it is written to while it is read".to_owned();
    if found.stamp != work.stamp {
        return Err(changed());
    }
    let mut hash = Sha256::new();
    let mut chunk = vec![0_u8; CHUNK];
    let mut left = found.length_bytes;
    while left > 0 {
        if !work.is_wanted() {
            return Err("nobody asks for it any more".to_owned());
        }
        let most = usize::try_from(left).map_or(CHUNK, |left| left.min(CHUNK));
        let read = match file.read(&mut chunk[..most]) {
            Ok(0) => return Err(changed()),
            Ok(read) => read,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(error.to_string()),
        };
        hash.update(&chunk[..read]);
        left = left.saturating_sub(read as u64);
        work.done_bytes.fetch_add(read as u64, Ordering::Relaxed);
    }
    match open(&path) {
        Ok((_, now)) if now.stamp == work.stamp => Ok(format!("{:x}", hash.finalize())),
        _ => Err(changed()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finished(digests: &Digests, path: &str) -> Digest {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            match digests.of(path) {
                Digest::Working { .. } if Instant::now() < deadline => std::thread::yield_now(),
                other => return other,
            }
        }
    }

    fn known(digest: Digest) -> String {
        match digest {
            Digest::Known { sha256 } => sha256,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_digest_is_that_of_sha256sum_and_follows_the_file() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("base.img").display().to_string();
        std::fs::write(&path, "abc").unwrap();
        let digests = Digests::default();
        let first = known(finished(&digests, &path));
        assert_eq!(
            first,
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        assert_eq!(known(digests.of(&path)), first, "remembered");
        // Replaced by another of the same length.
        let other = place.path().join("other").display().to_string();
        std::fs::write(&other, "abd").unwrap();
        std::fs::rename(&other, &path).unwrap();
        assert_ne!(known(finished(&digests, &path)), first);
    }

    #[test]
    fn more_files_than_threads_all_get_theirs() {
        let place = tempfile::tempdir().unwrap();
        let digests = Digests::default();
        let paths: Vec<String> = (0..10)
            .map(|n| {
                let path = place.path().join(n.to_string()).display().to_string();
                std::fs::write(&path, vec![n; 3 * CHUNK / 2]).unwrap();
                path
            })
            .collect();
        for path in &paths {
            digests.of(path);
        }
        let mut found: Vec<_> = paths
            .iter()
            .map(|path| known(finished(&digests, path)))
            .collect();
        found.sort();
        found.dedup();
        assert_eq!(found.len(), 10);
        let book = lock(&digests.0);
        assert!(book.waiting.is_empty() && book.working.is_empty());
    }

    #[test]
    fn what_cannot_be_read_says_why() {
        let place = tempfile::tempdir().unwrap();
        let at = |name: &str| place.path().join(name).display().to_string();
        assert_eq!(look(&at("gone"), &[]).seen, Seen::Missing);
        std::fs::create_dir(at("directory")).unwrap();
        for path in [
            at("directory"),
            "/dev/null".to_owned(),
            "relative".to_owned(),
        ] {
            let seen = look(&path, &[]).seen;
            assert!(matches!(seen, Seen::Unreadable { .. }), "{path}: {seen:?}");
            assert!(matches!(
                Digests::default().of(&path),
                Digest::Failed { .. }
            ));
        }
    }

    #[test]
    fn two_base_images_of_one_name_and_size_are_told_apart_under_their_overlays() {
        let node = |fill: u8| {
            let place = tempfile::tempdir().unwrap();
            let at = |name: &str| place.path().join(name).display().to_string();
            std::fs::write(at("base.img"), vec![fill; 3 << 20]).unwrap();
            let top = at("top.qcow2");
            let overlay = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base.img"];
            let made = std::process::Command::new("qemu-img")
                .args(overlay)
                .arg(&top)
                .output();
            assert!(made.unwrap().status.success());
            (place, top)
        };
        let ((_a, here), (_b, there)) = (node(1), node(2));
        let base = |top: &str| {
            let places = super::super::chain::Places(Vec::new());
            let mut chain = super::super::chain::below(top, "qcow2", &places).unwrap();
            chain.remove(0).path
        };
        let length = |path: &str| match look(path, &[]).seen {
            Seen::File { length_bytes, .. } => length_bytes,
            other => panic!("{other:?}"),
        };
        let (here, there) = (base(&here), base(&there));
        assert_eq!(length(&here), length(&there));
        let digests = Digests::default();
        let known = |path: &str| known(finished(&digests, path));
        assert_ne!(known(&here), known(&there));
        std::fs::copy(&here, &there).unwrap();
        assert_eq!(known(&here), known(&there));
    }

    #[test]
    fn an_image_whose_data_are_elsewhere_is_none_to_compare() {
        let place = tempfile::tempdir().unwrap();
        let at = |name: &str| place.path().join(name).display().to_string();
        let option = format!("data_file={},data_file_raw=on", at("data.raw"));
        let made = std::process::Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-o", &option])
            .args([at("base.qcow2").as_str(), "1M"])
            .output();
        assert!(made.unwrap().status.success());
        let seen = look(&at("base.qcow2"), &[]).seen;
        assert!(matches!(seen, Seen::Unreadable { .. }), "{seen:?}");
        let data = look(&at("data.raw"), &[]).seen;
        assert!(matches!(data, Seen::File { .. }), "{data:?}");
    }
}

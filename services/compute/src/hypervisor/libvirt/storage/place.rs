//! A disk that nobody uses, at another place of its node: the same file under
//! one more name, else a copy.

use std::{
    fs::File,
    io::ErrorKind,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use drover_model::api::compute::DiskMove;
use tokio::process::Command;
use tracing::warn;

use super::{chain, checked, directory, failed, image, sync_directory};
use crate::hypervisor::{HypervisorError, Result, libvirt::ffi};

/// How long `qemu-img` may take for a disk, beside what a limited rate makes it take.
const LONGEST_COPY: Duration = Duration::from_secs(6 * 3600);

/// A disk to place, with its paths checked.
#[derive(Debug, Clone)]
pub(in super::super) struct Placing {
    disk: DiskMove,
    from: PathBuf,
    to: PathBuf,
}

/// How far that is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Placed {
    /// The old file has the new name, too.
    Linked {
        /// And leads to what is below it from its old place only.
        leads_astray: bool,
    },
    /// It must be copied; nothing is at the new place.
    NotYet,
}

/// The disk, if it can be placed at all.
///
/// # Errors
/// `Failed`, saying what is in the way.
pub(in super::super) fn check(disk: &DiskMove) -> Result<Placing> {
    let refuse = |why: &str| {
        let target = &disk.target;
        Err(HypervisorError::Failed(format!("{target}: {why}")))
    };
    match (disk.format.as_str(), disk.backing.first()) {
        ("raw", Some(_)) => return refuse("a raw image has no backing"),
        ("raw", None) => {}
        ("qcow2", below) => below.map_or(Ok(()), image::check_backing)?,
        _ => return refuse("images of its format are not moved"),
    }
    let (from, to) = (checked(&disk.from)?, checked(&disk.to)?);
    if from == to {
        return refuse("it is at its new place");
    }
    let disk = disk.clone();
    Ok(Placing { disk, from, to })
}

/// Clears the new place and links the file there, if that can be.
pub(in super::super) fn link(
    placing: &Placing,
    used: &[String],
    places: &chain::Places,
) -> Result<Placed> {
    let Placing { disk, from, to } = placing;
    let wrong = |words: String| Err(HypervisorError::WrongState(words));
    if used.contains(&disk.to) {
        return wrong(format!("a domain of this node uses {}", disk.to));
    }
    let old = image::open(from)?.ok_or_else(|| {
        let shown = from.display();
        HypervisorError::Failed(format!("{shown} is not here"))
    })?;
    if ffi::is_locked_by_qemu(&old).map_err(|e| failed("looking for locks on", from, &e))? {
        return wrong(format!("a QEMU has {} open", disk.from));
    }
    check_chain(disk, places)?;
    match names_of_both(to, &old) {
        None => {
            image::remove(&disk.to, used)?;
            if takes_along(disk) || !try_link(from, to)? {
                return Ok(Placed::NotYet);
            }
        }
        // Mounted twice: with the one name goes the other.
        Some(1) => return wrong(format!("{} and {} are one", disk.from, disk.to)),
        Some(_) if takes_along(disk) => {
            image::remove(&disk.to, &[])?;
            return Ok(Placed::NotYet);
        }
        Some(_) => {}
    }
    let leads = |_| chain::leads_by_its_place(to).map_err(|e| failed("reading", to, &e));
    let leads_astray = disk.backing.first().map_or(Ok(false), leads)?;
    Ok(Placed::Linked { leads_astray })
}

/// Whether the new place has all that the old one has: it is the same file, or a copy
/// ([`copy`] gives it the time at which the old one was written) since which neither was
/// written. Which of two times is the later one says nothing, as clocks are set back.
pub(in super::super) fn is_placed(disk: &DiskMove) -> Result<bool> {
    let [from, to] = [checked(&disk.from)?, checked(&disk.to)?];
    let Ok(there) = std::fs::symlink_metadata(&to) else {
        return Ok(false);
    };
    let old = std::fs::symlink_metadata(&from).map_err(|e| failed("looking at", &from, &e))?;
    let same = (there.dev(), there.ino()) == (old.dev(), old.ino());
    let written = |m: &std::fs::Metadata| (m.mtime(), m.mtime_nsec());
    Ok(same || (there.len() > 0 && is_one_time(written(&old), written(&there))))
}

/// Whether two times, in seconds and nanoseconds, are one, as a file system may keep it
/// less exactly than another.
fn is_one_time(a: (i64, i64), b: (i64, i64)) -> bool {
    let is_cut = |exact: i64, kept: i64| {
        let kept_by = |unit| exact - exact % unit == kept;
        [1, 100, 1_000, 1_000_000, 1_000_000_000]
            .into_iter()
            .any(kept_by)
    };
    a.0 == b.0 && (is_cut(a.1, b.1) || is_cut(b.1, a.1))
}

/// What is below it must be what was planned with: all of it is read as that.
fn check_chain(disk: &DiskMove, places: &chain::Places) -> Result<()> {
    let below = chain::below(&disk.from, &disk.format, places).map_err(HypervisorError::Failed)?;
    let same = below.len() == disk.backing.len()
        && below
            .iter()
            .zip(&disk.backing)
            .all(|(now, then)| (&now.path, &now.format) == (&then.path, &then.format));
    if same {
        return Ok(());
    }
    let words = format!("what lies under {} has changed", disk.from);
    Err(HypervisorError::WrongState(words))
}

fn takes_along(disk: &DiskMove) -> bool {
    disk.flatten && !disk.backing.is_empty()
}

/// How many names a file has, if that path is one of them.
fn names_of_both(path: &Path, file: &File) -> Option<u64> {
    let there = std::fs::symlink_metadata(path).ok()?;
    let own = file.metadata().ok()?;
    let same = (there.dev(), there.ino()) == (own.dev(), own.ino());
    same.then(|| own.nlink())
}

/// Whether the file has that name now; not where a file system cannot.
fn try_link(from: &Path, to: &Path) -> Result<bool> {
    match std::fs::hard_link(from, to) {
        Ok(()) => Ok(true),
        Err(error) => match error.raw_os_error() {
            Some(libc::EXDEV | libc::EPERM | libc::EMLINK | libc::EOPNOTSUPP) => Ok(false),
            _ if error.kind() == ErrorKind::AlreadyExists => {
                Err(HypervisorError::Exists(to.display().to_string()))
            }
            _ => Err(failed("linking", to, &error)),
        },
    }
}

/// Has a linked image name what is below it by its whole path.
pub(in super::super) async fn straighten(placing: &Placing, qemu_img: &str) -> Result<()> {
    let Placing { disk, to, .. } = placing;
    let Some(below) = disk.backing.first() else {
        return Ok(());
    };
    let mut command = Command::new(qemu_img);
    command.args(["rebase", "-q", "-u", "-f", &disk.format]);
    command.args(["-F", &below.format, "-b", &below.path]);
    command.arg(to).stdin(Stdio::null());
    run(command, qemu_img, "rebase", LONGEST_COPY).await
}

/// Copies the disk to its new place.
pub(in super::super) async fn copy(
    placing: &Placing,
    qemu_img: &str,
    owner: Option<(u32, u32)>,
    bandwidth_bytes_s: Option<u64>,
) -> Result<()> {
    let Placing { disk, from, to } = placing;
    let written = std::fs::metadata(from).and_then(|m| m.modified());
    let written = written.map_err(|e| failed("looking at", from, &e))?;
    let reserved = image::reserve(to)?;
    let mut command = Command::new(qemu_img);
    command.args(["convert", "-q", "-t", "writeback"]);
    command.args(["-f", &disk.format, "-O", &disk.format]);
    if let Some(below) = disk.backing.first().filter(|_| !disk.flatten) {
        command.args(["-F", &below.format, "-B", &below.path]);
    }
    let mut limit = LONGEST_COPY;
    if let Some(rate) = bandwidth_bytes_s.filter(|rate| *rate > 0) {
        command.args(["-r", &rate.to_string()]);
        limit += Duration::from_secs(disk.data_bytes / rate * 2);
    }
    // The file we made, whatever its name is turned to meanwhile.
    command.arg(from).arg("/proc/self/fd/0");
    command.stdin(Stdio::from(reserved.handle()?));
    run(command, qemu_img, "convert", limit).await?;
    if let Err(error) = reserved.handle()?.set_modified(written) {
        warn!(to = %to.display(), %error, "a copy has another date than its disk, and may be made twice");
    }
    // As long as it takes.
    let kept = tokio::task::spawn_blocking(move || reserved.keep(owner)).await;
    kept.unwrap_or_else(|e| Err(HypervisorError::Bug(e.to_string())))
}

async fn run(mut command: Command, qemu_img: &str, what: &str, limit: Duration) -> Result<()> {
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    command.kill_on_drop(true);
    // One that goes on alone would hold a file that is to be made anew.
    ffi::die_with_parent(&mut command);
    let failure = |words: String| HypervisorError::Failed(format!("{qemu_img} {what}: {words}"));
    let output = tokio::time::timeout(limit, command.output())
        .await
        .map_err(|_| failure(format!("not done after {} s", limit.as_secs())))?
        .map_err(|e| failure(e.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&output.stderr);
    Err(failure(words.trim().chars().take(500).collect()))
}

/// Has a placed disk and its name reach stable storage. As long as it takes.
pub(in super::super) fn settle(placing: &Placing) -> Result<()> {
    let file = image::open(&placing.to)?.ok_or_else(|| {
        let shown = placing.to.display();
        HypervisorError::Failed(format!("{shown} is gone"))
    })?;
    file.sync_all()
        .map_err(|e| failed("flushing", &placing.to, &e))?;
    sync_directory(&placing.to);
    Ok(())
}

/// What a location's directory has, and which of `names` are in it.
pub(in super::super) struct Room {
    pub(in super::super) file_system: String,
    pub(in super::super) free_bytes: u64,
    pub(in super::super) taken: Vec<String>,
}

/// Looks at a directory.
///
/// # Errors
/// In words.
pub(in super::super) fn look(path: &str, names: &[String]) -> std::result::Result<Room, String> {
    let path = checked(path).map_err(|e| e.to_string())?;
    let shown = path.display();
    let metadata = std::fs::metadata(&path).map_err(|e| format!("{shown}: {e}"))?;
    if !metadata.is_dir() {
        return Err(format!("{shown} is no directory"));
    }
    let room = ffi::room(&path).map_err(|e| format!("{shown}: {e}"))?;
    let is_taken = |name: &&String| {
        let there = path.join(name);
        // A name that leads elsewhere is none of a file in here.
        directory(&there) == path && !super::files::is_absent(&there)
    };
    Ok(Room {
        file_system: super::file_system(&metadata),
        free_bytes: room.free_bytes,
        taken: names.iter().filter(is_taken).cloned().collect(),
    })
}

#[cfg(test)]
mod tests;

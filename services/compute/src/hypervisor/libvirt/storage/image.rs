//! Images made for a disk to come, and removed when they are no longer wanted.

use std::{
    fs::{File, OpenOptions},
    io::ErrorKind,
    os::unix::fs::{MetadataExt, OpenOptionsExt, fchown},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use drover_model::guest::{BackingImage, Disk, DiskSource};
use tokio::process::Command;

use super::{beneath::is_nothing, blank::is_blank, checked, failed, sync_directory};
use crate::hypervisor::{HypervisorError, Result, libvirt::ffi};

/// Largest image that is made, bytes: what QEMU can address.
const LARGEST: u64 = i64::MAX.unsigned_abs();

/// An image to make, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in super::super) struct Recipe {
    path: PathBuf,
    format: Format,
    bytes: u64,
    backing: Option<BackingImage>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Raw,
    Qcow2,
}

/// Checks whether and how a disk's image can be made here.
///
/// # Errors
/// `Failed`, saying what is in the way.
pub(in super::super) fn recipe(disk: &Disk) -> Result<Recipe> {
    let refuse = |why: String| Err(HypervisorError::Failed(format!("{}: {why}", disk.target)));
    let path = match &disk.source {
        DiskSource::File { path } => checked(path)?,
        DiskSource::Block { path } => {
            return refuse(format!(
                "{path} is a block device; it must be made beforehand"
            ));
        }
        _ => return refuse("its bytes are not in a local file".to_owned()),
    };
    let format = match disk.format.as_str() {
        "raw" => Format::Raw,
        "qcow2" => Format::Qcow2,
        other => return refuse(format!("images of format {other} are not made")),
    };
    if disk.virtual_bytes == 0 || disk.virtual_bytes > LARGEST {
        return refuse(format!("its size is given as {} bytes", disk.virtual_bytes));
    }
    let backing = disk.backing.first().cloned();
    match (&backing, format) {
        (Some(_), Format::Raw) => return refuse("a raw image has no backing".to_owned()),
        (Some(image), Format::Qcow2) => check_backing(image)?,
        (None, _) => {}
    }
    Ok(Recipe {
        path,
        format,
        bytes: disk.virtual_bytes,
        backing,
    })
}

pub(super) fn check_backing(image: &BackingImage) -> Result<()> {
    checked(&image.path)?;
    let letters = |c: char| c.is_ascii_alphanumeric() || c == '-';
    if image.format.is_empty() || !image.format.chars().all(letters) {
        let format = image.format.escape_debug();
        return Err(HypervisorError::Failed(format!(
            "backing format '{format}'"
        )));
    }
    Ok(())
}

/// The path's file, made by us just now. Removed again unless kept.
pub(super) struct Reserved {
    path: PathBuf,
    file: Option<File>,
}

impl Reserved {
    /// The file, for another process to write.
    pub(super) fn handle(&self) -> Result<File> {
        let file = self.file.as_ref().ok_or_else(bug)?;
        file.try_clone()
            .map_err(|e| failed("opening", &self.path, &e))
    }

    /// It is to stay, and belongs to the user QEMU runs as.
    pub(super) fn keep(mut self, owner: Option<(u32, u32)>) -> Result<()> {
        let file = self.file.as_ref().ok_or_else(bug)?;
        give_to(file, owner, &self.path);
        file.sync_all()
            .map_err(|e| failed("writing", &self.path, &e))?;
        self.file = None;
        Ok(())
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if self.file.is_some() {
            // It is ours: it was made with O_EXCL and never given away.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Recipe {
    /// Where the image is to be.
    pub(in super::super) fn path(&self) -> &Path {
        &self.path
    }
}

/// Makes a file that was [`reserved`] the image, whatever a former attempt has left in it.
pub(in super::super) async fn create(
    recipe: Recipe,
    file: File,
    qemu_img: &str,
    limit: Duration,
) -> Result<()> {
    if let Some(image) = &recipe.backing
        && !Path::new(&image.path).exists()
    {
        return Err(HypervisorError::Failed(format!(
            "backing image {} is not here",
            image.path
        )));
    }
    let size = |bytes| {
        let sized = file.set_len(bytes);
        sized.map_err(|e| failed("sizing", &recipe.path, &e))
    };
    size(0)?;
    match recipe.format {
        Format::Raw => size(recipe.bytes)?,
        Format::Qcow2 => format_qcow2(&file, &recipe, qemu_img, limit).await?,
    }
    file.sync_all()
        .map_err(|e| failed("writing", &recipe.path, &e))
}

/// The file that was reserved at a path, with nothing in it but what a former attempt
/// has left. `used` says which files domains use, being told whether this one is empty.
/// Blocks.
///
/// # Errors
/// `Exists` if another is there, or somebody has written to it; `WrongState` if somebody
/// uses it.
pub(in super::super) fn reserved(
    path: &Path,
    inode: u64,
    used: impl FnOnce(bool) -> Result<Vec<String>>,
) -> Result<File> {
    let mut options = OpenOptions::new();
    let options = options.read(true).write(true);
    let options = options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    let file = options
        .open(path)
        .map_err(|e| failed("opening", path, &e))?;
    let metadata = file
        .metadata()
        .map_err(|e| failed("looking at", path, &e))?;
    if !metadata.is_file() || metadata.ino() != inode {
        return Err(HypervisorError::Exists(path.display().to_string()));
    }
    check_unused(path, &file, &used(metadata.len() == 0)?)?;
    match is_blank(&file).map_err(|e| failed("reading", path, &e))? {
        true => Ok(file),
        false => Err(HypervisorError::Exists(path.display().to_string())),
    }
}

fn bug() -> HypervisorError {
    HypervisorError::Bug("a reserved image lost its file".to_owned())
}

/// Makes the empty file: exclusively, so whatever stands there wins, a dangling
/// link included.
pub(super) fn reserve(path: &Path) -> Result<Reserved> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
        .map_err(|error| match error.kind() {
            ErrorKind::AlreadyExists => HypervisorError::Exists(path.display().to_string()),
            ErrorKind::NotFound => failed("no directory for", path, &error),
            _ => failed("creating", path, &error),
        })?;
    Ok(Reserved {
        path: path.to_path_buf(),
        file: Some(file),
    })
}

/// Lets `qemu-img` write the format into the file we made, which it gets as its
/// standard input: the name cannot be turned to something else meanwhile. The
/// backing image is recorded, not opened (`-u`): its content is not ours to trust.
async fn format_qcow2(file: &File, recipe: &Recipe, qemu_img: &str, limit: Duration) -> Result<()> {
    let input = file
        .try_clone()
        .map_err(|e| failed("opening", &recipe.path, &e))?;
    let mut command = Command::new(qemu_img);
    command.args(["create", "-q", "-f", "qcow2"]);
    if let Some(image) = &recipe.backing {
        command.args(["-u", "-F", &image.format, "-b", &image.path]);
    }
    command.args(["/proc/self/fd/0", &recipe.bytes.to_string()]);
    command
        .stdin(Stdio::from(input))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    // One that goes on alone would empty what its successor has made in that file.
    ffi::die_with_parent(&mut command);
    let failure = |words: String| HypervisorError::Failed(format!("{qemu_img} create: {words}"));
    let output = tokio::time::timeout(limit, command.output())
        .await
        .map_err(|_| failure(format!("not done after {} s", limit.as_secs())))?
        .map_err(|e| failure(e.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&output.stderr);
    let words: String = words.trim().chars().take(500).collect();
    Err(failure(words.replace(
        "/proc/self/fd/0",
        &recipe.path.display().to_string(),
    )))
}

/// Gives the image to the user QEMU runs as. libvirt mostly does that itself
/// when the guest starts, so trouble here is worth a line, not a failure.
fn give_to(file: &File, owner: Option<(u32, u32)>, path: &Path) {
    let Some((user, group)) = owner else { return };
    if let Err(error) = fchown(file, Some(user), Some(group)) {
        tracing::warn!(path = %path.display(), user, group, %error, "cannot give an image to QEMU's user");
    }
}

/// What tells a file from all others on this node, by whatever name.
pub(in super::super) type Identity = (u64, u64);

/// Removes an image, unless one of `used` is that file or a QEMU has it open. A
/// name may go if `used` names the file by another one.
pub(in super::super) fn remove(path: &str, used: &[String]) -> Result<()> {
    let path = checked(path)?;
    let is_spare = open(&path)?.is_some_and(|file| is_spare_name(&path, &file, used));
    if !is_spare && unused(&path, used)?.is_none() {
        return Ok(());
    }
    std::fs::remove_file(&path).map_err(|e| failed("removing", &path, &e))?;
    sync_directory(&path);
    Ok(())
}

/// Whether a file that domains use has a further name here, by which none does.
fn is_spare_name(path: &Path, file: &File, used: &[String]) -> bool {
    let Ok(metadata) = file.metadata() else {
        return false;
    };
    let own = Some((metadata.dev(), metadata.ino()));
    let mut names = used.iter().filter(|name| identity(name) == own).peekable();
    let real = std::fs::canonicalize(path).ok();
    let is_other = |name: &String| {
        let other = std::fs::canonicalize(name).ok();
        real.is_some() && other.is_some() && real != other
    };
    // A file with one name alone is that one, wherever it is mounted.
    metadata.nlink() > 1 && names.peek().is_some() && names.all(is_other)
}

/// A plain file that nobody on this node uses, opened; none if there is none.
///
/// # Errors
/// `WrongState` if one of `used` is that file, or a QEMU has it open.
pub(super) fn unused(path: &Path, used: &[String]) -> Result<Option<File>> {
    let Some(file) = open(path)? else {
        return Ok(None);
    };
    check_unused(path, &file, used)?;
    Ok(Some(file))
}

fn check_unused(path: &Path, file: &File, used: &[String]) -> Result<()> {
    if is_among(path, used) {
        return Err(left_alone(path, "a domain of this node uses it"));
    }
    match ffi::is_locked_by_qemu(file).map_err(|e| failed("looking for locks on", path, &e))? {
        true => Err(left_alone(path, "a QEMU has it open")),
        false => Ok(()),
    }
}

fn left_alone(path: &Path, why: &str) -> HypervisorError {
    let shown = path.display();
    HypervisorError::WrongState(format!("{shown} is left alone: {why}"))
}

/// A plain file, opened; none if there is none.
///
/// # Errors
/// `WrongState` if something else is there.
pub(super) fn open(path: &Path) -> Result<Option<File>> {
    let metadata = match std::fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed("looking at", path, &error)),
    };
    if !metadata.is_file() {
        return Err(left_alone(path, "it is no plain file"));
    }
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
        .map_err(|e| failed("opening", path, &e))?;
    Ok(Some(file))
}

/// Whether a path names one of these files, by whatever name.
pub(super) fn is_among(path: &Path, used: &[String]) -> bool {
    let own = path.to_str().and_then(identity);
    used.iter()
        .any(|other| Path::new(other) == path || (own.is_some() && identity(other) == own))
}

/// The same of a path as it is written.
pub(in super::super) fn names_one_of(path: &str, used: &[String]) -> bool {
    is_among(Path::new(path), used)
}

/// Which file is at a path, by whatever name; none if there is none, or none is seen.
pub(in super::super) fn identity(path: &str) -> Option<Identity> {
    identified(path).ok().flatten()
}

/// The same.
///
/// # Errors
/// Whether there is one cannot be seen.
pub(super) fn identified(path: &str) -> std::io::Result<Option<Identity>> {
    match std::fs::metadata(path) {
        Ok(metadata) => Ok(Some((metadata.dev(), metadata.ino()))),
        Err(error) if is_nothing(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests;

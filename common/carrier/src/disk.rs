//! Opening the files of both sides, and making ranges of them zero.
//!
//! A symbolic link is never followed, except below `/dev`, which is the
//! administrator's and where logical volumes have their names as links.

use std::{
    fs::{File, OpenOptions},
    io::{self, ErrorKind, Seek, SeekFrom},
    os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::SystemTime,
};

use rustix::{
    fs::{Advice, FallocateFlags, OFlags, fadvise, fallocate},
    io::Errno,
};

use crate::{
    buffer::{Buffer, Pool},
    extents::{Range, is_zero, next_data},
    protocol::CHUNK,
    sync::locked,
};

/// Written with one call. The kernel's cache takes a write in a piece as large as
/// it can; pieces of a MiB are seldom left over from files that went, and in a
/// virtual machine new memory is several times slower than the copying.
const WRITE: usize = 256 * 1024;
/// After so many bytes a file is flushed while more of it arrives: little is left to
/// flush at its end, whatever its size.
const FLUSH_EACH: u64 = 32 << 20;

/// A file to be read.
pub(crate) struct Source {
    pub(crate) file: File,
    pub(crate) len: u64,
    pub(crate) block: bool,
    pub(crate) path: PathBuf,
    changed: Option<SystemTime>,
}

/// A file to be written, or compared.
pub(crate) struct Target {
    pub(crate) file: File,
    pub(crate) block: bool,
    /// What of it belongs to the transfer: all, but for a device larger than its source.
    pub(crate) len: u64,
    /// It is to be compared, never written.
    pub(crate) compare: bool,
    /// Its length was another.
    pub(crate) resized: bool,
    /// Bytes written since a flush was last due.
    unflushed: AtomicU64,
    /// Why stable storage has not got all of it. A kernel says so once.
    unstored: Mutex<Option<String>>,
}

/// Opens a file to be sent.
pub(crate) fn open_source(path: &Path) -> io::Result<Source> {
    let (file, block) = open(path, OpenOptions::new().read(true))?;
    let len = length(&file, block)?;
    let mut source = Source {
        file,
        len,
        block,
        path: path.to_path_buf(),
        changed: None,
    };
    source.changed = source.modified()?;
    Ok(source)
}

impl Source {
    /// Checks that it is still what it was when it was opened.
    pub(crate) fn check_unchanged(&self) -> io::Result<()> {
        if length(&self.file, self.block)? != self.len || self.modified()? != self.changed {
            return Err(io::Error::other("was changed while it was sent"));
        }
        Ok(())
    }

    /// When it was last written. What devices say is their node's time.
    fn modified(&self) -> io::Result<Option<SystemTime>> {
        if self.block {
            return Ok(None);
        }
        self.file.metadata()?.modified().map(Some)
    }
}

/// Opens a file to receive one of this length: makes it if it is not there, and
/// as long. A device must be long enough.
pub(crate) fn open_fresh(path: &Path, len: u64) -> io::Result<Target> {
    let mut how = OpenOptions::new();
    how.read(true).write(true).mode(0o600);
    // A device that is missing must not become a file in memory.
    how.create(!is_device_name(path)).truncate(false);
    let (file, block) = open(path, &mut how)?;
    let own = length(&file, block)?;
    if block && own < len {
        return Err(io::Error::other(format!(
            "the device has {own} bytes, {len} are needed"
        )));
    }
    let resized = !block && own != len;
    if resized {
        file.set_len(len)?;
    }
    Ok(Target::new(file, block, len, false, resized))
}

/// Opens a file that is to be compared with one of this length; nothing if its
/// own is another.
pub(crate) fn open_compared(path: &Path, len: u64) -> io::Result<Option<Target>> {
    let (file, block) = open(path, OpenOptions::new().read(true))?;
    let own = length(&file, block)?;
    let fits = if block { own >= len } else { own == len };
    Ok(fits.then(|| Target::new(file, block, len, true, false)))
}

const DEVICES: &str = "/dev";
/// Below it, but for files.
const MEMORY: &str = "/dev/shm";

fn is_device_name(path: &Path) -> bool {
    path.starts_with(DEVICES) && !path.starts_with(MEMORY)
}

fn open(path: &Path, how: &mut OpenOptions) -> io::Result<(File, bool)> {
    let mut path = PathBuf::from(path);
    if is_device_name(&path) {
        let real = path.canonicalize()?;
        if !is_device_name(&real) {
            return Err(io::Error::other("leads out of /dev"));
        }
        path = real;
    }
    // NONBLOCK: a FIFO must not keep us waiting before it is refused.
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY).bits();
    let file = how.custom_flags(flags.cast_signed()).open(&path)?;
    let kind = file.metadata()?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(io::Error::new(
            ErrorKind::InvalidInput,
            "neither a plain file nor a block device",
        ));
    }
    Ok((file, kind.is_block_device()))
}

fn length(mut file: &File, block: bool) -> io::Result<u64> {
    if block {
        file.seek(SeekFrom::End(0))
    } else {
        Ok(file.metadata()?.len())
    }
}

/// What came of making a range zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Zeroed {
    /// It reads as zeros now.
    Yes,
    /// It has data, from here on, and must not be written.
    Differs(u64),
    /// There is no more interest in the answer.
    Interrupted,
}

impl Target {
    fn new(file: File, block: bool, len: u64, compare: bool, resized: bool) -> Self {
        Self {
            file,
            block,
            len,
            compare,
            resized,
            unflushed: AtomicU64::new(0),
            unstored: Mutex::default(),
        }
    }

    /// Writes it there.
    pub(crate) fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut at = offset;
        for piece in bytes.chunks(WRITE) {
            self.file.write_all_at(piece, at)?;
            at += piece.len() as u64;
        }
        self.unflushed.fetch_add(bytes.len() as u64, Relaxed);
        Ok(())
    }

    /// Whether so much was written that it should be flushed; says so once.
    pub(crate) fn flush_is_due(&self) -> bool {
        let due = self.unflushed.load(Relaxed) >= FLUSH_EACH;
        if due {
            self.unflushed.store(0, Relaxed);
        }
        due
    }

    /// Has what was written reach stable storage. What does not is taken out of the
    /// kernel's cache, so that whoever reads it later sees what the disk holds.
    ///
    /// # Errors
    /// It did not, now or at an earlier flush.
    pub(crate) fn flush(&self) -> io::Result<()> {
        let mut unstored = locked(&self.unstored);
        if unstored.is_none()
            && let Err(error) = self.file.sync_all()
        {
            *unstored = Some(format!("could not be brought to stable storage: {error}"));
            if let Err(error) = fadvise(&self.file, 0, None, Advice::DontNeed) {
                tracing::warn!(%error, "the cache of a file that was not stored stays");
            }
        }
        unstored
            .as_ref()
            .map_or(Ok(()), |why| Err(io::Error::other(why.clone())))
    }

    /// Whether it is one single hole.
    pub(crate) fn is_hole(&self) -> io::Result<bool> {
        Ok(!self.block && next_data(&self.file, false, 0, self.len)?.is_none())
    }

    /// Checks that its length is right, and has it on stable storage.
    pub(crate) fn finish(&self) -> io::Result<()> {
        if !self.block && length(&self.file, false)? != self.len {
            return Err(io::Error::other("its length was changed by somebody else"));
        }
        match self.compare {
            true => Ok(()),
            false => self.flush(),
        }
    }

    /// Makes a range zero where it is not; if the file is to be compared, only
    /// looks. Holes are made where the file system can, and everything else is
    /// read, so that the answer is what the file holds.
    pub(crate) fn make_zero(
        &self,
        range: Range,
        pool: &Arc<Pool>,
        go_on: impl Fn() -> bool,
    ) -> io::Result<Zeroed> {
        if !self.compare {
            self.punch(&range)?;
        }
        let mut buffer = pool.take(CHUNK);
        let mut at = range.start;
        while let Some(data) = next_data(&self.file, self.block, at, range.end)? {
            if !go_on() {
                return Ok(Zeroed::Interrupted);
            }
            let end = data.end.min(data.start + CHUNK as u64);
            let zero = self.zero_piece(data.start..end, &mut buffer)?;
            if !zero {
                return Ok(Zeroed::Differs(data.start));
            }
            at = end;
        }
        Ok(Zeroed::Yes)
    }

    /// Makes a hole, if there is data and if there can be holes.
    fn punch(&self, range: &Range) -> io::Result<()> {
        if next_data(&self.file, self.block, range.start, range.end)?.is_none() {
            return Ok(());
        }
        let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(&self.file, how, range.start, range.end - range.start) {
            // Blocks of a device may be too large for this range: EINVAL.
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::NODEV) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn zero_piece(&self, range: Range, buffer: &mut Buffer) -> io::Result<bool> {
        let piece =
            &mut buffer[..usize::try_from(range.end - range.start).map_err(io::Error::other)?];
        self.file.read_exact_at(piece, range.start)?;
        if is_zero(piece) {
            return Ok(true);
        }
        if self.compare {
            return Ok(false);
        }
        piece.fill(0);
        self.write(piece, range.start)?;
        self.file.read_exact_at(piece, range.start)?;
        if !is_zero(piece) {
            return Err(io::Error::other(
                "does not read as zeros after they were written",
            ));
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flush_is_due_once_for_so_many_bytes() {
        let target = Target::new(tempfile::tempfile().unwrap(), false, 2, false, false);
        target.write(&[1, 2], 0).unwrap();
        assert!(!target.flush_is_due());
        target.unflushed.fetch_add(FLUSH_EACH - 2, Relaxed);
        assert!(target.flush_is_due());
        assert!(!target.flush_is_due());
    }

    /// A socket stands for a disk that fails: neither can be flushed.
    #[test]
    fn what_is_not_stored_is_not_finished() {
        let broken = || {
            let (socket, _) = std::os::unix::net::UnixStream::pair().unwrap();
            File::from(std::os::fd::OwnedFd::from(socket))
        };
        let finish = |compare| Target::new(broken(), false, 0, compare, false).finish();
        assert!(finish(true).is_ok(), "nothing was written to it");
        let error = finish(false).unwrap_err();
        assert!(error.to_string().contains("stable storage"), "{error}");
    }

    /// A kernel tells of a failure once, and then of none.
    #[test]
    fn a_flush_that_failed_is_not_forgotten() {
        let target = Target::new(tempfile::tempfile().unwrap(), false, 0, false, false);
        *locked(&target.unstored) = Some("the disk is broken".to_owned());
        assert!(target.finish().is_err());
    }
}

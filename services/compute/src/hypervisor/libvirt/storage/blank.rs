//! Whether anything is in a file that was to become an image.

use std::{fs::File, io::Result};

use rustix::{
    fs::{SeekFrom, seek},
    io::Errno,
};

use super::chain::{has_data_elsewhere, long, read_at, word};

/// A header, as far as version 2 has it.
const HEADER: u32 = 72;
/// Longest table of clusters that is looked at, bytes.
const LONGEST_TABLE: u32 = 4 << 20;

/// Whether a file holds nothing that was written to a disk: it is empty, one hole, or a
/// qcow2 image without clusters and snapshots. Blocks.
///
/// # Errors
/// It cannot be read.
pub(super) fn is_blank(file: &File) -> Result<bool> {
    let length = file.metadata()?.len();
    if length == 0 {
        return Ok(true);
    }
    let mut file = file.try_clone()?;
    match contents(&file)? {
        Contents::Hole => return Ok(true),
        Contents::Untold => return Ok(false),
        Contents::Data => {}
    }
    if length < u64::from(HEADER) || has_data_elsewhere(&file) {
        return Ok(false);
    }
    let header = read_at(&mut file, 0, HEADER)?;
    let (version, snapshots) = (word(&header, 4), word(&header, 60));
    let is_known = header[..4] == *b"QFI\xfb" && matches!(version, 2 | 3);
    match is_known && snapshots == 0 {
        true => has_no_clusters(&mut file, length, &header),
        false => Ok(false),
    }
}

/// What the file system says is in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Contents {
    /// Nothing: it is one hole.
    Hole,
    /// Something, or what may be that.
    Data,
    /// It does not say.
    Untold,
}

/// Asked of the file system, as its count of blocks tells nothing: some count what is no
/// data, others no data.
fn contents(file: &File) -> Result<Contents> {
    match seek(file, SeekFrom::Data(0)) {
        Ok(_) => Ok(Contents::Data),
        // No data up to its end.
        Err(Errno::NXIO) => Ok(Contents::Hole),
        Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS) => Ok(Contents::Untold),
        Err(error) => Err(error.into()),
    }
}

fn has_no_clusters(file: &mut File, length: u64, header: &[u8]) -> Result<bool> {
    let (entries, at) = (word(header, 36), long(header, 40));
    let bytes = entries.saturating_mul(8);
    // Not there as a whole, it is none of a new image.
    if bytes > LONGEST_TABLE || at.saturating_add(bytes.into()) > length {
        return Ok(false);
    }
    let table = read_at(file, at, bytes)?;
    Ok(table.iter().all(|byte| *byte == 0))
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, OpenOptions},
        io::{Seek, Write},
        os::{fd::AsFd, unix::fs::MetadataExt},
        path::Path,
        process::Command,
    };

    use rustix::fs::FallocateFlags;

    use super::*;

    fn run(program: &str, arguments: &[&str]) {
        let done = Command::new(program).args(arguments).output().unwrap();
        let said = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "{said}");
    }

    fn holds_nothing(path: &Path) -> bool {
        is_blank(&File::open(path).unwrap()).unwrap()
    }

    #[test]
    fn what_was_written_to_is_told_from_a_new_image() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("image");
        let name = path.display().to_string();
        File::create(&path).unwrap();
        assert!(holds_nothing(&path), "empty");
        for size in ["1M", "20T"] {
            run("qemu-img", &["create", "-q", "-f", "qcow2", &name, size]);
            assert!(holds_nothing(&path), "new, of {size}");
        }
        run("qemu-img", &["create", "-q", "-f", "qcow2", &name, "8M"]);
        run("qemu-img", &["snapshot", "-c", "one", &name]);
        assert!(!holds_nothing(&path), "it has a snapshot");
        run("qemu-img", &["create", "-q", "-f", "qcow2", &name, "8M"]);
        run("qemu-io", &["-f", "qcow2", "-c", "write 4M 64k", &name]);
        assert!(!holds_nothing(&path), "a guest wrote to it");
        fs::write(&path, "text").unwrap();
        assert!(!holds_nothing(&path), "text");
    }

    #[test]
    fn a_raw_disk_is_blank_until_something_is_in_it() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("image");
        let mut file = File::create(&path).unwrap();
        file.set_len(1 << 30).unwrap();
        assert!(holds_nothing(&path));
        file = OpenOptions::new().write(true).open(&path).unwrap();
        file.seek(std::io::SeekFrom::Start(1 << 29)).unwrap();
        file.write_all(b"a").unwrap();
        assert!(!holds_nothing(&path));
    }

    #[test]
    fn a_hole_is_blank_whatever_blocks_its_file_has() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("image");
        let file = File::create(&path).unwrap();
        file.set_len(1 << 20).unwrap();
        rustix::fs::fallocate(file.as_fd(), FallocateFlags::KEEP_SIZE, 0, 1 << 20).unwrap();
        assert!(file.metadata().unwrap().blocks() > 0);
        assert!(holds_nothing(&path));
    }
}

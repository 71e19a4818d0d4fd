//! How large disks are, read from the files themselves. That needs no answer
//! from a guest's QEMU, whose monitor may be busy or hang. The format is the
//! definition's; a file is never asked what it is.

use std::{
    fs::{File, OpenOptions},
    io::{Read, Seek, SeekFrom},
    os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    path::Path,
};

use drover_model::guest::{Disk, Guest};

/// First bytes of a qcow2 image.
const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";
/// Where in it the size stands, as eight bytes, most significant first.
const QCOW2_SIZE: std::ops::Range<usize> = 24..32;
/// And how many snapshots it holds, as four.
const QCOW2_SNAPSHOTS: std::ops::Range<usize> = 60..64;

/// Said of a directory, a pipe, …
const NO_IMAGE: &str = "neither a file nor a block device";

/// What a disk takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(in super::super) struct Sizes {
    /// What the guest sees, bytes.
    pub(in super::super) virtual_bytes: u64,
    /// What it takes on this node, bytes.
    pub(in super::super) allocated_bytes: u64,
    /// Snapshots inside.
    pub(in super::super) snapshots: u32,
}

/// Fills in what a guest's local disks take; one that cannot be read keeps 0.
pub(in super::super) fn fill(guest: &mut Guest) {
    fill_by(guest, of_disk);
}

/// The same, by what is known of each disk.
pub(super) fn fill_by(guest: &mut Guest, known: impl Fn(&Disk) -> Option<Sizes>) {
    guest.images_with_snapshots.clear();
    for disk in &mut guest.disks {
        let Some(sizes) = known(disk) else { continue };
        disk.virtual_bytes = sizes.virtual_bytes;
        disk.allocated_bytes = sizes.allocated_bytes;
        if sizes.snapshots > 0 {
            let path = disk.local_path().map(str::to_owned);
            guest.images_with_snapshots.extend(path);
        }
    }
}

/// Whether there is something that a disk can be: a file or a block device. Whoever
/// opens a pipe may wait for ever, libvirtd too.
pub(in super::super) fn is_image(path: &Path) -> std::io::Result<()> {
    let kind = std::fs::metadata(path)?.file_type();
    match kind.is_file() || kind.is_block_device() {
        true => Ok(()),
        false => Err(std::io::Error::other(NO_IMAGE)),
    }
}

fn of_disk(disk: &Disk) -> Option<Sizes> {
    let path = disk.local_path()?;
    match measure(Path::new(path), &disk.format) {
        Ok(sizes) => Some(sizes),
        Err(error) => {
            tracing::debug!(path, %error, "size of a disk cannot be read");
            None
        }
    }
}

/// Sizes of an image of a known format.
pub(in super::super) fn measure(path: &Path, format: &str) -> std::io::Result<Sizes> {
    // Opening a device may do something: a watchdog is started by it.
    is_image(path)?;
    let mut file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    let metadata = file.metadata()?;
    let kind = metadata.file_type();
    let length = if kind.is_block_device() {
        file.seek(SeekFrom::End(0))?
    } else if kind.is_file() {
        metadata.len()
    } else {
        return Err(std::io::Error::other(NO_IMAGE));
    };
    let allocated_bytes = if kind.is_file() {
        metadata.blocks().saturating_mul(512)
    } else {
        length
    };
    let (virtual_bytes, snapshots) = match format {
        "raw" => (length, 0),
        "qcow2" => qcow2_header(&mut file)?,
        other => return Err(std::io::Error::other(format!("format {other}"))),
    };
    Ok(Sizes {
        virtual_bytes,
        allocated_bytes,
        snapshots,
    })
}

/// Size, and number of snapshots.
fn qcow2_header(file: &mut File) -> std::io::Result<(u64, u32)> {
    let mut header = [0_u8; QCOW2_SNAPSHOTS.end];
    file.seek(SeekFrom::Start(0))?;
    file.read_exact(&mut header)?;
    if header[..4] != QCOW2_MAGIC {
        return Err(std::io::Error::other(
            "no qcow2 image, as the definition says",
        ));
    }
    let (mut size, mut snapshots) = ([0_u8; 8], [0_u8; 4]);
    size.copy_from_slice(&header[QCOW2_SIZE]);
    snapshots.copy_from_slice(&header[QCOW2_SNAPSHOTS]);
    Ok((u64::from_be_bytes(size), u32::from_be_bytes(snapshots)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pipe_is_no_image_and_is_not_waited_for() {
        let place = tempfile::tempdir().unwrap();
        let pipe = place.path().join("pipe");
        let (kind, mode) = (rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR);
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, kind, mode, 0).unwrap();
        for odd in [&pipe, place.path(), Path::new("/dev/zero")] {
            assert_eq!(is_image(odd).unwrap_err().to_string(), NO_IMAGE);
            assert_eq!(measure(odd, "raw").unwrap_err().to_string(), NO_IMAGE);
        }
        let file = place.path().join("file");
        assert!(is_image(&file).is_err(), "it is not there");
        File::create(&file).unwrap();
        is_image(&file).unwrap();
    }

    #[test]
    fn raw_is_its_length_and_qcow2_says_so() {
        let place = tempfile::tempdir().unwrap();
        let raw = place.path().join("raw");
        File::create(&raw).unwrap().set_len(1 << 20).unwrap();
        let sizes = measure(&raw, "raw").unwrap();
        assert_eq!(sizes.virtual_bytes, 1 << 20);
        assert_eq!(sizes.allocated_bytes, 0, "sparse");

        let mut header = vec![0_u8; 512];
        header[..4].copy_from_slice(&QCOW2_MAGIC);
        header[QCOW2_SIZE].copy_from_slice(&(5_u64 << 30).to_be_bytes());
        header[QCOW2_SNAPSHOTS].copy_from_slice(&2_u32.to_be_bytes());
        let qcow2 = place.path().join("qcow2");
        std::fs::write(&qcow2, header).unwrap();
        let sizes = measure(&qcow2, "qcow2").unwrap();
        assert_eq!((sizes.virtual_bytes, sizes.snapshots), (5 << 30, 2));
        assert!(measure(&raw, "qcow2").is_err());
        assert!(measure(&raw, "vmdk").is_err());
    }
}

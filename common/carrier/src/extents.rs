//! Where a file has data and where it has holes.

use std::{fs::File, io, path::Path};

use rustix::{
    fs::{SeekFrom, seek},
    io::Errno,
};

use crate::disk::{self, Source};

/// A range of a file: from here, so many bytes.
pub(crate) type Range = std::ops::Range<u64>;

/// The first range of data that is not before `from` and not after `end`; its
/// ends are those of the extent, not rounded. All is data where the file or its
/// file system knows of no holes.
pub(crate) fn next_data(
    file: &File,
    block: bool,
    from: u64,
    end: u64,
) -> io::Result<Option<Range>> {
    if from >= end {
        return Ok(None);
    }
    if block {
        return Ok(Some(from..end));
    }
    let start = match seek(file, SeekFrom::Data(from)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(None),
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some(from..end)),
        Err(error) => return Err(error.into()),
    };
    if start >= end {
        return Ok(None);
    }
    let stop = seek(file, SeekFrom::Hole(start))?.min(end);
    Ok(Some(start..stop))
}

/// Bytes of data in a file: its extents without its holes. All of a block device.
///
/// # Errors
/// The file cannot be opened or read.
pub fn data_bytes(path: impl AsRef<Path>) -> io::Result<u64> {
    count(&disk::open_source(path.as_ref())?, || Ok(()))
}

/// The same of an open file; before each extent asks `tick` whether to go on.
pub(crate) fn count<E: From<io::Error>>(
    source: &Source,
    mut tick: impl FnMut() -> Result<(), E>,
) -> Result<u64, E> {
    let (mut total, mut at) = (0, 0);
    while let Some(range) = next_data(&source.file, source.block, at, source.len)? {
        tick()?;
        total += range.end - range.start;
        at = range.end;
    }
    Ok(total)
}

/// Whether all bytes are zero.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // The first few by hand; then each byte is compared with one before it,
    // which is what memcmp does fastest.
    let (first, rest) = bytes.split_at(bytes.len().min(16));
    first.iter().all(|byte| *byte == 0) && rest == &bytes[..rest.len()]
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn extents_are_found_where_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let file = File::create(&path).unwrap();
        file.set_len(1 << 30).unwrap();
        for at in [1 << 20, 512 << 20] {
            file.write_all_at(&[1; 65536], at).unwrap();
        }
        assert_eq!(data_bytes(&path).unwrap(), 2 * 65536);
        let source = disk::open_source(&path).unwrap();
        let found = next_data(&source.file, false, 0, source.len).unwrap();
        assert_eq!(found, Some(1 << 20..(1 << 20) + 65536));
        let found = next_data(&source.file, false, 513 << 20, source.len).unwrap();
        assert_eq!(found, None);
        let inside = next_data(&source.file, false, (1 << 20) + 5, (1 << 20) + 9).unwrap();
        assert_eq!(inside, Some((1 << 20) + 5..(1 << 20) + 9));
    }

    #[test]
    fn zero_is_zero_at_any_length() {
        for len in [0, 1, 15, 16, 17, 31, 32, 33, 4096, 65537] {
            let mut bytes = vec![0; len];
            assert!(is_zero(&bytes), "{len}");
            for at in [0, len / 2, len.saturating_sub(1)] {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = 1;
                    assert!(!is_zero(&bytes), "{len} {at}");
                    bytes[at] = 0;
                }
            }
        }
    }
}

//! What lies under an image, read from the images themselves, for guests that
//! are off: libvirt spells chains out for running guests alone.
//!
//! An image is read in the format its user names: the definition for the top
//! one, its overlay's header for each below. A file is never asked what it is,
//! as a guest writes what it likes into a raw one. And a header, which may have
//! come from a tenant's upload, cannot name any file of the host: images below
//! lie beside the one above, or where the node keeps images ([`Places`]).

use std::{
    fs::{File, OpenOptions},
    io::{Read, Seek, SeekFrom},
    ops::Range,
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use drover_model::guest::BackingImage;

use super::{checked, directory, sizes};

/// Images followed below one disk; libvirt itself stops at 200.
const DEEPEST_CHAIN: usize = 200;
/// Longest name of an image below in a header, bytes (QEMU's own limit).
pub(super) const LONGEST_NAME: u32 = 1023;
/// Length of the header's part that is read, bytes: version 3's, and some.
const HEADER: usize = 104;
/// Incompatible feature: the data lie in another file (qcow2 specification).
const DATA_FILE: u64 = 1 << 2;
/// Header extension that names the format of the image below.
pub(super) const BACKING_FORMAT: u32 = 0xE279_2ACA;
/// Extensions looked through; QEMU writes three or four.
const MOST_EXTENSIONS: usize = 32;

/// Directories whose images may lie under others, wherever those are.
#[derive(Debug, Clone)]
pub(in super::super) struct Places(pub(in super::super) Vec<PathBuf>);

impl Places {
    fn allow(&self, image: &Path, above: &Path) -> bool {
        directory(image) == directory(above) || self.0.iter().any(|p| image.starts_with(p))
    }
}

/// The images under one, nearest first.
///
/// # Errors
/// In words: the chain cannot be followed, or leads where it may not.
pub(in super::super) fn below(
    image: &str,
    format: &str,
    places: &Places,
) -> Result<Vec<BackingImage>, String> {
    let mut chain: Vec<BackingImage> = Vec::new();
    let mut above = checked(image).map_err(|e| e.to_string())?;
    let mut format = format.to_owned();
    while format == "qcow2" {
        let shown = above.display().to_string();
        let header = read_header(&above).map_err(|e| format!("{shown}: {e}"))?;
        if header.data_file {
            return Err(format!("{shown} keeps its data in another file"));
        }
        let Some((name, backing_format)) = header.backing else {
            break;
        };
        let path = resolve(&name, &above)
            .ok_or_else(|| format!("{shown} is based on {name:?}, which is no local file"))?;
        if !places.allow(&path, &above) {
            return Err(format!(
                "{shown} is based on {}, which lies in no directory for images",
                path.display()
            ));
        }
        format = backing_format
            .ok_or_else(|| format!("{shown} does not say what format {} has", path.display()))?;
        let allocated_bytes = std::fs::metadata(&path)
            .map_err(|e| format!("{}: {e}", path.display()))?
            .blocks()
            .saturating_mul(512);
        let path_text = path.to_str().ok_or("a path is no UTF-8")?.to_owned();
        if chain.len() >= DEEPEST_CHAIN || chain.iter().any(|i| i.path == path_text) {
            return Err(format!("the chain under {image} does not end"));
        }
        chain.push(BackingImage {
            path: path_text,
            format: format.clone(),
            allocated_bytes,
        });
        above = path;
    }
    Ok(chain)
}

/// Whether a qcow2 image names the one below it by a path from its own
/// directory: at another place it would name another one.
pub(in super::super) fn leads_by_its_place(image: &Path) -> std::io::Result<bool> {
    let backing = read_header(image)?.backing;
    Ok(backing.is_some_and(|(name, _)| !name.starts_with('/')))
}

/// Whether it is a qcow2 image that keeps what is in it in another file. Of what
/// starts like one by chance this errs to the safe side.
pub(super) fn has_data_elsewhere(file: &File) -> bool {
    let mut bytes = [0_u8; 80];
    let read = file.read_exact_at(&mut bytes, 0);
    read.is_ok()
        && bytes[..4] == *b"QFI\xfb"
        && word(&bytes, 4) >= 3
        && long(&bytes, 72) & DATA_FILE != 0
}

/// The plain absolute path that a header's text stands for.
fn resolve(name: &str, above: &Path) -> Option<PathBuf> {
    // QEMU takes a colon before the first slash for a protocol.
    let before_slash = name.split('/').next().unwrap_or_default();
    if name.is_empty() || before_slash.contains(':') {
        return None;
    }
    let path = directory(above).join(name);
    checked(path.to_str()?).ok()
}

struct Header {
    data_file: bool,
    backing: Option<(String, Option<String>)>,
}

fn read_header(path: &Path) -> std::io::Result<Header> {
    sizes::is_image(path)?;
    let mut file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    let mut bytes = [0_u8; HEADER];
    file.read_exact(&mut bytes)?;
    if bytes[..4] != *b"QFI\xfb" {
        return Err(other("no qcow2 image, though it is used as one"));
    }
    let version = word(&bytes, 4);
    let (features, length) = match version {
        2 => (0, 72),
        3 => (long(&bytes, 72), word(&bytes, 100)),
        v => return Err(other(&format!("qcow2 of version {v}"))),
    };
    let (offset, size) = (long(&bytes, 8), word(&bytes, 16));
    let backing = match offset {
        0 => None,
        _ if size == 0 || size > LONGEST_NAME => return Err(other("its backing file's name")),
        _ => {
            let name = String::from_utf8(read_at(&mut file, offset, size)?)
                .map_err(|_| other("its backing file's name is no UTF-8"))?;
            Some((name, backing_format(&mut file, length.into(), offset)?))
        }
    };
    Ok(Header {
        data_file: features & DATA_FILE != 0,
        backing,
    })
}

fn backing_format(file: &mut File, at: u64, name_at: u64) -> std::io::Result<Option<String>> {
    let text = extension(file, at..name_at, BACKING_FORMAT)?.map(String::from_utf8);
    text.transpose().map_err(|_| other("its backing format"))
}

/// What the first header extension of a kind says, of those that begin within `range`.
/// Where the name of the image below begins they end, with or without a mark.
pub(super) fn extension(
    file: &mut File,
    range: Range<u64>,
    wanted: u32,
) -> std::io::Result<Option<Vec<u8>>> {
    let mut at = range.start;
    for _ in 0..MOST_EXTENSIONS {
        if at >= range.end {
            return Ok(None);
        }
        let head = read_at(file, at, 8)?;
        let (kind, length) = (word(&head, 0), word(&head, 4));
        match kind {
            0 => return Ok(None),
            _ if kind == wanted && length <= LONGEST_NAME => {
                return read_at(file, at + 8, length).map(Some);
            }
            _ => at = at.saturating_add(8 + u64::from(length).next_multiple_of(8)),
        }
    }
    Ok(None)
}

pub(super) fn read_at(file: &mut File, offset: u64, length: u32) -> std::io::Result<Vec<u8>> {
    file.seek(SeekFrom::Start(offset))?;
    let mut bytes = vec![0_u8; usize::try_from(length).unwrap_or(0)];
    file.read_exact(&mut bytes)?;
    Ok(bytes)
}

pub(super) fn word(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..at + 4)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u32::from_be_bytes)
}

pub(super) fn long(bytes: &[u8], at: usize) -> u64 {
    (u64::from(word(bytes, at)) << 32) | u64::from(word(bytes, at + 4))
}

fn other(words: &str) -> std::io::Error {
    std::io::Error::other(words.to_owned())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn qemu_img(arguments: &[&str]) {
        let done = Command::new("qemu-img").args(arguments).output().unwrap();
        assert!(
            done.status.success(),
            "{}",
            String::from_utf8_lossy(&done.stderr)
        );
    }

    #[test]
    fn a_chain_is_followed_by_what_its_headers_say() {
        let place = tempfile::tempdir().unwrap();
        let at = |name: &str| place.path().join(name).display().to_string();
        qemu_img(&["create", "-q", "-f", "raw", &at("base"), "1M"]);
        qemu_img(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-F",
            "raw",
            "-b",
            &at("base"),
            &at("mid"),
        ]);
        qemu_img(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-F",
            "qcow2",
            "-b",
            "mid",
            &at("top"),
        ]);
        let places = Places(Vec::new());
        let chain = below(&at("top"), "qcow2", &places).unwrap();
        let found: Vec<_> = chain
            .iter()
            .map(|i| (i.path.clone(), i.format.as_str()))
            .collect();
        assert_eq!(found, [(at("mid"), "qcow2"), (at("base"), "raw")]);
        assert_eq!(
            below(&at("top"), "raw", &places).unwrap(),
            [],
            "a raw image is not looked into"
        );
    }

    #[test]
    fn a_chain_may_not_lead_out_of_the_images_places() {
        let place = tempfile::tempdir().unwrap();
        let at = |name: &str| place.path().join(name).display().to_string();
        let make = |backing: &str, format: &[&str]| {
            let mut arguments = vec!["create", "-q", "-f", "qcow2", "-u", "-b", backing];
            arguments.extend(format);
            let top = at("top");
            arguments.extend([top.as_str(), "1M"]);
            qemu_img(&arguments);
            below(&top, "qcow2", &Places(vec!["/srv/images".into()]))
        };
        let error = make("/etc/hostname", &["-F", "raw"]).unwrap_err();
        assert!(error.contains("no directory for images"), "{error}");
        let error = make("../../etc/hostname", &["-F", "raw"]).unwrap_err();
        assert!(error.contains("no local file"), "{error}");
        let error = make("nbd:localhost:1", &["-F", "raw"]).unwrap_err();
        assert!(error.contains("no local file"), "{error}");
        let error = make("json:{\"driver\":\"null-co\"}", &["-F", "raw"]).unwrap_err();
        assert!(error.contains("no local file"), "{error}");
        let error = make("/srv/images/gone", &["-F", "raw"]).unwrap_err();
        assert!(error.contains("/srv/images/gone"), "{error}");
        let round = [
            "create", "-q", "-f", "qcow2", "-u", "-F", "qcow2", "-b", "top",
        ];
        qemu_img(&[&round[..], &[at("loop").as_str(), "1M"]].concat());
        let error = make(&at("loop"), &["-F", "qcow2"]).unwrap_err();
        assert!(error.contains("does not end"), "{error}");
    }
}

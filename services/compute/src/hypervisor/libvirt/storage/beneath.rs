//! Whatever an image may read from, for whoever takes a file away.
//!
//! [`chain`](super::chain) is for those that move a guest, and refuses what they could
//! not carry. This errs to the other side: it follows a header wherever it leads,
//! guesses what none says, and only what is there and cannot be read stops it.

use std::{
    collections::BTreeSet,
    fs::{File, OpenOptions},
    io,
    ops::Range,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use serde_json::Value;

use super::{
    chain::{BACKING_FORMAT, LONGEST_NAME, extension, long, read_at, word},
    directory, sizes,
};

/// A header of version 1, 2 or 3: what all of them share.
const SHARED_HEADER: u32 = 72;
/// Header extension that names the file with the image's data.
const DATA_FILE_NAME: u32 = 0x4441_5441;

/// A file that an image names, and its format where that is said.
pub(super) type Named = (String, Option<String>);

/// What is at a path.
#[derive(Debug)]
pub(super) enum Found {
    /// An image.
    Image(Image),
    /// A file that names no others.
    Other,
    /// None, or what no image could be.
    Nothing,
}

/// An image as it is read.
#[derive(Debug)]
pub(super) struct Image {
    /// The files that its header names: at whatever places the names may stand for, of
    /// which some have no file.
    pub(super) names: Vec<Named>,
    /// The number of the device it is on.
    pub(super) device: u64,
}

/// Whether an image of that format can name others. A guest writes what it likes into a
/// raw one.
pub(super) fn can_name_others(format: Option<&str>) -> bool {
    format != Some("raw")
}

/// What is at a path.
///
/// # Errors
/// It is there and cannot be read.
pub(super) fn read(path: &str) -> io::Result<Found> {
    let path = Path::new(path);
    let (names, device) = match names(path) {
        Ok(None) => return Ok(Found::Other),
        // Too short.
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(Found::Other),
        Err(error) if is_nothing(&error) => return Ok(Found::Nothing),
        Ok(Some(found)) => found,
        Err(error) => return Err(error),
    };
    let places = names.into_iter().flat_map(|(name, format)| {
        let places = candidates(&name, path).into_iter();
        places.map(move |place| (place, format.clone()))
    });
    let names = places.collect();
    Ok(Found::Image(Image { names, device }))
}

/// Whether an error says that no file is there, or none that an image could be.
pub(super) fn is_nothing(error: &io::Error) -> bool {
    let no_file = [
        libc::ENOENT,
        libc::ENOTDIR,
        libc::ELOOP,
        libc::ENAMETOOLONG,
        libc::EINVAL,
        libc::ENXIO,
        libc::ENODEV,
        libc::ENOMEDIUM,
    ];
    match error.raw_os_error() {
        Some(code) => no_file.contains(&code),
        // Too short, or of no use.
        None => true,
    }
}

/// The names that an image's header gives, with their formats where it says those, and the
/// device it is on.
fn names(path: &Path) -> io::Result<Option<(Vec<Named>, u64)>> {
    sizes::is_image(path)?;
    let mut options = OpenOptions::new();
    let options = options.read(true).custom_flags(libc::O_NONBLOCK);
    let mut file = options.open(path)?;
    let head = read_at(&mut file, 0, SHARED_HEADER)?;
    if head[..4] != *b"QFI\xfb" {
        return Ok(None);
    }
    let device = file.metadata()?.dev();
    let version = word(&head, 4);
    let extensions_at = match version {
        1 => None,
        2 => Some(SHARED_HEADER),
        _ => Some(word(&read_at(&mut file, 100, 4)?, 0)),
    };
    let (offset, size) = (long(&head, 8), word(&head, 16));
    let name = match offset != 0 && size <= LONGEST_NAME {
        true => Some(lossy(&read_at(&mut file, offset, size)?)),
        false => None,
    };
    let end = if offset == 0 { u64::MAX } else { offset };
    let mut text_of = |kind: u32| match extensions_at {
        Some(at) => extension_text(&mut file, u64::from(at)..end, kind),
        None => Ok(None),
    };
    let format = text_of(BACKING_FORMAT)?;
    let data_file = text_of(DATA_FILE_NAME)?;
    let mut named = Vec::new();
    named.extend(name.map(|name| (name, format)));
    named.extend(data_file.map(|name| (name, Some("raw".to_owned()))));
    Ok(Some((named, device)))
}

/// What a header extension says; nothing if it, or one before it, goes beyond the file.
fn extension_text(file: &mut File, range: Range<u64>, kind: u32) -> io::Result<Option<String>> {
    match extension(file, range, kind) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        read => Ok(read?.as_deref().map(lossy)),
    }
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The places that a name may stand for: as it is, behind a protocol, or somewhere in
/// the JSON that QEMU takes in place of a name.
fn candidates(name: &str, above: &Path) -> BTreeSet<String> {
    let mut texts = vec![name.to_owned()];
    if let Some((_, behind)) = name.split_once(':') {
        texts.push(behind.to_owned());
        if let Ok(json) = serde_json::from_str(behind) {
            collect_texts(&json, &mut texts);
        }
    }
    let texts = texts.into_iter().filter(|text| !text.is_empty());
    let near = directory(above).to_owned();
    // Beside the image, also where a link leads to that.
    let real = above.canonicalize().ok();
    let real = real.map(|path| directory(&path).to_owned());
    let places: BTreeSet<PathBuf> = [Some(near), real].into_iter().flatten().collect();
    let joined = texts.flat_map(|text| {
        let at = places.iter().map(|place| place.join(&text));
        at.filter_map(|path| path.to_str().map(str::to_owned))
            .collect::<Vec<_>>()
    });
    joined.collect()
}

fn collect_texts(json: &Value, into: &mut Vec<String>) {
    match json {
        Value::String(text) => into.push(text.clone()),
        Value::Array(values) => values.iter().for_each(|value| collect_texts(value, into)),
        Value::Object(fields) => fields.values().for_each(|value| collect_texts(value, into)),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink, process::Command};

    use super::{
        super::{chain, measure::Measurer},
        *,
    };

    fn qemu_img(arguments: &[&str]) {
        let done = Command::new("qemu-img").args(arguments).output().unwrap();
        let said = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "{said}");
    }

    struct Place(tempfile::TempDir);

    impl Place {
        fn at(&self, name: &str) -> String {
            self.0.path().join(name).display().to_string()
        }

        /// The files that an overlay uses whose base is named as told.
        async fn overlay(&self, base: &str) -> BTreeSet<String> {
            let common = ["create", "-q", "-u", "-f", "qcow2", "-F", "qcow2"];
            qemu_img(&[&common[..], &["-b", base, &self.at("top"), "1M"]].concat());
            self.beneath("top").await
        }

        async fn beneath(&self, name: &str) -> BTreeSet<String> {
            let top = (self.at(name), "qcow2".to_owned());
            let found = Measurer::default().beneath(vec![top]).await;
            let found = found.into_iter().next().unwrap();
            assert_eq!(found.unread, None);
            found.paths
        }
    }

    fn place() -> Place {
        let place = Place(tempfile::tempdir().unwrap());
        qemu_img(&["create", "-q", "-f", "raw", &place.at("base"), "1M"]);
        let over = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base"];
        qemu_img(&[&over[..], &[&place.at("mid")]].concat());
        place
    }

    /// Has the image's header say nothing of the format below.
    fn forget_format(image: &str) {
        let mut bytes = fs::read(image).unwrap();
        let mark = BACKING_FORMAT.to_be_bytes();
        let at = bytes.windows(4).position(|word| word == mark).unwrap();
        bytes[at] = 0x11;
        fs::write(image, bytes).unwrap();
    }

    #[tokio::test]
    async fn an_image_is_followed_however_it_names_what_is_below() {
        let place = place();
        let base = place.at("base");
        let json = format!(r#"json:{{"file":{{"driver":"file","filename":"{base}"}}}}"#);
        let prefixed = format!("file:{base}");
        for name in ["mid", &place.at("mid"), "base", &json, &prefixed] {
            let found = place.overlay(name).await;
            assert!(found.contains(&base), "{name}: {found:?}");
            forget_format(&place.at("top"));
            let found = place.beneath("top").await;
            assert!(found.contains(&base), "{name}: {found:?}");
        }
        let raw = (place.at("mid"), "raw".to_owned());
        let found = Measurer::default().beneath(vec![raw]).await;
        assert_eq!(found[0].paths, BTreeSet::new(), "the guest wrote that");
    }

    #[tokio::test]
    async fn what_is_beneath_a_middle_image_is_known_while_that_is_not_there() {
        let place = place();
        let (mid, base) = (place.at("mid"), place.at("base"));
        place.overlay("mid").await;
        let measurer = Measurer::default();
        let look = async |measurer: &Measurer| {
            let top = (place.at("top"), "qcow2".to_owned());
            measurer.beneath(vec![top]).await.remove(0).paths
        };
        assert!(look(&measurer).await.contains(&base));
        fs::remove_file(&mid).unwrap();
        assert!(look(&measurer).await.contains(&base), "it is gone");
        fs::write(&mid, "its mount point has another file of that name").unwrap();
        assert!(look(&measurer).await.contains(&base), "it is another");
        let restarted = Measurer::default();
        restarted.take_up(measurer.remembered());
        assert!(look(&restarted).await.contains(&base), "after a restart");
        fs::remove_file(&mid).unwrap();
        qemu_img(&["create", "-q", "-f", "qcow2", &mid, "1M"]);
        assert!(!look(&restarted).await.contains(&base), "it needs none");
    }

    #[tokio::test]
    async fn the_file_with_an_images_data_is_beneath_it() {
        let place = place();
        let (top, data) = (place.at("top"), place.at("data"));
        let option = format!("data_file={data}");
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", &option, &top, "1M"]);
        assert!(place.beneath("top").await.contains(&data));
    }

    /// Has the image's header end its extensions with the name below and with no mark, or
    /// with an extension that goes beyond the file.
    fn forget_end(image: &str, goes_beyond: bool) {
        let mut bytes = fs::read(image).unwrap();
        let (from, size) = (long(&bytes, 8), word(&bytes, 16));
        let from = usize::try_from(from).unwrap();
        let size = usize::try_from(size).unwrap();
        let at = usize::try_from(word(&bytes, 100)).unwrap();
        let name = bytes[from..from + size].to_vec();
        let kind = if goes_beyond {
            0x1111_1111
        } else {
            BACKING_FORMAT
        };
        let length: u32 = if goes_beyond { 0x7FFF_FFFF } else { 5 };
        let mut extension = [kind.to_be_bytes(), length.to_be_bytes()].concat();
        extension.extend(b"qcow2\0\0\0");
        let (name_at, end) = (at + extension.len(), at + extension.len() + size);
        bytes[at..name_at].copy_from_slice(&extension);
        bytes[name_at..end].copy_from_slice(&name);
        bytes[8..16].copy_from_slice(&u64::try_from(name_at).unwrap().to_be_bytes());
        fs::write(image, bytes).unwrap();
    }

    #[tokio::test]
    async fn extensions_without_an_end_do_not_hide_what_is_below() {
        let place = place();
        let (top, mid, base) = (place.at("top"), place.at("mid"), place.at("base"));
        place.overlay(&mid).await;
        forget_end(&top, false);
        qemu_img(&["info", "-U", "--backing-chain", &top]);
        let found = place.beneath("top").await;
        assert!(found.contains(&mid) && found.contains(&base), "{found:?}");
        let places = chain::Places(Vec::new());
        let chain = chain::below(&top, "qcow2", &places).unwrap();
        assert_eq!((&chain[0].path, &*chain[0].format), (&mid, "qcow2"));
        forget_end(&top, true);
        let found = place.beneath("top").await;
        assert!(found.contains(&mid) && found.contains(&base), "{found:?}");
    }

    #[tokio::test]
    async fn beside_a_link_is_also_beside_what_it_leads_to() {
        let place = place();
        fs::create_dir(place.at("links")).unwrap();
        symlink(place.at("mid"), place.at("links/mid")).unwrap();
        let found = place.beneath("links/mid").await;
        assert!(found.contains(&place.at("base")), "{found:?}");
    }

    #[tokio::test]
    async fn nothing_is_beneath_what_is_no_image() {
        let place = place();
        fs::write(place.at("short"), "QFI").unwrap();
        for name in ["gone", "short", ".", "base/under"] {
            assert_eq!(place.beneath(name).await, BTreeSet::new(), "{name}");
        }
        place.overlay("top").await; // It ends.
        assert!(is_nothing(&io::ErrorKind::UnexpectedEof.into()));
        let broken = io::Error::from_raw_os_error(libc::ENOTCONN);
        assert!(!is_nothing(&broken), "it may be there");
    }
}

//! What holds of headers of qcow2 images, which may have come from a tenant: they lead
//! nowhere that is not allowed. The body of a fuzz target.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::{
    chain::{self, Places},
    checked, directory, sizes,
};

struct Place(PathBuf);

impl Drop for Place {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.0));
    }
}

/// An image whose file holds this, beside others that it may be based on.
pub fn qcow2(data: &[u8]) {
    thread_local! {
        static PLACE: Place = make();
    }
    PLACE.with(|place| look(&place.0, data));
}

fn make() -> Place {
    let memory = Path::new("/dev/shm");
    let place = if memory.is_dir() {
        memory
    } else {
        Path::new("/tmp")
    };
    let place = place.join(format!("drover-fuzz-{}", uuid::Uuid::new_v4()));
    fs::create_dir_all(place.join("images")).expect("a directory");
    for name in ["base", "images/base"] {
        fs::write(place.join(name), [0; 512]).expect("a file");
    }
    Place(place)
}

fn look(place: &Path, data: &[u8]) {
    let top = place.join("top");
    fs::write(&top, data).expect("a file");
    let path = top.to_str().expect("UTF-8");
    let images = place.join("images");
    let places = Places(vec![images.clone()]);
    match chain::below(path, "qcow2", &places) {
        Ok(chain) => {
            for image in &chain {
                let below = checked(&image.path).expect("a plain path");
                let beside = directory(&below) == place;
                assert!(
                    beside || below.starts_with(&images),
                    "{image:?} is not allowed"
                );
                assert!(!image.format.contains('\0') || image.format.len() < 1024);
            }
            assert!(data.starts_with(b"QFI\xfb"));
        }
        Err(words) => assert!(!words.is_empty()),
    }
    // Nobody looks into a raw one.
    assert_eq!(chain::below(path, "raw", &places), Ok(Vec::new()));
    let sizes = sizes::measure(&top, "qcow2");
    let header = data.get(..64).and_then(|header| header.get(24..32));
    let said = header.and_then(|bytes| bytes.try_into().ok());
    match sizes {
        Ok(sizes) => assert_eq!(Some(sizes.virtual_bytes), said.map(u64::from_be_bytes)),
        Err(_) => assert!(said.is_none() || !data.starts_with(b"QFI\xfb")),
    }
    drop(chain::leads_by_its_place(&top));
}

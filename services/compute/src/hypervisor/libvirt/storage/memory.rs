//! What was seen of storage, kept over a restart of the agent: what lies beneath images
//! whose storage hangs by then.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
};

use serde::{Deserialize, Serialize};
use tokio::sync::{Mutex, OnceCell};
use tracing::warn;

use super::{image::Identity, links::Link, measure::Measurer};
use crate::journal::{self, StateDisk};

/// The kernel's name of its own run: numbers of devices hold for as long.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// See the module.
#[derive(Debug)]
pub(in super::super) struct Memory {
    file: Option<PathBuf>,
    taken_up: OnceCell<()>,
    written: Mutex<Option<Remembered>>,
}

/// What is kept.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Remembered {
    pub(super) boot: String,
    /// By path of an image at the top: all that is beneath it. A former version knows
    /// nothing else, and may be put back.
    #[serde(default)]
    pub(super) beneath: BTreeMap<String, BTreeSet<String>>,
    /// What a former version had there, as long as it serves; none if it wrote this.
    #[serde(default)]
    pub(super) whole: Option<BTreeMap<String, BTreeSet<String>>>,
    /// By path of an image: the files that it names.
    #[serde(default)]
    pub(super) links: BTreeMap<String, Link>,
    /// By path: which file was there; none if there was none.
    pub(super) identities: BTreeMap<String, Option<Identity>>,
}

impl Memory {
    pub(in super::super) fn new(file: Option<PathBuf>) -> Self {
        Self {
            file,
            taken_up: OnceCell::new(),
            written: Mutex::default(),
        }
    }

    /// Has the measurer know, once, what was seen before this agent started.
    pub(in super::super) async fn take_up(&self, measurer: &Measurer) {
        let Some(file) = &self.file else { return };
        let read = async || match journal::read_whole::<Remembered>(file).await {
            Ok(None) => {}
            Ok(Some(mut remembered)) => {
                if remembered.boot != boot_id() {
                    remembered.identities.clear();
                    remembered.links.values_mut().for_each(Link::forget_device);
                }
                measurer.take_up(remembered);
            }
            Err(error) => warn!(file = %file.display(), %error,
                "what was seen of storage before is not known"),
        };
        self.taken_up.get_or_init(read).await;
    }

    /// Keeps what it knows now.
    pub(in super::super) async fn keep(&self, measurer: &Measurer) {
        let Some(file) = &self.file else { return };
        let mut written = self.written.lock().await;
        let now = Remembered {
            boot: boot_id(),
            ..measurer.remembered()
        };
        if written.as_ref() == Some(&now) {
            return;
        }
        match journal::write_whole(file, &now, &StateDisk::default()).await {
            Ok(()) => *written = Some(now),
            Err(error) => warn!(%error, "what is seen of storage is not kept for a restart"),
        }
    }
}

fn boot_id() -> String {
    let id = std::fs::read_to_string(BOOT_ID).unwrap_or_default();
    id.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_seen_of_storage_is_known_after_a_restart() {
        let place = tempfile::tempdir().unwrap();
        let file = place.path().join("storage.json");
        let measurer = Measurer::default();
        let image = place.path().join("image").display().to_string();
        std::fs::write(&image, "no image").unwrap();
        measurer.identities(vec![image.clone()]).await;
        measurer.beneath(vec![(image, "qcow2".to_owned())]).await;
        let known = measurer.remembered();
        assert_eq!((known.links.len(), known.identities.len()), (1, 1));
        Memory::new(Some(file.clone())).keep(&measurer).await;
        let restarted = Measurer::default();
        Memory::new(Some(file)).take_up(&restarted).await;
        assert_eq!(restarted.remembered(), known);
    }

    #[tokio::test]
    async fn what_a_former_version_kept_is_known() {
        let place = tempfile::tempdir().unwrap();
        let file = place.path().join("storage.json");
        let kept = r#"{"boot": "x", "beneath": {"/top": ["/base", "/mid"]}, "identities": {}}"#;
        std::fs::write(&file, kept).unwrap();
        let measurer = Measurer::default();
        Memory::new(Some(file)).take_up(&measurer).await;
        let top = ("/top".to_owned(), "qcow2".to_owned());
        let found = measurer.beneath(vec![top]).await.remove(0);
        assert_eq!(found.paths.len(), 2, "{found:?}");
    }
}

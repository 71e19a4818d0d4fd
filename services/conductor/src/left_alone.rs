//! What a newer Drover wrote, and this one therefore leaves alone: it is neither
//! driven nor changed, holds what it is about, and is shown by `doctor`.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use drover_model::api::conductor::LeftAlone;
use tracing::warn;

/// Most that is kept of; what is beyond is in the log.
const MOST: usize = 100;

/// See the module. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Left(Arc<Mutex<BTreeMap<String, String>>>);

impl Left {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something is left alone; said aloud once.
    pub fn note(&self, what: String, why: &str) {
        let mut left = self.lock();
        if left.get(&what).is_some_and(|before| before == why) {
            return;
        }
        warn!(
            what,
            why, "of a newer Drover: left alone, for a conductor that knows it"
        );
        if left.len() < MOST {
            left.insert(what, why.to_owned());
        }
    }

    /// Only these of a kind are left alone still; others were taken up by somebody.
    pub fn keep(&self, kind: &str, still: &[String]) {
        let is_kept = |what: &String| !what.starts_with(kind) || still.contains(what);
        self.lock().retain(|what, _| is_kept(what));
    }

    /// All of it.
    pub fn all(&self) -> Vec<LeftAlone> {
        let left = self.lock();
        let all = left.iter().map(|(what, why)| LeftAlone {
            what: what.clone(),
            why: why.clone(),
        });
        all.collect()
    }
}

//! Which state directory this is. One that was made anew, on a node that was
//! installed again say, has another identity: what its journal does not know may
//! have been all the same.

use std::{io, path::Path};

use drover_model::ids::StateId;
use serde::{Deserialize, Serialize};
use tracing::info;

use super::{
    JournalError,
    files::{self, Flush, StateDisk, Unread, failed},
};

/// Longest such file, bytes.
const MAX_BYTES: u64 = 4096;

#[derive(Serialize, Deserialize)]
struct Identity {
    id: StateId,
}

/// Reads the identity of a state directory, or gives it one.
///
/// # Errors
/// It cannot be read now, or not be written.
pub(super) fn of(state_dir: &Path, disk: &StateDisk) -> Result<StateId, JournalError> {
    let path = state_dir.join("identity.json");
    match read(&path) {
        Ok(Some(id)) => return Ok(id),
        Ok(None) => {}
        Err(Unread::Corrupt(why)) => files::set_aside(&path, &why),
        Err(Unread::NotNow(why)) => return Err(failed("read", &path)(io::Error::other(why))),
    }
    let id = StateId::generate();
    let text = serde_json::to_vec(&Identity { id }).map_err(io::Error::other);
    let text = text.map_err(failed("write", &path))?;
    files::replace(&path, &text, Flush::ToDisk, disk)?;
    info!(%id, state_dir = %state_dir.display(), "the state directory is new, as far as can be told");
    Ok(id)
}

fn read(path: &Path) -> Result<Option<StateId>, Unread> {
    let Some(text) = files::read(path, MAX_BYTES)? else {
        return Ok(None);
    };
    let read = serde_json::from_slice::<Identity>(&text);
    let identity = read.map_err(|e| Unread::Corrupt(e.to_string()))?;
    Ok(Some(identity.id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_directory_keeps_its_identity_and_a_new_one_has_another() {
        let (dir, disk) = (tempfile::tempdir().unwrap(), StateDisk::default());
        let first = of(dir.path(), &disk).unwrap();
        assert_eq!(of(dir.path(), &disk).unwrap(), first);
        std::fs::write(dir.path().join("identity.json"), "{").unwrap();
        let after_damage = of(dir.path(), &disk).unwrap();
        assert_ne!(after_damage, first);
        std::fs::remove_file(dir.path().join("identity.json")).unwrap();
        let after_loss = of(dir.path(), &disk).unwrap();
        assert!(after_loss != first && after_loss != after_damage);
    }
}

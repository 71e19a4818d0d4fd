//! What a node sees of its copy of a guest: the evidence without which nothing
//! that another copy would need is undefined, removed, renamed away or killed.
//!
//! Absence is no evidence, nor is silence, an idle agent or a journal that was
//! lost. Evidence names the copy that stays: on which node, seen when and by that
//! node itself, of what identity.

use serde::{Deserialize, Serialize};

use crate::{
    guest::Presence,
    ids::{HostName, InstanceId, MigrationId},
};

/// A node's copy of a guest, looked at now, and what the node's journal knows of
/// the migration that asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopySeen {
    /// The answer of this node's libvirt.
    pub presence: Presence,
    /// Whether a libvirt migration job runs on it here.
    #[serde(default)]
    pub migrating: bool,
    /// Generation in its metadata; none if there is no such domain.
    #[serde(default)]
    pub generation: Option<u64>,
    /// Files and devices that the domain has, now or after its next start, as they
    /// lie on this node. Empty if there is no such domain.
    #[serde(default)]
    pub files: Vec<FileSeen>,
    /// What this node keeps aside for the migration, if it is a cold one's source.
    #[serde(default)]
    pub aside: Option<AsideSeen>,
    /// What this node's journal knows.
    #[serde(default)]
    pub known: CopyHistory,
}

/// A file of a guest as it lies on a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileSeen {
    /// Where the guest has it, or had it before it was set aside.
    pub path: String,
    /// Something is there.
    pub exists: bool,
    /// How long it is, bytes; 0 of a device whose node cannot tell.
    #[serde(default)]
    pub length_bytes: u64,
}

impl FileSeen {
    /// Whether a guest could start from it: a file of a guest is never empty.
    pub fn is_in_place(&self) -> bool {
        self.exists && (self.length_bytes > 0 || self.path.starts_with("/dev/"))
    }
}

/// A copy that is kept so that nothing starts it: its definition is in the agent's
/// journal, its files have other names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AsideSeen {
    /// All of it is aside.
    pub complete: bool,
    /// Its definition is at hand.
    pub defined: bool,
    /// Its files, by the paths to which they go back.
    pub files: Vec<FileSeen>,
    /// Of those paths, the ones at which something else is; and its devices that another
    /// guest uses.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub taken: Vec<String>,
}

/// What a node's journal knows of a migration. All false: it knows of none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct CopyHistory {
    /// The migration is under way here, or what it left is not tidied yet.
    pub under_way: bool,
    /// The guest ran here, or was about to be started: what is here may be the
    /// newest there is.
    pub ran_here: bool,
    /// This node's libvirt handed the guest over to the other node.
    pub moved_away: bool,
}

impl CopySeen {
    /// Whether the domain is here, defined or active, with every file in place.
    pub fn is_whole(&self) -> bool {
        matches!(self.presence, Presence::Present(_))
            && self.files.iter().all(FileSeen::is_in_place)
    }

    /// Whether a copy lies aside here that could be brought back whole.
    pub fn is_kept_aside(&self) -> bool {
        let whole = |aside: &AsideSeen| {
            aside.complete && aside.defined && aside.files.iter().all(FileSeen::is_in_place)
        };
        self.aside.as_ref().is_some_and(whole)
    }

    /// What is wrong with its files, or with those that are aside, in words.
    pub fn missing(&self) -> Vec<&str> {
        let aside = self.aside.iter().flat_map(|aside| &aside.files);
        let missing = self.files.iter().chain(aside).filter(|f| !f.is_in_place());
        missing.map(|f| f.path.as_str()).collect()
    }

    /// The copy's own file of that path, in place.
    pub fn has(&self, path: &str) -> bool {
        let aside = self.aside.iter().flat_map(|aside| &aside.files);
        let mut all = self.files.iter().chain(aside);
        all.any(|file| file.path == path && file.is_in_place())
    }

    /// The length of the copy's own file of that path, bytes.
    pub fn length_bytes(&self, path: &str) -> Option<u64> {
        let aside = self.aside.iter().flat_map(|aside| &aside.files);
        let mut all = self.files.iter().chain(aside);
        all.find(|file| file.path == path).map(|f| f.length_bytes)
    }
}

/// The copy that stays when another goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Survivor {
    /// On which node, which saw it itself.
    pub host: HostName,
    /// When the conductor asked, milliseconds since 1970.
    pub seen_at_ms: u64,
    /// What it saw.
    pub copy: CopySeen,
    /// The guest has been moved since, by what the record says: its disks may have been
    /// written anew, and under other names.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub moved_on: bool,
}

/// Remove a copy, or files of one, because another stays.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoveCopy {
    /// The migration.
    pub migration: MigrationId,
    /// The instance.
    pub instance: InstanceId,
    /// The copy that stays. Without one nothing is removed.
    #[serde(default)]
    pub survivor: Option<Survivor>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::PowerState;

    fn file(path: &str, exists: bool, length_bytes: u64) -> FileSeen {
        FileSeen {
            path: path.to_owned(),
            exists,
            length_bytes,
        }
    }

    fn copy(presence: Presence, files: Vec<FileSeen>) -> CopySeen {
        CopySeen {
            presence,
            migrating: false,
            generation: None,
            files,
            aside: None,
            known: CopyHistory::default(),
        }
    }

    #[test]
    fn a_copy_is_whole_only_with_all_of_its_files() {
        let off = Presence::Present(PowerState::Shutdown);
        assert!(copy(off, vec![file("/a", true, 1)]).is_whole());
        assert!(copy(off, vec![file("/dev/vg/a", true, 0)]).is_whole());
        for bad in [file("/a", false, 0), file("/a", true, 0)] {
            assert!(!copy(off, vec![file("/b", true, 1), bad]).is_whole());
        }
        for nowhere in [Presence::Absent, Presence::Incoming] {
            assert!(!copy(nowhere, vec![]).is_whole(), "{nowhere:?}");
        }
    }

    #[test]
    fn what_is_aside_is_a_copy_only_when_all_of_it_is() {
        let aside = |complete, defined, files| CopySeen {
            aside: Some(AsideSeen {
                complete,
                defined,
                files,
                taken: Vec::new(),
            }),
            ..copy(Presence::Absent, vec![])
        };
        assert!(aside(true, true, vec![file("/a", true, 1)]).is_kept_aside());
        assert!(!aside(false, true, vec![]).is_kept_aside());
        assert!(!aside(true, false, vec![]).is_kept_aside());
        let lost = aside(true, true, vec![file("/a", false, 0)]);
        assert!(!lost.is_kept_aside());
        assert_eq!(lost.missing(), ["/a"]);
        assert!(!copy(Presence::Absent, vec![]).is_kept_aside());
    }

    #[test]
    fn an_older_peers_request_has_no_survivor() {
        let text = r#"{"migration":"00000000-0000-0000-0000-000000000001",
            "instance":"00000000-0000-0000-0000-000000000002"}"#;
        let ask: RemoveCopy = serde_json::from_str(text).unwrap();
        assert_eq!(ask.survivor, None);
    }
}

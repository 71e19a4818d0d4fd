//! Files that a guest uses on both nodes: told to the conductor, and looked at once
//! more when they are about to be used. What was compared holds for the moment of
//! the comparison only.

use drover_model::{
    api::{compute::KnownDisk, fault::Fault},
    content::{CheckedFile, UseRole},
    guest::Guest,
};

use crate::{faults::hypervisor as fault, hypervisor::Hypervisor};

/// The paths of all local files that a guest uses.
pub(super) fn used_paths(guest: &Guest) -> Vec<String> {
    guest.uses().into_iter().map(|u| u.path).collect()
}

/// Refuses if a file is another than it was when it was compared.
pub(super) async fn are_as_checked(
    hypervisor: &dyn Hypervisor,
    checked: &[CheckedFile],
) -> Result<(), Fault> {
    let compared: Vec<&CheckedFile> = checked.iter().filter(|c| c.stamp.is_some()).collect();
    if compared.is_empty() {
        return Ok(());
    }
    let paths: Vec<String> = compared.iter().map(|c| c.path.clone()).collect();
    let found = hypervisor.contents(&paths, &[]).await.map_err(fault)?;
    for (file, now) in compared.into_iter().zip(found) {
        if now.stamp() != file.stamp.as_deref() {
            return Err(Fault::refused(format!(
                "{} has changed since it was compared with the other node's: ask again",
                file.path
            )));
        }
    }
    Ok(())
}

/// Refuses if a guest uses a file that was neither compared nor is brought along.
pub(super) fn are_all_checked(
    guest: &Guest,
    checked: &[CheckedFile],
    is_brought: impl Fn(&str) -> bool,
) -> Result<(), Fault> {
    let mut uses = guest.uses().into_iter();
    let unchecked = uses.find(|u| {
        u.role != UseRole::Own && !is_brought(&u.path) && !checked.iter().any(|c| c.path == u.path)
    });
    match unchecked {
        None => Ok(()),
        Some(u) => Err(Fault::refused(format!(
            "the guest uses {} as {} since it was looked at: ask again",
            u.path, u.what
        ))),
    }
}

/// Refuses if a guest writes a disk that it did not have when it was looked at, or
/// that was another file then: nobody decided what becomes of it.
pub(super) fn no_disk_is_new(known: &[KnownDisk], now: &[KnownDisk]) -> Result<(), Fault> {
    match now.iter().find(|disk| !known.contains(disk)) {
        None => Ok(()),
        Some(disk) => Err(Fault::refused(format!(
            "the guest got disk {} ({}) since it was looked at: ask again",
            disk.target, disk.path
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_known_by_its_name_and_its_file() {
        let disk = |target: &str, path: &str| KnownDisk {
            target: target.to_owned(),
            path: path.to_owned(),
        };
        let known = [disk("vda", "/a"), disk("vdb", "/b")];
        assert!(no_disk_is_new(&known, &known).is_ok());
        assert!(no_disk_is_new(&known, &known[1..]).is_ok(), "one went");
        for new in [disk("vdc", "/a"), disk("vda", "/c")] {
            let refused = no_disk_is_new(&known, std::slice::from_ref(&new)).unwrap_err();
            assert!(refused.message.contains(&new.path), "{refused}");
        }
    }
}

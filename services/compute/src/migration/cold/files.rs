//! Which files go in which part of a cold migration, and what they are called
//! while they are set aside. Pure.

use std::path::{Path, PathBuf};

use drover_model::{
    api::{
        compute::{CarriedFile, ColdPart, FileRole},
        fault::Fault,
    },
    guest::Guest,
    ids::MigrationId,
};
use uuid::Uuid;

use crate::{hypervisor::Overlay, journal::KeptFile};

/// Files of one guest. A virtual machine has far fewer.
const MOST_FILES: usize = 512;

/// What both agents know the files of a part by.
pub(super) fn key(migration: MigrationId, part: ColdPart) -> Uuid {
    let mark = match part {
        ColdPart::PreCopy => 1,
        ColdPart::Stop | ColdPart::Copy => 0,
    };
    Uuid::from_u128(migration.0.as_u128() ^ mark)
}

/// The files of a part, in the order in which both sides name them. What nobody
/// writes goes while the guest runs: what lies under disks, and frozen disks.
pub(super) fn of_part(files: &[CarriedFile], part: ColdPart) -> impl Iterator<Item = &CarriedFile> {
    files.iter().filter(move |file| match part {
        ColdPart::PreCopy => goes_early(files, file),
        ColdPart::Stop => false,
        ColdPart::Copy => !goes_early(files, file),
    })
}

fn goes_early(files: &[CarriedFile], file: &CarriedFile) -> bool {
    let frozen = || files.iter().filter_map(|f| f.over.as_ref());
    file.role == FileRole::Backing
        || (file.role == FileRole::Disk && frozen().any(|over| over.image == file.path))
}

/// The overlays that deltas stand for.
pub(super) fn overlays(files: &[CarriedFile]) -> Vec<Overlay> {
    let deltas = files.iter().filter_map(|file| {
        let over = file.over.as_ref()?;
        Some(Overlay {
            target: over.target.clone(),
            path: file.path.clone(),
            image: over.image.clone(),
            format: over.format.clone(),
        })
    });
    deltas.collect()
}

/// Those of the overlays that a guest uses, now or after its next start.
pub(super) fn used_overlays(files: &[CarriedFile], guests: &[Guest]) -> Vec<Overlay> {
    let mut overlays = overlays(files);
    overlays.retain(|overlay| is_used(&overlay.path, guests));
    overlays
}

/// Whether a guest has a disk on that file, now or by its lasting definition.
pub(super) fn is_used(path: &str, guests: &[Guest]) -> bool {
    let mut disks = guests.iter().flat_map(|guest| &guest.disks);
    disks.any(|disk| disk.local_path() == Some(path))
}

/// Whether a file is the guest's alone, and so removed where the guest leaves.
pub(super) fn is_own(role: FileRole) -> bool {
    role != FileRole::Backing
}

/// What is renamed when the guest is set aside.
pub(super) fn kept(files: &[CarriedFile], migration: MigrationId) -> Vec<KeptFile> {
    let own = files.iter().filter(|file| is_own(file.role));
    let renamed = own.filter(|file| file.role != FileRole::Device);
    renamed
        .map(|file| KeptFile {
            path: file.path.clone(),
            kept: format!("{}.kept-{migration}", file.path),
        })
        .collect()
}

/// Block devices, which cannot be renamed.
pub(super) fn devices(files: &[CarriedFile]) -> Vec<String> {
    let devices = files.iter().filter(|file| file.role == FileRole::Device);
    devices.map(|file| file.path.clone()).collect()
}

/// The images under disks, which stay where they are.
pub(super) fn under(files: &[CarriedFile]) -> Vec<String> {
    let under = files.iter().filter(|file| !is_own(file.role));
    under.map(|file| file.path.clone()).collect()
}

/// Where an agent writes a definition down that is carried to the other.
pub(super) fn definition_path(state_dir: &Path, migration: MigrationId) -> PathBuf {
    state_dir
        .join("definitions")
        .join(format!("{migration}.json"))
}

/// Refuses lists that no plan of the conductor's makes.
pub(super) fn check(files: &[CarriedFile]) -> Result<(), Fault> {
    if files.len() > MOST_FILES {
        return Err(Fault::refused(format!("more than {MOST_FILES} files")));
    }
    for (i, file) in files.iter().enumerate() {
        if !Path::new(&file.path).is_absolute() {
            return Err(Fault::refused(format!(
                "'{}' is no absolute path",
                file.path
            )));
        }
        if files[..i].iter().any(|other| other.path == file.path) {
            return Err(Fault::refused(format!("{} is listed twice", file.path)));
        }
        let over = file.over.as_ref().map(|over| &over.image);
        let is_disk = |f: &CarriedFile| f.role == FileRole::Disk && Some(&f.path) == over;
        if (file.role == FileRole::Delta) != over.is_some()
            || (over.is_some() && !files.iter().any(is_disk))
        {
            return Err(Fault::refused(format!("{} lies over no disk", file.path)));
        }
        if file.present && file.role != FileRole::Backing {
            return Err(Fault::refused(format!(
                "{} is there already and would have to be written",
                file.path
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use drover_model::api::compute::Frozen;

    use super::*;

    fn file(path: &str, role: FileRole) -> CarriedFile {
        CarriedFile {
            path: path.to_owned(),
            role,
            present: false,
            data_bytes: 0,
            over: None,
        }
    }

    fn delta(path: &str, image: &str) -> CarriedFile {
        CarriedFile {
            over: Some(Frozen {
                target: "vda".to_owned(),
                image: image.to_owned(),
                format: "raw".to_owned(),
            }),
            ..file(path, FileRole::Delta)
        }
    }

    #[test]
    fn every_file_goes_in_one_part() {
        let files = [
            file("/a", FileRole::Backing),
            file("/b", FileRole::Disk),
            file("/c", FileRole::Nvram),
        ];
        let names = |part| {
            of_part(&files, part)
                .map(|f| f.path.as_str())
                .collect::<Vec<_>>()
        };
        assert_eq!(names(ColdPart::PreCopy), ["/a"]);
        assert_eq!(names(ColdPart::Copy), ["/b", "/c"]);
        let files = [
            file("/b", FileRole::Disk),
            file("/e", FileRole::Disk),
            delta("/d", "/b"),
        ];
        let names = |part| {
            of_part(&files, part)
                .map(|f| f.path.as_str())
                .collect::<Vec<_>>()
        };
        assert_eq!(
            names(ColdPart::PreCopy),
            ["/b"],
            "a frozen disk goes beforehand"
        );
        assert_eq!(names(ColdPart::Copy), ["/e", "/d"]);
        let migration = MigrationId::generate();
        assert_ne!(
            key(migration, ColdPart::PreCopy),
            key(migration, ColdPart::Copy)
        );
    }

    #[test]
    fn lists_that_make_no_sense_are_refused() {
        let good = file("/a", FileRole::Disk);
        assert!(check(std::slice::from_ref(&good)).is_ok());
        assert!(check(&[good.clone(), good.clone()]).is_err());
        assert!(check(&[file("a", FileRole::Disk)]).is_err());
        assert!(check(&[delta("/d", "/b")]).is_err());
        assert!(check(&[good.clone(), delta("/d", "/a")]).is_ok());
        let present = CarriedFile {
            present: true,
            ..good
        };
        assert!(check(&[present]).is_err());
    }
}

//! What only a cold migration needs: a place for every file of the guest, a way
//! for it, and what it decides to carry.

use drover_model::{
    api::compute::{
        CarriedFile, DestinationFacts, DiskFact, FileFact, FileRole, Frozen, PathFacts,
    },
    check::{CheckCode, CheckFailure, Side},
    guest::{Disk, DiskSource, Guest, GuestFileKind, ImmovableKind},
    ids::{HostName, MigrationId},
    node::Inventory,
};

use super::{device, fail, place_of_copy, space, unmovable_kind};

/// Whether something that ties a running guest to its node leaves with one that is off.
pub(super) fn can_leave(kind: ImmovableKind) -> bool {
    kind == ImmovableKind::EmulatedTpm
}

/// On either node the definition goes while the state of a TPM has to stay: from the
/// source when the guest is set aside, from the destination when it is reverted.
pub(super) fn tpm_state(
    guest: &Guest,
    inventory: &Inventory,
    side: Side,
    host: &HostName,
) -> Option<CheckFailure> {
    let is_lost = guest.tpm_goes_with_definition && !inventory.keeps_tpm_state();
    is_lost.then(|| {
        let goes = match side {
            Side::Destination => "a revert",
            _ => "the move",
        };
        fail(
            CheckCode::ImmovableDevice,
            side,
            format!(
                "libvirt on {host} would remove the state of its emulated TPM with its \
                 definition, which {goes} takes away there"
            ),
            format!(
                "set persistent_state='yes' on the backend of its TPM ('virsh edit'), or have \
                 libvirt 8.9 or later on {host}"
            ),
        )
    })
}

/// What the destination has to have for the guest's files.
pub(super) fn destination(
    guest: &Guest,
    facts: &DestinationFacts,
    host: &HostName,
) -> Vec<CheckFailure> {
    let mut failures: Vec<CheckFailure> = guest.disks.iter().filter_map(unmovable_kind).collect();
    for (disk, path, fact) in local_disks(guest, facts) {
        if fact.shared || !disk.is_copied_when_local() {
            continue;
        }
        if matches!(disk.source, DiskSource::Block { .. }) {
            failures.extend(device(disk, path, fact, host));
            failures.extend(unfit_device(disk, path, facts, host));
        } else {
            let what = format!("disk {}", disk.target);
            let there = (fact.exists, fact.directory_exists);
            failures.extend(place_of_copy(&what, path, there, host));
        }
    }
    for file in carried(guest, facts).iter().filter(|file| !file.present) {
        let Some(fact) = facts.files.iter().find(|f| f.path == file.path) else {
            continue;
        };
        let what = match file.role {
            FileRole::Backing => "a base image",
            FileRole::Nvram => "the firmware's variables",
            FileRole::Tpm => "the TPM's state",
            FileRole::Disk | FileRole::Device | FileRole::Delta => continue,
        };
        let there = (fact.exists, fact.directory_exists);
        failures.extend(place_of_copy(what, &file.path, there, host));
        failures.extend(promised(what, fact, host));
    }
    failures.extend(room(guest, facts, host));
    let has = &facts.inventory;
    failures.extend(tpm_state(guest, has, Side::Destination, host));
    if let Err(error) = &facts.disk_port {
        failures.push(fail(
            CheckCode::MigrationPortUnreachable,
            Side::Destination,
            format!("the agent on {host} takes no disks: {error}"),
            "free the port, or set another with disk_port of [compute]",
        ));
    }
    failures
}

/// Another guest may name a file that is not there, and would find this one's in its place.
fn promised(what: &str, fact: &FileFact, host: &HostName) -> Option<CheckFailure> {
    let path = &fact.path;
    (fact.in_use && !fact.exists).then(|| {
        fail(
            CheckCode::DiskExists,
            Side::Destination,
            format!(
                "another guest of {host} uses {path}, which is not there and where {what} would \
                 be copied to"
            ),
            "give one of them another file, or put that guest's own back",
        )
    })
}

/// A device that is there has to be large enough, and nobody's.
fn unfit_device(
    disk: &Disk,
    path: &str,
    facts: &DestinationFacts,
    host: &HostName,
) -> Option<CheckFailure> {
    let there = facts.files.iter().find(|f| f.path == path && f.exists)?;
    let no = |message: String, remedy: &str| {
        Some(fail(
            CheckCode::DiskNotCopyable,
            Side::Destination,
            message,
            remedy,
        ))
    };
    if there.in_use {
        let message = format!(
            "{path} is used on {host}, by a guest or by the machine itself, and disk {} would go there",
            disk.target
        );
        return no(message, "give the disk another device");
    }
    let (has, needs) = (there.length_bytes, disk.virtual_bytes);
    if has < needs {
        let message = format!(
            "{path} has {has} bytes on {host}, disk {} {needs}",
            disk.target
        );
        return no(message, "make the device there as large");
    }
    None
}

/// Room for every file as it will be allocated.
fn room(guest: &Guest, facts: &DestinationFacts, host: &HostName) -> Vec<CheckFailure> {
    let carried = carried(guest, facts);
    let made = carried
        .iter()
        .filter(|file| !file.present && file.role != FileRole::Device);
    let files = made.filter_map(|file| {
        let of_file = |f: &&FileFact| f.path == file.path;
        let beside = facts.files.iter().find(of_file);
        let place = match beside {
            Some(fact) => (&fact.file_system, fact.free_bytes, fact.directory_exists),
            None => {
                let mut disks = local_disks(guest, facts);
                let (.., fact) = disks.find(|(_, path, _)| *path == file.path)?;
                (&fact.file_system, fact.free_bytes, fact.directory_exists)
            }
        };
        let (file_system, free_bytes, directory_exists) = place;
        // A directory that is not there is named apart.
        directory_exists.then_some(((file_system.as_str(), free_bytes), file.data_bytes))
    });
    space(files, host)
}

/// Every file that has to be on the destination afterwards and is not on storage
/// that both share; what lies under disks comes first.
pub fn carried(guest: &Guest, facts: &DestinationFacts) -> Vec<CarriedFile> {
    let mut files: Vec<CarriedFile> = Vec::new();
    let mut add = |path: &str, role, present, data_bytes| {
        if !files.iter().any(|file| file.path == path) {
            files.push(CarriedFile {
                path: path.to_owned(),
                role,
                present,
                data_bytes,
                over: None,
            });
        }
    };
    let is_there = |path: &str| facts.files.iter().any(|f| f.path == path && f.exists);
    let copied: Vec<_> = local_disks(guest, facts)
        .filter(|(disk, _, fact)| disk.is_copied_when_local() && !fact.shared)
        .collect();
    for image in copied.iter().flat_map(|(disk, ..)| &disk.backing) {
        let present = is_there(&image.path);
        add(
            &image.path,
            FileRole::Backing,
            present,
            image.allocated_bytes,
        );
    }
    for (disk, path, _) in &copied {
        let role = match disk.source {
            DiskSource::Block { .. } => FileRole::Device,
            _ => FileRole::Disk,
        };
        add(path, role, false, disk.allocated_bytes);
    }
    for file in &guest.files {
        let role = match file.kind {
            GuestFileKind::Nvram => FileRole::Nvram,
            GuestFileKind::Tpm => FileRole::Tpm,
        };
        add(&file.path, role, false, file.allocated_bytes);
    }
    files
}

/// For disks that are to be copied while the guest runs, the files that take its
/// further writes. Block devices cannot be frozen and go when it is off.
pub fn deltas(guest: &Guest, files: &[CarriedFile], migration: MigrationId) -> Vec<CarriedFile> {
    let frozen = |disk: &Disk, path: &str| {
        let is_carried = |f: &CarriedFile| f.path == path && f.role == FileRole::Disk;
        files.iter().any(is_carried) && matches!(disk.format.as_str(), "raw" | "qcow2")
    };
    let disks = guest.disks.iter().filter_map(|disk| {
        let path = disk.local_path().filter(|path| frozen(disk, path))?;
        Some(CarriedFile {
            path: format!("{path}.delta-{migration}"),
            role: FileRole::Delta,
            present: false,
            data_bytes: 0,
            over: Some(Frozen {
                target: disk.target.clone(),
                image: path.to_owned(),
                format: disk.format.clone(),
            }),
        })
    });
    disks.collect()
}

fn local_disks<'a>(
    guest: &'a Guest,
    facts: &'a DestinationFacts,
) -> impl Iterator<Item = (&'a Disk, &'a str, &'a DiskFact)> {
    guest.disks.iter().filter_map(|disk| {
        let fact = facts.disks.iter().find(|f| f.target == disk.target)?;
        Some((disk, disk.local_path()?, fact))
    })
}

/// The way for the files.
pub(super) fn path(facts: &PathFacts, source: &HostName, dest: &HostName) -> Option<CheckFailure> {
    let error = facts.disk_port.as_ref().err()?;
    Some(fail(
        CheckCode::MigrationPortUnreachable,
        Side::Path,
        format!("{source} cannot reach the port for disks of {dest}: {error}"),
        "open that port between the nodes (disk_port of [compute], 49215 by default)",
    ))
}

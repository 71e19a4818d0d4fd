//! Where disks can be on this node, who uses them, and disks of guests that are
//! off put elsewhere.

use drover_model::{
    api::compute::{DiskMove, LocationFact, SharedFile},
    ids::InstanceId,
    project::Location,
};
use virt::{connect::Connect, error::ErrorNumber};

use crate::hypervisor::{
    HypervisorError, Result,
    libvirt::{
        LibvirtDriver,
        blocking::Effect,
        capabilities,
        errors::{self, CallResult},
        guests::InUse,
        storage::{
            image,
            place::{self, Placed},
        },
        xml::handover,
    },
};

/// A location, and its directory or why there is none.
type Found = (Location, std::result::Result<String, String>);

/// Asks libvirt for the directories of its pools. Blocks.
pub(super) fn directories(connect: &Connect, locations: Vec<Location>) -> CallResult<Vec<Found>> {
    let mut found = Vec::new();
    for location in locations {
        let directory = match &location {
            Location::Directory { path } => Ok(path.clone()),
            Location::Pool { pool } => of_pool(connect, pool)?,
        };
        found.push((location, directory));
    }
    Ok(found)
}

fn of_pool(connect: &Connect, name: &str) -> CallResult<std::result::Result<String, String>> {
    errors::without_nul("a storage pool's name", name)?;
    let pool = match connect.lookup_storage_pool_by_name(name) {
        Ok(pool) => pool,
        Err(error)
            if errors::is(&error, ErrorNumber::NoStoragePool)
                || errors::is(&error, ErrorNumber::NoSupport) =>
        {
            return Ok(Err(format!(
                "this node's libvirt has no storage pool {name}: define and start it"
            )));
        }
        Err(error) => return Err(error.into()),
    };
    if !pool.is_active()? {
        return Ok(Err(format!(
            "storage pool {name} is not active: start it (virsh pool-start {name})"
        )));
    }
    let (kind, path) = handover::pool(&pool.xml_desc(0)?).map_err(HypervisorError::from)?;
    Ok(match (kind.as_str(), path) {
        ("dir" | "fs" | "netfs", Some(path)) => Ok(path),
        _ => Err(format!(
            "the volumes of storage pool {name} are no files of a directory (it is of type \
             {kind}): name a pool of type dir, fs or netfs"
        )),
    })
}

/// Looks at the directories. Blocks.
pub(super) fn facts(found: Vec<Found>, names: &[String]) -> Vec<LocationFact> {
    let fact = |(location, directory): Found| {
        let looked = directory.and_then(|d| place::look(&d, names).map(|room| (d, room)));
        let (directory, room) = match looked {
            Ok((directory, room)) => (Ok(directory), Some(room)),
            Err(words) => (Err(words), None),
        };
        let (file_system, free_bytes, taken) = room.map_or_else(Default::default, |room| {
            (room.file_system, room.free_bytes, room.taken)
        });
        LocationFact {
            location,
            directory,
            file_system,
            free_bytes,
            taken,
        }
    };
    found.into_iter().map(fact).collect()
}

/// Which of these files domains other than that one use. Blocks.
pub(super) fn other_users(id: InstanceId, paths: &[String], used: InUse) -> Vec<SharedFile> {
    let mut shared = Vec::new();
    for user in used.users() {
        if user.id == id {
            continue;
        }
        let domain = user.name.clone();
        let common = paths.iter();
        let common = common.filter(|path| image::names_one_of(path, &user.paths));
        shared.extend(common.map(|path| SharedFile {
            path: path.clone(),
            domain: domain.clone(),
        }));
    }
    shared
}

/// Puts a disk of a guest that is off at its new place, too.
pub(super) async fn disk(
    driver: &LibvirtDriver,
    disk: &DiskMove,
    bandwidth_bytes_s: Option<u64>,
) -> Result<()> {
    let placing = place::check(disk)?;
    let used = driver.storage_in_use().await?;
    let (its, places) = (placing.clone(), driver.places());
    let taken = disk.to.clone();
    let link = move || place::link(&its, &used.all_paths(&taken)?, &places);
    match driver.calls.files(Effect::Change, link).await? {
        Placed::NotYet => {
            let host = driver.calls.node(capabilities::of_host).await?;
            let qemu_img = &driver.settings.qemu_img;
            place::copy(&placing, qemu_img, host.qemu_owner, bandwidth_bytes_s).await?;
        }
        Placed::Linked { leads_astray: true } => {
            place::straighten(&placing, &driver.settings.qemu_img).await?;
        }
        Placed::Linked {
            leads_astray: false,
        } => {}
    }
    let settle = move || place::settle(&placing);
    let settled = tokio::task::spawn_blocking(settle).await;
    settled.unwrap_or_else(|e| Err(HypervisorError::Bug(e.to_string())))
}

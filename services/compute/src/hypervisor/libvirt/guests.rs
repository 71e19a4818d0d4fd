//! Reading guests off a connection. Everything here blocks.

use drover_model::{
    guest::{Disk, Guest, Presence},
    ids::InstanceId,
    node::InstanceReport,
};
use virt::{connect::Connect, domain::Domain, sys};

use super::{
    errors::{self, CallResult},
    jobs,
    standing::{self, presence},
    storage::sizes,
    xml::{self, Outside},
};
use crate::hypervisor::HypervisorError;

/// The domain, if libvirt has it.
pub(super) fn find(connect: &Connect, id: InstanceId) -> CallResult<Option<Domain>> {
    Ok(errors::absent_is_none(connect.lookup_domain_by_uuid(id.0))?)
}

/// The domain, which must be there.
pub(super) fn get(connect: &Connect, id: InstanceId) -> CallResult<Domain> {
    find(connect, id)?.ok_or_else(|| HypervisorError::NoSuchGuest(id).into())
}

/// Every domain. Sizes of disks are filled in by [`measured`], without libvirt.
pub(super) fn all(connect: &Connect) -> CallResult<Vec<(Guest, Presence)>> {
    let mut guests = Vec::new();
    for domain in connect.list_all_domains(0)? {
        // One that goes while the others are read is not there.
        if let Some(found) = errors::absent_is_none(basics(&domain))? {
            guests.push(found?);
        }
    }
    Ok(guests)
}

type Basics = std::result::Result<(Guest, Presence), HypervisorError>;

fn basics(domain: &Domain) -> std::result::Result<Basics, virt::error::Error> {
    let presence = presence(domain)?;
    let outside = Outside {
        power_state: standing::power_state(presence),
        persistent: domain.is_persistent()?,
    };
    let text = domain.xml_desc(0)?;
    let guest = xml::guest(&text, outside).map_err(HypervisorError::from);
    Ok(guest.map(|guest| (guest, presence)))
}

/// One domain whole, sizes of its disks included.
pub(super) fn whole(connect: &Connect, id: InstanceId) -> CallResult<Option<Guest>> {
    let Some(domain) = find(connect, id)? else {
        return Ok(None);
    };
    let Some(found) = errors::absent_is_none(basics(&domain))? else {
        return Ok(None);
    };
    let (mut guest, presence) = found?;
    for snapshot in domain.list_all_snapshots(0)? {
        guest.snapshots.push(snapshot.name()?);
    }
    if presence.is_active() || presence == Presence::Incoming {
        let job = jobs::words(&domain)?;
        guest.active_job = job.or(guest.active_job);
    }
    sizes::fill(&mut guest);
    if presence != Presence::Incoming {
        ask_for_missing_sizes(&domain, &mut guest);
    }
    Ok(Some(guest))
}

/// Sizes of disks that no file of this node tells (network disks, rare
/// formats), from libvirt; it would make a guest that is still arriving wait.
fn ask_for_missing_sizes(domain: &Domain, guest: &mut Guest) {
    for disk in guest.disks.iter_mut().filter(|d| is_unmeasured(d)) {
        match domain.block_info(&disk.target, 0) {
            Ok(info) => {
                disk.virtual_bytes = info.capacity;
                disk.allocated_bytes = info.allocation;
            }
            Err(error) => {
                tracing::debug!(disk = disk.target, error = error.message(), "size unknown");
            }
        }
    }
}

fn is_unmeasured(disk: &Disk) -> bool {
    use drover_model::guest::DiskSource as S;
    disk.virtual_bytes == 0 && !matches!(disk.source, S::Empty) && !disk.target.contains('\0')
}

/// Fills in sizes and makes a report's line of each.
pub(super) fn measured(guests: Vec<(Guest, Presence)>) -> Vec<InstanceReport> {
    let report = |(mut guest, presence): (Guest, Presence)| {
        sizes::fill(&mut guest);
        InstanceReport {
            disk_bytes: disk_bytes(&guest),
            id: guest.id,
            name: guest.name,
            project: guest.project,
            generation: guest.generation,
            power_state: guest.power_state,
            incoming: presence == Presence::Incoming,
            vcpus: guest.vcpus,
            memory_mib: guest.memory_mib,
            migration: None,
        }
    };
    guests.into_iter().map(report).collect()
}

fn disk_bytes(guest: &Guest) -> u64 {
    let disks = guest.disks.iter().filter(|disk| disk.device == "disk");
    disks.fold(0, |sum, disk| sum.saturating_add(disk.virtual_bytes))
}

/// Files and devices that any domain of this node uses, by its running or its
/// lasting definition.
pub(super) fn storage_in_use(connect: &Connect) -> CallResult<Vec<String>> {
    let mut paths = Vec::new();
    for domain in connect.list_all_domains(0)? {
        for flags in [0, sys::VIR_DOMAIN_XML_INACTIVE] {
            let Some(text) = errors::absent_is_none(domain.xml_desc(flags))? else {
                continue;
            };
            paths.extend(xml::storage_paths(&text).map_err(HypervisorError::from)?);
        }
    }
    Ok(paths)
}

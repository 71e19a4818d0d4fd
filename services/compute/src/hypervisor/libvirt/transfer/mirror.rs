//! Disks of an active guest copied to other files, and the guest had go on
//! there. Everything here blocks.
//!
//! libvirt's answer is the only memory: the live definition's `<mirror>` names
//! the file that a disk is being copied to and says whether the copy is whole.

use drover_model::{api::compute::DiskMove, ids::InstanceId};
use virt::{connect::Connect, domain::Domain, sys};

use super::{Side, active, stray, wrong};
use crate::hypervisor::{
    HypervisorError, Mirror,
    libvirt::{
        errors::CallResult,
        ffi, guests,
        overlays::text,
        storage,
        xml::{self, handover},
    },
};

/// Where a disk is.
#[derive(Debug, PartialEq, Eq)]
enum State {
    /// In this file, with no job on it.
    In(String),
    /// On its way to where it should go.
    OnTheWay { ready: bool },
    /// Something else goes on with it.
    Busy,
}

fn state(domain: &Domain, disk: &DiskMove) -> CallResult<State> {
    let definition = Side::Live.read(domain)?;
    let found = handover::disk(&definition, &disk.target);
    let target = &disk.target;
    let found = found.ok_or_else(|| wrong(format!("the guest has no disk {target}")))?;
    if let Some((file, ready)) = handover::mirror(found) {
        return Ok(match file == disk.to {
            true => State::OnTheWay { ready },
            false => State::Busy,
        });
    }
    if ffi::block_job(domain, &text(target)?)?.is_some() {
        return Ok(State::Busy);
    }
    let file = handover::file(found);
    let file = file.ok_or_else(|| wrong(format!("disk {target} is in no file")))?;
    Ok(State::In(file.to_owned()))
}

fn busy(disk: &DiskMove) -> HypervisorError {
    wrong(format!("another block job runs on disk {}", disk.target))
}

/// Begins a copy, or tells how far it is.
pub(super) fn go_on(
    connect: &Connect,
    id: InstanceId,
    disk: &DiskMove,
    bandwidth_bytes_s: Option<u64>,
) -> CallResult<Mirror> {
    let domain = active(connect, id)?;
    match state(&domain, disk)? {
        State::Busy => Err(busy(disk).into()),
        State::OnTheWay { ready: true } => Ok(Mirror::Ready),
        State::OnTheWay { ready: false } => {
            let job = ffi::block_job(&domain, &text(&disk.target)?)?;
            // libvirt gives 0 of 0 until QEMU has told it anything.
            let (done_bytes, total_bytes) = job.unwrap_or_default();
            Ok(Mirror::Copying {
                done_bytes,
                total_bytes,
            })
        }
        State::In(file) if file == disk.to => Ok(Mirror::Moved),
        State::In(file) if file == disk.from => {
            begin(&domain, disk, bandwidth_bytes_s)?;
            Ok(Mirror::Copying {
                done_bytes: 0,
                total_bytes: 0,
            })
        }
        State::In(file) => {
            let words = format!("disk {} is in {file}, not {}", disk.target, disk.from);
            Err(wrong(words).into())
        }
    }
}

fn begin(domain: &Domain, disk: &DiskMove, bandwidth_bytes_s: Option<u64>) -> CallResult<()> {
    if is_there(disk)? {
        return Err(HypervisorError::Exists(disk.to.clone()).into());
    }
    let target = handover::copy_target(disk).map_err(HypervisorError::from)?;
    // libvirt keeps the guest's definition for it, and gives the copy up if the
    // guest stops.
    let mut flags = sys::VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB;
    if !disk.flatten {
        flags |= sys::VIR_DOMAIN_BLOCK_COPY_SHALLOW;
    }
    let name = text(&disk.target)?;
    let begun = ffi::block_copy(domain, &name, &text(&target)?, bandwidth_bytes_s, flags);
    Ok(begun?)
}

/// Has the guest go on with the copy, and its next start use it too.
pub(super) fn pivot(connect: &Connect, id: InstanceId, disk: &DiskMove) -> CallResult<()> {
    let domain = active(connect, id)?;
    match state(&domain, disk)? {
        State::Busy => return Err(busy(disk).into()),
        State::OnTheWay { ready: false } => {
            let words = format!("disk {} is not copied yet", disk.target);
            return Err(wrong(words).into());
        }
        State::OnTheWay { ready: true } => ffi::block_pivot(&domain, &text(&disk.target)?)?,
        State::In(file) if file == disk.to => {}
        State::In(_) => {
            let words = format!("disk {} is not being copied", disk.target);
            return Err(wrong(words).into());
        }
    }
    if state(&domain, disk)? != State::In(disk.to.clone()) {
        let words = format!("disk {} did not change over", disk.target);
        return Err(HypervisorError::Failed(words).into());
    }
    have_it_last(&domain, disk)
}

/// libvirt rewrites the lasting definition by itself, unless it died on the way
/// or finds another spelling of the old file there.
fn have_it_last(domain: &Domain, disk: &DiskMove) -> CallResult<()> {
    let definition = Side::Lasting.read(domain)?;
    let target = &disk.target;
    let found = handover::disk(&definition, target);
    let found = found.ok_or_else(|| wrong(format!("no lasting disk {target}")))?;
    if handover::file(found) == Some(&disk.to) {
        return Ok(());
    }
    let moved = handover::at_new_place(found, disk).map_err(HypervisorError::from)?;
    let moved = xml::element_text(&moved).map_err(HypervisorError::from)?;
    Ok(domain.update_device_flags(&moved, Side::Lasting.affects())?)
}

/// Ends the copying, also one that libvirt has lost track of; another job is
/// none of ours.
pub(super) fn abandon(connect: &Connect, id: InstanceId, disk: &DiskMove) -> CallResult<()> {
    let Some(domain) = guests::find(connect, id)? else {
        return Ok(());
    };
    if !domain.is_active()? {
        return Ok(());
    }
    match state(&domain, disk)? {
        State::OnTheWay { .. } => Ok(ffi::block_abort(&domain, &text(&disk.target)?)?),
        State::In(file) if file == disk.from && is_there(disk)? => {
            stray::end(&domain, &disk.target, &disk.to)
        }
        State::In(_) | State::Busy => Ok(()),
    }
}

fn is_there(disk: &DiskMove) -> CallResult<bool> {
    Ok(!storage::files::is_absent(&storage::checked(&disk.to)?))
}

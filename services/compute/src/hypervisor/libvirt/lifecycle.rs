//! Starting and stopping guests, and taking down what must not stay: guests that
//! will never arrive, definitions nobody needs. Everything here blocks.

use drover_model::{
    guest::{PowerState, Presence},
    ids::InstanceId,
};
use virt::{connect::Connect, domain::Domain, error::ErrorNumber, sys};

use super::{
    errors::{self, CallResult},
    ffi, guests, jobs,
    standing::{self, presence},
    storage::files,
    xml,
};
use crate::hypervisor::{HypervisorError, Job};

fn wrong(words: String) -> errors::CallError {
    HypervisorError::WrongState(words).into()
}

/// Kills a QEMU that waits for a migration, and its definition.
///
/// Between the look and the kill the guest could arrive; the caller asks only
/// when its source was seen to run it, and then no migration can end here.
pub(super) fn discard_incoming(connect: &Connect, id: InstanceId) -> CallResult<()> {
    let Some(domain) = guests::find(connect, id)? else {
        return Ok(());
    };
    match errors::absent_is_none(presence(&domain))? {
        None | Some(Presence::Absent) => return Ok(()),
        Some(Presence::Incoming) => {}
        Some(Presence::Present(state)) => {
            return Err(wrong(format!("the guest is not arriving, it is {state}")));
        }
    }
    errors::absent_is_none(domain.destroy())?;
    // The definition goes with the process, unless libvirt had made it last already.
    match guests::find(connect, id)? {
        Some(domain) if !domain.is_active()? => remove_definition(&domain, 0, None),
        _ => Ok(()),
    }
}

/// Kills a guest that stands still where it moved away from, and its definition.
///
/// libvirt pauses a guest for migration at switch-over and keeps it so if it is
/// restarted before it heard of the destination. One half of a post-copy has a
/// reason of its own and is never taken for that.
pub(super) fn discard_outgoing(connect: &Connect, id: InstanceId) -> CallResult<()> {
    let Some(domain) = guests::find(connect, id)? else {
        return Ok(());
    };
    let (state, reason) = ffi::domain_state(&domain)?;
    let left = (state, reason) == (sys::VIR_DOMAIN_PAUSED, sys::VIR_DOMAIN_PAUSED_MIGRATION);
    let job = jobs::current(connect, id)?;
    if !left || job != Job::None {
        let words = format!(
            "the guest was not left by a migration: state {state}, reason {reason}, {job:?}"
        );
        return Err(wrong(words));
    }
    kill_and_undefine(connect, id, &domain)
}

/// Kills one half of a post-copy, and its definition. libvirt keeps its job, so that
/// the migration could be taken up again; without the other half it cannot.
pub(super) fn discard_half(connect: &Connect, id: InstanceId) -> CallResult<()> {
    let Some(domain) = guests::find(connect, id)? else {
        return Ok(());
    };
    let (state, reason) = ffi::domain_state(&domain)?;
    match standing::is_split(state, reason) {
        true => kill_and_undefine(connect, id, &domain),
        false => Err(wrong(format!(
            "the guest is no half of a post-copy: state {state}, reason {reason}"
        ))),
    }
}

fn kill_and_undefine(connect: &Connect, id: InstanceId, domain: &Domain) -> CallResult<()> {
    errors::absent_is_none(domain.destroy())?;
    match guests::find(connect, id)? {
        Some(domain) if !domain.is_active()? => remove_definition(&domain, 0, None),
        _ => Ok(()),
    }
}

/// Asks a guest to shut down: its agent if it has one, else its power button.
pub(super) fn shut_down(connect: &Connect, id: InstanceId) -> CallResult<()> {
    let domain = guests::get(connect, id)?;
    match presence(&domain)? {
        Presence::Present(PowerState::Running) => Ok(domain.shutdown_flags(0)?),
        other => Err(wrong(format!("the guest does not run: {other:?}"))),
    }
}

/// Whether a guest will be off as soon as libvirt has tidied up after it.
pub(super) fn is_going_off(connect: &Connect, id: InstanceId) -> CallResult<bool> {
    let domain = guests::get(connect, id)?;
    let (state, reason) = ffi::domain_state(&domain)?;
    Ok(standing::is_going_off(state, reason))
}

/// Stops a guest hard.
pub(super) fn stop(connect: &Connect, id: InstanceId) -> CallResult<()> {
    let domain = guests::get(connect, id)?;
    match presence(&domain)? {
        Presence::Present(state) if state.is_active() => {}
        Presence::Present(_) => return Ok(()),
        other => return Err(wrong(format!("the guest is not here: {other:?}"))),
    }
    match domain.destroy_flags(0) {
        // It went off by itself in between.
        Err(error)
            if errors::is(&error, ErrorNumber::OperationInvalid) && !domain.is_active()? =>
        {
            Ok(())
        }
        done => Ok(done?),
    }
}

/// Starts a guest that is off.
pub(super) fn start(connect: &Connect, id: InstanceId) -> CallResult<()> {
    let domain = guests::get(connect, id)?;
    match presence(&domain)? {
        Presence::Present(state) if state.is_active() => return Ok(()),
        Presence::Present(_) => {}
        other => return Err(wrong(format!("the guest is not here: {other:?}"))),
    }
    match domain.create_with_flags(0) {
        // Somebody was faster.
        Err(error)
            if errors::is(&error, ErrorNumber::OperationInvalid) && domain.is_active()? =>
        {
            Ok(())
        }
        done => Ok(done?),
    }
}

/// Removes the definition of a domain that is shut off.
pub(super) fn undefine(connect: &Connect, id: InstanceId) -> CallResult<()> {
    // Snapshots and saved memory make libvirt refuse, and rightly so.
    match shut_off(connect, id)? {
        Some(domain) => remove_definition(&domain, 0, None),
        None => Ok(()),
    }
}

/// A domain that is shut off; none if there is none.
pub(super) fn shut_off(connect: &Connect, id: InstanceId) -> CallResult<Option<Domain>> {
    let Some(domain) = guests::find(connect, id)? else {
        return Ok(None);
    };
    let found = errors::absent_is_none(presence(&domain))?;
    match found.unwrap_or(Presence::Absent) {
        Presence::Absent => Ok(None),
        Presence::Present(PowerState::Shutdown | PowerState::Crashed) => Ok(Some(domain)),
        other => Err(wrong(format!("the guest is active here: {other:?}"))),
    }
}

/// Keeps the firmware's and TPM's state: files that nothing else could restore. A libvirt
/// that cannot keep a TPM's may remove what is in no other files than these.
pub(super) fn remove_definition(
    domain: &Domain,
    also: sys::virDomainUndefineFlagsValues,
    expendable: Option<&[String]>,
) -> CallResult<()> {
    let keep = sys::VIR_DOMAIN_UNDEFINE_KEEP_NVRAM | also;
    let removed = match domain.undefine_flags(keep | sys::VIR_DOMAIN_UNDEFINE_KEEP_TPM) {
        // libvirt before 8.9 does not know the second flag, and removes the TPM's state.
        Err(error) if errors::is(&error, ErrorNumber::InvalidArg) => {
            let text = domain.xml_desc(sys::VIR_DOMAIN_XML_INACTIVE)?;
            if xml::loses_its_tpm(&text).map_err(HypervisorError::from)? {
                may_lose_its_tpm(domain, expendable)?;
            }
            domain.undefine_flags(keep)
        }
        other => other,
    };
    errors::absent_is_none(removed)?;
    Ok(())
}

fn may_lose_its_tpm(domain: &Domain, expendable: Option<&[String]>) -> CallResult<()> {
    let remedy = "use libvirt 8.9 or later, or set persistent_state='yes' on its backend";
    let Some(expendable) = expendable else {
        return Err(wrong(format!(
            "this libvirt would remove the state of its emulated TPM with its definition: {remedy}"
        )));
    };
    let state = files::tpm_state(InstanceId(domain.uuid()?));
    let state = state.map_err(|e| HypervisorError::Failed(format!("the TPM's state: {e}")))?;
    match state.iter().find(|file| !expendable.contains(&file.path)) {
        None => Ok(()),
        Some(file) => Err(wrong(format!(
            "this libvirt would remove {}, of which no other copy is known, with its definition: \
             {remedy}",
            file.path
        ))),
    }
}

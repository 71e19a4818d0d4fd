//! Statistics of many domains in one call, and the dirty rate's measurement.

use std::{
    ffi::{c_int, c_uint},
    ptr,
};

use uuid::Uuid;
use virt::{connect::Connect, domain::Domain, sys};

use super::{Values, VirtResult, checked, read_params};

/// libvirt's list of records, which we own.
struct Records {
    first: *mut sys::virDomainStatsRecordPtr,
    count: usize,
}

impl Drop for Records {
    fn drop(&mut self) {
        // SAFETY: the list comes from libvirt, is ended by NULL, and freed once.
        unsafe { sys::virDomainStatsRecordListFree(self.first) };
    }
}

impl Records {
    fn read(&self) -> VirtResult<Vec<(Uuid, Values)>> {
        if self.first.is_null() {
            return Ok(Vec::new());
        }
        // SAFETY: libvirt gave `count` records at `first`, which stay until `drop`.
        let records = unsafe { std::slice::from_raw_parts(self.first, self.count) };
        let mut found = Vec::new();
        for record in records {
            let mut uuid = [0_u8; 16];
            // SAFETY: a record of the list, whose domain lives as long as the
            // list; a UUID is 16 bytes.
            let values = unsafe {
                checked(sys::virDomainGetUUID((**record).dom, uuid.as_mut_ptr()))?;
                read_params((**record).params, (**record).nparams)
            };
            found.push((Uuid::from_bytes(uuid), values));
        }
        Ok(found)
    }
}

fn records(
    ask: impl FnOnce(*mut *mut sys::virDomainStatsRecordPtr) -> c_int,
) -> VirtResult<Records> {
    let mut first = ptr::null_mut();
    let count = checked(ask(&mut first))?;
    let count = usize::try_from(count).unwrap_or(0);
    Ok(Records { first, count })
}

/// Statistics (`VIR_DOMAIN_STATS_…`) of the domains that `flags`
/// (`VIR_CONNECT_GET_ALL_DOMAINS_STATS_…`) choose.
pub(in super::super) fn of_all(
    connect: &Connect,
    stats: c_uint,
    flags: c_uint,
) -> VirtResult<Vec<(Uuid, Values)>> {
    // SAFETY: `connect` keeps its pointer valid; the list passes to `Records`.
    let ask =
        |list| unsafe { sys::virConnectGetAllDomainStats(connect.as_ptr(), stats, list, flags) };
    records(ask)?.read()
}

/// Statistics of one domain.
pub(in super::super) fn of_one(domain: &Domain, stats: c_uint) -> VirtResult<Values> {
    // SAFETY: `domain` keeps its pointer valid as long as it is used here.
    let mut domains = unsafe { [domain.as_ptr(), ptr::null_mut()] };
    // SAFETY: NULL ends the list of domains; the list of records passes to `Records`.
    let ask = |list| unsafe { sys::virDomainListGetStats(domains.as_mut_ptr(), stats, list, 0) };
    let found = records(ask)?.read()?;
    Ok(found.into_iter().next().map(|(_, v)| v).unwrap_or_default())
}

/// Has QEMU measure for so long how fast a domain writes memory; false if this
/// libvirt cannot ask it.
pub(in super::super) fn start_dirty_rate(domain: &Domain, seconds: c_int) -> VirtResult<bool> {
    type Start = unsafe extern "C" fn(sys::virDomainPtr, c_int, c_uint) -> c_int;
    // SAFETY: the name ends with NUL. It is looked up because libvirt before 7.2
    // lacks it, with which the agent is to start all the same.
    let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"virDomainStartDirtyRateCalc".as_ptr()) };
    if found.is_null() {
        return Ok(false);
    }
    // SAFETY: libvirt's function of that name has this signature.
    let start = unsafe { std::mem::transmute::<*mut libc::c_void, Start>(found) };
    // SAFETY: `domain` keeps its pointer valid.
    checked(unsafe { start(domain.as_ptr(), seconds, 0) })?;
    Ok(true)
}

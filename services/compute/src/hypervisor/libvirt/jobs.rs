//! The job on a domain: sampled, aborted, hurried. Everything here blocks.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use drover_model::{guest::Presence, ids::InstanceId, migration::Transfer};
use tracing::warn;
use virt::{connect::Connect, domain::Domain, error::Error, sys};

use super::{
    errors::{CallError, CallResult},
    ffi::{self, Value, Values},
    guests,
    standing::{self, is_incoming_job},
};
use crate::hypervisor::{HypervisorError, Job, JobSample};

/// Page size if libvirt names none, bytes.
const USUAL_PAGE: u64 = 4096;

/// The job on a domain.
pub(super) fn current(connect: &Connect, id: InstanceId) -> CallResult<Job> {
    let domain = guests::get(connect, id)?;
    Ok(of(&domain)?)
}

fn of(domain: &Domain) -> Result<Job, Error> {
    // Asked first: libvirt answers without waiting, and never for the job below.
    let (state, reason) = ffi::domain_state(domain)?;
    if is_incoming_job(domain)? {
        return Ok(Job::Migration(JobSample {
            post_copy: state == sys::VIR_DOMAIN_RUNNING
                && reason == sys::VIR_DOMAIN_RUNNING_POSTCOPY,
            ..JobSample::default()
        }));
    }
    if !domain.is_active()? {
        return Ok(Job::None);
    }
    let (kind, values) = ffi::job_stats(domain, 0)?;
    if !matches!(
        kind,
        sys::VIR_DOMAIN_JOB_BOUNDED | sys::VIR_DOMAIN_JOB_UNBOUNDED
    ) {
        return Ok(Job::None);
    }
    Ok(match operation(&values) {
        sys::VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT => {
            let mut sample = sample(&values);
            sample.post_copy = standing::is_split(state, reason);
            sample.post_copy_failed =
                sample.post_copy && reason == sys::VIR_DOMAIN_PAUSED_POSTCOPY_FAILED;
            Job::Migration(sample)
        }
        other => Job::Other(operation_words(other).to_owned()),
    })
}

/// The job in words, for a guest's description.
pub(super) fn words(domain: &Domain) -> Result<Option<String>, Error> {
    if is_incoming_job(domain)? {
        return Ok(Some("incoming migration".to_owned()));
    }
    Ok(match of(domain)? {
        Job::None => None,
        Job::Migration(_) => Some("migration".to_owned()),
        Job::Other(words) => Some(words),
    })
}

/// Statistics of the last migration that ended well, if libvirt still has them.
pub(super) fn completed(connect: &Connect, id: InstanceId) -> CallResult<Option<JobSample>> {
    let domain = guests::get(connect, id)?;
    let flags = sys::VIR_DOMAIN_JOB_STATS_COMPLETED | sys::VIR_DOMAIN_JOB_STATS_KEEP_COMPLETED;
    let (kind, values) = ffi::job_stats(&domain, flags)?;
    let was_migration = matches!(
        operation(&values),
        sys::VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT | sys::VIR_DOMAIN_JOB_OPERATION_MIGRATION_IN
    );
    let ended_well = kind == sys::VIR_DOMAIN_JOB_COMPLETED;
    Ok((was_migration && ended_well).then(|| sample(&values)))
}

fn number(values: &Values, name: &std::ffi::CStr) -> Option<u64> {
    let name = name.to_str().ok()?;
    match values.get(name)? {
        Value::Number(number) => u64::try_from(*number).ok(),
        Value::Text(_) | Value::Unread => None,
    }
}

fn operation(values: &Values) -> u32 {
    let raw = number(values, sys::VIR_DOMAIN_JOB_OPERATION);
    raw.and_then(|n| u32::try_from(n).ok())
        .unwrap_or(sys::VIR_DOMAIN_JOB_OPERATION_UNKNOWN)
}

/// libvirt's statistics in the model's units. libvirt counts the dirty rate in
/// pages per second.
fn sample(values: &Values) -> JobSample {
    let get = |name| number(values, name).unwrap_or(0);
    let page = number(values, sys::VIR_DOMAIN_JOB_MEMORY_PAGE_SIZE).unwrap_or(USUAL_PAGE);
    JobSample {
        elapsed_ms: get(sys::VIR_DOMAIN_JOB_TIME_ELAPSED),
        memory: Transfer {
            total_bytes: get(sys::VIR_DOMAIN_JOB_MEMORY_TOTAL),
            processed_bytes: get(sys::VIR_DOMAIN_JOB_MEMORY_PROCESSED),
            remaining_bytes: get(sys::VIR_DOMAIN_JOB_MEMORY_REMAINING),
        },
        disk: Transfer {
            total_bytes: get(sys::VIR_DOMAIN_JOB_DISK_TOTAL),
            processed_bytes: get(sys::VIR_DOMAIN_JOB_DISK_PROCESSED),
            remaining_bytes: get(sys::VIR_DOMAIN_JOB_DISK_REMAINING),
        },
        rate_bytes_s: get(sys::VIR_DOMAIN_JOB_MEMORY_BPS),
        dirty_rate_bytes_s: get(sys::VIR_DOMAIN_JOB_MEMORY_DIRTY_RATE).saturating_mul(page),
        iteration: get(sys::VIR_DOMAIN_JOB_MEMORY_ITERATION),
        downtime_ms: number(values, sys::VIR_DOMAIN_JOB_DOWNTIME),
        post_copy: false,
        post_copy_failed: false,
        throttle_percent: number(values, sys::VIR_DOMAIN_JOB_AUTO_CONVERGE_THROTTLE),
    }
}

fn operation_words(operation: u32) -> &'static str {
    match operation {
        sys::VIR_DOMAIN_JOB_OPERATION_START => "start",
        sys::VIR_DOMAIN_JOB_OPERATION_SAVE => "save",
        sys::VIR_DOMAIN_JOB_OPERATION_RESTORE => "restore",
        sys::VIR_DOMAIN_JOB_OPERATION_SNAPSHOT => "snapshot",
        sys::VIR_DOMAIN_JOB_OPERATION_SNAPSHOT_REVERT => "snapshot revert",
        sys::VIR_DOMAIN_JOB_OPERATION_SNAPSHOT_DELETE => "snapshot delete",
        sys::VIR_DOMAIN_JOB_OPERATION_DUMP => "dump",
        sys::VIR_DOMAIN_JOB_OPERATION_BACKUP => "backup",
        _ => "a job",
    }
}

fn wrong(words: &str) -> CallError {
    HypervisorError::WrongState(words.to_owned()).into()
}

/// The outgoing migration on a domain, before its switch-over.
fn outgoing(domain: &Domain) -> CallResult<JobSample> {
    if is_incoming_job(domain)? {
        return Err(wrong("the migration comes in here; its source controls it"));
    }
    match of(domain)? {
        Job::Migration(sample) if sample.post_copy => {
            Err(wrong("the guest runs on the destination already"))
        }
        Job::Migration(sample) => Ok(sample),
        Job::None => Err(wrong("no migration runs on it")),
        Job::Other(words) => Err(wrong(&format!("its job is no migration but: {words}"))),
    }
}

/// Guests that were told to switch to post-copy a moment ago.
///
/// QEMU switches a little later, and libvirt learns of it later still. An abort
/// in between would pass libvirt's own check and make QEMU cut the line to a
/// guest that runs on the destination with half its memory.
#[derive(Debug, Default)]
pub(super) struct Switching(Mutex<HashMap<InstanceId, Instant>>);

impl Switching {
    /// How long after the order libvirt's view is not trusted; QEMU takes
    /// fractions of a second.
    const MOMENT: Duration = Duration::from_secs(10);

    fn guests(&self) -> MutexGuard<'_, HashMap<InstanceId, Instant>> {
        let mut guests = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        guests.retain(|_, since| since.elapsed() < Self::MOMENT);
        guests
    }
}

/// Aborts an outgoing migration; no other job is touched.
pub(super) fn abort(connect: &Connect, id: InstanceId, switching: &Switching) -> CallResult<()> {
    let domain = guests::get(connect, id)?;
    outgoing(&domain)?;
    if switching.guests().contains_key(&id) {
        return Err(wrong(
            "it was just switched to post-copy; there is no way back",
        ));
    }
    Ok(ffi::abort_job(&domain)?)
}

/// Switches an outgoing migration to post-copy. Repeating it is no error.
pub(super) fn start_post_copy(
    connect: &Connect,
    id: InstanceId,
    switching: &Switching,
) -> CallResult<()> {
    let domain = guests::get(connect, id)?;
    if let Job::Migration(sample) = of(&domain)?
        && sample.post_copy
    {
        return Ok(());
    }
    let sample = outgoing(&domain)?;
    if sample.memory.processed_bytes == 0 {
        return Err(wrong(
            "memory is not on its way yet; post-copy can begin when the disks are copied",
        ));
    }
    // Noted first: should no answer come, it may have happened.
    switching.guests().insert(id, Instant::now());
    let result = ffi::start_post_copy(&domain);
    if result.is_err() && connect.is_alive().unwrap_or(false) {
        switching.guests().remove(&id);
    }
    Ok(result?)
}

/// Sets the downtime that an outgoing migration may take, ms.
pub(super) fn set_max_downtime(connect: &Connect, id: InstanceId, ms: u64) -> CallResult<()> {
    let domain = guests::get(connect, id)?;
    outgoing(&domain)?;
    Ok(domain.migrate_set_max_downtime(ms, 0)?)
}

/// Most that libvirt takes for a bandwidth, MiB/s: no limit.
const UNLIMITED_MIB_S: u64 = (i64::MAX as u64) >> 20;

/// Pauses a guest whose migration is under way. What is left is sent as fast as the
/// link takes it: a limit would hold the guest still for as long as it lasts.
pub(super) fn pause(connect: &Connect, id: InstanceId) -> CallResult<()> {
    let domain = guests::get(connect, id)?;
    outgoing(&domain)?;
    if let Err(error) = domain.migrate_set_max_speed(UNLIMITED_MIB_S, 0) {
        warn!(instance = %id, %error, "its migration's bandwidth is still limited while it is paused");
    }
    Ok(domain.suspend().map(drop)?)
}

/// Lets a paused guest run on here. One that runs already is left alone; halves
/// of a post-copy, guests still arriving and guests under a job are refused.
pub(super) fn resume(connect: &Connect, id: InstanceId) -> CallResult<()> {
    use drover_model::guest::PowerState as P;
    let domain = guests::get(connect, id)?;
    match standing::presence(&domain)? {
        Presence::Present(P::Running) => return Ok(()),
        Presence::Present(P::Paused) => {}
        Presence::Incoming => return Err(wrong("the guest is still arriving here")),
        Presence::Absent | Presence::Present(_) => return Err(wrong("the guest is not paused")),
    }
    let (state, reason) = ffi::domain_state(&domain)?;
    if standing::is_split(state, reason) {
        return Err(wrong(
            "a post-copy migration has its memory in two places; this half cannot run alone",
        ));
    }
    if of(&domain)? != Job::None {
        return Err(wrong("a job still runs on it"));
    }
    Ok(domain.resume().map(drop)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(pairs: &[(&std::ffi::CStr, i128)]) -> Values {
        let named = |(name, number): &(&std::ffi::CStr, i128)| {
            (name.to_str().unwrap().to_owned(), Value::Number(*number))
        };
        pairs.iter().map(named).collect()
    }

    #[test]
    fn samples_have_the_models_units() {
        let values = values(&[
            (sys::VIR_DOMAIN_JOB_TIME_ELAPSED, 1500),
            (sys::VIR_DOMAIN_JOB_MEMORY_TOTAL, 1 << 30),
            (sys::VIR_DOMAIN_JOB_MEMORY_DIRTY_RATE, 100),
            (sys::VIR_DOMAIN_JOB_MEMORY_PAGE_SIZE, 16384),
            (sys::VIR_DOMAIN_JOB_AUTO_CONVERGE_THROTTLE, 20),
        ]);
        let sample = sample(&values);
        assert_eq!(sample.elapsed_ms, 1500);
        assert_eq!(sample.memory.total_bytes, 1 << 30);
        assert_eq!(sample.dirty_rate_bytes_s, 1_638_400);
        assert_eq!(sample.throttle_percent, Some(20));
        assert_eq!(sample.downtime_ms, None);
    }

    #[test]
    fn odd_values_are_no_panic() {
        let odd = values(&[(sys::VIR_DOMAIN_JOB_MEMORY_TOTAL, -1)]);
        assert_eq!(sample(&odd).memory.total_bytes, 0);
        assert_eq!(
            operation(&Values::new()),
            sys::VIR_DOMAIN_JOB_OPERATION_UNKNOWN
        );
    }
}

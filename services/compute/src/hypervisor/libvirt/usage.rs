//! What active guests use: libvirt's statistics of all of them in one call.
//!
//! libvirt asks each QEMU for some of it. So that one whose monitor hangs takes
//! nothing but its usage from a report, it is waited for shortly, and never asked
//! for twice at once.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use drover_model::{ids::InstanceId, node::GuestUsage};
use virt::{connect::Connect, sys};

use super::{
    blocking::Calls,
    errors::CallResult,
    ffi::{self, Value, Values},
};

/// How long a report waits for it.
const PATIENCE: Duration = Duration::from_secs(2);
/// libvirt's unit of memory, bytes.
const KIB_PER_MIB: u64 = 1024;

/// What guests use, by guest.
pub(super) type Usage = HashMap<InstanceId, GuestUsage>;

/// Asks for it, once at a time.
#[derive(Debug, Default)]
pub(super) struct Usages {
    asking: Arc<AtomicBool>,
}

/// A question under way; the next may be asked when it has its answer.
struct Asking(Arc<AtomicBool>);

impl Drop for Asking {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

impl Usages {
    /// What is known in time; of guests that are not in it nothing is.
    pub(super) async fn ask(&self, calls: &Calls) -> Usage {
        if self.asking.swap(true, Ordering::AcqRel) {
            return Usage::new();
        }
        let asking = Asking(self.asking.clone());
        let ask = move |connect: &Connect| {
            let asked = all(connect);
            drop(asking);
            asked
        };
        match tokio::time::timeout(PATIENCE, calls.node(ask)).await {
            Ok(Ok(usage)) => usage,
            Ok(Err(error)) => {
                tracing::debug!(%error, "what guests use is not known");
                Usage::new()
            }
            Err(_) => {
                tracing::warn!("libvirt does not say in time what guests use: a QEMU may hang");
                Usage::new()
            }
        }
    }
}

fn all(connect: &Connect) -> CallResult<Usage> {
    let stats = sys::VIR_DOMAIN_STATS_CPU_TOTAL | sys::VIR_DOMAIN_STATS_BALLOON;
    let flags = sys::VIR_CONNECT_GET_ALL_DOMAINS_STATS_ACTIVE
        | sys::VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT;
    let found = ffi::stats::of_all(connect, stats, flags)?;
    let usage = found.into_iter().filter_map(|(id, values)| {
        let usage = GuestUsage {
            cpu_time_ns: number(&values, "cpu.time")?,
            memory_rss_mib: number(&values, "balloon.rss")? / KIB_PER_MIB,
        };
        Some((InstanceId(id), usage))
    });
    Ok(usage.collect())
}

/// A statistic that is a number.
pub(super) fn number(values: &Values, name: &str) -> Option<u64> {
    match values.get(name) {
        Some(Value::Number(number)) => u64::try_from(*number).ok(),
        _ => None,
    }
}

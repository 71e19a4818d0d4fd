//! What this conductor drives, by which leases, and until when each of them holds
//! by its own monotonic clock.
//!
//! A lease is renewed for what is driven, by its id, and for nothing else: what is
//! owned and not driven is found by that and taken up. And nothing is driven without
//! one: work is never polled after the end of its lease, so a conductor that stood
//! still (SIGSTOP, a database that hung) does nothing more with what may be
//! another's by now. A machine whose monotonic clock stood still too, as that of a
//! paused VM, is shut out by the epochs alone.

use std::{
    collections::HashMap,
    future::poll_fn,
    hash::Hash,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::Poll,
    time::Duration,
};

use drover_model::ids::{MigrationId, OperationId};
use drover_store::{migrations::Lease, operations::OperationLease};
use tokio::{sync::watch, task::AbortHandle, time::Instant};
use tracing::warn;

use crate::clock::Clock;

/// A lease of whatever kind.
pub trait Leased: Copy + Eq + Send + Sync + 'static {
    /// Names what it is a lease of.
    type Id: Copy + Eq + Hash + Send + std::fmt::Display;
    /// What it is a lease of.
    fn id(&self) -> Self::Id;
    /// How often that changed hands.
    fn epoch(&self) -> i64;
}

impl Leased for Lease {
    type Id = MigrationId;

    fn id(&self) -> MigrationId {
        self.migration
    }

    fn epoch(&self) -> i64 {
        self.epoch
    }
}

impl Leased for OperationLease {
    type Id = OperationId;

    fn id(&self) -> OperationId {
        self.operation
    }

    fn epoch(&self) -> i64 {
        self.epoch
    }
}

/// The end of a lease that is asked for now.
#[derive(Debug, Clone, Copy)]
pub struct Term {
    /// For the record.
    pub recorded: drover_store::Term,
    /// For this process: a little earlier, and counted from before it was asked for.
    until: Instant,
}

impl Term {
    /// A term of so long from now on.
    pub fn new(clock: &Clock, lease_ms: u64) -> Self {
        // Clocks do not run alike: a tenth is plenty.
        let safe = Duration::from_millis(lease_ms - lease_ms / 10);
        Self {
            recorded: drover_store::Term {
                now_ms: clock.now_ms(),
                lease_ms,
            },
            until: Instant::now() + safe,
        }
    }
}

/// Everything of one kind that is driven. Cheap to clone.
pub struct Driven<L: Leased>(Arc<Mutex<HashMap<L::Id, Entry<L>>>>);

struct Entry<L> {
    lease: L,
    until: watch::Sender<Instant>,
    task: AbortHandle,
}

impl<L: Leased> Default for Driven<L> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<L: Leased> Clone for Driven<L> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<L: Leased> Driven<L> {
    /// Drives something, for as long as its lease holds. Work by an older lease ends
    /// here; by a newer one it goes on, and this is not begun.
    pub fn begin(&self, lease: L, term: Term, work: impl Future<Output = ()> + Send + 'static) {
        let mut driven = self.lock();
        if let Some(other) = driven.get(&lease.id())
            && other.lease.epoch() > lease.epoch()
        {
            return;
        }
        let (until, ends) = watch::channel(term.until);
        let place = Place {
            all: self.clone(),
            lease,
        };
        let task = tokio::spawn(async move {
            // Whole: it is given up when this ends.
            let place = place;
            if leashed(ends, work).await.is_none() {
                let what = place.lease.id();
                warn!(%what, "its lease could not be renewed in time: let go of");
            }
        });
        let entry = Entry {
            lease,
            until,
            task: task.abort_handle(),
        };
        if let Some(older) = driven.insert(lease.id(), entry) {
            older.task.abort();
        }
    }

    /// The leases of what is driven.
    pub fn leases(&self) -> Vec<L> {
        self.lock().values().map(|entry| entry.lease).collect()
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.lock().len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes in what came of renewing `asked`: those among `held` go on, the others
    /// are somebody else's by now and are let go of.
    pub fn renewed(&self, asked: &[L], held: &[L], term: Term) {
        let mut driven = self.lock();
        for lease in asked {
            let Some(entry) = driven.get(&lease.id()).filter(|e| e.lease == *lease) else {
                continue;
            };
            if held.contains(lease) {
                entry.until.send_replace(term.until);
                continue;
            }
            warn!(what = %lease.id(), "another conductor goes on with it");
            entry.task.abort();
            driven.remove(&lease.id());
        }
    }

    /// Lets go of everything.
    pub fn stop(&self) {
        for (_, entry) in self.lock().drain() {
            entry.task.abort();
        }
    }

    fn remove(&self, lease: L) {
        let mut driven = self.lock();
        if driven.get(&lease.id()).is_some_and(|e| e.lease == lease) {
            driven.remove(&lease.id());
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<L::Id, Entry<L>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place among what is driven; given up however the work ends.
struct Place<L: Leased> {
    all: Driven<L>,
    lease: L,
}

impl<L: Leased> Drop for Place<L> {
    fn drop(&mut self) {
        self.all.remove(self.lease);
    }
}

/// Does work until a moment that may be put off; none if it did not end by then.
async fn leashed<T>(
    mut ends: watch::Receiver<Instant>,
    work: impl Future<Output = T>,
) -> Option<T> {
    let until = ends.clone();
    let over = async move {
        loop {
            let at = *ends.borrow_and_update();
            tokio::select! {
                biased;
                () = tokio::time::sleep_until(at) => return,
                put_off = ends.changed() => {
                    if put_off.is_err() {
                        return tokio::time::sleep_until(at).await;
                    }
                }
            }
        }
    };
    let (mut work, mut over) = (pin!(work), pin!(over));
    poll_fn(|cx| {
        // Whatever wakes a process that stood still: first of all it looks at the time.
        let at = *until.borrow();
        if Instant::now() >= at || over.as_mut().poll(cx).is_ready() {
            return Poll::Ready(None);
        }
        work.as_mut().poll(cx).map(Some)
    })
    .await
}

#[cfg(test)]
#[path = "leases_tests.rs"]
mod tests;

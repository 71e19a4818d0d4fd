//! Calls that block, kept off the runtime: libvirt's and the file system's.
//!
//! Each runs on a thread of the blocking pool, under three bounds. A slot: few
//! calls at once, each on a connection lent to it alone. A gate: one call at once per guest, so that a QEMU whose monitor
//! hangs holds one slot and not all. A deadline: then the caller gets an error,
//! while thread, slot and gate stay taken until the call comes back.

use std::{
    collections::HashMap,
    future::Future,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use drover_model::ids::InstanceId;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use virt::connect::Connect;

use super::{
    connection::{Link, Session},
    errors::{self, CallError, CallResult},
};
use crate::hypervisor::{HypervisorError, Result};

/// libvirt calls at once: room for reads beside as many guests being started as are sent to a node at once.
const LIBVIRT_SLOTS: usize = 12;
/// File-system calls at once.
const FILE_SLOTS: usize = 8;

/// What a call leaves behind if nobody knows how it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Effect {
    /// Nothing: it may be asked again.
    Read,
    /// Perhaps something: look before acting.
    Change,
}

/// Runs blocking calls.
#[derive(Debug)]
pub(super) struct Calls {
    link: Arc<Link>,
    slots: Arc<Semaphore>,
    file_slots: Arc<Semaphore>,
    gates: Mutex<HashMap<InstanceId, Arc<Semaphore>>>,
    deadline: Duration,
}

impl Calls {
    /// Calls over that link, each within `deadline`.
    pub(super) fn new(link: Arc<Link>, deadline: Duration) -> Self {
        Self {
            link,
            slots: Arc::new(Semaphore::new(LIBVIRT_SLOTS)),
            file_slots: Arc::new(Semaphore::new(FILE_SLOTS)),
            gates: Mutex::new(HashMap::new()),
            deadline,
        }
    }

    /// Asks libvirt about the node as a whole.
    pub(super) async fn node<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connect) -> CallResult<T> + Send + 'static,
    ) -> Result<T> {
        self.libvirt(Effect::Read, None, work).await
    }

    /// Asks libvirt about one guest, or does something to it.
    pub(super) async fn guest<T: Send + 'static>(
        &self,
        effect: Effect,
        id: InstanceId,
        work: impl FnOnce(&Connect) -> CallResult<T> + Send + 'static,
    ) -> Result<T> {
        self.libvirt(effect, Some(id), work).await
    }

    async fn libvirt<T: Send + 'static>(
        &self,
        effect: Effect,
        guest: Option<InstanceId>,
        work: impl FnOnce(&Connect) -> CallResult<T> + Send + 'static,
    ) -> Result<T> {
        let ready = async {
            let session = self.link.session().await?;
            let gate = match guest {
                Some(id) => Some(take(self.gate(id)).await?),
                None => None,
            };
            Ok((session, gate, take(self.slots.clone()).await?))
        };
        let (session, gate, slot) = within(self.deadline, ready)
            .await
            .unwrap_or_else(|| Err(self.link.unreachable("earlier calls still wait for it")))?;
        let link = self.link.clone();
        let task = tokio::task::spawn_blocking(move || {
            let result = run(&link, &session, effect, guest, work);
            // A session's last reference may go here; gate and slot go after it.
            drop(session);
            drop((gate, slot));
            result
        });
        match within(self.deadline, task).await {
            Some(result) => result.unwrap_or_else(|e| Err(HypervisorError::Bug(e.to_string()))),
            None => Err(self.late(effect)),
        }
    }

    fn late(&self, effect: Effect) -> HypervisorError {
        let words = format!("no answer within {} s", self.deadline.as_secs());
        match effect {
            Effect::Read => self.link.unreachable(&words),
            Effect::Change => HypervisorError::Lost(words),
        }
    }

    /// Asks the file system, or changes it.
    pub(super) async fn files<T: Send + 'static>(
        &self,
        effect: Effect,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let words = format!(
            "the file system does not answer within {} s",
            self.deadline.as_secs()
        );
        let slot = within(self.deadline, take(self.file_slots.clone()))
            .await
            .unwrap_or_else(|| Err(HypervisorError::Failed(words.clone())))?;
        let task = tokio::task::spawn_blocking(move || {
            let result = work();
            drop(slot);
            result
        });
        match (within(self.deadline, task).await, effect) {
            (Some(result), _) => {
                result.unwrap_or_else(|e| Err(HypervisorError::Bug(e.to_string())))
            }
            (None, Effect::Read) => Err(HypervisorError::Failed(words)),
            (None, Effect::Change) => Err(HypervisorError::Lost(words)),
        }
    }

    fn gate(&self, id: InstanceId) -> Arc<Semaphore> {
        let mut gates = self.gates.lock().unwrap_or_else(PoisonError::into_inner);
        // A gate that only this map holds is in nobody's way.
        gates.retain(|_, gate| Arc::strong_count(gate) > 1);
        let gate = gates.entry(id);
        gate.or_insert_with(|| Arc::new(Semaphore::new(1))).clone()
    }
}

async fn within<T>(limit: Duration, work: impl Future<Output = T>) -> Option<T> {
    tokio::time::timeout(limit, work).await.ok()
}

async fn take(semaphore: Arc<Semaphore>) -> Result<OwnedSemaphorePermit> {
    let closed = |_| HypervisorError::Bug("a semaphore was closed".to_owned());
    semaphore.acquire_owned().await.map_err(closed)
}

/// Does the work and judges its error by whether the connection survived it.
fn run<T>(
    link: &Link,
    session: &Session,
    effect: Effect,
    guest: Option<InstanceId>,
    work: impl FnOnce(&Connect) -> CallResult<T>,
) -> Result<T> {
    let connect = session.borrow(link).map_err(|error| {
        // Nothing has been asked yet.
        link.unreachable(error.message())
    })?;
    let result = work(&connect);
    let alive = connect.is_alive().unwrap_or(false);
    if alive {
        session.give_back(connect);
    } else {
        Link::report_dead(session);
    }
    result.map_err(|error| match (error, effect) {
        (CallError::Decided(error), _) => error,
        (CallError::Virt(error), _) if alive => errors::classify(&error, guest),
        (CallError::Virt(error), Effect::Read) => link.unreachable(error.message()),
        (CallError::Virt(error), Effect::Change) => {
            HypervisorError::Lost(error.message().to_owned())
        }
    })
}

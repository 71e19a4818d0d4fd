//! The runner: one task per unfinished operation that this conductor owns.
//!
//! ```text
//! begun ──► planning ──► running ──┬──► at its end
//!              │            │ ▲    │
//!              │            ▼ │ anything changes, or a few seconds pass
//!              │          waits    │
//!              └──► cancelling ◄───┘ somebody called it off
//! ```
//!
//! Everything that a step needs is on the record: the operation's own, and its
//! migrations', each admitted under a name made of operation, guest and attempt.
//! So a conductor that dies anywhere goes on where it was, and nothing is begun
//! twice. At start, and whenever a lease of another conductor runs out,
//! unfinished operations are taken up with a new epoch (invariant 4). What
//! fails to be read or written, or panics, is tried again after a pause.

use std::{
    collections::HashMap,
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use drover_model::ids::OperationId;
use drover_runtime::error_chain::Chain;
use drover_store::{StoreError, operations::OperationLease};
use futures_util::FutureExt;
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::drive::Drive;
use crate::{app::Context, clock::goes_on_after, task::runner::Runner};

/// Time between two passes.
const PASS: Duration = Duration::from_secs(5);
/// Pause before an operation is driven again that failed to be read or written.
const PAUSE: Duration = Duration::from_secs(2);

/// Drives operations on nodes. Cheap to clone.
#[derive(Clone)]
pub struct OperationRunner {
    pub(super) context: Context,
    /// Drives their migrations.
    pub(super) moves: Runner,
    driven: Arc<Mutex<HashMap<OperationId, AbortHandle>>>,
}

impl OperationRunner {
    /// A runner in the name of the runner of migrations.
    pub fn new(context: Context, moves: Runner) -> Self {
        Self {
            context,
            moves,
            driven: Arc::default(),
        }
    }

    /// Drives an operation of this owner from wherever it stands.
    pub fn spawn(&self, lease: OperationLease) {
        let mut driven = self.lock();
        let runner = self.clone();
        let task = tokio::spawn(async move { runner.run(lease).await });
        // A newer lease shuts the older task out anyway; it need not find out.
        if let Some(old) = driven.insert(lease.operation, task.abort_handle()) {
            old.abort();
        }
    }

    async fn run(&self, lease: OperationLease) {
        loop {
            let mut drive = Drive::new(self.context.clone(), self.moves.clone(), lease);
            match AssertUnwindSafe(drive.run()).catch_unwind().await {
                Ok(Ok(())) => break,
                Ok(Err(StoreError::Fenced(what))) => {
                    info!(what, "another conductor goes on with it");
                    break;
                }
                Ok(Err(failed)) => {
                    warn!(operation = %lease.operation, error = %Chain(&failed), "tried again soon");
                }
                Err(_) => error!(operation = %lease.operation, "it panicked; tried again soon"),
            }
            tokio::time::sleep(PAUSE).await;
        }
        self.lock().remove(&lease.operation);
    }

    /// Lets go of everything; the record has what is needed to go on.
    pub fn stop(&self) {
        for (_, task) in self.lock().drain() {
            task.abort();
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<OperationId, AbortHandle>> {
        self.driven.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes up what this owner left unfinished in an earlier life.
    ///
    /// # Errors
    /// The record cannot be read.
    pub async fn recover(&self) -> Result<(), StoreError> {
        self.adopt(true).await
    }

    async fn adopt(&self, own_too: bool) -> Result<(), StoreError> {
        let store = &self.context.store;
        let owner = self.moves.owner();
        let leases = store.adopt_operations(owner, own_too, self.moves.term());
        for lease in leases.await? {
            let attempted = store
                .update_operation(lease.operation, Some(lease), |o| {
                    o.attempt += 1;
                    owner.clone_into(&mut o.owner);
                    true
                })
                .await?;
            info!(
                operation = attempted.id, attempt = attempted.attempt, status = %attempted.status,
                "takes up an unfinished operation"
            );
            self.spawn(lease);
        }
        Ok(())
    }

    /// The pass, until told to stop.
    pub async fn keep(&self, stop: CancellationToken) {
        while goes_on_after(PASS, &stop).await {
            if let Err(error) = self.pass().await {
                warn!(%error, "operations could not be looked after; tried again soon");
            }
        }
    }

    async fn pass(&self) -> Result<(), StoreError> {
        let (owner, term) = (self.moves.owner(), self.moves.term());
        let store = &self.context.store;
        store.renew_operation_leases(owner, term).await?;
        self.adopt(false).await
    }
}

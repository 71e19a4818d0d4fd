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

use std::{panic::AssertUnwindSafe, time::Duration};

use drover_runtime::error_chain::Chain;
use drover_store::{StoreError, operations::OperationLease};
use futures_util::FutureExt;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::drive::Drive;
use crate::{
    app::Context,
    clock::goes_on_after,
    leases::{Driven, Term},
    task::runner::{Runner, in_time},
};

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
    driven: Driven<OperationLease>,
}

/// What is left alone here is called so.
const KIND: &str = "operation ";

fn name_of(lease: &OperationLease) -> String {
    format!("{KIND}{}", lease.operation)
}

impl OperationRunner {
    /// A runner in the name of the runner of migrations.
    pub fn new(context: Context, moves: Runner) -> Self {
        Self {
            context,
            moves,
            driven: Driven::default(),
        }
    }

    /// Drives an operation of this owner from wherever it stands.
    pub fn spawn(&self, lease: OperationLease, term: Term) {
        let runner = self.clone();
        let work = async move { runner.run(lease).await };
        self.driven.begin(lease, term, work);
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
                Ok(Err(error @ StoreError::Newer { .. })) if !self.understands(lease).await => {
                    info!(%error, "it is left alone");
                    break;
                }
                Ok(Err(failed)) => {
                    warn!(operation = %lease.operation, error = %Chain(&failed), "tried again soon");
                }
                Err(_) => error!(operation = %lease.operation, "it panicked; tried again soon"),
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Lets go of everything; the record has what is needed to go on.
    pub fn stop(&self) {
        self.driven.stop();
    }

    /// Takes up what this owner left unfinished in an earlier life.
    ///
    /// # Errors
    /// The record cannot be read.
    pub async fn recover(&self) -> Result<(), StoreError> {
        self.take_up().await
    }

    /// Takes up whatever is owned and not driven, and what others left. What cannot
    /// be is left for the next pass, and does not hold up the rest.
    async fn take_up(&self) -> Result<(), StoreError> {
        let store = &self.context.store;
        let (owner, term) = (self.moves.owner(), self.moves.term().recorded);
        let driven = self.driven.leases();
        let undriven = store.undriven_operations(owner, &driven, term).await?;
        let names: Vec<String> = undriven.iter().map(name_of).collect();
        self.context.left_alone.keep(KIND, &names);
        for seen in undriven {
            if let Err(error) = self.take_up_one(seen).await {
                warn!(
                    operation = %seen.operation, error = %Chain(&error),
                    "could not be taken up; tried again soon"
                );
            }
        }
        Ok(())
    }

    /// Whether this build can go on with an operation. What a newer one wrote is left
    /// alone, with its lease as it is.
    async fn understands(&self, lease: OperationLease) -> bool {
        let read = self.context.store.operation(lease.operation).await;
        let Err(error @ StoreError::Newer { .. }) = read else {
            return true;
        };
        let left = &self.context.left_alone;
        left.note(name_of(&lease), &error.to_string());
        false
    }

    async fn take_up_one(&self, seen: OperationLease) -> Result<(), StoreError> {
        let (store, owner) = (&self.context.store, self.moves.owner());
        let term = self.moves.term();
        if !self.understands(seen).await {
            return Ok(());
        }
        let taken = store.take_over_operation(seen, owner, term.recorded);
        let Some(lease) = taken.await? else {
            return Ok(());
        };
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
        self.spawn(lease, term);
        Ok(())
    }

    /// Renews leases, until told to stop.
    pub async fn keep_leases(&self, stop: CancellationToken) {
        let mut pause = self.moves.renewal_pause();
        while goes_on_after(pause, &stop).await {
            pause = self.moves.renewal_pause();
            if let Err(why) = in_time(timeout(pause, self.renew()).await) {
                warn!(
                    why,
                    "leases on operations could not be renewed; tried again at once"
                );
                pause = Duration::from_secs(1).min(pause);
            }
        }
    }

    async fn renew(&self) -> Result<(), StoreError> {
        let (asked, term) = (self.driven.leases(), self.moves.term());
        let (store, owner) = (&self.context.store, self.moves.owner());
        let renewal = store.renew_operation_leases(owner, &asked, term.recorded);
        self.driven.renewed(&asked, &renewal.await?, term);
        Ok(())
    }

    /// The pass, until told to stop.
    pub async fn keep(&self, stop: CancellationToken) {
        while goes_on_after(PASS, &stop).await {
            if let Err(error) = self.take_up().await {
                warn!(error = %Chain(&error), "operations could not be looked after; tried again soon");
            }
        }
    }
}

//! The runner: one task per unfinished operation that this conductor owns.
//!
//! ```text
//! admitted ──► waits for a slot ──► driven ──► at its end
//!                                    │  ▲
//!                              stuck ▼  │ resume, or both nodes are back
//!                                 on the record
//! ```
//!
//! At start, and whenever a lease of another conductor runs out, unfinished
//! operations are taken up with a new epoch (invariant 4). A pass every few
//! seconds renews leases, resumes what was stuck, and does tidying that was
//! put off.

use std::{
    collections::HashMap,
    marker::PhantomData,
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use drover_model::{
    ids::{HostName, MigrationId},
    migration::{Ending, Migration, MigrationStatus, Way},
};
use drover_saga::{DriveError, Event, JournalError, Outcome, Patience, StepError, drive};
use drover_store::{Store, StoreError, Term, migrations::Lease, sagas::SagaKey};
use futures_util::FutureExt;
use tokio::{sync::Semaphore, task::AbortHandle};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::{
    cold_migrate::ColdMigrate,
    confirm::Confirm,
    evacuate::Evacuate,
    job::{Data, Job, store_error},
    journal::{RecordJournal, Recorded},
    live_migrate::LiveMigrate,
    revert::Revert,
    transfer::Transfer,
};
use crate::{app::Context, clock::goes_on_after, survey::hypervisor_is_up};

/// Time between two passes.
const PASS: Duration = Duration::from_secs(5);
/// Pause before a saga whose journal failed is driven again.
const JOURNAL_PAUSE: Duration = Duration::from_secs(2);
/// How long a stuck operation rests before it is tried again by itself, ms.
const STUCK_REST_MS: u64 = 30_000;
/// How long unique ids of requests are remembered, ms.
const REQUESTS_KEPT_MS: u64 = 86_400_000;

/// What came of asking for an abort.
#[derive(Debug, Clone, PartialEq)]
pub enum Aborting {
    /// It is on the record.
    Asked(Box<Migration>),
    /// It was there already.
    AskedBefore(Box<Migration>),
    /// The guest may run on its destination by now, or all is over.
    TooLate(Box<Migration>),
}

/// Drives operations. Cheap to clone.
#[derive(Clone)]
pub struct Runner {
    context: Context,
    owner: Arc<str>,
    lease_ms: u64,
    slots: Arc<Semaphore>,
    patience: Patience,
    driven: Arc<Mutex<HashMap<MigrationId, AbortHandle>>>,
}

impl Runner {
    /// A runner in the name of `owner`.
    pub fn new(
        context: Context,
        owner: &str,
        lease_s: u64,
        slots: usize,
        patience: Patience,
    ) -> Self {
        Self {
            context,
            owner: owner.into(),
            lease_ms: lease_s * 1000,
            slots: Arc::new(Semaphore::new(slots)),
            patience,
            driven: Arc::default(),
        }
    }

    /// In whose name.
    pub fn owner(&self) -> &str {
        &self.owner
    }

    /// For how long a lease taken now holds.
    pub fn term(&self) -> Term {
        Term {
            now_ms: self.context.clock.now_ms(),
            lease_ms: self.lease_ms,
        }
    }

    /// Operations driven now.
    pub fn driven(&self) -> usize {
        self.lock().len()
    }

    /// Drives a migration of this owner from wherever it stands.
    pub fn spawn(&self, lease: Lease) {
        let mut driven = self.lock();
        let runner = self.clone();
        let task = tokio::spawn(async move {
            let ran = AssertUnwindSafe(runner.run(lease)).catch_unwind().await;
            runner.lock().remove(&lease.migration);
            if ran.is_err() {
                error!(migration = %lease.migration, "its saga panicked; it is taken up again at the next start");
            }
        });
        // A newer lease shuts the older task out anyway; it need not find out.
        if let Some(old) = driven.insert(lease.migration, task.abort_handle()) {
            old.abort();
        }
    }

    /// Lets go of everything; the journal has what is needed to go on.
    pub fn stop(&self) {
        for (_, task) in self.lock().drain() {
            task.abort();
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<MigrationId, AbortHandle>> {
        self.driven.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn run(&self, lease: Lease) {
        let Ok(_slot) = self.slots.acquire().await else {
            return;
        };
        loop {
            match self.drive_once(lease).await {
                Ok(outcome) => return tell(lease.migration, &outcome),
                Err(DriveError::Stuck(_)) => return,
                Err(DriveError::Journal(JournalError::Fenced)) => {
                    info!(migration = %lease.migration, "another conductor goes on with it");
                    return;
                }
                Err(DriveError::Journal(JournalError::Illegal(what))) => {
                    error!(migration = %lease.migration, what, "cannot go on with it");
                    return;
                }
                Err(DriveError::Journal(error)) => {
                    warn!(migration = %lease.migration, %error, "tried again soon");
                    tokio::time::sleep(JOURNAL_PAUSE).await;
                }
            }
        }
    }

    async fn drive_once(&self, lease: Lease) -> Result<Outcome, DriveError> {
        let store = &self.context.store;
        let migration = store.migration(lease.migration).await;
        let migration = migration.map_err(|e| JournalError::Unavailable(e.to_string()))?;
        let ending = migration.ending;
        let key = key_of(&migration);
        let way = migration.way.clone();
        let job = self.job(lease, migration);
        match (ending, way) {
            (Some(Ending::Confirm), _) => self.drive(&Confirm::new(job), lease, key).await,
            (Some(Ending::Revert), _) => self.drive(&Revert::new(job), lease, key).await,
            (None, Way::Live(options)) => {
                self.drive(&LiveMigrate::new(job, options), lease, key)
                    .await
            }
            (None, Way::Cold(options)) => {
                self.drive(&ColdMigrate::new(job, options), lease, key)
                    .await
            }
            (None, Way::Transfer(wanted)) => {
                self.drive(&Transfer::new(job, wanted), lease, key).await
            }
            (None, Way::Evacuation(wanted)) => {
                self.drive(&Evacuate::new(job, wanted), lease, key).await
            }
        }
    }

    fn job(&self, lease: Lease, migration: Migration) -> Job {
        Job {
            context: self.context.clone(),
            agents: self.context.agents.under(lease),
            lease,
            migration,
        }
    }

    async fn drive<G: Recorded>(
        &self,
        saga: &G,
        lease: Lease,
        key: SagaKey,
    ) -> Result<Outcome, DriveError> {
        let journal = RecordJournal::<G> {
            store: self.context.store.clone(),
            clock: self.context.clock.clone(),
            lease,
            saga: key,
            kind: PhantomData,
        };
        drive(saga, &journal, self.patience, Data::default()).await
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
        let leases = store.adopt(&self.owner, own_too, self.term()).await?;
        for lease in leases {
            let attempted = store
                .update_migration(lease.migration, |m| {
                    m.attempt += 1;
                    self.owner.as_ref().clone_into(&mut m.owner);
                    true
                })
                .await?;
            info!(
                migration = attempted.id, attempt = attempted.attempt, status = %attempted.status,
                "takes up an unfinished migration"
            );
            self.spawn(lease);
        }
        Ok(())
    }

    /// Has a finished cold migration confirmed or reverted; none if it is not
    /// finished. Asked for what is already being done, or is done, it is that.
    ///
    /// # Errors
    /// The record cannot be read or written.
    pub async fn end_with(
        &self,
        id: MigrationId,
        ending: Ending,
    ) -> Result<Option<Migration>, StoreError> {
        use MigrationStatus as S;
        let (during, done) = match ending {
            Ending::Confirm => (S::Confirming, S::Confirmed),
            Ending::Revert => (S::Reverting, S::Reverted),
        };
        let (mut begun, mut fits) = (false, false);
        let now_ms = self.context.clock.now_ms();
        let change = |m: &mut Migration| {
            begun = m.status == S::Finished;
            fits = begun || m.status == done || (m.ending == Some(ending) && !m.status.rests());
            if begun {
                m.ending = Some(ending);
                m.ending_attempt += 1;
                m.updated_at_ms = now_ms;
                // From finished to either cannot fail.
                let _ = m.become_status(during);
            }
            begun
        };
        let migration = self.context.store.update_migration(id, change).await?;
        if begun {
            info!(migration = migration.id, ?ending, "is to be ended");
            self.resume(id).await?;
        }
        Ok(fits.then_some(migration))
    }

    /// Asks for an abort. Valid in every state before the switch-over; asked
    /// twice it is one abort.
    ///
    /// # Errors
    /// The record cannot be read or written.
    pub async fn abort(&self, id: MigrationId) -> Result<Aborting, StoreError> {
        let (mut too_late, mut before) = (false, false);
        let change = |m: &mut Migration| {
            too_late = m.status.is_final() || m.past_return();
            before = m.abort_requested;
            m.abort_requested |= !too_late;
            !too_late && !before
        };
        let migration = self.context.store.update_migration(id, change).await?;
        if too_late {
            return Ok(Aborting::TooLate(Box::new(migration)));
        }
        if migration.status == MigrationStatus::Stuck {
            self.resume(id).await?;
        }
        if before {
            return Ok(Aborting::AskedBefore(Box::new(migration)));
        }
        info!(migration = migration.id, "abort asked for");
        Ok(Aborting::Asked(Box::new(migration)))
    }

    /// Tries a stuck operation again at once.
    ///
    /// # Errors
    /// The record cannot be read or written.
    pub async fn resume(&self, id: MigrationId) -> Result<(), StoreError> {
        let term = self.term();
        let lease = self.context.store.adopt_one(id, &self.owner, term).await?;
        self.spawn(lease);
        Ok(())
    }

    /// The pass, until told to stop.
    pub async fn keep(&self, stop: CancellationToken) {
        while goes_on_after(PASS, &stop).await {
            if let Err(error) = self.pass().await {
                warn!(%error, "the record could not be looked after; tried again soon");
            }
        }
    }

    async fn pass(&self) -> Result<(), StoreError> {
        let store = &self.context.store;
        let now_ms = self.context.clock.now_ms();
        store.renew_leases(&self.owner, self.term()).await?;
        self.adopt(false).await?;
        self.resume_rested(store, now_ms).await?;
        self.confirm_overdue(store, now_ms).await?;
        self.tidy(store).await?;
        store
            .prune_requests(now_ms.saturating_sub(REQUESTS_KEPT_MS))
            .await
    }

    async fn resume_rested(&self, store: &Store, now_ms: u64) -> Result<(), StoreError> {
        let filter = drover_model::api::conductor::ListMigrations {
            active: true,
            limit: Some(1000),
            ..Default::default()
        };
        for m in store.migrations(&filter, None).await? {
            let rested = now_ms.saturating_sub(m.updated_at_ms) >= STUCK_REST_MS;
            let stuck = m.status == MigrationStatus::Stuck && m.owner == *self.owner;
            if stuck && rested && self.both_up(&m).await? {
                self.resume(m.uuid).await?;
            }
        }
        Ok(())
    }

    /// Confirms what was not confirmed within the window, if there is one.
    async fn confirm_overdue(&self, store: &Store, now_ms: u64) -> Result<(), StoreError> {
        if self.context.confirm_window_ms == 0 {
            return Ok(());
        }
        let filter = drover_model::api::conductor::ListMigrations {
            active: true,
            limit: Some(1000),
            ..Default::default()
        };
        for m in store.migrations(&filter, None).await? {
            let since = m.finished_at_ms.unwrap_or(now_ms);
            let overdue = now_ms.saturating_sub(since) >= self.context.confirm_window_ms;
            if m.status == MigrationStatus::Finished && overdue {
                info!(migration = m.id, "nobody reverted it in time");
                self.end_with(m.uuid, Ending::Confirm).await?;
            }
        }
        Ok(())
    }

    async fn both_up(&self, m: &Migration) -> Result<bool, StoreError> {
        let live = self.context.liveness();
        // Of an evacuation the source is dead.
        let source = Some(&m.source_host).filter(|_| !matches!(m.way, Way::Evacuation(_)));
        for host in source.into_iter().chain(&m.dest_host) {
            match self.context.store.node(host).await {
                Ok(node) if live.is_up(&node) && hypervisor_is_up(&node) => {}
                Ok(_) | Err(StoreError::NotFound(_)) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    async fn tidy(&self, store: &Store) -> Result<(), StoreError> {
        for (uuid, step) in store.put_off_steps().await? {
            let Ok(id) = uuid.parse::<MigrationId>() else {
                continue;
            };
            let m = store.migration(id).await?;
            // Of a step that still runs, or will be driven again, nothing is tidied.
            let Some(dest) = m.dest_host.clone().filter(|_| m.status.rests()) else {
                continue;
            };
            match self.tidy_again(m, &step, &dest).await {
                Ok(()) => {
                    store.tidied(&uuid, &step).await?;
                    let done = format!("{step} was put off, and is done now");
                    store
                        .update_migration(id, |m| {
                            m.warnings.push(done.clone());
                            true
                        })
                        .await?;
                }
                Err(error) => info!(migration = uuid, step, %error, "tidying is put off again"),
            }
        }
        Ok(())
    }
}

impl Runner {
    /// Does a tidying step again that was put off.
    async fn tidy_again(&self, m: Migration, step: &str, dest: &HostName) -> Result<(), StepError> {
        let lease = self.context.store.lease(m.uuid).await;
        let lease = lease.map_err(|e| store_error(&e))?;
        // What its steps had learned by then; it tells of the move even after an ending.
        let events = self.context.store.saga_events(&key_of(&m)).await;
        let data = learned(&events.map_err(|e| store_error(&e))?);
        let (ending, way) = (m.ending, m.way.clone());
        let job = self.job(lease, m);
        match (ending, way) {
            (Some(Ending::Confirm), _) => Confirm::new(job).confirm_source().await,
            (Some(Ending::Revert), _) => Revert::new(job).tidy_again(step, dest, &data).await,
            (None, Way::Live(options)) => {
                LiveMigrate::new(job, options).tidy_again(step, dest).await
            }
            (None, Way::Cold(options)) => {
                let cold = ColdMigrate::new(job, options);
                cold.tidy_again(step, dest, &data).await
            }
            (None, Way::Transfer(wanted)) => {
                Transfer::new(job, wanted).tidy_again(step, &data).await
            }
            (None, Way::Evacuation(wanted)) => {
                let evacuate = Evacuate::new(job, wanted);
                evacuate.tidy_again(step, dest, &data).await
            }
        }
    }
}

/// The saga that a migration is in, or was in last.
fn key_of(m: &Migration) -> SagaKey {
    match m.ending {
        None => SagaKey::of_move(m.uuid),
        Some(_) => SagaKey::of_ending(m.uuid, m.ending_attempt),
    }
}

/// What the steps of a saga have learned.
fn learned(events: &[Event]) -> Data {
    let last = events.iter().rev().find_map(|event| match event {
        Event::Succeeded { data, .. } => serde_json::from_value(data.clone()).ok(),
        _ => None,
    });
    last.unwrap_or_default()
}

fn tell(migration: MigrationId, outcome: &Outcome) {
    match outcome {
        Outcome::Completed => info!(%migration, "completed"),
        Outcome::RolledBack(error) => info!(%migration, %error, "rolled back"),
    }
}

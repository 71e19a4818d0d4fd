//! The runner: one task per unfinished operation that this conductor owns.
//!
//! ```text
//! admitted ──► waits for a slot ──► driven ──► at its end
//!                                    │  ▲
//!                              stuck ▼  │ resume, or both nodes are back
//!                                 on the record
//! ```
//!
//! Nothing is owned without being driven, for long: a pass every few seconds takes
//! up, with a new epoch, what this conductor owns and does not drive, and what others
//! left whose lease ran out (invariant 4); it resumes what was stuck. Leases are
//! renewed by a task of its own ([`crate::leases`]), put-off tidying is done in
//! another ([`super::tidying`]): neither waits for anything else.

use std::{
    collections::HashMap,
    hash::Hash,
    marker::PhantomData,
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use drover_model::{
    ids::{HostName, MigrationId},
    migration::{Ending, Migration, MigrationStatus, Way},
};
use drover_runtime::error_chain::Chain;
use drover_saga::{DriveError, JournalError, Outcome, Patience, State, drive, journal::replay};
use drover_store::{StoreError, migrations::Lease, sagas::SagaKey};
use futures_util::FutureExt;
use tokio::{
    sync::Semaphore,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::{
    cold_migrate::ColdMigrate,
    confirm::Confirm,
    evacuate::Evacuate,
    job::{Data, Job, Slot},
    journal::{self, RecordJournal, Recorded},
    live_migrate::LiveMigrate,
    revert::Revert,
    transfer::Transfer,
};
use crate::{
    app::Context,
    clock::goes_on_after,
    leases::{Driven, Term},
    operation::evacuation::proven_dead,
    survey::hypervisor_is_up,
};

/// Time between two passes.
pub(super) const PASS: Duration = Duration::from_secs(5);
/// Pause before a saga whose journal failed is driven again.
const JOURNAL_PAUSE: Duration = Duration::from_secs(2);
/// How long a stuck operation rests before it is tried again by itself, ms.
const STUCK_REST_MS: u64 = 30_000;
/// How long unique ids of requests are remembered, ms.
const REQUESTS_KEPT_MS: u64 = 86_400_000;
/// Leases are renewed so often in the time that they last.
const RENEWALS_PER_LEASE: u64 = 3;

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

/// For how long this process has seen things in a state, by its own monotonic time.
/// Cheap to clone.
#[derive(Clone)]
struct Seen<K>(Arc<Mutex<HashMap<K, Instant>>>);

impl<K> Default for Seen<K> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<K: Copy + Eq + Hash> Seen<K> {
    /// Notes what is in that state now, all of it; says of each for how long, ms.
    fn look(&self, now: impl Iterator<Item = K>) -> Vec<u64> {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let before = std::mem::take(&mut *seen);
        let now = now.map(|key| {
            let since = before.get(&key).copied().unwrap_or_else(Instant::now);
            seen.insert(key, since);
            u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
        });
        now.collect()
    }
}

/// Drives operations. Cheap to clone.
#[derive(Clone)]
pub struct Runner {
    pub(super) context: Context,
    owner: Arc<str>,
    lease_ms: u64,
    slots: Arc<Semaphore>,
    patience: Patience,
    driven: Driven<Lease>,
    /// What rests, and has tidying of it done.
    pub(super) tidied: Driven<Lease>,
    /// Moves that wait to be confirmed, by their number of endings so far.
    unconfirmed: Seen<(MigrationId, u32)>,
    /// What is stuck, by its version.
    stuck: Seen<(MigrationId, u64)>,
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
            driven: Driven::default(),
            tidied: Driven::default(),
            unconfirmed: Seen::default(),
            stuck: Seen::default(),
        }
    }

    /// In whose name.
    pub fn owner(&self) -> &str {
        &self.owner
    }

    /// How long a lease that is asked for now holds.
    pub fn term(&self) -> Term {
        Term::new(&self.context.clock, self.lease_ms)
    }

    /// Time between two renewals of a lease.
    pub fn renewal_pause(&self) -> Duration {
        Duration::from_millis(self.lease_ms / RENEWALS_PER_LEASE)
    }

    /// Operations driven now.
    pub fn driven(&self) -> usize {
        self.driven.len()
    }

    /// Drives a migration of this owner from wherever it stands.
    pub fn spawn(&self, lease: Lease, term: Term) {
        let runner = self.clone();
        self.supervise(lease, term, async move { runner.run(lease).await });
    }

    /// Drives something, and has it stuck if it cannot go on, or panics.
    fn supervise(
        &self,
        lease: Lease,
        term: Term,
        work: impl Future<Output = Result<(), String>> + Send + 'static,
    ) {
        let runner = self.clone();
        self.driven.begin(lease, term, async move {
            let ran = AssertUnwindSafe(work).catch_unwind().await;
            let why = match ran {
                Ok(Ok(())) => return,
                Ok(Err(why)) => why,
                Err(panic) => format!("a mistake in the conductor: {}", text(panic.as_ref())),
            };
            runner.be_stuck(lease, &why).await;
        });
    }

    /// Lets go of everything; the journal has what is needed to go on.
    pub fn stop(&self) {
        self.driven.stop();
        self.tidied.stop();
    }

    /// To its end, or until it is somebody else's; or says why it cannot go on.
    async fn run(&self, lease: Lease) -> Result<(), String> {
        let slot = self.slot(lease).await;
        loop {
            match self.drive_once(lease, &slot).await {
                Ok(outcome) => {
                    tell(lease.migration, &outcome);
                    return Ok(());
                }
                Err(DriveError::Stuck(_)) => return Ok(()),
                Err(DriveError::Journal(JournalError::Fenced)) => {
                    info!(migration = %lease.migration, "another conductor goes on with it");
                    return Ok(());
                }
                Err(DriveError::Journal(JournalError::Newer(why))) => {
                    self.leave_alone(lease.migration, &why);
                    return Ok(());
                }
                Err(DriveError::Journal(error @ JournalError::Illegal(_))) => {
                    return Err(error.to_string());
                }
                Err(DriveError::Journal(error)) => {
                    warn!(migration = %lease.migration, %error, "tried again soon");
                    tokio::time::sleep(JOURNAL_PAUSE).await;
                }
            }
        }
    }

    /// Puts what cannot go on on the record as such, with the reason. It is tried
    /// again like anything that is stuck.
    async fn be_stuck(&self, lease: Lease, why: &str) {
        error!(migration = %lease.migration, why, "stuck: 'drover migration resume' tries again");
        loop {
            let now_ms = self.context.clock.now_ms();
            let change = |m: &mut Migration| journal::be_stuck(m, why, now_ms);
            match self.context.store.update_driven(lease, change).await {
                Ok(_) | Err(StoreError::Fenced(_)) => return,
                Err(error @ StoreError::Newer { .. }) => {
                    return self.leave_alone(lease.migration, &error.to_string());
                }
                Err(error) => warn!(error = %Chain(&error), "tried again soon"),
            }
            tokio::time::sleep(JOURNAL_PAUSE).await;
        }
    }

    /// A slot for what has yet to begin. Everything else goes on without: what sends
    /// already, what ends a move that is done, an evacuation, an abort.
    async fn slot(&self, lease: Lease) -> Slot {
        let Ok(migration) = self.context.store.migration(lease.migration).await else {
            // Driving it says what is the matter.
            return Slot::default();
        };
        let begins = migration.status == MigrationStatus::Accepted && migration.ending.is_none();
        if !begins || matches!(migration.way, Way::Evacuation(_)) {
            return Slot::default();
        }
        let job = self.job(lease, migration, Slot::default());
        tokio::select! {
            biased;
            slot = self.slots.clone().acquire_owned() => Slot::of(slot.ok()),
            _ = job.interrupted() => Slot::default(),
        }
    }

    async fn drive_once(&self, lease: Lease, slot: &Slot) -> Result<Outcome, DriveError> {
        let store = &self.context.store;
        let migration = store.migration(lease.migration).await;
        let migration = migration.map_err(|e| match e {
            StoreError::Newer { .. } => JournalError::Newer(e.to_string()),
            e => JournalError::Unavailable(e.to_string()),
        })?;
        let ending = migration.ending;
        let key = key_of(&migration);
        let way = migration.way.clone();
        let job = self.job(lease, migration, slot.clone());
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

    pub(super) fn job(&self, lease: Lease, migration: Migration, slot: Slot) -> Job {
        Job {
            context: self.context.clone(),
            agents: self.context.agents.under(lease),
            lease,
            migration,
            slot,
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
        self.unstick(&journal).await?;
        drive(saga, &journal, self.patience, Data::default()).await
    }

    /// What was put among the stuck by [`Self::be_stuck`], of which its saga knows
    /// nothing, has the status of its step again.
    async fn unstick<G: Recorded>(&self, journal: &RecordJournal<G>) -> Result<(), JournalError> {
        use drover_saga::Journal;
        let events = journal.load().await?;
        let (state, _) = replay::<G>(&events)?;
        if matches!(state, State::Stuck(_) | State::Done(_)) {
            return Ok(());
        }
        let now_ms = self.context.clock.now_ms();
        let change = |m: &mut Migration| journal::go_on::<G>(m, &events, now_ms);
        match self
            .context
            .store
            .update_driven(journal.lease, change)
            .await
        {
            Ok(_) => Ok(()),
            Err(StoreError::Fenced(_)) => Err(JournalError::Fenced),
            Err(error) => Err(JournalError::Unavailable(Chain(&error).to_string())),
        }
    }

    /// Whether this build can go on with a migration. What a newer one wrote is left
    /// alone, with its lease as it is.
    pub(super) async fn understands(&self, id: MigrationId) -> Result<bool, StoreError> {
        let why = match self.read_through(id).await {
            Ok(Ok(()) | Err(JournalError::Illegal(_))) => return Ok(true),
            Ok(Err(error)) => error.to_string(),
            Err(error @ StoreError::Newer { .. }) => error.to_string(),
            Err(error) => return Err(error),
        };
        self.leave_alone(id, &why);
        Ok(false)
    }

    async fn read_through(&self, id: MigrationId) -> Result<Result<(), JournalError>, StoreError> {
        let migration = self.context.store.migration(id).await?;
        let events = self.context.store.saga_events(&key_of(&migration)).await?;
        Ok(match (migration.ending, &migration.way) {
            (Some(Ending::Confirm), _) => replay::<Confirm>(&events).map(drop),
            (Some(Ending::Revert), _) => replay::<Revert>(&events).map(drop),
            (None, Way::Live(_)) => replay::<LiveMigrate>(&events).map(drop),
            (None, Way::Cold(_)) => replay::<ColdMigrate>(&events).map(drop),
            (None, Way::Transfer(_)) => replay::<Transfer>(&events).map(drop),
            (None, Way::Evacuation(_)) => replay::<Evacuate>(&events).map(drop),
        })
    }

    fn leave_alone(&self, id: MigrationId, why: &str) {
        self.context.left_alone.note(name_of(id), why);
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
        let (store, term) = (&self.context.store, self.term().recorded);
        let driven = self.driven.leases();
        let undriven = store.undriven(&self.owner, &driven, term).await?;
        let resting = store.newer_resting().await?;
        for (id, why) in &resting {
            self.leave_alone(*id, why);
        }
        let undriven_ids = undriven.iter().map(|lease| lease.migration);
        let ids = undriven_ids.chain(resting.into_iter().map(|(id, _)| id));
        let names: Vec<String> = ids.map(name_of).collect();
        self.context.left_alone.keep(KIND, &names);
        for seen in undriven {
            if let Err(error) = self.take_up_one(seen).await {
                warn!(
                    migration = %seen.migration, error = %Chain(&error),
                    "could not be taken up; tried again soon"
                );
            }
        }
        Ok(())
    }

    async fn take_up_one(&self, seen: Lease) -> Result<(), StoreError> {
        let (store, term) = (&self.context.store, self.term());
        if !self.understands(seen.migration).await? {
            return Ok(());
        }
        let taken = store.take_over(seen, &self.owner, term.recorded).await?;
        let Some(lease) = taken else {
            return Ok(());
        };
        let attempted = store
            .update_driven(lease, |m| {
                m.attempt += 1;
                self.owner.as_ref().clone_into(&mut m.owner);
                true
            })
            .await?;
        info!(
            migration = attempted.id, attempt = attempted.attempt, status = %attempted.status,
            "takes up an unfinished migration"
        );
        self.spawn(lease, term);
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
            if let Err(error) = self.resume(id).await {
                // It is on the record; the next pass takes it up.
                warn!(migration = migration.id, error = %Chain(&error), "begun a little later");
            }
        }
        Ok(fits.then_some(migration))
    }

    /// Asks for an abort. Valid in every state before the switch-over; asked
    /// twice it is one abort.
    ///
    /// # Errors
    /// The record cannot be read or written.
    pub async fn abort(&self, id: MigrationId) -> Result<Aborting, StoreError> {
        self.abort_at(id, false).await
    }

    /// The same by a person's word, who may have a guest back that its dead destination
    /// may have run.
    ///
    /// # Errors
    /// The record cannot be read or written.
    pub async fn abort_by_word(&self, id: MigrationId) -> Result<Aborting, StoreError> {
        let m = self.context.store.migration(id).await?;
        let dest_is_off = match &m.dest_host {
            Some(dest) if m.may_be_lost_with_dest() => self.is_off(dest).await?,
            _ => false,
        };
        self.abort_at(id, dest_is_off).await
    }

    async fn abort_at(&self, id: MigrationId, dest_is_off: bool) -> Result<Aborting, StoreError> {
        let (mut too_late, mut before) = (false, false);
        let change = |m: &mut Migration| {
            let gives_up = dest_is_off && m.may_be_lost_with_dest();
            too_late = m.status.is_final() || (m.past_return() && !gives_up);
            before = m.abort_requested && m.given_up >= gives_up;
            m.abort_requested |= !too_late;
            m.given_up |= gives_up && !too_late;
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
        let (store, term) = (&self.context.store, self.term());
        if !self.understands(id).await? {
            return Err(StoreError::Newer {
                what: format!("migration {id}"),
                message: "its saga has what is not known here".to_owned(),
            });
        }
        let lease = store.adopt_one(id, &self.owner, term.recorded).await?;
        self.spawn(lease, term);
        Ok(())
    }

    /// Renews leases, until told to stop.
    pub async fn keep_leases(&self, stop: CancellationToken) {
        let mut pause = self.renewal_pause();
        while goes_on_after(pause, &stop).await {
            let renewed = timeout(self.renewal_pause(), self.renew()).await;
            pause = self.renewal_pause();
            if let Err(why) = in_time(renewed) {
                warn!(why, "leases could not be renewed; tried again at once");
                pause = Duration::from_secs(1).min(pause);
            }
        }
    }

    async fn renew(&self) -> Result<(), StoreError> {
        for driven in [&self.driven, &self.tidied] {
            let (asked, term) = (driven.leases(), self.term());
            let renewal = self
                .context
                .store
                .renew_leases(&self.owner, &asked, term.recorded);
            driven.renewed(&asked, &renewal.await?, term);
        }
        Ok(())
    }

    /// The pass, until told to stop.
    pub async fn keep(&self, stop: CancellationToken) {
        while goes_on_after(PASS, &stop).await {
            let forgotten_before_ms = self.context.clock.now_ms().saturating_sub(REQUESTS_KEPT_MS);
            let done = [
                self.take_up().await,
                self.resume_rested().await,
                self.confirm_overdue().await,
                self.context.store.prune_requests(forgotten_before_ms).await,
            ];
            for error in done.iter().filter_map(|done| done.as_ref().err()) {
                warn!(error = %Chain(error), "the record could not be looked after; tried again soon");
            }
        }
    }

    async fn resume_rested(&self) -> Result<(), StoreError> {
        let (store, now_ms) = (&self.context.store, self.context.clock.now_ms());
        let stuck = store.stuck_migrations(&self.owner, self.term().recorded);
        let stuck = stuck.await?;
        let seen_ms = self
            .stuck
            .look(stuck.iter().map(|(_, m)| (m.uuid, m.version)));
        for ((seen, m), seen_ms) in stuck.into_iter().zip(seen_ms) {
            // A clock that was set back keeps nothing from being tried.
            let rest_ms = now_ms.saturating_sub(m.updated_at_ms).max(seen_ms);
            let rested = rest_ms >= STUCK_REST_MS;
            // One that was resumed and has not said so yet is driven already.
            if self.driven.leases().contains(&seen) || !rested || !self.both_up(&m).await? {
                continue;
            }
            let term = self.term();
            if self.understands(seen.migration).await?
                && let Some(lease) = store.take_over(seen, &self.owner, term.recorded).await?
            {
                self.spawn(lease, term);
            }
        }
        Ok(())
    }

    /// Confirms what was not confirmed within the window, if there is one. The way back
    /// is gone then, so no clock that may jump is asked: this process has seen it wait
    /// for all of the window. A restart makes that longer.
    async fn confirm_overdue(&self) -> Result<(), StoreError> {
        if self.context.confirm_window_ms == 0 {
            return Ok(());
        }
        let finished = self.context.store.finished_migrations().await?;
        let seen_ms = finished.iter().map(|m| (m.uuid, m.ending_attempt));
        let seen_ms = self.unconfirmed.look(seen_ms);
        for (m, seen_ms) in finished.into_iter().zip(seen_ms) {
            if seen_ms < self.context.confirm_window_ms {
                continue;
            }
            info!(migration = m.id, "nobody reverted it in time");
            if let Err(error) = self.end_with(m.uuid, Ending::Confirm).await {
                warn!(migration = m.id, error = %Chain(&error), "confirmed a little later");
            }
        }
        Ok(())
    }

    async fn both_up(&self, m: &Migration) -> Result<bool, StoreError> {
        let is_source_off = match m.way {
            // Of an evacuation the source is dead.
            Way::Evacuation(_) => true,
            Way::Live(_) | Way::Cold(_) => self.is_off(&m.source_host).await?,
            Way::Transfer(_) => false,
        };
        if !is_source_off && !self.is_up(&m.source_host).await? {
            return Ok(false);
        }
        let Some(dest) = &m.dest_host else {
            return Ok(true);
        };
        // Of a guest that it may have run people have to say what becomes of it.
        let waits_for_word = m.may_be_lost_with_dest() && !m.given_up;
        let may_be_off = !matches!(m.way, Way::Transfer(_)) && !waits_for_word;
        Ok(self.is_up(dest).await? || (may_be_off && self.is_off(dest).await?))
    }

    /// Whether a node is proven dead, which stands for its answer.
    async fn is_off(&self, host: &HostName) -> Result<bool, StoreError> {
        Ok(proven_dead(&self.context, host).await?.is_some())
    }

    /// Whether a node can be asked to do something.
    pub(super) async fn is_up(&self, host: &HostName) -> Result<bool, StoreError> {
        let live = self.context.liveness();
        let node = self.context.store.known_node(host).await?;
        Ok(node.is_some_and(|node| live.is_up(&node) && hypervisor_is_up(&node)))
    }
}

/// What is left alone here is called so.
const KIND: &str = "migration ";

fn name_of(id: MigrationId) -> String {
    format!("{KIND}{id}")
}

/// The saga that a migration is in, or was in last.
pub(super) fn key_of(m: &Migration) -> SagaKey {
    match m.ending {
        None => SagaKey::of_move(m.uuid),
        Some(_) => SagaKey::of_ending(m.uuid, m.ending_attempt),
    }
}

/// Why something was not done, or not in time.
pub(crate) fn in_time(
    done: Result<Result<(), StoreError>, tokio::time::error::Elapsed>,
) -> Result<(), String> {
    match done {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(Chain(&error).to_string()),
        Err(_) => Err("the database does not answer".to_owned()),
    }
}

/// What a panic said.
fn text(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("it panicked")
}

fn tell(migration: MigrationId, outcome: &Outcome) {
    match outcome {
        Outcome::Completed => info!(%migration, "completed"),
        Outcome::RolledBack(error) => info!(%migration, %error, "rolled back"),
    }
}

#[cfg(test)]
#[path = "runner_tests.rs"]
mod tests;

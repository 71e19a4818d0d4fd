//! Journals of sagas, each event committed together with what it changes on
//! the migration's record and the notification that tells of it.

use drover_model::{
    ids::MigrationId,
    migration::{IllegalTransition, Migration},
};
use drover_saga::{Event, JournalError};
use sqlx::{Any, Row};

use crate::{
    Result, Store, StoreError, Term, Tries, from_json, migrations,
    migrations::Lease,
    outbox::{self, Notification},
    signed, to_json,
};

/// Which of a migration's sagas: its move, or what ends it afterwards.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SagaKey(String);

impl SagaKey {
    /// The move itself.
    pub fn of_move(migration: MigrationId) -> Self {
        Self(migration.to_string())
    }

    /// The nth try of what ends it.
    pub fn of_ending(migration: MigrationId, attempt: u32) -> Self {
        Self(format!("{migration}.{attempt}"))
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

/// Nothing is put off for longer, ms: what is due later was put off before a clock
/// was set back, and is due now.
const LONGEST_PUT_OFF_MS: u64 = 7_200_000;

/// A step of tidying that was put off.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PutOff {
    /// The lease of its migration as it was seen.
    pub lease: Lease,
    /// Which step.
    pub step: String,
    /// How often it was tried again.
    pub attempts: u32,
}

impl Store {
    /// All events of a saga, in order.
    ///
    /// # Errors
    /// The database failed or holds what cannot be read.
    pub async fn saga_events(&self, saga: &SagaKey) -> Result<Vec<Event>> {
        let query = sqlx::query("SELECT event FROM saga_events WHERE saga_uuid = $1 ORDER BY seq")
            .bind(&saga.0);
        let rows = self.steady(query.fetch_all(&self.database)).await?;
        rows.iter()
            .map(|row| from_json("a saga", row.try_get("event")?))
            .collect()
    }

    /// Appends events behind the `at` that are there, and with them what
    /// `project` makes of the record and wants told, and what is to be tidied later.
    ///
    /// # Errors
    /// [`JournalError::Fenced`] if the lease is no longer the newest.
    pub async fn append_saga_events(
        &self,
        (lease, saga): (Lease, &SagaKey),
        at: usize,
        events: &[Event],
        now_ms: u64,
        mut project: impl FnMut(
            &mut Migration,
        ) -> std::result::Result<Vec<Notification>, IllegalTransition>
        + Send,
    ) -> std::result::Result<Migration, JournalError> {
        let mut tries = Tries::default();
        loop {
            let tried = self
                .steady(self.try_append((lease, saga), at, events, now_ms, &mut project))
                .await;
            let error = match tried {
                Ok(migration) => {
                    self.changed(lease.migration);
                    return Ok(migration);
                }
                Err(error @ StoreError::Illegal(_)) => {
                    return Err(JournalError::Illegal(error.to_string()));
                }
                Err(error) => error,
            };
            tries.again(error).await.map_err(|e| unavailable(&e))?;
            // Somebody wrote the record in between (an abort, say), or took the
            // saga over: the epoch tells.
            let epoch = self.steady(self.epoch(lease)).await;
            if epoch.map_err(|e| unavailable(&e))? != lease.epoch {
                return Err(JournalError::Fenced);
            }
        }
    }

    async fn try_append(
        &self,
        (lease, saga): (Lease, &SagaKey),
        at: usize,
        events: &[Event],
        now_ms: u64,
        project: &mut (
                 impl FnMut(&mut Migration) -> std::result::Result<Vec<Notification>, IllegalTransition>
                 + Send
             ),
    ) -> Result<Migration> {
        let mut tx = self.begin().await?;
        let before = migrations::load(&mut tx, lease.migration).await?;
        let mut after = before.clone();
        let told = project(&mut after).map_err(|e| StoreError::Illegal(e.to_string()))?;
        migrations::write(&mut tx, &before, &mut after, Some(lease.epoch)).await?;
        for (i, event) in events.iter().enumerate() {
            sqlx::query(
                "INSERT INTO saga_events (saga_uuid, seq, epoch, at_ms, event) \
                 VALUES ($1, $2, $3, $4, $5)",
            )
            .bind(&saga.0)
            .bind(signed((at + i) as u64))
            .bind(lease.epoch)
            .bind(signed(now_ms))
            .bind(to_json("a saga's event", event)?)
            .execute(&mut *tx)
            .await?;
            if let Event::PutOff { step, .. } = event {
                put_off(&mut *tx, lease.migration, step, now_ms).await?;
            }
        }
        for notification in &told {
            outbox::put(&mut tx, notification).await?;
        }
        tx.commit().await?;
        Ok(after)
    }

    async fn epoch(&self, lease: Lease) -> Result<i64> {
        let row = sqlx::query("SELECT epoch FROM migrations WHERE uuid = $1")
            .bind(lease.migration.to_string())
            .fetch_one(&self.database)
            .await?;
        Ok(row.try_get("epoch")?)
    }

    /// Remembers undoing that was put off, before the journal says that it is undone.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] if somebody else has the migration by now, or the
    /// database failed.
    pub async fn put_off(&self, lease: Lease, step: &str, now_ms: u64) -> Result<()> {
        let work = || async {
            let mut tx = self.begin_under(lease).await?;
            put_off(&mut *tx, lease.migration, step, now_ms).await?;
            tx.commit().await?;
            Ok(())
        };
        self.attempt(work).await
    }

    /// Tidying that was put off, is due, and is of a migration that rests and that this
    /// owner may have: its own, or one whose lease has run out. Longest due first; not
    /// more than `limit`.
    ///
    /// # Errors
    /// The database failed.
    pub async fn put_off_steps(&self, owner: &str, term: Term, limit: u32) -> Result<Vec<PutOff>> {
        let lease_now_ms = self.steady(self.lease_clock_ms(term)).await?;
        let query = sqlx::query(
            "SELECT c.migration_uuid, c.step, c.attempts, m.epoch FROM cleanups c \
             JOIN migrations m ON m.uuid = c.migration_uuid \
             WHERE (c.due_at_ms <= $2 OR c.due_at_ms > $5) AND (m.active = 0 OR m.status = 'finished') \
             AND (m.owner = $1 OR m.lease_until_ms < $3) \
             ORDER BY c.due_at_ms, c.at_ms, c.migration_uuid, c.step LIMIT $4",
        )
        .bind(owner)
        .bind(signed(term.now_ms))
        .bind(signed(lease_now_ms))
        .bind(i64::from(limit))
        .bind(signed(term.now_ms.saturating_add(LONGEST_PUT_OFF_MS)));
        let rows = self.steady(query.fetch_all(&self.database)).await?;
        let step = |row: &sqlx::any::AnyRow| {
            let uuid: String = row.try_get("migration_uuid")?;
            Ok(PutOff {
                lease: Lease {
                    migration: uuid.parse().map_err(|e| crate::corrupt("a clean-up", &e))?,
                    epoch: row.try_get("epoch")?,
                },
                step: row.try_get("step")?,
                attempts: u32::try_from(row.try_get::<i64, _>("attempts")?).unwrap_or(u32::MAX),
            })
        };
        rows.iter().map(step).collect()
    }

    /// Tidying is not to be tried before a moment; `failed` if it was.
    ///
    /// # Errors
    /// The database failed.
    pub async fn put_off_again(
        &self,
        migration: MigrationId,
        step: &str,
        (due_at_ms, failed): (u64, bool),
    ) -> Result<()> {
        self.execute(|| {
            sqlx::query(
                "UPDATE cleanups SET due_at_ms = $3, attempts = attempts + $4 \
                 WHERE migration_uuid = $1 AND step = $2",
            )
            .bind(migration.to_string())
            .bind(step.to_owned())
            .bind(signed(due_at_ms))
            .bind(i64::from(failed))
        })
        .await?;
        Ok(())
    }

    /// Forgets tidying that is done, and says so on the migration's record, in one
    /// commit.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] if somebody else has the migration by now, or the
    /// database failed.
    pub async fn tidied(&self, lease: Lease, step: &str, said: &str) -> Result<()> {
        let work = || async {
            let mut tx = self.begin_under(lease).await?;
            sqlx::query("DELETE FROM cleanups WHERE migration_uuid = $1 AND step = $2")
                .bind(lease.migration.to_string())
                .bind(step)
                .execute(&mut *tx)
                .await?;
            let before = migrations::load(&mut tx, lease.migration).await?;
            let mut after = before.clone();
            after.warnings.push(said.to_owned());
            migrations::write(&mut tx, &before, &mut after, Some(lease.epoch)).await?;
            tx.commit().await?;
            Ok(())
        };
        self.attempt(work).await?;
        self.changed(lease.migration);
        Ok(())
    }
}

async fn put_off(
    database: impl sqlx::Executor<'_, Database = Any>,
    migration: MigrationId,
    step: &str,
    now_ms: u64,
) -> Result<()> {
    sqlx::query(
        "INSERT INTO cleanups (migration_uuid, step, at_ms) VALUES ($1, $2, $3) \
         ON CONFLICT (migration_uuid, step) DO NOTHING",
    )
    .bind(migration.to_string())
    .bind(step.to_owned())
    .bind(signed(now_ms))
    .execute(database)
    .await?;
    Ok(())
}

fn unavailable(error: &StoreError) -> JournalError {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    JournalError::Unavailable(text)
}

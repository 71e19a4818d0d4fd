//! Migrations: their records, who drives them, and requests already carried out.

use drover_model::{
    api::{
        compute::Outcome,
        conductor::{ListMigrations, Offer, OfferState},
    },
    ids::{InstanceId, MigrationId},
    migration::{Migration, Way},
};
use serde_json::Value;
use sqlx::{Any, Row, any::AnyRow};

use crate::{
    Numbered, Result, Store, StoreError, Term, Tries, as_kept, corrupt,
    database::Tx,
    from_json,
    instances::{self, InstanceRow, shown},
    named, newer, next_number, offers, readable, signed, to_json, unsigned,
};

/// What came of asking for a migration to be put on the record.
#[derive(Debug, Clone, PartialEq)]
pub enum Admitted {
    /// It is there, with its id.
    New(Box<Migration>),
    /// This request was carried out before; that is its record.
    Repeated(Box<Migration>),
    /// The instance is under another migration.
    Busy(Box<Migration>),
    /// The offer that it comes of can no longer be accepted.
    OfferTaken(Box<Offer>),
    /// The instance is no longer as it was seen: elsewhere, another project's, of
    /// another generation; or gone.
    Changed(Option<Box<InstanceRow>>),
}

/// Who drives a migration's saga. Every write of the saga names it; a write
/// that names an older epoch is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease {
    /// Which migration.
    pub migration: MigrationId,
    /// How often it changed hands.
    pub epoch: i64,
}

impl Store {
    /// Puts a new migration on the record, with the request that asked for it
    /// and the offer it accepts, in one commit (invariants 4 and 5). Its `id` and
    /// `version` are given here. `seen` is the instance as it was when the
    /// migration was found possible: it must still be so.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if there is no such offer, or the database failed.
    pub async fn admit(
        &self,
        new: &Migration,
        seen: Option<&InstanceRow>,
        unique_id: Option<&str>,
        term: Term,
    ) -> Result<Admitted> {
        let admitted = self
            .attempt(|| self.try_admit(new, seen, unique_id, term))
            .await?;
        if let Admitted::New(m) = &admitted {
            self.changed(m.uuid);
        }
        Ok(admitted)
    }

    async fn try_admit(
        &self,
        new: &Migration,
        seen: Option<&InstanceRow>,
        unique_id: Option<&str>,
        term: Term,
    ) -> Result<Admitted> {
        let lease_until_ms = self.lease_clock_ms(term).await? + term.lease_ms;
        let mut tx = self.begin().await?;
        if let Some(unique_id) = unique_id
            && let Some(made) = requested(&mut *tx, unique_id).await?
        {
            return Ok(Admitted::Repeated(Box::new(made)));
        }
        if let Some(seen) = seen {
            let now = instances::lock(&mut tx, seen.id).await?;
            if !now.as_ref().is_some_and(|now| now.is_where_it_was(seen)) {
                // One that is under way is busy, wherever it is.
                return Ok(match active(&mut *tx, new.instance_uuid).await? {
                    Some(active) => Admitted::Busy(Box::new(active)),
                    None => Admitted::Changed(now.map(Box::new)),
                });
            }
        }
        let accepted = new.consent.as_ref().and_then(|consent| consent.offer);
        let accepted = accepted.filter(|_| !new.status.is_final());
        if let Some(offer) = accepted {
            let offer = offers::lock(&mut tx, offer, new.created_at_ms).await?;
            if offer.state != OfferState::Open {
                return Ok(Admitted::OfferTaken(Box::new(offer)));
            }
        }
        if !new.status.is_final()
            && let Some(active) = active(&mut *tx, new.instance_uuid).await?
        {
            return Ok(Admitted::Busy(Box::new(active)));
        }
        let mut migration = new.clone();
        migration.id = next_number(&mut tx, Numbered::Migrations).await?;
        migration.version = 1;
        insert(&mut tx, &migration, lease_until_ms).await?;
        if let Some(offer) = accepted {
            offers::take(&mut tx, offer, migration.uuid).await?;
        }
        let made = (migration.uuid.0, migration.created_at_ms);
        remember_request(&mut tx, unique_id, made).await?;
        tx.commit().await?;
        Ok(Admitted::New(Box::new(migration)))
    }

    /// The unfinished migration of an instance, if there is one.
    ///
    /// # Errors
    /// The database failed.
    pub async fn active_migration(&self, instance: InstanceId) -> Result<Option<Migration>> {
        self.steady(active(&self.database, instance)).await
    }

    /// What a request with that unique id made, if it was carried out.
    ///
    /// # Errors
    /// The database failed.
    pub async fn requested(&self, unique_id: &str) -> Result<Option<Migration>> {
        self.steady(requested(&self.database, unique_id)).await
    }

    /// The migration of an integer id, a UUID, or a unique prefix of one.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Ambiguous`], or the database failed.
    pub async fn find_migration(&self, reference: &str) -> Result<Migration> {
        record(&self.found(reference).await?)
    }

    /// The same as it is kept, whoever understands it.
    ///
    /// # Errors
    /// As [`Self::find_migration`].
    pub async fn migration_as_kept(&self, reference: &str) -> Result<Value> {
        as_kept(&self.found(reference).await?)
    }

    async fn found(&self, reference: &str) -> Result<AnyRow> {
        let number = reference.parse::<i64>().ok();
        let pattern = uuid_pattern(reference);
        let query = sqlx::query(
            "SELECT id, version, record FROM migrations WHERE id = $1 OR uuid LIKE $2 \
             ORDER BY CASE WHEN id = $1 THEN 0 ELSE 1 END LIMIT 2",
        )
        .bind(number.unwrap_or(-1))
        .bind(pattern.unwrap_or_default());
        let rows = self.steady(query.fetch_all(&self.database)).await?;
        let number = |row: &AnyRow| row.try_get("id").unwrap_or(-1);
        the_one("migration", reference, rows, number)
    }

    /// A migration by its id.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], or the database failed.
    pub async fn migration(&self, id: MigrationId) -> Result<Migration> {
        let query = sqlx::query("SELECT version, record FROM migrations WHERE uuid = $1")
            .bind(id.to_string());
        let row = self.steady(query.fetch_optional(&self.database)).await?;
        record(&row.ok_or_else(|| StoreError::NotFound(format!("migration {id}")))?)
    }

    /// Migrations, newest first, but for those that cannot be read. `instance` must
    /// be a resolved UUID.
    ///
    /// # Errors
    /// The database failed.
    pub async fn migrations(
        &self,
        filter: &ListMigrations,
        instance: Option<InstanceId>,
    ) -> Result<Vec<Migration>> {
        Ok(readable(&self.listed(filter, instance).await?, record))
    }

    /// The same as they are kept: also what a newer Drover wrote, for whoever
    /// understands it.
    ///
    /// # Errors
    /// The database failed.
    pub async fn migrations_as_kept(
        &self,
        filter: &ListMigrations,
        instance: Option<InstanceId>,
    ) -> Result<Vec<Value>> {
        Ok(readable(&self.listed(filter, instance).await?, as_kept))
    }

    async fn listed(
        &self,
        filter: &ListMigrations,
        instance: Option<InstanceId>,
    ) -> Result<Vec<AnyRow>> {
        let query = sqlx::query(
            "SELECT version, record FROM migrations \
             WHERE (CAST($1 AS TEXT) IS NULL OR instance_uuid = $1) \
             AND (CAST($2 AS TEXT) IS NULL OR source_host = $2 OR dest_host = $2) \
             AND ($3 = 0 OR active = 1) ORDER BY id DESC LIMIT $4",
        )
        .bind(instance.map(|id| id.to_string()))
        .bind(filter.host.as_ref().map(|h| h.as_str()))
        .bind(i64::from(filter.active))
        .bind(i64::from(filter.limit.unwrap_or(100).clamp(1, 1000)));
        Ok(self.steady(query.fetch_all(&self.database)).await?)
    }

    /// Migrations that moved a guest, newest first.
    ///
    /// # Errors
    /// The database failed.
    pub async fn newest_moves(&self, limit: u32) -> Result<Vec<Migration>> {
        let query = sqlx::query(
            "SELECT version, record FROM migrations \
             WHERE status IN ('completed', 'finished', 'confirmed') \
             AND migration_type <> 'project-transfer' ORDER BY id DESC LIMIT $1",
        )
        .bind(i64::from(limit));
        let rows = self.steady(query.fetch_all(&self.database)).await?;
        Ok(readable(&rows, record))
    }

    /// Changes a migration's record in one commit. `change` says whether there
    /// is anything to write; it may be called again if somebody else was faster.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Illegal`] for a status that
    /// cannot follow, or the database failed.
    pub async fn update_migration(
        &self,
        id: MigrationId,
        change: impl FnMut(&mut Migration) -> bool + Send,
    ) -> Result<Migration> {
        self.update(id, None, change).await
    }

    /// The same by whoever drives it.
    ///
    /// # Errors
    /// The same, and [`StoreError::Fenced`] for a lease that is no longer the newest.
    pub async fn update_driven(
        &self,
        lease: Lease,
        change: impl FnMut(&mut Migration) -> bool + Send,
    ) -> Result<Migration> {
        self.update(lease.migration, Some(lease), change).await
    }

    async fn update(
        &self,
        id: MigrationId,
        by: Option<Lease>,
        mut change: impl FnMut(&mut Migration) -> bool + Send,
    ) -> Result<Migration> {
        let mut tries = Tries::default();
        loop {
            match self.steady(self.try_update(id, by, &mut change)).await {
                Ok(updated) => return Ok(updated),
                Err(error) => tries.again(error).await?,
            }
        }
    }

    async fn try_update(
        &self,
        id: MigrationId,
        by: Option<Lease>,
        change: &mut (impl FnMut(&mut Migration) -> bool + Send),
    ) -> Result<Migration> {
        let mut tx = self.begin().await?;
        if let Some(lease) = by {
            fence(&mut tx, lease).await?;
        }
        let before = load(&mut tx, id).await?;
        let mut after = before.clone();
        if !change(&mut after) {
            return Ok(before);
        }
        write(&mut tx, &before, &mut after, by.map(|lease| lease.epoch)).await?;
        tx.commit().await?;
        self.changed(id);
        Ok(after)
    }

    /// Keeps an agent's word on how the transfer of a migration ended.
    ///
    /// # Errors
    /// The database failed.
    pub async fn set_outcome(&self, id: MigrationId, outcome: &Outcome) -> Result<()> {
        let text = to_json("an outcome", outcome)?;
        self.execute(|| {
            sqlx::query("UPDATE migrations SET outcome = $2 WHERE uuid = $1 AND active = 1")
                .bind(id.to_string())
                .bind(text.clone())
        })
        .await?;
        self.changed(id);
        Ok(())
    }

    /// An agent's word on how the transfer of a migration ended, once it came.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], or the database failed.
    pub async fn outcome(&self, id: MigrationId) -> Result<Option<Outcome>> {
        let query =
            sqlx::query("SELECT outcome FROM migrations WHERE uuid = $1").bind(id.to_string());
        let row = self.steady(query.fetch_optional(&self.database)).await?;
        let row = row.ok_or_else(|| StoreError::NotFound(format!("migration {id}")))?;
        let text: Option<String> = row.try_get("outcome")?;
        text.map(|t| from_json("an outcome", &t)).transpose()
    }

    /// The lease of a migration that this process has just admitted.
    pub fn first_lease(migration: MigrationId) -> Lease {
        Lease {
            migration,
            epoch: 1,
        }
    }

    /// Unfinished migrations that want a driver and have none: this owner's own that
    /// are not among those it drives, and those of owners whose lease has run out.
    /// What is *finished* or *stuck* waits for somebody's word, not for a driver.
    ///
    /// # Errors
    /// The database failed.
    pub async fn undriven(&self, owner: &str, driven: &[Lease], term: Term) -> Result<Vec<Lease>> {
        let now_ms = self.steady(self.lease_clock_ms(term)).await?;
        let query = sqlx::query(
            "SELECT uuid, epoch FROM migrations \
             WHERE active = 1 AND status NOT IN ('finished', 'stuck') \
             AND (owner = $1 OR lease_until_ms < $2) ORDER BY id",
        )
        .bind(owner)
        .bind(signed(now_ms));
        let rows = self.steady(query.fetch_all(&self.database)).await?;
        let mut leases = rows.iter().map(lease).collect::<Result<Vec<_>>>()?;
        leases.retain(|lease| !driven.contains(lease));
        Ok(leases)
    }

    /// Stuck migrations that this owner may try again: its own, and those of owners
    /// whose lease has run out. One that cannot be read is left out, and said.
    ///
    /// # Errors
    /// The database failed.
    pub async fn stuck_migrations(
        &self,
        owner: &str,
        term: Term,
    ) -> Result<Vec<(Lease, Migration)>> {
        let now_ms = self.steady(self.lease_clock_ms(term)).await?;
        let query = sqlx::query(
            "SELECT uuid, epoch, version, record FROM migrations \
             WHERE active = 1 AND status = 'stuck' \
             AND (owner = $1 OR lease_until_ms < $2) ORDER BY id",
        )
        .bind(owner)
        .bind(signed(now_ms));
        let rows = self.steady(query.fetch_all(&self.database)).await?;
        Ok(readable(&rows, |row| Ok((lease(row)?, record(row)?))))
    }

    /// Cold migrations that wait to be confirmed or reverted, oldest first. One that
    /// cannot be read is left out, and said.
    ///
    /// # Errors
    /// The database failed.
    pub async fn finished_migrations(&self) -> Result<Vec<Migration>> {
        let query = sqlx::query(
            "SELECT version, record FROM migrations \
             WHERE active = 1 AND status = 'finished' ORDER BY id",
        );
        let rows = self.steady(query.fetch_all(&self.database)).await?;
        Ok(readable(&rows, record))
    }

    /// Migrations that wait for somebody's word and cannot be read here, each with
    /// what of it is not understood.
    ///
    /// # Errors
    /// The database failed.
    pub async fn newer_resting(&self) -> Result<Vec<(MigrationId, String)>> {
        let query = sqlx::query(
            "SELECT uuid, epoch, version, record FROM migrations \
             WHERE active = 1 AND status IN ('finished', 'stuck') ORDER BY id",
        );
        let rows = self.steady(query.fetch_all(&self.database)).await?;
        let newer = rows.iter().filter_map(|row| match record(row) {
            Err(error @ StoreError::Newer { .. }) => {
                Some(lease(row).map(|lease| (lease.migration, error.to_string())))
            }
            _ => None,
        });
        newer.collect()
    }

    /// Takes a lease as it was seen, with a new epoch that shuts out whoever had it;
    /// none if somebody was faster.
    ///
    /// # Errors
    /// The database failed.
    pub async fn take_over(&self, seen: Lease, owner: &str, term: Term) -> Result<Option<Lease>> {
        let now_ms = self.steady(self.lease_clock_ms(term)).await?;
        let statement = || {
            sqlx::query(
                "UPDATE migrations SET owner = $3, epoch = epoch + 1, lease_until_ms = $4 \
                 WHERE uuid = $1 AND epoch = $2 RETURNING uuid, epoch",
            )
            .bind(seen.migration.to_string())
            .bind(seen.epoch)
            .bind(owner.to_owned())
            .bind(signed(now_ms + term.lease_ms))
        };
        let rows = self.returned(statement).await?;
        rows.first().map(lease).transpose()
    }

    /// Takes up one unfinished migration, whoever had it.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if it is not unfinished, or the database failed.
    pub async fn adopt_one(&self, id: MigrationId, owner: &str, term: Term) -> Result<Lease> {
        let now_ms = self.steady(self.lease_clock_ms(term)).await?;
        let statement = || {
            sqlx::query(
                "UPDATE migrations SET owner = $2, epoch = epoch + 1, lease_until_ms = $3 \
                 WHERE uuid = $1 AND active = 1 RETURNING epoch",
            )
            .bind(id.to_string())
            .bind(owner.to_owned())
            .bind(signed(now_ms + term.lease_ms))
        };
        let rows = self.returned(statement).await?;
        let unfinished = || StoreError::NotFound(format!("unfinished migration {id}"));
        Ok(Lease {
            migration: id,
            epoch: rows.first().ok_or_else(unfinished)?.try_get("epoch")?,
        })
    }

    /// Forgets unique ids of requests older than a moment.
    ///
    /// # Errors
    /// The database failed.
    pub async fn prune_requests(&self, before_ms: u64) -> Result<()> {
        let statement = "DELETE FROM requests WHERE at_ms < $1";
        self.execute(|| sqlx::query(statement).bind(signed(before_ms)))
            .await?;
        Ok(())
    }

    /// Puts off the end of leases that an owner holds, and gives those that it does
    /// hold: one that was taken over is not among them.
    ///
    /// # Errors
    /// The database failed; some may be renewed.
    pub async fn renew_leases(
        &self,
        owner: &str,
        held: &[Lease],
        term: Term,
    ) -> Result<Vec<Lease>> {
        let renewed = self.renew_by_id(
            "UPDATE migrations SET lease_until_ms = $2 WHERE owner = $1 AND uuid IN \
             ($3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18) \
             RETURNING uuid, epoch",
            (owner, term),
            held.iter().map(|lease| lease.migration.to_string()),
        );
        let mut renewed = renewed
            .await?
            .iter()
            .map(lease)
            .collect::<Result<Vec<_>>>()?;
        renewed.retain(|lease| held.contains(lease));
        Ok(renewed)
    }

    /// Renews by statements for [`RENEWED_AT_ONCE`] ids each, which are the
    /// parameters from the third on.
    pub(crate) async fn renew_by_id(
        &self,
        sql: &'static str,
        (owner, term): (&str, Term),
        ids: impl Iterator<Item = String>,
    ) -> Result<Vec<AnyRow>> {
        let now_ms = self.steady(self.lease_clock_ms(term)).await?;
        let until_ms = signed(now_ms + term.lease_ms);
        let ids: Vec<String> = ids.collect();
        let mut rows = Vec::new();
        for chunk in ids.chunks(RENEWED_AT_ONCE) {
            let statement = || {
                let query = sqlx::query(sql).bind(owner.to_owned()).bind(until_ms);
                (0..RENEWED_AT_ONCE).fold(query, |query, n| {
                    query.bind(chunk.get(n).cloned().unwrap_or_default())
                })
            };
            rows.extend(self.returned(statement).await?);
        }
        Ok(rows)
    }
}

/// Leases that are renewed by one statement.
const RENEWED_AT_ONCE: usize = 16;

fn lease(row: &AnyRow) -> Result<Lease> {
    let uuid: String = row.try_get("uuid")?;
    Ok(Lease {
        migration: uuid.parse().map_err(|e| corrupt("a migration", &e))?,
        epoch: row.try_get("epoch")?,
    })
}

async fn insert(tx: &mut Tx, m: &Migration, lease_until_ms: u64) -> Result<()> {
    sqlx::query(
        "INSERT INTO migrations (uuid, id, instance_uuid, status, active, source_host, dest_host, \
         owner, epoch, lease_until_ms, version, record, migration_type, operation_uuid, old_copy, \
         ended_at_ms) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, 1, $9, $10, $11, $12, $13, $14, $15)",
    )
    .bind(m.uuid.to_string())
    .bind(m.id)
    .bind(m.instance_uuid.to_string())
    .bind(m.status.as_str())
    .bind(i64::from(!m.status.is_final()))
    .bind(m.source_host.as_str())
    .bind(m.dest_host.as_ref().map(|h| h.as_str()))
    .bind(&m.owner)
    .bind(signed(lease_until_ms))
    .bind(signed(m.version))
    .bind(to_json("a migration", m)?)
    .bind(m.way.migration_type().to_string())
    .bind(m.operation.map(|id| id.to_string()))
    .bind(i64::from(matches!(m.way, Way::Evacuation(_))))
    .bind(ended_at_ms(m))
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// Refuses whoever drives by a lease that is not the newest. What is written in the
/// same transaction is written by nobody else: the row is locked by it.
///
/// # Errors
/// [`StoreError::Fenced`], or the database failed.
pub(crate) async fn fence(tx: &mut Tx, lease: Lease) -> Result<()> {
    let held = sqlx::query("UPDATE migrations SET epoch = epoch WHERE uuid = $1 AND epoch = $2")
        .bind(lease.migration.to_string())
        .bind(lease.epoch)
        .execute(&mut **tx)
        .await?;
    match held.rows_affected() {
        1 => Ok(()),
        _ => Err(StoreError::Fenced(format!("migration {}", lease.migration))),
    }
}

pub(crate) async fn load(tx: &mut Tx, id: MigrationId) -> Result<Migration> {
    let row = sqlx::query("SELECT version, record FROM migrations WHERE uuid = $1")
        .bind(id.to_string())
        .fetch_optional(&mut **tx)
        .await?;
    record(&row.ok_or_else(|| StoreError::NotFound(format!("migration {id}")))?)
}

/// Writes a changed record over the one it was made from; `epoch` if the writer
/// must be the one that drives the saga.
pub(crate) async fn write(
    tx: &mut Tx,
    before: &Migration,
    after: &mut Migration,
    epoch: Option<i64>,
) -> Result<()> {
    if before.status.is_final() && after.status != before.status {
        return Err(StoreError::Illegal(format!(
            "migration {} is {} and stays so",
            before.id, before.status
        )));
    }
    after.version = before.version + 1;
    let done = sqlx::query(
        "UPDATE migrations SET status = $2, active = $3, dest_host = $4, version = $5, \
         record = $6, ended_at_ms = $9 WHERE uuid = $1 AND version = $7 AND ($8 = 0 OR epoch = $8)",
    )
    .bind(after.uuid.to_string())
    .bind(after.status.as_str())
    .bind(i64::from(!after.status.is_final()))
    .bind(after.dest_host.as_ref().map(|h| h.as_str()))
    .bind(signed(after.version))
    .bind(to_json("a migration", after)?)
    .bind(signed(before.version))
    .bind(epoch.unwrap_or(0))
    .bind(ended_at_ms(after))
    .execute(&mut **tx)
    .await?;
    match done.rows_affected() {
        1 => Ok(()),
        _ => Err(StoreError::Conflict(format!("migration {}", after.id))),
    }
}

/// When it came to its end, if it has.
fn ended_at_ms(m: &Migration) -> Option<i64> {
    let at_ms = m.finished_at_ms.unwrap_or(0).max(m.updated_at_ms);
    m.status.is_final().then(|| signed(at_ms))
}

/// What the request of a unique id made.
async fn requested(
    database: impl sqlx::Executor<'_, Database = Any>,
    unique_id: &str,
) -> Result<Option<Migration>> {
    let row = sqlx::query(
        "SELECT m.version, m.record FROM migrations m \
         JOIN requests r ON r.migration_uuid = m.uuid WHERE r.unique_id = $1",
    )
    .bind(unique_id)
    .fetch_optional(database)
    .await?;
    row.as_ref().map(record).transpose()
}

/// The unfinished migration of an instance.
async fn active(
    database: impl sqlx::Executor<'_, Database = Any>,
    instance: InstanceId,
) -> Result<Option<Migration>> {
    let row = sqlx::query(
        "SELECT version, record FROM migrations WHERE instance_uuid = $1 AND active = 1",
    )
    .bind(instance.to_string())
    .fetch_optional(database)
    .await?;
    row.as_ref().map(record).transpose()
}

/// Notes what a request made (a migration or an operation), and when, to know it
/// when it comes again.
pub(crate) async fn remember_request(
    tx: &mut Tx,
    unique_id: Option<&str>,
    (made, at_ms): (uuid::Uuid, u64),
) -> Result<()> {
    let Some(unique_id) = unique_id else {
        return Ok(());
    };
    sqlx::query("INSERT INTO requests (unique_id, migration_uuid, at_ms) VALUES ($1, $2, $3)")
        .bind(unique_id)
        .bind(made.to_string())
        .bind(signed(at_ms))
        .execute(&mut **tx)
        .await?;
    Ok(())
}

/// The one record that an integer id, a UUID or a prefix of one names, of those
/// that it fits, that of the integer id first.
pub(crate) fn the_one<T>(
    kind: &str,
    reference: &str,
    mut found: Vec<T>,
    number_of: impl Fn(&T) -> i64,
) -> Result<T> {
    let number = reference.parse::<i64>().ok();
    let shown = shown(reference);
    match found.as_slice() {
        [] => Err(StoreError::NotFound(format!("{kind} '{shown}'"))),
        [first, others @ ..] if others.is_empty() || Some(number_of(first)) == number => {
            Ok(found.swap_remove(0))
        }
        _ => Err(StoreError::Ambiguous(format!(
            "'{shown}' fits several {kind}s; give more of the UUID or the integer id"
        ))),
    }
}

/// The pattern of UUIDs that begin with a text, if one can.
pub(crate) fn uuid_pattern(text: &str) -> Option<String> {
    let fits =
        (4..=36).contains(&text.len()) && text.chars().all(|c| c.is_ascii_hexdigit() || c == '-');
    fits.then(|| format!("{}%", text.to_ascii_lowercase()))
}

pub(crate) fn record(row: &AnyRow) -> Result<Migration> {
    let read = from_json("a migration", row.try_get("record")?);
    let mut migration: Migration = read.map_err(|error| match error {
        StoreError::Newer { message, .. } => newer(&named("migration", row), &message),
        other => other,
    })?;
    migration.version = unsigned(row.try_get("version")?);
    Ok(migration)
}

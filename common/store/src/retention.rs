//! Retention: what is over is kept for a while and then forgotten, in small
//! commits. What is unfinished stays, and so does what something else that stays
//! still needs. Numbers are never given out again.

use drover_model::{
    ids::{HostName, InstanceId, MigrationId},
    migration::{MigrationStatus, MigrationType},
};
use sqlx::Row;

use crate::{
    Result, Store, StoreError,
    database::Tx,
    from_json,
    instances::{self, InstanceRow},
    offers,
    sagas::SagaKey,
    signed, unsigned,
};

/// Rows of a kind that one commit forgets.
const BATCH: i64 = 100;

/// For how long what is over is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retention {
    /// After its end, ms.
    pub keep_ms: u64,
    /// Of each kind, so many at the most.
    pub keep_count: u32,
    /// A saga's journal after its end, ms.
    pub journal_ms: u64,
}

/// How a node is forgotten.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Forgetting {
    /// Now, milliseconds since 1970.
    pub now_ms: u64,
    /// It must not have been heard of since.
    pub silent_since_ms: u64,
    /// Guests that an evacuation would start elsewhere.
    pub evacuable: Vec<InstanceId>,
    /// Those that are nowhere else go with it.
    pub despite_lost_guests: bool,
}

/// Rows of what grows with the work done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Migrations.
    pub migrations: u64,
    /// Events of their sagas.
    pub events: u64,
    /// Operations.
    pub operations: u64,
    /// Requests that are known when they come again.
    pub requests: u64,
    /// Notifications that are not published yet.
    pub notifications: u64,
}

impl Retention {
    fn before(self, now_ms: u64) -> i64 {
        signed(now_ms.saturating_sub(self.keep_ms))
    }
}

/// Which operations are over and nothing needs. `$1` is when the old ones ended,
/// `$2` and `$3` the newest number of an operation, and of a migration, that is one
/// too many. The drains of a node that is still closed are what a restore goes by; by
/// the last evacuation of a node it is known that this was tried.
const OPERATIONS: &str = "SELECT o.uuid FROM operations o WHERE o.active = 0 \
     AND (o.ended_at_ms < $1 OR o.id <= $2 OR (EXISTS \
     (SELECT 1 FROM migrations m WHERE m.operation_uuid = o.uuid) AND NOT EXISTS \
     (SELECT 1 FROM migrations m WHERE m.operation_uuid = o.uuid AND m.id > $3))) \
     AND NOT EXISTS (SELECT 1 FROM migrations m WHERE m.operation_uuid = o.uuid AND m.active = 1) \
     AND NOT (o.kind = 'drain' AND EXISTS \
     (SELECT 1 FROM nodes n WHERE n.host = o.subject AND n.enabled = 0) AND NOT EXISTS \
     (SELECT 1 FROM operations r WHERE r.subject = o.subject AND r.kind = 'restore' \
     AND r.active = 0 AND r.id > o.id)) \
     AND NOT (o.kind = 'evacuate' AND EXISTS \
     (SELECT 1 FROM nodes n WHERE n.host = o.subject) AND NOT EXISTS \
     (SELECT 1 FROM operations l WHERE l.subject = o.subject AND l.kind = 'evacuate' \
     AND l.id > o.id)) ORDER BY o.id LIMIT $4";

/// Which migrations are over and nothing needs. `$1` and `$2` as above. The old
/// copy of an evacuated guest is told of as long as its node may return.
const MIGRATIONS: &str = "SELECT m.uuid, m.record FROM migrations m WHERE m.active = 0 \
     AND (m.ended_at_ms < $1 OR m.id <= $2) \
     AND NOT EXISTS (SELECT 1 FROM operations o WHERE o.uuid = m.operation_uuid) \
     AND NOT EXISTS (SELECT 1 FROM cleanups c WHERE c.migration_uuid = m.uuid) \
     AND NOT EXISTS (SELECT 1 FROM offers f WHERE f.migration_uuid = m.uuid) \
     AND NOT (m.old_copy = 1 AND m.migration_type = $3 AND m.status = $4 AND (EXISTS \
     (SELECT 1 FROM nodes n WHERE n.host = m.source_host) OR m.ended_at_ms >= $1)) \
     ORDER BY m.id LIMIT $5";

/// Which migrations that are over have a journal still, and nothing to tidy by it.
const JOURNALS: &str = "SELECT m.uuid, m.record FROM migrations m WHERE m.active = 0 \
     AND m.ended_at_ms < $1 \
     AND EXISTS (SELECT 1 FROM saga_events e WHERE e.saga_uuid = m.uuid) \
     AND NOT EXISTS (SELECT 1 FROM cleanups c WHERE c.migration_uuid = m.uuid) \
     ORDER BY m.id LIMIT $2";

impl Store {
    /// Forgets some of what has been kept for long enough; says how many rows that
    /// was. None are left when it says 0.
    ///
    /// # Errors
    /// The database failed.
    pub async fn prune(&self, keep: Retention, now_ms: u64) -> Result<u64> {
        self.note_ends(now_ms).await?;
        Ok(self.give_up_tidying(keep, now_ms).await?
            + self.prune_offers(keep, now_ms).await?
            + self.prune_definitions(keep, now_ms).await?
            + self.prune_operations(keep, now_ms).await?
            + self.prune_migrations(keep, now_ms).await?
            + self.prune_journals(keep, now_ms).await?)
    }

    /// What an older build has ended has its end now; and so have definitions of
    /// instances that are no longer on the record, until those are on it again.
    async fn note_ends(&self, now_ms: u64) -> Result<()> {
        for statement in [
            "UPDATE migrations SET ended_at_ms = $1 WHERE active = 0 AND ended_at_ms IS NULL",
            "UPDATE operations SET ended_at_ms = $1 WHERE active = 0 AND ended_at_ms IS NULL",
            "UPDATE definitions SET gone_at_ms = \
             CASE WHEN gone_at_ms IS NULL THEN CAST($1 AS BIGINT) END \
             WHERE (gone_at_ms IS NULL) = (instance_uuid NOT IN (SELECT uuid FROM instances))",
        ] {
            self.execute(|| sqlx::query(statement).bind(signed(now_ms)))
                .await?;
        }
        Ok(())
    }

    /// The newest number of those that are over, of a kind, that is one too many.
    async fn too_many(&self, newest: &'static str, keep: Retention) -> Result<i64> {
        let query = sqlx::query(newest).bind(i64::from(keep.keep_count));
        let row = self.steady(query.fetch_optional(&self.database)).await?;
        Ok(row.map(|row| row.try_get(0)).transpose()?.unwrap_or(0))
    }

    /// What could not be tidied for as long as anything is kept never will be: the
    /// migration's record says so.
    async fn give_up_tidying(&self, keep: Retention, now_ms: u64) -> Result<u64> {
        let statement = "SELECT migration_uuid, step FROM cleanups WHERE at_ms < $1";
        let query = sqlx::query(statement).bind(keep.before(now_ms));
        let rows = self.steady(query.fetch_all(&self.database)).await?;
        let mut given_up = 0;
        for row in &rows {
            if given_up == BATCH.unsigned_abs() {
                break;
            }
            let (uuid, step): (String, String) = (row.try_get(0)?, row.try_get(1)?);
            let words = format!("{step} was put off for too long, and is given up");
            if let Ok(id) = uuid.parse::<MigrationId>() {
                let noted = self.update_migration(id, |m| {
                    m.warnings.push(words.clone());
                    true
                });
                match noted.await {
                    Ok(_) | Err(StoreError::NotFound(_)) => {}
                    // Whoever understands it gives it up.
                    Err(StoreError::Newer { .. }) => continue,
                    // Nobody ever will, and it holds up nothing else.
                    Err(error @ StoreError::Corrupt { .. }) => {
                        tracing::error!(migration = uuid, %error, "its tidying is given up");
                    }
                    Err(error) => return Err(error),
                }
            }
            self.give_up(&uuid, &step).await?;
            given_up += 1;
        }
        Ok(given_up)
    }

    /// Forgets a step that was put off; with the last one, what it was to give back.
    async fn give_up(&self, migration: &str, step: &str) -> Result<()> {
        let work = || async {
            let mut tx = self.begin().await?;
            sqlx::query("DELETE FROM cleanups WHERE migration_uuid = $1 AND step = $2")
                .bind(migration.to_owned())
                .bind(step.to_owned())
                .execute(&mut *tx)
                .await?;
            sqlx::query(
                "DELETE FROM claims WHERE migration_uuid = $1 AND NOT EXISTS \
                 (SELECT 1 FROM cleanups c WHERE c.migration_uuid = $1) AND NOT EXISTS \
                 (SELECT 1 FROM migrations m WHERE m.uuid = $1 AND m.active = 1)",
            )
            .bind(migration.to_owned())
            .execute(&mut *tx)
            .await?;
            tx.commit().await?;
            Ok(())
        };
        self.attempt(work).await
    }

    async fn prune_offers(&self, keep: Retention, now_ms: u64) -> Result<u64> {
        let newest =
            "SELECT created_at_ms FROM offers ORDER BY created_at_ms DESC LIMIT 1 OFFSET $1";
        let too_many = self.too_many(newest, keep).await?;
        let made_before = keep.before(now_ms).max(too_many + 1);
        self.execute(|| offers::forget_closed(made_before, now_ms, BATCH))
            .await
    }

    /// Definitions outlive their instances: of one that its node has lost they are all
    /// that is left.
    async fn prune_definitions(&self, keep: Retention, now_ms: u64) -> Result<u64> {
        let statement = "DELETE FROM definitions WHERE instance_uuid IN \
             (SELECT d.instance_uuid FROM definitions d WHERE d.gone_at_ms < $1 \
             AND d.instance_uuid NOT IN (SELECT uuid FROM instances) LIMIT $2)";
        self.execute(|| sqlx::query(statement).bind(keep.before(now_ms)).bind(BATCH))
            .await
    }

    async fn prune_operations(&self, keep: Retention, now_ms: u64) -> Result<u64> {
        let newest =
            "SELECT id FROM operations WHERE active = 0 ORDER BY id DESC LIMIT 1 OFFSET $1";
        let operations = self.too_many(newest, keep).await?;
        let migrations = self.too_many(NEWEST_MIGRATIONS, keep).await?;
        let statement = format!("DELETE FROM operations WHERE uuid IN ({OPERATIONS})");
        self.execute(|| {
            sqlx::query(sqlx::AssertSqlSafe(statement.clone()))
                .bind(keep.before(now_ms))
                .bind(operations)
                .bind(migrations)
                .bind(BATCH)
        })
        .await
    }

    async fn prune_migrations(&self, keep: Retention, now_ms: u64) -> Result<u64> {
        let too_many = self.too_many(NEWEST_MIGRATIONS, keep).await?;
        self.attempt(|| async {
            let mut tx = self.begin().await?;
            let over = sqlx::query(MIGRATIONS)
                .bind(keep.before(now_ms))
                .bind(too_many)
                .bind(MigrationType::Evacuation.to_string())
                .bind(MigrationStatus::Completed.as_str())
                .bind(BATCH);
            let rows = over.fetch_all(&mut *tx).await?;
            for row in &rows {
                let uuid: String = row.try_get("uuid")?;
                forget_journals(&mut tx, &uuid, row.try_get("record")?).await?;
                for statement in [
                    "DELETE FROM requests WHERE migration_uuid = $1",
                    "DELETE FROM migrations WHERE uuid = $1",
                ] {
                    let forget = sqlx::query(statement).bind(uuid.clone());
                    forget.execute(&mut *tx).await?;
                }
            }
            tx.commit().await?;
            Ok(rows.len() as u64)
        })
        .await
    }

    async fn prune_journals(&self, keep: Retention, now_ms: u64) -> Result<u64> {
        let ended_before = signed(now_ms.saturating_sub(keep.journal_ms));
        self.attempt(|| async {
            let mut tx = self.begin().await?;
            let over = sqlx::query(JOURNALS).bind(ended_before).bind(BATCH);
            let rows = over.fetch_all(&mut *tx).await?;
            for row in &rows {
                let uuid: String = row.try_get("uuid")?;
                forget_journals(&mut tx, &uuid, row.try_get("record")?).await?;
            }
            tx.commit().await?;
            Ok(rows.len() as u64)
        })
        .await
    }

    /// How many rows there are of what grows with the work done.
    ///
    /// # Errors
    /// The database failed.
    pub async fn size(&self) -> Result<Size> {
        let query = sqlx::query(
            "SELECT (SELECT COUNT(*) FROM migrations) AS migrations, \
             (SELECT COUNT(*) FROM saga_events) AS events, \
             (SELECT COUNT(*) FROM operations) AS operations, \
             (SELECT COUNT(*) FROM requests) AS requests, \
             (SELECT COUNT(*) FROM outbox) AS notifications",
        );
        let row = self.steady(query.fetch_one(&self.database)).await?;
        let count = |column| Ok::<_, StoreError>(unsigned(row.try_get(column)?));
        Ok(Size {
            migrations: count("migrations")?,
            events: count("events")?,
            operations: count("operations")?,
            requests: count("requests")?,
            notifications: count("notifications")?,
        })
    }

    /// Ends a node that was scrapped: its row, what was to be tidied there and what was
    /// promised there. It must not have been heard of since a moment, and nothing may
    /// need it. Guests that are elsewhere by now are on the record there; how the others
    /// were defined is kept like that of any guest that is gone.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] with every reason against it, [`StoreError::NotFound`],
    /// or the database failed.
    pub async fn forget_node(&self, host: &HostName, how: &Forgetting) -> Result<()> {
        self.attempt(|| async {
            let mut tx = self.begin().await?;
            forget_node(&mut tx, host, how).await?;
            tx.commit().await?;
            Ok(())
        })
        .await
    }

    /// Takes a guest that was lost with its node from the record, or, if not `for_good`,
    /// says whether that could be done. How it was defined is kept for a while.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] with the reason against it, [`StoreError::NotFound`], or
    /// the database failed.
    pub async fn forget_instance(&self, id: InstanceId, for_good: bool) -> Result<()> {
        self.attempt(|| async {
            let mut tx = self.begin().await?;
            forget_instance(&mut tx, id).await?;
            if for_good {
                tx.commit().await?;
            }
            Ok(())
        })
        .await
    }

    /// Whether that could be done now.
    ///
    /// # Errors
    /// As [`Self::forget_node`].
    pub async fn may_forget_node(&self, host: &HostName, how: &Forgetting) -> Result<()> {
        self.attempt(|| async {
            let mut tx = self.begin().await?;
            forget_node(&mut tx, host, how).await
        })
        .await
    }
}

async fn forget_instance(tx: &mut Tx, id: InstanceId) -> Result<()> {
    let named = || format!("instance {id}");
    let row = instances::lock(tx, id).await?;
    let row = row.ok_or_else(|| StoreError::NotFound(named()))?;
    let why = match (row.is_lost(), is_moved(tx, id).await?) {
        (true, false) => return instances::forget(tx, &[row]).await,
        (true, true) => "a migration of it is under way: end that first".to_owned(),
        (false, _) => format!(
            "only what was lost with its node can be; one that {} no longer lists is \
             forgotten by itself",
            row.host
        ),
    };
    Err(StoreError::Invalid(format!(
        "{} cannot be forgotten: {why}",
        named()
    )))
}

/// Whether a migration of an instance is under way, whoever understands it.
async fn is_moved(tx: &mut Tx, id: InstanceId) -> Result<bool> {
    let moved = sqlx::query("SELECT id FROM migrations WHERE instance_uuid = $1 AND active = 1");
    let moved = moved.bind(id.to_string()).fetch_optional(&mut **tx).await?;
    Ok(moved.is_some())
}

async fn forget_node(tx: &mut Tx, host: &HostName, how: &Forgetting) -> Result<()> {
    // Reports of the node, and claims there, wait here.
    let held = sqlx::query(
        "UPDATE nodes SET claim_serial = claim_serial WHERE host = $1 RETURNING heard_at_ms",
    );
    let held = held.bind(host.as_str()).fetch_optional(&mut **tx).await?;
    let held = held.ok_or_else(|| StoreError::NotFound(format!("node {host}")))?;
    let lost = instances::leave(tx, host, how.now_ms).await?;
    instances::lose_sight(tx, host).await?;
    let mut against = Vec::new();
    match how.despite_lost_guests {
        true => instances::forget(tx, &lost).await?,
        false => against.extend(would_be_lost(&lost, host, &how.evacuable)),
    }
    against.extend(unfinished(tx, host).await?);
    if held.try_get::<i64, _>("heard_at_ms")? > signed(how.silent_since_ms) {
        against.insert(
            0,
            "its agent was heard of just now: stop it first".to_owned(),
        );
    }
    if !against.is_empty() {
        return Err(StoreError::Invalid(format!(
            "node {host} cannot be forgotten: {}",
            against.join("; ")
        )));
    }
    for statement in [
        "DELETE FROM nodes WHERE host = $1",
        "DELETE FROM claims WHERE host = $1",
        // Who has its name next is counted on: what was known of this one's life says
        // nothing of that one's.
        "UPDATE agents SET incarnation = incarnation + 1, identity = '{}', agent_version = '', gone = 1, beat = 0, refusals = 0, \
             refusal = NULL WHERE host = $1",
        "DELETE FROM agents_lost WHERE host = $1",
        "DELETE FROM cleanups WHERE step IN ('tidy', 'confirm_source') AND migration_uuid IN \
             (SELECT uuid FROM migrations WHERE source_host = $1)",
        "DELETE FROM cleanups WHERE step IN ('prepare', 'settle', 'revert_tidy') \
             AND migration_uuid IN (SELECT uuid FROM migrations WHERE dest_host = $1)",
    ] {
        let forget = sqlx::query(statement).bind(host.as_str());
        forget.execute(&mut **tx).await?;
    }
    Ok(())
}

const NEWEST_MIGRATIONS: &str =
    "SELECT id FROM migrations WHERE active = 0 ORDER BY id DESC LIMIT 1 OFFSET $1";

async fn forget_journals(tx: &mut Tx, migration: &str, record: &str) -> Result<()> {
    /// All of the record that tells how many journals there are.
    #[derive(serde::Deserialize)]
    struct Endings {
        #[serde(default)]
        ending_attempt: u32,
    }
    let id = migration
        .parse()
        .map_err(|e| crate::corrupt("a migration", &e))?;
    let Ok(endings) = from_json::<Endings>("a migration", record) else {
        // Nobody can read it: whatever begins with its id goes, however long that takes.
        sqlx::query("DELETE FROM saga_events WHERE saga_uuid LIKE $1")
            .bind(format!("{migration}%"))
            .execute(&mut **tx)
            .await?;
        return Ok(());
    };
    let of_endings = (1..=endings.ending_attempt).map(|n| SagaKey::of_ending(id, n));
    for saga in std::iter::once(SagaKey::of_move(id)).chain(of_endings) {
        sqlx::query("DELETE FROM saga_events WHERE saga_uuid = $1")
            .bind(saga.as_str())
            .execute(&mut **tx)
            .await?;
    }
    Ok(())
}

/// Guests that are nowhere else, in words: those that can be started elsewhere, and
/// the others.
fn would_be_lost(lost: &[InstanceRow], host: &HostName, evacuable: &[InstanceId]) -> Vec<String> {
    let (saved, others): (Vec<_>, Vec<_>) = lost.iter().partition(|g| evacuable.contains(&g.id));
    let saved = names(&saved).map(|names| {
        format!(
            "{names} would be lost with it: 'drover node evacuate {host}' starts them elsewhere"
        )
    });
    let others = names(&others).map(|names| {
        format!(
            "{names} would be lost with it, and cannot be evacuated: if they are gone for good, say \
             --despite-lost-guests"
        )
    });
    saved.into_iter().chain(others).collect()
}

fn names(guests: &[&InstanceRow]) -> Option<String> {
    /// Names that are told.
    const NAMED: usize = 20;
    let names: Vec<_> = guests.iter().take(NAMED).map(|g| g.name.as_str()).collect();
    match guests.len() {
        0 => None,
        n if n <= NAMED => Some(names.join(", ")),
        n => Some(format!("{n} guests ({}, …)", names.join(", "))),
    }
}

/// What of a node is not at its end, in words.
async fn unfinished(tx: &mut Tx, host: &HostName) -> Result<Vec<String>> {
    let mut against = Vec::new();
    let unfinished = [
        (
            "migration",
            "SELECT id FROM migrations WHERE active = 1 AND (source_host = $1 OR dest_host = $1) \
             ORDER BY id LIMIT 1",
        ),
        (
            "operation",
            "SELECT id FROM operations WHERE active = 1 AND subject = $1 ORDER BY id LIMIT 1",
        ),
    ];
    for (kind, statement) in unfinished {
        let row = sqlx::query(statement).bind(host.as_str());
        if let Some(row) = row.fetch_optional(&mut **tx).await? {
            let id: i64 = row.try_get("id")?;
            against.push(format!("{kind} {id} is not at its end"));
        }
    }
    Ok(against)
}

//! Operations on nodes: their records, who drives them, and whose turn it is to
//! send. Like migrations, each is one row whose JSON is the truth; `version`
//! keeps two writers from losing each other's changes, `epoch` shuts out a
//! conductor whose operation was taken over.

use drover_model::{
    api::conductor::ListOperations,
    ids::{HostName, InstanceId, MigrationId, OperationId},
    migration::{Migration, MigrationStatus, MigrationType},
    operation::Operation,
};
use serde_json::Value;
use sqlx::{Any, Row, any::AnyRow};

use crate::{
    Numbered, Result, Store, StoreError, Term, Tries, as_kept, corrupt,
    database::Tx,
    from_json, migrations, named, newer, next_number,
    outbox::{self, Notification},
    readable, signed, to_json, unsigned,
};

/// Subject of an operation that is about all nodes.
const ALL_NODES: &str = "*";

/// What became of asking for an operation.
#[derive(Debug, Clone, PartialEq)]
pub enum Begun {
    /// It is on the record.
    New(Box<Operation>),
    /// The same request came before; this is what it made.
    Repeated(Box<Operation>),
    /// Another operation has the node (or all of them).
    Busy(Box<Operation>),
}

/// The right to drive an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OperationLease {
    /// Which.
    pub operation: OperationId,
    /// How often it changed hands.
    pub epoch: i64,
}

/// Most transfers at one time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TurnLimits {
    /// From one node.
    pub outbound: u32,
    /// To one node.
    pub inbound: u32,
    /// In all.
    pub cluster: u32,
}

/// Migrations that are not over.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct UnderWay {
    /// Those that can be read.
    pub known: Vec<Migration>,
    /// What is known of the others.
    pub unread: Vec<UnreadMove>,
}

/// An unfinished migration whose record only a newer conductor understands, or nobody,
/// as its columns tell of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnreadMove {
    /// Its number.
    pub id: i64,
    /// Of which guest.
    pub instance: InstanceId,
    /// From where.
    pub source: HostName,
    /// Where to, if that is known.
    pub dest: Option<HostName>,
    /// Of what kind.
    pub kind: String,
    /// Where it stands.
    pub status: String,
}

impl UnreadMove {
    /// Whether nothing is being done about it.
    pub fn rests(&self) -> bool {
        let resting = [MigrationStatus::Finished, MigrationStatus::Stuck];
        resting.iter().any(|status| status.as_str() == self.status)
    }

    /// Whether it is of a kind.
    pub fn is(&self, kind: MigrationType) -> bool {
        self.kind == kind.to_string()
    }
}

/// Whether a migration may send now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Turn {
    /// It may, and is counted until it ends its turn.
    Go,
    /// Not yet.
    Wait {
        /// For what, in words.
        why: String,
    },
}

impl Store {
    /// Puts a new operation on the record with the request that asked for it, in
    /// one commit. Its `id` and `version` are given here.
    ///
    /// # Errors
    /// The database failed.
    pub async fn begin_operation(
        &self,
        new: &Operation,
        unique_id: Option<&str>,
        term: Term,
    ) -> Result<Begun> {
        let begun = self
            .attempt(|| self.try_begin(new, unique_id, term))
            .await?;
        if let Begun::New(operation) = &begun {
            self.operation_changed(operation.uuid);
        }
        Ok(begun)
    }

    async fn try_begin(
        &self,
        new: &Operation,
        unique_id: Option<&str>,
        term: Term,
    ) -> Result<Begun> {
        let lease_until_ms = self.lease_clock_ms(term).await? + term.lease_ms;
        let mut tx = self.begin().await?;
        if let Some(unique_id) = unique_id {
            let row = sqlx::query(
                "SELECT o.version, o.record FROM operations o \
                 JOIN requests r ON r.migration_uuid = o.uuid WHERE r.unique_id = $1",
            )
            .bind(unique_id)
            .fetch_optional(&mut *tx)
            .await?;
            if let Some(row) = row {
                return Ok(Begun::Repeated(Box::new(record(&row)?)));
            }
        }
        let subject = subject(new.task.host());
        if !new.status.is_final()
            && let Some(active) = active(&mut *tx, subject).await?
        {
            return Ok(Begun::Busy(Box::new(active)));
        }
        let mut operation = new.clone();
        operation.id = next_number(&mut tx, Numbered::Operations).await?;
        operation.version = 1;
        sqlx::query(
            "INSERT INTO operations (uuid, id, kind, subject, active, owner, epoch, \
             lease_until_ms, version, record, ended_at_ms) \
             VALUES ($1, $2, $3, $4, $5, $6, 1, $7, 1, $8, $9)",
        )
        .bind(operation.uuid.to_string())
        .bind(operation.id)
        .bind(operation.task.kind())
        .bind(subject)
        .bind(i64::from(!operation.status.is_final()))
        .bind(&operation.owner)
        .bind(signed(lease_until_ms))
        .bind(to_json("an operation", &operation)?)
        .bind(ended_at_ms(&operation))
        .execute(&mut *tx)
        .await?;
        let made = (operation.uuid.0, operation.created_at_ms);
        migrations::remember_request(&mut tx, unique_id, made).await?;
        tx.commit().await?;
        Ok(Begun::New(Box::new(operation)))
    }

    /// The lease of an operation that this process has just begun.
    pub fn first_operation_lease(operation: OperationId) -> OperationLease {
        OperationLease {
            operation,
            epoch: 1,
        }
    }

    /// An operation by its id.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], or the database failed.
    pub async fn operation(&self, id: OperationId) -> Result<Operation> {
        let query = sqlx::query("SELECT version, record FROM operations WHERE uuid = $1")
            .bind(id.to_string());
        let row = self.steady(query.fetch_optional(&self.database)).await?;
        record(&row.ok_or_else(|| StoreError::NotFound(format!("operation {id}")))?)
    }

    /// The operation of an integer id, a UUID, or a unique prefix of one.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Ambiguous`], or the database failed.
    pub async fn find_operation(&self, reference: &str) -> Result<Operation> {
        let number = reference.parse::<i64>().ok();
        let query = sqlx::query(
            "SELECT id, version, record FROM operations WHERE id = $1 OR uuid LIKE $2 \
             ORDER BY CASE WHEN id = $1 THEN 0 ELSE 1 END LIMIT 2",
        )
        .bind(number.unwrap_or(-1))
        .bind(migrations::uuid_pattern(reference).unwrap_or_default());
        let rows = self.steady(query.fetch_all(&self.database)).await?;
        let number = |row: &AnyRow| row.try_get("id").unwrap_or(-1);
        record(&migrations::the_one("operation", reference, rows, number)?)
    }

    /// The unfinished operation on a node, or of all of them.
    ///
    /// # Errors
    /// The database failed.
    pub async fn active_operation(&self, host: Option<&HostName>) -> Result<Option<Operation>> {
        self.steady(active(&self.database, subject(host))).await
    }

    /// Operations, newest first, but for those that cannot be read.
    ///
    /// # Errors
    /// The database failed.
    pub async fn operations(&self, filter: &ListOperations) -> Result<Vec<Operation>> {
        Ok(readable(&self.listed_operations(filter).await?, record))
    }

    /// The same as they are kept: also what a newer Drover wrote, for whoever
    /// understands it.
    ///
    /// # Errors
    /// The database failed.
    pub async fn operations_as_kept(&self, filter: &ListOperations) -> Result<Vec<Value>> {
        Ok(readable(&self.listed_operations(filter).await?, as_kept))
    }

    async fn listed_operations(&self, filter: &ListOperations) -> Result<Vec<AnyRow>> {
        let query = sqlx::query(
            "SELECT version, record FROM operations \
             WHERE (CAST($1 AS TEXT) IS NULL OR subject = $1) \
             AND (CAST($2 AS TEXT) IS NULL OR kind = $2) \
             AND ($3 = 0 OR active = 1) ORDER BY id DESC LIMIT $4",
        )
        .bind(filter.host.as_ref().map(|host| host.as_str()))
        .bind(filter.kind.as_deref())
        .bind(i64::from(filter.active))
        .bind(i64::from(filter.limit.unwrap_or(100).clamp(1, 1000)));
        Ok(self.steady(query.fetch_all(&self.database)).await?)
    }

    /// Changes an operation's record in one commit. `change` says whether there
    /// is anything to write; it may be called again if somebody else was faster.
    /// With a lease, only its holder writes.
    ///
    /// # Errors
    /// As [`Self::tell_operation`].
    pub async fn update_operation(
        &self,
        id: OperationId,
        lease: Option<OperationLease>,
        mut change: impl FnMut(&mut Operation) -> bool + Send,
    ) -> Result<Operation> {
        let change = |operation: &mut Operation| change(operation).then(Vec::new);
        self.tell_operation(id, lease, change).await
    }

    /// The same, with what is told of the change; nothing is written if `change`
    /// says none.
    ///
    /// # Errors
    /// [`StoreError::NotFound`]; [`StoreError::Illegal`] for a status that cannot
    /// follow; [`StoreError::Fenced`] for a lease that is no longer the newest; or
    /// the database failed.
    pub async fn tell_operation(
        &self,
        id: OperationId,
        lease: Option<OperationLease>,
        mut change: impl FnMut(&mut Operation) -> Option<Vec<Notification>> + Send,
    ) -> Result<Operation> {
        let mut tries = Tries::default();
        loop {
            let tried = self.try_update_operation(id, lease, &mut change);
            match self.steady(tried).await {
                Ok(updated) => return Ok(updated),
                Err(error) => tries.again(error).await?,
            }
        }
    }

    async fn try_update_operation(
        &self,
        id: OperationId,
        lease: Option<OperationLease>,
        change: &mut (impl FnMut(&mut Operation) -> Option<Vec<Notification>> + Send),
    ) -> Result<Operation> {
        let mut tx = self.begin().await?;
        let row = sqlx::query("SELECT version, record, epoch FROM operations WHERE uuid = $1")
            .bind(id.to_string())
            .fetch_optional(&mut *tx)
            .await?;
        let row = row.ok_or_else(|| StoreError::NotFound(format!("operation {id}")))?;
        let epoch: i64 = row.try_get("epoch")?;
        if lease.is_some_and(|lease| lease.epoch != epoch) {
            return Err(StoreError::Fenced(format!("operation {id}")));
        }
        let before = record(&row)?;
        let mut after = before.clone();
        let Some(told) = change(&mut after) else {
            return Ok(before);
        };
        if !before.status.may_become(after.status) {
            return Err(StoreError::Illegal(format!(
                "operation {} is {} and cannot become {}",
                before.id, before.status, after.status
            )));
        }
        after.version = before.version + 1;
        write(&mut tx, &before, &after, lease).await?;
        for notification in &told {
            outbox::put(&mut tx, notification).await?;
        }
        tx.commit().await?;
        self.operation_changed(id);
        Ok(after)
    }

    /// Unfinished operations that nobody drives: this owner's own that are not among
    /// those it drives, and those of owners whose lease has run out.
    ///
    /// # Errors
    /// The database failed.
    pub async fn undriven_operations(
        &self,
        owner: &str,
        driven: &[OperationLease],
        term: Term,
    ) -> Result<Vec<OperationLease>> {
        let now_ms = self.steady(self.lease_clock_ms(term)).await?;
        let query = sqlx::query(
            "SELECT uuid, epoch FROM operations \
             WHERE active = 1 AND (owner = $1 OR lease_until_ms < $2) ORDER BY id",
        )
        .bind(owner)
        .bind(signed(now_ms));
        let rows = self.steady(query.fetch_all(&self.database)).await?;
        let mut leases = rows.iter().map(lease).collect::<Result<Vec<_>>>()?;
        leases.retain(|lease| !driven.contains(lease));
        Ok(leases)
    }

    /// Takes a lease as it was seen, with a new epoch; none if somebody was faster.
    ///
    /// # Errors
    /// The database failed.
    pub async fn take_over_operation(
        &self,
        seen: OperationLease,
        owner: &str,
        term: Term,
    ) -> Result<Option<OperationLease>> {
        let now_ms = self.steady(self.lease_clock_ms(term)).await?;
        let statement = || {
            sqlx::query(
                "UPDATE operations SET owner = $3, epoch = epoch + 1, lease_until_ms = $4 \
                 WHERE uuid = $1 AND epoch = $2 AND active = 1 RETURNING uuid, epoch",
            )
            .bind(seen.operation.to_string())
            .bind(seen.epoch)
            .bind(owner.to_owned())
            .bind(signed(now_ms + term.lease_ms))
        };
        let rows = self.returned(statement).await?;
        rows.first().map(lease).transpose()
    }

    /// Puts off the end of leases that an owner holds on operations, and gives those
    /// that it does hold.
    ///
    /// # Errors
    /// The database failed; some may be renewed.
    pub async fn renew_operation_leases(
        &self,
        owner: &str,
        held: &[OperationLease],
        term: Term,
    ) -> Result<Vec<OperationLease>> {
        let renewed = self.renew_by_id(
            "UPDATE operations SET lease_until_ms = $2 WHERE owner = $1 AND uuid IN \
             ($3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18) \
             RETURNING uuid, epoch",
            (owner, term),
            held.iter().map(|lease| lease.operation.to_string()),
        );
        let mut renewed = renewed
            .await?
            .iter()
            .map(lease)
            .collect::<Result<Vec<_>>>()?;
        renewed.retain(|lease| held.contains(lease));
        Ok(renewed)
    }

    /// Migrations of an operation, oldest first.
    ///
    /// # Errors
    /// The database failed.
    pub async fn migrations_of(&self, operation: OperationId) -> Result<Vec<Migration>> {
        let query = sqlx::query(
            "SELECT version, record FROM migrations WHERE operation_uuid = $1 ORDER BY id",
        )
        .bind(operation.to_string());
        let rows = self.steady(query.fetch_all(&self.database)).await?;
        Ok(readable(&rows, migrations::record))
    }

    /// Every unfinished migration that can be read, oldest first.
    ///
    /// # Errors
    /// The database failed.
    pub async fn active_migrations(&self) -> Result<Vec<Migration>> {
        Ok(self.under_way().await?.known)
    }

    /// Every unfinished migration, oldest first; one that cannot be read costs its own
    /// guest and nobody else's.
    ///
    /// # Errors
    /// The database failed.
    pub async fn under_way(&self) -> Result<UnderWay> {
        let query = sqlx::query(
            "SELECT id, version, record, instance_uuid, migration_type, status, source_host, \
             dest_host FROM migrations WHERE active = 1 ORDER BY id",
        );
        let rows = self.steady(query.fetch_all(&self.database)).await?;
        let (known, unread): (Vec<_>, Vec<_>) = rows
            .into_iter()
            .partition(|row| migrations::record(row).is_ok());
        Ok(UnderWay {
            known: readable(&known, migrations::record),
            unread: readable(&unread, unread_move),
        })
    }

    /// Lets a migration send if neither of its nodes, nor all of them together,
    /// send as much as they may already. Asked again it keeps its turn.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], or the database failed.
    pub async fn take_turn(&self, migration: MigrationId, limits: TurnLimits) -> Result<Turn> {
        self.attempt(|| self.try_take_turn(migration, limits)).await
    }

    async fn try_take_turn(&self, migration: MigrationId, limits: TurnLimits) -> Result<Turn> {
        let mut tx = self.begin().await?;
        sqlx::query("UPDATE switches SET is_on = 0 WHERE name = 'turns'")
            .execute(&mut *tx)
            .await?;
        let row =
            sqlx::query("SELECT sending, source_host, dest_host FROM migrations WHERE uuid = $1")
                .bind(migration.to_string())
                .fetch_optional(&mut *tx)
                .await?;
        let row = row.ok_or_else(|| StoreError::NotFound(format!("migration {migration}")))?;
        if row.try_get::<i64, _>("sending")? != 0 {
            return Ok(Turn::Go);
        }
        let source: String = row.try_get("source_host")?;
        let dest: Option<String> = row.try_get("dest_host")?;
        let dest = dest.unwrap_or_default();
        let row = sqlx::query(
            "SELECT COUNT(*) AS cluster, \
             CAST(COALESCE(SUM(CASE WHEN source_host = $1 THEN 1 ELSE 0 END), 0) AS BIGINT) AS outbound, \
             CAST(COALESCE(SUM(CASE WHEN dest_host = $2 THEN 1 ELSE 0 END), 0) AS BIGINT) AS inbound \
             FROM migrations WHERE active = 1 AND sending = 1",
        )
        .bind(&source)
        .bind(&dest)
        .fetch_one(&mut *tx)
        .await?;
        let full = |column: &str, limit: u32| -> Result<Option<i64>> {
            let count: i64 = row.try_get(column)?;
            Ok((count >= i64::from(limit)).then_some(count))
        };
        let why = if let Some(n) = full("outbound", limits.outbound)? {
            Some(format!("{source} sends {n} already"))
        } else if let Some(n) = full("inbound", limits.inbound)? {
            Some(format!("{dest} receives {n} already"))
        } else {
            full("cluster", limits.cluster)?.map(|n| format!("{n} are being sent in all already"))
        };
        if let Some(why) = why {
            return Ok(Turn::Wait { why });
        }
        sqlx::query("UPDATE migrations SET sending = 1 WHERE uuid = $1")
            .bind(migration.to_string())
            .execute(&mut *tx)
            .await?;
        tx.commit().await?;
        Ok(Turn::Go)
    }

    /// Gives a turn back; one that was never taken is no error. Whoever waits is
    /// told.
    ///
    /// # Errors
    /// The database failed.
    pub async fn end_turn(&self, migration: MigrationId) -> Result<()> {
        let statement = "UPDATE migrations SET sending = 0 WHERE uuid = $1";
        self.execute(|| sqlx::query(statement).bind(migration.to_string()))
            .await?;
        self.changed(migration);
        self.turn_given_back();
        Ok(())
    }

    /// Whether something that the conductor does by itself may be done now.
    ///
    /// # Errors
    /// The database failed.
    pub async fn is_switched_on(&self, name: &str) -> Result<bool> {
        let query = sqlx::query("SELECT is_on FROM switches WHERE name = $1").bind(name);
        let row = self.steady(query.fetch_optional(&self.database)).await?;
        let is_on = row.map(|row| row.try_get::<i64, _>("is_on")).transpose()?;
        Ok(is_on.is_none_or(|is_on| is_on != 0))
    }

    /// Switches it.
    ///
    /// # Errors
    /// The database failed.
    pub async fn switch(&self, name: &str, is_on: bool) -> Result<()> {
        self.execute(|| {
            sqlx::query(
                "INSERT INTO switches (name, is_on) VALUES ($1, $2) \
                 ON CONFLICT (name) DO UPDATE SET is_on = excluded.is_on",
            )
            .bind(name.to_owned())
            .bind(i64::from(is_on))
        })
        .await?;
        Ok(())
    }
}

fn unread_move(row: &AnyRow) -> Result<UnreadMove> {
    let instance: String = row.try_get("instance_uuid")?;
    let source: String = row.try_get("source_host")?;
    let dest: Option<String> = row.try_get("dest_host")?;
    let dest = dest.map(|host| host.parse::<HostName>()).transpose();
    Ok(UnreadMove {
        id: row.try_get("id")?,
        instance: instance.parse().map_err(|e| corrupt("a migration", &e))?,
        source: source.parse().map_err(|e| corrupt("a migration", &e))?,
        dest: dest.map_err(|e| corrupt("a migration", &e))?,
        kind: row.try_get("migration_type")?,
        status: row.try_get("status")?,
    })
}

fn lease(row: &AnyRow) -> Result<OperationLease> {
    let uuid: String = row.try_get("uuid")?;
    Ok(OperationLease {
        operation: uuid.parse().map_err(|e| corrupt("an operation", &e))?,
        epoch: row.try_get("epoch")?,
    })
}

fn subject(host: Option<&HostName>) -> &str {
    host.map_or(ALL_NODES, HostName::as_str)
}

async fn active(
    database: impl sqlx::Executor<'_, Database = Any>,
    subject: &str,
) -> Result<Option<Operation>> {
    let row =
        sqlx::query("SELECT version, record FROM operations WHERE subject = $1 AND active = 1")
            .bind(subject)
            .fetch_optional(database)
            .await?;
    row.as_ref().map(record).transpose()
}

async fn write(
    tx: &mut Tx,
    before: &Operation,
    after: &Operation,
    lease: Option<OperationLease>,
) -> Result<()> {
    let done = sqlx::query(
        "UPDATE operations SET active = $2, version = $3, record = $4, ended_at_ms = $7 \
         WHERE uuid = $1 AND version = $5 AND ($6 = 0 OR epoch = $6)",
    )
    .bind(after.uuid.to_string())
    .bind(i64::from(!after.status.is_final()))
    .bind(signed(after.version))
    .bind(to_json("an operation", after)?)
    .bind(signed(before.version))
    .bind(lease.map_or(0, |lease| lease.epoch))
    .bind(ended_at_ms(after))
    .execute(&mut **tx)
    .await?;
    match done.rows_affected() {
        1 => Ok(()),
        _ => Err(StoreError::Conflict(format!("operation {}", after.id))),
    }
}

/// When it came to its end, if it has.
fn ended_at_ms(operation: &Operation) -> Option<i64> {
    let at_ms = operation.finished_at_ms.unwrap_or(operation.created_at_ms);
    operation.status.is_final().then(|| signed(at_ms))
}

fn record(row: &AnyRow) -> Result<Operation> {
    let read = from_json("an operation", row.try_get("record")?);
    let mut operation: Operation = read.map_err(|error| match error {
        StoreError::Newer { message, .. } => newer(&named("operation", row), &message),
        other => other,
    })?;
    operation.version = unsigned(row.try_get("version")?);
    Ok(operation)
}

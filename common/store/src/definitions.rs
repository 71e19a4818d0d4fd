//! Definitions as nodes told them last, for the day on which a node is dead, and
//! which instances live elsewhere since.

use drover_model::{
    api::{compute::KeptDefinition, conductor::Evacuated},
    guest::PowerState,
    ids::{HostName, InstanceId, MigrationId},
    migration::{Migration, MigrationStatus, MigrationType},
};
use serde::{Deserialize, Serialize};
use sqlx::{Row, any::AnyRow};

use crate::{
    Result, Store, claims,
    database::Tx,
    from_json, instances,
    migrations::{self, Lease},
    nodes::ReportPlace,
    readable, signed, to_json, unsigned,
};

/// A definition, and whose word it is.
#[derive(Debug, Clone, PartialEq)]
pub struct DefinitionRow {
    /// The node that told it.
    pub host: HostName,
    /// When, milliseconds since 1970.
    pub taken_at_ms: u64,
    /// What it told.
    pub kept: KeptDefinition,
    /// The last report of the node when it was asked, if that is known.
    pub after: Option<ReportPlace>,
}

/// A definition as it is on the record.
#[derive(Serialize, Deserialize)]
struct Kept {
    #[serde(flatten)]
    kept: KeptDefinition,
    #[serde(default)]
    after: Option<ReportPlace>,
}

impl Store {
    /// Digests of all definitions that a node has told.
    ///
    /// # Errors
    /// The database failed.
    pub async fn definition_digests(&self, host: &HostName) -> Result<Vec<(InstanceId, String)>> {
        let query = sqlx::query("SELECT instance_uuid, digest FROM definitions WHERE host = $1")
            .bind(host.as_str());
        let rows = self.steady(query.fetch_all(&self.database)).await?;
        rows.iter()
            .map(|row| {
                let id: String = row.try_get("instance_uuid")?;
                let id = id.parse().map_err(|e| crate::corrupt("a definition", &e))?;
                Ok((id, row.try_get("digest")?))
            })
            .collect()
    }

    /// Keeps a definition in place of any older one of the instance, if that is on
    /// the record on the node that tells it; says whether. It was asked for `after` a
    /// report of the node.
    ///
    /// # Errors
    /// The database failed.
    pub async fn keep_definition(
        &self,
        host: &HostName,
        kept: &KeptDefinition,
        after: Option<ReportPlace>,
        now_ms: u64,
    ) -> Result<bool> {
        let record = Kept {
            kept: kept.clone(),
            after,
        };
        self.attempt(|| self.try_keep_definition(host, &record, now_ms))
            .await
    }

    async fn try_keep_definition(
        &self,
        host: &HostName,
        record: &Kept,
        now_ms: u64,
    ) -> Result<bool> {
        let kept = &record.kept;
        let mut tx = self.begin().await?;
        let row = instances::lock(&mut tx, kept.instance).await?;
        if row.is_none_or(|row| row.host != *host) {
            return Ok(false);
        }
        sqlx::query(
            "INSERT INTO definitions (instance_uuid, host, digest, taken_at_ms, record) \
             VALUES ($1, $2, $3, $4, $5) ON CONFLICT (instance_uuid) DO UPDATE SET \
             host = excluded.host, digest = excluded.digest, gone_at_ms = NULL, \
             taken_at_ms = excluded.taken_at_ms, record = excluded.record",
        )
        .bind(kept.instance.to_string())
        .bind(host.as_str())
        .bind(&kept.digest)
        .bind(signed(now_ms))
        .bind(to_json("a definition", record)?)
        .execute(&mut *tx)
        .await?;
        tx.commit().await?;
        Ok(true)
    }

    /// The definition of an instance, if one was told.
    ///
    /// # Errors
    /// The database failed.
    pub async fn kept_definition(&self, id: InstanceId) -> Result<Option<DefinitionRow>> {
        let query =
            sqlx::query("SELECT * FROM definitions WHERE instance_uuid = $1").bind(id.to_string());
        let row = self.steady(query.fetch_optional(&self.database)).await?;
        let read = |row: &AnyRow| {
            let host: String = row.try_get("host")?;
            let record: Kept = from_json("a definition", row.try_get("record")?)?;
            Ok(DefinitionRow {
                host: host
                    .parse()
                    .map_err(|e| crate::corrupt("a definition", &e))?,
                taken_at_ms: unsigned(row.try_get("taken_at_ms")?),
                kept: record.kept,
                after: record.after,
            })
        };
        // One that only a newer Drover understands is as good as none, for this guest.
        Ok(readable(row.as_slice(), read).pop())
    }

    /// Instances that were evacuated from a node, or are being so, and whose old
    /// copy it may still have. `confirmed` is left false: only a node can tell.
    ///
    /// # Errors
    /// The database failed.
    pub async fn evacuated_from(&self, host: &HostName) -> Result<Vec<(Migration, Evacuated)>> {
        let query = sqlx::query(
            "SELECT m.version, m.record, m.generation AS since, d.generation FROM migrations m \
             LEFT JOIN instances d ON d.uuid = m.instance_uuid \
             WHERE m.source_host = $1 AND m.migration_type = $2 AND m.old_copy = 1 ORDER BY m.id",
        )
        .bind(host.as_str())
        .bind(MigrationType::Evacuation.to_string());
        let rows = self.steady(query.fetch_all(&self.database)).await?;
        let mut found = Vec::new();
        for row in &rows {
            let migration = migrations::record(row)?;
            let over = migration.status == MigrationStatus::Completed;
            if migration.status.is_final() && !over {
                continue;
            }
            // The instance may be gone since: what it had when it came up elsewhere
            // is what its old copy is measured by.
            let since: Option<i64> = row.try_get("since")?;
            let now: Option<i64> = row.try_get("generation")?;
            let Some(generation) = now.max(since).map(unsigned) else {
                continue;
            };
            let evacuated = Evacuated {
                instance: migration.instance_uuid,
                migration: migration.uuid,
                // Until it is given its own the row has what the old copy has.
                generation: generation + u64::from(since.is_none() && !over),
                host: migration.dest_host.clone().filter(|_| over),
                seen: None,
                confirmed: false,
            };
            found.push((migration, evacuated));
        }
        found.extend(self.left_on(host).await?);
        Ok(found)
    }

    /// What evacuations to a node may have left there that went elsewhere since: it died
    /// before it was heard that the guest runs.
    async fn left_on(&self, host: &HostName) -> Result<Vec<(Migration, Evacuated)>> {
        let query = sqlx::query(
            "SELECT m.version, m.record, m.generation AS since, i.host AS home FROM migrations m \
             JOIN instances i ON i.uuid = m.instance_uuid AND i.generation > m.generation \
             WHERE m.dest_host = $1 AND i.host <> $1 AND m.migration_type = $2 AND m.status = $3 \
             ORDER BY m.id",
        )
        .bind(host.as_str())
        .bind(MigrationType::Evacuation.to_string())
        .bind(MigrationStatus::Failed.as_str());
        let rows = self.steady(query.fetch_all(&self.database)).await?;
        let left = |row: &AnyRow| {
            let (migration, home) = (migrations::record(row)?, row.try_get::<String, _>("home")?);
            let home = home.parse();
            let evacuated = Evacuated {
                instance: migration.instance_uuid,
                migration: migration.uuid,
                generation: unsigned(row.try_get("since")?) + 1,
                host: Some(home.map_err(|e| crate::corrupt("an instance", &e))?),
                seen: None,
                confirmed: false,
            };
            Ok((migration, evacuated))
        };
        rows.iter().map(left).collect()
    }

    /// The generation that an evacuation gives its guest: above that of the guest and of
    /// every evacuation of it, as one that failed may have left a copy with its own.
    ///
    /// # Errors
    /// [`StoreError::Fenced`], or the database failed.
    pub async fn give_generation(&self, lease: Lease, instance: InstanceId) -> Result<u64> {
        self.attempt(|| async {
            let mut tx = self.begin_under(lease).await?;
            let highest: Option<i64> = sqlx::query_scalar(
                "SELECT MAX(given.generation) FROM (SELECT generation FROM instances \
                 WHERE uuid = $1 UNION ALL SELECT generation FROM migrations \
                 WHERE instance_uuid = $1 AND uuid <> $2) AS given",
            )
            .bind(instance.to_string())
            .bind(lease.migration.to_string())
            .fetch_one(&mut *tx)
            .await?;
            let generation = highest.map_or(0, unsigned) + 1;
            give(&mut tx, lease.migration, generation).await?;
            tx.commit().await?;
            Ok(generation)
        })
        .await
    }

    /// Records that a guest was seen to run on a node after its own had died,
    /// with its new generation, and turns the claim there into the instance's own
    /// use, in one commit.
    ///
    /// # Errors
    /// [`StoreError::Fenced`], or the database failed.
    pub async fn rebuilt(
        &self,
        lease: Lease,
        instance: InstanceId,
        host: &HostName,
        generation: u64,
        now_ms: u64,
    ) -> Result<()> {
        let ids = (lease.migration, instance);
        self.attempt(|| async {
            let mut tx = self.begin_under(lease).await?;
            rebuilt(&mut tx, ids, host, generation, now_ms).await?;
            tx.commit().await?;
            Ok(())
        })
        .await
    }

    /// The same long after, for an evacuation that went by without it: only if nobody
    /// has moved the guest since. What is claimed is given back.
    ///
    /// # Errors
    /// The database failed.
    pub async fn rebuilt_late(
        &self,
        evacuation: &Migration,
        host: &HostName,
        generation: u64,
        now_ms: u64,
    ) -> Result<()> {
        let ids = (evacuation.uuid, evacuation.instance_uuid);
        self.attempt(|| async {
            let mut tx = self.begin().await?;
            match claims::is_still_on(&mut tx, evacuation, &evacuation.source_host).await? {
                true => rebuilt(&mut tx, ids, host, generation, now_ms).await?,
                false => claims::release(&mut tx, evacuation.uuid).await?,
            }
            tx.commit().await?;
            Ok(())
        })
        .await
    }

    /// The node that came back has given up its copy.
    ///
    /// # Errors
    /// The database failed.
    pub async fn old_copy_removed(&self, host: &HostName, migration: MigrationId) -> Result<()> {
        let of_source = "UPDATE migrations SET old_copy = 0 WHERE uuid = $1 AND source_host = $2";
        let of_dest = "UPDATE migrations SET generation = NULL WHERE uuid = $1 AND dest_host = $2 \
                       AND status = 'failed'";
        for statement in [of_source, of_dest] {
            self.execute(|| {
                sqlx::query(statement)
                    .bind(migration.to_string())
                    .bind(host.to_string())
            })
            .await?;
        }
        Ok(())
    }
}

async fn rebuilt(
    tx: &mut Tx,
    (migration, instance): (MigrationId, InstanceId),
    host: &HostName,
    generation: u64,
    now_ms: u64,
) -> Result<()> {
    instances::moved(tx, instance, host, now_ms).await?;
    instances::seen_in(tx, instance, PowerState::Running).await?;
    sqlx::query("UPDATE instances SET generation = $2 WHERE uuid = $1")
        .bind(instance.to_string())
        .bind(signed(generation))
        .execute(&mut **tx)
        .await?;
    give(tx, migration, generation).await?;
    claims::release(tx, migration).await
}

async fn give(tx: &mut Tx, migration: MigrationId, generation: u64) -> Result<()> {
    sqlx::query("UPDATE migrations SET generation = $2 WHERE uuid = $1")
        .bind(migration.to_string())
        .bind(signed(generation))
        .execute(&mut **tx)
        .await?;
    Ok(())
}

//! Definitions as nodes told them last, for the day on which a node is dead, and
//! which instances live elsewhere since.

use drover_model::{
    api::{compute::KeptDefinition, conductor::Evacuated},
    guest::PowerState,
    ids::{HostName, InstanceId, MigrationId},
    migration::{Migration, MigrationStatus, MigrationType},
};
use sqlx::Row;

use crate::{Result, Store, claims, from_json, instances, migrations, signed, to_json, unsigned};

/// A definition, and whose word it is.
#[derive(Debug, Clone, PartialEq)]
pub struct DefinitionRow {
    /// The node that told it.
    pub host: HostName,
    /// When, milliseconds since 1970.
    pub taken_at_ms: u64,
    /// What it told.
    pub kept: KeptDefinition,
}

impl Store {
    /// Digests of all definitions that a node has told.
    ///
    /// # Errors
    /// The database failed.
    pub async fn definition_digests(&self, host: &HostName) -> Result<Vec<(InstanceId, String)>> {
        let query = sqlx::query("SELECT instance_uuid, digest FROM definitions WHERE host = $1")
            .bind(host.as_str());
        let rows = self.steady(query.fetch_all(&self.pool)).await?;
        rows.iter()
            .map(|row| {
                let id: String = row.try_get("instance_uuid")?;
                let id = id.parse().map_err(|e| crate::corrupt("a definition", &e))?;
                Ok((id, row.try_get("digest")?))
            })
            .collect()
    }

    /// Keeps a definition in place of any older one of the instance.
    ///
    /// # Errors
    /// The database failed.
    pub async fn keep_definition(
        &self,
        host: &HostName,
        kept: &KeptDefinition,
        now_ms: u64,
    ) -> Result<()> {
        let query = sqlx::query(
            "INSERT INTO definitions (instance_uuid, host, digest, taken_at_ms, record) \
             VALUES ($1, $2, $3, $4, $5) ON CONFLICT (instance_uuid) DO UPDATE SET \
             host = excluded.host, digest = excluded.digest, \
             taken_at_ms = excluded.taken_at_ms, record = excluded.record",
        )
        .bind(kept.instance.to_string())
        .bind(host.as_str())
        .bind(&kept.digest)
        .bind(signed(now_ms))
        .bind(to_json("a definition", kept)?);
        self.steady(query.execute(&self.pool)).await?;
        Ok(())
    }

    /// The definition of an instance, if one was told.
    ///
    /// # Errors
    /// The database failed.
    pub async fn kept_definition(&self, id: InstanceId) -> Result<Option<DefinitionRow>> {
        let query =
            sqlx::query("SELECT * FROM definitions WHERE instance_uuid = $1").bind(id.to_string());
        let row = self.steady(query.fetch_optional(&self.pool)).await?;
        row.map(|row| {
            let host: String = row.try_get("host")?;
            Ok(DefinitionRow {
                host: host
                    .parse()
                    .map_err(|e| crate::corrupt("a definition", &e))?,
                taken_at_ms: unsigned(row.try_get("taken_at_ms")?),
                kept: from_json("a definition", row.try_get("record")?)?,
            })
        })
        .transpose()
    }

    /// Forgets definitions of instances that are no longer on the record.
    ///
    /// # Errors
    /// The database failed.
    pub async fn prune_definitions(&self) -> Result<()> {
        let query = sqlx::query(
            "DELETE FROM definitions WHERE instance_uuid NOT IN (SELECT uuid FROM instances)",
        );
        self.steady(query.execute(&self.pool)).await?;
        Ok(())
    }

    /// Instances that were evacuated from a node, or are being so, and whose old
    /// copy it may still have. `confirmed` is left false: only a node can tell.
    ///
    /// # Errors
    /// The database failed.
    pub async fn evacuated_from(&self, host: &HostName) -> Result<Vec<(Migration, Evacuated)>> {
        let query = sqlx::query(
            "SELECT m.version, m.record, d.generation FROM migrations m \
             JOIN instances d ON d.uuid = m.instance_uuid \
             WHERE m.source_host = $1 AND m.migration_type = $2 AND m.old_copy = 1 ORDER BY m.id",
        )
        .bind(host.as_str())
        .bind(MigrationType::Evacuation.to_string());
        let rows = self.steady(query.fetch_all(&self.pool)).await?;
        let mut found = Vec::new();
        for row in &rows {
            let migration = migrations::record(row)?;
            let generation = unsigned(row.try_get("generation")?);
            let over = migration.status == MigrationStatus::Completed;
            if migration.status.is_final() && !over {
                continue;
            }
            let evacuated = Evacuated {
                instance: migration.instance_uuid,
                migration: migration.uuid,
                // Until it is over the row has what the old copy has.
                generation: generation + u64::from(!over),
                host: migration.dest_host.clone().filter(|_| over),
                confirmed: false,
            };
            found.push((migration, evacuated));
        }
        Ok(found)
    }

    /// Records that a guest was seen to run on a node after its own had died,
    /// with its new generation, and turns the claim there into the instance's own
    /// use, in one commit.
    ///
    /// # Errors
    /// The database failed.
    pub async fn rebuilt(
        &self,
        migration: MigrationId,
        instance: InstanceId,
        host: &HostName,
        generation: u64,
        now_ms: u64,
    ) -> Result<()> {
        let work = async {
            let mut tx = self.begin().await?;
            instances::moved(&mut tx, instance, host, now_ms).await?;
            instances::seen_in(&mut tx, instance, PowerState::Running).await?;
            sqlx::query("UPDATE instances SET generation = $2 WHERE uuid = $1")
                .bind(instance.to_string())
                .bind(signed(generation))
                .execute(&mut *tx)
                .await?;
            claims::release(&mut tx, migration).await?;
            tx.commit().await?;
            Ok(())
        };
        self.steady(work).await
    }

    /// The node that came back has given up its copy.
    ///
    /// # Errors
    /// The database failed.
    pub async fn old_copy_removed(&self, host: &HostName, migration: MigrationId) -> Result<()> {
        let query =
            sqlx::query("UPDATE migrations SET old_copy = 0 WHERE uuid = $1 AND source_host = $2")
                .bind(migration.to_string())
                .bind(host.as_str());
        self.steady(query.execute(&self.pool)).await?;
        Ok(())
    }
}

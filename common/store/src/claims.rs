//! Claims: what is promised on a node to a guest that is on its way there
//! (invariant 7). What runs on a node counts once: as a claim until the
//! instance is recorded there, as an instance from then on.

use std::collections::HashMap;

use drover_model::{
    guest::PowerState,
    ids::{HostName, InstanceId, MigrationId},
    migration::Migration,
    node::{AllocationPolicy, HypervisorReport, Inventory, NodeReport},
};
use sqlx::{Any, Row, any::AnyRow};

use crate::{
    Result, Store, StoreError, database::Tx, instances, migrations::Lease, nodes, signed, unsigned,
};

/// Instances that use what they were given: one that is shut off holds neither
/// memory nor CPU time, and one that was lost with its node is not there.
const RUNS: &str = "power_state NOT IN ('\"shutdown\"', '\"crashed\"') \
     AND NOT (node_is_new = 1 AND missing_since_ms IS NOT NULL)";

/// Sums of amounts.
const SUMS: &str = "CAST(COALESCE(SUM(vcpus), 0) AS BIGINT) AS vcpus, \
     CAST(COALESCE(SUM(memory_mib), 0) AS BIGINT) AS memory_mib, \
     CAST(COALESCE(SUM(disk_bytes), 0) AS BIGINT) AS disk_bytes";

/// Amounts of what a node can give.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Resources {
    /// vCPUs.
    pub vcpus: u64,
    /// Memory, MiB.
    pub memory_mib: u64,
    /// Disk room still to be written, bytes. Disks that are there already are
    /// not counted: the file system's own figures have them.
    pub disk_bytes: u64,
}

/// A node's room.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// What runs there and what is promised.
    pub used: Resources,
    /// What may be given out.
    pub usable: Resources,
}

impl Usage {
    /// What of `wanted` does not fit.
    pub fn shortfalls(&self, wanted: &Resources) -> Vec<Shortfall> {
        let all = [
            (
                Kind::Vcpus,
                self.used.vcpus,
                self.usable.vcpus,
                wanted.vcpus,
            ),
            (
                Kind::Memory,
                self.used.memory_mib,
                self.usable.memory_mib,
                wanted.memory_mib,
            ),
            (
                Kind::Disk,
                self.used.disk_bytes,
                self.usable.disk_bytes,
                wanted.disk_bytes,
            ),
        ];
        all.into_iter()
            .filter(|(_, used, usable, wanted)| {
                *wanted > 0 && used.saturating_add(*wanted) > *usable
            })
            .map(|(kind, used, usable, wanted)| Shortfall {
                kind,
                wanted,
                used,
                usable,
            })
            .collect()
    }
}

/// A kind of resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// vCPUs.
    Vcpus,
    /// Memory, MiB.
    Memory,
    /// Disk room, bytes.
    Disk,
}

/// Something a node has too little of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shortfall {
    /// Of what.
    pub kind: Kind,
    /// How much was wanted.
    pub wanted: u64,
    /// How much is used or promised.
    pub used: u64,
    /// How much may be given out.
    pub usable: u64,
}

/// What a node may give out, from its report.
pub fn usable(inventory: &Inventory, policy: &AllocationPolicy) -> Resources {
    // Ratios are small and positive (the agent checks); sizes fit 52 bits.
    #[allow(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss
    )]
    let times = |amount: u64, ratio: f64| (amount as f64 * ratio) as u64;
    let memory = times(inventory.memory_mib, policy.ram_allocation_ratio);
    Resources {
        vcpus: times(u64::from(inventory.vcpus), policy.cpu_allocation_ratio),
        memory_mib: memory.saturating_sub(policy.reserved_memory_mib),
        disk_bytes: inventory.disk_free_bytes,
    }
}

impl Store {
    /// A node's room: what runs there, what is promised, what there is.
    ///
    /// # Errors
    /// The database failed.
    pub async fn usage(&self, report: &NodeReport) -> Result<Usage> {
        self.steady(usage(&self.database, report, None)).await
    }

    /// The room of many nodes, in their order, by one question in all.
    ///
    /// # Errors
    /// The database failed.
    pub async fn usages(&self, reports: &[&NodeReport]) -> Result<Vec<Usage>> {
        let used = self.steady(self.used_by_host()).await?;
        let usage = |report: &&NodeReport| match &report.hypervisor {
            HypervisorReport::Up { inventory, .. } => Usage {
                used: used.get(report.host.as_str()).copied().unwrap_or_default(),
                usable: usable(inventory, &report.policy),
            },
            HypervisorReport::Down { .. } => Usage::default(),
        };
        Ok(reports.iter().map(usage).collect())
    }

    async fn used_by_host(&self) -> Result<HashMap<String, Resources>> {
        let sql = format!(
            "SELECT host, {SUMS} FROM (SELECT host, vcpus, memory_mib, \
             CAST(0 AS BIGINT) AS disk_bytes FROM instances WHERE {RUNS} \
             UNION ALL SELECT host, vcpus, memory_mib, disk_bytes FROM claims) AS parts \
             GROUP BY host"
        );
        let query = sqlx::query(sqlx::AssertSqlSafe(sql));
        let rows = query.fetch_all(&self.database).await?;
        rows.iter()
            .map(|row| Ok((row.try_get("host")?, resources(row)?)))
            .collect()
    }

    /// Promises room on a node to a migration, or says what is missing. A claim
    /// that is there already is replaced, so asking twice claims once.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if the node is unknown, [`StoreError::Fenced`], or the
    /// database failed.
    pub async fn claim(
        &self,
        lease: Lease,
        host: &HostName,
        wanted: Resources,
    ) -> Result<std::result::Result<(), Vec<Shortfall>>> {
        self.attempt(|| self.try_claim(lease, host, wanted)).await
    }

    async fn try_claim(
        &self,
        lease: Lease,
        host: &HostName,
        wanted: Resources,
    ) -> Result<std::result::Result<(), Vec<Shortfall>>> {
        let migration = lease.migration;
        let mut tx = self.begin_under(lease).await?;
        let row = sqlx::query(
            "UPDATE nodes SET claim_serial = claim_serial + 1 WHERE host = $1 \
             RETURNING host, report, heard_at_ms",
        )
        .bind(host.as_str())
        .fetch_optional(&mut *tx)
        .await?;
        let row = row.ok_or_else(|| StoreError::NotFound(format!("node {host}")))?;
        let report = nodes::report(&row)?;
        let short = usage(&mut *tx, &report, Some(migration))
            .await?
            .shortfalls(&wanted);
        if !short.is_empty() {
            return Ok(Err(short));
        }
        release(&mut tx, migration).await?;
        insert(&mut tx, migration, host, wanted).await?;
        tx.commit().await?;
        Ok(Ok(()))
    }

    /// Gives a claim back. One that is gone already is no error.
    ///
    /// # Errors
    /// [`StoreError::Fenced`], or the database failed.
    pub async fn release_claim(&self, lease: Lease) -> Result<()> {
        self.attempt(|| async {
            let mut tx = self.begin_under(lease).await?;
            release(&mut tx, lease.migration).await?;
            tx.commit().await?;
            Ok(())
        })
        .await
    }

    /// Records that the guest is on a node, and turns the claim there into the
    /// instance's own use, in one commit. `state` is what it was seen in there, if
    /// that may be another than before. `keep` is claimed in its stead, for a way
    /// back.
    ///
    /// # Errors
    /// [`StoreError::Fenced`], or the database failed.
    pub async fn settle(
        &self,
        lease: Lease,
        instance: InstanceId,
        host: &HostName,
        state: Option<PowerState>,
        keep: Option<(&HostName, Resources)>,
        now_ms: u64,
    ) -> Result<()> {
        self.attempt(|| async {
            let mut tx = self.begin_under(lease).await?;
            settle(
                &mut tx,
                (lease.migration, instance),
                host,
                state,
                keep,
                now_ms,
            )
            .await?;
            tx.commit().await?;
            Ok(())
        })
        .await
    }

    /// The same long after, for a migration that went by without it. Only a guest
    /// that is still on the record where the migration `took` it from follows;
    /// one that others have moved since is left where they put it, and what is
    /// claimed for it is given back.
    ///
    /// # Errors
    /// The database failed.
    pub async fn settle_late(
        &self,
        migration: &Migration,
        took: &HostName,
        host: &HostName,
        state: Option<PowerState>,
        keep: Option<(&HostName, Resources)>,
        now_ms: u64,
    ) -> Result<()> {
        let ids = (migration.uuid, migration.instance_uuid);
        self.attempt(|| async {
            let mut tx = self.begin().await?;
            if is_still_on(&mut tx, migration, took).await? {
                settle(&mut tx, ids, host, state, keep, now_ms).await?;
            } else if keep.is_none() {
                release(&mut tx, migration.uuid).await?;
            }
            tx.commit().await?;
            Ok(())
        })
        .await
    }

    /// Migrations that hold a claim.
    ///
    /// # Errors
    /// The database failed.
    pub async fn claims(&self) -> Result<Vec<(String, Resources)>> {
        let query = sqlx::query("SELECT * FROM claims ORDER BY migration_uuid");
        let rows = self.steady(query.fetch_all(&self.database)).await?;
        rows.iter()
            .map(|row| Ok((row.try_get("migration_uuid")?, resources(row)?)))
            .collect()
    }
}

async fn settle(
    tx: &mut Tx,
    (migration, instance): (MigrationId, InstanceId),
    host: &HostName,
    state: Option<PowerState>,
    keep: Option<(&HostName, Resources)>,
    now_ms: u64,
) -> Result<()> {
    instances::moved(tx, instance, host, now_ms).await?;
    if let Some(state) = state {
        instances::seen_in(tx, instance, state).await?;
    }
    release(tx, migration).await?;
    if let Some((host, resources)) = keep {
        insert(tx, migration, host, resources).await?;
    }
    Ok(())
}

/// Whether the instance of a migration is still on a node, nobody having moved it
/// since; it is held there until this commit.
pub(crate) async fn is_still_on(
    tx: &mut Tx,
    migration: &Migration,
    host: &HostName,
) -> Result<bool> {
    let row = instances::lock(tx, migration.instance_uuid).await?;
    let newer = sqlx::query(
        "SELECT COUNT(*) AS newer FROM migrations WHERE instance_uuid = $1 AND id > $2 \
         AND status NOT IN ('failed', 'cancelled')",
    )
    .bind(migration.instance_uuid.to_string())
    .bind(migration.id)
    .fetch_one(&mut **tx)
    .await?;
    let newer: i64 = newer.try_get("newer")?;
    Ok(newer == 0 && row.is_some_and(|row| row.host == *host))
}

async fn insert(
    tx: &mut Tx,
    migration: MigrationId,
    host: &HostName,
    resources: Resources,
) -> Result<()> {
    sqlx::query(
        "INSERT INTO claims (migration_uuid, host, vcpus, memory_mib, disk_bytes) \
         VALUES ($1, $2, $3, $4, $5)",
    )
    .bind(migration.to_string())
    .bind(host.as_str())
    .bind(signed(resources.vcpus))
    .bind(signed(resources.memory_mib))
    .bind(signed(resources.disk_bytes))
    .execute(&mut **tx)
    .await?;
    Ok(())
}

pub(crate) async fn release(tx: &mut Tx, migration: MigrationId) -> Result<()> {
    sqlx::query("DELETE FROM claims WHERE migration_uuid = $1")
        .bind(migration.to_string())
        .execute(&mut **tx)
        .await?;
    Ok(())
}

/// What runs on a node and what is promised there to other migrations than
/// `except`. One statement, so that a guest that arrives meanwhile is seen either on
/// its way or there.
async fn usage(
    database: impl sqlx::Executor<'_, Database = Any>,
    report: &NodeReport,
    except: Option<MigrationId>,
) -> Result<Usage> {
    let HypervisorReport::Up { inventory, .. } = &report.hypervisor else {
        return Ok(Usage::default());
    };
    let row = sqlx::query(sqlx::AssertSqlSafe(format!(
        "SELECT {SUMS} FROM (SELECT vcpus, memory_mib, CAST(0 AS BIGINT) AS disk_bytes \
         FROM instances WHERE host = $1 AND {RUNS} \
         UNION ALL SELECT vcpus, memory_mib, disk_bytes FROM claims \
         WHERE host = $1 AND migration_uuid <> $2) AS parts"
    )))
    .bind(report.host.as_str())
    .bind(except.map_or_else(String::new, |m| m.to_string()))
    .fetch_one(database)
    .await?;
    Ok(Usage {
        used: resources(&row)?,
        usable: usable(inventory, &report.policy),
    })
}

fn resources(row: &AnyRow) -> Result<Resources> {
    Ok(Resources {
        vcpus: unsigned(row.try_get("vcpus")?),
        memory_mib: unsigned(row.try_get("memory_mib")?),
        disk_bytes: unsigned(row.try_get("disk_bytes")?),
    })
}

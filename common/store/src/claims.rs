//! Claims: what is promised on a node to a guest that is on its way there
//! (invariant 7). What runs on a node counts once: as a claim until the
//! instance is recorded there, as an instance from then on.

use std::collections::HashMap;

use drover_model::{
    guest::PowerState,
    ids::{HostName, InstanceId, MigrationId},
    node::{AllocationPolicy, HypervisorReport, Inventory, NodeReport},
};
use sqlx::{Any, Row, Transaction};

use crate::{Result, Store, from_json, signed, unsigned};

/// Instances that use what they were given: one that is shut off holds neither
/// memory nor CPU time.
const RUNS: &str = "power_state NOT IN ('\"shutdown\"', '\"crashed\"')";

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
        let work = async {
            let mut tx = self.begin().await?;
            usage(&mut tx, report, None).await
        };
        self.steady(work).await
    }

    /// The room of many nodes, in their order, by two questions in all.
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
        let mut tx = self.begin().await?;
        let running = format!(
            "SELECT host, CAST(SUM(vcpus) AS BIGINT) AS vcpus, \
             CAST(SUM(memory_mib) AS BIGINT) AS memory_mib, CAST(0 AS BIGINT) AS disk_bytes \
             FROM instances WHERE {RUNS} GROUP BY host"
        );
        let promised = "SELECT host, CAST(SUM(vcpus) AS BIGINT) AS vcpus, \
             CAST(SUM(memory_mib) AS BIGINT) AS memory_mib, \
             CAST(SUM(disk_bytes) AS BIGINT) AS disk_bytes FROM claims GROUP BY host";
        let mut used = HashMap::<String, Resources>::new();
        for sql in [running.as_str(), promised] {
            let query = sqlx::query(sqlx::AssertSqlSafe(sql.to_owned()));
            for row in query.fetch_all(&mut *tx).await? {
                let sum = used.entry(row.try_get("host")?).or_default();
                sum.vcpus += unsigned(row.try_get("vcpus")?);
                sum.memory_mib += unsigned(row.try_get("memory_mib")?);
                sum.disk_bytes += unsigned(row.try_get("disk_bytes")?);
            }
        }
        Ok(used)
    }

    /// Promises room on a node to a migration, or says what is missing. A claim
    /// that is there already is replaced, so asking twice claims once.
    ///
    /// # Errors
    /// The database failed, or the node is unknown.
    pub async fn claim(
        &self,
        migration: MigrationId,
        host: &HostName,
        wanted: Resources,
    ) -> Result<std::result::Result<(), Vec<Shortfall>>> {
        self.steady(self.claim_inner(migration, host, wanted)).await
    }

    async fn claim_inner(
        &self,
        migration: MigrationId,
        host: &HostName,
        wanted: Resources,
    ) -> Result<std::result::Result<(), Vec<Shortfall>>> {
        let mut tx = self.begin().await?;
        let row = sqlx::query(
            "UPDATE nodes SET claim_serial = claim_serial + 1 WHERE host = $1 RETURNING report",
        )
        .bind(host.as_str())
        .fetch_one(&mut *tx)
        .await?;
        let report: NodeReport = from_json("a node", row.try_get("report")?)?;
        let short = usage(&mut tx, &report, Some(migration))
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
    /// The database failed.
    pub async fn release_claim(&self, migration: MigrationId) -> Result<()> {
        let work = async {
            let mut tx = self.begin().await?;
            release(&mut tx, migration).await?;
            tx.commit().await?;
            Ok(())
        };
        self.steady(work).await
    }

    /// Records that the guest is on a node, and turns the claim there into the
    /// instance's own use, in one commit. `state` is what it was seen in there, if
    /// that may be another than before. `keep` is claimed in its stead, for a way
    /// back.
    ///
    /// # Errors
    /// The database failed.
    pub async fn settle(
        &self,
        migration: MigrationId,
        instance: InstanceId,
        host: &HostName,
        state: Option<PowerState>,
        keep: Option<(&HostName, Resources)>,
        now_ms: u64,
    ) -> Result<()> {
        let work = async {
            let mut tx = self.begin().await?;
            crate::instances::moved(&mut tx, instance, host, now_ms).await?;
            if let Some(state) = state {
                crate::instances::seen_in(&mut tx, instance, state).await?;
            }
            release(&mut tx, migration).await?;
            if let Some((host, resources)) = keep {
                insert(&mut tx, migration, host, resources).await?;
            }
            tx.commit().await?;
            Ok(())
        };
        self.steady(work).await
    }

    /// Migrations that hold a claim.
    ///
    /// # Errors
    /// The database failed.
    pub async fn claims(&self) -> Result<Vec<(String, Resources)>> {
        let query = sqlx::query("SELECT * FROM claims ORDER BY migration_uuid");
        let rows = self.steady(query.fetch_all(&self.pool)).await?;
        rows.iter()
            .map(|row| {
                let resources = Resources {
                    vcpus: unsigned(row.try_get("vcpus")?),
                    memory_mib: unsigned(row.try_get("memory_mib")?),
                    disk_bytes: unsigned(row.try_get("disk_bytes")?),
                };
                Ok((row.try_get("migration_uuid")?, resources))
            })
            .collect()
    }
}

async fn insert(
    tx: &mut Transaction<'static, Any>,
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

pub(crate) async fn release(
    tx: &mut Transaction<'static, Any>,
    migration: MigrationId,
) -> Result<()> {
    sqlx::query("DELETE FROM claims WHERE migration_uuid = $1")
        .bind(migration.to_string())
        .execute(&mut **tx)
        .await?;
    Ok(())
}

async fn usage(
    tx: &mut Transaction<'static, Any>,
    report: &NodeReport,
    except: Option<MigrationId>,
) -> Result<Usage> {
    let HypervisorReport::Up { inventory, .. } = &report.hypervisor else {
        return Ok(Usage::default());
    };
    let row = sqlx::query(sqlx::AssertSqlSafe(format!(
        "SELECT CAST(COALESCE(SUM(vcpus), 0) AS BIGINT) AS vcpus, \
         CAST(COALESCE(SUM(memory_mib), 0) AS BIGINT) AS memory_mib FROM instances \
         WHERE host = $1 AND {RUNS}"
    )))
    .bind(report.host.as_str())
    .fetch_one(&mut **tx)
    .await?;
    let mut used = Resources {
        vcpus: unsigned(row.try_get("vcpus")?),
        memory_mib: unsigned(row.try_get("memory_mib")?),
        disk_bytes: 0,
    };
    let row = sqlx::query(
        "SELECT CAST(COALESCE(SUM(vcpus), 0) AS BIGINT) AS vcpus, \
         CAST(COALESCE(SUM(memory_mib), 0) AS BIGINT) AS memory_mib, \
         CAST(COALESCE(SUM(disk_bytes), 0) AS BIGINT) AS disk_bytes FROM claims \
         WHERE host = $1 AND migration_uuid <> $2",
    )
    .bind(report.host.as_str())
    .bind(except.map_or_else(String::new, |m| m.to_string()))
    .fetch_one(&mut **tx)
    .await?;
    used.vcpus += unsigned(row.try_get("vcpus")?);
    used.memory_mib += unsigned(row.try_get("memory_mib")?);
    used.disk_bytes += unsigned(row.try_get("disk_bytes")?);
    Ok(Usage {
        used,
        usable: usable(inventory, &report.policy),
    })
}

//! Instances, adopted from what agents report (invariant 2: the hypervisor is
//! the truth; invariant 3: what is not listed is not yet gone).
//!
//! A node that lists a domain as its own owns it, unless another node that
//! still lists it does. While a migration is under way its saga says where the
//! instance is (and, of a transfer between projects, whose it is), not the
//! reports, which may be older than the switch-over.

use std::{collections::HashMap, str::FromStr};

use drover_model::{
    guest::PowerState,
    ids::{HostName, InstanceId, ProjectId},
    migration::MigrationType,
    node::{HypervisorReport, InstanceReport, NodeReport},
};
use sqlx::{Any, Row, Transaction, any::AnyRow};

use crate::{Result, Store, StoreError, corrupt, from_json, signed, to_json, unsigned};

/// For how long an instance that its node no longer lists stays on the record
/// (it may be about to turn up elsewhere), ms.
pub const FORGET_AFTER_MS: u64 = 60_000;

/// An instance as it is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InstanceRow {
    /// Domain UUID.
    pub id: InstanceId,
    /// Domain name.
    pub name: String,
    /// Owning project.
    pub project: String,
    /// Where it is.
    pub host: HostName,
    /// State there.
    pub power_state: PowerState,
    /// vCPUs.
    pub vcpus: u32,
    /// Memory, MiB.
    pub memory_mib: u64,
    /// Disks, bytes.
    pub disk_bytes: u64,
    /// Generation.
    pub generation: u64,
    /// When its row last changed, milliseconds since 1970.
    pub changed_at_ms: u64,
    /// Since when its node no longer does, milliseconds since 1970.
    pub missing_since_ms: Option<u64>,
}

/// What a report changes about the instances on the record.
#[derive(Debug, PartialEq, Eq)]
enum Change {
    /// Put this row in place of any of its id.
    Keep(Box<InstanceRow>),
    /// Its node no longer lists it, since now.
    Missing(InstanceId),
    /// Gone for long enough.
    Forget(InstanceId),
    /// Something an operator should know.
    Note(String),
}

/// Instances of which sagas know more than reports.
#[derive(Debug, Default)]
struct UnderWay {
    /// Under a migration of any kind: where they are.
    moving: Vec<InstanceId>,
    /// Those of them that go to another project: whose they are, and their names.
    changing_hands: Vec<InstanceId>,
}

/// What follows from a report, given the rows that it can touch: those of its
/// own host and those of the ids it lists.
fn reconcile(
    report: &NodeReport,
    listed: &[InstanceReport],
    rows: &HashMap<InstanceId, InstanceRow>,
    UnderWay {
        moving,
        changing_hands,
    }: &UnderWay,
    now_ms: u64,
) -> Vec<Change> {
    let mut changes = Vec::new();
    for seen in listed.iter().filter(|seen| !seen.incoming) {
        let fresh = || Change::Keep(Box::new(row_of(&report.host, seen, now_ms)));
        match rows.get(&seen.id) {
            None => changes.push(fresh()),
            Some(row) if row.host == report.host => {
                let mut next = row_of(&report.host, seen, row.changed_at_ms);
                if changing_hands.contains(&row.id) {
                    next.project.clone_from(&row.project);
                    next.name.clone_from(&row.name);
                }
                // Most reports say nothing new: they cost no write.
                if *row != next {
                    next.changed_at_ms = now_ms;
                    changes.push(Change::Keep(Box::new(next)));
                }
            }
            Some(_) if moving.contains(&seen.id) => {}
            Some(row) if row.missing_since_ms.is_some() => changes.push(fresh()),
            Some(row) if seen.power_state.is_active() => changes.push(Change::Note(format!(
                "instance {} ({}) is active on {} and on the record on {}: \
                 should this last, two copies may be running",
                seen.id, seen.name, report.host, row.host
            ))),
            Some(_) => {}
        }
    }
    let gone = |row: &&InstanceRow| {
        row.host == report.host
            && !listed
                .iter()
                .any(|seen| seen.id == row.id && !seen.incoming)
    };
    for row in rows
        .values()
        .filter(gone)
        .filter(|row| !moving.contains(&row.id))
    {
        match row.missing_since_ms {
            None => changes.push(Change::Missing(row.id)),
            Some(since) if now_ms.saturating_sub(since) > FORGET_AFTER_MS => {
                changes.push(Change::Forget(row.id));
            }
            Some(_) => {}
        }
    }
    changes
}

fn row_of(host: &HostName, seen: &InstanceReport, now_ms: u64) -> InstanceRow {
    InstanceRow {
        id: seen.id,
        name: seen.name.clone(),
        project: seen.project.clone(),
        host: host.clone(),
        power_state: seen.power_state,
        vcpus: seen.vcpus,
        memory_mib: seen.memory_mib,
        disk_bytes: seen.disk_bytes,
        generation: seen.generation,
        changed_at_ms: now_ms,
        missing_since_ms: None,
    }
}

/// Takes in the instances of a report; says what an operator should know.
pub(crate) async fn take_in(
    tx: &mut Transaction<'static, Any>,
    report: &NodeReport,
    now_ms: u64,
) -> Result<Vec<String>> {
    let HypervisorReport::Up {
        instances: listed, ..
    } = &report.hypervisor
    else {
        return Ok(Vec::new());
    };
    let mut rows = HashMap::new();
    for row in sqlx::query("SELECT * FROM instances WHERE host = $1")
        .bind(report.host.as_str())
        .fetch_all(&mut **tx)
        .await?
    {
        let row = instance(&row)?;
        rows.insert(row.id, row);
    }
    for seen in listed {
        if !rows.contains_key(&seen.id)
            && let Some(row) = by_id(tx, seen.id).await?
        {
            rows.insert(row.id, row);
        }
    }
    let under_way = under_way(tx).await?;
    let mut notes = Vec::new();
    for change in reconcile(report, listed, &rows, &under_way, now_ms) {
        match change {
            Change::Keep(row) => put(tx, &row).await?,
            Change::Missing(id) => {
                sqlx::query("UPDATE instances SET missing_since_ms = $2 WHERE uuid = $1")
                    .bind(id.to_string())
                    .bind(signed(now_ms))
                    .execute(&mut **tx)
                    .await?;
            }
            Change::Forget(id) => {
                sqlx::query("DELETE FROM instances WHERE uuid = $1")
                    .bind(id.to_string())
                    .execute(&mut **tx)
                    .await?;
            }
            Change::Note(note) => notes.push(note),
        }
    }
    Ok(notes)
}

async fn by_id(tx: &mut Transaction<'static, Any>, id: InstanceId) -> Result<Option<InstanceRow>> {
    let row = sqlx::query("SELECT * FROM instances WHERE uuid = $1")
        .bind(id.to_string())
        .fetch_optional(&mut **tx)
        .await?;
    row.as_ref().map(instance).transpose()
}

async fn under_way(tx: &mut Transaction<'static, Any>) -> Result<UnderWay> {
    let rows = sqlx::query("SELECT instance_uuid, migration_type FROM migrations WHERE active = 1")
        .fetch_all(&mut **tx)
        .await?;
    let transfer = MigrationType::ProjectTransfer.to_string();
    let mut found = UnderWay::default();
    for row in &rows {
        let id: String = row.try_get("instance_uuid")?;
        let id = id.parse().map_err(|e| corrupt("a migration", &e))?;
        found.moving.push(id);
        if row.try_get::<String, _>("migration_type")? == transfer {
            found.changing_hands.push(id);
        }
    }
    Ok(found)
}

async fn put(tx: &mut Transaction<'static, Any>, row: &InstanceRow) -> Result<()> {
    sqlx::query(
        "INSERT INTO instances (uuid, name, project_id, host, power_state, vcpus, memory_mib, \
         disk_bytes, generation, changed_at_ms, missing_since_ms) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, NULL) ON CONFLICT (uuid) DO UPDATE SET \
         name = excluded.name, project_id = excluded.project_id, host = excluded.host, \
         power_state = excluded.power_state, vcpus = excluded.vcpus, \
         memory_mib = excluded.memory_mib, disk_bytes = excluded.disk_bytes, \
         generation = excluded.generation, changed_at_ms = excluded.changed_at_ms, \
         missing_since_ms = NULL",
    )
    .bind(row.id.to_string())
    .bind(&row.name)
    .bind(&row.project)
    .bind(row.host.as_str())
    .bind(to_json("a power state", &row.power_state)?)
    .bind(i64::from(row.vcpus))
    .bind(signed(row.memory_mib))
    .bind(signed(row.disk_bytes))
    .bind(signed(row.generation))
    .bind(signed(row.changed_at_ms))
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// Puts an instance where a saga saw it run (invariant 2).
pub(crate) async fn moved(
    tx: &mut Transaction<'static, Any>,
    id: InstanceId,
    host: &HostName,
    now_ms: u64,
) -> Result<()> {
    sqlx::query(
        "UPDATE instances SET host = $2, changed_at_ms = $3, missing_since_ms = NULL WHERE uuid = $1",
    )
    .bind(id.to_string())
    .bind(host.as_str())
    .bind(signed(now_ms))
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// Records the state in which a saga saw an instance, before its node reports it.
pub(crate) async fn seen_in(
    tx: &mut Transaction<'static, Any>,
    id: InstanceId,
    state: PowerState,
) -> Result<()> {
    sqlx::query("UPDATE instances SET power_state = $2 WHERE uuid = $1")
        .bind(id.to_string())
        .bind(to_json("a power state", &state)?)
        .execute(&mut **tx)
        .await?;
    Ok(())
}

/// Gives an instance to a project, under a new name if there is one.
pub(crate) async fn handed_over(
    tx: &mut Transaction<'static, Any>,
    id: InstanceId,
    project: &ProjectId,
    name: Option<&str>,
    now_ms: u64,
) -> Result<()> {
    // Touched first by reports of its node too: one that has read the row as it
    // is now shall not write it over what is written here.
    sqlx::query(
        "UPDATE nodes SET claim_serial = claim_serial + 1 \
         WHERE host = (SELECT host FROM instances WHERE uuid = $1)",
    )
    .bind(id.to_string())
    .execute(&mut **tx)
    .await?;
    sqlx::query(
        "UPDATE instances SET project_id = $2, name = COALESCE(CAST($3 AS TEXT), name), \
         changed_at_ms = $4 WHERE uuid = $1",
    )
    .bind(id.to_string())
    .bind(project.as_str())
    .bind(name)
    .bind(signed(now_ms))
    .execute(&mut **tx)
    .await?;
    // What its old owner offered, and nobody took, is for ever void.
    sqlx::query(
        "UPDATE offers SET withdrawn = 1 WHERE instance_uuid = $1 AND (migration_uuid IS NULL \
         OR migration_uuid IN (SELECT uuid FROM migrations WHERE status IN ('failed', 'cancelled')))",
    )
    .bind(id.to_string())
    .execute(&mut **tx)
    .await?;
    Ok(())
}

impl Store {
    /// Every instance, by name; of one node or one project if asked.
    ///
    /// # Errors
    /// The database failed.
    pub async fn instances(
        &self,
        host: Option<&HostName>,
        project: Option<&str>,
    ) -> Result<Vec<InstanceRow>> {
        let query = sqlx::query(
            "SELECT * FROM instances WHERE (CAST($1 AS TEXT) IS NULL OR host = $1) \
             AND (CAST($2 AS TEXT) IS NULL OR project_id = $2) ORDER BY name, uuid",
        )
        .bind(host.map(HostName::as_str))
        .bind(project);
        let rows = self.steady(query.fetch_all(&self.pool)).await?;
        rows.iter().map(instance).collect()
    }

    /// The instance of a UUID, a unique prefix of one (4 characters at least),
    /// or a unique name.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Ambiguous`], or the database failed.
    pub async fn find_instance(&self, reference: &str) -> Result<InstanceRow> {
        let not_found = || StoreError::NotFound(format!("instance '{}'", shown(reference)));
        if let Ok(id) = InstanceId::from_str(reference) {
            let query = sqlx::query("SELECT * FROM instances WHERE uuid = $1").bind(id.to_string());
            let row = self.steady(query.fetch_optional(&self.pool)).await?;
            return instance(&row.ok_or_else(not_found)?);
        }
        let pattern = crate::migrations::uuid_pattern(reference);
        let query = sqlx::query(
            "SELECT * FROM instances WHERE name = $1 OR uuid LIKE $2 \
             ORDER BY CASE WHEN name = $1 THEN 0 ELSE 1 END LIMIT 3",
        )
        .bind(reference)
        .bind(pattern.unwrap_or_default());
        let rows = self.steady(query.fetch_all(&self.pool)).await?;
        let rows = rows.iter().map(instance).collect::<Result<Vec<_>>>()?;
        let named: Vec<_> = rows.iter().filter(|row| row.name == reference).collect();
        match (named.as_slice(), rows.as_slice()) {
            ([row], _) => Ok((*row).clone()),
            ([], [row]) => Ok(row.clone()),
            ([], []) => Err(not_found()),
            _ => Err(StoreError::Ambiguous(format!(
                "'{}' fits several instances, among them {}; say which by UUID",
                shown(reference),
                rows.iter()
                    .map(|row| row.id.to_string())
                    .collect::<Vec<_>>()
                    .join(" and ")
            ))),
        }
    }
}

/// Text from outside, fit for a message.
pub(crate) fn shown(text: &str) -> String {
    text.chars()
        .take(80)
        .map(|c| if c.is_control() { '?' } else { c })
        .collect()
}

pub(crate) fn instance(row: &AnyRow) -> Result<InstanceRow> {
    let uuid: String = row.try_get("uuid")?;
    let host: String = row.try_get("host")?;
    Ok(InstanceRow {
        id: uuid.parse().map_err(|e| corrupt("an instance", &e))?,
        name: row.try_get("name")?,
        project: row.try_get("project_id")?,
        host: host.parse().map_err(|e| corrupt("an instance", &e))?,
        power_state: from_json("an instance", row.try_get("power_state")?)?,
        vcpus: u32::try_from(row.try_get::<i64, _>("vcpus")?).unwrap_or(u32::MAX),
        memory_mib: unsigned(row.try_get("memory_mib")?),
        disk_bytes: unsigned(row.try_get("disk_bytes")?),
        generation: unsigned(row.try_get("generation")?),
        changed_at_ms: unsigned(row.try_get("changed_at_ms")?),
        missing_since_ms: row
            .try_get::<Option<i64>, _>("missing_since_ms")?
            .map(unsigned),
    })
}

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

use crate::{Result, Statement, Store, StoreError, corrupt, from_json, signed, to_json, unsigned};

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

impl InstanceRow {
    /// Whether what was found of the one holds of the other: where it is, whose, and
    /// which of its lives.
    pub(crate) fn is_where_it_was(&self, seen: &Self) -> bool {
        let place = |row: &Self| (row.host.clone(), row.project.clone(), row.generation);
        place(self) == place(seen)
    }
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
    let (mut rows, mut serials) = (HashMap::new(), HashMap::new());
    for row in sqlx::query("SELECT * FROM instances WHERE host = $1")
        .bind(report.host.as_str())
        .fetch_all(&mut **tx)
        .await?
    {
        let (row, serial) = with_serial(&row)?;
        serials.insert(row.id, serial);
        rows.insert(row.id, row);
    }
    for seen in listed {
        if !rows.contains_key(&seen.id)
            && let Some((row, serial)) = by_id(tx, seen.id).await?
        {
            serials.insert(row.id, serial);
            rows.insert(row.id, row);
        }
    }
    let under_way = under_way(tx).await?;
    let mut notes = Vec::new();
    for change in reconcile(report, listed, &rows, &under_way, now_ms) {
        match change {
            Change::Keep(row) => match serials.get(&row.id) {
                None => add(tx, &row).await?,
                Some(serial) => replace(tx, &row, *serial).await?,
            },
            Change::Missing(id) => {
                let missing = sqlx::query(
                    "UPDATE instances SET missing_since_ms = $3, serial = serial + 1 \
                     WHERE uuid = $1 AND serial = $2",
                );
                let missing = missing.bind(id.to_string()).bind(serials[&id]);
                as_it_was(tx, id, missing.bind(signed(now_ms))).await?;
            }
            Change::Forget(id) => {
                let forget = sqlx::query("DELETE FROM instances WHERE uuid = $1 AND serial = $2");
                let forget = forget.bind(id.to_string()).bind(serials[&id]);
                as_it_was(tx, id, forget).await?;
            }
            Change::Note(note) => notes.push(note),
        }
    }
    Ok(notes)
}

async fn by_id(
    tx: &mut Transaction<'static, Any>,
    id: InstanceId,
) -> Result<Option<(InstanceRow, i64)>> {
    let row = sqlx::query("SELECT * FROM instances WHERE uuid = $1")
        .bind(id.to_string())
        .fetch_optional(&mut **tx)
        .await?;
    row.as_ref().map(with_serial).transpose()
}

/// A row with its serial: it is written again only while that is the same.
fn with_serial(row: &AnyRow) -> Result<(InstanceRow, i64)> {
    Ok((instance(row)?, row.try_get("serial")?))
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

/// Puts a new instance on the record.
async fn add(tx: &mut Transaction<'static, Any>, row: &InstanceRow) -> Result<()> {
    let add = sqlx::query(
        "INSERT INTO instances (uuid, serial, name, project_id, host, power_state, vcpus, \
         memory_mib, disk_bytes, generation, changed_at_ms) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)",
    );
    let add = add.bind(row.id.to_string()).bind(0_i64);
    as_it_was(tx, row.id, values(add, row)?).await
}

/// Puts a row in place of the one of a serial.
async fn replace(tx: &mut Transaction<'static, Any>, row: &InstanceRow, serial: i64) -> Result<()> {
    let replace = sqlx::query(
        "UPDATE instances SET serial = serial + 1, name = $3, project_id = $4, host = $5, \
         power_state = $6, vcpus = $7, memory_mib = $8, disk_bytes = $9, generation = $10, \
         changed_at_ms = $11, missing_since_ms = NULL WHERE uuid = $1 AND serial = $2",
    );
    let replace = replace.bind(row.id.to_string()).bind(serial);
    as_it_was(tx, row.id, values(replace, row)?).await
}

fn values<'q>(statement: Statement<'q>, row: &InstanceRow) -> Result<Statement<'q>> {
    Ok(statement
        .bind(row.name.clone())
        .bind(row.project.clone())
        .bind(row.host.to_string())
        .bind(to_json("a power state", &row.power_state)?)
        .bind(i64::from(row.vcpus))
        .bind(signed(row.memory_mib))
        .bind(signed(row.disk_bytes))
        .bind(signed(row.generation))
        .bind(signed(row.changed_at_ms)))
}

/// Writes a row that was read before, if it is still the same.
async fn as_it_was(
    tx: &mut Transaction<'static, Any>,
    id: InstanceId,
    statement: Statement<'_>,
) -> Result<()> {
    match statement.execute(&mut **tx).await?.rows_affected() {
        1 => Ok(()),
        _ => Err(StoreError::Conflict(format!("instance {id}"))),
    }
}

/// Holds an instance against all who would change it until this commit, and those
/// who have read it from writing what they made of that.
pub(crate) async fn lock(
    tx: &mut Transaction<'static, Any>,
    id: InstanceId,
) -> Result<Option<InstanceRow>> {
    let row = sqlx::query("UPDATE instances SET serial = serial + 1 WHERE uuid = $1 RETURNING *")
        .bind(id.to_string())
        .fetch_optional(&mut **tx)
        .await?;
    row.as_ref().map(instance).transpose()
}

/// Puts an instance where a saga saw it run (invariant 2).
pub(crate) async fn moved(
    tx: &mut Transaction<'static, Any>,
    id: InstanceId,
    host: &HostName,
    now_ms: u64,
) -> Result<()> {
    sqlx::query(
        "UPDATE instances SET serial = serial + 1, host = $2, changed_at_ms = $3, \
         missing_since_ms = NULL WHERE uuid = $1",
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
    sqlx::query("UPDATE instances SET serial = serial + 1, power_state = $2 WHERE uuid = $1")
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
    sqlx::query(
        "UPDATE instances SET serial = serial + 1, project_id = $2, \
         name = COALESCE(CAST($3 AS TEXT), name), changed_at_ms = $4 WHERE uuid = $1",
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

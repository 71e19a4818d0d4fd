//! Instances, adopted from what agents report (invariant 2: the hypervisor is
//! the truth; invariant 3: what is not listed is not yet gone).
//!
//! A node that lists a domain as its own owns it, unless another node that
//! still lists it does. While a migration is under way its saga says where the
//! instance is (and, of a transfer between projects, whose it is), not what source
//! and destination report, which may be older than the switch-over; for the same
//! reason the first report of either after a move that settled does not count.
//!
//! Whoever else moves it, the record follows the copy that runs:
//!
//! ```text
//!  B lists it active, the record has it on A ─► another copy on B: nothing may be done with it
//!     A, heard after that, has it off or not at all ─► the record follows to B
//!     B has it active no longer ─► the record stays
//!     A has it active as well, twice, and B again twice after that ─► two copies run: an alarm
//! ```
//!
//! Of one node one report is on its way at a time. So the second that comes after
//! a moment was composed after it, and no clock is asked.

#[cfg(feature = "fuzzing")]
pub mod fuzzing;

use std::{collections::HashMap, str::FromStr};

use drover_model::{
    api::conductor::OtherCopy,
    guest::PowerState,
    ids::{HostName, InstanceId, ProjectId},
    migration::{MigrationStatus, MigrationType},
    node::{HypervisorReport, InstanceReport, NodeReport},
};
use serde::{Deserialize, Serialize};
use sqlx::{Row, any::AnyRow};

use crate::{
    Result, Statement, Store, StoreError, corrupt, database::Tx, from_json, nodes, outbox,
    readable, signed, to_json, unsigned,
};

/// For how long an instance that its node no longer lists stays on the record
/// (it may be about to turn up elsewhere), ms.
pub const FORGET_AFTER_MS: u64 = 60_000;
/// And in how many reports in a row: two conductors' clocks are not one, and one may
/// jump.
pub const FORGET_AFTER_REPORTS: u32 = 6;

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
    /// In how many reports in a row.
    pub missing_reports: u32,
    /// Nothing was seen of it since its node was installed anew.
    pub node_is_new: bool,
    /// What of it cannot be read, and why.
    pub unreadable: Option<String>,
    /// A copy of it that is active elsewhere.
    pub other: Option<Box<Sighting>>,
    /// Nodes whose next report may be older than a move that settled.
    pub awaited: Vec<HostName>,
}

impl InstanceRow {
    /// The copy that is active elsewhere, for whoever asks.
    pub fn other_copy(&self) -> Option<OtherCopy> {
        let other = self.other.as_ref()?;
        Some(OtherCopy {
            host: other.host.clone(),
            power_state: other.seen.power_state,
            since_ms: other.since_ms,
            both_run: other.is_alarm(),
        })
    }

    /// Whether its node lacks it since it was installed anew.
    pub fn is_lost(&self) -> bool {
        self.node_is_new && self.missing_since_ms.is_some()
    }
}

/// A copy of an instance that is active on another node than the record's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sighting {
    /// Where.
    pub host: HostName,
    /// As that node lists it.
    pub seen: InstanceReport,
    /// Since when, milliseconds since 1970; shown alone.
    pub since_ms: u64,
    /// Reports of the record's node since then that had it active too.
    pub at_home: u32,
    /// Reports of the other node since the second of those.
    pub again: u32,
}

impl Sighting {
    fn new(host: &HostName, seen: &InstanceReport, now_ms: u64) -> Self {
        Self {
            host: host.clone(),
            seen: seen.clone(),
            since_ms: now_ms,
            at_home: 0,
            again: 0,
        }
    }

    /// Whether both copies were seen to run at one time.
    pub fn is_alarm(&self) -> bool {
        self.at_home >= 2 && self.again >= 2
    }
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
    /// Its node does not list it, since now or in one more report.
    Missing(InstanceId),
    /// Gone for long enough.
    Forget(InstanceId),
    /// Something an operator should know.
    Note(String),
    /// Two copies of it run.
    Alarm(Box<InstanceRow>),
}

/// Instances of which sagas know more than reports.
#[derive(Debug, Default)]
struct UnderWay {
    /// Under a migration of any kind: where they are.
    moving: HashMap<InstanceId, Moving>,
}

/// A migration that is not over.
#[derive(Debug, Default)]
struct Moving {
    /// Nodes that hand the instance over: what they say of it does not count.
    /// None once it has arrived and waits to be confirmed.
    between: Vec<HostName>,
    /// To another project: whose it is, and its name.
    changes_hands: bool,
}

impl Moving {
    /// It waits to be confirmed: where the instance is by now is for reports to say.
    fn has_arrived(&self) -> bool {
        self.between.is_empty() && !self.changes_hands
    }
}

/// What follows from a report, given the rows that it can touch: those of its
/// own host, those that wait for it, and those of the ids it lists.
fn reconcile(
    report: &NodeReport,
    listed: &[InstanceReport],
    rows: &HashMap<InstanceId, InstanceRow>,
    under_way: &UnderWay,
    now_ms: u64,
) -> Vec<Change> {
    let host = &report.host;
    let mut changes = Vec::new();
    let by_id: HashMap<InstanceId, &InstanceReport> = listed
        .iter()
        .filter(|seen| !seen.incoming && seen.id != InstanceId::NONE)
        .map(|seen| (seen.id, seen))
        .collect();
    for seen in by_id.values().filter(|seen| !rows.contains_key(&seen.id)) {
        changes.push(Change::Keep(Box::new(row_of(host, seen, now_ms))));
    }
    for row in rows.values() {
        if row.awaited.contains(host) {
            let mut next = row.clone();
            next.awaited.retain(|awaited| awaited != host);
            changes.push(Change::Keep(Box::new(next)));
            continue;
        }
        let seen = by_id.get(&row.id).copied();
        let moving = under_way.moving.get(&row.id);
        if row.host == *host {
            changes.extend(at_home(row, seen, moving, now_ms));
        } else if moving.is_none_or(|m| !m.between.contains(host)) {
            let is_moving = moving.is_some_and(|m| !m.has_arrived());
            changes.extend(elsewhere(row, host, seen, is_moving, now_ms));
        }
    }
    changes
}

/// The record's own node reports.
fn at_home(
    row: &InstanceRow,
    seen: Option<&InstanceReport>,
    moving: Option<&Moving>,
    now_ms: u64,
) -> Vec<Change> {
    let is_active = seen.is_some_and(|seen| seen.power_state.is_active());
    // Nobody hands over what waits to be confirmed: it may be moved on by hand.
    let stands = moving.is_none_or(Moving::has_arrived);
    if let Some(other) = &row.other
        && stands
        && !is_active
    {
        let followed = row_of(&other.host, &other.seen, now_ms);
        let words = format!(
            "instance {} ({}) runs on {} and no longer on {}: the record follows",
            row.id, row.name, other.host, row.host
        );
        return vec![Change::Keep(Box::new(followed)), Change::Note(words)];
    }
    let Some(seen) = seen else {
        return gone(row, moving, now_ms);
    };
    let mut next = known(row, row_of(&row.host, seen, row.changed_at_ms));
    next.other.clone_from(&row.other);
    next.awaited.clone_from(&row.awaited);
    if moving.is_some_and(|m| m.changes_hands) {
        next.project.clone_from(&row.project);
        next.name.clone_from(&row.name);
    }
    if let Some(other) = &mut next.other {
        other.at_home = other.at_home.saturating_add(1).min(2);
    }
    // Most reports say nothing new: they cost no write.
    if *row == next {
        return Vec::new();
    }
    next.changed_at_ms = now_ms;
    vec![Change::Keep(Box::new(next))]
}

/// Its node does not list it.
fn gone(row: &InstanceRow, moving: Option<&Moving>, now_ms: u64) -> Vec<Change> {
    let missing = Change::Missing(row.id);
    match row.missing_since_ms {
        _ if moving.is_some_and(|m| !m.has_arrived()) => Vec::new(),
        None if row.node_is_new => vec![missing, Change::Note(lost(row))],
        None => vec![missing],
        // Whoever confirms or reverts has to find it.
        Some(_) if moving.is_some() => Vec::new(),
        // What its node had on a disk that is no more, nobody has removed.
        Some(_) if row.node_is_new => Vec::new(),
        Some(_) if row.missing_reports < FORGET_AFTER_REPORTS => vec![missing],
        Some(since) if now_ms.saturating_sub(since) > FORGET_AFTER_MS => {
            vec![Change::Forget(row.id), Change::Note(forgotten(row))]
        }
        Some(_) => Vec::new(),
    }
}

fn lost(row: &InstanceRow) -> String {
    format!(
        "instance {} ({}) is not on {}, which was installed anew since it was seen there: it \
         stays on the record; 'drover instance definition {}' prints how it was defined last",
        row.id, row.name, row.host, row.id
    )
}

fn forgotten(row: &InstanceRow) -> String {
    format!(
        "instance {} ({}) is off the record: {} does not list it any more; how it was defined \
         last is kept, and printed by 'drover instance definition {}'",
        row.id, row.name, row.host, row.id
    )
}

/// Another node than the record's reports.
fn elsewhere(
    row: &InstanceRow,
    host: &HostName,
    seen: Option<&InstanceReport>,
    is_moving: bool,
    now_ms: u64,
) -> Vec<Change> {
    let keep = |other: Option<Box<Sighting>>| {
        let other = InstanceRow {
            other,
            ..row.clone()
        };
        Change::Keep(Box::new(other))
    };
    let sighted = row.other.as_ref().filter(|other| other.host == *host);
    match (seen, sighted) {
        (Some(seen), _) if row.missing_since_ms.is_some() && !is_moving => {
            vec![Change::Keep(Box::new(row_of(host, seen, now_ms)))]
        }
        (Some(seen), Some(sighted)) if seen.power_state.is_active() => {
            let mut next = sighted.clone();
            next.seen = seen.clone();
            if next.at_home >= 2 {
                next.again = next.again.saturating_add(1).min(2);
            }
            if next == *sighted {
                return Vec::new();
            }
            let begins = next.is_alarm() && !sighted.is_alarm();
            let kept = keep(Some(next));
            match (begins, &kept) {
                (true, Change::Keep(row)) => vec![Change::Alarm(row.clone()), kept],
                _ => vec![kept],
            }
        }
        (_, Some(_)) => vec![keep(None)],
        (Some(seen), None) if seen.power_state.is_active() => {
            let words = format!(
                "instance {} ({}) is active on {host} and on the record on {}: nothing is done \
                 with it until one of them is seen to have it no longer",
                row.id, row.name, row.host
            );
            match &row.other {
                // One other copy is enough to stop everything.
                Some(_) => vec![Change::Note(words)],
                None => {
                    let other = Sighting::new(host, seen, now_ms);
                    vec![keep(Some(Box::new(other))), Change::Note(words)]
                }
            }
        }
        _ => Vec::new(),
    }
}

/// Of one that cannot be read, what was read before.
fn known(row: &InstanceRow, mut next: InstanceRow) -> InstanceRow {
    if next.unreadable.is_none() {
        return next;
    }
    let or = |now: u64, before: u64| if now == 0 { before } else { now };
    next.memory_mib = or(next.memory_mib, row.memory_mib);
    next.disk_bytes = or(next.disk_bytes, row.disk_bytes);
    next.generation = or(next.generation, row.generation);
    if next.vcpus == 0 {
        next.vcpus = row.vcpus;
    }
    if next.project.is_empty() {
        next.project.clone_from(&row.project);
    }
    if next.name.is_empty() {
        next.name.clone_from(&row.name);
    }
    next
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
        missing_reports: 0,
        node_is_new: false,
        unreadable: seen.unreadable.clone(),
        other: None,
        awaited: Vec::new(),
    }
}

/// Takes in the instances of a report; says what an operator should know.
pub(crate) async fn take_in(tx: &mut Tx, report: &NodeReport, now_ms: u64) -> Result<Vec<String>> {
    let HypervisorReport::Up {
        instances: listed, ..
    } = &report.hypervisor
    else {
        return Ok(Vec::new());
    };
    let (mut rows, mut serials) = (HashMap::new(), HashMap::new());
    for row in sqlx::query(
        "SELECT * FROM instances WHERE host = $1 OR awaited IS NOT NULL OR other_copy IS NOT NULL",
    )
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
                    "UPDATE instances SET serial = serial + 1, missing_reports = \
                     CASE WHEN missing_since_ms IS NULL THEN 1 ELSE missing_reports + 1 END, \
                     missing_since_ms = COALESCE(missing_since_ms, $3) \
                     WHERE uuid = $1 AND serial = $2",
                );
                let missing = missing.bind(id.to_string()).bind(serials[&id]);
                as_it_was(tx, id, missing.bind(signed(now_ms))).await?;
            }
            Change::Forget(id) => {
                let forget = sqlx::query("DELETE FROM instances WHERE uuid = $1 AND serial = $2");
                let forget = forget.bind(id.to_string()).bind(serials[&id]);
                as_it_was(tx, id, forget).await?;
                outbox::put(tx, &farewell(&rows[&id])).await?;
            }
            Change::Note(note) => notes.push(note),
            Change::Alarm(row) => {
                notes.push(alarm(&row));
                outbox::put(tx, &notification(&row)).await?;
            }
        }
    }
    Ok(notes)
}

async fn by_id(tx: &mut Tx, id: InstanceId) -> Result<Option<(InstanceRow, i64)>> {
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

fn alarm(row: &InstanceRow) -> String {
    let other = row.other.as_ref().map_or("?", |other| other.host.as_str());
    format!(
        "TWO COPIES of instance {} ({}) run: on {} and on {other}; stop one of them",
        row.id, row.name, row.host
    )
}

fn notification(row: &InstanceRow) -> outbox::Notification {
    let other = row.other.as_ref().map(|other| other.host.to_string());
    let payload = serde_json::json!({
        "instance_uuid": row.id, "display_name": row.name, "tenant_id": row.project,
        "host": row.host, "other_host": other, "message": alarm(row),
    });
    outbox::Notification::new("instance.two_copies", "ERROR", payload)
}

fn farewell(row: &InstanceRow) -> outbox::Notification {
    let payload = serde_json::json!({
        "instance_uuid": row.id, "display_name": row.name, "tenant_id": row.project,
        "host": row.host, "message": forgotten(row),
    });
    outbox::Notification::new("instance.forgotten", "WARN", payload)
}

async fn under_way(tx: &mut Tx) -> Result<UnderWay> {
    let rows = sqlx::query(
        "SELECT instance_uuid, migration_type, status, source_host, dest_host FROM migrations \
         WHERE active = 1",
    )
    .fetch_all(&mut **tx)
    .await?;
    let transfer = MigrationType::ProjectTransfer.to_string();
    let mut found = UnderWay::default();
    for row in &rows {
        let id: String = row.try_get("instance_uuid")?;
        let id = id.parse().map_err(|e| corrupt("a migration", &e))?;
        let mut hosts: Vec<String> = vec![row.try_get("source_host")?];
        hosts.extend(row.try_get::<Option<String>, _>("dest_host")?);
        if row.try_get::<String, _>("status")? == MigrationStatus::Finished.as_str() {
            hosts.clear();
        }
        let hosts = hosts.iter().map(|host| host.parse());
        let between = hosts.collect::<std::result::Result<_, _>>();
        let moving = Moving {
            between: between.map_err(|e| corrupt("a migration", &e))?,
            changes_hands: row.try_get::<String, _>("migration_type")? == transfer,
        };
        found.moving.insert(id, moving);
    }
    Ok(found)
}

/// Puts a new instance on the record.
async fn add(tx: &mut Tx, row: &InstanceRow) -> Result<()> {
    let add = sqlx::query(
        "INSERT INTO instances (uuid, serial, name, project_id, host, power_state, vcpus, \
         memory_mib, disk_bytes, generation, changed_at_ms, missing_since_ms, unreadable, \
         other_copy, awaited, missing_reports, node_is_new) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17)",
    );
    let add = add.bind(row.id.to_string()).bind(0_i64);
    as_it_was(tx, row.id, values(add, row)?).await
}

/// Puts a row in place of the one of a serial.
async fn replace(tx: &mut Tx, row: &InstanceRow, serial: i64) -> Result<()> {
    let replace = sqlx::query(
        "UPDATE instances SET serial = serial + 1, name = $3, project_id = $4, host = $5, \
         power_state = $6, vcpus = $7, memory_mib = $8, disk_bytes = $9, generation = $10, \
         changed_at_ms = $11, missing_since_ms = $12, unreadable = $13, other_copy = $14, \
         awaited = $15, missing_reports = $16, node_is_new = $17 \
         WHERE uuid = $1 AND serial = $2",
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
        .bind(signed(row.changed_at_ms))
        .bind(row.missing_since_ms.map(signed))
        .bind(row.unreadable.clone())
        .bind(other_copy(row)?)
        .bind(awaited(&row.awaited)?)
        .bind(i64::from(row.missing_reports))
        .bind(i64::from(row.node_is_new)))
}

fn other_copy(row: &InstanceRow) -> Result<Option<String>> {
    let other = row.other.as_ref();
    other.map(|other| to_json("a copy", other)).transpose()
}

/// Writes a row that was read before, if it is still the same.
async fn as_it_was(tx: &mut Tx, id: InstanceId, statement: Statement<'_>) -> Result<()> {
    match statement.execute(&mut **tx).await?.rows_affected() {
        1 => Ok(()),
        _ => Err(StoreError::Conflict(format!("instance {id}"))),
    }
}

/// Holds an instance against all who would change it until this commit, and those
/// who have read it from writing what they made of that.
pub(crate) async fn lock(tx: &mut Tx, id: InstanceId) -> Result<Option<InstanceRow>> {
    let row = sqlx::query("UPDATE instances SET serial = serial + 1 WHERE uuid = $1 RETURNING *")
        .bind(id.to_string())
        .fetch_optional(&mut **tx)
        .await?;
    row.as_ref().map(instance).transpose()
}

/// A node was installed anew: what of its guests it does not list from now on, nobody
/// has removed.
pub(crate) async fn node_is_new(tx: &mut Tx, host: &HostName) -> Result<()> {
    sqlx::query("UPDATE instances SET serial = serial + 1, node_is_new = 1 WHERE host = $1")
        .bind(host.as_str())
        .execute(&mut **tx)
        .await?;
    Ok(())
}

/// Guests of a node that will not come back: those with a copy elsewhere are on the
/// record there from now on. Gives the others.
pub(crate) async fn leave(tx: &mut Tx, host: &HostName, now_ms: u64) -> Result<Vec<InstanceRow>> {
    let rows = sqlx::query("SELECT * FROM instances WHERE host = $1 ORDER BY name, uuid")
        .bind(host.as_str())
        .fetch_all(&mut **tx)
        .await?;
    if rows.is_empty() {
        return Ok(Vec::new());
    }
    let copies = listed_elsewhere(tx, host).await?;
    let mut left = Vec::new();
    for (row, serial) in rows.iter().map(with_serial).collect::<Result<Vec<_>>>()? {
        let active = row.other.as_ref().map(|other| (&other.host, &other.seen));
        let listed = copies.get(&row.id).map(|(host, seen)| (host, seen));
        match active.or(listed) {
            Some((home, seen)) => {
                let moved = known(&row, row_of(home, seen, now_ms));
                replace(tx, &moved, serial).await?;
            }
            None => left.push(row),
        }
    }
    Ok(left)
}

/// Second copies that were seen on a node which will not come back are no more.
pub(crate) async fn lose_sight(tx: &mut Tx, host: &HostName) -> Result<()> {
    let rows = sqlx::query("SELECT * FROM instances WHERE other_copy IS NOT NULL")
        .fetch_all(&mut **tx)
        .await?;
    for (mut row, serial) in rows.iter().map(with_serial).collect::<Result<Vec<_>>>()? {
        if row.other.take_if(|other| other.host == *host).is_some() {
            replace(tx, &row, serial).await?;
        }
    }
    Ok(())
}

/// What other nodes listed last, by guest; of several an active one counts, or the
/// newest.
async fn listed_elsewhere(
    tx: &mut Tx,
    host: &HostName,
) -> Result<HashMap<InstanceId, (HostName, InstanceReport)>> {
    let rows = sqlx::query("SELECT * FROM nodes WHERE host <> $1")
        .bind(host.as_str())
        .fetch_all(&mut **tx)
        .await?;
    let mut copies: HashMap<InstanceId, (HostName, InstanceReport)> = HashMap::new();
    let rank = |seen: &InstanceReport| (seen.power_state.is_active(), seen.generation);
    for report in readable(&rows, nodes::report) {
        let HypervisorReport::Up { instances, .. } = report.hypervisor else {
            continue;
        };
        for seen in instances.into_iter().filter(|seen| !seen.incoming) {
            let better = copies
                .get(&seen.id)
                .is_none_or(|(_, other)| rank(other) < rank(&seen));
            if better {
                copies.insert(seen.id, (report.host.clone(), seen));
            }
        }
    }
    Ok(copies)
}

/// Takes guests from the record that are nowhere any more.
pub(crate) async fn forget(tx: &mut Tx, guests: &[InstanceRow]) -> Result<()> {
    for guest in guests {
        let forget = sqlx::query("DELETE FROM instances WHERE uuid = $1");
        forget.bind(guest.id.to_string()).execute(&mut **tx).await?;
    }
    Ok(())
}

/// None is none, so that those that wait are found.
fn awaited(hosts: &[HostName]) -> Result<Option<String>> {
    match hosts {
        [] => Ok(None),
        hosts => to_json("awaited nodes", &hosts).map(Some),
    }
}

/// Puts an instance where a saga saw it run (invariant 2).
pub(crate) async fn moved(tx: &mut Tx, id: InstanceId, host: &HostName, now_ms: u64) -> Result<()> {
    let mut hosts = vec![host.clone()];
    if let Some((row, _)) = by_id(tx, id).await?
        && row.host != *host
    {
        hosts.push(row.host);
    }
    sqlx::query(
        "UPDATE instances SET serial = serial + 1, host = $2, changed_at_ms = $3, \
         missing_since_ms = NULL, missing_reports = 0, node_is_new = 0, other_copy = NULL, \
         awaited = $4 WHERE uuid = $1",
    )
    .bind(id.to_string())
    .bind(host.as_str())
    .bind(signed(now_ms))
    .bind(awaited(&hosts)?)
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// Records the state in which a saga saw an instance, before its node reports it.
pub(crate) async fn seen_in(tx: &mut Tx, id: InstanceId, state: PowerState) -> Result<()> {
    sqlx::query("UPDATE instances SET serial = serial + 1, power_state = $2 WHERE uuid = $1")
        .bind(id.to_string())
        .bind(to_json("a power state", &state)?)
        .execute(&mut **tx)
        .await?;
    Ok(())
}

/// Gives an instance to a project, under a new name if there is one.
pub(crate) async fn handed_over(
    tx: &mut Tx,
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
        let rows = self.steady(query.fetch_all(&self.database)).await?;
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
            let row = self.steady(query.fetch_optional(&self.database)).await?;
            return instance(&row.ok_or_else(not_found)?);
        }
        let pattern = crate::migrations::uuid_pattern(reference);
        let query = sqlx::query(
            "SELECT * FROM instances WHERE name = $1 OR uuid LIKE $2 \
             ORDER BY CASE WHEN name = $1 THEN 0 ELSE 1 END LIMIT 3",
        )
        .bind(reference)
        .bind(pattern.unwrap_or_default());
        let rows = self.steady(query.fetch_all(&self.database)).await?;
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
        missing_reports: u32::try_from(row.try_get::<i64, _>("missing_reports")?).unwrap_or(0),
        node_is_new: row.try_get::<i64, _>("node_is_new")? != 0,
        unreadable: row.try_get("unreadable")?,
        other: json(row, "other_copy")?,
        awaited: json(row, "awaited")?.unwrap_or_default(),
    })
}

fn json<T: serde::de::DeserializeOwned>(row: &AnyRow, column: &str) -> Result<Option<T>> {
    let text: Option<String> = row.try_get(column)?;
    text.map(|text| from_json("an instance", &text)).transpose()
}

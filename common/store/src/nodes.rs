//! Nodes: their agents' last word, and whether they are open.

use drover_model::{
    ids::HostName,
    node::{AllocationPolicy, Endpoint, HypervisorReport, NodeReport},
};
use serde::{Deserialize, Serialize};
use sqlx::{Row, any::AnyRow};

use crate::{
    Result, Store, StoreError, agents, corrupt, hearing::AgentState, instances, signed, to_json,
    unsigned,
};

/// A node as it is kept.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeRow {
    /// Its last report.
    pub report: NodeReport,
    /// When it was last heard of, by a conductor's clock, milliseconds since 1970.
    pub heard_at_ms: u64,
    /// For how long the conductor has listened for it in vain, ms; none if nobody
    /// listens in this process.
    pub silent_ms: Option<u64>,
    /// Its agent.
    pub agent: AgentState,
    /// Whether it is open for instances to come.
    pub enabled: bool,
    /// Why it is not.
    pub disabled_reason: Option<String>,
    /// Whether an operator declared it down, whatever it says.
    pub forced_down: bool,
}

/// Which of a node's reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReportPlace {
    incarnation: u64,
    sequence: u64,
}

impl From<&NodeReport> for ReportPlace {
    fn from(report: &NodeReport) -> Self {
        Self {
            incarnation: report.incarnation,
            sequence: report.sequence,
        }
    }
}

/// What of a report puts it in order, whoever wrote it.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Place {
    incarnation: u64,
    sequence: u64,
    agent_started_ms: u64,
}

/// The last report in a node's row. One that cannot be read, as a newer conductor kept
/// it, costs the node nothing but its hypervisor, until its next report.
pub(crate) fn report(row: &AnyRow) -> Result<NodeReport> {
    let (host, text): (String, String) = (row.try_get("host")?, row.try_get("report")?);
    let read = serde_json::from_str(&text);
    let error = match read {
        Ok(report) => return Ok(report),
        Err(error) => error,
    };
    tracing::warn!(host, %error, "its report on the record cannot be read here");
    let place: Place = serde_json::from_str(&text).unwrap_or_default();
    let host: HostName = host.parse().map_err(|e| corrupt("a node", &e))?;
    Ok(NodeReport {
        agent_version: String::new(),
        agent_started_ms: place.agent_started_ms,
        incarnation: place.incarnation,
        sequence: place.sequence,
        clock_ms: unsigned(row.try_get("heard_at_ms")?),
        endpoint: Endpoint {
            address: host.to_string(),
            libvirt_uri: String::new(),
            libvirt_port: 0,
        },
        policy: AllocationPolicy::default(),
        hypervisor: HypervisorReport::Down {
            reason: format!("its report on the record is of a newer Drover: {error}"),
        },
        host,
    })
}

/// What became of a report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reported {
    /// It is on the record.
    Kept {
        /// What was noticed about instances, in words.
        notes: Vec<String>,
    },
    /// A newer one was there already.
    Stale,
    /// It is not the word of the node's agent.
    Stranger {
        /// In words.
        reason: String,
    },
}

impl Store {
    /// Takes in an agent's report, and the instances it lists with it.
    ///
    /// # Errors
    /// The database failed.
    pub async fn record_report(&self, report: &NodeReport, heard_at_ms: u64) -> Result<Reported> {
        self.attempt(|| self.try_record_report(report, heard_at_ms))
            .await
    }

    async fn try_record_report(&self, report: &NodeReport, heard_at_ms: u64) -> Result<Reported> {
        let mut tx = self.begin().await?;
        let current = agents::incarnation(&mut tx, &report.host).await?;
        if let Some(reason) = stranger(report, current) {
            return Ok(Reported::Stranger { reason });
        }
        // Reports of one node wait for each other here, so that the newest stays.
        let row = sqlx::query(
            "UPDATE nodes SET claim_serial = claim_serial WHERE host = $1 RETURNING report",
        )
        .bind(report.host.as_str())
        .fetch_optional(&mut *tx)
        .await?;
        if let Some(row) = row {
            let text: String = row.try_get("report")?;
            let last: Place = serde_json::from_str(&text).unwrap_or_default();
            // One that is too old to register counts anew at each start.
            let anew = report.incarnation == 0 && last.agent_started_ms != report.agent_started_ms;
            let order = (report.incarnation, report.sequence);
            if (last.incarnation, last.sequence) >= order && !anew {
                return Ok(Reported::Stale);
            }
        }
        sqlx::query(
            "INSERT INTO nodes (host, enabled, heard_at_ms, report, claim_serial) \
             VALUES ($1, 1, $2, $3, 0) ON CONFLICT (host) \
             DO UPDATE SET heard_at_ms = excluded.heard_at_ms, report = excluded.report",
        )
        .bind(report.host.as_str())
        .bind(signed(heard_at_ms))
        .bind(to_json("a report", report)?)
        .execute(&mut *tx)
        .await?;
        let notes = instances::take_in(&mut tx, report, heard_at_ms).await?;
        tx.commit().await?;
        self.hearing.note(&report.host);
        Ok(Reported::Kept { notes })
    }

    /// Notes that a node's agent was heard of, other than by a report.
    ///
    /// # Errors
    /// The database failed.
    pub async fn heard(&self, host: &HostName, now_ms: u64) -> Result<()> {
        let statement = "UPDATE nodes SET heard_at_ms = $2 WHERE host = $1 AND heard_at_ms < $2";
        self.execute(|| {
            sqlx::query(statement)
                .bind(host.to_string())
                .bind(signed(now_ms))
        })
        .await?;
        self.hearing.note(host);
        Ok(())
    }

    /// Every node, by name.
    ///
    /// # Errors
    /// The database failed.
    pub async fn nodes(&self) -> Result<Vec<NodeRow>> {
        let rows =
            self.steady(sqlx::query("SELECT * FROM nodes ORDER BY host").fetch_all(&self.database));
        rows.await?.iter().map(|row| self.node_of(row)).collect()
    }

    /// One node.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], or the database failed.
    pub async fn node(&self, host: &HostName) -> Result<NodeRow> {
        let known = self.known_node(host).await?;
        known.ok_or_else(|| StoreError::NotFound(format!("node {host}")))
    }

    /// One node, if it has ever reported.
    ///
    /// # Errors
    /// The database failed.
    pub async fn known_node(&self, host: &HostName) -> Result<Option<NodeRow>> {
        let query = sqlx::query("SELECT * FROM nodes WHERE host = $1").bind(host.as_str());
        let row = self.steady(query.fetch_optional(&self.database)).await?;
        row.as_ref().map(|row| self.node_of(row)).transpose()
    }

    /// Opens or closes a node for instances to come.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], or the database failed.
    pub async fn set_node(
        &self,
        host: &HostName,
        enabled: bool,
        reason: Option<&str>,
    ) -> Result<NodeRow> {
        let statement = "UPDATE nodes SET enabled = $2, disabled_reason = $3 WHERE host = $1";
        self.execute(|| {
            sqlx::query(statement)
                .bind(host.to_string())
                .bind(i64::from(enabled))
                .bind(reason.filter(|_| !enabled).map(ToOwned::to_owned))
        })
        .await?;
        self.node(host).await
    }

    /// Declares a node down, or takes that back.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], or the database failed.
    pub async fn force_down(&self, host: &HostName, forced_down: bool) -> Result<NodeRow> {
        let statement = "UPDATE nodes SET forced_down = $2 WHERE host = $1";
        self.execute(|| {
            sqlx::query(statement)
                .bind(host.to_string())
                .bind(i64::from(forced_down))
        })
        .await?;
        self.node(host).await
    }

    fn node_of(&self, row: &AnyRow) -> Result<NodeRow> {
        let report = report(row)?;
        Ok(NodeRow {
            heard_at_ms: unsigned(row.try_get("heard_at_ms")?),
            silent_ms: self.hearing.silent_ms(&report.host),
            agent: self.hearing.state(&report.host),
            enabled: row.try_get::<i64, _>("enabled")? != 0,
            disabled_reason: row.try_get("disabled_reason")?,
            forced_down: row.try_get::<i64, _>("forced_down")? != 0,
            report,
        })
    }
}

/// Why a report is not the word of the node's agent.
fn stranger(report: &NodeReport, current: Option<u64>) -> Option<String> {
    let (host, own) = (&report.host, report.incarnation);
    match current.unwrap_or(0) {
        current if current == own => None,
        current if current > own => Some(format!(
            "incarnation {own} of the agent of {host} was followed by {current}"
        )),
        _ => Some(format!(
            "nobody here gave incarnation {own} to the agent of {host}: it has to register anew"
        )),
    }
}

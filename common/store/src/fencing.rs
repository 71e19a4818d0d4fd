//! Power that was cut, counted here so that limits hold over restarts and for
//! all conductors; and nodes whose agent is lost.
//!
//! Whoever is to cut a node's power writes that down first, in one commit with
//! the check that it still may: that its lease is the newest, that the node was
//! not heard of meanwhile, that nobody else is at it, and that the limits allow
//! it.

use std::collections::BTreeSet;

use drover_model::{
    check::CheckCode,
    evidence::{AgentLost, Life},
    ids::{HostName, OperationId},
};
use sqlx::{Row, any::AnyRow};

use crate::{
    Result, Store, StoreError, Term, agents, corrupt,
    database::Tx,
    from_json,
    operations::OperationLease,
    outbox::{self, Notification},
    readable, signed, to_json, unsigned,
};

/// Over which time fences are counted, ms.
const COUNTED_MS: u64 = 3_600_000;

/// Most fences within an hour that nobody asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FenceLimits {
    /// In the whole cloud.
    pub cloud: u32,
    /// Of one node.
    pub node: u32,
}

/// A fence that is about to be used.
#[derive(Debug, Clone)]
pub struct FenceClaim<'a> {
    /// Which node.
    pub host: &'a HostName,
    /// By which operation, and the right to drive it.
    pub lease: OperationLease,
    /// Which conductor.
    pub conductor: &'a str,
    /// Now, and how long it may take.
    pub term: Term,
    /// What was heard of the node last, by the evidence.
    pub life: Option<Life>,
    /// When, milliseconds since 1970: for an agent that never registered.
    pub heard_at_ms: u64,
    /// What is to be kept; none if somebody asked for it.
    pub limits: Option<FenceLimits>,
}

/// Why a node's power may not be cut now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FenceRefusal {
    /// So many nodes were fenced within the hour.
    Cloud(u32),
    /// The node was fenced so many times within the hour.
    Node(u32),
    /// It was heard of since the evidence was taken.
    Heard,
    /// Another conductor may be at it still.
    UnderWay {
        /// Which.
        conductor: String,
        /// Until when, milliseconds since 1970.
        until_ms: u64,
    },
}

/// Fences that count.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Fenced(Vec<HostName>);

impl Fenced {
    /// Which of two limits is reached for a node.
    pub fn refusal(&self, host: &HostName, limits: FenceLimits) -> Option<FenceRefusal> {
        let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let of_node = number(self.0.iter().filter(|h| *h == host).count());
        let in_all = number(self.0.len());
        if of_node >= limits.node {
            return Some(FenceRefusal::Node(of_node));
        }
        (in_all >= limits.cloud).then_some(FenceRefusal::Cloud(in_all))
    }
}

impl Store {
    /// Writes down that a node's power is about to be cut, or says why it may
    /// not be. Asked again for the same operation it is one fence.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] for a lease that is no longer the newest;
    /// [`StoreError::NotFound`]; or the database failed.
    pub async fn claim_fence(
        &self,
        claim: &FenceClaim<'_>,
    ) -> Result<std::result::Result<(), FenceRefusal>> {
        self.steady(self.claim_fence_inner(claim)).await
    }

    async fn claim_fence_inner(
        &self,
        claim: &FenceClaim<'_>,
    ) -> Result<std::result::Result<(), FenceRefusal>> {
        let now_ms = self.lease_clock_ms(claim.term).await?;
        let mut tx = self.begin().await?;
        // A lock that both databases have: fences are counted one by one.
        sqlx::query("UPDATE switches SET is_on = 0 WHERE name = 'fences'")
            .execute(&mut *tx)
            .await?;
        let operation = claim.lease.operation;
        let row = sqlx::query("SELECT epoch FROM operations WHERE uuid = $1")
            .bind(operation.to_string())
            .fetch_optional(&mut *tx)
            .await?;
        let row = row.ok_or_else(|| StoreError::NotFound(format!("operation {operation}")))?;
        if row.try_get::<i64, _>("epoch")? != claim.lease.epoch {
            return Err(StoreError::Fenced(format!("operation {operation}")));
        }
        if was_heard(&mut tx, claim).await? {
            return Ok(Err(FenceRefusal::Heard));
        }
        if let Some(refusal) = other_at_it(&mut tx, claim, now_ms).await? {
            return Ok(Err(refusal));
        }
        if let Some(limits) = claim.limits {
            let fenced = fenced(&mut tx, now_ms, Some(operation)).await?;
            if let Some(refusal) = fenced.refusal(claim.host, limits) {
                return Ok(Err(refusal));
            }
        }
        // What counts no more is of no use.
        sqlx::query("DELETE FROM fences WHERE at_ms <= $1 AND until_ms <= $2")
            .bind(signed(now_ms.saturating_sub(COUNTED_MS)))
            .bind(signed(now_ms))
            .execute(&mut *tx)
            .await?;
        sqlx::query(
            "INSERT INTO fences (operation_uuid, host, conductor, at_ms, until_ms) \
             VALUES ($1, $2, $3, $4, $5) ON CONFLICT (operation_uuid) \
             DO UPDATE SET conductor = excluded.conductor, until_ms = excluded.until_ms",
        )
        .bind(operation.to_string())
        .bind(claim.host.as_str())
        .bind(claim.conductor)
        .bind(signed(now_ms))
        .bind(signed(now_ms.saturating_add(claim.term.lease_ms)))
        .execute(&mut *tx)
        .await?;
        tx.commit().await?;
        Ok(Ok(()))
    }

    /// The fencing agent has answered: nobody is at it any more.
    ///
    /// # Errors
    /// The database failed.
    pub async fn fence_ended(&self, operation: OperationId) -> Result<()> {
        let query = sqlx::query("UPDATE fences SET until_ms = 0 WHERE operation_uuid = $1")
            .bind(operation.to_string());
        self.steady(query.execute(&self.database)).await?;
        Ok(())
    }

    /// Fences used within the last hour, whoever asked for them.
    ///
    /// # Errors
    /// The database failed.
    pub async fn fenced(&self, now_ms: u64) -> Result<Fenced> {
        let term = Term {
            now_ms,
            lease_ms: 0,
        };
        let reading = async {
            let now_ms = self.lease_clock_ms(term).await?;
            let mut tx = self.begin().await?;
            fenced(&mut tx, now_ms, None).await
        };
        self.steady(reading).await
    }

    /// Notes that a node's agent is lost, with what is told of it if that is news;
    /// says whether it is: it was not, or for other reasons.
    ///
    /// # Errors
    /// The database failed.
    pub async fn set_agent_lost(
        &self,
        host: &HostName,
        lost: &AgentLost,
        told: &Notification,
    ) -> Result<bool> {
        self.steady(self.set_agent_lost_inner(host, lost, told))
            .await
    }

    async fn set_agent_lost_inner(
        &self,
        host: &HostName,
        lost: &AgentLost,
        told: &Notification,
    ) -> Result<bool> {
        let mut tx = self.begin().await?;
        let row = sqlx::query("SELECT record FROM agents_lost WHERE host = $1")
            .bind(host.as_str())
            .fetch_optional(&mut *tx)
            .await?;
        let before = row.as_ref().and_then(|row| agent_lost(row).ok());
        let mut after = lost.clone();
        if let Some(before) = &before {
            after.since_ms = before.since_ms;
        }
        let is_news = before.is_none_or(|before| kinds(&before) != kinds(&after));
        sqlx::query(
            "INSERT INTO agents_lost (host, record) VALUES ($1, $2) \
             ON CONFLICT (host) DO UPDATE SET record = excluded.record",
        )
        .bind(host.as_str())
        .bind(to_json("a lost agent", &after)?)
        .execute(&mut *tx)
        .await?;
        if is_news {
            outbox::put(&mut tx, told).await?;
        }
        tx.commit().await?;
        Ok(is_news)
    }

    /// A node's agent is no longer lost: it was heard of, or the node is known to
    /// be dead. Says whether it was.
    ///
    /// # Errors
    /// The database failed.
    pub async fn clear_agent_lost(&self, host: &HostName) -> Result<bool> {
        let query = sqlx::query("DELETE FROM agents_lost WHERE host = $1").bind(host.as_str());
        let done = self.steady(query.execute(&self.database)).await?;
        Ok(done.rows_affected() > 0)
    }

    /// What is known of a node whose agent is lost.
    ///
    /// # Errors
    /// The database failed.
    pub async fn agent_lost(&self, host: &HostName) -> Result<Option<AgentLost>> {
        let query =
            sqlx::query("SELECT record FROM agents_lost WHERE host = $1").bind(host.as_str());
        let row = self.steady(query.fetch_optional(&self.database)).await?;
        Ok(readable(row.as_slice(), agent_lost).pop())
    }

    /// Nodes whose agents are lost.
    ///
    /// # Errors
    /// The database failed.
    pub async fn agents_lost(&self) -> Result<Vec<HostName>> {
        let query = sqlx::query("SELECT host FROM agents_lost ORDER BY host");
        let rows = self.steady(query.fetch_all(&self.database)).await?;
        rows.iter().map(host).collect()
    }
}

/// Which kinds of reasons there are; words change from look to look.
fn kinds(lost: &AgentLost) -> BTreeSet<CheckCode> {
    lost.reasons.iter().map(|reason| reason.code).collect()
}

/// Whether the node was heard of since the evidence was taken.
async fn was_heard(tx: &mut Tx, claim: &FenceClaim<'_>) -> Result<bool> {
    if let Some(life) = agents::life(tx, claim.host).await?
        && let Some(known) = claim.life
    {
        return Ok(life > known);
    }
    let row = sqlx::query("SELECT heard_at_ms FROM nodes WHERE host = $1")
        .bind(claim.host.as_str())
        .fetch_optional(&mut **tx)
        .await?;
    let row = row.ok_or_else(|| StoreError::NotFound(format!("node {}", claim.host)))?;
    Ok(unsigned(row.try_get("heard_at_ms")?) > claim.heard_at_ms)
}

/// Another conductor that had begun and whose time is not up. One that comes
/// back under the same name has died meanwhile.
async fn other_at_it(
    tx: &mut Tx,
    claim: &FenceClaim<'_>,
    now_ms: u64,
) -> Result<Option<FenceRefusal>> {
    let row = sqlx::query(
        "SELECT conductor, until_ms FROM fences \
         WHERE host = $1 AND conductor <> $2 AND until_ms > $3 LIMIT 1",
    )
    .bind(claim.host.as_str())
    .bind(claim.conductor)
    .bind(signed(now_ms))
    .fetch_optional(&mut **tx)
    .await?;
    row.map(|row| {
        Ok(FenceRefusal::UnderWay {
            conductor: row.try_get("conductor")?,
            until_ms: unsigned(row.try_get("until_ms")?),
        })
    })
    .transpose()
}

/// Those that a clock which was set back dates in the future count as well.
async fn fenced(tx: &mut Tx, now_ms: u64, but: Option<OperationId>) -> Result<Fenced> {
    let rows = sqlx::query("SELECT host FROM fences WHERE at_ms > $1 AND operation_uuid <> $2")
        .bind(signed(now_ms.saturating_sub(COUNTED_MS)))
        .bind(but.map(|id| id.to_string()).unwrap_or_default())
        .fetch_all(&mut **tx)
        .await?;
    Ok(Fenced(rows.iter().map(host).collect::<Result<_>>()?))
}

fn host(row: &AnyRow) -> Result<HostName> {
    let host: String = row.try_get("host")?;
    host.parse().map_err(|e| corrupt("a fence", &e))
}

fn agent_lost(row: &AnyRow) -> Result<AgentLost> {
    from_json("a lost agent", row.try_get("record")?)
}

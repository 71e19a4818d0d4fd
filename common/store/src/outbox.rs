//! Notifications between their commit and their publication, so that none is
//! lost with a process and none tells of what was not committed.

use drover_model::ids::fresh;
use serde_json::Value;
use sqlx::Row;
use uuid::Uuid;

use crate::{Result, Store, database::Tx, from_json, signed, to_json};

/// A notification to publish.
#[derive(Debug, Clone, PartialEq)]
pub struct Notification {
    /// Orders and names it.
    pub id: Uuid,
    /// Nova's event type, `instance.live_migration_pre.start`.
    pub event_type: String,
    /// `INFO`, `WARN` or `ERROR`.
    pub priority: String,
    /// What it says.
    pub payload: Value,
}

impl Notification {
    /// A notification with a new id.
    pub fn new(event_type: &str, priority: &str, payload: Value) -> Self {
        Self {
            id: fresh(),
            event_type: event_type.to_owned(),
            priority: priority.to_owned(),
            payload,
        }
    }
}

pub(crate) async fn put(tx: &mut Tx, n: &Notification) -> Result<()> {
    sqlx::query("INSERT INTO outbox (id, event_type, priority, payload) VALUES ($1, $2, $3, $4)")
        .bind(n.id.to_string())
        .bind(&n.event_type)
        .bind(&n.priority)
        .bind(to_json("a notification", &n.payload)?)
        .execute(&mut **tx)
        .await?;
    Ok(())
}

impl Store {
    /// The oldest unpublished notifications, but for those that wait since they were
    /// refused.
    ///
    /// # Errors
    /// The database failed.
    pub async fn unpublished(&self, limit: u32, now_ms: u64) -> Result<Vec<Notification>> {
        let query =
            sqlx::query("SELECT * FROM outbox WHERE not_before_ms <= $2 ORDER BY id LIMIT $1")
                .bind(i64::from(limit))
                .bind(signed(now_ms));
        let rows = self.steady(query.fetch_all(&self.database)).await?;
        rows.iter()
            .map(|row| {
                let id: String = row.try_get("id")?;
                Ok(Notification {
                    id: id
                        .parse()
                        .map_err(|e| crate::corrupt("a notification", &e))?,
                    event_type: row.try_get("event_type")?,
                    priority: row.try_get("priority")?,
                    payload: from_json("a notification", row.try_get("payload")?)?,
                })
            })
            .collect()
    }

    /// Has a notification that was refused wait until a moment; says how often that
    /// was by now.
    ///
    /// # Errors
    /// The database failed.
    pub async fn refused(&self, id: Uuid, not_before_ms: u64) -> Result<u32> {
        let statement = "UPDATE outbox SET refusals = refusals + 1, not_before_ms = $2 \
                         WHERE id = $1 RETURNING refusals";
        let rows = self
            .returned(|| {
                sqlx::query(statement)
                    .bind(id.to_string())
                    .bind(signed(not_before_ms))
            })
            .await?;
        let refusals = rows.first().map(|row| row.try_get::<i64, _>("refusals"));
        Ok(u32::try_from(refusals.transpose()?.unwrap_or(0)).unwrap_or(u32::MAX))
    }

    /// Forgets a notification that was published, or never will be.
    ///
    /// # Errors
    /// The database failed.
    pub async fn published(&self, id: Uuid) -> Result<()> {
        let statement = "DELETE FROM outbox WHERE id = $1";
        self.execute(|| sqlx::query(statement).bind(id.to_string()))
            .await?;
        Ok(())
    }
}

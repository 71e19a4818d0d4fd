//! Agents: which run of each is its node's, and the last that was heard of it.
//!
//! An incarnation is handed out to each agent that starts, a counter per host.
//! What another incarnation says does not count. A second agent of one name is
//! let in only in the place of one that was silent for long enough, or whose restart
//! it is. After a good-bye the node's own machine is let in at once, with its state or
//! with a new one; another machine waits for the silence all the same, for it asks
//! every few seconds and would be there before an agent that is only restarted.

use drover_model::{
    api::conductor::{Heartbeat, Identity, RegisterAgent, Registered},
    evidence::Life,
    ids::HostName,
    version::Spoken,
};
use serde::{Deserialize, Serialize};
use sqlx::{Row, any::AnyRow};

use crate::{Result, Store, corrupt, database::Tx, instances, signed, to_json, unsigned};

/// An agent as it is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AgentRow {
    /// Which node it serves.
    pub host: HostName,
    /// Which run of the node's agent counts.
    pub incarnation: u64,
    /// Who that is.
    pub identity: Identity,
    /// Whether it has said good-bye.
    pub gone: bool,
    /// Sequence of its last heartbeat.
    pub beat: u64,
    /// Its version.
    pub agent_version: String,
    /// Versions of RPC that it speaks.
    pub speaks: Spoken,
    /// Its clock less the conductor's at its last heartbeat, ms.
    pub clock_offset_ms: i64,
    /// For how long a conductor that could hear it has not, ms.
    pub silent_ms: u64,
    /// How often something in its name was refused.
    pub refusals: u64,
    /// Why, the last time.
    pub refusal: Option<String>,
}

impl AgentRow {
    /// The last that was heard of it.
    pub fn life(&self) -> Life {
        Life {
            incarnation: self.incarnation,
            beat: self.beat,
        }
    }
}

/// A heartbeat, and the agent's clock less the conductor's at that moment, ms.
pub type Beat = (Heartbeat, i64);

/// For how long an agent has been silent since its last sign of life, ms.
pub type Silence = (HostName, Life, u64);

/// Versions as they are kept, with the incarnation that speaks them.
#[derive(Serialize, Deserialize)]
struct Said {
    incarnation: u64,
    speaks: Spoken,
}

fn said(incarnation: u64, speaks: &Spoken) -> Result<String> {
    let speaks = speaks.clone();
    to_json(
        "an agent",
        &Said {
            incarnation,
            speaks,
        },
    )
}

/// The incarnation of an agent that asks, or why it gets none. `silent_since` is
/// the last sign of life of the one that was not heard of for the down time.
fn judge(
    row: &AgentRow,
    ask: &RegisterAgent,
    silent_since: Option<Life>,
) -> std::result::Result<u64, String> {
    let same = row.identity.process == ask.identity.process;
    if row.incarnation > 0 && same && !row.gone {
        return Ok(row.incarnation);
    }
    let is_restart = ask.held.is_none() && ask.identity.succeeds(&row.identity);
    let is_silent = silent_since == Some(row.life());
    let is_freed = row.gone && ask.identity.is_akin(&row.identity);
    let is_forgotten = row.gone && row.identity == Identity::default();
    if row.incarnation == 0 || is_forgotten || is_freed || is_restart || is_silent {
        return Ok(row.incarnation.max(ask.held.unwrap_or(0)) + 1);
    }
    let which = |i: &Identity| format!("machine {}, state {}", named(&i.machine), named(&i.state));
    let stands = match row.gone {
        true => "that has just stopped",
        false => "that lives",
    };
    Err(format!(
        "{} has another agent {stands} ({}); this one ({}) takes its place when that one has \
         been silent for the down time: is [compute] host the same on two machines?",
        ask.host,
        which(&row.identity),
        which(&ask.identity)
    ))
}

/// Whether a node is another than it was: with another system disk, or another machine.
fn is_new_node(before: &Identity, now: &Identity) -> bool {
    *before != Identity::default() && !now.succeeds(before)
}

/// Enough of an id to tell it from another.
fn named(id: &str) -> &str {
    match id.get(..8) {
        Some(start) => start,
        None if id.is_empty() => "unknown",
        None => id,
    }
}

impl Store {
    /// Hands an agent its incarnation, unless another one is the node's.
    ///
    /// # Errors
    /// The database failed.
    pub async fn register_agent(
        &self,
        ask: &RegisterAgent,
        silent_since: Option<Life>,
    ) -> Result<Registered> {
        self.attempt(|| self.register_agent_inner(ask, silent_since))
            .await
    }

    async fn register_agent_inner(
        &self,
        ask: &RegisterAgent,
        silent_since: Option<Life>,
    ) -> Result<Registered> {
        let mut tx = self.begin().await?;
        sqlx::query(
            "INSERT INTO agents (host, incarnation, identity, gone, beat, agent_version, \
             clock_offset_ms, silent_ms, refusals) VALUES ($1, 0, '{}', 0, 0, '', 0, 0, 0) \
             ON CONFLICT (host) DO NOTHING",
        )
        .bind(ask.host.as_str())
        .execute(&mut *tx)
        .await?;
        // Of two that ask at once the second reads what the first wrote.
        sqlx::query("UPDATE agents SET refusals = refusals WHERE host = $1")
            .bind(ask.host.as_str())
            .execute(&mut *tx)
            .await?;
        let row = row_of(&mut tx, &ask.host).await?;
        let row = row.ok_or_else(|| corrupt("an agent", &"it was just written"))?;
        let answer = match judge(&row, ask, silent_since) {
            Ok(incarnation) if incarnation == row.incarnation => Registered::Admitted {
                incarnation,
                speaks: Spoken::Unsaid,
            },
            Ok(incarnation) => {
                if is_new_node(&row.identity, &ask.identity) {
                    instances::node_is_new(&mut tx, &ask.host).await?;
                }
                sqlx::query(
                    "UPDATE agents SET incarnation = $2, identity = $3, agent_version = $4, \
                     gone = 0, beat = 0, silent_ms = 0, speaks = $5 WHERE host = $1",
                )
                .bind(ask.host.as_str())
                .bind(signed(incarnation))
                .bind(to_json("an agent", &ask.identity)?)
                .bind(&ask.agent_version)
                .bind(said(incarnation, &ask.speaks)?)
                .execute(&mut *tx)
                .await?;
                Registered::Admitted {
                    incarnation,
                    speaks: Spoken::Unsaid,
                }
            }
            Err(reason) => {
                refuse(&mut tx, &ask.host, &reason).await?;
                Registered::Refused { reason }
            }
        };
        tx.commit().await?;
        Ok(answer)
    }

    /// Notes that an agent has said good-bye.
    ///
    /// # Errors
    /// The database failed.
    pub async fn agent_left(&self, host: &HostName, incarnation: u64) -> Result<()> {
        let statement = "UPDATE agents SET gone = 1 WHERE host = $1 AND incarnation = $2";
        self.execute(|| {
            sqlx::query(statement)
                .bind(host.to_string())
                .bind(signed(incarnation))
        })
        .await?;
        Ok(())
    }

    /// Notes that something in an agent's name was refused.
    ///
    /// # Errors
    /// The database failed.
    pub async fn agent_refused(&self, host: &HostName, reason: &str) -> Result<()> {
        let work = || async {
            let mut tx = self.begin().await?;
            refuse(&mut tx, host, reason).await?;
            tx.commit().await?;
            Ok(())
        };
        self.attempt(work).await
    }

    /// One agent, if it has ever registered.
    ///
    /// # Errors
    /// The database failed.
    pub async fn agent(&self, host: &HostName) -> Result<Option<AgentRow>> {
        let work = async {
            let mut tx = self.begin().await?;
            row_of(&mut tx, host).await
        };
        self.steady(work).await
    }

    /// Puts on the record what was heard, and for how long others were silent;
    /// gives back what all conductors heard.
    ///
    /// # Errors
    /// The database failed.
    pub async fn hear(
        &self,
        beats: &[Beat],
        silences: &[Silence],
        now_ms: u64,
    ) -> Result<Vec<AgentRow>> {
        self.attempt(|| self.hear_inner(beats, silences, now_ms))
            .await
    }

    async fn hear_inner(
        &self,
        beats: &[Beat],
        silences: &[Silence],
        now_ms: u64,
    ) -> Result<Vec<AgentRow>> {
        let mut tx = self.begin().await?;
        for (beat, clock_offset_ms) in beats {
            sqlx::query(
                "UPDATE agents SET beat = $3, agent_version = $4, clock_offset_ms = $5, \
                 silent_ms = 0, speaks = $6 WHERE host = $1 AND incarnation = $2 AND beat < $3",
            )
            .bind(beat.host.as_str())
            .bind(signed(beat.incarnation))
            .bind(signed(beat.sequence))
            .bind(&beat.agent_version)
            .bind(*clock_offset_ms)
            .bind(said(beat.incarnation, &beat.speaks)?)
            .execute(&mut *tx)
            .await?;
            heard_at(&mut tx, &beat.host, now_ms).await?;
        }
        for (host, life, silent_ms) in silences {
            sqlx::query(
                "UPDATE agents SET silent_ms = $4 WHERE host = $1 AND incarnation = $2 \
                 AND beat = $3 AND silent_ms < $4",
            )
            .bind(host.as_str())
            .bind(signed(life.incarnation))
            .bind(signed(life.beat))
            .bind(signed(*silent_ms))
            .execute(&mut *tx)
            .await?;
        }
        // Of those that were forgotten with their nodes nothing is heard.
        let known = "SELECT * FROM agents WHERE NOT (gone = 1 AND identity = '{}') ORDER BY host";
        let rows = sqlx::query(known).fetch_all(&mut *tx).await?;
        tx.commit().await?;
        rows.iter().map(agent).collect()
    }
}

/// Which incarnation of a host's agent counts, if any has registered.
pub(crate) async fn incarnation(tx: &mut Tx, host: &HostName) -> Result<Option<u64>> {
    let row = sqlx::query("SELECT incarnation FROM agents WHERE host = $1")
        .bind(host.as_str())
        .fetch_optional(&mut **tx)
        .await?;
    row.map(|row| Ok(unsigned(row.try_get("incarnation")?)))
        .transpose()
}

async fn heard_at(tx: &mut Tx, host: &HostName, now_ms: u64) -> Result<()> {
    sqlx::query("UPDATE nodes SET heard_at_ms = $2 WHERE host = $1 AND heard_at_ms < $2")
        .bind(host.as_str())
        .bind(signed(now_ms))
        .execute(&mut **tx)
        .await?;
    Ok(())
}

async fn refuse(tx: &mut Tx, host: &HostName, reason: &str) -> Result<()> {
    sqlx::query("UPDATE agents SET refusals = refusals + 1, refusal = $2 WHERE host = $1")
        .bind(host.as_str())
        .bind(reason)
        .execute(&mut **tx)
        .await?;
    Ok(())
}

/// The last that was heard of a host's agent, if any has registered.
pub(crate) async fn life(tx: &mut Tx, host: &HostName) -> Result<Option<Life>> {
    Ok(row_of(tx, host).await?.map(|row| row.life()))
}

async fn row_of(tx: &mut Tx, host: &HostName) -> Result<Option<AgentRow>> {
    let row = sqlx::query("SELECT * FROM agents WHERE host = $1")
        .bind(host.as_str())
        .fetch_optional(&mut **tx)
        .await?;
    row.as_ref().map(agent).transpose()
}

fn agent(row: &AnyRow) -> Result<AgentRow> {
    let host: String = row.try_get("host")?;
    let incarnation = unsigned(row.try_get("incarnation")?);
    // What an earlier one said is not this one's word; nor is what cannot be read.
    let said = row.try_get::<Option<String>, _>("speaks")?;
    let said = said.and_then(|text| serde_json::from_str::<Said>(&text).ok());
    let said = said.filter(|said| said.incarnation == incarnation);
    Ok(AgentRow {
        host: host.parse().map_err(|e| corrupt("an agent", &e))?,
        incarnation,
        speaks: said.map_or(Spoken::Unsaid, |said| said.speaks),
        // One that cannot be read is nobody's restart.
        identity: serde_json::from_str(row.try_get("identity")?).unwrap_or_default(),
        gone: row.try_get::<i64, _>("gone")? != 0,
        beat: unsigned(row.try_get("beat")?),
        agent_version: row.try_get("agent_version")?,
        clock_offset_ms: row.try_get("clock_offset_ms")?,
        silent_ms: unsigned(row.try_get("silent_ms")?),
        refusals: unsigned(row.try_get("refusals")?),
        refusal: row.try_get("refusal")?,
    })
}

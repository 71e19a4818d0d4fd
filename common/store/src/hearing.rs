//! How long each agent has been silent, as a conductor that listens measures it:
//! by its own monotonic time, and only while it could have heard.
//!
//! Time counts as *listened* when a message of the conductor's own went through
//! the broker and the record could be written; what lay between two such moments
//! counts up to a bound. So neither a conductor that just started, nor one that
//! was paused, nor one that was cut off takes its own deafness for silence, and no
//! wall clock has a say. A sign of life is a heartbeat or a report that came here,
//! or one that another conductor put on the record: (incarnation, sequence) of the
//! agent's row has moved on.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use drover_model::{
    api::{
        SPEAKS,
        conductor::{Heartbeat, Word},
    },
    evidence::Life,
    ids::HostName,
    version::{self, Mismatch, RpcVersion, Side, Spoken, VersionRange},
};
use tokio::time::Instant;

use crate::agents::{AgentRow, Beat, Silence};

/// For how long a refusal is shown after it was last repeated.
const REFUSAL_SHOWN: Duration = Duration::from_secs(60);
/// How often one refusal is logged at most.
const SAID_EVERY: Duration = Duration::from_secs(60);
/// Silences that are worth a word on the record, ms.
const WORTH_MS: u64 = 10_000;

/// What is known of a node's agent.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AgentState {
    /// Which incarnation it is; 0 if none has registered.
    pub incarnation: u64,
    /// What was heard of it last; none if it never registered.
    pub life: Option<Life>,
    /// Its clock less the conductor's at its last heartbeat, ms.
    pub clock_offset_ms: Option<i64>,
    /// What was refused in its name lately, and why.
    pub refusal: Option<String>,
    /// Its version.
    pub version: String,
    /// Versions of RPC that it speaks.
    pub speaks: Spoken,
    /// Why it is asked nothing, if it and the conductor have no version in common.
    pub mismatch: Option<Mismatch>,
}

/// Who was heard of, and when. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Hearing(Arc<Mutex<Heard>>);

#[derive(Debug)]
struct Heard {
    /// Versions of RPC that this conductor speaks.
    speaks: VersionRange,
    /// Whether anybody listens here at all.
    listens: bool,
    /// Time in which an agent would have been heard, ms.
    listened_ms: i64,
    /// When it was last certain that an agent would be heard.
    certain_at: Option<Instant>,
    agents: BTreeMap<HostName, Known>,
    /// Heartbeats that are not on the record yet.
    fresh: BTreeMap<HostName, Beat>,
}

impl Default for Heard {
    fn default() -> Self {
        Self {
            speaks: SPEAKS,
            listens: false,
            listened_ms: 0,
            certain_at: None,
            agents: BTreeMap::new(),
            fresh: BTreeMap::new(),
        }
    }
}

#[derive(Debug, Default)]
struct Known {
    life: Life,
    /// At what `listened_ms` it was last heard of.
    heard_at: i64,
    state: AgentState,
    refusals: u64,
    refused_at: Option<Instant>,
    said_at: Option<Instant>,
}

impl Hearing {
    fn lock(&self) -> MutexGuard<'_, Heard> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A conductor begins to listen, which speaks those versions, and knows what the
    /// record says.
    pub fn begin(&self, speaks: VersionRange, rows: &[AgentRow]) {
        *self.lock() = Heard {
            speaks,
            listens: true,
            ..Heard::default()
        };
        self.take_in(rows);
    }

    /// Versions of RPC that this conductor speaks.
    pub fn speaks(&self) -> VersionRange {
        self.lock().speaks
    }

    /// The version in which a node's agent is asked.
    ///
    /// # Errors
    /// It has none in common with this conductor.
    pub fn pinned(&self, host: &HostName) -> Result<RpcVersion, Mismatch> {
        let heard = self.lock();
        heard.negotiate(host, &heard.state_of(host))
    }

    /// What a node's agent, of that incarnation, says itself of its versions.
    pub fn said(&self, host: &HostName, incarnation: u64, (version, speaks): (&str, &Spoken)) {
        let mut heard = self.lock();
        let known = heard.agents.entry(host.clone()).or_default();
        if incarnation >= known.state.incarnation {
            known.state.version = version.to_owned();
            known.state.speaks = speaks.clone();
        }
    }

    /// Both sides with their versions, and which of them to upgrade.
    pub fn versions(&self, host: &HostName) -> (String, String) {
        let heard = self.lock();
        heard.sides(host, &heard.state_of(host), |agent, own| {
            let both = format!("{} and {}", version::said(agent), version::said(own));
            (both, version::remedy(agent, own))
        })
    }

    /// An agent would have been heard just now. The time since this was last so
    /// counts up to `longest`: in a longer one the conductor may have been deaf.
    pub fn is_certain(&self, longest: Duration) {
        let now = Instant::now();
        let mut heard = self.lock();
        if let Some(before) = heard.certain_at.replace(now) {
            let counted = now.duration_since(before).min(longest).as_millis();
            heard.listened_ms += i64::try_from(counted).unwrap_or(i64::MAX);
        }
    }

    /// What all conductors heard, as the record has it.
    pub fn take_in(&self, rows: &[AgentRow]) {
        let mut heard = self.lock();
        heard.agents.retain(|host, known| {
            known.life.incarnation == 0 || rows.iter().any(|row| row.host == *host)
        });
        for row in rows {
            heard.take_in(row);
        }
    }

    /// The same of one agent.
    pub fn learn(&self, row: &AgentRow) {
        self.lock().take_in(row);
    }

    /// A heartbeat came; none is said to one of an unknown agent or incarnation.
    pub fn beat(&self, beat: &Heartbeat, now_ms: u64) -> Option<Word> {
        let mut heard = self.lock();
        let listened_ms = heard.listened_ms;
        let known = heard.agents.get_mut(&beat.host)?;
        let life = Life {
            incarnation: beat.incarnation,
            beat: beat.sequence,
        };
        if known.life.incarnation != beat.incarnation {
            return None;
        }
        if life <= known.life {
            return Some(Word::Stale {
                reason: format!("heartbeat {} came before", known.life.beat),
            });
        }
        let signed = |ms: u64| i64::try_from(ms).unwrap_or(i64::MAX);
        let offset_ms = signed(beat.clock_ms) - signed(now_ms);
        known.life = life;
        known.heard_at = listened_ms;
        known.state.clock_offset_ms = Some(offset_ms);
        known.state.version.clone_from(&beat.agent_version);
        known.state.speaks.clone_from(&beat.speaks);
        heard
            .fresh
            .insert(beat.host.clone(), (beat.clone(), offset_ms));
        Some(Word::Taken)
    }

    /// A node's agent was heard of otherwise.
    pub fn note(&self, host: &HostName) {
        let mut heard = self.lock();
        let listened_ms = heard.listened_ms;
        // One that is too old to register has no row.
        let known = heard.agents.entry(host.clone()).or_default();
        known.heard_at = listened_ms;
    }

    /// Heartbeats that are to be put on the record.
    pub fn fresh(&self) -> Vec<Beat> {
        std::mem::take(&mut self.lock().fresh)
            .into_values()
            .collect()
    }

    /// Silences that are to be put on the record.
    pub fn silences(&self) -> Vec<Silence> {
        let heard = self.lock();
        let silent = heard.agents.iter().map(|(host, known)| {
            let silent_ms = heard.listened_ms.saturating_sub(known.heard_at);
            (host.clone(), known.life, silent_ms.unsigned_abs())
        });
        silent.filter(|(.., ms)| *ms >= WORTH_MS).collect()
    }

    /// For how long this conductor could have heard an agent since it began, ms.
    pub fn listened_ms(&self) -> u64 {
        u64::try_from(self.lock().listened_ms).unwrap_or(0)
    }

    /// For how long a node's agent has been silent, ms; none if nobody listens.
    /// Of one that never registered, since the conductor listens.
    pub fn silent_ms(&self, host: &HostName) -> Option<u64> {
        let heard = self.lock();
        let known = heard.agents.get(host);
        let heard_at = known.map_or(0, |known| known.heard_at);
        heard
            .listens
            .then(|| u64::try_from(heard.listened_ms.saturating_sub(heard_at)).unwrap_or(0))
    }

    /// The last sign of life of an agent that has been silent for that long, ms.
    pub fn silent_for(&self, host: &HostName, longest_ms: u64) -> Option<Life> {
        let silent_ms = self.silent_ms(host)?;
        let life = self.lock().agents.get(host)?.life;
        (silent_ms > longest_ms).then_some(life)
    }

    /// What is known of a node's agent.
    pub fn state(&self, host: &HostName) -> AgentState {
        let heard = self.lock();
        let Some(known) = heard.agents.get(host) else {
            return AgentState::default();
        };
        let lately = |at: Instant| at.elapsed() <= REFUSAL_SHOWN;
        let mut state = known.state.clone();
        state.life = (known.life.incarnation > 0).then_some(known.life);
        state.refusal = state
            .refusal
            .filter(|_| known.refused_at.is_some_and(lately));
        state.mismatch = heard.negotiate(host, &state).err();
        state
    }

    /// Whether a refusal in a node's name is to be logged (again).
    pub fn is_to_be_said(&self, host: &HostName) -> bool {
        let mut heard = self.lock();
        let Some(known) = heard.agents.get_mut(host) else {
            return true;
        };
        let due = known.said_at.is_none_or(|at| at.elapsed() >= SAID_EVERY);
        if due {
            known.said_at = Some(Instant::now());
        }
        due
    }
}

impl Heard {
    /// What was heard of a node's agent; of one that is not known, nothing.
    fn state_of(&self, host: &HostName) -> Cow<'_, AgentState> {
        let known = self.agents.get(host);
        known.map_or_else(Cow::default, |known| Cow::Borrowed(&known.state))
    }

    fn sides<T>(
        &self,
        host: &HostName,
        state: &AgentState,
        of: impl FnOnce(Side<'_>, Side<'_>) -> T,
    ) -> T {
        let own = Spoken::from(self.speaks);
        let agent = Side {
            who: &format!("the agent of {host}"),
            program: &format!("drover-compute on {host}"),
            version: &state.version,
            speaks: &state.speaks,
        };
        let conductor = Side {
            who: "this conductor",
            program: "drover-conductor",
            version: env!("CARGO_PKG_VERSION"),
            speaks: &own,
        };
        of(agent, conductor)
    }

    fn negotiate(&self, host: &HostName, state: &AgentState) -> Result<RpcVersion, Mismatch> {
        self.sides(host, state, version::negotiate)
    }

    fn take_in(&mut self, row: &AgentRow) {
        let listened_ms = self.listened_ms;
        let silent_ms = i64::try_from(row.silent_ms).unwrap_or(i64::MAX);
        let life = row.life();
        let known = self
            .agents
            .entry(row.host.clone())
            .or_insert_with(|| Known {
                life,
                heard_at: listened_ms.saturating_sub(silent_ms),
                state: AgentState::default(),
                refusals: row.refusals,
                refused_at: None,
                said_at: None,
            });
        if life > known.life {
            known.life = life;
            known.heard_at = listened_ms;
        }
        if row.refusals > known.refusals {
            known.refusals = row.refusals;
            known.refused_at = Some(Instant::now());
        }
        // Of one life the row may be older than what was heard since.
        if life >= known.life {
            known.state.version.clone_from(&row.agent_version);
            known.state.speaks.clone_from(&row.speaks);
        }
        known.state.incarnation = row.incarnation;
        known.state.refusal.clone_from(&row.refusal);
        if row.beat > 0 {
            known.state.clock_offset_ms = Some(row.clock_offset_ms);
        }
    }
}

#[cfg(test)]
#[path = "hearing_tests.rs"]
mod tests;

//! The conductor's ear: which agents live, and for how long each has been silent.
//!
//! Agents register when they start and send heartbeats from then on; any conductor
//! takes one. Every little while each conductor puts what it heard on the record,
//! reads what the others heard, and asks itself through the broker whether it can
//! hear at all ([`drover_store::hearing`] measures).

use std::time::Duration;

use drover_model::{
    api::{
        CONDUCTOR_TOPIC, NAMESPACE, VERSION,
        conductor::{AgentLeaves, Heard, Heartbeat, RegisterAgent, Registered, Word, method},
    },
    ids::HostName,
    version::VersionRange,
};
use drover_rpc::{CallOptions, RequestContext, RpcClient, RpcError, Target};
use serde::de::IgnoredAny;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use crate::{app::Context, clock::goes_on_after};

/// Longest time between two looks.
const LONGEST_LOOK: Duration = Duration::from_secs(2);
/// Looks in the time after which a node counts as down, at least.
const LOOKS: u32 = 4;
/// What lies between two moments in which the conductor could hear counts as
/// heard up to that many looks.
const COUNTED_LOOKS: u32 = 3;

/// Reads what is known of the agents before anything is judged by it.
///
/// # Errors
/// The record cannot be read.
pub async fn begin(context: &Context, speaks: VersionRange) -> drover_store::Result<()> {
    let rows = context.store.hear(&[], &[], context.clock.now_ms()).await?;
    context.store.hearing().begin(speaks, &rows);
    Ok(())
}

/// Listens until told to stop.
pub async fn listen(context: Context, client: RpcClient, stop: CancellationToken) {
    let look = LONGEST_LOOK.min(Duration::from_millis(context.down_after_ms) / LOOKS);
    let mut was_deaf = false;
    loop {
        let deaf = hear(&context, &client, look, was_deaf).await.err();
        match (&deaf, was_deaf) {
            (Some(why), false) => {
                warn!(
                    "this conductor cannot hear the agents: {why}; their silence does not count meanwhile"
                );
            }
            (None, true) => info!("this conductor hears the agents again"),
            _ => {}
        }
        was_deaf = deaf.is_some();
        if !goes_on_after(look, &stop).await {
            return;
        }
    }
}

/// One look: says why the conductor would not have heard an agent.
async fn hear(
    context: &Context,
    client: &RpcClient,
    look: Duration,
    was_deaf: bool,
) -> Result<(), String> {
    let (store, hearing) = (&context.store, context.store.hearing());
    let echo = echo(client, look * 2).await;
    // What was heard since the last look could also be kept then.
    if echo.is_ok() && !was_deaf {
        hearing.is_certain(look * COUNTED_LOOKS);
    }
    let (beats, silences) = (hearing.fresh(), hearing.silences());
    let now_ms = context.clock.now_ms();
    let rows = store.hear(&beats, &silences, now_ms).await;
    let rows =
        rows.map_err(|e| format!("the record: {}", drover_runtime::error_chain::Chain(&e)))?;
    hearing.take_in(&rows);
    echo
}

/// Whether a message to the conductors reaches one, and its answer comes back.
async fn echo(client: &RpcClient, limit: Duration) -> Result<(), String> {
    let target = Target::topic(CONDUCTOR_TOPIC)
        .namespace(NAMESPACE)
        .version(VERSION);
    let context = RequestContext::service(format!("req-{}", uuid::Uuid::new_v4()));
    let options = CallOptions {
        timeout: Some(limit),
        ..CallOptions::default()
    };
    let none = serde_json::Map::new();
    let asked =
        client.call_with::<_, IgnoredAny>(&target, &context, method::GET_STATUS, &none, options);
    match asked.await {
        // Of whatever version the conductor is that it reached.
        Ok(IgnoredAny) | Err(RpcError::Remote { .. } | RpcError::BadReply { .. }) => Ok(()),
        Err(error) => Err(drover_runtime::error_chain::Chain(&error).to_string()),
    }
}

impl Context {
    /// Hands an agent its incarnation, unless another one is the node's.
    ///
    /// # Errors
    /// The record cannot be read or written.
    pub(crate) async fn register(&self, ask: &RegisterAgent) -> drover_store::Result<Registered> {
        let hearing = self.store.hearing();
        let silent_since = hearing.silent_for(&ask.host, self.down_after_ms);
        let mut answer = self.store.register_agent(ask, silent_since).await?;
        if let Some(row) = self.store.agent(&ask.host).await? {
            hearing.learn(&row);
        }
        match &mut answer {
            Registered::Admitted {
                incarnation,
                speaks,
            } => {
                *speaks = hearing.speaks().into();
                info!(
                    host = %ask.host, incarnation, version = ask.agent_version, speaks = %ask.speaks,
                    "an agent registers"
                );
                if let Err(mismatch) = hearing.pinned(&ask.host) {
                    error!(host = %ask.host, "nothing can be asked of it: {mismatch}");
                }
            }
            Registered::Refused { reason } => {
                if hearing.is_to_be_said(&ask.host) {
                    error!(host = %ask.host, "a second agent is refused: {reason}");
                }
            }
        }
        Ok(answer)
    }

    /// Takes a heartbeat.
    ///
    /// # Errors
    /// The record cannot be read or written.
    pub(crate) async fn heartbeat(&self, beat: &Heartbeat) -> drover_store::Result<Heard> {
        Ok(Heard {
            word: self.word_on(beat).await?,
            speaks: self.store.hearing().speaks().into(),
        })
    }

    async fn word_on(&self, beat: &Heartbeat) -> drover_store::Result<Word> {
        let hearing = self.store.hearing();
        let now_ms = self.clock.now_ms();
        if let Some(word) = hearing.beat(beat, now_ms) {
            if let Some(reason) = word.refusal() {
                debug!(host = %beat.host, reason, "a heartbeat does not count");
            }
            return Ok(word);
        }
        // Another conductor may have let it in since the last look.
        let row = self.store.agent(&beat.host).await?;
        if let Some(row) = &row {
            hearing.learn(row);
        }
        if let Some(word) = hearing.beat(beat, now_ms) {
            return Ok(word);
        }
        let own = beat.incarnation;
        let reason = match row {
            Some(row) if row.incarnation > own => format!(
                "incarnation {own} of the agent of {} was followed by {}",
                beat.host, row.incarnation
            ),
            _ => format!("incarnation {own} is unknown: the agent has to register anew"),
        };
        self.refuse(&beat.host, "a heartbeat", &reason).await;
        Ok(Word::Stranger { reason })
    }

    /// An agent says good-bye.
    ///
    /// # Errors
    /// The record cannot be written.
    pub(crate) async fn agent_leaves(&self, who: &AgentLeaves) -> drover_store::Result<()> {
        info!(host = %who.host, incarnation = who.incarnation, "an agent stops");
        let hearing = self.store.hearing();
        // The silence for which others wait begins now.
        if hearing.state(&who.host).incarnation == who.incarnation {
            hearing.note(&who.host);
        }
        self.store.agent_left(&who.host, who.incarnation).await
    }

    /// Says aloud that something in a node's name does not count.
    pub(crate) async fn refuse(&self, host: &HostName, what: &str, reason: &str) {
        if self.store.hearing().is_to_be_said(host) {
            warn!(%host, "{what} is refused: {reason}");
        }
        if let Err(error) = self.store.agent_refused(host, reason).await {
            warn!(%host, %error, "a refusal is not on the record");
        }
    }
}

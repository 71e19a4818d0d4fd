//! Whether this agent is its node's: it registers when it starts, is handed an
//! incarnation, and sends heartbeats under it. Neither needs libvirt or storage.
//!
//! ```text
//!  asking ──admitted──► admitted: serves steps, reports ──another took its place──┐
//!    │  ▲                                                                          │
//!    │  └──── again, slower and slower, for ever ────┐                             │
//!    └──another agent of this host lives──► refused ─┴◄────────────────────────────┘
//! ```
//!
//! One that is not admitted takes no step from the node's queue, reports nothing,
//! and touches no guest of its own accord. Transfers under way are libvirt's, and go on.

use std::{path::Path, sync::Arc, time::Duration};

use drover_model::{
    api::conductor::{Heartbeat, Identity, RegisterAgent, Registered, Word},
    ids::StateId,
    version::{Side, Spoken, negotiate},
};
use drover_runtime::error_chain::Chain;
use tokio::time::{Instant, sleep, sleep_until};
use tracing::{error, info, warn};
use uuid::Uuid;

use crate::node::{AgentSettings, Node};

/// Time until the conductor is asked again that did not answer; doubled each time.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// The longest such time, and the time between two askings of one that is refused.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How often a refusal is logged.
const SAID_EVERY: Duration = Duration::from_secs(60);

/// Whether an agent is its node's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Standing {
    /// It has not been told yet.
    Asking,
    /// It is, as this incarnation.
    Admitted(u64),
    /// It is not, for this reason.
    Refused(String),
}

impl Standing {
    pub(crate) fn incarnation(&self) -> Option<u64> {
        match self {
            Self::Admitted(incarnation) => Some(*incarnation),
            Self::Asking | Self::Refused(_) => None,
        }
    }
}

/// Who this run of the agent is.
pub(crate) fn identity(state: StateId, settings: &AgentSettings) -> Identity {
    let said = |path: &Path| {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        text.trim().to_owned()
    };
    Identity {
        state: state.to_string(),
        machine: said(&settings.machine_id_file),
        boot: said(&settings.boot_id_file),
        process: Uuid::new_v4().to_string(),
    }
}

/// Registers and sends heartbeats for as long as the agent runs.
pub(crate) async fn run(node: Arc<Node>) {
    let mut held = None;
    loop {
        let incarnation = register(&node, held).await;
        info!(incarnation, "this is the node's agent");
        node.standing.send_replace(Standing::Admitted(incarnation));
        let reason = live(&node, incarnation).await;
        error!("the conductor refuses this agent: {reason}; it serves no steps until it is let in");
        node.standing.send_replace(Standing::Refused(reason));
        held = Some(incarnation);
    }
}

/// Asks until it is admitted.
async fn register(node: &Node, held: Option<u64>) -> u64 {
    let ask = RegisterAgent {
        host: node.settings.host.clone(),
        identity: node.identity.clone(),
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        held,
        speaks: node.settings.speaks.into(),
    };
    let mut pause = FIRST_PAUSE;
    let mut said: Option<Instant> = None;
    loop {
        match node.conductor.register(&ask).await {
            Ok(Registered::Admitted {
                incarnation,
                speaks,
            }) => {
                compare(node, &speaks);
                return incarnation;
            }
            Ok(Registered::Refused { reason }) => {
                if said.is_none_or(|at| at.elapsed() >= SAID_EVERY) {
                    error!("the conductor refuses this agent: {reason}; it serves no steps");
                    said = Some(Instant::now());
                }
                node.standing.send_replace(Standing::Refused(reason));
                pause = LONGEST_PAUSE;
            }
            Err(e) => warn!(
                "the conductor does not register this agent: {}; asking again",
                Chain(&e)
            ),
        }
        sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Says aloud if the conductor will ask nothing of this agent for its version. It
/// lives, and says so, all the same.
fn compare(node: &Node, conductors: &Spoken) {
    let own = Spoken::from(node.settings.speaks);
    let agent = Side {
        who: "this agent",
        program: "drover-compute here",
        version: env!("CARGO_PKG_VERSION"),
        speaks: &own,
    };
    let conductor = Side {
        who: "the conductor",
        program: "drover-conductor",
        version: "",
        speaks: conductors,
    };
    if let Err(mismatch) = negotiate(agent, conductor) {
        error!("nothing will be asked of this agent: {mismatch}");
    }
}

/// Sends heartbeats; says why it is the node's agent no longer.
async fn live(node: &Node, incarnation: u64) -> String {
    let interval = Duration::from_secs(node.settings.report_interval_s);
    let mut is_heard = true;
    let mut sequence = 0;
    let mut conductors = Spoken::Unsaid;
    loop {
        let due = Instant::now() + interval;
        sequence += 1;
        let beat = Heartbeat {
            host: node.settings.host.clone(),
            incarnation,
            sequence,
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            clock_ms: node.now_ms(),
            speaks: node.settings.speaks.into(),
        };
        let heard = node.conductor.heartbeat(&beat, interval).await;
        let said = heard.map(|heard| {
            if std::mem::replace(&mut conductors, heard.speaks.clone()) != heard.speaks {
                compare(node, &heard.speaks);
            }
            heard.word
        });
        let was_heard = std::mem::replace(&mut is_heard, said.is_ok());
        match said {
            Ok(Word::Stranger { reason }) => return reason,
            Ok(_) if !was_heard => info!("heartbeats are heard again"),
            Err(e) if was_heard => {
                warn!(
                    "no conductor hears this agent: {}; going on trying",
                    Chain(&e)
                );
            }
            Ok(_) | Err(_) => {}
        }
        sleep_until(due).await;
    }
}

//! The node comes back: while it was away its guests may have been evacuated.
//! Before anything runs here the conductor is asked which of them live elsewhere.
//!
//! ```text
//!  agent starts ─► asking ─► answered ─► settling ─┬─► settled ─┐
//!                    ▲ for ever, slower and slower │            │
//!                    │                             └─ something is left: again in 30 s
//!                    └──────── libvirt's connection is back ◄───┘
//!
//!  of each evacuated guest of which an older copy is here:
//!    not confirmed ──────────────────────► left as it is, not started; asked about again
//!    confirmed, off ─────────────────────► its definition is withdrawn ─► told
//!    confirmed, active here and there ───► stopped hard ─► its definition is withdrawn ─► told
//!    confirmed, active here alone ───────► left as it is; asked about again
//!  nothing of it is here, or the new copy itself ─► told
//! ```
//!
//! Disks stay: they are shared, and the new copy's. *Confirmed* means that its new
//! home was asked just now and has it. Stopping a guest that is active is right
//! in this case alone: two copies are on one disk, and of the two the one of the
//! lower generation must not run (invariant 1). Without that word it runs on:
//! unknown is not absent (invariant 3).
//!
//! Until the first answer no step that may start a guest is served (`api`), and
//! no guest is started at boot ([`crate::autostart`]).

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use drover_model::{
    api::conductor::{Evacuated, EvacuatedAnswer},
    ids::InstanceId,
    node::InstanceReport,
};
use drover_runtime::error_chain::Chain;
use tokio::{
    sync::broadcast::{self, error::RecvError},
    time::{sleep, timeout},
};
use tracing::{error, info, warn};

use crate::{
    autostart::Autostart,
    hypervisor::{self, Event},
    migration::{
        Registry,
        destroy::{self, Superseded},
    },
    node::Node,
};

/// Time until the conductor is asked again that did not answer; doubled each time.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// The longest such time.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// Time until what is left is looked at again.
const AGAIN: Duration = Duration::from_secs(30);

/// Asks and settles for as long as the agent runs.
pub(crate) async fn run(node: Arc<Node>, registry: Arc<Registry>) {
    let events = node.hypervisor.events();
    let autostart = Autostart::open(node.clone(), registry).await;
    Returning {
        node,
        events,
        autostart,
    }
    .run()
    .await;
}

struct Returning {
    node: Arc<Node>,
    events: broadcast::Receiver<Event>,
    autostart: Autostart,
}

/// What came of one evacuated guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Settled {
    /// Nothing of it is left to do here.
    Done,
    /// It must not be started, and be asked about again.
    Left,
}

/// A copy that is active goes only where the newer one is active too.
fn may_go(own: &InstanceReport, proof: &Superseded) -> bool {
    proof.is_active_there() || !own.power_state.is_active()
}

impl Returning {
    async fn run(mut self) {
        loop {
            self.node.admitted().await;
            let answer = self.ask().await;
            self.node.has_asked.send_replace(true);
            let is_settled = match self.settle(&answer).await {
                Ok(left) => self.autostart.pass(&left).await && left.is_empty(),
                Err(error) => {
                    warn!(%error, "guests that were evacuated cannot be looked for yet");
                    false
                }
            };
            self.wait(is_settled).await;
        }
    }

    /// Asks until there is an answer.
    async fn ask(&self) -> EvacuatedAnswer {
        let mut pause = FIRST_PAUSE;
        loop {
            let host = &self.node.settings.host;
            match self.node.conductor.list_evacuated(host, Vec::new()).await {
                Ok(answer) => return answer,
                Err(e) => warn!(
                    "the conductor does not say what was evacuated from this node: {}; asking again",
                    Chain(&e)
                ),
            }
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Does what can be done; says which guests are left and must not be started.
    async fn settle(&self, answer: &EvacuatedAnswer) -> hypervisor::Result<BTreeSet<InstanceId>> {
        if answer.instances.is_empty() {
            return Ok(BTreeSet::new());
        }
        let here = self.node.hypervisor.guests().await?;
        let mut left = BTreeSet::new();
        for evacuated in &answer.instances {
            let own = here.iter().find(|r| r.id == evacuated.instance);
            if self.settle_one(evacuated, own).await == Settled::Left {
                left.insert(evacuated.instance);
            }
        }
        Ok(left)
    }

    async fn settle_one(&self, evacuated: &Evacuated, own: Option<&InstanceReport>) -> Settled {
        let older = own.filter(|own| own.generation < evacuated.generation);
        let lives_elsewhere = evacuated.confirmed && evacuated.host.is_some();
        let host = &self.node.settings.host;
        let proof = older.and_then(|own| Superseded::by(evacuated, host, own.generation));
        match (older, lives_elsewhere) {
            (Some(own), _) => match proof.filter(|p| may_go(own, p)) {
                Some(proof) => self.give_up(evacuated, own, &proof).await,
                None => {
                    self.leave(evacuated, own);
                    Settled::Left
                }
            },
            (None, true) => self.tell(evacuated).await,
            // It came back here by itself.
            (None, false) if own.is_some() => self.tell(evacuated).await,
            (None, false) => Settled::Left,
        }
    }

    async fn give_up(
        &self,
        evacuated: &Evacuated,
        own: &InstanceReport,
        proof: &Superseded,
    ) -> Settled {
        match self.remove(evacuated, own, proof).await {
            Ok(()) => self.tell(evacuated).await,
            Err(e) => {
                let instance = evacuated.instance;
                error!(%instance, error = %e, "the old copy cannot be removed yet");
                Settled::Left
            }
        }
    }

    async fn remove(
        &self,
        evacuated: &Evacuated,
        own: &InstanceReport,
        proof: &Superseded,
    ) -> hypervisor::Result<()> {
        let (instance, migration) = (evacuated.instance, evacuated.migration);
        let lives_on = evacuated.host.as_ref().map_or("?", |host| host.as_str());
        if own.power_state.is_active() {
            error!(%instance, %migration, lives_on, generation = own.generation,
                "the guest is active here and lives elsewhere: two copies on one disk; \
                 this older one is stopped");
            destroy::stop(&self.node, instance, proof).await?;
        }
        destroy::withdraw(&self.node, instance, proof).await?;
        info!(%instance, %migration, lives_on, "the old copy of an evacuated guest is removed");
        Ok(())
    }

    fn leave(&self, evacuated: &Evacuated, own: &InstanceReport) {
        let (instance, migration) = (evacuated.instance, evacuated.migration);
        match own.power_state.is_active() {
            true => error!(%instance, %migration,
                "the guest is active here and is being evacuated: it runs on until its new \
                 home is seen to have it"),
            false => warn!(%instance, %migration,
                "the guest is being evacuated: it is not started here"),
        }
    }

    async fn tell(&self, evacuated: &Evacuated) -> Settled {
        let (host, migration) = (&self.node.settings.host, evacuated.migration);
        match self.node.conductor.evacuated_removed(host, migration).await {
            Ok(()) => Settled::Done,
            Err(e) => {
                warn!(%migration, "the conductor was not told that an evacuated guest is gone: {}",
                    Chain(&e));
                Settled::Left
            }
        }
    }

    /// Until there is a reason to ask again.
    async fn wait(&mut self, is_settled: bool) {
        if !is_settled {
            drop(timeout(AGAIN, self.connection_is_back()).await);
            return;
        }
        while timeout(AGAIN, self.connection_is_back()).await.is_err() {
            self.autostart.take_over().await;
        }
    }

    async fn connection_is_back(&mut self) {
        loop {
            match self.events.recv().await {
                Ok(Event::Connection { up: true }) | Err(RecvError::Lagged(_)) => return,
                Ok(_) => {}
                Err(RecvError::Closed) => std::future::pending().await,
            }
        }
    }
}

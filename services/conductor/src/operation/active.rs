//! Which of the nodes that are up has a dead node's guests active, by their own word: the
//! record may be younger than what somebody did, or older than itself. One round of
//! questions is about all guests that wait to be started, and serves all who wait for it.
//! Of one that is being started elsewhere nobody asks: its node would be slow to answer.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use drover_model::{
    api::compute::{FindActive, Locate, StepRef},
    ids::{HostName, InstanceId},
};
use drover_store::{Result, StoreError};
use futures_util::{FutureExt, StreamExt, stream};
use tokio::time::timeout;

use super::joined::Joined;
use crate::app::Context;

/// Whoever does not say in this time holds nobody up.
const AT_ONCE: Duration = Duration::from_secs(2);
/// Nodes that are asked at one time.
const MOST_ASKED: usize = 256;

/// Rounds of questions, by dead node. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Rounds {
    rounds: Joined<std::result::Result<Arc<Round>, Arc<StoreError>>>,
    /// Guests that the next round is about, by their dead node.
    waiting: Arc<Mutex<BTreeMap<HostName, BTreeSet<InstanceId>>>>,
}

/// What one round was about, and what was found.
#[derive(Debug, Default)]
struct Round {
    asked: BTreeSet<InstanceId>,
    active: BTreeMap<InstanceId, BTreeSet<HostName>>,
    /// Nodes that are asked again about each guest: of some they could not say it at once,
    /// or they did not answer, as one that does not know this question.
    unsure: BTreeMap<HostName, BTreeSet<InstanceId>>,
}

impl Rounds {
    /// Nodes that have the guest of a step active; where it is on its way in counts.
    /// `dead` is its own node.
    ///
    /// # Errors
    /// The record cannot be read.
    pub async fn active(
        &self,
        context: &Context,
        dead: &HostName,
        step: StepRef,
    ) -> std::result::Result<BTreeSet<HostName>, Arc<StoreError>> {
        let guest = step.instance;
        loop {
            self.waiting()
                .entry(dead.clone())
                .or_default()
                .insert(guest);
            let asking = async {
                let mut asked = self.waiting().remove(dead).unwrap_or_default();
                asked.insert(guest);
                round(context, dead, asked).await.map(Arc::new)
            };
            let round = self.rounds.ask(dead, asking.map(|r| r.map_err(Arc::new)));
            let round = round.await?;
            // One that began just then has taken it.
            if !round.asked.contains(&guest) {
                continue;
            }
            let mut active = round.active.get(&guest).cloned().unwrap_or_default();
            let unsure = round.unsure.iter().filter(|(_, of)| of.contains(&guest));
            active.extend(one_by_one(context, unsure.map(|(host, _)| host), step).await);
            return Ok(active);
        }
    }

    fn waiting(&self) -> MutexGuard<'_, BTreeMap<HostName, BTreeSet<InstanceId>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn round(context: &Context, dead: &HostName, asked: BTreeSet<InstanceId>) -> Result<Round> {
    let live = context.liveness();
    let nodes = context.store.nodes().await?;
    let up = nodes.into_iter().filter(|node| live.is_up(node));
    let others = up.map(|node| node.report.host).filter(|host| host != dead);
    let ask = FindActive {
        instances: asked.iter().copied().collect(),
    };
    let asking = others.map(|host| {
        let (agents, ask) = (&context.agents, &ask);
        async move {
            let answer = timeout(AT_ONCE, agents.ask_briefly(&host, ask, AT_ONCE)).await;
            (host, answer.ok().and_then(std::result::Result::ok))
        }
        .boxed()
    });
    let asking: Vec<_> = asking.collect();
    let mut answers = stream::iter(asking).buffer_unordered(MOST_ASKED);
    let mut round = Round::default();
    while let Some((host, answer)) = answers.next().await {
        let Some(found) = answer else {
            round.unsure.insert(host, asked.clone());
            continue;
        };
        for guest in found.active {
            round.active.entry(guest).or_default().insert(host.clone());
        }
        if !found.unseen.is_empty() {
            round
                .unsure
                .insert(host, found.unseen.into_iter().collect());
        }
    }
    round.asked = asked;
    Ok(round)
}

/// Which of these nodes say of the one guest, when they are asked about it alone, that
/// they have it active.
async fn one_by_one(
    context: &Context,
    hosts: impl Iterator<Item = &HostName>,
    step: StepRef,
) -> Vec<HostName> {
    let asking = hosts.map(|host| {
        async move {
            let located = timeout(AT_ONCE, context.agents.ask(host, &Locate(step))).await;
            let presence = located.ok()?.ok()?.presence;
            presence.has_qemu().then(|| host.clone())
        }
        .boxed()
    });
    let asking: Vec<_> = asking.collect();
    let answers = stream::iter(asking).buffer_unordered(MOST_ASKED);
    answers.filter_map(std::future::ready).collect().await
}

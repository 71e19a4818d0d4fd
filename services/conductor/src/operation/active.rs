//! Which of the nodes that are up has a dead node's guests active, by their own word: the
//! record may be younger than what somebody did, or older than itself. One round of
//! questions is about all guests of the dead node, and serves all who wait for it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use drover_model::{
    api::compute::FindActive,
    ids::{HostName, InstanceId},
};
use drover_store::{Result, StoreError};
use futures_util::{FutureExt, StreamExt, stream};

use super::joined::Joined;
use crate::app::Context;

/// Whoever does not say in this time holds nobody up.
const AT_ONCE: Duration = Duration::from_secs(2);
/// Nodes that are asked at one time.
const MOST_ASKED: usize = 256;

/// Rounds of questions, by dead node. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Rounds(Joined<std::result::Result<Arc<Round>, Arc<StoreError>>>);

/// What one round was about, and what was found.
#[derive(Debug, Default)]
struct Round {
    asked: BTreeSet<InstanceId>,
    active: BTreeMap<InstanceId, BTreeSet<HostName>>,
}

impl Rounds {
    /// Nodes that have a guest of that dead node active; where it is on its way in counts.
    ///
    /// # Errors
    /// The record cannot be read.
    pub async fn active(
        &self,
        context: &Context,
        dead: &HostName,
        guest: InstanceId,
    ) -> std::result::Result<BTreeSet<HostName>, Arc<StoreError>> {
        loop {
            let asking = async { round(context, dead, guest).await.map(Arc::new) };
            let round = self.0.ask(dead, asking.map(|r| r.map_err(Arc::new)));
            let round = round.await?;
            // Another's round may be about others alone, if the record has it elsewhere.
            if round.asked.contains(&guest) {
                return Ok(round.active.get(&guest).cloned().unwrap_or_default());
            }
        }
    }
}

async fn round(context: &Context, dead: &HostName, guest: InstanceId) -> Result<Round> {
    let there = context.store.instances(Some(dead), None).await?;
    let asked: BTreeSet<_> = there.iter().map(|row| row.id).chain([guest]).collect();
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
            let answer = agents.find_active(&host, ask, AT_ONCE).await;
            (host, answer)
        }
        .boxed()
    });
    let asking: Vec<_> = asking.collect();
    let mut answers = stream::iter(asking).buffer_unordered(MOST_ASKED);
    let mut active = BTreeMap::<_, BTreeSet<_>>::new();
    while let Some((host, answer)) = answers.next().await {
        for guest in answer.into_iter().flat_map(|found| found.active) {
            active.entry(guest).or_default().insert(host.clone());
        }
    }
    Ok(Round { asked, active })
}

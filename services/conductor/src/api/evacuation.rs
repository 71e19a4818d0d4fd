//! What operators and agents say about dead nodes, and about those that return.

use drover_model::{
    api::conductor::{
        Evacuated, EvacuatedAnswer, EvacuatedRemoved, ForceDown, ForgetNode, ListEvacuated,
    },
    api::{
        compute::{CopySeen, StepRef},
        conductor::method,
    },
    guest::Presence,
    ids::HostName,
};
use drover_rpc::{RemoteFailure, Request};
use drover_store::StoreError;
use futures_util::{FutureExt, StreamExt, stream};
use serde_json::Value;
use tracing::info;

use super::{
    Answer, DroverEndpoint,
    failure::{store_failure, to_value},
};

/// New homes asked at once.
const AT_ONCE: usize = 8;

impl DroverEndpoint {
    /// Dead nodes, and returning ones.
    pub(super) async fn handle_evacuation(&self, request: &Request) -> Answer {
        match request.method() {
            method::FORCE_DOWN => self.force_down(&request.args()?).await,
            method::FORGET_NODE => self.forget_node(&request.args()?).await,
            method::LIST_EVACUATED => to_value(&self.list_evacuated(&request.args()?).await?),
            method::EVACUATED_REMOVED => self.evacuated_removed(&request.args()?).await,
            other => Err(RemoteFailure::runtime_error(format!(
                "{other} is listed and not served"
            ))),
        }
    }

    async fn force_down(&self, ask: &ForceDown) -> Answer {
        let set = self
            .context
            .store
            .force_down(&ask.host, ask.forced_down)
            .await;
        let row = set.map_err(|e| store_failure(&e))?;
        info!(host = %ask.host, forced_down = ask.forced_down, "node declared");
        to_value(&self.node(&row).await?)
    }

    /// Ends a node that will not come back.
    async fn forget_node(&self, ask: &ForgetNode) -> Answer {
        let (host, live) = (&ask.host, self.context.liveness());
        let silent_since_ms = live.now_ms.saturating_sub(live.down_after_ms);
        let store = &self.context.store;
        match ask.dry_run {
            true => store.may_forget_node(host, silent_since_ms).await,
            false => store.forget_node(host, silent_since_ms).await,
        }
        .map_err(|e| store_failure(&e))?;
        if !ask.dry_run {
            info!(%host, "the node is forgotten");
        }
        Ok(Value::Null)
    }

    /// What of a node lives elsewhere. Of each its home is asked now: only where
    /// it is seen may the old copy go (invariant 3).
    ///
    /// The node is noted as heard of before its evacuations are read, and an
    /// evacuation is on the record before it looks whether the node was heard of:
    /// so either the node is told of it, or it is refused (invariant 1).
    async fn list_evacuated(&self, ask: &ListEvacuated) -> Result<EvacuatedAnswer, RemoteFailure> {
        let (store, now_ms) = (&self.context.store, self.context.clock.now_ms());
        let heard = store.heard(&ask.host, now_ms).await;
        heard.map_err(|e| store_failure(&e))?;
        let listed = store.evacuated_from(&ask.host).await;
        let listed = listed.map_err(|e| store_failure(&e))?;
        let asking: Vec<_> = listed
            .into_iter()
            .map(|(_, evacuated)| self.confirm(evacuated, &ask.host).boxed())
            .collect();
        let answers: Vec<_> = stream::iter(asking).buffered(AT_ONCE).collect().await;
        let mut instances = Vec::new();
        for answer in answers {
            instances.extend(answer.map_err(|e| store_failure(&e))?);
        }
        Ok(EvacuatedAnswer { instances })
    }

    async fn confirm(
        &self,
        mut evacuated: Evacuated,
        asking: &HostName,
    ) -> drover_store::Result<Option<Evacuated>> {
        if evacuated.host.is_none() {
            return Ok(Some(evacuated));
        }
        let id = evacuated.instance.to_string();
        let row = match self.context.store.find_instance(&id).await {
            Ok(row) => row,
            Err(StoreError::NotFound(_)) => return Ok(Some(evacuated)),
            Err(error) => return Err(error),
        };
        // It may have moved on since, or have come back and be the only copy.
        if row.host == *asking {
            return Ok(None);
        }
        let step = StepRef {
            migration: evacuated.migration,
            instance: evacuated.instance,
        };
        let seen = self.context.agents.look_at_copy(&row.host, step).await;
        let generation = evacuated.generation;
        let newer = |seen: &CopySeen| {
            let is_there = matches!(seen.presence, Presence::Present(_));
            is_there && seen.generation.is_some_and(|theirs| theirs >= generation)
        };
        evacuated.seen = seen.ok().filter(newer);
        evacuated.confirmed = evacuated.seen.is_some();
        evacuated.host = Some(row.host);
        Ok(Some(evacuated))
    }

    async fn evacuated_removed(&self, ask: &EvacuatedRemoved) -> Answer {
        let store = &self.context.store;
        let removed = store.old_copy_removed(&ask.host, ask.migration).await;
        removed.map_err(|e| store_failure(&e))?;
        info!(host = %ask.host, migration = %ask.migration, "the old copy of an evacuated instance is gone");
        Ok(Value::Null)
    }
}

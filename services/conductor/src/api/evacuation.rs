//! What operators and agents say about dead nodes, and about those that return.

use drover_model::{
    api::conductor::{
        Evacuated, EvacuatedAnswer, EvacuatedRemoved, ForceDown, ForgetNode, KeptOff, ListEvacuated,
    },
    api::{
        compute::{CopySeen, LookAtCopy, StepRef},
        conductor::method,
    },
    guest::Presence,
    ids::{HostName, InstanceId},
    migration::MigrationStatus,
    operation::{EvacuateOptions, Task},
};
use drover_rpc::{RemoteFailure, Request};
use drover_store::{StoreError, instances::InstanceRow, retention::Forgetting};
use futures_util::{FutureExt, StreamExt, stream};
use serde_json::Value;
use tracing::{info, warn};

use super::{
    Answer, DroverEndpoint,
    failure::{store_failure, to_value},
};
use crate::operation::{evacuation, look};

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
        let evacuable = self.evacuable(host).await;
        let how = Forgetting {
            now_ms: live.now_ms,
            silent_since_ms: live.now_ms.saturating_sub(live.down_after_ms),
            evacuable: evacuable.map_err(|e| store_failure(&e))?,
            despite_lost_guests: ask.despite_lost_guests,
        };
        let store = &self.context.store;
        match ask.dry_run {
            true => store.may_forget_node(host, &how).await,
            false => store.forget_node(host, &how).await,
        }
        .map_err(|e| store_failure(&e))?;
        if !ask.dry_run {
            info!(%host, "the node is forgotten");
        }
        Ok(Value::Null)
    }

    /// Guests of a node that an evacuation of it would start elsewhere.
    async fn evacuable(&self, host: &HostName) -> drover_store::Result<Vec<InstanceId>> {
        let options = EvacuateOptions::new(host.clone());
        let examinations = evacuation::examine(&self.context, &options).await?;
        let task = Task::Evacuate(options);
        let planned = look::plan(&self.context, &task, None, examinations).await?;
        Ok(planned.plan.moving().map(|m| m.instance).collect())
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
        let kept_off = self.kept_off(ask).await;
        Ok(EvacuatedAnswer {
            instances,
            kept_off: kept_off.map_err(|e| store_failure(&e))?,
        })
    }

    /// Which of the guests that a node is about to start must stay off there. One
    /// that is not on the record is known nowhere else.
    async fn kept_off(&self, ask: &ListEvacuated) -> drover_store::Result<Vec<KeptOff>> {
        let mut kept_off = Vec::new();
        for instance in &ask.starting {
            let kept = self.why_kept_off(*instance, &ask.host).await?;
            if let Some(home) = kept.as_ref().and_then(|kept| kept.lives_on.as_ref()) {
                warn!(host = %ask.host, %instance, %home,
                    "a guest is not started where its node booted: it lives elsewhere");
            }
            kept_off.extend(kept);
        }
        Ok(kept_off)
    }

    async fn why_kept_off(
        &self,
        instance: InstanceId,
        asking: &HostName,
    ) -> drover_store::Result<Option<KeptOff>> {
        // In this order: where a migration took it, the record says by its end.
        if let Some(reason) = self.under_way(instance).await? {
            return Ok(Some(KeptOff {
                instance,
                reason,
                lives_on: None,
            }));
        }
        let id = instance.to_string();
        match self.context.store.find_instance(&id).await {
            Ok(row) => Ok(kept_off_by(&row, asking)),
            Err(StoreError::NotFound(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// In words, that a migration decides where an instance is; none once it has
    /// arrived, or if there is none.
    async fn under_way(&self, instance: InstanceId) -> drover_store::Result<Option<String>> {
        use MigrationStatus::{Confirming, Finished};
        let active = match self.context.store.active_migration(instance).await {
            // One that only a newer conductor understands decides all the same.
            Err(error @ StoreError::Newer { .. }) => return Ok(Some(error.to_string())),
            active => active?,
        };
        let moving = active.filter(|m| !matches!(m.status, Finished | Confirming));
        Ok(moving.map(|m| format!("migration {} is under way", m.uuid)))
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
        let seen = self.context.agents.ask(&row.host, &LookAtCopy(step)).await;
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

/// Whether the record has an instance elsewhere than on the node that asks.
fn kept_off_by(row: &InstanceRow, asking: &HostName) -> Option<KeptOff> {
    let kept = |reason, lives_on| KeptOff {
        instance: row.id,
        reason,
        lives_on,
    };
    let home = &row.host;
    let other = row.other.as_ref().filter(|other| other.host != *asking);
    match other {
        // The record follows that copy, or it goes: the next reports decide.
        Some(other) => Some(kept(
            format!(
                "another copy of it is {} on {}",
                other.seen.power_state, other.host
            ),
            None,
        )),
        None if home == asking => None,
        // The record follows to whichever node lists it.
        None if row.missing_since_ms.is_some() => Some(kept(
            format!("it is on the record on {home}, which does not list it any more"),
            None,
        )),
        None => Some(kept(
            format!("it lives on {home}; the definition here is an old one"),
            Some(home.clone()),
        )),
    }
}

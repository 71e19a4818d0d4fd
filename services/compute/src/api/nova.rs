//! What Nova's frontends ask of a compute node, with Nova's names and arguments
//! (null namespace, version 6.x). The conductor decides on migrations, so every
//! wish is passed on to it under the caller's context.

use std::sync::Arc;

use async_trait::async_trait;
use drover_model::{
    ids::{InstanceId, MigrationId},
    migration::{Ending, Migration},
};
use drover_rpc::{Endpoint, RemoteFailure, Request, RequestContext, RpcError};
use drover_runtime::error_chain::Chain;
use serde::Deserialize;
use serde_json::Value;
use tracing::info;

use crate::{migration::Registry, node::Node};

/// The newest interface of Nova's whose methods these are.
const VERSION: &str = "6.5";
const ABORT: &str = "live_migration_abort";
const FORCE_COMPLETE: &str = "live_migration_force_complete";
const CONFIRM: &str = "confirm_resize";
const REVERT: &str = "revert_resize";
const METHODS: &[&str] = &[ABORT, FORCE_COMPLETE, CONFIRM, REVERT];

/// Nova's interface of a compute node.
pub(crate) struct NovaCompute {
    pub(crate) node: Arc<Node>,
    pub(crate) registry: Arc<Registry>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Abort {
    instance: NovaInstance,
    migration_id: i64,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ForceComplete {
    instance: NovaInstance,
}

/// `confirm_resize` and `revert_resize`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct EndResize {
    instance: NovaInstance,
    /// Whole, or by its id; by the instance alone if it is left out.
    #[serde(default)]
    migration: Value,
    /// The scheduler's business.
    #[serde(default, rename = "request_spec")]
    _request_spec: Value,
}

impl EndResize {
    /// Whether a migration is the one that is meant.
    fn means(&self, found: &Migration) -> bool {
        let data = self
            .migration
            .get("nova_object.data")
            .unwrap_or(&self.migration);
        match data {
            Value::Null => true,
            Value::Object(named) => {
                let uuid = named.get("uuid").and_then(Value::as_str);
                let id = named.get("id").and_then(Value::as_i64);
                uuid == Some(&found.uuid.to_string()) || id == Some(found.id)
            }
            Value::Number(id) => id.as_i64() == Some(found.id),
            Value::String(text) => *text == found.uuid.to_string() || *text == found.id.to_string(),
            _ => false,
        }
    }
}

/// An instance as Nova's frontends name one: its UUID, or the whole of it as a
/// serialised versioned object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Value")]
struct NovaInstance(InstanceId);

impl TryFrom<Value> for NovaInstance {
    type Error = String;

    fn try_from(value: Value) -> Result<Self, String> {
        let uuid = match &value {
            Value::String(uuid) => Some(uuid.as_str()),
            object => object
                .pointer("/nova_object.data/uuid")
                .and_then(Value::as_str),
        };
        let uuid = uuid.ok_or("an instance is a UUID or a versioned object that has one")?;
        let id = uuid
            .parse()
            .map_err(|e| format!("the instance's UUID: {e}"))?;
        Ok(Self(id))
    }
}

#[async_trait]
impl Endpoint for NovaCompute {
    fn version(&self) -> &str {
        VERSION
    }

    fn methods(&self) -> &[&str] {
        METHODS
    }

    async fn handle(&self, request: Request) -> Result<Value, RemoteFailure> {
        let who = request.context();
        match request.method() {
            ABORT => {
                let Abort {
                    instance: NovaInstance(instance),
                    migration_id,
                } = request.args()?;
                info!(%instance, migration_id, "a frontend asks to abort; the conductor decides");
                let sent = self
                    .node
                    .conductor
                    .abort(migration_id.to_string(), who)
                    .await;
                sent.map_err(|e| not_passed_on(&e))?;
            }
            CONFIRM | REVERT => {
                let ending = match request.method() {
                    CONFIRM => Ending::Confirm,
                    _ => Ending::Revert,
                };
                self.end_resize(&request.args()?, ending, who).await?;
            }
            _ => {
                let ForceComplete {
                    instance: NovaInstance(instance),
                } = request.args()?;
                let migration = self.migration_of(instance, who).await?;
                info!(%instance, %migration, "a frontend asks to force the end; the conductor decides");
                let sent = self.node.conductor.force_complete(migration, who).await;
                sent.map_err(|e| not_passed_on(&e))?;
            }
        }
        Ok(Value::Null)
    }
}

impl NovaCompute {
    /// The migration under way of an instance: this node knows its own.
    async fn migration_of(
        &self,
        instance: InstanceId,
        who: &RequestContext,
    ) -> Result<MigrationId, RemoteFailure> {
        if let Some(own) = self.registry.holder(instance) {
            return Ok(own);
        }
        let found = self.node.conductor.active_migration(instance, who).await;
        let found = found.map_err(|e| not_passed_on(&e))?;
        found
            .map(|m| m.uuid)
            .ok_or_else(|| not_found(instance, "running"))
    }

    /// Confirms or reverts what waits for that.
    async fn end_resize(
        &self,
        ask: &EndResize,
        ending: Ending,
        who: &RequestContext,
    ) -> Result<(), RemoteFailure> {
        let NovaInstance(instance) = ask.instance;
        let found = self.node.conductor.active_migration(instance, who).await;
        let found = found.map_err(|e| not_passed_on(&e))?;
        let found = found
            .filter(|m| ask.means(m))
            .ok_or_else(|| not_found(instance, "finished"))?;
        info!(%instance, migration = found.id, ?ending, "a frontend ends a cold migration");
        let sent = self.node.conductor.end_with(found.uuid, ending, who).await;
        sent.map_err(|e| not_passed_on(&e))
    }
}

fn not_found(instance: InstanceId, status: &str) -> RemoteFailure {
    let message = format!("Migration not found for instance {instance} with status {status}.");
    RemoteFailure::nova("MigrationNotFoundByStatus", message)
}

fn not_passed_on(error: &RpcError) -> RemoteFailure {
    match error.failure() {
        Some(failure) => failure.clone(),
        None => {
            let message = format!("The conductor was not reached: {}", Chain(error));
            RemoteFailure::nova("ServiceUnavailable", message).passing()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UUID: &str = "6f1f3a36-6b3e-4a7e-9f0a-1d9a4b7d0001";

    #[test]
    fn an_instance_comes_as_text_or_as_novas_object() {
        let id = NovaInstance(UUID.parse().unwrap());
        let plain = serde_json::json!({"instance": UUID});
        let read: ForceComplete = serde_json::from_value(plain).unwrap();
        assert_eq!(read.instance, id);

        let object = serde_json::json!({
            "instance": {
                "nova_object.name": "Instance",
                "nova_object.namespace": "nova",
                "nova_object.version": "2.8",
                "nova_object.data": {"id": 1, "uuid": UUID, "flavor": {}},
                "nova_object.changes": ["flavor"],
            },
            "migration_id": 7,
        });
        let read: Abort = serde_json::from_value(object).unwrap();
        assert_eq!((read.instance, read.migration_id), (id, 7));
    }

    #[test]
    fn a_migration_is_named_by_object_number_or_text_or_not_at_all() {
        let found: Migration = serde_json::from_value(serde_json::json!({
            "id": 7, "uuid": "01890000-0000-7000-8000-000000000001", "instance_uuid": UUID,
            "instance_name": "vm1", "project_id": "demo", "migration_type": "migration",
            "options": {}, "status": "finished", "source_host": "kvm1", "dest_host": "kvm2",
            "dest_requested": true, "step": "settle", "step_started_at_ms": 0, "attempt": 1,
            "owner": "ctl", "requester": {}, "abort_requested": false,
            "force_complete_requested": false, "end_reason": null, "warnings": [],
            "decisions": [], "timings": [], "downtime_ms": null, "created_at_ms": 0,
            "updated_at_ms": 0, "finished_at_ms": null, "deadline_at_ms": null, "version": 1,
            "progress": {
                "phase": "done", "memory": {"total_bytes": 0, "processed_bytes": 0, "remaining_bytes": 0},
                "disk": {"total_bytes": 0, "processed_bytes": 0, "remaining_bytes": 0},
                "rate_bytes_s": 0, "dirty_rate_bytes_s": 0, "iteration": 0, "elapsed_ms": 0,
                "expected_downtime_ms": null, "allowed_downtime_ms": null, "eta_ms": null, "note": null,
            },
        }))
        .unwrap();
        let means = |migration: Value| {
            let ask = serde_json::json!({"instance": UUID, "migration": migration});
            serde_json::from_value::<EndResize>(ask)
                .unwrap()
                .means(&found)
        };
        let object =
            |id: i64, uuid: &str| serde_json::json!({"nova_object.data": {"id": id, "uuid": uuid}});
        let uuid = found.uuid.to_string();
        for named in [
            Value::Null,
            serde_json::json!(7),
            serde_json::json!("7"),
            serde_json::json!(uuid),
            object(7, UUID),
            object(1, &uuid),
        ] {
            assert!(means(named.clone()), "{named}");
        }
        for other in [
            serde_json::json!(8),
            serde_json::json!(UUID),
            object(1, UUID),
            serde_json::json!([]),
        ] {
            assert!(!means(other.clone()), "{other}");
        }
    }

    #[test]
    fn anything_else_is_refused() {
        for bad in [
            serde_json::json!({}),
            serde_json::json!({"instance": null}),
            serde_json::json!({"instance": "vm1"}),
            serde_json::json!({"instance": {"uuid": UUID}}),
            serde_json::json!({"instance": {"nova_object.data": {"uuid": 1}}}),
            serde_json::json!({"instance": UUID, "more": 1}),
        ] {
            assert!(serde_json::from_value::<ForceComplete>(bad).is_err());
        }
    }
}

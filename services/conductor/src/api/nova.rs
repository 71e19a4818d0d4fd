//! Namespace `compute_task` 1.x: what Nova's frontends cast, same names and
//! arguments as in Nova's RPC API. An instance comes as a plain UUID or as a
//! serialised versioned object.

use std::sync::Arc;

use async_trait::async_trait;
use drover_model::{
    ids::{HostName, InstanceId},
    migration::{BlockMigration, LiveOptions},
};
use drover_rpc::{Endpoint, RemoteFailure, Request};
use serde::Deserialize;
use serde_json::Value;
use tracing::warn;

use super::{Answer, DroverEndpoint, migrate::Wanted};

/// Newest version of the namespace in the Nova that was looked at.
const VERSION: &str = "1.26";
const LIVE_MIGRATE_INSTANCE: &str = "live_migrate_instance";

/// Namespace `compute_task`.
pub struct ComputeTaskEndpoint {
    drover: Arc<DroverEndpoint>,
}

/// `live_migrate_instance` 1.15. What it says of the request spec is the
/// scheduler's business, which Drover's placement does not need.
#[derive(Debug, Deserialize)]
struct LiveMigrateInstance {
    instance: Value,
    scheduler_hint: Option<SchedulerHint>,
    block_migration: Option<bool>,
    /// Only old hypervisors' drivers look at it.
    #[serde(rename = "disk_over_commit")]
    _disk_over_commit: Option<bool>,
    #[serde(rename = "request_spec")]
    _request_spec: Option<Value>,
}

#[derive(Debug, Default, Deserialize)]
struct SchedulerHint {
    host: Option<HostName>,
}

#[async_trait]
impl Endpoint for ComputeTaskEndpoint {
    fn namespace(&self) -> Option<&str> {
        Some("compute_task")
    }

    fn version(&self) -> &str {
        VERSION
    }

    fn methods(&self) -> &[&str] {
        &[LIVE_MIGRATE_INSTANCE]
    }

    async fn handle(&self, request: Request) -> Answer {
        let admitted = self.live_migrate_instance(&request).await;
        if let Err(failure) = &admitted
            && !request.wants_reply()
        {
            warn!(class = %failure.class, reason = %failure.message, "a frontend's request was refused");
        }
        admitted.map(|()| Value::Null)
    }
}

impl ComputeTaskEndpoint {
    /// The endpoint beside Drover's own.
    pub fn new(drover: Arc<DroverEndpoint>) -> Self {
        Self { drover }
    }

    async fn live_migrate_instance(&self, request: &Request) -> Result<(), RemoteFailure> {
        let ask: LiveMigrateInstance = request.args()?;
        let id = instance_id(&ask.instance)?;
        let wanted = Wanted {
            instance: self.drover.instance(&id.to_string()).await?,
            host: ask.scheduler_hint.and_then(|hint| hint.host),
            options: LiveOptions {
                block_migration: match ask.block_migration {
                    None => BlockMigration::Auto,
                    Some(true) => BlockMigration::Yes,
                    Some(false) => BlockMigration::No,
                },
                ..LiveOptions::default()
            },
        };
        self.drover.admit(request, wanted).await.map(|_| ())
    }
}

/// The UUID of an instance, however it is given.
fn instance_id(value: &Value) -> Result<InstanceId, RemoteFailure> {
    let text = match value {
        Value::String(text) => Some(text.as_str()),
        object => object
            .pointer("/nova_object.data/uuid")
            .and_then(Value::as_str),
    };
    let id = text.and_then(|t| t.parse().ok());
    id.ok_or_else(|| {
        RemoteFailure::value_error(
            "instance is neither a UUID nor a versioned object with a uuid in its nova_object.data",
        )
    })
}

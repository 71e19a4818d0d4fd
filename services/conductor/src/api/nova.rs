//! Namespace `compute_task` 1.x: what Nova's frontends cast, same names and
//! arguments as in Nova's RPC API. An instance comes as a plain UUID or as a
//! serialised versioned object.

use std::sync::Arc;

use async_trait::async_trait;
use drover_model::{
    ids::{HostName, InstanceId},
    migration::{BlockMigration, ColdOptions, Flavor, LiveOptions, Way},
    operation::{EvacuateOptions, Task},
};
use drover_rpc::{Endpoint, RemoteFailure, Request};
use drover_store::instances::InstanceRow;
use serde::Deserialize;
use serde_json::Value;
use tracing::warn;

use super::{Answer, DroverEndpoint};
use crate::admission::Wanted;

/// Newest version of the namespace in the Nova that was looked at.
const VERSION: &str = "1.26";
const LIVE_MIGRATE_INSTANCE: &str = "live_migrate_instance";
const MIGRATE_SERVER: &str = "migrate_server";
const REBUILD_INSTANCE: &str = "rebuild_instance";

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

/// `migrate_server` 1.20, live and cold.
#[derive(Debug, Deserialize)]
struct MigrateServer {
    instance: Value,
    scheduler_hint: Option<SchedulerHint>,
    live: bool,
    #[serde(default)]
    rebuild: bool,
    flavor: Option<Value>,
    block_migration: Option<bool>,
    clean_shutdown: Option<bool>,
    #[serde(rename = "disk_over_commit")]
    _disk_over_commit: Option<bool>,
    /// Nova's quotas and scheduler use these.
    #[serde(rename = "reservations")]
    _reservations: Option<Value>,
    #[serde(rename = "request_spec")]
    _request_spec: Option<Value>,
    #[serde(rename = "host_list")]
    _host_list: Option<Value>,
}

/// `rebuild_instance` 1.25. What it says of images, files and volumes is about
/// rebuilding from an image, which Drover does not.
#[derive(Debug, Deserialize)]
struct RebuildInstance {
    instance: Value,
    #[serde(default)]
    recreate: bool,
    #[serde(default)]
    host: Option<HostName>,
    #[serde(default)]
    target_state: Option<String>,
}

impl RebuildInstance {
    /// Why it is not done, if it is not an evacuation as Drover does it.
    fn problem(&self) -> Option<&'static str> {
        if !self.recreate {
            return Some(
                "recreate is false: an instance is started elsewhere from its own disks (evacuated), never built anew from an image",
            );
        }
        let stopped = self.target_state.as_deref() == Some("stopped");
        stopped.then_some("target_state is stopped: an evacuated instance is started")
    }
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
        &[LIVE_MIGRATE_INSTANCE, MIGRATE_SERVER, REBUILD_INSTANCE]
    }

    async fn handle(&self, request: Request) -> Answer {
        let admitted = match request.method() {
            MIGRATE_SERVER => self.migrate_server(&request).await,
            REBUILD_INSTANCE => self.rebuild_instance(&request).await,
            _ => self.live_migrate_instance(&request).await,
        };
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
            way: live(ask.block_migration),
            consent: None,
            operation: None,
        };
        self.drover.admit(request, wanted).await.map(|_| ())
    }

    async fn migrate_server(&self, request: &Request) -> Result<(), RemoteFailure> {
        let ask: MigrateServer = request.args()?;
        if ask.rebuild {
            return Err(RemoteFailure::value_error(
                "rebuild is true: migrate_server rebuilds nothing",
            ));
        }
        let id = instance_id(&ask.instance)?;
        let instance = self.drover.instance(&id.to_string()).await?;
        let way = match ask.live {
            true => live(ask.block_migration),
            false => Way::Cold(ColdOptions {
                // Without a clean shutdown the caller wants none at all.
                force_stop_after_s: (ask.clean_shutdown == Some(false)).then_some(0),
                flavor: new_flavor(&ask, &instance)?,
                ..ColdOptions::default()
            }),
        };
        let host = ask.scheduler_hint.and_then(|hint| hint.host);
        let wanted = Wanted {
            instance,
            host,
            way,
            consent: None,
            operation: None,
        };
        self.drover.admit(request, wanted).await.map(|_| ())
    }

    /// An evacuation of one instance: its node has to be proven dead first, as in
    /// one of all of them.
    async fn rebuild_instance(&self, request: &Request) -> Result<(), RemoteFailure> {
        let ask: RebuildInstance = request.args()?;
        if let Some(problem) = ask.problem() {
            return Err(RemoteFailure::value_error(problem));
        }
        let id = instance_id(&ask.instance)?;
        let instance = self.drover.instance(&id.to_string()).await?;
        let task = Task::Evacuate(EvacuateOptions {
            to: ask.host.into_iter().collect(),
            only: vec![id],
            ..EvacuateOptions::new(instance.host)
        });
        self.drover.begin_operation(request, task).await.map(drop)
    }
}

fn live(block_migration: Option<bool>) -> Way {
    Way::Live(LiveOptions {
        block_migration: match block_migration {
            None => BlockMigration::Auto,
            Some(true) => BlockMigration::Yes,
            Some(false) => BlockMigration::No,
        },
        ..LiveOptions::default()
    })
}

/// The flavor, if it is another than the instance has by its own object, or by
/// the record if it comes as a plain UUID.
fn new_flavor(
    ask: &MigrateServer,
    instance: &InstanceRow,
) -> Result<Option<Flavor>, RemoteFailure> {
    let Some(wanted) = ask.flavor.as_ref().filter(|value| !value.is_null()) else {
        return Ok(None);
    };
    let wanted = flavor(wanted).ok_or_else(|| {
        RemoteFailure::value_error("flavor has no vcpus and memory_mb in its nova_object.data")
    })?;
    let own = ask
        .instance
        .pointer("/nova_object.data/flavor")
        .and_then(flavor);
    let has = own.unwrap_or(Flavor {
        vcpus: instance.vcpus,
        memory_mb: instance.memory_mib,
    });
    Ok((wanted != has).then_some(wanted))
}

fn flavor(object: &Value) -> Option<Flavor> {
    let data = object.get("nova_object.data").unwrap_or(object);
    Some(Flavor {
        vcpus: u32::try_from(data.get("vcpus")?.as_u64()?).ok()?,
        memory_mb: data.get("memory_mb")?.as_u64()?,
    })
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

#[cfg(test)]
mod tests {
    use drover_model::guest::PowerState;
    use serde_json::json;

    use super::*;

    const UUID: &str = "6f1f3a36-6b3e-4a7e-9f0a-1d9a4b7d0001";

    fn row() -> InstanceRow {
        InstanceRow {
            id: UUID.parse().unwrap(),
            name: "vm1".into(),
            project: "demo".into(),
            host: "kvm1".parse().unwrap(),
            power_state: PowerState::Running,
            vcpus: 1,
            memory_mib: 128,
            disk_bytes: 0,
            generation: 0,
            changed_at_ms: 0,
            missing_since_ms: None,
            missing_reports: 0,
            node_is_new: false,
            unreadable: None,
            other: None,
            awaited: Vec::new(),
        }
    }

    fn wanted(instance: Value, flavor: Value) -> Result<Option<Flavor>, RemoteFailure> {
        let ask = json!({"instance": instance, "scheduler_hint": null, "live": false,
                         "flavor": flavor, "block_migration": null, "clean_shutdown": true});
        new_flavor(&serde_json::from_value(ask).unwrap(), &row())
    }

    fn object(vcpus: u64, memory_mb: u64) -> Value {
        json!({"nova_object.data": {"vcpus": vcpus, "memory_mb": memory_mb, "root_gb": 0}})
    }

    #[test]
    fn a_rebuild_is_an_evacuation_or_nothing() {
        let problem = |more: Value| {
            let mut ask = json!({
                "instance": UUID, "new_pass": "x", "injected_files": [], "image_ref": "i",
                "orig_image_ref": "i", "orig_sys_metadata": {}, "bdms": [],
                "on_shared_storage": null, "preserve_ephemeral": false, "host": "kvm2",
                "request_spec": null, "reimage_boot_volume": false, "target_state": null,
            });
            ask.as_object_mut()
                .unwrap()
                .extend(more.as_object().unwrap().clone());
            serde_json::from_value::<RebuildInstance>(ask)
                .unwrap()
                .problem()
        };
        assert_eq!(problem(json!({"recreate": true})), None);
        let rebuilt = problem(json!({"recreate": false}));
        assert!(rebuilt.is_some_and(|p| p.contains("recreate is false")));
        assert!(problem(json!({})).is_some());
        let stopped = problem(json!({"recreate": true, "target_state": "stopped"}));
        assert!(stopped.is_some_and(|p| p.contains("target_state")));
    }

    #[test]
    fn another_flavor_is_a_resize() {
        let large = Flavor {
            vcpus: 2,
            memory_mb: 256,
        };
        let with = |flavor: Value| json!({"nova_object.data": {"uuid": UUID, "flavor": flavor}});
        assert_eq!(wanted(UUID.into(), Value::Null).unwrap(), None);
        assert_eq!(wanted(UUID.into(), object(1, 128)).unwrap(), None);
        assert_eq!(wanted(UUID.into(), object(2, 256)).unwrap(), Some(large));
        let same = wanted(with(object(2, 256)), object(2, 256));
        assert_eq!(
            same.unwrap(),
            None,
            "the instance's own word on its flavor counts"
        );
        let changed = wanted(with(object(1, 128)), object(2, 256));
        assert_eq!(changed.unwrap(), Some(large));
        for bad in [
            json!({}),
            json!({"vcpus": "2", "memory_mb": 1}),
            json!({"vcpus": -1, "memory_mb": 1}),
        ] {
            assert!(wanted(UUID.into(), bad).is_err());
        }
    }
}

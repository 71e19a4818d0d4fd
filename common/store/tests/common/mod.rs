//! Records to hold to promises, in both databases, and what they are filled with.

use drover_model::{
    guest::PowerState,
    ids::{HostName, InstanceId, MigrationId},
    migration::{Migration, Way},
    node::{AllocationPolicy, Endpoint, HypervisorReport, InstanceReport, Inventory, NodeReport},
};
use drover_store::{Kind, Store};
use uuid::Uuid;

/// A server on which databases may be made, as a `postgresql://` URL.
const POSTGRESQL: &str = "DROVER_TEST_POSTGRESQL_URL";
/// Set to `1`, it turns the absence of one into a failure.
const REQUIRED: &str = "DROVER_REQUIRE_REAL";

/// Holds an empty record in SQLite to a promise.
pub(crate) async fn in_sqlite(promise: impl AsyncFnOnce(Store)) {
    promise(Store::in_memory().await.unwrap()).await;
}

/// Holds an empty record in PostgreSQL to a promise, or says that it cannot.
pub(crate) async fn in_postgresql(promise: impl AsyncFnOnce(Store)) {
    let Some(url) = postgresql_url().await else {
        return;
    };
    let store = Store::open(&url).await.unwrap();
    assert_eq!(store.kind(), Kind::Postgresql);
    promise(store).await;
}

/// An empty database of the server, or says that there is none.
pub(crate) async fn postgresql_url() -> Option<String> {
    let Ok(server) = std::env::var(POSTGRESQL) else {
        let required = std::env::var(REQUIRED).is_ok_and(|value| value == "1");
        assert!(
            !required,
            "{REQUIRED} is 1, and {POSTGRESQL} names no server"
        );
        println!("SKIPPED: {POSTGRESQL} names no server");
        return None;
    };
    sqlx::any::install_default_drivers();
    let admin = sqlx::AnyPool::connect(&server).await.unwrap();
    // A schema of its own for each; the server goes with the tests.
    let schema = format!("test_{}", Uuid::new_v4().simple());
    let create = sqlx::AssertSqlSafe(format!("CREATE SCHEMA {schema}"));
    sqlx::query(create).execute(&admin).await.unwrap();
    Some(format!("{server}?options=-csearch_path%3D{schema}"))
}

macro_rules! promises {
    ($($promise:ident,)*) => {
        mod sqlite {
            $(#[tokio::test] async fn $promise() { crate::common::in_sqlite(super::$promise).await })*
        }
        mod postgresql {
            $(#[tokio::test] async fn $promise() { crate::common::in_postgresql(super::$promise).await })*
        }
    };
}

pub(crate) fn host(name: &str) -> HostName {
    name.parse().unwrap()
}

pub(crate) fn listed(n: u128) -> InstanceReport {
    InstanceReport {
        id: InstanceId(Uuid::from_u128(n)),
        name: format!("vm{n}"),
        project: "demo".into(),
        generation: 0,
        power_state: PowerState::Running,
        incoming: false,
        vcpus: 1,
        memory_mib: 1024,
        disk_bytes: 1 << 30,
        migration: None,
        wishes: drover_model::node::Wishes::default(),
        usage: None,
        definition_digest: None,
        autostart: false,
    }
}

pub(crate) fn report(name: &str, sequence: u64, instances: Vec<InstanceReport>) -> NodeReport {
    NodeReport {
        host: host(name),
        agent_version: "0.1.0".into(),
        agent_started_ms: 1,
        sequence,
        clock_ms: 0,
        endpoint: Endpoint {
            address: name.into(),
            libvirt_uri: format!("qemu+tcp://{name}/system"),
            libvirt_port: 16509,
        },
        policy: AllocationPolicy {
            cpu_allocation_ratio: 1.0,
            ram_allocation_ratio: 1.0,
            reserved_memory_mib: 0,
        },
        hypervisor: HypervisorReport::Up {
            inventory: Inventory {
                hypervisor_type: "QEMU".into(),
                hypervisor_version: 7_002_000,
                libvirt_version: 9_000_000,
                arch: "x86_64".into(),
                cpu_model: "qemu64".into(),
                kvm: false,
                vcpus: 4,
                memory_mib: 4096,
                disk_bytes: 10 << 30,
                disk_free_bytes: 5 << 30,
            },
            instances,
        },
    }
}

pub(crate) fn migration(n: u128, instance: u128) -> Migration {
    let id = InstanceId(Uuid::from_u128(instance));
    Migration {
        uuid: MigrationId(Uuid::from_u128(n << 96 | n)),
        instance_name: format!("vm{instance}"),
        project_id: "demo".into(),
        step_started_at_ms: 0,
        owner: "ctl".into(),
        ..Migration::new(id, host("kvm1"), Way::default(), 1)
    }
}

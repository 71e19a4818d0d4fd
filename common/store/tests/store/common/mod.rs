//! Records to hold to promises, in every database, and what they are filled with.

#![allow(dead_code, unused_imports)] // Each test uses a part of it.

use drover_model::{
    guest::PowerState,
    ids::{HostName, InstanceId, MigrationId},
    migration::{Migration, Way},
    node::{AllocationPolicy, Endpoint, HypervisorReport, InstanceReport, Inventory, NodeReport},
};
pub(crate) use drover_store::scratch::postgresql_url;
use drover_store::{Kind, Store, Term, nodes::Reported};
use uuid::Uuid;

/// Holds an empty record in a file of SQLite to a promise.
pub(crate) async fn in_sqlite(promise: impl AsyncFnOnce(Store)) {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("drover.sqlite");
    let store = Store::open(&format!("sqlite://{}", file.display())).await;
    promise(store.unwrap()).await;
}

/// The same of one in memory, as simulations have it.
pub(crate) async fn in_memory(promise: impl AsyncFnOnce(Store)) {
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

macro_rules! promises {
    ($($promise:ident,)*) => {
        mod sqlite {
            $(#[tokio::test] async fn $promise() { crate::common::in_sqlite(super::$promise).await })*
        }
        mod memory {
            $(#[tokio::test] async fn $promise() { crate::common::in_memory(super::$promise).await })*
        }
        mod postgresql {
            $(#[tokio::test] async fn $promise() { crate::common::in_postgresql(super::$promise).await })*
        }
    };
}

/// A lease that outlasts every test, ms.
pub(crate) const HELD: u64 = 600_000;

/// Until a lease of no length has run out by the clock of any database.
pub(crate) async fn passed() {
    tokio::time::sleep(std::time::Duration::from_millis(5)).await;
}

/// A lease of so long, from a moment that counts in SQLite alone.
pub(crate) fn term(now_ms: u64, lease_ms: u64) -> Term {
    Term { now_ms, lease_ms }
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
        unreadable: None,
    }
}

pub(crate) fn report(name: &str, sequence: u64, instances: Vec<InstanceReport>) -> NodeReport {
    NodeReport {
        host: host(name),
        agent_version: "0.1.0".into(),
        agent_started_ms: 1,
        incarnation: 0,
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

/// A node's reports from that number on, every 10 s, that list nothing: as many as it
/// takes to forget a guest, and no more. Gives what was noticed.
pub(crate) async fn lists_nothing(
    store: &Store,
    node: &str,
    first: u64,
    at_ms: u64,
) -> Vec<String> {
    let mut noticed = Vec::new();
    for n in 0..=7 {
        let report = report(node, first + n, vec![]);
        let kept = store.record_report(&report, at_ms + n * 10_000).await;
        match kept.unwrap() {
            Reported::Kept { notes } => noticed.extend(notes),
            other => panic!("{other:?}"),
        }
    }
    noticed
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

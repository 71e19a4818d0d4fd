//! Two conductors on one PostgreSQL record, in real time: what many admit at once
//! all ends, over-commits nothing, and survives one of them.

#![allow(clippy::unwrap_used)] // all of it is test

use std::time::Duration;

use drover_compute::hypervisor::fake::{GuestBuilder, NodeSpec};
use drover_conductor::config::ConductorSettings;
use drover_model::{
    ids::{HostName, InstanceId},
    operation::{DrainOptions, Operation, OperationStatus, Task},
};
use drover_store::scratch::postgresql_url;
use drover_tests::cloud::{CTL, Cloud};
use tokio::time::timeout;

/// The other conductor.
const OTHER: &str = "other";
/// Guests on each of the two nodes that are drained.
const GUESTS: usize = 20;
const GUEST_MIB: u64 = 256;
/// What each of the two others has room for, and not one more.
const ROOM_MIB: u64 = GUESTS as u64 * GUEST_MIB;
const RESERVED_MIB: u64 = 512;
/// What a test may take.
const PATIENCE: Duration = Duration::from_secs(120);

fn host(name: &str) -> HostName {
    name.parse().unwrap()
}

/// Two full nodes, two empty ones with room for them, two conductors.
async fn cloud(url: &str) -> (Cloud, Vec<InstanceId>) {
    let at_once = 2 * u32::try_from(GUESTS).unwrap();
    let settings = ConductorSettings {
        lease_s: 8,
        max_outbound_per_node: at_once,
        max_inbound_per_node: at_once,
        max_transfers: at_once,
        max_parallel_per_operation: at_once,
        ..ConductorSettings::default()
    };
    let mut cloud = Cloud::on_database(1, url, settings).await;
    cloud.start_conductor_named(OTHER).await;
    for name in ["kvm3", "kvm4"] {
        let spec = NodeSpec {
            memory_mib: ROOM_MIB + RESERVED_MIB,
            vcpus: 64,
            ..NodeSpec::default()
        };
        cloud.add_node(name, spec).await;
    }
    let mut guests = Vec::new();
    for node in ["kvm1", "kvm2"] {
        for n in 0..GUESTS {
            let guest = GuestBuilder::new(&format!("{node}-{n}"));
            guests.push(cloud.fabric.add_guest(node, guest.memory_mib(GUEST_MIB)));
        }
    }
    for id in &guests {
        cloud.adopted(*id).await;
    }
    (cloud, guests)
}

async fn drain(cloud: &Cloud, node: &str) -> Operation {
    let options = DrainOptions {
        to: vec![host("kvm3"), host("kvm4")],
        ..DrainOptions::new(host(node))
    };
    cloud.operate(&Task::Drain(options)).await.unwrap()
}

/// Follows both drains to their ends; no node is ever promised more than it has.
async fn both_end(cloud: &Cloud, drains: [&Operation; 2]) -> Vec<Operation> {
    let mut ended = Vec::new();
    loop {
        let rows = cloud.store.nodes().await.unwrap();
        let reports: Vec<_> = rows.iter().map(|row| &row.report).collect();
        for (row, usage) in rows.iter().zip(cloud.store.usages(&reports).await.unwrap()) {
            let (used, usable) = (usage.used.memory_mib, usage.usable.memory_mib);
            assert!(used <= usable, "{}: {used} of {usable}", row.report.host);
        }
        ended.clear();
        for drain in drains {
            ended.push(cloud.store.operation(drain.uuid).await.unwrap());
        }
        if ended.iter().all(|o| o.status.is_final()) {
            return ended;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Every guest runs once, on a node that was not drained; none failed to move for the
/// record's sake.
async fn check(cloud: &Cloud, guests: &[InstanceId], ended: &[Operation]) {
    for operation in ended {
        assert_eq!(
            operation.status,
            OperationStatus::Completed,
            "{operation:#?}"
        );
        for m in cloud.store.migrations_of(operation.uuid).await.unwrap() {
            let said = m.end_reason.as_ref().map(ToString::to_string);
            let said = said.unwrap_or_default();
            assert!(m.status.is_final() && !said.contains("database"), "{m:#?}");
        }
    }
    cloud.fabric.check_invariants().unwrap();
    for id in guests {
        let row = cloud.store.find_instance(&id.to_string()).await.unwrap();
        assert_eq!(cloud.fabric.running_on(*id), Some(row.host.clone()));
        assert!(["kvm3", "kvm4"].contains(&row.host.as_str()), "{row:?}");
    }
    assert!(cloud.store.claims().await.unwrap().is_empty());
}

#[tokio::test]
async fn forty_guests_that_two_drains_admit_at_once_all_move() {
    let Some(url) = postgresql_url().await else {
        return;
    };
    let work = async {
        let (cloud, guests) = cloud(&url).await;
        let (one, two) = tokio::join!(drain(&cloud, "kvm1"), drain(&cloud, "kvm2"));
        let ended = both_end(&cloud, [&one, &two]).await;
        check(&cloud, &guests, &ended).await;
    };
    timeout(PATIENCE, work).await.unwrap();
}

#[tokio::test]
async fn when_one_conductor_dies_in_the_midst_all_move() {
    let Some(url) = postgresql_url().await else {
        return;
    };
    let work = async {
        let (mut cloud, guests) = cloud(&url).await;
        let (one, two) = tokio::join!(drain(&cloud, "kvm1"), drain(&cloud, "kvm2"));
        // Some are over, some are on their way, some wait.
        loop {
            let own = cloud.store.migrations_of(one.uuid).await.unwrap();
            if own.iter().any(|m| m.status.is_final()) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        cloud.kill_conductor_named(&one.owner);
        assert!([CTL, OTHER].contains(&one.owner.as_str()));
        let ended = both_end(&cloud, [&one, &two]).await;
        check(&cloud, &guests, &ended).await;
    };
    timeout(PATIENCE, work).await.unwrap();
}

//! Operations on nodes in virtual time: what a drain moves and leaves, within
//! which limits, what a restore brings back, and that nothing that dies on the
//! way makes anything happen twice.

#![allow(clippy::unwrap_used)] // all of it is test

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use drover_compute::hypervisor::fake::{GuestBuilder, NodeSpec};
use drover_model::{
    api::conductor::{Node, NodeRef, method},
    guest::ImmovableKind,
    ids::{HostName, InstanceId, OperationId},
    migration::{Migration, MigrationStatus, Phase},
    operation::{
        BalanceOptions, DrainOptions, ItemState, MoveMode, Operation, OperationStatus as S,
        RestoreOptions, Returning, Task, Verdict,
    },
};
use drover_tests::cloud::{Cloud, eventually};

const LIMIT_PER_NODE: usize = 4;

fn host(name: &str) -> HostName {
    name.parse().unwrap()
}

fn drain(mode: MoveMode) -> Task {
    Task::Drain(DrainOptions {
        mode,
        ..DrainOptions::new(host("kvm1"))
    })
}

fn restore() -> Task {
    Task::Restore(RestoreOptions {
        host: host("kvm1"),
        returning: Returning::All,
        mode: MoveMode::Live,
        max_parallel: None,
        unknown: Default::default(),
    })
}

/// Three nodes; on the first `movable` guests and `tied` ones that cannot move
/// live.
async fn cloud(
    seed: u64,
    movable: usize,
    tied: usize,
) -> (Cloud, Vec<InstanceId>, Vec<InstanceId>) {
    let mut cloud = Cloud::start(seed).await;
    cloud.add_node("kvm3", NodeSpec::default()).await;
    let guest = |name: String| {
        let disk = format!("/var/lib/libvirt/images/{name}.qcow2");
        GuestBuilder::new(&name).memory_mib(512).disk(&disk, 64)
    };
    let mut free = Vec::new();
    for n in 0..movable {
        free.push(cloud.fabric.add_guest("kvm1", guest(format!("web{n}"))));
    }
    let mut bound = Vec::new();
    for n in 0..tied {
        let guest = guest(format!("gpu{n}")).immovable(ImmovableKind::HostDevice, "0000:01:00.0");
        bound.push(cloud.fabric.add_guest("kvm1", guest));
    }
    for id in free.iter().chain(&bound) {
        cloud.adopted(*id).await;
    }
    (cloud, free, bound)
}

async fn is_enabled(cloud: &Cloud, name: &str) -> bool {
    let ask = NodeRef { host: host(name) };
    let node: Node = cloud.call(method::GET_NODE, &ask).await.unwrap();
    node.enabled
}

/// Every guest runs once, where the record says; nothing is claimed, nothing is
/// left behind; each guest was begun once for every attempt.
async fn check(cloud: &Cloud, operation: &Operation) {
    if let Err(violations) = cloud.fabric.check_invariants() {
        panic!("{violations:?}\n{operation:#?}");
    }
    for item in &operation.items {
        let id = item.planned.instance.to_string();
        let row = cloud.store.find_instance(&id).await.unwrap();
        assert_eq!(
            cloud.fabric.running_on(row.id),
            Some(row.host.clone()),
            "{item:#?}"
        );
        if let ItemState::Moved { host, .. } = &item.state {
            assert_eq!(row.host, *host, "{item:#?}");
        }
    }
    let own = cloud.store.migrations_of(operation.uuid).await.unwrap();
    for item in &operation.items {
        let begun = own
            .iter()
            .filter(|m| m.instance_uuid == item.planned.instance);
        let moved = usize::from(matches!(item.state, ItemState::Moved { .. }));
        let moves = begun
            .filter(|m| m.status == MigrationStatus::Completed)
            .count();
        assert_eq!(moves, moved, "{item:#?}");
    }
    assert!(cloud.store.claims().await.unwrap().is_empty());
    eventually("nothing is left behind", async || {
        cloud.fabric.leftovers().is_empty().then_some(())
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_drain_moves_what_can_leaves_the_rest_and_does_what_the_dry_run_said() {
    let (cloud, free, bound) = cloud(1, 4, 2).await;
    let planned = cloud.dry_run(&drain(MoveMode::Live)).await.unwrap();
    assert!(
        is_enabled(&cloud, "kvm1").await,
        "a dry run changes nothing"
    );
    let begun = cloud.operate(&drain(MoveMode::Live)).await.unwrap();
    let ended = cloud.operation_end(begun.uuid).await;
    assert_eq!(ended.status, S::Incomplete, "{ended:#?}");
    assert!(!is_enabled(&cloud, "kvm1").await);
    for id in free {
        assert_ne!(cloud.fabric.running_on(id), Some(host("kvm1")));
    }
    for id in bound {
        assert_eq!(cloud.fabric.running_on(id), Some(host("kvm1")));
    }
    let target = |verdict: &Verdict| match verdict {
        Verdict::Moves { to, .. } => Some(to.clone()),
        Verdict::Stays { .. } => None,
    };
    let said: BTreeMap<_, _> = planned
        .moves
        .iter()
        .map(|m| (m.instance, target(&m.verdict)))
        .collect();
    let done: BTreeMap<_, _> = ended
        .items
        .iter()
        .map(|i| (i.planned.instance, target(&i.planned.verdict)))
        .collect();
    assert_eq!(said, done);
    check(&cloud, &ended).await;
}

#[tokio::test(start_paused = true)]
async fn never_do_more_send_than_the_limits_allow() {
    let (cloud, free, _) = cloud(2, 12, 0).await;
    let begun = cloud.operate(&drain(MoveMode::Live)).await.unwrap();
    let mut most = 0;
    let mut changes = cloud.store.changes();
    loop {
        let active = cloud.store.active_migrations().await.unwrap();
        let is_sending =
            |m: &&Migration| m.step == "transfer" && m.progress.phase < Phase::SwitchOver;
        let sending = active.iter().filter(is_sending).count();
        assert!(sending <= LIMIT_PER_NODE, "{sending} send");
        most = most.max(sending);
        let operation = cloud.store.operation(begun.uuid).await.unwrap();
        if operation.status.is_final() {
            assert_eq!(operation.status, S::Completed, "{operation:#?}");
            assert_eq!(operation.count("moved"), free.len());
            check(&cloud, &operation).await;
            break;
        }
        let _ = tokio::time::timeout(Duration::from_secs(1), changes.recv()).await;
    }
    assert_eq!(most, LIMIT_PER_NODE, "what is allowed is used");
}

#[tokio::test(start_paused = true)]
async fn a_drain_asked_for_again_is_the_same_and_a_drained_node_has_nothing_left() {
    let (cloud, ..) = cloud(3, 3, 0).await;
    let begun = cloud.operate(&drain(MoveMode::Live)).await.unwrap();
    let again = cloud.operate(&drain(MoveMode::Live)).await.unwrap();
    assert_eq!(again.uuid, begun.uuid);
    // Another is not taken for it.
    for other in [restore(), drain(MoveMode::Cold)] {
        let refused = cloud.operate(&other).await.unwrap_err();
        let failure = refused.failure().unwrap();
        assert!(failure.message.contains("host_busy"), "{failure:?}");
        let named = format!("operation {}", begun.id);
        assert!(failure.message.contains(&named), "{failure:?}");
    }
    cloud.operation_end(begun.uuid).await;
    let third = cloud.operate(&drain(MoveMode::Live)).await.unwrap();
    assert_ne!(third.uuid, begun.uuid);
    let ended = cloud.operation_end(third.uuid).await;
    assert_eq!(
        (ended.status, ended.items.len()),
        (S::Completed, 0),
        "{ended:#?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_drain_called_off_leaves_everything_running_and_the_node_closed() {
    let (cloud, ..) = cloud(4, 8, 0).await;
    // One that is sent until it is called off: virtual time may run ahead of the
    // record, and all others be there before the call.
    let busy = GuestBuilder::new("busy")
        .memory_mib(4096)
        .dirty_mib_s(5000)
        .working_set_mib(4000)
        .priority(9);
    let busy = cloud.fabric.add_guest("kvm1", busy);
    cloud.adopted(busy).await;
    let begun = cloud.operate(&drain(MoveMode::Live)).await.unwrap();
    let sent = |o: &Operation| {
        let mut items = o.items.iter();
        items.any(|i| i.planned.instance == busy && matches!(i.state, ItemState::Moving { .. }))
    };
    cloud.until_operation(begun.uuid, "moving", sent).await;
    cloud.cancel(begun.uuid).await.unwrap();
    let ended = cloud.operation_end(begun.uuid).await;
    assert_eq!(ended.status, S::Cancelled, "{ended:#?}");
    assert!(ended.items.iter().all(|i| i.state.is_final()), "{ended:#?}");
    assert_eq!(cloud.fabric.running_on(busy), Some(host("kvm1")));
    assert!(!is_enabled(&cloud, "kvm1").await);
    check(&cloud, &ended).await;
}

#[tokio::test(start_paused = true)]
async fn a_restore_brings_back_exactly_what_the_drain_took() {
    let (cloud, free, _) = cloud(5, 4, 0).await;
    let native = cloud.fabric.add_guest("kvm2", GuestBuilder::new("native"));
    cloud.adopted(native).await;
    let drained = cloud.operate(&drain(MoveMode::Live)).await.unwrap();
    cloud.operation_end(drained.uuid).await;
    let restored = cloud.operate(&restore()).await.unwrap();
    let ended = cloud.operation_end(restored.uuid).await;
    assert_eq!(ended.status, S::Completed, "{ended:#?}");
    assert!(is_enabled(&cloud, "kvm1").await);
    for id in free {
        assert_eq!(cloud.fabric.running_on(id), Some(host("kvm1")));
    }
    assert_eq!(cloud.fabric.running_on(native), Some(host("kvm2")));
    check(&cloud, &ended).await;
}

async fn killed_at(version: u64) -> Option<OperationId> {
    let (mut cloud, free, _) = cloud(100 + version, 4, 1).await;
    let begun = cloud.operate(&drain(MoveMode::Live)).await.unwrap();
    let there = |o: &Operation| o.version >= version || o.status.is_final();
    let at = cloud.until_operation(begun.uuid, "there", there).await;
    if at.status.is_final() {
        return None;
    }
    cloud
        .kill_and_start("conductor", Duration::from_secs(3))
        .await;
    let ended = cloud.operation_end(begun.uuid).await;
    assert_eq!(
        ended.status,
        S::Incomplete,
        "killed at {version}: {ended:#?}"
    );
    assert_eq!(
        ended.count("moved"),
        free.len(),
        "killed at {version}: {ended:#?}"
    );
    check(&cloud, &ended).await;
    Some(begun.uuid)
}

#[tokio::test(start_paused = true)]
async fn a_conductor_killed_at_any_moment_of_a_drain_ends_it_the_same() {
    let mut version = 1;
    while killed_at(version).await.is_some() {
        version += 1;
    }
    assert!(version >= 5, "it was killed {version} times only");
}

#[tokio::test(start_paused = true)]
async fn a_destination_that_dies_midway_stops_nothing_else() {
    let (mut cloud, free, _) = cloud(6, 6, 0).await;
    let begun = cloud.operate(&drain(MoveMode::Live)).await.unwrap();
    cloud
        .until_operation(begun.uuid, "moving", |o| o.count("moving") > 0)
        .await;
    cloud.kill_and_start("kvm2", Duration::from_secs(60)).await;
    let ended = cloud.operation_end(begun.uuid).await;
    assert_eq!(ended.count("moved"), free.len(), "{ended:#?}");
    check(&cloud, &ended).await;
}

/// Ten nodes with a hundred guests each, ten of those on the first busy with four
/// CPUs: the fewest that bring the spread under the threshold are six of them.
#[tokio::test(start_paused = true)]
async fn a_skewed_cluster_of_a_thousand_guests_is_balanced() {
    const BUSY: u64 = 400;
    let mut cloud = Cloud::start(3).await;
    cloud.settings.balance_duration_s = 60;
    cloud.settings.balance_max_moves = 20;
    cloud
        .kill_and_start("conductor", Duration::from_secs(1))
        .await;
    let spec = NodeSpec {
        vcpus: 64,
        memory_mib: 1 << 20,
        ..NodeSpec::default()
    };
    for name in ["kvm1", "kvm2"] {
        let spec = spec.clone();
        cloud.fabric.edit_node(name, |node| {
            (node.vcpus, node.memory_mib) = (spec.vcpus, spec.memory_mib);
        });
    }
    for n in 3..=10 {
        cloud.add_node(&format!("kvm{n}"), spec.clone()).await;
    }
    let mut busy = BTreeSet::new();
    for (node, n) in (1..=10).flat_map(|node| (0..100).map(move |n| (node, n))) {
        let guest = GuestBuilder::new(&format!("web{node}-{n}")).memory_mib(512);
        let is_busy = node == 1 && n < 10;
        let guest = match is_busy {
            true => guest.vcpus(4).cpu_percent(BUSY),
            false => guest.vcpus(1).cpu_percent(10),
        };
        let id = cloud.fabric.add_guest(&format!("kvm{node}"), guest);
        if is_busy {
            busy.insert(id);
        }
    }
    let balance = Task::Balance(BalanceOptions::default());
    let measured = Duration::from_secs(120);
    tokio::time::sleep(measured).await;

    let planned = cloud.dry_run(&balance).await.unwrap();
    let (before, promised) = planned.spread_percent.unwrap();
    assert!(before > 50.0 && promised <= 20.0, "{before} {promised}");
    let begun = cloud.operate(&balance).await.unwrap();
    let ended = cloud.operation_end(begun.uuid).await;
    assert_eq!(ended.status, S::Completed, "{ended:#?}");
    let moved: BTreeSet<_> = ended.items.iter().map(|i| i.planned.instance).collect();
    assert_eq!(moved.len(), 6, "{ended:#?}");
    assert!(moved.is_subset(&busy), "{ended:#?}");
    check(&cloud, &ended).await;

    // What was promised came true, and is measured so.
    tokio::time::sleep(measured).await;
    let after = cloud.dry_run(&balance).await.unwrap();
    assert_eq!(after.moving().count(), 0, "{after:#?}");
    let (now, _) = after.spread_percent.unwrap();
    assert!((now - promised).abs() < 1.0, "{now} {promised}");
}

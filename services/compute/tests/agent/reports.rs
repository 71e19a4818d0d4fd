//! Reports on the node, and what is said while a peer is away.

use drover_model::{
    api::compute::{AgentStatus, JobState, Outcome, method},
    node::{HypervisorReport, NodeReport},
};
use serde_json::json;

use crate::harness::*;

fn of(world: &World, node: &str) -> Vec<NodeReport> {
    let all = world.heard.nodes.lock().unwrap();
    all.iter()
        .filter(|r| r.host == host(node))
        .cloned()
        .collect()
}

fn guests(report: &NodeReport) -> usize {
    match &report.hypervisor {
        HypervisorReport::Up { instances, .. } => instances.len(),
        HypervisorReport::Down { reason } => panic!("{reason}"),
    }
}

#[tokio::test(start_paused = true)]
async fn a_node_reports_every_few_seconds_and_soon_after_something_happened() {
    let world = World::new().await;
    pause(12_000).await;
    let reports = of(&world, A);
    assert_eq!(reports.len(), 3);
    assert!(
        reports
            .windows(2)
            .all(|w| w[1].sequence == w[0].sequence + 1)
    );
    assert!(
        reports
            .iter()
            .all(|r| r.agent_started_ms == reports[0].agent_started_ms)
    );
    assert_eq!(reports[0].endpoint, world.fabric.endpoint(A));
    assert_eq!(guests(&reports[2]), 0);

    let m = world.migration(small());
    world.fabric.shut_down_guest(m.step.instance);
    world.fabric.start_guest(A, m.step.instance);
    pause(200).await;
    let prompt = of(&world, A);
    assert_eq!(
        prompt.len(),
        4,
        "what happens together is reported together"
    );
    assert_eq!(guests(&prompt[3]), 1);
}

#[tokio::test(start_paused = true)]
async fn a_guest_under_way_is_reported_with_its_migration() {
    let world = World::new().await;
    let m = world.migration(busy());
    world.prepare(&m).await.unwrap();
    world.send(&m).await.unwrap();
    pause(6_000).await;
    for node in [A, B] {
        let HypervisorReport::Up { instances, .. } = of(&world, node).pop().unwrap().hypervisor
        else {
            panic!()
        };
        assert_eq!(instances[0].migration, Some(m.step.migration), "{node}");
        assert_eq!(instances[0].incoming, node == B);
    }
}

#[tokio::test(start_paused = true)]
async fn a_libvirt_that_is_away_is_said_to_be_away() {
    let world = World::new().await;
    pause(1_000).await;
    world.fabric.libvirtd_away(A);
    pause(1_000).await;
    let report = of(&world, A).pop().unwrap();
    assert!(
        matches!(report.hypervisor, HypervisorReport::Down { .. }),
        "{report:?}"
    );
    let status: AgentStatus = world.call(A, method::GET_STATUS, &json!({})).await.unwrap();
    assert!(status.libvirt.is_err());
    world.fabric.libvirtd_back(A);
    pause(1_000).await;
    assert_eq!(guests(&of(&world, A).pop().unwrap()), 0);
}

#[tokio::test(start_paused = true)]
async fn a_lost_broker_loses_reports_and_nothing_else() {
    let mut world = World::new().await;
    let m = world.migration(small());
    world.prepare(&m).await.unwrap();
    world.send(&m).await.unwrap();
    world.broker.cut(A);
    pause(30_000).await;
    world.broker.heal(A);
    pause(20_000).await;
    assert!(matches!(world.outcome(&m).await, Outcome::Moved { .. }));
    world.settle(&m).await;
    world.assert_tidy(&m, B);
    let before = of(&world, A).len();
    pause(6_000).await;
    assert!(of(&world, A).len() > before, "reports go out again");
    world.stop(A).await;
}

#[tokio::test(start_paused = true)]
async fn an_agent_starts_without_broker_and_without_libvirt() {
    let mut world = World::without_agents().await;
    world.broker.cut(A);
    world.fabric.libvirtd_away(A);
    world.launch(A);
    pause(60_000).await;
    world.broker.heal(A);
    world.fabric.libvirtd_back(A);
    pause(20_000).await;
    assert_eq!(guests(&of(&world, A).pop().unwrap()), 0);
    let m = world.migration(small());
    assert_eq!(world.job(&m).await, JobState::Unknown);
}

//! What an agent remembers, and what it says when it has lost its memory.

use drover_model::{
    api::compute::{AgentStatus, Doing, Ended, GuestLocation, Known, method},
    ids::StateId,
};
use serde_json::json;

use crate::harness::*;

async fn located(world: &World, node: &str, m: &Move) -> GuestLocation {
    world.call(node, method::LOCATE, &m.step).await.unwrap()
}

async fn state(world: &World, node: &str) -> StateId {
    let status: AgentStatus = world
        .call(node, method::GET_STATUS, &json!({}))
        .await
        .unwrap();
    status.state.unwrap()
}

#[tokio::test(start_paused = true)]
async fn an_agent_tells_what_its_journal_knows() {
    let mut world = World::new().await;
    let m = world.migration(small());
    assert_eq!(located(&world, A, &m).await.known, Known::Nothing);
    world.prepare(&m).await.unwrap();
    let doing = |doing| Known::UnderWay { doing };
    assert_eq!(located(&world, B, &m).await.known, doing(Doing::Arriving));
    assert_eq!(located(&world, A, &m).await.known, Known::Nothing);
    world.send(&m).await.unwrap();
    assert_eq!(located(&world, A, &m).await.known, doing(Doing::Sending));
    world.restart(B).await;
    assert_eq!(located(&world, B, &m).await.known, doing(Doing::Arriving));
    world.outcome(&m).await;
    world.settle(&m).await;
    let ended = |how| Known::Ended { how };
    assert_eq!(located(&world, A, &m).await.known, ended(Ended::Left));
    assert_eq!(located(&world, B, &m).await.known, ended(Ended::Arrived));
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_lost_its_state_is_another_one() {
    let mut world = World::new().await;
    let m = world.migration(small());
    world.prepare(&m).await.unwrap();
    let before = located(&world, B, &m).await;
    assert_eq!(before.state, Some(state(&world, B).await));
    assert_ne!(before.state, located(&world, A, &m).await.state);
    world.restart(B).await;
    assert_eq!(located(&world, B, &m).await, before, "a restart is no loss");
    world.kill(B);
    std::fs::remove_dir_all(world.state_dir(B)).unwrap();
    world.start(B).await;
    let after = located(&world, B, &m).await;
    assert_eq!(after.known, Known::Nothing);
    assert!(after.state.is_some() && after.state != before.state);
}

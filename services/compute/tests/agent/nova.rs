//! What Nova's frontends ask of a node, as Nova's own classes put it on the wire.

use drover_model::ids::{InstanceId, MigrationId};
use drover_rpc::{RequestContext, RpcError, Target};
use serde_json::{Value, json};

use crate::harness::*;

fn nova(node: &str) -> Target {
    Target::topic("compute").server(node).version("6.0")
}

fn object(instance: InstanceId) -> Value {
    json!({
        "nova_object.name": "Instance",
        "nova_object.namespace": "nova",
        "nova_object.version": "2.8",
        "nova_object.data": {"id": 1, "uuid": instance.to_string(), "host": "kvm1"},
        "nova_object.changes": ["flavor"],
    })
}

async fn wishes(world: &World) -> Vec<(String, Value)> {
    pause(100).await;
    std::mem::take(&mut *world.heard.wishes.lock().unwrap())
}

#[tokio::test(start_paused = true)]
async fn an_abort_goes_to_the_conductor() {
    let world = World::new().await;
    let m = world.migration(small());
    let args = json!({"instance": object(m.step.instance), "migration_id": 17});
    let who = RequestContext::new().with("request_id", "req-1");
    world
        .client
        .cast(&nova(A), &who, "live_migration_abort", &args)
        .await
        .unwrap();
    let passed_on = vec![("abort_migration".to_owned(), json!({"migration": "17"}))];
    assert_eq!(wishes(&world).await, passed_on);
}

#[tokio::test(start_paused = true)]
async fn a_force_complete_finds_its_migration_first() {
    let world = World::new().await;
    let m = world.migration(busy());
    let args = json!({"instance": m.step.instance});
    let who = RequestContext::new();
    let target = nova(A);
    let none = world
        .client
        .call::<_, Value>(&target, &who, "live_migration_force_complete", &args);
    let error = none.await.unwrap_err();
    let failure = error.failure().unwrap();
    assert!(
        failure.is("nova.exception", "MigrationNotFoundByStatus"),
        "{failure}"
    );

    world.prepare(&m).await.unwrap();
    world.send(&m).await.unwrap();
    let own: Value = world
        .client
        .call(&nova(A), &who, "live_migration_force_complete", &args)
        .await
        .unwrap();
    assert_eq!(own, Value::Null);
    let passed_on = json!({"migration": m.step.migration});
    assert_eq!(
        wishes(&world).await,
        vec![("force_complete_migration".to_owned(), passed_on)]
    );
}

#[tokio::test(start_paused = true)]
async fn what_is_malformed_is_answered_as_python_would() {
    let world = World::new().await;
    let who = RequestContext::new();
    for (method, args, class) in [
        (
            "live_migration_abort",
            json!({"instance": "vm1", "migration_id": 1}),
            "TypeError",
        ),
        (
            "live_migration_abort",
            json!({"instance": InstanceId(uuid::Uuid::nil())}),
            "TypeError",
        ),
        (
            "live_migration_abort",
            json!({"instance": InstanceId(uuid::Uuid::nil()), "migration_id": "x"}),
            "TypeError",
        ),
        (
            "live_migration_force_complete",
            json!({"instance": {"nova_object.data": {}}}),
            "TypeError",
        ),
        ("rebuild_instance", json!({}), "NoSuchMethod"),
    ] {
        let error = world
            .client
            .call::<_, Value>(&nova(A), &who, method, &args)
            .await
            .unwrap_err();
        let RpcError::Remote { failure, .. } = &error else {
            panic!("{error}")
        };
        assert_eq!(failure.class, class, "{failure}");
    }
    let newer = Target::topic("compute").server(A).version("6.6");
    let args = json!({"instance": MigrationId::generate()});
    let error = world
        .client
        .call::<_, Value>(&newer, &who, "live_migration_force_complete", &args)
        .await;
    assert_eq!(
        error.unwrap_err().failure().unwrap().class,
        "UnsupportedVersion"
    );
}

//! Nodes boot, and start the guests that wish it: those alone of which nothing says
//! that they are elsewhere by now. No guest may ever run twice; the fabric sees if one
//! does, even for a moment.

use std::time::Duration;

use drover_compute::hypervisor::{ColdDriver, RebuildDriver, fake::GuestBuilder};
use drover_model::{
    api::conductor::{EvacuatedAnswer, KeptOff, ListEvacuated, method},
    guest::{PowerState, Presence},
    ids::{HostName, InstanceId},
    migration::{ColdOptions, MigrationStatus as S, Way},
};
use drover_tests::cloud::{Cloud, eventually};
use tokio::time::sleep;

const DISK: &str = "/var/lib/libvirt/images/web.qcow2";
const MINUTE: Duration = Duration::from_secs(60);
const OFF: Presence = Presence::Present(PowerState::Shutdown);

fn name(host: &str) -> HostName {
    host.parse().expect("a host name")
}

fn at(cloud: &Cloud, host: &str, id: InstanceId) -> Presence {
    let places = cloud.fabric.whereabouts(id);
    let here = places.into_iter().find(|(name, _)| name.as_str() == host);
    here.map_or(Presence::Absent, |(_, presence)| presence)
}

/// A guest on kvm1 that wishes to be started at boot, which is the agent's to do.
async fn guest(cloud: &Cloud) -> InstanceId {
    let builder = GuestBuilder::new("web").disk(DISK, 64).autostart();
    let id = cloud.fabric.add_guest("kvm1", builder);
    cloud.adopted(id).await;
    let driver = cloud.fabric.driver("kvm1");
    eventually("the wish is taken over", async || {
        let flagged = driver.unguarded_autostarts().await.expect("it answers");
        flagged.is_empty().then_some(())
    })
    .await;
    id
}

/// The node loses its power, and its agent with it.
fn dies(cloud: &mut Cloud, host: &str) {
    cloud.fabric.power_off(host);
    cloud.kill_agent(host);
}

/// Somebody brings kvm1's guest up on kvm2, on copies of its disks.
async fn up_on_kvm2(cloud: &Cloud, id: InstanceId) {
    let (here, there) = (cloud.fabric.driver("kvm1"), cloud.fabric.driver("kvm2"));
    let was = here.definition(id).await.expect("it answers");
    cloud.fabric.copy_file("kvm1", "kvm2", DISK);
    let defined = there.define(&was.expect("it is there"), None).await;
    defined.expect("nobody else has a domain of it");
    there.start(id).await.expect("nobody else runs it");
}

async fn is_on_record_on(cloud: &Cloud, host: &str, id: InstanceId) {
    eventually("the record follows", async || {
        let row = cloud.store.find_instance(&id.to_string()).await.ok()?;
        (row.host.as_str() == host && row.other.is_none()).then_some(())
    })
    .await;
}

async fn runs_on_kvm2_alone(cloud: &Cloud, id: InstanceId) {
    sleep(2 * MINUTE).await;
    if let Err(found) = cloud.fabric.check_invariants() {
        panic!("{found:?}");
    }
    assert_eq!(cloud.fabric.running_on(id), Some(name("kvm2")));
    assert_eq!(at(cloud, "kvm1", id), OFF, "neither started nor removed");
}

#[tokio::test(start_paused = true)]
async fn what_the_node_had_and_nobody_else_has_is_started() {
    let mut cloud = Cloud::start(1).await;
    let id = guest(&cloud).await;
    dies(&mut cloud, "kvm1");
    sleep(MINUTE).await;
    cloud.boot("kvm1").await;
    eventually("it is started", async || {
        (cloud.fabric.running_on(id) == Some(name("kvm1"))).then_some(())
    })
    .await;
    cloud.fabric.check_invariants().expect("nothing is amiss");
}

/// Moved by hand, its definition with the wish was left behind.
#[tokio::test(start_paused = true)]
async fn a_definition_that_was_left_behind_by_hand_is_not_started() {
    let mut cloud = Cloud::start(2).await;
    let id = guest(&cloud).await;
    cloud.fabric.kill_guest(id);
    up_on_kvm2(&cloud, id).await;
    is_on_record_on(&cloud, "kvm2", id).await;
    dies(&mut cloud, "kvm1");
    cloud.boot("kvm1").await;
    runs_on_kvm2_alone(&cloud, id).await;
}

/// Its node was dead when somebody brought it up elsewhere: the record has both.
#[tokio::test(start_paused = true)]
async fn a_guest_that_was_restored_elsewhere_by_hand_is_not_started() {
    let mut cloud = Cloud::start(3).await;
    let id = guest(&cloud).await;
    let was = cloud.fabric.driver("kvm1").definition(id).await;
    dies(&mut cloud, "kvm1");
    cloud.fabric.copy_file("kvm1", "kvm2", DISK);
    let there = cloud.fabric.driver("kvm2");
    let was = was.expect("it answered").expect("it is there");
    there.define(&was, None).await.expect("nobody else has it");
    there.start(id).await.expect("nobody else runs it");
    eventually("another copy is known", async || {
        let row = cloud.store.find_instance(&id.to_string()).await.ok()?;
        row.other
    })
    .await;
    cloud.boot("kvm1").await;
    runs_on_kvm2_alone(&cloud, id).await;
    is_on_record_on(&cloud, "kvm2", id).await;
}

async fn kept_off(cloud: &Cloud, host: &str, id: InstanceId) -> Vec<KeptOff> {
    let ask = ListEvacuated {
        host: name(host),
        starting: vec![id],
    };
    let answer: Result<EvacuatedAnswer, _> = cloud.call(method::LIST_EVACUATED, &ask).await;
    answer.expect("the conductor answers").kept_off
}

/// Until a migration has brought its guest somewhere, neither node starts it by itself;
/// once it has, the one that has it may.
#[tokio::test(start_paused = true)]
async fn a_guest_on_its_way_is_started_by_its_migration_alone() {
    let cloud = Cloud::start(4).await;
    let id = guest(&cloud).await;
    let unknown = "00000000-0000-4000-8000-000000000001";
    let unknown = unknown.parse().expect("a UUID");
    assert_eq!(kept_off(&cloud, "kvm1", id).await, []);
    assert_eq!(kept_off(&cloud, "kvm1", unknown).await, []);
    let way = Way::Cold(ColdOptions::default());
    let m = cloud.migrate_by(id, Some("kvm2"), &way).await;
    let m = m.expect("it is accepted");
    for host in ["kvm1", "kvm2"] {
        let [kept] = &kept_off(&cloud, host, id).await[..] else {
            panic!("{host} may start it");
        };
        assert!(kept.lives_on.is_none() && kept.reason.contains("under way"));
    }
    let m = cloud.until(m.uuid, "at rest", |m| m.status.rests()).await;
    assert_eq!(m.status, S::Finished, "{m:#?}");
    assert_eq!(kept_off(&cloud, "kvm2", id).await, []);
    let [kept] = &kept_off(&cloud, "kvm1", id).await[..] else {
        panic!("kvm1 may start it");
    };
    assert_eq!(kept.lives_on, Some(name("kvm2")));
}
